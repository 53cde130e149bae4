"""What stage 2 leaves in <run>/deltas, the rank-1 deltas of every matrix; what stage 3 predicts."""

import dataclasses
import hashlib
import json
import pathlib

import torch

from common import UserError
from common.files.read import check_intact, open_tensors, read_json, safe_name
from common.rank1 import ROLES, LowRank, rank1

STAGE = "02_extract_deltas.py"
AGAIN = "run 02_extract_deltas.py --overwrite"


@dataclasses.dataclass
class Triples:
    """One kind of delta of one matrix by checkpoint: u [c, m], sigma [c], v [c, n]."""

    u: torch.Tensor
    sigma: torch.Tensor
    v: torch.Tensor

    def __len__(self) -> int:
        return len(self.sigma)

    def __getitem__(self, i: int | slice) -> "LowRank | Triples":
        """sigma u v^T of checkpoint i; the triples of a slice of checkpoints."""
        parts = (self.u[i], self.sigma[i], self.v[i])
        return Triples(*parts) if isinstance(i, slice) else rank1(*parts)


def align(u, v, reference_u, reference_v):
    """(u, v) and (-u, -v) are one singular pair: takes the one that points towards the reference.

    u [..., m], v [..., n]; the sign is that of <u, u_ref> + <v, v_ref>.
    """
    agreement = (u * reference_u).sum(-1, keepdim=True) + (v * reference_v).sum(-1, keepdim=True)
    sign = torch.where(agreement < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, v * sign


def align_roles(roles: dict[str, Triples]) -> dict[str, Triples]:
    """One matrix's deltas with consistent signs: the global ones backwards from the last
    checkpoint, local and target ones towards the global delta of their checkpoint."""
    u, v = roles["global"].u.clone(), roles["global"].v.clone()
    for i in range(len(u) - 2, -1, -1):
        u[i], v[i] = align(u[i], v[i], u[i + 1], v[i + 1])
    found = {"global": Triples(u, roles["global"].sigma, v)}
    for role in ("local", "target"):
        t, count = roles[role], len(roles[role])
        turned_u, turned_v = align(t.u, t.v, u[:count], v[:count])
        found[role] = Triples(turned_u, t.sigma, turned_v)
    return found


@dataclasses.dataclass
class Trajectory:
    """deltas[module][role] are Triples over `steps`, the targets over the first len(steps) - k."""

    steps: list[int]
    k: int
    deltas: dict[str, dict[str, Triples]]

    def aligned(self) -> "Trajectory":
        """The same with consistent signs."""
        deltas = {module: align_roles(roles) for module, roles in self.deltas.items()}
        return Trajectory(self.steps, self.k, deltas)

    def until(self, end: int, begin: int = 0) -> "Trajectory":
        """Checkpoints `begin` to `end`: what was known of them when there were `end` of them."""
        ends = {"global": end, "local": end, "target": max(end - self.k, 0)}
        deltas = {
            module: {role: t[begin : ends[role]] for role, t in roles.items()}
            for module, roles in self.deltas.items()
        }
        return Trajectory(self.steps[begin:end], self.k, deltas)

    def last(self, count: int) -> "Trajectory":
        """The last `count` checkpoints, and the targets that begin at one of them: count - k."""
        return self.until(len(self.steps), max(len(self.steps) - count, 0))


def load_trajectory(folder: pathlib.Path) -> Trajectory:
    """The deltas in `folder`, with their stored signs. Raises UserError where they are spoilt."""
    index, deltas = read_index(folder), {}
    check_intact(folder)
    for module in index["modules"]:
        with open_tensors(folder / f"{module}.safetensors", AGAIN) as file:
            get = file.get_tensor
            deltas[module] = {
                role: Triples(*(get(f"{role}.{part}") for part in ("u", "sigma", "v")))
                for role in ROLES
            }
    return Trajectory(index["steps"], index["k"], deltas)


def fingerprint(folder: pathlib.Path) -> str:
    """A hash of the deltas in `folder` and of what they were made from."""
    done = read_json(folder / "done.json", STAGE, {"inputs": dict, "outputs": dict})
    text = json.dumps([done["inputs"], done["outputs"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_index(folder: pathlib.Path) -> dict:
    """index.json of the deltas in `folder`: steps, checkpoints (step -> path), k, modules."""
    return read_json(folder / "index.json", STAGE)


def check_predicted(run: pathlib.Path, recipe: str) -> pathlib.Path:
    """The file with what stage 3 predicted by `recipe`. UserError where the deltas have changed."""
    folder = run / "predictor" / safe_name(recipe, "a recipe")
    done = read_json(folder / "done.json", "03_train_predictor.py", {"inputs": {"deltas": str}})
    if done["inputs"]["deltas"] != fingerprint(run / "deltas"):
        raise UserError(f"{folder} was trained on other deltas: run stage 3 with --overwrite")
    check_intact(folder)
    return folder / "predicted.safetensors"


def load_predicted(path: pathlib.Path) -> dict[str, dict[str, torch.Tensor]]:
    """module -> {"u": [m], "sigma": [], "v": [n]}: the predicted next target (Eq. 8, 11)."""
    found = {}
    with open_tensors(path, "run 03_train_predictor.py --overwrite") as file:
        for name in file.keys():  # noqa: SIM118  (a safe_open is no dict)
            module, side = name.rsplit(".", 1)
            found.setdefault(module, {})[side] = file.get_tensor(name)
    return found
