"""The low-rank algebra against dense float64 matrices and numbers worked out by hand."""

import math

import pytest
import torch

from common import rank1
from common.baselines import measures
from common.baselines.measures import cosine, inner
from common.files.deltas import Trajectory, Triples
from common.rank1 import LowRank, top


def factors(m, n, q, seed=0, decay=1.0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*s, generator=generator).double() for s in ((m, q), (q, n)))
    return left * decay ** torch.arange(q, dtype=torch.float64), right


def pair(m=12, n=9, q=3, seed=0, weight=0.5):
    """A LowRank, and the same matrix dense."""
    left, right = factors(m, n, q, seed)
    return LowRank(left, right, weight), weight * left @ right


def assert_leading(found, matrix, tolerance=1e-9):
    """The triple `found` is that of a dense SVD of `matrix`; u and v carry one sign."""
    u, sigma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert float(found.sigma[0]) == pytest.approx(float(sigma[0]), rel=tolerance)
    wanted, got = torch.outer(u[:, 0], vh[0]), torch.outer(found.u, found.v).double()
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)


# --------------------------------------------------------------------------------------------------
# Sums
# --------------------------------------------------------------------------------------------------

FORMULAS = {
    "plus": lambda a, b, c: a + b + c,
    "minus": lambda a, b, c: a - b - c,
    "times": lambda a, b, c: 2 * a * -3 + 0.0 * b,
    "divided": lambda a, b, c: (a - b) / 4,
    "mean": lambda a, b, c: sum([a, b, c]) / 3,
    "a line": lambda a, b, c: a + 1.5 * (b - a),
    "nothing": lambda a, b, c: a - a,
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.5), (0.5, 2.0, -1.0)])
def test_a_formula_gives_the_same_of_factors_and_of_dense_matrices(name, weights):
    low, dense = zip(*(pair(seed=i, weight=w) for i, w in enumerate(weights)), strict=True)
    found = FORMULAS[name](*low)
    assert isinstance(found, LowRank)
    assert found.shape == (12, 9)
    torch.testing.assert_close(found.dense(), FORMULAS[name](*dense))
    # With a dense tensor on either side the result is a dense tensor.
    for which in range(3):
        mixed = [dense[i] if i == which else low[i] for i in range(3)]
        found = FORMULAS[name](*mixed)
        found = found.dense() if isinstance(found, LowRank) else found
        torch.testing.assert_close(found, FORMULAS[name](*dense))


def test_zero_is_no_term_and_changes_nothing():
    (matrix, dense), zero = pair(), LowRank(torch.zeros(12, 0), torch.zeros(0, 9))
    for found in (matrix - zero, zero + matrix, zero + 1.0 * (matrix - zero)):
        assert len(found.terms) == 1
        torch.testing.assert_close(found.dense(), dense)
    assert not zero.dense().any()
    torch.testing.assert_close((zero - matrix).dense(), -dense)


def test_a_sum_with_a_dense_tensor_keeps_its_dtype():
    (matrix, dense), other = pair(), torch.ones(12, 9)
    for found, wanted in ((other + matrix, 1 + dense), (other - matrix, 1 - dense)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted.float())
    torch.testing.assert_close(matrix - other, (dense - 1).float())


def test_inner_products_and_cosines_equal_dense_ones():
    (a, x), (b, y) = pair(weight=-0.5), pair(q=2, seed=1, weight=2.0)
    wanted = float((x * y).sum())
    for one, other in ((a, b), (a, y), (x, b), (x, y)):
        assert inner(one, other) == pytest.approx(wanted)
        assert cosine(one, other) == pytest.approx(wanted / float(x.norm() * y.norm()))
    assert inner(a + b, a - b) == pytest.approx(float(x.square().sum() - y.square().sum()))
    assert cosine(a, -2 * a) == pytest.approx(-1)
    assert math.isnan(cosine(a, 0 * b))


# --------------------------------------------------------------------------------------------------
# Factors of an adapter
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 2.0, 1.5625, 1 / 3, 11.313708498984761])
def test_the_factors_of_an_adapter_come_back_bit_for_bit(scale):
    b, a = (x.float() for x in factors(12, 9, 3))
    unit = [torch.nn.functional.normalize(torch.ones(size), dim=0) for size in (12, 9)]
    own = LowRank(b.double(), a.double(), scale)
    for matrix in (own, own + 1.5 * rank1.rank1(unit[0], 0.2, unit[1])):
        left, right = matrix.factors(scale)
        assert torch.equal(left[:, :3], b)
        assert torch.equal(right[:3], a)
        torch.testing.assert_close(scale * left @ right, matrix.dense().float())


@pytest.mark.parametrize("sigma", [0.37, -0.37])
def test_a_unit_term_is_shared_evenly_and_keeps_its_sign(sigma):
    u, v = (torch.nn.functional.normalize(torch.arange(1.0, n + 1), dim=0) for n in (5, 4))
    left, right = (1.5 * rank1.rank1(u, sigma, v)).factors(0.5)
    torch.testing.assert_close(left.norm(), right.norm())
    torch.testing.assert_close(0.5 * left @ right, 1.5 * sigma * torch.outer(u, v))


def test_factors_have_no_more_columns_than_the_matrix():
    many = [pair(m=8, n=5, q=3, seed=i) for i in range(4)]
    left, right = sum(low for low, _ in many).factors(0.5)
    assert (left.shape, right.shape) == ((8, 5), (5, 5))
    wanted = sum(dense for _, dense in many).float()
    torch.testing.assert_close(0.5 * left @ right, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_a_matrix_of_rank_0_is_a_zero_column():
    left, right = LowRank(torch.zeros(8, 0), torch.zeros(0, 5)).factors(1.0)
    assert (left.tolist(), right.tolist()) == ([[0.0]] * 8, [[0.0] * 5])


# --------------------------------------------------------------------------------------------------
# The exact way
# --------------------------------------------------------------------------------------------------

SIZES = [(64, 64, 4), (192, 64, 32), (32, 64, 16), (300, 200, 128), (16, 200, 32), (8, 8, 64)]


@pytest.mark.parametrize(("m", "n", "q"), SIZES)
def test_the_svd_equals_a_dense_one(m, n, q):
    left, right = factors(m, n, q, decay=0.97)
    (u, sigma, vh), wanted = LowRank(left, right, 0.5).svd(), 0.5 * left @ right
    assert_leading(rank1.Top(u[:, 0], sigma, vh[0]), wanted)
    exact = torch.linalg.svdvals(wanted)[: len(sigma)]
    torch.testing.assert_close(sigma, exact, rtol=1e-9, atol=1e-9 * float(sigma[0]))
    torch.testing.assert_close(u * sigma @ vh, wanted, rtol=1e-9, atol=1e-9 * float(sigma[0]))


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_the_nearest_matrix_of_a_rank_is_the_truncated_svd(rank):
    low, wanted = pair(m=12, n=9, q=3, seed=1)
    other, more = pair(m=12, n=9, q=4, seed=2)
    found, lost = (low - 0.5 * other).nearest(rank)
    u, sigma, vh = torch.linalg.svd(wanted - 0.5 * more, full_matrices=False)
    truncated = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
    torch.testing.assert_close(found.dense().double(), truncated, rtol=1e-6, atol=1e-6)
    assert lost == pytest.approx(float(sigma[rank:].norm() / sigma.norm()), abs=1e-9)
    assert (lost == 0) == (rank >= 7)
    left, right = found.factors(2.0)
    torch.testing.assert_close(2.0 * left @ right, truncated.float(), rtol=1e-5, atol=1e-5)


def test_factors_of_lower_rank_than_columns_still_give_the_dense_answer():
    left, right = factors(50, 30, 3)
    left = torch.cat([left, left, torch.zeros(50, 2).double()], 1)
    right = torch.cat([right, right, right[:2]])
    assert_leading(top(LowRank(left, right)), left @ right)


def test_a_near_tie_keeps_sigma_and_stays_in_the_leading_plane():
    q1, q2 = (torch.linalg.qr(factors(size, 1, 2)[0])[0] for size in (40, 30))
    left = q1 * torch.tensor([1.0, 1.0 - 1e-9], dtype=torch.float64)
    matrix = LowRank(left, q2.T.contiguous())
    u, sigma, vh = matrix.svd()
    for found in (rank1.Top(u[:, 0], sigma, vh[0]), top(matrix)):
        assert found.sigma[0].item() == pytest.approx(1.0, abs=1e-12)
        assert (q1.T @ found.u).norm().item() == pytest.approx(1.0, abs=1e-9)


# --------------------------------------------------------------------------------------------------
# The fast way
# --------------------------------------------------------------------------------------------------


def lora_series(m, n, r, count=7, step=0.02, seed=0, common=0.7):
    """Checkpoints of a LoRA that drifts as in RL, fp32: B from zero, A from Kaiming's, a common
    direction and noise in each step."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    b, a = torch.zeros(m, r), noise(r, n) / n**0.5
    drift = noise(m, 1) @ noise(1, r) / r**0.5
    found = []
    for _ in range(count):
        b = b + step * (common * drift + noise(m, r)) / m**0.5
        a = a + 0.01 * step * noise(r, n) / n**0.5
        found.append((b, a))
    return found


def weights(series, scale=1.0):
    """W[0] ... W[c] of a LoRA in float64, as common/files/series.py gives them."""
    (b, a), *_ = series
    zero = LowRank(torch.zeros(len(b), 0), torch.zeros(0, a.shape[1]))
    return [zero, *(LowRank(b.double(), a.double(), scale) for b, a in series)]


SHAPES = [(64, 64, 4), (64, 64, 128), (192, 64, 16), (256, 1024, 64), (768, 256, 64)]
SHAPES += [(48, 300, 8), (30, 20, 1)]


@pytest.mark.parametrize(
    ("m", "n", "r", "kind"), [*((*shape, "LoRA") for shape in SHAPES), (192, 64, 16, "dense")]
)
def test_a_trajectory_equals_dense_svds(m, n, r, kind):
    series, k, scale = lora_series(m, n, r), 3, 0.5
    W = weights(series, scale)
    whole = [w.dense().double() for w in W]
    if kind == "dense":
        backbone = 0.02 * factors(m, n, 1, seed=9)[0] @ torch.ones(1, n).double()
        W = whole = [(backbone + w).float() for w in whole]
    found = rank1.trajectory(W, k)
    before = {"global": lambda i: 0, "local": lambda i: i - 1, "target": lambda i: i - k}
    assert [len(found[f"{role}.sigma"]) for role in rank1.ROLES] == [7, 7, 4]
    exact = 1e-6 if kind == "LoRA" else 1e-5
    for role in rank1.ROLES:
        first = k + 1 if role == "target" else 1
        for row, i in enumerate(range(first, 8)):
            delta = (whole[i] - whole[before[role](i)]).double()
            u, sigma, vh = torch.linalg.svd(delta, full_matrices=False)
            one = {x: found[f"{role}.{x}"][row].double() for x in ("u", "sigma", "v")}
            assert one["sigma"].item() == pytest.approx(sigma[0].item(), rel=exact)
            cosines = one["u"] @ u[:, 0], one["v"] @ vh[0]
            assert cosines[0] * cosines[1] > 0  # one sign for both
            if sigma[0] / sigma[1] > 1.01:
                assert min(map(abs, cosines)) > 1 - 10 * exact
            if role == "global" and kind == "LoRA":
                spectrum = found["spectrum"][row]
                wanted = torch.nn.functional.pad(sigma, (0, len(spectrum)))[: len(spectrum)]
                torch.testing.assert_close(spectrum, wanted, rtol=1e-6, atol=1e-6 * float(sigma[0]))


def test_a_checkpoint_that_did_not_move_has_a_local_delta_of_exactly_zero():
    first, second = lora_series(40, 30, 4, count=2)
    found = rank1.trajectory(weights([first, first, second], 0.5), 1)
    for name in ("local.sigma", "local.u", "local.v"):
        assert not found[name][1].any()


def test_an_adapter_that_was_never_trained_has_no_direction():
    b, a = torch.zeros(40, 4), torch.randn(4, 30)
    found = rank1.trajectory(weights([(b, a)] * 3), 1)
    assert not any(tensor.any() for tensor in found.values())
    assert not any(part.any() for part in top(LowRank(b, a)))


def test_a_rank_1_delta_is_found_and_the_rest_of_its_spectrum_is_zero():
    b, a = torch.zeros(40, 4), torch.randn(4, 30)
    b[:, :1] = torch.randn(40, 1)
    found = rank1.trajectory(weights([(b, a), (2 * b, a)]), 1)
    assert found["target.sigma"][0].item() == pytest.approx(float(b.norm() * a[0].norm()), rel=1e-6)
    assert (found["spectrum"][:, 1:] / found["spectrum"][:, :1]).max() < 1e-7


def exact_ways(call) -> int:
    """How many triples `call` finds the exact way."""
    calls, real = [], LowRank.svd
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRank, "svd", lambda self: calls.append(self) or real(self))
        call()
    return len(calls)


def test_terms_that_cancel_take_the_exact_way():
    """Two nearly opposite columns of B over equal rows of A: what is left is 1e-6 of the terms."""
    column, row = factors(50, 40, 1)
    b = torch.cat([column, 1e-6 * factors(50, 1, 1, seed=1)[0] - column], 1)
    a = torch.cat([row, row])
    W = [0 * LowRank(b, a), LowRank(b, a), LowRank(2 * b, a)]
    for i, j in ((1, 0), (2, 0), (2, 1)):
        assert exact_ways(lambda i=i, j=j: top(W[i] - W[j])) == 1
        assert_leading(top(W[i] - W[j]), b @ a if i - j == 1 else 2 * b @ a, 1e-6)


def test_other_sums_and_fp32_take_the_exact_way():
    a, b, c = (pair(seed=i)[0] for i in range(3))
    for matrix in (a + b - c, a + 2 * b, -1 * a):
        assert exact_ways(lambda matrix=matrix: top(matrix)) == 1
        assert_leading(top(matrix), matrix.dense())
    left, right = (x.float() for x in factors(12, 9, 3))
    assert exact_ways(lambda: top(LowRank(left, right))) == 1
    assert exact_ways(lambda: top(LowRank(left.double(), right.double()))) == 0


def test_rows_of_a_that_depend_on_each_other_are_no_obstacle():
    (b, a), (b2, a2) = lora_series(40, 30, 4, count=2)
    a, a2 = a[[0, 1, 2, 2]], a2[[0, 1, 2, 2]]
    _, old, new = weights([(b, a), (b2, a2)])
    assert_leading(top(new - old), b2.double() @ a2.double() - b.double() @ a.double(), 1e-6)


@pytest.mark.parametrize(("m", "q"), [(50, 2), (5000, 2), (400, 64)])
@pytest.mark.parametrize("left_over", [1.0, 1e-2, 1e-4])
def test_the_bound_of_the_fast_way_holds(m, q, left_over):
    """Nearly opposite pairs of columns over equal rows, of which `left_over` remains."""
    half, rows = factors(m, 40, q // 2)
    left = torch.cat([half, left_over * factors(m, 1, q // 2, seed=1)[0] - half], 1)
    right = torch.cat([rows, rows])
    _, sigma, _, bound = rank1.top_of_grams(left.mT @ left, right @ right.mT)
    wanted = torch.linalg.svdvals((left[:, : q // 2] + left[:, q // 2 :]) @ rows)[0]
    assert abs(sigma[0] / wanted - 1) <= bound < 1e-2


def test_factors_wider_than_the_matrix_and_both_ways_keep_one_length_of_spectrum(monkeypatch):
    W = weights(lora_series(16, 40, 24, count=3), 0.5)
    everywhere = rank1.trajectory(W, 1)["spectrum"]
    assert everywhere.shape == (3, 16)
    bounds, real = iter([0.0, 1.0] * 10), rank1.top_of_grams
    mixed = lambda *grams: (*real(*grams)[:3], next(bounds))  # noqa: E731
    monkeypatch.setattr(rank1, "top_of_grams", mixed)
    found = rank1.trajectory(W, 1)
    torch.testing.assert_close(found["spectrum"], everywhere, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Signs, parts of a trajectory, Section 3
# --------------------------------------------------------------------------------------------------


def test_an_aligned_trajectory_has_no_random_signs():
    generator = torch.Generator().manual_seed(3)
    drift = torch.randn(13, generator=generator) + 0.05 * torch.randn(6, 13, generator=generator)
    u, v = drift[:, :8], drift[:, 8:]
    signs = torch.tensor([1, -1, -1, 1, -1, 1.0])[:, None]
    roles = {
        role: Triples(u[:n] * s[:n], torch.ones(n), v[:n] * s[:n])
        for role, n, s in (("global", 6, signs), ("local", 6, -signs), ("target", 4, signs))
    }
    aligned = Trajectory([1, 2, 3, 4, 5, 6], 2, {"m": roles}).aligned().deltas["m"]
    assert torch.equal(aligned["global"].u, u)  # the last sign was +1, and all follow it
    assert torch.equal(aligned["local"].v, v)
    assert torch.equal(aligned["target"].u, u[:4])


def test_energy_ratio_by_hand():
    sigma = torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    assert measures.energy_ratio(sigma).tolist() == [0.75, 1.0]
    assert math.isnan(measures.energy_ratio(torch.zeros(2)))


def test_r2_is_one_on_a_line_and_negative_where_the_line_misleads():
    steps = torch.tensor([10.0, 20, 30, 40, 50, 60])
    line = steps[:, None] * torch.tensor([1.0, -2.0]) + torch.tensor([3.0, 4.0])
    assert measures.linear_fit_r2(line, 4) == (pytest.approx(1), pytest.approx(1))
    # The line says 5 and 6: SSE = 1 + 2.25, SST = 0.125.
    bent = torch.tensor([1.0, 2, 3, 4, 4, 4.5])[:, None]
    held_out, in_sample = measures.linear_fit_r2(bent, 4)
    assert held_out == pytest.approx(1 - 3.25 / 0.125)
    assert in_sample == pytest.approx(1)
