"""The verifiable reward: is the answer in the last \\boxed{...} the right one?

Letters, plain numbers and equal strings are compared here, at once. Everything else goes to math-verify (sympy), in worker processes
that are killed at a time limit, because a hostile answer such as 9^{9^{9^9}} can hang a parser for ever and the training run with it.

The kind of a problem says how its answers are compared: "letter" as letters; "number" as exact numbers, here, so that no parser can be
fooled or hung (a gold that is no number is compared as "latex"); "latex" as mathematics.
"""

import concurrent.futures
import contextlib
import fractions
import json
import logging
import os
import pathlib
import queue
import re
import select
import signal
import subprocess
import sys
import threading

from common import UserError

START_LIMIT = 60  # seconds that a worker may take to import math-verify; it takes one
DIED = "the worker died"

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"([+-]?)\s*(\d{1,400}\.?\d{0,400}|\.\d{1,400})(?:[eE]([+-]?\d{1,3}))?")
_POWER = re.compile(r"\s*\\(?:times|cdot)\s*10\s*\^\s*\{?\s*([+-]?\d{1,3})\s*\}?$")
_FRACTION = re.compile(r"([+-]?)\s*(?:\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}|([\d.,]+)\s*/\s*([\d.,]+))")
_E_NOTATION = re.compile(r"(\d\.?)[eE]([+-]?\d+)(?!\d|\.\d)")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\[,!]|\s)\s*(?=\d{3}(?!\d))")
_UNIT = re.compile(r"(?:\\[ ,;!]|~|\s)*(?:\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?|\^\s*\{?\s*\\circ\s*\}?)$")
_UNEVALUATED = re.compile(r"\d\s*\}?\s*(\+|\*|\\cdot(?!\s*10\b)|-|\\times(?!\s*10\b))\s*\{?\s*\d")
_LAST_NUMBER = re.compile(r"(?:(?<![\w)\]}.])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}\b)?")
_LETTER = re.compile(r"[\s$({\[]*([A-Za-z])[\s$)}\].]*")


def extract_boxed(response: str) -> str | None:
    """The content of the last balanced `\\boxed{...}` of `response`, None without one. Linear in the length of the response.

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
    """The last number in `response`, None without one: an answer format for small models, which do not learn to box.

    >>> last_number("12 + 30 = 42, so 42 - 50 = -8."), last_number("It is 1,234.50 dollars"), last_number("3-2"), last_number("no")
    ('-8', '1,234.50', '2', None)
    """
    last = None
    for match in _LAST_NUMBER.finditer(response.replace("\u2212", "-")):
        last = match.group()
    return last


def plain_number(text: str) -> fractions.Fraction | None:
    """`text` as an exact number if it is a plain one: "073", "12,345", "$-3$", "10\\text{ cm}", "4.5e33", "4.5 \\times 10^{33}"."""
    if len(text) > 1000:
        return None
    text = _UNIT.sub("", text.strip().strip("$").strip()).rstrip(".")
    power = _POWER.search(text)
    number = _NUMBER.fullmatch(_THOUSANDS.sub("", text[: power.start()] if power else text).strip())
    if not number:
        return None
    sign, digits, exponent = number.groups()
    return fractions.Fraction(sign + digits) * fractions.Fraction(10) ** (int(exponent or 0) + int(power.group(1) if power else 0))


def _number_answer(answer: str) -> fractions.Fraction | None:
    """What a problem of kind "number" accepts: a plain number or a fraction of two, with "x =" before it or a percent sign behind it."""
    answer = re.sub(r"^[\s$]*[A-Za-z]\s*=", "", answer[:1001]).strip().strip("$").strip()
    answer = answer.removesuffix("%").removesuffix("\\")
    if fraction := _FRACTION.fullmatch(answer):
        above, below = (plain_number(part) for part in (fraction[2] or fraction[4], fraction[3] or fraction[5]))
        return None if above is None or not below else (-above if fraction[1] == "-" else above) / below
    return plain_number(answer)


def letter(text: str) -> str | None:
    """The letter that `text` consists of ("B", "(b)", "\\text{B}", "B."), None if it is anything else ("AB", "B or C")."""
    match = _LETTER.fullmatch(re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*(?=\{)", "", text[:100]))
    return match[1].upper() if match and len(text) <= 100 else None


def normalise(text: str) -> str:
    r"""A gold or an answer as math-verify reads it right: bare (it is boxed again later), e-notation written out.

    >>> normalise(r"$4.5e33$"), normalise(r"\boxed{x}"), normalise(r"I(0)e^{-t}")
    ('4.5 \\times 10^{33}', 'x', 'I(0)e^{-t}')
    """
    text = text.strip()
    inner = extract_boxed(text)
    text = inner.strip() if inner is not None and text == f"\\boxed{{{inner}}}" else text
    if len(text) > 1 and text[0] == text[-1] == "$" and "$" not in text.strip("$"):
        text = text.strip("$").strip()
    return _E_NOTATION.sub(r"\1 \\times 10^{\2}", text)


class Verifier:
    """Scores answers; `timeouts` and `errors` count the answers that math-verify could not decide (scored 0, never hidden).

    `answer_format` says where the answer is: in the last box, or the last number of the response. `workers` processes are started when
    the first answer needs them, and stopped by `close`.
    """

    def __init__(self, time_limit: float = 5.0, answer_format: str = "boxed", workers: int = 2):
        self.time_limit, self.answer_format, self.workers = time_limit, answer_format, workers
        self.timeouts = self.errors = 0
        self._idle: queue.SimpleQueue | None = None

    def score(self, responses: list[str], golds: list[str], finished: list[bool], kinds: list[str] | None = None) -> list[float]:
        """1.0 for each response whose answer equals its gold, else 0.0; a response cut at the length limit gets 0.0.

        `kinds` are those of the problems, "latex" without any. Raises UserError where math-verify fails on whatever it is asked.
        """
        verdicts, questions = [], []
        for response, gold, whole, kind in zip(responses, golds, finished, kinds or ["latex"] * len(golds), strict=True):
            answer = self._extract(response, gold) if whole else None
            verdicts.append(False if answer is None else quick_verdict(answer, gold, kind))
            questions.append((answer, gold))
        asked = list({question: None for question, verdict in zip(questions, verdicts, strict=True) if verdict is None})  # each once
        replies = dict(zip(asked, self._ask_all(asked), strict=True)) if asked else {}
        return [float(replies[question] if verdict is None else verdict) for question, verdict in zip(questions, verdicts, strict=True)]

    def _extract(self, response: str, gold: str) -> str | None:
        if self.answer_format == "boxed":
            return extract_boxed(response)
        if plain_number(gold) is None:
            raise UserError(f"answer_format last_number: the answer {gold[:50]!r} is not a number; use boxed")
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
        if len(errors) == len(questions):  # garbage, or a broken installation that would score everything 0?
            correct, error = self._ask(r"\frac{1}{2}", "0.5")
            if not correct and error != "timeout":
                raise UserError(f"math-verify fails on every answer, even on 1/2 = 0.5 ({error}): pip install -r requirements.txt")
        return [correct for correct, _ in replies]

    def _ask(self, answer: str, gold: str) -> tuple[bool, str | None]:
        """(correct, error) from one worker process; one over the time limit is killed, and its slot gets a new one next time.

        One that dies on the way may have been killed by others, which must not turn a right answer into a 0: a new one is asked once more.
        """
        question = json.dumps({"answer": normalise(answer), "gold": normalise(gold), "limit": self.time_limit}) + "\n"
        worker = self._idle.get()
        try:
            for _ in range(2):
                if worker is None or worker.poll() is not None:
                    worker = _start_worker()
                correct, error = _reply(worker, question, self.time_limit)
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


def quick_verdict(answer: str, gold: str, kind: str = "latex") -> bool | None:
    """True or False where that is clear without a parser, None where math-verify has to decide (kind "latex" alone).

    An unevaluated sum is no answer: math-verify would accept \\boxed{123+489} for 612, and RL finds such doors.
    """
    if kind == "letter":
        return letter(answer) is not None and letter(answer) == letter(gold)
    right = _number_answer(gold) if kind == "number" else plain_number(gold)
    number = _number_answer(answer) if kind == "number" else plain_number(answer)
    if number is not None and right is not None:
        return abs(number - right) <= min(1, abs(right)) / 1_000_000
    if kind == "number" and right is not None:
        return False
    if not answer.strip() or len(answer) > 10_000 or (right is not None and _UNEVALUATED.search(answer)):
        return False
    return True if _spelling(answer) == _spelling(gold) else None


def _spelling(text: str) -> str:
    """Without what changes the look of a formula and not its meaning; "5 6" is not "56"."""
    return re.sub(
        r"\\left(?![a-z])|\\right(?![a-z])|\$|(?<!\d)(\\[,!;]|\s)+|(\\[,!;]|\s)+(?!\d)",
        "",
        text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"),
    )


def _start_worker() -> subprocess.Popen:
    root = pathlib.Path(__file__).resolve().parents[2]
    worker = subprocess.Popen(
        [sys.executable, "-m", "common.rl.verifier"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,  # so that Ctrl-C reaches the training loop alone
    )
    late = threading.Event()
    watch = threading.Timer(START_LIMIT, lambda: (late.set(), worker.kill()))
    watch.start()
    try:
        ready = "ready\n" in iter(worker.stdout.readline, "")  # when math-verify is imported; that is not the answer's time
    finally:
        watch.cancel()
    if late.is_set() and not ready:
        _end(worker)
        raise UserError(
            f"math-verify was not imported within {START_LIMIT} s: a machine or a disk at its limit? Type the same command again to go on"
        )
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


def _worker() -> None:
    """Answers {"answer", "gold", "limit"} lines from stdin with {"correct", "error"} lines, until stdin closes."""
    pipe = os.fdopen(os.dup(1), "w")  # for the answers alone: what a library prints goes to stderr
    os.dup2(2, 1)
    signal.alarm(START_LIMIT + 5)  # the end of this process, here and below, should the one that would kill it be gone
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns, every time, that its own time limit is off
    signal.alarm(0)
    print("ready", file=pipe, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        correct, error = False, None
        signal.alarm(int(question["limit"]) + 5)
        try:  # the limit is enforced from outside, by killing this process: math-verify's own works in main threads only
            gold = parse(f"\\boxed{{{question['gold']}}}", parsing_timeout=None)
            answer = parse(f"\\boxed{{{question['answer']}}}", parsing_timeout=None)
            correct = bool(verify(gold, answer, timeout_seconds=None))
        except Exception as failure:  # whatever sympy or its parser raises on garbage: reported, and counted by the caller
            error = f"{type(failure).__name__}: {failure}"[:200]
        signal.alarm(0)
        print(json.dumps({"correct": correct, "error": error}), file=pipe, flush=True)


if __name__ == "__main__":
    _worker()
