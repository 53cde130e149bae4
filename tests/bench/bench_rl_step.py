"""Seconds of a demo RL step by phase, tokens a second of the rollouts, and the peak memory of every stage. Run by hand, alone.

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

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--steps", type=int, default=60, help="RL steps to time, after 10 that are not counted"
)
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
    peak = {
        "01": run("01_train_lora_grpo.py", *where, "--steps", str(steps), "--learning-rate", "1e-4")
    }
    rows = inputs.read_jsonl(pathlib.Path(scratch) / "train" / "metrics.jsonl")[10:]
    for phase in ("sync", "rollout", "reward", "logprob", "update", "save"):
        print(
            f"{phase:8} {statistics.median(row['seconds_by_phase'][phase] for row in rows):.3f} s"
        )
    print(
        f"step     {statistics.median(row['seconds'] for row in rows):.3f} s (median of {len(rows)})"
    )
    speed = [row["tokens"] / row["seconds_by_phase"]["rollout"] for row in rows]
    print(
        f"rollout  {statistics.median(speed):,.0f} tokens a second (from {min(speed):,.0f} to {max(speed):,.0f}), "
        f"responses of {rows[0]['response_length']:.0f} to {rows[-1]['response_length']:.0f} tokens"
    )
    last = str(steps // 10 * 10)
    peak["02"] = run(
        "02_extract_deltas.py", *where, "--last-step", last, "--k", "2", "--fit-checkpoints", "4"
    )
    peak["03"] = run("03_train_predictor.py", *where, "--recipes", "aligned")
    peak["04"] = run("04_extrapolate.py", *where, "--recipes", "aligned")
    peak["05"] = run(
        "05_continue_rl.py", *where, "--start", "next-aligned_alpha1.5", "--more-steps", "5"
    )
    peak["06"] = run("06_eval.py", *where, "--policies", "backbone", "extrapolated/*")
    print("peak memory, MB:", "  ".join(f"{stage} {value:.0f}" for stage, value in peak.items()))
