"""Means with their errors: over seeds, or over the problems of one run."""

import dataclasses
import itertools
import math
import statistics

import torch

# Student's t, 97.5%, by degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NOT_WORSE = 0.01  # "not worse" holds where the whole interval is above minus this


@dataclasses.dataclass
class Estimate:
    """A mean, its standard error and half its interval (nan where one seed of several has it).

    Without a mean it is false, and shown as a dash: it was not measured.
    """

    mean: float | None = None
    error: float = math.nan
    half: float = math.nan
    n: int = 1  # seeds

    def __bool__(self) -> bool:
        return self.mean is not None

    def points(self) -> str:
        """In points of accuracy: `+3.0 [+2.1, +3.9]`."""
        if not self:
            return "–"
        low, high = 100 * (self.mean - self.half), 100 * (self.mean + self.half)
        return f"{100 * self.mean:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if low == low else "")

    def plain(self, scale: float = 1.0, digits: int = 3) -> str:
        """`0.841 ± 0.003`; without an error where there is none."""
        error = f" ± {scale * self.error:.{digits}f}" if self.error == self.error else ""
        return f"{scale * self.mean:.{digits}f}{error}" if self else "–"

    def verdict(self, not_worse: bool = False) -> str:
        """Of "better" or "not worse": decided where the whole interval is on one side."""
        bound = -NOT_WORSE if not_worse else 0.0
        if self.mean + self.half < bound:
            return "does not hold"
        return "holds" if self.mean - self.half > bound else "undecided"


def over_seeds(values: list[float]) -> Estimate:
    """Mean and Student's 95% interval of one value a seed.

    >>> round(over_seeds([1.0, 2.0, 3.0]).half, 3)  # 4.303 / sqrt(3)
    2.484
    """
    values = [x for x in values if x == x] or values[:1]  # a seed in which nothing moved has nan
    n = len(values)
    if n < 2:
        return Estimate(*values, n=n)
    error = statistics.stdev(values) / n**0.5
    return Estimate(statistics.fmean(values), error, error * T975[min(n - 1, len(T975)) - 1], n)


def over_problems(scores: list[torch.Tensor]) -> Estimate:
    """The plain mean of tasks, with two standard errors on either side.

    scores[task] is [problems]: one observation a problem, or the difference of two.
    """
    variances = [float(s.var()) / len(s) if len(s) > 1 else math.nan for s in scores]
    error = sum(variances) ** 0.5 / len(scores)
    return Estimate(statistics.fmean(float(s.mean()) for s in scores), error, 2 * error)


def rank_correlation(points: list[tuple[float, float]], groups: int = 1) -> str:
    """Spearman's rank correlation and its 95% interval; empty for too few or equal points.

    The interval is Fisher's, with the variance 1.06 / (n - 3) of Fieller et al. 1957. groups: of
    points whose means were taken off before; one more costs a degree of freedom.

    >>> rank_correlation([(0.1, 1.0), (0.2, 2.0), (0.3, 4.0), (0.4, 3.0), (0.5, 5.0)])
    '+0.90 [+0.05, +0.99]'
    """
    sides = [*zip(*points, strict=True)]
    if len(points) < 4 + groups or any(len({*side}) == 1 for side in sides):
        return ""
    ranks = [[sorted(side).index(x) + (side.count(x) - 1) / 2 for x in side] for side in sides]
    rho = min(max(statistics.correlation(*ranks), -0.999), 0.999)
    half = 1.96 * math.sqrt(1.06 / (len(points) - 2 - groups))
    low, high = (math.tanh(math.atanh(rho) + side * half) for side in (-1, 1))
    return f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]"


def within_groups(points: list[tuple[float, float, object]]) -> str:
    """The rank correlation of points (x, y, group), neighbours by group, less their group's means:
    what x says of y within a group. Empty as `rank_correlation` is."""
    groups = [[*some] for _, some in itertools.groupby(points, lambda point: point[2])]
    groups = [some for some in groups if len(some) > 1]
    moved = []
    for some in groups:
        x, y = (statistics.fmean(point[side] for point in some) for side in (0, 1))
        moved += [(round(point[0] - x, 9), round(point[1] - y, 9)) for point in some]  # equal ones
    return rank_correlation(moved, len(groups))
