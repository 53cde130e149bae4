"""Problems and prompts: file, hub id or named benchmark in, token ids out, in an order that depends on the seed and the step alone."""

import collections.abc
import dataclasses
import hashlib
import json
import math
import pathlib
import re

import torch

from common import UserError
from common.files.read import first_line, parse_json, safe_name, text_lines
from common.rl.benchmarks import MMLU_PRO_CATEGORIES, SOURCES, Source, dapo_question

LINE_LIMIT = 10 * 2**20  # characters of a prompt
# One template for training and evaluation: what RL teaches about the format has to hold where it is measured.
PROMPT_TEMPLATE = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
# Qwen2.5-Instruct's chat template puts in this system turn where none is given. Written out, the paper's models see the same tokens as
# without a system turn, and no tokenizer file decides silently what the prompt is.
SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

KINDS = ("number", "latex", "letter")
FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_ID = r"[\w.-]+/[\w.-]+(:[\w.-]+)?"
CHATS = 64  # rendered at a time
_CJK = re.compile("[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its checkable answer; `kind` says how the verifier compares it: number, latex or letter."""

    prompt: str
    answer: str
    kind: str = "latex"


def load_problems(spec: str | pathlib.Path, **options) -> list[Problem]:
    """The problems of one data set. `spec` is one of

    - a file: .jsonl, .parquet, .csv, with a prompt and an answer column and, if it likes, a column "kind";
    - a name of the table in common/benchmarks.py, or its hub id; `name=path` reads the same rows from a local file or folder;
    - any other hub id, "owner/name" or "owner/name:config".

    `options` are those of `read`. Raises UserError where it cannot be had, with the file to fetch, or where a row is not usable.
    """
    return read(*parse_spec(str(spec)), **options)


def load_tasks(specs: list[str], **options) -> dict[str, list[Problem]]:
    """Test problems by task; a task is named after its benchmark or file. `mmlu-pro` stands for its 14 categories.

    `options` are those of `read`. Raises UserError for two tasks of one name.
    """
    tasks = {}
    for name, category, where in map(parse_spec, specs):
        for part in MMLU_PRO_CATEGORIES if name == "mmlu-pro" and category is None else [category]:
            task = safe_name(name if part is None else f"{name}-{part.replace(' ', '-')}", "test data set")  # files are named after it
            if task in tasks:
                raise UserError(f"two of the test data sets are called {task}; give one another name: other={where}")
            tasks[task] = read(name, part, where, flag="--test-data", **options)
    return tasks


def parse_spec(spec: str) -> tuple[str, str | None, str]:
    """(name, category or None, where): `where` is a local path or a hub id.

    >>> parse_spec("aime24"), parse_spec("aime25=/data/test.jsonl")
    (('aime24', None, 'HuggingFaceH4/aime_2024'), ('aime25', None, '/data/test.jsonl'))
    >>> parse_spec("mmlu-pro/computer-science"), parse_spec("runs/demo/data/test.jsonl")
    (('mmlu-pro', 'computer science', 'TIGER-Lab/MMLU-Pro'), ('test', None, 'runs/demo/data/test.jsonl'))
    """
    if not spec.isprintable() or max(len(part.encode()) for part in spec.split("/")) > 250:
        raise UserError(f"data set {spec[:80]!r}: no name of a file or a data set")
    names = {source.hub_id: name for name, source in SOURCES.items()}
    categories = {f"mmlu-pro/{category.replace(' ', '-')}": category for category in MMLU_PRO_CATEGORIES}
    name, _, where = spec.partition("=")
    if "/" in name and name not in names and not name.startswith("mmlu-pro/"):
        name, where = spec, ""  # the "=" belongs to a path
    name = names.get(name, name)
    if name.startswith("mmlu-pro/"):
        if name not in categories:
            raise UserError(f"unknown task {name}; known: {', '.join(categories)}")
        return "mmlu-pro", categories[name], where or SOURCES["mmlu-pro"].hub_id
    if where or name in SOURCES:
        return name, None, where or SOURCES[name].hub_id
    if re.fullmatch(HUB_ID, name) and pathlib.Path(name).suffix not in FILE_TYPES and not pathlib.Path(name).exists():
        return name.split("/")[1].replace(":", "-"), None, name
    return pathlib.Path(name).stem, None, name


def local_files(spec: str) -> list[str]:
    """The file that `spec` reads, for a stage's list of inputs; none where it is a hub id or a folder."""
    where = parse_spec(spec)[2]
    return [where] if pathlib.Path(where).suffix in FILE_TYPES else []


def fingerprint(problems: list[Problem]) -> str:
    """16 hex digits that change with any prompt, answer or kind."""
    return hashlib.sha256(json.dumps([dataclasses.astuple(problem) for problem in problems]).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------------


def read(
    name: str,
    category: str | None,
    where: str,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    split: str = "train",
    english_only: bool = False,
    flag: str = "--train-data",
) -> list[Problem]:
    """The problems of data set `name`, or one category of it, from `where`.

    The columns ("a.b" is the key b of column a) and the split are for what is not in the table of benchmarks; `flag` is for messages.
    """
    source = SOURCES.get(name) or Source(where.split(":")[0], "its data file", None, split, "latex", prompt_column, answer_column)
    problems, seen = [], set()
    for place, row in _rows(name, source, where, flag):
        if category and row.get(source.category) != category:
            continue
        problem = _problem(row, source, place)
        if source.dapo:
            text = dapo_question(problem.prompt)
            if text in seen:
                continue
            seen.add(text)
            problem = dataclasses.replace(problem, prompt=text)
        if not (english_only and _CJK.search(problem.prompt)):
            problems.append(problem)
    if not problems:
        raise UserError(f"data file {where} holds no problem" + (f" of category {category}" if category else ""))
    return problems


def _rows(name: str, source: Source, where: str, flag: str) -> collections.abc.Iterator[tuple[str, dict]]:
    """(place for messages, row) of a local file or folder, or of the hub."""
    if pathlib.Path(where).suffix == ".jsonl":
        yield from _jsonl_rows(pathlib.Path(where))
        return
    table = _table(name, source, where, flag)
    if source.choice is None:  # only what is needed, in batches: DAPO's 1.8 million rows one by one take five times as long
        wanted = {column.split(".")[0] for column in (source.prompt, source.answer, "kind")}
        table = table.select_columns([column for column in table.column_names if column in wanted])
    number = 0
    try:
        for batch in table.iter(5000):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"{where}, row {number}", dict(zip(batch, values, strict=True))
    except (ValueError, OSError, RuntimeError) as error:  # text that is no UTF-8, for one
        raise UserError(f"cannot read {where} after row {number}: {first_line(error)}") from error


def _jsonl_rows(path: pathlib.Path) -> collections.abc.Iterator[tuple[str, dict]]:
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
    import datasets  # here, because it takes a second and plain JSONL does not need it

    path = pathlib.Path(where)
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise UserError(f"data file {path}: want a name that ends in {', '.join(FILE_TYPES)}")
        what = {"path": FILE_TYPES[path.suffix], "data_files": where, "split": "train"}
    elif path.is_dir():
        what = {"path": where, "name": source.config, "split": source.split}
    elif re.fullmatch(HUB_ID, where) and path.suffix not in FILE_TYPES:
        hub_id, _, config = where.partition(":")
        what = {"path": hub_id, "name": config or source.config, "split": source.split, "revision": source.revision}
    else:
        raise UserError(f"data file {path} not found; want a file, a hub id, or one of {', '.join(SOURCES)}")
    try:
        return datasets.load_dataset(**what)
    except Exception as error:  # whatever datasets and its readers raise; a script in a folder is refused and not run
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if path.exists():
            raise UserError(f"cannot read {path}: {reason}") from error
        raise UserError(
            f"cannot load {where} ({reason}); fetch {source.file} from https://huggingface.co/datasets/{source.hub_id} "
            f"and give it as {flag} {name}=/path/to/{pathlib.Path(source.file).name} (gated: accept its terms there, set HF_TOKEN)"
        ) from error


def _problem(row: dict, source: Source, place: str) -> Problem:
    """Raises UserError, with the place, for a row without a usable prompt or answer."""
    if source.choice is not None:
        try:
            return Problem(*source.choice(row), source.kind)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise UserError(f"{place}: not a row of {source.hub_id} ({type(error).__name__}: {error})") from error
    values = [_text(_column(row, column)) for column in (source.prompt, source.answer)]
    for column, value in zip((source.prompt, source.answer), values, strict=True):
        if value is None:
            raise UserError(f'{place}: no usable \'{column}\' (want {{"{source.prompt}": text, "{source.answer}": text or number}})')
    kind = row.get("kind") or source.kind
    if kind not in KINDS:
        raise UserError(f"{place}: kind {kind!r} is not one of {', '.join(KINDS)}")
    return Problem(*values, kind)


def _column(row: object, column: str) -> object:
    """The value of a column, or of "column.key"; None where there is none."""
    for key in column.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _text(value: object) -> str | None:
    """A value as text; a chat's user turn (the layout of verl's data sets) too. None for what is neither text nor a finite number."""
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "user":
        value = value[-1].get("content")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return str(value)


# ---------------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------------


def render_chats(prompts: list[str], tokenizer, template: str, system: str, tokenize: bool) -> list:
    """Every prompt in `template`, as a user turn of the tokenizer's chat template: token ids, or text.

    The chat template is a program of the backbone's maker. It runs in Jinja's sandbox, which reaches no files.
    """
    if "{prompt}" not in template:
        raise UserError(f"prompt_template {template!r} has no {{prompt}} in it")
    turns = [{"role": "system", "content": system}] if system else []
    chats = [[*turns, {"role": "user", "content": template.replace("{prompt}", prompt)}] for prompt in prompts]
    texts = []
    try:
        for start in range(0, len(chats), CHATS):
            part = chats[start : start + CHATS]
            texts += tokenizer.apply_chat_template(part, add_generation_prompt=True, tokenize=False)
            if max(map(len, texts[start:])) > LINE_LIMIT:
                raise UserError(f"the backbone's chat template makes a prompt of over {LINE_LIMIT >> 20} million characters")
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if tokenize else texts
    except UserError:
        raise
    except Exception as error:  # whatever a template can raise, "System role not supported" among it
        raise UserError(f"the backbone's tokenizer has no usable chat template for these turns: {first_line(error)}") from error


def encode_prompts(problems: list[Problem], tokenizer, template: str, system: str, limit: int, source: str) -> list[list[int]]:
    """Token ids of every prompt: `template` filled with the problem, as a user turn of the tokenizer's chat template.

    Raises UserError for a prompt over `limit` tokens: cutting a question silently would change it.
    """
    encoded = render_chats([problem.prompt for problem in problems], tokenizer, template, system, tokenize=True)
    for number, ids in enumerate(encoded, 1):
        if not ids:
            raise UserError(f"{source}, problem {number}: its prompt has no tokens; the backbone's chat template renders nothing")
        if len(ids) > limit:
            raise UserError(
                f"{source}, problem {number}: its prompt has {len(ids)} tokens, over the limit of {limit}; "
                "raise max_prompt_tokens or remove it"
            )
    return encoded


def template_hash(tokenizer, template: str, system: str) -> str:
    """12 hex digits of everything around a problem: user turn, system turn, chat template. Two results compare only where it is equal."""
    text = render_chats(["What is 1 + 1?"], tokenizer, template, system, tokenize=False)[0]
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def prompt_order(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """The indices of the `per_step` problems of RL step `step` (from 1): one shuffle of all `count` problems after another.

    A pure function of its arguments, so that a resumed run sees what the uninterrupted one would have.

    >>> [prompt_order(4, 2, step, seed=0) for step in (1, 2)]  # the first epoch: each problem once
    [[0, 1], [3, 2]]
    """
    order = []
    for position in range((step - 1) * per_step, step * per_step):
        epoch, offset = divmod(position, count)
        if not order or offset == 0:
            shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        order.append(shuffled[offset])
    return order
