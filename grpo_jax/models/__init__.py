"""Language models as functions of their parameters, and the files they are read from.

`load_model` opens any source; `FunctionModel` adapts a model of one's own; `protocol.Model` says
what a model is. Layers are flax.linen, parameters a plain dict; nothing outside knows Flax.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from grpo_jax.models.adapter import FunctionModel
from grpo_jax.models.protocol import Model, Params

if TYPE_CHECKING:
  from grpo_jax.models.decoder import Decoder

__all__ = ["FunctionModel", "Model", "Params", "load_model"]


def load_model(source: str, *, seed: int = 0, **options: Any) -> "tuple[Decoder, Params]":
  """Opens a language model and reads its parameters onto the default device.

  Args:
    source: a folder with config.json and safetensors, a .gguf file, 'package:NAME', 'random:NAME'
      or a hub id.
    seed: seed of a random model's parameters.
    options: attributes of `Decoder`, such as `dtype=jnp.bfloat16` or `remat="dots"`.

  Returns:
    (model, parameters).

  Raises:
    ValueError, FileNotFoundError: there is no such model, or it is damaged.

  Example:
    >>> model, params = load_model("random:tiny")
    >>> model.config.vocab_size, params["embed"].shape
    (257, (257, 64))
  """
  # Here: reading a config.json or a header must not import flax.
  from grpo_jax.models.decoder import Decoder
  from grpo_jax.models.load import open_weights

  weights = open_weights(source, seed=seed)
  params = jax.tree.map(jnp.asarray, weights.read())
  return Decoder(weights.config, **options), params
