"""Whole models' deltas: against dense float64 SVDs, and against the LoRA path on models that are merged LoRA checkpoints."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from conftest import call_on, extract_from
from peft import LoraConfig, PeftModel, get_peft_model

from common import rank1
from common.files import adapters, dense, merge
from common.files import deltas as delta_files
from common.files import models as model_files
from common.rl import policy

STEPS = range(10, 90, 10)
IDS = torch.tensor([[2, 7, 8, 9, 3, 5]])


def matrix(m, n, sigma):
    """A random m x n matrix with these singular values, in fp32."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, len(sigma), generator=generator, dtype=torch.float64))[0] for size in (m, n))
    return ((u * torch.tensor(sigma, dtype=torch.float64)) @ v.T).float()


SPECTRA = {"geometric": [0.9**i for i in range(200)], "slow": [1 / (1 + i) ** 0.5 for i in range(200)], "bulk": [1.0] + [0.7] * 199}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(300, 200), (200, 500), (1000, 24), (24, 1000), (5, 7)])
def test_the_leading_triple_equals_that_of_a_dense_svd(m, n, spectrum):
    delta = 1e-4 * matrix(m, n, SPECTRA[spectrum][: min(m, n)])
    u, sigma, v, residual = dense.leading_of_dense(delta)
    du, ds, dv = torch.linalg.svd(delta.double(), full_matrices=False)
    assert len(sigma) == min(64, m, n)
    assert residual < dense.TOLERANCE
    assert sigma[0].item() == pytest.approx(ds[0].item(), rel=1e-5)
    assert (sigma <= ds[: len(sigma)] * (1 + 1e-5)).all()  # Ritz values
    sine = (residual + 1e-6) * ds[0] / (ds[0] - ds[1])
    for found, true in ((u.double(), du[:, 0]), (v.double(), dv[0])):
        assert (found - true * (true @ found)).norm() <= sine
    assert (u.double() @ delta.double() @ v.double()).item() == pytest.approx(ds[0].item(), rel=1e-5)  # one sign for both
    truth = rank1.energy_ratio(ds[: len(sigma)]).item()
    assert rank1.energy_ratio(sigma).item() == pytest.approx(truth, rel=0.01)


def test_a_near_tie_keeps_sigma_and_stays_in_the_leading_plane():
    delta = matrix(300, 200, [1.0, 1.0 - 1e-7, *SPECTRA["geometric"][5:]])
    u, sigma, v, residual = dense.leading_of_dense(delta)
    du, _, dv = torch.linalg.svd(delta.double())
    assert residual < dense.TOLERANCE
    assert sigma[:2].tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    assert (du[:, :2].T @ u.double()).norm().item() == pytest.approx(1.0, abs=1e-6)
    assert (dv[:2] @ v.double()).norm().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("m", "n"), [(300, 200), (200, 300), (10, 8)])
def test_a_rank_1_matrix_is_found_and_the_rest_of_its_spectrum_is_zero(m, n):
    delta = matrix(m, n, [0.02])
    u, sigma, v, residual = dense.leading_of_dense(delta)
    torch.testing.assert_close(sigma[0] * torch.outer(u, v), delta, atol=1e-8, rtol=1e-4)
    assert sigma[1:].max() < 1e-6 * sigma[0]
    assert residual < dense.TOLERANCE


def test_a_zero_matrix_has_no_direction():
    u, sigma, v, residual = dense.leading_of_dense(torch.zeros(100, 90))
    assert (u.any(), sigma.any(), v.any(), residual) == (False, False, False, 0.0)
    assert (len(u), len(sigma), len(v)) == (100, 64, 90)


def test_the_residual_says_how_far_an_iteration_cut_short_is_off():
    delta = matrix(300, 200, SPECTRA["slow"])
    u, sigma, v, residual = dense.leading_of_dense(delta, keep=1, rounds=1)
    u, v, whole = u.double(), v.double(), delta.double()
    true = max((whole @ v - sigma[0] * u).norm(), (whole.T @ u - sigma[0] * v).norm()) / sigma[0]
    assert residual == pytest.approx(true.item(), rel=1e-4)
    assert residual > 100 * dense.TOLERANCE
    assert (torch.linalg.svdvals(whole) - sigma[0]).abs().min() <= residual * sigma[0]


def test_the_same_matrix_gives_the_same_bits():
    torch.manual_seed(1)
    first = dense.leading_of_dense(matrix(120, 100, SPECTRA["slow"][:100]))
    torch.manual_seed(2)
    second = dense.leading_of_dense(matrix(120, 100, SPECTRA["slow"][:100]))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, second, strict=True))


def test_an_iteration_that_does_not_converge_is_counted():
    torch.manual_seed(0)
    start = torch.zeros(200, 200)
    series = [torch.randn(200, 200), torch.zeros(200, 200), torch.zeros(200, 200)]
    assert dense.dense_trajectory(start, series, 1)[3] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense.leading_of_dense, "__defaults__", (64, dense.TOLERANCE, 1))
        assert dense.dense_trajectory(start, series, 1)[3] == 4  # global and local of the first, local and target to the second


# ---------------------------------------------------------------------------------------------------------------------------
# Through the stages
# ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(backbone_dir, tmp_path_factory):
    """A random walk of a LoRA on all linear layers of the demo backbone, as lora/checkpoint-N and merged in fp32 as full/checkpoint-N,
    every other one in several files. Copy what you change.
    """
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    model = policy.add_lora(policy.load_backbone(str(backbone_dir))[0], 4, 2.0, seed=0)
    for step in STEPS:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.03 * torch.randn(parameter.shape)
        lora, full = (folder / kind / f"checkpoint-{step}" for kind in ("lora", "full"))
        policy.save_lora(model, lora, {"backbone": str(backbone_dir)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merge, "SHARD_BYTES", 10**9 if step % 20 else 100_000)
            merge.merge(full, adapters.read_adapter(lora), backbone_dir, True, {})
        assert (full / "model.safetensors.index.json").exists() == (step % 20 == 0)
    return folder


@pytest.fixture
def extracted(runs, backbone_dir, tmp_path, monkeypatch, capsys):
    """A run directory with the deltas of the whole models."""
    code, line = extract_from(monkeypatch, capsys, tmp_path / "run", runs / "full" / "checkpoint-*", "--backbone", str(backbone_dir))
    assert code == 0
    assert line.startswith("note: model.embed_tokens.weight and 16 more take no part in the jump")
    return tmp_path / "run"


def test_whole_models_have_the_deltas_of_the_lora_they_were_merged_from(runs, extracted, tmp_path, monkeypatch, capsys):
    assert extract_from(monkeypatch, capsys, tmp_path / "lora", runs / "lora" / "checkpoint-*") == (0, "")
    want, got = (delta_files.load_trajectory(run / "deltas") for run in (tmp_path / "lora", extracted))
    assert got.steps == want.steps == list(STEPS)
    assert got.deltas.keys() == want.deltas.keys()
    for module, roles in want.deltas.items():
        for role, t in roles.items():
            found = got.deltas[module][role]
            torch.testing.assert_close(found.sigma, t.sigma, rtol=1e-5, atol=0)
            for i in range(len(t.sigma)):
                assert found.u[i] @ t.u[i] * (found.v[i] @ t.v[i]) > 1 - 1e-4
    indices = [json.loads((run / "deltas" / "index.json").read_text()) for run in (tmp_path / "lora", extracted)]
    assert [index["kind"] for index in indices] == ["lora", "full"]
    assert indices[1]["not_converged"] == 0
    energies = [json.loads((run / "deltas" / "spectrum.json").read_text())["energy_ratio"] for run in (tmp_path / "lora", extracted)]
    assert energies[1] == pytest.approx(energies[0], rel=1e-3)


def test_the_jump_is_an_adapter_of_rank_1_on_the_last_model(runs, extracted, monkeypatch, capsys):
    assert call_on(monkeypatch, capsys, "03_train_predictor.py", extracted, "--recipes", "weighted")[0] == 0
    flags = ["--methods", "next", "repeat-last", "--recipes", "weighted", "--merge", "fp32"]
    assert call_on(monkeypatch, capsys, "04_extrapolate.py", extracted, *flags) == (0, "")
    trajectory, last = delta_files.load_trajectory(extracted / "deltas"), runs / "full" / "checkpoint-80"
    folder = extracted / "extrapolated" / "repeat-last_alpha1.5"
    config = adapters.read_config(folder)
    assert (config["r"], config["base_model_name_or_path"]) == (1, str(last))
    assert sorted(config["target_modules"]) == sorted(trajectory.deltas)
    jumped = PeftModel.from_pretrained(policy.load_backbone(str(last))[0], folder)
    logits = jumped(input_ids=IDS).logits.detach()
    merged = policy.load_backbone(str(extracted / "merged" / "repeat-last_alpha1.5"))[0]
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-5)
    after, before = dict(jumped.merge_and_unload().named_parameters()), model_files.open_model(last)
    for name, weight in after.items():
        want = before.tensor(name)
        if name.removesuffix(".weight") in trajectory.deltas:
            target = trajectory.deltas[name.removesuffix(".weight")]["target"]
            want = want + 1.5 * target.sigma[-1] * torch.outer(target.u[-1], target.v[-1])
        torch.testing.assert_close(weight.detach(), want, atol=1e-6, rtol=1e-5)
    assert policy.checkpoint_info(folder)["backbone"] == str(last)
    assert policy.checkpoint_info(extracted / "extrapolated" / "next-weighted_alpha1.5")["step"] == 80


def test_the_backtest_scores_against_the_dense_delta(runs, extracted, monkeypatch, capsys):
    assert call_on(monkeypatch, capsys, "03_train_predictor.py", extracted, "--recipes", "weighted")[0] == 0
    tested = json.loads((extracted / "predictor" / "weighted" / "report.json").read_text())["backtest"]
    assert (tested["at_step"], tested["predicts_step"]) == (60, 80)
    now, future = (model_files.open_model(runs / "full" / f"checkpoint-{step}") for step in (60, 80))
    trajectory = delta_files.load_trajectory(extracted / "deltas")
    cosines = []
    for module, roles in trajectory.deltas.items():
        sigma = torch.linalg.svdvals(future.tensor(f"{module}.weight").double() - now.tensor(f"{module}.weight").double())
        cosines.append(float(sigma[0] / sigma.norm()))
        assert roles["target"].sigma[5].item() == pytest.approx(sigma[0].item(), rel=1e-5)
    assert tested["oracle"]["cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)
    assert tested["oracle"]["sigma_error"] < 1e-4
    assert tested["repeat-last"]["sigma_error"] > 0.01


def test_the_oracle_of_whole_models_is_the_dense_future(runs, backbone_dir, tmp_path, monkeypatch, capsys):
    flags = ["--last-step", "60", "--backbone", str(backbone_dir)]
    assert extract_from(monkeypatch, capsys, tmp_path, runs / "full" / "checkpoint-*", *flags)[0] == 0
    assert call_on(monkeypatch, capsys, "04_extrapolate.py", tmp_path, "--methods", "oracle", "--alphas", "2") == (0, "")
    jump = adapters.read_adapter(tmp_path / "extrapolated" / "oracle_alpha2")
    now, future = (model_files.open_model(runs / "full" / f"checkpoint-{step}") for step in (60, 80))
    for module, (b, a) in jump.factors.items():
        u, sigma, vh = torch.linalg.svd(dense.difference(future, now, module))
        torch.testing.assert_close(jump.scale(module) * b @ a, 2 * sigma[0] * torch.outer(u[:, 0], vh[0]), atol=1e-5, rtol=1e-3)


def test_a_method_that_is_no_rank_1_is_refused_with_the_reason(extracted, monkeypatch, capsys):
    code, line = call_on(monkeypatch, capsys, "04_extrapolate.py", extracted, "--methods", "rl-extra")
    assert code == 2
    assert line.startswith("error: rl-extra ")
    assert "all ranks of it" in line
    assert not (extracted / "extrapolated").exists()


def test_rounded_models_are_read_with_a_warning_that_counts_what_did_not_move(runs, backbone_dir, tmp_path, monkeypatch, capsys):
    for step in STEPS:
        adapter = adapters.read_adapter(runs / "lora" / f"checkpoint-{step}")
        for factor, _ in adapter.factors.values():
            factor *= 0.02  # steps near bf16's spacing
        model = policy.load_backbone(str(backbone_dir), dtype=torch.bfloat16)[0]
        model.save_pretrained(tmp_path / "bf16")
        merge.merge(tmp_path / f"checkpoint-{step}", adapter, tmp_path / "bf16", False, {})
    code, line = extract_from(monkeypatch, capsys, tmp_path / "run", tmp_path / "checkpoint-*", "--backbone", str(backbone_dir))
    assert code == 0
    assert line.startswith("warning: weights in BF16")
    models = {step: model_files.open_model(tmp_path / f"checkpoint-{step}") for step in (60, 70, 80)}
    for before, role in ((70, "local"), (60, "target")):
        same = [
            (models[80].tensor(f"{module}.weight") == models[before].tensor(f"{module}.weight")).double().mean()
            for module in delta_files.load_trajectory(tmp_path / "run" / "deltas").deltas
        ]
        assert 0.05 < torch.stack(same).median() < 0.95
        assert f"{torch.stack(same).median():.1%} of the" in line, role


def test_the_layers_that_take_part_are_those_of_a_lora_on_all_linear_layers(backbone_dir):
    model = get_peft_model(policy.load_backbone(str(backbone_dir))[0], LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    want = {name.removeprefix("base_model.model.") for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert set(dense.linear_layers(model_files.open_model(backbone_dir))) == want


def other_shape(folder):
    tensors = {name: torch.zeros(3, 3) for name in model_files.open_model(folder).shapes}
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 20)


def to_lora(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parents[2] / "lora", folder)


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (None, [], "these checkpoints are whole models: name the one that training started from with --backbone"),
        (None, ["--backbone", "nowhere/model"], "backbone nowhere/model is no folder"),
        (other_shape, ["--backbone", "BACKBONE"], "checkpoint-30 has model.layers.0.mlp.down_proj.weight as (3, 3), the backbone"),
        (shutil.rmtree, ["--backbone", "BACKBONE"], "not evenly spaced: [10, 20, 40"),
        (to_lora, ["--backbone", "BACKBONE"], "is a whole model, others are adapters"),
        (truncate, ["--backbone", "BACKBONE"], "checkpoint-30/model.safetensors is broken"),
    ],
)
def test_a_series_that_is_none_is_refused_in_one_line(runs, backbone_dir, tmp_path, monkeypatch, capsys, spoil, flags, message):
    shutil.copytree(runs / "full", tmp_path / "full" / "out")
    shutil.copytree(runs / "lora" / "checkpoint-30", tmp_path / "lora")
    if spoil:
        spoil(tmp_path / "full" / "out" / "checkpoint-30")
    flags = [str(backbone_dir) if flag == "BACKBONE" else flag for flag in flags]
    code, line = extract_from(monkeypatch, capsys, tmp_path / "run", tmp_path / "full" / "out" / "checkpoint-*", *flags)
    assert (code, line[:7]) == (2, "error: ")
    assert message in line
