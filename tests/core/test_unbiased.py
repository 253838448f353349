"""Tests which estimators are unbiased, and the bias of the others, exactly by enumeration.

Every number is computed twice: by the library on the world of `enumeration.py`, and by NumPy in
`enumeration_plain.py`, which shares no code with the library.
"""

import dataclasses
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax import (
  ALGORITHMS,
  Algorithm,
  group_centered,
  group_normalized,
  grpo_loss,
  leave_one_out,
  policy_loss,
)
from tests.helpers import enumeration as world
from tests.helpers import enumeration_plain as plain
from tests.helpers import estimators as cases
from tests.helpers.arrays import float64
from tests.helpers.enumeration import compare
from tools import estimators_page


@pytest.fixture(autouse=True, scope="module")
def x64():
  with float64():
    yield


def assert_comparison(actual, expected, tolerance):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# --- enumerated world ----------------------------------------------------------------------------


def test_the_world_lists_every_completion_once():
  # EOS first; EOS second; two tokens without EOS, then any token.
  assert len(world.TOKENS) == 1 + 2 + 4 * 3
  padded = [(*c, 0, 0)[: plain.BUDGET] for c in plain.COMPLETIONS]
  assert [tuple(row) for row in world.TOKENS.tolist()] == padded
  np.testing.assert_array_equal(world.MASK.sum(-1), plain.LENGTH)
  np.testing.assert_allclose(world.probabilities(world.POLICY).sum(-1), 1.0, atol=1e-14)
  np.testing.assert_allclose(world.logps(world.POLICY), plain.logps(world.POLICY), atol=1e-14)


def test_group_probabilities_add_up_and_count_orders():
  groups = world.list_groups(2, 3)
  assert groups.count.sum() == 15.0**6
  constant = world.expectation(lambda logp, drawn, ids: (1.0 + 0.0 * logp.sum(), {}), groups)
  assert constant(world.POLICY).loss == pytest.approx(1.0, abs=1e-12)


def test_true_gradients_by_central_differences():
  theta, reference, old = world.POLICY, world.REFERENCE, cases.drawn_by(0.5)
  targets = cases.kl_targets(0.5)
  pairs = {
    "reward": (cases.reward_gradient(), plain.reward),
    "sequence": (targets["sequence"], lambda x: plain.kl(x, reference)),
    "reverse": (targets["reverse"], lambda x: plain.context_kl(x, reference, old)),
    "forward": (targets["forward"], lambda x: plain.context_kl(x, reference, old, True)),
  }
  for name, (gradient, function) in pairs.items():
    expected = plain.difference(function, theta)
    np.testing.assert_allclose(gradient, expected, atol=1e-9, err_msg=name)
  assert plain.kl(theta, reference) == pytest.approx(plain.context_kl(theta, reference, theta))


# --- advantage and average -----------------------------------------------------------------------


ADVANTAGES = [*cases.ADVANTAGES, "multi_objective"]
# There are 14,400 batches of two pairs and 462,400 of two groups of three, those of the page.
SIZES = [2, pytest.param(cases.GROUP, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("average", cases.AVERAGES)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_scale_cosine_and_bias_of_every_advantage_and_average(advantage, average, size):
  actual = cases.reward_case(advantage, average, size)
  assert_comparison(
    actual, compare(plain.gradient(advantage, average, size), plain.reward_gradient()), 1e-8
  )


@pytest.mark.parametrize("size", SIZES)
def test_only_baselines_with_constant_weights_are_unbiased_on_policy(size):
  for advantage in ADVANTAGES:
    for average in cases.AVERAGES:
      case = cases.reward_case(advantage, average, size)
      if average == "constant" and advantage in ("leave_one_out", "group_centered"):
        assert case.bias < 1e-12
        assert case.scale == pytest.approx(
          1.0 if advantage == "leave_one_out" else (size - 1) / size, abs=1e-12
        )
      else:
        assert case.bias > 0.02, (advantage, average)


# Computed by `plain.gradient` and `plain.off_policy`: cosine and relative bias.
RECORDED_REWARD = {
  ("leave_one_out", "sequence"): (0.9929, 0.1196),
  ("leave_one_out", "token"): (0.9995, 0.0318),
  ("group_normalized", "constant"): (0.9224, 0.4186),
  ("group_normalized", "sequence"): (0.9501, 0.3284),
  ("group_normalized", "token"): (0.9321, 0.3885),
  ("batch_normalized", "constant"): (0.9988, 0.0492),
  ("batch_whitened", "constant"): (0.9854, 0.1726),
  ("max_rl", "constant"): (0.9455, 0.3444),
  ("multi_objective", "token"): (0.9670, 0.2635),
}
RECORDED_REGION = {  # at the larger distance
  "no ratio (old_logp=None)": (0.9376, 0.3710),
  "token ratio": (0.9883, 0.1540),
  "sequence ratio (GSPO)": (0.9956, 0.0942),
  "clip 0.2 / 0.2 (PPO, GRPO)": (0.9548, 0.3113),
  "clip 0.2 / 0.28 (DAPO)": (0.9689, 0.2553),
  "dual clip 3": (0.7009, 1.0178),
  "SAPO 1 / 1.05": (0.9075, 0.4629),
  "DPPO-TV 0.15": (0.9904, 0.1397),
}


@pytest.mark.slow
def test_biases_of_advantages_match_the_recorded_values():
  for (advantage, average), expected in RECORDED_REWARD.items():
    case = cases.reward_case(advantage, average)
    assert_comparison((case.cosine, case.bias), expected, 6e-5)


def test_biases_of_trust_regions_match_the_recorded_values():
  for region, expected in RECORDED_REGION.items():
    case, _ = cases.region_case(region, 1.0)
    assert_comparison((case.cosine, case.bias), expected, 6e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_group_centered_scale_is_n_minus_1_over_n(size):
  rewards = jnp.asarray(world.REWARDS[:1])
  true = cases.reward_gradient(world.POLICY[:1], world.REWARDS[:1])
  for signal, scale in ((leave_one_out, 1.0), (group_centered, (size - 1) / size)):

    def loss(logp, drawn_logp, ids, signal=signal):
      row = Algorithm(average="constant")
      return policy_loss(
        row, logp, signal(rewards[:, ids[0]]), cases.mask(ids), max_length=plain.BUDGET
      )

    expect = world.expectation(loss, world.list_groups(1, size), compiled=True)
    gradient = expect(world.POLICY[:1]).gradient
    np.testing.assert_allclose(-plain.BUDGET * gradient, scale * true, atol=1e-14)


@pytest.mark.parametrize(
  "name", [n for n, row in ALGORITHMS.items() if "values" not in row.rewards and n != "opd"]
)
def test_every_row_reduces_to_advantage_and_average_on_policy(name):
  row = ALGORITHMS[name]
  expected = plain.gradient(row.advantage, row.average, cases.FEW)
  np.testing.assert_allclose(-plain.BUDGET * cases.row_gradient(name), expected, atol=1e-9)


@pytest.mark.parametrize("rate", cases.RATES)
def test_weight_of_a_prompt_by_success_rate(rate):
  """The weight is `E[A | solved] - E[A | failed]`; the number of other successes is binomial."""
  n = cases.RATE_GROUP

  def scale(if_solved, if_failed):
    others = [math.comb(n - 1, k) * rate**k * (1 - rate) ** (n - 1 - k) for k in range(n)]
    return sum(p * (if_solved(k + 1) - if_failed(k)) for k, p in enumerate(others))

  def std(k):
    return math.sqrt(k * (n - k) / (n * (n - 1))) + 1e-4

  expected = {
    "leave_one_out": 1.0,
    "group_centered": (n - 1) / n,
    "group_normalized": scale(lambda k: (1 - k / n) / std(k), lambda k: -k / n / std(k)),
    "max_rl": (1 - (1 - rate) ** (n - 1)) / rate,
  }
  for name, value in expected.items():
    case = cases.rate_case(name, rate)
    assert case.scale == pytest.approx(value, abs=1e-10), name
    assert case.bias < 1e-10


# --- a critic -------------------------------------------------------------------------------------


def values_of_tokens(by_context):
  """Returns values of contexts [P, X] at the token slots of each completion, [P, C, T]."""
  out = np.zeros((2, 15, 3))
  for c, completion in enumerate(plain.COMPLETIONS):
    for t in range(len(completion)):
      out[:, c, t] = by_context[:, plain.CONTEXTS.index(completion[:t])]
  return out


def test_exact_values_by_recursion():
  np.testing.assert_allclose(
    cases.VALUES["exact"], values_of_tokens(plain.exact_values()), atol=1e-12
  )


@pytest.mark.parametrize("lam", cases.LAMBDAS)
@pytest.mark.parametrize("values", cases.VALUES)
def test_advantages_of_a_critic_by_hand(values, lam):
  expected = compare(plain.critic_gradient(cases.VALUES[values], lam), plain.reward_gradient())
  assert_comparison(cases.critic_case(values, lam), expected, 1e-9)


@pytest.mark.parametrize("average", ["constant", "token"])
def test_whitened_advantages_of_a_critic_by_hand(average):
  expected = plain.whitened_gradient(cases.VALUES["wrong"], 0.95, average)
  actual = cases.critic_case("wrong", 0.95, "gae_whitened", average)
  assert_comparison(actual, compare(expected, plain.reward_gradient()), 1e-7)


def test_gae_is_unbiased_with_exact_values_or_with_lambda_1():
  for lam in cases.LAMBDAS:
    assert cases.critic_case("exact", lam).bias < 1e-12
    assert cases.critic_case("exact", lam).scale == pytest.approx(1.0, abs=1e-12)
  for values in cases.VALUES:
    assert cases.critic_case(values, 1.0).bias < 1e-12
  biases = [cases.critic_case("wrong", lam).bias for lam in cases.LAMBDAS]
  assert biases == sorted(biases)
  assert biases[1] > 0.01


# --- turns ---------------------------------------------------------------------------------------

# A completion of this world as an episode: its first token is a turn, and the others are another.
TURN_ENDS = np.array([(0, max(len(c) - 1, 0)) for c in plain.COMPLETIONS])
HAS_TURN = np.array([(True, len(c) > 1) for c in plain.COMPLETIONS])
TURN_OF_TOKEN = np.array([0, 1, 1])
# A reward of the first token, and one of the whole completion.
TURN_REWARDS = np.stack(
  [
    np.array([[0.2, 1.0, -0.5], [1.0, 0.3, 0.0]])[:, [c[0] for c in plain.COMPLETIONS]],
    world.STYLE,
  ],
  -1,
)


def turn_gradients():
  """Returns each turn's part of the gradient of the mean sum of rewards, [S, P, X, V], by hand."""
  rewards = np.where(HAS_TURN, TURN_REWARDS, 0.0)
  later = np.flip(np.cumsum(np.flip(rewards, -1), -1), -1)
  drawn = plain.probabilities(world.POLICY) / 2
  parts = []
  for turn in range(2):
    on = (turn == TURN_OF_TOKEN) & (np.arange(3) < plain.LENGTH[:, None])
    parts.append(plain.pull(np.where(on, (drawn * later[..., turn])[..., None], 0.0), world.POLICY))
  return np.stack(parts)


def expected_turn_gradients(function, size):
  """Returns the expected gradient of each turn, on-policy, for groups of `size`, [S, P, X, V]."""
  groups = world.list_groups(1, size)
  ids = groups.ids[:, 0]
  gradients = np.zeros((2, *world.POLICY.shape))
  for prompt in range(2):
    rewards = np.where(HAS_TURN, TURN_REWARDS[prompt], np.nan)[ids]
    mask = jnp.asarray(world.MASK)[ids]
    a = np.asarray(jax.jit(function)(rewards, jnp.asarray(TURN_ENDS)[ids], mask))
    drawn = groups.count * plain.probabilities(world.POLICY)[prompt][ids].prod(-1)
    terms = drawn[:, None, None] * a / (2 * size)
    coefficients = np.zeros((2, 15, 3))
    np.add.at(coefficients[prompt], ids, terms)
    for turn in range(2):
      on = np.where(turn == TURN_OF_TOKEN, coefficients, 0.0)
      gradients[turn] += plain.pull(on, world.POLICY)
  return gradients


def test_the_parts_of_the_turns_add_up_to_the_gradient_of_the_sum_of_rewards():
  total = np.where(HAS_TURN, TURN_REWARDS, 0.0).sum(-1)
  expected = plain.difference(lambda x: plain.reward(x, total), world.POLICY)
  np.testing.assert_allclose(turn_gradients().sum(0), expected, atol=1e-9)


@pytest.mark.parametrize("size", [2, 3])
def test_turn_advantages_are_unbiased_but_for_the_division(size):
  """An eps that outweighs every deviation leaves the baseline: each turn has its part, scaled.

  The scale is the mean of (n - 1) / n over the number n of completions that have the turn.
  """
  large = 1e9

  def centered(*arguments):
    return large * grpo_jax.turn_advantages(*arguments, eps=large)

  actual, true = expected_turn_gradients(centered, size), turn_gradients()
  longer = plain.probabilities(world.POLICY) @ HAS_TURN[:, 1]
  for prompt in range(2):
    others = [
      math.comb(size - 1, k) * longer[prompt] ** k * (1 - longer[prompt]) ** (size - 1 - k)
      for k in range(size)
    ]
    scale = sum(p * k / (k + 1) for k, p in enumerate(others))
    first, second = actual[:, prompt], true[:, prompt]
    np.testing.assert_allclose(first[0], (size - 1) / size * second[0], atol=1e-8)
    np.testing.assert_allclose(first[1], scale * second[1], atol=1e-8)


def test_turn_advantages_by_hand():
  """The whole estimator, with the division, against the formula in NumPy."""

  def by_hand(rewards, ends, mask):
    out = np.zeros(mask.shape)
    rewards, later = np.asarray(rewards), np.nancumsum(rewards[..., ::-1], -1)[..., ::-1]
    for turn in range(2):
      has = ~np.isnan(rewards[..., turn])
      n = has.sum(-1, keepdims=True)
      r = np.where(has, later[..., turn], 0.0)
      centered = np.where(has, r - r.sum(-1, keepdims=True) / np.maximum(n, 1), 0.0)
      std = np.sqrt((centered**2).sum(-1, keepdims=True) / np.maximum(n - 1, 1))
      out[..., turn == TURN_OF_TOKEN] = (centered / (std + 1e-4))[..., None]
    return np.where(mask, out, 0.0)

  groups = world.list_groups(1, 3)
  rewards = np.where(HAS_TURN, TURN_REWARDS[0], np.nan)[groups.ids[:, 0]]
  mask = world.MASK[groups.ids[:, 0]]
  actual = grpo_jax.turn_advantages(rewards, TURN_ENDS[groups.ids[:, 0]], mask)
  np.testing.assert_allclose(actual, by_hand(rewards, None, mask), atol=1e-9)


def test_process_advantages_are_biased_where_the_number_of_turns_differs():
  """Each turn lowers the advantage by a mean, so longer episodes have another baseline."""
  large = 1e9

  def centered(*arguments):
    return large * grpo_jax.process_advantages(*arguments, eps=large)

  actual, true = expected_turn_gradients(centered, 3), turn_gradients()
  assert compare(actual[0], true[0]).bias > 0.2


# --- the whole loss, by central differences over ordered groups ----------------------------------


@pytest.mark.parametrize("distance", [0.0, 1.0])
def test_expected_gradient_of_the_grpo_loss_by_central_differences(distance):
  """Differentiates the whole expected loss numerically, including the clip and k3."""
  theta, old = world.POLICY[:1], cases.drawn_by(distance)[:1]
  ids = np.array(list(itertools.product(range(15), repeat=3)))
  drawn = plain.probabilities(old)[0][ids].prod(-1)
  a = plain.advantages("group_normalized", world.REWARDS[0][ids], None)[..., None]
  weights = (np.arange(plain.BUDGET) < plain.LENGTH[ids][..., None]) / (
    3 * plain.LENGTH[ids][..., None]
  )
  old_logp, ref_logp = (plain.logps(x)[0][ids] for x in (old, world.REFERENCE[:1]))

  def expected_loss(x):
    logp = plain.logps(x)[0][ids]
    ratio, gap = np.exp(logp - old_logp), logp - ref_logp
    objective = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    return drawn @ (weights * -(objective - 0.3 * (np.exp(-gap) + gap - 1))).sum((-1, -2))

  def loss(logp, drawn_logp, ids):
    signal = group_normalized(jnp.asarray(world.REWARDS)[:1][0, ids])
    reference = world.logps(world.REFERENCE)[0, ids]
    return grpo_loss(
      logp, signal, cases.mask(ids), old_logp=drawn_logp, ref_logp=reference, beta=0.3
    )

  actual = world.expectation(loss, world.list_groups(1, 3), compiled=True)(theta, old)
  assert actual.loss == pytest.approx(expected_loss(theta), abs=1e-12)
  np.testing.assert_allclose(actual.gradient, plain.difference(expected_loss, theta), atol=1e-8)
  clipped = actual.metrics["clip_ratio/region_mean"]
  assert clipped == 0 if distance == 0 else clipped > 0.05


# --- KL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.0, 0.5])
@pytest.mark.parametrize("average", ["constant", "sequence"])
@pytest.mark.parametrize("kl", plain.KL_SLOPES)
def test_kl_terms_by_hand(kl, average, distance):
  theta, old, targets = world.POLICY, cases.drawn_by(distance), cases.kl_targets(distance)
  logp, drawn_logp = plain.logps(theta), plain.logps(old)
  gap, ratio = logp - plain.logps(world.REFERENCE), np.exp(logp - drawn_logp)
  drawn = plain.probabilities(old)[:, :, None] / 2
  if average == "sequence":
    drawn = drawn * plain.BUDGET / plain.LENGTH[:, None]
  expected = plain.pull(drawn * plain.KL_SLOPES[kl](gap, ratio), theta)
  inside = np.arange(plain.BUDGET) < plain.LENGTH[:, None]
  value = (drawn * np.where(inside, plain.KL_VALUES[kl](gap, ratio), 0.0)).sum()
  actual = cases.kl_case(kl, average, distance)
  for name, target in targets.items():
    assert_comparison(actual[name], compare(expected, target), 1e-9)
  visited_kl = plain.context_kl(theta, world.REFERENCE, old)
  assert actual["value"] == pytest.approx(value / visited_kl, abs=1e-10)


def test_gradient_of_each_kl_term():
  exact = {
    ("k2", 0.0): "reverse",
    ("k3", 0.0): "forward",
    ("k3_k2_gradient", 0.0): "reverse",
    ("k3_ratio", 0.0): "reverse",
    ("k3_ratio", 0.5): "reverse",
    ("k1_in_reward", 0.0): "sequence",
  }
  for (kl, distance), target in exact.items():
    case = cases.kl_case(kl, "constant", distance)
    for name in ("reverse", "forward", "sequence"):
      if name == target:
        assert case[name].bias < 1e-12
        assert case[name].scale == pytest.approx(1.0, abs=1e-12)
      else:
        assert case[name].bias > 0.05, (kl, name)


# --- log-ratios as advantages --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "average"),
  [(name, "constant") for name in cases.TEACHERS]
  + [(name, "sequence") for name, (_, baseline) in cases.TEACHERS.items() if baseline == "none"],
)
def test_teachers_by_hand(name, average):
  """A baseline of other completions leaves the expectation of a plain sum as it is."""
  discount, _ = cases.TEACHERS[name]
  gap = plain.logps(world.POLICY) - plain.logps(world.REFERENCE)
  expected = plain.later_gradient(gap, discount, average)
  for target, gradient in cases.kl_targets(0.0).items():
    if target != "forward":
      actual = cases.teacher_case(name, average)[target]
      assert_comparison(actual, compare(expected, gradient), 1e-9)


def test_which_kl_a_teacher_descends():
  """Each token alone: the KL at each context. With all later tokens: that of whole completions."""
  for name, (discount, _) in cases.TEACHERS.items():
    for target, of_discount in (("reverse", 0.0), ("sequence", 1.0)):
      case = cases.teacher_case(name)[target]
      if discount == of_discount:
        assert case.bias < 1e-12, (name, target)
        assert case.scale == pytest.approx(1.0, abs=1e-12)
      else:
        assert case.bias > 0.02, (name, target)


def test_a_student_that_starts_at_its_teacher_has_no_gradient():
  """Exactly 0 in every batch, not only in expectation."""
  for discount in (0.0, 1.0):
    row = dataclasses.replace(ALGORITHMS["opd"], teacher_discount=discount)

    def slope(logp, row=row):
      signal = jnp.zeros(logp.shape[:-1])
      return policy_loss(row, logp, signal, jnp.asarray(world.MASK)[None], teacher_logp=logp)[0]

    assert not np.asarray(jax.grad(slope)(world.logps(world.POLICY)[:1])).any()


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_only_k1_is_unbiased_in_the_reward(kl):
  case = cases.kl_case(f"{kl}_in_reward")["sequence"]
  if kl == "k1":
    assert case.bias < 1e-12
    assert case.scale == pytest.approx(1.0, abs=1e-12)
  else:
    assert case.bias > 0.05
  values = plain.logps(world.POLICY) - plain.logps(world.REFERENCE)
  expected = plain.later_gradient(plain.KL_VALUES[kl](values, 1.0), 1.0, "constant")
  assert_comparison(case, compare(expected, cases.kl_targets(0.0)["sequence"]), 1e-9)


def test_rloo_with_the_kl_in_the_reward_is_the_gradient_of_the_regularized_reward():
  """Differentiates numerically mean reward minus beta times the KL of whole completions."""
  row = ALGORITHMS["rloo_kl"]

  def loss(logp, drawn_logp, ids):
    reference = world.logps(jnp.asarray(world.REFERENCE))[cases.PROMPT, ids]
    arrays = {"ref_logp": reference, "max_length": world.MAX_LENGTH}
    signal = leave_one_out(cases.rewards_of(ids))
    return policy_loss(row, logp, signal, cases.mask(ids), **arrays)

  actual = world.expectation(loss, world.list_groups(2, 2))(world.POLICY).gradient
  expected = plain.difference(
    lambda x: plain.reward(x) - row.beta * plain.kl(x, world.REFERENCE), world.POLICY
  )
  np.testing.assert_allclose(-plain.BUDGET * actual, expected, atol=1e-9)


def test_k1_as_a_loss_has_a_gradient_only_with_length_weights():
  assert cases.kl_case("k1")["reverse"].scale == 0.0
  references = {"ref": world.REFERENCE, "elsewhere": world.table(5.0)}
  gradients = []
  for reference in references.values():

    def loss(logp, drawn_logp, ids, reference=reference):
      row = Algorithm(kl="k1", beta=1.0, average="sequence")
      ref_logp = world.logps(reference)[cases.PROMPT, ids]
      return policy_loss(row, logp, jnp.zeros(ids.shape), cases.mask(ids), ref_logp=ref_logp)

    expect = world.expectation(loss, world.list_groups(2, 1), compiled=True)
    gradients.append(expect(world.POLICY).gradient)
  assert np.abs(gradients[0]).max() > 0.01
  np.testing.assert_allclose(gradients[0], gradients[1], atol=1e-15)  # independent of the reference


def test_values_of_the_kl_estimators():
  for kl, exact in {"k1": True, "k2": False, "k3": True, "k3_ratio": True}.items():
    assert (abs(cases.kl_case(kl)["value"] - 1) < 1e-12) is exact
  for kl, exact in {"k1": False, "k2": False, "k3": False, "k3_ratio": True}.items():
    assert (abs(cases.kl_case(kl, distance=0.5)["value"] - 1) < 1e-12) is exact


# --- off-policy completions ----------------------------------------------------------------------


@pytest.mark.parametrize("distance", cases.DISTANCES)
@pytest.mark.parametrize("region", cases.REGIONS)
def test_trust_regions_off_policy_by_hand(region, distance):
  expected = compare(plain.off_policy(plain.SLOPES[region], distance), plain.reward_gradient())
  assert_comparison(cases.region_case(region, distance)[0], expected, 1e-9)


@pytest.mark.parametrize("distance", cases.DISTANCES)
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_sampler_corrections_by_hand(correction, distance):
  expected = compare(
    plain.off_policy(plain.CORRECTION_SLOPES[correction], distance), plain.reward_gradient()
  )
  assert_comparison(cases.correction_case(correction, distance), expected, 1e-9)


def test_bounded_fraction_is_a_mean_over_tokens_of_the_batch():
  """The symmetric clip by hand: the mean over the tokens of both groups of two."""
  bounded, tokens, drawn = [], [], []
  for prompt in range(2):
    t = plain.Tokens(prompt, cases.drawn_by(1.0))
    inside = np.arange(plain.BUDGET) < plain.LENGTH[:, None, None]
    counts = (~plain.inside_clip(t.ratio, t.a, 0.2, 0.2) & inside).sum(-1)
    bounded.append((counts + counts.T).ravel())
    tokens.append((plain.LENGTH[:, None] + plain.LENGTH).ravel())
    drawn.append(t.pair.ravel())
  share = np.add.outer(*bounded) / np.add.outer(*tokens)
  expected = (np.multiply.outer(*drawn) * share).sum()
  assert cases.region_case("clip 0.2 / 0.2 (PPO, GRPO)", 1.0)[1] == pytest.approx(
    expected, abs=1e-12
  )


def test_only_whole_completion_ratios_are_unbiased_off_policy():
  for distance in cases.DISTANCES:
    for region in cases.REGIONS:
      case, _ = cases.region_case(region, distance)
      exact = region == "product of token ratios"
      assert case.bias < 1e-12 if exact else case.bias > 0.03, region
      assert not exact or case.scale == pytest.approx(1.0, abs=1e-12)
    for correction in cases.CORRECTIONS:
      case = cases.correction_case(correction, distance)
      exact = correction == "sequence_mask, no bounds"
      assert case.bias < 1e-12 if exact else case.bias > 0.01, correction


def test_bias_of_the_token_ratio_is_proportional_to_the_distance():
  far, near = (cases.region_case("token ratio", d)[0].bias for d in (0.02, 0.01))
  assert far / near == pytest.approx(2.0, abs=0.02)
  for region in cases.REGIONS:
    assert cases.region_case(region, 0.0)[0].bias < 1e-12


def test_token_ratio_is_exact_for_single_tokens_only_without_clip():
  theta, old = np.array([0.3, -0.5, 0.9]), np.array([-0.4, 0.6, 0.1])
  rewards = np.array([1.0, 0.2, 0.0])
  p, q = plain.softmax(theta), plain.softmax(old)
  true = p * (rewards - p @ rewards)  # of sum_v p_v r_v

  def gradient(row):
    def loss(theta, pair):
      logp, old_logp = (jax.nn.log_softmax(x)[pair][None, :, None] for x in (theta, old))
      signal = leave_one_out(jnp.asarray(rewards)[pair][None])
      return policy_loss(row, logp, signal, np.ones((1, 2, 1), bool), old_logp=old_logp)[0]

    pairs = np.array(list(itertools.product(range(3), repeat=2)))
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(theta, pairs)
    return -q[pairs].prod(-1) @ np.asarray(gradients)

  np.testing.assert_allclose(gradient(Algorithm()), true, atol=1e-14)
  clipped = Algorithm(trust_region="clip", clip_low=0.2, clip_high=0.2)
  assert compare(gradient(clipped), true).bias > 0.1


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_in_docs_is_the_output_of_the_command():
  committed = (Path(__file__).parents[2] / "docs" / "estimators.md").read_text()
  assert committed == estimators_page.page(), (
    "run: python -m tools.estimators_page > docs/estimators.md"
  )


def test_the_page_describes_every_choice():
  every = {(a, v) for a in cases.ADVANTAGES for v in cases.AVERAGES}
  assert set(estimators_page.REWARD_MEANING) == every
  assert set(estimators_page.KL_MEANING) == {*plain.KL_SLOPES, "k1_in_reward"}
  assert set(estimators_page.TEACHER_MEANING) == set(cases.TEACHERS)
  assert set(estimators_page.REGION_MEANING) == set(cases.REGIONS) == set(plain.SLOPES)
  assert set(estimators_page.CORRECTION_MEANING) == set(cases.CORRECTIONS)
