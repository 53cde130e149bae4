"""One's own reward functions, alone and beside the verifier."""

import json

import pytest
from conftest import TINY, call_main, metrics

from common import UserError
from common.rl import rewards
from common.rl.data import Problem
from common.rl.verifier import Verifier

MINE = """
def short(prompts, completions, **columns):
    return [-len(chat[0]["content"]) / 100 for chat in completions]

def seen(prompts, completions, answer, level, finished, **columns):
    rows = zip(prompts, completions, answer, level, finished, strict=True)
    return [len(p[0]["content"]) + 10 * a.count("4") + n + done for p, _, a, n, done in rows]

def ids(completions, completion_ids, **columns):
    return [len(ids) for ids in completion_ids]

def two(completions, **columns):
    return [1.0, None]

def one(completions, **columns):
    return [1.0]

def nans(completions, **columns):
    return [1.0, float("nan")]

def equal(completions, **columns):
    return [0.5 for _ in completions]

def broken(completions, answer, **columns):
    return [1 / (int(a) - 42) for a in answer]

def typo(completions, **columns):
    return [tpyo for _ in completions]

def whole(completions, **columns):
    return [1 / (2 - len(completions))] * 2
"""
PROBLEMS = [Problem("1+2", "3", "number", {"level": 100}), Problem("20+22", "42", "number", {})]
PROBLEMS[1].columns["level"] = 200
TEXTS = ["\\boxed{3}", "\\boxed{41}"]


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def scored(*wanted: str):
    made = rewards.Rewards(list(wanted), Verifier(), PROBLEMS)
    return made.score(TEXTS, PROBLEMS, [True, False], [[1, 2], [3]]), made


def test_the_verifier_is_the_default_and_a_weight_multiplies():
    assert scored("verifier")[0] == [1.0, 0.0]
    assert scored("verifier=2.5")[0] == [2.5, 0.0]


def test_a_function_gets_the_chats_the_answers_and_the_datas_other_columns(mine):
    assert scored(f"{mine}:seen")[0] == [3 + 100 + 1, 5 + 10 + 200 + 0]


def test_a_function_gets_a_column_even_where_no_row_of_the_batch_has_it(mine):
    rare = Problem("1 + 1?", "2", columns={"rare": 1})
    made = rewards.Rewards([f"{mine}:ids"], Verifier(), [*PROBLEMS, rare])
    asked = {}
    made.parts["ids"] = (1.0, lambda **columns: asked.update(columns) or [0.0, 0.0])
    made.score(TEXTS, PROBLEMS, [True, False], [[1, 2], [3]])
    assert asked["rare"] == [None, None]


def test_trls_column_of_token_ids_is_there(mine):
    assert scored(f"{mine}:ids")[0] == [2.0, 1.0]


def test_a_file_may_import_its_neighbour_and_have_dataclasses(tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 7.0")
    lines = "from __future__ import annotations\nimport dataclasses\nimport beside\n"
    lines += "@dataclasses.dataclass\nclass A:\n    x: float = beside.VALUE\n"
    lines += "def score(completions, **columns):\n    return [A().x for _ in completions]\n"
    (tmp_path / "data_class.py").write_text(lines)
    assert scored(f"{tmp_path}/data_class.py:score")[0] == [7.0, 7.0]


def test_several_are_added_and_each_has_its_own_sum(mine):
    found, made = scored("verifier", f"{mine}:short=0.5", f"{mine}:two")
    assert found == pytest.approx([1 - 0.045 + 1, 0 - 0.05 + 0])
    assert made.sums == pytest.approx({"verifier": 1.0, "short": -0.19, "two": 1.0})


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ("{}:broken", r"reward broken failed for '20\+22' \(ZeroDivisionError.*: it gets prompts"),
        ("{}:typo", r"reward typo failed \(NameError: name 'tpyo' is not defined\): it gets"),
        ("{}:whole", r"reward whole failed \(ZeroDivisionError: .* by zero\): it gets prompts"),
        ("{}:one", "reward one returned 1 for 2 responses"),
        ("{}:nans", r"reward nans returned nan, inf or over 1e\+30 for '.+'"),
        ("verifier=nan", "want a number behind ="),
        ("{}:none", r"cannot load reward .*AttributeError"),
        ("{0}:two {0}:two", "there is another two, give it another name"),
        ("{}:two=much", r"want a number behind ="),
        ("nowhere.py:two", "want verifier, or file.py:function of an existing file"),
        ("verifyer", "want verifier, or file.py:function"),
    ],
)
def test_what_is_wrong_with_a_reward_is_one_line(mine, wanted, line):
    with pytest.raises(UserError, match=line):
        scored(*wanted.format(mine).split())


def test_training_by_ones_own_reward_goes_on_only_with_the_same(new_run, tmp_path, mine, stage):
    """The reward is to be short, without a verifier."""
    flags = ["--reward", f"{mine}:short"]
    assert stage("01", new_run, *flags, "--steps", "1")[0] == 0
    [row] = metrics(new_run / "train")
    assert row["reward"] == row["accuracy"] < 0 < row["grad_norm"]
    (tmp_path / "mine.py").write_text(MINE + "\n")
    code, line = stage("01", new_run, *flags, "--steps", "2")
    assert (code, "was begun with reward short = " in line) == (2, True)


def test_steps_without_a_gradient_are_said_and_five_are_a_warning(new_run, mine, capsys):
    flags = ["--config", TINY, "--run-dir", str(new_run), "--steps", "5"]
    with pytest.raises(UserError, match="no step had a gradient: every problem's responses have"):
        call_main("01", *flags, "--reward", f"{mine}:equal")
    out, err = capsys.readouterr()
    assert out.count("no gradient: equal rewards in every group") == 5
    assert err.count("warning: 5 steps without a gradient") == 1
    rows = metrics(new_run / "train")
    assert {(row["grad_norm"], row["zero_variance_groups"]) for row in rows} == {(0.0, 1.0)}


def test_each_reward_is_in_the_metrics_and_accuracy_stays_the_verifiers(new_run, mine, stage):
    flags = ("--steps", "1", "--reward", "verifier", f"{mine}:short=2")
    assert stage("01", new_run, *flags)[0] == 0
    [row] = metrics(new_run / "train")
    assert row["accuracy"] == row["reward_verifier"] > 0 > row["reward_short"]
    both = row["reward_verifier"] + 2 * row["reward_short"]
    assert row["reward"] == pytest.approx(both, rel=1e-4)
    sample = json.loads((new_run / "train" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["reward"] not in (0.0, 1.0)
