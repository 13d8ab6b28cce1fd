//! What a router is told when it starts.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::Serialize;
use tandem_chassis::config::{ByteSize, HumanDuration, Slo};

/// Options of a router.
#[derive(Clone, Debug, clap::Parser, Serialize)]
#[command(
    name = "tandem-router",
    about = "Tandem's router: an OpenAI-compatible endpoint that places work on workers"
)]
pub struct RouterConfig {
    /// Name in the cluster; by default `router-` and a number drawn at random
    #[arg(long)]
    pub id: Option<String>,
    /// Cluster to join
    #[arg(long, default_value = "default")]
    pub cluster: String,
    /// Address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub bind: IpAddr,
    /// Host name or address that others reach this router under; by default the bind address
    #[arg(long)]
    pub advertise: Option<String>,
    /// Port of the API; 0 takes any free one
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Port of the admin endpoints; 0 takes any free one
    #[arg(long, default_value_t = 8001)]
    pub admin_port: u16,
    /// etcd to register with, such as http://127.0.0.1:2379
    #[arg(long)]
    pub etcd: Option<String>,
    /// Membership served by a parent process; set by `tandem up --processes`
    #[arg(long, hide = true)]
    pub parent: Option<String>,
    /// Checkpoint directory, for its tokenizer, template and context length
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Name of the model in the API; by default the directory's name
    #[arg(long)]
    pub model_name: Option<String>,
    /// Context length in tokens, where it is not the checkpoint's
    #[arg(long)]
    pub context_tokens: Option<u32>,
    /// How a request's workers are chosen: cost, prefix, least-loaded or round-robin
    #[arg(long, default_value = "cost")]
    pub policy: String,
    /// Whether roles follow the load: off, advise (say what would change) or on
    #[arg(long, default_value_t)]
    pub planner: PlannerMode,
    /// Latency targets, such as ttft=1s,tpot=50ms: what can still meet them is computed first, what cannot is shed
    #[arg(long)]
    pub slo: Option<Slo>,
    /// Memory of the index of what every worker has cached
    #[arg(long, default_value = "256MiB")]
    pub index_memory: ByteSize,
    /// Requests that may wait for a worker to begin them; more get 503
    #[arg(long, default_value_t = 256)]
    pub queue_max: usize,
    /// Time that a request may take in all
    #[arg(long, default_value = "600s")]
    pub request_deadline: HumanDuration,
    /// Largest request body
    #[arg(long, default_value = "32MiB")]
    pub body_max: ByteSize,
    /// Time that running requests get when the router drains
    #[arg(long, default_value = "30s")]
    pub drain_timeout: HumanDuration,
    /// Logs and traces.
    #[command(flatten)]
    #[serde(flatten)]
    pub telemetry: tandem_chassis::telemetry::Options,
}

impl RouterConfig {
    /// The defaults, as without any option.
    pub fn defaults() -> RouterConfig {
        <RouterConfig as clap::Parser>::parse_from(["tandem-router"])
    }

    /// What no single option can know.
    pub fn check(&self) -> Result<(), String> {
        if self.model.is_none() {
            return Err(
                "--model DIR is needed: the checkpoint directory whose tokenizer the router uses".into()
            );
        }
        if self.queue_max == 0 {
            return Err("--queue-max must be at least 1".into());
        }
        tandem_placement::named(&self.policy).map(|_| ())
    }
}

/// What the role planner may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PlannerMode {
    /// Nothing.
    #[default]
    Off,
    /// Say what it would change.
    Advise,
    /// Change roles.
    On,
}

const MODES: [(&str, PlannerMode); 3] =
    [("off", PlannerMode::Off), ("advise", PlannerMode::Advise), ("on", PlannerMode::On)];

impl std::str::FromStr for PlannerMode {
    type Err = String;

    fn from_str(text: &str) -> Result<PlannerMode, String> {
        let known = MODES.iter().find(|(name, _)| *name == text);
        known.map(|(_, mode)| *mode).ok_or_else(|| format!("{text:?} is none of off, advise and on"))
    }
}

impl std::fmt::Display for PlannerMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known = MODES.iter().find(|(_, mode)| mode == self);
        f.write_str(known.expect("every mode has a name").0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_prints_it_reads() {
        tandem_chassis::config::assert_prints_what_it_reads::<RouterConfig>(&[
            "--id=r-1",
            "--model=/m",
            "--port=0",
            "--policy=round-robin",
            "--planner=advise",
            "--slo=ttft=2s,tpot=30ms",
            "--index-memory=1GiB",
            "--queue-max=7",
            "--request-deadline=30s",
            "--body-max=1MiB",
        ]);
    }

    #[test]
    fn what_cannot_be_is_refused_in_a_sentence() {
        let config = RouterConfig { model: Some("m".into()), ..RouterConfig::defaults() };
        assert_eq!(config.check(), Ok(()));
        let refused = |config: RouterConfig| config.check().expect_err("it cannot be");
        assert!(refused(RouterConfig::defaults()).contains("--model DIR"));
        assert!(refused(RouterConfig { queue_max: 0, ..config.clone() }).contains("--queue-max"));
        assert!(
            refused(RouterConfig { policy: "chance".into(), ..config }).contains("least-loaded, round-robin")
        );
    }
}
