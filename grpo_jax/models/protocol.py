"""States what sampling and learning need of a model, so that any model can be trained.

Nothing here knows Flax: parameters are a tree of arrays, and a model is a few functions of them.
`models.decoder.Decoder` is the model of this project; `examples/bring_your_model.py` adapts others.
"""

from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.core.checks import Array

# A tree of arrays, such as the nested dict that a Flax linen module returns from `init`.
Params: TypeAlias = Any
# Keys and values (or any state) of prompts or completions, as the model lays them out.
Cache: TypeAlias = Any


class ModelShape(Protocol):
  """Describes the output of a model for sampling and scoring."""

  @property
  def vocab_size(self) -> int:
    """Returns the vocabulary size, V."""

  @property
  def softcap(self) -> float | None:
    """Returns the soft cap of the logits, `cap * tanh(logit / cap)`; None disables it."""


@runtime_checkable
class Model(Protocol):
  """Describes a language model as functions of its parameters.

  The G completions of one prompt form a group. A model whose arrays lie on several devices may also
  have `vocab_shards` and `prompt_shards`, the number of shards of its head and of a batch. A model
  that decodes faster from another layout of its parameters may have
  `for_decoding(params, platform)`, which returns them in that layout.

  Axes: P prompts, G completions per prompt, N prompt tokens (left-padded), T completion tokens,
  D hidden size, V vocabulary.
  """

  @property
  def config(self) -> ModelShape:
    """Returns the shape of the output."""

  def head(self, params: Params) -> Float[Array, "D V"]:
    """Returns the output projection: logits are `hidden @ head`."""

  def score(
    self,
    params: Params,
    prompts: Int[Array, "P N"],
    prompt_mask: Bool[Array, "P N"],
    completions: Int[Array, "P G T"],
  ) -> Float[Array, "P G T D"]:
    """Returns the hidden states that predict each completion token."""

  def prefill(
    self, params: Params, tokens: Int[Array, "P N"], mask: Bool[Array, "P N"]
  ) -> tuple[Float[Array, "P D"], Cache]:
    """Returns the hidden state of each prompt's last token, and the cache of the prompts."""

  def decode(
    self,
    params: Params,
    tokens: Int[Array, "P G"],
    index: Int[Array, ""],
    prefix: Cache,
    prompt_mask: Bool[Array, "P N"],
    cache: Cache,
  ) -> tuple[Float[Array, "P G D"], Cache]:
    """Returns the hidden states after completion token number `index`, and the new cache."""

  def empty_cache(self, params: Params, prompts: int, group: int, length: int) -> Cache:
    """Returns an empty cache for `length` completion tokens of `prompts * group` rows."""


@runtime_checkable
class EpisodeModel(Model, Protocol):
  """Describes a model that can also go on after tokens that it did not write itself.

  Its `decode` also takes an `index` [P, G]: completions may differ in length. Axes: M new tokens of
  each completion.
  """

  def extend(
    self,
    params: Params,
    tokens: Int[Array, "P G M"],
    index: Int[Array, ""] | Int[Array, "P G"],
    prefix: Cache,
    prompt_mask: Bool[Array, "P N"],
    cache: Cache,
  ) -> tuple[Float[Array, "P G M D"], Cache]:
    """Returns the hidden states after M more tokens of each completion, and the new cache.

    Args:
      tokens: the new tokens. A completion with fewer of them is padded with any; a later call with
        the `index` behind its own tokens writes over the padding, which nothing sees.
      index: number of tokens before them: one for all completions, or [P, G]. The cache has room
        for M tokens behind it.
      prefix, prompt_mask, cache: as in `decode`.
    """


def score_of(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
  """Returns the output of a classifier with one label at hidden states, float32.

  Args:
    params: the row `score` [1, D] is read.
    hidden: after the final norm.

  Example:
    >>> score_of({"score": jnp.array([[1.0, 2.0]])}, jnp.array([[3.0, 0.5]])).tolist()
    [4.0]
  """
  head = params["score"][0].astype(jnp.float32)
  return jnp.matmul(hidden.astype(jnp.float32), head, precision="highest")
