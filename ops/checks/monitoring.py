"""ops/prometheus and ops/grafana: every alert is tested and explained, every metric is one that somebody exports."""

import json
import re
import tempfile

import yaml

from .common import METRICS_PORT, ROOT, run, within

ALERTS = ROOT / "ops/prometheus/alerts.yml"
TESTS = ROOT / "ops/prometheus/alerts_test.yml"
SCRAPES = ROOT / "ops/prometheus/prometheus.yml"
DASHBOARD = ROOT / "ops/grafana/dashboard.json"
PROVISIONING = ROOT / "ops/grafana/provisioning"
RUNBOOK = ROOT / "ops/runbook.md"
# Generated from the code; tests/reference.rs fails where they part.
METRICS = ROOT / "docs/reference/metrics.md"
PROMTOOL = "run ops/setup promtool, or ops/test, which does"

# Of RabbitMQ's plugin and of Prometheus itself; tests/privileges_live.py sees the former on a real broker.
FOREIGN = {"rabbitmq_queue_messages", "rabbitmq_queue_messages_ready", "rabbitmq_queue_consumers"}


def exported():
    """The names of the reference, what a histogram makes of one, and what the rules record."""
    kinds = dict(re.findall(r"^\| `((?:scorer|process)_\w+)` \| (\w+)", METRICS.read_text(), re.MULTILINE))
    histograms = (name for name, kind in kinds.items() if kind == "histogram")
    parts = {name + part for name in histograms for part in ("_bucket", "_sum", "_count")}
    return {*kinds, *parts, *FOREIGN, *(rule["record"] for rule in recordings())}


def used(text):
    """Metrics in an expression or in a text with one. What is recorded has colons: `job:scorer_jobs:rate5m`."""
    return set(re.findall(r"(?<![\w:])(?:\w+:)?(?:scorer|process|rabbitmq)_\w+(?::\w+)?", text))


def rules(kind="alert"):
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        yield from (rule for rule in group["rules"] if kind in rule)


def recordings():
    return rules("record")


def problems():
    yield from alert_problems()
    yield from test_problems()
    yield from scrape_problems()
    yield from dashboard_problems()
    for words in (("check", "rules", ALERTS), ("test", "rules", TESTS), ("check", "config", SCRAPES)):
        if said := run("promtool", *words, hint=PROMTOOL):
            yield f"{within(words[-1])}: promtool {words[0]} {words[1]}: {said}"


def alert_problems():
    where, known = within(ALERTS), exported()
    headings = set(re.findall(r"^#+ (\w+)$", RUNBOOK.read_text(), re.MULTILINE))
    for rule in recordings():
        for metric in used(rule["expr"]) - known:
            yield f"{where}: {rule['record']} is made of {metric}, which {within(METRICS)} does not have: correct it, or add it to the worker"
    seen = set()
    for rule in rules():
        name, notes = rule["alert"], rule.get("annotations", {})
        if name in seen:
            yield f"{where}: the alert {name} is there twice: rename one"
        seen.add(name)
        if not re.fullmatch(r"Scorer([A-Z][a-z]+)+", name):
            yield f"{where}: the alert {name} must be named ScorerInCamelCase"
        if rule.get("labels", {}).get("severity") not in ("page", "ticket"):
            yield f"{where}: the alert {name} needs labels.severity, page or ticket"
        for note in {"summary", "description", "runbook"} - set(notes):
            yield f"{where}: the alert {name} needs annotations.{note}"
        if notes.get("runbook") != f"{within(RUNBOOK)}#{name.lower()}":
            yield f"{where}: the alert {name} must point to {within(RUNBOOK)}#{name.lower()}"
        if name not in headings:
            yield f"{within(RUNBOOK)}: there is no heading '### {name}': say there what to do about it"
        for metric in used(rule["expr"] + notes.get("description", "")) - known:
            yield f"{where}: the alert {name} uses {metric}, which {within(METRICS)} does not have: correct it, or add it to the worker"


def test_problems():
    """Each alert must fire once and be silent once."""
    where = within(TESTS)
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    fire = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    names = {rule["alert"] for rule in rules()}
    for name in sorted(names - fire):
        yield f"{where}: no case in which {name} fires"
    for name in sorted(names - silent):
        yield f"{where}: no case in which {name} is silent"
    for name in sorted((fire | silent) - names):
        yield f"{where}: {name} is tested and is no alert of {within(ALERTS)}"


def scrape_problems():
    where, config = within(SCRAPES), yaml.safe_load(SCRAPES.read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    for rule in rules():
        for name in set(re.findall(r'job="(\w+)"', rule["expr"])) - set(jobs):
            yield f"{where}: the alert {rule['alert']} looks at the job '{name}', which is not scraped"
    for file in config["rule_files"]:
        if not (SCRAPES.parent / file).is_file():
            yield f"{where}: rule_files names {file}, which is not there"
    ports = {sd["port"] for sd in jobs.get("scorer", {}).get("dns_sd_configs", [])}
    if ports != {METRICS_PORT}:
        yield f"{where}: the workers' port must be {METRICS_PORT}, as in docker-compose.yml"
    # The plain path adds the queues up and leaves out their names.
    if jobs.get("rabbitmq", {}).get("metrics_path") != "/metrics/per-object":
        yield f"{where}: the job rabbitmq must ask for /metrics/per-object"


def dashboard_problems():
    where, board, known = within(DASHBOARD), json.loads(DASHBOARD.read_text()), exported()
    sources = [yaml.safe_load(path.read_text()) for path in sorted(PROVISIONING.glob("datasources/*.yml"))]
    uids = {source["uid"] for file in sources for source in file["datasources"]}
    for uid in sorted(set(datasources(board)) - uids):
        yield f"{where}: the data source '{uid}' is not one of {within(PROVISIONING)}: {', '.join(sorted(uids))}"
    if not (board.get("uid") and board.get("title")):
        yield f"{where}: needs uid and title"
    ids = [panel["id"] for panel in board["panels"]]
    if len(ids) != len(set(ids)):
        yield f"{where}: two panels have the same id"
    for title, expression in expressions(board):
        for metric in used(expression) - known:
            yield f"{where}: the panel '{title}' uses {metric}, which nobody exports"
    if said := parse_all(expression for _, expression in expressions(board)):
        yield f"{where}: promtool check rules: {said}"


def datasources(value):
    """Every uid of a data source, however deep."""
    if isinstance(value, dict):
        if isinstance(value.get("datasource"), dict):
            yield value["datasource"]["uid"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from datasources(item)


def expressions(board):
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for note in board["annotations"]["list"]:
        yield note["name"], note["expr"]


def parse_all(queries):
    """Prometheus' own parser sees the panels' queries as rules, Grafana's variables filled in."""
    filled = (query.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$instance", ".*") for query in queries)
    recorded = [{"record": f"panel_{number}", "expr": query} for number, query in enumerate(filled)]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}, file)
        file.flush()
        return run("promtool", "check", "rules", file.name, hint=PROMTOOL)
