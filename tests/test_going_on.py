"""What is lost or spoilt by hand is noticed, nothing good is thrown away for it, and the stage goes
on."""

import importlib
import os
import shutil
import signal
import types

import pytest
import torch
from conftest import flip_bit, measured_as, metrics, weights

from common import UserError
from common.baselines import given
from common.files import adapters, models, resume
from common.files import stage as stages
from common.rl import metrics as step_metrics
from common.rl import policy

CFG = types.SimpleNamespace(resume_every=1, steps=9)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def test_training_goes_on_from_the_state_before_a_spoilt_one(run, finished_run, stage):
    flip_bit(run / "train" / "resume" / "step_0008" / "state.safetensors")
    (run / "train" / "done.json").unlink()
    code, line = stage("01", run, "--steps", "8")
    assert code == 0
    assert "is not as it was written" in line
    assert "going on from step_0007" in line
    assert metrics(run / "train") == metrics(finished_run / "train")
    assert weights(run / "train") == weights(finished_run / "train")


def test_training_goes_on_from_the_state_before_one_that_has_lost_a_file(run, stage, monkeypatch):
    monkeypatch.setattr(resume, "FILE", 10_000)  # bytes: a state of many files
    (run / "train" / "done.json").unlink()
    assert stage("01", run, "--steps", "9")[0] == 0
    *_, newest = resume.states(run / "train")
    files = sorted(newest.glob("*.safetensors"))
    assert len(files) > 2
    files[-1].unlink()
    (run / "train" / "done.json").unlink()
    code, line = stage("01", run, "--steps", "9")
    assert (code, "it has lost a file; going on from step_0008" in line) == (0, True)


def test_a_parameter_that_never_had_a_gradient_does_not_spoil_a_state(tmp_path):
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    optimizer = torch.optim.AdamW(model.parameters())
    model[1].weight.sum().backward()
    optimizer.step()
    resume.save_state(tmp_path, 1, dict(model.named_parameters()), optimizer, {})
    before = model[1].weight.detach().clone()
    torch.nn.init.zeros_(model[1].weight)
    assert resume.go_on(tmp_path, 0, CFG, {}, model, optimizer) == 1
    assert torch.equal(model[1].weight, before)


def test_processes_that_have_read_different_states_do_not_go_on(run, stage, monkeypatch):
    monkeypatch.setattr(resume, "gather_object", lambda mine: [*mine, 7])
    (run / "train" / "done.json").unlink()
    code, line = stage("01", run, "--steps", "8")
    assert (code, "processes go on from different steps [7, 8]" in line) == (2, True)


def test_another_trainers_adapter_is_trained_on_from_the_step_in_its_name(
    finished_run, new_run, stage
):
    """As TRL's output_dir has them, without our records; the last one is a jump."""
    outputs, jump = new_run / "outputs", "next-aligned_alpha1.5"
    for step, name in ((5, "train/step_0005"), (6, f"extrapolated/{jump}")):
        folder = outputs / f"checkpoint-{step}"
        shutil.copytree(finished_run / name, folder)
        for record in ("checkpoint.json", "sha256.json"):
            (folder / record).unlink()
    shutil.copytree(outputs / "checkpoint-5", outputs / ".checkpoint-9.tmp")  # left by a kill
    assert stage("01", new_run, "--start", str(outputs), "--steps", "8")[0] == 0
    assert stage("05", new_run, "--start", str(outputs), "--name", "trl")[0] == 0
    file = "step_0008/adapter_model.safetensors"
    want = (finished_run / "continued" / jump / file).read_bytes()
    assert (new_run / "train" / file).read_bytes() == want
    assert (new_run / "continued" / "trl" / file).read_bytes() == want
    of_verl = new_run / "verl" / "global_step_6" / "actor" / "lora_adapter"
    shutil.copytree(outputs / "checkpoint-6", of_verl)
    assert models.find_adapter(str(new_run / "verl")) == (of_verl, 6)
    code, line = stage("01", new_run, "--start", str(outputs), "--steps", "6", "--overwrite")
    assert (code, "is of step 6: use a larger --steps" in line) == (2, True)
    code, line = stage("01", new_run, "--start", str(new_run / "data"), "--overwrite")
    assert (code, "no adapter of PEFT's is in or below it" in line) == (2, True)


def test_a_jump_that_is_a_whole_model_gets_a_new_lora(run, stage):
    assert stage("04", run, "--methods", "dare")[0] == 0
    assert stage("05", run, "--start", "dare", "--more-steps", "1")[0] == 0
    made = run / "continued" / "dare_merged" / "step_0007"
    assert adapters.read_info(made)["backbone"] == "{run_dir}/merged/dare"
    assert adapters.read_config(made)["r"] == 4


def test_an_engine_that_disagrees_with_the_trainer_ends_the_run(run, stage, monkeypatch):
    with pytest.raises(UserError, match="engine and trainer disagree by nan"):
        step_metrics.check_gap({"step": 9, "logprob_gap_mean": float("nan")}, 1.0)
    real = step_metrics.of_step
    monkeypatch.setattr(step_metrics, "of_step", lambda *a: {**real(*a), "logprob_gap_mean": 1e9})
    code, line = stage("01", run, "--steps", "9")
    assert (code, "step 9: engine and trainer disagree by" in line) == (2, True)
    assert not (run / "train" / "step_0009").exists()


def test_a_stage_that_was_to_overwrite_is_gone_on_with_without(run, stage, monkeypatch):
    real = resume.StepLog.append

    def stop_after(log, *rows):
        real(log, *rows)
        if rows and rows[0]["step"] == 3 and log.path.name == "metrics.jsonl":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(resume.StepLog, "append", stop_after)
        code, line = stage("01", run, "--overwrite", "--steps", "4")
    assert (code, line) == (143, "stopped: type the same command without --overwrite to go on")
    assert sorted(path.name for path in resume.states(run / "train"))[-1] == "step_0002"
    assert stage("01", run, "--steps", "4")[0] == 0
    assert [row["step"] for row in metrics(run / "train")] == [1, 2, 3, 4]


def test_a_problem_that_comes_twice_in_a_step_gets_other_responses(new_run, stage, monkeypatch):
    data = new_run / "data" / "train.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:2]))
    stage1, sampled = importlib.import_module("01_train_lora_grpo"), []
    real = stage1.sample
    monkeypatch.setattr(stage1, "sample", lambda *a: sampled.append(real(*a)) or sampled[-1])
    assert stage("01", new_run, "--steps", "1")[0] == 0
    prompts, completions = sampled[0].prompts, sampled[0].completions
    # Two problems, four places, eight responses each.
    twins = [i for i in range(8, 32) if prompts[i] == prompts[0]]
    assert len(twins) == 8
    assert [completions[i] for i in twins] != completions[:8]


# --------------------------------------------------------------------------------------------------
# What is made again
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "file", "flags"),
    [
        ("02", "deltas/model.layers.0.mlp.up_proj.safetensors", []),
        ("03", "predictor/aligned/model.safetensors", ["--recipes", "aligned"]),
        ("04", "extrapolated/none/adapter_model.safetensors", ["--methods", "none"]),
    ],
)
def test_a_file_that_is_gone_is_made_again(run, finished_run, stage, script, file, flags):
    (run / file).unlink()
    assert stage(script, run, *flags)[0] == 0
    assert (run / file).read_bytes() == (finished_run / file).read_bytes()


# --------------------------------------------------------------------------------------------------
# What files say
# --------------------------------------------------------------------------------------------------


def test_a_stage_6_that_fails_stops_the_soup(run, stage, monkeypatch):
    for step in range(1, 7):
        measured_as(run, f"train/step_{step:04d}", step / 10)
    seen = []
    monkeypatch.setenv("RANK", "0")  # as a process of several, which stage 6 must not be
    failed = types.SimpleNamespace(returncode=2)
    monkeypatch.setattr(given.subprocess, "run", lambda _, env: seen.append(env) or failed)
    flags = ["--methods", "greedy-soup", "--validation-data", str(run / "data" / "valid.jsonl")]
    code, line = stage("04", run, *flags)
    assert (code, "stage 6 failed on" in line, "RANK" in seen[0]) == (2, True, False)


def test_a_resume_state_with_other_tensors_is_not_put_back(lora_policy, tmp_path):
    model = lora_policy[0]
    optimizer = torch.optim.AdamW(model.parameters())
    weights = {name: p.detach() for name, p in policy.trained(model).items()}
    weights.pop(next(iter(weights)))
    resume.save_state(tmp_path, 1, weights, optimizer, {})
    with pytest.raises(UserError, match="not of this policy"):
        resume.go_on(tmp_path, 0, CFG, {}, model, optimizer)


def test_how_a_step_is_computed_is_not_taken_from_a_state(lora_policy, tmp_path):
    model, trained = lora_policy[0], policy.trained(lora_policy[0])
    fused, plain = (torch.optim.AdamW(trained.values(), fused=way) for way in (True, False))
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    fused.step()
    resume.save_state(tmp_path, 1, trained, fused, {})
    assert resume.go_on(tmp_path, 0, CFG, {}, model, plain) == 1
    assert plain.param_groups[0]["fused"] is False


def test_a_state_whose_reading_is_interrupted_is_not_a_broken_one(
    lora_policy, tmp_path, monkeypatch
):
    model = lora_policy[0]
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        resume.save_state(tmp_path, step, policy.trained(model), optimizer, {})

    def safe_open(path, framework):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None

    monkeypatch.setattr(resume.safetensors, "safe_open", safe_open)
    with pytest.raises(SystemExit) as stop:
        stages.run_stage(lambda: resume.go_on(tmp_path, 0, CFG, {}, model, optimizer))
    assert stop.value.code == 143
    assert [path.name for path in resume.states(tmp_path)] == ["step_0001", "step_0002"]
