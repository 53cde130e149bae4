"""Reading files. One that is missing or cannot be read is a UserError of one line."""

import contextlib
import hashlib
import json
import pathlib
import re
import types
import typing
from collections.abc import Iterator

import safetensors

from common import UserError, in_one_line

HASHES = "sha256.json"  # beside weights that we write: file -> its hash
ENDS = 1 << 20  # bytes at either end of a file of weights that its quick hash covers


def safe_name(name: str, what: str) -> str:
    """Returns `name` if it can name a file in a folder; else raises UserError about `what`."""
    if not name.isprintable() or {"/", "\\"} & {*name} or name[:1] in ("", "."):
        raise UserError(f"{what}: {name!r} cannot be a name here: no slash, and no dot in front")
    return name


def matches(value: object, kind: object) -> bool:
    """Whether a value from JSON or YAML is of `kind`: a type annotation, or a dict of kinds by key.

    An int is also a float; a bool is neither.
    """
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(matches(value.get(key), kind[key]) for key in kind)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list) and all(matches(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            matches(key, parts[0]) and matches(item, parts[1]) for key, item in value.items()
        )
    return kind is object or type(value) is kind or (kind is float and type(value) is int)


def read_json(path: pathlib.Path, made_by: str, wanted: dict | None = None) -> dict:
    """The JSON object in the file `path`. `wanted` gives the kinds of some keys, see `matches`.

    `made_by` names the command that writes the file, for the message when it is missing or broken.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run {made_by} first")
    with in_one_line(f"{path} is not valid JSON", f"delete it, run {made_by}", ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: delete it, run {made_by}")
    for key, kind in (wanted or {}).items():
        if not matches(value, {key: kind}):
            raise UserError(f"{path} has no usable {key}: delete it, run {made_by}")
    return value


def json_lines(path: pathlib.Path, is_log: bool = False) -> Iterator[tuple[str, object]]:
    """Yields (place for messages, value) of a JSONL file; of a log without a last half line."""
    place = f"{path}, line 1"
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}, line {number}"
                if line.endswith("\n") if is_log else line.strip():
                    yield place, json.loads(line)
    except (ValueError, OSError) as error:
        raise UserError(f"{place}: cannot be read as JSON in UTF-8 ({error})") from error


def read_jsonl(path: pathlib.Path, wanted: dict | None = None) -> list[dict]:
    """The rows of a JSONL log, without a last line that was cut off. `wanted`: see `read_json`."""
    rows = []
    for place, row in json_lines(path, is_log=True):
        if not matches(row, wanted or {}):
            raise UserError(f"{place}: not a row with {', '.join(wanted or ())}")
        rows.append(row)
    return rows


@contextlib.contextmanager
def open_tensors(path: pathlib.Path, advice: str):
    """An open safetensors file. Where it is broken, one line says so and ends in `advice`."""
    kinds = (safetensors.SafetensorError, OSError)
    with in_one_line(f"{path} is broken", advice, kinds), safetensors.safe_open(path, "pt") as file:
        yield file


def sha256(path: pathlib.Path) -> str:
    """The first 16 hex digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def step_of(path: pathlib.Path) -> int | None:
    """The step in the last name of `path` that ends in one: checkpoint-20, step_0020,
    global_step_20/actor/lora_adapter. None without such a name: job-7/final."""
    found = [re.search(r"(?:checkpoint|ckpt|step|iter)[-_](\d+)$", part) for part in path.parts]
    return next((int(match[1]) for match in reversed(found) if match), None)


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


def written_hashes(folder: pathlib.Path) -> dict[str, str]:
    """File -> hash when we wrote `folder`, by its sha256.json or done.json. Empty for another's."""
    if (folder / HASHES).is_file():
        return read_json(folder / HASHES, "what wrote it")
    if (folder / "done.json").is_file():
        return read_json(folder / "done.json", "the stage that wrote it").get("outputs", {})
    return {}


def check_intact(folder: pathlib.Path) -> None:
    """Raises UserError where a file in `folder` is not bit for bit what we wrote there."""
    for name, wanted in written_hashes(folder).items():
        if (path := folder / name).is_file() and sha256(path) != wanted:
            raise UserError(f"{path} is not as it was written: put a good copy there")
