"""Runs the commands of a plan: those whose needs are met, as many at a time as there are lanes."""

import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading

from tqdm import tqdm

from common import UserError
from common.files.read import read_json
from common.files.write import append_text, write_json
from common.reproduce.plans import Job

# For every command, where nobody has set them: one thread, and glibc keeps the memory of tensors
# that are gone, because they come again (5% on a CPU).
DEFAULTS = {"OMP_NUM_THREADS": "1"}
DEFAULTS |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), "500000000")
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"


class Runner:
    """Runs jobs in the order of the list, one a lane, and shows what they print, or logs it.

    A lane is what its jobs see as CUDA_VISIBLE_DEVICES, or None for what this process sees.
    `record` is the file of the commands that are done; `stamp` changes with the preset.
    """

    def __init__(self, jobs: list[Job], lanes: list, record: pathlib.Path, stamp: str, logs=None):
        self.jobs, self.free, self.record, self.stamp, self.logs = jobs, lanes, record, stamp, logs
        self.finished: set[str] = set()
        self.running: dict[str, tuple] = {}  # name -> process, its lane, the thread that reads it
        self.output: queue.Queue = queue.Queue()  # (job, line), and (job, None) at its end
        self.bar = None

    def run(self) -> None:
        """Runs everything that is not done. Raises UserError naming the command that failed."""
        self._skip_finished()
        work = sum(job.work for job in self.jobs if job.name not in self.finished)
        self.bar = tqdm(total=work, desc="whole experiment", bar_format=BAR)
        number = signal.SIGINT
        try:
            while len(self.finished) < len(self.jobs):
                self._start_ready()
                job, line = self.output.get()
                if line is None:
                    self._end(job)
                else:
                    self._show(job, line)
        except KeyboardInterrupt as stop:
            number = stop.args[0] if stop.args else number
            raise
        finally:
            for process, *_ in self.running.values():  # a launcher does not pass a signal on
                os.killpg(process.pid, number)
            for process, _, reader in self.running.values():
                reader.join()  # the output ends with the stage, not with its launcher
                process.wait()
            self.bar.close()

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

    def _start_ready(self) -> None:
        for job in self.jobs:
            known = self.finished | self.running.keys()
            if self.free and job.name not in known and set(job.needs) <= self.finished:
                self.bar.write(f"$ {job.line}")
                self._start(job, self.free.pop(0))

    def _start(self, job: Job, lane: str | None) -> None:
        own = {"PYTHONUNBUFFERED": "1"} | ({} if lane is None else {"CUDA_VISIBLE_DEVICES": lane})
        paths = [str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")]
        process = subprocess.Popen(
            job.argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**DEFAULTS, **os.environ, **own, "PATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        reader = threading.Thread(target=self._read, args=(job, process), daemon=True)
        self.running[job.name] = process, lane, reader
        reader.start()

    def _read(self, job: Job, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self.output.put((job, line.rstrip()))
        self.output.put((job, None))

    def _log(self, job: Job) -> pathlib.Path:
        return self.logs / f"{job.name.replace('/', '.').replace(' ', '_')}.log"

    def _show(self, job: Job, line: str) -> None:
        if self.logs:
            append_text(self._log(job), line + "\n")
        elif line.strip():
            self.bar.write(f"[{job.name}] {line}")

    def _end(self, job: Job) -> None:
        process, lane, _ = self.running.pop(job.name)
        self.free.append(lane)
        if code := process.wait():
            if self.logs and self._log(job).is_file():
                tail = self._log(job).read_text(encoding="utf-8").splitlines()[-20:]
                print("\n".join(tail), file=sys.stderr)
            text = f"this command failed (exit code {code}); its message is above"
            raise UserError(f"{text}: {job.line}")
        self.finished.add(job.name)
        self.bar.update(job.work)
        write_json(self.record, {**self._done(), job.line: self.stamp})
