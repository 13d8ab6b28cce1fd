//! Which transport is taken for a pair, and what any batch of ranges brings.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tandem_chassis::seam;
use tandem_kv_transfer::{
    ByteRange, Denied, Error, Exported, Gate, Options, Permit, Pull, TRANSPORTS, checksum, connect_best,
};
use tandem_memory::Region;
use tandem_types::{ClaimId, Export, Incarnation, Time};

const BYTES: u64 = 1 << 16;

struct Open;

impl Gate for Open {
    fn begin(&self, _: ClaimId, _: &[ByteRange]) -> Result<Permit, Denied> {
        Ok(Box::new(()))
    }
}

fn filled(byte: impl Fn(usize) -> u8) -> Arc<Region> {
    let region = Region::shared(BYTES as usize).expect("memory");
    // SAFETY: nobody else knows this region yet.
    unsafe { region.slice_mut(0, BYTES as usize) }.iter_mut().enumerate().for_each(|(i, b)| *b = byte(i));
    Arc::new(region)
}

async fn export_all() -> (Vec<Exported>, Vec<Export>) {
    let (region, bind) = (filled(|i| ((i * 31) >> 3) as u8), IpAddr::V4(Ipv4Addr::LOCALHOST));
    let mut exported = Vec::new();
    for row in TRANSPORTS {
        let export = (row.make)(&Options::default())
            .export(region.clone(), Arc::new(Open), Incarnation(7), bind)
            .await;
        exported.push(export.expect("it exports"));
    }
    // The order of a handle says nothing.
    let exports = exported.iter().rev().map(|exported| exported.export().clone()).collect();
    (exported, exports)
}

fn soon() -> Time {
    seam::now() + Duration::from_secs(60)
}

#[tokio::test]
async fn the_best_that_connects_is_taken() {
    let (_exported, mut exports) = export_all().await;
    assert_eq!(connect_best(&exports, "auto", &Options::default(), soon()).await.expect("a way").0, "inproc");
    assert_eq!(connect_best(&exports, "tcp", &Options::default(), soon()).await.expect("a way").0, "tcp");
    // An owner in another process, and then on another host: its id means nothing here.
    for (lost, next) in [("inproc", "shm"), ("shm", "tcp")] {
        let export = exports.iter_mut().find(|export| export.transport == lost).expect("a row");
        // `inproc` begins with the id, `shm` ends with it.
        let at = if lost == "inproc" { 0 } else { export.blob.len() - 1 };
        export.blob[at] ^= 1;
        assert_eq!(connect_best(&exports, "auto", &Options::default(), soon()).await.expect("a way").0, next);
    }
}

#[tokio::test]
async fn where_nothing_connects_every_reason_is_said() {
    let (exported, exports) = export_all().await;
    drop(exported);
    let refused = connect_best(&exports, "auto", &Options::default(), soon())
        .await
        .err()
        .expect("nobody is there")
        .to_string();
    assert!(refused.contains("inproc: ") && refused.contains("tcp: "), "{refused}");
    let refused = connect_best(&exports, "rdma", &Options::default(), soon())
        .await
        .err()
        .expect("there is none")
        .to_string();
    assert!(
        refused.contains("allowed here: rdma") && refused.contains("offered there: tcp, shm, inproc"),
        "{refused}"
    );
    assert!(connect_best(&[], "auto", &Options::default(), soon()).await.is_err());
}

#[tokio::test]
async fn a_restarted_owner_is_said_to_be_one_whatever_the_way() {
    let (_exported, mut exports) = export_all().await;
    for export in &mut exports {
        let at =
            export.blob.windows(8).position(|bytes| bytes == 7u64.to_be_bytes()).expect("its incarnation");
        export.blob[at + 7] = 8;
    }
    for allowed in ["auto", "inproc", "shm", "tcp"] {
        let refused = connect_best(&exports, allowed, &Options::default(), soon()).await.err();
        assert!(matches!(refused, Some(Error::StaleIncarnation { .. })), "{refused:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Sources may lie anywhere and overlap; places are apart, in any order. Exactly these bytes change.
    #[test]
    fn a_batch_brings_its_bytes_and_touches_no_others(
        pieces in prop::collection::vec((0..BYTES, 0u64..700, any::<u16>()), 0..90),
    ) {
        let mut batch: Vec<(ByteRange, u64, u16)> = pieces
            .into_iter()
            .enumerate()
            .map(|(i, (offset, len, order))| (ByteRange { offset, len: len.min(BYTES - offset) }, i as u64 * 701, order))
            .collect();
        batch.sort_by_key(|(_, _, order)| *order);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let (_exported, exports) = export_all().await;
            for row in TRANSPORTS {
                let (_, peer) = connect_best(&exports, row.name, &Options::default(), soon()).await.expect("a way");
                let local = filled(|i| !(i as u8));
                let pull = Pull {
                    claim: ClaimId(1),
                    remote: batch.iter().map(|(range, ..)| *range).collect(),
                    local: local.clone(),
                    local_offsets: batch.iter().map(|(_, place, _)| *place).collect(),
                    checksums: true,
                    deadline: soon(),
                };
                let mut expected: Vec<u8> = (0..BYTES as usize).map(|i| !(i as u8)).collect();
                let mut sum = 0;
                for (ByteRange { offset, len }, place, _) in &batch {
                    sum += len;
                    for i in 0..*len as usize {
                        expected[*place as usize + i] = (((*offset as usize + i) * 31) >> 3) as u8;
                    }
                }
                let done = peer.pull(pull).await;
                assert_eq!(done.bytes, Ok(sum));
                // SAFETY: the pull has completed.
                assert!(unsafe { local.slice(0, BYTES as usize) } == expected, "{}", row.name);
                let sums = batch.iter().map(|(range, place, _)| {
                    let place = *place as usize;
                    checksum(&expected[place..place + range.len as usize])
                });
                assert_eq!(done.checksums, sums.collect::<Vec<_>>(), "{}", row.name);
            }
        });
    }
}
