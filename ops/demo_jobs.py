"""Score jobs, one JSON object per line, for the cases of tests/model/cases.json.

    python3 ops/demo_jobs.py CASES.json --version 7 [--count 40] > jobs.ndjson

Takes the cases that the demonstration's package can judge (next-token objective, a version that is not still to come),
in turn from every kind, so that forty show all there is. A candidate travels inside the job when it fits, else as a
file:// URL with its digest. Standard library only.
"""

import argparse
import base64
import hashlib
import itertools
import json
import pathlib
import sys

MAX_INLINE_BYTES = 4 * 1024 * 1024  # the default of candidates.max_inline_bytes


def usable(case, version):
    """Newer versions would climb the retry ladder for minutes; validate jobs carry no candidate."""
    return bool(case.get("file")) and case.get("label_shift", 1) == 1 and case["model_version"] <= version


def in_turn(cases, count):
    """The first of every kind, then the second of every kind, and so on, up to `count`."""
    kinds = {}
    for case in cases:
        kinds.setdefault(case["kind"], []).append(case)
    rounds = itertools.zip_longest(*kinds.values())
    return [case for round_ in rounds for case in round_ if case is not None][:count]


def candidate(case, folder):
    path = (folder / case["file"]).resolve()
    data = path.read_bytes()
    fields = {
        "format": case["format"],
        "semantics": case["semantics"],
        "sha256": case.get("sha256") or hashlib.sha256(data).hexdigest(),
        "size": len(data),
    }
    if case.get("learning_rate") is not None:
        fields["learning_rate"] = case["learning_rate"]
    if case.get("compression"):
        fields["compression"] = case["compression"]
    if len(data) <= MAX_INLINE_BYTES:
        fields["data"] = base64.b64encode(data).decode()
    else:
        fields["url"] = path.as_uri()
    return fields


def job(case, folder):
    validation = {"nonce": case.get("nonce") or ""}
    if case.get("shards"):
        validation["shards"] = case["shards"]
    return {
        "v": 1,
        "kind": "score",
        "submission_id": case["name"],
        "model_version": case["model_version"],
        "candidate": candidate(case, folder),
        "validation": validation,
        "context": {"kind": case["kind"]},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=pathlib.Path)
    parser.add_argument("--version", type=int, required=True, help="the model version of the package")
    parser.add_argument("--count", type=int, default=40)
    arguments = parser.parse_args()
    cases = json.loads(arguments.cases.read_text())["cases"]
    chosen = in_turn([case for case in cases if usable(case, arguments.version)], arguments.count)
    if not chosen:
        sys.exit(f"{arguments.cases} holds no case for version {arguments.version}: run the generator in tests/model again.")
    for case in chosen:
        print(json.dumps(job(case, arguments.cases.parent)))


if __name__ == "__main__":
    main()
