"""What a step of RL writes of itself: its line of metrics.jsonl and its line on the console."""

import contextlib
import math
import time

import torch

from common import UserError


class Timer:
    """Seconds by phase of one step."""

    def __init__(self):
        self.began, self.seconds = time.perf_counter(), {}

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def line(self, tokens: int) -> dict:
        """Seconds and tokens a second since this timer was made."""
        seconds = time.perf_counter() - self.began
        return {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "seconds_by_phase": {name: round(value, 4) for name, value in self.seconds.items()},
        }


def check_finite(step: int, stats: dict) -> None:
    """Raises UserError where the loss or the gradient of an update is not a number."""
    loss, norm = stats["loss"], stats["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(
            f"non-finite loss ({loss}) or gradient (norm {norm}) in step {step}; "
            "the last checkpoint is good: lower the learning rate"
        )


def check_gap(line: dict, limit: float) -> None:
    """Raises UserError where engine and trainer disagree on the log-probabilities of the tokens."""
    gap = line["logprob_gap_mean"]
    if not gap <= limit:  # nan is no agreement either
        raise UserError(
            f"step {line['step']}: engine and trainer disagree by {gap:.3f} nats a token (limit "
            f"{limit}): stale weights, another temperature, or a head that changes its logits"
        )


def of_step(run, batch, sums: dict, stats: list[dict]) -> dict:
    """The metrics of one step over all processes; the README explains each.

    `sums` is what `training.score` returns, `stats` what `training.descend` does, of each update.
    """
    cfg, judge, updates = run.cfg, run.judge, len(stats)
    spread = batch.rewards.max(1).values - batch.rewards.min(1).values
    cut = len(batch.finished) - sum(batch.finished)
    local = [sum(map(len, batch.completions)), len(batch.completions), batch.rewards.sum().item()]
    local += [cut, (spread == 0).sum().item(), len(spread)]
    local += [sums["entropy"], sums["gap"], sums["kl"], judge.timeouts, judge.errors]
    local += [s["loss"] for s in stats] + [s["clip_share"] for s in stats]
    total = torch.tensor(local, dtype=torch.float32, device=run.accelerator.device)
    total = run.accelerator.reduce(total, "sum").tolist()
    tokens, sequences, reward, cut, flat, groups, entropy, gap, kl, timeouts, errors = total[:11]
    gap_max = torch.tensor([sums["gap_max"]], device=run.accelerator.device)
    values = {
        "reward": (reward - (cfg.kl_coef * kl if cfg.kl_in == "reward" else 0)) / sequences,
        "accuracy": reward / sequences,
        "response_length": tokens / sequences,
        "truncated_share": cut / sequences,
        "zero_variance_groups": flat / groups,
        "loss": sum(total[11 : 11 + updates]) / updates,
        "clip_share": sum(total[11 + updates :]) / updates,
        **({"kl": kl / tokens} if cfg.kl_coef else {}),
        "entropy": entropy / tokens,
        "logprob_gap_mean": gap / tokens,
        "logprob_gap_max": run.accelerator.gather(gap_max).max().item(),
        "grad_norm": sum(s["grad_norm"] for s in stats) / updates,
        "learning_rate": cfg.learning_rate,
        "tokens": int(tokens),
        "verifier_timeouts": int(timeouts),
        "verifier_errors": int(errors),
    }
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}


def console_line(line: dict, last: int) -> str:
    """A line of metrics.jsonl for the console; `reproduce` reads its progress from it."""
    phases = " ".join(f"{name} {value:.2f}" for name, value in line["seconds_by_phase"].items())
    return (
        f"step {line['step']}/{last}  accuracy {line['accuracy']:.3f}  "
        f"length {line['response_length']:.1f}  cut {line['truncated_share']:.2f}  "
        f"flat {line['zero_variance_groups']:.2f}  clip {line['clip_share']:.3f}  "
        f"entropy {line['entropy']:.2f}  gap {line['logprob_gap_mean']:.0e}  "
        f"grad {line['grad_norm']:.2f}  {line['seconds']:.2f} s ({phases})"
    )
