"""What is seen of a run while it trains: metrics.jsonl, the console, the tracker."""

import contextlib
import pathlib
import sys
import time

import torch
from tqdm import tqdm

from common import UserError
from common.files.config import as_dict
from common.files.read import read_jsonl
from common.files.stage import is_writer
from common.rl import rollout

FLAT = 5  # steps without a gradient after which a warning comes
WHY = "every problem's responses have equal rewards; see common/rl/README.md"


class Timer:
    """Seconds by phase of one step."""

    def __init__(self):
        self.began, self.seconds = time.perf_counter(), {}

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 4)

    def line(self, tokens: int) -> dict:
        """Seconds and tokens a second since this timer was made, without those of `eval`."""
        seconds = time.perf_counter() - self.began - self.seconds.get("eval", 0.0)
        line = {"seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}
        return {**line, "seconds_by_phase": self.seconds}


def check_gap(line: dict, limit: float) -> None:
    """Raises UserError where engine and trainer disagree on the log-probabilities of the tokens."""
    gap = line["logprob_gap_mean"]
    if not gap <= limit:  # nan is no agreement either
        what = f"step {line['step']}: engine and trainer disagree by {gap:.3f} nats a token"
        raise UserError(f"{what}: stale weights, or another temperature or template")


def check_moved(log: pathlib.Path) -> None:
    """Raises UserError where no step of a run had a gradient: nothing can follow from it."""
    rows = read_jsonl(log, {"grad_norm": float}) if is_writer() else []
    if len(rows) >= FLAT and not any(row["grad_norm"] for row in rows):
        raise UserError(f"no step had a gradient: {WHY}")


def of_step(run, batch, scored: dict, updates: list[dict]) -> dict:
    """The metrics of one step over all processes; the README explains each.

    `scored` is what `training.score` returns, `updates` what `training.descend` does of each.
    """
    cfg, accelerator, judge = run.cfg, run.accelerator, run.rewards.verifier
    spread = batch.rewards.max(1).values - batch.rewards.min(1).values
    sums = {
        "tokens": sum(map(len, batch.completions)),
        "sequences": len(batch.completions),
        "groups": len(spread),
        "cut": batch.finished.count(False),
        "flat": (spread == 0).sum().item(),
        "reward": batch.rewards.sum().item(),
        "squares": batch.rewards.square().sum().item(),
        "timeouts": judge.timeouts,
        "errors": judge.errors,
        **scored,
        **{f"reward_{name}": value for name, value in run.rewards.sums.items()},
    }
    local = torch.tensor([*sums.values()], dtype=torch.float32, device=accelerator.device)
    total = dict(zip(sums, accelerator.reduce(local, "sum").tolist(), strict=True))
    gap_max = torch.tensor([scored["gap_max"]], device=accelerator.device)
    tokens, sequences = total["tokens"], total["sequences"]
    mean = {key: sum(update[key] for update in updates) / len(updates) for key in updates[0]}
    each = {key: total[key] / sequences for key in sums if key.startswith("reward_")}
    penalty = cfg.kl_coef * total["kl"] if cfg.kl_in == "reward" else 0
    variance = max(0.0, total["squares"] - total["reward"] ** 2 / sequences) / max(1, sequences - 1)
    values = {
        "reward": (total["reward"] - penalty) / sequences,
        # The verifier's share of right answers; without the verifier the reward.
        "accuracy": each.get("reward_verifier", total["reward"] / sequences),
        **(each if len(each) > 1 else {}),
        "reward_std": variance**0.5,
        "response_length": tokens / sequences,
        "truncated_share": total["cut"] / sequences,
        "zero_variance_groups": total["flat"] / total["groups"],
        "loss": mean["loss"],
        "clip_share": mean["clip_share"],
        **({"kl": total["kl"] / tokens} if cfg.kl_coef else {}),
        "entropy": total["entropy"] / tokens,
        "logprob_gap_mean": total["gap"] / tokens,
        "logprob_gap_max": accelerator.gather(gap_max).max().item(),
        "grad_norm": mean["grad_norm"],
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "tokens": int(tokens),
        "verifier_timeouts": int(total["timeouts"]),
        "verifier_errors": int(total["errors"]),
    }
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}


def console_line(line: dict, last: int) -> str:
    """A line of metrics.jsonl for the console."""
    flat = "" if line["grad_norm"] else "  no gradient: equal rewards in every group"
    held_out = f"eval {line['eval_accuracy']:.3f}  " if "eval_accuracy" in line else ""
    phases = " ".join(f"{name} {value:.2f}" for name, value in line["seconds_by_phase"].items())
    return (
        f"step {line['step']}/{last}  accuracy {line['accuracy']:.3f}  {held_out}"
        f"length {line['response_length']:.1f}  cut {line['truncated_share']:.2f}  "
        f"flat {line['zero_variance_groups']:.2f}  clip {line['clip_share']:.3f}  "
        f"entropy {line['entropy']:.2f}  gap {line['logprob_gap_mean']:.0e}  "
        f"grad {line['grad_norm']:.2f}  {line['seconds']:.2f} s ({phases}){flat}"
    )


def start_tracker(cfg, accelerator) -> None:
    """Begins this run in its tracker, or goes on with it there."""
    folder = pathlib.Path(accelerator.project_dir)
    run = {"name": f"{pathlib.Path(cfg.run_dir).name}-{folder.name}", "resume": "allow"}
    own = {"trackio": run, "wandb": {**run, "id": run["name"]}}
    accelerator.init_trackers(cfg.project, config=as_dict(cfg), init_kwargs=own)


def evaluate(run, step: int, timer: Timer) -> dict:
    """{"eval_accuracy": that on --eval-data} where it is due. The seeds are always the same."""
    cfg, accelerator, (problems, prompts) = run.cfg, run.accelerator, run.held_out
    if not cfg.eval_every or step % cfg.eval_every:
        return {}
    whole = len(problems) // accelerator.num_processes * accelerator.num_processes
    mine = range(accelerator.process_index, whole, accelerator.num_processes)  # as many in each
    seeds = [rollout.sequence_seed(cfg.seed, 0, i, 0) for i in mine]
    asked = [prompts[i] for i in mine]
    with timer("eval"):
        run.engine.sync(run.model)
        found = run.engine.generate(asked, seeds, cfg.max_new_tokens, cfg.temperature)
        texts = run.tokenizer.batch_decode([r.tokens for r in found], skip_special_tokens=True)
        answered, finished = [problems[i] for i in mine], [r.finished for r in found]
        right = sum(run.rewards.verifier.score(texts, answered, finished))
        total = accelerator.reduce(torch.tensor([right], device=accelerator.device), "sum")
    return {"eval_accuracy": round(total.item() / whole, 6)}


def show(run, line: dict) -> None:
    """A line of metrics for the console and the tracker."""
    numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
    run.accelerator.log(numbers, step=numbers.pop("step"))
    run.flat = 0 if line["grad_norm"] else run.flat + 1
    if run.flat == FLAT and run.accelerator.is_main_process:
        tqdm.write(f"warning: {FLAT} steps without a gradient: {WHY}", file=sys.stderr)
    is_due = line["step"] % run.cfg.log_every == 0 or line["step"] == run.cfg.steps
    if run.accelerator.is_main_process and is_due:
        tqdm.write(console_line(line, run.cfg.steps))
