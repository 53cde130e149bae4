"""Every algorithm of stage 1 learns, and KL goes where it is told to."""

import contextlib
import importlib
import shutil
import types

import pytest
import torch
from conftest import metrics

from common import grpo
from common.rl import policy, training

# large steps on a small batch: half of what there is to learn in a few seconds
FAST = "--steps 16 --save-every 16 --resume-every 16 --prompts-per-step 8 --rollouts 8"
FAST += " --learning-rate 3e-3"
LINEAR = "--learning-rate-schedule linear"


@pytest.fixture
def trained(empty_run, tmp_path, stage):
    """Trains with the given options; returns the metrics."""

    def train(options: str, name: str = "run") -> list[dict]:
        run = shutil.copytree(empty_run, tmp_path / name)
        assert stage("01", run, *options.split())[0] == 0
        return metrics(run / "train")

    return train


def test_grpo_learns(trained):
    accuracy = [row["accuracy"] for row in trained(FAST)]
    assert sum(accuracy[-3:]) / 3 > sum(accuracy[:2]) / 2 + 0.15


def test_kl_in_the_reward_is_taken_from_the_reward(trained):
    rows = trained("--steps 2 --algorithm reinforce++-baseline --kl-coef 0.5 --kl-in reward")
    assert rows[0]["kl"] == 0  # the policy is still the backbone
    assert rows[0]["reward"] == rows[0]["accuracy"]
    assert rows[1]["kl"] != 0
    penalty = 0.5 * rows[1]["kl"] * rows[1]["response_length"]
    assert rows[1]["reward"] == pytest.approx(rows[1]["accuracy"] - penalty, rel=1e-4)


def test_kl_in_the_reward_adds_nothing_to_the_loss(trained, finished_run):
    """In the first step the policy that samples is the backbone, so the reward loses nothing, but
    k3 grows from update to update."""
    flags = {"reward": "--kl-coef 0.5 --kl-in reward", "loss": "--kl-coef 0.5"}
    loss = {name: trained(f"--steps 1 {f}", name)[0]["loss"] for name, f in flags.items()}
    plain = metrics(finished_run / "train")[0]["loss"]
    assert loss["reward"] == plain != loss["loss"]


def test_the_cap_on_importance_weighs_the_objective_and_not_the_kl_term(monkeypatch):
    """As in TRL and verl, which multiply the clipped loss and add beta k3 afterwards."""
    stage1 = importlib.import_module("01_train_lora_grpo")
    now, engine = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -1.0])
    old, reference = now - 0.1, now + 0.3
    one = [torch.tensor([0.5, -1.0, 2.0])]
    monkeypatch.setattr(policy, "token_logprobs", lambda *args: now)
    batch = training.Batch([], [[1]], [[2, 3, 4]], [], [], None, [engine], [old], [reference], one)
    weights = {0: torch.tensor([0.2, 0.3, 0.5])}
    cfg = stage1.TrainConfig(kl_coef=0.7, importance_cap=1.2)
    place = types.SimpleNamespace(autocast=contextlib.nullcontext)
    run = types.SimpleNamespace(cfg=cfg, accelerator=place, model=None)
    found, clipped = stage1.loss_of(run, batch, [0], weights)
    ratio = (old - engine).exp().clamp_max(1.2)
    objective, _ = grpo.clipped_loss(now, old, one[0], weights[0] * ratio, 0.2, 0.2)
    wanted = objective + 0.7 * grpo.k3_kl(now, reference, weights[0])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    uncapped = grpo.clipped_loss(now, old, one[0], weights[0], 0.2, 0.2)
    assert clipped == uncapped[1]  # a share of the tokens, whatever the cap


# --------------------------------------------------------------------------------------------------
# The learning rate
# --------------------------------------------------------------------------------------------------


def test_a_falling_rate_is_that_of_torchs_scheduler_resumes_bit_for_bit_and_gets_no_longer(
    trained, stage, tmp_path
):
    whole = trained(f"--steps 4 --resume-every 2 {LINEAR}")
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
    for row in whole:
        assert row["learning_rate"] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    train = tmp_path / "run" / "train"
    last = train / "step_0004" / "adapter_model.safetensors"
    wanted = last.read_bytes()
    (train / "done.json").unlink()  # as if killed after step 2
    for gone in ("resume/step_0004", "step_0004"):
        shutil.rmtree(train / gone)
    flags = f"--resume-every 2 {LINEAR}".split()
    assert stage("01", tmp_path / "run", "--steps", "4", *flags)[0] == 0
    assert last.read_bytes() == wanted
    assert metrics(train) == whole
    code, line = stage("01", tmp_path / "run", "--steps", "5", *flags)
    assert (code, "was made with option steps = 4, now it is 5" in line) == (2, True)


def test_stage_5_counts_the_fall_from_the_jump_and_has_a_folder_of_its_own(run, stage):
    flags = f"--start none --name none_linear --more-steps 2 {LINEAR}".split()
    assert stage("05", run, *flags)[0] == 0
    rows = metrics(run / "continued" / "none_linear")
    assert rows[1]["learning_rate"] == pytest.approx(rows[0]["learning_rate"] / 2)
