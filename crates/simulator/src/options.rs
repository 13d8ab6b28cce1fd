//! What is simulated: the cluster, its policy, its flaws.

use std::time::Duration;

use tandem_batching::pace::Order;
use tandem_placement::predictor::{PROFILES, Profile};
use tandem_types::Role;

use crate::cache;

/// Roles at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// So many prefill and decode workers.
    Roles(usize, usize),
    /// Mixed workers whose steps take so many prompt tokens beside their decodes.
    Mixed(u32),
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Split::Roles(prefill, decode) => write!(f, "{prefill}P{decode}D"),
            Split::Mixed(chunk) => write!(f, "mixed:{chunk}"),
        }
    }
}

impl std::str::FromStr for Split {
    type Err = String;

    fn from_str(text: &str) -> Result<Split, String> {
        let wrong = || format!("{text:?} is no split; expected such as 4P4D or mixed:1024");
        if let Some(chunk) = text.strip_prefix("mixed:") {
            return chunk.parse().ok().filter(|chunk| *chunk > 0).map(Split::Mixed).ok_or_else(wrong);
        }
        let (prefill, rest) = text.split_once(['P', 'p']).ok_or_else(wrong)?;
        let decode = rest.strip_suffix(['D', 'd']).ok_or_else(wrong)?;
        match (prefill.parse::<usize>(), decode.parse::<usize>()) {
            (Ok(prefill), Ok(decode)) if prefill > 0 && decode > 0 => Ok(Split::Roles(prefill, decode)),
            _ => Err(wrong()),
        }
    }
}

/// When offline work is admitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offline {
    /// Whenever the slack of online work allows.
    #[default]
    Slack,
    /// Only while no online request runs or waits.
    Idle,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// The worker dies with all it has, and is back after so long.
    Crash(Duration),
    /// Its steps take so many times as long, for so long.
    Slow(f64, Duration),
    /// It reports nothing for so long, but works on.
    Silent(Duration),
}

/// Which code decides about steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Batching {
    /// The closed form, proven equal to the batcher.
    #[default]
    Twin,
    /// The batcher itself, token by token.
    Real,
}

/// A cluster and what befalls it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Workers at the start.
    pub split: Split,
    /// How many; `split` must add up to it.
    pub workers: usize,
    /// Model and device.
    pub profile: &'static Profile,
    /// By name, of the policies of `placement`.
    pub policy: String,
    /// Which prompt comes first.
    pub order: Order,
    /// Whether roles change.
    pub planner: bool,
    /// Whether what is rather late than in time is refused, as a router with targets does: under every policy, with
    /// prompts in order by deadline. Who is refused comes again when told to, later from time to time, with what is
    /// left of its targets.
    pub admission: bool,
    /// Targets: first token, and seconds per token on average.
    pub first_token: Duration,
    /// See `first_token`.
    pub per_token: Duration,
    /// Prefix caches of each worker.
    pub cache: cache::Sizes,
    /// Whether prefixes are pulled from peers.
    pub peer_pulls: bool,
    /// Whether transfers of one adapter take turns, or each has it whole.
    pub shared_links: bool,
    /// Bytes per second of an adapter.
    pub link_bytes: f64,
    /// Coefficient of variation of step times.
    pub noise: f64,
    /// Age of the routers' views.
    pub stale: Duration,
    /// Routers that take turns. Of what another has sent, one knows by reports alone.
    pub routers: usize,
    /// By what share predictors are too high, to begin with.
    pub bias: f64,
    /// Whether workers correct their predictors by what their steps take, as real ones do.
    pub learning: bool,
    /// When offline work is admitted.
    pub offline: Offline,
    /// Counts memory and queues as the reference simulator does, to be compared with it: prompts take no pages.
    pub as_reference: bool,
    /// Room for an admitted answer to grow.
    pub headroom_tokens: u32,
    /// What goes wrong, when and where.
    pub faults: Vec<(Duration, usize, Fault)>,
    /// Workers that are added, and when they are asked for; they start after `scale_up`.
    pub added: Vec<(Duration, Role)>,
    /// Time a new worker needs to load the model.
    pub scale_up: Duration,
    /// Names the run's draws.
    pub seed: u64,
    /// Which code decides about steps.
    pub batching: Batching,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            split: Split::Roles(4, 4),
            workers: 8,
            profile: &PROFILES[0],
            policy: "cost".to_owned(),
            order: Order::Deadline,
            planner: true,
            admission: true,
            first_token: Duration::from_secs(1),
            per_token: Duration::from_millis(50),
            cache: cache::Sizes::default(),
            peer_pulls: true,
            shared_links: false,
            link_bytes: 40e9,
            noise: 0.0,
            stale: Duration::ZERO,
            routers: 1,
            bias: 0.0,
            learning: true,
            offline: Offline::Slack,
            as_reference: false,
            headroom_tokens: 512,
            faults: Vec::new(),
            added: Vec::new(),
            scale_up: Duration::from_secs(60),
            seed: 1,
            batching: Batching::Twin,
        }
    }
}

impl Options {
    /// Roles of the workers at the start.
    pub fn roles(&self) -> Vec<Role> {
        match self.split {
            Split::Roles(prefill, decode) => {
                let roles = std::iter::repeat_n(Role::Prefill, prefill);
                roles.chain(std::iter::repeat_n(Role::Decode, decode)).collect()
            }
            Split::Mixed(_) => vec![Role::Mixed; self.workers],
        }
    }

    /// A sentence if this cannot be simulated.
    pub fn check(&self) -> Result<(), String> {
        if let Split::Roles(prefill, decode) = self.split
            && prefill + decode != self.workers
        {
            return Err(format!("{} is not a split of {} workers", self.split, self.workers));
        }
        if self.workers == 0 || self.routers == 0 {
            return Err("a cluster has workers and a router".into());
        }
        tandem_placement::named(&self.policy).map(|_| ())?;
        for (name, value) in [("noise", self.noise), ("bias", self.bias)] {
            if !value.is_finite() || value <= -1.0 || (name == "noise" && value < 0.0) {
                return Err(format!("{name}={value} is out of range"));
            }
        }
        Ok(())
    }
}
