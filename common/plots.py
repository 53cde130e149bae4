"""The figures, each from the files of a run directory. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import itertools
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common import run_dir

COLOURS = {
    "grpo": "#000000",
    "next-aligned": "#0072B2",
    "next-paper": "#D55E00",
    "repeat-last": "#009E73",
    "rl-extra": "#CC79A7",
    "oracle": "#E69F00",
    "none": "#56B4E9",
}
SHORT = {
    "grpo": "GRPO with LoRA",
    "next-aligned": "NExt (aligned)",
    "next-paper": "NExt (published recipe)",
    "repeat-last": "repeat-last",
    "rl-extra": "RL-Extra",
    "oracle": "oracle",
    "none": "restart only",
}
LINES = {"repeat-last": "--", "oracle": "--", "none": ":"}  # the controls
MARKS = {"next-aligned": "o", "next-paper": "s", "repeat-last": "^", "rl-extra": "D", "oracle": "v", "none": "x"}


def _save(figure, path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, bbox_inches="tight")
    plt.close(figure)
    temporary.replace(path)
    return path


def _smooth(values: list[float], window: int = 10) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def training_curves(run: pathlib.Path) -> pathlib.Path:
    """Reward and response length by RL step, the uninterrupted run and every continuation after the jump."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    runs = {"grpo": run / "train"}
    for path in sorted((run / "continued").glob("*/metrics.jsonl")):
        if not path.parent.name.endswith("_merged"):
            runs[path.parent.name.split("_alpha")[0]] = path.parent
    jump = min(
        (run_dir.read_jsonl(folder / "metrics.jsonl")[0]["step"] - 1 for name, folder in runs.items() if name != "grpo"), default=None
    )
    for axis, key, title in ((axes[0], "accuracy", "mean reward"), (axes[1], "response_length", "response length (tokens)")):
        for name, folder in runs.items():
            rows = run_dir.read_jsonl(folder / "metrics.jsonl")
            axis.plot(
                [r["step"] for r in rows],
                _smooth([r[key] for r in rows]),
                LINES.get(name, "-"),
                color=COLOURS.get(name, "gray"),
                lw=1.6,
                label=SHORT.get(name, name),
            )
        if jump is not None:
            axis.axvline(jump, color="gray", lw=1, ls=":")
            axis.annotate(
                "jump",
                (jump, 0.97),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 0),
                textcoords="offset points",
                color="gray",
                ha="right",
                va="top",
            )
        axis.set_xlabel("RL step")
        axis.set_ylabel(title + ", mean of 10 steps")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
    return _save(figure, run / "figures" / "training.png")


def energy(run: pathlib.Path) -> pathlib.Path:
    """Fig. 2: the energy ratio of the global delta by step, mean over matrices with the range of the middle 80%."""
    found = run_dir.read_json(run / "deltas" / "spectrum.json", "02_extract_deltas.py")
    figure, axis = plt.subplots(figsize=(5.4, 3.4))
    by_step = [sorted(values) for values in zip(*found["energy_ratio_by_module"].values(), strict=True)]
    low, high = ([values[int(q * (len(values) - 1))] for values in by_step] for q in (0.1, 0.9))
    axis.fill_between(found["steps"], low, high, color="#0072B2", alpha=0.15, label="middle 80% of the matrices")
    axis.plot(found["steps"], found["energy_ratio"], "o-", color="#0072B2", label=r"$E_1=\sigma_1/\sum_q\sigma_q$ (paper)")
    axis.plot(found["steps"], found["energy_ratio_squared"], "s--", color="#D55E00", label=r"$\sigma_1^2/\sum_q\sigma_q^2$")
    axis.set(xlabel="RL step", ylabel="share of rank 1 in the global delta", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _save(figure, run / "figures" / "fig2_energy_ratio.png")


def linear_fit(run: pathlib.Path) -> pathlib.Path:
    """Fig. 3: how many vectors fall into each R^2 bin, held out and in sample."""
    rows = run_dir.read_json(run / "deltas" / "spectrum.json", "02_extract_deltas.py")["linear_fit"]
    edges = [float("-inf"), -0.5, 0.0, 0.5, 0.9, float("inf")]
    labels = ["< −0.5", "−0.5 to 0", "0 to 0.5", "0.5 to 0.9", "> 0.9"]
    figure, axis = plt.subplots(figsize=(5.4, 3.4))
    for offset, key, colour, name in (
        (-0.2, "held_out", "#0072B2", "held-out checkpoints"),
        (0.2, "in_sample", "#E69F00", "checkpoints it was fitted on"),
    ):
        shares = [100 * sum(low <= row[key] < high for row in rows) / len(rows) for low, high in itertools.pairwise(edges)]
        bars = axis.bar([i + offset for i in range(len(labels))], shares, 0.4, color=colour, label=name)
        axis.bar_label(bars, [f"{s:.0f}" for s in shares], fontsize=8)
    axis.set_xticks(range(len(labels)), labels)
    axis.set(xlabel=r"$R^2$ of a straight line through $\sigma u$ (or $\sigma v$)", ylabel=f"% of {len(rows)} vectors")
    axis.margins(y=0.15)
    axis.legend(fontsize=8)
    return _save(figure, run / "figures" / "fig3_linear_fit.png")


def cost(run: pathlib.Path, bars: dict[str, list[float]]) -> pathlib.Path:
    """Fig. 5: wall seconds by what they are spent on; bars[label] = [RLVR, SVD, predictor, extrapolation]."""
    parts = ("RLVR", "SVD", "predictor", "extrapolation")
    figure, axis = plt.subplots(figsize=(7.2, 1.1 + 0.5 * len(bars)), layout="constrained")
    for y, values in enumerate(reversed(bars.values())):
        left = 0.0
        for part, value, colour in zip(parts, values, ("#56B4E9", "#D55E00", "#E69F00", "#009E73"), strict=True):
            axis.barh(y, value, left=left, color=colour, label=part if y == 0 else None)
            left += value
        extra = sum(values[1:])
        axis.text(left, y, f" {left:.0f} s" + (f", {extra:.1f} s of it not RL" if extra else ""), va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), list(reversed(bars)))
    axis.set(xlabel="wall seconds", xlim=(0, 1.35 * max(map(sum, bars.values()))))
    figure.legend(fontsize=8, ncol=4, loc="outside upper center", frameon=False)
    return _save(figure, run / "figures" / "fig5_cost.png")


def alpha_sweep(run: pathlib.Path, results: dict) -> pathlib.Path:
    """Fig. 6: accuracy right after the jump by alpha, with the level before the jump."""
    figure, axis = plt.subplots(figsize=(7.2, 3.8))
    for name, colour in COLOURS.items():
        sweep = sorted(
            (r for r in results.values() if r.method == name and r.alpha is not None and r.policy.startswith("extrapolated/")),
            key=lambda r: r.alpha,
        )
        if sweep:
            axis.errorbar(
                [r.alpha for r in sweep],
                [100 * r.accuracy for r in sweep],
                [100 * r.error for r in sweep],
                color=colour,
                marker=MARKS[name],
                ms=4.5,
                ls=LINES.get(name, "-"),
                capsize=2,
                lw=1.4,
                label=SHORT[name],
            )
    jumped = next(r for r in results.values() if r.policy.startswith("extrapolated/"))
    before = results.get(f"train/step_{jumped.steps:04d}")
    if before:
        axis.axhline(100 * before.accuracy, color="black", lw=1, ls=":", label=f"before the jump (step {before.steps})")
    axis.axvline(1.5, color="gray", lw=0.6)
    axis.set(xlabel=r"extending coefficient $\alpha$ (1.5 in the paper)", ylabel="accuracy % after the jump, ± s.e.")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")
    return _save(figure, run / "figures" / "fig6_alpha.png")


def draw_all(run: pathlib.Path, results: dict, bars: dict[str, list[float]]) -> dict[str, pathlib.Path]:
    """Draws the figures that the run has data for; title -> path."""
    figures = {
        "Reward and response length": training_curves(run),
        "Fig. 2: how much of the update is rank 1": energy(run),
        "Fig. 3: a straight line through the trajectory": linear_fit(run),
    }
    if bars:
        figures["Fig. 5: where the time goes"] = cost(run, bars)
    if any(r.policy.startswith("extrapolated/") for r in results.values()):
        figures["Fig. 6: how far to jump"] = alpha_sweep(run, results)
    return figures
