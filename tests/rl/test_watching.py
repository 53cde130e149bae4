"""What is seen of a run while it trains: accuracy on problems held out, the tracker, the timer."""

import dataclasses
import importlib
import json
import math
import shutil
import types

import pytest
from conftest import TINY, call_stage

from common import UserError
from common.files.read import read_jsonl
from common.rl import metrics, rollout


def rows_of(run, monkeypatch, capsys, *flags) -> list[dict]:
    """The metrics of four steps, without wall times."""
    flags = ["--config", TINY, "--run-dir", str(run), "--steps", "4", *flags]
    assert call_stage(monkeypatch, capsys, "01_train_lora_grpo.py", *flags)[0] == 0
    rows = read_jsonl(run / "train" / "metrics.jsonl")
    timed = ("seconds", "seconds_by_phase", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_accuracy_held_out_is_that_of_stage_6_and_changes_nothing_else(
    empty_run, tmp_path, monkeypatch, capsys
):
    plain, watched = (shutil.copytree(empty_run, tmp_path / name) for name in ("a", "b"))
    data = str(watched / "data" / "valid.jsonl")
    without = rows_of(plain, monkeypatch, capsys)
    rows = rows_of(watched, monkeypatch, capsys, "--eval-every", "2", "--eval-data", data)
    found = [row.pop("eval_accuracy", None) for row in rows]
    assert rows == without
    assert (found[0], found[2]) == (None, None)
    flags = ["--config", TINY, "--run-dir", str(watched), "--output", "validation", "--seed", "1"]
    flags += ["--test-data", data, "--policies", "train/step_0002", "train/step_0004"]
    assert call_stage(monkeypatch, capsys, "06_eval.py", *flags)[0] == 0
    paths = sorted((watched / "validation").glob("*/valid.json"))
    assert found[1::2] == [round(json.loads(p.read_text())["accuracy"], 6) for p in paths]


def test_accuracy_held_out_wants_problems(empty_run, monkeypatch, capsys):
    flags = ["--config", TINY, "--run-dir", str(empty_run), "--eval-every", "2"]
    code, line = call_stage(monkeypatch, capsys, "01_train_lora_grpo.py", *flags)
    assert (code, "eval_every wants --eval-data" in line) == (2, True)


def test_the_seconds_of_a_step_are_those_of_training(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 4.0, 9.0, 10.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    timer = metrics.Timer()
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
    metrics.start_tracker(cfg, accelerator)
    assert asked["project"] == "mine"
    assert asked["options"]["algorithm"] == "grpo"
    assert asked["options"]["learning_rate"] == 5e-6
    assert asked["options"]["reward"] == "['verifier']"  # tensorboard takes no list
    name = asked["wandb"]["id"]
    assert name.startswith("demo-train-")
    assert asked["trackio"] == {"name": name, "resume": "allow"}
    assert asked["wandb"] == {"name": name, "id": name, "resume": "allow"}
    metrics.start_tracker(cfg, accelerator)
    assert asked["wandb"]["id"] == name
    shutil.rmtree(place)  # a run that begins again is another run
    metrics.start_tracker(cfg, accelerator)
    assert asked["wandb"]["id"] != name
    accelerator.log_with = []  # accelerate leaves out what is not installed
    with pytest.raises(UserError, match="--report-to wandb is not installed"):
        metrics.start_tracker(dataclasses.replace(cfg, report_to="wandb"), accelerator)


def test_a_tracker_gets_all_that_is_a_number():
    logged = []
    log = lambda values, step: logged.append((step, values))  # noqa: E731
    place = types.SimpleNamespace(log=log, is_main_process=False)
    cfg = types.SimpleNamespace(log_every=1, steps=9)
    run = types.SimpleNamespace(accelerator=place, cfg=cfg, flat=0)
    line = {"step": 3, "loss": 0.5, "grad_norm": 1.0}
    metrics.show(run, {**line, "seconds_by_phase": {"update": 1.0}})
    assert logged == [(3, {"loss": 0.5, "grad_norm": 1.0})]


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
    (row,) = read_jsonl(new_run / "train" / "metrics.jsonl")
    low, mean, high = (row[f"importance_ratio_{end}"] for end in ("min", "mean", "max"))
    assert (low, high) == (pytest.approx(0.5, abs=1e-4), pytest.approx(1, abs=1e-4))
    assert mean == pytest.approx(1 - 0.5 / row["response_length"], abs=1e-4)
    assert row["logprob_gap_max"] == pytest.approx(math.log(2), abs=1e-4)
