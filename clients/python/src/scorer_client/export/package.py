"""A package on disk: what an export adds to its model.json, and how large it is."""

import fnmatch
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "model.json"


@dataclass(frozen=True)
class Package:
    folder: Path

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        return found

    def add(self, fields: Mapping[str, Any]) -> None:
        """Only before anybody uses the package: afterwards it never changes."""
        text = json.dumps(self.manifest() | dict(fields), indent=2) + "\n"
        new = self.folder / f".{MANIFEST}.new"
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / MANIFEST)

    def trainable(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that candidates may change."""
        manifest = self.manifest()
        tensors = {name: tuple(entry["shape"]) for name, entry in manifest["tensors"].items()}
        wanted = manifest.get("trainable")
        return tensors if wanted is None else {name: shape for name, shape in tensors.items() if matches(wanted, name)}

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, and of all of them."""
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        sizes = {str(file.relative_to(self.folder)): file.stat().st_size for file in files}
        return sizes | {"total": sum(sizes.values())}


def globs(trained: Iterable[str], others: Iterable[str]) -> list[str]:
    """Globs that match the trained names and none of the others: by the last parts, such as `*.lora_A.weight`, where they tell."""
    others, found = list(others), set()
    for name in trained:
        end = "*." + ".".join(name.split(".")[-2:])
        found.add(name if any(matches([end], other) for other in others) else end)
    return sorted(found)


def matches(wanted: Iterable[str], name: str) -> bool:
    """`*` matches any characters, everything else itself."""
    return any(fnmatch.fnmatchcase(name, glob.replace("[", "[[]").replace("?", "[?]")) for glob in wanted)
