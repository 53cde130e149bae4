"""Whatever writes a file, starts a process or deletes something stands in few modules, so that what
is promised of all writes can be read there. The source is searched, stages that run are watched.
"""

import ast
import os
import pathlib
import re
import shutil
import sys

import pytest
from conftest import ROOT, TINY, call_stage

# write: the folders of a run, vLLM's adapter; policy: in an open folder; given: runs stage 6.
ALLOWED = re.compile(
    r"common/(files/write|rl/(policy|verifier\w*|rollout|vllm_engine)|baselines/given"
    r"|reproduce/(__main__|run\w*))\.py"
)
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")])
MODULES = {  # nothing else may name them
    *("shutil", "subprocess", "multiprocessing", "tempfile", "io", "codecs", "gzip", "zipfile"),
    *("tarfile", "pickle", "shelve", "sqlite3", "mmap", "ctypes", "asyncio", "builtins", "runpy"),
}
OF_OS = {"environ", "path", "cpu_count", "getpid"}  # what others may use of os
NAMES = re.compile(  # of functions and methods
    r"save|save_(pretrained|state|file|vocabulary|to_disk)|savez\w*|save(fig|txt)|imsave|touch|mkdir"
    "|write_(text|bytes)|rename|symlink_to|unlink|rmdir|chmod|truncate|tofile|memmap|dump|ZipFile"
    "|to_(csv|json|parquet|pickle).*|.*FileHandler|ProcessPoolExecutor|Popen|Process|push_to_hub"
    "|exec|eval|__import__"
)
OURS = ("common", "stage", "write", "run_dir", "out")  # what these do is looked for where it stands


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def offences(source: str) -> list[str]:
    """What `source` names that writes, starts or deletes, as "line: name"."""
    tree, found, known, inner, calls = ast.parse(source), [], {}, set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
            bad = [alias.name for alias in node.names if MODULES & {*alias.name.split(".")}]
            found += [f"{node.lineno}: {name}" for name in bad]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.FunctionDef):
            known[node.name] = f"common.{node.name}"
        elif isinstance(node, ast.Attribute):
            inner.add(node.value)
        elif isinstance(node, ast.Call):
            calls[node.func] = node
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and node not in inner:
            first, *rest = ast.unparse(node).split(".")
            if is_bad([*known.get(first, first).split("."), *rest], calls.get(node)):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def is_bad(name: list[str], call: ast.Call | None) -> bool:
    """name: the parts of a dotted name, with what imports call them; call: where it is called."""
    last = name[-1]
    if MODULES & {*name[: max(1, len(name) - 1)]} or (name[0] == "os" and not OF_OS & {*name[1:2]}):
        return True
    if name[0] in OURS:
        return False
    words = {keyword.arg: keyword.value for keyword in call.keywords} if call else {}
    if last == "open":
        at = 1 if len(name) == 1 else 0  # a method's first argument is the mode
        mode = words.get("mode") or (call.args[at] if call and len(call.args) > at else None)
        mode = mode or (ast.Constant("r") if call else None)
        return not isinstance(mode, ast.Constant) or bool({*"wax+"} & {*mode.value})
    if last == "replace":  # that of str takes two arguments, that of a path one
        return name[0] != "dataclasses" and not (call and len(call.args) >= 2 and not words)
    if last in ("exec", "eval", "__import__") and len(name) > 1:
        return False  # model.eval()
    return bool(NAMES.fullmatch(last))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_writes_processes_and_deletions_stand_in_few_modules(path: pathlib.Path):
    if not ALLOWED.fullmatch(name_of(path)):
        assert offences(path.read_text(encoding="utf-8")) == []


def test_no_result_depends_on_the_wall_clock():
    """It may jump. What is timed is timed by clocks that do not."""
    wall = {"time.time", "time.time_ns", "datetime.datetime", "datetime.date", "time.localtime"}
    for path in SOURCES:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not wall & {ast.unparse(x) for x in nodes if isinstance(x, ast.Attribute)}, path


CAUGHT = """
open('x', 'w')|path.open('ab')|open('x', mode='r+')|open(p, mode)|map(open, names)|import gzip as g
path.write_text('x')|temporary.replace(path)|path.replace(target=b)|os.replace(a, b)|f = os.remove
from os import replace; replace(a, b)|from os import remove as f; f(x)|import os as o; o.link(a)
from shutil import copy; copy(a, b)|shutil.rmtree(x)|do(shutil.rmtree, p)|exec('x')|os.fork()
subprocess.run(['ls'])|import subprocess as sp|from subprocess import run; run(c)|os.system('x')
from concurrent.futures import ProcessPoolExecutor as P; P()|__import__('os')|torch.save(x, 'y')
from torch import save; save(x, 'y')|model.save_pretrained(x)|accelerator.save_state(x)
figure.savefig(x)|np.savez(x)|frame.to_csv(x)|np.memmap(x)|json.dump(x, file)|path.mkdir()
"""
HARMLESS = """
open('x')|open('x', 'rb')|open('x', encoding='utf-8')|path.open()|'a'.replace('b', 'c')|model.eval()
os.path.join(a)|write.remove(x)|from common.files.write import save_tensors; save_tensors(x, {})
dataclasses.replace(config)|names.remove(x)|json.dumps(x)|os.environ.get('X')|stage.save(x, y)
"""


@pytest.mark.parametrize("lot", [CAUGHT, HARMLESS])
def test_the_search_finds_what_it_should(lot):
    for line in re.split(r"[|\n]", lot.strip()):
        assert bool(offences(line)) == (lot is CAUGHT), line


_watching: list[list[str]] = []
OF_FILES = ("rename", "remove", "mkdir", "rmdir", "symlink", "link", "truncate", "chmod")
OF_PROCESSES = ("system", "exec", "posix_spawn", "fork", "kill", "killpg")
EVENTS = {f"os.{name}" for name in OF_FILES + OF_PROCESSES} | {"shutil.rmtree", "subprocess.Popen"}


def _watch(event: str, args: tuple) -> None:
    """An audit hook: notes the nearest file of ours that writes, starts or deletes something."""
    if not _watching:
        return
    written = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and args[0] != "/dev/null"
    if not written and event not in EVENTS:
        return
    frame = sys._getframe()
    while frame := frame.f_back:
        path = pathlib.Path(frame.f_code.co_filename)
        if path.name == "<frozen importlib._bootstrap>":  # Python keeps what it has compiled
            return
        if path in SOURCES:
            _watching[-1].append(name_of(path))
            return


sys.addaudithook(_watch)


def test_stages_that_run_write_there_alone(finished_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished_run, run := tmp_path / "run")
    merged = ["--methods", "none", "--merge", "fp32", "--overwrite"]
    paper = ["--recipes", "paper", "--overwrite"]
    flags = [["--steps", "9"], ["--overwrite"], paper, merged, ["--more-steps", "3"]]
    flags.append(["--policies", "train/step_0009"])
    for script, own in zip(sorted(ROOT.glob("0*.py")), flags, strict=True):
        _watching.append([])
        command = [script.name, "--config", TINY, "--run-dir", str(run), *own]
        try:
            assert call_stage(monkeypatch, capsys, *command)[0] == 0
        finally:
            seen = _watching.pop()
        assert "common/files/write.py" in seen
        assert [name for name in seen if not ALLOWED.fullmatch(name)] == []


@pytest.mark.parametrize(("module", "kept"), [("rl/metrics.py", False), ("files/write.py", True)])
def test_the_watch_names_the_module_at_work(tmp_path, module, kept):
    source = "getattr(path, 'write_' + 'text')('x')"
    hidden = compile(source, str(ROOT / "common" / module), "exec")
    _watching.append([])
    try:
        exec(hidden, {"path": tmp_path / "x"})
    finally:
        assert all(map(ALLOWED.fullmatch, _watching.pop())) == kept
