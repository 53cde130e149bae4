"""The algebra of low-rank updates: deltas (Eq. 6), their rank 1 (Eq. 3, 7), the jump (Eq. 10).

A LoRA checkpoint is W = W_0 + s B A, and W - W_0 is a matrix that is never formed: `LowRank` holds its
factors and knows +, - and scalar *, as dense tensors do. So a formula of the paper is a line of code,
the same for LoRA, where W[0] is zero, and for whole models, where W[0] is the backbone:

    global_ = top(W[i] - W[0])                     # Eq. 6, then 7
    jumped  = W[c] + alpha * rank1(u, sigma, v)    # Eq. 10: of a LoRA an adapter of rank r + 1
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

ROLES = ("global", "local", "target")
PROMISE = 1e-9  # the largest relative error of sigma_1 with which the fast way is taken
KEEP, SPARE, ROUNDS, TOLERANCE = 64, 8, 16, 1e-5  # of the iteration on dense matrices


class Term:
    """weight * left @ right, left [m, q], right [q, n]; `unit` if these are unit vectors."""

    def __init__(self, weight: float, left: torch.Tensor, right: torch.Tensor, unit=False):
        self.weight, self.left, self.right, self.unit = weight, left, right, unit

    @functools.cached_property
    def grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """L^T L and R R^T, [q, q] each. A checkpoint's are computed once and enter three deltas."""
        return self.left.mT @ self.left, self.right @ self.right.mT


class LowRank:
    """A matrix [m, n] as a sum of terms, never formed. Sums are exact: terms stand side by side."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, weight: float = 1.0, unit=False):
        """weight * left @ right, left [m, q], right [q, n]. It is zero where q is 0."""
        self.shape = (left.shape[0], right.shape[1])
        self.terms = [Term(weight, left, right, unit)] if left.shape[1] else []

    def _of(self, terms: list[Term]) -> "LowRank":
        new = object.__new__(LowRank)
        new.shape, new.terms = self.shape, terms
        return new

    def __add__(self, other):
        if isinstance(other, torch.Tensor):
            return other + self.dense().to(other)
        return self._of([*self.terms, *other.terms])

    def __radd__(self, other):
        return self + other if isinstance(other, torch.Tensor) else self  # sum() begins with 0

    def __mul__(self, factor: float) -> "LowRank":
        return self._of([Term(factor * t.weight, t.left, t.right, t.unit) for t in self.terms])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "LowRank":
        return self * (1 / divisor)

    def __sub__(self, other):
        if isinstance(other, LowRank) and len(self.terms) == len(other.terms) == 1:
            (now,), (old,) = self.terms, other.terms
            if now.weight == old.weight and now.left.shape == old.left.shape:
                # B A - B' A' = (B - B') A + B' (A - A'): no large products that nearly cancel.
                d_b, d_a = now.left - old.left, now.right - old.right
                terms = Term(now.weight, d_b, now.right), Term(now.weight, old.left, d_a)
                terms[0].grams = d_b.mT @ d_b, now.grams[1]
                terms[1].grams = old.grams[0], d_a @ d_a.mT
                return self._of([*terms])
        return self + -1.0 * other

    def __rsub__(self, other: torch.Tensor) -> torch.Tensor:
        return other - self.dense().to(other)

    def dense(self) -> torch.Tensor:
        """The matrix itself, [m, n]."""
        return sum((t.weight * (t.left @ t.right) for t in self.terms), torch.zeros(self.shape))

    def svd(self) -> "Top":
        """The exact way, O((m + n) q^2): with left = Q1 R1 and right^T = Q2 R2, the singular values
        are those of the small R1 R2^T. A zero matrix has no direction: u and v are zeros."""
        q1, r1 = torch.linalg.qr(torch.cat([t.weight * t.left for t in self.terms], 1))
        q2, r2 = torch.linalg.qr(torch.cat([t.right for t in self.terms]).mT)
        u, sigma, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
        some = (sigma[:1] > 0).to(u.dtype)
        return Top((q1 @ u[:, :1])[:, 0] * some, sigma, (q2 @ vh[:1].mT)[:, 0] * some, True)

    def factors(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(B [m, r], A [r, n]) in fp32 with scale * B A = this matrix; r is at most m or n.

        A LoRA's own B and A come back as they were. Unit vectors share their weight evenly, c =
        sqrt(weight / scale) on each side, because both sides are trained on.
        """
        if not self.terms:  # PEFT knows no rank 0
            return torch.zeros(self.shape[0], 1), torch.zeros(1, self.shape[1])
        if sum(t.left.shape[1] for t in self.terms) > min(self.shape):
            u, sigma, vh = torch.linalg.svd(self.dense().double() / scale, full_matrices=False)
            return (u * sigma.sqrt()).float(), (sigma.sqrt()[:, None] * vh).float()
        lefts, rights = [], []
        for t in self.terms:
            amount = t.weight / scale
            a = abs(amount) ** 0.5 if t.unit else 1.0
            b = math.copysign(a, amount) if t.unit else amount
            lefts.append(b * t.left.float())
            rights.append(a * t.right.float())
        return torch.cat(lefts, 1), torch.cat(rights)


def rank1(u: torch.Tensor, sigma: float | torch.Tensor, v: torch.Tensor) -> LowRank:
    """sigma u v^T, for unit vectors u [m] and v [n]."""
    return LowRank(u[:, None], v[None], float(sigma), unit=True)


def inner(a: LowRank, b: LowRank | torch.Tensor) -> float:
    """<a, b> = sum of a_ij b_ij; of two products tr((L_b^T L_a) (R_a R_b^T)). In float64."""
    if isinstance(a, torch.Tensor):
        a, b = (b, a) if isinstance(b, LowRank) else (LowRank(a, torch.eye(a.shape[1])), b)
    total = 0.0
    for x in a.terms:
        left, right = x.left.double(), x.right.double()
        if isinstance(b, torch.Tensor):
            total += x.weight * float(((left.mT @ b.double()) * right).sum())
        else:
            for y in b.terms:
                product = (left.mT @ y.left.double()) * (right @ y.right.double().mT)
                total += x.weight * y.weight * float(product.sum())
    return total


def cosine(a, b) -> float:
    """<a, b> / (|a| |b|); nan where one of them is zero."""
    size = (inner(a, a) * inner(b, b)) ** 0.5
    return inner(a, b) / size if size > 0 else math.nan


class Top(NamedTuple):
    """The leading singular triple of a matrix (Eq. 3), and what was seen beside it."""

    u: torch.Tensor  # [m]
    sigma: torch.Tensor  # the singular values that were looked at, descending [q]
    v: torch.Tensor  # [n]
    hard: bool  # LowRank: the exact way was taken; dense: the iteration did not converge


def top(matrix: LowRank | torch.Tensor) -> Top:
    """The leading singular triple. Of two checkpoints' difference in float64 it follows from Gram
    matrices if their rounding is harmless; else the exact way. Of a dense matrix: `top_of_dense`."""
    if isinstance(matrix, torch.Tensor):
        return top_of_dense(matrix.float())
    terms, scale = matrix.terms, matrix.terms[0].weight
    if len(terms) > 2 or {t.weight for t in terms} != {scale} or scale <= 0:
        return matrix.svd()
    grams = terms[0].grams
    if len(terms) == 2:
        # [L1 L2]^T [L1 L2] and [R1; R2] [R1; R2]^T; what the two checkpoints have is at hand.
        (l1, r1), (l2, r2) = terms[0].grams, terms[1].grams
        l12, r12 = terms[0].left.mT @ terms[1].left, terms[0].right @ terms[1].right.mT
        grams = [
            torch.cat([torch.cat([x, xy], 1), torch.cat([xy.mT, y], 1)])
            for x, xy, y in ((l1, l12, l2), (r1, r12, r2))
        ]
    x, sigma, y, bound = top_of_grams(*grams)
    if bound > PROMISE or terms[0].left.dtype != torch.float64:
        return matrix.svd()
    u = sum(t.left @ part for t, part in zip(terms, x.chunk(len(terms)), strict=True))
    v = sum(part @ t.right for t, part in zip(terms, y.chunk(len(terms)), strict=True))
    return Top(u, sigma[: min(matrix.shape)] * scale, v, False)


def top_of_grams(left_gram: torch.Tensor, right_gram: torch.Tensor):
    """The leading pair of L R from G = L^T L and H = R R^T, [q, q] in float64: x [q], sigma [q], y [q]
    with u = L x and v = R^T y, and a bound on the relative error of sigma_1.

    With H = C C^T, L R has the singular values of L C, the roots of the eigenvalues of C^T G C. For
    its leading eigenvector w, x = C w / sigma_1 and y = G x / sigma_1. Rounding is of the order of
    eps tr(G) tr(H), harmless unless the terms of L R cancel each other.
    """
    # Column j of L and row j of R get one norm, which leaves L R as it is.
    norms_l, norms_r = left_gram.diagonal(), right_gram.diagonal()
    balance = torch.where(norms_l * norms_r > 0, (norms_r / norms_l) ** 0.25, 0.0)
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
    # 64 stands for the sums over m and n, whose error grows as their square root.
    bound = float((len(sigma) + 64) * torch.finfo(sigma.dtype).eps * size / sigma[0] ** 2)
    return balance * x, sigma, inverse * (gram @ x) / sigma[0], bound


def top_of_dense(matrix: torch.Tensor) -> Top:
    """Of a whole model's delta [m, n] in fp32: the leading triple and KEEP singular values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = min(KEEP + SPARE, *matrix.shape)
        u, sigma, v = torch.svd_lowrank(matrix, q=width, niter=ROUNDS)
    u, sigma, v = u[:, 0], sigma[:KEEP], v[:, 0]
    if sigma[0] == 0:
        return Top(0 * u, sigma, 0 * v, False)
    residual = torch.linalg.vector_norm(matrix @ v - sigma[0] * u) / sigma[0]
    return Top(u, sigma, v, bool(residual > TOLERANCE))


# --------------------------------------------------------------------------------------------------
# A trajectory: all deltas of one matrix
# --------------------------------------------------------------------------------------------------


def trajectory(W: Sequence[LowRank | torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Eq. 6 and 7 for one matrix: W[0] is the backbone, W[1] ... W[c] are the checkpoints.

    Returns for each role "global.u" [c, m], "global.sigma" [c], "global.v" [c, n] and "global.gap"
    [c] (sigma_2 / sigma_1), a target for the first c - k; "spectrum", the singular values of the
    global deltas [c, q]; "hard" [1], how many triples did not come the fast way.
    """
    found = {role: [] for role in ROLES}
    for i in range(1, len(W)):
        found["global"].append(top(W[i] - W[0]))
        found["local"].append(top(W[i] - W[i - 1]))
        if i > k:
            found["target"].append(top(W[i] - W[i - k]))
    made = {"spectrum": torch.stack([one.sigma for one in found["global"]])}
    for role, tops in found.items():
        made[f"{role}.u"] = torch.stack([one.u for one in tops])
        made[f"{role}.sigma"] = torch.stack([one.sigma[0] for one in tops])
        made[f"{role}.v"] = torch.stack([one.v for one in tops])
        first = torch.stack([torch.nn.functional.pad(one.sigma, (0, 1))[:2] for one in tops])
        made[f"{role}.gap"] = torch.where(first[:, 0] > 0, first[:, 1] / first[:, 0], 0.0)
    made["hard"] = torch.tensor([float(sum(one.hard for tops in found.values() for one in tops))])
    return made


def align(u, v, reference_u, reference_v):
    """(u, v) and (-u, -v) are one singular pair: takes the one that points towards the reference.

    u [..., m], v [..., n]; its sign is that of <u, u_ref> + <v, v_ref>.
    """
    agreement = (u * reference_u).sum(-1, keepdim=True) + (v * reference_v).sum(-1, keepdim=True)
    sign = torch.where(agreement < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, v * sign
