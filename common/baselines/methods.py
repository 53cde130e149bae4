"""Ways of going on from the last checkpoint without training: rivals of NExt, and controls.

A method is a function of one weight matrix and alpha, and a line in METHODS. It returns the new
matrix: a `LowRank` becomes an adapter, a dense tensor becomes a whole model. alpha 1 is as far as
NExt's target, k checkpoints beyond the last one (`expo` and `first-update` count otherwise).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from common.baselines import given, weighted
from common.baselines.measures import inner
from common.rank1 import LowRank, rank1, top

WSM_CHECKPOINTS = 5  # that `wsm` averages
DARE_DROP = 0.9  # share of entries that `dare` drops (its authors: 0.9 and up)


@dataclasses.dataclass
class Matrix:
    """What a method sees of one weight matrix."""

    name: str
    W: Sequence[LowRank | torch.Tensor]  # W[0] the backbone (zero for LoRA), W[1] ... W[c]
    last: LowRank  # W[c] as rank 1 is added to it; zero on the last of whole models
    deltas: dict  # role -> Triples (common/files/deltas.py), signs aligned: [i] is a LowRank
    steps: list[int]  # of the checkpoints
    k: int
    given: object = None  # what the method's `prepare` found


def repeat_last(m: Matrix, alpha: float) -> LowRank:
    """Control: the last target that is known, rank 1 of W_c - W_(c-k)."""
    return m.last + alpha * m.deltas["target"][-1]


def recent(deltas: dict, k: int) -> LowRank:
    """Rank 1 of k times the mean of one matrix's last two local deltas."""
    local = deltas["local"]
    found = top(k / 2 * (local[-2] + local[-1]))
    return rank1(found.u, found.sigma[0], found.v)


def recent_locals(m: Matrix, alpha: float) -> LowRank:
    """Control: what moved in the last two checkpoints, which is newer than the last target."""
    return m.last + alpha * recent(m.deltas, m.k)


def weighted_sum(m: Matrix, alpha: float) -> LowRank:
    """Ours, without a network: rank 1 of a weighted sum of deltas, see weighted.py."""
    return m.last + alpha * weighted.predict(m.deltas, m.steps, m.k, m.given)


def oracle(m: Matrix, alpha: float) -> LowRank:
    """The ceiling: rank 1 of the true W_(c+k) - W_c, from a run that really went on."""
    true = top(m.given(m.name) - m.W[-1])
    return m.last + alpha * rank1(true.u, true.sigma[0], true.v)


def none(m: Matrix, alpha: float) -> LowRank:
    """Control: no jump. With stage 5 it is a mere restart of the optimizer."""
    return m.last


def rl_extra(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """RL-Extra (Wang et al. 2026, arXiv 2601.04537): W_0 + a (W_c - W_0), a = (c + alpha k) / c."""
    c = len(m.steps)
    return m.W[0] + (c + alpha * m.k) / c * (m.W[-1] - m.W[0])


def expo(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """ExPO (Zheng et al. 2024, arXiv 2404.16792): W_c + alpha (W_c - W_0), alpha 0.3 to 0.5 in
    their work. This alpha multiplies the whole update, not a target."""
    return m.W[0] + (1 + alpha) * (m.W[-1] - m.W[0])


def first_update(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """Control: the first update alone, scaled up. This alpha multiplies the update.

    A public replication of RELEX reports that on MATH it was about as good as RELEX.
    """
    return m.W[0] + alpha * (m.W[1] - m.W[0])


def line_at(y: torch.Tensor, at: float) -> torch.Tensor:
    """The least-squares line through y [c, ...] at t = 1 .. c, at t = `at`: [...], float64."""
    t = torch.arange(1, len(y) + 1, dtype=torch.float64)
    slope = torch.tensordot(t - t.mean(), y.double(), 1) / (t - t.mean()).square().sum()
    return y.double().mean(0) + slope * (at - t.mean())


def replaced(m: Matrix, a: torch.Tensor) -> LowRank | torch.Tensor:
    """W_0 + a v^T, a [m], v that of the last global delta."""
    length = torch.linalg.vector_norm(a)
    unit = a / length if length > 0 else a
    return m.W[0] + rank1(unit, length, m.deltas["global"].v[-1].double())


def sigma_u(m: Matrix) -> torch.Tensor:
    """AlphaRL's a_t = sigma_t u_t of the global deltas: [c, m] in float64."""
    return m.deltas["global"].sigma.double()[:, None] * m.deltas["global"].u.double()


def alpharl(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """After AlphaRL (Cai et al. 2025, arXiv 2510.00553), without measured accuracy: W_0 + a* v^T,
    a* the least-squares line of sigma_t u_t at t = c + alpha k. Only rank 1 is left."""
    return replaced(m, line_at(sigma_u(m), len(m.steps) + alpha * m.k))


def alpharl_pls(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """AlphaRL: a* by partial least squares from measured accuracies to sigma_t u_t.

    Their target accuracy is set by hand; ours is the line through the accuracies at t = c + alpha
    k, within 0 and 1. Their code adds a* v^T to a checkpoint, although a* is the total update.
    """
    target = line_at(m.given, len(m.steps) + alpha * m.k).clamp(0, 1)
    return replaced(m, pls_inverse(sigma_u(m), m.given, target))


def pls_inverse(x: torch.Tensor, y: torch.Tensor, target: float | torch.Tensor) -> torch.Tensor:
    """The x [m] that goes with y = target, by PLS with one component: x [c, m], y [c].

    As scikit-learn's PLSRegression(1), which AlphaRL uses: columns standardised, scores z = X w,
    w = X^T y / |X^T y|, y = slope z + mean(y) by least squares, back by the loadings X^T z / z^T z.
    """
    x, rise, level = x.double(), y.double() - y.double().mean(), y.double().mean()
    mean, std = x.mean(0), x.std(0)
    standard = (x - mean) / torch.where(std > 0, std, 1.0)
    weights = standard.mT @ rise
    if not weights.any():  # nothing varies with y
        return mean
    scores = standard @ (weights / torch.linalg.vector_norm(weights))
    slope = scores @ rise / (scores @ scores)
    loadings = standard.mT @ scores / (scores @ scores)
    return mean + std * loadings * (target - level) / slope


def over_time(W: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """d [c] and y [c] of the rank 1 over time: W_t - W_0 ~ y_t V, V = sum_t d_t (W_t - W_0).

    They follow from the c x c matrix of inner products <W_s - W_0, W_t - W_0>.
    """
    moved = [w - W[0] for w in W[1:]]
    gram = torch.tensor([[inner(a, b) for b in moved] for a in moved], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    length, w = values[-1].clamp_min(0).sqrt(), vectors[:, -1]
    return (w / length if length > 0 else torch.zeros_like(w)), w * length


def relex(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """RELEX (Wei et al. 2026, arXiv 2605.21468): W_0 + y* V, y* the line of y_t at c + alpha k.

    V is one direction over time and has all ranks. Their series is every RL step.
    """
    d, y = over_time(m.W)
    weights = d * line_at(y, len(m.steps) + alpha * m.k)
    return m.W[0] + sum(float(w) * (W - m.W[0]) for w, W in zip(weights, m.W[1:], strict=True))


def wsm(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """WSM (Tian et al. 2025, arXiv 2507.17634) in place of a linear decay of the learning rate: the
    mean of the last checkpoints. It looks back."""
    recent_ones = m.W[1:][-WSM_CHECKPOINTS:]
    return sum(recent_ones) / len(recent_ones)


def greedy_soup(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """Greedy soup (Wortsman et al. 2022, arXiv 2203.05482): the mean of those in `given.soup`."""
    return sum(m.W[i] for i in m.given) / len(m.given)


def dare(m: Matrix, alpha: float) -> torch.Tensor:
    """DARE (Yu et al. 2024, arXiv 2311.03099): of W_c - W_0 entries are dropped, the others scaled
    up. What is left has all ranks. The mask depends on the module's name alone."""
    delta = m.W[-1] - m.W[0]
    delta = delta.dense().float() if isinstance(delta, LowRank) else delta
    seed = int(hashlib.sha256(m.name.encode()).hexdigest()[:15], 16)
    kept = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)) >= DARE_DROP
    return m.W[0] + delta * kept / (1 - DARE_DROP)


class Method(NamedTuple):
    """A function of (Matrix, alpha), what it must be given beside, and whether alpha matters."""

    jump: Callable[[Matrix, float], LowRank | torch.Tensor]
    prepare: Callable | None = None  # a function of common/baselines/given.py
    has_alpha: bool = True


METHODS = {
    "repeat-last": Method(repeat_last),
    "recent-locals": Method(recent_locals),
    "weighted": Method(weighted_sum, given.weights),
    "oracle": Method(oracle, given.future),
    "none": Method(none, has_alpha=False),
    "rl-extra": Method(rl_extra),
    "expo": Method(expo),
    "first-update": Method(first_update),
    "alpharl": Method(alpharl),
    "alpharl-pls": Method(alpharl_pls, given.accuracies),
    "relex": Method(relex),
    "wsm": Method(wsm, has_alpha=False),
    "greedy-soup": Method(greedy_soup, given.soup, has_alpha=False),
    "dare": Method(dare, has_alpha=False),
}
