"""The verifiable reward: is the answer of a response the right one?

What common/rl/answers.py cannot decide goes to math-verify (sympy), in a process that is killed at
a time limit: answers such as 9^{9^{9^9}} hang a parser for ever. `main` is that process.
"""

import contextlib
import json
import logging
import os
import pathlib
import select
import signal
import subprocess
import sys

from common import UserError
from common.rl.answers import extract_boxed, last_number, normalise, plain_number, quick_verdict

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Verifier:
    """Scores answers. `timeouts` and `errors` count those that math-verify could not decide.

    `answer_format` says where the answer is: "boxed", or "last_number" of the response. The worker
    process is started when an answer needs it, and ended by `close`.
    """

    def __init__(self, time_limit: float = 5.0, answer_format: str = "boxed"):
        self.time_limit, self.answer_format = time_limit, answer_format
        self.timeouts = self.errors = 0
        self._worker = None

    def score(self, responses, golds, finished, kinds=None) -> list[float]:
        """1.0 for each response whose answer equals its gold, else 0.0.

        A response that was cut at the length limit (not finished) gets 0.0. `kinds` are those of
        the problems, "latex" without any. Raises UserError where math-verify does not work.
        """
        verdicts, kinds = [], kinds or ["latex"] * len(golds)
        for response, gold, whole, kind in zip(responses, golds, finished, kinds, strict=True):
            answer = self._extract(response, gold) if whole else None
            verdict = False if answer is None else quick_verdict(answer, gold, kind)
            verdicts.append((answer, gold) if verdict is None else verdict)
        asked = dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, tuple))
        replies = {question: self._ask(*question) for question in asked}
        return [float(replies.get(verdict, verdict)) for verdict in verdicts]

    def _extract(self, response: str, gold: str) -> str | None:
        if self.answer_format == "boxed":
            return extract_boxed(response)
        if plain_number(gold) is None:
            raise UserError(f"answer_format last_number: {gold[:50]!r} is not a number; use boxed")
        return last_number(response)

    def _ask(self, answer: str, gold: str) -> bool:
        question = {"answer": normalise(answer), "gold": normalise(gold), "limit": self.time_limit}
        for _ in range(2):  # a worker that died may have been killed by others: a new one is asked
            self._worker = self._worker or _start_worker()
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(question), file=self._worker.stdin, flush=True)
                if not select.select([self._worker.stdout], [], [], self.time_limit)[0]:
                    self.timeouts += 1
                    self.close()
                    return False
                if reply := self._worker.stdout.readline():
                    correct = json.loads(reply)
                    self.errors += correct is None
                    return correct is True
            self.close()
        self.errors += 1
        return False

    def close(self) -> None:
        """Ends the worker process."""
        if self._worker:
            self._worker.kill()
            self._worker.wait()
            self._worker = None


def _start_worker() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "common.rl.verifier"]
    # In a session of its own, so that Ctrl-C reaches the training loop alone.
    worker = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    # It is ready when math-verify is imported. That is not the time of an answer.
    if "ready\n" not in worker.stdout:
        raise UserError("math-verify does not work: pip install -r requirements.txt")
    return worker


def main() -> None:
    """Reads lines {"answer", "gold", "limit"}; answers true, false, or null for an error."""
    pipe = os.fdopen(os.dup(1), "w")  # for the answers; what a library prints goes to stderr
    os.dup2(2, 1)
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limit is off

    def is_right(answer: str, gold: str) -> bool:
        boxed = (f"\\boxed{{{text}}}" for text in (gold, answer))
        parsed = [parse(text, parsing_timeout=None) for text in boxed]
        return bool(verify(*parsed, timeout_seconds=None))

    if not is_right(r"\frac{1}{2}", "0.5"):
        raise SystemExit("math-verify takes 1/2 and 0.5 for different numbers")
    print("ready", file=pipe, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        # Our caller kills us at the limit. If the caller is gone, the alarm does it.
        signal.alarm(int(question["limit"]) + 5)
        try:
            correct = is_right(question["answer"], question["gold"])
        except Exception:  # whatever sympy raises on garbage; the caller counts it
            correct = None
        signal.alarm(0)
        print(json.dumps(correct), file=pipe, flush=True)


if __name__ == "__main__":
    main()
