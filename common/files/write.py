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
import sys

import safetensors.torch
import torch

from common import UserError, in_one_line
from common.files.read import HASHES, read_json, sha256, written_hashes

GO_ON = "type the same command without --overwrite to go on"

_claimed: dict[pathlib.Path, int] = {}  # folder -> its lock file, open


def writing(path: pathlib.Path):
    """Within the block, while `path` is written, a full disk becomes one line."""
    kinds = (OSError, safetensors.SafetensorError)
    return in_one_line(f"cannot write {path}", f"make room, then {GO_ON}", kinds)


def _beside(path: pathlib.Path, mark: str = "") -> pathlib.Path:
    return path.with_name(f".{path.name}{mark}.tmp")


def flush(path: pathlib.Path) -> None:
    """Flushes the file or folder `path` to the disk."""
    with writing(path):
        for part in [*path.iterdir(), path] if path.is_dir() else [path]:
            handle = os.open(part, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def _delete(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():  # on a read-only disk, unlink is an error even if there is nothing
        path.unlink()


def remove(path: pathlib.Path) -> None:
    """Removes a file or folder, if it is there. A kill leaves none of it under its own name."""
    old = _beside(path, ".old")
    with writing(path):
        _delete(old)
        if path.exists():
            os.replace(path, old)
            _delete(old)


@contextlib.contextmanager
def atomic_file(path: pathlib.Path):
    """Yields a temporary name. What is made there becomes `path` if the block ends well."""
    temporary = _beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            flush(temporary)
            if temporary.is_dir():  # a folder is not replaced in one step
                remove(path)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                _delete(temporary)  # a full disk needs the room


def write_text(path: pathlib.Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: pathlib.Path, text: str) -> None:
    """Adds `text` at the end of the file `path`. A kill may leave a part of the last line."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def write_json(path: pathlib.Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_tensors(path: pathlib.Path, tensors: dict, metadata=None, dtype=torch.float32) -> None:
    """Writes `tensors` to the safetensors file `path` in `dtype`; None keeps the dtype of each."""
    with atomic_file(path) as temporary:
        made = {name: x.to(dtype or x.dtype).contiguous() for name, x in tensors.items()}
        safetensors.torch.save_file(made, temporary, metadata=metadata)


def save_figure(path: pathlib.Path, figure) -> None:
    """Writes a matplotlib figure to the picture `path`."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, bbox_inches="tight")


def copy_files(paths: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Copies files into `folder`. Use it within `atomic_dir`."""
    for path in paths:
        shutil.copyfile(path, folder / path.name)


@contextlib.contextmanager
def atomic_dir(path: pathlib.Path, info: dict | None = None):
    """Yields an empty temporary folder, which becomes `path` if the block ends without an error.

    Hashes of the weights in it and of their configs go into its sha256.json, see `check_intact`;
    `info` into its checkpoint.json. If `path` is there it is replaced: for a moment there is none.
    """
    with atomic_file(path) as temporary:
        _delete(temporary)
        temporary.mkdir()
        yield temporary
        if info is not None:
            write_text(temporary / "checkpoint.json", json.dumps(info))
        if hashes := hashes_of(temporary, ("config.json", "adapter_config.json")):
            write_json(temporary / HASHES, hashes)


def hashes_of(folder: pathlib.Path, also: tuple[str, ...] = ()) -> dict[str, str]:
    """File -> hash of the weights and states in `folder`, if there are any, and of files `also`."""
    weights = [path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"]
    others = [folder / name for name in also if weights and (folder / name).is_file()]
    return {path.name: sha256(path) for path in sorted(weights + others)}


def free_bytes(path: pathlib.Path) -> int:
    """How much is free on the disk of `path`. The path itself need not exist yet."""
    path = pathlib.Path(os.path.abspath(path))
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def is_complete(folder: pathlib.Path) -> bool:
    """Whether every file is there whose hash was written when `folder` was."""
    return all((folder / name).is_file() for name in written_hashes(folder))


def is_made(path: pathlib.Path, record: dict) -> bool:
    """Whether the JSON file `path` is there and says `record`, and its folder has lost no file."""
    if not path.is_file() or not is_complete(path.parent):
        return False
    return record.items() <= read_json(path, "the stage that wrote it").items()


def claim(folder: pathlib.Path) -> None:
    """Locks `folder` for this process until `release`, and clears what a killed process left.

    The kernel's lock is on .<name>.lock beside the folder. It is gone however its process ends.
    Raises UserError where another process has it.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    if folder in _claimed:
        return
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process is writing {folder}: wait for it, or stop it") from None
    except OSError:
        print(f"warning: no locks here: keep a second process out of {folder}", file=sys.stderr)
    _claimed[folder] = handle
    for left in [_beside(folder), _beside(folder, ".old"), *folder.rglob(".*.tmp")]:
        with writing(left):
            _delete(left)


def release() -> None:
    """Gives back every folder that this process has claimed."""
    while _claimed:
        folder, handle = _claimed.popitem()
        with contextlib.suppress(OSError):
            folder.with_name(f".{folder.name}.lock").unlink()  # while it is still locked
        os.close(handle)
