"""The predictor against the paper's equations written as loops."""

import dataclasses

import pytest
import torch

from common import predictor, rank1


def tiny_trajectory(c=6, k=2, modules=3, m=7, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def triples(count):
        u, v = torch.randn(count, m, generator=generator), torch.randn(count, n, generator=generator)
        return rank1.Triples(
            torch.nn.functional.normalize(u, dim=1), torch.rand(count, generator=generator) + 0.5, torch.nn.functional.normalize(v, dim=1)
        )

    deltas = {f"m{j}": {"global": triples(c), "local": triples(c), "target": triples(c - k)} for j in range(modules)}
    return rank1.Trajectory(list(range(1, c + 1)), k, deltas)


def test_the_network_is_the_official_layout():
    model = predictor.TrajectoryPredictor(12)
    shapes = [tuple(layer.weight.shape) for layer in model.decode if hasattr(layer, "weight")]
    assert shapes == [(256, 24), (24, 256), (256, 24), (12, 256)]
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in model.decode) == 1
    assert [tuple(layer.weight.shape) for layer in model.encode_global if hasattr(layer, "weight")] == [
        (256, 12),
        (12, 256),
        (256, 12),
        (12, 256),
    ]
    assert model(torch.zeros(2, 3, 12), torch.zeros(2, 3, 12)).shape == (2, 3, 12)


@pytest.mark.parametrize(("inputs", "seen"), [(("global",), 0), (("local",), 1)])
def test_a_network_of_one_input_has_one_encoder_and_does_not_see_the_other(inputs, seen):
    model = predictor.TrajectoryPredictor(12, inputs)
    assert [tuple(layer.weight.shape) for layer in model.decode if hasattr(layer, "weight")] == [(256, 12), (12, 256), (256, 12), (12, 256)]
    assert {name.split(".")[0] for name in model.state_dict()} == {f"encode_{inputs[0]}", "decode"}
    pair = torch.randn(2, 12)
    other = pair.clone()
    other[1 - seen] = torch.nan
    assert torch.equal(model(*pair), model(*other))
    assert torch.equal(model(*pair), model.decode(getattr(model, f"encode_{inputs[0]}")(pair[seen])))


def test_ablations_are_their_recipe_but_for_an_input():
    for base in ("paper", "aligned"):
        assert predictor.RECIPES[base].inputs == ("global", "local")
        for left, out in (("local", "global"), ("global", "local")):
            recipe = predictor.RECIPES[f"{base}-no-{out}"]
            assert recipe.inputs == (left,)
            assert dataclasses.replace(recipe, inputs=("global", "local")) == predictor.RECIPES[base]


def test_an_ablated_predictor_is_trained_and_predicts_without_its_input():
    trajectory, spoilt = tiny_trajectory(), tiny_trajectory()
    for roles in spoilt.deltas.values():
        for part in ("u", "sigma", "v"):
            getattr(roles["local"], part).fill_(torch.nan)
    recipe = predictor.Recipe(align=False, scale_sigma=True, learning_rate=1e-3, epochs=3, inputs=("global",))
    found = []
    for t in (trajectory, spoilt):
        families = predictor.stack_families(*predictor.prepare(t, recipe))
        models = {name: predictor.train_family(*data, recipe, seed=0)[0] for name, data in families.items()}
        found.append(predictor.predict(models, t, recipe))
    for module, triple in found[0].items():
        assert all(torch.equal(a, b) for a, b in zip(triple, found[1][module], strict=True))


def test_the_last_checkpoints_keep_the_targets_that_begin_there():
    """7 checkpoints, k = 2: targets begin at 1 to 5, so the last four checkpoints have those of 4 and 5."""
    trajectory = tiny_trajectory(c=7, k=2)
    tail = trajectory.last(4)
    assert tail.steps == [4, 5, 6, 7]
    for module, roles in trajectory.deltas.items():
        assert torch.equal(tail.deltas[module]["global"].u, roles["global"].u[3:7])
        assert torch.equal(tail.deltas[module]["local"].sigma, roles["local"].sigma[3:7])
        assert torch.equal(tail.deltas[module]["target"].v, roles["target"].v[3:5])
    assert trajectory.until(5).last(4).steps == [2, 3, 4, 5]
    assert len(trajectory.until(5).last(4).deltas["m0"]["target"].sigma) == 2
    assert trajectory.last(9).steps == trajectory.steps


def test_families_gather_vectors_by_side_and_length():
    trajectory = tiny_trajectory(modules=3)
    families = predictor.stack_families(trajectory, {name: torch.ones(()) for name in trajectory.deltas})
    assert set(families) == {"u.7", "v.5", "sigma"}
    assert [part.shape for part in families["u.7"]] == [(4, 3, 7)] * 3  # 6 checkpoints, k = 2: four have a target
    assert torch.equal(families["v.5"][2][1, 2], trajectory.deltas["m2"]["target"].v[1])
    assert families["sigma"][0].shape == (4, 3, 1)


def test_loss_curve_equals_the_papers_double_sum():
    recipe = predictor.Recipe(align=False, scale_sigma=False, learning_rate=1e-3, epochs=5)
    s_global, s_local, s_target = torch.randn(3, 4, 2, 6).unbind(0)
    model, losses = predictor.train_family(s_global, s_local, s_target, recipe, seed=3)

    torch.manual_seed(3)
    naive = predictor.TrajectoryPredictor(6)
    optimizer = torch.optim.AdamW(naive.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5, eta_min=1e-4)
    for epoch in range(5):
        optimizer.zero_grad()
        total = 0.0
        for i in range(4):  # Eq. 9, gradients of all checkpoints accumulated
            loss = sum((naive(s_global[i, j], s_local[i, j]) - s_target[i, j]).abs().sum() for j in range(2)) / 4
            loss.backward()
            total += loss.item()
        optimizer.step()
        schedule.step()
        assert losses[epoch] == pytest.approx(total, rel=1e-5)
    for ours, theirs in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_the_same_seed_gives_the_same_predictor_and_leaves_torchs_generator_alone():
    recipe = predictor.Recipe(align=False, scale_sigma=False, learning_rate=1e-3, epochs=2)
    data = torch.randn(3, 4, 2, 6).unbind(0)
    state = torch.random.get_rng_state()
    first, again = (predictor.train_family(*data, recipe, seed=1)[1] for _ in range(2))
    assert first == again
    assert torch.equal(state, torch.random.get_rng_state())
    assert first != predictor.train_family(*data, recipe, seed=2)[1]


def test_predictions_have_unit_vectors_and_sigma_in_the_trajectorys_unit():
    trajectory = tiny_trajectory()
    for roles in trajectory.deltas.values():  # targets twice the last global sigma, in any unit
        for role in ("global", "local"):
            roles[role].sigma.fill_(1e-3)
        roles["target"].sigma.fill_(2e-3)
    recipe = predictor.Recipe(align=True, scale_sigma=True, learning_rate=3e-3, epochs=400)
    families = predictor.stack_families(*predictor.prepare(trajectory, recipe))
    models = {name: predictor.train_family(*data, recipe, seed=0)[0] for name, data in families.items()}
    for u, sigma, v in predictor.predict(models, trajectory, recipe).values():
        assert u.norm().item() == pytest.approx(1)
        assert v.norm().item() == pytest.approx(1)
        assert sigma.item() == pytest.approx(2e-3, rel=0.05)


def test_signs_matter_only_to_the_recipe_that_does_not_align_them():
    trajectory = tiny_trajectory()
    flipped = rank1.Trajectory(
        trajectory.steps,
        trajectory.k,
        {
            name: {
                role: rank1.Triples(-t.u if role == "target" else t.u, t.sigma, -t.v if role == "target" else t.v)
                for role, t in roles.items()
            }
            for name, roles in trajectory.deltas.items()
        },
    )
    for recipe, same in ((predictor.RECIPES["aligned"], True), (predictor.RECIPES["paper"], False)):
        one, two = (predictor.stack_families(*predictor.prepare(t, recipe))["u.7"][2] for t in (trajectory, flipped))
        assert torch.equal(one, two) is same


def dense(triples, i):
    return triples.sigma[i].double() * torch.outer(triples.u[i].double(), triples.v[i].double())


def dense_terms(roles, i, window, before=0):
    """The three terms of the recipe `weighted` at checkpoint i (from 0, after `before` left out) as whole matrices."""
    recent = [dense(roles["local"], j) for j in range(max(0, i - window + 1), i + 1)]
    return [recent[-1], sum(recent) / len(recent), dense(roles["global"], i) / (before + i + 1)]


@pytest.mark.parametrize("before", [0, 2])
def test_weights_equal_a_dense_least_squares_fit(before):
    """Also on the last 7 of 9 checkpoints, whose first is number 3."""
    recipe = predictor.SumRecipe(window=3, decay=0.7, ridge=0.05, prior=(0.6, 0.3, 0.1))
    trajectory = tiny_trajectory(c=7 + before).last(7)
    rows, answers, total = [], [], 0.0
    for roles in trajectory.deltas.values():
        for i in range(1, 6):  # checkpoints 2 to 6 have two or more locals behind them and one ahead
            share = 0.7 ** (5 - i)
            scale = share**0.5 / roles["local"].sigma[i].double()
            rows.append(torch.stack([scale * term.flatten() for term in dense_terms(roles, i, 3, before)], 1))
            answers.append(scale * dense(roles["local"], i + 1).flatten())
            total += share
    rows.append((0.05 * total) ** 0.5 * torch.eye(3, dtype=torch.float64))
    answers.append((0.05 * total) ** 0.5 * torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))
    want = torch.linalg.lstsq(torch.cat(rows), torch.cat(answers)).solution
    torch.testing.assert_close(predictor.fit_weights(trajectory, recipe).weights, want)


def test_the_weighted_prediction_is_rank_1_of_the_dense_sum():
    trajectory, recipe = tiny_trajectory(), predictor.RECIPES["weighted"]
    model = predictor.fit_weights(trajectory, recipe)
    for module, (u, sigma, v) in predictor.predict({"sum": model}, trajectory, recipe).items():
        whole = sum(w * term for w, term in zip(model.weights, dense_terms(trajectory.deltas[module], 5, 3), strict=True))
        du, ds, dv = torch.linalg.svd(trajectory.k * whole)
        assert sigma.item() == pytest.approx(ds[0].item(), rel=1e-5)
        torch.testing.assert_close(torch.outer(u, v), torch.outer(du[:, 0], dv[0]).float(), atol=1e-5, rtol=1e-4)


def test_a_steady_run_is_predicted_to_go_on():
    trajectory = tiny_trajectory(c=6, k=2)
    for roles in trajectory.deltas.values():  # every local delta is the same, so W_i - W_0 is i of them and the target k
        for role in ("global", "local"):
            roles[role].u[:], roles[role].v[:] = roles["local"].u[0].clone(), roles["local"].v[0].clone()
        roles["local"].sigma.fill_(0.3)
        roles["global"].sigma[:] = 0.3 * torch.arange(1, 7)
    recipe = predictor.RECIPES["weighted"]
    for module, (u, sigma, v) in predictor.predict({"sum": predictor.fit_weights(trajectory, recipe)}, trajectory, recipe).items():
        assert sigma.item() == pytest.approx(0.6, rel=1e-5)
        local = trajectory.deltas[module]["local"]
        torch.testing.assert_close(torch.outer(u, v), torch.outer(local.u[0], local.v[0]))


def test_the_weighted_recipe_sees_neither_signs_nor_targets():
    trajectory, recipe = tiny_trajectory(), predictor.RECIPES["weighted"]
    other = tiny_trajectory()
    for roles in other.deltas.values():
        for role in ("global", "local"):
            roles[role].u[::2] *= -1
            roles[role].v[::2] *= -1
        roles["target"].sigma.fill_(9)
    one, two = (predictor.predict({"sum": predictor.fit_weights(t, recipe)}, t, recipe) for t in (trajectory, other))
    for module, (u, sigma, v) in one.items():
        torch.testing.assert_close(sigma, two[module][1])
        torch.testing.assert_close(torch.outer(u, v), torch.outer(two[module][0], two[module][2]))


def test_two_checkpoints_leave_the_prior():
    weights = predictor.fit_weights(tiny_trajectory(c=2, k=1), predictor.SumRecipe(prior=(0.7, 0.2, 0.1))).weights
    torch.testing.assert_close(weights, torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64))


def test_a_matrix_that_does_not_move_is_left_alone():
    trajectory, recipe = tiny_trajectory(), predictor.RECIPES["weighted"]
    for triples in trajectory.deltas["m1"].values():
        for part in (triples.u, triples.sigma, triples.v):
            part.zero_()
    found = predictor.predict({"sum": predictor.fit_weights(trajectory, recipe)}, trajectory, recipe)
    assert found["m1"][1].item() == 0
    assert all(part.isfinite().all() for triple in found.values() for part in triple)
