"""An RL step of stage 1 against one of TRL's GRPOTrainer, with the same work. Needs TRL.

    python tests/bench/bench_trl.py                 # 16 x 8 rollouts of the demo, 60 steps each
    python tests/bench/bench_trl.py --seeds 0 1 2   # in turn, with the reward of both by ten steps
    python tests/bench/bench_trl.py --model /path/to/SmolLM2 --prompts 4 --rollouts 4 --longest 64 \
        --threads 2 --steps 4 --skip 1              # any model, on the demo's sums

Run it by hand, alone. Both: LoRA of rank 16, four updates a step, no KL, rollouts by
`transformers`, the dtype of the model's folder, and the same allocator. Medians after --skip steps.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common.reproduce.runner import DEFAULTS  # threads and allocator

UPDATES, RATE = 4, 1e-3
PHASES = ("rollout", "logprob", "update")  # TRL's logprob has its reward in it


def ours(run: pathlib.Path, seed: int, args) -> dict:
    """Seconds of every step, reward, and medians by phase of stage 1."""
    flags = {
        **{"config": "demo", "run-dir": run, "backbone": args.model or run / "backbone"},
        **{"prompts-per-step": args.prompts, "mini-batch": args.prompts // UPDATES},
        **{"rollouts": args.rollouts, "max-new-tokens": args.longest, "max-prompt-tokens": 128},
        **{"learning-rate": RATE, "seed": seed, "threads": args.threads, "steps": args.steps},
        **{"save-every": args.steps, "resume-every": args.steps, "engine": "hf"},
    }
    command = [sys.executable, "01_train_lora_grpo.py"]
    command += [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    subprocess.run(command, cwd=ROOT, check=True, env=DEFAULTS | os.environ, capture_output=True)
    lines = (run / "train" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    phases = {
        phase: statistics.median(row["seconds_by_phase"][phase] for row in rows[args.skip :])
        for phase in PHASES
    }
    seconds, reward = [row["seconds"] for row in rows], [row["reward"] for row in rows]
    return {"seconds": seconds, "reward": reward, "phases": phases}


def theirs(run: pathlib.Path, seed: int, args) -> dict:
    """The same of TRL, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--trl", str(run), "--seeds", str(seed)]
    environment = DEFAULTS | os.environ
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def train_by_trl(run: pathlib.Path, seed: int, args) -> dict:
    import datasets
    import peft
    import torch
    import transformers
    import trl

    torch.set_num_threads(args.threads)
    ends, rewards, sampling, making = [time.perf_counter()], [], [], []

    def solved(completions, answer, **_):
        pairs = zip(completions, answer, strict=True)
        found = [float(f"\\boxed{{{right}}}" in text[0]["content"]) for text, right in pairs]
        rewards.append(statistics.fmean(found))
        return found

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % UPDATES == 0:  # of the optimizer; four are one of RL
                ends.append(time.perf_counter())

    class Timed(trl.GRPOTrainer):
        def _generate(self, prompts):
            began = time.perf_counter()
            found = super()._generate(prompts)
            sampling.append(time.perf_counter() - began)
            return found

        def _generate_and_score_completions(self, inputs):
            began = time.perf_counter()
            found = super()._generate_and_score_completions(inputs)
            making.append(time.perf_counter() - began)
            return found

    size, model = args.prompts * args.rollouts // UPDATES, args.model or str(run / "backbone")
    dtype = transformers.AutoConfig.from_pretrained(model).dtype or torch.float32
    config = trl.GRPOConfig(
        output_dir=str(run / "trl"), max_steps=UPDATES * args.steps, save_strategy="no", seed=seed,
        per_device_train_batch_size=size, steps_per_generation=UPDATES,
        num_generations=args.rollouts, max_completion_length=args.longest, learning_rate=RATE,
        lr_scheduler_type="constant", beta=0.0, model_init_kwargs={"dtype": dtype},
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    data = {"data_files": str(run / "data" / "train.jsonl"), "cache_dir": str(run / "cache")}
    problems = datasets.load_dataset("json", split="train", **data)
    problems = problems.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    lora = peft.LoraConfig(r=16, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    given = {"args": config, "train_dataset": problems, "callbacks": [Clock()]}
    Timed(model, reward_funcs=solved, peft_config=lora, **given).train()
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    parts = zip(seconds, making, sampling, strict=True)
    rows = [(rollout, made - rollout, all_ - made) for all_, made, rollout in parts]
    medians = map(statistics.median, zip(*rows[args.skip :], strict=True))
    phases = dict(zip(PHASES, medians, strict=True))
    return {"seconds": seconds, "reward": rewards, "phases": phases}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", help="a folder [the demo's backbone]")
    sizes = {"prompts": 16, "rollouts": 8, "longest": 80, "threads": 1, "steps": 70, "skip": 10}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"[{size}]")
    parser.add_argument("--trl", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        print(json.dumps(train_by_trl(args.trl, args.seeds[0], args)))
        return
    ratios = []
    for seed in args.seeds:
        found = {}
        with tempfile.TemporaryDirectory() as scratch:
            run = pathlib.Path(scratch)
            lay_out = [sys.executable, "-m", "common.demo", "--run-dir", scratch]
            subprocess.run(lay_out, cwd=ROOT, check=True, capture_output=True)
            for name, train in (("stage 1", ours), ("TRL", theirs)):
                found[name] = one = train(run, seed, args)
                phases = ", ".join(f"{k} {v:.3f}" for k, v in one["phases"].items())
                middle, rewards = statistics.median(one["seconds"][args.skip :]), one["reward"]
                tens = [rewards[i : i + 10] for i in range(0, len(rewards), 10)]
                curve = " ".join(f"{statistics.fmean(ten):.3f}" for ten in tens)
                print(f"seed {seed}  {name:8} {middle:.3f} s a step ({phases}); ", end="")
                print(f"reward by ten steps {curve}", flush=True)
        ours_, theirs_ = (statistics.median(one["seconds"][args.skip :]) for one in found.values())
        ratios.append(theirs_ / ours_)
    print(f"TRL's step takes {statistics.median(ratios):.2f} times as long")


if __name__ == "__main__":
    main()
