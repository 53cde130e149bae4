"""The figures of a page. Each is drawn by one function, from one run or from a grid of them.

A function returns None where there is no data for its figure.
"""

import collections
import itertools
import math
import statistics

import matplotlib.pyplot as plt
import numpy as np

from common.files.read import read_jsonl
from common.reproduce.estimates import Estimate, over_seeds
from common.reproduce.results import LOGGED, MAIN_ALPHA, METHODS, POLICY, label_of, place
from common.reproduce.runs import MAIN, Runs

plt.switch_backend("Agg")
plt.rcParams |= {
    **{"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.fontsize": 9},
    **{"figure.constrained_layout.use": True, "lines.markersize": 4, "errorbar.capsize": 2},
}
CURVES = {method: row["look"] for method, row in METHODS.items() if "look" in row}
RUNS = {  # runs of a grid
    MAIN: {"label": "LoRA", "color": "#0072B2", "marker": "o"},
    "rank4": {"label": "LoRA, rank 4", "color": "#56B4E9", "marker": "^"},
    "rank64": {"label": "LoRA, rank 64", "color": "#5D3A9B", "marker": "v"},
    "full": {"label": "all parameters", "color": "#D55E00", "marker": "s"},
}
WINDOW = 10  # RL steps of which the training curves are means
EDGES = (float("-inf"), -0.5, 0.0, 0.5, 0.9, float("inf"))  # of the bins of R^2 in Fig. 3
BINS = ("< −0.5", "−0.5 to 0", "0 to 0.5", "0.5 to 0.9", "> 0.9")


def legend_below(figure, axis, columns: int) -> None:
    """Under all axes, the labels of one."""
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, ncol=columns, loc="outside lower center", frameon=False)


def series(draw, found: dict[float, Estimate], scale: float = 100, **look):
    """Calls `draw` with means and standard errors, in percent unless `scale` is 1."""
    found = {x: y for x, y in found.items() if y}
    means = [scale * y.mean for y in found.values()]
    return draw([*found], means, yerr=[scale * y.error for y in found.values()], **look)


def accuracy(runs: Runs):
    """Test accuracy by RL step without a jump; beside it every method at the last step."""
    shown = [m for m in runs.ended()[::-1] if m.steps == runs.total]
    curves = {name: found for name in (MAIN, "full") if (found := runs.of(name).plain())}
    if not curves or not (shown or len(curves.get(MAIN, ())) > 1):
        return None
    widths, height = (1, 1.1) if shown else (1,), 1.6 + 0.24 * max(len(shown), 9)
    size = (5.5 * len(widths), height)
    figure, axes = plt.subplots(1, len(widths), figsize=size, width_ratios=widths, squeeze=False)
    left, right = axes[0, 0], axes[0, -1]
    for name, found in curves.items():
        look = RUNS[name] | {"label": found[0].label}
        series(left.errorbar, {m.steps: m.accuracy for m in found}, **look)
    left.set(xlabel="RL steps, without a jump", ylabel=f"accuracy %, ± s.e. over {runs.over}")
    left.legend(loc="upper left")
    if not shown:
        return figure
    for y, m in enumerate(shown):
        look = CURVES.get(m.method, {"color": "#666666", "marker": "o"}) | {"ms": 6}
        right.errorbar(100 * m.accuracy.mean, y, xerr=100 * m.accuracy.error, **look)
    if plain := runs.at(runs.total).accuracy:
        right.axvline(100 * plain.mean, color="black", lw=1, ls=":")
        right.set_title(f"dotted: GRPO at {runs.total}, without a jump", fontsize=9)
    right.set_yticks(range(len(shown)), [m.label for m in shown], fontsize=9)
    jump = f", with a jump at {runs.prefix}" if runs.prefix else ""
    right.set_xlabel(f"accuracy % after {runs.total} RL steps{jump}")
    return figure


def logged(runs: Runs, key: str) -> dict[str, dict[int, float]]:
    """method -> step -> `key` of metrics.jsonl, mean over seeds: the plain run and what goes on."""
    found = {method: collections.defaultdict(list) for method in CURVES}
    for folder in map(runs.folder, runs.seeds):
        paths = sorted(folder.glob("continued/*/metrics.jsonl"))
        for path in [folder / "train" / "metrics.jsonl", *paths]:
            name, alpha, made = POLICY.fullmatch(f"continued/{path.parent.name}").groups()
            method = "grpo" if name == "train" else name + (made or "")
            if method in found and path.is_file() and alpha in (None, f"{MAIN_ALPHA:g}"):
                for row in filter(lambda row: key in row, read_jsonl(path, LOGGED)):
                    found[method][row["step"]].append(row[key])
    return {m: {s: statistics.fmean(v) for s, v in by.items()} for m, by in found.items() if by}


def training(runs: Runs):
    """Reward (of the whole run, and after the jump) and response length by RL step."""
    reward, length = logged(runs, "accuracy"), logged(runs, "response_length")
    if not reward:
        return None
    jumped = [method for method in reward if method != "grpo"]
    full = any(m.trained.get("tune") == "full" for m in runs.some())
    window = min([WINDOW, *map(len, reward.values())])
    last = max([max(reward[method]) for method in jumped], default=0)
    shown = {
        "reward, the whole run": (reward, 0, math.inf),
        **({"reward after the jump": (reward, runs.prefix + 1, last)} if jumped else {}),
        "response length, tokens": (length, 0, math.inf),
    }
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 4.1))
    for axis, (title, (curves, begin, end)) in zip(axes, shown.items(), strict=True):
        for method, rows in curves.items():
            steps = sorted(rows)
            means = np.convolve([rows[s] for s in steps], np.full(window, 1 / window), "valid")
            # A mean is drawn at the last of its steps.
            pairs = zip(steps[window - 1 :], means, strict=True)
            curve = {step: y for step, y in pairs if begin <= step <= end}
            label = label_of("full" if full and method == "grpo" else method)
            look = CURVES[method] | {"marker": None, "lw": 1.6, "label": label}
            axis.plot([*curve], [*curve.values()], **look)
        axis.set(title=title, xlabel=f"RL step (curves: means of {window})")
        if jumped:
            axis.axvline(runs.prefix, color="gray", lw=1, ls=":")
    for method, rows in logged(runs, "eval_accuracy").items():
        look = CURVES[method] | {"ls": "--", "label": f"{label_of(method)}, --eval-data"}
        axes[0].plot(sorted(rows), [rows[step] for step in sorted(rows)], **look)
    legend_below(figure, axes[0], 4)
    return figure


def energy(runs: Runs):
    """Fig. 2: the energy ratio of the global delta by step, of one seed with the range."""
    found = {name: some for name in RUNS if (some := [*runs.of(name).spectra().values()])}
    if MAIN not in found:
        return None
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for name, spectra in found.items():
        of = f" ({len(spectra)} seeds)" if len(runs.seeds) > 1 else ""
        look = RUNS[name] | {"label": RUNS[name]["label"] + of}
        levels = map(over_seeds, zip(*(one["energy_ratio"] for one in spectra), strict=True))
        series(axis.errorbar, dict(zip(spectra[0]["steps"], levels, strict=True)), 1, **look)
    axis.set(xlabel="RL step", ylabel=r"$E_1=\sigma_1/\sum\sigma_q$, global delta", ylim=(0, 1))
    if len(runs.seeds) == 1:
        (one,) = found[MAIN]
        low, high = np.nanquantile([*one["energy_ratio_by_module"].values()], (0.1, 0.9), axis=0)
        look = {"color": "#0072B2", "alpha": 0.15, "label": "LoRA, middle 80% of the matrices"}
        axis.fill_between(one["steps"], low, high, **look)
    legend_below(figure, axis, 2)
    return figure


def linear_fit(runs: Runs):
    """Fig. 3: how many vectors fall into each R^2 bin, held out and in sample."""
    found = [one["linear_fit"] for one in runs.spectra().values()]
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(6, 3.6))
    sides = {"held_out": (-0.2, "#0072B2", "held-out checkpoints")}
    sides["in_sample"] = (0.2, "#E69F00", "checkpoints it was fitted on")
    for key, (offset, colour, label) in sides.items():
        counts = [np.histogram([row[key] for row in one], EDGES)[0] / len(one) for one in found]
        shares = {i + offset: over_seeds([*x]) for i, x in enumerate(np.transpose(counts))}
        bars = series(axis.bar, shares, width=0.4, color=colour, label=label)
        axis.bar_label(bars, fmt="{:.0f}", fontsize=8)
    axis.set_xticks(range(len(BINS)), BINS)
    axis.set_xlabel(r"$R^2$ of a straight line through $\sigma u$ (or $\sigma v$)")
    axis.set_ylabel(f"% of {len(found[0])} vectors")
    axis.margins(y=0.15)
    axis.legend(fontsize=8, loc="upper center")
    return figure


def predictor_loss(runs: Runs):
    """Eq. 9's loss by epoch, relative to predicting zeros: a panel a predictor, a line a family."""
    found = {name: [*many.values()] for name, many in runs.predictor_reports().items()}
    found = {name: many for name, many in found.items() if many[0]["losses"]}
    if not found:
        return None
    columns = min(len(found), 4)
    rows = math.ceil(len(found) / columns)
    size = (max(4 * columns, 5), 0.8 + 2.8 * rows)
    figure, _ = plt.subplots(rows, columns, figsize=size, sharey=True)
    for axis in figure.axes[len(found) :]:
        axis.remove()
    for axis, (name, reports) in zip(figure.axes, found.items(), strict=True):
        for i, family in enumerate(reports[0]["losses"]):
            moved = [r for r in reports if r["loss_of_zeros"][family]]
            curves = [[x / r["loss_of_zeros"][family] for x in r["losses"][family]] for r in moved]
            mean = [statistics.fmean(losses) for losses in zip(*curves, strict=True)]
            epochs = [j * reports[0]["loss_stride"] for j in range(len(mean))]
            colour = plt.cm.viridis(i / max(1, len(reports[0]["losses"]) - 1))
            axis.plot(epochs, mean, color=colour, lw=1.4, label=family)
        axis.axhline(1, color="gray", lw=1, ls=":")
        axis.set(title=label_of(f"next-{name}"), xlabel="epoch", yscale="log")
    figure.axes[0].set_ylabel("L1 loss / that of predicting zeros")
    legend_below(figure, figure.axes[0], 6)
    return figure


def alpha_sweep(runs: Runs):
    """Fig. 6: accuracy right after the jump by alpha; errors are those of the gain by the jump."""
    found = [m for m in runs.some() if m.policy.startswith("extrapolated/") and m.alpha]
    found = sorted((m for m in found if m.method in CURVES), key=lambda m: (place(m), m.alpha))
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(8, 4.8))
    for method, group in itertools.groupby(found, lambda m: m.method):
        curve = {m.alpha: Estimate(m.accuracy.mean, (m - runs.before).error) for m in group}
        series(axis.errorbar, curve, **CURVES[method], label=label_of(method), ms=4.5, lw=1.3)
    if before := runs.before.accuracy:
        label = f"before the jump (step {runs.prefix})"
        axis.axhline(100 * before.mean, color="black", lw=1, ls=":", label=label)
    level = f"accuracy % after the jump, ± paired s.e. over {runs.over}"
    axis.set(xlabel=rf"extending coefficient $\alpha$ ({MAIN_ALPHA:g} in the paper)", ylabel=level)
    legend_below(figure, axis, 3)
    return figure
