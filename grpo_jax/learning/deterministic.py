"""Sums in one order whatever the number of devices: the same bits on any data-parallel width.

Floating-point sums depend on their order, and the compiler's order on the shapes that a device
holds. Here a batch is cut into a fixed number of chunks, all of one shape. A device computes its
chunks one after another; their results meet and are added chunk by chunk, 0 to the last.

Chunks are dealt out: with D devices, round_ i computes chunks i D to i D + D - 1, one on each. What is
added in round i are the gradients of round i - 1, which the loop has carried over: no device fuses
the addition into the computation of a gradient, where a multiply-add would round once and not
twice. The compiler must not know the number of rounds either, or it would unroll a single one.

It costs: each device holds the whole parameters and about three whole gradients while it computes;
gradients are exchanged after every round instead of once; and completions are sampled chunk by chunk
as well, because the last bit of a logit can decide on a token. Where reading the weights limits
decoding, that takes chunks / devices times as long. Layers are not computed again in the backward
pass (`model.remat` is none): what XLA fuses there depends on the devices. On one kind of device and
one version of JAX.
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

from grpo_jax.distributed.mesh import BATCH

AXES = BATCH[0]  # what the chunks are dealt out over


@dataclasses.dataclass(frozen=True)
class Chunks:
  """How a batch is cut.

  Attributes:
    count: chunks; the prompts of a batch are a multiple of it, and it is one of the width.
    mesh: data-parallel over `data` and `fsdp`.

  Errors: ValueError where the mesh does not fit.
  """

  count: int
  mesh: Mesh

  def __post_init__(self) -> None:
    if self.mesh.shape["tensor"] != 1 or self.count % self.width:
      raise ValueError(
        f"train.reduction 'deterministic' needs mesh.tensor=1 and data x fsdp that divides train.chunks="
        f"{self.count}; the mesh is {dict(self.mesh.shape)}"
      )

  @property
  def width(self) -> int:
    """Devices that chunks are dealt out over."""
    return math.prod(self.mesh.shape[axis] for axis in AXES)

  @property
  def rounds(self) -> int:
    """Chunks of a device."""
    return self.count // self.width

  def over(self, body: Callable, out_specs: Any) -> Callable:
    """`body(rounds, params, chunks of this device [rounds, p, ...], base_params)` on every device.

    As a function of (params, rows with prompts as their first axis, base_params, a mask of them).
    """

    def call(params: Any, batch: Any, base_params: Any, mask: jax.Array) -> Any:
      dealt = jax.tree.map(lambda a: a.reshape(self.rounds, self.width, -1, *a.shape[1:]), batch)
      # Always `rounds`, but nothing that the compiler could see through.
      rounds = jnp.where(mask.sum() >= 0, self.rounds, 0)

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
  """`(params, batch, base_params) -> (gradients, losses, metrics, tokens)`, in chunks.

  Args:
    loss: `(params, batch, base_params) -> (loss, metrics)`; the losses of parts of a batch add up.

  Returns: the sum of the gradients, whole on every device; loss, metrics and number of tokens of
  each chunk, [S], in order. They are for another program to combine: here even a division may be
  computed in one way for an array in parts and in another for a whole one.
  """
  gradient, width = jax.value_and_grad(loss, has_aux=True), chunks.width

  def body(rounds: jax.Array, params: Any, mine: Any, base_params: Any) -> Any:
    def one(index: jax.Array) -> Any:
      part = _take(mine, index)
      (value, metrics), grads = gradient(params, part, base_params)
      return grads, {"loss": value, "tokens": part.mask.sum(), **metrics}

    def round_(index: jax.Array, carry: Any) -> Any:
      total, pending, numbers = carry
      grads, found = one(index)
      numbers = jax.tree.map(lambda a, new: a.at[index].set(new), numbers, found)
      return _add(total, pending), _exchange(grads, width), numbers

    shapes = jax.eval_shape(one, jnp.int32(0))
    received = jax.eval_shape(partial(_split, width=width), shapes[0])
    pending = _zeros(received)
    total = jax.tree.map(lambda a: a[0], pending)
    numbers = jax.tree.map(lambda a: jnp.zeros((chunks.rounds, *a.shape), a.dtype), shapes[1])
    total, pending, numbers = jax.lax.fori_loop(0, rounds, round_, (total, pending, numbers))
    total = _add(total, pending)
    return total, jax.tree.map(lambda a: a[:, None], numbers)

  run = chunks.over(body, (P(AXES), P(None, AXES)))

  def call(params: Any, batch: Any, base_params: Any = None) -> Any:
    flat, numbers = run(params, batch, base_params, batch.mask)
    grads = jax.tree.map(lambda a, p: a[: p.size].reshape(p.shape).astype(p.dtype), flat, params)
    numbers = jax.tree.map(lambda a: a.reshape(-1), numbers)
    tokens, losses = numbers.pop("tokens"), numbers.pop("loss")
    return grads, losses, numbers, tokens

  whole = NamedSharding(chunks.mesh, P())
  return jax.jit(call, out_shardings=whole)


def in_chunks(function: Callable, chunks: Chunks) -> Callable:
  """`(params, rows, shared, mask) -> function(params, rows, shared)`, chunk by chunk.

  Args:
    function: of rows, arrays with prompts as their first axis, to a tree of such arrays; rows do
      not look at each other.

  The result is called inside `jit`; `mask` is any mask with prompts as its first axis.
  """

  def body(rounds: jax.Array, params: Any, mine: Any, shared: Any) -> Any:
    def one(index: jax.Array | int) -> Any:
      return function(params, _take(mine, index), shared)

    def round_(index: jax.Array, found: Any) -> Any:
      return jax.tree.map(lambda a, new: a.at[index].set(new), found, one(index))

    shapes = jax.eval_shape(lambda: one(0))
    found = jax.tree.map(lambda a: jnp.zeros((chunks.rounds, *a.shape), a.dtype), shapes)
    found = jax.lax.fori_loop(0, rounds, round_, found)
    return jax.tree.map(lambda a: a[:, None], found)

  run = chunks.over(body, P(None, AXES))

  def call(params: Any, rows: Any, shared: Any, mask: jax.Array) -> Any:
    found = run(params, rows, shared, mask)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), found)

  return call


def make_score(score: Callable, chunks: Chunks) -> Callable:
  """Jitted `(params, batch, base_params=None) -> logp` of `score(params, batch, base_params)`, in chunks."""
  run = in_chunks(score, chunks)

  def call(params: Any, batch: Any, base_params: Any = None) -> jax.Array:
    return run(params, batch, base_params, batch.mask)

  return jax.jit(call, out_shardings=NamedSharding(chunks.mesh, BATCH))


def replicated(function: Callable, mesh: Mesh) -> Callable:
  """`function`, computed whole and in the same way on every device."""
  return jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)


def _take(tree: Any, index: jax.Array | int) -> Any:
  return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def _split(grads: Any, width: int) -> Any:
  """Each gradient as [width, n]: one row for each device, filled up with zeros."""

  def one(a: jax.Array) -> jax.Array:
    return jnp.pad(a.ravel(), (0, -a.size % width)).reshape(width, -1)

  return jax.tree.map(one, grads)


def _exchange(grads: Any, width: int) -> Any:
  """[width, n]: this device's row of the gradients of all devices, in their order."""
  return jax.tree.map(lambda a: jax.lax.all_to_all(a, AXES, 0, 0), _split(grads, width))


def _add(total: Any, pending: Any) -> Any:
  """The rows of `pending` added to `total` one after another."""

  def one(total: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda sum_, row: (sum_ + row, None), total, rows)[0]

  return jax.tree.map(one, total, pending)
