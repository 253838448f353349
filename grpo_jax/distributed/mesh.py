"""The mesh, and the one table that says how parameters lie on it.

Mesh axes: `data` splits the prompts and copies the parameters, `fsdp` splits both, `tensor` splits
heads, MLP and vocabulary. No model contains sharding code: XLA's partitioner follows the layout of
the arrays it is given.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
# Where an array lies; None leaves it to the compiler or the default device.
Sharding: TypeAlias = NamedSharding | None

# Ordered (pattern on the end of a parameter's path, layout); the first that matches counts.
# Layers are stacked on a leading axis, which is never split.
RULES: tuple[tuple[str, P], ...] = (
  (r"(embed|head)$", P("tensor", "fsdp")),
  (r"score$", P()),
  (r"layers/.*norm$", P()),
  (r"final_norm$", P()),
  (r"layers/(q|k|v|gate|up)$", P(None, "fsdp", "tensor")),
  (r"layers/(o|down)$", P(None, "tensor", "fsdp")),
  (r"layers/(q|k|v|gate|up)_bias$", P(None, "tensor")),
  (r"layers/(o|down)_bias$", P()),
  # Low-rank pairs [in, r] and [r, out]: split where their matrix is, whole along the rank.
  (r"layers/(q|k|v|gate|up)_lora_a$", P(None, "fsdp", None)),
  (r"layers/(q|k|v|gate|up)_lora_b$", P(None, None, "tensor")),
  (r"layers/(o|down)_lora_a$", P(None, "tensor", None)),
  (r"layers/(o|down)_lora_b$", P(None, None, "fsdp")),
)
BATCH = P(("data", "fsdp"))
# Where a model is told how a value lies. With weights split over `fsdp` and no word on this, the
# partitioner leaves the weights where they are, and all devices compute on all prompts; told that
# hidden states stay with their prompts, it gathers the weights of one layer at a time.
PLACES = {"hidden": BATCH, "table": P("tensor")}
# Where a kernel finds queries, keys and values [P, S, heads, d]: the partitioner cannot split it.
HEADS = P(("data", "fsdp"), None, "tensor")


def make_mesh(shape: tuple[int, int, int], devices: list | None = None) -> Mesh:
  """A mesh of axes data, fsdp, tensor over all devices, partitioned automatically.

  It goes through the devices host by host, so that each host holds a block of the prompts.
  """
  if devices is None:
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  devices = np.asarray(devices).reshape(shape)
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def param_shardings(mesh: Mesh, tree: Any, *, sampling: bool = False) -> Any:
  """A NamedSharding for every leaf of parameters or of an optimizer state built on them.

  Scalars are replicated. An axis that does not divide its dimension is left whole. A parameter
  that no rule matches raises, naming it.

  Args:
    tree: arrays or ShapeDtypeStructs, layers stacked or (for sampling) a tuple.
    sampling: the layout of the sampler: whole over `fsdp`, split over `tensor`.
  """

  def one(path, leaf) -> NamedSharding:
    if leaf.ndim == 0:
      return NamedSharding(mesh, P())
    name = re.sub(r"layers/\d+/", "layers/", _name(path))
    for pattern, spec in RULES:
      if re.search(pattern, name):
        unstacked = name != _name(path)
        return NamedSharding(
          mesh, _fit(mesh, spec[1:] if unstacked else spec, leaf.shape, sampling)
        )
    raise ValueError(f"no sharding rule matches parameter {_name(path)!r} of shape {leaf.shape}")

  return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Layout of everything that has prompts as its first axis."""
  return NamedSharding(mesh, BATCH)


def placer(mesh: Mesh) -> Callable[[str, jax.Array], jax.Array]:
  """`Decoder.place` for this mesh: constrains the layout of what has a row in `PLACES`."""

  def place(kind: str, array: jax.Array) -> jax.Array:
    layout = NamedSharding(mesh, _fit(mesh, PLACES[kind], array.shape, False))
    return jax.lax.with_sharding_constraint(array, layout)

  return place


def over_mesh(mesh: Mesh, attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """`attention(q, k, v, prompt_mask, **options)` of each device's own prompts and heads.

  Prompts are whole, heads stay with their keys, so that nothing travels. Where an axis of the mesh
  does not divide its dimension (heads: those of queries and of keys), its devices do the same work.
  """

  def attend(q, k, v, prompt_mask, **options):
    layout = _fit(mesh, HEADS, k.shape, False)  # an axis that divides K divides H
    mapped = jax.shard_map(
      partial(attention, **options),
      mesh=mesh,
      in_specs=(layout,) * 3 + (P(layout[0]),),
      out_specs=layout,
      check_vma=False,  # kernels do not say over which axes their results differ
    )
    return mapped(q, k, v, prompt_mask)

  return attend


def prompt_shards(layout: NamedSharding | None) -> int:
  """Blocks that the first axis is cut into: the size of a batch is a multiple of it."""
  return _parts(layout.mesh, layout.spec[0]) if layout else 1


def vocab_shards(mesh: Mesh, vocab: int) -> int:
  """Blocks of the vocabulary that a head lies in, as `core.logprobs.head_logprobs` wants them."""
  return _parts(mesh, _fit(mesh, PLACES["table"], (vocab,), False)[0] or ())


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, P())


class Jitted:
  """`jax.jit` of a function whose results lie where `outputs(*arguments)` says.

  Left to itself the compiler names the layout of a result in its own words, `P("data")` for
  `P(("data", "fsdp"))` where `fsdp` is 1, say; fed back in, that is another layout to `jit`, and it
  compiles a second time.
  """

  def __init__(self, function: Callable, outputs: Callable[..., Any], **options: Any) -> None:
    self._function, self._outputs, self._options = function, outputs, options
    self._programs: dict[Any, Any] = {}

  def _program(self, *arguments: Any) -> Any:
    layout = self._outputs(*arguments)
    leaves, tree = jax.tree.flatten(layout, is_leaf=lambda leaf: leaf is None)
    key = (tree, *leaves)
    if key not in self._programs:
      self._programs[key] = jax.jit(self._function, out_shardings=layout, **self._options)
    return self._programs[key]

  def __call__(self, *arguments: Any) -> Any:
    return self._program(*arguments)(*arguments)

  def trace(self, *arguments: Any) -> Any:
    """`jax.jit`'s own, for arrays or for shapes with a sharding."""
    return self._program(*arguments).trace(*arguments)

  def lower(self, *arguments: Any) -> Any:
    """`jax.jit`'s own."""
    return self.trace(*arguments).lower()


def layout_of(tree: Any) -> Any:
  """How the leaves of a tree lie on their mesh; None, which is up to the compiler, without one."""

  def one(leaf: Any) -> NamedSharding | None:
    found = getattr(leaf, "sharding", None)
    return found if isinstance(found, NamedSharding) else None

  return jax.tree.map(one, tree)


def _fit(mesh: Mesh, spec: Any, shape: tuple[int, ...], sampling: bool) -> P:
  axes = []
  for size, axis in zip(shape, tuple(spec) + (None,) * len(shape)):
    keep = axis is not None and size % _parts(mesh, axis) == 0
    keep = keep and not (sampling and axis == "fsdp")
    axes.append(axis if keep else None)
  return P(*axes)


def _parts(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
  return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _name(path: tuple) -> str:
  return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
