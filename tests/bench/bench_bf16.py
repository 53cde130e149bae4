"""What it costs to save a LoRA's factors in bf16: how much of a delta between two checkpoints is then rounding. Run by hand.

    python tests/bench/bench_bf16.py --run-dir runs/demo

Takes the adapters that stage 2 used, rounds their factors, and compares dense deltas over one checkpoint (local) and over k (target):
|D_rounded - D| / |D| as measured, beside what stage 2's warning predicts from the factors alone (`rank1.rounding_share`).
"""

import argparse
import pathlib
import statistics
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common import rank1
from common.files import adapters
from common.files import deltas as delta_files


def shares(now: adapters.Adapter, before: adapters.Adapter) -> tuple[float, float]:
    """(measured, predicted) share of W(now) - W(before) that is rounding, medians over matrices."""
    measured, predicted = [], []
    for module in now.factors:
        left, right = rank1.delta_factors(now.factors[module], before.factors[module], 1.0)
        delta = left.double() @ right.double()
        rounded = left.bfloat16().double() @ right.bfloat16().double()
        measured.append(float((rounded - delta).norm() / delta.norm()))
        predicted.append(rank1.rounding_share(now.factors[module], before.factors[module], torch.bfloat16))
    return statistics.median(measured), statistics.median(predicted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    run = parser.parse_args().run_dir
    paths, k = list(delta_files.checkpoint_paths(run).items()), delta_files.load_trajectory(run / "deltas").k
    print("| delta | measured | predicted |\n|---|--:|--:|")
    for back in (1, k):
        (last, now), (first, before) = paths[-1], paths[-1 - back]
        found = shares(adapters.read_adapter(now), adapters.read_adapter(before))
        print(f"| step {first} to {last} | {found[0]:.1%} | {found[1]:.1%} |")
