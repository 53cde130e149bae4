"""Runs the commands of a plan: those whose needs are met, as many at a time as there are lanes."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from concurrent import futures

from tqdm import tqdm

from common import UserError
from common.files.read import read_json
from common.files.stage import signals
from common.files.write import write_json, writing
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
        self.running: dict[futures.Future, tuple] = {}  # -> job, its process, its lane
        self.done = read_json(record, "this command") if record.exists() else {}
        same = {job.name for job in jobs if self.done.get(job.line) == stamp}
        # The last command, the evaluation, always runs: it sees for itself what is measured.
        self.finished = [job.name for job in jobs[:-1] if {job.name, *job.needs} <= same]
        self.waiting = [job for job in jobs if job.name not in self.finished]

    def run(self) -> None:
        """Runs everything that is not done. Raises UserError naming the command that failed."""
        if self.finished:
            count = f"{len(self.finished)} of {len(self.jobs)} commands"
            print(f"done already: {count if self.logs else ', '.join(self.finished)}")
        work = sum(job.work for job in self.waiting)
        self.bar = tqdm(total=work, desc="whole experiment", bar_format=BAR)
        with self.bar, futures.ThreadPoolExecutor(len(self.free)) as readers:
            try:
                while self.waiting or self.running:
                    for job in [job for job in self.waiting if {*job.needs} <= {*self.finished}]:
                        if self.free:
                            self._start(job, readers)
                    ended, _ = futures.wait(self.running, return_when=futures.FIRST_COMPLETED)
                    for reader in ended:
                        self._end(reader)
            finally:
                for _, process, _ in self.running.values():  # a launcher does not pass a signal on
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, [*signals, signal.SIGINT][0])

    def _start(self, job: Job, readers: futures.Executor) -> None:
        self.bar.write(f"$ {job.line}")
        self.waiting.remove(job)
        lane = self.free.pop(0)
        paths = [str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")]
        own = {"PYTHONUNBUFFERED": "1", "PATH": os.pathsep.join(paths)}
        env = DEFAULTS | os.environ | own | ({"CUDA_VISIBLE_DEVICES": lane} if lane else {})
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        process = subprocess.Popen(job.argv, env=env, start_new_session=True, **output)
        self.running[readers.submit(self._read, job, process)] = job, process, lane

    def _log(self, job: Job) -> pathlib.Path:
        return self.logs / f"{job.name.replace('/', '.').replace(' ', '_')}.log"

    def _read(self, job: Job, process: subprocess.Popen) -> int:
        """The exit code. The output ends with the stage, not with its launcher."""
        if self.logs:
            self.logs.mkdir(exist_ok=True)
        with open(self._log(job) if self.logs else os.devnull, "a", encoding="utf-8") as log:
            print(f"$ {job.line}", file=log, flush=True)
            for line in process.stdout:
                print(line, end="", file=log, flush=True)
                if line.strip() and not self.logs:
                    self.bar.write(f"[{job.name}] {line.rstrip()}")
        return process.wait()

    def _end(self, reader: futures.Future) -> None:
        job, _, lane = self.running[reader]
        with writing(self.logs or self.record):  # names the folder where the disk is full
            code = reader.result()
        if code:
            if self.logs:
                text = self._log(job).read_text(encoding="utf-8")
                lines = text.rpartition(f"$ {job.line}\n")[2].splitlines()  # of this attempt
                told = dict.fromkeys(line for line in lines if line.startswith("error: "))
                print("\n".join(told or lines[-20:]), file=sys.stderr)
            raise UserError(f"this command failed (exit code {code}), see above: {job.line}")
        del self.running[reader]
        self.free.append(lane)
        self.finished.append(job.name)
        self.bar.update(job.work)
        self.done[job.line] = self.stamp
        write_json(self.record, self.done)
