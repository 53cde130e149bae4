"""The algebra of low-rank updates: deltas (Eq. 6), their rank 1 (Eq. 3, 7), the jump (Eq. 10).

A LoRA checkpoint is W = W_0 + s B A, and W - W_0 is a matrix that is never formed: `LowRank` holds
its factors and knows +, - and scalar * and /, as dense tensors do. So a formula of the paper is a
line of code, the same for LoRA, where W[0] is zero, and for whole models (W[0] is the backbone):

    global_ = top(W[i] - W[0])                     # Eq. 6, then 7
    jumped  = W[c] + alpha * rank1(u, sigma, v)    # Eq. 10: for a LoRA an adapter of rank r + 1
"""

import functools
import math
from typing import NamedTuple

import torch

ROLES = ("global", "local", "target")
MAX_ERROR = 1e-9  # the largest relative error of sigma_1; above it the exact way is taken
KEEP, SPARE, ROUNDS = 64, 8, 16  # dense matrices: sigmas kept, spare columns, iterations


class Term(NamedTuple):
    """weight * left @ right; `balanced`: both have equal norms, so `factors` shares the weight."""
    weight: float
    left: torch.Tensor  # [m, q]
    right: torch.Tensor  # [q, n]
    balanced: bool = False


class LowRank:
    """A matrix [m, n] as a sum of terms, never formed. Sums are exact: terms stand side by side.
    LowRank(left [m, q], right [q, n], weight) is weight * left @ right, zero where q is 0."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, weight=1.0, balanced=False):
        self.shape = (left.shape[0], right.shape[1])
        self.terms = [Term(weight, left, right, balanced)] if left.shape[1] else []

    def _of(self, terms: list[Term]) -> "LowRank":
        new = object.__new__(LowRank)
        new.shape, new.terms = self.shape, terms
        return new

    @functools.cached_property
    def grams(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(L^T L, R R^T), [q, q] each, of a checkpoint or the difference of two; else None."""
        if len(self.terms) == 1:
            _, left, right, _ = self.terms[0]
            return left.mT @ left, right @ right.mT

    def __add__(self, other):
        if isinstance(other, torch.Tensor):
            return other + self.dense().to(other)
        return self._of(self.terms + other.terms) if other.terms else self  # keeps its grams

    def __radd__(self, other):
        return self + other if isinstance(other, torch.Tensor) else self  # sum() begins with 0

    def __mul__(self, factor: float):
        return self._of([t._replace(weight=factor * t.weight) for t in self.terms])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float):
        return self * (1 / divisor)

    def __sub__(self, other):
        if isinstance(other, LowRank) and len(self.terms) == len(other.terms) == 1:
            (now,), (old,) = self.terms, other.terms
            if now.weight == old.weight and now.left.shape == old.left.shape:
                # B A - B' A' = (B - B') A + B' (A - A'): no large products that nearly cancel.
                d_b, d_a = now.left - old.left, now.right - old.right
                new = self._of([Term(now.weight, d_b, now.right), Term(now.weight, old.left, d_a)])
                left = blocks(d_b.mT @ d_b, d_b.mT @ old.left, other.grams[0])
                new.grams = left, blocks(self.grams[1], now.right @ d_a.mT, d_a @ d_a.mT)
                return new
        return self + -1.0 * other

    def __rsub__(self, other: torch.Tensor) -> torch.Tensor:
        return other - self.dense().to(other)

    def dense(self) -> torch.Tensor:
        """The matrix itself, [m, n]."""
        return sum((t.weight * (t.left @ t.right) for t in self.terms), torch.zeros(self.shape))

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U [m, q], sigma [q], V^T [q, n] the exact way, O((m + n) q^2): with left = Q1 R1 and
        right^T = Q2 R2, the singular values are those of the small R1 R2^T."""
        q1, r1 = torch.linalg.qr(torch.cat([t.weight * t.left for t in self.terms], 1))
        q2, r2 = torch.linalg.qr(torch.cat([t.right for t in self.terms]).mT)
        u, sigma, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
        return q1 @ u, sigma, vh @ q2.mT

    def nearest(self, rank: int) -> tuple["LowRank", float]:
        """The nearest matrix of at most this rank, and the share of the norm that it lacks."""
        if sum(t.left.shape[1] for t in self.terms) <= rank:
            return self, 0.0
        u, sigma, vh = self.svd()
        root, lost = sigma[:rank].sqrt(), sigma[rank:].norm() / sigma.norm().clamp_min(1e-30)
        return LowRank(u[:, :rank] * root, root[:, None] * vh[:rank], balanced=True), float(lost)

    def factors(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(B [m, r], A [r, n]) in fp32, scale * B A = this matrix, r from 1 to min(m, n). A LoRA's
        factors stay the same. A balanced term is split evenly, because stage 5 trains both."""
        if not self.terms:
            return torch.zeros(self.shape[0], 1), torch.zeros(1, self.shape[1])
        lefts, rights = [], []
        for t in self.nearest(min(self.shape))[0].terms:
            amount = t.weight / scale
            c = abs(amount) ** 0.5 if t.balanced else 1.0
            lefts.append((math.copysign(c, amount) if t.balanced else amount) * t.left.float())
            rights.append(c * t.right.float())
        return torch.cat(lefts, 1), torch.cat(rights)


def blocks(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """[[a, b], [b^T, c]]."""
    return torch.cat([torch.cat([a, b], 1), torch.cat([b.mT, c], 1)])


def rank1(u: torch.Tensor, sigma: float | torch.Tensor, v: torch.Tensor) -> LowRank:
    """Eq. 7: sigma u v^T, for unit vectors u [m] and v [n]."""
    return LowRank(u[:, None], v[None], float(sigma), balanced=True)


class Top(NamedTuple):
    """The leading singular triple of a matrix (Eq. 3)."""
    u: torch.Tensor  # [m]
    sigma: torch.Tensor  # all that were computed, in falling order [q]
    v: torch.Tensor  # [n]


def top(matrix: LowRank | torch.Tensor) -> Top:
    """The leading singular triple, in one of three ways: by Gram matrices (checkpoints and their
    differences, if the error is small), QR and SVD (other LowRanks), iteration (tensors)."""
    if isinstance(matrix, torch.Tensor):
        return top_of_dense(matrix.float())
    terms, scale = matrix.terms, matrix.terms[0].weight
    if matrix.grams and scale > 0:
        x, sigma, y, bound = top_of_grams(*matrix.grams)
        if bound <= MAX_ERROR:  # in fp32 it never is
            u = sum(t.left @ part for t, part in zip(terms, x.chunk(len(terms)), strict=True))
            v = sum(part @ t.right for t, part in zip(terms, y.chunk(len(terms)), strict=True))
            return Top(u, sigma[: min(matrix.shape)] * scale, v)
    u, sigma, vh = matrix.svd()
    moved = (sigma[0] > 0).to(u.dtype)  # a zero matrix has no direction: u and v are zeros
    return Top(u[:, 0] * moved, sigma, vh[0] * moved)


def top_of_grams(gram: torch.Tensor, other: torch.Tensor):
    """From G = L^T L and H = R R^T [q, q]: x, all sigma, y [q] with u = L x, v = R^T y of the
    leading pair of L R, and a bound on the relative error of sigma_1. With H = C C^T and w, the
    leading eigenvector of C^T G C: x = C w / sigma_1, y = G x / sigma_1."""
    # Column j of L and row j of R are scaled to equal norms, which leaves L R as it is.
    both = gram.diagonal() * other.diagonal() > 0
    balance = torch.where(both, (other.diagonal() / gram.diagonal()) ** 0.25, 0.0)
    inverse = torch.where(both, 1 / balance, 0.0)
    gram, other = balance[:, None] * gram * balance, inverse[:, None] * other * inverse
    root, failed = torch.linalg.cholesky_ex(other)
    if failed:  # rows of R that depend on each other
        values, vectors = torch.linalg.eigh(other)
        root = vectors * values.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(root.mT @ gram @ root)
    sigma = values.clamp_min(0).sqrt().flip(0)
    x = root @ vectors[:, -1] / sigma[0]
    # Rounding is of the order of eps tr(G) tr(H); 64 allows for the sums over m and n.
    eps = torch.finfo(sigma.dtype).eps * (len(sigma) + 64)
    bound = float(eps * gram.trace() * other.trace() / sigma[0] ** 2)
    return balance * x, sigma, inverse * (gram @ x) / sigma[0], bound


def top_of_dense(matrix: torch.Tensor) -> Top:
    """`top` of a whole model's delta [m, n] in fp32, with KEEP singular values: subspace iteration
    from a seeded start (Halko, Martinsson & Tropp 2011, Algorithm 4.4)."""
    width, generator = min(KEEP + SPARE, *matrix.shape), torch.Generator().manual_seed(0)
    right = torch.randn(matrix.shape[1], width, generator=generator)
    for _ in range(ROUNDS):
        left = torch.linalg.qr(matrix @ right)[0]
        right = torch.linalg.qr(matrix.mT @ left)[0]
    u, sigma, vh = torch.linalg.svd(matrix @ right, full_matrices=False)
    moved = sigma[0] > 0
    return Top(u[:, 0] * moved, sigma[:KEEP], right @ vh[0] * moved)


def trajectory(W: list[LowRank | torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Eq. 6 and 7 for one matrix. W[0]: the backbone (zero for LoRA). W[1] ... W[c]: checkpoints.

    Returns u [c, m], sigma [c], v [c, n] as "global.u" and so on; the targets have c - k rows. And
    "spectrum" [c, q], all sigmas of the global deltas (of dense ones the first KEEP)."""
    found = {role: [] for role in ROLES}
    for i in range(1, len(W)):
        found["global"].append(top(W[i] - W[0]))
        found["local"].append(top(W[i] - W[i - 1]))
        if i > k:
            found["target"].append(top(W[i] - W[i - k]))  # that of W[i - k]
    made = {"spectrum": torch.stack([one.sigma for one in found["global"]])}
    for role, tops in found.items():
        made[f"{role}.u"] = torch.stack([one.u for one in tops])
        made[f"{role}.sigma"] = torch.stack([one.sigma[0] for one in tops])
        made[f"{role}.v"] = torch.stack([one.v for one in tops])
    return made
