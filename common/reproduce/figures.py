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
from common.reproduce.tables import RECIPES, ended, folder, place, plain_runs

LOOK = {  # method: colour (Okabe and Ito's, and a few more), marker, line
    "grpo": ("#000000", ".", "-"),
    "next-paper": ("#D55E00", "s", "-"),
    "next-aligned": ("#0072B2", "o", "-"),
    "weighted": ("#5D3A9B", "P", "-"),
    "rl-extra": ("#CC79A7", "D", "-"),
    "relex": ("#A6761D", ">", "-"),
    "repeat-last": ("#009E73", "^", "--"),
    "recent-locals": ("#8A8A00", "<", "--"),
    "none": ("#56B4E9", "x", ":"),
    "oracle": ("#E69F00", "v", "--"),
}
RUNS = {  # runs of a grid: name, colour, marker
    MAIN: ("LoRA", "#0072B2", "o"),
    "rank4": ("LoRA, rank 4", "#56B4E9", "^"),
    "rank64": ("LoRA, rank 64", "#5D3A9B", "v"),
    "full": ("all parameters", "#D55E00", "s"),
}
EDGES = (float("-inf"), -0.5, 0.0, 0.5, 0.9, float("inf"))  # of the bins of R^2 in Fig. 3
BINS = ("< −0.5", "−0.5 to 0", "0 to 0.5", "0.5 to 0.9", "> 0.9")
PARTS = {"RL": "#56B4E9", "SVD": "#D55E00", "predictor": "#E69F00", "extrapolation": "#009E73"}
WINDOW = 10  # RL steps of which the training curves are means


def draw_all(runs: Runs) -> dict[str, pathlib.Path]:
    """Draws what there is data for into `figures` in the page's folder; title -> path."""
    found, paths = {
        "Accuracy by RL step": ("accuracy", accuracy),
        "Reward and response length": ("training", training),
        "Fig. 2: how much of the update is rank 1": ("fig2_energy_ratio", energy),
        "Fig. 3: a straight line through the trajectory": ("fig3_linear_fit", linear_fit),
        "The predictors' training loss (Eq. 9)": ("predictor_loss", predictor_loss),
        "Fig. 5: where the time goes": ("fig5_cost", cost),
        "Fig. 6: how far to jump": ("fig6_alpha", alpha_sweep),
    }, {}
    for title, (name, draw) in found.items():
        if figure := draw(runs):
            paths[title] = runs.root / "figures" / f"{name}.png"
            save_figure(paths[title], figure)
            plt.close(figure)
    return paths


def panels(rows: int, columns: int, width: float, height: float, **options):
    """A figure of `rows` times `columns` axes with grid lines, of this size in inches."""
    size = {"figsize": (width, height), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(rows, columns, **size, **options)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, list(axes.flat)


def legend_below(figure, axis, columns: int) -> None:
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, fontsize=9, ncol=columns, loc="outside lower center", frameon=False)


def over_seeds(columns) -> tuple[list[float], list[float]]:
    """Mean and standard error over seeds of each column; no error for one seed."""
    columns = [list(values) for values in columns]
    errors = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else float("nan") for v in columns]
    return [statistics.fmean(values) for values in columns], errors


def accuracy(runs: Runs):
    """Test accuracy by RL step without a jump; beside it every method at the last step."""
    shown, curves = ended(runs)[::-1], {name: plain_runs(runs, name) for name in (MAIN, "full")}
    if not shown or not any(curves.values()):
        return None
    figure, axes = panels(1, 2, 11, 1.6 + 0.24 * max(len(shown), 9), width_ratios=(1, 1.1))
    for name, results in curves.items():
        if results:
            found, (_, colour, mark) = [runs.accuracy(r.policy, name) for r in results], RUNS[name]
            bars = [100 * f.mean for f in found], [100 * f.error for f in found]
            look = {"color": colour, "marker": mark, "ms": 4, "label": results[0].label}
            axes[0].errorbar([r.steps for r in results], *bars, capsize=2, **look)
    axes[0].set(xlabel="RL steps, without a jump", ylabel=f"accuracy %, ± s.e. over {runs.over}")
    axes[0].legend(fontsize=9, loc="lower right")
    for y, result in enumerate(shown):
        found = runs.accuracy(result.policy)
        colour, mark, _ = LOOK.get(result.method, ("#666666", "o", "-"))
        bars = {"xerr": 100 * found.error, "color": colour, "marker": mark, "capsize": 2}
        axes[1].errorbar(100 * found.mean, y, **bars)
    if plain := runs.accuracy(runs.step(runs.total)):
        axes[1].axvline(100 * plain.mean, color="black", lw=1, ls=":")
        axes[1].set_title(f"dotted: GRPO at {runs.total}, without a jump", fontsize=9)
    axes[1].set_yticks(range(len(shown)), [r.label for r in shown], fontsize=9)
    axes[1].set_xlabel(f"accuracy % after {runs.total} RL steps, with a jump at {runs.prefix}")
    return figure


def logged(runs: Runs, key: str) -> dict[str, dict[int, float]]:
    """method -> step -> `key` of metrics.jsonl, mean over seeds: the plain run and what goes on."""
    found = {}
    for seed in runs.seeds:
        paths = [*runs.folder(seed).glob("continued/*/metrics.jsonl")]
        for path in [runs.folder(seed) / "train" / "metrics.jsonl", *sorted(paths)]:
            name = path.parent.name
            method = "grpo" if name == "train" else name.split("_alpha")[0]
            if method in LOOK and path.is_file() and not name.endswith("_merged"):
                for row in read_jsonl(path, LOGGED):
                    found.setdefault(method, {}).setdefault(row["step"], []).append(row[key])
    shown = [method for method in LOOK if method in found]
    return {m: {step: statistics.fmean(v) for step, v in found[m].items()} for m in shown}


def smooth(rows: dict[int, float], window: int) -> dict[int, float]:
    """Step -> the mean of the `window` steps that end there; the first window - 1 have none."""
    steps = sorted(rows)
    ends = range(window - 1, len(steps))
    parts = {steps[i]: steps[i + 1 - window : i + 1] for i in ends}
    return {end: statistics.fmean(rows[step] for step in part) for end, part in parts.items()}


def training(runs: Runs):
    """Reward (of the whole run, and after the jump) and response length by RL step."""
    reward, length = logged(runs, "accuracy"), logged(runs, "response_length")
    if not reward:
        return None
    jumped, full = [m for m in reward if m != "grpo"], runs.is_full
    window = min([WINDOW, *map(len, reward.values())])
    figure, axes = panels(1, 3, 12, 4.1)
    titles = ("reward, the whole run", "reward after the jump", "response length, tokens")
    for axis, title, curves in zip(axes, titles, (reward, reward, length), strict=True):
        for method, rows in curves.items():
            (colour, _, line), curve = LOOK[method], smooth(rows, window)
            look = {"color": colour, "lw": 1.6, "label": method_name(method, full)}
            axis.plot(list(curve), list(curve.values()), line, **look)
        axis.set(title=title, xlabel=f"RL step (curves: means of {window})")
        if jumped:
            axis.axvline(runs.prefix, color="gray", lw=1, ls=":")
    if jumped:
        end = max(max(reward[method]) for method in jumped)
        curves = [smooth(rows, window) for rows in reward.values()]
        near = [v for curve in curves for step, v in curve.items() if runs.prefix < step <= end]
        low, high = min(near, default=0.0), max(near, default=1.0)
        axes[1].set(xlim=(runs.prefix, end), ylim=(low - 0.02, high + 0.02))
    legend_below(figure, axes[0], 4)
    return figure


def energy(runs: Runs):
    """Fig. 2: the energy ratio of the global delta by step, of one seed with the range."""
    found = {name: runs.spectra(name) for name in RUNS if runs.is_grid or name == MAIN}
    if not found[MAIN]:
        return None
    figure, axes = panels(1, 2, 9, 3.6, sharey=True)
    titles = (r"$E_1=\sigma_1/\sum_q\sigma_q$ (paper)", r"$\sigma_1^2/\sum_q\sigma_q^2$")
    keys = ("energy_ratio", "energy_ratio_squared")
    for axis, key, title in zip(axes, keys, titles, strict=True):
        for name, spectra in found.items():
            if spectra:
                label, colour, mark = RUNS[name]
                label += f" ({len(spectra)} seeds)" if len(runs.seeds) > 1 else ""
                look = {"color": colour, "marker": mark, "ms": 4, "capsize": 2, "label": label}
                bars = over_seeds(zip(*(one[key] for one in spectra), strict=True))
                axis.errorbar(spectra[0]["steps"], *bars, **look)
        axis.set(title=title, xlabel="RL step", ylim=(0, 1))
    if len(runs.seeds) == 1:
        (one,) = found[MAIN]
        rows = [sorted(v) for v in zip(*one["energy_ratio_by_module"].values(), strict=True)]
        low, high = ([v[int(q * (len(v) - 1))] for v in rows] for q in (0.1, 0.9))
        look = {"color": "#0072B2", "alpha": 0.15, "label": "LoRA, middle 80% of the matrices"}
        axes[0].fill_between(one["steps"], low, high, **look)
    axes[0].set_ylabel("share of rank 1 in the global delta")
    legend_below(figure, axes[0], 4)
    return figure


def linear_fit(runs: Runs):
    """Fig. 3: how many vectors fall into each R^2 bin, held out and in sample."""
    found = [one["linear_fit"] for one in runs.spectra()]
    if not found:
        return None
    figure, (axis,) = panels(1, 1, 6, 3.6)
    sides = {"held_out": (-0.2, "#0072B2", "held-out checkpoints")}
    sides["in_sample"] = (0.2, "#E69F00", "checkpoints it was fitted on")
    for key, (offset, colour, label) in sides.items():
        shares = []  # [bin][seed]
        for low, high in itertools.pairwise(EDGES):
            inside = [statistics.fmean(low <= row[key] < high for row in one) for one in found]
            shares.append([100 * share for share in inside])
        mean, error = over_seeds(shares)
        at = [i + offset for i in range(len(BINS))]
        bars = axis.bar(at, mean, 0.4, yerr=error, capsize=2, color=colour, label=label)
        axis.bar_label(bars, [f"{share:.0f}" for share in mean], fontsize=8)
    axis.set_xticks(range(len(BINS)), BINS)
    axis.set_xlabel(r"$R^2$ of a straight line through $\sigma u$ (or $\sigma v$)")
    axis.set_ylabel(f"% of {len(found[0])} vectors")
    axis.margins(y=0.15)
    axis.legend(fontsize=8, loc="upper center")
    return figure


def predictor_loss(runs: Runs):
    """Eq. 9's loss by epoch, relative to predicting zeros: a panel a predictor, a line a family."""
    found = {name: many for name, many in runs.predictor_reports().items() if many[0]["losses"]}
    if not found:
        return None
    columns = min(len(found), 4)
    rows = -(-len(found) // columns)
    figure, axes = panels(rows, columns, max(4 * columns, 5), 0.8 + 2.8 * rows, sharey=True)
    for axis in axes[len(found) :]:
        axis.remove()
    for axis, (name, reports) in zip(axes, found.items(), strict=False):
        for i, family in enumerate(reports[0]["losses"]):
            moved = [r for r in reports if r["loss_of_zeros"][family]]
            curves = [[x / r["loss_of_zeros"][family] for x in r["losses"][family]] for r in moved]
            mean = [statistics.fmean(losses) for losses in zip(*curves, strict=True)]
            epochs = [j * reports[0]["loss_stride"] for j in range(len(mean))]
            colour = plt.cm.viridis(i / max(1, len(reports[0]["losses"]) - 1))
            axis.plot(epochs, mean, color=colour, lw=1.4, label=family)
        axis.axhline(1, color="gray", lw=1, ls=":")
        axis.set(title=name, xlabel="epoch", yscale="log")
    axes[0].set_ylabel("L1 loss / that of predicting zeros")
    legend_below(figure, axes[0], 6)
    return figure


def cost(runs: Runs):
    """Fig. 5: wall seconds by what they are spent on; means over seeds."""
    bars, policies = {}, {runs.step(runs.reference or runs.total): "grpo"}
    policies |= {runs.after(folder(method)): method for method in reversed(RECIPES)}
    for policy, method in policies.items():
        found = {runs.folder(s): r for s, r in runs.get(policy).items() if r.seconds}
        if found:
            own = [own_seconds(run, method, folder(method)) for run in found if method != "grpo"]
            parts = {part: sum(o.get(part, 0.0) for o in own) / len(found) for part in PARTS}
            parts["RL"] = statistics.fmean(r.seconds for r in found.values()) - sum(parts.values())
            result = next(iter(found.values()))
            bars[f"{result.label}, {result.steps} steps"] = parts
    if not bars:
        return None
    figure, (axis,) = panels(1, 1, 9, 1.3 + 0.4 * len(bars))
    for y, parts in enumerate(bars.values()):
        left = 0.0
        for part, colour in PARTS.items():
            axis.barh(y, parts[part], left=left, color=colour, label=part if y == 0 else None)
            left += parts[part]
        axis.text(left, y, f" {left:.0f} s", va="center", fontsize=9)
        rest = [f"{part} {value:.1f} s" for part, value in parts.items() if value and part != "RL"]
        axis.text(0, y, "  " + ", ".join(rest), va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), list(bars), fontsize=9)
    longest = max(sum(parts.values()) for parts in bars.values())
    axis.set(xlabel="wall seconds", xlim=(0, 1.1 * longest))
    figure.legend(fontsize=9, ncol=4, loc="outside upper center", frameon=False)
    return figure


def alpha_sweep(runs: Runs):
    """Fig. 6: accuracy right after the jump by alpha; errors are those of the gain by the jump."""
    sweeps = {}
    for r in sorted(runs.some().values(), key=lambda r: r.alpha or 0.0):
        if r.policy.startswith("extrapolated/") and r.alpha and r.method in LOOK:
            sweeps.setdefault(r.method, []).append(r)
    if not sweeps:
        return None
    figure, (axis,) = panels(1, 1, 8, 4.8)
    for method in sorted(sweeps, key=place):
        levels = [100 * runs.accuracy(r.policy).mean for r in sweeps[method]]
        gaps = [runs.difference(r.policy, runs.before) for r in sweeps[method]]
        errors = [100 * gap.error if gap else float("nan") for gap in gaps]
        colour, mark, line = LOOK[method]
        look = {"color": colour, "marker": mark, "ls": line, "ms": 4.5, "capsize": 2, "lw": 1.3}
        alphas = [r.alpha for r in sweeps[method]]
        axis.errorbar(alphas, levels, errors, label=NAMES[method], **look)
    if before := runs.accuracy(runs.before):
        label = f"before the jump (step {runs.prefix})"
        axis.axhline(100 * before.mean, color="black", lw=1, ls=":", label=label)
    axis.set_xlabel(rf"extending coefficient $\alpha$ ({MAIN_ALPHA:g} in the paper)")
    axis.set_ylabel(f"accuracy % after the jump, ± paired s.e. over {runs.over}")
    legend_below(figure, axis, 3)
    return figure
