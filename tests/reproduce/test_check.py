"""What `python -m common.reproduce` finds, fetches, counts and computes before anything runs."""

import ast
import re

import pytest
import yaml
from conftest import ROOT, SCRIPTS, TINY, lay_out

from common import UserError
from common.files import config
from common.reproduce import __main__ as reproduce
from common.reproduce import check, plans
from common.rl import data, memory


def checked(tmp_path, **sections) -> None:
    """`--check` on the tiny preset with other sections."""
    name = tmp_path / "mine.yaml"
    name.write_text(yaml.safe_dump({"base": TINY, **sections}))
    preset = config.load_preset(str(name))
    check.check(str(name), preset, str(tmp_path), plans.single(str(name), preset, str(tmp_path)))


DATA = "{run_dir}/data"


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"shared": {"promt_template": ""}}, "did you mean prompt_template?"),
        ({"extrapolate": {"methods": ["nxt"]}}, "no method 'nxt'"),
        (
            {"eval": {"answer_column": "solution"}},
            "no usable 'solution', want a text or a number: say --prompt-column, --answer-column; "
            "there are .*answer",
        ),
        (
            {"eval": {"test_data": [f"mine={DATA}/test.jsonl"], "answer_column": "solution"}},
            "no usable 'solution'",
        ),
        (
            {"train": {"eval_data": f"{DATA}/test.jsonl", "prompt_column": "question"}},
            "no usable 'question'",
        ),
        (
            {
                "eval": {"test_data": [f"{DATA}/gone.jsonl"], "answer_column": "solution"},
                "reproduce": {"validation_data": f"{DATA}/test.jsonl"},
            },
            "no usable 'solution'",
        ),
        ({"eval": {"test_data": ["/no/gone.jsonl"]}}, "data file /no/gone.jsonl not found"),
        ({"continue": {"prompt_column": "question"}}, "no usable 'question'"),  # stage 5's alone
        ({"eval": {"test_data": [f"{DATA}/test.jsonl", f"test={DATA}/valid.jsonl"]}}, "called t"),
    ],
)
def test_a_late_stages_mistake_is_found_before_the_first_command(
    empty_run, tmp_path, sections, line
):
    name = tmp_path / "mine.yaml"
    name.write_text(yaml.safe_dump({"base": TINY, **sections}))
    with pytest.raises(UserError, match=line):
        check.options(str(name), str(empty_run))


def test_test_problems_that_no_response_can_solve_are_found_too(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "1 / 2", "answer": "a half"}\n')
    sections = {"eval": {"test_data": ["{run_dir}/test.jsonl"], "answer_format": "last_number"}}
    (name := tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": TINY, **sections}))
    with pytest.raises(UserError, match="'a half' is not a number; use boxed"):
        check.options(str(name), str(tmp_path))


def test_a_late_mistake_stops_reproduce_before_its_first_command(tmp_path, monkeypatch):
    name = tmp_path / "mine.yaml"
    name.write_text(yaml.safe_dump({"base": TINY, "eval": {"run": 4}}))
    argv = ["reproduce", "--preset", str(name), "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(reproduce, "Runner", None)
    with pytest.raises(UserError, match="unknown key 'run' in section eval"):
        reproduce.main()


def test_everything_that_is_there_is_counted(tmp_path, capsys):
    lay_out(tmp_path)
    checked(tmp_path)
    out = capsys.readouterr().out
    assert f"{tmp_path}/data/train.jsonl: 4096 problems" in out
    assert f"{tmp_path}/data/test.jsonl: 256 problems" in out
    assert re.search(r"^memory: [\d.]+ GB of a GPU's 80.0 \(backbone ", out, re.M)
    assert re.search(r"^after a merged restart, memory: ", out, re.M)
    assert "commands, 12 RL steps" in out  # 6, 2 more for reference, 2 after each of two starts


def test_a_gpu_that_is_too_small_is_named(tmp_path, capsys, monkeypatch):
    lay_out(tmp_path)
    monkeypatch.setattr(memory, "kept", lambda *args: 0)  # which takes seconds
    monkeypatch.setattr(check, "GPU", 1e6)
    with pytest.raises(UserError, match="2 are not as they should be"):
        checked(tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"^needs [\d.]+ GB of a GPU's 0.0 ", out, re.M)
    assert re.search(r"^after a merged restart, needs ", out, re.M)


def test_memory_is_told_before_the_model_is_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(memory, "kept", lambda *args: 0)  # which takes seconds
    name = "paper_qwen2.5_1.5b"
    preset = config.load_preset(name)
    jobs = plans.grid("paper", name, preset, str(tmp_path / "run"), [0], {3})
    with pytest.raises(UserError, match="are not as they should be"):
        check.check(name, preset, str(tmp_path / "run"), jobs)
    out = capsys.readouterr().out
    for kind in ("", "after a merged restart, ", "without LoRA, "):
        assert re.search(rf"^{kind}memory: [\d.]+ GB of a GPU's 80.0 \(backbone ", out, re.M)
    assert "missing: cannot load backbone Qwen/Qwen2.5-1.5B-Instruct" in out
    assert re.search(r"GPU hours and the evaluation, \d+ GB of checkpoints$", out, re.M)


def test_everything_that_is_not_there_is_named_at_once(tmp_path, capsys, monkeypatch):
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = hub / "datasets--math-ai--minervamath" / "snapshots"
    cached = cached / "ee46ddc498933b1977577953250ca5c66be64f96"
    cached.mkdir(parents=True)
    (cached / "test.jsonl").write_text('{"question": "How many ergs?", "answer": "4.5e33"}\n')
    tests = {"test_data": ["minerva", "amc23"], "max_prompt_tokens": 1024}
    with pytest.raises(UserError, match="4 are not as they should be"):
        checked(tmp_path, eval=tests)
    out = capsys.readouterr().out
    assert f"missing: {tmp_path}/backbone not found: run python -m common.demo --run-dir" in out
    assert f"missing: data file {tmp_path}/data/train.jsonl not found" in out
    assert "unlike what is known: minerva has 1 problems, not 272" in out
    assert "missing: cannot load math-ai/amc23" in out


@pytest.mark.parametrize(
    ("name", "count", "is_odd"),
    [("amc23", 39, True), ("dapo-math-17k", 17_917, False), ("dapo-math-17k", 14_116, True)],
)
def test_only_of_a_set_that_repeats_its_problems_the_count_may_be_near(
    name, count, is_odd, monkeypatch
):
    problem = data.Problem("1 + 1", "2", "latex", {})
    monkeypatch.setattr(data, "load_tasks", lambda *args, **columns: {name: [problem] * count})
    cfg = check.options_of("06", [])
    assert bool(check.counted("--test-data", name, cfg, None)) == is_odd


def test_the_disk_that_is_told_is_the_disk_that_is_used(finished_run):
    kept = [*(finished_run / "train").rglob("*"), *(finished_run / "continued").rglob("*")]
    files = [path for path in kept if path.suffix in (".safetensors", ".pt")]
    adapter = (finished_run / "train" / "step_0006" / "adapter_model.safetensors").stat().st_size
    whole = (finished_run / "backbone" / "model.safetensors").stat().st_size
    jobs = plans.single(TINY, config.load_preset(TINY), str(finished_run))
    told = check.disk(jobs, 1, adapter, whole)
    assert told == pytest.approx(
        sum(path.stat().st_size for path in files), rel=0.15
    )  # of the jump: rank 5


def test_the_disk_is_told_beside_the_commands_once_the_model_is_there(
    tmp_path, monkeypatch, capsys
):
    argv = ["reproduce", "--preset", TINY, "--run-dir", str(tmp_path), "--print"]
    monkeypatch.setattr("sys.argv", argv)
    reproduce.main()
    assert "GB of checkpoints" not in capsys.readouterr().err
    lay_out(tmp_path)
    reproduce.main()
    assert "12 RL steps, 0.0" in capsys.readouterr().err


def test_of_a_whole_model_the_tables_keep_few_checkpoints():
    name = "paper_qwen2.5_1.5b"
    jobs = plans.grid("paper", name, config.load_preset(name), "runs/x", [0], {3})
    # Stage 2 reads 15. Then there are steps 250 and 400, and one after each of three jumps.
    told = check.disk([job for job in jobs if "full" in job.argv], 10, 0, 1)
    folders = 1 + 3
    assert told == 15 + 2 + 3 + check.COPIES * folders


def test_memory_is_told_of_as_many_gpus_as_share_the_layers(tmp_path, monkeypatch):
    lay_out(tmp_path)
    seen, plan = [], memory.plan
    monkeypatch.setattr(memory, "kept", lambda *args: 0)  # which takes seconds
    note = lambda config, cfg, shards, processes: seen.append((shards, processes))  # noqa: E731
    monkeypatch.setattr(memory, "plan", lambda *a, **b: note(*a, **b) or plan(*a, **b))
    split = " --config_file common/accelerate/fsdp2.yaml"
    for flags in (" --num_processes 2", split, f"{split} --num_processes 4"):
        checked(tmp_path, reproduce={"launch": f"accelerate launch{flags}"})
    assert seen == 2 * [(1, 2)] + 2 * [(8, 8)] + 2 * [(4, 4)]  # and after a merged restart


def test_a_preset_may_want_a_process_for_each_gpu(monkeypatch, capsys):
    monkeypatch.setattr(check, "sizes_of", lambda *args: (1, 1))  # which takes seconds
    argv = ["reproduce", "--preset", "paper_qwen2.5_7b", "--run-dir", "runs/x", "--print"]
    for seen, told in ((0, "8"), (4, "4")):
        monkeypatch.setattr("torch.cuda.device_count", lambda seen=seen: seen)
        monkeypatch.setattr("sys.argv", argv)
        reproduce.main()
        lines = capsys.readouterr().out.splitlines()
        assert lines
        assert all(f" --num_processes {told} 0" in line for line in lines)


@pytest.mark.parametrize("number", SCRIPTS)
def test_a_preset_is_read_as_the_stage_reads_it(number):
    text = (ROOT / SCRIPTS[number]).read_text(encoding="utf-8")
    name, found = re.search(r"parse\((\w+), (.+), __doc__\)", text).groups()
    sections = ast.literal_eval(found)
    assert check.STAGES[number] == [name, *([sections] if isinstance(sections, str) else sections)]


def test_runs_of_all_parameters_have_a_memory_of_their_own(tmp_path, monkeypatch, capsys):
    lay_out(tmp_path)
    name = tmp_path / "mine.yaml"
    flags = "--prompts-per-step 32 --mini-batch 8"
    name.write_text(yaml.safe_dump({"base": TINY, "reproduce": {"full_flags": flags}}))
    preset = config.load_preset(str(name))
    for key, stage in (("backbone", "shared"), ("train_data", "train")):
        preset[stage][key] = preset[stage][key].replace("{run_dir}", str(tmp_path))
    name.write_text(yaml.safe_dump(preset))
    jobs = plans.grid("paper", str(name), preset, str(tmp_path), [0], {3})
    seen, plan = [], memory.plan
    monkeypatch.setattr(memory, "kept", lambda *args: 0)  # which takes seconds
    note = lambda config, cfg, *a, **b: seen.append((cfg.tune, cfg.mini_batch))  # noqa: E731
    monkeypatch.setattr(memory, "plan", lambda *a, **b: note(*a, **b) or plan(*a, **b))
    with pytest.raises(UserError, match="1 are not as they should be"):  # test data: not there
        check.check(str(name), preset, str(tmp_path / "not" / "yet"), jobs)
    assert seen == [("lora", preset["train"]["mini_batch"])] * 2 + [("full", 8)]
    out = capsys.readouterr().out
    assert "without LoRA, memory: " in out
    assert "free on the disk: " in out


def test_a_sweep_wants_problems_for_validation(monkeypatch):
    argv = ["reproduce", "--preset", "smollm2", "--grid", "sweep", "--print"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(UserError, match="sweep measures on reproduce: validation_data"):
        reproduce.main()
