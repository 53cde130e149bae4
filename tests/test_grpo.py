"""grpo.py against numbers worked out by hand."""

import math

import pytest
import torch

from common import grpo


def test_grpo_advantages_by_hand():
    advantages = grpo.grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]))
    # means 1/4 and 1/2; unbiased standard deviations sqrt(3/4 / 3) = 1/2 and sqrt(1 / 3)
    assert advantages[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert advantages[1].tolist() == pytest.approx([-0.5 * 3**0.5, 0.5 * 3**0.5, 0.5 * 3**0.5, -0.5 * 3**0.5], abs=1e-5)


@pytest.mark.parametrize("rewards", [[[1.0, 1.0, 1.0]], [[0.0, 0.0]], [[1.0]]])
def test_equal_rewards_and_single_samples_teach_nothing(rewards):
    assert grpo.grpo_advantages(torch.tensor(rewards)).abs().max() == 0


def test_token_weights_add_up_to_one_and_differ_as_they_should():
    lengths = torch.tensor([1, 4])
    assert grpo.token_weights(lengths, "token").tolist() == pytest.approx([0.2] * 5)
    assert grpo.token_weights(lengths, "seq").tolist() == pytest.approx([0.5] + [0.125] * 4)


def test_clipped_loss_by_hand():
    old = torch.zeros(4)
    new = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()  # ratios
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    # min(1.5, 1.2) = 1.2; min(0.5, 0.8) = 0.5; min(-1.5, -1.2) = -1.5; min(-0.5, -0.8) = -0.8
    loss, share = grpo.clipped_loss(new, old, advantages, torch.full((4,), 0.25), 0.2, 0.2)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert share.item() == pytest.approx(0.5)


def test_on_policy_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, share = grpo.clipped_loss(logprobs, logprobs.detach(), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5]), 0.2, 0.2)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.0, 0.5])  # -w A
    assert share == 0


def test_clip_can_be_wider_upwards():
    loss, _ = grpo.clipped_loss(torch.tensor([math.log(1.25)]), torch.zeros(1), torch.ones(1), torch.ones(1), 0.2, 0.28)
    assert loss.item() == pytest.approx(-1.25)


def test_k3_is_zero_at_equality_and_by_hand_elsewhere():
    assert grpo.k3_kl(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.ones(1)) == 0
    assert grpo.k3_kl(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.ones(1)).item() == pytest.approx(math.exp(-1) + 1 - 1)


def test_k3_estimates_the_kl_divergence():
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
    assert grpo.k3_kl(p, q, p.exp()).item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-6)  # expectation under p


def test_rollout_correction_is_the_ratio_up_to_the_cap():
    weights = grpo.rollout_correction(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.0, 0.0, 0.0]), cap=2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-1)])
