//! What another process group of this host takes, and who listens on a port: from `/proc`, for those who measure
//! programs that say nothing about themselves.

use std::collections::HashSet;
use std::fs;

/// All processes of the group that this process leads or belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Any process of it.
    pid: i64,
    /// Its number; none where the group is also ours and says nothing about the process.
    group: Option<i64>,
}

impl Group {
    /// The group of a process.
    pub fn of(pid: i64) -> Group {
        let own = field(std::process::id() as i64, GROUP);
        Group { pid, group: field(pid, GROUP).filter(|group| Some(*group) != own) }
    }

    /// The process it was asked for.
    pub fn pid(&self) -> i64 {
        self.pid
    }

    fn members(&self) -> Vec<i64> {
        let Some(group) = self.group else { return vec![self.pid] };
        processes().filter(|&pid| field(pid, GROUP) == Some(group)).collect()
    }

    /// Processor time of those that live, in steps of a hundredth of a second.
    pub fn cpu_seconds(&self) -> f64 {
        let of =
            |pid: i64| field(pid, USER).zip(field(pid, SYSTEM)).map_or(0, |(user, system)| user + system);
        self.members().into_iter().map(of).sum::<i64>() as f64 / TICKS_PER_SECOND
    }

    /// Resident memory; pages that two of them share count twice.
    pub fn resident_bytes(&self) -> u64 {
        let of = |pid: i64| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
        };
        self.members().into_iter().map(of).sum()
    }
}

/// Places among the fields of `/proc/PID/stat` that follow the name.
const GROUP: usize = 2;
const USER: usize = 11;
const SYSTEM: usize = 12;
/// Linux has this for every program, whatever its kernel ticks at.
const TICKS_PER_SECOND: f64 = 100.0;

fn field(pid: i64, at: usize) -> Option<i64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(at)?.parse().ok()
}

fn processes() -> impl Iterator<Item = i64> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Whether anybody listens on a TCP port of this host. A socket may outlive its process by a moment.
pub fn listens(port: u16) -> bool {
    !sockets(port).is_empty()
}

/// A process of this host that listens on a TCP port; the one with the lowest number where several share it.
pub fn listener(port: u16) -> Option<i64> {
    let sockets = sockets(port);
    let holds = |pid: &i64| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.filter_map(|entry| fs::read_link(entry.path()).ok())
            .any(|link| link.to_str().is_some_and(|link| sockets.contains(link)))
    };
    processes().filter(holds).min()
}

/// Links to the sockets that listen on a port, as they stand in `/proc/PID/fd`.
fn sockets(port: u16) -> HashSet<String> {
    let wanted = format!(":{port:04X}");
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    let listens = |line: &&str| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&wanted)) && words.nth(1) == Some("0A")
    };
    let rows = tables.iter().flat_map(|table| table.lines()).filter(listens);
    rows.filter_map(|line| Some(format!("socket:[{}]", line.split_whitespace().nth(9)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_listens_is_found_and_measured() {
        let listener_socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener_socket.local_addr().expect("an address").port();
        let pid = std::process::id() as i64;
        assert_eq!((listener(port), listens(port)), (Some(pid), true));
        let group = Group::of(pid);
        assert_eq!(group.members(), [pid], "our own group is no measure of a process in it");
        assert!(group.resident_bytes() > 500_000);
        let (before, mut sum) = (group.cpu_seconds(), 0u64);
        while group.cpu_seconds() <= before {
            sum = (0..100_000u64).fold(sum, |sum, number| std::hint::black_box(sum ^ number));
        }
        drop(listener_socket);
        // A child of another test may hold it until it has become another program.
        while listens(port) {
            std::thread::yield_now();
        }
        assert_eq!(listener(port), None);
    }

    #[test]
    fn a_group_is_all_its_processes() {
        use std::os::unix::process::CommandExt;
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "sleep 60 & echo; wait"])
            .stdout(std::process::Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("sh runs");
        let mut line = String::new();
        let stdout = shell.stdout.take().expect("piped");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).expect("it says a line");
        let group = Group::of(shell.id() as i64);
        assert_eq!(group.members().len(), 2, "the shell and what it has started");
        // SAFETY: a plain system call on a group that this test has started.
        unsafe { libc::kill(-(shell.id() as i32), libc::SIGKILL) };
        shell.wait().expect("it ends");
    }
}
