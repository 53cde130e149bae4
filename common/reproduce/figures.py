"""The figures of a page. Each is drawn by one function, from one run or from a grid of them."""

import itertools
import pathlib
import statistics

import matplotlib.pyplot as plt

from common.files.write import save_figure
from common.reproduce import curves, rates
from common.reproduce.curves import CURVES, RUNS, legend_below, series
from common.reproduce.estimates import Estimate, over_seeds
from common.reproduce.results import MAIN_ALPHA, label_of
from common.reproduce.runs import MAIN, Runs
from common.reproduce.tables import RECIPES, folder, place

EDGES = (float("-inf"), -0.5, 0.0, 0.5, 0.9, float("inf"))  # of the bins of R^2 in Fig. 3
BINS = ("< −0.5", "−0.5 to 0", "0 to 0.5", "0.5 to 0.9", "> 0.9")
PARTS = {"RL": "#56B4E9", "SVD": "#D55E00", "predictor": "#E69F00", "extrapolation": "#009E73"}


def draw_all(runs: Runs) -> dict[str, pathlib.Path]:
    """Draws what there is data for into `figures` in the page's folder; title -> path."""
    paths = {}
    for title, (name, draw) in {
        "Accuracy by learning rate": ("rates", rates.accuracy),
        "The gain of a jump by learning rate": ("rates_gain", rates.gain),
        "The gain of a jump by its held-out cosine": ("rates_cosine", rates.against_cosine),
        "Accuracy by RL step": ("accuracy", curves.accuracy),
        "Reward and response length": ("training", curves.training),
        "Fig. 2: how much of the update is rank 1": ("fig2_energy_ratio", energy),
        "Fig. 3: a straight line through the trajectory": ("fig3_linear_fit", linear_fit),
        "The predictors' training loss (Eq. 9)": ("predictor_loss", curves.predictor_loss),
        "Fig. 5: where the time goes": ("fig5_cost", cost),
        "Fig. 6: how far to jump": ("fig6_alpha", alpha_sweep),
    }.items():
        if figure := draw(runs):
            paths[title] = runs.root / "figures" / f"{name}.png"
            save_figure(paths[title], figure)
            plt.close(figure)
    return paths


def energy(runs: Runs):
    """Fig. 2: the energy ratio of the global delta by step, of one seed with the range."""
    found = {name: runs.spectra(name) for name in RUNS if runs.is_grid or name == MAIN}
    if not found[MAIN]:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    titles = (r"$E_1=\sigma_1/\sum_q\sigma_q$ (paper)", r"$\sigma_1^2/\sum_q\sigma_q^2$")
    keys = ("energy_ratio", "energy_ratio_squared")
    for axis, key, title in zip(axes, keys, titles, strict=True):
        for name, spectra in found.items():
            if spectra:
                of = f" ({len(spectra)} seeds)" if len(runs.seeds) > 1 else ""
                look = RUNS[name] | {"label": RUNS[name]["label"] + of}
                values = zip(*(one[key] for one in spectra), strict=True)
                levels = [over_seeds(many) for many in values]
                series(axis, spectra[0]["steps"], levels, 1, **look)
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
    figure, axis = plt.subplots(figsize=(6, 3.6))
    sides = {"held_out": (-0.2, "#0072B2", "held-out checkpoints")}
    sides["in_sample"] = (0.2, "#E69F00", "checkpoints it was fitted on")
    for key, (offset, colour, label) in sides.items():
        shares = []
        for low, high in itertools.pairwise(EDGES):
            inside = [statistics.fmean(low <= row[key] < high for row in one) for one in found]
            shares.append(over_seeds([100 * share for share in inside]))
        at, mean = [i + offset for i in range(len(BINS))], [share.mean for share in shares]
        errors = [share.error for share in shares]
        bars = axis.bar(at, mean, 0.4, yerr=errors, color=colour, label=label)
        axis.bar_label(bars, [f"{share:.0f}" for share in mean], fontsize=8)
    axis.set_xticks(range(len(BINS)), BINS)
    axis.set_xlabel(r"$R^2$ of a straight line through $\sigma u$ (or $\sigma v$)")
    axis.set_ylabel(f"% of {len(found[0])} vectors")
    axis.margins(y=0.15)
    axis.legend(fontsize=8, loc="upper center")
    return figure


def cost(runs: Runs):
    """Fig. 5: wall seconds by what they are spent on; means over seeds."""
    bars, policies = {}, [runs.step(runs.reference or runs.total)]
    for policy in policies + [runs.after(folder(method)) for method in reversed(RECIPES)]:
        if found := [r for r in runs.get(policy).values() if r.seconds]:
            label = f"{found[0].label}, {found[0].steps} steps"
            bars[label] = {p: statistics.fmean(r.spent.get(p, 0.0) for r in found) for p in PARTS}
    if not bars:
        return None
    figure, axis = plt.subplots(figsize=(9, 1.3 + 0.4 * len(bars)))
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
    figure.legend(ncol=4, loc="outside upper center", frameon=False)
    return figure


def alpha_sweep(runs: Runs):
    """Fig. 6: accuracy right after the jump by alpha; errors are those of the gain by the jump."""
    found = [r for r in runs.some().values() if r.policy.startswith("extrapolated/") and r.alpha]
    found = sorted((r for r in found if r.method in CURVES), key=lambda r: (place(r), r.alpha))
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(8, 4.8))
    for method in dict.fromkeys(r.method for r in found):
        rows, levels = [r for r in found if r.method == method], []
        for r in rows:
            gap = runs.difference(r.policy, runs.before)
            level = runs.accuracy(r.policy).mean
            levels.append(Estimate(level, gap.error if gap else float("nan")))
        look = CURVES[method] | {"label": label_of(method), "ms": 4.5, "lw": 1.3}
        series(axis, [r.alpha for r in rows], levels, **look)
    if before := runs.accuracy(runs.before):
        label = f"before the jump (step {runs.prefix})"
        axis.axhline(100 * before.mean, color="black", lw=1, ls=":", label=label)
    axis.set_xlabel(rf"extending coefficient $\alpha$ ({MAIN_ALPHA:g} in the paper)")
    axis.set_ylabel(f"accuracy % after the jump, ± paired s.e. over {runs.over}")
    legend_below(figure, axis, 3)
    return figure
