"""Data sets by name, file or hub id: small files laid out exactly as the hub's, and the prompts
made of them."""

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import UserError
from common.rl import benchmarks, data, policy


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No network, and no trace in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(path, rows: list[dict]):
    """`rows` as the file type that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


DAPO_QUESTIONS = ("In triangle $ABC$, find $x$.", "What is $1+1$?", "求 $x$ 的值。")
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [
            {
                "content": question.join(benchmarks.SOURCES["dapo-math-17k"].around),
                "role": "user",
            }
        ],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(30 + i), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{i}"},
    }
    for _ in range(100)
    for i, question in enumerate(DAPO_QUESTIONS)
]
GPQA = [
    {
        "Pre-Revision Question": "old",
        "Question": f"Which particle is number {i}?\n",
        "Correct Answer": "muon\n",
        "Incorrect Answer 1": " electron",
        "Incorrect Answer 2": "tau",
        "Incorrect Answer 3": "None",
        "High-level domain": "Physics",
    }
    for i in range(8)
]
CATEGORIES = ["biology", "computer science", "law"]
MMLU_PRO = [
    {
        "question_id": 70 + i,
        "question": f"Question {i}",
        "options": ["one", "N/A", "two", "three", "N/A"],
        "answer": "D",
        "answer_index": 3,
        "cot_content": "",
        "category": category,
        "src": "ori_mmlu",
    }
    for i, category in enumerate((*CATEGORIES, "law"))
]
AIME24 = [
    {
        "id": 60,
        "problem": "Every morning Aya walks.",
        "solution": "...",
        "answer": "073",
        "url": "https://x",
        "year": "2024",
    }
]
LAYOUTS = {  # name: rows in the columns of the hub, and the first problem they should give
    "aime24": (AIME24, ("Every morning Aya walks.", "073", "number")),
    "aime25": (
        [{"problem": "Find the sum of bases.", "answer": "70", "id": "0"}],
        ("Find the sum of bases.", "70", "number"),
    ),
    "amc23": (
        [{"id": 0, "question": "Cities A and B", "answer": "27.0", "url": "https://x"}],
        ("Cities A and B", "27.0", "number"),
    ),
    "minerva": (
        [{"question": "How many ergs?", "answer": "4.5e33"}],
        ("How many ergs?", "4.5e33", "latex"),
    ),
    "olymmath-en-easy": (
        [
            {
                "problem": "Find $r$.",
                "answer": "4\\sqrt{15}-14",
                "subject": "Geometry",
                "unique_id": "OlymMATH-EASY-0-EN",
            }
        ],
        ("Find $r$.", "4\\sqrt{15}-14", "latex"),
    ),
    "dapo-math-17k": (DAPO, (DAPO_QUESTIONS[0], "30", "number")),
}


@pytest.mark.parametrize("name", [*LAYOUTS, "gpqa-diamond", "mmlu-pro"])
def test_a_benchmark_is_one_file_at_one_revision_in_a_copy_of_the_repository_or_on_the_hub(
    tmp_path, monkeypatch, name
):
    source = benchmarks.SOURCES[name]
    rows = {"gpqa-diamond": GPQA, "mmlu-pro": MMLU_PRO}.get(name) or LAYOUTS[name][0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / f"datasets--{source.hub_id.replace('/', '--')}" / "snapshots"
    write(cached / source.revision / source.file, rows)
    tasks = data.load_tasks([name])
    assert all(problem.kind == source.kind for problems in tasks.values() for problem in problems)
    if name in LAYOUTS:
        assert tasks[name][0] == data.Problem(*LAYOUTS[name][1])
    assert sum(map(len, tasks.values())) == (3 if name == "dapo-math-17k" else len(rows))
    assert data.load_tasks([f"{name}={cached / source.revision}"]) == tasks
    (cached / source.revision).rename(cached / ("0" * 40))  # another revision is another data set
    with pytest.raises(UserError, match=f"cannot load {source.hub_id}"):
        data.load_tasks([name])


def test_dapo_is_deduplicated_and_loses_its_answer_template(tmp_path):
    problems = data.load_problems(
        "BytedTsinghua-SIA/DAPO-Math-17k=" + write(tmp_path / "dapo-math-17k.parquet", DAPO)
    )
    assert [problem.prompt for problem in problems] == list(DAPO_QUESTIONS)
    assert [problem.answer for problem in problems] == ["30", "31", "32"]


def test_the_english_subset_leaves_out_chinese_and_keeps_accents(tmp_path):
    rows = [{"prompt": text, "answer": 1} for text in ("求 x", "Poincaré's λ ≤ 2", "x，y", "plain")]
    path = write(tmp_path / "p.jsonl", rows)
    assert [problem.prompt for problem in data.load_problems(path, english_only=True)] == [
        "Poincaré's λ ≤ 2",
        "plain",
    ]
    assert len(data.load_problems(path)) == 4


def test_gpqa_options_are_shuffled_by_the_question_alone(tmp_path):
    path = write(tmp_path / "gpqa_diamond.csv", GPQA)
    problems = data.load_problems(f"gpqa-diamond={path}")
    assert (
        data.load_problems(f"gpqa-diamond={write(tmp_path / 'again' / 'g.csv', GPQA[::-1])}")[::-1]
        == problems
    )
    assert len({problem.answer for problem in problems}) > 1  # always A would be no shuffle
    for problem in problems:
        lines = problem.prompt.splitlines()
        assert f"{problem.answer}. muon" in lines
        assert sorted(line[3:] for line in lines[1:5]) == ["None", "electron", "muon", "tau"]
        assert lines[5] == "The final answer is the letter of the correct option."
    other = {
        **GPQA[0],
        "Incorrect Answer 1": "tau",
        "Incorrect Answer 2": " electron",
    }  # in another order on the hub
    assert benchmarks.gpqa(other) == benchmarks.gpqa(GPQA[0])


def test_mmlu_pro_keeps_its_order_without_the_filling(tmp_path):
    path = write(tmp_path / "test.parquet", MMLU_PRO)
    tasks = data.load_tasks([f"mmlu-pro={path}"])
    assert len(tasks) == 3
    assert [len(tasks[f"mmlu-pro-{name}"]) for name in ("law", "computer-science")] == [2, 1]
    problem = tasks["mmlu-pro-biology"][0]
    assert problem == data.Problem(
        "Question 0\nA. one\nB. two\nC. three\n"
        "The final answer is the letter of the correct option.",
        "C",
        "letter",
    )
    assert data.load_tasks([f"mmlu-pro/law={path}"]) == {"mmlu-pro-law": tasks["mmlu-pro-law"]}
    with pytest.raises(UserError, match="no problem for mmlu-pro/lawyers"):
        data.load_tasks([f"mmlu-pro/lawyers={path}"])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_any_file_with_named_columns_will_do(tmp_path, suffix):
    rows = [
        {
            "q": [{"role": "user", "content": "1+1?"}],
            "reward_model": {"ground_truth": 2},
            "kind": "number",
        }
    ]
    path = write(tmp_path / f"p{suffix}", rows)
    assert data.load_problems(path, prompt="q", answer="reward_model.ground_truth") == [
        data.Problem("1+1?", "2", "number")
    ]
    with pytest.raises(UserError, match=r"(line|row) 1: no usable 'prompt'"):
        data.load_problems(path)


def test_a_wrong_kind_is_an_error_that_names_the_line(tmp_path):
    with pytest.raises(
        UserError, match=r"line 1: kind 'float' is not one of number, latex, letter"
    ):
        data.load_problems(
            write(tmp_path / "p.jsonl", [{"prompt": "1", "answer": 1, "kind": "float"}])
        )


@pytest.mark.parametrize("name", [*LAYOUTS, "gpqa-diamond", "mmlu-pro"])
def test_offline_the_error_names_id_file_and_flag(name):
    source = benchmarks.SOURCES[name]
    with pytest.raises(UserError) as error:
        data.load_tasks([name])
    assert f"cannot load {source.hub_id}" in str(error.value)
    assert f"fetch {source.file} from https://huggingface.co/datasets/{source.hub_id}" in str(
        error.value
    )
    assert f"--test-data {name}=/path/to/{source.file.split('/')[-1]}" in str(error.value)
    assert ("HF_TOKEN" in str(error.value)) == (name == "gpqa-diamond")
    assert "\n" not in str(error.value)


def test_any_other_hub_id_is_asked_for_its_config_and_split(monkeypatch):
    asked = []

    def load_dataset(**what):
        asked.append(what)
        return datasets.Dataset.from_list([{"prompt": "p", "answer": "1"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data.load_problems("someone/sums:hard", split="validation")
    assert asked == [{"path": "someone/sums", "name": "hard", "split": "validation"}]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aime26", "aime26 not found; want a file, a hub id, or one of dapo-math-17k, aime24"),
        ("no/where.parquet", "no/where.parquet not found"),
        ("aime24=no/where.parquet", "no/where.parquet not found"),
        ("someone/sums", "--train-data sums=/path/to/"),
    ],
)
def test_what_cannot_be_found_is_one_clear_error(spec, message):
    with pytest.raises(UserError) as error:
        data.load_problems(spec)
    assert message in str(error.value)


def test_a_broken_or_foreign_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"cannot load .*b\.parquet"):
        data.load_problems(tmp_path / "b.parquet")
    with pytest.raises(
        UserError, match=r"row 1: not a row of Idavidrein/gpqa \(KeyError: 'Question'\)"
    ):
        data.load_problems("gpqa-diamond=" + write(tmp_path / "g.parquet", [{"question": "1"}]))


def test_two_tasks_of_one_name_are_refused(tmp_path):
    row = [{"prompt": "1", "answer": 1}]
    paths = [write(tmp_path / folder / "test.jsonl", row) for folder in ("a", "b")]
    with pytest.raises(UserError, match="two test data sets are called test"):
        data.load_tasks(paths)
    assert list(data.load_tasks([paths[0], f"other={paths[1]}"])) == ["test", "other"]


def test_a_file_or_a_hub_id_that_is_only_called_like_a_benchmark_is_read_as_itself(tmp_path):
    for spec in ("aime24", "HuggingFaceH4/aime_2024", "mmlu-pro/law"):
        assert data.parse_spec(spec)[2]
    write(tmp_path / "aime24.jsonl", [{"prompt": "1+1", "answer": "2"}])
    path = str(tmp_path / "aime24.jsonl")
    assert data.parse_spec(f"aime24={path}")[2]
    assert data.parse_spec(path)[2] is data.parse_spec("someone/aime24")[2] is None
    (problem,) = data.load_problems(path)
    assert (problem.prompt, problem.kind) == ("1+1", "latex")


def test_an_equals_sign_in_a_path_is_part_of_the_path(tmp_path):
    path = write(tmp_path / "lr=1" / "p.jsonl", [{"prompt": "1", "answer": 1}])
    assert list(data.load_tasks([path])) == ["p"]


def test_a_stage_depends_on_local_files_by_content_and_on_hub_data_by_name(tmp_path):
    one, two = (write(tmp_path / name / "p.jsonl", [{"prompt": "1", "answer": 1}]) for name in "ab")
    assert (
        len({data.content_hash(one), data.content_hash(two), data.content_hash(f"aime24={two}")})
        == 1
    )
    write(tmp_path / "b" / "p.jsonl", [{"prompt": "1", "answer": 2}])
    assert data.content_hash(one) != data.content_hash(two)
    assert data.content_hash("dapo-math-17k") is data.content_hash("someone/sums") is None
    with pytest.raises(UserError, match=r"data file no[.]jsonl not found"):
        data.content_hash("no.jsonl")


def test_the_fingerprint_sees_prompt_answer_and_kind():
    variants = [("p", "1", "latex"), ("q", "1", "latex"), ("p", "2", "latex"), ("p", "1", "number")]
    assert len({data.fingerprint([data.Problem(*variant)]) for variant in variants}) == 4


def test_the_prompt_is_the_problem_and_the_instruction_after_an_explicit_system_turn(backbone_dir):
    _, tokenizer = policy.load_backbone(str(backbone_dir))
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    text = data.render_chats(["1+1"], tokenizer, data.PROMPT_TEMPLATE, data.SYSTEM_PROMPT)[0]
    assert text == (
        "<system>You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<user>1+1\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<assistant>"
    )


def test_the_template_hash_changes_with_user_turn_system_turn_and_chat_template(backbone_dir):
    _, tokenizer = policy.load_backbone(str(backbone_dir))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    hashes = [
        data.template_hash(tokenizer, *turns)
        for turns in (("{prompt}", ""), ("{prompt}!", ""), ("{prompt}", "s"))
    ]
    assert data.template_hash(tokenizer, "{prompt}", "") == hashes[0]
    tokenizer.chat_template += "#"
    hashes.append(data.template_hash(tokenizer, "{prompt}", ""))
    assert len(set(hashes)) == 4
    assert all(len(value) == 12 and int(value, 16) >= 0 for value in hashes)


def encoded(backbone_dir, capsys, prompt: str, template: str, system: str) -> str:
    """What is written to stderr when `prompt` is encoded."""
    _, tokenizer = policy.load_backbone(str(backbone_dir))
    tokenizer.chat_template = template
    capsys.readouterr()
    data.encode_prompts([data.Problem(prompt, "1")], tokenizer, "{prompt}", system, 200, "sums")
    return capsys.readouterr().err


def test_prompts_over_the_limit_are_left_out_and_counted(backbone_dir, capsys):
    _, tokenizer = policy.load_backbone(str(backbone_dir))
    problems = [data.Problem(prompt, "1") for prompt in ("1+1", "12345+12345", "2+2")]
    kept, prompts = data.encode_prompts(problems, tokenizer, "{prompt}", "", 6, "sums")
    assert kept == [problems[0], problems[2]]
    assert [len(ids) for ids in prompts] == [5, 5]
    assert "left out are 1 of 3 problems, with prompts of more than 6" in capsys.readouterr().err
    with pytest.raises(UserError, match="sums has nothing but prompts of more than 4 tokens"):
        data.encode_prompts(problems, tokenizer, "{prompt}", "", 4, "sums")


TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_qwens_system_turn_for_another_backbone_is_a_warning(backbone_dir, capsys):
    warning = "warning: the system turn is Qwen2.5's: set --system-prompt"
    assert warning in encoded(backbone_dir, capsys, "1+1", TURNS, data.SYSTEM_PROMPT)
    assert warning not in encoded(
        backbone_dir, capsys, "1+1", f"{TURNS}{{# Qwen #}}", data.SYSTEM_PROMPT
    )
    assert encoded(backbone_dir, capsys, "1+1", TURNS, "") == ""


def test_characters_that_the_tokenizer_loses_are_a_warning(backbone_dir, capsys):
    assert "the tokenizer has no token for 'xyλ'" in encoded(
        backbone_dir, capsys, "1+1 x y λ", TURNS, ""
    )
    assert encoded(backbone_dir, capsys, "12 + 34", TURNS, "") == ""


def test_an_equals_sign_behind_a_slash_belongs_to_the_path():
    there = "{run_dir}/v=2/t.jsonl"
    given = ("aime24=/a/b.parquet", there, f"mine={there}", "a.jsonl")
    assert [*map(data.place, given)] == ["/a/b.parquet", there, there, "a.jsonl"]
