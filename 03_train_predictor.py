"""Stage 3: train the trajectory predictor.                       Paper: Sec. 4.2; Eq. 8, 9, 11

    accelerate launch 03_train_predictor.py --config demo --run-dir runs/demo
    accelerate launch 03_train_predictor.py --config demo --run-dir runs/demo --inputs local

Reads   <run-dir>/deltas, and for the backtest the checkpoints that these were made from
Writes  <run-dir>/predictor/<recipe>/model.safetensors      an encoder-decoder a length of vector
        <run-dir>/predictor/<recipe>/predicted.safetensors  its prediction from the last checkpoint
        <run-dir>/predictor/<recipe>/report.json            losses, and the backtest

The network and its two recipes, `paper` (the official code to the letter) and `aligned`, stand in
common/predictor.py. --inputs global or local is Table 5's "w/o local delta" or "w/o global delta"; the
folder is then aligned-no-local or aligned-no-global. --checkpoints 8 makes aligned-last8.
"""

import dataclasses
import pathlib
import time

import torch
from tqdm import tqdm

from common import UserError, predictor
from common.baselines.backtest import backtest
from common.files import config, deltas, series
from common.files.config import option
from common.files.stage import Stage, run_stage

LOSS_STRIDE = 5  # epochs between the losses that report.json keeps


@dataclasses.dataclass
class PredictorConfig(config.StageConfig):
    """What is trained on what."""

    recipes: list[str] = option(["aligned"], "one network each: aligned, paper")
    inputs: list[str] = option(["global", "local"], "the deltas that it sees (Table 5)")
    align: bool | None = option(None, "consistent signs of (u, v) [the recipe's]")
    scale_sigma: bool | None = option(None, "sigma over the matrix's last global one [the recipe's]")
    checkpoints: int = option(0, "learn from the last ones alone; 0 takes all (paper: 15)")
    holdout: int = option(0, "checkpoints that the backtest hides; 0 is k, as in a jump")
    name: str = option("", "folder below predictor/ [the recipe's name]")
    seed: int = option(0, "of the initial weights")

    def __post_init__(self):
        for recipe in self.recipes:
            if recipe not in predictor.RECIPES:
                raise UserError(f"unknown recipe '{recipe}'; {config.nearest(recipe, predictor.RECIPES)}")
        if not self.inputs or not {*self.inputs} <= {"global", "local"}:
            raise UserError(f"inputs must be global, local or both, not {' '.join(self.inputs)}")

    def recipe(self, name: str) -> predictor.Recipe:
        """The recipe `name` with what the options change."""
        own = {"align": self.align, "scale_sigma": self.scale_sigma}
        changed = {key: value for key, value in own.items() if value is not None}
        return dataclasses.replace(predictor.RECIPES[name], inputs=tuple(self.inputs), **changed)

    def folder(self, recipe: str) -> str:
        """The name of the folder for `recipe`."""
        missing = "".join(f"-no-{role}" for role in ("global", "local") if role not in self.inputs)
        last = f"-last{self.checkpoints}" if self.checkpoints else ""
        return self.name or recipe + missing + last


def train(trajectory: deltas.Trajectory, recipe: predictor.Recipe, seed: int, title: str):
    """Eq. 9 for every family of vectors: (family -> network, -> losses by epoch, -> loss of zeros)."""
    families = predictor.stack_families(*predictor.prepare(trajectory, recipe))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models, losses, zeros = {}, {}, {}
    with tqdm(total=len(families) * recipe.epochs, desc=title, unit="epoch", disable=None) as bar:
        for family, data in families.items():
            zeros[family] = float(data[2].abs().sum() / len(data[2]))
            data = tuple(part.to(device) for part in data)
            models[family], losses[family] = predictor.train_family(
                data, recipe, seed, lambda loss: bar.update()
            )
    return models, losses, zeros


def main() -> None:
    cfg = config.parse(PredictorConfig, "predict", __doc__)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    run = pathlib.Path(cfg.run_dir)
    trajectory = deltas.load_trajectory(run / "deltas")
    checkpoints = series.reopen(run)
    count, k = len(trajectory.steps), trajectory.k
    learn_from = cfg.checkpoints or count
    if not k < learn_from <= count:
        raise UserError(f"checkpoints must be {k + 1} to {count} with k = {k}, not {learn_from}")
    holdout = cfg.holdout or (k if count > 2 * k else 0)
    if not holdout:
        print(f"no backtest: with k = {k} it needs {2 * k + 1} checkpoints, there are {count}")
    elif not k <= holdout < count - k:
        raise UserError(f"holdout must be {k} to {count - k - 1} with k = {k}, not {holdout}")

    for name in cfg.recipes:
        recipe, folder = cfg.recipe(name), cfg.folder(name)
        own = dataclasses.replace(cfg, recipes=[name])
        stage = Stage(run / "predictor" / folder, own, {"deltas": deltas.fingerprint(run / "deltas")})
        if stage.done:
            continue

        def predict(past: deltas.Trajectory, recipe=recipe) -> dict:
            past = past.last(learn_from)
            return predictor.predict(train(past, recipe, cfg.seed, "backtest")[0], past, recipe)

        tested = backtest(trajectory, checkpoints, holdout, predict) if holdout else None
        began, learned = time.perf_counter(), trajectory.last(learn_from)
        models, losses, zeros = train(learned, recipe, cfg.seed, f"predictor {folder}")  # Eq. 8, 9
        predicted = predictor.predict(models, learned, recipe)  # Eq. 11
        seconds = round(time.perf_counter() - began, 2)

        weights = {f"{f}.{key}": w for f, m in models.items() for key, w in m.state_dict().items()}
        stage.save("model", weights)
        flat = {f"{m}.{side}": t for m, triple in predicted.items() for side, t in triple.items()}
        stage.save("predicted", flat)
        shown = {f: [float(f"{x:.6g}") for x in values[::LOSS_STRIDE]] for f, values in losses.items()}
        report = {"recipe": folder, "backtest": tested, "losses": shown, "loss_stride": LOSS_STRIDE}
        stage.write_json("report.json", {**report, "loss_of_zeros": zeros})
        stage.finish(training_seconds=seconds)
        if tested:
            rows = {row: found["cosine"] for row, found in tested.items() if isinstance(found, dict)}
            print(f"{folder}: backtest, step {tested['at_step']} -> {tested['predicts_step']}, cosine")
            print("   " + "  ".join(f"{row} {value:.3f}" for row, value in rows.items()))
            if rows["predictor"] <= rows["repeat-last"]:
                print("   this predictor does not beat repeating the last target")
    print(f"done: predictors in {run / 'predictor'}")


if __name__ == "__main__":
    run_stage(main, one_process=True)
