"""Every jump against a direct dense computation, and through PEFT itself."""

import itertools
import json

import pytest
import torch
from peft import PeftModel

from common import adapters, extrapolators, policy, rank1

SCALE = 0.5


def make_adapter(seed, shapes=None, r=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"a": (24, 16), "b": (16, 40)}
    factors = {name: (torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)) for name, (m, n) in shapes.items()}
    return adapters.Adapter({"peft_type": "LORA", "r": r, "lora_alpha": SCALE * r}, factors)


def dense(adapter):
    return {name: adapter.scale(name) * b.double() @ a.double() for name, (b, a) in adapter.factors.items()}


def make_trajectory(series, k):
    """Rank-1 triples by dense SVD, independently of stage 2."""

    def triples(deltas):
        rows = [torch.linalg.svd(d) for d in deltas]
        return rank1.Triples(
            *(torch.stack(x).float() for x in ([u[:, 0] for u, _, _ in rows], [s[0] for _, s, _ in rows], [vh[0] for _, _, vh in rows]))
        )

    weights = [dense(point) for point in series]
    deltas = {}
    for name in series[0].factors:
        w = [point[name] for point in weights]
        deltas[name] = {
            "global": triples(w),
            "local": triples([w[0], *(b - a for a, b in itertools.pairwise(w))]),
            "target": triples([b - a for a, b in zip(w, w[k:], strict=False)]),
        }
    return rank1.Trajectory(list(range(10, 10 * len(series) + 10, 10)), k, deltas)


SERIES = [make_adapter(seed) for seed in range(6)]


@pytest.mark.parametrize("alpha", [0.5, 1.5, -1.0, 0.0])
def test_rank_one_added_to_an_adapter_is_exact(alpha):
    last = SERIES[-1]
    triples = {
        name: (
            torch.nn.functional.normalize(torch.randn(m.shape[0]), dim=0),
            torch.tensor(0.37),
            torch.nn.functional.normalize(torch.randn(m.shape[1]), dim=0),
        )
        for name, m in dense(last).items()
    }
    jumped = extrapolators.add_rank1(last, triples, alpha)
    assert jumped.config["r"] == 5
    assert all(jumped.scale(name) == pytest.approx(SCALE) for name in triples)
    for name, (u, sigma, v) in triples.items():
        want = dense(last)[name] + alpha * sigma.double() * torch.outer(u.double(), v.double())
        torch.testing.assert_close(dense(jumped)[name], want, atol=1e-6, rtol=0)


def test_a_predicted_negative_sigma_keeps_its_sign():
    triples = {name: (torch.ones(m.shape[0]), torch.tensor(-0.2), torch.ones(m.shape[1])) for name, m in dense(SERIES[-1]).items()}
    jumped = extrapolators.next_(SERIES[-1], None, 1.5, predicted=triples)
    for name, m in dense(SERIES[-1]).items():
        torch.testing.assert_close(dense(jumped)[name], m - 0.3, atol=1e-6, rtol=0)


def test_repeat_last_adds_the_rank_one_part_of_the_last_known_target():
    jumped = extrapolators.repeat_last(SERIES[-1], make_trajectory(SERIES, k=2), 1.5)
    for name in SERIES[0].factors:
        u, s, vh = torch.linalg.svd(dense(SERIES[5])[name] - dense(SERIES[3])[name])
        torch.testing.assert_close(
            dense(jumped)[name], dense(SERIES[5])[name] + 1.5 * s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-5, rtol=0
        )


def test_recent_locals_adds_the_rank_one_part_of_the_last_two_local_ones_scaled_to_k():
    jumped = extrapolators.recent_locals(SERIES[-1], make_trajectory(SERIES, k=4), 1.5)
    for name in SERIES[0].factors:
        total = 0
        for now, before in ((5, 4), (4, 3)):
            u, s, vh = torch.linalg.svd(dense(SERIES[now])[name] - dense(SERIES[before])[name])
            total = total + s[0] * torch.outer(u[:, 0], vh[0])
        u, s, vh = torch.linalg.svd(4 * total / 2)
        torch.testing.assert_close(
            dense(jumped)[name], dense(SERIES[5])[name] + 1.5 * s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-5, rtol=0
        )


def test_oracle_adds_the_rank_one_part_of_the_true_future():
    future = make_adapter(99)
    jumped = extrapolators.oracle(SERIES[-1], make_trajectory(SERIES, k=2), 2.0, future=future)
    for name in SERIES[0].factors:
        u, s, vh = torch.linalg.svd(dense(future)[name] - dense(SERIES[5])[name])
        torch.testing.assert_close(dense(jumped)[name], dense(SERIES[5])[name] + 2 * s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-5, rtol=0)


def test_rl_extra_is_the_straight_line_from_the_backbone():
    jumped = extrapolators.rl_extra(SERIES[-1], make_trajectory(SERIES, k=2), 1.5)
    for name in SERIES[0].factors:  # 6 checkpoints, 1.5 * 2 more: factor 1.5
        torch.testing.assert_close(dense(jumped)[name], 1.5 * dense(SERIES[-1])[name])
    assert jumped.config["r"] == 4


def test_none_changes_nothing():
    assert extrapolators.none(SERIES[-1], None, 1.5) is SERIES[-1]


def test_peft_loads_the_jumped_adapter_as_the_dense_sum(lora_policy, tmp_path, backbone_dir):
    model, tokenizer = lora_policy
    model.save_pretrained(tmp_path / "last")
    last = adapters.read_adapter(tmp_path / "last")
    generator = torch.Generator().manual_seed(5)
    triples = {
        name: (torch.randn(b.shape[0], generator=generator) / 8, torch.tensor(0.4), torch.randn(a.shape[1], generator=generator) / 8)
        for name, (b, a) in last.factors.items()
    }
    adapters.write_adapter(tmp_path / "jumped", extrapolators.add_rank1(last, triples, 1.5), {"step": 1})
    assert json.loads((tmp_path / "jumped" / "adapter_config.json").read_text())["lora_alpha"] == pytest.approx(2.5)
    ids = torch.tensor(tokenizer(["<|user|>123+489<|assistant|>3+9"])["input_ids"])
    backbone, _ = policy.load_backbone(str(backbone_dir))
    jumped = PeftModel.from_pretrained(backbone, tmp_path / "jumped")(input_ids=ids).logits
    merged, _ = policy.load_backbone(str(backbone_dir))
    for name, (b, a) in last.factors.items():
        u, sigma, v = triples[name]
        merged.get_submodule(name).weight.data += last.scale(name) * b @ a + 1.5 * sigma * torch.outer(u, v)
    torch.testing.assert_close(jumped, merged(input_ids=ids).logits, atol=2e-5, rtol=1e-5)


def test_adapter_files_round_trip(tmp_path):
    adapters.write_adapter(tmp_path / "one", SERIES[0], {"step": 1})
    again = adapters.read_adapter(tmp_path / "one")
    assert again.config == SERIES[0].config
    for name, (b, a) in SERIES[0].factors.items():
        assert torch.equal(again.factors[name][0], b)
        assert torch.equal(again.factors[name][1], a)
