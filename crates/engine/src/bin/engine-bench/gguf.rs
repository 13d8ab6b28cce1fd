//! The checkpoint as a GGUF file (version 3), which llama.cpp reads: keys, a list of tensors, then their data.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, Value};
use tandem_engine::Quantization;

/// Every tensor's data begins at a multiple of this; the format's own default.
const ALIGNMENT: u64 = 32;
/// Weights of a block that share a scale.
const BLOCK: usize = 32;
/// Weights read and written at a time.
const SLICE: usize = 1 << 20;

/// How weights are stored; norms are always in float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    F32,
    Bf16,
    /// 8 bits, and a scale in float16 for each block.
    Q8_0,
    /// 4 bits, and a scale in float16 for each block.
    Q4_0,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Form::F32 => "F32",
            Form::Bf16 => "BF16",
            Form::Q8_0 => "Q8_0",
            Form::Q4_0 => "Q4_0",
        })
    }
}

impl Form {
    /// What is compared with weights of ours.
    pub(crate) fn beside(quantization: Quantization) -> Form {
        match quantization {
            Quantization::Auto => Form::Bf16,
            Quantization::W8a8 => Form::Q8_0,
            Quantization::Int4 => Form::Q4_0,
        }
    }

    /// The format's number for it.
    fn number(self) -> u32 {
        match self {
            Form::F32 => 0,
            Form::Q4_0 => 2,
            Form::Q8_0 => 8,
            Form::Bf16 => 30,
        }
    }

    fn bytes(self, weights: usize) -> usize {
        match self {
            Form::F32 => 4 * weights,
            Form::Bf16 => 2 * weights,
            Form::Q8_0 => weights / BLOCK * (2 + BLOCK),
            Form::Q4_0 => weights / BLOCK * (2 + BLOCK / 2),
        }
    }

    /// Appends weights, whole blocks of them.
    fn encode(self, weights: &[f32], out: &mut Vec<u8>) {
        match self {
            Form::F32 => out.extend(weights.iter().flat_map(|weight| weight.to_le_bytes())),
            Form::Bf16 => out.extend(weights.iter().flat_map(|weight| bf16::from_f32(*weight).to_le_bytes())),
            Form::Q8_0 => weights.chunks_exact(BLOCK).for_each(|block| eight_bits(block, out)),
            Form::Q4_0 => weights.chunks_exact(BLOCK).for_each(|block| four_bits(block, out)),
        }
    }
}

/// The weight farthest from zero becomes 127 or -127.
fn eight_bits(block: &[f32], out: &mut Vec<u8>) {
    let scale = block.iter().fold(0.0f32, |most, weight| most.max(weight.abs())) / 127.0;
    out.extend(f16::from_f32(scale).to_le_bytes());
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out.extend(block.iter().map(|weight| (weight * inverse).round() as i8 as u8));
}

/// The weight farthest from zero becomes -8, whatever its sign; 8 is added to each, and the block's second half lies in
/// the upper bits.
fn four_bits(block: &[f32], out: &mut Vec<u8>) {
    let farthest =
        block.iter().fold(0.0f32, |most, weight| if weight.abs() > most.abs() { *weight } else { most });
    let scale = farthest / -8.0;
    out.extend(f16::from_f32(scale).to_le_bytes());
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let level = |weight: f32| (weight * inverse + 8.5).clamp(0.0, 15.0) as u8;
    let (low, high) = block.split_at(BLOCK / 2);
    out.extend(low.iter().zip(high).map(|(low, high)| level(*low) | level(*high) << 4));
}

/// The file for a checkpoint, beside its folder; made when it is first asked for.
pub(crate) fn beside(dir: &Path, form: Form) -> io::Result<PathBuf> {
    let named = |end: &str| {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        dir.with_file_name(format!("{name}-{form}.gguf{end}"))
    };
    let path = named("");
    if path.is_file() {
        return Ok(path);
    }
    // Renamed when it is whole: somebody else may be writing the same.
    let fresh = named(&format!(".{}", std::process::id()));
    eprintln!("writing {} (once)", path.display());
    let config: Value = serde_json::from_slice(&fs::read(dir.join("config.json"))?)?;
    let weights = BufReader::new(File::open(dir.join("model.safetensors"))?);
    let written = File::create(&fresh).and_then(|file| write(&config, weights, form, BufWriter::new(file)));
    match written.and_then(|()| fs::rename(&fresh, &path)) {
        Ok(()) => Ok(path),
        Err(error) => {
            let _ = fs::remove_file(&fresh);
            Err(error)
        }
    }
}

/// Writes a checkpoint of Qwen3, whose weights are one safetensors file in bf16.
fn write(config: &Value, mut weights: impl Read + Seek, form: Form, mut out: impl Write) -> io::Result<()> {
    let (tensors, data) = tensors(&mut weights, form)?;
    let mut head = head(config, &tensors)?;
    head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);
    out.write_all(&head)?;
    let (mut read, mut numbers, mut written) = (Vec::new(), Vec::new(), Vec::new());
    for tensor in &tensors {
        weights.seek(SeekFrom::Start(data + tensor.begin))?;
        let mut left = tensor.weights();
        while left > 0 {
            let count = left.min(SLICE);
            read.resize(2 * count, 0);
            weights.read_exact(&mut read)?;
            numbers.clear();
            numbers.extend(read.chunks_exact(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f32()));
            written.clear();
            tensor.form.encode(&numbers, &mut written);
            out.write_all(&written)?;
            left -= count;
        }
        let bytes = tensor.form.bytes(tensor.weights()) as u64;
        out.write_all(&vec![0; (bytes.next_multiple_of(ALIGNMENT) - bytes) as usize])?;
    }
    out.flush()
}

struct Tensor {
    /// As llama.cpp calls it.
    name: String,
    /// Rows first, as in the checkpoint.
    shape: Vec<u64>,
    form: Form,
    /// Where the checkpoint's data of it begin.
    begin: u64,
}

impl Tensor {
    fn weights(&self) -> usize {
        self.shape.iter().product::<u64>() as usize
    }
}

/// The checkpoint's tensors in their order, and where the file's data begin.
fn tensors(weights: &mut impl Read, form: Form) -> io::Result<(Vec<Tensor>, u64)> {
    let mut length = [0; 8];
    weights.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    let mut header = vec![0; length as usize];
    weights.read_exact(&mut header)?;
    let header: Map<String, Value> = serde_json::from_slice(&header)?;
    let mut tensors = Vec::new();
    for (name, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let wrong = || io::Error::other(format!("{name}: not a tensor of Qwen3 in bf16: {entry}"));
        let shape = entry["shape"].as_array().and_then(|shape| shape.iter().map(Value::as_u64).collect());
        let shape: Vec<u64> = shape.ok_or_else(wrong)?;
        let form = if shape.len() == 1 { Form::F32 } else { form };
        let begin = entry["data_offsets"][0].as_u64().ok_or_else(wrong)?;
        let whole_blocks = shape.last().is_some_and(|columns| columns.is_multiple_of(BLOCK as u64));
        if entry["dtype"] != "BF16" || !whole_blocks {
            return Err(wrong());
        }
        tensors.push(Tensor { name: renamed(name).ok_or_else(wrong)?, shape, form, begin });
    }
    tensors.sort_by_key(|tensor| tensor.begin);
    Ok((tensors, 8 + length))
}

/// What llama.cpp calls a tensor of Qwen3.
fn renamed(name: &str) -> Option<String> {
    let name = name.strip_suffix(".weight")?;
    let renamed = match name {
        "model.embed_tokens" => "token_embd".to_owned(),
        "model.norm" => "output_norm".to_owned(),
        "lm_head" => "output".to_owned(),
        _ => {
            let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let part = match part {
                "input_layernorm" => "attn_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "self_attn.q_norm" => "attn_q_norm",
                "self_attn.k_norm" => "attn_k_norm",
                "post_attention_layernorm" => "ffn_norm",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                _ => return None,
            };
            format!("blk.{layer}.{part}")
        }
    };
    Some(format!("{renamed}.weight"))
}

/// Everything before the data.
fn head(config: &Value, tensors: &[Tensor]) -> io::Result<Vec<u8>> {
    let wrong = |key: &str| io::Error::other(format!("config.json has no number `{key}`"));
    let mut keys = Keys { count: 0, bytes: Vec::new() };
    keys.text("general.architecture", "qwen3");
    // There is no vocabulary: tokens go in and come out as numbers.
    keys.text("tokenizer.ggml.model", "none");
    for (key, of) in [
        ("vocab_size", "vocab_size"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
    ] {
        keys.whole(&format!("qwen3.{key}"), config[of].as_u64().ok_or_else(|| wrong(of))? as u32);
    }
    for (key, of) in [("attention.layer_norm_rms_epsilon", "rms_norm_eps"), ("rope.freq_base", "rope_theta")]
    {
        keys.number(&format!("qwen3.{key}"), config[of].as_f64().ok_or_else(|| wrong(of))? as f32);
    }
    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend(keys.count.to_le_bytes());
    head.extend(keys.bytes);
    let mut offset = 0u64;
    for tensor in tensors {
        text(&tensor.name, &mut head);
        head.extend((tensor.shape.len() as u32).to_le_bytes());
        // The format counts from the dimension that lies together.
        head.extend(tensor.shape.iter().rev().flat_map(|count| count.to_le_bytes()));
        head.extend(tensor.form.number().to_le_bytes());
        head.extend(offset.to_le_bytes());
        offset += (tensor.form.bytes(tensor.weights()) as u64).next_multiple_of(ALIGNMENT);
    }
    Ok(head)
}

struct Keys {
    count: u64,
    bytes: Vec<u8>,
}

impl Keys {
    fn add(&mut self, key: &str, kind: u32) {
        self.count += 1;
        text(key, &mut self.bytes);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn whole(&mut self, key: &str, value: u32) {
        self.add(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }

    fn number(&mut self, key: &str, value: f32) {
        self.add(key, 6);
        self.bytes.extend(value.to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.add(key, 8);
        text(value, &mut self.bytes);
    }
}

fn text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use serde_json::json;

    use super::*;

    /// Reads what the format's description says stands there.
    struct Reader<'a>(&'a [u8]);

    impl Reader<'_> {
        fn bytes<const N: usize>(&mut self) -> [u8; N] {
            let (bytes, rest) = self.0.split_first_chunk().unwrap();
            self.0 = rest;
            *bytes
        }

        fn u32(&mut self) -> u32 {
            u32::from_le_bytes(self.bytes())
        }

        fn u64(&mut self) -> u64 {
            u64::from_le_bytes(self.bytes())
        }

        fn text(&mut self) -> String {
            let length = self.u64() as usize;
            let (text, rest) = self.0.split_at(length);
            self.0 = rest;
            String::from_utf8(text.to_vec()).unwrap()
        }

        fn key(&mut self) -> String {
            let key = self.text();
            match self.u32() {
                4 => format!("{key}={}", self.u32()),
                6 => format!("{key}={}", f32::from_bits(self.u32())),
                8 => format!("{key}={}", self.text()),
                other => panic!("{key} is of kind {other}"),
            }
        }
    }

    /// Weights that are bf16 already.
    fn weights(count: usize) -> Vec<f32> {
        (0..count).map(|at| bf16::from_f32(((at * 37 % 101) as f32 - 50.0) / 64.0).to_f32()).collect()
    }

    fn checkpoint(tensors: &[(&str, &[usize])]) -> Vec<u8> {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, shape) in tensors {
            let begin = data.len();
            Form::Bf16.encode(&weights(shape.iter().product()), &mut data);
            let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert((*name).to_owned(), entry);
        }
        let header = Value::Object(header).to_string();
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
    }

    fn config() -> Value {
        json!({
            "vocab_size": 3, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "rms_norm_eps": 0.25, "rope_theta": 1e6,
        })
    }

    #[test]
    fn a_file_holds_keys_tensors_and_aligned_data() {
        let tensors: &[(&str, &[usize])] = &[
            ("model.embed_tokens.weight", &[3, 32]),
            ("model.layers.0.self_attn.q_norm.weight", &[32]),
            ("model.layers.0.mlp.down_proj.weight", &[2, 96]),
        ];
        let mut file = Vec::new();
        write(&config(), Cursor::new(checkpoint(tensors)), Form::Q8_0, &mut file).unwrap();
        let mut reader = Reader(&file);
        assert_eq!((reader.bytes(), reader.u32(), reader.u64()), (*b"GGUF", 3, 3));
        let keys: Vec<String> = (0..reader.u64()).map(|_| reader.key()).collect();
        for key in ["general.architecture=qwen3", "qwen3.block_count=1", "qwen3.rope.freq_base=1000000"] {
            assert!(keys.iter().any(|found| found == key), "{key}: {keys:?}");
        }
        let mut places = Vec::new();
        for (name, shape, form) in [
            ("token_embd.weight", vec![32, 3], 8),
            ("blk.0.attn_q_norm.weight", vec![32], 0),
            ("blk.0.ffn_down.weight", vec![96, 2], 8),
        ] {
            assert_eq!(reader.text(), name);
            let dimensions: Vec<u64> = (0..reader.u32()).map(|_| reader.u64()).collect();
            assert_eq!((dimensions, reader.u32()), (shape, form));
            places.push(reader.u64() as usize);
        }
        // 3 blocks of 34 bytes, 32 numbers, 6 blocks, each filled up to a multiple of 32.
        assert_eq!(places, [0, 128, 256]);
        let data = (file.len() - reader.0.len()).next_multiple_of(32);
        assert_eq!(file.len(), data + 256 + 224);
        let mut norm = Vec::new();
        Form::F32.encode(&weights(32), &mut norm);
        assert_eq!(file[data + 128..data + 256], norm);
        let mut down = Vec::new();
        Form::Q8_0.encode(&weights(192), &mut down);
        assert_eq!(file[data + 256..data + 256 + 204], down);
    }

    #[test]
    fn what_is_no_qwen3_is_refused_by_name() {
        let refused = |name: &str, shape: &[usize], config: &Value| {
            let file = Cursor::new(checkpoint(&[(name, shape)]));
            write(config, file, Form::Bf16, Vec::new()).unwrap_err().to_string()
        };
        assert!(refused("model.layers.0.mlp.gate.weight", &[32], &config()).contains("mlp.gate"));
        assert!(refused("model.norm.weight", &[31], &config()).contains("model.norm"));
        assert!(refused("model.norm.weight", &[32], &json!({})).contains("`vocab_size`"));
    }

    #[test]
    fn blocks_give_back_their_weights_within_a_level() {
        let weights = weights(64);
        let (mut eight, mut four) = (Vec::new(), Vec::new());
        Form::Q8_0.encode(&weights, &mut eight);
        Form::Q4_0.encode(&weights, &mut four);
        assert_eq!((eight.len(), four.len()), (Form::Q8_0.bytes(64), Form::Q4_0.bytes(64)));
        let scale = |block: &[u8]| f16::from_le_bytes([block[0], block[1]]).to_f32();
        for (at, weight) in weights.iter().enumerate() {
            let block = &eight[at / 32 * 34..][..34];
            let given = scale(block) * f32::from(block[2 + at % 32] as i8);
            // Half a level, and 127 times what a scale in float16 is off.
            assert!((given - weight).abs() <= 0.57 * scale(block).abs(), "{at}: {given} for {weight}");
            let block = &four[at / 32 * 18..][..18];
            let pair = block[2 + at % 16];
            let level = if at % 32 < 16 { pair & 15 } else { pair >> 4 };
            let given = scale(block) * (f32::from(level) - 8.0);
            // There are 8 levels towards the farthest weight, and 7 away from it.
            assert!((given - weight).abs() <= 1.01 * scale(block).abs(), "{at}: {given} for {weight}");
        }
        let farthest = |sign: f32| {
            let mut block = vec![0.0; 32];
            (block[0], block[17]) = (sign, -sign / 2.0);
            let mut out = Vec::new();
            four_bits(&block, &mut out);
            (scale(&out), out[2], out[3])
        };
        assert_eq!(farthest(2.0), (-0.25, 0x80, 0xc8));
        assert_eq!(farthest(-2.0), (0.25, 0x80, 0xc8));
    }

    #[test]
    fn a_block_of_zeros_stays_one() {
        let (mut eight, mut four) = (Vec::new(), Vec::new());
        eight_bits(&[0.0; 32], &mut eight);
        four_bits(&[0.0; 32], &mut four);
        assert_eq!(eight, [0; 34]);
        assert_eq!(four[2..], [0x88; 16]);
    }
}
