"""Tests writing config.json and safetensors: what is written reads back, or is an error."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax.models.config import ModelConfig, RopeScaling
from grpo_jax.models.io.families import parse
from grpo_jax.models.io.json_files import read_json
from grpo_jax.models.io.weights import shapes_of
from grpo_jax.models.io.writer import describe, write_weights
from tests.helpers.model_files import FAMILIES, UNTIED
from tests.models.io.test_families import PUBLISHED

CONFIG = ModelConfig(vocab_size=5, width=4, layers=2, heads=2, kv_heads=1, head_dim=2, mlp=6)


def configs():
  yield from ((name, expected) for name, (_, expected) in PUBLISHED.items())
  for folder in (*sorted(FAMILIES.iterdir()), UNTIED):
    yield folder.name, parse(read_json(folder / "config.json"), folder.name)
  yarn = RopeScaling("yarn", 4.0, 32768, low=1.0, high=32.0, amplitude=1.1, rounded=False)
  yield "yarn", dataclasses.replace(CONFIG, rope_scaling=yarn)


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), [pytest.param(*c, id=c[0]) for c in configs()])
def test_a_description_reads_back(name, config):
  raw = json.loads(json.dumps(describe(config)))
  assert parse(raw, name) == config
  assert raw["architectures"][0] != "Gemma3ForConditionalGeneration"  # there is no vision tower


def test_a_model_of_no_family_is_not_described():
  with pytest.raises(ValueError, match="no family of llama, mistral, qwen2"):
    describe(dataclasses.replace(CONFIG, qk_norm=True, attn_softcap=2.0))


# --- weights --------------------------------------------------------------------------------------


@pytest.fixture
def params():
  """Every parameter counts up from 1, so that no two values of one are equal."""
  return jax.tree.map(
    lambda leaf: 1 + np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape), shapes_of(CONFIG)
  )


def test_layers_are_unstacked_and_transposed(tmp_path, params):
  assert write_weights(CONFIG, params, tmp_path, "float32") == ["model.safetensors"]
  tensors = load_file(tmp_path / "model.safetensors")
  # D = 4, F = 6: up is [L, D, F], whose second layer counts from 1 + 4 * 6.
  expected = [[25 + 6 * column + row for column in range(4)] for row in range(6)]
  assert tensors["model.layers.1.mlp.up_proj.weight"].tolist() == expected
  assert tensors["model.norm.weight"].tolist() == [1, 2, 3, 4]
  assert len(tensors) == 2 + 2 * 9
  assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_dtype_is_rounded_to(tmp_path, params):
  params["final_norm"] = np.array([1 + 2**-9, 1, 2, 3], np.float32)
  write_weights(CONFIG, params, tmp_path, "bfloat16")
  norm = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
  assert norm.dtype == ml_dtypes.bfloat16
  assert norm.tolist() == [1, 1, 2, 3]  # bfloat16 has eight bits


def test_large_models_are_split_with_an_index(tmp_path, params):
  """Each file takes tensors until the next would exceed 100 bytes; a larger tensor is alone."""
  files = write_weights(CONFIG, params, tmp_path, "float32", shard_bytes=100)
  tensors = {file: load_file(tmp_path / file) for file in files}
  for part in tensors.values():
    assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= 100
  index = read_json(tmp_path / "model.safetensors.index.json")
  assert index["weight_map"] == {name: file for file, part in tensors.items() for name in part}
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert index["metadata"]["total_size"] == 4 * count
  assert files[0] == f"model-00001-of-{len(files):05}.safetensors"


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path, params):
  params["layers"]["q"][1, 0, 0] = 1e6
  with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight holds NaN or inf"):
    write_weights(CONFIG, params, tmp_path, "float16")


def test_parameters_of_another_model_are_refused(tmp_path, params):
  wider = params | {"embed": np.zeros((6, 4), np.float32), "head": np.zeros((5, 4), np.float32)}
  del wider["final_norm"]
  with pytest.raises(ValueError, match="do not fit the config") as caught:
    write_weights(CONFIG, wider, tmp_path, "float32")
  assert str(caught.value).split("\n  ")[1:] == [
    "embed: (6, 4), expected (5, 4)",
    "final_norm: None, expected (4,)",
    "head: (5, 4), expected None",
  ]
  assert not list(tmp_path.iterdir())
