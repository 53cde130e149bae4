"""What stage 1 prepares before its loop, and the parts of a step that have no equation."""

import contextlib
import dataclasses
import math
import os

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from peft import PeftModel
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common import UserError, grpo
from common.files import adapters
from common.files.config import nearest
from common.rl import data, memory, metrics, policy, rewards, rollout, verifier


@dataclasses.dataclass
class Run:
    """What every step works with."""

    cfg: object  # stage 1's TrainConfig
    accelerator: Accelerator
    model: torch.nn.Module  # the policy
    tokenizer: object
    frozen: torch.nn.Module | None  # the backbone, where it is not the model without its adapter
    optimizer: torch.optim.Optimizer
    engine: object  # rollout.HFEngine or vllm_engine.VLLMEngine
    rewards: rewards.Rewards
    problems: list[data.Problem]
    prompts: list[list[int]]  # token ids
    held_out: tuple[list[data.Problem], list[list[int]]]  # the same of --eval-data
    backbone: str  # what the policy is an adapter on, or began as
    stands_on: dict  # hashes of backbone, template, data and reward files; problems left out
    flat: int = 0  # steps without a gradient, one after another
    told: bool = False  # whether the console has had a line


@dataclasses.dataclass
class Batch:
    """What one process sampled in a step. Sequence i answers its problem i // G."""

    problems: list[data.Problem]  # of each sequence
    prompts: list[list[int]]  # token ids
    completions: list[list[int]]  # token ids, with the end token
    finished: list[bool]
    texts: list[str]
    rewards: torch.Tensor  # [problems, G]
    # A sequence each, [tokens]: log-probabilities by the engine, the trainer, the backbone.
    engine: list[torch.Tensor]
    old: list[torch.Tensor] = ()
    reference: list[torch.Tensor] = ()
    advantage: list[torch.Tensor] = ()

    def tokens(self, sequences: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        """The prompts and completions of these sequences."""
        return [self.prompts[i] for i in sequences], [self.completions[i] for i in sequences]

    def samples(self, step: int) -> list[dict]:
        """The first response to each of four problems, for samples.jsonl."""
        rows = zip(self.problems, self.texts, self.rewards.flatten().tolist(), strict=True)
        return [
            {"step": step, "prompt": p.prompt, "response": text, "answer": p.answer, "reward": r}
            for p, text, r in list(rows)[:: self.rewards.shape[1]][:4]
        ]


def check_prepared(cfg, *names: str) -> None:
    """Raises UserError where one of `names` is not there and the preset's `prepare` makes it."""
    for given in names if cfg.prepare else ():
        path = cfg.path(data.place(given))
        if "{run_dir}" in given and not os.path.exists(path):
            raise UserError(f"{path} not found: run {cfg.prepare} --run-dir {cfg.run_dir} first")


def start(cfg, folder) -> Accelerator:
    """Engine, process group, device, precision and tracker."""
    check_prepared(cfg, cfg.backbone, cfg.train_data)
    cfg.engine = rollout.choose_engine(cfg.engine)  # a run goes on with the engine it began with
    tracker = {"log_with": cfg.report_to or None, "project_dir": folder}
    if (to := cfg.report_to) and to not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"--report-to {to}: {nearest(to, LOGGER_TYPE_TO_CLASS)}")
    accelerator = policy.start_processes(cfg.mixed_precision, **tracker)
    if cfg.mini_batch % (processes := accelerator.num_processes):
        raise UserError(f"mini_batch {cfg.mini_batch} must be a multiple of {processes} processes")
    return accelerator


def place(model, device: torch.device):
    """The model on `device`; under common/accelerate/fsdp2.yaml its layers are sharded.

    Each process then keeps 1/N of every layer, of the embeddings and of the head, with gradients
    and moments if they are trained, and borrows the rest while the layer computes. LoRA factors
    stay whole. So do embeddings that are also the head.
    """
    whole = {*policy.trained(model).values()} if isinstance(model, PeftModel) else set()
    # All of a model that is trained: bf16 would round a step of RL away.
    dtype = torch.float32 if policy.trained(model) and not whole else None
    if not policy.is_sharding():
        return model.to(device, dtype)
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") != "false":
        raise UserError("FSDP wants --config_file common/accelerate/fsdp2.yaml")
    decoder = policy.base_model(model).get_decoder()
    for layer in policy.split_layers(model):
        fully_shard(layer.to(device, dtype), ignored_params=whole, reshard_after_forward=True)
    # The decoder itself owns nothing: it gathers the next layer while one computes.
    fully_shard(decoder, ignored_params=set(model.parameters()))
    return model.to(device, dtype)


def prepare(cfg, accelerator: Accelerator, model, tokenizer, backbone: tuple[str, str]) -> Run:
    """Problems, optimizer, engine, verifier. `backbone`: what the policy is on, its fingerprint."""
    turns = (tokenizer, cfg.prompt_template, cfg.system_prompt)
    limit, held_out = cfg.max_prompt_tokens, ([], [])
    path, english = cfg.path(cfg.train_data), cfg.english_only
    every = data.load_problems(path, **cfg.columns, english_only=english)
    problems, prompts = data.encode_prompts(every, *turns, limit, cfg.train_data)
    if cfg.eval_every:
        others = data.load_problems(cfg.path(cfg.eval_data), "--eval-data", **cfg.columns)
        held_out = data.encode_prompts(others, *turns, limit, cfg.eval_data)
        if len(held_out[0]) < accelerator.num_processes:
            raise UserError(f"{cfg.eval_data} has fewer problems than there are processes")
    if accelerator.device.type == "cuda":
        memory.check(model, cfg, accelerator)
    if accelerator.mixed_precision != "no":
        policy.keep_dtypes(model)
    model, frozen = place(model, accelerator.device), None
    with accelerator.autocast():
        policy.check_head(model, (prompts[0] * 2)[:64])
    if cfg.gradient_checkpointing:  # layers keep their input alone, in training mode only
        policy.base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if cfg.tune == "full" and cfg.kl_coef:
        frozen = place(policy.load_backbone(cfg.path(cfg.backbone))[0], accelerator.device)
    lora = model.peft_config["default"].to_dict() if isinstance(model, PeftModel) else {"r": 0}
    rank = adapters.highest_rank(lora)
    engine = rollout.make_engine(cfg, model, tokenizer, cfg.path(backbone[0]), rank, accelerator)
    where = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    accelerator.print(f"{where}, rollouts by {cfg.engine}; {len(problems)} problems")
    first, answer = tokenizer.decode(prompts[0]), problems[0].answer
    accelerator.print(f"first prompt: {first!r}  answer: {answer!r}")
    # Fused: a step in one call. It cannot mix whole and sharded tensors.
    how = {"weight_decay": cfg.weight_decay, "fused": not policy.is_sharding()}
    optimizer = torch.optim.AdamW(policy.trained(model).values(), cfg.learning_rate, **how)
    judge = verifier.Verifier(cfg.verifier_seconds, cfg.answer_format)
    judge = rewards.Rewards(cfg.reward, judge, problems)
    judge.verifier.check(held_out[0])
    stands_on = {
        "backbone_fingerprint": backbone[1],
        "template_hash": data.template_hash(*turns),
        "data_hash": data.fingerprint(problems),
        "left_out": len(every) - len(problems),  # prompts that are too long
        **judge.files,
    }
    if cfg.report_to:  # now that model and data are right
        metrics.start_tracker(cfg, accelerator)
    ready = (cfg, accelerator, model, tokenizer, frozen, optimizer, engine, judge)
    return Run(*ready, problems, prompts, held_out, backbone[0], stands_on)


def micro_batches(run: Run, batch: Batch, sequences: list[int]) -> list[list[int]]:
    """`sequences` in parts of at most micro_tokens padded tokens. Of a sharded model every process
    has as many parts: they run its layers in step."""
    lengths = {i: len(batch.prompts[i]) + len(batch.completions[i]) for i in sequences}
    parts = grpo.micro_batches(lengths, run.cfg.micro_tokens)
    if policy.is_sharded(run.model):
        count = torch.tensor([len(parts)], device=run.accelerator.device)
        most = run.accelerator.gather(count).max().item()
        parts = grpo.micro_batches(lengths, run.cfg.micro_tokens, at_least=most)
    return parts


@torch.no_grad()
def score(run: Run, batch: Batch) -> dict:
    """log pi_old by the trainer, and log pi_backbone if KL counts. Returns sums for the metrics."""
    # hf in fp32 samples from the trainer's own model: apart from rounding, the engine has computed
    # these already. With KL they are computed again, together with the backbone's.
    cfg, count = run.cfg, len(batch.completions)
    exact = run.engine.is_exact and not cfg.kl_coef
    batch.old, batch.reference = [None] * count, [None] * count
    sums, low, high = {"entropy": 0.0, "gap": 0.0, "ratio": 0.0, "kl": 0.0}, math.inf, -math.inf
    for part in micro_batches(run, batch, [*range(count)]):
        tokens, lengths = batch.tokens(part), [len(batch.completions[i]) for i in part]
        by_engine = torch.cat([batch.engine[i] for i in part])
        with run.accelerator.autocast():
            old = by_engine if exact else policy.token_logprobs(run.model, *tokens, cfg.temperature)
            reference = old  # [tokens]
            if cfg.kl_coef:
                backbone = run.frozen or run.model
                with contextlib.nullcontext() if run.frozen else run.model.disable_adapter():
                    reference = policy.token_logprobs(backbone, *tokens, cfg.temperature)
        gap = old - by_engine
        sums["entropy"] -= old.sum().item()  # sampled from pi_old: -log pi_old is unbiased
        sums["gap"] += gap.abs().sum().item()
        sums["ratio"] += gap.exp().sum().item()
        low, high = min(low, gap.min().item()), max(high, gap.max().item())
        sums["kl"] += (old - reference).sum().item()
        for i, one, other in zip(part, old.split(lengths), reference.split(lengths), strict=True):
            batch.old[i], batch.reference[i] = one, other
    return {**sums, "low": low, "high": high}


def token_weights(run: Run, batch: Batch, sequences: list[int]) -> dict[int, torch.Tensor]:
    """Sequence -> the weights of its tokens in the loss of an update, [tokens]. Over all processes
    they add up to 1: neither micro-batches nor processes change the loss."""
    lengths = torch.tensor([len(batch.completions[i]) for i in sequences])
    local = torch.tensor([float(lengths.sum()), float(len(lengths))])
    tokens, count = run.accelerator.reduce(local.to(run.accelerator.device), "sum").cpu()
    how = run.cfg.loss_aggregation
    share = lengths.sum() / tokens if how == "token" else len(lengths) / count
    weights = grpo.token_weights(lengths, how) * share
    return dict(zip(sequences, weights.split(lengths.tolist()), strict=True))


def descend(run: Run, step: int, losses: list[tuple[float, float]]) -> dict:
    """A step of AdamW on the gradients of all processes. losses: (loss, clip share) a micro-batch.

    Returns loss, clip_share and grad_norm. Raises UserError where they are not finite.
    """
    parameters, reduce = run.optimizer.param_groups[0]["params"], run.accelerator.reduce
    sharded = [p for p in parameters if isinstance(p, DTensor) and p.grad is not None]
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    for parameter in sharded:  # FSDP2 has taken the mean over processes, in the backward pass
        parameter.grad *= run.accelerator.num_processes
    if run.accelerator.num_processes > 1:  # the weights add up to 1 over processes: so do gradients
        size = len(whole) if isinstance(run.model, PeftModel) else 1  # LoRA's are many, small
        for start in range(0, len(whole), size):
            some = whole[start : start + size]
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            total = reduce(torch.cat([grad.flatten() for grad in found]), "sum")
            parts = total.split([p.numel() for p in some])
            for parameter, part in zip(some, parts, strict=True):
                parameter.grad = part.view_as(parameter)
    both = [some for some in (whole, sharded) if some]
    norms = [get_total_norm([p.grad for p in some if p.grad is not None]) for some in both]
    total = get_total_norm([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])
    for some in both:
        clip_grads_with_norm_(some, run.cfg.max_grad_norm, total)
    local = torch.tensor(losses, device=run.accelerator.device).sum(0)
    norm, (loss, clipped) = total.item(), reduce(local, "sum").tolist()
    if not math.isfinite(loss + norm):
        what = f"non-finite loss ({loss}) or gradient (norm {norm}) in step {step}"
        raise UserError(f"{what}: take a lower --learning-rate, in another --run-dir")
    run.optimizer.step()
    run.optimizer.zero_grad()
    return {"loss": loss, "clip_share": clipped, "grad_norm": norm}
