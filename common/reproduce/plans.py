"""The command lines of an experiment, and that of one run. Nothing runs here."""

import dataclasses
import fnmatch
import itertools
import shlex

from common import UserError
from common.files.config import nearest
from common.files.read import matches
from common.reproduce.results import MAIN_ALPHA, table_of

TABLES = table_of("plans.yaml")
ALPHA = f"{MAIN_ALPHA:g}"
SWEPT = "-0.5 0.5 1 1.5 2.5 4"  # alphas of the grid `learning-rate`; -0.5 looks back
FIRST_UPDATE = "4 8 16 32 64"  # those of its method `first-update`
SCRIPTS = ("01_train_lora_grpo.py", "02_extract_deltas.py", "03_train_predictor.py")
SCRIPTS += ("04_extrapolate.py", "05_continue_rl.py", "06_eval.py")


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
    """What a plan takes from the preset. Raises UserError for an unknown key or a wrong type."""
    found = {}
    for section, defaults in TABLES["defaults"].items():
        given = preset.get(section, {})
        if section == "reproduce" and (other := [*(given.keys() - defaults.keys())]):
            known = nearest(other[0], defaults)
            raise UserError(f"preset {name}: unknown key reproduce.{other[0]}; {known}")
        found[section] = {key: given.get(key, default) for key, default in defaults.items()}
        for key, default in defaults.items():
            kind = list[str] if isinstance(default, list) else type(default)
            if not matches(found[section][key], kind):
                raise UserError(f"preset {name}: {section}.{key} must be like {default!r}")
    return found


def summary(jobs: list[Job], wanted: dict) -> str:
    """How much there is to do. wanted: the preset's section `reproduce`."""
    steps = sum(job.work for job in jobs if {"01", "05"} & {*job.name.split()})
    hours = steps * wanted.get("gpu_hours_per_step", 0)
    told = f", {hours:.0f} GPU hours and the evaluation" if hours else ""
    return f"{len(jobs)} commands, {steps:.0f} RL steps{told}"


class Plan:
    """The jobs of one root directory, whose runs share a backbone and problems."""

    def __init__(self, name: str, preset: dict, root: str):
        self.name, self.root, self.values = name, root, values_of(name, preset)
        self.wanted = self.values["reproduce"]
        self.prefix = self.values["train"]["steps"]  # RL steps before the jump, and after it
        self.more = self.values["continue"]["more_steps"]
        self.reference = self.wanted["reference_steps"]  # RL steps of the run without a jump
        self.launch = self.wanted["launch"].split()
        self.jobs: list[Job] = []
        if self.wanted["prepare"]:
            command = [*self.wanted["prepare"].split(), "--run-dir", root]
            self.jobs.append(Job("prepare", command, [], 5))

    def add(self, table: str, run: str, parts=(), **values) -> None:
        """Appends the rows of `table` in plans.yaml on the run `root/run`.

        parts: the words at the end of rows that hold. values: what stands in {} in them.
        """
        known = {"prefix": self.prefix, "reference": self.reference, "more": self.more}
        known |= {"longer": self.reference - self.prefix, "alpha": ALPHA}
        values = {**known, "root": shlex.quote(self.root), "starts": [], "ends": [], **values}
        for label, flags, needs, work, *only in TABLES[table]:
            starts = values["starts"] if "{start}" in label else [""]
            ends = values["ends"] if "{end}" in label else [""]
            for start, end in itertools.product(starts, ends) if {*only} <= {*parts} else []:
                v = {**values, "start": start, "end": end, "go_on": continuing(start)}
                texts = [text.format_map(v) for text in (label, flags, needs)]
                self._append(run, *texts, v.get(work, work))

    def _append(self, run: str, label: str, flags: str, needs: str, work: float) -> None:
        patterns = [p for need in needs.split(", ") for p in (need, f"{run} {need}")]
        known = [job.name for job in self.jobs]
        found = [name for name in known if any(fnmatch.fnmatch(name, p) for p in patterns)]
        where, words = f"{self.root}/{run}".rstrip("/"), shlex.split(flags)
        argv = [*self.launch, SCRIPTS[int(label[:2]) - 1], "--config", self.name]
        argv += ["--run-dir", where, *(self._shared(label[:2], words) if run else []), *words]
        self.jobs.append(Job(f"{run} {label}".strip(), argv, found, work))

    def _shared(self, stage: str, words: list[str]) -> list[str]:
        """Flags for what a preset has in "{run_dir}/...": in a grid that is the root's."""
        found = []
        for key, section, stages in TABLES["paths"]:
            flag, values = f"--{key.replace('_', '-')}", self.values[section][key]
            values = [values] if isinstance(values, str) else values
            if stage in stages.split() and flag not in words and "{run_dir}" in str(values):
                found += [flag, *(v.replace("{run_dir}", self.root) for v in values)]
        return found


def continuing(start: str) -> str:
    """Stage 5's flags for a start like `none`, `none_linear` or `next-paper_alpha1.5_merged`."""
    if start.endswith("_linear"):
        flags = f"--name {shlex.quote(start)} --learning-rate-schedule linear"
        return f"--start {shlex.quote(start.removesuffix('_linear'))} {flags}"
    merged = " --restart merged" if start.endswith("_merged") else ""
    return f"--start {shlex.quote(start.removesuffix('_merged'))}{merged}"


def at_rate(plan: Plan, rate: str, top: str = "", seed: str = "", parts=()) -> None:
    """The whole experiment at the learning rate `rate`, or with "" at the preset's own.

    top: the folder of a seed in a grid, "seed0/". seed: its flag. parts: see `Plan.add`.
    """
    problems = shlex.quote(plan.wanted["validation_data"].replace("{run_dir}", plan.root))
    starts = plan.wanted["continue_from"] + (["none_linear"] if "grid" in parts else [])
    starts += ["next-aligned_accepted"] if "validation" in parts else []
    run = f"{top}rate{rate}" if rate else top and f"{top}lora"
    flags = {"rate": f"--learning-rate {rate}" if rate else "", "seed": seed}
    names = ("none", "next-aligned_alpha*", "weighted_alpha*")
    chosen = " ".join(shlex.quote(f"extrapolated/{name}") for name in names)
    flags |= {"swept": SWEPT, "first": FIRST_UPDATE, "to_choose": chosen, "validation": problems}
    plan.add("single", run, parts, starts=dict.fromkeys(starts), **flags)


def single(preset_name: str, preset: dict, run_dir: str) -> list[Job]:
    """One run: the first steps, the jumps, what follows them, the reference, the evaluation.

    All of it also at each of the preset's `rates`.
    """
    plan = Plan(preset_name, preset, run_dir)
    for rate in [*plan.wanted["rates"], ""]:
        at_rate(plan, rate)
    return plan.jobs
