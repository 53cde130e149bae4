"""Makes the demo's backbone again from nothing and compares it with the shipped weights.

    python tests/bench/bench_demo_backbone.py        # about five minutes on one core

On the kind of processor that made them the weights come out equal, bit for bit. Elsewhere rounding differs and the weights drift apart,
so what has to agree is the model: its loss over the last 100 steps and what it says about the test problems.
"""

import json
import pathlib
import sys
import tempfile

import safetensors.torch
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from common import demo
from common.rl import policy

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as scratch:
    out = pathlib.Path(scratch) / "backbone"
    losses = demo.pretrain(out)
    new, shipped = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (out, demo.SHIPPED)
    )
    models = [policy.load_backbone(str(folder))[0] for folder in (out, demo.SHIPPED)]
tokenizer = policy.load_backbone(str(demo.SHIPPED))[1]
prompts = torch.tensor(
    [tokenizer(f"<|user|>{a}+{b}<|assistant|>")["input_ids"] for a, b in demo.test_problems()]
)
first, second = (model(input_ids=prompts).logits[:, -1].softmax(-1).mean(0) for model in models)
gap = max((new[name] - shipped[name]).abs().max().item() for name in shipped)
logged = json.loads((demo.SHIPPED / "pretraining_loss.json").read_text())
tail, logged_tail = sum(losses[-100:]) / 100, sum(logged[-100:]) / 100
think = abs((first - second)[tokenizer.convert_tokens_to_ids("\\boxed{")].item())
print(
    f"largest weight difference {gap:.2e}; loss of the last 100 steps {tail:.4f} (shipped {logged_tail:.4f}); "
    f"share of guesses differs by {think:.4f}"
)
assert gap == 0 or (abs(tail - logged_tail) < 0.01 and think < 0.05), (
    "the program does not make the shipped backbone any more"
)
print("equal, bit for bit" if gap == 0 else "not bit for bit, but the same model")
