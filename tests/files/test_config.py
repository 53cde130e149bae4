"""Presets and flags, problems and their order, files and folders that are whole or not there."""

import dataclasses
from typing import Literal

import pytest
from conftest import SCRIPTS, parse_stage

from common import UserError
from common.files import config, read, write
from common.files.config import option
from common.reproduce import plans
from common.rl import data


@dataclasses.dataclass
class Example(config.StageConfig):
    steps: int = option(5, "how many")
    rate: float = option(0.5, "how fast")
    kind: Literal["a", "b"] = option("a", "which")
    names: list[str] = option(["x"], "who")


def parse(tmp_path, preset: str | None, *flags: str) -> Example:
    args = list(flags)
    if preset is not None:
        (tmp_path / "p.yaml").write_text(preset)
        args += ["--config", str(tmp_path / "p.yaml")]
    return config.parse(Example, "train", "An example.", args)


def test_flags_beat_the_preset_and_the_preset_beats_the_defaults(tmp_path):
    preset = "shared: {threads: 3, backbone: x}\ntrain: {steps: 7, rate: 1, names: [p, q]}"
    cfg = parse(tmp_path, preset, "--steps", "9")
    assert (cfg.steps, cfg.rate, cfg.names) == (9, 1, ["p", "q"])
    assert (cfg.threads, cfg.kind) == (3, "a")
    assert config.as_dict(cfg) == {"steps": 9, "rate": 1, "kind": "a", "names": ["p", "q"]}


@pytest.mark.parametrize("name", [path.stem for path in config.PRESETS.glob("*.yaml")])
def test_every_preset_suits_every_stage(name):
    for number in SCRIPTS:
        assert parse_stage(number, "--config", name).config == name
    assert plans.single(name, config.load_preset(name), "runs/x")[-1].name == "06"


def test_the_defaults_and_the_papers_presets_are_table_2_with_a_model_each():
    wanted = {"prompts_per_step": 128, "mini_batch": 32, "rollouts": 8, "learning_rate": 5e-6}
    wanted |= {"lora_rank": 64, "lora_alpha": 32, "steps": 150, "save_every": 10}
    wanted |= {"max_prompt_tokens": 1024, "max_new_tokens": 4096, "temperature": 1.0}
    for size in ("", "1.5B", "3B", "7B", "14B"):
        cfg = parse_stage("01", *(["--config", f"paper_qwen2.5_{size.lower()}"] if size else []))
        assert {key: getattr(cfg, key) for key in wanted} == wanted
        assert not size or cfg.backbone == f"Qwen/Qwen2.5-{size}-Instruct"
    assert (parse_stage("02").k, parse_stage("04").alphas) == (5, [1.5])


def test_a_preset_holds_only_what_differs_from_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("shared: {threads: 3}\ntrain: {steps: 7, rate: 2.0}")
    cfg = parse(tmp_path, f"base: {tmp_path / 'base.yaml'}\ntrain: {{rate: 1.0}}")
    assert (cfg.steps, cfg.rate, cfg.threads) == (7, 1.0, 3)


def test_stage_5_does_not_start_where_stage_1_started(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("train: {start: outputs/checkpoint-20}")
    for number, want in (("01", "outputs/checkpoint-20"), ("05", "next-aligned_alpha1.5")):
        assert parse_stage(number, "--config", str(preset)).start == want


def test_a_preset_may_have_the_name_of_its_base_and_is_not_its_own(tmp_path):
    (tmp_path / "demo.yaml").write_text("base: demo")
    preset = config.load_preset(str(tmp_path / "demo.yaml"))
    assert preset == config.load_preset("demo")
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {tmp_path}/{base}.yaml")
    with pytest.raises(UserError, match="must be the name of another preset"):
        config.load_preset(str(tmp_path / "a.yaml"))


def test_a_rate_that_yaml_takes_for_a_text_is_a_number(tmp_path):
    assert parse(tmp_path, "train: {rate: 1e-4}").rate == 1e-4
    (tmp_path / "mine.yaml").write_text("base: demo\ntrain: {learning_rate: 1e-4}")
    preset = config.load_preset(str(tmp_path / "mine.yaml"))
    assert plans.values_of("mine", preset)["train"]["learning_rate"] == 1e-4


WRONG_PRESETS = {
    "train: {stepz: 7}": "unknown key 'stepz' in section train; did you mean steps?",
    "trian: {steps: 7}": "unknown section 'trian'; did you mean train?",
    "train: {steps: many}": "steps must be int, not 'many'",
    "train: {steps: 1.5}": "steps must be int, not 1.5",
    "train: {steps: true}": "steps must be int, not True",
    "train: {rate: fast}": "rate must be float",
    "train: {kind: c}": "kind must be Literal['a', 'b'], not 'c'",
    "train: {names: x}": "names must be list[str], not 'x'",
    "train: {run_dir: elsewhere}": "run_dir is for the command line alone",
    "shared: {overwrite: true}": "overwrite is for the command line alone",
    "train: [1, 2]": "mapping of sections",
    "1: {}": "mapping of sections",
    "base: 5": "base must be the name of another preset, not 5",
    "base: null": "base must be the name of another preset, not None",
    "shared: {start: x}": "start is for a stage, not for shared",
    "train: {1: 2}": "mapping of sections",
    "": "mapping of sections",
}
NO_YAML = ("train: {steps: [}", "train: {x: 2024-13-45}", "train: {steps: " + "9" * 5000 + "}")
NO_YAML += ("train: !!python/object/apply:os.system [exit]",)
WRONG_PRESETS |= dict.fromkeys(NO_YAML, "not valid YAML")


@pytest.mark.parametrize("preset", WRONG_PRESETS)
def test_a_wrong_preset_is_one_clear_error(tmp_path, preset):
    with pytest.raises(UserError) as error:
        parse(tmp_path, preset)
    assert WRONG_PRESETS[preset] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_preset_of_other_bytes_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not valid YAML"):
        parse(tmp_path, "base: other.yaml")


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
    words = ["--steps", "N", "how", "many", "(default:", "7)"]
    assert any(line.split() == words for line in lines)


BAD_PROBLEMS = {
    '{"prompt": "1+1"}': "no usable 'answer'",
    '{"answer": "2"}': "no usable 'prompt'",
    '{"question": "2", "answer": "2"}': "--prompt-column, --answer-column; there are question, a",
    "[1]": "no usable 'prompt'",
    '{"prompt": "1", "answer": null}': "no usable 'answer'",
    '{"prompt": "1", "answer": " "}': "no usable 'answer'",
    '{"prompt": "1", "answer": NaN}': "no usable 'answer'",
    '{"prompt": "1", "answer": true}': "no usable 'answer'",
    '{"prompt": "1", "answer": ' + "9" * 5000 + "}": "cannot be read as JSON",
    "{": "cannot be read as JSON",
}


@pytest.mark.parametrize("line", BAD_PROBLEMS)
def test_a_bad_problem_names_file_and_line(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00", "answer": 2}\n\n' + line + "\n")
    with pytest.raises(UserError) as error:
        data.load_problems(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert BAD_PROBLEMS[line] in str(error.value)


def test_missing_empty_and_binary_data_are_errors(tmp_path):
    path = tmp_path / "p.jsonl"
    wrong = {None: "not found", b"\n": "holds no problem", b"\xff\xfe": "cannot be read as JSON"}
    for content, message in wrong.items():
        if content:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            data.load_problems(path)


def test_the_order_shows_every_problem_once_an_epoch_and_depends_on_the_seed():
    order = [data.prompt_order(20, 8, step, seed=3) for step in range(1, 6)]  # 2.5 steps an epoch
    flat = [i for row in order for i in row]
    assert sorted(flat[:20]) == sorted(flat[20:]) == list(range(20))
    assert flat[:20] != flat[20:]
    assert data.prompt_order(20, 8, 1, seed=1) != order[0]
    assert sorted(data.prompt_order(3, 6, 1, seed=0)) == [0, 0, 1, 1, 2, 2]


def test_the_quick_hash_of_a_model_is_of_its_content(backbone_dir, tmp_path):
    copy = tmp_path / "copy"
    with write.atomic_dir(copy) as folder:
        write.copy_files(backbone_dir.iterdir(), folder)
    wanted = read.quick_hash(str(backbone_dir))
    assert read.quick_hash(str(copy)) == wanted != ""
    (copy / "README.md").write_text("no part of the model")
    assert read.quick_hash(str(copy)) == wanted
    for name in ("config.json", "model.safetensors"):
        raw = bytearray((copy / name).read_bytes())
        raw[-1 if name == "config.json" else 9000] ^= 1
        (copy / name).write_bytes(raw)
        assert read.quick_hash(str(copy)) != wanted
        wanted = read.quick_hash(str(copy))
    assert read.quick_hash("some/model-that-is-not-cached") is None
