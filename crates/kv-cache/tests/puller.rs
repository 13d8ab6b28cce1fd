//! The puller, step by step: nothing is used before the verdict, and it ends exactly once.

use tandem_kv_cache::{FirstTokenBundle, GiveUp, PullAction, PullEvent, Puller, Verdict};
use tandem_types::ClaimId;

const CLAIM: ClaimId = ClaimId(3);

fn actions(puller: &mut Puller) -> Vec<PullAction> {
    std::iter::from_fn(|| puller.next_action()).collect()
}

fn pull(id: u64, blocks: std::ops::Range<u32>) -> PullAction {
    PullAction::Pull { id, claim: CLAIM, blocks }
}

fn ready(group: u32, first: u32, count: u32) -> PullEvent {
    PullEvent::Ready { group, first, count }
}

fn sealed() -> PullEvent {
    PullEvent::Sealed { tokens: 70, bundle: FirstTokenBundle::default() }
}

/// A puller of three blocks that has everything and waits for the verdict.
fn confirming() -> Puller {
    let mut puller = Puller::new(1, 3, 0);
    for event in [PullEvent::Claimed(CLAIM), ready(0, 0, 3), sealed(), PullEvent::Arrived(1)] {
        puller.on(event);
    }
    assert_eq!(actions(&mut puller), [pull(1, 0..3), PullAction::AskVerdict(CLAIM)]);
    puller
}

#[test]
fn pages_are_pulled_as_they_become_ready_in_every_group() {
    let mut puller = Puller::new(2, 3, 0);
    puller.on(PullEvent::Claimed(CLAIM));
    puller.on(ready(0, 0, 2));
    assert_eq!(actions(&mut puller), [], "the other group is behind");
    puller.on(ready(1, 0, 1));
    assert_eq!(actions(&mut puller), [pull(1, 0..1)]);
    puller.on(ready(1, 1, 2));
    assert_eq!(actions(&mut puller), [pull(2, 1..2)]);
    puller.on(ready(0, 2, 1));
    puller.on(sealed());
    assert_eq!(actions(&mut puller), [pull(3, 2..3)]);
    for id in [2, 1] {
        puller.on(PullEvent::Arrived(id));
        assert_eq!(actions(&mut puller), []);
    }
    puller.on(PullEvent::Arrived(3));
    assert_eq!(actions(&mut puller), [PullAction::AskVerdict(CLAIM)]);
}

#[test]
fn what_is_here_already_is_not_pulled_and_the_verdict_is_asked_for_all_the_same() {
    let mut puller = Puller::new(1, 3, 2);
    for event in [PullEvent::Claimed(CLAIM), ready(0, 0, 3), sealed()] {
        puller.on(event);
    }
    assert_eq!(actions(&mut puller), [pull(1, 2..3)]);
    let mut all_here = Puller::new(1, 2, 2);
    for event in [PullEvent::Claimed(CLAIM), ready(0, 0, 2), sealed()] {
        all_here.on(event);
    }
    assert_eq!(actions(&mut all_here), [PullAction::AskVerdict(CLAIM)]);
}

#[test]
fn long_prompts_are_pulled_in_batches_a_few_at_a_time() {
    let mut puller = Puller::new(1, 1000, 0);
    for event in [PullEvent::Claimed(CLAIM), ready(0, 0, 1000), sealed()] {
        puller.on(event);
    }
    let first = actions(&mut puller);
    assert_eq!(first.len(), 4);
    let mut pulled = 4;
    let mut next = 1;
    while pulled > 0 {
        puller.on(PullEvent::Arrived(next));
        next += 1;
        pulled -= 1;
        for action in actions(&mut puller) {
            match action {
                PullAction::Pull { .. } => pulled += 1,
                PullAction::AskVerdict(_) => assert_eq!(pulled, 0, "every byte is here"),
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(next - 1, 1000_u64.div_ceil(64));
}

#[test]
fn only_held_delivers_and_a_broken_stream_does_not_matter_any_more_then() {
    let mut puller = confirming();
    puller.on(PullEvent::StreamClosed("gone".into()));
    assert_eq!(actions(&mut puller), []);
    puller.on(PullEvent::Verdict(Verdict::Held));
    let deliver = PullAction::Deliver { tokens: 70, bundle: FirstTokenBundle::default() };
    assert_eq!(actions(&mut puller), [deliver]);
    assert!(puller.is_over());
    for (event, why) in [
        (PullEvent::Verdict(Verdict::Lost), GiveUp::Lost("the owner's verdict is lost".into())),
        (PullEvent::Verdict(Verdict::Superseded), GiveUp::Superseded),
        (PullEvent::NoVerdict("no answer".into()), GiveUp::Lost("no verdict: no answer".into())),
        (PullEvent::Deadline, GiveUp::Deadline),
    ] {
        let mut puller = confirming();
        puller.on(event);
        assert_eq!(actions(&mut puller), [PullAction::GiveUp(why)]);
    }
}

#[test]
fn whatever_goes_wrong_it_gives_up_once_and_says_nothing_after() {
    for (event, why) in [
        (PullEvent::Broken(1, "reset".into()), GiveUp::Transfer("reset".into())),
        (PullEvent::Done, GiveUp::Done),
        (PullEvent::Superseded, GiveUp::Superseded),
        (PullEvent::Lost("over".into()), GiveUp::Lost("over".into())),
        (PullEvent::StreamClosed("gone".into()), GiveUp::Lost("gone".into())),
        (PullEvent::Deadline, GiveUp::Deadline),
        (PullEvent::Verdict(Verdict::Held), GiveUp::Lost("a verdict nobody asked for".into())),
    ] {
        let mut puller = Puller::new(1, 3, 0);
        puller.on(PullEvent::Claimed(CLAIM));
        puller.on(ready(0, 0, 1));
        puller.on(event);
        let said = actions(&mut puller);
        assert_eq!(said, [PullAction::GiveUp(why)], "what it still wanted is no longer wanted");
        puller.on(ready(0, 1, 2));
        puller.on(PullEvent::Verdict(Verdict::Held));
        assert_eq!(actions(&mut puller), []);
    }
    let mut unclaimed = Puller::new(1, 3, 0);
    unclaimed.on(PullEvent::StreamClosed("refused".into()));
    assert_eq!(actions(&mut unclaimed), [PullAction::GiveUp(GiveUp::OwnerUnreachable("refused".into()))]);
}

#[test]
fn ready_ranges_that_make_no_sense_are_not_believed() {
    let mut puller = Puller::new(1, 3, 0);
    puller.on(PullEvent::Claimed(CLAIM));
    puller.on(ready(7, 0, 3));
    puller.on(ready(0, 2, 1));
    assert_eq!(actions(&mut puller), [], "no such group; a gap");
    puller.on(ready(0, 0, u32::MAX));
    assert_eq!(actions(&mut puller), [pull(1, 0..3)], "no more than the lease has");
}
