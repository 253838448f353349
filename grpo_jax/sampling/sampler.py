"""Prompts in, completions out, as text and as numbers: a model with its tokenizer on a mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
from grpo_jax.distributed.mesh import Sharding
from grpo_jax.learning import deterministic
from grpo_jax.models.protocol import Model
from grpo_jax.sampling import generate as generation
from grpo_jax.sampling.stopping import stop_table
from grpo_jax.tokens import AnyTokenizer, decode_completions, encode_prompts


@dataclasses.dataclass(frozen=True)
class Generated:
  """Completions of some prompts, as numbers and as text. Arrays are on the host.

  Attributes:
    prompts, prompt_mask: [P, N], N as in `padded_length`.
    tokens, mask, logp, entropy: [P, G, T].
    ended: [P, G], completions that stopped by themselves; the others ran into the budget.
    texts: [P][G], without the ending token and stop string.
  """

  prompts: Int[np.ndarray, "P N"]
  prompt_mask: Bool[np.ndarray, "P N"]
  tokens: Int[np.ndarray, "P G T"]
  mask: Bool[np.ndarray, "P G T"]
  ended: Bool[np.ndarray, "P G"]
  logp: Float[np.ndarray, "P G T"]
  entropy: Float[np.ndarray, "P G T"]
  texts: list[list[str]]

  @property
  def lengths(self) -> Int[np.ndarray, "P G"]:
    """Tokens of each completion, the ending one included."""
    return self.mask.sum(-1)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A model and a tokenizer, ready to complete prompts.

  Attributes:
    prompt_length: tokens of the longest prompt there may be; a batch is padded to `padded_length`.
    completion_length: tokens, the budget.
    temperature: of the distribution that is sampled; 0 is greedy.
    stop: strings that end a completion, wherever token borders fall in them.
    stop_ids: ids that end a completion, besides the tokenizer's own end of text.
    prompt_sharding: layout of arrays whose first axis is prompts; None = the default device.
    stop_table: [S, V], a table of one's own instead (`stopping.stop_table` says what it holds);
      None = made of the stops above.
    chunks: samples chunk by chunk, with the same bits on any number of devices; see `deterministic`.
  """

  model: Any
  tokenizer: AnyTokenizer
  prompt_length: int
  completion_length: int
  temperature: float = 1.0
  stop: tuple[str, ...] = ()
  stop_ids: tuple[int, ...] = ()
  prompt_sharding: Any = None
  stop_table: Int[np.ndarray, "S V"] | None = None
  chunks: deterministic.Chunks | None = None

  def __post_init__(self) -> None:
    ids = tuple(dict.fromkeys((*self.tokenizer.eos_ids, *self.stop_ids)))
    table, vocab = self.stop_table, self.model.config.vocab_size
    if table is None:
      pieces = self.tokenizer.pieces() if self.stop else []
      table = stop_table(pieces, self.stop, ids, vocab)
    elif table.ndim != 2 or table.shape[1] != vocab or not len(table):
      raise ValueError(f"stop_table has shape {table.shape}, must be [S, V] with V = {vocab}")
    jitted = make_generate(
      self.model,
      length=self.completion_length,
      pad_id=self.tokenizer.pad_id,
      prompt_sharding=self.prompt_sharding,
      chunks=self.chunks,
    )
    object.__setattr__(self, "_table", table)
    object.__setattr__(self, "_ends", ids)
    object.__setattr__(self, "_jitted", jitted)

  def __call__(
    self,
    params: Any,
    prompts: Sequence[Any],
    key: jax.Array,
    *,
    group: int,
    temperature: float | None = None,
    first_prompt: int = 0,
  ) -> Generated:
    """G completions for each prompt; `first_prompt` is the number of the first of them.

    Every host gives its block of the prompts, all of the same size, and gets back its completions.
    A completion's random stream is (key, prompt number, sample number): cutting the prompts of a
    step into several calls with the right `first_prompt` changes nothing.
    """
    temperature = self.temperature if temperature is None else temperature
    tokens, mask, _ = encode_prompts(self.tokenizer, prompts, self.prompt_length)
    longest = hosts.gathered(longest=mask.sum(-1).max(keepdims=True))["longest"].max()
    start = self.prompt_length - padded_length(int(longest), self.prompt_length)
    tokens, mask = tokens[:, start:], mask[:, start:]
    first_prompt += hosts.own_shard()[0] * len(tokens)
    ids = first_prompt + np.arange(len(tokens))
    *on_device, ids = hosts.to_global((tokens, mask, ids), self.prompt_sharding)
    keys = _row_keys(key, ids, group)
    out = self._jitted(params, *on_device, keys, self._table, temperature=temperature)
    out = hosts.to_local(out)
    texts = decode_completions(
      self.tokenizer, out.tokens, out.mask, stop=self.stop, stop_ids=self._ends
    )
    return Generated(tokens, mask, out.tokens, out.mask, out.ended, out.logp, out.entropy, texts)


def make_generate(
  model: Model,
  *,
  length: int,
  pad_id: int,
  prompt_sharding: Sharding = None,
  chunks: deterministic.Chunks | None = None,
) -> Callable[..., generation.Completions]:
  """Returns the jitted `(params, prompts, prompt_mask, keys, stop_table, *, temperature)`.

  It is `generate` with as many compactions as the length is worth. `temperature` is static.

  Args:
    model: the model to sample from.
    length: largest number of tokens of a completion.
    pad_id: token after the end of a completion.
    prompt_sharding, chunks: as in `Sampler`.
  """

  def sample(params, prompts, prompt_mask, keys, stop_table, *, temperature):
    in_chunks = chunks is not None and len(prompts) % chunks.count == 0
    generate = partial(
      generation.generate,
      model,
      length=length,
      temperature=temperature,
      pad_id=pad_id,
      max_compactions=generation.compactions(length),
      prompt_shards=1 if in_chunks else meshes.prompt_shards(prompt_sharding),
    )
    if in_chunks:
      run = deterministic.in_chunks(
        lambda params, rows, table: generate(params, *rows, table), chunks
      )
      return run(params, (prompts, prompt_mask, keys), stop_table, prompt_mask)
    return generate(params, prompts, prompt_mask, keys, stop_table)

  return jax.jit(sample, static_argnames="temperature", out_shardings=prompt_sharding)


def padded_length(longest: int, limit: int) -> int:
  """Tokens that a batch of prompts is padded to: quarters of `limit`, and multiples of 16.

  So there are at most four programs, and a batch is padded by less than a quarter of `limit` (and
  15 tokens) beyond its longest prompt.

  >>> [padded_length(longest, 320) for longest in (1, 80, 81, 250)]
  [80, 80, 160, 320]
  >>> padded_length(9, 46), padded_length(40, 46), padded_length(3, 5)
  (16, 46, 5)
  """
  quarter = -(-limit // 64) * 16
  return min(-(-longest // quarter) * quarter, limit)


_row_keys = jax.jit(generation.row_keys, static_argnums=2)
