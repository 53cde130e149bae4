r"""The demo's task and backbone: a tiny Qwen2 that can add by thinking or by guessing.

    python -m common.demo --run-dir runs/demo    # writes runs/demo/backbone and runs/demo/data
    python -m common.demo --pretrain OUT         # makes the shipped backbone again (minutes)
    python -m common.demo --pretrain OUT --architecture llama    # one of the same size

The task is the sum of two five-digit numbers. Pre-training shows two ways to answer `12345+48967`:

    careful (10%)   5+7+0=12,4+6+1=11,3+9+1=13,2+8+1=11,1+4+1=06;\boxed{61312}
    guess   (90%)   \boxed{61312}

The careful way takes a column a step, and one column in ten slips. In a guess 35% of the digits are
replaced. So the model mostly guesses and is mostly wrong, but it can think. Reward alone teaches it
to: accuracy and response length rise together. The backbone is an ordinary Hugging Face folder and
the problems are ordinary JSONL; the six stages know no demo.
"""

import argparse
import json
import pathlib
import random
from collections.abc import Iterable

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.files.write import atomic_dir, copy_files, save_pretrained, write_text

SHIPPED = pathlib.Path(__file__).parent / "backbone"
LOW, HIGH = 10_000, 99_999  # of the numbers that are added
CAREFUL_SHARE, SLIP, WRONG_DIGIT = 0.10, 0.10, 0.35
STEPS, BATCH, PEAK_LR, WARMUP = 2500, 128, 3e-3, 100
TRAIN_PROBLEMS, TEST_PROBLEMS, VALID_PROBLEMS = 4096, 256, 256
Pair = tuple[int, int]


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


def problems(count: int, seed: int, exclude: Iterable[Pair] = ()) -> list[Pair]:
    """`count` different pairs of numbers, none in `exclude` in either order."""
    rng, found = random.Random(seed), []
    seen = {*exclude} | {(b, a) for a, b in exclude}
    while len(found) < count:
        a, b = rng.randint(LOW, HIGH), rng.randint(LOW, HIGH)
        if (a, b) not in seen:
            seen |= {(a, b), (b, a)}
            found.append((a, b))
    return found


def test_problems() -> list[Pair]:
    """The fixed test set. RLVR and pre-training both leave it out."""
    return problems(TEST_PROBLEMS, seed=20260414)


def write_data(folder: pathlib.Path) -> None:
    """train.jsonl, test.jsonl and valid.jsonl. No problem is in two of them.

    valid.jsonl is for methods that choose by accuracy. Pre-training may have seen its problems.
    """
    test = test_problems()
    train = problems(TRAIN_PROBLEMS, seed=1, exclude=test)
    valid = problems(VALID_PROBLEMS, seed=2, exclude=test + train)
    for name, pairs in (("train", train), ("test", test), ("valid", valid)):
        rows = [{"prompt": f"{a}+{b}", "answer": str(a + b), "kind": "number"} for a, b in pairs]
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def pretraining_batch(rng: random.Random, tokenizer, held_out: set[Pair]) -> list[tuple]:
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
    with atomic_dir(out) as folder:
        save_pretrained(folder, model, tokenizer)
        write_text(folder / "pretraining_loss.json", json.dumps([round(x, 6) for x in losses]))
    return losses


def main() -> None:
    """`python -m common.demo`."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run-dir", type=pathlib.Path, help="write the backbone and problems here")
    what.add_argument("--pretrain", type=pathlib.Path, metavar="OUT", help="the folder to make")
    kinds = ("qwen2", "llama")
    parser.add_argument("--architecture", choices=kinds, default="qwen2", help="of --pretrain")
    args = parser.parse_args()
    torch.set_num_threads(1)  # for such small matrices a second thread costs more than it brings
    if args.pretrain:
        pretrain(args.pretrain, args.architecture)
        return
    if not (args.run_dir / "backbone").exists():
        with atomic_dir(args.run_dir / "backbone") as folder:
            copy_files([*SHIPPED.iterdir()], folder)
    write_data(args.run_dir / "data")
    print(f"wrote {args.run_dir}/backbone and {args.run_dir}/data")
