"""Tests the table of parameters, and that every tensor that does not fit it is an error."""

import dataclasses
import json
import math
import shutil
import weakref

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax.distributed import mesh as meshes
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io.sources import Source
from grpo_jax.models.io.weights import ROWS, file_shape, open_files, rows_of, shapes_of
from grpo_jax.models.load import open_weights
from tests.helpers.model_files import UNTIED, edit_tensors

SOURCE = Source("folder", str(UNTIED))

# --- the table ------------------------------------------------------------------------------------


def test_the_table_names_everything_once():
  for column in ("path", "hf", "gguf"):
    names = [getattr(row, column) for row in ROWS]
    assert len(set(names)) == len(names) == 22


COMPLETE = ModelConfig(  # everything that a family can add
  vocab_size=11,
  width=6,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp=10,
  tied=False,
  biases=("q", "k", "v", "o", "gate", "up", "down"),
  qk_norm=True,
  post_norm=True,
  names="gemma",
)
CONFIGS = {
  "complete": COMPLETE,
  "classifier": dataclasses.replace(COMPLETE, labels=3, post_norm=False, names="llama"),
  "tied classifier": dataclasses.replace(COMPLETE, labels=1, tied=True),
  "plain": dataclasses.replace(
    COMPLETE, tied=True, biases=(), qk_norm=False, post_norm=False, names="llama"
  ),
  "norms after": dataclasses.replace(COMPLETE, qk_norm="all", pre_norm=False, names="olmo"),
  "fused": dataclasses.replace(COMPLETE, biases=(), post_norm=False, names="phi3"),
  "fused MLP": dataclasses.replace(COMPLETE, biases=("q", "k", "v"), names="glm4"),
  "some biases": dataclasses.replace(COMPLETE, biases=("q", "down")),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_has_the_shapes_of_the_decoder(config):
  expected = jax.eval_shape(Decoder(config).init, jax.random.key(0))
  shapes = shapes_of(config)
  assert jax.tree.structure(shapes) == jax.tree.structure(expected)
  assert shapes == expected


def test_matrices_of_a_layer_are_transposed_in_files():
  rows = {row.path: row for row in rows_of(COMPLETE)}
  assert file_shape(rows["layers/up"], COMPLETE) == (10, 6)
  assert shapes_of(COMPLETE)["layers"]["up"].shape == (2, 6, 10)
  assert file_shape(rows["embed"], COMPLETE) == shapes_of(COMPLETE)["embed"].shape == (11, 6)


# --- tensors that do not fit ----------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_all_listed(folder):
  def change(tensors):
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 48), np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)

  edit_tensors(folder, change)
  with pytest.raises(ValueError, match=r"4 tensor\(s\) do not fit") as caught:
    open_files(Source("folder", str(folder)))
  lines = str(caught.value).split("\n  ")
  assert str(folder) in lines[0]
  assert lines[1:] == [
    "model.layers.0.self_attn.q_proj.weight: shape [32, 48], expected [48, 32]",
    "model.layers.1.mlp.up_proj.weight: missing, expected shape [64, 32]",
    "model.layers.0.self_attn.q_proj.bias: unknown, shape [48]",
    "model.layers.2.mlp.up_proj.weight: unknown, shape [64, 32]",
  ]


def test_a_long_list_of_tensors_is_cut(folder):
  extra = {f"extra.{i}": np.zeros(1, np.float32) for i in range(25)}
  edit_tensors(folder, lambda tensors: tensors.update(extra))
  with pytest.raises(ValueError, match=r"25 tensor\(s\)") as caught:
    open_files(Source("folder", str(folder)))
  lines = str(caught.value).split("\n  ")
  assert len(lines) == 1 + 20 + 1
  assert lines[-1] == "..."


def test_an_untied_head_must_exist(folder):
  edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
  with pytest.raises(ValueError, match=r"lm_head\.weight: missing, expected shape \[128, 32\]"):
    open_files(Source("folder", str(folder)))


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (8, 1, 1)])
def test_parameters_are_read_into_their_shardings(shape):
  mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
  weights = open_files(SOURCE)
  shardings = meshes.param_shardings(mesh, weights.shapes)
  expected, placed = weights.read(), weights.read(shardings)
  assert jax.tree.structure(placed) == jax.tree.structure(expected)
  leaves = zip(*map(jax.tree.leaves, (placed, expected, shardings)), strict=True)
  for actual, value, sharding in leaves:
    assert actual.sharding == sharding
    np.testing.assert_array_equal(actual, value)


def test_opening_reads_no_data():
  weights = open_files(SOURCE)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights.read())
  assert weights.shapes == shapes

  def refuse(index):
    raise AssertionError("read")

  unread = dataclasses.replace(weights, parts=jax.tree.map(lambda _: refuse, weights.parts))
  with pytest.raises(AssertionError, match="read"):
    unread.read()


def test_a_host_holds_its_shards_and_one_more_parameter():
  """Counts the bytes of all live buffers at each read.

  Buffers are returned unaligned, so that the runtime has to copy them and none of them stays alive
  as a part of a finished parameter.
  """
  mesh = meshes.make_mesh((2, 4, 1))
  weights = open_files(SOURCE)
  live, peaks, sizes = [0], [], []

  def release(size):
    live[0] -= size

  def watch(part):
    def read(index):
      value = part(index)
      buffer = np.empty(value.size + 1, np.float32)
      start = 1 if buffer.ctypes.data % 8 == 0 else 0
      buffer[start : start + value.size] = value.ravel()
      weakref.finalize(buffer, release, value.nbytes)
      live[0] += value.nbytes
      peaks.append(live[0])
      sizes.append(value.nbytes)
      return buffer[start : start + value.size].reshape(value.shape)

    return read

  watched = dataclasses.replace(weights, parts=jax.tree.map(watch, weights.parts))
  placed = watched.read(meshes.param_shardings(mesh, weights.shapes))
  np.testing.assert_array_equal(placed["layers"]["q"], weights.read()["layers"]["q"])
  parameters = [leaf.size * 4 for leaf in jax.tree.leaves(weights.shapes)]
  assert max(peaks) <= 2 * max(parameters) < sum(parameters) / 3
  assert sum(sizes) == sum(parameters)  # no part is read twice for two devices


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, bad):
  folder = tmp_path / "model"
  shutil.copytree("tests/fixtures/tiny_llama", folder)
  tensors = dict(load_file(folder / "model.safetensors"))
  tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = bad
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"the weights of layers/up hold NaN or infinity"):
    open_weights(str(folder)).read()


@pytest.mark.parametrize(
  ("field", "value"),
  [("rope_theta", 0), ("rope_theta", -1.0), ("rms_norm_eps", -1e-6), ("rms_norm_eps", "1e999")],
)
def test_numbers_of_a_config_are_finite_and_in_range(tmp_path, field, value):
  folder = tmp_path / "model"
  shutil.copytree("tests/fixtures/tiny_llama", folder)
  text = (folder / "config.json").read_text()
  config = json.loads(text)
  config[field] = value
  for parameters in ("rope_parameters", "rope_scaling"):
    if field == "rope_theta" and isinstance(config.get(parameters), dict):
      config[parameters][field] = value
  (folder / "config.json").write_text(json.dumps(config).replace('"1e999"', "1e999"))
  with pytest.raises(ValueError, match=r"must be (given as )?a finite number"):
    open_weights(str(folder))
