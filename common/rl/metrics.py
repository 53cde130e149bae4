"""What a step of RL writes of itself: its line of metrics.jsonl and its line on the console."""

import contextlib
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


def check_gap(line: dict, limit: float) -> None:
    """Raises UserError where engine and trainer disagree on the log-probabilities of the tokens."""
    step, gap = line["step"], line["logprob_gap_mean"]
    if not gap <= limit:  # nan is no agreement either
        what = f"engine and trainer disagree by {gap:.3f} nats a token (limit {limit})"
        raise UserError(f"step {step}: {what}: stale weights, or another temperature or template")


def of_step(run, batch, sums: dict, stats: list[dict]) -> dict:
    """The metrics of one step over all processes; the README explains each.

    `sums` is what `training.score` returns, `stats` what `training.descend` does, of each update.
    """
    cfg, judge = run.cfg, run.judge

    def total(*local: float) -> list[float]:
        values = torch.tensor(local, dtype=torch.float32, device=run.accelerator.device)
        return run.accelerator.reduce(values, "sum").tolist()

    spread = batch.rewards.max(1).values - batch.rewards.min(1).values
    cut, flat = batch.finished.count(False), (spread == 0).sum().item()
    size = (sum(map(len, batch.completions)), len(batch.completions), len(spread))
    tokens, sequences, groups, cut, flat = total(*size, cut, flat)
    reward, entropy, gap, kl = total(
        batch.rewards.sum().item(), sums["entropy"], sums["gap"], sums["kl"]
    )
    timeouts, errors = total(judge.timeouts, judge.errors)
    gap_max = torch.tensor([sums["gap_max"]], device=run.accelerator.device)
    values = {
        "reward": (reward - (cfg.kl_coef * kl if cfg.kl_in == "reward" else 0)) / sequences,
        "accuracy": reward / sequences,
        "response_length": tokens / sequences,
        "truncated_share": cut / sequences,
        "zero_variance_groups": flat / groups,
        "loss": sum(total(*(s["loss"] for s in stats))) / len(stats),
        "clip_share": sum(total(*(s["clip_share"] for s in stats))) / len(stats),
        **({"kl": kl / tokens} if cfg.kl_coef else {}),
        "entropy": entropy / tokens,
        "logprob_gap_mean": gap / tokens,
        "logprob_gap_max": run.accelerator.gather(gap_max).max().item(),
        "grad_norm": sum(s["grad_norm"] for s in stats) / len(stats),
        "learning_rate": cfg.learning_rate,
        "tokens": int(tokens),
        "verifier_timeouts": int(timeouts),
        "verifier_errors": int(errors),
    }
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}


def console_line(line: dict, last: int) -> str:
    """A line of metrics.jsonl for the console."""
    phases = " ".join(f"{name} {value:.2f}" for name, value in line["seconds_by_phase"].items())
    return (
        f"step {line['step']}/{last}  accuracy {line['accuracy']:.3f}  "
        f"length {line['response_length']:.1f}  cut {line['truncated_share']:.2f}  "
        f"flat {line['zero_variance_groups']:.2f}  clip {line['clip_share']:.3f}  "
        f"entropy {line['entropy']:.2f}  gap {line['logprob_gap_mean']:.0e}  "
        f"grad {line['grad_norm']:.2f}  {line['seconds']:.2f} s ({phases})"
    )
