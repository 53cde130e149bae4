"""The grid behind the paper's tables: its command lines, how they are run, and what is made of
their results."""

import json
import pathlib
import re
import sys

import pytest
import torch
import yaml
from conftest import TINY, interrupted, parse_stage

from common import UserError
from common.files import adapters, config
from common.files import write as run_dir
from common.reproduce import __main__ as reproduce
from common.reproduce import (
    check,
    claims,
    estimates,
    figures,
    plans,
    rates,
    report,
    results,
    runner,
    runs,
    sizes,
    tables,
)


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        ("demo", None),
        ("demo", "tables"),
        ("demo", "learning-rate"),
        ("paper_qwen2.5_7b", None),
        ("paper_qwen2.5_7b", "paper"),
        (TINY, "tables"),
    ],
)
def test_every_planned_line_is_one_its_stage_accepts_and_comes_after_what_it_needs(preset, kind):
    loaded = config.load_preset(preset)
    jobs = (
        plans.grid(kind, preset, loaded, "runs/x", [0], range(3, 9))
        if kind
        else plans.single(preset, loaded, "runs/x")
    )
    seen = set()
    for job in jobs:
        assert job.name not in seen
        assert set(job.needs) <= seen
        seen.add(job.name)
        for at in [i for i, word in enumerate(job.argv) if word.endswith(".py")]:
            parse_stage(job.argv[at][:2], *job.argv[at + 1 :])


def test_all_methods_of_a_seed_start_from_one_training_of_the_first_steps():
    jobs = plans.grid("tables", "demo", config.load_preset("demo"), "runs/x", [0, 3])
    for seed in (0, 3):
        trained = [job for job in jobs if job.name == f"seed{seed}/lora 01"]
        assert len(trained) == 1
        assert trained[0].argv[-2:] == ["--steps", "150"]
        assert trained[0].argv[trained[0].argv.index("--seed") + 1] == str(seed)
        continued = [job for job in jobs if job.name.startswith(f"seed{seed}/lora 05 ")]
        assert {job.argv[job.argv.index("--run-dir") + 1] for job in continued} == {
            f"runs/x/seed{seed}/lora"
        }
        assert {job.argv[job.argv.index("--seed") + 1] for job in continued} == {str(seed)}


def test_the_rounds_of_rl_extra_each_start_on_the_merged_model_of_the_round_before():
    jobs = [
        job
        for job in plans.grid("tables", "demo", config.load_preset("demo"), "runs/x", [0])
        if "/loop/" in job.name
    ]
    starts = [
        job.argv[job.argv.index("--backbone") + 1] for job in jobs if job.name.endswith(" 01")
    ]
    merged = [
        f"runs/x/seed0/loop/round{i}/merged/rl-extra_alpha5" for i in range(1, plans.LOOP_ROUNDS)
    ]
    assert starts == [
        "runs/x/backbone",
        *merged,
    ]  # 50 steps are 5 checkpoints of 10: alpha 5 at k = 1 is as far again


@pytest.mark.parametrize(
    ("tables_", "runs_", "steps"),
    [
        ([3], ["lora", "full"], 400 + 4 * 100 + 400 + 3 * 100),
        ([5], ["lora", "full"], 400 + 4 * 100 + 500),
        ([6], ["lora", "rloo", "reinforce++"], 400 + 2 * 100 + 2 * 500),
        ([8], ["lora", "full"], 400 + 4 * 100 + 400 + 3 * 100),
        ([3, 4, 5, 6, 7, 8], ["lora", "rloo", "reinforce++", "full"], 2700),
    ],
)
def test_the_papers_rows_are_made_once_and_share_every_prefix(tables_, runs_, steps):
    preset = config.load_preset("paper_qwen2.5_1.5b")
    jobs = plans.grid("paper", "paper_qwen2.5_1.5b", preset, "runs/x", [0], tables_)
    assert [*dict.fromkeys(job.name.split()[0] for job in jobs)] == [f"seed0/{r}" for r in runs_]
    assert sum(job.work for job in jobs if {"01", "05"} & {*job.name.split()}) == steps
    assert any("mmlu-pro" in job.argv for job in jobs) == (8 in tables_)
    assert any("merged/alpharl_alpha1.5" in job.argv for job in jobs) == bool({3, 8} & {*tables_})
    assert any("paper-no-local" in job.argv for job in jobs) == (5 in tables_)


def test_tables_5_and_6_are_of_the_two_small_models_and_7_and_8_of_the_policies_in_them(
    monkeypatch, capsys
):
    monkeypatch.setattr(check, "sizes_of", lambda *args: (1, 1))  # which takes seconds
    for size, steps in (("3b", 2700), ("14b", 1500)):
        argv = ["reproduce", "--preset", f"paper_qwen2.5_{size}", "--grid", "paper", "--print"]
        monkeypatch.setattr("sys.argv", argv)
        reproduce.main()
        printed = capsys.readouterr()
        assert f"commands, {steps} RL steps" in printed.err  # of one seed
    lora, full = (line for line in printed.out.splitlines() if line.endswith("mmlu-pro"))
    assert lora.count("step_0250") == 3
    assert "backbone train/step_0400 continued/alpharl_alpha1.5_merged/step_0250" in lora
    assert "--policies train/step_0400 'continued/merged__*/step_0250' --test-data" in full


def test_all_parameters_are_trained_at_the_papers_rate():
    preset = config.load_preset("paper_qwen2.5_1.5b")
    jobs = plans.grid("paper", "p", preset, "runs/x", [0], {3})
    assert any("--tune full --learning-rate 5e-07 " in job.line for job in jobs)


def jobs_of(*commands: tuple[str, str, list[str]]) -> list[plans.Job]:
    return [
        plans.Job(name, [sys.executable, "-c", code], needs, 1.0) for name, code, needs in commands
    ]


def run_jobs(folder: pathlib.Path, jobs, lanes=(None,)) -> None:
    (folder / "logs").mkdir(exist_ok=True)
    runner.Runner(jobs, list(lanes), folder / "reproduce.json", "stamp", folder / "logs").run()


def test_every_lane_has_gpus_of_its_own_and_waits_for_what_a_job_needs(tmp_path):
    say = "import os, pathlib, time; time.sleep(0.3); "
    say += "pathlib.Path({path!r}).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    paths = [str(tmp_path / name) for name in "abc"]
    last = f"import pathlib; assert all(pathlib.Path(p).exists() for p in {paths[:2]!r}); "
    last += f"pathlib.Path({paths[2]!r}).touch()"
    run_jobs(
        tmp_path,
        jobs_of(
            ("a", say.format(path=paths[0]), []),
            ("b", say.format(path=paths[1]), []),
            ("c", last, ["a", "b"]),
        ),
        "01",
    )
    assert {(tmp_path / name).read_text() for name in "ab"} == {"0", "1"}
    assert (tmp_path / "c").exists()


def test_gpus_are_shared_out_by_the_preset(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert reproduce.lanes_of({"reproduce": {"gpus_per_job": 2}}, None, grid=True) == [
        "0,1",
        "2,3",
        "4,5",
        "6,7",
    ]
    assert reproduce.lanes_of({"reproduce": {"gpus_per_job": 2}}, 1, grid=True) == ["0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")  # the others are not ours
    assert reproduce.lanes_of({"reproduce": {"gpus_per_job": 1}}, None, grid=True) == ["4", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (
        reproduce.lanes_of({"reproduce": {"gpus_per_job": 2, "jobs": 3}}, None, grid=True)
        == [None] * 3
    )


def test_a_grid_that_failed_goes_on_with_what_is_missing(tmp_path, capsys):
    count, mended = (str(tmp_path / name) for name in ("count", "mended"))
    count = f"import pathlib; p = pathlib.Path({count!r}); "
    count += "p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    fail = "import pathlib, sys; print('error: why it failed' + 30 * '\\nwords of a launcher'); "
    fail += f"sys.exit(not pathlib.Path({mended!r}).exists())"
    jobs = jobs_of(("a", count, []), ("b", fail, ["a"]), ("c", "print('end')", ["b"]))
    with pytest.raises(UserError, match="failed"):
        run_jobs(tmp_path, jobs)
    assert "words of a launcher" in (tmp_path / "logs" / "b.log").read_text()
    told = capsys.readouterr().err
    assert ("error: why it failed" in told, "words of a launcher" in told) == (True, False)
    crash = jobs_of(("b", fail.replace("error: why", "Killed: why"), ["a"]))
    (tmp_path / "logs" / "b.log").open("a").write("error: of an earlier attempt\n")
    with pytest.raises(UserError, match="failed"):
        run_jobs(tmp_path, [jobs[0], *crash])
    assert "error: of an earlier attempt" not in capsys.readouterr().err
    (tmp_path / "mended").touch()
    run_jobs(tmp_path, jobs)
    assert (tmp_path / "count").read_text() == "x"  # a was not done again
    assert "end" in (tmp_path / "logs" / "c.log").read_text()


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------


def record(
    run: pathlib.Path,
    policy: str,
    scores: list[float],
    step: int = 0,
    task: str = "test",
    **changes,
) -> None:
    """A measured policy as stage 6 leaves it, one problem a score.

    `changes` are options of stage 6, or its `data`.
    """
    if policy != "backbone":
        info = {"step": step, "method": policy.split("_alpha")[0].split("/")[-1], "seconds": 1.0}
        run_dir.write_json(run / policy / "checkpoint.json", info)
    data = changes.pop("data", "hash")
    result = {
        "policy": policy,
        "n": len(scores),
        "response_length": 5.0,
        "by_problem": scores,
        "data": data,
    }
    settings = {"temperature": 1.0, "max_new_tokens": 48, **changes}
    folder = run / "eval" / policy.replace("/", "__")
    run_dir.write_json(
        folder / f"{task}.json", {**result, "settings": settings, "template_hash": "t"}
    )


def share(right: int, of: int = 100) -> list[float]:
    """Scores of `of` problems, `right` of them answered."""
    return [1.0] * right + [0.0] * (of - right)


def log(folder: pathlib.Path, steps: range, seconds: float = 2.0) -> None:
    """metrics.jsonl with a row a step."""
    rows = [{"step": s, "seconds": seconds, "accuracy": 0.5, "response_length": 5.0} for s in steps]
    run_dir.write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def trained_with(folder: pathlib.Path, **options) -> None:
    """config.json as stages 1 and 5 leave it."""
    run_dir.write_json(folder / "config.json", {"config": options, "inputs": {}})


def took(run: pathlib.Path, svds: float, network: float, recipe: str = "aligned") -> None:
    """The seconds of stages 2 and 3."""
    run_dir.write_json(run / "deltas" / "done.json", {"seconds": svds})
    run_dir.write_json(run / "predictor" / recipe / "done.json", {"training_seconds": network})


def test_a_model_without_an_adapter_and_a_merged_adapter_have_their_method_and_their_cost(tmp_path):
    log(tmp_path / "train", range(1, 4))
    for policy in ("extrapolated/rl-extra_alpha1.5", "merged/dare", "merged/rl-extra_alpha1.5"):
        record(tmp_path, policy, [1.0, 0.0], 2)
    found = results.load_results(tmp_path)
    dare, merged = found["merged/dare"], found["merged/rl-extra_alpha1.5"]
    assert (dare.method, dare.alpha, dare.steps, dare.seconds) == ("dare", None, 2, 5.0)
    assert (merged.method, merged.alpha, merged.steps, merged.seconds) == ("rl-extra", 1.5, 2, 5.0)
    assert [r.label for r in (merged, dare)] == ["RL-Extra, merged", "DARE, 90% dropped"]


def test_wall_seconds_have_every_methods_own_computing(tmp_path):
    """2 s of RL and 1 s of each jump; where used, SVDs, a network, measured checkpoints."""
    log(tmp_path / "train", range(1, 2))
    took(tmp_path, 10.0, 100.0)
    run_dir.write_json(
        tmp_path / "validation" / "train__step_0001" / "test.json", {"seconds": 1000.0}
    )
    for method in ("next-aligned", "weighted", "repeat-last", "rl-extra", "alpharl-pls", "oracle"):
        record(tmp_path, f"extrapolated/{method}_alpha1.5", [1.0, 0.0], 1)
    found = {r.method: r.seconds for r in results.load_results(tmp_path).values()}
    assert found == {
        "next-aligned": 113.0,
        "weighted": 13.0,
        "repeat-last": 13.0,
        "rl-extra": 3.0,
        "alpharl-pls": 1013.0,
        "oracle": None,
    }


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"data": "other"}])
def test_what_was_measured_otherwise_is_left_out_and_named(tmp_path, change):
    for step in (1, 2, 3):
        record(
            tmp_path,
            f"train/step_{step:04d}",
            share(40 + step),
            step,
            **(change if step == 2 else {}),
        )
    found = runs.Runs(tmp_path)
    assert [m.policy for m in found.some()] == ["train/step_0001", "train/step_0003"]
    ((key, value),) = change.items()
    usual = {"temperature": 1.0, "data": "hash, 100 problems"}[key]
    odd = "other, 100 problems" if key == "data" else value
    line = f"measured with {key} {odd!r} (the others: {usual!r})"
    assert found.left_out == [f"train/step_0002: {line}"]
    page = report.page(found, "")
    assert "train/step_0002: measured" in page
    assert "| GRPO with LoRA | 2 |" not in page


def test_a_policy_that_was_trained_with_another_learning_rate_is_left_out_and_named(tmp_path):
    for folder, rate in (
        ("train", 1e-3),
        ("continued/none", 1e-2),  # comes first, and does not decide what is usual
        ("continued/rl-extra_alpha1.5", 1e-3),
    ):
        trained_with(tmp_path / folder, learning_rate=rate, steps=3)
        record(tmp_path, f"{folder}/step_0003", share(50), 3)
    found = runs.Runs(tmp_path)
    kept = ["continued/rl-extra_alpha1.5/step_0003", "train/step_0003"]
    assert [m.policy for m in found.some()] == kept
    why = "trained with learning_rate 0.01 (the others: 0.001)"
    assert found.left_out == [f"continued/none/step_0003: 50.0%, {why}"]


def test_tasks_have_columns_and_only_those_of_one_suite_are_averaged(tmp_path):
    tasks = {"aime24": 10, "amc23": 30, "gpqa-diamond": 50, "mmlu-pro-law": 60, "mmlu-pro-math": 80}
    for policy, tasks_of in (("backbone", tasks), ("train/step_0001", tasks)):
        for task, right in tasks_of.items():
            record(tmp_path, policy, share(right), 1, task)
    record(
        tmp_path, "train/step_0001", share(90), 1, "olymmath-en-easy"
    )  # one more test set, of one policy
    record(tmp_path, "train/step_0002", share(70), 2, "mmlu-pro-law")
    found = runs.Runs(tmp_path)
    assert found.tasks == ("aime24", "amc23")
    assert found.at(1).accuracy.mean == pytest.approx(0.2)
    assert found.left_out == ["train/step_0002: not measured on aime24, amc23"]
    header, _, _, row = tables.by_task(found).splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert (cells["aime24"], cells["gpqa-diamond"], cells["olymmath-en-easy"]) == (
        "10.0",
        "50.0",
        "90.0",
    )
    assert (cells["mean of mmlu-pro (2) |"], cells["mean of maths (3)"]) == ("70.0 |", "43.3")
    assert "plain mean of aime24, amc23" in report.page(found, "")


def beside(found: runs.Runs) -> dict[str, list[str]]:
    """The first cell of every row of ours (the paper's) -> the others."""
    rows = [row.strip("| ").split(" | ") for row in tables.beside_paper(found).splitlines()]
    return {row[0]: row[1:] for row in rows if row[0].startswith("Table")}


@pytest.mark.parametrize("size", ["1.5B", "14B"])
def test_the_papers_numbers_stand_beside_ours(tmp_path, size):
    main, rloo = tmp_path / "seed0" / "lora", tmp_path / "seed0" / "rloo"
    trained_with(main / "train", backbone=f"Qwen/Qwen2.5-{size}-Instruct")
    tasks = ["amc23", "minerva"] if size == "1.5B" else ["aime24", "aime25", "amc23", "minerva"]
    for task in tasks if size == "1.5B" else [*tasks, "olymmath-en-easy"]:
        record(main, "backbone", share(10), 0, task)
        for policy, step in (("train/step_0150", 150), ("train/step_0250", 250)):
            record(main, policy, share(30), step, task)
        record(main, "extrapolated/next-paper_alpha1.5", share(31), 150, task)
        record(main, "continued/next-paper_alpha1.5_merged/step_0250", share(40), 250, task)
        record(rloo, "train/step_0250", share(12), 250, task)
    rows = beside(runs.Runs(tmp_path, [0]))
    # A cell a task, the mean, and 250 steps for 20 points.
    grpo, merged = (
        rows["Table 3, 4: GRPO, no jump, 250 steps"],
        "Table 3, 4: GRPO, NExt (paper), merged restart, 250 steps",
    )
    if size == "1.5B":
        assert grpo == [
            "30.0 ± 4.6 (29.4)",
            "30.0 ± 4.6 (11.2)",
            "30.0 ± 3.3 (20.3)",
            "12.5 (29.8)",
        ]
        assert rows[merged][2:] == ["40.0 ± 3.5 (21.6)", "8.3 (25.8)"]
        assert rows["Table 6: RLOO, no jump, 250 steps"][2:] == ["12.0 ± 2.3 (13.7)", "125.0"]
        assert len(rows) == 5
    else:  # Tables 5 and 6 are of the two small models
        assert grpo[1:4] == ["30.0 ± 4.6 (15.0)", "30.0 ± 4.6 (62.5)", "30.0 ± 4.6 (29.7)"]
        assert rows[merged][5:] == ["40.0 ± 2.2 (28.3)", "8.3 (33.3)"]
        assert len(rows) == 3


def test_the_papers_own_numbers_agree_with_one_another():
    paper = results.table_of("paper.yaml")
    for part, tasks in paper["tasks"].items():
        for number, places, *printed in paper[part]:
            for names, base, values in zip(tasks, paper[part][0][2:], printed, strict=False):
                own, mean, *icer = values[: len(names)], *values[len(names) :]
                assert abs(sum(own) / len(own) - mean) < 0.0601, (number, places, values)
                steps = {"{longest}": 400, "extrapolated": 150}.get(places[0].split("/")[1], 250)
                assert not icer or abs(steps / (mean - base[-1]) - icer[0]) < 0.06


CATEGORIES = ["biology", "business", "chemistry", "computer-science", "economics", "engineering"]
CATEGORIES += ["health", "history", "law", "math", "other", "philosophy", "physics", "psychology"]


def test_the_two_halves_of_mmlu_pro_are_tables_7_and_8(tmp_path):
    main = tmp_path / "seed0" / "lora"
    trained_with(main / "train", backbone="Qwen/Qwen2.5-7B-Instruct")
    for number, category in enumerate(CATEGORIES):
        record(main, "backbone", share(10 + 5 * number), 0, f"mmlu-pro-{category}")
    found = runs.Runs(tmp_path, [0])
    rows = {label[:7]: cells for label, cells in beside(found).items()}
    assert [rows["Table 7"][i].split(" ", 1)[0] for i in (0, 6, 7)] == ["10.0", "40.0", "25.0"]
    assert [rows["Table 8"][i][-6:] for i in (1, 6, 7)] == ["(31.0)", "(52.2)", "(50.2)"]
    # law, other (the paper's last), the mean of the seven
    assert [rows["Table 8"][i].split(" ", 1)[0] for i in (1, 6, 7)] == ["50.0", "60.0", "60.0"]
    header, _, row = tables.by_task(found).splitlines()
    cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["mmlu-pro-law"] == "50.0"
    assert cells["mean of mmlu-pro (14)"] == "42.5"


def test_another_model_has_no_numbers_of_the_paper(tmp_path):
    assert tables.beside_paper(one_run(tmp_path, 55)) == ""


def one_run(tmp_path, later: int, reference: int = 60) -> runs.Runs:
    """GRPO right on 40, 50, 60 of 100 problems at 150, 250, 400 steps; NExt on `later` at 250."""
    for step, right in ((150, 40), (250, 50), (400, reference)):
        record(tmp_path, f"train/step_{step:04d}", share(right), step)
    record(tmp_path, "extrapolated/next-aligned_alpha1.5", share(45), 150)
    record(tmp_path, "continued/next-aligned_alpha1.5/step_0250", share(later), 250)
    return runs.Runs(tmp_path)


@pytest.mark.parametrize(
    ("later", "want"), [(53, "does not hold"), (60, "holds"), (59, "undecided")]
)
def test_not_worse_needs_the_whole_interval_in_a_single_run_too(tmp_path, later, want):
    """7 problems of 100 fewer are -7.0 +- 5.1 points.

    One fewer is -1 +- 2, which may be worse by more than a point.
    """
    found = one_run(tmp_path, later)
    cells = claims.column(found, "next-aligned")
    assert cells["Tables 3, 4: at 250 steps not worse than GRPO at 400"].startswith(f"**{want}**")


def test_a_claim_needs_all_that_it_is_about(tmp_path):
    """Alpha 1.5 alone is no sweep; a reference run that is not measured, or shorter, is none."""
    found = one_run(tmp_path, 55)
    cells = claims.column(found, "next-aligned")
    sweep = "Fig. 6: the jump gains at every alpha of 0.5, 1, 1.5, 2, 2.5; the least"
    assert cells[sweep] == ""
    for alpha in (0.5, 1, 2, 2.5):
        record(tmp_path, f"extrapolated/next-aligned_alpha{alpha:g}", share(50), 150)
    assert claims.column(runs.Runs(tmp_path), "next-aligned")[sweep].startswith("**holds**: +5.0 ")
    record(tmp_path, "extrapolated/next-aligned_alpha2.5", share(39), 150)
    cells = claims.column(runs.Runs(tmp_path), "next-aligned")
    assert cells[sweep].startswith("**undecided**: -1.0 ")
    record(tmp_path, "extrapolated/next-aligned_alpha0.5", share(30), 150)
    cells = claims.column(runs.Runs(tmp_path), "next-aligned")
    assert cells[sweep].startswith("**does not hold**: -10.0 ")
    # A wide interval, whose end is lower, decides nothing.
    wide = share(0, 40) + share(40, 60)
    record(tmp_path, "extrapolated/next-aligned_alpha2", wide, 150)
    cells = claims.column(runs.Runs(tmp_path), "next-aligned")
    assert cells[sweep].startswith("**does not hold**: -10.0 ")
    for path in (tmp_path / "eval").glob("train__step_0[24]*"):
        (path / "test.json").unlink()
    log(tmp_path / "train", range(1, 151))
    log(tmp_path / "continued" / "next-aligned_alpha1.5", range(151, 251))
    took(tmp_path, 10.0, 100.0)
    short = runs.Runs(tmp_path)
    assert short.reference == 0
    page = claims.page(short)
    missing = page.split("Not measured: ")[1]
    assert "not worse than a longer run of GRPO" in missing
    assert "less time than a longer run of GRPO" in missing
    assert "better than RLOO alone" in missing


def test_more_time_is_not_called_less(tmp_path):
    one_run(tmp_path, 55)
    log(tmp_path / "train", range(1, 401), 0.1)
    log(tmp_path / "continued" / "next-aligned_alpha1.5", range(151, 251), 1.0)
    took(tmp_path, 0.0, 0.0)
    found = runs.Runs(tmp_path)
    cell = claims.time_saved(found.later("next-aligned"), found.at(400))
    assert cell == "**does not hold**: 116 against 40 s, 190.0% more"
    log(tmp_path / "train", range(1, 401), 0.38)
    found = runs.Runs(tmp_path)  # two runs of the same command differ as much
    cell = claims.time_saved(found.later("next-aligned"), found.at(400))
    assert cell.startswith("**undecided**: 158 against 152 s")


def test_a_run_without_rl_after_a_jump_has_its_accuracy_by_step_too(tmp_path):
    record(tmp_path, "train/step_0010", share(20), 10)
    assert figures.accuracy(runs.Runs(tmp_path)) is None  # no curve through one point
    record(tmp_path, "train/step_0020", share(30), 20)
    (axis,) = figures.accuracy(runs.Runs(tmp_path)).axes
    ((curve, *_),) = axis.containers
    assert curve.get_xydata().tolist() == [[10, 20], [20, pytest.approx(30)]]


def test_jumps_from_another_trainers_checkpoints_are_compared_with_none(tmp_path):
    """No train folder, no stage 1: `none` is the policy before the jump; differences are paired."""
    record(tmp_path, "backbone", share(30))
    record(tmp_path, "extrapolated/none", share(40), 150)
    record(tmp_path, "extrapolated/next-aligned_alpha1.5", share(47), 150)
    page = report.page(runs.Runs(tmp_path), "")
    assert "| before the jump | 150 | – | 100 | 40.0 ± 4.9 |" in page
    jumped = next(line for line in page.splitlines() if line.startswith("| NExt (aligned) |"))
    assert "| 1.5 | 100 | 47.0 ± 5.0 | +7.0 [+1.9, +12.1] |" in jumped
    assert "**holds**: +7.0 [+1.9, +12.1]" in page
    assert "stage" not in page


@pytest.fixture
def grid(tmp_path) -> runs.Runs:
    """Three seeds on 100 problems: GRPO right on 50, 60, 70 of them at 250 steps; the weighted sum
    on 1, 2, 3 more; repeat-last on 7, 1, 1 fewer.
    """
    for seed in (0, 1, 2):
        run, right = tmp_path / f"seed{seed}" / "lora", 50 + 10 * seed
        record(run, "train/step_0150", share(40), 150)
        record(run, "train/step_0250", share(right), 250)
        record(run, "train/step_0400", share(90), 400)
        for start, more in (
            ("weighted_alpha1.5", seed + 1),
            ("repeat-last_alpha1.5", (-7, -1, -1)[seed]),
        ):
            record(run, f"extrapolated/{start}", share(45), 150)
            record(run, f"continued/{start}/step_0250", share(right + more), 250)
    record(tmp_path / "seed0" / "lora", "backbone", share(30))
    return runs.Runs(tmp_path, [0, 1, 2])


def test_differences_are_paired_by_seed_with_students_interval(grid):
    found = grid.later("weighted") - grid.at(250)
    assert found.mean == pytest.approx(0.02)
    assert found.half == pytest.approx(
        4.303 * 0.01 / 3**0.5
    )  # t(2 degrees, 97.5%) times the standard error of 1, 2, 3 points
    assert found.verdict() == "undecided"  # 2 +- 2.5 points
    assert (grid.at(250) - grid.at(400)).verdict() == "does not hold"
    assert estimates.over_seeds([0.0, 0.0, 0.0]).verdict(not_worse=True) == "holds"
    assert not grid.at(250) - grid.at(250)  # nothing to compare
    assert estimates.over_seeds([0.01, 0.02]).verdict() == "undecided"
    assert estimates.over_seeds([0.01, 0.011, 0.012]).verdict() == "holds"
    assert estimates.over_seeds([0.5]).verdict() == "undecided"
    nan = float("nan")  # the energy ratio of a step in which nothing moved
    assert estimates.over_seeds([nan, 0.5, 0.5]).plain() == "0.500 ± 0.000"
    assert estimates.over_seeds([nan, nan]).plain() == "nan"


def test_the_main_table_counts_steps_per_point_gained_and_leaves_out_what_was_not_run(grid):
    lines = tables.main_table(grid).splitlines()
    assert lines[2].startswith("| Backbone | 0 | – | 1 | 30.0 | – |")
    ours = next(line for line in lines if line.startswith("| weighted sum"))
    assert ours.split(" | ")[1:8] == [
        "250",
        "1.5",
        "3",
        "62.0 ± 6.4",
        "+2.0 [-0.5, +4.5]",
        "-28.0 [-55.3, -0.7]",
        "7.8",
    ]  # 250 / (62 - 30)
    assert not any("full parameters" in line or "RELEX" in line for line in lines)


def test_claims_name_a_verdict_and_its_numbers(grid):
    lines = {line.split(" | ")[0].strip("| "): line for line in claims.page(grid).splitlines()}
    assert "**undecided**: +2.0 [-0.5, +4.5]" in lines["Tables 3, 4: at 250 steps better than GRPO"]
    assert "**undecided**: -28.0" in lines["Tables 3, 4: at 250 steps not worse than GRPO at 400"]
    assert "+5.0" in lines["(control) at 250 steps better than repeat-last"]  # mean of 8, 3, 4


def test_a_seed_that_was_trained_otherwise_is_left_out_of_the_grids_means(grid):
    for seed, rate in ((0, 1e-3), (1, 1e-3), (2, 1e-2)):
        trained_with(grid.folder(seed) / "train", learning_rate=rate)
    found = runs.Runs(grid.root, [0, 1, 2])
    assert found.count(found.at(250)) == "2"
    assert any(
        line.startswith("seed2/lora/train/step_0250: 70.0%, trained with learning_rate")
        for line in found.left_out
    )


def test_report_writes_tables_and_types_nothing(tmp_path, monkeypatch):
    record(tmp_path / "seed0" / "lora", "train/step_0150", share(50), 150)
    monkeypatch.setattr(reproduce, "Runner", None)
    argv = ["reproduce", "--preset", "demo", "--grid", "main", "--seeds", "0", "--report"]
    monkeypatch.setattr("sys.argv", [*argv, "--run-dir", str(tmp_path), "--beside", str(tmp_path)])
    reproduce.main()
    assert "50.0" in (tmp_path / "tables.md").read_text()


def test_of_another_trainers_checkpoints_the_last_is_the_policy_before_the_jump(tmp_path):
    for policy, right in (("checkpoint-140", 30), ("checkpoint-150", 40)):
        record(tmp_path, policy, share(right))
        (tmp_path / policy / "checkpoint.json").unlink()
    record(tmp_path, "extrapolated/next-aligned_alpha1.5", share(47), 150)
    found = runs.Runs(tmp_path)
    assert found.before.policy == "checkpoint-150"
    assert "| another trainer's RL | 150 |" in tables.main_table(found)
    assert "+7.0" in tables.jumps_table(found)
    record(tmp_path, "train/step_0150", share(41), 150)
    assert runs.Runs(tmp_path).before.policy == "train/step_0150"


def test_what_another_trainer_makes_of_a_jump_is_no_plain_rl(tmp_path):
    """In continued/ its steps count from the jump; in another folder they are not known."""
    after = "continued/next-aligned_alpha1.5/checkpoint-100"
    for policy, right in ((after, 60), ("after/checkpoint-100", 61)):
        record(tmp_path, policy, share(right))
        (tmp_path / policy / "checkpoint.json").unlink()
    for step, right in ((100, 30), (150, 40), (250, 50)):
        record(tmp_path, f"checkpoint-{step}", share(right))
        (tmp_path / f"checkpoint-{step}" / "checkpoint.json").unlink()
    record(tmp_path, "extrapolated/next-aligned_alpha1.5", share(47), 150)
    found = runs.Runs(tmp_path)
    assert [m.policy for m in found.plain()] == [f"checkpoint-{step}" for step in (100, 150, 250)]
    assert (found.prefix, found.total) == (150, 250)
    table = tables.main_table(found)
    assert re.search(r"\| NExt \(aligned\) \| 250 \|.* \+10\.0 \[", table)
    assert "| after/checkpoint-100 | – |" in table
    assert "NExt (aligned) is better than GRPO at 250 RL steps" in rates.sentence(found)
    assert "| Tables 3, 4: at 250 steps better than GRPO | " in claims.page(found)
    (tmp_path / after).rename(tmp_path / "continued" / "none_merged")  # of a merged restart
    record(tmp_path, "extrapolated/none", share(40), 150)
    record(tmp_path, "continued/none_merged/checkpoint-90", share(44))
    (tmp_path / "continued/none_merged/checkpoint-90/checkpoint.json").unlink()
    assert runs.Runs(tmp_path).get("continued/none_merged/step_0240").steps == 240
    ours = "continued/next-aligned_alpha1.5/step_0250"
    record(tmp_path, ours, share(60), 250)
    (tmp_path / ours / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"step_0250/checkpoint\.json is missing"):
        runs.Runs(tmp_path)


def test_what_is_measured_elsewhere_has_no_cost_in_our_run(tmp_path):
    one_run(tmp_path, 55)
    log(tmp_path / "train", range(1, 401))
    for name in ("mine", "checkpoint-100"):  # --policies mine=/a/folder
        record(tmp_path, name, share(50))
        (tmp_path / name / "checkpoint.json").unlink()
    found = runs.Runs(tmp_path)
    assert (found.get("mine").steps, found.get("mine").seconds) == (0, None)
    assert (found.get("checkpoint-100").steps, found.get("checkpoint-100").seconds) == (100, None)
    assert "| mine | – | – | 100 | 50.0" in tables.main_table(found)


def test_what_has_no_cost_file_has_no_cost_and_what_ended_sooner_has_a_row(tmp_path):
    one_run(tmp_path, 55)
    log(tmp_path / "train", range(1, 151))
    record(tmp_path, "continued/none/step_0200", share(50), 200)
    record(tmp_path, "continued/next-aligned_alpha1e-05/step_0250", share(50), 250)
    found = runs.Runs(tmp_path)
    assert found.later("next-aligned").seconds is None  # no deltas/done.json
    assert found.get("continued/none/step_0200").seconds is None  # no metrics.jsonl
    table = tables.main_table(found)
    assert "| restart without a jump (control) | 200 |" in table
    assert "none" not in rates.gained(found)[250]  # which is after 250 steps
    assert "| NExt (aligned), alpha 1e-05 | 250 |" in table


def test_the_cosine_of_a_jump_is_that_of_the_dense_matrices(tmp_path):
    """On a run with checkpoints 1 to 3 and k = 1, whose jump is made from 2."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731

    def adapter(path: str, rank: int, alpha: float) -> adapters.Adapter:
        factors = {m: (draw(6, rank), draw(rank, 5)) for m in "xy"}
        made = adapters.Adapter({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}, factors)
        adapters.write_adapter(tmp_path / path, made, {"step": 2})
        return made

    last = adapter("train/step_0002", 2, 1.0)
    jumped = adapter("extrapolated/next-aligned_alpha1.5", 3, 2.0)
    future = adapter("train/step_0003", 2, 1.0)
    index = {"steps": [1, 2], "k": 1, "modules": ["x", "y"], "backbone": "b"}
    index["checkpoints"] = {"1": "train/step_0001", "2": "train/step_0002"}
    run_dir.write_json(tmp_path / "deltas" / "index.json", index)
    expected = []
    for module in "xy":
        w, w_hat, w_true = (a.update(module).dense() for a in (last, jumped, future))
        pair = ((w_hat - w).flatten(), (w_true - w).flatten())
        expected.append(torch.nn.functional.cosine_similarity(*pair, 0).item())
    (tmp_path / "eval").mkdir()
    found = runs.Runs(tmp_path).jump_cosines()["extrapolated/next-aligned_alpha1.5"]
    assert found.mean == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_a_small_grid_is_interrupted_goes_on_and_writes_its_tables(tmp_path):
    preset, root = tmp_path / "small.yaml", tmp_path / "grid"
    swept = {"sweep": ["2e-3"], "validation_data": "{run_dir}/data/valid.jsonl", "jobs": 2}
    preset.write_text(yaml.safe_dump({"base": TINY, "reproduce": {"launch": "python", **swept}}))
    command = [sys.executable, "-m", "common.reproduce", "--preset", str(preset)]
    command += ["--grid", "sweep", "--seeds", "0", "--run-dir", str(root)]
    assert "done already" in interrupted(command, "06_eval.py")
    assert "| 0.002 | 1 |" in (root / "tables.md").read_text()
    values = json.loads((root / "results.json").read_text())
    assert {value["run"] for value in values} == {"lora", "rate2e-3"}
    assert (root / "figures" / "rates.png").is_file()


def test_lora_and_all_parameters_are_compared_seed_by_seed_and_one_seed_decides_nothing(tmp_path):
    levels = {(0, "lora"): 0.9, (1, "lora"): 0.2, (2, "lora"): 0.21}
    levels |= {(1, "full"): 0.3, (2, "full"): 0.31}
    for (seed, name), level in levels.items():
        folder = tmp_path / f"seed{seed}" / name / "deltas"
        folder.mkdir(parents=True)
        fit = [{"held_out": -1.0, "in_sample": 0.9}]
        ratios = [level, level + 0.01 * (seed + 1), level]
        spectrum = {"steps": [1, 2, 3], "energy_ratio": ratios, "linear_fit": fit}
        (folder / "spectrum.json").write_text(json.dumps(spectrum))
    text = claims.section3(runs.Runs(tmp_path, [0, 1, 2]))
    assert "it is higher with LoRA: **does not hold**: without, 0.305 ± 0.005 at step 1" in text
    text = claims.section3(runs.Runs(tmp_path, [0, 1]))
    assert "it is higher with LoRA: without, 0.300 at step 1" in text
    assert "**" not in claims.section3(runs.Runs(tmp_path, [1]))


# --------------------------------------------------------------------------------------------------
# Several models
# --------------------------------------------------------------------------------------------------


def paper_run(root: pathlib.Path, size: str, right: int, device: str = "NVIDIA A800") -> None:
    """What the paper measures of a model on GPQA: 400 steps of GRPO, and NExt at 250."""
    main = root / "seed0" / "lora"
    model = f"Qwen/Qwen2.5-{size}-Instruct"
    trained_with(main / "train", backbone=model, learning_rate=5e-6)
    run_dir.write_json(main / "train" / "done.json", {"processes": 4, "device": device})
    log(main / "train", range(1, 401), seconds=90.0)
    took(main, 900.0, 450.0, "paper")
    for policy, step, more in (
        ("train/step_0150", 150, 0),
        ("train/step_0400", 400, 0),
        ("extrapolated/next-paper_alpha1.5", 150, 1),
        ("continued/next-paper_alpha1.5/step_0250", 250, 2),
    ):
        record(main, policy, share(right + more), step, "gpqa-diamond")
    log(main / "continued" / "next-paper_alpha1.5", range(151, 251), seconds=90.0)


def test_models_stand_beside_one_another_in_gpu_hours(tmp_path, monkeypatch):
    """Four GPUs, 90 s a step: an hour of all four is 10 steps."""
    for size, right in (("1.5B", 20), ("3B", 30)):
        paper_run(tmp_path / size, size, right)
    page = runs.Runs(tmp_path / "1.5B", [0])
    page.beside = [runs.Runs(tmp_path / "3B", [0])]
    (axis,) = sizes.cost(page).axes
    assert axis.get_xlabel() == "GPU hours: wall hours × GPUs"
    assert [text.get_text() for text in axis.get_yticklabels()] == [
        "Qwen2.5-3B-Instruct: NExt (paper), 250 steps (the paper: 46.8)",
        "Qwen2.5-3B-Instruct: GRPO with LoRA, 400 steps (the paper: 74.8)",
        "Qwen2.5-1.5B-Instruct: NExt (paper), 250 steps (the paper: 29.6)",
        "Qwen2.5-1.5B-Instruct: GRPO with LoRA, 400 steps (the paper: 48)",
    ]
    shown = [text.get_text().strip() for text in axis.texts]
    assert shown[:4] == ["26.5", "SVD 1, predictor 0.5, extrapolation 0.0011", "40", ""]
    left, right = sizes.gpqa(page).axes
    assert [round(bar.get_height(), 1) for bar in left.patches] == [20, 30, 22, 32]
    assert [round(bar.get_height(), 1) for bar in right.patches] == [40, 40, 26.5, 26.5]
    argv = ["reproduce", "--preset", "demo", "--grid", "paper", "--seeds", "0", "--report"]
    monkeypatch.setattr("sys.argv", [*argv, "--run-dir", str(tmp_path / "1.5B"), "--beside", "x"])
    page.beside *= 2  # the same model twice: each has its bars
    assert len(sizes.cost(page).axes[0].get_yticklabels()) == 6
    with pytest.raises(UserError, match="nothing of this grid was measured there"):
        reproduce.main()
    # Of a training that was stopped, stage 6 knows the GPUs.
    main = tmp_path / "3B" / "seed0" / "lora"
    (main / "train" / "done.json").unlink()
    assert results.made_on(main) == ("Qwen2.5-3B-Instruct", 0)
    run_dir.write_json(main / "eval" / "a" / "test.json", {"device": "NVIDIA", "processes": 2})
    assert results.made_on(main) == ("Qwen2.5-3B-Instruct", 2)
    # Where one of them had no GPU, all are in seconds.
    paper_run(tmp_path / "cpu", "7B", 40, "cpu")
    page.beside = [runs.Runs(tmp_path / "cpu", [0])]
    assert sizes.cost(page).axes[0].get_xlabel() == "wall seconds"
    assert "the paper" not in str([*sizes.cost(page).axes[0].get_yticklabels()])
    page.beside = []
    main = tmp_path / "1.5B" / "seed0" / "lora"
    (main / "eval" / "train__step_0400" / "gpqa-diamond.json").unlink()
    record(main, "train/step_0250", share(20), 250, "gpqa-diamond")
    shorter = runs.Runs(tmp_path / "1.5B", [0])  # the paper's hours are of 400 steps
    labels = [text.get_text() for text in sizes.cost(shorter).axes[0].get_yticklabels()]
    assert labels[-1] == "GRPO with LoRA, 250 steps"
    assert "fig7_gpqa.png" in report.page(page, "")
    assert sizes.gpqa(runs.Runs(tmp_path, [0])) is None
