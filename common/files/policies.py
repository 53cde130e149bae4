"""The policies of a run directory: which there are, what each stands on, its weights' hash."""

import functools
import hashlib
import pathlib

from common import UserError
from common.files import adapters, models
from common.files.read import check_intact, read_json, sha256


def find_policies(run: pathlib.Path, patterns: list[str]) -> list[str]:
    """The policies that `patterns` (globs below `run`, and `backbone`) stand for, each once."""
    found = {}
    for pattern in patterns:
        path = pathlib.Path(pattern)
        if path.is_absolute() or ".." in path.parts:
            wanted = f"policies are named as they stand in {run} (train/step_0150, extrapolated/*)"
            raise UserError(f"{wanted}, not {pattern}")
        paths = [p for p in sorted(run.glob(pattern)) if not p.name.startswith(".")]
        paths = [p for p in paths if adapters.is_adapter(p) or models.is_model(p)]
        names = [str(p.relative_to(run)) for p in paths]
        names = ["backbone"] if pattern == "backbone" else names
        if not names:
            raise UserError(f"no policy matches {run}/{pattern}: run the stage that makes it first")
        found |= dict.fromkeys(names)
    return list(found)


def base_of(run: pathlib.Path, policy: str, given: str) -> str:
    """The model to load for `policy`: itself if it is one, else the one that its adapter is on.

    Raises UserError where a checkpoint names a model that is neither `given` nor in `run`: a file
    of unknown origin does not choose what is loaded, or fetched from the hub.
    """
    folder = run / policy
    if policy == "backbone":
        return given
    if not adapters.is_adapter(folder):
        return f"{{run_dir}}/{policy}"
    path, named = folder / "checkpoint.json", None
    if path.is_file():
        named = read_json(path, "the stage that wrote it", adapters.INFO).get("backbone")
    where, wanted = (pathlib.Path(str(n).replace("{run_dir}", str(run))) for n in (named, given))
    if named is None or named == given or (where.is_dir() and where.resolve() == wanted.resolve()):
        return named or given
    if not where.is_dir() or not where.resolve().is_relative_to(run.resolve()):
        advice = f"if it is to be loaded, say --backbone {named}"
        raise UserError(f"{folder} names the backbone {named}, not {given}: {advice}")
    return named


@functools.cache  # a whole model takes its time, and many jumps stand on one
def weights_hash(folder: pathlib.Path) -> str:
    """The hash of the adapter or model in `folder`. Raises UserError where it is broken."""
    if adapters.is_adapter(folder):
        adapters.read_header(folder)  # refuses what is more than a LoRA in safetensors
        check_intact(folder)
        return sha256(folder / "adapter_model.safetensors")
    files = sorted({*models.open_intact(folder).files.values()})
    return hashlib.sha256(" ".join(map(sha256, files)).encode()).hexdigest()[:16]
