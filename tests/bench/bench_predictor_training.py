"""Stage 3's training against the official loop, on rank-1 data shaped like a Qwen2.5-1.5B run's (random values). Run by hand, alone.

python tests/bench/bench_predictor_training.py [--epochs 5]

The official loop goes over the checkpoints inside an epoch, copies each one's vectors to the device and accumulates gradients; ours has
every vector of a family in one batch on the device. Both take the same steps (tests/test_predictor.py), so seconds are all that differs.
"""

import argparse
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from common import predictor, rank1

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
    """One predictor by the loop of the official code: data [checkpoints, members, d] in host memory."""
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


def random_trajectory() -> rank1.Trajectory:
    """Rank-1 deltas of every matrix of that model, random: what `weighted` is fitted on."""

    def triples(count: int, m: int, n: int) -> rank1.Triples:
        return rank1.Triples(torch.randn(count, m) / m**0.5, torch.rand(count), torch.randn(count, n) / n**0.5)

    shapes = [(1536, 1536)] * 2 + [(256, 1536)] * 2 + [(8960, 1536)] * 2 + [(1536, 8960)]  # q o, k v, gate up, down
    counts, k = {"global": CHECKPOINTS + 5, "local": CHECKPOINTS + 5, "target": CHECKPOINTS}, 5
    deltas = {
        f"layer{layer}.{i}": {role: triples(count, m, n) for role, count in counts.items()}
        for layer in range(LAYERS)
        for i, (m, n) in enumerate(shapes)
    }
    return rank1.Trajectory(list(range(10, 10 * (CHECKPOINTS + 5) + 1, 10)), k, deltas)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="epochs to time, after one that is not counted")
    epochs = parser.parse_args().epochs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = {"ours": 0.0, "official": 0.0}
    print(f"{device}, {torch.get_num_threads()} threads, milliseconds an epoch, mean of {epochs}\n")
    print("| family | vectors | ours | official loop | ratio |\n|---|--:|--:|--:|--:|")
    for name, (d, members) in FAMILIES.items():
        data = [torch.randn(CHECKPOINTS, LAYERS * members, d) / d**0.5 for _ in range(3)]
        there = [part.to(device) for part in data]
        cost = {}
        for way, run in {
            "ours": lambda n, there=there: predictor.train_family(*there, predictor.Recipe(False, False, 2e-5, epochs=n), 0),
            "official": lambda n, data=data: official(data, n, device),
        }.items():
            run(1)
            cost[way] = (seconds(lambda run=run: run(epochs + 1)) - seconds(lambda run=run: run(1))) / epochs
            total[way] += cost[way]
        print(
            f"| {name} | {CHECKPOINTS * LAYERS * members} | {1e3 * cost['ours']:.1f} | {1e3 * cost['official']:.1f} | "
            f"{cost['official'] / cost['ours']:.1f} |"
        )
    print(f"\n1,000 epochs of all families: {1e3 * total['ours']:.0f} s, official loop {1e3 * total['official']:.0f} s")
    whole = random_trajectory()
    print(f"`weighted`, which has no epochs: {seconds(lambda: predictor.fit_weights(whole, predictor.RECIPES['weighted'])):.1f} s")
