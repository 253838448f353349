"""Adds in one order on any number of devices: the same bits on any data-parallel width.

Floating-point sums depend on their order, and XLA's order depends on the shapes that a device
holds. Here a batch is cut into a fixed number of chunks of one shape. Each device computes its
chunks one after another, and their results are added chunk by chunk, from 0 to the last.

Chunks are dealt out in rounds. With D devices, round i computes chunks i·D to i·D + D - 1, one on
each device. Round i adds the gradients of round i - 1, which the loop carries over. So XLA cannot
fuse the addition into the computation of a gradient, where a multiply-add would round once instead
of twice. The trip count is hidden from XLA: it would unroll a one-iteration loop.

The costs: each device holds all parameters and about three whole gradients. Gradients are exchanged
after every round instead of once. Completions are sampled chunk by chunk too, because the last bit
of a logit can decide a token; where reading the weights limits decoding, that takes
chunks / devices times as long. Layers cannot be recomputed in the backward pass (`model.remat` must
be none): what XLA fuses there depends on the devices. The bits are the same only on one kind of
device and with one version of JAX.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.core.masks import count_tokens
from grpo_jax.distributed.mesh import BATCH

AXES = BATCH[0]  # mesh axes that chunks are dealt out over


@dataclasses.dataclass(frozen=True)
class Chunks:
  """Cuts a batch into chunks and deals them out over a mesh.

  Attributes:
    count: number of chunks. Divides the number of prompts; a multiple of the number of devices.
    mesh: data-parallel over `data` and `fsdp`.

  Raises:
    ValueError: the mesh has a `tensor` axis, or its number of devices does not divide `count`.
  """

  count: int
  mesh: Mesh

  def __post_init__(self) -> None:
    if self.mesh.shape["tensor"] != 1 or self.count % self.width:
      raise ValueError(
        "train.reduction 'deterministic' needs mesh.tensor=1 and data x fsdp that divides "
        f"train.chunks={self.count}; the mesh is {dict(self.mesh.shape)}"
      )

  @property
  def width(self) -> int:
    """The number of devices that chunks are dealt out over."""
    return math.prod(self.mesh.shape[axis] for axis in AXES)

  @property
  def rounds(self) -> int:
    """The number of chunks per device."""
    return self.count // self.width

  def deal(self, tree: Any) -> Any:
    """Returns arrays with prompts as their first axis as [rounds, devices, p, ...]."""
    return jax.tree.map(lambda a: a.reshape(self.rounds, self.width, -1, *a.shape[1:]), tree)

  def undeal(self, tree: Any) -> Any:
    """Returns arrays [rounds, devices, p, ...] with prompts as their first axis."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), tree)

  def over(self, body: Callable, out_specs: Any) -> Callable:
    """Returns `body` mapped over the devices.

    Args:
      body: `(rounds, params, chunks of this device [rounds, ...], base_params) -> tree`.
      out_specs: partition specs of its results, over `AXES`.

    Returns:
      A function of (params, arrays [rounds, devices, ...], base_params, any mask).
    """

    def call(params: Any, dealt: Any, base_params: Any, mask: jax.Array) -> Any:
      # Hides the trip count from XLA: it would unroll a one-iteration loop.
      rounds = jnp.where(count_tokens(mask) >= 0, self.rounds, 0)

      def local(rounds: jax.Array, params: Any, dealt: Any, base_params: Any) -> Any:
        return body(rounds, params, jax.tree.map(lambda a: a.squeeze(1), dealt), base_params)

      return jax.shard_map(
        local,
        mesh=self.mesh,
        in_specs=(P(), P(), P(None, AXES), P()),
        out_specs=out_specs,
        check_vma=False,
      )(rounds, params, dealt, base_params)

    return call


def make_gradient(loss: Callable, chunks: Chunks) -> Callable:
  """Returns the gradient `(params, batch, base_params) -> (grads, losses, metrics, tokens)`.

  Args:
    loss: `(params, batch, base_params) -> (loss, metrics)`; the losses of the chunks of a batch
      add up to its loss.

  Returns:
    A jitted function whose gradient is the sum over chunks, whole on every device. Loss, metrics
    and number of tokens are those of each chunk in order, [S]. Another program combines them: in
    this one, XLA may compute even a division differently for a sharded and a whole array.
  """
  gradient, width = jax.value_and_grad(loss, has_aux=True), chunks.width

  def body(rounds: jax.Array, params: Any, own: Any, base_params: Any) -> Any:
    def one_chunk(index: jax.Array) -> Any:
      chunk = _take(own, index)
      (value, metrics), grads = gradient(params, chunk, base_params)
      return grads, {"loss": value, "tokens": count_tokens(chunk.mask), **metrics}

    def one_round(index: jax.Array, carry: Any) -> Any:
      total, pending, numbers = carry
      grads, new = one_chunk(index)
      numbers = jax.tree.map(lambda a, b: a.at[index].set(b), numbers, new)
      return _add(total, pending), _exchange(grads, width), numbers

    shapes = jax.eval_shape(one_chunk, jnp.int32(0))
    pending = _zeros(jax.eval_shape(partial(_split, width=width), shapes[0]))
    total = jax.tree.map(lambda a: a[0], pending)
    numbers = jax.tree.map(lambda a: jnp.zeros((chunks.rounds, *a.shape), a.dtype), shapes[1])
    total, pending, numbers = jax.lax.fori_loop(0, rounds, one_round, (total, pending, numbers))
    total = _add(total, pending)
    return total, jax.tree.map(lambda a: a[:, None], numbers)

  run = chunks.over(body, (P(AXES), P(None, AXES)))

  def call(params: Any, batch: Any, base_params: Any = None) -> Any:
    flat, numbers = run(params, chunks.deal(batch), base_params, batch.mask)
    grads = jax.tree.map(lambda a, p: a[: p.size].reshape(p.shape).astype(p.dtype), flat, params)
    numbers = jax.tree.map(lambda a: a.reshape(-1), numbers)
    tokens, losses = numbers.pop("tokens"), numbers.pop("loss")
    return grads, losses, numbers, tokens

  return jax.jit(call, out_shardings=NamedSharding(chunks.mesh, P()))


def in_chunks(function: Callable, chunks: Chunks) -> Callable:
  """Returns `(params, rows, shared, mask) -> function(params, rows, shared)`, chunk by chunk.

  The result is called inside `jit`.

  Args:
    function: maps arrays with prompts as their first axis to a tree of such arrays; each row
      depends on itself alone.

  Returns:
    A function whose `mask` is any mask.
  """
  run = by_chunk(function, chunks)

  def call(params: Any, rows: Any, shared: Any, mask: jax.Array) -> Any:
    return chunks.undeal(run(params, chunks.deal(rows), shared, mask))

  return call


def by_chunk(function: Callable, chunks: Chunks) -> Callable:
  """Returns `in_chunks` for arrays that are dealt out already, and stay so: [rounds, devices, ...].

  Args:
    function: `(params, chunk, shared) -> tree`; the trees of all chunks have the same shapes.
  """

  def body(rounds: jax.Array, params: Any, own: Any, shared: Any) -> Any:
    def one_chunk(index: jax.Array | int) -> Any:
      return function(params, _take(own, index), shared)

    def one_round(index: jax.Array, results: Any) -> Any:
      return jax.tree.map(lambda a, new: a.at[index].set(new), results, one_chunk(index))

    shapes = jax.eval_shape(lambda: one_chunk(0))
    # Unlike `zeros`, `full` also makes random keys.
    results = jax.tree.map(lambda a: jax.lax.full((chunks.rounds, *a.shape), 0, a.dtype), shapes)
    results = jax.lax.fori_loop(0, rounds, one_round, results)
    return jax.tree.map(lambda a: a[:, None], results)

  return chunks.over(body, P(None, AXES))


def make_score(score: Callable, chunks: Chunks) -> Callable:
  """Returns the jitted `(params, batch, base_params=None) -> score(...)`, chunk by chunk.

  Args:
    score: `(params, batch, base_params) -> logp [P, G, T]`.
  """
  run = in_chunks(score, chunks)

  def call(params: Any, batch: Any, base_params: Any = None) -> jax.Array:
    return run(params, batch, base_params, batch.mask)

  return jax.jit(call, out_shardings=NamedSharding(chunks.mesh, BATCH))


def replicated(function: Callable, mesh: Mesh) -> Callable:
  """Returns `function` computed whole and in the same way on every device."""
  return jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)


def _take(tree: Any, index: jax.Array | int) -> Any:
  return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def _split(grads: Any, width: int) -> Any:
  """Returns each gradient as [width, n], one row per device, padded with zeros."""

  def one(a: jax.Array) -> jax.Array:
    return jnp.pad(a.ravel(), (0, -a.size % width)).reshape(width, -1)

  return jax.tree.map(one, grads)


def _exchange(grads: Any, width: int) -> Any:
  """Returns this device's row of the gradients of all devices in order, [width, n]."""
  return jax.tree.map(lambda a: jax.lax.all_to_all(a, AXES, 0, 0), _split(grads, width))


def _add(total: Any, pending: Any) -> Any:
  """Adds the rows of `pending` to `total`, one after another."""

  def one(total: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda sum_, row: (sum_ + row, None), total, rows)[0]

  return jax.tree.map(one, total, pending)
