"""An adapter merged into its backbone: a Hugging Face folder with W + s B A.

It goes from file to file under the backbone's own names, so no model is loaded. In memory are one
file and about four times the largest matrix in fp32.
"""

import json
import pathlib
import sys
from collections.abc import Callable

import torch

from common import UserError
from common.files.adapters import FLOATS, Adapter, read_adapter, read_info
from common.files.models import ModelFolder, find_model, open_intact
from common.files.read import HASHES, read_json, sha256
from common.files.write import atomic_dir, claim, copy_files, save_tensors, tidy, write_text

_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # configs, tokenizers and the index
_OWN = ("config.json", "checkpoint.json", HASHES)  # not copied


def check(adapter: Adapter, model: ModelFolder) -> None:
    """Raises UserError where `adapter` cannot be added to the weights of `model` as W + s B A."""
    wrong, tied = "", model.config.get("tie_word_embeddings")
    if adapter.others:
        wrong = f"{next(iter(adapter.others))} of the adapter is no LoRA on a linear layer"
    if adapter.config.get("fan_in_fan_out"):
        wrong = "the adapter was trained with fan_in_fan_out, so it has other matrices"
    for module, (b, a) in adapter.factors.items():
        name, wanted = f"{module}.weight", (b.shape[0], a.shape[1])
        found, dtype = model.shapes.get(name), model.dtypes.get(name)
        if module.endswith("lm_head") and (tied or not found):
            wrong = f"{module} shares its weight with the embedding, which would change too"
        elif not found:
            wrong = f"it has no {name}"
        elif found != wanted:
            wrong = f"{name} is {found}, the adapter wants {wanted}"
        elif dtype not in FLOATS:
            wrong = f"{name} is quantised ({dtype})"
    if wrong:
        raise UserError(f"cannot merge into {model.path}: {wrong}")


def rounding(weight: torch.Tensor, update: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """What rounding W + U to the dtype of W does to U [m, n] in fp32, as four numbers [4].

    They are the entries that U changes, those of them that stay as they were, |U|^2, and the
    squared error of U.
    """
    error, changed = rounded.float() - weight.float() - update, update != 0
    counts = changed.sum(), (changed & (rounded == weight)).sum()
    sizes = (x.square().sum(dtype=torch.float64) for x in (update, error))
    return torch.stack([x.double() for x in (*counts, *sizes)])


def merge(
    out: pathlib.Path,
    adapter: Adapter,
    base: pathlib.Path,
    fp32: bool,
    record: dict,
    change: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Writes the model in `base` with `adapter` added to the folder `out`, `record` in merge.json.

    change(module) -> [m, n] in fp32 is the update of a module of the adapter; None means s B A.
    fp32: False keeps the dtypes of `base`, and what that loses is said on stderr.
    Raises UserError where the adapter does not fit, see `check`.
    """
    model, counts, dtypes = open_intact(base), torch.zeros(4, dtype=torch.float64), set()
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

    with atomic_dir(out, overwrite=True) as folder:
        beside = [path for path in base.iterdir() if path.suffix in _COPIED]
        copy_files([path for path in beside if path.name not in _OWN], folder)
        for file in sorted({*model.files.values()}):
            tensors = {name: new(name) for name in model.files if model.files[name] == file}
            save_tensors(folder / file.name, tensors, {"format": "pt"}, dtype=None)
        keys = [key for key in ("dtype", "torch_dtype") if key in model.config] or ["torch_dtype"]
        config = {**model.config, **{key: "float32" for key in keys if fp32}}
        write_text(folder / "config.json", json.dumps(config, indent=2))
        changed, kept, size, error = counts.tolist()
        lost = {"entries_lost": kept / max(1, changed), "norm_lost": (error / (size or 1)) ** 0.5}
        write_text(folder / "merge.json", json.dumps(record | lost))
    if dtypes:
        entries, norm = lost.values()
        print(
            f"warning: {out} is in {', '.join(sorted(dtypes))}: rounding leaves {entries:.1%} of "
            "the entries that the adapter changes as they were, and loses "
            f"{norm:.1%} of the norm of its update; --merge fp32 loses nothing",
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
    merge(out, read_adapter(source), base, cfg.merge == "fp32", record)
