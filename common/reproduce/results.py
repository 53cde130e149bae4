"""What one run came to: every measured policy of a run directory, with its steps and its cost."""

import dataclasses
import functools
import math
import pathlib
import re

import torch
import yaml

from common import UserError
from common.files.read import matches, read_json, read_jsonl


def table_of(name: str):
    """The YAML file `name` beside the code."""
    return yaml.safe_load((pathlib.Path(__file__).parent / name).read_text(encoding="utf-8"))


METHODS = table_of("methods.yaml")  # name -> label, look; in the order of the tables
MAIN_ALPHA = 1.5  # the paper's extending coefficient: the alpha of the tables
OWN_ALPHA = {"expo": 0.5}  # methods whose alpha means something else
FROM_DELTAS = ("next", "weighted", "repeat-last", "recent-locals")  # methods that need stage 2
BY_ACCURACY = ("alpharl-pls", "greedy-soup")  # methods that measure every checkpoint
TESTED = ("predictor", "copy-global", "repeat-last", "recent-locals", "linear-fit", "weighted")
TESTED += ("oracle",)  # rows of stage 3's backtest
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
    method: str  # a key of METHODS, with "_merged" where stage 5 was told so
    alpha: float | None
    steps: int  # RL steps it took
    trained: dict  # the options of stage 1 or 5 that decide the result
    records: dict[str, dict]  # task -> what stage 6 wrote of it
    tasks: tuple[str, ...] = ()  # those whose plain mean is the accuracy
    seconds: float | None = None  # wall: RL and the method's own computing

    @property
    def scores(self) -> list[torch.Tensor]:
        """Of each task the scores of its problems, [problems]."""
        by_problem = [self.records[task]["by_problem"] for task in self.tasks]
        return [torch.tensor(scores, dtype=torch.float64) for scores in by_problem]

    @property
    def accuracy(self) -> float:
        return sum(float(scores.mean()) for scores in self.scores) / len(self.tasks)

    @property
    def error(self) -> float:
        return standard_error(self.scores)

    @property
    def n(self) -> int:
        return sum(self.records[task]["n"] for task in self.tasks)

    @property
    def length(self) -> float:
        """Tokens a response."""
        return sum(self.records[task]["response_length"] for task in self.tasks) / len(self.tasks)

    @property
    def jumped(self) -> bool:
        """Whether stage 4 made it, before any more RL."""
        return self.policy.startswith(("extrapolated/", "merged/"))

    def of_suite(self, suite: str) -> tuple[str, ...]:
        """The tasks of `suite` that it was measured on. What is of no other suite is maths."""
        named = {s: [task for task in self.records if task.startswith(s)] for s in SUITES[1:]}
        rest = [task for task in self.records if not task.startswith(SUITES[1:])]
        return tuple(named.get(suite, rest))

    @property
    def label(self) -> str:
        """Its name in tables."""
        if self.method == "none_merged":
            return label_of(self.method)
        method, last = split_name(self.method.removesuffix("_merged"))
        name = label_of(method, self.trained.get("tune") == "full")
        name += f", last {last} checkpoints" if last else ""
        name += ", merged restart" if self.method.endswith("_merged") else ""
        merged = self.policy.startswith("merged/") and not method.startswith("dare")
        return name + (", merged" if merged else "")


def standard_error(scores: list[torch.Tensor]) -> float:
    """Of the plain mean of tasks: scores[task] is [problems], one observation a problem."""
    variances = [float(s.var()) / len(s) if len(s) > 1 else math.nan for s in scores]
    return sum(variances) ** 0.5 / len(scores)


def label_of(method: str, full: bool = False) -> str:
    """The name of `method` in tables; `full` for a run in which all parameters were trained."""
    if method == "grpo" and full:
        return "GRPO, full parameters"
    return METHODS.get(method, {"label": method})["label"]


def split_name(method: str) -> tuple[str, str]:
    """The method, and of how many last checkpoints: next-aligned-last8 -> (next-aligned, 8)."""
    return re.fullmatch(r"(.*?)(?:-last(\d+))?", method, re.DOTALL).groups(default="")


def load_results(run: pathlib.Path) -> dict[str, Result]:
    """Every measured policy of the run directory `run`, by its path."""
    found = {}
    for folder in sorted((run / "eval").glob("*")):
        paths = sorted(folder.glob("*.json"))
        records = {path.stem: read_json(path, "06_eval.py", RECORD) for path in paths}
        if not records:
            continue
        policy = next(iter(records.values()))["policy"]
        if policy.replace("/", "__") != folder.name:
            raise UserError(f"{folder} holds results of {policy!r}: move it away")
        method, alpha = policy if policy == "backbone" else "grpo", None
        if match := POLICY.fullmatch(policy):
            method, alpha = match[1] + (match[3] or ""), float(match[2]) if match[2] else None
        steps = 0 if policy == "backbone" else jump_info(run, policy)["step"]
        trained = training_options(run, policy)
        result = found[policy] = Result(policy, method, alpha, steps, trained, records)
        result.tasks = next(tasks for suite in SUITES if (tasks := result.of_suite(suite)))
        result.seconds = wall_seconds(run, result)
    return found


def training_options(run: pathlib.Path, policy: str) -> dict:
    """The options of stage 1 or 5 that decide what `policy` is, and the hash of its data."""
    path = (run / policy).parent if policy.startswith("continued/") else run / "train"
    if not (path / "config.json").is_file():
        return {}
    kinds = {"config": dict, "inputs": dict | None}
    found = read_json(path / "config.json", "the stage that wrote it", kinds)
    config, inputs = found["config"], found.get("inputs") or {}
    data = inputs.get("train_data", inputs.get(pathlib.Path(str(config.get("train_data"))).name))
    options = {key: value for key, value in config.items() if key not in NOT_TRAINING}
    return {**options, "training data": data}


def jump_info(run: pathlib.Path, policy: str) -> dict:
    """checkpoint.json of `policy`; what is merged may have it beside the adapter alone."""
    name = policy.split("/", 1)[-1]
    folders = (policy, f"extrapolated/{name}", f"merged/{name}")
    paths = [run / folder / "checkpoint.json" for folder in folders]
    path = next((path for path in paths if path.is_file()), paths[0])
    return read_json(path, "the stage that made it", {"step": int, "seconds": float | None})


def rl_seconds(folder: pathlib.Path, last_step: int) -> float:
    """Wall seconds of the RL steps logged in `folder` up to `last_step`."""
    path = folder / "metrics.jsonl"
    rows = _logged(path, path.stat().st_mtime_ns)
    return sum((seconds for step, seconds in rows if step <= last_step), 0.0)


@functools.lru_cache(maxsize=64)  # `changed`, the file's time, keeps it fresh
def _logged(path: pathlib.Path, changed: int) -> list[tuple[int, float]]:
    return sorted((row["step"], row["seconds"]) for row in read_jsonl(path, LOGGED))


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
        return rl_seconds(run / "train", result.steps)
    folder = result.policy.split("/")[1]
    name = folder.removesuffix("_merged").removeprefix("merged__")
    seconds = rl_seconds(run / "train", jump_info(run, f"extrapolated/{name}")["step"])
    seconds += sum(own_seconds(run, result.method.removesuffix("_merged"), name).values())
    if result.policy.startswith("continued/"):
        seconds += rl_seconds(run / "continued" / folder, result.steps)
    return seconds


def read_predictor_report(path: pathlib.Path) -> dict:
    """What stage 3 wrote of one predictor: losses by family, and its backtest or None."""
    kinds = {"losses": dict[str, list[float]], "loss_of_zeros": dict[str, float]}
    kinds |= {"loss_stride": int, "backtest": dict | None}
    found = read_json(path, "03_train_predictor.py --overwrite", kinds)
    tested = found["backtest"]
    rows = {row: {"cosine": float} for row in TESTED if row in (tested or {})}
    rows |= {"at_step": int, "predicts_step": int, "predictor": {"cosine": float}}
    if tested and not matches(tested, rows):
        raise UserError(f"{path} has no usable backtest: run 03_train_predictor.py --overwrite")
    return found
