"""NExt on a run of TRL's own GRPOTrainer.

Needs TRL: python -m pytest tests/trl -c .pytest.ini -o addopts=-q
"""

import json
import sys

import pytest
import torch
from conftest import ROOT, call_main, lay_out
from datasets import load_dataset
from peft import LoraConfig, PeftModel

sys.path.remove(
    str(ROOT / "tests")
)  # where TRL would take the folder tests/vllm for the package vllm
from trl import GRPOConfig, GRPOTrainer

from common.files import adapters, deltas, series
from common.rl import policy, rewards
from common.rl.data import Problem
from common.rl.verifier import Verifier

STEPS = 9
JUMPED = "extrapolated/next-aligned_alpha1.5"


def solved(completions, answer, **_):
    return [
        float(f"\\boxed{{{right}}}" in text[0]["content"])
        for text, right in zip(completions, answer, strict=True)
    ]


def train(model, run, name, steps, **options):
    """Some steps of GRPO by TRL on the demo's sums, a checkpoint each in run/name.

    Returns the trainer.
    """
    config = GRPOConfig(
        output_dir=str(run / name),
        max_steps=steps,
        save_steps=1,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=56,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    problems = load_dataset(
        "json",
        data_files=str(run / "data" / "train.jsonl"),
        split="train",
        cache_dir=str(run / "cache"),
    )
    problems = problems.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = GRPOTrainer(
        model=model, reward_funcs=solved, args=config, train_dataset=problems, **options
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """TRL's run, then stages 2, 3 and 4 on its checkpoints."""
    folder = lay_out(tmp_path_factory.mktemp("trl") / "run")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        rank_pattern={"down_proj": 6},
        use_rslora=True,
    )
    train(str(folder / "backbone"), folder, "outputs", STEPS, peft_config=lora)
    common = ["--run-dir", str(folder), "--threads", "1"]
    series_of_9 = ("--checkpoints", str(folder / "outputs" / "checkpoint-*"), "--k", "2")
    call_main("02", *common, *series_of_9, "--fit-checkpoints", "6")
    call_main("03", *common)
    call_main("04", *common, "--methods", "next", "repeat-last", "none")
    return folder


def load(run, dtype=torch.float64):
    return policy.load_backbone(str(run / "backbone"))[0].to(dtype)


def test_trl_trained_and_every_checkpoint_was_read(run):
    assert deltas.load_trajectory(run / "deltas").steps == list(range(1, STEPS + 1))
    found = series.reopen(run)
    weights = {module: found.weights(module) for module in found.modules}
    assert len(weights) == 21
    assert all((W[STEPS] - W[1]).dense().any() for W in weights.values())
    assert {shape[1] for shape in found.shapes.values()} == {4, 6}
    tested = json.loads((run / "predictor" / "aligned" / "report.json").read_text())["backtest"]
    assert (tested["at_step"], tested["predicts_step"]) == (7, 9)


def predicted(run):
    """module -> u, sigma, v of the trained predictor."""
    return deltas.load_predicted(deltas.check_predicted(run, "aligned"))


def last_known(run):
    """module -> u, sigma, v of the last target."""
    found = deltas.load_trajectory(run / "deltas").deltas
    targets = {module: roles["target"] for module, roles in found.items()}
    return {m: {"u": t.u[-1], "sigma": t.sigma[-1], "v": t.v[-1]} for m, t in targets.items()}


@pytest.mark.parametrize(
    ("name", "triples"), [(JUMPED, predicted), ("extrapolated/repeat-last_alpha1.5", last_known)]
)
def test_peft_loads_the_jump_as_trls_last_checkpoint_plus_alpha_sigma_u_v(run, name, triples):
    ids = torch.tensor([[2, 7, 8, 9, 3, 5]])
    last = PeftModel.from_pretrained(
        load(run), run / "outputs" / f"checkpoint-{STEPS}", autocast_adapter_dtype=False
    ).merge_and_unload()
    before = last(input_ids=ids).logits
    for module, triple in triples(run).items():
        u, sigma, v = (triple[side].double() for side in ("u", "sigma", "v"))
        last.get_submodule(module).weight.data += 1.5 * sigma * torch.outer(u, v)
    by_hand = last(input_ids=ids).logits
    jumped = PeftModel.from_pretrained(load(run), run / name, autocast_adapter_dtype=False)(
        input_ids=ids
    ).logits
    assert (by_hand - before).abs().max() > 1e-2
    torch.testing.assert_close(jumped, by_hand, atol=1e-5, rtol=1e-5)


def test_stage_6_measures_the_jump_against_the_last_checkpoint(run, capsys):
    options = {
        "prompt-template": "{prompt}",
        "system-prompt": "",
        "max-prompt-tokens": 16,
        "max-new-tokens": 56,
        "runs": 1,
        "threads": 1,
    }
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    where = [
        "--run-dir",
        str(run),
        "--backbone",
        str(run / "backbone"),
        "--test-data",
        str(run / "data" / "test.jsonl"),
    ]
    call_main("06", *where, *flags, "--policies", "backbone", "extrapolated/*")
    assert "extrapolated/none  test: " in "".join(capsys.readouterr())
    report = (run / "report.md").read_text()
    assert "before the jump" in report
    assert "repeat-last (control)" in report
    assert "[" in next(
        line for line in report.splitlines() if line.startswith("| NExt (aligned)")
    )  # a paired difference
    assert "stages 1 and 2" not in report


def test_trl_trains_the_jumped_adapter_on(run):
    model = PeftModel.from_pretrained(load(run, torch.float32), run / JUMPED, is_trainable=True)
    trainer = train(model, run, "continued_by_trl", 1)
    assert trainer.state.global_step == 1
    start, end = (
        adapters.read_adapter(path)
        for path in (run / JUMPED, run / "continued_by_trl" / "checkpoint-1")
    )
    assert (
        adapters.read_header(run / "continued_by_trl" / "checkpoint-1").shapes
        == adapters.read_header(run / JUMPED).shapes
    )
    drift = max((end.factors[m][0] - start.factors[m][0]).abs().max().item() for m in start.factors)
    assert 0 < drift < 0.01
    assert all(end.scale(m) == pytest.approx(start.scale(m)) for m in start.factors)
    assert json.loads((run / JUMPED / "checkpoint.json").read_text())["step"] == STEPS


def test_trls_own_reward_functions_work_unchanged(tmp_path):
    mine = tmp_path / "mine.py"
    lines = "from trl.rewards import accuracy_reward, get_soft_overlong_punishment\n"
    mine.write_text(lines + "overlong = get_soft_overlong_punishment(4, 2)\n")
    names = ["verifier", f"{mine}:accuracy_reward=10", f"{mine}:overlong=100"]
    problems = [Problem("1+2", "3", columns={"solution": "$3$"})] * 2
    made = rewards.Rewards(names, Verifier(), problems)
    texts, tokens = ["\\boxed{3}", "\\boxed{4}"], [[1, 2, 3], [1, 2]]
    assert made.score(texts, problems, [True, True], tokens) == [1 + 10 - 50, 0]
