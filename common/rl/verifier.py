"""The verifiable reward: is the answer in the last \\boxed{...} the right one?

Letters, plain numbers and equal strings are compared here. All else goes to math-verify (sympy), in
processes that are killed at a time limit: answers such as 9^{9^{9^9}} hang a parser for ever.

The kind of a problem says how its answers are compared: "letter"; "number", as exact numbers and
without a parser; "latex", as mathematics.
"""

import concurrent.futures
import contextlib
import fractions
import json
import os
import pathlib
import queue
import re
import select
import subprocess
import sys

from common import UserError

DIED = "the worker died"
ROOT = pathlib.Path(__file__).resolve().parents[2]

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"([+-]?)\s*(\d{1,400}\.?\d{0,400}|\.\d{1,400})(?:[eE]([+-]?\d{1,3}))?")
_POWER = re.compile(r"\s*\\(?:times|cdot)\s*10\s*\^\s*\{?\s*([+-]?\d{1,3})\s*\}?$")
_FRACTION = re.compile(
    r"([+-]?)\s*(?:\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}|([\d.,]+)\s*/\s*([\d.,]+))"
)
_E_NOTATION = re.compile(r"(\d\.?)[eE]([+-]?\d+)(?!\d|\.\d)")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\[,!]|\s)\s*(?=\d{3}(?!\d))")
_UNIT = re.compile(
    r"(?:\\[ ,;!]|~|\s)*"
    r"(?:\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?|\^\s*\{?\s*\\circ\s*\}?)$"
)
_UNEVALUATED = re.compile(r"\d\s*\}?\s*(\+|\*|\\cdot(?!\s*10\b)|-|\\times(?!\s*10\b))\s*\{?\s*\d")
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}\b)?"
)
_LOOKS = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\$|(?<!\d)(\\[,!;]|\s)+|(\\[,!;]|\s)+(?!\d)")
_LETTER = re.compile(r"[\s$({\[]*([A-Za-z])[\s$)}\].]*")


def extract_boxed(response: str) -> str | None:
    """The content of the last balanced `\\boxed{...}`, None without one. Linear in the length.

    >>> extract_boxed(r"first \\boxed{1}, no: \\boxed{\\frac{1}{2}}"), extract_boxed(r"\\boxed{4")
    ('\\\\frac{1}{2}', None)
    """
    if "\\boxed" not in response:
        return None
    opened, last = [], None
    for match in _BRACES.finditer(response):
        token = match.group()
        if token.startswith("\\boxed"):
            opened.append(match.end())
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened and (start := opened.pop()) is not None:
            last = response[start : match.start()]
    return last


def last_number(response: str) -> str | None:
    """The last number in `response`, None without one: for small models, which do not box.

    >>> last_number("12 + 30 = 42, so 42 - 50 = -8."), last_number("3-2"), last_number("no")
    ('-8', '2', None)
    """
    found = [match.group() for match in _LAST_NUMBER.finditer(response.replace("\u2212", "-"))]
    return found[-1] if found else None


def plain_number(text: str) -> fractions.Fraction | None:
    r"""`text` as an exact number if it is a plain one: 073, 12,345, $-3$, 10\text{ cm}, 4.5e33."""
    if len(text) > 1000:
        return None
    text = _UNIT.sub("", text.strip().strip("$").strip()).rstrip(".")
    power = _POWER.search(text)  # \times 10^{33}
    number = _NUMBER.fullmatch(_THOUSANDS.sub("", text[: power.start()] if power else text).strip())
    if not number:
        return None
    sign, digits, exponent = number.groups()
    tens = int(exponent or 0) + int(power.group(1) if power else 0)
    return fractions.Fraction(sign + digits) * fractions.Fraction(10) ** tens


def _number_answer(answer: str) -> fractions.Fraction | None:
    """A plain number or a fraction of two, perhaps after "x =" or before a percent sign."""
    answer = re.sub(r"^[\s$]*[A-Za-z]\s*=", "", answer[:1001]).strip().strip("$").strip()
    answer = answer.removesuffix("%").removesuffix("\\")
    fraction = _FRACTION.fullmatch(answer)
    if not fraction:
        return plain_number(answer)
    above = plain_number(fraction[2] or fraction[4])
    below = plain_number(fraction[3] or fraction[5])
    if above is None or not below:
        return None
    return (-above if fraction[1] == "-" else above) / below


def letter(text: str) -> str | None:
    r"""The one letter of "B", "(b)", "\text{B}" or "B."; None for anything else."""
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*(?=\{)", "", text[:100])
    match = _LETTER.fullmatch(bare)
    return match[1].upper() if match and len(text) <= 100 else None


def normalise(text: str) -> str:
    r"""An answer as math-verify reads it right: without its box, e-notation written out.

    >>> normalise(r"$4.5e33$"), normalise(r"\boxed{x}"), normalise(r"I(0)e^{-t}")
    ('4.5 \\times 10^{33}', 'x', 'I(0)e^{-t}')
    """
    text = text.strip()
    inner = extract_boxed(text)
    text = inner.strip() if inner is not None and text == f"\\boxed{{{inner}}}" else text
    if len(text) > 1 and text[0] == text[-1] == "$" and "$" not in text.strip("$"):
        text = text.strip("$").strip()
    return _E_NOTATION.sub(r"\1 \\times 10^{\2}", text)


def quick_verdict(answer: str, gold: str, kind: str = "latex") -> bool | None:
    """True or False where that is clear without a parser, None where math-verify decides.

    An unevaluated sum is no answer: math-verify takes 123+489 for 612, and RL finds such doors.
    """
    if kind == "letter":
        return letter(answer) is not None and letter(answer) == letter(gold)
    as_number = _number_answer if kind == "number" else plain_number
    right, number = as_number(gold), as_number(answer)
    if number is not None and right is not None:
        return abs(number - right) <= min(1, abs(right)) / 1_000_000
    if kind == "number" and right is not None:
        return False
    if not answer.strip() or len(answer) > 10_000:
        return False
    if right is not None and _UNEVALUATED.search(answer):
        return False
    return True if _spelling(answer) == _spelling(gold) else None


def _spelling(text: str) -> str:
    """Without what changes the look of a formula and not its meaning; "5 6" is not "56"."""
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _LOOKS.sub("", text)


class Verifier:
    """Scores answers. `timeouts` and `errors` count those that math-verify could not decide.

    `answer_format` says where the answer is: "boxed", or "last_number" of the response. The worker
    processes are started when an answer needs them, and ended by `close`.
    """

    def __init__(self, time_limit: float = 5.0, answer_format: str = "boxed", workers: int = 2):
        self.time_limit, self.answer_format, self.workers = time_limit, answer_format, workers
        self.timeouts = self.errors = 0
        self._idle: queue.SimpleQueue | None = None

    def score(self, responses, golds, finished, kinds=None) -> list[float]:
        """1.0 for each response whose answer equals its gold, else 0.0.

        A response that was cut at the length limit (not finished) gets 0.0. `kinds` are those of
        the problems, "latex" without any. Raises UserError where math-verify fails on all.
        """
        verdicts, questions = [], []
        kinds = kinds or ["latex"] * len(golds)
        for response, gold, whole, kind in zip(responses, golds, finished, kinds, strict=True):
            answer = self._extract(response, gold) if whole else None
            verdicts.append(False if answer is None else quick_verdict(answer, gold, kind))
            questions.append((answer, gold))
        pairs = list(zip(questions, verdicts, strict=True))
        asked = list(dict.fromkeys(question for question, verdict in pairs if verdict is None))
        replies = dict(zip(asked, self._ask_all(asked), strict=True)) if asked else {}
        return [float(replies[q] if verdict is None else verdict) for q, verdict in pairs]

    def _extract(self, response: str, gold: str) -> str | None:
        if self.answer_format == "boxed":
            return extract_boxed(response)
        if plain_number(gold) is None:
            raise UserError(f"answer_format last_number: {gold[:50]!r} is not a number; use boxed")
        return last_number(response)

    def _ask_all(self, questions: list[tuple[str, str]]) -> list[bool]:
        if self._idle is None:
            self._idle = queue.SimpleQueue()
            for _ in range(self.workers):
                self._idle.put(None)  # a slot without a process yet
        with concurrent.futures.ThreadPoolExecutor(self.workers) as threads:
            replies = list(threads.map(lambda question: self._ask(*question), questions))
        errors = [error for _, error in replies if error not in (None, "timeout")]
        self.errors += len(errors)
        self.timeouts += sum(error == "timeout" for _, error in replies)
        # Garbage in every answer, or a broken installation that would score everything 0?
        if len(errors) == len(questions):
            correct, error = self._ask(r"\frac{1}{2}", "0.5")
            if not correct and error != "timeout":
                raise UserError(
                    f"math-verify fails on every answer, even on 1/2 = 0.5 ({error}): "
                    "pip install -r requirements.txt"
                )
        return [correct for correct, _ in replies]

    def _ask(self, answer: str, gold: str) -> tuple[bool, str | None]:
        """(correct, error) from one worker. One over the time limit is killed.

        A worker that died may have been killed by others: a new one is asked once more.
        """
        question = {"answer": normalise(answer), "gold": normalise(gold), "limit": self.time_limit}
        worker = self._idle.get()
        try:
            for _ in range(2):
                if worker is None or worker.poll() is not None:
                    worker = _start_worker()
                correct, error = _reply(worker, json.dumps(question) + "\n", self.time_limit)
                if error in ("timeout", DIED):
                    _end(worker)
                if error != DIED:
                    break
        finally:
            self._idle.put(worker)
        return correct, error

    def close(self) -> None:
        """Ends the worker processes."""
        while self._idle is not None and not self._idle.empty():
            if (worker := self._idle.get()) is not None:
                _end(worker)
        self._idle = None


def _start_worker() -> subprocess.Popen:
    worker = subprocess.Popen(
        [sys.executable, "-m", "common.rl.verifier_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,  # so that Ctrl-C reaches the training loop alone
    )
    # It is ready when math-verify is imported. That is not the time of an answer.
    any(line == "ready\n" for line in iter(worker.stdout.readline, ""))
    return worker


def _reply(worker: subprocess.Popen, question: str, limit: float) -> tuple[bool, str | None]:
    """(correct, error) as `worker` answers, or where it takes longer than `limit` or dies."""
    reply = ""
    with contextlib.suppress(BrokenPipeError):  # it died before it read the question
        worker.stdin.write(question)
        worker.stdin.flush()
        if not select.select([worker.stdout], [], [], limit)[0]:
            return False, "timeout"
        reply = worker.stdout.readline()
    if not reply.endswith("\n"):
        return False, DIED
    verdict = json.loads(reply)
    return verdict["correct"], verdict["error"]


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
