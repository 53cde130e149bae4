"""Checkpoints and resume states of a training run, and how an interrupted run goes on from them.

Both are folders that appear whole or not at all. Two resume states are kept, in case one is spoilt.
"""

import contextlib
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable

import safetensors.torch
import torch

from common import UserError
from common.files import write
from common.files.adapters import read_info
from common.files.models import is_model
from common.files.read import check_intact, first_line, read_json, read_jsonl, safe_name, safe_path
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


@contextlib.contextmanager
def checkpoint(path: pathlib.Path, info: dict):
    """Yields an open folder for weights. It becomes `path`, with `info` in checkpoint.json."""
    with write.writing(path), write.atomic_dir(path, overwrite=True) as folder:
        yield folder
        write.write_text(folder / "checkpoint.json", json.dumps(info))


def states(folder: pathlib.Path) -> list[pathlib.Path]:
    """The resume states in `folder`, the newest last."""
    return sorted((folder / "resume").glob("step_[0-9]*"), key=step_of)


def save(folder: pathlib.Path, step: int, weights: dict, optimizer, stands_on: dict) -> None:
    """Writes folder/resume/step_NNNN, from the first process. The state before it is kept."""
    if not is_writer():
        return
    path = folder / "resume" / f"step_{step:04d}"
    for old in states(folder)[:-1]:
        write.remove(old)
    with write.writing(path), write.atomic_dir(path, overwrite=True) as state:
        tensors = {name: parameter.detach() for name, parameter in weights.items()}
        write.save_tensors(state / "weights.safetensors", tensors, dtype=None)
        write.save_state(state / "optimizer.pt", optimizer.state_dict())
        write.write_text(state / "info.json", json.dumps(stands_on))


def go_on(folder, first_step: int, every: int, stands_on: dict, put_back: Callable) -> int:
    """Calls put_back(weights, optimizer) with the newest whole state; returns its step.

    Returns first_step where nothing has been trained. `every` is the interval of the states. Raises
    UserError where no state is whole, where all are gone, or where one stands on something else.
    """
    found = states(folder)
    rows = []
    if (folder / "metrics.jsonl").is_file():
        rows = [row["step"] for row in read_jsonl(folder / "metrics.jsonl", {"step": int})]
    reached = max([0, *rows, *map(step_of, folder.glob("step_[0-9]*"))])
    if not found and reached > first_step + every:
        raise UserError(
            f"{folder} has come to step {reached}, but its resume/ is gone: put it back, or start "
            "again with --overwrite"
        )
    for state in reversed(found):
        try:
            _load(state, put_back)
        except Exception as error:  # whatever the libraries raise on a broken file
            reason = f"cannot load resume state {state}: {first_line(error)}"
            if state == found[0]:
                raise UserError(f"{reason}; start the stage again with --overwrite") from error
            before = found[found.index(state) - 1].name
            print(f"warning: {reason}; going on from {before}", file=sys.stderr)
            continue
        _check_same(state, stands_on)
        if is_writer():
            print(f"going on after step {step_of(state)}")
            for broken in found[found.index(state) + 1 :]:
                write.remove(broken)
        return step_of(state)
    return first_step


def _load(state: pathlib.Path, put_back: Callable[[dict, dict], None]) -> None:
    check_intact(state)
    weights = safetensors.torch.load_file(state / "weights.safetensors")
    put_back(weights, torch.load(state / "optimizer.pt", weights_only=True, map_location="cpu"))


def _check_same(state: pathlib.Path, stands_on: dict) -> None:
    """What info.json lacks does not count: older code did not note it."""
    path = state / "info.json"
    noted = read_json(path, AGAIN) if path.is_file() else {}
    for key in noted.keys() & stands_on.keys():
        if noted[key] != stands_on[key]:
            raise UserError(
                f"{state.parents[1]} was begun with {key} = {noted[key]!r}, now it is "
                f"{stands_on[key]!r}: bring back what it was"
            )


def find_start(run: pathlib.Path, name: str, backbone: str) -> tuple[pathlib.Path, int, str]:
    """(folder, step, base) of what stage 5 goes on from: extrapolated/<name>, or merged/... itself.

    base is the model that it is an adapter on, or that it is: one in the run directory, with
    {run_dir} for that, or `backbone`. A file of unknown origin chooses no other.
    """
    kind = "merged" if name.startswith("merged/") else "extrapolated"
    inside = f"{kind}/{safe_name(name.removeprefix('merged/'), '--start')}"
    start = run / inside
    if not start.is_dir():
        there = ", ".join(sorted(path.name for path in start.parent.glob("[!.]*"))) or "nothing"
        raise UserError(f"{start} not found: run 04_extrapolate.py first (there: {there})")
    info = read_info(start)
    step, base = info.get("step"), info.get("backbone") or backbone
    if step is None or step < 0:
        raise UserError(f"{start} has no usable step: run 04_extrapolate.py --overwrite")
    if is_model(start):
        return start, step, f"{{run_dir}}/{inside}"
    within = base.removeprefix("{run_dir}/")
    is_ours = within != base and (run / safe_path(within, f"{start}, backbone")).is_dir()
    return start, step, base if is_ours else backbone
