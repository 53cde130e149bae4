"""Figures 5 and 7: what training costs, of one model or of several beside one another."""

import statistics

import matplotlib.pyplot as plt

from common.reproduce.figures import legend_below
from common.reproduce.results import made_on, table_of
from common.reproduce.runs import Runs
from common.reproduce.tables import RECIPES

PARTS = {"RL": "#56B4E9", "SVD": "#D55E00", "predictor": "#E69F00", "extrapolation": "#009E73"}
HOURS, A800 = table_of("paper.yaml")["hours"], 4  # GPUs
SECONDS = "wall seconds"
SIDES = {"without a jump": (-0.2, "#999999"), "NExt": (0.2, "#0072B2")}


def machines(models: list[Runs]) -> tuple[list[str], str, list[float]]:
    """Names of the backbones, the unit of costs, and what one wall second of each is in it."""
    names, gpus = zip(*(made_on(one.folder(one.seeds[0])) for one in models), strict=True)
    if all(gpus):
        return names, "GPU hours: wall hours × GPUs", [count / 3600 for count in gpus]
    return names, SECONDS, [1.0] * len(models)


def cost(runs: Runs):
    """Fig. 5: GPU hours (without a GPU: wall seconds) by what they are spent on, means of seeds."""
    bars, models = [], [runs, *runs.beside][::-1]
    names, unit, factors = machines(models)
    for one, name, factor in zip(models, names, factors, strict=True):
        model = f"{name}: " if runs.beside else ""
        for m in [*map(one.later, reversed(RECIPES)), one.at(one.reference or one.total)]:
            if found := [r.spent for r in m.by_seed.values() if r.seconds]:
                means = {p: factor * statistics.fmean(r.get(p, 0.0) for r in found) for p in PARTS}
                label = f"{model}{m.label}, {m.steps} steps"
                steps, hours = HOURS.get(name, {}).get(m.method.split("-")[0], (0, 0))
                if steps == m.steps and unit != SECONDS:
                    label += f" (the paper: {A800 * hours:g})"
                bars.append((label, means))
    if not bars:
        return None
    figure, axis = plt.subplots(figsize=(9, 1.3 + 0.4 * len(bars)))
    for y, (_, parts) in enumerate(bars):
        left = 0.0
        for part, colour in PARTS.items():
            axis.barh(y, parts[part], left=left, color=colour, label=part if y == 0 else None)
            left += parts[part]
        axis.text(left, y, f" {left:.3g}", va="center", fontsize=9)
        rest = [f"{part} {value:.2g}" for part, value in parts.items() if value and part != "RL"]
        axis.text(0, y, "  " + ", ".join(rest), va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=9)
    longest = max(sum(parts.values()) for _, parts in bars)
    axis.set(xlabel=unit, xlim=(0, 1.1 * longest))
    figure.legend(ncol=4, loc="outside upper center", frameon=False)
    return figure


def gpqa(runs: Runs):
    """Fig. 7: accuracy on GPQA and the cost of training, by model, without a jump and with it."""
    models = [runs, *runs.beside]
    plain = [one.at(one.reference or one.total) for one in models]
    jumped = [one.later("next-paper", made="_merged") or one.later("next-paper") for one in models]
    if not all(m and m.of_suite("gpqa") for m in (*plain, *jumped)):
        return None
    names, unit, factors = machines(models)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for policies, (side, (offset, colour)) in zip((plain, jumped), SIDES.items(), strict=True):
        at = [x + offset for x in range(len(models))]
        levels = [m.on(m.of_suite("gpqa")).accuracy for m in policies]
        look = {"width": 0.4, "color": colour, "label": side}
        left.bar(at, [100 * y.mean for y in levels], yerr=[100 * y.error for y in levels], **look)
        costs = [[r.seconds for r in m.by_seed.values() if r.seconds] for m in policies]
        costs = [f * statistics.fmean(c or [0]) for f, c in zip(factors, costs, strict=True)]
        right.bar(at, costs, **look)
    left.set_ylabel("GPQA: accuracy %, ± s.e.")
    right.set_ylabel(unit)
    for axis in (left, right):
        axis.set_xticks(range(len(models)), [x.replace("-", "\n") for x in names], fontsize=9)
    legend_below(figure, left, 2)
    return figure
