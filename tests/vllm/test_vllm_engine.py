"""Rollouts by vLLM against the trainer's own log-probabilities.

Needs vLLM: python -m pytest tests/vllm -c .pytest.ini -o addopts=-q
"""

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import shutil
import statistics
import typing
import weakref
from unittest import mock

import pytest
import torch
from conftest import TINY, lay_out, run_stage, save_lora, start_two
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import EngineArgs

from common import UserError, demo
from common.files import adapters
from common.files import read as inputs
from common.rl import options, policy, rollout, vllm_engine

# Starts faster, and the prefix cache works on blocks that are shorter than our prompts.
SMALL = json.dumps({"enforce_eager": True, "kv_cache_memory_bytes": 2**27, "block_size": 32})
LIMIT, TEMPERATURE = 120, 0.9
NEW = 24  # tokens sampled


def make_lora(rank: int):
    backbone, _ = policy.load_backbone(str(demo.SHIPPED))
    return policy.add_lora(backbone, rank, rank / 2, seed=0)


def move(model, seed: int) -> None:
    """A training step that can be seen: noise on every B."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)


def prompts(tokenizer) -> list[list[int]]:
    """16 prompts in two groups of equals, over two blocks of the prefix cache long.

    What stands in front leaves the backbone unsure, so that other seeds give other answers.
    """
    asked = [f"{'<|user|>' * 67}{sum_}<|assistant|>" for sum_ in ("12345+48967", "70512+18034")]
    return tokenizer([asked[0]] * 8 + [asked[1]] * 8)["input_ids"]


def sample(engine, tokenizer, seed: int = 0) -> list[rollout.Rollout]:
    return engine.generate(
        prompts(tokenizer), [seed * 100 + i for i in range(16)], NEW, TEMPERATURE
    )


def gap(model, tokenizer, rollouts) -> float:
    """The largest |log-prob by engine - log-prob by trainer| over all sampled tokens."""
    trainer = policy.token_logprobs(
        model, prompts(tokenizer), [r.tokens for r in rollouts], TEMPERATURE
    )
    return (trainer - torch.tensor([x for r in rollouts for x in r.logprobs])).abs().max().item()


def start_engine(model, tokenizer, rank: int, vllm_options: str = SMALL):
    cfg = options.SamplingConfig(
        engine="vllm", vllm_options=vllm_options, max_prompt_tokens=LIMIT - NEW, max_new_tokens=NEW
    )
    return rollout.make_engine(cfg, model, tokenizer, str(demo.SHIPPED), rank, None)


@pytest.fixture(scope="module")
def tokenizer():
    return policy.load_backbone(str(demo.SHIPPED))[1]


@pytest.fixture(scope="module")
def engine(tokenizer):
    """An engine for adapters up to rank 65, which vLLM only has room for at 128."""
    backbone, _ = policy.load_backbone(str(demo.SHIPPED))
    made = start_engine(backbone, tokenizer, 65)
    yield made
    made.close()


def test_allowed_ranks_are_those_of_this_vllm():
    assert typing.get_args(MaxLoRARanks) == adapters.VLLM_RANKS


@pytest.mark.parametrize("rank", [4, 17, 65])
def test_logprobs_follow_a_changing_adapter(engine, tokenizer, rank):
    model, before = make_lora(rank), None
    for step in range(4):
        move(model, step)
        if before:
            assert gap(model, tokenizer, before) > 0.05  # the check below would see a stale adapter
        engine.sync(model)
        before = sample(engine, tokenizer)
        assert gap(model, tokenizer, before) < 1e-4


def test_only_the_last_adapter_is_kept_on_the_disk(engine):
    model = make_lora(4)
    for _ in range(3):
        engine.sync(model)
    left = list(pathlib.Path(engine.folder.name).iterdir())
    assert [str(path) for path in left] == [engine.lora.lora_path]


def test_the_same_seeds_give_the_same_responses(engine, tokenizer):
    model = make_lora(4)
    engine.sync(model)
    one, two, other = (sample(engine, tokenizer, seed) for seed in (0, 0, 1))
    assert one == two
    assert [r.tokens for r in one] != [r.tokens for r in other]
    assert len({tuple(r.tokens) for r in one[:8]}) > 1  # one prompt, eight seeds


def test_responses_end_with_the_end_token_or_at_the_limit(engine, tokenizer):
    engine.use(None)
    prompt = tokenizer("<|user|>12345+48967<|assistant|>")["input_ids"]
    rollouts = engine.generate([prompt] * 64, list(range(64)), NEW)
    assert {r.finished for r in rollouts} == {True, False}
    for response in rollouts:
        assert response.finished == (response.tokens[-1] == tokenizer.eos_token_id)
        assert response.finished or len(response.tokens) == NEW
        assert tokenizer.eos_token_id not in response.tokens[:-1]
        assert len(response.logprobs) == len(response.tokens)


def test_an_adapter_from_disk_and_the_backbone_without_it(engine, tokenizer, tmp_path):
    model = make_lora(17)
    move(model, 0)
    save_lora(model, tmp_path / "step_0001", {"step": 1})
    engine.use(tmp_path / "step_0001")
    assert gap(model, tokenizer, sample(engine, tokenizer)) < 1e-4
    engine.use(None)
    backbone, _ = policy.load_backbone(str(demo.SHIPPED))
    assert gap(backbone, tokenizer, sample(engine, tokenizer)) < 1e-4
    (tmp_path / "step_0001" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is broken"):
        engine.use(tmp_path / "step_0001")


def test_on_a_gpu_fp32_weights_are_sampled_from_in_what_autocast_computes_in(monkeypatch):
    model, _ = policy.load_backbone(str(demo.SHIPPED))
    assert vllm_engine.dtype_of(model) == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert vllm_engine.dtype_of(policy.add_lora(model, 4, 2.0, seed=0)) == "bfloat16"
    assert vllm_engine.dtype_of(model.half()) == "float16"


def test_a_closed_engine_leaves_nothing_behind_and_another_can_follow(tokenizer):
    backbone, _ = policy.load_backbone(str(demo.SHIPPED))
    for _ in range(2):
        made = start_engine(backbone, tokenizer, 0)
        assert gap(backbone, tokenizer, sample(made, tokenizer)) < 1e-4
        weights = made.llm.apply_model(weakref.ref)[0]
        assert weights() is not None
        made.close()
        assert weights() is None
        assert not pathlib.Path(made.folder.name).exists()


def test_every_option_that_is_allowed_is_one_of_this_vllm():
    assert {*rollout.VLLM_OPTIONS} <= {field.name for field in dataclasses.fields(EngineArgs)}


def test_an_option_that_vllm_refuses_is_one_line(tokenizer):
    backbone, _ = policy.load_backbone(str(demo.SHIPPED))
    with pytest.raises(UserError, match=r"vLLM does not start \(.*cache_dtype.*see --vllm-options"):
        start_engine(backbone, tokenizer, 4, '{"kv_cache_dtype": "int3"}')


# --------------------------------------------------------------------------------------------------
# The stages, as a user runs them
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """50 steps of the demo by each engine: {engine: run directory}."""
    runs = {name: lay_out(tmp_path_factory.mktemp(name) / "run") for name in ("hf", "vllm")}

    def train(name: str):
        flags = ["--config", "demo", "--run-dir", str(runs[name]), "--steps", "50"]
        flags += ["--engine", name, "--vllm-options", SMALL]
        return run_stage("01_train_lora_grpo.py", *flags)

    with concurrent.futures.ThreadPoolExecutor() as pool:  # one on each core
        for result in pool.map(train, runs):
            assert result.returncode == 0, result.stderr
            assert "Traceback" not in result.stderr
    return runs


def test_training_with_vllm_learns_like_training_with_hf(trained):
    start, end = {}, {}
    for name, folder in trained.items():
        rows = inputs.read_jsonl(folder / "train" / "metrics.jsonl")
        assert max(row["logprob_gap_mean"] for row in rows) < 1e-5
        assert max(row["logprob_gap_max"] for row in rows) < 1e-3
        for row in rows:
            low, mean, high = (row[f"importance_ratio_{x}"] for x in ("min", "mean", "max"))
            assert 1 - 1e-3 < low <= mean <= high < 1 + 1e-3
        assert rows[0]["seconds_by_phase"].keys() == {
            "sync",
            "rollout",
            "reward",
            "logprob",
            "update",
            "save",
        }
        start[name], end[name] = (
            statistics.mean(row["accuracy"] for row in part) for part in (rows[:3], rows[-10:])
        )
        assert end[name] > start[name] + 0.3
    error = math.sqrt(2 * 0.5 * 0.5 / 640)  # of the difference: 64 responses a step, 10 steps
    assert abs(end["vllm"] - end["hf"]) < 4 * error


def test_evaluation_by_vllm_equals_evaluation_by_hf(trained):
    folder, results = trained["vllm"], {}
    for name in ("hf", "vllm"):
        flags = (
            "--policies",
            "backbone",
            "train/step_0050",
            "--runs",
            "4",
            "--engine",
            name,
            "--vllm-options",
            SMALL,
        )
        result = run_stage("06_eval.py", "--config", "demo", "--run-dir", str(folder), *flags)
        assert result.returncode == 0, result.stderr
        results[name] = {
            p: inputs.read_json(folder / "eval" / p / "test.json", "06")
            for p in ("backbone", "train__step_0050")
        }
        shutil.rmtree(folder / "eval")
    for wanted, found in zip(results["hf"].values(), results["vllm"].values(), strict=True):
        error = math.hypot(wanted["standard_error"], found["standard_error"])
        assert abs(wanted["accuracy"] - found["accuracy"]) < 3 * error
        assert abs(wanted["response_length"] / found["response_length"] - 1) < 0.1
    assert (
        results["vllm"]["train__step_0050"]["accuracy"]
        > results["vllm"]["backbone"]["accuracy"] + 0.2
    )


def test_training_all_parameters_samples_with_the_updated_weights(tmp_path):
    """At a rate at which stale weights show.

    With the copy into the engine left out the gap is 0.03, 0.1 and 0.2 nats in steps 2 to 4.
    """
    folder = lay_out(tmp_path / "run")
    flags = (
        "--tune",
        "full",
        "--learning-rate",
        "1e-3",
        "--steps",
        "4",
        "--engine",
        "vllm",
        "--vllm-options",
        SMALL,
    )
    result = run_stage("01_train_lora_grpo.py", "--config", TINY, "--run-dir", str(folder), *flags)
    assert result.returncode == 0, result.stderr
    rows = inputs.read_jsonl(folder / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert max(row["logprob_gap_mean"] for row in rows) < 1e-5
    # Each of two processes has two engines, one after the other: the policies are two models.
    policies = (*flags[-4:], "--policies", "backbone", "train/step_0004")
    output, _ = (run := start_two("06_eval.py", folder, "cpu_processes", *policies)).communicate(
        timeout=300
    )
    assert run.returncode == 0, output
    measured = inputs.read_json(folder / "eval" / "train__step_0004" / "test.json", "06")
    assert measured["n"] == 256


TWO_STEPS = ("--steps", "2", "--engine", "vllm", "--vllm-options", SMALL)


def test_with_sleep_mode_an_update_has_the_memory_and_a_rollout_has_new_weights(monkeypatch):
    """Of the calls alone: vLLM cannot sleep on a CPU. Their order is that of vLLM's own page on
    RL, docs/features/sleep_mode.md."""
    model, tokenizer = policy.load_backbone(str(demo.SHIPPED))
    llm, sleeps = mock.MagicMock(), {"enable_sleep_mode": True}
    monkeypatch.setattr(vllm_engine.vllm, "LLM", lambda **settings: llm)

    def called(model, lora_rank: int, options: dict) -> list[str]:
        llm.reset_mock()
        made = (model, tokenizer, str(demo.SHIPPED), LIMIT, lora_rank, options)
        engine = vllm_engine.VLLMEngine(*made)
        engine.sync(model)
        engine.generate([], [], NEW)
        engine.close()
        calls = [call for call in llm.mock_calls if "__" not in call[0]]
        return [f"{n} {how.get('tags', how.get('level', ''))}".strip() for n, _, how in calls]

    end = "llm_engine.engine_core.shutdown"
    wanted = ["collective_rpc", "reset_prefix_cache", "generate", end]
    assert called(model, 0, sleeps) == wanted  # frozen, as in stage 6: it never sleeps
    assert called(model.requires_grad_(True), 0, {}) == wanted
    rpc, reset, generate, _ = wanted
    assert called(model, 0, sleeps) == [
        *("sleep 2", "wake_up ['weights']", rpc, reset, "wake_up ['kv_cache']", generate),
        *("sleep 2", "wake_up", end),
    ]
    assert called(make_lora(4), 4, sleeps) == ["generate", end]  # an adapter's backbone stays


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = lay_out(tmp_path_factory.mktemp("one") / "run")
    result = run_stage(
        "01_train_lora_grpo.py", "--config", TINY, "--run-dir", str(folder), *TWO_STEPS
    )
    assert result.returncode == 0, result.stderr
    return inputs.read_jsonl(folder / "train" / "metrics.jsonl")


@pytest.mark.parametrize("accelerate_config", ["cpu_processes", "fsdp2"])
def test_two_processes_with_an_engine_each_train_like_one(one_process, tmp_path, accelerate_config):
    folder = lay_out(tmp_path / "run")
    output, _ = (
        run := start_two("01_train_lora_grpo.py", folder, accelerate_config, *TWO_STEPS)
    ).communicate(timeout=300)
    assert run.returncode == 0, output
    for two, one in zip(
        inputs.read_jsonl(folder / "train" / "metrics.jsonl"), one_process, strict=True
    ):
        assert two["logprob_gap_max"] < 1e-4
        for key in ("accuracy", "response_length", "loss", "entropy", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5)


def test_the_engines_of_two_processes_follow_a_sharded_model_that_is_trained_whole(tmp_path):
    folder = lay_out(tmp_path / "run")
    whole = ("--tune", "full", "--learning-rate", "1e-3")
    run = start_two("01_train_lora_grpo.py", folder, "fsdp2", *whole, *TWO_STEPS)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    rows = inputs.read_jsonl(folder / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert max(row["logprob_gap_max"] for row in rows) < 1e-4
