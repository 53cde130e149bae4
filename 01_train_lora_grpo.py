"""Stage 1: RL with verifiable rewards.                  Paper: Sec. 3.1, 4.1; Eq. 1, 2, 4; Table 2

    python 01_train_lora_grpo.py --config demo --run-dir runs/demo       # one GPU, or none
    accelerate launch --quiet --num_processes 2 01_train_lora_grpo.py --config demo ...  # two GPUs

Reads   the backbone and the problems: a file, a hub id or a name of common/rl/benchmarks.yaml
Writes  <run-dir>/train/step_0010 ... step_0150   PEFT adapters in fp32; with --tune full models
        <run-dir>/train/metrics.jsonl, samples.jsonl, config.json, resume/, done.json

--tune full --learning-rate 5e-7 trains all parameters (Table 5's "w/o LoRA") in fp32. It needs 16
bytes a parameter, split over GPUs by common/accelerate/fsdp2.yaml. To resume, type the same command
again: a random number depends on (seed, step, problem, sample) alone. A larger --steps goes on from
a finished run, if the learning rate is constant. Not here: critics, multi-turn, packing, warm-up.
"""

import dataclasses
import pathlib
from typing import Literal

import torch

from common import UserError, grpo
from common.files import models, write
from common.files.config import option, parse
from common.files.read import quick_hash
from common.files.resume import StepLog, go_on, save_state
from common.files.stage import Stage, first_alone, progress, run_stage
from common.rl import data, metrics, options, policy, rollout, training
from common.rl.training import Batch, Run


@dataclasses.dataclass
class TrainConfig(options.RLConfig):
    """The paper's Table 2 (lengths, temperature: SamplingConfig). (open): mostly as in verl."""

    train_data: str = option("dapo-math-17k", "problems (paper: DAPO-Math-17k)")
    algorithm: Literal["grpo", "rloo", "reinforce++", "reinforce++-baseline"] = option(
        "grpo", "how advantages are computed (paper: grpo; Table 6: rloo and reinforce++)"
    )
    tune: Literal["lora", "full"] = option("lora", "what is trained (paper: both, Tables 3, 4)")
    steps: int = option(150, "RL steps (paper: 150 before the jump, 250 and 400 for reference)")
    save_every: int = option(10, "steps between checkpoints (paper: 10)")
    prompts_per_step: int = option(128, "problems a step, P (paper: train batch size 128)")
    mini_batch: int = option(32, "problems an update (paper: mini batch size 32: 4 updates a step)")
    rollouts: int = option(8, "responses a problem, G of Eq. 1 (paper: 8)")
    learning_rate: float = option(5e-6, "of AdamW (paper: 5e-6 with LoRA, 5e-7 for all parameters)")
    lora_rank: int = option(64, "r of Eq. 4 (paper: 64)")
    lora_alpha: float = option(32.0, "scale alpha / r on B A (paper: 32)")
    clip_low: float = option(0.2, "epsilon of Eq. 1 downwards (open)")
    clip_high: float = option(0.2, "epsilon of Eq. 1 upwards (open)")
    loss_aggregation: Literal["token", "seq"] = option("token", "each counts the same (Eq. 1: seq)")
    kl_coef: float = option(0.0, "beta of Eq. 1, against the backbone; 0 is off (open)")
    kl_in: Literal["loss", "reward"] = option("loss", "loss + beta k3, or reward - beta k1 (open)")
    importance_cap: float = option(0.0, "highest weight pi_trainer / pi_engine; 0 is off (open)")
    seed: int = option(0, "decides LoRA's A, the order of problems, every rollout")


def sample(run: Run, step: int, timer: metrics.Timer) -> Batch:
    """G responses, with rewards, to each of the step's problems assigned to this process."""
    cfg, accelerator, device = run.cfg, run.accelerator, run.accelerator.device
    # The P problems of a step go to the processes in turn: all have a share of each update.
    order = data.prompt_order(len(run.problems), cfg.prompts_per_step, step, cfg.seed)
    mine = range(accelerator.process_index, len(order), accelerator.num_processes)
    # One seed per response. A problem that comes twice in a step gets different seeds.
    asked = [(order[i], g, order[:i].count(order[i])) for i in mine for g in range(cfg.rollouts)]
    prompts = [run.prompts[index] for index, _, _ in asked]
    seeds = [rollout.sequence_seed(cfg.seed, step, *one) for one in asked]
    # The engine takes over the weights as they are now.
    with timer("sync"):
        run.engine.sync(run.model)
    with timer("rollout"):
        found = run.engine.generate(prompts, seeds, cfg.max_new_tokens, cfg.temperature)
    # By default the verifier's: 1 for a right answer; 0 for a wrong one, or one cut at the limit.
    with timer("reward"):
        texts = run.tokenizer.batch_decode([r.tokens for r in found], skip_special_tokens=True)
        problems, finished = [run.problems[i] for i, _, _ in asked], [r.finished for r in found]
        rewards = run.rewards.score(texts, problems, finished, [r.tokens for r in found])
    return Batch(
        problems=problems,
        prompts=prompts,
        completions=[r.tokens for r in found],
        finished=finished,
        texts=texts,
        rewards=torch.tensor(rewards, device=device).view(-1, cfg.rollouts),  # [problems, G]
        engine=[torch.tensor(r.logprobs, device=device) for r in found],
    )


def advantages(run: Run, batch: Batch) -> list[torch.Tensor]:
    """The advantage of every token, [tokens] of each sequence."""
    cfg, old = run.cfg, torch.cat(batch.old)
    lengths = torch.tensor([len(c) for c in batch.completions], device=old.device)
    penalty = torch.zeros_like(old)
    if cfg.kl_in == "reward":
        penalty = cfg.kl_coef * (old - torch.cat(batch.reference))  # beta k1, [tokens]
    # Eq. 2 for grpo, other formulas for the others. [tokens]
    found = grpo.advantages(cfg.algorithm, batch.rewards, penalty, lengths, run.accelerator.reduce)
    return found.split(lengths.tolist())


def loss_of(run: Run, batch: Batch, part: list[int], weights: dict[int, torch.Tensor]):
    """What the sequences `part` add to the loss of an update and to the share of clipped tokens."""
    cfg = run.cfg
    with run.accelerator.autocast():
        logprobs = policy.token_logprobs(run.model, *batch.tokens(part), cfg.temperature)
    columns, clip = (weights, batch.old, batch.advantage), (cfg.clip_low, cfg.clip_high)
    weight, old, advantage = (torch.cat([c[i] for i in part]).to(logprobs.device) for c in columns)
    if cfg.importance_cap:
        engine = torch.cat([batch.engine[i] for i in part])
        advantage = advantage * grpo.rollout_correction(old, engine, cfg.importance_cap)
    loss, clipped = grpo.clipped_loss(logprobs, old, advantage, weight, *clip)  # Eq. 1
    if cfg.kl_coef and cfg.kl_in == "loss":
        reference = torch.cat([batch.reference[i] for i in part])
        loss = loss + cfg.kl_coef * grpo.k3_kl(logprobs, reference, weight)
    return loss, clipped


def train(run: Run, stage: Stage, first_step: int) -> None:
    """RL steps first_step + 1 ... cfg.steps, those not yet done. Stage 5 calls it too."""
    cfg, folder, processes = run.cfg, stage.folder, run.accelerator.num_processes
    begin = go_on(folder, first_step, cfg, run.stands_on, run.model, run.optimizer)
    log = StepLog(folder / "metrics.jsonl", keep_to=begin)
    samples = StepLog(folder / "samples.jsonl", keep_to=begin)
    for step in progress(range(begin + 1, cfg.steps + 1), folder.name, unit="step"):
        timer = metrics.Timer()
        # Rollouts by the policy as it is, and their rewards.
        batch = sample(run, step, timer)
        # log pi_old and log pi_backbone of every sampled token: batch.old, batch.reference.
        with timer("logprob"):
            scored = training.score(run, batch)
        batch.advantage = advantages(run, batch)  # [tokens]
        # Eq. 1: prompts_per_step / mini_batch updates. Micro-batches only save memory.
        with timer("update"):
            run.optimizer.param_groups[0]["lr"] = options.learning_rate(cfg, first_step, step)
            updates, size = [], cfg.mini_batch * cfg.rollouts // processes
            for start in range(0, len(batch.completions), size):
                mini, losses = range(start, start + size), []
                weights = training.token_weights(run, batch, mini)  # sum: 1 over all processes
                for micro in training.micro_batches(run, batch, mini):
                    loss, clipped = loss_of(run, batch, micro, weights)
                    loss.backward()
                    losses.append((loss.item(), clipped.item()))
                updates.append(training.descend(run, step, losses))  # AdamW, on all gradients
        line = {"step": step, **metrics.of_step(run, batch, scored, updates)}
        metrics.check_gap(line, cfg.max_logprob_gap)  # stops if engine and trainer disagree
        line |= metrics.evaluate(run, step, timer)  # on --eval-data, where it is due
        # A checkpoint, the logs, and then a state that an interrupted run goes on from.
        with timer("save"):
            if is_checkpoint := step % cfg.save_every == 0 or step == cfg.steps:
                save(run, folder, step)
        line |= timer.line(line["tokens"])
        log.append(line)
        if is_checkpoint:
            samples.append(*batch.samples(step))
        if step % cfg.resume_every == 0 or step == cfg.steps:
            save_state(folder, step, policy.trained(run.model), run.optimizer, run.stands_on)
        metrics.show(run, line)
    metrics.check_moved(folder / "metrics.jsonl")  # some step had a gradient
    run.rewards.verifier.close()
    run.engine.close()
    stage.finish()
    run.accelerator.print(f"done: steps {first_step + 1} to {cfg.steps}, checkpoints in {folder}")
    run.accelerator.end_training()


def save(run: Run, folder: pathlib.Path, step: int) -> None:
    """A checkpoint, by the first process."""
    run.accelerator.wait_for_everyone()
    info = {"step": step, "backbone": run.backbone, **run.stands_on}
    with first_alone(write.atomic_dir(folder / f"step_{step:04d}", info)) as open_folder:
        policy.save(run.model, run.tokenizer, open_folder)  # sharded: every process takes part


def main() -> None:
    cfg = parse(TrainConfig, "train", __doc__)
    folder = pathlib.Path(cfg.run_dir) / "train"
    accelerator = training.start(cfg, folder)
    start, first_step = models.find_adapter(cfg.path(cfg.start))
    if first_step >= cfg.steps:
        raise UserError(f"{start} is of step {first_step}: use a larger --steps")
    inputs = {"backbone": quick_hash(cfg.path(cfg.backbone)), "start": quick_hash(str(start))}
    inputs["train_data"] = data.content_hash(cfg.path(cfg.train_data))
    with accelerator.main_process_first():  # it makes the folder, the others find it
        stage = Stage(folder, cfg, inputs, options.MAY_CHANGE, options.grows(cfg))
        if stage.done:
            return
    model, tokenizer = policy.load_backbone(cfg.path(cfg.backbone))
    made_of = (cfg.backbone, policy.fingerprint(model))
    if cfg.tune == "full":
        model = (policy.with_jump(model, start) if start else model).requires_grad_(True)
    elif start:
        model = policy.load_lora(model, start)
    else:
        model = policy.add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)  # Eq. 4
    train(training.prepare(cfg, accelerator, model, tokenizer, made_of), stage, first_step)


if __name__ == "__main__":
    run_stage(main)
