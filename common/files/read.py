"""Reading files that others made or a bad disk spoilt. What is wrong is a UserError of one line."""

import contextlib
import hashlib
import json
import pathlib
import types
import typing

import safetensors

from common import UserError

HASHES = "sha256.json"  # beside weights that we write: file -> its hash


def safe_name(name: str, what: str) -> str:
    """Returns `name` if it can name a file in a folder; else raises UserError about `what`."""
    fine = name and name.isprintable() and not {"/", "\\"} & {*name} and name[0] != "."
    if not fine or len(name.encode()) > 200:
        rule = "want up to 200 letters, no slash, and no dot in front"
        raise UserError(f"{what}: {name[:80]!r} cannot be a name here: {rule}")
    return name


def safe_path(path: str, what: str) -> str:
    """The same for a path below a folder, like train/step_0010."""
    return "/".join(safe_name(part, what) for part in path.split("/"))


def matches(value: object, kind: object) -> bool:
    """Whether a value from JSON or YAML is of `kind`: a type annotation, or a dict of kinds by key.

    An int is also a float; a bool is neither. An int has 64 bits, and a float can be squared.
    """
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(matches(value.get(key), kind[key]) for key in kind)
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return number and not abs(value) >= (2**63 if kind is int else 1e100)  # NaN is a float
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list) and all(matches(item, parts[0]) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            return False
        return all(matches(key, parts[0]) and matches(value[key], parts[1]) for key in value)
    return kind is object or type(value) is kind


def parse_json(text: str) -> object:
    """json.loads. Raises ValueError also for deep nesting and for half a surrogate pair."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_json(path: pathlib.Path, made_by: str, wanted: dict | None = None) -> dict:
    """The JSON object in the file `path`. `wanted` gives the kinds of some keys, see `matches`.

    `made_by` names the command that writes the file, for the message when it is missing or broken.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run {made_by} first")
    again = f"delete it and run {made_by} again"
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): {again}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {again}")
    for key, kind in (wanted or {}).items():
        if not matches(value.get(key), kind):
            raise UserError(f"{path} has no usable {key}: {again}")
    return value


def text_lines(path: pathlib.Path):
    """Yields (number, line with its end) of a UTF-8 text file, one line in memory at a time."""
    with open(path, encoding="utf-8") as file:
        try:
            yield from enumerate(file, 1)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from error


def read_jsonl(path: pathlib.Path, wanted: dict | None = None) -> list[dict]:
    """The rows of a JSONL log, without a last line that was cut off. `wanted`: see `read_json`."""
    rows = []
    for number, line in text_lines(path):
        if line.endswith("\n") and line.strip():
            try:
                rows.append(parse_json(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
            if not matches(rows[-1], wanted or {}):
                keys = ", ".join(wanted or ["keys"])
                raise UserError(f"{path}, line {number}: not a row with {keys}")
    return rows


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def reading(path: pathlib.Path, advice: str):
    """Turns what safetensors raises on a broken `path` into one line that ends in `advice`."""
    broken = (OSError, RuntimeError, ValueError, LookupError, AttributeError, TypeError)
    try:
        yield
    except (safetensors.SafetensorError, *broken) as error:
        raise UserError(f"{path} is broken ({first_line(error)}): {advice}") from error


def sha256(path: pathlib.Path) -> str:
    """The first 16 hex digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def written_hashes(folder: pathlib.Path) -> dict[str, str]:
    """File -> hash when we wrote `folder`, by its sha256.json or done.json. Empty for another's."""
    record, written = folder / HASHES, {}
    if record.is_file():
        written = read_json(record, "what wrote it")
    elif (record := folder / "done.json").is_file():
        written = read_json(record, "the stage that wrote it with --overwrite").get("outputs") or {}
    if not matches(written, dict[str, str]):
        raise UserError(f"{record} has no usable hashes: make the folder again")
    return {safe_name(name, str(record)): value for name, value in written.items()}


def check_intact(folder: pathlib.Path) -> None:
    """Raises UserError where a file in `folder` is not bit for bit what we wrote there."""
    for name, wanted in written_hashes(folder).items():
        if (path := folder / name).is_file() and sha256(path) != wanted:
            cause = "is not as it was written, by a bad disk or by hand"
            raise UserError(f"{path} {cause}: put a good copy there, or make it again")
