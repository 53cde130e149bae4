"""Weights that are not floats: read as such, their deltas would mean nothing."""

import shutil

import pytest
import safetensors.torch
import torch

from common import UserError
from common.files import adapters, series


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_models_are_refused(backbone_dir, tmp_path, dtype):
    whole = shutil.copytree(backbone_dir, tmp_path / "step_1")
    (whole / "sha256.json").unlink(missing_ok=True)
    tensors = safetensors.torch.load_file(whole / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    safetensors.torch.save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    for checkpoint, backbone in ((whole, backbone_dir), (backbone_dir, whole)):
        with pytest.raises(UserError, match=r"quantised weights .* cannot jump"):
            series.open_series({1: checkpoint}, str(backbone), str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_factors_that_are_not_floats_are_refused(lora_policy, tmp_path, dtype):
    lora_policy[0].save_pretrained(tmp_path, save_embedding_layers=False)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: t.to(dtype) for k, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="has factors in"):
        adapters.read_header(tmp_path)
