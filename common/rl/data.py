"""Problems and prompts: a file, hub id or named benchmark in, token ids out, in a fixed order."""

import dataclasses
import hashlib
import json
import pathlib
import re
import sys
from typing import Literal

import torch

from common import UserError, in_one_line
from common.files.read import matches, safe_name, sha256
from common.files.stage import is_writer
from common.rl.benchmarks import CHOICES, FILE_TYPES, SOURCES, Source, rows

# One template for training and evaluation.
PROMPT_TEMPLATE = (
    "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
)
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
    columns: dict = dataclasses.field(default_factory=dict, compare=False)  # the row's others


def load_problems(spec, flag="--train-data", **options) -> list[Problem]:
    """The problems of one data set for training; see `load_tasks`."""
    tasks = load_tasks([spec], flag, **options)
    return [problem for problems in tasks.values() for problem in problems]


def load_tasks(specs, flag="--test-data", english_only=False, **columns) -> dict:
    """Problems by task, named after the benchmark or file. A category of mmlu-pro is a task.

    A spec is one of
    - a file, .jsonl, .parquet or .csv, with columns for prompt and answer, and perhaps for `kind`;
    - a name in common/rl/benchmarks.yaml, or its hub id; `name=path` reads a local copy;
    - any other hub id, "owner/name" or "owner/name:config".
    columns: prompt, answer and split of what is not a known benchmark, see benchmarks.Source.
    Raises UserError where it cannot be had, or where a row is not usable.
    """
    tasks = {}
    for spec in specs:
        name, where, source = parse_spec(str(spec))
        benchmark, _, wanted = name.partition("/")
        source = source or Source(where, **columns)
        found = {}  # task -> its problems, in order
        for place, row in rows(where, source, f"{flag} {benchmark}"):
            part = (_text(row, source.part) or "").replace(" ", "-")
            problem = _problem(row, source, place)
            key = problem.prompt if source.around[0] else place  # it repeats each problem
            if part == (wanted or part) and not (english_only and _CJK.search(problem.prompt)):
                task = f"{benchmark}-{part}" if part else benchmark
                found.setdefault(safe_name(task, "data set"), {}).setdefault(key, problem)
        if not found:
            raise UserError(f"data file {where} holds no problem for {name}")
        if both := tasks.keys() & found.keys():
            raise UserError(f"two test data sets are called {both.pop()}: say other={where}")
        tasks |= {task: list(found[task].values()) for task in sorted(found)}
    return tasks


def place(spec: str) -> str:
    """The path in `name=path`. An "=" behind a slash belongs to the path."""
    name, _, path = spec.partition("=")
    return path if path and "/" not in name else spec


def parse_spec(spec: str) -> tuple[str, str, Source | None]:
    """(name, where, source): `where` is a local path or a hub id, `source` the benchmark that is
    named. A file or a hub id that is only called like one is none.

    >>> parse_spec("aime24")[:2], parse_spec("someone/sums:hard")
    (('aime24', 'HuggingFaceH4/aime_2024'), ('sums-hard', 'someone/sums:hard', None))
    """
    name, _, where = spec.partition("=")
    name = {source.hub_id: name for name, source in SOURCES.items()}.get(name, name)
    if source := SOURCES.get("mmlu-pro" if name.startswith("mmlu-pro/") else name):
        where = where or source.hub_id
    elif not where or "/" in name:  # an "=" belongs to the path
        path, where = pathlib.Path(spec), spec
        name = path.stem if path.suffix in FILE_TYPES else path.name.replace(":", "-")
    path = pathlib.Path(where)
    if path.suffix in FILE_TYPES and not path.is_file():
        raise UserError(f"data file {path} not found")
    return name, where, source


def content_hash(spec: str) -> str | None:
    """The hash of the local file that `spec` reads; None for a hub id or a folder."""
    path = pathlib.Path(parse_spec(spec)[1])
    return sha256(path) if path.suffix in FILE_TYPES else None


def fingerprint(problems: list[Problem]) -> str:
    """16 hex digits that change with any prompt, answer or kind."""
    text = json.dumps([(problem.prompt, problem.answer, problem.kind) for problem in problems])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _problem(row: dict, source: Source, place: str) -> Problem:
    if source.template in CHOICES:
        with in_one_line(f"{place}: not a row of {source.hub_id}", "give a copy of the hub's"):
            return Problem(*CHOICES[source.template](row), source.kind)
    for column in (source.prompt, source.answer):
        if _text(row, column) is None:
            there = ", ".join(row) if isinstance(row, dict) else "none"
            which = f"say --prompt-column, --answer-column; there are {there}"
            which = f"give a copy of {source.hub_id}'s, or another name" if source.file else which
            raise UserError(f"{place}: no usable '{column}', want a text or a number: {which}")
    kind = row.get("kind") or source.kind
    if kind not in KINDS:
        raise UserError(f"{place}: kind {kind!r} is not one of {', '.join(KINDS)}")
    others = {key: row[key] for key in row.keys() - {"prompt", "prompts", "completions"}}
    prompt, (before, after) = _text(row, source.prompt), source.around
    if before:  # DAPO asks for an "Answer:" line and not for a box
        prompt = prompt.strip().removeprefix(before).removesuffix(after).strip()
    return Problem(prompt, _text(row, source.answer), kind, others)


def _text(value: object, column: str) -> str | None:
    # A text, a finite number, or the last turn of a user in a chat.
    for key in column.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, list) and value and matches(value[-1], {"role": Literal["user"]}):
        value = value[-1].get("content")
    text = str(value) if matches(value, str | float) and value == value else ""
    return text if text.strip() else None


def render_chats(prompts: list[str], tokenizer, template: str, system: str) -> list[str]:
    """Every prompt in `template`, as a user turn of the tokenizer's chat template."""
    if "{prompt}" not in template:
        raise UserError(f"prompt_template {template!r} has no {{prompt}} in it")
    turns = [{"role": "system", "content": system}] if system else []
    filled = [template.replace("{prompt}", prompt) for prompt in prompts]
    chats = [[*turns, {"role": "user", "content": text}] for text in filled]
    with in_one_line("the backbone's chat template fails on these turns", "set --system-prompt ''"):
        return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)


def encode_prompts(problems, tokenizer, template, system, limit: int, source):
    """(problems, token ids of their prompts), without prompts of more than `limit` tokens: a
    question that is cut is another question. `source` is the name of the data, for messages."""
    texts = render_chats([problem.prompt for problem in problems], tokenizer, template, system)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if [] in encoded:
        number = encoded.index([]) + 1
        raise UserError(f"{source}, problem {number} has no tokens: see the chat template")
    if is_writer() and system == SYSTEM_PROMPT and "Qwen" not in str(tokenizer.chat_template):
        print("warning: the system turn is Qwen2.5's: set --system-prompt", file=sys.stderr)
    pairs = zip(texts[:CHECKED], encoded, strict=False)
    lost = set().union(*({*"".join(t.split())} - {*tokenizer.decode(i)} for t, i in pairs))
    if lost and is_writer():
        lost = "".join(sorted(lost))
        print(f"warning: {source}: the tokenizer has no token for {lost!r}", file=sys.stderr)
    kept = [i for i, ids in enumerate(encoded) if len(ids) <= limit]
    over = f"of more than {limit} tokens (max_prompt_tokens)"
    if not kept:
        raise UserError(f"{source} has nothing but prompts {over}")
    if len(kept) < len(problems) and is_writer():
        left = f"{len(problems) - len(kept)} of {len(problems)} problems"
        print(f"note: {source}: left out are {left}, with prompts {over}", file=sys.stderr)
    return [problems[i] for i in kept], [encoded[i] for i in kept]


def template_hash(tokenizer, template: str, system: str) -> str:
    """12 hex digits of all around a problem: user turn, system turn, chat template."""
    text = render_chats(["What is 1 + 1?"], tokenizer, template, system)[0]
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def prompt_order(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """The indices of the problems of RL step `step` (from 1): one shuffle of all after another.

    >>> [prompt_order(4, 2, step, seed=0) for step in (1, 2)]  # the first epoch: each problem once
    [[0, 1], [3, 2]]
    """
    start, order = (step - 1) * per_step, []
    for epoch in range(start // count, (start + per_step - 1) // count + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += torch.randperm(count, generator=generator).tolist()
    return order[start % count :][:per_step]
