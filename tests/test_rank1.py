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


# ---------------------------------------------------------------------------------------------------------------------------
# The fast way: a whole trajectory from Gram matrices
# ---------------------------------------------------------------------------------------------------------------------------


def lora_series(m, n, r, count=7, step=0.02, seed=0, common=0.7):
    """Checkpoints of a LoRA that drifts as RL's do: B from zero, A from Kaiming's, a common direction and noise in each step. fp32."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    b, a = torch.zeros(m, r), noise(r, n) / n**0.5
    drift = noise(m, 1) @ noise(1, r) / r**0.5
    found = []
    for _ in range(count):
        b = b + step * (common * drift + noise(m, r)) / m**0.5
        a = a + 0.01 * step * noise(r, n) / n**0.5
        found.append((b.clone(), a.clone()))
    return found


def dense_delta(series, role, i, k, scale):
    now, before = {"global": (i, None), "local": (i, i - 1 if i else None), "target": (i + k, i)}[role]
    whole = [scale * b.double() @ a.double() for b, a in series]
    return whole[now] - (0 if before is None else whole[before])


@pytest.mark.parametrize(
    ("m", "n", "r"), [(64, 64, 4), (64, 64, 128), (192, 64, 16), (256, 1536, 64), (1536, 256, 64), (512, 640, 128), (48, 300, 8)]
)
def test_a_trajectory_of_factors_equals_dense_svds(m, n, r):
    series, k, scale = lora_series(m, n, r), 3, 0.5
    triples, spectra, gaps, _ = rank1.rank1_trajectory(series, k, scale)
    assert [len(triples[role].sigma) for role in rank1.ROLES] == [7, 7, 4]
    for role in rank1.ROLES:
        for i in range(len(triples[role].sigma)):
            u, sigma, vh = torch.linalg.svd(dense_delta(series, role, i, k, scale), full_matrices=False)
            assert triples[role].sigma[i].item() == pytest.approx(sigma[0].item(), rel=1e-6)
            assert gaps[role][i].item() == pytest.approx((sigma[1] / sigma[0]).item(), rel=1e-5)
            if sigma[0] / sigma[1] > 1.01:
                assert abs(triples[role].u[i].double() @ u[:, 0]) > 1 - 1e-6
                assert abs(triples[role].v[i].double() @ vh[0]) > 1 - 1e-6
            assert (triples[role].u[i].double() @ u[:, 0]) * (triples[role].v[i].double() @ vh[0]) > 0  # one sign for both
            if role == "global":
                torch.testing.assert_close(spectra[i][: len(sigma)], sigma[: spectra.shape[1]], rtol=1e-6, atol=1e-6 * sigma[0].item())


def test_a_large_matrix_equals_its_dense_svd():
    series = lora_series(8960, 1536, 64, count=2)
    triples, _, _, _ = rank1.rank1_trajectory(series, 1, 0.5)
    delta = dense_delta(series, "target", 0, 1, 0.5).float()
    u, sigma, v = torch.svd_lowrank(delta, q=160, niter=0)  # of rank 128: exact up to fp32
    assert triples["target"].sigma[0].item() == pytest.approx(sigma[0].item(), rel=1e-5)
    assert abs(triples["target"].u[0] @ u[:, 0]) > 1 - 1e-5
    assert abs(triples["target"].v[0] @ v[:, 0]) > 1 - 1e-5


def test_a_checkpoint_that_did_not_move_has_a_local_delta_of_exactly_zero():
    (b, a), (b2, a2) = lora_series(40, 30, 4, count=2)
    triples, _, gaps, exact = rank1.rank1_trajectory([(b, a), (b, a), (b2, a2)], 1, 0.5)
    assert triples["local"].sigma[1] == 0
    assert triples["local"].u[1].abs().max() == 0
    assert gaps["local"][1] == 0
    assert exact == 0


def test_an_adapter_that_was_never_trained_has_no_direction():
    b, a = torch.zeros(40, 4), torch.randn(4, 30)
    triples, spectra, _, _ = rank1.rank1_trajectory([(b, a)] * 3, 1, 0.5)
    assert all(triples[role].sigma.abs().max() == 0 for role in rank1.ROLES)
    assert spectra.abs().max() == 0


def test_a_rank_1_delta_is_found_and_the_rest_of_its_spectrum_is_zero():
    u, v = torch.randn(40, 1), torch.randn(1, 30)
    a = torch.randn(4, 30)
    a[0] = v
    b = torch.zeros(40, 4)
    b[:, :1] = u
    triples, spectra, _, _ = rank1.rank1_trajectory([(b, a), (2 * b, a)], 1, 1.0)
    assert triples["target"].sigma[0].item() == pytest.approx((u.norm() * v.norm()).item(), rel=1e-6)
    assert (spectra[:, 1:] / spectra[:, :1]).max() < 1e-7


def test_terms_that_cancel_go_the_exact_way():
    """B A with two columns of B nearly opposite and the rows of A nearly equal: what is left is 1e-6 of the terms."""
    generator = torch.Generator().manual_seed(0)
    column, row = torch.randn(50, 1, generator=generator).double(), torch.randn(1, 40, generator=generator).double()
    small = 1e-6 * torch.randn(50, 1, generator=generator).double()
    b, a = torch.cat([column, small - column], 1), torch.cat([row, row])
    triples, _, _, exact = rank1.rank1_trajectory([(b, a), (2 * b, a)], 1, 1.0)
    assert exact == 5
    wanted = torch.linalg.svd(b @ a)
    assert triples["global"].sigma[0].item() == pytest.approx(wanted.S[0].item(), rel=1e-6)
    assert abs(triples["global"].u[0].double() @ wanted.U[:, 0]) > 1 - 1e-6


def test_rows_of_a_that_depend_on_each_other_are_no_obstacle():
    (b, a), (b2, a2) = lora_series(40, 30, 4, count=2)
    a[3], a2[3] = a[2], a2[2]
    triples, _, _, _ = rank1.rank1_trajectory([(b, a), (b2, a2)], 1, 1.0)
    sigma = torch.linalg.svdvals(b2.double() @ a2.double() - b.double() @ a.double())
    assert triples["target"].sigma[0].item() == pytest.approx(sigma[0].item(), rel=1e-6)


@pytest.mark.parametrize(("m", "q"), [(50, 2), (5000, 2), (400, 64)])
@pytest.mark.parametrize("left_over", [1.0, 1e-2, 1e-4])
def test_the_bound_of_the_fast_way_holds(m, q, left_over):
    """Columns of B in nearly opposite pairs over equal rows of A, so that `left_over` of their size remains."""
    generator = torch.Generator().manual_seed(0)
    half, rows = torch.randn(m, q // 2, generator=generator).double(), torch.randn(q // 2, 40, generator=generator).double()
    left = torch.cat([half, left_over * torch.randn(m, q // 2, generator=generator).double() - half], 1)
    right = torch.cat([rows, rows])
    _, sigma, _, bound = rank1.leading_from_grams(left.mT @ left, right @ right.mT)
    wanted = torch.linalg.svdvals((left[:, : q // 2] + left[:, q // 2 :]) @ rows)[0]
    assert abs(sigma[0] / wanted - 1) <= bound
    assert bound < 1e-2


def test_factors_wider_than_the_matrix_and_a_mixture_of_ways_keep_one_length_of_spectrum(monkeypatch):
    series = lora_series(16, 40, 24, count=3)
    everywhere = rank1.rank1_trajectory(series, 1, 0.5)[1]
    assert everywhere.shape == (3, 16)
    bounds = iter([0.0, 1.0] * 10)
    real = rank1.leading_from_grams
    monkeypatch.setattr(rank1, "leading_from_grams", lambda *grams: (*real(*grams)[:3], next(bounds)))
    _, mixed, _, exact = rank1.rank1_trajectory(series, 1, 0.5)
    assert exact == 4
    torch.testing.assert_close(mixed, everywhere, rtol=1e-6, atol=1e-6)
