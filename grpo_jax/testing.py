"""Checks of properties that every policy loss should have, for functions of any project.

A check takes a plain function and examines its values and gradients; it knows nothing about this
package. It accepts four kinds of functions, of B sequences with T tokens:

| kind                                      | arguments -> result                              |
|-------------------------------------------|--------------------------------------------------|
| `loss(logp, advantages, mask, **arrays)`  | [B, T], [B], bool [B, T], each [B, T] -> scalar  |
| `advantages(rewards)`                     | [P, G] -> [P, G]                                 |
| `mask(tokens, eos_ids)`                   | int [B, T], tuple of int -> bool or 0/1 [B, T]   |
| `logprobs(logits, tokens, temperature=t)` | [B, T, V], int [B, T] -> [B, T]                  |

A loss and log-probs may also return a tuple that starts with the result. Wrap a function with other
names or another order in a lambda. `arrays` names the further arguments of a loss, such as
`("old_logp", "ref_logp")`; the check passes synthetic log-probabilities [B, T] for them. jax must
be able to differentiate a loss in `logp`.

A check returns None or raises `Counterexample`, whose text states the property, how it is violated,
and the first arrays that show it. The inputs are the same on every run.

Example:
  >>> import jax.numpy as jnp
  >>> from grpo_jax import grpo_loss
  >>> check_padding(grpo_loss, arrays=("old_logp",))
  >>> def padded_mean(logp, advantages, mask):
  ...   return -jnp.mean(jnp.where(mask, logp * advantages[:, None], 0.0))
  >>> check_padding(padded_mean)
  Traceback (most recent call last):
  grpo_jax.testing.Counterexample: This property does not hold: padding columns change neither...
"""

import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Loss = Callable[..., object]
Batch = dict[str, np.ndarray]

_LENGTHS = (4, 2, 6, 1)  # tokens of the synthetic sequences, in 6 columns
_WIDTH = 6


class Counterexample(AssertionError):
  """A property that does not hold, and the arrays that show it.

  Attributes:
    property: the property, as a clause.
    found: how the property is violated.
    arrays: inputs and results of the counterexample, by name.
  """

  def __init__(self, check: Callable, found: str, arrays: dict[str, object]):
    summary = inspect.getdoc(check).split("\n\n")[0].replace("\n", " ")
    self.property = summary.removeprefix("Checks that ")
    self.found = found
    self.arrays = {name: np.asarray(value) for name, value in arrays.items()}
    shown = "\n".join(
      f"{name} =\n{np.array2string(value, precision=5, threshold=200, max_line_width=100)}"
      for name, value in self.arrays.items()
    )
    super().__init__(f"This property does not hold: {self.property}\nFound: {found}\n{shown}")


def _make_batch(arrays: Sequence[str], lengths: Sequence[int] = _LENGTHS, seed: int = 0) -> Batch:
  """Returns a synthetic batch with random log-probabilities and the named further arrays."""
  rng = np.random.default_rng(seed)
  logp = rng.uniform(-3.0, -0.1, (len(lengths), _WIDTH)).astype(np.float32)
  advantages = np.array([1.5, -0.5, 0.75, -2.0], np.float32)[: len(lengths)]
  mask = np.arange(_WIDTH)[None, :] < np.array(lengths)[:, None]
  batch = {"logp": logp, "advantages": advantages, "mask": mask}
  for name in arrays:
    batch[name] = (logp + rng.normal(0.0, 0.3, logp.shape)).astype(np.float32)
  return batch


def _evaluate(loss: Loss, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
  """Returns the loss and its gradient with respect to `logp`."""
  fixed = {name: jnp.asarray(value) for name, value in batch.items() if name != "logp"}

  def scalar(logp):
    others = dict(fixed)
    result = loss(logp, others.pop("advantages"), others.pop("mask"), **others)
    return result[0] if isinstance(result, tuple) else result

  value, gradient = jax.value_and_grad(scalar)(jnp.asarray(batch["logp"]))
  return np.asarray(value), np.asarray(gradient)


def _close(actual: np.ndarray, expected: np.ndarray) -> bool:
  """Returns whether arrays agree within float32 rounding, relative to the largest value."""
  size = np.max(np.abs(expected), initial=1e-3)
  return bool(np.allclose(actual, expected, rtol=1e-4, atol=1e-5 * size))


def _compare(
  check: Callable,
  case: str,
  actual: tuple[np.ndarray, np.ndarray],
  expected: tuple[np.ndarray, np.ndarray],
  inputs: Batch,
) -> None:
  """Raises Counterexample unless both pairs (loss, gradient) agree."""
  for name, a, b in zip(("loss", "gradient"), actual, expected, strict=True):
    if not _close(a, b):
      arrays = {"actual": a, "expected": b, **inputs}
      raise Counterexample(check, f"{case}: the {name} differs", arrays)


def check_padding(loss: Loss, *, arrays: Sequence[str] = ()) -> None:
  """Checks that padding columns change neither the loss nor its gradient, and get gradient 0.

  Raises:
    Counterexample: the property does not hold.
  """
  batch = _make_batch(arrays)
  value, gradient = _evaluate(loss, batch)
  widths = ((0, 0), (0, 3))
  padded = {k: np.pad(v, widths) if v.ndim == 2 else v for k, v in batch.items()}
  expected = value, np.pad(gradient, widths)
  _compare(check_padding, "3 more masked columns", _evaluate(loss, padded), expected, padded)


def check_empty(loss: Loss, *, arrays: Sequence[str] = ()) -> None:
  """Checks that empty sequences leave the loss finite, and that a batch of them gives 0.

  The gradient of an empty sequence must be 0, and so must loss and gradient of an empty batch.

  Raises:
    Counterexample: the property does not hold.
  """
  batch = _make_batch(arrays, lengths=(4, 0, 6, 1))
  value, gradient = _evaluate(loss, batch)
  if not (np.isfinite(value) and np.isfinite(gradient).all() and not gradient[1].any()):
    found = "the second sequence is empty"
    raise Counterexample(check_empty, found, {"loss": value, "gradient": gradient, **batch})
  batch = _make_batch(arrays, lengths=(0, 0, 0, 0))
  zeros = np.zeros(()), np.zeros_like(batch["logp"])
  _compare(check_empty, "all sequences are empty", _evaluate(loss, batch), zeros, batch)


def check_microbatches(
  loss: Loss,
  *,
  arrays: Sequence[str] = (),
  weights: Callable[[jax.Array], jax.Array] | None = None,
  share: Callable[[np.ndarray, np.ndarray], float] | None = None,
) -> None:
  """Checks that the losses and gradients of micro-batches add up to those of the batch.

  Args:
    weights: `weights(mask)` of the whole batch, [B, T]. The loss then receives its slice of them
      as the keyword `weights`, and the micro-batches are summed. None = the loss takes no weights.
    share: `share(mask of the micro-batch, mask of the batch)`, the factor of a micro-batch in the
      sum. The default without `weights` is its share of the sequences, as in a mean over equal
      micro-batches.

  Raises:
    Counterexample: the property does not hold.
  """
  if share is None:
    share = (lambda part, whole: 1.0) if weights else (lambda part, whole: len(part) / len(whole))
  for kind, lengths in (("equal lengths", (3, 3, 3, 3)), ("unequal lengths", _LENGTHS)):
    batch = _make_batch(arrays, lengths)
    if weights is not None:
      batch["weights"] = np.asarray(weights(jnp.asarray(batch["mask"])))
    whole = _evaluate(loss, batch)
    for sizes in ((2, 2), (1, 3)):
      edges = np.cumsum(sizes)[:-1]
      parts = [np.split(v, edges) for v in batch.values()]
      total, gradients = np.zeros(()), []
      for part in (dict(zip(batch, values, strict=True)) for values in zip(*parts, strict=True)):
        factor = share(part["mask"], batch["mask"])
        value, gradient = _evaluate(loss, part)
        total = total + factor * value
        gradients.append(factor * gradient)
      case = f"{kind}, micro-batches of {sizes} sequences"
      _compare(check_microbatches, case, (total, np.concatenate(gradients)), whole, batch)


def check_row_order(loss: Loss, *, arrays: Sequence[str] = ()) -> None:
  """Checks that the order of the sequences does not matter, but for that of the gradients.

  Raises:
    Counterexample: the property does not hold.
  """
  batch = _make_batch(arrays)
  value, gradient = _evaluate(loss, batch)
  for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
    permuted = {name: array[order] for name, array in batch.items()}
    expected = value, gradient[order]
    case = f"rows in order {order}"
    _compare(check_row_order, case, _evaluate(loss, permuted), expected, permuted)


def check_poisoned_masks(loss: Loss, *, arrays: Sequence[str] = ()) -> None:
  """Checks that NaN, inf and -inf in masked slots change neither the loss nor its gradient.

  Raises:
    Counterexample: the property does not hold.
  """
  batch = _make_batch(arrays)
  value, gradient = _evaluate(loss, batch)
  expected = value, np.where(batch["mask"], gradient, 0.0)
  token_arrays = ("logp", *arrays)
  for names in (*((name,) for name in token_arrays), token_arrays):
    for poison in (np.nan, np.inf, -np.inf):
      poisoned = dict(batch)
      for name in names:
        poisoned[name] = np.where(batch["mask"], batch[name], np.float32(poison))
      case = f"{poison} in the masked slots of {', '.join(names)}"
      _compare(check_poisoned_masks, case, _evaluate(loss, poisoned), expected, poisoned)


def check_on_policy_gradient(
  loss: Loss,
  *,
  arrays: Sequence[str] = (),
  weights: Callable[[jax.Array], jax.Array] | None = None,
) -> None:
  """Checks that on-policy `d loss / d logp = -weight * A`, with weights of the mask alone.

  On-policy means that all of `arrays` (old policy, reference, sampler) equal `logp`: every ratio
  is 1, and every divergence is at its minimum, so its gradient is 0. This finds a missing
  `stop_gradient`, a clip that binds at a ratio of 1, and a KL term that ignores the reference.

  Args:
    weights: `weights(mask)`, [B, T]. If given, the gradient must have exactly these weights.

  Raises:
    Counterexample: the property does not hold.
  """
  previous = None
  for seed in (0, 1):
    batch = _make_batch(arrays, seed=seed)
    batch["advantages"] = batch["advantages"][:: 1 - 2 * seed]
    batch |= {name: batch["logp"] for name in arrays}
    _, gradient = _evaluate(loss, batch)
    weight = -gradient / batch["advantages"][:, None]
    inputs = {"gradient": gradient, "weight = -gradient / A": weight, **batch}
    exact = None if weights is None else np.asarray(weights(jnp.asarray(batch["mask"])))
    for expected, case in (
      (exact, "a weight is not the expected one"),
      (previous, "a weight depends on logp or A"),
    ):
      if expected is not None and not _close(weight, expected):
        shown = {"expected weight": expected, **inputs}
        raise Counterexample(check_on_policy_gradient, case, shown)
    if not weight.any():
      case = "the gradient is 0 for all tokens: does it flow through old_logp as well?"
      raise Counterexample(check_on_policy_gradient, case, inputs)
    if not ((weight > 0) == batch["mask"]).all():
      raise Counterexample(check_on_policy_gradient, "a weight has the wrong sign", inputs)
    previous = weight


def check_constant_group(advantages: Callable[[jax.Array], jax.Array]) -> None:
  """Checks that a zero-variance group gets advantages of exactly 0, next to any other group.

  A group of one may raise a ValueError instead.

  Raises:
    Counterexample: the property does not hold.
  """
  for size in (1, 2, 8, 16, 7):
    for reward in (0.0, 1.0, 0.1, 0.9, 10.1, -3.3, 1e6):
      constant = np.full((1, size), reward, np.float32)
      varied = np.float32(reward) + np.arange(size, dtype=np.float32)[None]
      for rewards in (np.concatenate([constant, varied]), np.concatenate([constant, constant])):
        try:
          actual = np.asarray(advantages(jnp.asarray(rewards)))
        except ValueError:
          if size > 1:
            raise
          continue
        if actual[0].any():
          found = f"{size} rewards of {reward} get up to {np.abs(actual[0]).max():.3g}"
          raise Counterexample(check_constant_group, found, {"rewards": rewards, "actual": actual})


def check_shift_scale(
  advantages: Callable[[jax.Array], jax.Array], *, scale: str | None = "invariant"
) -> None:
  """Checks that a constant added to all rewards changes no advantage, and the effect of a factor.

  Args:
    scale: effect of a factor on all rewards. `invariant`: none, and no advantage exceeds the square
      root of the group size (normalized advantages). `equivariant`: the advantages have the same
      factor (centered advantages). None: not checked.

  Raises:
    Counterexample: the property does not hold.
    ValueError: `scale` is none of the above.
  """
  if scale not in ("invariant", "equivariant", None):
    raise ValueError(f"scale must be 'invariant', 'equivariant' or None, got {scale!r}")
  rng = np.random.default_rng(0)

  def require(case, rewards, expected):
    actual = np.asarray(advantages(jnp.asarray(rewards)))
    if not np.allclose(actual, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max()):
      arrays = {"rewards": rewards, "actual": actual, "expected": expected}
      raise Counterexample(check_shift_scale, case, arrays)

  # Multiples of 1/128 are exact in float32 under all of these shifts.
  rewards = rng.integers(0, 8, (3, 8)).astype(np.float32) / 128
  expected = np.asarray(advantages(jnp.asarray(rewards)))
  for shift in (1.0, -32.0, 1024.0):
    require(
      f"other advantages for rewards shifted by {shift:g}", rewards + np.float32(shift), expected
    )
  if scale is None:
    return
  rewards = rng.integers(0, 8, (3, 8)).astype(np.float32)
  expected = np.asarray(advantages(jnp.asarray(rewards)))
  for factor in (4.0, 0.5):
    scaled = expected * factor if scale == "equivariant" else expected
    require(f"wrong advantages for rewards * {factor:g}", rewards * np.float32(factor), scaled)
  if scale == "invariant":
    outlier = np.array([[1, 1, 1, 1, 1, 1, 1, 0]], np.float32)
    actual = np.asarray(advantages(jnp.asarray(outlier)))
    if not np.abs(actual).max() <= np.sqrt(outlier.size):
      found = f"an advantage of {np.abs(actual).max():.3g} in a group of {outlier.size}"
      raise Counterexample(check_shift_scale, found, {"rewards": outlier, "actual": actual})


def check_eos(mask: Callable[[jax.Array, tuple[int, ...]], jax.Array]) -> None:
  """Checks that the mask ends with the first end-of-sequence token, for any pad id.

  The synthetic completions are padded with token 0.

  Raises:
    Counterexample: the property does not hold.
  """
  cases = (
    ("EOS 9 in the middle", [5, 9, 0, 0], (9,), [1, 1, 0, 0]),
    ("no EOS", [5, 6, 7, 8], (9,), [1, 1, 1, 1]),
    ("EOS 9 comes last", [5, 6, 7, 9], (9,), [1, 1, 1, 1]),
    ("EOS 9 comes first", [9, 0, 0, 0], (9,), [1, 0, 0, 0]),
    ("EOS 0 is also the pad", [5, 6, 0, 0], (0,), [1, 1, 1, 0]),
    ("EOS 0 is also the pad and comes first", [0, 0, 0, 0], (0,), [1, 0, 0, 0]),
    ("two EOS ids", [5, 8, 9, 0], (9, 8), [1, 1, 0, 0]),
    ("EOS 9 twice, and no padding", [5, 9, 6, 9], (9,), [1, 1, 0, 0]),
  )
  for case, row, eos_ids, first in cases:
    tokens = np.array([row, [5, 6, 7, 7]], np.int32)
    actual = np.asarray(mask(jnp.asarray(tokens), eos_ids)).astype(int)
    expected = np.array([first, [1, 1, 1, 1]])
    if (actual != expected).any():
      arrays = {"tokens": tokens, "actual": actual, "expected": expected}
      raise Counterexample(check_eos, case, arrays)


def check_temperature(logprobs: Callable[..., object]) -> None:
  """Checks that at temperature T the probabilities are softmax(logits / T), and so add up to 1.

  Raises:
    Counterexample: the property does not hold.
  """
  logits = np.random.default_rng(0).normal(0.0, 2.0, (1, 5)).astype(np.float32)
  repeated = np.broadcast_to(logits, (1, 5, 5))
  tokens = np.arange(5, dtype=np.int32)[None]
  for temperature in (1.0, 0.7, 2.0):
    result = logprobs(jnp.asarray(repeated), jnp.asarray(tokens), temperature=temperature)
    actual = np.asarray(result[0] if isinstance(result, tuple) else result)
    exponentials = np.exp(logits / temperature)
    expected = np.log(exponentials / exponentials.sum())
    if not _close(actual, expected):
      found = f"at temperature {temperature} they add up to {np.exp(actual).sum():.4g}"
      arrays = {"logits": logits, "actual": actual, "expected": expected}
      raise Counterexample(check_temperature, found, arrays)
