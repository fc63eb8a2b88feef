"""ops/systemd: the unit waits long enough for a drain, does not restart what cannot get better, and is locked up."""

import pathlib
import shutil
import sys
import tempfile

from .common import DRAIN_TIMEOUT_S, ROOT, run, unknown_settings, within

UNIT = ROOT / "ops/systemd/scorer.service"
WANTED = {
    "Type": "notify",
    "NotifyAccess": "main",
    "Restart": "on-failure",
    "RestartPreventExitStatus": "64",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "PrivateTmp": "yes",
    "StateDirectory": "scorer",
}
MOST_EXPOSED = 20  # in tenths, as systemd-analyze counts: 1.4 today, 1.5 with a GPU


def problems():
    where, settings = within(UNIT), dict(assignments(UNIT.read_text()))
    for name, value in WANTED.items():
        if settings.get(name) != value:
            yield f"{where}: {name} must be '{value}'"
    if not int(settings["TimeoutStopSec"]) > DRAIN_TIMEOUT_S:
        yield f"{where}: TimeoutStopSec must be longer than worker.drain_timeout ({DRAIN_TIMEOUT_S} s)"
    if not int(settings.get("WatchdogSec", 0)) > 0:
        yield f"{where}: WatchdogSec is missing: a worker that hangs would stay"
    names = [word.split("=")[0] for key, value in assignments(UNIT.read_text()) if key == "Environment" for word in value.split()]
    for name in unknown_settings(names):
        yield f"{where}: Environment={name} is no key of the configuration"
    yield from analysed()


def assignments(text):
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            yield name, value


def analysed():
    """By systemd itself, the unit alone and with its drop-ins; the program it starts need not be installed here."""
    if not shutil.which("systemd-analyze"):
        print("    skipped: systemd-analyze is not installed (apt-get install systemd)", file=sys.stderr)
        return
    for with_drop_ins in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            copy = pathlib.Path(folder) / UNIT.name
            copy.write_text(UNIT.read_text().replace("ExecStart=/usr/local/bin/scorer", "ExecStart=/bin/true"))
            if with_drop_ins:
                shutil.copytree(UNIT.parent / (UNIT.name + ".d"), folder + f"/{UNIT.name}.d")
            for words in (("verify",), ("security", "--offline=true", f"--threshold={MOST_EXPOSED}")):
                if said := run("systemd-analyze", *words, copy, hint=""):
                    yield f"{within(UNIT)}: systemd-analyze {words[0]}: {said[-400:]}"
