"""A series of checkpoints as one trajectory: LoRA adapters or whole models, by one interface.

`Series.weights(module)` is the sequence W[0] (the backbone), W[1] ... W[c] that Eq. 6 speaks of:
`LowRank` for adapters, where W[0] is zero, dense tensors for whole models. Read when asked for.
"""

import concurrent.futures
import functools
import glob
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import torch

from common import UserError
from common.files import adapters, deltas, models
from common.files.read import open_tensors, read_json, sha256, step_of
from common.files.stage import within
from common.rank1 import LowRank


class Weights(Sequence):
    """W[0] ... W[c] of one matrix, read when they are asked for; the last `keep` stay in memory."""

    def __init__(self, read: Callable[[int], LowRank | torch.Tensor], count: int, keep: int):
        self.read, self.range = functools.lru_cache(keep)(read), range(count)

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, i):
        at = self.range[i]  # an IndexError where there is none
        return [self.read(j) for j in at] if isinstance(i, slice) else self.read(at)


class Series:
    """The checkpoints of one training, evenly spaced: what its two kinds share."""

    backbone = ""  # what whole models stand on

    def __init__(self, paths: dict[int, pathlib.Path]):
        """paths: step -> folder in order."""
        self.paths, self.steps = paths, list(paths)
        # The backbone counts as step 0.
        if self.steps != [self.steps[0] * (i + 1) for i in range(len(paths))]:
            first = next((step for step in self.steps if step), 1)
            even = {*range(first, self.steps[-1] + 1, first)}
            odd = sorted(even ^ {*self.steps})[:5]
            what = f"step {', '.join(map(str, odd))} is missing, or between"
            raise UserError(f"checkpoints are not evenly spaced, counted from the backbone: {what}")

    def weights(self, module: str, keep: int | None = None) -> Weights:
        """W[0] ... W[c] of `module`."""
        return Weights(functools.partial(self._weight, module), len(self.steps) + 1, keep)


def _finite(where: str, *tensors: torch.Tensor) -> None:
    # One pass each, ten times as fast as isfinite().all(). fp32 cannot overflow a sum in float64.
    if not all(x.sum(dtype=torch.float64).isfinite() for x in tensors):
        raise UserError(f"{where} is not finite: training diverged; --last-step can end before it")


class AdapterSeries(Series):
    """LoRA adapters. W is a LowRank in float64, relative to the backbone."""

    base = 0  # `last()` stands on W[0]

    def __init__(self, paths: dict[int, pathlib.Path]):
        """Raises UserError where they are not one training's."""
        super().__init__(paths)
        first, dtypes = None, set()
        for path in paths.values():
            header, info = adapters.read_header(path), adapters.read_info(path)
            named = info.get("backbone_fingerprint") or header.config.get("base_model_name_or_path")
            facts = {
                "backbone": named,
                "shapes": header.shapes,
                "scales": {m: adapters.module_scale(header.config, m) for m in header.shapes},
                "other tensors": header.others,
            }
            first, dtypes = first or facts, dtypes | header.dtypes
            for what, value in facts.items():
                if value != first[what]:
                    raise UserError(f"{path} differs in its {what} from {paths[self.steps[0]]}")
        self.modules, self.scales = list(first["shapes"]), first["scales"]
        self.shapes, self.dtypes, self.others = first["shapes"], dtypes, first["other tensors"]

    def _weight(self, module: str, i: int) -> LowRank:
        m, _, n = self.shapes[module]
        if i == 0:
            return LowRank(torch.zeros(m, 0), torch.zeros(0, n))
        path = self.paths[self.steps[i - 1]]
        with open_tensors(path / adapters.WEIGHTS, adapters.ANOTHER) as file:
            b, a = adapters.factors(file, module)
        _finite(f"{path}: {module}", b, a)
        b = b.mT.contiguous().double().mT  # column by column in memory: faster products
        return LowRank(b, a.double(), self.scales[module])  # Eq. 5: s B A

    def last(self) -> adapters.Adapter:
        """What a jump adds its rank to: the last checkpoint's adapter."""
        return adapters.read_adapter(self.paths[self.steps[-1]])

    def info(self, run: pathlib.Path) -> dict:
        """What is known of the last checkpoint, the backbone that it stands on first of all."""
        return adapters.read_info(self.paths[self.steps[-1]])

    def hashes(self) -> dict[str, str]:
        """A hash of every file that the deltas are made from, and of the scales."""
        files = {f"step_{s:04d}": p / adapters.WEIGHTS for s, p in self.paths.items()}
        return {**hashed(files), "scales": str(self.scales)}


class ModelSeries(Series):
    """Whole models, and the backbone that they started from. W is dense in fp32."""

    base = -1  # `last()` stands on the last W

    def __init__(self, paths: dict[int, pathlib.Path], backbone: str, run_dir: str):
        """Raises UserError where they are broken, or not of one shape."""
        if not backbone:
            raise UserError("whole models: name the one that training started from with --backbone")
        super().__init__(paths)
        self.backbone, start = backbone, models.find_model(backbone.replace("{run_dir}", run_dir))
        self.models = [models.open_model(folder) for folder in (start, *paths.values())]
        self.modules = models.linear_layers(self.models[0])
        names, wanted = [f"{module}.weight" for module in self.modules], self.models[0].shapes
        for model in self.models:
            for name in names:
                if (found := model.shapes.get(name)) != wanted[name]:
                    raise UserError(f"{model.path} has {name} as {found}, not {wanted[name]}")
        dtypes = [{model.dtypes[name] for name in names} for model in self.models]
        self.dtypes = set().union(*dtypes[1:])  # a rounded backbone spoils no delta of fp32 models
        # Quantised weights that are read as floats would give deltas that mean nothing.
        if odd := set().union(*dtypes) - adapters.FLOATS:
            raise UserError(f"quantised weights ({', '.join(sorted(odd))}) cannot jump")
        self.others = sorted(wanted.keys() - {*names})

    def _weight(self, module: str, i: int) -> torch.Tensor:
        weight = self.models[i].tensor(f"{module}.weight")
        _finite(f"{self.models[i].path}: {module}", weight)
        return weight.float()

    def last(self) -> adapters.Adapter:
        """What a jump adds its rank to: an adapter of rank 0 on the last model."""
        factors, last = {}, self.models[-1]
        for module in self.modules:
            m, n = last.shapes[f"{module}.weight"]
            factors[module] = torch.zeros(m, 0), torch.zeros(0, n)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 0, "lora_alpha": 0}
        config |= {"target_modules": self.modules, "bias": "none"}
        config["base_model_name_or_path"] = str(last.path.resolve())
        return adapters.Adapter(config, factors)

    def info(self, run: pathlib.Path) -> dict:
        """What the jump stands on: the last model."""
        return {"backbone": within(self.models[-1].path, run, "{run_dir}")}

    def hashes(self) -> dict[str, str]:
        """A hash of every file of weights that the deltas are made from."""
        found = zip([0, *self.steps], self.models, strict=True)
        pairs = [(step, path) for step, model in found for path in {*model.files.values()}]
        return hashed({f"step_{step:04d}/{path.name}": path for step, path in sorted(pairs)})


def hashed(files: dict[str, pathlib.Path]) -> dict[str, str]:
    """Name -> hash. A file a thread: they have gigabytes."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(sha256, files.values()), strict=True))


def open_series(paths: dict[int, pathlib.Path], backbone: str, run_dir: str) -> Series:
    """The checkpoints in `paths`, step -> folder in order. Reads headers and hashes, no tensor.

    backbone: of whole models, folder or hub id; without it the one that they name.
    """
    if gone := [path for path in paths.values() if not path.is_dir()]:
        raise UserError(f"{gone[0]} is missing: put it back")
    whole = [path for path in paths.values() if not adapters.is_adapter(path)]
    if not whole:
        return AdapterSeries(paths)
    if len(whole) < len(paths):
        raise UserError(f"{whole[0]} is a whole model, others are adapters")
    backbone = backbone or adapters.read_info(whole[0]).get("backbone", "")
    return ModelSeries(paths, backbone, run_dir)


def reopen(run: pathlib.Path) -> Series:
    """The checkpoints that the deltas of the run directory `run` were made from. UserError where
    the last one has changed since then."""
    index, folder = deltas.read_index(run / "deltas"), run / "deltas"
    paths = {int(step): run / path for step, path in index["checkpoints"].items()}
    found, last = open_series(paths, index["backbone"], str(run)), max(paths)
    noted = read_json(folder / "done.json", deltas.STAGE, {"inputs": dict})["inputs"]
    for name, before in noted.items():
        step, _, file = name.partition("/")  # of an adapter there is no file
        path = paths[last] / (file or adapters.WEIGHTS)
        if step == f"step_{last:04d}" and (not path.is_file() or sha256(path) != before):
            raise UserError(f"{paths[last]} has changed: {deltas.AGAIN}")
    return found


def warn(series: Series) -> None:
    """Says on stderr what takes no part in a jump, and where rounding has spoilt the deltas."""
    if others := series.others:
        some = f"{len(others)} tensors take no part in the jump, for example {others[0]}"
        print(f"note: {some}", file=sys.stderr)
    if rounded := ", ".join(sorted(series.dtypes & {"BF16", "F16"})):
        print(f"warning: checkpoints in {rounded}: deltas hold its rounding", file=sys.stderr)


def find_checkpoints(patterns: list[str], run: str) -> dict[int, pathlib.Path]:
    """The folders that match any of `patterns` by step, in order; {run_dir} stands for `run`.

    Raises UserError for a folder that is no checkpoint, has no step, or has one that is taken.
    """
    found, paths = {}, {}
    for pattern in patterns:
        where = os.path.expanduser(pattern.replace("{run_dir}", glob.escape(run)))
        paths |= dict.fromkeys(map(pathlib.Path, sorted(glob.glob(where))))
    for path in filter(pathlib.Path.is_dir, paths):
        if not adapters.is_adapter(path) and not models.is_model(path):
            raise UserError(f"{path} has no adapter_config.json: name the adapters alone")
        if (step := step_of(path)) is None:
            raise UserError(f"no step in the name {path}: want checkpoint-20 or step_20")
        if step in found:
            raise UserError(f"{found[step]}, {path}: both are of step {step}: name one series")
        found[step] = path
    return dict(sorted(found.items()))
