r"""Pre-trains the demo's backbone, and compares it with the one in common/demo/backbone.

    python tests/bench/demo_backbone.py                  # compares: 5 minutes, one core
    python tests/bench/demo_backbone.py --out runs/llama --architecture llama

On the kind of processor that made them the weights come out equal, bit for bit. Elsewhere rounding
differs, and after some 50 steps the runs part: one ended at a loss of 0.61, the shipped one at
0.78.
"""

import argparse
import json
import pathlib
import random
import sys
import tempfile

import safetensors.torch
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from common.demo import HIGH, LOW, SHIPPED, test_problems

CAREFUL_SHARE, SLIP, WRONG_DIGIT = 0.10, 0.10, 0.35
STEPS, BATCH, PEAK_LR, WARMUP = 2500, 128, 3e-3, 100


def careful_answer(a: int, b: int, rng: random.Random, slip: float = SLIP) -> str:
    r"""The sum column by column. A column that slips passes on its wrong digit and carry.

    >>> careful_answer(123, 489, random.Random(0), slip=0)
    '3+9+0=12,2+8+1=11,1+4+1=06;\\boxed{612}'
    """
    columns, digits, carry = [], "", 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        written = (total + rng.choice([-1, 1])) % 20 if rng.random() < slip else total
        columns.append(f"{x}+{y}+{carry}={written:02d}")
        carry, digits = written // 10, str(written % 10) + digits
    return ",".join(columns) + f";\\boxed{{{'1' * carry}{digits}}}"


def guessed_answer(a: int, b: int, rng: random.Random) -> str:
    """The sum, each digit replaced by a random one with probability `WRONG_DIGIT`."""
    digits = [rng.choice("0123456789") if rng.random() < WRONG_DIGIT else x for x in str(a + b)]
    return f"\\boxed{{{''.join(digits)}}}"


def pretraining_batch(rng: random.Random, tokenizer, held_out: set) -> list[tuple]:
    """Two groups, careful and guess, each (ids, labels) [rows, time], padded on the right.

    Labels are -100 outside the answer. A guess is a quarter as long as a careful answer, so padding
    them together would double the work.
    """
    texts = {True: [], False: []}
    while sum(map(len, texts.values())) < BATCH:
        a, b = rng.randint(LOW, HIGH), rng.randint(LOW, HIGH)
        if (a, b) not in held_out:
            careful = rng.random() < CAREFUL_SHARE
            answer = (careful_answer if careful else guessed_answer)(a, b, rng)
            texts[careful].append((f"<|user|>{a}+{b}<|assistant|>", f"{answer}<|end|>"))
    groups = []
    for rows in filter(None, texts.values()):
        prompts, answers = (tokenizer(list(part))["input_ids"] for part in zip(*rows, strict=True))
        pairs = list(zip(prompts, answers, strict=True))
        ids = pad_sequence([torch.tensor(p + a) for p, a in pairs], batch_first=True)
        labels = [torch.tensor([-100] * len(p) + a) for p, a in pairs]
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        groups.append((ids, labels))  # causal attention never sees the padding: no mask
    return groups


def pretrain(out: pathlib.Path, architecture: str = "qwen2", steps: int = STEPS) -> list[float]:
    """Pre-trains the backbone into `out`. Returns the loss of each step (mean over tokens, nats).

    Sizes and tokenizer are those of the shipped one, a Qwen2; a Llama has no biases in its
    attention. The schedule is always that of `STEPS`: fewer steps are the start of the whole run.
    """
    torch.manual_seed(0)
    test = test_problems()
    rng, held_out = random.Random(0), {*test} | {(b, a) for a, b in test}
    # 150,000 parameters; heads of 32 dimensions, which vLLM's attention needs. A token is a
    # character, but for one that is `\boxed{`.
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    sizes = json.loads((SHIPPED / "config.json").read_text())
    del sizes["model_type"], sizes["architectures"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [WARMUP])
    losses = []
    for _ in tqdm(range(steps), desc="pre-training"):
        groups = pretraining_batch(rng, tokenizer, held_out)
        tokens = sum(int((labels != -100).sum()) for _, labels in groups)
        losses.append(0.0)
        for ids, labels in groups:
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            targets = labels[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / tokens
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "pretraining_loss.json").write_text(json.dumps([round(x, 6) for x in losses]))
    return losses


def compare(out: pathlib.Path, losses: list[float]) -> None:
    """Asserts that `out` was made as the shipped one was; says how far they came to differ."""
    new, shipped = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (out, SHIPPED)
    )
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (out, SHIPPED)]
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    asked = [f"<|user|>{a}+{b}<|assistant|>" for a, b in test_problems()]
    prompts = torch.tensor(tokenizer(asked)["input_ids"])
    with torch.no_grad():
        first, second = (m(input_ids=prompts).logits[:, -1].softmax(-1).mean(0) for m in models)
    gap = max((new[name] - shipped[name]).abs().max().item() for name in shipped)
    logged = json.loads((SHIPPED / "pretraining_loss.json").read_text())
    tail, shipped_tail = sum(losses[-100:]) / 100, sum(logged[-100:]) / 100
    think = abs((first - second)[tokenizer.convert_tokens_to_ids("\\boxed{")].item())
    print(f"largest weight difference {gap:.2e}; loss of the last 100 steps {tail:.4f}")
    print(f"(shipped {shipped_tail:.4f}); share of guesses differs by {think:.4f}")
    off = max(abs(x / y - 1) for x, y in zip(losses[:50], logged[:50], strict=True))
    assert off < 1e-3, f"the program is another: the first 50 losses differ by {off:.1e}"
    print("equal, bit for bit" if gap == 0 else f"equal for 50 steps (to {off:.1e}), then not")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help="the folder to make [compare, keep none]")
    parser.add_argument("--architecture", choices=("qwen2", "llama"), default="qwen2")
    args = parser.parse_args()
    torch.set_num_threads(1)  # for such small matrices a second thread costs more than it brings
    if args.out:
        pretrain(args.out, args.architecture)
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(pathlib.Path(scratch), pretrain(pathlib.Path(scratch)))


if __name__ == "__main__":
    main()
