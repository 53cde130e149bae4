"""An adapter merged into its backbone: a Hugging Face folder with W + s B A.

It goes tensor by tensor from file to file, so no model is loaded. In memory are one shard and
about four times the largest matrix in fp32.
"""

import json
import pathlib
import sys
from collections.abc import Callable

import torch

from common import UserError
from common.files.adapters import Adapter, read_adapter, read_info
from common.files.models import ModelFolder, find_model, open_intact, open_model
from common.files.read import HASHES, read_json, sha256
from common.files.write import atomic_dir, claim, copy_files, save_tensors, tidy, write_text

SHARD_BYTES = 10**9  # a single tensor may be larger
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # of an entry, in the dtypes to merge into
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # configs and tokenizers
_OWN = ("config.json", "checkpoint.json", HASHES)  # not copied


def check(adapter: Adapter, model: ModelFolder) -> None:
    """Raises UserError where `adapter` cannot be added to the weights of `model` as W + s B A."""

    def refuse(reason: str) -> None:
        raise UserError(f"cannot merge into {model.path}: {reason}")

    if adapter.others:
        refuse(f"{next(iter(adapter.others))} of the adapter is no LoRA on a linear layer")
    for option in ("fan_in_fan_out", "layer_replication"):
        if adapter.config.get(option):
            refuse(f"the adapter was trained with {option}, so it has other matrices")
    for module, (b, a) in adapter.factors.items():
        name, wanted = f"{module}.weight", (b.shape[0], a.shape[1])
        tied = model.config.get("tie_word_embeddings") or name not in model.shapes
        if module.endswith("lm_head") and tied:
            refuse(f"{module} shares its weight with the embedding, which would change too")
        if name not in model.shapes:
            refuse(f"it has no {name}")
        if model.shapes[name] != wanted:
            refuse(f"{name} is {model.shapes[name]}, the adapter wants {wanted}")
        if model.dtypes[name] not in _BYTES:
            refuse(f"{name} is quantised ({model.dtypes[name]})")


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut into shards of at most `limit` bytes. sizes: name -> bytes."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


class Rounding:
    """What rounding W + U to the dtype of W does to the updates U, over all matrices."""

    def __init__(self):
        self.changed, self.lost, self.size, self.error = 0, 0, 0.0, 0.0

    def add(self, weight: torch.Tensor, update: torch.Tensor, rounded: torch.Tensor) -> None:
        """Counts one matrix: W [m, n] as stored, U in fp32, and what W + U became."""
        error = rounded.float() - weight.float() - update
        self.changed += int((update != 0).sum())
        self.lost += int(((update != 0) & (rounded == weight)).sum())
        self.size += float(update.square().sum(dtype=torch.float64))
        self.error += float(error.square().sum(dtype=torch.float64))

    def shares(self) -> dict[str, float]:
        """entries_lost: the share of changed entries that stay as they were.
        norm_lost: |what became of U - U|_F / |U|_F."""
        norm = (self.error / self.size) ** 0.5 if self.size else 0.0
        return {"entries_lost": self.lost / max(1, self.changed), "norm_lost": norm}


def merge(
    out: pathlib.Path,
    adapter: Adapter,
    base: pathlib.Path,
    fp32: bool,
    record: dict,
    change: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Writes the model in `base` with `adapter` added to the folder `out`, `record` in merge.json.

    change(module) -> [m, n] in fp32 is the update of a module of the adapter; None means s B A.
    fp32: False keeps the dtypes of `base`, and the result is `Rounding.shares`.
    Raises UserError where the adapter does not fit, see `check`.
    """
    model, rounding, weight_map, total = open_intact(base), Rounding(), {}, 0
    check(adapter, model)
    dtypes = {name: "F32" if fp32 and x in _BYTES else x for name, x in model.dtypes.items()}
    numbers = {name: torch.Size(shape).numel() for name, shape in model.shapes.items()}
    sizes = {name: _BYTES.get(dtypes[name], 8) * count for name, count in numbers.items()}
    shards = plan_shards(sizes, SHARD_BYTES)
    with atomic_dir(out, overwrite=True) as folder:
        beside = [p for p in base.iterdir() if p.suffix in _COPIED and p.name not in _OWN]
        copy_files([p for p in beside if not p.name.endswith(".index.json")], folder)
        for i, names in enumerate(shards, 1):
            file, tensors = f"model-{i:05d}-of-{len(shards):05d}.safetensors", {}
            file = "model.safetensors" if len(shards) == 1 else file
            for name in names:
                weight, module = model.tensor(name), name.removesuffix(".weight")
                dtype = torch.float32 if dtypes[name] == "F32" else weight.dtype
                tensors[name] = weight.to(dtype)
                if module in adapter.factors:
                    b, a = adapter.factors[module]
                    update = change(module) if change else adapter.scale(module) * (b @ a)
                    tensors[name] = (weight.float() + update).to(dtype)
                    if dtype != torch.float32:
                        rounding.add(weight, update, tensors[name])
                weight_map[name], total = file, total + tensors[name].nbytes
            save_tensors(folder / file, tensors, {"format": "pt"}, dtype=None)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
        keys = [key for key in ("dtype", "torch_dtype") if key in model.config] or ["torch_dtype"]
        config = {**model.config, **{key: "float32" for key in keys if fp32}}
        write_text(folder / "config.json", json.dumps(config, indent=2))
        write_text(folder / "merge.json", json.dumps(record | rounding.shares()))
    return rounding.shares()


def warn_of_rounding(out: pathlib.Path, lost: dict[str, float]) -> None:
    """Says on stderr what a model in 16 bits has lost of its update."""
    rounded = sorted({*open_model(out).dtypes.values()} & {"BF16", "F16"})
    if rounded:
        print(
            f"warning: {out} is in {', '.join(rounded)}: rounding leaves {lost['entries_lost']:.1%} of "
            "the entries that the adapter changes as they were, and loses "
            f"{lost['norm_lost']:.1%} of the norm of its update; --merge fp32 loses nothing",
            file=sys.stderr,
        )


def merge_jump(source: pathlib.Path, out: pathlib.Path, cfg) -> None:
    """Merges the adapter in `source` into its backbone, in the folder `out`, unless that is there.

    cfg is stage 4's: --merge, --overwrite, and the run directory that {run_dir} stands for.
    """
    backbone = read_info(source)["backbone"]
    adapter = sha256(source / "adapter_model.safetensors")
    record = {"backbone": backbone, "dtype": cfg.merge, "adapter": adapter}
    there = (out / "merge.json").is_file() and not cfg.overwrite
    if there and record.items() <= read_json(out / "merge.json", "04_extrapolate.py").items():
        tidy(out)
        return
    claim(out)
    base = find_model(cfg.path(backbone))
    warn_of_rounding(out, merge(out, read_adapter(source), base, cfg.merge == "fp32", record))
