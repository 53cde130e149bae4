"""Whatever writes a file, starts a process or deletes something stands in few modules, so that what
is promised of all writes can be read there. The source is searched.
"""

import ast
import pathlib
import re

import pytest
from conftest import ROOT

# write: the folders of a run, vLLM's adapter; policy: in an open folder; given: runs stage 6; verl:
# runs verl's merger.
ALLOWED = re.compile(
    r"common/(files/write|rl/(policy|verifier\w*|rollout|vllm_engine)|baselines/given"
    r"|reproduce/(__main__|run\w*|verl))\.py"
)
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")])
MODULES = {"shutil", "subprocess", "multiprocessing", "tempfile", "io", "pickle", "asyncio"}
OF_OS = {"environ", "path", "cpu_count", "getpid"}  # what others may use of os
METHODS = re.compile(  # whose method it is cannot be seen, but for our own modules
    r"save_(pretrained|file|state|to_disk)|save(fig|z)|touch|mkdir|write_(text|bytes)|rename|unlink"
    r"|symlink_to|rmdir|chmod|tofile|dump|to_(csv|json|parquet|pickle)|ProcessPoolExecutor|Popen"
)
OURS = ("write", "run_dir", "out", "stage")  # what these do is looked for where it stands


def offences(source: str) -> list[str]:
    """What `source` names that writes, starts or deletes, as "line: name"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        first, _, rest = name.partition(".")
        if isinstance(node, ast.Import):
            bad = bool(MODULES & {alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            bad = node.module in {*MODULES, "os"} or "ProcessPoolExecutor" in names
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("open"):
            mode = [ast.unparse(a) for a in (*node.args[1:2], *(k.value for k in node.keywords))]
            bad = bool(re.search("'[^']*[wax+]", " ".join(mode)))
        elif first == "os" and rest:
            bad = rest.split(".")[0] not in OF_OS
        else:
            bad = bool(METHODS.fullmatch(name.rpartition(".")[2])) and first not in OURS
            bad |= name == "torch.save"
        if bad:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_writes_processes_and_deletions_stand_in_few_modules(path: pathlib.Path):
    found = offences(path.read_text(encoding="utf-8"))
    assert found == [] or ALLOWED.fullmatch(path.relative_to(ROOT).as_posix())
