"""ARCHITECTURE.md and CONTRIBUTING.md: the rooms they list are those of src, the files they name are there."""

import pathlib
import re
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def rooms():
    return {path.stem for path in (ROOT / "src").glob("*.rs")} - {"lib", "main"}


class Documents(unittest.TestCase):
    def test_the_architecture_lists_every_room_and_no_other(self):
        listed = re.findall(r"^\| `(\w+)` \|", text("ARCHITECTURE.md"), flags=re.MULTILINE)
        self.assertCountEqual(listed, rooms())

    def test_every_file_that_is_named_is_there(self):
        for document in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
            named = re.findall(r"`((?:src|tests|ops|benches|schemas|docs|clients)/[\w./-]+)`", text(document))
            self.assertGreater(len(named), 5)
            for name in named:
                with self.subTest(f"{document}: {name}"):
                    self.assertTrue((ROOT / name).exists())

    def test_every_file_of_a_room_that_is_named_is_there(self):
        named = re.findall(rf"`((?:{'|'.join(sorted(rooms()))})/[\w/]+\.rs)`", text("CONTRIBUTING.md"))
        self.assertGreater(len(named), 3)
        for name in named:
            with self.subTest(name):
                self.assertTrue((ROOT / "src" / name).exists())


if __name__ == "__main__":
    unittest.main()
