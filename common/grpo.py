"""The RL objective as pure functions on tensors: advantages (Eq. 2 and three others), token weights, the clipped loss (Eq. 1), KL.

Per-token tensors are flat, [tokens]: the completions of a batch one after another, with no padding and so no mask to get wrong.
"""

from collections.abc import Callable

import torch


def grpo_advantages(scores: torch.Tensor) -> torch.Tensor:
    """Eq. 2: (S_i - mean) / std within each group. scores [groups, samples] -> advantages [groups, samples].

    std is the unbiased one plus 1e-6, as in verl (the paper does not say). A group whose scores are all equal gets zeros; a group
    of one has nothing to be compared with and gets zeros too.

    >>> grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = centred_scores(scores)
    if scores.shape[1] == 1:
        return centred
    return centred / (scores.std(1, keepdim=True) + 1e-6)


def rloo_advantages(scores: torch.Tensor) -> torch.Tensor:
    """RLOO (arXiv 2402.14740): S_i minus the mean of the others in its group. [groups, samples] -> [groups, samples].

    That is G / (G - 1) (S_i - mean), with no division by a std. A group of one gets zeros (in verl its score).

    >>> rloo_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])
    """
    samples = scores.shape[1]
    return centred_scores(scores) * samples / max(samples - 1, 1)


def centred_scores(scores: torch.Tensor) -> torch.Tensor:
    """S_i - mean of its group: REINFORCE++-baseline before it is whitened. [groups, samples] -> [groups, samples]."""
    return scores - scores.mean(1, keepdim=True)


def reinforce_returns(rewards: torch.Tensor, penalty: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """REINFORCE++ (arXiv 2501.03262) before it is whitened: R_i - sum_{s >= t} penalty_is, what is still to come at token t. [tokens].

    >>> reinforce_returns(torch.tensor([[1.0, 0.0]]), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2, 1]))
    tensor([ 0.7000,  0.8000, -0.3000])
    """
    to_come = [part.flip(0).cumsum(0).flip(0) for part in penalty.split(lengths.tolist())]
    return torch.repeat_interleave(rewards.flatten(), lengths) - torch.cat(to_come)


def whiten(values: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(A - mean) / sqrt(variance + 1e-8) over all tokens of all processes, the unbiased variance as in verl. [tokens] -> [tokens]."""
    added, count = total(torch.stack([values.sum(), values.new_tensor(float(len(values)))]))
    centred = values - added / count
    return centred / (total(centred.square().sum()) / (count - 1).clamp_min(1) + 1e-8).sqrt()


WITHIN_GROUP = {"grpo": grpo_advantages, "rloo": rloo_advantages, "reinforce++-baseline": centred_scores}


def advantages(algorithm: str, rewards, penalty, lengths, total: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The advantage of every token of a step: an algorithm is its advantage, the loss is the same for all.

    rewards [groups, samples]; penalty [tokens] is beta k1 where KL is in the reward and zeros where it is not; lengths [sequences], no
    mask. With R_i - sum_t penalty_it as the score S_i:

        grpo, rloo             a number a sequence, from the scores of its group
        reinforce++-baseline   S_i minus its group's mean, whitened over the step
        reinforce++            what is still to come at each token, whitened over the step: no group, so one sample a problem will do

    total(x) is the sum of x over all processes. As in verl (core_algos.py): its KL penalty is taken from the token rewards, whose sum is
    the score that the group is compared by. Whitening is over tokens, so long responses weigh more in it.
    """
    if algorithm == "reinforce++":
        return whiten(reinforce_returns(rewards, penalty, lengths), total)
    scores = rewards - torch.stack([part.sum() for part in penalty.split(lengths.tolist())]).view_as(rewards)
    found = torch.repeat_interleave(WITHIN_GROUP[algorithm](scores).flatten(), lengths)
    return whiten(found, total) if algorithm == "reinforce++-baseline" else found


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
