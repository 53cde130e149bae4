"""The README says what the commands wrote, and names what is there."""

import ast
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_result_in_the_readme_stands_in_the_report_that_a_run_wrote():
    report = (ROOT / ".github" / "results" / "tables" / "tables.md").read_text(encoding="utf-8").splitlines()
    shown = README.split("## What holds, on this toy")[1].split("## Is there a better predictor?")[0].splitlines()
    rows = [line for line in shown if line.startswith("|") or line.startswith("* Fig.")]
    assert len(rows) > 60
    assert [row for row in rows if row not in report] == []


def test_files_pictures_and_functions_that_the_readme_names_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    code = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("0*.py"), *(ROOT / "common").glob("*.py")])
    mapped = README.split("## From the paper to the code")[1].split("## The stages by hand")[0]
    names = [name for name in re.findall(r"`([A-Za-z_0-9]+)`", mapped)]
    assert len(names) > 15
    assert [name for name in names if not re.search(rf"(def|class) {name}\b", code)] == []


def needed(module: str) -> set[str]:
    """The modules of ours without which `module` cannot be imported."""
    tree = ast.parse((ROOT / "common" / f"{module}.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "common"]
    direct = {name for node in imports for name in (node.module.split(".")[1:] or [alias.name for alias in node.names])}
    return direct.union(*(needed(other) for other in direct))


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("grpo", set()),
        ("rank1", set()),
        ("predictor", {"rank1"}),
        ("extrapolators", {"rank1", "adapters", "adapter_series", "inputs", "model_files", "run_dir"}),
    ],
)
def test_a_copied_module_needs_what_the_readme_says(module, others):
    assert needed(module) == others
    paragraph = README.split("To copy one stage: ")[1].split("\n\n")[0]
    assert all(f"{name}.py" in paragraph for name in {module, *others})


@pytest.mark.parametrize(("section", "results"), [("Is there a better predictor?", "predictor_demo"), ("How fast, how exact", "extract")])
def test_tables_in_the_readme_are_what_a_bench_printed(section, results):
    printed = (ROOT / ".github" / "results" / f"{results}.md").read_text(encoding="utf-8").splitlines()
    shown = README.split(f"## {section}")[1].split("\n## ")[0].splitlines()
    rows = [line for line in shown if line.startswith(("|", "* "))]
    assert len(rows) > 6
    assert [row for row in rows if row not in printed] == []
