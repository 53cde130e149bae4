"""The tables of a page: the paper's Tables 3 to 6, every jump before more RL, other settings, the backtests, a column a task."""

import statistics

from common.files.deltas import read_index
from common.reproduce import plans
from common.reproduce.results import MAIN_ALPHA, NAMES, OWN_ALPHA, TESTED, split_name, suite_of
from common.reproduce.runs import MAIN, Estimate, Runs, over_seeds

RECIPES = ("next-paper", "next-aligned", "weighted")  # NExt's own, and the sum without a network


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
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    rows = [row for row in rows if row]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) if rows else ""


def interval(runs: Runs) -> str:
    return "[± 2 s.e.]" if len(runs.seeds) == 1 else "[95%]"


def counted(runs: Runs) -> str:
    return "seeds" if runs.is_grid else "n"


def count(runs: Runs, policy: str, name: str = MAIN) -> str:
    found = runs.get(policy, name)
    return str(len(found) if runs.is_grid else sum(r.n for r in found.values()))


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


COST = ["ICER ↓", "length", "wall s"]


def place(method: str) -> tuple[int, str]:
    """Where a method stands in a table: in the order of NAMES, others last."""
    name = split_name(method.removesuffix("_merged"))[0]
    return (list(NAMES).index(name) if name in NAMES else len(NAMES), method)


def main_table(runs: Runs) -> str:
    """Tables 3 and 4: the backbone, plain GRPO, and every method after the RL that follows its jump."""

    def row(policy: str, name: str = MAIN, label: str = "", steps: int = 0) -> list[str]:
        result = next(iter(runs.get(policy, name).values()))
        steps = steps or result.steps
        others = [runs.step(steps), runs.step(runs.reference)] if steps else []
        same = [name == MAIN and policy == other for other in others]
        gaps = [
            None if s else runs.difference(policy, o, name, MAIN)
            for s, o in zip(same, others, strict=True)
        ]
        gaps = [points(gap) for gap in gaps] or ["–", "–"]
        cells = [
            label or result.label,
            str(steps),
            count(runs, policy, name),
            percent(runs.accuracy(policy, name)),
        ]
        return [*cells, *gaps[: 1 + bool(runs.reference)], *cost(runs, policy, name, steps)]

    main = runs.some()
    rows = [row("backbone")] if "backbone" in main else []
    for name in ("full", MAIN):
        plain = [r for r in runs.some(name).values() if r.method == "grpo"]
        rows += [row(r.policy, name) for r in sorted(plain, key=lambda r: r.steps)]
    if not runs.before.startswith("train/"):
        rows.append(row(runs.before, label="before the jump"))
    ended = [
        r
        for r in main.values()
        if r.policy == runs.after(r.policy.split("/")[-2] if "/" in r.policy else "")
    ]
    rows += [row(r.policy) for r in sorted(ended, key=lambda r: place(r.method))]
    loop = f"loop/round{plans.LOOP_ROUNDS}"
    for last in runs.some(loop).values():  # its own steps are not all there were, nor its seconds
        label = f"RL-Extra, {plans.LOOP_ROUNDS} rounds of {last.steps}"
        rows.append([*row(last.policy, loop, label, plans.LOOP_ROUNDS * last.steps)[:-1], "–"])
    header = [
        "policy",
        "RL steps",
        counted(runs),
        "accuracy % ± s.e.",
        f"− GRPO, equal steps {interval(runs)}",
    ]
    header += [f"− GRPO at {runs.reference} {interval(runs)}"] if runs.reference else []
    return table([*header, *COST], rows)


def jumps(runs: Runs) -> list:
    """One result of every policy right after the jump, at the paper's alpha or without one."""
    alphas = (MAIN_ALPHA, None)
    found = [r for r in runs.some().values() if r.jumped and r.method != "none"]
    found = [r for r in found if r.alpha in alphas or r.alpha == OWN_ALPHA.get(r.method)]
    return sorted(found, key=lambda r: place(r.method))


def jumps_table(runs: Runs) -> str:
    """Right after the jump, before any more RL."""
    cosines, before, repeat = runs.jump_cosines(), runs.before, jump("repeat-last")
    rows = []
    for policy, label in [(before, "before the jump"), *((r.policy, r.label) for r in jumps(runs))]:
        if not runs.get(policy):
            continue
        cosine = cosines.get(policy)
        rows.append([
            label, count(runs, policy), percent(runs.accuracy(policy)),
            "–" if policy == before else points(runs.difference(policy, before)),
            "–" if policy == repeat else points(runs.difference(policy, repeat)),
            cosine.plain() if cosine and policy != before else "–",
            *cost(runs, policy, MAIN, runs.prefix),
        ])  # fmt: skip
    bars = interval(runs)
    header = [
        "jump",
        counted(runs),
        "accuracy % ± s.e.",
        f"− before it {bars}",
        f"− repeat-last {bars}",
    ]
    return table([*header, "cosine with the true next delta", *COST], rows if len(rows) > 1 else [])


def ablation_row(
    runs: Runs, label: str, name: str, method: str, alpha: float = MAIN_ALPHA, base: str = ""
) -> list[str] | None:
    """Held-out cosine, accuracy after the jump and its gain, accuracy after more RL and its gain."""
    jumped, later, base = jump(method, alpha), runs.after(folder(method, alpha)), base or name
    if not runs.get(jumped, name):
        return None
    recipe = method.removeprefix("next-") if method.startswith("next-") else ""
    cosine = runs.backtest(recipe, "predictor" if recipe else method, name)
    before = runs.before if base == MAIN else runs.step(runs.prefix)
    return [
        label, count(runs, jumped, name), cosine.plain() if cosine else "–",
        percent(runs.accuracy(jumped, name)), points(runs.difference(jumped, before, name, base)),
        percent(runs.accuracy(later, name)),
        points(runs.difference(later, runs.step(runs.total), name, base)),
    ]  # fmt: skip


def ablation_table(runs: Runs, first: str, rows: list[list[str] | None]) -> str:
    bars = interval(runs)
    after = [f"at {runs.total} % ± s.e.", f"− GRPO at {runs.total} {bars}"]
    header = [
        first,
        counted(runs),
        "held-out cosine",
        "after the jump % ± s.e.",
        f"− before it {bars}",
    ]
    return table([*header, *after], rows)


def table5(runs: Runs) -> str:
    """Table 5: NExt, w/o LoRA, w/o the global delta, w/o the local delta. Empty without an ablation."""
    rows, ablations = [], 0
    for method in RECIPES:
        label = NAMES[method]
        others = [ablation_row(runs, f"{label}, w/o LoRA", "full", method)]
        for role in ("global", "local"):
            others.append(
                ablation_row(runs, f"{label}, w/o {role} delta", MAIN, f"{method}-no-{role}")
            )
        ablations += len([row for row in others if row])
        rows += [ablation_row(runs, label, MAIN, method), *others]
    return ablation_table(runs, "variant", rows if ablations else [])


def table6(runs: Runs) -> str:
    """Table 6: other RL algorithms, and NExt from their first steps."""
    rows, steps, methods = [], (runs.prefix, runs.total, runs.reference), ("weighted", "next-paper")
    total = runs.step(runs.total)
    for name, label in ((MAIN, "GRPO"), ("rloo", "RLOO"), ("reinforce++", "REINFORCE++")):
        if not runs.get(total, name):
            continue
        cells = [label, count(runs, total, name)]
        cells += [percent(runs.accuracy(runs.step(step), name)) for step in steps]
        for method in methods:
            later = runs.after(folder(method))
            cells += [
                percent(runs.accuracy(later, name)),
                points(runs.difference(later, total, name)),
            ]
        rows.append(cells)
    header = ["algorithm", counted(runs), *(f"at {step}" for step in steps)]
    for method in methods:
        header += [f"{NAMES[method]}, at {runs.total}", f"− at {runs.total} {interval(runs)}"]
    return table(header, rows if len(rows) > 1 else [])


def settings_table(runs: Runs) -> str:
    """Other k, fewer checkpoints, other ranks. Each jump is as long as the paper's, in RL steps."""
    run = runs.folder(runs.seeds[0])
    if not (run / "deltas" / "index.json").is_file():
        return ""
    index = read_index(run / "deltas")
    k, checkpoints, rows, others = index["k"], len(index["steps"]), [], 0
    for method in ("weighted", "next-aligned"):
        label, last = NAMES[method], plans.FEWER_CHECKPOINTS
        found = [
            ablation_row(
                runs, f"{label}: k = {other}", f"k{other}", method, MAIN_ALPHA * k / other, MAIN
            )
            for other in plans.OTHER_K
        ]
        found.append(
            ablation_row(runs, f"{label}: last {last} checkpoints", MAIN, f"{method}-last{last}")
        )
        for other in plans.OTHER_RANKS:
            found.append(ablation_row(runs, f"{label}: rank {other}", f"rank{other}", method))
        others += len([row for row in found if row])
        rows += [
            ablation_row(runs, f"{label}: k = {k}, {checkpoints} checkpoints", MAIN, method),
            *found,
        ]
    return ablation_table(runs, "recipe and setting", rows if others else [])


def backtests(runs: Runs) -> str:
    """What each predictor is worth on a target it has not seen, beside the controls."""
    rows = []
    for recipe, reports in runs.predictor_reports().items():
        tested = [report["backtest"] for report in reports if report["backtest"]]
        if tested:
            at = f"{recipe} ({tested[0]['at_step']} → {tested[0]['predicts_step']})"
            cosines = [[t[row]["cosine"] for t in tested if row in t] for row in TESTED]
            rows.append(
                [at, *(over_seeds(values).plain() if values else "–" for values in cosines)]
            )
    return table(["predictor", *TESTED], rows)


def by_task(runs: Runs) -> str:
    """A column a task, and the mean of each suite of several. Empty where there is one task."""
    found = [
        (name, r)
        for name in sorted({name for _, name, _ in runs.all()})
        for r in runs.some(name).values()
    ]
    tasks = sorted(
        {task for _, r in found for task in r.scores}, key=lambda task: (suite_of(task), task)
    )
    groups = {task: [task] for task in tasks}
    for suite in dict.fromkeys(map(suite_of, tasks)):
        group = [task for task in tasks if suite_of(task) == suite]
        groups |= {f"mean of {len(group)} ({suite})": group} if len(group) > 1 else {}

    def mean(name: str, policy: str, group: list[str]) -> str:
        values = [r for r in runs.get(policy, name).values() if {*group} <= {*r.scores}]
        if not values:
            return "–"
        return f"{100 * statistics.fmean(r.scores[t].mean().item() for r in values for t in group):.1f}"

    rows = [
        [
            policy if name == MAIN else f"{name}: {policy}",
            *(mean(name, policy, group) for group in groups.values()),
        ]
        for name, policy in ((name, r.policy) for name, r in found)
    ]
    return table(["accuracy %", *groups], rows if len(tasks) > 1 else [])
