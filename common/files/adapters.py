"""LoRA adapters as PEFT writes them, ours, TRL's and verl's alike. No model is loaded.

A module may have a rank and a scale of its own (rank_pattern, alpha_pattern, rsLoRA).
"""

import dataclasses
import math
import pathlib
import re
import statistics

import torch

from common import UserError
from common.files.read import check_intact, matches, open_tensors, read_json, safe_name
from common.files.write import atomic_dir, save_tensors, write_json
from common.rank1 import LowRank

ANOTHER = "put a good copy there, make it again, or end before it with --last-step"
TRAINING = "the training that writes it (here: 01_train_lora_grpo.py)"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FLOATS = {"F64", "F32", "BF16", "F16"}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM reserves room for one of these ranks

# With these options of PEFT a module is not W + s B A with one B and one A. The last one makes PEFT
# import a module that the file names.
_OTHER_FORMULAS = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "monteclora_config", "target_parameters", "layer_replication"),
    "megatron_config",
)
_OTHER_BACKBONES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # they change the backbone
_NAME = "base_model.model.{}.lora_{}.weight"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
_EMBEDDING = re.compile(r"base_model\.model\.(.+)\.lora_embedding_A")


def _by_pattern(pattern: dict | None, module: str, default: float) -> float:
    """The value of the first regular expression that matches the end of the module's name."""
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key  # PEFT's own rule. The import takes two seconds

    return pattern.get(get_pattern_key(pattern, module), default)


def module_rank(config: dict, module: str) -> int:
    """The rank that adapter_config.json gives to `module`."""
    return _by_pattern(config.get("rank_pattern"), module, config["r"])


def highest_rank(config: dict) -> int:
    """The highest rank that a module may have."""
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def module_scale(config: dict, module: str) -> float:
    """s = lora_alpha / r of `module`; with rsLoRA lora_alpha / sqrt(r). It is 1 where r is 0."""
    rank = module_rank(config, module)
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank else 1.0


@dataclasses.dataclass
class Adapter:
    """A LoRA: factors[module] = (B [m, r], A [r, n]) in fp32. A module's update is s B A."""

    config: dict  # adapter_config.json
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    others: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # by key of the file

    def scale(self, module: str) -> float:
        return module_scale(self.config, module)

    def update(self, module: str) -> LowRank:
        """s B A of `module`, in float64."""
        b, a = self.factors[module]
        return LowRank(b.double(), a.double(), self.scale(module))


def is_adapter(folder: pathlib.Path) -> bool:
    return (folder / CONFIG).is_file()


def read_config(folder: pathlib.Path) -> dict:
    """adapter_config.json in `folder`. Raises UserError unless it is a LoRA W + s B A."""
    config = read_json(folder / CONFIG, TRAINING)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} is not a plain LoRA (peft_type {config.get('peft_type')})")
    if other := [option for option in _OTHER_FORMULAS if config.get(option)]:
        raise UserError(f"{folder} is not a plain LoRA ({other[0]}): a jump adds to W + s B A")
    if not matches(config, {"r": int, "lora_alpha": float}) or not config["lora_alpha"]:
        raise UserError(f"{folder}: r and lora_alpha in {CONFIG} must be numbers, alpha not 0")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_OTHER_BACKBONES):
        raise UserError(f"{folder} is not a plain LoRA: {start}, which changes the backbone")
    return config


def read_info(folder: pathlib.Path) -> dict:
    """What is known of a checkpoint beside its weights: our checkpoint.json, or PEFT's backbone."""
    if (folder / "checkpoint.json").is_file():
        return read_json(folder / "checkpoint.json", TRAINING)
    named = read_config(folder).get("base_model_name_or_path") if is_adapter(folder) else None
    return {"backbone": named} if named else {}


@dataclasses.dataclass
class Header:
    """What can be said of an adapter without reading a tensor."""

    config: dict
    shapes: dict[str, tuple[int, int, int]]  # module -> (m, r, n)
    dtypes: set[str]  # of the factors, as safetensors names them: F32, BF16 ...
    others: list[str]  # keys of the tensors that are no factors


def read_header(folder: pathlib.Path) -> Header:
    """The header of the adapter in `folder`.

    Raises UserError where it does not fit its config, or is not as we wrote it.
    """
    config, path = read_config(folder), folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "adapter_model.bin is a pickle, which can run code" if pickled else ANOTHER
        raise UserError(f"{path} is missing: {why}")
    with open_tensors(path, ANOTHER) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (no dict)
        sizes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        dtypes = {part.get_dtype() for key, part in slices.items() if _KEY.fullmatch(key)}
    if odd := dtypes - FLOATS:
        raise UserError(f"{path} has factors in {', '.join(sorted(odd))}: {ANOTHER}")
    shapes = {}
    for module in sorted({match[1] for match in map(_KEY.fullmatch, sizes) if match}):
        b, a = (sizes.get(_NAME.format(module, half), ()) for half in "BA")
        r = module_rank(config, module)
        if len(a) != 2 or (*b[1:], a[0]) != (r, r):
            raise UserError(f"{path}: {module} has B {b} and A {a}, its config says rank {r}")
        shapes[safe_name(module, str(path))] = (b[0], r, a[1])  # files of deltas have this name
    if not shapes:
        raise UserError(f"{path} holds no lora_A and lora_B")
    check_intact(folder)
    return Header(config, shapes, dtypes, sorted(key for key in sizes if not _KEY.fullmatch(key)))


def factors(file, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B [m, r], A [r, n]) of one module in fp32, from an open file of tensors."""
    return tuple(file.get_tensor(_NAME.format(module, half)).float() for half in "BA")


def read_adapter(folder: pathlib.Path) -> Adapter:
    """The adapter in `folder`. Factors in fp32, other tensors as they are."""
    header = read_header(folder)
    with open_tensors(folder / WEIGHTS, ANOTHER) as file:
        found = {module: factors(file, module) for module in header.shapes}
        return Adapter(header.config, found, {key: file.get_tensor(key) for key in header.others})


def write_adapter(folder: pathlib.Path, adapter: Adapter, info: dict) -> None:
    """Writes a finite `adapter` to `folder` as PEFT does, with `info` in checkpoint.json."""
    tensors = dict(adapter.others)
    for module, (b, a) in adapter.factors.items():
        if not (b.isfinite().all() and a.isfinite().all()):
            raise UserError(f"{folder} would not be finite: lower alpha")
        tensors |= {_NAME.format(module, x): y.float() for x, y in (("A", a), ("B", b))}
    with atomic_dir(folder, info) as temporary:
        save_tensors(temporary / WEIGHTS, tensors, {"format": "pt"}, dtype=None)
        write_json(temporary / CONFIG, adapter.config)


def extended(last: Adapter, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Adapter:
    """`last` with other factors, of any rank, at the scales it has. Its other tensors stay."""
    ranks = {module: b.shape[1] for module, (b, _) in factors.items()}
    for match in filter(None, map(_EMBEDDING.fullmatch, last.others)):
        ranks[match[1]] = module_rank(last.config, match[1])
    divisor = math.sqrt if last.config.get("use_rslora") else float
    alphas = {module: last.scale(module) * divisor(rank) for module, rank in ranks.items()}
    # The commonest rank and alpha stand for all modules, patterns name the others. PEFT compares
    # the end of a name only, unless the pattern begins with ^.
    r = statistics.mode(ranks.values())
    alpha = statistics.mode(alphas[module] for module in ranks if ranks[module] == r)
    rare = {f"^{re.escape(m)}": rank for m, rank in ranks.items() if rank != r}
    others = {f"^{re.escape(m)}": x for m, x in alphas.items() if not math.isclose(x, alpha)}
    # The file's tensors replace any initialisation, and some kinds of it do not work at every rank.
    config = {**last.config, "r": r, "lora_alpha": alpha, "init_lora_weights": True}
    config |= {"rank_pattern": rare, "alpha_pattern": others}
    return Adapter(config, factors, last.others)
