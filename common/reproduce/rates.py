"""Runs at several learning rates side by side: what a jump, and the rate, is worth."""

import matplotlib.pyplot as plt

from common.reproduce import plans
from common.reproduce.estimates import over_seeds, rank_correlation, within_groups
from common.reproduce.figures import CURVES, legend_below, series
from common.reproduce.results import MAIN_ALPHA, label_of, place
from common.reproduce.runs import MAIN, Measured, Runs
from common.reproduce.tables import table

DEFAULT = "next-aligned"  # the method that the sentence and the first figure speak of
BY_ALPHA = (DEFAULT, "next-paper", "weighted", "repeat-last", "oracle", "first-update")
METERED = (DEFAULT, "next-paper", "weighted", "repeat-last", "recent-locals")  # with a backtest
TIMES = {2: "GRPO at twice the rate", 4: "GRPO at four times the rate"}


def rates(runs: Runs) -> dict[float, Runs]:
    """Learning rate -> the run that was trained at it, from the lowest; empty for one rate."""
    found = {}
    for (name, _), m in runs.measured.items():  # a rate that is given twice: the main run
        if (name == MAIN or name.startswith("rate")) and m.method == "grpo" and m.trained:
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
    """Up to five tables, nothing for one rate. Tables of jumps need RL after a jump."""
    if not rates(runs):
        return ""
    after, late, far = gains(runs) if columns(runs) else ("", "", "")
    return "\n\n".join(filter(None, [late, levels(runs), after, far, meter(runs)]))


def at_multiple(runs: Runs, rate: float, times: int) -> Runs:
    """The run at `times` this rate; one in which nothing was measured where there is none."""
    found = [r for other, r in rates(runs).items() if abs(other / rate / times - 1) < 0.01]
    return found[0] if found else runs.of("none")


def shown_steps(runs: Runs) -> list[int]:
    """Before the jump, after it, and at the end; without a jump all steps that were measured."""
    around = [step for step in (runs.prefix, runs.total, runs.reference) if step]
    return around if runs.total else [m.steps for m in runs.plain()]


def sentence(runs: Runs) -> str:
    """The verdict on a jump at each rate, and what the preset's rate is worth over the lowest."""
    total, ours = runs.total, (DEFAULT, "next-paper")
    method = next((m for find in (runs.later, runs.jump) for m in ours if find(m)), DEFAULT)
    at = columns(runs) or {0.0: runs}
    than = f"than GRPO at {total} RL steps"
    gaps = {rate: run.later(method) - run.at(total) for rate, run in at.items()}
    if not any(gaps.values()):
        than = "right after the jump than before it"
        gaps = {rate: run.jump(method) - run.before for rate, run in at.items()}
    where = {rate: f" at learning rate {rate:g}" if rate else "" for rate in at}
    if not (found := [f"{x.verdict()}{where[r]}, {x.points()}" for r, x in gaps.items() if x]):
        return ""
    name = label_of(method) if len(runs.seeds) > 1 else f"In one training run, {label_of(method)}"
    text = f"**{name} is better {than}, in points: {'; '.join(found)}.**"
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
    """The gain of every jump, at once and after more RL; a column for each rate that has both. With
    several seeds also the first rate minus the last; and how many seeds, where some lack it."""
    at, prefix, total, seeds = columns(runs), runs.prefix, runs.total, len(runs.seeds)
    several = seeds > 1 and len(at) > 1

    def jumps(policy: str, step: int) -> list[tuple[Measured, Measured]]:
        return [(run.get(policy), run.at(step)) for run in at.values()]

    def line(label: str, pairs: list[tuple[Measured, Measured]]) -> list[str]:
        gaps = [a - b for a, b in pairs]
        if several:
            first, *_, last = (a.gaps(b) for a, b in pairs)
            gaps.append(over_seeds([first[s] - last[s] for s in first if s in last]))
        some = [f" ({x.n} of {seeds} seeds)" if 0 < x.n < seeds else "" for x in gaps]
        return [label, *(x.points() + of for x, of in zip(gaps, some, strict=True))]

    after, late = (
        [line(label_of(method), jumps(policy, step)) for method, policy in found.items()]
        for step, found in gained(runs).items()
    )
    for times, label in TIMES.items():
        pairs = [(at_multiple(runs, r, times).at(total), run.at(total)) for r, run in at.items()]
        late += [line(label, pairs)] if any(a for a, _ in pairs) else []
    for m in runs.of(plans.SECOND).some():
        other = "no other jump" if m.method == "none" else "another jump"
        label = f"{label_of(DEFAULT)}, merged; half-way {other}"
        mine = {rate: m for rate in at if rate == m.trained["learning_rate"]}
        pairs = [(mine.get(rate, Measured("")), run.at(total)) for rate, run in at.items()]
        late.append(line(label, pairs))
    swept = [m for m in runs.some() if m.policy.startswith("extrapolated/") and m.alpha]
    swept = [m for m in swept if m.method in BY_ALPHA]
    swept.sort(key=lambda m: (place(m), m.alpha))
    far = [line(f"{label_of(m.method)}, alpha {m.alpha:g}", jumps(m.policy, prefix)) for m in swept]
    header = [f"learning rate {rate:g} {runs.interval}" for rate in at]
    header += [f"{min(at):g} minus {max(at):g}"] if several else []
    return [
        table([f"right after the jump, − GRPO at {prefix}", *header], after),
        table([f"after {total} RL steps, − GRPO at {total}", *header], late),
        table([f"by alpha, right after the jump, − GRPO at {prefix}", *header], far),
    ]


def points(runs: Runs, method: str, by: str = "jump") -> list[tuple[float, float, float]]:
    """(cosine of stage 3's backtest, points that are gained, learning rate) of every run that has
    both. by: the `jump`, right after it; `jump and RL` after it; twice the `rate`, at that step.

    A run that training has left below the backbone says nothing of jumps.
    """
    found, least = [], runs.get("backbone").accuracy.mean or 0.0
    for rate, run in rates(runs).items():
        start = run.at(runs.prefix if by == "jump" else runs.total)
        end = run.jump(method) if by == "jump" else run.later(method)
        end = at_multiple(runs, rate, 2).at(runs.total) if by == "rate" else end
        gaps = {s: x for s, x in end.gaps(start).items() if start.by_seed[s].accuracy >= least}
        cosines = run.cosines(method)
        found += [(cosines[seed], 100 * gaps[seed], rate) for seed in cosines if seed in gaps]
    return found


def meter(runs: Runs) -> str:
    """Whether the cosine of stage 3's backtest, which needs no accuracy, says what a jump gains."""
    rows = []
    for method in METERED:
        now, *others = (points(runs, method, by) for by in ("jump", "jump and RL", "rate"))
        if found := rank_correlation([point[:2] for point in now]):
            row = [label_of(method), str(len(now)), found, within_groups(now) or "–"]
            rows.append(row + [rank_correlation([p[:2] for p in ps]) or "–" for ps in others])
    header = ["rank correlation of the held-out cosine", "runs", "with the jump's gain [95%]"]
    header += ["the same within a rate", f"with the gain at {runs.total} steps"]
    return table([*header, f"with what twice the rate gains at {runs.total}"], rows)


def accuracy(runs: Runs):
    """Accuracy by learning rate of GRPO at three steps, and of NExt after the RL that follows."""
    found = rates(runs)
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(7, 4.2))
    looks = zip(shown_steps(runs), (":", "--", "-"), strict=False)
    plain, least = {"color": "black", "marker": "."}, runs.get("backbone").accuracy.mean or 0.0
    shown = {runs.at(s).policy: plain | {"ls": ls, "label": f"GRPO at {s}"} for s, ls in looks}
    label = f"{label_of(DEFAULT)}, at {runs.total}"
    shown[runs.later(DEFAULT).policy] = CURVES[DEFAULT] | {"label": label, "ls": "", "ms": 6}
    curves = {policy: {r: run.get(policy).accuracy for r, run in found.items()} for policy in shown}
    broken = {r for curve in curves.values() for r, y in curve.items() if y and y.mean < least}
    for policy, curve in curves.items():
        series(axis.errorbar, {r: y for r, y in curve.items() if r not in broken}, **shown[policy])
    axis.set(xscale="log", xlabel="learning rate", ylabel=f"accuracy %, ± s.e. over {runs.over}")
    whole = [rate for rate in found if rate not in broken]
    axis.set_xticks(whole, [f"{rate:g}" for rate in whole], rotation=45)
    axis.set_xticks([], minor=True)
    if broken:
        off = ", ".join(f"{rate:g}" for rate in sorted(broken))
        axis.set_title(f"not shown: {off}, where training broke down", fontsize=9)
    axis.legend()
    return figure


def wide(axis) -> None:
    """Scales the y axis so that a gain of 1 and a loss of 50 can both be read on it, if it must."""
    if axis.get_ylim()[0] > -10:
        return
    low, high = axis.get_ylim()
    axis.set_yscale("symlog", linthresh=5)
    ticks = (-50, -20, -10, -5, -2, 0, 2, 5, 10, 20)
    axis.set_yticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axis.set_ylim(1.2 * low, max(20, high))
    axis.set_ylabel(f"{axis.get_ylabel()} (log from ±5)")


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
            series(axis.errorbar, gaps, **CURVES[method], label=label_of(method))
        axis.axhline(0, color="gray", lw=1)
        axis.set(xscale="log", xlabel="learning rate", ylabel=f"points over GRPO at {step}")
        wide(axis)
    legend_below(figure, axes[0], 4)
    return figure


def against_cosine(runs: Runs):
    """The gain of the jump by the cosine of stage 3's backtest, a point a run."""
    found = {method: points(runs, method) for method in METERED}
    if max(map(len, found.values())) < 5:
        return None
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for method, those in found.items():
        look = {**CURVES[method], "ls": "", "label": label_of(method)}
        axis.plot([x for x, _, _ in those], [y for _, y, _ in those], **look)
    axis.axhline(0, color="gray", lw=1)
    axis.set(xlabel="held-out cosine (stage 3)", ylabel=f"points over GRPO at {runs.prefix}")
    wide(axis)
    axis.legend()
    return figure
