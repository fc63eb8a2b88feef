//! Kills what is left when the test process is gone, however it went: a shell that holds the reading end of a pipe whose
//! writing end only the test process has. At the end of input it kills every process group on its list and removes the
//! folders.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Reads `add GROUP`, `del GROUP` and `rm DIR` lines; end of input means that the test process is gone.
const SCRIPT: &str = r#"
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

/// Puts a process group on the reaper's list.
pub(crate) fn add_group(group: i32) {
    tell(&format!("add {group}"));
}

/// Takes a process group off the list: it has ended.
pub(crate) fn remove_group(group: i32) {
    tell(&format!("del {group}"));
}

/// Has a folder removed at the end.
pub(crate) fn add_folder(folder: &Path) {
    tell(&format!("rm {}", folder.display()));
}

#[expect(
    clippy::zombie_processes,
    reason = "the reaper outlives this process by design"
)]
fn tell(line: &str) {
    static PIPE: OnceLock<Mutex<ChildStdin>> = OnceLock::new();
    let pipe = PIPE.get_or_init(|| {
        let mut shell = Command::new("sh")
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("a POSIX shell for the reaper");
        Mutex::new(shell.stdin.take().expect("a piped stdin"))
    });
    let mut pipe = pipe.lock().unwrap_or_else(PoisonError::into_inner);
    writeln!(pipe, "{line}").expect("the reaper reads as long as the tests run");
}
