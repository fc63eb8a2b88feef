//! Child processes in groups of their own, and the guardian that outlives the test process.

use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Reads `add GROUP`, `del GROUP` and `rm DIR` lines; end of input means that the test process is gone.
const GUARDIAN: &str = r#"
trap '' HUP INT TERM QUIT
groups=' ' dirs=''
while read -r verb what; do
    case "$verb" in
        add) groups="$groups$what " ;;
        del) groups="${groups%% $what *} ${groups#* $what }" ;;
        rm) dirs="$dirs $what" ;;
    esac
done
for group in $groups; do kill -s KILL -- "-$group"; done 2>/dev/null
for again in 1 2 3; do rm -rf $dirs && break; sleep 0.2; done 2>/dev/null
"#;

#[expect(
    clippy::zombie_processes,
    reason = "the guardian outlives this process by design"
)]
fn tell_guardian(line: &str) {
    static GUARD: OnceLock<Mutex<ChildStdin>> = OnceLock::new();
    let guard = GUARD.get_or_init(|| {
        let mut shell = Command::new("sh")
            .args(["-c", GUARDIAN])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("a POSIX shell for the guardian");
        Mutex::new(shell.stdin.take().expect("a piped stdin"))
    });
    let mut pipe = guard
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    writeln!(pipe, "{line}").expect("the guardian reads as long as the tests run");
}

/// A folder that goes when dropped, or with the test process if that never happens.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new(purpose: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(&format!("scorer-{purpose}-"))
            .tempdir();
        let dir = dir.expect("a temporary folder");
        tell_guardian(&format!("rm {}", dir.path().display()));
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// A port that was free a moment ago and is given to nobody else: below those that the system hands out, and from
/// another place on for each process, since some run side by side.
pub(crate) fn free_port() -> u16 {
    const LOWEST: u32 = 11_000;
    const PROCESSES: u32 = 100;
    const EACH: u32 = 200;
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id() % PROCESSES * EACH;
    loop {
        let given = GIVEN.fetch_add(1, Ordering::Relaxed);
        let port = LOWEST + (first + given) % (PROCESSES * EACH);
        let port = u16::try_from(port).expect("a port");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Whether somebody listens on the port.
pub(crate) fn listening(port: u16) -> bool {
    let address = ([127, 0, 0, 1], port).into();
    std::net::TcpStream::connect_timeout(&address, Duration::from_millis(500)).is_ok()
}

/// A child that leads a process group; the whole group dies with this value.
pub(crate) struct Group {
    child: Child,
    group: Pid,
    status: Option<ExitStatus>,
}

impl Group {
    #[track_caller]
    pub(crate) fn spawn(command: &mut Command) -> Self {
        command.process_group(0);
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}; run ops/setup"));
        let id = i32::try_from(child.id()).expect("a process id");
        tell_guardian(&format!("add {id}"));
        Self {
            child,
            group: Pid::from_raw(id),
            status: None,
        }
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Signals every process of the group; one that is already gone is no error.
    pub(crate) fn signal(&self, signal: Signal) {
        killpg(self.group, signal).ok();
    }

    /// The exit status of the leader, if it has ended.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("waiting for one's own child");
        }
        self.status
    }

    /// Waits for the leader to end.
    pub(crate) fn wait(&mut self, deadline: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + deadline;
        while self.ended().is_none() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.status
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        if self.status.is_none() {
            self.child.wait().ok();
        }
        tell_guardian(&format!("del {}", self.group));
    }
}

/// Finds a program, or fails the test with what to do about it.
#[track_caller]
pub(crate) fn program(names: &[&str]) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin"].map(PathBuf::from));
    let found = names
        .iter()
        .flat_map(|name| folders.iter().map(move |dir| dir.join(name)))
        .find(|p| p.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "{} is not installed: run ops/setup",
            names.last().unwrap_or(&"?")
        )
    })
}
