"""Problems and prompts: JSONL in, token ids out, in an order that depends on the seed and the step alone."""

import dataclasses
import json
import pathlib

import torch

from common.run_dir import UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its checkable answer."""

    prompt: str
    answer: str


def load_problems(path: str | pathlib.Path) -> list[Problem]:
    """Reads {"prompt": ..., "answer": ...} a line. A bad line is an error that names file and line."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"data file {path} not found")
    problems = []
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    problems.append(_parse_line(line, f"{path}, line {number}"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if not problems:
        raise UserError(f"data file {path} holds no problem")
    return problems


def _parse_line(line: str, where: str) -> Problem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    for key in ("prompt", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str | int | float) or isinstance(row[key], bool):
            raise UserError(f'{where}: no usable \'{key}\' (want {{"prompt": text, "answer": text or number}})')
    return Problem(str(row["prompt"]), str(row["answer"]))


def encode_prompts(problems: list[Problem], tokenizer, template: str, system: str, limit: int, source: str) -> list[list[int]]:
    """Token ids of every prompt: `template` filled with the problem, as a user turn of the tokenizer's chat template.

    Raises UserError for a prompt over `limit` tokens: cutting a question silently would change it.
    """
    if "{prompt}" not in template:
        raise UserError(f"prompt_template {template!r} has no {{prompt}} in it")
    turns = [{"role": "system", "content": system}] if system else []
    chats = [[*turns, {"role": "user", "content": template.replace("{prompt}", problem.prompt)}] for problem in problems]
    try:
        encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    except ValueError as error:
        raise UserError(f"the backbone's tokenizer has no usable chat template: {error}") from error
    for number, ids in enumerate(encoded, 1):
        if len(ids) > limit:
            raise UserError(
                f"{source}, problem {number}: its prompt has {len(ids)} tokens, over the limit of {limit}; "
                "raise max_prompt_tokens or remove it"
            )
    return encoded


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
