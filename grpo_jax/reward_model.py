"""A learned reward: a sequence classifier with one label, called like any reward function.

It is a model of the same families as the policy (`*ForSequenceClassification` in a Hugging Face
folder or hub id), with a tokenizer and a chat template of its own.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy import ndarray

from grpo_jax.distributed import mesh as meshes
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io.json_files import read_json
from grpo_jax.models.io.sources import resolve
from grpo_jax.models.io.weights import Weights
from grpo_jax.models.load import open_weights
from grpo_jax.tokens import Messages, Tokenizer, load_tokenizer

SHORTEST = 64  # tokens; conversations are padded to this, or to twice, four times ... as many


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """Scores answered prompts: `model(prompts=..., completions=...)` gives one number for each.

  The score is the output at the last token that is not `pad_id`, as in transformers. Conversations
  are computed in batches of one number of rows and few lengths, so that few programs are compiled.
  The weights are read at the first call and lie split over this host's `devices`.

  Attributes:
    name: where the model comes from, for messages.
    pad_id: the model's padding token, or None.
    batch_size: conversations at once on each device.
  """

  name: str
  decoder: Decoder
  weights: Weights
  tokenizer: Tokenizer
  pad_id: int | None
  batch_size: int
  devices: tuple[jax.Device, ...]

  @classmethod
  def load(
    cls,
    source: str,
    *,
    dtype: Any = jnp.float32,
    batch_size: int = 8,
    devices: Sequence[jax.Device] | None = None,
  ) -> "RewardModel":
    """Opens the model that `source` names (see `models.checkpoints.open_weights`) and checks it.

    Args:
      dtype: of activations.
      devices: of this host; None = all of them. Hosts do not wait for each other.

    Raises ValueError for a model without exactly one label, or whose tokenizer does not fit it.
    """
    weights = open_weights(source)
    config = weights.config
    if config.labels != 1:
      found = f"a classifier with {config.labels} labels" if config.labels else "a language model"
      raise ValueError(
        f"{source} is {found}; a reward model is a *ForSequenceClassification model with one label "
        "(num_labels=1)"
      )
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > config.vocab_size:
      raise ValueError(
        f"the tokenizer of {source} has {tokenizer.vocab_size} ids, its model only "
        f"{config.vocab_size}"
      )
    settings = read_json(Path(resolve(source).location) / "config.json")
    return cls(
      name=source,
      decoder=Decoder(config, dtype=dtype),
      weights=weights,
      tokenizer=tokenizer,
      pad_id=settings.get("pad_token_id"),
      batch_size=batch_size,
      devices=tuple(jax.local_devices() if devices is None else devices),
    )

  def __call__(
    self, prompts: Sequence[str | Messages], completions: Sequence[str], **columns: Any
  ) -> list[float]:
    """Scores, one per completion.

    Raises ValueError for a conversation of more tokens than the model's context: a part of it would
    be scored as if it were all, and beyond its context the model's numbers mean nothing.
    """
    rows = [self._encode(*pair) for pair in zip(prompts, completions, strict=True)]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    size, scores = self.batch_size * len(self.devices), np.zeros(len(rows))
    for start in range(0, len(rows), size):
      part = by_length[start : start + size]
      batch = self._pad([rows[i] for i in part], size)
      batch = jax.device_put(batch, meshes.batch_sharding(self._mesh))
      scores[part] = jax.device_get(_scores(self.decoder, self._params, *batch))[: len(part)]
    if not np.isfinite(scores).all():
      i = int(np.flatnonzero(~np.isfinite(scores))[0])
      raise ValueError(f"the reward model {self.name} gives {scores[i]} to {completions[i]!r}")
    return scores.tolist()

  def _encode(self, prompt: str | Messages, completion: str) -> list[int]:
    ids, context = self.tokenizer.answered(prompt, completion), self.decoder.config.context
    while len(ids) > 1 and ids[-1] == self.pad_id:
      ids.pop()
    if not 1 <= len(ids) <= context:
      raise ValueError(
        f"a prompt with its completion has {len(ids)} tokens under the reward model {self.name}, "
        f"which takes 1 to {context}: make rollout.completion_length or the prompts shorter, or "
        "use a reward model of longer context"
      )
    return ids

  def _pad(self, rows: list[list[int]], count: int) -> tuple[ndarray, ndarray]:
    """The rows padded on the left to one of few lengths, and empty rows up to `count`."""
    longest = max(map(len, rows))
    width = min(max(SHORTEST, 1 << (longest - 1).bit_length()), self.decoder.config.context)
    tokens, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
    for row, ids in enumerate(rows):
      tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
    return tokens, mask

  @cached_property
  def _params(self) -> Any:
    return self.weights.read(meshes.param_shardings(self._mesh, self.weights.shapes))

  @cached_property
  def _mesh(self) -> jax.sharding.Mesh:
    return meshes.make_mesh((1, len(self.devices), 1), list(self.devices))


@partial(jax.jit, static_argnums=0)
def _scores(
  decoder: Decoder, params: Any, tokens: Int[Array, "B N"], mask: Bool[Array, "B N"]
) -> Float[Array, "B"]:
  """The one output of the classifier after the last token of each left-padded row, float32."""
  hidden, _ = decoder.prefill(params, tokens, mask)
  hidden, score = hidden.astype(jnp.float32), params["score"][0].astype(jnp.float32)
  return jnp.matmul(hidden, score, precision="highest")
