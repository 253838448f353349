"""Opens a model by its source: files through `models.io`, or random parameters of a decoder."""

from typing import Any

import jax
import numpy as np

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io.presets import config_of
from grpo_jax.models.io.sources import resolve
from grpo_jax.models.io.weights import Weights, open_files, shapes_of


def open_weights(source: str, *, seed: int = 0) -> Weights:
  """Finds a model and checks the name and shape of each tensor, without reading its data.

  Args:
    source: a folder, a file, a hub id or a random model, see `sources.SOURCES`.
    seed: seed of the parameters of a random model; unused by the others.

  Raises:
    FileNotFoundError: nothing is at `source`, or one of its files is missing.
    ValueError: a file is damaged or not understood, or its tensors do not fit its config. Both
      errors name the file.

  Example:
    >>> weights = open_weights("random:tiny")
    >>> weights.config.layers, weights.shapes["layers"]["q"].shape
    (2, (2, 64, 64))
  """
  resolved = resolve(source)
  if resolved.kind != "random":
    return open_files(resolved)
  config = config_of(source)
  values = jax.tree.map(np.array, Decoder(config).init(jax.random.key(seed)))
  parts = jax.tree.map(lambda value: lambda index: np.array(value[index]), values)
  return Weights(config, shapes_of(config), parts)


def load(source: str, *, seed: int = 0) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns the config and the float32 numpy parameters of a model; arguments as in `open_weights`.

  Example:
    >>> config, params = load("random:tiny")
    >>> config.layers, config.width, config.heads * config.head_dim
    (2, 64, 64)
    >>> params["layers"]["q"].shape
    (2, 64, 64)
  """
  weights = open_weights(source, seed=seed)
  return weights.config, weights.read()
