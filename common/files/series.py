"""A series of checkpoints: their folders by step, and a run's adapters checked to be one trajectory. The tensors stay on the disk."""

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import re
import sys

import torch

from common import UserError, rank1
from common.files.adapters import is_adapter, module_scale, read_factors, read_header, read_info
from common.files.models import is_model
from common.files.read import check_intact

ROUNDED = {"BF16": torch.bfloat16, "F16": torch.float16}  # dtypes in which a step of RL is near the rounding, by safetensors' names


def step_of(path: pathlib.Path) -> int | None:
    """The last number in the last component of `path` that has one: checkpoint-20, step_0020, global_step_20/actor/lora_adapter."""
    for part in reversed(path.parts):
        if numbers := re.findall(r"\d+", part):
            return int(numbers[-1])
    return None


def find_checkpoints(patterns: list[str], run: pathlib.Path) -> dict[int, pathlib.Path]:
    """The folders that match any of `patterns` (with * and ~; {run_dir} is `run`) by step, in order.

    Each must hold an adapter, or else a whole model (config.json and safetensors).
    """
    found, seen = {}, set()
    for pattern in patterns:
        names = glob.glob(os.path.expanduser(pattern.replace("{run_dir}", glob.escape(str(run)))))
        for path in (path for path in map(pathlib.Path, sorted(names)) if path.is_dir() and path not in seen):
            seen.add(path)
            if not is_adapter(path) and not is_model(path):
                raise UserError(f"{path} has no adapter_config.json: name the adapters alone (verl's are global_step_*/actor/lora_adapter)")
            step = step_of(path)
            if step is None:
                raise UserError(f"no step in the name {path}: want checkpoint-20, step_20, global_step_20/actor/lora_adapter")
            if step in found:
                raise UserError(f"{found[step]} and {path} are both of step {step}: name one series alone")
            found[step] = path
    return dict(sorted(found.items()))


@dataclasses.dataclass
class Series:
    """A run's adapters by step, checked to be one trajectory. The tensors stay on the disk."""

    paths: dict[int, pathlib.Path]
    config: dict
    shapes: dict[str, tuple[int, int, int]]  # module -> (m, r, n)
    scales: dict[str, float]  # module -> s
    dtypes: set[str]  # of the factors: F32, BF16 ...
    others: list[str]  # keys of the tensors that are no factors and take no part

    kind = "lora"

    @property
    def steps(self) -> list[int]:
        return list(self.paths)

    def factors(self, module: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B [m, r], A [r, n]) of `module` at `step` in fp32. Reads these two tensors and nothing else."""
        b, a = read_factors(self.paths[step], module)
        if not (b.isfinite().all() and a.isfinite().all()):
            raise UserError(f"{self.paths[step]}: {module} is not finite: the training diverged; leave this checkpoint out (--last-step)")
        return b, a

    def trajectory(self, module: str, k: int):
        """All deltas of `module`, see `rank1.rank1_trajectory`."""
        return rank1.rank1_trajectory((self.factors(module, step) for step in self.steps), k, self.scales[module])

    def files(self) -> dict[str, pathlib.Path]:
        """What the deltas are made from, by a name that does not depend on where it is."""
        return {f"step_{step:04d}": path / "adapter_model.safetensors" for step, path in self.paths.items()}

    def settings(self) -> dict[str, str]:
        """What the deltas depend on beside the files' tensors."""
        return {"scales": hashlib.sha256(json.dumps(self.scales, sort_keys=True).encode()).hexdigest()[:16]}

    def warn_of_rounding(self, k: int) -> None:
        """Says on stderr what part of the deltas is rounding, if factors are stored with 16 bits."""
        for name in sorted(self.dtypes & ROUNDED.keys()):
            last, shares = self.steps[-1], []
            for before in (self.steps[-2], self.steps[-1 - k]):
                pairs = [(self.factors(module, last), self.factors(module, before)) for module in self.shapes]
                shares.append(torch.tensor([rank1.rounding_share(now, then, ROUNDED[name]) for now, then in pairs]).median())
            print(
                f"warning: factors in {name}. If they were rounded on saving, that is {shares[0]:.1%} of the norm of the last local delta "
                f"and {shares[1]:.1%} of the last target (median of {len(self.shapes)} matrices): save them in fp32",
                file=sys.stderr,
            )


def check_spacing(steps: list[int]) -> None:
    """Raises UserError where `steps` are not evenly spaced from step 0 on (the backbone)."""
    if len({b - a for a, b in zip([0, *steps], steps, strict=False)}) > 1:
        raise UserError(f"checkpoints are not evenly spaced: {steps}, counted from step 0, the backbone; leave out what is in between")


def open_series(paths: dict[int, pathlib.Path]) -> Series:
    """The adapters in `paths`, step -> folder in order, as one series. Hashes every file, reads configs and headers.

    Raises UserError where they are not evenly spaced from step 0 on (the backbone), not all of one training, or not what was written.
    """
    steps, first, dtypes = list(paths), None, set()
    check_spacing(steps)
    for path in paths.values():
        header, info = read_header(path), read_info(path)
        check_intact(path)
        scales = {module: module_scale(header.config, module) for module in header.shapes}
        facts = {
            "use_rslora": bool(header.config.get("use_rslora")),
            "modules": set(header.shapes),
            "shapes or ranks": header.shapes,
            "scales": scales,
            "tensors beside the LoRA": header.others,
        }
        backbone = info.get("backbone_fingerprint") or header.config.get("base_model_name_or_path")  # a name may change with the folder
        first = first or (facts, backbone)
        if backbone != first[1]:
            raise UserError(f"{path} was trained on another backbone ({backbone}) than {paths[steps[0]]} ({first[1]})")
        for what, value in facts.items():
            if value != first[0][what]:
                raise UserError(f"{path} has other {what} than {paths[steps[0]]}: a series is one adapter, trained on")
        dtypes |= header.dtypes
    return Series(paths, header.config, header.shapes, scales, dtypes, header.others)
