"""What one run came to: every measured policy of a run directory, with its steps and its cost."""

import bisect
import dataclasses
import functools
import itertools
import math
import pathlib
import re

import torch

from common import UserError
from common.files.read import matches, read_json, read_jsonl

NAMES = {  # of each method, in tables and figures alike, in the order of the tables
    "backbone": "Backbone",
    "grpo": "GRPO with LoRA",
    "next-paper": "NExt, published recipe",
    "next-aligned": "NExt, aligned recipe",
    "weighted": "weighted sum (no network)",
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
FULL_GRPO = "GRPO, full parameters"  # "grpo" in a run without LoRA
MAIN_ALPHA = 1.5  # the paper's extending coefficient: the alpha of the tables
OWN_ALPHA = {"expo": 0.5}  # methods whose alpha means something else
FROM_DELTAS = ("next", "weighted", "repeat-last", "recent-locals")  # methods that need stage 2
BY_ACCURACY = ("alpharl-pls", "greedy-soup")  # methods that measure every checkpoint
TESTED = (
    "predictor",
    "copy-global",
    "repeat-last",
    "recent-locals",
    "linear-fit",
    "weighted",
    "oracle",
)
LOGGED = {"step": int, "seconds": float, "accuracy": float, "response_length": float}
RECORD = {"policy": str, "n": int, "response_length": float, "by_problem": list[float], "settings": dict | None,
          "data": str | None, "template_hash": str | None}  # fmt: skip
POLICY = re.compile(
    r"(?:extrapolated|merged|continued)/([^/]+?)(?:_alpha(\d+(?:\.\d+)?))?(_merged)?(?:/step_\d+)?"
)
# Options of stages 1 and 5 that may differ between two runs that are compared.
NOT_TRAINING = {
    *("backbone", "train_data", "steps", "more_steps", "start", "restart", "seed", "save_every"),
    *("engine", "vllm_options", "max_logprob_gap", "micro_tokens", "gradient_checkpointing"),
    *("verifier_seconds", "mixed_precision", "resume_every", "log_every", "report_to"),
    *("prompt_column", "answer_column", "data_split"),
}


@dataclasses.dataclass
class Result:
    """One measured policy. A score is the mean of a problem's runs, in 0..1."""

    policy: str  # the path below the run directory
    method: str  # a key of NAMES, with "_merged" where stage 5 was told so
    alpha: float | None
    steps: int  # RL steps it took
    scores: dict[str, torch.Tensor]  # task -> [problems]
    samples: dict[str, int]  # task -> responses
    lengths: dict[str, float]  # task -> mean tokens of a response
    measured: dict[str, dict]  # task -> the options of stage 6, and the hash of the template
    data: dict[str, str]  # task -> hash of its problems
    trained: dict  # the options of stage 1 or 5
    tasks: tuple[str, ...]  # those whose plain mean is the accuracy
    seconds: float | None = None  # wall: RL and the method's own computing

    @property
    def accuracy(self) -> float:
        return sum(float(self.scores[task].mean()) for task in self.tasks) / len(self.tasks)

    @property
    def error(self) -> float:
        """The standard error over problems."""
        return standard_error([self.scores[task] for task in self.tasks])

    @property
    def n(self) -> int:
        return sum(self.samples[task] for task in self.tasks)

    @property
    def length(self) -> float:
        return sum(self.lengths[task] for task in self.tasks) / len(self.tasks)

    @property
    def jumped(self) -> bool:
        """Whether stage 4 made it, before any more RL."""
        return self.policy.startswith(("extrapolated/", "merged/"))

    @property
    def label(self) -> str:
        if self.method == "none_merged":
            return NAMES[self.method]
        method, last = split_name(self.method.removesuffix("_merged"))
        name = method_name(method, self.trained.get("tune") == "full")
        name += f", last {last} checkpoints" if last else ""
        name += ", merged restart" if self.method.endswith("_merged") else ""
        merged = self.policy.startswith("merged/") and not method.startswith("dare")
        return name + (", merged" if merged else "")


def standard_error(scores: list[torch.Tensor]) -> float:
    """Of the plain mean of tasks: scores[task] is [problems], one observation a problem."""
    variances = [float(s.var()) / len(s) if len(s) > 1 else math.nan for s in scores]
    return sum(variances) ** 0.5 / len(scores)


def method_name(method: str, full: bool) -> str:
    """The name of `method` in tables; `full` for a run in which all parameters were trained."""
    return FULL_GRPO if method == "grpo" and full else NAMES.get(method, method)


def split_name(method: str) -> tuple[str, str]:
    """The method, and of how many last checkpoints: next-aligned-last8 -> (next-aligned, 8)."""
    return re.fullmatch(r"(.*?)(?:-last(\d+))?", method, re.DOTALL).groups(default="")


def suite_of(task: str) -> str:
    """The benchmark that a task is a part of. Only tasks of one suite are averaged."""
    return next((name for name in ("gpqa", "mmlu-pro") if task.startswith(name)), "maths")


def load_results(run: pathlib.Path) -> dict[str, Result]:
    """Every measured policy of the run directory `run`, by its path."""
    found = {}
    for folder in sorted((run / "eval").glob("*")):
        tasks = {
            path.stem: read_json(path, "06_eval.py", RECORD)
            for path in sorted(folder.glob("*.json"))
        }
        if not tasks:
            continue
        policy = next(iter(tasks.values()))["policy"]
        if policy.replace("/", "__") != folder.name:
            raise UserError(f"{folder} holds results of {policy!r}: move it away")
        steps = 0 if policy == "backbone" else jump_info(run, policy)["step"]
        method, alpha = policy if policy == "backbone" else "grpo", None
        if match := POLICY.fullmatch(policy):
            method, alpha = match[1] + (match[3] or ""), float(match[2]) if match[2] else None
        same = [task for task in tasks if suite_of(task) == suite_of(next(iter(tasks)))]
        found[policy] = Result(
            policy, method, alpha, steps,
            scores={task: torch.tensor(t["by_problem"], dtype=torch.float64) for task, t in tasks.items()},
            samples={task: t["n"] for task, t in tasks.items()},
            lengths={task: t["response_length"] for task, t in tasks.items()},
            measured={
                task: {**(t.get("settings") or {}), "template_hash": t.get("template_hash")}
                for task, t in tasks.items()
            },
            data={task: f"{t.get('data')} {len(t['by_problem'])}" for task, t in tasks.items()},
            trained=training_options(run, policy),
            tasks=tuple(same),
        )  # fmt: skip
        found[policy].seconds = wall_seconds(run, found[policy])
    return found


def training_options(run: pathlib.Path, policy: str) -> dict:
    """What `policy` was trained with: the options that decide the result, and the hash of its data."""
    folder = run / "train" if policy.startswith("train/") else (run / policy).parent
    if not policy.startswith(("train/", "continued/")) or not (folder / "config.json").is_file():
        folder = run / "train"
    if not (folder / "config.json").is_file():
        return {}
    kinds = {"config": dict, "inputs": dict | None}
    found = read_json(folder / "config.json", "01_train_lora_grpo.py", kinds)
    data = pathlib.Path(str(found["config"].get("train_data"))).name
    hashes = found.get("inputs") or {}
    options = {key: value for key, value in found["config"].items() if key not in NOT_TRAINING}
    return {**options, "training data": hashes.get("train_data", hashes.get(data))}


def jump_info(run: pathlib.Path, policy: str) -> dict:
    """checkpoint.json of `policy`; what is merged may have it beside the adapter alone."""
    name = policy.split("/", 1)[-1]
    places = [
        run / place / "checkpoint.json"
        for place in (policy, f"extrapolated/{name}", f"merged/{name}")
    ]
    path = next((place for place in places if place.is_file()), places[0])
    kinds = {"step": int, "seconds": float | None}
    return read_json(path, "the stage that wrote this checkpoint", kinds)


# ----------------------------------------------------------------------------------------------
# Seconds
# ----------------------------------------------------------------------------------------------


def rl_seconds(folder: pathlib.Path, last_step: int) -> float:
    """Wall seconds of the RL steps logged in `folder` up to `last_step`."""
    path = folder / "metrics.jsonl"
    steps, seconds = _logged_seconds(path, path.stat().st_mtime_ns)
    return seconds[bisect.bisect_right(steps, last_step)]


@functools.lru_cache(maxsize=64)
def _logged_seconds(path: pathlib.Path, changed: int) -> tuple[list[int], list[float]]:
    """The logged steps, and the seconds up to each. `changed`, the file's time, keeps it fresh."""
    rows = sorted((row["step"], row["seconds"]) for row in read_jsonl(path, LOGGED))
    seconds = itertools.accumulate((seconds for _, seconds in rows), initial=0.0)
    return [step for step, _ in rows], list(seconds)


def own_seconds(run: pathlib.Path, method: str, name: str) -> dict[str, float]:
    """Wall seconds of what `method` adds to RL. `name` is its folder, as weighted_alpha1.5."""
    base, done = (
        method.partition("-")[0] if method.startswith("next-") else method,
        {"seconds": float},
    )
    parts = {"extrapolation": jump_info(run, f"extrapolated/{name}").get("seconds") or 0.0}
    if base in FROM_DELTAS:
        parts["SVD"] = read_json(run / "deltas" / "done.json", "02_extract_deltas.py", done)[
            "seconds"
        ]
    if base == "next":
        trained = run / "predictor" / method.removeprefix("next-") / "done.json"
        done = {"training_seconds": float}
        parts["predictor"] = read_json(trained, "03_train_predictor.py", done)["training_seconds"]
    if base in BY_ACCURACY:
        paths = run.glob("validation/*__step_*/*.json")
        parts["validation"] = sum(
            read_json(path, "06_eval.py", {"seconds": float})["seconds"] for path in paths
        )
    return parts


def wall_seconds(run: pathlib.Path, result: Result) -> float | None:
    """What it took to get this policy: RL before the jump, the method's own computing, RL after it.

    None where that is not known (the run was another trainer's) or no fair cost (the oracle).
    """
    if not (run / "train" / "metrics.jsonl").is_file() or result.method == "oracle":
        return None
    if result.method in ("backbone", "grpo"):
        return rl_seconds(run / "train", result.steps) if result.steps else 0.0
    name, method = result.policy.split("/")[1], result.method.removesuffix("_merged")
    name = name.removesuffix("_merged")
    seconds = rl_seconds(run / "train", jump_info(run, f"extrapolated/{name}")["step"])
    seconds += sum(own_seconds(run, method, name).values())
    if result.policy.startswith("continued/"):
        seconds += rl_seconds(run / "continued" / result.policy.split("/")[1], result.steps)
    return seconds


def read_predictor_report(path: pathlib.Path) -> dict:
    """What stage 3 wrote of one predictor: losses by family, and its backtest or None."""
    kinds = {"losses": dict[str, list[float]], "loss_of_zeros": dict[str, float], "loss_stride": int,
             "backtest": dict | None}  # fmt: skip
    found = read_json(path, "03_train_predictor.py --overwrite", kinds)
    rows = {key: {"cosine": float} for key in TESTED if key in (found["backtest"] or {})}
    tested = {"at_step": int, "predicts_step": int, "predictor": dict, **rows}
    if found["backtest"] and not matches(found["backtest"], tested):
        raise UserError(f"{path} has no usable backtest: run 03_train_predictor.py --overwrite")
    if found["losses"].keys() - found["loss_of_zeros"].keys():
        raise UserError(
            f"{path} has no usable loss_of_zeros: run 03_train_predictor.py --overwrite"
        )
    return found
