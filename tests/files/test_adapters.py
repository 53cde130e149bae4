"""Checkpoints of other trainers: PEFT's merged weights are the oracle for ranks, scales and
jumps."""

import dataclasses
import json
import pathlib
import shutil

import pytest
import safetensors.torch
import torch
from conftest import edit_json, save_series
from peft import LoraConfig, PeftModel

from common import UserError
from common.files import adapters, read, series
from common.files import deltas as delta_files
from common.rl import policy

PATTERNED = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {
        "v_proj": 2,
        r"layers\.[12]\.self_attn\.q_proj": 6,
        "^model.layers.0.mlp.down_proj": 3,
    },
    "alpha_pattern": {"down_proj": 3, r"layers\.1\..*": 5},
}
STEPS = range(10, 90, 10)


def load(backbone_dir):
    return policy.load_backbone(str(backbone_dir))[0]


def dense_delta(backbone_dir, folder):
    """Module -> W(folder) - W_0 in float64, as PEFT merges it."""
    merged = (
        PeftModel.from_pretrained(load(backbone_dir).double(), folder, autocast_adapter_dtype=False)
        .double()
        .merge_and_unload()
    )
    before = dict(load(backbone_dir).double().named_parameters())
    return {
        name.removesuffix(".weight"): (p - before[name]).detach()
        for name, p in merged.named_parameters()
    }


def open_all(pattern, run):
    return series.open_series(series.find_checkpoints([str(pattern)], str(run)), "", str(run))


def test_deltas_and_jump_of_a_patterned_series_equal_the_merged_weights(
    backbone_dir, tmp_path, extract, typed
):
    save_series(backbone_dir, tmp_path / "out" / "checkpoint-{}", use_rslora=True, **PATTERNED)
    run = tmp_path / "run"
    assert extract(run, tmp_path / "out" / "checkpoint-*") == (0, "")
    dense = {
        step: dense_delta(backbone_dir, tmp_path / "out" / f"checkpoint-{step}")
        for step in (60, 70, 80)
    }
    trajectory = delta_files.load_trajectory(run / "deltas")
    for module, roles in trajectory.deltas.items():
        for role, delta in (
            ("global", dense[80][module]),
            ("local", dense[80][module] - dense[70][module]),
            ("target", dense[80][module] - dense[60][module]),
        ):
            sigma = torch.linalg.svdvals(delta)[0]
            assert roles[role].sigma[-1].item() == pytest.approx(sigma.item(), rel=1e-5)
            along = roles[role].u[-1].double() @ delta @ roles[role].v[-1].double()
            assert along.item() == pytest.approx(sigma.item(), rel=1e-5)

    assert typed("04", run, "--methods", "repeat-last", "rl-extra") == (0, "")
    jumped = dense_delta(backbone_dir, run / "extrapolated" / "repeat-last_alpha1.5")
    line = dense_delta(backbone_dir, run / "extrapolated" / "rl-extra_alpha1.5")
    for module, delta in dense[80].items():
        if module not in trajectory.deltas:
            assert not delta.any()
            assert not jumped[module].any()
            continue
        u, s, vh = torch.linalg.svd(delta - dense[60][module])
        torch.testing.assert_close(
            jumped[module], delta + 1.5 * s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-7, rtol=1e-5
        )
        torch.testing.assert_close(line[module], 11 / 8 * delta, atol=1e-7, rtol=1e-5)
    info = json.loads(
        (run / "extrapolated" / "repeat-last_alpha1.5" / "checkpoint.json").read_text()
    )
    assert info["step"] == 80
    assert info["backbone"] == str(backbone_dir)
    grown, last = (
        adapters.read_header(path)
        for path in (run / "extrapolated" / "repeat-last_alpha1.5", tmp_path / "out/checkpoint-80")
    )
    assert {m: r for m, (_, r, _) in grown.shapes.items()} == {
        m: r + 1 for m, (_, r, _) in last.shapes.items()
    }


def as_verl(folder):
    """The adapter in `folder` as verl writes it: a whole dataclass as JSON, tensors without
    metadata."""
    config = dataclasses.asdict(LoraConfig.from_pretrained(folder))
    config |= {
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "target_modules": sorted(config["target_modules"]),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=4))
    safetensors.torch.save_file(
        safetensors.torch.load_file(folder / "adapter_model.safetensors"),
        folder / "adapter_model.safetensors",
    )
    (folder / "README.md").unlink()


def test_verls_layout_is_read_and_written_back(backbone_dir, tmp_path, extract, typed):
    save_series(
        backbone_dir,
        tmp_path / "global_step_{}" / "actor" / "lora_adapter",
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
    )
    for folder in tmp_path.glob("global_step_*/actor/lora_adapter"):
        as_verl(folder)
    run = tmp_path / "run"
    assert extract(run, tmp_path / "global_step_*/actor/lora_adapter") == (0, "")
    assert delta_files.load_trajectory(run / "deltas").steps == list(STEPS)
    assert typed("04", run, "--methods", "repeat-last", "none") == (0, "")
    last = dense_delta(backbone_dir, tmp_path / "global_step_80/actor/lora_adapter")
    for name, far in (("none", 0.0), ("repeat-last_alpha1.5", 1.5)):
        jumped = dense_delta(backbone_dir, run / "extrapolated" / name)
        for module, roles in delta_files.load_trajectory(run / "deltas").deltas.items():
            target = roles["target"]
            move = (
                far
                * target.sigma[-1].double()
                * torch.outer(target.u[-1].double(), target.v[-1].double())
            )
            torch.testing.assert_close(jumped[module], last[module] + move, atol=1e-6, rtol=1e-5)


def test_rounded_factors_are_read_with_a_warning(backbone_dir, tmp_path, extract):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    save_series(backbone_dir, tmp_path / "checkpoint-{}", dtype=torch.bfloat16, **options)
    code, line = extract(tmp_path / "run", tmp_path / "checkpoint-*")
    assert code == 0
    assert line.startswith("warning: checkpoints in BF16")
    found = open_all(tmp_path / "checkpoint-*", tmp_path)
    assert found.weights(found.modules[0])[1].terms[0].left.dtype == torch.float64


def test_what_is_no_lora_takes_no_part_and_stays_as_it_last_was(
    backbone_dir, tmp_path, extract, typed
):
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["norm"],
        "bias": "lora_only",
    }
    save_series(backbone_dir, tmp_path / "checkpoint-{}", **options)
    code, line = extract(tmp_path / "run", tmp_path / "checkpoint-*")
    assert code == 0
    assert "take no part in the jump" in line
    assert typed("04", tmp_path / "run", "--methods", "repeat-last") == (0, "")
    last, jumped = (
        tmp_path / "checkpoint-80",
        tmp_path / "run" / "extrapolated" / "repeat-last_alpha1.5",
    )
    before, after = (
        safetensors.torch.load_file(path / "adapter_model.safetensors") for path in (last, jumped)
    )
    assert before.keys() == after.keys()
    others = adapters.read_header(last).others
    assert {"norm", "bias", "lora_embedding_A"} <= {
        part for key in others for part in key.split(".")
    }
    for key in others:
        assert torch.equal(before[key], after[key])
    old, new = dense_delta(backbone_dir, last), dense_delta(backbone_dir, jumped)
    changed = {
        name for name, delta in new.items() if not torch.allclose(delta, old[name], atol=1e-12)
    }
    assert changed == set(delta_files.load_trajectory(tmp_path / "run" / "deltas").deltas)


@pytest.fixture(scope="module")
def small_series(tmp_path_factory):
    """Eight hand-made adapters of one matrix. Copy them to change them."""
    folder = tmp_path_factory.mktemp("small")
    for step in STEPS:
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "base_model_name_or_path": "some/model",
        }
        factors = {"q_proj": (torch.full((6, 2), float(step)), torch.ones(2, 5))}
        adapters.write_adapter(folder / f"checkpoint-{step}", adapters.Adapter(config, factors), {})
        for ours in ("checkpoint.json", "sha256.json"):
            (folder / f"checkpoint-{step}" / ours).unlink()
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "some/other"}, "differs in its backbone from"),
        ({"use_rslora": True}, "differs in its scales from"),
        ({"lora_alpha": 2}, "differs in its scales from"),
        ({"lora_alpha": 0}, "must be numbers, alpha not 0"),
        ({"r": "4"}, "must be numbers, alpha not 0"),
        ({"alpha_pattern": {"proj": 8, "q_proj": 8}}, "differs in its scales from"),
        ({"rank_pattern": {"q_proj": 3}}, "has B (6, 2) and A (2, 5), its config says rank 3"),
        ({"use_dora": True}, "(use_dora)"),
        ({"megatron_config": {"x": 1}}, "(megatron_config)"),  # names a module to import
        ({"peft_type": "IA3"}, "(peft_type IA3)"),
        ({"init_lora_weights": "olora"}, "olora, which changes the backbone"),
        ({"target_parameters": ["experts.down"]}, "(target_parameters)"),
    ],
)
def test_a_mixed_or_other_series_is_refused_with_the_reason(
    small_series, tmp_path, change, message
):
    shutil.copytree(small_series, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-30" / "adapter_config.json"
    edit_json(path, **change)
    with pytest.raises(UserError) as caught:
        open_all(tmp_path / "run" / "checkpoint-*", tmp_path)
    assert "checkpoint-30" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_matches_no_whole_name_changes_no_scale(small_series, tmp_path):
    shutil.copytree(small_series, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-30" / "adapter_config.json"
    edit_json(path, alpha_pattern={"proj": 8}, rank_pattern={"q": 8})
    assert open_all(tmp_path / "run" / "checkpoint-*", tmp_path).scales == {"q_proj": 2.0}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("outputs/checkpoint-20", 20),
        ("train/step_0020", 20),
        ("qwen2.5/global_step_40/actor/lora_adapter", 40),
        ("run3/v2-checkpoint-7", 7),
        ("out/ckpt-300", 300),
        ("outputs/last", None),
        ("/home/user2/qwen2.5/final", None),
        ("/scratch/job-48213/adapter", None),
    ],
)
def test_the_step_is_the_number_at_the_end_of_the_last_name_that_has_one(name, step):
    assert read.step_of(pathlib.Path(name)) == step


def test_patterns_are_relative_to_the_current_folder_and_know_the_home_folder(
    small_series, tmp_path, monkeypatch
):
    monkeypatch.chdir(small_series)
    assert list(series.find_checkpoints(["checkpoint-[12]0"], tmp_path)) == [10, 20]
    monkeypatch.setenv("HOME", str(small_series))
    monkeypatch.chdir(tmp_path)
    assert list(series.find_checkpoints(["~/checkpoint-10", "~/checkpoint-3*"], tmp_path)) == [
        10,
        30,
    ]


def test_deltas_of_fewer_checkpoints_are_not_taken_for_those_of_more(
    small_series, tmp_path, extract
):
    shutil.copytree(small_series, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-80").rename(tmp_path / "later")
    run, pattern = tmp_path / "run", tmp_path / "out" / "checkpoint-*"
    assert extract(run, pattern) == (0, "")
    (tmp_path / "later").rename(tmp_path / "out" / "checkpoint-80")
    code, line = extract(run, pattern)
    assert (code, "was made with input steps = " in line) == (2, True)


def test_a_jump_does_not_add_old_deltas_to_another_last_checkpoint(
    small_series, tmp_path, extract, typed
):
    shutil.copytree(small_series, tmp_path / "out")
    run, last = tmp_path / "run", tmp_path / "out" / "checkpoint-80"
    assert extract(run, tmp_path / "out" / "checkpoint-*") == (0, "")
    shutil.copy(small_series / "checkpoint-70" / adapters.WEIGHTS, last)
    flags = ("04", run, "--methods")
    code, line = typed(*flags, "repeat-last")
    assert (code, "checkpoint-80 has changed: run 02" in line) == (2, True)
    shutil.copy(small_series / "checkpoint-80" / adapters.WEIGHTS, last)
    code, line = typed(*flags, "greedy-soup")
    assert (code, "to choose by accuracy, have the checkpoints in" in line) == (2, True)


def test_the_run_directory_may_be_moved_and_checkpoints_elsewhere_may_not(
    small_series, tmp_path, extract, typed
):
    shutil.copytree(small_series, tmp_path / "one" / "mine")
    shutil.copytree(small_series, tmp_path / "elsewhere")
    for name, pattern in (
        ("one", "{run_dir}/mine/checkpoint-*"),
        ("two", tmp_path / "elsewhere" / "checkpoint-*"),
    ):
        assert extract(tmp_path / name, pattern) == (0, "")
        (tmp_path / name).rename(tmp_path / f"{name}_moved")
        assert typed("04", tmp_path / f"{name}_moved", "--methods", "repeat-last") == (0, "")
    shutil.rmtree(tmp_path / "elsewhere" / "checkpoint-80")
    code, line = typed("04", tmp_path / "two_moved", "--methods", "repeat-last")
    assert code == 2
    assert "elsewhere/checkpoint-80 is missing" in line


def test_a_uniform_adapter_gets_a_plain_config_without_patterns():
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {}, "alpha_pattern": {}}
    factors = dict.fromkeys(("a.q_proj", "b.q_proj"), (torch.ones(6, 5), torch.ones(5, 6)))
    grown = adapters.extended(adapters.Adapter(config, {}), factors).config
    assert (grown["r"], grown["rank_pattern"], grown["alpha_pattern"]) == (5, {}, {})
    assert grown["lora_alpha"] == pytest.approx(4 * 5**0.5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_models_are_refused(backbone_dir, tmp_path, dtype):
    whole = shutil.copytree(backbone_dir, tmp_path / "step_1")
    (whole / "sha256.json").unlink(missing_ok=True)
    tensors = safetensors.torch.load_file(whole / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    safetensors.torch.save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    for checkpoint, backbone in ((whole, backbone_dir), (backbone_dir, whole)):
        with pytest.raises(UserError, match=r"quantised weights .* cannot jump"):
            series.open_series({1: checkpoint}, str(backbone), str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_factors_that_are_not_floats_are_refused(lora_policy, tmp_path, dtype):
    lora_policy[0].save_pretrained(tmp_path, save_embedding_layers=False)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: t.to(dtype) for k, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="has factors in"):
        adapters.read_header(tmp_path)
