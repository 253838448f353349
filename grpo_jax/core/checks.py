"""Holds the array types and argument checks that the pure functions share.

Every check reads shapes and dtypes only, so it costs nothing under `jit` and raises before
compilation.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


def _as_array(name: str, value: Array) -> jax.Array:
  """Returns a jax array, or raises ValueError with the name."""
  error = None
  try:
    # jax 0.5 reads None as NaN.
    if all(leaf is not None for leaf in jax.tree.leaves(value, is_leaf=lambda x: x is None)):
      return jnp.asarray(value)
  except (TypeError, ValueError) as caught:
    error = caught
  raise ValueError(f"{name} must be an array of numbers, got {value!r:.200}") from error


def as_float(name: str, value: Array) -> jax.Array:
  """Returns `value` in float32 or wider: bfloat16 and float16 are widened, float64 stays.

  Integers are accepted, because rewards are often 0 and 1. Complex numbers and strings are not.

  Raises:
    ValueError: `value` does not hold real numbers.

  Example:
    >>> import jax.numpy as jnp
    >>> as_float("rewards", jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
  """
  value = _as_array(name, value)
  if jnp.issubdtype(value.dtype, jnp.complexfloating):
    raise ValueError(f"{name} must be real, got dtype {value.dtype}")
  if not jnp.issubdtype(value.dtype, jnp.floating):
    return value.astype(jnp.result_type(float))
  return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def as_mask(name: str, value: Array, shape: tuple[int, ...] | None = None) -> jax.Array:
  """Returns `value` as booleans; integers count as true where they are not 0.

  Raises:
    ValueError: `value` holds neither booleans nor integers, or has another shape than `shape`.

  Example:
    >>> as_mask("mask", [1, 0]).tolist()
    [True, False]
  """
  value = _as_array(name, value)
  if not (value.dtype == jnp.bool_ or jnp.issubdtype(value.dtype, jnp.integer)):
    raise ValueError(
      f"{name} must be boolean (or 0/1 integers), got dtype {value.dtype}; "
      f"pass {name}.astype(bool), and per-token weights as `weights`"
    )
  if shape is not None:
    check_shape(name, value, shape)
  return value != 0 if value.dtype != jnp.bool_ else value


def as_tokens(name: str, value: Array, shape: tuple[int, ...] | None = None) -> jax.Array:
  """Returns `value` as int32 token ids, so that narrow or unsigned ids do not wrap around.

  Raises:
    ValueError: `value` does not hold integers, or has another shape than `shape`.

  Example:
    >>> import numpy as np
    >>> as_tokens("tokens", np.array([255], np.uint8)).dtype
    dtype('int32')
  """
  value = _as_array(name, value)
  if not jnp.issubdtype(value.dtype, jnp.integer):
    raise ValueError(f"{name} must hold integer token ids, got dtype {value.dtype}")
  if shape is not None:
    check_shape(name, value, shape)
  return value.astype(jnp.int32)


def check_shape(name: str, value: Array, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless `value` has this shape."""
  if value.shape != shape:
    raise ValueError(f"{name} has shape {value.shape}, expected {shape}")


def check_rank(name: str, value: Array, rank: int, axes: str) -> None:
  """Raises ValueError unless `value` has this many axes, which the message calls `axes`."""
  if value.ndim != rank:
    raise ValueError(f"{name} has shape {value.shape}, expected {rank} axes [{axes}]")


def check_positive(name: str, value: float) -> None:
  """Raises ValueError for a number that is not finite and above 0. Traced values pass."""
  if isinstance(value, int | float | np.number) and not (np.isfinite(value) and value > 0):
    raise ValueError(f"{name} must be a finite number above 0, got {value}")


def check_share(name: str, value: float) -> None:
  """Raises ValueError for a number outside [0, 1]. Traced values pass."""
  if isinstance(value, int | float | np.number) and not 0 <= value <= 1:
    raise ValueError(f"{name} must lie in [0, 1], got {value}")


def lookup(kind: str, table: dict, choice: object) -> object:
  """Returns `table[choice]`; a callable stands for itself, so that it needs no table entry.

  Args:
    kind: word for the choice in the error message.

  Raises:
    ValueError: `choice` is neither callable nor a key of `table`.

  Example:
    >>> lookup("average", {"token": 1}, "token")
    1
  """
  if callable(choice):
    return choice
  if not isinstance(choice, str) or choice not in table:
    raise ValueError(f"unknown {kind} {choice!r}; known: {', '.join(sorted(table))}")
  return table[choice]
