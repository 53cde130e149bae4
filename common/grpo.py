"""The RL objective as pure functions on tensors: advantages (Eq. 2), token weights, the clipped loss (Eq. 1), the rollout correction.

Per-token tensors are flat, [tokens]: the completions of a batch one after another, with no padding and so no mask to get wrong.
"""

import torch


def grpo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Eq. 2: (R_i - mean) / std within each group. rewards [groups, samples] -> advantages [groups, samples].

    std is the unbiased one plus 1e-6, as in verl (the paper does not say). A group whose rewards are all equal gets zeros; a group
    of one has nothing to be compared with and gets zeros too.

    >>> grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if rewards.shape[1] == 1:
        return centred
    return centred / (rewards.std(1, keepdim=True) + 1e-6)


ADVANTAGES = {"grpo": grpo_advantages}  # an algorithm is its advantage; the loss is the same for all


def token_weights(lengths: torch.Tensor, aggregation: str) -> torch.Tensor:
    """The weight of every token in the loss; all weights add up to 1. lengths [sequences] -> [tokens].

    `seq` is Eq. 1, (1/G) sum_i (1/|y_i|) sum_t: every response counts the same. `token` (verl's default): every token does.
    Computed once for a whole mini-batch, so that the loss does not depend on how micro-batches or processes cut it up.

    >>> token_weights(torch.tensor([1, 3]), "seq")
    tensor([0.5000, 0.1667, 0.1667, 0.1667])
    """
    if aggregation == "seq":
        return torch.repeat_interleave(1 / (lengths * len(lengths)), lengths)
    return torch.full((int(lengths.sum()),), 1 / int(lengths.sum()))


def clipped_loss(logprobs, old_logprobs, advantages, weights, clip_low: float, clip_high: float):
    """Eq. 1 without its KL term: -sum_t w_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t), r_t = exp(logp - old).

    All inputs [tokens]. Returns the loss (a scalar: add up over micro-batches) and the weighted share of tokens where the clip acts.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    acts = (clipped * advantages < ratio * advantages).float()
    return -(weights * surrogate).sum(), (weights * acts).sum().detach()


def k3_kl(logprobs, reference_logprobs, weights):
    """Eq. 1's D_KL by Schulman's k3 estimator, sum_t w_t (exp(d_t) - d_t - 1) with d = reference - logp: unbiased and never negative.

    In the scanned paper the term stands inside min's second argument; this is the standard place, outside.
    """
    gap = reference_logprobs - logprobs
    return (weights * (gap.exp() - gap - 1)).sum()


def rollout_correction(old_logprobs, engine_logprobs, cap: float):
    """Truncated importance weights min(pi_trainer / pi_engine, cap), [tokens]: what is sampled by one engine is trained by another.

    Follows truncated importance sampling (TIS) of Yao et al. 2025, on tokens.
    """
    return torch.exp(old_logprobs - engine_logprobs).clamp_max(cap)


def micro_batches(lengths: dict[int, int], budget: int, at_least: int = 1) -> list[list[int]]:
    """Sequences (id -> tokens) sorted by length and cut so that no part has over `budget` padded tokens, but at least one sequence each.

    Then the fullest parts are halved until there are `at_least` of them (or one for every sequence).

    >>> micro_batches({0: 5, 1: 2, 2: 3, 3: 9}, budget=8)  # 2 x 3 padded tokens fit, 3 x 5 do not
    [[1, 2], [0], [3]]
    >>> micro_batches({0: 5, 1: 2, 2: 3, 3: 9}, budget=99, at_least=3)
    [[1], [2], [0, 3]]
    """
    parts: list[list[int]] = []
    for i in sorted(lengths, key=lengths.__getitem__):
        if parts and lengths[i] * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    while len(parts) < min(at_least, len(lengths)):
        fullest = max(range(len(parts)), key=lambda j: len(parts[j]))
        half = len(parts[fullest]) // 2
        parts[fullest : fullest + 1] = [parts[fullest][:half], parts[fullest][half:]]
    return parts
