"""The merged folder against PEFT's own forward pass, and against a count of what rounding does."""

import json
import pathlib
import shutil

import pytest
import torch
from conftest import save_series
from peft import PeftModel

from common import UserError
from common.files import adapters, merge, models, write
from common.rl import policy

IDS = torch.tensor([[2, 7, 8, 9, 3, 5]])


@pytest.fixture(scope="module")
def adapter_dir(backbone_dir, tmp_path_factory):
    """A LoRA on some modules of the demo backbone, with ranks and scales of their own, by PEFT."""
    folder = tmp_path_factory.mktemp("adapter")
    options = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    modules = ["q_proj", "v_proj", "down_proj"]
    save_series(backbone_dir, folder / "{}", r=4, lora_alpha=6, target_modules=modules, **options)
    return folder / "80"


def sharded(backbone_dir, folder, dtype):
    """The demo backbone as several files with an index."""
    model, tokenizer = policy.load_backbone(str(backbone_dir))
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def logits(folder, adapter=None):
    model = policy.load_backbone(str(folder))[0]
    return (PeftModel.from_pretrained(model, adapter) if adapter else model)(input_ids=IDS).logits


@pytest.fixture(scope="module")
def shards(backbone_dir, tmp_path_factory):
    return sharded(backbone_dir, tmp_path_factory.mktemp("many") / "base", torch.float32)


@pytest.mark.parametrize("many", [False, True])
def test_the_merged_folder_computes_what_the_adapter_computes(
    backbone_dir, adapter_dir, shards, tmp_path, many
):
    base = shards if many else backbone_dir
    merge.merge(tmp_path / "out", adapters.read_adapter(adapter_dir), base, {})
    files = [
        {path.name for path in folder.glob("model*.safetensors*")}
        for folder in (base, tmp_path / "out")
    ]
    assert files[0] == files[1]  # the same files, and the index
    got = logits(tmp_path / "out")
    torch.testing.assert_close(got, logits(backbone_dir, adapter_dir), atol=1e-5, rtol=1e-5)
    assert (got - logits(backbone_dir)).abs().max() > 0.1
    tokenizers = [policy.load_backbone(str(x))[1] for x in (tmp_path / "out", backbone_dir)]
    assert tokenizers[0]("1+2") == tokenizers[1]("1+2")


@pytest.fixture
def merged(typed):
    """Stage 4 with the method `none`: its exit code and last words."""
    return lambda run: typed("04", run, "--methods", "none", "--merge")


def test_a_model_is_merged_in_fp32_whatever_the_backbone_has_and_once(
    backbone_dir, adapter_dir, tmp_path, merged
):
    base, run = sharded(backbone_dir, tmp_path / "base", torch.bfloat16), tmp_path / "run"
    series(adapter_dir, base, run)
    assert merged(run) == (0, "")
    adapter, before = adapters.read_adapter(adapter_dir), models.open_model(base)
    after = models.open_model(run / "merged" / "none")
    assert {*after.dtypes.values()} == {"F32"}
    assert after.config["dtype"] == "float32"
    for name in before.shapes:
        exact, module = before.tensor(name).float(), name.removesuffix(".weight")
        if module in adapter.factors:
            b, a = adapter.factors[module]
            exact += adapter.scale(module) * b @ a
        torch.testing.assert_close(after.tensor(name), exact)
    written = run / "merged" / "none" / "checkpoint.json"
    stamp = written.stat().st_mtime_ns
    assert merged(run) == (0, "")
    assert written.stat().st_mtime_ns == stamp


def series(adapter_dir, base, run):
    """What stage 4 reads for the method `none`: the adapter as two checkpoints, deltas of zeros."""
    adapter, paths = (
        adapters.read_adapter(adapter_dir),
        {1: "train/step_0001", 2: "train/step_0002"},
    )
    for path in paths.values():
        adapters.write_adapter(run / path, adapter, {"backbone": str(base)})
    for module, (b, a) in adapter.factors.items():
        zeros = {}
        for role, count in (("global", 2), ("local", 2), ("target", 1)):
            shapes = {"u": (count, len(b)), "sigma": (count,), "v": (count, a.shape[1])}
            zeros |= {f"{role}.{part}": torch.zeros(shape) for part, shape in shapes.items()}
        write.save_tensors(run / "deltas" / f"{module}.safetensors", zeros)
    index = {"steps": [1, 2], "checkpoints": paths, "k": 1, "backbone": ""}
    write.write_json(run / "deltas" / "index.json", {**index, "modules": list(adapter.factors)})
    write.write_json(run / "deltas" / "done.json", {"inputs": {}, "outputs": {}})


def test_a_backbone_that_is_nowhere_is_named(adapter_dir, tmp_path, merged):
    series(adapter_dir, "some/model-that-is-not-cached", tmp_path)
    code, line = merged(tmp_path)
    assert code == 2
    assert "cannot load backbone some/model-that-is-not-cached (" in line
    assert line.endswith("want a Hugging Face folder with safetensors weights, or a hub id")


def test_adapters_that_name_no_backbone_say_where_to_write_it(adapter_dir, tmp_path, merged):
    series(adapter_dir, "", tmp_path)
    for path in tmp_path.glob("train/*/checkpoint.json"):
        path.write_text("{}")
    code, line = merged(tmp_path)
    assert (code, "write its name to base_model_name_or_path" in line) == (2, True)


def q_proj(**changes):
    """An adapter on one matrix of the demo backbone, with what a test changes."""
    parts = {"module": "model.layers.0.self_attn.q_proj", "m": 64, "config": {}, "others": {}}
    parts |= changes
    factors = {parts["module"]: (torch.ones(parts["m"], 1), torch.ones(1, 64))}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **parts["config"]}
    return adapters.Adapter(config, factors, parts["others"])


OTHER = "base_model.model.norm.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": "lm_head", "m": 20}, "lm_head shares its weight with the embedding"),
        (
            {"module": "model.layers.9.self_attn.q_proj"},
            "model.layers.9.self_attn.q_proj.weight is None, the adapter wants (64, 64)",
        ),
        ({"m": 32}, "q_proj.weight is (64, 64), the adapter"),
        ({"config": {"fan_in_fan_out": True}}, "trained with fan_in_fan_out"),
        ({"others": {OTHER: torch.ones(64)}}, f"{OTHER} of the adapter is no LoRA"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_written(
    backbone_dir, tmp_path, changes, message
):
    with pytest.raises(UserError) as caught:
        merge.merge(tmp_path / "out", q_proj(**changes), backbone_dir, {})
    assert message in str(caught.value)
    assert not any(tmp_path.iterdir())


INDEX = "model.safetensors.index.json"


def second(base):
    return next(base.glob("model-00002-*"))


def spoil_index(folder, **weight_map):
    path = folder / INDEX
    weight_map = json.loads(path.read_text())["weight_map"] | weight_map
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base: second(base).unlink(), "is broken"),
        (lambda base: spoil_index(base, more="model-00001-of-00001.safetensors"), "is broken"),
        (lambda base: spoil_index(base, more=second(base).name), "does not hold more"),
        (lambda base: (base / INDEX).unlink(), "has no model.safetensors and no"),
        (lambda base: (base / "config.json").unlink(), "config.json is missing"),
    ],
)
def test_a_broken_backbone_is_named(shards, tmp_path, spoil, message):
    spoil(base := pathlib.Path(shutil.copytree(shards, tmp_path / "base")))
    with pytest.raises(UserError, match=message):
        models.open_model(base)


def test_a_hub_id_is_found_in_the_cache(backbone_dir, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(backbone_dir, repo / "snapshots" / ("0" * 40))
    found = models.open_model(models.find_model("some/model"))
    assert found.shapes == models.open_model(backbone_dir).shapes
