//! The `scorer` binary: everything is in the library.

fn main() -> std::process::ExitCode {
    scorer::cli::main()
}
