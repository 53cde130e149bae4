"""`--trainer verl`: verl's keys, the paper's numbers, our reward and data, its checkpoints."""

import concurrent.futures
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shlex
import shutil

import pytest
import safetensors.torch
import yaml
from conftest import ROOT, TINY

from common import UserError
from common.files import adapters, config
from common.reproduce import __main__ as main
from common.reproduce import plans, results, verl

SIZES = ("1.5b", "3b", "7b", "14b")
# Writes what verl's merger does: a whole model, and beside a backbone the adapter, whose alpha it
# takes for an integer, without patterns.
MERGER = """
import json, pathlib, shutil, sys
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "merge" and flags["--backend"] == "fsdp"
shutil.copytree(flags["--local_dir"], flags["--target_dir"], dirs_exist_ok=True)
path = pathlib.Path(flags["--target_dir"], "lora_adapter", "adapter_config.json")
if path.is_file():
    config = json.loads(path.read_text())
    config |= {"lora_alpha": int(config["lora_alpha"]), "rank_pattern": {}, "alpha_pattern": {}}
    path.write_text(json.dumps(config))
"""


@pytest.fixture
def merger(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "modules" / "verl" / "model_merger"
    folder.mkdir(parents=True)
    for path in (folder.parent / "__init__.py", folder / "__init__.py"):
        path.touch()
    (folder / "__main__.py").write_text(MERGER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "modules"), str(ROOT)]))


def typed(name: str, kind: str = "", flags: str = "", reproduce=()) -> list[list[str]]:
    """The words of every line that is shown for the preset `name`, or for its grid `kind`."""
    found = config.load_preset(name)
    found["reproduce"] |= reproduce
    jobs = plans.grid(kind, name, found, "runs/x", [0], range(3, 9)) if kind else ()
    jobs = jobs or plans.single(name, found, "runs/x")
    return [shlex.split(line) for line in verl.commands(jobs, name, "runs/x", flags)]


def preset(folder, **sections) -> str:
    """A preset on that of the paper's 7B."""
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"base": "paper_qwen2.5_7b", **sections}))
    return str(path)


def keys(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words[3:])


def trained(lines: list[list[str]]) -> list[dict[str, str]]:
    return [keys(words) for words in lines if words[2] == "verl.trainer.main_ppo"]


def test_the_numbers_are_those_of_the_papers_preset():
    train = config.load_preset("paper")["train"]
    names = {
        "data.train_batch_size": "prompts_per_step",
        "data.max_prompt_length": "max_prompt_tokens",
        "data.max_response_length": "max_new_tokens",
        "actor_rollout_ref.model.lora_rank": "lora_rank",
        "actor_rollout_ref.model.lora_alpha": "lora_alpha",
        "actor_rollout_ref.actor.optim.lr": "learning_rate",
        "actor_rollout_ref.actor.ppo_mini_batch_size": "mini_batch",
        "actor_rollout_ref.actor.kl_loss_coef": "kl_coef",
        "actor_rollout_ref.actor.clip_ratio_low": "clip_low",
        "actor_rollout_ref.rollout.n": "rollouts",
        "actor_rollout_ref.rollout.temperature": "temperature",
        "trainer.total_training_steps": "steps",
        "trainer.save_freq": "save_every",
    }
    first, longer, *later = trained(typed("paper_qwen2.5_7b"))
    assert {ours: float(first[key]) for key, ours in names.items()} == {
        ours: train[ours] for ours in names.values()
    }
    assert first["algorithm.adv_estimator"] == train["algorithm"]
    assert first["actor_rollout_ref.actor.loss_agg_mode"] == f"{train['loss_aggregation']}-mean"
    assert first["actor_rollout_ref.model.path"] == "Qwen/Qwen2.5-7B-Instruct"
    further = dict.fromkeys(("trainer.total_training_steps", "trainer.total_epochs"), "400")
    assert longer == first | further
    assert {words["trainer.total_training_steps"] for words in later} == {"100"}


@pytest.mark.parametrize("size", SIZES)
def test_verls_own_configuration_takes_every_command(size, tmp_path):
    if not importlib.util.find_spec("verl"):
        pytest.skip("pip install hydra-core; pip install --no-deps verl==0.9.1")
    hydra = pytest.importorskip("hydra", reason="pip install hydra-core; --no-deps verl==0.9.1")
    parser = importlib.import_module("hydra.core.override_parser.overrides_parser")
    parser = parser.OverridesParser.create()
    (path,) = [f for f in importlib.metadata.files("verl") if f.name == "ppo_trainer.yaml"]
    given = trained(typed(f"paper_qwen2.5_{size}", "paper"))
    rewarded = trained(typed(preset(tmp_path, train={"kl_in": "reward"})))
    assert "algorithm.kl_ctrl.kl_coef" in rewarded[0]
    given += rewarded
    for words in given:
        assert words["trainer.total_training_steps"] in ("100", "150", "250", "400")
        assert float(words["actor_rollout_ref.actor.optim.lr"]) in (5e-6, 5e-7)
        parser.parse_overrides([f"{k}={v}" for k, v in words.items()])  # refuses odd values
    given = {frozenset(words): words for words in given}.values()  # one for each set of keys
    with hydra.initialize_config_dir(str(path.locate().parent), version_base=None):
        for words in given:  # refuses unknown keys
            found = hydra.compose("ppo_trainer", [f"{k}={v}" for k, v in words.items()])
            assert found.trainer.logger == ["console"]


def test_every_training_is_followed_by_the_checkpoints_that_the_other_stages_read():
    lines = typed("paper_qwen2.5_7b", "paper")
    ours = plans.grid(
        "paper",
        "paper_qwen2.5_7b",
        config.load_preset("paper_qwen2.5_7b"),
        "runs/x",
        [0],
        range(3, 9),
    )
    kept = [shlex.split(job.line) for job in ours if job.stage not in ("01", "05")]
    assert [words for words in kept if words not in lines] == []
    for words, after in itertools.pairwise(lines):
        if words[2] == "verl.trainer.main_ppo":
            run, folder = keys(words)["trainer.default_local_dir"].split("/verl/")
            before = "0" if folder == "train" else "150"
            assert after[2:6] == [
                "common.reproduce.verl",
                "checkpoints",
                f"{run}/verl/{folder}",
                f"{run}/{folder}",
            ]
            assert after[6] == before
    # Stage 5's folders are those that stage 5 itself would write.
    asked = {words[5] for words in lines if words[3:4] == ["checkpoints"]}
    assert "runs/x/seed0/lora/continued/next-paper_alpha1.5_merged" in asked
    assert "runs/x/seed0/full/continued/merged__alpharl_alpha1.5" in asked
    policies = {words[words.index("--run-dir") + 1] for words in kept}
    assert {path.split("/continued/")[0].removesuffix("/train") for path in asked} <= policies
    assert sum(words[3:4] == ["problems"] for words in lines) == 1


def test_a_jump_is_trained_on_as_an_adapter_or_merged_before():
    lines = typed("paper_qwen2.5_7b", "paper")
    found = {
        keys(w)["trainer.default_local_dir"]: keys(w) for w in lines if w[2].startswith("verl.")
    }
    kept = found["runs/x/seed0/lora/verl/continued/next-paper_alpha1.5"]
    path = "runs/x/seed0/lora/extrapolated/next-paper_alpha1.5"
    assert kept["actor_rollout_ref.model.lora_adapter_path"] == path
    assert kept["actor_rollout_ref.model.lora_rank"] == "128"  # the jump's 65 fits
    assert kept["data.seed"] == "150"  # not the first steps' problems again
    (taken,) = [
        w
        for w in lines
        if w[3:4] == ["checkpoints"] and w[5].endswith("next-paper_alpha1.5") and "lora" in w[5]
    ]
    assert taken[-1] == path
    assert kept["actor_rollout_ref.model.path"] == "Qwen/Qwen2.5-7B-Instruct"
    merged = found["runs/x/seed0/lora/verl/continued/next-paper_alpha1.5_merged"]
    assert "actor_rollout_ref.model.lora_adapter_path" not in merged
    assert merged["actor_rollout_ref.model.lora_rank"] == "64"
    assert merged["actor_rollout_ref.model.path"] == "runs/x/seed0/lora/merged/next-paper_alpha1.5"
    asked = "python 04_extrapolate.py --config paper_qwen2.5_7b --run-dir runs/x/seed0/lora --merge"
    asked += " --methods next --recipes paper --alphas 1.5"
    merging, training = (lines.index(shlex.split(asked)), [*map(" ".join, lines)])
    assert "next-paper_alpha1.5_merged" in training[merging + 1]
    full = found["runs/x/seed0/full/verl/continued/next-paper_alpha1.5"]
    assert "actor_rollout_ref.model.lora_rank" not in full
    assert full["actor_rollout_ref.model.path"] == "runs/x/seed0/full/merged/next-paper_alpha1.5"
    rival = found["runs/x/seed0/full/verl/continued/merged__rl-extra_alpha1.5"]
    assert rival["actor_rollout_ref.model.path"] == "runs/x/seed0/full/merged/rl-extra_alpha1.5"


def test_a_presets_own_keys_of_verl_come_last():
    own = "trainer.nnodes=2 actor_rollout_ref.actor.optim.weight_decay=0.01 trainer.test_freq=5"
    for given in trained(typed("paper_qwen2.5_7b", flags=own)):
        assert given["trainer.nnodes"] == "2"
        assert given["actor_rollout_ref.actor.optim.weight_decay"] == "0.01"
        assert given["trainer.test_freq"] == "5"


def test_other_algorithms_and_losses_have_verls_names(tmp_path):
    lines = trained(typed("paper_qwen2.5_1.5b", "paper"))
    names = {given["algorithm.adv_estimator"] for given in lines}
    assert names == {"grpo", "rloo", "reinforce_plus_plus"}
    own = {"algorithm": "reinforce++-baseline", "loss_aggregation": "seq"}
    for given in trained(typed(preset(tmp_path, train=own))):
        assert given["algorithm.adv_estimator"] == "reinforce_plus_plus_baseline"
        assert given["actor_rollout_ref.actor.loss_agg_mode"] == "seq-mean-token-mean"


def test_a_start_that_is_a_whole_model_gets_a_new_lora_of_verls_too():
    lines = typed("paper_qwen2.5_7b", reproduce={"continue_from": ["merged/relex_alpha1.5"]})
    (made,) = [g for g in trained(lines) if "continued" in g["trainer.default_local_dir"]]
    assert made["actor_rollout_ref.model.path"] == "runs/x/merged/relex_alpha1.5"
    assert "actor_rollout_ref.model.lora_adapter_path" not in made
    (place,) = [words[5] for words in lines if words[3:4] == ["checkpoints"] and "cont" in words[5]]
    assert place == "runs/x/continued/merged__relex_alpha1.5_merged"


def test_what_verl_cannot_do_is_refused(tmp_path):
    for key, value in (("reward", ["mine.py:f"]), ("importance_cap", 2.0), ("eval_every", 5)):
        with pytest.raises(UserError, match=f"verl has no {key}"):
            typed(preset(tmp_path, train={key: value, "eval_data": "x.jsonl"}))
    with pytest.raises(UserError, match="verl_flags: want key=value, not --config-name"):
        typed("paper_qwen2.5_7b", flags="--config-name x")
    with pytest.raises(UserError, match="verl has no start /an/adapter"):
        typed(preset(tmp_path, train={"start": "/an/adapter"}))
    with pytest.raises(UserError, match="verl has no learning_rate_schedule linear"):
        typed("paper_qwen2.5_7b", reproduce={"continue_from": ["none_linear"]})


def test_the_commands_are_shown_and_never_run(tmp_path, monkeypatch, capsys):
    name = tmp_path / "own.yaml"
    flags = {"verl_flags": "trainer.nnodes=2"}
    name.write_text(yaml.safe_dump({"base": TINY, "reproduce": flags}))
    argv = ["reproduce", "--preset", str(name), "--run-dir", str(tmp_path), "--trainer", "verl"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(UserError, match="add --print"):
        main.main()
    monkeypatch.setattr("sys.argv", [*argv, "--print"])
    main.main()
    assert "trainer.nnodes=2" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == [name]


def test_the_reward_scores_as_verl_calls_it():
    asked = [(r"so \boxed{12}", "12", 1.0), (r"\boxed{13}", "12", 0.0), ("12", "12", 0.0)] * 8

    def call(row, answer_format="boxed"):
        given = {"data_source": "number", "solution_str": row[0], "ground_truth": row[1]}
        return verl.compute_score(**given, extra_info={"num_turns": 2, "format": answer_format})

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert [*threads.map(call, asked)] == [row[2] for row in asked]
    assert call(("it is 12", "12"), "last_number") == 1.0
    verl.judge("boxed").close()


def test_the_problems_get_verls_columns(tmp_path):
    import datasets

    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n")
    path, flags = tmp_path / "verl" / "train.parquet", ("--answer-format", "last_number")
    verl.write_problems(path, ["--train-data", str(tmp_path / "p.jsonl"), *flags])
    (row,) = datasets.load_dataset("parquet", data_files=str(path), split="train")
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"].startswith("1 + 1?")
    assert row["reward_model"] == {"ground_truth": "2"}
    assert row["data_source"] in ("latex", "number")
    assert row["extra_info"] == {"index": 0, "format": "last_number"}


def as_verl(adapter, step: int, folder, backbone) -> None:
    """A checkpoint of ours as one of verl's."""
    actor = folder / f"global_step_{step}" / "actor"
    shutil.copytree(backbone, actor)
    shutil.copytree(adapter, actor / "lora_adapter")
    for own in ("checkpoint.json", "sha256.json"):
        (actor / "lora_adapter" / own).unlink()


def test_verls_checkpoints_become_ours(run, merger, stage, monkeypatch):
    """What its merger leaves of the tiny run's checkpoints is what stages 2, 4 and 6 read."""
    backbone, theirs = str(run / "backbone"), run / "verl" / "train"
    for path in sorted((run / "train").glob("step_*")):
        as_verl(path, int(path.name[-4:]), theirs, backbone)
    before = {p.name: p.read_bytes() for p in sorted((run / "deltas").glob("*.safetensors"))}
    steps = sorted(path.name for path in (run / "train").glob("step_*"))
    for folder in ("train", "deltas", "predictor", "extrapolated", "continued", "eval"):
        shutil.rmtree(run / folder)
    verl.take(theirs, run / "train", 0, backbone)
    with monkeypatch.context() as patch:  # again, without a merger: all are there
        patch.setenv("PYTHONPATH", str(ROOT))
        verl.take(theirs, run / "train", 0, backbone)
    assert sorted(path.name for path in (run / "train").glob("step_*")) == steps
    assert results.made_on(run) == ("backbone", 0)
    assert [*theirs.glob("tmp*")] == []
    assert stage("02", run)[0] == 0
    assert {p.name: p.read_bytes() for p in (run / "deltas").glob("*.safetensors")} == before
    assert stage("04", run, "--methods", "repeat-last", "none")[0] == 0
    # The jump, of rank r + 1 with a broken lora_alpha, keeps its scale.
    jump = run / "extrapolated" / "repeat-last_alpha1.5"
    assert adapters.read_config(jump)["lora_alpha"] % 1
    as_verl(jump, 4, run / "verl" / "later", backbone)
    place = run / "continued" / "repeat-last_alpha1.5"
    verl.take(run / "verl" / "later", place, 8, backbone, str(jump))
    (made,) = place.iterdir()
    assert made.name == "step_0012"
    assert adapters.read_header(made).config == adapters.read_config(jump)
    policies = ("backbone", f"train/{steps[-1]}", "continued/*/*")
    assert stage("06", run, "--policies", *policies)[0] == 0
    assert (run / "eval" / "continued__repeat-last_alpha1.5__step_0012" / "test.json").is_file()


def test_a_folder_without_checkpoints_of_verls_is_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoint global_step"):
        verl.take(tmp_path, tmp_path / "train", 0, "b")


def test_a_whole_model_of_verls_becomes_ours(new_run, merger, monkeypatch):
    run = new_run
    shutil.copytree(run / "backbone", run / "verl" / "global_step_3" / "actor")
    places = [str(run / "verl"), str(run / "whole"), "10", "unused"]
    monkeypatch.setattr("sys.argv", ["verl", "checkpoints", *places])
    verl.main()
    made = run / "whole" / "step_0013"
    same = safetensors.torch.load_file(made / "model.safetensors")
    first = safetensors.torch.load_file(run / "backbone" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in same.items()} == {
        n: t.tolist() for n, t in first.items()
    }
    assert not adapters.is_adapter(made)
    assert json.loads((made / "checkpoint.json").read_text())["step"] == 13
