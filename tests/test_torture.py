"""Killed, starved and crowded: what was whole stays whole, the message is one line, and the same
command goes on."""

import collections
import contextlib
import errno
import fcntl
import importlib
import itertools
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import types

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY, call_stage, start_two
from test_stages import metrics, weights

from common import UserError
from common.files import config, read, stage, write
from common.reproduce import __main__ as reproduce
from common.reproduce import plans, runner
from common.rl import policy, rollout

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import torture

MERGED = "continued/next-aligned_alpha1.5_merged"
DELTAS = "deltas/model.layers.0.mlp.up_proj.safetensors"
WRITTEN = "is not as it was written"


# Killed


def test_killed_at_random_moments_every_stage_makes_what_it_makes_in_peace(finished_run, tmp_path):
    """The short form of tests/bench/torture.py. It also shows that the same seed gives the same
    files: finished_run is another run."""
    command = [
        sys.executable,
        "tests/bench/torture.py",
        "--preset",
        TINY,
        "--against",
        str(finished_run),
        "--out",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(
        [*command, "--kills", "8", "--seed", "425"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 kills" in result.stdout
    assert "differences: 0" in result.stdout
    for number, moment in itertools.product(("SIGKILL", "SIGTERM"), ("clock", "rename")):
        assert f"| {number} | {moment}" in result.stdout
    assert "again at once" in result.stdout


def test_training_killed_before_each_rename_of_two_steps_goes_on_after_the_last_whole_one(
    empty_run, tmp_path, monkeypatch, capsys
):
    """A kill leaves what is renamed, and the log. Each restart is killed one rename later than the
    one before it."""
    small = [
        "--steps",
        "2",
        "--prompts-per-step",
        "2",
        "--mini-batch",
        "2",
        "--rollouts",
        "2",
        "--max-new-tokens",
        "4",
    ]
    small += [
        "--backbone",
        str(empty_run / "backbone"),
        "--train-data",
        str(empty_run / "data" / "train.jsonl"),
    ]
    whole, run, log = tmp_path / "whole" / "run", tmp_path / "killed" / "run", tmp_path / "log"
    command = ["01_train_lora_grpo.py", "--config", TINY, *small, "--run-dir"]
    assert (
        call_stage(monkeypatch, capsys, *command, str(whole))[0] == 0
    )  # the forks then have loaded all that it loads
    n, kills, code = 0, collections.Counter(), None
    while code != 0:
        wanted, n = torture.whole_until(run / "train"), n + 1
        log.write_text("")
        code = torture.Stage([*command, str(run)], log, (n, signal.SIGKILL, False)).wait(300)
        printed = log.read_text()
        assert code in (0, -signal.SIGKILL), printed
        assert torture.too_far_back(wanted, printed) is None, (wanted, n)
        assert torture.whole_until(run / "train") >= wanted, n
        kills[wanted] += 1
        n *= (
            torture.whole_until(run / "train") == wanted
        )  # the next step is whole: from the first rename again
    assert [row["step"] for row in metrics(run / "train")] == [1, 2]
    assert torture.differences(whole, run) == []
    assert sorted(kills) == [0, 1, 2]
    assert (
        min(kills[0], kills[1]) > 10
    )  # three renames at a start, three of a checkpoint, four of a resume state


def test_a_training_that_began_too_far_back_is_noticed(tmp_path):
    (tmp_path / "resume" / "step_0004").mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"config": {"resume_every": 2}}')
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}}}\n' for step in range(1, 7))
    )
    assert (
        torture.whole_until(tmp_path) == 4
    )  # of step 6 there is the row, the state may have been on its way
    (tmp_path / "resume" / "step_0004").rmdir()
    assert torture.whole_until(tmp_path) == 4  # what was there counts
    begun = "1 process(es) on cpu\n"
    assert torture.too_far_back(4, begun + "going on after step 4\nstep 5/8") is None
    assert (
        torture.too_far_back(4, begun + "going on after step 2\n") == "went on after step 2, not 4"
    )
    assert torture.too_far_back(4, begun + "step 1/8") == "went on after step 0, not 4"
    assert torture.too_far_back(4, begun) is None  # killed before it said so


def test_the_comparison_sees_a_changed_bit_a_row_too_many_and_what_is_left_behind(
    finished_run, tmp_path
):
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    for run in (one, two):
        shutil.copytree(finished_run, run)
    assert torture.differences(one, two) == []
    for name in ("train/step_0003/adapter_model.safetensors", "backbone/model.safetensors"):
        content = bytearray((two / name).read_bytes())
        content[-1] ^= 1
        (two / name).write_bytes(content)
    log = two / "train" / "metrics.jsonl"
    log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")
    (two / "train" / ".step_0009.tmp").mkdir()
    (two / "train" / ".step_0009.tmp" / "half").write_text("")
    assert torture.differences(one, two) == [
        f"only in {two}: train/.step_0009.tmp/half",
        "differs: backbone/model.safetensors",
        "differs: train/metrics.jsonl",
        "differs: train/step_0003/adapter_model.safetensors",
    ]


def killed_at_rename(n: int, after: bool, work) -> int:
    """Does `work` in a fork that is killed before or after its n-th rename; returns the exit
    code."""
    pid = os.fork()
    if pid == 0:
        torture.signal_at_rename(n, signal.SIGKILL, after)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def replace_folder(path: pathlib.Path) -> None:
    with write.atomic_dir(path) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_folder_that_is_killed_while_it_is_replaced_is_old_new_or_not_there(tmp_path, n, after):
    folder = tmp_path / "stage"
    folder.mkdir()
    for name in "ab":
        (folder / "step").mkdir(exist_ok=True)
        (folder / "step" / name).write_text("old")
    assert killed_at_rename(n, after, lambda: replace_folder(folder / "step")) == -signal.SIGKILL
    named = contents(folder / "step") if (folder / "step").exists() else None
    assert named in (None, {"a": "old", "b": "old"}, {"a": "new", "b": "new"})
    assert named == {(1, False): {"a": "old", "b": "old"}, (2, True): {"a": "new", "b": "new"}}.get(
        (n, after)
    )
    write.claim(folder)
    replace_folder(folder / "step")
    write.release()
    assert contents(tmp_path) == {
        "stage/step/a": "new",
        "stage/step/b": "new",
    }  # neither temporary names nor a lock


@pytest.mark.parametrize(("after", "want"), [(False, "old"), (True, "new")])
def test_a_file_that_is_killed_while_it_is_written_is_old_or_new(tmp_path, after, want):
    (tmp_path / "stage").mkdir()
    path = tmp_path / "stage" / "f.json"
    path.write_text("old")
    assert killed_at_rename(1, after, lambda: write.write_text(path, "new")) == -signal.SIGKILL
    assert path.read_text() == want
    write.claim(tmp_path / "stage")
    write.release()
    assert contents(tmp_path) == {"stage/f.json": want}


def test_a_folder_killed_while_it_is_removed_is_gone_by_its_name(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "done.json").write_text("{}")
    assert killed_at_rename(1, True, lambda: write.remove(tmp_path / "stage")) == -signal.SIGKILL
    assert not (tmp_path / "stage").exists()
    write.claim(tmp_path / "stage")
    write.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "folder", "flags"),
    [
        ("03_train_predictor.py", "predictor/aligned", ["--recipes", "aligned"]),
        ("04_extrapolate.py", "extrapolated/none", ["--methods", "none"]),
    ],
)
def test_what_a_kill_after_the_last_write_left_goes_too(
    finished_run, tmp_path, monkeypatch, capsys, script, folder, flags
):
    shutil.copytree(finished_run, run := tmp_path / "run")
    before = contents_hash(run)
    place = (run / folder).parent
    (place / f".{(run / folder).name}.lock").write_text("")
    shutil.copytree(run / folder, place / f".{(run / folder).name}.old.tmp")
    assert call_stage(
        monkeypatch, capsys, script, "--config", TINY, "--run-dir", str(run), *flags
    ) == (0, "")
    assert contents_hash(run) == before


# Stopped


@pytest.mark.parametrize(("number", "want"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_stage_with_a_hint_how_to_go_on(capsys, number, want):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        stage.run_stage(lambda: os.kill(os.getpid(), number))
    assert stop.value.code == want
    assert (
        capsys.readouterr().err == "\nstopped: type the same command without --overwrite to go on\n"
    )
    assert signal.getsignal(number) == before


def test_a_signal_that_a_library_turns_into_another_error_is_a_signal(capsys):
    """A read of safetensors that is interrupted raises a ValueError about the shape of a storage."""

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None

    with pytest.raises(SystemExit) as stop:
        stage.run_stage(main)
    assert stop.value.code == 143
    assert "stopped: type the same command" in capsys.readouterr().err


def test_a_second_signal_while_a_stage_ends_changes_nothing(monkeypatch):
    """A launcher passes a signal on to a group that has it already."""
    monkeypatch.setattr(write, "release", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(BaseException) as stop:  # noqa: PT011
        stage.run_stage(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert (stop.type, stop.value.code) == (SystemExit, 130)


def test_a_signal_within_a_write_leaves_nothing_half_made(tmp_path):
    write.write_text(tmp_path / "log", "old")

    def main():
        with write.atomic_dir(tmp_path / "step") as folder:
            write.write_text(folder / "a", "whole")
            with write.atomic_file(tmp_path / "log") as new:
                new.write_text("half")
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        stage.run_stage(main)
    assert stop.value.code == 143
    assert contents(tmp_path) == {"log": "old"}
    assert not (tmp_path / "step").exists()


def test_reproduce_passes_a_signal_on_and_waits_for_the_stage_behind_its_launcher(
    tmp_path, monkeypatch
):
    """The launcher is a shell that ends at once; what it started ends a second after the signal."""
    end = f"(time.sleep(1), open({str(tmp_path / 'ended')!r}, 'w'), exit())"
    slow = f"import signal, time; signal.signal(15, lambda *_: {end})"
    slow += "; print(1, flush=True); time.sleep(60)"
    launcher = f'trap "exit 1" TERM; {sys.executable} -c "{slow}" & wait'
    job = plans.Job("01", ["bash", "-c", launcher], [], 1)

    class Bar(runner.tqdm):
        def write(self, line):
            if line == "[01] 1":
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner, "tqdm", Bar)
    with pytest.raises(SystemExit) as stop:
        stage.run_stage(runner.Runner([job], [None], tmp_path / "reproduce.json", "stamp").run)
    assert stop.value.code == 143
    assert (tmp_path / "ended").exists()


# Crowded

STAGES = {
    "01_train_lora_grpo.py": ("train", ["--steps", "9"]),
    "02_extract_deltas.py": ("deltas", []),
    "03_train_predictor.py": ("predictor/aligned", ["--recipes", "aligned"]),
    "04_extrapolate.py": ("extrapolated/none", ["--methods", "none", "--overwrite"]),
    "05_continue_rl.py": ("continued/next-aligned_alpha1.5", ["--more-steps", "3"]),
    "06_eval.py": ("eval", []),
}


@contextlib.contextmanager
def held(folder: pathlib.Path):
    """Another process's lock on `folder`: to the kernel, a file opened a second time is as good as
    one."""
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def process_of(rank: int, folder: pathlib.Path) -> int:
    """The pid of this rank of the training in `folder`."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            variables, command = ((process / name).read_bytes() for name in ("environ", "cmdline"))
            if f"\0RANK={rank}\0".encode() in variables and str(folder).encode() in command:
                return int(process.name)
    raise AssertionError(f"no process of rank {rank}")


def test_two_processes_lose_no_step_when_one_dies_or_the_launcher_is_stopped(empty_run, tmp_path):
    shutil.copytree(empty_run, folder := tmp_path / "run")

    def train(until: str) -> subprocess.Popen:
        run = start_two("01_train_lora_grpo.py", folder, "cpu_processes", "--steps", "4")
        next(line for line in run.stdout if line.startswith(until))
        return run

    run = train(until="step 1/4")
    os.kill(process_of(1, folder), signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "exitcode: -9" in output
    run = train(until="step 2/4")
    run.terminate()
    output, _ = run.communicate(timeout=120)
    assert run.returncode not in (0, None)
    assert "stopped: type the same command without --overwrite" in output
    assert not (folder / "train" / "done.json").exists()
    run = train(until="done: 4 steps")
    assert run.wait(timeout=120) == 0
    assert [row["step"] for row in metrics(folder / "train")] == [1, 2, 3, 4]
    assert sorted(path.name for path in (folder / "train" / "resume").iterdir()) == [
        "step_0003",
        "step_0004",
    ]


@pytest.mark.parametrize("script", STAGES)
def test_a_second_process_in_a_stages_folder_is_refused(
    finished_run, tmp_path, monkeypatch, capsys, script
):
    shutil.copytree(finished_run, run := tmp_path / "run")
    folder, flags = STAGES[script]
    (run / folder / "done.json").unlink(missing_ok=True)
    before = contents_hash(run)
    with held(run / folder):
        code, line = call_stage(
            monkeypatch, capsys, script, "--config", TINY, "--run-dir", str(run), *flags
        )
    assert code == 2
    assert line == f"error: another process is writing {run / folder}: wait for it, or stop it"
    (run / folder).with_name(f".{(run / folder).name}.lock").unlink()
    assert contents_hash(run) == before


def test_what_another_process_is_writing_is_not_overwritten(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "half").write_text("precious")
    with held(tmp_path / "stage"), pytest.raises(UserError, match="another process is writing"):
        stage.Stage(tmp_path / "stage", config.StageConfig(overwrite=True), {})
    assert contents(tmp_path / "stage") == {"half": "precious"}


def test_a_second_process_in_a_merged_models_folder_is_refused(
    finished_run, tmp_path, monkeypatch, capsys
):
    shutil.copytree(finished_run, run := tmp_path / "run")
    (run / "merged").mkdir()
    flags = ["--config", TINY, "--run-dir", str(run), "--methods", "none", "--merge", "fp32"]
    with held(run / "merged" / "none"):
        code, line = call_stage(monkeypatch, capsys, "04_extrapolate.py", *flags)
    assert (code, line.split(": wait")[0]) == (
        2,
        f"error: another process is writing {run}/merged/none",
    )
    assert not (run / "merged" / "none").exists()


def contents_hash(run: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): read.sha256(path) for path in run.rglob("*") if path.is_file()
    }


def test_two_reproduce_in_one_run_directory_are_one_too_many(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["reproduce", "--preset", TINY, "--run-dir", str(tmp_path / "run")]
    )
    (tmp_path / "run").mkdir()
    with (
        held(tmp_path / "run" / "reproduce.json"),
        pytest.raises(UserError, match="another process is writing"),
    ):
        reproduce.main()


def test_a_claim_is_for_one_process_and_leaves_nothing(tmp_path):
    write.claim(tmp_path / "stage")
    write.claim(tmp_path / "stage")  # ours already
    lock = tmp_path / ".stage.lock"
    with open(lock) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    write.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    write.claim(tmp_path / "stage")
    write.release()
    assert "no locks here: keep a second process out" in capsys.readouterr().err


# Starved


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO]
)
@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_disk_that_refuses_is_one_line_that_names_the_file(
    finished_run, tmp_path, monkeypatch, capsys, failing, number
):
    shutil.copytree(finished_run, run := tmp_path / "run")
    command = [
        "04_extrapolate.py",
        "--config",
        TINY,
        "--run-dir",
        str(run),
        "--methods",
        "none",
        "--overwrite",
    ]
    before = contents_hash(run)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, refuse)
        code, line = call_stage(monkeypatch, capsys, *command)
    assert code == 2
    assert line.startswith(f"error: cannot write {run}/extrapolated/")
    assert line.endswith(
        f"({os.strerror(number)}): make room, then type the same command without --overwrite to go on"
    )
    assert contents_hash(run) == before
    assert call_stage(monkeypatch, capsys, *command) == (0, "")


@pytest.fixture
def disk(monkeypatch):
    """What the disk is told to keep and what is renamed, in order: ("fsync", path) and ("replace",
    old path, new path)."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (
            events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}"))),
            fsync(handle),
        ),
    )
    monkeypatch.setattr(
        os,
        "replace",
        lambda *paths: (events.append(("replace", *map(str, paths))), replace(*paths)),
    )
    return events


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, disk):
    with write.atomic_dir(tmp_path / "step") as folder:
        (folder / "weights").write_text("x")
    assert sorted(disk[:-1]) == [("fsync", str(folder)), ("fsync", str(folder / "weights"))]
    assert disk[-1] == ("replace", str(folder), str(tmp_path / "step"))


def test_the_log_is_on_the_disk_before_the_resume_state_that_counts_on_it(
    empty_run, tmp_path, monkeypatch, capsys, disk
):
    shutil.copytree(empty_run, run := tmp_path / "run")
    assert (
        call_stage(
            monkeypatch,
            capsys,
            "01_train_lora_grpo.py",
            "--config",
            TINY,
            "--run-dir",
            str(run),
            "--steps",
            "1",
        )[0]
        == 0
    )
    state = next(
        i
        for i, event in enumerate(disk)
        if event[-1] == str(run / "train" / "resume" / "step_0001")
    )
    checkpoint = next(
        i for i, event in enumerate(disk) if event[-1] == str(run / "train" / "step_0001")
    )
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert ("fsync", str(run / "train" / name)) in disk[checkpoint:state]


@contextlib.contextmanager
def small_disk(folder: pathlib.Path):
    """`folder` on a disk of 450 kB, or where that takes rights we lack, no file over 100 kB;
    yields what makes room."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=450k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield lambda: subprocess.run(
                ["mount", "-o", "remount,size=20m", str(folder)], check=True
            )
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (100_000, limits[1])
        )  # Python ignores the signal that goes with it
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_training_on_a_full_disk_stops_in_one_line_and_goes_on_when_there_is_room(
    finished_run, empty_run, tmp_path, monkeypatch, capsys
):
    inputs = [
        "--backbone",
        str(empty_run / "backbone"),
        "--train-data",
        str(empty_run / "data" / "train.jsonl"),
    ]
    command = [
        "01_train_lora_grpo.py",
        "--config",
        TINY,
        "--run-dir",
        str(tmp_path / "disk" / "run"),
        *inputs,
        "--steps",
        "4",
    ]
    with small_disk(tmp_path / "disk") as make_room:
        folder = tmp_path / "disk" / "run" / "train"
        code, line = call_stage(monkeypatch, capsys, *command)
        assert code == 2
        assert line.startswith(f"error: cannot write {folder}/")
        assert "make room" in line
        assert not list(folder.rglob(".*"))
        kept, whole = weights(folder), weights(finished_run / "train")
        assert kept.items() <= whole.items()
        assert 0 < len(kept) < 4
        make_room()
        assert call_stage(monkeypatch, capsys, *command)[0] == 0
        assert weights(folder) == {
            name: content for name, content in whole.items() if name < "step_0005"
        }
        assert metrics(folder) == metrics(finished_run / "train")[:4]


@pytest.fixture
def disk_of_40_mb(tmp_path):
    """A file system of its own, and what mounts it anew with other options."""
    (tmp_path / "disk").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(tmp_path / "disk")],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("may not mount")
    yield (
        tmp_path / "disk",
        lambda how: subprocess.run(
            ["mount", "-o", f"remount,{how}", str(tmp_path / "disk")], check=True
        ),
    )
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


@pytest.mark.parametrize(
    ("script", "missing", "flags"),
    [
        ("02_extract_deltas.py", "deltas", []),
        ("03_train_predictor.py", "predictor/aligned", ["--recipes", "aligned"]),
        ("04_extrapolate.py", "extrapolated/none", ["--methods", "none"]),
        (
            "05_continue_rl.py",
            "continued/none",
            ["--start", "none", "--more-steps", "1", "--max-new-tokens", "4"],
        ),
        (
            "06_eval.py",
            "short",
            ["--policies", "train/step_0006", "--max-new-tokens", "4", "--output", "short"],
        ),
    ],
)
def test_a_full_and_a_read_only_disk_are_one_line_and_change_nothing(
    finished_run, monkeypatch, capsys, disk_of_40_mb, script, missing, flags
):
    disk, remount = disk_of_40_mb
    shutil.copytree(finished_run, run := disk / "run")
    shutil.rmtree(run / missing, ignore_errors=True)
    before, command = contents_hash(run), [script, "--config", TINY, "--run-dir", str(run), *flags]
    with contextlib.suppress(OSError), open(disk / "others", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    code, line = call_stage(monkeypatch, capsys, *command)
    assert (code, line[:20], "No space left on device" in line, "): make room" in line) == (
        2,
        "error: cannot write ",
        True,
        True,
    ), line
    assert contents_hash(run) == before
    (disk / "others").unlink()
    remount("ro")
    code, line = call_stage(monkeypatch, capsys, *command)
    assert (code, line[:20], "(Read-only file system): make room" in line) == (
        2,
        "error: cannot write ",
        True,
    ), line
    remount("rw")
    assert contents_hash(run) == before
    assert call_stage(monkeypatch, capsys, *command)[0] == 0
    assert (run / missing).is_dir()


def test_what_fails_while_the_optimizer_is_saved_is_one_line(tmp_path, monkeypatch):
    def cut_short(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(
        UserError, match=r"cannot write .*optimizer.pt \(the file was cut short\): make room"
    ):
        write.save_optimizer(tmp_path / "optimizer.pt", {})
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def files_up_to(size: int):
    """To this process the disk is full where a file has `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (size, limits[1])
        )  # Python ignores the signal that goes with it
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("error", [Exception("shape mismatch"), RuntimeError("x"), KeyError("x")])
def test_an_error_that_is_no_disks_is_itself_while_writing(tmp_path, error):
    with pytest.raises(type(error)) as found, write.writing(tmp_path):
        raise error
    assert found.value is error


def test_a_full_disk_under_the_logs_of_reproduce_is_one_line(tmp_path, capsys):
    (tmp_path / "01.log").symlink_to("/dev/full")
    job = plans.Job("01", [sys.executable, "-c", "print('a line')"], [], 1)
    one = runner.Runner([job], [None], tmp_path / "reproduce.json", "stamp", tmp_path)
    with pytest.raises(SystemExit) as stop:
        stage.run_stage(one.run)
    assert stop.value.code == 2
    assert (
        f"error: cannot write {tmp_path} (No space left on device): make room"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("script", "file", "flags", "message"),
    [
        ("01_train_lora_grpo.py", "backbone/model.safetensors", ["--steps", "9"], "input backbone"),
        (
            "02_extract_deltas.py",
            "train/step_0003/adapter_model.safetensors",
            ["--overwrite"],
            WRITTEN,
        ),
        ("02_extract_deltas.py", "train/step_0003/adapter_config.json", ["--overwrite"], WRITTEN),
        ("03_train_predictor.py", DELTAS, [], WRITTEN),
        (
            "03_train_predictor.py",
            "train/step_0006/adapter_model.safetensors",
            ["--overwrite"],
            WRITTEN,
        ),  # its backtest looks ahead there
        (
            "04_extrapolate.py",
            "train/step_0006/adapter_model.safetensors",
            ["--methods", "none"],
            WRITTEN,
        ),
        (
            "04_extrapolate.py",
            "backbone/model.safetensors",
            ["--methods", "none", "--merge", "fp32"],
            WRITTEN,
        ),
        ("04_extrapolate.py", DELTAS, ["--methods", "repeat-last"], WRITTEN),
        (
            "04_extrapolate.py",
            "predictor/aligned/predicted.safetensors",
            ["--methods", "next", "--overwrite"],
            WRITTEN,
        ),
        (
            "05_continue_rl.py",
            "extrapolated/none/adapter_model.safetensors",
            ["--start", "none"],
            WRITTEN,
        ),
        (
            "04_extrapolate.py",
            "train/step_0006/adapter_config.json",
            ["--methods", "none"],
            WRITTEN,
        ),
        (
            "05_continue_rl.py",
            "extrapolated/none/adapter_config.json",
            ["--start", "none"],
            WRITTEN,
        ),
        (
            "06_eval.py",
            "train/step_0005/adapter_model.safetensors",
            ["--policies", "train/step_0005"],
            WRITTEN,
        ),
        (
            "06_eval.py",
            "train/step_0005/adapter_config.json",
            ["--policies", "train/step_0005"],
            WRITTEN,
        ),
        (
            "06_eval.py",
            f"{MERGED}/backbone/model.safetensors",
            ["--policies", f"{MERGED}/step_0007"],
            WRITTEN,
        ),
    ],
)
def test_a_flipped_bit_of_weights_is_noticed(
    finished_run, tmp_path, monkeypatch, capsys, script, file, flags, message
):
    shutil.copytree(finished_run, run := tmp_path / "run")
    content = bytearray((run / file).read_bytes())
    if file.endswith(".json"):
        content += b" "
    else:
        content[-2] ^= 8  # of the last number
    (run / file).write_bytes(content)
    before = contents_hash(run / "train")
    code, line = call_stage(
        monkeypatch, capsys, script, "--config", TINY, "--run-dir", str(run), *flags
    )
    assert (code, line[:7]) == (2, "error: "), line
    assert message in line
    assert {**contents_hash(run / "train"), "config.json": ""} == {**before, "config.json": ""}


@pytest.mark.parametrize(
    "record",
    ['{"w.safetensors": 1}', '{"w.safetensors": '],
)
def test_a_record_of_hashes_that_is_none_is_one_line(tmp_path, record):
    with write.atomic_dir(tmp_path / "step_0001") as folder:
        write.save_tensors(folder / "w.safetensors", {"w": torch.zeros(2)})
    read.check_intact(tmp_path / "step_0001")
    (tmp_path / "step_0001" / "sha256.json").write_text(record)
    with pytest.raises(UserError) as error:
        read.check_intact(tmp_path / "step_0001")
    assert "\n" not in str(error.value)
    (tmp_path / "step_0001" / "sha256.json").unlink()
    read.check_intact(tmp_path / "step_0001")  # what others wrote has none


# Odd rollouts


class Canned:
    """An engine that gives every prompt the same response, with the policy's own
    log-probabilities."""

    is_exact = False

    def __init__(self, text: str, finished: bool):
        self.text, self.finished = text, finished

    def __call__(self, name, model, tokenizer, *_):
        self.model, self.tokens = model, tokenizer(self.text)["input_ids"]
        return self

    def generate(self, prompts, seeds, max_new_tokens, temperature):
        with torch.no_grad():
            logprobs = policy.token_logprobs(
                self.model, prompts, [self.tokens] * len(prompts), temperature
            )
        rows = logprobs.split(len(self.tokens))
        return [rollout.Rollout(self.tokens, row.tolist(), self.finished) for row in rows]

    def sync(self, model):
        pass

    def close(self):
        pass


@pytest.mark.parametrize(
    ("text", "finished", "length"),
    [
        (r"\boxed{0}<|end|>", True, 4),  # every group all wrong
        ("1+1+0=02," * 4, False, 36),  # every response cut
        ("<|end|>", True, 1),  # every response empty
    ],
)
def test_rollouts_that_teach_nothing_leave_the_policy_alone_and_the_run_goes_on(
    empty_run, tmp_path, monkeypatch, capsys, text, finished, length
):
    shutil.copytree(empty_run, run := tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "make_engine", Canned(text, finished))
        command = ["01_train_lora_grpo.py", "--config", TINY, "--run-dir", str(run)]
        assert call_stage(monkeypatch, capsys, *command, "--steps", "1")[0] == 0
    [row] = metrics(run / "train")
    assert (row["accuracy"], row["truncated_share"], row["zero_variance_groups"]) == (
        0,
        float(not finished),
        1,
    )
    assert (row["response_length"], row["loss"], row["grad_norm"]) == (length, 0, 0)
    tensors = safetensors.torch.load_file(run / "train" / "step_0001" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


@pytest.fixture
def vllm_engine(monkeypatch, tmp_path):
    """common.vllm_engine on a vLLM that is not there, and an engine of it whose `llm` the test
    gives."""
    fake, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request")
    fake.LLM, fake.SamplingParams, request.LoRARequest = object, dict, object
    for name, module in {
        "vllm": fake,
        "vllm.lora": types.ModuleType("vllm.lora"),
        "vllm.lora.request": request,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "common.rl.vllm_engine", raising=False)
    module = importlib.import_module("common.rl.vllm_engine")
    engine = object.__new__(module.VLLMEngine)
    engine.ends, engine.lora, engine.synced = [1], None, 0
    monkeypatch.setattr(write, "RAM_DISK", str(tmp_path))
    engine.ram = write.RamDisk()
    yield engine
    sys.modules.pop("common.rl.vllm_engine", None)


def test_an_adapter_travels_over_the_disk_where_the_ram_disk_is_small(monkeypatch, tmp_path):
    (tmp_path / "ram").mkdir()
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(write, "RAM_DISK", str(tmp_path / "ram"))
    monkeypatch.setattr(write.tempfile, "gettempdir", lambda: str(tmp_path / "disk"))
    free = shutil.disk_usage(tmp_path).free
    for needed, name in ((free // 2, "ram"), (2 * free, "disk")):
        place = write.RamDisk(needed)
        assert place.path.parent == tmp_path / name
        place.close()
    monkeypatch.setattr(write, "RAM_DISK", str(tmp_path / "nowhere"))
    assert write.RamDisk().path.parent == tmp_path / "disk"


def response(*completions: list[int]) -> types.SimpleNamespace:
    made = [
        types.SimpleNamespace(
            token_ids=c,
            logprobs=types.SimpleNamespace(logprobs=[-1.0] * len(c)),
            finish_reason="stop",
        )
        for c in completions
    ]
    return types.SimpleNamespace(outputs=made)


def test_a_vllm_that_answers_is_taken_at_its_word(vllm_engine):
    vllm_engine.llm = types.SimpleNamespace(
        generate=lambda *_, **__: [response([5, 1]), response([1])]
    )
    found = vllm_engine.generate([[2], [3]], [0, 1], 8)
    assert [(r.tokens, r.logprobs, r.finished) for r in found] == [
        ([5, 1], [-1.0, -1.0], True),
        ([1], [-1.0], True),
    ]


def broken(*_, **__):
    raise RuntimeError("Engine core initialization failed.\nSee root cause above.")


@pytest.mark.parametrize(
    ("llm", "call", "message"),
    [
        ({"collective_rpc": broken}, "sync", "failed while taking over the weights"),
        ({"generate": broken}, "generate", "failed while sampling"),
    ],
)
def test_a_vllm_that_fails_at_anything_is_one_line(vllm_engine, llm, call, message):
    vllm_engine.llm = types.SimpleNamespace(**llm)
    arguments = {"sync": (torch.nn.Linear(2, 2),), "generate": ([[2]], [0], 8)}[call]
    with pytest.raises(UserError) as error:
        getattr(vllm_engine, call)(*arguments)
    words = "RuntimeError: Engine core initialization failed. See root cause above."
    want = f"vLLM {message} ({words}): type the same command again to go on"
    assert str(error.value) == want


def test_a_vllm_that_does_not_start_is_one_line(vllm_engine, lora_policy, monkeypatch):
    monkeypatch.setattr(sys.modules["vllm"], "LLM", broken)
    with pytest.raises(
        UserError,
        match=r"^vLLM does not start \(RuntimeError: .*: see --vllm-options, then type the same",
    ):
        type(vllm_engine)(*lora_policy, "backbone", 100, 4, {})


def test_an_error_of_ours_beside_vllm_is_itself(vllm_engine):
    with pytest.raises(AttributeError):
        vllm_engine.sync("no model")


def test_a_full_ram_disk_is_one_line(vllm_engine, lora_policy):
    with (
        files_up_to(1000),
        pytest.raises(
            UserError, match=r"cannot write .*/next-lora-\S+/1 \(.*File too large.*\): make room"
        ),
    ):
        vllm_engine.sync(lora_policy[0])


def test_what_a_killed_engine_left_on_the_ram_disk_goes_and_nothing_else(vllm_engine, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    (tmp_path / f"{write.RAM_PREFIX}x").mkdir()  # another's
    stay = {*tmp_path.iterdir()}
    if (pid := os.fork()) == 0:
        try:
            disk = write.RamDisk()
            (disk.path / "1").mkdir()
            (disk.path / "link").symlink_to(tmp_path / "mine")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len({*tmp_path.iterdir()} - stay) == 1
    disk = write.RamDisk()
    # The folder of vllm_engine, which lives, is among those that stay.
    assert {*tmp_path.iterdir()} == stay | {disk.path}
    assert (tmp_path / "mine" / "file").exists()
    disk.close()
