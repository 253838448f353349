"""Computes the exact bias of each choice of the loss, for tests and for a page.

    python -m tools.estimators_page > docs/estimators.md

Each case is an expectation over all batches of the world of `enumeration.py`, without sampling.
`test_unbiased.py` compares the cases with a second computation that shares no code with the
library.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import grpo_jax
from grpo_jax import ALGORITHMS, Algorithm, leave_one_out, multi_objective, policy_loss
from tests.helpers import enumeration as world
from tests.helpers.arrays import float64
from tests.helpers.enumeration import Comparison, Expected

PROMPT = np.arange(world.PROMPTS)[:, None]
ADVANTAGES = {
  name: a for name, a in grpo_jax.ADVANTAGES.items() if {*a.rewards} <= {"total", "mask"}
}
del ADVANTAGES["zero_advantages"]
AVERAGES = ("constant", "sequence", "token", "prompt")
GROUP = 3  # completions per prompt in the comparison of advantages
FEW = 2  # completions per prompt with leave_one_out, which is exact for any group size
DISTANCES = (0.5, 1.0)  # from the sampling policy, in units of `world.SHIFT`
GDPO_WEIGHTS = np.array([1.0, 0.5])  # weights of CORRECT and STYLE, as in `world.REWARDS`


def mask(ids):
  """Returns the mask [..., G, T] of the completions `ids` [..., G]."""
  return jnp.asarray(world.MASK)[ids]


def rewards_of(ids):
  """Returns the rewards [..., P, G] of the completions `ids` [..., P, G]."""
  return jnp.asarray(world.REWARDS)[PROMPT, ids]


def reward_gradient(theta=world.POLICY, rewards=world.REWARDS) -> np.ndarray:
  """Returns the gradient of the mean reward, which an unbiased update follows."""
  return np.asarray(jax.grad(world.expected_reward)(jnp.asarray(theta), rewards))


def drawn_by(distance: float) -> np.ndarray:
  """Returns the logits of the sampling policy, `distance` before the current policy."""
  return world.POLICY - distance * world.SHIFT


def ascent(expected: Expected) -> np.ndarray:
  """Returns the direction of the update times the token budget; `constant` is then a plain sum."""
  return ascent_of(expected.gradient)


def ascent_of(gradient: np.ndarray) -> np.ndarray:
  """Returns `ascent` of the gradient of an expected loss."""
  return -world.MAX_LENGTH * gradient


def advantages(name: str, ids) -> jax.Array:
  """Returns the advantages [..., P, G] of a batch, or [..., P, G, T]; `name` is their function."""
  if name == "returns_whitened":
    last = mask(ids) & ~jnp.pad(mask(ids)[..., 1:], [(0, 0)] * ids.ndim + [(0, 1)])
    token_rewards = jnp.where(last, rewards_of(ids)[..., None], 0.0)
    return grpo_jax.advantages(name, token_rewards=token_rewards, mask=mask(ids))
  if name != "multi_objective":
    return grpo_jax.advantages(name, rewards_of(ids), mask=mask(ids))
  both = jnp.stack([jnp.asarray(world.CORRECT), jnp.asarray(world.STYLE)])
  return multi_objective(both[:, PROMPT, ids], jnp.asarray(GDPO_WEIGHTS))


@functools.cache
def _reward_expectation(average: str, size: int) -> Callable:
  def loss(logp, drawn_logp, ids, advantages):
    row = Algorithm(average=average)
    return policy_loss(row, logp, advantages, mask(ids), max_length=world.MAX_LENGTH)

  return world.expectation(loss, world.list_groups(world.PROMPTS, size))


@functools.cache
def reward_case(advantage: str, average: str, size: int = GROUP) -> Comparison:
  """Compares an advantage and an average on-policy, without trust region and KL."""
  ids = jnp.asarray(world.list_groups(world.PROMPTS, size).ids)
  batch_advantages = jax.vmap(functools.partial(advantages, advantage))(ids)
  expected = _reward_expectation(average, size)(world.POLICY, None, batch_advantages)
  return world.compare(ascent(expected), reward_gradient())


RATES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)
RATE_GROUP = 6


@functools.cache
def _rate_expectation(advantage: str) -> Callable:
  def loss(logp, drawn_logp, ids):
    solved = (ids == 0).astype(float)  # completion 0 is a single EOS
    row, signal = Algorithm(average="constant"), ADVANTAGES[advantage](solved)
    return policy_loss(row, logp, signal, mask(ids), max_length=world.MAX_LENGTH)

  return world.expectation(loss, world.list_groups(1, RATE_GROUP))


def rate_case(advantage: str, rate: float) -> Comparison:
  """Compares the gradient of one prompt with rewards of 0 and 1 and success rate `rate`."""
  theta = world.POLICY[:1].copy()
  others = np.logaddexp(theta[0, 0, 1], theta[0, 0, 2])
  theta[0, 0, world.EOS] = np.log(rate / (1 - rate)) + others
  solved = (np.arange(len(world.TOKENS)) == 0).astype(float)[None]
  return world.compare(ascent(_rate_expectation(advantage)(theta)), reward_gradient(theta, solved))


@functools.cache
def _kl_expectation(kl: str, average: str) -> Callable:
  def loss(logp, drawn_logp, ids):
    reference = world.logps(jnp.asarray(world.REFERENCE))[PROMPT, ids]
    name, _, in_reward = kl.partition("_in_")
    place = {"kl_in": "reward", "log_ratio_baseline": "leave_one_out"} if in_reward else {}
    row = Algorithm(kl=name, beta=1.0, average=average, **place)
    return policy_loss(
      row,
      logp,
      jnp.zeros(ids.shape),
      mask(ids),
      old_logp=drawn_logp,
      ref_logp=reference,
      max_length=world.MAX_LENGTH,
    )

  return world.expectation(loss, world.list_groups(world.PROMPTS, FEW))


@functools.cache
def kl_case(kl: str, average: str = "constant", distance: float = 0.0) -> dict[str, Comparison]:
  """Returns the value relative to the KL at the visited contexts, and gradients by target."""
  sampler = drawn_by(distance)
  expected = _kl_expectation(kl, average)(world.POLICY, sampler)
  targets = kl_targets(distance)
  visited_kl = world.context_kl(jnp.asarray(world.POLICY), world.REFERENCE, jnp.asarray(sampler))
  value = world.MAX_LENGTH * expected.loss / float(visited_kl)
  gradients = {k: world.compare(-ascent(expected), target) for k, target in targets.items()}
  return {"value": value, **gradients}


@functools.cache
def kl_targets(distance: float) -> dict[str, np.ndarray]:
  """Returns the three gradients that "the gradient of the KL" can mean."""
  theta, sampler = jnp.asarray(world.POLICY), jnp.asarray(drawn_by(distance))
  at_contexts = jax.grad(world.context_kl)
  return {
    "reverse": np.asarray(at_contexts(theta, world.REFERENCE, sampler)),
    "forward": np.asarray(at_contexts(theta, world.REFERENCE, sampler, forward=True)),
    "sequence": np.asarray(jax.grad(world.sequence_kl)(theta, world.REFERENCE)),
  }


# Discount and baseline of a teacher's log-ratios; the teacher is `world.REFERENCE`.
TEACHERS = {
  "each token, no baseline": (0.0, "none"),
  "each token": (0.0, "leave_one_out"),
  "discount 0.5": (0.5, "leave_one_out"),
  "later tokens, no baseline": (1.0, "none"),
  "later tokens": (1.0, "leave_one_out"),
}


@functools.cache
def teacher_case(name: str, average: str = "constant") -> dict[str, Comparison]:
  """Compares a teacher's log-ratios, on-policy, with both gradients of the reverse KL."""
  discount, baseline = TEACHERS[name]
  row = dataclasses.replace(
    ALGORITHMS["opd"], teacher_discount=discount, log_ratio_baseline=baseline, average=average
  )

  def loss(logp, drawn_logp, ids):
    teacher = world.logps(jnp.asarray(world.REFERENCE))[PROMPT, ids]
    arrays = {"teacher_logp": teacher, "max_length": world.MAX_LENGTH}
    return policy_loss(row, logp, jnp.zeros(ids.shape), mask(ids), **arrays)

  expected = world.expectation(loss, world.list_groups(world.PROMPTS, FEW))(world.POLICY)
  targets = kl_targets(0.0)
  return {name: world.compare(-ascent(expected), targets[name]) for name in ("reverse", "sequence")}


def product_ratio(logp, old_logp, mask):
  """Returns the ratio of the whole completion on each token, as an example of a custom ratio.

  Its gradient is that of the token.
  """
  total = jax.lax.stop_gradient((logp - old_logp).sum(-1, keepdims=True))
  return total + logp - jax.lax.stop_gradient(logp)


# --- a critic -------------------------------------------------------------------------------------

LAMBDAS = (1.0, 0.95, 0.5, 0.0)


def _exact_values() -> np.ndarray:
  """Returns the expected reward from each token slot on, [P, C, T]."""
  with float64():
    p = np.asarray(world.probabilities(jnp.asarray(world.POLICY)))
  out = np.zeros((*p.shape, world.MAX_LENGTH))
  for c, row in enumerate(world.TOKENS):
    for t in range(world.LENGTHS[c]):
      same = (world.TOKENS[:, :t] == row[:t]).all(-1) & (t < world.LENGTHS)
      out[:, c, t] = (p * world.REWARDS)[:, same].sum(-1) / p[:, same].sum(-1)
  return out


EXACT_VALUES = _exact_values()
VALUES = {
  "exact": EXACT_VALUES,
  "wrong": EXACT_VALUES + 0.4 * np.sin(1.3 * world.CONTEXT + 0.5),
  "0": np.zeros((world.PROMPTS, *world.MASK.shape)),
}
TOKEN_REWARDS = np.where(
  np.arange(world.MAX_LENGTH) == world.LENGTHS[:, None] - 1, world.REWARDS[..., None], 0.0
)


@functools.cache
def _critic_expectation(average: str) -> Callable:
  def loss(logp, drawn_logp, ids, advantages):
    row = Algorithm(average=average)
    return policy_loss(row, logp, advantages, mask(ids), max_length=world.MAX_LENGTH)

  return world.expectation(loss, world.list_groups(world.PROMPTS, FEW))


@functools.cache
def critic_case(
  values: str, lam: float, advantage: str = "gae", average: str = "constant"
) -> Comparison:
  """Compares the advantages of a critic on-policy; `values` is a key of `VALUES`."""
  ids = jnp.asarray(world.list_groups(world.PROMPTS, FEW).ids)
  row = Algorithm(advantage=advantage, gamma=1.0, lam=lam)

  def batch(ids):
    arrays = {"token_rewards": TOKEN_REWARDS, "values": VALUES[values]}
    arrays = {name: jnp.asarray(array)[PROMPT, ids] for name, array in arrays.items()}
    return grpo_jax.advantages(row, **arrays, mask=mask(ids))

  expected = _critic_expectation(average)(world.POLICY, None, jax.vmap(batch)(ids))
  return world.compare(ascent(expected), reward_gradient())


# --- trust regions and corrections ----------------------------------------------------------------

_PLAIN = Algorithm(advantage="leave_one_out", average="constant")
_CLIP = dataclasses.replace(_PLAIN, trust_region="clip", clip_low=0.2, clip_high=0.2)
_CISPO = dataclasses.replace(_PLAIN, trust_region="cispo", ratio_min=0.0, ratio_max=5.0)
REGIONS: dict[str, Algorithm] = {
  "no ratio (old_logp=None)": _PLAIN,
  "product of token ratios": dataclasses.replace(_PLAIN, ratio=product_ratio),
  "token ratio": _PLAIN,
  "sequence ratio (GSPO)": dataclasses.replace(_PLAIN, ratio="sequence_token"),
  "clip 0.2 / 0.2 (PPO, GRPO)": _CLIP,
  "clip 0.2 / 0.28 (DAPO)": dataclasses.replace(_CLIP, clip_high=0.28),
  "dual clip 3": dataclasses.replace(_CLIP, trust_region="dual_clip", clip_dual=3.0),
  "CISPO 0 to 5": _CISPO,
  "CISPO 0.8 to 1.2": dataclasses.replace(_CISPO, ratio_min=0.8, ratio_max=1.2),
  "SAPO 1 / 1.05": dataclasses.replace(
    _PLAIN, trust_region="sapo", tau_positive=1.0, tau_negative=1.05
  ),
  "DPPO-TV 0.15": dataclasses.replace(
    _PLAIN, trust_region="dppo_tv", divergence=0.15, ratio_max=20.0
  ),
}


@functools.cache
def _region_expectation(name: str) -> Callable:
  def loss(logp, drawn_logp, ids):
    return policy_loss(
      REGIONS[name],
      logp,
      leave_one_out(rewards_of(ids)),
      mask(ids),
      old_logp=None if name.startswith("no ratio") else drawn_logp,
      max_length=world.MAX_LENGTH,
    )

  return world.expectation(loss, world.list_groups(world.PROMPTS, FEW))


@functools.cache
def region_case(name: str, distance: float) -> tuple[Comparison, float]:
  """Compares a trust region off-policy; also returns the fraction of tokens that it bounds."""
  expected = _region_expectation(name)(world.POLICY, drawn_by(distance))
  share = expected.metrics["clip_ratio/region_mean"]
  return world.compare(ascent(expected), reward_gradient()), share


_BOUNDED = {"correction_min": 0.5, "correction_max": 2.0}
_GEOMETRIC = {"correction": "geometric_mask", "geometric_min": 0.8, "geometric_max": 1.25}
CORRECTIONS: dict[str, Algorithm] = {
  "none": _PLAIN,
  "token_truncate at 2": dataclasses.replace(
    _PLAIN, correction="token_truncate", correction_max=2.0
  ),
  "token_mask 0.5 to 2": dataclasses.replace(_PLAIN, correction="token_mask", **_BOUNDED),
  "sequence_mask 0.5 to 2": dataclasses.replace(_PLAIN, correction="sequence_mask", **_BOUNDED),
  "sequence_mask, no bounds": dataclasses.replace(
    _PLAIN, correction="sequence_mask", correction_min=0.0, correction_max=np.inf
  ),
  "geometric_mask 0.8 to 1.25": dataclasses.replace(_PLAIN, **_GEOMETRIC),
  "geometric_mask, then token_truncate at 2": dataclasses.replace(
    _PLAIN,
    **_GEOMETRIC | {"correction": "geometric_mask+token_truncate", "correction_max": 2.0},
  ),
  "off_policy_mask 0.1": dataclasses.replace(
    _PLAIN, correction="off_policy_mask", off_policy_max=0.1
  ),
}


@functools.cache
def _correction_expectation(name: str) -> Callable:
  def loss(logp, drawn_logp, ids):
    return policy_loss(
      CORRECTIONS[name],
      logp,
      leave_one_out(rewards_of(ids)),
      mask(ids),
      sampler_logp=drawn_logp,
      max_length=world.MAX_LENGTH,
    )

  return world.expectation(loss, world.list_groups(world.PROMPTS, FEW))


@functools.cache
def correction_case(name: str, distance: float) -> Comparison:
  """Compares a correction for a sampler `distance` away from the trainer, without old_logp."""
  expected = _correction_expectation(name)(world.POLICY, drawn_by(distance))
  return world.compare(ascent(expected), reward_gradient())


RATE = 1.0  # learning rate of the updates that make a rollout stale


@functools.cache
def policy_before(updates: int) -> np.ndarray:
  """Returns the logits of the policy so many steps of gradient ascent before `world.POLICY`."""
  theta = world.POLICY
  for _ in range(updates):
    theta = theta - RATE * reward_gradient(theta)
  return theta


def stale_gradient(row: Algorithm, updates: int) -> np.ndarray:
  """Returns the expected gradient of a row on a rollout of the policy `updates` before, one update.

  The groups are of `FEW`, the old policy is the current one, and there is no KL term.
  """

  def loss(logp, drawn_logp, ids):
    return policy_loss(
      dataclasses.replace(row, beta=0.0),
      logp,
      advantages(row.advantage, ids),
      mask(ids),
      sampler_logp=drawn_logp,
      max_length=world.MAX_LENGTH,
    )

  expect = world.expectation(loss, world.list_groups(world.PROMPTS, FEW))
  return expect(world.POLICY, policy_before(updates)).gradient


@functools.cache
def row_gradient(name: str) -> np.ndarray:
  """Returns the expected on-policy gradient of a row without KL and teacher, groups of `FEW`."""
  row = dataclasses.replace(ALGORITHMS[name], beta=0.0, teacher_weight=0.0)

  def loss(logp, drawn_logp, ids):
    return policy_loss(
      row,
      logp,
      advantages(row.advantage, ids),
      mask(ids),
      old_logp=drawn_logp,
      sampler_logp=drawn_logp,
      max_length=world.MAX_LENGTH,
    )

  return world.expectation(loss, world.list_groups(world.PROMPTS, FEW))(world.POLICY).gradient
