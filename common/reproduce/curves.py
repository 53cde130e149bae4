"""Curves by RL step and by epoch, and what all figures share: looks, axes, the legend."""

import math
import statistics

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.files.read import read_jsonl
from common.reproduce.estimates import Estimate
from common.reproduce.results import LOGGED, METHODS, label_of
from common.reproduce.runs import MAIN, Runs
from common.reproduce.tables import ended, plain_runs

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


def legend_below(figure, axis, columns: int) -> None:
    """Under all axes, the labels of one."""
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, ncol=columns, loc="outside lower center", frameon=False)


def series(axis, x: list, found: list[Estimate], scale: float = 100, **look) -> None:
    """A curve of estimates with their standard errors, in percent unless `scale` is 1."""
    means, errors = [scale * f.mean for f in found], [scale * f.error for f in found]
    axis.errorbar(x, means, errors, **look)


def accuracy(runs: Runs):
    """Test accuracy by RL step without a jump; beside it every method at the last step."""
    shown, curves = ended(runs)[::-1], {name: plain_runs(runs, name) for name in (MAIN, "full")}
    if not shown or not any(curves.values()):
        return None
    size = (11, 1.6 + 0.24 * max(len(shown), 9))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=(1, 1.1))
    for name, results in curves.items():
        if results:
            found = [runs.accuracy(r.policy, name) for r in results]
            look = RUNS[name] | {"label": results[0].label}
            series(left, [r.steps for r in results], found, **look)
    left.set(xlabel="RL steps, without a jump", ylabel=f"accuracy %, ± s.e. over {runs.over}")
    left.legend(loc="lower right")
    for y, result in enumerate(shown):
        found = runs.accuracy(result.policy)
        look = CURVES.get(result.method, {"color": "#666666", "marker": "o"}) | {"ms": 6}
        right.errorbar(100 * found.mean, y, xerr=100 * found.error, **look)
    if plain := runs.accuracy(runs.step(runs.total)):
        right.axvline(100 * plain.mean, color="black", lw=1, ls=":")
        right.set_title(f"dotted: GRPO at {runs.total}, without a jump", fontsize=9)
    right.set_yticks(range(len(shown)), [r.label for r in shown], fontsize=9)
    right.set_xlabel(f"accuracy % after {runs.total} RL steps, with a jump at {runs.prefix}")
    return figure


def logged(runs: Runs, key: str) -> dict[str, dict[int, float]]:
    """method -> step -> `key` of metrics.jsonl, mean over seeds: the plain run and what goes on."""
    found = {method: {} for method in CURVES}
    for seed in runs.seeds:
        paths = [*runs.folder(seed).glob("continued/*/metrics.jsonl")]
        for path in [runs.folder(seed) / "train" / "metrics.jsonl", *sorted(paths)]:
            name = path.parent.name
            method = "grpo" if name == "train" else name.split("_alpha")[0]
            if method in found and path.is_file() and not name.endswith("_merged"):
                for row in read_jsonl(path, LOGGED):
                    found[method].setdefault(row["step"], []).append(row[key])
    some = {method: rows for method, rows in found.items() if rows}
    return {m: {step: statistics.fmean(v) for step, v in some[m].items()} for m in some}


def training(runs: Runs):
    """Reward (of the whole run, and after the jump) and response length by RL step."""
    reward, length = logged(runs, "accuracy"), logged(runs, "response_length")
    if not reward:
        return None
    jumped = [method for method in reward if method != "grpo"]
    full = any(r.trained.get("tune") == "full" for r in runs.some().values())
    window = min([WINDOW, *map(len, reward.values())])
    last = max([max(reward[method]) for method in jumped], default=0)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.1))
    shown = {
        "reward, the whole run": (reward, 0, math.inf),
        "reward after the jump": (reward, runs.prefix + 1, last),
        "response length, tokens": (length, 0, math.inf),
    }
    for axis, (title, (curves, begin, end)) in zip(axes, shown.items(), strict=True):
        for method, rows in curves.items():
            steps = sorted(rows)
            means = np.convolve([rows[s] for s in steps], np.full(window, 1 / window), "valid")
            ends = steps[window - 1 :]  # a mean is drawn at the last of its steps
            curve = [(s, y) for s, y in zip(ends, means, strict=True) if begin <= s <= end]
            label = label_of("full" if full and method == "grpo" else method)
            look = CURVES[method] | {"marker": None, "lw": 1.6, "label": label}
            axis.plot([s for s, _ in curve], [y for _, y in curve], **look)
        axis.set(title=title, xlabel=f"RL step (curves: means of {window})")
        if jumped:
            axis.axvline(runs.prefix, color="gray", lw=1, ls=":")
    legend_below(figure, axes[0], 4)
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
        axis.set(title=name, xlabel="epoch", yscale="log")
    figure.axes[0].set_ylabel("L1 loss / that of predicting zeros")
    legend_below(figure, figure.axes[0], 6)
    return figure
