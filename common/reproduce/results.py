"""What a run came to: every evaluated policy with its accuracy, its steps and the seconds it took, from the files of the run directory."""

import bisect
import collections
import dataclasses
import functools
import itertools
import math
import pathlib
import re

import torch

from common import UserError
from common.files import read as inputs
from common.predictor import RECIPES, split_name

NAMES = {  # of each method, in tables and figures alike, in the order of the tables
    "grpo": "GRPO with LoRA",
    "next-paper": "NExt, published recipe",
    "next-aligned": "NExt, aligned recipe",
    "next-weighted": "NExt, weighted recipe",
    "next-paper-no-global": "NExt, published recipe, w/o global delta",
    "next-paper-no-local": "NExt, published recipe, w/o local delta",
    "next-aligned-no-global": "NExt, aligned recipe, w/o global delta",
    "next-aligned-no-local": "NExt, aligned recipe, w/o local delta",
    "alpharl": "AlphaRL, fitted on the steps",
    "alpharl-pls": "AlphaRL, fitted on accuracy",
    "rl-extra": "RL-Extra",
    "relex": "RELEX",
    "expo": "ExPO, alpha 0.5",
    "wsm": "WSM",
    "dare_p0.9": "DARE, 90% dropped",
    "greedy-soup": "greedy soup",
    "repeat-last": "repeat-last (control)",
    "recent-locals": "recent-locals (control)",
    "none": "restart without a jump (control)",
    "none_merged": "merged restart without a jump (control)",
    "oracle": "oracle (true next delta)",
}
FULL_GRPO = "GRPO, full parameters"  # of "grpo" in a run without LoRA
KINDS = {"policy": str, "accuracy": float, "standard_error": float | None, "n": int, "response_length": float, "by_problem": list[float]}
LOGGED = {"step": int, "seconds": float, "accuracy": float, "response_length": float}  # what is looked at of metrics.jsonl
TESTED = ("predictor", "copy-global", "repeat-last", "recent-locals", "linear-fit", "oracle")  # in stage 3's backtest
MAIN_ALPHA = 1.5  # the paper's extending coefficient: the alpha of the tables


@dataclasses.dataclass
class Result:
    """One evaluated policy. accuracy and error in 0..1; by_problem [problems] holds each problem's mean score, all tasks in a row."""

    policy: str  # the path below the run directory
    method: str  # backbone, grpo, or a key of NAMES, with "_merged" where stage 5 was told so
    steps: int  # RL steps it took
    alpha: float | None
    accuracy: float
    error: float
    n: int
    length: float
    by_problem: dict[str, torch.Tensor]  # by task
    seconds: float | None = None  # RL, SVD, predictor and jump, wall
    full: bool = False  # all parameters were trained, not a LoRA
    note: str = ""  # for the label

    @property
    def label(self) -> str:
        if self.method == "none_merged":
            return NAMES[self.method]
        method, last = split_name(self.method.removesuffix("_merged"))
        name = "Backbone" if method == "backbone" else method_name(method, self.full)
        name += f", last {last} checkpoints" if last else ""
        name += ", merged restart" if self.method.endswith("_merged") else ""
        name += ", merged" if self.policy.startswith("merged/") and not method.startswith("dare") else ""
        return name + (", right after the jump" if self.jumped and self.method != "none" else "") + self.note

    @property
    def jumped(self) -> bool:
        """Whether it is what stage 4 made, before any more RL."""
        return self.policy.startswith(("extrapolated/", "merged/"))


def method_name(method: str, full: bool) -> str:
    """`method` in tables and figures; `full` for a run in which all parameters were trained."""
    return FULL_GRPO if method == "grpo" and full else NAMES.get(method, method)


def trained_whole(run: pathlib.Path) -> bool:
    """Whether stage 1 trained all parameters of the run (--tune full)."""
    path = run / "train" / "config.json"
    return path.is_file() and inputs.read_json(path, "01_train_lora_grpo.py", {"config": dict})["config"].get("tune") == "full"


def load_results(run: pathlib.Path) -> dict[str, Result]:
    """Every evaluated policy of the run, by its path; the accuracy of several tasks is their plain mean, as in the paper.

    What was measured on other tasks than most says so in its label.
    """
    found = {}
    for folder in sorted((run / "eval").glob("*")):
        paths = sorted(folder.glob("*.json"))
        tasks = [inputs.read_json(path, "06_eval.py", KINDS) for path in paths]
        if not tasks:
            continue
        policy = tasks[0]["policy"]
        if policy.replace("/", "__") != folder.name:
            raise UserError(f"{folder} holds results of {policy!r}: move it away")
        method, alpha, steps = "grpo", None, 0
        if policy != "backbone":
            steps = jump_info(run, policy)["step"]
            if match := re.fullmatch(
                r"(?:extrapolated|merged|continued)/([^/]+?)(?:_alpha(\d+(?:\.\d+)?))?(_merged)?(?:/step_\d+)?", policy
            ):
                method, alpha = match[1] + (match[3] or ""), float(match[2]) if match[2] else None
        else:
            method = "backbone"
        found[policy] = Result(
            policy,
            method,
            steps,
            alpha,
            accuracy=sum(t["accuracy"] for t in tasks) / len(tasks),
            error=math.sqrt(sum(math.nan if t.get("standard_error") is None else t["standard_error"] ** 2 for t in tasks)) / len(tasks),
            n=sum(t["n"] for t in tasks),
            length=sum(t["response_length"] for t in tasks) / len(tasks),
            by_problem={path.stem: torch.tensor(t["by_problem"], dtype=torch.float64) for path, t in zip(paths, tasks, strict=True)},
            full=trained_whole(run),
        )
        found[policy].seconds = wall_seconds(run, found[policy])
    sets = collections.Counter(tuple(result.by_problem) for result in found.values())
    for result in found.values():
        if (tasks := tuple(result.by_problem)) != sets.most_common(1)[0][0]:
            result.note = f" (on {', '.join(tasks)})"
    return found


def jump_info(run: pathlib.Path, policy: str) -> dict:
    """checkpoint.json of `policy`. A merged adapter's stands beside the adapter, dare's (which has none) in merged/."""
    name = policy.split("/", 1)[-1]
    places = [run / policy, run / "extrapolated" / name, run / "merged" / name]
    path = next((place / "checkpoint.json" for place in places if (place / "checkpoint.json").is_file()), run / policy / "checkpoint.json")
    return inputs.read_json(path, "the stage that wrote this checkpoint", {"step": int})


def difference(a: Result, b: Result) -> tuple[float, float]:
    """Accuracy of result a minus that of b and its standard error, paired by problem (both were sampled with the same seeds).

    Over the tasks that both were measured on. Raises UserError where there is none.
    """
    pairs = [(scores, b.by_problem[task]) for task, scores in a.by_problem.items() if task in b.by_problem]
    if not pairs or any(len(x) != len(y) for x, y in pairs):
        raise UserError(
            f"{a.policy} and {b.policy} were not measured on the same problems: run 06_eval.py on both with one --test-data"
        )
    gaps = [x - y for x, y in pairs]
    return sum(float(g.mean()) for g in gaps) / len(gaps), sum(float(g.var()) / len(g) for g in gaps) ** 0.5 / len(gaps)


def rl_seconds(folder: pathlib.Path, last_step: int) -> float:
    """Wall seconds of the RL steps logged in `folder` up to `last_step`."""
    path = folder / "metrics.jsonl"
    steps, seconds = _logged_seconds(path, path.stat().st_mtime_ns)
    return seconds[bisect.bisect_right(steps, last_step)]


@functools.lru_cache(maxsize=64)
def _logged_seconds(path: pathlib.Path, changed: int) -> tuple[list[int], list[float]]:
    """The logged steps in order, and the seconds up to each, from 0 on. Kept, as each policy of a report asks; `changed` is its time."""
    rows = sorted((row["step"], row["seconds"]) for row in inputs.read_jsonl(path, LOGGED))
    return [step for step, _ in rows], list(itertools.accumulate((seconds for _, seconds in rows), initial=0.0))


def read_predictor_report(path: pathlib.Path) -> dict:
    """What stage 3 wrote of one predictor: losses by family, and its backtest, None where there were too few checkpoints."""
    kinds = {"losses": dict[str, list[float]], "loss_of_zeros": dict[str, float], "loss_stride": int, "backtest": dict | None}
    found = inputs.read_json(path, "03_train_predictor.py --overwrite", kinds)
    tested, scores = found["backtest"], {key: {"cosine": float} for key in TESTED}
    if found["losses"].keys() - found["loss_of_zeros"].keys():
        raise UserError(f"{path} has losses without a loss_of_zeros: run 03_train_predictor.py --overwrite")
    if tested and not inputs.matches(tested, {"at_step": int, "predicts_step": int, **scores}):
        raise UserError(f"{path} has no usable backtest: run 03_train_predictor.py --overwrite")
    return found


def overhead(run: pathlib.Path, recipe: str, alpha: float | None = MAIN_ALPHA) -> dict[str, float]:
    """Wall seconds of what NExt adds to RL: the SVDs, the predictor's training (without its backtest), the jump by `alpha`."""
    inputs.safe_name(recipe, "a recipe")
    jump = run / "extrapolated" / f"next-{recipe}_alpha{alpha:g}" / "checkpoint.json"
    trained = run / "predictor" / recipe / "done.json"
    return {
        "SVD": inputs.read_json(run / "deltas" / "done.json", "02_extract_deltas.py", {"seconds": float})["seconds"],
        "predictor": inputs.read_json(trained, "03_train_predictor.py", {"training_seconds": float})["training_seconds"],
        "extrapolation": inputs.read_json(jump, "04_extrapolate.py", {"seconds": float})["seconds"],
    }


def cost_bars(run: pathlib.Path, results: dict[str, Result]) -> dict[str, list[float]]:
    """Fig. 5's bars, label -> wall seconds of [RLVR, SVD, predictor, extrapolation]: NExt by each recipe, and the longest plain GRPO."""
    bars = {}
    for recipe in RECIPES:
        for after in [r for r in results.values() if r.policy.startswith(f"continued/next-{recipe}_alpha{MAIN_ALPHA:g}/")][-1:]:
            extra = list(overhead(run, recipe).values())
            bars[f"NExt ({recipe}), {after.steps} steps"] = [after.seconds - sum(extra), *extra]
    plain = max((r for r in results.values() if r.method == "grpo"), key=lambda r: r.steps, default=None)
    if plain:
        bars[f"GRPO, {plain.steps} steps"] = [plain.seconds, 0.0, 0.0, 0.0]
    return bars


def wall_seconds(run: pathlib.Path, result: Result) -> float | None:
    """What it took to get this policy: the shared RL prefix, the method's own computing, the RL after the jump.

    None where that is not known (the run was another trainer's) or no fair cost (the oracle).
    """
    if not (run / "train" / "metrics.jsonl").is_file():
        return None
    if result.method in ("backbone", "grpo"):
        return rl_seconds(run / "train", result.steps) if result.steps else 0.0
    jumped = result.policy.split("/")[1].removesuffix("_merged")
    info = jump_info(run, f"extrapolated/{jumped}")
    if not inputs.matches(info, {"method": str}):
        raise UserError(f"{run}/extrapolated/{jumped}/checkpoint.json has no usable method: run 04_extrapolate.py --overwrite")
    if info["method"] == "oracle":
        return None  # it looked into the future: no fair cost
    seconds = rl_seconds(run / "train", info["step"])
    if info["method"].startswith("next-"):
        seconds += sum(overhead(run, info["method"].removeprefix("next-"), result.alpha).values())
    if result.policy.startswith("continued/"):
        seconds += rl_seconds(run / "continued" / result.policy.split("/")[1], result.steps)
    return seconds
