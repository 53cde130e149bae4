"""Load without a model: seconds and peak memory of what a paper-sized run does beside it.

python tests/bench/bench_load.py            # all three, each in a process of its own
python tests/bench/bench_load.py data       # 157 steps of 128 problems x 8 responses
python tests/bench/bench_load.py log        # metrics.jsonl of 10,000 steps: resumed, counted, drawn
python tests/bench/bench_load.py series     # stage 2 on 100, 300, 1,000 checkpoints of rank 16

Run it by hand. `data` is the data, prompts, rewards and advantages.
"""

import contextlib
import importlib
import io
import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from common import demo, grpo
from common.files import adapters
from common.files.resume import StepLog
from common.reproduce import figures, results, runs
from common.rl import data, policy, verifier

STEPS, PER_STEP, ROLLOUTS = 157, 128, 8  # one epoch of 20,096 problems


def now() -> float:
    """Memory in use, MB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak() -> float:
    """The most memory that was ever in use, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def problem(i: int, draw: random.Random) -> tuple[dict, str]:
    """A row of a data set and its right answer.

    Nine of ten are integers, as in DAPO, the others LaTeX for math-verify.
    """
    if i % 10:
        answer = str(draw.randint(0, 99_999))
        return {"prompt": f"{i}+{answer}=", "answer": int(answer), "kind": "number"}, answer
    answer = rf"\frac{{{draw.randint(1, 99)}}}{{{draw.randint(100, 199)}}}"
    return {"prompt": f"{i}+{i % 7}=", "answer": answer}, answer


def wrong(draw: random.Random) -> str:
    return rf"\frac{{1}}{{{draw.randint(2, 9)}}}"


def load_data(scratch: pathlib.Path) -> None:
    draw = random.Random(0)
    rows = [problem(i, draw) for i in range(STEPS * PER_STEP)]
    (scratch / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in rows))
    right = [answer for _, answer in rows]
    _, tokenizer = policy.load_backbone(str(demo.SHIPPED))
    del rows
    began, before = time.perf_counter(), now()
    problems = data.load_problems(scratch / "p.jsonl")
    read = time.perf_counter()
    problems, prompts = data.encode_prompts(problems, tokenizer, "{prompt}", "", 100, "p")
    encoded = time.perf_counter()
    print(f"{len(problems)} problems read in {read - began:.1f} s, prompts encoded in ", end="")
    print(f"{encoded - read:.1f} s, {now() - before:.0f} MB more")
    judge, memory, correct = verifier.Verifier(5.0), {}, 0
    for step in range(1, STEPS + 1):
        order = data.prompt_order(len(problems), PER_STEP, step, seed=0)
        asked = [i for i in order for _ in range(ROLLOUTS)]
        answers = [right[i] if draw.random() < 0.5 else wrong(draw) for i in asked]
        responses = [
            f"Let us see. {len(prompts[i])} tokens ... so it is \\boxed{{{a}}}."
            for i, a in zip(asked, answers, strict=True)
        ]
        scores = judge.score(responses, [problems[i] for i in asked], [True] * len(asked))
        correct += sum(scores)
        advantages = grpo.grpo_advantages(torch.tensor(scores).view(-1, ROLLOUTS))
        assert advantages.isfinite().all()
        if step in (1, 10, 50, 100, STEPS):
            memory[step] = now()
    judge.close()
    seconds = time.perf_counter() - encoded
    share = correct / STEPS / PER_STEP / ROLLOUTS
    print(
        f"{STEPS} steps of {PER_STEP} x {ROLLOUTS} rewards and advantages in {seconds:.1f} s, ",
        end="",
    )
    print(f"{share:.1%} right, {judge.timeouts} timeouts, {judge.errors} errors")
    used = ", ".join(f"{step}: {value:.0f} MB" for step, value in memory.items())
    print(f"memory after step {used}; peak {peak():.0f} MB")
    print(f"in all {time.perf_counter() - began:.1f} s")


def load_log(scratch: pathlib.Path) -> None:
    line = json.loads(metrics_line())
    for name in ("train", "continued/repeat-last_alpha1.5"):
        (scratch / name).mkdir(parents=True)
        with open(scratch / name / "metrics.jsonl", "w") as file:
            for step in range(1, 10_001):
                file.write(json.dumps({**line, "step": step, "accuracy": (step % 97) / 97}) + "\n")
    size = (scratch / "train" / "metrics.jsonl").stat().st_size / 2**20
    began = time.perf_counter()
    log = StepLog(scratch / "train" / "metrics.jsonl", keep_to=10_000)
    log.append({**line, "step": 10_001})
    resumed = time.perf_counter()
    for step in range(10, 10_001, 10):  # what a report asks for 1,000 evaluated checkpoints
        results.rl_seconds(scratch / "train", step)
    counted = time.perf_counter()
    figures.training(runs.Runs(scratch))
    drawn = time.perf_counter()
    print(f"a metrics.jsonl of 10,000 steps ({size:.1f} MB): resumed in {resumed - began:.2f} s,")
    print(f"seconds up to each of 1,000 steps in {counted - resumed:.2f} s, two of them drawn in")
    print(f"{drawn - counted:.2f} s; peak {peak():.0f} MB")


def metrics_line() -> str:
    """A line as stage 1 writes it."""
    keys = "reward accuracy response_length truncated_share zero_variance_groups loss clip_share"
    keys += " entropy logprob_gap_mean logprob_gap_max grad_norm learning_rate seconds"
    counts = {"step": 1, "tokens": 4567, "verifier_timeouts": 0, "verifier_errors": 0}
    phases = dict.fromkeys(("sync", "rollout", "reward", "logprob", "update", "save"), 1.2345)
    values = dict.fromkeys([*keys.split(), "tokens_per_second"], 0.123456)
    return json.dumps({**counts, **values, "seconds_by_phase": phases})


def load_series(scratch: pathlib.Path, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"layers.{i}.q_proj": (torch.zeros(64, 16), torch.randn(16, 64, generator=generator))
        for i in range(6)
    }
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 8, "base_model_name_or_path": "x"}
    for step in range(1, count + 1):
        for b, a in factors.values():
            b += 0.01 * torch.randn(b.shape, generator=generator)
            a += 0.001 * torch.randn(a.shape, generator=generator)
        folder = scratch / "train" / f"step_{step:04d}"
        adapters.write_adapter(folder, adapters.Adapter(config, factors), {"step": step})
    stage = importlib.import_module("02_extract_deltas")
    began, before = time.perf_counter(), now()
    sys.argv = ["02_extract_deltas.py", "--run-dir", str(scratch), "--threads", "2"]
    with contextlib.redirect_stdout(io.StringIO()):
        stage.main()
    size = sum(path.stat().st_size for path in (scratch / "deltas").glob("*.safetensors")) / 2**20
    seconds = time.perf_counter() - began
    print(
        f"{count} checkpoints of 6 LoRAs on 64 x 64, rank 16: stage 2 in {seconds:.1f} s, peak ",
        end="",
    )
    print(f"{peak() - before:.0f} MB over the {before:.0f} MB before; deltas of {size:.1f} MB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, *more = sys.argv[1:] or ["all"]
    if name == "all" or (name == "series" and not more):
        series = [["series", count] for count in ("100", "300", "1000")]
        for words in [["data"], ["log"], *series] if name == "all" else series:
            subprocess.run([sys.executable, __file__, *words], check=True)
    else:
        load = {"data": load_data, "log": load_log, "series": load_series}[name]
        with tempfile.TemporaryDirectory() as folder:
            load(pathlib.Path(folder), *map(int, more))
