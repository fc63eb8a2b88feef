//! Where programs are: the binary under test, and the services.

use std::path::PathBuf;

/// The `scorer` under test. Cargo builds it for the package's tests and benchmarks, in the folder above the one that the
/// running test is in.
#[track_caller]
pub fn scorer() -> PathBuf {
    let test = std::env::current_exe().expect("a running test is a file");
    let profile = test.parent().and_then(|deps| deps.parent());
    let binary = profile
        .expect("cargo puts tests in target/PROFILE/deps")
        .join("scorer");
    assert!(
        binary.is_file(),
        "there is no {}: run the test with cargo, or 'cargo build' first",
        binary.display()
    );
    binary
}

/// Finds a program, or fails the test with what to do about it.
#[track_caller]
pub fn program(names: &[&str]) -> PathBuf {
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
