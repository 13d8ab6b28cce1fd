//! What the tests of this crate share: checkpoints written into temporary folders.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::spec::DecoderSpec;
use crate::{arch, open};

/// A folder that goes away with the value.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tandem-models-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).expect("the temporary folder can be written");
        Folder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.0.join(name), content).expect("the temporary folder can be written");
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.join(name)).expect("the file was written before")
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.0.join(name)).expect("the file was written before");
    }

    /// The message that opening the folder ends with.
    pub fn refusal(&self) -> String {
        match open(&self.0) {
            Ok(_) => panic!("the checkpoint was opened"),
            Err(error) => error.to_string(),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A tensor to be written.
#[derive(Clone)]
pub(crate) struct Written {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A safetensors file.
pub(crate) fn safetensors(tensors: &[Written]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for Written { name, dtype, shape, bytes } in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend(bytes);
    }
    file(&Value::Object(header).to_string(), &data)
}

/// A file with this header and data.
pub(crate) fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// The facts of a small Qwen3, in the spelling of transformers 5.
pub(crate) fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16", "vocab_size": 11, "hidden_size": 6,
        "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 4, "max_position_embeddings": 128, "tie_word_embeddings": false, "eos_token_id": 7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    })
}

/// The same with some facts replaced; a fact given as the text `absent` is taken out.
pub(crate) fn changed(mut facts: Value, changes: Value) -> Value {
    let (Some(facts_map), Value::Object(changes)) = (facts.as_object_mut(), changes) else {
        panic!("both are objects");
    };
    for (key, value) in changes {
        if value == "absent" {
            facts_map.remove(&key);
        } else {
            facts_map.insert(key, value);
        }
    }
    facts
}

pub(crate) fn config(facts: &Value) -> Config {
    Config::parse(Path::new("config.json"), facts.to_string().as_bytes()).expect("the facts are an object")
}

/// What a config becomes, or the message it is refused with.
pub(crate) fn spec(facts: &Value) -> Result<DecoderSpec, String> {
    let config = config(facts);
    let spec = arch::find(&config).and_then(|row| {
        crate::quantised::Scheme::read(&config)?;
        (row.spec)(&config)
    });
    spec.map_err(|error| error.to_string())
}

/// The bf16 weights that a config asks for, each element different from its neighbours.
pub(crate) fn weights(facts: &Value) -> Vec<Written> {
    let row = arch::find(&config(facts)).expect("the architecture is known");
    let spec = spec(facts).expect("the config is supported");
    let mut number = 0_u16;
    let mut weights: Vec<Written> = Vec::new();
    for weight in spec.weights() {
        let elements: usize = weight.shape.iter().product();
        let mut bytes = Vec::new();
        for _ in 0..elements {
            number = number.wrapping_add(1);
            bytes.extend((0x3f00 + number % 509).to_le_bytes());
        }
        let name = row.names.name(weight.part);
        match weights.last_mut() {
            // A further share of the same tensor.
            Some(Written { name: last, shape, bytes: all, .. }) if *last == name => {
                shape[0] += weight.shape[0];
                all.extend(bytes);
            }
            _ => weights.push(Written { name, dtype: "BF16", shape: weight.shape, bytes }),
        }
    }
    weights
}

/// A whole checkpoint in one file.
pub(crate) fn checkpoint(facts: &Value) -> Folder {
    let folder = Folder::new();
    folder.write("config.json", facts.to_string());
    folder.write("model.safetensors", safetensors(&weights(facts)));
    folder
}
