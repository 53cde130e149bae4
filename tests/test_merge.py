"""The merged folder against PEFT's own forward pass and against a direct count of what rounding does."""

import json
import shutil

import pytest
import torch
from conftest import call_stage
from peft import LoraConfig, PeftModel, get_peft_model

from common import UserError
from common.files import adapters, merge
from common.files import models as model_files
from common.files import write as run_dir
from common.rl import policy

IDS = torch.tensor([[2, 7, 8, 9, 3, 5]])


@pytest.fixture(scope="module")
def adapter_dir(backbone_dir, tmp_path_factory):
    """A LoRA with ranks and scales of their own on some modules of the demo backbone, as PEFT saves it."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(policy.load_backbone(str(backbone_dir))[0], config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def sharded(backbone_dir, folder, dtype):
    """The demo backbone as several files with an index."""
    model, tokenizer = policy.load_backbone(str(backbone_dir), dtype=dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def logits(folder, adapter=None):
    model = policy.load_backbone(str(folder))[0]
    return (PeftModel.from_pretrained(model, adapter) if adapter else model)(input_ids=IDS).logits


@pytest.mark.parametrize("limit", [merge.SHARD_BYTES, 100_000])
@pytest.mark.parametrize("many", [False, True])
def test_the_merged_folder_computes_what_the_adapter_computes(backbone_dir, adapter_dir, tmp_path, monkeypatch, many, limit):
    base = sharded(backbone_dir, tmp_path / "base", torch.float32) if many else backbone_dir
    whole = limit == merge.SHARD_BYTES
    monkeypatch.setattr(merge, "SHARD_BYTES", limit)
    merge.merge(tmp_path / "out", adapters.read_adapter(adapter_dir), base, True, {})
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 1 if whole else len(files) > 5
    assert all(path.stat().st_size < limit + 5000 for path in files)
    got = logits(tmp_path / "out")
    torch.testing.assert_close(got, logits(backbone_dir, adapter_dir), atol=1e-5, rtol=1e-5)
    assert (got - logits(backbone_dir)).abs().max() > 0.1
    assert policy.load_backbone(str(tmp_path / "out"))[1]("1+2") == policy.load_backbone(str(backbone_dir))[1]("1+2")


def test_the_backbones_dtype_is_kept_and_the_warning_counts_what_that_loses(backbone_dir, adapter_dir, tmp_path, monkeypatch, capsys):
    base, run = sharded(backbone_dir, tmp_path / "base", torch.bfloat16), tmp_path / "run"
    series(adapter_dir, base, run)
    flags = ["--run-dir", str(run), "--methods", "none", "--merge"]
    code, line = call_stage(monkeypatch, capsys, "04_extrapolate.py", *flags, "backbone")
    assert code == 0
    adapter, before, after = (
        adapters.read_adapter(adapter_dir),
        model_files.open_model(base),
        model_files.open_model(run / "merged" / "none"),
    )
    changed = kept = size = error = 0
    for name in before.shapes:
        old, new, module = before.tensor(name), after.tensor(name), name.removesuffix(".weight")
        assert new.dtype == torch.bfloat16
        if module not in adapter.factors:
            assert torch.equal(old, new)
            continue
        b, a = (x.double() for x in adapter.factors[module])
        update = adapter.scale(module) * b @ a
        torch.testing.assert_close(new.double(), (old.double() + update), rtol=2**-8, atol=1e-7)
        changed, kept = changed + update.numel(), kept + int((old == new).sum())
        size, error = size + update.square().sum(), error + (new.double() - old.double() - update).square().sum()
    assert 0 < kept < changed
    assert f"leaves {kept / changed:.1%} of the entries" in line
    assert f"loses {float((error / size).sqrt()):.1%} of the norm" in line
    assert json.loads((run / "merged" / "none" / "config.json").read_text())["dtype"] == "bfloat16"

    code, line = call_stage(monkeypatch, capsys, "04_extrapolate.py", *flags, "fp32")  # the adapter is there, the model is made anew
    assert (code, line) == (0, "")
    after = model_files.open_model(run / "merged" / "none")
    assert {*after.dtypes.values()} == {"F32"}
    assert after.config["dtype"] == "float32"
    for module, (b, a) in adapter.factors.items():
        exact = before.tensor(f"{module}.weight").float() + adapter.scale(module) * b @ a
        torch.testing.assert_close(after.tensor(f"{module}.weight"), exact)
    stamp = (run / "merged" / "none" / "merge.json").stat().st_mtime_ns
    assert call_stage(monkeypatch, capsys, "04_extrapolate.py", *flags, "fp32") == (0, "")
    assert (run / "merged" / "none" / "merge.json").stat().st_mtime_ns == stamp


def series(adapter_dir, base, run):
    """A run directory with just what stage 4 reads for the method `none`: the adapter as the last of two checkpoints on `base`."""
    adapter = adapters.read_adapter(adapter_dir)
    adapters.write_adapter(run / "train" / "step_0002", adapter, {"backbone": str(base)})
    modules, empty = list(adapter.factors), {}
    for module, (b, a) in adapter.factors.items():
        for role, count in (("global", 2), ("local", 2), ("target", 1)):
            shapes = {"u": (count, len(b)), "sigma": (count,), "v": (count, a.shape[1])}
            empty |= {f"{role}.{module}.{part}": torch.zeros(shape) for part, shape in shapes.items()}
    run_dir.save_tensors(run / "deltas" / "rank1.safetensors", empty)
    index = {"steps": [1, 2], "checkpoints": {1: "train/step_0001", 2: "train/step_0002"}, "k": 1, "modules": modules}
    run_dir.write_json(run / "deltas" / "index.json", index)
    run_dir.write_json(run / "deltas" / "done.json", {})


def test_without_the_option_no_model_is_written(backbone_dir, adapter_dir, tmp_path, monkeypatch, capsys):
    series(adapter_dir, backbone_dir, tmp_path)
    assert call_stage(monkeypatch, capsys, "04_extrapolate.py", "--run-dir", str(tmp_path), "--methods", "none") == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"train", "deltas", "extrapolated"}


def test_a_backbone_that_is_nowhere_is_named(adapter_dir, tmp_path, monkeypatch, capsys):
    series(adapter_dir, "some/model-that-is-not-cached", tmp_path)
    code, line = call_stage(monkeypatch, capsys, "04_extrapolate.py", "--run-dir", str(tmp_path), "--methods", "none", "--merge", "fp32")
    assert code == 2
    assert "backbone some/model-that-is-not-cached is no folder, and no hub id in this machine's cache" in line


def test_shards_keep_the_order_and_only_a_tensor_that_is_larger_exceeds_the_limit():
    assert merge.plan_shards({"a": 3, "b": 3, "c": 9, "d": 2, "e": 5}, 7) == [["a", "b"], ["c"], ["d", "e"]]
    assert merge.plan_shards({"a": 9}, 7) == [["a"]]


def q_proj(**changes):
    """An adapter on one matrix of the demo backbone, with something wrong."""
    parts = {"module": "model.layers.0.self_attn.q_proj", "m": 64, "config": {}, "others": {}} | changes
    factors = {parts["module"]: (torch.ones(parts["m"], 1), torch.ones(1, 64))}
    return adapters.Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **parts["config"]}, factors, parts["others"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": "lm_head", "m": 20}, "lm_head shares its weight with the embedding"),
        ({"module": "model.layers.9.self_attn.q_proj"}, "has no model.layers.9.self_attn.q_proj.weight"),
        ({"m": 32}, "q_proj.weight is (64, 64), the adapter"),
        ({"config": {"fan_in_fan_out": True}}, "trained with fan_in_fan_out"),
        ({"others": {"base_model.model.norm.weight": torch.ones(64)}}, "base_model.model.norm.weight of the adapter is no LoRA"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_written(backbone_dir, tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        merge.merge(tmp_path / "out", q_proj(**changes), backbone_dir, True, {})
    assert message in str(caught.value)
    assert not any(tmp_path.iterdir())


def spoil_index(folder, **weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": json.loads(path.read_text())["weight_map"] | weight_map}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base: next(base.glob("model-00002-*")).unlink(), "is broken"),
        (lambda base: spoil_index(base, more="model-00001-of-00001.safetensors"), "is broken"),
        (lambda base: spoil_index(base, more=next(base.glob("model-00002-*")).name), "does not hold more"),
        (lambda base: (base / "model.safetensors.index.json").unlink(), "has no model.safetensors and no"),
        (lambda base: (base / "config.json").unlink(), "config.json is missing"),
    ],
)
def test_a_broken_backbone_is_named(backbone_dir, tmp_path, spoil, message):
    base = sharded(backbone_dir, tmp_path / "base", torch.float32)
    spoil(base)
    with pytest.raises(UserError, match=message):
        model_files.open_model(base)


def test_a_hub_id_is_found_in_the_cache(backbone_dir, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(backbone_dir, repo / "snapshots" / ("0" * 40))
    assert model_files.open_model(model_files.find_model("some/model")).shapes == model_files.open_model(backbone_dir).shapes
