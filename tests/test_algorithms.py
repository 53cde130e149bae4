"""Every algorithm of stage 1 learns, and KL goes where it is told to."""

import shutil

import pytest
from conftest import TINY, call_stage

from common.files import read as inputs

# large steps on a small batch: half of what there is to learn in a few seconds
FAST = "--steps 8 --save-every 8 --resume-every 8 --prompts-per-step 8 --rollouts 8 --learning-rate 3e-3"


@pytest.fixture
def trained(empty_run, tmp_path, monkeypatch, capsys):
    """Trains with the given options; returns the metrics."""

    def train(options: str, name: str = "run") -> list[dict]:
        shutil.copytree(empty_run, tmp_path / name)
        command = ["01_train_lora_grpo.py", "--config", TINY, "--run-dir", str(tmp_path / name)]
        assert call_stage(monkeypatch, capsys, *command, *options.split())[0] == 0
        return inputs.read_jsonl(tmp_path / name / "train" / "metrics.jsonl")

    return train


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "reinforce++", "reinforce++-baseline"])
def test_the_algorithm_learns(trained, algorithm):
    accuracy = [row["accuracy"] for row in trained(f"{FAST} --algorithm {algorithm}")]
    assert sum(accuracy[-3:]) / 3 > sum(accuracy[:2]) / 2 + 0.15


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce++"])
def test_kl_in_the_reward_is_taken_from_the_reward(trained, algorithm):
    rows = trained(f"--steps 2 --algorithm {algorithm} --kl-coef 0.5 --kl-in reward")
    assert rows[0]["kl"] == 0  # the policy is still the backbone
    assert rows[0]["reward"] == rows[0]["accuracy"]
    assert rows[1]["kl"] != 0
    assert rows[1]["reward"] == pytest.approx(
        rows[1]["accuracy"] - 0.5 * rows[1]["kl"] * rows[1]["response_length"], rel=1e-4
    )


def test_kl_in_the_reward_adds_nothing_to_the_loss(trained):
    """In the first step the policy that samples is the backbone, so the reward loses nothing, but k3 grows from update to update."""
    plain, in_reward, in_loss = (
        trained(f"--steps 1 {flags}", name)[0]["loss"]
        for name, flags in (
            ("plain", ""),
            ("in_reward", "--kl-coef 0.5 --kl-in reward"),
            ("in_loss", "--kl-coef 0.5"),
        )
    )
    assert in_reward == plain != in_loss
