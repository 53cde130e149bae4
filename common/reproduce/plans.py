"""The command lines of an experiment, and that of one run. Nothing runs here."""

import ast
import dataclasses
import pathlib
import re
import reprlib
import shlex

from common import UserError
from common.files.config import nearest
from common.files.read import matches, safe_name
from common.reproduce.results import MAIN_ALPHA

ALPHA = f"{MAIN_ALPHA:g}"
NEXT = f"next-aligned_alpha{ALPHA}"
SCRIPTS = ("01_train_lora_grpo.py", "02_extract_deltas.py", "03_train_predictor.py")
SCRIPTS += ("04_extrapolate.py", "05_continue_rl.py", "06_eval.py")
# A process on the CPU; accelerate's launcher would take four seconds more.
WITHOUT_LAUNCHER = ["env", "ACCELERATE_USE_CPU=true", "CUDA_VISIBLE_DEVICES=", "python"]
# A preset may be another's. It may run a module of ours, and the launcher with these options.
PREPARE = re.compile(r"(python -m common\.\w+)?")
LAUNCH = re.compile(
    r"(--quiet\s*|--(config_file|num_processes|num_machines|machine_rank|main_process_ip"
    r"|main_process_port|mixed_precision)[ =]\w\S*\s*)*"
)
KINDS = {  # of what a plan takes from a preset
    "reproduce": {
        **dict.fromkeys(("prepare", "launch", "full_preset", "validation_data"), str),
        **dict.fromkeys(("jobs", "gpus_per_job", "reference_steps"), int),
        "grid_without_launcher": bool,
        "continue_from": list[str],
    },
    "shared": {"backbone": str},
    "train": {
        **dict.fromkeys(("steps", "save_every", "lora_rank"), int),
        **{"lora_alpha": float, "train_data": str},
    },
    "extract": {"k": int},
    "predict": {"recipes": list[str]},
    "continue": {"more_steps": int},
    "eval": {"test_data": list[str] | str},
}


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

    @property
    def heading(self) -> str:
        """What the stage says of itself: its docstring's first line, without the sections."""
        scripts = [pathlib.Path(word) for word in self.argv if word.endswith(".py")]
        if not scripts:
            return "Preparation"
        docstring = ast.get_docstring(ast.parse(scripts[0].read_text(encoding="utf-8")))
        return docstring.splitlines()[0].split("  ")[0]


class Plan:
    """The jobs of one root directory, whose runs share a backbone and problems."""

    def __init__(self, name: str, preset: dict, root: str, is_grid: bool = False):
        check(name, preset)
        self.name, self.preset, self.root = name, preset, root
        self.wanted = preset.get("reproduce", {})
        self.launch = ["accelerate", "launch", *self.wanted.get("launch", "").split()]
        if is_grid and self.wanted.get("grid_without_launcher"):
            self.launch = WITHOUT_LAUNCHER
        self.prefix, self.more, self.reference = numbers(preset)
        self.jobs: list[Job] = []
        if self.wanted.get("prepare"):
            command = [*self.wanted["prepare"].split(), "--run-dir", root]
            self.jobs.append(Job("prepare", command, [], 5))

    def add(self, run: str, label: str, flags: list[str], needs: list[str], work: float) -> str:
        """Appends a stage on the run `root/run`; returns the job's name, `run label`.

        label: the stage's number, and a word if it runs twice. A need that no job has is dropped.
        """
        name, known = f"{run} {label}".strip(), {job.name for job in self.jobs}
        where = ["--config", self.name, "--run-dir", f"{self.root}/{run}".rstrip("/")]
        shared = self.shared(label[:2], flags) if run else []
        argv = [*self.launch, SCRIPTS[int(label[:2]) - 1], *where, *shared, *flags]
        self.jobs.append(Job(name, argv, [need for need in needs if need in known], work))
        return name

    def shared(self, stage: str, flags: list[str]) -> list[str]:
        """Flags for what a preset has in "{run_dir}/...": in a grid that is the root's."""
        training, found = ("backbone", "train_data"), []
        takes = {"01": training, "02": ("backbone",), "05": training}
        takes["06"] = ("backbone", "test_data")
        for key in takes.get(stage, ()):
            flag = f"--{key.replace('_', '-')}"
            for section in ("shared", "train", "eval") if flag not in flags else ():
                value = self.preset.get(section, {}).get(key, "")
                values = value if isinstance(value, list) else [value]
                if any("{run_dir}" in v for v in values):
                    found += [flag, *(v.replace("{run_dir}", self.root) for v in values)]
        return found


def check(name: str, preset: dict) -> None:
    """Raises UserError for an unknown key of `reproduce`, or a value that no plan can use."""
    wanted = preset.get("reproduce", {})
    for key in wanted.keys() - KINDS["reproduce"].keys():
        known = nearest(key, KINDS["reproduce"])
        raise UserError(f"preset {name}: unknown key reproduce.{key}; {known}")
    for section, kinds in KINDS.items():
        for key in kinds.keys() & preset.get(section, {}).keys():
            kind, value = kinds[key], preset[section][key]
            least = 0 if key == "gpus_per_job" else 1
            if not matches(value, kind) or (kind is int and value < least):
                kind = "a positive int" if kind is int else getattr(kind, "__name__", kind)
                shown = reprlib.repr(value)
                raise UserError(f"preset {name}: {section}.{key}: want {kind}, not {shown}")
    for key, allowed in (("prepare", PREPARE), ("launch", LAUNCH)):
        if not allowed.fullmatch(wanted.get(key, "")):
            text = f"reproduce does not run {key}: {wanted[key]!r}; want {allowed.pattern}"
            raise UserError(f"preset {name}: {text}")
    for start in wanted.get("continue_from", []):
        safe_name(start, f"preset {name}, continue_from")


def numbers(preset: dict) -> tuple[int, int, int]:
    """RL steps before the jump, after it, and of the reference run without a jump."""
    more = preset.get("continue", {}).get("more_steps", 100)
    reference = preset.get("reproduce", {}).get("reference_steps", 400)
    return preset.get("train", {}).get("steps", 150), more, reference


def continuing(start: str) -> list[str]:
    """Stage 5's flags for a start like `none` or `next-paper_alpha1.5_merged`."""
    restart = ["--restart", "merged"] if start.endswith("_merged") else []
    return ["--start", start.removesuffix("_merged"), *restart]


def single(preset_name: str, preset: dict, run_dir: str) -> list[Job]:
    """One run: the first steps, the jumps, what follows them, the reference, the evaluation."""
    plan = Plan(preset_name, preset, run_dir)
    # Without it stage 2 takes all that is there, and the reference run goes on making checkpoints.
    last = [] if "last_step" in preset.get("extract", {}) else ["--last-step", str(plan.prefix)]
    plan.add("", "01", [], ["prepare"], plan.prefix)
    longer = ["--steps", str(plan.reference)]
    plan.add("", "01 reference", longer, ["01"], plan.reference - plan.prefix)
    plan.add("", "02", last, ["01"], 15)
    plan.add("", "03", [], ["02"], 180)
    plan.add("", "04", [], ["03"], 15)
    plan.add("", "04 oracle", ["--methods", "oracle"], ["04", "01 reference"], 15)
    plan.add("", "06 sweep", ["--policies", "extrapolated/*"], ["04 oracle"], 200)
    for start in plan.wanted.get("continue_from", [NEXT]):
        plan.add("", f"05 {start}", continuing(start), ["04"], plan.more)
    plan.add("", "06", [], [job.name for job in plan.jobs], 60)
    return plan.jobs
