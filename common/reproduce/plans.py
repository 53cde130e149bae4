"""The command lines of an experiment: of one run, or of a grid of runs.

The runs of a grid are <root>/seed0/lora, seed0/full, seed0/rloo ... Each is an ordinary run
directory. Nothing runs here. plans.yaml has the commands of each kind of run.
"""

import dataclasses
import fnmatch
import itertools
import shlex

from common import UserError
from common.files.config import as_number, nearest
from common.files.read import matches
from common.reproduce.results import MAIN_ALPHA, table_of

TABLES = table_of("plans.yaml")
ALPHA = f"{MAIN_ALPHA:g}"
GRIDS = ("paper", "main", "tables", "learning-rate", "sweep")
OTHER_K, OTHER_RANKS, FEWER_CHECKPOINTS = (2, 8), (4, 64), 8  # beside the preset's own
SECOND = "second"  # the run with a second jump
LOOP_ROUNDS, LOOP_CHECKPOINTS = 5, 5  # of RL-Extra's loop: rounds, and checkpoints in each
SIDE_SEEDS = 3  # of other algorithms, other ranks and RL-Extra's loop, to save time
SWEEP_SEEDS = 2  # of the rates of `sweep` in `learning-rate`


@dataclasses.dataclass
class Job:
    """One command line. `work` is its length in units of one RL step, for the time left."""

    name: str
    argv: list[str]
    needs: list[str]
    work: float
    stage: str = ""  # 01 ... 06, or nothing

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
        found[section] = {}
        for key, default in defaults.items():
            kind = list[type([*default, ""][0])] if isinstance(default, list) else type(default)
            found[section][key] = value = as_number(given.get(key, default), kind)
            if not matches(value, kind):
                raise UserError(f"preset {name}: {section}.{key} must be like {default!r}")
    return found


class Plan:
    """The jobs of one root directory, whose runs share a backbone and problems.

    values: what stands in {} in the rows of plans.yaml, and decides whether a row holds.
    """

    def __init__(self, name: str, preset: dict, root: str):
        self.name, self.root, self.preset = name, root, values_of(name, preset)
        self.wanted, train = self.preset["reproduce"], self.preset["train"]
        recipes, problems = self.preset["predict"]["recipes"], self.wanted["validation_data"]
        prefix, more = train["steps"], self.preset["continue"]["more_steps"]
        total, reference = prefix + more, self.wanted["reference_steps"]
        least = max(total, prefix + self.preset["extract"]["k"] * train["save_every"])  # oracle
        if reference < least:
            why = f"{least} or more: to the end of stage 5, and k checkpoints past the jump"
            raise UserError(f"preset {name}: reference_steps must be {why}")
        self.values = {
            **{"root": shlex.quote(root), "alpha": ALPHA, "rate": "", "seed": "", "grid": ""},
            # RL steps: before the jump, after it, both; of the longest run, and what that adds
            **{"prefix": prefix, "more": more, "total": total, "reference": reference},
            **{"longer": reference - prefix, "beyond": max(0, reference - total)},
            **{"middle": policies(prefix, total), "ends": policies(prefix, total, reference)},
            "checkpoints": policies(*range(train["save_every"], prefix + 1, train["save_every"])),
            **{"recipes": " ".join(recipes), "last": FEWER_CHECKPOINTS},
            "fewer": " ".join(f"{recipe}-last{FEWER_CHECKPOINTS}" for recipe in recipes),
            "continue_from": " ".join(self.wanted["continue_from"]),
            **{"has_validation": problems, "validation": shlex.join(self.at_root([problems]))},
            "domains": shlex.join(self.at_root(self.wanted["domains"])),
        }
        prepare = self.wanted["prepare"].split()
        self.jobs = [Job("prepare", [*prepare, "--run-dir", root], [], 5)] if prepare else []

    def at_root(self, paths: list[str]) -> list[str]:
        return [path.replace("{run_dir}", self.root) for path in paths]

    def add(self, table: str, run: str, **values) -> None:
        """Appends those rows of `table` in plans.yaml on the run `root/run` that are not there yet.
        `values`: more of them."""
        values = {**self.values, **values}
        for label, flags, needs, work, *words in TABLES[table]:
            name, bracket, each = label.format_map(values).rstrip("]").partition("[")
            for one in dict.fromkeys(each.split() if bracket else [""]):
                if all(values.get(word) for word in words):
                    v = {**values, "each": one, "go_on": continuing(one)}
                    texts = [name + one, flags.format_map(v), needs.format_map(v)]
                    self._append(run, *texts, v.get(work, work))

    def at_rate(self, table: str, rate: str, seed: int, **values) -> None:
        """The rows of `table` at another learning rate, or with "" at the preset's own."""
        flags = {"rate": f"--learning-rate {rate}" if rate else "", "seed": f"--seed {seed}"}
        self.add(table, f"seed{seed}/{f'rate{rate}' if rate else 'lora'}", **flags, **values)

    def side(self, seed: int, name: str, jumps: str, **values) -> None:
        """A run with another algorithm, or "full": all parameters trained. jumps: in plans.yaml."""
        flags = f"--algorithm {name}"
        if name == "full":
            rate = self.preset["train"]["learning_rate"] / 10  # as in the paper
            flags = f"--tune full --learning-rate {rate:g} {self.wanted['full_flags']}"
        values |= {"seed": seed, "flags": flags, **TABLES["jumps"][jumps]}
        self.add("side", f"seed{seed}/{name}", **values)

    def _append(self, run: str, label: str, flags: str, needs: str, work: float) -> None:
        patterns = [p for need in needs.split(", ") for p in (need, f"{run} {need}")]
        known = [job.name for job in self.jobs]
        found = [name for name in known if any(fnmatch.fnmatch(name, p) for p in patterns)]
        where, words, stage = f"{self.root}/{run}".rstrip("/"), shlex.split(flags), label[:2]
        argv = [*self.wanted["launch"].split(), TABLES["scripts"][stage], "--config", self.name]
        argv += ["--run-dir", where, *(self._shared(stage, words) if run else []), *words]
        if (name := f"{run} {label}".strip()) not in known:
            self.jobs.append(Job(name, argv, found, work, stage))

    def _shared(self, stage: str, words: list[str]) -> list[str]:
        """Flags for what a preset has in "{run_dir}/...": in a grid that is the root's."""
        found = []
        for key, section, stages in TABLES["paths"]:
            flag, values = f"--{key.replace('_', '-')}", self.preset[section][key]
            if stage in stages.split() and flag not in words and "{run_dir}" in str(values):
                found += [flag, *self.at_root([values] if isinstance(values, str) else values)]
        return found


def policies(*steps: int) -> str:
    return " ".join(f"train/step_{step:04d}" for step in sorted({*steps}))


def continuing(start: str) -> str:
    """Stage 5's flags for a start like `none`, `none_linear` or `next-paper_alpha1.5_merged`."""
    if start.endswith("_linear"):
        flags = f"--name {shlex.quote(start)} --learning-rate-schedule linear"
        return f"--start {shlex.quote(start.removesuffix('_linear'))} {flags}"
    merged = " --restart merged" if start.endswith("_merged") else ""
    return f"--start {shlex.quote(start.removesuffix('_merged'))}{merged}"


def single(preset_name: str, preset: dict, run_dir: str) -> list[Job]:
    """One run: the first steps, the jumps, what follows them, the reference, the evaluation.

    All of it also at each of the preset's `rates`.
    """
    plan = Plan(preset_name, preset, run_dir)
    for rate in plan.wanted["rates"]:
        plan.add("single", f"rate{rate}", rate=f"--learning-rate {rate}")
    plan.add("single", "")
    return plan.jobs


def grid(kind: str, preset_name: str, preset: dict, root: str, seeds, wanted=()) -> list[Job]:
    """The kinds are explained in README.md. wanted: of `paper`, the paper's tables to make."""
    plan = Plan(preset_name, preset, root)
    if kind == "paper":
        paper(plan, seeds, {*wanted})
    elif kind in ("learning-rate", "sweep"):
        by_rate(plan, seeds, choose=kind == "sweep")
    else:
        for seed in seeds:
            plan.add("main", f"seed{seed}/lora", seed=seed, tables=kind == "tables")
    if kind == "tables":
        side_runs(plan, seeds)
    return plan.jobs


def by_rate(plan: Plan, seeds: list[int], choose: bool) -> None:
    """Runs at several learning rates. choose: GRPO alone, on validation problems."""
    rates, sweep = plan.wanted["rates"], plan.wanted["sweep"]
    whole = ["", *rates, *plan.wanted["more_rates"]]
    if choose:
        for rate, seed in itertools.product(sweep + whole, seeds):
            plan.at_rate("plain", rate, seed, choose=True)
        return
    for rate, seed in itertools.product(whole, seeds):
        plan.at_rate("single", rate, seed, grid=TABLES["swept"])
    for rate, seed in itertools.product(rates[:1], seeds):
        second_jump(plan, rate, seed)
    for rate, seed in itertools.product(sweep, seeds[:SWEEP_SEEDS]):
        plan.at_rate("plain", rate, seed, jumps=True)


def second_jump(plan: Plan, rate: str, seed: int) -> None:
    """About half of the RL after the jump, ten checkpoints of it, another jump, and the rest."""
    first, more = f"seed{seed}/rate{rate}", plan.values["more"]
    if not (every := more // 20):
        return
    plan.add("first", first)
    values = {"half": 10 * every, "rest": more - 10 * every, "every": every, "first": first}
    values |= {"rate": f"--learning-rate {rate}", "seed": f"--seed {seed + 1000}"}
    values["model"] = f"{plan.values['root']}/{first}/merged/next-aligned_alpha{ALPHA}"
    plan.add("second", f"seed{seed}/{SECOND}", **values)


def paper(plan: Plan, seeds: list[int], wanted: set[int]) -> None:
    """The rows of the paper's tables: 3 and 4 with Fig. 5 and 6, 5, 6, 7 and 8 with Fig. 7."""
    for seed in seeds:
        rows = {"seed": seed, "methods": wanted & {3, 4, 7, 8}, "ablations": 5 in wanted}
        plan.add("paper", f"seed{seed}/lora", **rows)
        for algorithm in ("rloo", "reinforce++") if 6 in wanted else ():
            plan.side(seed, algorithm, "own")
        if wanted - {6}:
            plan.side(seed, "full", "rivals" if wanted & {3, 4, 7, 8} else "own")
        for name in ("lora", "full") if wanted & {7, 8} and plan.wanted["domains"] else ():
            plan.add("domains", f"seed{seed}/{name}", lora=name == "lora")


def side_runs(plan: Plan, seeds: list[int]) -> None:
    """What the grid `tables` has beside the main runs."""
    train, short = plan.preset["train"], {"beyond": 0, "ends": plan.values["middle"]}
    scale = train["lora_alpha"] / train["lora_rank"]
    for seed in seeds:
        plan.side(seed, "full", "controls")
        for k in {*OTHER_K} - {own := plan.preset["extract"]["k"]}:
            alpha = f"{MAIN_ALPHA * own / k:g}"  # jumps of the same length in RL steps
            plan.add("other_k", f"seed{seed}/k{k}", seed=seed, k=k, alpha=alpha)
    for seed in seeds[:SIDE_SEEDS]:
        rl_extra_loop(plan, seed)
        for algorithm in ("rloo", "reinforce++"):
            plan.side(seed, algorithm, "controls", **short)
        for rank in {*OTHER_RANKS} - {train["lora_rank"]}:
            plan.add("rank", f"seed{seed}/rank{rank}", seed=seed, rank=rank, scaled=rank * scale)


def rl_extra_loop(plan: Plan, seed: int) -> None:
    """RL-Extra as its authors use it (arXiv 2601.04537): RL, a jump as far again, RL on that."""
    every, merged, before = max(1, plan.values["more"] // 2 // LOOP_CHECKPOINTS), "", "prepare"
    numbers = {"every": every, "steps": LOOP_CHECKPOINTS * every, "checkpoints": LOOP_CHECKPOINTS}
    for number in range(1, LOOP_ROUNDS + 1):
        run, last = f"seed{seed}/loop/round{number}", number == LOOP_ROUNDS
        values = {"seed": seed + 1000 * number, "merged": merged, "before": before}
        plan.add("loop", run, jump=not last, end=last, **numbers, **values)
        before = f"{run} 04"
        merged = f"--backbone {plan.values['root']}/{run}/merged/rl-extra_alpha{LOOP_CHECKPOINTS}"
