r"""The demo's task and backbone: a tiny Qwen2 that can add by thinking or by guessing.

    python -m common.demo --run-dir runs/demo    # writes runs/demo/backbone and runs/demo/data

The task is the sum of two five-digit numbers. Pre-training shows two ways to answer `12345+48967`:

    careful (10%)   5+7+0=12,4+6+1=11,3+9+1=13,2+8+1=11,1+4+1=06;\boxed{61312}
    guess   (90%)   \boxed{61312}

The careful way takes a column a step, and one column in ten slips. In a guess 35% of the digits are
replaced. So the model mostly guesses and is mostly wrong, but it can think. Reward alone teaches it
to: accuracy and response length rise together. The backbone, made by tests/bench/demo_backbone.py,
is an ordinary Hugging Face folder, the problems are ordinary JSONL; the stages know no demo.
"""

import argparse
import json
import pathlib
import random
from collections.abc import Iterable

from common.files.write import atomic_dir, copy_files, write_text

SHIPPED = pathlib.Path(__file__).parent / "backbone"
LOW, HIGH = 10_000, 99_999  # of the numbers that are added
TRAIN_PROBLEMS, TEST_PROBLEMS, VALID_PROBLEMS = 4096, 256, 256
Pair = tuple[int, int]


def problems(count: int, seed: int, exclude: Iterable[Pair] = ()) -> list[Pair]:
    """`count` different pairs of numbers, none in `exclude` in either order."""
    rng, found = random.Random(seed), []
    seen = {*exclude} | {(b, a) for a, b in exclude}
    while len(found) < count:
        a, b = rng.randint(LOW, HIGH), rng.randint(LOW, HIGH)
        if (a, b) not in seen:
            seen |= {(a, b), (b, a)}
            found.append((a, b))
    return found


def test_problems() -> list[Pair]:
    """The fixed test set. RLVR and pre-training both leave it out."""
    return problems(TEST_PROBLEMS, seed=20260414)


def write_data(folder: pathlib.Path) -> None:
    """train.jsonl, test.jsonl and valid.jsonl. No problem is in two of them.

    valid.jsonl is for methods that choose by accuracy. Pre-training may have seen its problems.
    """
    test = test_problems()
    train = problems(TRAIN_PROBLEMS, seed=1, exclude=test)
    valid = problems(VALID_PROBLEMS, seed=2, exclude=test + train)
    for name, pairs in (("train", train), ("test", test), ("valid", valid)):
        rows = [{"prompt": f"{a}+{b}", "answer": str(a + b), "kind": "number"} for a, b in pairs]
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """`python -m common.demo`."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--run-dir", type=pathlib.Path, required=True, help="where to write")
    run = parser.parse_args().run_dir
    if not (run / "backbone").exists():
        with atomic_dir(run / "backbone") as folder:
            copy_files([*SHIPPED.iterdir()], folder)
    write_data(run / "data")
    print(f"wrote {run}/backbone and {run}/data")
