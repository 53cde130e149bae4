"""The plan of a GPU's memory against what is really kept, and the paper's presets against 80 GB."""

import json
import shlex
import types

import pytest
import torch
from conftest import parse_stage
from transformers import AutoConfig

from common import UserError, demo
from common.files import config
from common.reproduce import check, plans
from common.rl import memory, policy, rollout

# Parameters, as the files of the published models have them.
QWEN = {"1.5b": 1_543_714_304, "3b": 3_085_938_688, "7b": 7_615_616_512, "14b": 14_770_033_664}
GPU = 80e9
SHARDS = {"7b": 4, "14b": 4}  # GPUs that the layers are split over, at least


def qwen(size: str, dtype: str = "bfloat16"):
    known = config.load_preset(f"paper_qwen2.5_{size}")["reproduce"]["architecture"]
    return AutoConfig.for_model(**{**known, "dtype": dtype})


def options(preset: str, **changes):
    cfg = parse_stage("01", "--config", preset)
    return types.SimpleNamespace(**{**vars(cfg), **changes})


def really_kept(model, mixed: bool) -> int:
    """Bytes of the storages that a forward pass on numbers keeps, without the parameters."""
    found = {}
    owned = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def note(x):
        found[x.untyped_storage().data_ptr()] = x
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    ids = torch.zeros(3, 40, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), hooks:
        policy.base_model(model).get_decoder()(input_ids=ids, use_cache=False)
    return sum(x.untyped_storage().nbytes() for at, x in found.items() if at not in owned)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_what_is_counted_without_numbers_is_what_is_kept_with_them(tune, mixed):
    cfg = options("demo", tune=tune)
    model = policy.load_backbone(str(demo.SHIPPED))[0]
    model = policy.add_lora(model, cfg.lora_rank, cfg.lora_alpha, 0) if tune == "lora" else model
    model.requires_grad_(True) if tune == "full" else None
    paper = memory.on_paper(AutoConfig.from_pretrained(demo.SHIPPED), cfg)
    assert {n: p.shape for n, p in policy.trained(paper).items()} == {
        n: p.shape for n, p in policy.trained(model).items()
    }
    found, wanted = memory.kept(paper, 3, 40, mixed), really_kept(model, mixed)
    assert found == pytest.approx(wanted, rel=0.05)
    assert wanted > 100_000


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_plan_has_the_activations_that_are_kept_and_of_one_layer_again(gradient_checkpointing):
    how = {"gradient_checkpointing": gradient_checkpointing, "micro_tokens": 120}
    cfg = options("demo", tune="lora", max_prompt_tokens=10, max_new_tokens=30, **how)
    model = policy.load_backbone(str(demo.SHIPPED))[0]
    model = policy.add_lora(model, cfg.lora_rank, cfg.lora_alpha, 0)
    wanted = really_kept(model, mixed=False)
    if gradient_checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        wanted = wanted / model.config.num_hidden_layers + really_kept(model, mixed=False)
    parts = memory.plan(AutoConfig.from_pretrained(demo.SHIPPED), cfg, mixed=False)
    assert parts["activations"] == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize("size", QWEN)
def test_the_papers_runs_with_all_parameters_fit_too(size):
    wanted = plans.values_of("", config.load_preset(f"paper_qwen2.5_{size}"))["reproduce"]
    flags = shlex.split(wanted["full_flags"])
    cfg = parse_stage("01", "--config", f"paper_qwen2.5_{size}", *flags)
    cfg.tune, cfg.engine = "full", "vllm"
    shards = {"14b": 8}.get(size, SHARDS.get(size, 1))
    parts = memory.plan(qwen(size), cfg, shards)
    vllm = GPU * json.loads(cfg.vllm_options)["gpu_memory_utilization"]
    memory.told(parts, cfg, GPU)
    weights = QWEN[size]
    # The backbone again, for the KL term. The norm behind the last layer is whole.
    assert parts["backbone"] == pytest.approx(2 * weights / shards, rel=1e-4)
    assert parts["trained"] == pytest.approx(16 * weights / shards, rel=1e-4)
    assert vllm - 2 * weights > 6e9  # for the KV cache
    assert ("fsdp2.yaml" in wanted["launch"]) == (size in SHARDS)


def test_what_is_split_is_borrowed_two_layers_at_a_time_and_the_head_with_gradients(monkeypatch):
    monkeypatch.setattr(memory, "kept", lambda *args: 0)  # which takes seconds
    cfg = options("paper_qwen2.5_7b", tune="full")
    layer = 4 * 3584 * 3584 - 2 * 3584 * (3584 - 512) + 3 * 3584 * 18944  # without norms, biases
    head = 3584 * 152_064
    model = qwen("7b")
    model.num_hidden_layers = 3
    found = memory.plan(model, cfg, 8)["borrowed"]
    assert found == pytest.approx(8 * (2 * layer + head), rel=1e-3)
    cfg.tune = "lora"  # frozen, in bf16
    found = memory.plan(model, cfg, 8)["borrowed"]
    assert found == pytest.approx(2 * (2 * layer + head), rel=1e-3)
    assert memory.plan(model, cfg, 1)["borrowed"] == 0
    for tune, each in (("full", 2 + 2 + 4), ("lora", 2)):  # in bf16: a copy, a gradient; in fp32
        cfg.tune = tune
        mixed, plain = (memory.plan(model, cfg, 8, how)["head"] for how in (True, False))
        assert mixed - plain == each * head


def test_while_vllm_sleeps_its_memory_is_the_trainers():
    parts = {"backbone": 1e9, "trained": 16e9, "borrowed": 4e9, "activations": 9e9, "vLLM": 2e9}
    sleeps = {"gpu_memory_utilization": 0.5, "enable_sleep_mode": True}
    cfg = options("paper_qwen2.5_7b", tune="full", engine="vllm", vllm_options=json.dumps(sleeps))
    assert "30.0 GB of a GPU's 32.0" in memory.told(parts, cfg, 32e9)  # the update: all but vLLM
    assert "33.0 GB of a GPU's 40.0" in memory.told(parts, cfg, 40e9)  # a rollout: 1 + 12 + 20
    cfg.tune = "lora"  # an adapter is sent, and the backbone stays
    with pytest.raises(UserError, match=r"50\.0 GB of a GPU's 40\.0"):
        memory.told(parts, cfg, 40e9)


@pytest.mark.parametrize("size", QWEN)
def test_the_papers_experiments_fit_on_gpus_of_80_gb_after_a_merged_restart_too(size, monkeypatch):
    """Then the backbone is in fp32: no part is smaller than in bf16."""
    cfg = options(f"paper_qwen2.5_{size}", engine="vllm")
    memory.told(memory.plan(qwen(size, "float32"), cfg, SHARDS.get(size, 1)), cfg, GPU)
    monkeypatch.setattr(memory, "kept", lambda *args: 0)  # which takes seconds
    parts = memory.plan(qwen(size), cfg, SHARDS.get(size, 1))
    assert parts["backbone"] / 1e9 == pytest.approx(
        {"1.5b": 3.1, "3b": 6.2, "7b": 3.8, "14b": 7.4}[size], abs=0.1
    )
    vllm = GPU * json.loads(cfg.vllm_options).get("gpu_memory_utilization", rollout.SHARED)
    assert vllm - parts["vLLM"] > 10e9  # room for the KV cache


@pytest.mark.parametrize("flags", [[], ["--tune", "full"]])
def test_of_vllm_its_whole_copy_counts_however_the_trainers_model_is_split(flags, monkeypatch):
    monkeypatch.setattr(memory, "kept", lambda *args: 0)  # which takes seconds
    cache = json.dumps({"kv_cache_memory_bytes": 10**10})
    cfg = parse_stage("01", "--config", "paper_qwen2.5_7b", "--vllm-options", cache, *flags)
    cfg.engine = "vllm"
    parts = memory.plan(qwen("7b"), cfg, 8)
    copy = 2 * QWEN["7b"]
    assert parts["vLLM"] == pytest.approx(copy)
    assert f"vLLM {(copy + 1e10) / 1e9:.1f}" in memory.told(parts, cfg, 1e12)


def test_of_hf_the_kv_cache_of_a_whole_batch_counts_but_not_beside_the_update():
    cfg = options("demo", tune="lora", engine="hf", batch_size=50)
    parts = memory.plan(AutoConfig.from_pretrained(demo.SHIPPED), cfg, mixed=False)
    model = policy.load_backbone(str(demo.SHIPPED))[0]
    ids = torch.zeros(50, cfg.max_prompt_tokens + cfg.max_new_tokens, dtype=torch.long)
    layers = model(ids, use_cache=True).past_key_values.layers
    assert parts["KV cache"] == sum(x.nbytes for la in layers for x in (la.keys, la.values))
    shared = memory.plan(model.config, cfg, mixed=False, processes=4)  # 64 responses, 16 each
    assert 50 * shared["KV cache"] == 16 * parts["KV cache"]
    model.config.head_dim = 2 * model.config.hidden_size // model.config.num_attention_heads
    assert memory.plan(model.config, cfg, mixed=False)["KV cache"] == 2 * parts["KV cache"]
    parts = {"backbone": 3e9, "trained": 4e9, "activations": 2e9, "KV cache": 2e10}
    assert "26.0 GB of a GPU's 40.0" in memory.told(parts, cfg, 4e10)  # 3 + 3 + 20, no gradient
    with pytest.raises(UserError, match=r"KV cache 20\.0\): less --batch-size, or split"):
        memory.told(parts, cfg, 2e10)
    with pytest.raises(UserError, match=r"KV cache 20\.0\): --gradient-checkpointing true, or"):
        memory.told(parts, cfg, 8e9)  # fewer at a time would not help


def test_a_part_of_the_gpu_is_left_to_what_is_not_computed():
    cfg = options("paper_qwen2.5_1.5b", engine="hf")
    assert "of a GPU's 10.0" in memory.told({"backbone": 9.4e9, "trained": 0}, cfg, 1e10)
    with pytest.raises(UserError, match=r"needs 9\.6 GB of a GPU's 10\.0"):
        memory.told({"backbone": 9.6e9, "trained": 0}, cfg, 1e10)


@pytest.mark.parametrize("size", QWEN)
def test_the_papers_presets_know_the_size_of_their_model(size, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = f"paper_qwen2.5_{size}"
    wanted = plans.values_of(name, config.load_preset(name))["reproduce"]
    cfg, shape = parse_stage("01", "--config", name), qwen(size)
    lora, whole = check.sizes_of(cfg, wanted)
    assert whole == 4 * QWEN[size]
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    kv, inner = hidden // heads * shape.num_key_value_heads, shape.intermediate_size
    sums = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner)  # m + n of 7 matrices
    assert lora == 4 * cfg.lora_rank * sums * shape.num_hidden_layers
    assert wanted["gpu_hours_per_step"] > 0


def test_a_gpu_that_is_too_small_is_refused_with_what_would_help(monkeypatch, capsys):
    place = types.SimpleNamespace(num_processes=1, mixed_precision="bf16", print=print)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, int(GPU)), raising=False)
    cfg = options("paper_qwen2.5_1.5b", engine="vllm")
    model = memory.on_paper(qwen("1.5b"), cfg)
    cfg = options("paper_qwen2.5_1.5b", engine="vllm", micro_tokens=16384)
    ways = r"--gradient-checkpointing true, or --micro-tokens 5120, or less gpu_memory_utiliz"
    with pytest.raises(UserError, match=rf"vLLM 32\.0.*{ways}"):
        memory.check(model, cfg, place)
    less = options("paper_qwen2.5_1.5b", engine="vllm", gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"\): less gpu_memory_utilization, or split it over"):
        memory.told(
            {"backbone": 79e9, "trained": 0, "vLLM": 3e9}, less, GPU
        )  # the two others are used already
    with pytest.raises(UserError, match=r"vLLM's copy, 33\.0 GB, wants more gpu_memory_util"):
        memory.told({"backbone": 1e9, "trained": 0, "vLLM": 33e9}, less, GPU)
    less.vllm_options = '{"cpu_offload_gb": 2}'
    parts = {"backbone": 1e9, "trained": 0, "vLLM": 33e9}
    assert "memory: 33.0 GB" in memory.told(parts, less, GPU)
    cfg.gradient_checkpointing = True
    memory.check(model, cfg, place)
    assert " GB of a GPU's 80.0 (backbone 3.1, trained 1.2, borrowed 0" in capsys.readouterr().out


def test_a_model_that_cannot_run_without_numbers_is_not_refused(monkeypatch, capsys):
    place = types.SimpleNamespace(num_processes=1, mixed_precision="bf16", print=print)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1), raising=False)
    monkeypatch.setattr(memory, "kept", lambda *args: torch.zeros(0).nonexistent)
    cfg = options("demo", engine="vllm")
    memory.check(memory.on_paper(AutoConfig.from_pretrained(demo.SHIPPED), cfg), cfg, place)
    assert "memory: not known before the first step" in capsys.readouterr().out


def test_lora_without_peft_s_casts_has_the_same_bits_under_autocast_and_keeps_less():
    found = []
    for lean in (False, True):
        backbone, _ = policy.load_backbone(str(demo.SHIPPED))
        model = policy.add_lora(backbone.bfloat16(), 8, 16.0, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.02
        if lean:
            policy.keep_dtypes(model)
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = policy.token_logprobs(model, [[1, 2, 3]] * 2, [[4, 5, 6]] * 2, 1.0)
        logprobs.sum().backward()
        grads = [p.grad for p in policy.trained(model).values()]
        found.append((logprobs, *grads, really_kept(model, mixed=True)))
    (*plain, more), (*lean, less) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, lean, strict=True))
    assert any(x.any() for x in plain[1:])
    assert less < 0.95 * more
