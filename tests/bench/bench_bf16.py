"""What it costs to save a LoRA's factors in bf16: the share of a delta that is then rounding.

    python tests/bench/bench_bf16.py --run-dir runs/demo

Run it by hand. It takes the adapters that stage 2 used, rounds their factors, and compares dense
deltas over one checkpoint (local) and over k (target): |D_rounded - D| / |D|.
"""

import argparse
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common.files import adapters, deltas
from common.rank1 import LowRank


def share(now: adapters.Adapter, before: adapters.Adapter) -> float:
    """The share of W(now) - W(before) that is rounding, median over matrices."""
    measured = []
    for module in now.factors:
        new, old = now.update(module), before.update(module)
        delta, rounded = (new - old).dense(), round_factors(new) - round_factors(old)
        measured.append(float((rounded.dense() - delta).norm() / delta.norm()))
    return statistics.median(measured)


def round_factors(matrix: LowRank) -> LowRank:
    """The matrix with factors that were saved in bf16."""
    (term,) = matrix.terms
    return LowRank(term.left.bfloat16().double(), term.right.bfloat16().double(), term.weight)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--run-dir", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    run = parser.parse_args().run_dir
    index = deltas.read_index(run / "deltas")
    paths, k = [(int(s), run / p) for s, p in index["checkpoints"].items()], index["k"]
    print("| delta | rounding |\n|---|--:|")
    for back in (1, k):
        (last, now), (first, before) = paths[-1], paths[-1 - back]
        found = share(adapters.read_adapter(now), adapters.read_adapter(before))
        print(f"| step {first} to {last} | {found:.1%} |")
