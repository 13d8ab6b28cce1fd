//! Checkpoints with reference outputs, and a driver that feeds an engine plans by hand.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tandem_batching::{Input, Outcome, Plan, Row, SlotOpen};
use tandem_engine::{DecoderEngine, Dtype, Engine, Options, StepError};
use tandem_types::{Choice, Sampled, SamplingParams, Time, TokenId, blocks_for};

/// The committed checkpoints, and those in the folder that `TANDEM_REFERENCE_MODELS` names: folders of models of
/// the architectures that this version has.
pub fn checkpoints() -> Vec<PathBuf> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/checkpoints");
    let further = std::env::var_os("TANDEM_REFERENCE_MODELS").map(PathBuf::from);
    let mut found = Vec::new();
    for parent in std::iter::once(committed).chain(further) {
        for entry in
            std::fs::read_dir(&parent).unwrap_or_else(|error| panic!("{}: {error}", parent.display()))
        {
            let dir = entry.expect("a readable folder").path();
            if dir.join("reference/cases.json").is_file() && supported(&dir) {
                found.push(dir);
            }
        }
    }
    found.sort();
    assert!(found.len() >= 3, "checkpoints are committed");
    found
}

fn supported(dir: &Path) -> bool {
    let config: Value = read_json(&dir.join("config.json"));
    let name = config["architectures"][0].as_str().unwrap_or_default();
    tandem_models::ARCHITECTURES.iter().any(|architecture| architecture.name == name)
}

/// One committed checkpoint.
pub fn checkpoint(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/checkpoints").join(name)
}

fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What the reference says of one prompt.
pub struct Case {
    pub name: String,
    pub prompt: Vec<TokenId>,
    pub greedy: Vec<TokenId>,
    pub margins: Vec<f32>,
    pub bf16_error: f64,
    /// Logits of the last positions of the prompt.
    pub logits: Vec<Vec<f32>>,
}

/// What the reference says of a model.
pub struct Reference {
    pub suppressed: Vec<TokenId>,
    pub cases: Vec<Case>,
}

impl Reference {
    pub fn read(dir: &Path) -> Reference {
        let json = read_json(&dir.join("reference/cases.json"));
        let file = std::fs::read(dir.join("reference/tensors.safetensors")).unwrap();
        let (length, rest) = file.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let header: Value = serde_json::from_slice(header).unwrap();
        let ids = |value: &Value| -> Vec<TokenId> {
            value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
        };
        let cases = json["cases"].as_array().unwrap().iter().map(|case| {
            let name = case["case"].as_str().unwrap().to_owned();
            let tensor = &header[format!("{name}/logits")];
            let offset = |at: usize| tensor["data_offsets"][at].as_u64().unwrap() as usize;
            let width = tensor["shape"][1].as_u64().unwrap() as usize;
            let values: Vec<f32> = data[offset(0)..offset(1)]
                .as_chunks()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect();
            Case {
                prompt: ids(&case["input_ids"]),
                greedy: ids(&case["greedy_ids"]),
                margins: case["greedy_margins"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|m| m.as_f64().unwrap() as f32)
                    .collect(),
                bf16_error: case["torch_bf16_rms_error"].as_f64().unwrap(),
                logits: values.chunks(width).map(<[f32]>::to_vec).collect(),
                name,
            }
        });
        Reference { suppressed: ids(&json["suppressed_ids"]), cases: cases.collect() }
    }

    /// Greedy, never drawing what the reference never draws.
    pub fn sampling(&self) -> SamplingParams {
        SamplingParams {
            logit_bias: self.suppressed.iter().map(|token| (*token, f32::NEG_INFINITY)).collect(),
            ..SamplingParams::default()
        }
    }
}

/// What is asked of the driver.
#[derive(Clone)]
pub struct Request {
    pub prompt: Vec<TokenId>,
    /// Tokens drawn before (a resumed request).
    pub emitted: Vec<TokenId>,
    pub new_tokens: usize,
    pub sampling: SamplingParams,
    pub choice: Choice,
    pub min_tokens: u32,
    pub stop_suppress: Vec<TokenId>,
}

impl Request {
    pub fn greedy(prompt: &[TokenId], new_tokens: usize) -> Request {
        Request {
            prompt: prompt.to_vec(),
            emitted: Vec::new(),
            new_tokens,
            sampling: SamplingParams::default(),
            choice: Choice(0),
            min_tokens: 0,
            stop_suppress: Vec::new(),
        }
    }

    pub fn with(self, sampling: SamplingParams) -> Request {
        Request { sampling, ..self }
    }
}

/// An engine, and pages given out in an order that is not theirs.
pub struct Driver {
    pub engine: DecoderEngine,
    free: Vec<u32>,
    plans: u64,
}

pub fn options(dtype: Dtype, threads: usize) -> Options {
    Options { dtype, threads, kv_bytes: 8 << 20, ..Options::default() }
}

/// The CPU with each instruction set that this machine has.
pub fn instruction_sets() -> Vec<tandem_kernels::Isa> {
    tandem_kernels::Isa::ALL.into_iter().filter(|isa| isa.available()).collect()
}

impl Driver {
    /// On one instruction set.
    pub fn of_set(isa: tandem_kernels::Isa, dir: &Path, options: Options) -> Driver {
        let device = Arc::new(tandem_kernels::Cpu::with(isa, options.threads).unwrap());
        Driver::of(DecoderEngine::load_on(device, dir, options).unwrap_or_else(|error| panic!("{error}")))
    }

    pub fn new(dir: &Path, dtype: Dtype, threads: usize) -> Driver {
        Driver::of(
            DecoderEngine::load(dir, options(dtype, threads)).unwrap_or_else(|error| panic!("{error}")),
        )
    }

    pub fn on(device: Arc<dyn tandem_device::Device>, dir: &Path, dtype: Dtype) -> Driver {
        Driver::of(DecoderEngine::load_on(device, dir, options(dtype, 1)).unwrap())
    }

    pub fn with(dir: &Path, options: Options) -> Driver {
        Driver::of(DecoderEngine::load(dir, options).unwrap_or_else(|error| panic!("{error}")))
    }

    fn of(engine: DecoderEngine) -> Driver {
        let pages = engine.facts().pages;
        // Even pages backwards, then odd ones: neighbours in a sequence are never neighbours in memory.
        let free =
            (0..pages).filter(|page| page % 2 == 1).chain((0..pages).filter(|page| page % 2 == 0).rev());
        Driver { engine, free: free.collect(), plans: 0 }
    }

    pub fn pages(&mut self, tokens: u32) -> Vec<u32> {
        (0..blocks_for(tokens)).map(|_| self.free.pop().expect("the test's pool is large enough")).collect()
    }

    pub fn give_back(&mut self, pages: impl IntoIterator<Item = u32>) {
        self.free.extend(pages);
    }

    pub fn plan(&mut self, open: Vec<SlotOpen>, close: Vec<u32>, rows: Vec<Row>) -> Plan {
        self.plans += 1;
        Plan { id: self.plans, open, close, rows, same_shape_steps: 1 }
    }

    pub fn step(&mut self, plan: Plan) -> Result<Outcome, StepError> {
        self.engine.submit(plan, Time::ZERO);
        self.engine.collect(Time::ZERO).expect("the CPU is done when submit returns")
    }

    /// Runs requests together, each step taking up to `chunk` tokens of each.
    pub fn generate(&mut self, requests: &[Request], chunk: usize) -> Vec<Vec<Sampled>> {
        let mut running: Vec<Running> = requests
            .iter()
            .enumerate()
            .map(|(slot, request)| {
                let known: Vec<TokenId> = request.prompt.iter().chain(&request.emitted).copied().collect();
                let room = known.len() + request.new_tokens;
                Running {
                    slot: slot as u32,
                    pages: self.pages(room as u32),
                    known,
                    computed: 0,
                    output: Vec::new(),
                }
            })
            .collect();
        let mut open: Vec<SlotOpen> =
            running.iter().zip(requests).map(|(running, request)| running.open(request)).collect();
        loop {
            let rows: Vec<Row> = running
                .iter()
                .zip(requests)
                .filter(|(running, request)| running.output.len() < request.new_tokens)
                .map(|(running, _)| running.row(chunk))
                .collect();
            if rows.is_empty() {
                break;
            }
            let plan = self.plan(std::mem::take(&mut open), Vec::new(), rows);
            let outcome = self.step(plan).unwrap_or_else(|error| panic!("{error}"));
            for row in outcome.rows {
                let running = &mut running[row.slot as usize];
                running.computed += row.count as usize;
                if running.computed == running.known.len() {
                    let sampled = row.sampled.expect("finite logits");
                    running.known.push(sampled.token);
                    running.output.push(sampled);
                }
            }
        }
        let close = running.iter().map(|running| running.slot).collect();
        let plan = self.plan(Vec::new(), close, Vec::new());
        self.step(plan).unwrap();
        for running in &running {
            self.free.extend(&running.pages);
        }
        running.into_iter().map(|running| running.output).collect()
    }

    /// Logits of every position of a prompt, computed in chunks.
    pub fn logits(&mut self, prompt: &[TokenId], chunk: usize) -> Vec<Vec<f32>> {
        let pages = self.pages(prompt.len() as u32);
        let mut all = Vec::new();
        let mut open = vec![open_slot(0, prompt)];
        for (at, tokens) in prompt.chunks(chunk).enumerate() {
            let row = row(0, at * chunk, Input::Known(tokens.to_vec()), tokens.len(), &pages, false);
            let plan = self.plan(std::mem::take(&mut open), Vec::new(), vec![row]);
            all.extend(self.engine.logits(&plan).unwrap());
        }
        let plan = self.plan(Vec::new(), vec![0], Vec::new());
        self.step(plan).unwrap();
        self.free.extend(pages);
        all
    }
}

pub fn open_slot(slot: u32, tokens: &[TokenId]) -> SlotOpen {
    SlotOpen {
        slot,
        tokens: tokens.to_vec(),
        prompt_tokens: tokens.len() as u32,
        sampling: SamplingParams::default(),
        choice: Choice(0),
        stop_suppress: Vec::new(),
        min_tokens: 0,
    }
}

pub fn row(slot: u32, start: usize, input: Input, count: usize, pages: &[u32], sample: bool) -> Row {
    let blocks = blocks_for((start + count) as u32) as usize;
    let pages = vec![pages[..blocks.min(pages.len())].to_vec()];
    Row { slot, start: start as u32, count: count as u32, input, pages, sample, score: None }
}

struct Running {
    slot: u32,
    pages: Vec<u32>,
    known: Vec<TokenId>,
    computed: usize,
    output: Vec<Sampled>,
}

impl Running {
    fn open(&self, request: &Request) -> SlotOpen {
        SlotOpen {
            prompt_tokens: request.prompt.len() as u32,
            sampling: request.sampling.clone(),
            choice: request.choice,
            min_tokens: request.min_tokens,
            stop_suppress: request.stop_suppress.clone(),
            ..open_slot(self.slot, &self.known)
        }
    }

    fn row(&self, chunk: usize) -> Row {
        let count = chunk.min(self.known.len() - self.computed);
        let end = self.computed + count;
        // Every other drawn token is taken from the device.
        let input = match self.output.len() {
            drawn if drawn % 2 == 1 => Input::Previous,
            _ => Input::Known(self.known[self.computed..end].to_vec()),
        };
        row(self.slot, self.computed, input, count, &self.pages, end == self.known.len())
    }
}

pub fn tokens(sampled: &[Sampled]) -> Vec<TokenId> {
    sampled.iter().map(|sampled| sampled.token).collect()
}
