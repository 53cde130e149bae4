"""A series of checkpoints as one trajectory: LoRA adapters or whole models, by one interface.

`Series.weights(module)` is the sequence W[0] (the backbone), W[1] ... W[c] that Eq. 6 speaks of:
`LowRank` for adapters, where W[0] is zero, dense tensors for whole models. Tensors stay on the disk
until they are asked for.
"""

import functools
import glob
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import torch

from common import UserError
from common.files import adapters, deltas, models
from common.files.read import check_intact, sha256
from common.files.stage import within
from common.rank1 import LowRank, inner

ROUNDED = {"BF16": torch.bfloat16, "F16": torch.float16}  # too coarse for a step of RL
FLOATS = {"F64", "F32", *ROUNDED}
DIVERGED = "is not finite: the training diverged; leave this checkpoint out (--last-step)"


class Weights(Sequence):
    """W[0] ... W[c] of one matrix, read when they are asked for; the last `keep` stay in memory."""

    def __init__(self, read: Callable[[int], LowRank | torch.Tensor], count: int, keep: int):
        self.read, self.count = functools.lru_cache(keep)(read), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self.count))]
        if not -self.count <= i < self.count:
            raise IndexError(i)
        return self.read(i % self.count)


class AdapterSeries:
    """LoRA adapters of one training."""

    backbone = ""  # is not needed

    def __init__(self, paths: dict[int, pathlib.Path]):
        """paths: step -> folder in order. Raises UserError where they are not one training's."""
        self.paths, self.steps, first = paths, list(paths), None
        check_spacing(self.steps)
        dtypes = set()
        for path in paths.values():
            header, info = adapters.read_header(path), adapters.read_info(path)
            check_intact(path)
            named = info.get("backbone_fingerprint") or header.config.get("base_model_name_or_path")
            facts = {
                "backbone": named,
                "modules": set(header.shapes),
                "shapes": header.shapes,
                "scales": {m: adapters.module_scale(header.config, m) for m in header.shapes},
                "others": header.others,
            }
            first, dtypes = first or facts, dtypes | header.dtypes
            for what, value in facts.items():
                if value != first[what]:
                    raise UserError(
                        f"{path} has another {what} than {paths[self.steps[0]]}: "
                        "a series is one adapter, trained on"
                    )
        self.modules, self.scales = list(first["shapes"]), first["scales"]
        self.shapes, self.dtypes, self.others = first["shapes"], dtypes, first["others"]

    def weights(self, module: str, keep: int | None = None) -> Weights:
        """W[0] ... W[c] of `module` as LowRank in float64, relative to the backbone."""
        m, _, n = self.shapes[module]

        def read(i: int) -> LowRank:
            if i == 0:
                return LowRank(torch.zeros(m, 0), torch.zeros(0, n))
            path = self.paths[self.steps[i - 1]]
            b, a = adapters.read_factors(path, module)
            if not (b.isfinite().all() and a.isfinite().all()):
                raise UserError(f"{path}: {module} {DIVERGED}")
            return LowRank(b.double(), a.double(), self.scales[module])

        return Weights(read, len(self.steps) + 1, keep)

    def last(self) -> adapters.Adapter:
        """What a jump adds its rank to: the last checkpoint's adapter."""
        return adapters.read_adapter(self.paths[self.steps[-1]])

    def base(self, module: str) -> LowRank:
        """What that adapter stands on: the backbone, zero here."""
        return self.weights(module)[0]

    def read(self, folder: pathlib.Path) -> Callable[[str], LowRank]:
        """A function module -> W of another checkpoint of this training."""
        return adapters.read_adapter(folder).update

    def info(self, run: pathlib.Path) -> dict:
        """What is known of the last checkpoint, the backbone that it stands on first of all."""
        return adapters.read_info(self.paths[self.steps[-1]])

    def hashes(self) -> dict[str, str]:
        """A hash of every file that the deltas are made from, and of the scales."""
        files = {f"step_{s:04d}": p / "adapter_model.safetensors" for s, p in self.paths.items()}
        return {**{name: sha256(path) for name, path in files.items()}, "scales": str(self.scales)}

    def warn(self, k: int) -> None:
        """Says on stderr what takes no part, and what share of the deltas is rounding to 16 bits."""
        warn_of_others(self.others, "modules_to_save, biases, embeddings")
        for name in sorted(self.dtypes & ROUNDED.keys()):
            shares = [[], []]
            for module in self.modules:
                W = self.weights(module)
                for found, before in zip(shares, (W[-2], W[-1 - k]), strict=True):
                    found.append(rounding_share(W[-1] - before, ROUNDED[name]))
            local, target = (torch.tensor(found).median() for found in shares)
            print(
                f"warning: factors in {name}. If they were rounded on saving, that is {local:.1%} of "
                f"the norm of the last local delta and {target:.1%} of the last target (median of "
                f"{len(self.modules)} matrices): save them in fp32",
                file=sys.stderr,
            )


def rounding_share(delta: LowRank, dtype: torch.dtype) -> float:
    """The expected norm of rounding in B A - B' A' over its norm, if the factors were rounded to
    `dtype`: errors independent and uniform over the spacing around each entry, to first order."""

    def variance(x: torch.Tensor) -> torch.Tensor:
        spacing = torch.finfo(dtype).eps * torch.exp2(torch.frexp(x).exponent.double() - 1)
        return torch.where(x == 0, 0.0, spacing.square() / 12)

    new, old = delta.terms  # (B - B') A and B' (A - A')
    noise = 0.0
    for b, a in ((new.left + old.left, new.right), (old.left, new.right - old.right)):
        noise += variance(b).sum(0) @ a.square().sum(1) + b.square().sum(0) @ variance(a).sum(1)
    size = inner(delta, delta) / new.weight**2
    return float((noise / max(size, 0.0)) ** 0.5) if size else float("inf")


class ModelSeries:
    """Whole models of one training, and the backbone that it started from."""

    def __init__(self, paths: dict[int, pathlib.Path], backbone: str, run_dir: str):
        """Raises UserError where they are not evenly spaced, broken, or not of one shape."""
        if not backbone:
            raise UserError("whole models: name the one that training started from with --backbone")
        check_spacing(list(paths))
        self.paths, self.steps, self.backbone = paths, list(paths), backbone
        start = models.find_model(backbone.replace("{run_dir}", run_dir))
        folders = [start, *paths.values()]
        self.models = [models.open_intact(folder) for folder in folders]
        self.modules = models.linear_layers(self.models[0])
        names = [f"{module}.weight" for module in self.modules]
        for model in self.models[1:]:
            for name in names:
                found, wanted = model.shapes.get(name), self.models[0].shapes[name]
                if found != wanted:
                    raise UserError(
                        f"{model.path} has {name} as {found}, the backbone {backbone} as {wanted}: "
                        "not one training"
                    )
        self.dtypes = {model.dtypes[name] for model in self.models for name in names}
        if not self.dtypes <= FLOATS:
            raise UserError(f"quantised weights ({', '.join(sorted(self.dtypes))}) cannot jump")
        self.others = sorted(self.models[0].shapes.keys() - {*names})

    def weights(self, module: str, keep: int | None = None) -> Weights:
        """W[0] ... W[c] of `module`, dense in fp32."""

        def read(i: int) -> torch.Tensor:
            weight = self.models[i].tensor(f"{module}.weight")
            if not weight.isfinite().all():
                raise UserError(f"{self.models[i].path}: {module} {DIVERGED}")
            return weight.float()

        return Weights(read, len(self.steps) + 1, keep)

    def last(self) -> adapters.Adapter:
        """What a jump adds its rank to: an adapter of rank 0 on the last model."""
        last = self.models[-1]
        shapes = {module: last.shapes[f"{module}.weight"] for module in self.modules}
        return adapters.empty_adapter(last.path, shapes)

    def base(self, module: str) -> torch.Tensor:
        """What that adapter stands on: the last model's own matrix."""
        return self.weights(module)[-1]

    def read(self, folder: pathlib.Path) -> Callable[[str], torch.Tensor]:
        """A function module -> W of another checkpoint of this training."""
        model = models.open_intact(folder)
        return lambda module: model.tensor(f"{module}.weight").float()

    def info(self, run: pathlib.Path) -> dict:
        """What the jump stands on: the last model."""
        return {"backbone": within(self.models[-1].path, run, "{run_dir}")}

    def hashes(self) -> dict[str, str]:
        """A hash of every file of weights that the deltas are made from."""
        return {
            f"step_{step:04d}/{path.name}": sha256(path)
            for step, model in zip([0, *self.steps], self.models, strict=True)
            for path in sorted({*model.files.values()})
        }

    def warn(self, k: int) -> None:
        """Says on stderr what takes no part, and what share of 16-bit weights did not move at all."""
        warn_of_others(self.others, "norms, biases, embeddings, head")
        for name in sorted(self.dtypes & ROUNDED.keys()):
            shares = [[], []]
            for module in self.modules:
                W = self.weights(module)
                for found, before in zip(shares, (W[-2], W[-1 - k]), strict=True):
                    found.append((W[-1] == before).double().mean())
            local, target = (torch.stack(found).median() for found in shares)
            print(
                f"warning: weights in {name}. {local:.1%} of the entries of the last local delta and "
                f"{target:.1%} of the last target's are exactly 0 (median of {len(self.modules)} "
                "matrices). If that is rounding on saving, save in fp32",
                file=sys.stderr,
            )


Series = AdapterSeries | ModelSeries


def open_series(paths: dict[int, pathlib.Path], backbone: str, run_dir: str) -> Series:
    """The checkpoints in `paths`, step -> folder in order. Reads headers and hashes, no tensor.

    backbone: of whole models, folder or hub id; without it the one that they name. {run_dir} in it
    stands for `run_dir`.
    """
    whole = [path for path in paths.values() if not adapters.is_adapter(path)]
    if not whole:
        return AdapterSeries(paths)
    if len(whole) < len(paths):
        raise UserError(f"{whole[0]} is a whole model, others are adapters: name one series alone")
    backbone = backbone or adapters.read_info(whole[0]).get("backbone", "")
    return ModelSeries(paths, backbone, run_dir)


def reopen(run: pathlib.Path) -> Series:
    """The checkpoints that the deltas of the run directory `run` were made from."""
    backbone = deltas.read_index(run / "deltas")["backbone"]
    return open_series(deltas.checkpoint_paths(run), backbone, str(run))


def warn_of_others(others: list[str], what: str) -> None:
    """Says on stderr which tensors stay as they were last."""
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        print(
            f"note: {others[0]}{more} take no part in the jump: {what} stay as they last were",
            file=sys.stderr,
        )


def check_spacing(steps: list[int]) -> None:
    """Raises UserError where `steps` are not n, 2n, 3n and so on: the backbone counts as step 0."""
    if len({b - a for a, b in zip([0, *steps], steps, strict=False)}) > 1:
        raise UserError(
            f"checkpoints are not evenly spaced: {steps}, counted from step 0, the backbone; "
            "leave out what is in between"
        )


def step_of(path: pathlib.Path) -> int | None:
    """The last number in the last part of `path` that has one: checkpoint-20, step_0020,
    global_step_20/actor/lora_adapter."""
    for part in reversed(path.parts):
        if numbers := re.findall(r"\d+", part):
            return int(numbers[-1])
    return None


def find_checkpoints(patterns: list[str], run: str) -> dict[int, pathlib.Path]:
    """The folders that match any of `patterns` by step, in order; {run_dir} stands for `run`.

    Raises UserError for a folder that is no checkpoint, has no step, or has one that is taken.
    """
    found, seen = {}, set()
    for pattern in patterns:
        where = os.path.expanduser(pattern.replace("{run_dir}", glob.escape(run)))
        for path in map(pathlib.Path, sorted(glob.glob(where))):
            if not path.is_dir() or path in seen:
                continue
            seen.add(path)
            if not adapters.is_adapter(path) and not models.is_model(path):
                raise UserError(
                    f"{path} has no adapter_config.json: name the adapters alone "
                    "(verl's are global_step_*/actor/lora_adapter)"
                )
            step = step_of(path)
            if step is None:
                raise UserError(f"no step in the name {path}: want checkpoint-20 or step_20")
            if step in found:
                raise UserError(f"{found[step]} and {path} are both of step {step}: name one series")
            found[step] = path
    return dict(sorted(found.items()))
