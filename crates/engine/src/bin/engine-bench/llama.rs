//! llama.cpp on the same weights, in a Python process with its library that is told case by case what to do and waits
//! without a thread running while ours is measured.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use crate::case::Case;
use crate::gguf::Form;
use crate::machine::Took;

/// Loads the model, says `ready` and the library's version, and answers one line for each line of its input.
const PROGRAM: &str = include_str!("llama.py");

/// Longer than any answer takes on a machine that could measure at all.
const PATIENCE: Duration = Duration::from_secs(1800);

/// The process, with a model loaded.
pub(crate) struct Llama {
    child: Child,
    ask: ChildStdin,
    answers: Receiver<String>,
    /// Version, and the instructions that it was built for.
    pub(crate) facts: String,
}

impl Llama {
    /// Starts it with a Python that has the package, or says why not.
    pub(crate) fn start(python: &Path, file: &Path, threads: usize) -> Result<Llama, String> {
        let mut child = Command::new(python)
            .args(["-c", PROGRAM])
            .arg(file)
            .arg(threads.to_string())
            // A thread that waits for another one parks, as ours do: by CPU time its waiting costs it nothing.
            .env("OMP_WAIT_POLICY", "passive")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("{}: {error}", python.display()))?;
        let ask = child.stdin.take().expect("it was asked for");
        let answers = lines(child.stdout.take().expect("it was asked for"));
        let mut llama = Llama { child, ask, answers, facts: String::new() };
        llama.facts = llama.answer()?.strip_prefix("ready ").ok_or("it is not ready")?.to_owned();
        Ok(llama)
    }

    /// One measurement of a case; as much of it as ours.
    pub(crate) fn measure(&mut self, case: &Case) -> Result<Took, String> {
        let steps = case.steps();
        let answer = match case {
            Case::Prefill { tokens } => self.ask(&format!("prefill {tokens} {steps}")),
            Case::Decode { batch, context } => self.ask(&format!("decode {batch} {context} {steps}")),
        };
        answer.and_then(|answer| took(&answer)).map_err(|error| format!("llama.cpp: {case}: {error}"))
    }

    /// Checks that it computes what ours does: the logits after a prompt, as far as weights in that form allow.
    pub(crate) fn check(&mut self, prompt: &[u32], ours: &[f32], form: Form) -> Result<(), String> {
        let prompt: Vec<String> = prompt.iter().map(u32::to_string).collect();
        let theirs = self.ask(&format!("logits {}", prompt.join(" "))).and_then(|answer| logits(&answer));
        let theirs = theirs.map_err(|error| format!("llama.cpp: logits: {error}"))?;
        let (said, same) = compared(ours, &theirs, form);
        eprintln!("llama.cpp's logits after {} tokens: {said}", prompt.len());
        if same { Ok(()) } else { Err(format!("llama.cpp computes another model than ours: {said}")) }
    }

    fn ask(&mut self, question: &str) -> Result<String, String> {
        // Whether it is still there shows in the answer.
        let _ = writeln!(self.ask, "{question}");
        self.answer()
    }

    /// What it says next, among what its library says.
    fn answer(&mut self) -> Result<String, String> {
        loop {
            let line = match self.answers.recv_timeout(PATIENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.child.kill();
                    return Err(format!("no answer in {} s", PATIENCE.as_secs()));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().map_err(|error| error.to_string())?;
                    return Err(format!("the process ended with {status}"));
                }
            };
            if let Some(line) = line.strip_prefix("tandem: ") {
                let line = line.trim();
                return line.strip_prefix("failed ").map_or(Ok(line.to_owned()), |why| Err(why.to_owned()));
            }
        }
    }
}

/// What is said there, line by line, until it ends or nobody listens.
fn lines(from: ChildStdout) -> Receiver<String> {
    let (send, lines) = sync_channel(16);
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines() {
            let Ok(line) = line else { return };
            if send.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

impl Drop for Llama {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn took(answer: &str) -> Result<Took, String> {
    let seconds: Option<Vec<f64>> =
        answer.strip_prefix("took ").and_then(|rest| rest.split(' ').map(|text| text.parse().ok()).collect());
    match seconds.as_deref() {
        Some(&[cpu, wall]) if cpu > 0.0 && wall > 0.0 => Ok(Took { wall, cpu }),
        _ => Err(format!("it says `{answer}`")),
    }
}

fn logits(answer: &str) -> Result<Vec<f32>, String> {
    let logits: Option<Vec<f32>> = answer
        .strip_prefix("logits ")
        .and_then(|rest| rest.split(' ').map(|text| text.parse().ok()).collect());
    logits.ok_or_else(|| format!("it says `{}`", answer.chars().take(80).collect::<String>()))
}

/// How two models' logits differ, and whether they may be the same model.
fn compared(ours: &[f32], theirs: &[f32], form: Form) -> (String, bool) {
    if ours.len() != theirs.len() {
        return (format!("{} of them, not {}", theirs.len(), ours.len()), false);
    }
    let square =
        |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    let apart = square(&mut ours.iter().zip(theirs).map(|(ours, theirs)| ours - theirs));
    let difference = (apart / square(&mut ours.iter().copied())).sqrt();
    let best = |logits: &[f32]| (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    let (ours, theirs) = (best(ours), best(theirs));
    let same_best = if ours == theirs { "the same" } else { "another" };
    let said = format!("{:.1} % off ours, {same_best} best token", 100.0 * difference);
    // Two unrelated models would be off by 140 %. In 8 and 4 bits each side strays from bf16 in its own way.
    let most = match form {
        Form::F32 | Form::Bf16 => 0.03,
        Form::Q8_0 => 0.1,
        Form::Q4_0 => 0.6,
    };
    (said, difference <= most && (ours == theirs || form != Form::Bf16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_or_repeated() {
        let took = |answer: &str| took(answer).map(|took| (took.cpu, took.wall));
        assert_eq!(took("took 1.5 0.75"), Ok((1.5, 0.75)));
        for wrong in ["took 1.5", "took 1 2 3", "took 0 1", "took nan 1", "done"] {
            assert_eq!(took(wrong), Err(format!("it says `{wrong}`")));
        }
        assert_eq!(logits("logits 0.5 -1e-3"), Ok(vec![0.5, -0.001]));
        assert!(logits("logits 0.5 x").is_err());
    }

    #[test]
    fn a_python_without_the_package_is_a_reason_and_no_failure() {
        let start = |python: &str| Llama::start(Path::new(python), Path::new("none.gguf"), 1).err().unwrap();
        assert!(start("/nowhere/python").starts_with("/nowhere/python: "));
        assert_eq!(start("/bin/false"), "the process ended with exit status: 1");
    }

    #[test]
    fn another_model_is_told_from_the_same_one() {
        let ours = [1.0, 2.0, -3.0, 0.5];
        let same = |theirs: &[f32], form| compared(&ours, theirs, form).1;
        assert!(same(&[1.01, 2.02, -3.0, 0.5], Form::Bf16));
        assert!(!same(&[1.01, 2.02, -2.7, 0.5], Form::Bf16));
        assert!(same(&[1.1, 2.0, -2.8, 0.5], Form::Q8_0));
        assert!(!same(&[2.0, 1.0, -3.0, 0.5], Form::Q8_0));
        assert!(!same(&[1.0, 2.0], Form::Q4_0));
        assert!(!same(&[f32::NAN, 2.0, -3.0, 0.5], Form::Q4_0));
    }
}
