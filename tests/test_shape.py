"""The size and the shape of the code. `python tests/test_shape.py` prints what is measured."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMON = ROOT / "common"

LINES = {  # file -> at most this many lines
    "01_train_lora_grpo.py": 200,
    "02_extract_deltas.py": 120,
    "03_train_predictor.py": 120,
    "04_extrapolate.py": 130,
    "05_continue_rl.py": 80,
    "06_eval.py": 150,
    "common/grpo.py": 130,
    "common/rank1.py": 200,
    "common/predictor.py": 160,
    "README.md": 220,
}
STAGES = [name for name in LINES if name[0] == "0"]
HELPERS = dict(zip(STAGES, (4, 3, 3, 3, 4, 4), strict=True))  # units that a stage imports
COMMON_LINES = 7076  # 4,500 is the aim
FILE_LINES, FUNCTION_LINES = 250, 50
COLUMNS, PARAMETERS = 100, 6

CODE = sorted([*ROOT.glob("*.py"), *COMMON.rglob("*.py")])
PAGES = [ROOT / "README.md", ROOT / ".github" / "results" / "README.md", *COMMON.rglob("*.md")]
PAGES.append(ROOT / "tests" / "README.md")


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text(path: pathlib.Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def lines(path: pathlib.Path | str) -> int:
    return len(text(path).splitlines())


def wide(path: pathlib.Path) -> list[int]:
    """Numbers of the lines over 100 columns; of a page, outside tables and code blocks."""
    found, fenced, page = [], False, path.suffix == ".md"
    for number, line in enumerate(text(path).splitlines(), 1):
        fenced ^= line.startswith("```")
        if len(line) > COLUMNS and not (page and (fenced or line.startswith("|"))):
            found.append(number)
    return found


def functions(path: pathlib.Path) -> list[tuple[str, int, int]]:
    """(name, lines, parameters without self) of every function and method."""
    found = []
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            some = filter(None, (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg))
            count = len([arg for arg in some if arg.arg not in ("self", "cls")])
            found.append((node.name, node.end_lineno - node.lineno + 1, count))
    return found


# --------------------------------------------------------------------------------------------------
# What imports what
# --------------------------------------------------------------------------------------------------


def imported(path: pathlib.Path) -> set[str]:
    """Dotted names of all that `path` imports, inside functions too, import_module included."""
    found = set()
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def file_of(name: str) -> pathlib.Path | None:
    """The file of ours that a dotted name stands in: its module, or its package's __init__.py."""
    if name[:1] == "0":
        return ROOT / f"{name}.py"
    while name.split(".")[0] == "common":
        path = ROOT / name.replace(".", "/")
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
        name = name.rpartition(".")[0]
    return None


def has_code(path: pathlib.Path) -> bool:
    body = ast.parse(text(path)).body
    return any(not isinstance(getattr(node, "value", None), ast.Constant) for node in body)


def closure(path: pathlib.Path) -> set[pathlib.Path]:
    """The files of ours, with code in them, without which `path` cannot work."""
    found, left = set(), [path]
    while left:
        for other in filter(None, map(file_of, imported(left.pop()))):
            if other not in found | {path} and has_code(other):
                found.add(other)
                left.append(other)
    return found


def units(stage: str) -> set[str]:
    """What a stage itself imports of ours: a top-level file or a package of common/, or a stage.

    `UserError`, which is all that common/__init__.py has, does not count.
    """
    files = filter(None, map(file_of, imported(ROOT / stage)))
    parts = [path.relative_to(ROOT).parts for path in files]
    return {pathlib.PurePath(p[1] if p[0] == "common" else p[0]).stem for p in parts} - {"__init__"}


# --------------------------------------------------------------------------------------------------
# The numbers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINES)
def test_a_file_keeps_its_budget(name):
    assert lines(name) <= LINES[name]


@pytest.mark.parametrize("path", [p for p in CODE if name_of(p) not in LINES], ids=name_of)
def test_no_helper_is_long(path):
    assert lines(path) <= FILE_LINES


def test_common_is_short():
    assert sum(map(lines, COMMON.rglob("*.py"))) < COMMON_LINES


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=name_of)
def test_lines_have_100_columns(path):
    assert wide(path) == []


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_functions_are_short(path):
    assert [(name, size) for name, size, _ in functions(path) if size > FUNCTION_LINES] == []


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_functions_have_few_parameters(path):
    assert [(name, count) for name, _, count in functions(path) if count > PARAMETERS] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_few_units(stage):
    assert len(units(stage)) <= HELPERS[stage], units(stage)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("grpo", set()), ("rank1", set()), ("predictor", {"common.rank1", "common.grpo"})],
)
def test_the_top_files_need_torch_alone(name, allowed):
    names = imported(COMMON / f"{name}.py")
    others = {other.split(".")[0] for other in names} - sys.stdlib_module_names
    assert others <= {"torch", "common"}
    ours = {other for other in names if other.split(".")[0] == "common"}
    assert {".".join(other.split(".")[:2]) for other in ours} <= allowed


def test_nothing_else_stands_at_the_top_level():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository, so nothing says what belongs to it")
    there = {path.split("/")[0] for path in listed.stdout.splitlines() if path[0] != "."}
    assert there == {*STAGES, "README.md", "requirements.txt", "common", "tests"}


# --------------------------------------------------------------------------------------------------
# Whatever writes, starts a process or deletes stands in few modules: the source is searched
# --------------------------------------------------------------------------------------------------

# write: the folders of a run, vLLM's adapter; policy: in an open folder; given: runs stage 6; verl:
# runs verl's merger.
ALLOWED = re.compile(
    r"common/(files/write|rl/(policy|verifier\w*|rollout|vllm_engine)|baselines/given"
    r"|reproduce/(__main__|run\w*|verl))\.py"
)
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


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_writes_processes_and_deletions_stand_in_few_modules(path: pathlib.Path):
    found = offences(text(path))
    assert found == [] or ALLOWED.fullmatch(name_of(path))


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def table() -> str:
    """What the issue measured, as Markdown: number, measured, allowed."""
    common = [*COMMON.rglob("*.py")]
    files = len([path for path in common if has_code(path)])
    rows = [(f"lines of {name}", lines(name), limit) for name, limit in LINES.items()]
    rows += [
        ("lines of common/", f"{sum(map(lines, common)):,} in {files} files", f"{COMMON_LINES:,}"),
    ]
    for stage in STAGES:
        rows.append((f"{stage[:2]} imports", ", ".join(sorted(units(stage))), HELPERS[stage]))
    for stage in STAGES:
        needed = closure(ROOT / stage)
        size = f"{len(needed)} files, {sum(map(lines, needed)):,} lines"
        rows.append((f"{stage[:2]} needs in all", size, "-"))
    every = [(*f, name_of(path)) for path in CODE for f in functions(path)]
    long, many = max(every, key=lambda f: f[1]), max(every, key=lambda f: f[2])
    code = [line for path in CODE for line in text(path).splitlines() if line.strip()]
    over = sum(len(line) > COLUMNS for line in code)
    rows += [
        ("longest function", f"{long[1]} ({long[0]}, {long[3]})", FUNCTION_LINES),
        ("longest parameter list", f"{many[2]} ({many[0]}, {many[3]})", PARAMETERS),
        (f"code lines over {COLUMNS} columns", f"{over} ({over / len(code):.0%})", 0),
    ]
    body = "".join(f"| {what} | {now} | {limit} |\n" for what, now, limit in rows)
    return f"| number | measured | at most |\n|---|--:|--:|\n{body}"


if __name__ == "__main__":
    print(table())
