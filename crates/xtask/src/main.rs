//! The workspace's own commands: start a cluster, run the tests, check the rules of the layout.
//!
//! Never knows: anything of the cluster's code; it is compiled before everything else and stays small.
//! Always holds: a failure ends with a status other than zero and a sentence.

use std::env;
use std::process::ExitCode;

mod bench;
mod chaos;
mod fuzz;
mod protoc;
mod test;
mod tidy;
mod tools;
mod up;
mod workspace;

const COMMANDS: &[&str] = &["up", "test", "chaos", "fuzz", "bench", "tidy", "protoc-path", "help"];

fn main() -> ExitCode {
    let arguments: Vec<String> =
        env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    if protoc::is_protoc_call(&arguments) {
        return protoc::run(&arguments);
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("{sentence}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<(), String> {
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", arguments),
    };
    let wants_help = command != "up" && rest.iter().any(|word| word == "--help" || word == "-h");
    match command {
        "help" | "--help" | "-h" => print!("{}", help()),
        _ if wants_help && COMMANDS.contains(&command) => print!("{}", help()),
        "up" => up::up(rest)?,
        "test" => test::test(&test::options(rest)?)?,
        "chaos" => chaos::chaos(rest)?,
        "fuzz" => fuzz::fuzz(rest)?,
        "bench" => bench::bench(rest)?,
        "tidy" => without_arguments(command, rest).and_then(|()| tidy::tidy())?,
        "protoc-path" => {
            without_arguments(command, rest)?;
            println!("{}", workspace::protoc(&workspace::read()?.target)?.display());
        }
        wrong => return Err(format!("there is no command `{wrong}`: it is one of {}", COMMANDS.join(", "))),
    }
    Ok(())
}

fn without_arguments(command: &str, rest: &[String]) -> Result<(), String> {
    match rest.first() {
        None => Ok(()),
        Some(word) => Err(format!("`{command}` takes no arguments, not `{word}`")),
    }
}

fn help() -> String {
    format!(
        "\
cargo xtask up [-- ARGS]                  build in release and start a cluster on this machine;
                                          ARGS are those of `tandem up` (`cargo xtask up -- --help`)
cargo xtask test [FILTER] [--lane NAME] [--times N]
                                          install what the tests need, run them all, or those whose
                                          name contains FILTER, or one lane of them; N times in a row
cargo xtask chaos --level failpoints|processes [--runs N] [--seed S]
                                          run clusters under seeded faults and print what came of them;
                                          a case that fails names the command that repeats it
cargo xtask chaos --level soak [--requests N] [--seed S]
                                          very many requests, a third of which leave at a random moment
cargo xtask fuzz [TARGET...] [--seconds N]
                                          try bytes by the million, N seconds (60) per target
cargo xtask bench NAME [OPTIONS]          build a bench in release and run it
cargo xtask tidy                          check the rules of the layout, licences and sources
cargo xtask protoc-path                   print a path under which this program is a protoc

Lanes of `cargo xtask test`:
{}
Targets of `cargo xtask fuzz`:
{}
Benches of `cargo xtask bench`:
{}
On Debian as root missing tools are installed; elsewhere their lane is skipped and says so, which
with CI=true is a failure.
",
        test::lanes(),
        fuzz::targets(),
        bench::benches()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_command_names_the_right_ones() {
        let run = |words: &[&str]| run(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        assert_eq!(
            run(&["tests"]).unwrap_err(),
            "there is no command `tests`: it is one of up, test, chaos, fuzz, bench, tidy, protoc-path, help"
        );
        assert!(run(&["tidy", "now"]).unwrap_err().contains("no arguments"));
        assert!(run(&["test", "--lane", "x"]).unwrap_err().contains("rust, etcd"));
        assert_eq!(run(&["test", "--help"]), Ok(()));
    }

    #[test]
    fn help_names_every_command() {
        assert!(
            COMMANDS.iter().filter(|command| **command != "help").all(|command| help().contains(command))
        );
    }
}
