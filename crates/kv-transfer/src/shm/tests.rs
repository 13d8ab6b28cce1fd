//! What only this transport has: memory that is passed, and owners that a puller must not trust blindly.

use std::net::Ipv4Addr;
use std::sync::atomic::AtomicUsize;

use tandem_types::ClaimId;

use super::*;
use crate::{ByteRange, Denied, Permit};

const BYTES: usize = 1 << 20;

/// Lets everything through, and counts the permits that are out.
#[derive(Default)]
struct Open(Arc<AtomicUsize>);

struct Out(Arc<AtomicUsize>);

impl Drop for Out {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Gate for Open {
    fn begin(&self, _: ClaimId, _: &[ByteRange]) -> Result<Permit, Denied> {
        self.0.fetch_add(1, Ordering::AcqRel);
        Ok(Box::new(Out(self.0.clone())))
    }
}

async fn export() -> (Exported, Arc<AtomicUsize>) {
    let (gate, region) = (Open::default(), Arc::new(Region::shared(BYTES).unwrap()));
    let out = gate.0.clone();
    let bind = Ipv4Addr::LOCALHOST.into();
    (Shm.export(region, Arc::new(gate), Incarnation(7), bind).await.unwrap(), out)
}

fn name(exported: &Exported) -> Name {
    Name::from_bytes(exported.export().blob.as_slice().try_into().unwrap())
}

fn soon() -> Time {
    seam::now() + Duration::from_secs(60)
}

async fn until(out: &AtomicUsize, wanted: usize) {
    let reached = async {
        while out.load(Ordering::Acquire) != wanted {
            tokio::task::yield_now().await;
        }
    };
    assert!(seam::timeout(Duration::from_secs(3600), reached).await.is_ok(), "{wanted} permits are out");
}

/// A stranger's lane, past the hello.
async fn lane(exported: &Exported) -> UnixStream {
    open(name(exported), soon()).await.unwrap().0
}

fn ask(range: ByteRange, deadline: Time) -> Vec<u8> {
    wire::request(ClaimId(1), &[range], deadline)
}

fn a_little() -> ByteRange {
    ByteRange { offset: 5, len: 100 }
}

#[tokio::test]
async fn memory_that_is_not_shared_cannot_be_exported() {
    let region = Arc::new(Region::anonymous(4096).unwrap());
    let bind = Ipv4Addr::LOCALHOST.into();
    let refused = Shm.export(region, Arc::new(Open::default()), Incarnation(7), bind).await;
    assert!(refused.err().unwrap().to_string().contains("not shared memory"));
}

#[tokio::test]
async fn the_permit_is_out_until_the_puller_has_copied_or_is_gone() {
    let (exported, out) = export().await;
    let mut stream = lane(&exported).await;
    stream.write_all(&ask(a_little(), soon())).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), GOOD);
    assert_eq!(out.load(Ordering::Acquire), 1);
    stream.write_all(&[DONE]).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), GOOD);
    assert_eq!(out.load(Ordering::Acquire), 0, "given back before the answer");
    stream.write_all(&ask(a_little(), soon())).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), GOOD);
    drop(stream);
    until(&out, 0).await;
}

#[tokio::test]
async fn a_puller_that_says_nothing_keeps_pages_only_as_long_as_it_said_it_would_wait() {
    let (exported, out) = export().await;
    let mut stream = lane(&exported).await;
    stream.write_all(&ask(a_little(), seam::now() + Duration::from_secs(2))).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), GOOD);
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(2) + wire::GRACE + Duration::from_secs(1)).await;
    until(&out, 0).await;
    assert!(stream.read_u8().await.is_err(), "and it learns that its bytes are worth nothing");
}

#[tokio::test]
async fn ranges_outside_are_refused_by_the_owner_too_and_the_lane_goes_on() {
    let (exported, out) = export().await;
    let mut stream = lane(&exported).await;
    for (offset, len) in [(BYTES as u64, 1), (u64::MAX, u64::MAX), (0, BYTES as u64 + 1)] {
        stream.write_all(&ask(ByteRange { offset, len }, soon())).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), INVALID);
    }
    stream.write_all(&ask(a_little(), soon())).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), GOOD);
    stream.write_all(&[9]).await.unwrap();
    assert!(stream.read_u8().await.is_err(), "whatever else it says ends the lane");
    until(&out, 0).await;
}

#[tokio::test]
async fn an_owner_that_passes_no_memory_or_other_memory_is_not_believed() {
    let name = Name { incarnation: Incarnation(7), id: seam::random_u128() };
    let listener = seam::listen_local(&socket(name)).unwrap();
    let region = Region::shared(4096).unwrap();
    let export = Export { transport: NAME.to_owned(), blob: name.to_bytes().to_vec() };
    for passes in [false, true] {
        let owner = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            wire::read_hello(&mut stream, MAGIC).await.unwrap();
            let mut answer = wire::hello_answer(MAGIC, true, &region);
            if passes {
                answer[12] ^= 1; // the length
                descriptor::send(&stream, &answer, region.fd().unwrap()).await.unwrap();
            } else {
                stream.write_all(&answer).await.unwrap();
            }
            stream
        };
        let (refused, _stream) = tokio::join!(Shm.connect(&export, soon()), owner);
        let refused = refused.err().unwrap().to_string();
        assert!(refused.contains(if passes { "are there" } else { "no memory" }), "{refused}");
    }
}

#[tokio::test]
async fn a_peer_that_is_kept_does_not_keep_the_memory_of_an_owner_that_is_gone() {
    let (exported, _) = export().await;
    let (lane, len, memory) = open(name(&exported), soon()).await.unwrap();
    let memory = map(memory, len).unwrap();
    let weak = Arc::downgrade(&memory);
    let reach = Arc::new(Reach { memory: Mutex::new(Some(memory)), closed: watch::Sender::new(None) });
    drop(exported);
    watch_owner(lane, reach.clone()).await;
    assert!(weak.upgrade().is_none() && reach.memory().is_none());
    assert_eq!(*reach.closed.borrow(), Some("its owner is gone"));
}
