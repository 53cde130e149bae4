"""Stage 4: jump.                                                          Paper: Sec. 4.2 (predict-extend); Eq. 10, 11; Fig. 6

    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo
    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo --methods repeat-last --alphas 1.5
    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo --alphas 1.5 --merge fp32

Reads   <run-dir>/deltas, the last checkpoint these were made from (train/step_0150), <run-dir>/predictor/<recipe>
Writes  <run-dir>/extrapolated/<method>_alpha1.5      for each method and alpha: an adapter of rank r + 1 (rl-extra: r), exact in fp32
        <run-dir>/merged/<method>_alpha1.5            with --merge: the backbone and that adapter in one, a Hugging Face folder

The adapters go straight into stages 5 and 6, PEFT or vLLM, and back to the trainer that made the checkpoints. `next` is made once for
each recipe: next-aligned, next-paper, next-weighted. From whole models the adapter has rank 1 and belongs on the last of them, which is its
base_model_name_or_path (stage 5: --backbone).
"""

import dataclasses
import pathlib
import sys
import time
from typing import Literal

import safetensors.torch
import torch

from common import adapters, dense, extrapolators, merge, model_files, predictor, rank1, run_dir
from common import config as configs
from common.run_dir import UserError

NO_RANK_1 = {"rl-extra": "moves by the update itself, all ranks of it", "none": "is the last checkpoint itself"}


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
    merge: Literal["fp32", "backbone"] | None = dataclasses.field(
        default=None, metadata={"help": "write merged models too, in fp32 or rounded to the backbone's dtype; without it, adapters alone"}
    )

    def __post_init__(self):
        for name in self.methods:
            if name not in extrapolators.METHODS:
                raise UserError(f"unknown method '{name}'; {configs.nearest(name, extrapolators.METHODS)}")


def load_predictors(folder: pathlib.Path, trajectory: rank1.Trajectory) -> dict[str, torch.nn.Module]:
    """The predictors that stage 3 left in `folder`, by family."""
    done = run_dir.read_json(folder / "done.json", "03_train_predictor.py", {"inputs": {"rank1.safetensors": str}})
    if done["inputs"]["rank1.safetensors"] != run_dir.sha256(folder.parents[1] / "deltas" / "rank1.safetensors"):
        raise UserError(f"{folder} was trained on other deltas than those there now: run 03_train_predictor.py --overwrite")
    with run_dir.reading(folder / "model.safetensors", "run 03_train_predictor.py --overwrite"):
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        if "sum.weights" in weights:
            return {"sum": predictor.WeightedSum(weights["sum.weights"])}
        models = {}
        for roles in trajectory.deltas.values():
            for side in ("u", "v", "sigma"):
                name = predictor.family(side, roles["global"])
                length = 1 if side == "sigma" else getattr(roles["global"], side).shape[1]
                models[name] = predictor.TrajectoryPredictor(length)
                own = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
                models[name].load_state_dict(own)
    return models


def variants(cfg: ExtrapolateConfig, run: pathlib.Path, trajectory: rank1.Trajectory, step: int) -> dict[str, tuple[str, dict, list]]:
    """Output name -> (method, what it needs beside the trajectory, the files that come from)."""
    found, full = {}, rank1.kind_of(run) == "full"
    for method in cfg.methods:
        if method == "next":
            for recipe in cfg.recipes:
                folder = run / "predictor" / recipe
                if recipe not in predictor.RECIPES:
                    raise UserError(f"unknown recipe '{recipe}'; {configs.nearest(recipe, predictor.RECIPES)}")
                predicted = predictor.predict(load_predictors(folder, trajectory), trajectory, predictor.RECIPES[recipe])
                found[f"next-{recipe}"] = (method, {"predicted": predicted}, [folder / "model.safetensors"])
        elif full and method in NO_RANK_1:
            raise UserError(f"{method} {NO_RANK_1[method]}: on whole models it is no adapter of rank 1; leave it out of --methods")
        elif method == "oracle":
            ahead = step + trajectory.k * (trajectory.steps[-1] - trajectory.steps[-2])
            done = run_dir.read_json(run / "deltas" / "done.json", "02_extract_deltas.py", {"config": {"checkpoints": list[str]}})
            patterns = done["config"]["checkpoints"]
            future = adapters.find_checkpoints(patterns, run).get(ahead)
            if future is None:
                raise UserError(f"oracle needs the checkpoint of step {ahead}: train on (01_train_lora_grpo.py with a larger --steps)")
            if full:
                now, future = model_files.open_model(rank1.checkpoint_paths(run)[step]), model_files.open_model(future)
                true = {module: dense.leading_of_dense(dense.difference(future, now, module)) for module in trajectory.deltas}
                triples = {module: (u, sigma[0], v) for module, (u, sigma, v, _) in true.items()}
                found[method] = ("next", {"predicted": triples}, sorted({*future.files.values()}))
            else:
                found[method] = (method, {"future": adapters.read_adapter(future)}, [future / "adapter_model.safetensors"])
        else:
            found[method] = (method, {}, [])
    return found


def write_merged(cfg: ExtrapolateConfig, run: pathlib.Path, name: str) -> None:
    """Merges <run-dir>/extrapolated/<name> into its backbone in <run-dir>/merged/<name>, unless just that is there."""
    source, out = run / "extrapolated" / name, run / "merged" / name
    backbone = adapters.read_info(source).get("backbone")
    if not backbone:
        raise UserError(f"{source} does not say what its backbone is: set base_model_name_or_path in its adapter_config.json")
    record = {"backbone": backbone, "dtype": cfg.merge, "adapter": run_dir.sha256(source / "adapter_model.safetensors")}
    there = (out / "merge.json").is_file() and not cfg.overwrite
    if there and record.items() <= run_dir.read_json(out / "merge.json", "04_extrapolate.py --overwrite").items():
        return
    base = model_files.find_model(cfg.path(backbone))
    lost = merge.merge(out, adapters.read_adapter(source), base, cfg.merge == "fp32", record)
    rounded = sorted({*model_files.open_model(out).dtypes.values()} & {"BF16", "F16"})
    if rounded:
        print(
            f"warning: {out} is in {', '.join(rounded)}: rounding leaves {lost['entries_lost']:.1%} of the entries that the adapter "
            f"changes as they were, and loses {lost['norm_lost']:.1%} of the norm of its update; --merge fp32 loses nothing",
            file=sys.stderr,
        )


def main() -> None:
    cfg = configs.parse(ExtrapolateConfig, "extrapolate", __doc__)
    run = pathlib.Path(cfg.run_dir)
    run_dir.read_json(run / "deltas" / "done.json", "02_extract_deltas.py")
    trajectory = rank1.load_trajectory(run / "deltas")
    step = trajectory.steps[-1]
    checkpoint = rank1.checkpoint_paths(run)[step]
    aligned, sources = trajectory.aligned(), [run / "deltas" / "rank1.safetensors"]
    if rank1.kind_of(run) == "full":
        last = dense.empty_adapter(checkpoint, list(trajectory.deltas))
        base = {"step": step, "backbone": run_dir.within(checkpoint, run, "{run_dir}")}
    else:
        last = adapters.read_adapter(checkpoint)
        base = {"step": step, **adapters.read_info(checkpoint)}
        sources.append(checkpoint / "adapter_model.safetensors")
    began, made, kept = time.perf_counter(), 0, 0
    for name, (method, needs, own_sources) in variants(cfg, run, trajectory, step).items():
        inputs = {run_dir.within(path, run): run_dir.sha256(path) for path in [*sources, *own_sources]}
        for alpha in cfg.alphas if method != "none" else [0.0]:
            folder = run / "extrapolated" / (name if method == "none" else f"{name}_alpha{alpha:g}")
            info = {**base, "method": name, "alpha": alpha, "inputs": inputs}
            before = {}
            if (folder / "checkpoint.json").is_file() and not cfg.overwrite:
                before = run_dir.read_json(folder / "checkpoint.json", "04_extrapolate.py --overwrite")
            if {**before, "seconds": None} == {**info, "seconds": None}:
                kept += 1
            else:
                adapter = extrapolators.METHODS[method](last, aligned, alpha, **needs)
                adapters.write_adapter(folder, adapter, {**info, "seconds": round(time.perf_counter() - began, 3)})
                made += 1
            if cfg.merge:
                write_merged(cfg, run, folder.name)
            began = time.perf_counter()
    print(f"done: {made} adapters made from step {step}, {kept} were there already, in {run / 'extrapolated'}")


if __name__ == "__main__":
    configs.run_stage(main, one_process=True)
