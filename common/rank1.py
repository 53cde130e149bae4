"""Rank-1 trajectories: the deltas of Eq. 6, their leading singular triples (Eq. 3, 7), and what Sec. 3 measures on them.

A LoRA checkpoint never needs its m x n matrix. With the module's scale s = lora_alpha / r, every delta is a product of two thin factors:

    global   W_i - W_0      =  s  B_i                A_i               rank r
    local    W_i - W_(i-1)  =  s [B_i, -B_(i-1)]    [A_i; A_(i-1)]     rank 2r
    target   W_(i+k) - W_i  =  s [B_(i+k), -B_i]    [A_(i+k); A_i]     rank 2r

and the SVD of a product L R of thin factors is exact through two QR decompositions and one small SVD (`svd_of_product`).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable

import torch

ROLES = ("global", "local", "target")


# ---------------------------------------------------------------------------------------------------------------------------
# Singular triples from factors
# ---------------------------------------------------------------------------------------------------------------------------


def svd_of_product(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular vectors and all singular values of left @ right, without forming it.

    left [..., m, q], right [..., q, n] -> u [..., m], sigma [..., min(m, n, q)] descending, v [..., n].

    Exact: with left = Q1 R1 and right^T = Q2 R2, left @ right = Q1 (R1 R2^T) Q2^T, and Q1, Q2 have orthonormal columns, so the
    singular values are those of the q x q core and its singular vectors are carried back by Q1 and Q2. O((m + n) q^2) a matrix
    instead of O(m n min(m, n)). Where sigma_1 is 0 there is no direction: u and v are zeros, not the unit vectors LAPACK returns.
    """
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.mT)
    u, sigma, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    some = (sigma[..., :1] > 0).to(left.dtype)
    return (q1 @ u[..., :1])[..., 0] * some, sigma, (q2 @ vh[..., :1, :].mT)[..., 0] * some


def rank1_of_sum(u: torch.Tensor, sigma: torch.Tensor, v: torch.Tensor, weights: torch.Tensor):
    """Leading triple of sum_j weights_j sigma_j u_j v_j^T for u [j, m], sigma [j], v [j, n], weights [j]: (u [m], sigma, v [n]), exact.

    Products sigma u v^T have no sign to choose, so nothing needs to be aligned.
    """
    used = weights.nonzero()[:, 0]
    left, sigmas, right = svd_of_product(((weights * sigma)[:, None] * u)[used].T, v[used])
    return left, sigmas[0], right


def delta_factors(now: tuple, before: tuple | None, scale: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W(now) - W(before) as (left, right). Each argument is (B [..., m, r], A [..., r, n]); `before` None is the backbone.

    `scale` is a number, or [..., 1, 1].
    """
    if before is None:
        return scale * now[0], now[1]
    return scale * torch.cat([now[0], -before[0]], -1), torch.cat([now[1], before[1]], -2)


def rounding_share(now: tuple, before: tuple, dtype: torch.dtype) -> float:
    """How much of the norm of W(now) - W(before) is rounding, if the four factors were rounded to nearest in `dtype`.

    The errors are taken as independent and uniform over the spacing of `dtype` around each entry, so this is the root of their expected
    squared Frobenius norm, to first order, over the delta's norm. Each argument is (B [m, r], A [r, n]); inf where nothing moved.
    """
    left, right = delta_factors(tuple(x.double() for x in now), tuple(x.double() for x in before), 1.0)

    def variance(x: torch.Tensor) -> torch.Tensor:
        spacing = torch.finfo(dtype).eps * torch.exp2(torch.frexp(x).exponent.double() - 1)
        return torch.where(x == 0, 0.0, spacing.square() / 12)

    noise = variance(left).sum(0) @ right.square().sum(1) + left.square().sum(0) @ variance(right).sum(1)
    return float((noise / ((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0)).sqrt())  # |L R|^2 = tr(L'L RR')


def align_signs(u, v, reference_u, reference_v):
    """Flips (u, v) together where they point away from the reference: (u, v) and (-u, -v) are the same singular pair.

    u, reference_u [..., m], v, reference_v [..., n]. The sign is that of <u, u_ref> + <v, v_ref>.
    """
    agreement = (u * reference_u).sum(-1, keepdim=True) + (v * reference_v).sum(-1, keepdim=True)
    sign = torch.where(agreement < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, v * sign


# ---------------------------------------------------------------------------------------------------------------------------
# Trajectories
# ---------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Triples:
    """One kind of delta of one matrix over the checkpoints: u [checkpoints, m], sigma [checkpoints], v [checkpoints, n]."""

    u: torch.Tensor
    sigma: torch.Tensor
    v: torch.Tensor

    def flipped_to(self, other: "Triples") -> "Triples":
        """The same triples with signs that agree with `other`, checkpoint by checkpoint (its first ones)."""
        u, v = align_signs(self.u, self.v, other.u[: len(self.u)], other.v[: len(self.v)])
        return Triples(u, self.sigma, v)


@dataclasses.dataclass
class Trajectory:
    """What stage 2 leaves: deltas[module][role] are Triples over `steps` (targets: over the first len(steps) - k of them)."""

    steps: list[int]
    k: int
    deltas: dict[str, dict[str, Triples]]

    def aligned(self) -> "Trajectory":
        """Signs made consistent: global deltas backwards from the last checkpoint, local and target ones to the global of their step."""
        return Trajectory(self.steps, self.k, {module: align_roles(roles) for module, roles in self.deltas.items()})

    def until(self, count: int) -> "Trajectory":
        """What was known when only the first `count` checkpoints existed."""
        return self._part(slice(count), slice(max(count - self.k, 0)))

    def last(self, count: int) -> "Trajectory":
        """The last `count` checkpoints (all, if there are fewer) and the targets that begin at one of them: count - k."""
        tail = slice(max(len(self.steps) - count, 0), None)
        return self._part(tail, tail)

    def _part(self, checkpoints: slice, targets: slice) -> "Trajectory":
        cut = {"global": checkpoints, "local": checkpoints, "target": targets}
        deltas = {
            module: {role: Triples(t.u[cut[role]], t.sigma[cut[role]], t.v[cut[role]]) for role, t in roles.items()}
            for module, roles in self.deltas.items()
        }
        return Trajectory(self.steps[checkpoints], self.k, deltas)


def align_roles(roles: dict[str, Triples]) -> dict[str, Triples]:
    """`Trajectory.aligned` for one matrix."""
    u, v = roles["global"].u.clone(), roles["global"].v.clone()
    for i in range(len(u) - 2, -1, -1):
        u[i], v[i] = align_signs(u[i], v[i], u[i + 1], v[i + 1])
    reference = Triples(u, roles["global"].sigma, v)
    return {"global": reference, "local": roles["local"].flipped_to(reference), "target": roles["target"].flipped_to(reference)}


# ---------------------------------------------------------------------------------------------------------------------------
# All deltas of one matrix, at little more than the cost of reading its factors
# ---------------------------------------------------------------------------------------------------------------------------

PROMISE = 1e-9  # relative error of sigma_1; where the fast way cannot promise it, `svd_of_product` is taken


def leading_from_grams(left_gram: torch.Tensor, right_gram: torch.Tensor):
    """The leading singular pair of L R, from G = L^T L and H = R R^T alone (both [q, q], float64).

    Returns (x [q], sigma [q] descending, y [q], bound): u = L x and v = R^T y, and a bound on sigma_1's relative error.

    With H = C C^T (Cholesky), R = C Q for a Q with orthonormal rows, so L R has the singular values of L C, and their squares are the
    eigenvalues of (L C)^T (L C) = C^T G C. For its leading eigenvector w: x = C w / sigma_1, y = G x / sigma_1. Before that, column j of
    L and row j of R are given one norm, which leaves the product as it is. Rounding in C^T G C is of the order of eps tr(G) tr(H), hence
    bound = (q + 64) eps tr(G) tr(H) / sigma_1^2, where 64 is for the sums over m and n, whose error grows as their square root: tiny
    unless the terms of L R cancel each other. A zero product gives exact zeros.
    """
    norms_l, norms_r = left_gram.diagonal(), right_gram.diagonal()  # squared
    balance = torch.where(norms_l * norms_r > 0, (norms_r / norms_l) ** 0.25, 0.0)  # a term with a zero half is left out
    inverse = torch.where(balance > 0, 1 / balance, 0.0)
    gram, other = balance[:, None] * left_gram * balance, inverse[:, None] * right_gram * inverse
    size = gram.trace() * other.trace()
    if size == 0:
        return torch.zeros_like(norms_l), torch.zeros_like(norms_l), torch.zeros_like(norms_l), 0.0
    root, failed = torch.linalg.cholesky_ex(other)
    if failed:  # rows of R that depend on each other
        values, vectors = torch.linalg.eigh(other)
        root = vectors * values.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(root.mT @ gram @ root)
    sigma = values.clamp_min(0).sqrt().flip(0)
    x = root @ vectors[:, -1] / sigma[0]
    bound = float((len(sigma) + 64) * torch.finfo(sigma.dtype).eps * size / sigma[0] ** 2)
    return balance * x, sigma, inverse * (gram @ x) / sigma[0], bound


@dataclasses.dataclass
class _Point:
    """One checkpoint's factors in float64 with their Gram matrices, which enter three deltas."""

    b: torch.Tensor  # [m, r]
    a: torch.Tensor  # [r, n]
    gram_b: torch.Tensor  # [r, r]
    gram_a: torch.Tensor  # [r, r]


def _delta(now: _Point, before: _Point | None):
    """W_now - W_before for s = 1 as a sum of products: (left halves, right halves, Gram matrix of the left ones, of the right ones).

    (B_now - B_before) A_now + B_before (A_now - A_before): differences first. Where little has moved, [B_now, -B_before]
    [A_now; A_before] would subtract two large products from each other.
    """
    if before is None:
        return [now.b], [now.a], now.gram_b, now.gram_a
    d_b, d_a = now.b - before.b, now.a - before.a
    cross_b, cross_a = d_b.mT @ before.b, now.a @ d_a.mT
    left_gram = torch.cat([torch.cat([d_b.mT @ d_b, cross_b], 1), torch.cat([cross_b.mT, before.gram_b], 1)])
    right_gram = torch.cat([torch.cat([now.gram_a, cross_a], 1), torch.cat([cross_a.mT, d_a @ d_a.mT], 1)])
    return [d_b, before.b], [now.a, d_a], left_gram, right_gram


def leading_triple(now: _Point, before: _Point | None):
    """(u [m], sigma [q], v [n], whether the exact way was needed) of W_now - W_before for s = 1."""
    lefts, rights, left_gram, right_gram = _delta(now, before)
    x, sigma, y, bound = leading_from_grams(left_gram, right_gram)
    if bound > PROMISE:
        return *svd_of_product(torch.cat(lefts, 1), torch.cat(rights)), True
    sigma = sigma[: min(len(lefts[0]), rights[0].shape[1])]  # as many as the matrix has; the others are 0
    u = sum(left @ part for left, part in zip(lefts, x.chunk(len(lefts)), strict=True))
    v = sum(part @ right for right, part in zip(rights, y.chunk(len(rights)), strict=True))
    return u, sigma, v, False


def each_delta(points: Iterable, k: int, leading: Callable):
    """Every delta of one matrix (Eq. 6, 7), of checkpoints in whatever form `points` has them; k + 1 are held at a time.

    leading(now, before) gives (u [m], sigma [q], v [n], whether it was hard) of W(now) - W(before); `before` None is the backbone.
    Returns (role -> Triples in fp32, sigma of the global deltas [checkpoints, q], role -> sigma_2 / sigma_1 [checkpoints], how many were
    hard). The first local delta is the first global one, the target of checkpoint i comes with i + k.
    """
    window, rows, hard = collections.deque(maxlen=k), {role: [] for role in ROLES}, 0
    for now in points:
        wanted = {"global": None, "local": window[-1] if window else None}
        if len(window) == k:
            wanted["target"] = window[0]
        for role, before in wanted.items():
            u, sigma, v, was_hard = leading(now, before)
            rows[role].append((u.float(), sigma, v.float()))
            hard += was_hard
        window.append(now)
    triples, gaps = {}, {}
    for role, found in rows.items():
        triples[role] = Triples(*(torch.stack([row[j] if j != 1 else row[1][0].float() for row in found]) for j in range(3)))
        gaps[role] = torch.stack(
            [row[1][1] / row[1][0] if len(row[1]) > 1 and row[1][0] > 0 else torch.zeros(()).double() for row in found]
        )
    return triples, torch.stack([row[1] for row in rows["global"]]), gaps, hard


def rank1_trajectory(checkpoints: Iterable[tuple[torch.Tensor, torch.Tensor]], k: int, scale: float):
    """`each_delta` of a LoRA. `checkpoints` yields (B [m, r], A [r, n]) in order; hard is what needed the exact way.

    Costs about 9 products of [r, m + n] with [m + n, r] a checkpoint and three eigenvalue problems of size 2r at most.
    """

    def point(b: torch.Tensor, a: torch.Tensor) -> _Point:
        return _Point(b, a, b.mT @ b, a @ a.mT)

    def leading(now: _Point, before: _Point | None):
        u, sigma, v, slow = leading_triple(now, before)
        return u, sigma * scale, v, slow

    return each_delta((point(b.double(), a.double()) for b, a in checkpoints), k, leading)


# ---------------------------------------------------------------------------------------------------------------------------
# Section 3: how much is rank 1, and how linear it is
# ---------------------------------------------------------------------------------------------------------------------------


def energy_ratio(sigma: torch.Tensor, squared: bool = False) -> torch.Tensor:
    """E_1 = sigma_1 / sum_q sigma_q (Sec. 3.2; singular values as they are). sigma [..., q] -> [...]; nan for a zero matrix.

    `squared` gives the share of the squared Frobenius norm, sigma_1^2 / sum_q sigma_q^2, which does not depend on the rank allowed.
    """
    sigma = sigma**2 if squared else sigma
    return sigma[..., 0] / sigma.sum(-1)


def linear_fit_r2(steps: torch.Tensor, y: torch.Tensor, fit: int) -> tuple[float, float]:
    """Least squares y_t = a + b t on the first `fit` checkpoints. Returns R^2 = 1 - SSE / SST on the later ones, and on those fitted.

    steps [c], y [c, d]: one R^2 for the whole vector, sums over its entries; SST is around the mean of the same points, so a held-out
    R^2 below 0 is worse than knowing their mean. This is the paper's Fig. 3 as far as it says how (one vector is sigma u or sigma v).
    """
    t, y = steps.double() - steps[:fit].double().mean(), y.double()
    mean = y[:fit].mean(0)
    slope = (t[:fit, None] * (y[:fit] - mean)).sum(0) / t[:fit].square().sum()  # a formula: LAPACK's last digit is not always the same
    residual = y - mean - t[:, None] * slope

    def r2(part: slice) -> float:
        total = (y[part] - y[part].mean(0)).square().sum()
        return float(1 - residual[part].square().sum() / total)

    return r2(slice(fit, None)), r2(slice(fit))
