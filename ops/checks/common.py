"""What the checks share. A check is a generator of sentences, each without its full stop and with its file in front."""

import pathlib
import re
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DRAIN_TIMEOUT_S = 60  # the default of worker.drain_timeout
METRICS_PORT = 9464
DEFAULTS = ROOT / "src/config.default.toml"


def seconds(duration):
    """A duration as compose and we write it: 75s, 2m, 1m30s."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", str(duration)))


def known_settings():
    """SCORER_SECTION__KEY of every key of the defaults that the binary embeds, commented out or not."""
    known, section = set(), ""
    for line in DEFAULTS.read_text().splitlines():
        if heading := re.match(r"\[(\w+)\]", line):
            section = heading[1]
        elif key := re.match(r"(?:# )?(\w+) = ", line):
            known.add(f"SCORER_{section}__{key[1]}".upper())
    return known


def unknown_settings(names):
    known = known_settings()
    return [name for name in names if name.startswith("SCORER_") and name not in known]


def within(path):
    return str(path.relative_to(ROOT))


def run(program, *arguments, hint):
    """The program's own words where it is not content; `hint` says how to get it."""
    if not shutil.which(program):
        return f"{program} is missing: {hint}"
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    return None if done.returncode == 0 else " ".join((done.stdout + done.stderr).split())
