"""Stage 3: train the trajectory predictor.                                                   Paper: Sec. 4.2; Eq. 8, 9, 11

    accelerate launch 03_train_predictor.py --config demo --run-dir runs/demo

Reads   <run-dir>/deltas, and the checkpoints these were made from for the backtest
Writes  <run-dir>/predictor/<recipe>/model.safetensors    one encoder-decoder for each vector length; for `weighted` three numbers
                                                          (<recipe>-last8 with --checkpoints 8, which learns from those alone)
        <run-dir>/predictor/<recipe>/report.json          losses, and what the predictor is worth on targets it has not seen

The backtest asks the only question that matters before a jump: standing at an earlier checkpoint, with no later one known, how near
would the prediction have come to the true delta? Beside it stand four controls that learn nothing (copy the global direction, repeat
the last target, repeat the last two locals, a straight line) and the oracle, the true target's rank 1. A predictor that loses to
`repeat-last` adds nothing.
"""

import dataclasses
import pathlib
import time

import torch
from tqdm import tqdm

from common import UserError, predictor, rank1
from common.baselines import methods as extrapolators
from common.files import adapters, dense
from common.files import config as configs
from common.files import deltas as delta_files
from common.files import models as model_files
from common.files import write as run_dir
from common.files.models import ModelFolder

LOSS_STRIDE = 5  # epochs between the losses that report.json keeps


@dataclasses.dataclass
class PredictorConfig(configs.StageConfig):
    """Which recipes, and how the backtest is cut."""

    recipes: list[str] = dataclasses.field(
        default_factory=lambda: ["weighted"],
        metadata={"help": f"recipes to train: {', '.join(predictor.RECIPES)} (common/predictor.py)"},
    )
    holdout: int = dataclasses.field(default=0, metadata={"help": "checkpoints the backtest hides; 0 is k, the jump's own situation"})
    checkpoints: int = dataclasses.field(
        default=0, metadata={"help": "learn from this many last checkpoints and the targets that begin there; 0 is all (paper: 15)"}
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "of the predictor's initial weights"})

    def __post_init__(self):
        for name in self.recipes:
            if name not in predictor.RECIPES:
                raise UserError(f"unknown recipe '{name}'; {configs.nearest(name, predictor.RECIPES)}")


def train_all(trajectory: rank1.Trajectory, recipe: predictor.AnyRecipe, seed: int, title: str) -> tuple[dict, dict, dict]:
    """One predictor for each family of the trajectory, or one sum for all.

    Returns (family -> model, family -> loss of each epoch, family -> the loss of predicting zeros).
    """
    if isinstance(recipe, predictor.SumRecipe):
        return {"sum": predictor.fit_weights(trajectory, recipe)}, {}, {}
    families = predictor.stack_families(*predictor.prepare(trajectory, recipe))
    models, losses, device = {}, {}, "cuda" if torch.cuda.is_available() else "cpu"
    with tqdm(total=len(families) * recipe.epochs, desc=title, unit="epoch", disable=None) as bar:
        for name, data in families.items():
            data = [part.to(device) for part in data]

            def tick(loss, name=name):
                bar.update(1)
                bar.set_postfix(family=name, loss=f"{loss:.4f}", refresh=False)

            model, losses[name] = predictor.train_family(*data, recipe, seed, tick)
            models[name] = model.cpu()
    return models, losses, {name: float(target.abs().sum() / len(target)) for name, (_, _, target) in families.items()}


def controls(trajectory: rank1.Trajectory) -> dict[str, dict]:
    """What the last checkpoint's target would be without learning: name -> module -> (u, sigma, v). Signs aligned.

    copy-global   the global delta's direction, sigma its average growth over k checkpoints
    repeat-last   rank 1 of the last target known, W_c - W_(c-k)
    recent-locals rank 1 of k times the mean of the last two locals
    linear-fit    k times the slope of the least-squares line through sigma u of the global delta over all checkpoints; v the last one
    """
    trajectory, found = trajectory.aligned(), {"copy-global": {}, "repeat-last": {}, "recent-locals": {}, "linear-fit": {}}
    c, k = len(trajectory.steps), trajectory.k
    t = torch.arange(c, dtype=torch.float32) - (c - 1) / 2
    for module, roles in trajectory.deltas.items():
        whole, target = roles["global"], roles["target"]
        slope = (t[:, None] * whole.sigma[:, None] * whole.u).sum(0) / t.square().sum() * k
        found["copy-global"][module] = (whole.u[-1], whole.sigma[-1] * k / c, whole.v[-1])
        found["repeat-last"][module] = (target.u[-1], target.sigma[-1], target.v[-1])
        found["recent-locals"][module] = extrapolators.recent_triple(roles, k)
        found["linear-fit"][module] = (torch.nn.functional.normalize(slope, dim=0), slope.norm(), whole.v[-1])
    return found


def true_delta(now, future, module: str, u: torch.Tensor, v: torch.Tensor) -> tuple[float, float, float]:
    """(u^T D v, |D|_F, sigma_1(D)) of D = W(future) - W(now), from two adapters or two whole models."""
    if isinstance(now, ModelFolder):
        delta = dense.difference(future, now, module)
        return float(u @ (delta @ v)), float(torch.linalg.vector_norm(delta)), float(dense.leading_of_dense(delta, keep=1)[1][0])
    left, right = (x.double() for x in rank1.delta_factors(future.factors[module], now.factors[module], now.scale(module)))
    sigma = rank1.svd_of_product(left, right)[1]
    return float((u.double() @ left) @ (right @ v.double())), float(sigma.norm()), float(sigma[0])


def score(predicted: dict, now: adapters.Adapter | ModelFolder, future: adapters.Adapter | ModelFolder) -> dict:
    """Against the whole true delta D of each matrix: cosine <sigma u v^T, D> / (|sigma| |D|_F), sigma error |sigma / sigma_1(D) - 1|.

    Means over matrices.
    """
    cosines, errors = [], []
    for module, (u, sigma, v) in predicted.items():
        along, size, true_sigma = true_delta(now, future, module, u, v)
        if not size:
            continue  # a matrix that did not move
        cosines.append(float(torch.sign(sigma)) * along / size)
        errors.append(abs(float(sigma) - true_sigma) / true_sigma)
    return {"cosine": sum(cosines) / len(cosines), "sigma_error": sum(errors) / len(errors), "matrices": len(cosines)}


def backtest(
    trajectory: rank1.Trajectory, recipe: predictor.AnyRecipe, seed: int, holdout: int, checkpoints: int, paths: dict, kind: str
) -> dict:
    """Stand at checkpoint c - holdout, train on what was known there, predict k checkpoints ahead, score beside controls and oracle.

    The predictor learns from the last `checkpoints` before there, or as many as there are; the controls see all of them. `paths` are
    the folders of the checkpoints by step, adapters or (kind "full") whole models.
    """
    count = len(trajectory.steps) - holdout
    past = trajectory.until(count)
    step, future_step = trajectory.steps[count - 1], trajectory.steps[count - 1 + trajectory.k]
    read = model_files.open_intact if kind == "full" else adapters.read_adapter
    now, future = read(paths[step]), read(paths[future_step])
    learned = past.last(checkpoints)
    models, _, _ = train_all(learned, recipe, seed, "backtest")
    true = {m: (r["target"].u[count - 1], r["target"].sigma[count - 1], r["target"].v[count - 1]) for m, r in trajectory.deltas.items()}
    candidates = {"predictor": predictor.predict(models, learned, recipe), **controls(past), "oracle": true}
    return {
        "at_step": step,
        "predicts_step": future_step,
        "targets_known": len(learned.steps) - trajectory.k,
        **{name: score(triples, now, future) for name, triples in candidates.items()},
    }


def cut(cfg: PredictorConfig, trajectory: rank1.Trajectory) -> tuple[int, int]:
    """How many checkpoints the backtest hides (0: none, there are too few for one), and how many a predictor learns from.

    Raises UserError where no target is left.
    """
    count, k = len(trajectory.steps), trajectory.k
    holdout, checkpoints = cfg.holdout or (k if count > 2 * k else 0), cfg.checkpoints or count
    if not holdout:
        print(f"no backtest: one needs {2 * k + 1} checkpoints with k = {k}, there are {count}")
    elif holdout < k or count - holdout - k < 1:
        raise UserError(
            f"holdout must leave a target to train on and be at least k: with {count} checkpoints and k = {k} it can be "
            f"{k} to {count - k - 1}, not {holdout}"
        )
    if not k < checkpoints <= count:
        raise UserError(
            f"checkpoints must leave a target to train on: with {count} of them and k = {k} it can be {k + 1} to {count}, not {checkpoints}"
        )
    return holdout, checkpoints


def say(name: str, tested: dict) -> None:
    print(f"{name}: backtest at step {tested['at_step']} -> {tested['predicts_step']}, {tested['targets_known']} targets known")
    print("   cosine with the true delta:")
    print("   " + "  ".join(f"{row} {tested[row]['cosine']:.3f}" for row in tested if isinstance(tested[row], dict)))
    if tested["predictor"]["cosine"] <= tested["repeat-last"]["cosine"]:
        print("   this predictor does not beat repeating the last target")


def main() -> None:
    cfg = configs.parse(PredictorConfig, "predict", __doc__)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    run = pathlib.Path(cfg.run_dir)
    trajectory = delta_files.load_trajectory(run / "deltas")
    paths = delta_files.checkpoint_paths(run)
    holdout, checkpoints = cut(cfg, trajectory)
    for recipe_name in cfg.recipes:
        recipe, name = predictor.RECIPES[recipe_name], recipe_name + (f"-last{cfg.checkpoints}" if cfg.checkpoints else "")
        folder = run / "predictor" / name
        stage = run_dir.Stage(
            folder, {**dataclasses.asdict(recipe), "seed": cfg.seed, "holdout": holdout}, inputs=[run / "deltas" / "rank1.safetensors"]
        )
        if stage.is_done(cfg.overwrite):
            continue
        kind = delta_files.kind_of(run)
        tested = backtest(trajectory, recipe, cfg.seed, holdout, checkpoints, paths, kind) if holdout else None
        began = time.perf_counter()
        models, losses, loss_of_zeros = train_all(trajectory.last(checkpoints), recipe, cfg.seed, f"predictor {name}")
        seconds = time.perf_counter() - began
        weights = {f"{group}.{key}": value for group, model in models.items() for key, value in model.state_dict().items()}
        run_dir.save_tensors(folder / "model.safetensors", weights)
        run_dir.write_json(
            folder / "report.json",
            {
                "recipe": name,
                "backtest": tested,
                "training_seconds": round(seconds, 2),
                "losses": {group: [float(f"{x:.6g}") for x in values[::LOSS_STRIDE]] for group, values in losses.items()},
                "loss_stride": LOSS_STRIDE,
                "loss_of_zeros": loss_of_zeros,
            },
        )
        stage.finish(training_seconds=round(seconds, 2))
        if tested:
            say(name, tested)
    print(f"done: predictors in {run / 'predictor'}")


if __name__ == "__main__":
    configs.run_stage(main, one_process=True)
