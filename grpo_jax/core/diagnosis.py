"""Looks at the arrays of one batch and says what keeps it from teaching the policy anything.

`diagnose` takes what a training step has anyway: no model, no files. Each entry of `CHECKS` looks
for one illness and answers with a `Finding`, or with None.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.core.checks import Array
from grpo_jax.core.kl import kl_k3

Confidence = Literal["sure", "likely", "possible"]
ORDER: tuple[Confidence, ...] = ("sure", "likely", "possible")

# Where a number stops being healthy. The first of a pair makes a finding likely, the second sure.
NO_VARIANCE = (0.5, 0.95)  # share of the groups
TRUNCATED = (0.15, 0.5)  # share of the completions
MISMATCH = (2e-3, 2e-2)  # nats; dense models have about 2e-4
RATIO = (0.1, 0.5)  # share of the tokens with a ratio outside of [1/2, 2]
KL = (0.5, 2.0)  # nats per token
LOW_ENTROPY = 0.05  # nats per token
DUPLICATES = (0.5, 0.9)  # share of the groups whose completions are all the same
DOMINANT = (0.5, 0.8)  # share of the batch's weight that one prompt has
LARGE_ADVANTAGE = (10.0, 30.0)
NO_PULL = 1e-4  # KL term over advantages, below which a reference changes nothing


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something that is wrong, or looks so.

  Attributes:
    name: a short name: "not_finite", or a key of `CHECKS`.
    seen: what is seen, with its numbers.
    reason: why that is bad, or where it comes from.
    advice: what to do next.
    confidence: "sure", "likely" or "possible".
    evidence: the numbers by name.
    places: indices that show it, worst first: (prompt,), (prompt, completion) or (prompt,
      completion, token).
  """

  name: str
  seen: str
  reason: str
  advice: str
  confidence: Confidence
  evidence: dict[str, float] = dataclasses.field(default_factory=dict)
  places: tuple[tuple[int, ...], ...] = ()

  def __str__(self) -> str:
    head = f"{self.name} ({self.confidence}): {self.seen}"
    return f"{head}\n  why:  {self.reason}\n  next: {self.advice}"


@dataclasses.dataclass(frozen=True)
class _Arrays:
  """Holds the arrays of a batch in NumPy, 0 where masked; None where not given."""

  rewards: Float[np.ndarray, "P G"]
  advantages: Float[np.ndarray, "P G T"] | None
  mask: Bool[np.ndarray, "P G T"] | None
  logp: Float[np.ndarray, "P G T"] | None
  old_logp: Float[np.ndarray, "P G T"] | None
  sampler_logp: Float[np.ndarray, "P G T"] | None
  ref_logp: Float[np.ndarray, "P G T"] | None
  entropy: Float[np.ndarray, "P G T"] | None
  tokens: Int[np.ndarray, "P G T"] | None
  ended: Bool[np.ndarray, "P G"] | None
  accuracy: Float[np.ndarray, "P G"] | None
  beta: float

  @property
  def constant(self) -> Bool[np.ndarray, "P"]:
    """Which groups have a scored reward, and no two different ones."""
    scored = ~np.isnan(self.rewards)
    high = np.where(scored, self.rewards, -np.inf).max(1)
    low = np.where(scored, self.rewards, np.inf).min(1)
    return scored.any(1) & (high == low)

  @property
  def right(self) -> Bool[np.ndarray, "P"]:
    """Which groups have only right completions: by accuracy, else by the best reward seen."""
    if self.accuracy is not None:
      return (self.accuracy >= 1).all(1)
    scored = ~np.isnan(self.rewards)
    best = np.nanmax(self.rewards) if scored.any() else np.nan
    return np.where(scored, self.rewards == best, True).all(1) & scored.any(1) & (best > 0)


def diagnose(
  rewards: Float[Array, "P G"],
  advantages: Float[Array, "P G"] | Float[Array, "P G T"] | None = None,
  mask: Bool[Array, "P G T"] | None = None,
  *,
  logp: Float[Array, "P G T"] | None = None,
  old_logp: Float[Array, "P G T"] | None = None,
  sampler_logp: Float[Array, "P G T"] | None = None,
  ref_logp: Float[Array, "P G T"] | None = None,
  entropy: Float[Array, "P G T"] | None = None,
  tokens: Int[Array, "P G T"] | None = None,
  ended: Bool[Array, "P G"] | None = None,
  accuracy: Float[Array, "P G"] | None = None,
  beta: float = 0.0,
) -> list[Finding]:
  """Returns what is wrong with a batch of groups, the surest findings first.

  Only rewards are needed. Each array that is given allows for more checks; arrays per token need
  `mask`. The batch may come from any trainer.

  Args:
    rewards: total rewards; NaN means "not scored".
    advantages: per completion or per token.
    mask: true on the tokens of the policy.
    logp: log-probabilities of the drawn tokens under the policy, in nats.
    old_logp: the same before the update.
    sampler_logp: as the sampler recorded them.
    ref_logp: under the reference of a KL term.
    entropy: of the policy at each token, in nats.
    tokens: ids of the completions.
    ended: true where a completion ended by itself, false where it was cut off.
    accuracy: 1 for right completions, 0 for wrong ones.
    beta: coefficient of the KL term.

  Raises:
    ValueError: an array has the wrong shape, or one per token comes without `mask`.

  Example:
    >>> import numpy as np
    >>> [found] = diagnose(np.zeros((4, 8)))
    >>> found.name, found.confidence
    ('too_hard', 'sure')
    >>> print(found.seen)
    all rewards are equal in 100% of the groups, and in 100% no completion is right
  """
  arrays = _arrays({**locals()})
  broken = not_finite(arrays)
  if broken:  # the other checks see 0 in the places of NaN and infinity
    arrays = dataclasses.replace(
      arrays,
      **{
        name: np.nan_to_num(getattr(arrays, name), posinf=0, neginf=0) for name in broken.evidence
      },
    )
  return by_confidence([broken, *(check(arrays) for check in CHECKS.values())])


def by_confidence(found: Iterable[Finding | None]) -> list[Finding]:
  """Returns the findings, the surest first; None is left out."""
  return sorted((f for f in found if f), key=lambda f: ORDER.index(f.confidence))


def _arrays(given: dict) -> _Arrays:
  """Returns the arguments of `diagnose` as checked NumPy arrays."""
  beta, rewards = given.pop("beta"), np.asarray(given.pop("rewards"), np.float64)
  if rewards.ndim != 2 or 0 in rewards.shape:
    raise ValueError(f"rewards has shape {rewards.shape}, expected [P, G]: prompts x completions")
  mask = given.pop("mask")
  mask = None if mask is None else np.asarray(mask).astype(bool)
  if mask is not None and (mask.ndim != 3 or mask.shape[:2] != rewards.shape):
    raise ValueError(f"mask has shape {mask.shape}, expected {rewards.shape} and an axis of tokens")
  arrays = {}
  for name, value in given.items():
    if value is None:
      arrays[name] = None
      continue
    array = np.asarray(value)
    by_completion = name in ("ended", "accuracy") or (name == "advantages" and array.ndim == 2)
    if not by_completion and mask is None:
      raise ValueError(f"{name} is an array per token: give mask as well")
    expected = rewards.shape if by_completion else mask.shape
    if array.shape != expected:
      raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
    if name == "advantages" and by_completion:
      array = array[..., None] * (1.0 if mask is None else mask)
    elif not by_completion:
      array = np.where(mask, array, 0)
    arrays[name] = array.astype(bool) if name == "ended" else array
  return _Arrays(rewards=rewards, mask=mask, beta=float(beta), **arrays)


def level_of(value: float, limits: tuple[float, float]) -> Confidence | None:
  """Returns how sure a number makes a finding; None while it is healthy."""
  if not value > limits[0]:
    return None
  return "sure" if value > limits[1] else "likely"


def _worst(order: np.ndarray, count: int = 3) -> tuple[tuple[int, ...], ...]:
  """Returns the indices of the largest entries."""
  flat = np.argsort(-order, axis=None)[:count]
  return tuple(tuple(int(i) for i in np.unravel_index(f, order.shape)) for f in flat)


def _per_token(a: _Arrays, values: np.ndarray) -> float:
  return float(values[a.mask].mean()) if a.mask.any() else 0.0


# --- rewards --------------------------------------------------------------------------------------


def not_scored(a: _Arrays) -> Finding | None:
  """Finds completions without a reward."""
  share = float(np.isnan(a.rewards).mean())
  if not share > 0.05:
    return None
  return Finding(
    "not_scored",
    f"{share:.0%} of the completions have no reward",
    "they teach nothing, and if a reward fails for hard problems the others are not the same task",
    "look at the errors and time limits of the reward functions",
    "sure",
    {"share": share},
    _worst(np.isnan(a.rewards).astype(float)),
  )


def too_hard(a: _Arrays) -> Finding | None:
  """Finds groups in which nothing is right."""
  constant, wrong = a.constant, a.constant & ~a.right
  share = float(wrong.mean())
  if not (level := level_of(share, NO_VARIANCE)):
    return None
  return Finding(
    "too_hard",
    f"all rewards are equal in {constant.mean():.0%} of the groups, and in {share:.0%} no "
    "completion is right",
    "a group without two different rewards has advantages of 0, and no gradient",
    "check by hand that a right answer gets a reward; then easier problems, a format that the "
    "model knows, larger groups, or partial rewards",
    level,
    {"no_variance": float(constant.mean()), "all_wrong": share},
    _worst(wrong.astype(float)),
  )


def too_easy(a: _Arrays) -> Finding | None:
  """Finds groups in which everything is right."""
  right = a.constant & a.right
  share = float(right.mean())
  if not share > NO_VARIANCE[1]:
    return None
  return Finding(
    "too_easy",
    f"in {share:.0%} of the groups all completions are right"
    if a.accuracy is not None
    else f"in {share:.0%} of the groups all completions have {np.nanmax(a.rewards):g}, the largest "
    "reward of the batch",
    "a group without two different rewards has advantages of 0, and no gradient",
    "if that is the reward of a right answer: harder problems, or draw problems by their pass "
    "rates (a curriculum); else check that a right answer gets more",
    "sure",
    {"all_right": share},
    _worst(right.astype(float)),
  )


def all_equal(a: _Arrays) -> Finding | None:
  """Finds a batch in which the groups are neither all right nor all wrong, but have no variance."""
  share = float(a.constant.mean())
  if too_hard(a) or too_easy(a) or not (level := level_of(share, (0.8, NO_VARIANCE[1]))):
    return None
  return Finding(
    "all_equal",
    f"all rewards are equal in {share:.0%} of the groups: {(a.constant & a.right).mean():.0%} all "
    f"right, {(a.constant & ~a.right).mean():.0%} not",
    "few groups have a gradient: the problems are easy or impossible, with little between",
    "problems that are solved sometimes: a filter by pass rate, a curriculum, or resampling",
    level,
    {"no_variance": share},
  )


# --- advantages -----------------------------------------------------------------------------------


def no_advantage(a: _Arrays) -> Finding | None:
  """Finds advantages that are 0 although rewards differ."""
  if a.advantages is None:
    return None
  lost = ~a.constant & ~np.isnan(a.rewards).all(1) & (a.advantages == 0).all((1, 2))
  if not lost.any():
    return None
  return Finding(
    "no_advantage",
    f"{int(lost.sum())} groups with different rewards have advantages of 0",
    "the advantages were computed from other rewards, or were lost on the way (a wrong mask or "
    "reshape)",
    "compare advantages[p] with rewards[p] for the prompts shown",
    "sure",
    {"groups": float(lost.sum())},
    _worst(lost.astype(float)),
  )


def mixed_groups(a: _Arrays) -> Finding | None:
  """Finds advantages that rank the completions of a group otherwise than its rewards."""
  if a.advantages is None or a.mask is None:
    return None
  tokens = np.maximum(a.mask.sum(-1), 1)
  mean = (a.advantages * a.mask).sum(-1) / tokens
  if (a.mask & (np.abs(a.advantages - mean[..., None]) > 1e-6)).any():
    return None  # credit per token need not follow the rewards
  better = a.rewards[:, :, None] > a.rewards[:, None, :]
  wrong = (better & (mean[:, :, None] < mean[:, None, :] - 1e-6)).any((1, 2))
  if not wrong.any():
    return None
  return Finding(
    "mixed_groups",
    f"in {int(wrong.sum())} groups a completion with a higher reward has a lower advantage",
    "rewards and completions are in another order: completions of one prompt must be neighbours",
    "check that row i of the rewards belongs to row i of the completions after every reshape, sort "
    "and gather",
    "likely",
    {"groups": float(wrong.sum())},
    _worst(wrong.astype(float)),
  )


def large_advantages(a: _Arrays) -> Finding | None:
  """Finds advantages that are too large to be those of a group."""
  if a.advantages is None:
    return None
  largest = float(np.abs(a.advantages).max())
  if not (level := level_of(largest, LARGE_ADVANTAGE)):
    return None
  return Finding(
    "large_advantages",
    f"an advantage has the size {largest:.3g}",
    "divided by a deviation near 0, or rewards on a large scale: one completion moves the policy",
    "rewards between 0 and 1, a larger eps, or an advantage that does not divide (group_centered)",
    level,
    {"largest": largest},
    _worst(np.abs(a.advantages)),
  )


def one_prompt(a: _Arrays) -> Finding | None:
  """Finds a batch whose update is that of one prompt."""
  if a.advantages is None or len(a.rewards) < 4:
    return None
  size = np.abs(a.advantages).sum((1, 2))
  share = float(size.max() / size.sum()) if size.sum() else 0.0
  if not (level := level_of(share, DOMINANT)):
    return None
  prompt = int(size.argmax())
  return Finding(
    "one_prompt",
    f"prompt {prompt} has {share:.0%} of all advantages, of {len(size)} prompts",
    "the other groups have no variance, or its completions are much longer: the update follows it",
    "more prompts in a step, resampling, or an average that weighs sequences or prompts",
    level,
    {"share": share},
    ((prompt,),),
  )


# --- completions ----------------------------------------------------------------------------------


def truncated(a: _Arrays) -> Finding | None:
  """Finds completions that were cut off, and whether they cost reward."""
  if a.ended is None:
    return None
  share = float((~a.ended).mean())
  if not (level := level_of(share, TRUNCATED)):
    return None
  evidence = {"truncated": share}
  if share == 1:
    return Finding(
      "truncated",
      "no completion ended by itself",
      "the end-of-text token is never drawn: it is not among the stop tokens, the chat template "
      "is not the model's own, or the length limit is below any answer",
      "compare the stop tokens with the ids at the end of a training text of the model; raise the "
      "length limit; or give a stop string",
      "possible",
      evidence,
    )
  scored = ~np.isnan(a.rewards)
  cut, whole = (
    float(a.rewards[where & scored].mean()) if (where & scored).any() else np.nan
    for where in (~a.ended, a.ended)
  )
  evidence |= {"reward_truncated": cut, "reward_ended": whole}
  if not cut < whole:
    return None
  return Finding(
    "truncated",
    f"{share:.0%} of the completions were cut off; their mean reward is {cut:.2f}, that of the "
    f"others {whole:.2f}",
    "an answer that is cut off counts as wrong, so that the policy learns to be short, not right",
    "a higher length limit, or leave truncated completions out of the loss (mask_truncated)",
    level,
    evidence,
    _worst((~a.ended).astype(float)),
  )


def duplicates(a: _Arrays) -> Finding | None:
  """Finds groups whose completions are all the same, and not right."""
  if a.tokens is None or a.rewards.shape[1] < 2:
    return None
  rows = np.where(a.mask, a.tokens, -1)
  same = (rows == rows[:, :1]).all((1, 2)) & ~a.right
  share = float(same.mean())
  if not (level := level_of(share, DUPLICATES)):
    return None
  return Finding(
    "duplicates",
    f"in {share:.0%} of the groups all completions are the same, and wrong",
    "sampling does not explore: the temperature is near 0, one key is used for a whole group, or "
    "the policy has collapsed",
    "temperature 1; a key of its own for each completion; an earlier checkpoint",
    level,
    {"share": share},
    _worst(same.astype(float)),
  )


def low_entropy(a: _Arrays) -> Finding | None:
  """Finds a policy that no longer explores although it is not right."""
  if a.entropy is None:
    return None
  mean, right = _per_token(a, a.entropy), float(a.right.mean())
  wrong = float((a.constant & ~a.right).mean())
  if not (mean < LOW_ENTROPY and wrong > NO_VARIANCE[0]):
    return None
  return Finding(
    "low_entropy",
    f"the entropy is {mean:.3f} nats per token, and {wrong:.0%} of the groups are all wrong",
    "the policy writes nearly the same each time, so no completion can be better than another",
    "start again with a lower learning rate, an entropy bonus, or a larger upper clip (DAPO)",
    "likely",
    {"entropy": mean, "all_right": right, "all_wrong": wrong},
  )


# --- log-probabilities ----------------------------------------------------------------------------


def mismatch(a: _Arrays) -> Finding | None:
  """Finds a sampler and a trainer that give the same tokens other log-probabilities."""
  name = "logp" if a.old_logp is None else "old_logp"
  trainer = getattr(a, name)
  if a.sampler_logp is None or trainer is None:
    return None
  gap = np.abs(trainer - a.sampler_logp)
  mean = _per_token(a, gap)
  if not (level := level_of(mean, MISMATCH)):
    return None
  position = np.cumsum(a.mask, -1) / np.maximum(a.mask.sum(-1, keepdims=True), 1)
  thirds = [a.mask & (position > low) & (position <= low + 1 / 3) for low in (0, 1 / 3, 2 / 3)]
  depth = [float(gap[where].mean()) if where.any() else 0.0 for where in thirds]
  grows = depth[2] > 2 * max(depth[0], 1e-12)
  return Finding(
    "mismatch",
    f"{name} and sampler_logp differ by {mean:.2g} nats on average "
    f"({', '.join(f'{d:.2g}' for d in depth)} in the first, second and last third)",
    "the difference grows with the depth: other positions, cache or attention"
    if grows
    else "the same at every depth: another temperature, other weights (an old copy in the "
    "sampler), another dtype, or top-p and top-k while sampling",
    "score one completion by both and compare token by token; until then use a correction "
    "(token_truncate)",
    level,
    {"mean": mean, "first": depth[0], "middle": depth[1], "last": depth[2]},
    _worst(gap),
  )


def ratio(a: _Arrays) -> Finding | None:
  """Finds importance ratios that ran away."""
  if a.logp is None or a.old_logp is None:
    return None
  change = np.abs(a.logp - a.old_logp)
  share = _per_token(a, change > np.log(2))
  if not (level := level_of(share, RATIO)):
    return None
  return Finding(
    "ratio",
    f"{share:.0%} of the tokens have a ratio outside of [0.5, 2]",
    "the policy is far from the one that drew the completions: most tokens are clipped, the others "
    "have a large variance",
    "a lower learning rate, fewer updates per rollout, or a smaller clip",
    level,
    {"share": share, "largest": float(np.exp(np.minimum(change.max(), 700)))},
    _worst(change),
  )


def kl(a: _Arrays) -> Finding | None:
  """Finds a policy that is far from its reference."""
  if a.logp is None or a.ref_logp is None:
    return None
  k3 = np.asarray(kl_k3(a.logp, a.ref_logp))
  mean = _per_token(a, k3)
  if not (level := level_of(mean, KL)):
    return None
  return Finding(
    "kl",
    f"the KL divergence to the reference is {mean:.2g} nats per token",
    "the policy no longer writes like the model it came from",
    "look at completions; a lower learning rate, or a larger beta",
    level,
    {"kl": mean},
    _worst(k3),
  )


def idle_reference(a: _Arrays) -> Finding | None:
  """Finds a KL term that cannot matter."""
  if a.beta == 0 or a.logp is None or a.ref_logp is None or a.advantages is None:
    return None
  pull = a.beta * _per_token(a, np.abs(a.logp - a.ref_logp))
  push = _per_token(a, np.abs(a.advantages))
  if not (0 < pull < NO_PULL * push):
    return None
  return Finding(
    "idle_reference",
    f"the KL term pulls with {pull:.1g} per token, the advantages with {push:.1g}",
    "beta is so small that the reference only costs memory and a forward pass",
    "beta = 0, or a beta between 0.001 and 0.05",
    "likely",
    {"pull": pull, "push": push},
  )


def not_finite(a: _Arrays) -> Finding | None:
  """Finds NaN and infinity at tokens that count."""
  names = ("advantages", "logp", "old_logp", "sampler_logp", "ref_logp", "entropy")
  bad = {}
  for name in names:
    if (value := getattr(a, name)) is not None:
      bad[name] = ~np.isfinite(value)
  counts = {name: float(where.sum()) for name, where in bad.items() if where.any()}
  if not counts:
    return None
  first = next(iter(counts))
  return Finding(
    "not_finite",
    "; ".join(
      f"{name} has {int(n)} number{'s that are' if n > 1 else ' that is'} not finite"
      for name, n in counts.items()
    ),
    "the loss and every parameter become NaN with the next update",
    f"look at the tokens shown: {first} is the first array with them",
    "sure",
    counts,
    _worst(bad[first].astype(float)),
  )


CHECKS: dict[str, Callable[[_Arrays], Finding | None]] = {
  check.__name__: check
  for check in (
    not_scored, too_hard, too_easy, all_equal, no_advantage, mixed_groups,
    large_advantages, one_prompt, truncated, duplicates, low_entropy, mismatch, ratio, kl,
    idle_reference,
  )
}  # fmt: skip
