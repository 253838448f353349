"""Tests matrices in MXFP4 against blocks worked out by hand, and a folder that holds them."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax.export import export_model
from grpo_jax.models.io.mxfp4 import dequantize
from grpo_jax.models.load import load
from tests.helpers.model_files import FAMILIES

# The 16 codes of e2m1: sign, two bits of exponent, one of mantissa.
CODES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_all_codes_in_order():
  """Byte i holds code 2 i in its lower half and 2 i + 1 in its upper, for two rows of a block."""
  row = [2 * i + 16 * (2 * i + 1) for i in range(8)] * 2
  values = dequantize(np.array([[row]], np.uint8), np.array([[127]], np.uint8))
  assert values.shape == (1, 32)
  assert values.dtype == np.float32
  np.testing.assert_array_equal(values[0], CODES * 2)
  assert np.signbit(values[0, 8])


@pytest.mark.parametrize(
  ("scale", "factor"), [(127, 1), (128, 2), (124, 0.125), (0, 2.0**-127), (254, 2.0**127)]
)
def test_scales_are_powers_of_two(scale, factor):
  row = np.full((1, 16), 0x21, np.uint8)  # 0.5, then 1
  values = dequantize(row, np.array([scale], np.uint8))
  np.testing.assert_array_equal(values, np.float32([0.5, 1.0] * 16) * np.float32(factor))


def test_each_block_has_its_own_scale():
  blocks = np.full((2, 2, 16), 0x22, np.uint8)  # ones
  scales = np.array([[127, 129], [126, 255]], np.uint8)
  values = dequantize(blocks, scales)
  np.testing.assert_array_equal(values[0], [1] * 32 + [4] * 32)
  np.testing.assert_array_equal(values[1, :32], [0.5] * 32)
  assert np.isnan(values[1, 32:]).all()


def packed_folder(tmp_path):
  """Returns the fixture of gpt-oss with random MXFP4 matrices, and these in wide numbers."""
  folder = shutil.copytree(FAMILIES / "gpt_oss", tmp_path / "packed")
  tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
  wide = {}
  for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
    experts, inputs, outputs = tensors.pop(name).shape
    codes = rng.integers(0, 16, (experts, outputs, inputs))
    scales = rng.integers(120, 127, (experts, outputs, inputs // 32))
    blocks = (codes[..., ::2] + 16 * codes[..., 1::2]).astype(np.uint8)
    tensors[f"{name}_blocks"] = blocks.reshape(experts, outputs, inputs // 32, 16)
    tensors[f"{name}_scales"] = scales.astype(np.uint8)
    factor = 2.0 ** (np.repeat(scales, 32, axis=-1) - 127.0)
    wide[name] = (np.array(CODES)[codes] * factor).astype(np.float32).swapaxes(1, 2)
  save_file(tensors, folder / "model.safetensors")
  raw = json.loads((folder / "config.json").read_text())
  raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
  (folder / "config.json").write_text(json.dumps(raw))
  return folder, wide


def test_a_folder_is_read_wide_and_exported_wide(tmp_path):
  folder, wide = packed_folder(tmp_path)
  config, params = load(str(folder))
  expert = "model.layers.{}.mlp.experts.{}"
  for layer in range(2):
    own = {name: params["layers"][f"experts_{name}"][layer] for name in ("gate", "up", "down")}
    fused = wide[expert.format(layer, "gate_up_proj")]
    np.testing.assert_array_equal(own["gate"], fused[..., ::2])
    np.testing.assert_array_equal(own["up"], fused[..., 1::2])
    np.testing.assert_array_equal(own["down"], wide[expert.format(layer, "down_proj")])
  export_model(config, params, str(folder), tmp_path / "out")
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  assert "quantization_config" not in raw
  written = load_file(tmp_path / "out" / "model.safetensors")
  for name, values in wide.items():
    np.testing.assert_array_equal(written[name], values)
  _, again = load(str(tmp_path / "out"))
  np.testing.assert_array_equal(again["layers"]["experts_up"], params["layers"]["experts_up"])


def test_parts_that_do_not_fit_are_named(tmp_path):
  folder, _ = packed_folder(tmp_path)
  tensors = load_file(folder / "model.safetensors")
  name = "model.layers.0.mlp.experts.down_proj"
  scales = tensors.pop(f"{name}_scales")
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"packed: .*down_proj in MXFP4 .* of shape None"):
    load(str(folder))
  save_file(tensors | {f"{name}_scales": scales[:, :5]}, folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"blocks of shape \[4, 32, 1, 16\] and .* \[4, 5, 1\]: blo"):
    load(str(folder))
  signed = {f"{name}_scales": scales.astype(np.int8)}
  save_file(tensors | signed, folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"down_proj_scales is I8, known: U8"):
    load(str(folder))


def test_a_part_is_read_without_the_rest(tmp_path):
  """The part that one device of a mesh holds."""
  from grpo_jax.models.load import open_weights

  folder, wide = packed_folder(tmp_path)
  weights = open_weights(str(folder))
  part = weights.parts["layers"]["experts_up"]
  index = slice(1, 2), slice(2, 4), slice(8, 24), slice(4, 16)
  fused = wide["model.layers.1.mlp.experts.gate_up_proj"]
  np.testing.assert_array_equal(part(index)[0], fused[2:4, 8:24, 9:33:2])
