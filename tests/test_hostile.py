"""Input that means harm: nothing of it is run or written elsewhere, and the answer is one line."""

import importlib
import json
import pathlib
import pickle
import shutil

import pytest
import safetensors.torch
import torch
from conftest import call_on, save_lora

from common import UserError, demo
from common.files import models as model_files
from common.files import read as inputs
from common.rl import data, policy

SMALL = (
    *(
        "--prompt-template",
        "{prompt}",
        "--system-prompt",
        "",
        "--max-prompt-tokens",
        "64",
        "--max-new-tokens",
        "4",
        "--engine",
        "hf",
    ),
)
TRAIN = (
    *SMALL,
    "--steps",
    "1",
    "--prompts-per-step",
    "2",
    "--mini-batch",
    "2",
    "--rollouts",
    "2",
    "--lora-rank",
    "2",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory with six checkpoints of a random walk on its own backbone. Copy it."""
    run = tmp_path_factory.mktemp("made") / "run"
    shutil.copytree(demo.SHIPPED, run / "backbone")
    (run / "data").mkdir()
    for name in ("train", "test"):
        (run / "data" / f"{name}.jsonl").write_text(
            '{"prompt": "1+1=", "answer": 2}\n{"prompt": "2+3=", "answer": 5}\n'
        )
    backbone, _ = policy.load_backbone(str(run / "backbone"))
    info = {"backbone": "{run_dir}/backbone", "backbone_fingerprint": policy.fingerprint(backbone)}
    model = policy.add_lora(backbone, 2, 2.0, seed=0)
    for step in range(1, 7):
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data += 0.02 * torch.randn(parameter.shape)
        save_lora(model, run / "made" / f"step_{step:04d}", {"step": step, **info})
    return run


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def extract(monkeypatch, capsys, run, *flags):
    wanted = ["--checkpoints", "{run_dir}/made/step_*", "--k", "1", "--fit-checkpoints", "3"]
    return call_on(monkeypatch, capsys, "02_extract_deltas.py", run, *wanted, *flags)


def train(monkeypatch, capsys, run, *flags):
    where = ("--backbone", "{run_dir}/backbone", "--train-data", "{run_dir}/data/train.jsonl")
    return call_on(monkeypatch, capsys, "01_train_lora_grpo.py", run, *TRAIN, *where, *flags)


def jump(monkeypatch, capsys, run):
    assert extract(monkeypatch, capsys, run) == (0, "")
    assert call_on(monkeypatch, capsys, "04_extrapolate.py", run, "--methods", "none") == (0, "")


def resume(monkeypatch, capsys, run, *flags):
    where = (
        "--backbone",
        "{run_dir}/backbone",
        "--train-data",
        "{run_dir}/data/train.jsonl",
        "--more-steps",
        "1",
    )
    return call_on(
        monkeypatch, capsys, "05_continue_rl.py", run, *TRAIN, *where, "--start", "none", *flags
    )


def evaluate(monkeypatch, capsys, run, *flags):
    where = (
        "--backbone",
        "{run_dir}/backbone",
        "--test-data",
        "{run_dir}/data/test.jsonl",
        "--runs",
        "1",
    )
    return call_on(monkeypatch, capsys, "06_eval.py", run, *SMALL, *where, *flags)


def edit_json(path: pathlib.Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Never executed


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


def code(canary: pathlib.Path) -> str:
    """A module that makes the file as soon as it is imported."""
    return f"open({str(canary)!r}, 'w')\n"


def test_the_canary_sings(canary, tmp_path):
    """The traps below are worth nothing if they do not spring."""
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()
    canary.unlink()
    torch.save(Canary(canary), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert canary.exists()
    canary.unlink()
    exec(code(canary))
    assert canary.exists()


def weights_in_a_pickle(folder, canary):
    (folder / "model.safetensors").unlink()
    torch.save(Canary(canary), folder / "pytorch_model.bin")


def a_shard_that_is_a_pickle(folder, canary):
    (folder / "model.safetensors").unlink()
    torch.save(Canary(canary), folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.norm.weight": "pytorch_model.bin"}}'
    )


def remote_code(folder, canary):
    for name in ("modeling_x", "configuration_x", "tokenization_x"):
        (folder / f"{name}.py").write_text(code(canary))
    classes = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    edit_json(folder / "config.json", model_type="x", architectures=["X"], auto_map=classes)


def a_tokenizer_with_remote_code(folder, canary):
    (folder / "tokenization_x.py").write_text(code(canary))
    (folder / "tokenizer.json").unlink()
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="X",
        auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]},
    )


def kernels_from_the_hub(folder, canary):
    edit_json(folder / "config.json", attn_implementation="somebody/kernel")


def an_adapter_of_another_base(folder, canary):
    torch.save(Canary(canary), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "base_model_name_or_path": "some/other"}'
    )


def a_shard_outside(folder, canary):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    names = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: "../outside.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BACKBONES = {
    a_shard_outside: "'../outside.safetensors' cannot be a name here",
    weights_in_a_pickle: "has no model.safetensors",
    a_shard_that_is_a_pickle: "pytorch_model.bin is broken",
    remote_code: "contains custom code",
    a_tokenizer_with_remote_code: "cannot load backbone",
    kernels_from_the_hub: "remove attn_implementation, the hub's code",
    an_adapter_of_another_base: "adapter_",
}


@pytest.mark.parametrize("stage", [train, evaluate])
@pytest.mark.parametrize("poison", BACKBONES, ids=lambda poison: poison.__name__)
def test_a_backbone_is_refused_for_what_is_more_than_weights(
    run, canary, monkeypatch, capsys, poison, stage
):
    poison(run / "backbone", canary)
    status, line = stage(
        monkeypatch, capsys, run, *(["--policies", "backbone"] if stage is evaluate else [])
    )
    assert not canary.exists()
    assert status == 2
    assert BACKBONES[poison] in line, line


@pytest.mark.parametrize(
    "poison",
    [kernels_from_the_hub, weights_in_a_pickle],
    ids=lambda poison: poison.__name__,
)
def test_whole_models_are_extracted_without_running_their_code(
    run, canary, monkeypatch, capsys, poison
):
    for step in (1, 2, 3, 4, 5, 6):
        shutil.copytree(run / "backbone", run / "whole" / f"step_{step}")
    poison(run / "backbone", canary)
    flags = [
        "--checkpoints",
        "{run_dir}/whole/step_*",
        "--k",
        "1",
        "--fit-checkpoints",
        "3",
        "--backbone",
        "{run_dir}/backbone",
    ]
    status, line = call_on(monkeypatch, capsys, "02_extract_deltas.py", run, *flags)
    assert (status, line[:7], canary.exists()) == (2, "error: ", False), line


def test_a_generate_function_that_a_model_brings_along_is_not_run(run, canary, monkeypatch, capsys):
    (run / "backbone" / "custom_generate").mkdir()
    (run / "backbone" / "custom_generate" / "generate.py").write_text(
        code(canary) + "def generate(*a, **k): pass\n"
    )
    assert train(monkeypatch, capsys, run)[0] == 0
    assert not canary.exists()


def test_code_that_a_known_model_and_tokenizer_bring_along_is_not_run(run, canary):
    for name in ("modeling_x", "tokenization_x"):
        (run / "backbone" / f"{name}.py").write_text(code(canary))
    edit_json(run / "backbone" / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    edit_json(
        run / "backbone" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]},
    )
    model, _ = policy.load_backbone(str(run / "backbone"))
    assert type(model).__module__.startswith("transformers.")
    assert not canary.exists()


def pickled(folder, canary):
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Canary(canary), folder / "adapter_model.bin")


def a_module_to_import(folder, canary):
    """PEFT imports the module that `megatron_core` names; of late, if it is one of Megatron's."""
    (canary.parent / "hostile_megatron.py").write_text(code(canary))
    importlib.invalidate_caches()
    edit_json(
        folder / "adapter_config.json", megatron_config={"x": 1}, megatron_core="hostile_megatron"
    )


@pytest.mark.parametrize("stage", [extract, resume, evaluate])
@pytest.mark.parametrize(
    ("poison", "message"),
    [(pickled, "a pickle"), (a_module_to_import, "not a plain LoRA (megatron_config)")],
)
def test_an_adapter_is_refused_for_what_is_more_than_weights(
    run, canary, monkeypatch, capsys, stage, poison, message
):
    monkeypatch.syspath_prepend(canary.parent)
    flags, folder = [], run / "made" / "step_0006"
    if stage is resume:
        jump(monkeypatch, capsys, run)
        folder = run / "extrapolated" / "none"
    elif stage is evaluate:
        flags = ["--policies", "made/step_0006"]
    poison(folder, canary)
    status, line = stage(monkeypatch, capsys, run, *flags)
    assert not canary.exists()
    assert status == 2
    assert message in line or "adapter_model.safetensors not found" in line, line


def test_a_resume_state_that_is_a_pickle_is_refused(run, canary, monkeypatch, capsys):
    assert train(monkeypatch, capsys, run)[0] == 0
    torch.save(Canary(canary), run / "train" / "resume" / "step_0001" / "optimizer.pt")
    status, line = train(monkeypatch, capsys, run, "--steps", "2")
    assert not canary.exists()
    assert status == 2
    assert "cannot load resume state" in line


@pytest.mark.parametrize("stage", [train, evaluate])
def test_a_data_set_with_a_script_is_refused(run, canary, monkeypatch, capsys, stage):
    (run / "sums").mkdir()
    (run / "sums" / "sums.py").write_text(code(canary))
    flags = (
        ["--train-data", f"sums={run}/sums"]
        if stage is train
        else ["--policies", "backbone", "--test-data", f"sums={run}/sums"]
    )
    status, line = stage(monkeypatch, capsys, run, *flags)
    assert not canary.exists()
    assert status == 2
    assert "scripts are no longer supported" in line


# Names that would become paths


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        ".hidden",
        "a\0",
        "a\nb",
        "/etc",
    ],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError):
        inputs.safe_name(name, "it")


@pytest.mark.parametrize(
    "name",
    ["a", "next-aligned_alpha1.5", "mmlu-pro-computer-science", "my test (2)", "数学", "--odd"],
)
def test_an_ordinary_name_passes(name):
    assert inputs.safe_name(name, "it") == name


def listing(folder: pathlib.Path) -> set:
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_start_outside_the_run_is_refused_and_nothing_is_written_there(run, monkeypatch, capsys):
    jump(monkeypatch, capsys, run)
    (run.parent / "x").mkdir()
    shutil.copytree(run / "extrapolated" / "none", run.parent / "x" / "y")
    before = listing(run.parent)
    status, line = resume(monkeypatch, capsys, run, "--start", "../../x/y")
    assert (status, "--start: " in line, "cannot be a name here" in line) == (2, True, True), line
    assert listing(run.parent) == before


@pytest.mark.parametrize("pattern", ["/run2", "/run2/made/*"])
def test_policies_outside_the_run_are_refused(run, monkeypatch, capsys, pattern):
    shutil.copytree(run, run.parent / "run2")
    status, line = evaluate(monkeypatch, capsys, run, "--policies", pattern)
    assert (status, "policies are named as they stand in" in line) == (2, True), line


def test_an_adapter_does_not_choose_where_its_deltas_are_written(run, monkeypatch, capsys):
    for path in (run / "made").glob("step_*/adapter_model.safetensors"):
        tensors = safetensors.torch.load_file(path)
        module = next(iter(tensors)).removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        renamed = {name.replace(module, "../../escaped"): x for name, x in tensors.items()}
        safetensors.torch.save_file(renamed, path)
        (path.parent / "sha256.json").unlink(missing_ok=True)
    before = {path for path in listing(run.parent) if not str(path).endswith(".lock")}
    status, line = extract(monkeypatch, capsys, run)
    assert (status, "'../../escaped' cannot be a name here" in line) == (2, True), line
    assert {path for path in listing(run.parent) if not str(path).endswith(".lock")} == before


@pytest.mark.parametrize("name", ["..", ".x", "a\\b", "a\nb"])
def test_a_task_is_named_like_a_file(tmp_path, name):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1", "answer": 1}\n')
    with pytest.raises(UserError):
        data.load_tasks([f"{name}={tmp_path}/p.jsonl"])
    assert list(data.load_tasks([f"a={tmp_path}/p.jsonl"])) == ["a"]


@pytest.mark.parametrize("named", ["some/model-on-the-hub", "{run_dir}/../other", "/"])
def test_a_checkpoint_does_not_choose_the_backbone(run, monkeypatch, capsys, named):
    shutil.copytree(run / "backbone", run.parent / "other")
    edit_json(run / "made" / "step_0006" / "checkpoint.json", backbone=named)
    status, line = evaluate(monkeypatch, capsys, run, "--policies", "made/step_0006")
    assert (status, f"names the backbone {named}" in line) == (2, True), line
    if named.startswith("{run_dir}"):  # the user may
        flags = ["--policies", "made/step_0006", "--backbone", named]
        assert evaluate(monkeypatch, capsys, run, *flags)[0] == 0


def test_results_are_those_of_the_folder_they_are_in(run, monkeypatch, capsys):
    assert evaluate(monkeypatch, capsys, run, "--policies", "backbone")[0] == 0
    edit_json(run / "eval" / "backbone" / "test.json", policy="../../elsewhere")
    status, line = evaluate(monkeypatch, capsys, run, "--policies", "made/step_0006")
    assert (status, "holds results of '../../elsewhere'" in line) == (2, True), line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "holds no JSON object"),
        ("NaN", "holds no JSON object"),
        ("{}", "no usable step"),
        ('{"step": true}', "no usable step"),
        ('{"step": "1"}', "no usable step"),
    ],
)
def test_hostile_json_is_one_line_that_names_the_file(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        inputs.read_json(tmp_path / "x.json", "the stage", {"step": int})
    assert str(error.value).startswith(f"{tmp_path}/x.json ")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "unexpected 'end of template'"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("", "no tokens"),
    ],
)
def test_a_chat_template_that_fails_is_one_clear_error(backbone_dir, template, message):
    _, tokenizer = policy.load_backbone(str(backbone_dir))
    tokenizer.chat_template = template or "{{ '' }}"
    with pytest.raises(UserError, match=message) as error:
        data.encode_prompts([data.Problem("1+1", "2")], tokenizer, "{prompt}", "", 10, "p")
    assert "\n" not in str(error.value)


# Checkpoints that lie


def header(path: pathlib.Path, change):
    """Writes the safetensors file at `path` again, with another header and the same data."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    new = change(json.loads(raw[8 : 8 + size]))
    text = new if isinstance(new, bytes) else json.dumps(new).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def every(**changes):
    return lambda found: {
        key: value if key == "__metadata__" else {**value, **changes}
        for key, value in found.items()
    }


LIES = {
    "a header of 2^60 bytes": lambda path: path.write_bytes(
        (2**60).to_bytes(8, "little") + path.read_bytes()[8:]
    ),
    "a header of no JSON": lambda path: header(path, lambda found: b"[" * 5000),
    "shapes larger than the data": lambda path: header(path, every(shape=[2**40, 2**20])),
    "shapes that overflow": lambda path: header(path, every(shape=[2**63, 2**63])),
    "offsets beyond the end": lambda path: header(path, every(data_offsets=[0, 2**50])),
    "offsets backwards": lambda path: header(path, every(data_offsets=[100, 0])),
    "offsets that overlap": lambda path: header(path, every(data_offsets=[0, 512])),
    "no such dtype": lambda path: header(path, every(dtype="EVIL")),
    "negative shapes": lambda path: header(path, every(shape=[-1, -1])),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies_is_refused(run, monkeypatch, capsys, lie):
    path = run / "made" / "step_0003" / "adapter_model.safetensors"
    LIES[lie](path)
    status, line = extract(monkeypatch, capsys, run)
    assert (status, f"{path} " in line) == (2, True), line


def test_a_backbone_whose_config_is_nonsense_is_one_line(run):
    before = (run / "backbone" / "config.json").read_text()
    for change in (
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"dtype": "evil"},
        {"num_hidden_layers": -1},
        {"model_type": ["x"]},
    ):
        (run / "backbone" / "config.json").write_text(before)
        edit_json(run / "backbone" / "config.json", **change)
        with pytest.raises(UserError, match="cannot load backbone"):
            policy.load_backbone(str(run / "backbone"))
    (run / "backbone" / "config.json").write_text(before)
    assert model_files.open_model(run / "backbone").shapes
