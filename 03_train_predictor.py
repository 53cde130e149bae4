"""Stage 3: train the trajectory predictor.                Paper: Sec. 4.2, Alg. 1; Eq. 8, 9, 11

    accelerate launch --quiet 03_train_predictor.py --config demo --run-dir runs/demo
    accelerate launch --quiet 03_train_predictor.py --config demo --run-dir runs/demo --inputs local

Reads   <run-dir>/deltas; for the backtest also the checkpoints behind them
Writes  <run-dir>/predictor/<recipe>/model.safetensors      a network per kind and length of vector
        <run-dir>/predictor/<recipe>/predicted.safetensors  its prediction from the last checkpoint
        <run-dir>/predictor/<recipe>/report.json            losses, and the backtest

The network, its loss (Eq. 8, 9) and two recipes are in common/predictor.py: `paper` trains as the
official code does, `aligned` is ours. --inputs local (Table 5) makes <recipe>-no-global.
"""

import dataclasses
import functools
import pathlib
import time

import torch

from common import UserError, predictor
from common.baselines.backtest import backtest, describe
from common.files import config, deltas, series, write
from common.files.config import option
from common.files.stage import Stage, progress, run_stage

STRIDE = 5  # epochs between the losses that report.json keeps


@dataclasses.dataclass
class PredictorConfig(config.StageConfig):
    """What is trained on what."""

    recipes: list[str] = option(["aligned"], "what is trained, in this order: aligned, paper")
    inputs: list[str] = option(["global", "local"], "the deltas that it sees (Table 5)")
    align: bool | None = option(None, "consistent signs of (u, v) [the recipe's]")
    scale_sigma: bool | None = option(None, "sigma divided by the last global one [the recipe's]")
    epochs: int | None = option(None, "full-batch steps of AdamW [the recipe's]")
    bf16: bool = option(False, "matrix products in bf16: half the time for a large model (ours)")
    checkpoints: int = option(0, "learn from the last N only; 0 takes all (paper: 15)")
    name: str = option("", "folder below predictor/ to write [the recipe's name]")
    seed: int = option(0, "random seed of the initial weights")

    def __post_init__(self):
        for name in self.recipes:
            if name not in predictor.RECIPES:
                raise UserError(f"no recipe '{name}'; {config.nearest(name, predictor.RECIPES)}")
        if self.name and len(self.recipes) > 1:
            raise UserError("--name is for one recipe")
        if sorted(self.inputs) not in (["global"], ["local"], ["global", "local"]):
            raise UserError(f"inputs must be global, local or both, not {' '.join(self.inputs)}")

    def recipe(self, name: str) -> predictor.Recipe:
        """The recipe `name` with what the options change."""
        own = {x: getattr(self, x) for x in ("align", "scale_sigma", "epochs", "bf16")}
        changed = {key: value for key, value in own.items() if value is not None}
        return dataclasses.replace(predictor.RECIPES[name], inputs=tuple(self.inputs), **changed)

    def folder(self, recipe: str) -> str:
        """The name of the folder for `recipe`."""
        missing = "".join(f"-no-{role}" for role in ("global", "local") if role not in self.inputs)
        last = f"-last{self.checkpoints}" if self.checkpoints else ""
        return self.name or recipe + missing + last


def fit(cfg: PredictorConfig, recipe: predictor.Recipe, known: deltas.Trajectory):
    """Trains on what is known (Eq. 8, 9) and predicts the next target (Eq. 8, 11)."""
    known = known.last(cfg.checkpoints or len(known.steps))
    families = predictor.stack_families(*predictor.prepare(known, recipe))
    with progress(desc="training", in_log=True, total=len(families) * recipe.epochs) as bar:
        models, losses, zeros = predictor.train(families, recipe, cfg.seed, bar.update)
    return predictor.predict(models, known, recipe), models, losses, zeros


def flat(nested: dict[str, dict]) -> dict[str, torch.Tensor]:
    """{"a": {"b": tensor}} -> {"a.b": tensor}."""
    return {f"{a}.{b}": tensor for a, inside in nested.items() for b, tensor in inside.items()}


def main() -> None:
    cfg = config.parse(PredictorConfig, "predict", __doc__)
    run = pathlib.Path(cfg.run_dir)
    trajectory, checkpoints = deltas.load_trajectory(run / "deltas"), series.reopen(run)
    count, k = len(trajectory.steps), trajectory.k
    if cfg.checkpoints and not k < cfg.checkpoints <= count:
        raise UserError(f"checkpoints must be {k + 1} to {count} with k = {k}")
    if count <= 2 * k:
        print(f"no backtest: with k = {k} it needs {2 * k + 1} checkpoints, there are {count}")

    for name in cfg.recipes:
        recipe, folder = cfg.recipe(name), run / "predictor" / cfg.folder(name)
        own = dataclasses.replace(cfg, recipes=[name])  # config.json names this recipe alone
        stage = Stage(folder, own, {"deltas": deltas.fingerprint(run / "deltas")})
        if stage.done:
            continue
        predict = functools.partial(fit, cfg, recipe)
        tested = backtest(trajectory, checkpoints, predict) if count > 2 * k else None
        began = time.perf_counter()
        predicted, models, losses, zeros = predict(trajectory)
        seconds = round(time.perf_counter() - began, 2)
        networks = {f: model.state_dict() for f, model in models.items()}
        write.save_tensors(folder / "model.safetensors", flat(networks))
        write.save_tensors(folder / "predicted.safetensors", flat(predicted))
        losses = {f: [round(x, 6) for x in all_[::STRIDE]] for f, all_ in losses.items()}
        report = {"recipe": folder.name, "backtest": tested, "losses": losses}
        report |= {"loss_stride": STRIDE, "loss_of_zeros": zeros}
        write.write_json(folder / "report.json", report)
        stage.finish(training_seconds=seconds)
        if tested:
            print(describe(folder.name, tested))
    print(f"done: predictors in {run / 'predictor'}")


if __name__ == "__main__":
    run_stage(main, one_process=True)
