//! Mooncake's TCP engine, where its Python package is installed: two Python processes, one of which reads from
//! the other and is told what by this program.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::owner::SOURCE_BYTES;

/// Both parts: an owner that says its name and its buffer's address, and a reader that brings what each line of its
/// input says and answers `done`.
const PROGRAM: &str = include_str!("mooncake.py");

/// The reading end.
pub struct Mooncake {
    owner: Child,
    reader: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Mooncake {
    /// Starts both, or says why not.
    pub fn start(target_bytes: u64) -> Result<Mooncake, String> {
        let (mut owner, said) = start(&["owner", &SOURCE_BYTES.to_string()])?;
        let mut said = BufReader::new(said);
        let line = match line(&mut said) {
            Ok(line) => line,
            Err(error) => {
                end(&mut owner);
                return Err(error);
            }
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        let target = target_bytes.to_string();
        let arguments: Vec<&str> = ["reader", &target].into_iter().chain(words).collect();
        let started = start(&arguments).and_then(|(mut reader, answers)| {
            let mut answers = BufReader::new(answers);
            let ask = reader.stdin.take().expect("it was asked for");
            match self::line(&mut answers) {
                Ok(_) => Ok((reader, ask, answers)),
                Err(error) => {
                    end(&mut reader);
                    Err(error)
                }
            }
        });
        match started {
            Ok((reader, ask, answers)) => Ok(Mooncake { owner, reader, ask, answers }),
            Err(error) => {
                end(&mut owner);
                Err(error)
            }
        }
    }

    /// Brings ranges of equal length from `start` on to these places of its own memory.
    pub fn bring(&mut self, start: u64, len: u64, places: &[u64]) -> Result<(), String> {
        let places: Vec<String> = places.iter().map(u64::to_string).collect();
        writeln!(self.ask, "{start} {len} {}", places.join(" ")).map_err(|error| error.to_string())?;
        match line(&mut self.answers)?.as_str() {
            "done" => Ok(()),
            other => Err(format!("mooncake: {other}")),
        }
    }
}

impl Drop for Mooncake {
    fn drop(&mut self) {
        end(&mut self.reader);
        end(&mut self.owner);
    }
}

fn start(arguments: &[&str]) -> Result<(Child, ChildStdout), String> {
    let mut child = Command::new("python3")
        .args(["-c", PROGRAM])
        .args(arguments)
        .env("GLOG_minloglevel", "2")
        .env("MC_TCP_BIND_ADDRESS", "127.0.0.1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("python3: {error}"))?;
    let said = child.stdout.take().expect("it was asked for");
    Ok((child, said))
}

/// What it says next, among what its library says.
fn line(said: &mut BufReader<ChildStdout>) -> Result<String, String> {
    loop {
        let mut line = String::new();
        match said.read_line(&mut line) {
            Ok(0) => return Err("the Python package `mooncake` cannot be imported, or does not start".into()),
            Ok(_) => {}
            Err(error) => return Err(error.to_string()),
        }
        if let Some(line) = line.strip_prefix("tandem: ") {
            return Ok(line.trim().to_owned());
        }
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
