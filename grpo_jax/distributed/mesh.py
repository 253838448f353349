"""Lays parameters and batches out over a device mesh, by one table of rules.

Mesh axes: `data` splits the prompts and replicates the parameters, `fsdp` splits both, `tensor`
splits heads, MLP and vocabulary. A mesh may have a fourth, `expert`, which splits the prompts and
the experts of a mixture. Models contain no sharding code: XLA's partitioner follows the
shardings of the arrays it is given.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor", "expert")
PROMPT_AXES = ("data", "fsdp", "expert")  # those that split the prompts
# Sharding of an array; None leaves it to the compiler or to the default device.
Sharding: TypeAlias = NamedSharding | None

# Ordered (pattern on the end of a parameter's path, spec); the first match counts. Layers are
# stacked on a leading axis, which is never split.
RULES: tuple[tuple[str, P], ...] = (
  (r"(embed|head)$", P("tensor", "fsdp")),
  (r"score$", P()),
  (r"ns_coeffs$", P()),  # of optax's Muon
  (r"layers/.*norm$", P()),
  (r"final_norm$", P()),
  (r"layers/(q|k|v|gate|up)$", P(None, "fsdp", "tensor")),
  (r"layers/(o|down)$", P(None, "tensor", "fsdp")),
  (r"layers/(q|k|v|gate|up)_bias$", P(None, "tensor")),
  (r"layers/(o|down)_bias$", P()),
  (r"layers/router$", P()),
  (r"layers/experts_(gate|up)$", P(None, "expert", "fsdp", "tensor")),
  (r"layers/experts_down$", P(None, "expert", "tensor", "fsdp")),
  # LoRA pairs [in, r] and [r, out]: split like their matrix, replicated along the rank.
  (r"layers/(q|k|v|gate|up)_lora_a$", P(None, "fsdp", None)),
  (r"layers/(q|k|v|gate|up)_lora_b$", P(None, None, "tensor")),
  (r"layers/(o|down)_lora_a$", P(None, "tensor", None)),
  (r"layers/(o|down)_lora_b$", P(None, None, "fsdp")),
)
# Fields of a quantized matrix, at the end of a path: they are split like the matrix.
FIELDS = r"/(values|(scale|minimum)(s|_levels))$"
BATCH = P(("data", "fsdp"))
# Specs of values inside a model, by kind. With weights split over `fsdp` and no such constraint,
# the partitioner leaves the weights where they are and all devices compute on all prompts. With
# hidden states kept with their prompts, it gathers the weights of one layer at a time.
PLACES = {"hidden": BATCH, "table": P("tensor")}
# Spec of queries, keys and values [P, S, heads, d] of a kernel, which the partitioner cannot split.
HEADS = P(("data", "fsdp"), None, "tensor")


def make_mesh(
  shape: tuple[int, ...], devices: Sequence[jax.Device] | None = None, slices: int = 1
) -> Mesh:
  """Makes a mesh of axes data, fsdp, tensor, and expert if given, partitioned automatically.

  The devices are in the order of their hosts, so that each host holds a contiguous shard of the
  prompts. Slices are outermost: `data` alone leads from one to another.

  Args:
    shape: number of devices along each axis.
    devices: default: all devices of all hosts.
    slices: parts of the devices that a slower network connects; divides the first axis.

  Raises:
    ValueError: the devices are not of that many slices of one size.
  """
  if devices is None:
    devices, _ = split_devices(0)
  devices = in_slices(devices, slices)
  names, types = AXES[: len(shape)], (AxisType.Auto,) * len(shape)
  return Mesh(np.asarray(devices).reshape(shape), names, axis_types=types)


def in_slices(devices: Sequence[jax.Device], slices: int) -> list[jax.Device]:
  """Returns devices slice by slice, within each in the order given.

  Devices that know no slice, or a single one, are taken as `slices` parts of one size: so a run on
  several slices can be tried without them.

  Raises:
    ValueError: they are of another number of slices, or of slices of several sizes.
  """
  indices = [getattr(device, "slice_index", None) or 0 for device in devices]
  counts = {index: indices.count(index) for index in sorted(set(indices))}
  if len(counts) > 1 and slices == 1:
    warnings.warn(
      f"the devices are of {len(counts)} slices, and mesh.slices is 1: set "
      f"mesh.slices={len(counts)}, so that only mesh.data leads from one to another",
      RuntimeWarning,
      stacklevel=3,
    )
    return list(devices)
  if len(counts) not in (1, slices) or len(set(counts.values())) > 1:
    sizes = ", ".join(map(str, counts.values()))
    raise ValueError(
      f"mesh.slices is {slices}, and the devices are of {len(counts)} slices of {sizes} devices: "
      "it must be their number, and all of one size"
    )
  if len(devices) % slices:
    raise ValueError(f"mesh.slices is {slices}, it must divide the {len(devices)} devices")
  return [devices[i] for i in sorted(range(len(devices)), key=lambda i: indices[i])]


def split_devices(
  rollout: int, devices: Sequence[jax.Device] | None = None
) -> tuple[list[jax.Device], list[jax.Device]]:
  """Returns (devices that learn, devices that sample), each in the order of their hosts.

  The last devices of each host sample, so that prompts and weights stay on their host.

  Args:
    rollout: number of devices that only sample, over all hosts.
    devices: default: all devices of all hosts.

  Raises:
    ValueError: they cannot be shared out evenly between the hosts.
  """
  devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
  by_host: dict[int, list[jax.Device]] = {}
  for device in devices:
    by_host.setdefault(device.process_index, []).append(device)
  if rollout % len(by_host):
    raise ValueError(
      f"mesh.rollout_devices is {rollout}, it must be a multiple of the {len(by_host)} hosts: the "
      "last devices of each host sample"
    )
  share = rollout // len(by_host)
  parts = [(own[: len(own) - share], own[len(own) - share :]) for own in by_host.values()]
  return [d for own, _ in parts for d in own], [d for _, own in parts for d in own]


def moved(tree: Any, shardings: Any) -> Any:
  """Returns the arrays of a tree on the devices of another mesh.

  On several hosts, each copies its own devices' shards to its other devices: both layouts must hold
  the same shards on each host, as those of `param_shardings(..., sampling=True)` do.

  Args:
    shardings: a sharding for each leaf.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def one(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    own = {_bounds(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    indices = sharding.addressable_devices_indices_map(array.shape).items()
    copies = [jax.device_put(own[_bounds(i, array.shape)], device) for device, i in indices]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, copies)

  return jax.tree.map(one, tree, shardings)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
  return tuple(part.indices(size) for part, size in zip(index, shape))


def param_shardings(mesh: Mesh, tree: Any, *, sampling: bool = False) -> Any:
  """Returns a NamedSharding for each leaf of parameters, or of an optimizer state built on them.

  Scalars are replicated. An axis of the mesh that does not divide its dimension does not split it.

  Args:
    tree: arrays or ShapeDtypeStructs, layers stacked or (for sampling) a tuple.
    sampling: returns the sampler's layout: gathered over `fsdp`, split over `tensor`.

  Raises:
    ValueError: no rule matches a parameter; the message names it.
  """

  def sharding_of(path: tuple, leaf: Any) -> NamedSharding:
    if leaf.ndim == 0:
      return NamedSharding(mesh, P())
    name = re.sub(FIELDS, "", _name(path))
    stacked_name = re.sub(r"layers/\d+/", "layers/", name)
    for pattern, spec in RULES:
      if re.search(pattern, stacked_name):
        spec = spec if name == stacked_name else spec[1:]  # a single layer has no leading axis
        return NamedSharding(mesh, _fit(mesh, spec, leaf.shape, sampling))
    raise ValueError(f"no sharding rule matches parameter {name!r} of shape {leaf.shape}")

  return jax.tree_util.tree_map_with_path(sharding_of, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is prompts."""
  return NamedSharding(mesh, _batch(mesh))


def _batch(mesh: Mesh) -> P:
  """Returns the spec of arrays whose first axis is prompts."""
  return P(tuple(axis for axis in PROMPT_AXES if axis in mesh.shape))


def placer(mesh: Mesh) -> Callable[[str, jax.Array], jax.Array]:
  """Returns `Decoder.place` for a mesh: constrains the sharding of values of a kind in `PLACES`."""

  def place(kind: str, array: jax.Array) -> jax.Array:
    spec = _batch(mesh) if kind == "hidden" else PLACES[kind]
    sharding = NamedSharding(mesh, _fit(mesh, spec, array.shape))
    return jax.lax.with_sharding_constraint(array, sharding)

  return place


def over_mesh(mesh: Mesh, attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Maps `attention(q, k, v, prompt_mask, **options)` over the devices of a mesh.

  Each device computes its own prompts and heads. Heads stay with their keys, so that devices
  exchange nothing. Where an axis of the mesh does not divide its dimension (for heads: the number
  of query heads and of key-value heads), its devices repeat each other's work.
  """

  def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, prompt_mask: jax.Array, **options: Any
  ) -> jax.Array:
    spec = _fit(mesh, P(*_batch(mesh), *HEADS[1:]), k.shape)  # an axis that divides K divides H
    mapped = jax.shard_map(
      partial(attention, **options),
      mesh=mesh,
      in_specs=(spec,) * 3 + (P(spec[0]),),
      out_specs=spec,
      check_vma=False,  # kernels do not declare over which axes their results differ
    )
    return mapped(q, k, v, prompt_mask)

  return attend


def prompt_shards(sharding: Sharding) -> int:
  """Returns the number of shards of the first axis, which divides the size of a batch."""
  return _parts(sharding.mesh, sharding.spec[0]) if sharding else 1


def vocab_shards(mesh: Mesh, vocab: int) -> int:
  """Returns the number of vocabulary shards of a head, for `core.logprobs.head_logprobs`.

  Args:
    vocab: size of the vocabulary.
  """
  return _parts(mesh, _fit(mesh, PLACES["table"], (vocab,))[0] or ())


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that are the same on every device."""
  return NamedSharding(mesh, P())


class Jitted:
  """Jits a function whose results get the shardings that `outputs(*arguments)` returns.

  Without `out_shardings`, XLA may return an equivalent sharding that is spelled differently:
  `P("data")` for `P(("data", "fsdp"))` if `fsdp` is 1. Passed back in, it misses the jit cache and
  recompiles.

  Args:
    function: to be jitted.
    outputs: returns the tree of shardings of the results; None leaves one to the compiler.
    options: further arguments of `jax.jit`.
  """

  def __init__(self, function: Callable, outputs: Callable[..., Any], **options: Any) -> None:
    self._function, self._outputs, self._options = function, outputs, options
    self._programs: dict[Any, Any] = {}

  def _program(self, *arguments: Any) -> Any:
    shardings = self._outputs(*arguments)
    leaves, tree = jax.tree.flatten(shardings, is_leaf=lambda leaf: leaf is None)
    key = (tree, *leaves)
    if key not in self._programs:
      self._programs[key] = jax.jit(self._function, out_shardings=shardings, **self._options)
    return self._programs[key]

  def __call__(self, *arguments: Any) -> Any:
    return self._program(*arguments)(*arguments)

  def trace(self, *arguments: Any) -> Any:
    """Traces the function, as `jax.jit`'s `trace` does, for arrays or for shapes with shardings."""
    return self._program(*arguments).trace(*arguments)

  def lower(self, *arguments: Any) -> Any:
    """Lowers the function, as `jax.jit`'s `lower` does."""
    return self.trace(*arguments).lower()


def layout_of(tree: Any) -> Any:
  """Returns the sharding of each leaf; None, which leaves it to the compiler, without a mesh."""

  def sharding_of(leaf: Any) -> Sharding:
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None

  return jax.tree.map(sharding_of, tree)


def _fit(mesh: Mesh, spec: Any, shape: tuple[int, ...], sampling: bool = False) -> P:
  """Returns the spec without axes that do not divide their dimension, nor `fsdp` for sampling."""
  axes = []
  for size, axis in zip(shape, tuple(spec) + (None,) * len(shape)):
    if isinstance(axis, str) and axis not in mesh.shape:
      axis = None
    splits = axis is not None and size % _parts(mesh, axis) == 0
    axes.append(axis if splits and not (sampling and axis == "fsdp") else None)
  return P(*axes)


def _parts(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
  """Returns the number of devices along one or several axes."""
  return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _name(path: tuple) -> str:
  return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
