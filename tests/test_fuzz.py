"""Every reader of files that others may have made, on files that are nearly right: it takes them
or says what is wrong. On a record that was edited by hand, any plain error will do.

`tests/bench/bench_fuzz.py` runs the same with 10,000 files. Whatever raises anything but UserError,
or writes where it should not, is a failure.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import struct
import sys
import tempfile
import time

import hypothesis
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st

from common import UserError, demo
from common.files import adapters, config, deltas, models, stage
from common.reproduce import plans, results
from common.rl import data, policy, verifier

BY_HAND = (
    "adapter_config.json",
    "checkpoint.json",
    "index.json",
    "deltas",
    "config.json and done.json",
    "eval results",
)
PLAIN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
PLAIN += (re.error,)
PARSER = "answers for math-verify"  # slow: a process that hangs is killed after 2 s
CASES = 40  # of each reader in the suite

# What is thrown at them

LETTERS = st.characters(codec="utf-8")
NAMES = st.sampled_from(
    [
        "..",
        "../../x",
        "/etc/passwd",
        "a/../../b",
        "",
        ".",
        "x" * 300,
        "\0",
        "{run_dir}/..",
        "~",
        "C:\\x",
    ]
)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from(
        [0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, 5e-324, -0.0, float("nan"), float("inf")]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(LETTERS, max_size=20), NAMES)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | NAMES, inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def spoilt(draw, good: dict):
    """A JSON object of ours with up to three values, on whatever level, replaced, removed or
    added."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 3))):
        place = value
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
                if draw(st.booleans()) and draw(st.booleans()):
                    del place[key]
                else:
                    place[key] = draw(VALUES)
                break
            place = place[key]
        if isinstance(place, dict) and draw(st.booleans()):
            place[draw(st.text(max_size=8) | NAMES)] = draw(VALUES)
    return value


def text_of(value) -> str:
    """JSON as an attacker writes it: NaN, huge integers and half surrogate pairs."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(limit)


@st.composite
def json_file(draw, good: dict):
    """The bytes of a spoilt object, cut off, with a byte changed, nested deeply, or no JSON."""
    text = text_of(draw(spoilt(good))).encode()
    how = draw(st.integers(0, 24))
    if how == 0:
        return text[: draw(st.integers(0, len(text)))]
    if how == 1 and text:
        at = draw(st.integers(0, len(text) - 1))
        return text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
    if how == 2:
        return b'{"a":' * draw(st.sampled_from([50, 99, 500])) + b"1"
    if how == 3:
        return draw(st.binary(max_size=50))
    return text


@st.composite
def jsonl_file(draw, good: dict):
    return b"\n".join(draw(st.lists(json_file(good), min_size=1, max_size=4))) + draw(
        st.sampled_from([b"", b"\n"])
    )


@st.composite
def yaml_file(draw, good: dict):
    """JSON is YAML; beside it tags, anchors and numbers that PyYAML stumbles over."""
    text = draw(json_file(good))
    odd = [
        "2024-99-99",
        "!!binary x",
        "&a [*a]",
        "{<<: [1]}",
        "!!python/name:os.x",
    ]
    return draw(
        st.sampled_from(
            [text, text, text, f"train: {{steps: {draw(st.sampled_from(odd))}}}\n".encode()]
        )
    )


@st.composite
def safetensors_file(draw, tensors: dict):
    """A valid file whose header, length or data were changed."""
    raw = safetensors.torch.save(tensors, {"format": "pt"})
    size = int.from_bytes(raw[:8], "little")
    head, rest = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    how = draw(st.integers(0, 6))
    if how == 0:
        return raw[: draw(st.integers(0, len(raw)))]
    if how == 1:
        at = draw(st.integers(0, min(len(raw) - 1, 2 * size)))
        return raw[:at] + bytes([draw(st.integers(0, 255))]) + raw[at + 1 :]
    if how == 2:
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + raw[8:]
    key = draw(st.sampled_from([key for key in head if key != "__metadata__"]))
    part = draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "any"]))
    if part == "name":
        head[draw(st.text(max_size=8) | NAMES)] = head.pop(key)
    elif part == "any":
        head = draw(spoilt(head))
    elif part == "dtype":
        head[key]["dtype"] = draw(
            st.sampled_from(
                ["F64", "F16", "BF16", "I8", "I64", "BOOL", "F8_E5M2", "F4", "C64", "U16", "evil"]
            )
        )
    else:
        head[key][part] = draw(st.lists(st.integers(-1, 2**64), max_size=3))
    text = text_of(head).encode()
    return struct.pack("<Q", len(text)) + text + rest


TEMPLATE_PARTS = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ messages }}",
    "{% if add_generation_prompt %}", "{% endif %}", "x", "{% for i in range(999) %}",
    "{% set x = namespace(a=1) %}", "{% set x.a = x.a + 1 %}", "{{ x.a }}",
    "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[7].content }}",
    "{{ ''.__class__ }}", "{{ messages.__class__.__mro__ }}", "{{ undefined.x }}",
    "{% macro f() %}", "{% endmacro %}", "{{ f() }}", "{{ 'x' * 9999 }}",
    "{{ messages | tojson }}", "{% include 'x' %}", "{# ", " #}", "{% break %}",
    "{{ strftime_now('%Y' * 99) }}", "{{ messages.append(1) }}", "{{ '%99999d' % 1 }}",
    "{% generation %}", "{{ cycler() }}",
)  # fmt: skip
MATHS = (
    '\\boxed{', "}", "{", '\\frac', '\\sqrt', "1", "-", ",", ".", "e", "999", "10^", '\\text{',
    "x", "=", "+", '\\%', "$", " ", '\\', '\\times', "\u2212", "\ud800", "\x00", "\u0663", "\xbd",
    "\n", "B", "(", ")", "1e9", "/", '\\left', '\\int_0^1', '\\begin{matrix}', "&", "!",
)  # fmt: skip
EXPRESSIONS = st.lists(st.sampled_from(MATHS), max_size=30).map("".join)

# The readers

PROBLEM = {"prompt": "1+1=", "answer": 2, "kind": "number"}
ROWS = {
    "gpqa-diamond": {
        "Question": "q",
        "Correct Answer": "a",
        **{f"Incorrect Answer {i}": "bcd"[i - 1] for i in (1, 2, 3)},
    },
    "mmlu-pro": {
        "question": "q",
        "options": ["a", "N/A", "b"],
        "answer_index": 0,
        "category": "law",
    },
    "dapo-math-17k": {
        "prompt": [{"role": "user", "content": "q"}],
        "reward_model": {"ground_truth": "1"},
    },
    "aime24": {"problem": "q", "answer": "033"},
}
LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {},
    "alpha_pattern": {"q": 4.0},
    "target_modules": ["q"],
    "base_model_name_or_path": "some/model",
    "use_rslora": False,
    "init_lora_weights": True,
}
INFO = {
    "step": 6,
    "backbone": "some/model",
    "backbone_fingerprint": "ab",
    "template_hash": "cd",
    "method": "none",
    "alpha": 1.5,
}
DONE = {"config": {"steps": 8, "k": 1}, "inputs": {"a": "b"}, "seconds": 1.0}
LOG = {"step": 1, "accuracy": 0.5, "reward": 0.5, "response_length": 3.0, "seconds": 0.1}
RESULT = {
    "policy": "backbone",
    "accuracy": 0.5,
    "standard_error": 0.1,
    "n": 2,
    "response_length": 2.0,
    "by_problem": [0.0, 1.0],
}
PRESET = {
    "shared": {"threads": 1, "backbone": "x"},
    "train": {"steps": 5, "learning_rate": 0.25, "algorithm": "grpo"},
    "eval": {"policies": ["backbone"], "runs": 2},
    "reproduce": {
        "jobs": 1,
        "prepare": "python -m common.demo",
        "launch": "python",
        "continue_from": ["none"],
        "reference_steps": 9,
    },
}
FACTORS = {
    "base_model.model.q.lora_A.weight": torch.ones(2, 3),
    "base_model.model.q.lora_B.weight": torch.ones(4, 2),
}


INDEX = {"steps": [1, 2, 3], "k": 1, "modules": ["q"], "backbone": ""}
INDEX["checkpoints"] = {str(i): f"train/step_{i}" for i in (1, 2, 3)}
DELTAS = {"spectrum": torch.ones(3, 2)}
for role, count in (("global", 3), ("local", 3), ("target", 2)):
    DELTAS |= {f"{role}.u": torch.ones(count, 4), f"{role}.sigma": torch.ones(count)}
    DELTAS[f"{role}.v"] = torch.ones(count, 5)


@dataclasses.dataclass
class Place:
    """A folder that a reader may read in, laid out afresh for every case."""

    run: pathlib.Path

    def write(self, name: str, content: bytes | dict) -> pathlib.Path:
        path = self.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path


def read_problems(place: Place, content: bytes):
    data.load_problems(place.write("p.jsonl", content))


def read_rows(place: Place, drawn):
    name, content = drawn
    data.load_tasks([f"{name}={place.write('p.jsonl', content)}"])


def read_task_name(place: Place, name: str):
    for task in data.load_tasks([f"{name[:200]}={place.write('p.jsonl', PROBLEM)}"]):
        place.write(f"eval/backbone/{task}.json", {})


def read_preset(place: Place, content: bytes):
    path = str(place.write("p.yaml", content))
    config.parse(_train_config(), "train", "", ["--config", path])
    plans.single(path, config.load_preset(path), "runs/x")


@functools.cache
def _train_config():
    import importlib

    return importlib.import_module("01_train_lora_grpo").TrainConfig


def read_adapter_config(place: Place, content: bytes):
    folder = place.write("a/adapter_config.json", content).parent
    safetensors.torch.save_file(FACTORS, folder / "adapter_model.safetensors")
    adapters.read_info(folder)
    adapter = adapters.read_adapter(folder)
    adapters.write_adapter(
        place.run / "b", adapters.extended(adapter, {"q": (torch.ones(4, 3), torch.ones(3, 3))}), {}
    )


def read_adapter_weights(place: Place, content: bytes):
    place.write("a/adapter_config.json", LORA)
    adapters.read_adapter(place.write("a/adapter_model.safetensors", content).parent)


def read_checkpoint_info(place: Place, content: bytes):
    place.write("a/adapter_config.json", LORA)
    folder = place.write("a/checkpoint.json", content).parent
    adapters.read_info(folder)


def read_index(place: Place, content: bytes):
    place.write("deltas/index.json", content)
    safetensors.torch.save_file(DELTAS, place.run / "deltas" / "q.safetensors")
    deltas.load_trajectory(place.run / "deltas").aligned()


def read_deltas(place: Place, content: bytes):
    place.write("deltas/index.json", INDEX)
    place.write("deltas/q.safetensors", content)
    deltas.load_trajectory(place.run / "deltas").aligned()


@dataclasses.dataclass
class Options(config.StageConfig):
    steps: int = config.option(8, "how many")
    k: int = config.option(1, "ahead")


def read_done(place: Place, contents):
    for name, content in zip(("config.json", "done.json"), contents, strict=True):
        place.write(f"stage/{name}", content)
    stage.Stage(place.run / "stage", Options(), {"a": "b"}, grows="steps")


def read_log(place: Place, content: bytes):
    path = place.write("train/metrics.jsonl", content)
    stage.StepLog(path, keep_to=10)
    results.rl_seconds(place.run / "train", 10)


def read_results(place: Place, content: bytes):
    place.write("eval/backbone/test.json", content)
    results.load_results(place.run)


def read_model(place: Place, contents):
    for name, content in zip(
        ("config.json", "model.safetensors.index.json", "model.safetensors"), contents, strict=True
    ):
        place.write(f"m/{name}", content)
    model = models.open_model(place.run / "m")
    for name, path in model.files.items():
        assert path.parent == place.run / "m"
        model.tensor(name)


@functools.cache
def _tokenizer():
    return policy.load_backbone(str(demo.SHIPPED))[1]


def render(place: Place, template: str):
    _tokenizer().chat_template = template
    data.encode_prompts([data.Problem("1+1", "2")] * 2, _tokenizer(), "{prompt}", "s", 100, "p")


def score(place: Place, drawn):
    """What needs no parser: in-process, must take no time."""
    response, gold, kind = drawn
    for answer in (verifier.extract_boxed(response), verifier.last_number(response), response):
        if answer is not None:
            verifier.quick_verdict(answer, gold, kind)
            verifier.plain_number(answer)
            verifier.normalise(answer)


@functools.cache
def _judge():
    return verifier.Verifier(time_limit=2.0)


def ask_math_verify(place: Place, drawn):
    response, gold = drawn
    assert _judge().score([f"\\boxed{{{response}}}"], [data.Problem("", gold)], [True])[0] in (0.0, 1.0)


MODEL = (
    {"model_type": "qwen2"},
    {"weight_map": {"w": "model.safetensors"}},
    {"w": torch.ones(2, 2)},
)
READERS = {
    "JSONL problems": (read_problems, jsonl_file(PROBLEM)),
    "rows of benchmarks": (
        read_rows,
        st.sampled_from(sorted(ROWS)).flatmap(
            lambda name: st.tuples(st.just(name), jsonl_file(ROWS[name]))
        ),
    ),
    "names of tasks": (read_task_name, NAMES | st.text(LETTERS, max_size=12)),
    "presets": (read_preset, yaml_file(PRESET)),
    "adapter_config.json": (read_adapter_config, json_file(LORA)),
    "adapter_model.safetensors": (read_adapter_weights, safetensors_file(FACTORS)),
    "checkpoint.json": (read_checkpoint_info, json_file(INFO)),
    "index.json": (read_index, json_file(INDEX)),
    "deltas": (read_deltas, safetensors_file(DELTAS)),
    "config.json and done.json": (read_done, st.tuples(json_file(DONE), json_file(DONE))),
    "metrics.jsonl": (read_log, jsonl_file(LOG)),
    "eval results": (read_results, json_file(RESULT)),
    "model folders": (
        read_model,
        st.tuples(json_file(MODEL[0]), json_file(MODEL[1]), safetensors_file(MODEL[2])),
    ),
    "chat templates": (render, st.lists(st.sampled_from(TEMPLATE_PARTS), max_size=12).map("".join)),
    "responses": (
        score,
        st.tuples(EXPRESSIONS | st.text(LETTERS), EXPRESSIONS, st.sampled_from(data.KINDS)),
    ),
    PARSER: (ask_math_verify, st.tuples(EXPRESSIONS, EXPRESSIONS)),
}

# The watch

_allowed: list[str] = []  # while a case runs: the only folder that may be written in
_outside: list[str] = []
WRITES = {
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.link": (1,),
}
WRITES["shutil.rmtree"] = (0,)


def _watch(event: str, args: tuple) -> None:
    """An audit hook: Python tells it of every file that is opened, moved or removed."""
    if not _allowed:
        return
    paths = [args[i] for i in WRITES.get(event, ())]
    if (
        event == "open" and isinstance(args[0], str | bytes) and args[2] & 0o3
    ):  # os.O_WRONLY, os.O_RDWR
        paths = [args[0]]
    for path in paths:
        where = str(pathlib.Path(path if isinstance(path, str) else str(path)).absolute())
        inside = pathlib.Path(where).is_relative_to(_allowed[0]) or where == "/dev/null"
        if ".." in pathlib.Path(where).parts or not inside:
            _outside.append(f"{event} {where}")
    if event in ("subprocess.Popen", "os.system", "os.exec") and "common.rl.verifier" not in str(
        args
    ):
        _outside.append(f"{event} {args}")


sys.addaudithook(_watch)


def throw(reader: str, cases: int, seed: int = 0) -> dict:
    """`cases` files at one reader. Returns counts; raises what the reader raised beside
    UserError."""
    read, files = READERS[reader]
    counts, slowest = collections.Counter(), 0.0
    scratch = pathlib.Path(tempfile.mkdtemp())
    _tokenizer(), _train_config()  # loaded once, outside the watch

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(files)
    def one(content):
        nonlocal slowest
        place = Place(scratch / "run")
        shutil.rmtree(place.run, ignore_errors=True)
        place.run.mkdir()
        began = time.perf_counter()
        _allowed.append(str(place.run))
        try:
            read(place, content)
            counts["accepted"] += 1
        except UserError:
            counts["refused"] += 1
        except PLAIN:
            assert reader in BY_HAND
            counts["refused"] += 1
        finally:
            _allowed.clear()
        slowest = max(slowest, time.perf_counter() - began)
        assert not _outside

    try:
        one()
    finally:
        shutil.rmtree(scratch)
        if reader == PARSER:
            _judge().close()
    return {"cases": sum(counts.values()), **counts, "slowest": slowest, "outside": len(_outside)}


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_takes_a_file_or_says_what_is_wrong(reader):
    assert throw(reader, 5 if reader == PARSER else CASES)["outside"] == 0


def test_the_watch_sees_what_is_written_outside(tmp_path):
    """A reader that takes a name for a path as it stands would be found out."""
    _allowed.append(str(tmp_path / "run"))
    try:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "x").write_text("")
        assert not _outside
        (tmp_path / "run" / ".." / "x").write_text("")
        (tmp_path / "run_evil").mkdir()
    finally:
        _allowed.clear()
    seen = len(_outside)
    _outside.clear()
    assert seen == 2
