"""Attention of whole rows by kernels that never write scores to main memory.

Each takes and returns what `attention.tiled_attention` does, but for `window`, which is a number or None
here: `each_layer` chooses between the two. Axes: P prompts, S = N + G T' tokens of a row, N of its
prompt, T' of each of its G completions, H query heads, K key-value heads, d head width.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jaxtyping import Bool, Float

from grpo_jax.core.checks import Array
from grpo_jax.models.attention import tiled_attention

LANES = 128  # of a TPU: head widths are multiples of it
# Queries and keys that splash attention works on at a time: what costs least if going on to the
# next block takes as long as so many pairs of them do. That is what a third of a microsecond is
# worth on a TPU v5e; it was not measured here.
SPLASH_BLOCKS, STEP = (512, 256, 128), 2**17
# Scores of one head and sequence from which on `where_long` takes a kernel.
LARGE = 2**18


# --- splash attention -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tree(pallas.Mask):
  """Who sees whom in a row of `prompt + group * length` slots, asked for a block at a time.

  A completion sees the prompt and itself causally; with a window, the last `window` slots on the
  way from it to the prompt's first, whatever number the completion has.

  >>> Tree(prompt=2, length=2, group=2)[:, :].astype(int)
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
    return (self.prompt + self.group * self.length,) * 2

  def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
    rows, columns = (np.arange(*one.indices(self.shape[0]), dtype=np.int32) for one in index)
    (to, i), (of, j) = self._place(rows), self._place(columns)
    if (to[0], of[0]) == (to[-1], of[-1]):  # of two parts: the whole block is often alike
      near, far = i[0] - j[-1], i[-1] - j[0]
      if of[0] not in (0, to[0]) or far < 0 or near >= self._window:
        return _all(False, (rows.size, columns.size))
      if near >= 0 and far < self._window:
        return _all(True, (rows.size, columns.size))
    distance = i[:, None] - j
    seen = (of == 0) | (of == to[:, None])
    return seen & (distance >= 0) & (distance < self._window)

  @property
  def _window(self) -> int:
    return self.shape[0] if self.window is None else self.window

  def _place(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its completion, counted from 1, or 0 in the prompt; and slots between it and the first."""
    part, within = np.divmod(slots - self.prompt, max(self.length, 1))
    inside = slots < self.prompt
    return np.where(inside, 0, part + 1), np.where(inside, slots, self.prompt + within)

  def blocks(self, size: int) -> int:
    """Blocks of `size` x `size` with anything to see; prompt and length are multiples of it."""
    window = None if self.window is None else (self.window + size - 2) // size + 1
    inner = Tree(self.prompt // size, self.length // size, self.group, window)
    return int(inner[:, :].sum())


@lru_cache(maxsize=8)
def _all(value: bool, shape: tuple[int, int]) -> np.ndarray:
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
  """Splash attention, JAX's kernel for TPUs, of the tree that a prompt and its completions are.

  Prompts are padded on the left and completions on the right until each begins with a block. All
  blocks of the same kind are then alike: the kernel holds one mask for the diagonal (and two for a
  window's edge), and never looks at blocks of other completions. Padding in front of a prompt is a
  segment of its own, padding behind a completion comes too late to be seen. Distances in slots
  are distances in tokens: what lies between a real token and a later one is real.

  Args:
    window: a query sees the last so many tokens, itself included; None = all.
    interpret: runs it without a TPU, slowly, for tests.
  """
  prompts, slots, heads, dim = q.shape
  n = prompt_mask.shape[1]
  length = (slots - n) // group if group else 0
  group = group if length else 0
  trees = {size: Tree(_up(n, size), _up(length, size), group, window) for size in SPLASH_BLOCKS}
  block = min(trees, key=lambda size: trees[size].blocks(size) * (size**2 + STEP))
  tree = trees[block]
  front, behind, wide = tree.prompt - n, tree.length - length, _up(dim, LANES) - dim

  def lay(x: Array) -> Array:  # [P, S, H, d] -> [P, H, padded slots, padded width]
    parts = [jnp.pad(x[:, :n], [(0, 0), (front, 0), (0, 0), (0, wide)])]
    if group:
      own = x[:, n:].reshape(prompts, group, length, *x.shape[2:])
      own = jnp.pad(own, [(0, 0), (0, 0), (0, behind), (0, 0), (0, wide)])
      parts.append(own.reshape(prompts, group * tree.length, *own.shape[3:]))
    return jnp.concatenate(parts, axis=1).swapaxes(1, 2)

  real = jnp.pad(prompt_mask, [(0, 0), (front, 0)])
  rest = jnp.ones((prompts, group * tree.length), bool)
  segments = jnp.concatenate([real, rest], axis=1).astype(jnp.int32)
  kernel = pallas.make_splash_mha(
    mask=pallas.MultiHeadMask((tree,) * heads),
    block_sizes=pallas.BlockSizes(*(block,) * 8),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap,
    interpret=interpret,
  )

  def attend(q, k, v, segments):
    return kernel(q, k, v, pallas.SegmentIds(segments, segments))

  met, width = tree.blocks(block) * block * prompts * heads, dim + wide
  with work(operations=2 * met * block * width, rereads=2 * met * width * q.dtype.itemsize):
    mixed = jax.vmap(attend)(lay(q * scale), lay(k), lay(v), segments)
  mixed = mixed.swapaxes(1, 2)[..., :dim]
  own = mixed[:, tree.prompt :].reshape(prompts, group, tree.length, heads, dim)
  own = own[:, :, :length].reshape(prompts, group * length, heads, dim)
  return jnp.concatenate([mixed[:, front : tree.prompt], own], axis=1)


def _up(size: int, unit: int) -> int:
  """The next multiple of `unit`."""
  return -(-size // unit) * unit


def work(*, operations: int, rereads: int = 0) -> Any:
  """A scope whose name says what the kernels called in it do: `costs.py` cannot see inside them.

  Args:
    operations: of one matrix product over all pairs of a query and a key that a kernel looks at.
    rereads: bytes of operands that a kernel reads, over and over, while it does all products.
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
  """Flash attention of cuDNN, which knows causal rows and, in linear memory, no trees.

  So a row here is a completion behind its prompt, with the padding turned around to the end, where
  it is later than all that could see it. That repeats the attention of a prompt to itself for each
  of its completions, and its keys; memory stays linear in tokens, and the products with weights
  still compute a prompt once. Two sources merged by their log-sum-exp would repeat nothing, but the
  gradient of the log-sum-exp that `jax.nn.dot_product_attention` returns is dropped.

  Args:
    window: a query sees the last so many tokens, itself included; None = all.
    softcap: must be None.
    implementation: of `jax.nn.dot_product_attention`; "xla" runs everywhere, for tests.
  """
  if softcap is not None:
    raise ValueError(f"softcap is {softcap}: cuDNN cannot cap scores; use attention 'tiled'")
  prompts, slots, heads, dim = q.shape
  n = prompt_mask.shape[1]
  length = (slots - n) // group if group else 0
  group = group if length else 1
  total, padding = _up(n + length, 2), n - prompt_mask.sum(-1)  # gradients want even lengths
  slot = jnp.arange(total)
  turn = (slot + padding[:, None]) % total  # where each slot of a turned row comes from
  back = (slot - padding[:, None]) % total

  @jax.vmap
  def turned(rows: Array, order: Array) -> Array:  # [P, G, N + T', ...], [P, N + T']
    return rows.at[:, order].get(unique_indices=True, mode="promise_in_bounds")

  def lay(x: Array) -> Array:  # [P, S, H, d] -> [P G, N + T', H, d]
    rest = x.shape[2:]
    first = jnp.broadcast_to(x[:, None, :n], (prompts, group, n, *rest))
    rows = jnp.concatenate([first, x[:, n:].reshape(prompts, group, length, *rest)], axis=2)
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, total - n - length), (0, 0), (0, 0)])
    return turned(rows, turn).reshape(-1, total, *rest)

  met = sum(min(i + 1, window or total) for i in range(total))
  with work(operations=2 * met * prompts * group * heads * dim):
    mixed = jax.nn.dot_product_attention(
      lay(q), lay(k), lay(v),
      scale=scale,
      is_causal=True,
      local_window_size=None if window is None else (window - 1, 0),
      implementation=implementation,
    )  # fmt: skip
  mixed = turned(mixed.reshape(prompts, group, total, heads, dim), back)
  own = mixed[:, :, n : n + length].reshape(prompts, slots - n, heads, dim)
  return jnp.concatenate([mixed[:, 0, :n], own], axis=1)


# --- which ----------------------------------------------------------------------------------------

KERNELS: dict[str, Callable[..., Array]] = {"splash": splash, "cudnn": cudnn}


def each_layer(kernel: Callable[..., Array]) -> Callable[..., Array]:
  """A kernel for `Decoder.attention`: with its window in local layers, without in the others."""

  def attend(q, k, v, prompt_mask, local=None, *, window=0, **options):
    everywhere, near = partial(kernel, **options), partial(kernel, window=window, **options)
    if local is None or isinstance(local, bool | np.bool_):
      return (near if local else everywhere)(q, k, v, prompt_mask)
    return jax.lax.cond(local, near, everywhere, q, k, v, prompt_mask)

  return attend


def where_long(kernel: Callable[..., Array]) -> Callable[..., Array]:
  """`kernel` where `tiled_attention` would make `LARGE` scores or more for one head and sequence."""

  def attend(q, k, v, prompt_mask, *args, group=0, **options):
    n = prompt_mask.shape[1]
    length = (q.shape[1] - n) // group if group else 0
    long = max(n * n, length * (n + length)) >= LARGE
    return (kernel if long else tiled_attention)(
      q, k, v, prompt_mask, *args, group=group, **options
    )

  return attend
