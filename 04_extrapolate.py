"""Stage 4: jump.                                                          Paper: Sec. 4.2 (predict-extend); Eq. 10, 11; Fig. 6

    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo
    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo --methods repeat-last --alphas 1.5

Reads   <run-dir>/deltas, the last checkpoint these were made from (train/step_0150), <run-dir>/predictor/<recipe>
Writes  <run-dir>/extrapolated/<method>_alpha1.5      for each method and alpha: an adapter of rank r + 1 (rl-extra: r), exact in fp32

The adapters go straight into stages 5 and 6, PEFT or vLLM, and back to the trainer that made the checkpoints. `next` is made once for
each recipe: next-aligned, next-paper, next-weighted.
"""

import dataclasses
import pathlib
import time

import safetensors.torch
import torch

from common import adapters, extrapolators, predictor, rank1, run_dir
from common import config as configs
from common.run_dir import UserError


@dataclasses.dataclass
class ExtrapolateConfig(configs.StageConfig):
    """What to jump with, and how far."""

    methods: list[str] = dataclasses.field(
        default_factory=lambda: ["next"], metadata={"help": f"any of {', '.join(extrapolators.METHODS)}"}
    )
    recipes: list[str] = dataclasses.field(
        default_factory=lambda: ["weighted"], metadata={"help": "predictors that `next` uses, of those stage 3 made"}
    )
    alphas: list[float] = dataclasses.field(
        default_factory=lambda: [1.5], metadata={"help": "extending coefficients (paper: 1.5; Fig. 6: 0.5 to 4.0)"}
    )

    def __post_init__(self):
        for name in self.methods:
            if name not in extrapolators.METHODS:
                raise UserError(f"unknown method '{name}'; {configs.nearest(name, extrapolators.METHODS)}")


def load_predictors(folder: pathlib.Path, trajectory: rank1.Trajectory) -> dict[str, torch.nn.Module]:
    """The predictors that stage 3 left in `folder`, by family."""
    run_dir.read_json(folder / "done.json", "03_train_predictor.py")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    if "sum.weights" in weights:
        return {"sum": predictor.WeightedSum(weights["sum.weights"])}
    models = {}
    for roles in trajectory.deltas.values():
        for side in ("u", "v", "sigma"):
            name = predictor.family(side, roles["global"])
            length = 1 if side == "sigma" else getattr(roles["global"], side).shape[1]
            models[name] = predictor.TrajectoryPredictor(length)
            models[name].load_state_dict({key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")})
    return models


def variants(cfg: ExtrapolateConfig, run: pathlib.Path, trajectory: rank1.Trajectory, step: int) -> dict[str, tuple[str, dict, list]]:
    """Output name -> (method, what it needs beside the trajectory, the files that come from)."""
    found = {}
    for method in cfg.methods:
        if method == "next":
            for recipe in cfg.recipes:
                folder = run / "predictor" / recipe
                if recipe not in predictor.RECIPES:
                    raise UserError(f"unknown recipe '{recipe}'; {configs.nearest(recipe, predictor.RECIPES)}")
                predicted = predictor.predict(load_predictors(folder, trajectory), trajectory, predictor.RECIPES[recipe])
                found[f"next-{recipe}"] = (method, {"predicted": predicted}, [folder / "model.safetensors"])
        elif method == "oracle":
            ahead = step + trajectory.k * (trajectory.steps[-1] - trajectory.steps[-2])
            patterns = run_dir.read_json(run / "deltas" / "done.json", "02_extract_deltas.py")["config"]["checkpoints"]
            future = adapters.find_checkpoints(patterns, run).get(ahead)
            if future is None:
                raise UserError(f"oracle needs the checkpoint of step {ahead}: train on (01_train_lora_grpo.py with a larger --steps)")
            found[method] = (method, {"future": adapters.read_adapter(future)}, [future / "adapter_model.safetensors"])
        else:
            found[method] = (method, {}, [])
    return found


def main() -> None:
    cfg = configs.parse(ExtrapolateConfig, "extrapolate", __doc__)
    run = pathlib.Path(cfg.run_dir)
    run_dir.read_json(run / "deltas" / "done.json", "02_extract_deltas.py")
    trajectory = rank1.load_trajectory(run / "deltas")
    step = trajectory.steps[-1]
    checkpoint = rank1.checkpoint_paths(run)[step]
    last = adapters.read_adapter(checkpoint)
    base = {"step": step, **adapters.read_info(checkpoint)}
    aligned = trajectory.aligned()
    sources = [checkpoint / "adapter_model.safetensors", run / "deltas" / "rank1.safetensors"]
    began, made, kept = time.perf_counter(), 0, 0
    for name, (method, needs, own_sources) in variants(cfg, run, trajectory, step).items():
        inputs = {run_dir.within(path, run): run_dir.sha256(path) for path in [*sources, *own_sources]}
        for alpha in cfg.alphas if method != "none" else [0.0]:
            folder = run / "extrapolated" / (name if method == "none" else f"{name}_alpha{alpha:g}")
            info = {**base, "method": name, "alpha": alpha, "inputs": inputs}
            if (folder / "checkpoint.json").is_file() and not cfg.overwrite:
                before = run_dir.read_json(folder / "checkpoint.json", "04_extrapolate.py --overwrite")
                if {**before, "seconds": None} == {**info, "seconds": None}:
                    kept += 1
                    continue
            adapter = extrapolators.METHODS[method](last, aligned, alpha, **needs)
            adapters.write_adapter(folder, adapter, {**info, "seconds": round(time.perf_counter() - began, 3)})
            made, began = made + 1, time.perf_counter()
    print(f"done: {made} adapters made from step {step}, {kept} were there already, in {run / 'extrapolated'}")


if __name__ == "__main__":
    configs.run_stage(main, one_process=True)
