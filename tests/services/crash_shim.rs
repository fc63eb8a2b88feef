//! What is preloaded to kill a process at a change to its files kills it there, neither sooner nor later.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use testkit::crash::Crash;
use testkit::folder::Folder;
use testkit::package::{MODEL, fixtures};
use testkit::program::scorer;
use testkit::worker::Settings;

/// Where the child below writes.
const CHILD_DIR: &str = "CHILD_DIR";

/// The name of that test.
const CHILD: &str = "crash_shim::a_child_writes_a_file_safely";

/// Runs a command quietly; the signal that ended it, if one did.
#[track_caller]
fn ended_by(command: &mut Command) -> Option<i32> {
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    let status = quiet.status().expect("the command starts");
    assert!(status.success() || status.signal().is_some(), "{status}");
    status.signal()
}

/// Name and path of each change, as one text.
fn told(crash: &Crash) -> Vec<String> {
    let changes = crash.changes().into_iter();
    changes.map(|c| format!("{} {}", c.name, c.path)).collect()
}

fn texts(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

/// Names and contents of a folder's files.
fn files(dir: &Path) -> Vec<(String, String)> {
    let entries = std::fs::read_dir(dir).expect("a readable folder");
    let paths = entries.map(|e| e.expect("a readable folder").path());
    let read = |path: &Path| std::fs::read_to_string(path).expect("a readable file");
    let name = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned());
    let mut files: Vec<(String, String)> = paths
        .map(|path| (name(&path).expect("a file has a name"), read(&path)))
        .collect();
    files.sort();
    files
}

#[test]
#[ignore = "another test runs it, in a process of its own"]
fn a_child_writes_a_file_safely() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else {
        return;
    };
    let dir = Path::new(&dir);
    let mut file = File::create(dir.join("new")).expect("a writable folder");
    file.write_all(b"text").expect("a writable file");
    file.sync_all().expect("a disk");
    std::fs::rename(dir.join("new"), dir.join("file")).expect("a writable folder");
    let folder = File::open(dir).expect("a readable folder");
    folder.sync_all().expect("a disk");
}

/// Runs that test with a crash; what it changed, and what was left of it.
fn child(crash: impl Fn(&Path) -> Crash) -> (Option<i32>, Vec<String>, Vec<(String, String)>) {
    let folder = Folder::new("child");
    let crash = crash(folder.path());
    let mut command = Command::new(std::env::current_exe().expect("a test is a file"));
    command.args(["--exact", CHILD, "--ignored"]);
    command.env(CHILD_DIR, folder.path());
    let signal = ended_by(crash.rig(&mut command));
    (signal, told(&crash), files(folder.path()))
}

#[test]
fn a_rust_program_dies_at_each_of_its_changes() {
    let changes = [
        "open new",
        "write new",
        "fsync new",
        "rename file",
        "fsync ",
    ];
    // What is there before the first change, and after each.
    let states = [
        None,
        Some(("new", "")),
        Some(("new", "text")),
        Some(("new", "text")),
        Some(("file", "text")),
        Some(("file", "text")),
    ];
    let state = |n: usize| {
        let file = states[n].map(|(name, text)| (name.to_owned(), text.to_owned()));
        Vec::from_iter(file)
    };
    let begun = |n: usize| texts(&changes[..n]);
    let whole = child(Crash::never);
    assert_eq!(whole, (None, begun(5), state(5)));
    for n in 1..=changes.len() {
        let before = child(|dir| Crash::before(dir, n as u64));
        assert_eq!(before, (Some(9), begun(n), state(n - 1)), "before {n}");
        let after = child(|dir| Crash::after(dir, n as u64));
        assert_eq!(after, (Some(9), begun(n), state(n)), "after {n}");
    }
    let beyond = child(|dir| Crash::before(dir, 6));
    assert_eq!(beyond, whole, "there is no sixth change");
}

#[test]
fn so_does_a_program_in_c_wherever_its_files_are_named_from() {
    let run = |command: &str, crash: fn(&Path, u64) -> Crash, n| {
        let folder = Folder::new("shell");
        let beside = Folder::new("beside");
        std::fs::write(folder.join("a"), "old").expect("a writable folder");
        let crash = crash(folder.path(), n);
        let mut shell = Command::new("/bin/sh");
        // With `exec` the program that renames is this very process.
        shell.args(["-c", command, "sh"]).arg(beside.path());
        shell.current_dir(folder.path());
        let signal = ended_by(crash.rig(&mut shell));
        (signal, told(&crash), files(folder.path()))
    };
    let one = |name: &str, text: &str| vec![(name.to_owned(), text.to_owned())];
    let (echo, mv) = ("echo x > \"$1\"/b; echo x > a", "exec mv a b");
    let dead = Some(9);
    assert_eq!(
        run(echo, Crash::before, 1),
        (dead, texts(&["open a"]), one("a", "old"))
    );
    assert_eq!(
        run(echo, Crash::after, 1),
        (dead, texts(&["open a"]), one("a", ""))
    );
    let both = texts(&["open a", "write a"]);
    assert_eq!(
        run(echo, Crash::after, 2),
        (dead, both.clone(), one("a", "x\n"))
    );
    assert_eq!(run(echo, Crash::after, 3), (None, both, one("a", "x\n")));
    assert_eq!(
        run(mv, Crash::before, 1),
        (dead, texts(&["rename b"]), one("a", "old"))
    );
    assert_eq!(
        run(mv, Crash::after, 1),
        (dead, texts(&["rename b"]), one("b", "old"))
    );
}

#[test]
fn the_binary_itself_dies_on_demand() {
    let package = |crash: &dyn Fn(&Path) -> Crash| {
        let folder = Folder::new("packaged");
        let crash = crash(folder.path());
        let mut command = Command::new(scorer());
        command.args(["package", "--name", MODEL, "--version", "1"]);
        command
            .arg("--graph")
            .arg(fixtures().join("hazard/graph.onnx"));
        command
            .arg("--weights")
            .arg(fixtures().join("hazard/checkpoint.safetensors"));
        command
            .arg("--shards")
            .arg(fixtures().join("hazard/shards"));
        command
            .args(["--window", "16", "--out"])
            .arg(folder.join("out"));
        let settings = crash.settings(Settings::new(&[]));
        let signal = ended_by(settings.apply(&mut command));
        let made = folder.join("out/model.json").is_file();
        (signal, made, told(&crash))
    };
    let (signal, made, changes) = package(&Crash::never);
    assert_eq!((signal, made), (None, true), "{changes:?}");
    // It is made under a name that is drawn anew each time.
    assert!(
        changes.iter().any(|c| c.ends_with("/model.json")),
        "{changes:?}"
    );
    let last = changes.iter().position(|c| c == "rename out");
    let last = last.unwrap_or_else(|| panic!("it is put in its place: {changes:?}")) + 1;
    let (signal, made, begun) = package(&|dir| Crash::before(dir, last as u64));
    assert_eq!((signal, made, begun.len()), (Some(9), false, last));
    let (signal, made, _) = package(&|dir| Crash::after(dir, last as u64));
    assert_eq!((signal, made), (Some(9), true));
}
