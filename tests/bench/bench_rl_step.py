"""Seconds of a demo RL step by phase, tokens a second of the rollouts, and the peak memory of every
stage. Run by hand, alone.

python tests/bench/bench_rl_step.py [--steps 60]
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common.files import read as inputs

raw = argparse.RawDescriptionHelpFormatter
parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
counted = "RL steps to time, after 10 that are not counted"
parser.add_argument("--steps", type=int, default=60, help=counted)
steps = parser.parse_args().steps + 10


def run(*argv: str) -> float:
    """Runs a command; returns its peak resident memory in MB."""
    process = subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, argv
    return usage.ru_maxrss / 1024


with tempfile.TemporaryDirectory() as scratch:
    where = ["--config", "demo", "--run-dir", scratch]
    run("-m", "common.demo", "--run-dir", scratch)
    # a higher rate, so that responses reach the length of a trained policy within the bench
    more = ["--steps", str(steps), "--learning-rate", "1e-4"]
    peak = {"01": run("01_train_lora_grpo.py", *where, *more)}
    rows = inputs.read_jsonl(pathlib.Path(scratch) / "train" / "metrics.jsonl")[10:]
    for phase in ("sync", "rollout", "reward", "logprob", "update", "save"):
        middle = statistics.median(row["seconds_by_phase"][phase] for row in rows)
        print(f"{phase:8} {middle:.3f} s")
    middle = statistics.median(row["seconds"] for row in rows)
    print(f"step     {middle:.3f} s (median of {len(rows)})")
    speed = [row["tokens"] / row["seconds_by_phase"]["rollout"] for row in rows]
    first, latest = (row["response_length"] for row in (rows[0], rows[-1]))
    print(f"rollout  {statistics.median(speed):,.0f} tokens a second ", end="")
    print(f"(from {min(speed):,.0f} to {max(speed):,.0f}), ", end="")
    print(f"responses of {first:.0f} to {latest:.0f} tokens")
    last = str(steps // 10 * 10)
    short = ["--last-step", last, "--k", "2", "--fit-checkpoints", "4"]
    peak["02"] = run("02_extract_deltas.py", *where, *short)
    peak["03"] = run("03_train_predictor.py", *where, "--recipes", "aligned")
    peak["04"] = run("04_extrapolate.py", *where, "--recipes", "aligned")
    on = ["--start", "next-aligned_alpha1.5", "--more-steps", "5"]
    peak["05"] = run("05_continue_rl.py", *where, *on)
    peak["06"] = run("06_eval.py", *where, "--policies", "backbone", "extrapolated/*")
    print("peak memory, MB:", "  ".join(f"{stage} {value:.0f}" for stage, value in peak.items()))
