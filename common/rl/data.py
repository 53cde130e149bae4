"""Problems and prompts: a file, hub id or named benchmark in, token ids out, in a fixed order."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import sys

import torch

from common import UserError
from common.files.read import first_line, safe_name, sha256
from common.rl.benchmarks import (
    FILE_TYPES,
    HUB_ID,
    MMLU_PRO_CATEGORIES,
    SOURCES,
    Source,
    dapo_question,
    rows,
)

# One template for training and evaluation.
STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."
PROMPT_TEMPLATE = "{prompt}\n" + STEP_BY_STEP
# Qwen2.5's own turn where none is given, so the paper's models see the same tokens.
SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
KINDS = ("number", "latex", "letter")
CHECKED = 64  # prompts that are decoded again to see whether any character is lost
_CJK = re.compile("[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its answer; `kind` says how answers are compared: number, latex, letter."""

    prompt: str
    answer: str
    kind: str = "latex"


def load_problems(spec, english_only=False, flag="--train-data", **columns) -> list[Problem]:
    """The problems of one data set. `spec` is one of

    - a file, .jsonl, .parquet or .csv, with columns for prompt and answer, and perhaps for `kind`;
    - a name in common/rl/benchmarks.py, or its hub id; `name=path` reads a local file or folder;
    - any other hub id, "owner/name" or "owner/name:config".

    columns: prompt_column, answer_column ("a.b" is the key b of column a) and split, for what is
    not a known benchmark. Raises UserError where it cannot be had, or where a row is not usable.
    """
    name, category, where = parse_spec(str(spec))
    source = SOURCES.get(name) or _unknown(where, **columns)
    problems = {}  # in order; DAPO repeats every problem, other sets keep what stands twice
    for place, row in rows(name, source, where, flag):
        if category and row.get(source.category) != category:
            continue
        key, problem = place, _problem(row, source, place)
        if source.dapo:
            key = dapo_question(problem.prompt)
            problem = dataclasses.replace(problem, prompt=key)
        problems.setdefault(key, problem)
    found = [p for p in problems.values() if not (english_only and _CJK.search(p.prompt))]
    if not found:
        which = f" of category {category}" if category else ""
        raise UserError(f"data file {where} holds no problem{which}")
    return found


def load_tasks(specs: list[str], **columns) -> dict[str, list[Problem]]:
    """Test problems by task, named after the benchmark or file; `columns` as in `load_problems`.

    mmlu-pro stands for its 14 categories. Raises UserError for two tasks of one name.
    """
    tasks = {}
    for spec in specs:
        name, category, where = parse_spec(spec)
        is_whole = name == "mmlu-pro" and category is None
        for part in MMLU_PRO_CATEGORIES if is_whole else [category]:
            full = name if part is None else f"{name}/{part.replace(' ', '-')}"
            task = safe_name(full.replace("/", "-"), "test data set")  # files are named after it
            if task in tasks:
                what = f"two of the test data sets are called {task}"
                raise UserError(f"{what}; give one another name: other={where}")
            one = spec if part is None else f"{full}={where}"
            tasks[task] = load_problems(one, flag="--test-data", **columns)
    return tasks


def parse_spec(spec: str) -> tuple[str, str | None, str]:
    """(name, category or None, where): `where` is a local path or a hub id.

    >>> parse_spec("aime24"), parse_spec("aime25=/data/test.jsonl")
    (('aime24', None, 'HuggingFaceH4/aime_2024'), ('aime25', None, '/data/test.jsonl'))
    >>> parse_spec("mmlu-pro/computer-science"), parse_spec("data/test.jsonl")
    (('mmlu-pro', 'computer science', 'TIGER-Lab/MMLU-Pro'), ('test', None, 'data/test.jsonl'))
    """
    if not spec.isprintable() or max(len(part.encode()) for part in spec.split("/")) > 250:
        raise UserError(f"data set {spec[:80]!r}: no name of a file or a data set")
    names = {source.hub_id: name for name, source in SOURCES.items()}
    name, _, where = spec.partition("=")
    if "/" in name and name not in names and not name.startswith("mmlu-pro/"):
        name, where = spec, ""  # the "=" belongs to a path
    name = names.get(name, name)
    if name.startswith("mmlu-pro/"):
        categories = {f"mmlu-pro/{part.replace(' ', '-')}": part for part in MMLU_PRO_CATEGORIES}
        if name not in categories:
            raise UserError(f"unknown task {name}; known: {', '.join(categories)}")
        return "mmlu-pro", categories[name], where or SOURCES["mmlu-pro"].hub_id
    if where or name in SOURCES:
        return name, None, where or SOURCES[name].hub_id
    path = pathlib.Path(name)
    if re.fullmatch(HUB_ID, name) and path.suffix not in FILE_TYPES and not path.exists():
        return name.split("/")[1].replace(":", "-"), None, name
    return path.stem, None, name


def content_hash(spec: str) -> str | None:
    """The hash of the local file that `spec` reads; None for a hub id or a folder."""
    path = pathlib.Path(parse_spec(spec)[2])
    if path.suffix not in FILE_TYPES:
        return None
    if not path.is_file():
        raise UserError(f"data file {path} not found")
    return sha256(path)


def fingerprint(problems: list[Problem]) -> str:
    """16 hex digits that change with any prompt, answer or kind."""
    text = json.dumps([dataclasses.astuple(problem) for problem in problems])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unknown(where, prompt_column="prompt", answer_column="answer", split="train") -> Source:
    hub_id = where.split(":")[0]
    return Source(hub_id, "its data file", None, split, "latex", prompt_column, answer_column)


def _problem(row: dict, source: Source, place: str) -> Problem:
    """Raises UserError, with the place, for a row without a usable prompt or answer."""
    if source.choice is not None:
        try:
            return Problem(*source.choice(row), source.kind)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{place}: not a row of {source.hub_id} ({what})") from error
    texts = []
    for column in (source.prompt, source.answer):
        texts.append(_text(_column(row, column)))
        if texts[-1] is None:
            want = f'{{"{source.prompt}": text, "{source.answer}": text or number}}'
            raise UserError(f"{place}: no usable '{column}' (want {want})")
    kind = row.get("kind") or source.kind
    if kind not in KINDS:
        raise UserError(f"{place}: kind {kind!r} is not one of {', '.join(KINDS)}")
    return Problem(*texts, kind)


def _column(row: object, column: str) -> object:
    """The value of a column, or of "column.key"; None where there is none."""
    for key in column.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _text(value: object) -> str | None:
    """A text, a finite number, or the last turn of a user in a chat, as text; None for others."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content") if value[-1].get("role") == "user" else None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    is_usable = isinstance(value, str | int | float) and not isinstance(value, bool)
    return str(value) if is_usable else None


def render_chats(prompts: list[str], tokenizer, template: str, system: str) -> list[str]:
    """Every prompt in `template`, as a user turn of the tokenizer's chat template."""
    if "{prompt}" not in template:
        raise UserError(f"prompt_template {template!r} has no {{prompt}} in it")
    turns = [{"role": "system", "content": system}] if system else []
    filled = [template.replace("{prompt}", prompt) for prompt in prompts]
    chats = [[*turns, {"role": "user", "content": text}] for text in filled]
    try:
        return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template can raise, "System role not supported" too
        reason = first_line(error)
        raise UserError(
            f"the backbone's tokenizer has no usable chat template for these turns: {reason}"
        ) from error


def encode_prompts(problems, tokenizer, template, system, limit: int, source) -> list[list[int]]:
    """Token ids of every prompt. `source` is the name of the data, for messages.

    Raises UserError for a prompt over `limit` tokens: a question that is cut is another question.
    """
    texts = render_chats([problem.prompt for problem in problems], tokenizer, template, system)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for number, ids in enumerate(encoded, 1):
        if not ids:
            raise UserError(f"{source}, problem {number}: the chat template renders no tokens")
        if len(ids) > limit:
            what = f"its prompt has {len(ids)} tokens, over the limit of {limit}"
            raise UserError(
                f"{source}, problem {number}: {what}; raise max_prompt_tokens or remove it"
            )
    if os.environ.get("RANK", "0") == "0":
        for warning in prompt_warnings(texts[:CHECKED], encoded, tokenizer, system):
            print(f"warning: {source}: {warning}", file=sys.stderr)
    return encoded


def prompt_warnings(texts, encoded, tokenizer, system: str) -> list[str]:
    """What may be wrong with prompts: another model's system turn, or lost characters."""
    found = []
    if system == SYSTEM_PROMPT and "Qwen" not in str(tokenizer.chat_template):
        found.append("the system turn is Qwen2.5's, and the backbone is not: set --system-prompt")
    lost = set()
    for text, ids in zip(texts, encoded, strict=False):
        lost |= set("".join(text.split())) - set(tokenizer.decode(ids))
    if lost:
        letters = "".join(sorted(lost))[:60]
        found.append(f"the tokenizer has no token for {letters!r}: they are not in the prompts")
    return found


def template_hash(tokenizer, template: str, system: str) -> str:
    """12 hex digits of all around a problem: user turn, system turn, chat template."""
    text = render_chats(["What is 1 + 1?"], tokenizer, template, system)[0]
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def prompt_order(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """The indices of the problems of RL step `step` (from 1): one shuffle of all after another.

    >>> [prompt_order(4, 2, step, seed=0) for step in (1, 2)]  # the first epoch: each problem once
    [[0, 1], [3, 2]]
    """
    order = []
    for position in range((step - 1) * per_step, step * per_step):
        epoch, offset = divmod(position, count)
        if not order or offset == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            shuffled = torch.randperm(count, generator=generator).tolist()
        order.append(shuffled[offset])
    return order
