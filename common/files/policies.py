"""The policies of a run directory: which there are, what each stands on, its weights' hash."""

import functools
import hashlib
import pathlib

from common import UserError
from common.files import adapters, models
from common.files.read import read_json, safe_name, sha256


def find_policies(run: pathlib.Path, patterns: list[str]) -> list[str]:
    """The policies that `patterns` (globs below `run`, and `backbone`) stand for, each once."""
    found = {}
    for pattern in patterns:
        if pathlib.Path(pattern).is_absolute() or ".." in pattern:
            raise UserError(f"policies are named as they stand in {run}, not {pattern}")
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
    path = run / policy / "checkpoint.json"
    if policy == "backbone":
        return given
    if not adapters.is_adapter(path.parent):
        return f"{{run_dir}}/{policy}"
    named = read_json(path, "the stage").get("backbone", given) if path.is_file() else given
    where, wanted = (
        pathlib.Path(x.replace("{run_dir}", str(run))).resolve() for x in (named, given)
    )
    if where == wanted or (where.is_dir() and where.is_relative_to(run.resolve())):
        return named
    raise UserError(f"{path} names the backbone {named}, not {given}: to load it, say --backbone")


def find_start(cfg) -> tuple[pathlib.Path, int, str]:
    """(folder, step, base) of what stage 5 goes on from: extrapolated/<start>, or merged/...

    cfg: its options. base is the model that it is an adapter on, or that it is, see `base_of`.
    """
    kind = "merged" if cfg.start.startswith("merged/") else "extrapolated"
    policy = f"{kind}/{safe_name(cfg.start.removeprefix('merged/'), '--start')}"
    start = pathlib.Path(cfg.run_dir, policy)
    if not start.is_dir() and models.is_model(whole := start.parents[1] / "merged" / start.name):
        start, policy = whole, f"merged/{start.name}"  # a jump that is no adapter
    if not start.is_dir():
        there = ", ".join(sorted(path.name for path in start.parent.glob("[!.]*")))
        raise UserError(f"{start} not found: run 04_extrapolate.py first (there: {there})")
    if (step := adapters.read_info(start).get("step")) is None:
        raise UserError(f"{start} has no step in a checkpoint.json")
    return start, step, base_of(pathlib.Path(cfg.run_dir), policy, cfg.backbone)


@functools.cache  # a whole model takes its time, and many jumps stand on one
def weights_hash(folder: pathlib.Path) -> str:
    """The hash of the adapter or model in `folder`. Raises UserError where it is broken."""
    if adapters.is_adapter(folder):
        adapters.read_header(folder)  # refuses what is more than a LoRA in safetensors
        return sha256(folder / "adapter_model.safetensors")
    files = sorted({*models.open_model(folder).files.values()})
    return hashlib.sha256(" ".join(map(sha256, files)).encode()).hexdigest()[:16]
