"""grpo.py against numbers worked out by hand."""

import math

import pytest
import torch

from common import grpo


def test_grpo_advantages_by_hand():
    advantages = grpo.grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]))
    # means 1/4 and 1/2; unbiased standard deviations sqrt(3/4 / 3) = 1/2 and sqrt(1 / 3)
    assert advantages[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert advantages[1].tolist() == pytest.approx(
        [-0.5 * 3**0.5, 0.5 * 3**0.5, 0.5 * 3**0.5, -0.5 * 3**0.5], abs=1e-5
    )


def alone(x):
    """The sum over all processes where there is one."""
    return x


@pytest.mark.parametrize("samples", range(2, 17))
def test_equal_rewards_teach_nothing_whatever_their_value(samples):
    """Also where the mean of fp32 numbers is not their value."""
    for value in (0.1, 1.8, 20.3, -7.7):
        scores = torch.full((2, samples), value)
        for algorithm in grpo.IN_GROUP.values():
            assert not algorithm(scores).any()


# Two groups of two: five tokens of reward 1, one of 0; two of 0, two of 0. KL costs 0.1 on some
# tokens, -0.2 on one.
REWARDS, LENGTHS = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([5, 1, 2, 2])
PENALTY = torch.tensor([0.1, 0.0, 0.1, 0.0, 0.0, 0.0, 0.1, -0.2, 0.0, 0.1])


def test_reinforce_pp_charges_each_token_the_kl_still_to_come():
    returns = torch.tensor([0.8, 0.9, 0.9, 1.0, 1.0, 0.0, 0.1, 0.2, -0.1, -0.1])
    assert grpo.reinforce_returns(REWARDS, PENALTY, LENGTHS).tolist() == pytest.approx(
        returns.tolist()
    )
    found = grpo.advantages("reinforce++", REWARDS, PENALTY, LENGTHS, alone)
    # mean 4.7 / 10; squares add up to 4.33, so the unbiased variance is (4.33 - 4.7^2 / 10) / 9
    assert found.tolist() == pytest.approx(
        [(x - 0.47) / ((4.33 - 2.209) / 9) ** 0.5 for x in returns.tolist()]
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_reinforce_pp_of_equal_rewards_is_zero(value):
    found = grpo.advantages(
        "reinforce++", torch.full((3, 2), value), torch.zeros(12), torch.full((6,), 2), alone
    )
    assert found.abs().max() == 0
    assert grpo.advantages(
        "reinforce++", torch.ones(1, 1), torch.zeros(1), torch.tensor([1]), alone
    ).tolist() == [0]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "reinforce++", "reinforce++-baseline"])
def test_tokens_without_padding_get_what_padded_and_masked_ones_would(algorithm):
    """The same on [sequences, time] in float64, with junk as padding that a mask must take out."""
    generator = torch.Generator().manual_seed(0)
    rewards, lengths = (
        torch.rand(3, 4, generator=generator),
        torch.randint(1, 9, (12,), generator=generator),
    )
    penalty = 0.1 * torch.randn(int(lengths.sum()), generator=generator)
    mask = torch.arange(8)[None] < lengths[:, None]
    padded = torch.full((12, 8), 7.0, dtype=torch.float64)
    padded[mask] = -penalty.double()
    padded[torch.arange(12), lengths - 1] += rewards.flatten().double()
    padded = padded * mask
    if algorithm == "reinforce++":
        want = torch.stack([padded[:, t:].sum(1) for t in range(8)], 1)
    else:
        scores = padded.sum(1).view(3, 4)
        want = scores - scores.mean(1, keepdim=True)
        if algorithm == "grpo":
            want = want / (scores.var(1, keepdim=True).sqrt() + 1e-6)
        if algorithm == "rloo":
            want = torch.stack(
                [
                    scores[:, i] - scores[:, [j for j in range(4) if j != i]].mean(1)
                    for i in range(4)
                ],
                1,
            )
        want = want.reshape(12, 1).expand(12, 8)
    want = want[mask]
    if algorithm.startswith("reinforce"):
        want = (want - want.mean()) / (want.var() + 1e-8).sqrt()
    found = grpo.advantages(algorithm, rewards, penalty, lengths, alone)
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)


def test_clipped_loss_by_hand():
    old = torch.zeros(4)
    new = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()  # ratios
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    # min(1.5, 1.28) = 1.28; min(0.5, 0.8) = 0.5; min(-1.5, -1.28) = -1.5; min(-0.5, -0.8) = -0.8
    loss, share = grpo.clipped_loss(new, old, advantages, torch.full((4,), 0.25), 0.2, 0.28)
    assert loss.item() == pytest.approx(-(1.28 + 0.5 - 1.5 - 0.8) / 4)
    assert share.item() == pytest.approx(0.5)


def test_on_policy_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, share = grpo.clipped_loss(
        logprobs, logprobs.detach(), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5]), 0.2, 0.2
    )
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.0, 0.5])  # -w A
    assert share == 0


def test_k3_estimates_the_kl_divergence():
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
    assert grpo.k3_kl(p, q, p.exp()).item() == pytest.approx(
        (p.exp() * (p - q)).sum().item(), abs=1e-6
    )  # expectation under p


def test_rollout_correction_is_the_ratio_up_to_the_cap():
    weights = grpo.rollout_correction(
        torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.0, 0.0, 0.0]), cap=2.0
    )
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-1)])


def test_log_ratios_are_clamped_as_in_verl_before_they_overflow():
    """A ratio of e^100 is inf in fp32: the loss was nan or inf where the advantage is negative."""
    logprobs = torch.tensor([0.0], requires_grad=True)
    loss, _ = grpo.clipped_loss(
        logprobs, torch.tensor([-100.0]), torch.tensor([-1.0]), torch.ones(1), 0.2, 0.2
    )
    assert loss.item() == pytest.approx(math.exp(20))
    loss.backward()
    assert logprobs.grad.item() == 0


def test_k3_is_clamped_as_in_verl():
    assert grpo.k3_kl(torch.tensor([-200.0]), torch.tensor([0.0]), torch.ones(1)) == 10
    assert grpo.k3_kl(torch.tensor([0.0]), torch.tensor([-200.0]), torch.ones(1)) == 10
    assert grpo.k3_kl(
        torch.tensor([0.0]), torch.tensor([-5.0]), torch.ones(1)
    ).item() == pytest.approx(4 + math.exp(-5))
