"""Runbook: its pattern, its links, and that what it names exists: alerts, commands, keys, fields of the heartbeat."""

import json
import pathlib
import re
import tomllib
import unittest

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNBOOK = ROOT / "ops/runbook.md"
ALERTS = ROOT / "ops/prometheus/alerts.yml"
SECTION = re.compile(r"`[a-z_]+N?`|Exit \d+|Scorer[A-Za-z]+")
CODE = re.compile(r"`([^`\n]+)`")


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
    paragraphs = [paragraph for paragraph in body.strip().split("\n\n") if paragraph]
    begins = [paragraph.partition(":")[0] for paragraph in paragraphs]
    if begins[1:] != ["Look at", "Do"] or begins[0] in ("Look at", "Do"):
        yield f"{title}: is not one paragraph, one that begins 'Look at:' and one that begins 'Do:'"
    for paragraph in paragraphs[1:]:
        if not paragraph.partition(":")[2].strip():
            yield f"{title}: nothing follows '{paragraph}'"


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


def heartbeat_fields():
    schema = json.loads((ROOT / "schemas/heartbeat.v1.json").read_text(encoding="utf-8"))
    found = set(schema["properties"])
    for name, field in schema["properties"].items():
        for reference in re.findall(r"#/\$defs/(\w+)", json.dumps(field)):
            found |= {f"{name}.{inner}" for inner in schema["$defs"][reference]["properties"]}
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

    def test_every_command_of_scorer_exists(self):
        source = (ROOT / "src/cli.rs").read_text(encoding="utf-8")
        commands = re.search(r"^enum Command \{\n(.*?)^\}", source, flags=re.MULTILINE | re.DOTALL)[1]
        known = {word.lower() for word in re.findall(r"^    ([A-Z][a-z]+)\b", commands, flags=re.MULTILINE)}
        control = (ROOT / "src/protocol/control.rs").read_text(encoding="utf-8")
        control = re.search(r"^pub enum Command \{\n(.*?)^\}", control, flags=re.MULTILINE | re.DOTALL)[1]
        orders = {word.lower() for word in re.findall(r"^    ([A-Z][a-z]+),", control, flags=re.MULTILINE)}
        for code in self.codes:
            if called := re.match(r"scorer ([a-z]+)(?: ([a-z]+))?", code):
                with self.subTest(code):
                    self.assertIn(called[1], known)
                    if called[1] == "ctl" and called[2]:
                        self.assertIn(called[2], orders)
                    if called[1] == "dead" and called[2]:
                        self.assertIn(called[2], {"list", "show", "requeue", "drop"})

    def test_every_key_and_field_exists(self):
        keys, fields = configuration_keys(), heartbeat_fields()
        first = {name.partition(".")[0] for name in keys | fields}
        for code in self.codes:
            dotted = re.match(r"([a-z_]+)\.([a-z_]+)(?![\w.])", code)
            if dotted and dotted[1] in first and dotted[0] != "model.json":
                with self.subTest(code):
                    self.assertIn(dotted[0], keys | fields)


class Pattern(unittest.TestCase):
    """What the checks are worth."""

    SOUND = (
        "# T\n\n### `a_b`\n\nWhat. See [x](#exit-7).\n\nLook at: `c`.\n\nDo: nothing.\n\n"
        "### Exit 7\n\nW.\n\nLook at: c.\n\nDo: d.\n"
    )

    def test_a_sound_page_has_no_problem(self):
        self.assertEqual(list(problems(self.SOUND)), [])

    def test_each_fault_is_found(self):
        for fault, changed in {
            "no Do": self.SOUND.replace("Do: d.\n", ""),
            "no meaning": self.SOUND.replace("W.\n\n", ""),
            "other order": self.SOUND.replace("Look at: c.\n\nDo: d.", "Do: d.\n\nLook at: c."),
            "empty part": self.SOUND.replace("Do: d.", "Do:"),
            "twice": self.SOUND.replace("### Exit 7", "### `a_b`"),
            "dead link": self.SOUND.replace("#exit-7", "#exit-8"),
            "no backticks": self.SOUND.replace("`a_b`", "a_b"),
        }.items():
            with self.subTest(fault):
                self.assertNotEqual(list(problems(changed)), [])


if __name__ == "__main__":
    unittest.main()
