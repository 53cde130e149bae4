"""Stage 4: jump.                                Paper: Sec. 4.2 (predict-extend); Eq. 10; Fig. 6

    accelerate launch --quiet 04_extrapolate.py --config demo --run-dir runs/demo
    accelerate launch --quiet 04_extrapolate.py --config demo --run-dir runs/demo --methods none

Reads   <run-dir>/deltas, the checkpoints behind them, <run-dir>/predictor/<recipe>;
        <run-dir>/validation for --accept, alpharl-pls, greedy-soup; a later checkpoint for oracle
Writes  <run-dir>/extrapolated/<method>_alpha1.5   an adapter in fp32, rank 512 or less; `next` has
                                                   one for each predictor: next-aligned_alpha1.5
        <run-dir>/extrapolated/<method>_accepted   with --accept: the alpha that is best on
                                                   validation problems, or no jump, if that is best
        <run-dir>/merged/<method>_alpha1.5         a whole model: with --merge, or if no LoRA fits

NExt is `jump` below; its rivals and the controls stand in common/baselines/methods.py. The adapters
load unchanged in PEFT, in the trainer that you used, and in vLLM (there without modules_to_save).
After training without LoRA a jump is an adapter of rank 1 on the last model.
"""

import dataclasses
import functools
import pathlib

import torch

from common import UserError
from common.baselines.given import Known, best_alpha
from common.baselines.methods import METHODS, Matrix, Method
from common.files import adapters, config, deltas, merge, series, write
from common.files.config import option
from common.files.read import sha256
from common.files.stage import run_stage, within
from common.rank1 import LowRank, rank1


@dataclasses.dataclass
class ExtrapolateConfig(config.StageConfig):
    """What to jump with, and how far."""

    methods: list[str] = option(["next"], f"next, {', '.join(METHODS)}")
    recipes: list[str] = option(["aligned"], "predictors of stage 3 that `next` uses")
    alphas: list[float] = option([1.5], "extending coefficients (paper: 1.5; Fig. 6: 0.5 to 4.0)")
    merge: bool = option(False, "write whole models too, in fp32")
    accept: bool = option(False, "write <method>_accepted only: the best alpha by stage 6 (ours)")
    validation_data: list[str] = option(
        ["{run_dir}/data/valid.jsonl"], "for --accept, alpharl-pls and greedy-soup"
    )

    def __post_init__(self):
        for name in self.methods:
            if name not in {"next", *METHODS}:
                raise UserError(f"no method '{name}'; {config.nearest(name, ['next', *METHODS])}")


def jump(m: Matrix, alpha: float) -> LowRank:
    """NExt, Eq. 10: W_c + alpha sigma u v^T, with stage 3's prediction at W_c. m.last is W_c - W_0.
    For whole models it is zero, and the jump is an adapter on W_c."""
    return m.last + alpha * rank1(**m.given[m.name])


def wanted(known: Known):
    """For each method: its name, the method, a function that loads its inputs, their files."""
    for name in known.cfg.methods:
        if name == "next":
            for recipe in known.cfg.recipes:
                path = deltas.check_predicted(known.run, recipe)
                get = functools.partial(deltas.load_predicted, path)
                yield f"next-{recipe}", Method(jump), get, [path]
        else:
            method = METHODS[name]
            get, files = method.prepare(known) if method.prepare else (lambda: None, [])
            yield name, method, get, files


def make(known: Known, method: Method, given: object, places: tuple, info: dict) -> None:
    """Writes the jump of every matrix."""
    last, trajectory = known.series.last(), known.trajectory

    def jumped(module: str) -> LowRank | torch.Tensor:
        W, roles = known.series.weights(module), trajectory.deltas[module]
        m = Matrix(module, W, last.update(module), roles, trajectory.k, given)
        return method.jump(m, info["alpha"])

    merge.save_jump(known.series, jumped, places, info, known.cfg)


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
        jumps = {f"{name}_alpha{a:g}": a for a in cfg.alphas} if method.has_alpha else {name: 0.0}
        if cfg.accept:
            jumps = {f"{name}_accepted": best_alpha(known, jumps)} if method.has_alpha else {}
        for label, alpha in jumps.items():
            info = {**known.series.info(run), "step": step, "method": name, "alpha": alpha}
            info["inputs"] = inputs
            adapter, whole = run / "extrapolated" / label, run / "merged" / label
            if merge.is_made(adapter, whole, info, cfg):
                kept += 1
            else:
                chosen = METHODS["none"] if alpha is None else method  # None: every jump is worse
                make(known, chosen, get(), (adapter, whole), info)
                made += 1
            if cfg.merge and adapters.is_adapter(adapter):
                merge.merge_jump(adapter, whole, cfg)
            write.release()
    print(f"done: {made} made from step {step}, {kept} were there already, in {run}/extrapolated")


if __name__ == "__main__":
    run_stage(main, one_process=True)
