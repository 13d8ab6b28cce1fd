//! What several test modules share.

pub mod sdk;

use std::future::Future;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tandem_integration_tests::checkpoints;

/// Runs a test on a runtime of its own, in a cluster's usual shape.
pub fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(test);
}

/// The checkpoint that tests use where any will do.
pub fn tiny() -> std::path::PathBuf {
    checkpoints::named("qwen3")
}

/// Runs `count` jobs, `at_once` at a time, and returns their results in order.
pub async fn concurrently<T, F: Future<Output = T>>(
    count: usize,
    at_once: usize,
    job: impl Fn(usize) -> F,
) -> Vec<T> {
    let mut running = FuturesUnordered::new();
    let mut done: Vec<Option<T>> = (0..count).map(|_| None).collect();
    let mut next = 0;
    loop {
        while next < count && running.len() < at_once {
            let job = job(next);
            let index = next;
            running.push(async move { (index, job.await) });
            next += 1;
        }
        let Some((index, result)) = running.next().await else { break };
        done[index] = Some(result);
    }
    done.into_iter().map(|result| result.expect("every job is done")).collect()
}

/// A small seeded generator, for prompts and moments (SplitMix64).
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A prompt of ordinary tokens of the small checkpoints.
    pub fn prompt(&mut self, tokens: usize) -> Vec<u32> {
        (0..tokens).map(|_| self.below(370) as u32).collect()
    }
}

/// A seed from the environment, else a fixed one; said in the log either way.
pub fn seed() -> u64 {
    let given = std::env::var("TANDEM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or(20_261_124);
    println!("TANDEM_TEST_SEED={seed}");
    seed
}
