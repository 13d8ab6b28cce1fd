//! What every transport must hold. A new row of the table begins by passing this.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tandem_chassis::seam;
use tandem_memory::Region;
use tandem_types::{ClaimId, Incarnation};

use crate::{Buffers, ByteRange, Denied, Error, Exported, Gate, Peer, Permit, Pull, PullError, Row};

const REGION: usize = 8 << 20;
const OWNER: Incarnation = Incarnation(7);
const CLAIM: ClaimId = ClaimId(42);

/// A gate that the test opens and shuts, and that counts the permits that are out.
#[derive(Default)]
struct TestGate {
    open: Mutex<BTreeSet<u128>>,
    out: Arc<AtomicUsize>,
}

struct Out(Arc<AtomicUsize>);

impl Drop for Out {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Gate for TestGate {
    fn begin(&self, claim: ClaimId, _: &[ByteRange]) -> Result<Permit, Denied> {
        if !self.open.lock().expect("unpoisoned").contains(&claim.0) {
            return Err(Denied);
        }
        self.out.fetch_add(1, Ordering::AcqRel);
        Ok(Box::new(Out(self.out.clone())))
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
}

struct Bench {
    row: &'static Row,
    gate: Arc<TestGate>,
    exported: Exported,
    remote: Arc<Region>,
}

impl Bench {
    async fn new(row: &'static Row) -> Bench {
        let remote = Arc::new(Region::anonymous(REGION).expect("memory"));
        // SAFETY: nobody else knows this region yet.
        for (i, byte) in unsafe { remote.slice_mut(0, REGION) }.iter_mut().enumerate() {
            *byte = pattern(i);
        }
        let gate = Arc::new(TestGate::default());
        gate.set(CLAIM, true);
        let bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let exported =
            (row.make)().export(remote.clone(), gate.clone(), OWNER, bind).await.expect("it exports");
        Bench { row, gate, exported, remote }
    }

    async fn connect(&self) -> Arc<dyn Peer> {
        (self.row.make)().connect(self.exported.export(), soon()).await.expect("it connects")
    }
}

fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 13) as u8
}

fn soon() -> tandem_types::Time {
    seam::now() + Duration::from_secs(60)
}

fn local() -> Arc<Region> {
    Arc::new(Region::anonymous(REGION).expect("memory"))
}

fn pull(ranges: &[(u64, u64)], local: &Arc<Region>) -> Pull {
    Pull {
        claim: CLAIM,
        remote: ranges.iter().map(|&(offset, len)| ByteRange { offset, len }).collect(),
        local: local.clone(),
        local_offsets: ranges.iter().map(|&(offset, _)| offset).collect(),
        deadline: soon(),
    }
}

fn holds(region: &Region, ranges: &[(u64, u64)]) -> bool {
    ranges.iter().all(|&(offset, len)| {
        // SAFETY: the pull into it has completed.
        let bytes = unsafe { region.slice(offset as usize, len as usize) };
        bytes.iter().enumerate().all(|(i, &byte)| byte == pattern(offset as usize + i))
    })
}

/// Runs the whole suite for one row of the table.
///
/// # Panics
/// If the row does not hold what a transport must.
pub async fn run(row: &'static Row) {
    sizes_and_batches(row).await;
    many_at_once(row).await;
    what_is_outside_is_refused(row).await;
    a_claim_that_does_not_stand_brings_nothing(row).await;
    a_claim_may_end_midway(row).await;
    a_stale_export_is_told_apart(row).await;
    a_closed_export_ends_its_pulls(row).await;
    a_dropped_pull_writes_nothing_more(row).await;
    a_passed_deadline_is_said(row).await;
    garbage_is_not_an_export(row).await;
}

async fn sizes_and_batches(row: &'static Row) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let many: Vec<(u64, u64)> = (0..2000).map(|i| (i * 4000, 1 + i % 1500)).collect();
    for ranges in
        [vec![(0, 1)], vec![(5, 0)], vec![(1, 4095), (8000, 3)], vec![(0, REGION as u64)], many, vec![]]
    {
        let local = local();
        let done = peer.pull(pull(&ranges, &local)).await;
        assert_eq!(
            done.bytes,
            Ok(ranges.iter().map(|r| r.1).sum::<u64>()),
            "{}: {} ranges",
            row.name,
            ranges.len()
        );
        assert!(matches!(done.buffers, Buffers::Reusable));
        assert!(holds(&local, &ranges), "{}: the bytes are those of the owner", row.name);
    }
    assert_eq!(bench.gate.out.load(Ordering::Acquire), 0, "{}: every permit is given back", row.name);
    drop(bench.remote);
}

async fn many_at_once(row: &'static Row) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let pulls = (0..64u64).map(|i| {
        let (peer, pull) = (peer.clone(), pull(&[(i * 100_000, 99_000)], &local));
        seam::spawn(async move { peer.pull(pull).await.bytes })
    });
    for task in pulls.collect::<Vec<_>>() {
        assert_eq!(task.await.expect("no panic"), Ok(99_000));
    }
    let ranges: Vec<(u64, u64)> = (0..64).map(|i| (i * 100_000, 99_000)).collect();
    assert!(holds(&local, &ranges), "{}: concurrent pulls do not mix", row.name);
}

async fn what_is_outside_is_refused(row: &'static Row) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    for outside in [(REGION as u64, 1), (u64::MAX, 2), (0, REGION as u64 + 1)] {
        let done = peer.pull(pull(&[(0, 10), outside], &local)).await;
        assert!(matches!(done.bytes, Err(PullError::Invalid(_))), "{}: {outside:?}", row.name);
    }
    let mut uneven = pull(&[(0, 10)], &local);
    uneven.local_offsets.clear();
    assert!(matches!(peer.pull(uneven).await.bytes, Err(PullError::Invalid(_))));
    assert_eq!(
        peer.pull(pull(&[(0, 10)], &local)).await.bytes,
        Ok(10),
        "{}: the peer is still good",
        row.name
    );
}

async fn a_claim_that_does_not_stand_brings_nothing(row: &'static Row) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let mut unknown = pull(&[(0, 1000)], &local);
    unknown.claim = ClaimId(1);
    assert_eq!(peer.pull(unknown).await.bytes, Err(PullError::Denied));
    // SAFETY: no pull into it is under way.
    let untouched = unsafe { local.slice(0, 1000) }.iter().all(|&byte| byte == 0);
    assert!(untouched, "{}: a denied pull writes nothing", row.name);
}

/// Expiry, a newer attempt and a cancel look alike from here: the gate no longer lets the claim through.
async fn a_claim_may_end_midway(row: &'static Row) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    assert_eq!(peer.pull(pull(&[(0, 100)], &local)).await.bytes, Ok(100));
    bench.gate.set(CLAIM, false);
    assert_eq!(peer.pull(pull(&[(100, 100)], &local)).await.bytes, Err(PullError::Denied));
    bench.gate.set(CLAIM, true);
    assert_eq!(
        peer.pull(pull(&[(100, 100)], &local)).await.bytes,
        Ok(100),
        "{}: a refusal is no end",
        row.name
    );
}

async fn a_stale_export_is_told_apart(row: &'static Row) {
    let bench = Bench::new(row).await;
    let mut stale = bench.exported.export().clone();
    // Every blob names the owner's incarnation as eight bytes; another one is another start.
    let own = OWNER.0.to_be_bytes();
    let at = stale.blob.windows(8).position(|bytes| bytes == own).expect("the blob names the incarnation");
    stale.blob[at..at + 8].copy_from_slice(&8u64.to_be_bytes());
    let refused = (row.make)().connect(&stale, soon()).await.err();
    assert!(matches!(refused, Some(Error::StaleIncarnation { .. })), "{}: {refused:?}", row.name);
}

async fn a_closed_export_ends_its_pulls(row: &'static Row) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let export = bench.exported.export().clone();
    drop(bench.exported);
    let done = peer.pull(pull(&[(0, 100)], &local)).await;
    assert!(matches!(done.bytes, Err(PullError::PeerGone(_))), "{}: {:?}", row.name, done.bytes);
    let again = (row.make)().connect(&export, soon()).await;
    assert!(again.is_err(), "{}: nobody is there any more", row.name);
}

async fn a_dropped_pull_writes_nothing_more(row: &'static Row) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    {
        let whole = peer.pull(pull(&[(0, REGION as u64)], &local));
        tokio::pin!(whole);
        // One poll begins it; then it is dropped, wherever it is.
        let begun = futures_poll_once(whole.as_mut()).await;
        drop(begun);
    }
    // SAFETY: the pull was dropped, so these bytes are ours again.
    unsafe { local.slice_mut(0, REGION) }.fill(1);
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    // Another pull over the same peer, so that a late writer would have had its chance.
    let other = self::local();
    assert_eq!(
        peer.pull(pull(&[(0, 1000)], &other)).await.bytes,
        Ok(1000),
        "{}: the peer is still good",
        row.name
    );
    // SAFETY: as above.
    assert!(unsafe { local.slice(0, REGION) }.iter().all(|&byte| byte == 1), "{}: a late write", row.name);
}

async fn futures_poll_once<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}

async fn a_passed_deadline_is_said(row: &'static Row) {
    let bench = Bench::new(row).await;
    let peer = bench.connect().await;
    let local = local();
    let mut late = pull(&[(0, REGION as u64)], &local);
    late.deadline = seam::now();
    let done = peer.pull(late).await;
    assert_eq!(done.bytes, Err(PullError::Deadline), "{}", row.name);
    assert!(
        matches!(done.buffers, Buffers::Reusable),
        "{}: quarantine is for backends that cannot stop",
        row.name
    );
    assert_eq!(
        peer.pull(pull(&[(0, 10)], &local)).await.bytes,
        Ok(10),
        "{}: the peer is still good",
        row.name
    );
}

async fn garbage_is_not_an_export(row: &'static Row) {
    for blob in [vec![], vec![1; 5], vec![0xff; 64]] {
        let export = tandem_types::Export { transport: row.name.to_owned(), blob };
        assert!((row.make)().connect(&export, soon()).await.is_err(), "{}", row.name);
    }
}
