//! Facts about this process, for `/admin/state` and for whoever wants to start it again.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tokio::runtime::Handle;

/// What the system knows about this process; see [`process_facts`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProcessFacts {
    /// Process id.
    pub pid: u32,
    /// Argument list that starts this process again from any directory.
    pub command: Vec<String>,
    /// Processor time used so far by all threads, in user and kernel mode.
    pub cpu_seconds: f64,
    /// Bytes of physical memory in use; 0 where `/proc` is missing.
    pub resident_bytes: u64,
    /// Tasks alive on the runtime that asks; 0 outside one. At rest it tells whether one was left behind.
    pub tasks: usize,
}

/// Reads the facts, afresh at every call. Several components of one process share them.
pub fn process_facts() -> ProcessFacts {
    ProcessFacts {
        pid: std::process::id(),
        command: command(env::args_os(), env::current_exe().ok(), env::current_dir().ok().as_deref()),
        cpu_seconds: cpu_seconds(),
        resident_bytes: resident_bytes(),
        tasks: Handle::try_current().map_or(0, |runtime| runtime.metrics().num_alive_tasks()),
    }
}

/// Lets this process, and those it starts, have as many files and connections open as the system allows at all.
/// What is usual without it, a thousand, is few for whoever holds a connection per client.
pub fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: plain system calls; the pointers are to a value on this stack.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Has the system give this process small pages only, from now on. An allocator that asks for huge ones makes two
/// megabytes of the first byte in each: much for whoever holds a few megabytes in all, and nothing that is given back
/// brings them down again.
pub fn forgo_huge_pages() {
    #[cfg(target_os = "linux")]
    // SAFETY: a plain system call without pointers; a system that does not know it changes nothing.
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}

/// The argument list with the program and every existing path made absolute.
fn command(
    arguments: impl Iterator<Item = OsString>,
    program: Option<PathBuf>,
    directory: Option<&Path>,
) -> Vec<String> {
    let mut command: Vec<String> =
        arguments.map(|argument| argument.to_string_lossy().into_owned()).collect();
    if let (Some(first), Some(program)) = (command.first_mut(), program) {
        // Linux marks a program whose file was replaced by a newer build; starting again wants the file.
        let program = program.to_string_lossy();
        *first = program.strip_suffix(" (deleted)").unwrap_or(&program).to_owned();
    }
    if let Some(directory) = directory {
        for at in 1..command.len() {
            let named = PATH_OPTIONS.contains(&command[at - 1].as_str());
            absolute(&mut command[at], named, directory);
        }
    }
    command
}

/// Options whose value is a path also when it looks like a word.
const PATH_OPTIONS: &[&str] = &["--config", "--model"];

/// Makes the path in `argument` (`PATH` or `--option=PATH`) absolute. Elsewhere than behind a path option
/// (`named`) only what contains a slash is a path: `--role mixed` stays a role beside a folder of that name.
/// What does not exist is no path: `--model demo` stays the demo.
fn absolute(argument: &mut String, named: bool, directory: &Path) {
    let (start, named) = match argument.split_once('=') {
        Some((option, _)) if option.starts_with("--") => (option.len() + 1, PATH_OPTIONS.contains(&option)),
        _ => (0, named),
    };
    let path = &argument[start..];
    if (named || path.contains('/'))
        && Path::new(path).is_relative()
        && let Ok(path) = directory.join(path).canonicalize()
    {
        argument.replace_range(start.., &path.to_string_lossy());
    }
}

fn cpu_seconds() -> f64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is valid for one `rusage`; zeroed memory is a valid value of it, so it may be read
    // even if the call failed.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_describe_this_process() {
        let before = process_facts();
        assert_eq!(before.pid, std::process::id());
        assert!(Path::new(&before.command[0]).is_absolute());
        assert!(before.resident_bytes > 100_000);
        let mut sum = 0u64;
        while process_facts().cpu_seconds <= before.cpu_seconds {
            sum = (0..100_000u64).fold(sum, |sum, number| std::hint::black_box(sum ^ number));
        }
    }

    #[test]
    fn open_files_are_raised_to_what_the_system_allows() {
        raise_open_files();
        let limits = fs::read_to_string("/proc/self/limits").unwrap();
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), words.next());
    }

    #[tokio::test]
    async fn tasks_are_counted_while_they_live() {
        let before = process_facts().tasks;
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let task = crate::seam::spawn(async move { ended.await.unwrap_or_default() });
        assert_eq!(process_facts().tasks, before + 1);
        drop(end);
        task.await.unwrap();
        assert_eq!(process_facts().tasks, before);
    }

    #[test]
    fn a_command_starts_from_any_directory() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR"));
        let arguments = [
            "x",
            "--model",
            "src",
            "--config=Cargo.toml",
            "./src/lib.rs",
            "--role",
            "src",
            "--port=0",
            "a/b",
            "--model",
            "demo",
        ];
        let program = PathBuf::from("/bin/tandem (deleted)");
        let command = command(arguments.iter().map(OsString::from), Some(program), Some(directory));
        let inside = |path: &str| directory.canonicalize().unwrap().join(path).to_string_lossy().into_owned();
        let config = format!("--config={}", inside("Cargo.toml"));
        let (model, file) = (inside("src"), inside("src/lib.rs"));
        let expected = [
            "/bin/tandem",
            "--model",
            &model,
            &config,
            &file,
            "--role",
            "src",
            "--port=0",
            "a/b",
            "--model",
            "demo",
        ];
        assert_eq!(command, expected);
    }
}
