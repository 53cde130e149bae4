"""The tensors of a Hugging Face model folder, one at a time. No model is loaded."""

import dataclasses
import pathlib

import torch

from common import UserError
from common.files.read import check_intact, open_tensors, read_json, safe_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WANTED = "want a Hugging Face folder with safetensors weights"
WRITER = "what saves the model"


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


def find_model(name: str) -> pathlib.Path:
    """The folder of the model `name`: a folder, or a hub id in this machine's cache."""
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(f"backbone {name} is no folder, and not in the hub's cache") from error


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
