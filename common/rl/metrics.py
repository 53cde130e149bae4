"""What a step of RL writes of itself: its line of metrics.jsonl and its line on the console."""

import torch


def of_step(cfg, batch, sums: dict, stats: list[dict], judge, accelerator) -> dict:
    """The metrics of one step over all processes; the README's glossary explains each.

    `cfg` and `batch` are stage 1's TrainConfig and Batch, `sums` what score_rollouts returns, `stats` a dict of each update.
    """
    tokens = sum(map(len, batch.completions))
    spread = batch.rewards.max(1).values - batch.rewards.min(1).values
    local = [
        tokens,
        len(batch.completions),
        batch.rewards.sum().item(),
        len(batch.finished) - sum(batch.finished),
        (spread == 0).sum().item(),
        len(spread),
        sums["entropy"],
        sums["gap"],
        sums["kl"],
        judge.timeouts,
        judge.errors,
        *[s["loss"] for s in stats],
        *[s["clip_share"] for s in stats],
    ]
    total = accelerator.reduce(torch.tensor(local, dtype=torch.float32, device=accelerator.device), "sum").tolist()
    tokens, sequences, reward, cut, flat, groups, entropy, gap, kl, timeouts, errors = total[:11]
    gap_max = accelerator.gather(torch.tensor([sums["gap_max"]], device=accelerator.device)).max().item()
    values = {
        "reward": (reward - (cfg.kl_coef * kl if cfg.kl_in == "reward" else 0)) / sequences,
        "accuracy": reward / sequences,
        "response_length": tokens / sequences,
        "truncated_share": cut / sequences,
        "zero_variance_groups": flat / groups,
        "loss": sum(total[11 : 11 + len(stats)]) / len(stats),
        "clip_share": sum(total[11 + len(stats) :]) / len(stats),
        "kl": kl / tokens if cfg.kl_coef else None,
        "entropy": entropy / tokens,
        "logprob_gap_mean": gap / tokens,
        "logprob_gap_max": gap_max,
        "grad_norm": sum(s["grad_norm"] for s in stats) / len(stats),
        "learning_rate": cfg.learning_rate,
        "tokens": int(tokens),
        "verifier_timeouts": int(timeouts),
        "verifier_errors": int(errors),
    }
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items() if value is not None}


def console_line(line: dict, last: int) -> str:
    """A line of metrics.jsonl for the console, "step 10/150  accuracy ...": what `reproduce` reads its progress from."""
    phases = " ".join(f"{name} {value:.2f}" for name, value in line["seconds_by_phase"].items())
    return (
        f"step {line['step']}/{last}  accuracy {line['accuracy']:.3f}  length {line['response_length']:.1f}  "
        f"cut {line['truncated_share']:.2f}  flat {line['zero_variance_groups']:.2f}  clip {line['clip_share']:.3f}  "
        f"entropy {line['entropy']:.2f}  gap {line['logprob_gap_mean']:.0e}  grad {line['grad_norm']:.2f}  "
        f"{line['seconds']:.2f} s ({phases})"
    )
