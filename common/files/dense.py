"""Checkpoints of all parameters (the paper's "w/o LoRA"): rank-1 deltas of whole matrices, read one at a time.

A delta is then the fp32 difference of two stored matrices and has no thin factors. Its leading singular values come from subspace
iteration with a block of a few more columns than are wanted. Of each delta the first 64 singular values are kept: energy ratios over
these can be compared with a LoRA's of rank 64.
"""

import dataclasses
import pathlib
import sys

import torch

from common import UserError, rank1
from common.files.adapters import Adapter
from common.files.models import ModelFolder, find_model, open_intact, open_model
from common.files.read import first_line
from common.files.series import check_spacing

KEEP = 64  # singular values of a delta that are looked at
SPARE = 8  # columns of the block beside these, which speed up the last ones
TOLERANCE = 1e-5  # of the leading pair's residual, in units of sigma_1
ROUNDS = 60


def leading_of_dense(delta: torch.Tensor, keep: int = KEEP, tolerance: float = TOLERANCE, rounds: int = ROUNDS):
    """The leading singular triple of `delta` [m, n] in fp32: (u [m], sigma [min(keep, m, n)] descending, v [n], residual).

    Block power iteration (Halko, Martinsson & Tropp 2011, Sec. 4.4; Rayleigh-Ritz in each round) from a seeded start, so it repeats
    exactly. It ends when residual = max(|D v - sigma_1 u|, |D^T u - sigma_1 v|) / sigma_1 is below `tolerance`, or after `rounds`
    rounds with what it is by then. What the residual bounds: a singular value of D lies within residual * sigma_1 of sigma_1, and the
    sine of the angle to its direction is at most residual * sigma_1 / (distance of sigma_1 to the other singular values). That it is the
    largest one is what the random start makes all but certain. The other sigmas are Ritz values, at most the true ones: the last few of 64
    may be a tenth low, an energy ratio over them is within 1% (tests). A near tie of sigma_1 and sigma_2 costs no rounds: both are in
    the block.

    Cost: a round is two products of D with keep + 8 columns; the error falls by (sigma_(keep+9) / sigma_1)^2 each. A matrix with no more
    rows or columns than the block needs two rounds. A zero matrix has zeros for its directions.
    """
    m, n = delta.shape
    delta, width = delta.float(), min(keep + SPARE, m, n)
    generator = torch.Generator().manual_seed(0)
    right = torch.linalg.qr(torch.randn(n, width, generator=generator))[0].to(delta.device)
    u, sigma, residual = torch.zeros(m, device=delta.device), torch.zeros(width, device=delta.device), float("inf")
    if not delta.any():
        return u, sigma[:keep], torch.zeros(n, device=delta.device), 0.0
    for done in range(rounds + 1):
        image = delta @ right  # [m, width]; its first column is D v of the round before
        if done:
            back = torch.linalg.vector_norm(delta.mT @ u - sigma[0] * right[:, 0])
            residual = float(torch.maximum(torch.linalg.vector_norm(image[:, 0] - sigma[0] * u), back) / sigma[0])
            if residual < tolerance or done == rounds:
                break
        left = torch.linalg.qr(image)[0]
        basis, core = torch.linalg.qr(delta.mT @ left)  # D is left (basis core)^T, as far as it lies in the block
        x, sigma, yh = torch.linalg.svd(core.mT)
        u, right = left @ x[:, 0], basis @ yh.mT
    return u, sigma[:keep], right[:, 0], residual


def dense_trajectory(start: torch.Tensor, checkpoints, k: int):
    """Every delta of one matrix, as `rank1.rank1_trajectory` returns them, the last the number whose residual stayed above `TOLERANCE`.

    start [m, n] is the backbone's; `checkpoints` yields [m, n] in order, and k + 1 of them are held at a time, as they are stored.
    """

    def leading(now: torch.Tensor, before: torch.Tensor | None):
        u, sigma, v, residual = leading_of_dense(now.float() - (start if before is None else before).float())
        return u, sigma.double(), v, residual >= TOLERANCE

    return rank1.each_delta(checkpoints, k, leading)


# ---------------------------------------------------------------------------------------------------------------------------
# A series of models
# ---------------------------------------------------------------------------------------------------------------------------


def linear_layers(model: ModelFolder) -> list[str]:
    """The names of the linear layers but the head, those that a LoRA on "all-linear" would have. Builds the model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=False)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises on a config.json that is not what it expects
        raise UserError(f"cannot build the model of {model.path}: {first_line(error)}") from error
    head = built.get_output_embeddings()
    layers = [name for name, layer in built.named_modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    found = [name for name in layers if f"{name}.weight" in model.shapes]
    if not found:
        raise UserError(f"{model.path} has no linear layers under the names that transformers gives them")
    return sorted(found)


@dataclasses.dataclass
class DenseSeries:
    """A run's whole models by step, checked to be one trajectory; what `adapter_series.Series` is for LoRA. Tensors stay on the disk."""

    paths: dict[int, pathlib.Path]
    models: dict[int, ModelFolder]  # by step; that of step 0 is the backbone
    shapes: dict[str, tuple[int, ...]]  # module -> (m, n)
    dtypes: set[str]  # of the weights: F32, BF16 ...
    others: list[str]  # tensors that take no part

    kind = "full"

    @property
    def steps(self) -> list[int]:
        return list(self.paths)

    def weight(self, module: str, step: int) -> torch.Tensor:
        """W [m, n] of `module` at `step` as it is stored. Reads this tensor and nothing else."""
        weight = self.models[step].tensor(f"{module}.weight")
        if not weight.isfinite().all():
            raise UserError(
                f"{self.models[step].path}: {module} is not finite: the training diverged; leave this checkpoint out (--last-step)"
            )
        return weight

    def trajectory(self, module: str, k: int):
        """All deltas of `module`, see `dense_trajectory`."""
        return dense_trajectory(self.weight(module, 0), (self.weight(module, step) for step in self.steps), k)

    def files(self) -> dict[str, pathlib.Path]:
        """What the deltas are made from, by a name that does not depend on where it is."""
        return {f"step_{step:04d}/{path.name}": path for step, model in self.models.items() for path in sorted({*model.files.values()})}

    def settings(self) -> dict[str, str]:
        """What the deltas depend on beside the files' tensors: nothing."""
        return {}

    def warn_of_rounding(self, k: int) -> None:
        """Says on stderr how much of the deltas the checkpoints' own dtype leaves at zero, if it has 16 bits."""
        last = self.steps[-1]
        for name in sorted(self.dtypes & {"BF16", "F16"}):
            same = [[], []]
            for module in self.shapes:
                now = self.weight(module, last)
                for found, step in zip(same, (self.steps[-2], self.steps[-1 - k]), strict=True):
                    found.append((now == self.weight(module, step)).double().mean())
            shares = [torch.stack(found).median() for found in same]
            print(
                f"warning: weights in {name}. {shares[0]:.1%} of the entries of the last local delta and {shares[1]:.1%} of the last "
                f"target's are exactly 0 (median of {len(self.shapes)} matrices). If that is rounding on saving, save in fp32",
                file=sys.stderr,
            )


def open_series(paths: dict[int, pathlib.Path], backbone: str) -> DenseSeries:
    """The models in `paths`, step -> folder in order, and the folder or hub id `backbone` as one series. Hashes every file, reads headers.

    Raises UserError where they are not evenly spaced, or one is broken, not what was written, or has other shapes than the backbone.
    """
    if not backbone:
        raise UserError("these checkpoints are whole models: name the one that training started from with --backbone")
    check_spacing(list(paths))
    models = {0: open_intact(find_model(backbone))}
    modules = linear_layers(models[0])
    names = [f"{module}.weight" for module in modules]
    shapes = {module: models[0].shapes[name] for module, name in zip(modules, names, strict=True)}
    for step, path in paths.items():
        models[step] = open_intact(path)
        for module, shape in shapes.items():
            found = models[step].shapes.get(f"{module}.weight")
            if found != shape:
                raise UserError(f"{path} has {module}.weight as {found}, the backbone {backbone} as {shape}: not one training")
    dtypes = {model.dtypes[name] for model in models.values() for name in names}
    if not dtypes <= {"F64", "F32", "BF16", "F16"}:
        raise UserError(f"quantised weights ({', '.join(sorted(dtypes))}) in {backbone} or {next(iter(paths.values())).parent}")
    return DenseSeries(paths, models, shapes, dtypes, sorted(models[0].shapes.keys() - {*names}))


# ---------------------------------------------------------------------------------------------------------------------------
# What stages 3 and 4 need of two whole models
# ---------------------------------------------------------------------------------------------------------------------------


def difference(now: ModelFolder, before: ModelFolder, module: str) -> torch.Tensor:
    """W(now) - W(before) of `module` [m, n] in fp32."""
    return now.tensor(f"{module}.weight").float() - before.tensor(f"{module}.weight").float()


def empty_adapter(folder: pathlib.Path, modules: list[str]) -> Adapter:
    """An adapter of rank 0 on `modules` of the model in `folder`: what a jump from a whole model adds its rank to."""
    model = open_model(folder)
    factors = {}
    for module in modules:
        m, n = model.shapes[f"{module}.weight"]
        factors[module] = (torch.zeros(m, 0), torch.zeros(0, n))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 0, "lora_alpha": 0, "target_modules": modules, "bias": "none"}
    return Adapter({**config, "base_model_name_or_path": str(folder.resolve())}, factors)
