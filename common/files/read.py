"""Reading what others may have written, or a bad disk may have spoilt: checked before it is used, and what is wrong is one line.

Names are checked before they become paths (`safe_name`), JSON for its size, depth and types, weights for being what was written
(`check_intact`).
"""

import contextlib
import hashlib
import json
import pathlib
import types
import typing

import safetensors

from common import UserError

JSON_LIMIT = 50 * 2**20  # bytes of a JSON file; an index.json of ours has 0.2 kB a matrix and checkpoint
LINE_LIMIT = 10 * 2**20  # characters of a line of JSONL
DEPTH = 100  # of nested JSON; ours has 4. Python's own limit is that of its stack, which differs from place to place
HASHES = "sha256.json"  # beside weights of ours: file -> its hash


def safe_name(name: str, what: str) -> str:
    """`name` if it can name a file or folder in a folder of ours; `what` it names is for the message. Raises UserError for any other.

    >>> safe_name("next-weighted_alpha1.5", "--start")
    'next-weighted_alpha1.5'
    """
    if not name.isprintable() or not name or name.startswith(".") or {"/", "\\"} & {*name} or len(name.encode()) > 200:
        raise UserError(f"{what}: {name[:80]!r} cannot be a name here: want up to 200 letters, none of them a slash and no dot in front")
    return name


def safe_path(path: str, what: str) -> str:
    """The same for a path below a folder of ours, like train/step_0010."""
    return "/".join(safe_name(part, what) for part in path.split("/"))


def matches(value: object, kind: object) -> bool:
    """Whether a value from JSON or YAML is of `kind`: a type annotation, or a dict that gives the kinds of some keys.

    An int will do for a float, a bool for neither. Integers must fit in 64 bits, and the square of any other number.

    >>> matches({"k": 5, "steps": [10, 20]}, {"k": int, "steps": list[int]}), matches({"k": True}, {"k": int})
    (True, False)
    """
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(matches(value.get(key), wanted) for key, wanted in kind.items())
    if kind in (int, float):
        number = int if kind is int else int | float
        return isinstance(value, number) and not isinstance(value, bool) and not abs(value) >= (2**63 if kind is int else 1e100)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list) and all(matches(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches(key, parts[0]) and matches(item, parts[1]) for key, item in value.items())
    if kind is types.NoneType:
        return value is None
    return kind is object or type(value) is kind


def parse_json(text: str) -> object:
    """json.loads of what others wrote. Raises ValueError also for deep nesting and for text that is no Unicode (half a surrogate pair)."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not _is_shallow(value, DEPTH):
        raise ValueError(f"nested over {DEPTH} deep")
    if "\\ud" in text or "\\uD" in text:  # what else could be no Unicode was refused when the file was decoded
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _is_shallow(value: object, depth: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []  # all that is nested so deep; without recursion, it may be millions
    for _ in range(depth):
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item) if isinstance(part, dict | list)]
    return not level


def read_json(path: pathlib.Path, made_by: str, wanted: dict | None = None) -> dict:
    """The JSON object in the file `path`; `made_by` names the command that writes it, for the message when it is missing or broken.

    `wanted` gives the kinds of the keys that the caller uses, see `matches`.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run {made_by} first")
    if (size := path.stat().st_size) > JSON_LIMIT:
        raise UserError(f"{path} has {size >> 20} MB, over the limit of {JSON_LIMIT >> 20}: delete it and run {made_by} again")
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run {made_by} again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: delete it and run {made_by} again")
    for key, kind in (wanted or {}).items():
        if not matches(value.get(key), kind):
            raise UserError(f"{path} has no usable {key}: delete it and run {made_by} again")
    return value


def text_lines(path: pathlib.Path):
    """(number, line with its end) of a UTF-8 text file, one in memory at a time. Raises UserError for a line over `LINE_LIMIT`."""
    with open(path, encoding="utf-8") as file:
        number = 0
        try:
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise UserError(f"{path}, line {number}: over {LINE_LIMIT >> 20} million characters")
                yield number, line
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from error


def read_jsonl(path: pathlib.Path, wanted: dict | None = None) -> list[dict]:
    """The rows of a JSONL log; a last line that was cut off by a kill is left out. `wanted` as in `read_json`."""
    rows = []
    for number, line in text_lines(path):
        if line.endswith("\n") and line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
            if not matches(row, wanted or {}):
                raise UserError(f"{path}, line {number}: not a row with {', '.join(wanted or ['keys'])}")
            rows.append(row)
    return rows


def first_line(error: BaseException) -> str:
    """What an error of a library says, for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def reading(path: pathlib.Path, advice: str):
    """Turns what safetensors raises on the broken file `path` into one line that names it and ends in `advice`."""
    try:
        yield
    except (OSError, safetensors.SafetensorError, RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is broken ({first_line(error)}): {advice}") from error


def sha256(path: pathlib.Path) -> str:
    """The hash of a file, first 16 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_intact(folder: pathlib.Path) -> None:
    """Raises UserError where a file in `folder` is not bit for bit what was written there: by sha256.json, or a stage's done.json.

    What others wrote has no such record to compare with.
    """
    if (folder / HASHES).is_file():
        written = read_json(folder / HASHES, "whatever wrote it")
    elif (folder / "done.json").is_file():
        written = read_json(folder / "done.json", "the stage that wrote it with --overwrite").get("outputs", {})
    else:
        return
    if not matches(written, dict[str, str]):
        raise UserError(f"{folder} has no usable hashes of its files ({HASHES} or done.json): make the folder again")
    for name, wanted in written.items():
        path = folder / safe_name(name, f"{folder}/{HASHES}")
        if path.is_file() and sha256(path) != wanted:
            raise UserError(f"{path} is not as it was written, by a bad disk or by hand: put a good copy there, or make it again")
