"""Stage 2: the trajectory as rank-1 deltas.                                       Paper: Sec. 3.2, 3.3, 4.1; Eq. 3, 5, 6, 7

    accelerate launch 02_extract_deltas.py --config demo --run-dir runs/demo

Reads   <run-dir>/train/step_0010 ... step_0150    (LoRA adapters)
Writes  <run-dir>/deltas/rank1.safetensors         u, sigma, v of the global, local and target delta of every matrix and checkpoint
        <run-dir>/deltas/index.json                steps, k, modules, and the gap sigma_2 / sigma_1 of each global delta
        <run-dir>/deltas/spectrum.json             energy ratios by step (Fig. 2), R^2 of linear fits (Fig. 3)

Everything comes from the factors B and A in float64, exactly (`common/rank1.py`): no merged model, no m x n matrix, no bf16. Signs are
stored as LAPACK leaves them; `Trajectory.aligned` makes them consistent for whoever wants that. Only matrices with an adapter take
part: on the others every delta is exactly zero (the official code decomposes them all the same).
"""

import collections
import dataclasses
import pathlib

import torch
from tqdm import tqdm

from common import adapters, rank1, run_dir
from common import config as configs
from common.run_dir import UserError


@dataclasses.dataclass
class ExtractConfig(configs.StageConfig):
    """Which checkpoints, and how far ahead the target is."""

    k: int = dataclasses.field(default=5, metadata={"help": "checkpoints between a step and its target (paper: 5, that is 50 steps)"})
    last_step: int = dataclasses.field(default=150, metadata={"help": "last checkpoint to take; later ones are left alone (paper: 150)"})
    fit_checkpoints: int = dataclasses.field(default=10, metadata={"help": "checkpoints the linear fit of Fig. 3 sees (paper: 10)"})

    def __post_init__(self):
        if self.k < 1:
            raise UserError(f"k must be at least 1, not {self.k}")


def read_checkpoints(cfg: ExtractConfig, folder: pathlib.Path) -> dict[int, adapters.Adapter]:
    """The adapters up to `last_step`, checked to be one evenly spaced series on one backbone."""
    run_dir.read_json(folder / "config.json", "01_train_lora_grpo.py")
    paths = {step: path for step, path in adapters.checkpoints(folder).items() if step <= cfg.last_step}
    if len(paths) < cfg.k + 2:
        raise UserError(
            f"{folder} has {len(paths)} checkpoints up to step {cfg.last_step}; k = {cfg.k} needs at least {cfg.k + 2}: "
            "train on, or lower k"
        )
    steps = list(paths)
    if steps[-1] != cfg.last_step:
        raise UserError(
            f"{folder} ends at step {steps[-1]}, before last_step = {cfg.last_step}: run 01_train_lora_grpo.py on, or lower last_step"
        )
    if len({b - a for a, b in zip([0, *steps], steps, strict=False)}) > 1:
        raise UserError(f"checkpoints in {folder} are not evenly spaced: {steps}")
    series = {step: adapters.read_adapter(path) for step, path in paths.items()}
    first, bases = (
        series[steps[0]],
        {
            step: run_dir.read_json(path / "checkpoint.json", "01_train_lora_grpo.py").get("backbone_fingerprint")
            for step, path in paths.items()
        },
    )
    for step, adapter in series.items():
        if bases[step] != bases[steps[0]]:
            raise UserError(f"{paths[step]} was trained on another backbone than {paths[steps[0]]}")
        if {k: v[0].shape for k, v in adapter.factors.items()} != {
            k: v[0].shape for k, v in first.factors.items()
        } or adapter.scale != first.scale:
            raise UserError(f"{paths[step]} has other modules, ranks or scale than {paths[steps[0]]}")
    return series


def extract(series: dict[int, adapters.Adapter], k: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns (triples, spectra): tensors "role.module.u|sigma|v" [checkpoints, ...], and module -> singular values [checkpoints, r] of the
    global delta. Matrices of one shape go through QR and SVD as one batch.
    """
    points = list(series.values())
    by_shape = collections.defaultdict(list)
    for module, (b, a) in points[0].factors.items():
        by_shape[(b.shape[0], a.shape[1])].append(module)
    triples, spectra = {}, {}
    bar = tqdm(total=sum(map(len, by_shape.values())) * (3 * len(points) - k), desc="rank-1 SVDs", disable=None)
    for modules in by_shape.values():
        factors = [tuple(torch.stack([point.factors[m][half] for m in modules]).double() for half in (0, 1)) for point in points]
        pairs = {
            "global": [(now, None) for now in factors],
            "local": list(zip(factors, [None, *factors], strict=False)),
            "target": list(zip(factors[k:], factors, strict=False)),
        }
        for role in rank1.ROLES:
            rows = []
            for now, before in pairs[role]:
                rows.append(rank1.svd_of_product(*rank1.delta_factors(now, before, points[0].scale)))  # u [modules, m], ...
                bar.update(len(modules))
            for j, module in enumerate(modules):
                for part, index in (("u", 0), ("v", 2)):
                    triples[f"{role}.{module}.{part}"] = torch.stack([row[index][j] for row in rows])
                triples[f"{role}.{module}.sigma"] = torch.stack([row[1][j, 0] for row in rows])
                if role == "global":
                    spectra[module] = torch.stack([row[1][j] for row in rows])
    bar.close()
    return triples, spectra


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
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    train, folder = pathlib.Path(cfg.run_dir) / "train", pathlib.Path(cfg.run_dir) / "deltas"
    series = read_checkpoints(cfg, train)
    if not 2 <= cfg.fit_checkpoints <= len(series) - 2:
        raise UserError(f"fit_checkpoints must leave at least 2 of the {len(series)} checkpoints to score on, not {cfg.fit_checkpoints}")
    paths = adapters.checkpoints(train)
    stage = run_dir.Stage(folder, configs.as_dict(cfg), inputs=[])
    stage.record["inputs"] = {f"step_{step:04d}": run_dir.sha256(paths[step] / "adapter_model.safetensors") for step in series}
    if stage.is_done(cfg.overwrite):
        return
    triples, spectra = extract(series, cfg.k)
    run_dir.save_tensors(folder / "rank1.safetensors", triples)
    run_dir.write_json(
        folder / "index.json",
        {
            "steps": list(series),
            "k": cfg.k,
            "modules": list(spectra),
            "scale": next(iter(series.values())).scale,
            "sigma_2_over_sigma_1": {module: (s[:, 1] / s[:, 0]).tolist() if s.shape[1] > 1 else None for module, s in spectra.items()},
        },
    )
    found = measure(rank1.load_trajectory(folder), spectra, cfg.fit_checkpoints)
    run_dir.write_json(folder / "spectrum.json", found)
    stage.finish(decompositions=sum(len(t) for name, t in triples.items() if name.endswith("sigma")))
    below = sum(row["held_out"] < 0 for row in found["linear_fit"]) / len(found["linear_fit"])
    energy, steps = found["energy_ratio"], found["steps"]
    print(f"energy ratio E_1: {energy[0]:.3f} at step {steps[0]}, {energy[-1]:.3f} at step {steps[-1]}")
    print(f"linear fit: {below:.0%} of {len(found['linear_fit'])} vectors have a held-out R^2 below 0")
    print(f"done: rank-1 deltas of {len(spectra)} matrices at {len(series)} checkpoints in {folder}")


if __name__ == "__main__":
    configs.run_stage(main)
