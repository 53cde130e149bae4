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

from common.baselines import given
from common.baselines.measures import inner, line_at
from common.rank1 import LowRank, rank1, top

AVERAGED = 5  # that `wsm` averages
DARE_DROP = 0.9  # share of entries that `dare` drops (its authors: 0.9 and up)
# Of `weighted`, chosen on demo runs of seeds 10 to 14 by the cosine of stage 3's backtest.
WINDOW = 3  # local deltas in the mean that is the second term
DECAY = 0.5  # each older regression pair counts this much less
RIDGE = 0.01  # pull of the weights towards PRIOR; the squared length of the first term is 1
PRIOR = (0.5, 0.5, 0.0)


@dataclasses.dataclass
class Matrix:
    """What a method sees of one weight matrix."""

    name: str
    W: Sequence[LowRank | torch.Tensor]  # W[0] the backbone (zero for LoRA), W[1] ... W[c]
    last: LowRank  # what a rank-1 jump is added to: the adapter W[c]; of whole models zero
    deltas: dict  # role -> Triples (common/files/deltas.py), signs aligned: [i] is a LowRank
    k: int
    given: object = None  # what the method's `prepare` found


def reduced(matrix: LowRank | torch.Tensor) -> LowRank:
    """The rank-1 part of a matrix."""
    found = top(matrix)
    return rank1(found.u, found.sigma[0], found.v)


def recent(deltas: dict, k: int) -> LowRank:
    """Rank 1 of k times the mean of one matrix's last two local deltas."""
    return reduced(k / 2 * (deltas["local"][-2] + deltas["local"][-1]))


def rl_extra(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """RL-Extra (Wang et al. 2026, arXiv 2601.04537): W_0 + a (W_c - W_0), a = (c + alpha k) / c.

    The paper's text swaps this citation and AlphaRL's.
    """
    c = len(m.W) - 1
    return m.W[0] + (c + alpha * m.k) / c * (m.W[-1] - m.W[0])


def alpharl(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """AlphaRL (Cai et al. 2025, arXiv 2510.00553): W_0 + a* v^T, v that of the last global delta.

    a* is a_t = sigma_t u_t extrapolated to t = c + alpha k by a line, or, where accuracies are
    measured, by partial least squares at the accuracy that a line has there. They set it by hand.
    Their code adds a* v^T to a checkpoint, although a* is the total update, and takes the signs of
    u alone; here u and v decide together.
    """
    whole, at = m.deltas["global"], len(m.W) - 1 + alpha * m.k
    a = whole.sigma.double()[:, None] * whole.u.double()  # [c, m]
    if m.given is None:
        a = line_at(a, at)
    else:
        a = pls_inverse(a, m.given, line_at(m.given, at).clamp(0, 1))
    unit = torch.nn.functional.normalize(a, dim=0)
    return m.W[0] + rank1(unit, a.norm(), whole.v[-1].double())


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
    scores = standard @ weights  # |w| and z^T z cancel in loadings / slope
    return mean + std * (standard.mT @ scores) * (target - level) / (scores @ rise)


def relex(m: Matrix, alpha: float) -> LowRank | torch.Tensor:
    """RELEX (Wei et al. 2026, arXiv 2605.21468): W_0 + y* V, y* the line of y_t at c + alpha k.

    W_t - W_0 ~ y_t V; V = sum_t d_t (W_t - W_0) is one fixed matrix, not of low rank. Both
    follow from the inner products <W_s - W_0, W_t - W_0>. Their series is every RL step.
    """
    moved = [w - m.W[0] for w in m.W[1:]]
    gram = torch.tensor([[inner(a, b) for b in moved] for a in moved], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    length, w = values[-1].clamp_min(0).sqrt(), vectors[:, -1]
    y = line_at(w * length, len(moved) + alpha * m.k)
    d = w / length if length > 0 else torch.zeros_like(w)
    return m.W[0] + sum(float(x) * delta for x, delta in zip(d * y, moved, strict=True))


def mean(W: Sequence) -> LowRank | torch.Tensor:
    """The mean of checkpoints of one matrix."""
    return sum(W) / len(W)


def dare(m: Matrix, alpha: float) -> torch.Tensor:
    """DARE (Yu et al. 2024, arXiv 2311.03099): of W_c - W_0 entries are dropped, the others scaled
    up. What is left has all ranks. The mask depends on the module's name alone."""
    delta = torch.zeros(m.W[0].shape) + (m.W[-1] - m.W[0])  # dense, in fp32
    seed = int(hashlib.sha256(m.name.encode()).hexdigest()[:15], 16)
    kept = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)) >= DARE_DROP
    return m.W[0] + delta * kept / (1 - DARE_DROP)


def weighted_terms(roles: dict, i: int) -> list[LowRank]:
    """Three deltas of one matrix at checkpoint i, from 0, of its locals L and its globals G:

        L_i,    the mean of the last WINDOW locals (of all there are before that),    G_i / (i + 1)

    All three are what one checkpoint moved, with a shorter and a longer memory.
    """
    last = [roles["local"][j] for j in range(max(0, i + 1 - WINDOW), i + 1)]
    return [last[-1], mean(last), roles["global"][i] / (i + 1)]


def weighted_fit(trajectory) -> torch.Tensor:
    """The weights w [3] that would have predicted the next local delta best, by ridge regression:

        mean of |sum_j w_j T_ij - L_(i+1)|^2 / |L_i|^2   +   RIDGE |w - PRIOR|^2

    T_ij are the terms at checkpoint i. The mean is over matrices and i = 2 .. c - 1, which count
    DECAY^(c - 1 - i). Locals and not targets, because the last local ends at c.
    """
    c = len(trajectory.steps)
    shares = {i: DECAY ** (c - 2 - i) for i in range(1, c - 1)}
    sums = torch.zeros(3, 4, dtype=torch.float64)  # <T_j, T_j'>, and <T_j, next>
    for roles in trajectory.deltas.values():
        for i, share in shares.items():
            if (size := float(roles["local"].sigma[i])) > 0:
                terms, target = weighted_terms(roles, i), roles["local"][i + 1]
                products = [[inner(a, b) for b in (*terms, target)] for a in terms]
                sums += share / size**2 * torch.tensor(products, dtype=torch.float64)
    # With two checkpoints there is no pair, and the prior is all.
    sums /= len(trajectory.deltas) * sum(shares.values()) or 1.0
    prior = torch.tensor(PRIOR, dtype=torch.float64)
    return torch.linalg.solve(sums[:, :3] + RIDGE * torch.eye(3), sums[:, 3] + RIDGE * prior)


def weighted(roles: dict, k: int, weights: torch.Tensor) -> LowRank:
    """Ours, without a network: rank 1 of k times a weighted sum of one matrix's deltas. No signs
    have to be aligned, because it sees products sigma u v^T alone."""
    terms = weighted_terms(roles, len(roles["global"]) - 1)
    return reduced(sum(k * float(w) * term for w, term in zip(weights, terms, strict=True)))


class Method(NamedTuple):
    """A function of (Matrix, alpha), what it must be given beside, and whether alpha matters."""

    jump: Callable[[Matrix, float], LowRank | torch.Tensor]
    prepare: Callable | None = None  # Known -> (what makes Matrix.given, the files it reads)
    has_alpha: bool = True


METHODS = {
    # The last known target; the last two local deltas, which are newer.
    "repeat-last": Method(lambda m, alpha: m.last + alpha * m.deltas["target"][-1]),
    "recent-locals": Method(lambda m, alpha: m.last + alpha * recent(m.deltas, m.k)),
    "weighted": Method(
        lambda m, alpha: m.last + alpha * weighted(m.deltas, m.k, m.given),
        lambda known: (lambda: weighted_fit(known.trajectory).float().double(), []),
    ),
    # The ceiling: rank 1 of the true W_(c+k) - W_c, from a run that really went on.
    "oracle": Method(
        lambda m, alpha: m.last + alpha * reduced(m.given(m.name) - m.W[-1]), given.future
    ),
    # No jump. With stage 5 it is a mere restart of the optimizer.
    "none": Method(lambda m, alpha: m.last, has_alpha=False),
    "rl-extra": Method(rl_extra),
    # ExPO (Zheng et al. 2024, arXiv 2404.16792): W_c + alpha (W_c - W_0), there alpha 0.3 to 0.5.
    "expo": Method(lambda m, alpha: m.W[0] + (1 + alpha) * (m.W[-1] - m.W[0])),
    # A public replication of RELEX reports that on MATH this is about as good as RELEX.
    "first-update": Method(lambda m, alpha: m.W[0] + alpha * (m.W[1] - m.W[0])),
    "alpharl": Method(alpharl),
    "alpharl-pls": Method(alpharl, given.accuracies),
    "relex": Method(relex),
    # WSM (Tian et al. 2025, arXiv 2507.17634), which replaces a falling learning rate.
    "wsm": Method(lambda m, alpha: mean(m.W[max(1, len(m.W) - AVERAGED) :]), has_alpha=False),
    # Greedy soup (Wortsman et al. 2022, arXiv 2203.05482).
    "greedy-soup": Method(lambda m, alpha: mean([m.W[i] for i in m.given]), given.soup, False),
    "dare": Method(dare, has_alpha=False),
}
