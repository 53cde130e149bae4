"""Stage 4: jump.                                Paper: Sec. 4.2 (predict-extend); Eq. 10; Fig. 6

    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo
    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo --methods weighted rl-extra
    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo --alphas 1.5 --merge fp32

Reads   <run-dir>/deltas, the checkpoints that these were made from, <run-dir>/predictor/<recipe>
Writes  <run-dir>/extrapolated/<method>_alpha1.5   an adapter, exact in fp32; `next` once a recipe:
                                                   next-aligned_alpha1.5, next-paper_alpha1.5
        <run-dir>/merged/<method>_alpha1.5         a whole model: with --merge, and for methods whose
                                                   result is of no low rank

NExt is `jump` below; its rivals and the controls stand in common/baselines/methods.py. The adapters go
into stages 5 and 6, PEFT or vLLM, and back to the trainer that made the checkpoints. After training
without LoRA an adapter has rank 1 and belongs on the last of the whole models.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Literal

import torch

from common import UserError
from common.baselines.given import Known
from common.baselines.methods import METHODS, Matrix, Method
from common.files import adapters, config, deltas, merge, models, series, write
from common.files.config import option
from common.files.read import read_json, sha256
from common.files.stage import run_stage, within
from common.rank1 import LowRank, rank1


@dataclasses.dataclass
class ExtrapolateConfig(config.StageConfig):
    """What to jump with, and how far."""

    methods: list[str] = option(["next"], f"next, {', '.join(METHODS)}")
    recipes: list[str] = option(["aligned"], "predictors of stage 3 that `next` uses")
    alphas: list[float] = option([1.5], "extending coefficients (paper: 1.5; Fig. 6: 0.5 to 4.0)")
    merge: Literal["fp32", "backbone"] | None = option(None, "whole models too, in this dtype")
    validation_data: list[str] = option(
        ["{run_dir}/data/valid.jsonl"], "problems that greedy-soup measures on"
    )

    def __post_init__(self):
        for name in self.methods:
            if name not in {"next", *METHODS}:
                raise UserError(f"unknown method '{name}'; {config.nearest(name, ['next', *METHODS])}")


def jump(m: Matrix, alpha: float) -> LowRank:
    """NExt, Eq. 10: W_c + alpha sigma u v^T, the prediction of stage 3 from the last checkpoint."""
    return m.last + alpha * rank1(**m.given[m.name])


def wanted(known: Known):
    """(name, method, function that gets what it must be given, files of that) of all to make."""
    for name in known.cfg.methods:
        if name == "next":
            for recipe in known.cfg.recipes:
                get = functools.partial(deltas.load_predicted, known.run, recipe)
                yield f"next-{recipe}", Method(jump), get, [deltas.check_predicted(known.run, recipe)]
        else:
            method = METHODS[name]
            get, files = method.prepare(known) if method.prepare else (lambda: None, [])
            yield name, method, get, files


def is_made(folder: pathlib.Path, info: dict, overwrite: bool) -> bool:
    """Whether `folder` is there and was made from the same."""
    if overwrite or not (folder / "checkpoint.json").is_file():
        return False
    before = read_json(folder / "checkpoint.json", "04_extrapolate.py --overwrite")
    return {**before, "seconds": None} == {**info, "seconds": None} and write.is_complete(folder)


def make(known: Known, label: str, method: Method, given: object, info: dict) -> None:
    """Writes the jump of every matrix: an adapter, or a whole model where a result is dense."""
    began, last, trajectory = time.perf_counter(), known.series.last(), known.trajectory

    def jumped(module: str) -> LowRank | torch.Tensor:
        W, roles = known.series.weights(module), trajectory.deltas[module]
        m = Matrix(module, W, last.update(module), roles, trajectory.steps, trajectory.k, given)
        return method.jump(m, info["alpha"])

    if isinstance(jumped(known.series.modules[0]), LowRank):
        factors = {m: jumped(m).factors(last.scale(m)) for m in known.series.modules}
        folder = known.run / "extrapolated" / label
        write.claim(folder)
        info["seconds"] = round(time.perf_counter() - began, 3)
        adapters.write_adapter(folder, adapters.extended(last, factors), info)
    else:
        folder, fp32 = known.run / "merged" / label, known.cfg.merge != "backbone"
        base = models.find_model(known.cfg.path(info["backbone"]))
        write.claim(folder)
        change = lambda module: jumped(module) - known.series.base(module)  # noqa: E731
        merge.warn_of_rounding(folder, merge.merge(folder, last, base, fp32, {}, change))
        info["seconds"] = round(time.perf_counter() - began, 3)
        write.write_json(folder / "checkpoint.json", info)


def main() -> None:
    cfg = config.parse(ExtrapolateConfig, "extrapolate", __doc__)
    run = pathlib.Path(cfg.run_dir)
    fingerprint = deltas.fingerprint(run / "deltas")
    trajectory = deltas.load_trajectory(run / "deltas").aligned()
    known = Known(cfg, run, series.reopen(run), trajectory)
    step, made, kept = trajectory.steps[-1], 0, 0
    for name, method, get, files in wanted(known):
        inputs = {"deltas": fingerprint, **{within(path, run): sha256(path) for path in files}}
        get = functools.cache(get)  # once for all alphas
        for alpha in cfg.alphas if method.has_alpha else [0.0]:
            label = f"{name}_alpha{alpha:g}" if method.has_alpha else name
            info = {**known.series.info(run), "step": step, "method": name, "alpha": alpha}
            info["inputs"] = inputs
            folders = [run / "extrapolated" / label, run / "merged" / label]
            if any(is_made(folder, info, cfg.overwrite) for folder in folders):
                kept += 1
            else:
                make(known, label, method, get(), info)
                made += 1
            if cfg.merge and adapters.is_adapter(folders[0]):
                merge.merge_jump(*folders, cfg)
            write.release()
    print(f"done: {made} made from step {step}, {kept} were there already, in {run}/extrapolated")


if __name__ == "__main__":
    run_stage(main, one_process=True)
