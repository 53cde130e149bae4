"""What stage 2 left in <run>/deltas, checked when it is read: the rank-1 deltas, and which checkpoints they were made from."""

import os
import pathlib

import safetensors.torch
import torch

from common import UserError
from common.files.read import check_intact, matches, read_json, reading, safe_path
from common.rank1 import ROLES, Trajectory, Triples


def load_trajectory(folder: pathlib.Path) -> Trajectory:
    """Reads what 02_extract_deltas.py wrote to `folder`; signs are as LAPACK left them. Raises UserError where it is not that."""
    index = read_json(folder / "index.json", "02_extract_deltas.py", {"steps": list[int], "k": int, "modules": list[str]})
    steps, k = index["steps"], index["k"]
    if not 1 <= k < len(steps) or not index["modules"] or steps[0] < 1 or steps != sorted({*steps}):
        raise UserError(f"{folder}/index.json has no usable steps, k and modules: run 02_extract_deltas.py --overwrite")
    path = folder / "rank1.safetensors"
    with reading(path, "run 02_extract_deltas.py --overwrite"):
        tensors = safetensors.torch.load_file(path)
    check_intact(folder)
    deltas, counts = {}, {"global": len(steps), "local": len(steps), "target": len(steps) - k}
    for module in index["modules"]:
        parts = {role: [tensors.get(f"{role}.{module}.{part}", torch.empty(0)) for part in ("u", "sigma", "v")] for role in ROLES}
        m, n = (parts["global"][i].shape[1:] for i in (0, 2))
        for role, found in parts.items():
            wanted = [(counts[role], *m), (counts[role],), (counts[role], *n)]
            if [t.shape for t in found] != wanted or not all(t.numel() and t.dtype == torch.float32 and t.isfinite().all() for t in found):
                raise UserError(f"{path} does not hold the {role} deltas of {module}: run 02_extract_deltas.py --overwrite")
        deltas[module] = {role: Triples(*found) for role, found in parts.items()}
    return Trajectory(steps, k, deltas)


def checkpoint_paths(run: pathlib.Path) -> dict[int, pathlib.Path]:
    """The checkpoints that the deltas of the run directory `run` were made from, by step, in order."""
    index = read_json(run / "deltas" / "index.json", "02_extract_deltas.py")
    if "checkpoints" not in index:
        raise UserError(f"{run}/deltas/index.json does not say where its checkpoints are: run 02_extract_deltas.py --overwrite")
    found = index["checkpoints"]
    if not matches(found, dict[str, str]) or [str(step) for step in index.get("steps", [])] != list(found):
        raise UserError(f"{run}/deltas/index.json has no usable checkpoints: run 02_extract_deltas.py --overwrite")
    return {  # those elsewhere are absolute
        int(step): pathlib.Path(path) if os.path.isabs(path) else run / safe_path(path, f"{run}/deltas/index.json, checkpoints")
        for step, path in found.items()
    }


def kind_of(run: pathlib.Path) -> str:
    """What the deltas of the run directory `run` were made from: "lora" or "full"."""
    return read_json(run / "deltas" / "index.json", "02_extract_deltas.py").get("kind", "lora")


def read_spectrum(folder: pathlib.Path) -> dict:
    """What stage 2 measured of the deltas in `folder` (Sec. 3): energy ratios by step, and the R^2 of every vector."""
    kinds = {
        "steps": list[int],
        **dict.fromkeys(("energy_ratio", "energy_ratio_squared"), list[float]),
        "energy_ratio_by_module": dict[str, list[float]],
        "linear_fit": list[dict],
    }
    found = read_json(folder / "spectrum.json", "02_extract_deltas.py --overwrite", kinds)
    numbers = [row.get(key) for row in found["linear_fit"] for key in ("held_out", "in_sample")]  # -inf too, for what does not move
    lengths = {len(found["steps"])} | {len(row) for row in [found["energy_ratio"], *found["energy_ratio_by_module"].values()]}
    some = found["steps"] and found["linear_fit"] and found["energy_ratio_by_module"]
    if not some or len(lengths) > 1 or not all(isinstance(number, int | float) for number in numbers):
        raise UserError(f"{folder}/spectrum.json has not one number a step: run 02_extract_deltas.py --overwrite")
    return found
