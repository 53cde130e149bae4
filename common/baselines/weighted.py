"""`weighted`: rank 1 of a weighted sum of known deltas, three weights for the whole model.

It has no network, and no signs to align, because it sees products sigma u v^T alone. Its constants
were chosen on demo runs of seeds 10 to 14, by the cosine of stage 3's backtest.
"""

import torch

from common.rank1 import LowRank, rank1, top

WINDOW = 3  # local deltas in the mean that is the second term
DECAY = 0.5  # a regression pair counts this much less than the one a checkpoint later
RIDGE = 0.01  # pull of the weights towards PRIOR; the squared length of the first term is 1
PRIOR = (0.5, 0.5, 0.0)


def terms(steps: list[int]) -> torch.Tensor:
    """[c, 3, 2 c]: at checkpoint i, three deltas as sums over the locals L, then the globals G:

        L_i,    the mean of the last WINDOW locals (of all there are before that),    G_i / i

    All three are what one checkpoint moved, with a shorter and a longer memory. i counts from the
    backbone; `steps`, evenly spaced, may begin later.
    """
    count = len(steps)
    mix = torch.zeros(count, 3, 2 * count, dtype=torch.float64)
    for i, step in enumerate(steps):
        first = max(0, i + 1 - WINDOW)
        mix[i, 0, i] = 1
        mix[i, 1, first : i + 1] = 1 / (i + 1 - first)
        mix[i, 2, count + i] = (steps[1] - steps[0]) / step
    return mix


def known(roles: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One matrix's locals, then globals, in float64: u [2 c, m], sigma [2 c], v [2 c, n]."""
    pairs = (roles["local"], roles["global"])
    return tuple(torch.cat([getattr(t, x) for t in pairs]).double() for x in ("u", "sigma", "v"))


def fit(trajectory) -> torch.Tensor:
    """The weights w [3] that would have predicted the next local delta best, by ridge regression:

        mean of |sum_j w_j T_ij - L_(i+1)|^2 / |L_i|^2   +   RIDGE |w - PRIOR|^2

    T_ij are the terms at checkpoint i. The mean is over matrices and i = 2 .. c - 1, which count
    DECAY^(c - 1 - i). Locals and not targets, because the last local ends at c.
    """
    count, mix = len(trajectory.steps), terms(trajectory.steps)
    pairs = range(1, count - 1)
    left, right = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for roles in trajectory.deltas.values():
        u, sigma, v = known(roles)
        # <s u v^T, s' u' v'^T> = s s' (u . u') (v . v'): no matrix is formed.
        products = torch.outer(sigma, sigma) * (u @ u.T) * (v @ v.T)  # [2 c, 2 c]
        for i in pairs:
            if sigma[i] > 0:
                share = DECAY ** (count - 2 - i) / sigma[i] ** 2
                left += share * mix[i] @ products @ mix[i].T
                right += share * mix[i] @ products[:, i + 1]
    # With two checkpoints there is no pair, and the prior is all.
    total = len(trajectory.deltas) * sum(DECAY ** (count - 2 - i) for i in pairs) or 1.0
    prior = torch.tensor(PRIOR, dtype=torch.float64)
    return torch.linalg.solve(left / total + RIDGE * torch.eye(3), right / total + RIDGE * prior)


def predict(roles: dict, steps: list[int], k: int, weights: torch.Tensor) -> LowRank:
    """Rank 1 of k times the weighted sum at the last checkpoint, for one matrix."""
    amounts = k * weights @ terms(steps)[-1]  # [2 c]
    u, sigma, v = known(roles)
    used = amounts.nonzero()[:, 0].tolist()
    found = top(sum(float(amounts[j]) * rank1(u[j], sigma[j], v[j]) for j in used))
    return rank1(found.u.float(), found.sigma[0].float(), found.v.float())
