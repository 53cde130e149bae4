"""What is measured on deltas: their cosine, energy ratios (Fig. 2), straight lines (Fig. 3)."""

import itertools
import math

import torch

from common.rank1 import LowRank


def inner(a: LowRank | torch.Tensor, b: LowRank | torch.Tensor) -> float:
    """<a, b> = sum of a_ij b_ij, in float64; of two products it is tr((L_a^T L_b) (R_b R_a^T))."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        a, b = (x.dense() if isinstance(x, LowRank) else x for x in (a, b))
        return float((a.double() * b).sum())
    total = 0.0
    for x, y in itertools.product(a.terms, b.terms):
        left = x.left.double().mT @ y.left.double()
        right = x.right.double() @ y.right.double().mT
        total += x.weight * y.weight * float((left * right).sum())
    return total


def cosine(a: LowRank | torch.Tensor, b: LowRank | torch.Tensor) -> float:
    """<a, b> / (|a| |b|); nan where one of them is zero."""
    sizes = inner(a, a) * inner(b, b)
    return inner(a, b) / sizes**0.5 if sizes > 0 else math.nan


def energy_ratio(sigma: torch.Tensor) -> torch.Tensor:
    """E_1 = sigma_1 / sum_q sigma_q (Sec. 3.2), [..., q] -> [...]; nan for a zero matrix. Of
    whole models the sum has rank1.KEEP terms, as a LoRA of that rank has. With all of them E_1
    would be smaller."""
    return sigma[..., 0] / sigma.sum(-1)


def line_at(y: torch.Tensor, at: float | torch.Tensor) -> torch.Tensor:
    """The least-squares line through y [c, ...] at t = 1 .. c, at t = `at`: [...], float64."""
    t = torch.arange(1, len(y) + 1, dtype=torch.float64)
    slope = torch.tensordot(t - t.mean(), y.double(), 1) / (t - t.mean()).square().sum()
    return y.double().mean(0) + slope * (at - t.mean())


def linear_fit_r2(y: torch.Tensor, fit: int) -> tuple[float, float]:
    """R^2 = 1 - SSE / SST of the least-squares line y_t = a + b t (Sec. 3.3), y [c, d], t = 1 .. c.

    The line is fitted on the first `fit` checkpoints, and squares are summed over the d entries.
    Returns R^2 on the other checkpoints, and on those.
    Below 0 the line predicts these points worse than their own mean would.
    """
    y, t = y.double(), torch.arange(1, len(y) + 1)[:, None]
    squares = (y - line_at(y[:fit], t)).square()

    def r2(part: slice) -> float:
        return float(1 - squares[part].sum() / (y[part] - y[part].mean(0)).square().sum())

    return r2(slice(fit, None)), r2(slice(fit))


def measure(trajectory, spectra: dict[str, torch.Tensor], fit: int) -> dict:
    """Fig. 2 and 3: means over matrices by step, and the R^2 of every vector. spectra: module ->
    singular values of its global deltas [c, q]."""
    rows = []
    for module, roles in trajectory.aligned().deltas.items():
        for side in ("u", "v"):
            vectors = roles["global"].sigma[:, None] * getattr(roles["global"], side)  # [c, d]
            r2 = linear_fit_r2(vectors, fit)
            rows.append({"module": module, "side": side, "held_out": r2[0], "in_sample": r2[1]})
    energy = torch.stack([energy_ratio(sigma) for sigma in spectra.values()])  # [modules, c]
    return {
        "steps": trajectory.steps,
        "energy_ratio": energy.nanmean(0).tolist(),
        "energy_ratio_by_module": {m: row.tolist() for m, row in zip(spectra, energy, strict=True)},
        "linear_fit": rows,
    }
