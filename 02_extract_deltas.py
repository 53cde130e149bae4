"""Stage 2: the trajectory as rank-1 deltas.                                       Paper: Sec. 3.2, 3.3, 4.1; Eq. 3, 5, 6, 7

    accelerate launch 02_extract_deltas.py --config demo --run-dir runs/demo
    accelerate launch 02_extract_deltas.py --run-dir runs/mine --checkpoints 'outputs/checkpoint-*'      # TRL's; any PEFT LoRA adapters
    accelerate launch 02_extract_deltas.py --run-dir runs/full --checkpoints 'outputs/checkpoint-*' --backbone Qwen/Qwen2.5-0.5B

Reads   <run-dir>/train/step_0010 ... step_0150    adapters or whole models, or those that --checkpoints names
Writes  <run-dir>/deltas/rank1.safetensors         u, sigma, v of the global, local and target delta of every matrix and checkpoint
        <run-dir>/deltas/index.json                kind (lora, full), steps and their checkpoints, k, modules, gaps sigma_2 / sigma_1
        <run-dir>/deltas/spectrum.json             energy ratios by step (Fig. 2), R^2 of linear fits (Fig. 3)

With LoRA everything comes from the factors B and A in float64 (`common/rank1.py`): no merged model, no m x n matrix, no bf16. k + 1
checkpoints of one matrix a thread are in memory at a time. The same command again goes on at the group of matrices it was at. Signs are
stored as LAPACK leaves them; `Trajectory.aligned` makes them consistent for whoever wants that. Only matrices with an adapter take part:
on the others every delta is exactly zero (the official code decomposes them all the same).

Of whole models (the paper's "w/o LoRA", `common/dense.py`) the linear layers but the head take part. A delta is an fp32 difference, its
leading pair comes from subspace iteration, and energy ratios are over the first 64 singular values. In memory are k + 2 whole matrices a
thread: fewer --threads need less.
"""

import concurrent.futures
import dataclasses
import datetime
import os
import pathlib
import sys

import safetensors.torch
import torch
from accelerate import PartialState
from tqdm import tqdm

from common import UserError, rank1
from common.files import adapters, dense
from common.files import config as configs
from common.files import deltas as delta_files
from common.files import read as inputs
from common.files import series as adapter_series
from common.files import write as run_dir

Series = adapter_series.Series | dense.DenseSeries
GROUP = 8  # matrices a file that a killed run need not do again


@dataclasses.dataclass
class ExtractConfig(configs.StageConfig):
    """Which checkpoints, and how far ahead the target is."""

    checkpoints: list[str] = dataclasses.field(
        default_factory=lambda: ["{run_dir}/train/step_*"],
        metadata={"help": "folders of PEFT LoRA adapters or whole models, as a quoted pattern; the last number in a name is its step"},
    )
    backbone: str = dataclasses.field(
        default="", metadata={"help": "for whole models: the one training started from, folder or hub id; ours name it"}
    )
    k: int = dataclasses.field(default=5, metadata={"help": "checkpoints between a step and its target (paper: 5, that is 50 steps)"})
    last_step: int = dataclasses.field(
        default=0, metadata={"help": "last step to take; later ones are left alone; 0 is the last there (paper: 150)"}
    )
    fit_checkpoints: int = dataclasses.field(default=10, metadata={"help": "checkpoints the linear fit of Fig. 3 sees (paper: 10)"})

    def __post_init__(self):
        if self.k < 1:
            raise UserError(f"k must be at least 1, not {self.k}")


def select(cfg: ExtractConfig, run: pathlib.Path) -> dict[int, pathlib.Path]:
    """The checkpoints to take, by step: all that are there, or those up to `last_step`."""
    where, found = ", ".join(cfg.path(pattern) for pattern in cfg.checkpoints), adapter_series.find_checkpoints(cfg.checkpoints, run)
    if not found:
        raise UserError(f"no folder matches {where}: run 01_train_lora_grpo.py first, or name other checkpoints with --checkpoints")
    last = cfg.last_step or max(found)
    paths = {step: path for step, path in found.items() if step <= last}
    if last not in paths:
        ends = max(paths, default=0)
        raise UserError(f"{where} ends at step {ends}, before last_step = {last}: train on (01_train_lora_grpo.py), or lower last_step")
    if len(paths) < cfg.k + 2:
        raise UserError(
            f"{where} has {len(paths)} checkpoints up to step {last}; k = {cfg.k} needs at least {cfg.k + 2}: train on, or lower k"
        )
    return paths


def open_series(cfg: ExtractConfig, paths: dict[int, pathlib.Path]) -> Series:
    """The checkpoints in `paths` as a series of adapters, or of whole models on `cfg.backbone`."""
    wholes = [path for path in paths.values() if not adapters.is_adapter(path)]
    if not wholes:
        return adapter_series.open_series(paths)
    if len(wholes) < len(paths):
        raise UserError(f"{wholes[0]} is a whole model, others are adapters: name one series alone")
    cfg.backbone = cfg.backbone or adapters.read_info(wholes[0]).get("backbone", "")
    return dense.open_series(paths, cfg.path(cfg.backbone))


def warn(series: Series, k: int) -> None:
    """Says on stderr what of the checkpoints takes no part, and what it costs that they are rounded."""
    if series.others:
        more = f" and {len(series.others) - 1} more" if len(series.others) > 1 else ""
        what = "norms, biases, embeddings, head" if series.kind == "full" else "modules_to_save, biases, embeddings"
        print(f"note: {series.others[0]}{more} take no part in the jump: {what} stay as they last were", file=sys.stderr)
    series.warn_of_rounding(k)


def extract_matrix(series: Series, module: str, k: int) -> dict[str, torch.Tensor]:
    """All deltas of one matrix: "role.module.u|sigma|v" and "role.module.gap" (sigma_2 / sigma_1) [checkpoints, ...], "spectrum.module"
    [checkpoints, r] (of the global deltas), "hard.module" [1] (how many needed the exact way; of a whole model's, how many did not
    converge). It is read checkpoint by checkpoint.
    """
    triples, spectrum, gaps, hard = series.trajectory(module, k)
    found = {f"spectrum.{module}": spectrum, f"hard.{module}": torch.tensor([hard])}
    for role, t in triples.items():
        parts = {"u": t.u, "sigma": t.sigma, "v": t.v, "gap": gaps[role]}
        found |= {f"{role}.{module}.{part}": tensor for part, tensor in parts.items()}
    return found


def extract(series: Series, k: int, parts: pathlib.Path, pool: concurrent.futures.Executor, state: PartialState) -> None:
    """Leaves a folder in `parts` for every group of matrices, those of this process. What an interrupted run left there is kept."""
    modules, per_module = list(series.shapes), 3 * len(series.steps) - k
    groups = [modules[start : start + GROUP] for start in range(0, len(modules), GROUP)]
    paths = {i: parts / f"group_{i:04d}" for i in range(state.process_index, len(groups), state.num_processes)}
    work = {i: [pool.submit(extract_matrix, series, m, k) for m in groups[i]] for i, path in paths.items() if not path.is_dir()}
    todo = sum(len(groups[i]) for i in work) * per_module
    with tqdm(total=todo, desc="rank-1 SVDs", disable=None if state.is_main_process else True) as bar:  # None: shown on a terminal
        try:
            for i in list(work):
                made = {name: tensor for job in work.pop(i) for name, tensor in job.result().items()}
                with run_dir.atomic_dir(paths[i]) as group:  # with its hash beside it
                    run_dir.save_tensors(group / "rank1.safetensors", made)
                bar.update(len(groups[i]) * per_module)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else leaving the pool waits for all that is still to do
            raise


def collect(series: Series, k: int, folder: pathlib.Path, run: pathlib.Path) -> dict[str, torch.Tensor]:
    """Joins the groups into rank1.safetensors and index.json. Returns module -> singular values of its global deltas [checkpoints, r]."""
    tensors, modules = {}, list(series.shapes)
    for path in sorted((folder / "parts").glob("group_*")):
        with inputs.reading(path, "delete it and run 02_extract_deltas.py again"):
            inputs.check_intact(path)
            tensors |= safetensors.torch.load_file(path / "rank1.safetensors")
    if not any(tensors[f"global.{module}.sigma"][-1] > 0 for module in modules):
        raise UserError(f"no matrix has moved up to step {series.steps[-1]}: every reward was the same, or the learning rate is 0")
    triples = [f"{role}.{module}.{part}" for module in modules for role in rank1.ROLES for part in ("u", "sigma", "v")]
    run_dir.save_tensors(folder / "rank1.safetensors", {name: tensors[name] for name in triples})
    gaps = {role: {module: tensors[f"{role}.{module}.gap"].tolist() for module in modules} for role in rank1.ROLES}
    near_ties = sum(gap > 1 / 1.01 for by_module in gaps.values() for values in by_module.values() for gap in values)
    run_dir.write_json(
        folder / "index.json",
        {
            "kind": series.kind,
            "steps": series.steps,
            "checkpoints": {step: run_dir.within(path, run) for step, path in series.paths.items()},
            "k": k,
            "modules": modules,
            "sigma_2_over_sigma_1": gaps,
            "near_ties": near_ties,  # sigma_1 / sigma_2 < 1.01: which of the two directions comes first is a matter of noise
            {"lora": "exact_way_taken", "full": "not_converged"}[series.kind]: int(sum(tensors[f"hard.{m}"].item() for m in modules)),
        },
    )
    return {module: tensors[f"spectrum.{module}"] for module in modules}


def measure(trajectory: rank1.Trajectory, spectra: dict[str, torch.Tensor], fit: int) -> dict:
    """Fig. 2 and Fig. 3: means over matrices by step, and the R^2 of every vector; both signs' bookkeeping beside them."""
    all_sigma = torch.stack([rank1.energy_ratio(s) for s in spectra.values()])  # [modules, checkpoints]
    all_squared = torch.stack([rank1.energy_ratio(s, squared=True) for s in spectra.values()])
    aligned = trajectory.aligned()
    steps = torch.tensor(trajectory.steps)
    r2 = []
    for module, roles in aligned.deltas.items():
        for side in ("u", "v"):
            vector = roles["global"].sigma[:, None] * getattr(roles["global"], side)
            held_out, in_sample = rank1.linear_fit_r2(steps, vector, fit)
            r2.append({"module": module, "side": side, "held_out": held_out, "in_sample": in_sample})
    flips = {
        role: [
            bool((trajectory.deltas[m][role].u[i] * aligned.deltas[m][role].u[i]).sum() < 0)
            for m in aligned.deltas
            for i in range(len(aligned.deltas[m][role].u))
        ]
        for role in rank1.ROLES
    }
    return {
        "steps": trajectory.steps,
        "energy_ratio": all_sigma.nanmean(0).tolist(),
        "energy_ratio_squared": all_squared.nanmean(0).tolist(),
        "energy_ratio_by_module": {module: row.tolist() for module, row in zip(spectra, all_sigma, strict=True)},
        "linear_fit": r2,
        "share_of_signs_flipped_by_alignment": {role: sum(values) / len(values) for role, values in flips.items()},
    }


def main() -> None:
    cfg = configs.parse(ExtractConfig, "extract", __doc__)
    # the work is the CPUs', and the slowest process may need longer than the default ten minutes more than the others
    state = PartialState(cpu=True, timeout=datetime.timedelta(days=1))
    if state.num_processes > 1:
        state.print(f"{state.num_processes} processes")
    run = pathlib.Path(cfg.run_dir)
    folder = run / "deltas"
    series = open_series(cfg, select(cfg, run))
    count = len(series.steps)
    if not 2 <= cfg.fit_checkpoints <= count - 2:
        raise UserError(f"fit_checkpoints must leave at least 2 of the {count} checkpoints to score on, not {cfg.fit_checkpoints}")
    # Matrices this small are fastest one to a thread; in torch's own threads LAPACK is several times slower than in one.
    torch.set_num_threads(1)
    workers = cfg.threads or max(1, os.cpu_count() // state.num_processes)
    with concurrent.futures.ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        stage = run_dir.Stage(folder, configs.as_dict(cfg, leave_out=("backbone",) if series.kind == "lora" else ()), inputs=[])
        files = series.files()
        stage.record["inputs"] = dict(zip(files, pool.map(inputs.sha256, files.values()), strict=True)) | series.settings()
        with state.main_process_first():
            if stage.is_done(cfg.overwrite, writer=state.is_main_process):
                if state.is_main_process:
                    run_dir.remove(folder / "parts")  # there only where a kill came before the last line but three
                return
        if state.is_main_process:
            warn(series, cfg.k)
        extract(series, cfg.k, folder / "parts", pool, state)
    state.wait_for_everyone()
    if state.is_main_process:
        spectra = collect(series, cfg.k, folder, run)
        found = measure(delta_files.load_trajectory(folder), spectra, cfg.fit_checkpoints)
        run_dir.write_json(folder / "spectrum.json", found)
        stage.finish(decompositions=len(spectra) * (3 * count - cfg.k))
        run_dir.remove(folder / "parts")
        below = sum(row["held_out"] < 0 for row in found["linear_fit"]) / len(found["linear_fit"])
        energy, steps = found["energy_ratio"], found["steps"]
        print(f"energy ratio E_1: {energy[0]:.3f} at step {steps[0]}, {energy[-1]:.3f} at step {steps[-1]}")
        print(f"linear fit: {below:.0%} of {len(found['linear_fit'])} vectors have a held-out R^2 below 0")
        print(f"done: rank-1 deltas of {len(spectra)} matrices at {count} checkpoints in {folder}")


if __name__ == "__main__":
    configs.run_stage(main)
