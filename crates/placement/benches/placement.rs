//! A decision among a thousand workers, and the index of ten million (block, holder) pairs that it asks, each
//! beside its naive twin in the same run.
//!
//! Prints the goals' own figures first (medians, 99th percentiles, bytes); Criterion's follow.

#[path = "../tests/oracle/mod.rs"]
mod oracle;

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput};
use oracle::Oracle;
use tandem_chassis::seam;
use tandem_placement::cost::Cost;
use tandem_placement::index::{Change, Index};
use tandem_placement::predictor::PROFILES;
use tandem_placement::{Candidate, Held, Link, Policy, Request, Route, Tier};
use tandem_types::{BlockHash, Incarnation, Role, WorkerId};

const WORKERS: usize = 1_000;
const PAIRS: usize = 10_000_000;
const BLOCK_TOKENS: u32 = 32;
/// Blocks of a prompt of 32k tokens.
const PROMPT_BLOCKS: u64 = 1_024;
/// Blocks that every worker holds of every prompt: instructions of 2,048 tokens.
const COMMON_BLOCKS: u64 = 64;
/// Blocks of a delta, as stored and as evicted.
const DELTA_BLOCKS: u64 = 64;

/// Counts what is allocated.
struct Counting;
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system's allocator as it came; counting touches no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = ALLOCATED.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract, which is the same there.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `at` came from `alloc` above with this layout, and so from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Random enough, and the same every time.
fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// A block of a conversation; the first ones are common to all conversations.
fn block(conversation: u64, at: u64) -> BlockHash {
    let n = if at < COMMON_BLOCKS { at } else { (conversation + 1) << 20 | at };
    BlockHash(u128::from(mix(n + 1)) << 64 | u128::from(mix(n ^ 0x5555_0000_0000)))
}

fn chain(conversation: u64, blocks: std::ops::Range<u64>) -> Vec<BlockHash> {
    blocks.map(|at| block(conversation, at)).collect()
}

fn name(worker: usize) -> WorkerId {
    format!("worker-{worker:04}.pool-{}", worker % 7).as_str().into()
}

/// Half prefill, half decode, busy to different degrees; each has seven neighbours if `near` asks for it.
fn cluster(near: bool) -> Vec<Candidate> {
    let candidate = |n: usize| {
        let random = |what: u64, most: u64| mix(n as u64 * 64 + what) % most;
        let prefill = n.is_multiple_of(2);
        let queue_seconds = if prefill { random(1, 1_000) as f64 / 1e3 } else { 0.0 };
        let fast = Link { setup_seconds: 20e-6, tokens_per_second: 200e9 / 147_456.0 };
        let neighbours = (n / 8 * 8..n / 8 * 8 + 8).filter(|other| near && *other != n);
        Candidate {
            worker: name(n),
            role: if prefill { Role::Prefill } else { Role::Decode },
            model: Some(PROFILES[0].step),
            queue_seconds,
            timely_seconds: queue_seconds * 0.8,
            decodes: if prefill { 0 } else { random(2, 120) as u32 },
            decode_tokens: if prefill { 0 } else { random(3, 300_000) },
            kv_tokens: PROFILES[0].kv_tokens,
            paced: true,
            near: neighbours.map(|other| (name(other), fast)).collect(),
            ..Candidate::default()
        }
    };
    (0..WORKERS).map(candidate).collect()
}

/// What every worker stores, in deltas, until there are so many pairs: the common blocks at everybody, each
/// conversation at one to three workers, some of it in host memory.
fn stored(pairs: usize) -> impl Iterator<Item = (usize, Change)> {
    let common =
        (0..WORKERS).map(|worker| (worker, Change::Stored(Tier::Device, chain(0, 0..COMMON_BLOCKS))));
    let of_one = (0..u64::MAX).flat_map(|conversation| {
        let holders = 1 + mix(conversation) % 3;
        (0..holders).map(move |holder| (conversation, mix(conversation * 4 + holder) as usize % WORKERS))
    });
    let deltas = of_one.flat_map(|(conversation, worker)| {
        let starts = (COMMON_BLOCKS..PROMPT_BLOCKS).step_by(DELTA_BLOCKS as usize);
        starts.map(move |start| {
            let tier = if mix(conversation) & 8 == 0 && start > 512 { Tier::Host } else { Tier::Device };
            (worker, Change::Stored(tier, chain(conversation, start..start + DELTA_BLOCKS)))
        })
    });
    common.chain(deltas).take(pairs / DELTA_BLOCKS as usize)
}

/// The index and its twin, fed alike, and what time and bytes that took.
struct Filled {
    index: Index,
    oracle: Oracle,
    sequences: Vec<u64>,
}

fn measured<T>(
    what: &str,
    mut feed: impl FnMut(&mut T, usize, u64, &Change),
    into: &mut T,
    sequences: &mut [u64],
) {
    let before = ALLOCATED.load(Relaxed);
    PEAK.store(before, Relaxed);
    let (mut took, mut pairs) = (Duration::ZERO, 0usize);
    for (worker, change) in stored(PAIRS) {
        sequences[worker] += 1;
        let Change::Stored(_, blocks) = &change else { continue };
        pairs += blocks.len();
        let start = seam::now();
        feed(into, worker, sequences[worker], &change);
        took += seam::now().since(start);
    }
    let bytes = ALLOCATED.load(Relaxed).saturating_sub(before);
    println!(
        "{what}: {pairs} pairs in {:.0} MB ({:.1} bytes each, {:.0} MB at most while it grows), filled at {:.2} million events a second",
        bytes as f64 / 1e6,
        bytes as f64 / pairs as f64,
        PEAK.load(Relaxed).saturating_sub(before) as f64 / 1e6,
        pairs as f64 / took.as_secs_f64() / 1e6
    );
}

const START: Incarnation = Incarnation(1);

fn fill() -> Filled {
    let names: Vec<WorkerId> = (0..WORKERS).map(name).collect();
    let (mut index, mut oracle) = (Index::new(1_000_000_000), Oracle::default());
    for worker in &names {
        index.snapshot(worker, START, 0, []).expect("few workers");
        oracle.snapshot(worker, START, 0, []);
    }
    let mut sequences = vec![0; WORKERS];
    let feed = |index: &mut Index, worker: usize, sequence, change: &Change| {
        index.apply(&names[worker], START, sequence, change).expect("is next");
    };
    measured("index", feed, &mut index, &mut sequences);
    println!("  it says {:.0} MB itself and evicted {}", index.bytes() as f64 / 1e6, index.evicted());
    let mut again = vec![0; WORKERS];
    let feed = |oracle: &mut Oracle, worker: usize, sequence, change: &Change| {
        assert!(oracle.apply(&names[worker], START, sequence, change));
    };
    measured("naive", feed, &mut oracle, &mut again);
    Filled { index, oracle, sequences }
}

/// Prompts of conversations that are held to different lengths, and some that nobody knows.
fn prompts() -> Vec<Vec<BlockHash>> {
    let prompt = |n: u64| {
        let conversation = if n % 8 == 7 { 1 << 30 | n } else { mix(n) % 4_000 };
        let held = COMMON_BLOCKS + mix(n + 7) % (PROMPT_BLOCKS - COMMON_BLOCKS);
        let mut prompt = chain(conversation, 0..held);
        prompt.extend(chain(1 << 31 | n, held..PROMPT_BLOCKS));
        prompt
    };
    // Half are held whole: the most to look up.
    (0..512).map(|n| if n % 2 == 0 { chain(mix(n) % 4_000, 0..PROMPT_BLOCKS) } else { prompt(n) }).collect()
}

fn request(held: Vec<Held>) -> Request {
    Request {
        prompt_tokens: PROMPT_BLOCKS as u32 * BLOCK_TOKENS,
        max_tokens: 1_024,
        first_token_seconds: 5.0,
        token_seconds: 0.05,
        held,
        ..Request::default()
    }
}

/// Median and 99th percentile in microseconds, printed: of the processor's time, and of the time that passed,
/// which others on the machine are part of. Returns the former's median.
fn quantiles(what: &str, times: Vec<Took>) -> f64 {
    let of = |part: fn(&Took) -> Duration| {
        let mut times: Vec<Duration> = times.iter().map(part).collect();
        times.sort_unstable();
        [0.5, 0.99].map(|share| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6)
    };
    let ([median, p99], [passed, passed_p99]) = (of(|took| took.processor), of(|took| took.passed));
    println!(
        "{what}: median {median:.1} us, p99 {p99:.1} us (passed: {passed:.1} and {passed_p99:.1}), of {}",
        times.len()
    );
    median
}

struct Took {
    processor: Duration,
    passed: Duration,
}

/// What this thread has had of a processor.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to `time` alone, which is valid and ours.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(failed, 0, "every thread has this clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn timed<T>(times: usize, mut work: impl FnMut(usize) -> T) -> Vec<Took> {
    let one = |n| {
        let (start, processor) = (seam::now(), processor_time());
        black_box(work(n));
        Took { processor: processor_time() - processor, passed: seam::now().since(start) }
    };
    (0..times).map(one).collect()
}

/// What a router keeps beside its view: the candidate that each number of the index is, for one version of it.
struct Numbers {
    version: u64,
    candidates: Vec<Option<usize>>,
}

impl Numbers {
    fn of(index: &Index, candidates: &[Candidate]) -> Numbers {
        let mut numbers = vec![None; candidates.len()];
        for (at, candidate) in candidates.iter().enumerate() {
            numbers[index.number(&candidate.worker).expect("all have reported")] = Some(at);
        }
        Numbers { version: index.version(), candidates: numbers }
    }
}

/// One decision, whole.
fn decide(
    index: &Index,
    cost: &Cost,
    numbers: &Numbers,
    candidates: &[Candidate],
    prompt: &[BlockHash],
) -> Route {
    assert_eq!(index.version(), numbers.version, "nobody comes or goes here");
    let held = index.held(prompt, BLOCK_TOKENS, |number, _, _| numbers.candidates[number]);
    cost.choose(&request(held), candidates).expect("all can do it")
}

fn goals(filled: &Filled, prompts: &[Vec<BlockHash>]) {
    let cost = Cost::default();
    for (what, near, times) in [("decision", false, 20_000), ("decision, seven near links each", true, 5_000)]
    {
        let candidates = cluster(near);
        let numbers = Numbers::of(&filled.index, &candidates);
        let one = |n: usize| decide(&filled.index, &cost, &numbers, &candidates, &prompts[n % prompts.len()]);
        let fast = quantiles(what, timed(times, one));
        let naive = |n: usize| {
            let found = filled.oracle.longest(&prompts[n % prompts.len()]);
            let held = found.into_iter().map(|found| Held {
                candidate: candidates.iter().position(|c| c.worker == found.worker).expect("all are shown"),
                device_tokens: found.device_blocks * BLOCK_TOKENS,
                tokens: found.blocks * BLOCK_TOKENS,
                tier: found.tier,
            });
            cost.full_search(&request(held.collect()), &candidates)
        };
        let slow = quantiles("  naive", timed(4, naive));
        println!("  {:.0} times as fast", slow / fast);
    }
    let held: usize = prompts.iter().map(|prompt| filled.index.longest(prompt).len()).sum();
    println!("holders found of a prompt: {} on average", held / prompts.len());
    let known = |_, _: &WorkerId, _| Some(0);
    let fast = quantiles(
        "lookup of 1,024 blocks",
        timed(20_000, |n| filled.index.held(&prompts[n % prompts.len()], BLOCK_TOKENS, known)),
    );
    let slow = quantiles("  naive", timed(200, |n| filled.oracle.longest(&prompts[n % prompts.len()])));
    println!("  {:.0} times as fast", slow / fast);
    let requests: Vec<Request> = prompts
        .iter()
        .map(|prompt| request(filled.index.held(prompt, BLOCK_TOKENS, |_, _, _| None)))
        .collect();
    let candidates = cluster(false);
    quantiles("cost alone", timed(20_000, |n| cost.choose(&requests[n % requests.len()], &candidates)));
}

/// A delta that is stored, and removed again one delta later.
fn events(n: u64) -> (usize, Change) {
    let (turn, worker) = (n / 2, (n / 2) as usize % WORKERS);
    let blocks = chain(1 << 32 | turn, COMMON_BLOCKS..COMMON_BLOCKS + DELTA_BLOCKS);
    let stored = n.is_multiple_of(2);
    (
        worker,
        if stored { Change::Stored(Tier::Device, blocks) } else { Change::Removed(Tier::Device, blocks) },
    )
}

/// The most bytes that so many pairs can take: every block has one holder.
fn distinct() {
    let (before, mut index) = (ALLOCATED.load(Relaxed), Index::new(1_000_000_000));
    PEAK.store(before, Relaxed);
    let blocks = (0..PAIRS as u64).map(|n| (Tier::Device, block(n >> 16, COMMON_BLOCKS + n % (1 << 16))));
    index.snapshot(&name(0), START, 0, blocks).expect("one worker");
    let bytes = |now: &AtomicUsize| now.load(Relaxed).saturating_sub(before) as f64;
    println!(
        "index of distinct blocks: {} pairs in {:.0} MB ({:.1} bytes each, {:.0} MB at most while it grows)",
        index.len(),
        bytes(&ALLOCATED) / 1e6,
        bytes(&ALLOCATED) / index.len() as f64,
        bytes(&PEAK) / 1e6
    );
}

fn main() {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    distinct();
    let mut filled = fill();
    let prompts = prompts();
    goals(&filled, &prompts);

    let (cost, candidates) = (Cost::default(), cluster(false));
    let numbers = Numbers::of(&filled.index, &candidates);
    let mut n = 0;
    criterion.bench_function("decision at 1,000 workers and 1,024 blocks", |bencher| {
        bencher.iter(|| {
            n += 1;
            decide(&filled.index, &cost, &numbers, &candidates, &prompts[n % prompts.len()])
        });
    });
    criterion.bench_function("lookup of 1,024 blocks", |bencher| {
        bencher.iter(|| {
            n += 1;
            filled.index.held(&prompts[n % prompts.len()], BLOCK_TOKENS, |_, _, _| Some(0))
        });
    });
    criterion.bench_function("lookup of 1,024 blocks, naive", |bencher| {
        bencher.iter(|| {
            n += 1;
            filled.oracle.longest(&prompts[n % prompts.len()])
        });
    });

    let names: Vec<WorkerId> = (0..WORKERS).map(name).collect();
    let mut group = criterion.benchmark_group("stored and evicted at ten million pairs");
    group.throughput(Throughput::Elements(DELTA_BLOCKS));
    for (what, naive) in [("index", false), ("naive", true)] {
        let (mut sequences, mut n) = (filled.sequences.clone(), 0u64);
        group.bench_function(what, |bencher| {
            let next = || {
                n += 1;
                events(n - 1)
            };
            let take = |(worker, change): (usize, Change)| {
                sequences[worker] += 1;
                let (name, sequence) = (&names[worker], sequences[worker]);
                if naive {
                    assert!(filled.oracle.apply(name, START, sequence, &change));
                } else {
                    filled.index.apply(name, START, sequence, &change).expect("is next");
                }
            };
            bencher.iter_batched(next, take, BatchSize::SmallInput);
        });
    }
    group.finish();
    criterion.final_summary();
}
