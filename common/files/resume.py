"""Checkpoints and resume states of a training run, and how an interrupted run goes on from them.

Both are folders that appear whole or not at all. Two resume states are kept, in case one is spoilt.
"""

import hashlib
import json
import pathlib
import sys

import safetensors.torch
import torch

from common import UserError
from common.files import write
from common.files.read import check_intact, read_json, read_jsonl
from common.files.series import step_of
from common.files.stage import AGAIN, is_writer

ENDS = 1 << 20  # bytes at either end of a file of weights that its quick hash covers


def quick_hash(name: str) -> str | None:
    """16 hex digits of config.json and both ends of every file of weights; None for a hub id."""
    if not pathlib.Path(name).is_dir():
        return None
    digest, folder = hashlib.sha256(), pathlib.Path(name)
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        with open(path, "rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode() + file.read(ENDS))
            file.seek(max(size - ENDS, 0))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def states(folder: pathlib.Path) -> list[pathlib.Path]:
    """The resume states in `folder`, the newest last."""
    return sorted((folder / "resume").glob("step_[0-9]*"), key=step_of)


def save(folder: pathlib.Path, step: int, weights: dict, optimizer, stands_on: dict) -> None:
    """Writes folder/resume/step_NNNN, from the first process. The state before it is kept."""
    if not is_writer():
        return
    path = folder / "resume" / f"step_{step:04d}"
    for log in folder.glob("*.jsonl"):  # this state counts on their rows
        write.flush(log)
    for old in states(folder)[:-1]:
        write.remove(old)
    with write.atomic_dir(path) as state:
        tensors = {name: parameter.detach() for name, parameter in weights.items()}
        write.save_tensors(state / "weights.safetensors", tensors, dtype=None)
        write.save_state(state / "optimizer.pt", optimizer.state_dict())
        write.write_text(state / "info.json", json.dumps(stands_on))


def go_on(folder, first_step: int, every: int, stands_on: dict, model, optimizer) -> int:
    """Puts the newest whole state back into model and optimizer; returns its step.

    Returns first_step where nothing has been trained. `every` is the interval of the states. Raises
    UserError where no state is whole, where all are gone, or where one stands on something else.
    """
    found, log = states(folder), folder / "metrics.jsonl"
    rows = read_jsonl(log, {"step": int}) if log.is_file() else []
    reached = max([0, *(row["step"] for row in rows), *map(step_of, folder.glob("step_[0-9]*"))])
    if not found and reached > first_step + every:
        raise UserError(f"{folder} has come to step {reached}, but its resume/ is gone")
    while found:
        state = found.pop()
        try:
            check_intact(state)
            weights = safetensors.torch.load_file(state / "weights.safetensors")
            moments = torch.load(state / "optimizer.pt", weights_only=True, map_location="cpu")
            if weights.keys() != {n for n, p in model.named_parameters() if p.requires_grad}:
                raise ValueError("it is not of this policy")
            model.load_state_dict(weights, strict=False)
            optimizer.load_state_dict(moments)
        except Exception as error:  # whatever the libraries raise on a broken file
            reason = f"cannot load resume state {state}: {error}"
            if not found:
                raise UserError(f"{reason}; start again with --overwrite") from error
            print(f"warning: {reason}; going on from {found[-1].name}", file=sys.stderr)
            continue
        noted = read_json(state / "info.json", AGAIN)
        for key in noted.keys() & stands_on.keys():
            if (old := noted[key]) != (new := stands_on[key]):
                raise UserError(f"{folder} was begun with {key} = {old!r}, now it is {new!r}")
        if is_writer():
            print(f"going on after step {step_of(state)}")
            for broken in states(folder)[len(found) + 1 :]:
                write.remove(broken)
        return step_of(state)
    return first_step
