//! Checkpoints of a real model's shape with random weights: what speed is measured on.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// Elements written at a time.
const SLICE: usize = 1 << 20;

/// Qwen3-0.6B's shape in bf16, 1.2 GB; tokenizer and template are those of the demo model. Made once per
/// folder.
///
/// # Errors
/// What the file system says.
pub fn qwen3_0_6b(parent: &Path) -> io::Result<PathBuf> {
    let dir = parent.join("random-qwen3-0.6b");
    if dir.join("complete").is_file() {
        return Ok(dir);
    }
    fs::create_dir_all(&dir)?;
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 40_960, "tie_word_embeddings": true,
        "hidden_act": "silu", "attention_bias": false, "eos_token_id": 1023,
    });
    fs::write(dir.join("config.json"), config.to_string())?;
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo-model");
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        fs::copy(demo.join(file), dir.join(file))?;
    }
    write_weights(&dir.join("model.safetensors"), &tensors())?;
    fs::write(dir.join("complete"), "")?;
    Ok(dir)
}

/// Name, shape, and the mean and spread of the elements.
fn tensors() -> Vec<(String, Vec<usize>, f32, f32)> {
    let (hidden, inner, heads, kv_heads, head) = (1024, 3072, 16, 8, 128);
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![151_936, hidden], 0.0, 0.02)];
    for layer in 0..28 {
        let mut add = |name: &str, shape: &[usize], mean: f32| {
            let spread = if mean == 0.0 { 0.02 } else { 0.0 };
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec(), mean, spread));
        };
        add("input_layernorm", &[hidden], 1.0);
        add("self_attn.q_proj", &[heads * head, hidden], 0.0);
        add("self_attn.k_proj", &[kv_heads * head, hidden], 0.0);
        add("self_attn.v_proj", &[kv_heads * head, hidden], 0.0);
        add("self_attn.o_proj", &[hidden, heads * head], 0.0);
        add("self_attn.q_norm", &[head], 1.0);
        add("self_attn.k_norm", &[head], 1.0);
        add("post_attention_layernorm", &[hidden], 1.0);
        add("mlp.gate_proj", &[inner, hidden], 0.0);
        add("mlp.up_proj", &[inner, hidden], 0.0);
        add("mlp.down_proj", &[hidden, inner], 0.0);
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden], 1.0, 0.0));
    tensors
}

fn write_weights(path: &Path, tensors: &[(String, Vec<usize>, f32, f32)]) -> io::Result<()> {
    let mut header = Map::new();
    let mut offset = 0;
    for (name, shape, ..) in tensors {
        let end = offset + 2 * shape.iter().product::<usize>();
        header
            .insert(name.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [offset, end] }));
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut slice = Vec::with_capacity(2 * SLICE);
    for (_, shape, mean, spread) in tensors {
        let mut left: usize = shape.iter().product();
        while left > 0 {
            let count = left.min(SLICE);
            slice.clear();
            for _ in 0..count {
                // Xorshift (Marsaglia 2003); uniform is good enough for weights that mean nothing.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let unit = (random >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                let value = mean + spread * unit;
                slice.extend(((value.to_bits() >> 16) as u16).to_le_bytes());
            }
            file.write_all(&slice)?;
            left -= count;
        }
    }
    file.flush()
}
