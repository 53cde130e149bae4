"""Ways of going on from the last checkpoint without training: NExt, what it is compared with, merging methods, and controls.

A method is a function in METHODS, and its parameters are what it asks stage 4 for:

    last              Adapter: the last checkpoint, W_c = W_0 + s B A
    trajectory        rank1.Trajectory: the rank-1 deltas, signs made consistent
    alpha             the extending coefficient. One that does not ask for it is made once, not once for each alpha
    series            adapter_series.Series: every checkpoint's factors, which stay on the disk until they are asked for
    over_time         `leading_over_time(series)`, computed once for all alphas
    accuracies        [c]: measured accuracy of every checkpoint on validation problems
    measure           Adapter -> its accuracy on the same problems
    predicted         module -> (u [m], sigma, v [n]): stage 3's prediction
    future            Adapter: W_(c+k) of a run that was really continued
    delta, module     one matrix's whole update s B A [m, n] and its name: such a method gives its new update, and stage 4 writes a model
    any option of stage 4, by its name

The others return an Adapter. Where a method looks ahead, alpha means one distance for all: alpha k checkpoints beyond the last one,
alpha 1 being as far as NExt's target (`expo` alone has its own meaning of it).

An extrapolated policy is an adapter again. W_c + alpha sigma u v^T with W_c = W_0 + s B A is exactly one LoRA of rank r + 1:
B' = [B, c u], A' = [A; c v^T], c = sqrt(alpha sigma / s), s' = s, each module with its own r and s. A sweep over alpha costs
kilobytes, rounds nothing, and PEFT, vLLM and the stages here load it unchanged. A sum of checkpoints is a LoRA of their ranks' sum.
"""

import hashlib
import inspect
from collections.abc import Callable

import torch

from common.files.adapters import Adapter, extended
from common.files.series import Series
from common.rank1 import Trajectory, Triples, delta_factors, rank1_of_sum, svd_of_product

METHODS: dict[str, Callable] = {}


def method(name: str):
    """Puts the function below it into METHODS. Raises ValueError where the name is taken."""

    def add(function: Callable) -> Callable:
        if name in METHODS:
            raise ValueError(f"there is a method '{name}' already, {METHODS[name].__name__}(); known: {', '.join(METHODS)}")
        METHODS[name] = function
        return function

    return add


def asks_for(name: str) -> list[str]:
    """The parameters of the method `name`."""
    return list(inspect.signature(METHODS[name]).parameters)


# ---------------------------------------------------------------------------------------------------------------------------
# W_c plus rank 1
# ---------------------------------------------------------------------------------------------------------------------------


def rank1_factors(u: torch.Tensor, amount: float, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B [m, 1], A [1, n]) in fp32 with B A = amount u v^T and, for u and v of one length, |B| = |A|. The sign is on B."""
    c = abs(amount) ** 0.5
    return (c if amount >= 0 else -c) * u.float()[:, None], c * v.float()[None]


def add_rank1(last: Adapter, triples: dict[str, tuple], alpha: float) -> Adapter:
    """W_c + alpha sigma u v^T (Eq. 10) as an adapter of rank r + 1. triples[module] = (u [m], sigma, v [n]).

    A negative alpha * sigma puts the sign on u. Modules without a triple get a zero column, so that the rank grows everywhere.
    """
    factors = {}
    for module, (b, a) in last.factors.items():
        u, sigma, v = triples.get(module, (torch.zeros(b.shape[0]), 0.0, torch.zeros(a.shape[1])))
        column, row = rank1_factors(u, alpha * float(sigma) / last.scale(module), v)
        factors[module] = (torch.cat([b, column], 1), torch.cat([a, row], 0))
    return extended(last, factors)


@method("next")
def next_(last: Adapter, trajectory: Trajectory, alpha: float, predicted: dict[str, tuple]) -> Adapter:
    """NExt (Eq. 10, Alg. 1): W_c + alpha * the predicted target's rank 1."""
    return add_rank1(last, predicted, alpha)


@method("repeat-last")
def repeat_last(last: Adapter, trajectory: Trajectory, alpha: float) -> Adapter:
    """Control: the predictor is replaced by the last target that is known, rank 1 of W_c - W_(c-k). Nothing is learned."""
    return add_rank1(last, {m: (r["target"].u[-1], r["target"].sigma[-1], r["target"].v[-1]) for m, r in trajectory.deltas.items()}, alpha)


@method("recent-locals")
def recent_locals(last: Adapter, trajectory: Trajectory, alpha: float) -> Adapter:
    """Control: like repeat-last, but only what moved in the last two checkpoints: rank 1 of k times the mean of the last two locals.

    Nothing is learned. It asks whether a predictor gains by learning, or by looking at newer deltas than the last target's.
    """
    return add_rank1(last, {m: recent_triple(r, trajectory.k) for m, r in trajectory.deltas.items()}, alpha)


def recent_triple(roles: dict[str, Triples], k: int) -> tuple:
    """(u [m], sigma, v [n]) of k times the mean of one matrix's last two local deltas."""
    newest = roles["local"]
    return rank1_of_sum(newest.u[-2:], newest.sigma[-2:], newest.v[-2:], torch.full((2,), k / 2))


@method("oracle")
def oracle(last: Adapter, trajectory: Trajectory, alpha: float, future: Adapter) -> Adapter:
    """Not a method but the ceiling for all of them: rank 1 of the true W_(c+k) - W_c, from a run that was really continued."""
    triples = {}
    for module, now in last.factors.items():
        u, sigma, v = svd_of_product(*(x.double() for x in delta_factors(future.factors[module], now, last.scale(module))))
        triples[module] = (u, sigma[0], v)
    return add_rank1(last, triples, alpha)


@method("none")
def none(last: Adapter) -> Adapter:
    """Control: no jump. What stage 5 does with it is a mere restart of the optimizer."""
    return last


# ---------------------------------------------------------------------------------------------------------------------------
# A straight line from the backbone through the last checkpoint
# ---------------------------------------------------------------------------------------------------------------------------


def scaled(last: Adapter, factor: float) -> Adapter:
    """W_0 + factor (W_c - W_0)."""
    return Adapter(last.config, {module: (b * factor, a) for module, (b, a) in last.factors.items()}, last.others)


@method("rl-extra")
def rl_extra(last: Adapter, trajectory: Trajectory, alpha: float) -> Adapter:
    """RL-Extra's weight extrapolation (Wang et al. 2026, arXiv 2601.04537): W_0 + a (W_c - W_0), the whole update, linearly.

    a = (c + alpha k) / c: the straight line from the backbone through checkpoint c, as many steps ahead as NExt moves at this alpha.
    Its authors go on from there with a new RL run, and jump again. (NExt's text calls this method Cai et al. 2025; the two citations are
    swapped there.)
    """
    c = len(trajectory.steps)
    return scaled(last, (c + alpha * trajectory.k) / c)


@method("expo")
def expo(last: Adapter, alpha: float) -> Adapter:
    """ExPO (Zheng et al. 2024, arXiv 2404.16792): W_c + alpha (W_c - W_0), which is RL-Extra's a = 1 + alpha.

    This alpha counts updates, not targets: its authors suggest 0.3 to 0.5 for models that are trained to the end.
    """
    return scaled(last, 1 + alpha)


# ---------------------------------------------------------------------------------------------------------------------------
# AlphaRL: W_0 plus rank 1
# ---------------------------------------------------------------------------------------------------------------------------


def line_at(y: torch.Tensor, at: float) -> torch.Tensor:
    """The least-squares line y_t = intercept + slope t through y [c, ...], t = 1 .. c, at t = `at`: [...] in float64."""
    t = torch.arange(1, len(y) + 1, dtype=torch.float64)
    slope = torch.tensordot(t - t.mean(), y.double(), 1) / (t - t.mean()).square().sum()
    return y.double().mean(0) + slope * (at - t.mean())


def replace_update(last: Adapter, trajectory: Trajectory, vectors: dict[str, torch.Tensor]) -> Adapter:
    """W_0 + a v^T as an adapter of rank 1 on the backbone: vectors[module] = a [m], v that of the last global delta."""
    factors = {}
    for module, a in vectors.items():
        length = torch.linalg.vector_norm(a)
        unit = a / length if length > 0 else a
        factors[module] = rank1_factors(unit, float(length) / last.scale(module), trajectory.deltas[module]["global"].v[-1])
    return extended(last, factors)


def global_vectors(trajectory: Trajectory, module: str) -> torch.Tensor:
    """AlphaRL's a_t = sigma_t u_t of the global deltas of one matrix: [c, m] in float64."""
    g = trajectory.deltas[module]["global"]
    return g.sigma.double()[:, None] * g.u.double()


@method("alpharl")
def alpharl(last: Adapter, trajectory: Trajectory, alpha: float) -> Adapter:
    """AlphaRL without measured accuracy: W_0 + a* v^T, a* from the least-squares line of sigma_t u_t on the checkpoint number t.

    After Cai et al. 2025 (arXiv 2510.00553), whose regression is `alpharl_pls`; a* is the line at t = c + alpha k, u and v are those of
    W_t - W_0, v of t = c. As in their work the rank 1 is all that is left of the update: the adapter has rank 1 and stands on the
    backbone, and training it on (stage 5) can do no more than such a one (--restart merged gives it a new LoRA). Signs are aligned
    by u and v together, theirs by sigma u. (NExt's text calls this method Wang et al. 2026; the two citations are swapped there.)
    """
    at = len(trajectory.steps) + alpha * trajectory.k
    return replace_update(last, trajectory, {module: line_at(global_vectors(trajectory, module), at) for module in trajectory.deltas})


@method("alpharl-pls")
def alpharl_pls(last: Adapter, trajectory: Trajectory, alpha: float, accuracies: torch.Tensor) -> Adapter:
    """AlphaRL (Cai et al. 2025, arXiv 2510.00553): W_0 + a* v^T, a* by one-component PLS from measured accuracy to sigma_t u_t.

    Their target accuracy is set by hand; here it is the least-squares line of accuracy on the checkpoint number t at t = c + alpha k,
    kept within 0 and 1. Their code adds a* v^T to a checkpoint, although a* is the total update: here it stands on the backbone. They fit
    on the first third of a training, we on all c checkpoints. For the adapter's rank see `alpharl`.
    """
    target = line_at(accuracies, len(trajectory.steps) + alpha * trajectory.k).clamp(0, 1)
    vectors = {module: pls_inverse(global_vectors(trajectory, module), accuracies, target) for module in trajectory.deltas}
    return replace_update(last, trajectory, vectors)


def pls_inverse(x: torch.Tensor, y: torch.Tensor, target: float | torch.Tensor) -> torch.Tensor:
    """The x that goes with y = `target` under a partial least squares regression of one component. x [c, m], y [c] -> [m] in float64.

    As scikit-learn's PLSRegression(1) has it, which AlphaRL's code uses: columns standardised, scores z = X w
    with w = X^T y / |X^T y|, then least squares y = slope z + mean(y); back: (target - mean(y)) / slope times the loadings X^T z / z^T z,
    standardisation undone. Columns that do not vary stay as they are, and so does everything if nothing varies with y.
    """
    x, rise, level = x.double(), y.double() - y.double().mean(), y.double().mean()
    mean, std = x.mean(0), x.std(0)
    standard = (x - mean) / torch.where(std > 0, std, 1.0)
    weights = standard.mT @ rise
    if not weights.any():
        return mean
    scores = standard @ (weights / torch.linalg.vector_norm(weights))
    slope, loadings = scores @ rise / (scores @ scores), standard.mT @ scores / (scores @ scores)
    return mean + std * loadings * (target - level) / slope


# ---------------------------------------------------------------------------------------------------------------------------
# Sums of checkpoints: RELEX, WSM, greedy soup
# ---------------------------------------------------------------------------------------------------------------------------


def weighted_sum(last: Adapter, series: Series, weights: dict[str, torch.Tensor]) -> Adapter:
    """W_0 + sum_t w_t (W_t - W_0) as one adapter; weights[module] = w [c].

    Factors are put side by side, B' = [w_1 B_1, w_2 B_2, ...], A' = [A_1; A_2; ...], so nothing is lost and the rank is r times the number
    of weights that are not 0. Where the matrix has fewer rows or columns than that, its SVD in float64 gives factors of its own rank.
    """
    factors = {}
    for module in last.factors:
        steps = [(step, float(w)) for step, w in zip(series.steps, weights[module], strict=True) if w] or [(series.steps[-1], 0.0)]
        used = [(w, *series.factors(module, step)) for step, w in steps]
        left, right = torch.cat([w * b for w, b, _ in used], 1), torch.cat([a for _, _, a in used], 0)
        if left.shape[1] > min(len(left), right.shape[1]):
            u, sigma, vh = torch.linalg.svd(left.double() @ right.double(), full_matrices=False)
            left, right = (u * sigma.sqrt()).float(), (sigma.sqrt()[:, None] * vh).float()
        factors[module] = (left, right)
    return extended(last, factors)


def mean_of(last: Adapter, series: Series, positions: list[int]) -> Adapter:
    """The mean of the checkpoints at these positions of the series, each counted once."""
    weights = torch.zeros(len(series.steps), dtype=torch.float64)
    weights[positions] = 1 / len(positions)
    return weighted_sum(last, series, dict.fromkeys(last.factors, weights))


def leading_over_time(series: Series) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The rank 1 over time of every matrix: module -> (d [c], y [c]) in float64, W_t - W_0 being close to y_t V, V = sum_t d_t (W_t - W_0).

    With M the matrix whose rows are vec(W_t - W_0), V [length 1] and y = M V are its leading right singular vector and scores. They come
    from the c x c matrix M M^T, and that from the factors alone: entry (s, t) is scale^2 tr((A_s A_t^T) (B_t^T B_s)). No W is formed;
    O((c r)^2 (m + n)) a matrix. A matrix that never moved has zeros.
    """
    found = {}
    for module in series.shapes:
        pairs = [series.factors(module, step) for step in series.steps]
        b, a = torch.cat([b for b, _ in pairs], 1).double(), torch.cat([a for _, a in pairs], 0).double()  # [m, c r], [c r, n]
        c, r = len(pairs), len(pairs[0][1])
        gram = series.scales[module] ** 2 * ((b.mT @ b) * (a @ a.mT)).view(c, r, c, r).sum((1, 3))
        values, vectors = torch.linalg.eigh(gram)
        length, w = values[-1].clamp_min(0).sqrt(), vectors[:, -1]
        found[module] = (w / length if length > 0 else torch.zeros_like(w), w * length)
    return found


@method("relex")
def relex(last: Adapter, trajectory: Trajectory, alpha: float, series: Series, over_time: dict) -> Adapter:
    """RELEX (Wei et al. 2026, arXiv 2605.21468): W_0 + y* V, V the one direction of each tensor over time, y* from a line through y_t.

    y_t V is the rank 1 part over time of the series W_t - W_0 (`leading_over_time`); V itself has all ranks. The line is the least-squares
    one with its intercept, at t = c + alpha k. Their series is every RL step, ours every checkpoint. All of W_c but y* V is dropped.
    """
    at = len(series.steps) + alpha * trajectory.k
    return weighted_sum(last, series, {module: d * line_at(y, at) for module, (d, y) in over_time.items()})


@method("wsm")
def wsm(last: Adapter, series: Series, wsm_checkpoints: int) -> Adapter:
    """WSM (Tian et al. 2025, arXiv 2507.17634): the last checkpoints merged, in place of a decay of the learning rate. Looks back.

    sum_j c_j W_(i+j), j = 0 .. n - 1, is where training would be if the update to checkpoint i + j had counted only w_j = c_j + c_(j+1)
    + .. of what it did; so any decay w gives weights c. The linear decay w_j = 1 - j / n gives c_j = 1 / n: the plain mean, which this is.
    """
    count = len(series.steps)
    return mean_of(last, series, list(range(count - wsm_checkpoints, count)))


@method("greedy-soup")
def greedy_soup(last: Adapter, series: Series, accuracies: torch.Tensor, measure: Callable[[Adapter], float]) -> Adapter:
    """Greedy soup (Wortsman et al. 2022, arXiv 2203.05482) of the checkpoints. Looks back.

    From the best checkpoint down, each is taken into the mean if the measured accuracy of the mean rises, as in the authors' code (their
    paper has "does not fall"). c - 1 candidates are measured, on validation problems.
    """
    first, *others = sorted(range(len(series.steps)), key=lambda i: -float(accuracies[i]))
    chosen, best = [first], float(accuracies[first])
    for i in others:
        accuracy = measure(mean_of(last, series, [*chosen, i]))
        if accuracy > best:
            chosen, best = [*chosen, i], accuracy
    return mean_of(last, series, chosen)


# ---------------------------------------------------------------------------------------------------------------------------
# Not an adapter
# ---------------------------------------------------------------------------------------------------------------------------


@method("dare")
def dare(delta: torch.Tensor, module: str, dare_drop: float) -> torch.Tensor:
    """DARE (Yu et al. 2024, arXiv 2311.03099): each entry of the update W_c - W_0 [m, n] is dropped or rescaled by 1 / (1 - p).

    p = `dare_drop`. What is left has all ranks, so it is written as a whole model. The mask depends on the module's name and on
    nothing else. It moves nowhere: the mean over masks is W_c. Theirs takes in every tensor, this those with an adapter.
    """
    seed = int(hashlib.sha256(module.encode()).hexdigest()[:15], 16)
    kept = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)) >= dare_drop
    return delta * kept / (1 - dare_drop)
