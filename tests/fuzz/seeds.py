"""Writes what the fuzzers begin with: real candidates, the examples of the schemas, a few URLs.

    python3 tests/fuzz/seeds.py OUT

makes a folder of files for each target in OUT. The first byte of most is a choice, see tests/intake/fuzz.rs.
"""

import json
import sys
from pathlib import Path

import msgpack

ROOT = Path(__file__).resolve().parents[2]
CANDIDATES = ROOT / "tests/model/candidates"
LARGEST = 1 << 16
URLS = [
    "https://a.example/c/x.json",
    "https://a.example:443/c/x?sig=1#part",
    "https://user@a.example/c/x",
    "https://A.EXAMPLE/c/../c/%2e%2e/x",
    "https://127.0.0.1/c/x",
    "https://[::ffff:10.0.0.1]/c/x",
    "s3://bucket/folder/candidate",
    "gs://bucket/x",
    "az://bucket/x",
    "file:///srv/candidates/../x",
    "https:\\\\a.example\\c\\x",
    "https://xn--bcher-kva.example/c/\u00fc",
]


def main(out: Path) -> None:
    seeds = {"url": [url.encode() for url in URLS], "manifest": examples("update_manifest.v1")}
    bodies = [json.loads(body) for body in examples("score_job.v1") + examples("control.v1")]
    seeds["job"] = [b"\0" + json.dumps(body).encode() for body in bodies]
    seeds["job"] += [b"\1" + msgpack.packb(body) for body in bodies]
    index = json.loads((CANDIDATES / "formats/index.json").read_text())
    for listed in index["files"] + index["refused"]:
        body = (CANDIDATES / "formats" / listed["file"]).read_bytes()
        seeds.setdefault(listed["format"], []).append((b"\1" if listed["compression"] else b"\0") + body)
    seeds["binary_v2"] += [b"\0" + path.read_bytes() for path in CANDIDATES.glob("*.json")]
    for target, bodies in seeds.items():
        folder = out / target
        folder.mkdir(parents=True, exist_ok=True)
        for number, body in enumerate(body for body in bodies if len(body) <= LARGEST):
            (folder / f"seed-{number}").write_bytes(body)


def examples(schema: str) -> list[bytes]:
    found = sorted((ROOT / "schemas/examples").glob(f"*/{schema}-*.json"))
    assert found, f"no examples of {schema}"
    return [path.read_bytes() for path in found]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
