"""Whole models: against dense SVDs, against the LoRA that they were merged from, and every jump
that is of no low rank against its dense formula.
"""

import pathlib
import shutil

import pytest
import safetensors.torch
import torch
from conftest import call_main, rank_1, save_lora
from peft import LoraConfig, PeftModel, get_peft_model

from common import rank1
from common.baselines import measures
from common.files import adapters, deltas, merge, models, series
from common.files.read import read_json
from common.rl import policy

STEPS = range(10, 90, 10)
IDS = torch.tensor([[2, 7, 8, 9, 3, 5]])


def matrix(m, n, sigma):
    """A random m x n matrix with these singular values, in fp32."""
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(sigma), generator=generator, dtype=torch.float64))[0]
        for size in (m, n)
    )
    return ((u * torch.tensor(sigma, dtype=torch.float64)) @ v.T).float()


SPECTRA = {
    "geometric": [0.9**i for i in range(200)],
    "slow": [1 / (1 + i) ** 0.5 for i in range(200)],
    "bulk": [1.0] + [0.7] * 199,
}
SIZES = [(300, 200), (200, 500), (1000, 24), (24, 1000), (5, 7)]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_the_leading_triple_equals_that_of_a_dense_svd(m, n, spectrum):
    delta = 1e-4 * matrix(m, n, SPECTRA[spectrum][: min(m, n)])
    u, sigma, v = rank1.top(delta)
    du, ds, dv = torch.linalg.svd(delta.double(), full_matrices=False)
    assert len(sigma) == min(64, m, n)
    assert sigma[0].item() == pytest.approx(ds[0].item(), rel=1e-5)
    assert (sigma <= ds[: len(sigma)] * (1 + 1e-5)).all()  # Ritz values
    sine = 1.1e-5 * ds[0] / (ds[0] - ds[1])
    for found, true in ((u.double(), du[:, 0]), (v.double(), dv[0])):
        assert (found - true * (true @ found)).norm() <= sine
    assert (u.double() @ delta.double() @ v.double()).item() == pytest.approx(
        ds[0].item(), rel=1e-5
    )
    truth = measures.energy_ratio(ds[: len(sigma)]).item()
    assert measures.energy_ratio(sigma).item() == pytest.approx(truth, rel=0.01)


def test_a_near_tie_keeps_sigma_and_stays_in_the_leading_plane():
    delta = matrix(300, 200, [1.0, 1.0 - 1e-7, *SPECTRA["geometric"][5:]])
    u, sigma, v = rank1.top(delta)
    du, _, dv = torch.linalg.svd(delta.double())
    assert sigma[:2].tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    assert (du[:, :2].T @ u.double()).norm().item() == pytest.approx(1.0, abs=1e-6)
    assert (dv[:2] @ v.double()).norm().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("m", "n"), [(300, 200), (200, 300), (10, 8)])
def test_a_rank_1_matrix_is_found_and_the_rest_of_its_spectrum_is_zero(m, n):
    delta = matrix(m, n, [0.02])
    u, sigma, v = rank1.top(delta)
    torch.testing.assert_close(sigma[0] * torch.outer(u, v), delta, atol=1e-8, rtol=1e-4)
    assert sigma[1:].max() < 1e-6 * sigma[0]


def test_a_zero_matrix_has_no_direction():
    u, sigma, v = rank1.top(torch.zeros(100, 90))
    assert not any(part.any() for part in (u, sigma, v))
    assert (len(u), len(sigma), len(v)) == (100, 64, 90)


def test_the_same_matrix_gives_the_same_bits_and_torchs_generator_is_left_alone():
    delta, found = matrix(120, 100, SPECTRA["slow"][:100]), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        found.append(rank1.top(delta))
        assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(*parts) for parts in zip(found[0][:3], found[1][:3], strict=True))


# --------------------------------------------------------------------------------------------------
# Through the stages
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(backbone_dir, tmp_path_factory):
    """A random walk of a LoRA on all linear layers of the demo backbone: lora/checkpoint-N, and
    merged in fp32 full/checkpoint-N, every other one in several files. Each whole model has a norm
    of its own. Copy what you change.
    """
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    model = policy.add_lora(policy.load_backbone(str(backbone_dir))[0], 4, 2.0, seed=0)
    base, tokenizer = policy.load_backbone(str(backbone_dir))
    bases = {"1GB": folder / "base", "100KB": folder / "base_in_files"}
    for path in bases.values():
        tokenizer.save_pretrained(path)
    for step in STEPS:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.03 * torch.randn(parameter.shape)
        lora, full = (folder / kind / f"checkpoint-{step}" for kind in ("lora", "full"))
        save_lora(model, lora, {"backbone": str(backbone_dir)})
        base.model.norm.weight.data += 0.01
        size = "1GB" if step % 20 else "100KB"
        base.save_pretrained(bases[size], max_shard_size=size)
        merge.merge(full, adapters.read_adapter(lora), bases[size], {})
        assert (full / "model.safetensors.index.json").exists() == (step % 20 == 0)
    return folder


@pytest.fixture(scope="module")
def deltas_of_runs(runs, backbone_dir, tmp_path_factory):
    """A run directory with the deltas of the whole models. Read only."""
    run = tmp_path_factory.mktemp("extracted") / "run"
    flags = ["--run-dir", str(run), "--k", "2", "--fit-checkpoints", "4", "--threads", "1"]
    flags += ["--checkpoints", f"{runs}/full/checkpoint-*", "--backbone", str(backbone_dir)]
    call_main("02", *flags)
    return run


@pytest.fixture
def extracted(deltas_of_runs, tmp_path):
    return pathlib.Path(shutil.copytree(deltas_of_runs, tmp_path / "run"))


@pytest.fixture(scope="module")
def W(runs, backbone_dir):
    """module -> W[0] ... W[8], dense in float64."""
    folders = [backbone_dir, *(runs / "full" / f"checkpoint-{step}" for step in STEPS)]
    points = [models.open_model(folder) for folder in folders]
    modules = models.linear_layers(points[0])
    return {m: [point.tensor(f"{m}.weight").double() for point in points] for m in modules}


def test_whole_models_have_the_deltas_of_the_lora_they_were_merged_from(
    runs, extracted, tmp_path, extract
):
    pattern = runs / "lora" / "checkpoint-*"
    assert extract(tmp_path / "lora", pattern) == (0, "")
    folders = [run / "deltas" for run in (tmp_path / "lora", extracted)]
    want, got = map(deltas.load_trajectory, folders)
    assert got.steps == want.steps == list(STEPS)
    assert got.deltas.keys() == want.deltas.keys()
    for module, roles in want.deltas.items():
        for role, t in roles.items():
            found = got.deltas[module][role]
            torch.testing.assert_close(found.sigma, t.sigma, rtol=1e-5, atol=0)
            for i in range(len(t)):
                assert found.u[i] @ t.u[i] * (found.v[i] @ t.v[i]) > 1 - 1e-4
    energies = [read_json(folder / "spectrum.json", "02")["energy_ratio"] for folder in folders]
    assert energies[1] == pytest.approx(energies[0], rel=1e-3)


def test_a_jump_of_rank_1_is_an_adapter_on_the_last_model(runs, extracted, typed, W):
    flags = ["--methods", "weighted", "repeat-last", "--merge"]
    assert typed("04", extracted, *flags) == (0, "")
    last, label = runs / "full" / "checkpoint-80", "repeat-last_alpha1.5"
    folder = extracted / "extrapolated" / label
    config = adapters.read_config(folder)
    assert (config["r"], config["base_model_name_or_path"]) == (1, str(last))
    assert sorted(config["target_modules"]) == sorted(W)
    model = PeftModel.from_pretrained(policy.load_backbone(str(last))[0], folder)
    logits = model(input_ids=IDS).logits.detach()
    merged = policy.load_backbone(str(extracted / "merged" / label))[0]
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-5)
    after, before = dict(model.merge_and_unload().named_parameters()), models.open_model(last)
    for name, weight in after.items():
        module, wanted = name.removesuffix(".weight"), before.tensor(name)
        if module in W:
            wanted = (W[module][8] + 1.5 * rank_1(W[module][8] - W[module][6])).float()
        torch.testing.assert_close(weight.detach(), wanted, atol=1e-5, rtol=1e-4)
    for name, step in ((label, 80), ("weighted_alpha1.5", 80)):
        info = adapters.read_info(extracted / "extrapolated" / name)
        assert (info["backbone"], info["step"]) == (str(last), step)


DENSE = {
    "rl-extra_alpha1.5": lambda W: W[0] + (8 + 1.5 * 2) / 8 * (W[8] - W[0]),
    "expo_alpha1.5": lambda W: W[8] + 1.5 * (W[8] - W[0]),
    "wsm": lambda W: sum(W[4:]) / 5,
}


def test_a_jump_of_no_low_rank_is_a_whole_model(runs, extracted, typed, W):
    """Its linear layers are the dense formula, its other tensors those of the last checkpoint."""
    names = [label.removesuffix("_alpha1.5") for label in DENSE]
    assert typed("04", extracted, "--methods", *names) == (0, "")
    assert not (extracted / "extrapolated").exists()
    last = models.open_model(runs / "full" / "checkpoint-80")
    for label, formula in DENSE.items():
        model = models.open_model(extracted / "merged" / label)
        assert model.shapes == last.shapes
        assert {*model.dtypes.values()} == {"F32"}
        for name in model.shapes:
            module = name.removesuffix(".weight")
            if module in W:
                wanted = formula(W[module]).float()
                torch.testing.assert_close(model.tensor(name), wanted, atol=2e-5, rtol=1e-4)
            else:
                assert torch.equal(model.tensor(name), last.tensor(name))
        info = read_json(extracted / "merged" / label / "checkpoint.json", "04")
        assert (info["step"], info["backbone"]) == (80, str(last.path))
        assert policy.load_backbone(str(model.path))[0](input_ids=IDS).logits.isfinite().all()


def test_the_oracle_of_whole_models_is_the_dense_future(
    runs, backbone_dir, W, tmp_path, extract, typed
):
    flags = [runs / "full" / "checkpoint-*", "--last-step", "60", "--backbone", str(backbone_dir)]
    code, line = extract(tmp_path, *flags)
    assert code == 0
    assert line.startswith("note: 17 tensors take no part in the jump, for example model.embed_tok")
    flags = ["--methods", "oracle", "--alphas", "2"]
    assert typed("04", tmp_path, *flags) == (0, "")
    jump = adapters.read_adapter(tmp_path / "extrapolated" / "oracle_alpha2")
    for module, w in W.items():
        wanted = 2 * rank_1(w[8] - w[6])
        torch.testing.assert_close(jump.update(module).dense(), wanted, atol=1e-5, rtol=1e-3)


def test_rounded_models_are_read_with_a_warning(runs, backbone_dir, tmp_path, extract):
    for step in STEPS:
        model, _ = policy.load_backbone(str(runs / "full" / f"checkpoint-{step}"))
        model.bfloat16().save_pretrained(tmp_path / f"checkpoint-{step}")
    flags = [tmp_path / "checkpoint-*", "--backbone", str(backbone_dir)]
    code, line = extract(tmp_path / "run", *flags)
    assert code == 0
    assert line.startswith("warning: checkpoints in BF16")
    policy.load_backbone(str(backbone_dir))[0].bfloat16().save_pretrained(tmp_path / "bf16")
    found = series.find_checkpoints([str(runs / "full" / "checkpoint-*")], "")
    exact = series.open_series(found, str(tmp_path / "bf16"), "")
    assert exact.dtypes == {"F32"}  # the rounded backbone is where fp32 began: no warning


def test_the_layers_that_take_part_are_those_of_a_lora_on_all_linear_layers(backbone_dir):
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(policy.load_backbone(str(backbone_dir))[0], config)
    layers = [name for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    wanted = {name.removeprefix("base_model.model.") for name in layers}
    assert set(models.linear_layers(models.open_model(backbone_dir))) == wanted


def other_shape(folder):
    tensors = {name: torch.zeros(3, 3) for name in models.open_model(folder).shapes}
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 20)


def to_lora(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parents[2] / "lora", folder)


BAD = {
    "no backbone": (
        None,
        "",
        "whole models: name the one that training started from with --backbone",
    ),
    "no such backbone": (None, "nowhere/model", "cannot load backbone nowhere/model"),
    "another shape": (
        other_shape,
        "BACKBONE",
        "checkpoint-30 has model.layers.0.mlp.down_proj.weight",
    ),
    "an adapter among them": (to_lora, "BACKBONE", "is a whole model, others are adapters"),
    "a broken file": (truncate, "BACKBONE", "checkpoint-30/model.safetensors is broken"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_series_that_is_none_is_refused_in_one_line(runs, backbone_dir, tmp_path, name, extract):
    spoil, backbone, message = BAD[name]
    full = tmp_path / "full" / "out"
    shutil.copytree(runs / "full", full)
    shutil.copytree(runs / "lora" / "checkpoint-30", tmp_path / "lora")
    if spoil:
        spoil(full / "checkpoint-30")
    flags = ["--backbone", backbone.replace("BACKBONE", str(backbone_dir))] if backbone else []
    run = tmp_path / "run"
    code, line = extract(run, full / "checkpoint-*", *flags)
    assert (code, line[:7]) == (2, "error: ")
    assert message in line
