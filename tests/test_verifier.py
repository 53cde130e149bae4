"""Answers: what counts, what does not, and what must not hang."""

import time

import pytest

from common import verifier

BOXED = r"\boxed{%s}"


@pytest.fixture(scope="module")
def judge():
    judge = verifier.Verifier(time_limit=2.0, workers=2)
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
        (r"\boxed{}", ""),
    ],
)
def test_the_last_balanced_box_is_taken(text, want):
    assert verifier.extract_boxed(text) == want


@pytest.mark.parametrize("text", ["{" * 2_000_000, r"\boxed{" * 200_000, "}" * 2_000_000, r"\boxed{1" + "{}" * 1_000_000, "\\" * 2_000_000])
def test_walls_of_braces_take_linear_time(text):
    began = time.perf_counter()
    verifier.extract_boxed(text)
    assert time.perf_counter() - began < 10  # a quadratic scan would take hours


@pytest.mark.parametrize(
    ("answer", "gold", "want"),
    [
        ("612", "612", True),
        ("0612", "612", True),
        ("612.0", "612", True),
        ("1,234", "1234", True),
        ("$-3$", "-3", True),
        ("613", "612", False),
        ("123+489", "612", False),
        ("600 + 12", "612", False),
        (r"3 \cdot 204", "612", False),
        ("1.5e3", "612", False),
        (r"\frac{1224}{2}", "612", True),
        (r"\frac{1}{2}", "0.5", True),
        ("x+1", "1+x", True),
        ("x+2", "1+x", False),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"\text{no}", "612", False),
        ("", "612", False),
        ("\x00", "612", False),
        ("½", "612", False),
    ],
)
def test_answers_are_compared_as_mathematics(judge, answer, gold, want):
    assert judge.score([BOXED % answer], [gold], [True]) == [float(want)]


def test_no_box_or_a_cut_response_scores_zero(judge):
    assert judge.score(["612", r"\boxed{612}", r"\boxed{612}"], ["612"] * 3, [True, False, True]) == [0.0, 0.0, 1.0]


def test_a_power_tower_costs_its_limit_and_nothing_else():
    judge = verifier.Verifier(time_limit=1.0, workers=1)
    judge.score([r"\boxed{x^{2}}"], ["x^2"], [True])  # the worker is up
    began = time.perf_counter()
    scores = judge.score([r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\frac{2}{4}}", r"\boxed{5}"], ["612", r"\frac{1}{2}", "5"], [True] * 3)
    judge.close()
    assert scores == [0.0, 1.0, 1.0]
    assert judge.timeouts == 1
    assert time.perf_counter() - began < 60


def test_a_worker_that_died_is_replaced():
    judge = verifier.Verifier(time_limit=5.0, workers=1)
    assert judge.score([r"\boxed{x^{2}}"], ["x^2"], [True]) == [1.0]
    worker = judge._idle.get()
    worker.kill()
    worker.wait()
    judge._idle.put(worker)
    assert judge.score([r"\boxed{x^{2}}"], ["x^2"], [True]) == [1.0]
    judge.close()
