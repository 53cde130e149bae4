"""Every place that writes a file, starts a process or deletes something stands in four modules, so that what is promised of all writes can
be read there.
"""

import ast
import pathlib

import pytest
from conftest import ROOT

ALLOWED = {"run_dir.py", "verifier.py", "rollout.py", "vllm_engine.py", "reproduce.py"}  # vllm_engine is rollout's, apart for its imports
CALLS = {  # the last part of a call's name
    *("write_text", "write_bytes", "touch", "mkdir", "makedirs", "rename", "renames", "symlink_to", "hardlink_to", "symlink", "link"),
    *("unlink", "rmdir", "removedirs", "rmtree", "truncate", "chmod", "savefig", "save", "save_file", "save_model", "save_pretrained"),
    *("copy", "copy2", "copyfile", "copyfileobj", "copytree", "move", "Popen", "check_call", "check_output", "system", "popen", "fork"),
    *("kill", "killpg", "Process", "ProcessPoolExecutor", "TemporaryDirectory", "NamedTemporaryFile", "mkdtemp", "mkstemp", "dump"),
}
OWN = {  # whose calls these are, where the last part alone would also mean something harmless
    "save": {"torch", "np", "numpy"},
    "copy": {"shutil"},
    "run": {"subprocess"},
    "call": {"subprocess"},
    "remove": {"os"},
    "replace": {"os"},
    "open": {"os"},
    "dump": {"json", "pickle", "yaml"},
}


def offences(source: str) -> list[str]:
    """The calls in `source` that write, start or delete, as "line: call"."""
    tree, found = ast.parse(source), []
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "common.run_dir"]
    ours = {alias.name for node in imports for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        owner, _, last = name.rpartition(".")
        if owner == "run_dir" or name in ours:
            continue
        positional = [ast.unparse(argument) for argument in node.args]
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        bad = owner in OWN[last] if last in OWN else last in CALLS
        if last == "replace" and owner != "dataclasses":
            bad |= len(positional) == 1 and not keywords  # Path's; str's takes two
        if last == "open" and owner != "safetensors":
            mode = [*positional[0 if owner else 1 :], keywords.get("mode", "'r'")][0]
            bad |= bool(set("wax+") & set(mode))
        if bad:
            found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py")], ids=lambda path: path.name)
def test_writes_processes_and_deletions_stand_in_four_modules(path: pathlib.Path):
    if path.name not in ALLOWED:
        assert offences(path.read_text(encoding="utf-8")) == []


def test_no_result_depends_on_the_wall_clock():
    """It may jump. What is timed is timed by clocks that do not."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py")]:
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)}
        assert not names & {"time.time", "time.time_ns", "datetime.datetime", "datetime.date", "time.localtime", "os.path.getmtime"}, path


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("open('x', 'w')", True),
        ("path.open('ab')", True),
        ("open('x', mode='r+')", True),
        ("open('x')", False),
        ("open('x', 'rb')", False),
        ("path.write_text('x')", True),
        ("temporary.replace(path)", True),
        ("'a'.replace('b', 'c')", False),
        ("dataclasses.replace(config)", False),
        ("os.replace(a, b)", True),
        ("torch.save(x, 'y')", True),
        ("subprocess.run(['ls'])", True),
        ("self.pool.run()", False),
        ("shutil.rmtree(x)", True),
        ("model.save_pretrained(x)", True),
        ("run_dir.save_pretrained(x, model)", False),
        ("from common.run_dir import save_state; save_state(x, {})", False),
        ("os.remove(x)", True),
        ("run_dir.remove(x)", False),
        ("figure.savefig(x)", True),
        ("os.killpg(1, 2)", True),
    ],
)
def test_the_search_finds_what_it_should(line, caught):
    assert bool(offences(line)) == caught
