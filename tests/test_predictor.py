"""The predictor against the paper's equations written as loops."""

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
