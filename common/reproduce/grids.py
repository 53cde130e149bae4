"""The grid of runs behind the paper's tables: <root>/seed0/lora, seed0/full, seed0/rloo ...

Each is an ordinary run directory. Nothing runs here.
"""

from common import UserError
from common.files.config import load_preset
from common.reproduce.plans import ALPHA, NEXT, Job, Plan, continuing
from common.reproduce.results import MAIN_ALPHA

NETWORKS = ["paper", "aligned"]
OTHER_K, OTHER_RANKS, FEWER_CHECKPOINTS = (2, 8), (4, 64), 8  # beside the preset's own
LOOP_ROUNDS, LOOP_CHECKPOINTS = 5, 5  # of RL-Extra's loop: rounds, and checkpoints in each
SIDE_SEEDS = 3  # of other algorithms, other ranks and RL-Extra's loop, to save time
GRIDS = ("main", "tables", "rl-extra")


def grid(kind: str, preset_name: str, preset: dict, root: str, seeds: list[int]) -> list[Job]:
    """`main`: what the preset does, for several seeds. `tables`: everything, the main rows first.

    `rl-extra`: RL-Extra's alternating loop alone, which is a part of `tables`.
    """
    if kind not in GRIDS:
        raise UserError(f"unknown grid '{kind}'; known: {', '.join(GRIDS)}")
    plan, everything = Plan(preset_name, preset, root, is_grid=True), kind == "tables"
    total = plan.prefix + plan.more
    for seed in seeds if kind != "rl-extra" else []:
        main_rows(plan, seed, everything)
    for seed in seeds if everything else []:
        side_run(plan, seed, "full", full_flags(preset), plan.reference)
        other_k(plan, seed)
    for seed in (seeds[:SIDE_SEEDS] if everything else seeds) if kind != "main" else []:
        rl_extra_loop(plan, seed)
    for seed in seeds[:SIDE_SEEDS] if everything else []:
        for algorithm in ("rloo", "reinforce++"):
            side_run(plan, seed, algorithm, ["--algorithm", algorithm], total)
        for rank in OTHER_RANKS:
            side_run(plan, seed, f"rank{rank}", rank_flags(preset, rank), 0)
    return plan.jobs


def full_flags(preset: dict) -> list[str]:
    """Stage 1's flags for all parameters, at `full_preset`'s rate or the paper's."""
    other = preset.get("reproduce", {}).get("full_preset")
    rate = load_preset(other)["train"]["learning_rate"] if other else 5e-7
    return ["--tune", "full", "--learning-rate", str(rate)]


def rank_flags(preset: dict, rank: int) -> list[str]:
    """Stage 1's flags for another LoRA rank at the preset's scale alpha / r."""
    train = preset.get("train", {})
    scale = train.get("lora_alpha", 32.0) / train.get("lora_rank", 64)
    return ["--lora-rank", str(rank), "--lora-alpha", str(rank * scale)]


def train(plan: Plan, run: str, flags: list[str], ends: list[int]) -> str:
    """Stage 1 up to each of `ends` in turn; returns the first job, which the jump needs."""
    names, begun = ["prepare"], 0
    for end in ends:
        label = "01" if not begun else f"01 to {end}"
        names.append(plan.add(run, label, [*flags, "--steps", str(end)], names[-1:], end - begun))
        begun = end
    return names[1]


def main_rows(plan: Plan, seed: int, everything: bool) -> None:
    """Tables 3 to 5, Fig. 3, 5, 6: GRPO with LoRA, jumps from its first steps, RL after them."""
    run, flags, oracle = f"seed{seed}/lora", ["--seed", str(seed)], ["--methods", "oracle"]
    recipes = plan.preset.get("predict", {}).get("recipes", ["aligned"])
    starts = [*plan.wanted.get("continue_from", [NEXT]), f"relex_alpha{ALPHA}"]
    first = train(plan, run, flags, [plan.prefix, plan.reference])
    after = plan.add(run, "02", ["--last-step", str(plan.prefix)], [first], 15)
    after = plan.add(run, "03", [*flags, "--recipes", *recipes], [after], 120)
    jumps = [plan.add(run, "04", [], [after], 15)]
    relex = ["--methods", "relex", "--alphas", ALPHA]
    jumps.append(plan.add(run, "04 relex", relex, jumps[:1], 15))
    if everything:
        jumps.append(ablations(plan, run, flags, recipes))
        jumps += rivals(plan, run, first, jumps[0])
        # AlphaRL's adapter has rank 1 and would stay so: a new LoRA on the merged model.
        starts += [f"alpharl_alpha{ALPHA}_merged", "none_merged"]
        starts += [f"next-paper-no-{role}_alpha{ALPHA}" for role in ("global", "local")]
    needs = list(jumps)
    for start in dict.fromkeys(starts):
        needs.append(plan.add(run, f"05 {start}", [*flags, *continuing(start)], jumps, plan.more))
    if everything:  # not an adapter
        needs.append(plan.add(run, "06 dare", ["--policies", "merged/dare_p0.9"], jumps, 5))
    longer = f"{run} 01 to {plan.reference}"
    needs.append(plan.add(run, "04 oracle", oracle, [jumps[0], longer], 15))
    plan.add(run, "06", [], needs, 250)


def ablations(plan: Plan, run: str, flags: list[str], recipes: list[str]) -> str:
    """Table 5: predictors without the global or the local delta, and of fewer checkpoints."""
    after, names, fewer = f"{run} 03", [], str(FEWER_CHECKPOINTS)
    for role, other in (("global", "local"), ("local", "global")):
        wanted = [*flags, "--recipes", *NETWORKS, "--inputs", other]
        after = plan.add(run, f"03 no {role}", wanted, [after], 120)
        names += [f"{recipe}-no-{role}" for recipe in NETWORKS]
    wanted = [*flags, "--recipes", *recipes, "--checkpoints", fewer]
    after = plan.add(run, "03 fewer", wanted, [after], 120)
    names += [f"{recipe}-last{fewer}" for recipe in recipes]
    wanted = ["--recipes", *names, "--methods", "next", "--alphas", ALPHA]
    return plan.add(run, "04 ablations", wanted, [after], 15)


def rivals(plan: Plan, run: str, first: str, jump: str) -> list[str]:
    """The other methods of the tables; those that look at accuracy where there is data for it."""
    methods, needs, data = ["alpharl", "wsm", "dare"], [jump], []
    if plan.wanted.get("validation_data"):
        problems = plan.wanted["validation_data"].replace("{run_dir}", plan.root)
        every = plan.preset.get("train", {}).get("save_every", 10)
        policies = [f"train/step_{step:04d}" for step in range(every, plan.prefix + 1, every)]
        flags = ["--test-data", problems, "--policies", *policies, "--output", "validation"]
        needs.append(plan.add(run, "06 validation", flags, [first], 60))
        methods += ["alpharl-pls", "greedy-soup"]
        data = ["--validation-data", problems]
    wanted = ["--alphas", ALPHA, "--methods", *methods, *data]
    others = plan.add(run, "04 others", wanted, needs, 60)
    return [others, plan.add(run, "04 expo", ["--methods", "expo", "--alphas", "0.5"], [jump], 15)]


def side_run(plan: Plan, seed: int, name: str, flags: list[str], reference: int) -> None:
    """GRPO with other settings, and jumps from its first steps: Table 5 (w/o LoRA), 6, other ranks.

    With `reference` 0 it ends with the jump.
    """
    run, flags, total = f"seed{seed}/{name}", ["--seed", str(seed), *flags], plan.prefix + plan.more
    ends = sorted({plan.prefix, total, reference}) if reference else [plan.prefix]
    network = "paper" if reference else "aligned"
    first = train(plan, run, flags, ends)
    after = plan.add(run, "02", ["--last-step", str(plan.prefix)], [first], 15)
    after = plan.add(run, "03", ["--seed", str(seed), "--recipes", network], [after], 60)
    methods = ["--recipes", network, "--methods", "next", "weighted", "repeat-last"]
    methods += ["--alphas", ALPHA]
    needs = [plan.add(run, "04", methods, [after], 15)]
    policies = [*(f"train/step_{end:04d}" for end in ends), "extrapolated/*"]
    if reference:
        for start in (f"weighted_alpha{ALPHA}", f"next-paper_alpha{ALPHA}"):
            going_on = [*flags, "--start", start]
            needs.append(plan.add(run, f"05 {start}", going_on, needs[:1], plan.more))
        needs.append(f"{run} 01 to {reference}")
        policies.append(f"continued/*/step_{total:04d}")
    plan.add(run, "06", ["--policies", *policies], needs, 30)


def other_k(plan: Plan, seed: int) -> None:
    """Other k on the main run's checkpoints, and jumps of the same length in RL steps."""
    main, k = f"seed{seed}/lora", plan.preset.get("extract", {}).get("k", 5)
    for other in OTHER_K:
        run, alpha = f"seed{seed}/k{other}", f"{MAIN_ALPHA * k / other:g}"
        series = ["--checkpoints", f"{plan.root}/{main}/train/step_*"]
        series += ["--last-step", str(plan.prefix), "--k", str(other)]
        after = plan.add(run, "02", series, [f"{main} 01"], 15)
        after = plan.add(run, "03", ["--seed", str(seed), "--recipes", "aligned"], [after], 60)
        methods = ["--recipes", "aligned", "--methods", "next", "weighted", "repeat-last"]
        after = plan.add(run, "04", [*methods, "--alphas", alpha], [after], 15)
        plan.add(run, "06", ["--policies", "extrapolated/*"], [after], 15)


def rl_extra_loop(plan: Plan, seed: int) -> None:
    """RL-Extra as its authors use it (arXiv 2601.04537): RL, a jump as far again, RL on that."""
    every = max(1, plan.more // 2 // LOOP_CHECKPOINTS)
    steps, merged, after, name = LOOP_CHECKPOINTS * every, [], ["prepare"], "rl-extra"
    for number in range(1, LOOP_ROUNDS + 1):
        run = f"seed{seed}/loop/round{number}"
        flags = ["--seed", str(seed + 1000 * number), "--steps", str(steps)]
        flags += ["--save-every", str(every), *merged]
        after = [plan.add(run, "01", flags, after, steps)]
        if number < LOOP_ROUNDS:
            series = ["--k", "1", "--last-step", str(steps), "--fit-checkpoints", "2"]
            after = [plan.add(run, "02", series, after, 15)]
            jump = ["--methods", name, "--alphas", str(LOOP_CHECKPOINTS), "--merge", "fp32"]
            after = [plan.add(run, "04", jump, after, 15)]
            merged = ["--backbone", f"{plan.root}/{run}/merged/{name}_alpha{LOOP_CHECKPOINTS}"]
    plan.add(run, "06", [*merged, "--policies", f"train/step_{steps:04d}"], after, 15)
