"""Killed, starved and crowded: what was whole stays whole, the message is one line, and the same
command goes on."""

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
import time
import types

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY, contents, metrics, weights

from common import UserError
from common.files import stage as stages
from common.files import write
from common.reproduce import __main__ as reproduce
from common.reproduce import plans, runner
from common.rl import policy, rollout

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import torture

# Killed


def test_killed_at_random_moments_every_stage_makes_what_it_makes_in_peace(finished_run, tmp_path):
    """The short form of tests/bench/torture.py. It also shows that the same seed gives the same
    files: finished_run is another run."""
    command = [sys.executable, "tests/bench/torture.py", "--preset", TINY, "--seed", "1"]
    command += ["--against", str(finished_run), "--out", str(tmp_path / "out"), "--kills", "8"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 kills, as many restarts; differences: 0" in result.stdout
    for number, moment in itertools.product(("SIGKILL", "SIGTERM"), ("clock", "rename")):
        assert f"| {number} | {moment}" in result.stdout
    assert "again at once" in result.stdout


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


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_folder_that_is_killed_while_it_is_replaced_is_old_new_or_not_there(tmp_path, n, after):
    folder = tmp_path / "stage"
    folder.mkdir()
    for name in "ab":
        (folder / "step").mkdir(exist_ok=True)
        (folder / "step" / name).write_text("old")
    assert killed_at_rename(n, after, lambda: replace_folder(folder / "step")) == -signal.SIGKILL
    named = contents(folder / "step")
    old, new = (dict.fromkeys("ab", word) for word in (b"old", b"new"))
    assert named == {(1, False): old, (2, True): new}.get((n, after), {})
    write.claim(folder)
    replace_folder(folder / "step")
    write.release()
    # Neither temporary names nor a lock.
    assert contents(tmp_path) == {"stage/step/a": b"new", "stage/step/b": b"new"}


@pytest.mark.parametrize(("after", "want"), [(False, "old"), (True, "new")])
def test_a_file_that_is_killed_while_it_is_written_is_old_or_new(tmp_path, after, want):
    (tmp_path / "stage").mkdir()
    path = tmp_path / "stage" / "f.json"
    path.write_text("old")
    assert killed_at_rename(1, after, lambda: write.write_text(path, "new")) == -signal.SIGKILL
    assert path.read_text() == want
    write.claim(tmp_path / "stage")
    write.release()
    assert contents(tmp_path) == {"stage/f.json": want.encode()}


def test_a_folder_killed_while_it_is_removed_is_gone_by_its_name(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "done.json").write_text("{}")
    assert killed_at_rename(1, True, lambda: write.remove(tmp_path / "stage")) == -signal.SIGKILL
    assert not (tmp_path / "stage").exists()
    write.claim(tmp_path / "stage")
    write.release()
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_after_the_last_write_left_goes_too(finished_run, run, stage):
    place = run / "extrapolated"
    (place / ".none.lock").write_text("")
    shutil.copytree(place / "none", place / ".none.old.tmp")
    assert stage("04", run, "--methods", "none") == (0, "")
    assert contents(run) == contents(finished_run)


# Stopped


@pytest.mark.parametrize(("number", "want"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_stage_with_a_hint_how_to_go_on(capsys, number, want):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        stages.run_stage(lambda: os.kill(os.getpid(), number))
    assert stop.value.code == want
    told = "\nstopped: type the same command without --overwrite to go on\n"
    assert capsys.readouterr().err == told
    assert signal.getsignal(number) == before


def test_a_second_signal_while_a_stage_ends_changes_nothing(monkeypatch):
    """A launcher passes a signal on to a group that has it already."""
    monkeypatch.setattr(write, "release", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(BaseException) as stop:  # noqa: PT011
        stages.run_stage(lambda: os.kill(os.getpid(), signal.SIGINT))
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
        stages.run_stage(main)
    assert stop.value.code == 143
    assert contents(tmp_path) == {"log": b"old"}
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
                while not found.running:  # its start is not over yet, on a busy machine
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner, "tqdm", Bar)
    found = runner.Runner([job], [None], tmp_path / "reproduce.json", "stamp")
    with pytest.raises(SystemExit) as stop:
        stages.run_stage(found.run)
    assert stop.value.code == 143
    assert (tmp_path / "ended").exists()


# Crowded


@contextlib.contextmanager
def held(folder: pathlib.Path):
    """Another process's lock on `folder`: to the kernel, a file opened a second time is as good as
    one."""
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(
    ("script", "folder", "flags"),
    [
        ("01", "train", "--steps 9"),
        ("02", "deltas", "--overwrite"),
        ("03", "predictor/aligned", "--recipes aligned"),
        ("04", "extrapolated/none", "--methods none --overwrite"),
        ("04", "merged/none", "--methods none --merge"),
        ("05", "continued/next-aligned_alpha1.5", "--more-steps 3"),
        ("06", "eval", ""),
    ],
)
def test_a_second_process_in_a_stages_folder_is_refused(run, stage, script, folder, flags):
    (run / folder).parent.mkdir(exist_ok=True)
    (run / folder / "done.json").unlink(missing_ok=True)
    before = contents(run)
    with held(run / folder):
        code, line = stage(script, run, *flags.split())
    told = f"error: another process is writing {run / folder}: wait for it, or stop it"
    assert (code, line) == (2, told)
    (run / folder).with_name(f".{(run / folder).name}.lock").unlink()
    assert contents(run) == before


def test_two_reproduce_in_one_run_directory_are_one_too_many(tmp_path, monkeypatch):
    command = ["reproduce", "--preset", TINY, "--run-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    refused = pytest.raises(UserError, match="another process is writing")
    with held(tmp_path / "reproduce.json"), refused:
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


@pytest.mark.parametrize(("failing", "number"), [("replace", errno.ENOSPC), ("fsync", errno.EROFS)])
def test_a_disk_that_refuses_is_one_line_that_names_the_file(
    run, stage, monkeypatch, failing, number
):
    before, flags = contents(run), ("--methods", "none", "--overwrite")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, refuse)
        code, line = stage("04", run, *flags)
    again = "make room, then type the same command without --overwrite to go on"
    assert (code, line.endswith(f"{os.strerror(number)}): {again}")) == (2, True)
    assert line.startswith(f"error: cannot write {run}/extrapolated/")
    assert contents(run) == before
    assert stage("04", run, *flags) == (0, "")


@pytest.fixture
def disk(monkeypatch):
    """What the disk is told to keep and what is renamed, in order."""
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(handle):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def noted_replace(*paths):
        events.append(("replace", *map(str, paths)))
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return events


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, disk):
    with write.atomic_dir(tmp_path / "step") as folder:
        (folder / "weights").write_text("x")
    assert sorted(disk[:-1]) == [("fsync", str(folder)), ("fsync", str(folder / "weights"))]
    assert disk[-1] == ("replace", str(folder), str(tmp_path / "step"))


def test_the_log_is_on_the_disk_before_the_resume_state_that_counts_on_it(new_run, stage, disk):
    train = new_run / "train"
    assert stage("01", new_run, "--steps", "1")[0] == 0
    last = [event[-1] for event in disk]
    checkpoint, state = (
        last.index(str(train / name)) for name in ("step_0001", "resume/step_0001")
    )
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert ("fsync", str(train / name)) in disk[checkpoint:state]


@contextlib.contextmanager
def files_up_to(size: int):
    """To this process the disk is full where a file has `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # Python ignores the signal that goes with it
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_on_a_full_disk_stops_in_one_line_and_goes_on_when_there_is_room(
    finished_run, new_run, stage
):
    train = new_run / "train"
    with files_up_to(100_000):  # an adapter has less, the optimizer's state more
        code, line = stage("01", new_run, "--steps", "4")
    assert code == 2
    assert line.startswith(f"error: cannot write {train}/")
    assert "make room" in line
    assert not list(train.rglob(".*"))
    whole = {
        name: file for name, file in weights(finished_run / "train").items() if name < "step_0005"
    }
    kept = weights(train)
    assert kept.items() <= whole.items()
    assert 0 < len(kept) < 4
    assert stage("01", new_run, "--steps", "4")[0] == 0
    assert weights(train) == whole
    assert metrics(train) == metrics(finished_run / "train")[:4]


def test_a_full_disk_under_the_logs_of_reproduce_is_one_line(tmp_path, capsys):
    (tmp_path / "01.log").symlink_to("/dev/full")
    job = plans.Job("01", [sys.executable, "-c", "print('a line')"], [], 1)
    one = runner.Runner([job], [None], tmp_path / "reproduce.json", "stamp", tmp_path)
    with pytest.raises(SystemExit) as stop:
        stages.run_stage(one.run)
    assert stop.value.code == 2
    wanted = f"error: cannot write {tmp_path} (OSError: [Errno 28] No space left on device): make"
    assert wanted in capsys.readouterr().err


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
        same = [self.tokens] * len(prompts)
        with torch.no_grad():
            logprobs = policy.token_logprobs(self.model, prompts, same, temperature)
        rows = logprobs.split(len(self.tokens))
        return [rollout.Rollout(self.tokens, row.tolist(), self.finished) for row in rows]

    def sync(self, model):
        pass

    def close(self):
        pass


@pytest.mark.parametrize(
    ("text", "finished", "length"),
    [
        ("1+1+0=02," * 4, False, 36),  # every response cut
        ("<|end|>", True, 1),  # every response empty, and wrong
    ],
)
def test_rollouts_that_teach_nothing_leave_the_policy_alone_and_the_run_goes_on(
    new_run, stage, monkeypatch, text, finished, length
):
    monkeypatch.setattr(rollout, "make_engine", Canned(text, finished))
    assert stage("01", new_run, "--steps", "1")[0] == 0
    [row] = metrics(new_run / "train")
    shares = (row["accuracy"], row["truncated_share"], row["zero_variance_groups"])
    assert shares == (0, float(not finished), 1)
    assert (row["response_length"], row["loss"], row["grad_norm"]) == (length, 0, 0)
    path = new_run / "train" / "step_0001" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


@pytest.fixture
def vllm_engine(monkeypatch, tmp_path):
    """common.vllm_engine on a vLLM that is not there, and an engine of it whose `llm` the test
    gives."""
    fake, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request")
    fake.LLM, fake.SamplingParams, request.LoRARequest = object, dict, object
    modules = {"vllm": fake, "vllm.lora": types.ModuleType("vllm.lora")}
    for name, module in (modules | {"vllm.lora.request": request}).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "common.rl.vllm_engine", raising=False)
    module = importlib.import_module("common.rl.vllm_engine")
    engine = object.__new__(module.VLLMEngine)
    engine.ends, engine.lora, engine.synced, engine.sleeps = [1], None, 0, False
    engine.folder = types.SimpleNamespace(name=str(tmp_path))
    yield engine
    sys.modules.pop("common.rl.vllm_engine", None)


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
    want = f"vLLM {message} ({words}): type the same command without --overwrite to go on"
    assert str(error.value) == want


def test_a_full_disk_on_an_adapters_way_to_vllm_is_one_line(vllm_engine, lora_policy):
    wanted = r"cannot write .*/1 \(.*File too large.*\): make room"
    with files_up_to(1000), pytest.raises(UserError, match=wanted):
        vllm_engine.sync(lora_policy[0])
