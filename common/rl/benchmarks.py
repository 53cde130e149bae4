"""The known data sets: where each is on the hub, and how a row becomes a question with an answer.

Revisions are pinned, so that a benchmark cannot change under a result. No hub was in reach when
this was written: ids, files, columns and revisions are those of published evaluation code.
"""

import dataclasses
import hashlib
import pathlib
import re
import types
import typing
from collections.abc import Iterator

from common import UserError
from common.files.read import first_line, parse_json, text_lines

DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'
FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_ID = r"[\w.-]+/[\w.-]+(:[\w.-]+)?"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MMLU_PRO_CATEGORIES = (
    *("biology", "business", "chemistry", "computer science", "economics", "engineering", "health"),
    *("history", "law", "math", "other", "philosophy", "physics", "psychology"),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set on the hub. `kind` says how answers are compared: number, latex or letter."""

    hub_id: str
    file: str  # of its repository: what to fetch where the hub is out of reach
    revision: str | None
    split: str
    kind: str
    prompt: str = "problem"  # columns; "a.b" is the key b of column a
    answer: str = "answer"
    config: str | None = None
    choice: typing.Callable[[dict], tuple[str, str]] | None = None  # row -> (prompt, letter)
    category: str | None = None  # a column whose values are tasks of their own
    dapo: bool = False  # 100 copies of each row, in a template of its own


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


DAPO = Source(
    *("BytedTsinghua-SIA/DAPO-Math-17k", "data/dapo-math-17k.parquet"),
    *("65877096c24ffa7abc4e4fa5edb95cf3413a5674", "train"),
    kind="number",  # by construction of DAPO, as far as we know
    prompt="prompt",
    answer="reward_model.ground_truth",
    dapo=True,
)
AIME24 = Source(
    *("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet"),
    *("2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "train", "number"),
)
AIME25 = Source(  # others (TIGER-Lab/AIME25) hold part I only
    *("math-ai/aime25", "test.jsonl", "563bb8404243c5f09de6ec262f2db674fe5bce9b", "test", "number"),
)
AMC23 = Source(
    *("math-ai/amc23", "test-00000-of-00001.parquet"),
    *("80815d37005feb82cd7f8fbc6901d5d3eff43057", "test"),
    kind="number",  # written as 27.0
    prompt="question",
)
MINERVA = Source(
    *("math-ai/minervamath", "test.jsonl", "ee46ddc498933b1977577953250ca5c66be64f96"),
    *("test", "latex"),
    prompt="question",
)
OLYMMATH = Source(
    *("RUC-AIBOX/OlymMATH", "data/OlymMATH-EN-EASY.jsonl"),
    *("5f83d12e63ee3267f35044461a6cebad58ec3be1", "test", "latex"),
    config="en-easy",
)
GPQA = Source(  # gated: accept its terms, set HF_TOKEN. This revision is named in one project only.
    *("Idavidrein/gpqa", "gpqa_diamond.csv", "83022cefff930aea54f654c0b282e74b9eeda5c6"),
    *("train", "letter"),
    config="gpqa_diamond",
    choice=gpqa,
)
MMLU_PRO = Source(
    *("TIGER-Lab/MMLU-Pro", "data/test-00000-of-00001.parquet"),
    *("b189ec765aa7ed75c8acfea42df31fdae71f97be", "test", "letter"),
    choice=mmlu_pro,
    category="category",
)
SOURCES = types.MappingProxyType(
    {
        "dapo-math-17k": DAPO,
        "aime24": AIME24,
        "aime25": AIME25,
        "amc23": AMC23,
        "minerva": MINERVA,
        "olymmath-en-easy": OLYMMATH,
        "gpqa-diamond": GPQA,
        "mmlu-pro": MMLU_PRO,
    }
)


def rows(name: str, source: Source, where: str, flag: str) -> Iterator:
    """(place for messages, row) of a local file or folder, or of the hub."""
    if pathlib.Path(where).suffix == ".jsonl":
        yield from _jsonl_rows(pathlib.Path(where))
        return
    table = _table(name, source, where, flag)
    if source.choice is None:  # only what is needed: DAPO has 1.8 million rows
        wanted = {column.split(".")[0] for column in (source.prompt, source.answer, "kind")}
        table = table.select_columns([name for name in table.column_names if name in wanted])
    number = 0
    try:
        for batch in table.iter(5000):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"{where}, row {number}", dict(zip(batch, values, strict=True))
    except (ValueError, OSError, RuntimeError) as error:  # text that is no UTF-8, for one
        raise UserError(f"cannot read {where} after row {number}: {first_line(error)}") from error


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    if not path.is_file():
        raise UserError(f"data file {path} not found")
    for number, line in text_lines(path):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
            yield f"{path}, line {number}", row


def _table(name: str, source: Source, where: str, flag: str):
    """A datasets.Dataset from a file, a folder laid out as on the hub, or the hub."""
    import datasets  # here: it takes a second, and JSONL does not need it

    path = pathlib.Path(where)
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise UserError(f"data file {path}: want a name that ends in {', '.join(FILE_TYPES)}")
        what = {"path": FILE_TYPES[path.suffix], "data_files": where, "split": "train"}
    elif path.is_dir():
        what = {"path": where, "name": source.config, "split": source.split}
    elif re.fullmatch(HUB_ID, where) and path.suffix not in FILE_TYPES:
        hub_id, _, config = where.partition(":")
        what = {"path": hub_id, "name": config or source.config, "split": source.split}
        what["revision"] = source.revision
    else:
        known = ", ".join(SOURCES)
        raise UserError(f"data file {path} not found; want a file, a hub id, or one of {known}")
    try:
        return datasets.load_dataset(**what)
    except Exception as error:  # whatever datasets raises; a script in a folder is not run
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if path.exists():
            raise UserError(f"cannot read {path}: {reason}") from error
        raise UserError(
            f"cannot load {where} ({reason}); fetch {source.file} from "
            f"https://huggingface.co/datasets/{source.hub_id} and give it as {flag} "
            f"{name}=/path/to/"
            f"{pathlib.Path(source.file).name} (gated: accept its terms, set HF_TOKEN)"
        ) from error
