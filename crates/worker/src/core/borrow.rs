//! Borrowing: a prompt's first blocks come from another worker's prefix cache where that is faster than computing
//! them, and this worker's own blocks are lent to others.

use std::time::Duration;

use tandem_batching::{Origin, SequenceSpec};
use tandem_kv_cache::HashChain;
use tandem_types::{
    BLOCK_TOKENS, BlockHash, GroupPages, Handle, Incarnation, LeaseId, Time, Until, WorkerId,
};

use super::Core;
use super::legs::{PullOrder, PullSource, Purpose, Stage, StageName};
use tandem_batching::SequenceId;

/// A worker that is said to hold the first blocks of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its name.
    pub worker: WorkerId,
    /// Which start of its process.
    pub incarnation: Incarnation,
    /// `host:port` of its Lender service.
    pub lender: String,
    /// How many blocks.
    pub blocks: u32,
}

/// What computing and pulling have cost here so far, as moving averages.
#[derive(Clone, Debug)]
pub struct Costs {
    /// Seconds of a step per prompt token; unknown before the first prompt.
    seconds_per_token: Option<f64>,
    /// Bytes per second of a pull.
    bandwidth: f64,
    /// Bytes of a block in all groups.
    block_bytes: u64,
}

/// Weight of a new observation.
const NEWEST: f64 = 0.2;
/// Assumed before the first pull, in bytes per second.
const BANDWIDTH: f64 = 1e9;
/// What a pull takes before its first byte: a question, a claim, a verdict.
const PULL_SETUP: Duration = Duration::from_millis(5);

impl Costs {
    pub(super) fn new(block_bytes: u64) -> Costs {
        Costs { seconds_per_token: None, bandwidth: BANDWIDTH, block_bytes }
    }

    /// A step took so long for so many prompt tokens.
    pub fn computed(&mut self, tokens: u32, took: Duration) {
        if tokens > 0 {
            let now = took.as_secs_f64() / f64::from(tokens);
            let known = self.seconds_per_token.unwrap_or(now);
            self.seconds_per_token = Some(known + NEWEST * (now - known));
        }
    }

    /// A pull of so many bytes took so long.
    pub fn pulled(&mut self, bytes: u64, took: Duration) {
        let net = took.saturating_sub(PULL_SETUP).as_secs_f64();
        if bytes > 0 && net > 0.0 {
            self.bandwidth += NEWEST * (bytes as f64 / net - self.bandwidth);
        }
    }

    /// Whether to pull so many blocks rather than compute them. Without a measure of computing, yes: that is
    /// what caches are for.
    pub fn borrowing_pays(&self, blocks: u32) -> bool {
        let Some(per_token) = self.seconds_per_token else { return blocks > 0 };
        let pull = PULL_SETUP.as_secs_f64() + f64::from(blocks) * self.block_bytes as f64 / self.bandwidth;
        blocks > 0 && f64::from(blocks * BLOCK_TOKENS) * per_token > pull
    }
}

impl Core {
    /// What computing and pulling cost.
    pub fn costs(&mut self) -> &mut Costs {
        &mut self.costs
    }

    /// Begins to compute a prompt, with what others hold of it if that pays.
    ///
    /// Nobody borrows past somebody who waits for memory: the pages for the whole prompt are taken here.
    pub(super) fn compute(&mut self, id: SequenceId, spec: SequenceSpec, now: Time) {
        let Some((holder, chain)) = self.lender_for(id, &spec) else {
            return self.add_to_batch(id, spec, Origin::Fresh, now);
        };
        let known = spec.tokens.len() as u32;
        let room = match spec.until {
            Until::FirstToken => known,
            Until::End | Until::Hidden => (known + BLOCK_TOKENS).min(self.constants.context_tokens),
        };
        let Ok((table, computed)) = self.kv.open(chain.hashes(), known, room, now) else {
            return self.add_to_batch(id, spec, Origin::Fresh, now);
        };
        let most = ((known - 1) / BLOCK_TOKENS).min(holder.blocks) as usize;
        let local = (0..self.constants.groups).map(|g| table.pages(g)[..most].to_vec()).collect();
        let leg = self.legs.get_mut(&id).expect("callers have looked it up");
        let order = PullOrder {
            sequence: id,
            source: PullSource::Holder { holder, hashes: chain.hashes()[..most].to_vec() },
            attempt: leg.key.attempt,
            local,
            skip_blocks: computed / BLOCK_TOKENS,
            deadline: leg.deadline,
            traceparent: leg.traceparent.clone(),
            request_name: leg.request_name.clone(),
        };
        leg.stage = Stage::Pulling { spec: Box::new(spec), table, purpose: Purpose::Borrow { computed } };
        self.enter(id, StageName::Transfer);
        self.output.push(super::Output::Pull(Box::new(order)));
    }

    /// Who is to be asked for blocks, if asking pays.
    fn lender_for(&self, id: SequenceId, spec: &SequenceSpec) -> Option<(Holder, HashChain)> {
        let holders = &self.legs.get(&id)?.holders;
        let own = &self.constants.id;
        let best = holders.iter().filter(|h| h.worker != *own).max_by_key(|holder| holder.blocks)?;
        // What is to be scored is computed here.
        if self.batcher.waiting() > 0 || spec.score.is_some() {
            return None;
        }
        let mut chain = HashChain::new(spec.seed);
        chain.extend(&spec.tokens);
        let known = spec.tokens.len() as u32;
        let here = self.kv.cached_prefix(chain.hashes(), known) / BLOCK_TOKENS;
        let there = ((known - 1) / BLOCK_TOKENS).min(best.blocks);
        let pays = self.costs.borrowing_pays(there.saturating_sub(here));
        pays.then(|| (best.clone(), chain))
    }

    /// The first `computed` tokens of a prompt are in `table`, borrowed or cached: the rest is computed.
    pub(super) fn go_on_computing(
        &mut self,
        id: SequenceId,
        spec: SequenceSpec,
        table: tandem_kv_cache::Table,
        computed: u32,
        now: Time,
    ) {
        let Some(leg) = self.legs.get_mut(&id) else {
            return self.kv.close(table, now);
        };
        leg.stage = Stage::Running;
        self.add_to_batch(id, spec, Origin::Computed { table, computed }, now);
        self.admitted_sequence(id, computed, now);
    }

    /// Lends cached blocks: the longest prefix of `hashes` that is here, under a lease of its own that is sealed
    /// at once. `None` if nothing is here, or too much is under leases already.
    pub fn lend(&mut self, hashes: &[BlockHash], deadline: Time, now: Time) -> Option<Handle> {
        let lease = LeaseId((self.draw_id)());
        let blocks = self.kv.lend(lease, hashes, deadline, now).ok().filter(|&blocks| blocks > 0)?;
        let pages = self.kv.lease_pages(lease).iter().cloned().enumerate();
        let groups = pages.map(|(group, pages)| GroupPages { group: group as u32, shard: 0, pages });
        Some(self.handle(lease, groups.collect(), blocks * BLOCK_TOKENS))
    }

    /// What a puller needs to find these pages.
    pub(super) fn handle(&self, lease: LeaseId, groups: Vec<GroupPages>, tokens: u32) -> Handle {
        let constants = &self.constants;
        Handle {
            lease,
            owner: constants.id.clone(),
            incarnation: constants.incarnation,
            lender: constants.lender.clone(),
            exports: constants.exports.clone(),
            identity: constants.identity.clone(),
            form: constants.form.clone(),
            groups,
            tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_pulled_when_that_is_faster_than_computing_them() {
        let mut costs = Costs::new(1 << 20);
        assert!(costs.borrowing_pays(1), "nothing is known yet");
        assert!(!costs.borrowing_pays(0));
        costs.computed(100, Duration::from_millis(100));
        assert!(costs.borrowing_pays(1), "32 ms of computing against 6 ms of pulling");
        for _ in 0..100 {
            costs.computed(1000, Duration::from_millis(1));
        }
        assert!(!costs.borrowing_pays(1), "32 us of computing against 6 ms of pulling");
    }

    #[test]
    fn a_slow_network_makes_computing_the_better_choice() {
        let mut costs = Costs::new(1 << 20);
        costs.computed(1000, Duration::from_millis(100));
        assert!(costs.borrowing_pays(64), "205 ms against 72 ms");
        for _ in 0..100 {
            costs.pulled(1 << 20, Duration::from_millis(105));
        }
        assert!(!costs.borrowing_pays(64), "205 ms against 6 s");
    }
}
