"""The grid behind the paper's tables: its command lines, how they are run, and what is made of their results."""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, TINY

from common import UserError
from common.files import adapters, config
from common.files import write as run_dir
from common.reproduce import __main__ as reproduce
from common.reproduce import grid_results, plans, report, results, tables

PARSED = {
    "01_train_lora_grpo": ("TrainConfig", "train"),
    "02_extract_deltas": ("ExtractConfig", "extract"),
    "03_train_predictor": ("PredictorConfig", "predict"),
    "04_extrapolate": ("ExtrapolateConfig", "extrapolate"),
    "05_continue_rl": ("ContinueConfig", ("train", "continue")),
    "06_eval": ("EvalConfig", "eval"),
}


@pytest.mark.parametrize(
    ("preset", "kind"), [("demo", None), ("demo", "tables"), ("smollm2", "main"), ("paper_qwen2.5_7b", None), (TINY, "rl-extra")]
)
def test_every_planned_line_is_one_its_stage_accepts_and_comes_after_what_it_needs(preset, kind):
    loaded = config.load_preset(preset)
    jobs = plans.grid(kind, preset, loaded, "runs/x", [0]) if kind else plans.single(preset, loaded, "runs/x")
    seen = set()
    for job in jobs:
        assert job.name not in seen
        assert set(job.needs) <= seen
        seen.add(job.name)
        scripts = [i for i, word in enumerate(job.argv) if word.endswith(".py")]
        for at in scripts:
            name, section = PARSED[job.argv[at].removesuffix(".py")]
            cls = getattr(importlib.import_module(job.argv[at].removesuffix(".py")), name)
            config.parse(cls, section, "", job.argv[at + 1 :])


def test_all_methods_of_a_seed_start_from_one_training_of_the_first_steps():
    jobs = plans.grid("tables", "demo", config.load_preset("demo"), "runs/x", [0, 3])
    for seed in (0, 3):
        trained = [job for job in jobs if job.name == f"seed{seed}/lora 01"]
        assert len(trained) == 1
        assert trained[0].argv[-2:] == ["--steps", "150"]
        assert trained[0].argv[trained[0].argv.index("--seed") + 1] == str(seed)
        continued = [job for job in jobs if job.name.startswith(f"seed{seed}/lora 05 ")]
        assert {job.argv[job.argv.index("--run-dir") + 1] for job in continued} == {f"runs/x/seed{seed}/lora"}
        assert {job.argv[job.argv.index("--seed") + 1] for job in continued} == {str(seed)}


def test_the_rounds_of_rl_extra_each_start_on_the_merged_model_of_the_round_before():
    jobs = [job for job in plans.grid("tables", "demo", config.load_preset("demo"), "runs/x", [0]) if "/loop/" in job.name]
    starts = [job.argv[job.argv.index("--backbone") + 1] for job in jobs if job.name.endswith(" 01")]
    merged = [f"runs/x/seed0/loop/round{i}/merged/rl-extra_alpha5" for i in range(1, plans.LOOP_ROUNDS)]
    assert starts == ["runs/x/backbone", *merged]  # 50 steps are 5 checkpoints of 10: alpha 5 at k = 1 is as far again


def jobs_of(*commands: tuple[str, str, list[str]]) -> list[plans.Job]:
    return [plans.Job(name, [sys.executable, "-c", code], needs, 1.0) for name, code, needs in commands]


def run_jobs(folder: pathlib.Path, jobs, lanes=(None,)) -> None:
    (folder / "logs").mkdir(exist_ok=True)
    reproduce.Runner(jobs, list(lanes), folder / "reproduce.json", "stamp", folder / "logs").run()


def test_every_lane_has_gpus_of_its_own_and_waits_for_what_a_job_needs(tmp_path):
    say = "import os, pathlib, time; time.sleep(0.3); pathlib.Path({path!r}).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    paths = [str(tmp_path / name) for name in "abc"]
    last = f"import pathlib; assert all(pathlib.Path(p).exists() for p in {paths[:2]!r}); pathlib.Path({paths[2]!r}).touch()"
    run_jobs(tmp_path, jobs_of(("a", say.format(path=paths[0]), []), ("b", say.format(path=paths[1]), []), ("c", last, ["a", "b"])), "01")
    assert {(tmp_path / name).read_text() for name in "ab"} == {"0", "1"}
    assert (tmp_path / "c").exists()


def test_gpus_are_shared_out_by_the_preset(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert reproduce.lanes_of({"reproduce": {"gpus_per_job": 2}}, None, grid=True) == ["0,1", "2,3", "4,5", "6,7"]
    assert reproduce.lanes_of({"reproduce": {"gpus_per_job": 2}}, 1, grid=True) == ["0,1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert reproduce.lanes_of({"reproduce": {"gpus_per_job": 2, "jobs": 3}}, None, grid=True) == [None] * 3


def test_a_grid_that_failed_goes_on_with_what_is_missing(tmp_path):
    count = f"import pathlib; p = pathlib.Path({str(tmp_path / 'count')!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    fail = f"import pathlib, sys; print('why it failed'); sys.exit(not pathlib.Path({str(tmp_path / 'mended')!r}).exists())"
    jobs = jobs_of(("a", count, []), ("b", fail, ["a"]), ("c", "print('end')", ["b"]))
    with pytest.raises(UserError, match="failed"):
        run_jobs(tmp_path, jobs)
    assert "why it failed" in (tmp_path / "logs" / "b.log").read_text()
    (tmp_path / "mended").touch()
    run_jobs(tmp_path, jobs)
    assert (tmp_path / "count").read_text() == "x"  # a was not done again
    assert "end" in (tmp_path / "logs" / "c.log").read_text()


# ---------------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------------


def record(run: pathlib.Path, policy: str, scores: list[float], step: int = 0) -> None:
    """An evaluated policy as stage 6 leaves it, one problem a score."""
    if policy != "backbone":
        run_dir.write_json(run / policy / "checkpoint.json", {"step": step})
    result = {"policy": policy, "accuracy": sum(scores) / len(scores), "standard_error": 0.01, "n": len(scores), "response_length": 5.0}
    run_dir.write_json(run / "eval" / policy.replace("/", "__") / "test.json", {**result, "by_problem": scores})


def test_a_model_without_an_adapter_and_a_merged_adapter_have_their_method_and_their_cost(tmp_path):
    rows = [json.dumps({"step": step, "seconds": 2.0, "accuracy": 0.5, "response_length": 5.0}) + "\n" for step in (1, 2, 3)]
    run_dir.atomic_write_text(tmp_path / "train" / "metrics.jsonl", "".join(rows))
    run_dir.write_json(tmp_path / "extrapolated" / "rl-extra_alpha1.5" / "checkpoint.json", {"step": 2, "method": "rl-extra"})
    for policy in ("merged/dare_p0.9", "merged/rl-extra_alpha1.5"):
        record(tmp_path, policy, [1.0, 0.0], 2)
    run_dir.write_json(tmp_path / "merged" / "dare_p0.9" / "checkpoint.json", {"step": 2, "method": "dare_p0.9"})
    (tmp_path / "merged" / "rl-extra_alpha1.5" / "checkpoint.json").unlink()  # as stage 4 leaves it
    found = results.load_results(tmp_path)
    dare, merged = found["merged/dare_p0.9"], found["merged/rl-extra_alpha1.5"]
    assert (dare.method, dare.alpha, dare.steps, dare.seconds) == ("dare_p0.9", None, 2, 4.0)
    assert (merged.method, merged.alpha, merged.steps, merged.seconds) == ("rl-extra", 1.5, 2, 4.0)
    labels = ["RL-Extra, merged, right after the jump", "DARE, 90% dropped, right after the jump"]
    assert [row.label for row in report.table_rows(found)] == labels


def test_what_was_measured_on_other_tasks_says_so_and_is_compared_on_those_in_common(tmp_path):
    for step, scores in ((1, [1.0, 0.0]), (2, [1.0, 1.0]), (3, [0.0, 0.0])):
        record(tmp_path, f"train/step_{step:04d}", scores, step)
    more = {"policy": "train/step_0002", "accuracy": 0.0, "standard_error": 0.0, "n": 3, "response_length": 5.0, "by_problem": [0.0] * 3}
    run_dir.write_json(tmp_path / "eval" / "train__step_0002" / "aime24.json", more)
    found = results.load_results(tmp_path)
    one, two, three = found.values()
    assert [r.label for r in (one, two, three)] == ["GRPO with LoRA", "GRPO with LoRA (on aime24, test)", "GRPO with LoRA"]
    assert (two.accuracy, two.error) == (0.5, pytest.approx(0.005))  # an error of 0 is one
    assert results.difference(two, one)[0] == 0.5
    del two.by_problem["test"]
    with pytest.raises(UserError, match="train/step_0002 and train/step_0001 were not measured on the same problems"):
        results.difference(two, one)


@pytest.mark.parametrize(("low", "high", "want"), [(-0.6, -0.2, "holds"), (-1.5, -0.2, "undecided"), (-1.5, -1.2, "does not hold")])
def test_not_worse_is_an_interval_above_one_point_below(low, high, want):
    assert grid_results.Estimate((low + high) / 200, 0.001, (high - low) / 200, 5).verdict(not_worse=True) == want


@pytest.fixture
def grid(tmp_path) -> grid_results.Grid:
    """Three seeds on 100 problems: GRPO right on 50, 60, 70 of them at 250 steps; NExt on 1, 2, 3 more; repeat-last on 7, 1, 1 fewer."""
    for seed in (0, 1, 2):
        run, right = tmp_path / f"seed{seed}" / "lora", 50 + 10 * seed
        record(run, "train/step_0250", [1.0] * right + [0.0] * (100 - right), 250)
        record(run, "train/step_0400", [1.0] * 90 + [0.0] * 10, 400)
        for start, more in (("next-weighted_alpha1.5", seed + 1), ("repeat-last_alpha1.5", (-7, -1, -1)[seed])):
            record(run, f"continued/{start}/step_0250", [1.0] * (right + more) + [0.0] * (100 - right - more), 250)
    record(tmp_path / "seed0" / "lora", "backbone", [1.0] * 30 + [0.0] * 70)
    return grid_results.Grid(tmp_path, config.load_preset("demo"), [0, 1, 2])


def test_differences_are_paired_by_seed_with_students_interval(grid):
    found = grid.difference(("lora", grid.after("next-weighted_alpha1.5")), ("lora", "train/step_0250"))
    assert found.mean == pytest.approx(0.02)
    assert found.half == pytest.approx(4.303 * 0.01 / 3**0.5)  # t(2 degrees, 97.5%) times the standard error of 1, 2, 3 points
    assert found.verdict() == "undecided"  # 2 +- 2.5 points
    assert grid.difference(("lora", "train/step_0250"), ("lora", "train/step_0400")).verdict() == "does not hold"
    assert grid.difference(("lora", "train/step_0250"), ("lora", "train/step_0250")).verdict(not_worse=True) == "holds"
    assert grid_results.estimate([0.01, 0.02]).verdict() == "undecided"
    assert grid_results.estimate([0.01, 0.011, 0.012]).verdict() == "holds"
    assert grid_results.estimate([0.5]).verdict() == "undecided"


def test_the_main_table_counts_steps_per_point_gained_and_leaves_out_what_was_not_run(grid):
    lines = tables.main_table(grid).splitlines()
    assert lines[2].startswith("| Backbone | 0 | 1 | 30.0 | – |")
    ours = next(line for line in lines if line.startswith("| NExt, weighted recipe"))
    assert ours.split(" | ")[1:7] == ["250", "3", "62.0 ± 6.4", "+2.0 [-0.5, +4.5]", "-28.0 [-55.3, -0.7]", "7.8"]  # 250 / (62 - 30)
    assert not any("full parameters" in line or "RELEX" in line for line in lines)


def test_claims_name_a_verdict_and_its_numbers(grid):
    lines = {line.split(" | ")[0].strip("| "): line for line in tables.claims(grid).splitlines()}
    assert "**undecided**: +2.0 [-0.5, +4.5]" in lines["Tables 3, 4: at 250 steps better than GRPO with LoRA at 250"]
    assert "**undecided**: -28.0" in lines["... not worse than GRPO with LoRA at 400"]
    assert "+5.0" in lines["(control) better than repeating the last delta, at 250"]  # mean of 8, 3, 4


def test_the_cosine_of_a_jump_is_that_of_the_dense_matrices():
    generator = torch.Generator().manual_seed(0)

    def adapter(rank: int, alpha: float) -> adapters.Adapter:
        factors = {m: (torch.randn(6, rank, generator=generator), torch.randn(rank, 5, generator=generator)) for m in ("x", "y")}
        return adapters.Adapter({"r": rank, "lora_alpha": alpha}, factors)

    last, jumped, future = adapter(2, 1.0), adapter(3, 2.0), adapter(2, 1.0)
    expected = []
    for module in ("x", "y"):
        w, w_hat, w_true = (a.scale(module) * (a.factors[module][0] @ a.factors[module][1]).double() for a in (last, jumped, future))
        expected.append(torch.nn.functional.cosine_similarity((w_hat - w).flatten(), (w_true - w).flatten(), 0).item())
    assert grid_results.jump_cosine(jumped, last, future) == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert grid_results.jump_cosine(future, last, future) == pytest.approx(1.0)


def test_a_small_grid_is_interrupted_goes_on_and_writes_its_tables(tmp_path):
    preset = tmp_path / "small.yaml"
    sections = {"predict": {"recipes": ["weighted"]}, "extrapolate": {"recipes": ["weighted"]}}
    sections["reproduce"] = {"grid_without_launcher": True, "continue_from": ["next-weighted_alpha1.5"], "jobs": 2}
    preset.write_text(yaml.safe_dump({"base": TINY, **sections}))
    command = [sys.executable, "-m", "common.reproduce", "--preset", str(preset), "--grid", "main", "--seeds", "0"]
    command += ["--run-dir", str(tmp_path / "grid")]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    for line in first.stdout:
        if "02_extract_deltas.py" in line:
            first.send_signal(signal.SIGINT)
            break
    first.communicate()
    assert first.returncode == 130
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert again.returncode == 0, again.stdout + again.stderr
    assert "done already" in again.stdout
    page = (tmp_path / "grid" / "tables.md").read_text()
    assert "| NExt, weighted recipe | 8 | 1 |" in page
    assert "RELEX" in page
    values = json.loads((tmp_path / "grid" / "results.json").read_text())
    assert {value["run"] for value in values} == {"lora"}
    assert len(list((tmp_path / "grid" / "figures").glob("*.png"))) == 5
