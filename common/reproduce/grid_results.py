"""What the runs of a grid came to: every policy of every seed, means over seeds with their intervals, and how well the jumps pointed."""

import collections
import dataclasses
import pathlib
import statistics

import torch

from common.files import adapters
from common.files import deltas as delta_files
from common.reproduce import plans
from common.reproduce.results import Result, load_results

# Student's t, 97.5%, by degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NOT_WORSE = 0.01  # "not worse" holds where the whole interval is above minus this


@dataclasses.dataclass
class Estimate:
    """A mean over seeds with its standard error and half its 95% interval (nan for one seed)."""

    mean: float
    error: float
    half: float
    seeds: int

    def points(self) -> str:
        """In points of accuracy: `+3.0 [+2.1, +3.9]`."""
        if self.seeds < 2:
            return f"{100 * self.mean:+.1f}"
        return f"{100 * self.mean:+.1f} [{100 * (self.mean - self.half):+.1f}, {100 * (self.mean + self.half):+.1f}]"

    def plain(self, scale: float = 1.0, digits: int = 3) -> str:
        """`0.841 ± 0.003`; without the error for one seed."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.seeds < 2 else f"{mean} ± {scale * self.error:.{digits}f}"

    def verdict(self, not_worse: bool = False) -> str:
        """Of "better" (or "not worse"): holds or does not hold where the whole 95% interval says so, else undecided."""
        if self.seeds < 2:
            return "undecided"
        bound = -NOT_WORSE if not_worse else 0
        if self.mean + self.half < bound:
            return "does not hold"
        return "holds" if self.mean - self.half > bound else "undecided"


def estimate(values: list[float]) -> Estimate:
    """Mean, standard error and half of Student's 95% interval of one value a seed.

    >>> round(estimate([1.0, 2.0, 3.0]).half, 3)  # 4.303 / sqrt(3)
    2.484
    """
    n = len(values)
    if n < 2:
        return Estimate(values[0], float("nan"), float("nan"), n)
    error = statistics.stdev(values) / n**0.5
    return Estimate(statistics.fmean(values), error, error * T975[min(n - 1, len(T975)) - 1], n)


class Grid:
    """The results of every run: results[seed][run][policy]. `prefix`, `total`, `reference` are RL steps."""

    def __init__(self, root: pathlib.Path, preset: dict, seeds: list[int]):
        self.root, self.seeds = root, seeds
        self.prefix, more, self.reference = plans.numbers(preset)
        self.total = self.prefix + more
        self.results: dict[int, dict[str, dict[str, Result]]] = {}
        for seed in seeds:
            runs = {str(path.parent.relative_to(root / f"seed{seed}")) for path in (root / f"seed{seed}").glob("**/eval")}
            self.results[seed] = {run: load_results(root / f"seed{seed}" / run) for run in sorted(runs)}

    def get(self, run: str, policy: str) -> dict[int, Result]:
        """This policy's result for every seed that has it; the backbone's once, for it is the same for all."""
        found = {seed: runs[run][policy] for seed, runs in self.results.items() if policy in runs.get(run, {})}
        return dict([*found.items()][:1]) if policy == "backbone" else found

    def accuracy(self, run: str, policy: str) -> Estimate | None:
        found = self.get(run, policy)
        return estimate([r.accuracy for r in found.values()]) if found else None

    def difference(self, a: tuple[str, str], b: tuple[str, str]) -> Estimate | None:
        """Accuracy of (run, policy) a minus that of b, paired by seed; None where no seed has both."""
        first, second = self.get(*a), self.get(*b)
        gaps = [first[seed].accuracy - second[seed].accuracy for seed in first if seed in second]
        return estimate(gaps) if gaps else None

    def spectra(self, run: str) -> dict[int, dict]:
        """Stage 2's spectrum.json of this run for every seed that has it."""
        paths = {seed: self.root / f"seed{seed}" / run / "deltas" / "spectrum.json" for seed in self.seeds}
        return {seed: delta_files.read_spectrum(path.parent) for seed, path in paths.items() if path.is_file()}

    def step(self, step: int) -> str:
        return f"train/step_{step:04d}"

    def after(self, start: str) -> str:
        return f"continued/{start}/step_{self.total:04d}"


def jump_cosines(grid: Grid, k: int, save_every: int) -> dict[str, Estimate]:
    """Policy -> cosine of its jump, W_hat - W_c, with the true W_(c+k) - W_c: <.,.> / (|.| |.|), mean over the matrices."""
    found = collections.defaultdict(list)
    for seed in grid.seeds:
        run = grid.root / f"seed{seed}" / "lora"
        ends = [run / grid.step(step) for step in (grid.prefix, grid.prefix + k * save_every)]
        if not all(path.is_dir() for path in ends):
            continue
        last, future = map(adapters.read_adapter, ends)
        for path in sorted((run / "extrapolated").glob("*")):
            cosine = None if path.name.startswith(".") else jump_cosine(adapters.read_adapter(path), last, future)
            if cosine is not None:
                found[f"extrapolated/{path.name}"].append(cosine)
    return {policy: estimate(values) for policy, values in found.items()}


def jump_cosine(jumped: adapters.Adapter, last: adapters.Adapter, future: adapters.Adapter) -> float | None:
    """Mean over matrices of the cosine between W(jumped) - W(last) and W(future) - W(last), from the factors; None if nothing moved."""
    cosines = []
    for module in last.factors:
        ours, true = (difference_factors(adapter, last, module) for adapter in (jumped, future))
        size = (inner(ours, ours) * inner(true, true)) ** 0.5
        if size > 0:
            cosines.append(inner(ours, true) / size)
    return statistics.fmean(cosines) if cosines else None


def difference_factors(now: adapters.Adapter, before: adapters.Adapter, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """W(now) - W(before) of one matrix as (left [m, q], right [q, n]), float64."""
    (b, a), (b0, a0) = now.factors[module], before.factors[module]
    left = torch.cat([now.scale(module) * b.double(), -before.scale(module) * b0.double()], 1)
    return left, torch.cat([a.double(), a0.double()])


def inner(x: tuple, y: tuple) -> float:
    """<L_x R_x, L_y R_y> = tr((L_y^T L_x)(R_x R_y^T))."""
    return float(((y[0].mT @ x[0]) * (y[1] @ x[1].mT)).sum())
