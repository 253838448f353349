"""Completes prompts given as text, with a model and a tokenizer on a mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
from grpo_jax.distributed.mesh import Sharding
from grpo_jax.learning import deterministic
from grpo_jax.models.protocol import Model, Params
from grpo_jax.sampling import generate as generation
from grpo_jax.sampling import refill
from grpo_jax.sampling.filters import TokenFilter
from grpo_jax.sampling.generate import Completions
from grpo_jax.sampling.stopping import stop_table
from grpo_jax.tokens import AnyTokenizer, Messages, decode_completions, encode_prompts, fit_to_model


@dataclasses.dataclass(frozen=True)
class Generated:
  """Prompts and their completions, as arrays on the host and as text.

  Attributes:
    prompts, prompt_mask: [P, N], left-padded to `padded_length`.
    tokens, mask: [P, G, T]; the mask is true up to and including the ending token.
    ended: [P, G], true for completions that stopped by themselves; the others were cut off at the
      token budget.
    logp, entropy: [P, G, T], nats, at `temperature` (at 1 for greedy completions).
    texts: [P][G], without the ending token and the stop string.
    temperature: sampling temperature; 0 is greedy.
    row_steps: [P], decode steps times rows of the cache, shared out over the prompts; None if they
      are not counted.
    routes, prompt_routes: [P, G, T, C] and [P, N, C], the experts that were chosen, as in
      `generate.Completions`; None where they are not recorded.
    staleness: [P, G, T], steps between the parameters that drew each token and those of the step;
      None if all tokens are from the same ones.
  """

  prompts: Int[np.ndarray, "P N"]
  prompt_mask: Bool[np.ndarray, "P N"]
  tokens: Int[np.ndarray, "P G T"]
  mask: Bool[np.ndarray, "P G T"]
  ended: Bool[np.ndarray, "P G"]
  logp: Float[np.ndarray, "P G T"]
  entropy: Float[np.ndarray, "P G T"]
  texts: list[list[str]]
  temperature: float = 1.0
  row_steps: Float[np.ndarray, "P"] | None = None
  routes: Integer[np.ndarray, "P G T C"] | None = None
  prompt_routes: Integer[np.ndarray, "P N C"] | None = None
  staleness: Float[np.ndarray, "P G T"] | None = None

  @property
  def lengths(self) -> Int[np.ndarray, "P G"]:
    """Number of tokens of each completion, the ending token included."""
    return self.mask.sum(-1)

  @property
  def row_lengths(self) -> Int[np.ndarray, "P G"]:
    """Number of tokens of each row without padding: `lengths`, unless others wrote too."""
    return self.lengths


@dataclasses.dataclass(frozen=True)
class Prepared:
  """The inputs of a call that starts from prompts.

  Attributes:
    prompts, prompt_mask: [P, N], of this host, left-padded to `padded_length`.
    on_device: the same and the random keys [P, G], of all hosts, on the device.
    stop_table: [S, V], made from the stops; see `stopping.stop_table`.
    how: `temperature` and `token_filter`, as the sampling programs take them.
  """

  prompts: Int[np.ndarray, "P N"]
  prompt_mask: Bool[np.ndarray, "P N"]
  on_device: tuple[jax.Array, jax.Array, jax.Array]
  stop_table: Int[np.ndarray, "S V"]
  how: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Completes prompts with a model and a tokenizer; parameters are an argument of each call.

  Attributes:
    prompt_length: tokens of the longest prompt allowed; a batch is padded to `padded_length`.
    completion_length: tokens of the longest completion.
    temperature: sampling temperature. It is recorded in every result, and from there in the batch,
      so that the update scores the distribution that was sampled.
    stop: strings that end a completion, wherever token borders fall in them. One that is the text
      of a special token also stands for the id of that token.
    stop_ids: token ids that end a completion, in addition to the tokenizer's end of text.
    prompt_sharding: sharding of arrays whose first axis is prompts; None is the default device.
    stop_table: [S, V], a table that replaces the one made from the stops (`stopping.stop_table`
      describes it).
    chunks: samples chunk by chunk, with the same bits on any number of devices; see
      `learning.deterministic`.
    cache_rows: completions of a shard of the prompts that are in the cache at a time; see
      `refill`. 0: all of them.

  Raises:
    ValueError: the temperature is negative, the stop table has another shape, a stop string mixes
      text with a special token that begins, ends or pads texts, or nothing can end a completion.
  """

  model: Model
  tokenizer: AnyTokenizer
  prompt_length: int
  completion_length: int
  temperature: float = 1.0
  stop: tuple[str, ...] = ()
  stop_ids: tuple[int, ...] = ()
  prompt_sharding: Sharding = None
  stop_table: Int[np.ndarray, "S V"] | None = None
  chunks: deterministic.Chunks | None = None
  cache_rows: int = 0

  def __post_init__(self) -> None:
    table, vocab = self.stop_table, self.model.config.vocab_size
    object.__setattr__(self, "tokenizer", fit_to_model(self.tokenizer, vocab))
    special = self.tokenizer.marker_ids(self.stop) if self.stop else []
    ids = tuple(dict.fromkeys((*self.tokenizer.eos_ids, *self.stop_ids, *special)))
    if table is None:
      pieces = self.tokenizer.pieces() if self.stop else []
      table = stop_table(pieces, self.stop, ids, vocab)
    elif table.ndim != 2 or table.shape[1] != vocab or not len(table):
      raise ValueError(f"stop_table has shape {table.shape}, must be [S, V] with V = {vocab}")
    check_temperature(self.temperature)
    program = make_generate(
      self.model,
      length=self.completion_length,
      pad_id=self.tokenizer.pad_id,
      prompt_sharding=self.prompt_sharding,
      chunks=self.chunks,
      cache_rows=self.cache_rows,
    )
    object.__setattr__(self, "_table", table)
    object.__setattr__(self, "_ending_ids", ids)
    object.__setattr__(self, "_program", program)

  def __call__(
    self,
    params: Params,
    prompts: Sequence[str | Messages],
    key: jax.Array,
    *,
    group: int,
    temperature: float | None = None,
    token_filter: TokenFilter | None = None,
    first_prompt: int = 0,
  ) -> Generated:
    """Samples G completions for each prompt.

    Each host passes its own block of prompts, all blocks of one size, and gets its completions.
    The random stream of a completion is a function of (key, prompt number, sample number), so
    splitting the prompts of a step over several calls with the right `first_prompt` changes
    nothing.

    Args:
      params: parameters of the model, stacked or in a layout for decoding.
      prompts: text or chat messages.
      group: number of completions per prompt, G.
      temperature: replaces the sampler's own; 0 is greedy.
      token_filter: samples from part of the vocabulary. For evaluation only: an update would score
        another distribution than was sampled.
      first_prompt: number of the first prompt of the first host.
    """
    return self.begin(
      params, prompts, key, group=group, temperature=temperature, token_filter=token_filter,
      first_prompt=first_prompt,
    )()  # fmt: skip

  def begin(
    self,
    params: Params,
    prompts: Sequence[str | Messages],
    key: jax.Array,
    *,
    group: int,
    temperature: float | None = None,
    token_filter: TokenFilter | None = None,
    first_prompt: int = 0,
  ) -> Callable[[], Generated]:
    """Starts the program of a call, and returns the function that waits for its result.

    The function only fetches and decodes, so that it may be called in another thread.
    """
    start = self.prepare(prompts, key, group, first_prompt, temperature, token_filter)
    out = self._program(params, *start.on_device, start.stop_table, **start.how)

    def finish() -> Generated:
      local = hosts.to_local(out)
      return Generated(
        prompts=start.prompts,
        prompt_mask=start.prompt_mask,
        **vars(local),
        texts=self.texts(local.tokens, local.mask),
        temperature=start.how["temperature"],
      )

    return finish

  def given(self, prompts: Sequence[str | Messages], texts: Sequence[Sequence[str]]) -> Generated:
    """Returns completions that were written elsewhere, as if they had been sampled.

    Each ends with the tokenizer's end of text. Their log-probs and entropies are 0: whoever wrote
    them would write nothing else.

    Args:
      prompts: text or chat messages, of this host.
      texts: G completions of each.

    Raises:
      ValueError: a prompt or a completion is too long, or the tokenizer has no end of text.
    """
    if not self.tokenizer.eos_ids:
      raise ValueError(
        f"the tokenizer {self.tokenizer.name!r} has no end of text for the end of given completions"
      )
    encoded = self.encode(prompts)
    shape = (len(texts), len(texts[0]), self.completion_length)
    tokens, mask = np.full(shape, self.tokenizer.pad_id, np.int32), np.zeros(shape, bool)
    for p, group in enumerate(texts):
      for g, text in enumerate(group):
        ids = [*self.tokenizer.encode_plain(text), self.tokenizer.eos_ids[0]]
        if len(ids) > self.completion_length:
          raise ValueError(
            f"the given completion {text[:80]!r} has {len(ids)} tokens with the end of text, more "
            f"than the completion length of {self.completion_length}"
          )
        tokens[p, g, : len(ids)], mask[p, g, : len(ids)] = ids, True
    certain = np.zeros(shape, np.float32)
    return Generated(
      *encoded,
      tokens=tokens,
      mask=mask,
      ended=np.ones(shape[:2], bool),
      logp=certain,
      entropy=certain,
      texts=[[*group] for group in texts],
      temperature=self.temperature,
    )

  def prepare(
    self,
    prompts: Sequence[str | Messages],
    key: jax.Array,
    group: int,
    first_prompt: int = 0,
    temperature: float | None = None,
    token_filter: TokenFilter | None = None,
  ) -> Prepared:
    """Encodes prompts, moves them to the device and folds the random keys; arguments as of a call.

    Raises:
      ValueError: a prompt is too long, or the temperature is out of range.
    """
    temperature = self.temperature if temperature is None else check_temperature(temperature)
    tokens, mask = self.encode(prompts)
    ids = first_prompt + hosts.own_shard()[0] * len(tokens) + np.arange(len(tokens))
    *on_device, ids = hosts.to_global((tokens, mask, ids), self.prompt_sharding)
    if token_filter is not None and token_filter.is_off:
      token_filter = None
    how = {"temperature": temperature, "token_filter": token_filter}
    return Prepared(tokens, mask, (*on_device, _row_keys(key, ids, group)), self._table, how)

  def encode(
    self, prompts: Sequence[str | Messages]
  ) -> tuple[Int[np.ndarray, "P N"], Bool[np.ndarray, "P N"]]:
    """Returns the tokens of prompts and their mask, left-padded to `padded_length`.

    Raises:
      ValueError: a prompt is too long.
    """
    tokens, mask, _ = encode_prompts(self.tokenizer, prompts, self.prompt_length)
    longest = hosts.gathered(longest=mask.sum(-1).max(keepdims=True))["longest"].max()
    start = self.prompt_length - padded_length(int(longest), self.prompt_length)
    return tokens[:, start:], mask[:, start:]

  @property
  def table(self) -> Int[np.ndarray, "S V"]:
    """The stop table in use: that of the stops, or the one that replaces it."""
    return self._table

  def texts(
    self, tokens: Int[np.ndarray, "P G T"], mask: Bool[np.ndarray, "P G T"]
  ) -> list[list[str]]:
    """Returns the texts of completions, without the ending token and the stop string."""
    return decode_completions(
      self.tokenizer, tokens, mask, stop=self.stop, stop_ids=self._ending_ids
    )


def for_decoding(model: Model, params: Params, prompt_sharding: Sharding) -> Params:
  """Returns parameters in the layout that decodes fastest on the devices of a sharding.

  A model may have a method `for_decoding(params, platform)`, as `models.decoder.Decoder` does.
  """
  if not hasattr(model, "for_decoding"):
    return params
  devices = prompt_sharding.mesh.devices.flat if prompt_sharding else jax.devices()
  return model.for_decoding(params, devices[0].platform)


def make_generate(
  model: Model,
  *,
  length: int,
  pad_id: int,
  prompt_sharding: Sharding = None,
  chunks: deterministic.Chunks | None = None,
  cache_rows: int = 0,
) -> Callable[..., Completions]:
  """Returns the jitted `(params, prompts, prompt_mask, keys, stop_table, *, temperature, ...)`.

  It is `generate.generate` with as many compactions as the length is worth; `temperature` and
  `token_filter` are static. The parameters are brought into the layout of `for_decoding`.

  Args:
    length, pad_id: as in `generate.generate`.
    prompt_sharding: sharding of arrays whose first axis is prompts; None is the default device.
    chunks: samples chunk by chunk where the number of prompts allows it; see
      `learning.deterministic`.
    cache_rows: as in `Sampler`.
  """

  def sample(params, prompts, prompt_mask, keys, stop_table, *, temperature, token_filter=None):
    params = for_decoding(model, params, prompt_sharding)
    in_chunks = chunks is not None and len(prompts) % chunks.count == 0
    if cache_rows and not in_chunks:
      shards = meshes.prompt_shards(prompt_sharding)
      rows = min(cache_rows, keys.size // shards)
      options = {"length": length, "temperature": temperature, "token_filter": token_filter}
      options |= {"pad_id": pad_id, "prompt_shards": shards, "rows": rows}
      return refill.generate_refilled(
        model, params, prompts, prompt_mask, keys, stop_table, **options
      )
    generate = partial(
      generation.generate,
      model,
      length=length,
      temperature=temperature,
      token_filter=token_filter,
      pad_id=pad_id,
      max_compactions=generation.compactions(length),
      prompt_shards=1 if in_chunks else meshes.prompt_shards(prompt_sharding),
    )
    if not in_chunks:
      return generate(params, prompts, prompt_mask, keys, stop_table)
    by_chunk = deterministic.in_chunks(
      lambda params, rows, stop_table: generate(params, *rows, stop_table), chunks
    )
    return by_chunk(params, (prompts, prompt_mask, keys), stop_table, prompt_mask)

  static = ("temperature", "token_filter")
  return jax.jit(sample, static_argnames=static, out_shardings=prompt_sharding)


def check_temperature(temperature: float) -> float:
  """Returns a sampling temperature as a float.

  Raises:
    ValueError: it is negative or not finite.

  Example:
    >>> check_temperature(1)
    1.0
  """
  if not 0 <= temperature < float("inf"):
    raise ValueError(f"temperature is {temperature}, it must be finite and 0 (greedy) or above")
  return float(temperature)


def padded_length(longest: int, limit: int) -> int:
  """Returns the number of tokens that a batch of prompts is padded to.

  It is a multiple of a quarter of `limit`, rounded up to 16 tokens. So there are at most four
  programs, and a batch has less than a quarter of `limit` plus 15 tokens of padding beyond its
  longest prompt.

  Args:
    longest: tokens of the longest prompt in the batch.
    limit: tokens of the longest prompt allowed.

  Example:
    >>> [padded_length(longest, 320) for longest in (1, 80, 81, 250)]
    [80, 80, 160, 320]
    >>> padded_length(9, 46), padded_length(40, 46), padded_length(3, 5)
    (16, 46, 5)
  """
  quarter = -(-limit // 64) * 16
  return min(-(-longest // quarter) * quarter, limit)


_row_keys = jax.jit(generation.row_keys, static_argnums=2)
