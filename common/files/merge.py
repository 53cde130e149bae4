"""A jump on the disk: an adapter where every new matrix is of low rank, else a whole model.

A model is merged from file to file under the backbone's own names, so none is loaded. In memory are
one file and about four times the largest matrix in fp32; of `relex` all checkpoints of a matrix.
"""

import pathlib
import sys
import time
from collections.abc import Callable

import torch

from common import UserError
from common.files import adapters, write
from common.files.adapters import FLOATS, Adapter
from common.files.models import ModelFolder, find_model, open_model
from common.files.read import sha256
from common.files.series import Series
from common.files.stage import machine, progress
from common.rank1 import LowRank

_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # configs, tokenizers and the index
MAX_LOST = 1e-3  # of the norm of an update: above it an adapter is not cut to a lower rank
NO_ADAPTER = {"adapter": None}  # in the checkpoint.json of a jump that has no adapter


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


def merge(out: pathlib.Path, adapter: Adapter, base: pathlib.Path, info: dict, change=None):
    """Writes the model in `base` with `adapter` added, in fp32, to the folder `out`, `info` in
    checkpoint.json. In bf16 most of an update of RL's size would be rounded away.

    change(module) -> [m, n] in fp32 is the update of a module of the adapter, and the seconds that
    it takes are added to those in `info`; None means s B A.
    Raises UserError where the adapter does not fit, see `check`.
    """
    began, model = time.perf_counter(), open_model(base)
    check(adapter, model)

    def new(name: str) -> torch.Tensor:
        weight, module = model.tensor(name), name.removesuffix(".weight")
        weight = weight.float() if model.dtypes[name] in FLOATS else weight
        if module not in adapter.factors:
            return weight
        b, a = adapter.factors[module]
        return weight + (change(module) if change else adapter.scale(module) * (b @ a))

    with write.atomic_dir(out, info) as folder:
        write.copy_files([path for path in base.iterdir() if path.suffix in _COPIED], folder)
        for file in progress(sorted({*model.files.values()}), out.name, in_log=True):
            tensors = {name: new(name) for name in model.files if model.files[name] == file}
            write.save_tensors(folder / file.name, tensors, {"format": "pt"}, dtype=None)
        config = model.config | dict.fromkeys(("dtype", "torch_dtype"), "float32")
        write.write_json(folder / "config.json", config)
        if change:
            info["seconds"] = round(info["seconds"] + time.perf_counter() - began, 3)


def backbone_of(info: dict) -> str:
    """What an adapter stands on. UserError where it does not say: verl's does not."""
    if "backbone" not in info:
        key = "base_model_name_or_path in the adapter_config.json of every checkpoint"
        raise UserError(f"no backbone to merge into: write its name to {key}")
    return info["backbone"]


def merge_jump(source: pathlib.Path, out: pathlib.Path, cfg) -> None:
    """Merges the adapter in `source` into its backbone, in the folder `out`, unless that is there.
    cfg: the options of stage 4."""
    info = {**adapters.read_info(source), "adapter": sha256(source / adapters.WEIGHTS)}
    base = cfg.path(backbone_of(info))
    write.claim(out)
    if cfg.overwrite or not write.is_made(out / "checkpoint.json", info):
        merge(out, adapters.read_adapter(source), find_model(base), info)


def save_jump(series: Series, new: Callable, places: tuple, info: dict, cfg) -> None:
    """Writes new(module), [m, n] of every module, with `info` in checkpoint.json.

    places: the folder of the adapter, and that of the whole model. cfg: the options of stage 4.
    A matrix is a LowRank, or a tensor in fp32. An adapter of a higher rank than vLLM takes is cut
    to that by its SVD, and merged where that would lose more than MAX_LOST.
    """
    began, last, factors, lost = time.perf_counter(), series.last(), {}, 0.0
    info = info | machine()
    if isinstance(new(series.modules[0]), LowRank):
        for module in progress(series.modules, places[0].name, in_log=True):
            matrix, share = new(module).nearest(adapters.VLLM_RANKS[-1])
            factors[module], lost = matrix.factors(last.scale(module)), max(lost, share)
    if lost:
        cut = f"at rank {adapters.VLLM_RANKS[-1]}, vLLM's highest, it loses {lost:.0e} of its norm"
        cut += ": a whole model is written instead" if lost > MAX_LOST else ""
        print(f"note: {places[0].name}: {cut}", file=sys.stderr)
    if factors and lost <= MAX_LOST:
        write.claim(places[0])
        if places[1] != places[0] and places[1].exists():  # with --merge, or of a higher rank
            print(f"note: {places[1]} is of an older jump: it is removed", file=sys.stderr)
            write.claim(places[1])
            write.remove(places[1])
        info = info | {"seconds": round(time.perf_counter() - began, 3), "norm_lost": lost}
        adapters.write_adapter(places[0], adapters.extended(last, factors), info)
        return

    def change(module: str) -> torch.Tensor:
        """What becomes of the matrix that `last` stands on."""
        update = new(module) - series.weights(module)[series.base]
        return update.dense().float() if isinstance(update, LowRank) else update

    write.claim(places[1])
    write.remove(places[0])  # made otherwise before
    info = {**info, **NO_ADAPTER, "seconds": time.perf_counter() - began}
    merge(places[1], last, find_model(cfg.path(backbone_of(info))), info, change)


def is_made(adapter: pathlib.Path, whole: pathlib.Path, info: dict, cfg) -> bool:
    """Whether one of the two folders is there, whole, and was made from the same."""
    for folder, record in ((adapter, info), (whole, info | NO_ADAPTER)):
        if not cfg.overwrite and write.is_made(folder / "checkpoint.json", record):
            write.claim(folder)  # clears what a kill has left
            return True
    return False
