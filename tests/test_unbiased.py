"""Which estimators are unbiased, and by how much the others are not: exact, by enumeration.

The second computation below (`plain_*`) shares only the array of logits with the library: it lists
completions by walking the tree, writes advantages and slopes out from the papers, and
differentiates by hand (`d log softmax = onehot - p`) or by central differences.
"""

import itertools
import math
from pathlib import Path

import enumeration as world
import estimators as cases
import estimators_page
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import compare

from grpo_jax import ALGORITHMS, Algorithm, group_normalized, grpo_loss, leave_one_out, policy_loss

CONTEXTS = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
BUDGET = 3


@pytest.fixture(autouse=True, scope="module")
def float64():
  with jax.enable_x64(True):
    yield


def plain_walk(prefix=()):
  """Completions in lexical order; 0 ends one."""
  for token in (0, 1, 2):
    if token == 0 or len(prefix) == BUDGET - 1:
      yield (*prefix, token)
    else:
      yield from plain_walk((*prefix, token))


COMPLETIONS = list(plain_walk())
LENGTH = np.array([len(c) for c in COMPLETIONS])


def plain_softmax(theta):
  e = np.exp(theta)
  return e / e.sum(-1, keepdims=True)


def plain_logps(theta):
  """[P, X, V] -> [P, C, T], 0 after the end."""
  p = plain_softmax(theta)
  out = np.zeros((len(theta), len(COMPLETIONS), BUDGET))
  for c, completion in enumerate(COMPLETIONS):
    for t, token in enumerate(completion):
      out[:, c, t] = np.log(p[:, CONTEXTS.index(completion[:t]), token])
  return out


def plain_probabilities(theta):
  return np.exp(plain_logps(theta).sum(-1))


def plain_pull(coefficients, theta):
  """`sum_ct coefficient[p, c, t] d logp[p, c, t] / d theta`, by `d logp = onehot - p`."""
  p = plain_softmax(theta)
  out = np.zeros_like(theta)
  for c, completion in enumerate(COMPLETIONS):
    for t, token in enumerate(completion):
      x = CONTEXTS.index(completion[:t])
      slope = np.eye(3)[token] - p[:, x]
      out[:, x] += coefficients[:, c, t, None] * slope
  return out


def plain_difference(function, theta, step=1e-5):
  """Central differences of a scalar function."""
  out = np.zeros_like(theta)
  for i in np.ndindex(theta.shape):
    up, down = theta.copy(), theta.copy()
    up[i] += step
    down[i] -= step
    out[i] = (function(up) - function(down)) / (2 * step)
  return out


def plain_context_kl(theta, reference, visits, forward=False):
  total = 0.0
  for prefix in CONTEXTS:
    x = CONTEXTS.index(prefix)
    met = np.ones(len(theta))
    for t in range(len(prefix)):
      met = met * plain_softmax(visits)[:, CONTEXTS.index(prefix[:t]), prefix[t]]
    p, q = plain_softmax(theta)[:, x], plain_softmax(reference)[:, x]
    p, q = (q, p) if forward else (p, q)
    total = total + met * (p * np.log(p / q)).sum(-1)
  return total.mean()


def plain_kl(theta, reference):
  p, q = plain_probabilities(theta), plain_probabilities(reference)
  return (p * np.log(p / q)).sum(-1).mean()


def plain_reward(theta, rewards=world.REWARDS):
  return (plain_probabilities(theta) * rewards).sum(-1).mean()


def assert_comparison(got, want, tolerance):
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


# --- the world itself ----------------------------------------------------------------------------


def test_the_world_lists_every_completion_once():
  assert len(world.TOKENS) == 1 + 2 + 4 * 3  # ended after 0, 1 token; 2 tokens and anything
  padded = [(*c, 0, 0)[:BUDGET] for c in COMPLETIONS]
  assert [tuple(row) for row in world.TOKENS.tolist()] == padded
  np.testing.assert_array_equal(world.MASK.sum(-1), LENGTH)
  np.testing.assert_allclose(world.probabilities(world.POLICY).sum(-1), 1.0, atol=1e-14)
  np.testing.assert_allclose(world.logps(world.POLICY), plain_logps(world.POLICY), atol=1e-14)


def test_group_probabilities_add_up_and_count_orders():
  groups = world.list_groups(2, 3)
  assert groups.count.sum() == 15.0**6
  nothing = world.expectation(lambda logp, drawn, ids: (1.0 + 0.0 * logp.sum(), {}), groups)
  assert nothing(world.POLICY).loss == pytest.approx(1.0, abs=1e-12)


def test_true_gradients_by_central_differences():
  theta, reference, old = world.POLICY, world.REFERENCE, cases.drawn_by(0.5)
  targets = cases.kl_targets(0.5)
  pairs = {
    "reward": (cases.reward_gradient(), plain_reward),
    "sequence": (targets["sequence"], lambda x: plain_kl(x, reference)),
    "reverse": (targets["reverse"], lambda x: plain_context_kl(x, reference, old)),
    "forward": (targets["forward"], lambda x: plain_context_kl(x, reference, old, True)),
  }
  for name, (gradient, function) in pairs.items():
    want = plain_difference(function, theta)
    np.testing.assert_allclose(gradient, want, atol=1e-9, err_msg=name)
  assert plain_kl(theta, reference) == pytest.approx(plain_context_kl(theta, reference, theta))


# --- advantage and average -----------------------------------------------------------------------


def plain_advantages(name, r):
  """Rewards [B, P, G], the formulas of the papers."""
  centered = r - r.mean(-1, keepdims=True)
  n = r.shape[-1]
  over_batch = {"axis": (-2, -1), "keepdims": True, "ddof": 1}
  return {
    "group_centered": lambda: centered,
    "leave_one_out": lambda: r - (r.sum(-1, keepdims=True) - r) / (n - 1),
    "group_normalized": lambda: centered / (r.std(-1, keepdims=True, ddof=1) + 1e-4),
    "batch_normalized": lambda: centered / (r.std(**over_batch) + 1e-4),
    "batch_whitened": lambda: centered / (centered.std(**over_batch) + 1e-4),
    "max_rl": lambda: centered / r.mean(-1, keepdims=True),
  }[name]()


def plain_gradient(name, average, size):
  """The score function summed over every batch of two groups of `size`, times the budget."""
  ids, count = world.list_groups(2, size)
  drawn = count * plain_probabilities(world.POLICY)[[[0], [1]], ids].prod((-1, -2))
  if name == "multi_objective":
    each = [np.asarray(x)[[[0], [1]], ids] for x in (world.CORRECT, world.STYLE)]
    total = sum(w * plain_advantages("group_normalized", x) for w, x in zip((1.0, 0.5), each))
    a = total / (total.std((-2, -1), keepdims=True, ddof=1) + 1e-4)
  else:
    a = plain_advantages(name, world.REWARDS[[[0], [1]], ids])
  lengths = LENGTH[ids]
  weights = {
    "sequence": 1 / (2 * size * lengths),
    "token": np.broadcast_to(1 / lengths.sum((-2, -1), keepdims=True), ids.shape),
    "constant": np.full(ids.shape, 1 / (2 * size * BUDGET)),
  }[average]
  pull = drawn[:, None, None] * a * weights
  by_completion = [np.bincount(ids[:, p].ravel(), pull[:, p].ravel(), 15) for p in range(2)]
  return BUDGET * plain_pull(on_each_token(by_completion), world.POLICY)


def on_each_token(by_completion):
  return np.repeat(np.asarray(by_completion)[:, :, None], BUDGET, -1)


def plain_true():
  p = plain_probabilities(world.POLICY)
  return plain_pull(on_each_token(p * world.REWARDS / 2), world.POLICY)


ADVANTAGES = [*cases.ADVANTAGES, "multi_objective"]


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_scale_cosine_and_bias_of_every_advantage_and_average(advantage, average):
  got = cases.reward_case(advantage, average)
  assert_comparison(got, compare(plain_gradient(advantage, average, 3), plain_true()), 1e-8)


def test_what_is_unbiased_on_policy():
  for advantage in ADVANTAGES:
    for average in ("sequence", "token", "constant"):
      case = cases.reward_case(advantage, average)
      if average == "constant" and advantage in ("leave_one_out", "group_centered"):
        assert case.bias < 1e-12
        assert case.scale == pytest.approx(
          1.0 if advantage == "leave_one_out" else 2 / 3, abs=1e-12
        )
      else:
        assert case.bias > 0.02, (advantage, average)


# Computed by `plain_gradient` and `plain_off_policy`: cosine and relative bias.
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


def test_measured_biases_are_the_recorded_ones():
  for (advantage, average), want in RECORDED_REWARD.items():
    case = cases.reward_case(advantage, average)
    assert_comparison((case.cosine, case.bias), want, 6e-5)
  for region, want in RECORDED_REGION.items():
    case, _ = cases.region_case(region, 1.0)
    assert_comparison((case.cosine, case.bias), want, 6e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_group_centered_scale_is_n_minus_1_over_n(size):
  rewards = jnp.asarray(world.REWARDS[:1])
  true = cases.reward_gradient(world.POLICY[:1], world.REWARDS[:1])
  for signal, scale in ((leave_one_out, 1.0), (lambda r: r - r.mean(-1), (size - 1) / size)):

    def loss(logp, drawn_logp, ids, signal=signal):
      row = Algorithm(average="constant")
      return policy_loss(row, logp, signal(rewards[:, ids[0]]), cases.mask(ids), max_length=BUDGET)

    expect = world.expectation(loss, world.list_groups(1, size), compiled=True)
    gradient = expect(world.POLICY[:1]).gradient
    np.testing.assert_allclose(-BUDGET * gradient, scale * true, atol=1e-14)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_is_its_advantage_and_its_average_on_policy(name):
  row = ALGORITHMS[name]
  want = plain_gradient(row.advantage, row.average, cases.FEW)
  np.testing.assert_allclose(-BUDGET * cases.row_gradient(name), want, atol=1e-9)


@pytest.mark.parametrize("rate", cases.RATES)
def test_weight_of_a_prompt_by_success_rate(rate):
  """`E[A | solved] - E[A | failed]`, by the binomial law of the others' successes."""
  n = cases.RATE_GROUP

  def scale(if_solved, if_failed):
    others = [math.comb(n - 1, k) * rate**k * (1 - rate) ** (n - 1 - k) for k in range(n)]
    return sum(p * (if_solved(k + 1) - if_failed(k)) for k, p in enumerate(others))

  def std(k):
    return math.sqrt(k * (n - k) / (n * (n - 1))) + 1e-4

  want = {
    "leave_one_out": 1.0,
    "group_centered": (n - 1) / n,
    "group_normalized": scale(lambda k: (1 - k / n) / std(k), lambda k: -k / n / std(k)),
    "max_rl": (1 - (1 - rate) ** (n - 1)) / rate,
  }
  for name, value in want.items():
    case = cases.rate_case(name, rate)
    assert case.scale == pytest.approx(value, abs=1e-10), name
    assert case.bias < 1e-10


# --- the whole loss, by central differences over ordered groups ----------------------------------


@pytest.mark.parametrize("distance", [0.0, 1.0])
def test_expected_gradient_of_the_grpo_loss_by_central_differences(distance):
  """Nothing by hand: the expected loss itself is differenced, clip, k3 and all."""
  theta, old = world.POLICY[:1], cases.drawn_by(distance)[:1]
  ids = np.array(list(itertools.product(range(15), repeat=3)))
  drawn = plain_probabilities(old)[0][ids].prod(-1)
  a = plain_advantages("group_normalized", world.REWARDS[0][ids])[..., None]
  weights = (np.arange(BUDGET) < LENGTH[ids][..., None]) / (3 * LENGTH[ids][..., None])
  old_logp, ref_logp = (plain_logps(x)[0][ids] for x in (old, world.REFERENCE[:1]))

  def expected_loss(x):
    logp = plain_logps(x)[0][ids]
    ratio, gap = np.exp(logp - old_logp), logp - ref_logp
    objective = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    return drawn @ (weights * -(objective - 0.3 * (np.exp(-gap) + gap - 1))).sum((-1, -2))

  def loss(logp, drawn_logp, ids):
    signal = group_normalized(jnp.asarray(world.REWARDS)[:1][0, ids])
    reference = world.logps(world.REFERENCE)[0, ids]
    return grpo_loss(
      logp, signal, cases.mask(ids), old_logp=drawn_logp, ref_logp=reference, beta=0.3
    )

  got = world.expectation(loss, world.list_groups(1, 3), compiled=True)(theta, old)
  assert got.loss == pytest.approx(expected_loss(theta), abs=1e-12)
  np.testing.assert_allclose(got.gradient, plain_difference(expected_loss, theta), atol=1e-8)
  clipped = got.metrics["clip_ratio/region_mean"]
  assert clipped == 0 if distance == 0 else clipped > 0.05


# --- KL ------------------------------------------------------------------------------------------

# d estimate / d logp on a drawn token, D = logp - ref_logp, ratio = exp(logp - drawn logp).
KL_SLOPES = {
  "k1": lambda D, ratio: np.ones_like(D),
  "k2": lambda D, ratio: D,
  "k3": lambda D, ratio: 1 - np.exp(-D),
  "k3_k2_gradient": lambda D, ratio: D,
  "k3_ratio": lambda D, ratio: ratio * D,
}
KL_VALUES = {
  "k1": lambda D, ratio: D,
  "k2": lambda D, ratio: D**2 / 2,
  "k3": lambda D, ratio: np.exp(-D) + D - 1,
  "k3_k2_gradient": lambda D, ratio: np.exp(-D) + D - 1,
  "k3_ratio": lambda D, ratio: ratio * (np.exp(-D) + D - 1),
}


@pytest.mark.parametrize("distance", [0.0, 0.5])
@pytest.mark.parametrize("average", ["constant", "sequence"])
@pytest.mark.parametrize("kl", KL_SLOPES)
def test_kl_terms_by_hand(kl, average, distance):
  theta, old, targets = world.POLICY, cases.drawn_by(distance), cases.kl_targets(distance)
  logp, drawn_logp = plain_logps(theta), plain_logps(old)
  gap, ratio = logp - plain_logps(world.REFERENCE), np.exp(logp - drawn_logp)
  drawn = plain_probabilities(old)[:, :, None] / 2
  if average == "sequence":
    drawn = drawn * BUDGET / LENGTH[:, None]
  want = plain_pull(drawn * KL_SLOPES[kl](gap, ratio), theta)
  inside = np.arange(BUDGET) < LENGTH[:, None]
  value = (drawn * np.where(inside, KL_VALUES[kl](gap, ratio), 0.0)).sum()
  got = cases.kl_case(kl, average, distance)
  for name, target in targets.items():
    assert_comparison(got[name], compare(want, target), 1e-9)
  met = plain_context_kl(theta, world.REFERENCE, old)
  assert got["value"] == pytest.approx(value / met, abs=1e-10)


def test_what_the_gradient_of_each_kl_term_is():
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


def test_k1_as_a_loss_has_no_gradient_unless_length_weights_give_it_one():
  assert cases.kl_case("k1")["reverse"].scale == 0.0
  other = {"ref": world.REFERENCE, "elsewhere": world.table(5.0)}
  gradients = []
  for reference in other.values():

    def loss(logp, drawn_logp, ids, reference=reference):
      row = Algorithm(kl="k1", beta=1.0, average="sequence")
      ref_logp = world.logps(reference)[cases.PROMPT, ids]
      return policy_loss(row, logp, jnp.zeros(ids.shape), cases.mask(ids), ref_logp=ref_logp)

    expect = world.expectation(loss, world.list_groups(2, 1), compiled=True)
    gradients.append(expect(world.POLICY).gradient)
  assert np.abs(gradients[0]).max() > 0.01
  np.testing.assert_allclose(gradients[0], gradients[1], atol=1e-15)  # never looks at it


def test_values_of_the_kl_estimators():
  for kl, exact in {"k1": True, "k2": False, "k3": True, "k3_ratio": True}.items():
    assert (abs(cases.kl_case(kl)["value"] - 1) < 1e-12) is exact
  for kl, exact in {"k1": False, "k2": False, "k3": False, "k3_ratio": True}.items():
    assert (abs(cases.kl_case(kl, distance=0.5)["value"] - 1) < 1e-12) is exact


# --- completions of another policy ---------------------------------------------------------------


def inside_clip(ratio, a, low, high):
  return ~((ratio < 1 - low) & (a < 0)) & ~((ratio > 1 + high) & (a > 0))


def sigmoid_slope(x):
  return np.exp(-x) / (1 + np.exp(-x)) ** 2


def sapo_slope(t):
  return 4 * sigmoid_slope(np.where(t.a > 0, 1.0, 1.05) * (t.ratio - 1)) * t.ratio * t.a


def within(x, low, high):
  return np.where((x >= low) & (x <= high), x, 0.0)


class Tokens:
  """For completion i next to completion j: ratios, advantage r_i - r_j, moved probability."""

  def __init__(self, prompt, old):
    logp, old_logp = plain_logps(world.POLICY)[prompt], plain_logps(old)[prompt]
    gap = (logp - old_logp)[:, None, :]
    self.ratio, self.product = np.exp(gap), np.exp(gap.sum(-1, keepdims=True))
    self.mean = np.exp(gap.sum(-1, keepdims=True) / LENGTH[:, None, None])
    self.a = (world.REWARDS[prompt][:, None] - world.REWARDS[prompt])[..., None]
    self.moved = (np.exp(logp) - np.exp(old_logp))[:, None, :]
    self.pair = np.multiply.outer(*[plain_probabilities(old)[prompt]] * 2)


# d objective / d logp of a token, by hand.
SLOPES = {
  "no ratio (old_logp=None)": lambda t: t.a,
  "product of token ratios": lambda t: t.product * t.a,
  "token ratio": lambda t: t.ratio * t.a,
  "sequence ratio (GSPO)": lambda t: t.mean * t.a,
  "clip 0.2 / 0.2 (PPO, GRPO)": lambda t: inside_clip(t.ratio, t.a, 0.2, 0.2) * t.ratio * t.a,
  "clip 0.2 / 0.28 (DAPO)": lambda t: inside_clip(t.ratio, t.a, 0.2, 0.28) * t.ratio * t.a,
  "dual clip 3": lambda t: (
    inside_clip(t.ratio, t.a, 0.2, 0.2) * ((t.ratio < 3) | (t.a > 0)) * t.ratio * t.a
  ),
  "CISPO 0 to 5": lambda t: np.clip(t.ratio, 0, 5) * t.a,
  "CISPO 0.8 to 1.2": lambda t: np.clip(t.ratio, 0.8, 1.2) * t.a,
  "SAPO 1 / 1.05": sapo_slope,
  "DPPO-TV 0.15": lambda t: (t.moved * np.sign(t.a) <= 0.15) * t.ratio * t.a,
}
CORRECTION_SLOPES = {
  "none": lambda t: t.a,
  "token_truncate at 2": lambda t: np.minimum(t.ratio, 2) * t.a,
  "token_mask 0.5 to 2": lambda t: within(t.ratio, 0.5, 2) * t.a,
  "sequence_mask 0.5 to 2": lambda t: within(t.product, 0.5, 2) * t.a,
  "sequence_mask, no bounds": lambda t: t.product * t.a,
}


def plain_off_policy(slope, distance):
  tokens = [Tokens(prompt, cases.drawn_by(distance)) for prompt in range(2)]
  slopes = [np.broadcast_to(slope(t), (15, 15, BUDGET)) for t in tokens]
  coefficients = [(t.pair[..., None] * s).sum(1) / 2 for t, s in zip(tokens, slopes)]
  return plain_pull(np.array(coefficients), world.POLICY)


@pytest.mark.parametrize("distance", cases.DISTANCES)
@pytest.mark.parametrize("region", cases.REGIONS)
def test_trust_regions_off_policy_by_hand(region, distance):
  want = compare(plain_off_policy(SLOPES[region], distance), plain_true())
  assert_comparison(cases.region_case(region, distance)[0], want, 1e-9)


@pytest.mark.parametrize("distance", cases.DISTANCES)
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_sampler_corrections_by_hand(correction, distance):
  want = compare(plain_off_policy(CORRECTION_SLOPES[correction], distance), plain_true())
  assert_comparison(cases.correction_case(correction, distance), want, 1e-9)


def test_stopped_share_counts_tokens_of_the_batch():
  """By hand for the symmetric clip: the mean over the tokens of both groups of two."""
  stopped, tokens, drawn = [], [], []
  for prompt in range(2):
    t = Tokens(prompt, cases.drawn_by(1.0))
    inside = np.arange(BUDGET) < LENGTH[:, None, None]
    mine = (~inside_clip(t.ratio, t.a, 0.2, 0.2) & inside).sum(-1)
    stopped.append((mine + mine.T).ravel())
    tokens.append((LENGTH[:, None] + LENGTH).ravel())
    drawn.append(t.pair.ravel())
  share = np.add.outer(*stopped) / np.add.outer(*tokens)
  want = (np.multiply.outer(*drawn) * share).sum()
  assert cases.region_case("clip 0.2 / 0.2 (PPO, GRPO)", 1.0)[1] == pytest.approx(want, abs=1e-12)


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


def test_token_ratio_is_off_in_proportion_to_the_distance():
  far, near = (cases.region_case("token ratio", d)[0].bias for d in (0.02, 0.01))
  assert far / near == pytest.approx(2.0, abs=0.02)
  for region in cases.REGIONS:
    assert cases.region_case(region, 0.0)[0].bias < 1e-12


def test_token_ratio_without_clip_is_exact_for_single_tokens_and_clipped_is_not():
  theta, old = np.array([0.3, -0.5, 0.9]), np.array([-0.4, 0.6, 0.1])
  rewards = np.array([1.0, 0.2, 0.0])
  p, q = plain_softmax(theta), plain_softmax(old)
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


def test_the_page_in_docs_is_what_the_command_prints():
  committed = (Path(__file__).parent.parent / "docs" / "estimators.md").read_text()
  assert committed == estimators_page.page(), (
    "run: python tests/estimators_page.py > docs/estimators.md"
  )


def test_the_page_describes_every_choice():
  every = {(a, v) for a in cases.ADVANTAGES for v in ("constant", "sequence", "token")}
  assert set(estimators_page.REWARD_MEANING) == every
  assert set(estimators_page.KL_MEANING) == {*KL_SLOPES, "k1_in_reward"}
  assert set(estimators_page.REGION_MEANING) == set(cases.REGIONS) == set(SLOPES)
  assert set(estimators_page.CORRECTION_MEANING) == set(cases.CORRECTIONS)
