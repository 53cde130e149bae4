"""The command lines of an experiment, and that of one run. Nothing runs here."""

import dataclasses
import fnmatch
import re
import reprlib
import shlex

from common import UserError
from common.files.config import nearest
from common.files.read import matches, safe_name
from common.reproduce.results import MAIN_ALPHA, table_of

TABLES = table_of("plans.yaml")
ALPHA = f"{MAIN_ALPHA:g}"
SCRIPTS = ("01_train_lora_grpo.py", "02_extract_deltas.py", "03_train_predictor.py")
SCRIPTS += ("04_extrapolate.py", "05_continue_rl.py", "06_eval.py")
# A process on the CPU; accelerate's launcher would take four seconds more.
WITHOUT_LAUNCHER = "env ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES= python"
# A preset may be another's. It may run a module of ours, and the launcher with these options.
ALLOWED = {
    "prepare": r"(python -m common\.\w+)?",
    "launch": r"(--quiet\s*|--(config_file|num_processes|num_machines|machine_rank"
    r"|main_process_ip|main_process_port|mixed_precision)[ =]\w\S*\s*)*",
}
DEFAULTS = {  # of what a plan takes from a preset; they give the types too
    "reproduce": {
        **dict.fromkeys(("prepare", "launch", "full_preset", "validation_data"), ""),
        **{"jobs": 0, "gpus_per_job": 0, "reference_steps": 400, "grid_without_launcher": False},
        "continue_from": [f"next-aligned_alpha{ALPHA}"],
    },
    "shared": {"backbone": ""},
    "train": {"steps": 150, "save_every": 10, "lora_rank": 64, "lora_alpha": 32.0}
    | {"train_data": ""},
    "extract": {"k": 5},
    "predict": {"recipes": ["aligned"]},
    "continue": {"more_steps": 100},
    "eval": {"test_data": []},
}
# Where a preset says which model and problems, and which stages take the flag.
PATHS = {"backbone": ("shared", "01 02 05 06"), "train_data": ("train", "01 05")}
PATHS["test_data"] = ("eval", "06")


@dataclasses.dataclass
class Job:
    """One command line. `work` is its length in units of one RL step, for the time left."""

    name: str
    argv: list[str]
    needs: list[str]
    work: float

    @property
    def line(self) -> str:
        return shlex.join(self.argv)


def values_of(name: str, preset: dict) -> dict[str, dict]:
    """The preset's values of DEFAULTS. Raises UserError for what no plan can use."""
    for key in preset.get("reproduce", {}).keys() - DEFAULTS["reproduce"].keys():
        known = nearest(key, DEFAULTS["reproduce"])
        raise UserError(f"preset {name}: unknown key reproduce.{key}; {known}")
    found = {}
    for section, defaults in DEFAULTS.items():
        found[section] = {k: preset.get(section, {}).get(k, defaults[k]) for k in defaults}
        for key, value in found[section].items():
            kind = list[str] if isinstance(defaults[key], list) else type(defaults[key])
            if not matches(value, kind) or (kind is int and value < min(defaults[key], 1)):
                shown = reprlib.repr(value)
                raise UserError(f"preset {name}: {section}.{key} cannot be {shown}: want {kind}")
    wanted = found["reproduce"]
    for key, allowed in ALLOWED.items():
        if not re.fullmatch(allowed, wanted[key]):
            raise UserError(f"preset {name}: reproduce does not run {key}: {wanted[key]!r}")
    for start in wanted["continue_from"]:
        safe_name(start, f"preset {name}, continue_from")
    return found


class Plan:
    """The jobs of one root directory, whose runs share a backbone and problems."""

    def __init__(self, name: str, preset: dict, root: str, is_grid: bool = False):
        self.name, self.root, self.values = name, root, values_of(name, preset)
        self.wanted = self.values["reproduce"]
        self.prefix = self.values["train"]["steps"]  # RL steps before the jump, and after it
        self.more = self.values["continue"]["more_steps"]
        self.reference = self.wanted["reference_steps"]  # RL steps of the run without a jump
        self.launch = f"accelerate launch {self.wanted['launch']}".split()
        if is_grid and self.wanted["grid_without_launcher"]:
            self.launch = WITHOUT_LAUNCHER.split()
        self.jobs: list[Job] = []
        if self.wanted["prepare"]:
            command = [*self.wanted["prepare"].split(), "--run-dir", root]
            self.jobs.append(Job("prepare", command, [], 5))

    def add(self, table: str, run: str, parts=(), **values) -> None:
        """Appends the rows of `table` in plans.yaml on the run `root/run`.

        parts: the words at the end of rows that hold. values: what stands in {} in them.
        """
        values = {"starts": [], "ends": [], "root": "{root}", "alpha": ALPHA, **values}
        values |= {"prefix": self.prefix, "reference": self.reference, "more": self.more}
        values.setdefault("longer", self.reference - self.prefix)
        for label, flags, needs, work, *only in TABLES[table]:
            repeated = next((key for key in ("start", "end") if f"{{{key}}}" in label), "")
            for one in values[f"{repeated}s"] if repeated else [""]:
                v = {**values, repeated: one, "go_on": continuing(str(one))}
                texts = [text.format_map(v) for text in (label, flags, needs)]
                if {*only} <= {*parts}:
                    self._append(run, *texts, v.get(work, work))

    def _append(self, run: str, label: str, flags: str, needs: str, work: float) -> None:
        known = [job.name for job in self.jobs]
        patterns = [p for need in needs.split(", ") for p in (need, f"{run} {need}")]
        found = [name for name in known if any(fnmatch.fnmatch(name, p) for p in patterns)]
        words = [word.replace("{root}", self.root) for word in shlex.split(flags)]
        where = ["--config", self.name, "--run-dir", f"{self.root}/{run}".rstrip("/")]
        where += self.shared(label[:2], words) if run else []
        argv = [*self.launch, SCRIPTS[int(label[:2]) - 1], *where, *words]
        self.jobs.append(Job(f"{run} {label}".strip(), argv, found, work))

    def shared(self, stage: str, words: list[str]) -> list[str]:
        """Flags for what a preset has in "{run_dir}/...": in a grid that is the root's."""
        found = []
        for key, (section, stages) in PATHS.items():
            flag, value = f"--{key.replace('_', '-')}", self.values[section][key]
            values = [value] if isinstance(value, str) else value
            if stage in stages.split() and flag not in words and "{run_dir}" in str(values):
                found += [flag, *(v.replace("{run_dir}", self.root) for v in values)]
        return found


def continuing(start: str) -> str:
    """Stage 5's flags for a start like `none` or `next-paper_alpha1.5_merged`."""
    merged = " --restart merged" if start.endswith("_merged") else ""
    return f"--start {shlex.quote(start.removesuffix('_merged'))}{merged}"


def single(preset_name: str, preset: dict, run_dir: str) -> list[Job]:
    """One run: the first steps, the jumps, what follows them, the reference, the evaluation."""
    plan = Plan(preset_name, preset, run_dir)
    # Without it stage 2 takes all that is there, and the reference run goes on making checkpoints.
    last = "" if "last_step" in preset.get("extract", {}) else f"--last-step {plan.prefix}"
    plan.add("single", "", last_step=last, starts=plan.wanted["continue_from"])
    return plan.jobs
