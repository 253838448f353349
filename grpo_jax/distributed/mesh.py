"""Lays parameters and batches out over a device mesh, by one table of rules.

Mesh axes: `data` splits the prompts and replicates the parameters, `fsdp` splits both, `tensor`
splits heads, MLP and vocabulary. A mesh may have a fourth, `expert`, which splits the prompts and
the experts of a mixture, and a fifth, `context`, which splits the tokens of a row while learning,
and what `tensor` splits while sampling. Models contain no sharding code: XLA's partitioner follows
the shardings of the arrays it is given.
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

AXES = ("data", "fsdp", "tensor", "expert", "context")
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
  (r"layers/(sinks|router|router_bias)$", P()),
  (r"layers/experts_(gate|up)$", P(None, "expert", "fsdp", "tensor")),
  (r"layers/experts_down$", P(None, "expert", "tensor", "fsdp")),
  (r"layers/experts_(gate|up)_bias$", P(None, "expert", "tensor")),
  (r"layers/experts_down_bias$", P(None, "expert")),
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
# Axes that stand for one axis of the specs above, where the mesh has them. Beside tokens, `context`
# splits the weights that `fsdp` splits; the sampler, which computes a token at a time, has its
# heads, its MLP and its cache split over it.
LEARNING: dict[str, tuple[str, ...]] = {"fsdp": ("fsdp", "context")}
SAMPLING: dict[str, tuple[str, ...]] = {"fsdp": (), "tensor": ("tensor", "context")}


def make_mesh(
  shape: tuple[int, ...], devices: Sequence[jax.Device] | None = None, slices: int = 1
) -> Mesh:
  """Makes a mesh of the first axes of `AXES`, partitioned automatically.

  The devices are in the order of their hosts, so that each host holds a contiguous shard of the
  prompts. Slices are outermost: `data` alone leads from one to another.

  Args:
    shape: number of devices along each axis; at least data, fsdp and tensor.
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
    sampling: returns the sampler's layout: gathered over `fsdp`, split over `tensor` and `context`.

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


def placer(mesh: Mesh, *, sampling: bool = False) -> Callable[[str, jax.Array], jax.Array]:
  """Returns `Decoder.place` for a mesh: constrains the sharding of values of a kind in `PLACES`.

  Args:
    sampling: for the sampler, whose tokens are not split.
  """
  hidden = _batch(mesh) if sampling else P(*_batch(mesh), "context")

  def place(kind: str, array: jax.Array) -> jax.Array:
    spec = hidden if kind == "hidden" else PLACES[kind]
    sharding = NamedSharding(mesh, _fit(mesh, spec, array.shape, sampling))
    return jax.lax.with_sharding_constraint(array, sharding)

  return place


def over_mesh(
  mesh: Mesh, attention: Callable[..., jax.Array], *, sampling: bool = False
) -> Callable[..., jax.Array]:
  """Maps `attention(q, k, v, prompt_mask, **options)` over the devices of a mesh.

  Each device computes its own prompts and heads. Heads stay with their keys, so that devices
  exchange nothing. Where an axis of the mesh does not divide its dimension (for heads: the number
  of query heads and of key-value heads), its devices repeat each other's work.

  Args:
    sampling: for the sampler, whose heads may be split further.
  """

  def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, prompt_mask: jax.Array, **options: Any
  ) -> jax.Array:
    spec = P(*_batch(mesh), None, "tensor")  # an axis that divides K divides H
    spec = _fit(mesh, spec, k.shape, sampling)
    mapped = jax.shard_map(
      partial(attention, **options),
      mesh=mesh,
      in_specs=(spec,) * 3 + (P(spec[0]),),
      out_specs=spec,
      check_vma=False,  # kernels do not declare over which axes their results differ
    )
    return mapped(q, k, v, prompt_mask)

  return attend


def over_context(mesh: Mesh, attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Maps attention over the devices of a mesh that splits the tokens of rows.

  Each device computes the queries of its own tokens, and gathers the keys and values of its prompts
  over `context`; the backward pass scatters their gradients back. Devices do equal work, since
  `tiled_attention` computes all scores of a tile. With a kernel that skips what a causal mask
  hides, those with the first tokens would wait for those with the last ones.

  Args:
    attention: `tiled_attention`, which takes a `shard` of rows in the order of `join_rows`. It gets
      rows without completions as they are.
  """

  def attend(q, k, v, prompt_mask, local=None, *, group=0, **options):
    if not group:
      return attention(q, k, v, prompt_mask, local, **options)

    def on_device(q, k, v, prompt_mask, local):
      k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
      shard = jax.lax.axis_index("context"), mesh.shape["context"]
      return attention(q, k, v, prompt_mask, local, group=group, shard=shard, **options)

    spec = _fit(mesh, P(*_batch(mesh), "context", "tensor"), k.shape)
    mapped = jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(spec,) * 3 + (P(spec[0]), P()),
      out_specs=spec,
      check_vma=False,  # where heads are not split, devices repeat each other's work
    )
    return mapped(q, k, v, prompt_mask, local)

  return attend


def prompt_shards(sharding: Sharding) -> int:
  """Returns the number of shards of the first axis, which divides the size of a batch."""
  return _parts(sharding.mesh, sharding.spec[0]) if sharding else 1


def token_shards(mesh: Mesh) -> int:
  """Returns the number of shards of the tokens of a row while learning."""
  return mesh.shape.get("context", 1)


def vocab_shards(mesh: Mesh, vocab: int, *, sampling: bool = False) -> int:
  """Returns the number of vocabulary shards of a head, for `core.logprobs.head_logprobs`.

  Args:
    vocab: size of the vocabulary.
    sampling: for the sampler.
  """
  return _parts(mesh, _fit(mesh, PLACES["table"], (vocab,), sampling)[0] or ())


def cache_axes(mesh: Mesh, kv_heads: int) -> str | tuple[str, ...] | None:
  """Returns the axes that split the key-value heads of the sampler's cache."""
  return _fit(mesh, P("tensor"), (kv_heads,), sampling=True)[0]


def cache_shards(mesh: Mesh, kv_heads: int) -> int:
  """Returns the number of shards of the key-value heads of the sampler's cache."""
  return _parts(mesh, cache_axes(mesh, kv_heads) or ())


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
  """Returns the spec in the axes of the mesh, without those that do not divide their dimension."""
  roles, axes = SAMPLING if sampling else LEARNING, []
  for size, axis in zip(shape, tuple(spec) + (None,) * len(shape)):
    choices = [axis]
    if isinstance(axis, str):
      names = tuple(name for name in roles.get(axis, (axis,)) if name in mesh.shape)
      choices = [names[:count] for count in range(len(names), 0, -1)]
      choices = [names[0] if len(names) == 1 else names for names in choices]
    divide = (names for names in choices if names and size % _parts(mesh, names) == 0)
    axes.append(next(divide, None))
  return P(*axes)


def _parts(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
  """Returns the number of devices along one or several axes."""
  return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _name(path: tuple) -> str:
  return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
