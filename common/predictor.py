"""The trajectory predictor of Sec. 4.2: from (global, local) to target (Eq. 8, 9, 11).

As in the official code, matrices share a predictor for each kind and length of vector ("u.64",
"v.192"), and one for all sigmas. Two recipes train the same network:

    paper      as the official code trains: signs as they came, sigma in its raw unit, AdamW 2e-5
    aligned    ours: consistent signs, sigma divided by the last global sigma, AdamW 3e-4

(u, v) and (-u, -v) are one singular pair: without alignment the signs of the targets are random. At
2e-5 the network is far from fitted after 1,000 epochs.
"""

import collections
import dataclasses
from collections.abc import Callable

import torch
from torch import nn

HIDDEN = 256  # as in the official code
ROLES = ("global", "local", "target")
SIDES = ("u", "v", "sigma")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How data are prepared and the network is trained: the paper leaves most of it open."""

    align: bool
    scale_sigma: bool
    learning_rate: float
    epochs: int = 1000  # full-batch steps of AdamW (torch's defaults), its rate falls to a tenth
    bf16: bool = False  # matrix products in bf16
    inputs: tuple[str, ...] = ("global", "local")  # what the network sees (Table 5 leaves one out)


RECIPES = {
    "paper": Recipe(align=False, scale_sigma=False, learning_rate=2e-5),
    "aligned": Recipe(align=True, scale_sigma=True, learning_rate=3e-4),
}


def block(d_in: int, d_out: int) -> nn.Sequential:
    """ "MLP layers and the activation function" (Sec. 4.2) as the official code reads it: two pairs
    of linear layers, one ReLU between them. A pair is one affine map of rank 256 or less."""
    first = (nn.Linear(d_in, HIDDEN), nn.Linear(HIDDEN, d_in))
    return nn.Sequential(*first, nn.ReLU(), nn.Linear(d_in, HIDDEN), nn.Linear(HIDDEN, d_out))


class TrajectoryPredictor(nn.Module):
    """Eq. 8: D(concat(E_G(s_G), E_L(s_L))) for vectors of length d. About 3840 d weights."""

    def __init__(self, d: int, inputs: tuple[str, ...] = ("global", "local")):
        super().__init__()
        self.encode_global = block(d, d) if "global" in inputs else None
        self.encode_local = block(d, d) if "local" in inputs else None
        self.decode = block(len(inputs) * d, d)

    def forward(self, s_global: torch.Tensor, s_local: torch.Tensor) -> torch.Tensor:
        """s_global, s_local [..., d] -> s_target [..., d], predicted (Eq. 8)."""
        pairs = ((self.encode_global, s_global), (self.encode_local, s_local))
        hidden = [encode(s) for encode, s in pairs if encode is not None]
        return self.decode(torch.cat(hidden, -1))


def prepare(trajectory, recipe: Recipe):
    """The trajectory as the recipe wants it, and the unit of each matrix's sigma.

    trajectory: deltas[module][role] with u [c, m], sigma [c], v [c, n]; .aligned() has consistent
    signs (common/files/deltas.py).
    """
    trajectory = trajectory.aligned() if recipe.align else trajectory
    units = {}
    for module, roles in trajectory.deltas.items():
        last = roles["global"].sigma[-1]
        units[module] = last if recipe.scale_sigma and last > 0 else torch.ones(())
    return trajectory, units


def vectors(triples, side: str, unit: torch.Tensor) -> torch.Tensor:
    """The u, sigma or v of one matrix's deltas as vectors [c, d]; a sigma has d = 1."""
    return (triples.sigma / unit)[:, None] if side == "sigma" else getattr(triples, side)


def family(side: str, rows: torch.Tensor) -> str:
    """The name of the predictor for the vectors `rows` [c, d]: "u.64", "v.192", "sigma"."""
    return side if side == "sigma" else f"{side}.{rows.shape[1]}"


def stack_families(trajectory, units: dict) -> dict[str, tuple[torch.Tensor, ...]]:
    """family -> (global, local, target), each [checkpoints with a target, members, d]."""
    members = collections.defaultdict(list)
    for module, roles in trajectory.deltas.items():
        count = len(roles["target"].sigma)
        for side in SIDES:
            rows = [vectors(roles[r], side, units[module])[:count] for r in ROLES]
            members[family(side, rows[0])].append(rows)
    by_role = {name: zip(*rows, strict=True) for name, rows in members.items()}
    return {name: tuple(torch.stack(r, 1) for r in roles) for name, roles in by_role.items()}


def train(families: dict, recipe: Recipe, seed: int, tick: Callable[[], None]) -> tuple[dict, ...]:
    """For each of `stack_families`: its predictor, Eq. 9 by epoch, Eq. 9 if the prediction were 0.
    tick() is called every epoch."""
    models, losses, zeros = {}, {}, {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, data in families.items():
        zeros[name] = float(data[2].abs().sum() / len(data[2]))
        data = tuple(part.to(device) for part in data)
        models[name], losses[name] = train_family(data, recipe, seed, tick)
    return models, losses, zeros


def train_family(data: tuple[torch.Tensor, ...], recipe: Recipe, seed: int, tick=lambda: None):
    """Eq. 9 on one family (global, local, target), [c - k, l, d] each. Returns the network and the
    loss of each epoch: |pi(s_G, s_L) - s_T|, summed over entries and vectors, mean over the c - k
    checkpoints that have a target (Alg. 1; Eq. 9 writes c). Full-batch AdamW, from torch's uniform
    initialisation (Alg. 1).
    """
    s_global, s_local, s_target = data
    torch.manual_seed(seed)
    model = TrajectoryPredictor(s_target.shape[-1], recipe.inputs).to(s_target.device)
    rate, losses = recipe.learning_rate, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs, 0.1 * rate)
    for _ in range(recipe.epochs):
        with torch.autocast(s_target.device.type, torch.bfloat16, recipe.bf16):
            error = model(s_global, s_local) - s_target
        loss = error.abs().sum() / len(s_target)  # Eq. 9
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        tick()
    return model.cpu(), losses


@torch.no_grad()
def predict(models: dict[str, nn.Module], trajectory, recipe: Recipe) -> dict[str, dict]:
    """The target delta of every matrix from the last checkpoint: module -> {"u": [m], "sigma": [],
    "v": [n]}, u and v of length 1 (Eq. 11)."""
    prepared, units = prepare(trajectory, recipe)
    found = {}
    for module, roles in prepared.deltas.items():
        out = {}
        for side in SIDES:
            seen = [vectors(roles[role], side, units[module]) for role in ("global", "local")]
            out[side] = models[family(side, seen[0])](seen[0][-1], seen[1][-1])  # Eq. 8
        for side in ("u", "v"):
            out[side] = nn.functional.normalize(out[side], dim=0)  # Eq. 11
        out["sigma"] = out["sigma"][0] * units[module] * (roles["global"].sigma[-1] > 0)
        found[module] = out
    return found
