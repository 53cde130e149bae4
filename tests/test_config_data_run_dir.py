"""Presets and flags, problems and prompts, the run directory."""

import dataclasses
import importlib
import json
from typing import Literal

import pytest

from common import UserError
from common.files import config
from common.files import write as run_dir
from common.reproduce import plans
from common.rl import data


@dataclasses.dataclass
class Example(config.StageConfig):
    steps: int = dataclasses.field(default=5, metadata={"help": "how many"})
    rate: float = dataclasses.field(default=0.5, metadata={"help": "how fast"})
    kind: Literal["a", "b"] = dataclasses.field(default="a", metadata={"help": "which"})
    names: list[str] = dataclasses.field(default_factory=lambda: ["x"], metadata={"help": "who"})


def parse(tmp_path, preset: str | None, *flags: str) -> Example:
    args = list(flags)
    if preset is not None:
        (tmp_path / "p.yaml").write_text(preset)
        args += ["--config", str(tmp_path / "p.yaml")]
    return config.parse(Example, "train", "An example.", args)


def test_flags_beat_the_preset_and_the_preset_beats_the_defaults(tmp_path):
    cfg = parse(tmp_path, "shared: {threads: 3}\ntrain: {steps: 7, rate: 1, names: [p, q]}", "--steps", "9")
    assert (cfg.steps, cfg.rate, cfg.names, cfg.threads, cfg.kind) == (9, 1, ["p", "q"], 3, "a")


@pytest.mark.parametrize("name", [path.stem for path in config.PRESETS.glob("*.yaml")])
def test_every_preset_suits_every_stage(name):
    stages = {
        "01_train_lora_grpo": "Train",
        "02_extract_deltas": "Extract",
        "03_train_predictor": "Predictor",
        "04_extrapolate": "Extrapolate",
        "06_eval": "Eval",
    }
    sections = ("train", "extract", "predict", "extrapolate", "eval")
    for (stage, kind), section in zip(stages.items(), sections, strict=True):
        cls = getattr(importlib.import_module(stage), f"{kind}Config")
        assert config.parse(cls, section, "", ["--config", name]).config == name
    cls = importlib.import_module("05_continue_rl").ContinueConfig
    assert config.parse(cls, ("train", "continue"), "", ["--config", name]).more_steps == 100
    assert plans.single(name, config.load_preset(name), "runs/x")[-1].name == "06"


def test_the_papers_presets_are_table_2_with_a_model_each():
    models = {config.load_preset(f"paper_qwen2.5_{size}")["shared"]["backbone"] for size in ("1.5b", "3b", "7b", "14b")}
    assert models == {f"Qwen/Qwen2.5-{size}-Instruct" for size in ("1.5B", "3B", "7B", "14B")}
    assert config.load_preset("paper_qwen2.5_7b")["train"]["prompts_per_step"] == 128


def test_a_preset_holds_only_what_differs_from_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("shared: {threads: 3}\ntrain: {steps: 7, rate: 2.0}")
    cfg = parse(tmp_path, f"base: {tmp_path / 'base.yaml'}\ntrain: {{rate: 1.0}}")
    assert (cfg.steps, cfg.rate, cfg.threads) == (7, 1.0, 3)


def test_shared_keys_that_a_stage_does_not_have_are_for_other_stages(tmp_path):
    assert parse(tmp_path, "shared: {backbone: x}").steps == 5


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("train: {stepz: 7}", "unknown key 'stepz' in section train; did you mean steps?"),
        ("trian: {steps: 7}", "unknown section 'trian'; did you mean train?"),
        ("train: {steps: many}", "steps must be int, not 'many'"),
        ("train: {steps: 1.5}", "steps must be int, not 1.5"),
        ("train: {steps: true}", "steps must be int, not True"),
        ("train: {rate: fast}", "rate must be float"),
        ("train: {kind: c}", "kind must be Literal"),
        ("train: {names: x}", "names must be list"),
        ("train: [1, 2]", "mapping of sections"),
        ("train: {steps: [}", "not valid YAML"),
        ("", "mapping of sections"),
    ],
)
def test_a_wrong_preset_is_one_clear_error(tmp_path, preset, message):
    with pytest.raises(UserError, match=r"p\.yaml") as error:
        parse(tmp_path, preset)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stepz", "3"], "unknown option --stepz; did you mean --steps?"),
        (["--steps", "x"], "--steps"),
        (["--kind", "c"], "--kind"),
        (["--config", "dem"], "did you mean demo?"),
    ],
)
def test_a_wrong_flag_is_one_clear_error(tmp_path, flags, message):
    with pytest.raises(UserError) as error:
        parse(tmp_path, None, *flags)
    assert message in str(error.value)


def test_help_gives_an_option_a_line_with_the_presets_value(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "train: {steps: 7}", "--help")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["--steps", "STEPS", "how", "many", "[7]"] for line in lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1+1"}', "no usable 'answer'"),
        ('{"answer": "2"}', "no usable 'prompt'"),
        ("[1]", "no usable 'prompt'"),
        ('{"prompt": "1", "answer": null}', "no usable 'answer'"),
        ("{", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
    ],
)
def test_a_bad_problem_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "1+1", "answer": 2}\n\n' + line + "\n")
    with pytest.raises(UserError) as error:
        data.load_problems(path)
    assert f"{path}, line 3: {message}" in str(error.value)


def test_missing_empty_and_binary_data_are_errors(tmp_path):
    with pytest.raises(UserError, match="not found"):
        data.load_problems(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no problem"):
        data.load_problems(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        data.load_problems(tmp_path / "binary.jsonl")


def test_every_epoch_shows_every_problem_once_in_another_order():
    epochs = [[i for step in range(e * 5 + 1, e * 5 + 6) for i in data.prompt_order(20, 4, step, seed=3)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]


def test_a_step_larger_than_the_data_takes_whole_epochs():
    assert sorted(data.prompt_order(3, 6, 1, seed=0)) == [0, 0, 1, 1, 2, 2]


def test_the_order_depends_on_the_seed_and_a_step_can_straddle_epochs():
    assert data.prompt_order(50, 10, 1, seed=0) != data.prompt_order(50, 10, 1, seed=1)
    straddling = [data.prompt_order(5, 2, step, seed=0) for step in range(1, 6)]
    flat = [i for row in straddling for i in row]
    assert sorted(flat[:5]) == sorted(flat[5:]) == list(range(5))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.json"
    run_dir.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run_dir.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    with pytest.raises(RuntimeError), run_dir.atomic_dir(tmp_path / "d") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not (tmp_path / "d").exists()
    with run_dir.atomic_dir(tmp_path / "d") as folder:
        assert list(folder.iterdir()) == []  # what the failed try left is gone
        (folder / "whole").write_text("x")
    assert (tmp_path / "d" / "whole").exists()


def test_a_stage_knows_what_it_made_and_refuses_what_it_did_not(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("1")
    folder = tmp_path / "stage"

    def stage(value=1, steps=5):
        return run_dir.Stage(folder, {"value": value, "steps": steps}, [source], may_change=("steps",))

    assert not stage().is_done()
    stage().finish()
    assert stage().is_done()
    assert not stage(steps=9).is_done(at_least=("steps", 9))
    with pytest.raises(UserError, match="option value = 1, now it is 2"):
        stage(value=2).is_done()
    source.write_text("2")
    with pytest.raises(UserError, match=r"input in\.txt"):
        stage().is_done()
    assert not stage(value=2).is_done(overwrite=True)
    assert not (folder / "done.json").exists()


def test_a_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not this stage's"):
        run_dir.Stage(tmp_path / "stage", {}).is_done()


def test_a_step_log_drops_what_came_after_the_resumed_step_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = run_dir.StepLog(path, keep_to=0)
    for step in (1, 2, 3):
        log.append({"step": step})
    with open(path, "a") as file:
        file.write('{"step": 4, "rew')
    run_dir.StepLog(path, keep_to=2).append({"step": 3, "again": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
