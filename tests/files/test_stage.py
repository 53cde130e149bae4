"""A stage's folder: what counts as the same run, what is made again, and how a stage ends."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from conftest import run_stage

from common import UserError
from common.files import config, read, resume, stage, write
from common.files.config import option


@dataclasses.dataclass
class Options(config.StageConfig):
    data: str = option("d.jsonl", "problems")
    steps: int = option(5, "how many")
    rate: float = option(0.5, "how fast")
    names: list[str] = option(["x"], "who")
    prompt_template: str = option("{prompt}", "the user turn")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "stage"


def opened(folder, content: str | None = "0", **options) -> stage.Stage:
    """The stage on data of this hash, or of the hash of the file, if there is one; begun."""
    cfg = Options(**options)
    if os.path.isfile(cfg.data):
        content = read.sha256(cfg.data)
    made = stage.Stage(folder, cfg, {"data": content}, may_change=("rate",), grows="steps")
    if stage.is_writer():
        (folder / "begun.txt").write_text("a part of it")
    return made


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_config_comes_first_and_done_last_with_the_hashes_of_the_weights(folder, capsys):
    made = opened(folder)
    assert not made.done
    assert sorted(path.name for path in folder.iterdir()) == ["begun.txt", "config.json"]
    write.save_tensors(folder / "a.safetensors", {"w": torch.ones(2)})
    write.write_json(folder / "seen.json", [1])
    made.finish(accuracy=0.5)
    done = json.loads((folder / "done.json").read_text())
    assert done["outputs"] == {"a.safetensors": read.sha256(folder / "a.safetensors")}
    assert (done["accuracy"], done["config"]["steps"], done["inputs"]) == (0.5, 5, {"data": "0"})
    assert {"python", "torch"} <= done["versions"].keys()
    assert (done["device"], done["processes"]) == ("cpu", 1)
    assert opened(folder).done
    assert "is done already; --overwrite makes it again" in capsys.readouterr().out


def test_another_option_or_input_is_refused_and_named(folder):
    opened(folder).finish()
    with pytest.raises(UserError, match=r"option names = \['x'\], now it is \['y'\]: use another"):
        opened(folder, names=["y"])
    with pytest.raises(UserError, match=r"input data = '0', now it is '1': use another --run-dir"):
        opened(folder, content="1")
    assert opened(folder, rate=0.7).done  # may change
    assert opened(folder, threads=3, run_dir="elsewhere").done  # do not change what is computed


def test_what_ended_before_its_first_file_has_settled_nothing(folder):
    opened(folder)
    (folder / "begun.txt").write_text("")  # a log without a line
    opened(folder, names=["y"])
    assert json.loads((folder / "config.json").read_text())["config"]["names"] == ["y"]
    with pytest.raises(UserError, match="option names = "):
        opened(folder, names=["z"])


def test_a_finished_run_may_grow_and_is_done_for_less(folder):
    opened(folder).finish()
    assert opened(folder, steps=4).done is True
    assert not opened(folder, steps=9).done


def test_a_config_of_older_code_counts_as_one_with_the_defaults(folder):
    opened(folder)
    edit(folder / "config.json", lambda value: value["config"].pop("names"))
    assert not opened(folder).done
    edit(folder / "config.json", lambda value: value["config"].pop("names"))
    with pytest.raises(UserError, match=r"option names = \['x'\], now it is \['y'\]"):
        opened(folder, names=["y"])


def test_an_input_that_older_code_did_not_note_is_no_difference(folder):
    opened(folder)
    edit(folder / "config.json", lambda value: value["inputs"].clear())
    assert not opened(folder).done


def test_a_file_is_its_content_wherever_it_lies_and_however_it_is_spelt(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    one, two = tmp_path / "one.jsonl", tmp_path / "two" / "other.jsonl"
    one.write_text("1")
    opened(folder, data="one.jsonl")
    for spelling in ("./one.jsonl", str(one), f"{tmp_path}/run/../one.jsonl"):
        opened(folder, data=spelling)
    two.parent.mkdir()
    shutil.move(one, two)
    opened(folder, data=str(two))
    two.write_text("2")
    with pytest.raises(UserError, match="input data = "):
        opened(folder, data=str(two))
    with pytest.raises(UserError, match="option data = "):  # no hash: only the name is known
        opened(folder, content=None, data="some/data-set")


def test_another_spelling_of_a_path_in_a_list_is_no_difference(folder):
    opened(folder, names=["out/step_*", "mine.py:short=0.5"])
    assert not opened(folder, names=["./out/step_*", "./mine.py:short=0.5"]).done
    with pytest.raises(UserError, match="option names = "):
        opened(folder, names=["out2/step_*", "mine.py:short=0.5"])


def test_a_prompt_is_no_path(folder):
    opened(folder, prompt_template="{prompt} a//b")
    with pytest.raises(UserError, match="option prompt_template = "):
        opened(folder, prompt_template="{prompt} a/b")


def test_overwrite_begins_again(folder):
    opened(folder).finish()
    (folder / "old.txt").write_text("")
    assert not opened(folder, names=["y"], overwrite=True).done
    assert sorted(path.name for path in folder.iterdir()) == ["begun.txt", "config.json"]


def test_an_error_is_one_line_without_a_traceback_and_exit_code_2(tmp_path):
    result = run_stage("02_extract_deltas.py", "--run-dir", str(tmp_path / "nowhere"))
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "Traceback" not in result.stderr + result.stdout


def test_a_foreign_folder_is_not_touched(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"has files but no config\.json: move it away"):
        opened(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_of_several_processes_the_first_alone_writes(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    other = opened(folder)
    other.finish()
    resume.StepLog(folder / "metrics.jsonl", keep_to=0).append({"step": 1})
    assert not other.done
    assert not folder.exists()


def test_a_log_drops_what_came_after_the_resumed_step_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    resume.StepLog(path, keep_to=0).append(*({"step": step} for step in (1, 2, 3)))
    with open(path, "a") as file:
        file.write('{"step": 4, "rew')
    resume.StepLog(path, keep_to=2).append({"step": 3, "again": True})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


@pytest.mark.parametrize("line", ["[1]", "{}", '{"step": "1"}', '{"st'])
def test_a_log_with_a_line_that_is_no_row_names_the_line(tmp_path, line):
    (tmp_path / "m.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: (not a row|cannot be read)"):
        resume.StepLog(tmp_path / "m.jsonl", keep_to=5)


def test_paths_inside_the_run_directory_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert stage.within(run / "train" / "step_1", run) == "train/step_1"
    assert stage.within("run/train/../deltas", run, "{run_dir}") == "{run_dir}/deltas"
    assert stage.within(tmp_path / "elsewhere", run) == str(tmp_path / "elsewhere")


def test_in_a_log_file_progress_is_shown_once_a_minute_and_by_the_first_process(
    capsys, monkeypatch
):
    now = iter(range(0, 10**6, 20))  # seconds: twenty a step
    monkeypatch.setattr("tqdm.std.time", lambda: next(now))
    assert list(stage.progress(range(30), "training", in_log=True)) == [*range(30)]
    shown = capsys.readouterr().err.count("training")
    assert 5 <= shown <= 15
    monkeypatch.setenv("RANK", "1")
    assert list(stage.progress(range(30), "training", in_log=True)) == [*range(30)]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.undo()
    list(stage.progress(range(30), "training", in_log=True))  # at once
    assert "training" not in capsys.readouterr().err
