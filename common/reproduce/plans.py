"""The command lines of an experiment: one run (`single`), and the grid of runs behind the paper's tables (`grid`). Nothing runs here."""

import ast
import dataclasses
import pathlib
import re
import reprlib
import shlex

from common import UserError
from common.files.config import load_preset, nearest
from common.files.read import matches, safe_name
from common.reproduce.results import MAIN_ALPHA

NEXT = f"next-weighted_alpha{MAIN_ALPHA:g}"
ABLATIONS = [f"{recipe}-no-{role}" for recipe in ("paper", "aligned") for role in ("global", "local")]
OTHER_K, OTHER_RANKS, FEWER_CHECKPOINTS = (2, 8), (4, 64), 8  # beside the preset's own
LOOP_ROUNDS, LOOP_CHECKPOINTS = 5, 5  # of RL-Extra: rounds, half of `more_steps` long each, and checkpoints in one
SIDE_SEEDS = 3  # other algorithms (without the steps to 400), ranks (up to the jump) and RL-Extra's loop are run for this many seeds
GRIDS = ("main", "tables", "rl-extra")
WITHOUT_LAUNCHER = ["env", "ACCELERATE_USE_CPU=true", "CUDA_VISIBLE_DEVICES=", "python"]  # a process on the CPU, four seconds earlier
# What a preset may have typed: a module of ours, and options of the launcher that name no other program.
PREPARE = re.compile(r"(python -m common\.\w+)?")
LAUNCH = re.compile(
    r"(--quiet\s*|--(config_file|num_processes|num_machines|machine_rank|main_process_ip|main_process_port|mixed_precision)[ =]\w\S*\s*)*"
)

KINDS = {  # of what a plan takes from a preset
    "reproduce": {
        **dict.fromkeys(("prepare", "launch", "full_preset", "validation_data"), str),
        **dict.fromkeys(("jobs", "gpus_per_job", "reference_steps"), int),
        "grid_without_launcher": bool,
        "continue_from": list[str],
    },
    "shared": {"backbone": str},
    "train": {"steps": int, "save_every": int, "lora_rank": int, "lora_alpha": float, "train_data": str},
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
        """What the stage says of itself: the first line of its docstring, up to the paper's sections."""
        scripts = [word for word in self.argv if word.endswith(".py")]
        docstring = ast.get_docstring(ast.parse(pathlib.Path(scripts[0]).read_text(encoding="utf-8"))) if scripts else None
        return docstring.splitlines()[0].split("  ")[0] if docstring else "Preparation"


@dataclasses.dataclass
class Plan:
    """The jobs of one root directory, whose runs share a backbone and problems.

    A preset may name these as "{run_dir}/..." (the demo makes its own): in a grid they are `root`'s, given by flags.
    """

    preset_name: str
    preset: dict
    root: str
    launch: list[str]
    jobs: list[Job] = dataclasses.field(default_factory=list)

    def add(self, run: str, label: str, script: str, flags: list[str], needs: list[str], work: float) -> str:
        """Appends a stage on the run `root/run`; returns the job's name, `run label`."""
        name = f"{run} {label}".strip()
        where = ["--config", self.preset_name, "--run-dir", f"{self.root}/{run}".rstrip("/")]
        shared = self.shared(script, flags) if run else []
        self.jobs.append(Job(name, [*self.launch, script, *where, *shared, *flags], needs, work))
        return name

    def shared(self, script: str, flags: list[str]) -> list[str]:
        """Flags for what the runs of a grid share, unless `flags` name something else."""
        training = ("backbone", "train_data")
        takes = {"01": training, "02": ("backbone",), "05": training, "06": ("backbone", "test_data")}.get(script[:2], ())
        found = []
        for key in takes:
            if f"--{key.replace('_', '-')}" in flags:
                continue
            for section in ("shared", "train", "eval"):
                value = self.preset.get(section, {}).get(key, "")
                values = value if isinstance(value, list) else [value]
                if any("{run_dir}" in v for v in values):
                    found += [f"--{key.replace('_', '-')}", *(v.replace("{run_dir}", self.root) for v in values)]
        return found

    def prepare(self) -> None:
        """What comes first: the preset's own preparation. Raises UserError where the preset would type what is none of its business."""
        wanted = self.preset.get("reproduce", {})
        for key, allowed in (("prepare", PREPARE), ("launch", LAUNCH)):
            if not allowed.fullmatch(str(wanted.get(key, ""))):
                raise UserError(f"preset {self.preset_name}: reproduce does not run {key}: {wanted[key]!r}; want {allowed.pattern}")
        for name in wanted.get("continue_from", []):
            safe_name(str(name), f"preset {self.preset_name}, continue_from")
        if wanted.get("prepare"):
            self.jobs.append(Job("prepare", [*wanted["prepare"].split(), "--run-dir", self.root], [], 5))

    def done(self) -> list[Job]:
        """The jobs, without needs that no job has."""
        names = {job.name for job in self.jobs}
        for job in self.jobs:
            job.needs = [name for name in job.needs if name in names]
        return self.jobs


def check(preset_name: str, preset: dict) -> None:
    """Raises UserError where the preset's `reproduce` has a key that is none, or anything that a plan takes is of another kind."""
    for key in preset.get("reproduce", {}):
        if key not in KINDS["reproduce"]:
            raise UserError(f"preset {preset_name}: unknown key reproduce.{key}; {nearest(key, KINDS['reproduce'])}")
    for section, kinds in KINDS.items():
        for key in kinds.keys() & preset.get(section, {}).keys():
            kind, value = kinds[key], preset[section][key]
            if not matches(value, kind) or (kind is int and value < (0 if key == "gpus_per_job" else 1)):
                wanted = kind.__name__ if kind in (str, bool, float) else "a positive int" if kind is int else str(kind)
                raise UserError(f"preset {preset_name}: {section}.{key}: want {wanted}, not {reprlib.repr(value)}")


def numbers(preset: dict) -> tuple[int, int, int]:
    """(RL steps before the jump, RL steps after it, steps of the reference run without a jump)."""
    return (
        preset.get("train", {}).get("steps", 150),
        preset.get("continue", {}).get("more_steps", 100),
        preset.get("reproduce", {}).get("reference_steps", 400),
    )


def continuing(start: str) -> list[str]:
    """Stage 5's flags for a start like `none` or `next-paper_alpha1.5_merged`."""
    return ["--start", start.removesuffix("_merged"), *(["--restart", "merged"] if start.endswith("_merged") else [])]


def single(preset_name: str, preset: dict, run_dir: str) -> list[Job]:
    """The experiment: one shared prefix, the jump, every continuation, the references, the evaluation."""
    check(preset_name, preset)
    (prefix, more, reference), wanted = numbers(preset), preset.get("reproduce", {})
    plan = Plan(preset_name, preset, run_dir, ["accelerate", "launch", *wanted.get("launch", "").split()])
    # Without it stage 2 takes all that is there, and the reference run beside it goes on making checkpoints.
    last = [] if "last_step" in preset.get("extract", {}) else ["--last-step", str(prefix)]
    plan.prepare()
    plan.add("", "01", "01_train_lora_grpo.py", [], ["prepare"], prefix)
    plan.add("", "01 reference", "01_train_lora_grpo.py", ["--steps", str(reference)], ["01"], reference - prefix)
    plan.add("", "02", "02_extract_deltas.py", last, ["01"], 15)
    plan.add("", "03", "03_train_predictor.py", [], ["02"], 180)
    plan.add("", "04", "04_extrapolate.py", [], ["03"], 15)
    plan.add("", "04 oracle", "04_extrapolate.py", ["--methods", "oracle"], ["04", "01 reference"], 15)
    plan.add("", "06 sweep", "06_eval.py", ["--policies", "extrapolated/*"], ["04 oracle"], 200)
    for start in wanted.get("continue_from", [NEXT]):
        plan.add("", f"05 {start}", "05_continue_rl.py", continuing(start), ["04"], more)
    plan.add("", "06", "06_eval.py", [], [job.name for job in plan.jobs], 60)
    return plan.done()


# ---------------------------------------------------------------------------------------------------------------------------
# The grid: <root>/seed0/lora, seed0/full, seed0/rloo ..., each an ordinary run directory
# ---------------------------------------------------------------------------------------------------------------------------


def grid(kind: str, preset_name: str, preset: dict, root: str, seeds: list[int]) -> list[Job]:
    """`main`: what the preset does, for several seeds. `tables`: all methods, algorithms and ablations, the main rows first.

    `rl-extra`: RL-Extra's alternating loop alone, which is a part of `tables`.
    """
    if kind not in GRIDS:
        raise UserError(f"unknown grid '{kind}'; known: {', '.join(GRIDS)}")
    check(preset_name, preset)
    wanted, everything = preset.get("reproduce", {}), kind == "tables"
    launcher = ["accelerate", "launch", *wanted.get("launch", "").split()]
    plan = Plan(preset_name, preset, root, WITHOUT_LAUNCHER if wanted.get("grid_without_launcher") else launcher)
    plan.prepare()
    if kind != "rl-extra":
        for seed in seeds:
            main_rows(plan, seed, everything)
    for seed in seeds if everything else []:
        side_run(plan, seed, "full", full_flags(preset), ["weighted", "paper"], numbers(preset)[2])
        other_k(plan, seed)
    if kind != "main":
        for seed in seeds[:SIDE_SEEDS] if everything else seeds:
            rl_extra_loop(plan, seed)
    for seed in seeds[:SIDE_SEEDS] if everything else []:
        for algorithm in ("rloo", "reinforce++"):
            side_run(plan, seed, algorithm, ["--algorithm", algorithm], ["weighted", "paper"], sum(numbers(preset)[:2]))
        for rank in OTHER_RANKS:
            side_run(plan, seed, f"rank{rank}", rank_flags(preset, rank), ["weighted"], 0)
    return plan.done()


def full_flags(preset: dict) -> list[str]:
    """Stage 1's flags for training without LoRA, at the rate of the preset that `full_preset` names (paper: 5e-7 in place of 5e-6)."""
    other = preset.get("reproduce", {}).get("full_preset")
    rate = load_preset(other)["train"]["learning_rate"] if other else 5e-7
    return ["--tune", "full", "--learning-rate", str(rate)]


def rank_flags(preset: dict, rank: int) -> list[str]:
    """Stage 1's flags for another LoRA rank at the preset's scale alpha / r."""
    train = preset.get("train", {})
    return ["--lora-rank", str(rank), "--lora-alpha", str(rank * train.get("lora_alpha", 32.0) / train.get("lora_rank", 64))]


def train(plan: Plan, run: str, flags: list[str], ends: list[int]) -> str:
    """Stage 1 up to each of `ends` in turn; returns the first job, whose checkpoints the jump is made from."""
    names, begun = ["prepare"], 0
    for end in ends:
        label = "01" if not begun else f"01 to {end}"
        names.append(plan.add(run, label, "01_train_lora_grpo.py", [*flags, "--steps", str(end)], names[-1:], end - begun))
        begun = end
    return names[1]


def main_rows(plan: Plan, seed: int, everything: bool) -> None:
    """Tables 3 to 5, Fig. 3, 5, 6: GRPO with LoRA, every jump from it, RL after the jumps, all from the same first steps."""
    run, flags, (prefix, more, reference) = f"seed{seed}/lora", ["--seed", str(seed)], numbers(plan.preset)
    wanted, alpha = plan.preset.get("reproduce", {}), f"{MAIN_ALPHA:g}"
    recipes, starts = plan.preset.get("predict", {}).get("recipes", ["weighted"]), list(wanted.get("continue_from", [NEXT]))
    first = train(plan, run, flags, [prefix, reference])
    after = plan.add(run, "02", "02_extract_deltas.py", ["--last-step", str(prefix)], [first], 15)
    after = plan.add(run, "03", "03_train_predictor.py", [*flags, "--recipes", *recipes, *(ABLATIONS if everything else [])], [after], 400)
    jumps = [plan.add(run, "04", "04_extrapolate.py", [], [after], 15)]
    jumps.append(plan.add(run, "04 relex", "04_extrapolate.py", ["--methods", "relex", "--alphas", alpha], jumps[:1], 15))
    starts.append(f"relex_alpha{alpha}")
    if everything:
        fewer = ["--recipes", *recipes]
        after = plan.add(run, "03 fewer", "03_train_predictor.py", [*flags, *fewer, "--checkpoints", str(FEWER_CHECKPOINTS)], [after], 120)
        names = [*ABLATIONS, *(f"{recipe}-last{FEWER_CHECKPOINTS}" for recipe in recipes)]
        jumps.append(
            plan.add(run, "04 ablations", "04_extrapolate.py", ["--recipes", *names, "--methods", "next", "--alphas", alpha], [after], 15)
        )
        methods = ["alpharl", "wsm", "dare"]
        needs = [jumps[0]]
        if wanted.get("validation_data"):
            problems = wanted["validation_data"].replace("{run_dir}", plan.root)
            data = ["--test-data", problems]
            every = plan.preset.get("train", {}).get("save_every", 10)
            policies = ["--policies", *(f"train/step_{step:04d}" for step in range(every, prefix + 1, every)), "--output", "validation"]
            needs.append(plan.add(run, "06 validation", "06_eval.py", [*data, *policies], [first], 60))
            methods += ["alpharl-pls", "greedy-soup", "--validation-data", problems]
        jumps.append(plan.add(run, "04 others", "04_extrapolate.py", ["--alphas", alpha, "--methods", *methods], needs, 60))
        jumps.append(plan.add(run, "04 expo", "04_extrapolate.py", ["--methods", "expo", "--alphas", "0.5"], needs[:1], 15))
        # AlphaRL's adapter has rank 1 and would stay so: a new LoRA on the merged model
        starts += [f"alpharl_alpha{alpha}_merged", "none_merged", *(f"next-{name}_alpha{alpha}" for name in ABLATIONS[:2])]
    needs = list(jumps)
    for start in dict.fromkeys(starts):
        needs.append(plan.add(run, f"05 {start}", "05_continue_rl.py", [*flags, *continuing(start)], jumps, more))
    if everything:  # not an adapter
        needs.append(plan.add(run, "06 dare", "06_eval.py", ["--policies", "merged/dare_p0.9"], jumps, 5))
    oracle = ["--methods", "oracle"]
    needs.append(plan.add(run, "04 oracle", "04_extrapolate.py", oracle, [jumps[0], f"{run} 01 to {reference}"], 15))
    plan.add(run, "06", "06_eval.py", [], needs, 250)


def side_run(plan: Plan, seed: int, name: str, flags: list[str], recipes: list[str], reference: int) -> None:
    """GRPO with other settings, and NExt from its first steps: w/o LoRA (Table 5), other algorithms (Table 6), other ranks.

    With `reference` 0 it ends with the jump.
    """
    run, flags, (prefix, more, _) = f"seed{seed}/{name}", ["--seed", str(seed), *flags], numbers(plan.preset)
    total, jumps = prefix + more, [f"next-{recipe}_alpha{MAIN_ALPHA:g}" for recipe in recipes]
    ends = sorted({prefix, total, reference}) if reference else [prefix]
    first = train(plan, run, flags, ends)
    after = plan.add(run, "02", "02_extract_deltas.py", ["--last-step", str(prefix)], [first], 15)
    after = plan.add(run, "03", "03_train_predictor.py", ["--seed", str(seed), "--recipes", *recipes], [after], 60)
    methods = ["--recipes", *recipes, "--methods", "next", "repeat-last", "--alphas", f"{MAIN_ALPHA:g}"]
    needs = [plan.add(run, "04", "04_extrapolate.py", methods, [after], 15)]
    policies = [*(f"train/step_{end:04d}" for end in ends), "extrapolated/*"]
    if reference:
        needs += [plan.add(run, f"05 {start}", "05_continue_rl.py", [*flags, "--start", start], needs[:1], more) for start in jumps]
        needs.append(f"{run} 01 to {reference}")
        policies.append(f"continued/*/step_{total:04d}")
    plan.add(run, "06", "06_eval.py", ["--policies", *policies], needs, 30)


def other_k(plan: Plan, seed: int) -> None:
    """Targets that are 2 or 8 checkpoints long, from the main run's checkpoints, and a jump of the same length in RL steps."""
    prefix, k = numbers(plan.preset)[0], plan.preset.get("extract", {}).get("k", 5)
    for other in OTHER_K:
        run, alpha = f"seed{seed}/k{other}", f"{MAIN_ALPHA * k / other:g}"
        series = ["--checkpoints", f"{plan.root}/seed{seed}/lora/train/step_*", "--last-step", str(prefix), "--k", str(other)]
        after = plan.add(run, "02", "02_extract_deltas.py", series, [f"seed{seed}/lora 01"], 15)
        after = plan.add(run, "03", "03_train_predictor.py", ["--seed", str(seed), "--recipes", "weighted", "aligned"], [after], 60)
        methods = ["--recipes", "weighted", "aligned", "--methods", "next", "repeat-last", "--alphas", alpha]
        after = plan.add(run, "04", "04_extrapolate.py", methods, [after], 15)
        plan.add(run, "06", "06_eval.py", ["--policies", "extrapolated/*"], [after], 15)


def rl_extra_loop(plan: Plan, seed: int) -> None:
    """RL-Extra as its authors use it (arXiv 2601.04537): a round of RL, a jump as far again, and the next round on the merged model."""
    _, more, _ = numbers(plan.preset)
    every = max(1, more // 2 // LOOP_CHECKPOINTS)
    steps, merged, after = LOOP_CHECKPOINTS * every, [], ["prepare"]
    for number in range(1, LOOP_ROUNDS + 1):
        run = f"seed{seed}/loop/round{number}"
        flags = ["--seed", str(seed + 1000 * number), "--steps", str(steps), "--save-every", str(every), *merged]
        after = [plan.add(run, "01", "01_train_lora_grpo.py", flags, after, steps)]
        if number < LOOP_ROUNDS:
            series = ["--k", "1", "--last-step", str(steps), "--fit-checkpoints", "2"]
            after = [plan.add(run, "02", "02_extract_deltas.py", series, after, 15)]
            jump = ["--methods", "rl-extra", "--alphas", str(LOOP_CHECKPOINTS), "--merge", "fp32"]  # as long as the round
            after = [plan.add(run, "04", "04_extrapolate.py", jump, after, 15)]
            merged = ["--backbone", f"{plan.root}/{run}/merged/rl-extra_alpha{LOOP_CHECKPOINTS}"]
        else:
            plan.add(run, "06", "06_eval.py", [*merged, "--policies", f"train/step_{steps:04d}"], after, 15)
