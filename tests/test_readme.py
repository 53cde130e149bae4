"""The README says what the commands wrote, and names what is there."""

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


@pytest.mark.parametrize(("section", "results"), [("Is there a better predictor?", "predictor_demo"), ("How fast, how exact", "extract")])
def test_tables_in_the_readme_are_what_a_bench_printed(section, results):
    printed = (ROOT / ".github" / "results" / f"{results}.md").read_text(encoding="utf-8").splitlines()
    shown = README.split(f"## {section}")[1].split("\n## ")[0].splitlines()
    rows = [line for line in shown if line.startswith(("|", "* "))]
    assert len(rows) > 6
    assert [row for row in rows if row not in printed] == []
