"""The figures of a page. Each is drawn by one function, from one run or from a grid of them."""

import itertools
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.files.read import read_jsonl
from common.files.write import save_figure
from common.reproduce.results import LOGGED, MAIN_ALPHA, NAMES, method_name, own_seconds
from common.reproduce.runs import MAIN, Runs
from common.reproduce.tables import RECIPES, folder, place

LOOK = {  # method: colour (Okabe and Ito's, and a few more), marker, line
    "grpo": ("#000000", ".", "-"),
    "next-paper": ("#D55E00", "s", "-"),
    "next-aligned": ("#0072B2", "o", "-"),
    "weighted": ("#5D3A9B", "P", "-"),
    "alpharl": ("#666666", "p", "-"),
    "rl-extra": ("#CC79A7", "D", "-"),
    "relex": ("#A6761D", ">", "-"),
    "repeat-last": ("#009E73", "^", "--"),
    "recent-locals": ("#8A8A00", "<", "--"),
    "none": ("#56B4E9", "x", ":"),
    "oracle": ("#E69F00", "v", "--"),
}
RUNS = {  # of Fig. 2 and the curve of accuracy: name, colour, marker
    MAIN: ("LoRA", "#0072B2", "o"),
    "rank4": ("LoRA, rank 4", "#56B4E9", "^"),
    "rank64": ("LoRA, rank 64", "#5D3A9B", "v"),
    "full": ("all parameters", "#D55E00", "s"),
}
BINS = {
    float("-inf"): "< −0.5",
    -0.5: "−0.5 to 0",
    0.0: "0 to 0.5",
    0.5: "0.5 to 0.9",
    0.9: "> 0.9",
}
PARTS = {"RL": "#56B4E9", "SVD": "#D55E00", "predictor": "#E69F00", "extrapolation": "#009E73"}
WINDOW = 10  # RL steps of which the training curves are means


def draw_all(runs: Runs) -> dict[str, pathlib.Path]:
    """Draws the figures that there is data for, in `figures` of the page's folder; title -> path."""
    found = {
        "Accuracy by RL step": ("accuracy", accuracy),
        "Reward and response length": ("training", training),
        "Fig. 2: how much of the update is rank 1": ("fig2_energy_ratio", energy),
        "Fig. 3: a straight line through the trajectory": ("fig3_linear_fit", linear_fit),
        "The predictors' training loss (Eq. 9)": ("predictor_loss", predictor_loss),
        "Fig. 5: where the time goes": ("fig5_cost", cost),
        "Fig. 6: how far to jump": ("fig6_alpha", alpha_sweep),
    }
    paths = {}
    for title, (name, draw) in found.items():
        if figure := draw(runs):
            paths[title] = runs.root / "figures" / f"{name}.png"
            save_figure(paths[title], figure)
            plt.close(figure)
    return paths


def over(runs: Runs) -> str:
    return "over problems" if len(runs.seeds) == 1 else "over seeds"


def mean_and_error(columns) -> tuple[list[float], list[float]]:
    """Mean and standard error over seeds of each column; no error bar for one seed."""
    columns = [list(values) for values in columns]
    errors = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else float("nan") for v in columns]
    return [statistics.fmean(values) for values in columns], errors


def legend_below(figure, axis, columns: int) -> None:
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, fontsize=9, ncol=columns, loc="outside lower center", frameon=False)


def accuracy(runs: Runs):
    """Test accuracy by RL step without a jump, and beside it of every method at the last step."""
    ended = [
        r
        for r in runs.some().values()
        if r.policy.startswith("continued/") and r.steps == runs.total
    ]
    shown = sorted(ended, key=lambda r: place(r.method), reverse=True)
    curves = {
        n: sorted((r for r in runs.some(n).values() if r.method == "grpo"), key=lambda r: r.steps)
        for n in (MAIN, "full")
    }
    if not shown or not any(curves.values()):
        return None
    figure, axes = plt.subplots(
        1,
        2,
        figsize=(11, 1.6 + 0.24 * max(len(shown), 9)),
        layout="constrained",
        width_ratios=(1, 1.1),
    )
    for name, results in curves.items():
        if results:
            found, (_, colour, mark) = [runs.accuracy(r.policy, name) for r in results], RUNS[name]
            bars = (
                [r.steps for r in results],
                [100 * f.mean for f in found],
                [100 * f.error for f in found],
            )
            axes[0].errorbar(
                *bars, color=colour, marker=mark, ms=4, capsize=2, label=results[0].label
            )
    axes[0].set(xlabel="RL steps, without a jump", ylabel=f"accuracy %, ± s.e. {over(runs)}")
    axes[0].legend(fontsize=9, loc="lower right")
    for y, result in enumerate(shown):
        found, (colour, mark, _) = (
            runs.accuracy(result.policy),
            LOOK.get(result.method, ("#666666", "o", "-")),
        )
        axes[1].errorbar(
            100 * found.mean, y, xerr=100 * found.error, color=colour, marker=mark, capsize=2
        )
    if plain := runs.accuracy(runs.step(runs.total)):
        axes[1].axvline(
            100 * plain.mean, color="black", lw=1, ls=":", label=f"no jump, {runs.total} steps"
        )
        axes[1].legend(fontsize=9, loc="best")
    axes[1].set_yticks(range(len(shown)), [r.label for r in shown], fontsize=9)
    axes[1].set(xlabel=f"accuracy % after {runs.total} RL steps, with a jump at {runs.prefix}")
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure


def smooth(rows: dict[int, float], window: int) -> dict[int, float]:
    """Step -> the mean of `window` steps that end there; the first window - 1 have none."""
    steps = sorted(rows)
    at = range(window - 1, len(steps))
    return {steps[i]: statistics.fmean(rows[s] for s in steps[i - window + 1 : i + 1]) for i in at}


def logged(runs: Runs, key: str) -> dict[str, dict[int, float]]:
    """method -> step -> `key` of metrics.jsonl, mean over seeds: the plain run and what goes on."""
    found = {}
    for seed in runs.seeds:
        run = runs.folder(seed)
        folders = {"grpo": run / "train"} | {
            path.name.split("_alpha")[0]: path for path in sorted((run / "continued").glob("*"))
        }
        for method in LOOK.keys() & folders.keys():
            path = folders[method] / "metrics.jsonl"
            for row in (
                read_jsonl(path, LOGGED)
                if path.is_file() and not folders[method].name.endswith("_merged")
                else []
            ):
                found.setdefault(method, {}).setdefault(row["step"], []).append(row[key])
    return {m: {s: statistics.fmean(v) for s, v in found[m].items()} for m in LOOK if m in found}


def training(runs: Runs):
    """Reward (of the whole run, and around the jump) and response length by RL step."""
    reward, length = logged(runs, "accuracy"), logged(runs, "response_length")
    if not reward:
        return None
    window, jumped = min([WINDOW, *map(len, reward.values())]), [m for m in reward if m != "grpo"]
    full = next(iter(runs.some().values())).trained.get("tune") == "full" if runs.some() else False
    panels = [
        ("reward, the whole run", reward),
        ("reward after the jump", reward),
        ("response length, tokens", length),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.1), layout="constrained")
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for method, rows in curves.items():
            colour, _, line = LOOK[method]
            curve = smooth(rows, window)
            axis.plot(
                curve.keys(),
                curve.values(),
                line,
                color=colour,
                lw=1.6,
                label=method_name(method, full),
            )
        if jumped:
            axis.axvline(runs.prefix, color="gray", lw=1, ls=":")
        axis.set(title=title, xlabel=f"RL step (curves: means of {window})")
        axis.grid(alpha=0.3)
    if jumped:
        end = max(max(reward[method]) for method in jumped)
        near = [
            v
            for rows in reward.values()
            for s, v in smooth(rows, window).items()
            if runs.prefix < s <= end
        ]
        low, high = min(near, default=0.0), max(near, default=1.0)
        axes[1].set(xlim=(runs.prefix, end), ylim=(low - 0.02, high + 0.02))
    legend_below(figure, axes[0], 4)
    return figure


def energy(runs: Runs):
    """Fig. 2: the energy ratio of the global delta by step; of one run with the range of matrices."""
    found = {name: runs.spectra(name) for name in (RUNS if runs.is_grid else [MAIN])}
    if not found[MAIN]:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    titles = (r"$E_1=\sigma_1/\sum_q\sigma_q$ (paper)", r"$\sigma_1^2/\sum_q\sigma_q^2$")
    for axis, key, title in zip(
        axes, ("energy_ratio", "energy_ratio_squared"), titles, strict=True
    ):
        for name, spectra in found.items():
            if not spectra:
                continue
            label, colour, mark = RUNS[name]
            label += f" ({len(spectra)} seeds)" if len(runs.seeds) > 1 else ""
            mean, error = mean_and_error(zip(*(one[key] for one in spectra), strict=True))
            axis.errorbar(
                spectra[0]["steps"],
                mean,
                error,
                color=colour,
                marker=mark,
                ms=4,
                capsize=2,
                label=label,
            )
        axis.set(title=title, xlabel="RL step", ylim=(0, 1))
        axis.grid(alpha=0.3)
    if len(runs.seeds) == 1:
        rows = [
            sorted(v) for v in zip(*found[MAIN][0]["energy_ratio_by_module"].values(), strict=True)
        ]
        low, high = ([v[int(q * (len(v) - 1))] for v in rows] for q in (0.1, 0.9))
        steps = found[MAIN][0]["steps"]
        axes[0].fill_between(
            steps, low, high, color="#0072B2", alpha=0.15, label="middle 80% of the matrices"
        )
    axes[0].set_ylabel("share of rank 1 in the global delta")
    legend_below(figure, axes[0], 4)
    return figure


def linear_fit(runs: Runs):
    """Fig. 3: how many vectors fall into each R^2 bin, held out and in sample."""
    found = [one["linear_fit"] for one in runs.spectra()]
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    sides = (
        (-0.2, "held_out", "#0072B2", "held-out checkpoints"),
        (0.2, "in_sample", "#E69F00", "checkpoints it was fitted on"),
    )
    for offset, key, colour, name in sides:
        edges = itertools.pairwise([*BINS, float("inf")])
        shares = [
            [100 * sum(low <= row[key] < high for row in rows) / len(rows) for rows in found]
            for low, high in edges
        ]
        mean, error = mean_and_error(shares)
        at = [i + offset for i in range(len(BINS))]
        bars = axis.bar(at, mean, 0.4, yerr=error, capsize=2, color=colour, label=name)
        axis.bar_label(bars, [f"{share:.0f}" for share in mean], fontsize=8)
    axis.set_xticks(range(len(BINS)), list(BINS.values()))
    axis.set(
        xlabel=r"$R^2$ of a straight line through $\sigma u$ (or $\sigma v$)",
        ylabel=f"% of {len(found[0])} vectors",
    )
    axis.margins(y=0.15)
    axis.legend(fontsize=8)
    return figure


def predictor_loss(runs: Runs):
    """Eq. 9's loss by epoch, a panel a predictor and a line a family of vectors, relative to zeros."""
    found = {
        name: reports for name, reports in runs.predictor_reports().items() if reports[0]["losses"]
    }
    if not found:
        return None
    columns = min(len(found), 4)
    size = -(-len(found) // columns)
    figure, axes = plt.subplots(
        size,
        columns,
        figsize=(4 * columns, 3.2 * size),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, (name, reports) in zip(axes.flat, found.items(), strict=False):
        for i, family in enumerate(reports[0]["losses"]):
            shares = [
                [loss / r["loss_of_zeros"][family] for loss in r["losses"][family]]
                for r in reports
                if r["loss_of_zeros"][family]
            ]
            if shares:  # else no matrix of this family moved
                mean, _ = mean_and_error(zip(*shares, strict=True))
                epochs = [j * reports[0]["loss_stride"] for j in range(len(mean))]
                colour = plt.cm.viridis(i / max(1, len(reports[0]["losses"]) - 1))
                axis.plot(epochs, mean, color=colour, lw=1.4, label=family)
        axis.axhline(1, color="gray", lw=1, ls=":")
        axis.set(title=name, xlabel="epoch", yscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("L1 loss / that of predicting zeros")
    legend_below(figure, axes[0, 0], 6)
    return figure


def cost(runs: Runs):
    """Fig. 5: wall seconds by what they are spent on; means over seeds."""
    bars, plain = {}, runs.step(runs.reference or runs.total)
    policies = {plain: "grpo"} | {
        runs.after(folder(method)): method for method in reversed(RECIPES)
    }
    for policy, method in policies.items():
        found = {seed: r for seed, r in runs.get(policy).items() if r.seconds}
        own = [
            own_seconds(runs.folder(s), method, folder(method)) if method != "grpo" else {}
            for s in found
        ]
        if found:
            parts = {part: statistics.fmean(o.get(part, 0.0) for o in own) for part in PARTS}
            parts["RL"] = statistics.fmean(r.seconds for r in found.values()) - sum(parts.values())
            result = next(iter(found.values()))
            bars[f"{result.label}, {result.steps} steps"] = parts
    if not bars:
        return None
    figure, axis = plt.subplots(figsize=(9, 1.3 + 0.5 * len(bars)), layout="constrained")
    longest = max(sum(parts.values()) for parts in bars.values())
    for y, parts in enumerate(bars.values()):
        left = 0.0
        for part, colour in PARTS.items():
            axis.barh(y, parts[part], left=left, color=colour, label=part if y == 0 else None)
            left += parts[part]
        rest = ", ".join(
            f"{part} {value:.1f}" for part, value in parts.items() if value and part != "RL"
        )
        axis.text(
            left, y, f" {left:.0f} s" + (f"\n ({rest})" if rest else ""), va="center", fontsize=8
        )
    axis.set_yticks(range(len(bars)), list(bars), fontsize=9)
    axis.set(xlabel="wall seconds", xlim=(0, 1.45 * longest))
    figure.legend(fontsize=9, ncol=4, loc="outside upper center", frameon=False)
    return figure


def alpha_sweep(runs: Runs):
    """Fig. 6: accuracy right after the jump by alpha; errors are those of the difference from before."""
    sweeps = {}
    for result in runs.some().values():
        if result.policy.startswith("extrapolated/") and result.alpha and result.method in LOOK:
            sweeps.setdefault(result.method, []).append(result)
    if not sweeps:
        return None
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for method in sorted(sweeps, key=place):
        points = sorted(sweeps[method], key=lambda r: r.alpha)
        levels = [100 * runs.accuracy(r.policy).mean for r in points]
        gaps = [runs.difference(r.policy, runs.before) for r in points]
        errors = [100 * gap.error if gap else float("nan") for gap in gaps]
        colour, mark, line = LOOK[method]
        look = {
            "color": colour,
            "marker": mark,
            "ls": line,
            "ms": 4.5,
            "capsize": 2,
            "lw": 1.3,
            "alpha": 0.85,
        }
        axis.errorbar([r.alpha for r in points], levels, errors, label=NAMES[method], **look)
    if before := runs.accuracy(runs.before):
        axis.axhline(
            100 * before.mean,
            color="black",
            lw=1,
            ls=":",
            label=f"before the jump (step {runs.prefix})",
        )
    axis.set(xlabel=rf"extending coefficient $\alpha$ ({MAIN_ALPHA:g} in the paper)")
    axis.set_ylabel(f"accuracy % after the jump, ± paired s.e. {over(runs)}")
    axis.grid(alpha=0.3)
    legend_below(figure, axis, 3)
    return figure
