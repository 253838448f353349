"""What each choice of the loss costs, measured exactly: the cases, and the page that shows them.

    python tests/helpers/estimators.py > docs/estimators.md

Each case is an expectation over every batch of the world of `enumeration.py`; none is sampled.
`test_unbiased.py` holds the cases to a second computation that shares no code with the library.
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
from tests.helpers.enumeration import Comparison, Expected

PROMPT = np.arange(world.PROMPTS)[:, None]
ADVANTAGES = {name: a for name, a in grpo_jax.ADVANTAGES.items() if a.rewards == ("total",)}
GROUP = 3  # completions per prompt where the advantage matters
FEW = 2  # and where it is leave_one_out, which is exact for any size
DISTANCES = (0.5, 1.0)  # of the policy that drew the completions, in units of `world.SHIFT`
GDPO_WEIGHTS = np.array([1.0, 0.5])  # of CORRECT and STYLE, as in `world.REWARDS`


def mask(ids):
  return jnp.asarray(world.MASK)[ids]


def rewards_of(ids):
  return jnp.asarray(world.REWARDS)[PROMPT, ids]


def reward_gradient(theta=world.POLICY, rewards=world.REWARDS) -> np.ndarray:
  """The gradient of mean reward: what an unbiased update follows."""
  return np.asarray(jax.grad(world.expected_reward)(jnp.asarray(theta), rewards))


def drawn_by(distance: float) -> np.ndarray:
  """The policy before its updates."""
  return world.POLICY - distance * world.SHIFT


def ascent(expected: Expected) -> np.ndarray:
  """What the update follows, times the token budget, so that `constant` reads as a plain sum."""
  return -world.MAX_LENGTH * expected.gradient


def advantages(name: str, ids) -> jax.Array:
  """Advantages [..., P, G] of one batch, by the name of their function."""
  if name != "multi_objective":
    return ADVANTAGES[name](rewards_of(ids))
  both = jnp.stack([jnp.asarray(world.CORRECT), jnp.asarray(world.STYLE)])
  return multi_objective(both[:, PROMPT, ids], jnp.asarray(GDPO_WEIGHTS))


@functools.cache
def _reward_expectation(average: str) -> Callable:
  def loss(logp, drawn_logp, ids, advantages):
    row = Algorithm(average=average)
    return policy_loss(row, logp, advantages, mask(ids), max_length=world.MAX_LENGTH)

  return world.expectation(loss, world.list_groups(world.PROMPTS, GROUP))


@functools.cache
def reward_case(advantage: str, average: str) -> Comparison:
  """On-policy, no trust region, no KL: the advantage and the average alone."""
  ids = jnp.asarray(world.list_groups(world.PROMPTS, GROUP).ids)
  of_all_batches = jax.vmap(functools.partial(advantages, advantage))(ids)
  expected = _reward_expectation(average)(world.POLICY, None, of_all_batches)
  return world.compare(ascent(expected), reward_gradient())


RATES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)
RATE_GROUP = 6


@functools.cache
def _rate_expectation(advantage: str) -> Callable:
  def loss(logp, drawn_logp, ids):
    solved = (ids == 0).astype(float)  # completion 0 is EOS alone
    row, signal = Algorithm(average="constant"), ADVANTAGES[advantage](solved)
    return policy_loss(row, logp, signal, mask(ids), max_length=world.MAX_LENGTH)

  return world.expectation(loss, world.list_groups(1, RATE_GROUP))


def rate_case(advantage: str, rate: float) -> Comparison:
  """One prompt with rewards of 0 and 1, solved at `rate`: what weight it gets."""
  theta = world.POLICY[:1].copy()
  others = np.logaddexp(theta[0, 0, 1], theta[0, 0, 2])
  theta[0, 0, world.EOS] = np.log(rate / (1 - rate)) + others
  solved = (np.arange(len(world.TOKENS)) == 0).astype(float)[None]
  return world.compare(ascent(_rate_expectation(advantage)(theta)), reward_gradient(theta, solved))


@functools.cache
def _kl_expectation(kl: str, average: str) -> Callable:
  def loss(logp, drawn_logp, ids):
    reference = world.logps(jnp.asarray(world.REFERENCE))[PROMPT, ids]
    nothing = jnp.zeros(ids.shape)
    if kl == "k1_in_reward":
      nothing = leave_one_out(-(jax.lax.stop_gradient(logp) - reference).sum(-1))
      row = Algorithm(average=average)
    else:
      row = Algorithm(kl=kl, beta=1.0, average=average)
    return policy_loss(
      row,
      logp,
      nothing,
      mask(ids),
      old_logp=drawn_logp,
      ref_logp=reference,
      max_length=world.MAX_LENGTH,
    )

  return world.expectation(loss, world.list_groups(world.PROMPTS, FEW))


@functools.cache
def kl_case(kl: str, average: str = "constant", distance: float = 0.0) -> dict[str, Comparison]:
  """`value` is relative to the KL at the contexts that were met; gradients as in `kl_targets`."""
  sampler = drawn_by(distance)
  expected = _kl_expectation(kl, average)(world.POLICY, sampler)
  targets = kl_targets(distance)
  met = world.context_kl(jnp.asarray(world.POLICY), world.REFERENCE, jnp.asarray(sampler))
  value = world.MAX_LENGTH * expected.loss / float(met)
  gradients = {k: world.compare(-ascent(expected), target) for k, target in targets.items()}
  return {"value": value, **gradients}


@functools.cache
def kl_targets(distance: float) -> dict[str, np.ndarray]:
  """Three gradients that could be meant by "the gradient of the KL"."""
  theta, sampler = jnp.asarray(world.POLICY), jnp.asarray(drawn_by(distance))
  at_contexts = jax.grad(world.context_kl)
  return {
    "reverse": np.asarray(at_contexts(theta, world.REFERENCE, sampler)),
    "forward": np.asarray(at_contexts(theta, world.REFERENCE, sampler, forward=True)),
    "sequence": np.asarray(jax.grad(world.sequence_kl)(theta, world.REFERENCE)),
  }


def product_ratio(logp, old_logp, mask):
  """The whole completion's ratio on each token, gradient of the token: a choice of one's own."""
  total = jax.lax.stop_gradient((logp - old_logp).sum(-1, keepdims=True))
  return total + logp - jax.lax.stop_gradient(logp)


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
  """Completions of an older policy; the share of tokens that the region stops comes second."""
  expected = _region_expectation(name)(world.POLICY, drawn_by(distance))
  share = expected.metrics["clip_ratio/region_mean"]
  return world.compare(ascent(expected), reward_gradient()), share


_BOUNDED = {"correction_min": 0.5, "correction_max": 2.0}
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
  """The trainer takes itself for on-policy, but the sampler is `distance` away from it."""
  expected = _correction_expectation(name)(world.POLICY, drawn_by(distance))
  return world.compare(ascent(expected), reward_gradient())


@functools.cache
def row_gradient(name: str) -> np.ndarray:
  """Expected on-policy gradient of a row of `ALGORITHMS` without its KL, groups of `FEW`."""
  row = dataclasses.replace(ALGORITHMS[name], beta=0.0)

  def loss(logp, drawn_logp, ids):
    return policy_loss(
      row,
      logp,
      advantages(row.advantage, ids),
      mask(ids),
      old_logp=drawn_logp,
      max_length=world.MAX_LENGTH,
    )

  return world.expectation(loss, world.list_groups(world.PROMPTS, FEW))(world.POLICY).gradient
