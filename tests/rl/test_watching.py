"""What is seen of a run while it trains: accuracy on problems held out, the tracker, the timer."""

import dataclasses
import importlib
import json
import math
import re
import shutil
import types

import pytest
from conftest import metrics

from common import UserError
from common.reproduce import figures
from common.reproduce.runs import Runs
from common.rl import metrics as step_metrics
from common.rl import rollout


def test_accuracy_held_out_is_that_of_stage_6_and_changes_nothing_else(
    finished_run, new_run, stage
):
    data = str(path := new_run / "data" / "valid.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:64]))
    flags = ["--steps", "4", "--eval-every", "2", "--eval-data", data]
    assert stage("01", new_run, *flags)[0] == 0
    rows = metrics(new_run / "train")
    found = [row.pop("eval_accuracy", None) for row in rows]
    assert rows == metrics(finished_run / "train")[:4]
    assert (found[0], found[2]) == (None, None)
    drawn = {line.get_label(): line for line in figures.training(Runs(new_run)).axes[0].lines}
    line = drawn["GRPO with LoRA, --eval-data"]
    assert ([*line.get_xdata()], [*line.get_ydata()]) == ([2, 4], found[1::2])
    flags = ["--output", "validation", "--seed", "1", "--test-data", data]
    flags += ["--policies", "train/step_0002", "train/step_0004"]
    assert stage("06", new_run, *flags)[0] == 0
    paths = sorted((new_run / "validation").glob("*/valid.json"))
    assert found[1::2] == [round(json.loads(p.read_text())["accuracy"], 6) for p in paths]


def test_the_seconds_of_a_step_are_those_of_training(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 4.0, 9.0, 10.0])
    monkeypatch.setattr(step_metrics.time, "perf_counter", lambda: next(times))
    timer = step_metrics.Timer()
    for phase in ("update", "eval"):
        with timer(phase):
            pass
    line = timer.line(tokens=10)
    assert line["seconds_by_phase"] == {"update": 3.0, "eval": 5.0}
    assert (line["seconds"], line["tokens_per_second"]) == (5.0, 2.0)


def test_a_tracker_gets_the_name_of_the_run_and_goes_on_with_it(tmp_path):
    asked = {}

    def init_trackers(project, config, init_kwargs):
        asked.update(project=project, options=config, **init_kwargs)

    place = str(tmp_path / "demo" / "train")
    made = {"project_dir": place, "init_trackers": init_trackers, "log_with": ["trackio"]}
    accelerator = types.SimpleNamespace(**made)
    options = importlib.import_module("01_train_lora_grpo").TrainConfig
    cfg = options(project="mine", run_dir=str(tmp_path / "demo"))
    step_metrics.start_tracker(cfg, accelerator)
    assert asked["project"] == "mine"
    assert asked["options"]["algorithm"] == "grpo"
    assert asked["options"]["learning_rate"] == 5e-6
    assert asked["options"]["reward"] == "['verifier']"  # tensorboard takes no list
    name = asked["wandb"]["id"]
    assert name.startswith("demo-train-")
    assert asked["trackio"] == {"name": name, "resume": "allow"}
    assert asked["wandb"] == {"name": name, "id": name, "resume": "allow"}
    step_metrics.start_tracker(cfg, accelerator)
    assert asked["wandb"]["id"] == name
    shutil.rmtree(place)  # a run that begins again is another run
    step_metrics.start_tracker(cfg, accelerator)
    assert asked["wandb"]["id"] != name
    accelerator.log_with = []  # accelerate leaves out what is not installed
    with pytest.raises(UserError, match="--report-to wandb is not installed"):
        step_metrics.start_tracker(dataclasses.replace(cfg, report_to="wandb"), accelerator)


def test_a_tracker_gets_all_that_is_a_number():
    logged = []
    log = lambda values, step: logged.append((step, values))  # noqa: E731
    place = types.SimpleNamespace(log=log, is_main_process=False)
    cfg = types.SimpleNamespace(log_every=1, steps=9)
    run = types.SimpleNamespace(accelerator=place, cfg=cfg, flat=0, told=False)
    line = {"step": 3, "loss": 0.5, "grad_norm": 1.0}
    step_metrics.show(run, {**line, "seconds_by_phase": {"update": 1.0}})
    assert logged == [(3, {"loss": 0.5, "grad_norm": 1.0})]


def test_the_first_line_on_the_console_says_that_a_loss_of_0_is_right(finished_run):
    printed = (finished_run / "printed.txt").read_text()
    assert re.search(r"step 1/6  .*  loss -?\d\.\de[+-]\d\d \(about 0 is right\)  length", printed)
    assert re.search(r"step 6/6  .*  loss -?\d\.\de[+-]\d\d  length", printed)


def test_importance_ratios_are_the_trainers_over_the_engines(new_run, stage, monkeypatch):
    """An engine that says twice the probability of every response's first token."""
    generate = rollout.HFEngine.generate

    def doubled(self, *args):
        found = generate(self, *args)
        for one in found:
            one.logprobs[0] += math.log(2)
        return found

    monkeypatch.setattr(rollout.HFEngine, "generate", doubled)
    assert stage("01", new_run, "--steps", "1", "--kl-coef", "0.1")[0] == 0
    [row] = metrics(new_run / "train")
    low, mean, high = (row[f"importance_ratio_{end}"] for end in ("min", "mean", "max"))
    assert (low, high) == (pytest.approx(0.5, abs=1e-4), pytest.approx(1, abs=1e-4))
    assert mean == pytest.approx(1 - 0.5 / row["response_length"], abs=1e-4)
    assert row["logprob_gap_max"] == pytest.approx(math.log(2), abs=1e-4)


def test_problems_without_a_gradient_are_counted():
    record = {"accuracy": 0.75, "standard_error": None, "n": 4, "problems": 2, "seconds": 1.0}
    record |= {"by_problem": [1.0, 0.5], "response_length": 3.0, "verifier_timeouts": 0}
    line = step_metrics.console_line(record, 0.0, 1.0)
    assert "; all right: 50% of the problems, all wrong: 0%; 00:00 left" in line
    record |= {"n": 40, "problems": 20, "by_problem": [0.0] * 18 + [0.5, 1.0]}
    line = step_metrics.console_line(record, 0.0, 1.0)
    assert "5% of the problems, all wrong: 90%, hardly a gradient: take easier ones" in line
    record |= {"by_problem": [1.0] * 19 + [0.5]}
    assert "all wrong: 0%, hardly a gradient: take harder ones" in step_metrics.console_line(
        record, 0.0, 1.0
    )
    record |= {"n": 2, "problems": 2, "by_problem": [1.0, 0.0]}
    assert "all right" not in step_metrics.console_line(record, 0.0, 1.0)  # one answer each


def test_the_time_left_is_as_long_as_the_rest_of_the_work_would_take(monkeypatch):
    monkeypatch.setattr(step_metrics.time, "perf_counter", lambda: 130.0)
    record = {"accuracy": 0.75, "standard_error": None, "n": 2, "problems": 2, "seconds": 1.0}
    record |= {"by_problem": [1.0, 0.5], "response_length": 3.0, "verifier_timeouts": 0}
    assert step_metrics.console_line(record, 100.0, 0.25).endswith("1.0 s; 01:30 left")
