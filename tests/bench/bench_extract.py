"""Rank-1 extraction against other ways on one matrix; stage 2 on a whole model against its floor.

    python tests/bench/bench_extract.py                     # one matrix of Qwen2.5-1.5B
    python tests/bench/bench_extract.py --model 1.5b        # stage 2 on 15 checkpoints (4.4 GB)

Run it by hand, alone. The factors are random ones that drift as a LoRA in RL does: B from zero, A
from Kaiming's, a common direction and noise.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import safetensors.torch
import torch

from common import rank1

RANK, SCALE, CHECKPOINTS, K = 64, 0.5, 15, 5
MODELS = {  # hidden size, intermediate size, size of k and v, layers
    "0.5b": (896, 4864, 128, 24),
    "1.5b": (1536, 8960, 256, 28),
    "7b": (3584, 18944, 512, 28),
    "14b": (5120, 13824, 1024, 48),
}


def drift(b: torch.Tensor, a: torch.Tensor, generator: torch.Generator) -> None:
    """One checkpoint's worth of training, in place."""
    common = torch.ones(b.shape[0], 1) @ torch.ones(1, b.shape[1]) / 8
    b += 0.02 * (common + torch.randn(b.shape, generator=generator)) / b.shape[0] ** 0.5
    a += 2e-4 * torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5


def timed(function):
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def weights(series: list) -> list[rank1.LowRank]:
    """W[0] ... W[c] of (B, A) of every checkpoint."""
    (b, a), *_ = series
    zero = rank1.LowRank(torch.zeros(len(b), 0), torch.zeros(0, a.shape[1]))
    columns = [(b.mT.contiguous().double().mT, a.double()) for b, a in series]  # as stage 2 does
    return [zero, *(rank1.LowRank(b, a, SCALE) for b, a in columns)]


def one_matrix(m: int = 8960, n: int = 1536) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.zeros(m, RANK), torch.randn(RANK, n, generator=generator) / n**0.5
    series = []
    for _ in range(CHECKPOINTS):
        drift(b, a, generator)
        series.append((b.clone(), a.clone()))
    W = weights(series)
    rank1.trajectory(W[:4], 1)  # warm-up
    W = weights(series)  # without the Gram matrices that it kept
    found, ours = timed(lambda: rank1.trajectory(W, K))
    ours /= 3 * CHECKPOINTS - K

    # The official code's input: merged models, in fp32.
    backbone = 0.02 * torch.randn(m, n, generator=generator)
    merged = [backbone + SCALE * series[i][0] @ series[i][1] for i in (9, 14)]
    delta = merged[1] - merged[0]
    (left, sigma, right), exact = timed(lambda: (W[15] - W[10]).svd())
    u, v = left[:, 0], right[0]
    triple = [found[f"target.{x}"][9] for x in ("u", "sigma", "v")]
    rows = [("ours, from Gram matrices", ours, triple)]
    rows.append(("QR and SVD of the factors, float64", exact, (u, sigma[0], v)))
    (lu, ls, lv), seconds = timed(lambda: rank1.top(delta))
    rows.append(("ours of a dense delta, fp32", seconds, (lu, ls[0], lv)))
    for q in (6, 128):
        (lu, ls, lv), seconds = timed(lambda q=q: torch.svd_lowrank(delta, q=q, niter=2))
        name = f"torch.svd_lowrank, q = {q}, niter = 2"
        rows.append((name, seconds, (lu[:, 0], ls[0], lv[:, 0])))
    (du, ds, dv), seconds = timed(lambda: torch.linalg.svd(delta, full_matrices=False))
    name = "torch.linalg.svd of the dense delta, fp32 (official code)"
    rows.append((name, seconds, (du[:, 0], ds[0], dv[0])))
    print(f"{m} x {n}, LoRA rank {RANK}, {torch.get_num_threads()} threads, ", end="")
    print(f"sigma_2 / sigma_1 = {float(sigma[1] / sigma[0]):.3f}\n")
    print("| way | seconds a delta | times ours | sigma_1 off by | 1 - cos(u) | 1 - cos(v) |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, seconds, (x, s, y) in rows:
        off = abs(float(s) / float(sigma[0]) - 1)
        x, y = (p.double() / p.double().norm() for p in (x, y))
        away = [abs(1 - abs(float(p @ q))) for p, q in ((x, u), (y, v))]
        print(f"| {name} | {seconds:.4f} | {seconds / ours:.1f} | ", end="")
        print(f"{off:.0e} | {away[0]:.0e} | {away[1]:.0e} |")


def write_model(name: str, folder: pathlib.Path) -> int:
    """The adapters of a whole model, a folder a checkpoint as PEFT does; returns their bytes."""
    hidden, middle, kv, layers = MODELS[name]
    outputs = {"self_attn.q_proj": hidden, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    outputs |= {"self_attn.o_proj": hidden, "mlp.gate_proj": middle, "mlp.up_proj": middle}
    shapes = {part: (m, hidden) for part, m in outputs.items()}
    shapes["mlp.down_proj"] = (hidden, middle)
    generator, state = torch.Generator().manual_seed(0), {}
    for layer in range(layers):
        for part, (m, n) in shapes.items():
            a = torch.randn(RANK, n, generator=generator) / n**0.5
            state[f"model.layers.{layer}.{part}"] = (torch.zeros(m, RANK), a)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK}
    config |= {"target_modules": "all-linear", "base_model_name_or_path": name}
    total = 0
    for step in range(10, 10 * CHECKPOINTS + 1, 10):
        for b, a in state.values():
            drift(b, a, generator)
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        path = folder / f"checkpoint-{step}" / "adapter_model.safetensors"
        key = "base_model.model.{}.lora_{}.weight"
        tensors = {key.format(m, "B"): b for m, (b, _) in state.items()}
        tensors |= {key.format(m, "A"): a for m, (_, a) in state.items()}
        safetensors.torch.save_file(tensors, path)
        path.with_name("adapter_config.json").write_text(json.dumps(config))
        total += path.stat().st_size
    os.sync()
    return total


def read_all(folder: pathlib.Path, cold: bool) -> float:
    """Seconds to read every byte of the checkpoints; cold: not from the page cache."""
    paths = sorted(folder.rglob("*.safetensors"))
    for path in paths:
        with open(path, "rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return timed(lambda: [path.read_bytes() and None for path in paths])[1]


def product_seconds(name: str, workers: int) -> float:
    """Seconds of the products [r, m] by [m, r] that stage 2 cannot do without, here."""
    hidden, middle, kv, layers = MODELS[name]
    x, repeats = torch.randn(RANK, hidden, dtype=torch.float64), 200
    torch.set_num_threads(1)
    _, seconds = timed(lambda: [x @ x.mT for _ in range(repeats)])
    rows = layers * (2 * (hidden + hidden) + 2 * (kv + hidden) + 3 * (middle + hidden))
    # Its own Gram matrix, two for the local delta, two for the target.
    products = 1 + 2 + 2 * (CHECKPOINTS - K) / CHECKPOINTS
    return CHECKPOINTS * products * rows / hidden * seconds / repeats / workers


def whole_model(name: str) -> None:
    workers = os.cpu_count()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        size = write_model(name, scratch)
        cold, warm = read_all(scratch, cold=True), read_all(scratch, cold=False)
        products = product_seconds(name, workers)
        read_all(scratch, cold=True)
        command = [sys.executable, "02_extract_deltas.py", "--run-dir", str(scratch / "run")]
        command += ["--checkpoints", f"{scratch}/checkpoint-*"]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        assert status == 0
        matrices = len(
            json.loads((scratch / "run" / "deltas" / "index.json").read_text())["modules"]
        )
    floor = cold + products
    count, memory = matrices * (3 * CHECKPOINTS - K), usage.ru_maxrss / 2**20
    print(
        f"{name}: {count} decompositions in {seconds:.1f} s, peak memory {memory:.2f} GB, ", end=""
    )
    print(f"{workers} cores, float64")
    print(
        f"floor: {size / 2**30:.2f} GB read in {cold:.1f} s from the disk ({warm:.1f} s from the ",
        end="",
    )
    print(f"page cache) + products {products:.1f} s")
    print(f"ratio to the floor: {seconds / floor:.1f}")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", choices=MODELS, help="a whole model instead of one matrix")
    wanted = parser.parse_args().model
    whole_model(wanted) if wanted else one_matrix()
