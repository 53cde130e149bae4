"""The page on verl: its commands have verl's keys and the paper's numbers, its scripts run."""

import concurrent.futures
import importlib.metadata
import json
import re
import shlex

import pytest
import yaml
from conftest import ROOT

from common.files.config import load_preset

PAGE = (ROOT / "common" / "rl" / "README.md").read_text(encoding="utf-8").split("\n## verl\n")[1]
REWARD, DATA = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMAND = re.search(r"^python -m verl\.trainer\.main_ppo.*?[^\\]$", PAGE, re.S | re.M)[0]
GIVEN = dict(word.split("=", 1) for word in shlex.split(COMMAND.replace("\\\n", "")) if "=" in word)


def test_the_numbers_are_those_of_the_papers_preset():
    train = load_preset("paper")["train"]
    keys = {
        "data.train_batch_size": "prompts_per_step",
        "data.max_prompt_length": "max_prompt_tokens",
        "data.max_response_length": "max_new_tokens",
        "actor_rollout_ref.model.lora_rank": "lora_rank",
        "actor_rollout_ref.model.lora_alpha": "lora_alpha",
        "actor_rollout_ref.actor.optim.lr": "learning_rate",
        "actor_rollout_ref.actor.ppo_mini_batch_size": "mini_batch",
        "actor_rollout_ref.actor.kl_loss_coef": "kl_coef",
        "actor_rollout_ref.rollout.n": "rollouts",
        "trainer.total_training_steps": "steps",
        "trainer.save_freq": "save_every",
    }
    assert {ours: float(GIVEN[key]) for key, ours in keys.items()} == {
        ours: train[ours] for ours in keys.values()
    }
    assert GIVEN["algorithm.adv_estimator"] == train["algorithm"]
    assert GIVEN["actor_rollout_ref.actor.loss_agg_mode"] == f"{train['loss_aggregation']}-mean"


def test_the_keys_are_in_verls_own_configuration():
    try:
        files = importlib.metadata.files("verl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("verl is not installed: pip install --no-deps verl==0.9.1")
    (path,) = [f for f in files if f.name == "_generated_ppo_trainer.yaml"]
    known = yaml.safe_load(path.locate().read_text(encoding="utf-8"))
    later = re.search(r"`(actor_rollout_ref\.model\.lora_adapter_path)=", PAGE)[1]
    for key in [*GIVEN, later]:
        inside = known
        for part in key.split("."):
            assert part in inside, key
            inside = inside[part]


def test_the_reward_scores_as_verl_calls_it():
    code = {}
    exec(REWARD, code)
    asked = [(r"so \boxed{12}", "12", 1.0), (r"\boxed{13}", "12", 0.0), ("12", "12", 0.0)] * 8

    def call(row):
        given = {"data_source": "number", "solution_str": row[0], "ground_truth": row[1]}
        return code["compute_score"](**given, extra_info={"num_turns": 2})

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert [*threads.map(call, asked)] == [row[2] for row in asked]
    code["judge"].close()


def test_the_problems_get_verls_columns(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n")
    monkeypatch.chdir(tmp_path)
    exec(DATA.replace("dapo-math-17k", "p.jsonl"), {})
    (row,) = datasets.load_dataset("parquet", data_files="train.parquet", split="train")
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"].startswith("1 + 1?")
    assert row["reward_model"] == {"ground_truth": "2"}
    assert row["data_source"] in ("latex", "number")
