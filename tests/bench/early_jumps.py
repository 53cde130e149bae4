"""Jumps early and often: can they win at the learning rate that was best in a sweep?

    python tests/bench/early_jumps.py --run-dir runs/early          # seeds 10 to 14, 40 minutes

GRPO saves a checkpoint every 5 steps. `once` jumps at step 50 and trains on to 250. `often` jumps
at 50, 100, 150 and 200: each time the jump is merged into the model, and a new LoRA goes on from
there. Each has its control, the same without the jump. Measured on validation problems, never on
the test problems. If it is interrupted, type it again: what is done is skipped. The page that it
printed is .github/results/search/early.md.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common.reproduce.estimates import over_seeds
from common.reproduce.runner import DEFAULTS  # threads and allocator

HALF, EVERY, TOTAL, K, ALPHA, RATE = 50, 5, 250, 4, 1.5, 1e-3
RECIPES = ("next-aligned", "weighted")
ONCE = {"none": "none", **{name: f"{name}_alpha{ALPHA}" for name in RECIPES}}


def call(script: str, run: pathlib.Path, *flags) -> None:
    """Runs a command as a person would type it; its output goes to a log beside the run."""
    command = [sys.executable, script, "--config", "demo", "--run-dir", str(run), *map(str, flags)]
    environment = DEFAULTS | {"ACCELERATE_USE_CPU": "true"} | os.environ
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "commands.log", "a", encoding="utf-8") as log:
        print("$", *command, file=log, flush=True)
        subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=log, stderr=log)


def jump(run: pathlib.Path, method: str, *flags) -> None:
    """Stages 2 to 4 on the checkpoints of the run's first 50 steps."""
    call("02_extract_deltas.py", run, "--last-step", HALF, "--k", K, "--fit-checkpoints", 8)
    if method.startswith("next-"):
        recipe = ("--recipes", method.removeprefix("next-"))
        call("03_train_predictor.py", run, *recipe)
        method, flags = "next", (*recipe, *flags)
    call("04_extrapolate.py", run, "--methods", method, "--alphas", ALPHA, *flags)


def measured(root: pathlib.Path, run: pathlib.Path, policy: str, *flags) -> float:
    """The accuracy of a policy on the validation problems."""
    flags = ("--policies", policy, "--test-data", root / "data" / "valid.jsonl", *flags)
    call("06_eval.py", run, *flags, "--output", "validation")
    (path,) = run.glob(f"validation/{policy.replace('/', '__')}/*.json")
    return json.loads(path.read_text())["accuracy"]


def seed(root: pathlib.Path, number: int) -> dict[str, float]:
    """What every way comes to after 250 steps of RL, with this seed."""
    first, found = root / f"seed{number}" / "grpo", {}
    problems = ("--train-data", root / "data" / "train.jsonl", "--learning-rate", RATE)
    given = ("--backbone", root / "backbone", *problems, "--seed", number)
    backbone = ("--backbone", root / "backbone")
    call("01_train_lora_grpo.py", first, *given, "--steps", HALF, "--save-every", EVERY)
    for method in (*RECIPES, "none"):
        jump(first, method, "--merge")
    call("01_train_lora_grpo.py", first, *given, "--steps", TOTAL, "--save-every", HALF)
    found["GRPO"] = measured(root, first, f"train/step_{TOTAL:04d}", *backbone)
    for method, start in ONCE.items():
        more = ("--start", start, "--more-steps", TOTAL - HALF, "--save-every", TOTAL - HALF)
        call("05_continue_rl.py", first, *given, *more)
        found[f"{method}, once"] = measured(
            root, first, f"continued/{start}/step_{TOTAL:04d}", *backbone
        )
    for method, start in ONCE.items():
        run = first
        for step in range(2 * HALF, TOTAL + 1, HALF):
            backbone = ("--backbone", run / "merged" / start)
            run = root / f"seed{number}" / method / f"from{step - HALF}"
            own = (*backbone, *problems, "--seed", number + 1000 * step)
            call("01_train_lora_grpo.py", run, *own, "--steps", HALF, "--save-every", EVERY)
            if step < TOTAL:
                jump(run, method, "--merge")
        found[f"{method}, often"] = measured(root, run, f"train/step_{HALF:04d}", *backbone)
    return found


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--run-dir", type=pathlib.Path, default="runs/early")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(10, 15)])
    args = parser.parse_args()
    root = args.run_dir.resolve()
    command = [sys.executable, "-m", "common.demo", "--run-dir", str(root)]
    subprocess.run(command, cwd=ROOT, check=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as lanes:
        rows = [*lanes.map(lambda number: seed(root, number), args.seeds)]
    print(f"Seeds {args.seeds}, validation problems, {TOTAL} RL steps at {RATE:g}\n")
    print("| way | accuracy % ± s.e. | − GRPO [95%] | − the same without a jump [95%] |")
    print("|---|--:|--:|--:|")
    for way in rows[0]:
        own, control = [row[way] for row in rows], f"none, {way.split(', ')[-1]}"
        cells = [over_seeds(own).plain(100, 1)]
        for other in ("GRPO", control):
            pairs = [row[way] - row[other] for row in rows] if other in rows[0] else []
            cells.append(over_seeds(pairs).points() if any(pairs) else "–")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
