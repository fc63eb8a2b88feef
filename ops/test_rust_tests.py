"""What runs the Rust tests: every program that cargo built, the longest first, and no failure is lost."""

import json
import pathlib
import tempfile
import unittest
from contextlib import redirect_stdout

import rust_tests


def artifact(name, kind="test", test=True, executable=None, reason="compiler-artifact"):
    target = {"name": name, "kind": [kind]}
    return json.dumps({"reason": reason, "target": target, "profile": {"test": test}, "executable": executable})


class Programs(unittest.TestCase):
    def test_every_test_program_is_found_the_longest_first(self):
        messages = [
            artifact("scorer", kind="lib", executable="/t/lib"),
            artifact("scorer", kind="lib", test=False),
            artifact("scorer", kind="bin", test=False, executable="/t/bin"),
            artifact("bombs", executable="/t/bombs"),
            artifact("updates", executable="/t/updates"),
            artifact("services", executable="/t/services"),
            json.dumps({"reason": "build-finished", "success": True}),
        ]
        expected = [("services", "/t/services"), ("updates", "/t/updates"), ("scorer (lib)", "/t/lib"), ("bombs", "/t/bombs")]
        self.assertEqual(rust_tests.programs(messages), expected)


class RunAll(unittest.TestCase):
    def test_a_failure_is_named_and_what_every_program_printed_is_shown(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            tests = []
            for name, code in (("good", 0), ("bad", 3), ("killed", None)):
                program = folder / name
                end = "kill -9 $$" if code is None else f"exit {code}"
                program.write_text(f"#!/bin/sh\necho out of {name}\necho err of {name} >&2\n{end}\n")
                program.chmod(0o755)
                tests.append((name, str(program)))
            printed = folder / "printed"
            with printed.open("w") as out, redirect_stdout(out):
                failed = rust_tests.run_all(tests, folder / "logs")
            self.assertEqual(sorted(failed), ["bad", "killed"])
            for name, _ in tests:
                self.assertIn(f"out of {name}\nerr of {name}", printed.read_text())


if __name__ == "__main__":
    unittest.main()
