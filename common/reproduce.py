"""Types the commands of the whole experiment, in order, and nothing else.

    python -m common.reproduce --preset demo                     # into runs/demo
    python -m common.reproduce --preset demo --print             # only show the commands

Each line is printed before it runs and can be typed by hand instead. A line starts when those it depends on are done, up to `--jobs`
at a time (they share the 150-step prefix, which is trained once). Interrupt it and type it again: finished lines are skipped, an
interrupted stage goes on where it was.
"""

import argparse
import ast
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

from tqdm import tqdm

from common import config as configs
from common.run_dir import UserError, read_json, safe_name, write_json

PROGRESS = re.compile(r"(?:step )?(\d+)/(\d+) ")
# What a preset may have typed: a module of ours, and options of the launcher that name no other program.
PREPARE = re.compile(r"(python -m common\.\w+)?")
LAUNCH = re.compile(
    r"(--quiet\s*|--(config_file|num_processes|num_machines|machine_rank|main_process_ip|main_process_port|mixed_precision)[ =]\w\S*\s*)*"
)


@dataclasses.dataclass
class Job:
    """One command line. `work` is its length in units of one RL step, for the time left."""

    name: str
    argv: list[str]
    needs: list[str]
    work: float

    @property
    def line(self) -> str:
        return shlex.join(self.argv)

    @property
    def heading(self) -> str:
        """What the stage says of itself: the first line of its docstring, up to the paper's sections."""
        scripts = [word for word in self.argv if word.endswith(".py")]
        docstring = ast.get_docstring(ast.parse(pathlib.Path(scripts[0]).read_text(encoding="utf-8"))) if scripts else None
        return docstring.splitlines()[0].split("  ")[0] if docstring else "Preparation"


def plan(preset_name: str, preset: dict, run_dir: str) -> list[Job]:
    """The experiment: one shared prefix, the jump, every continuation, the references, the evaluation."""
    train, after, wanted = preset.get("train", {}), preset.get("continue", {}), preset.get("reproduce", {})
    prefix, more, reference = train.get("steps", 150), after.get("more_steps", 100), wanted.get("reference_steps", 400)
    where = ["--config", preset_name, "--run-dir", run_dir]
    for key, allowed in (("prepare", PREPARE), ("launch", LAUNCH)):
        if not allowed.fullmatch(str(wanted.get(key, ""))):
            raise UserError(f"preset {preset_name}: reproduce does not run {key}: {wanted[key]!r}; want {allowed.pattern}")
    for name in wanted.get("continue_from", []):
        safe_name(str(name), f"preset {preset_name}, continue_from")

    def stage(script: str, *flags: str) -> list[str]:
        return ["accelerate", "launch", *wanted.get("launch", "").split(), script, *where, *flags]

    # Without it stage 2 takes all that is there, and the reference run beside it goes on making checkpoints.
    last = [] if "last_step" in preset.get("extract", {}) else ["--last-step", str(prefix)]
    jobs = []
    if wanted.get("prepare"):
        jobs.append(Job("prepare", [*wanted["prepare"].split(), "--run-dir", run_dir], [], 5))
    jobs += [
        Job("01", stage("01_train_lora_grpo.py"), ["prepare"], prefix),
        Job("01 reference", stage("01_train_lora_grpo.py", "--steps", str(reference)), ["01"], reference - prefix),
        Job("02", stage("02_extract_deltas.py", *last), ["01"], 15),
        Job("03", stage("03_train_predictor.py"), ["02"], 180),
        Job("04", stage("04_extrapolate.py"), ["03"], 15),
    ]
    jobs.append(Job("04 oracle", stage("04_extrapolate.py", "--methods", "oracle"), ["04", "01 reference"], 15))
    jobs.append(Job("06 sweep", stage("06_eval.py", "--policies", "extrapolated/*"), ["04 oracle"], 200))
    for start in wanted.get("continue_from", ["next-weighted_alpha1.5"]):
        name, merged = start.removesuffix("_merged"), start.endswith("_merged")
        jobs.append(
            Job(f"05 {start}", stage("05_continue_rl.py", "--start", name, *(["--restart", "merged"] if merged else [])), ["04"], more)
        )
    jobs.append(Job("06", stage("06_eval.py"), [job.name for job in jobs], 60))
    known = {job.name for job in jobs}
    for job in jobs:
        job.needs = [name for name in job.needs if name in known]
    return jobs


class Runner:
    """Runs jobs whose needs are met, `lanes` at a time, in the order of the list, and shows what they print."""

    def __init__(self, jobs: list[Job], lanes: int, record: pathlib.Path, stamp: str):
        self.jobs, self.lanes, self.record, self.stamp = jobs, lanes, record, stamp
        self.finished = set()
        self.running: dict[str, subprocess.Popen] = {}
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
            print(f"done already: {', '.join(job.name for job in self.jobs if job.name in self.finished)}")
        remaining = [job for job in self.jobs if job.name not in self.finished]
        total, began, lane_seconds = sum(job.work for job in remaining), time.monotonic(), 0.0
        bar = tqdm(
            total=round(total), desc="whole experiment", bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} gone{postfix}", postfix=""
        )
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
                bar.set_postfix_str(f"about {lane_seconds / max(done, 1) * (total - done) / self.lanes / 60:.0f} min left")
        finally:
            for process in self.running.values():  # the whole group: the launcher does not pass a signal on to the stage it started
                os.killpg(process.pid, signal.SIGINT)
            for process in self.running.values():
                process.wait()
            bar.close()

    def _start_ready(self, bar) -> None:
        for job in self.jobs:
            if len(self.running) < self.lanes and job.name not in self.finished | self.running.keys() and set(job.needs) <= self.finished:
                bar.write(f"\n{job.heading}\n$ {job.line}")
                environment = {
                    "OMP_NUM_THREADS": "1",
                    **os.environ,
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
                threading.Thread(target=self._read, args=(job, process), daemon=True).start()

    def _read(self, job: Job, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self.output.put((job, line.rstrip()))
        self.output.put((job, None))

    def _show(self, job: Job, line: str, bar) -> None:
        if match := PROGRESS.match(line):
            at, last = int(match[1]), int(match[2])
            first = self.first_step.setdefault(job.name, at - 1 if line.startswith("step") else 0)
            self.progress[job.name] = job.work * (at - first) / max(last - first, 1)
        if line.strip():
            bar.write(f"[{job.name}] {line}")

    def _end(self, job: Job) -> None:
        code = self.running.pop(job.name).wait()
        if code:
            raise UserError(f"this command failed (exit code {code}); its message is above: {job.line}")
        self.finished.add(job.name)
        self.progress[job.name] = job.work
        done = read_json(self.record, "this command") if self.record.exists() else {}
        write_json(self.record, {**done, job.line: self.stamp})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", help="a name in common/presets or a YAML file")
    parser.add_argument("--run-dir", help="where everything goes [runs/<preset>]")
    parser.add_argument("--jobs", type=int, help="commands at a time [the preset's]")
    parser.add_argument("--print", action="store_true", help="show the commands without running them")
    args = parser.parse_args()
    preset = configs.load_preset(args.preset)
    run_dir = args.run_dir or f"runs/{pathlib.Path(args.preset).stem}"
    jobs = plan(args.preset, preset, run_dir)
    if args.print:
        print("\n".join(job.line for job in jobs))
        return
    stamp = hashlib.sha256(json.dumps(preset, sort_keys=True).encode()).hexdigest()[:16]
    lanes = args.jobs or preset.get("reproduce", {}).get("jobs", 1)
    Runner(jobs, lanes, pathlib.Path(run_dir) / "reproduce.json", stamp).run()


if __name__ == "__main__":
    configs.run_stage(main)
