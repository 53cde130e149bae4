"""The RL objective on tensors: advantages (Eq. 2 and three others), the clipped loss (Eq. 1), KL.

Tensors of tokens are flat, [tokens]: the responses of a batch one after another, without padding.
"""

from collections.abc import Callable

import torch

LOG_RATIO = 20.0  # log-ratios are clamped to +- this against overflow, as in verl


def centred_scores(scores: torch.Tensor) -> torch.Tensor:
    """S_i - mean of its group, exactly 0 where all are equal. [groups, samples], in and out."""
    differ = (scores != scores[:, :1]).any(1, keepdim=True)  # fp32 rounds the mean
    return (scores - scores.mean(1, keepdim=True)) * differ


def grpo_advantages(scores: torch.Tensor) -> torch.Tensor:
    """Eq. 2: (S_i - mean) / std within each group. [groups, samples] -> [groups, samples].

    Equal scores get zeros. [1, 0, 0, 0] -> [1.5, -0.5, -0.5, -0.5].
    """
    # The std is the unbiased one plus 1e-6, as in verl.
    return centred_scores(scores) / (scores.std(1, keepdim=True) + 1e-6)


def rloo_advantages(scores: torch.Tensor) -> torch.Tensor:
    """RLOO (arXiv 2402.14740): S_i - mean of the others in its group."""
    samples = scores.shape[1]
    return centred_scores(scores) * samples / (samples - 1)


def reinforce_returns(rewards, penalty, lengths: torch.Tensor) -> torch.Tensor:
    """REINFORCE++ (arXiv 2501.03262) before whitening: R_i - sum_{s >= t} penalty_is. [tokens]."""
    to_come = [part.flip(0).cumsum(0).flip(0) for part in penalty.split(lengths.tolist())]
    return torch.repeat_interleave(rewards.flatten(), lengths) - torch.cat(to_come)


def whiten(values: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(A - mean) / sqrt(unbiased variance + 1e-8) over all tokens of all processes. [tokens]."""
    added, count = total(torch.stack([values.sum(), values.new_tensor(float(len(values)))]))
    centred = values - added / count
    return centred / (total(centred.square().sum()) / (count - 1).clamp_min(1) + 1e-8).sqrt()


IN_GROUP = {
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce++-baseline": centred_scores,
}


def advantages(algorithm: str, rewards, penalty, lengths, total: Callable) -> torch.Tensor:
    """The advantage of every token of a step, [tokens]. The algorithms differ only here.

    rewards [groups, samples]; penalty [tokens] is beta k1 where KL is in the reward, else zeros;
    lengths [sequences]; total(x) is the sum of x over all processes. As in verl, the score of a
    response is S_i = R_i - sum_t penalty_it.
    """
    if algorithm == "reinforce++":  # no groups: reward minus penalties to come
        return whiten(reinforce_returns(rewards, penalty, lengths), total)
    charged = torch.stack([part.sum() for part in penalty.split(lengths.tolist())])
    scores = rewards - charged.view_as(rewards)
    found = torch.repeat_interleave(IN_GROUP[algorithm](scores).flatten(), lengths)
    return whiten(found, total) if algorithm == "reinforce++-baseline" else found


def token_weights(lengths: torch.Tensor, aggregation: str) -> torch.Tensor:
    """The weight of every token in the loss; they add up to 1. lengths [sequences] -> [tokens].

    >>> token_weights(torch.tensor([1, 3]), "seq")
    tensor([0.5000, 0.1667, 0.1667, 0.1667])
    """
    # seq is Eq. 1, (1/G) sum_i (1/|y_i|) sum_t: every response counts the same.
    if aggregation == "seq":
        return torch.repeat_interleave(1 / (lengths * len(lengths)), lengths)
    # token, the default of verl: every token counts the same.
    tokens = int(lengths.sum())
    return torch.full((tokens,), 1 / tokens)


def clipped_loss(logprobs, old_logprobs, advantages, weights, clip_low: float, clip_high: float):
    """Minus Eq. 1, without KL: -sum_t w_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t).

    Inputs [tokens]. Returns the loss, a scalar that adds up over micro-batches, and the weighted
    share of tokens where the clip acts.
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-LOG_RATIO, LOG_RATIO))  # r_t
    free, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    acts = (clipped < free).float()
    return -(weights * torch.minimum(free, clipped)).sum(), (weights * acts).sum().detach()


def k3_kl(logprobs, reference_logprobs, weights):
    """Eq. 1's D_KL by Schulman's k3: sum_t w_t (exp(d_t) - d_t - 1), d = reference - logp."""
    # Clamped as in verl. The paper prints the term inside of min(); this is its usual place.
    gap = (reference_logprobs - logprobs).clamp(-LOG_RATIO, LOG_RATIO)
    return (weights * (gap.exp() - gap - 1).clamp_max(10)).sum()


def rollout_correction(old_logprobs, engine_logprobs, cap: float):
    """min(pi_trainer / pi_engine, cap), [tokens]: truncated importance sampling (Yao 2025)."""
    return torch.exp(old_logprobs - engine_logprobs).clamp_max(cap)


def micro_batches(lengths: dict[int, int], budget: int, at_least: int = 1) -> list[list[int]]:
    """Sequences (id -> tokens) in parts of at most `budget` padded tokens, or one sequence.

    Then the fullest parts are halved until there are `at_least` parts (or one per sequence).

    >>> micro_batches({0: 5, 1: 2, 2: 3, 3: 9}, budget=8)  # 2 x 3 padded tokens fit, 3 x 5 do not
    [[1, 2], [0], [3]]
    """
    parts: list[list[int]] = []
    for i in sorted(lengths, key=lengths.get):
        if parts and lengths[i] * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    while len(parts) < min(at_least, len(lengths)):
        fullest = max(range(len(parts)), key=lambda j: len(parts[j]))
        half = len(parts[fullest]) // 2
        parts[fullest : fullest + 1] = [parts[fullest][:half], parts[fullest][half:]]
    return parts
