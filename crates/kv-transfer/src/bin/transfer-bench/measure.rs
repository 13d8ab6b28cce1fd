//! Rounds of all ways and sizes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tandem_chassis::seam;
use tandem_kv_transfer::{ByteRange, Exported, Peer, Pull, TRANSPORTS, connect_best};
use tandem_memory::Region;
use tandem_types::ClaimId;

use crate::mooncake::Mooncake;
use crate::owner::{SOURCE_BYTES, Started, export, filled};
use crate::raw::Raw;

/// Where bytes go, round and round.
const TARGET_BYTES: u64 = 256 << 20;
/// Bytes of one request.
const BATCH_BYTES: u64 = 64 << 20;
const SOON: Duration = Duration::from_secs(60);

/// What is asked for on the command line.
pub struct Options {
    pub rounds: usize,
    pub plan: Plan,
    pub json: Option<PathBuf>,
}

/// What is measured.
pub struct Plan {
    sizes: Vec<Size>,
}

/// Ranges of one length.
#[derive(Clone, Copy)]
pub struct Size {
    /// Bytes of a range.
    pub range: u64,
    /// Bytes that are moved in batches, for bytes per second.
    moved: u64,
    /// Ranges that are moved one by one, for the time of one.
    singles: usize,
}

impl Plan {
    pub fn full() -> Plan {
        let size = |range, moved, singles| Size { range, moved, singles };
        let sizes = vec![
            size(64 << 10, 256 << 20, 200),
            size(256 << 10, 256 << 20, 100),
            size(1 << 20, 512 << 20, 50),
            size(4 << 20, 512 << 20, 20),
            size(64 << 20, 1 << 30, 3),
        ];
        Plan { sizes }
    }

    pub fn quick() -> Plan {
        let sizes = Plan::full().sizes;
        let less = |size: Size| Size { moved: 128 << 20, singles: size.singles.min(10), ..size };
        Plan { sizes: sizes.into_iter().map(less).collect() }
    }
}

/// One way to bring bytes.
pub enum Way {
    Memcpy(Arc<Region>),
    Raw(Raw),
    Transport { peer: Arc<dyn Peer>, checksums: bool },
    Mooncake(Mooncake),
}

/// A way with its name and its figures.
pub struct Measured {
    pub name: String,
    /// What its ratio is taken to.
    pub base: Option<&'static str>,
    /// By size and round: bytes per second in batches.
    pub rates: Vec<Vec<f64>>,
    /// By size and round: the median time of a single range.
    pub times: Vec<Vec<Duration>>,
}

/// Everything that was measured.
pub struct Results {
    pub sizes: Vec<Size>,
    pub ways: Vec<Measured>,
    /// Why something was not.
    pub notes: Vec<String>,
}

/// What stays alive while it is measured.
#[derive(Default)]
struct Owners {
    started: Vec<Started>,
    exported: Vec<Exported>,
}

pub async fn run(options: Options) -> Result<Results, String> {
    let mut notes = Vec::new();
    let mut owners = Owners::default();
    let local = filled(true, TARGET_BYTES as usize)?;
    let mut ways = ways(&mut owners, &local, &mut notes).await?;
    let sizes = options.plan.sizes.clone();
    let measured = |(name, base, _): &(String, Option<&'static str>, Way)| Measured {
        name: name.clone(),
        base: *base,
        rates: vec![Vec::new(); sizes.len()],
        times: vec![Vec::new(); sizes.len()],
    };
    let mut all: Vec<Measured> = ways.iter().map(measured).collect();
    for (_, _, way) in &mut ways {
        // Once over everything, so that every page is mapped everywhere.
        let everything = Size { range: BATCH_BYTES, moved: SOURCE_BYTES as u64, singles: 0 };
        way.move_batches(everything, &local).await?;
    }
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        for (at, &size) in sizes.iter().enumerate() {
            for ((_, _, way), measured) in ways.iter_mut().zip(&mut all) {
                let began = seam::now();
                way.move_batches(size, &local).await?;
                let took = seam::now().since(began);
                measured.rates[at].push(size.moved as f64 / took.as_secs_f64());
                measured.times[at].push(way.time_of_one(size, &local).await?);
            }
        }
    }
    Ok(Results { sizes, ways: all, notes })
}

type Named = (String, Option<&'static str>, Way);

async fn ways(
    owners: &mut Owners,
    local: &Arc<Region>,
    notes: &mut Vec<String>,
) -> Result<Vec<Named>, String> {
    let memcpy = Way::Memcpy(filled(false, SOURCE_BYTES)?);
    let raw = Started::this("raw")?;
    let mut ways = vec![
        ("memcpy".to_owned(), None, memcpy),
        ("raw socket".to_owned(), None, Way::Raw(Raw::connect(&raw.line)?)),
    ];
    owners.started.push(raw);
    for row in TRANSPORTS {
        let (export, base) = match row.name {
            "inproc" => {
                let exported = export(row).await?;
                let blob = exported.export().clone();
                owners.exported.push(exported);
                (blob, "memcpy")
            }
            name => {
                let started = Started::this(name)?;
                let blob = started.export(name)?;
                owners.started.push(started);
                (blob, if name == "tcp" { "raw socket" } else { "memcpy" })
            }
        };
        for checksums in [false, true] {
            let connected = connect_best(
                std::slice::from_ref(&export),
                row.name,
                &tandem_kv_transfer::Options::default(),
                seam::now() + SOON,
            )
            .await;
            let (name, peer) = connected.map_err(|error| error.to_string())?;
            let name = if checksums { format!("{name} + checksums") } else { name.to_owned() };
            ways.push((name, Some(base), Way::Transport { peer, checksums }));
        }
    }
    match Mooncake::start(local.len() as u64) {
        Ok(mooncake) => ways.push(("mooncake tcp".to_owned(), Some("raw socket"), Way::Mooncake(mooncake))),
        Err(reason) => notes.push(format!("mooncake tcp: not measured: {reason}")),
    }
    Ok(ways)
}

impl Way {
    async fn move_batches(&mut self, size: Size, local: &Arc<Region>) -> Result<(), String> {
        let mut moved = 0;
        while moved < size.moved {
            self.bring(moved, size.range, BATCH_BYTES / size.range, local).await?;
            moved += BATCH_BYTES;
        }
        Ok(())
    }

    /// The median of some.
    async fn time_of_one(&mut self, size: Size, local: &Arc<Region>) -> Result<Duration, String> {
        let mut times = Vec::with_capacity(size.singles);
        for i in 0..size.singles as u64 {
            let began = seam::now();
            // Apart from each other, so that none is in a cache from the one before.
            self.bring(i * size.range.max(1 << 20), size.range, 1, local).await?;
            times.push(seam::now().since(began));
        }
        times.sort_unstable();
        Ok(times[times.len() / 2])
    }

    /// `count` ranges, one after the other from `start` on, here and there modulo what there is.
    async fn bring(&mut self, start: u64, len: u64, count: u64, local: &Arc<Region>) -> Result<(), String> {
        let begin = start % (SOURCE_BYTES as u64 - len * count + 1);
        let begin = begin / len * len;
        let remote: Vec<ByteRange> = (0..count).map(|i| ByteRange { offset: begin + i * len, len }).collect();
        let places: Vec<u64> = (0..count).map(|i| (start / len * len + i * len) % TARGET_BYTES).collect();
        match self {
            Way::Memcpy(source) => {
                for (range, &place) in remote.iter().zip(&places) {
                    // SAFETY: nobody writes to the source, and one way is measured at a time.
                    unsafe {
                        let from = source.slice(range.offset as usize, len as usize);
                        local.slice_mut(place as usize, len as usize).copy_from_slice(from);
                    }
                }
                Ok(())
            }
            Way::Raw(raw) => tokio::task::block_in_place(|| raw.bring(begin, len, &places, local)),
            Way::Transport { peer, checksums } => {
                let pull = Pull {
                    claim: ClaimId(1),
                    remote,
                    local: local.clone(),
                    local_offsets: places,
                    checksums: *checksums,
                    deadline: seam::now() + SOON,
                };
                peer.pull(pull).await.bytes.map(|_| ()).map_err(|error| error.to_string())
            }
            Way::Mooncake(mooncake) => tokio::task::block_in_place(|| mooncake.bring(begin, len, &places)),
        }
    }
}
