#!/usr/bin/env python3
"""Runs every test program that cargo builds, two at a time: most of their time they wait for a broker or another process.

`cargo test` runs the same programs one after the other. What a program prints goes to target/test-logs/NAME.log while it
runs, and to standard output when it ends. Exits 1 if one failed, and says which. Run by ops/test.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

AT_A_TIME = 2
THREADS_PER_CORE = 2  # a test waits about half of its time
# Begun first, so that none of them is what everything else waits for at the end; others follow in cargo's order.
LONGEST = ("services", "updates", "chaos", "live")


def programs(messages):
    """The test programs in cargo's JSON messages, as (name, path), the longest first."""
    found = []
    for message in map(json.loads, messages):
        if message["reason"] == "compiler-artifact" and message["profile"]["test"] and message["executable"]:
            found.append((message["target"]["name"], message["target"]["kind"][0], message["executable"]))
    named = [(name if kind == "test" else f"{name} ({kind})", path) for name, kind, path in found]
    return sorted(named, key=lambda program: LONGEST.index(program[0]) if program[0] in LONGEST else len(LONGEST))


def run(name, path, logs):
    """Runs one program; its name, exit code, seconds and log."""
    log = logs / f"{name}.log"
    started = time.monotonic()
    with log.open("wb") as out:
        code = subprocess.run([path], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    return name, code, time.monotonic() - started, log


def run_all(tests, logs, at_a_time=AT_A_TIME):
    """Runs the programs and prints what each printed when it ends; the names of those that failed."""
    logs.mkdir(parents=True, exist_ok=True)
    failed = []
    with ThreadPoolExecutor(at_a_time) as lanes:
        for done in as_completed([lanes.submit(run, name, path, logs) for name, path in tests]):
            name, code, seconds, log = done.result()
            print(f"\n=== {name}: {'passed' if code == 0 else f'failed, exit code {code}'}, {seconds:.0f} s", flush=True)
            sys.stdout.buffer.write(log.read_bytes())
            sys.stdout.flush()
            if code != 0:
                failed.append(name)
    return failed


def main():
    build = subprocess.run(
        ["cargo", "test", "--locked", "--no-run", "--message-format=json-render-diagnostics"],
        stdout=subprocess.PIPE, text=True, check=False,
    )
    if build.returncode != 0:
        return "the tests do not build: see the lines above."
    tests = programs(build.stdout.splitlines())
    if not tests:
        return "cargo built no test program: run cargo test --no-run and look at what it prints."
    os.environ.setdefault("RUST_TEST_THREADS", str(THREADS_PER_CORE * len(os.sched_getaffinity(0))))
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", "target"))
    failed = run_all(tests, target / "test-logs")
    if failed:
        return f"failed: {', '.join(failed)}; to run one again: cargo test --test NAME"
    print(f"\n{len(tests)} programs passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
