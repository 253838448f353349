"""Tests opening any source: files are read when they are asked for, random models follow a seed."""

import jax
import numpy as np
import pytest

from grpo_jax.models.io.sources import RANDOM_MODELS
from grpo_jax.models.load import load, open_weights
from tests.helpers import tiny_gguf
from tests.helpers.model_files import UNTIED


def test_random_models_follow_their_seed():
  config, params = load("random:tiny", seed=1)
  assert config == RANDOM_MODELS["tiny"]
  assert params.keys() == {"embed", "layers", "final_norm"}
  assert params["embed"].shape == (257, 64)
  assert params["layers"]["gate"].shape == (2, 64, 128)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
  same, other = load("random:tiny", seed=1)[1], load("random:tiny", seed=2)[1]
  jax.tree.map(np.testing.assert_array_equal, params, same)
  assert (params["layers"]["q"] != other["layers"]["q"]).any()


def test_random_models_are_read_in_part():
  weights = open_weights("random:tiny", seed=1)
  part = weights.parts["layers"]["q"]((slice(1, 2), slice(3, 5), slice(None)))
  np.testing.assert_array_equal(part, load("random:tiny", seed=1)[1]["layers"]["q"][1:2, 3:5])


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_model_in_files_ignores_the_seed(tmp_path, kind):
  source = UNTIED
  if kind == "gguf":
    source = tmp_path / "model.gguf"
    tiny_gguf.write(source)
  config, params = load(str(source), seed=0)
  other_config, other = load(str(source), seed=1)
  assert config == other_config
  jax.tree.map(np.testing.assert_array_equal, params, other)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
  assert open_weights(str(source)).shapes == shapes
