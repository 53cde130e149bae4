"""The paper's Tables 3 to 6 over several training seeds, from the runs of a grid (common/plans.py).

A difference is taken seed by seed, between policies that share their first RL steps, and its 95% interval is Student's over the seeds. The
test problems are the same for all seeds, so the intervals say how sure we are on these problems, not on others.
"""

import collections
import dataclasses
import pathlib
import statistics

from common.files import write as run_dir
from common.predictor import split_name
from common.reproduce import grid_figures, plans
from common.reproduce.grid_results import Estimate, Grid, estimate, jump_cosines
from common.reproduce.results import MAIN_ALPHA, NAMES, read_predictor_report


def cell(found: Estimate | None, how: str = "points") -> str:
    if found is None:
        return "–"
    return found.points() if how == "points" else found.plain(100, 1)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# ---------------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------------


def row(grid: Grid, label: str, run: str, policy: str, steps: int) -> list[str] | None:
    """A line of the main table: accuracy, differences to GRPO with LoRA at equal steps and at the end, ICER, length, seconds."""
    found = grid.get(run, policy)
    if not found:
        return None
    backbone = next(iter(grid.get("lora", "backbone").values()), None)
    accuracy = estimate([r.accuracy for r in found.values()])
    gain = 100 * (accuracy.mean - backbone.accuracy) if backbone else 0.0
    seconds = [r.seconds for r in found.values() if r.seconds is not None]
    ours = (run, policy)
    equal, last = ("lora", grid.step(steps)), ("lora", grid.step(grid.reference))
    return [
        label,
        str(steps),
        str(len(found)),
        accuracy.plain(100, 1),
        "–" if ours == equal else cell(grid.difference(ours, equal)),
        "–" if ours == last else cell(grid.difference(ours, last)),
        f"{steps / gain:.1f}" if steps and gain > 0 else "–",
        f"{statistics.fmean(r.length for r in found.values()):.1f}",
        f"{statistics.fmean(seconds):.0f}" if seconds else "–",
    ]


def main_table(grid: Grid) -> str:
    """Tables 3 and 4: the backbone, plain GRPO, and every method after the RL that follows its jump."""
    rows = [row(grid, "Backbone", "lora", "backbone", 0)]
    for run, label in (("full", "GRPO, full parameters"), ("lora", NAMES["grpo"])):
        policies = {r.steps: p for results in grid.results.values() for p, r in results.get(run, {}).items() if p.startswith("train/")}
        rows += [row(grid, label, run, policies[steps], steps) for steps in sorted(policies)]
    rows += [row(grid, label, "lora", grid.after(start), grid.total) for start, label in starts(grid)]
    loop = f"loop/round{plans.LOOP_ROUNDS}"
    steps = grid.prefix if not (found := [p for s in grid.results.values() for p in s.get(loop, {})]) else int(found[0][-4:])
    label = f"RL-Extra, {plans.LOOP_ROUNDS} rounds of {steps}"
    rows.append(loop_row(grid, label, loop, grid.step(steps), plans.LOOP_ROUNDS * steps))
    header = ["policy", "RL steps", "seeds", "accuracy % ± s.e.", "− GRPO, equal steps [95%]", f"− GRPO at {grid.reference} [95%]"]
    return table([*header, "ICER ↓", "length", "wall s"], [r for r in rows if r])


def loop_row(grid: Grid, label: str, run: str, policy: str, steps: int) -> list[str] | None:
    """The last round's own steps are not all there were; its seconds are those of one round."""
    found = row(grid, label, run, policy, steps)
    return found and [*found[:-1], "–"]


def starts(grid: Grid) -> list[tuple[str, str]]:
    """(start, label) of everything that was gone on from in the main run, in the order of NAMES."""
    found = {}
    for runs in grid.results.values():
        for policy, result in runs.get("lora", {}).items():
            if policy.startswith("continued/") and result.steps == grid.total:
                found[policy.split("/")[1]] = result
    return [(start, found[start].label) for start in sorted(found, key=lambda start: place(found[start].method))]


def place(method: str) -> tuple[int, str]:
    """Where a method stands in a table: in the order of NAMES, those that are not in it last."""
    name = split_name(method.removesuffix("_merged"))[0]
    return (list(NAMES).index(name) if name in NAMES else len(NAMES), method)


def jumps_table(grid: Grid, cosines: dict[str, Estimate]) -> str:
    """Right after the jump, before any RL: every method at the paper's alpha (those that have none, as they are)."""
    found = {}
    for runs in grid.results.values():
        for policy, result in runs.get("lora", {}).items():
            if result.jumped and result.alpha in (MAIN_ALPHA, None, 0.5 if "expo" in policy else None):
                found[policy] = result
    rows = []
    before, repeat = ("lora", grid.step(grid.prefix)), ("lora", f"extrapolated/repeat-last_alpha{MAIN_ALPHA:g}")
    for policy in sorted(found, key=lambda policy: place(found[policy].method)):
        if found[policy].method == "none":
            continue
        ours, cosine = ("lora", policy), cosines.get(policy)
        rows.append(
            [
                found[policy].label.removesuffix(", right after the jump"),
                str(len(grid.get(*ours))),
                cell(grid.accuracy(*ours), "plain"),
                cell(grid.difference(ours, before)),
                "–" if ours == repeat else cell(grid.difference(ours, repeat)),
                "–" if cosine is None else cosine.plain(),
            ]
        )
    header = ["jump", "seeds", "accuracy % ± s.e.", "− no jump [95%]", "− repeat-last [95%]", "cosine with the true next delta"]
    level = cell(grid.accuracy(*before), "plain")
    return table(header, [["no jump", str(len(grid.get(*before))), level, "–", cell(grid.difference(before, repeat)), "–"], *rows])


def backtest(grid: Grid, run: str, recipe: str) -> Estimate | None:
    """Cosine of a recipe's prediction with a true delta it has not seen (stage 3's backtest)."""
    values = []
    for seed in grid.seeds:
        path = grid.root / f"seed{seed}" / run / "predictor" / recipe / "report.json"
        tested = read_predictor_report(path)["backtest"] if path.is_file() else None
        if tested:
            values.append(tested["predictor"]["cosine"])
    return estimate(values) if values else None


def ablation_row(grid: Grid, label: str, run: str, recipe: str, alpha: float = MAIN_ALPHA, base: str = "") -> list[str] | None:
    """Held-out cosine, accuracy right after the jump and its gain, accuracy after more RL and its gain over the same RL without a jump."""
    start, base = f"next-{recipe}_alpha{alpha:g}", base or run
    jumped, later = (run, f"extrapolated/{start}"), (run, grid.after(start))
    if not grid.get(*jumped):
        return None
    cosine = backtest(grid, run, recipe)
    return [
        label,
        str(len(grid.get(*jumped))),
        cosine.plain() if cosine else "–",
        cell(grid.accuracy(*jumped), "plain"),
        cell(grid.difference(jumped, (base, grid.step(grid.prefix)))),
        cell(grid.accuracy(*later), "plain"),
        cell(grid.difference(later, (base, grid.step(grid.total)))),
    ]


def ablation_header(grid: Grid, name: str) -> list[str]:
    after = [f"at {grid.total} % ± s.e.", f"− GRPO at {grid.total} [95%]"]
    return [name, "seeds", "held-out cosine", "after the jump % ± s.e.", "− before it [95%]", *after]


def table5(grid: Grid) -> str:
    """Table 5: NExt, w/o LoRA, w/o the global delta, w/o the local delta; published recipe, then ours."""
    rows = []
    for recipe, label in (("paper", "published recipe"), ("aligned", "aligned recipe"), ("weighted", "weighted recipe")):
        rows.append(ablation_row(grid, f"NExt, {label}", "lora", recipe))
        rows.append(ablation_row(grid, f"{label}, w/o LoRA", "full", recipe))
        rows += [ablation_row(grid, f"{label}, w/o {role} delta", "lora", f"{recipe}-no-{role}") for role in ("global", "local")]
    return table(ablation_header(grid, "variant"), [r for r in rows if r])


def table6(grid: Grid) -> str:
    """Table 6: other RL algorithms, and NExt from their first steps."""
    rows = []
    for run, label in (("lora", "GRPO"), ("rloo", "RLOO"), ("reinforce++", "REINFORCE++")):
        jumps = [f"next-{recipe}_alpha{MAIN_ALPHA:g}" for recipe in ("weighted", "paper")]
        if not grid.get(run, grid.step(grid.total)):
            continue
        cells = [label, str(len(grid.get(run, grid.step(grid.total))))]
        cells += [cell(grid.accuracy(run, grid.step(step)), "plain") for step in (grid.prefix, grid.total, grid.reference)]
        for start in jumps:
            later = (run, grid.after(start))
            cells += [cell(grid.accuracy(*later), "plain"), cell(grid.difference(later, (run, grid.step(grid.total))))]
        rows.append(cells)
    header = ["algorithm", "seeds", *(f"at {step}" for step in (grid.prefix, grid.total, grid.reference))]
    for recipe in ("weighted", "published"):
        header += [f"NExt ({recipe}) at {grid.total}", f"− at {grid.total} [95%]"]
    return table(header, rows)


def settings_table(grid: Grid, k: int, checkpoints: int, rank: int) -> str:
    """Other k, fewer checkpoints, other ranks. The jump is always MAIN_ALPHA * k of the preset long, in checkpoints."""
    rows = []
    for recipe in ("weighted", "aligned"):
        rows.append(ablation_row(grid, f"{recipe}: k = {k}, {checkpoints} checkpoints, rank {rank}", "lora", recipe))
        for other in plans.OTHER_K:
            rows.append(ablation_row(grid, f"{recipe}: k = {other}", f"k{other}", recipe, MAIN_ALPHA * k / other, base="lora"))
        fewer = plans.FEWER_CHECKPOINTS
        rows.append(ablation_row(grid, f"{recipe}: the last {fewer} checkpoints", "lora", f"{recipe}-last{fewer}"))
        rows += [ablation_row(grid, f"{recipe}: rank {other}", f"rank{other}", recipe) for other in plans.OTHER_RANKS]
    return table(ablation_header(grid, "recipe and setting"), [r for r in rows if r])


# ---------------------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------------------


def claim(grid: Grid, a: tuple[str, str], b: tuple[str, str], not_worse: bool = False) -> str:
    found = grid.difference(a, b)
    return "–" if found is None else f"**{found.verdict(not_worse)}**: {found.points()}"


def claims(grid: Grid) -> str:
    """What Sec. 5 says of NExt, a line a claim, a column a recipe. Numbers are points of accuracy with their 95% intervals."""
    recipes = {"paper": "published recipe", "aligned": "aligned recipe", "weighted": "weighted recipe"}
    lines: dict[str, list[str]] = collections.defaultdict(list)
    plain, total, end = ("lora", grid.step(grid.prefix)), grid.step(grid.total), grid.step(grid.reference)
    for recipe in recipes:
        start = f"next-{recipe}_alpha{MAIN_ALPHA:g}"
        jumped, later = ("lora", f"extrapolated/{start}"), ("lora", grid.after(start))
        sweep = [grid.difference(("lora", f"extrapolated/next-{recipe}_alpha{alpha:g}"), plain) for alpha in (0.5, 1.0, 1.5, 2.0, 2.5)]
        verdicts = {found.verdict() for found in sweep if found}
        overall = "does not hold" if "does not hold" in verdicts else "holds" if verdicts == {"holds"} else "undecided"
        shown = ", ".join(f"{100 * found.mean:+.1f}" for found in sweep if found)
        lines["Table 5: the jump itself gains"].append(claim(grid, jumped, plain))
        lines["Fig. 6: every alpha from 0.5 to 2.5 gains"].append(f"**{overall}**: {shown}" if shown else "–")
        lines[f"Tables 3, 4: at {grid.total} steps better than GRPO with LoRA at {grid.total}"].append(claim(grid, later, ("lora", total)))
        lines[f"... better than GRPO with full parameters at {grid.total}"].append(claim(grid, later, ("full", total)))
        lines[f"... not worse than GRPO with LoRA at {grid.reference}"].append(claim(grid, later, ("lora", end), not_worse=True))
        alpharl = f"alpharl_alpha{MAIN_ALPHA:g}_merged"  # its rank 1 is too little to train on
        for name, other in (
            ("AlphaRL (merged restart)", alpharl),
            ("RL-Extra", f"rl-extra_alpha{MAIN_ALPHA:g}"),
            ("RELEX", f"relex_alpha{MAIN_ALPHA:g}"),
        ):
            compared = ("lora", grid.after(other))
            lines[f"... better than {name} at {grid.total}"].append(claim(grid, later, compared))
        for role in ("global", "local"):
            without = ("lora", f"extrapolated/next-{recipe}-no-{role}_alpha{MAIN_ALPHA:g}")
            lines[f"Table 5: the jump is better than one predicted without the {role} delta"].append(claim(grid, jumped, without))
        lines["Table 5: the jump gains more than w/o LoRA"].append(gain_over_full(grid, start))
        for run, name in (("rloo", "RLOO"), ("reinforce++", "REINFORCE++")):
            lines[f"Table 6: helps {name} at {grid.total}"].append(claim(grid, (run, grid.after(start)), (run, total)))
        lines["(control) better than a restart without a jump"].append(claim(grid, later, ("lora", grid.after("none"))))
        repeat = f"repeat-last_alpha{MAIN_ALPHA:g}"
        lines["(control) better than repeating the last delta, right after the jump"].append(
            claim(grid, jumped, ("lora", f"extrapolated/{repeat}"))
        )
        lines[f"(control) better than repeating the last delta, at {grid.total}"].append(claim(grid, later, ("lora", grid.after(repeat))))
        merged = ("lora", grid.after(f"{start}_merged"))
        lines["with a merged restart: better than GRPO"].append(claim(grid, merged, ("lora", total)))
        lines["with a merged restart: better than AlphaRL"].append(claim(grid, merged, ("lora", grid.after(alpharl))))
        lines["with a merged restart: better than a merged restart without a jump"].append(
            claim(grid, merged, ("lora", grid.after("none_merged")))
        )
    rows = [[name, *cells] for name, cells in lines.items() if set(cells) != {"–"}]
    return table(["claim or control", *recipes.values()], rows).replace("--:", "---")


def section3(grid: Grid) -> str:
    """What Sec. 3 says of the trajectory itself: Fig. 2, E_1 rises early and is higher with LoRA; Fig. 3, a straight line fails."""
    lora, full = grid.spectra("lora"), grid.spectra("full")
    if not lora:
        return ""
    steps = next(iter(lora.values()))["steps"]
    early = next((i for i, step in enumerate(steps) if step >= steps[-1] / 3), len(steps) - 1)
    at = {i: estimate([one["energy_ratio"][i] for one in lora.values()]) for i in (0, early, -1)}
    rise = estimate([one["energy_ratio"][early] - one["energy_ratio"][0] for one in lora.values()])
    shown = ", ".join(f"{at[i].plain()} at step {steps[i]}" for i in at)
    lines = [f"* Fig. 2, the rank-1 share E_1 of the update rises early in training: **{rise.verdict()}**. With LoRA it is {shown}."]
    both = [seed for seed in lora if seed in full]
    if both:
        gap = estimate([lora[seed]["energy_ratio"][-1] - full[seed]["energy_ratio"][-1] for seed in both])
        levels = ", ".join(f"{estimate([full[seed]['energy_ratio'][i] for seed in both]).plain()} at step {steps[i]}" for i in at)
        lines.append(f"* Fig. 2, it is higher with LoRA than without: **{gap.verdict()}**. With all parameters it is {levels}.")
    share = estimate([sum(row["held_out"] < 0 for row in one["linear_fit"]) / len(one["linear_fit"]) for one in lora.values()])
    half = dataclasses.replace(share, mean=share.mean - 0.5)
    lines.append(
        f"* Fig. 3, a straight line fails on over half of the vectors: **{half.verdict()}**. On checkpoints it was not fitted on, "
        f"{share.plain(100, 1)}% of the vectors have an R² below 0, which is worse than the mean of those few neighbouring points."
    )
    return "\n".join(lines)


def gain_over_full(grid: Grid, start: str) -> str:
    """The gain of the jump with LoRA minus its gain with full parameters, seed by seed."""
    gaps = []
    for runs in grid.results.values():
        lora, full, before, jumped = runs.get("lora", {}), runs.get("full", {}), grid.step(grid.prefix), f"extrapolated/{start}"
        if all(policy in run for run in (lora, full) for policy in (before, jumped)):
            gaps.append((lora[jumped].accuracy - lora[before].accuracy) - (full[jumped].accuracy - full[before].accuracy))
    return f"**{estimate(gaps).verdict()}**: {estimate(gaps).points()}" if gaps else "–"


# ---------------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------------


def write(root: pathlib.Path, preset: dict, seeds: list[int], made_with: str) -> str:
    """Writes <root>/tables.md, results.json and figures/; returns the tables for the console. `made_with`: by which command and code."""
    grid = Grid(root, preset, seeds)
    k, every, lora = preset.get("extract", {}).get("k", 5), preset.get("train", {}).get("save_every", 10), preset.get("train", {})
    parts = {
        f"Tables 3 and 4: what {grid.total} RL steps come to": main_table(grid),
        "Right after the jump": jumps_table(grid, jump_cosines(grid, k, every)),
        "The paper's claims": f"{section3(grid)}\n\n{claims(grid)}",
        "Table 5: what the jump needs": table5(grid),
        "Table 6: other algorithms": table6(grid),
        "Other settings": settings_table(grid, k, grid.prefix // every, lora.get("lora_rank", 64)),
    }
    figures = grid_figures.draw_all(grid)
    values = [
        {"seed": seed, "run": run, **{key: value for key, value in dataclasses.asdict(result).items() if key != "by_problem"}}
        for seed, runs in grid.results.items()
        for run, results in runs.items()
        for result in results.values()
    ]
    run_dir.write_json(root / "results.json", values)
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in parts.items() if body.count("\n") > 1)
    pictures = "\n\n".join(f"## {title}\n\n![{title}](figures/{path.name})" for title, path in figures.items())
    note = (
        f"Means over training seeds {', '.join(map(str, seeds))} (or as many as the column says) ± standard error. Differences are "
        "paired by seed, with Student's 95% interval over seeds; the test problems are the same for all."
    )
    run_dir.atomic_write_text(root / "tables.md", f"# Tables of {root.name}\n\n{made_with}\n\n{note}\n\n{text}\n\n{pictures}\n")
    return f"{text}\n\ntables: {root / 'tables.md'}\nfigures: " + " ".join(str(path) for path in figures.values())
