"""Training of all parameters (--tune full), and stages 1 to 6 on it."""

import importlib
import json
import pathlib
import shutil
import weakref

import pytest
import safetensors.torch
import torch
from conftest import PROMPTS, TINY, call_main, encode, metrics, plain_logprobs, save_lora
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import UserError
from common.files import adapters, series
from common.files import deltas as delta_files
from common.files import models as model_files
from common.files import read as inputs
from common.reproduce import results
from common.rl import policy, training

RATE = 1e-4
stage1, stage6 = (importlib.import_module(name) for name in ("01_train_lora_grpo", "06_eval"))


def call(number: str, run: pathlib.Path, *flags: str) -> None:
    """`call_main` with the tiny preset and all parameters trained."""
    tuned = ["--tune", "full", "--learning-rate", str(RATE)] if number in ("01", "05") else []
    call_main(number, "--config", TINY, "--run-dir", str(run), *tuned, *flags)


def tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def full_run(empty_run, tmp_path_factory) -> pathlib.Path:
    """Seven steps of all parameters, and what the other stages make of the first six. Read only."""
    run = tmp_path_factory.mktemp("full") / "run"
    shutil.copytree(empty_run, run)
    call("01", run, "--steps", "7")
    call("02", run)
    jumps = ["--methods", "weighted", "none", "--alphas", "3", "--merge"]
    call("04", run, *jumps)
    for start in ("weighted_alpha3", "none"):
        call("05", run, "--start", start, "--more-steps", "1")
    measured = ["backbone", "train/step_000[67]", "extrapolated/*", "merged/none"]
    call("06", run, "--policies", *measured, "continued/*/step_0007")
    return run


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def test_logprobs_and_gradients_of_all_parameters_equal_a_plain_forward_pass(
    backbone_dir, monkeypatch
):
    monkeypatch.setattr(policy, "HEAD_CHUNK", 5)  # so that chunks cut through sequences
    model, tokenizer = policy.load_backbone(str(backbone_dir))
    model.float().requires_grad_(True)
    prompts = encode(tokenizer, PROMPTS[:2])
    completions = encode(tokenizer, ["3+9+0=12<|end|>", "\\boxed{19}<|end|>"])

    def plainly():
        pairs = zip(prompts, completions, strict=True)
        return torch.cat([plain_logprobs(model, p, c, 0.7) for p, c in pairs])

    found = []
    for logprobs in (lambda: policy.token_logprobs(model, prompts, completions, 0.7), plainly):
        model.zero_grad()
        logprobs().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert len(found[0]) == 38
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=5e-5, rtol=1e-4)
        assert gradient.any(), name


def test_a_checkpoint_is_an_ordinary_model_folder_in_fp32(full_run, backbone_dir):
    folder = full_run / "train" / "step_0006"
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (backbone_dir, folder))
    moved = [
        (new - old).abs().max().item()
        for new, old in zip(after.parameters(), before.parameters(), strict=True)
    ]
    assert len(moved) == 38
    assert min(moved) > 0  # norms, biases and embeddings too
    assert max(moved) <= 1.5 * 12 * RATE  # 12 updates by AdamW
    assert after.get_output_embeddings().weight is after.get_input_embeddings().weight
    assert "lm_head.weight" not in tensors(folder)
    assert {tensor.dtype for tensor in tensors(folder).values()} == {torch.float32}
    tokenizers = (AutoTokenizer.from_pretrained(path) for path in (backbone_dir, folder))
    before_ids, after_ids = (tokenizer("123")["input_ids"] for tokenizer in tokenizers)
    assert before_ids == after_ids
    assert after.generation_config.eos_token_id == 1
    info = json.loads((folder / "checkpoint.json").read_text())
    assert (info["step"], info["backbone"]) == (6, "{run_dir}/backbone")
    assert info["backbone_fingerprint"] == policy.fingerprint(before)
    assert {"template_hash", "data_hash"} < info.keys()


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(full_run, new_run, monkeypatch):
    run = new_run
    real = stage1.sample

    def interrupted(run, step, timer):
        if step == 4:
            raise KeyboardInterrupt
        return real(run, step, timer)

    monkeypatch.setattr(stage1, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("01", run, "--steps", "5", "--resume-every", "2")
    monkeypatch.setattr(stage1, "sample", real)
    assert [path.name for path in (run / "train" / "resume").iterdir()] == ["step_0002"]
    call("01", run, "--steps", "5", "--resume-every", "2")
    assert metrics(run / "train") == metrics(full_run / "train")[:5]
    for step in range(1, 6):
        name = f"train/step_{step:04d}/model.safetensors"
        assert (run / name).read_bytes() == (full_run / name).read_bytes()


def test_the_kl_term_compares_with_the_backbone_as_it_was(backbone_dir, new_run):
    run, data, rollout = new_run, stage1.data, stage1.rollout
    call("01", run, "--steps", "1", "--kl-coef", "0.1")
    # Resumed: the reference must not be the weights that are put back.
    call("01", run, "--steps", "2", "--kl-coef", "0.1")
    one, two = metrics(run / "train")
    assert abs(one["kl"]) < 1e-6
    model = policy.load_backbone(str(run / "train" / "step_0001"))[0]
    backbone, tokenizer = policy.load_backbone(str(backbone_dir))
    problems = data.load_problems(run / "data" / "train.jsonl")
    problems, prompts = data.encode_prompts(problems, tokenizer, "{prompt}", "", 100, "train")
    order = [index for index in data.prompt_order(len(problems), 4, 2, 1) for _ in range(8)]
    seeds = [rollout.sequence_seed(1, 2, index, i % 8) for i, index in enumerate(order)]
    asked = [prompts[index] for index in order]
    sampled = rollout.HFEngine(model, tokenizer).generate(asked, seeds, 72)
    gaps = [
        plain_logprobs(m, prompt, r.tokens, 1.0).sum() * sign
        for prompt, r in zip(asked, sampled, strict=True)
        for m, sign in ((model, 1), (backbone, -1))
    ]
    want = float(sum(gaps)) / sum(len(r.tokens) for r in sampled)
    assert two["kl"] == pytest.approx(want, abs=1e-5)
    assert abs(want) > 1e-4


def test_other_sharding_than_ours_is_refused_in_one_line(backbone_dir, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(UserError, match=r"FSDP wants --config_file common/accelerate/fsdp2.yaml"):
        training.place(policy.load_backbone(str(backbone_dir))[0], torch.device("cpu"))


def test_a_layer_that_is_split_is_let_go_before_the_next_is_cast_to_fp32(backbone_dir, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    model = policy.load_backbone(str(backbone_dir))[0].bfloat16().requires_grad_(True)
    whole, counts = [], []

    def split(module, **how):
        counts.append(sum(reference() is not None for reference in whole))
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                assert parameter.dtype == torch.float32 or module is model.get_decoder()
                whole.append(weakref.ref(parameter))
                part.register_parameter(name, torch.nn.Parameter(parameter.detach()[:1].clone()))

    monkeypatch.setattr(training, "fully_shard", split)
    training.place(model, torch.device("cpu"))
    assert len(whole) > 30
    assert counts == [0] * (model.config.num_hidden_layers + 1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_whose_file_has_other_tensors_is_not_split(backbone_dir):
    model = policy.load_backbone(str(backbone_dir))[0]
    assert len(policy.split_layers(model)) == model.config.num_hidden_layers
    model._weight_conversions = ["fused experts"]
    with pytest.raises(UserError, match="FSDP2 cannot save Qwen2ForCausalLM"):
        policy.split_layers(model)


# --------------------------------------------------------------------------------------------------
# Jump, continuation, evaluation
# --------------------------------------------------------------------------------------------------


def test_extraction_finds_the_backbone_in_the_checkpoints(full_run):
    run = full_run
    found = series.find_checkpoints(["{run_dir}/train/step_*"], str(run))
    assert series.open_series(found, "", str(run)).backbone == "{run_dir}/backbone"
    start, end = (tensors(folder) for folder in (run / "backbone", run / "train" / "step_0006"))
    deltas = delta_files.load_trajectory(run / "deltas").deltas
    assert len(deltas) == 21
    for module, roles in deltas.items():
        old, new = (point[f"{module}.weight"].double() for point in (start, end))
        sigma = torch.linalg.svdvals(new - old)[0].item()
        assert roles["global"].sigma[-1].item() == pytest.approx(sigma, rel=1e-5)


def test_going_on_without_a_jump_meets_what_the_uninterrupted_run_meets(full_run):
    """The same weights, problems and seeds, so step 7 samples the same; the optimizer is fresh."""
    on, plain = metrics(full_run / "continued" / "none")[0], metrics(full_run / "train")[6]
    for key in ("step", "accuracy", "response_length", "entropy", "tokens"):
        assert on[key] == plain[key]
    assert on["grad_norm"] != plain["grad_norm"]
    jump = adapters.read_adapter(full_run / "extrapolated" / "none")
    assert all(not (b @ a).any() for b, a in jump.factors.values())


def test_going_on_from_a_jump_trains_all_parameters_from_the_jumped_weights(full_run):
    names = ("train/step_0006", "continued/weighted_alpha3/step_0007")
    last, after = (tensors(full_run / name) for name in names)
    jump = adapters.read_adapter(full_run / "extrapolated" / "weighted_alpha3")
    moves = {f"{module}.weight": jump.update(module).dense() for module in jump.factors}
    step = 1.01 * 2 * RATE  # two updates by a fresh AdamW move an entry by the rate each, at most
    for name, weight in after.items():
        start = last[name] + moves.get(name, 0)
        assert 0 < (weight - start).abs().max() <= step, name
    # Without the jump the above would show it.
    assert max(move.abs().max() for move in moves.values()) > 2 * step
    path = full_run / "continued" / "none" / "step_0007" / "checkpoint.json"
    info = json.loads(path.read_text())
    assert (info["step"], info["backbone"]) == (7, "{run_dir}/train/step_0006")


def test_going_on_from_a_whole_model_is_going_on_from_its_jump(full_run, tmp_path):
    """merged/none is the last checkpoint with a jump of zeros: the same weights, by another way."""
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    call("05", run, "--start", "merged/none", "--more-steps", "1")
    names = ("merged__none", "none")
    on, jump = (tensors(run / "continued" / name / "step_0007") for name in names)
    assert all(on[name].equal(jump[name]) for name in jump)


def test_whole_models_are_measured_as_they_are(full_run):
    found = results.load_results(full_run)
    assert set(found) == {
        "backbone",
        "train/step_0006",
        "train/step_0007",
        "extrapolated/weighted_alpha3",
        "extrapolated/none",
        "merged/none",
        "continued/weighted_alpha3/step_0007",
        "continued/none/step_0007",
    }
    rows = {
        name: inputs.read_jsonl(full_run / "eval" / name.replace("/", "__") / "test.jsonl")
        for name in found
    }
    assert rows["train/step_0006"] == rows["extrapolated/none"] == rows["merged/none"]
    assert rows["train/step_0006"] != rows["backbone"]
    assert rows["train/step_0006"] != rows["train/step_0007"]
    model, tokenizer = policy.load_backbone(str(full_run / "train" / "step_0007"))
    turns = [[{"role": "user", "content": r["prompt"]}] for r in rows["train/step_0007"]]
    prompts = [
        tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        for turn in turns
    ]
    seeds = [
        stage6.rollout.sequence_seed(1, 0, r["problem"], r["run"]) for r in rows["train/step_0007"]
    ]
    sampled = stage6.rollout.HFEngine(model, tokenizer).generate(prompts, seeds, 72)
    texts = [tokenizer.decode(r.tokens, skip_special_tokens=True) for r in sampled]
    assert texts == [r["response"] for r in rows["train/step_0007"]]
    text = (full_run / "report.md").read_text()
    assert "| GRPO, full parameters | 6 |" in text
    assert "GRPO with LoRA" not in text


def test_changed_weights_are_measured_again(full_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    path = run / "train" / "step_0006" / "model.safetensors"
    policies = ("train/step_0006", "extrapolated/none")
    paths = [run / "eval" / name.replace("/", "__") / "test.json" for name in policies]
    before = [result.read_text() for result in paths]
    monkeypatch.setattr(stage6.report, "write_run", str)  # seconds of figures
    call("06", run, "--policies", *policies)
    assert [result.read_text() for result in paths] == before  # seconds included
    shutil.copyfile(run / "backbone" / "model.safetensors", path)
    path.with_name("sha256.json").unlink()
    stage6.weights_hash.cache_clear()  # as in a new process
    # A jump of zeros on the changed model is the backbone too.
    call("06", run, "--policies", *policies)
    wanted = json.loads((run / "eval" / "backbone" / "test.json").read_text())["accuracy"]
    assert [json.loads(result.read_text())["accuracy"] for result in paths] == [wanted] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--restart", "merged"], "--tune full has no adapter to restart"),
        (["--tune", "lora"], "rank 1 on a whole model. --tune full, or --restart merged"),
    ],
)
def test_a_restart_that_means_nothing_is_refused(full_run, flags, message):
    with pytest.raises(UserError, match=message):
        call("05", full_run, "--start", "none", *flags)


def test_a_bf16_backbone_takes_a_jump_in_fp32(backbone_dir, tmp_path):
    """The jump belongs to the backbone in bf16; what it is added to are those weights in fp32."""
    bf16 = str(tmp_path / "bf16")
    policy.load_backbone(str(backbone_dir))[0].bfloat16().save_pretrained(bf16)
    model = policy.add_lora(policy.load_backbone(bf16)[0], 4, 2.0, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.full_like(parameter, 1e-4)
    base = policy.load_backbone(bf16)[0]
    info = {"backbone": "bf16", "backbone_fingerprint": policy.fingerprint(base)}
    save_lora(model, tmp_path / "jump", info)
    jump = adapters.read_adapter(tmp_path / "jump")
    after, stored = (
        policy.with_jump(base, tmp_path / "jump").state_dict(),
        model_files.open_model(tmp_path / "bf16"),
    )
    for module in jump.factors:
        want = stored.tensor(f"{module}.weight").float() + jump.update(module).dense().float()
        torch.testing.assert_close(after[f"{module}.weight"], want, atol=1e-7, rtol=1e-6)
