"""The predictor against the paper's equations as loops; `weighted` and the backtest against dense
matrices."""

import dataclasses
import types

import numpy
import pytest
import torch
from conftest import rank_1
from torch.nn.functional import normalize

from common import predictor
from common.baselines import methods
from common.baselines.backtest import backtest, describe
from common.files.deltas import Trajectory, Triples
from common.rank1 import LowRank


def tiny_trajectory(c=6, k=2, modules=3, m=7, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def triples(count):
        u, v = (torch.randn(count, size, generator=generator) for size in (m, n))
        sigma = torch.rand(count, generator=generator) + 0.5
        return Triples(normalize(u, dim=1), sigma, normalize(v, dim=1))

    counts = {"global": c, "local": c, "target": c - k}
    names = [f"m{j}" for j in range(modules)]
    deltas = {name: {role: triples(count) for role, count in counts.items()} for name in names}
    return Trajectory(list(range(1, c + 1)), k, deltas)


def changed(trajectory, change):
    """The trajectory with change(role, triples) instead of every Triples."""
    deltas = {
        module: {role: change(role, t) for role, t in roles.items()}
        for module, roles in trajectory.deltas.items()
    }
    return Trajectory(trajectory.steps, trajectory.k, deltas)


RAW = predictor.Recipe(align=False, scale_sigma=False, learning_rate=1e-3, epochs=2)


def trained(trajectory, recipe):
    families = predictor.stack_families(*predictor.prepare(trajectory, recipe))
    return {f: predictor.train_family(x, recipe, 0)[0] for f, x in families.items()}


def predicted(trajectory, recipe):
    return predictor.predict(trained(trajectory, recipe), trajectory, recipe)


def layers(block):
    return [tuple(layer.weight.shape) for layer in block if hasattr(layer, "weight")]


def test_the_network_is_the_official_layout():
    model = predictor.TrajectoryPredictor(12)
    assert layers(model.decode) == [(256, 24), (24, 256), (256, 24), (12, 256)]
    assert [i for i, x in enumerate(model.decode) if isinstance(x, torch.nn.ReLU)] == [2]
    for encode in (model.encode_global, model.encode_local):
        assert layers(encode) == [(256, 12), (12, 256), (256, 12), (12, 256)]
    assert model(torch.zeros(2, 3, 12), torch.zeros(2, 3, 12)).shape == (2, 3, 12)


@pytest.mark.parametrize(("inputs", "seen"), [(("global",), 0), (("local",), 1)])
def test_a_network_of_one_input_has_one_encoder_and_does_not_see_the_other(inputs, seen):
    model = predictor.TrajectoryPredictor(12, inputs)
    assert layers(model.decode) == [(256, 12), (12, 256), (256, 12), (12, 256)]
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {f"encode_{inputs[0]}", "decode"}
    pair = torch.randn(2, 12)
    encoded = getattr(model, f"encode_{inputs[0]}")(pair[seen])
    pair[1 - seen] = torch.nan
    assert torch.equal(model(*pair), model.decode(encoded))


def test_the_last_checkpoints_keep_the_targets_that_begin_there():
    """7 checkpoints, k = 2: targets begin at 1 to 5, so the last four have those of 4 and 5."""
    trajectory = tiny_trajectory(c=7, k=2)
    tail = trajectory.last(4)
    assert tail.steps == [4, 5, 6, 7]
    for module, roles in trajectory.deltas.items():
        assert torch.equal(tail.deltas[module]["global"].u, roles["global"].u[3:7])
        assert torch.equal(tail.deltas[module]["local"].sigma, roles["local"].sigma[3:7])
        assert torch.equal(tail.deltas[module]["target"].v, roles["target"].v[3:5])
    assert trajectory.until(5).last(4).steps == [2, 3, 4, 5]
    assert len(trajectory.until(5).last(4).deltas["m0"]["target"]) == 2
    assert trajectory.last(9).steps == trajectory.steps


def test_families_gather_vectors_by_side_and_length():
    trajectory = tiny_trajectory()
    families = predictor.stack_families(*predictor.prepare(trajectory, RAW))
    assert set(families) == {"u.7", "v.5", "sigma"}
    assert [part.shape for part in families["u.7"]] == [(4, 3, 7)] * 3  # four have a target
    assert torch.equal(families["v.5"][2][1, 2], trajectory.deltas["m2"]["target"].v[1])
    assert families["sigma"][0].shape == (4, 3, 1)


def test_the_loss_curve_equals_the_papers_double_sum():
    recipe, ticks = dataclasses.replace(RAW, epochs=5), []
    torch.manual_seed(0)
    s_global, s_local, s_target = data = torch.randn(3, 4, 2, 6).unbind(0)
    model, losses = predictor.train_family(data, recipe, 3, lambda: ticks.append(1))
    assert len(ticks) == len(losses) == 5

    torch.manual_seed(3)
    naive = predictor.TrajectoryPredictor(6)
    optimizer = torch.optim.AdamW(naive.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5, eta_min=1e-4)
    for epoch in range(5):
        optimizer.zero_grad()
        total = 0.0
        for i in range(4):  # Eq. 9, gradients of all checkpoints accumulated
            pairs = [(naive(s_global[i, j], s_local[i, j]), s_target[i, j]) for j in range(2)]
            loss = sum((found - target).abs().sum() for found, target in pairs) / 4
            loss.backward()
            total += loss.item()
        optimizer.step()
        schedule.step()
        assert losses[epoch] == pytest.approx(total, rel=1e-5)
    for ours, theirs in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_products_in_bf16_end_near_the_loss_of_fp32_with_weights_in_fp32():
    torch.manual_seed(0)
    data, recipe = torch.randn(3, 4, 2, 6).unbind(0), dataclasses.replace(RAW, epochs=200)
    _, exact = predictor.train_family(data, recipe, 1)
    model, rounded = predictor.train_family(data, dataclasses.replace(recipe, bf16=True), 1)
    assert rounded != exact
    assert max(rounded[-1], exact[-1]) < 0.05 * exact[0]
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", predictor.RECIPES)
def test_a_matrix_that_never_moved_is_predicted_to_stay(name):
    trajectory = tiny_trajectory()
    still = changed(trajectory, lambda role, t: Triples(0 * t.u, 0 * t.sigma, 0 * t.v))
    trajectory.deltas["m1"] = still.deltas["m1"]
    found = predicted(trajectory, dataclasses.replace(predictor.RECIPES[name], epochs=2))
    assert [bool(triple["sigma"]) for triple in found.values()] == [True, False, True]


def test_predictions_have_unit_vectors_and_sigma_in_the_trajectorys_unit():
    """Targets are twice the last global sigma, in any unit."""
    sizes = {"global": 1e-3, "local": 1e-3, "target": 2e-3}
    scaled = lambda role, t: Triples(t.u, torch.full_like(t.sigma, sizes[role]), t.v)  # noqa: E731
    recipe = dataclasses.replace(predictor.RECIPES["aligned"], learning_rate=3e-3, epochs=400)
    for found in predicted(changed(tiny_trajectory(), scaled), recipe).values():
        assert found["u"].norm().item() == pytest.approx(1)
        assert found["v"].norm().item() == pytest.approx(1)
        assert found["sigma"].item() == pytest.approx(2e-3, rel=0.05)


@pytest.mark.parametrize("name", predictor.RECIPES)
def test_signs_matter_only_to_the_recipe_that_does_not_align_them(name):
    trajectory, recipe = tiny_trajectory(), predictor.RECIPES[name]
    turn = lambda role, t: Triples(-t.u, t.sigma, -t.v) if role == "target" else t  # noqa: E731
    prepared = [predictor.prepare(t, recipe) for t in (trajectory, changed(trajectory, turn))]
    targets = [predictor.stack_families(*found)["u.7"][2] for found in prepared]
    assert torch.equal(*targets) is recipe.align


# --------------------------------------------------------------------------------------------------
# `weighted`
# --------------------------------------------------------------------------------------------------


def dense(triples, i):
    return triples.sigma[i].double() * torch.outer(triples.u[i].double(), triples.v[i].double())


def dense_terms(roles, i):
    """The three terms at checkpoint i, from 0, as whole matrices."""
    recent = [dense(roles["local"], j) for j in range(max(0, i - 2), i + 1)]
    return [recent[-1], sum(recent) / len(recent), dense(roles["global"], i) / (i + 1)]


def test_the_weights_equal_a_dense_least_squares_fit(monkeypatch):
    prior = (0.6, 0.3, 0.1)
    for name, value in {"DECAY": 0.7, "RIDGE": 0.05, "PRIOR": prior}.items():
        monkeypatch.setattr(methods, name, value)
    trajectory = tiny_trajectory(c=7)
    rows, answers, total = [], [], 0.0
    for roles in trajectory.deltas.values():
        for i in range(1, 6):  # checkpoints 2 to 6 have a local behind them and one ahead
            share = 0.7 ** (5 - i)
            scale = share**0.5 / roles["local"].sigma[i].double()
            terms = dense_terms(roles, i)
            rows.append(torch.stack([scale * term.flatten() for term in terms], 1))
            answers.append(scale * dense(roles["local"], i + 1).flatten())
            total += share
    rows.append((0.05 * total) ** 0.5 * torch.eye(3, dtype=torch.float64))
    answers.append((0.05 * total) ** 0.5 * torch.tensor(prior, dtype=torch.float64))
    wanted = torch.linalg.lstsq(torch.cat(rows), torch.cat(answers)).solution
    torch.testing.assert_close(methods.weighted_fit(trajectory), wanted)


def test_the_weighted_prediction_is_rank_1_of_the_dense_sum():
    trajectory = tiny_trajectory()
    weights = methods.weighted_fit(trajectory)
    for roles in trajectory.deltas.values():
        found = methods.weighted(roles, 2, weights)
        whole = sum(w * term for w, term in zip(weights, dense_terms(roles, 5), strict=True))
        torch.testing.assert_close(found.dense().double(), rank_1(2 * whole), atol=1e-5, rtol=1e-4)
        assert found.terms[0].balanced


def test_two_checkpoints_leave_the_prior():
    wanted = torch.tensor(methods.PRIOR, dtype=torch.float64)
    torch.testing.assert_close(methods.weighted_fit(tiny_trajectory(c=2, k=1)), wanted)


# --------------------------------------------------------------------------------------------------
# The backtest
# --------------------------------------------------------------------------------------------------


def walk(c=8, k=2):
    """Dense W[0] ... W[c] of two matrices, one of which stands still, and their trajectory."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(c, 7, 5, generator=generator, dtype=torch.float64) + 0.5
    whole = [steps[:i].sum(0) for i in range(c + 1)]
    matrices = {"moves": whole, "still": [0 * w for w in whole]}
    ends = {
        "global": [(i, 0) for i in range(1, c + 1)],
        "local": [(i, i - 1) for i in range(1, c + 1)],
        "target": [(i, i - k) for i in range(k + 1, c + 1)],
    }
    deltas = {}
    for module, W in matrices.items():
        deltas[module] = {}
        for role, pairs in ends.items():
            u, sigma, vh = torch.linalg.svd(torch.stack([W[i] - W[j] for i, j in pairs]))
            some = float(module == "moves")  # a matrix that stands still has no direction
            parts = (some * u[:, :, 0], sigma[:, 0], some * vh[:, 0])
            deltas[module][role] = Triples(*(x.float() for x in parts))
    return matrices, Trajectory(list(range(10, 10 * c + 1, 10)), k, deltas)


def dense_cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("kind", ["LoRA", "dense"])
def test_the_backtest_scores_every_row_by_its_cosine_with_the_true_delta(kind):
    """7 checkpoints, 2 of them hidden: it stands at 50 and predicts 70."""
    matrices, trajectory = walk()
    as_lora = lambda x: LowRank(x, torch.eye(5).double())  # noqa: E731
    series = {m: [as_lora(w) if kind == "LoRA" else w for w in W] for m, W in matrices.items()}
    u, v = (normalize(torch.ones(size), dim=0) for size in (7, 5))
    guess, seen = {"u": u, "sigma": 2.0, "v": v}, []

    def predict(past):
        seen.append(past)
        return dict.fromkeys(past.deltas, guess), None

    weights = types.SimpleNamespace(weights=series.get)
    found = backtest(trajectory.until(7), weights, predict)
    assert (found.pop("at_step"), found.pop("predicts_step")) == (50, 70)
    assert seen[0].steps == [10, 20, 30, 40, 50]
    assert len(seen[0].deltas["moves"]["target"]) == 3
    W = matrices["moves"]
    true, locals_ = W[7] - W[5], [rank_1(W[i + 1] - W[i]) for i in (3, 4)]
    whole = [rank_1(W[i] - W[0]) for i in range(1, 6)]
    u, sigma, vh = torch.linalg.svd(torch.stack(whole).double())
    for i in range(3, -1, -1):  # signs consistent with the last one
        if u[i, :, 0] @ u[i + 1, :, 0] + vh[i, 0] @ vh[i + 1, 0] < 0:
            u[i], vh[i] = -u[i], -vh[i]
    slope = numpy.polyfit(numpy.arange(5), (sigma[:, :1] * u[:, :, 0]).numpy(), 1)[0]
    roles = trajectory.until(5).deltas["moves"]
    terms = zip(methods.weighted_fit(trajectory.until(5)), dense_terms(roles, 4), strict=True)
    wanted = {
        "predictor": 2 * torch.full((7, 5), 35**-0.5),
        "copy-global": 2 / 5 * whole[-1],
        "repeat-last": rank_1(W[5] - W[3]),
        "recent-locals": rank_1(sum(locals_)),
        "linear-fit": 2 * torch.outer(torch.from_numpy(slope), vh[4, 0]),
        "weighted": rank_1(2 * sum(w * term for w, term in terms)),
        "oracle": rank_1(true),
    }
    assert list(found) == list(wanted)
    for row, matrix in wanted.items():
        assert found[row]["cosine"] == pytest.approx(dense_cosine(matrix, true), rel=1e-4), row


@pytest.mark.parametrize(
    ("cosine", "says"),
    [(0.84, "Expect a jump to help, and a larger"), (0.3, "undecided"), (0.05, "do not jump")],
)
def test_the_backtest_ends_in_advice(cosine, says):
    tested = {"at_step": 100, "predicts_step": 150}
    tested |= {"predictor": {"cosine": cosine}, "repeat-last": {"cosine": 0.2}}
    lines = describe("aligned", tested).splitlines()
    assert f"of our demo, cosine {cosine:.2f}: " in lines[2]
    assert says in lines[2]
    assert (len(lines) == 4) == (cosine < 0.2)  # it loses to repeating the last target
