"""What stages 1 and 5 need of a GPU's memory, found before anything is on it."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from common import UserError
from common.rl import policy, rollout
from common.rl.rollout import SHARED

GRADIENT = 4  # bytes
TRAINED = 16  # bytes a trained parameter: itself in fp32, its gradient, AdamW's two moments
ROOM = 0.95  # of a GPU's memory: what CUDA, NCCL and fragments take is not computed
HEAD = 3.5  # tensors [HEAD_CHUNK, vocabulary] in fp32 at one time; on a CPU 3.0 were measured


def on_paper(config, cfg):
    """The policy of stage 1's options without its numbers. config: its backbone's."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        if cfg.tune == "full":
            return model.float()
        return policy.add_lora(model.requires_grad_(False), cfg.lora_rank, cfg.lora_alpha, 0)


def kept(model, rows: int, time: int, mixed: bool) -> int:
    """Bytes that the layers keep for the backward pass of `rows` sequences of `time` tokens. The
    model's own code runs on tensors without numbers; it cannot be used again."""
    found = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        return found.setdefault(tensor.untyped_storage()._cdata, tensor)

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        owned = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        ids = torch.zeros(rows, time, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed), hooks:
            policy.base_model(model).get_decoder()(input_ids=ids, use_cache=False)
        return sum(x.untyped_storage().nbytes() for k, x in found.items() if k not in owned)


def plan(config, cfg, shards=1, mixed=True, processes=1) -> dict[str, float]:
    """Bytes on each GPU by part, of vLLM its copy. config: the backbone's; cfg: stage 1's options.

    shards: GPUs that the layers are split over. mixed: with autocast. processes: they share the
    responses of a step.
    """
    model, whole = on_paper(config, cfg), cfg.tune == "full"
    layers = policy.base_model(model).get_decoder().layers
    split = {p for part in policy.split_layers(model) for p in part.parameters()}
    split = {p for p in split if whole or not p.requires_grad} if shards > 1 else set()
    # These are whole while they compute, with gradients if they are trained.
    lent = [*layers[:2].parameters(), *model.get_output_embeddings().parameters()]
    lent = sum(p.nbytes * (1 + whole) for p in lent if p in split)

    def numbers(p: torch.Tensor) -> float:
        return p.numel() / (shards if p in split else 1)

    backbone = sum(numbers(p) * p.itemsize for p in model.parameters() if not p.requires_grad)
    trained = sum(map(numbers, policy.trained(model).values()))
    if whole and cfg.kl_coef:  # the backbone again, frozen
        backbone += trained * (config.dtype or model.dtype).itemsize
    if mixed:
        policy.keep_dtypes(model)
    longest = cfg.max_prompt_tokens + cfg.max_new_tokens
    rows = max(1, cfg.micro_tokens // longest)
    activations = kept(model, rows, longest, mixed)
    if cfg.gradient_checkpointing:  # the input of each layer, and one layer, which runs again
        inputs = rows * longest * config.hidden_size * model.dtype.itemsize
        activations = activations / len(layers) + len(layers) * inputs
    head = HEAD * 4 * min(policy.HEAD_CHUNK, rows * longest) * config.vocab_size
    # Its weights in bf16 and, if they are trained, what a chunk adds to their gradient.
    head += model.get_output_embeddings().weight.numel() * (8 if whole else 2) * mixed
    found = {"backbone": backbone, "trained": TRAINED * trained, "borrowed": lent}
    found |= {"activations": activations, "head": head}
    if cfg.engine == "hf":  # its largest part: each response of a batch at its full length
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        width *= getattr(config, "num_key_value_heads", None) or heads
        cached = min(cfg.batch_size, cfg.prompts_per_step * cfg.rollouts // processes) * longest
        return {**found, "KV cache": 2 * len(layers) * width * model.dtype.itemsize * cached}
    copy = 2 * sum(p.numel() for p in model.parameters() if whole or not p.requires_grad)  # bf16
    return {**found, "vLLM": copy}


def check(model, cfg, accelerator) -> None:
    """Prints what this GPU will hold. Raises UserError where it is too small for the policy."""
    mixed, total = accelerator.mixed_precision != "no", torch.cuda.mem_get_info()[1]
    try:
        shards = accelerator.num_processes if policy.is_sharding() else 1
        config, processes = policy.base_model(model).config, accelerator.num_processes
        parts = plan(config, cfg, shards, mixed, processes)
    except Exception as error:  # noqa: BLE001  (whatever raises where shapes are not enough)
        accelerator.print(f"memory: not known before the first step ({type(error).__name__})")
        return
    if cfg.tune == "lora":  # the adapter of a jump has more ranks than the options say
        parts["trained"] = TRAINED * sum(p.numel() for p in policy.trained(model).values())
    accelerator.print(told(parts, cfg, total))


def told(parts: dict[str, float], cfg, total: float) -> str:
    """What a GPU of `total` bytes will hold: `parts`, with vLLM's share in place of its copy.

    With hf, and where vLLM sleeps during the update, rollout and update are counted apart. Raises
    UserError where the GPU is too small.
    """
    options, own = rollout.vllm_options(cfg.vllm_options), parts.get("KV cache", 0.0)
    if cfg.engine == "vllm":
        copy, cache = parts["vLLM"], options.get("kv_cache_memory_bytes")
        own = copy + cache if cache else total * options.get("gpu_memory_utilization", SHARED)
        if own + 2**30 * options.get("cpu_offload_gb", 0) < copy:
            raise UserError(f"vLLM's copy, {copy / 1e9:.1f} GB, wants more gpu_memory_utilization")
        parts = {**parts, "vLLM": own}
    sleeps = cfg.tune == "full" and options.get("enable_sleep_mode")
    apart = cfg.engine == "hf" or sleeps
    update = sum(parts.values()) - (own if apart else 0.0)
    # In the rollout there is no gradient.
    sampling = parts["backbone"] + (1 - GRADIENT / TRAINED) * parts["trained"] + own
    needs, room = max(update, sampling), ROOM * total
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    needed = f"{needs / 1e9:.1f} GB of a GPU's {total / 1e9:.1f} ({listed})"
    if needs > room:
        longest = cfg.max_prompt_tokens + cfg.max_new_tokens
        ways = [] if cfg.gradient_checkpointing else ["--gradient-checkpointing true"]
        ways += [f"--micro-tokens {longest}"] if cfg.micro_tokens > longest else []
        less = "less --batch-size" if cfg.engine == "hf" else "less gpu_memory_utilization"
        if update <= room:  # the rollout alone is too large
            ways = [less]
        elif not apart:
            ways.append(less)
        ways.append("split it over more GPUs (common/accelerate/fsdp2.yaml)")
        raise UserError(f"needs {needed}: {', or '.join(ways)}")
    return f"memory: {needed}"
