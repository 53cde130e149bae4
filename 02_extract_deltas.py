"""Stage 2: the trajectory as rank-1 deltas.            Paper: Sec. 3.2, 3.3, 4.1; Eq. 3, 5, 6, 7

    accelerate launch --quiet 02_extract_deltas.py --config demo --run-dir runs/demo
    python 02_extract_deltas.py --run-dir runs/mine --checkpoints '/my/outputs/checkpoint-*'

Reads   <run-dir>/train/step_0010 ... step_0150, or what --checkpoints names: LoRA adapters (ours,
        TRL's, verl's: whatever PEFT writes), or whole models with --backbone
Writes  <run-dir>/deltas/<matrix>.safetensors   u, sigma, v of its deltas, with the spectrum
        <run-dir>/deltas/index.json             steps, checkpoints, k, modules, backbone
        <run-dir>/deltas/spectrum.json          energy ratios (Fig. 2), R^2 of lines (Fig. 3)

Eq. 6 and 7 are `trajectory` in common/rank1.py. For a LoRA it is given W_i - W_0 = s B A as factors
in float64 (Eq. 5; the paper leaves out s = lora_alpha / r). Matrices without an adapter take no
part: their deltas are zero. An SVD does not decide the sign of (u, v); here it is as it came.
Stage 4 makes the signs consistent, and so does stage 3, except in the recipe `paper`.
"""

import concurrent.futures
import dataclasses
import datetime
import os
import pathlib

import safetensors.torch
import torch
from accelerate import PartialState

from common import UserError, rank1
from common.baselines import measures
from common.files import config, deltas, series, write
from common.files.config import option
from common.files.stage import Stage, progress, run_stage, within


@dataclasses.dataclass
class ExtractConfig(config.StageConfig):
    """Which checkpoints, and how far ahead the target is."""

    checkpoints: list[str] = option(["{run_dir}/train/step_*"], "folders, as a quoted pattern")
    backbone: str = option("", "whole models only: the one that training started from")
    k: int = option(5, "a target delta spans k checkpoints (paper: 5, that is 50 steps)")
    last_step: int = option(0, "leave out checkpoints after this step; 0 takes all (paper: 150)")
    fit_checkpoints: int = option(10, "checkpoints that Fig. 3's line is fitted on (paper: 10)")


def select(cfg: ExtractConfig) -> dict[int, pathlib.Path]:
    """The checkpoints to take, step -> folder. Raises UserError where they are too few."""
    where = ", ".join(cfg.path(pattern) for pattern in cfg.checkpoints)
    found = series.find_checkpoints(cfg.checkpoints, cfg.run_dir)
    if not found:
        raise UserError(
            f"no folder matches {where}: run 01_train_lora_grpo.py first, or say --checkpoints"
        )
    last = cfg.last_step or max(found)
    if last not in found:
        raise UserError(f"{where} has no step {last}: train on, or lower --last-step")
    paths = {step: path for step, path in found.items() if step <= last}
    if len(paths) < 4:
        raise UserError(f"{where}: {len(paths)} checkpoints are too few, at least 4 are needed")
    if not 1 <= cfg.k <= len(paths) - 2:
        raise UserError(f"{where}: {len(paths)} checkpoints allow k from 1 to {len(paths) - 2}")
    if not 2 <= cfg.fit_checkpoints <= len(paths) - 2:
        raise UserError(f"fit_checkpoints must be 2 to {len(paths) - 2}: two are left to score on")
    return paths


def main() -> None:
    cfg = config.parse(ExtractConfig, "extract", __doc__)
    # All work is on CPUs. The processes wait for the slowest: a day, if need be.
    state = PartialState(cpu=True, timeout=datetime.timedelta(days=1))
    run = pathlib.Path(cfg.run_dir)
    found = series.open_series(select(cfg), cfg.backbone, cfg.run_dir)
    with state.main_process_first():
        inputs = {**found.hashes(), "steps": str(found.steps)}
        stage = Stage(run / "deltas", cfg, inputs, may_change=("backbone",))
    if stage.done:
        return
    if state.is_main_process:
        series.warn(found)

    # One matrix a thread: torch's own threads slow down matrices of this size.
    torch.set_num_threads(1)
    workers = cfg.threads or max(1, os.cpu_count() // state.num_processes)
    files = {m: stage.folder / f"{m}.safetensors" for m in found.modules}
    mine = found.modules[state.process_index :: state.num_processes]
    mine = [module for module in mine if not files[module].is_file()]
    with concurrent.futures.ThreadPoolExecutor(workers, "", torch.set_num_threads, (1,)) as pool:
        # Eq. 6, 7. W[i - k] is used again after 2 k others. So 2 k + 1 stay in memory, and each is
        # read once. Fewer --threads need less.
        k, keep = cfg.k, 2 * cfg.k + 1
        work = {m: pool.submit(rank1.trajectory, found.weights(m, keep), k) for m in mine}
        try:
            for module in progress(mine, "rank-1 SVDs", in_log=True):
                # Saved one by one, so that a killed run can go on from here.
                write.save_tensors(files[module], work.pop(module).result())
        finally:
            pool.shutdown(cancel_futures=True)
    state.wait_for_everyone()
    if not state.is_main_process:
        return

    paths = {step: within(path, run) for step, path in found.paths.items()}
    index = {"steps": found.steps, "checkpoints": paths, "k": cfg.k, "modules": found.modules}
    write.write_json(stage.folder / "index.json", {**index, "backbone": found.backbone})
    trajectory = deltas.load_trajectory(stage.folder)  # refuses a file that is broken
    spectra = {m: safetensors.torch.load_file(path)["spectrum"] for m, path in files.items()}
    if not any(sigma[-1, 0] > 0 for sigma in spectra.values()):
        raise UserError("no matrix has moved: every reward was the same, or the rate is 0")
    seen = measures.measure(trajectory, spectra, cfg.fit_checkpoints)
    write.write_json(stage.folder / "spectrum.json", seen)
    stage.finish()
    energy, below = seen["energy_ratio"], [row["held_out"] < 0 for row in seen["linear_fit"]]
    print(f"energy ratio E_1: {energy[0]:.3f} at first, {energy[-1]:.3f} at the last checkpoint")
    print(f"straight line: held-out R^2 < 0 for {sum(below)} of {len(below)} vectors")
    print(f"done: deltas of {len(spectra)} matrices at {len(paths)} checkpoints in {stage.folder}")


if __name__ == "__main__":
    run_stage(main)
