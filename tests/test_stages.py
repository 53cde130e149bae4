"""The six stages as a user runs them: the whole chain, resume, and everything that can be wrong with their input."""

import dataclasses
import importlib
import itertools
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY, call_stage, run_stage, start_two
from peft import PeftModel

from common import grpo, predictor, rank1
from common.files import adapters, config
from common.files import deltas as delta_files
from common.files import read as inputs
from common.files import series as adapter_series
from common.reproduce import report, results
from common.rl import policy


def metrics(folder: pathlib.Path) -> list[dict]:
    """The metrics of a run without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if "seconds" not in k and k != "tokens_per_second"}
        for row in inputs.read_jsonl(folder / "metrics.jsonl")
    ]


def weights(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("step_*/adapter_model.safetensors"))
    }


@pytest.fixture
def copy(finished_run, tmp_path):
    """A run that a test may spoil."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


# --------------------------------------------------------------------------------------------------
# The chain
# --------------------------------------------------------------------------------------------------


def test_training_leaves_a_checkpoint_and_a_line_of_metrics_a_step(finished_run):
    assert list(adapter_series.find_checkpoints(["{run_dir}/train/step_*"], finished_run)) == list(
        range(1, 9)
    )
    rows = metrics(finished_run / "train")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["response_length"] <= 72
        assert row["logprob_gap_mean"] < 1e-5
        assert row["verifier_errors"] == 0
    assert sorted(p.name for p in (finished_run / "train" / "resume").iterdir()) == [
        "step_0007",
        "step_0008",
    ]
    assert json.loads((finished_run / "train" / "done.json").read_text())["config"]["steps"] == 8


def test_training_changes_the_adapter_and_logs_samples(finished_run):
    one, two = (adapters.read_adapter(finished_run / "train" / f"step_000{i}") for i in (1, 2))
    assert all(not torch.equal(one.factors[m][0], two.factors[m][0]) for m in one.factors)
    samples = inputs.read_jsonl(finished_run / "train" / "samples.jsonl")
    assert {"step", "prompt", "response", "answer", "reward"} == set(samples[0])


def test_extraction_equals_dense_svds_of_the_merged_differences(finished_run):
    trajectory = delta_files.load_trajectory(finished_run / "deltas")
    assert trajectory.steps == [1, 2, 3, 4, 5, 6]
    dense = []
    for step in trajectory.steps:
        adapter = adapters.read_adapter(finished_run / "train" / f"step_{step:04d}")
        dense.append(
            {m: adapter.scale(m) * b.double() @ a.double() for m, (b, a) in adapter.factors.items()}
        )
    assert len(trajectory.deltas) == 21
    for module, roles in trajectory.deltas.items():
        zero = torch.zeros_like(dense[0][module])
        w = [zero, *(point[module] for point in dense)]
        expected = {
            "global": [x - zero for x in w[1:]],
            "local": [b - a for a, b in itertools.pairwise(w)],
            "target": [b - a for a, b in zip(w[1:], w[3:], strict=False)],
        }
        for role, deltas in expected.items():
            assert len(roles[role].sigma) == len(deltas)
            for i, delta in enumerate(deltas):
                sigma = torch.linalg.svdvals(delta)
                assert roles[role].sigma[i].item() == pytest.approx(sigma[0].item(), rel=1e-5)
                along = roles[role].u[i].double() @ delta @ roles[role].v[i].double()
                assert along.item() == pytest.approx(sigma[0].item(), rel=1e-5)


def test_spectrum_holds_what_figures_2_and_3_need(finished_run):
    found = json.loads((finished_run / "deltas" / "spectrum.json").read_text())
    assert len(found["energy_ratio"]) == 6
    assert all(1 / 4 <= e <= 1 for e in found["energy_ratio"])  # rank 4
    assert len(found["linear_fit"]) == 2 * 21
    assert all(row["in_sample"] >= 0 for row in found["linear_fit"])


def test_predictor_reports_its_backtest_beside_controls_and_oracle(finished_run):
    for recipe in ("aligned", "paper"):
        tested = json.loads((finished_run / "predictor" / recipe / "report.json").read_text())[
            "backtest"
        ]
        assert (tested["at_step"], tested["predicts_step"]) == (4, 6)
        assert tested["oracle"]["sigma_error"] < 1e-4
        assert 0 < tested["oracle"]["cosine"] <= 1
        for name in ("predictor", "copy-global", "repeat-last", "linear-fit"):
            assert (
                abs(tested[name]["cosine"]) <= tested["oracle"]["cosine"] + 1e-6
            )  # no rank-1 delta is nearer than the true one's own


def test_ablations_go_through_predictor_jump_and_report(copy, monkeypatch, capsys):
    monkeypatch.setitem(
        predictor.RECIPES, "aligned", dataclasses.replace(predictor.RECIPES["aligned"], epochs=3)
    )

    def stage(script, *flags):
        assert call_stage(
            monkeypatch, capsys, script, "--config", TINY, "--run-dir", str(copy), *flags
        ) == (0, "")

    stage("03_train_predictor.py", "--recipes", "aligned", "--inputs", "local")
    stage("03_train_predictor.py", "--recipes", "aligned", "--checkpoints", "5")
    names = ("aligned-no-global", "aligned-last5")
    stage("04_extrapolate.py", "--methods", "next", "--recipes", *names, "--alphas", "1.5")
    for name in names:  # as if they had been evaluated
        jumped = copy / "eval" / f"extrapolated__next-{name}_alpha1.5"
        shutil.copytree(copy / "eval" / "extrapolated__next-aligned_alpha1.5", jumped)
        edit_json(jumped / "test.json", policy=f"extrapolated/next-{name}_alpha1.5")
    report.write_run(copy)
    text = (copy / "report.md").read_text()
    assert "| NExt, aligned recipe, w/o global delta | 256 |" in text
    assert "| NExt, aligned recipe, last 5 checkpoints | 256 |" in text
    assert "## Table 5: what the jump needs" in text


def test_the_backbone_is_measured_again_when_it_is_another(copy, monkeypatch, capsys):
    """As good as 0.359 it stayed in older code, whatever --backbone said; a model of noise has 0."""
    path = copy / "other" / "model.safetensors"
    shutil.copytree(copy / "backbone", path.parent)
    generator = torch.Generator().manual_seed(0)
    tensors = safetensors.torch.load_file(path)
    noise = {name: torch.randn(t.shape, generator=generator).to(t) for name, t in tensors.items()}
    safetensors.torch.save_file(noise, path, metadata={"format": "pt"})
    (path.parent / "sha256.json").unlink(missing_ok=True)
    before = json.loads((copy / "eval" / "backbone" / "test.json").read_text())["accuracy"]
    flags = [
        "--config",
        TINY,
        "--run-dir",
        str(copy),
        "--policies",
        "backbone",
        "--output",
        "again",
    ]
    for backbone in ("backbone", "other", "backbone"):
        assert (
            call_stage(
                monkeypatch, capsys, "06_eval.py", *flags, "--backbone", str(copy / backbone)
            )[0]
            == 0
        )
        found = json.loads((copy / "again" / "backbone" / "test.json").read_text())
        assert (found["accuracy"] == before, found["accuracy"] == 0) == (
            backbone == "backbone",
            backbone == "other",
        )


def test_extrapolated_adapters_have_one_more_rank_and_load_in_peft(finished_run):
    names = {path.name for path in (finished_run / "extrapolated").iterdir()}
    assert names == {
        f"{m}_alpha{a}"
        for m in (
            "next-aligned",
            "next-paper",
            "weighted",
            "repeat-last",
            "recent-locals",
            "rl-extra",
        )
        for a in ("0.5", "1.5")
    } | {
        "none",
        "oracle_alpha0.5",
        "oracle_alpha1.5",
    }
    for name, rank in (
        ("next-aligned_alpha1.5", 5),
        ("weighted_alpha1.5", 5),
        ("rl-extra_alpha1.5", 4),
        ("none", 4),
    ):
        backbone, _ = policy.load_backbone(str(finished_run / "backbone"))
        model = PeftModel.from_pretrained(backbone, finished_run / "extrapolated" / name)
        assert model.peft_config["default"].r == rank


def test_the_sweep_scales_one_direction(finished_run):
    last, half, whole = (
        adapters.read_adapter(finished_run / path)
        for path in (
            "train/step_0006",
            "extrapolated/next-aligned_alpha0.5",
            "extrapolated/next-aligned_alpha1.5",
        )
    )
    for module, (b, a) in last.factors.items():
        base = last.scale(module) * b @ a
        small, large = (
            x.scale(module) * x.factors[module][0] @ x.factors[module][1] - base
            for x in (half, whole)
        )
        torch.testing.assert_close(3 * small, large, atol=1e-6, rtol=1e-3)
        assert torch.linalg.matrix_rank(large, rtol=1e-3) <= 1


def test_oracle_looks_at_the_run_that_went_on(finished_run):
    last, future = (adapters.read_adapter(finished_run / "train" / f"step_000{i}") for i in (6, 8))
    got = adapters.read_adapter(finished_run / "extrapolated" / "oracle_alpha1.5")
    for module in last.factors:
        now, ahead = (x.update(module).dense() for x in (last, future))
        u, sigma, vh = torch.linalg.svd(ahead - now)
        want = now + 1.5 * sigma[0] * torch.outer(u[:, 0], vh[0])
        torch.testing.assert_close(got.update(module).dense(), want, atol=1e-5, rtol=1e-4)


def test_continuing_counts_steps_on_and_trains_the_jumped_adapter(finished_run):
    folder = finished_run / "continued" / "next-aligned_alpha1.5"
    assert list(adapter_series.find_checkpoints(["{run_dir}/step_*"], folder)) == [7, 8]
    start, end = (
        adapters.read_adapter(finished_run / "extrapolated" / "next-aligned_alpha1.5"),
        adapters.read_adapter(folder / "step_0008"),
    )
    assert end.config["r"] == start.config["r"] == 5
    assert all(end.scale(m) == pytest.approx(start.scale(m)) for m in start.factors)
    drift = max((end.factors[m][0] - start.factors[m][0]).abs().max().item() for m in start.factors)
    assert 0 < drift < 0.1


def test_a_merged_restart_trains_a_new_adapter_on_the_baked_backbone(finished_run):
    folder = finished_run / "continued" / "next-aligned_alpha1.5_merged"
    assert adapters.read_adapter(folder / "step_0008").config["r"] == 4
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    backbone, _ = policy.load_backbone(str(finished_run / "backbone"))
    jumped = policy.load_lora(backbone, finished_run / "extrapolated" / "next-aligned_alpha1.5")
    baked, _ = policy.load_backbone(str(folder / "backbone"))
    assert baked.dtype == torch.float32
    torch.testing.assert_close(
        baked(input_ids=ids).logits, jumped(input_ids=ids).logits, atol=2e-5, rtol=1e-4
    )


def test_evaluation_agrees_with_its_own_responses(finished_run):
    found = results.load_results(finished_run)
    assert len(found) == 3 + 15 + 2
    for name, result in found.items():
        rows = inputs.read_jsonl(finished_run / "eval" / name.replace("/", "__") / "test.jsonl")
        assert len(rows) == result.n == 256
        by_problem = [sum(r["score"] for r in rows if r["problem"] == i) for i in range(256)]
        mean = sum(by_problem) / 256
        assert result.accuracy == pytest.approx(mean)
        assert result.error == pytest.approx(
            (sum((x - mean) ** 2 for x in by_problem) / 255 / 256) ** 0.5
        )
        assert all(row["score"] == 0 for row in rows if not row["finished"])
    assert (
        found["extrapolated/none"].accuracy == found["train/step_0006"].accuracy
    )  # the same weights and seeds


def test_every_checkpoint_and_result_carries_the_hash_of_one_template(finished_run):
    records = [
        *finished_run.glob("*/**/checkpoint.json"),
        *(finished_run / "eval").glob("*/test.json"),
    ]
    assert len(records) > 30
    assert len({json.loads(path.read_text())["template_hash"] for path in records}) == 1
    shown = (finished_run / "printed.txt").read_text()
    assert shown.count("[06] test: 256 problems; first prompt: ") == 1
    assert "another prompt template" not in shown


def test_evaluation_with_another_template_than_trainings_warns(copy, monkeypatch, capsys):
    script = importlib.import_module("06_eval")
    monkeypatch.chdir(ROOT)
    flags = [
        "--policies",
        "train/step_0006",
        "--prompt-template",
        "{prompt}{prompt}",
        "--max-prompt-tokens",
        "32",
    ]
    monkeypatch.setattr(
        sys, "argv", ["06_eval.py", "--config", TINY, "--run-dir", str(copy), *flags]
    )
    script.main()
    assert "train/step_0006 was trained with another prompt template" in capsys.readouterr().out


def test_report_has_the_table_the_claims_and_the_figures(finished_run):
    text = (finished_run / "report.md").read_text()
    assert "| Backbone | 0 |" in text
    assert text.count("![") == 7
    for name in (
        "accuracy",
        "training",
        "fig2_energy_ratio",
        "fig3_linear_fit",
        "predictor_loss",
        "fig5_cost",
        "fig6_alpha",
    ):
        assert (finished_run / "figures" / f"{name}.png").stat().st_size > 10_000
    for claim in ("Fig. 2", "Fig. 3", "Fig. 5", "Table 5: the jump itself gains"):
        assert claim in text.split("Not measured:")[0]
    assert (
        "Fig. 6: the jump gains at every alpha" in text.split("Not measured:")[1]
    )  # of two alphas
    found = results.load_results(finished_run)
    base, last = found["backbone"], found["train/step_0008"]
    row = next(line for line in text.splitlines() if line.startswith("| GRPO with LoRA | 8 |"))
    assert f"{100 * last.accuracy:.1f} ± {100 * last.error:.1f}" in row
    if last.accuracy > base.accuracy:
        assert f"| {8 / (100 * (last.accuracy - base.accuracy)):.1f} |" in row  # ICER


def test_reproduce_goes_on_where_it_was_interrupted_and_skips_what_is_done(finished_run, copy):
    done = copy / "reproduce.json"  # by command lines, which name the run directory
    done.write_text(done.read_text().replace(str(finished_run), str(copy)))
    printed = (copy / "printed.txt").read_text()
    assert "first prompt: '<|user|>" in printed
    assert "done already: prepare\n" in printed
    assert "[01] going on after step" in printed
    assert printed.count("03_train_predictor.py") == 1
    result = subprocess.run(
        [sys.executable, "-m", "common.reproduce", "--preset", TINY, "--run-dir", str(copy)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0
    assert (
        result.stdout.count("$ accelerate") == 1
    )  # the evaluation, which finds everything measured
    assert "| Backbone | 0 |" in result.stdout


# --------------------------------------------------------------------------------------------------
# Again, resumed, by two processes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        "01_train_lora_grpo.py",
        "02_extract_deltas.py",
        "03_train_predictor.py",
        "04_extrapolate.py",
        "05_continue_rl.py",
        "06_eval.py",
    ],
)
def test_a_finished_stage_is_not_done_again(copy, monkeypatch, capsys, script):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    before |= {path: path.stat().st_mtime_ns for path in copy.glob("eval/*/*")}
    assert call_stage(monkeypatch, capsys, script, "--config", TINY, "--run-dir", str(copy)) == (
        0,
        "",
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    finished_run, empty_run, tmp_path, how
):
    folder = tmp_path / "run"
    shutil.copytree(empty_run, folder)
    command = [
        "01_train_lora_grpo.py",
        "--config",
        TINY,
        "--run-dir",
        str(folder),
        "--steps",
        "8",
        "--resume-every",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-u", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(how)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), errors
    assert not (folder / "train" / "done.json").exists()
    again = run_stage(*command)
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stdout
    assert metrics(folder / "train") == metrics(finished_run / "train")
    assert weights(folder / "train") == weights(finished_run / "train")


def test_a_longer_run_is_the_shorter_one_extended(finished_run, empty_run, tmp_path):
    """finished_run trained 6 steps and was then extended to 8; here are 8 in one go."""
    folder = tmp_path / "run"
    shutil.copytree(empty_run, folder)
    assert (
        run_stage(
            "01_train_lora_grpo.py", "--config", TINY, "--run-dir", str(folder), "--steps", "8"
        ).returncode
        == 0
    )
    assert weights(folder / "train") == weights(finished_run / "train")


SEEDED = {  # stage -> flags, the file that must be the same again for the same seed and another for another
    "01_train_lora_grpo.py": (["--steps", "1"], "train/step_0001/adapter_model.safetensors"),
    "03_train_predictor.py": (["--recipes", "aligned"], "predictor/aligned/model.safetensors"),
    "05_continue_rl.py": (
        ["--start", "none", "--more-steps", "1"],
        "continued/none/step_0007/adapter_model.safetensors",
    ),
    "06_eval.py": (
        ["--policies", "train/step_0006", "--output", "again"],
        "again/train__step_0006/test.jsonl",
    ),
}


@pytest.mark.parametrize("script", SEEDED)
def test_the_same_seed_gives_the_same_file_and_another_seed_another(
    copy, monkeypatch, capsys, script
):
    flags, file = SEEDED[script]
    monkeypatch.setitem(
        predictor.RECIPES, "aligned", dataclasses.replace(predictor.RECIPES["aligned"], epochs=3)
    )
    found = []
    for seed in ("0", "0", "1"):
        shutil.rmtree(copy / pathlib.Path(file).parts[0], ignore_errors=script[:2] in ("05", "06"))
        assert (
            call_stage(
                monkeypatch,
                capsys,
                script,
                "--config",
                TINY,
                "--run-dir",
                str(copy),
                *flags,
                "--seed",
                seed,
            )[0]
            == 0
        )
        found.append((copy / file).read_bytes())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("accelerate_config", "flags"),
    [
        ("cpu_processes", ["--algorithm", "reinforce++", "--kl-coef", "0.05", "--kl-in", "reward"]),
        ("fsdp2", []),
    ],
)
def test_two_processes_train_like_one(
    empty_run, tmp_path, monkeypatch, capsys, accelerate_config, flags
):
    one_run, folder = tmp_path / "one", tmp_path / "run"
    for copied in (one_run, folder):
        shutil.copytree(empty_run, copied)
    command = [
        "01_train_lora_grpo.py",
        "--config",
        TINY,
        "--run-dir",
        str(one_run),
        "--steps",
        "2",
        *flags,
    ]
    assert call_stage(monkeypatch, capsys, *command)[0] == 0
    # micro_tokens 200: several micro-batches an update, and not the same number on both processes
    run = start_two(
        command[0],
        folder,
        accelerate_config,
        "--steps",
        "2",
        "--micro-tokens",
        "200",
        "--gradient-checkpointing",
        "true",
        *flags,
    )
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert output.count("2 process(es) on cpu") == 1
    for ours, one in zip(metrics(folder / "train"), metrics(one_run / "train"), strict=True):
        assert ours.keys() == one.keys()
        for key in {
            "accuracy",
            "reward",
            "kl",
            "response_length",
            "loss",
            "entropy",
            "grad_norm",
        } & one.keys():
            assert ours[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5)
    two, single = (adapters.read_adapter(f / "train" / "step_0001") for f in (folder, one_run))
    assert two.factors.keys() == single.factors.keys()
    for module, (b, a) in single.factors.items():
        torch.testing.assert_close(
            two.factors[module][0] @ two.factors[module][1], b @ a, atol=1e-4, rtol=1e-2
        )


def test_two_processes_evaluate_like_one(finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    shutil.rmtree(folder / "eval")
    run = start_two(
        "06_eval.py", folder, "cpu_processes", "--policies", "backbone", "train/step_0006"
    )
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert output.count("2 processes") == 1
    for policy_name in ("backbone", "train__step_0006"):
        two, one = (
            inputs.read_json(f / "eval" / policy_name / "test.json", "06")
            for f in (folder, finished_run)
        )
        assert {**two, "seconds": None} == {**one, "seconds": None}
        assert (folder / "eval" / policy_name / "test.jsonl").read_text() == (
            finished_run / "eval" / policy_name / "test.jsonl"
        ).read_text()


def test_two_processes_extract_what_one_does(finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    shutil.rmtree(folder / "deltas")
    output, _ = (run := start_two("02_extract_deltas.py", folder, "cpu_processes")).communicate(
        timeout=300
    )
    assert run.returncode == 0, output
    same_deltas(folder, finished_run)


def same_deltas(one, other):
    """Both runs have the same files of deltas, byte for byte, but for done.json, which has times."""
    found = [
        {
            p.name: p.read_bytes()
            for p in (run / "deltas").iterdir()
            if p.name[0] != "." and p.name != "done.json"
        }
        for run in (one, other)
    ]
    assert len(found[0]) == 21 + 3
    assert found[0] == found[1]


def test_an_interrupted_extraction_goes_on_at_the_matrix_it_was_at(
    finished_run, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    shutil.rmtree(folder / "deltas")
    done, real = [], rank1.trajectory

    def counted(*args):
        done.append(args)
        if len(done) == 12:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(rank1, "trajectory", counted)
    assert (
        call_stage(
            monkeypatch, capsys, "02_extract_deltas.py", "--config", TINY, "--run-dir", str(folder)
        )[0]
        == 130
    )
    there = len([*(folder / "deltas").glob("*.safetensors")])
    assert 0 < there < 12
    done.clear()
    monkeypatch.setattr(rank1, "trajectory", lambda *args: done.append(args) or real(*args))
    assert (
        call_stage(
            monkeypatch, capsys, "02_extract_deltas.py", "--config", TINY, "--run-dir", str(folder)
        )[0]
        == 0
    )
    assert len(done) == 21 - there
    same_deltas(folder, finished_run)


def test_a_failing_process_brings_all_down_with_its_own_error(empty_run, tmp_path):
    """The second of two processes finds its verifier gone in step 2, while the first waits for it in a reduction."""
    folder, script = tmp_path / "run", tmp_path / "spoilt.py"
    shutil.copytree(empty_run, folder)
    script.write_text(
        f"""import importlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
from common import UserError
from common.files import stage
from common.rl import verifier
score = verifier.Verifier.score
def spoilt(self, *args):
    self.calls = getattr(self, "calls", 0) + 1
    if self.calls == 2 and os.environ["RANK"] == "1":
        raise UserError("the verifier of process 1 is gone")
    return score(self, *args)
verifier.Verifier.score = spoilt
stage.run_stage(importlib.import_module("01_train_lora_grpo").main)
"""
    )
    run = start_two(str(script), folder, "cpu_processes")
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "error: the verifier of process 1 is gone" in output
    assert [line["step"] for line in metrics(folder / "train")] == [1]


def test_another_config_does_not_overwrite_a_run(copy, monkeypatch, capsys):
    code, message = call_stage(
        monkeypatch,
        capsys,
        "01_train_lora_grpo.py",
        "--config",
        TINY,
        "--run-dir",
        str(copy),
        "--learning-rate",
        "0.5",
    )
    assert code == 2
    assert "was made with option learning_rate = 0.001, now it is 0.5" in message


# --------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("02_extract_deltas.py", "run 01_train_lora_grpo.py first"),
        ("03_train_predictor.py", "run 02_extract_deltas.py first"),
        ("04_extrapolate.py", "run 02_extract_deltas.py first"),
        ("05_continue_rl.py", "run 04_extrapolate.py first"),
        ("06_eval.py", "no policy matches"),
    ],
)
def test_a_stage_before_its_input_names_the_stage_to_run(
    empty_run, monkeypatch, capsys, script, message
):
    code, line = call_stage(
        monkeypatch,
        capsys,
        script,
        "--config",
        TINY,
        "--run-dir",
        str(empty_run),
        *(["--policies", "train/*"] if script.startswith("06") else []),
    )
    assert code == 2
    assert line.startswith("error: ")
    assert message in line


def test_an_error_is_one_line_without_a_traceback_and_exit_code_2(tmp_path):
    result = run_stage("02_extract_deltas.py", "--run-dir", str(tmp_path / "nowhere"))
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "Traceback" not in result.stderr + result.stdout


def truncate(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_tensor(path: pathlib.Path) -> None:
    tensors = safetensors.torch.load_file(path)
    tensors[sorted(tensors)[0]][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, path)
    edit_json(path.with_name("sha256.json"), **{path.name: inputs.sha256(path)})


def edit_json(path: pathlib.Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (path.parent / "sha256.json").unlink(missing_ok=True)  # as others' folders, which have none


BAD = {
    "truncated checkpoint": ("02_extract_deltas.py", lambda run: truncate(run / "train/step_0003/adapter_model.safetensors"), [], "step_0003/adapter_model.safetensors is broken"),
    "checkpoint without weights": ("02_extract_deltas.py", lambda run: (run / "train/step_0003/adapter_model.safetensors").unlink(), [], "step_0003/adapter_model.safetensors is missing"),
    "a gap in the series": ("02_extract_deltas.py", lambda run: shutil.rmtree(run / "train/step_0003"), ["--fit-checkpoints", "3"], "not evenly spaced: [1, 2, 4, 5, 6]"),
    "half-written config": ("02_extract_deltas.py", lambda run: truncate(run / "train/step_0003/adapter_config.json"), [], "step_0003/adapter_config.json is not valid JSON"),
    "another backbone in the series": ("02_extract_deltas.py", lambda run: edit_json(run / "train/step_0003/checkpoint.json", backbone_fingerprint="0"), [], "step_0003 differs in its backbone from"),
    "other scale in the series": ("02_extract_deltas.py", lambda run: edit_json(run / "train/step_0003/adapter_config.json", lora_alpha=9), [], "step_0003 differs in its scales from"),
    "other formula for the scale": ("02_extract_deltas.py", lambda run: edit_json(run / "train/step_0003/adapter_config.json", use_rslora=True), [], "step_0003 differs in its scales from"),
    "ranks that are not the config's": ("02_extract_deltas.py", lambda run: edit_json(run / "train/step_0003/adapter_config.json", r=9), [], "its config says rank 9"),
    "not a LoRA": ("02_extract_deltas.py", lambda run: edit_json(run / "train/step_0003/adapter_config.json", use_dora=True), [], "not a plain LoRA (use_dora)"),
    "not a LoRA of any kind": ("02_extract_deltas.py", lambda run: edit_json(run / "train/step_0003/adapter_config.json", peft_type="LOHA"), [], "not a plain LoRA (peft_type LOHA)"),
    "a backbone changed at the start": ("02_extract_deltas.py", lambda run: edit_json(run / "train/step_0003/adapter_config.json", init_lora_weights="pissa_niter_4"), [], "pissa_niter_4, which changes the backbone"),
    "a folder that is no adapter": ("02_extract_deltas.py", lambda run: (run / "train/step_0003/adapter_config.json").unlink(), [], "step_0003 has no adapter_config.json"),
    "two checkpoints of one step": ("02_extract_deltas.py", lambda run: shutil.copytree(run / "train/step_0003", run / "train/step_3"), [], "both are of step 3"),
    "nothing where it looks": ("02_extract_deltas.py", None, ["--checkpoints", "nowhere/checkpoint-*"], "no folder matches nowhere/checkpoint-*"),
    "pickled weights": ("02_extract_deltas.py", lambda run: (run / "train/step_0003/adapter_model.safetensors").rename(run / "train/step_0003/adapter_model.bin"), [], "a pickle"),
    "too few checkpoints for k": ("02_extract_deltas.py", None, ["--k", "5"], "6 checkpoints allow k from 1 to 4"),
    "last step not reached": ("02_extract_deltas.py", None, ["--last-step", "20"], "has no step 20"),
    "no room to score the fit": ("02_extract_deltas.py", None, ["--fit-checkpoints", "5"], "fit_checkpoints"),
    "truncated deltas": ("03_train_predictor.py", lambda run: truncate(next((run / "deltas").glob("*q_proj.safetensors"))), [], "q_proj.safetensors is not as it was written"),
    "unknown recipe": ("03_train_predictor.py", None, ["--recipes", "papre"], "did you mean paper?"),
    "impossible holdout": ("03_train_predictor.py", None, ["--holdout", "1"], "holdout must be 2 to 3 with k = 2, not 1"),
    "too few checkpoints to learn from": ("03_train_predictor.py", None, ["--checkpoints", "2"], "checkpoints must be 3 to 6 with k = 2"),
    "unknown predictor": ("04_extrapolate.py", None, ["--recipes", "alinged-last5"], "predictor/alinged-last5/done.json is missing: run 03_train_predictor.py first"),
    "unknown method": ("04_extrapolate.py", None, ["--methods", "nxt"], "did you mean next?"),
    "a checkpoint that diverged": ("02_extract_deltas.py", lambda run: spoil_tensor(run / "train/step_0003/adapter_model.safetensors"), [], "is not finite: the training diverged"),
    "a predictor of other deltas": ("04_extrapolate.py", lambda run: edit_json(run / "predictor/aligned/done.json", inputs={"deltas": "0"}), ["--recipes", "aligned"], "trained on other deltas"),
    "truncated predictor": ("04_extrapolate.py", lambda run: truncate(run / "predictor/aligned/predicted.safetensors"), ["--recipes", "aligned"], "predicted.safetensors is not as it was written"),
    "a policy outside the run": ("06_eval.py", None, ["--policies", "/elsewhere/adapter"], "policies are named as they stand in"),
    "predictor not trained": ("04_extrapolate.py", lambda run: shutil.rmtree(run / "predictor/paper"), [], "run 03_train_predictor.py first"),
    "oracle without a future": ("04_extrapolate.py", lambda run: shutil.rmtree(run / "train/step_0008"), ["--methods", "oracle"], "oracle needs"),
    "unknown start": ("05_continue_rl.py", None, ["--start", "magic"], "magic not found: run 04_extrapolate.py first (there: "),
    "another backbone below the adapter": ("05_continue_rl.py", lambda run: edit_json(run / "extrapolated/none/checkpoint.json", backbone_fingerprint="0"), ["--start", "none"], "trained on another backbone"),
    "truncated jumped adapter": ("05_continue_rl.py", lambda run: truncate(run / "extrapolated/none/adapter_model.safetensors"), ["--start", "none"], "none/adapter_model.safetensors is broken"),
    "truncated adapter to evaluate": ("06_eval.py", lambda run: truncate(run / "train/step_0005/adapter_model.safetensors"), ["--policies", "train/step_0005"], "step_0005/adapter_model.safetensors is broken"),
    "half-written result": ("06_eval.py", lambda run: truncate(run / "eval/backbone/test.json"), [], "eval/backbone/test.json is not valid JSON"),
    "missing test data": ("06_eval.py", lambda run: (run / "data/test.jsonl").unlink(), [], "data/test.jsonl not found"),
    "truncated backbone": ("06_eval.py", lambda run: truncate(run / "backbone/model.safetensors"), ["--seed", "5"], "backbone/model.safetensors is broken"),
    "truncated resume state": ("01_train_lora_grpo.py", lambda run: [truncate(run / f"train/resume/step_000{step}/weights.safetensors") for step in (7, 8)], ["--steps", "9"], "cannot load resume state"),
    "truncated optimizer": ("01_train_lora_grpo.py", lambda run: [truncate(run / f"train/resume/step_000{step}/optimizer.pt") for step in (7, 8)], ["--steps", "9"], "cannot load resume state"),
    "foreign train folder": ("01_train_lora_grpo.py", lambda run: (run / "train/config.json").unlink(), ["--steps", "9"], "has files but no config.json"),
    "changed training data": ("01_train_lora_grpo.py", lambda run: (run / "data/train.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n'), ["--steps", "9"], "input train_data"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_spoilt_run_is_named_and_left_alone(copy, monkeypatch, capsys, name):
    script, spoil, flags, message = BAD[name]
    if spoil:
        spoil(copy)
    if script in ("02_extract_deltas.py", "03_train_predictor.py"):
        shutil.rmtree(copy / ("deltas" if script.startswith("02") else "predictor"))
    if script.startswith("05"):
        shutil.rmtree(copy / "continued")
    kept = weights(copy / "train")
    code, line = call_stage(
        monkeypatch, capsys, script, "--config", TINY, "--run-dir", str(copy), *flags
    )
    assert (code, line[:7]) == (2, "error: "), line
    assert message in line
    assert weights(copy / "train") == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbone", "runs/none"], "backbone folder runs/none not found"),
        (["--max-prompt-tokens", "3"], "nothing but prompts of more than 3 tokens"),
        (["--top-p", "0.9"], "biases the importance ratio"),
        (["--mini-batch", "3"], "must be a multiple of mini_batch"),
        (["--steps", "0"], "steps must be positive"),
        (["--rollouts", "1", "--algorithm", "rloo"], "rollouts must be 2 or more"),
        (["--kl-in", "reward"], "set kl_coef"),
        (["--train-data", "nowhere.jsonl"], "nowhere.jsonl not found"),
        (["--prompt-template", "hello"], "no {prompt}"),
    ],
)
def test_a_bad_training_option_stops_before_training(
    empty_run, tmp_path, monkeypatch, capsys, flags, message
):
    shutil.copytree(empty_run, tmp_path / "run")
    code, line = call_stage(
        monkeypatch,
        capsys,
        "01_train_lora_grpo.py",
        "--config",
        TINY,
        "--run-dir",
        str(tmp_path / "run"),
        *flags,
    )
    assert code == 2
    assert message in line


def test_help_has_each_option_once_and_the_stages_own_come_first(monkeypatch, capsys):
    cls = importlib.import_module("05_continue_rl").ContinueConfig
    with pytest.raises(SystemExit):
        config.parse(cls, "train", "", ["--help"])
    shown = capsys.readouterr().out
    names = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(cls)]
    flags = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    assert sorted(flags) == sorted(names)
    assert {*flags[:5]} == {"--start", "--restart", "--name", "--more-steps", "--steps"}
    assert flags[-1] == "--threads"
    titles = ("Stage 1's options, and where to start:", "Table 2 of the paper", "How responses are")
    places = [shown.index(title) for title in titles]
    assert places == sorted(places)


def test_what_a_preset_must_prepare_first_is_named(tmp_path, monkeypatch, capsys):
    command = ["01_train_lora_grpo.py", "--config", "demo", "--run-dir", str(tmp_path / "new")]
    wanted = f"not found: run python -m common.demo --run-dir {tmp_path}/new first"
    code, line = call_stage(monkeypatch, capsys, *command)
    assert (code, line.endswith(wanted)) == (2, True)
    assert not (tmp_path / "new").exists()


def test_a_problem_without_an_answer_names_file_and_line(empty_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(empty_run, tmp_path / "run")
    path = tmp_path / "run" / "data" / "train.jsonl"
    path.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2"}\n')
    code, line = call_stage(
        monkeypatch,
        capsys,
        "01_train_lora_grpo.py",
        "--config",
        TINY,
        "--run-dir",
        str(tmp_path / "run"),
    )
    assert (code, f"{path}, line 2: no usable 'answer'" in line) == (2, True)


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(
    finished_run, copy, monkeypatch, capsys
):
    """Weights of infinity are put into the resume state: the next step cannot be finite."""
    state = copy / "train" / "resume" / "step_0008" / "weights.safetensors"
    tensors = safetensors.torch.load_file(state)
    safetensors.torch.save_file(
        {
            name: torch.full_like(t, torch.inf) if "lora_B" in name else t
            for name, t in tensors.items()
        },
        state,
    )
    edit_json(state.with_name("sha256.json"), **{state.name: inputs.sha256(state)})
    code, line = call_stage(
        monkeypatch,
        capsys,
        "01_train_lora_grpo.py",
        "--config",
        TINY,
        "--run-dir",
        str(copy),
        "--steps",
        "10",
    )
    assert code == 2
    assert "non-finite loss" in line
    assert "in step 9;" in line
    assert weights(copy / "train") == weights(finished_run / "train")


def nan_gradient(monkeypatch):
    """The first matrix of the adapter gets a gradient of NaN, whatever the loss."""
    add_lora = policy.add_lora

    def spoilt(*args):
        model = add_lora(*args)
        next(p for p in model.parameters() if p.requires_grad).register_hook(
            lambda gradient: gradient * torch.nan
        )
        return model

    monkeypatch.setattr(policy, "add_lora", spoilt)


def infinite_loss(monkeypatch):
    """The loss is infinite, its gradient what it would be."""
    clipped_loss = grpo.clipped_loss
    monkeypatch.setattr(
        grpo,
        "clipped_loss",
        lambda *args: (lambda loss, clipped: (loss + torch.inf, clipped))(*clipped_loss(*args)),
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(nan_gradient, r"loss \(-?\d.*norm nan"), (infinite_loss, r"loss \(inf.*norm \d")],
)
def test_a_loss_or_a_gradient_alone_that_is_not_finite_stops_too(
    finished_run, copy, monkeypatch, capsys, spoil, message
):
    spoil(monkeypatch)
    code, line = call_stage(
        monkeypatch,
        capsys,
        "01_train_lora_grpo.py",
        "--config",
        TINY,
        "--run-dir",
        str(copy),
        "--steps",
        "9",
    )
    assert code == 2
    assert re.search(f"non-finite {message}.* in step 9; the last checkpoint is good", line), line
    assert weights(copy / "train") == weights(finished_run / "train")
    assert metrics(copy / "train") == metrics(finished_run / "train")


CLOCKS = ("time", "monotonic", "perf_counter")


def test_clocks_that_jump_change_nothing(finished_run, empty_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(empty_run, run := tmp_path / "run")
    jumps = itertools.cycle([0, 3 * 86400, -2 * 86400, 86400.5, -86400])
    calls = dict.fromkeys(CLOCKS, 0)

    def jumping(name):
        real = getattr(time, name)

        def clock():
            calls[name] += 1
            return real() + next(jumps)

        return clock

    with monkeypatch.context() as patch:
        for name in CLOCKS:
            patch.setattr(time, name, jumping(name))
        for script in ("01_train_lora_grpo.py", "02_extract_deltas.py"):
            assert (
                call_stage(patch, capsys, script, "--config", TINY, "--run-dir", str(run))[0] == 0
            )
    assert calls["perf_counter"] > 50
    assert metrics(run / "train") == metrics(finished_run / "train")[:6]
    assert weights(run / "train").items() <= weights(finished_run / "train").items()
    same_deltas(run, finished_run)


def test_reproduce_prints_commands_that_can_be_typed_by_hand():
    result = subprocess.run(
        [sys.executable, "-m", "common.reproduce", "--preset", "demo", "--print"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert lines[0] == "python -m common.demo --run-dir runs/demo"
    assert [line.split(".py")[0].split()[-1][:2] for line in lines[1:5]] == ["01", "01", "02", "03"]
    launch = "env ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES= python 0"  # as in the preset
    assert all(
        line.startswith(launch) and "--config demo --run-dir runs/demo" in line
        for line in lines[1:]
    )


@pytest.mark.parametrize("preset", ["paper_qwen2.5_3b", "paper_qwen2.5_7b"])
def test_a_preset_with_a_dot_in_its_name_has_a_run_directory_of_its_own(preset):
    command = [sys.executable, "-m", "common.reproduce", "--preset", preset, "--print"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("--run-dir ")[1].split()[0] for line in printed.splitlines()}
    assert folders == {f"runs/{preset}"}
