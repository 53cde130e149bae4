"""Kills the stages of an experiment at random moments and starts them again with the same command.
The result is compared with a run that was left in peace.

    python tests/bench/torture.py --preset demo --kills 100 --out runs/torture

The commands are those of `reproduce`, one after another. A kill is SIGKILL or SIGTERM. It comes at
a random moment of the stage, or just before or after the n-th rename that the stage makes (n = 1,
2, ... is its start or resume). Every fifth comes right after the restart. Where a stage ends before
its moment, the kill moves to the next command; the last is typed until all are spent. Every file of
both run directories is compared bit for bit, but for what tells the time (keys with "seconds",
report.md, Fig. 5). A training that began further back than it had to is a difference too.

A stage is a fork of this process, which has the libraries loaded, so kills hit the stage's own work
and not its imports.
"""

import argparse
import collections
import importlib
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# What a stage would load after the fork.
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2.tokenization_qwen2  # noqa: F401

from common.files import config
from common.files.read import HASHES
from common.files.stage import run_stage
from common.reproduce import plans

TELLS_TIME = ("report.md", "report.html", "fig5_cost.png")
NO_STAGES = ("reproduce.json", "printed.txt")  # written by others
# The exit codes of a signal: the stage's own, and those before its handler is there.
SIGNALS = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}


class Stage:
    """A command of the experiment, as a fork of this process in a process group of its own."""

    def __init__(self, argv: list[str], log: pathlib.Path, at_rename: tuple | None = None):
        """at_rename: (n, signal, after): it sends itself the signal at its n-th rename."""
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
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has not got to its setsid yet
            os.kill(self.pid, number)

    def wait(self, seconds: float = 36000) -> int | None:
        """The exit code, minus the signal's number for a killed one, or None if it still runs."""
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
    """This process sends itself the signal before or after its n-th rename."""
    rename, count = os.replace, itertools.count(1)

    def counted(*paths):
        now = next(count) == n
        if now and not after:
            os.kill(os.getpid(), number)
        rename(*paths)
        if now:
            os.kill(os.getpid(), number)

    os.replace = counted


def commands(preset: str, run: pathlib.Path) -> list[list[str]]:
    """Every command of the experiment, in order, from the script or module on."""
    found = []
    for job in plans.single(preset, config.load_preset(preset), str(run)):
        words = enumerate(job.argv)
        found.append(job.argv[next(i for i, w in words if re.match(r"0\d_|common\.", w)) :])
    return found


def undisturbed(lines: list[list[str]], run: pathlib.Path) -> list[float]:
    """Runs every command; returns the seconds each took."""
    seconds, log = [], run.with_name("whole.log")
    for argv in lines:
        began = time.monotonic()
        if code := Stage(argv, log).wait():
            raise SystemExit(f"exit code {code}: {' '.join(argv)}; see {log}")
        seconds.append(time.monotonic() - began)
        print(f"{seconds[-1]:6.1f} s  {' '.join(argv)}", flush=True)
    return seconds


# The signal, "clock" or "rename", and whether it comes right after the kill before it.
Kill = collections.namedtuple("Kill", "number moment at_once")


def plan(lines: list[list[str]], kills: int, rng: random.Random) -> dict[int, list[Kill]]:
    """The kills due from each command on.

    The stages take turns, so do a stage's commands, and all kinds come equally often.
    """
    names = [argv[0][:2] for argv in lines]
    numbers = sorted({name for name in names if name.isdigit()})
    stages = [[i for i, name in enumerate(names) if name == number] for number in numbers]
    found, kinds, turn = collections.defaultdict(list), [], 0
    for i in range(kills):
        kinds = kinds or rng.sample([*itertools.product(SIGNALS, ("clock", "rename"))], 4)
        at_once = i % 5 == 4
        if not at_once:
            own, again = stages[turn % len(stages)], turn // len(stages)
            at, turn = own[again % len(own)], turn + 1
        found[at].append(Kill(*kinds.pop(), at_once))
    return found


def begin(
    argv: list[str], log: pathlib.Path, kill: Kill | None, seconds: float, rng: random.Random
) -> tuple[int, bool]:
    """Runs a command with the kill that is due, within so many seconds of its start.

    Returns the exit code and whether the kill was sent.
    """
    if kill and kill.moment == "rename":
        at = (rng.randint(1, 2 if kill.at_once else 12), kill.number, rng.random() < 0.5)
        return Stage(argv, log, at).wait(), True
    stage = Stage(argv, log)
    sent = bool(kill) and stage.wait(rng.uniform(0, seconds)) is None
    if sent:
        stage.kill(kill.number)
    return stage.wait(), sent


def disturbed(
    lines: list[list[str]],
    run: pathlib.Path,
    seconds: list[float],
    kills: int,
    rng: random.Random,
) -> tuple[collections.Counter, list[str]]:
    """Runs every command with `kills` kills.

    Returns how many by (stage, signal, moment), and each training that began too far back.
    """
    log, done, astray = run.with_name("killed.log"), collections.Counter(), []
    log.touch()
    planned, due = plan(lines, kills, rng), []
    for i, argv in enumerate(lines):
        due += planned[i]
        killed = False
        while True:
            kill = due[0] if due else None
            if kill and kill.at_once and not killed:
                kill = kill._replace(at_once=False)
            soon = min(0.5, seconds[i]) if kill and kill.at_once else seconds[i]
            folder, printed = trained_in(run, argv), log.stat().st_size
            wanted = whole_until(folder) if folder else 0
            code, sent = begin(argv, log, kill, soon, rng)
            told = log.read_bytes()[printed:].decode(errors="replace")
            if folder and (wrong := too_far_back(wanted, told)):
                astray.append(f"{wrong}: {' '.join(argv)}")
            if code == 0:
                if due and argv is lines[-1]:
                    continue
                break  # done; a kill that came too late is still due
            if not (sent and code in SIGNALS[kill.number]):
                raise SystemExit(f"exit code {code}: {' '.join(argv)}; see {log}")
            again = ", again at once" if kill.at_once else ""
            done[argv[0][:2], kill.number, kill.moment + again] += 1
            due.pop(0)
            killed = True
    return done, astray


def trained_in(run: pathlib.Path, argv: list[str]) -> pathlib.Path | None:
    """The folder in which this command trains a policy, if it does."""
    if argv[0][:2] == "05":
        start = argv[argv.index("--start") + 1]
        return run / "continued" / (start + ("_merged" if "merged" in argv else ""))
    return run / "train" if argv[0][:2] == "01" else None


def whole_until(folder: pathlib.Path) -> int:
    """The step that a training in `folder` has to go on after, 0 if it has to begin.

    It is that of the last resume state, and there has to be one for every step before the last one
    in the log, at which one is due.
    """
    steps = [int(path.name.removeprefix("step_")) for path in (folder / "resume").glob("step_*")]
    log = folder / "metrics.jsonl"
    if rows := log.read_text().splitlines() if log.exists() else []:
        every = json.loads((folder / "config.json").read_text())["config"]["resume_every"]
        last, first = (json.loads(rows[i])["step"] for i in (-1, 0))
        before = (last - 1) // every * every
        steps.append(before if before >= first else 0)
    return max(steps, default=0)


def too_far_back(wanted: int, printed: str) -> str | None:
    """What is wrong if a training that could go on after step `wanted` printed this."""
    found = re.search(r"going on after step (\d+)", printed)
    if not found and not re.search(r"step \d+/|done:", printed):  # it did not get so far
        return None
    step = int(found[1]) if found else 0
    return None if step == wanted else f"went on after step {step}, not {wanted}"


def plain(path: pathlib.Path, run: pathlib.Path) -> object:
    """What of a file is compared: JSON without times, text without the run directory's place."""

    def timeless(value):
        if isinstance(value, dict):
            clocks = [key for key in value if "seconds" in key or key == "tokens_per_second"]
            return {key: timeless(item) for key, item in value.items() if key not in clocks}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl", ".md"):
        content = content.replace(str(run).encode(), b"{run_dir}")
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in content.splitlines()]
    value = timeless(json.loads(content)) if path.suffix == ".json" else content
    if path.name == HASHES:  # a config names the run directory's place; it is compared itself
        value = {name: found for name, found in value.items() if not name.endswith("config.json")}
    return value


def differences(one: pathlib.Path, two: pathlib.Path) -> list[str]:
    """What the run directory `two` has otherwise than `one`, files under temporary names too."""
    names = []
    for run in (one, two):
        files = {path for path in run.rglob("*") if path.is_file()}
        kept = {path for path in files if path.name not in (*TELLS_TIME, *NO_STAGES)}
        names.append({str(path.relative_to(run)) for path in kept})
    found = [f"only in {one}: {name}" for name in sorted(names[0] - names[1])]
    found += [f"only in {two}: {name}" for name in sorted(names[1] - names[0])]
    both = sorted(names[0] & names[1])
    found += [f"left behind: {name}" for name in both if "/." in f"/{name}"]
    return found + [
        f"differs: {name}" for name in both if plain(one / name, one) != plain(two / name, two)
    ]


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--preset", default="demo", help="a name in common/presets or a YAML file")
    parser.add_argument("--kills", type=int, default=100, help="every stage gets its share")
    parser.add_argument("--seed", type=int, default=0, help="of stages, moments and signals")
    folder = "folder for the run directories; what is in it goes"
    parser.add_argument("--out", type=pathlib.Path, required=True, help=folder)
    finished = "a finished run of the preset [one is made]; kills then come within 2 s of a start"
    parser.add_argument("--against", type=pathlib.Path, help=finished)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    out = args.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    whole = args.against.absolute() if args.against else out / "whole" / "run"
    (out / "whole").mkdir(parents=True)
    run = out / "killed" / whole.name
    run.parent.mkdir()
    first, lines = (commands(args.preset, folder) for folder in (whole, run))
    seconds = [2.0] * len(lines) if args.against else undisturbed(first, whole)
    done, found = disturbed(lines, run, seconds, args.kills, random.Random(args.seed))
    found += differences(whole, run)
    print("| stage | signal | moment | kills |\n|---|---|---|--:|")
    for (stage, number, moment), count in sorted(done.items()):
        print(f"| {stage} | {signal.Signals(number).name} | {moment} | {count} |")
    print(f"{done.total()} kills, as many restarts; differences: {len(found)}")
    print("\n".join(found))
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
