"""The package as it is installed: what its wheel holds, and its command."""

import pathlib
import subprocess
import sys
import tempfile
import unittest
import zipfile

import scorer_client

PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def run(*words):
    return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True)


def run_code(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


class Package(unittest.TestCase):
    def test_the_wheel_holds_every_module_the_types_marker_and_the_command(self):
        with tempfile.TemporaryDirectory() as folder:
            # Without isolation and index: the build backend is in ops/python.txt.
            offline = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
            built = run("pip", "wheel", *offline, "--wheel-dir", folder, PACKAGE)
            self.assertEqual(built.returncode, 0, built.stderr)
            (wheel,) = pathlib.Path(folder).glob("scorer_client-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                files = {name for name in archive.namelist() if name.startswith("scorer_client/")}
                (commands,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
                entry_points = archive.read(commands).decode()
        modules = {str(path.relative_to(PACKAGE / "src")) for path in (PACKAGE / "src/scorer_client").rglob("*.py")}
        self.assertEqual(files, modules | {"scorer_client/py.typed"})
        self.assertIn("scorer-client = scorer_client.cli:main", entry_points)

    def test_the_module_runs_as_a_command(self):
        done = run("scorer_client", "--help")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("usage: scorer-client", done.stdout)

    def test_only_the_asyncio_client_needs_aio_pika(self):
        without = "import sys; sys.modules['aio_pika'] = None; import scorer_client.cli; import scorer_client.aio"
        done = run_code(without)
        self.assertEqual(done.stderr.splitlines()[-1],
                         "ModuleNotFoundError: scorer_client.aio needs the package aio-pika: install scorer-client[aio].")  # fmt: skip

    def test_every_public_name_exists(self):
        for name in scorer_client.__all__:
            self.assertTrue(hasattr(scorer_client, name), name)


if __name__ == "__main__":
    unittest.main()
