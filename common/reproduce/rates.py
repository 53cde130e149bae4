"""Runs at several learning rates side by side: what a jump, and the rate, is worth."""

import matplotlib.pyplot as plt

from common.reproduce import grids
from common.reproduce.curves import CURVES, legend_below, series
from common.reproduce.estimates import rank_correlation
from common.reproduce.results import MAIN_ALPHA, label_of
from common.reproduce.runs import MAIN, Runs
from common.reproduce.tables import compared, cosine, folder, jump, place, plain_runs, table

DEFAULT = "next-aligned"  # the method that the sentence and the first figure speak of
BY_ALPHA = (DEFAULT, "weighted", "first-update")  # methods of the table by alpha
METERED = (DEFAULT, "next-paper", "weighted", "repeat-last", "recent-locals")  # with a backtest
TIMES = {2: "GRPO at twice the rate", 4: "GRPO at four times the rate"}


def rates(runs: Runs) -> dict[float, str]:
    """Learning rate -> the run that was trained at it, from the lowest; empty for one rate."""
    found = {}
    for name in {name for _, name, _ in runs.all() if name == MAIN or name.startswith("rate")}:
        plain = [r.trained for r in runs.some(name).values() if r.method == "grpo"]
        found |= {options["learning_rate"]: name for options in plain if options}
    return dict(sorted(found.items())) if len(found) > 1 and MAIN in found.values() else {}


def columns(runs: Runs) -> dict[float, str]:
    """Learning rate -> the run, of those runs that have RL after a jump."""
    return {r: n for r, n in rates(runs).items() if runs.get(runs.after(folder(DEFAULT)), n)}


def jumped(runs: Runs) -> list[str]:
    """The methods that jump at the paper's alpha, or have no alpha, in the order of the tables."""
    some = [r for r in runs.some().values() if r.jumped and r.alpha in (MAIN_ALPHA, None)]
    return list(dict.fromkeys(r.method for r in sorted(some, key=place) if r.method != "none"))


def policy_of(runs: Runs, method: str) -> str:
    return jump(method) if jump(method) in runs.some() else f"extrapolated/{method}"


def page(runs: Runs) -> str:
    """One sentence and five tables, or nothing where there is one rate."""
    if not (found := rates(runs)):
        return ""
    parts = [sentence(runs, found), levels(runs, found), *gains(runs, found), meter(runs)]
    return "\n\n".join(filter(None, parts))


def shown_steps(runs: Runs) -> list[int]:
    """Before the jump, after it, and at the end; without a jump all steps that were measured."""
    around = [step for step in (runs.prefix, runs.total, runs.reference) if step]
    return around if runs.total else [r.steps for r in plain_runs(runs)]


def sentence(runs: Runs, found: dict[float, str]) -> str:
    """What a jump is worth at each rate, and what the preset's rate is worth over the lowest."""
    total, worth = runs.step(runs.total), []
    for rate, name in found.items():
        if gap := runs.difference(runs.after(folder(DEFAULT)), total, name):
            worth.append(f"{gap.points()} at learning rate {rate:g}")
    if not worth:
        return ""
    low = next((n for n in found.values() if runs.get(runs.after(folder(DEFAULT)), n)), "")
    gap = runs.difference(total, total, MAIN, low) if low not in ("", MAIN) else None
    alone = next(rate for rate, name in found.items() if name == MAIN)
    text = f"**After {runs.total} RL steps, {label_of(DEFAULT)}, is worth {'; '.join(worth)}.**"
    return text + (f" Learning rate {alone:g} alone is worth {gap.points()}." if gap else "")


def levels(runs: Runs, found: dict[float, str]) -> str:
    """Accuracy of plain GRPO by learning rate, beside how well its last delta is predicted."""
    steps, rows = shown_steps(runs), []
    for rate, name in found.items():
        row = [f"{rate:g}", runs.count(runs.step(steps[0]), name)]
        row += [compared(runs, runs.step(step), name)[0] for step in steps]
        row += [cosine(runs.backtest(m, name)) for m in (DEFAULT, "weighted", "repeat-last")]
        rows.append(row)
    header = ["learning rate", runs.counted, *(f"GRPO at {step}, %" for step in steps)]
    return table([*header, "held-out cosine: NExt, aligned", "weighted", "repeat-last"], rows)


def gains(runs: Runs, found: dict[float, str]) -> list[str]:
    """The gain of every jump at once, and after more RL; a column a rate that has both."""
    at, before, total = columns(runs), runs.step(runs.prefix), runs.step(runs.total)

    def line(label: str, policy: str, base: str) -> list[str]:
        return [label, *(compared(runs, policy, n, (base, n))[1] for n in at.values())]

    after = [line(label_of(m), policy_of(runs, m), before) for m in jumped(runs)]
    ends = {r.method: r.policy for r in runs.some().values() if r.policy.startswith("continued/")}
    in_order = sorted(ends, key=lambda m: place(runs.some()[ends[m]]))
    late = [line(label_of(m), ends[m], total) for m in in_order]
    for times, label in TIMES.items():
        row = [label]
        for rate, name in at.items():
            other = next((n for r, n in found.items() if abs(r / rate / times - 1) < 0.01), "")
            row.append(compared(runs, total, other, (total, name))[1])
        late += [row] if {*row[1:]} - {"–"} else []
    for r in runs.some(grids.SECOND).values():
        found_at = at.get(r.trained["learning_rate"])
        gap = compared(runs, r.policy, grids.SECOND, (total, found_at))[1]
        label = f"{label_of(DEFAULT)}, merged; after {r.steps // 2} steps "
        label += "no other jump" if r.method == "none" else "another jump"
        late.append([label, *(gap if name == found_at else "–" for name in at.values())])
    swept = [r for r in runs.some().values() if r.jumped and r.alpha and r.method in BY_ALPHA]
    swept.sort(key=lambda r: (place(r), r.alpha))
    far = [line(f"{r.label}, alpha {r.alpha:g}", r.policy, before) for r in swept]
    header = [f"learning rate {rate:g} {runs.interval}" for rate in at]
    return [
        table([f"right after the jump, − GRPO at {runs.prefix}", *header], after),
        table([f"after {runs.total} RL steps, − GRPO at {runs.total}", *header], late),
        table([f"by alpha, right after the jump, − GRPO at {runs.prefix}", *header], far),
    ]


def backbone(runs: Runs) -> float:
    """The accuracy that every run began with; 0 where it was not measured."""
    return max((r.accuracy for r in runs.get("backbone").values()), default=0.0)


def points(runs: Runs, method: str, later: bool = False) -> list[tuple[float, float]]:
    """(cosine of stage 3's backtest, points that the jump gains) of every run that has both.

    later: what is gained after more RL, not right after the jump. A run that training has left
    below the backbone says nothing of jumps.
    """
    end, step = policy_of(runs, method), runs.prefix
    if later:
        end, step = runs.after(folder(method)), runs.total
    found = []
    for name in rates(runs).values():
        cosines = runs.cosines(method, name)
        pairs = runs.pairs(end, runs.step(step), name)
        pairs = {seed: (a.accuracy, b.accuracy) for seed, (a, b) in pairs.items()}
        gained = {s: 100 * (a - b) for s, (a, b) in pairs.items() if b >= backbone(runs)}
        found += [(cosines[seed], gained[seed]) for seed in cosines if seed in gained]
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
    if not (found := rates(runs)):
        return None
    figure, axis = plt.subplots(figsize=(7, 4.2))
    looks = zip(shown_steps(runs), (":", "--", "-"), strict=False)
    plain = {"color": "black", "marker": "."}
    shown = {runs.step(s): plain | {"ls": ls, "label": f"GRPO at {s}"} for s, ls in looks}
    label = f"{label_of(DEFAULT)}, at {runs.total}"
    shown[runs.after(folder(DEFAULT))] = CURVES[DEFAULT] | {"label": label, "ls": ""}
    for policy, look in shown.items():
        if policy not in runs.some():
            continue
        having = {rate: name for rate, name in found.items() if runs.get(policy, name)}
        series(axis, list(having), [runs.accuracy(policy, n) for n in having.values()], **look)
    axis.set(xscale="log", xlabel="learning rate", ylabel=f"accuracy %, ± s.e. over {runs.over}")
    axis.legend()
    return figure


def wide(axis) -> None:
    """Scales the y axis so that a gain of 1 and a loss of 50 can both be read on it."""
    axis.set_yscale("symlog", linthresh=5)
    ticks = (-50, -20, -10, -5, -2, 0, 2, 5, 10, 20)
    axis.set_yticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axis.set_ylim(top=20)


def gain(runs: Runs):
    """The gain by rate, a line a method with a colour: right after the jump, and after more RL."""
    if len(columns(runs)) < 2:
        return None
    before = {rate: runs.accuracy(runs.step(runs.prefix), n) for rate, n in rates(runs).items()}
    found = {r: n for r, n in rates(runs).items() if before[r] and before[r].mean >= backbone(runs)}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    ends = {r.method: r.policy for r in runs.some().values() if r.policy.startswith("continued/")}
    jumps = {method: policy_of(runs, method) for method in jumped(runs)}
    for axis, step, policies in ((axes[0], runs.prefix, jumps), (axes[1], runs.total, ends)):
        for method in [method for method in CURVES if method in jumps | ends]:
            policy = policies.get(method, "")  # one without a line here has one in the other panel
            gaps = {r: runs.difference(policy, runs.step(step), found[r]) for r in found}
            gaps = {rate: gap for rate, gap in gaps.items() if gap}
            look = CURVES[method] | {"label": label_of(method)}
            series(axis, list(gaps), list(gaps.values()), **look)
        axis.axhline(0, color="gray", lw=1)
        axis.set(xscale="log", xlabel="learning rate", ylabel=f"points above GRPO at {step}")
    wide(axes[0])
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
    axis.set_xlabel("held-out cosine of the prediction (stage 3's backtest)")
    axis.set_ylabel(f"points above GRPO at {runs.prefix}, after the jump")
    wide(axis)
    axis.legend()
    return figure
