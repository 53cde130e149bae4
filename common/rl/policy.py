"""The policy: a frozen backbone with LoRA on its linear layers, or a model trained whole."""

import contextlib
import datetime
import functools
import hashlib
import os
import pathlib
import sys

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import AutocastKwargs, parse_flag_from_env
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from common import UserError, in_one_line
from common.files import adapters, write
from common.files.models import INDEX, find_model, open_model
from common.files.resume import save_parts

HEAD_CHUNK = 1024  # tokens whose [tokens, vocabulary] logits exist at one time
# Loading and saving are short; a download's bar stays.
if not are_progress_bars_disabled():
    logging.disable_progress_bar()
    enable_progress_bars()
WANTED = "want a Hugging Face folder with safetensors weights, or a hub id"


def on_gpu() -> bool:
    """Whether this process may use a GPU: not with common/accelerate/cpu.yaml."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def start_processes(mixed_precision: str, **options) -> Accelerator:
    """The processes that `accelerate launch` has started, or this one. "auto": bf16 on GPUs."""
    auto = "bf16" if on_gpu() else "no"
    return Accelerator(
        # Else CPU processes do not find each other, and a Mac's GPU has no float64.
        cpu=not torch.cuda.is_available(),
        mixed_precision=auto if mixed_precision == "auto" else mixed_precision,
        kwargs_handlers=[
            # The others wait while one writes a large model: longer than NCCL's ten minutes.
            InitProcessGroupKwargs(timeout=datetime.timedelta(days=1)),
            # Else the copies of all trained weights in bf16 stay until the end of a forward pass.
            AutocastKwargs(cache_enabled=False),
        ],
        **options,
    )


def load_backbone(name: str):
    """(model, tokenizer) of a folder or hub id; frozen, safetensors only, in the dtype it has."""
    open_model(find_model(name))
    safe = {"use_safetensors": True, "trust_remote_code": False}
    with in_one_line(f"cannot load backbone {name}", WANTED):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        # No dropout: the policy that samples has none.
        for key in [key for key in vars(config) if "drop" in key]:
            setattr(config, key, 0.0)
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype="auto", **safe)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return model.requires_grad_(False), tokenizer


def fingerprint(backbone) -> str:
    """16 hex digits over every parameter's name, shape, dtype and first 64 values."""
    digest = hashlib.sha256()
    for name, parameter in backbone.named_parameters():
        head = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + head)
    return digest.hexdigest()[:16]


def add_lora(backbone, rank: int, alpha: float, seed: int):
    """A new LoRA on all linear layers but the head. Eq. 4: h = W x + (alpha / rank) B A x,
    with PEFT's scale, which the paper leaves out."""
    # B is 0 and A is Kaiming-uniform, both in fp32.
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(backbone, lora)


def load_lora(backbone, folder: pathlib.Path):
    """The adapter in `folder` on the backbone, trainable. UserError: broken, or another's."""
    refuse_foreign(folder, fingerprint(backbone))
    with in_one_line(f"cannot load adapter {folder}", adapters.ANOTHER):
        config = LoraConfig.from_pretrained(folder)
        if config.lora_dropout:  # the policy that is trained would not be the one that sampled
            print(f"{folder}: lora_dropout is set to 0, as rollouts have none", file=sys.stderr)
        config.lora_dropout = 0.0
        how = {"is_trainable": True, "config": config, "torch_device": "cpu"}
        return PeftModel.from_pretrained(backbone, folder, **how)


def refuse_foreign(folder: pathlib.Path, backbone_fingerprint: str) -> None:
    """Raises UserError for an adapter of another backbone, or one that is more than a LoRA."""
    adapters.read_header(folder)
    info = adapters.read_info(folder)
    if info.get("backbone_fingerprint", backbone_fingerprint) != backbone_fingerprint:
        raise UserError(f"{folder} was trained on another backbone: {info.get('backbone')}")


def with_jump(backbone, folder: pathlib.Path):
    """The backbone with the adapter merged in, in fp32: bf16 would round most of a jump away."""
    return load_lora(backbone, folder).float().merge_and_unload()


def save(policy, tokenizer, folder: pathlib.Path | None) -> None:
    """Saves what is trained, in fp32, to the open `folder`: the adapter, or the whole model.

    Every process takes part in saving a sharded model; the first one writes, the others have no
    folder.
    """
    if isinstance(policy, PeftModel):
        config = policy.peft_config["default"]
        if isinstance(config.target_modules, set):  # which has any order
            config.target_modules = sorted(config.target_modules)
        if folder:
            policy.save_pretrained(folder, save_embedding_layers=False)
        return
    # The backbone's sampling defaults are not how it is trained, and saving refuses some of them.
    ends = {key: getattr(policy.generation_config, key) for key in ("eos_token_id", "pad_token_id")}
    policy.generation_config = GenerationConfig(**ends)
    sharded = is_sharded(policy)
    if folder:
        policy.save_pretrained(folder, state_dict={} if sharded else None)
        tokenizer.save_pretrained(folder)
    if sharded:  # what is tied has one name here
        tensors = {name: parameter.detach() for name, parameter in policy.named_parameters()}
        plan = save_parts(folder, "model", tensors)
        if folder and plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write.write_json(folder / INDEX, index)


def trained(policy) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def base_model(policy):
    """The Hugging Face model below the LoRA; without a LoRA the policy itself."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def is_sharding() -> bool:
    """Whether common/accelerate/fsdp2.yaml, or the like, was given to `accelerate launch`."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def split_layers(policy) -> list[torch.nn.Module]:
    """What common/accelerate/fsdp2.yaml splits over the GPUs."""
    model = base_model(policy)
    if getattr(model, "_weight_conversions", None):
        raise UserError(f"FSDP2 cannot save {type(model).__name__}: its file has other tensors")
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = isinstance(head, torch.nn.Linear) and head.bias is None  # and without LoRA
    apart = plain and head.weight is not first.weight
    return [*model.get_decoder().layers, *([first, head] if apart else [])]


def is_sharded(policy) -> bool:
    """Whether all processes must run the policy's layers in step."""
    return isinstance(base_model(policy).get_decoder(), FSDPModule)


def keep_dtypes(policy) -> None:
    """Under autocast PEFT need not cast the inputs of LoRA's factors to fp32 first: these copies
    would stay until the backward pass."""
    for layer in policy.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False


@contextlib.contextmanager
def merged(policy):
    """Within the block an fp32 policy that is not sharded computes with W + s B A in place of W: a
    third of the products. Then each layer has its own weight again, so nothing can drift. Under
    autocast it computes as always: W + s B A would be rounded as a whole."""
    layers = (m for m in policy.modules() if isinstance(m, LoraLayer))
    frozen = {layer: layer.base_layer.weight for layer in layers}
    is_fp32 = {weight.dtype for weight in frozen.values()} == {torch.float32}
    if not is_fp32 or is_sharded(policy) or torch.is_autocast_enabled(policy.device.type):
        yield
        return
    try:
        for layer, weight in frozen.items():
            changed = weight + layer.get_delta_weight("default")
            layer.base_layer.weight = torch.nn.Parameter(changed, requires_grad=False)
            layer.enable_adapters(False)
        yield
    finally:
        for layer, weight in frozen.items():
            layer.base_layer.weight = weight
            layer.enable_adapters(True)


@torch.no_grad()
def check_head(policy, ids: list[int]) -> None:
    """Raises UserError for a model that scales or caps its logits, which `token_logprobs` leaves
    out. ids: two tokens or more."""
    logits = base_model(policy)(input_ids=torch.tensor([ids], device=policy.device)).logits[0, -2]
    ours = token_logprobs(policy, [ids[:-1]], [ids[-1:]], 1.0)[0]
    rounding = 0.1 + (logits.abs().max() / 64 if logits.dtype != torch.float32 else 0)
    if not (logits.float().log_softmax(-1)[ids[-1]] - ours).abs() < rounding:
        raise UserError("this backbone scales or caps its logits, which is not supported")


def token_logprobs(policy, prompts, completions, temperature: float) -> torch.Tensor:
    """log pi (nats, fp32) of every token of the completions [tokens], at the sampling temperature.

    prompts, completions: token ids, a list a sequence. Padding is on the right, where attention
    never looks.
    """
    model, device = base_model(policy), policy.device
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # [B, T]
    # The position that predicts token t of a completion is the one before it.
    at = [(i, t) for i, p in enumerate(prompts) for t in range(len(p) - 1, len(rows[i]) - 1)]
    row, column = torch.tensor(at, device=device).T  # [tokens] each
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[row, column]
    targets, head = ids[row, column + 1], model.get_output_embeddings()
    if isinstance(head.weight, DTensor):  # gathered once; like FSDP2's, its gradient is a mean
        weight = head.weight.full_tensor(grad_placements=[Partial("avg")])
        head = functools.partial(torch.nn.functional.linear, weight=weight)

    def chosen(hidden, targets):
        logprobs = (head(hidden).float() / temperature).log_softmax(-1)  # [tokens, vocabulary]
        return logprobs.gather(1, targets[:, None])[:, 0]

    # In chunks that the backward pass runs again: no [batch, time, vocabulary] exists.
    parts = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    return torch.cat([checkpoint(chosen, *part, use_reentrant=False) for part in parts])
