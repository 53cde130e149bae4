"""All commands of `--grid paper`, and its page, on stand-ins: the demo's model and sums, under the
names and in the layout of the hub's model and data sets. CI runs it."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import datasets
import pytest
import yaml
from conftest import ROOT

from common import demo
from common.files import config
from common.reproduce import plans
from common.rl import benchmarks

MODEL, COMMIT = "Qwen/Qwen2.5-1.5B-Instruct", "0" * 40
FIELDS = ("biology", "business", "chemistry", "computer science", "economics", "engineering")
FIELDS += ("health", "history", "law", "math", "other", "philosophy", "physics", "psychology")
# Each command as a fork of one process that has the libraries loaded.
IN_TURN = "import json, pathlib, sys, torture; "
IN_TURN += "torture.undisturbed(json.loads(sys.argv[2]), pathlib.Path(sys.argv[1]))"
MATHS = ("aime24", "aime25", "amc23", "minerva", "olymmath-en-easy")
PRESET = {
    "base": "paper_qwen2.5_1.5b",
    "shared": {"prompt_template": "{prompt}", "system_prompt": "", "threads": 1},
    "train": {
        **{"steps": 6, "save_every": 1, "prompts_per_step": 4, "mini_batch": 2},
        **{"max_new_tokens": 72, "learning_rate": 1e-3, "lora_rank": 4, "lora_alpha": 2.0},
    },
    "extract": {"k": 2, "last_step": 6, "fit_checkpoints": 4},
    "predict": {"epochs": 20},
    "continue": {"more_steps": 2},
    "eval": {"test_data": [*MATHS], "runs": 1, "max_new_tokens": 72},
    "reproduce": {"launch": "python", "jobs": 1, "reference_steps": 10, "full_flags": ""},
}


def rows_of(name: str, source: benchmarks.Source, pairs: list) -> list[dict]:
    """Sums in the columns of the data set `name`."""
    asked = [(f"{a}+{b}", str(a + b), [str(a + b + i) for i in range(1, 4)]) for a, b in pairs]
    if name == "dapo-math-17k":
        turns = [[{"role": "user", "content": question}] for question, _, _ in asked]
        gold = [{"ground_truth": answer} for _, answer, _ in asked]
        return [{"prompt": p, "reward_model": g} for p, g in zip(turns, gold, strict=True)]
    if name == "gpqa-diamond":
        columns = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
        return [dict(zip(columns, (q, answer, *wrong), strict=True)) for q, answer, wrong in asked]
    if name == "mmlu-pro":
        fields = zip(itertools.cycle(FIELDS), asked, strict=False)
        return [
            {"question": q, "options": [answer, *wrong], "answer_index": 0, "category": field}
            for field, (q, answer, wrong) in fields
        ]
    return [{source.prompt: question, source.answer: answer} for question, answer, _ in asked]


@pytest.fixture
def hub(tmp_path) -> pathlib.Path:
    """The hub's cache with the model and every data set."""
    cache = tmp_path / "hub"
    model = cache / f"models--{MODEL.replace('/', '--')}"
    shutil.copytree(demo.SHIPPED, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    for seed, (name, source) in enumerate(benchmarks.SOURCES.items()):
        folder = cache / f"datasets--{source.hub_id.replace('/', '--')}" / "snapshots"
        path = folder / source.revision / source.file
        path.parent.mkdir(parents=True)
        count = {"dapo-math-17k": 64, "mmlu-pro": 2 * len(FIELDS)}.get(name, 8)
        rows = datasets.Dataset.from_list(rows_of(name, source, demo.problems(count, seed)))
        {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[path.suffix](
            path
        )
    return cache


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}")[1].split("\n## ")[0]


def first_cells(page: str, title: str) -> list[str]:
    lines = [line for line in section(page, title).splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]]


def test_the_papers_tables_and_figures_are_made(hub, tmp_path):
    preset, root = tmp_path / "small.yaml", tmp_path / "grid"
    preset.write_text(yaml.safe_dump(PRESET))
    env = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    env |= {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "PYTHONPATH": "tests/bench"}
    found = config.load_preset(str(preset))
    jobs = plans.grid("paper", str(preset), found, str(root), [1], range(3, 9))
    page_of = ["--preset", str(preset), "--grid", "paper", "--seeds", "1", "--run-dir", str(root)]
    for command in (
        ["-c", IN_TURN, str(root), json.dumps([job.argv[1:] for job in jobs])],
        ["-m", "common.reproduce", "--report", *page_of],
    ):
        typed = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "timeout": 3600}
        made = subprocess.run([sys.executable, *command], **typed)
        told, log = made.stdout[-3000:] + made.stderr[-3000:], tmp_path / "whole.log"
        assert made.returncode == 0, told + log.read_text()[-3000:]
    page = (root / "tables.md").read_text()
    assert "Left out of all tables" not in page
    merged = "NExt (paper), merged restart"
    rows = first_cells(page, "Tables 3 and 4")
    assert {"Backbone", "GRPO with LoRA", "GRPO, full parameters", "NExt (paper)", merged} <= {
        *rows
    }
    assert {"RL-Extra", "AlphaRL, fitted on the steps, merged restart"} <= {*rows}
    ours = [row for row in first_cells(page, "Beside the paper's numbers") if row[:5] == "Table"]
    for number in range(3, 9):
        assert any(f"Table {number}" in row or f"Table 3, {number}" in row for row in ours), number
    assert len(ours) == len({*ours})
    assert "Table 7: GRPO, no jump, 10 steps" in ours
    variants = first_cells(page, "Table 5")
    assert [row.removeprefix("NExt (paper)") for row in variants] == [
        *("", ", w/o LoRA", ", w/o global delta", ", w/o local delta")
    ]
    assert first_cells(page, "Table 6") == ["GRPO", "RLOO", "REINFORCE++"]
    header = section(page, "Every task").strip().splitlines()[0]
    fields = [f"mmlu-pro-{field.replace(' ', '-')}" for field in FIELDS]
    assert all(f" {task} |" in header for task in (*MATHS, "gpqa-diamond", *fields))
    assert " mean of maths (5) |" in header
    figures = {path.stem for path in (root / "figures").glob("*.png")}
    assert {
        "fig2_energy_ratio",
        "fig3_linear_fit",
        "fig5_cost",
        "fig6_alpha",
        "fig7_gpqa",
    } <= figures
    alphas = {r["alpha"] for r in json.loads((root / "results.json").read_text())}
    assert {0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0} <= alphas
