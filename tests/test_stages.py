"""The six stages as a user runs them: the whole chain, resume, and what can be wrong with their
input."""

import dataclasses
import importlib
import itertools
import json
import pathlib
import re
import shutil
import statistics
import sys
import time
import types

import pytest
import safetensors.torch
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, SCRIPTS, call_main, edit_json, flip_bit, metrics, start_two, weights

from common import grpo, rank1
from common.files import adapters, config, models
from common.files import read as inputs
from common.files import series as adapter_series
from common.reproduce import __main__ as reproduce
from common.reproduce import figures, report, results, runs
from common.rl import policy, training

# --------------------------------------------------------------------------------------------------
# The chain
# --------------------------------------------------------------------------------------------------


def test_training_leaves_a_checkpoint_and_a_line_of_metrics_a_step(finished_run):
    train = finished_run / "train"
    found = adapter_series.find_checkpoints(["{run_dir}/train/step_*"], finished_run)
    assert list(found) == list(range(1, 9))
    rows = metrics(train)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["response_length"] <= 72
        assert row["verifier_errors"] == 0
    kept = sorted(path.name for path in (train / "resume").iterdir())
    assert kept == ["step_0007", "step_0008"]
    assert json.loads((train / "done.json").read_text())["config"]["steps"] == 8


def test_training_changes_the_adapter_and_logs_samples(finished_run):
    one, two = (adapters.read_adapter(finished_run / "train" / f"step_000{i}") for i in (1, 2))
    assert all(not torch.equal(one.factors[m][0], two.factors[m][0]) for m in one.factors)
    samples = inputs.read_jsonl(finished_run / "train" / "samples.jsonl")
    assert {"step", "prompt", "response", "answer", "reward"} == set(samples[0])


def test_spectrum_holds_what_figures_2_and_3_need(finished_run):
    found = json.loads((finished_run / "deltas" / "spectrum.json").read_text())
    assert len(found["energy_ratio"]) == 6
    assert all(1 / 4 <= e <= 1 for e in found["energy_ratio"])  # rank 4
    assert len(found["linear_fit"]) == 2 * 21
    assert all(row["in_sample"] >= 0 for row in found["linear_fit"])


def test_ablations_go_through_predictor_jump_and_report(run, stage):
    fast = ("--recipes", "aligned", "--epochs", "3")
    assert stage("03", run, *fast, "--inputs", "local") == (0, "")
    assert stage("03", run, *fast, "--checkpoints", "5") == (0, "")
    names = ("aligned-no-global", "aligned-last5")
    flags = ("--methods", "next", "--recipes", *names, "--alphas", "1.5")
    assert stage("04", run, *flags) == (0, "")
    for name in names:  # as if they had been evaluated
        jumped = run / "eval" / f"extrapolated__next-{name}_alpha1.5"
        shutil.copytree(run / "eval" / "extrapolated__next-aligned_alpha1.5", jumped)
        edit_json(jumped / "test.json", policy=f"extrapolated/next-{name}_alpha1.5")
    report.write_run(run)
    text = (run / "report.md").read_text()
    assert "| NExt (aligned), w/o global delta | 1.5 | 256 |" in text
    assert "| NExt (aligned), last 5 checkpoints | 1.5 | 256 |" in text
    assert "## Table 5: what the jump needs" in text


def test_every_run_answers_anew_and_the_error_is_over_problems(run, stage):
    flags = ("--policies", "train/step_0006", "--runs", "2", "--output", "again")
    assert stage("06", run, *flags)[0] == 0
    folder = run / "again" / "train__step_0006"
    rows = inputs.read_jsonl(folder / "test.jsonl")
    one, two = ([r["response"] for r in rows if r["run"] == number] for number in (0, 1))
    assert len(one) == len(two) == 256
    assert one != two
    means = [sum(r["score"] for r in rows if r["problem"] == i) / 2 for i in range(256)]
    found = json.loads((folder / "test.json").read_text())
    assert found["by_problem"] == means
    assert found["standard_error"] == pytest.approx(statistics.stdev(means) / 16)


def test_a_long_gradient_is_clipped_and_logged_as_it_was():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    place = types.SimpleNamespace(num_processes=1, reduce=lambda x, how: x, device="cpu")
    cfg, sgd = types.SimpleNamespace(max_grad_norm=1.0), torch.optim.SGD([weight], 1.0)
    run = types.SimpleNamespace(optimizer=sgd, accelerator=place, model=None, cfg=cfg)
    found = training.descend(run, 1, [(0.5, 0.25), (0.5, 0.0)])
    assert found == {"loss": 1.0, "clip_share": 0.25, "grad_norm": 5.0}
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


def test_what_has_no_gradient_here_gets_that_of_the_other_process():
    both = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    both[0].grad = torch.tensor([0.25])
    reduce = lambda x, how: x + (0.5 if x.shape == (1,) else 0)  # noqa: E731
    place = types.SimpleNamespace(num_processes=2, reduce=reduce, device="cpu")
    cfg, sgd = types.SimpleNamespace(max_grad_norm=9.0), torch.optim.SGD(both, 1.0)
    run = types.SimpleNamespace(optimizer=sgd, accelerator=place, model=None, cfg=cfg)
    training.descend(run, 1, [(0.5, 0.0)])
    assert [p.item() for p in both] == [-0.75, -0.5]


def test_with_seq_every_response_of_all_processes_counts_the_same():
    others = torch.tensor([90.0, 3.0])  # another process has 90 tokens in 3 responses
    place = types.SimpleNamespace(reduce=lambda x, how: x + others, device="cpu")
    cfg = types.SimpleNamespace(loss_aggregation="seq")
    run = types.SimpleNamespace(accelerator=place, cfg=cfg)
    batch = types.SimpleNamespace(completions=[[0], [0] * 4])
    found = training.token_weights(run, batch, [0, 1])
    assert [w.sum().item() for w in found.values()] == pytest.approx([0.2, 0.2])


def test_continuing_counts_steps_on_and_trains_the_jumped_adapter(finished_run):
    name = "next-aligned_alpha1.5"
    folder = finished_run / "continued" / name
    assert list(adapter_series.find_checkpoints(["{run_dir}/step_*"], folder)) == [7, 8]
    jump = finished_run / "extrapolated" / name
    start, end = map(adapters.read_adapter, (jump, folder / "step_0008"))
    assert end.config["r"] == start.config["r"] == 5
    assert all(end.scale(m) == pytest.approx(start.scale(m)) for m in start.factors)
    drift = max((end.factors[m][0] - start.factors[m][0]).abs().max() for m in start.factors)
    assert 0 < drift < 0.1


def test_a_merged_restart_trains_a_new_adapter_on_the_baked_backbone(finished_run):
    folder = finished_run / "continued" / "next-aligned_alpha1.5_merged"
    assert adapters.read_adapter(folder / "step_0008").config["r"] == 4
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    backbone, _ = policy.load_backbone(str(finished_run / "backbone"))
    jumped = policy.load_lora(backbone, finished_run / "extrapolated" / "next-aligned_alpha1.5")
    baked, _ = policy.load_backbone(str(folder / "backbone"))
    assert baked.dtype == torch.float32
    logits = [model(input_ids=ids).logits for model in (baked, jumped)]
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)


def test_evaluation_agrees_with_its_own_responses(finished_run):
    found = results.load_results(finished_run)
    assert len(found) == 3 + 15 + 2
    for name, result in found.items():
        rows = inputs.read_jsonl(finished_run / "eval" / name.replace("/", "__") / "test.jsonl")
        assert len(rows) == result.n == 256
        by_problem = [sum(r["score"] for r in rows if r["problem"] == i) for i in range(256)]
        mean = sum(by_problem) / 256
        assert result.accuracy == pytest.approx(mean)
        error = (sum((x - mean) ** 2 for x in by_problem) / 255 / 256) ** 0.5
        assert result.error == pytest.approx(error)
        assert all(row["score"] == 0 for row in rows if not row["finished"])
    # The same weights and seeds.
    assert found["extrapolated/none"].accuracy == found["train/step_0006"].accuracy


def test_every_checkpoint_and_result_carries_the_hash_of_one_template(finished_run):
    records = [*finished_run.glob("*/**/checkpoint.json"), *finished_run.glob("eval/*/test.json")]
    assert len(records) > 30
    assert len({json.loads(path.read_text())["template_hash"] for path in records}) == 1
    shown = (finished_run / "printed.txt").read_text()
    assert shown.count("[06] test: 256 problems; first prompt: ") == 1
    assert "another prompt template" not in shown


def test_another_trainers_checkpoints_are_measured_where_they_lie(run, stage, tmp_path):
    checkpoint = shutil.copytree(run / "train" / "step_0006", tmp_path / "out" / "checkpoint-60")
    (checkpoint / "checkpoint.json").unlink()
    (checkpoint / "sha256.json").unlink()
    shutil.copytree(checkpoint, tmp_path / "out" / "jumped")
    after, whole = (shutil.copytree(x, tmp_path / x.name) for x in (checkpoint, run / "backbone"))
    flags = ["--backbone", str(run / "backbone"), "--policies", "backbone", "jumped"]
    flags += [f"after={after}", f"checkpoint-90={after}", f"whole={whole}"]
    flags += ["checkpoint-*", "--test-data", str(run / "data" / "test.jsonl")]
    assert stage("06", tmp_path / "out", *flags)[0] == 0
    folders = run / "eval" / "train__step_0006", tmp_path / "out" / "eval" / "checkpoint-60"
    records = (json.loads((folder / "test.json").read_text()) for folder in folders)
    ours, theirs = (record["by_problem"] for record in records)
    assert theirs == ours
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| Backbone | 0 | – | 256 |" in page
    assert "| another trainer's RL | 60 | – | 256 |" in page
    assert "| jumped | – | – | 256 |" in page
    assert "| another trainer's RL | 90 | – | 256 |" in page  # elsewhere, with a step in its name
    assert page.count("| after | – | – | 256 |") == page.count("| whole | – | – | 256 |") == 1
    for name, equal in (("after", "checkpoint-60"), ("whole", "backbone")):
        folders = (tmp_path / "out" / "eval" / one / "test.json" for one in (name, equal))
        ours, theirs = (json.loads(path.read_text())["by_problem"] for path in folders)
        assert ours == theirs
    code, line = stage("06", tmp_path / "out", *flags, "--policies", f"merged={after}")
    assert (code, "merged is a folder of ours, rename it" in line) == (2, True)
    assert stage("06", tmp_path / "new", *flags, "--policies", f"after={after}") == (0, "")
    code, line = stage("06", tmp_path / "out", *flags, "--policies", f"after={tmp_path}")
    assert (code, "no adapter of PEFT's and no model is there" in line) == (2, True)


def test_evaluation_with_another_template_than_trainings_warns(run, capsys):
    flags = ["--policies", "train/step_0006", "--prompt-template", "{prompt}{prompt}"]
    flags += ["--config", "tests/tiny.yaml", "--run-dir", str(run), "--max-prompt-tokens", "32"]
    call_main("06", *flags, "--output", "again")  # without a report
    assert "train/step_0006 was trained with another prompt template" in capsys.readouterr().out


def test_report_has_the_table_the_claims_and_the_figures(finished_run):
    text = (finished_run / "report.md").read_text()
    assert "| Backbone | 0 |" in text
    assert text.count("![") == 7
    names = (
        "accuracy training fig2_energy_ratio fig3_linear_fit predictor_loss fig5_cost fig6_alpha"
    )
    for name in names.split():
        assert (finished_run / "figures" / f"{name}.png").stat().st_size > 10_000
    measured, left_out = text.split("Not measured:")
    for claim in ("Fig. 2", "Fig. 3", "Fig. 5", "Table 5: the jump itself gains"):
        assert claim in measured
    assert "Fig. 6: the jump gains at every alpha" in left_out  # of two alphas
    found = results.load_results(finished_run)
    base, last = found["backbone"], found["train/step_0008"]
    row = next(line for line in text.splitlines() if line.startswith("| GRPO with LoRA | 8 |"))
    assert f"{100 * last.accuracy:.1f} ± {100 * last.error:.1f}" in row
    if last.accuracy > base.accuracy:
        assert f"| {8 / (100 * (last.accuracy - base.accuracy)):.1f} |" in row  # ICER


def test_reproduce_goes_on_where_it_was_interrupted_and_skips_what_is_done(finished_run):
    printed = (finished_run / "printed.txt").read_text()
    assert "first prompt: '<|user|>" in printed
    assert not re.search(r"RL steps.*, into ", printed)  # on stderr
    assert "done already: prepare\n" in printed
    assert re.search(r"step 6/6 .* 00:00 left", printed)
    assert "[01] going on after step" in printed
    assert printed.count("03_train_predictor.py") == 1
    assert "| Backbone | 0 |" in printed


def test_what_a_merged_restart_stands_on_is_no_policy(finished_run):
    run = finished_run
    restarted = run / "continued" / "next-aligned_alpha1.5_merged"
    assert (restarted / "backbone").is_dir()
    names = models.find_policies(run, ["continued/*/*"])
    assert "continued/next-aligned_alpha1.5_merged/step_0007" in names
    assert not [name for name in names if name.endswith("backbone")]
    named = str(restarted.relative_to(run) / "backbone")
    assert [*models.find_policies(run, [named])] == [named]


def test_prompts_that_are_too_long_are_left_out_and_counted(new_run, stage):
    path = new_run / "data" / "mixed.jsonl"
    rows = [{"prompt": "1+2", "answer": "3"}, {"prompt": "12345+48967", "answer": "61312"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limit = ("--max-prompt-tokens", "8")
    assert stage("01", new_run, "--train-data", str(path), "--steps", "1", *limit)[0] == 0
    saved = new_run / "train" / "step_0001" / "checkpoint.json"
    assert json.loads(saved.read_text())["left_out"] == 1
    flags = ("--test-data", str(path), "--policies", "backbone", "--output", "again", *limit)
    assert stage("06", new_run, *flags)[0] == 0
    record = json.loads((new_run / "again" / "backbone" / "mixed.json").read_text())
    assert (record["problems"], record["left_out"]) == (1, 1)


# --------------------------------------------------------------------------------------------------
# Again, resumed, by two processes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_stage_is_not_done_again(run, stage, script, monkeypatch):
    monkeypatch.setattr(report, "write_run", str)  # which takes seconds
    files = [*run.rglob("*.safetensors"), *run.glob("eval/*/*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert stage(script, run) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_one_go_under_clocks_that_jump_equals_an_interrupted_and_longer_run(
    finished_run, new_run, stage, monkeypatch
):
    """Bit for bit: finished_run was stopped by Ctrl-C in step 3, went on to 6, then on to 8."""
    jumps, calls = itertools.cycle([0, 3 * 86400, -2 * 86400, 86400.5, -86400]), []

    def jumping(real):
        return lambda: calls.append(real) or real() + next(jumps)

    with monkeypatch.context() as patch:
        for name in ("time", "monotonic", "perf_counter"):
            patch.setattr(time, name, jumping(getattr(time, name)))
        assert stage("01", new_run, "--steps", "8")[0] == 0
        assert stage("02", new_run)[0] == 0
    assert len(calls) > 50
    assert metrics(new_run / "train") == metrics(finished_run / "train")
    assert weights(new_run / "train") == weights(finished_run / "train")
    same_deltas(new_run, finished_run)


def same_deltas(one: pathlib.Path, other: pathlib.Path) -> None:
    """Byte for byte, but for done.json, which has times."""
    found = [
        {p.name: p.read_bytes() for p in (run / "deltas").iterdir() if p.name != "done.json"}
        for run in (one, other)
    ]
    assert len(found[0]) == 21 + 3
    assert found[0] == found[1]


JUMPED = "next-aligned_alpha1.5"
SEEDED = {  # stage -> flags, a file that another seed makes otherwise
    "01": ("--seed 0 --steps 1", "train/step_0001/adapter_model.safetensors"),
    "03": ("--seed 1 --recipes aligned", "predictor/aligned/model.safetensors"),
    "05": ("--seed 0 --more-steps 1", f"continued/{JUMPED}/step_0007/adapter_model.safetensors"),
    "06": ("--seed 0 --policies train/step_0006", "eval/train__step_0006/test.jsonl"),
}


def test_fig_6_has_every_alpha_at_its_own_place(finished_run):
    lines = figures.alpha_sweep(runs.Runs(finished_run)).axes[0].lines
    jumps = [line for line in lines if len(line.get_xdata()) == 2 and line.get_marker() != "None"]
    assert len(jumps) > 3
    assert {tuple(line.get_xdata()) for line in jumps} == {(0.5, 1.5)}


@pytest.mark.parametrize("script", SEEDED)
def test_another_seed_gives_another_file(finished_run, run, stage, script, monkeypatch):
    monkeypatch.setattr(report, "write_run", str)  # which takes seconds
    flags, file = SEEDED[script]
    shutil.rmtree(run / pathlib.Path(file).parts[0])
    assert stage(script, run, *flags.split())[0] == 0
    assert (run / file).read_bytes() != (finished_run / file).read_bytes()


def test_one_process_on_a_cpu_is_what_the_launcher_reads():
    found = load_config_from_file(str(ROOT / "common" / "accelerate" / "cpu.yaml"))
    assert (found.use_cpu, found.num_processes) == (True, 1)


# Several micro-batches an update, and not the same number on both processes.
TWO = ("--micro-tokens", "200", "--gradient-checkpointing", "true", "--steps", "2")
LORA = ("--algorithm", "reinforce++", "--kl-coef", "0.05", "--kl-in", "reward")
FULL = ("--tune", "full", "--learning-rate", "1e-4")
EVALUATED = ("backbone", "train/step_0006")
IN_TURN = """
import runpy, sys
import accelerate, torch
sys.path.insert(0, {root!r})
accelerate.Accelerator.end_training = lambda self: None  # the next stage needs the processes
where = sys.argv[1:3]
from common.files import resume
for script, run, *flags in {commands!r}:
    resume.FILE = 10**5 if run.endswith("again") else resume.FILE  # bytes: many files
    sys.argv = [script, *where, "--run-dir", run, *flags]
    runpy.run_path(script, run_name="__main__")
backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
print("they wait", backend.options._timeout)
"""
FAILING = """
from common import UserError
from common.rl import verifier
score, calls = verifier.Verifier.score, []
def spoilt(self, *args):
    calls.append(args)
    if len(calls) == 2 and not accelerate.PartialState().is_main_process:
        raise UserError("the verifier of process 1 is gone")
    return score(self, *args)
verifier.Verifier.score = spoilt
sys.argv = [{script!r}, *where, "--run-dir", {run!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def by_two(finished_run, empty_run, tmp_path_factory) -> pathlib.Path:
    """What two processes make: lora/ and full/ are trained, run/ has deltas, a predictor, results;
    in step 2 of failed/ the second process fails while the first waits for it in a reduction.

    One stage after another, as two processes take seconds to start.
    """
    folder, names = tmp_path_factory.mktemp("two"), ("lora", "full", "failed")
    lora, full, failed = (shutil.copytree(empty_run, folder / name) for name in names)
    run = shutil.copytree(finished_run, folder / "run")
    for name in ("deltas", "predictor/aligned", "eval"):
        shutil.rmtree(run / name)
    typed = [("01", lora, *LORA, *TWO), ("02", run), ("03", run)]
    typed += [("06", run, "--policies", *EVALUATED), ("01", full, *FULL, *TWO)]
    commands = [(SCRIPTS[number], str(place), *flags) for number, place, *flags in typed]
    lines = IN_TURN.format(root=str(ROOT), commands=commands)
    lines += FAILING.format(script=SCRIPTS["01"], run=str(failed))
    (folder / "in_turn.py").write_text(lines)
    process = start_two(str(folder / "in_turn.py"), run, "cpu_processes")
    output, _ = process.communicate(timeout=420)
    assert process.returncode not in (0, None), output
    assert "error: the verifier of process 1 is gone" in output
    assert output.count("2 process(es) on cpu") == 3
    assert output.count("2 process(es)\n") == 1
    assert output.count("they wait 1 day") == 2  # while the first writes a large model
    return folder


def assert_metrics_are_close(train: pathlib.Path, one: pathlib.Path) -> None:
    """To float tolerance: two processes add up in another order."""
    keys = {"accuracy", "reward", "kl", "response_length", "loss", "entropy", "grad_norm"}
    for ours, wanted in zip(metrics(train), metrics(one)[:2], strict=True):
        assert ours.keys() == wanted.keys()
        for key in keys & wanted.keys():
            assert ours[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5)


def assert_adapters_are_close(train: pathlib.Path, one: pathlib.Path) -> None:
    two, single = (adapters.read_adapter(folder / "step_0001") for folder in (train, one))
    assert two.factors.keys() == single.factors.keys()
    for module in single.factors:
        found, wanted = (x.update(module).dense() for x in (two, single))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize(("name", "flags"), [("lora", LORA), ("full", FULL)])
def test_two_processes_train_like_one(by_two, new_run, stage, name, flags):
    assert stage("01", new_run, *flags, "--steps", "2")[0] == 0
    assert_metrics_are_close(by_two / name / "train", new_run / "train")
    if name == "lora":
        assert_adapters_are_close(by_two / name / "train", new_run / "train")


@pytest.fixture(scope="module")
def by_two_sharded(empty_run, tmp_path_factory) -> pathlib.Path:
    """lora/ and full/ as in `by_two`, with sharded layers; again/ is full/ in two goes and in many
    files. The last two begin with a model in bf16 with a head of its own, which is sharded too."""
    folder = tmp_path_factory.mktemp("sharded")
    model, tokenizer = policy.load_backbone(str(empty_run / "backbone"))
    model.config.tie_word_embeddings, ends = False, model.get_input_embeddings()
    model.lm_head.weight = torch.nn.Parameter(1.1 * ends.weight.detach())
    policy.save(model.bfloat16(), tokenizer, folder / "untied")
    whole = (*FULL, *TWO, "--kl-coef", "0.05", "--backbone", str(folder / "untied"))
    commands = [("lora", *TWO), ("full", *whole), ("again", *whole, "--steps", "1")]
    commands.append(("again", *whole))
    for name in ("lora", "full", "again"):
        shutil.copytree(empty_run, folder / name)
    commands = [(SCRIPTS["01"], str(folder / name), *flags) for name, *flags in commands]
    (folder / "in_turn.py").write_text(IN_TURN.format(root=str(ROOT), commands=commands))
    process = start_two(str(folder / "in_turn.py"), folder / "lora", "fsdp2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("going on after step 1") == 1
    return folder


def test_two_sharded_processes_train_a_lora_like_one(by_two_sharded, finished_run):
    assert_metrics_are_close(by_two_sharded / "lora" / "train", finished_run / "train")
    assert_adapters_are_close(by_two_sharded / "lora" / "train", finished_run / "train")


def test_two_sharded_processes_train_a_whole_model_like_one(by_two_sharded, new_run, stage):
    flags = (*FULL, "--kl-coef", "0.05", "--backbone", str(by_two_sharded / "untied"))
    assert stage("01", new_run, *flags, "--steps", "2")[0] == 0
    train = by_two_sharded / "full" / "train"
    assert_metrics_are_close(train, new_run / "train")
    found, wanted = (t / "step_0002" / "model.safetensors" for t in (train, new_run / "train"))
    found, wanted = map(safetensors.torch.load_file, (found, wanted))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=5e-6, rtol=1e-3)


def test_a_sharded_training_goes_on_to_the_bit_and_one_process_can_go_on_with_it(
    by_two_sharded, stage
):
    whole, again = (by_two_sharded / name / "train" for name in ("full", "again"))
    for name in ("step_0002", "resume/step_0002"):
        one, many = (sorted((t / name).glob("*.safetensors")) for t in (whole, again))
        assert len(one) == 1 < len(many)
        parts = {k: v for path in many for k, v in safetensors.torch.load_file(path).items()}
        for key, tensor in safetensors.torch.load_file(one[0]).items():
            assert torch.equal(parts.pop(key), tensor)
        assert not parts
    one, many = (models.open_model(t / "step_0002") for t in (whole, again))
    assert (one.shapes, one.dtypes, one.config) == (many.shapes, many.dtypes, many.config)
    flags = (*FULL, "--kl-coef", "0.05", "--backbone", str(by_two_sharded / "untied"))
    flags += ("--micro-tokens", "200")
    assert stage("01", by_two_sharded / "again", *flags, "--steps", "3")[0] == 0
    assert [row["step"] for row in metrics(again)] == [1, 2, 3]


def test_two_processes_extract_predict_and_evaluate_what_one_does(by_two, finished_run):
    same_deltas(by_two / "run", finished_run)
    runs = (by_two / "run", finished_run)
    two, one = ((r / "predictor/aligned/model.safetensors").read_bytes() for r in runs)
    assert two == one
    for name in EVALUATED:
        two, one = (r / "eval" / name.replace("/", "__") for r in runs)
        ours, wanted = (json.loads((f / "test.json").read_text()) for f in (two, one))
        assert {**ours, "seconds": None} == {**wanted, "seconds": None, "processes": 2}
        assert (two / "test.jsonl").read_text() == (one / "test.jsonl").read_text()


def test_two_processes_lose_no_step_when_one_fails_or_the_launcher_is_stopped(
    finished_run, by_two, stage
):
    run = by_two / "failed"
    assert [line["step"] for line in metrics(run / "train")] == [1]
    process, begun = start_two(SCRIPTS["01"], run, "cpu_processes"), []
    for line in process.stdout:
        begun.append(line)
        if line.startswith("step 2/6"):
            break
    assert "going on after step 1\n" in begun
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "stopped: type the same command without --overwrite" in output
    assert not (run / "train" / "done.json").exists()

    assert stage("01", run)[0] == 0  # by one
    assert [row["step"] for row in metrics(run / "train")] == [1, 2, 3, 4, 5, 6]
    assert_adapters_are_close(run / "train", finished_run / "train")


def test_extraction_reads_every_matrix_of_a_checkpoint_once(run, stage, monkeypatch):
    shutil.rmtree(run / "deltas")
    read, real = [], adapters.factors
    monkeypatch.setattr(adapters, "factors", lambda *args: read.append(args) or real(*args))
    assert stage("02", run)[0] == 0
    assert len(read) == 6 * 21


def test_an_interrupted_extraction_goes_on_at_the_matrix_it_was_at(
    finished_run, run, stage, monkeypatch
):
    shutil.rmtree(run / "deltas")
    done, real = [], rank1.trajectory

    def counted(*args):
        done.append(args)
        if len(done) == 12:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(rank1, "trajectory", counted)
    assert stage("02", run)[0] == 130
    there = len([*(run / "deltas").glob("*.safetensors")])
    assert 0 < there < 12
    done.clear()
    monkeypatch.setattr(rank1, "trajectory", lambda *args: done.append(args) or real(*args))
    assert stage("02", run)[0] == 0
    assert len(done) == 21 - there
    same_deltas(run, finished_run)


# --------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("02", "run 01_train_lora_grpo.py first"),
        ("03", "run 02_extract_deltas.py first"),
        ("04", "run 02_extract_deltas.py first"),
        ("05", "run 04_extrapolate.py first"),
        ("06", "no policy matches"),
    ],
)
def test_a_stage_before_its_input_names_the_stage_to_run(empty_run, stage, script, message):
    code, line = stage(script, empty_run, *(["--policies", "train/*"] if script == "06" else []))
    assert (code, line[:7]) == (2, "error: ")
    assert message in line


def cut(*names: str):
    """The files end in the middle."""

    def spoil(run: pathlib.Path) -> None:
        for path in (run / name for name in names):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return spoil


def gone(*names: str):
    def spoil(run: pathlib.Path) -> None:
        for path in (run / name for name in names):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def edited(name: str, **changes):
    return lambda run: edit_json(run / name, **changes)


def flipped(name: str):
    return lambda run: flip_bit(run / name)


def reformatted(run: pathlib.Path) -> None:
    (run / CONFIG).write_text((run / CONFIG).read_text() + " ")


def diverged(run: pathlib.Path) -> None:
    path = run / WEIGHTS
    tensors = safetensors.torch.load_file(path)
    tensors[sorted(tensors)[0]][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, path)
    edit_json(path.with_name("sha256.json"), **{path.name: inputs.sha256(path)})


def again(run: pathlib.Path) -> None:
    shutil.copytree(run / THIRD, run / "train/step_3")


def other_problems(run: pathlib.Path) -> None:
    (run / "data/train.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')


THIRD, SEVENTH = "train/step_0003", "train/step_0007"
WEIGHTS, CONFIG = f"{THIRD}/adapter_model.safetensors", f"{THIRD}/adapter_config.json"
RECORD, FIFTH = f"{THIRD}/checkpoint.json", "train/step_0005/adapter_model.safetensors"
JUMP = "extrapolated/none/adapter_model.safetensors"
STATES = [f"train/resume/step_000{step}/" for step in (7, 8)]
PREDICTED, PAPER = "predictor/aligned/predicted.safetensors", "predictor/paper"
INFO, OTHER = f"{STATES[1]}info.json", {"backbone_fingerprint": "0"}
UP, BACKBONE = "deltas/model.layers.0.mlp.up_proj.safetensors", "backbone/model.safetensors"
MERGED = "continued/next-aligned_alpha1.5_merged"
BAKED, CHANGED = f"{MERGED}/{BACKBONE}", "is not as it was written"
BAD = [  # stage, what is done to the run, flags, what the error says
    ("06", None, "--engine sglang", "--engine"),
    ("06", None, "--vllm-options {gpu}", "vllm_options '{gpu}': want a JSON object"),
    ("01", None, "--learning-rate 0.5", "made with option learning_rate = 0.001, now it is 0.5"),
    ("01", cut(*(s + "state.safetensors" for s in STATES)), "--steps 9", "cannot load resume"),
    ("01", gone("train/config.json"), "--steps 9", "has files but no config.json"),
    ("01", gone("train/resume"), "--steps 9", "has come to step 8, and there is no resume state"),
    # State and log are at step 8; checkpoints are every step.
    ("01", gone("train/done.json", SEVENTH), "--steps 7", "is at step 8, without a step_0007"),
    ("01", edited(INFO, **OTHER), "--steps 9", "begun with backbone_fingerprint = '0', now it is"),
    ("01", flipped(BACKBONE), "--steps 9", "input backbone"),
    ("01", other_problems, "--steps 9", "input train_data"),
    ("02", cut(WEIGHTS), "", f"{WEIGHTS} is broken"),
    ("02", flipped(WEIGHTS), "", f"{WEIGHTS} {CHANGED}"),
    ("02", reformatted, "", f"{CONFIG} {CHANGED}"),
    ("02", gone(WEIGHTS), "", f"{WEIGHTS} is missing"),
    ("02", diverged, "", "is not finite: training diverged"),
    ("02", cut(CONFIG), "", f"{CONFIG} is not valid JSON"),
    ("02", gone(CONFIG), "", f"{THIRD} has no adapter_config.json"),
    ("02", gone(THIRD), "--fit-checkpoints 3", "the backbone: step 3 is missing"),
    ("02", again, "", "both are of step 3"),
    ("02", edited(RECORD, **OTHER), "", "in its backbone from"),
    ("02", None, "--checkpoints nowhere/checkpoint-*", "no folder matches nowhere/checkpoint-*"),
    ("02", None, "--k 5", "6 checkpoints allow k from 1 to 4"),
    ("02", None, "--last-step 20", "has no step 20"),
    ("02", None, "--last-step 3", "3 checkpoints are too few, at least 4 are needed"),
    ("02", None, "--fit-checkpoints 5", "fit_checkpoints"),
    ("03", None, "--recipes papre", "did you mean paper?"),
    ("03", None, "--checkpoints 2", "checkpoints must be 3 to 6 with k = 2"),
    ("03", None, "--inputs target", "inputs must be global, local or both, not target"),
    ("03", flipped(UP), "", f"{UP} {CHANGED}"),
    ("04", gone(PAPER), "", "run 03_train_predictor.py first"),
    ("04", None, "--methods nxt", "did you mean next?"),
    ("04", edited("predictor/aligned/done.json", inputs={"deltas": "0"}), "", "on other deltas"),
    ("04", flipped(PREDICTED), "--methods next --overwrite", f"{PREDICTED} {CHANGED}"),
    ("04", flipped(BACKBONE), "--methods none --merge", f"{BACKBONE} {CHANGED}"),
    ("04", gone("train/step_0008"), "--methods oracle", "oracle needs"),
    ("05", None, "--start magic", "magic not found: run 04_extrapolate.py first (there: "),
    ("05", flipped(JUMP), "", f"{JUMP} {CHANGED}"),
    ("05", None, "--more-steps 0", "more_steps must be positive, not 0"),
    ("06", None, "--policies /elsewhere/adapter", "policies are named as they stand in"),
    ("06", flipped(FIFTH), "--policies train/step_0005", f"{FIFTH} {CHANGED}"),
    ("06", flipped(BAKED), f"--policies {MERGED}/step_0007", f"{BAKED} {CHANGED}"),
    ("06", cut("eval/backbone/test.json"), "", "eval/backbone/test.json is not valid JSON"),
    ("06", edited("eval/backbone/test.json", policy="x"), "", "holds results of 'x'"),
]


@pytest.mark.parametrize(("script", "spoil", "flags", "message"), BAD)
def test_a_spoilt_run_is_named_and_left_alone(run, stage, script, spoil, flags, message):
    if spoil:
        spoil(run)
    for folder in {"02": ["deltas"], "03": ["predictor"], "05": ["continued"]}.get(script, []):
        shutil.rmtree(run / folder)
    if script == "05" and "--start" not in flags:
        flags += " --start none"
    kept = weights(run / "train"), metrics(run / "train")
    code, line = stage(script, run, *flags.split())
    assert (code, line[:7]) == (2, "error: "), line
    assert message in line
    assert (weights(run / "train"), metrics(run / "train")) == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--backbone runs/none", "backbone folder runs/none not found"),
        ("--top-p 0.9", "biases the importance ratio"),
        ("--mini-batch 3", "must be a multiple of mini_batch"),
        ("--steps 0", "steps must be positive"),
        ("--max-grad-norm 0", "max_grad_norm must be positive"),
        ("--rollouts 1 --algorithm rloo", "rollouts must be 2 or more"),
        ("--kl-in reward", "kl_coef is 0: set it"),
        ("--importance-cap -1", "importance_cap must not be negative"),
        ("--lora-alpha 0", "lora_alpha must be positive"),
        ("--temperature nan", "temperature must be positive"),
        ("--report-to wandbb", "did you mean wandb?"),
        ("--eval-every 2", "eval_every wants --eval-data"),
        ("--prompt-template hello", "no {prompt}"),
    ],
)
def test_a_bad_training_option_stops_before_training(new_run, stage, flags, message):
    code, line = stage("01", new_run, *flags.split())
    assert code == 2
    assert message in line


def test_what_a_preset_must_prepare_first_is_named(tmp_path, stage):
    code, line = stage("01", tmp_path / "new", "--config", "demo")
    wanted = f"not found: run python -m common.demo --run-dir {tmp_path}/new first"
    assert (code, line.endswith(wanted)) == (2, True)
    code, line = stage("06", tmp_path / "new", "--config", "demo")
    assert (code, line.endswith(wanted)) == (2, True)
    assert not (tmp_path / "new").exists()


def nan_gradient(monkeypatch):
    """The first matrix of the adapter gets a gradient of NaN, whatever the loss."""
    add_lora = policy.add_lora

    def spoilt(*args):
        model = add_lora(*args)
        first = next(p for p in model.parameters() if p.requires_grad)
        first.register_hook(lambda gradient: gradient * torch.nan)
        return model

    monkeypatch.setattr(policy, "add_lora", spoilt)


def infinite_loss(monkeypatch):
    """The loss is infinite, its gradient what it would be."""
    clipped_loss = grpo.clipped_loss

    def spoilt(*args):
        loss, clipped = clipped_loss(*args)
        return loss + torch.inf, clipped

    monkeypatch.setattr(grpo, "clipped_loss", spoilt)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(nan_gradient, r"loss \(-?\d.*norm nan"), (infinite_loss, r"loss \(inf.*norm \d")],
)
def test_a_loss_or_a_gradient_that_is_not_finite_stops(
    finished_run, run, stage, monkeypatch, spoil, message
):
    spoil(monkeypatch)
    code, line = stage("01", run, "--steps", "9")
    assert code == 2
    assert re.search(f"non-finite {message}.* in step 9: take a lower", line), line
    assert weights(run / "train") == weights(finished_run / "train")
    assert metrics(run / "train") == metrics(finished_run / "train")


# --------------------------------------------------------------------------------------------------
# What is shown
# --------------------------------------------------------------------------------------------------


def test_help_has_each_option_once_and_the_stages_own_come_first(capsys):
    cls = importlib.import_module("05_continue_rl").ContinueConfig
    with pytest.raises(SystemExit):
        config.parse(cls, "train", "", ["--help"])
    shown = capsys.readouterr().out
    names = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(cls)]
    flags = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    assert sorted([*flags, "--steps"]) == sorted(names)  # which is the start's plus --more-steps
    assert {*flags[:4]} == {"--start", "--restart", "--name", "--more-steps"}
    assert flags[-1] == "--threads"
    titles = ("Where to start, and how far to go:", "The paper's Table 2", "Model, data, prompts")
    places = [shown.index(title) for title in titles]
    assert places == sorted(places)


def printed_plan(preset: str, monkeypatch, capsys) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["reproduce", "--preset", preset, "--print"])
    reproduce.main()
    return capsys.readouterr().out.splitlines()


def test_reproduce_prints_commands_that_can_be_typed_by_hand(monkeypatch, capsys):
    first, *lines = printed_plan("demo", monkeypatch, capsys)
    assert first == "python -m common.demo --run-dir runs/demo"
    assert [line.split(".py")[0].split()[-1][:2] for line in lines[:4]] == ["01", "01", "02", "03"]
    launch = "env ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES= python 0"  # as in the preset
    assert all(line.startswith(launch) for line in lines)
    assert all("--config demo --run-dir runs/demo" in line for line in lines)


def test_a_preset_with_a_dot_in_its_name_has_a_run_directory_of_its_own(monkeypatch, capsys):
    lines = printed_plan("paper_qwen2.5_3b", monkeypatch, capsys)
    folders = {line.split("--run-dir ")[1].split()[0] for line in lines}
    assert folders == {"runs/paper_qwen2.5_3b"}
