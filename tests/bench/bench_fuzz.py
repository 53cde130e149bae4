"""10,000 spoilt files, names, templates and answers, thrown at every reader. Run by hand; some minutes.

python tests/bench/bench_fuzz.py
python tests/bench/bench_fuzz.py --cases 100000 --seed 1

A traceback, a write outside the run directory or a started program ends it with the case that did
it, made as small as possible.
"""

import argparse
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_fuzz

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--cases", type=int, default=10_000)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

began, total = time.perf_counter(), {"cases": 0, "refused": 0, "accepted": 0, "outside": 0}
each = -(-(args.cases - 100) // (len(test_fuzz.READERS) - 1))
print(
    "| reader | cases | refused in one line | accepted | slowest, s | writes outside |\n|---|--:|--:|--:|--:|--:|"
)
for reader in test_fuzz.READERS:
    found = {
        "refused": 0,
        "accepted": 0,
        **test_fuzz.throw(reader, 100 if reader == test_fuzz.PARSER else each, args.seed),
    }
    print(
        f"| {reader} | " + " | ".join(str(found[key]) for key in total if key != "outside"), end=""
    )
    print(f" | {found['slowest']:.2f} | {found['outside']} |", flush=True)
    total = {key: total[key] + found[key] for key in total}
print(
    f"\n{total['cases']} cases, {total['outside']} writes outside, no traceback, {time.perf_counter() - began:.0f} s"
)
