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
    /// A Python environment with the packages that end-to-end tests drive the cluster with.
    Python,
}

/// Packages of the Python environment, as pip takes them.
const PYTHON_PACKAGES: &[&str] = &["openai>=3,<4"];

/// Exits with 0 when the environment holds them.
const PYTHON_CHECK: &str = "import sys, openai; sys.exit(not openai.__version__.startswith('3.'))";

impl Tool {
    /// Makes the tool ready and returns its program, or says why it is missing. `target` is the folder of build
    /// outputs.
    pub fn prepare(self, target: &Path) -> Result<PathBuf, String> {
        match self {
            Tool::Etcd => etcd(),
            Tool::Python => python(target),
        }
    }

    /// The variable in which tests find the program.
    pub fn variable(self) -> &'static str {
        match self {
            Tool::Etcd => "TANDEM_ETCD",
            Tool::Python => "TANDEM_PYTHON",
        }
    }
}

fn etcd() -> Result<PathBuf, String> {
    if let Some(found) = find("etcd") {
        return Ok(found);
    }
    install(&["etcd-server"]).map_err(|error| format!("the etcd server is missing ({error})"))?;
    stop_service("etcd");
    find("etcd").ok_or_else(|| "etcd-server was installed without a program `etcd`".to_owned())
}

fn python(target: &Path) -> Result<PathBuf, String> {
    let folder = target.join("venv");
    let python = folder.join("bin/python");
    let works = || run(Command::new(&python).args(["-c", PYTHON_CHECK])).is_ok();
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
    run(Command::new(&python).args(pip).args(PYTHON_PACKAGES))?;
    if works() { Ok(python) } else { Err(format!("pip installed no {}", PYTHON_PACKAGES.join(" "))) }
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
    let program = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stdin(Stdio::null()).output().map_err(|error| format!("cannot run {program}: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(format!("{program} failed: {}", last_line(&output))) }
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
    fn a_failure_says_what_the_program_said_last() {
        let error = run(Command::new("sh").args(["-c", "echo first; echo second >&2; exit 3"])).unwrap_err();
        assert_eq!(error, "sh failed: second");
        assert!(run(&mut Command::new("no-such-program-anywhere")).unwrap_err().starts_with("cannot run"));
        assert_eq!(run(&mut Command::new("true")), Ok(()));
    }
}
