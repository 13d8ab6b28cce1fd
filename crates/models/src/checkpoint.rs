//! Opens a checkpoint: config, weights and stop tokens together, everything checked before anything is computed.

use std::io;
use std::path::{Path, PathBuf};

use tandem_types::TokenId;

use crate::arch::{self, WeightNames};
use crate::config::Config;
use crate::error::Error;
use crate::quantised::{self, Matrix, Scheme};
use crate::safetensors::File;
use crate::spec::{DecoderSpec, Head, Part, WeightSpec};
use crate::weights::{Dtype, Tensor, Weights};

/// A checkpoint whose weights are mapped and known to fit its spec.
pub struct Checkpoint {
    dir: PathBuf,
    name: String,
    spec: DecoderSpec,
    names: &'static WeightNames,
    dtype: Dtype,
    stop_tokens: Vec<TokenId>,
    scheme: Scheme,
    weights: Weights,
    needed: Vec<WeightSpec>,
}

/// Opens the Hugging Face folder `dir`: reads `config.json` and, if it is there, `generation_config.json`, and
/// maps the weights. The files must not change while the checkpoint lives.
pub fn open(dir: &Path) -> Result<Checkpoint, Error> {
    open_with(dir, "config.json")
}

/// The same with the config under another name.
pub(crate) fn open_with(dir: &Path, config: &str) -> Result<Checkpoint, Error> {
    let unreadable = |source| Error::Unreadable { file: dir.to_owned(), source };
    let whole = std::fs::canonicalize(dir).map_err(unreadable)?;
    if !whole.is_dir() {
        return Err(unreadable(io::Error::from(io::ErrorKind::NotADirectory)));
    }
    let config = Config::read(&dir.join(config))?;
    let generation = match Config::read(&dir.join("generation_config.json")) {
        Ok(generation) => Some(generation),
        Err(Error::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let name = dir.file_name().or(whole.file_name()).unwrap_or("model".as_ref());
    assemble(dir, &name.to_string_lossy(), &config, generation.as_ref(), || Weights::open(dir))
}

/// Opens a checkpoint that lies in memory, as the texts of `config.json` and `model.safetensors`: every check that
/// [`open`] makes, without a file. For tests that feed it arbitrary bytes.
pub fn from_bytes(config: &[u8], weights: Vec<u8>) -> Result<Checkpoint, Error> {
    let config = Config::parse(Path::new("config.json"), config)?;
    assemble(Path::new(""), "memory", &config, None, || {
        Ok(Weights::single(File::given(Path::new("model.safetensors"), weights)?))
    })
}

/// What is stated is understood first, so that a model which is not supported is refused before its weights are
/// looked for.
fn assemble(
    dir: &Path,
    name: &str,
    config: &Config,
    generation: Option<&Config>,
    weights: impl FnOnce() -> Result<Weights, Error>,
) -> Result<Checkpoint, Error> {
    let architecture = arch::find(config)?;
    let scheme = Scheme::read(config)?;
    let mut spec = (architecture.spec)(config)?;
    let stop_tokens = stop_tokens(generation, config, spec.vocab)?;
    let stated = config.dtype()?;

    let weights = weights()?;
    untie(&mut spec, architecture.names, &weights)?;
    let needed = spec.weights();
    for weight in &needed {
        check(&weights, scheme, architecture.names, weight)?;
    }
    let stored = weights.tensor(architecture.names.embedding, &[spec.vocab, spec.hidden], (0, 1))?.dtype;
    Ok(Checkpoint {
        dir: dir.to_owned(),
        name: name.to_owned(),
        spec,
        names: architecture.names,
        dtype: stated.unwrap_or(stored),
        stop_tokens,
        scheme,
        weights,
        needed,
    })
}

/// Looks for a weight and checks it.
fn check(weights: &Weights, scheme: Scheme, names: &WeightNames, weight: &WeightSpec) -> Result<(), Error> {
    match weight.shape.len() {
        2 => find_matrix(weights, scheme, names, weight).map(drop),
        _ => find(weights, names, weight).map(drop),
    }
}

/// A matrix where the architecture's names say it is, whatever form it has there.
fn find_matrix<'a>(
    weights: &'a Weights,
    scheme: Scheme,
    names: &WeightNames,
    weight: &'a WeightSpec,
) -> Result<Matrix<'a>, Error> {
    // No format has embedding tables.
    let scheme = if weight.part == Part::Embedding { Scheme::None } else { scheme };
    let place = names.place(weight.part);
    let name = names.name(weight.part);
    quantised::matrix(weights, scheme, &name, &weight.shape, (place.share, place.shares))
}

/// A weight where the architecture's names say it is.
fn find<'a>(weights: &'a Weights, names: &WeightNames, weight: &'a WeightSpec) -> Result<Tensor<'a>, Error> {
    let place = names.place(weight.part);
    weights.tensor(&names.name(weight.part), &weight.shape, (place.share, place.shares))
}

/// A config may say "tied" where the checkpoint holds a head of its own. As in `transformers`, a head that differs
/// from the embedding is used, and one that equals it is not.
fn untie(spec: &mut DecoderSpec, names: &WeightNames, weights: &Weights) -> Result<(), Error> {
    if spec.head == Head::Tied && weights.contains(names.head) {
        let shape = [spec.vocab, spec.hidden];
        let (embedding, head) =
            (weights.tensor(names.embedding, &shape, (0, 1))?, weights.tensor(names.head, &shape, (0, 1))?);
        if (embedding.dtype, embedding.bytes) != (head.dtype, head.bytes) {
            spec.head = Head::Separate;
        }
    }
    Ok(())
}

/// The tokens that end an answer: those of `generation_config.json`, or else of the config. Ids beyond the
/// vocabulary can never be drawn and are left out.
fn stop_tokens(generation: Option<&Config>, config: &Config, vocab: usize) -> Result<Vec<TokenId>, Error> {
    for source in generation.into_iter().chain([config]) {
        let Some(mut ids) = source.token_ids("eos_token_id")? else { continue };
        ids.retain(|id| (*id as usize) < vocab);
        ids.sort_unstable();
        ids.dedup();
        return Ok(ids);
    }
    Ok(Vec::new())
}

impl Checkpoint {
    /// Where it was opened.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's name: that of the folder.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the decoder computes.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Tokens a sequence may have at most.
    pub fn context_tokens(&self) -> u32 {
        self.spec.context_tokens
    }

    /// The element type the config states, or else that of the embedding. Single weights may have another.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The tokens that end an answer, rising; may be empty.
    pub fn stop_tokens(&self) -> &[TokenId] {
        &self.stop_tokens
    }

    /// What a weight is called in the files.
    pub fn weight_name(&self, part: Part) -> String {
        self.names.name(part)
    }

    /// The quantised format its config names, if any: `gptq`.
    pub fn quantised(&self) -> Option<&'static str> {
        self.scheme.name()
    }

    /// A weight that the spec asks for. `Part::Head` of a tied head is not one: ask for the embedding.
    ///
    /// # Panics
    /// If the spec does not ask for it, or it is quantised.
    pub fn weight(&self, part: Part) -> Tensor<'_> {
        self.checked(self.needed(part))
    }

    /// A matrix that the spec asks for, quantised or not.
    ///
    /// # Panics
    /// If the spec does not ask for it, or it is a vector.
    pub fn matrix(&self, part: Part) -> Matrix<'_> {
        let matrix = find_matrix(&self.weights, self.scheme, self.names, self.needed(part));
        matrix.expect("open has checked every weight of the spec")
    }

    fn needed(&self, part: Part) -> &WeightSpec {
        let needed = self.needed.iter().find(|weight| weight.part == part);
        needed.unwrap_or_else(|| panic!("{part:?} is not a weight of this model"))
    }

    /// Every weight that is not quantised, in the canonical order of [`DecoderSpec::weights`].
    pub fn weights(&self) -> impl Iterator<Item = (Part, Tensor<'_>)> {
        let plain = |weight: &&WeightSpec| find(&self.weights, self.names, weight).is_ok();
        self.needed.iter().filter(plain).map(|weight| (weight.part, self.checked(weight)))
    }

    /// Bytes of all weights as they lie in the files, without the scales of quantised ones.
    pub fn total_bytes(&self) -> u64 {
        let bytes = self.needed.iter().map(|weight| match weight.shape.len() {
            2 => self.matrix(weight.part).bytes(),
            _ => self.checked(weight).bytes.len(),
        });
        bytes.map(|bytes| bytes as u64).sum()
    }

    /// Digest of the weights' content, the same for every way of cutting them into files. Reads them all; where
    /// they are read anyway, feed a [`WeightDigest`] on the way.
    pub fn digest(&self) -> blake3::Hash {
        let mut digest = WeightDigest::default();
        for weight in &self.needed {
            let name = self.weight_name(weight.part);
            match find(&self.weights, self.names, weight) {
                Ok(tensor) => digest.add(&name, &tensor),
                Err(_) => {
                    digest.0.update(format!("{name} {:?}\n", self.scheme).as_bytes());
                    for piece in quantised::pieces(&self.weights, &name) {
                        digest.piece(&piece.name, piece.dtype(), piece.shape(), piece.bytes);
                    }
                }
            }
        }
        digest.finish()
    }

    fn checked<'a>(&'a self, weight: &'a WeightSpec) -> Tensor<'a> {
        let tensor = find(&self.weights, self.names, weight);
        tensor.expect("open has checked every weight of the spec")
    }
}

/// Collects the digest of a checkpoint's weights: add each one in the order of [`Checkpoint::weights`].
#[derive(Default)]
pub struct WeightDigest(blake3::Hasher);

impl WeightDigest {
    /// Takes in one weight: its name in the checkpoint, element type, shape (which gives the length) and bytes.
    pub fn add(&mut self, name: &str, tensor: &Tensor<'_>) {
        self.piece(name, tensor.dtype.as_str(), tensor.shape, tensor.bytes);
    }

    fn piece(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: &[u8]) {
        self.0.update(format!("{name} {dtype} {shape:?}\n").as_bytes());
        self.0.update(bytes);
    }

    /// The digest of everything added.
    pub fn finish(&self) -> blake3::Hash {
        self.0.finalize()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::spec::LayerPart;
    use crate::testing::{Folder, Written, changed, checkpoint, qwen3, safetensors, weights};

    #[test]
    fn a_good_checkpoint_opens_and_gives_every_weight() {
        let folder = checkpoint(&qwen3());
        let opened = open(folder.path()).unwrap();
        assert_eq!(opened.name(), folder.path().file_name().unwrap().to_str().unwrap());
        assert_eq!(
            (opened.context_tokens(), opened.dtype(), opened.stop_tokens()),
            (128, Dtype::Bf16, &[7][..])
        );
        let written = weights(&qwen3());
        assert_eq!(opened.total_bytes(), written.iter().map(|weight| weight.bytes.len() as u64).sum::<u64>());
        for (part, tensor) in opened.weights() {
            let wanted = written.iter().find(|weight| weight.name == opened.weight_name(part)).unwrap();
            assert_eq!((tensor.bytes, tensor.shape), (&wanted.bytes[..], &wanted.shape[..]), "{part:?}");
        }
        assert_eq!(opened.weight(Part::Layer(1, LayerPart::Down)).shape, [6, 10]);
    }

    #[test]
    #[should_panic(expected = "Head is not a weight of this model")]
    fn a_tied_head_is_not_a_weight() {
        let folder = checkpoint(&changed(qwen3(), json!({"tie_word_embeddings": true})));
        open(folder.path()).unwrap().weight(Part::Head);
    }

    #[test]
    fn a_tied_config_with_another_head_in_the_file_uses_that_head() {
        let separate = weights(&qwen3());
        let folder = Folder::new();
        folder.write("config.json", changed(qwen3(), json!({"tie_word_embeddings": true})).to_string());
        folder.write("model.safetensors", safetensors(&separate));
        assert_eq!(open(folder.path()).unwrap().spec().head, Head::Separate);

        let mut equal = separate.clone();
        equal.last_mut().unwrap().bytes = separate[0].bytes.clone();
        folder.write("model.safetensors", safetensors(&equal));
        assert_eq!(open(folder.path()).unwrap().spec().head, Head::Tied);
    }

    /// Writes the weights as shards of the given numbers of tensors.
    fn shards(folder: &Folder, weights: &[Written], cuts: &[usize]) {
        let (mut map, mut rest) = (serde_json::Map::new(), weights);
        for (number, tensors) in cuts.iter().chain([&usize::MAX]).enumerate() {
            let (shard, after) = rest.split_at((*tensors).min(rest.len()));
            let name = format!("model-{number}.safetensors");
            map.extend(shard.iter().map(|weight| (weight.name.clone(), Value::from(name.as_str()))));
            folder.write(&name, safetensors(shard));
            rest = after;
        }
        folder.write("model.safetensors.index.json", json!({"metadata": {}, "weight_map": map}).to_string());
    }

    #[test]
    fn the_digest_depends_on_content_and_not_on_files_or_their_order() {
        let whole = checkpoint(&qwen3());
        let digest = open(whole.path()).unwrap().digest();
        let sharded = Folder::new();
        sharded.write("config.json", qwen3().to_string());
        let mut reversed = weights(&qwen3());
        reversed.reverse();
        shards(&sharded, &reversed, &[3, 9]);
        let opened = open(sharded.path()).unwrap();
        assert_eq!(opened.digest(), digest);
        assert_eq!(
            opened.weight(Part::FinalNorm).bytes,
            open(whole.path()).unwrap().weight(Part::FinalNorm).bytes
        );

        let mut other = weights(&qwen3());
        other[5].bytes[0] ^= 1;
        whole.write("other.safetensors", safetensors(&other));
        fs::rename(whole.path().join("other.safetensors"), whole.path().join("model.safetensors")).unwrap();
        assert_ne!(open(whole.path()).unwrap().digest(), digest);
    }

    #[track_caller]
    fn refused(folder: &Folder, file: &str, fact: &str) {
        let path = if file.is_empty() { folder.path().to_owned() } else { folder.path().join(file) };
        let refusal = folder.refusal();
        let begins = refusal.starts_with(&format!("{}: ", path.display()));
        assert!(begins && refusal.contains(fact), "{refusal:?} does not name {file:?} and {fact:?}");
    }

    #[test]
    fn every_fault_of_the_weights_is_named_with_its_file() {
        let good = weights(&qwen3());
        let with = |change: &dyn Fn(&mut Vec<Written>)| {
            let folder = checkpoint(&qwen3());
            let mut weights = good.clone();
            change(&mut weights);
            folder.write("model.safetensors", safetensors(&weights));
            folder
        };
        const FILE: &str = "model.safetensors";
        let missing = "tensor model.layers.0.self_attn.q_proj.weight is missing; the config asks for it with shape [16, 6]";
        refused(&with(&|weights| drop(weights.remove(2))), FILE, missing);
        let turned = |weights: &mut Vec<Written>| weights[2].shape.reverse();
        refused(&with(&turned), FILE, "q_proj.weight has shape [6, 16]; the config asks for [16, 6]");
        let integers = |weights: &mut Vec<Written>| weights[2].dtype = "I16";
        refused(&with(&integers), FILE, "q_proj.weight has dtype I16; supported are BF16, F16 and F32");
        // What the spec does not ask for may be of any kind.
        let surplus = |weights: &mut Vec<Written>| {
            let (name, shape) = ("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), vec![1]);
            weights.push(Written { name, dtype: "I64", shape, bytes: vec![0; 8] });
        };
        assert!(open(with(&surplus).path()).is_ok());

        let folder = checkpoint(&qwen3());
        let file = folder.read(FILE);
        folder.write(FILE, &file[..file.len() - 1]);
        refused(&folder, FILE, "the file is truncated or its header damaged");
        folder.write(FILE, "");
        refused(&folder, FILE, "is truncated: 0 bytes");
        folder.remove(FILE);
        refused(&folder, "", "has neither model.safetensors nor model.safetensors.index.json");
    }

    #[test]
    fn every_fault_of_the_index_is_named_with_its_file() {
        const INDEX: &str = "model.safetensors.index.json";
        let folder = Folder::new();
        folder.write("config.json", qwen3().to_string());
        shards(&folder, &weights(&qwen3()), &[4]);
        assert!(open(folder.path()).is_ok());

        let index = folder.read(INDEX);
        let listed: Value = serde_json::from_slice(&index).unwrap();
        let with = |name: &str, shard: &str| {
            let mut listed = listed.clone();
            listed["weight_map"][name] = shard.into();
            folder.write(INDEX, listed.to_string());
        };
        with("lm_head.weight", "model-0.safetensors");
        refused(
            &folder,
            "model-0.safetensors",
            "has no tensor lm_head.weight, which the index says is in it",
        );
        with("lm_head.weight", "model-7.safetensors");
        refused(&folder, "model-7.safetensors", "No such file");
        with("lm_head.weight", "../model-0.safetensors");
        refused(
            &folder,
            INDEX,
            "says tensor lm_head.weight is in \"../model-0.safetensors\", which is no file name",
        );
        let mut listed = listed.clone();
        listed["weight_map"].as_object_mut().unwrap().remove("model.norm.weight");
        folder.write(INDEX, listed.to_string());
        refused(&folder, INDEX, "tensor model.norm.weight is missing");
        folder.write(INDEX, "{}");
        refused(&folder, INDEX, "has no weight_map");
        folder.write(INDEX, &index[..index.len() / 2]);
        refused(&folder, INDEX, "is not valid JSON");

        folder.write(INDEX, index);
        let shard = folder.read("model-1.safetensors");
        folder.write("model-1.safetensors", &shard[..shard.len() / 2]);
        refused(&folder, "model-1.safetensors", "truncated");
        folder.remove("model-0.safetensors");
        refused(&folder, "model-0.safetensors", "No such file");
    }

    #[test]
    fn every_fault_around_the_weights_is_named_with_its_file() {
        let folder = checkpoint(&qwen3());
        let config = folder.read("config.json");
        folder.write("config.json", &config[..20]);
        refused(&folder, "config.json", "is not valid JSON");
        folder.remove("config.json");
        refused(&folder, "config.json", "No such file");
        folder.write("config.json", &config);
        folder.write("generation_config.json", "{\"eos_token_id\": ");
        refused(&folder, "generation_config.json", "is not valid JSON");
        folder.write("generation_config.json", "{\"eos_token_id\": \"stop\"}");
        refused(&folder, "generation_config.json", "eos_token_id is \"stop\"");

        let nowhere = folder.path().join("nowhere");
        let error = open(&nowhere).err().unwrap().to_string();
        assert!(
            error.starts_with(&nowhere.display().to_string()) && error.contains("No such file"),
            "{error}"
        );
        let error = open(&folder.path().join("config.json")).err().unwrap().to_string();
        assert!(error.contains("not a directory"), "{error}");
    }

    #[test]
    fn stop_tokens_come_from_the_generation_config_or_else_from_the_config() {
        let folder = checkpoint(&qwen3());
        let stops = |generation: Value| {
            folder.write("generation_config.json", generation.to_string());
            open(folder.path()).unwrap().stop_tokens().to_vec()
        };
        assert_eq!(stops(json!({"eos_token_id": [9, 2, 9]})), [2, 9]);
        assert_eq!(stops(json!({"eos_token_id": 3})), [3]);
        assert_eq!(stops(json!({"eos_token_id": null})), [7]);
        assert_eq!(stops(json!({})), [7]);
        // The vocabulary has 11.
        assert_eq!(stops(json!({"eos_token_id": [10, 11]})), [10]);
        assert!(
            open(checkpoint(&changed(qwen3(), json!({"eos_token_id": null}))).path())
                .unwrap()
                .stop_tokens()
                .is_empty()
        );
    }

    #[test]
    fn the_element_type_is_that_of_the_config_or_else_of_the_embedding() {
        let stated = checkpoint(&changed(qwen3(), json!({"dtype": "absent", "torch_dtype": "float32"})));
        assert_eq!(open(stated.path()).unwrap().dtype(), Dtype::F32);
        let open_ended = checkpoint(&changed(qwen3(), json!({"dtype": "absent"})));
        assert_eq!(open(open_ended.path()).unwrap().dtype(), Dtype::Bf16);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_file_cut_short_or_overwritten_makes_opening_panic(
            which in 0..2_usize, place in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<bool>()
        ) {
            let folder = checkpoint(&qwen3());
            let name = ["config.json", "model.safetensors"][which];
            let mut content = folder.read(name);
            let place = place.index(content.len());
            if cut { content.truncate(place) } else { content[place] = value }
            folder.remove(name);
            folder.write(name, content);
            match open(folder.path()) {
                Ok(opened) => {
                    prop_assert!(!cut, "a truncated {} was taken for whole", name);
                    prop_assert!(opened.weights().all(|(_, tensor)| !tensor.to_f32().is_empty()));
                }
                // A configuration that asks for something else blames the weights, by its own name.
                Err(error) => {
                    let said = error.to_string();
                    prop_assert!(said.contains(name) || said.contains("the config asks for"), "{}", said);
                }
            }
        }
    }

    #[test]
    fn what_is_no_ordinary_file_or_too_long_to_be_one_is_not_read() {
        for name in ["config.json", "model.safetensors"] {
            let folder = checkpoint(&qwen3());
            folder.remove(name);
            fs::create_dir(folder.path().join(name)).unwrap();
            refused(&folder, name, "is not an ordinary file");
        }
        let folder = checkpoint(&qwen3());
        let file = fs::OpenOptions::new().write(true).open(folder.path().join("config.json")).unwrap();
        file.set_len(1 << 32).unwrap();
        refused(&folder, "config.json", "has 4294967296 bytes; at most 268435456 are read");
    }

    fn committed() -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/checkpoints");
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut folders: Vec<_> = entries.filter(|path| path.join("config.json").is_file()).collect();
        folders.sort();
        folders
    }

    #[test]
    fn every_committed_checkpoint_opens_alike_with_both_spellings_of_its_config() {
        let folders = committed();
        assert!(folders.len() >= 12, "only {folders:?}");
        for folder in folders {
            let opened = open_with(&folder, "config.json").unwrap();
            let legacy = open_with(&folder, "config.legacy.json").unwrap();
            assert_eq!(opened.spec(), legacy.spec(), "{folder:?}");
            assert_eq!(opened.dtype(), legacy.dtype(), "{folder:?}");
            assert_eq!(opened.stop_tokens(), [367], "{folder:?}");
            assert_eq!((opened.spec().vocab, opened.context_tokens()), (384, 2048), "{folder:?}");
        }
    }

    #[test]
    fn the_committed_checkpoints_cover_rope_kinds_heads_and_architectures() {
        let mut seen = std::collections::BTreeSet::new();
        for folder in committed() {
            let opened = open(&folder).unwrap();
            let rope = format!("{:?}", opened.spec().rope.kind);
            let rope = rope.split(' ').next().unwrap_or_default().to_owned();
            seen.extend([rope, format!("{:?}", opened.spec().head), opened.spec().architecture.to_owned()]);
            seen.insert(opened.dtype().as_str().to_owned());
        }
        let wanted = ["Default", "Linear", "Llama3", "Yarn", "Tied", "Separate", "bf16", "f16", "f32"];
        let classes = crate::ARCHITECTURES.iter().map(|row| row.name);
        for name in wanted.into_iter().chain(classes) {
            assert!(seen.contains(name), "no committed checkpoint with {name}");
        }
    }

    #[test]
    fn copies_in_other_types_and_files_hold_the_same_weights() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/checkpoints");
        let original = open(&root.join("llama-s19")).unwrap();
        let sharded = open(&root.join("llama-s19-sharded")).unwrap();
        assert_eq!(sharded.digest(), original.digest());
        assert_eq!(sharded.total_bytes(), original.total_bytes());
        for (copy, bound) in [("llama-s19-f32", 0.0), ("llama-s19-f16", 2_f32.powi(-25))] {
            let copy = open(&root.join(copy)).unwrap();
            for ((part, ours), (_, theirs)) in copy.weights().zip(original.weights()) {
                assert_eq!(ours.dtype, copy.dtype());
                let close = ours.to_f32().iter().zip(theirs.to_f32()).all(|(a, b)| (a - b).abs() <= bound);
                assert!(close, "{part:?}");
            }
        }
    }
}
