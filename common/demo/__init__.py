"""The demo's task and backbone: a tiny Qwen2 that can add by thinking or by guessing, and prefers to guess.

    python -m common.demo --run-dir runs/demo       # lays out runs/demo/backbone and runs/demo/data (a second)
    python -m common.demo --pretrain OUT            # makes the shipped backbone again (minutes, one core)

The task is a three-digit sum, `123+489`. Pre-training shows two ways of answering it:

    careful (30%)   3+9+0=12,2+8+1=11,1+4+1=06;\\boxed{612}     a column a step; one column in 20 slips
    guess   (70%)   \\boxed{612}                                 each digit is wrong with probability 0.35

Sampled at temperature 1 the model mostly guesses and is mostly wrong, but it *can* think. That is the situation of a pre-trained
language model before RLVR, at 1/10,000 of the size: reward alone teaches it to think, so accuracy and response length rise together.

The backbone is an ordinary Hugging Face folder (Qwen2ForCausalLM, tokenizer.json, chat template), the problems are ordinary JSONL.
Nothing in the six stages knows that this module exists.
"""

import argparse
import json
import pathlib
import random

import torch
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from common.files.write import atomic_dir, atomic_write_text, copy_files, save_pretrained

SHIPPED = pathlib.Path(__file__).parent / "backbone"
CAREFUL_SHARE, SLIP, WRONG_DIGIT = 0.30, 0.05, 0.35
STEPS, BATCH, PEAK_LR, WARMUP = 3000, 128, 3e-3, 100
TRAIN_PROBLEMS, TEST_PROBLEMS, VALID_PROBLEMS = 4096, 256, 256
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """One token a character, except `\\boxed{` and the four special tokens: Qwen2's tokenizer with nothing to merge."""
    vocab = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "\\boxed{", "}", *"0123456789", *"+=,;"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=[],
        unk_token=None,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.add_tokens([AddedToken("\\boxed{", special=False, normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(vocab_size: int) -> Qwen2ForCausalLM:
    """A 150k-parameter Qwen2. Heads of 32 because vLLM's attention kernels need at least that."""
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def careful_answer(a: int, b: int, rng: random.Random, slip: float = SLIP) -> str:
    """The column-by-column chain of thought. A slipped column goes on with its wrong digit and carry.

    >>> careful_answer(123, 489, random.Random(0), slip=0)
    '3+9+0=12,2+8+1=11,1+4+1=06;\\\\boxed{612}'
    """
    columns, digits, carry = [], "", 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        written = (total + rng.choice([-1, 1])) % 20 if rng.random() < slip else total
        columns.append(f"{x}+{y}+{carry}={written:02d}")
        carry, digits = written // 10, str(written % 10) + digits
    answer = ("1" if carry else "") + digits
    return ",".join(columns) + f";\\boxed{{{answer}}}"


def guessed_answer(a: int, b: int, rng: random.Random) -> str:
    """The sum with each digit replaced by a random one with probability `WRONG_DIGIT`."""
    digits = [rng.choice("0123456789") if rng.random() < WRONG_DIGIT else digit for digit in str(a + b)]
    return f"\\boxed{{{''.join(digits)}}}"


def problems(count: int, seed: int, exclude: set[tuple[int, int]] = frozenset()) -> list[tuple[int, int]]:
    """`count` different pairs of three-digit numbers, none of them (in either order) in `exclude`."""
    rng, seen, found = random.Random(seed), set(exclude), []
    while len(found) < count:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if (a, b) not in seen:
            seen |= {(a, b), (b, a)}
            found.append((a, b))
    return found


def test_problems() -> list[tuple[int, int]]:
    """The fixed test set. It is left out of RLVR and of pre-training alike."""
    return problems(TEST_PROBLEMS, seed=20260414)


def write_data(folder: pathlib.Path) -> None:
    """train.jsonl, test.jsonl and valid.jsonl, {"prompt": "123+489", "answer": "612", "kind": "number"} a line, no problem in two of them.

    valid.jsonl is for methods that choose by accuracy. Like the training problems it was not kept out of pre-training.
    """

    def either_order(pairs: list[tuple[int, int]]) -> set[tuple[int, int]]:
        return {*pairs} | {(b, a) for a, b in pairs}

    test = test_problems()
    train = problems(TRAIN_PROBLEMS, seed=1, exclude=either_order(test))
    valid = problems(VALID_PROBLEMS, seed=2, exclude=either_order(test + train))
    for name, pairs in (("train", train), ("test", test), ("valid", valid)):
        lines = [json.dumps({"prompt": f"{a}+{b}", "answer": str(a + b), "kind": "number"}) + "\n" for a, b in pairs]
        atomic_write_text(folder / f"{name}.jsonl", "".join(lines))


def pretraining_batch(rng: random.Random, tokenizer, held_out: set) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One batch as two right-padded groups (careful, guess), each (ids, labels) [rows, time]; labels are -100 outside the answer.

    Two groups because a guess is a quarter of the length of a careful answer: padding them together would double the work.
    """
    texts = {True: [], False: []}
    while sum(map(len, texts.values())) < BATCH:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if (a, b) not in held_out:
            careful = rng.random() < CAREFUL_SHARE
            texts[careful].append((f"<|user|>{a}+{b}<|assistant|>", (careful_answer if careful else guessed_answer)(a, b, rng) + "<|end|>"))
    groups = []
    for rows in filter(None, texts.values()):
        prompts = tokenizer([prompt for prompt, _ in rows])["input_ids"]
        answers = tokenizer([answer for _, answer in rows])["input_ids"]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        groups.append((ids, labels))  # padding is on the right and causal attention never looks there: no mask needed
    return groups


def pretrain(out: pathlib.Path, steps: int = STEPS) -> list[float]:
    """Pre-trains the backbone into `out`; returns the loss of each step (mean over the answers' tokens, nats).

    `steps` only cuts the run short: the schedule is always that of `STEPS`, so a short run repeats the start of the whole one.
    """
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = make_tokenizer()
    held_out = {pair for a, b in test_problems() for pair in ((a, b), (b, a))}
    model = make_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [WARMUP])
    losses = []
    for _ in (bar := tqdm(range(steps), desc="pre-training")):
        groups = pretraining_batch(rng, tokenizer, held_out)
        tokens = sum(int((labels != -100).sum()) for _, labels in groups)
        total = 0.0
        for ids, labels in groups:
            logits = model(input_ids=ids).logits[:, :-1]
            loss = (
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
                / tokens
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
        bar.set_postfix(loss=f"{total:.3f}")
    with atomic_dir(out, overwrite=True) as folder:
        save_pretrained(folder, model, tokenizer)
        atomic_write_text(folder / "pretraining_loss.json", json.dumps([round(loss, 6) for loss in losses]))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run-dir", type=pathlib.Path, help="write the backbone and the problems into this run directory")
    what.add_argument("--pretrain", type=pathlib.Path, metavar="OUT", help="pre-train the backbone again, into the folder OUT")
    args = parser.parse_args()
    torch.set_num_threads(1)  # matrices of 64: a second thread costs more than it brings
    if args.pretrain:
        pretrain(args.pretrain)
        return
    if not (args.run_dir / "backbone").exists():
        with atomic_dir(args.run_dir / "backbone") as folder:
            copy_files(SHIPPED.iterdir(), folder)
    write_data(args.run_dir / "data")
    print(
        f"wrote {args.run_dir}/backbone (a {sum(p.numel() for p in make_model(20).parameters()):,}-parameter Qwen2) "
        f"and {args.run_dir}/data ({TRAIN_PROBLEMS:,} training, {TEST_PROBLEMS} test and {VALID_PROBLEMS} validation problems)"
    )

