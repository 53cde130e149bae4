"""Input that means harm: nothing of it is run or written elsewhere, and the answer is one line."""

import json
import pathlib
import pickle
import shutil

import pytest
import safetensors.torch
import torch
from conftest import edit_json, save_lora

from common import UserError, demo
from common.files import read as inputs
from common.rl import data, policy

# Never executed


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def canary(tmp_path):
    """The file that must not be made."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(path)))
    assert path.exists()  # the trap springs
    path.unlink()
    yield path
    assert not path.exists()


def code(canary: pathlib.Path) -> str:
    """A module that makes the file as soon as it is imported."""
    return f"open({str(canary)!r}, 'w')\n"


@pytest.fixture
def backbone(tmp_path):
    return pathlib.Path(shutil.copytree(demo.SHIPPED, tmp_path / "backbone"))


def weights_in_a_pickle(folder, canary):
    (folder / "model.safetensors").unlink()
    torch.save(Canary(canary), folder / "pytorch_model.bin")


def a_shard_outside(folder, canary):
    names = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {name: "../outside.safetensors" for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remote_code(folder, canary):
    for name in ("modeling_x", "configuration_x", "tokenization_x"):
        (folder / f"{name}.py").write_text(code(canary))
    classes = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    edit_json(folder / "config.json", model_type="x", architectures=["X"], auto_map=classes)


def kernels_from_the_hub(folder, canary):
    edit_json(folder / "config.json", attn_implementation="somebody/kernel")


def an_adapter_of_another_base(folder, canary):
    torch.save(Canary(canary), folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": "some/other"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


BACKBONES = {
    weights_in_a_pickle: "has no model.safetensors",
    a_shard_outside: "'../outside.safetensors' cannot be a name here",
    remote_code: "contains custom code",
    kernels_from_the_hub: "remove attn_implementation, the hub's code",
    an_adapter_of_another_base: "adapter_",
}


@pytest.mark.parametrize("poison", BACKBONES, ids=lambda poison: poison.__name__)
def test_a_backbone_is_refused_for_what_is_more_than_weights(backbone, canary, poison):
    poison(backbone, canary)
    with pytest.raises(UserError, match=BACKBONES[poison]):
        policy.load_backbone(str(backbone))


def test_code_that_a_known_model_and_tokenizer_bring_along_is_not_run(backbone, canary):
    for name in ("modeling_x", "tokenization_x"):
        (backbone / f"{name}.py").write_text(code(canary))
    edit_json(backbone / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    classes = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}
    edit_json(backbone / "tokenizer_config.json", auto_map=classes)
    model, _ = policy.load_backbone(str(backbone))
    assert type(model).__module__.startswith("transformers.")


def test_an_adapter_in_a_pickle_is_refused(lora_policy, backbone, canary, tmp_path):
    save_lora(lora_policy[0], tmp_path / "step_0006", {"step": 6})
    (tmp_path / "step_0006" / "adapter_model.safetensors").unlink()
    torch.save(Canary(canary), tmp_path / "step_0006" / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        policy.load_lora(policy.load_backbone(str(backbone))[0], tmp_path / "step_0006")


# Names that would become paths


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a\0", "a\nb"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError):
        inputs.safe_name(name, "it")


@pytest.mark.parametrize("name", ["next-aligned_alpha1.5", "my test (2)", "数学", "--odd"])
def test_an_ordinary_name_passes(name):
    assert inputs.safe_name(name, "it") == name


def test_a_task_is_named_like_a_file(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1", "answer": 1}\n')
    with pytest.raises(UserError):
        data.load_tasks([f"..={tmp_path}/p.jsonl"])
    assert list(data.load_tasks([f"a={tmp_path}/p.jsonl"])) == ["a"]


def names(folder: pathlib.Path) -> set:
    return {path for path in folder.rglob("*") if path.suffix != ".lock"}


@pytest.mark.parametrize("name", ["..", "../out", "x/y"])
def test_a_start_outside_the_run_is_not_written_outside_of_it(run, stage, name):
    start = shutil.copytree(run / "extrapolated" / "none", run.parent / "x" / "..y")
    before = names(run.parent)
    code, line = stage("05", run, "--start", str(start), "--name", name)
    assert (code, "--name: " in line, "cannot be a name here" in line) == (2, True, True), line
    assert names(run.parent) == before


def test_an_adapter_does_not_choose_where_its_deltas_are_written(run, stage):
    shutil.rmtree(run / "deltas")
    for path in run.glob("train/step_*/adapter_model.safetensors"):
        tensors = safetensors.torch.load_file(path)
        module = next(iter(tensors)).removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        renamed = {name.replace(module, "../../escaped"): x for name, x in tensors.items()}
        safetensors.torch.save_file(renamed, path)
        (path.parent / "sha256.json").unlink()
    before = names(run.parent)
    code, line = stage("02", run)
    assert (code, "'../../escaped' cannot be a name here" in line) == (2, True), line
    assert names(run.parent) == before


@pytest.mark.parametrize("named", ["some/model-on-the-hub", "{run_dir}/../other"])
def test_a_checkpoint_does_not_choose_the_backbone(run, stage, named):
    shutil.copytree(run / "backbone", run.parent / "other")
    path = run / "train" / "step_0006" / "checkpoint.json"
    edit_json(path, backbone=named)
    flags = ["--policies", "train/step_0006", "--output", "again"]
    assert stage("06", run, *flags)[0] == 0  # on the preset's, whose fingerprint it has
    edit_json(path, backbone_fingerprint="another")
    code, line = stage("06", run, *flags, "--overwrite")
    assert (code, "was trained on another backbone" in line) == (2, True), line
    known = json.loads(path.read_text())
    del known["backbone_fingerprint"]
    path.write_text(json.dumps(known))
    code, line = stage("06", run, *flags)
    assert (code, f"names the backbone {named}" in line) == (2, True), line
    if named.startswith("{run_dir}"):  # the user may
        assert stage("06", run, *flags, "--backbone", named)[0] == 0


# Files that are nonsense


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
        ("{{ '' }}", "no tokens"),
    ],
)
def test_a_chat_template_that_fails_is_one_clear_error(backbone_dir, template, message):
    _, tokenizer = policy.load_backbone(str(backbone_dir))
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as error:
        data.encode_prompts([data.Problem("1+1", "2")], tokenizer, "{prompt}", "", 10, "p")
    assert "\n" not in str(error.value)


def test_a_backbone_whose_config_is_nonsense_is_one_line(backbone):
    edit_json(backbone / "config.json", hidden_size="x")
    with pytest.raises(UserError, match="cannot load backbone"):
        policy.load_backbone(str(backbone))
