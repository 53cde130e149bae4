"""The grid of runs behind the paper's tables: <root>/seed0/lora, seed0/full, seed0/rloo ...

Each is an ordinary run directory. Nothing runs here.
"""

import shlex

from common.files.config import load_preset
from common.reproduce.plans import ALPHA, Job, Plan
from common.reproduce.results import MAIN_ALPHA

OTHER_K, OTHER_RANKS, FEWER_CHECKPOINTS = (2, 8), (4, 64), 8  # beside the preset's own
LOOP_ROUNDS, LOOP_CHECKPOINTS = 5, 5  # of RL-Extra's loop: rounds, and checkpoints in each
SIDE_SEEDS = 3  # of other algorithms, other ranks and RL-Extra's loop, to save time
GRIDS = ("main", "tables", "rl-extra")
CONTROLS = "--methods next weighted repeat-last"  # what every side run jumps with


def grid(kind: str, preset_name: str, preset: dict, root: str, seeds: list[int]) -> list[Job]:
    """`main`: what the preset does, for several seeds. `tables`: everything, the main rows first.

    `rl-extra`: RL-Extra's alternating loop alone, which is a part of `tables`.
    """
    plan, everything = Plan(preset_name, preset, root, is_grid=True), kind == "tables"
    for seed in seeds if kind != "rl-extra" else []:
        main_rows(plan, seed, everything)
    for seed in seeds if everything else []:
        other = plan.wanted["full_preset"]
        rate = load_preset(other)["train"]["learning_rate"] if other else 5e-7
        side_run(plan, seed, "full", f"--tune full --learning-rate {rate}", plan.reference)
        other_k(plan, seed)
    for seed in (seeds[:SIDE_SEEDS] if everything else seeds) if kind != "main" else []:
        rl_extra_loop(plan, seed)
    for seed in seeds[:SIDE_SEEDS] if everything else []:
        for algorithm in ("rloo", "reinforce++"):
            total = plan.prefix + plan.more
            side_run(plan, seed, algorithm, f"--algorithm {algorithm}", total)
        scale = plan.values["train"]["lora_alpha"] / plan.values["train"]["lora_rank"]
        for rank in OTHER_RANKS:
            flags = f"--lora-rank {rank} --lora-alpha {rank * scale}"
            side_run(plan, seed, f"rank{rank}", flags, 0)
    return plan.jobs


def train(plan: Plan, run: str, flags: str, ends: list[int]) -> str:
    """Stage 1 up to each of `ends` in turn; returns the first job, which the jump needs."""
    names, begun = ["prepare"], 0
    for end in ends:
        label = f"01 to {end}" if begun else "01"
        names.append(plan.add(run, label, f"{flags} --steps {end}", names[-1:], end - begun))
        begun = end
    return names[1]


def main_rows(plan: Plan, seed: int, everything: bool) -> None:
    """Tables 3 to 5, Fig. 3, 5, 6: GRPO with LoRA, jumps from its first steps, RL after them."""
    run, flags, recipes = f"seed{seed}/lora", f"--seed {seed}", plan.values["predict"]["recipes"]
    starts = [*plan.wanted["continue_from"], f"relex_alpha{ALPHA}"]
    first = train(plan, run, flags, [plan.prefix, plan.reference])
    after = plan.add(run, "02", f"--last-step {plan.prefix}", [first])
    after = plan.add(run, "03", f"{flags} --recipes {' '.join(recipes)}", [after], 120)
    jumps = [plan.add(run, "04", "", [after])]
    jumps.append(plan.add(run, "04 relex", f"--methods relex --alphas {ALPHA}", jumps))
    if everything:
        jumps += [ablations(plan, run, flags, recipes), *rivals(plan, run, first, jumps[0])]
        # AlphaRL's adapter has rank 1 and would stay so: a new LoRA on the merged model.
        starts += [f"alpharl_alpha{ALPHA}_merged", "none_merged"]
        starts += [f"next-paper-no-{role}_alpha{ALPHA}" for role in ("global", "local")]
    needs = [*jumps, *(plan.go_on(run, s, flags, jumps) for s in dict.fromkeys(starts))]
    if everything:  # not an adapter
        needs.append(plan.add(run, "06 dare", "--policies merged/dare_p0.9", jumps, 5))
    longer = [jumps[0], f"{run} 01 to {plan.reference}"]
    needs.append(plan.add(run, "04 oracle", "--methods oracle", longer))
    plan.add(run, "06", "", needs, 250)


def ablations(plan: Plan, run: str, flags: str, recipes: list[str]) -> str:
    """Table 5: predictors without the global or the local delta, and of fewer checkpoints."""
    after, names, networks = f"{run} 03", [], ("paper", "aligned")
    for role, other in (("global", "local"), ("local", "global")):
        wanted = f"{flags} --recipes {' '.join(networks)} --inputs {other}"
        after = plan.add(run, f"03 no {role}", wanted, [after], 120)
        names += [f"{recipe}-no-{role}" for recipe in networks]
    wanted = f"{flags} --recipes {' '.join(recipes)} --checkpoints {FEWER_CHECKPOINTS}"
    after = plan.add(run, "03 fewer", wanted, [after], 120)
    names += [f"{recipe}-last{FEWER_CHECKPOINTS}" for recipe in recipes]
    wanted = f"--recipes {' '.join(names)} --methods next --alphas {ALPHA}"
    return plan.add(run, "04 ablations", wanted, [after])


def rivals(plan: Plan, run: str, first: str, jump: str) -> list[str]:
    """The other methods of the tables; those that look at accuracy where there is data for it."""
    wanted, needs = f"--alphas {ALPHA} --methods alpharl wsm dare", [jump]
    if problems := plan.wanted["validation_data"]:
        problems = shlex.quote(problems.replace("{run_dir}", "{root}"))
        every = plan.values["train"]["save_every"]
        steps = range(every, plan.prefix + 1, every)
        policies = " ".join(f"train/step_{step:04d}" for step in steps)
        flags = f"--test-data {problems} --policies {policies} --output validation"
        needs.append(plan.add(run, "06 validation", flags, [first], 60))
        wanted += f" alpharl-pls greedy-soup --validation-data {problems}"
    others = plan.add(run, "04 others", wanted, needs, 60)
    return [others, plan.add(run, "04 expo", "--methods expo --alphas 0.5", [jump])]


def side_run(plan: Plan, seed: int, name: str, flags: str, reference: int) -> None:
    """GRPO with other settings, and jumps from its first steps: Table 5 (w/o LoRA), 6, other ranks.

    With `reference` 0 it ends with the jump.
    """
    run, flags, total = f"seed{seed}/{name}", f"--seed {seed} {flags}", plan.prefix + plan.more
    ends = sorted({plan.prefix, total, reference}) if reference else [plan.prefix]
    network = "paper" if reference else "aligned"
    first = train(plan, run, flags, ends)
    needs = [jump_of(plan, run, f"--last-step {plan.prefix}", network, ALPHA, first)]
    policies = [*(f"train/step_{end:04d}" for end in ends), "'extrapolated/*'"]
    if reference:
        starts = (f"weighted_alpha{ALPHA}", f"next-paper_alpha{ALPHA}")
        needs += [plan.go_on(run, start, flags, needs[:1]) for start in starts]
        needs.append(f"{run} 01 to {reference}")
        policies.append(f"'continued/*/step_{total:04d}'")
    plan.add(run, "06", f"--policies {' '.join(policies)}", needs, 30)


def jump_of(plan: Plan, run: str, series: str, network: str, alpha: str, first: str) -> str:
    """Stages 2 to 4 of a side run: one network, and what it is compared with."""
    after = plan.add(run, "02", series, [first])
    seed = run.split("/")[0].removeprefix("seed")
    after = plan.add(run, "03", f"--seed {seed} --recipes {network}", [after], 60)
    return plan.add(run, "04", f"--recipes {network} {CONTROLS} --alphas {alpha}", [after])


def other_k(plan: Plan, seed: int) -> None:
    """Other k on the main run's checkpoints, and jumps of the same length in RL steps."""
    for k in OTHER_K:
        run, alpha = f"seed{seed}/k{k}", f"{MAIN_ALPHA * plan.values['extract']['k'] / k:g}"
        series = f"--checkpoints '{{root}}/seed{seed}/lora/train/step_*'"
        series += f" --last-step {plan.prefix} --k {k}"
        jump = jump_of(plan, run, series, "aligned", alpha, f"seed{seed}/lora 01")
        plan.add(run, "06", "--policies 'extrapolated/*'", [jump])


def rl_extra_loop(plan: Plan, seed: int) -> None:
    """RL-Extra as its authors use it (arXiv 2601.04537): RL, a jump as far again, RL on that."""
    every, n = max(1, plan.more // 2 // LOOP_CHECKPOINTS), LOOP_CHECKPOINTS
    steps, merged, after = n * every, "", ["prepare"]
    for number in range(1, LOOP_ROUNDS + 1):
        run, new_seed = f"seed{seed}/loop/round{number}", seed + 1000 * number
        flags = f"--seed {new_seed} --steps {steps} --save-every {every} {merged}"
        after = [plan.add(run, "01", flags, after, steps)]
        if number < LOOP_ROUNDS:
            series = f"--k 1 --last-step {steps} --fit-checkpoints 2"
            after = [plan.add(run, "02", series, after)]
            jump = f"--methods rl-extra --alphas {n} --merge fp32"
            after = [plan.add(run, "04", jump, after)]
            merged = f"--backbone '{{root}}/{run}/merged/rl-extra_alpha{n}'"
    plan.add(run, "06", f"{merged} --policies train/step_{steps:04d}", after)
