//! The `scorer` binary: everything is in the library.

fn main() {
    scorer::cli::main()
}
