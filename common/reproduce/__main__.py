"""Types the commands of the whole experiment, in order, and nothing else.

    python -m common.reproduce --preset demo                     # one run, into runs/demo
    python -m common.reproduce --preset demo --grid tables --seeds 0 1 2 3 4    # every table
    python -m common.reproduce --preset demo --print             # only show the commands

Each line is printed before it runs and can be typed by hand instead. Interrupt it and type it
again: finished lines are skipped, an interrupted stage goes on where it was.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys

import torch

from common import UserError
from common.files import config
from common.files.stage import run_stage
from common.files.write import claim
from common.reproduce import check, plans, report, verl
from common.reproduce.runner import Runner
from common.reproduce.runs import Runs

GPUS = 8  # that {gpus} stands for where none is seen


def lanes_of(preset: dict, jobs: int | None, grid: bool) -> list[str | None]:
    """What every lane sees of the GPUs: with `gpus_per_job` its own share, else what we see."""
    wanted, gpus = preset.get("reproduce", {}), [*map(str, range(torch.cuda.device_count()))]
    if seen := os.environ.get("CUDA_VISIBLE_DEVICES"):  # others are not ours to take
        gpus = seen.split(",")
    each = wanted.get("gpus_per_job", 0)
    if each and len(gpus) >= each:
        starts = range(0, len(gpus) - each + 1, each)
        return [",".join(gpus[start : start + each]) for start in starts][:jobs]
    return [None] * (jobs or wanted.get("jobs") or (os.cpu_count() if grid else 1))


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add, grid = parser.add_argument, "paper: its rows; main: the preset's methods, several seeds;"
    grid += " tables: everything; sweep: to choose a learning rate; learning-rate: jumps at several"
    add("--preset", default="demo", help="a name in common/presets or a YAML file")
    add("--grid", choices=plans.GRIDS, help=f"{grid} [one run]")
    add("--seeds", type=int, nargs="+", help="of the grid [0 1 2 3 4, of the grid paper 0]")
    rows = "of the grid paper: the paper's tables to make [those that have this model]"
    add("--tables", type=int, nargs="+", choices=range(3, 9), help=rows)
    add("--run-dir", help="[runs/<preset>, of a grid runs/<preset>_<grid>]")
    add("--jobs", type=int, help="commands at a time [the preset's]")
    only = "of a grid: only write its tables from the runs that are there"
    add("--report", action="store_true", help=only)
    others = "of --report: folders of the same grid for other models, for Figs. 5 and 7"
    add("--beside", nargs="+", default=[], metavar="RUN_DIR", help=others)
    add("--print", action="store_true", help="show the commands, run nothing")
    other = "with --print: show verl's commands for stages 1 and 5 (README.md)"
    add("--trainer", choices=["verl"], help=other)
    fetched = "fetch model and problems, count them, say what the runs need; run nothing"
    add("--check", action="store_true", help=fetched)
    args = parser.parse_args()
    args.seeds = args.seeds or [*range(1 if args.grid == "paper" else 5)]
    if (args.report or args.beside) and not args.grid:
        raise UserError("--report and --beside are of a grid: say which with --grid")
    if args.jobs is not None and args.jobs < 1:
        raise UserError("--jobs must be 1 or more")
    if args.trainer and not args.print:
        raise UserError("--trainer verl only shows the commands: add --print")
    return args


def main() -> None:
    args = parse()
    preset = config.load_preset(args.preset)
    own = preset.get("reproduce", {})
    if isinstance(own.get("launch"), str):
        gpus = own.get("gpus_per_job") or torch.cuda.device_count() or GPUS
        own["launch"] = own["launch"].replace("{gpus}", str(gpus))
    wanted = plans.values_of(args.preset, preset)["reproduce"]
    name = pathlib.Path(args.preset).name.removesuffix(".yaml")
    root = pathlib.Path(args.run_dir or f"runs/{name}{f'_{args.grid}' if args.grid else ''}")
    if args.grid == "sweep" and not wanted["validation_data"]:
        raise UserError("--grid sweep measures on reproduce: validation_data, which is not there")
    if args.grid:
        tables = args.tables or wanted["tables"]
        jobs = plans.grid(args.grid, args.preset, preset, str(root), args.seeds, tables)
    else:
        jobs = plans.single(args.preset, preset, str(root))
    if args.print:
        lines = [job.line for job in jobs]
        if args.trainer:
            lines = verl.commands(jobs, args.preset, str(root), wanted["verl_flags"])
        print("\n".join(lines))
    elif args.check:
        check.check(args.preset, preset, str(root), jobs)
        return
    if not args.report:
        train, *_ = check.options(args.preset, str(root))
        print(f"# {check.summary(jobs, wanted, train)}, into {root}", file=sys.stderr)
    if args.print:
        return
    beside = [Runs(pathlib.Path(folder), args.seeds) for folder in args.beside]
    if empty := [str(one.root) for one in beside if not one.all]:
        raise UserError(f"--beside {empty[0]}: nothing of this grid was measured there")
    record, logs = root / "reproduce.json", root / "logs" if args.grid else None
    claim(record)
    if not args.report:
        stamp = hashlib.sha256(json.dumps(preset, sort_keys=True).encode()).hexdigest()[:16]
        Runner(jobs, lanes_of(preset, args.jobs, bool(args.grid)), record, stamp, logs).run()
    if args.grid:
        failed, commit = subprocess.getstatusoutput("git describe --always --dirty")
        typed = shlex.join(["python", "-m", "common.reproduce", *sys.argv[1:]])
        made_with = f"`{typed}` at commit {'unknown' if failed else commit}"
        runs = Runs(root, args.seeds, beside)
        print(report.write_page(runs, made_with, root / "tables.md", root / "results.json"))


if __name__ == "__main__":
    run_stage(main)
