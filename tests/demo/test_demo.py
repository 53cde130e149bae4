"""The demo's task and backbone."""

import importlib.util
import json
import random

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import demo
from common.files import read as inputs

spec = importlib.util.spec_from_file_location("b", ROOT / "tests/bench/demo_backbone.py")
spec.loader.exec_module(backbone := importlib.util.module_from_spec(spec))


def test_the_shipped_backbone_is_an_ordinary_small_qwen2():
    model = AutoModelForCausalLM.from_pretrained(demo.SHIPPED)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.head_dim >= 32
    assert sum(path.stat().st_size for path in demo.SHIPPED.iterdir()) < 1_000_000


def test_the_program_still_makes_the_shipped_backbone(tmp_path):
    """Its first 50 steps, against the loss that was logged when the shipped weights were made.

    Other processors round otherwise: one drifts by 1e-5 in 50 steps, by 2e-3 in 60.
    """
    shipped = json.loads((demo.SHIPPED / "pretraining_loss.json").read_text())
    losses = backbone.pretrain(tmp_path / "out", steps=50)
    assert losses == pytest.approx(shipped[:50], rel=1e-3)
    assert len(shipped) == backbone.STEPS
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / "out" / name).read_text() == (demo.SHIPPED / name).read_text()


def test_tokenizer_round_trip_and_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(demo.SHIPPED)
    text = "5+7+0=12,4+6+1=11,3+9+1=13,2+8+1=11,1+4+1=06;\\boxed{61312}"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) - len("\\boxed{") + 1
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|user|>1+2<|assistant|>"


def test_no_problem_is_in_two_of_the_three_files_in_either_order(empty_run):
    pairs = {}
    for name in ("train", "test", "valid"):
        rows = [
            json.loads(line)
            for line in (empty_run / "data" / f"{name}.jsonl").read_text().splitlines()
        ]
        assert all(eval(row["prompt"]) == int(row["answer"]) for row in rows)
        pairs[name] = {tuple(sorted(map(int, row["prompt"].split("+")))) for row in rows}
        assert len(pairs[name]) == len(rows)
    assert [len(pairs[name]) for name in pairs] == [
        demo.TRAIN_PROBLEMS,
        demo.TEST_PROBLEMS,
        demo.VALID_PROBLEMS,
    ]
    assert len(set.union(*pairs.values())) == sum(map(len, pairs.values()))


def test_training_and_test_problems_are_those_that_every_result_here_was_made_with(empty_run):
    assert inputs.sha256(empty_run / "data" / "train.jsonl") == "577cb8d2d108f799"
    assert inputs.sha256(empty_run / "data" / "test.jsonl") == "4c27ea0e8ed7aa91"


class OddSums:
    """A set of all pairs with an odd sum, too many to list."""

    def __contains__(self, pair):
        return sum(pair) % 2 == 1


def test_pretraining_never_sees_a_test_problem():
    tokenizer, held_out = AutoTokenizer.from_pretrained(demo.SHIPPED), OddSums()
    for ids, labels in backbone.pretraining_batch(random.Random(1), tokenizer, held_out):
        for row, label in zip(ids, labels, strict=True):
            a, b = (
                tokenizer.decode(row[: int((label == -100).int().cumprod(0).sum())])
                .removeprefix("<|user|>")
                .removesuffix("<|assistant|>")
                .split("+")
            )
            assert (int(a) + int(b)) % 2 == 0
            assert torch.equal(label[label != -100], row[label != -100])
