"""The reward of a response: the verifier's 0 or 1, functions of the user's, or a weighted sum.

A function has TRL's signature: score(prompts, completions, **columns) -> a number for each response
(None counts 0). Prompts and completions are chats, [{"role": ..., "content": ...}]; columns are
lists: `answer`, the data's other columns, `completion_ids`, `finished`.
"""

import importlib.util
import pathlib
import sys
from collections.abc import Callable

from common import UserError, in_one_line
from common.files.read import sha256
from common.rl.verifier import Verifier

HUGE = 1e30  # a value or a weight from here on is a mistake
ADVICE = "it gets prompts, completions, **columns and returns a number for each response"


def load(name: str) -> Callable:
    """The function of `file.py:function`. Its file is run: it is the user's own."""
    path, _, function = name.rpartition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"reward {name}: want verifier, or file.py:function of an existing file")
    spec = importlib.util.spec_from_file_location(f"reward_{pathlib.Path(path).stem}", path)
    sys.path.append(str(pathlib.Path(path).resolve().parent))  # it may import what stands beside it
    with in_one_line(f"cannot load reward {name}", "see the file"):
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)


def call(name: str, function: Callable, columns: dict[str, list]) -> list[float]:
    """What `function` returns. UserError where it fails; it names a row if others have no error."""

    def values(columns: dict) -> list[float]:
        return [float(value or 0) for value in function(**columns)]

    try:
        return values(columns)
    except Exception as error:
        failed = []
        for i, (prompt,) in enumerate(columns["prompts"]):
            try:
                values({key: column[i : i + 1] for key, column in columns.items()})
            except Exception:  # noqa: BLE001  (whatever a user's code raises)
                failed.append(prompt["content"][:50])
        where = f" for {failed[0]!r}" if 0 < len(failed) < len(columns["prompts"]) else ""
        with in_one_line(f"reward {name} failed{where}", ADVICE):
            raise error


class Rewards:
    """All of `--reward`: each is `verifier` or `file.py:function`, perhaps with =weight behind it.
    `sums`: by name, the unweighted sums of the last call. `files`: hashes of the functions'."""

    def __init__(self, wanted: list[str], verifier: Verifier, problems: list):
        """problems: all that will be scored, so that each call has the columns of every row."""
        self.verifier, self.parts, self.sums, self.files = verifier, {}, {}, {}
        self.columns = sorted({key for problem in problems for key in problem.columns})
        for spec in wanted:
            name, _, weight = spec.partition("=")
            with in_one_line(f"reward {spec}", "want a number behind ="):
                weight = float(weight or 1)
                if not abs(weight) < HUGE:
                    raise ValueError(f"over {HUGE:g}")
            if name == "verifier":
                verifier.check(problems)
            path, _, key = name.rpartition(":")
            if key in self.parts or (path and key == "verifier"):
                raise UserError(f"reward {spec}: there is another {key}, give it another name")
            self.parts[key] = (weight, load(name) if name != "verifier" else None)
            if path:
                self.files[f"reward {key}"] = sha256(pathlib.Path(path))

    def score(self, texts, problems, finished, tokens) -> list[float]:
        """The reward of each response: the sum of weight times value. tokens: its ids."""
        columns = {key: [p.columns.get(key) for p in problems] for key in self.columns}
        columns |= {"answer": [p.answer for p in problems], "finished": finished}
        columns["completion_ids"] = tokens
        prompts = [[{"role": "user", "content": p.prompt}] for p in problems]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        total = [0.0] * len(texts)
        columns |= {"prompts": prompts, "completions": completions}
        for name, (weight, function) in self.parts.items():
            if function is None:
                values = self.verifier.score(texts, problems, finished)
            else:
                values = call(name, function, columns)
            if len(values) != len(texts):
                raise UserError(f"reward {name} returned {len(values)} for {len(texts)} responses")
            for problem, value in zip(problems, values, strict=True):
                if not abs(value) < HUGE:  # nan is not
                    what = f"nan, inf or over {HUGE:g} for {problem.prompt[:50]!r}"
                    raise UserError(f"reward {name} returned {what}: {ADVICE}")
            self.sums[name] = sum(values)
            total = [sum_ + weight * value for sum_, value in zip(total, values, strict=True)]
        return total
