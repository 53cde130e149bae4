"""The data sets of benchmarks.yaml, and the rows of any data set: of a file, folder or the hub."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterator

import yaml

from common import UserError
from common.files.read import text_lines
from common.rl import in_one_line

DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'
FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_ID = r"[\w.-]+/[\w.-]+(:[\w.-]+)?"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LISTED = yaml.safe_load(pathlib.Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
MMLU_PRO_CATEGORIES = LISTED["mmlu-pro"].pop("categories")


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set on the hub; benchmarks.yaml explains the fields."""

    hub_id: str
    split: str
    kind: str = "latex"
    prompt: str = "problem"  # columns; "a.b" is the key b of column a
    answer: str = "answer"
    file: str = "its data file"
    revision: str | None = None
    config: str | None = None
    template: str | None = None
    category: str | None = None  # only rows of this category of mmlu-pro


SOURCES = {name: Source(**fields) for name, fields in LISTED.items()}
SOURCES |= {
    f"mmlu-pro/{part.replace(' ', '-')}": dataclasses.replace(SOURCES["mmlu-pro"], category=part)
    for part in MMLU_PRO_CATEGORIES
}


def dapo_question(prompt: str) -> str:
    """The question without DAPO's template, which asks for an "Answer:" line and not for a box."""
    return prompt.strip().removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX).strip()


def letter_prompt(question: str, options: list[str]) -> str:
    """The question with its lettered options."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, "The final answer is the letter of the correct option."])


def gpqa(row: dict) -> tuple[str, str]:
    """GPQA has the right option first; here the order depends on the question's text alone."""
    keys = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    question, correct, *wrong = (str(row[key]).strip() for key in keys)

    def place(option: str) -> bytes:
        return hashlib.sha256(f"{question}\n{option}".encode()).digest()

    options = sorted([correct, *wrong], key=place)
    return letter_prompt(question, options), LETTERS[options.index(correct)]


def mmlu_pro(row: dict) -> tuple[str, str]:
    """MMLU-Pro keeps its order; "N/A" only fills lists up to ten and gets no letter."""
    right = row["options"][row["answer_index"]]
    options = [option for option in row["options"] if option.strip() != "N/A"]
    return letter_prompt(row["question"].strip(), options), LETTERS[options.index(right)]


CHOICES = {"gpqa": gpqa, "mmlu_pro": mmlu_pro}  # row -> (prompt, letter)


def rows(where: str, source: Source, flag: str) -> Iterator:
    """(place for messages, row) of a local file or folder, or of the hub. `flag`: see `_table`."""
    if pathlib.Path(where).suffix == ".jsonl":  # without `datasets`: at once, with line numbers
        yield from _jsonl_rows(pathlib.Path(where))
        return
    table = _table(where, source, flag)
    if source.template not in CHOICES:  # only what is needed: DAPO has 1.8 million rows
        wanted = {column.split(".")[0] for column in (source.prompt, source.answer, "kind")}
        table = table.select_columns([name for name in table.column_names if name in wanted])
    with in_one_line(f"cannot read {where}", "make it again"):
        parts = (zip(*batch.values(), strict=True) for batch in table.iter(5000))
        for number, values in enumerate(itertools.chain.from_iterable(parts), 1):
            yield f"{where}, row {number}", dict(zip(table.column_names, values, strict=True))


def _jsonl_rows(path: pathlib.Path) -> Iterator:
    if not path.is_file():
        raise UserError(f"data file {path} not found")
    for number, line in text_lines(path):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error


def _table(where: str, source: Source, flag: str):
    """A datasets.Dataset. `flag` is how to name a copy on the command line: --test-data aime24."""
    import datasets  # here: it takes a second, and JSONL does not need it

    path = pathlib.Path(where)
    what = {"path": where, "name": source.config, "split": source.split}
    failed, advice = f"cannot read {path}", f"want {', '.join(FILE_TYPES)}, or a copy of the hub's"
    if path.is_file():
        what = {"path": FILE_TYPES.get(path.suffix), "data_files": where, "split": "train"}
    elif not path.exists() and re.fullmatch(HUB_ID, where) and path.suffix not in FILE_TYPES:
        hub_id, _, config = where.partition(":")
        what |= {"path": hub_id, "name": config or source.config, "revision": source.revision}
        failed, copy = f"cannot load {where}", f"{flag}=/path/to/{pathlib.Path(source.file).name}"
        from_hub = f"fetch {source.file} from https://huggingface.co/datasets/{source.hub_id}"
        advice = f"{from_hub} and give it as {copy} (gated: accept its terms, set HF_TOKEN)"
    elif not path.exists():
        known = ", ".join(SOURCES)
        raise UserError(f"data file {path} not found; want a file, a hub id, or one of {known}")
    with in_one_line(failed, advice):  # a script in a folder is not run
        return datasets.load_dataset(**what)
