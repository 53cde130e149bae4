"""Types the commands of the whole experiment, in order, and nothing else.

    python -m common.reproduce --preset demo                                              # one run, into runs/demo
    python -m common.reproduce --preset demo --grid tables --seeds 0 1 2 3 4              # every table of the paper, into runs/demo_tables
    python -m common.reproduce --preset demo --print                                      # only show the commands

Each line is printed before it runs and can be typed by hand instead. A line starts when those it depends on are done, up to `--jobs`
at a time (they share the 150-step prefix, which is trained once). Interrupt it and type it again: finished lines are skipped, an
interrupted stage goes on where it was. What the commands of a grid print goes to <run-dir>/logs. On a machine with several GPUs, a
preset's `gpus_per_job` gives every command its own.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time

import torch
from tqdm import tqdm

from common import UserError
from common.files import config as configs
from common.files.read import read_json, safe_name
from common.files.write import claim, write_json, writing
from common.reproduce import plans, tables
from common.reproduce.plans import Job

PROGRESS = re.compile(r"(?:step )?(\d+)/(\d+) ")
# Of every command, where nobody has set them: a thread each, and glibc keeps the memory of tensors that are gone, as they come again
# (5% on a CPU).
DEFAULTS = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "500000000", "MALLOC_MMAP_THRESHOLD_": "500000000"}


class Runner:
    """Runs jobs whose needs are met, one a lane, in the order of the list, and shows what they print (or keeps it in `logs`).

    A lane is what its jobs see as CUDA_VISIBLE_DEVICES, or None for what this process sees.
    """

    def __init__(self, jobs: list[Job], lanes: list[str | None], record: pathlib.Path, stamp: str, logs: pathlib.Path | None = None):
        self.jobs, self.lanes, self.record, self.stamp, self.logs = jobs, lanes, record, stamp, logs
        self.free = list(lanes)
        self.lane_of: dict[str, str | None] = {}
        self.last_lines: dict[str, collections.deque] = {}
        self.finished = set()
        self.running: dict[str, subprocess.Popen] = {}
        self.readers: dict[str, threading.Thread] = {}  # of what they print
        self.output: queue.Queue = queue.Queue()  # (job, line), and (job, None) at its end
        self.progress = {job.name: 0.0 for job in jobs}  # in units of work
        self.first_step: dict[str, int] = {}

    def run(self) -> None:
        """Runs everything. Raises UserError naming the command that failed."""
        before = read_json(self.record, "this command") if self.record.exists() else {}
        done_before = {job.name for job in self.jobs if before.get(job.line) == self.stamp}
        self.finished = {
            job.name for job in self.jobs if job.name in done_before and set(job.needs) <= done_before and job is not self.jobs[-1]
        }
        if self.finished:
            names = ", ".join(job.name for job in self.jobs if job.name in self.finished)
            print(f"done already: {f'{len(self.finished)} of {len(self.jobs)} commands' if self.logs else names}")
        remaining = [job for job in self.jobs if job.name not in self.finished]
        total, began, lane_seconds = sum(job.work for job in remaining), time.monotonic(), 0.0
        bar = tqdm(
            total=round(total), desc="whole experiment", bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} gone{postfix}", postfix=""
        )
        number = signal.SIGINT
        try:
            while len(self.finished) < len(self.jobs):
                self._start_ready(bar)
                job, line = self.output.get()
                now = time.monotonic()
                lane_seconds, began = lane_seconds + (now - began) * len(self.running), now
                if line is None:
                    self._end(job)
                else:
                    self._show(job, line, bar)
                done = sum(self.progress[j.name] for j in remaining)
                bar.n = round(done)
                if done > total / 100:  # before that there is nothing to reckon with
                    bar.set_postfix_str(f"about {lane_seconds / done * (total - done) / len(self.lanes) / 60:.0f} min left")
        except KeyboardInterrupt as stop:
            number = stop.args[0] if stop.args else number
            raise
        finally:
            self._stop(number)
            bar.close()

    def _stop(self, number: int) -> None:
        """Passes a signal on to all that runs, and waits for its end."""
        for process in self.running.values():  # the whole group: the launcher does not pass a signal on to the stage it started
            os.killpg(process.pid, number)
        for name, process in self.running.items():
            self.readers[name].join()  # the launcher ends before the stage; the end of the output is that of both
            process.wait()

    def _start_ready(self, bar) -> None:
        for job in self.jobs:
            if self.free and job.name not in self.finished | self.running.keys() and set(job.needs) <= self.finished:
                bar.write(f"$ {job.line}" if self.logs else f"\n{job.heading}\n$ {job.line}")
                lane = self.lane_of[job.name] = self.free.pop(0)
                self.last_lines[job.name] = collections.deque(maxlen=20)
                environment = {
                    **DEFAULTS,
                    **os.environ,
                    **({} if lane is None else {"CUDA_VISIBLE_DEVICES": lane}),
                    "PYTHONUNBUFFERED": "1",
                    "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
                }
                process = subprocess.Popen(
                    job.argv,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env=environment,
                    start_new_session=True,
                )
                self.running[job.name] = process
                self.readers[job.name] = threading.Thread(target=self._read, args=(job, process), daemon=True)
                self.readers[job.name].start()

    def _read(self, job: Job, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self.output.put((job, line.rstrip()))
        self.output.put((job, None))

    def _show(self, job: Job, line: str, bar) -> None:
        if match := PROGRESS.match(line):
            at, last = int(match[1]), int(match[2])
            first = self.first_step.setdefault(job.name, at - 1 if line.startswith("step") else 0)
            self.progress[job.name] = job.work * (at - first) / max(last - first, 1)
        self.last_lines[job.name].append(line)
        if self.logs:
            log = self.logs / f"{job.name.replace('/', '.').replace(' ', '_')}.log"
            with writing(log), open(log, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        elif line.strip():
            bar.write(f"[{job.name}] {line}")

    def _end(self, job: Job) -> None:
        code = self.running.pop(job.name).wait()
        self.free.append(self.lane_of.pop(job.name))
        if code:
            if self.logs:
                print("\n".join(self.last_lines[job.name]), file=sys.stderr)
            raise UserError(f"this command failed (exit code {code}); its message is above: {job.line}")
        self.finished.add(job.name)
        self.progress[job.name] = job.work
        done = read_json(self.record, "this command") if self.record.exists() else {}
        write_json(self.record, {**done, job.line: self.stamp})


def lanes_of(preset: dict, jobs: int | None, grid: bool) -> list[str | None]:
    """What every lane sees of the GPUs: with `gpus_per_job` its own share of them, else what this process sees.

    `jobs` lanes, or the preset's number; without one, a grid has as many as GPUs suffice for, or CPUs.
    """
    wanted, gpus = preset.get("reproduce", {}), torch.cuda.device_count()
    each = wanted.get("gpus_per_job", 0)
    if each and gpus >= each:
        shares = [",".join(str(gpu) for gpu in range(start, start + each)) for start in range(0, gpus - each + 1, each)]
        return shares[:jobs] if jobs else shares
    return [None] * (jobs or wanted.get("jobs") or (os.cpu_count() if grid else 1))


def made_with(args: argparse.Namespace) -> str:
    """The command and the commit of the code, for the page of tables."""
    commit = "unknown"
    with contextlib.suppress(OSError):  # no git here
        asked = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(asked, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent).stdout.strip() or commit
    flags = " ".join([*map(str, args.seeds), *(["--report"] if args.report else [])])
    return f"`python -m common.reproduce --preset {args.preset} --grid {args.grid} --seeds {flags}` at commit {commit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", help="a name in common/presets or a YAML file")
    parser.add_argument(
        "--grid", choices=plans.GRIDS, help="main: the preset's methods for several seeds; tables: everything; rl-extra: its loop [one run]"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="training seeds of the grid [0 1 2 3 4]")
    parser.add_argument("--run-dir", help="where everything goes [runs/<preset>, of a grid runs/<preset>_<grid>]")
    parser.add_argument("--jobs", type=int, help="commands at a time [the preset's]")
    parser.add_argument("--report", action="store_true", help="of a grid: only write its tables from the runs that are there")
    parser.add_argument("--print", action="store_true", help="show the commands without running them")
    args = parser.parse_args()
    if args.report and not args.grid:
        raise UserError("--report writes the tables of a grid: say which with --grid")
    preset = configs.load_preset(args.preset)
    name = safe_name(pathlib.Path(args.preset).stem, "the preset's name")
    root = args.run_dir or f"runs/{name}" + (f"_{args.grid}" if args.grid else "")
    jobs = plans.grid(args.grid, args.preset, preset, root, args.seeds) if args.grid else plans.single(args.preset, preset, root)
    if args.print:
        print("\n".join(job.line for job in jobs))
        return
    stamp = hashlib.sha256(json.dumps(preset, sort_keys=True).encode()).hexdigest()[:16]
    claim(pathlib.Path(root) / "reproduce.json")
    logs = pathlib.Path(root) / "logs" if args.grid else None
    if logs:
        with writing(logs):
            logs.mkdir(parents=True, exist_ok=True)
    if not args.report:
        Runner(jobs, lanes_of(preset, args.jobs, bool(args.grid)), pathlib.Path(root) / "reproduce.json", stamp, logs).run()
    if args.grid:
        print(tables.write(pathlib.Path(root), preset, args.seeds, made_with(args)))


if __name__ == "__main__":
    configs.run_stage(main)
