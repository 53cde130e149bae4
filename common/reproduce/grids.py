"""The grid of runs behind the paper's tables: <root>/seed0/lora, seed0/full, seed0/rloo ...

Each is an ordinary run directory. Nothing runs here.
"""

import itertools
import shlex

from common.files.config import load_preset
from common.reproduce.plans import ALPHA, Job, Plan, at_rate
from common.reproduce.results import MAIN_ALPHA

OTHER_K, OTHER_RANKS, FEWER_CHECKPOINTS = (2, 8), (4, 64), 8  # beside the preset's own
SECOND = "second"  # the run with a second jump
LOOP_ROUNDS, LOOP_CHECKPOINTS = 5, 5  # of RL-Extra's loop: rounds, and checkpoints in each
SIDE_SEEDS = 3  # of other algorithms, other ranks and RL-Extra's loop, to save time
SWEEP_SEEDS = 2  # of the rates of `sweep` in `learning-rate`
GRIDS = ("paper", "main", "tables", "learning-rate", "sweep")
SIDE = ("next weighted repeat-last", ("weighted", "next-paper"))  # jumps of side runs, RL after


def grid(kind: str, preset_name: str, preset: dict, root: str, seeds, wanted=()) -> list[Job]:
    """`paper`: the rows of the paper's tables `wanted`. `main`: what the preset does, for several
    seeds. `tables`: everything, the main rows first.

    `learning-rate`: everything at the preset's rate and its `rates`, jumps alone at those of its
    `sweep`. `sweep`: plain GRPO at all of them, measured on validation problems: to choose a rate.
    """
    plan = Plan(preset_name, preset, root)
    if kind in ("learning-rate", "sweep"):
        by_rate(plan, seeds, choose=kind == "sweep")
    for seed in seeds if kind == "paper" else []:
        paper(plan, seed, {*wanted})
    for seed in seeds if kind in ("main", "tables") else []:
        main_run(plan, seed, everything=kind == "tables")
    if kind != "tables":
        return plan.jobs
    for seed in seeds:
        full_run(plan, seed)
        for k in OTHER_K:  # jumps of the same length in RL steps
            alpha = f"{MAIN_ALPHA * plan.values['extract']['k'] / k:g}"
            plan.add("other_k", f"seed{seed}/k{k}", seed=seed, k=k, alpha=alpha)
    for seed in seeds[:SIDE_SEEDS]:
        rl_extra_loop(plan, seed)
        for algorithm in ("rloo", "reinforce++"):
            total = plan.prefix + plan.more
            side_run(plan, seed, algorithm, f"--algorithm {algorithm}", total)
        scale = plan.values["train"]["lora_alpha"] / plan.values["train"]["lora_rank"]
        for rank in OTHER_RANKS:
            flags = f"--lora-rank {rank} --lora-alpha {rank * scale}"
            side_run(plan, seed, f"rank{rank}", flags, 0)
    return plan.jobs


def by_rate(plan: Plan, seeds: list[int], choose: bool) -> None:
    """Runs at several learning rates. choose: GRPO alone, on validation problems."""
    wanted = plan.wanted
    whole = ["", *wanted["rates"], *wanted["more_rates"]]
    parts = ["grid", "validation" if wanted["validation_data"] else ""]
    for rate, seed in itertools.product(whole, seeds if not choose else []):
        at_rate(plan, rate, f"seed{seed}/", f"--seed {seed}", parts)
    for rate, seed in itertools.product(wanted["rates"][:1], seeds if not choose else []):
        second_jump(plan, rate, seed)
    ends = sorted({plan.prefix, plan.prefix + plan.more, plan.reference})
    values = {"policies": " ".join(f"train/step_{end:04d}" for end in ends)}
    values["policies"] += "" if choose else " 'extrapolated/*'"
    problems = shlex.quote(wanted["validation_data"].replace("{run_dir}", plan.root))
    values["measured_on"] = f"--test-data {problems}" if choose else ""
    alone = wanted["sweep"] + (whole if choose else [])
    for rate, seed in itertools.product(alone, seeds if choose else seeds[:SWEEP_SEEDS]):
        flags = {"rate": f"--learning-rate {rate}" if rate else "", "seed": f"--seed {seed}"}
        run = f"seed{seed}/rate{rate}" if rate else f"seed{seed}/lora"
        plan.add("plain", run, [] if choose else ["jumps"], **flags, **values)


def second_jump(plan: Plan, rate: str, seed: int) -> None:
    """Half of the RL after the jump, ten checkpoints of it, another jump, and the other half."""
    first, start = f"seed{seed}/rate{rate}", f"next-aligned_alpha{ALPHA}"
    plan.add("first", first)
    values = {"half": plan.more // 2, "every": max(1, plan.more // 20), "starts": [start, "none"]}
    values |= {"model": shlex.quote(f"{plan.root}/{first}/merged/{start}")}
    values["before"] = f"{first} 04 merged"
    flags = {"rate": f"--learning-rate {rate}", "seed": f"--seed {seed + 1000}"}
    plan.add("second", f"seed{seed}/{SECOND}", **flags, **values)


def main_run(plan: Plan, seed: int, everything: bool) -> None:
    """GRPO with LoRA, jumps from its first steps, RL after them."""
    recipes, problems = plan.values["predict"]["recipes"], plan.wanted["validation_data"]
    starts = [*plan.wanted["continue_from"], f"relex_alpha{ALPHA}"]
    if everything:
        # AlphaRL's adapter has rank 1 and would stay so: a new LoRA on the merged model.
        starts += [f"alpharl_alpha{ALPHA}_merged", "none_merged"]
        starts += [f"next-paper-no-{role}_alpha{ALPHA}" for role in ("global", "local")]
    names = ["paper-no-global", "aligned-no-global", "paper-no-local", "aligned-no-local"]
    names += [f"{recipe}-last{FEWER_CHECKPOINTS}" for recipe in recipes]
    every = plan.values["train"]["save_every"]
    steps = range(every, plan.prefix + 1, every)
    problems = shlex.quote(problems.replace("{run_dir}", plan.root)) if problems else ""
    by_accuracy = f"alpharl-pls greedy-soup --validation-data {problems}" if problems else ""
    plan.add(
        "main",
        f"seed{seed}/lora",
        ["tables" if everything else "", "validation" if problems else ""],
        **{"seed": seed, "starts": dict.fromkeys(starts), "recipes": " ".join(recipes)},
        **{"fewer": FEWER_CHECKPOINTS, "ablations": " ".join(names), "by_accuracy": by_accuracy},
        checkpoints=" ".join(f"train/step_{step:04d}" for step in steps),
        validation=problems,
    )


def paper(plan: Plan, seed: int, wanted: set[int]) -> None:
    """The rows of the paper's tables: 3 and 4 with Fig. 5 and 6, 5, 6, 7 and 8 with Fig. 7."""
    total = plan.prefix + plan.more
    starts = [f"next-paper_alpha{ALPHA}_merged", f"next-paper_alpha{ALPHA}"]
    # AlphaRL's adapter has rank 1 and would stay so: a new LoRA on the merged model.
    rivals = [f"alpharl_alpha{ALPHA}_merged", f"rl-extra_alpha{ALPHA}"]
    starts += rivals if wanted & {3, 4, 7, 8} else []
    fewer = [f"next-paper-no-{role}_alpha{ALPHA}" for role in ("global", "local")]
    starts += fewer if 5 in wanted else []
    ends = [f"train/step_{step:04d}" for step in (plan.prefix, total, plan.reference)]
    policies = " ".join(["backbone", *ends, f"'continued/*/step_{total:04d}'"])
    words = {"methods": {3, 4, 7, 8}, "ablations": {5}}
    parts = [word for word, tables in words.items() if tables & wanted]
    plan.add("paper", f"seed{seed}/lora", parts, seed=seed, policies=policies, starts=starts)
    jumps = ("next", ("next-paper",))
    for algorithm in ("rloo", "reinforce++") if 6 in wanted else ():
        side_run(plan, seed, algorithm, f"--algorithm {algorithm}", plan.reference, jumps)
    if wanted & {3, 4}:
        jumps = ("next alpharl rl-extra", ("next-paper", "merged/alpharl", "merged/rl-extra"))
    if wanted & {3, 4, 5} and plan.wanted["full"]:
        full_run(plan, seed, jumps)
    if wanted & {7, 8} and plan.wanted["domains"]:
        others = shlex.join(name.replace("{run_dir}", plan.root) for name in plan.wanted["domains"])
        plan.add("domains", f"seed{seed}/lora", policies=policies, domains=others)


def full_run(plan: Plan, seed: int, jumps: tuple = SIDE) -> None:
    """All parameters trained: Table 5's "w/o LoRA", and rows of Tables 3 and 4."""
    other = plan.wanted["full_preset"]
    rate = load_preset(other)["train"]["learning_rate"] if other else 5e-7
    flags = f"--tune full --learning-rate {rate} {plan.wanted['full_flags']}".strip()
    side_run(plan, seed, "full", flags, plan.reference, jumps)


def side_run(plan: Plan, seed: int, name: str, flags: str, reference: int, jumps=SIDE) -> None:
    """GRPO with other settings, and jumps from its first steps. With `reference` 0 no RL after.

    jumps: stage 4's methods, and those that RL follows.
    """
    total = plan.prefix + plan.more
    starts = [f"{method}_alpha{ALPHA}" for method in jumps[1]] if reference else []
    ends = sorted({plan.prefix, total, reference}) if reference else [plan.prefix]
    policies = [*(f"train/step_{end:04d}" for end in ends), "'extrapolated/*'"]
    policies += [f"'continued/*/step_{total:04d}'"] if reference else []
    plan.add(
        "side",
        f"seed{seed}/{name}",
        **{"seed": seed, "flags": flags, "network": "paper" if reference else "aligned"},
        **{"starts": starts, "ends": ends[1:], "policies": " ".join(policies)},
        methods=jumps[0],
        longer=(ends[-1] - plan.prefix) / max(len(ends) - 1, 1),
    )


def rl_extra_loop(plan: Plan, seed: int) -> None:
    """RL-Extra as its authors use it (arXiv 2601.04537): RL, a jump as far again, RL on that."""
    every, merged, before = max(1, plan.more // 2 // LOOP_CHECKPOINTS), "", "prepare"
    numbers = {"every": every, "steps": LOOP_CHECKPOINTS * every, "checkpoints": LOOP_CHECKPOINTS}
    for number in range(1, LOOP_ROUNDS + 1):
        run, part = f"seed{seed}/loop/round{number}", "jump" if number < LOOP_ROUNDS else "end"
        values = {**numbers, "seed": seed + 1000 * number, "merged": merged, "before": before}
        plan.add("loop", run, [part], **values)
        before = f"{run} 04"
        model = f"{plan.root}/{run}/merged/rl-extra_alpha{LOOP_CHECKPOINTS}"
        merged = f"--backbone {shlex.quote(model)}"
