"""Which engine samples, and with which options. Nothing here needs vLLM."""

import importlib
import json

import pytest
import torch
from conftest import TINY, call_stage

from common import UserError
from common.files import config
from common.rl import rollout


@pytest.mark.parametrize(
    ("asked", "installed", "gpu", "wanted"),
    [
        ("auto", True, True, "vllm"),
        ("auto", True, False, "hf"),
        ("auto", False, True, "hf"),
        ("hf", True, True, "hf"),
        ("vllm", True, False, "vllm"),
    ],
)
def test_auto_takes_vllm_where_it_is_installed_and_a_gpu_is_there(
    monkeypatch, asked, installed, gpu, wanted
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
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


def test_cpu_yaml_means_the_cpu_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rollout.importlib.util, "find_spec", lambda name: name)
    assert rollout.choose_engine("auto") == "vllm"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert rollout.choose_engine("auto") == "hf"


@pytest.mark.parametrize("path", sorted(config.PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_options_of_our_presets_are_allowed(path):
    for section in config.load_preset(str(path)).values():
        rollout.vllm_options(section.get("vllm_options", "{}"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "sglang"], "--engine"),
        (["--vllm-options", "{gpu}"], "vllm_options '{gpu}': want a JSON object"),
        (["--vllm-options", "[]"], "vllm_options '[]': want a JSON object"),
    ],
)
@pytest.mark.parametrize("script", ["01_train_lora_grpo.py", "06_eval.py"])
def test_a_wrong_option_is_one_line(finished_run, monkeypatch, capsys, script, flags, message):
    code, line = call_stage(
        monkeypatch, capsys, script, "--config", TINY, "--run-dir", str(finished_run), *flags
    )
    assert (code, line[:7]) == (2, "error: ")
    assert message in line


def test_the_engine_that_auto_chose_is_recorded(finished_run):
    recorded = json.loads((finished_run / "train" / "config.json").read_text())["config"]["engine"]
    assert recorded == rollout.choose_engine("auto")
