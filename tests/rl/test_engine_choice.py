"""Which engine samples, and with which options. Nothing here needs vLLM."""

import importlib
import json

import pytest
import torch

from common import UserError
from common.rl import rollout


@pytest.mark.parametrize(
    ("asked", "installed", "gpu", "cpu_yaml", "wanted"),
    [
        ("auto", True, True, False, "vllm"),
        ("auto", True, True, True, "hf"),
        ("auto", True, False, False, "hf"),
        ("auto", False, True, False, "hf"),
        ("hf", True, True, False, "hf"),
        ("vllm", True, False, False, "vllm"),
    ],
)
def test_auto_takes_vllm_where_it_is_installed_and_a_gpu_is_there(
    monkeypatch, asked, installed, gpu, cpu_yaml, wanted
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(cpu_yaml).lower())
    assert rollout.choose_engine(asked) == wanted


def test_a_vllm_that_is_not_installed_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install vllm=="):
        rollout.choose_engine("vllm")


def test_options_are_a_json_object():
    assert rollout.vllm_options('{"gpu_memory_utilization": 0.4}') == {
        "gpu_memory_utilization": 0.4
    }
    for text in ("gpu_memory_utilization=0.4", "", "[1]", "0.4"):
        with pytest.raises(UserError, match="vllm_options"):
            rollout.vllm_options(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"trust_remote_code": true}',
        '{"block_size": 32, "load_format": "pt"}',
        '{"worker_extension_cls": "evil.X"}',
        '{"worker_cls": "evil.X"}',
        '{"tokenizer": "evil/x"}',
        '{"model": "evil/x"}',
        '{"speculative_config": {"model": "evil/x"}}',
        '{"compilation_config": {"backend": "evil.X"}}',
        '{"hf_overrides": {}}',
        '{"logits_processors": ["evil.X"]}',
        '{"download_dir": "../x"}',
        '{"seed": 1}',
        '{"gpu_memory_utilisation": 0.4}',
    ],
)
def test_options_can_load_no_other_code_and_no_other_weights(text):
    with pytest.raises(UserError, match=r"want a JSON object of gpu_memory_utilization, "):
        rollout.vllm_options(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "sglang"], "--engine"),
        (["--vllm-options", "{gpu}"], "vllm_options '{gpu}': want a JSON object"),
    ],
)
@pytest.mark.parametrize("script", ["01", "06"])
def test_a_wrong_option_is_one_line(finished_run, stage, script, flags, message):
    code, line = stage(script, finished_run, *flags)
    assert (code, line[:7]) == (2, "error: ")
    assert message in line


def test_the_engine_that_auto_chose_is_recorded(finished_run):
    recorded = json.loads((finished_run / "train" / "config.json").read_text())["config"]["engine"]
    assert recorded == rollout.choose_engine("auto")
