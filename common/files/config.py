"""The options of a stage: the defaults of a dataclass, then a preset, then the command line.

A preset is a YAML file for a whole experiment, with a section a stage. The section `shared` goes to
every stage that has the key. The dataclass gives the types (transformers.HfArgumentParser).
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import pathlib
from collections.abc import Iterable
from typing import get_args, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser

from common import UserError, in_one_line
from common.files.read import matches

SECTIONS = ("shared", "train", "extract", "predict", "extrapolate", "continue", "eval", "reproduce")
COMMAND_LINE_ONLY = {"config", "run_dir", "overwrite"}  # never from a preset
OWN = {"start"}  # stage 5 means another thing by it, and does not take it from `train`
WHERE_AND_HOW = {*COMMAND_LINE_ONLY, "threads"}  # does not change what is computed
# In --help what an option takes: by its type, by its name, else the last word of its name.
METAVARS = {int: "N", float: "X", bool: "BOOL", "config": "PRESET", "backbone": "MODEL"}
METAVARS |= {"start": "ADAPTER", "report_to": "TRACKER", "policies": "GLOB", "vllm_options": "JSON"}
METAVARS |= dict.fromkeys(("output", "name"), "FOLDER")
HIDDEN = argparse.SUPPRESS  # as the help of an option that is not for users
PRESETS = pathlib.Path(__file__).parents[1] / "presets"


def option(default: object, help: str) -> object:
    """A field of a config class: its default, and its line in --help. A list is copied."""
    how = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**how, metadata={"help": help})


@dataclasses.dataclass
class StageConfig:
    """The run: options that every stage has."""

    config: str | None = option(None, "preset: a name in common/presets or a path to a YAML file")
    run_dir: str = option("runs/default", "the run directory, read and written by all stages")
    overwrite: bool = option(False, "do this stage again, discarding what it made before")
    threads: int = option(0, "CPU threads of torch; 0 leaves it to torch. Small models want 1")
    prepare = ""  # the preset's command that makes what it has in {run_dir}/

    def path(self, value: str) -> str:
        """`value` with the run directory filled in: {run_dir}/backbone -> runs/demo/backbone."""
        return value.replace("{run_dir}", self.run_dir)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The stage's docstring as it stands, then a line an option. A preset changes the defaults."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=160)

    def _get_help_string(self, action):
        return action.help if action.default in ("", None) else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(message)


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean X?` with the nearest known word, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def load_preset(name: str, above: tuple[pathlib.Path, ...] = ()) -> dict:
    """The preset as a dict of sections. `name` is a file, or the name of one in common/presets.

    With `base: another preset` it holds only what differs from that. above: presets on this one.
    """
    path = pathlib.Path(name) if pathlib.Path(name).is_file() else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = [preset.stem for preset in PRESETS.glob("*.yaml")]
        raise UserError(f"preset {name} not found; {nearest(name, known)}")
    with in_one_line(f"{path} is not valid YAML", "correct it", (yaml.YAMLError, ValueError)):
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = {}
    if isinstance(preset, dict) and "base" in preset:
        named = preset.pop("base")
        if not isinstance(named, str) or path in above:
            raise UserError(f"{path}: base must be the name of another preset, not {named!r}")
        base = load_preset(named, (*above, path))
    if not matches(preset, dict[str, dict[str, object]]):
        raise UserError(f"{path}: a preset is a mapping of sections, each a mapping of keys")
    return {key: base.get(key, {}) | preset.get(key, {}) for key in {**base, **preset}}


def as_number(value: object, kind: object) -> object:
    """`value` as a float if `kind` is: YAML takes 1e-4, which has no dot, for a text."""
    with contextlib.suppress(ValueError):
        return float(value) if kind is float and isinstance(value, str) else value
    return value


def preset_values(cls: type, preset: dict, sections: tuple[str, ...], source: str) -> dict:
    """The preset's values for the config class `cls`, with names and types checked.

    Of `sections`, later ones win. `source` names the preset in messages.
    """
    kinds, values = get_type_hints(cls), {}
    if other := [section for section in preset if section not in SECTIONS]:
        raise UserError(f"{source}: unknown section '{other[0]}'; {nearest(other[0], SECTIONS)}")
    for section in ("shared", *sections):
        for key, value in preset.get(section, {}).items():
            if key in COMMAND_LINE_ONLY or (key in OWN and section == "shared"):
                where = "a stage" if key in OWN else "the command line alone"
                raise UserError(f"{source}: {key} is for {where}, not for {section}")
            if key in kinds and (section == sections[-1] or key not in OWN):
                values[key] = value
            elif section != "shared" and key not in kinds:
                known = nearest(key, kinds)
                raise UserError(f"{source}: unknown key '{key}' in section {section}; {known}")
    for key, value in values.items():
        values[key] = value = as_number(value, kinds[key])
        if not matches(value, kinds[key]):
            wanted = inspect.formatannotation(kinds[key])
            raise UserError(f"{source}: {key} must be {wanted}, not {value!r}")
    return values


def parse(cls: type, sections: str | tuple[str, ...], doc: str, argv=None) -> StageConfig:
    """The options of a stage: defaults of `cls`, the preset's `sections`, the flags in `argv`.

    Sets the CPU threads of torch to `--threads`.
    """
    usage = "%(prog)s [--config PRESET] [--run-dir DIR] [options]"
    parser = _Parser(cls, usage=usage, description=doc, formatter_class=_Help, allow_abbrev=False)
    left, hints = parser._optionals._group_actions, get_type_hints(cls)
    for base in cls.__mro__[:-1]:  # in --help a group a class, the stage's own options first
        own = [action for action in left if action.dest in vars(base).get("__annotations__", {})]
        parser.add_argument_group(base.__doc__.split("\n")[0].rstrip("."))._group_actions = own
        left[:] = [action for action in left if action not in own]
    for action in parser._actions:  # show --run-dir, not --run_dir, which works too
        dashed = [flag for flag in action.option_strings if "_" not in flag]
        action.option_strings = dashed or action.option_strings
        if action.nargs != 0 and not action.choices:
            kinds = (action.dest, kind := hints.get(action.dest), *get_args(kind))
            word = action.dest.split("_")[-1].upper()
            action.metavar = next((METAVARS[kind] for kind in kinds if kind in METAVARS), word)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    name = early.parse_known_args(argv)[0].config
    preset = load_preset(name) if name else {}
    sections = (sections,) if isinstance(sections, str) else sections
    parser.set_defaults(**preset_values(cls, preset, sections, f"preset {name}"))
    config, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    if unknown:
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        raise UserError(f"unknown option {unknown[0]}; {nearest(unknown[0].split('=')[0], flags)}")
    config.prepare = preset.get("reproduce", {}).get("prepare", "")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    return config


def as_dict(config: StageConfig, leave_out: Iterable[str] = ()) -> dict:
    """The options that say what is computed, as plain values."""
    values = dataclasses.asdict(config)
    return {key: values[key] for key in values if key not in {*WHERE_AND_HOW, *leave_out}}
