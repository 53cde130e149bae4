"""The tensors of a Hugging Face model folder, one at a time: no model is loaded, so it works at any model size."""

import dataclasses
import pathlib

import safetensors
import torch

from common import UserError
from common.files.read import check_intact, first_line, read_json, reading, safe_name

WANTED = "a Hugging Face folder with safetensors weights"


@dataclasses.dataclass
class ModelFolder:
    """What config.json and the headers of the safetensors files say; the tensors stay on the disk."""

    path: pathlib.Path
    config: dict  # config.json
    files: dict[str, pathlib.Path]  # tensor -> the file that holds it
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # as safetensors names them: F32, BF16 ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` as it is stored. Reads nothing else."""
        with _reading(self.files[name]), safetensors.safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


def _reading(path: pathlib.Path):
    return reading(path, f"want {WANTED}, complete")


def is_model(folder: pathlib.Path) -> bool:
    """Whether `folder` has a whole model's config and weights."""
    weights = ("model.safetensors", "model.safetensors.index.json")
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights)


def open_model(folder: pathlib.Path) -> ModelFolder:
    """The model in `folder`: model.safetensors, or the shards that model.safetensors.index.json names. Reads headers, no tensor.

    Raises UserError where a file is missing or broken, or a shard does not hold what the index says. Also where transformers would load
    more than safetensors from this folder: a pickle as a shard, another model below an adapter, attention kernels from the hub.
    """
    config = read_json(folder / "config.json", f"whatever writes {WANTED}")
    if "/" in str(config.get("attn_implementation")):
        raise UserError(f"{folder}/config.json wants the hub's {config['attn_implementation']!r} to be run: remove attn_implementation")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} has an adapter_config.json beside a model's config.json: want {WANTED}, and adapters elsewhere")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index, f"whatever writes {WANTED}", {"weight_map": dict[str, str]})["weight_map"]
        if other := [file for file in weight_map.values() if not file.endswith(".safetensors")]:
            raise UserError(f"{index} names {other[0]!r}, which is no safetensors file: want {WANTED}")
        wanted = {name: folder / safe_name(file, str(index)) for name, file in weight_map.items()}
    elif (folder / "model.safetensors").is_file():
        wanted = None
    else:
        raise UserError(f"{folder} has no model.safetensors and no {index.name}: want {WANTED}")
    files, shapes, dtypes = {}, {}, {}
    for path in sorted({*wanted.values()}) if wanted else [folder / "model.safetensors"]:
        with _reading(path), safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safe_open is no dict)
                part = file.get_slice(name)
                files[name], shapes[name], dtypes[name] = path, tuple(part.get_shape()), part.get_dtype()
    for name, path in (wanted or {}).items():
        if files.get(name) != path:
            raise UserError(f"{path} does not hold {name}, as {index} says: want {WANTED}, complete")
    return ModelFolder(folder, config, files, shapes, dtypes)


def open_intact(folder: pathlib.Path) -> ModelFolder:
    """`open_model`, and raises UserError also where the weights are not what our code wrote there. Reads every file once."""
    model = open_model(folder)
    check_intact(folder)
    return model


def find_model(name: str) -> pathlib.Path:
    """The folder of the model `name`, which is a folder or a hub id whose files are in the hub's cache on this machine."""
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(f"backbone {name} is no folder, and no hub id in this machine's cache: want {WANTED}") from error


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
