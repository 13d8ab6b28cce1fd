//! A checkpoint that cannot be served is refused by naming the file and the fact, before anybody hears of the
//! worker.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tandem_chassis::Shutdown;
use tandem_cluster::{Embedded, Membership};
use tandem_integration_tests::checkpoints;
use tandem_worker::WorkerConfig;

use crate::support::run;

/// A copy of a good checkpoint, spoilt.
struct Spoilt(PathBuf);

impl Spoilt {
    fn new(name: &str) -> Spoilt {
        let dir = std::env::temp_dir().join(format!("tandem-broken-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        for file in std::fs::read_dir(checkpoints::named("qwen3")).expect("a folder") {
            let file = file.expect("a file").path();
            if file.is_file() {
                std::fs::copy(&file, dir.join(file.file_name().expect("a name"))).expect("a copy");
            }
        }
        Spoilt(dir)
    }

    fn config(&self, change: impl Fn(&mut Value)) {
        let file = self.0.join("config.json");
        let mut config: Value =
            serde_json::from_str(&std::fs::read_to_string(&file).expect("text")).expect("JSON");
        change(&mut config);
        std::fs::write(file, config.to_string()).expect("it is ours");
    }
}

impl Drop for Spoilt {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Starts a worker on it; returns what it says, having checked that nobody heard of it.
async fn refusal(dir: &Path) -> String {
    let membership: Arc<dyn Membership> = Arc::new(Embedded::new());
    let config = WorkerConfig {
        model: Some(dir.to_owned()),
        port: 0,
        admin_port: 0,
        kv_memory: tandem_chassis::config::ByteSize(1 << 20),
        ..WorkerConfig::defaults()
    };
    let started = tandem_worker::start(config, membership.clone(), Shutdown::new(), Arc::new(|_| {})).await;
    let error = started.err().expect("it cannot be served").to_string();
    assert!(membership.watch().borrow().workers.is_empty(), "nobody hears of it");
    error
}

#[test]
fn a_checkpoint_that_cannot_be_served_is_refused_by_naming_file_and_fact() {
    run(async {
        let check = async |name: &str, spoil: &dyn Fn(&Spoilt), parts: &[&str]| {
            let spoilt = Spoilt::new(name);
            spoil(&spoilt);
            let refusal = refusal(&spoilt.0).await;
            for part in parts {
                assert!(refusal.contains(part), "{name}: {part:?} is not in: {refusal}");
            }
        };
        check(
            "architecture",
            &|s| s.config(|c| c["architectures"] = json!(["MambaForCausalLM"])),
            &["config.json", "MambaForCausalLM", "Qwen3ForCausalLM"],
        )
        .await;
        check(
            "json",
            &|s| std::fs::write(s.0.join("config.json"), "{ nope").expect("ours"),
            &["config.json"],
        )
        .await;
        check(
            "quantised",
            &|s| s.config(|c| c["quantization_config"] = json!({ "quant_method": "gptq" })),
            &["config.json", "quantization_config"],
        )
        .await;
        let more_layers = |s: &Spoilt| {
            s.config(|c| {
                c["num_hidden_layers"] = json!(9);
                c.as_object_mut().expect("an object").remove("layer_types");
            });
        };
        check("layers", &more_layers, &["model.layers.", "model.safetensors"]).await;
        check("shape", &|s| s.config(|c| c["intermediate_size"] = json!(96)), &["model.safetensors", "96"])
            .await;
        let truncate = |s: &Spoilt| {
            let file = s.0.join("model.safetensors");
            let bytes = std::fs::read(&file).expect("bytes");
            std::fs::write(file, &bytes[..bytes.len() / 2]).expect("ours");
        };
        check("truncated", &truncate, &["model.safetensors"]).await;
        check(
            "missing",
            &|s| std::fs::remove_file(s.0.join("model.safetensors")).expect("ours"),
            &["model.safetensors"],
        )
        .await;
        let retype = |s: &Spoilt| {
            let file = s.0.join("model.safetensors");
            let bytes = std::fs::read(&file).expect("bytes");
            let changed = String::from_utf8_lossy(&bytes[8..200]).replacen("\"BF16\"", "\"I16\" ", 1);
            let mut out = bytes[..8].to_vec();
            out.extend(changed.as_bytes());
            out.extend(&bytes[200..]);
            std::fs::write(file, out).expect("ours");
        };
        check("dtype", &retype, &["model.safetensors", "I16"]).await;
    });
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    run(async {
        let refusal = refusal(Path::new("/no/such/checkpoint")).await;
        assert!(refusal.contains("/no/such/checkpoint"), "{refusal}");
    });
}
