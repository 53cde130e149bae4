"""LoRA adapters as files: read the factors, write new ones. No model is loaded for this, so it works at any model size."""

import contextlib
import dataclasses
import json
import pathlib
import re

import safetensors
import safetensors.torch
import torch

from common.run_dir import UserError, atomic_dir, atomic_write_text, read_json

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


@dataclasses.dataclass
class Adapter:
    """A LoRA: factors[module] = (B [m, r], A [r, n]) in fp32; the update of a module's weight is scale * B A."""

    config: dict  # adapter_config.json
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def scale(self) -> float:
        """s = lora_alpha / r."""
        return self.config["lora_alpha"] / self.config["r"]


def checkpoints(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """The step_NNNN folders in `folder` by step, in order."""
    found = {int(path.name.removeprefix("step_")): path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()}
    return dict(sorted(found.items()))


@contextlib.contextmanager
def _reading(path: pathlib.Path):
    try:
        yield
    except (OSError, safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{path} is broken ({str(error).splitlines()[0][:200]}): delete its folder and resume the stage that wrote it"
        ) from error


def read_config(folder: pathlib.Path) -> dict:
    """adapter_config.json of the checkpoint in `folder`, refused if it is not a plain LoRA."""
    config = read_json(folder / "adapter_config.json", "01_train_lora_grpo.py")
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise UserError(f"{folder} is not a plain LoRA (peft_type {config.get('peft_type')}, use_dora {config.get('use_dora')})")
    if not isinstance(config.get("r"), int) or config["r"] < 1 or not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{folder}/adapter_config.json has no usable r and lora_alpha")
    return config


def read_adapter(folder: pathlib.Path) -> Adapter:
    """The adapter in `folder`, factors in fp32 on the CPU."""
    config = read_config(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing: delete {folder} and resume the stage that wrote it")
    with _reading(path):
        tensors = safetensors.torch.load_file(path)
    halves = {"A": {}, "B": {}}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            halves[match[2]][match[1]] = tensor.float()
    if not halves["A"] or halves["A"].keys() != halves["B"].keys():
        raise UserError(f"{path} does not hold matching lora_A and lora_B tensors")
    return Adapter(config, {module: (halves["B"][module], halves["A"][module]) for module in sorted(halves["A"])})


def write_adapter(folder: pathlib.Path, adapter: Adapter, info: dict) -> None:
    """Writes `adapter` to `folder` as PEFT lays it out (all ranks must equal config["r"]), with `info` in checkpoint.json."""
    tensors = {}
    for module, (b, a) in adapter.factors.items():
        if b.shape[1] != adapter.config["r"] or a.shape[0] != adapter.config["r"]:
            raise ValueError(f"{module}: factors of rank {b.shape[1]} in an adapter of rank {adapter.config['r']}")
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.float().contiguous()
    with atomic_dir(folder, overwrite=True) as temporary:
        safetensors.torch.save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        atomic_write_text(temporary / "adapter_config.json", json.dumps(adapter.config, indent=2))
        atomic_write_text(temporary / "checkpoint.json", json.dumps(info))


def with_rank(config: dict, rank: int) -> dict:
    """`config` for another rank at the same scale: s = lora_alpha / r stays, so lora_alpha becomes s * rank."""
    return {**config, "r": rank, "lora_alpha": config["lora_alpha"] / config["r"] * rank}
