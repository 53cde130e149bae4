"""The figures, each from the files of a run directory. Okabe and Ito's colours and a few more."""

import itertools
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.files import deltas as delta_files
from common.files import read as inputs
from common.files import write as run_dir
from common.reproduce.results import LOGGED, MAIN_ALPHA, NAMES, difference, method_name, read_predictor_report, trained_whole

COLOURS = {
    "grpo": "#000000",
    "next-aligned": "#0072B2",
    "next-paper": "#D55E00",
    "next-weighted": "#5D3A9B",
    "next-aligned-no-global": "#7FB8D8",
    "next-aligned-no-local": "#003D66",
    "next-paper-no-global": "#F0A878",
    "next-paper-no-local": "#7A3500",
    "repeat-last": "#009E73",
    "recent-locals": "#8A8A00",
    "alpharl": "#666666",
    "rl-extra": "#CC79A7",
    "relex": "#A6761D",
    "oracle": "#E69F00",
    "none": "#56B4E9",
}
R2_BINS = {float("-inf"): "< −0.5", -0.5: "−0.5 to 0", 0.0: "0 to 0.5", 0.5: "0.5 to 0.9", 0.9: "> 0.9", float("inf"): ""}  # from: name
LINES = {"repeat-last": "--", "recent-locals": "--", "oracle": "--", "none": ":"}  # the controls
MARKS = {
    "next-aligned": "o",
    "next-paper": "s",
    "next-weighted": "P",
    "next-aligned-no-global": "h",
    "next-aligned-no-local": "H",
    "next-paper-no-global": "d",
    "next-paper-no-local": "X",
    "repeat-last": "^",
    "recent-locals": "<",
    "alpharl": "p",
    "rl-extra": "D",
    "relex": ">",
    "oracle": "v",
    "none": "x",
}


def save(figure, path: pathlib.Path) -> pathlib.Path:
    """Writes the picture and closes the figure."""
    run_dir.save_figure(path, figure)
    plt.close(figure)
    return path


def _smooth(values: list[float], window: int) -> list[float]:
    """Means of `window` neighbours; the first has `window` values behind it, so the result is shorter by window - 1."""
    return [sum(values[i - window : i]) / window for i in range(window, len(values) + 1)]


def training_curves(run: pathlib.Path) -> pathlib.Path:
    """Reward (whole, and around the jump) and response length by RL step: the uninterrupted run and every continuation."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    runs = {"grpo": run / "train"}
    for path in sorted((run / "continued").glob("*/metrics.jsonl")):
        if (name := path.parent.name.split("_alpha")[0]) in COLOURS and not path.parent.name.endswith("_merged"):
            runs[name] = path.parent
    rows = {name: logged for name, folder in runs.items() if (logged := inputs.read_jsonl(folder / "metrics.jsonl", LOGGED))}
    jump = min((logged[0]["step"] - 1 for name, logged in rows.items() if name != "grpo"), default=None)
    window, full = min([10, *(len(logged) for logged in rows.values())]), trained_whole(run)
    for axis, key, title in zip(
        axes, ("accuracy", "accuracy", "response_length"), ("reward", "reward", "response length, tokens"), strict=True
    ):
        for name in sorted(rows, key=list(NAMES).index):
            steps, values = [row["step"] for row in rows[name]][window - 1 :], _smooth([row[key] for row in rows[name]], window)
            axis.plot(steps, values, LINES.get(name, "-"), color=COLOURS[name], lw=1.6, label=method_name(name, full))
        if jump is not None:
            axis.axvline(jump, color="gray", lw=1, ls=":")
        axis.set(xlabel="RL step", ylabel=f"{title} (mean of {window} steps)")
        axis.grid(alpha=0.3)
    if jump is not None:
        end = max(logged[-1]["step"] for name, logged in rows.items() if name != "grpo")
        near = [v for logged in rows.values() for v in _smooth([r["accuracy"] for r in logged if jump < r["step"] <= end], window)]
        low, high = min(near, default=0.0), max(near, default=1.0)
        axes[1].set(xlim=(jump, end), ylim=(low - 0.02, high + 0.02), title="after the jump")
        axes[0].set_title("the whole run (dotted: the jump)")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=10, ncol=3, loc="outside lower center", frameon=False)
    return save(figure, run / "figures" / "training.png")


def energy(run: pathlib.Path) -> pathlib.Path:
    """Fig. 2: the energy ratio of the global delta by step, mean over matrices with the range of the middle 80%."""
    found = delta_files.read_spectrum(run / "deltas")
    figure, axis = plt.subplots(figsize=(5.4, 3.4))
    by_step = [sorted(values) for values in zip(*found["energy_ratio_by_module"].values(), strict=True)]
    low, high = ([values[int(q * (len(values) - 1))] for values in by_step] for q in (0.1, 0.9))
    axis.fill_between(found["steps"], low, high, color="#0072B2", alpha=0.15, label="middle 80% of the matrices")
    axis.plot(found["steps"], found["energy_ratio"], "o-", color="#0072B2", label=r"$E_1=\sigma_1/\sum_q\sigma_q$ (paper)")
    axis.plot(found["steps"], found["energy_ratio_squared"], "s--", color="#D55E00", label=r"$\sigma_1^2/\sum_q\sigma_q^2$")
    axis.set(xlabel="RL step", ylabel="share of rank 1 in the global delta", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return save(figure, run / "figures" / "fig2_energy_ratio.png")


def linear_fit(run: pathlib.Path) -> pathlib.Path:
    """Fig. 3: how many vectors fall into each R^2 bin, held out and in sample."""
    rows = delta_files.read_spectrum(run / "deltas")["linear_fit"]
    figure, axis = plt.subplots(figsize=(5.4, 3.4))
    for offset, key, colour, name in (
        (-0.2, "held_out", "#0072B2", "held-out checkpoints"),
        (0.2, "in_sample", "#E69F00", "checkpoints it was fitted on"),
    ):
        shares = [100 * sum(low <= row[key] < high for row in rows) / len(rows) for low, high in itertools.pairwise(R2_BINS)]
        bars = axis.bar([i + offset for i in range(len(R2_BINS) - 1)], shares, 0.4, color=colour, label=name)
        axis.bar_label(bars, [f"{s:.0f}" for s in shares], fontsize=8)
    axis.set_xticks(range(len(R2_BINS) - 1), list(R2_BINS.values())[:-1])
    axis.set(xlabel=r"$R^2$ of a straight line through $\sigma u$ (or $\sigma v$)", ylabel=f"% of {len(rows)} vectors")
    axis.margins(y=0.15)
    axis.legend(fontsize=8)
    return save(figure, run / "figures" / "fig3_linear_fit.png")


def predictor_loss(run: pathlib.Path, reports: list[pathlib.Path]) -> pathlib.Path:
    """Eq. 9's loss by epoch, a panel a recipe and a line a family of vectors, as a share of predicting zeros (the norm of the targets)."""
    figure, axes = plt.subplots(1, len(reports), figsize=(4.6 * len(reports), 3.4), layout="constrained", sharey=True, squeeze=False)
    colours = plt.cm.viridis
    for axis, path in zip(axes[0], reports, strict=True):
        found = read_predictor_report(path)
        for i, (family, losses) in enumerate(found["losses"].items()):
            if not found["loss_of_zeros"][family]:
                continue  # no matrix of this family moved
            epochs = [j * found["loss_stride"] for j in range(len(losses))]
            shares = [loss / found["loss_of_zeros"][family] for loss in losses]
            axis.plot(epochs, shares, color=colours(i / max(1, len(found["losses"]) - 1)), lw=1.4, label=family)
        axis.axhline(1, color="gray", lw=1, ls=":")
        axis.set(title=path.parent.name, xlabel="epoch", yscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("L1 loss / that of predicting zeros")
    axes[0, -1].legend(fontsize=8, title="family")
    return save(figure, run / "figures" / "predictor_loss.png")


def draw_cost(bars: dict[str, list[float]], path: pathlib.Path) -> pathlib.Path:
    """Fig. 5: wall seconds by what they are spent on; bars[label] = [RLVR, SVD, predictor, extrapolation]."""
    parts = ("RLVR", "SVD", "predictor training", "extrapolation")
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.5 * len(bars)), layout="constrained")
    for y, values in enumerate(reversed(bars.values())):
        left = 0.0
        for part, value, colour in zip(parts, values, ("#56B4E9", "#D55E00", "#E69F00", "#009E73"), strict=True):
            axis.barh(y, value, left=left, color=colour, label=part if y == 0 else None)
            left += value
        rest = ", ".join(f"{part} {value:.1f}" for part, value in list(zip(parts, values, strict=True))[1:] if value)
        axis.text(left, y, f" {left:.0f} s" + (f" ({rest})" if rest else ""), va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), list(reversed(bars)))
    axis.set(xlabel="wall seconds", xlim=(0, 2.7 * max(map(sum, bars.values()))))
    figure.legend(fontsize=9, ncol=4, loc="outside upper center", frameon=False)
    return save(figure, path)


def draw_sweeps(sweeps: dict[str, list[tuple[float, float, float]]], before: tuple[float, int] | None, errors: str, path: pathlib.Path):
    """Fig. 6: sweeps[method] = [(alpha, accuracy %, its error)] in order; before = (accuracy %, step) of no jump; `errors` says of what."""
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for i, (name, points) in enumerate(sweeps.items()):
        alphas, levels, bars = zip(*points, strict=True)
        at = [alpha + 0.03 * (i - len(sweeps) / 2) for alpha in alphas]  # side by side, so that none hides another
        look = {"color": COLOURS[name], "marker": MARKS[name], "ls": LINES.get(name, "-"), "ms": 4.5, "capsize": 2, "lw": 1.4}
        axis.errorbar(at, levels, bars, label=NAMES[name], **look)
    if before:
        axis.axhline(before[0], color="black", lw=1, ls=":", label=f"before the jump (step {before[1]})")
    axis.set(xlabel=rf"extending coefficient $\alpha$ ({MAIN_ALPHA:g} in the paper)", ylabel=f"accuracy % after the jump, ± {errors}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, loc="lower left")
    return save(figure, path)


def alpha_sweep(run: pathlib.Path, results: dict) -> pathlib.Path:
    """Fig. 6: accuracy right after the jump by alpha, with the level before it. Error bars are those of the difference from that level."""
    jumped = next(r for r in results.values() if r.policy.startswith("extrapolated/"))
    before, sweeps = results.get(f"train/step_{jumped.steps:04d}"), {}
    for name in COLOURS:
        points = [r for r in results.values() if r.method == name and r.alpha is not None and r.policy.startswith("extrapolated/")]
        errors = [difference(r, before)[1] if before else r.error for r in points]
        if points:
            sweeps[name] = sorted((r.alpha, 100 * r.accuracy, 100 * error) for r, error in zip(points, errors, strict=True))
    level = (100 * before.accuracy, before.steps) if before else None
    return draw_sweeps(sweeps, level, "paired s.e.", run / "figures" / "fig6_alpha.png")


def draw_all(run: pathlib.Path, results: dict, bars: dict[str, list[float]]) -> dict[str, pathlib.Path]:
    """Draws the figures that the run has data for; title -> path."""
    figures = {
        "Reward and response length": training_curves(run),
        "Fig. 2: how much of the update is rank 1": energy(run),
        "Fig. 3: a straight line through the trajectory": linear_fit(run),
    }
    reports = [path for path in sorted((run / "predictor").glob("*/report.json")) if read_predictor_report(path)["losses"]]
    if reports:
        figures["The predictors' training loss (Eq. 9)"] = predictor_loss(run, reports)
    if bars:
        figures["Fig. 5: where the time goes"] = draw_cost(bars, run / "figures" / "fig5_cost.png")
    if any(r.policy.startswith("extrapolated/") for r in results.values()):
        figures["Fig. 6: how far to jump"] = alpha_sweep(run, results)
    return figures
