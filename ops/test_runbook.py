"""Runbook: its pattern, its links, and that what it names exists: alerts, keys, fields, metrics. Words and commands: tests/runbook.rs."""

import json
import pathlib
import re
import tomllib
import unittest

import yaml

from checks import monitoring

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNBOOK = ROOT / "ops/runbook.md"
ALERTS = ROOT / "ops/prometheus/alerts.yml"
SECTION = re.compile(r"`[a-z_]+N?`|Exit \d+|Scorer[A-Za-z]+")
PARTS = ("Meaning", "Check", "Fix")
CODE = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(r"(?<![\w.:/-])([a-z_]+)\.([a-z_]+)(?![\w.])")


def headings(text):
    """(level, title, body) of each, in order; the body ends at the next heading of any level."""
    found = re.split(r"^(#+) (.+)\n", text, flags=re.MULTILINE)[1:]
    return [(len(marks), title.strip(), body) for marks, title, body in zip(*[iter(found)] * 3)]


def anchor(title):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def problems(text):
    """One sentence for each thing that breaks the pattern."""
    found = headings(text)
    anchors = [anchor(title) for _, title, _ in found]
    for title in sorted({title for _, title, _ in found if anchors.count(anchor(title)) > 1}):
        yield f"{title}: there are two headings with this anchor"
    for level, title, body in found:
        if level == 3:
            yield from section_problems(title, body)
        elif level > 3:
            yield f"{title}: sections have no parts with headings"
    for target in re.findall(r"\]\(#([^)]*)\)", text):
        if target not in anchors:
            yield f"#{target}: no heading has this anchor"


def section_problems(title, body):
    if not SECTION.fullmatch(title):
        yield f"{title}: neither a word in backticks, nor 'Exit' and a number, nor an alert"
    items = re.split(r"\n(?!  \S)", body.strip())
    labels = tuple(item.partition(":")[0].removeprefix("- ") for item in items if item.startswith("- "))
    if labels != PARTS or len(items) != len(PARTS):
        yield f"{title}: is not a list of three: '- Meaning:', '- Check:' and '- Fix:', each on its line"
    for item in items:
        if not item.partition(":")[2].strip():
            yield f"{title}: nothing follows '{item}'"


def chapter(text, title):
    """The titles of a chapter's sections."""
    found, inside = [], False
    for level, name, _ in headings(text):
        if level <= 2:
            inside = name == title
        elif inside:
            found.append(name)
    return found


def configuration_keys():
    """Of the defaults that the binary embeds, commented out or not."""
    text = (ROOT / "src/config.default.toml").read_text(encoding="utf-8")
    known = {f"{section}.{key}" for section, keys in tomllib.loads(text).items() for key in keys}
    section = ""
    for line in text.splitlines():
        if heading := re.match(r"\[(\w+)\]", line):
            section = heading[1]
        elif key := re.match(r"# (\w+) = ", line):
            known.add(f"{section}.{key[1]}")
    return known


def fields(name):
    """Of a message, those of its objects as `object.field`, whichever shape the message has."""
    schema = json.loads((ROOT / f"schemas/{name}.json").read_text(encoding="utf-8"))
    found = set()
    for shape in [schema, *schema.get("anyOf", [])]:
        shape = schema["$defs"][shape["$ref"].split("/")[-1]] if "$ref" in shape else shape
        for field, value in shape["properties"].items():
            for reference in re.findall(r"#/\$defs/(\w+)", json.dumps(value)):
                found |= {f"{field}.{inner}" for inner in schema["$defs"][reference].get("properties", {})}
    return found


class Runbook(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.text = RUNBOOK.read_text(encoding="utf-8")
        cls.codes = CODE.findall(cls.text) + re.findall(r"^    (\S.*)$", cls.text, flags=re.MULTILINE)

    def test_every_section_follows_the_pattern_and_every_link_leads_somewhere(self):
        self.assertEqual(list(problems(self.text)), [])
        self.assertGreater(len(headings(self.text)), 60)

    def test_it_begins_with_where_to_look(self):
        chapters = [title for level, title, _ in headings(self.text) if level == 2]
        self.assertEqual(chapters[0], "Where to look")

    def test_every_alert_has_its_section_and_every_section_its_alert(self):
        groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
        rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
        self.assertCountEqual(chapter(self.text, "Alerts"), [rule["alert"] for rule in rules])
        anchors = {anchor(title) for _, title, _ in headings(self.text)}
        for rule in rules:
            for note in rule.get("annotations", {}).values():
                for target in re.findall(r"runbook\.md#(\S+)", note):
                    self.assertIn(target, anchors, rule["alert"])

    def test_every_key_and_field_exists(self):
        known = configuration_keys() | fields("heartbeat.v1") | fields("score_result.v1")
        first = {name.partition(".")[0] for name in known}
        named = {f"{dotted[1]}.{dotted[2]}" for code in self.codes for dotted in DOTTED.finditer(code) if dotted[1] in first}
        self.assertGreater(len(named), 30)
        self.assertEqual(named - known - {"model.json"}, set())

    def test_every_metric_exists(self):
        named = set(re.findall(r"\b(?:scorer|process)_\w+", "\n".join(self.codes)))
        self.assertGreater(len(named), 1)
        self.assertEqual(named - monitoring.exported(), set())


class Pattern(unittest.TestCase):
    """What the checks are worth."""

    SOUND = (
        "# T\n\n### `a_b`\n\n- Meaning: What.\n  See [x](#exit-7).\n- Check: `c`.\n- Fix: nothing.\n\n"
        "### Exit 7\n\n- Meaning: W.\n- Check: c.\n- Fix: d.\n"
    )

    def test_a_sound_page_has_no_problem(self):
        self.assertEqual(list(problems(self.SOUND)), [])

    def test_each_fault_is_found(self):
        for fault, changed in {
            "no fix": self.SOUND.replace("- Fix: d.\n", ""),
            "no meaning": self.SOUND.replace("- Meaning: W.\n", ""),
            "other order": self.SOUND.replace("- Check: c.\n- Fix: d.", "- Fix: d.\n- Check: c."),
            "other label": self.SOUND.replace("- Fix: d.", "- Do: d."),
            "fourth part": self.SOUND + "- Fix: e.\n",
            "text before": self.SOUND.replace("- Meaning: W.", "W.\n\n- Meaning: W."),
            "text behind": self.SOUND + "\nW.\n",
            "empty part": self.SOUND.replace("- Fix: d.", "- Fix:"),
            "twice": self.SOUND.replace("### Exit 7", "### `a_b`"),
            "dead link": self.SOUND.replace("#exit-7", "#exit-8"),
            "no backticks": self.SOUND.replace("`a_b`", "a_b"),
        }.items():
            with self.subTest(fault):
                self.assertNotEqual(list(problems(changed)), [])


if __name__ == "__main__":
    unittest.main()
