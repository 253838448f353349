"""Computes attention over whole rows with kernels that never write scores to main memory.

Each kernel has the signature of `attention.tiled_attention`, except that `window` is a number or
None and there is no `local`: `by_layer` adapts a kernel to `Decoder.attention`. Axes: P prompts,
S = N + G T' tokens of a row, N prompt tokens, T' tokens of each of its G completions, H query
heads, K key-value heads, d head size. "Blocks" in the names of Pallas are tiles here.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jaxtyping import Bool, Float

from grpo_jax.core.checks import Array
from grpo_jax.models.attention import tiled_attention

LANES = 128  # lanes of a TPU vector register; head sizes are padded to a multiple of it
# Tile sizes of splash attention in queries and keys, and the cost of starting one more tile, in
# query-key pairs: the size with the lowest total cost is used. 2**17 pairs are about a third of a
# microsecond on a TPU v5e; this was estimated, not measured.
SPLASH_TILES, TILE_COST = (512, 256, 128), 2**17
# Number of scores of one head of one sequence from which `for_long_rows` uses a kernel.
MIN_SCORES = 2**18


# --- splash attention -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TreeMask(pallas.Mask):
  """Masks attention in a row of `prompt + group * length` slots; computed one tile at a time.

  A completion sees the prompt and itself causally. With a window, it sees the last `window` slots
  of its own path: the prompt followed by the completion itself, whatever the completion's index.

  Attributes:
    prompt: slots of the prompt.
    length: slots of each completion.
    group: completions per prompt, G.
    window: window size in slots; None means unlimited.

  Example:
    >>> TreeMask(prompt=2, length=2, group=2)[:, :].astype(int)
    array([[1, 0, 0, 0, 0, 0],
           [1, 1, 0, 0, 0, 0],
           [1, 1, 1, 0, 0, 0],
           [1, 1, 1, 1, 0, 0],
           [1, 1, 0, 0, 1, 0],
           [1, 1, 0, 0, 1, 1]])
  """

  prompt: int
  length: int = 0
  group: int = 0
  window: int | None = None

  @property
  def shape(self) -> tuple[int, int]:
    """Returns the number of queries and of keys."""
    return (self.prompt + self.group * self.length,) * 2

  def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
    queries, keys = (np.arange(*part.indices(self.shape[0]), dtype=np.int32) for part in index)
    (query_part, i), (key_part, j) = self._locate(queries), self._locate(keys)
    shape = queries.size, keys.size
    # Within one part of the row each, all pairs of a tile are often masked alike.
    if (query_part[0], key_part[0]) == (query_part[-1], key_part[-1]):
      nearest, farthest = i[0] - j[-1], i[-1] - j[0]
      if key_part[0] not in (0, query_part[0]) or farthest < 0 or nearest >= self._window:
        return _constant(False, shape)
      if nearest >= 0 and farthest < self._window:
        return _constant(True, shape)
    distance = i[:, None] - j
    same_path = (key_part == 0) | (key_part == query_part[:, None])
    return same_path & (distance >= 0) & (distance < self._window)

  @property
  def _window(self) -> int:
    return self.shape[0] if self.window is None else self.window

  def _locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each slot its part (0: prompt, 1..G: completion) and its position in the path."""
    completion, offset = np.divmod(slots - self.prompt, max(self.length, 1))
    in_prompt = slots < self.prompt
    part = np.where(in_prompt, 0, completion + 1)
    return part, np.where(in_prompt, slots, self.prompt + offset)

  def count_tiles(self, size: int) -> int:
    """Returns the number of `size` x `size` tiles with at least one visible pair.

    Args:
      size: side of a tile in slots; divides `prompt` and `length`.
    """
    window = None if self.window is None else (self.window + size - 2) // size + 1
    coarse = TreeMask(self.prompt // size, self.length // size, self.group, window)
    return int(coarse[:, :].sum())


@lru_cache(maxsize=8)
def _constant(value: bool, shape: tuple[int, int]) -> np.ndarray:
  return np.full(shape, value)


def splash(
  q: Float[Array, "P S H d"],
  k: Float[Array, "P S K d"],
  v: Float[Array, "P S K d"],
  prompt_mask: Bool[Array, "P N"],
  *,
  group: int = 0,
  window: int | None = None,
  scale: float,
  softcap: float | None = None,
  interpret: bool = False,
) -> Float[Array, "P S H d"]:
  """Computes `tiled_attention` with splash attention, JAX's kernel for TPUs.

  Prompts are padded on the left and completions on the right, so that each starts at a tile. Tiles
  of one kind are then identical: the kernel stores one mask for the diagonal (and two for the edge
  of a window) and skips the tiles of other completions. Padding before a prompt is a segment of its
  own; padding after a completion is later than every real token of it. Distances in slots equal
  distances in tokens, because all slots between two real tokens of a path are real.

  Args:
    group: completions per prompt, G; 0 if the rows are prompts only.
    window: number of real tokens that a query sees, including itself; None means unlimited.
    scale: factor on `q · k`.
    softcap: soft cap of the scores, as in `group_attention`.
    interpret: run in Pallas's interpreter, slowly and without a TPU; for tests.
  """
  prompts, slots, heads, dim = q.shape
  n = prompt_mask.shape[1]
  length = (slots - n) // group if group else 0
  group = group if length else 0
  masks = {
    size: TreeMask(_round_up(n, size), _round_up(length, size), group, window)
    for size in SPLASH_TILES
  }
  tile = min(masks, key=lambda size: masks[size].count_tiles(size) * (size**2 + TILE_COST))
  mask = masks[tile]
  pad_prompt, pad_completion = mask.prompt - n, mask.length - length
  pad_dim = _round_up(dim, LANES) - dim

  def pad(x: Array) -> Array:  # [P, S, H, d] -> [P, H, padded slots, padded head size]
    parts = [jnp.pad(x[:, :n], [(0, 0), (pad_prompt, 0), (0, 0), (0, pad_dim)])]
    if group:
      own = x[:, n:].reshape(prompts, group, length, *x.shape[2:])
      own = jnp.pad(own, [(0, 0), (0, 0), (0, pad_completion), (0, 0), (0, pad_dim)])
      parts.append(own.reshape(prompts, group * mask.length, *own.shape[3:]))
    return jnp.concatenate(parts, axis=1).swapaxes(1, 2)

  real = jnp.pad(prompt_mask, [(0, 0), (pad_prompt, 0)])
  completions = jnp.ones((prompts, group * mask.length), bool)
  segments = jnp.concatenate([real, completions], axis=1).astype(jnp.int32)
  kernel = pallas.make_splash_mha(
    mask=pallas.MultiHeadMask((mask,) * heads),
    block_sizes=pallas.BlockSizes(*(tile,) * 8),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap,
    interpret=interpret,
  )

  def attend(q, k, v, segments):
    return kernel(q, k, v, pallas.SegmentIds(segments, segments))

  rows, size = mask.count_tiles(tile) * tile * prompts * heads, dim + pad_dim
  with cost_scope(operations=2 * rows * tile * size, rereads=2 * rows * size * q.dtype.itemsize):
    mixed = jax.vmap(attend)(pad(q * scale), pad(k), pad(v), segments)
  mixed = mixed.swapaxes(1, 2)[..., :dim]
  own = mixed[:, mask.prompt :].reshape(prompts, group, mask.length, heads, dim)
  own = own[:, :, :length].reshape(prompts, group * length, heads, dim)
  return jnp.concatenate([mixed[:, pad_prompt : mask.prompt], own], axis=1)


def _round_up(size: int, unit: int) -> int:
  """Returns `size` rounded up to a multiple of `unit`."""
  return -(-size // unit) * unit


def cost_scope(*, operations: int, rereads: int = 0) -> AbstractContextManager:
  """Returns a named scope that states the cost of the kernels called in it.

  `plan.flops.kernel_cost` reads the name back: neither XLA's cost analysis nor `plan` can see into
  a kernel.

  Args:
    operations: FLOPs of one matrix product over all query-key pairs that the kernel visits.
    rereads: bytes of operands that the kernel reads repeatedly during all its products.
  """
  return jax.named_scope(f"kernel_{operations}_ops_{rereads}_bytes")


# --- cuDNN ----------------------------------------------------------------------------------------


def cudnn(
  q: Float[Array, "P S H d"],
  k: Float[Array, "P S K d"],
  v: Float[Array, "P S K d"],
  prompt_mask: Bool[Array, "P N"],
  *,
  group: int = 0,
  window: int | None = None,
  scale: float,
  softcap: float | None = None,
  implementation: str = "cudnn",
) -> Float[Array, "P S H d"]:
  """Computes `tiled_attention` with the flash attention of cuDNN.

  In linear memory cuDNN supports causal rows but not trees. A row is therefore one completion after
  its prompt, rotated so that the padding comes last, where it is later than every real token. This
  repeats the prompt's keys and its attention to itself for each completion. Memory stays linear in
  tokens, and the products with weights still compute a prompt once. Merging two sources by their
  log-sum-exp would repeat nothing, but `jax.nn.dot_product_attention` drops the gradient of the
  log-sum-exp that it returns.

  Args:
    group: completions per prompt, G; 0 if the rows are prompts only.
    window: number of real tokens that a query sees, including itself; None means unlimited.
    scale: factor on `q · k`.
    softcap: must be None.
    implementation: `implementation` of `jax.nn.dot_product_attention`; "xla" runs everywhere, for
      tests.

  Raises:
    ValueError: `softcap` is given.
  """
  if softcap is not None:
    raise ValueError(f"softcap is {softcap}: cuDNN cannot cap scores; use attention 'tiled'")
  prompts, slots, heads, dim = q.shape
  n = prompt_mask.shape[1]
  length = (slots - n) // group if group else 0
  group = group if length else 1
  total = _round_up(n + length, 2)  # cuDNN: gradients need an even length
  padding = n - prompt_mask.sum(-1)
  index = jnp.arange(total)
  forth = (index + padding[:, None]) % total  # the slot that each slot of a rotated row comes from
  back = (index - padding[:, None]) % total

  @jax.vmap
  def take(rows: Array, order: Array) -> Array:  # [P, G, N + T', ...], [P, N + T']
    return rows.at[:, order].get(unique_indices=True, mode="promise_in_bounds")

  def to_rows(x: Array) -> Array:  # [P, S, H, d] -> [P G, N + T', H, d]
    rest = x.shape[2:]
    repeated = jnp.broadcast_to(x[:, None, :n], (prompts, group, n, *rest))
    rows = jnp.concatenate([repeated, x[:, n:].reshape(prompts, group, length, *rest)], axis=2)
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, total - n - length), (0, 0), (0, 0)])
    return take(rows, forth).reshape(-1, total, *rest)

  pairs = sum(min(i + 1, window or total) for i in range(total))
  with cost_scope(operations=2 * pairs * prompts * group * heads * dim):
    mixed = jax.nn.dot_product_attention(
      to_rows(q), to_rows(k), to_rows(v),
      scale=scale,
      is_causal=True,
      local_window_size=None if window is None else (window - 1, 0),
      implementation=implementation,
    )  # fmt: skip
  mixed = take(mixed.reshape(prompts, group, total, heads, dim), back)
  own = mixed[:, :, n : n + length].reshape(prompts, slots - n, heads, dim)
  return jnp.concatenate([mixed[:, 0, :n], own], axis=1)


# --- the choice of a kernel -----------------------------------------------------------------------

KERNELS: dict[str, Callable[..., Array]] = {"splash": splash, "cudnn": cudnn}


def by_layer(kernel: Callable[..., Array]) -> Callable[..., Array]:
  """Adapts a kernel to `Decoder.attention`: it gets the window in local layers only."""

  def attend(q, k, v, prompt_mask, local=None, *, window=0, **options):
    unlimited, windowed = partial(kernel, **options), partial(kernel, window=window, **options)
    if local is None or isinstance(local, bool | np.bool_):
      return (windowed if local else unlimited)(q, k, v, prompt_mask)
    return jax.lax.cond(local, windowed, unlimited, q, k, v, prompt_mask)

  return attend


def for_long_rows(kernel: Callable[..., Array]) -> Callable[..., Array]:
  """Uses `kernel` for rows with at least `MIN_SCORES` scores, `tiled_attention` for shorter ones.

  Scores are counted for one head of one sequence, a prompt or a completion.
  """

  def attend(q, k, v, prompt_mask, *args, group=0, **options):
    n = prompt_mask.shape[1]
    length = (q.shape[1] - n) // group if group else 0
    is_long = max(n * n, length * (n + length)) >= MIN_SCORES
    attention = kernel if is_long else tiled_attention
    return attention(q, k, v, prompt_mask, *args, group=group, **options)

  return attend
