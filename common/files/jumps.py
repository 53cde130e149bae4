"""A jump on the disk: an adapter where every new matrix is of low rank, else a whole model."""

import pathlib
import time
from collections.abc import Callable

import torch

from common.files import adapters, merge, models, write
from common.files.read import read_json
from common.files.series import Series
from common.rank1 import LowRank


def save(
    series: Series,
    new: Callable[[str], LowRank | torch.Tensor],
    places: tuple[pathlib.Path, pathlib.Path],
    info: dict,
    cfg,
) -> None:
    """Writes new(module), [m, n] of every module, with `info` in checkpoint.json.

    places: the folder of the adapter, and that of the whole model. cfg: the options of stage 4.
    """
    began, last = time.perf_counter(), series.last()
    if isinstance(new(series.modules[0]), LowRank):
        factors = {m: new(m).factors(last.scale(m)) for m in series.modules}
        write.claim(places[0])
        seconds = {"seconds": round(time.perf_counter() - began, 3)}
        adapters.write_adapter(places[0], adapters.extended(last, factors), info | seconds)
        return
    base, fp32 = models.find_model(cfg.path(info["backbone"])), cfg.merge != "backbone"
    write.claim(places[1])
    merge.merge(places[1], last, base, fp32, {}, lambda m: new(m) - series.base(m))
    seconds = {"seconds": round(time.perf_counter() - began, 3)}
    write.write_json(places[1] / "checkpoint.json", info | dtype_of(cfg) | seconds)


def is_made(adapter: pathlib.Path, whole: pathlib.Path, info: dict, cfg) -> bool:
    """Whether one of the two folders is there, whole, and was made from the same."""
    for folder, wanted in ((adapter, info), (whole, info | dtype_of(cfg))):
        if cfg.overwrite or not (folder / "checkpoint.json").is_file():
            continue
        before = read_json(folder / "checkpoint.json", "04_extrapolate.py --overwrite")
        same = {**before, "seconds": None} == {**wanted, "seconds": None}
        if same and write.is_complete(folder):
            write.tidy(folder)
            return True
    return False


def dtype_of(cfg) -> dict[str, str]:
    """What a whole model's checkpoint.json says beside the rest."""
    return {"dtype": cfg.merge or "fp32"}
