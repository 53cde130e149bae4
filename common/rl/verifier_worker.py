"""A process of the verifier, which compares answers by math-verify, until stdin closes.

Reads lines {"answer", "gold", "limit"} and answers each with {"correct", "error"}.
"""

import json
import logging
import os
import signal
import sys


def main() -> None:
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
