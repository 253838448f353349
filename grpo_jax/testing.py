"""Properties of a policy loss that can be checked on anyone's function.

Nothing here knows this project: a check takes a plain function and looks at its values and
gradients. The kinds of function, with B sequences of T tokens:

| kind                                      | arguments -> result                              |
|-------------------------------------------|--------------------------------------------------|
| `loss(logp, advantages, mask, **arrays)`  | [B, T], [B], bool [B, T], each [B, T] -> scalar  |
| `advantages(rewards)`                     | [P, G] -> [P, G]                                 |
| `mask(tokens, eos_ids)`                   | int [B, T], tuple of int -> bool or 0/1 [B, T]   |
| `logprobs(logits, tokens, temperature=t)` | [B, T, V], int [B, T] -> [B, T]                  |

A loss and log-probs may also return a tuple that starts with their result.
A function with other names or another order goes in as a lambda. `arrays` names the further
arguments that a loss takes, such as `("old_logp", "ref_logp")`; they are log-probabilities
[B, T], made up by the check. A loss must be differentiable by jax in `logp`.

A check returns None or raises `Counterexample`, whose text is the property, what was found, and
the first arrays that show it. Inputs are the same on every run.

Example:
  >>> import jax.numpy as jnp
  >>> from grpo_jax import grpo_loss
  >>> check_padding(grpo_loss, arrays=("old_logp",))
  >>> def padded_mean(logp, advantages, mask):
  ...   return -jnp.mean(jnp.where(mask, logp * advantages[:, None], 0.0))
  >>> check_padding(padded_mean)
  Traceback (most recent call last):
  grpo_jax.testing.Counterexample: Columns of padding change neither the loss nor its gradient...
"""

import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Loss = Callable[..., object]
Batch = dict[str, np.ndarray]

_LENGTHS = (4, 2, 6, 1)  # tokens of the made-up sequences, in 6 columns
_WIDTH = 6


class Counterexample(AssertionError):
  """A property does not hold; the text shows where, `arrays` are the arrays themselves."""

  def __init__(self, check: Callable, found: str, arrays: dict[str, object]):
    self.property = inspect.getdoc(check).split("\n\n")[0].replace("\n", " ")
    self.found = found
    self.arrays = {name: np.asarray(value) for name, value in arrays.items()}
    shown = "\n".join(
      f"{name} =\n{np.array2string(value, precision=5, threshold=200, max_line_width=100)}"
      for name, value in self.arrays.items()
    )
    super().__init__(f"{self.property}\nFound: {found}\n{shown}")


def _make_batch(arrays: Sequence[str], lengths: Sequence[int] = _LENGTHS, seed: int = 0) -> Batch:
  rng = np.random.default_rng(seed)
  logp = rng.uniform(-3.0, -0.1, (len(lengths), _WIDTH)).astype(np.float32)
  advantages = np.array([1.5, -0.5, 0.75, -2.0], np.float32)[: len(lengths)]
  mask = np.arange(_WIDTH)[None, :] < np.array(lengths)[:, None]
  batch = {"logp": logp, "advantages": advantages, "mask": mask}
  for name in arrays:
    batch[name] = (logp + rng.normal(0.0, 0.3, logp.shape)).astype(np.float32)
  return batch


def _evaluate(loss: Loss, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
  """The loss and its gradient with respect to `logp`."""
  fixed = {name: jnp.asarray(value) for name, value in batch.items() if name != "logp"}

  def scalar(logp):
    others = dict(fixed)
    result = loss(logp, others.pop("advantages"), others.pop("mask"), **others)
    return result[0] if isinstance(result, tuple) else result

  value, gradient = jax.value_and_grad(scalar)(jnp.asarray(batch["logp"]))
  return np.asarray(value), np.asarray(gradient)


def _close(got: np.ndarray, wanted: np.ndarray) -> bool:
  size = np.max(np.abs(wanted), initial=1e-3)
  return bool(np.allclose(got, wanted, rtol=1e-4, atol=1e-5 * size))


def _compare(check, what, got, wanted, shown) -> None:
  """Raises where (loss, gradient) `got` is not what was `wanted`."""
  for name, one, other in zip(("loss", "gradient"), got, wanted, strict=True):
    if not _close(one, other):
      raise Counterexample(check, f"{what}: another {name}", {"got": one, "wanted": other, **shown})


def check_padding(loss: Loss, *, arrays: Sequence[str] = ()) -> None:
  """Columns of padding change neither the loss nor its gradient, and get gradient 0."""
  batch = _make_batch(arrays)
  value, gradient = _evaluate(loss, batch)
  more = ((0, 0), (0, 3))
  padded = {k: np.pad(v, more) if v.ndim == 2 else v for k, v in batch.items()}
  wanted = value, np.pad(gradient, more)
  _compare(check_padding, "3 masked columns more", _evaluate(loss, padded), wanted, padded)


def check_empty(loss: Loss, *, arrays: Sequence[str] = ()) -> None:
  """A sequence without tokens gives a finite loss; a batch of such, loss and gradient 0."""
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
  """The losses and gradients of the parts of a batch add up to those of the whole.

  Args:
    weights: `weights(mask)` of the whole batch, [B, T]; the loss then gets them as the keyword
      `weights`, each part its slice, and its parts are summed. None = the loss takes none.
    share: `share(mask of the part, mask of the whole)`, the factor of a part's loss in the sum.
      Without `weights` the default is the part's share of the sequences, which is the mean over
      equal micro-batches.
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
      what = f"{kind}, parts of {sizes} sequences"
      _compare(check_microbatches, what, (total, np.concatenate(gradients)), whole, batch)


def check_row_order(loss: Loss, *, arrays: Sequence[str] = ()) -> None:
  """The order of the sequences does not matter: same loss, gradients in the new order."""
  batch = _make_batch(arrays)
  value, gradient = _evaluate(loss, batch)
  for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
    moved = {name: array[order] for name, array in batch.items()}
    wanted = value, gradient[order]
    _compare(check_row_order, f"rows in order {order}", _evaluate(loss, moved), wanted, moved)


def check_poisoned_masks(loss: Loss, *, arrays: Sequence[str] = ()) -> None:
  """What stands in masked slots changes neither the loss nor its gradient: NaN, inf, -inf."""
  batch = _make_batch(arrays)
  wanted = _evaluate(loss, batch)
  wanted = wanted[0], np.where(batch["mask"], wanted[1], 0.0)
  token_arrays = ("logp", *arrays)
  for names in (*((name,) for name in token_arrays), token_arrays):
    for poison in (np.nan, np.inf, -np.inf):
      poisoned = dict(batch)
      for name in names:
        poisoned[name] = np.where(batch["mask"], batch[name], np.float32(poison))
      what = f"{poison} in the masked slots of {', '.join(names)}"
      _compare(check_poisoned_masks, what, _evaluate(loss, poisoned), wanted, poisoned)


def check_on_policy_gradient(
  loss: Loss,
  *,
  arrays: Sequence[str] = (),
  weights: Callable[[jax.Array], jax.Array] | None = None,
) -> None:
  """On-policy, `d loss / d logp = -weight * A`, and the weight depends on the mask alone.

  On-policy means that all of `arrays` (old policy, reference, sampler) equal `logp`: every ratio
  is 1 and every divergence is at its minimum, so its gradient is 0. That finds a missing stop of
  the gradient, a clip that binds at a ratio of 1, and a KL term that does not see the reference.

  Args:
    weights: `weights(mask)`, [B, T], if they are known; then the gradient must be exactly that.
  """
  seen = None
  for seed in (0, 1):
    batch = _make_batch(arrays, seed=seed)
    batch["advantages"] = batch["advantages"][:: 1 - 2 * seed]
    batch |= {name: batch["logp"] for name in arrays}
    _, gradient = _evaluate(loss, batch)
    weight = -gradient / batch["advantages"][:, None]
    shown = {"gradient": gradient, "weight = -gradient / A": weight, **batch}
    known = None if weights is None else np.asarray(weights(jnp.asarray(batch["mask"])))
    for wanted in (known, seen):
      if wanted is not None and not _close(weight, wanted):
        what = (
          "a weight is not the given one" if wanted is known else "a weight depends on logp or A"
        )
        raise Counterexample(check_on_policy_gradient, what, {"wanted weight": wanted, **shown})
    if not ((weight > 0) == batch["mask"]).all():
      raise Counterexample(check_on_policy_gradient, "a weight of the wrong sign", shown)
    seen = weight


def check_constant_group(advantages: Callable[[jax.Array], jax.Array]) -> None:
  """A group whose rewards are all equal gets advantages of exactly 0, whatever stands beside it."""
  for size in (1, 2, 8, 16):
    for reward in (0.0, 1.0, 0.1, 0.9, 10.1, -3.3, 1e6):
      constant = np.full((1, size), reward, np.float32)
      varied = np.float32(reward) + np.arange(size, dtype=np.float32)[None]
      for rewards in (np.concatenate([constant, varied]), np.concatenate([constant, constant])):
        got = np.asarray(advantages(jnp.asarray(rewards)))
        if got[0].any():
          found = f"{size} rewards of {reward} get up to {np.abs(got[0]).max():.3g}"
          raise Counterexample(check_constant_group, found, {"rewards": rewards, "got": got})


def check_shift_scale(
  advantages: Callable[[jax.Array], jax.Array], *, scale: str | None = "invariant"
) -> None:
  """A constant added to all rewards changes no advantage; a factor on them does what it should.

  Args:
    scale: `invariant` (normalized: the factor drops out, and no advantage exceeds the square root
      of the group size), `equivariant` (centered: it comes through), None (not checked).
  """
  if scale not in ("invariant", "equivariant", None):
    raise ValueError(f"scale must be 'invariant', 'equivariant' or None, got {scale!r}")
  rng = np.random.default_rng(0)

  def require(what, rewards, wanted):
    got = np.asarray(advantages(jnp.asarray(rewards)))
    if not np.allclose(got, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max()):
      arrays = {"rewards": rewards, "got": got, "wanted": wanted}
      raise Counterexample(check_shift_scale, what, arrays)

  # Steps of 1/128 are exact in float32 under all these shifts.
  rewards = rng.integers(0, 8, (3, 8)).astype(np.float32) / 128
  wanted = np.asarray(advantages(jnp.asarray(rewards)))
  for shift in (1.0, -32.0, 1024.0):
    require(f"other advantages for rewards {shift:+g}", rewards + np.float32(shift), wanted)
  if scale is None:
    return
  rewards = rng.integers(0, 8, (3, 8)).astype(np.float32)
  wanted = np.asarray(advantages(jnp.asarray(rewards)))
  for factor in (4.0, 0.5):
    through = wanted * factor if scale == "equivariant" else wanted
    require(f"wrong advantages for rewards * {factor:g}", rewards * np.float32(factor), through)
  if scale == "invariant":
    outlier = np.array([[1, 1, 1, 1, 1, 1, 1, 0]], np.float32)
    got = np.asarray(advantages(jnp.asarray(outlier)))
    if not np.abs(got).max() <= np.sqrt(outlier.size):
      found = f"an advantage of {np.abs(got).max():.3g} in a group of {outlier.size}"
      raise Counterexample(check_shift_scale, found, {"rewards": outlier, "got": got})


def check_eos(mask: Callable[[jax.Array, tuple[int, ...]], jax.Array]) -> None:
  """The first end-of-sequence token is trained on and nothing after it is, whatever the pad id.

  The made-up completions are padded with token 0.
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
  for what, row, eos_ids, wanted in cases:
    tokens = np.array([row, [5, 6, 7, 7]], np.int32)
    got = np.asarray(mask(jnp.asarray(tokens), eos_ids)).astype(int)
    if (got != [wanted, [1, 1, 1, 1]]).any():
      shown = {"tokens": tokens, "got": got, "wanted": np.array([wanted, [1, 1, 1, 1]])}
      raise Counterexample(check_eos, what, shown)


def check_temperature(logprobs: Callable[..., object]) -> None:
  """At every temperature the probabilities are softmax(logits / T), and so add up to 1."""
  logits = np.random.default_rng(0).normal(0.0, 2.0, (1, 5)).astype(np.float32)
  everywhere = np.broadcast_to(logits, (1, 5, 5))
  tokens = np.arange(5, dtype=np.int32)[None]
  for temperature in (1.0, 0.7, 2.0):
    result = logprobs(jnp.asarray(everywhere), jnp.asarray(tokens), temperature=temperature)
    got = np.asarray(result[0] if isinstance(result, tuple) else result)
    wanted = np.exp(logits / temperature)
    wanted = np.log(wanted / wanted.sum())
    if not _close(got, wanted):
      found = f"at temperature {temperature} they add up to {np.exp(got).sum():.4g}"
      shown = {"logits": logits, "got": got, "wanted": wanted}
      raise Counterexample(check_temperature, found, shown)
