"""Runs at several learning rates side by side: what a jump, and the rate, is worth."""

import matplotlib.pyplot as plt

from common.reproduce import plans
from common.reproduce.estimates import rank_correlation
from common.reproduce.figures import CURVES, legend_below, series
from common.reproduce.results import MAIN_ALPHA, label_of, place
from common.reproduce.runs import MAIN, Runs
from common.reproduce.tables import table

DEFAULT = "next-aligned"  # the method that the sentence and the first figure speak of
BY_ALPHA = (DEFAULT, "weighted", "first-update")  # methods of the table by alpha
METERED = (DEFAULT, "next-paper", "weighted", "repeat-last", "recent-locals")  # with a backtest
TIMES = {2: "GRPO at twice the rate", 4: "GRPO at four times the rate"}


def rates(runs: Runs) -> dict[float, Runs]:
    """Learning rate -> the run that was trained at it, from the lowest; empty for one rate."""
    found = {}
    for name in dict.fromkeys(name for name, _ in runs.measured):
        if name == MAIN or name.startswith("rate"):
            plain = runs.of(name).plain()
            for m in (m for m in plain if m.trained):  # a rate that is given twice: the main run
                found.setdefault(m.trained["learning_rate"], runs.of(name))
    has_main = MAIN in [run.name for run in found.values()]
    return dict(sorted(found.items())) if len(found) > 1 and has_main else {}


def columns(runs: Runs) -> dict[float, Runs]:
    """Learning rate -> the run, of those runs that have RL after a jump."""
    return {rate: run for rate, run in rates(runs).items() if run.ended()}


def gained(runs: Runs) -> dict[int, dict[str, str]]:
    """RL steps -> method -> policy: the jumps by the paper's alpha or none, and their ends."""
    found = [m for m in runs.some() if m.policy.startswith("extrapolated/") and m.method != "none"]
    ended = [m for m in runs.ended() if m.steps == runs.total]
    sides = {runs.prefix: sorted(found, key=place), runs.total: ended}
    usual = (MAIN_ALPHA, None)
    return {s: {m.method: m.policy for m in some if m.alpha in usual} for s, some in sides.items()}


def page(runs: Runs) -> str:
    """Five tables, or nothing where there is one rate."""
    if not rates(runs):
        return ""
    return "\n\n".join(filter(None, [levels(runs), *gains(runs), meter(runs)]))


def shown_steps(runs: Runs) -> list[int]:
    """Before the jump, after it, and at the end; without a jump all steps that were measured."""
    around = [step for step in (runs.prefix, runs.total, runs.reference) if step]
    return around if runs.total else [m.steps for m in runs.plain()]


def sentence(runs: Runs) -> str:
    """What a jump is worth at each rate, and what the preset's rate is worth over the lowest."""
    total, method = runs.total, DEFAULT if runs.later(DEFAULT) else "next-paper"
    at = columns(runs) or {0.0: runs}
    gaps = {rate: run.later(method) - run.at(total) for rate, run in at.items()}
    where = {rate: f" at learning rate {rate:g}" if rate else "" for rate in at}
    worth = [f"{gap.points()}{where[rate]}" for rate, gap in gaps.items() if gap]
    if not worth:
        return ""
    text = f"**{label_of(method)}, minus GRPO at {total} steps, in points: {'; '.join(worth)}.**"
    if gap := runs.at(total) - next(iter(at.values())).at(total):
        alone = next(rate for rate, run in rates(runs).items() if run.name == MAIN)
        text += f" Learning rate {alone:g} in place of {min(at):g} is worth {gap.points()}."
    return text


def levels(runs: Runs) -> str:
    """Accuracy of plain GRPO by learning rate, beside how well its last delta is predicted."""
    steps, rows = shown_steps(runs), []
    for rate, run in rates(runs).items():
        row = [f"{rate:g}", runs.count(run.at(steps[0])), *(run.at(s).level() for s in steps)]
        row += [run.backtest(m).plain() for m in (DEFAULT, "weighted", "repeat-last")]
        rows.append(row)
    header = ["learning rate", runs.counted, *(f"GRPO at {step}, %" for step in steps)]
    return table([*header, "held-out cosine: NExt (aligned)", "weighted", "repeat-last"], rows)


def gains(runs: Runs) -> list[str]:
    """The gain of every jump at once, and after more RL; a column a rate that has both."""
    at, prefix, total = columns(runs), runs.prefix, runs.total

    def line(label: str, policy: str, step: int) -> list[str]:
        return [label, *((run.get(policy) - run.at(step)).points() for run in at.values())]

    after, late = (
        [line(label_of(method), policy, step) for method, policy in found.items()]
        for step, found in gained(runs).items()
    )
    for times, label in TIMES.items():
        row = [label]
        for rate, run in at.items():
            others = [r for other, r in rates(runs).items() if abs(other / rate / times - 1) < 0.01]
            row.append((others[0].at(total) - run.at(total)).points() if others else "–")
        late += [row] if {*row[1:]} - {"–"} else []
    for m in runs.of(plans.SECOND).some():
        label = f"{label_of(DEFAULT)}, merged; after {m.steps // 2} steps "
        label += "no other jump" if m.method == "none" else "another jump"
        own = {rate: run for rate, run in at.items() if rate == m.trained["learning_rate"]}
        late.append([label, *((m - own[r].at(total)).points() if r in own else "–" for r in at)])
    swept = [m for m in runs.some() if m.jumped and m.alpha and m.method in BY_ALPHA]
    swept.sort(key=lambda m: (place(m), m.alpha))
    far = [line(f"{label_of(m.method)}, alpha {m.alpha:g}", m.policy, prefix) for m in swept]
    header = [f"learning rate {rate:g} {runs.interval}" for rate in at]
    return [
        table([f"right after the jump, − GRPO at {prefix}", *header], after),
        table([f"after {total} RL steps, − GRPO at {total}", *header], late),
        table([f"by alpha, right after the jump, − GRPO at {prefix}", *header], far),
    ]


def points(runs: Runs, method: str, later: bool = False) -> list[tuple[float, float]]:
    """(cosine of stage 3's backtest, points that the jump gains) of every run that has both.

    later: what is gained after more RL, not right after the jump. A run that training has left
    below the backbone says nothing of jumps.
    """
    found, least = [], runs.get("backbone").accuracy.mean or 0.0
    for run in rates(runs).values():
        end = run.later(method) if later else run.jump(method)
        start = run.at(runs.total if later else runs.prefix)
        levels = {seed: r.accuracy for seed, r in start.by_seed.items() if r.accuracy >= least}
        for seed, x in run.cosines(method).items():
            if seed in levels and seed in end.by_seed:
                found.append((x, 100 * (end.by_seed[seed].accuracy - levels[seed])))
    return found


def meter(runs: Runs) -> str:
    """Whether the cosine of stage 3's backtest, which needs no accuracy, says what a jump gains."""
    rows = []
    for method in METERED:
        now, later = points(runs, method), points(runs, method, later=True)
        if found := rank_correlation(now):
            rows.append([label_of(method), str(len(now)), found, rank_correlation(later) or "–"])
    gained = f"with the gain at {runs.total} steps [95%]"
    header = ["rank correlation of the held-out cosine", "runs", "with the jump's gain [95%]"]
    return table([*header, gained], rows)


def accuracy(runs: Runs):
    """Accuracy by learning rate of GRPO at three steps, and of NExt after the RL that follows."""
    found = rates(runs)
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(7, 4.2))
    looks = zip(shown_steps(runs), (":", "--", "-"), strict=False)
    plain = {"color": "black", "marker": "."}
    shown = {runs.at(s).policy: plain | {"ls": ls, "label": f"GRPO at {s}"} for s, ls in looks}
    label = f"{label_of(DEFAULT)}, at {runs.total}"
    shown[runs.later(DEFAULT).policy] = CURVES[DEFAULT] | {"label": label, "ls": ""}
    for policy, look in shown.items():
        if runs.get(policy):
            curve = {rate: run.get(policy).accuracy for rate, run in found.items()}
            series(axis, {rate: level for rate, level in curve.items() if level}, **look)
    axis.set(xscale="log", xlabel="learning rate", ylabel=f"accuracy %, ± s.e. over {runs.over}")
    axis.legend()
    return figure


def wide(axis) -> None:
    """Scales the y axis so that a gain of 1 and a loss of 50 can both be read on it, if it must."""
    if axis.get_ylim()[0] > -10:
        return
    axis.set_yscale("symlog", linthresh=5)
    ticks = (-50, -20, -10, -5, -2, 0, 2, 5, 10, 20)
    axis.set_yticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axis.set_ylim(top=max(20, axis.get_ylim()[1]))


def gain(runs: Runs):
    """The gain by rate, a line a method with a colour: right after the jump, and after more RL."""
    if len(columns(runs)) < 2:
        return None
    began = {rate: (run, run.at(runs.prefix).accuracy) for rate, run in rates(runs).items()}
    least = runs.get("backbone").accuracy.mean or 0.0
    found = {rate: run for rate, (run, level) in began.items() if level and level.mean >= least}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    panels = gained(runs)
    shown = [method for method in CURVES if any(method in some for some in panels.values())]
    for axis, (step, policies) in zip(axes, panels.items(), strict=True):
        for method in shown:
            policy = policies.get(method, "")  # one without a line here has one in the other panel
            gaps = {rate: run.get(policy) - run.at(step) for rate, run in found.items()}
            gaps = {rate: gap for rate, gap in gaps.items() if gap}
            series(axis, gaps, **CURVES[method], label=label_of(method))
        axis.axhline(0, color="gray", lw=1)
        axis.set(xscale="log", xlabel="learning rate", ylabel=f"points above GRPO at {step}")
        wide(axis)
    legend_below(figure, axes[0], 4)
    return figure


def against_cosine(runs: Runs):
    """The gain of the jump by the cosine of stage 3's backtest, a point a run."""
    found = {method: points(runs, method) for method in METERED}
    if max(map(len, found.values())) < 5:
        return None
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for method, pairs in found.items():
        look = {**CURVES[method], "ls": "", "label": label_of(method)}
        axis.plot([x for x, _ in pairs], [y for _, y in pairs], **look)
    axis.axhline(0, color="gray", lw=1)
    gained = f"points above GRPO at {runs.prefix}, after the jump"
    axis.set(xlabel="held-out cosine of the prediction (stage 3's backtest)", ylabel=gained)
    wide(axis)
    axis.legend()
    return figure
