"""Stage 1: RLVR, a checkpoint every 10 steps.                              Paper: Sec. 3.1, 4.1, Eq. 1, 2, 4; Table 2

    accelerate launch 01_train_lora_grpo.py --config demo --run-dir runs/demo                              # a laptop
    accelerate launch --num_processes 8 01_train_lora_grpo.py --config demo --run-dir runs/demo            # more processes

Reads   the backbone (a Hugging Face folder or hub id) and problems (DAPO-Math-17k, or JSONL, parquet, a hub id: common/data.py).
Writes  <run-dir>/train/step_0010 ... step_0150   PEFT adapters in fp32; with --tune full whole models in fp32
        <run-dir>/train/metrics.jsonl, samples.jsonl, config.json, resume/, done.json

One RL step: take `prompts_per_step` problems; sample `rollouts` responses to each; reward 1 where the boxed answer is right;
advantages within each group (Eq. 2), or by another --algorithm; `prompts_per_step / mini_batch` optimizer updates on the clipped
loss (Eq. 1), which is the same for all.

LoRA is trained on all linear layers, or with `--tune full --learning-rate 5e-7` (the paper's "w/o LoRA") all parameters are: in fp32, 16
bytes a parameter for weights, gradients and AdamW, whole on every process, plus the backbone once more if there is a KL term. Its
checkpoints have 4 bytes a parameter, its resume state 12.

The same command again goes on after the last saved step, and gets what an uninterrupted run gets, bit for bit on a CPU: all
randomness is a function of (seed, step), so there is no generator state to lose. A larger --steps extends a finished run.

Left out: value networks, reward models, multi-turn, packing, warm-up and decay (the paper names none of them).
"""

import dataclasses
import math
import pathlib
import time
from typing import Literal

import torch
from accelerate import Accelerator
from tqdm import tqdm

from common import UserError, grpo
from common.files import config as configs
from common.files import write as run_dir
from common.rl import data, metrics, policy, rollout, verifier


def option(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class TrainConfig(configs.StageConfig):
    """Defaults are Table 2 of the paper; what the paper leaves open is marked (open) and follows verl."""

    backbone: str = option("Qwen/Qwen2.5-1.5B-Instruct", "the model to train: folder or hub id (paper: Qwen2.5-{1.5B,3B,7B,14B}-Instruct)")
    train_data: str = option("dapo-math-17k", "problems: that name, a file, or a hub id (paper: DAPO-Math-17k)")
    prompt_column: str = option("prompt", "of a file or a hub id: column of the question, a.b for the key b of column a")
    answer_column: str = option("answer", "of a file or a hub id: column of the answer, e.g. reward_model.ground_truth")
    data_split: str = option("train", "of a hub id: its split")
    english_only: bool = option(False, "leave out problems with Chinese characters (open)")
    prompt_template: str = option(data.PROMPT_TEMPLATE, "the user turn around a problem (open)")
    system_prompt: str = option(data.SYSTEM_PROMPT, "the system turn, none if empty (open)")
    answer_format: Literal["boxed", "last_number"] = option("boxed", "where a response has its answer (open)")
    algorithm: Literal["grpo", "rloo", "reinforce++", "reinforce++-baseline"] = option(
        "grpo", "how advantages are computed (paper: grpo, Eq. 2; Table 6: rloo and reinforce++)"
    )
    tune: Literal["lora", "full"] = option("lora", "what is trained: LoRA or all parameters (paper: LoRA; full in Tables 3, 4, Fig. 2)")
    steps: int = option(150, "RL steps in all (paper: 150 before the jump, 250 and 400 for reference)")
    save_every: int = option(10, "steps between checkpoints (paper: 10)")
    prompts_per_step: int = option(128, "problems a step (paper: train batch size 128)")
    mini_batch: int = option(32, "problems an optimizer update (paper: mini batch size 32, so 4 updates a step)")
    rollouts: int = option(8, "responses a problem, G of Eq. 1 (paper: 8)")
    temperature: float = option(1.0, "sampling temperature (paper: 1.0)")
    top_p: float = option(1.0, "nucleus sampling; only 1.0 leaves the gradient unbiased (paper: 1.0)")
    max_prompt_tokens: int = option(1024, "longest prompt allowed (paper: 1024)")
    max_new_tokens: int = option(4096, "longest response; one cut there gets reward 0 (paper: 4096)")
    learning_rate: float = option(5e-6, "of AdamW, constant (paper: 5e-6 with LoRA, 5e-7 for all parameters)")
    weight_decay: float = option(0.0, "of AdamW (open)")
    max_grad_norm: float = option(1.0, "gradient clipping (open)")
    lora_rank: int = option(64, "r of Eq. 4; without meaning for --tune full (paper: 64)")
    lora_alpha: float = option(32.0, "scale alpha / r on B A; without meaning for --tune full (paper: 32)")
    clip_low: float = option(0.2, "epsilon of Eq. 1 downwards (open)")
    clip_high: float = option(0.2, "epsilon of Eq. 1 upwards (open)")
    loss_aggregation: Literal["token", "seq"] = option("token", "mean over tokens, or as in Eq. 1 (open: verl's is token)")
    kl_coef: float = option(0.0, "beta of Eq. 1, against the backbone; 0 is off (open)")
    kl_in: Literal["loss", "reward"] = option("loss", "where KL goes: into the loss as in Eq. 1 (k3), or off the reward of each token (k1)")
    engine: Literal["auto", "hf", "vllm"] = option("auto", "what samples; auto is vllm where it is installed and a GPU is there, else hf")
    vllm_options: str = option("{}", "options of vLLM's LLM class, a JSON object: '{\"gpu_memory_utilization\": 0.4}'")
    importance_cap: float = option(0.0, "truncated importance weight between engine and trainer, e.g. 2; 0 is off (open)")
    max_logprob_gap: float = option(1.0, "stop if the mean |log-prob| gap between engine and trainer exceeds this")
    micro_tokens: int = option(16384, "padded tokens in one forward pass: memory, not results")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third more time")
    verifier_seconds: float = option(5.0, "time limit for one answer")
    mixed_precision: Literal["auto", "no", "bf16"] = option("auto", "autocast; auto is bf16 on a GPU and none on a CPU")
    resume_every: int = option(10, "steps between states that an interrupted run goes on from")
    log_every: int = option(1, "steps between console lines; every step is in metrics.jsonl")
    report_to: str = option("", "an accelerate tracker (tensorboard, wandb), none if empty")
    seed: int = option(0, "of LoRA's A, the order of problems, and every rollout")

    def __post_init__(self):
        if self.prompts_per_step % self.mini_batch:
            raise UserError(f"prompts_per_step ({self.prompts_per_step}) must be a multiple of mini_batch ({self.mini_batch})")
        if self.top_p != 1.0:
            raise UserError(
                f"top_p {self.top_p} in training biases the importance ratio by the probability mass it cuts off; set it to 1.0"
            )
        rollout.vllm_options(self.vllm_options)  # refuses what is not a JSON object
        counts = "steps save_every prompts_per_step mini_batch rollouts max_new_tokens lora_rank resume_every log_every"
        for name in (*counts.split(), "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        if self.rollouts == 1 and self.algorithm != "reinforce++":
            raise UserError(f"{self.algorithm} compares the responses to a problem with each other: rollouts must be 2 or more, not 1")
        if self.kl_in == "reward" and not self.kl_coef:
            raise UserError("kl_in reward takes nothing from the reward with kl_coef 0: set kl_coef, e.g. to 0.001")


# what may differ when a run goes on
MAY_CHANGE = (
    "steps",
    "resume_every",
    "log_every",
    "report_to",
    "micro_tokens",
    "max_logprob_gap",
    "vllm_options",
    "verifier_seconds",
    "gradient_checkpointing",
)


# ---------------------------------------------------------------------------------------------------------------------------
# One RL step in four parts: rollouts with rewards, old log-probabilities, advantages, updates
# ---------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """What one process sampled in one step, a sequence an entry; sequence i answers prompt i // rollouts."""

    prompts: list[list[int]]  # token ids
    completions: list[list[int]]  # token ids, the end token included
    finished: list[bool]
    engine_logprobs: list[torch.Tensor]  # [tokens of the completion]
    rewards: torch.Tensor  # [prompts, rollouts]
    updates: list[list[int]]  # for each optimizer update, the sequences it trains on
    old_logprobs: list[torch.Tensor] | None = None  # like engine_logprobs, by the trainer
    reference_logprobs: list[torch.Tensor] | None = None

    def micro_batches(self, sequences: list[int], budget: int, model, accelerator) -> list[list[int]]:
        """`sequences` in parts of at most `budget` padded tokens; of a sharded model as many parts on every process."""
        lengths = {i: len(self.prompts[i]) + len(self.completions[i]) for i in sequences}
        parts = grpo.micro_batches(lengths, budget)
        if not policy.is_sharded(model):
            return parts
        most = accelerator.gather(torch.tensor([len(parts)], device=accelerator.device)).max().item()
        return grpo.micro_batches(lengths, budget, at_least=most)


def sample(cfg: TrainConfig, step: int, model, engine, judge, problems, prompts, tokenizer, accelerator, timer) -> tuple[Batch, list[dict]]:
    """Rollouts and rewards. The step's problems are dealt to the processes update by update, so every update sees all of them."""
    order = data.prompt_order(len(problems), cfg.prompts_per_step, step, cfg.seed)
    mine = [order[i] for i in range(accelerator.process_index, cfg.prompts_per_step, accelerator.num_processes)]
    expanded = [(index, sample_id) for index in mine for sample_id in range(cfg.rollouts)]
    with timer("sync"):
        engine.sync(model)
    with timer("rollout"):
        rollouts = engine.generate(
            [prompts[index] for index, _ in expanded],
            [rollout.sequence_seed(cfg.seed, step, *pair) for pair in expanded],
            cfg.max_new_tokens,
            cfg.temperature,
        )
    with timer("reward"):
        texts = tokenizer.batch_decode([r.tokens for r in rollouts], skip_special_tokens=True)
        asked = [problems[index] for index, _ in expanded]
        rewards = judge.score(texts, [p.answer for p in asked], [r.finished for r in rollouts], [p.kind for p in asked])
    per_update = len(expanded) * cfg.mini_batch // cfg.prompts_per_step
    batch = Batch(
        prompts=[prompts[index] for index, _ in expanded],
        completions=[r.tokens for r in rollouts],
        finished=[r.finished for r in rollouts],
        engine_logprobs=[torch.tensor(r.logprobs, device=accelerator.device) for r in rollouts],
        rewards=torch.tensor(rewards).view(-1, cfg.rollouts),
        updates=[list(range(start, start + per_update)) for start in range(0, len(expanded), per_update)],
    )
    shown = [
        {"step": step, "prompt": problems[index].prompt, "response": text, "answer": problems[index].answer, "reward": reward}
        for (index, _), text, reward in zip(expanded[:: cfg.rollouts], texts[:: cfg.rollouts], rewards[:: cfg.rollouts], strict=True)
    ][:4]
    return batch, shown


@torch.no_grad()
def score_rollouts(cfg: TrainConfig, model, batch: Batch, accelerator, frozen=None) -> dict:
    """Fills in the old log-probabilities (and the backbone's, if there is a KL term); returns sums for the metrics.

    `frozen` is the backbone where it is not the model without its adapter.
    """
    sequences = list(range(len(batch.completions)))
    batch.old_logprobs = [None] * len(sequences)
    batch.reference_logprobs = [None] * len(sequences) if cfg.kl_coef else None
    sums = {"entropy": 0.0, "gap": 0.0, "gap_max": 0.0, "kl": 0.0}
    for part in batch.micro_batches(sequences, cfg.micro_tokens, model, accelerator):
        prompts, completions = [batch.prompts[i] for i in part], [batch.completions[i] for i in part]
        with accelerator.autocast():
            logprobs, entropy = policy.token_logprobs(model, prompts, completions, cfg.temperature, with_entropy=True)
            if cfg.kl_coef:
                with policy.reference(model, frozen) as backbone:
                    reference, _ = policy.token_logprobs(backbone, prompts, completions, cfg.temperature)
        lengths = [len(c) for c in completions]
        gap = (logprobs - torch.cat([batch.engine_logprobs[i] for i in part])).abs()
        sums["entropy"] += entropy.sum().item()
        sums["gap"] += gap.sum().item()
        sums["gap_max"] = max(sums["gap_max"], gap.max().item())
        for i, old in zip(part, logprobs.split(lengths), strict=True):
            batch.old_logprobs[i] = old
        if cfg.kl_coef:
            sums["kl"] += (logprobs - reference).sum().item()
            for i, ref in zip(part, reference.split(lengths), strict=True):
                batch.reference_logprobs[i] = ref
    return sums


def advantages(cfg: TrainConfig, batch: Batch, accelerator) -> tuple[torch.Tensor, ...]:
    """The advantage of each token, an entry a sequence, [tokens of the completion] each. KL is that of the policy that sampled."""
    lengths, old = [len(c) for c in batch.completions], torch.cat(batch.old_logprobs)
    penalty = cfg.kl_coef * (old - torch.cat(batch.reference_logprobs)) if cfg.kl_in == "reward" else torch.zeros_like(old)
    found = grpo.advantages(
        cfg.algorithm,
        batch.rewards.to(old.device),
        penalty,
        torch.tensor(lengths, device=old.device),
        total=lambda x: accelerator.reduce(x, "sum"),
    )
    return found.split(lengths)


def update(
    cfg: TrainConfig, step: int, model, optimizer, batch: Batch, advantage: tuple[torch.Tensor, ...], sequences: list[int], accelerator
) -> dict:
    """One optimizer update on the given sequences of this process and the same share of every other process."""
    lengths = torch.tensor([len(batch.completions[i]) for i in sequences])
    everywhere = accelerator.reduce(torch.tensor([float(lengths.sum()), float(len(lengths))], device=accelerator.device), "sum")
    share = lengths.sum() / everywhere[0].cpu() if cfg.loss_aggregation == "token" else len(lengths) / everywhere[1].cpu()
    weights = dict(zip(sequences, (grpo.token_weights(lengths, cfg.loss_aggregation) * share).split(lengths.tolist()), strict=True))
    stats = {"loss": 0.0, "clip_share": 0.0}
    for part in batch.micro_batches(sequences, cfg.micro_tokens, model, accelerator):
        with accelerator.autocast():
            logprobs, _ = policy.token_logprobs(
                model, [batch.prompts[i] for i in part], [batch.completions[i] for i in part], cfg.temperature
            )
        old = torch.cat([batch.old_logprobs[i] for i in part])
        weight = torch.cat([weights[i] for i in part]).to(old.device)  # [tokens]
        if cfg.importance_cap:
            weight = weight * grpo.rollout_correction(old, torch.cat([batch.engine_logprobs[i] for i in part]), cfg.importance_cap)
        loss, clipped = grpo.clipped_loss(logprobs, old, torch.cat([advantage[i] for i in part]), weight, cfg.clip_low, cfg.clip_high)
        if cfg.kl_coef and cfg.kl_in == "loss":
            loss = loss + cfg.kl_coef * grpo.k3_kl(logprobs, torch.cat([batch.reference_logprobs[i] for i in part]), weight)
        loss.backward()
        stats["loss"] += loss.item()
        stats["clip_share"] += clipped.item()
    trained = [p for p in model.parameters() if p.requires_grad]
    if accelerator.num_processes > 1:  # the weights already add up to 1 over all processes, so gradients add up too
        for parameter in trained:
            parameter.grad = accelerator.reduce(parameter.grad, "sum")
    stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm).item()
    if not (math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])):
        raise UserError(
            f"non-finite loss ({stats['loss']}) or gradient (norm {stats['grad_norm']}) in step {step}; the last checkpoint is good: "
            "lower the learning rate"
        )
    optimizer.step()
    optimizer.zero_grad()
    return stats


# ---------------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------------


def load_prompts(cfg: TrainConfig, tokenizer) -> tuple[list[data.Problem], list[list[int]], dict]:
    """The problems, the token ids of their prompts, and the hashes of both that go into every checkpoint."""
    columns = {"prompt_column": cfg.prompt_column, "answer_column": cfg.answer_column, "split": cfg.data_split}
    problems = data.load_problems(cfg.path(cfg.train_data), english_only=cfg.english_only, **columns)
    prompts = data.encode_prompts(problems, tokenizer, cfg.prompt_template, cfg.system_prompt, cfg.max_prompt_tokens, cfg.train_data)
    template_hash = data.template_hash(tokenizer, cfg.prompt_template, cfg.system_prompt)
    return problems, prompts, {"template_hash": template_hash, "data_hash": data.fingerprint(problems)}


def go_on(
    cfg: TrainConfig, folder: pathlib.Path, model, optimizer, first_step: int, stands_on: dict, accelerator
) -> tuple[int, run_dir.StepLog, run_dir.StepLog]:
    """Puts `model` and `optimizer` to where an interrupted run was: that step (else `first_step`), and its two logs, cut there."""
    start = policy.load_resume(folder, model, optimizer, stands_on)
    if start is None and (reached := policy.reached(folder)) > first_step + cfg.resume_every:
        raise UserError(f"{folder} has come to step {reached}, but its resume/ is gone: put it back, or start again with --overwrite")
    start, writer = start or first_step, accelerator.is_main_process
    if writer:
        policy.forget_resume(folder, after=start)
    if start > first_step:
        accelerator.print(f"going on after step {start}")
    log = run_dir.StepLog(folder / "metrics.jsonl", keep_to=start, active=writer, begins=first_step + 1)
    return start, log, run_dir.StepLog(folder / "samples.jsonl", keep_to=start, active=writer)


def train(cfg: TrainConfig, model, tokenizer, accelerator: Accelerator, folder: pathlib.Path, first_step: int, info: dict) -> None:
    """RL steps first_step + 1 ... cfg.steps on `model`, everything under `folder`. Stage 5 calls it too."""
    problems, prompts, hashes = load_prompts(cfg, tokenizer)
    if cfg.report_to:
        accelerator.init_trackers("next", config=configs.as_dict(cfg))
    if cfg.gradient_checkpointing:
        policy.checkpoint_gradients(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    stands_on = {"backbone_fingerprint": info["backbone_fingerprint"], **hashes}
    start, log, samples = go_on(cfg, folder, model, optimizer, first_step, stands_on, accelerator)
    frozen = policy.load_backbone(cfg.path(cfg.backbone))[0].to(accelerator.device) if cfg.tune == "full" and cfg.kl_coef else None
    longest, rank = cfg.max_prompt_tokens + cfg.max_new_tokens, policy.lora_rank(model)
    engine = rollout.make_engine(cfg.engine, model, tokenizer, cfg.path(info["backbone"]), longest, rank, cfg.vllm_options)
    judge = verifier.Verifier(cfg.verifier_seconds, cfg.answer_format)
    accelerator.print(f"{accelerator.num_processes} process(es) on {accelerator.device.type}, rollouts by {cfg.engine}")
    accelerator.print(f"{len(problems)} problems; first prompt: {tokenizer.decode(prompts[0])!r}  answer: {problems[0].answer!r}")
    steps, off = range(start + 1, cfg.steps + 1), None if accelerator.is_main_process else True  # None: shown on a terminal
    bar = tqdm(steps, desc=folder.name, initial=start - first_step, total=cfg.steps - first_step, unit="step", disable=off)
    for step in bar:
        timer, began = run_dir.Timer(), time.perf_counter()
        batch, shown = sample(cfg, step, model, engine, judge, problems, prompts, tokenizer, accelerator, timer)  # sync, rollout, reward
        with timer("logprob"):
            sums = score_rollouts(cfg, model, batch, accelerator, frozen)
        advantage = advantages(cfg, batch, accelerator)
        with timer("update"):
            stats = [update(cfg, step, model, optimizer, batch, advantage, sequences, accelerator) for sequences in batch.updates]
        line = {"step": step, **metrics.of_step(cfg, batch, sums, stats, judge, accelerator)}
        if not line["logprob_gap_mean"] <= cfg.max_logprob_gap:  # nan is no agreement either
            raise UserError(
                f"step {step}: engine and trainer disagree by {line['logprob_gap_mean']:.3f} nats a token (limit "
                f"{cfg.max_logprob_gap}): stale weights, another temperature, or a head that post-processes its logits"
            )
        with timer("save"):
            if step % cfg.save_every == 0 or step == cfg.steps:
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    policy.save_policy(model, tokenizer, folder / f"step_{step:04d}", {"step": step, **info, **hashes})
        seconds = time.perf_counter() - began
        line |= {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(line["tokens"] / seconds, 1),
            "seconds_by_phase": {name: round(value, 4) for name, value in timer.seconds.items()},
        }
        log.append(line)
        if step % cfg.save_every == 0:
            samples.append(*shown)
        if (step % cfg.resume_every == 0 or step == cfg.steps) and accelerator.is_main_process:
            log.keep()
            samples.keep()
            policy.save_resume(folder, step, model, optimizer, stands_on)
        accelerator.log({key: value for key, value in line.items() if isinstance(value, int | float)}, step=step)
        bar.set_postfix(acc=f"{line['accuracy']:.2f}", len=f"{line['response_length']:.0f}", refresh=False)
        if accelerator.is_main_process and (step % cfg.log_every == 0 or step == cfg.steps):
            bar.write(metrics.console_line(line, cfg.steps))
    judge.close()
    engine.close()


def start_accelerator(cfg: TrainConfig, folder: pathlib.Path) -> Accelerator:
    """Process group, device, precision and tracker."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    cfg.engine = rollout.choose_engine(cfg.engine)  # before config.json is written: a run goes on with the engine it began with
    precision = ("bf16" if torch.cuda.is_available() else "no") if cfg.mixed_precision == "auto" else cfg.mixed_precision
    on_cpu = not torch.accelerator.is_available()  # without it accelerate takes launched CPU processes for strangers to each other
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, log_with=cfg.report_to or None, project_dir=folder)
    if cfg.mini_batch % accelerator.num_processes:
        raise UserError(f"mini_batch ({cfg.mini_batch}) must be a multiple of the number of processes ({accelerator.num_processes})")
    return accelerator


def main() -> None:
    cfg = configs.parse(TrainConfig, "train", __doc__)
    folder = pathlib.Path(cfg.run_dir) / "train"
    accelerator = start_accelerator(cfg, folder)
    stage = run_dir.Stage(folder, configs.as_dict(cfg), inputs=data.local_files(cfg.path(cfg.train_data)), may_change=MAY_CHANGE)
    with accelerator.main_process_first():
        if stage.is_done(cfg.overwrite, at_least=("steps", cfg.steps), writer=accelerator.is_main_process):
            return
    backbone, tokenizer = policy.load_backbone(cfg.path(cfg.backbone))
    info = {"backbone": cfg.backbone, "backbone_fingerprint": policy.fingerprint(backbone)}
    model = policy.train_all(backbone) if cfg.tune == "full" else policy.add_lora(backbone, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    train(cfg, policy.place(model, accelerator.device), tokenizer, accelerator, folder, first_step=0, info=info)
    if accelerator.is_main_process:
        stage.finish()
        print(f"done: {cfg.steps} steps, checkpoints in {folder}")
    accelerator.end_training()


if __name__ == "__main__":
    configs.run_stage(main)
