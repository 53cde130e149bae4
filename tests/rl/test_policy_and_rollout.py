"""Log-probabilities and sampling against plain Hugging Face forward passes."""

import importlib
import json
import shutil
import types

import pytest
import torch
from conftest import PROMPTS, edit_json, encode, plain_logprobs, save_lora
from peft import LoraConfig, get_peft_model

from common import UserError
from common.rl import policy, rollout


def test_token_logprobs_equal_a_plain_forward_pass(lora_policy, monkeypatch):
    (model, tokenizer), temperature = lora_policy, 0.7
    monkeypatch.setattr(policy, "HEAD_CHUNK", 5)  # so that chunks cut through sequences
    texts = ["3+9+0=12<|end|>", "\\boxed{19}<|end|>", "8"]
    prompts, completions = encode(tokenizer, PROMPTS), encode(tokenizer, texts)
    logprobs = policy.token_logprobs(model, prompts, completions, temperature)
    pairs = zip(prompts, completions, strict=True)
    expected = torch.cat([plain_logprobs(model, p, c, temperature) for p, c in pairs])
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


def sample(model, tokenizer, texts, seeds, **kwargs):
    return rollout.HFEngine(model, tokenizer, **kwargs).generate(
        encode(tokenizer, texts), seeds, max_new_tokens=40, temperature=0.9
    )


def test_sampled_logprobs_equal_the_trainers(lora_policy):
    model, tokenizer = lora_policy
    texts = PROMPTS[:2] * 8
    rollouts = sample(model, tokenizer, texts, list(range(16)))
    trainer = policy.token_logprobs(
        model, encode(tokenizer, texts), [r.tokens for r in rollouts], 0.9
    )
    engine = torch.tensor([x for r in rollouts for x in r.logprobs])
    assert (trainer - engine).abs().max() < 2e-5
    assert (trainer - engine).abs().mean() < 2e-6
    assert {len(r.tokens) for r in rollouts} != {40}  # some ended by themselves


def test_at_a_low_temperature_the_tokens_are_those_of_greedy_generate(lora_policy):
    """Prompts of several lengths, responses that end at several places: the loop's own oracle."""
    model, tokenizer = lora_policy
    prompts = encode(tokenizer, [*PROMPTS, "7+8"])
    ours = rollout.HFEngine(model, tokenizer).generate(prompts, range(4), 40, temperature=1e-6)
    assert len({len(response.tokens) for response in ours}) > 1
    for prompt, response in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False)
        assert response.tokens == theirs[0, len(prompt) :].tolist()


def test_what_is_sampled_does_not_depend_on_the_batch(lora_policy):
    model, tokenizer = lora_policy
    texts, seeds = PROMPTS * 3, list(range(9))
    together = sample(model, tokenizer, texts, seeds)
    in_parts = sample(model, tokenizer, texts, seeds, batch_size=2)
    backwards = sample(model, tokenizer, texts[::-1], seeds[::-1])[::-1]
    assert (
        [r.tokens for r in together]
        == [r.tokens for r in in_parts]
        == [r.tokens for r in backwards]
    )
    assert together[0].tokens != together[3].tokens  # same prompt, another seed


def test_responses_end_with_the_end_token_or_at_the_limit(lora_policy):
    model, tokenizer = lora_policy
    for response in sample(model, tokenizer, PROMPTS[:1] * 32, list(range(32))):
        assert response.finished == (response.tokens[-1] == tokenizer.eos_token_id)
        assert response.finished or len(response.tokens) == 40
        assert tokenizer.eos_token_id not in response.tokens[:-1]
        assert len(response.logprobs) == len(response.tokens)


def test_sampling_follows_the_models_probabilities(lora_policy):
    model, tokenizer = lora_policy
    prompt, draws = encode(tokenizer, PROMPTS[:1])[0], 4000
    first = [
        r.tokens[0]
        for r in rollout.HFEngine(model, tokenizer, 1000).generate(
            [prompt] * draws, list(range(draws)), max_new_tokens=1
        )
    ]
    expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    seen = torch.bincount(torch.tensor(first), minlength=len(expected)) / draws
    assert ((seen - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt() + 1e-3).all()


def test_top_p_keeps_to_the_nucleus(lora_policy):
    model, tokenizer = lora_policy
    prompt = encode(tokenizer, PROMPTS[:1])[0]
    order = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = set(order.indices[: int((order.values.cumsum(0) < 0.5).sum()) + 1].tolist())
    rollouts = rollout.HFEngine(model, tokenizer).generate(
        [prompt] * 200, list(range(200)), max_new_tokens=1, top_p=0.5
    )
    assert {r.tokens[0] for r in rollouts} <= nucleus


def test_sampling_defaults_in_the_backbones_folder_are_ignored(tmp_path, backbone_dir):
    folder = tmp_path / "backbone"
    shutil.copytree(backbone_dir, folder)
    model, tokenizer = policy.load_backbone(str(folder))
    want = [r.tokens for r in sample(model, tokenizer, PROMPTS[:1] * 8, list(range(8)))]
    changes = {"repetition_penalty": 1.5, "top_k": 1, "do_sample": True, "temperature": 0.1}
    edit_json(folder / "generation_config.json", **changes)
    model, tokenizer = policy.load_backbone(str(folder))
    assert model.generation_config.repetition_penalty == 1.5
    assert [r.tokens for r in sample(model, tokenizer, PROMPTS[:1] * 8, list(range(8)))] == want


def test_a_saved_adapter_loads_equal_and_is_stored_in_fp32(lora_policy, tmp_path, backbone_dir):
    model, tokenizer = lora_policy
    ids = torch.tensor(encode(tokenizer, PROMPTS[:1]))
    backbone, _ = policy.load_backbone(str(backbone_dir))
    save_lora(model, tmp_path / "step_0001", {"backbone_fingerprint": policy.fingerprint(backbone)})
    again = policy.load_lora(backbone, tmp_path / "step_0001")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}


def test_fingerprint_sees_a_changed_weight(backbone_dir):
    one, _ = policy.load_backbone(str(backbone_dir))
    two, _ = policy.load_backbone(str(backbone_dir))
    assert policy.fingerprint(one) == policy.fingerprint(two)
    two.get_input_embeddings().weight.data[0, 0] += 1
    assert policy.fingerprint(one) != policy.fingerprint(two)


def test_dropout_of_another_trainers_adapter_is_off(lora_policy, tmp_path, backbone_dir, capsys):
    """The policy that is trained has to be the one that sampled. Live dropout moves log-probs by
    nats."""
    model, tokenizer = lora_policy
    model.save_pretrained(tmp_path / "theirs")
    edit_json(tmp_path / "theirs" / "adapter_config.json", lora_dropout=0.5)
    loaded = policy.load_lora(policy.load_backbone(str(backbone_dir))[0], tmp_path / "theirs")
    assert "theirs: lora_dropout is set to 0" in capsys.readouterr().err
    loaded.train()
    prompts, completions = encode(tokenizer, PROMPTS[:1]), encode(tokenizer, ["3+9+0=12<|end|>"])
    found, again = (policy.token_logprobs(loaded, prompts, completions, 1.0) for _ in range(2))
    assert torch.equal(found, again)
    assert torch.equal(found, policy.token_logprobs(model, prompts, completions, 1.0))


def test_dropout_of_the_backbone_is_off(backbone_dir, tmp_path):
    shutil.copytree(backbone_dir, tmp_path / "backbone")
    edit_json(tmp_path / "backbone" / "config.json", attention_dropout=0.5)
    model, _ = policy.load_backbone(str(tmp_path / "backbone"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_a_backbone_that_scales_its_logits_is_refused(backbone_dir):
    model, _ = policy.load_backbone(str(backbone_dir))
    policy.check_head(model, [5, 6, 7])
    forward = model.forward
    model.forward = lambda **how: types.SimpleNamespace(logits=3 * forward(**how).logits)
    with pytest.raises(UserError, match="scales or caps its logits"):
        policy.check_head(model, [5, 6, 7])


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_rollouts_of_a_tied_embedding_with_a_lora_are_those_of_the_trainer(backbone_dir, target):
    model, tokenizer = policy.load_backbone(str(backbone_dir))
    assert model.config.tie_word_embeddings
    lora = LoraConfig(r=2, target_modules=[target, "q_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora)
    prompts = encode(tokenizer, PROMPTS)
    found = rollout.HFEngine(model, tokenizer).generate(prompts, range(3), 8)
    ours = policy.token_logprobs(model, prompts, [r.tokens for r in found], 1.0)
    theirs = torch.tensor([x for r in found for x in r.logprobs])
    torch.testing.assert_close(ours.detach(), theirs, atol=1e-4, rtol=1e-4)


def test_the_seed_of_a_problem_that_comes_again_in_a_step_is_another():
    first = rollout.sequence_seed(0, 3, 5, 1)
    assert first == rollout.sequence_seed(0, 3, 5, 1, 0) == 6126671502514601163
    assert len({rollout.sequence_seed(0, 3, 5, 1, occurrence) for occurrence in range(3)}) == 3


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


FORBIDDEN = "trust_remote_code load_format worker_extension_cls worker_cls tokenizer model seed"
FORBIDDEN += " speculative_config compilation_config hf_overrides logits_processors download_dir"


@pytest.mark.parametrize("option", [*FORBIDDEN.split(), "gpu_memory_utilisation"])
def test_options_can_load_no_other_code_and_no_other_weights(option):
    with pytest.raises(UserError, match=r"want a JSON object of gpu_memory_utilization, "):
        rollout.vllm_options(json.dumps({"block_size": 32, option: "x"}))


def test_the_engine_that_auto_chose_is_recorded(finished_run):
    recorded = json.loads((finished_run / "train" / "config.json").read_text())["config"]["engine"]
    assert recorded == rollout.choose_engine("auto")
