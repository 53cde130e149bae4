"""The verifiable reward: is the answer of a response the right one?

The kind of a problem says how answers are compared: "letter"; "number", exactly; "latex". What
`quick_verdict` cannot decide goes to math-verify (sympy), in a process that is killed at a time
limit: answers such as 9^{9^{9^9}} hang a parser for ever. `main` is that process.
"""

import contextlib
import fractions
import json
import logging
import os
import pathlib
import re
import select
import signal
import subprocess
import sys

from common import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"([+-]?)\s*(\d{1,400}\.?\d{0,400}|\.\d{1,400})(?:[eE]([+-]?\d{1,3}))?")
_TIMES_TEN = r"\s*(?:\\times|\\cdot|\*)\s*\{?\s*10\s*\}?\s*\^\s*\{?\s*([+-]?\d{1,3})\s*\}{0,2}"
_POWER = re.compile(_TIMES_TEN + "$")
_SCIENTIFIC = re.compile(r"(?<![\d.^])\d[\d.,]*" + _TIMES_TEN)  # 3 \times 10^{8}
_FRACTION = re.compile(
    r"([+-]?)\s*(?:\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}|([\d.,]+)\s*/\s*([\d.,]+))"
)
_E_NOTATION = re.compile(r"(\d\.?)[eE]([+-]?\d+)(?!\d|\.\d)")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|(?:\{,\}|\\[,!]|\s)\s*)(?=\d{3}(?!\d))")
_UNIT = re.compile(
    r"(?:\\[ ,;!]|~|\s)*"
    r"(?:\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?|\^\s*\{?\s*\\circ\s*\}?|°)$"
)
_UNEVALUATED = re.compile(r"\d\s*\}?\s*(\+|-|\*|\\cdot|\\times)\s*\{?\s*\d")
# Of an answer: x =, x_1 + y =, mn =, AB =, \angle ABC =, \theta =.
_GREEK = r"\\(?:alpha|beta|gamma|theta|phi|lambda|mu|omega)"
_TERM = rf"(?:(?!not\b)[a-z]{{1,3}}|[A-Z]{{1,4}}|{_GREEK})(?:_\{{?\w\}}?)?"
_NAME = re.compile(
    rf"^[\s$]*(?:\\(?:angle|triangle)\s*)?{_TERM}(?:\s*(?:[+-]|\\cdot)\s*{_TERM})*\s*="
)
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}\b)?"
)
_LOOKS = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\$|(?<!\d)(\\[,!;]|\s)+|(\\[,!;]|\s)+(?!\d)")
_LETTER = re.compile(r"[\s$({\[]*([A-Za-z])(?:[\s$)}\].]*$|\s*[).:}\]]+[\s\\]*(.+)$)", re.DOTALL)
# At its beginning, behind "or", "and" or a comma: B, but no article, no formula, and not I and II.
_ALONE = r"(?![\w^=<>+*-]|\s*[=<>+]|\.\s+[a-z])"
_ANOTHER = [
    re.compile(rf"(?:^|\b(?:or|and)\b(?:\W+\w+\b){{0,2}}?|[,;/&|\n])[^\w-]*(?:{letters}){_ALONE}")
    for letters in (r"[b-hj]|i(?!,? and i)|a(?!\s+[a-z])", r"[B-HJ]|I(?!,? and I)|A(?!\s+[a-z])")
]
_FACE = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|boldsymbol|boxed)\s*(?=\{)")


def extract_boxed(response: str) -> str | None:
    r"""The content of the last balanced `\boxed{...}`, None without one. Linear in the length."""
    opened, last = [], None
    for match in _BRACES.finditer(response):
        token = match.group()
        if token.startswith("\\boxed"):
            opened.append(match.end())
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened and (start := opened.pop()) is not None:
            last = response[start : match.start()].strip() or last  # of an empty one: that before
    return last


def last_number(response: str) -> str | None:
    """The last number in `response`, None without one: for small models, which do not box."""
    found = _LAST_NUMBER.findall(response.replace("\u2212", "-"))
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
    # A plain number or a fraction of two, perhaps after "m + n =" or before a percent sign. Another
    # word may stand beside it in \text{} alone.
    answer = _NAME.sub("", answer[:1001].replace("\u2212", "-"))
    spaces = r"(?:\\[ ,;!]|\s)+$|\\(?=\$)"
    answer = re.sub(spaces, "", re.sub(spaces, "", answer).removesuffix(".")).strip().strip("$")
    answer = answer.strip().removesuffix("%").removesuffix("\\")
    if face := _FACE.match(answer):
        answer = answer[face.end() :].removeprefix("{").removesuffix("}")
    elif re.fullmatch(r"\{(?:[^{},]|\{[^{}]*\})*\}", answer):
        answer = answer[1:-1]
    if not (fraction := _FRACTION.fullmatch(answer)):
        return plain_number(answer)
    above, below = (plain_number(fraction[i] or fraction[i + 2]) for i in (2, 3))
    if above is None or not below:
        return None
    return (-above if fraction[1] == "-" else above) / below


def letter(text: str) -> str | None:
    r"""The one letter of "B", "(b)", "\text{B}", "B." or "B: its option"; else None."""
    match = _LETTER.match(_FACE.sub("", text[:1000]))
    if not match:
        return None
    # What follows is the option's text, unless that offers another letter.
    named = _ANOTHER[match[1].isupper()].search(match[2] or "")
    return None if named else match[1].upper()


def quick_verdict(answer: str, gold: str, kind: str) -> bool | None:
    """True or False where that is clear without a parser, None where math-verify decides."""
    if kind == "letter":
        return letter(answer) is not None and letter(answer) == letter(gold)
    as_number = _number_answer if kind == "number" else plain_number
    right, number = as_number(gold), as_number(answer)
    if number is not None and right is not None:
        return abs(number - right) <= min(1, abs(right)) / 1_000_000
    if not answer.strip() or len(answer) > 10_000:
        return False
    # An unevaluated sum is no answer: math-verify takes 123+489 for 612, and RL learns to use that.
    asked = _SCIENTIFIC.sub("1", answer, count=1)
    if right is not None and (kind == "number" or _UNEVALUATED.search(asked)):
        return False
    # What changes the look of a formula and not its meaning; "5 6" is not "56".
    spelled = (_LOOKS.sub("", re.sub(r"\\[dt]frac", r"\\frac", t)) for t in (answer, gold))
    return True if len({*spelled}) == 1 else None


class Verifier:
    """Scores answers. `timeouts` and `errors` of the last call: what math-verify did not decide.
    Its process is started when an answer needs it, and ended by `close`."""

    def __init__(self, time_limit: float = 5.0, answer_format: str = "boxed"):
        self.time_limit, self.boxed = time_limit, answer_format == "boxed"
        self.timeouts = self.errors = 0
        self._worker = None

    def check(self, problems: list) -> None:
        """Raises UserError where no response can be right: last_number wants numbers."""
        for gold in [] if self.boxed else [problem.answer for problem in problems]:
            if plain_number(gold) is None:
                raise UserError(f"answer_format: {gold[:50]!r} is not a number; use boxed")

    def score(self, responses: list[str], problems: list, finished: list[bool]) -> list[float]:
        """1.0 for each finished response with the answer of its problem, else 0.0. Raises
        UserError where math-verify does not work."""
        self.timeouts, self.errors, verdicts = 0, 0, []
        for response, problem, whole in zip(responses, problems, finished, strict=True):
            gold, extract = problem.answer, extract_boxed if self.boxed else last_number
            answer = extract(response) if whole else None
            verdict = False if answer is None else quick_verdict(answer, gold, problem.kind)
            verdicts.append((answer, gold) if verdict is None else verdict)
        asked = dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, tuple))
        replies = {question: self._ask(*question) for question in asked}
        return [float(replies.get(verdict, verdict)) for verdict in verdicts]

    def _ask(self, answer: str, gold: str) -> bool:
        # 4.5e33 becomes 4.5 \times 10^{33}: math-verify takes an e for Euler's number.
        answer, gold = (_E_NOTATION.sub(r"\1 \\times 10^{\2}", x) for x in (answer, gold))
        question = {"answer": answer, "gold": gold, "limit": self.time_limit}
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
