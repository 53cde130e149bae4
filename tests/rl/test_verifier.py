"""Answers: what counts, what does not, and what must not hang."""

import json
import os
import signal
import subprocess
import sys

import pytest

from common import UserError
from common.rl import verifier
from common.rl.data import Problem

BOXED = r"\boxed{%s}"


def asked(*golds: str, kind: str = "latex") -> list[Problem]:
    """Problems with these answers."""
    return [Problem("", gold, kind) for gold in golds]


@pytest.fixture(scope="module")
def judge():
    judge = verifier.Verifier()
    yield judge
    judge.close()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{7", None),
        ("7", None),
        ("", None),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        ("}}{{" * 10, None),
        (r"\boxed{}", None),
        (r"\boxed{12}, in \boxed{}", "12"),
    ],
)
def test_the_last_balanced_box_is_taken(text, want):
    assert verifier.extract_boxed(text) == want


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "want"),
    [
        # plain numbers: leading zeros, 27.0, thousands, dollars, units
        ("latex", "612", "612", True),
        ("latex", "612", "0612", True),
        ("latex", "612", "612.0", True),
        ("latex", "1234", "1,234", True),
        ("latex", "1234", "1{,}234", True),
        ("latex", "12345", r"12\,345", True),
        ("latex", "-3", "$-3$", True),
        ("latex", "-3", "- 3", True),
        ("latex", "612", "613", False),
        ("latex", "73", "073", True),
        ("latex", "27.0", "27", True),
        ("latex", "27", "27.0", True),
        ("latex", "27.0", "27.5", False),
        ("latex", "10", r"10\text{ cm}", True),
        ("latex", "10", r"10\,\mathrm{cm}^2", True),
        ("latex", "90", r"90^\circ", True),
        ("latex", "56", "5 6", False),
        ("latex", "56", r"5 \text{ or } 6", False),
        ("latex", "1.6", "1.57", False),
        ("latex", "12345678", "12345679", False),
        ("latex", "612", r"\text{no}", False),
        # an unevaluated sum is no answer
        ("latex", "612", "123+489", False),
        ("latex", "612", "600 + 12", False),
        ("latex", "612", r"3 \cdot 204", False),
        # Minerva's e-notation, on either side
        ("latex", "4.5e33", r"4.5 \times 10^{33}", True),
        ("latex", "4.5e33", r"4.5\cdot 10^{33}", True),
        ("latex", "4.5e33", r"4.5\times10^{33}\text{ erg/s}", True),
        ("latex", "4.5e33", "4.5e33", True),
        ("latex", "4.5e33", "4.5E+33", True),
        ("latex", "4.5e33", r"45 \times 10^{32}", True),
        ("latex", "4.5e33", r"4.5*10^{33}", True),
        ("latex", "4.5e33", r"4.5\times{10^{33}}", True),
        ("latex", "3e8", "c=3*10^8", True),
        ("latex", "3e8", r"3*10^{8}\text{ m/s}", True),
        ("latex", "80", "2^3*10^1", False),
        ("latex", "80", r"2^3\times 10^1", False),
        ("latex", "200", r"2\times 10^1\times 10^1", False),
        ("latex", "200", "2*10^1*10^1", False),
        ("latex", "30", r"3 \times 10", False),
        ("latex", "3456", "3, 456", False),
        ("latex", "4.5e33", r"4.6 \times 10^{33}", False),
        ("latex", "4.5e33", r"4.5 \times 10^{32}", False),
        ("latex", "4.5e33", "4.5", False),
        ("latex", "9.6e-19", r"9.6 \times 10^{-19}", True),
        ("latex", "9.6e-19", "0", False),
        ("latex", "3.3e-8", "0.000000033", True),
        ("latex", "3.3e-8", "0.000000034", False),
        ("latex", "1e3", "1000", True),
        ("latex", "2e3x", r"2000x", True),
        ("latex", "612", "1.5e3", False),
        # bare LaTeX golds
        ("latex", r"4\sqrt{15}-14", r"4\sqrt{15}-14", True),
        ("latex", r"4\sqrt{15}-14", r"-14 + 4\sqrt{15}", True),
        ("latex", r"4\sqrt{15}-14", "4", False),
        ("latex", r"$\frac{1}{2}$", "0.5", True),
        ("latex", r"\boxed{\frac{1}{2}}", "0.5", True),
        ("latex", "0.5", r"\frac{1}{2}", True),
        ("latex", "612", r"\frac{1224}{2}", True),
        ("latex", r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        ("latex", r"\frac{1}{2}", r"\frac{1}{3}", False),
        ("latex", r"\sqrt{12}", r"2\sqrt{3}", True),
        ("latex", "1+x", "x+1", True),
        ("latex", "1+x", "x+2", False),
        ("latex", r"I(0)e^{-t}", r"I(0) e^{-t}", True),
        ("latex", r"\arcsin{1.3}", r"\arcsin(1.3)", True),
        ("latex", "(1,2)", r"\left(1, 2\right)", True),
        ("latex", "(1,2)", "(2,1)", False),
        ("latex", r"\{1,2\}", r"\{2, 1\}", True),
        # numbers as numbers: the parser is never asked
        ("number", "073", "73", True),
        ("number", "27.0", "27", True),
        ("number", "204", "x = 204", True),
        ("number", "204", r"204\text{ cm}", True),
        ("number", "20", r"20\%", True),
        ("number", "0.5", r"\frac{1}{2}", True),
        ("number", "-0.5", r"-\frac{1}{2}", True),
        ("number", "0.5", "1/2", True),
        ("number", "0.5", r"\frac{1}{0}", False),
        ("number", "204", r"\sqrt{41616}", False),
        ("number", "204", "200+4", False),
        ("number", "204", "100, 204", False),
        ("number", "204", "", False),
        # letters as letters
        ("letter", "B", "B", True),
        ("letter", "B", "(B)", True),
        ("letter", "B", r"\text{B}", True),
        ("letter", "B", r"\text{(B)}", True),
        ("letter", "B", r"\mathbf{B}.", True),
        ("letter", "B", "$b$", True),
        ("letter", "B", "AB", False),
        ("letter", "B", "B or C", False),
        ("letter", "B", "C", False),
        ("letter", "B", "2", False),
        ("letter", "B", "", False),
        ("letter", "B", "B. 42", True),
        ("letter", "B", "B: 5", True),
        ("letter", "B", r"\text{(B) foo}", True),
        ("letter", "B", "B) 7 apples", True),
        ("letter", "B", r"\textbf{B}. the second", True),
        ("letter", "B", "B: $x + 1$", True),
        ("letter", "B", "B) or C)", False),
        ("letter", "B", "b) or c)", False),
        ("letter", "B", "B. and A", False),
        ("letter", "B", "Bar", False),
        ("letter", "B", "B foo", False),
        ("letter", "B", "A. B", False),
        ("letter", "A", "A. B", False),
        ("letter", "B", "C: 42", False),
        ("letter", "D", "D. 12 V", True),
        ("letter", "A", "A. I and II only", True),
        ("letter", "A", "A. T > 0", True),
        ("letter", "A", "A. B, C", False),
        ("letter", "A", "A) or B) or C)", False),
        ("letter", "A", "A) B) C) D)", False),
        ("letter", "A", "A: B C D", False),
        ("letter", "A", "A) and also B)", False),
        ("letter", "A", "A. or maybe C, D?", False),
        ("letter", "A", "A. B\nC", False),
        ("letter", "A", "A. hepatitis B", True),
        ("letter", "B", "B. A car", True),
        ("letter", "A", "A) DNA and RNA", True),
        ("letter", "C", "C) NADH and FADH2", True),
        ("letter", "A", "A) H_2O", True),
        ("letter", "C", "C. $C_{60}$", True),
        ("letter", "A", "A. E = mc^2", True),
        ("letter", "A", "A. D-glucose", True),
        ("letter", "B", "B. E. coli", True),
        ("letter", "A", "A) or I)", False),
        ("letter", "A", "(A) and (I)", False),
        # a number in other clothes
        ("number", "18", r"\$18", True),
        ("number", "18", r"\$19", False),
        ("number", "204", r"\text{204}", True),
        ("number", "204", r"\text{205}", False),
        ("number", "204", r"\mathbf{204}", True),
        ("number", "204", r"\mathbf{204}.", True),
        ("number", "50", r"50\%.", True),
        ("number", "204", r"204\,.", True),
        ("number", "204", r"$204$.", True),
        ("number", "204", r"\mathbf{204}.5", False),
        ("number", "204", "m+n = 204", True),
        ("number", "204", "m + n = 205", False),
        ("number", "204", "100+104 = 204", False),
        ("number", "204", r"204\,", True),
        ("number", "204", r"\text{204} apples", False),
        ("number", "25", r"\angle ABC = 25^\circ", True),
        ("number", "25", "BC = 25", True),
        ("number", "5", "x^2 = 5", False),
        ("number", "5", r"\sqrt x = 5", False),
        ("number", "5", "not = 5", False),
        ("number", "5", r"\theta = 5", True),
        ("number", "5", "mn = 5", True),
        ("number", "5", "a+b_1=5", True),
        ("number", "5", r"\triangle ABC = 5", True),
        ("number", "0.5", r"{\frac{1}{2}}", True),
        ("number", "1234", "{1,234}", False),
        ("number", "25", "x_1 = 25", True),
        ("number", "25", "x-1 = 25", False),
        ("number", "25", "2x = 25", False),
        ("number", "25", "25°", True),
        ("number", "25", r"\boxed{25}", True),
        ("number", "25", "{25}", True),
        ("number", "-25", "\u221225", True),
        ("number", "5", "5 pi", False),
        # garbage
        ("latex", "612", "", False),
        ("latex", "612", "\x00", False),
        ("latex", "612", "½", False),
        ("latex", "x", "\\" * 99, False),
        ("latex", "x", "{" * 2000 + "}" * 2000, False),
        ("latex", "x", r"\frac" * 1000, False),
        ("latex", "612", "9" * 5000, False),
        ("number", "612", "1e999999999", False),
    ],
)
def test_answers_are_compared_as_what_they_are(judge, kind, gold, answer, want):
    assert judge.score([BOXED % answer], asked(gold, kind=kind), [True]) == [float(want)]


@pytest.mark.parametrize(
    "response",
    [
        "{" * 100_000,
        r"\boxed{" + "{" * 50_000 + "}" * 50_000 + "}",
        r"\boxed{" + "9" * 100_000 + "}",
        "\x00" * 100_000,
    ],
)
def test_much_rubbish_scores_zero(judge, response):
    for kind in ("latex", "number", "letter"):
        assert judge.score([response], asked("612", kind=kind), [True]) == [0.0]


@pytest.mark.parametrize(
    ("response", "gold", "want"),
    [
        ("12 + 30 = 42", "42", True),
        ("12 + 30 = 42.", "42", True),
        ("the answer is **-8**", "-8", True),
        ("3-2", "2", True),
        ("so −8 it is", "-8", True),
        ("= 1,234", "1234", True),
        ("it is 42, or perhaps 43", "42", False),
        ("forty-two", "42", False),
        ("", "42", False),
        ("7" * 100_000, "42", False),
        (r"\boxed{42} (problem 1)", "42", False),
    ],
)
def test_the_last_number_is_the_answer_where_that_is_the_format(response, gold, want):
    judge = verifier.Verifier(answer_format="last_number")
    assert judge.score([response], asked(gold), [True]) == [float(want)]
    assert judge.score([response], asked(gold), [False]) == [0.0]  # cut at the limit


def test_last_number_refuses_a_gold_that_no_number_can_equal():
    with pytest.raises(UserError, match="'Saturday' is not a number"):
        verifier.Verifier(answer_format="last_number").check(asked("Saturday"))
    verifier.Verifier().check(asked("Saturday"))


def test_a_power_tower_costs_its_limit_and_nothing_else(judge, monkeypatch):
    monkeypatch.setattr(judge, "time_limit", 60.0)
    judge.score([r"\boxed{x^{2}}"], asked("x^2"), [True])  # the worker is up
    worker = judge._worker
    with monkeypatch.context() as patch:
        patch.setattr(judge, "time_limit", 1.0)
        found = judge.score([r"\boxed{9^{9^{9^{9}}}}"], asked("612"), [True])
    assert found == [0.0]
    assert (judge.timeouts, judge.errors) == (1, 0)
    assert worker.returncode == -signal.SIGKILL
    texts = [r"\boxed{\frac{2}{4}}", r"\boxed{5}"]
    assert judge.score(texts, asked(r"\frac{1}{2}", "5"), [True] * 2) == [1.0, 1.0]


def test_a_worker_that_nobody_waits_for_ends_by_itself_and_no_ctrl_c_reaches_it():
    worker = verifier._start_worker()
    try:
        assert os.getsid(worker.pid) == worker.pid
        worker.stdin.write(
            json.dumps({"answer": "9^{9^{9^{9}}}", "gold": "612", "limit": -4}) + "\n"
        )  # alarm comes 5 s after the limit
        worker.stdin.flush()
        assert worker.wait(timeout=60) == -signal.SIGALRM
    finally:
        worker.kill()


def test_a_worker_that_died_is_replaced(judge, monkeypatch):
    monkeypatch.setattr(judge, "time_limit", 60.0)
    assert judge.score([r"\boxed{x^{2}}"], asked("x^2"), [True]) == [1.0]
    judge._worker.kill()
    judge._worker.wait()
    assert judge.score([r"\boxed{x^{2}}"], asked("x^2"), [True]) == [1.0]


def started_with(monkeypatch, *programs: str | None) -> list:
    """The next workers run these Python programs, None is the real one; those after them too.

    Returns what was started.
    """
    popen, left, started = subprocess.Popen, iter(programs), []

    def start(command, **how):
        program = next(left, None)
        started.append(popen([sys.executable, "-c", program] if program else command, **how))
        return started[-1]

    monkeypatch.setattr(verifier.subprocess, "Popen", start)
    return started


DIES = "print('ready', flush=True); input()"  # when it is asked


@pytest.mark.parametrize(("deaths", "want"), [(1, [1.0, 1.0]), (2, [0.0, 1.0])])
def test_an_answer_whose_worker_was_killed_is_asked_once_more_and_one_that_kills_two_is_an_error(
    monkeypatch, deaths, want
):
    judge = verifier.Verifier()
    started = started_with(monkeypatch, *[DIES] * deaths)
    responses = [r"\boxed{x^{2}+1}", r"\boxed{y+z}"]
    assert judge.score(responses, asked("1+x^2", "z+y"), [True, True]) == want
    assert (judge.timeouts, judge.errors) == (0, deaths - 1)
    assert len(started) == deaths + 1
    judge.close()


LOUD = """
print("a banner")
def parse(text, **_):
    print("parsing", flush=True)
    return text
def verify(*_, **__):
    return True
"""
PICKY = """
def verify(gold, answer, **_):
    if "garbage" in answer:
        raise ValueError("garbage")
    return True
"""
WORKER = "import runpy; runpy.run_module('common.rl.verifier', run_name='__main__')"


def test_what_a_library_prints_in_a_worker_is_no_answer(monkeypatch, tmp_path, capfd):
    """On its import, while it is asked, and before our code runs at all."""
    (tmp_path / "math_verify.py").write_text(LOUD)
    started_with(
        monkeypatch, f"import sys; sys.path.insert(0, {str(tmp_path)!r}); print('hello'); {WORKER}"
    )
    judge = verifier.Verifier()
    responses = [r"\boxed{x+1}", r"\boxed{y+z}"]
    assert judge.score(responses, asked("1+x", "z+y"), [True, True]) == [1.0, 1.0]
    judge.close()
    assert judge.errors == 0
    assert "parsing" in capfd.readouterr().err


def test_a_verifier_that_fails_on_everything_says_so_instead_of_scoring_zero(monkeypatch):
    started_with(monkeypatch, "raise ImportError('no math_verify')")
    with pytest.raises(UserError, match="math-verify does not work"):
        verifier.Verifier().score([r"\boxed{x+1}"], asked("1+x"), [True])


def test_garbage_alone_in_a_batch_does_not_stop_the_run(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text(LOUD + PICKY)
    started_with(monkeypatch, f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {WORKER}")
    judge = verifier.Verifier()
    assert judge.score([r"\boxed{garbage}"], asked("x"), [True]) == [0.0]
    assert (judge.timeouts, judge.errors) == (0, 1)
    judge.close()


def test_the_same_answer_is_asked_once(monkeypatch):
    judge, questions = verifier.Verifier(), []
    monkeypatch.setattr(judge, "_ask", lambda *question: questions.append(question) or True)
    scores = judge.score([r"\boxed{x+1}"] * 8, asked("1+x") * 8, [True] * 7 + [False])
    assert scores == [1.0] * 7 + [0.0]
    assert questions == [("x+1", "1+x")]
