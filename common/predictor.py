"""The trajectory predictor of Sec. 4.2: an encoder-decoder that maps (global, local) rank-1 vectors to the next target's (Eq. 8, 9, 11).

One predictor for each (side, length): u's of one length, v's of one length, and all sigmas, shared by the matrices that have them.
Two recipes train the same network, a third has none:

    paper      what the official code does: signs as LAPACK left them, sigma in its raw unit, AdamW 2e-5
    aligned    signs made consistent, sigma divided by the matrix's last global sigma, and a learning rate that fits in 1000 steps
    weighted   rank 1 of a weighted sum of the known deltas, three weights for the whole model, by ridge regression

Table 5's ablations, `-no-global` and `-no-local` of the first two, train a network that sees one of its two inputs only.

(u, v) and (-u, -v) are the same singular pair, so without alignment part of what the network is asked to predict is a coin flip.
`weighted` never sees u and v apart, only products sigma u v^T, which have no sign to choose.
"""

import collections
import dataclasses
import re
from collections.abc import Callable

import torch
from torch import nn

from common.rank1 import Trajectory, Triples, rank1_of_sum

HIDDEN = 256  # as in the official code


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the predictor's data are prepared and how it is trained. Unknown to the paper; `paper` is what its code does."""

    align: bool
    scale_sigma: bool
    learning_rate: float
    epochs: int = 1000  # full-batch steps of AdamW (torch's defaults), cosine to a tenth
    inputs: tuple[str, ...] = ("global", "local")  # the deltas that the network sees; signs and sigma's unit are the global's anyway


@dataclasses.dataclass(frozen=True)
class SumRecipe:
    """The recipe without a network. Its numbers were chosen on five demo runs of seeds 10 to 14, by the cosine of `03`'s backtest."""

    window: int = 3  # local deltas in the mean that is the second term
    decay: float = 0.5  # a regression pair counts this much less than the one a checkpoint later
    ridge: float = 0.01  # pull of the weights towards `prior`; the squared length of the first term is 1
    prior: tuple[float, float, float] = (0.5, 0.5, 0.0)


AnyRecipe = Recipe | SumRecipe
PAPER, ALIGNED = Recipe(align=False, scale_sigma=False, learning_rate=2e-5), Recipe(align=True, scale_sigma=True, learning_rate=3e-4)
RECIPES = {
    "paper": PAPER,
    "aligned": ALIGNED,
    "weighted": SumRecipe(),
    "paper-no-global": dataclasses.replace(PAPER, inputs=("local",)),
    "paper-no-local": dataclasses.replace(PAPER, inputs=("global",)),
    "aligned-no-global": dataclasses.replace(ALIGNED, inputs=("local",)),
    "aligned-no-local": dataclasses.replace(ALIGNED, inputs=("global",)),
}


def split_name(name: str) -> tuple[str, int]:
    """The recipe in a predictor's name and the number of last checkpoints it learned from, 0 for all of them.

    >>> split_name("aligned-last8"), split_name("aligned-no-local")
    (('aligned', 8), ('aligned-no-local', 0))
    """
    recipe, last = re.fullmatch(r"(.*?)(?:-last(\d+))?", name, re.DOTALL).groups()
    return recipe, int(last or 0)


def block(d_in: int, d_out: int) -> nn.Sequential:
    """Two pairs of linear layers with one ReLU between them, at full width: the official code's reading of "MLP layers and the
    activation function". A pair without an activation inside is one affine map of rank 256.
    """
    return nn.Sequential(nn.Linear(d_in, HIDDEN), nn.Linear(HIDDEN, d_in), nn.ReLU(), nn.Linear(d_in, HIDDEN), nn.Linear(HIDDEN, d_out))


class TrajectoryPredictor(nn.Module):
    """Eq. 8: D(concat(E_G(s_G), E_L(s_L))) for vectors of length d. About 3840 d weights. Of one input (Table 5) it is D(E(s))."""

    def __init__(self, d: int, inputs: tuple[str, ...] = ("global", "local")):
        super().__init__()
        self.encode_global = block(d, d) if "global" in inputs else None
        self.encode_local = block(d, d) if "local" in inputs else None
        self.decode = block(len(inputs) * d, d)

    def forward(self, s_global: torch.Tensor, s_local: torch.Tensor) -> torch.Tensor:
        """s_global, s_local [..., d] -> predicted s_target [..., d]. One that the network has no encoder for goes unseen."""
        pairs = ((self.encode_global, s_global), (self.encode_local, s_local))
        return self.decode(torch.cat([encode(s) for encode, s in pairs if encode is not None], -1))


def family(side: str, triples: Triples) -> str:
    """The name of the predictor that a vector belongs to: "u.64", "v.192" or "sigma"."""
    return "sigma" if side == "sigma" else f"{side}.{getattr(triples, side).shape[1]}"


def prepare(trajectory: Trajectory, recipe: Recipe) -> tuple[Trajectory, dict[str, torch.Tensor]]:
    """The trajectory as the recipe wants it, and each module's unit of sigma (its last global sigma, or 1)."""
    if recipe.align:
        trajectory = trajectory.aligned()
    units = {}
    for module, roles in trajectory.deltas.items():
        last = roles["global"].sigma[-1]
        units[module] = last if recipe.scale_sigma and last > 0 else torch.ones(())
    return trajectory, units


def stack_families(trajectory: Trajectory, units: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """family -> (global, local, target), each [checkpoints with a target, members, d]: every vector of one kind and length together."""
    members = collections.defaultdict(list)
    for module, roles in trajectory.deltas.items():
        count = len(roles["target"].sigma)
        for side in ("u", "v", "sigma"):
            rows = [getattr(roles[role], side)[:count] for role in ("global", "local", "target")]
            if side == "sigma":
                rows = [(row / units[module])[:, None] for row in rows]
            members[family(side, roles["target"])].append(rows)
    return {name: tuple(torch.stack(parts, 1) for parts in zip(*rows, strict=True)) for name, rows in members.items()}


def train_family(s_global, s_local, s_target, recipe: Recipe, seed: int, tick: Callable[[float], None] = lambda loss: None):
    """Eq. 9 on one family, inputs [c, l, d]: loss = (1/c) sum_i sum_j |pi(s_G, s_L) - s_T|_1, a sum over vectors and entries.

    Full-batch AdamW; torch's default (uniform) initialisation, as Algorithm 1 says. Returns the predictor and the loss of each epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TrajectoryPredictor(s_target.shape[-1], recipe.inputs).to(s_target.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs, eta_min=0.1 * recipe.learning_rate)
    losses = []
    for _ in range(recipe.epochs):
        loss = (model(s_global, s_local) - s_target).abs().sum() / len(s_target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        tick(losses[-1])
    return model, losses


# ---------------------------------------------------------------------------------------------------------------------------
# The recipe without a network
# ---------------------------------------------------------------------------------------------------------------------------


class WeightedSum(nn.Module):
    """What the recipe `weighted` learns: the three weights of `terms`, one for all matrices. A module, to be saved like the others."""

    def __init__(self, weights: torch.Tensor | None = None):
        super().__init__()
        self.register_buffer("weights", torch.zeros(3, dtype=torch.float64) if weights is None else weights)


def terms(steps: list[int], window: int) -> torch.Tensor:
    """[c, 3, 2 c]: at each of c checkpoints, three deltas as sums over the rank-1 ones (columns: the locals L, then the globals G):

        L_i,    the mean of the last `window` locals (of all there are before that),    G_i / i

    All three are what one checkpoint moved, by a shorter and a longer memory: the newest direction is the least stale and the noisiest.
    i counts from the backbone, and `steps` (evenly spaced) may begin later.
    """
    count = len(steps)
    mix = torch.zeros(count, 3, 2 * count, dtype=torch.float64)
    for i, step in enumerate(steps):
        first = max(0, i + 1 - window)
        mix[i, 0, i] = 1
        mix[i, 1, first : i + 1] = 1 / (i + 1 - first)
        mix[i, 2, count + i] = (steps[1] - steps[0]) / step
    return mix


def known_deltas(roles: dict[str, Triples]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One matrix's locals, then globals, in float64: u [2 c, m], sigma [2 c], v [2 c, n]."""
    return tuple(torch.cat([getattr(roles[role], part) for role in ("local", "global")]).double() for part in ("u", "sigma", "v"))


def fit_weights(trajectory: Trajectory, recipe: SumRecipe) -> WeightedSum:
    """The weights w that would have predicted the next local delta best, with T_i1, T_i2, T_i3 the terms at checkpoint i of a matrix:

        min over w of   mean of |sum_j w_j T_ij - L_(i+1)|^2 / |L_i|^2   +   ridge |w - prior|^2

    The mean is over matrices and over i = 2 .. c - 1, which count decay^(c - 1 - i). Next locals and not targets, because the last of them
    ends at c, while the last known target begins at c - k. No matrix is formed: <s u v^T, s' u' v'^T> = s s' (u . u') (v . v').
    """
    count = len(trajectory.steps)
    mix, pairs = terms(trajectory.steps, recipe.window), range(1, count - 1)
    left, right = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for roles in trajectory.deltas.values():
        u, sigma, v = known_deltas(roles)
        products = torch.outer(sigma, sigma) * (u @ u.T) * (v @ v.T)
        for i in pairs:
            if sigma[i] > 0:
                share = recipe.decay ** (count - 2 - i) / sigma[i] ** 2
                left += share * mix[i] @ products @ mix[i].T
                right += share * mix[i] @ products[:, i + 1]
    total = len(trajectory.deltas) * sum(recipe.decay ** (count - 2 - i) for i in pairs) or 1.0  # with two checkpoints the prior is all
    prior = torch.tensor(recipe.prior, dtype=torch.float64)
    return WeightedSum(torch.linalg.solve(left / total + recipe.ridge * torch.eye(3), right / total + recipe.ridge * prior))


def predict_sum(model: WeightedSum, trajectory: Trajectory, recipe: SumRecipe, at: int = -1) -> dict[str, tuple]:
    """Rank 1 of k times the weighted sum at checkpoint `at`: module -> (u [m], sigma, v [n]); a sum of rank-1 terms has an exact SVD."""
    weights = trajectory.k * model.weights.double() @ terms(trajectory.steps, recipe.window)[at]  # [2 c]
    return {module: tuple(x.float() for x in rank1_of_sum(*known_deltas(roles), weights)) for module, roles in trajectory.deltas.items()}


# ---------------------------------------------------------------------------------------------------------------------------
# Any recipe
# ---------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(models: dict[str, nn.Module], trajectory: Trajectory, recipe: AnyRecipe, at: int = -1) -> dict[str, tuple]:
    """The predicted target of every matrix from checkpoint `at`: module -> (u [m], sigma, v [n]), u and v of length 1 (Eq. 11).

    sigma is the network's own number, in the unit of the trajectory; it may come out negative, and is then kept so.
    """
    if isinstance(recipe, SumRecipe):
        return predict_sum(models["sum"], trajectory, recipe, at)
    prepared, units = prepare(trajectory, recipe)
    found = {}
    for module, roles in prepared.deltas.items():
        out = {}
        for side in ("u", "sigma", "v"):
            inputs = [getattr(roles[role], side)[at].reshape(-1) for role in ("global", "local")]
            if side == "sigma":
                inputs = [x / units[module] for x in inputs]
            out[side] = models[family(side, roles["global"])](*inputs)
        found[module] = (
            nn.functional.normalize(out["u"], dim=0),
            out["sigma"][0] * units[module],
            nn.functional.normalize(out["v"], dim=0),
        )
    return found
