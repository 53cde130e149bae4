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
CONTROLS = ("copy-global", "repeat-last", "recent-locals", "linear-fit", "weighted", "oracle")
TESTED = ("predictor", *CONTROLS)  # rows of stage 3's backtest
SUITES = ("maths", "gpqa", "mmlu-pro")  # only tasks of one suite are averaged
LOGGED = {"step": int, "seconds": float, "accuracy": float, "response_length": float}
RECORD = {"policy": str, "n": int, "response_length": float, "by_problem": list[float]}
RECORD |= {"settings": dict | None, "data": str | None, "template_hash": str | None}
POLICY = re.compile(
    r"(?:extrapolated|merged|continued)/(?:merged__)?([^/]+?)"
    r"(?:_alpha(\d+(?:\.\d+)?))?(_merged)?(?:/step_\d+)?"
)
# Options of stages 1 and 5 that may differ between two runs that are compared.
NOT_TRAINING = {
    *("backbone", "train_data", "prompt_column", "answer_column", "data_split", "engine", "seed"),
    *("steps", "more_steps", "start", "restart", "save_every", "resume_every", "log_every"),
    *("report_to", "vllm_options", "max_logprob_gap", "micro_tokens", "gradient_checkpointing"),
    *("verifier_seconds", "mixed_precision"),
}


@dataclasses.dataclass
class Result:
    """One measured policy. A score is the mean of a problem's runs, in 0..1."""

    policy: str  # the path below the run directory
    method: str  # a key of NAMES, with "_merged" where stage 5 was told so
    alpha: float | None
    trained: dict  # the options of stage 1 or 5 that decide the result
    steps: int = 0  # RL steps it took
    scores: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # task -> [problems]
    samples: dict[str, int] = dataclasses.field(default_factory=dict)  # task -> responses
    lengths: dict[str, float] = dataclasses.field(default_factory=dict)  # task -> tokens a response
    measured: dict[str, dict] = dataclasses.field(default_factory=dict)  # task -> stage 6's options
    data: dict[str, str] = dataclasses.field(default_factory=dict)  # task -> hash of its problems
    tasks: tuple[str, ...] = ()  # those whose plain mean is the accuracy
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

    def of_suite(self, suite: str) -> tuple[str, ...]:
        """The tasks of `suite` that it was measured on."""
        return tuple(task for task in self.scores if suite_of(task) == suite)

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
    """The suite of a task: mmlu-pro-biology is one of mmlu-pro; what is not known is maths."""
    return next((suite for suite in SUITES[1:] if task.startswith(suite)), SUITES[0])


def load_results(run: pathlib.Path) -> dict[str, Result]:
    """Every measured policy of the run directory `run`, by its path."""
    found = {}
    for folder in sorted((run / "eval").glob("*")):
        paths = sorted(folder.glob("*.json"))
        tasks = {path.stem: read_json(path, "06_eval.py", RECORD) for path in paths}
        if not tasks:
            continue
        policy = next(iter(tasks.values()))["policy"]
        if policy.replace("/", "__") != folder.name:
            raise UserError(f"{folder} holds results of {policy!r}: move it away")
        method, alpha = policy if policy == "backbone" else "grpo", None
        if match := POLICY.fullmatch(policy):
            method, alpha = match[1] + (match[3] or ""), float(match[2]) if match[2] else None
        result = found[policy] = Result(policy, method, alpha, training_options(run, policy))
        result.steps = 0 if policy == "backbone" else jump_info(run, policy)["step"]
        for task, record in tasks.items():
            result.scores[task] = torch.tensor(record["by_problem"], dtype=torch.float64)
            result.samples[task], result.lengths[task] = record["n"], record["response_length"]
            template = {"template_hash": record.get("template_hash")}
            result.measured[task] = (record.get("settings") or {}) | template
            result.data[task] = f"{record.get('data')} {len(record['by_problem'])}"
        result.tasks = next(t for suite in SUITES if (t := result.of_suite(suite)))
        result.seconds = wall_seconds(run, result)
    return found


def training_options(run: pathlib.Path, policy: str) -> dict:
    """The options of stage 1 or 5 that decide what `policy` is, and the hash of its data."""
    folder = (run / policy).parent if policy.startswith("continued/") else run / "train"
    if not (folder / "config.json").is_file():
        return {}
    kinds = {"config": dict, "inputs": dict | None}
    found = read_json(folder / "config.json", "the stage that wrote it", kinds)
    config, inputs = found["config"], found.get("inputs") or {}
    data = inputs.get("train_data", inputs.get(pathlib.Path(str(config.get("train_data"))).name))
    options = {key: value for key, value in config.items() if key not in NOT_TRAINING}
    return {**options, "training data": data}


def jump_info(run: pathlib.Path, policy: str) -> dict:
    """checkpoint.json of `policy`; what is merged may have it beside the adapter alone."""
    name = policy.split("/", 1)[-1]
    folders = [run / place for place in (policy, f"extrapolated/{name}", f"merged/{name}")]
    paths = [folder / "checkpoint.json" for folder in folders]
    path = next((path for path in paths if path.is_file()), paths[0])
    return read_json(path, "the stage that made it", {"step": int, "seconds": float | None})


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
    """Wall seconds of what `method` adds to RL; `name` is its folder, as weighted_alpha1.5."""

    def seconds(path: pathlib.Path, key: str = "seconds") -> float:
        return read_json(path, "the stage that made it", {key: float})[key]

    base = "next" if method.startswith("next-") else method
    parts = {"extrapolation": jump_info(run, f"extrapolated/{name}").get("seconds") or 0.0}
    if base in FROM_DELTAS:
        parts["SVD"] = seconds(run / "deltas" / "done.json")
    if base == "next":  # without its backtest
        trained = run / "predictor" / method.removeprefix("next-") / "done.json"
        parts["predictor"] = seconds(trained, "training_seconds")
    if base in BY_ACCURACY:
        parts["validation"] = sum(map(seconds, run.glob("validation/*__step_*/*.json")))
    return parts


def wall_seconds(run: pathlib.Path, result: Result) -> float | None:
    """What it took to get this policy: RL before the jump, the method's own computing, RL after it.

    None where that is not known (the run was another trainer's) or no fair cost (the oracle).
    """
    if not (run / "train" / "metrics.jsonl").is_file() or result.method == "oracle":
        return None
    if result.method in ("backbone", "grpo"):
        return rl_seconds(run / "train", result.steps) if result.steps else 0.0
    method = result.method.removesuffix("_merged")
    name = result.policy.split("/")[1].removesuffix("_merged").removeprefix("merged__")
    seconds = rl_seconds(run / "train", jump_info(run, f"extrapolated/{name}")["step"])
    seconds += sum(own_seconds(run, method, name).values())
    if result.policy.startswith("continued/"):
        seconds += rl_seconds(run / "continued" / result.policy.split("/")[1], result.steps)
    return seconds


def read_predictor_report(path: pathlib.Path) -> dict:
    """What stage 3 wrote of one predictor: losses by family, and its backtest or None."""
    losses = {"losses": dict[str, list[float]], "loss_of_zeros": dict[str, float]}
    kinds = {**losses, "loss_stride": int, "backtest": dict | None}
    found = read_json(path, "03_train_predictor.py --overwrite", kinds)
    tested, steps = found["backtest"], {"at_step": int, "predicts_step": int}
    rows = {row: {"cosine": float} for row in TESTED if row in (tested or {})}
    if tested and not matches(tested, {**steps, "predictor": dict, **rows}):
        raise UserError(f"{path} has no usable backtest: run 03_train_predictor.py --overwrite")
    return found
