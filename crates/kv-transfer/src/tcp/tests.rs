//! What only this transport has: lanes, strangers at the door, and owners that must not wait for them.

use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use tandem_types::ClaimId;

use super::*;
use crate::wire::GRACE;
use crate::{ByteRange, Denied, Permit};

const REGION: usize = 32 << 20;
const OWNER: Incarnation = Incarnation(7);

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
    let (gate, region) = (Open::default(), Arc::new(Region::anonymous(REGION).unwrap()));
    let out = gate.0.clone();
    let exported =
        Tcp::default().export(region, Arc::new(gate), OWNER, Ipv4Addr::LOCALHOST.into()).await.unwrap();
    (exported, out)
}

fn address(exported: &Exported) -> &str {
    std::str::from_utf8(&exported.export().blob[24..]).unwrap()
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
    // Real time, or a paused clock would run ahead of the sockets.
    assert!(seam::timeout(Duration::from_secs(3600), reached).await.is_ok(), "{wanted} permits are out");
}

/// A stranger with a connection, who says the hello of a good puller.
async fn lane(exported: &Exported) -> TcpStream {
    let mut stream = seam::connect_tcp(address(exported)).await.unwrap();
    let mut hello = MAGIC.to_vec();
    hello.extend(&exported.export().blob[..24]);
    stream.write_all(&hello).await.unwrap();
    let mut answer = [0; 13];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!((&answer[..4], answer[4]), (&MAGIC[..], GOOD));
    assert_eq!(u64::from_be_bytes(answer[5..].try_into().unwrap()), REGION as u64);
    stream
}

/// What an answer begins with.
async fn status(stream: &mut TcpStream) -> u8 {
    let mut line = [0; LINE];
    stream.read_exact(&mut line).await.unwrap();
    assert_eq!(line[1..], [0; LINE - 1]);
    line[0]
}

fn request(count: u32, left: u32, ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut request = 42u128.to_be_bytes().to_vec();
    request.extend(count.to_be_bytes());
    request.extend(left.to_be_bytes());
    for (offset, len) in ranges {
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
    }
    request
}

async fn pull_a_little(peer: &dyn Peer) -> Completion {
    let local = Arc::new(Region::anonymous(100).unwrap());
    let remote = vec![ByteRange { offset: 5, len: 100 }];
    let (claim, local_offsets) = (ClaimId(1), vec![0]);
    peer.pull(Pull { claim, remote, local, local_offsets, checksums: false, deadline: soon() }).await
}

#[tokio::test]
async fn ranges_outside_are_refused_by_the_owner_too_and_the_lane_goes_on() {
    let (exported, out) = export().await;
    let mut stream = lane(&exported).await;
    for outside in [(REGION as u64, 1), (u64::MAX, u64::MAX), (0, REGION as u64 + 1)] {
        stream.write_all(&request(2, 1000, &[(0, 10), outside])).await.unwrap();
        assert_eq!(status(&mut stream).await, INVALID, "{outside:?}");
    }
    stream.write_all(&request(1, 1000, &[(0, 10)])).await.unwrap();
    assert_eq!(status(&mut stream).await, GOOD);
    let mut answer = [9; LINE];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, [0; LINE], "ten bytes and the tail");
    until(&out, 0).await;
}

#[tokio::test]
async fn a_request_that_is_too_long_is_refused_before_it_is_read() {
    let (exported, _) = export().await;
    let mut stream = lane(&exported).await;
    stream.write_all(&request(RANGES_MAX as u32 + 1, 1000, &[])).await.unwrap();
    assert_eq!(status(&mut stream).await, INVALID);
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "and the lane is closed");
}

#[tokio::test]
async fn a_lane_of_another_export_is_refused() {
    let (exported, _) = export().await;
    for at in [0, 23] {
        let mut stream = seam::connect_tcp(address(&exported)).await.unwrap();
        let mut hello = [MAGIC, &exported.export().blob[..24]].concat();
        hello[4 + at] ^= 1;
        stream.write_all(&hello).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer[..5], [b'T', b'K', b'V', b'2', DENIED]);
    }
}

#[tokio::test]
async fn an_idle_lane_that_its_owner_has_closed_is_replaced() {
    let (exported, _) = export().await;
    let peer = Tcp::default().connect(exported.export(), soon()).await.unwrap();
    for _ in 0..3 {
        tokio::time::pause();
        tokio::time::advance(IDLE_MAX + Duration::from_secs(1)).await;
        // The owner's task gets its turn, and closes.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        tokio::time::resume();
        assert_eq!(pull_a_little(&*peer).await.bytes, Ok(100));
    }
}

#[tokio::test]
async fn a_puller_that_goes_while_the_owner_writes_leaves_no_page_behind() {
    let (exported, out) = export().await;
    for read in [0, 1 << 20] {
        let mut stream = lane(&exported).await;
        stream.write_all(&request(1, 600_000, &[(0, REGION as u64)])).await.unwrap();
        until(&out, 1).await;
        stream.read_exact(&mut vec![0; read]).await.unwrap();
        drop(stream);
        until(&out, 0).await;
    }
}

#[tokio::test]
async fn an_export_that_ends_while_its_owner_writes_lets_go_of_its_pages() {
    let (exported, out) = export().await;
    let mut stream = lane(&exported).await;
    stream.write_all(&request(1, 600_000, &[(0, REGION as u64)])).await.unwrap();
    until(&out, 1).await;
    drop(exported);
    until(&out, 0).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(answer.len() < REGION, "the rest does not come");
}

#[tokio::test]
async fn an_answer_goes_on_where_its_puller_has_read_nothing_for_a_while() {
    let (exported, out) = export().await;
    let mut stream = lane(&exported).await;
    stream.write_all(&request(2, 600_000, &[(0, 13 << 20), (7, (16 << 20) + 1)])).await.unwrap();
    until(&out, 1).await;
    tokio::time::pause();
    seam::sleep(STALL_MAX / 2).await;
    tokio::time::resume();
    assert_eq!(status(&mut stream).await, GOOD);
    stream.read_exact(&mut vec![0; (29 << 20) + LINE]).await.unwrap();
    stream.write_all(&request(1, 1000, &[(0, 64)])).await.unwrap();
    assert_eq!(status(&mut stream).await, GOOD);
}

/// Sends a request for everything, reads none of it, and lets the time pass after which the owner gives up.
async fn stall(left: u32, after: Duration) {
    let (exported, out) = export().await;
    let mut stream = lane(&exported).await;
    stream.write_all(&request(1, left, &[(0, REGION as u64)])).await.unwrap();
    until(&out, 1).await;
    tokio::time::pause();
    // The owner's thread writes until nothing fits any more; a paused clock stands still as long as it runs.
    seam::sleep(Duration::from_millis(1)).await;
    tokio::time::advance(after.saturating_sub(Duration::from_millis(500))).await;
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(out.load(Ordering::Acquire), 1, "the permit is out until then");
    tokio::time::advance(Duration::from_secs(1)).await;
    until(&out, 0).await;
}

#[tokio::test]
async fn a_puller_that_reads_nothing_does_not_keep_pages() {
    stall(600_000, STALL_MAX).await;
}

#[tokio::test]
async fn pages_are_not_kept_for_longer_than_the_puller_waits() {
    stall(2000, Duration::from_secs(2) + GRACE).await;
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_for_a_place() {
    let (exported, _) = export().await;
    let mut lanes = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        lanes.push(lane(&exported).await);
    }
    let brief = seam::now() + Duration::from_millis(100);
    let refused = Tcp::default().connect(exported.export(), brief).await.err().unwrap();
    assert!(refused.to_string().contains("does not answer"), "{refused}");
    lanes.truncate(CONNECTIONS_MAX - 2);
    let peer = Tcp::default().connect(exported.export(), soon()).await.unwrap();
    assert_eq!(pull_a_little(&*peer).await.bytes, Ok(100));
}

#[tokio::test]
async fn an_address_that_means_all_is_replaced_by_the_one_that_is_advertised() {
    let region = Arc::new(Region::anonymous(4096).unwrap());
    let everywhere = Ipv4Addr::UNSPECIFIED.into();
    let mut exported =
        Tcp::default().export(region, Arc::new(Open::default()), OWNER, everywhere).await.unwrap();
    let (host, port) = address(&exported).rsplit_once(':').unwrap();
    assert_eq!(host, "127.0.0.1", "on this host that does");
    let port = port.to_owned();
    Tcp::default().connect(exported.export(), soon()).await.unwrap();
    exported.advertise("localhost");
    assert_eq!(address(&exported), format!("localhost:{port}"));
    Tcp::default().connect(exported.export(), soon()).await.unwrap();
    for six in ["::1", "[::1]"] {
        exported.advertise(six);
        assert_eq!(address(&exported), format!("[::1]:{port}"));
    }
}

#[tokio::test]
async fn somebody_else_at_the_address_is_not_taken_for_an_owner() {
    let listener = seam::listen_tcp("127.0.0.1:0").await.unwrap();
    let mut blob = vec![0; 24];
    blob.extend(listener.local_addr().unwrap().to_string().into_bytes());
    let other = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n").await.unwrap();
        stream
    };
    let export = Export { transport: NAME.to_owned(), blob };
    let tcp = Tcp::default();
    let (refused, _stream) = tokio::join!(tcp.connect(&export, soon()), other);
    assert!(refused.err().unwrap().to_string().contains("not a lane of ours"));
}

/// Passes everything on, and turns one bit of the `at`th byte that the owner says.
async fn tampers(listener: TcpListener, address: String, mut at: usize) {
    let (mut puller, _) = listener.accept().await.unwrap();
    let mut owner = seam::connect_tcp(&*address).await.unwrap();
    let (mut asks, mut hears) = puller.split();
    let (mut answers, mut passes) = owner.split();
    let there = tokio::io::copy(&mut asks, &mut passes);
    let back = async {
        let mut buffer = [0; 4096];
        loop {
            let count = answers.read(&mut buffer).await.unwrap_or(0);
            if count == 0 {
                return;
            }
            if let Some(byte) = buffer[..count].get_mut(at) {
                *byte ^= 4;
            }
            at = at.wrapping_sub(count);
            hears.write_all(&buffer[..count]).await.unwrap();
        }
    };
    let _ = tokio::join!(there, back);
}

#[tokio::test]
async fn a_bit_that_turns_on_the_way_shows_in_the_checksum_of_its_range() {
    let (exported, _) = export().await;
    let listener = seam::listen_tcp("127.0.0.1:0").await.unwrap();
    let mut export = exported.export().clone();
    export.blob.truncate(24);
    export.blob.extend(listener.local_addr().unwrap().to_string().into_bytes());
    // After the hello and the head, in the second range.
    let at = wire::ANSWER_BYTES + LINE + 1000 + 77;
    let tampers = seam::spawn(tampers(listener, address(&exported).to_owned(), at));
    let peer = Tcp::default().connect(&export, soon()).await.unwrap();
    let local = Arc::new(Region::anonymous(3000).unwrap());
    let remote = vec![ByteRange { offset: 0, len: 1000 }; 3];
    let (claim, local_offsets) = (ClaimId(1), vec![0, 1000, 2000]);
    let pull = Pull { claim, remote, local, local_offsets, checksums: true, deadline: soon() };
    let good = crate::checksum(&[0; 1000]);
    let first = peer.pull(pull.clone()).await.checksums;
    assert_eq!((first[0], first[2]), (good, good));
    assert_ne!(first[1], good);
    assert_eq!(peer.pull(pull).await.checksums, [good; 3], "the second time it goes well");
    drop(peer);
    tampers.abort();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a stranger sends, the owner answers its own pullers and keeps no page for it.
    #[test]
    fn garbage_at_the_door_harms_nobody(hello in any::<bool>(), garbage in prop::collection::vec(any::<u8>(), 0..200)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (exported, out) = export().await;
            let mut stream = match hello {
                true => lane(&exported).await,
                false => seam::connect_tcp(address(&exported)).await.unwrap(),
            };
            stream.write_all(&garbage).await.unwrap();
            let peer = Tcp::default().connect(exported.export(), soon()).await.unwrap();
            assert_eq!(pull_a_little(&*peer).await.bytes, Ok(100));
            drop(stream);
            until(&out, 0).await;
        });
    }
}
