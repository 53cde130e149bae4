"""What a training leaves as it goes: a log with a row a step, and the states that it goes on from.

Of the resume states two are kept, in case one is spoilt. Those of a sharded model hold whole
tensors, so any number of processes can go on with them.
"""

import collections
import json
import pathlib
import sys

import safetensors
import torch
from accelerate.utils import gather_object
from huggingface_hub import split_state_dict_into_shards_factory
from torch.distributed.tensor import DTensor, distribute_tensor

from common import UserError
from common.files import stage, write
from common.files.read import check_intact, read_json, read_jsonl, step_of
from common.files.stage import first_alone, is_writer

FILE = 5 * 10**9  # bytes of a file, about: so much of a sharded model is whole at one time


class StepLog:
    """A JSONL file with a row a step, by the first process. Rows after `keep_to` are dropped."""

    def __init__(self, path: pathlib.Path, keep_to: int):
        self.path = path
        if is_writer():
            rows = read_jsonl(path, {"step": int}) if path.exists() else []
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= keep_to]
            write.write_text(path, "".join(kept))

    def append(self, *rows: dict) -> None:
        if is_writer():
            write.append_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def states(folder: pathlib.Path) -> list[pathlib.Path]:
    """The resume states in `folder`, the newest last."""
    return sorted((folder / "resume").glob("step_[0-9]*"), key=step_of)


def save_state(folder: pathlib.Path, step: int, weights: dict, optimizer, stands_on: dict) -> None:
    """Writes folder/resume/step_NNNN. Every process takes part. The state before it is kept too."""
    tensors = {name: parameter.detach() for name, parameter in weights.items()}
    for name, parameter in weights.items():  # one that never had a gradient has no moments
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{name}/{kind}": moment for kind, moment in sorted(moments.items())}
    if is_writer():
        for log in folder.glob("*.jsonl"):  # this state counts on their rows
            write.flush(log)
        for old in states(folder)[:-1]:
            write.remove(old)
    path = folder / "resume" / f"step_{step:04d}"
    with first_alone(write.atomic_dir(path)) as open_folder:
        save_parts(open_folder, "state", tensors)
        if open_folder:
            write.write_text(open_folder / "info.json", json.dumps(stands_on))


def save_parts(folder: pathlib.Path | None, name: str, tensors: dict):
    """Writes `tensors` to <name>.safetensors in `folder`, or to several files.

    Returns which file has which tensor. Every process takes part; the first one writes, the others
    have no folder.
    """
    how = {"filename_pattern": name + "{suffix}.safetensors", "max_shard_size": FILE}
    plan = split_state_dict_into_shards_factory(tensors, get_storage_size=lambda x: x.nbytes, **how)
    for file, names in plan.filename_to_tensors.items():
        part = {one: tensors[one] for one in names}
        for one, tensor in part.items():
            if isinstance(tensor, DTensor):  # whole on the first process's CPU
                whole = tensor.full_tensor()
                part[one] = whole.cpu() if folder else None
        if folder:
            write.save_tensors(folder / file, part, {"format": "pt"}, dtype=None)
    return plan


def go_on(folder, first_step: int, cfg, stands_on: dict, model, optimizer) -> int:
    """Puts the newest whole state back into model and optimizer; returns its step.

    cfg: the stage's options. Returns first_step where nothing has been trained. Raises UserError
    where no state is whole, where all are gone, or where one was made with another backbone,
    template, data or reward file, where it has come further than cfg.steps, and where not all
    processes have read the same one: on several machines a shared disk may be late.
    """
    found, log, step = states(folder), folder / "metrics.jsonl", first_step
    rows = read_jsonl(log, {"step": int}) if log.is_file() else []
    reached = max([0, *(row["step"] for row in rows), *map(step_of, folder.glob("step_[0-9]*"))])
    if not found and reached > first_step + cfg.resume_every:
        what = f"{folder} has come to step {reached}, and there is no resume state"
        raise UserError(f"{what}: put its resume/ back, or start again with --overwrite")
    while found:
        state = found.pop()
        try:
            put_back(state, model, optimizer)
        except Exception as error:
            if stage.signals:  # interrupted, not broken
                raise
            reason = f"cannot load resume state {state}: {error}"
            if not found:
                raise UserError(f"{reason}; start again with --overwrite") from error
            print(f"warning: {reason}; going on from {found[-1].name}", file=sys.stderr)
            continue
        noted = read_json(state / "info.json", stage.AGAIN)
        for key in noted.keys() & stands_on.keys():
            if (old := noted[key]) != (new := stands_on[key]):
                raise UserError(f"{folder} was begun with {key} = {old!r}, now it is {new!r}")
        step, last = step_of(state), folder / f"step_{cfg.steps:04d}"
        if step >= cfg.steps and not last.is_dir():
            raise UserError(f"{folder} is at step {step}, without a {last.name}: more --steps")
        for broken in states(folder)[len(found) + 1 :] if is_writer() else ():
            write.remove(broken)
        break
    if len(read := {*gather_object([step])}) > 1:
        raise UserError(f"{folder}: processes go on from different steps {sorted(read)}: try again")
    if step > first_step and is_writer():
        print(f"going on after step {step}")
    return step


def put_back(state: pathlib.Path, model, optimizer) -> None:
    """Loads the resume state in the folder `state`. Raises whatever the libraries raise on a broken
    one, and ValueError for one of another policy."""
    check_intact(state)
    if not write.is_complete(state):
        raise ValueError("it has lost a file")
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    saved = collections.defaultdict(dict)  # parameter -> its weight as "", its moments
    for part in sorted(state.glob("*.safetensors")):
        with safetensors.safe_open(part, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (a safe_open is no dict)
                name, _, kind = key.partition("/")
                saved[name][kind] = dealt(file.get_tensor(key), own.get(name))
    if saved.keys() != own.keys():
        raise ValueError("it is not of this policy")
    model.load_state_dict({name: parts.pop("") for name, parts in saved.items()}, strict=False)
    # This run decides how AdamW computes, not the run that wrote the state.
    moments = {index: saved[name] for index, name in enumerate(own)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def dealt(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor sharded like `parameter`, if that is sharded and of the same shape."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    how = (parameter.device_mesh, parameter.placements)
    return distribute_tensor(tensor.to(parameter.device), *how, src_data_rank=None)
