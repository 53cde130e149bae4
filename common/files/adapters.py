"""LoRA adapters as files: read the factors, write new ones. No model is loaded for this, so it works at any model size.

Ours, TRL's and verl's checkpoints are all what PEFT writes: adapter_config.json beside adapter_model.safetensors. In general each module
has a rank and a scale of its own (rank_pattern, alpha_pattern, rsLoRA).
"""

import dataclasses
import json
import math
import pathlib
import re
import statistics

import safetensors
import safetensors.torch
import torch

from common import UserError
from common.files.read import check_intact, matches, read_json, reading
from common.files.write import atomic_dir, atomic_write_text, save_tensors, writing
from common.rank1 import LowRank

ANOTHER = "put a good copy there, leave this checkpoint out, or have the stage that wrote it make it again"
TRAINING = "the training that writes it (here: 01_train_lora_grpo.py)"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_EMBEDDING = re.compile(r"base_model\.model\.(.+)\.lora_embedding_A")
_OTHER_FORMULAS = (  # options of PEFT's LoRA with which a module is not W + s B A with one B and one A
    "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
    "target_parameters", "layer_replication",
    "megatron_config",  # with it PEFT imports a module that the file names
)  # fmt: skip
_KINDS = {
    "r": int,
    "lora_alpha": float,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "target_modules": list[str] | str | None,
    "exclude_modules": list[str] | str | None,
    "modules_to_save": list[str] | None,
    "layers_pattern": list[str] | str | None,
    "base_model_name_or_path": str | None,
}
INFO = {"step": int | None, "backbone": str | None, "backbone_fingerprint": str | None, "template_hash": str | None}  # of checkpoint.json
FLOATS = {"F64", "F32", "BF16", "F16"}
_BY_PATTERN = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
_OTHER_BACKBONES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the backbone's own weights


# ---------------------------------------------------------------------------------------------------------------------------
# Rank and scale of a module
# ---------------------------------------------------------------------------------------------------------------------------


def _by_pattern(pattern: dict | None, module: str, default: float) -> float:
    """What `pattern` (a regular expression for the end of a module's name -> value) says of `module`; the first that matches wins."""
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key  # PEFT's own rule; two seconds to import, for those who need it

    return pattern.get(get_pattern_key(pattern, module), default)


def module_rank(config: dict, module: str) -> int:
    """The rank that adapter_config.json gives to `module`."""
    return _by_pattern(config.get("rank_pattern"), module, config["r"])


def highest_rank(config: dict) -> int:
    """The highest rank that any module may have."""
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def module_scale(config: dict, module: str) -> float:
    """s = lora_alpha / r of `module`; with rsLoRA lora_alpha / sqrt(r); 1 where r is 0."""
    rank, alpha = module_rank(config, module), _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank else 1.0


def with_ranks(config: dict, ranks: dict[str, int], kept: list[str] = ()) -> dict:
    """`config` with a new rank for each module of `ranks`, and the old one for those `kept`; all at the scales they have.

    If one rank does for all, r and lora_alpha say it; else r is the most frequent one, and patterns name every module that differs. The
    initialisation is reset: the file's tensors replace it anyway, and not every kind of it works at every rank.
    """
    divisor = math.sqrt if config.get("use_rslora") else float
    ranks = ranks | {module: module_rank(config, module) for module in kept}
    alphas = {module: module_scale(config, module) * divisor(rank) for module, rank in ranks.items()}
    rank = statistics.mode(ranks.values())
    alpha = statistics.mode(alphas[module] for module in ranks if ranks[module] == rank)
    names = {module: f"^{re.escape(module)}" for module in ranks}  # the whole name; without ^ PEFT is content with its end
    patterns = {
        "rank_pattern": {names[module]: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {names[module]: value for module, value in alphas.items() if not math.isclose(value, alpha)},
    }
    new = {**config, "r": rank, "lora_alpha": alpha, "init_lora_weights": True}
    return new | {key: pattern for key, pattern in patterns.items() if pattern or config.get(key)}


# ---------------------------------------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Adapter:
    """A LoRA: factors[module] = (B [m, r], A [r, n]) in fp32; the update of a module's weight is scale(module) * B A."""

    config: dict  # adapter_config.json
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    others: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # what else the file holds (modules_to_save ...), by key

    def update(self, module: str) -> LowRank:
        """s B A of `module`, in float64."""
        b, a = self.factors[module]
        return LowRank(b.double(), a.double(), self.scale(module))

    def scale(self, module: str) -> float:
        """s of `module`, see `module_scale`."""
        return module_scale(self.config, module)


def is_adapter(folder: pathlib.Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _reading(path: pathlib.Path):
    return reading(path, ANOTHER)


def read_config(folder: pathlib.Path) -> dict:
    """adapter_config.json of the checkpoint in `folder`, refused if it is not a plain LoRA on the backbone as it is."""
    config = read_json(folder / "adapter_config.json", TRAINING)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} is not a plain LoRA (peft_type {config.get('peft_type')})")
    for option in _OTHER_FORMULAS:
        if config.get(option):
            raise UserError(f"{folder} is not a plain LoRA ({option}): its weights are not W + s B A, which the jump adds to")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_OTHER_BACKBONES):
        raise UserError(f"{folder} was initialised by {start}, which changes the backbone: convert it to a plain LoRA first (PEFT's docs)")
    for key, kind in _KINDS.items():
        if not matches(config.get(key), kind):
            raise UserError(f"{folder}/adapter_config.json has no usable {key}")
    ranks, alphas = ([config[key], *(config.get(pattern) or {}).values()] for key, pattern in _BY_PATTERN)
    if min(ranks) < 1 or not all(alpha > 0 for alpha in alphas):
        raise UserError(f"{folder}/adapter_config.json has no usable r and lora_alpha, or patterns of them: all must be positive")
    return config


def try_patterns(folder: pathlib.Path, config: dict, modules: list[str]) -> None:
    """Raises UserError where a regular expression in adapter_config.json is none."""
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    patterns += [config[key] for key in ("target_modules", "exclude_modules", "layers_pattern") if isinstance(config.get(key), str)]
    for key in ("modules_to_save", "layers_pattern"):
        patterns += config[key] if isinstance(config.get(key), list) else []
    for pattern in patterns:
        try:
            compiled = re.compile(rf"(.*\.)?({pattern})$")  # as PEFT does
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{folder}/adapter_config.json: {pattern!r} is no regular expression ({error})") from error
        for module in modules:
            compiled.match(module)


def read_info(folder: pathlib.Path) -> dict:
    """What is known of the checkpoint in `folder` beside its weights: checkpoint.json, which ours have; else what PEFT may note."""
    if (folder / "checkpoint.json").is_file():
        return read_json(folder / "checkpoint.json", TRAINING, INFO)
    backbone = read_config(folder).get("base_model_name_or_path") if is_adapter(folder) else None
    return {"backbone": backbone} if backbone else {}


@dataclasses.dataclass
class Header:
    """What can be said of an adapter without reading a tensor."""

    config: dict
    shapes: dict[str, tuple[int, int, int]]  # module -> (m, r, n)
    dtypes: set[str]  # of the factors, as safetensors names them: F32, BF16 ...
    others: list[str]  # keys of the tensors that are no factors


def read_header(folder: pathlib.Path) -> Header:
    """The header of the adapter in `folder`. Raises UserError where it is broken, or its ranks are not those of its config."""
    config, path = read_config(folder), folder / "adapter_model.safetensors"
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(f"{folder} has its weights in adapter_model.bin, a pickle, which can run code: train with save_safetensors")
        raise UserError(f"{path} is missing: {ANOTHER}")
    with _reading(path), safetensors.safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (a safe_open is no dict)
        sizes = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    if odd := [key for key in sizes if not key.isprintable()]:
        raise UserError(f"{path} holds a tensor named {odd[0][:80]!r}")
    halves = {"A": {}, "B": {}}
    for key in sizes:
        if match := _KEY.fullmatch(key):
            halves[match[2]][match[1]] = key
    if not halves["A"] or halves["A"].keys() != halves["B"].keys():
        raise UserError(f"{path} does not hold matching lora_A and lora_B tensors")
    factors = {*halves["A"].values(), *halves["B"].values()}
    if not (dtypes := {sizes[key][1] for key in factors}) <= FLOATS:
        raise UserError(f"{path} has factors in {', '.join(sorted(dtypes - FLOATS))}: want {', '.join(sorted(FLOATS))}")
    try_patterns(folder, config, list(halves["A"]))
    shapes = {}
    for module in sorted(halves["A"]):
        (b, _), (a, _), r = sizes[halves["B"][module]], sizes[halves["A"][module]], module_rank(config, module)
        if len(a) != 2 or len(b) != 2:
            raise UserError(f"{path}: {module} is no matrix (B {b}, A {a}); only LoRA on linear layers can jump")
        if (b[1], a[0]) != (r, r):
            raise UserError(f"{path}: {module} has factors of rank {b[1]} and {a[0]}, its config says {r}")
        if not (b[0] and a[1]):
            raise UserError(f"{path}: {module} has no rows or no columns (B {b}, A {a})")
        shapes[module] = (b[0], r, a[1])
    if highest_rank(config) > max(
        1024, *(max(shape) for shape in shapes.values())
    ):  # PEFT would make tensors of it for what the file lacks
        raise UserError(f"{path}: its config says rank {highest_rank(config)}, more than any of its matrices has rows or columns")
    return Header(config, shapes, dtypes, sorted(sizes.keys() - factors))


def _factors(file, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B [m, r], A [r, n]) of `module` in fp32, from an open safetensors file."""
    return tuple(file.get_tensor(f"base_model.model.{module}.lora_{half}.weight").float() for half in "BA")


def read_factors(folder: pathlib.Path, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B [m, r], A [r, n]) of one module of the adapter in `folder` in fp32. Reads these two tensors and nothing else."""
    path = folder / "adapter_model.safetensors"
    with _reading(path), safetensors.safe_open(path, "pt") as file:
        return _factors(file, module)


def read_adapter(folder: pathlib.Path) -> Adapter:
    """The adapter in `folder`, intact (`inputs.check_intact`), factors in fp32 on the CPU, its other tensors as they are."""
    header, path = read_header(folder), folder / "adapter_model.safetensors"
    check_intact(folder)
    with _reading(path), safetensors.safe_open(path, "pt") as file:
        factors = {module: _factors(file, module) for module in header.shapes}
        return Adapter(header.config, factors, {key: file.get_tensor(key) for key in header.others})


def write_adapter(folder: pathlib.Path, adapter: Adapter, info: dict) -> None:
    """Writes `adapter` to `folder` as PEFT lays it out (ranks must be those its config says), with `info` in checkpoint.json."""
    tensors = dict(adapter.others)
    if not all(half.isfinite().all() for halves in adapter.factors.values() for half in halves):
        raise UserError(f"{folder} would not be finite: lower alpha")
    for module, (b, a) in adapter.factors.items():
        rank = module_rank(adapter.config, module)
        if b.shape[1] != rank or a.shape[0] != rank:
            raise ValueError(f"{module}: factors of rank {b.shape[1]} where the config says {rank}")
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.float().contiguous()
    with writing(folder), atomic_dir(folder, overwrite=True) as temporary:
        save_tensors(temporary / "adapter_model.safetensors", tensors, metadata={"format": "pt"}, dtype=None)
        atomic_write_text(temporary / "adapter_config.json", json.dumps(adapter.config, indent=2))
        atomic_write_text(temporary / "checkpoint.json", json.dumps(info))


def extended(last: Adapter, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Adapter:
    """`last` with other factors, of whatever rank, at the same scales. A LoRA on an embedding is among `others` and keeps its rank."""
    kept = [match[1] for key in last.others if (match := _EMBEDDING.fullmatch(key))]
    return Adapter(with_ranks(last.config, {module: b.shape[1] for module, (b, _) in factors.items()}, kept), factors, last.others)


def empty_adapter(folder: pathlib.Path, shapes: dict[str, tuple[int, int]]) -> Adapter:
    """An adapter of rank 0 on the modules [m, n] of the whole model in `folder`: what a jump from a whole model adds its rank to."""
    factors = {module: (torch.zeros(m, 0), torch.zeros(0, n)) for module, (m, n) in shapes.items()}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 0, "lora_alpha": 0, "target_modules": [*shapes], "bias": "none"}
    return Adapter({**config, "base_model_name_or_path": str(folder.resolve())}, factors)
