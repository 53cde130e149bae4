"""Stage 4: jump.                                                          Paper: Sec. 4.2 (predict-extend); Eq. 10, 11; Fig. 6

    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo
    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo --methods repeat-last --alphas 1.5
    accelerate launch 04_extrapolate.py --config demo --run-dir runs/demo --alphas 1.5 --merge fp32

Reads   <run-dir>/deltas, the checkpoints these were made from (train/step_0150 ...), <run-dir>/predictor/<recipe>
        <run-dir>/validation      alpharl-pls, greedy-soup: what 06_eval.py --output validation measured of every checkpoint
Writes  <run-dir>/extrapolated/<method>_alpha1.5      for each method and alpha: an adapter, exact in fp32
        <run-dir>/extrapolated/<method>               none, wsm, greedy-soup, which have no alpha
        <run-dir>/merged/<method>_alpha1.5            with --merge: the backbone and that adapter in one, a Hugging Face folder
        <run-dir>/merged/dare_p0.9                    dare: such a folder without an adapter, for what it leaves has all ranks

The adapters go straight into stages 5 and 6, PEFT or vLLM, and back to the trainer that made the checkpoints. Their ranks: r + 1 where
rank 1 is added to the last checkpoint, r for rl-extra and expo, 1 on the backbone for alpharl, the sum of the ranks of what is summed
(or what the matrix has) for relex, wsm and greedy-soup; vLLM takes up to 512, beyond that --merge. `next` is made once for each recipe:
next-aligned, next-paper, next-weighted. From whole models the adapter has rank 1 and belongs on the last of them, which is its
base_model_name_or_path; stage 5 goes on with --tune full.
"""

import dataclasses
import functools
import importlib
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Literal

import safetensors.torch
import torch

from common import UserError, predictor, rank1
from common.baselines import methods as extrapolators
from common.files import adapters, dense, merge
from common.files import config as configs
from common.files import deltas as delta_files
from common.files import models as model_files
from common.files import read as inputs
from common.files import series as adapter_series
from common.files import write as run_dir

_BACKBONE = "replaces the whole update, so its adapter belongs on the backbone"
_ALL_RANKS = "moves by the update itself, all ranks of it"
_CHECKPOINTS = "is a sum of whole checkpoints"
NO_RANK_1 = {  # on the last of a series of whole models
    "rl-extra": _ALL_RANKS,
    "expo": _ALL_RANKS,
    "dare": _ALL_RANKS,
    "alpharl": _BACKBONE,
    "alpharl-pls": _BACKBONE,
    "relex": _CHECKPOINTS,
    "wsm": _CHECKPOINTS,
    "greedy-soup": _CHECKPOINTS,
}


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
    wsm_checkpoints: int = dataclasses.field(default=5, metadata={"help": "checkpoints that `wsm` averages, the last ones (open)"})
    dare_drop: float = dataclasses.field(default=0.9, metadata={"help": "share of entries that `dare` drops (its authors: 0.9 and up)"})
    validation_data: list[str] = dataclasses.field(
        default_factory=lambda: ["{run_dir}/data/valid.jsonl"],
        metadata={"help": "problems on which `greedy-soup` measures its candidates, the same as in <run-dir>/validation"},
    )

    def __post_init__(self):
        for name in self.methods:
            if name not in extrapolators.METHODS:
                raise UserError(f"unknown method '{name}'; {configs.nearest(name, extrapolators.METHODS)}")
        if not 0 <= self.dare_drop < 1 or self.wsm_checkpoints < 1:
            raise UserError("dare_drop must be at least 0 and below 1, wsm_checkpoints at least 1")


def load_predictors(folder: pathlib.Path, trajectory: rank1.Trajectory, recipe: predictor.AnyRecipe) -> dict[str, torch.nn.Module]:
    """The predictors that stage 3 left in `folder`, by family."""
    done = inputs.read_json(folder / "done.json", "03_train_predictor.py", {"inputs": {"rank1.safetensors": str}})
    if done["inputs"]["rank1.safetensors"] != inputs.sha256(folder.parents[1] / "deltas" / "rank1.safetensors"):
        raise UserError(f"{folder} was trained on other deltas than those there now: run 03_train_predictor.py --overwrite")
    with inputs.reading(folder / "model.safetensors", "run 03_train_predictor.py --overwrite"):
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        inputs.check_intact(folder)
        if "sum.weights" in weights:
            return {"sum": predictor.WeightedSum(weights["sum.weights"])}
        models = {}
        for roles in trajectory.deltas.values():
            for side in ("u", "v", "sigma"):
                name = predictor.family(side, roles["global"])
                length = 1 if side == "sigma" else getattr(roles["global"], side).shape[1]
                models[name] = predictor.TrajectoryPredictor(length, recipe.inputs)
                own = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
                models[name].load_state_dict(own)
    return models


# ---------------------------------------------------------------------------------------------------------------------------
# What methods ask for beside the last checkpoint, its trajectory and alpha: the files it comes from, checked, and a function that gets it
# ---------------------------------------------------------------------------------------------------------------------------


def find_future(cfg: ExtrapolateConfig, run: pathlib.Path, trajectory: rank1.Trajectory):
    """The checkpoint k after the last one. From whole models: the rank 1 of what it moves, as `next` takes it."""
    step, full = trajectory.steps[-1], delta_files.kind_of(run) == "full"
    ahead = step + trajectory.k * (step - trajectory.steps[-2])
    kinds = {"config": {"checkpoints": list[str]}}
    patterns = inputs.read_json(run / "deltas" / "done.json", "02_extract_deltas.py", kinds)["config"]["checkpoints"]
    folder = adapter_series.find_checkpoints(patterns, run).get(ahead)
    if folder is None:
        raise UserError(f"oracle needs the checkpoint of step {ahead}: train on (01_train_lora_grpo.py with a larger --steps)")
    if not full:
        return [folder / "adapter_model.safetensors"], lambda: adapters.read_adapter(folder)
    now, future = model_files.open_intact(delta_files.checkpoint_paths(run)[step]), model_files.open_intact(folder)

    def triples() -> dict[str, tuple]:
        true = {module: dense.leading_of_dense(dense.difference(future, now, module)) for module in trajectory.deltas}
        return {module: (u, sigma[0], v) for module, (u, sigma, v, _) in true.items()}

    return sorted({*future.files.values()}), triples


def find_series(cfg: ExtrapolateConfig, run: pathlib.Path, trajectory: rank1.Trajectory):
    series = adapter_series.open_series(delta_files.checkpoint_paths(run))
    return [path / "adapter_model.safetensors" for path in series.paths.values()], lambda: series


def find_over_time(cfg: ExtrapolateConfig, run: pathlib.Path, trajectory: rank1.Trajectory):
    files, series = find_series(cfg, run, trajectory)
    return files, lambda: extrapolators.leading_over_time(series())


def validation_results(cfg: ExtrapolateConfig, run: pathlib.Path, policy: str) -> list[pathlib.Path]:
    """What stage 6 wrote to <run-dir>/validation about `policy`, a file a task. Raises UserError where it did not."""
    if pathlib.Path(policy).is_absolute():
        raise UserError(f"{policy} needs a measured accuracy, and stage 6 measures what is in {run}: have the checkpoints there")
    found = sorted((run / "validation" / policy.replace("/", "__")).glob("*.json"))
    if not found:
        where = [*(["--config", cfg.config] if cfg.config else []), "--run-dir", cfg.run_dir]
        pattern = str(pathlib.PurePath(policy).with_name("*"))
        line = ["python", "06_eval.py", *where, "--policies", pattern, "--test-data", *cfg.validation_data, "--output", "validation"]
        raise UserError(f"{policy} has no measured accuracy in {run / 'validation'}: run {shlex.join(line)}")
    return found


MEASURED = {"accuracy": float, "data": str, "settings": dict}  # of stage 6's results


def find_accuracies(cfg: ExtrapolateConfig, run: pathlib.Path, trajectory: rank1.Trajectory):
    """Accuracy of each checkpoint, the plain mean of several tasks, from results that were all made alike."""
    names = [run_dir.within(path, run) for path in delta_files.checkpoint_paths(run).values()]
    files = {name: validation_results(cfg, run, name) for name in names}
    rows = {name: [inputs.read_json(path, "06_eval.py", MEASURED) for path in paths] for name, paths in files.items()}
    made = {name: [(path.stem, row["data"], row["settings"]) for path, row in zip(files[name], rows[name], strict=True)] for name in names}
    for name in names:
        if made[name] != made[names[0]]:
            raise UserError(f"{run}/validation: {name} was measured otherwise than {names[0]} (problems or options): measure all alike")
    means = [sum(row["accuracy"] for row in rows[name]) / len(rows[name]) for name in names]
    return [path for name in names for path in files[name]], lambda: torch.tensor(means, dtype=torch.float64)


def find_measure(cfg: ExtrapolateConfig, run: pathlib.Path, trajectory: rank1.Trajectory):
    """A function from an adapter to its accuracy: stage 6 on the validation problems, as it measured the checkpoints."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("greedy-soup measures its candidates as it goes: start stage 4 on one process")
    last = delta_files.checkpoint_paths(run)[trajectory.steps[-1]]
    stage6, numbers = importlib.import_module("06_eval"), iter(range(1, len(trajectory.steps)))
    before = [inputs.read_json(path, "06_eval.py", MEASURED) for path in validation_results(cfg, run, run_dir.within(last, run))]
    settings, problems = before[0]["settings"], [row["data"] for row in before]

    def measure(adapter: adapters.Adapter) -> float:
        name = f"validation/candidate_{next(numbers):02d}"  # with one name each, an interrupted run finds those measured already
        adapters.write_adapter(run / name, adapter, adapters.read_info(last))
        flags = ["--config", cfg.config] if cfg.config else []
        flags += ["--run-dir", cfg.run_dir, "--threads", str(cfg.threads), "--policies", name, "--output", "validation"]
        named = adapters.read_info(last).get("backbone")
        flags += ["--backbone", named] if named else []
        wanted = configs.parse(stage6.EvalConfig, "eval", "", [*flags, "--test-data", *cfg.validation_data])
        source = f"{run}/validation, settings"  # a file's, so: known keys of the right kinds, and none that says where
        if not settings.keys() <= stage6.settings_of(wanted).keys():
            raise UserError(f"{source}: unknown {', '.join(sorted(settings.keys() - stage6.settings_of(wanted).keys()))}: measure again")
        configs.preset_values(stage6.EvalConfig, {"eval": settings}, ("eval",), source)
        stage6.run_eval(dataclasses.replace(wanted, **settings))
        run_dir.remove(run / name)
        found = validation_results(cfg, run, name)
        rows = [inputs.read_json(path, "06_eval.py", MEASURED) for path in found]
        if [row["data"] for row in rows] != problems:
            raise UserError(f"{run}/validation has results on other problems than --validation-data {shlex.join(cfg.validation_data)}")
        return sum(row["accuracy"] for row in rows) / len(rows)

    return [], lambda: measure


FINDERS = {
    "future": find_future,
    "series": find_series,
    "over_time": find_over_time,
    "accuracies": find_accuracies,
    "measure": find_measure,
}


@dataclasses.dataclass
class Variant:
    """One of the things to make: a method, and what it takes."""

    name: str  # of its folder, before "_alpha1.5"
    method: str
    files: list[pathlib.Path]  # that it is made from, beside the last checkpoint and the deltas
    needs: dict[str, Callable]  # parameter -> a function that gets it
    options: dict  # parameter -> value: those that are options of this stage


def find_needs(cfg: ExtrapolateConfig, run: pathlib.Path, trajectory: rank1.Trajectory, method: str) -> Variant:
    """What `method` asks for. Raises UserError where it is not there, or nothing here gives it."""
    found, options = Variant(method, method, [], {}, {}), {field.name for field in dataclasses.fields(cfg)}
    for need in extrapolators.asks_for(method):
        if need in FINDERS:
            files, found.needs[need] = FINDERS[need](cfg, run, trajectory)
            found.files += [path for path in files if path not in found.files]
        elif need in options:
            found.options[need] = getattr(cfg, need)
        elif need not in ("last", "trajectory", "alpha", "delta", "module"):
            raise UserError(f"method {method} asks for '{need}', which stage 4 does not have; common/baselines/methods.py lists what it has")
    return found


def variants(cfg: ExtrapolateConfig, run: pathlib.Path, trajectory: rank1.Trajectory) -> list[Variant]:
    """What to make: each method once, `next` once for each recipe."""
    found, full = [], delta_files.kind_of(run) == "full"
    for method in cfg.methods:
        if method == "next":
            for recipe in cfg.recipes:
                folder, (base, last) = run / "predictor" / recipe, predictor.split_name(recipe)
                if base not in predictor.RECIPES:
                    raise UserError(f"unknown recipe '{recipe}'; {configs.nearest(base, predictor.RECIPES)}")
                known, how = trajectory.last(last or len(trajectory.steps)), predictor.RECIPES[base]
                predicted = predictor.predict(load_predictors(folder, trajectory, how), known, how)
                found.append(Variant(f"next-{recipe}", method, [folder / "model.safetensors"], {"predicted": lambda p=predicted: p}, {}))
        elif full and method in NO_RANK_1:
            reason = f"{method} {NO_RANK_1[method]}: on whole models it is no adapter of rank 1 on the last of them"
            raise UserError(f"{reason}; leave it out of --methods")
        elif full and method == "none":  # PEFT has no rank 0: at alpha 0 any rank 1 is zero
            found.append(Variant(method, "repeat-last", [], {}, {}))
        elif full and method == "oracle":
            files, triples = find_future(cfg, run, trajectory)
            found.append(Variant(method, "next", files, {"predicted": triples}, {}))
        else:
            if method == "wsm" and cfg.wsm_checkpoints > len(trajectory.steps):
                raise UserError(f"--wsm-checkpoints {cfg.wsm_checkpoints}: there are only {len(trajectory.steps)}")
            found.append(find_needs(cfg, run, trajectory, method))
            found[-1].name += f"_p{cfg.dare_drop:g}" if method == "dare" else ""
    return found


# ---------------------------------------------------------------------------------------------------------------------------
# Whole models, and the stage
# ---------------------------------------------------------------------------------------------------------------------------


def backbone_of(folder: pathlib.Path) -> str:
    """The backbone of the adapter in `folder`, as it is written there."""
    backbone = adapters.read_info(folder).get("backbone")
    if not backbone:
        raise UserError(f"{folder} does not say what its backbone is: set base_model_name_or_path in its adapter_config.json")
    return backbone


def write_merged(cfg: ExtrapolateConfig, run: pathlib.Path, name: str) -> None:
    """Merges <run-dir>/extrapolated/<name> into its backbone in <run-dir>/merged/<name>, unless just that is there."""
    source, out = run / "extrapolated" / name, run / "merged" / name
    backbone = backbone_of(source)
    record = {"backbone": backbone, "dtype": cfg.merge, "adapter": inputs.sha256(source / "adapter_model.safetensors")}
    there = (out / "merge.json").is_file() and not cfg.overwrite
    if there and record.items() <= inputs.read_json(out / "merge.json", "04_extrapolate.py --overwrite").items():
        run_dir.tidy(out)
        return
    run_dir.claim(out)
    lost = merge.merge(out, adapters.read_adapter(source), model_files.find_model(cfg.path(backbone)), cfg.merge == "fp32", record)
    warn_of_rounding(out, lost)


def warn_of_rounding(out: pathlib.Path, lost: dict[str, float]) -> None:
    rounded = sorted({*model_files.open_model(out).dtypes.values()} & {"BF16", "F16"})
    if rounded:
        print(
            f"warning: {out} is in {', '.join(rounded)}: rounding leaves {lost['entries_lost']:.1%} of the entries that the adapter "
            f"changes as they were, and loses {lost['norm_lost']:.1%} of the norm of its update; --merge fp32 loses nothing",
            file=sys.stderr,
        )


def make(cfg: ExtrapolateConfig, folder: pathlib.Path, method: str, given: dict, info: dict, began: float) -> None:
    """Writes what `method` makes of `given` to `folder`: an adapter, or a whole model where it changes the update itself."""
    run_dir.claim(folder)
    call = functools.partial(extrapolators.METHODS[method], **{key: given[key] for key in extrapolators.asks_for(method) if key in given})
    if is_whole(method):
        last = given["last"]

        def change(module):
            b, a = last.factors[module]
            return call(last.scale(module) * (b @ a), module)

        warn_of_rounding(folder, merge.merge(folder, last, given["backbone"], cfg.merge != "backbone", {}, change))
        run_dir.write_json(folder / "checkpoint.json", {**info, "seconds": round(time.perf_counter() - began, 3)})
    else:
        adapters.write_adapter(folder, call(), {**info, "seconds": round(time.perf_counter() - began, 3)})


def is_whole(method: str) -> bool:
    return "delta" in extrapolators.asks_for(method)


def main() -> None:
    cfg = configs.parse(ExtrapolateConfig, "extrapolate", __doc__)
    run = pathlib.Path(cfg.run_dir)
    inputs.read_json(run / "deltas" / "done.json", "02_extract_deltas.py")
    trajectory = delta_files.load_trajectory(run / "deltas")
    step = trajectory.steps[-1]
    checkpoint = delta_files.checkpoint_paths(run)[step]
    aligned, sources = trajectory.aligned(), [run / "deltas" / "rank1.safetensors"]
    if delta_files.kind_of(run) == "full":
        last = dense.empty_adapter(checkpoint, list(trajectory.deltas))
        base = {"step": step, "backbone": run_dir.within(checkpoint, run, "{run_dir}")}
    else:
        last = adapters.read_adapter(checkpoint)
        base = {"step": step, **adapters.read_info(checkpoint)}
        sources.append(checkpoint / "adapter_model.safetensors")
    began, made, kept, written_to = time.perf_counter(), 0, 0, set()
    for variant in variants(cfg, run, trajectory):
        hashes = {run_dir.within(path, run): inputs.sha256(path) for path in dict.fromkeys([*sources, *variant.files])}
        given, whole = {"last": last, "trajectory": aligned, **variant.options}, is_whole(variant.method)
        if whole:
            given["backbone"] = model_files.find_model(cfg.path(backbone_of(checkpoint)))
        has_alpha = "alpha" in extrapolators.asks_for(variant.method) and variant.name != "none"
        for alpha in cfg.alphas if has_alpha else [0.0]:
            folder = run / ("merged" if whole else "extrapolated") / (f"{variant.name}_alpha{alpha:g}" if has_alpha else variant.name)
            info = {**base, "method": variant.name, "alpha": alpha, **variant.options, "inputs": hashes}
            info |= {"dtype": cfg.merge or "fp32"} if whole else {}
            before = {}
            if (folder / "checkpoint.json").is_file() and not cfg.overwrite:
                before = inputs.read_json(folder / "checkpoint.json", "04_extrapolate.py --overwrite")
            own = {"seconds": None}  # of what was written, not of what it was made from
            if before | own == info | own and run_dir.is_complete(folder):
                run_dir.tidy(folder)
                kept += 1
            else:
                given |= {need: get() for need, get in variant.needs.items() if need not in given}  # once for all alphas
                make(cfg, folder, variant.method, {**given, "alpha": alpha}, info, began)
                made += 1
            if cfg.merge and not whole:
                write_merged(cfg, run, folder.name)
            run_dir.release()
            written_to.add(str(folder.parent))
            began = time.perf_counter()
    print(f"done: {made} made from step {step}, {kept} were there already, in {' and '.join(sorted(written_to))}")


if __name__ == "__main__":
    configs.run_stage(main, one_process=True)
