"""Every place that writes a file, starts a process or deletes something stands in four modules, so that what is promised of all writes can
be read there. The source is searched, and stages that run are watched.
"""

import ast
import os
import pathlib
import re
import shutil
import sys

import pytest
from conftest import ROOT, TINY, call_stage

ALLOWED = {"run_dir.py", "verifier.py", "rollout.py", "vllm_engine.py", "reproduce.py"}  # vllm_engine is rollout's, apart for its imports
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")])
MODULES = {  # that nothing else may name
    *("shutil", "subprocess", "multiprocessing", "tempfile", "io", "codecs", "gzip", "bz2", "lzma", "zipfile", "tarfile", "pickle", "dbm"),
    *("shelve", "sqlite3", "mmap", "ctypes", "pty", "asyncio", "posix", "fileinput", "builtins", "runpy", "zarr", "h5py", "joblib"),
}
OF_OS = {"environ", "path", "cpu_count", "getpid"}  # what others may use of os
NAMES = re.compile(  # of functions and methods, whosever they are
    "save(?!_every).*|imsave|imwrite|write_.*|touch|mkdir|rename|symlink_to|hardlink_to|unlink|rmdir|chmod|truncate|tofile|(open_)?memmap|dump"
    "|to_(csv|json|parquet|pickle|excel|sql|hdf|feather).*|.*FileHandler|ZipFile|ProcessPoolExecutor|Popen|Process|push_to_hub|raise_signal"
)


def offences(source: str) -> list[str]:
    """What `source` names that writes, starts or deletes, called or not, as "line: name"."""
    tree, found, known, inner, calls = ast.parse(source), [], {}, set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
            found += [f"{node.lineno}: {alias.name}" for alias in node.names if MODULES & set(alias.name.split("."))]
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [f"{node.lineno}: {node.module}.*" for alias in node.names if alias.name == "*"]
        elif isinstance(node, ast.Attribute):
            inner.add(node.value)
        elif isinstance(node, ast.Call):
            calls[node.func] = node
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and node not in inner:
            root, parts = node, []
            while isinstance(root, ast.Attribute):
                root, parts = root.value, [root.attr, *parts]
            root = known.get(root.id, root.id).split(".") if isinstance(root, ast.Name) else ["(an expression)"]
            if is_bad([*root, *parts], calls.get(node)):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def is_bad(name: list[str], call: ast.Call | None) -> bool:
    """name: the parts of a dotted name, with what imports call them; call: where it is the function of one."""
    last = name[-1]
    if MODULES & set(name[: max(1, len(name) - 1)]) or ("os" in name and not OF_OS & set(name[name.index("os") + 1 :][:1])):
        return True
    if name[0] == "common":  # ours: what it does is looked for where it stands
        return False
    words = {keyword.arg: keyword.value for keyword in call.keywords} if call else {}
    if last == "open":
        mode = [words["mode"]] if "mode" in words else call.args[len(name) == 1 :] if call else [None]
        mode = mode[0] if mode else ast.Constant("r")
        return None in words or not isinstance(mode, ast.Constant) or bool(set("wax+") & set(mode.value))
    if last == "replace":
        return name[0] != "dataclasses" and not (call and len(call.args) >= 2 and not words)  # str's takes two, Path's one
    if last == "import_module":
        return not (call and re.fullmatch(r"'0\d_\w+'", ast.unparse(call.args[0])))
    return last in ("exec", "eval", "__import__") if len(name) == 1 else bool(NAMES.fullmatch(last))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_writes_processes_and_deletions_stand_in_four_modules(path: pathlib.Path):
    if path.name not in ALLOWED:
        assert offences(path.read_text(encoding="utf-8")) == []


def test_no_result_depends_on_the_wall_clock():
    """It may jump. What is timed is timed by clocks that do not."""
    for path in SOURCES:
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)}
        assert not names & {"time.time", "time.time_ns", "datetime.datetime", "datetime.date", "time.localtime", "os.path.getmtime"}, path


CAUGHT = """
open('x', 'w')|path.open('ab')|open('x', mode='r+')|open(p, mode)|open(p, **how)|map(open, names)|import io|import gzip as g|import codecs
path.write_text('x')|temporary.replace(path)|path.replace(target=b)|os.replace(a, b)|os.fdopen(3)|os.remove(x)|f = os.remove|os.killpg(1, 2)
from os import replace; replace(a, b)|from os import remove as forget; forget(x)|import os as o; o.rename(a, b)|g = getattr(os, 'unlink')
from shutil import copy; copy(a, b)|shutil.rmtree(x)|pool.submit(shutil.rmtree, p)|run_dir.shutil.rmtree(p)|from pathlib import *
subprocess.run(['ls'])|import subprocess as sp|from subprocess import run; run(c)|subprocess.getoutput('x')
importlib.import_module('shutil')|os.execv(a, b)|os.posix_spawn(a, b, {})|os.fork()|os.system('x')|multiprocessing.Pool(2)
torch.multiprocessing.spawn(f)|import multiprocessing|concurrent.futures.ProcessPoolExecutor()
from concurrent.futures import ProcessPoolExecutor as P; P()|exec('x')|__import__('os')|torch.save(x, 'y')
from torch import save; save(x, 'y')|torch.jit.save(m, 'x')|model.save_pretrained(x)|tokenizer.save_vocabulary(x)|image.save(x)
tokenizer.backend_tokenizer.save(x)|accelerator.save_state(x)|dataset.save_to_disk(x)|figure.savefig(x)|plt.imsave(x, y)|np.savez(x)
np.savetxt(x, y)|config.to_json_file(x)|frame.to_csv(x)|frame.to_parquet(x)|array.tofile(x)|np.memmap(x)|json.dump(x, file)
zipfile.ZipFile(x, 'w')|import sqlite3|logging.FileHandler(x)|logging.handlers.RotatingFileHandler(x)|path.mkdir()|path.unlink()
import tempfile|made().save(x)
"""
HARMLESS = """
open('x')|open('x', 'rb')|open('x', encoding='utf-8')|path.open()|'a'.replace('b', 'c')|dataclasses.replace(config)|self.pool.run()
os.path.join(a)|run_dir.remove(x)|from common import run_dir; run_dir.save_pretrained(x, model)
from common.files.write import save_state; save_state(x, {})|names.remove(x)|json.dumps(x)|tensor.copy_(x)|model.eval()|os.environ.get('X')
sys.stdout.write(x)|importlib.import_module('06_eval')
"""


@pytest.mark.parametrize(("line", "caught"), [(x, lot is CAUGHT) for lot in (CAUGHT, HARMLESS) for x in re.split(r"[|\n]", lot.strip())])
def test_the_search_finds_what_it_should(line, caught):
    assert bool(offences(line)) == caught


_watching: list[list[str]] = []
EVENTS = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
    "os.system",
)
EVENTS += ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.kill", "os.killpg", "sqlite3.connect")


def _watch(event: str, args: tuple) -> None:
    """An audit hook. Of what writes, starts or deletes, it notes the nearest of our own files that was at work."""
    if not _watching or not (event in EVENTS or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and args[0] != "/dev/null")):
        return
    frame = sys._getframe()
    while frame := frame.f_back:
        path = pathlib.Path(frame.f_code.co_filename)
        if path.name == "<frozen importlib._bootstrap>":  # Python keeps what it has compiled
            return
        if path in SOURCES:
            _watching[-1].append(path.name)
            return


sys.addaudithook(_watch)


def test_stages_that_run_write_start_and_delete_from_those_modules_alone(finished_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished_run, run := tmp_path / "run")
    merged = ["--methods", "none", "--merge", "fp32", "--overwrite"]
    flags = [["--steps", "9"], ["--overwrite"], ["--recipes", "weighted", "--overwrite"], merged, ["--more-steps", "3"]]
    flags.append(["--policies", "train/step_0009"])
    for script, own in zip(sorted(ROOT.glob("0*.py")), flags, strict=True):
        _watching.append([])
        try:
            assert call_stage(monkeypatch, capsys, script.name, "--config", TINY, "--run-dir", str(run), *own)[0] == 0
        finally:
            seen = _watching.pop()
        assert "run_dir.py" in seen
        assert set(seen) <= ALLOWED


@pytest.mark.parametrize(("module", "kept"), [("metrics.py", False), ("run_dir.py", True)])
def test_the_watch_names_the_module_at_work(tmp_path, module, kept):
    hidden = compile("getattr(path, 'write_' + 'text')('x')", str(ROOT / "common" / module), "exec")
    _watching.append([])
    try:
        exec(hidden, {"path": tmp_path / "x"})
    finally:
        assert (set(_watching.pop()) <= ALLOWED) == kept
