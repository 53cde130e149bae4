"""What one run came to: every measured policy of a run directory, with its steps and its cost."""

import dataclasses
import math
import pathlib
import re

import torch
import yaml

from common import UserError
from common.files import adapters
from common.files.models import OURS
from common.files.read import read_json, read_jsonl, step_of
from common.reproduce.estimates import over_problems
from common.rl.benchmarks import suite_of
from common.rl.options import MAY_CHANGE


def table_of(name: str):
    """The YAML file `name` beside the code."""
    return yaml.safe_load((pathlib.Path(__file__).parent / name).read_text(encoding="utf-8"))


METHODS = table_of("methods.yaml")  # name -> label, look; in the order of the tables
MAIN_ALPHA = 1.5  # the paper's extending coefficient: the alpha of the tables
MADE = {"": "", "_merged": ", merged restart", "_linear": ", then a rate that falls to 0"}
MADE["_accepted"] = ", alpha chosen on validation problems"
OWN_ALPHA = {"expo": 0.5}  # methods whose alpha means something else
# Methods that need stage 2; and what was measured for those that choose by accuracy.
FROM_DELTAS = ("next-", "weighted", "repeat-last", "recent-locals", "alpharl")
MEASURED = {"alpharl-pls": ("*__step_*",), "greedy-soup": ("*__step_*", "*__candidate_*")}
LOGGED = {"step": int, "seconds": float, "accuracy": float, "response_length": float}
RECORD = {"policy": str, "n": int, "response_length": float, "by_problem": list[float]}
RECORD |= {"settings": dict | None, "data": str | None, "template_hash": str | None}
POLICY = re.compile(
    r"(?:extrapolated|merged|continued)/(?:merged__)?([^/]+?)"
    r"(?:_alpha(-?\d+(?:\.\d+)?(?:e[-+]\d+)?))?"
    r"(_merged|_linear|_accepted)?(?:/(?:step_|checkpoint-)\d+)?"
)
# Options of stages 1 and 5 that may differ between two runs that are compared.
NOT_TRAINING = {
    *MAY_CHANGE,
    *("backbone", "train_data", "prompt_column", "answer_column", "data_split", "engine", "seed"),
    *("steps", "start", "restart", "mixed_precision", "name", "learning_rate_schedule"),
}


@dataclasses.dataclass
class Result:
    """One measured policy. A score is the mean of a problem's runs, in 0..1."""

    policy: str  # the path below the run directory
    method: str  # a key of METHODS, with "_merged" or "_linear" where stage 5 was told so
    alpha: float | None
    steps: int  # RL steps it took
    trained: dict  # the options of stage 1 or 5 that decide the result
    records: dict[str, dict]  # task -> what stage 6 wrote of it
    tasks: tuple[str, ...]  # those whose plain mean is the accuracy
    spent: dict[str, float]  # wall seconds: "RL", and the parts of the method's own computing
    seed: int = 0
    run: str = ""  # its name in a grid

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
        return over_problems(self.scores).error

    @property
    def n(self) -> int:
        return sum(self.records[task]["n"] for task in self.tasks)

    @property
    def length(self) -> float:
        """Tokens a response."""
        return sum(self.records[task]["response_length"] for task in self.tasks) / len(self.tasks)

    @property
    def seconds(self) -> float | None:
        """None where they are not known."""
        return sum(self.spent.values()) if self.spent else None

    @property
    def jumped(self) -> bool:
        """Whether stage 4 made it, before any more RL."""
        return self.policy.startswith(("extrapolated/", "merged/"))

    def of_suite(self, suite: str) -> tuple[str, ...]:
        """The tasks of `suite` that it was measured on: only these are averaged."""
        return tuple(task for task in self.records if suite_of(task) == suite)

    @property
    def label(self) -> str:
        """Its name in tables."""
        if self.method == "grpo" and "full" in (self.trained.get("tune"), self.run):
            return label_of("full")
        if self.method == "grpo" and not self.policy.startswith("train/"):
            return "another trainer's RL"
        merged = self.policy.startswith("merged/") and self.method != "dare"
        usual = self.alpha in (None, MAIN_ALPHA, OWN_ALPHA.get(self.method))
        far = "" if usual else f", alpha {self.alpha:g}"
        return label_of(self.method) + (", merged" if merged else "") + far


def label_of(method: str) -> str:
    """The name of `method` in tables."""
    if method in METHODS:
        return METHODS[method]["label"]
    name, last, made = split_name(method)
    label = METHODS.get(name, {"label": name})["label"]
    label += f", last {last} checkpoints" if last else ""
    return label + MADE[made]


def split_name(method: str) -> tuple[str, str, str]:
    """next-aligned-last8_merged -> (next-aligned, 8, _merged)."""
    pattern = r"(.+?)(?:-last(\d+))?(_merged|_linear|_accepted)?"
    return re.fullmatch(pattern, method).groups(default="")


def place(result: Result) -> tuple[int, str]:
    """Where a method stands in a table: in the order of methods.yaml, others last."""
    names, (name, *_) = list(METHODS), split_name(result.method)
    return (names.index(name) if name in names else len(names), result.method)


def load_results(run: pathlib.Path) -> dict[str, Result]:
    """Every measured policy of the run directory `run`, by its path."""
    found = {}
    for folder in sorted((run / "eval").glob("*")):
        paths = sorted(folder.glob("*.json"))
        records = {path.stem: read_json(path, "06_eval.py", RECORD) for path in paths}
        if not records or folder.name.endswith("__backbone"):  # what a merged restart stands on
            continue
        policy = next(iter(records.values()))["policy"]
        if policy.replace("/", "__") != folder.name:
            raise UserError(f"{folder} holds results of {policy!r}: move it away")
        method, alpha = policy if policy == "backbone" else "grpo", None
        if match := POLICY.fullmatch(policy):
            method, alpha = match[1] + (match[3] or ""), float(match[2]) if match[2] else None
        steps = 0 if policy == "backbone" else jump_info(run, policy)["step"]
        method = method if steps or method != "grpo" else policy  # another trainer's, with a name
        # Another trainer's after a jump has the name that ours would have.
        policy = re.sub("^(continued/.+/)checkpoint-.*", rf"\g<1>step_{steps:04d}", policy)
        known = {"trained": training_options(run, policy), "records": records}
        known |= {"tasks": tuple(records), "spent": spent(run, policy, method, steps)}
        found[policy] = Result(policy, method, alpha, steps, **known)
    return found


def training_options(run: pathlib.Path, policy: str) -> dict:
    """The options of stage 1 or 5 that decide what `policy` is, and the hash of its data."""
    folder = (run / policy).parent if policy.startswith("continued/") else run / "train"
    if not (folder / "config.json").is_file():
        return {}
    kinds = {"config": dict, "inputs": dict}
    found = read_json(folder / "config.json", "the stage that wrote it", kinds)
    options = {key: value for key, value in found["config"].items() if key not in NOT_TRAINING}
    return {**options, "training data": found["inputs"].get("train_data")}


def made_on(run: pathlib.Path) -> tuple[str, int]:
    """The backbone's name, and how many GPUs stage 1 had: 0 on a CPU, or where it is not known."""
    made = {"config": {}}  # of an unfinished training stage 6 knows the device
    for path in ("train/config.json", "eval/*/*.json", "train/done.json"):
        for found in sorted(run.glob(path))[:1]:
            made |= read_json(found, "the stage that wrote it")
    gpus = made["processes"] if made.get("device", "cpu") != "cpu" else 0
    first = next(iter(sorted((run / "train").glob("step_*"))), run)  # verl's training has no more
    named = made["config"].get("backbone") or adapters.read_info(first).get("backbone", "")
    return named.split("/")[-1], gpus


def jump_info(run: pathlib.Path, policy: str) -> dict:
    """checkpoint.json of `policy`; a jump that is no adapter has it in merged/."""
    path = run / policy / "checkpoint.json"
    whole = run / "merged" / path.parent.name / "checkpoint.json"
    path = whole if whole.is_file() and not path.is_file() else path
    top, *below = pathlib.Path(policy).parts
    if not path.is_file() and top not in OURS:  # another trainer's: checkpoint-20
        return {"step": step_of(pathlib.Path(top)) or 0}
    if not path.is_file() and re.match("continued/.+/checkpoint-", policy):  # counts from a jump
        jump = jump_info(run, f"extrapolated/{re.sub('_merged$|_linear$', '', below[0])}")
        return {"step": jump["step"] + (step_of(path.parent) or 0)}
    return read_json(path, "the stage that made it", {"step": int, "seconds": float | None})


def rl_seconds(folder: pathlib.Path, last_step: int) -> float:
    """Wall seconds of the RL steps logged in `folder` up to `last_step`; nan without a log."""
    path = folder / "metrics.jsonl"
    rows = read_jsonl(path, LOGGED) if path.is_file() else [{"step": 0, "seconds": math.nan}]
    return sum((row["seconds"] for row in rows if row["step"] <= last_step), 0.0)


def spent(run: pathlib.Path, policy: str, method: str, steps: int) -> dict[str, float]:
    """Wall seconds by part: RL before and after the jump, and the method's own computing.

    Empty where they are not known (another trainer's run, a start from elsewhere) or no fair cost
    (the oracle).
    """

    def seconds(path: pathlib.Path, key: str = "seconds") -> float:
        made = {"made_by": "the stage that made it", "wanted": {key: float}}
        return read_json(path, **made)[key] if path.is_file() else math.nan

    train, method = run / "train", re.sub("_merged$|_linear$|_accepted$", "", method)
    others = policy != "backbone" and policy.split("/")[0] not in OURS
    if others or not (train / "metrics.jsonl").is_file() or method == "oracle":
        return {}
    if method in ("backbone", "grpo"):
        return {"RL": rl_seconds(train, steps)}
    folder = policy.split("/")[1]
    name = re.sub("^merged__|_merged$|_linear$", "", folder)
    if not any((run / top / name).is_dir() for top in ("extrapolated", "merged")):
        return {}
    jump = jump_info(run, f"extrapolated/{name}")
    parts = {"RL": rl_seconds(train, jump["step"]), "extrapolation": jump.get("seconds") or 0.0}
    if policy.startswith("continued/"):
        parts["RL"] += rl_seconds(run / "continued" / folder, steps)
    if method.startswith(FROM_DELTAS):
        parts["SVD"] = seconds(run / "deltas" / "done.json")
    if method.startswith("next-"):  # without its backtest
        trained = run / "predictor" / method.removeprefix("next-") / "done.json"
        parts["predictor"] = seconds(trained, "training_seconds")
    chosen = (f"*__{method}_alpha*", "extrapolated__none")  # in merged/ what is no adapter
    if globs := chosen if name.endswith("_accepted") else MEASURED.get(method):
        paths = [path for some in globs for path in run.glob(f"validation/{some}/*.json")]
        parts["validation"] = sum(map(seconds, paths))
    return {} if math.isnan(sum(parts.values())) else parts
