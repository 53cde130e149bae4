"""Every jump against a direct dense computation, and through PEFT itself."""

import importlib
import itertools
import json
import pathlib
import shutil

import numpy
import pytest
import torch
from conftest import call_on
from peft import PeftModel

from common import demo, rank1
from common.baselines import methods as extrapolators
from common.files import adapters, merge
from common.files import models as model_files
from common.files import read as inputs
from common.files import series as adapter_series
from common.files import write as run_dir
from common.rl import policy

SCALE = 0.5
SHAPES = {"a": (24, 16), "b": (16, 40), "c": (40, 30)}
IDS = torch.tensor([[2, 7, 8, 9, 3, 5]])


def make_adapter(seed, shapes=None, r=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or SHAPES
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
    assert extrapolators.none(SERIES[-1]) is SERIES[-1]


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


# ---------------------------------------------------------------------------------------------------------------------------
# Lines, and sums of checkpoints
# ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """SERIES on the disk, as the methods that need every checkpoint read it."""
    return save_series(SERIES, tmp_path_factory.mktemp("series"))


def save_series(points, folder):
    paths = {10 * i: folder / f"step_{10 * i:04d}" for i in range(1, len(points) + 1)}
    for path, point in zip(paths.values(), points, strict=True):
        adapters.write_adapter(path, point, {})
    return adapter_series.open_series(paths)


def straight_line(c=5):
    """Checkpoints W_t = W_0 + t D with D of rank 1 in every matrix, and D."""
    generator = torch.Generator().manual_seed(3)
    first = {name: (torch.randn(m, 1, generator=generator), torch.randn(1, n, generator=generator)) for name, (m, n) in SHAPES.items()}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": SCALE}
    points = [adapters.Adapter(config, {name: (t * b, a) for name, (b, a) in first.items()}) for t in range(1, c + 1)]
    return points, {name: SCALE * b.double() @ a.double() for name, (b, a) in first.items()}


@pytest.mark.parametrize("name", ["rl-extra", "alpharl", "alpharl-pls", "relex"])
def test_alpha_is_one_distance_and_a_straight_trajectory_is_gone_on_with_exactly(tmp_path, name):
    points, step = straight_line()
    known = {"last": points[-1], "trajectory": make_trajectory(points, 2).aligned(), "alpha": 1.5, "series": save_series(points, tmp_path)}
    known |= {"over_time": extrapolators.leading_over_time(known["series"]), "accuracies": torch.linspace(0.1, 0.5, 5)}
    jumped = extrapolators.METHODS[name](**{key: known[key] for key in extrapolators.asks_for(name)})
    for module, moved in step.items():
        torch.testing.assert_close(dense(jumped)[module], (5 + 1.5 * 2) * moved, atol=1e-5, rtol=1e-5)


def test_expo_adds_its_own_alpha_of_the_whole_update():
    jumped = extrapolators.expo(SERIES[-1], 0.3)
    for name in SHAPES:
        torch.testing.assert_close(dense(jumped)[name], 1.3 * dense(SERIES[-1])[name], atol=1e-5, rtol=1e-5)


def dense_vectors(name):
    """sigma_t u_t of the dense global deltas of SERIES, signs made consistent backwards from the last, and its v."""
    found = []
    for point in reversed(SERIES):
        u, s, vh = torch.linalg.svd(dense(point)[name])
        u, v = u[:, 0], vh[0]
        if found and u @ found[-1][0] + v @ found[-1][2] < 0:
            u, v = -u, -v
        found.append((u, s[0], v))
    return torch.stack([s * u for u, s, _ in reversed(found)]), found[0][2]


def test_alpharl_puts_the_line_through_sigma_u_on_the_backbone():
    jumped = extrapolators.alpharl(SERIES[-1], make_trajectory(SERIES, k=2).aligned(), 1.5)
    for name in SHAPES:
        a, v = dense_vectors(name)
        slope, intercept = torch.from_numpy(numpy.polyfit(numpy.arange(1, 7), a.numpy(), 1))
        torch.testing.assert_close(dense(jumped)[name], torch.outer(intercept + slope * 9, v), atol=1e-4, rtol=1e-4)
        b, a = jumped.factors[name]
        assert b.shape[1] == a.shape[0] == 1
        assert b.norm().item() == pytest.approx(a.norm().item(), rel=1e-5)
    assert jumped.config["r"] == 1
    assert jumped.scale("a") == pytest.approx(SCALE)


def test_pls_gives_what_scikit_learn_gives():
    x = torch.tensor([[1.0, 2, 0.5], [2, 1, 0.7], [3, 5, 0.2], [5, 4, 0.9]])
    found = extrapolators.pls_inverse(x, torch.tensor([0.1, 0.2, 0.4, 0.5]), 0.7)
    # PLSRegression(1) and LinearRegression of scikit-learn 1.9.1: inverse_transform of the score that goes with 0.7
    torch.testing.assert_close(found, torch.tensor([6.39071056, 6.37598504, 0.70362295], dtype=torch.float64), atol=1e-7, rtol=0)


def test_pls_is_the_direction_of_largest_covariance():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 12, generator=generator, dtype=torch.float64), torch.rand(8, generator=generator, dtype=torch.float64)
    standard = (x - x.mean(0)) / x.std(0)
    w = torch.linalg.svd((standard.T @ (y - y.mean()))[:, None])[0][:, 0]
    z = standard @ w
    slope, intercept = numpy.polyfit(z, y, 1)
    loadings = torch.linalg.lstsq(z[:, None], standard).solution[0]
    want = (0.9 - intercept) / slope * loadings * x.std(0) + x.mean(0)
    torch.testing.assert_close(extrapolators.pls_inverse(x, y, 0.9), want)


def test_pls_leaves_alone_what_does_not_vary():
    x = torch.tensor([[1.0, 7], [2, 7], [4, 7]])
    assert extrapolators.pls_inverse(x, torch.tensor([0.1, 0.2, 0.4]), 0.5).tolist() == pytest.approx([5, 7])
    assert extrapolators.pls_inverse(x, torch.tensor([0.2, 0.2, 0.2]), 0.5).tolist() == pytest.approx([7 / 3, 7])


@pytest.mark.parametrize(("accuracies", "target"), [([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 0.9), ([0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 1.0)])
def test_alpharl_pls_aims_at_the_line_through_the_accuracies_capped_at_1(accuracies, target):
    accuracies = torch.tensor(accuracies, dtype=torch.float64)
    jumped = extrapolators.alpharl_pls(SERIES[-1], make_trajectory(SERIES, k=2).aligned(), 1.5, accuracies)
    for name in SHAPES:
        a, v = dense_vectors(name)
        want = torch.outer(extrapolators.pls_inverse(a, accuracies, target), v)
        torch.testing.assert_close(dense(jumped)[name], want, atol=1e-4, rtol=1e-4)


def test_relex_is_the_svd_over_time_of_the_dense_updates_and_a_line_through_its_scores(series):
    known = extrapolators.leading_over_time(series)
    jumped = extrapolators.relex(SERIES[-1], make_trajectory(SERIES, k=2), 1.5, series, known)
    ranks = {name: b.shape[1] for name, (b, _) in jumped.factors.items()}
    assert ranks == {"a": 16, "b": 16, "c": 24}  # 6 checkpoints of rank 4, or what the matrix has
    for name in SHAPES:
        rows = torch.stack([dense(point)[name].flatten() for point in SERIES])
        direction = torch.linalg.svd(rows, full_matrices=False)[2][0]
        slope, intercept = numpy.polyfit(numpy.arange(6), (rows @ direction).numpy(), 1)
        torch.testing.assert_close(known[name][1].abs(), (rows @ direction).abs(), atol=1e-5, rtol=1e-5)
        want = (intercept + slope * (5 + 1.5 * 2)) * direction
        torch.testing.assert_close(dense(jumped)[name].flatten(), want, atol=2e-5, rtol=1e-4)
        assert jumped.scale(name) == pytest.approx(SCALE)


def test_a_matrix_that_never_moved_stays_where_it_is(tmp_path):
    still = [adapters.Adapter(p.config, p.factors | {"a": (torch.zeros(24, 4), p.factors["a"][1])}) for p in SERIES]
    series = save_series(still, tmp_path)
    trajectory = make_trajectory(still, k=2)
    for module in ("u", "v"):
        getattr(trajectory.deltas["a"]["global"], module).zero_()  # as stage 2 has it: no direction
    over_time = extrapolators.leading_over_time(series)
    jumps = [extrapolators.relex(still[-1], trajectory, 1.5, series, over_time), extrapolators.alpharl(still[-1], trajectory, 1.5)]
    for jumped in jumps:
        assert not dense(jumped)["a"].any()
        assert dense(jumped)["b"].isfinite().all()


def test_wsm_counts_each_update_by_a_linear_decay(series):
    merged = extrapolators.wsm(SERIES[-1], series, 4)
    for name in SHAPES:
        w = [dense(point)[name] for point in SERIES[2:]]
        want = w[0] + sum((1 - j / 4) * (w[j] - w[j - 1]) for j in (1, 2, 3))
        torch.testing.assert_close(dense(merged)[name], want, atol=1e-5, rtol=1e-5)
    one = extrapolators.wsm(SERIES[-1], series, 1)
    assert all(torch.equal(one.factors[name][0], SERIES[-1].factors[name][0]) for name in SHAPES)


def test_the_greedy_soup_takes_from_the_best_down_what_raises_the_measured_accuracy(series):
    asked, answers = [], iter([0.7, 0.65, 0.7, 0.8, 0.1])  # a tie is not taken

    def measure(candidate):
        asked.append(dense(candidate))
        return next(answers)

    soup = extrapolators.greedy_soup(SERIES[-1], series, torch.tensor([0.2, 0.6, 0.1, 0.5, 0.4, 0.3]), measure)  # best first: 1 3 4 5 0 2
    tried = [(1, 3), (1, 3, 4), (1, 3, 5), (1, 3, 0), (1, 3, 0, 2)]
    for name in SHAPES:
        means = [torch.stack([dense(SERIES[i])[name] for i in members]).mean(0) for members in tried]
        torch.testing.assert_close(torch.stack([candidate[name] for candidate in asked]), torch.stack(means), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dense(soup)[name], means[3], atol=1e-5, rtol=1e-5)


def test_dare_drops_entries_and_rescales_the_others():
    delta = torch.rand(200, 300) + 1
    left = extrapolators.dare(delta, "a", 0.8)
    kept = left != 0
    torch.testing.assert_close(left[kept], 5 * delta[kept])
    assert kept.double().mean().item() == pytest.approx(0.2, abs=4 * (0.16 / 60000) ** 0.5)
    assert torch.equal(left, extrapolators.dare(delta, "a", 0.8))
    assert not torch.equal(left, extrapolators.dare(delta, "b", 0.8))
    assert torch.equal(extrapolators.dare(delta, "a", 0.0), delta)


def test_a_second_method_of_a_name_is_refused_with_those_known():
    with pytest.raises(ValueError, match=r"there is a method 'relex' already, relex\(\); known: next, repeat-last, .*relex"):
        extrapolators.method("relex")(lambda last: last)
    assert extrapolators.METHODS["relex"] is extrapolators.relex


# ---------------------------------------------------------------------------------------------------------------------------
# Through stage 4
# ---------------------------------------------------------------------------------------------------------------------------

STEPS = range(10, 90, 10)


@pytest.fixture(scope="module")
def trained(backbone_dir, tmp_path_factory):
    """A run directory with eight LoRA checkpoints on the demo backbone, their deltas and 4 validation problems. Read only."""
    run = tmp_path_factory.mktemp("methods") / "run"
    modules = {
        "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.1.mlp.down_proj": (64, 192),
        "model.layers.1.self_attn.k_proj": (32, 64),
    }
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 6, "lora_alpha": 3, "target_modules": [*modules], "bias": "none"}
    drift = make_adapter(0, modules, 6).factors
    for i, step in enumerate(STEPS):
        noise = make_adapter(i, modules, 6).factors
        factors = {m: (0.002 * (step * drift[m][0] / 10 + noise[m][0]), drift[m][1] + 0.1 * noise[m][1]) for m in modules}
        adapters.write_adapter(
            run / "train" / f"step_{step:04d}", adapters.Adapter(config, factors), {"step": step, "backbone": str(backbone_dir)}
        )
    (run / "data").mkdir()
    lines = [json.dumps({"prompt": f"12{i}+345", "answer": str(465 + i)}) + "\n" for i in range(4)]
    (run / "data" / "valid.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["02", "--run-dir", str(run), "--k", "2", "--fit-checkpoints", "4"])
        importlib.import_module("02_extract_deltas").main()
    return run


@pytest.fixture
def run(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


def measured(run, accuracies, **changes):
    """What stage 6 would have written of every checkpoint's accuracy."""
    for step, accuracy in zip(STEPS, accuracies, strict=True):
        record = {"accuracy": accuracy, "data": "d", "settings": {"runs": 1}} | (changes if step == 80 else {})
        run_dir.write_json(run / "validation" / f"train__step_{step:04d}" / "valid.json", record)


def merged_logits(backbone_dir, updates):
    model, _ = policy.load_backbone(str(backbone_dir))
    for module, update in updates.items():
        model.get_submodule(module).weight.data += update.float()
    return model(input_ids=IDS).logits


def test_peft_computes_with_what_stage_4_writes(run, backbone_dir, monkeypatch, capsys):
    measured(run, [0.1, 0.2, 0.25, 0.3, 0.4, 0.45, 0.5, 0.6])
    methods = ["relex", "wsm", "alpharl", "alpharl-pls", "expo"]
    assert call_on(monkeypatch, capsys, "04_extrapolate.py", run, "--methods", *methods) == (0, "")
    for name in ("relex_alpha1.5", "wsm", "alpharl_alpha1.5", "alpharl-pls_alpha1.5", "expo_alpha1.5"):
        adapter = adapters.read_adapter(run / "extrapolated" / name)
        model = PeftModel.from_pretrained(policy.load_backbone(str(backbone_dir))[0], run / "extrapolated" / name)
        got, want = model(input_ids=IDS).logits, merged_logits(backbone_dir, dense(adapter))
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        assert (want - merged_logits(backbone_dir, {})).abs().max() > 0.05
        info = inputs.read_json(run / "extrapolated" / name / "checkpoint.json", "04")
        assert info["step"] == 80
        assert ("train/step_0010/adapter_model.safetensors" in info["inputs"]) == (name[:3] in ("rel", "wsm"))
        assert ("validation/train__step_0010/valid.json" in info["inputs"]) == (name == "alpharl-pls_alpha1.5")
    ranks = {adapters.highest_rank(adapters.read_config(run / "extrapolated" / name)) for name in ("relex_alpha1.5", "wsm")}
    assert ranks == {48, 30}  # 8 and 5 checkpoints of rank 6
    assert adapters.read_header(run / "extrapolated" / "relex_alpha1.5").shapes["model.layers.1.self_attn.k_proj"] == (32, 32, 64)


def test_dare_is_written_as_a_model_and_again_only_when_an_option_changes(run, backbone_dir, monkeypatch, capsys):
    for drop in ("0.5", "0.5", "0.25"):
        assert call_on(monkeypatch, capsys, "04_extrapolate.py", run, "--methods", "dare", "--dare-drop", drop) == (0, "")
    assert not (run / "extrapolated").exists()
    last, base = adapters.read_adapter(run / "train" / "step_0080"), model_files.open_model(backbone_dir)
    for drop in (0.5, 0.25):
        model = model_files.open_model(run / "merged" / f"dare_p{drop:g}")
        for name in base.shapes:
            update = dense(last).get(name.removesuffix(".weight"), torch.zeros(())).float()
            moved = model.tensor(name) - base.tensor(name)
            want = moved if not update.any() else extrapolators.dare(update, name.removesuffix(".weight"), drop)
            torch.testing.assert_close(moved, want, atol=1e-6, rtol=0)
    assert inputs.read_json(run / "merged" / "dare_p0.25" / "checkpoint.json", "04")["dare_drop"] == 0.25
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "merge", None)  # nothing is made
        assert call_on(monkeypatch, capsys, "04_extrapolate.py", run, "--methods", "dare", "--dare-drop", "0.5") == (0, "")


def test_the_soup_measures_its_candidates_on_the_validation_problems_with_stage_6(run, monkeypatch, capsys):
    """Stage 6 itself for the checkpoints and the first candidate; that one has the best two checkpoints in it."""
    flags = ["--max-prompt-tokens", "16", "--max-new-tokens", "8", "--runs", "1", "--engine", "hf", "--prompt-template", "{prompt}"]
    flags += ["--system-prompt", "", "--test-data", "{run_dir}/data/valid.jsonl", "--output", "validation", "--backbone", str(demo.SHIPPED)]
    assert call_on(monkeypatch, capsys, "06_eval.py", run, "--policies", "train/step_*", *flags)[0] == 0
    assert sorted(path.name for path in run.iterdir()) == ["data", "deltas", "train", "validation"]  # no eval/, no report
    for step in STEPS:
        path = run / "validation" / f"train__step_{step:04d}" / "valid.json"
        run_dir.write_json(path, inputs.read_json(path, "06") | {"accuracy": step / 100})
    asked, stage6 = [], importlib.import_module("06_eval")

    def run_eval(cfg):
        asked.append((cfg.policies, cfg.test_data, cfg.output, cfg.max_new_tokens, cfg.runs))
        if len(asked) == 1:
            return whole(cfg)
        path = run / "validation" / cfg.policies[0].replace("/", "__") / "valid.json"
        before = inputs.read_json(run / "validation" / "train__step_0080" / "valid.json", "06")
        return run_dir.write_json(path, before | {"accuracy": 0.9 if len(asked) == 3 else 0.5})

    whole = stage6.run_eval
    monkeypatch.setattr(stage6, "run_eval", run_eval)
    assert call_on(monkeypatch, capsys, "04_extrapolate.py", run, "--methods", "greedy-soup")[0] == 0
    names = [f"validation/candidate_0{i}" for i in range(1, 8)]
    assert asked == [([name], ["{run_dir}/data/valid.jsonl"], "validation", 8, 1) for name in names]
    first = inputs.read_json(run / "validation" / "validation__candidate_01" / "valid.json", "06")
    assert (first["policy"], first["n"]) == (names[0], 4)
    assert not (run / "validation" / "candidate_01").exists()
    soup = dense(adapters.read_adapter(run / "extrapolated" / "greedy-soup"))
    points = [dense(adapters.read_adapter(run / "train" / f"step_{step:04d}")) for step in (80, 50)]  # 70 and 60 do not help, 50 does
    for module, update in soup.items():
        torch.testing.assert_close(update, (points[0][module] + points[1][module]) / 2, atol=1e-6, rtol=1e-4)


def lose_one(run):
    (run / "validation" / "train__step_0030" / "valid.json").unlink()


BAD = {
    "no validation results": (lambda run: shutil.rmtree(run / "validation"), ["alpharl-pls"], "train/step_0010 has no measured accuracy"),
    "one of them missing": (lose_one, ["greedy-soup"], "--policies 'train/*' --test-data '{run_dir}/data/valid.jsonl' --output validation"),
    "measured in two ways": (lambda run: measured(run, [0.1] * 8, settings={}), ["alpharl-pls"], "step_0080 was measured otherwise"),
    "too few to average": (None, ["wsm", "--wsm-checkpoints", "9"], "--wsm-checkpoints 9: there are only 8"),
    "everything dropped": (None, ["dare", "--dare-drop", "1"], "dare_drop must be at least 0 and below 1"),
    "an unknown method": (None, ["relax"], "unknown method 'relax'; did you mean relex? (known: alpharl, alpharl-pls, dare"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_a_method_lacks_is_said_in_one_line(run, monkeypatch, capsys, name):
    spoil, flags, message = BAD[name]
    measured(run, [0.1] * 8)
    if spoil:
        spoil(run)
    code, line = call_on(monkeypatch, capsys, "04_extrapolate.py", run, "--methods", *flags)
    assert (code, line[:7]) == (2, "error: ")
    assert message in line
    assert not (run / "extrapolated").exists()


def test_a_method_is_added_with_one_function_and_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr(extrapolators, "METHODS", dict(extrapolators.METHODS))

    @extrapolators.method("halfway")
    def halfway(last, series):
        return extrapolators.mean_of(last, series, [0, len(series.steps) - 1])

    @extrapolators.method("seer")
    def seer(last, crystal_ball):
        return last

    assert call_on(monkeypatch, capsys, "04_extrapolate.py", run, "--methods", "halfway") == (0, "")
    made = dense(adapters.read_adapter(run / "extrapolated" / "halfway"))
    first, last = (dense(adapters.read_adapter(run / "train" / f"step_{step:04d}")) for step in (10, 80))
    for module, update in made.items():
        torch.testing.assert_close(update, (first[module] + last[module]) / 2, atol=1e-6, rtol=1e-4)
    code, line = call_on(monkeypatch, capsys, "04_extrapolate.py", run, "--methods", "seer")
    assert (code, "asks for 'crystal_ball', which stage 4 does not have" in line) == (2, True)


@pytest.mark.parametrize("output", ["../elsewhere", "a/b", "", ".", "..", "/tmp/x", "train", "extrapolated"])
def test_results_go_to_a_folder_of_their_own_below_the_run_directory(run, monkeypatch, capsys, output):
    code, line = call_on(monkeypatch, capsys, "06_eval.py", run, "--policies", "train/step_0080", "--output", output)
    assert (code, line.startswith(f"error: --output {output}: want the name of a folder")) == (2, True)
