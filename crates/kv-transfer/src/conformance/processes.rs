//! The part of the suite in which owners are processes that are really killed and really stopped.

use std::process::Stdio;
use std::task::Poll;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::*;

/// What the owner's process says begins with this: test programs say other things too.
const SAYS: &str = "tandem-owner: ";

/// Runs the cases for one row. `command` starts a process that calls [`owner`] for it.
///
/// # Panics
/// If the row does not hold what a transport must.
pub async fn run_with_processes(row: &'static Row, command: impl Fn() -> Command) {
    an_owner_killed_midway(row, Process::start(&mut command()).await).await;
    an_owner_stopped_midway(row, Process::start(&mut command()).await).await;
}

/// Is an owner for the tests of another process, until that one closes this one's standard input.
///
/// # Panics
/// If it cannot.
pub async fn owner(row: &'static Row) {
    let gate = Arc::new(TestGate::default());
    gate.set(CLAIM, true);
    let mut counts = gate.counts.subscribe();
    let bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let transport = (row.make)(&Options::default());
    let exported = transport.export(remote().clone(), gate, OWNER, bind).await.expect("it exports");
    let hex: String = exported.export().blob.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("{SAYS}{hex}");
    let says = async {
        while counts.changed().await.is_ok() {
            println!("{SAYS}asked");
        }
    };
    let mut input = [0];
    tokio::select! {
        () = says => {}
        _ = tokio::task::spawn_blocking(move || std::io::Read::read(&mut std::io::stdin(), &mut input)) => {}
    }
}

struct Process {
    child: Child,
    said: Lines<BufReader<ChildStdout>>,
    blob: Vec<u8>,
}

impl Process {
    async fn start(command: &mut Command) -> Process {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the program starts");
        let mut said = BufReader::new(child.stdout.take().expect("it was asked for")).lines();
        let hex = next(&mut said).await;
        let digits = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
        let blob = (0..hex.len()).step_by(2).map(digits).collect();
        Process { child, said, blob }
    }

    async fn connect(&self, row: &Row, deadline: Time) -> Result<Arc<dyn Peer>, Error> {
        let export = Export { transport: row.name.to_owned(), blob: self.blob.clone() };
        (row.make)(&Options::default()).connect(&export, deadline).await
    }

    fn signal(&self, signal: libc::c_int) {
        let id = self.child.id().expect("it runs") as libc::pid_t;
        // SAFETY: a plain system call; the process is ours and was not waited for, so the id is still its own.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
    }

    /// Returns when all of its threads have stopped.
    fn stop(&self) {
        self.signal(libc::SIGSTOP);
        let id = self.child.id().expect("it runs");
        // SAFETY: plain numbers, for which zeros are good.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: waits for a child of ours to stop, and takes nothing from whoever waits for its end.
        assert_eq!(unsafe { libc::waitid(libc::P_PID, id, &mut info, libc::WSTOPPED) }, 0);
    }

    /// Polls a pull until the owner has let it through, and no further.
    async fn begin<'a>(&mut self, peer: &'a dyn Peer, pull: Pull) -> Result<Midway<'a>, Completion> {
        let mut midway = Box::pin(peer.pull(pull));
        let mut asked = Box::pin(next(&mut self.said));
        loop {
            let polled = std::future::poll_fn(|context| Poll::Ready(midway.as_mut().poll(context))).await;
            if let Poll::Ready(done) = polled {
                return Err(done);
            }
            if seam::timeout(Duration::from_millis(100), &mut asked).await.is_ok() {
                return Ok(midway);
            }
        }
    }
}

async fn next(said: &mut Lines<BufReader<ChildStdout>>) -> String {
    let next = async {
        loop {
            let line = said.next_line().await.expect("it can be read").expect("the owner goes on");
            // The test program may not have ended its own line.
            if let Some(at) = line.find(SAYS) {
                return line[at + SAYS.len()..].to_owned();
            }
        }
    };
    seam::timeout(SOON, next).await.expect("the owner says something")
}

async fn an_owner_killed_midway(row: &'static Row, mut process: Process) {
    let peer = process.connect(row, soon()).await.expect("it connects");
    let local = local();
    let midway = process.begin(&*peer, everything(&local)).await.expect("it takes longer");
    process.signal(libc::SIGKILL);
    process.child.wait().await.expect("it ends");
    let done = seam::timeout(SOON, midway).await.expect("a death is noticed, not waited for");
    assert_gone(row, &done);
    let_go(row, done).await;
    assert_ours(row, &*peer, &local).await;
    assert_gone(row, &peer.pull(pull(&[(0, 100)], &local)).await);
    assert!(process.connect(row, soon()).await.is_err(), "{}: nobody is there any more", row.name);
}

async fn an_owner_stopped_midway(row: &'static Row, mut process: Process) {
    let peer = process.connect(row, soon()).await.expect("it connects");
    let local = local();
    // A machine that is busy enough for the deadline to pass before the pull has begun gets more time.
    let mut limit = Duration::from_millis(500);
    let midway = loop {
        let limited = Pull { deadline: seam::now() + limit, ..everything(&local) };
        match process.begin(&*peer, limited).await {
            Ok(midway) => break midway,
            Err(done) => assert_eq!(done.bytes, Err(PullError::Deadline), "{}", row.name),
        }
        limit *= 4;
    };
    process.stop();
    let done = midway.await;
    assert_eq!(done.bytes, Err(PullError::Deadline), "{}: a hung peer costs the deadline", row.name);
    let_go(row, done).await;
    let refused = process.connect(row, seam::now() + Duration::from_millis(200)).await;
    assert!(refused.is_err(), "{}: a connection stands only if somebody answers", row.name);
    // SAFETY: the buffers may be reused, so the bytes are ours again.
    unsafe { fill(&local) };
    process.signal(libc::SIGCONT);
    assert_still_good(row, &*peer).await;
    assert!(is_filled(&local), "{}: a late write", row.name);
}
