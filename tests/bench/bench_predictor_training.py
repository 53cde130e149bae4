"""Stage 3's training against the official loop, on random deltas shaped like a Qwen2.5-1.5B run's.

    python tests/bench/bench_predictor_training.py [--epochs 5]

Run it by hand, alone. The official loop goes over the checkpoints inside an epoch, copies each
one's vectors to the device and accumulates gradients. Ours has every vector of a family in one
batch on the device. Both take the same steps (tests/test_predictor.py), so only seconds differ.
"""

import argparse
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from common import predictor
from common.baselines import methods
from common.files.deltas import Trajectory, Triples

LAYERS, CHECKPOINTS = 28, 10  # checkpoints that have a target
FAMILIES = {  # vector length -> matrices that have one of it in a layer
    "u.1536": (1536, 3),  # q, o, down
    "u.256": (256, 2),  # k, v
    "u.8960": (8960, 2),  # gate, up
    "v.1536": (1536, 6),  # q, k, v, o, gate, up
    "v.8960": (8960, 1),  # down
    "sigma": (1, 7),
}


def official(data: list[torch.Tensor], epochs: int, device: str) -> None:
    """One predictor by the official loop: data [checkpoints, members, d] in host memory."""
    model = predictor.TrajectoryPredictor(data[0].shape[-1]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    for _ in range(epochs):
        optimizer.zero_grad()
        for i in range(CHECKPOINTS):
            s_global, s_local, s_target = (part[i].to(device) for part in data)
            loss = (model(s_global, s_local) - s_target).abs().sum() / CHECKPOINTS
            loss.backward()
            loss.item()
        optimizer.step()


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def random_trajectory() -> Trajectory:
    """Rank-1 deltas of every matrix of that model, random: what `weighted` is fitted on."""

    def triples(count: int, m: int, n: int) -> Triples:
        u, v = (torch.randn(count, size) / size**0.5 for size in (m, n))
        return Triples(u, torch.rand(count), v)

    # q o, k v, gate up, down
    shapes = [(1536, 1536)] * 2 + [(256, 1536)] * 2 + [(8960, 1536)] * 2 + [(1536, 8960)]
    counts, k = {"global": CHECKPOINTS + 5, "local": CHECKPOINTS + 5, "target": CHECKPOINTS}, 5
    deltas = {
        f"layer{layer}.{i}": {role: triples(count, m, n) for role, count in counts.items()}
        for layer in range(LAYERS)
        for i, (m, n) in enumerate(shapes)
    }
    return Trajectory(list(range(10, 10 * (CHECKPOINTS + 5) + 1, 10)), k, deltas)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--epochs", type=int, default=5, help="to time, after one that is not counted"
    )
    epochs = parser.parse_args().epochs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = {"ours": 0.0, "bf16": 0.0, "official": 0.0}
    print(f"{device}, {torch.get_num_threads()} threads, milliseconds an epoch, mean of {epochs}\n")
    print("| family | vectors | ours | ours, --bf16 | official loop | ratio |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, (d, members) in FAMILIES.items():
        data = [torch.randn(CHECKPOINTS, LAYERS * members, d) / d**0.5 for _ in range(3)]
        there = [part.to(device) for part in data]
        cost = {}

        def ours(count: int, there=there, bf16=False) -> None:
            recipe = predictor.Recipe(False, False, 2e-5, epochs=count, bf16=bf16)
            predictor.train_family(there, recipe, 0)

        ways = {"ours": ours, "bf16": lambda count, ours=ours: ours(count, bf16=True)}
        ways["official"] = lambda count, data=data: official(data, count, device)
        for way, run in ways.items():
            run(1)
            most, least = (seconds(lambda run=run, n=n: run(n)) for n in (epochs + 1, 1))
            cost[way] = (most - least) / epochs
            total[way] += cost[way]
        row = [CHECKPOINTS * LAYERS * members, *(f"{1e3 * x:.1f}" for x in cost.values())]
        print(f"| {name} | {' | '.join(map(str, row))} | {cost['official'] / cost['ours']:.1f} |")
    sums = [f"{1e3 * total[way]:.0f} s" for way in total]
    print(f"\n1,000 epochs of all families: {sums[0]}, in bf16 {sums[1]}, official loop {sums[2]}")
    whole = random_trajectory()
    print(f"`weighted`, which has no epochs: {seconds(lambda: methods.weighted_fit(whole)):.1f} s")
