"""Rank-1 extraction against its alternatives on one matrix, and stage 2 on a whole model against the floor. Run by hand, alone.

python tests/bench/bench_extract.py                     # one matrix of Qwen2.5-1.5B
python tests/bench/bench_extract.py --model 1.5b        # stage 2 on 15 checkpoints of the whole model (4.4 GB)

The factors are random ones that drift as a LoRA in RL does: B from zero, A from Kaiming's, a common direction and noise.
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
# hidden size, intermediate size, size of k and v, layers
MODELS = {"0.5b": (896, 4864, 128, 24), "1.5b": (1536, 8960, 256, 28), "7b": (3584, 18944, 512, 28), "14b": (5120, 13824, 1024, 48)}


def drift(b: torch.Tensor, a: torch.Tensor, generator: torch.Generator) -> None:
    """One checkpoint's worth of training, in place."""
    common = torch.ones(b.shape[0], 1) @ torch.ones(1, b.shape[1]) / 8
    b += 0.02 * (common + torch.randn(b.shape, generator=generator)) / b.shape[0] ** 0.5
    a += 2e-4 * torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5


def timed(function):
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def one_matrix(m: int = 8960, n: int = 1536) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.zeros(m, RANK), torch.randn(RANK, n, generator=generator) / n**0.5
    series = []
    for _ in range(CHECKPOINTS):
        drift(b, a, generator)
        series.append((b.clone(), a.clone()))
    deltas = 3 * CHECKPOINTS - K
    rank1.rank1_trajectory(series[:3], 1, SCALE)  # warm-up
    (triples, *_), ours = timed(lambda: rank1.rank1_trajectory(series, K, SCALE))
    ours /= deltas

    backbone = 0.02 * torch.randn(m, n, generator=generator)
    merged = [backbone + SCALE * series[i][0] @ series[i][1] for i in (9, 14)]  # the official code's input: merged models, in fp32
    delta = merged[1] - merged[0]
    (u, sigma, v), exact = timed(lambda: rank1.svd_of_product(*(x.double() for x in rank1.delta_factors(series[14], series[9], SCALE))))
    rows = [("ours, from Gram matrices", ours, (triples["target"].u[9], triples["target"].sigma[9], triples["target"].v[9]))]
    rows.append(("QR and SVD of the factors, float64", exact, (u, sigma[0], v)))
    for name, q, rounds in (("torch.svd_lowrank, q = 6, niter = 2", 6, 2), ("torch.svd_lowrank, q = 128, niter = 2", 128, 2)):
        (lu, ls, lv), seconds = timed(lambda q=q, rounds=rounds: torch.svd_lowrank(delta, q=q, niter=rounds))
        rows.append((name, seconds, (lu[:, 0], ls[0], lv[:, 0])))
    (du, ds, dv), seconds = timed(lambda: torch.linalg.svd(delta, full_matrices=False))
    rows.append(("torch.linalg.svd of the dense delta, fp32 (official code)", seconds, (du[:, 0], ds[0], dv[0])))
    print(f"{m} x {n}, LoRA rank {RANK}, {torch.get_num_threads()} threads, sigma_2 / sigma_1 = {float(sigma[1] / sigma[0]):.3f}\n")
    print("| way | seconds a delta | times ours | sigma_1 off by | 1 - abs cos(u) | 1 - abs cos(v) |\n|---|--:|--:|--:|--:|--:|")
    for name, seconds, (x, s, y) in rows:
        off = abs(float(s) / float(sigma[0]) - 1)
        cosines = [abs(1 - abs(float(p.double() @ q) / float(p.double().norm()))) for p, q in ((x, u), (y, v))]
        print(f"| {name} | {seconds:.4f} | {seconds / ours:.1f} | {off:.0e} | {cosines[0]:.0e} | {cosines[1]:.0e} |")


def write_model(name: str, folder: pathlib.Path) -> int:
    """The adapters of a whole model, a folder a checkpoint as PEFT lays them out; returns their bytes."""
    hidden, middle, kv, layers = MODELS[name]
    outputs = {"self_attn.q_proj": hidden, "self_attn.k_proj": kv, "self_attn.v_proj": kv, "self_attn.o_proj": hidden}
    shapes = {part: (m, hidden) for part, m in outputs.items()}
    shapes |= {"mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden), "mlp.down_proj": (hidden, middle)}
    generator, state = torch.Generator().manual_seed(0), {}
    for layer in range(layers):
        for part, (m, n) in shapes.items():
            a = torch.randn(RANK, n, generator=generator) / n**0.5
            state[f"model.layers.{layer}.{part}"] = (torch.zeros(m, RANK), a)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, "target_modules": "all-linear", "base_model_name_or_path": name}
    total = 0
    for step in range(10, 10 * CHECKPOINTS + 1, 10):
        for b, a in state.values():
            drift(b, a, generator)
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        path = folder / f"checkpoint-{step}" / "adapter_model.safetensors"
        pairs = {f"base_model.model.{m}.lora_{half}.weight": f for m, pair in state.items() for half, f in zip("BA", pair, strict=True)}
        safetensors.torch.save_file(pairs, path)
        path.with_name("adapter_config.json").write_text(json.dumps(config))
        total += path.stat().st_size
    os.sync()
    return total


def read_all(folder: pathlib.Path, cold: bool) -> float:
    """Seconds to read every byte of the checkpoints; cold: after the page cache has been told to forget them."""
    paths = sorted(folder.rglob("*.safetensors"))
    for path in paths:
        with open(path, "rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return timed(lambda: [path.read_bytes() and None for path in paths])[1]


def product_seconds(name: str, workers: int) -> float:
    """Seconds of the factor products ([r, m] by [m, r]) that stage 2 cannot do without, at this machine's speed for them."""
    hidden, middle, kv, layers = MODELS[name]
    x, repeats = torch.randn(RANK, hidden, dtype=torch.float64), 200
    torch.set_num_threads(1)
    _, seconds = timed(lambda: [x @ x.mT for _ in range(repeats)])
    rows = layers * (2 * (hidden + hidden) + 2 * (kv + hidden) + 3 * (middle + hidden))
    products = 1 + 2 + 2 * (CHECKPOINTS - K) / CHECKPOINTS  # its own Gram matrix; two for the local delta, two for the target
    return CHECKPOINTS * products * rows / hidden * seconds / repeats / workers


def whole_model(name: str) -> None:
    workers = os.cpu_count()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        size = write_model(name, scratch)
        cold, warm = read_all(scratch, cold=True), read_all(scratch, cold=False)
        products = product_seconds(name, workers)
        read_all(scratch, cold=True)
        command = [sys.executable, "02_extract_deltas.py", "--run-dir", str(scratch / "run"), "--checkpoints", f"{scratch}/checkpoint-*"]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        assert status == 0
        done = json.loads((scratch / "run" / "deltas" / "done.json").read_text())["decompositions"]
    floor = cold + products
    print(f"{name}: {done} decompositions in {seconds:.1f} s, peak memory {usage.ru_maxrss / 2**20:.2f} GB, {workers} cores, float64")
    print(f"floor: {size / 2**30:.2f} GB read in {cold:.1f} s from the disk ({warm:.1f} s from the page cache) + products {products:.1f} s")
    print(f"ratio to the floor: {seconds / floor:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="a whole model's checkpoints instead of one matrix")
    wanted = parser.parse_args().model
    whole_model(wanted) if wanted else one_matrix()
