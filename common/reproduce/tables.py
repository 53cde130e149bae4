"""The tables of a page: Tables 3 to 6, all jumps, other settings, backtests, every task."""

import itertools
import statistics

from common.files.deltas import read_index
from common.files.read import read_json
from common.reproduce import grids
from common.reproduce.estimates import Estimate, over_seeds
from common.reproduce.results import (
    MAIN_ALPHA,
    METHODS,
    OWN_ALPHA,
    SUITES,
    Result,
    label_of,
    split_name,
    table_of,
)
from common.reproduce.runs import MAIN, Runs

RECIPES = ("next-paper", "next-aligned", "weighted")  # NExt's own, and the sum without a network
COST = ("ICER ↓", "length", "wall s")
ALGORITHMS = {MAIN: "GRPO", "rloo": "RLOO", "reinforce++": "REINFORCE++"}  # of Table 6, by run
SIZES = ("1.5B", "3B", "7B", "14B")  # of the models in paper.yaml
TESTED = ("predictor", "copy-global", "repeat-last", "recent-locals", "linear-fit", "weighted")
TESTED += ("oracle",)  # rows of stage 3's backtest


def folder(method: str, alpha: float = MAIN_ALPHA) -> str:
    return f"{method}_alpha{alpha:g}"


def jump(method: str, alpha: float = MAIN_ALPHA) -> str:
    return f"extrapolated/{folder(method, alpha)}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others are numbers. Empty without a row."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(header) - 1), *lines[1:]]) if rows else ""


def place(result: Result) -> tuple[int, str]:
    """Where a method stands in a table: in the order of methods.yaml, others last."""
    names, (name, *_) = list(METHODS), split_name(result.method)
    return (names.index(name) if name in names else len(names), result.method)


def plain_runs(runs: Runs, name: str = MAIN) -> list[Result]:
    """What was measured of the run without a jump, by step."""
    found = [r for r in runs.some(name).values() if r.method == "grpo"]
    return sorted(found, key=lambda r: r.steps)


def ended(runs: Runs) -> list[Result]:
    """What went on from a jump to the last step, in the order of the tables."""
    found = [r for r in runs.some().values() if r.policy.startswith("continued/")]
    return sorted((r for r in found if r.steps == runs.total), key=place)


def compared(runs: Runs, policy: str, name: str, *others: tuple[str, str]) -> list[str]:
    """Accuracy of a policy of the run `name`, and its differences from `others` (policy, run)."""
    level = runs.accuracy(policy, name)
    cells = [level.plain(100, 1) if level else "–"]
    for other, run in others:
        gap = runs.difference(policy, other, name, run)
        cells.append(gap.points() if gap and (other, run) != (policy, name) else "–")
    return cells


def cosine(found: Estimate | None) -> str:
    return found.plain() if found else "–"


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
    main, rounds, loop = runs.some(), grids.LOOP_ROUNDS, f"loop/round{grids.LOOP_ROUNDS}"
    against = [0, runs.reference] if runs.reference else [0]  # 0: GRPO at as many steps
    listed = [(main["backbone"], MAIN)] if "backbone" in main else []
    listed += [(r, name) for name in ("full", MAIN) for r in plain_runs(runs, name)]
    if not runs.before.startswith("train/"):
        listed.append((main[runs.before], MAIN))
    listed += [(r, MAIN) for r in ended(runs)] + [(r, loop) for r in runs.some(loop).values()]
    rows = []
    for r, name in listed:
        label, steps = r.label, r.steps
        if name == loop:
            label, steps = f"RL-Extra, {rounds} rounds of {r.steps}", rounds * r.steps
        elif r.policy == runs.before and r.method != "grpo":
            label = "before the jump"
        others = [(runs.step(step or steps) if steps else "", MAIN) for step in against]
        row = [label, str(steps), runs.count(r.policy, name)]
        row += compared(runs, r.policy, name, *others) + cost(runs, r.policy, name, steps)
        # The seconds of a loop's last round are not those of all rounds.
        rows.append([*row[:-1], "–"] if name == loop else row)
    header = ["policy", "RL steps", runs.counted, "accuracy % ± s.e."]
    header += [f"− GRPO{f' at {a}' if a else ', equal steps'} {runs.interval}" for a in against]
    return table([*header, *COST], rows)


def beside_paper(runs: Runs) -> str:
    """Our accuracies beside the paper's. Empty for a model that is not in it."""
    path = runs.folder(runs.seeds[0]) / "train" / "config.json"
    model = read_json(path, "stage 1")["config"].get("backbone", "") if path.is_file() else ""
    sizes = [i for i, size in enumerate(SIZES) if f"Qwen2.5-{size}-Instruct" in model]
    names = {"grpo": runs.step(runs.total), "longest": runs.step(runs.reference)}
    names["end"], rows = f"step_{runs.total:04d}", []
    for (number, name, policy, *printed), size in itertools.product(table_of("paper.yaml"), sizes):
        policy = policy.format(**names)
        if (found := runs.accuracy(policy, name)) and size < len(printed):
            result, run = runs.some(name)[policy], {"full": "full parameters", **ALGORITHMS}[name]
            what = "no jump" if result.method == "grpo" else result.label
            cells = [str(result.steps), found.plain(100, 1), f"{printed[size]:.1f}"]
            rows.append([f"Table {number}: {run}, {what}", *cells])
    return table(["policy", "RL steps", "ours, % ± s.e.", "the paper's"], rows)


def jumps_table(runs: Runs) -> str:
    """Right after the jump, before any more RL: at the paper's alpha, or what has none."""
    found = [r for r in runs.some().values() if r.jumped and r.method != "none"]
    found = [r for r in found if r.alpha in (MAIN_ALPHA, None, OWN_ALPHA.get(r.method))]
    if not found:
        return ""
    rows, before, cosines = [], runs.before, runs.jump_cosines() | {runs.before: None}
    others = ((before, MAIN), (jump("repeat-last"), MAIN))
    labels = {before: "before the jump"} | {r.policy: r.label for r in sorted(found, key=place)}
    for policy in filter(runs.get, labels):
        row = [labels[policy], runs.count(policy), *compared(runs, policy, MAIN, *others)]
        rows.append([*row, cosine(cosines.get(policy)), *cost(runs, policy, MAIN, runs.prefix)])
    header = ["jump", runs.counted, "accuracy % ± s.e.", f"− before it {runs.interval}"]
    header += [f"− repeat-last {runs.interval}", "cosine with the true next delta"]
    return table([*header, *COST], rows)


def ablation_table(runs: Runs, first: str, rows: list[tuple]) -> str:
    """Held-out cosine, accuracy after the jump and its gain, accuracy after more RL and its gain.

    A row is (label, name of the run, method, alpha), where it was measured. The table is empty
    without a row beside the plain methods. Another k has no RL of its own: its gain is that over
    the main run.
    """
    there = [row for row in rows if runs.get(jump(*row[2:]), row[1])]
    if all(name == MAIN and method in RECIPES for _, name, method, _ in there):
        return ""
    cells, late = [], runs.step(runs.total)
    for label, name, method, alpha in there:
        jumped, later = jump(method, alpha), runs.after(folder(method, alpha))
        base = MAIN if alpha != MAIN_ALPHA else name
        before = runs.before if base == MAIN else runs.step(runs.prefix)
        row = [label, runs.count(jumped, name), cosine(runs.backtest(method, name))]
        row += compared(runs, jumped, name, (before, base))
        cells.append(row + compared(runs, later, name, (late, base)))
    header = [first, runs.counted, "held-out cosine", "after the jump % ± s.e."]
    header += [f"− before it {runs.interval}", f"at {runs.total} % ± s.e."]
    return table([*header, f"− GRPO at {runs.total} {runs.interval}"], cells)


def table5(runs: Runs) -> str:
    """Table 5: NExt, w/o LoRA, w/o the global delta, w/o the local delta."""
    rows = []
    for method in RECIPES:
        label = label_of(method)
        rows += [(label, MAIN, method), (f"{label}, w/o LoRA", "full", method)]
        for role in ("global", "local"):
            rows.append((f"{label}, w/o {role} delta", MAIN, f"{method}-no-{role}"))
    return ablation_table(runs, "variant", [(*row, MAIN_ALPHA) for row in rows])


def settings_table(runs: Runs) -> str:
    """Other k, fewer checkpoints, other ranks. Each jump is as long as the paper's, in RL steps."""
    deltas, found, last = runs.folder(runs.seeds[0]) / "deltas", [], grids.FEWER_CHECKPOINTS
    if not (deltas / "index.json").is_file():
        return ""
    index = read_index(deltas)
    k, count, alpha = index["k"], len(index["steps"]), MAIN_ALPHA
    for method in ("weighted", "next-aligned"):
        rows = [(f"k = {k}, {count} checkpoints", MAIN, method, alpha)]
        rows += [(f"k = {n}", f"k{n}", method, alpha * k / n) for n in grids.OTHER_K]
        rows.append((f"last {last} checkpoints", MAIN, f"{method}-last{last}", alpha))
        rows += [(f"rank {n}", f"rank{n}", method, alpha) for n in grids.OTHER_RANKS]
        found += [(f"{label_of(method)}: {setting}", *row) for setting, *row in rows]
    return ablation_table(runs, "recipe and setting", found)


def table6(runs: Runs) -> str:
    """Table 6: other RL algorithms, and NExt from their first steps."""
    rows, total, methods = [], runs.step(runs.total), ("weighted", "next-paper")
    steps = [step for step in (runs.prefix, runs.total, runs.reference) if step]
    for name in [name for name in ALGORITHMS if runs.get(total, name)]:
        cells = [compared(runs, runs.step(step), name) for step in steps]
        cells += [compared(runs, runs.after(folder(m)), name, (total, name)) for m in methods]
        rows.append([ALGORITHMS[name], runs.count(total, name), *itertools.chain(*cells)])
    header = ["algorithm", runs.counted, *(f"at {step}" for step in steps)]
    for method in methods:
        header += [f"{label_of(method)}, at {runs.total}", f"− at {runs.total} {runs.interval}"]
    return table(header, rows if len(rows) > 1 else [])


def backtests(runs: Runs) -> str:
    """What each predictor is worth on a target it has not seen, beside the controls."""
    rows = []
    for recipe, reports in runs.predictor_reports().items():
        if tested := [r["backtest"] for r in reports.values() if r["backtest"]]:
            at = f"{recipe} ({tested[0]['at_step']} → {tested[0]['predicts_step']})"
            cosines = [[t[row]["cosine"] for t in tested if row in t] for row in TESTED]
            rows.append([at, *(cosine(many and over_seeds(many)) for many in cosines)])
    text = "Cosine of the predicted rank-1 delta with the whole true one, mean over matrices, with "
    text += "everything later hidden.\n\n"
    return text + table(["recipe", *TESTED], rows) if rows else ""


def by_task(runs: Runs) -> str:
    """A column a task, and the mean of each suite of several. Empty where there is one task."""
    names = sorted({name for _, name, _ in runs.all()})
    found = [(name, r) for name in names for r in runs.some(name).values()]
    columns = {task: [task] for task in sorted({task for _, r in found for task in r.records})}
    if len(columns) < 2:
        return ""
    for suite in SUITES:
        group = list(dict.fromkeys(task for _, r in found for task in r.of_suite(suite)))
        columns |= {f"mean of {suite} ({len(group)})": group} if len(group) > 1 else {}
    rows = []
    for name, result in found:
        cells = [result.policy if name == MAIN else f"{name}: {result.policy}"]
        for group in columns.values():
            having = [r for r in runs.get(result.policy, name).values() if {*group} <= {*r.records}]
            scores = [statistics.fmean(r.records[t]["by_problem"]) for r in having for t in group]
            cells.append(f"{100 * statistics.fmean(scores):.1f}" if scores else "–")
        rows.append(cells)
    return table(["accuracy %", *columns], rows)
