# shellcheck shell=bash
# What the scripts in this folder share. Sourced, never run.
# After sourcing, the working directory is the repository's root and `target` is cargo's target folder.

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
target=${CARGO_TARGET_DIR:-$root/target}
[[ $target == /* ]] || target=$root/$target

# rustup puts cargo here; a shell opened before the installation does not know it yet.
if ! command -v cargo >/dev/null && [[ -x ${HOME:-/root}/.cargo/bin/cargo ]]; then
  PATH=$HOME/.cargo/bin:$PATH
fi

# Progress goes to standard error: standard output carries only the answer.
say() { printf '%s\n' "$*" >&2; }

die() {
  say "${0##*/}: $*"
  exit 1
}

# wait_until SECONDS COMMAND...: true as soon as the command succeeds, false after the time.
wait_until() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.2
  done
}

group_is_gone() { ! kill -0 -- "-$1" 2>/dev/null; }
process_is_gone() { ! kill -0 "$1" 2>/dev/null; }
