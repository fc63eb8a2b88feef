# The scripts under ops/ do the work; these are names for them.

# Lists the recipes.
default:
    @just --list

# Everything that must pass: set-up, lints, documentation, every test.
check:
    ops/test

# What a change needs between two thoughts.
quick:
    ops/test --quick

# The Rust tests alone; arguments go to cargo test.
test *ARGUMENTS:
    #!/usr/bin/env bash
    set -euo pipefail
    exports=$(ops/setup)
    eval "$exports"
    cargo test --locked {{ ARGUMENTS }}

# The main job end to end, on two workers.
demo:
    ops/demo

# The documentation site on this machine, built again on each change.
docs:
    ops/setup docs >/dev/null
    target/ops/docs/bin/mkdocs serve

# Formats the Rust code.
fmt:
    cargo fmt

# The lints alone.
lint:
    cargo fmt --check
    cargo clippy --locked --all-targets -- -D warnings
