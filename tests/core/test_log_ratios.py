"""Tests log-ratios as advantages: values by hand and by loops, masks, what they leave unchanged.

Their expected gradients are tested by enumeration in `test_unbiased.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import Algorithm, gae, log_ratio_advantages, penalized_rewards, policy_loss
from grpo_jax.core.log_ratios import sum_later
from tests.helpers.arrays import assert_close

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

P, G, T = 2, 3, 6
RNG = np.random.default_rng(0)
TARGET, OLD = RNG.uniform(-3, 0, (2, P, G, T)).astype(np.float32)
# An observation between two turns, a completion without tokens, and padding.
MASK = np.array(
  [
    [[1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]],
    [[1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
  ],
  bool,
)


def by_loops(discount, baseline, coefficient=1.0):
  """Adds the later log-ratios of each slot, one by one; an observation passes them on."""
  later, own = np.zeros((P, G, T)), np.zeros((P, G, T))
  for index in np.ndindex(P, G):
    for t in range(T):
      if discount == 0 and not MASK[index][t]:
        continue
      power = 0
      for k in range(t, T):
        if MASK[index][k]:
          term = float(TARGET[index][k]) - float(OLD[index][k])
          later[index][t] += discount**power * term
          power += 1
  for p, g, t in np.argwhere(MASK):
    others = [later[p, j, t] for j in range(G) if j != g]
    own[p, g, t] = coefficient * (later[p, g, t] - (np.mean(others) if baseline else 0.0))
  return own


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_against_loops(discount, baseline):
  actual = log_ratio_advantages(
    TARGET, OLD, MASK, coefficient=0.3, discount=discount, baseline=baseline
  )
  assert_close(actual, by_loops(discount, baseline != "none", 0.3), rtol=1e-5, atol=1e-6)


def test_an_observation_does_not_discount():
  values, mask = np.array([0.0, 0.0, 0.0, 4.0]), np.array([True, False, False, True])
  assert sum_later(jnp.asarray(values), mask, discount=0.5).tolist() == [2.0, 0.0, 0.0, 4.0]


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_masked_slots_may_hold_anything(discount):
  how = {"discount": discount, "baseline": "leave_one_out"}
  expected = log_ratio_advantages(TARGET, OLD, MASK, **how)
  for poison in (np.nan, np.inf, -np.inf):
    target, old = np.where(MASK, TARGET, poison), np.where(MASK, OLD, -poison)
    np.testing.assert_array_equal(log_ratio_advantages(target, old, MASK, **how), expected)
  assert not np.asarray(expected)[~MASK].any()


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_padding_and_micro_batches(discount, baseline):
  how = {"discount": discount, "baseline": baseline}
  whole = log_ratio_advantages(TARGET, OLD, MASK, **how)
  wide = [np.pad(a, ((0, 0), (0, 0), (0, 3)), constant_values=7) for a in (TARGET, OLD)]
  padded = log_ratio_advantages(*wide, np.pad(MASK, ((0, 0), (0, 0), (0, 3))), **how)
  assert_close(padded[..., :T], whole, rtol=1e-6, atol=1e-6)
  assert not np.asarray(padded)[..., T:].any()
  parts = [log_ratio_advantages(TARGET[i], OLD[i], MASK[i], **how) for i in range(P)]
  assert_close(np.stack(parts), whole, rtol=1e-6, atol=1e-6)


def test_a_policy_that_equals_its_target_has_no_gradient():
  for discount in (0.0, 1.0):
    advantages = log_ratio_advantages(OLD, OLD, MASK, discount=discount, baseline="leave_one_out")
    assert not np.asarray(advantages).any()
  slope = jax.grad(
    lambda logp: policy_loss("opd", logp, np.zeros((P, G)), MASK, teacher_logp=OLD)[0]
  )(jnp.asarray(OLD))
  assert not np.asarray(slope).any()


def test_no_gradient_flows():
  slopes = jax.grad(lambda a, b: log_ratio_advantages(a, b, MASK, discount=1.0).sum(), (0, 1))(
    TARGET, OLD
  )
  assert not any(np.asarray(slope).any() for slope in slopes)


def test_an_impossible_token_leaves_the_others_finite_without_a_discount():
  target = np.array([-1.0, -np.inf, -1.0], np.float32)
  actual = log_ratio_advantages(target, np.full(3, -2.0), np.ones(3, bool))
  assert actual.tolist() == [1.0, -np.inf, 1.0]


def test_a_group_of_one_has_no_baseline():
  how = {"discount": 1.0}
  actual = log_ratio_advantages(
    TARGET[:, :1], OLD[:, :1], MASK[:, :1], baseline="leave_one_out", **how
  )
  expected = log_ratio_advantages(TARGET[:, :1], OLD[:, :1], MASK[:, :1], **how)
  np.testing.assert_array_equal(actual, expected)


def test_in_a_group_of_two_the_baseline_is_the_other():
  both = [log_ratio_advantages(TARGET[:, :2], OLD[:, :2], np.ones((P, 2, T), bool), **how)
          for how in ({}, {"baseline": "leave_one_out"})]  # fmt: skip
  assert_close(both[1], both[0] - both[0][:, ::-1], rtol=1e-5, atol=1e-6)


def test_errors():
  with pytest.raises(ValueError, match=r"^target_logp has shape \(2,\), expected \(3,\)"):
    log_ratio_advantages(np.zeros(2), np.zeros(3), np.ones(3, bool))
  with pytest.raises(ValueError, match=r"^mask has shape \(2,\), expected \(3,\)"):
    log_ratio_advantages(np.zeros(3), np.zeros(3), np.ones(2, bool))
  with pytest.raises(ValueError, match=r"^old_logp has shape \(\), expected at least one axis"):
    log_ratio_advantages(0.0, 0.0, True)
  for discount in (-0.1, 1.1, np.nan):
    with pytest.raises(ValueError, match=r"^discount must be between 0 and 1, got"):
      log_ratio_advantages(OLD, OLD, MASK, discount=discount)
  with pytest.raises(ValueError, match=r"^unknown baseline 'mean'; known: leave_one_out, none"):
    log_ratio_advantages(OLD, OLD, MASK, baseline="mean")
  with pytest.raises(ValueError, match=r"^baseline='leave_one_out' needs an axis of completions"):
    log_ratio_advantages(OLD[0, 0], OLD[0, 0], MASK[0, 0], baseline="leave_one_out")


# --- the KL term in a critic's rewards ------------------------------------------------------------

REWARDS = RNG.normal(size=(P, G, T)).astype(np.float32)
# Of d = ref_logp - old_logp, by hand: Schulman's estimators. The ratio of k3_ratio is 1 here.
ESTIMATES = {"k1": lambda d: -d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(d) - d - 1}
ESTIMATES["k3_ratio"] = ESTIMATES["k3"]


@pytest.mark.parametrize("kl", ESTIMATES)
def test_penalized_rewards_by_hand(kl):
  actual = penalized_rewards(REWARDS, OLD, TARGET, MASK, beta=0.3, kl=kl)
  expected = np.where(MASK, REWARDS - 0.3 * ESTIMATES[kl](TARGET - OLD), 0.0)
  assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_without_a_coefficient_there_is_no_penalty():
  actual = penalized_rewards(REWARDS, OLD, TARGET, MASK, beta=0.0)
  np.testing.assert_array_equal(actual, np.where(MASK, REWARDS, 0.0))


def test_penalized_rewards_of_masked_slots_and_without_a_gradient():
  expected = penalized_rewards(REWARDS, OLD, TARGET, MASK, beta=0.3)
  for poison in (np.nan, np.inf, -np.inf):
    arrays = [np.where(MASK, a, poison) for a in (REWARDS, OLD, TARGET)]
    np.testing.assert_array_equal(penalized_rewards(*arrays, MASK, beta=0.3), expected)
  slopes = jax.grad(lambda *a: penalized_rewards(*a, MASK, beta=0.3).sum(), (0, 1, 2))(
    REWARDS, OLD, TARGET
  )
  assert not any(np.asarray(slope).any() for slope in slopes)


def test_a_critic_and_a_sum_of_later_penalties_agree():
  """With gamma and lambda 1, as the critic's values cancel: A = sum of later rewards - V."""
  values = np.where(MASK, RNG.normal(size=(P, G, T)), 0.0).astype(np.float32)
  row = Algorithm(advantage="group_centered", kl="k1", kl_in="reward", beta=0.3)
  inside = penalized_rewards(REWARDS, OLD, TARGET, MASK, beta=0.3)
  with_critic, _ = gae(inside, values, MASK, lam=1.0)
  without, _ = gae(np.where(MASK, REWARDS, 0.0), values, MASK, lam=1.0)

  def slope(row, advantages):
    return jax.grad(lambda logp: policy_loss(row, logp, advantages, MASK, ref_logp=TARGET)[0])(OLD)

  critic = Algorithm(advantage="gae", kl="k1", kl_in="reward", beta=0.3)
  assert_close(slope(critic, with_critic), slope(row, without), rtol=1e-4, atol=1e-6)
  assert np.abs(slope(critic, with_critic) - slope(critic, without)).max() > 1e-2


def test_errors_of_penalized_rewards():
  with pytest.raises(ValueError, match=r"^beta must be at least 0, got -1"):
    penalized_rewards(REWARDS, OLD, TARGET, MASK, beta=-1)
  with pytest.raises(ValueError, match=r"^ref_logp has shape \(2,\), expected \(3,\)"):
    penalized_rewards(np.zeros(3), np.zeros(3), np.zeros(2), np.ones(3, bool), beta=0.1)
  with pytest.raises(ValueError, match=r"^unknown kl 'k9'"):
    penalized_rewards(REWARDS, OLD, TARGET, MASK, beta=0.1, kl="k9")
