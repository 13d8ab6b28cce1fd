//! `cargo xtask bench NAME`: builds a bench in release and runs it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{tools, workspace};

struct Bench {
    name: &'static str,
    what: &'static str,
    parts: &'static [Part],
}

/// A program of its own; `--part NAME` runs it alone.
struct Part {
    name: &'static str,
    /// What cargo builds for it.
    build: &'static [&'static str],
    program: &'static str,
    peer: Option<Peer>,
}

/// Something to be compared with, when it is asked for.
struct Peer {
    /// What asks for it. The program is given its path as well, or `--OPTION-missing` and why there is none.
    option: &'static str,
    /// Makes it ready among the build outputs.
    prepare: fn(&Path) -> Result<PathBuf, String>,
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "transfer",
        what: "every transport against a copy of memory and a raw socket, then how much of a hand-off's\n           \
               transfer is waited for (--part transports|exposed, --quick, --rounds N, --json FILE)",
        parts: &[
            Part {
                name: "transports",
                build: &["--package=tandem-kv-transfer", "--bin=transfer-bench", "--features=bench"],
                program: "transfer-bench",
                peer: None,
            },
            Part {
                name: "exposed",
                build: &[
                    "--package=tandem-integration-tests",
                    "--bin=exposed-transfer",
                    "--package=tandem",
                    "--bin=tandem",
                ],
                program: "exposed-transfer",
                peer: None,
            },
        ],
    },
    Bench {
        name: "engine",
        what: "tokens per second of the engine on a random checkpoint of Qwen3-0.6B's shape, and what share of\n           \
               the machine's limits that is (--threads N, --rounds N, --only TEXT, --quantization FORM, --plot FILE, --quick);\n           \
               with --llama beside llama.cpp on the same weights, which is built first (minutes, once);\n           \
               with --load how long loading takes, with --neighbours what busy neighbours leave of the speed, with\n           \
               --quality DIR what quantised weights cost that checkpoint in quality",
        parts: &[Part {
            name: "speed",
            build: &["--package=tandem-engine", "--bin=engine-bench", "--features=tandem-engine/bench"],
            program: "engine-bench",
            peer: Some(Peer { option: "--llama", prepare: tools::llama }),
        }],
    },
    Bench {
        name: "roles",
        what: "goodput of a live cluster under a load that turns, with and without placement by cost and the\n           \
               role planner (--slo TARGETS, --quick, --rounds N, --json FILE)",
        parts: &[Part {
            name: "goodput",
            build: &[
                "--package=tandem-integration-tests",
                "--bin=roles-goodput",
                "--package=tandem",
                "--bin=tandem",
            ],
            program: "roles-goodput",
            peer: None,
        }],
    },
    Bench {
        name: "gateway",
        what: "what our router costs and holds in memory, beside nginx, no gateway at all and any peer that already\n           \
               runs (--peer NAME=URL, --only TEXT, --quick, --rounds N, --seconds N, --json FILE)",
        parts: &[Part {
            name: "cost",
            build: &[
                "--package=tandem-integration-tests",
                "--bin=gateway-cost",
                "--package=tandem",
                "--bin=tandem",
            ],
            program: "gateway-cost",
            peer: None,
        }],
    },
    Bench {
        name: "overload",
        what: "ten times the load that a cluster can serve, a stream of a million tokens, and ten thousand short\n           \
               ones (--slo TARGETS, --rounds N, --seconds N, --quick, --only load|short|long, --json FILE)",
        parts: &[Part {
            name: "overload",
            build: &[
                "--package=tandem-integration-tests",
                "--bin=overload",
                "--package=tandem",
                "--bin=tandem",
            ],
            program: "overload",
            peer: None,
        }],
    },
];

/// The benches with what they measure, one a line.
pub fn benches() -> String {
    BENCHES.iter().map(|bench| format!("  {:<8} {}\n", bench.name, bench.what)).collect()
}

/// Builds the parts that are asked for, then runs them one after the other with the other arguments.
pub fn bench(arguments: &[String]) -> Result<(), String> {
    let (parts, rest) = chosen(arguments)?;
    let target = workspace::read()?.target;
    for part in &parts {
        let status = workspace::cargo()
            .env("PROTOC", workspace::protoc(&target)?)
            .args(["build", "--release"])
            .args(part.build)
            .status()
            .map_err(|error| format!("cannot run cargo: {error}"))?;
        if !status.success() {
            return Err(format!("{} does not build", part.program));
        }
    }
    for part in parts {
        let program = target.join("release").join(part.program);
        let status = Command::new(&program)
            .args(with_peer(part, &rest, &target))
            .status()
            .map_err(|error| format!("cannot start {}: {error}", program.display()))?;
        if !status.success() {
            return Err(format!("{} ended with {status}", part.program));
        }
    }
    Ok(())
}

/// A part's arguments, with the peer that they ask for. A peer that cannot be had is no failure.
fn with_peer(part: &Part, arguments: &[String], target: &Path) -> Vec<String> {
    let words = arguments.iter().flat_map(|word| match &part.peer {
        Some(peer) if word == peer.option => match (peer.prepare)(target) {
            Ok(path) => vec![word.clone(), path.to_string_lossy().into_owned()],
            Err(why) => vec![format!("{word}-missing"), why],
        },
        _ => vec![word.clone()],
    });
    words.collect()
}

/// The parts to run, and what they are given.
fn chosen(arguments: &[String]) -> Result<(Vec<&'static Part>, Vec<String>), String> {
    let names: Vec<&str> = BENCHES.iter().map(|bench| bench.name).collect();
    let wrong = |said: &str| format!("{said}: it is one of {}", names.join(", "));
    let (name, rest) = arguments.split_first().ok_or_else(|| wrong("which bench?"))?;
    let bench = BENCHES.iter().find(|bench| bench.name == name);
    let bench = bench.ok_or_else(|| wrong(&format!("there is no bench `{name}`")))?;
    let mut rest = rest.to_vec();
    let Some(at) = rest.iter().position(|word| word == "--part") else {
        if rest.iter().any(|word| word == "--json") && bench.parts.len() > 1 {
            return Err("--json needs --part: every part writes a file of its own".to_owned());
        }
        return Ok((bench.parts.iter().collect(), rest));
    };
    let part = rest.get(at + 1).and_then(|name| bench.parts.iter().find(|part| part.name == name));
    let part = part.ok_or_else(|| {
        let names: Vec<&str> = bench.parts.iter().map(|part| part.name).collect();
        format!("--part takes one of {}", names.join(", "))
    })?;
    rest.drain(at..=at + 1);
    Ok((vec![part], rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen_by(line: &str) -> Result<(Vec<&'static str>, Vec<String>), String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        chosen(&words).map(|(parts, rest)| (parts.iter().map(|part| part.name).collect(), rest))
    }

    #[test]
    fn a_wrong_bench_names_the_right_ones() {
        assert_eq!(
            chosen_by("").unwrap_err(),
            "which bench?: it is one of transfer, engine, roles, gateway, overload"
        );
        assert!(chosen_by("speed").unwrap_err().contains("no bench `speed`: it is one of transfer"));
        assert!(chosen_by("transfer --part x").unwrap_err().contains("transports, exposed"));
        assert!(chosen_by("transfer --json out").unwrap_err().contains("--part"));
    }

    #[test]
    fn a_peer_is_given_with_its_path_or_with_why_it_is_missing() {
        let with = |prepare, line: &str| {
            let peer = Some(Peer { option: "--llama", prepare });
            let part = Part { name: "speed", build: &[], program: "engine-bench", peer };
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            with_peer(&part, &words, Path::new("/t")).join("|")
        };
        assert_eq!(with(|target| Ok(target.join("python")), "--llama --quick"), "--llama|/t/python|--quick");
        assert_eq!(with(|_| Err("no compiler".to_owned()), "--llama"), "--llama-missing|no compiler");
        assert_eq!(with(|_| Err("not asked".to_owned()), "--quick"), "--quick");
    }

    #[test]
    fn all_parts_run_unless_one_is_named() {
        assert_eq!(
            chosen_by("transfer --quick").unwrap(),
            (vec!["transports", "exposed"], vec!["--quick".to_owned()])
        );
        assert_eq!(
            chosen_by("transfer --rounds 3 --part exposed --quick").unwrap(),
            (vec!["exposed"], vec!["--rounds".to_owned(), "3".to_owned(), "--quick".to_owned()])
        );
    }
}
