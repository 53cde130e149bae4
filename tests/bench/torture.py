"""Kills the stages of an experiment at random moments and starts them again with the same command.
The result is compared with a run that was left in peace.

    python tests/bench/torture.py --preset demo --kills 100 --out runs/torture
    python tests/bench/torture.py --preset tests/tiny.yaml --kills 30 --processes 2 --out runs/two

The commands are those of `reproduce`, one after another. A kill is SIGKILL or SIGTERM. It comes at
a random moment of the stage, or just before or after the n-th rename that the stage makes (n = 1,
2, ... is its start or resume). Every fifth comes right after the restart. Where a stage ends before
its moment, the kill moves to the next command; the last is typed until all are spent. Every file of
both run directories is compared bit for bit, but for what tells the time (keys with "seconds",
report.md, Fig. 5). A training that began further back than it had to is a difference too.

A stage is a fork of this process, which has the libraries loaded, so kills hit the stage's own work
and not its imports. With --processes the commands are typed as they are, `accelerate launch` with
so many processes. (Such a run equals one of one process only to float tolerance, so --against has
to be a run of as many.)
"""

import argparse
import collections
import contextlib
import importlib
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2.tokenization_qwen2  # noqa: F401  (these two: what a stage would load after the fork)

from common.files import config as configs
from common.files.read import HASHES
from common.files.stage import run_stage
from common.reproduce import plans

TELLS_TIME = ("report.md", "fig5_cost.png")
NO_STAGES = ("reproduce.json", "printed.txt")  # written by others
SIGNALS = {
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (143, -signal.SIGTERM),
}  # the second: before the stage's handler is there


class Typed:
    """A command of the experiment as it is typed. A signal goes to all its processes: the
    launcher's, the stage's, the verifier's."""

    def __init__(self, argv: list[str], log: pathlib.Path, at_rename: None = None):
        self.mark = (
            f"TORTURE={log}:{time.monotonic_ns()}"  # in the environment of all of them, orphans too
        )
        name, value = self.mark.split("=")
        path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(log, "ab") as file:
            self.launcher = subprocess.Popen(
                argv,
                cwd=ROOT,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, name: value, "PATH": path, "PYTHONUNBUFFERED": "1"},
            )

    def alive(self) -> list[int]:
        found = []
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended just now
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def kill(self, number: int) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float) -> int | None:
        """The launcher's exit code once all are gone, or None if any still runs after so many
        seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.launcher.poll() is not None and not self.alive():
                return self.launcher.returncode
            time.sleep(0.05)
        return None


class Stage:
    """A command of the experiment, started as a fork of this process in a process group of its
    own."""

    def __init__(
        self, argv: list[str], log: pathlib.Path, at_rename: tuple[int, int, bool] | None = None
    ):
        """at_rename: (n, signal, after): the stage sends itself the signal before or after its
        n-th rename."""
        sys.stdout.flush()
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            os.setsid()
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout.reconfigure(line_buffering=True)  # what it printed is not to die with it
            os.chdir(ROOT)
            if at_rename:
                signal_at_rename(*at_rename)
            os._exit(call(argv))

    def kill(self, number: int) -> None:
        os.killpg(self.pid, number)

    def wait(self, seconds: float) -> int | None:
        """The exit code (minus the signal's number for a killed one), or None if it still runs
        after so many seconds."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                break
            else:
                time.sleep(0.005)
        return self.code


def call(argv: list[str]) -> int:
    """A stage's or the preparation's main in this process."""
    sys.argv, code = argv, 0
    try:
        run_stage(importlib.import_module(argv[0].removesuffix(".py")).main)
    except SystemExit as stop:
        code = stop.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def signal_at_rename(n: int, number: int, after: bool) -> None:
    rename, count = os.replace, 0

    def counted(*paths):
        nonlocal count
        count += 1
        if count == n and not after:
            os.kill(os.getpid(), number)
        rename(*paths)
        if count == n and after:
            os.kill(os.getpid(), number)

    os.replace = counted


def commands(preset_name: str, run: pathlib.Path, processes: int) -> list[list[str]]:
    """Every command of the experiment, in order: as typed with so many processes, or with 0 from
    the script or module on."""
    found = []
    for job in plans.single(preset_name, configs.load_preset(preset_name), str(run)):
        first = script_at(job.argv)
        more = (
            [
                "--config_file",
                "common/accelerate/cpu_processes.yaml",
                "--num_processes",
                str(processes),
            ]
            if processes > 1
            else []
        )
        more = more if job.argv[0] == "accelerate" else []
        found.append(
            [*job.argv[:first], *more, *job.argv[first:]] if processes else job.argv[first:]
        )
    return found


def script_at(argv: list[str]) -> int:
    return next(
        i for i, word in enumerate(argv) if word.endswith(".py") or word.startswith("common.")
    )


def undisturbed(lines: list[list[str]], run: pathlib.Path, start: type) -> list[float]:
    """Runs every command; returns the seconds each took."""
    seconds = []
    for argv in lines:
        began = time.monotonic()
        if code := start(argv, run.with_name("whole.log")).wait(36000):
            raise SystemExit(
                f"exit code {code}: {' '.join(argv)}; see {run.with_name('whole.log')}"
            )
        seconds.append(time.monotonic() - began)
        print(f"{seconds[-1]:6.1f} s  {' '.join(argv)}", flush=True)
    return seconds


Kill = collections.namedtuple(
    "Kill", "number moment at_once"
)  # the signal, "clock" or "rename", right after the kill before it?


def plan(
    names: list[str], moments: list[str], kills: int, rng: random.Random
) -> dict[int, list[Kill]]:
    """The kills due from each command on: the stages take turns, so do a stage's commands, and all
    kinds come equally often."""
    stages = [
        [i for i, name in enumerate(names) if name == stage]
        for stage in sorted(set(names))
        if stage.isdigit()
    ]
    found, kinds, turn = collections.defaultdict(list), [], 0
    for i in range(kills):
        kinds = kinds or rng.sample([*itertools.product(SIGNALS, moments)], 2 * len(moments))
        at_once = i % 5 == 4
        if not at_once:
            own, again = stages[turn % len(stages)], turn // len(stages)
            at, turn = own[again % len(own)], turn + 1
        found[at].append(Kill(*kinds.pop(), at_once))
    return found


def disturbed(
    lines: list[list[str]],
    run: pathlib.Path,
    start: type,
    seconds: list[float],
    kills: int,
    rng: random.Random,
) -> tuple[collections.Counter, list[str]]:
    """Runs every command with `kills` kills. Returns how many by (stage, signal, moment), and each
    training that began too far back."""
    log, done, astray = run.with_name("killed.log"), collections.Counter(), []
    log.touch()
    names = [argv[script_at(argv)][:2] for argv in lines]
    planned = plan(names, ["clock", "rename"] if start is Stage else ["clock"], kills, rng)
    due: list[Kill] = []
    for i, argv in enumerate(lines):
        due += planned[i]
        killed = False
        while True:
            kill, again = due[0] if due else None, bool(due) and due[0].at_once and killed
            at_rename = (
                (rng.randint(1, 2 if again else 12), kill.number, rng.random() < 0.5)
                if kill and kill.moment == "rename"
                else None
            )
            folder, printed = trained_in(run, argv), log.stat().st_size
            wanted = whole_until(folder) if folder else 0
            stage = start(argv, log, at_rename)
            wait = (
                rng.uniform(0, min(0.5, seconds[i]) if again else seconds[i])
                if kill and not at_rename
                else 36000.0
            )
            sent = at_rename is not None or stage.wait(wait) is None
            if sent and not at_rename:
                stage.kill(kill.number)
            code = stage.wait(36000)
            if folder and (
                wrong := too_far_back(wanted, log.read_bytes()[printed:].decode(errors="replace"))
            ):
                astray.append(f"{wrong}: {' '.join(argv)}")
            if code == 0:
                if due and argv is lines[-1]:
                    continue
                break  # done; a kill that came too late is still due
            known = start is Typed or (
                sent and code in SIGNALS[kill.number]
            )  # a launcher has exit codes of its own
            if not (sent and known):
                raise SystemExit(
                    f"exit code {code} after signal {kill.number if sent else 'none'}: {' '.join(argv)}; see {log}"
                )
            done[names[i], kill.number, kill.moment + (", again at once" if again else "")] += 1
            due.pop(0)
            killed = True
    return done, astray


def trained_in(run: pathlib.Path, argv: list[str]) -> pathlib.Path | None:
    """The folder in which this command trains a policy, if it does."""
    script = argv[script_at(argv)][:2]
    if script == "05":
        return (
            run
            / "continued"
            / (argv[argv.index("--start") + 1] + ("_merged" if "merged" in argv else ""))
        )
    return run / "train" if script == "01" else None


def whole_until(folder: pathlib.Path) -> int:
    """The step that a training in `folder` has to go on after, 0 if it has to begin.

    It is that of the last resume state, and there has to be one for every step before the last one
    in the log, at which one is due.
    """
    steps = [int(path.name.removeprefix("step_")) for path in (folder / "resume").glob("step_*")]
    if (folder / "metrics.jsonl").exists() and (
        rows := (folder / "metrics.jsonl").read_text().splitlines()
    ):
        every = json.loads((folder / "config.json").read_text())["config"]["resume_every"]
        last, first = (json.loads(rows[i])["step"] for i in (-1, 0))
        steps.append(before if (before := (last - 1) // every * every) >= first else 0)
    return max(steps, default=0)


def too_far_back(wanted: int, printed: str) -> str | None:
    """What is wrong if a training that had whatever it needs to go on after step `wanted` printed
    this."""
    if "process(es) on" not in printed:  # it did not get so far
        return None
    found = re.search(r"going on after step (\d+)", printed)
    if not found and not re.search(r"step \d+/|done:", printed):  # nor so far
        return None
    step = int(found[1]) if found else 0
    return None if step == wanted else f"went on after step {step}, not {wanted}"


def plain(path: pathlib.Path, run: pathlib.Path) -> object:
    """What of a file is compared: JSON without times, text without the run directory's place, else
    the bytes."""

    def timeless(value):
        if isinstance(value, dict):
            return {
                key: timeless(item)
                for key, item in value.items()
                if "seconds" not in key and key != "tokens_per_second"
            }
        return [timeless(item) for item in value] if isinstance(value, list) else value

    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl", ".md"):
        content = re.sub(re.escape(str(run)).encode(), b"{run_dir}", content)
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in content.splitlines()]
    value = timeless(json.loads(content)) if path.suffix == ".json" else content
    if (
        path.name == HASHES
    ):  # a config names the run directory's place, so its hash is its own; it is compared itself
        value = {name: found for name, found in value.items() if not name.endswith("config.json")}
    return value


def differences(one: pathlib.Path, two: pathlib.Path) -> list[str]:
    """What the run directory `two` has otherwise than `one`; anything under a temporary name
    counts too."""
    names = [
        {
            str(p.relative_to(run))
            for p in run.rglob("*")
            if p.is_file() and p.name not in (*TELLS_TIME, *NO_STAGES)
        }
        for run in (one, two)
    ]
    found = [
        f"only in {run}: {name}"
        for run, mine, other in ((one, *names), (two, *names[::-1]))
        for name in sorted(mine - other)
    ]
    found += [
        f"left behind: {name}"
        for name in sorted(names[1])
        if "/." in f"/{name}" and name in names[0]
    ]
    return found + [
        f"differs: {name}"
        for name in sorted(names[0] & names[1])
        if plain(one / name, one) != plain(two / name, two)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo", help="a name in common/presets or a YAML file")
    parser.add_argument(
        "--kills", type=int, default=100, help="of which every stage gets its share"
    )
    parser.add_argument("--seed", type=int, default=0, help="of stages, moments and signals")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        help="folder for the run directories; what is in it goes",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        help="type the commands, with so many processes [forks of this process]",
    )
    parser.add_argument(
        "--against", type=pathlib.Path, help="a finished run of the preset [one is made]"
    )
    parser.add_argument(
        "--within",
        type=float,
        default=2.0,
        help="with --against: kills come so many seconds after a start at most [2]",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out = args.out.absolute()
    shutil.rmtree(args.out, ignore_errors=True)
    whole = args.against.absolute() if args.against else args.out / "whole" / "run"
    args.out.joinpath("whole").mkdir(parents=True)
    run, start = args.out / "killed" / whole.name, Typed if args.processes else Stage
    first, lines = (commands(args.preset, folder, args.processes) for folder in (whole, run))
    seconds = [args.within] * len(lines) if args.against else undisturbed(first, whole, start)
    run.parent.mkdir()
    done, found = disturbed(lines, run, start, seconds, args.kills, random.Random(args.seed))
    found += differences(whole, run)
    print("| stage | signal | moment | kills |\n|---|---|---|--:|")
    for (stage, number, moment), count in sorted(done.items()):
        print(f"| {stage} | {signal.Signals(number).name} | {moment} | {count} |")
    print(
        f"{done.total()} kills, as many restarts, {len(seconds)} commands; differences: {len(found)}"
    )
    print("\n".join(found))
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
