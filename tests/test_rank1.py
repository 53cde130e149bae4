"""rank1.py against a dense float64 SVD and against numbers worked out by hand."""

import math

import pytest
import torch

from common import rank1


def factors(m, n, q, seed=0, decay=1.0):
    generator = torch.Generator().manual_seed(seed)
    scale = decay ** torch.arange(q, dtype=torch.float64)
    return torch.randn(m, q, generator=generator, dtype=torch.float64) * scale, torch.randn(q, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("m", "n", "q"), [(64, 64, 4), (192, 64, 32), (32, 64, 16), (300, 200, 128), (16, 200, 32), (8, 8, 64)])
def test_triple_from_factors_equals_dense_svd(m, n, q):
    left, right = factors(m, n, q, decay=0.97)
    u, sigma, v = rank1.svd_of_product(left, right)
    du, ds, dv = torch.linalg.svd(left @ right)
    assert sigma[0].item() == pytest.approx(ds[0].item(), rel=1e-12)
    torch.testing.assert_close(sigma, ds[: len(sigma)], rtol=1e-9, atol=1e-9 * ds[0].item())
    assert abs(u @ du[:, 0]) > 1 - 1e-9
    assert abs(v @ dv[0]) > 1 - 1e-9
    torch.testing.assert_close((u @ left) @ (right @ v), sigma[0])  # u and v carry the same sign


def test_a_batch_gives_what_each_matrix_gives_alone():
    lefts, rights = zip(*[factors(24, 40, 6, seed) for seed in range(3)], strict=True)
    u, sigma, v = rank1.svd_of_product(torch.stack(lefts), torch.stack(rights))
    for i in range(3):
        alone = rank1.svd_of_product(lefts[i], rights[i])
        torch.testing.assert_close(sigma[i], alone[1])
        torch.testing.assert_close(torch.outer(u[i], v[i]), torch.outer(alone[0], alone[2]))


def test_rank_deficient_factors_still_give_the_dense_answer():
    left, right = factors(50, 30, 3)
    left, right = torch.cat([left, left, torch.zeros(50, 2, dtype=left.dtype)], 1), torch.cat([right, right, right[:2]])
    _, sigma, _ = rank1.svd_of_product(left, right)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(left @ right)[: len(sigma)], rtol=1e-9, atol=1e-9)


def test_a_zero_delta_has_no_direction():
    u, sigma, v = rank1.svd_of_product(torch.zeros(10, 4), torch.randn(4, 6))
    assert sigma.abs().max() == 0
    assert u.abs().max() == 0
    assert v.abs().max() == 0


def test_near_tie_keeps_sigma_and_stays_in_the_leading_plane():
    q1, q2 = torch.linalg.qr(torch.randn(40, 2, dtype=torch.float64))[0], torch.linalg.qr(torch.randn(30, 2, dtype=torch.float64))[0]
    left = q1 * torch.tensor([1.0, 1.0 - 1e-9], dtype=torch.float64)
    u, sigma, _ = rank1.svd_of_product(left, q2.T.contiguous())
    assert sigma[0].item() == pytest.approx(1.0, abs=1e-12)
    assert (q1.T @ u).norm().item() == pytest.approx(1.0, abs=1e-12)


def test_delta_factors_are_the_difference_of_two_checkpoints():
    (b1, a1), (b0, a0) = factors(12, 9, 3, 1), factors(12, 9, 3, 2)
    left, right = rank1.delta_factors((b1, a1), (b0, a0), 0.5)
    torch.testing.assert_close(left @ right, 0.5 * b1 @ a1 - 0.5 * b0 @ a0)
    left, right = rank1.delta_factors((b1, a1), None, 0.5)
    torch.testing.assert_close(left @ right, 0.5 * b1 @ a1)


def test_alignment_flips_u_and_v_together_and_only_where_needed():
    u, v = torch.eye(2), torch.eye(2)
    flipped_u, flipped_v = rank1.align_signs(u, v, torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(flipped_u, torch.tensor([[-1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(flipped_v, flipped_u)


def test_aligned_trajectory_undoes_random_signs():
    generator = torch.Generator().manual_seed(3)
    base_u, base_v = torch.randn(8, generator=generator), torch.randn(5, generator=generator)
    drift = 0.05 * torch.randn(6, 13, generator=generator)
    u, v = base_u + drift[:, :8], base_v + drift[:, 8:]
    signs = torch.tensor([1, -1, -1, 1, -1, 1.0])[:, None]
    roles = {
        role: rank1.Triples(u[:n] * s[:n], torch.ones(n), v[:n] * s[:n])
        for role, n, s in (("global", 6, signs), ("local", 6, -signs), ("target", 4, signs))
    }
    aligned = rank1.Trajectory([1, 2, 3, 4, 5, 6], 2, {"m": roles}).aligned().deltas["m"]
    torch.testing.assert_close(aligned["global"].u, u)  # the last sign was +1, and all follow it
    torch.testing.assert_close(aligned["local"].v, v)
    torch.testing.assert_close(aligned["target"].u, u[:4])


def test_trajectory_until_hides_what_was_not_known_then():
    t = rank1.Triples(torch.arange(6.0)[:, None], torch.arange(6.0), torch.arange(6.0)[:, None])
    target = rank1.Triples(t.u[:4], t.sigma[:4], t.v[:4])
    past = rank1.Trajectory([1, 2, 3, 4, 5, 6], 2, {"m": {"global": t, "local": t, "target": target}}).until(4)
    assert past.steps == [1, 2, 3, 4]
    assert past.deltas["m"]["global"].sigma.tolist() == [0, 1, 2, 3]
    assert past.deltas["m"]["target"].sigma.tolist() == [0, 1]  # the target of checkpoint 3 ends at checkpoint 5: not known yet


def test_energy_ratio_by_hand():
    sigma = torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    assert rank1.energy_ratio(sigma).tolist() == [0.75, 1.0]
    assert rank1.energy_ratio(sigma, squared=True).tolist() == pytest.approx([0.9, 1.0])
    assert math.isnan(rank1.energy_ratio(torch.zeros(2)))


def test_r2_is_one_on_a_line_and_negative_where_the_line_misleads():
    steps = torch.tensor([10.0, 20, 30, 40, 50, 60])
    line = steps[:, None] * torch.tensor([1.0, -2.0]) + torch.tensor([3.0, 4.0])
    assert rank1.linear_fit_r2(steps, line, 4) == (pytest.approx(1), pytest.approx(1))
    bent = torch.tensor([1.0, 2, 3, 4, 4, 4.5])[:, None]  # the line says 5 and 6: SSE = 1 + 2.25, SST = 0.125
    held_out, in_sample = rank1.linear_fit_r2(steps, bent, 4)
    assert held_out == pytest.approx(1 - 3.25 / 0.125)
    assert in_sample == pytest.approx(1)
