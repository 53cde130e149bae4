"""Every jump against a dense computation, and stages 2 to 4 on a LoRA through PEFT itself."""

import dataclasses
import importlib
import json
import pathlib
import shutil
import sys
import types

import numpy
import pytest
import safetensors.torch
import torch
from conftest import call_main, contents, edit_json, measured_as, rank_1
from peft import PeftModel
from torch.nn.functional import normalize

from common import demo, predictor
from common.baselines import given, methods
from common.files import adapters, deltas, merge, models, series, write
from common.files.adapters import read_info
from common.files.read import read_json
from common.rank1 import LowRank
from common.rl import policy

stage4 = importlib.import_module("04_extrapolate")
SCALE, K, ALPHA, M, N, RANK = 0.5, 2, 1.5, 24, 16, 3
ACCURACIES, CHOSEN, ACCURACY_THEN = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [6, 2, 4], 0.9


def random_factors(m, n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)


# --------------------------------------------------------------------------------------------------
# One matrix
# --------------------------------------------------------------------------------------------------


def lora_points(count=7):
    """(B, A) of `count` checkpoints in fp32. The last one is what comes K after the others."""
    return [random_factors(M, N, RANK, seed) for seed in range(count)]


def straight_points(count=7):
    """Checkpoints W_t = t D, D of rank 1; the last one is what comes K after the others."""
    b, a = random_factors(M, N, 1, 3)
    return [(t * b, a) for t in [*range(1, count), count - 1 + K]]


def make_matrix(points, kind, name="q_proj"):
    """(Matrix, dense float64 W[0] ... W[c] and the future, what a jump is relative to)."""
    moved = [SCALE * b.double() @ a.double() for b, a in points]
    if kind == "LoRA":
        zero = LowRank(torch.zeros(M, 0), torch.zeros(0, N))
        W = [zero, *(LowRank(b.double(), a.double(), SCALE) for b, a in points)]
        whole, last, base = [0 * moved[0], *moved], W[-2], 0
    else:
        backbone = random_factors(M, N, 20, 99)
        W = [(backbone[0] @ backbone[1] + x).float() for x in [0 * moved[0], *moved]]
        whole, last = [w.double() for w in W], LowRank(torch.zeros(M, 0), torch.zeros(0, N))
        base = whole[-2]
    ends = {
        "global": [(i, 0) for i in range(1, len(W) - 1)],
        "local": [(i, i - 1) for i in range(1, len(W) - 1)],
        "target": [(i, i - K) for i in range(K + 1, len(W) - 1)],
    }
    roles = {}
    for role, pairs in ends.items():  # by dense SVDs, without stage 2
        u, sigma, vh = torch.linalg.svd(torch.stack([whole[i] - whole[j] for i, j in pairs]))
        roles[role] = deltas.Triples(*(x.float() for x in (u[:, :, 0], sigma[:, 0], vh[:, 0])))
    roles = deltas.align_roles(roles)
    return methods.Matrix(name, W[:-1], last, roles, K), whole, base, W[-1]


def line(y):
    """The line through y [c, ...] at t = 1 .. c, at t = c + ALPHA K, by numpy."""
    flat = y.reshape(len(y), -1).numpy()
    slope, start = numpy.polyfit(numpy.arange(1, len(y) + 1), flat, 1)
    return torch.from_numpy(start + slope * (len(y) + ALPHA * K)).reshape(y.shape[1:])


def sigma_u(W):
    """sigma_t u_t of W_t - W_0 [c, m], signs consistent backwards from the last, and its v."""
    found = []
    for w in reversed(W[1:]):
        u, s, vh = torch.linalg.svd(w - W[0])
        u, v = u[:, 0], vh[0]
        if found and u @ found[-1][0] + v @ found[-1][2] < 0:
            u, v = -u, -v
        found.append((u, s[0], v))
    return torch.stack([s * u for u, s, _ in reversed(found)]), found[0][2]


def dense_alpharl(W, a_star):
    a, v = sigma_u(W)
    return W[0] + torch.outer(a_star(a), v)


def dense_relex(W):
    rows = torch.stack([(w - W[0]).flatten() for w in W[1:]])
    direction = torch.linalg.svd(rows, full_matrices=False)[2][0]
    return W[0] + (line(rows @ direction) * direction).reshape(W[0].shape)


def dense_decay(W):
    """WSM as its authors put it: each update counts by a linear decay."""
    return W[0] + sum((1 - j / 5) * (W[j] - W[j - 1]) for j in range(1, 5))


PLS = lambda a: methods.pls_inverse(a, torch.tensor(ACCURACIES), ACCURACY_THEN)  # noqa: E731
DENSE = {  # of W[0] ... W[c] and the future, all dense; c = 6, K = 2, alpha 1.5
    "repeat-last": lambda W, future: W[6] + 1.5 * rank_1(W[6] - W[4]),
    "recent-locals": lambda W, future: (
        W[6] + 1.5 * rank_1(rank_1(W[6] - W[5]) + rank_1(W[5] - W[4]))
    ),
    "oracle": lambda W, future: W[6] + 1.5 * rank_1(future - W[6]),
    "none": lambda W, future: W[6],
    "rl-extra": lambda W, future: W[0] + 9 / 6 * (W[6] - W[0]),
    "expo": lambda W, future: W[6] + 1.5 * (W[6] - W[0]),
    "first-update": lambda W, future: W[0] + 1.5 * (W[1] - W[0]),
    "alpharl": lambda W, future: dense_alpharl(W, line),
    "alpharl-pls": lambda W, future: dense_alpharl(W, PLS),
    "relex": lambda W, future: dense_relex(W),
    "wsm": lambda W, future: dense_decay(W[2:]),
    "greedy-soup": lambda W, future: (W[6] + W[2] + W[4]) / 3,
}


def run_method(name, m, base, future):
    """The new matrix of a method, dense."""
    accuracies = torch.tensor(ACCURACIES, dtype=torch.float64)
    known = {"oracle": lambda module: future, "alpharl-pls": accuracies, "greedy-soup": CHOSEN}
    known["weighted"] = torch.tensor(methods.PRIOR, dtype=torch.float64)
    found = methods.METHODS[name].jump(dataclasses.replace(m, given=known.get(name)), ALPHA)
    return base + found.dense() if isinstance(found, LowRank) else found


@pytest.mark.parametrize("kind", ["LoRA", "whole"])
@pytest.mark.parametrize("name", DENSE)
def test_a_method_equals_its_dense_formula(name, kind):
    m, whole, base, future = make_matrix(lora_points(), kind)
    found = run_method(name, m, base, future)
    wanted = DENSE[name](whole[:-1], whole[-1])
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - whole[-2]).norm() > 0.1 or name == "none"


def test_every_method_is_tested_against_a_dense_formula():
    assert methods.METHODS.keys() - DENSE.keys() == {"weighted", "dare"}  # below, test_predictor.py


ALPHA_IS_SOMETHING_ELSE = {"none", "expo", "first-update", "wsm", "greedy-soup"}


@pytest.mark.parametrize("kind", ["LoRA", "whole"])
@pytest.mark.parametrize("name", sorted(DENSE.keys() - ALPHA_IS_SOMETHING_ELSE | {"weighted"}))
def test_alpha_is_one_distance_and_a_straight_run_is_gone_on_with_exactly(name, kind):
    m, whole, base, future = make_matrix(straight_points(), kind)
    found = run_method(name, m, base, future).double()
    wanted = whole[0] + (6 + ALPHA * K) / 6 * (whole[6] - whole[0])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.37, -0.2])
@pytest.mark.parametrize("alpha", [0.5, 1.5, -1.0, 0.0])
def test_next_adds_alpha_times_the_prediction_and_nothing_else(alpha, sigma):
    """Also where the predicted sigma is negative."""
    m, whole, _, _ = make_matrix(lora_points(), "LoRA")
    u, v = (normalize(torch.arange(1.0, size + 1), dim=0) for size in (M, N))
    m.given = {"q_proj": {"u": u, "sigma": torch.tensor(sigma), "v": v}}
    b, a = stage4.jump(m, alpha).factors(SCALE)
    assert b.shape[1] == RANK + 1
    wanted = whole[-2] + alpha * sigma * torch.outer(u, v).double()
    torch.testing.assert_close(SCALE * b.double() @ a.double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["relex", "alpharl", "rl-extra", "recent-locals", "weighted"])
def test_a_matrix_that_never_moved_stays_where_it_is(name):
    points = [(0 * b, a) for b, a in lora_points()]
    m, *_ = make_matrix(points, "LoRA")
    for t in m.deltas.values():  # as stage 2 has it: no direction
        t.u.zero_(), t.v.zero_()
    assert not run_method(name, m, 0, None).any()


def test_pls_gives_what_scikit_learn_gives():
    x = torch.tensor([[1.0, 2, 0.5], [2, 1, 0.7], [3, 5, 0.2], [5, 4, 0.9]])
    found = methods.pls_inverse(x, torch.tensor([0.1, 0.2, 0.4, 0.5]), 0.7)
    # PLSRegression(1) and LinearRegression of scikit-learn 1.9.1: inverse_transform of the score
    # that goes with 0.7
    wanted = torch.tensor([6.39071056, 6.37598504, 0.70362295], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=0)


def test_pls_leaves_alone_what_does_not_vary():
    x, y = torch.tensor([[1.0, 7], [2, 7], [4, 7]]), torch.tensor([0.1, 0.2, 0.4])
    assert methods.pls_inverse(x, y, 0.5).tolist() == pytest.approx([5, 7])
    assert methods.pls_inverse(x, 0 * y + 0.2, 0.5).tolist() == pytest.approx([7 / 3, 7])


def test_alpharl_pls_aims_at_no_accuracy_above_1():
    m, whole, _, _ = make_matrix(lora_points(), "LoRA")
    m.given = torch.tensor([0.4, 0.5, 0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    a, v = sigma_u(whole[:-1])
    wanted = torch.outer(methods.pls_inverse(a, m.given, 1.0), v)
    torch.testing.assert_close(methods.alpharl(m, ALPHA).dense(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["LoRA", "whole"])
def test_dare_drops_entries_and_scales_the_others_up(kind):
    m, whole, _, _ = make_matrix(lora_points(), kind)
    left, delta = methods.dare(m, ALPHA).double() - whole[0], whole[-2] - whole[0]
    kept = left.abs() > 1e-4
    torch.testing.assert_close(left[kept], 10 * delta[kept], atol=1e-3, rtol=1e-3)
    assert 10 < kept.sum() < 80  # of 384, each by chance 0.1
    assert torch.equal(methods.dare(m, ALPHA), methods.dare(m, 0.0))
    other = dataclasses.replace(m, name="k_proj")
    assert not torch.equal(methods.dare(m, ALPHA), methods.dare(other, ALPHA))


def test_the_greedy_soup_takes_from_the_best_down_what_raises_the_accuracy(monkeypatch):
    accuracies = [0.2, 0.6, 0.1, 0.5, 0.4, 0.3]  # best first: checkpoints 2 4 5 6 1 3
    rows = {f"step{i}": [{"accuracy": x, "settings": {}}] for i, x in enumerate(accuracies)}
    asked, answers = [], iter([0.7, 0.65, 0.7, 0.8, 0.1])  # a tie is not taken

    def measure(known, members, name, settings):
        asked.append((name[-2:], members))
        return next(answers)

    monkeypatch.setattr(given, "measure_mean", measure)
    assert given.choose(None, rows) == [2, 4, 1]
    tried = [[2, 4], [2, 4, 5], [2, 4, 6], [2, 4, 1], [2, 4, 1, 3]]
    assert asked == [(f"{i:02d}", members) for i, members in enumerate(tried, 1)]


# --------------------------------------------------------------------------------------------------
# Stages 2 to 4
# --------------------------------------------------------------------------------------------------

STEPS = range(10, 90, 10)
IDS = torch.tensor([[2, 7, 8, 9, 3, 5]])
MODULES = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.1.mlp.down_proj": (64, 192),
    "model.layers.1.self_attn.k_proj": (32, 64),
}
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 6, "lora_alpha": 3, "bias": "none"}


@pytest.fixture(scope="module")
def made(backbone_dir, tmp_path_factory):
    """Eight LoRA checkpoints on the demo backbone, their deltas, a network of 3 epochs, and 4
    validation problems. Read only."""
    run = tmp_path_factory.mktemp("methods") / "run"
    shapes = list(MODULES.items())
    drift = {m: random_factors(*size, 6, j) for j, (m, size) in enumerate(shapes)}
    for i, step in enumerate(STEPS):
        factors = {}
        for j, (module, size) in enumerate(shapes):
            noise = random_factors(*size, 6, 10 * i + j + 5)
            b = 0.002 * ((i + 1) * drift[module][0] + noise[0])
            factors[module] = (b, drift[module][1] + 0.1 * noise[1])
        adapter = adapters.Adapter({**CONFIG, "target_modules": [*MODULES]}, factors)
        info = {"step": step, "backbone": str(backbone_dir)}
        adapters.write_adapter(run / "train" / f"step_{step:04d}", adapter, info)
    (run / "data").mkdir()
    lines = [json.dumps({"prompt": f"12{i}+345", "answer": str(465 + i)}) + "\n" for i in range(4)]
    (run / "data" / "valid.jsonl").write_text("".join(lines))
    call_main("02", "--run-dir", str(run), "--k", "2", "--fit-checkpoints", "4")
    with pytest.MonkeyPatch.context() as patch:
        fewer_epochs(patch)
        call_main("03", "--run-dir", str(run))
    return run


def fewer_epochs(patch):
    for name, recipe in predictor.RECIPES.items():
        patch.setitem(predictor.RECIPES, name, dataclasses.replace(recipe, epochs=3))


@pytest.fixture
def run(made, tmp_path):
    return pathlib.Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def stage(run, monkeypatch, typed):
    """A function that runs a stage on `run` in this process: its exit code and last words."""
    fewer_epochs(monkeypatch)
    return lambda number, *flags: typed(number, run, *flags)


def dense(folder):
    """module -> s B A of the adapter in `folder`, in float64."""
    adapter = adapters.read_adapter(folder)
    return {m: adapter.scale(m) * b.double() @ a.double() for m, (b, a) in adapter.factors.items()}


def checkpoint(run, step):
    return dense(run / "train" / f"step_{step:04d}")


def test_stage_2_writes_the_dense_svds_a_file_a_matrix(run):
    trajectory = deltas.load_trajectory(run / "deltas")
    names = {f"{module}.safetensors" for module in MODULES}
    others = {"index.json", "spectrum.json", "config.json", "done.json"}
    assert {path.name for path in (run / "deltas").iterdir()} == names | others
    files = {m: run / "deltas" / f"{m}.safetensors" for m in MODULES}
    spectra = {m: safetensors.torch.load_file(path)["spectrum"] for m, path in files.items()}
    points = [checkpoint(run, step) for step in STEPS]
    for module, roles in trajectory.deltas.items():
        W = [0 * points[0][module], *(point[module] for point in points)]
        for role, back in (("global", None), ("local", 1), ("target", 2)):
            ends = range(3 if role == "target" else 1, 9)
            wanted = [W[i] - (W[i - back] if back else W[0]) for i in ends]
            assert len(roles[role]) == len(wanted)
            for i, matrix in enumerate(wanted):
                found = roles[role][i].dense().double()
                torch.testing.assert_close(found, rank_1(matrix), atol=1e-6, rtol=1e-4)
        sigma = torch.linalg.svdvals(torch.stack(W[1:]))[:, :6].float()
        torch.testing.assert_close(spectra[module], sigma, atol=1e-6, rtol=1e-4)


NAMES = {
    "aligned-no-global": ["--inputs", "local"],
    "paper-no-local": ["--recipes", "paper", "--inputs", "global"],
    "aligned-last6": ["--checkpoints", "6"],
    "mine": ["--name", "mine", "--seed", "3"],
}


@pytest.mark.parametrize("name", NAMES)
def test_what_stage_3_writes_is_the_prediction_of_the_network_it_saved(run, stage, name):
    assert stage("03", *NAMES[name])[0] == 0
    folder, trajectory = run / "predictor" / name, deltas.load_trajectory(run / "deltas")
    seen = {"aligned-no-global": ("local",), "paper-no-local": ("global",)}
    recipe = predictor.RECIPES["paper" if name.startswith("paper") else "aligned"]
    recipe = dataclasses.replace(recipe, inputs=seen.get(name, ("global", "local")))
    trajectory = trajectory.last(6) if name.endswith("last6") else trajectory
    families = predictor.stack_families(*predictor.prepare(trajectory, recipe))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    networks = {}
    for family, data in families.items():
        networks[family] = predictor.TrajectoryPredictor(data[2].shape[-1], recipe.inputs)
        own = {
            k.removeprefix(f"{family}."): w
            for k, w in weights.items()
            if k.startswith(f"{family}.")
        }
        networks[family].load_state_dict(own)
    wanted = predictor.predict(networks, trajectory, recipe)
    found = deltas.load_predicted(deltas.check_predicted(run, name))
    assert found.keys() == wanted.keys() == MODULES.keys()
    for module, triple in wanted.items():
        assert all(torch.equal(x, found[module][side]) for side, x in triple.items())
    report = read_json(folder / "report.json", "03")
    assert (report["backtest"]["at_step"], report["backtest"]["predicts_step"]) == (60, 80)
    rows = {"predictor", "copy-global", "repeat-last", "recent-locals", "linear-fit", "weighted"}
    assert {k for k, v in report["backtest"].items() if isinstance(v, dict)} == rows | {"oracle"}
    assert report["losses"].keys() == report["loss_of_zeros"].keys() == families.keys()


def measured(run, accuracies, **changes):
    """What stage 6 would have written of every checkpoint's accuracy."""
    for step, accuracy in zip(STEPS, accuracies, strict=True):
        last = changes if step == 80 else {}
        measured_as(run, f"train/step_{step:04d}", accuracy, **last)


def logits(backbone_dir, updates):
    model, _ = policy.load_backbone(str(backbone_dir))
    for module, update in updates.items():
        model.get_submodule(module).weight.data += update.float()
    return model(input_ids=IDS).logits


def test_peft_computes_with_what_stage_4_writes(run, stage, backbone_dir):
    measured(run, [0.1, 0.2, 0.25, 0.3, 0.4, 0.45, 0.5, 0.6])
    names = ["next", "relex", "wsm", "alpharl", "alpharl-pls", "weighted"]
    assert stage("04", "--methods", *names) == (0, "")
    found = {}
    for name in names:
        label = {"next": "next-aligned_alpha1.5", "wsm": "wsm"}.get(name, f"{name}_alpha1.5")
        folder = run / "extrapolated" / label
        backbone = policy.load_backbone(str(backbone_dir))[0]
        found[name] = dense(folder)
        got = PeftModel.from_pretrained(backbone, folder)(input_ids=IDS).logits
        wanted = logits(backbone_dir, found[name])
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)
        assert (wanted - logits(backbone_dir, {})).abs().max() > 0.02
        info = read_json(folder / "checkpoint.json", "04")
        assert (info["step"], info["backbone"]) == (80, str(backbone_dir))
        read = {"next": "predictor/aligned/predicted.safetensors"}
        read["alpharl-pls"] = "validation/train__step_0010/valid.json"
        assert [path for path in read.values() if path in info["inputs"]] == [
            path for method, path in read.items() if method == name
        ]
    predicted = deltas.load_predicted(deltas.check_predicted(run, "aligned"))
    last = checkpoint(run, 80)
    for module, triple in predicted.items():
        step = 1.5 * triple["sigma"] * torch.outer(triple["u"], triple["v"])
        torch.testing.assert_close(found["next"][module], last[module] + step, atol=1e-6, rtol=0)
    shapes = adapters.read_header(run / "extrapolated" / "relex_alpha1.5").shapes
    assert [shapes[module][1] for module in MODULES] == [48, 48, 32]  # 8 of rank 6, or all there is


@pytest.mark.parametrize("bound", [1.0, 0.0])
def test_what_has_more_ranks_than_vllm_takes_is_cut_or_merged(run, stage, monkeypatch, bound):
    flags = ("04", "--methods", "relex")
    assert stage(*flags) == (0, "")
    folder = run / "extrapolated" / "relex_alpha1.5"
    whole, bounds = dense(folder), (40, 32)
    monkeypatch.setattr(adapters, "VLLM_RANKS", (8, 40))
    monkeypatch.setattr(merge, "MAX_LOST", bound)
    code, said = stage(*flags, "--overwrite")
    assert code == 0
    share = float(said.split("loses ")[1].split(" ")[0])
    if bound:
        assert said.startswith("note: relex_alpha1.5: at rank 40, vLLM's highest, it loses ")
        ranks = {shape[1] for shape in adapters.read_header(folder).shapes.values()}
        assert ranks == {*bounds}
        lost = max((whole[m] - dense(folder)[m]).norm() / whole[m].norm() for m in MODULES)
        assert share == pytest.approx(float(lost), rel=0.1)
        noted = read_json(folder / "checkpoint.json", "04")["norm_lost"]
        assert noted == pytest.approx(float(lost), rel=1e-3)
        return
    assert said.endswith("a whole model is written instead")
    model = models.open_model(run / "merged" / "relex_alpha1.5")
    backbone = models.open_model(models.find_model(read_info(model.path)["backbone"]))
    for module in MODULES:
        moved = model.tensor(f"{module}.weight") - backbone.tensor(f"{module}.weight")
        torch.testing.assert_close(moved, whole[module].float(), atol=1e-5, rtol=0)


def test_a_jump_is_made_once_and_again_when_what_it_is_made_from_changes(run, stage, monkeypatch):
    measured(run, [0.1, 0.2, 0.25, 0.3, 0.4, 0.45, 0.5, 0.6])
    flags = ["--methods", "alpharl-pls", "dare", "none", "--alphas", "0.5", "2"]
    assert stage("04", *flags) == (0, "")
    made = {path.name for path in (run / "extrapolated").glob("[!.]*")}
    assert made == {"alpharl-pls_alpha0.5", "alpharl-pls_alpha2", "none"}
    assert {path.name for path in (run / "merged").glob("[!.]*")} == {"dare"}
    before = {name: contents(run / "extrapolated" / name) for name in made}
    with monkeypatch.context() as patch:
        patch.setattr(stage4, "make", None)  # nothing is made
        assert stage("04", *flags) == (0, "")
    measured(run, [0.1, 0.2, 0.25, 0.3, 0.4, 0.45, 0.5, 0.5])
    assert stage("04", *flags) == (0, "")
    after = {name: contents(run / "extrapolated" / name) for name in made}
    assert {name for name in made if before[name] != after[name]} == made - {"none"}


def test_a_method_is_added_with_one_function_and_one_line(run, stage, monkeypatch):
    def halfway(m, alpha):
        return (m.W[1] + m.W[-1]) / 2

    monkeypatch.setitem(methods.METHODS, "halfway", methods.Method(halfway, has_alpha=False))
    assert stage("04", "--methods", "halfway") == (0, "")
    first, last = checkpoint(run, 10), checkpoint(run, 80)
    for module, update in dense(run / "extrapolated" / "halfway").items():
        wanted = (first[module] + last[module]) / 2
        torch.testing.assert_close(update, wanted, atol=1e-6, rtol=1e-4)


def test_the_oracle_reads_the_checkpoint_k_after_the_last(run, stage):
    flags = ["--k", "2", "--fit-checkpoints", "4", "--last-step", "60", "--overwrite"]
    assert stage("02", *flags) == (0, "")
    assert stage("04", "--methods", "oracle", "--alphas", "2") == (0, "")
    now, future = checkpoint(run, 60), checkpoint(run, 80)
    for module, update in dense(run / "extrapolated" / "oracle_alpha2").items():
        wanted = now[module] + 2 * rank_1(future[module] - now[module])
        torch.testing.assert_close(update, wanted, atol=1e-5, rtol=1e-4)


def test_stage_6_measures_the_mean_of_checkpoints(run, stage):
    flags = ["--max-prompt-tokens", "16", "--max-new-tokens", "8", "--runs", "1", "--engine", "hf"]
    flags += ["--prompt-template", "{prompt}", "--system-prompt", "", "--output", "validation"]
    flags += ["--test-data", "{run_dir}/data/valid.jsonl", "--backbone", str(demo.SHIPPED)]
    assert stage("06", "--policies", "train/step_*", *flags)[0] == 0
    folders = {path.name for path in run.iterdir() if path.name[0] != "."}
    assert folders == {"data", "deltas", "predictor", "train", "validation"}  # no eval/, no report
    cfg = stage4.ExtrapolateConfig(run_dir=str(run), threads=1)
    trajectory = deltas.load_trajectory(run / "deltas")
    known = given.Known(cfg, run, series.reopen(run), trajectory)
    settings = given.measured(known)[0]["train/step_0080"][0]["settings"]
    kept, write_adapter = [], adapters.write_adapter

    def typed(command, env):
        """The command in this process."""
        assert command[:2] == [sys.executable, "06_eval.py"]
        call_main("06", *command[2:])
        write.release()
        return types.SimpleNamespace(returncode=0)

    with pytest.MonkeyPatch.context() as patch:
        keep = lambda folder, *rest: kept.append(rest[0]) or write_adapter(folder, *rest)  # noqa: E731
        patch.setattr(adapters, "write_adapter", keep)
        patch.setattr(given.subprocess, "run", typed)
        accuracy = given.measure_mean(known, [8, 5], "validation/candidate_01", settings)
    found = read_json(run / "validation" / "validation__candidate_01" / "valid.json", "06")
    assert (found["policy"], found["n"], found["settings"]) == (
        "validation/candidate_01",
        4,
        settings,
    )
    assert found["accuracy"] == accuracy
    assert not (run / "validation" / "candidate_01").exists()
    points = checkpoint(run, 80), checkpoint(run, 50)
    for module, matrix in ((m, kept[0].update(m).dense()) for m in MODULES):
        wanted = (points[0][module] + points[1][module]) / 2
        torch.testing.assert_close(matrix, wanted, atol=1e-6, rtol=1e-4)


def lose_one(run):
    (run / "validation" / "train__step_0030" / "valid.json").unlink()


def measure_one_otherwise(run):
    measured(run, [0.1] * 8, settings={})


COMMAND = "--policies 'train/*' --test-data '{run_dir}/data/valid.jsonl' --output validation"


def measure_two_suites(run):
    for path in run.glob("validation/*/valid.json"):
        shutil.copy(path, path.with_name("gpqa-diamond.json"))


BAD = {
    "measured on two suites": (
        measure_two_suites,
        ["alpharl-pls"],
        "gpqa and maths have no common mean",
    ),
    "one of them missing": (lose_one, ["greedy-soup"], COMMAND),
    "measured in two ways": (
        measure_one_otherwise,
        ["alpharl-pls"],
        "step_0080 was measured otherwise",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_method_lacks_is_said_in_one_line(run, stage, name):
    spoil, flags, message = BAD[name]
    measured(run, [0.1] * 8)
    spoil(run)
    code, line = stage("04", "--methods", *flags)
    assert (code, line[:7]) == (2, "error: ")
    assert message in line
    assert not (run / "extrapolated").exists()


@pytest.mark.parametrize("output", ["../elsewhere", "train"])
def test_results_go_to_a_folder_of_their_own_below_the_run_directory(stage, output):
    code, line = stage("06", "--policies", "train/step_0080", "--output", output)
    assert code == 2
    assert line.startswith("error: --output")


# --------------------------------------------------------------------------------------------------
# Alpha by measured accuracy
# --------------------------------------------------------------------------------------------------

THREE = ("--methods", "repeat-last", "none", "--alphas", "0.5", "1.5", "3")


def judge(run, **accuracy: float) -> None:
    """What stage 6 would have measured of the jumps by repeat-last, and of none."""
    for name, value in accuracy.items():
        folder = name if name == "none" else f"repeat-last_alpha{name[1:].replace('_', '.')}"
        measured_as(run, f"extrapolated/{folder}", value)


def test_accept_takes_the_alpha_that_is_best_on_validation_problems(run, stage):
    assert stage("04", *THREE)[0] == 0
    judge(run, none=0.2, a0_5=0.3, a1_5=0.5, a3=0.4)
    assert stage("04", *THREE, "--accept", "true")[0] == 0
    folder, best = (run / "extrapolated" / f"repeat-last_{x}" for x in ("accepted", "alpha1.5"))
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in (folder, best)]
    assert weights[0] == weights[1]
    assert read_json(folder / "checkpoint.json", "04")["alpha"] == 1.5
    assert not (run / "extrapolated" / "none_accepted").exists()


def test_accept_does_not_jump_where_no_jump_gains(run, stage):
    assert stage("04", *THREE)[0] == 0
    judge(run, none=0.5, a0_5=0.3, a1_5=0.5, a3=0.4)  # as good is no gain
    assert stage("04", *THREE, "--accept", "true")[0] == 0
    found = adapters.read_adapter(run / "extrapolated" / "repeat-last_accepted")
    last = adapters.read_adapter(run / "extrapolated" / "none")
    for module in MODULES:
        torch.testing.assert_close(found.update(module).dense(), last.update(module).dense())


def test_accept_names_the_jump_that_was_not_measured_and_the_command(run, stage):
    assert stage("04", *THREE)[0] == 0
    judge(run, none=0.5, a0_5=0.3, a1_5=0.5)
    code, line = stage("04", *THREE, "--accept", "true")
    assert code == 2
    assert "extrapolated/repeat-last_alpha3 has no measured accuracy" in line
    assert "06_eval.py" in line
    assert "--policies 'extrapolated/*'" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [({"weights": "0"}, "has changed, measure it"), ({"data": "other"}, "was measured otherwise")],
)
def test_accept_compares_what_was_measured_alike_and_of_these_weights(run, stage, change, message):
    assert stage("04", *THREE)[0] == 0
    judge(run, none=0.2, a0_5=0.3, a1_5=0.5, a3=0.4)
    edit_json(run / "validation" / "extrapolated__repeat-last_alpha3" / "valid.json", **change)
    code, line = stage("04", *THREE, "--accept", "true")
    assert (code, f"repeat-last_alpha3 {message}" in line) == (2, True)


def test_a_method_whose_alpha_0_is_a_jump_is_accepted_as_none(run, stage):
    method = "relex"
    flags = ("04", "--methods", method, "none")
    assert stage(*flags)[0] == 0
    judge(run, none=0.5)
    measured_as(run, f"extrapolated/{method}_alpha1.5", 0.4)
    assert stage(*flags, "--accept", "true")[0] == 0
    made = [dense(run / "extrapolated" / name) for name in (f"{method}_accepted", "none")]
    for module in MODULES:
        torch.testing.assert_close(made[0][module], made[1][module])
    assert (
        read_json(run / "extrapolated" / f"{method}_accepted" / "checkpoint.json", "04")["alpha"]
        is None
    )


def test_a_jump_that_is_a_whole_model_can_be_accepted(run, stage, monkeypatch):
    monkeypatch.setattr(adapters, "VLLM_RANKS", (8, 40))
    monkeypatch.setattr(merge, "MAX_LOST", 0.0)
    flags = ("04", "--methods", "relex", "none")
    assert stage(*flags)[0] == 0
    judge(run, none=0.5)
    measured_as(run, "merged/relex_alpha1.5", 0.6)
    assert stage(*flags, "--accept", "true")[0] == 0
    accepted, jump = (run / "merged" / f"relex_{x}" for x in ("accepted", "alpha1.5"))
    assert models.weights_hash(accepted) == models.weights_hash(jump)


def test_a_model_that_was_merged_from_an_older_jump_is_gone_with_it(run, stage):
    flags = ("04", "--methods", "repeat-last")
    assert stage(*flags, "--merge", "true")[0] == 0
    assert models.is_model(run / "merged" / "repeat-last_alpha1.5")
    assert stage(*flags, "--overwrite")[0] == 0
    assert not (run / "merged" / "repeat-last_alpha1.5").exists()
