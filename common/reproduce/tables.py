"""The tables of a page: Tables 3 to 6, all jumps, other settings, backtests, every task."""

import statistics

from common.files.deltas import read_index
from common.reproduce import grids
from common.reproduce.results import (
    MAIN_ALPHA,
    NAMES,
    OWN_ALPHA,
    SUITES,
    TESTED,
    Result,
    split_name,
)
from common.reproduce.runs import MAIN, Estimate, Runs, over_seeds

RECIPES = ("next-paper", "next-aligned", "weighted")  # NExt's own, and the sum without a network
COST = ("ICER ↓", "length", "wall s")


def folder(method: str, alpha: float = MAIN_ALPHA) -> str:
    return f"{method}_alpha{alpha:g}"


def jump(method: str, alpha: float = MAIN_ALPHA) -> str:
    return f"extrapolated/{folder(method, alpha)}"


def percent(found: Estimate | None) -> str:
    return found.plain(100, 1) if found else "–"


def points(found: Estimate | None) -> str:
    return found.points() if found else "–"


def table(header: list[str], rows: list[list[str] | None]) -> str:
    """Markdown; the first column is text, the others are numbers. Empty without a row."""
    lines = ["| " + " | ".join(row) + " |" for row in rows if row]
    rule = "|---|" + "--:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *lines]) if lines else ""


def place(method: str) -> tuple[int, str]:
    """Where a method stands in a table: in the order of NAMES, others last."""
    name = split_name(method.removesuffix("_merged"))[0]
    return (list(NAMES).index(name) if name in NAMES else len(NAMES), method)


def plain_runs(runs: Runs, name: str = MAIN) -> list[Result]:
    """A run without a jump, by step."""
    found = [r for r in runs.some(name).values() if r.method == "grpo"]
    return sorted(found, key=lambda r: r.steps)


def ended(runs: Runs) -> list[Result]:
    """What went on from a jump to the last step, in the order of the tables."""
    found = [r for r in runs.some().values() if r.policy.startswith("continued/")]
    return sorted((r for r in found if r.steps == runs.total), key=lambda r: place(r.method))


def cost(runs: Runs, policy: str, name: str, steps: int) -> list[str]:
    """ICER (RL steps for a point above the backbone), response length, wall seconds."""
    found, base = runs.get(policy, name).values(), runs.accuracy("backbone")
    gain = 100 * (runs.accuracy(policy, name).mean - base.mean) if base else 0.0
    seconds = [r.seconds for r in found if r.seconds is not None]
    return [
        f"{steps / gain:.1f}" if steps and gain > 0 else "–",
        f"{statistics.fmean(r.length for r in found):.1f}",
        f"{statistics.fmean(seconds):.0f}" if seconds else "–",
    ]


def main_table(runs: Runs) -> str:
    """Tables 3 and 4: the backbone, plain GRPO, every method after the RL that follows its jump."""
    against = [0, *([runs.reference] if runs.reference else [])]  # 0: GRPO at as many steps

    def row(result: Result, name: str = MAIN, label: str = "", steps: int = 0) -> list[str]:
        policy, steps = result.policy, steps or result.steps
        others = [runs.step(step or steps) for step in against]
        same = [not steps or (policy, name) == (other, MAIN) for other in others]
        pairs = zip(same, others, strict=True)
        gaps = [None if s else runs.difference(policy, o, name, MAIN) for s, o in pairs]
        cells = [label or result.label, str(steps), runs.count(policy, name)]
        cells += [percent(runs.accuracy(policy, name)), *map(points, gaps)]
        return cells + cost(runs, policy, name, steps)

    main, loop = runs.some(), f"loop/round{grids.LOOP_ROUNDS}"
    rows = [row(main["backbone"])] if "backbone" in main else []
    rows += [row(r, name) for name in ("full", MAIN) for r in plain_runs(runs, name)]
    if not runs.before.startswith("train/"):
        rows.append(row(main[runs.before], label="before the jump"))
    rows += [row(r) for r in ended(runs)]
    for last in runs.some(loop).values():  # its own steps are not all there were, nor its seconds
        label = f"RL-Extra, {grids.LOOP_ROUNDS} rounds of {last.steps}"
        rows.append([*row(last, loop, label, grids.LOOP_ROUNDS * last.steps)[:-1], "–"])
    header = ["policy", "RL steps", runs.counted, "accuracy % ± s.e."]
    header += [f"− GRPO{f' at {a}' if a else ', equal steps'} {runs.interval}" for a in against]
    return table([*header, *COST], rows)


def jumps_table(runs: Runs) -> str:
    """Right after the jump, before any more RL: at the paper's alpha, or what has none."""
    found = [r for r in runs.some().values() if r.jumped and r.method != "none"]
    found = [r for r in found if r.alpha in (MAIN_ALPHA, None, OWN_ALPHA.get(r.method))]
    found, rows = sorted(found, key=lambda r: place(r.method)), []
    before, repeat, cosines = runs.before, jump("repeat-last"), runs.jump_cosines() if found else {}
    labels = {before: "before the jump"} | {r.policy: r.label for r in found}
    for policy in [policy for policy in labels if found and runs.get(policy)]:
        cells = [labels[policy], runs.count(policy), percent(runs.accuracy(policy))]
        for other in (before, repeat):
            cells.append("–" if policy == other else points(runs.difference(policy, other)))
        cosine = cosines[policy].plain() if policy in cosines and policy != before else "–"
        rows.append([*cells, cosine, *cost(runs, policy, MAIN, runs.prefix)])
    header = ["jump", runs.counted, "accuracy % ± s.e.", f"− before it {runs.interval}"]
    header += [f"− repeat-last {runs.interval}", "cosine with the true next delta"]
    return table([*header, *COST], rows)


def ablation(runs: Runs, label: str, name: str, method: str, alpha=MAIN_ALPHA) -> list[str] | None:
    """Held-out cosine, accuracy after the jump and its gain, accuracy after more RL and its gain.

    Another k has no RL of its own: its gain is that over the main run.
    """
    jumped, later = jump(method, alpha), runs.after(folder(method, alpha))
    if not runs.get(jumped, name):
        return None
    base = MAIN if alpha != MAIN_ALPHA else name
    before = runs.before if base == MAIN else runs.step(runs.prefix)
    cosine = runs.backtest(method, name)
    gain, late = runs.difference(jumped, before, name, base), runs.step(runs.total)
    cells = [label, runs.count(jumped, name), cosine.plain() if cosine else "–"]
    cells += [percent(runs.accuracy(jumped, name)), points(gain)]
    cells.append(percent(runs.accuracy(later, name)))
    return [*cells, points(runs.difference(later, late, name, base))]


def ablation_table(runs: Runs, first: str, groups: list[list[list[str] | None]]) -> str:
    """A table of `ablation` rows, in groups with the plain method first; empty without another."""
    if not any(row for group in groups for row in group[1:]):
        return ""
    header = [first, runs.counted, "held-out cosine", "after the jump % ± s.e."]
    header += [f"− before it {runs.interval}", f"at {runs.total} % ± s.e."]
    rows = [row for group in groups for row in group]
    return table([*header, f"− GRPO at {runs.total} {runs.interval}"], rows)


def table5(runs: Runs) -> str:
    """Table 5: NExt, w/o LoRA, w/o the global delta, w/o the local delta."""
    groups = []
    for method in RECIPES:
        label = NAMES[method]
        group = [ablation(runs, label, MAIN, method)]
        group.append(ablation(runs, f"{label}, w/o LoRA", "full", method))
        for role in ("global", "local"):
            group.append(ablation(runs, f"{label}, w/o {role} delta", MAIN, f"{method}-no-{role}"))
        groups.append(group)
    return ablation_table(runs, "variant", groups)


def settings_table(runs: Runs) -> str:
    """Other k, fewer checkpoints, other ranks. Each jump is as long as the paper's, in RL steps."""
    deltas, groups, last = runs.folder(runs.seeds[0]) / "deltas", [], grids.FEWER_CHECKPOINTS
    if not (deltas / "index.json").is_file():
        return ""
    index = read_index(deltas)
    k, checkpoints = index["k"], len(index["steps"])
    for method in ("weighted", "next-aligned"):
        label = NAMES[method]
        group = [ablation(runs, f"{label}: k = {k}, {checkpoints} checkpoints", MAIN, method)]
        for other in grids.OTHER_K:
            alpha = MAIN_ALPHA * k / other
            group.append(ablation(runs, f"{label}: k = {other}", f"k{other}", method, alpha))
        fewer = f"{method}-last{last}"
        group.append(ablation(runs, f"{label}: last {last} checkpoints", MAIN, fewer))
        for other in grids.OTHER_RANKS:
            group.append(ablation(runs, f"{label}: rank {other}", f"rank{other}", method))
        groups.append(group)
    return ablation_table(runs, "recipe and setting", groups)


def table6(runs: Runs) -> str:
    """Table 6: other RL algorithms, and NExt from their first steps."""
    rows, total, methods = [], runs.step(runs.total), ("weighted", "next-paper")
    steps = [step for step in (runs.prefix, runs.total, runs.reference) if step]
    for name, label in ((MAIN, "GRPO"), ("rloo", "RLOO"), ("reinforce++", "REINFORCE++")):
        if runs.get(total, name):
            cells = [percent(runs.accuracy(runs.step(step), name)) for step in steps]
            for later in [runs.after(folder(method)) for method in methods]:
                cells.append(percent(runs.accuracy(later, name)))
                cells.append(points(runs.difference(later, total, name)))
            rows.append([label, runs.count(total, name), *cells])
    header = ["algorithm", runs.counted, *(f"at {step}" for step in steps)]
    for method in methods:
        header += [f"{NAMES[method]}, at {runs.total}", f"− at {runs.total} {runs.interval}"]
    return table(header, rows if len(rows) > 1 else [])


def backtests(runs: Runs) -> str:
    """What each predictor is worth on a target it has not seen, beside the controls."""
    rows = []
    for recipe, reports in runs.predictor_reports().items():
        tested = [report["backtest"] for report in reports if report["backtest"]]
        if tested:
            at = f"{recipe} ({tested[0]['at_step']} → {tested[0]['predicts_step']})"
            cosines = [[t[row]["cosine"] for t in tested if row in t] for row in TESTED]
            rows.append([at, *(over_seeds(many).plain() if many else "–" for many in cosines)])
    return table(["recipe", *TESTED], rows)


def by_task(runs: Runs) -> str:
    """A column a task, and the mean of each suite of several. Empty where there is one task."""
    names = sorted({name for _, name, _ in runs.all()})
    found = [(name, r) for name in names for r in runs.some(name).values()]
    columns = {task: [task] for task in sorted({task for _, r in found for task in r.scores})}
    if len(columns) < 2:
        return ""
    for suite in SUITES:
        group = list(dict.fromkeys(task for _, r in found for task in r.of_suite(suite)))
        columns |= {f"mean of {suite} ({len(group)})": group} if len(group) > 1 else {}
    rows = []
    for name, result in found:
        cells = [result.policy if name == MAIN else f"{name}: {result.policy}"]
        for group in columns.values():
            having = [r for r in runs.get(result.policy, name).values() if {*group} <= {*r.scores}]
            scores = [float(r.scores[task].mean()) for r in having for task in group]
            cells.append(f"{100 * statistics.fmean(scores):.1f}" if scores else "–")
        rows.append(cells)
    return table(["accuracy %", *columns], rows)
