"""What is measured: of a run while it trains, and of policies on test problems by stage 6."""

import contextlib
import pathlib
import secrets
import sys
import time

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from common import UserError
from common.files import write
from common.files.config import as_dict
from common.files.read import read_jsonl
from common.files.stage import is_writer
from common.rl import data, policy, rollout

MOST = 0.9  # of the problems; where so many give no gradient, others are better
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
        raise UserError(f"{what}: stale weights, or another temperature")


def check_moved(log: pathlib.Path) -> None:
    """Raises UserError where no step of a run had a gradient: nothing can follow from it."""
    rows = read_jsonl(log, {"grad_norm": float}) if is_writer() else []
    if len(rows) >= FLAT and not any(row["grad_norm"] for row in rows):
        raise UserError(f"no step had a gradient: {WHY}")


def of_step(run, batch, scored: dict, updates: list[dict]) -> dict:
    """The metrics of one step over all processes; README.md here explains each. `scored` is what
    `training.score` returns, `updates` what `training.descend` does of each."""
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
        **{"timeouts": judge.timeouts, "errors": judge.errors, **scored},
        **{f"reward_{name}": value for name, value in run.rewards.sums.items()},
    }
    local = torch.tensor([*sums.values()], dtype=torch.float32, device=accelerator.device)
    total = dict(zip(sums, accelerator.reduce(local, "sum").tolist(), strict=True))
    ends = torch.tensor([[-scored["low"], scored["high"]]], device=accelerator.device)
    fall, rise = accelerator.gather(ends).max(0).values  # of log pi_trainer / pi_engine
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
        **mean,  # loss, clip_share, grad_norm
        **({"kl": total["kl"] / tokens} if cfg.kl_coef else {}),
        "entropy": total["entropy"] / tokens,
        "logprob_gap_mean": total["gap"] / tokens,
        "logprob_gap_max": abs(max(fall, rise).item()),  # no -0.0
        "importance_ratio_mean": total["ratio"] / tokens,
        "importance_ratio_min": fall.neg().exp().item(),
        "importance_ratio_max": rise.exp().item(),
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "tokens": int(tokens),
        "verifier_timeouts": int(total["timeouts"]),
        "verifier_errors": int(total["errors"]),
    }
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}


def start_tracker(cfg, accelerator) -> None:
    """Begins this run in its tracker, or goes on with it there. A new run has a new name."""
    if not accelerator.log_with:  # what is not installed is left out
        raise UserError(f"--report-to {cfg.report_to} is not installed")
    folder = pathlib.Path(accelerator.project_dir)
    noted, name = folder / ".tracker", f"{pathlib.Path(cfg.run_dir).resolve().name}-{folder.name}"
    if is_writer():
        if not noted.exists():
            write.write_text(noted, f"{name}-{secrets.token_hex(2)}")
        name = noted.read_text(encoding="utf-8")
    run = {"name": name, "resume": "allow"}
    own = {"trackio": run, "wandb": {**run, "id": name}}
    config = {k: v if isinstance(v, int | float) else str(v) for k, v in as_dict(cfg).items()}
    accelerator.init_trackers(cfg.project, config=config, init_kwargs=own)


def show(run, line: dict) -> None:
    """A line of metrics.jsonl for the console and the tracker."""
    numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
    run.accelerator.log(numbers, step=numbers.pop("step"))
    run.flat = 0 if line["grad_norm"] else run.flat + 1
    if run.flat == FLAT and run.accelerator.is_main_process:
        tqdm.write(f"warning: {FLAT} steps without a gradient: {WHY}", file=sys.stderr)
    is_due = line["step"] % run.cfg.log_every == 0 or line["step"] == run.cfg.steps
    if run.accelerator.is_main_process and is_due:
        flat = "" if line["grad_norm"] else "  no gradient: equal rewards in every group"
        held_out = f"eval {line['eval_accuracy']:.3f}  " if "eval_accuracy" in line else ""
        phases = " ".join(f"{name} {value:.2f}" for name, value in line["seconds_by_phase"].items())
        left = line["seconds"] * (run.cfg.steps - line["step"])
        tqdm.write(
            f"step {line['step']}/{run.cfg.steps}  accuracy {line['accuracy']:.3f}  {held_out}"
            f"loss {line['loss']:.1e}{'' if run.told else ' (about 0 is right)'}  "
            f"length {line['response_length']:.1f}  cut {line['truncated_share']:.2f}  "
            f"flat {line['zero_variance_groups']:.2f}  clip {line['clip_share']:.3f}  "
            f"entropy {line['entropy']:.2f}  gap {line['logprob_gap_mean']:.0e}  "
            f"grad {line['grad_norm']:.2f}  {line['seconds']:.2f} s ({phases})  "
            f"{tqdm.format_interval(left)} left{flat}"
        )
        run.told = True


def evaluate(run, step: int, timer: Timer) -> dict:
    """{"eval_accuracy": that on --eval-data} where it is due. The seeds are always the same."""
    if not run.cfg.eval_every or step % run.cfg.eval_every:
        return {}
    processes, whole = run.accelerator.num_processes, len(run.held_out[0])
    if policy.is_sharded(run.model):  # as many in each
        whole -= whole % processes
    with timer("eval"):
        run.engine.sync(run.model)
        held_out = [column[:whole] for column in run.held_out]
        rows = answers(run, held_out, 1, run.rewards.verifier)
    return {"eval_accuracy": round(sum(row["score"] for row in rows) / whole, 6)}


def answers(run, task: tuple, runs: int, judge) -> list[dict]:
    """`runs` answers to every problem, scored, a row each. A process samples its share. run: a
    training.Run or a Loaded. task: (problems, token ids of their prompts)."""
    cfg, accelerator, (problems, prompts) = run.cfg, run.accelerator, task
    asked = [(i, number) for number in range(runs) for i in range(len(problems))]
    asked = asked[accelerator.process_index :: accelerator.num_processes]
    seeds = [rollout.sequence_seed(cfg.seed, 0, i, number) for i, number in asked]
    draw = (cfg.max_new_tokens, cfg.temperature, cfg.top_p)
    found = run.engine.generate([prompts[i] for i, _ in asked], seeds, *draw)
    texts = run.tokenizer.batch_decode([r.tokens for r in found], skip_special_tokens=True)
    sampled, finished = [problems[i] for i, _ in asked], [r.finished for r in found]
    scores, rows = judge.score(texts, sampled, finished), []
    for (i, number), rolled, text, right in zip(asked, found, texts, scores, strict=True):
        row = {"problem": i, "run": number, "prompt": problems[i].prompt, "response": text}
        row |= {"answer": problems[i].answer, "tokens": len(rolled.tokens)}
        rows.append({**row, "finished": rolled.finished, "score": right})
    return sorted(gather_object(rows), key=lambda row: (row["run"], row["problem"]))


class Loaded:
    """A model on which policies are measured, with the prompts of every task in its tokens."""

    def __init__(self, cfg, base: str, tasks: dict, rank: int, accelerator):
        """cfg: stage 6's EvalConfig. rank: the highest of the adapters to come."""
        self.cfg, self.base, self.accelerator = cfg, base, accelerator
        model, self.tokenizer = policy.load_backbone(cfg.path(base))
        model = model.to(accelerator.device) if cfg.engine == "hf" else model
        self.fingerprint = policy.fingerprint(model)
        turns = (self.tokenizer, cfg.prompt_template, cfg.system_prompt)
        self.template_hash = data.template_hash(*turns)
        limit = cfg.max_prompt_tokens
        self.tasks = {t: data.encode_prompts(found, *turns, limit, t) for t, found in tasks.items()}
        how = (cfg.path(base), rank, accelerator)
        self.engine = rollout.make_engine(cfg, model, self.tokenizer, *how)


def summarise(rows: list[dict], judge, began: float) -> dict:
    """Accuracy with its standard error over problems, and what goes with it. judge: the Verifier
    that scored the rows, which are sorted by run. began: when, by time.perf_counter()."""
    problems = 1 + max(row["problem"] for row in rows)
    scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
    by_problem = scores.view(-1, problems).mean(0)
    return {
        "accuracy": float(by_problem.mean()),
        "standard_error": float(by_problem.std() / problems**0.5) if problems > 1 else None,
        "n": len(rows),
        "problems": problems,
        "response_length": sum(row["tokens"] for row in rows) / len(rows),
        "truncated_share": sum(not row["finished"] for row in rows) / len(rows),
        "verifier_timeouts": sum(gather_object([judge.timeouts])),
        "by_problem": by_problem.tolist(),
        "seconds": round(time.perf_counter() - began, 2),
    }


def console_line(record: dict, start: float, share: float) -> str:
    """`0.749 +- 0.01 (n = 2048), length 29.4, 1.7 s; all right: 30% of the problems, all wrong: 2%;
    00:20 left`: such problems give no gradient. share: of the work, what is done since `start`."""
    error = "" if record["standard_error"] is None else f" +- {record['standard_error']:.3f}"
    zero = "" if record["accuracy"] else "; all scored 0: are template and answer_format right?"
    if late := record["verifier_timeouts"]:
        zero += f"; {late} not decided in --verifier-seconds, so scored 0"
    if record["n"] > record["problems"]:
        right, wrong = (record["by_problem"].count(x) / record["problems"] for x in (1, 0))
        advice = f", hardly a gradient: take {'easier' if wrong > right else 'harder'} ones"
        told = f"; all right: {right:.0%} of the problems, all wrong: {wrong:.0%}"
        zero = told + (advice if right + wrong > MOST and not zero else "") + zero
    left = tqdm.format_interval((time.perf_counter() - start) * (1 / share - 1))
    line = f"{record['accuracy']:.3f}{error} (n = {record['n']})"
    line += f", length {record['response_length']:.1f}, {record['seconds']:.1f} s{zero}"
    return f"{line}; {left} left"
