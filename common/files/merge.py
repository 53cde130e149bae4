"""A jump on the disk: an adapter where every new matrix is of low rank, else a whole model.

A model is merged from file to file under the backbone's own names, so none is loaded. In memory are
one file and about four times the largest matrix in fp32.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable

import torch

from common import UserError
from common.files import adapters, write
from common.files.adapters import FLOATS, Adapter
from common.files.models import ModelFolder, find_model, open_model
from common.files.read import HASHES, sha256
from common.files.series import Series
from common.rank1 import LowRank

_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # configs, tokenizers and the index
MAX_LOST = 1e-3  # of the norm of an update: above it an adapter is not cut to a lower rank
_OWN = ("config.json", "checkpoint.json", HASHES)  # not copied


def check(adapter: Adapter, model: ModelFolder) -> None:
    """Raises UserError where `adapter` cannot be added to the weights of `model` as W + s B A."""
    wrong = ""
    if adapter.others:
        wrong = f"{next(iter(adapter.others))} of the adapter is no LoRA on a linear layer"
    if adapter.config.get("fan_in_fan_out"):
        wrong = "the adapter was trained with fan_in_fan_out, so it has other matrices"
    for module, (b, a) in adapter.factors.items():
        name, wanted = f"{module}.weight", (b.shape[0], a.shape[1])
        if module.endswith("lm_head") and model.config.get("tie_word_embeddings"):
            wrong = f"{module} shares its weight with the embedding, which would change too"
        elif model.shapes.get(name) != wanted:
            wrong = f"{name} is {model.shapes.get(name)}, the adapter wants {wanted}"
        elif model.dtypes[name] not in FLOATS:
            wrong = f"{name} is quantised ({model.dtypes[name]})"
    if wrong:
        raise UserError(f"cannot merge into {model.path}: {wrong}")


def rounding(weight: torch.Tensor, update: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """What rounding W + U to the dtype of W does to U [m, n] in fp32, as four numbers [4].

    They are the entries that U changes, those that stay as they were, |U|^2, U's squared error.
    """
    error, changed = rounded.float() - weight.float() - update, update != 0
    counts = changed.sum(), (changed & (rounded == weight)).sum()
    sizes = (x.square().sum(dtype=torch.float64) for x in (update, error))
    return torch.stack([x.double() for x in (*counts, *sizes)])


def merge(
    out: pathlib.Path, adapter: Adapter, base: pathlib.Path, fp32: bool, record: dict, change=None
) -> None:
    """Writes the model in `base` with `adapter` added to the folder `out`, `record` in merge.json.

    change(module) -> [m, n] in fp32 is the update of a module of the adapter; None means s B A.
    fp32: False keeps the dtypes of `base`, and what that loses is said on stderr.
    Raises UserError where the adapter does not fit, see `check`.
    """
    model, counts, dtypes = open_model(base), torch.zeros(4, dtype=torch.float64), set()
    check(adapter, model)

    def new(name: str) -> torch.Tensor:
        weight, module = model.tensor(name), name.removesuffix(".weight")
        dtype = torch.float32 if fp32 and model.dtypes[name] in FLOATS else weight.dtype
        if module not in adapter.factors:
            return weight.to(dtype)
        b, a = adapter.factors[module]
        update = change(module) if change else adapter.scale(module) * (b @ a)
        merged = (weight.float() + update).to(dtype)
        if dtype.itemsize < 4:
            counts.add_(rounding(weight, update, merged))
            dtypes.add(model.dtypes[name])
        return merged

    with write.atomic_dir(out) as folder:
        beside = [path for path in base.iterdir() if path.suffix in _COPIED]
        write.copy_files([path for path in beside if path.name not in _OWN], folder)
        for file in sorted({*model.files.values()}):
            tensors = {name: new(name) for name in model.files if model.files[name] == file}
            write.save_tensors(folder / file.name, tensors, {"format": "pt"}, dtype=None)
        keys = [key for key in ("dtype", "torch_dtype") if key in model.config] or ["torch_dtype"]
        config = {**model.config, **{key: "float32" for key in keys if fp32}}
        write.write_text(folder / "config.json", json.dumps(config, indent=2))
        changed, kept, size, error = counts.tolist()
        lost = {"entries_lost": kept / max(1, changed), "norm_lost": (error / (size or 1)) ** 0.5}
        write.write_text(folder / "merge.json", json.dumps(record | lost))
    if dtypes:
        rounded, (entries, norm) = ", ".join(sorted(dtypes)), lost.values()
        loses = f"leaves {entries:.1%} of the entries as they were, loses {norm:.1%} of the norm"
        print(f"warning: {out}: rounding to {rounded} {loses}: --merge fp32", file=sys.stderr)


def backbone_of(info: dict) -> str:
    """What an adapter stands on. UserError where it does not say: verl's does not."""
    if "backbone" not in info:
        key = "base_model_name_or_path in the adapter_config.json of the last checkpoint"
        raise UserError(f"no backbone to merge into: write its name to {key}")
    return info["backbone"]


def merge_jump(source: pathlib.Path, out: pathlib.Path, cfg) -> None:
    """Merges the adapter in `source` into its backbone, in the folder `out`, unless that is there.

    cfg is stage 4's: --merge, --overwrite, and the run directory that {run_dir} stands for.
    """
    backbone = backbone_of(adapters.read_info(source))
    record = {"backbone": backbone, "dtype": cfg.merge}
    record["adapter"] = sha256(source / adapters.WEIGHTS)
    write.claim(out)
    if cfg.overwrite or not write.is_made(out / "merge.json", record):
        base = find_model(cfg.path(backbone))
        merge(out, adapters.read_adapter(source), base, cfg.merge == "fp32", record)


def save_jump(series: Series, new: Callable, places: tuple, info: dict, cfg) -> None:
    """Writes new(module), [m, n] of every module, with `info` in checkpoint.json.

    places: the folder of the adapter, and that of the whole model. cfg: the options of stage 4.
    A matrix is a LowRank, or a tensor in fp32. An adapter of a higher rank than vLLM takes is cut
    to that by its SVD, and merged where that would lose more than MAX_LOST.
    """
    began, last, factors, lost = time.perf_counter(), series.last(), {}, 0.0
    if isinstance(new(series.modules[0]), LowRank):
        for module in series.modules:
            matrix, share = new(module).nearest(adapters.VLLM_RANKS[-1])
            factors[module], lost = matrix.factors(last.scale(module)), max(lost, share)
    if lost:
        cut = f"rank {adapters.VLLM_RANKS[-1]}, the highest of vLLM, loses {lost:.0e} of the norm"
        cut += ": it is merged" if lost > MAX_LOST else ""
        print(f"note: {places[0].name}: {cut}", file=sys.stderr)
    if factors and lost <= MAX_LOST:
        write.claim(places[0])
        info = info | {"seconds": round(time.perf_counter() - began, 3), "norm_lost": lost}
        adapters.write_adapter(places[0], adapters.extended(last, factors), info)
        return

    def change(module: str) -> torch.Tensor:
        """What becomes of the matrix that `last` stands on."""
        update = new(module) - series.weights(module)[series.base]
        return update.dense().float() if isinstance(update, LowRank) else update

    write.claim(places[1])
    write.remove(places[0])  # made otherwise before
    base, fp32 = find_model(cfg.path(backbone_of(info))), cfg.merge != "backbone"
    merge(places[1], last, base, fp32, {}, change)
    info = info | {"dtype": cfg.merge or "fp32", "seconds": round(time.perf_counter() - began, 3)}
    write.write_json(places[1] / "checkpoint.json", info)


def is_made(adapter: pathlib.Path, whole: pathlib.Path, info: dict, cfg) -> bool:
    """Whether one of the two folders is there, whole, and was made from the same."""
    for folder, record in ((adapter, info), (whole, info | {"dtype": cfg.merge or "fp32"})):
        if not cfg.overwrite and write.is_made(folder / "checkpoint.json", record):
            write.claim(folder)  # clears what a kill has left
            return True
    return False
