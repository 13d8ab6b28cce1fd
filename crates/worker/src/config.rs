//! What a worker is told when it starts. The three worker binaries share it and differ in the first role.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tandem_chassis::config::{ByteSize, HumanDuration};
use tandem_engine::fake::FakeSpec;
use tandem_engine::{Dtype, Quantization};
use tandem_types::Role;

/// Options of a worker.
#[derive(Clone, Debug, clap::Parser, Serialize)]
#[command(
    name = "tandem worker",
    about = "A Tandem worker: runs a model and hands KV to and from other workers"
)]
pub struct WorkerConfig {
    /// Name in the cluster; by default the role and a number drawn at random
    #[arg(long)]
    pub id: Option<String>,
    /// What it prefers to do at first: prefill, decode or mixed
    #[arg(long, default_value = "mixed")]
    pub role: Role,
    /// Cluster to join
    #[arg(long, default_value = "default")]
    pub cluster: String,
    /// Address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub bind: IpAddr,
    /// Host name or address that others reach this worker under; by default the bind address
    #[arg(long)]
    pub advertise: Option<String>,
    /// Port of the gRPC services; 0 takes any free one
    #[arg(long, default_value_t = 7100)]
    pub port: u16,
    /// Port of the admin endpoints; 0 takes any free one
    #[arg(long, default_value_t = 7101)]
    pub admin_port: u16,
    /// etcd to register with, such as http://127.0.0.1:2379
    #[arg(long)]
    pub etcd: Option<String>,
    /// Membership served by a parent process; set by `tandem up --processes`
    #[arg(long, hide = true)]
    pub parent: Option<String>,
    /// Checkpoint: a Hugging Face directory
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Name of the model in the API; by default the directory's name
    #[arg(long)]
    pub model_name: Option<String>,
    /// Element type of weights, activations and KV: auto, bfloat16 or float32
    #[arg(long, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// How weights of layers are held: auto (as the checkpoint has them), or made from numbers at load: w8a8 (8 bits,
    /// and rows in 8 bits) or int4 (4 bits in groups of 64)
    #[arg(long, default_value_t = Quantization::Auto)]
    pub quantization: Quantization,
    /// Threads that compute; by default all cores but one, at least one
    #[arg(long)]
    pub threads: Option<usize>,
    /// Memory of the KV pool
    #[arg(long, default_value = "512MiB")]
    pub kv_memory: ByteSize,
    /// Compute with the fake engine: zero, paced:TTFT,ITL or qwen3-8b@h200, with options after commas
    #[arg(long, num_args = 0..=1, default_missing_value = "zero", require_equals = true)]
    pub fake: Option<FakeSpec>,
    /// How KV travels: auto, or the name of one transport
    #[arg(long, default_value = "auto")]
    pub transport: String,
    /// Certificate with its chain (PEM) that this worker shows where KV travels over tcp; given with the next two, all
    /// of tcp is TLS and both ends show one
    #[arg(long)]
    pub transport_tls_cert: Option<PathBuf>,
    /// Key of that certificate (PEM)
    #[arg(long)]
    pub transport_tls_key: Option<PathBuf>,
    /// Authorities (PEM) whose certificates are believed
    #[arg(long)]
    pub transport_tls_ca: Option<PathBuf>,
    /// Whether every page carries a checksum that its puller compares: on or off
    #[arg(long, default_value = "on")]
    pub checksums: Switch,
    /// Whether the numerics class of both ends of a hand-off must be equal: strict
    #[arg(long, default_value = "strict")]
    pub numerics: Numerics,
    /// Share of the KV pool that may be under leases (one lease always fits)
    #[arg(long, default_value_t = 0.5)]
    pub leased_share: f32,
    /// Time to live of a lease that nobody renews
    #[arg(long, default_value = "10s")]
    pub lease_time_to_live: HumanDuration,
    /// Tokens of an engine step
    #[arg(long, default_value_t = 512)]
    pub token_budget: u32,
    /// Sequences of an engine step
    #[arg(long, default_value_t = 64)]
    pub rows_max: u32,
    /// Requests that may wait or run here; more are refused
    #[arg(long, default_value_t = 1024)]
    pub legs_max: usize,
    /// Time that running requests get when the worker drains
    #[arg(long, default_value = "30s")]
    pub drain_timeout: HumanDuration,
    /// Logs and traces.
    #[command(flatten)]
    #[serde(flatten)]
    pub telemetry: tandem_chassis::telemetry::Options,
}

impl WorkerConfig {
    /// The defaults, as without any option.
    pub fn defaults() -> WorkerConfig {
        <WorkerConfig as clap::Parser>::parse_from(["worker"])
    }

    /// What no single option can know.
    pub fn check(&self) -> Result<(), String> {
        if self.model.is_none() {
            return Err(
                "--model DIR is needed: a Hugging Face checkpoint directory (with --fake for its tokenizer)"
                    .into(),
            );
        }
        if self.role == Role::Encode {
            return Err("this version has no encoder workers; roles are prefill, decode and mixed".into());
        }
        if self.threads == Some(0) {
            return Err("--threads must be at least 1".into());
        }
        if !(self.leased_share > 0.0 && self.leased_share <= 1.0) {
            return Err(format!("--leased-share is {} but must be above 0 and at most 1", self.leased_share));
        }
        if self.token_budget == 0 || self.rows_max == 0 || self.legs_max == 0 {
            return Err("--token-budget, --rows-max and --legs-max must be at least 1".into());
        }
        let tls = [&self.transport_tls_cert, &self.transport_tls_key, &self.transport_tls_ca];
        if tls.iter().any(|file| file.is_some()) && tls.iter().any(|file| file.is_none()) {
            return Err("--transport-tls-cert, --transport-tls-key and --transport-tls-ca go together".into());
        }
        let known: Vec<&str> = tandem_kv_transfer::TRANSPORTS.iter().map(|row| row.name).collect();
        if self.transport != "auto" && !known.contains(&self.transport.as_str()) {
            return Err(format!(
                "--transport {:?} is not in this version; it has auto, {}",
                self.transport,
                known.join(", ")
            ));
        }
        Ok(())
    }
}

impl WorkerConfig {
    /// What transports are made with. Reads the files that are named.
    pub(crate) fn transport_options(&self) -> Result<tandem_kv_transfer::Options, String> {
        let files = (&self.transport_tls_cert, &self.transport_tls_key, &self.transport_tls_ca);
        let (Some(certificate), Some(key), Some(authority)) = files else {
            return Ok(tandem_kv_transfer::Options::default());
        };
        let tls = tandem_kv_transfer::Tls::load(certificate, key, authority)
            .map_err(|error| format!("TLS between workers: {error}"))?;
        Ok(tandem_kv_transfer::Options { tls: Some(tls) })
    }
}

/// On or off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    /// It is done.
    #[default]
    On,
    /// It is not.
    Off,
}

impl std::str::FromStr for Switch {
    type Err = String;

    fn from_str(text: &str) -> Result<Switch, String> {
        match text {
            "on" => Ok(Switch::On),
            "off" => Ok(Switch::Off),
            _ => Err(format!("{text:?} is neither on nor off")),
        }
    }
}

/// How equal two ends of a hand-off must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Numerics {
    /// Equal numerics classes only.
    #[default]
    Strict,
}

impl std::str::FromStr for Numerics {
    type Err = String;

    fn from_str(text: &str) -> Result<Numerics, String> {
        match text {
            "strict" => Ok(Numerics::Strict),
            "mixed" => Err("hand-off between numerics classes is not in this version; it has strict".into()),
            _ => Err(format!("{text:?} is not known; expected strict")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(change: impl Fn(&mut WorkerConfig)) -> Result<(), String> {
        let mut config = WorkerConfig { model: Some("m".into()), ..WorkerConfig::defaults() };
        change(&mut config);
        config.check()
    }

    #[test]
    fn what_it_prints_it_reads() {
        tandem_chassis::config::assert_prints_what_it_reads::<WorkerConfig>(&[
            "--id=w-1",
            "--role=decode",
            "--model=/m",
            "--dtype=float32",
            "--quantization=w8a8",
            "--threads=3",
            "--kv-memory=1GiB",
            "--fake=paced:50ms,5ms,slow=2",
            "--transport=tcp",
            "--transport-tls-cert=/c.pem",
            "--transport-tls-key=/c.key",
            "--transport-tls-ca=/ca.pem",
            "--leased-share=0.25",
            "--log=debug",
        ]);
    }

    #[test]
    fn tls_that_cannot_be_had_is_not_left_out() {
        let file = || Some("/nowhere/at/all".into());
        let config = WorkerConfig {
            transport_tls_cert: file(),
            transport_tls_key: file(),
            transport_tls_ca: file(),
            ..WorkerConfig::defaults()
        };
        let refused = config.transport_options().err().expect("no such files");
        assert!(refused.contains("/nowhere/at/all") || refused.contains("--features tls"), "{refused}");
        assert!(WorkerConfig::defaults().transport_options().is_ok_and(|options| options.tls.is_none()));
    }

    #[test]
    fn what_cannot_be_is_refused_in_a_sentence() {
        assert_eq!(checked(|_| {}), Ok(()));
        for (refusal, part) in [
            (checked(|c| c.model = None), "--model DIR"),
            (checked(|c| c.role = Role::Encode), "no encoder workers"),
            (checked(|c| c.threads = Some(0)), "--threads"),
            (checked(|c| c.leased_share = 0.0), "--leased-share"),
            (checked(|c| c.rows_max = 0), "--rows-max"),
            (checked(|c| c.transport_tls_key = Some("k".into())), "go together"),
            (checked(|c| c.transport = "pigeon".into()), "auto, inproc, shm, tcp"),
            ("mixed".parse::<Numerics>().map(|_| ()), "not in this version"),
        ] {
            assert!(refusal.as_ref().is_err_and(|said| said.contains(part)), "{part}: {refusal:?}");
        }
    }
}
