"""Scores completions with a learned reward: a sequence classifier with one label.

The model belongs to one of the policy's families (`*ForSequenceClassification` in a Hugging Face
folder or hub id) and has its own tokenizer and chat template. It is called like any reward
function.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.distributed import mesh as meshes
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io.families import FAMILIES, find_family
from grpo_jax.models.io.json_files import read_json
from grpo_jax.models.io.sources import resolve
from grpo_jax.models.io.weights import Weights
from grpo_jax.models.load import open_weights
from grpo_jax.models.protocol import Params, score_of
from grpo_jax.tokens import (
  AnyTokenizer,
  Messages,
  Tokenizer,
  beyond_model,
  fit_to_model,
  load_tokenizer,
)

# Shortest padded length in tokens.
MIN_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """Scores prompts with completions: `model(prompts=..., completions=...)` returns one number each.

  The score is the output at the last token that is not `pad_id`, as in transformers. All batches
  have the same number of rows and one of few lengths, so that few programs are compiled. The
  weights are read at the first call and are sharded over `devices`.

  Attributes:
    name: source of the model, for messages.
    decoder: the model.
    weights: its weights, which are read at the first call.
    tokenizer: its tokenizer.
    pad_id: its padding token, or None.
    batch_size: number of conversations per device and batch.
    devices: devices of this host.
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
    dtype: DTypeLike = jnp.float32,
    batch_size: int = 8,
    devices: Sequence[jax.Device] | None = None,
    date: str | None = None,
  ) -> "RewardModel":
    """Opens and checks a reward model.

    Args:
      source: as in `models.load_model`.
      dtype: of activations.
      batch_size: number of conversations per device and batch.
      devices: devices of this host; None: all of them. Hosts do not wait for each other.
      date: day that its chat template sees, YYYY-MM-DD; None: today.

    Raises:
      ValueError: the model does not have exactly one label, or a file is damaged.
      FileNotFoundError: there is no such model.
    """
    weights = open_weights(source)
    config = weights.config
    if config.labels != 1:
      kind = f"a classifier with {config.labels} labels" if config.labels else "a language model"
      raise ValueError(
        f"{source} is {kind}; a reward model is a *ForSequenceClassification model with one label "
        "(num_labels=1)"
      )
    tokenizer = fit_to_model(load_tokenizer(source, date=date), config.vocab_size)
    return cls(
      name=source,
      decoder=Decoder(config, dtype=dtype),
      weights=weights,
      tokenizer=tokenizer,
      pad_id=read_pad_id(Path(resolve(source).location) / "config.json"),
      batch_size=batch_size,
      devices=tuple(jax.local_devices() if devices is None else devices),
    )

  def __call__(
    self, prompts: Sequence[str | Messages], completions: Sequence[str], **columns: Any
  ) -> list[float]:
    """Returns one score per completion.

    Raises:
      ValueError: a conversation exceeds the context of the model or holds an id that it does not
        have, or a score is not finite.
        Conversations are not truncated, since the score of a part is not that of the whole.
    """
    rows = [self._encode(*pair) for pair in zip(prompts, completions, strict=True)]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    size, scores = self.batch_size * len(self.devices), np.zeros(len(rows))
    for start in range(0, len(rows), size):
      indices = by_length[start : start + size]
      batch = self._pad([rows[i] for i in indices], size)
      batch = jax.device_put(batch, meshes.batch_sharding(self._mesh))
      outputs = jax.device_get(_score_rows(self.decoder, self._params, *batch))
      scores[indices] = outputs[: len(indices)]
    if not np.isfinite(scores).all():
      i = int(np.flatnonzero(~np.isfinite(scores))[0])
      raise ValueError(f"the reward model {self.name} returns {scores[i]} for {completions[i]!r}")
    return scores.tolist()

  def _encode(self, prompt: str | Messages, completion: str) -> list[int]:
    ids = scored_ids(self.tokenizer, prompt, completion, self.pad_id)
    context = self.decoder.config.context
    if not 1 <= len(ids) <= context:
      raise ValueError(
        f"a prompt with its completion has {len(ids)} tokens for the reward model {self.name}, "
        f"which takes 1 to {context}: make rollout.completion_length or the prompts shorter, or "
        "use a reward model with a longer context"
      )
    if problem := beyond_model(self.tokenizer, ids):  # its embedding would be that of another id
      raise ValueError(f"{problem}; it is in a prompt or completion for the reward model")
    return ids

  def _pad(
    self, rows: list[list[int]], count: int
  ) -> tuple[Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
    """Returns left-padded tokens and mask, with empty rows up to `count` rows."""
    length = padded_length(max(map(len, rows)), self.decoder.config.context)
    tokens, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    for row, ids in enumerate(rows):
      tokens[row, length - len(ids) :], mask[row, length - len(ids) :] = ids, True
    return tokens, mask

  @cached_property
  def _params(self) -> Params:
    return self.weights.read(meshes.param_shardings(self._mesh, self.weights.shapes))

  @cached_property
  def _mesh(self) -> jax.sharding.Mesh:
    return meshes.make_mesh((1, len(self.devices), 1), list(self.devices))


def padded_length(longest: int, context: int) -> int:
  """Returns the length that rows are padded to, so that few programs are compiled.

  There are four lengths between a power of two and the next one: at most a fifth is padding, except
  in rows that are shorter than `MIN_LENGTH`.

  Args:
    longest: number of tokens of the longest row.
    context: context of the model in tokens, which is the longest length.

  Example:
    >>> [padded_length(longest, context=1000) for longest in (9, 64, 65, 97, 129, 161, 900)]
    [64, 64, 80, 112, 160, 192, 1000]
  """
  longest = max(longest, MIN_LENGTH)
  step = 1 << (longest - 1).bit_length() - 3
  return min(-(-longest // step) * step, context)


def scored_ids(
  tokenizer: AnyTokenizer,
  prompt: str | Messages,
  completion: str | Messages,
  pad_id: int | None,
) -> list[int]:
  """Returns the ids of a conversation up to its last token that is not `pad_id`, where it is read.

  Args:
    prompt, completion: as in `Tokenizer.encode_exchange`.
    pad_id: padding token of the model, or None.
  """
  ids = tokenizer.encode_exchange(prompt, completion)
  while len(ids) > 1 and ids[-1] == pad_id:
    ids.pop()
  return ids


def read_pad_id(path: Path) -> int | None:
  """Returns the padding token of a config.json: that of the language model in a larger one."""
  raw = read_json(path)
  family = FAMILIES[find_family(raw, str(path))[0]]
  language_model = raw.get("text_config") or {} if family.wraps else raw
  pad_id = {**family.defaults, **language_model}.get("pad_token_id")
  if pad_id is not None and type(pad_id) is not int:
    raise ValueError(f"{path}: pad_token_id must be an integer or null, got {pad_id!r}")
  return pad_id


@partial(jax.jit, static_argnums=0)
def _score_rows(
  decoder: Decoder, params: Params, tokens: Int[Array, "B N"], mask: Bool[Array, "B N"]
) -> Float[Array, "B"]:
  """Returns the output of the classifier at the last token of each left-padded row, float32."""
  hidden, _ = decoder.prefill(params, tokens, mask)
  return score_of(params, hidden)
