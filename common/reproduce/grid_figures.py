"""The paper's Figures 2, 3, 5 and 6 over training seeds, and the training curves. Bands and error bars are standard errors over seeds."""

import itertools
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.reproduce.plots import COLOURS, MARKS, R2_BINS, draw_cost, draw_sweeps, save
from common.reproduce.results import NAMES, cost_bars

RUNS = {"lora": ("LoRA", "#0072B2", "o"), "rank4": ("LoRA, rank 4", "#56B4E9", "^"), "rank64": ("LoRA, rank 64", "#5D3A9B", "v")}
RUNS |= {"full": ("all parameters", "#D55E00", "s")}


def mean_and_error(columns) -> tuple[list[float], list[float]]:
    """Mean and standard error over seeds of each column of values; 0 for one seed."""
    columns = [list(values) for values in columns]
    errors = [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in columns]
    return [statistics.fmean(values) for values in columns], errors


def energy(grid) -> pathlib.Path:
    """Fig. 2: the energy ratio of the global delta by step, LoRA beside all parameters."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    titles = (r"$E_1=\sigma_1/\sum_q\sigma_q$ (paper)", r"$\sigma_1^2/\sum_q\sigma_q^2$")
    for axis, key, title in zip(axes, ("energy_ratio", "energy_ratio_squared"), titles, strict=True):
        for run, (label, colour, mark) in RUNS.items():
            found = list(grid.spectra(run).values())
            if found:
                mean, error = mean_and_error(zip(*(one[key] for one in found), strict=True))
                axis.errorbar(
                    found[0]["steps"], mean, error, color=colour, marker=mark, ms=4, capsize=2, label=f"{label} ({len(found)} seeds)"
                )
        axis.set(title=title, xlabel="RL step", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of rank 1 in the global delta")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, ncol=4, loc="outside lower center", frameon=False)
    return save(figure, grid.root / "figures" / "fig2_energy_ratio.png")


def linear_fit(grid) -> pathlib.Path:
    """Fig. 3: how many vectors fall into each R^2 bin, held out and in sample."""
    found = list(grid.spectra("lora").values())
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    sides = ((-0.2, "held_out", "#0072B2", "held-out checkpoints"), (0.2, "in_sample", "#E69F00", "checkpoints it was fitted on"))
    for offset, key, colour, name in sides:
        shares = []
        for low, high in itertools.pairwise(R2_BINS):
            shares.append([100 * sum(low <= row[key] < high for row in one["linear_fit"]) / len(one["linear_fit"]) for one in found])
        mean, error = mean_and_error(shares)
        bars = axis.bar([i + offset for i in range(len(mean))], mean, 0.4, yerr=error, capsize=2, color=colour, label=name)
        axis.bar_label(bars, [f"{share:.0f}" for share in mean], fontsize=8)
    axis.set_xticks(range(len(R2_BINS) - 1), list(R2_BINS.values())[:-1])
    axis.set(xlabel=r"$R^2$ of a straight line through $\sigma u$ (or $\sigma v$)", ylabel=f"% of vectors, {len(found)} seeds")
    axis.margins(y=0.15)
    axis.legend(fontsize=8)
    return save(figure, grid.root / "figures" / "fig3_linear_fit.png")


def cost(grid) -> pathlib.Path:
    """Fig. 5: wall seconds by what they are spent on, means over seeds."""
    by_label = {}
    for seed, runs in grid.results.items():
        for label, parts in cost_bars(grid.root / f"seed{seed}" / "lora", runs.get("lora", {})).items():
            by_label.setdefault(label, []).append(parts)
    bars = {label: [statistics.fmean(values) for values in zip(*rows, strict=True)] for label, rows in by_label.items()}
    return draw_cost(bars, grid.root / "figures" / "fig5_cost.png")


def alpha_sweep(grid) -> pathlib.Path:
    """Fig. 6: accuracy right after the jump by alpha. The bars are standard errors of the difference from no jump, over seeds."""
    before, found = ("lora", grid.step(grid.prefix)), {}
    for runs in grid.results.values():
        for policy, result in runs.get("lora", {}).items():
            if policy.startswith("extrapolated/") and result.alpha is not None and result.method in COLOURS:
                found.setdefault(result.method, {})[result.alpha] = ("lora", policy)
    sweeps = {
        name: [(alpha, 100 * grid.accuracy(*at).mean, 100 * grid.difference(at, before).error) for alpha, at in sorted(found[name].items())]
        for name in NAMES
        if len(found.get(name, {})) > 1
    }
    level = (100 * grid.accuracy(*before).mean, grid.prefix)
    return draw_sweeps(sweeps, level, "s.e. over seeds", grid.root / "figures" / "fig6_alpha.png")


def accuracy_by_steps(grid) -> pathlib.Path:
    """Test accuracy by RL step: GRPO with LoRA and with all parameters, and the methods at the step their RL ended."""
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for run, label, colour, style in (("lora", NAMES["grpo"], "#000000", "-"), ("full", "GRPO, full parameters", "#777777", "--")):
        policies = {r.steps: p for runs in grid.results.values() for p, r in runs.get(run, {}).items() if p.startswith("train/")}
        points = [grid.accuracy(run, policies[step]) for step in sorted(policies)]
        if points:
            errors = [100 * p.error for p in points]
            axis.errorbar(
                sorted(policies), [100 * p.mean for p in points], errors, color=colour, ls=style, marker=".", capsize=2, label=label
            )
    found = {
        result.method: policy
        for runs in grid.results.values()
        for policy, result in runs.get("lora", {}).items()
        if policy.startswith("continued/") and result.steps == grid.total and result.method in COLOURS and "-no-" not in result.method
    }
    shown = [name for name in NAMES if name in found]
    for i, name in enumerate(shown):
        level = grid.accuracy("lora", found[name])
        at = grid.total + 4 * (i - (len(shown) - 1) / 2)  # side by side
        axis.errorbar(
            [at], [100 * level.mean], [100 * level.error], color=COLOURS[name], marker=MARKS[name], capsize=2, ls="", label=NAMES[name]
        )
    axis.set(xlabel=f"RL steps (methods ended at {grid.total}; drawn side by side)", ylabel="test accuracy %, ± s.e. over seeds")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    return save(figure, grid.root / "figures" / "accuracy.png")


def draw_all(grid) -> dict[str, pathlib.Path]:
    """Draws every figure, if the main rows were run; title -> path."""
    if not grid.get("lora", grid.step(grid.prefix)):
        return {}
    return {
        "Accuracy by RL step": accuracy_by_steps(grid),
        "Fig. 2: how much of the update is rank 1": energy(grid),
        "Fig. 3: a straight line through the trajectory": linear_fit(grid),
        "Fig. 5: where the time goes": cost(grid),
        "Fig. 6: how far to jump": alpha_sweep(grid),
    }
