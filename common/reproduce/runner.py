"""Runs the commands of a plan: those whose needs are met, as many at a time as there are lanes."""

import collections
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time

from tqdm import tqdm

from common import UserError
from common.files.read import read_json
from common.files.write import append_text, write_json
from common.reproduce.plans import Job

PROGRESS = re.compile(r"(?:step )?(\d+)/(\d+) ")
# For every command, where nobody has set them: one thread, and glibc keeps the memory of tensors
# that are gone, because they come again (5% on a CPU).
DEFAULTS = {"OMP_NUM_THREADS": "1"}
DEFAULTS |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), "500000000")
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone{postfix}"


class Runner:
    """Runs jobs in the order of the list, one a lane, and shows what they print, or logs it.

    A lane is what its jobs see as CUDA_VISIBLE_DEVICES, or None for what this process sees.
    `record` is the file of the commands that are done; `stamp` changes with the preset.
    """

    def __init__(self, jobs: list[Job], lanes: list, record: pathlib.Path, stamp: str, logs=None):
        self.jobs, self.lanes, self.record, self.stamp, self.logs = jobs, lanes, record, stamp, logs
        self.free, self.lane_of = list(lanes), {}
        self.last_lines: dict[str, collections.deque] = {}
        self.finished: set[str] = set()
        self.running: dict[str, subprocess.Popen] = {}
        self.readers: dict[str, threading.Thread] = {}  # of what they print
        self.output: queue.Queue = queue.Queue()  # (job, line), and (job, None) at its end
        self.progress = {job.name: 0.0 for job in jobs}  # in units of work
        self.first_step: dict[str, int] = {}

    def run(self) -> None:
        """Runs everything that is not done. Raises UserError naming the command that failed."""
        self._skip_finished()
        left = [job for job in self.jobs if job.name not in self.finished]
        total, began, lane_seconds = sum(job.work for job in left), time.monotonic(), 0.0
        bar = tqdm(total=round(total), desc="whole experiment", bar_format=BAR, postfix="")
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
                done = sum(self.progress[j.name] for j in left)
                bar.n = round(done)
                if done > total / 100:  # before that there is nothing to reckon with
                    minutes = lane_seconds / done * (total - done) / len(self.lanes) / 60
                    bar.set_postfix_str(f"about {minutes:.0f} min left")
        except KeyboardInterrupt as stop:
            number = stop.args[0] if stop.args else number
            raise
        finally:
            self._stop(number)
            bar.close()

    def _done(self) -> dict:
        return read_json(self.record, "this command") if self.record.exists() else {}

    def _skip_finished(self) -> None:
        """The last command, the evaluation, always runs: it sees for itself what is measured."""
        done = self._done()
        same = {job.name for job in self.jobs if done.get(job.line) == self.stamp}
        skipped = [job.name for job in self.jobs[:-1] if {job.name, *job.needs} <= same]
        self.finished = {*skipped}
        if skipped:
            count = f"{len(skipped)} of {len(self.jobs)} commands"
            print(f"done already: {count if self.logs else ', '.join(skipped)}")

    def _stop(self, number: int) -> None:
        """Passes a signal on to all that runs, and waits for its end."""
        for process in self.running.values():  # the group: a launcher does not pass a signal on
            os.killpg(process.pid, number)
        for name, process in self.running.items():
            self.readers[name].join()  # the output ends with the stage, not with its launcher
            process.wait()

    def _start_ready(self, bar) -> None:
        for job in self.jobs:
            known = self.finished | self.running.keys()
            if self.free and job.name not in known and set(job.needs) <= self.finished:
                bar.write(f"$ {job.line}" if self.logs else f"\n{job.heading}\n$ {job.line}")
                self._start(job)

    def _start(self, job: Job) -> None:
        lane = self.lane_of[job.name] = self.free.pop(0)
        self.last_lines[job.name] = collections.deque(maxlen=20)
        own = {"PYTHONUNBUFFERED": "1"} | ({} if lane is None else {"CUDA_VISIBLE_DEVICES": lane})
        paths = [str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")]
        process = self.running[job.name] = subprocess.Popen(
            job.argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**DEFAULTS, **os.environ, **own, "PATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        reader = threading.Thread(target=self._read, args=(job, process), daemon=True)
        self.readers[job.name] = reader
        reader.start()

    def _read(self, job: Job, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self.output.put((job, line.rstrip()))
        self.output.put((job, None))

    def _show(self, job: Job, line: str, bar) -> None:
        if match := PROGRESS.match(line):
            at, last = int(match[1]), int(match[2])
            begun = at - 1 if line.startswith("step") else 0
            first = self.first_step.setdefault(job.name, begun)
            self.progress[job.name] = job.work * (at - first) / max(last - first, 1)
        self.last_lines[job.name].append(line)
        if self.logs:
            name = job.name.replace("/", ".").replace(" ", "_")
            append_text(self.logs / f"{name}.log", line + "\n")
        elif line.strip():
            bar.write(f"[{job.name}] {line}")

    def _end(self, job: Job) -> None:
        code = self.running.pop(job.name).wait()
        self.free.append(self.lane_of.pop(job.name))
        if code:
            if self.logs:
                print("\n".join(self.last_lines[job.name]), file=sys.stderr)
            text = f"this command failed (exit code {code}); its message is above"
            raise UserError(f"{text}: {job.line}")
        self.finished.add(job.name)
        self.progress[job.name] = job.work
        write_json(self.record, {**self._done(), job.line: self.stamp})
