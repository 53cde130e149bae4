"""The data sets of benchmarks.yaml, and the rows of any data set: of a file, folder or the hub."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator

import yaml

from common import UserError, in_one_line
from common.files.read import json_lines

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SUITES = ("maths", "gpqa", "mmlu-pro")  # only tasks of one suite are averaged
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where problems are and what their columns are; benchmarks.yaml explains the fields."""

    hub_id: str
    split: str = "train"  # of a hub id that is not in benchmarks.yaml
    kind: str = "latex"
    prompt: str = "prompt"  # columns; "a.b" is the key b of column a
    answer: str = "answer"
    file: str = ""
    rows: int = 0
    revision: str | None = None
    gated: bool = False
    template: str | None = None
    around: tuple[str, str] = ("", "")  # the question in its column
    part: str = ""  # column; rows with one value of it are a task of their own


_LISTED = pathlib.Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
SOURCES = {name: Source(**fields) for name, fields in yaml.safe_load(_LISTED).items()}


def suite_of(task: str) -> str:
    """The suite in whose mean `task` counts. What is of no other is maths."""
    return next((suite for suite in SUITES[1:] if task.startswith(suite)), SUITES[0])


def letter_prompt(question: str, options: list[str]) -> str:
    """The question with its lettered options."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, "The final answer is the letter of the correct option."])


def gpqa(row: dict) -> tuple[str, str]:
    """GPQA has the right option first; here the order depends on the question's text alone."""
    keys = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    question, *options = (str(row[key]).strip() for key in keys)
    correct = options[0]
    options.sort(key=lambda option: hashlib.sha256(f"{question}\n{option}".encode()).digest())
    return letter_prompt(question, options), LETTERS[options.index(correct)]


def mmlu_pro(row: dict) -> tuple[str, str]:
    """MMLU-Pro keeps its order; "N/A" only fills lists up to ten and gets no letter."""
    right = row["options"][row["answer_index"]]
    options = [option for option in row["options"] if option.strip() != "N/A"]
    return letter_prompt(row["question"].strip(), options), LETTERS[options.index(right)]


CHOICES = {"gpqa": gpqa, "mmlu_pro": mmlu_pro}  # row -> (prompt, letter)


def rows(where: str, source: Source, flag: str) -> Iterator:
    """(place for messages, row) of a local file or folder, or of the hub. `flag` is how to name a
    copy on the command line: --test-data aime24."""
    path = pathlib.Path(where)
    if source.file and not path.is_file():  # of a known data set one file is read
        path = path / source.file if path.is_dir() else _fetch(source, flag)
    if path.suffix == ".jsonl":  # without `datasets`: at once, with line numbers
        yield from json_lines(path)
        return
    place = str(path) if path.is_file() else where
    parts = _table(place, source.split, flag).with_format("arrow").iter(5000)  # DAPO: 1.8 million
    for number, row in enumerate((row for part in parts for row in part.to_pylist()), 1):
        yield f"{place}, row {number}", row


def _fetch(source: Source, flag: str) -> pathlib.Path:
    """The file of a known data set at its pinned revision, from the hub or the hub's cache."""
    from huggingface_hub import hf_hub_download

    advice = f"fetch {source.file} from https://huggingface.co/datasets/{source.hub_id}, give it "
    advice += f"as {flag}=/path/to/{pathlib.Path(source.file).name}"
    advice += " (gated: accept its terms there, set HF_TOKEN)" if source.gated else ""
    what = {"repo_type": "dataset", "revision": source.revision}
    with in_one_line(f"cannot load {source.hub_id}", advice):
        return pathlib.Path(hf_hub_download(source.hub_id, source.file, **what))


def _table(where: str, split: str, flag: str):
    """A datasets.Dataset of a file, a folder or a hub id, "owner/name" or "owner/name:config"."""
    import datasets  # here: it takes a second, and JSONL does not need it

    path, advice = pathlib.Path(where), f"want {', '.join(FILE_TYPES)}; --data-split names a split"
    what = {"path": where, "split": split}
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise UserError(f"data {where}: {advice}")
        what = {"path": FILE_TYPES[path.suffix], "data_files": where, "split": "train"}
    elif not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", where):
            known = ", ".join(SOURCES)
            raise UserError(f"data {where} not found; want a file, a hub id, or one of {known}")
        what["path"], _, config = where.partition(":")
        what["name"] = config or None
        advice = f"fetch its file from https://huggingface.co/datasets/{what['path']}, give it "
        advice += f"as {flag}=/path/to/it"
    with in_one_line(f"cannot load {where}", advice):  # a script in a folder is not run
        return datasets.load_dataset(**what)
