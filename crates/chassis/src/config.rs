//! Configuration: one typed value per program, from flags and a YAML file that says the same with snake_case
//! keys. Flags override the file, and whatever is misspelt is refused with the name of the right option.
//!
//! The file is turned into flags placed before the real ones, so both have the same values, defaults and
//! checks. This is the only module that reads YAML.

use std::error::Error as _;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::exit;
use std::{fs, io};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, Parser, value_parser};
use serde::Serialize;
use serde_yaml::Value;

mod nearest;
mod values;

pub use nearest::nearest;
pub use values::{ByteSize, HumanDuration, ParseError, Slo};

const CONFIG: &str = "config";
const PRINT: &str = "print_config";
const CHECK: &str = "check_config";

/// Reads the configuration of this process from `arguments` (program name first) and the file they name.
///
/// Every field of `C` is a flag with a long name, and serialises under the snake_case form of that name to a
/// scalar, a list of scalars or nothing; `#[command(flatten)]` goes with `#[serde(flatten)]`.
/// `--config FILE`, `--print-config` and `--check-config` are added here. Ends the process with status 0
/// after `--help`, `--version`, `--print-config` and `--check-config`, and with status 2 and a sentence on
/// standard error when something is wrong.
pub fn load<C: Parser + Serialize>(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> C {
    load_checked(arguments, |_| Ok(()))
}

/// Like [`load`], with a check of what no single option can know, such as two that exclude each other. The
/// check says in a sentence what is wrong.
pub fn load_checked<C: Parser + Serialize>(
    arguments: impl IntoIterator<Item = impl Into<OsString>>,
    check: impl Fn(&C) -> Result<(), String>,
) -> C {
    let arguments = arguments.into_iter().map(Into::into).collect();
    match parse(arguments, |path| fs::read_to_string(path), check) {
        Ok(Parsed::Run(config)) => return config,
        Ok(Parsed::Print(text)) => print!("{text}"),
        Ok(Parsed::Valid) => println!("the configuration is valid"),
        Err(Error::Clap(error)) => error.exit(),
        Err(error) => {
            eprintln!("error: {error}");
            exit(2);
        }
    }
    exit(0)
}

/// What the arguments ask for.
#[derive(Debug)]
pub enum Parsed<C> {
    /// Run with this configuration.
    Run(C),
    /// `--print-config`: the effective configuration as YAML.
    Print(String),
    /// `--check-config`: nothing is wrong.
    Valid,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option or argument that does not exist.
    #[error("unknown option `{given}`: did you mean `{right}`? (`--help` lists them all)")]
    UnknownOption {
        /// As given.
        given: String,
        /// The nearest that exists.
        right: String,
    },
    /// The file cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// The file is not a mapping in YAML.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the line where known.
        reason: String,
    },
    /// A key that does not exist.
    #[error("{}: unknown key `{given}`: did you mean `{right}`?", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// As given.
        given: String,
        /// The nearest that exists.
        right: String,
    },
    /// A value in the file that its option does not take.
    #[error("{}: {reason}", path.display())]
    WrongValue {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Options that do not go together.
    #[error("{0}")]
    Check(String),
    /// Everything else that is wrong on the command line; also the texts of `--help` and `--version`.
    #[error("{}", .0.to_string().trim_start_matches("error: ").trim_end())]
    Clap(clap::Error),
}

/// [`load`] without ending the process: `read` reads the file, `check` judges the result.
pub fn parse<C: Parser + Serialize>(
    arguments: Vec<OsString>,
    read: impl Fn(&Path) -> io::Result<String>,
    check: impl Fn(&C) -> Result<(), String>,
) -> Result<Parsed<C>, Error> {
    let command = command::<C>();
    // What is required may stand in the file, so the first pass takes the flags as they are.
    let optional = command.clone().mut_args(|argument| argument.required(false));
    let flags = optional.try_get_matches_from(&arguments).map_err(|error| flag_error(&command, error))?;
    let path = flags.get_one::<PathBuf>(CONFIG);
    let matches = match path {
        None => {
            command.clone().try_get_matches_from(&arguments).map_err(|error| flag_error(&command, error))?
        }
        Some(path) => {
            let from_file = file_arguments(&command, &flags, path, &read)?;
            let given =
                arguments.iter().take(1).cloned().chain(from_file).chain(arguments.iter().skip(1).cloned());
            command.clone().try_get_matches_from(given).map_err(|error| file_error(path, error))?
        }
    };
    let config = C::from_arg_matches(&matches).map_err(Error::Clap)?;
    check(&config).map_err(Error::Check)?;
    if matches.get_flag(PRINT) {
        let text = serde_yaml::to_string(&config).map_err(|error| Error::Check(error.to_string()))?;
        Ok(Parsed::Print(text))
    } else if matches.get_flag(CHECK) {
        Ok(Parsed::Valid)
    } else {
        Ok(Parsed::Run(config))
    }
}

/// The command of `C` with the flags that every program has.
fn command<C: CommandFactory>() -> Command {
    let mut command = C::command().args_override_self(true);
    let name = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    command = command.bin_name(name);
    if command.get_version().is_none() {
        command = command.version(env!("CARGO_PKG_VERSION"));
    }
    command
        .next_help_heading("Configuration")
        .arg(
            Arg::new(CONFIG)
                .long("config")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("Read options from this YAML file; flags override it"),
        )
        .arg(
            Arg::new(PRINT)
                .long("print-config")
                .action(ArgAction::SetTrue)
                .help("Print the effective configuration as YAML and exit"),
        )
        .arg(
            Arg::new(CHECK)
                .long("check-config")
                .action(ArgAction::SetTrue)
                .help("Say whether the configuration is valid and exit"),
        )
}

/// The key of a flag in the file: its long name in snake_case. The flags about configuration have none.
fn key(argument: &Arg) -> Option<String> {
    let id = argument.get_id().as_str();
    let own = [CONFIG, PRINT, CHECK].contains(&id);
    let ends = matches!(
        argument.get_action(),
        ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
    );
    if own || ends { None } else { argument.get_long().map(|long| long.replace('-', "_")) }
}

/// The flags that say what the file says, except those that the command line gives itself.
fn file_arguments(
    command: &Command,
    flags: &ArgMatches,
    path: &Path,
    read: &impl Fn(&Path) -> io::Result<String>,
) -> Result<Vec<OsString>, Error> {
    let malformed = |reason: String| Error::Malformed { path: path.to_owned(), reason };
    let text = read(path).map_err(|cause| Error::Unreadable { path: path.to_owned(), cause })?;
    let entries = match serde_yaml::from_str(&text).map_err(|error| malformed(error.to_string()))? {
        Value::Mapping(entries) => entries,
        Value::Null => return Ok(Vec::new()),
        _ => return Err(malformed("expected lines of the form `key: value`".to_owned())),
    };
    let mut arguments = Vec::new();
    for (name, value) in entries {
        let name = scalar(&name).ok_or_else(|| malformed("keys are names of options".to_owned()))?;
        let argument = command.get_arguments().find(|argument| key(argument).as_ref() == Some(&name));
        let Some(argument) = argument else {
            let keys: Vec<String> = command.get_arguments().filter_map(key).collect();
            let right = nearest(&name, keys.iter().map(String::as_str)).unwrap_or_default().to_owned();
            return Err(Error::UnknownKey { path: path.to_owned(), given: name, right });
        };
        if flags.value_source(argument.get_id().as_str()) != Some(ValueSource::CommandLine) {
            let flag = format!("--{}", argument.get_long().unwrap_or(&name));
            let given = flag_values(argument, &flag, &value).map_err(|reason| Error::WrongValue {
                path: path.to_owned(),
                reason: format!("`{name}` {reason}"),
            })?;
            arguments.extend(given.into_iter().map(OsString::from));
        }
    }
    Ok(arguments)
}

/// The flags for one entry of the file.
fn flag_values(argument: &Arg, flag: &str, value: &Value) -> Result<Vec<String>, &'static str> {
    let takes_value = argument.get_action().takes_values();
    let value_optional = argument.get_num_args().is_some_and(|range| range.min_values() == 0);
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Bool(given) if !takes_value || value_optional => {
            Ok(if *given { vec![flag.to_owned()] } else { Vec::new() })
        }
        _ if !takes_value => Err("is either true or false"),
        Value::Sequence(values) if matches!(argument.get_action(), ArgAction::Append) => {
            let values = values.iter().map(|value| scalar(value).map(|value| format!("{flag}={value}")));
            values.collect::<Option<Vec<String>>>().ok_or("takes a list of plain values")
        }
        value => Ok(vec![format!("{flag}={}", scalar(value).ok_or("takes one plain value")?)]),
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

fn flag_error(command: &Command, error: clap::Error) -> Error {
    let given = match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(ContextValue::String(given))) if given.starts_with('-') => {
            given.clone()
        }
        _ => return Error::Clap(error),
    };
    let flags = command.get_arguments().filter_map(|argument| argument.get_long()).chain(["help", "version"]);
    let name = given.trim_start_matches('-').split('=').next().unwrap_or_default().to_owned();
    let right = nearest(&name, flags).map_or_else(|| "--help".to_owned(), |right| format!("--{right}"));
    Error::UnknownOption { given, right }
}

/// The flags alone were accepted, so a value that is refused now stands in the file.
fn file_error(path: &Path, error: clap::Error) -> Error {
    if !matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation) {
        return Error::Clap(error);
    }
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let flag = text(ContextKind::InvalidArg);
    let name =
        flag.trim_start_matches('-').split([' ', '=', '[']).next().unwrap_or_default().replace('-', "_");
    let mut reason = format!("`{name}` does not take `{}`", text(ContextKind::InvalidValue));
    if let Some(ContextValue::Strings(valid)) = error.get(ContextKind::ValidValue) {
        reason = format!("{reason}: it is one of {}", valid.join(", "));
    } else if let Some(cause) = error.source() {
        reason = format!("{reason}: {cause}");
    }
    Error::WrongValue { path: path.to_owned(), reason }
}

/// Suite for the configuration of a program: what `--print-config` prints for `flags` is a file that says the
/// same. Panics with both texts where it does not.
pub fn assert_prints_what_it_reads<C: Parser + Serialize>(flags: &[&str]) {
    let print = |flags: Vec<&str>, file: &str| {
        let arguments = flags.into_iter().chain(["--print-config"]).map(OsString::from).collect();
        match parse::<C>(arguments, |_| Ok(file.to_owned()), |_| Ok(())) {
            Ok(Parsed::Print(text)) => text,
            Ok(_) => panic!("--print-config prints"),
            Err(error) => panic!("{error}\n{file}"),
        }
    };
    let first = print([&["program"], flags].concat(), "");
    let second = print(vec!["program", "--config", "file"], &first);
    assert_eq!(first, second, "the printed configuration reads back as another");
}

#[cfg(test)]
mod tests;
