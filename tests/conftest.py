"""Shared fixtures: the tiny backbone, and one whole chain of stages that many tests look at."""

import fcntl
import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # with a GPU: bf16, and vLLM where it is installed
import torch
from peft import LoraConfig, get_peft_model

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TINY = str(ROOT / "tests" / "tiny.yaml")
SCRIPTS = {path.name[:2]: path.name for path in sorted(ROOT.glob("0*.py"))}
SECTIONS = ("train", "extract", "predict", "extrapolate", ("train", "continue"), "eval")
torch.set_num_threads(1)

from common import demo
from common.files import config, models, read, write
from common.files import stage as stages
from common.rl import policy

# The slowest first, each to one of the two processes of pytest, so that both end together.
SLOW = ["test_stages.py", "test_grid.py", "test_rates.py", "test_torture.py", "test_full.py"]
SLOW += ["test_memory.py", "test_going_on.py", "test_algorithms.py", "test_verifier.py"]
SLOW += ["test_dense.py", "test_rewards.py", "test_methods.py", "test_demo.py"]
PROMPTS = ["<|user|>123+489<|assistant|>", "<|user|>7+12<|assistant|>", "<|user|>1<|assistant|>"]


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def plain_logprobs(model, prompt, completion, temperature):
    """One sequence, no padding, no cache: log_softmax of the ordinary forward pass."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float() / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(
        1, torch.tensor(completion)[:, None]
    )[:, 0]


def rank_1(matrix: torch.Tensor) -> torch.Tensor:
    """sigma_1 u v^T of a dense matrix."""
    u, sigma, vh = torch.linalg.svd(matrix)
    return sigma[0] * torch.outer(u[:, 0], vh[0])


def encode(tokenizer, texts):
    return tokenizer(texts)["input_ids"]


def run_stage(script: str, *args: str, env: dict | None = None) -> subprocess.CompletedProcess:
    """A stage as a user starts it, from the repository root."""
    return subprocess.run(
        [sys.executable, script, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **(env or {})},
    )


def start_two(
    script: str, folder: pathlib.Path, accelerate_config: str, *args: str
) -> subprocess.Popen:
    """A stage on two processes, as `accelerate launch` starts them."""
    where = f"common/accelerate/{accelerate_config}.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", where, "--num_processes", "2"]
    return subprocess.Popen(
        [sys.executable, *launch, script, "--config", TINY, "--run-dir", str(folder), *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )


def parse_stage(number: str, *flags: str) -> config.StageConfig:
    """The options of a stage that is typed with these flags."""
    name = SCRIPTS[number].removesuffix(".py")
    found = [c for c in vars(importlib.import_module(name)).values() if isinstance(c, type)]
    [cls] = [c for c in found if c.__module__ == name and issubclass(c, config.StageConfig)]
    return config.parse(cls, SECTIONS[int(number) - 1], "", [*flags])


def call_main(number: str, *args: str) -> None:
    """A stage's main in this process, without seconds of imports. What it raises is raised here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [SCRIPTS[number], *args])
        importlib.import_module(SCRIPTS[number].removesuffix(".py")).main()


def call_stage(capsys, number: str, run: pathlib.Path, *flags: str) -> tuple[int, str]:
    """As `call_main`, but returns the exit code and the last line that was written to stderr."""
    capsys.readouterr()  # what came before
    try:
        stages.run_stage(lambda: call_main(number, "--run-dir", str(run), *flags))
        code = 0
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if "%|" not in line and line.strip()]  # bars of slow machines
    return code, lines[-1] if lines else ""


def save_lora(model, folder: pathlib.Path, info: dict) -> None:
    """A checkpoint of a LoRA policy, as stage 1 writes it."""
    with write.atomic_dir(folder, info) as open_folder:
        policy.save(model, None, open_folder)


def save_series(backbone: pathlib.Path, name, count=8, dtype=torch.float32, **options) -> None:
    """Checkpoints of a LoRA's random walk, each saved by PEFT to name.format(10, 20 ...)."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(policy.load_backbone(str(backbone))[0], config)
    for step in range(10, 10 * count + 10, 10):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn(parameter.shape)
        saved = {key: value.to(dtype) for key, value in model.state_dict().items()}
        model.save_pretrained(str(name).format(step), state_dict=saved, save_embedding_layers=False)


def measured_as(run: pathlib.Path, policy: str, accuracy: float, **changes) -> None:
    """What stage 6 would have written of a policy, on validation problems."""
    record = {"accuracy": accuracy, "data": "d", "settings": {"seed": 1}, **changes}
    record["weights"] = models.weights_hash(run / policy)
    write.write_json(run / "validation" / policy.replace("/", "__") / "valid.json", record)


def lay_out(folder: pathlib.Path) -> pathlib.Path:
    """A run directory with the demo's backbone and data, as `python -m common.demo` makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo", "--run-dir", str(folder)])
        demo.main()
    return folder


@pytest.fixture(scope="session")
def backbone_dir() -> pathlib.Path:
    return demo.SHIPPED


@pytest.fixture
def lora_policy(backbone_dir):
    """(policy, tokenizer): the demo backbone with a LoRA of rank 4 whose B is not zero any more."""
    backbone, tokenizer = policy.load_backbone(str(backbone_dir))
    model = policy.add_lora(backbone, 4, 2.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, tokenizer


@pytest.fixture(scope="session")
def empty_run(tmp_path_factory) -> pathlib.Path:
    """A run directory in which nothing has been trained yet. Read only."""
    return lay_out(tmp_path_factory.mktemp("empty") / "run")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> pathlib.Path:
    """All stages on tests/tiny.yaml by `reproduce`, interrupted once by Ctrl-C and typed again.

    Read only; `run` is a copy. Of pytest's processes the first that needs it makes it for all.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "finished" / "run"
    folder.parent.mkdir(exist_ok=True)
    with open(folder.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "printed.txt").exists():
            make_run(folder)
    return folder


def interrupted(command: list[str], at: str) -> str:
    """Types `command`, Ctrl-C at a line with `at`, types it again: all that was printed."""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True}
    first, printed = subprocess.Popen(command, cwd=ROOT, text=True, **quiet), []
    for line in first.stdout:
        if at in line and not any(at in before for before in printed):
            first.send_signal(signal.SIGINT)
        printed.append(line)
    assert first.wait() == 130, "".join(printed)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    return "".join(printed) + again.stdout


def make_run(folder: pathlib.Path) -> None:
    command = [sys.executable, "-m", "common.reproduce", "--preset", TINY, "--run-dir", str(folder)]
    (folder / "printed.txt").write_text(interrupted(command, "[01] step 1/"))


@pytest.fixture
def run(finished_run, tmp_path) -> pathlib.Path:
    """A finished run that a test may spoil."""
    return pathlib.Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def new_run(empty_run, tmp_path) -> pathlib.Path:
    """A run directory in which a test may train."""
    return pathlib.Path(shutil.copytree(empty_run, tmp_path / "new" / "run"))


@pytest.fixture
def stage(capsys):
    """call_stage with the tiny preset: stage("01", run, "--steps", "2")."""
    preset = ("--config", TINY)
    return lambda number, run, *flags: call_stage(capsys, number, run, *preset, *flags)


@pytest.fixture
def typed(capsys):
    """call_stage without a preset: typed("04", run, "--methods", "none")."""
    one = ("--threads", "1")
    return lambda number, run, *flags: call_stage(capsys, number, run, *one, *flags)


@pytest.fixture
def extract(typed):
    """Stage 2 on a short series: extract(run, pattern, "--last-step", "60")."""
    short = ("--k", "2", "--fit-checkpoints", "4", "--checkpoints")
    return lambda run, pattern, *flags: typed("02", run, *short, str(pattern), *flags)


def metrics(folder: pathlib.Path) -> list[dict]:
    """The metrics of a run without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if "seconds" not in k and k != "tokens_per_second"}
        for row in read.read_jsonl(folder / "metrics.jsonl")
    ]


def weights(folder: pathlib.Path) -> dict[str, bytes]:
    """The files of weights of all checkpoints in `folder`."""
    paths = folder.glob("step_*/adapter_model.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def flip_bit(path: pathlib.Path) -> None:
    """One bit of the last number in a file of weights."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 8
    path.write_bytes(content)


def edit_json(path: pathlib.Path, **changes) -> None:
    """As by hand, in a folder of others, which has no hashes."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (path.parent / "sha256.json").unlink(missing_ok=True)
