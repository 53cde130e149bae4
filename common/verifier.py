"""The verifiable reward: is the answer in the last \\boxed{...} the right one?

Plain numbers are compared here, at once. Everything else goes to math-verify (sympy), in worker processes that are killed at a
time limit, because a hostile answer such as 9^{9^{9^9}} can hang a parser for ever and take the whole training run with it.
"""

import concurrent.futures
import fractions
import json
import logging
import os
import pathlib
import queue
import re
import select
import subprocess
import sys

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d{1,400}\.?\d{0,400}|\.\d{1,400})")
_UNEVALUATED = re.compile(r"\d\s*\}?\s*(\+|\*|\\cdot|-|\\times(?!\s*10\b))\s*\{?\s*\d")


def extract_boxed(response: str) -> str | None:
    """The content of the last balanced `\\boxed{...}` of `response`, None without one. Linear in the length of the response.

    >>> extract_boxed(r"first \\boxed{1}, no: \\boxed{\\frac{1}{2}}"), extract_boxed(r"\\boxed{4")
    ('\\\\frac{1}{2}', None)
    """
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


def plain_number(text: str) -> fractions.Fraction | None:
    """`text` as an exact number if it is a plain integer or decimal ("073", "12,345", "27.0", "$-3$"), else None."""
    text = text.strip().strip("$").replace("\\!", "").replace("\\,", "").replace(" ", "").rstrip(".")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return fractions.Fraction(text) if _NUMBER.fullmatch(text) else None


class Verifier:
    """Scores answers; `timeouts` and `errors` count the answers that math-verify could not decide (scored 0, never hidden).

    `workers` processes are started when the first answer needs them, and stopped by `close`.
    """

    def __init__(self, time_limit: float = 5.0, workers: int = 2):
        self.time_limit, self.workers = time_limit, workers
        self.timeouts = self.errors = 0
        self._idle: queue.SimpleQueue | None = None

    def score(self, responses: list[str], golds: list[str], finished: list[bool]) -> list[float]:
        """1.0 for each response whose boxed answer equals its gold, else 0.0; a response cut at the length limit gets 0.0."""
        scores, undecided = [], []
        for i, (response, gold, whole) in enumerate(zip(responses, golds, finished, strict=True)):
            answer = extract_boxed(response) if whole else None
            verdict = False if answer is None else quick_verdict(answer, gold)
            if verdict is None:
                undecided.append((i, answer, gold))
            scores.append(float(bool(verdict)))
        if undecided:
            if self._idle is None:
                self._idle = queue.SimpleQueue()
                for _ in range(self.workers):
                    self._idle.put(None)  # a slot without a process yet
            with concurrent.futures.ThreadPoolExecutor(self.workers) as threads:
                verdicts = threads.map(lambda item: self._ask(item[1], item[2]), undecided)
                for (i, _, _), correct in zip(undecided, verdicts, strict=True):
                    scores[i] = float(correct)
        return scores

    def _ask(self, answer: str, gold: str) -> bool:
        """One question to one worker process; a worker over the time limit is killed, and its slot gets a new one next time."""
        worker = self._idle.get()
        if worker is None or worker.poll() is not None:
            worker = _start_worker()
        reply = ""
        try:
            worker.stdin.write(json.dumps({"answer": answer, "gold": gold}) + "\n")
            worker.stdin.flush()
            if select.select([worker.stdout], [], [], self.time_limit)[0]:
                reply = worker.stdout.readline()
            else:
                self.timeouts += 1
        except BrokenPipeError:
            self.errors += 1  # the worker died under the question before
        if not reply:
            worker.kill()
            worker.wait()
            self._idle.put(None)
            return False
        self._idle.put(worker)
        verdict = json.loads(reply)
        self.errors += verdict["error"] is not None
        return verdict["correct"]

    def close(self) -> None:
        """Ends the worker processes."""
        while self._idle is not None and not self._idle.empty():
            if (worker := self._idle.get()) is not None:
                worker.kill()
                worker.wait()


def quick_verdict(answer: str, gold: str) -> bool | None:
    """True or False where that is clear without a parser, None where math-verify has to decide.

    An unevaluated sum is no answer: math-verify would accept \\boxed{123+489} for 612, and RL finds such doors.
    """
    if answer.strip() == gold.strip():
        return True
    number, right = plain_number(answer), plain_number(gold)
    if number is not None and right is not None:
        return abs(number - right) < fractions.Fraction(1, 10**6)
    if not answer.strip() or len(answer) > 10_000 or (right is not None and _UNEVALUATED.search(answer)):
        return False
    return None


def _start_worker() -> subprocess.Popen:
    root = pathlib.Path(__file__).resolve().parents[1]
    worker = subprocess.Popen(
        [sys.executable, "-m", "common.verifier"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,  # so that Ctrl-C reaches the training loop alone
    )
    worker.stdout.readline()  # it says "ready" when math-verify is imported; that is not the answer's time
    return worker


def _worker() -> None:
    """Answers {"answer", "gold"} lines from stdin with {"correct", "error"} lines, until stdin closes."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns, every time, that its own time limit is off
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        correct, error = False, None
        try:  # the limit is enforced from outside, by killing this process: math-verify's own works in main threads only
            gold = parse(f"\\boxed{{{question['gold']}}}", parsing_timeout=None)
            answer = parse(f"\\boxed{{{question['answer']}}}", parsing_timeout=None)
            correct = bool(verify(gold, answer, timeout_seconds=None))
        except Exception as failure:  # whatever sympy or its parser raises on garbage: reported, and counted by the caller
            error = f"{type(failure).__name__}: {failure}"[:200]
        print(json.dumps({"correct": correct, "error": error}), flush=True)


if __name__ == "__main__":
    _worker()
