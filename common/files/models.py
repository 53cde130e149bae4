"""Whole models, tensor by tensor, and the policies of a run directory. No model is loaded."""

import dataclasses
import functools
import hashlib
import pathlib

import torch

from common import UserError, in_one_line
from common.files import adapters
from common.files.read import check_intact, open_tensors, read_json, safe_name, sha256, step_of
from common.files.stage import within

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WANTED = "want a Hugging Face folder with safetensors weights"
WRITER = "what saves the model"
OURS = ("train", "extrapolated", "merged", "continued", "validation")  # folders of policies


@dataclasses.dataclass
class ModelFolder:
    """What config.json and the headers of the safetensors files say. Tensors stay on the disk."""

    path: pathlib.Path
    config: dict  # config.json
    files: dict[str, pathlib.Path]  # tensor -> the file that holds it
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # as safetensors names them: F32, BF16 ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` as it is stored. Reads nothing else."""
        with open_tensors(self.files[name], WANTED) as file:
            return file.get_tensor(name)


def is_model(folder: pathlib.Path) -> bool:
    """Whether `folder` has a whole model's config and weights."""
    weights = (folder / SINGLE, folder / INDEX)
    return (folder / "config.json").is_file() and any(path.is_file() for path in weights)


def open_model(folder: pathlib.Path) -> ModelFolder:
    """The model in `folder`, one file or shards with an index. Loads no tensor.

    Raises UserError where a file is missing, broken or not what we wrote, and where transformers
    would load more than safetensors: another model below an adapter, the hub's kernels.
    """
    found = ModelFolder(folder, read_json(folder / "config.json", WRITER), {}, {}, {})
    if "/" in str(found.config.get("attn_implementation")):
        raise UserError(f"{folder}/config.json: remove attn_implementation, the hub's code")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} has an adapter_config.json beside a model's config.json")
    index, paths, wanted = folder / INDEX, [folder / SINGLE], {}
    if index.is_file():
        wanted = read_json(index, WRITER, {"weight_map": dict[str, str]})["weight_map"]
        paths = sorted({folder / safe_name(file, str(index)) for file in wanted.values()})
    elif not paths[0].is_file():
        raise UserError(f"{folder} has no {SINGLE} and no {INDEX}: {WANTED}")
    for path in paths:
        with open_tensors(path, WANTED) as file:
            for name in file.keys():  # noqa: SIM118  (a safe_open is no dict)
                part = file.get_slice(name)
                found.files[name], found.dtypes[name] = path, part.get_dtype()
                found.shapes[name] = tuple(part.get_shape())
    if missing := wanted.keys() - found.files.keys():
        raise UserError(f"{folder} does not hold {min(missing)}, as {INDEX} says: {WANTED}")
    check_intact(folder)
    return found


@functools.cache  # it asks the hub
def find_model(name: str) -> pathlib.Path:
    """The folder of the model `name`: a folder, or a hub id, which is fetched if need be."""
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    if name.startswith((".", "/", "runs/")) or name.count("/") > 1:  # no hub id
        raise UserError(f"backbone folder {name} not found; {WANTED}")
    from huggingface_hub import snapshot_download

    with in_one_line(f"cannot load backbone {name}", f"{WANTED}, or a hub id"):
        wanted = ["config.json", "model*.safetensors*"]  # transformers fetches the tokenizer itself
        return pathlib.Path(snapshot_download(name, allow_patterns=wanted))


def linear_layers(model: ModelFolder) -> list[str]:
    """The linear layers but the head, which a LoRA on "all-linear" has. Loads no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=False)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head, layers = built.get_output_embeddings(), built.named_modules()
    linear = [name for name, x in layers if isinstance(x, torch.nn.Linear) and x is not head]
    found = sorted(name for name in linear if f"{name}.weight" in model.shapes)
    if not found:
        raise UserError(f"{model.path} has no linear layers with the names of transformers")
    return found


def find_policies(run: pathlib.Path, patterns: list[str]) -> dict[str, pathlib.Path]:
    """Name -> folder of what `patterns` stand for: globs below `run`, `backbone`, name=path."""
    found = {}
    for pattern in patterns:
        name, _, where = pattern.partition("=")
        if where and "/" not in name:
            path = pathlib.Path(where)
            if not adapters.is_adapter(path) and not is_model(path):
                raise UserError(f"--policies {pattern}: no adapter of PEFT's and no model is there")
            if safe_name(name, "--policies") in ("backbone", *OURS):
                raise UserError(f"--policies {pattern}: {name} is a folder of ours, rename it")
            found[name] = path
            continue
        if pathlib.Path(pattern).is_absolute() or ".." in pattern:
            raise UserError(f"policies are named as they stand in {run}, not {pattern}")
        paths = [p for p in sorted(run.glob(pattern)) if adapters.is_adapter(p) or is_model(p)]
        # continued/<start>_merged/backbone is what that run stands on.
        alone = pattern.endswith("backbone")
        paths = [p for p in paths if p.name[0] != "." and (alone or p.name != "backbone")]
        paths = [run / "backbone"] if pattern == "backbone" else paths
        if not paths:
            raise UserError(f"no policy matches {run}/{pattern}: run the stage that makes it first")
        found |= {str(path.relative_to(run)): path for path in paths}
    return found


def base_of(run: pathlib.Path, policy: pathlib.Path, given: str) -> str:
    """The model to load for `policy`: itself if it is one, else the one that its adapter is on.

    A file of unknown origin does not choose what is loaded: UserError where a checkpoint without a
    fingerprint names a model that is neither `given` nor in `run`.
    """
    path = policy / "checkpoint.json"
    if policy == run / "backbone":
        return given
    if not adapters.is_adapter(policy):
        return within(policy, run, "{run_dir}")
    known = read_json(path, "the stage") if path.is_file() else {}
    named = known.get("backbone", given)
    where, wanted = (
        pathlib.Path(x.replace("{run_dir}", str(run))).resolve() for x in (named, given)
    )
    if where.is_dir() and where.is_relative_to(run.resolve()):
        return named
    # A backbone may have been moved. Its fingerprint is compared when it is loaded.
    if where == wanted or "backbone_fingerprint" in known:
        return given
    advice = f"say --backbone {named}; if both are the same model, write {given} into that file"
    raise UserError(f"{path} names the backbone {named}, not {given}: {advice}")


def find_adapter(name: str) -> tuple[pathlib.Path | None, int]:
    """(folder, step) of the newest adapter in or below the folder `name`; (None, 0) without a name.

    So an output_dir of TRL's or a run of verl's may be given as it is. The step is that of our
    checkpoint.json, else the one in its name.
    """
    if not name:
        return None, 0
    below = [path.parent for path in sorted(pathlib.Path(name).rglob(adapters.CONFIG))]
    below = [path for path in below if not path.name.endswith(".tmp")]  # left by a kill
    steps = {p: adapters.read_info(p).get("step", step_of(p)) or 0 for p in below}
    if not steps:
        raise UserError(f"--start {name}: no adapter of PEFT's is in or below it")
    newest = max(steps, key=steps.get)
    return newest, steps[newest]


def find_start(cfg) -> tuple[pathlib.Path, int, str]:
    """(folder, step, base) of what stage 5 goes on from: extrapolated/<start>, merged/..., a path.

    cfg: its options. base is the model that it is an adapter on, or that it is, see `base_of`.
    """
    if "/" in cfg.start.removeprefix("merged/"):
        return *find_adapter(cfg.path(cfg.start)), cfg.backbone
    run, name = pathlib.Path(cfg.run_dir), safe_name(cfg.start.removeprefix("merged/"), "--start")
    policy = f"merged/{name}" if cfg.start.startswith("merged/") else f"extrapolated/{name}"
    if not (run / policy).is_dir() and is_model(run / "merged" / name):
        policy = f"merged/{name}"  # a jump that is no adapter
    if not (start := run / policy).is_dir():
        there = ", ".join(sorted(path.name for path in start.parent.glob("[!.]*")))
        raise UserError(f"{start} not found: run 04_extrapolate.py first (there: {there})")
    if (step := adapters.read_info(start).get("step")) is None:
        raise UserError(f"{start} has no step in a checkpoint.json")
    return start, step, base_of(run, start, cfg.backbone)


@functools.cache  # a whole model takes its time, and many jumps stand on one
def weights_hash(folder: pathlib.Path) -> str:
    """The hash of the adapter or model in `folder`. Raises UserError where it is broken."""
    if adapters.is_adapter(folder):
        adapters.read_header(folder)  # refuses what is more than a LoRA in safetensors
        return sha256(folder / adapters.WEIGHTS)
    files = sorted({*open_model(folder).files.values()})
    return hashlib.sha256(" ".join(map(sha256, files)).encode()).hexdigest()[:16]
