"""An adapter merged into its backbone: a Hugging Face folder with W + s B A, for whoever cannot load an adapter.

It goes tensor by tensor from file to file. No model is loaded; in memory are one shard, at most `SHARD_BYTES` of it or a single larger
tensor, and about four times the largest matrix in fp32.
"""

import json
import pathlib
from collections.abc import Callable

import torch

from common import UserError
from common.files.adapters import Adapter
from common.files.models import ModelFolder, open_intact
from common.files.read import HASHES
from common.files.write import atomic_dir, atomic_write_text, copy_files, save_tensors

SHARD_BYTES = 10**9
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # of an entry, in the dtypes that can be merged into
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # configs and tokenizers


def check(adapter: Adapter, model: ModelFolder) -> None:
    """Raises UserError where `adapter` cannot be added to the weights of `model` as W + s B A."""
    if adapter.others:
        raise UserError(f"cannot merge: the adapter holds {next(iter(adapter.others))}, which is no LoRA on a linear layer")
    for option in ("fan_in_fan_out", "layer_replication"):
        if adapter.config.get(option):
            raise UserError(f"cannot merge: the adapter was trained with {option}, so its matrices are not those in {model.path}")
    for module, (b, a) in adapter.factors.items():
        name, wanted = f"{module}.weight", (b.shape[0], a.shape[1])
        if module.endswith("lm_head") and (model.config.get("tie_word_embeddings") or name not in model.shapes):
            raise UserError(f"cannot merge: {module} shares its weight with the embedding in {model.path}, which would change too")
        if name not in model.shapes:
            raise UserError(f"cannot merge: {model.path} has no {name}")
        if model.shapes[name] != wanted:
            raise UserError(f"cannot merge: {name} is {model.shapes[name]} in {model.path}, the adapter wants {wanted}")
        if model.dtypes[name] not in _BYTES:
            raise UserError(f"cannot merge: {name} is quantised ({model.dtypes[name]}) in {model.path}")


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut into shards of at most `limit` bytes; one that is larger has a shard of its own. sizes: name -> bytes."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


class Rounding:
    """What rounding W + U to the dtype of W does to the updates U, over all matrices merged."""

    def __init__(self):
        self.changed, self.lost, self.size, self.error = 0, 0, 0.0, 0.0

    def add(self, weight: torch.Tensor, update: torch.Tensor, rounded: torch.Tensor) -> None:
        """Counts one matrix: W [m, n] as stored, U in fp32, and what W + U became."""
        self.changed += int((update != 0).sum())
        self.lost += int(((update != 0) & (rounded == weight)).sum())
        self.size += float(update.square().sum(dtype=torch.float64))
        self.error += float((rounded.float() - weight.float() - update).square().sum(dtype=torch.float64))

    def shares(self) -> dict[str, float]:
        """entries_lost: of the entries with an update, those that stay as they were. norm_lost: |what became of U - U|_F / |U|_F."""
        return {"entries_lost": self.lost / max(1, self.changed), "norm_lost": (self.error / self.size) ** 0.5 if self.size else 0.0}


def merge(
    out: pathlib.Path,
    adapter: Adapter,
    base: pathlib.Path,
    fp32: bool,
    record: dict,
    limit: int = SHARD_BYTES,
    change: Callable[[str], torch.Tensor] | None = None,
) -> dict:
    """Writes the model in the folder `base` with `adapter` added to `out`, all or nothing, with `record` in merge.json.

    `change` (module) gives what is added [m, n], in place of s B A. Weights in fp32, or rounded to the dtype each has in
    `base`. Returns `Rounding.shares` of the matrices that are not in fp32, which merge.json holds too. `limit` is in bytes a file. Raises
    UserError where the adapter does not fit, see `check`.
    """
    model = open_intact(base)
    check(adapter, model)
    floating = {name for name, dtype in model.dtypes.items() if dtype in _BYTES}
    sizes = {
        name: torch.Size(shape).numel() * (4 if fp32 and name in floating else _BYTES.get(model.dtypes[name], 8))
        for name, shape in model.shapes.items()
    }
    shards, rounding, weight_map, total = plan_shards(sizes, limit), Rounding(), {}, 0
    with atomic_dir(out, overwrite=True) as folder:
        own = ("config.json", "checkpoint.json", HASHES)
        beside = [path for path in base.iterdir() if path.suffix in _COPIED and path.name not in own]
        copy_files([path for path in beside if not path.name.endswith(".index.json")], folder)
        for i, names in enumerate(shards, 1):
            file, tensors = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors", {}
            for name in names:
                weight, module = model.tensor(name), name.removesuffix(".weight")
                dtype = torch.float32 if fp32 and name in floating else weight.dtype
                if module in adapter.factors:
                    b, a = adapter.factors[module]
                    update = change(module).float() if change else adapter.scale(module) * (b @ a)
                    tensors[name] = (weight.float() + update).to(dtype)
                    if dtype != torch.float32:
                        rounding.add(weight, update, tensors[name])
                else:
                    tensors[name] = weight.to(dtype)
                weight_map[name], total = file, total + tensors[name].nbytes
            save_tensors(folder / file, tensors, metadata={"format": "pt"}, dtype=None)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            atomic_write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
        keys = [key for key in ("dtype", "torch_dtype") if key in model.config] or ["torch_dtype"]
        config = {**model.config, **{key: "float32" for key in keys if fp32}}
        atomic_write_text(folder / "config.json", json.dumps(config, indent=2))
        atomic_write_text(folder / "merge.json", json.dumps(record | rounding.shares()))
    return rounding.shares()
