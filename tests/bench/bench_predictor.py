"""What each predictor, each control and the oracle are worth on the demo, over several training seeds. Run by hand.

    python tests/bench/bench_predictor.py --runs runs/predictor --seeds 0 1 2 3 4 --out .github/results/predictor_demo.md

Makes what is missing in <runs>/seed<S> by calling the stages: five minutes a seed on one core. Cosine and sigma error are those of stage 3,
standing at step 100 and at step 150 with only what was known there; accuracy is stage 6's, right after the jump from step 150. Prints
Markdown: means over seeds ± their standard error, the same after subtracting repeat-last seed by seed, and shares of the oracle's gain.
"""

import argparse
import importlib
import math
import pathlib
import statistics
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common import predictor, rank1
from common.baselines import methods as extrapolators
from common.files import adapters
from common.files import deltas as delta_files
from common.files import read as inputs
from common.files import write as run_dir

stage3, stage4 = importlib.import_module("03_train_predictor"), importlib.import_module("04_extrapolate")
AT, K = 150, 50  # the jump, and the steps that a target spans
RECIPES = ("paper", "aligned", "weighted")
ROWS = {  # the folder's name in extrapolated/ -> what the table calls it
    "none": "no jump",
    "next-paper": "`paper`",
    "next-aligned": "`aligned`",
    "next-weighted": "`weighted`",
    "copy-global": "copy-global",
    "recent-locals": "recent-locals",
    "repeat-last": "repeat-last",
    "linear-fit": "linear fit",
    "rl-extra": "RL-Extra (all ranks)",
    "oracle": "oracle",
}


def stage(script: str, run: pathlib.Path, *options: str) -> None:
    """Calls a stage, or a module of `common`, on the run directory; its output is shown only when it fails."""
    where = ["-m", script, "--run-dir", str(run)] if script.startswith("common") else [script, "--config", "demo", "--run-dir", str(run)]
    done = subprocess.run([sys.executable, *where, *options], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join([*where, *options])} failed:\n{done.stdout}{done.stderr}")


def complete(run: pathlib.Path, seed: int, alphas: list[str]) -> None:
    """Everything the tables need in one run directory; what is there stays."""
    if not (run / "train" / f"step_{AT + K:04d}").is_dir():
        stage("common.demo", run)
        stage("01_train_lora_grpo.py", run, "--seed", str(seed), "--steps", str(AT + K))
    stage("02_extract_deltas.py", run, "--last-step", str(AT))
    stage("03_train_predictor.py", run, "--recipes", *RECIPES)
    stage(
        "04_extrapolate.py",
        run,
        "--recipes",
        *RECIPES,
        "--methods",
        "next",
        "repeat-last",
        "recent-locals",
        "rl-extra",
        "oracle",
        "--alphas",
        *alphas,
    )
    trajectory, last = delta_files.load_trajectory(run / "deltas"), run / "train" / f"step_{AT:04d}"
    info = inputs.read_json(last / "checkpoint.json", "01_train_lora_grpo.py")
    for name, triples in stage3.controls(trajectory).items():
        for alpha in alphas:
            folder = run / "extrapolated" / f"{name}_alpha{float(alpha):g}"
            if name in ROWS and not folder.is_dir():
                jumped = extrapolators.add_rank1(adapters.read_adapter(last), triples, float(alpha))
                adapters.write_adapter(folder, jumped, {**info, "method": name, "alpha": float(alpha), "seconds": 0.0})
    stage("06_eval.py", run, "--policies", f"train/step_{AT:04d}", f"train/step_{AT + K:04d}", "extrapolated/*")


def backtest(run: pathlib.Path, at: int) -> dict[str, dict]:
    """Row -> stage 3's scores of the prediction made at step `at`, every recipe fitted on what was known there."""
    whole = delta_files.load_trajectory(run / "deltas")
    past = whole.until(whole.steps.index(at) + 1)
    now, future = (adapters.read_adapter(run / "train" / f"step_{step:04d}") for step in (at, at + K))
    found = {name: stage3.score(triples, now, future) for name, triples in stage3.controls(past).items()}
    for name in RECIPES:
        if at == AT:
            models = stage4.load_predictors(run / "predictor" / name, whole, predictor.RECIPES[name])
            found[f"next-{name}"] = stage3.score(predictor.predict(models, whole, predictor.RECIPES[name]), now, future)
        else:  # stage 3's own backtest
            report = inputs.read_json(run / "predictor" / name / "report.json", "03_train_predictor.py")["backtest"]
            assert report["at_step"] == at, report
            found[f"next-{name}"] = report["predictor"]
    true = {}
    for module, factors in now.factors.items():
        u, sigma, v = rank1.svd_of_product(*(x.double() for x in rank1.delta_factors(future.factors[module], factors, now.scale(module))))
        true[module] = (u, sigma[0], v)
    return {**found, "oracle": stage3.score(true, now, future)}


def measure(run: pathlib.Path, alphas: list[str]) -> dict[tuple[str, str], float]:
    """(row, column) -> number, for one seed."""
    found = {}
    for at in (AT - K, AT):
        for row, scores in backtest(run, at).items():
            for column, key in (("cosine", "cosine"), ("sigma error", "sigma_error")):
                found[row, f"{column}, {at} → {at + K}"] = scores[key]

    def accuracy(policy: str) -> float:
        return 100 * inputs.read_json(run / "eval" / policy.replace("/", "__") / "test.json", "06_eval.py")["accuracy"]

    for alpha in alphas:
        for row in ROWS:
            policy = f"train/step_{AT:04d}" if row == "none" else f"extrapolated/{row}_alpha{float(alpha):g}"
            found[row, f"accuracy %, alpha {alpha}"] = accuracy(policy)
    return found


def table(seeds: list[dict], control: str | None = None) -> str:
    """Mean ± standard error over seeds; of the differences from the row `control` where one is named. Columns in the order measured."""
    columns = list(dict.fromkeys(column for _, column in seeds[0]))
    columns.sort(key=lambda column: [column.startswith(start) for start in ("accuracy", "sigma", "cosine")].index(True), reverse=True)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for row in ROWS:
        cells = []
        for column in columns:
            values = [seed[row, column] - (seed[control, column] if control else 0) for seed in seeds if (row, column) in seed]
            digits, sign = 1 if column.startswith("accuracy") else 3, "+" if control else ""
            error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{sign}.{digits}f}{error}" if values else "–")
        if row != control:
            lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shares(seeds: list[dict], alphas: list[str]) -> str:
    """How much of the oracle's gain over no jump each row reaches: ratio of the mean gains in accuracy."""

    def gain(row: str, alpha: str) -> float:
        column = f"accuracy %, alpha {alpha}"
        return statistics.mean(seed[row, column] - seed["none", column] for seed in seeds)

    lines = ["| | " + " | ".join(f"alpha {alpha}" for alpha in alphas) + " |", "|---|" + "--:|" * len(alphas)]
    for row in ROWS:
        if row not in ("none", "oracle"):
            cells = (f"{gain(row, alpha) / gain('oracle', alpha):.0%}" for alpha in alphas)
            lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "predictor", help="folder of the run directories seed<S>")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="training seeds")
    parser.add_argument("--alphas", nargs="+", default=["1.5", "2.5", "4"], help="extending coefficients to measure accuracy at")
    parser.add_argument("--out", type=pathlib.Path, help="also write what is printed to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = []
    for seed in args.seeds:
        run = args.runs.resolve() / f"seed{seed}"
        complete(run, seed, args.alphas)
        seeds.append(measure(run, args.alphas))
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    text = (
        f"Demo, seeds {' '.join(map(str, args.seeds))}: mean ± standard error over seeds.\n\n{table(seeds)}\n\n"
        f"Minus repeat-last, seed by seed:\n\n{table(seeds, 'repeat-last')}\n\n"
        f"Share of the oracle's gain in accuracy over no jump:\n\n{shares(seeds, args.alphas)}\n"
    )
    print(text)
    if args.out:
        run_dir.atomic_write_text(args.out, text)


if __name__ == "__main__":
    main()
