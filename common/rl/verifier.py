"""The verifiable reward: is the answer of a response the right one?

What common/rl/answers.py cannot decide goes to math-verify (sympy), in processes that are killed
at a time limit: answers such as 9^{9^{9^9}} hang a parser for ever. `main` is such a process.
"""

import concurrent.futures
import json
import logging
import os
import pathlib
import queue
import select
import signal
import subprocess
import sys

from common import UserError
from common.rl.answers import extract_boxed, last_number, normalise, plain_number, quick_verdict

DIED = "the worker died"
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Verifier:
    """Scores answers. `timeouts` and `errors` count those that math-verify could not decide.

    `answer_format` says where the answer is: "boxed", or "last_number" of the response. The worker
    processes are started when an answer needs them, and ended by `close`.
    """

    def __init__(self, time_limit: float = 5.0, answer_format: str = "boxed", workers: int = 2):
        self.time_limit, self.answer_format, self.workers = time_limit, answer_format, workers
        self.timeouts = self.errors = 0
        self._idle = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)  # a place for a process that is not yet started

    def score(self, responses, golds, finished, kinds=None) -> list[float]:
        """1.0 for each response whose answer equals its gold, else 0.0.

        A response that was cut at the length limit (not finished) gets 0.0. `kinds` are those of
        the problems, "latex" without any. Raises UserError where math-verify fails on all.
        """
        verdicts, kinds = [], kinds or ["latex"] * len(golds)
        for response, gold, whole, kind in zip(responses, golds, finished, kinds, strict=True):
            answer = self._extract(response, gold) if whole else None
            verdict = False if answer is None else quick_verdict(answer, gold, kind)
            verdicts.append((answer, gold) if verdict is None else verdict)
        asked = list(dict.fromkeys(v for v in verdicts if isinstance(v, tuple)))
        replies = dict(zip(asked, self._ask_all(asked), strict=True))
        return [float(replies.get(verdict, verdict)) for verdict in verdicts]

    def _extract(self, response: str, gold: str) -> str | None:
        if self.answer_format == "boxed":
            return extract_boxed(response)
        if plain_number(gold) is None:
            raise UserError(f"answer_format last_number: {gold[:50]!r} is not a number; use boxed")
        return last_number(response)

    def _ask_all(self, questions: list[tuple[str, str]]) -> list[bool]:
        with concurrent.futures.ThreadPoolExecutor(self.workers) as threads:
            replies = list(threads.map(lambda question: self._ask(*question), questions))
        errors = [error for _, error in replies if error not in (None, "timeout")]
        self.errors += len(errors)
        self.timeouts += sum(error == "timeout" for _, error in replies)
        # Garbage in every answer, or a broken installation that would score everything 0?
        if errors and len(errors) == len(questions):
            correct, error = self._ask(r"\frac{1}{2}", "0.5")
            if not correct and error != "timeout":
                what = f"math-verify fails on every answer, even on 1/2 = 0.5 ({error})"
                raise UserError(f"{what}: pip install -r requirements.txt")
        return [correct for correct, _ in replies]

    def _ask(self, answer: str, gold: str) -> tuple[bool, str | None]:
        """(correct, error) from one worker. One over the time limit is killed."""
        question = {"answer": normalise(answer), "gold": normalise(gold), "limit": self.time_limit}
        worker = self._idle.get()
        for _ in range(2):  # one that died may have been killed by others: a new one is asked
            worker = worker or _start_worker()
            correct, error = _reply(worker, json.dumps(question) + "\n", self.time_limit)
            if error in ("timeout", DIED):
                _end(worker)
                worker = None
            if error != DIED:
                break
        self._idle.put(worker)
        return correct, error

    def close(self) -> None:
        """Ends the worker processes."""
        for _ in range(self._idle.qsize()):
            if worker := self._idle.get():
                _end(worker)
            self._idle.put(None)


def _start_worker() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "common.rl.verifier"]
    # In a session of its own, so that Ctrl-C reaches the training loop alone.
    worker = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    # It is ready when math-verify is imported. That is not the time of an answer.
    any(line == "ready\n" for line in iter(worker.stdout.readline, ""))
    return worker


def _reply(worker: subprocess.Popen, question: str, limit: float) -> tuple[bool, str | None]:
    try:
        worker.stdin.write(question)
        worker.stdin.flush()
        if not select.select([worker.stdout], [], [], limit)[0]:
            return False, "timeout"
        verdict = json.loads(worker.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):  # before it read, or while it answered
        return False, DIED
    return verdict["correct"], verdict["error"]


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()


def main() -> None:
    """Reads lines {"answer", "gold", "limit"}; answers each with {"correct", "error"}."""
    pipe = os.fdopen(os.dup(1), "w")  # for the answers; what a library prints goes to stderr
    os.dup2(2, 1)
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limit is off
    print("ready", file=pipe, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        correct, error = False, None
        # Our caller kills us at the limit. Should it be gone, the alarm does.
        signal.alarm(int(question["limit"]) + 5)
        try:
            boxed = (f"\\boxed{{{question[key]}}}" for key in ("gold", "answer"))
            gold, answer = (parse(text, parsing_timeout=None) for text in boxed)
            correct = bool(verify(gold, answer, timeout_seconds=None))
        except Exception as failure:  # whatever sympy raises on garbage; the caller counts it
            error = f"{type(failure).__name__}: {failure}"[:200]
        signal.alarm(0)
        print(json.dumps({"correct": correct, "error": error}), file=pipe, flush=True)


if __name__ == "__main__":
    main()
