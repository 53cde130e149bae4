"""Where a response has its answer, and which answers can be compared without a parser.

The kind of a problem says how: "letter"; "number", as exact numbers; "latex", as mathematics.
"""

import fractions
import re

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
    # A plain number or a fraction of two, perhaps after "x =" or before a percent sign.
    answer = re.sub(r"^[\s$]*[A-Za-z]\s*=", "", answer[:1001]).strip().strip("$").strip()
    answer = answer.removesuffix("%").removesuffix("\\")
    if not (fraction := _FRACTION.fullmatch(answer)):
        return plain_number(answer)
    above, below = (plain_number(fraction[i] or fraction[i + 2]) for i in (2, 3))
    if above is None or not below:
        return None
    return (-above if fraction[1] == "-" else above) / below


def letter(text: str) -> str | None:
    r"""The one letter of "B", "(b)", "\text{B}" or "B."; None for anything else."""
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*(?=\{)", "", text[:100])
    match = _LETTER.fullmatch(bare)
    return match[1].upper() if match and len(text) <= 100 else None


def normalise(text: str) -> str:
    r"""An answer with e-notation written out, which math-verify takes for Euler's number.

    >>> normalise("4.5e33"), normalise(r"I(0)e^{-t}")
    ('4.5 \\times 10^{33}', 'I(0)e^{-t}')
    """
    return _E_NOTATION.sub(r"\1 \\times 10^{\2}", text)


def quick_verdict(answer: str, gold: str, kind: str = "latex") -> bool | None:
    """True or False where that is clear without a parser, None where math-verify decides.

    An unevaluated sum is no answer: math-verify takes 123+489 for 612, and RL learns to use that.
    """
    if kind == "letter":
        return letter(answer) is not None and letter(answer) == letter(gold)
    as_number = _number_answer if kind == "number" else plain_number
    right, number = as_number(gold), as_number(answer)
    if number is not None and right is not None:
        return abs(number - right) <= min(1, abs(right)) / 1_000_000
    if not answer.strip() or len(answer) > 10_000:
        return False
    if right is not None and (kind == "number" or _UNEVALUATED.search(answer)):
        return False
    # What changes the look of a formula and not its meaning; "5 6" is not "56".
    spelled = (_LOOKS.sub("", re.sub(r"\\[dt]frac", r"\\frac", t)) for t in (answer, gold))
    return True if len({*spelled}) == 1 else None
