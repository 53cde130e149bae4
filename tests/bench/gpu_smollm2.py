"""What gpu_smollm2.sh needs of Python: a choice, comparisons, random models, two rewards.

python tests/bench/gpu_smollm2.py best 'runs/gpu/validation/*'    # the policy of the best accuracy
python tests/bench/gpu_smollm2.py phases runs/gpu/lr*             # seconds, tokens, gap, memory
python tests/bench/gpu_smollm2.py twice runs/gpu/lr1e-4 runs/gpu/again
python tests/bench/gpu_smollm2.py alone --config ... --run-dir ... --policies train/step_0020
python tests/bench/gpu_smollm2.py weights 1.5b runs/gpu/SmolLM2 runs/gpu/shapes/1.5b
"""

import glob
import hashlib
import importlib
import json
import pathlib
import resource
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# Of Qwen2.5: hidden size, of the MLP, layers, heads, of keys, vocabulary, head tied to embedding.
SHAPES = {
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "tiny": (64, 128, 2, 4, 2, 49152, True),
}
CLOCK = ("seconds", "tokens_per_second", "seconds_by_phase", "reward_memory")


# Rewards of stage 1: `--reward tests/bench/gpu_smollm2.py:noise`


def noise(completion_ids, **_) -> list[float]:
    """0 or 1 by a hash of the response: random weights solve nothing, and RL needs differences."""
    return [float(hashlib.sha256(repr(ids).encode()).digest()[0] % 2) for ids in completion_ids]


def memory(completion_ids, **_) -> list[float]:
    """Torch's peak since the step before, GB: metrics.jsonl has it as reward_memory. Weight 0."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return [peak] * len(completion_ids)


# What was measured


def rows_of(run: str) -> list[dict]:
    log = pathlib.Path(run) / "train" / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def best(pattern: str) -> None:
    """Prints the policy with the highest accuracy in the folders of stage 6's results."""
    files = sorted(glob.glob(f"{pattern}/*.json"))
    found = [json.loads(pathlib.Path(file).read_text()) for file in files]
    for row in found:
        print(f"{row['policy']}: {row['accuracy']:.4f} of {row['n']}", file=sys.stderr)
    print(max(found, key=lambda row: row["accuracy"])["policy"])


def phases(*runs: str) -> None:
    """Medians of a step of each run, without its first ones."""
    for run in runs:
        if not (rows := rows_of(run)):
            continue
        used = rows[min(10, len(rows) // 5) :]
        middle = {
            phase: statistics.median(row["seconds_by_phase"][phase] for row in used)
            for phase in ("sync", "rollout", "reward", "logprob", "update", "save")
        }
        parts = " ".join(f"{phase} {value:.3f}" for phase, value in middle.items())
        seconds = statistics.median(row["seconds"] for row in used)
        speeds = [row["tokens"] / row["seconds_by_phase"]["rollout"] for row in used]
        gap = statistics.fmean(row["logprob_gap_mean"] for row in used)
        print(f"{run}: {len(rows)} steps, {seconds:.3f} s a step ({parts}),", end=" ")
        print(
            f"rollout {statistics.median(speeds):,.0f} tokens a second, gap {gap:.1e} nats,",
            end=" ",
        )
        print(f"peak {max(row.get('reward_memory', 0) for row in rows):.2f} GB")
        tens = [rows[i : i + 10] for i in range(0, len(rows), 10)]
        means = [statistics.fmean(row["accuracy"] for row in ten) for ten in tens]
        print("  accuracy, each ten steps:", " ".join(f"{mean:.3f}" for mean in means))


def twice(run: str, again: str) -> None:
    """Says whether two trainings with the same options made the same, and where they part."""
    for row, other in zip(rows_of(run), rows_of(again), strict=False):
        if odd := [key for key in row if key not in CLOCK and row[key] != other[key]]:
            print(f"step {row['step']}: the first that differs, in {', '.join(odd)}")
            break
    else:
        print("every step's metrics are equal")
    for folder in sorted(pathlib.Path(again).glob("train/step_*")):
        file = f"train/{folder.name}/adapter_model.safetensors"
        both = [(pathlib.Path(one) / file).read_bytes() for one in (run, again)]
        hashes = [hashlib.sha256(data).hexdigest()[:16] for data in both]
        print(f"{folder.name}: {'equal' if hashes[0] == hashes[1] else 'differs'} {hashes}")


def alone(*flags: str) -> None:
    """Our rollouts against vLLM's own call, in one engine: the same adapter, prompts, lengths."""
    from common.files.config import parse
    from common.rl import data, policy, rollout

    stage6 = importlib.import_module("06_eval")
    cfg = parse(stage6.EvalConfig, "eval", __doc__, [*flags])
    cfg.engine, accelerator = rollout.choose_engine(cfg.engine), policy.start_processes("auto")
    model, tokenizer = policy.load_backbone(cfg.backbone)
    problems = data.load_problems(cfg.test_data[0])[:16]
    turns = (tokenizer, cfg.prompt_template, cfg.system_prompt)
    _, prompts = data.encode_prompts(problems, *turns, cfg.max_prompt_tokens, "test")
    prompts = [prompt for prompt in prompts for _ in range(8)]
    adapter = pathlib.Path(cfg.run_dir) / cfg.policies[0]
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    engine = rollout.make_engine(cfg, model, tokenizer, cfg.backbone, rank, accelerator)
    engine.use(adapter)

    def ours(first: int) -> int:
        seeds = range(first, first + len(prompts))
        found = engine.generate(prompts, [*seeds], cfg.max_new_tokens)
        return sum(len(one.tokens) for one in found)

    def theirs(first: int) -> int:
        import vllm

        params = vllm.SamplingParams(temperature=1.0, max_tokens=cfg.max_new_tokens)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = engine.llm.generate(asked, params, lora_request=engine.lora, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in found)

    calls = {"ours": ours} | ({"vLLM alone": theirs} if cfg.engine == "vllm" else {})
    speeds = {name: [] for name in calls}
    for turn in range(8):
        for name, call in calls.items():
            began = time.perf_counter()
            speeds[name].append(call(1000 * turn) / (time.perf_counter() - began))
    middle = {name: statistics.median(found[2:]) for name, found in speeds.items()}
    print({name: f"{value:,.0f} tokens a second" for name, value in middle.items()})
    if len(middle) > 1:
        print(f"ours is {middle['ours'] / middle['vLLM alone']:.3f} of vLLM alone")
    engine.close()


def weights(size: str, tokenizer: str, out: str) -> None:
    """A Qwen2.5 of this size with random weights, and problems of about 1,000 tokens beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    words = AutoTokenizer.from_pretrained(tokenizer)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
    ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = Qwen2Config(**dict(zip(names, SHAPES[size], strict=True)), **ends)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    words.save_pretrained(out)
    long = 950 if size != "tiny" else 10
    rows = [{"prompt": f"{i}" + " sum" * long, "answer": "1"} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    pathlib.Path(f"{out}.jsonl").write_text(lines)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    tasks = {task.__name__: task for task in (best, phases, twice, alone, weights)}
    tasks[sys.argv[1]](*sys.argv[2:])
