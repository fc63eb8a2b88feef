"""ops/placement.py: its list holds every graph of the tests, and each kind of answer gets its line and its exit code."""

import json
import pathlib
import stat
import subprocess
import sys
import tempfile
import unittest

import placement

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ops/placement.py"
# A program in place of `scorer`: packages whatever it is told to, and answers a check as the test says.
STAND_IN = """#!{python}
import sys
answer = {answer!r}
if sys.argv[1] == "package":
    print(answer["said"], file=sys.stderr)
    sys.exit(answer["packaged"])
assert sys.argv[1:3] == ["check", "--json"] and "engine.execution_provider=webgpu" in sys.argv, sys.argv
print(answer["report"])
sys.exit(answer["code"])
"""


def report(**facts):
    return json.dumps({"findings": [{"part": "package", "verdict": "ok", "found": "fine"}], **facts})


def failing(sentence):
    return json.dumps({"findings": [{"part": "provider", "verdict": "fail", "found": sentence}]})


class Placement(unittest.TestCase):
    def shown(self, *, code=0, said="", packaged=0, check="", graphs="hazard/*"):
        answer = {"code": code, "said": said, "packaged": packaged, "report": check}
        with tempfile.TemporaryDirectory() as folder:
            program = pathlib.Path(folder) / "scorer"
            program.write_text(STAND_IN.format(python=sys.executable, answer=answer))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
            arguments = ["--provider", "webgpu", "--scorer", program, "--graphs", graphs]
            done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()[1:], done.stderr

    def test_a_graph_that_runs_shows_its_figures_and_what_the_host_does(self):
        nodes = [{"name": "a", "op": "Shape"}, {"name": "b", "op": "Gather"}, {"name": "c", "op": "Shape"}]
        check = report(placement={"device": 117, "host": 3}, host_nodes=nodes)
        code, [line], _ = self.shown(check=check)
        self.assertEqual((code, line.split()), (0, ["hazard/graph", "117", "3", "Gather", "1,", "Shape", "2"]))

    def test_a_graph_that_the_provider_cannot_run_is_no_fault_of_the_script(self):
        code, [line], _ = self.shown(code=69, check=failing("no kernel for IsNaN"))
        self.assertEqual((code, line.split(maxsplit=3)), (0, ["hazard/graph", "-", "-", "refused: no kernel for IsNaN"]))

    def test_any_other_failure_is_one(self):
        for answer, sentence in [
            ({"code": 65, "check": failing("not repeatable")}, "FAILED: not repeatable"),
            ({"code": -6, "check": "", "said": "note"}, "FAILED with"),
            ({"code": 0, "check": report()}, "says nothing about placement"),
        ]:
            with self.subTest(sentence):
                code, [line], _ = self.shown(**answer)
                self.assertEqual(code, 1)
                self.assertIn(sentence, line)

    def test_a_graph_that_cannot_be_packaged_says_why_without_the_notes(self):
        code, [line], _ = self.shown(packaged=65, said="scorer: note: a note\nscorer: folded weights")
        self.assertEqual((code, line.split(maxsplit=3)[3]), (0, "not packaged: folded weights"))

    def test_a_pattern_that_matches_nothing_is_a_mistake(self):
        code, _, said = self.shown(graphs="nothing*")
        self.assertEqual(code, 2)
        self.assertIn("matches no graph", said)

    def test_all_files_of_the_list_are_there(self):
        graphs = [*placement.small_graphs(), *placement.architectures()]
        for graph in graphs:
            for file in filter(None, (graph.file, graph.weights, graph.shards)):
                self.assertTrue(file.exists(), f"{graph.name}: {file}")
        named = {graph.file for graph in graphs}
        committed = set((placement.MODELS / "architectures").glob("*/*.onnx.gz"))
        self.assertEqual(committed - named, set())


if __name__ == "__main__":
    unittest.main()
