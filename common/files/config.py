"""One resolved config a stage: dataclass defaults, then the preset (YAML), then the command line.

A preset is one file for a whole experiment, with a section a stage (`shared` goes to every stage that has the key). Types come from
the dataclass, through `transformers.HfArgumentParser`; an unknown key or flag is an error that names the nearest known one.
"""

import argparse
import dataclasses
import difflib
import math
import os
import pathlib
import re
import reprlib
import signal
import sys
import typing

import yaml
from transformers import HfArgumentParser

from common import UserError
from common.files import write as run_dir
from common.files.read import first_line, matches

SECTIONS = ("shared", "train", "extract", "predict", "extrapolate", "continue", "eval", "reproduce")
COMMAND_LINE_ONLY = {"config", "run_dir", "overwrite"}  # what a preset, which may be another's, does not decide
INTEGERS = 2**31  # options are below it, and above its negative
PRESETS = pathlib.Path(__file__).parents[1] / "presets"


def option(default: object, help: str) -> object:
    """A field of a config class: its default, and one line of help for --help. A list is copied."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class StageConfig:
    """What every stage takes."""

    config: str | None = dataclasses.field(default=None, metadata={"help": "preset: a name in common/presets or a path to a YAML file"})
    run_dir: str = dataclasses.field(default="runs/default", metadata={"help": "the run directory, read and written by all stages"})
    overwrite: bool = dataclasses.field(default=False, metadata={"help": "do this stage again, discarding what it made before"})
    threads: int = dataclasses.field(default=0, metadata={"help": "CPU threads of torch; 0 leaves it to torch. Small models want 1"})

    def path(self, value: str) -> str:
        """`value` with the run directory filled in: "{run_dir}/backbone" -> "runs/demo/backbone"."""
        return value.replace("{run_dir}", self.run_dir)


class _Help(argparse.RawDescriptionHelpFormatter):
    """The stage's docstring as it stands, then a line an option: name, help, default."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=160)

    def _get_help_string(self, action):
        # a preset's value has become the default by now, so --config X --help shows the experiment's own numbers
        return action.help if action.default in (None, argparse.SUPPRESS) else f"{action.help} [%(default)s]"


class _Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(message)


def nearest(word: str, known: typing.Iterable[str], most: int = 20) -> str:
    """`did you mean X?` where something known is near, and the list of what is known; beside a hit only if it is not longer than `most`."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:
        return f"known: {', '.join(known)}"
    return f"did you mean {close[0]}?" + (f" (known: {', '.join(known)})" if len(known) <= most else "")


def load_preset(name: str, above: tuple[pathlib.Path, ...] = ()) -> dict:
    """The preset as a dict of sections. `name` is a file, or the name of one in common/presets.

    A preset may start with `base: another preset` and then holds only what differs from it. `above` are those it is the base of.
    """
    path = pathlib.Path(name)
    if not path.is_file():
        path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"preset {name} not found; {nearest(name, (p.stem for p in PRESETS.glob('*.yaml')))}")
    if path.resolve() in above:
        raise UserError(f"{path} is its own base, by way of {above[-1]}")
    try:
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except Exception as error:  # whatever int(), datetime and others raise on a value that PyYAML hands them
        raise UserError(f"{path} is not valid YAML: {type(error).__name__}: {first_line(error)}") from error
    has_base = isinstance(preset, dict) and preset.get("base") not in (None, name)
    base = load_preset(str(preset.pop("base")), (*above, path.resolve())) if has_base else {}
    if not matches(preset, dict[str, dict[str, object]]):
        raise UserError(f"{path}: a preset is a mapping of sections (train, extract, ...), each a mapping of keys to values")
    return {section: {**base.get(section, {}), **preset.get(section, {})} for section in {**base, **preset}}


def preset_values(cls: type, preset: dict, sections: tuple[str, ...], source: str) -> dict:
    """The values of the preset's `sections` for the config class `cls`, later ones win, checked for names and types."""
    kinds = typing.get_type_hints(cls)
    for section in preset:
        if section not in SECTIONS:
            raise UserError(f"{source}: unknown section '{section}'; {nearest(section, SECTIONS)}")
    for section in ("shared", *sections):
        for key in COMMAND_LINE_ONLY & preset.get(section, {}).keys():
            raise UserError(f"{source}: {key} is for the command line alone, not for section {section}")
    values = {key: value for key, value in preset.get("shared", {}).items() if key in kinds}
    for section in sections:
        for key, value in preset.get(section, {}).items():
            if key not in kinds:
                raise UserError(f"{source}: unknown key '{key}' in section {section}; {nearest(key, kinds)}")
            values[key] = value
    for key, value in values.items():
        if not matches(value, kinds[key]):
            wanted = kinds[key].__name__ if kinds[key] in (int, float, str, bool) else str(kinds[key]).replace("typing.", "")
            raise UserError(f"{source}: {key} must be {wanted}, not {reprlib.repr(value)}")
    return values


def parse(cls: type[StageConfig], section: str | tuple[str, ...], description: str, argv: list[str] | None = None) -> StageConfig:
    """The resolved config of a stage: defaults of `cls`, overridden by the preset's section(s), overridden by the flags in `argv`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(cls, description=description, formatter_class=_Help, allow_abbrev=False)
    for action in parser._actions:  # HfArgumentParser adds --run-dir beside --run_dir; show the first form only
        dashed = [option for option in action.option_strings if "_" not in option]
        action.option_strings = dashed or action.option_strings
        action.metavar = action.metavar or (None if action.nargs == 0 or action.choices else action.dest.split("_")[-1].upper())
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    name = early.parse_known_args(argv)[0].config
    if name:
        parser.set_defaults(**preset_values(cls, load_preset(name), (section,) if isinstance(section, str) else section, f"preset {name}"))
    config, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        known = [option for option in parser._option_string_actions if option.startswith("--")]
        raise UserError(f"unknown option {unknown[0]}; {nearest(unknown[0].split('=')[0], known)}")
    for key, value in dataclasses.asdict(config).items():
        if not all(math.isfinite(number) for number in (value if isinstance(value, list) else [value]) if isinstance(number, float)):
            raise UserError(f"{key} must be finite, not {value}")
        if isinstance(value, int) and abs(value) >= INTEGERS:
            raise UserError(f"{key} must be below {INTEGERS}, not {value}")
    if config.threads < 0:
        raise UserError(f"threads must be 0 or more, not {config.threads}")
    return config


def as_dict(config: StageConfig, leave_out: typing.Iterable[str] = ()) -> dict:
    """The config as plain values, without what says where and how to run rather than what to compute."""
    skip = {"config", "run_dir", "overwrite", "threads", *leave_out}
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in skip}


def run_stage(main: typing.Callable[[], None], one_process: bool = False) -> None:
    """Calls a stage's `main`; a UserError becomes one line on stderr and exit code 2, Ctrl-C and SIGTERM a hint and 130 and 143.

    So does the end of another process that this one talks to, exit code 1 (gloo's; NCCL ends the process itself).
    one_process: of the processes that `accelerate launch` started, only the first works; for stages whose work is seconds long.
    """
    first = os.environ.get("RANK", "0") == "0"
    if one_process and not first:
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    numbers = (signal.SIGINT, signal.SIGTERM)  # a shell that starts us in the background has the first ignored
    before = [signal.signal(number, run_dir.interrupt) for number in numbers]
    try:
        main()
    except UserError as error:
        line = "".join(letter if letter.isprintable() else " " for letter in str(error))  # it may quote a file, terminal codes and all
        print(f"error: {line[:2000]}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # a launcher passes a signal on to a group that has it already
        if first:
            print(f"\nstopped: type {run_dir.same_command()} to go on from the last complete step", file=sys.stderr)
        raise SystemExit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from None
    except RuntimeError as error:
        if not re.search("(closed|reset) by peer", str(error)):
            raise
        print(
            f"error: another process of this run has ended: type {run_dir.same_command()} to go on from the last complete step",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    finally:
        run_dir.release()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
