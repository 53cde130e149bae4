"""The pages name what is there, show what commands wrote, and their examples run."""

import ast
import dataclasses
import importlib
import itertools
import json
import re
import runpy
import shlex
import sys

import pytest
import safetensors.torch
import torch
import yaml
from conftest import ROOT, save_series

from common.baselines.methods import METHODS
from common.files.config import StageConfig
from common.rl import rewards
from common.rl.data import Problem
from common.rl.verifier import Verifier

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([ROOT / "README.md", *ROOT.glob(".github/results/*.md")])
    + sorted([*(ROOT / "common").rglob("*.md"), ROOT / "tests" / "README.md"])
}
README = PAGES["README.md"]
TABLES = (ROOT / ".github" / "results" / "rates" / "tables.md").read_text(encoding="utf-8")
STAGES = {"train": "01_train_lora_grpo", "extract": "02_extract_deltas"}
STAGES |= {"predict": "03_train_predictor", "extrapolate": "04_extrapolate"}
STAGES |= {"continue": "05_continue_rl", "eval": "06_eval"}


def section(title: str) -> str:
    return README.split(f"\n## {title}")[1].split("\n## ")[0]


def blocks(page: str, language: str = "") -> list[str]:
    """The code blocks of a page in that language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.M | re.S)
    return [block for its_language, block in found if its_language == language]


def outside_blocks(page: str) -> str:
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)


def options(stage: str) -> set[str]:
    """The option names of a stage."""
    classes = vars(importlib.import_module(stage)).values()
    configs = [c for c in classes if isinstance(c, type) and issubclass(c, StageConfig)]
    own = [c for c in configs if c.__module__ == stage]
    return {field.name for c in own for field in dataclasses.fields(c)}


# --------------------------------------------------------------------------------------------------
# What is named exists
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page])
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_are_named_exist(page):
    paths = re.findall(r"(?<![\w/.])(?:common|tests|\.github|0\d_\w+\.py)(?:/[\w.]+)*", PAGES[page])
    assert [path for path in paths if not (ROOT / path.rstrip(".")).exists()] == []


def named() -> list[tuple[str, str]]:
    """(file, function or class) of the README's two tables."""
    found = []
    for row in section("From the paper to the code").splitlines():
        if place := re.search(r"(.*) in (\S+\.py) \|$", row):
            found += [(place[2], name) for name in re.findall(r"`(\w+)`", place[1])]
    for row in section("The method").splitlines():
        if place := re.search(r"\| (\S+\.py) \| `(?:(\w+)\.)?(\w+)` \|$", row):
            found.append((f"common/{place[2]}.py" if place[2] else place[1], place[3]))
    assert len(found) >= 18  # the tables are read
    return found


@pytest.mark.parametrize(("file", "name"), named())
def test_functions_of_the_tables_exist(file, name):
    nodes = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    assert name in {getattr(node, "name", None) for node in nodes}


def test_every_method_stands_in_the_table_of_methods():
    page = PAGES["common/baselines/README.md"].split("| method | source |")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \| ", page, re.M)) == {"next", *METHODS}


def test_every_metric_that_is_explained_is_written():
    keys = re.findall(r"^\| (`.*?`) \| ", PAGES["common/rl/README.md"], re.M)
    names = re.findall(r"`(\w+)`", " ".join(keys))
    code = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "common" / "rl").glob("*.py"))
    code += (ROOT / "01_train_lora_grpo.py").read_text(encoding="utf-8")
    assert len(names) > 15
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


# --------------------------------------------------------------------------------------------------
# Commands and presets
# --------------------------------------------------------------------------------------------------


def commands(page: str) -> list[str]:
    """Commands in code blocks, and those within a line that begin with python."""
    lines = "".join(blocks(page)).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(python [^`]+)`", outside_blocks(page))
    typed = [line.split("#")[0].strip() for line in lines]
    return [line for line in typed if re.match(r"python |accelerate |pip ", line)]


EVERY_COMMAND = [(page, command) for page in PAGES for command in commands(page)]
assert len(EVERY_COMMAND) > 35


def script_and_flags(command: str) -> tuple[str, list[str]]:
    """The script or module that a command starts, and the words after it."""
    words = shlex.split(command.split("&&")[-1])
    for i, word in enumerate(words):
        if word == "-m":
            return words[i + 1], words[i + 2 :]
        if word.endswith(".py") or word.startswith("01_"):
            return word, words[i + 1 :]
    return "", []


def known_flags(script: str) -> set[str]:
    if script[:1] == "0":
        names = {"config", *options(script.removesuffix(".py"))}
        return {f"--{name.replace('_', '-')}" for name in names}
    place = ROOT / script if script.endswith(".py") else ROOT / script.replace(".", "/")
    files = [place] if place.is_file() else place.glob("*.py")
    return set(re.findall(r'"(--[a-z-]+)"', "".join(f.read_text(encoding="utf-8") for f in files)))


@pytest.mark.parametrize(("page", "command"), EVERY_COMMAND, ids=[c for _, c in EVERY_COMMAND])
def test_commands_name_what_there_is(page, command):
    script, words = script_and_flags(command)
    if script in ("", "pytest") or "..." in script:
        return
    assert (ROOT / script).is_file() or (ROOT / script.replace(".", "/") / "__main__.py").is_file()
    assert [word for word in words if word[:2] == "--" and word not in known_flags(script)] == []
    for flag, value in itertools.pairwise(words):
        if flag in ("--config", "--preset") and value.isidentifier():
            assert (ROOT / "common" / "presets" / f"{value}.yaml").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_flags_within_a_line_exist(page):
    others = {"--num_processes", "--config_file", "--index-url", "--quiet"}  # of other programs
    others |= {"--num_machines", "--machine_rank", "--main_process_ip"}
    others |= {"--help", "--model", "--epochs"}  # of argparse, and of benches
    known = others.union(*map(known_flags, (*STAGES.values(), "common.reproduce", "common.demo")))
    known |= known_flags("tests/bench/torture.py") | known_flags("tests/bench/bench_bf16.py")
    assert set(re.findall(r"--[a-z][a-z0-9_-]+", outside_blocks(page))) - known == set()


def test_ci_finds_the_two_commands():
    found = re.findall(r"^pip install -r requirements.txt && python -m (.*)$", README, re.M)
    assert found == ["common.reproduce --preset demo", "pytest"]


EXAMPLES = [(page, block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "block"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_examples_of_presets_have_known_keys_and_both_prompts(page, block):
    preset = yaml.safe_load(block)
    assert {"prompt_template", "system_prompt"} <= preset["shared"].keys()
    every = set().union(*map(options, STAGES.values()))
    for name, stage in STAGES.items():
        assert preset.get(name, {}).keys() <= options(stage)
    assert preset["shared"].keys() <= every


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


def test_numbers_of_the_results_stand_in_the_tables():
    shown = re.findall(r"(?<![\d.])\d+\.\d+", section("Results"))
    there = set(re.findall(r"(?<![\d.])\d+\.\d+", TABLES))
    assert len(shown) > 25
    assert [number for number in shown if number not in there | {"1.5"}] == []


def test_what_the_results_page_says_of_speed_is_what_the_bench_printed():
    page = PAGES[".github/results/README.md"]
    page = page.split("## How fast")[1].split("## ")[0]
    shown = [line for line in page.splitlines() if line.startswith("* ")]
    printed = (ROOT / ".github" / "results" / "extract.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) == 3
    assert [line for line in shown if line not in printed] == []


# --------------------------------------------------------------------------------------------------
# The lines for another project
# --------------------------------------------------------------------------------------------------


def test_the_reward_of_the_example_pays_right_answers_and_of_them_the_shorter(tmp_path):
    [lines] = blocks("common/rl/README.md", "python")
    (tmp_path / "mine.py").write_text(lines)
    problems = [Problem("1+2", "3", "number", {})] * 3
    texts = ["\\boxed{3}" + " " * 91, "\\boxed{4}", "\\boxed{3}"]
    made = rewards.Rewards([f"{tmp_path}/mine.py:short"], Verifier(), problems)
    found = made.score(texts, problems, [True] * 3, [[1]] * 3)
    assert found == pytest.approx([1 / 2, 0, 1 / 1.09])


def test_the_lines_for_another_project_jump(backbone_dir, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (tmp_path / "rank1.py").write_text((ROOT / "common" / "rank1.py").read_text(encoding="utf-8"))
    [lines] = blocks("README.md", "python")
    assert len([line for line in lines.splitlines() if not re.match("import|from", line)]) <= 18
    (tmp_path / "jump.py").write_text(lines)
    outputs, lora = tmp_path / "outputs", {"r": 4, "lora_alpha": 2}
    lora["target_modules"] = ["q_proj", "up_proj"]
    save_series(backbone_dir, outputs / "checkpoint-{}", 11, **lora)
    assert "common" not in lines
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    runpy.run_path("jump.py")
    sys.modules.pop("rank1")

    config = json.loads((outputs / "jumped" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 2.5)
    fresh = AutoModelForCausalLM.from_pretrained(backbone_dir, dtype=torch.float32)
    jumped = PeftModel.from_pretrained(fresh, outputs / "jumped", is_trainable=True)
    loaded = {name: w for name, w in jumped.named_parameters() if "lora_" in name}
    assert all(w.requires_grad for w in loaded.values())
    folders = (outputs / f"checkpoint-{step}" for step in (60, 110))
    saved = [safetensors.torch.load_file(path / "adapter_model.safetensors") for path in folders]
    for b in [name for name in saved[1] if "lora_B" in name]:
        a = b.replace("lora_B", "lora_A")
        old, last = (0.5 * one[b].double() @ one[a].double() for one in saved)
        u, sigma, vh = torch.linalg.svd(last - old)
        wanted = last + 1.5 * sigma[0] * torch.outer(u[:, 0], vh[0])
        names = (name.replace(".weight", ".default.weight") for name in (b, a))
        left, right = (loaded[name].detach().double() for name in names)
        torch.testing.assert_close(0.5 * left @ right, wanted, rtol=1e-4, atol=1e-6)
