"""The policy: a frozen backbone with LoRA on all its linear layers, or a model with all its parameters trained. Its checkpoints, and the
log-probabilities of given tokens.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import sys

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from common import UserError
from common.files import adapters
from common.files import models as model_files
from common.files import read as inputs
from common.files import series as adapter_series
from common.files import write as run_dir
from common.files.adapters import is_adapter
from common.files.models import is_model
from common.files.read import first_line, read_json
from common.files.write import atomic_dir, atomic_write_text, writing

HEAD_CHUNK = 4096  # tokens whose [tokens, vocabulary] logits exist at one time


@contextlib.contextmanager
def _loading(what: str, hint: str):
    """Turns whatever the libraries raise on a broken, missing or hostile folder into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot load {what}: {first_line(error)}; {hint}") from error


def load_backbone(name: str, dtype: torch.dtype | str = "auto"):
    """The backbone (a folder or a hub id) with its tokenizer; dtype "auto" is the checkpoint's own. Frozen, safetensors only."""
    hint = "want a Hugging Face folder with safetensors weights, or a hub id"
    if not pathlib.Path(name).is_dir() and (name.startswith((".", "/", "runs/")) or name.count("/") > 1):
        raise UserError(f"backbone folder {name} not found; {hint}")
    if pathlib.Path(name).is_dir():
        model_files.open_intact(pathlib.Path(name))  # refuses what transformers would load beside safetensors
    with _loading(f"backbone {name}", hint):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return model.requires_grad_(False), tokenizer


def fingerprint(backbone) -> str:
    """16 hex digits that tell two backbones apart: a hash over every parameter's name, shape, dtype and first 64 values."""
    digest = hashlib.sha256()
    for name, parameter in backbone.named_parameters():
        head = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + head)
    return digest.hexdigest()[:16]


def add_lora(backbone, rank: int, alpha: float, seed: int):
    """A new LoRA (B = 0, A Kaiming-uniform, fp32) on all linear layers but the head. Eq. 4: h = W x + (alpha / rank) B A x."""
    torch.manual_seed(seed)
    return get_peft_model(backbone, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"))


def train_all(model):
    """`model` with all its parameters trainable, in fp32: a step of RL is smaller than the rounding of a weight in bf16.

    It costs 16 bytes a parameter: weight, gradient and the two moments of AdamW, 4 each.
    """
    return model.float().requires_grad_(True)


def base_model(policy):
    """The Hugging Face model below the LoRA; without a LoRA the policy itself."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def lora_rank(policy) -> int:
    """r of the policy's LoRA, 0 if it has none."""
    return policy.peft_config["default"].r if isinstance(policy, PeftModel) else 0


@contextlib.contextmanager
def reference(policy, frozen=None):
    """Within the block: what the KL term compares with. With LoRA that is the policy without its adapter, else the copy `frozen`."""
    with policy.disable_adapter() if frozen is None else contextlib.nullcontext():
        yield policy if frozen is None else frozen


def checkpoint_gradients(policy) -> None:
    """Each layer keeps its input alone and is run again in the backward pass. (Layers do so in training mode only; there is no dropout.)"""
    base_model(policy).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()


def place(policy, device: torch.device):
    """The policy on `device`; under an accelerate config with FSDP2 (common/accelerate/fsdp2.yaml) its frozen layers sharded.

    Of every decoder layer each process then keeps 1/N, and borrows the rest while the layer computes. LoRA factors, embeddings and head
    stay whole: the factors are a hundredth of the weights, and so gradients, optimizer and checkpoints are what they are without
    sharding. (Fully_shard also averages gradients and would cast them to the compute dtype; what it does not own it leaves alone.)
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if os.environ.get("FSDP_VERSION") != "2" or os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") != "false":
            raise UserError("the accelerate config must have fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false")
        if not isinstance(policy, PeftModel):
            raise UserError("FSDP2 shards frozen layers here, and --tune full has none: launch without fsdp2.yaml, data parallel")
        decoder = policy.get_base_model().get_decoder()
        whole = {parameter for parameter in policy.parameters() if parameter.requires_grad}
        for layer in decoder.layers:
            fully_shard(layer, ignored_params=whole)
        fully_shard(decoder, ignored_params=set(policy.parameters()))  # owns nothing, runs its layers' gathers ahead
    return policy.to(device)


def is_sharded(policy) -> bool:
    """Whether all processes must run the policy's layers in step."""
    return isinstance(policy, PeftModel) and isinstance(policy.get_base_model().get_decoder(), FSDPModule)


def load_lora(backbone, folder: str | pathlib.Path):
    """The adapter in `folder` on the backbone, trainable. Refuses one that was trained on another backbone, or is not what was written."""
    folder = pathlib.Path(folder)
    refuse_foreign(folder, fingerprint(backbone))
    inputs.check_intact(folder)
    with _loading(f"adapter {folder}", f"the checkpoint is broken: {adapters.ANOTHER}"):
        return PeftModel.from_pretrained(backbone, folder, is_trainable=True)


def refuse_foreign(folder: pathlib.Path, backbone_fingerprint: str) -> None:
    """Raises UserError if the checkpoint in `folder` is known to be trained on another backbone, or its adapter is more than a LoRA."""
    info = checkpoint_info(folder)
    adapters.read_header(folder)
    if info.get("backbone_fingerprint", backbone_fingerprint) != backbone_fingerprint:
        raise UserError(f"{folder} was trained on another backbone ({info.get('backbone')}) than the one given")


def checkpoint_info(folder: pathlib.Path) -> dict:
    """What `save_policy` noted beside the weights (step, backbone, fingerprint); empty for a checkpoint that others made."""
    if not is_adapter(folder) and not is_model(folder):
        raise UserError(f"{folder} is no checkpoint: it has neither adapter_config.json nor config.json with model.safetensors")
    path = folder / "checkpoint.json"
    return read_json(path, "the stage that wrote this checkpoint", adapters.INFO) if path.is_file() else {}


def save_policy(policy, tokenizer, folder: pathlib.Path, info: dict) -> None:
    """A checkpoint of what is trained: the adapter, or all parameters with the tokenizer. `info` goes to checkpoint.json."""
    if isinstance(policy, PeftModel):
        save_lora(policy, folder, info)
    else:
        save_whole(policy, tokenizer, folder, info)


def save_lora(policy, folder: pathlib.Path, info: dict) -> None:
    """Saves the adapter in fp32 as PEFT lays it out, with `info` in checkpoint.json, all or nothing."""
    config = policy.peft_config["default"]
    if isinstance(config.target_modules, set):  # whose order would differ from process to process
        config.target_modules = sorted(config.target_modules)
    with writing(folder), atomic_dir(folder, overwrite=True) as temporary:
        run_dir.save_pretrained(temporary, policy, save_embedding_layers=False)
        atomic_write_text(temporary / "checkpoint.json", json.dumps(info))


def drop_sampling_defaults(model) -> None:
    """Those of the backbone are not how a policy is trained, and saving refuses some that loading takes."""
    ends = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id)


def save_whole(policy, tokenizer, folder: pathlib.Path, info: dict) -> None:
    """Saves all weights (in fp32 as they are trained) with config and tokenizer, an ordinary Hugging Face folder, all or nothing."""
    drop_sampling_defaults(policy)
    logging.disable_progress_bar()  # it would draw one over that of the steps
    with writing(folder), atomic_dir(folder, overwrite=True) as temporary:
        run_dir.save_pretrained(temporary, policy, tokenizer)
        atomic_write_text(temporary / "checkpoint.json", json.dumps(info))


@contextlib.contextmanager
def merged(policy):
    """Within the block the policy computes with W + s B A in place of W and the adapter beside it: a third of the matrix products.

    For sampling with an fp32 backbone (any other dtype is left alone: it would round the update away; so is a sharded one). The frozen
    weights are not touched: each layer points to a temporary sum and then to its own tensor again, so nothing can drift.
    """
    layers = [layer for layer in policy.modules() if isinstance(layer, LoraLayer) and layer.base_layer.weight.dtype == torch.float32]
    if not isinstance(policy, PeftModel) or not layers or is_sharded(policy):
        yield
        return
    frozen = [layer.base_layer.weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, frozen, strict=True):
            layer.base_layer.weight.data = weight + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
        with policy.disable_adapter():
            yield
    finally:
        for layer, weight in zip(layers, frozen, strict=True):
            layer.base_layer.weight.data = weight


def token_logprobs(policy, prompts: list[list[int]], completions: list[list[int]], temperature: float, with_entropy: bool = False):
    """Log-probability (nats, fp32) of every completion token given what is before it, at the sampling temperature.

    Returns (logprobs, entropies), both flat [total completion tokens], sequence after sequence; entropies is None unless asked for.
    Only completion positions reach the head, in chunks that are recomputed in the backward pass: no [batch, time, vocabulary]
    tensor ever exists. Rows are padded on the right, where causal attention never looks, so no mask is needed.
    """
    model = base_model(policy)
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=policy.device)  # [sequences, width]
    at = [(i, len(p) + t - 1) for i, (p, c) in enumerate(zip(prompts, completions, strict=True)) for t in range(len(c))]
    row, column = torch.tensor(at, device=policy.device).T  # the position that predicts each completion token
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[row, column]  # [tokens, hidden]
    targets = ids[row, column + 1]
    logprobs, entropies = [], []
    for part, wanted in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        one = checkpoint(_head, model.get_output_embeddings(), part, wanted, temperature, with_entropy, use_reentrant=False)
        logprobs.append(one[0])
        entropies.append(one[1])
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def _head(head, hidden, targets, temperature, with_entropy):
    logprobs = (head(hidden).float() / temperature).log_softmax(-1)  # [tokens, vocabulary]
    entropy = -(logprobs.exp() * logprobs).sum(-1) if with_entropy else None
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def save_resume(folder: pathlib.Path, step: int, policy, optimizer, info: dict) -> None:
    """What an interrupted run goes on from: folder/resume/step_NNNN with the trained weights and the optimizer.

    `info` is what the run must still stand on then (hashes of backbone, template, data). The state before stays, should this one be
    spoilt; what is older goes first, so that there are never more than two.
    """
    state = folder / "resume" / f"step_{step:04d}"
    for old in resume_states(folder)[:-1]:
        run_dir.remove(old)
    with writing(state), atomic_dir(state, overwrite=True) as temporary:
        weights = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
        run_dir.save_tensors(temporary / "weights.safetensors", weights, dtype=None)
        run_dir.save_state(temporary / "optimizer.pt", optimizer.state_dict())
        atomic_write_text(temporary / "info.json", json.dumps(info))


def resume_states(folder: pathlib.Path) -> list[pathlib.Path]:
    """The states that `save_resume` left in `folder`, the newest last."""
    return sorted((folder / "resume").glob("step_[0-9]*"), key=adapter_series.step_of)


def reached(folder: pathlib.Path) -> int:
    """The last step of which `folder` has a line of metrics or a checkpoint, 0 without any."""
    rows = inputs.read_jsonl(folder / "metrics.jsonl", {"step": int}) if (folder / "metrics.jsonl").is_file() else []
    return max([0, *(row["step"] for row in rows), *map(adapter_series.step_of, folder.glob("step_[0-9]*"))])


def forget_resume(folder: pathlib.Path, after: int) -> None:
    """Removes the states of steps after `after`: broken ones."""
    for state in resume_states(folder):
        if adapter_series.step_of(state) > after:
            run_dir.remove(state)


def load_resume(folder: pathlib.Path, policy, optimizer, info: dict) -> int | None:
    """Puts back the newest state that `save_resume` left, or if that is broken the one before; returns its step, None if there is none.

    Raises UserError where all are broken, or were made with other `info`.
    """
    states = resume_states(folder)
    for i, state in enumerate(reversed(states), 1):
        try:
            _put_back(state, policy, optimizer)
        except UserError as error:
            if i == len(states):
                raise
            print(f"warning: {error}; going on from {states[-i - 1].name}", file=sys.stderr)
            continue
        made_with = read_json(state / "info.json", "this stage with --overwrite") if (state / "info.json").is_file() else {}
        for key in made_with.keys() & info.keys():
            if made_with[key] != info[key]:
                raise UserError(f"{folder} was begun with {key} = {made_with[key]!r}, now it is {info[key]!r}: bring back what it was")
        return adapter_series.step_of(state)
    return None


def _put_back(state: pathlib.Path, policy, optimizer) -> None:
    with _loading(f"resume state {state}", "it is broken: start the stage again with --overwrite"):
        try:
            inputs.check_intact(state)
        except UserError as error:
            raise ValueError(error) from error
        weights = safetensors.torch.load_file(state / "weights.safetensors")
        optimizer_state = torch.load(state / "optimizer.pt", weights_only=True, map_location="cpu")
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        if {name: t.shape for name, t in weights.items()} != {name: p.shape for name, p in trained.items()}:
            raise ValueError("its tensors are not this policy's")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
        optimizer.load_state_dict(optimizer_state)
        if any(state[key].shape != p.shape for p, state in optimizer.state.items() for key in ("exp_avg", "exp_avg_sq")):
            raise ValueError("its optimizer is not this policy's")
