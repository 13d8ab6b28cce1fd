//! What every transport must hold. A new row of the table begins by passing this.
//!
//! "Midway" is made, not waited for: a pull is polled by hand until its owner's gate has let it through, and is
//! then left alone. It is far too long to fit into anybody's buffers.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Deref;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::task::Poll;
use std::time::Duration;

use tandem_chassis::seam;
use tandem_memory::Region;
use tandem_types::{ClaimId, Export, Incarnation, Time};
use tokio::sync::watch;

use crate::checksum;
use crate::{
    Buffers, ByteRange, Completion, Denied, Error, Exported, Gate, Options, Peer, Permit, Pull, PullError,
    Row, Transport,
};

mod processes;

pub use processes::{owner, run_with_processes};

const REGION: usize = 32 << 20;
const OWNER: Incarnation = Incarnation(0x5eed_1234_abcd_0007);
const CLAIM: ClaimId = ClaimId(42);
/// Much longer than anything here takes; only a failure waits so long.
const SOON: Duration = Duration::from_secs(60);

/// The row, and what its transport is made with.
struct Tested {
    row: &'static Row,
    options: Options,
}

impl Tested {
    fn transport(&self) -> Arc<dyn Transport> {
        (self.row.make)(&self.options)
    }
}

impl Deref for Tested {
    type Target = Row;

    fn deref(&self) -> &Row {
        self.row
    }
}

type Case = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs the whole suite for one row of the table.
///
/// # Panics
/// If the row does not hold what a transport must.
pub async fn run(row: &'static Row, options: &Options) {
    // Few, and for the length of a test program.
    let row: &'static Tested = Box::leak(Box::new(Tested { row, options: options.clone() }));
    let cases: Vec<(&str, Case)> = vec![
        ("sizes_and_batches", Box::pin(sizes_and_batches(row))),
        ("many_ranges_in_one_pull", Box::pin(many_ranges_in_one_pull(row))),
        ("many_at_once", Box::pin(many_at_once(row))),
        ("what_is_outside_is_refused", Box::pin(what_is_outside_is_refused(row))),
        ("a_claim_that_does_not_stand_brings_nothing", Box::pin(a_claim_that_does_not_stand(row))),
        ("a_claim_that_ends_midway", Box::pin(a_claim_that_ends_midway(row))),
        ("a_claim_superseded_midway", Box::pin(a_claim_superseded_midway(row))),
        ("checksums_are_those_of_what_arrived", Box::pin(checksums_are_those_of_what_arrived(row))),
        ("a_stale_export_is_told_apart", Box::pin(a_stale_export_is_told_apart(row))),
        ("a_peer_that_is_gone", Box::pin(a_peer_that_is_gone(row))),
        ("a_peer_that_dies_midway", Box::pin(a_peer_that_dies_midway(row))),
        ("a_pull_cancelled_midway", Box::pin(a_pull_cancelled_midway(row))),
        ("a_peer_closed_midway", Box::pin(a_peer_closed_midway(row))),
        ("a_deadline_that_has_passed", Box::pin(a_deadline_that_has_passed(row))),
        ("a_deadline_that_passes_midway", Box::pin(a_deadline_that_passes_midway(row))),
        ("nothing_of_an_owner_outlives_its_export", Box::pin(nothing_of_an_owner_outlives_its_export(row))),
        ("garbage_is_not_an_export", Box::pin(garbage_is_not_an_export(row))),
    ];
    for (name, _) in row.not_applicable {
        assert!(cases.iter().any(|(case, _)| case == name), "{}: there is no case {name}", row.name);
    }
    for (name, case) in cases {
        match row.not_applicable.iter().find(|(case, _)| *case == name) {
            Some((_, reason)) => eprintln!("{}: {name} is not applicable: {reason}", row.name),
            None => case.await,
        }
    }
}

// ---------------------------------------------------------------------- what the cases are made of

/// A gate that the test opens and shuts, and that counts what it has let through and the permits that are out.
#[derive(Default)]
struct TestGate {
    open: Mutex<BTreeSet<u128>>,
    counts: Arc<watch::Sender<Counts>>,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    asked: usize,
    out: usize,
}

struct Out(Arc<watch::Sender<Counts>>);

impl Drop for Out {
    fn drop(&mut self) {
        self.0.send_modify(|counts| counts.out -= 1);
    }
}

impl Gate for TestGate {
    fn begin(&self, claim: ClaimId, _: &[ByteRange]) -> Result<Permit, Denied> {
        if !self.open.lock().expect("unpoisoned").contains(&claim.0) {
            return Err(Denied);
        }
        self.counts.send_modify(|counts| {
            counts.asked += 1;
            counts.out += 1;
        });
        Ok(Box::new(Out(self.counts.clone())))
    }
}

impl TestGate {
    fn set(&self, claim: ClaimId, open: bool) {
        let mut claims = self.open.lock().expect("unpoisoned");
        if open {
            claims.insert(claim.0)
        } else {
            claims.remove(&claim.0)
        };
    }

    async fn until(&self, what: &str, wanted: impl Fn(Counts) -> bool) {
        let mut counts = self.counts.subscribe();
        let seen = seam::timeout(SOON, counts.wait_for(|counts| wanted(*counts))).await.is_ok();
        assert!(seen, "{what}");
    }

    async fn all_given_back(&self) {
        self.until("every permit is given back", |counts| counts.out == 0).await;
    }
}

struct Bench {
    row: &'static Tested,
    gate: Arc<TestGate>,
    exported: Exported,
}

impl Bench {
    async fn new(row: &'static Tested) -> Bench {
        let gate = Arc::new(TestGate::default());
        gate.set(CLAIM, true);
        let exported = Bench::export(row, gate.clone(), remote().clone()).await;
        Bench { row, gate, exported }
    }

    async fn export(row: &'static Tested, gate: Arc<TestGate>, region: Arc<Region>) -> Exported {
        let bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
        row.transport().export(region, gate, OWNER, bind).await.expect("it exports")
    }

    async fn connect(&self) -> Arc<dyn Peer> {
        self.row.transport().connect(self.exported.export(), soon()).await.expect("it connects")
    }
}

/// What all owners export: bytes of which no two places look alike.
fn remote() -> &'static Arc<Region> {
    static REMOTE: OnceLock<Arc<Region>> = OnceLock::new();
    REMOTE.get_or_init(|| {
        let region = Region::shared(REGION).expect("memory");
        // A prime length, so that the pattern lies differently in every block.
        let pattern: Vec<u8> =
            (0..1_000_003u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        // SAFETY: nobody else knows this region yet.
        let bytes = unsafe { region.slice_mut(0, REGION) };
        bytes.chunks_mut(pattern.len()).for_each(|chunk| chunk.copy_from_slice(&pattern[..chunk.len()]));
        Arc::new(region)
    })
}

fn soon() -> Time {
    seam::now() + SOON
}

fn local() -> Arc<Region> {
    Arc::new(Region::anonymous(REGION).expect("memory"))
}

/// Ranges to the places that they have in the owner's region.
fn pull(ranges: &[(u64, u64)], local: &Arc<Region>) -> Pull {
    Pull {
        claim: CLAIM,
        remote: ranges.iter().map(|&(offset, len)| ByteRange { offset, len }).collect(),
        local: local.clone(),
        local_offsets: ranges.iter().map(|&(offset, _)| offset).collect(),
        checksums: false,
        deadline: soon(),
    }
}

fn everything(local: &Arc<Region>) -> Pull {
    pull(&[(0, REGION as u64)], local)
}

fn bytes(region: &Region, offset: u64, len: u64) -> &[u8] {
    // SAFETY: the pulls into it have completed, and nobody writes to an owner's region.
    unsafe { region.slice(offset as usize, len as usize) }
}

fn holds(region: &Region, ranges: &[(u64, u64)]) -> bool {
    ranges.iter().all(|&(offset, len)| bytes(region, offset, len) == bytes(remote(), offset, len))
}

/// Writes to the whole region something that no owner has.
///
/// # Safety
/// Nobody else uses it.
unsafe fn fill(region: &Region) {
    // SAFETY: as the caller promises.
    unsafe { region.slice_mut(0, REGION) }.fill(0xee);
}

/// Whether it still is as `fill` has left it.
fn is_filled(region: &Region) -> bool {
    let filled = [0xee; 1 << 16];
    bytes(region, 0, REGION as u64).chunks(filled.len()).all(|chunk| chunk == &filled[..chunk.len()])
}

/// A pull that its owner has let through, and that nobody polls.
type Midway<'a> = Pin<Box<dyn Future<Output = Completion> + Send + 'a>>;

/// Polls a pull until its owner has let it through, and no further. One that is over at its first poll comes back.
async fn begin<'a>(peer: &'a dyn Peer, pull: Pull, gate: &TestGate) -> Result<Midway<'a>, Completion> {
    loop {
        let asked = gate.counts.borrow().asked;
        let mut counts = gate.counts.subscribe();
        let mut midway = Box::pin(peer.pull(pull.clone()));
        for polls in 0.. {
            let polled = std::future::poll_fn(|context| Poll::Ready(midway.as_mut().poll(context))).await;
            if let Poll::Ready(done) = polled {
                if polls == 0 {
                    return Err(done);
                }
                break; // an owner that was slow has let it through just before this poll: once more
            }
            // Usually the first poll has sent everything, and this waits for the owner; a transport with more to say
            // is polled again.
            let through = counts.wait_for(|counts| counts.asked > asked);
            if seam::timeout(Duration::from_millis(100), through).await.is_ok() {
                return Ok(midway);
            }
        }
    }
}

fn assert_gone(row: &Row, done: &Completion) {
    assert!(matches!(done.bytes, Err(PullError::PeerGone(_))), "{}: {:?}", row.name, done.bytes);
    assert!(done.checksums.is_empty(), "{}: what is not whole has no checksums", row.name);
}

/// Waits until the destination may be reused, for backends that need longer for that than for an answer.
async fn let_go(row: &Row, done: Completion) {
    if let Buffers::Quarantined(released) = done.buffers {
        let released = seam::timeout(SOON, released).await.is_ok();
        assert!(released, "{}: quarantine ends", row.name);
    }
}

/// Uses a destination again that was let go of, and sees whether anybody else still does.
async fn assert_ours(row: &Row, peer: &dyn Peer, local: &Region) {
    // SAFETY: the buffers may be reused, so the bytes are ours again.
    unsafe { fill(local) };
    // Another pull over the same peer, so that a late writer has its chance.
    let _ = peer.pull(pull(&[(7, 1000)], &self::local())).await;
    assert!(is_filled(local), "{}: a late write", row.name);
}

async fn assert_still_good(row: &Row, peer: &dyn Peer) {
    let done = peer.pull(pull(&[(7, 1000)], &local())).await;
    assert_eq!(done.bytes, Ok(1000), "{}: the peer is still good", row.name);
}

// ---------------------------------------------------------------------- the cases

async fn sizes_and_batches(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let many: Vec<(u64, u64)> = (0..2000).map(|i| (i * 4000, 1 + i % 1500)).collect();
    let backwards = vec![(9000, 500), (4, 1), (700, 300), (7, 0)];
    let whole = vec![(0, REGION as u64)];
    for ranges in [
        vec![(0, 1)],
        vec![(REGION as u64 - 1, 1)],
        vec![(5, 0)],
        vec![],
        vec![(1, 4095), (8000, 3)],
        backwards,
        whole,
        many,
    ] {
        let local = local();
        let done = peer.pull(pull(&ranges, &local)).await;
        let sum = ranges.iter().map(|range| range.1).sum::<u64>();
        assert_eq!(done.bytes, Ok(sum), "{}: {} ranges", row.name, ranges.len());
        assert!(matches!(done.buffers, Buffers::Reusable));
        let expected = self::local();
        for &(offset, len) in &ranges {
            // SAFETY: nobody else knows this region.
            unsafe { expected.slice_mut(offset as usize, len as usize) }.copy_from_slice(bytes(
                remote(),
                offset,
                len,
            ));
        }
        let same = bytes(&local, 0, REGION as u64) == bytes(&expected, 0, REGION as u64);
        assert!(same, "{}: the bytes are those of the owner, and nothing else is written", row.name);
    }
    bench.gate.all_given_back().await;
}

async fn many_ranges_in_one_pull(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let ranges: Vec<(u64, u64)> = (0..150_000).map(|i| (i * 200, 64)).collect();
    assert_eq!(peer.pull(pull(&ranges, &local)).await.bytes, Ok(150_000 * 64), "{}", row.name);
    assert!(holds(&local, &ranges), "{}: the bytes are those of the owner", row.name);
    bench.gate.all_given_back().await;
}

async fn many_at_once(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peers = [bench.connect().await, bench.connect().await, bench.connect().await];
    let local = local();
    let ranges: Vec<(u64, u64)> = (0..300).map(|i| (i * 100_000, 99_000)).collect();
    let pulls = ranges.iter().enumerate().map(|(i, &range)| {
        let (peer, pull) = (peers[i % 3].clone(), pull(&[range], &local));
        seam::spawn(async move { peer.pull(pull).await.bytes })
    });
    for task in pulls.collect::<Vec<_>>() {
        assert_eq!(task.await.expect("no panic"), Ok(99_000), "{}", row.name);
    }
    assert!(holds(&local, &ranges), "{}: concurrent pulls do not mix", row.name);
    bench.gate.all_given_back().await;
}

async fn what_is_outside_is_refused(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let invalid = |done: Completion| matches!(done.bytes, Err(PullError::Invalid(_)));
    for outside in [(REGION as u64, 1), (u64::MAX, 2), (0, REGION as u64 + 1), (1, u64::MAX)] {
        let done = peer.pull(pull(&[(0, 10), outside], &local)).await;
        assert!(invalid(done), "{}: {outside:?}", row.name);
    }
    let mut uneven = pull(&[(0, 10)], &local);
    uneven.local_offsets.clear();
    assert!(invalid(peer.pull(uneven).await), "{}: a range without a place", row.name);
    let mut nowhere = pull(&[(0, 10)], &local);
    nowhere.local_offsets = vec![REGION as u64 - 9];
    assert!(invalid(peer.pull(nowhere).await), "{}: a place outside", row.name);
    let mut twice = pull(&[(0, 10), (20, 10)], &local);
    twice.local_offsets = vec![9, 0];
    assert!(invalid(peer.pull(twice).await), "{}: two ranges to one place", row.name);
    assert!(
        bytes(&local, 0, 100).iter().all(|&byte| byte == 0),
        "{}: a refused pull writes nothing",
        row.name
    );
    assert_still_good(row, &*peer).await;
}

async fn a_claim_that_does_not_stand(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    // More often than a peer has lanes: a refusal uses none of them up.
    for claim in 0..20 {
        let unknown = Pull { claim: ClaimId(claim), ..pull(&[(0, 1000)], &local) };
        assert_eq!(peer.pull(unknown).await.bytes, Err(PullError::Denied), "{}", row.name);
    }
    assert!(
        bytes(&local, 0, 1000).iter().all(|&byte| byte == 0),
        "{}: a denied pull writes nothing",
        row.name
    );
    assert_still_good(row, &*peer).await;
}

/// Expiry, a newer attempt and a cancel look alike from here: the gate no longer lets the claim through. What it
/// has let through is brought to its end, because the permit keeps the pages.
async fn a_claim_that_ends_midway(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let midway = begin(&*peer, everything(&local), &bench.gate).await.expect("it takes longer");
    bench.gate.set(CLAIM, false);
    let late = peer.pull(pull(&[(0, 100)], &self::local())).await;
    assert_eq!(late.bytes, Err(PullError::Denied), "{}: a later pull is not let through", row.name);
    assert_eq!(bench.gate.counts.borrow().out, 1, "{}: the permit is out while bytes move", row.name);
    assert_eq!(midway.await.bytes, Ok(REGION as u64), "{}: what was let through goes on", row.name);
    assert!(holds(&local, &[(0, REGION as u64)]), "{}: and is whole", row.name);
    bench.gate.all_given_back().await;
    bench.gate.set(CLAIM, true);
    assert_still_good(row, &*peer).await;
}

/// A newer attempt does not wait for what an older one has under way, and does not harm it.
async fn a_claim_superseded_midway(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let (older, newer) = (local(), local());
    let midway = begin(&*peer, everything(&older), &bench.gate).await.expect("it takes longer");
    let next = ClaimId(43);
    bench.gate.set(CLAIM, false);
    bench.gate.set(next, true);
    let done = peer.pull(Pull { claim: next, ..everything(&newer) }).await;
    assert_eq!(done.bytes, Ok(REGION as u64), "{}: the newer claim's pull", row.name);
    assert!(holds(&newer, &[(0, REGION as u64)]), "{}: and is whole", row.name);
    drop(midway);
    bench.gate.all_given_back().await;
}

/// Of the bytes at their destination, so that a fault in the owner's memory, on the way and in ours is seen.
async fn checksums_are_those_of_what_arrived(row: &'static Tested) {
    let region = Region::shared(1 << 20).expect("memory");
    // SAFETY: nobody else knows this region yet.
    unsafe { region.slice_mut(0, 1 << 20) }.copy_from_slice(bytes(remote(), 0, 1 << 20));
    let region = Arc::new(region);
    let gate = Arc::new(TestGate::default());
    gate.set(CLAIM, true);
    let exported = Bench::export(row, gate, region.clone()).await;
    let peer = row.transport().connect(exported.export(), soon()).await.expect("it connects");
    let ranges = [(0, 1), (100, 0), (1000, 240), (2000, 100_000), (200_000, 700_001), (1_000_000, 4096)];
    let sums = |region: &Region| -> Vec<u64> {
        ranges.iter().map(|&(offset, len)| checksum(bytes(region, offset, len))).collect()
    };
    let good = sums(&region);
    let local = local();
    let asked = || Pull { checksums: true, ..pull(&ranges, &local) };
    assert_eq!(peer.pull(asked()).await.checksums, good, "{}", row.name);
    assert!(peer.pull(pull(&ranges, &local)).await.checksums.is_empty(), "{}: nobody asked", row.name);
    // SAFETY: no pull is under way.
    let byte = unsafe { region.slice_mut(299_999, 1) };
    byte[0] ^= 0x20;
    let done = peer.pull(asked()).await;
    assert!(done.bytes.is_ok(), "{}: a transport does not judge", row.name);
    assert_eq!(done.checksums, sums(&local), "{}: what is here now", row.name);
    let wrong: Vec<usize> = (0..ranges.len()).filter(|&i| done.checksums[i] != good[i]).collect();
    assert_eq!(wrong, [4], "{}: the range that went wrong, and no other", row.name);
}

async fn a_stale_export_is_told_apart(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let mut stale = bench.exported.export().clone();
    // Every blob names the owner's incarnation as eight bytes; another one is another start.
    let own = OWNER.0.to_be_bytes();
    let at = stale.blob.windows(8).position(|bytes| bytes == own).expect("the blob names the incarnation");
    stale.blob[at..at + 8].copy_from_slice(&8u64.to_be_bytes());
    let refused = row.transport().connect(&stale, soon()).await.err();
    assert!(matches!(refused, Some(Error::StaleIncarnation { .. })), "{}: {refused:?}", row.name);
    assert_still_good(row, &*bench.connect().await).await;
}

async fn a_peer_that_is_gone(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let export = bench.exported.export().clone();
    drop(bench.exported);
    assert_gone(row, &peer.pull(pull(&[(0, 100)], &local())).await);
    let again = row.transport().connect(&export, soon()).await;
    assert!(again.is_err(), "{}: nobody is there any more", row.name);
}

async fn a_peer_that_dies_midway(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let midway = begin(&*peer, everything(&local), &bench.gate).await.expect("it takes longer");
    drop(bench.exported);
    let done = midway.await;
    assert_gone(row, &done);
    let_go(row, done).await;
    assert_ours(row, &*peer, &local).await;
    bench.gate.all_given_back().await;
    assert_gone(row, &peer.pull(pull(&[(0, 100)], &local)).await);
}

async fn a_pull_cancelled_midway(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    // More often than a peer has lanes: a cancelled pull leaves its place to the next.
    for _ in 0..6 {
        drop(begin(&*peer, everything(&local), &bench.gate).await.expect("it takes longer"));
        // SAFETY: the pull was dropped, so these bytes are ours again.
        unsafe { fill(&local) };
        bench.gate.all_given_back().await;
    }
    // Another pull over the same peer, so that a late writer would have had its chance.
    assert_still_good(row, &*peer).await;
    assert!(is_filled(&local), "{}: a late write", row.name);
}

async fn a_peer_closed_midway(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let midway = begin(&*peer, everything(&local), &bench.gate).await.expect("it takes longer");
    peer.close();
    let done = midway.await;
    assert_gone(row, &done);
    let_go(row, done).await;
    assert_ours(row, &*peer, &local).await;
    bench.gate.all_given_back().await;
    assert_gone(row, &peer.pull(pull(&[(0, 100)], &local)).await);
    assert_still_good(row, &*bench.connect().await).await;
}

async fn a_deadline_that_has_passed(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let done = peer.pull(Pull { deadline: seam::now(), ..everything(&local) }).await;
    assert_eq!(done.bytes, Err(PullError::Deadline), "{}", row.name);
    assert!(matches!(done.buffers, Buffers::Reusable), "{}: nothing writes any more", row.name);
    assert!(bytes(&local, 0, 100).iter().all(|&byte| byte == 0), "{}: nothing was written", row.name);
    assert_still_good(row, &*peer).await;
}

async fn a_deadline_that_passes_midway(row: &'static Tested) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let mut limit = Duration::from_millis(50);
    let (midway, deadline) = loop {
        let deadline = seam::now() + limit;
        match begin(&*peer, Pull { deadline, ..everything(&local) }, &bench.gate).await {
            Ok(midway) => break (midway, deadline),
            Err(done) => assert_eq!(done.bytes, Err(PullError::Deadline), "{}", row.name),
        }
        limit *= 4;
    };
    seam::sleep_until(deadline).await;
    let done = midway.await;
    assert_eq!(done.bytes, Err(PullError::Deadline), "{}", row.name);
    let_go(row, done).await;
    assert_ours(row, &*peer, &local).await;
    bench.gate.all_given_back().await;
    assert_still_good(row, &*peer).await;
}

async fn nothing_of_an_owner_outlives_its_export(row: &'static Tested) {
    let gate = Arc::new(TestGate::default());
    gate.set(CLAIM, true);
    let (counts, gone) = (gate.counts.clone(), Arc::downgrade(&gate));
    let region = Arc::new(Region::shared(4096).expect("memory"));
    let memory = Arc::downgrade(&region);
    let exported = Bench::export(row, gate, region).await;
    let peer = row.transport().connect(exported.export(), soon()).await.expect("it connects");
    assert_eq!(peer.pull(pull(&[(0, 100)], &local())).await.bytes, Ok(100), "{}", row.name);
    drop(exported);
    let released = async {
        while Weak::strong_count(&gone) + Weak::strong_count(&memory) > 0 {
            tokio::task::yield_now().await;
        }
    };
    let released = seam::timeout(SOON, released).await.is_ok();
    assert!(released, "{}: a peer that is kept does not keep its owner's memory", row.name);
    assert_eq!(counts.borrow().out, 0);
    drop(peer);
}

async fn garbage_is_not_an_export(row: &'static Tested) {
    let good = Bench::new(row).await;
    let mut cut = good.exported.export().blob.clone();
    cut.truncate(cut.len() - 1);
    let mut long = good.exported.export().blob.clone();
    long.extend([b'x'; 3]);
    for blob in [vec![], vec![1; 5], vec![0xff; 64], vec![b':'; 30], cut[..20].to_vec(), long] {
        let export = Export { transport: row.name.to_owned(), blob };
        assert!(row.transport().connect(&export, soon()).await.is_err(), "{}: {export:?}", row.name);
    }
}
