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

can_be_root() { ((EUID == 0)) || command -v sudo >/dev/null; }

as_root() {
  if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

debian_install() {
  command -v apt-get >/dev/null ||
    die "missing on this machine: $*; there is no apt-get here, so install the equivalents by hand and run again."
  can_be_root || die "missing Debian packages: $*; as root, run 'apt-get install $*', then run again."
  say "${0##*/}: installing Debian packages: $*"
  as_root apt-get -qq -o DPkg::Lock::Timeout=120 update >&2 ||
    die "apt-get could not refresh its package lists: check the network and the lines above."
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 \
    install --no-install-recommends --yes "$@" >&2 ||
    die "apt-get could not install $*: see the lines above."
}
