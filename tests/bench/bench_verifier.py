"""Seconds for 1,000 ordinary answers, and what a power tower adds to them. Run by hand.

python tests/bench/bench_verifier.py
"""

import pathlib
import random
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common.rl import verifier
from common.rl.data import Problem

# (gold, right answer, wrong answer): the spread of a maths benchmark, two thirds numbers. No two
# answers of a row are alike.
ROWS = []
for i in range(100):
    ROWS += [(f"{i + 7}", f"{i + 7}", f"{i + 9}")] * 4
    power = rf"\times 10^{{{i % 30}}}"
    ROWS += [(f"{i}.5", f"{i}.50", f"{i}.6")]
    ROWS += [(f"{i + 1}.5e{i % 30}", f"{i + 1}.5 {power}", f"{i}.5 {power}")]
    ROWS += [(rf"\frac{{{i + 1}}}{{7}}", rf"\dfrac{{{i + 1}}}{{7}}", rf"\frac{{{i + 2}}}{{7}}")] * 2
    ROWS += [(rf"{i + 2}\sqrt{{3}}", rf"{i + 2} \sqrt{{3}}", rf"{i + 3}\sqrt{{3}}")]
    ROWS += [(rf"x^2+{i}x", rf"{i}x+x^2", rf"x^2-{i + 1}x")]
random.Random(0).shuffle(ROWS)
problems = [Problem("", gold) for gold, _, _ in ROWS]
right = [random.Random(i).random() < 0.5 for i in range(len(ROWS))]
responses = [
    rf"Let us see ... so the answer is \boxed{{{row[1] if ok else row[2]}}}."
    for row, ok in zip(ROWS, right, strict=True)
]

judge = verifier.Verifier(time_limit=5.0)
began = time.perf_counter()
judge.score([r"\boxed{x+y}", r"\boxed{x+z}"], [Problem("", "y+x"), Problem("", "z+x")], [True] * 2)
print(f"start of the worker         {time.perf_counter() - began:.2f} s (once a run)")
asked = sum(
    verifier.quick_verdict(verifier.extract_boxed(r), p.answer, p.kind) is None
    for r, p in zip(responses, problems, strict=True)
)
for attempt in ("first", "second"):
    began = time.perf_counter()
    scores = judge.score(responses, problems, [True] * len(responses))
    seconds = time.perf_counter() - began
    print(f"1,000 answers, {attempt:6} time  {seconds:.2f} s ({asked} of them asked math-verify)")
    assert [score == 1.0 for score in scores] == right, "a wrong verdict"
began = time.perf_counter()
tower, asked = r"\boxed{9^{9^{9^{9}}}}", [*problems, Problem("", "612")]
scores = judge.score([*responses, tower], asked, [True] * len(asked))
print(f"and one power tower         {time.perf_counter() - began:.2f} s ", end="")
print(f"(limit {judge.time_limit} s), timeouts {judge.timeouts}")
assert [score == 1.0 for score in scores[:-1]] == right
judge.close()
