"""ops/systemd: the units wait long enough for a drain, do not restart what cannot get better, and are locked up."""

import pathlib
import shutil
import sys
import tempfile

from .common import DRAIN_TIMEOUT_S, ROOT, run, unknown_settings, within

UNIT = ROOT / "ops/systemd/scorer.service"
DROP_INS = ROOT / "ops/systemd/scorer.service.d"
# One worker per GPU: the same but for what two workers on a machine cannot share.
TEMPLATE = ROOT / "ops/systemd/scorer@.service"
OWN = {
    ("StateDirectory", "%N"),
    ("Environment", "SCORER_MODEL__STATE_DIR=/var/lib/%N/state"),
    ("Environment", "SCORER_ENGINE__DEVICE_ID=%i"),
    ("Environment", "SCORER_TELEMETRY__METRICS_ADDR=127.0.0.1:946%i"),
}
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
    yield from template_problems()
    for unit in (UNIT, TEMPLATE):
        yield from analysed(unit)


def template_problems():
    where, shared = within(TEMPLATE), {("StateDirectory", "scorer"), ("Environment", "SCORER_MODEL__STATE_DIR=/var/lib/scorer/state")}
    wanted = (set(assignments(UNIT.read_text())) - shared) | OWN
    found = set(assignments(TEMPLATE.read_text()))
    for name, value in sorted(pair for pair in wanted ^ found if pair[0] != "Description"):
        yield f"{where}: {name}={value} {'is missing' if (name, value) in wanted else 'does not belong here'}"
    names = [value.split("=")[0] for key, value in OWN if key == "Environment"]
    for name in unknown_settings(names):
        yield f"{where}: Environment={name} is no key of the configuration"


def assignments(text):
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            yield name, value


def analysed(unit):
    """By systemd itself, the unit alone and with the drop-ins; the program it starts need not be installed here."""
    if not shutil.which("systemd-analyze"):
        print("    skipped: systemd-analyze is not installed (apt-get install systemd)", file=sys.stderr)
        return
    for with_drop_ins in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            # A template is looked at through one of its instances.
            copy = pathlib.Path(folder) / unit.name.replace("@", "@0")
            copy.write_text(unit.read_text().replace("ExecStart=/usr/local/bin/scorer", "ExecStart=/bin/true"))
            if with_drop_ins:
                shutil.copytree(DROP_INS, folder + f"/{copy.name}.d")
            for words in (("verify",), ("security", "--offline=true", f"--threshold={MOST_EXPOSED}")):
                if said := run("systemd-analyze", *words, copy, hint=""):
                    yield f"{within(unit)}: systemd-analyze {words[0]}: {said[-400:]}"
