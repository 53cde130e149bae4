"""The tensors of a Hugging Face model folder, one at a time. No model is loaded."""

import contextlib
import dataclasses
import pathlib

import safetensors
import torch

from common import UserError
from common.files.read import check_intact, first_line, read_json, reading, safe_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WANTED = "a Hugging Face folder with safetensors weights"
WRITER = f"whatever writes {WANTED}"


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
        with _opened(self.files[name]) as file:
            return file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: pathlib.Path):
    with reading(path, f"want {WANTED}, complete"), safetensors.safe_open(path, "pt") as file:
        yield file


def is_model(folder: pathlib.Path) -> bool:
    """Whether `folder` has a whole model's config and weights."""
    weights = (folder / SINGLE, folder / INDEX)
    return (folder / "config.json").is_file() and any(path.is_file() for path in weights)


def open_model(folder: pathlib.Path) -> ModelFolder:
    """The model in `folder`, one file or shards with an index. Reads headers, no tensor.

    Raises UserError where a file is missing or broken, and where transformers would load more than
    safetensors from this folder: a pickle, another model below an adapter, the hub's kernels.
    """
    found = ModelFolder(folder, read_json(folder / "config.json", WRITER), {}, {}, {})
    if "/" in str(kernel := found.config.get("attn_implementation")):
        wish = f"{folder}/config.json wants the hub's {kernel!r} to be run"
        raise UserError(f"{wish}: remove attn_implementation")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} has an adapter_config.json beside a model's config.json")
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file() and not single.is_file():
        raise UserError(f"{folder} has no {SINGLE} and no {INDEX}: want {WANTED}")
    wanted = {}  # tensor -> file, by the index
    if index.is_file():
        files = read_json(index, WRITER, {"weight_map": dict[str, str]})["weight_map"]
        wanted = {name: folder / safe_name(file, str(index)) for name, file in files.items()}
    for path in wanted.values():
        if path.suffix != ".safetensors":
            raise UserError(f"{index} names {path.name!r}, which is no safetensors file")
    for path in sorted({*wanted.values()} or {single}):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (a safe_open is no dict)
                part = file.get_slice(name)
                found.files[name], found.dtypes[name] = path, part.get_dtype()
                found.shapes[name] = tuple(part.get_shape())
    for name, path in wanted.items():
        if found.files.get(name) != path:
            raise UserError(f"{path} does not hold {name}, as {index} says: want {WANTED}")
    return found


def open_intact(folder: pathlib.Path) -> ModelFolder:
    """`open_model`. Raises UserError also where a file is not what we wrote. Reads every file."""
    model = open_model(folder)
    check_intact(folder)
    return model


def find_model(name: str) -> pathlib.Path:
    """The folder of the model `name`: a folder, or a hub id in this machine's cache."""
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        where = "is no folder, and no hub id in this machine's cache"
        raise UserError(f"backbone {name} {where}: want {WANTED}") from error


def linear_layers(model: ModelFolder) -> list[str]:
    """The linear layers but the head, which a LoRA on "all-linear" has. Loads no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=False)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers may raise anything on an odd config.json
        raise UserError(f"cannot build the model of {model.path}: {first_line(error)}") from error
    head, layers = built.get_output_embeddings(), built.named_modules()
    linear = [name for name, x in layers if isinstance(x, torch.nn.Linear) and x is not head]
    found = sorted(name for name in linear if f"{name}.weight" in model.shapes)
    if not found:
        raise UserError(f"{model.path} has no linear layers with the names of transformers")
    return found
