"""Ways of going on from the last checkpoint without training: NExt, what it is compared with, and the controls.

Every method is a function (last, trajectory, alpha, **what it needs) -> Adapter. `alpha` is the paper's extending coefficient: how many
targets (k checkpoints each) to move ahead. All methods move W_c by the same nominal distance at the same alpha.

An extrapolated policy is an adapter again. W_c + alpha sigma u v^T with W_c = W_0 + s B A is exactly one LoRA of rank r + 1:
B' = [B, c u], A' = [A; c v^T], c = sqrt(alpha sigma / s), s' = s, each module with its own r and s. A sweep over alpha costs
kilobytes, rounds nothing, and PEFT, vLLM and the stages here load it unchanged.
"""

import torch

from common.adapters import Adapter, extended
from common.rank1 import Trajectory, Triples, delta_factors, rank1_of_sum, svd_of_product


def add_rank1(last: Adapter, triples: dict[str, tuple], alpha: float) -> Adapter:
    """W_c + alpha sigma u v^T (Eq. 10) as an adapter of rank r + 1. triples[module] = (u [m], sigma, v [n]).

    A negative alpha * sigma puts the sign on u. Modules without a triple get a zero column, so that the rank grows everywhere.
    """
    factors = {}
    for module, (b, a) in last.factors.items():
        u, sigma, v = triples.get(module, (torch.zeros(b.shape[0]), torch.zeros(()), torch.zeros(a.shape[1])))
        amount = alpha * float(sigma) / last.scale(module)
        c = abs(amount) ** 0.5
        column = torch.sign(torch.tensor(amount)) * c * u.to(b.dtype)
        factors[module] = (torch.cat([b, column[:, None]], 1), torch.cat([a, c * v.to(a.dtype)[None]], 0))
    return extended(last, factors)


def next_(last: Adapter, trajectory: Trajectory, alpha: float, predicted: dict[str, tuple]) -> Adapter:
    """NExt (Eq. 10, Alg. 1): W_c + alpha * the predicted target's rank 1."""
    return add_rank1(last, predicted, alpha)


def repeat_last(last: Adapter, trajectory: Trajectory, alpha: float) -> Adapter:
    """Control: the predictor is replaced by the last target that is known, rank 1 of W_c - W_(c-k). Nothing is learned."""
    return add_rank1(last, {m: (r["target"].u[-1], r["target"].sigma[-1], r["target"].v[-1]) for m, r in trajectory.deltas.items()}, alpha)


def recent_locals(last: Adapter, trajectory: Trajectory, alpha: float) -> Adapter:
    """Control: like repeat-last, but only what moved in the last two checkpoints: rank 1 of k times the mean of the last two locals.

    Nothing is learned. It asks whether a predictor gains by learning, or by looking at newer deltas than the last target's.
    """
    return add_rank1(last, {m: recent_triple(r, trajectory.k) for m, r in trajectory.deltas.items()}, alpha)


def recent_triple(roles: dict[str, Triples], k: int) -> tuple:
    """(u [m], sigma, v [n]) of k times the mean of one matrix's last two local deltas."""
    newest = roles["local"]
    return rank1_of_sum(newest.u[-2:], newest.sigma[-2:], newest.v[-2:], torch.full((2,), k / 2))


def oracle(last: Adapter, trajectory: Trajectory, alpha: float, future: Adapter) -> Adapter:
    """Not a method but the ceiling for all of them: rank 1 of the true W_(c+k) - W_c, from a run that was really continued."""
    triples = {}
    for module, now in last.factors.items():
        u, sigma, v = svd_of_product(*(x.double() for x in delta_factors(future.factors[module], now, last.scale(module))))
        triples[module] = (u, sigma[0], v)
    return add_rank1(last, triples, alpha)


def rl_extra(last: Adapter, trajectory: Trajectory, alpha: float) -> Adapter:
    """RL-Extra's weight extrapolation (Wang et al. 2026, arXiv 2601.04537): W_0 + a (W_c - W_0), the whole update, linearly.

    a = (c + alpha k) / c: the straight line from the backbone through checkpoint c, as many steps ahead as NExt moves at this alpha.
    (NExt's text calls this method Cai et al. 2025; the two citations are swapped there.)
    """
    c = len(trajectory.steps)
    factor = (c + alpha * trajectory.k) / c
    return Adapter(last.config, {module: (b * factor, a) for module, (b, a) in last.factors.items()}, last.others)


def none(last: Adapter, trajectory: Trajectory, alpha: float) -> Adapter:
    """Control: no jump. What stage 5 does with it is a mere restart of the optimizer."""
    return last


METHODS = {"next": next_, "repeat-last": repeat_last, "recent-locals": recent_locals, "rl-extra": rl_extra, "oracle": oracle, "none": none}
