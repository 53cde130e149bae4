"""Runs at several learning rates on one page: what is compared with what, and when nothing is."""

import re

import numpy as np
import pytest
from test_grid import log, record, share, trained_with

from common import UserError
from common.files import config, write
from common.reproduce import estimates, plans, rates, report, results, runs


def run_at(folder, rate: float, plain: tuple, jumped: int | None = None, after: int | None = None):
    """Steps 2 to 4 of plain GRPO, a jump from step 2, and step 3 after it and without it."""
    measured = {f"train/step_{step:04d}": n for step, n in zip((2, 3, 4), plain, strict=True)}
    if jumped is not None:
        measured["extrapolated/next-aligned_alpha1.5"] = jumped
        measured["continued/next-aligned_alpha1.5/step_0003"] = after
        measured["continued/none_linear/step_0003"] = after + 1
    for policy, right in measured.items():
        step = int(policy[-1]) if "step" in policy else 2
        record(folder, policy, share(right), step)
        if not policy.startswith("extrapolated"):
            linear = "linear" if "linear" in policy else "constant"
            options = {"learning_rate": rate, "learning_rate_schedule": linear, "steps": step}
            trained_with((folder / policy).parent, **options)


@pytest.fixture
def demo(tmp_path):
    """A run at 0.001, and in it one at 0.0005 (with a jump too) and one at 0.002 (without)."""
    run_at(tmp_path, 0.001, (40, 60, 70), 42, 61)
    run_at(tmp_path / "rate0.0005", 0.0005, (10, 20, 30), 15, 26)
    run_at(tmp_path / "rate0.002", 0.002, (45, 55, 58))
    return runs.Runs(tmp_path)


def numbers(table: str, label: str) -> list[str]:
    """The cells of the row that begins with `label`, without the intervals."""
    row = next(line for line in table.splitlines() if line.startswith(f"| {label} "))
    return [cell.split("[")[0].strip() for cell in row.split("|")[2:-1]]


def test_the_sentence_says_what_the_jump_is_worth_at_each_rate_and_what_the_rate_is(demo):
    text = rates.sentence(demo)
    start = "**In one training run, NExt (aligned) is better than GRPO at 3 RL steps, in points: "
    start += "holds at learning rate "
    assert text.startswith(f"{start}0.0005, +6.0 [")
    assert "; undecided at learning rate 0.001, +1.0 [" in text
    gap = (demo.at(3) - demo.of("rate0.0005").at(3)).points()
    assert text.endswith(f".** Learning rate 0.001 in place of 0.0005 is worth {gap}.")


def test_every_gain_is_over_the_same_rate_but_for_the_controls_at_a_larger_one(demo):
    late, levels, jump, far = rates.page(demo).split("\n\n")
    assert numbers(far, "NExt (aligned), alpha 1.5") == ["+5.0", "+2.0"]
    assert [cell.split(" ")[0] for cell in numbers(levels, "0.001")[1:4]] == [
        "40.0",
        "60.0",
        "70.0",
    ]
    assert numbers(levels, "0.002")[0] == "100"
    assert numbers(jump, "NExt (aligned)") == ["+5.0", "+2.0"]
    assert numbers(late, "NExt (aligned)") == ["+6.0", "+1.0"]
    assert numbers(late, "no jump, rate falls to 0 (control)") == ["+7.0", "+2.0"]
    assert numbers(late, "GRPO at twice the rate") == ["+40.0", "-5.0"]
    assert numbers(late, "GRPO at four times the rate") == ["+35.0", "–"]


def test_a_second_jump_is_compared_with_grpo_at_its_own_rate(tmp_path):
    for seed in (0, 1):
        top = tmp_path / f"seed{seed}"
        run_at(top / "lora", 0.001, (40, 60, 70), 42, 61)
        run_at(top / "rate0.0005", 0.0005, (10, 20, 30), 15, 26)
        for start, right in (("next-aligned_alpha1.5", 27), ("none", 24)):
            policy = f"continued/{start}/step_0002"
            record(top / "second", policy, share(right + seed), 2)
            trained_with((top / "second" / policy).parent, learning_rate=0.0005)
    text = rates.page(runs.Runs(tmp_path, [0, 1]))
    merged = "NExt (aligned), merged; half-way"
    assert numbers(text, f"{merged} another jump") == ["+7.5", "–", "–"]
    assert numbers(text, f"{merged} no other jump") == ["+4.5", "–", "–"]


def test_without_rl_after_the_jump_the_page_begins_with_the_jump_itself(tmp_path):
    record(tmp_path, "extrapolated/none", share(50), 2)
    record(tmp_path, "extrapolated/next-aligned_alpha1.5", share(40), 2)
    text = rates.sentence(runs.Runs(tmp_path))
    assert text.startswith("**In one training run, NExt (aligned) is better right after the jump")
    assert "points: does not hold, -10.0 [" in text
    record(tmp_path, "train/step_0003", share(50), 3)
    record(tmp_path, "continued/next-paper_alpha1.5/step_0003", share(56), 3)
    record(tmp_path, "extrapolated/next-paper_alpha1.5", share(50), 2)
    text = rates.sentence(runs.Runs(tmp_path))  # of what RL has followed
    assert "NExt (paper) is better than GRPO at 3 RL steps, in points: holds, +6" in text


def test_the_page_of_one_rate_says_nothing_of_rates(tmp_path):
    run_at(tmp_path, 0.001, (40, 60, 70), 42, 61)
    assert rates.page(runs.Runs(tmp_path)) == ""
    page = report.page(runs.Runs(tmp_path), "")
    assert "learning rate is worth" not in page
    top = page.split("\n\n")[2]
    assert "is better than GRPO at 3 RL steps, in points: undecided, +1.0 [" in top
    assert "## What the words mean" in page


def test_the_page_begins_with_the_rates_and_has_both_figures(demo):
    page = report.page(demo, "made by a test")
    assert page.index("What the learning rate is worth") < page.index("Tables 3 and 4")
    assert (demo.root / "figures" / "rates.png").is_file()
    assert (demo.root / "figures" / "rates_gain.png").is_file()
    # The claims are judged at each rate that has a jump.
    slow, tuned = page.split("## The paper's claims, in one training run, at learning rate ")[1:]
    assert slow.startswith("0.0005")
    assert tuned.startswith("0.001")
    assert "**holds**: +6.0 [" in slow
    assert "**undecided**: +1.0 [" in tuned


def test_a_sweep_has_the_accuracy_at_each_rate_and_nothing_of_jumps(tmp_path):
    for seed in (10, 11):
        run_at(tmp_path / f"seed{seed}" / "lora", 0.001, (40, 60, 70 + seed))
        run_at(tmp_path / f"seed{seed}" / "rate0.01", 0.01, (45, 55, 58))
    text = rates.page(runs.Runs(tmp_path, [10, 11]))
    assert "worth" not in text
    assert "twice" not in text
    assert numbers(text, "0.001")[:4] == ["2", "40.0 ± 0.0", "60.0 ± 0.0", "80.5 ± 0.5"]
    page = report.page(runs.Runs(tmp_path, [10, 11]), "made by a test")
    assert "figures/rates.png" in page
    assert "rates_gain" not in page


def backtest(folder, cosine: float):
    rows = {"at_step": 1, "predicts_step": 2, "predictor": {"cosine": cosine}}
    rows["weighted"] = {"cosine": 9.0}
    curves = {"losses": {}, "loss_of_zeros": {}, "loss_stride": 1}
    write.write_json(folder / "predictor/aligned/report.json", {**curves, "backtest": rows})


def test_a_cosine_stands_beside_the_gain_of_its_own_run_and_method(tmp_path):
    for seed, cosines in enumerate(((0.5, 0.1), (0.6, 0.2), (0.7, 0.3))):
        for name, rate, cosine in zip(("rate0.0005", "lora"), (5e-4, 1e-3), cosines, strict=True):
            folder = tmp_path / f"seed{seed}" / name
            run_at(folder, rate, (40, 60, 70), 40 + int(10 * cosine), 60 - int(10 * cosine))
            backtest(folder, cosine)
    found = runs.Runs(tmp_path, [0, 1, 2])
    points = rates.points(found, "next-aligned")
    assert sorted(point[:2] for point in points) == [
        pytest.approx((n / 10, n)) for n in (1, 2, 3, 5, 6, 7)
    ]
    assert rates.points(found, "weighted") == []  # it was not measured
    row = numbers(rates.meter(found), "NExt (aligned)")
    assert row[:2] == ["6", "+1.00"]
    assert row[2] == "+1.00"  # within each rate too
    assert row[3:] == ["-1.00", "–"]  # more RL undid it; three runs have one at twice the rate
    assert "figures/rates_cosine.png" in report.page(found, "made by a test")


def test_a_run_that_training_broke_says_nothing_of_jumps(tmp_path):
    record(tmp_path, "backbone", share(10), 0)
    for folder, rate, before in ((tmp_path, 0.001, 40), (tmp_path / "rate0.004", 0.004, 5)):
        run_at(folder, rate, (before, 60, 70), before + 2, 61)
        backtest(folder, 0.3)
    [point] = rates.points(runs.Runs(tmp_path), "next-aligned")
    assert point == pytest.approx((0.3, 2.0, 0.001))


def test_a_rank_correlation_is_that_of_the_ranks_and_too_few_runs_have_none():
    rho = estimates.rank_correlation([(1, 10), (2, 1000), (3, 20), (4, 30), (5, 40), (6, 40)])
    oracle = np.corrcoef([1, 2, 3, 4, 5, 6], [1, 6, 2, 3, 4.5, 4.5])[0, 1]
    assert rho.startswith(f"{oracle:+.2f} [")
    assert estimates.rank_correlation([(1, 2), (2, 3), (3, 4), (4, 5)]) == ""
    assert estimates.rank_correlation([(x, 2) for x in range(6)]) == ""


def test_within_groups_what_lies_between_them_does_not_count():
    rising = [(10 * g + x, 100 * g - x, g) for g in range(3) for x in (1, 2, 4)]
    assert estimates.rank_correlation([p[:2] for p in rising]).startswith("+0.8")
    assert estimates.within_groups(rising).startswith("-1.00 [")
    assert estimates.within_groups([*rising, (99, 99, 3)]) == estimates.within_groups(rising)
    assert estimates.within_groups(rising[:3]) == ""  # three points


def test_before_any_rl_after_a_jump_there_is_a_page_too(tmp_path):
    for folder, rate in ((tmp_path, 0.001), (tmp_path / "rate0.0005", 0.0005)):
        run_at(folder, rate, (40, 60, 70))
        record(folder, "extrapolated/next-aligned_alpha1.5", share(42), 2)
    assert numbers(rates.page(runs.Runs(tmp_path)), "0.001")[1].startswith("40.0")


def test_a_rate_at_which_training_breaks_down_at_any_time_is_not_drawn(tmp_path):
    record(tmp_path, "backbone", share(10), 0)
    run_at(tmp_path, 0.001, (40, 60, 70))
    run_at(tmp_path / "rate0.002", 0.002, (45, 2, 3))
    axis = rates.accuracy(runs.Runs(tmp_path)).axes[0]
    assert axis.get_title() == "not shown: 0.002, where training broke down"
    assert {x for line in axis.lines for x in line.get_xdata()} == {0.001}


def test_a_gain_that_some_seeds_lack_says_how_many_have_it(tmp_path):
    for seed in (0, 1, 2):
        top = tmp_path / f"seed{seed}"
        run_at(top / "lora", 0.001, (40, 60, 70), 42, 61 + seed)
        run_at(top / "rate0.0005", 0.0005, (10, 20, 30), *((15, 26 + seed) if seed else ()))
    text = rates.page(runs.Runs(tmp_path, [0, 1, 2]))
    line = next(line for line in text.splitlines() if line.startswith("| NExt (aligned) |"))
    assert line.count("(2 of 3 seeds)") == 2  # of the lower rate, and of the difference
    assert numbers(text, "NExt (aligned)") == ["+7.5", "+2.0", "+5.0"]


def test_a_jump_back_has_its_alpha(tmp_path):
    record(tmp_path, "extrapolated/next-paper_alpha-0.5", share(50), 2)
    (found,) = results.load_results(tmp_path).values()
    assert (found.method, found.alpha) == ("next-paper", -0.5)
    assert found.label == "NExt (paper), alpha -0.5"


def test_what_goes_on_from_elsewhere_has_a_name_and_no_cost(tmp_path):
    log(tmp_path / "train", range(1, 3))
    record(tmp_path, "continued/mine/step_0003", share(50), 3)
    (found,) = results.load_results(tmp_path).values()
    assert (found.label, found.steps, found.seconds) == ("mine", 3, None)


def test_a_preset_that_only_names_next_still_gets_every_control():
    lines = [job.line for job in plans.grid("learning-rate", "p", {}, "runs/x", [0])]
    made = next(line for line in lines if " 04_" in line)
    assert f"--methods next weighted repeat-last none {plans.TABLES['swept']}" in made
    assert any("--start none --name none_linear" in line for line in lines)


def test_a_reference_run_ends_no_sooner_than_what_it_is_compared_with():
    with pytest.raises(UserError, match="reference_steps must be 250 or more"):
        plans.single("p", {"reproduce": {"reference_steps": 200}}, "runs/x")


def test_the_demo_runs_at_its_rate_and_at_a_tenth_and_ends_with_its_own_page():
    preset = {
        "train": {"steps": 2, "learning_rate": 0.001, "train_data": "{run_dir}/data/train.jsonl"},
        "reproduce": {"rates": ["0.0001"], "continue_from": ["none", "none_linear"]},
    }
    jobs = plans.single("p", preset, "runs/x")
    slow = [job for job in jobs if "--run-dir runs/x/rate0.0001" in job.line]
    assert len(slow) * 2 == len(jobs)
    trained = [job.line for job in slow if " 01_" in job.line or " 05_" in job.line]
    assert all("--learning-rate 0.0001" in line for line in trained)
    assert all("--train-data runs/x/data/train.jsonl" in line for line in trained)
    linear = "--start none --name none_linear --learning-rate-schedule linear"
    assert sum(line.endswith(linear) for line in trained) == 1
    assert jobs[-1].name == "06"
    assert {job.name for job in jobs[:-1] if job not in slow} | {"rate0.0001 06"} >= {
        *jobs[-1].needs
    }
    assert {"rate0.0001 06", "01 reference", "04 oracle", "06 sweep"} <= {*jobs[-1].needs}


def test_a_rate_is_chosen_on_validation_problems_and_measured_on_test_problems():
    preset = config.load_preset("demo")
    chosen = plans.grid("sweep", "demo", preset, "runs/x", [10, 11])
    trained = [job.line for job in chosen if " 01_" in job.line]
    assert len(trained) == len({*trained}) == 16  # eight rates, two seeds
    measured = [job.line for job in chosen if " 06_" in job.line]
    assert all("valid.jsonl" in line and "test.jsonl" not in line for line in measured)
    lines = [job.line for job in plans.grid("learning-rate", "demo", preset, "runs/x", [0, 1, 2])]
    chosen = [line for line in lines if "valid.jsonl" in line]  # alpha, never anything else
    assert len(chosen) == 9
    assert all(line.endswith("--output validation") for line in chosen)
    accepted = [line for line in lines if "--accept" in line]
    assert len(accepted) == 18
    alphas = (plans.TABLES["swept"], "--alphas 4 8 16 32 64")  # what was measured
    assert all(line.endswith(alphas) for line in accepted)
    for seed, alone in ((0, 5), (1, 5), (2, 0)):  # of GRPO alone: fewer seeds
        own = [line for line in lines if f"/seed{seed}/" in line and " 01_" in line]
        assert len(own) == 6 + alone + 1  # the last after a jump


def test_the_paper_can_be_run_at_four_learning_rates_and_nothing_is_chosen_on_its_test_sets():
    preset = config.load_preset("paper_qwen2.5_1.5b")
    lines = [job.line for job in plans.grid("learning-rate", "p", preset, "runs/x", [0])]
    trained = [line for line in lines if " 01_" in line and "--steps 400" in line]
    found = [re.findall("--learning-rate (\\S+)", line) for line in trained]
    assert found == [[], ["1e-5"], ["2e-5"], ["1e-4"]]
    assert all("--accept" not in line and "validation" not in line for line in lines)


def test_a_jump_whose_alpha_was_chosen_is_charged_for_the_choice(tmp_path):
    log(tmp_path / "train", range(1, 3))
    write.write_json(tmp_path / "deltas" / "done.json", {"seconds": 10.0})
    for name in ("repeat-last_alpha0.5", "repeat-last_alpha1.5", "rl-extra_alpha1.5", "none"):
        measured = tmp_path / "validation" / f"extrapolated__{name}" / "valid.json"
        write.write_json(measured, {"seconds": 100.0})
    record(tmp_path, "extrapolated/repeat-last_accepted", share(50), 2)
    record(tmp_path, "extrapolated/repeat-last_alpha1.5", share(50), 2)
    chosen, plain = results.load_results(tmp_path).values()
    assert (chosen.seconds, plain.seconds) == (315.0, 15.0)  # two steps of 2 s, 10 s, 1 s
    assert chosen.label == "repeat-last (control), alpha chosen on validation problems"
