"""What each predictor, control and the oracle are worth on the demo, over training seeds.

    python tests/bench/bench_predictor.py --runs runs/predictor --seeds 0 1 2 3 4 \\
        --out .github/results/predictor_demo.md

Run it by hand. It makes what is missing in <runs>/seed<S> by calling the stages: five minutes a
seed on one core. Cosine and sigma error are those of stage 3, standing at step 100 and at step 150
with only what was known there. Accuracy is stage 6's, right after the jump from step 150. It prints
Markdown: means over seeds ± their standard error, the same minus repeat-last seed by seed, and
shares of the oracle's gain.
"""

import argparse
import math
import pathlib
import statistics
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common.baselines.backtest import controls, score
from common.files import adapters, deltas, write
from common.files.read import read_json
from common.rank1 import rank1, top

AT, K = 150, 50  # the jump, and the steps that a target spans
RECIPES = ("paper", "aligned")
METHODS = ("next", "weighted", "repeat-last", "recent-locals", "rl-extra", "oracle")
ROWS = {  # the folder's name in extrapolated/ -> what the table calls it
    "none": "no jump",
    "next-paper": "`paper`",
    "next-aligned": "`aligned`",
    "weighted": "`weighted`",
    "copy-global": "copy-global",
    "recent-locals": "recent-locals",
    "repeat-last": "repeat-last",
    "linear-fit": "linear fit",
    "rl-extra": "RL-Extra (all ranks)",
    "oracle": "oracle",
}


def stage(script: str, run: pathlib.Path, *options: str) -> None:
    """Calls a stage, or a module of `common`, on `run`; its output is shown only when it fails."""
    where = ["-m", script] if script.startswith("common") else [script, "--config", "demo"]
    where += ["--run-dir", str(run)]
    command = [sys.executable, *where, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join([*where, *options])} failed:\n{done.stdout}{done.stderr}")


def complete(run: pathlib.Path, seed: int, alphas: list[str]) -> None:
    """Everything the tables need in one run directory; what is there stays."""
    if not (run / "train" / f"step_{AT + K:04d}").is_dir():
        stage("common.demo", run)
        stage("01_train_lora_grpo.py", run, "--seed", str(seed), "--steps", str(AT + K))
    stage("02_extract_deltas.py", run, "--last-step", str(AT))
    stage("03_train_predictor.py", run, "--recipes", *RECIPES)
    flags = ["--recipes", *RECIPES, "--methods", *METHODS, "--alphas", *alphas]
    stage("04_extrapolate.py", run, *flags)
    path = run / "train" / f"step_{AT:04d}"
    last, info = adapters.read_adapter(path), adapters.read_info(path)
    for name, matrices in controls(deltas.load_trajectory(run / "deltas")).items():
        for alpha in map(float, alphas):
            folder = run / "extrapolated" / f"{name}_alpha{alpha:g}"
            if name in ROWS and not folder.is_dir():
                jumped = {m: last.update(m) + alpha * matrix for m, matrix in matrices.items()}
                factors = {m: matrix.factors(last.scale(m)) for m, matrix in jumped.items()}
                made = {**info, "method": name, "alpha": alpha, "seconds": 0.0}
                adapters.write_adapter(folder, adapters.extended(last, factors), made)
    policies = [f"train/step_{AT:04d}", f"train/step_{AT + K:04d}", "extrapolated/*"]
    stage("06_eval.py", run, "--policies", *policies)


def backtest(run: pathlib.Path, at: int) -> dict[str, dict]:
    """Row -> scores of the prediction made at step `at`, with only what was known there."""
    if at != AT:  # stage 3's own backtest
        found = {}
        for name in RECIPES:
            path = run / "predictor" / name / "report.json"
            report = read_json(path, "03_train_predictor.py")["backtest"]
            assert report["at_step"] == at, report
            rows = {row: scores for row, scores in report.items() if isinstance(scores, dict)}
            rows[f"next-{name}"] = rows.pop("predictor")
            found |= rows
        return found
    folders = (run / "train" / f"step_{step:04d}" for step in (at, at + K))
    now, future = map(adapters.read_adapter, folders)
    rows, true = controls(deltas.load_trajectory(run / "deltas")), {}
    for name in RECIPES:
        predicted = deltas.load_predicted(deltas.check_predicted(run, name))
        rows[f"next-{name}"] = {module: rank1(**triple) for module, triple in predicted.items()}
    rows["oracle"] = {}
    for module in now.factors:
        delta = future.update(module) - now.update(module)
        u, sigma, v, _ = top(delta)
        true[module], rows["oracle"][module] = (delta, float(sigma[0])), rank1(u, sigma[0], v)
    return {row: score(matrices, true) for row, matrices in rows.items()}


def measure(run: pathlib.Path, alphas: list[str]) -> dict[tuple[str, str], float]:
    """(row, column) -> number, for one seed."""
    found = {}
    for at in (AT - K, AT):
        for row, scores in backtest(run, at).items():
            for column, key in (("cosine", "cosine"), ("sigma error", "sigma_error")):
                found[row, f"{column}, {at} → {at + K}"] = scores[key]

    def accuracy(policy: str) -> float:
        path = run / "eval" / policy.replace("/", "__") / "test.json"
        return 100 * read_json(path, "06_eval.py")["accuracy"]

    for alpha in alphas:
        for row in ROWS:
            jump = f"extrapolated/{row}_alpha{float(alpha):g}"
            policy = f"train/step_{AT:04d}" if row == "none" else jump
            found[row, f"accuracy %, alpha {alpha}"] = accuracy(policy)
    return found


def table(seeds: list[dict], control: str | None = None) -> str:
    """Mean ± standard error over seeds, or of the differences from the row `control`."""
    order = ("cosine", "sigma", "accuracy")
    columns = list(dict.fromkeys(column for _, column in seeds[0]))
    columns.sort(key=lambda column: order.index(column.split(",")[0].split()[0]))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for row in ROWS:
        cells = []
        for column in columns:
            there = [seed for seed in seeds if (row, column) in seed]
            values = [s[row, column] - (s[control, column] if control else 0) for s in there]
            digits, sign = 1 if column.startswith("accuracy") else 3, "+" if control else ""
            cell = f"{statistics.mean(values):{sign}.{digits}f}" if values else "–"
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"
            cells.append(cell)
        if row != control:
            lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shares(seeds: list[dict], alphas: list[str]) -> str:
    """The share of the oracle's gain over no jump that each row reaches: mean gains in accuracy."""

    def gain(row: str, alpha: str) -> float:
        column = f"accuracy %, alpha {alpha}"
        return statistics.mean(seed[row, column] - seed["none", column] for seed in seeds)

    lines = ["| | " + " | ".join(f"alpha {alpha}" for alpha in alphas) + " |"]
    lines.append("|---|" + "--:|" * len(alphas))
    for row in ROWS:
        if row not in ("none", "oracle"):
            cells = (f"{gain(row, alpha) / gain('oracle', alpha):.0%}" for alpha in alphas)
            lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    raw, runs = argparse.RawDescriptionHelpFormatter, ROOT / "runs" / "predictor"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--runs", type=pathlib.Path, default=runs, help="folder of the runs seed<S>"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--alphas", nargs="+", default=["1.5", "2.5", "4"], help="to measure accuracy at"
    )
    parser.add_argument("--out", type=pathlib.Path, help="a file to write to as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = []
    for seed in args.seeds:
        run = args.runs.resolve() / f"seed{seed}"
        complete(run, seed, args.alphas)
        seeds.append(measure(run, args.alphas))
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    text = (
        f"Demo, seeds {' '.join(map(str, args.seeds))}: mean ± standard error over seeds.\n\n"
        f"{table(seeds)}\n\n"
        f"Minus repeat-last, seed by seed:\n\n{table(seeds, 'repeat-last')}\n\n"
        f"Share of the oracle's gain in accuracy over no jump:\n\n{shares(seeds, args.alphas)}\n"
    )
    print(text)
    if args.out:
        write.write_text(args.out, text)


if __name__ == "__main__":
    main()
