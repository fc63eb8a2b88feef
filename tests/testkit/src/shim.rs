//! `tests/shim`, the shared library that is preloaded into processes.

use std::path::PathBuf;

/// The shared library; cargo builds it beside the test.
pub(crate) fn path() -> PathBuf {
    let test = std::env::current_exe().expect("a running test is a file");
    let shim = test.with_file_name("libcrash_shim.so");
    assert!(shim.is_file(), "{} was not built", shim.display());
    shim
}
