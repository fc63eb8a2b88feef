"""The results of the demonstration as a table, each beside what tests/model/cases.json expects of it.

    python3 ops/demo_table.py CASES.json RESULTS --jobs N --seconds S

RESULTS is what `scorer submit --wait --json` printed: one result per line, or one array. Exits 1 when a job has no
result, a verdict is not the expected one, or a loss is further than 2e-6 from the independently computed one.
Standard library only.
"""

import argparse
import collections
import json
import pathlib
import sys

TOLERANCE = 2e-6
WORK = ("fetch", "decode", "apply", "forward", "restore")
LOSSES = ("loss_before", "loss_after", "delta")


def read_results(text):
    """One array, or any number of objects after one another, whatever white space lies between."""
    decoder, at, found = json.JSONDecoder(), 0, []
    while at < len(text.rstrip()):
        at += len(text[at:]) - len(text[at:].lstrip())
        value, at = decoder.raw_decode(text, at)
        found.extend(value if isinstance(value, list) else [value])
    return found


def expected_verdict(case):
    """`scored`, or the error code."""
    expect = case["expect"]
    error = expect.get("error") or expect.get("code") or expect.get("error_code")
    if isinstance(error, dict):
        error = error["code"]
    return error or "scored"


def verdict(result):
    return "scored" if result["status"] == "scored" else (result.get("error") or {}).get("code", result["status"])


def shown_verdict(result):
    return f"{result['status']}: {tendency(result) if result['status'] == 'scored' else verdict(result)}"


def tendency(result):
    """What the score means, as far as the windows can tell: the 95 % interval leaves out zero, or it does not."""
    low, high = result.get("ci95") or (float("-inf"), float("inf"))
    if result["delta"] == 0:
        return "no change"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def shown_delta(result):
    if result["status"] != "scored":
        return ""
    stderr = result.get("stderr")
    return f"{result['delta']:+.6f}" + ("" if stderr is None else f" ± {stderr:.6f}")


def work_ms(result):
    """The worker's own time: what the job waited in queues is not in it."""
    timings = result.get("timings_ms") or {}
    return sum(timings.get(stage) or 0 for stage in WORK)


def difference(result, expect):
    """The largest distance to the independent losses; None when there is nothing to compare."""
    gaps = [abs(result[key] - expect[key]) for key in LOSSES if result.get(key) is not None and expect.get(key) is not None]
    return max(gaps, default=None)


def judge(result, case):
    """A result beside its case: (agrees, difference)."""
    gap = difference(result, case["expect"]) if result["status"] == "scored" else None
    return verdict(result) == expected_verdict(case) and (gap is None or gap <= TOLERANCE), gap


def rows(results, cases):
    for result in results:
        case = cases[result["submission_id"]]
        agrees, _ = judge(result, case)
        mark = "" if agrees else f"  expected {expected_verdict(case)}"
        timings = result.get("timings_ms") or {}
        yield (
            result["submission_id"],
            case["kind"],
            shown_verdict(result) + mark,
            shown_delta(result),
            f"{timings.get('queued') or 0:.0f}",
            f"{work_ms(result):.0f}",
            result["worker_id"],
        )


def table(lines):
    """Text columns to the left, numbers to the right."""
    head = ("candidate", "kind", "verdict", "delta ± standard error", "queued ms", "work ms", "worker")
    lines = [head, *lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, tuple("─" * width for width in widths))
    align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust)
    return "\n".join("  ".join(a(cell, w) for a, cell, w in zip(align, line, widths)).rstrip() for line in lines)


def counted(results, key):
    counts = collections.Counter(result[key] for result in results)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def summary(results, cases, jobs, seconds):
    judged = [judge(result, cases[result["submission_id"]]) for result in results]
    agreed = sum(agrees for agrees, _ in judged)
    gaps = [gap for _, gap in judged if gap is not None]
    lines = [
        f"{len(results)} of {jobs} jobs answered in {seconds:.1f} s, {len(results) / max(seconds, 1e-9):.1f} jobs/s: "
        f"{counted(results, 'status')}; {counted(results, 'worker_id')}.",
        f"{agreed} of {jobs} are as computed independently with PyTorch"
        + (f"; the largest difference of a loss is {max(gaps):.1e} (allowed {TOLERANCE:.0e})." if gaps else "."),
    ]
    return "\n".join(lines), agreed == jobs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=pathlib.Path)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, required=True, help="how many were submitted")
    parser.add_argument("--seconds", type=float, required=True, help="from the first submission to the last result")
    arguments = parser.parse_args()
    cases = {case["name"]: case for case in json.loads(arguments.cases.read_text())["cases"]}
    results = {result["submission_id"]: result for result in read_results(arguments.results.read_text())}
    ordered = [results[name] for name in cases if name in results]
    text, good = summary(ordered, cases, arguments.jobs, arguments.seconds)
    print(table(rows(ordered, cases)), text, sep="\n\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
