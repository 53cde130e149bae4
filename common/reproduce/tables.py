"""The tables of a page: Tables 3 to 6, all jumps, other settings, backtests, every task."""

import itertools
import statistics

from common.files.deltas import read_index
from common.reproduce import plans, results
from common.reproduce.estimates import Estimate, over_seeds
from common.reproduce.results import MAIN_ALPHA, OWN_ALPHA, label_of, place, table_of
from common.reproduce.runs import MAIN, Measured, Runs
from common.rl.benchmarks import SUITES, suite_of

RECIPES = ("next-paper", "next-aligned", "weighted")  # NExt's own, and the sum without a network
COST = ("ICER ↓", "length", "wall s")
ALGORITHMS = {MAIN: "GRPO", "rloo": "RLOO", "reinforce++": "REINFORCE++"}  # of Table 6, by run
VARIANTS = table_of("variants.yaml")
SIZES = ("1.5B", "3B", "7B", "14B")  # of the models in paper.yaml
TESTED = ("predictor", "copy-global", "repeat-last", "recent-locals", "linear-fit", "weighted")
TESTED += ("oracle",)  # rows of stage 3's backtest


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others are numbers. Empty without a row."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(header) - 1), *lines[1:]]) if rows else ""


def cost(found: Measured, base: Measured, steps: int) -> list[str]:
    """ICER, the RL steps for a point above the backbone `base`; response length, wall seconds."""
    gain = 100 * (found.accuracy.mean - base.accuracy.mean) if base else 0.0
    results = found.by_seed.values()
    seconds = [r.seconds for r in results if r.seconds is not None]
    return [
        f"{steps / gain:.1f}" if steps and gain > 0 else "–",
        f"{statistics.fmean(r.length for r in results):.1f}",
        f"{statistics.fmean(seconds):.0f}" if seconds else "–",
    ]


def alpha_of(found: Measured) -> str:
    """The alpha of its jump."""
    return "–" if found.alpha is None else f"{found.alpha:g}"


def main_table(runs: Runs) -> str:
    """Tables 3 and 4: the backbone, plain GRPO, every method after the RL that follows its jump."""
    base, before, rounds, rows = runs.get("backbone"), runs.before, plans.LOOP_ROUNDS, []
    against = [0, runs.reference] if runs.reference else [0]  # 0: GRPO at as many steps
    loop = runs.of(f"loop/round{rounds}")
    unknown = [m for m in runs.some() if m.method == m.policy]  # of no known step, or the backbone
    listed = [base, *runs.of("full").plain(), *runs.plain(), before, *unknown]
    for m in filter(None, dict.fromkeys([*listed, *runs.ended(), *loop.some()])):
        label, steps = m.label, m.steps
        if m.run == loop.name:
            label, steps = f"RL-Extra, {rounds} rounds of {steps}", rounds * steps
        elif m is before and m.method != "grpo":
            label = "before the jump"
        gaps = [(m - runs.at(step or steps)).points() if steps else "–" for step in against]
        trained = str(steps) if steps or m.policy == "backbone" else "–"
        row = [label, trained, alpha_of(m), runs.count(m), m.level(), *gaps, *cost(m, base, steps)]
        # The seconds of a loop's last round are not those of all rounds.
        rows.append([*row[:-1], "–"] if m.run == loop.name else row)
    header = ["policy", "RL steps", "alpha", runs.counted, "accuracy % ± s.e."]
    header += [f"− GRPO{f' at {a}' if a else ', equal steps'} {runs.interval}" for a in against]
    return table([*header, *COST], rows)


def beside_paper(runs: Runs) -> str:
    """Our accuracies and ICER with the paper's in brackets, a table for each set of tasks that were
    all measured. Empty for a model that is not in the paper."""
    model, _ = results.made_on(runs.folder(runs.seeds[0]))
    sizes = [i for i, size in enumerate(SIZES) if f"Qwen2.5-{size}-Instruct" in model]
    names = {"grpo": runs.at(runs.total).policy, "longest": runs.at(runs.reference).policy}
    names["end"], paper, found = f"step_{runs.total:04d}", table_of("paper.yaml"), []
    for (part, tasks), size in itertools.product(paper["tasks"].items(), sizes):
        rows, base = [], runs.get("backbone").on(tasks[size])
        printed_for = [(number, p, *values) for number, many, *values in paper[part] for p in many]
        for number, ours, *printed in printed_for:
            name, policy = ours.format(**names).split("/", 1)
            m = runs.of(name).get(policy).on(tasks[size])
            if m and size < len(printed):
                run = {"full": "full parameters", **ALGORITHMS}[name]
                label = f"{run}, {'no jump' if m.method == 'grpo' else m.label}, {m.steps} steps"
                label = f"Table {number}: {label if m.steps else m.label}"
                each = [m.on([task]).level() for task in tasks[size]]
                each += [m.level(), cost(m, base, m.steps)[0]]
                pairs = itertools.zip_longest(each, printed[size])
                rows.append([label, *(f"{a} ({b})" if b is not None else a for a, b in pairs)])
        found.append(table(["ours (the paper's)", *tasks[size], "mean, %", "ICER ↓"], rows))
    return "\n\n".join(filter(None, found))


def jumps_table(runs: Runs) -> str:
    """Right after the jump, before any more RL: at the paper's alpha, or what has none."""
    found = [m for m in runs.some() if m.jumped and m.method != "none"]
    found = [m for m in found if m.alpha in (MAIN_ALPHA, None, OWN_ALPHA.get(m.method))]
    if not found:
        return ""
    rows, before, control, cosines = [], runs.before, runs.jump("repeat-last"), runs.jump_cosines()
    for m in filter(None, [before, *sorted(found, key=place)]):
        label = "before the jump" if m is before else m.label
        row = [label, alpha_of(m), runs.count(m), m.level()]
        row += [(m - other).points() for other in (before, control)]
        row += [cosines.get(m.policy, Estimate()).plain()]
        rows.append(row + cost(m, runs.get("backbone"), runs.prefix))
    header = ["jump", "alpha", runs.counted, "accuracy % ± s.e.", f"− before it {runs.interval}"]
    header += [f"− repeat-last {runs.interval}", "cosine with the true next delta"]
    return table([*header, *COST], rows)


def variants(runs: Runs, title: str, methods: tuple[str, ...]) -> str:
    """Held-out cosine, accuracy after the jump and its gain, accuracy after more RL and its gain.

    title: of the rows in variants.yaml. The table is empty without a row beside the plain methods.
    Another k has no RL of its own: its gain is that over the main run.
    """
    folders = [runs.folder(seed) / "deltas" for seed in runs.seeds]
    found = [read_index(path) for path in folders if (path / "index.json").is_file()]
    if not found:
        return ""
    rows, others, k, count = [], False, found[0]["k"], len(found[0]["steps"])
    for plain, (label, name, method, *own) in itertools.product(methods, VARIANTS[title]):
        run, method = runs.of(name), method.format(method=plain)
        alpha = MAIN_ALPHA * k / own[0] if own else MAIN_ALPHA
        base, jump, later = runs if own else run, run.jump(method, alpha), run.later(method, alpha)
        if jump:
            label = label.format(label=label_of(plain), k=k, count=count)
            row = [label, runs.count(jump), run.backtest(method).plain(), jump.level()]
            row += [(jump - base.before).points()]
            rows.append([*row, later.level(), (later - base.at(runs.total)).points()])
            others |= (name, method) != (MAIN, plain)
    header = [title, runs.counted, "held-out cosine", "after the jump % ± s.e."]
    header += [f"− before it {runs.interval}", f"at {runs.total} % ± s.e."]
    return table([*header, f"− GRPO at {runs.total} {runs.interval}"], rows if others else [])


def table6(runs: Runs) -> str:
    """Table 6: other RL algorithms, and NExt from their first steps."""
    rows, methods = [], ("weighted", "next-paper")
    steps = [step for step in (runs.prefix, runs.total, runs.reference) if step]
    for name, label in ALGORITHMS.items():
        run = runs.of(name)
        if plain := run.at(runs.total):
            row = [label, runs.count(plain), *(run.at(step).level() for step in steps)]
            for later in map(run.later, methods):
                row += [later.level(), (later - plain).points()]
            rows.append(row)
    header = ["algorithm", runs.counted, *(f"at {step}" for step in steps)]
    for method in methods:
        header += [f"{label_of(method)}, at {runs.total}", f"− at {runs.total} {runs.interval}"]
    return table(header, rows if len(rows) > 1 else [])


def backtests(runs: Runs) -> str:
    """What each predictor is worth on a target it has not seen, beside the controls."""
    rows = []
    for recipe, reports in runs.predictor_reports().items():
        if tested := [r["backtest"] for r in reports.values() if r["backtest"]]:
            label, first = label_of(f"next-{recipe}"), tested[0]
            at = f"{label} ({first['at_step']} → {first['predicts_step']})"
            cosines = [[t[row]["cosine"] for t in tested if row in t] for row in TESTED]
            rows.append([at, *(over_seeds(many).plain() for many in cosines)])
    text = "Cosine of the predicted rank-1 delta with the whole true one, mean over matrices, with "
    text += "everything later hidden.\n\n"
    return text + table(["recipe", *TESTED], rows) if rows else ""


def by_task(runs: Runs) -> str:
    """A column a task, and the mean of each suite of several. Empty where there is one task."""
    found = sorted(runs.measured.values(), key=lambda m: m.run)
    tasks = sorted({task for m in found for r in m.by_seed.values() for task in r.records})
    suites = {suite: [task for task in tasks if suite_of(task) == suite] for suite in SUITES}
    columns = {task: [task] for task in tasks}
    columns |= {f"mean of {s} ({len(some)})": some for s, some in suites.items() if len(some) > 1}
    rows = []
    for m in found if len(tasks) > 1 else []:
        name = m.policy if m.run == MAIN else f"{m.run}: {m.policy}"
        means = [m.on(some).accuracy for some in columns.values()]
        rows.append([name, *(f"{100 * x.mean:.1f}" if x else "–" for x in means)])
    return table(["accuracy %", *columns], rows)
