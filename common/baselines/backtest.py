"""Stage 3's backtest: what a prediction is worth, measured without RL.

Standing at an earlier checkpoint, with all later ones hidden, how near would the prediction have
come to the true delta? Beside it stand controls without a network, and the true delta's own rank 1.
"""

import statistics
from collections.abc import Callable

import torch

from common.baselines import methods
from common.baselines.measures import cosine, inner, line_at
from common.rank1 import LowRank, rank1


def controls(trajectory) -> dict[str, dict[str, LowRank]]:
    """What the next target would be without a network: name -> module -> matrix. Signs aligned.

    copy-global: the last global delta, at its mean growth over k checkpoints. linear-fit: k times
    the slope of the line through sigma u of the global deltas. The others are stage 4's.
    """
    trajectory, k = trajectory.aligned(), trajectory.k
    c, fitted = len(trajectory.steps), methods.weighted_fit(trajectory)
    names = ("copy-global", "repeat-last", "recent-locals", "linear-fit", "weighted")
    found = {name: {} for name in names}
    for module, roles in trajectory.deltas.items():
        whole = roles["global"]
        moved = whole.sigma[:, None] * whole.u  # [c, m]
        slope = (line_at(moved, c + k) - line_at(moved, c)).float()  # [m]
        unit = torch.nn.functional.normalize(slope, dim=0)
        found["copy-global"][module] = k / c * whole[-1]
        found["repeat-last"][module] = roles["target"][-1]
        found["recent-locals"][module] = methods.recent(roles, k)
        found["linear-fit"][module] = rank1(unit, slope.norm(), whole.v[-1])
        found["weighted"][module] = methods.weighted(roles, k, fitted)
    return found


def score(predicted: dict[str, LowRank], true: dict) -> dict[str, float]:
    """The cosine with the whole true delta, mean over the matrices that moved. true: by module."""
    found = [cosine(predicted[m], delta) for m, delta in true.items() if inner(delta, delta) > 0]
    # Where a matrix had not moved before, the prediction is 0 and has no cosine: it counts as 0.
    return {"cosine": statistics.fmean([x if x == x else 0.0 for x in found] or [0.0])}


def backtest(trajectory, series, predict: Callable) -> dict:
    """Stands at checkpoint c - k and scores what is predicted k checkpoints ahead. predict:
    trajectory as known then -> (module -> {"u", "sigma", "v"}, ...). series: the true weights."""
    now, k = len(trajectory.steps) - trajectory.k, trajectory.k
    past = trajectory.until(now)
    made = {m: rank1(t["u"], t["sigma"], t["v"]) for m, t in predict(past)[0].items()}
    true = {m: series.weights(m)[now + k] - series.weights(m)[now] for m in trajectory.deltas}
    oracle = {m: roles["target"][now - 1] for m, roles in trajectory.deltas.items()}
    rows = {"predictor": made, **controls(past), "oracle": oracle}
    return {
        "at_step": trajectory.steps[now - 1],
        "predicts_step": trajectory.steps[now - 1 + k],
        **{name: score(matrices, true) for name, matrices in rows.items()},
    }


def describe(name: str, tested: dict) -> str:
    """The backtest in two lines, what the demo's runs say of such a cosine, and whether repeat-last
    is as good."""
    cosines = {row: found["cosine"] for row, found in tested.items() if isinstance(found, dict)}
    lines = [f"{name}: backtest, step {tested['at_step']} -> {tested['predicts_step']}, cosines"]
    lines.append("   " + "  ".join(f"{row} {cosine:.3f}" for row, cosine in cosines.items()))
    # On the demo at seven learning rates (.github/results, "a meter") no jump of this recipe lost
    # much above the cosine 0.4, and all lost below 0.15. Of other tasks nothing is known.
    found = cosines["predictor"]
    says = "undecided; measure `none` and `next` with stage 6 before you train on"
    if found < 0.15:
        says = "do not jump"
    elif found >= 0.4:
        says = "this trajectory is predictable. Expect a jump to help, and a larger learning rate "
        says += "to help more"
    if name == "aligned":
        lines.append(f"   by the runs of our demo, cosine {found:.2f}: {says}")
    if found <= cosines["repeat-last"]:
        lines.append("   this predictor does not beat repeating the last target")
    return "\n".join(lines)
