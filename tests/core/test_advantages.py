"""Tests advantages against values computed by hand, and rules that every estimator obeys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax.core.advantages import ADVANTAGES, Advantage, lookup_advantage
from tests.helpers.arrays import assert_close

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

nan = np.nan
close = functools.partial(assert_close, rtol=1e-6, atol=1e-7)


def gdpo(rewards):
  """Applies `multi_objective` to a single reward function."""
  return grpo_jax.multi_objective(jnp.asarray(rewards)[None], jnp.ones(1))


OF_GROUPS = {name: row for name, row in ADVANTAGES.items() if row.needs_groups}
OF_TOTALS = {name: row for name, row in OF_GROUPS.items() if row.rewards == ("total",)}
FUNCTIONS = {**OF_TOTALS, "gdpo": gdpo}


@jax.jit
def all_advantages(rewards):
  """Computes all estimators in one program, so that a new shape costs one compilation."""
  return {name: function(rewards) for name, function in FUNCTIONS.items()}


def compiled(name, rewards):
  return all_advantages(rewards)[name]


COMPILED = {name: functools.partial(compiled, name) for name in FUNCTIONS}
SCALED = ("group_normalized", "batch_normalized", "batch_whitened", "gdpo")

every_function = pytest.mark.parametrize("function", COMPILED.values(), ids=COMPILED)
every_name = pytest.mark.parametrize("name", OF_TOTALS)


# --- values --------------------------------------------------------------------------------------


def test_group_normalized():
  # Mean 2, deviations -2 0 0 2: the variance is 8/3 with n - 1 and 2 with n.
  rewards = jnp.array([[0.0, 2.0, 2.0, 4.0]])
  close(grpo_jax.group_normalized(rewards, eps=0.0), [[-(1.5**0.5), 0, 0, 1.5**0.5]])
  close(grpo_jax.group_normalized(rewards, eps=0.0, ddof=0), [[-(2**0.5), 0, 0, 2**0.5]])
  close(grpo_jax.group_normalized(rewards, eps=2.0, ddof=0), [[-0.5857864, 0, 0, 0.5857864]])


def test_default_eps_and_ddof():
  # Deviations of 1/2, variance 1/3: 0.5 / (0.57735 + 1e-4).
  rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
  row = 0.5 / (3**-0.5 + 1e-4)
  close(grpo_jax.group_normalized(rewards)[0], [row, -row, -row, row])
  # Over the batch: 8 rewards, variance 8/4/7.
  row = 0.5 / ((2 / 7) ** 0.5 + 1e-4)
  close(grpo_jax.batch_normalized(rewards)[0], [row, -row, -row, row])
  close(grpo_jax.batch_whitened(rewards)[0], [row, -row, -row, row])


def test_group_centered():
  close(grpo_jax.group_centered(jnp.array([[1, 2, 6], [5, 5, 5]])), [[-2, -1, 3], [0, 0, 0]])


def test_leave_one_out():
  # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
  close(grpo_jax.leave_one_out(jnp.array([[1.0, 2.0, 6.0]])), [[-3.0, -1.5, 4.5]])


def test_batch_normalized_divides_by_the_std_of_the_rewards():
  # All rewards: 0 2 6 8, mean 4, squares 16 + 4 + 4 + 16 = 40.
  rewards = jnp.array([[0.0, 2.0], [6.0, 8.0]])
  close(
    grpo_jax.batch_normalized(rewards, eps=0.0, ddof=0),
    np.array([[-1, 1], [-1, 1]]) / 10**0.5,
  )
  close(grpo_jax.batch_normalized(rewards, eps=1.0)[1, 1], 1 / ((40 / 3) ** 0.5 + 1))


def test_batch_whitened_divides_by_the_std_of_the_centered_rewards():
  rewards = jnp.array([[0.0, 2.0], [6.0, 8.0]])
  close(grpo_jax.batch_whitened(rewards, eps=0.0, ddof=0), [[-1, 1], [-1, 1]])
  close(grpo_jax.batch_whitened(rewards, eps=1.0)[1, 1], 1 / ((4 / 3) ** 0.5 + 1))


def test_max_rl():
  # Mean 1/4: (1 - 1/4) / (1/4) = 3. None solved: 0. All solved: 0.
  rewards = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
  close(grpo_jax.max_rl(rewards), [[3, -1, -1, -1], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_multi_objective():
  # Each function normalized in its group (ddof 1): the first +-0.70711 and 0, the second -+0.70711.
  rewards = jnp.array([[[1.0, 0.0], [3.0, 3.0]], [[10.0, 30.0], [5.0, 7.0]]])
  half = 0.5**0.5
  total = np.array([[2 * half - half, -2 * half + half], [-half, half]])
  expected = total / np.sqrt((total**2).sum() / 3)
  close(grpo_jax.multi_objective(rewards, jnp.array([2.0, 1.0]), eps=0.0), expected)
  # eps is added twice: to the std of each function and to that of the batch.
  first = 0.5 / (half + 1.0)
  total = np.array([[1, -1], [0, 0]]) * first
  expected = total / (np.sqrt((total**2).sum() / 3) + 1.0)
  close(grpo_jax.multi_objective(rewards[:1], jnp.array([1.0]), eps=1.0), expected)


def test_multi_objective_leaves_out_completions_that_no_function_scored():
  rewards = jnp.array([[[1.0, 0.0, nan]], [[nan, nan, nan]]])
  # 1 and 0 are +-0.70711 normalized. Without the third the std is 1 with n - 1.
  actual = grpo_jax.multi_objective(rewards, jnp.ones(2), eps=0.0)
  close(actual, [[0.5**0.5, -(0.5**0.5), 0.0]])


def test_multi_objective_counts_completions_that_one_function_scored():
  """The second function scores 0 and 2 alike and skips 1: it adds nothing and excludes nothing."""
  rewards = jnp.array([[[1.0, 0.0, 0.0]], [[5.0, nan, 5.0]]])
  actual = grpo_jax.multi_objective(rewards, jnp.array([1.0, 1.0]), eps=0.0)
  # (2/3, -1/3, -1/3) over its std, sqrt(1/3); the std of the result is 1.
  close(actual, np.array([[2.0, -1.0, -1.0]]) / 3**0.5)


def test_default_eps_of_multi_objective():
  """(0, a) has std a / sqrt 2 = 1e-4 for a = sqrt 2 * 1e-4; the default eps doubles it."""
  actual = grpo_jax.multi_objective(jnp.array([[[0.0, 2**0.5 * 1e-4]]]), jnp.array([1.0]))
  x = 2**0.5 / 4  # a / 2 over 2e-4, whose std is 1/2
  close(actual, [[-x / 0.5001, x / 0.5001]], rtol=1e-5)


# --- groups of one --------------------------------------------------------------------------------

SINGLE = jnp.array([5.0, -1.0, nan, 0.0, 2.0, 2.0])[:, None]
OF_STEPS = (SINGLE[..., None], jnp.zeros((6, 1, 1), int), jnp.ones((6, 1, 3), bool))
ALONE = {
  **{name: (row.function, (SINGLE,)) for name, row in OF_TOTALS.items()},
  "multi_objective": (grpo_jax.multi_objective, (jnp.stack([SINGLE, -SINGLE]), jnp.ones(2))),
  "process_advantages": (grpo_jax.process_advantages, OF_STEPS),
  "turn_advantages": (grpo_jax.turn_advantages, OF_STEPS),
  "centered_token_whitened": (grpo_jax.centered_token_whitened, (SINGLE, OF_STEPS[2])),
}


@pytest.mark.parametrize("name", OF_GROUPS)
def test_groups_of_one_are_an_error_unless_asked_for(name):
  """It is raised when the program is traced: shapes are known then."""
  function, arguments = ALONE[name]
  shape = str(arguments[0].shape).replace("(", r"\(").replace(")", r"\)")
  with pytest.raises(ValueError, match=rf"shape {shape}: a group of one .*allow_groups_of_one"):
    jax.eval_shape(function, *arguments)
  allowed = function(*arguments, allow_groups_of_one=True)
  assert allowed.shape[:2] == (6, 1)
  assert not allowed.any()


def test_zero_advantages_take_any_group():
  for rewards in (jnp.arange(6.0).reshape(2, 3), jnp.full((6, 1), nan)):
    actual = grpo_jax.zero_advantages(rewards)
    assert actual.shape == rewards.shape
    assert not actual.any()
  with pytest.raises(ValueError, match=r"^rewards has shape \(3,\), expected 2 axes"):
    grpo_jax.zero_advantages(jnp.zeros(3))


def test_flat_rewards_do_not_train_on_zeros():
  """Rewards of 6 completions as six groups would all get an advantage of 0."""
  flat = jnp.arange(6.0)[:, None]
  for name in ("grpo", "rloo", "max_rl", "lite_ppo"):
    with pytest.raises(ValueError, match="a group of one"):
      grpo_jax.advantages(name, flat)
    assert grpo_jax.advantages(name, flat.reshape(2, 3)).any()
  meant = grpo_jax.advantages(lambda r: grpo_jax.group_centered(r, allow_groups_of_one=True), flat)
  assert not meant.any()


def test_steps_of_a_single_completion_are_compared_with_each_other():
  mask = jnp.ones((1, 1, 2), bool)
  actual = grpo_jax.process_advantages(
    jnp.array([[[1.0, 0.0]]]), jnp.array([[[0, 1]]]), mask, eps=0.0, ddof=0
  )
  close(actual, [[[0.0, -1.0]]])


def test_process_advantages():
  # Steps of both completions: 1, 0, 0 (the fourth does not exist). Mean 1/3, population std
  # sqrt(2)/3: normalized 1.41421 and -0.70711. A token gets the steps that end at or after it.
  step_rewards = jnp.array([[[1.0, 0.0], [0.0, nan]]])
  step_ends = jnp.array([[[1, 3], [2, 0]]])
  mask = jnp.array([[[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]])
  actual = grpo_jax.process_advantages(step_rewards, step_ends, mask, eps=0.0, ddof=0)
  a, b = 2**0.5, -(0.5**0.5)
  close(actual, [[[a + b, a + b, b, b, 0], [b, b, b, 0, 0]]])


def test_eps_and_ddof_of_process_advantages():
  step_rewards, step_ends = jnp.array([[[1.0, 0.0]]]), jnp.array([[[0, 1]]])
  mask = jnp.ones((1, 1, 2), bool)
  row = -0.5 / (0.5**0.5 + 1e-4)
  close(grpo_jax.process_advantages(step_rewards, step_ends, mask), [[[0, row]]])
  close(grpo_jax.process_advantages(step_rewards, step_ends, mask, eps=0.5, ddof=0), [[[0, -0.5]]])


def test_process_advantages_divide_by_n_minus_1_by_default():
  mask, ends = jnp.ones((1, 1, 3), bool), jnp.array([[[0, 1, 2]]])
  actual = grpo_jax.process_advantages(jnp.array([[[1.0, 0.0, 0.0]]]), ends, mask, eps=0.0)
  # (2/3, -1/3, -1/3) over their std, sqrt(1/3), summed from the end.
  np.testing.assert_allclose(actual, [[[0.0, -2 / 3**0.5, -1 / 3**0.5]]], rtol=1e-6, atol=1e-6)


def test_turn_advantages():
  """Rewards of a turn and later ones: (1, 0) and (0 + 4, 4), (2,) in the third completion."""
  rewards = jnp.array([[[1.0, 0.0], [0.0, 4.0], [2.0, nan]]])
  ends = jnp.array([[[1, 3], [0, 4], [2, 0]]])
  mask = jnp.array([[[1, 1, 1, 1, 0], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1]]])
  actual = grpo_jax.turn_advantages(rewards, ends, mask, eps=0.0, ddof=0)
  # First turn: 1, 4, 2, mean 7/3, deviations -4/3, 5/3, -1/3, population std sqrt(14)/3.
  first = np.array([-4.0, 5.0, -1.0]) / 14**0.5
  # Second turn: 0 and 4 of the two completions that have one: -1 and 1.
  expected = [
    [first[0], first[0], -1, -1, 0],
    [first[1], 0, 0, 1, 1],
    [first[2], first[2], first[2], 0, 0],  # after its last turn there is no turn
  ]
  close(actual, [expected], rtol=1e-6)


def test_eps_and_ddof_of_turn_advantages():
  rewards, ends = jnp.array([[[1.0], [0.0]]]), jnp.zeros((1, 2, 1), int)
  mask = jnp.ones((1, 2, 1), bool)
  a = 0.5 / (0.5**0.5 + 1e-4)
  close(grpo_jax.turn_advantages(rewards, ends, mask), [[[a], [-a]]])
  close(grpo_jax.turn_advantages(rewards, ends, mask, eps=0.5, ddof=0), [[[0.5], [-0.5]]])


def test_turn_advantages_of_one_turn_are_those_of_the_completion():
  rewards = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  rewards[1, 2] = nan
  mask = np.ones((3, 4, 5), bool)
  actual = grpo_jax.turn_advantages(rewards[..., None], np.full((3, 4, 1), 4), mask)
  close(actual, np.repeat(np.asarray(grpo_jax.group_normalized(rewards))[..., None], 5, -1))


def test_earlier_rewards_do_not_reach_later_turns():
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(2, 4, 3)).astype(np.float32)
  ends, mask = np.tile([1, 3, 5], (2, 4, 1)), np.ones((2, 4, 6), bool)
  before = np.asarray(grpo_jax.turn_advantages(rewards, ends, mask))
  rewards[:, 0, 0] += 3
  after = np.asarray(grpo_jax.turn_advantages(rewards, ends, mask))
  np.testing.assert_array_equal(before[..., 2:], after[..., 2:])
  assert (before[:, 0, :2] != after[:, 0, :2]).all()


@pytest.mark.parametrize("unscored", [nan, np.inf, -np.inf])
def test_padding_of_turns_and_tokens_changes_nothing(unscored):
  rng = np.random.default_rng(1)
  rewards, ends = rng.normal(size=(2, 3, 2)).astype(np.float32), np.tile([1, 3], (2, 3, 1))
  mask = rng.random((2, 3, 4)) < 0.7
  expected = np.asarray(grpo_jax.turn_advantages(rewards, ends, mask))
  wide = np.concatenate([rewards, np.full((2, 3, 2), unscored, np.float32)], -1)
  for filler in (0, 2, 9, -1):
    wide_ends = np.concatenate([ends, np.full((2, 3, 2), filler)], -1)
    wide_mask = np.concatenate([mask, np.zeros((2, 3, 3), bool)], -1)
    actual = np.asarray(grpo_jax.turn_advantages(wide, wide_ends, wide_mask))
    np.testing.assert_allclose(actual[..., :4], expected, rtol=1e-6)
    assert not actual[..., 4:].any()


def test_turn_advantages_of_zero_variance_groups_and_lost_episodes_are_exactly_zero():
  rewards = np.array([[[0.1, 0.2], [0.1, 0.2], [nan, nan]], [[nan] * 2] * 3], np.float32)
  ends, mask = np.tile([0, 1], (2, 3, 1)), np.ones((2, 3, 2), bool)
  assert not np.asarray(grpo_jax.turn_advantages(rewards, ends, mask)).any()


def test_turn_advantages_jit_vmap_gradient_and_float64(x64):
  rng = np.random.default_rng(0)
  rewards, ends = rng.normal(size=(5, 2, 3, 2)), rng.integers(0, 4, (5, 2, 3, 2))
  mask = rng.random((5, 2, 3, 4)) < 0.7
  actual = jax.jit(jax.vmap(grpo_jax.turn_advantages))(rewards, ends, mask)
  assert actual.dtype == jnp.float64
  close(actual[2], grpo_jax.turn_advantages(rewards[2], ends[2], mask[2]))
  rewards[2, 0, 0] = nan
  slope = jax.grad(lambda r: (grpo_jax.turn_advantages(r, ends[2], mask[2]) ** 2).sum())
  assert np.isfinite(np.asarray(slope(rewards[2]))).all()


def test_leave_one_out_of_two():
  np.testing.assert_array_equal(grpo_jax.leave_one_out(jnp.array([[3.0, 1.0]])), [[2.0, -2.0]])


def test_max_rl_divides_by_the_mean_of_the_scored():
  actual = grpo_jax.max_rl(jnp.array([[1.0, 0.0, nan, nan]]))
  np.testing.assert_array_equal(actual, [[1.0, -1.0, 0.0, 0.0]])  # mean 1/2, not 1/4 or 3/4


# --- without groups, and over tokens -------------------------------------------------------------

# Lengths 1 and 3, 2 and 2; rewards 1 and 5, 2 and 2.
TOKENS = jnp.array([[[1, 0, 0], [1, 1, 1]], [[0, 1, 1], [1, 1, 0]]], bool)
OVER_TOKENS = jnp.array([[1.0, 5.0], [2.0, 2.0]])


def test_token_whitened():
  """Over 8 tokens: mean (1 + 3 * 5 + 4 * 2) / 8 = 3, squares 4 + 3 * 4 + 4 * 1 = 20."""
  std = 2.5**0.5
  expected = np.array([[-2, 2], [-1, -1]]) / std
  close(grpo_jax.token_whitened(OVER_TOKENS, TOKENS, eps=0.0), expected)
  close(grpo_jax.token_whitened(OVER_TOKENS, TOKENS), expected)
  close(grpo_jax.token_whitened(OVER_TOKENS, TOKENS, eps=1.0), expected * std / (std + 1))


def test_centered_token_whitened():
  """Centered -2 and 2, 0 and 0: mean (-2 + 3 * 2) / 8 = 0.5, squares 6.25 + 3 * 2.25 + 1 = 14."""
  std = 1.75**0.5
  expected = np.array([[-2.5, 1.5], [-0.5, -0.5]]) / std
  close(grpo_jax.centered_token_whitened(OVER_TOKENS, TOKENS, eps=0.0), expected)
  actual = grpo_jax.centered_token_whitened(OVER_TOKENS, TOKENS, eps=1.0)
  close(actual, expected * std / (std + 1))


def test_right_only():
  rewards = jnp.array([[1.0, 0.0, 0.5, nan], [0.6, 2.0, -1.0, jnp.inf]])
  expected = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
  assert grpo_jax.right_only(rewards).tolist() == expected
  above = grpo_jax.right_only(rewards, right_above=-0.5)
  assert above.tolist() == [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
  assert grpo_jax.right_only(rewards, right_above=1.0).tolist()[1] == [0.0, 1.0, 0.0, 0.0]


def test_groups_of_one_are_whitened_over_the_batch():
  """Rewards 0, 3 with lengths 2, 1: mean 1, squares 2 * 1 + 4 = 6 over 3 tokens."""
  mask = jnp.array([[[1, 1]], [[1, 0]]], bool)
  actual = grpo_jax.token_whitened(jnp.array([[0.0], [3.0]]), mask, eps=0.0)
  close(actual, np.array([[-1.0], [2.0]]) / 2**0.5)
  assert grpo_jax.right_only(jnp.array([[0.0], [3.0]])).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("name", ["token_whitened", "centered_token_whitened"])
def test_rules_of_advantages_over_tokens(name, x64):
  function = getattr(grpo_jax, name)
  rng = np.random.default_rng(0)
  mask = np.arange(5) < rng.integers(1, 6, (3, 4, 1))
  for value in (0.1, -3.3, 1e8):
    assert not np.asarray(function(np.full((3, 4), value), mask)).any()
  rewards = rng.normal(size=(3, 4))
  expected = function(rewards, mask)
  assert expected.dtype == jnp.float64
  # Over tokens the mean is 0 and the standard deviation 1, and neither scale nor shift matter.
  tokens = mask.sum(-1)
  close((tokens * expected).sum(), 0.0, atol=1e-12)
  close((tokens * expected**2).sum() / tokens.sum(), 1.0, rtol=1e-6)
  close(function(3 * rewards - 1e3, mask), expected)
  close(jax.jit(function)(rewards, mask), expected)
  # An unscored completion changes nothing but its own advantage, and neither does an empty one.
  with_nan = np.concatenate([rewards, np.full((3, 1), nan)], -1)
  wider = np.concatenate([mask, np.ones((3, 1, 5), bool)], 1)
  actual = function(with_nan, wider)
  close(actual, np.concatenate([expected, np.zeros((3, 1))], -1))
  unscored = jnp.array([[nan] * 4] * 3)
  with jax.debug_nans(True):
    assert not function(unscored, mask).any()
  slope = jax.grad(lambda r: (function(r, wider) ** 2).sum())
  assert np.isfinite(slope(with_nan)).all()
  assert np.isfinite(slope(np.full((3, 5), 0.1))).all()


def test_errors_of_advantages_over_tokens():
  for function in (grpo_jax.token_whitened, grpo_jax.centered_token_whitened):
    with pytest.raises(ValueError, match=r"^rewards has shape \(2,\), expected 2 axes"):
      function(OVER_TOKENS[0], TOKENS)
    with pytest.raises(ValueError, match=r"^mask has shape \(2, 3\), expected 3 axes"):
      function(OVER_TOKENS, TOKENS[0])
    with pytest.raises(ValueError, match=r"^mask has shape \(1, 2, 3\), expected \(2, 2, 3\)"):
      function(OVER_TOKENS, TOKENS[:1])
    with pytest.raises(ValueError, match=r"^mask must be boolean"):
      function(OVER_TOKENS, TOKENS.astype(float))
  with pytest.raises(ValueError, match=r"^rewards has shape \(2,\), expected 2 axes"):
    grpo_jax.right_only(OVER_TOKENS[0])


# --- rules for every estimator -------------------------------------------------------------------


@every_function
@pytest.mark.parametrize("size", [8, 16])
def test_equal_rewards_give_exactly_zero(function, size):
  values = np.array([0.1, 0.9, 10.1, 0.0, 1.0, -3.3, 1e8, 1e-8], np.float32)
  constant = np.repeat(values[:, None], size, axis=1)
  assert not np.asarray(function(constant)).any()


@pytest.mark.parametrize("name", SCALED)
def test_equal_rewards_give_zero_with_eps_zero(name):
  if name == "gdpo":
    actual = grpo_jax.multi_objective(jnp.full((1, 2, 4), 0.1), jnp.ones(1), eps=0.0)
  else:
    actual = getattr(grpo_jax, name)(jnp.full((2, 4), 0.1), eps=0.0)
  assert not np.asarray(actual).any()


@every_name
def test_equal_rewards_with_unscored_ones_give_exactly_zero(name):
  """The mean of seven 0.1 is not 0.1 in float32; the mean of seven zeros is 0."""
  rewards = jnp.array([[0.1] * 7 + [nan], [0.1, nan] + [0.1] * 6])
  np.testing.assert_array_equal(ADVANTAGES[name](rewards), jnp.zeros((2, 8)))


@every_name
def test_no_intermediate_value_is_nan(name):
  """`jax_debug_nans` can stay on: there is no NaN, not even one that a `where` hides."""
  rewards = jnp.array([[nan, nan, nan], [nan, 1.0, nan], [0.5, 0.5, 0.5], [0.0, 0.0, nan]])
  with jax.debug_nans(True):
    assert not ADVANTAGES[name](rewards).any()


@every_name
def test_jacobian_of_equal_rewards_is_finite(name):
  """Holds for rewards that are computed from parameters."""
  slope = jax.jacobian(ADVANTAGES[name])(jnp.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]))
  assert jnp.isfinite(slope).all()


@every_function
@pytest.mark.parametrize("unscored", [nan, np.inf, -np.inf])
def test_unscored_rewards_are_left_out(function, unscored):
  rewards = np.array([[3.0, unscored, 0.0, 1.0, 2.0], [2.0, 5.0, unscored, 2.0, 1.0]], np.float32)
  without = np.array([[3.0, 0.0, 1.0, 2.0], [2.0, 5.0, 2.0, 1.0]], np.float32)
  actual = np.asarray(function(rewards))
  assert actual[0, 1] == 0
  assert actual[1, 2] == 0
  close(np.stack([actual[0, [0, 2, 3, 4]], actual[1, [0, 1, 3, 4]]]), function(without), rtol=1e-5)


@every_function
def test_one_scored_reward_or_none_gives_zero(function):
  rewards = np.array([[nan, 5.0, nan, nan], [nan, nan, nan, nan]], np.float32)
  assert not np.asarray(function(rewards)).any()


@every_function
def test_rewards_of_1e8_keep_their_differences(function):
  rewards = np.array([[0.0, 64.0, 64.0, 128.0], [0.0, 0.0, 0.0, 64.0]], np.float32)
  actual = np.asarray(function(rewards + np.float32(1e8)))
  assert np.isfinite(actual).all()
  if function is COMPILED["max_rl"]:
    close(actual, np.asarray(function(rewards)) * rewards.mean(-1, keepdims=True) / 1e8, rtol=1e-4)
  elif function is COMPILED["batch_normalized"]:
    close(actual, function(rewards), rtol=1e-4)
  else:
    close(actual, function(rewards))


@every_function
def test_advantages_of_a_group_add_up_to_zero(function):
  rewards = np.random.default_rng(0).normal(3.0, 2.0, (8, 8)).astype(np.float32)
  np.testing.assert_allclose(np.asarray(function(rewards)).sum(-1), 0.0, atol=2e-5)


@every_function
def test_zero_variance_groups_do_not_change_the_sign_of_others(function):
  rewards = np.array([[1.0, 0.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0]], np.float32)
  actual = np.asarray(function(rewards))
  assert actual[0, 0] > 0
  assert (actual[0, 1:] < 0).all()
  assert not actual[1].any()


@every_function
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "bool"])
def test_other_dtypes_come_out_as_float32(function, dtype):
  rewards = jnp.array([[1, 0, 0, 1], [0, 0, 0, 1]], dtype)
  actual = function(rewards)
  assert actual.dtype == jnp.float32
  close(actual, function(rewards.astype(jnp.float32)))


@every_function
def test_float64_stays(function, x64):
  rewards = np.array([[1.0, 0.0, 0.25, 1.0 + 1e-12]])
  actual = function(rewards)
  assert actual.dtype == jnp.float64
  assert actual[0, 3] > actual[0, 0]


@every_function
def test_vmap_over_batches(function):
  rewards = np.random.default_rng(1).normal(size=(3, 2, 4)).astype(np.float32)
  actual = jax.vmap(function)(rewards)
  close(actual[1], function(rewards[1]), rtol=1e-5)


@jax.jit
def all_gradients(rewards):
  """Computes the gradient of the sum of squares of every estimator."""
  return {
    name: jax.grad(lambda r, function=function: (function(r) ** 2).sum())(rewards)
    for name, function in FUNCTIONS.items()
  }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_to_the_rewards_is_finite(name):
  """Holds with unscored rewards, with zero-variance groups, and with a batch of equal rewards."""
  for second in ([1.0, 0.0, 0.5, 3.0], [5.0, 5.0, 5.0, 5.0]):
    actual = np.asarray(all_gradients(jnp.array([[1.0, 0.0, nan, 2.0], second]))[name])
    assert np.isfinite(actual).all()
    assert actual[0, 2] == 0
  assert np.isfinite(np.asarray(all_gradients(jnp.full((2, 4), 5.0))[name])).all()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("shape", [(4,), (1, 2, 4), ()])
def test_a_wrong_rank_is_named(function, shape):
  if function is gdpo:
    shape = (4,) if len(shape) == 1 else (1, *shape)
  with pytest.raises(ValueError, match=r"^rewards has shape \(.*expected [23] axes \[.*P, G"):
    function(np.zeros(shape, np.float32))


@pytest.mark.parametrize("rewards", ["high", [[1.0, None]], {"a": 1.0}, None])
def test_non_numbers_are_named(rewards):
  with pytest.raises(ValueError, match=r"^rewards must be an array of numbers, got"):
    grpo_jax.group_normalized(rewards)


def test_complex_rewards_are_refused():
  with pytest.raises(ValueError, match=r"^rewards must be real, got dtype complex64"):
    grpo_jax.group_centered(jnp.zeros((1, 2), jnp.complex64))


def test_errors_of_multi_objective():
  with pytest.raises(ValueError, match=r"^rewards has shape \(2, 3\), expected 3 axes \[R, P, G"):
    grpo_jax.multi_objective(jnp.zeros((2, 3)), jnp.ones(2))
  with pytest.raises(ValueError, match=r"^weights has shape \(3,\), expected \(2,\)"):
    grpo_jax.multi_objective(jnp.zeros((2, 3, 4)), jnp.ones(3))


@pytest.mark.parametrize(
  ("name", "call"),
  [("step", grpo_jax.process_advantages), ("turn", grpo_jax.turn_advantages)],
)
def test_errors_of_advantages_of_steps_and_turns(name, call):
  rewards, ends = jnp.zeros((2, 3, 2)), jnp.zeros((2, 3, 2), int)
  mask = jnp.ones((2, 3, 5), bool)
  shape = rf"^{name}_rewards has shape \(3, 2\), expected 3 axes \[P, G"
  with pytest.raises(ValueError, match=shape):
    call(rewards[0], ends, mask)
  with pytest.raises(
    ValueError, match=rf"^{name}_ends has shape \(2, 3, 1\), expected \(2, 3, 2\)"
  ):
    call(rewards, ends[..., :1], mask)
  with pytest.raises(
    ValueError, match=rf"^{name}_ends must hold integer token ids, got dtype float32"
  ):
    call(rewards, rewards, mask)
  with pytest.raises(ValueError, match=r"^mask has shape \(3, 5\), expected 3 axes"):
    call(rewards, ends, mask[0])
  with pytest.raises(ValueError, match=r"^mask has shape \(2, 2, 5\), expected \(2, 3, 5\)"):
    call(rewards, ends, mask[:, :2])
  with pytest.raises(ValueError, match=r"^mask must be boolean"):
    call(rewards, ends, mask.astype(float))


def test_process_advantages_jit_vmap_and_float64(x64):
  rng = np.random.default_rng(0)
  steps, ends = rng.normal(size=(5, 2, 3, 2)), rng.integers(0, 4, (5, 2, 3, 2))
  mask = rng.random((5, 2, 3, 4)) < 0.7
  actual = jax.jit(jax.vmap(grpo_jax.process_advantages))(steps, ends, mask)
  assert actual.dtype == jnp.float64
  close(actual[2], grpo_jax.process_advantages(steps[2], ends[2], mask[2]))
  assert not np.asarray(actual)[~mask].any()


# --- the table -----------------------------------------------------------------------------------


def test_kinds_of_rewards():
  assert ADVANTAGES["multi_objective"].rewards == ("each",)
  assert ADVANTAGES["process_advantages"].rewards == ("steps",)
  assert ADVANTAGES["turn_advantages"].rewards == ("steps",)
  assert ADVANTAGES["token_whitened"].rewards == ("total", "mask")
  assert ADVANTAGES["centered_token_whitened"].rewards == ("total", "mask")
  of_values = {name for name, row in ADVANTAGES.items() if row.rewards == ("values",)}
  assert of_values == {"gae", "gae_whitened"}
  assert ADVANTAGES["returns_whitened"].rewards == ("tokens",)
  alone = {name for name, row in ADVANTAGES.items() if not row.needs_groups}
  without_groups = {"token_whitened", "returns_whitened", "right_only", "zero_advantages"}
  assert alone == without_groups | of_values
  assert len(OF_TOTALS) == len(ADVANTAGES) - 10
  assert Advantage(gdpo).rewards == ("total",)
  assert Advantage(gdpo, rewards=["total", "steps"]).rewards == ("total", "steps")


def test_every_row_of_the_table_is_the_public_function_of_that_name():
  for name, row in ADVANTAGES.items():
    if row.rewards != ("values",):  # they have one public function, `gae`
      assert row.function is getattr(grpo_jax, name)


def test_an_advantage_is_hashable_and_calls_its_function():
  """Algorithms are static arguments of jitted functions."""
  row = Advantage(gdpo, rewards="total")
  assert hash(row) == hash(Advantage(gdpo))
  assert row == Advantage(gdpo) != Advantage(gdpo, rewards="steps")
  rewards = jnp.array([[1.0, 0.0]])
  np.testing.assert_array_equal(row(rewards), gdpo(rewards))


def test_lookup_advantage():
  assert lookup_advantage("max_rl") is ADVANTAGES["max_rl"]
  row = Advantage(gdpo, rewards="each")
  assert lookup_advantage(row) is row
  assert lookup_advantage(gdpo) == Advantage(gdpo)


def test_errors_of_the_table():
  with pytest.raises(ValueError, match=r"^unknown advantage 'vtrace'; known: batch_normalized"):
    lookup_advantage("vtrace")
  with pytest.raises(ValueError, match=r"^unknown kind of rewards 'turns'; known: each, mask, ste"):
    Advantage(gdpo, rewards="turns")
  with pytest.raises(ValueError, match=r"^unknown kind of rewards 'both'"):
    Advantage(gdpo, rewards=("total", "both"))
  with pytest.raises(ValueError, match=r"^rewards is empty; name at least one of total, mask, ea"):
    Advantage(gdpo, rewards=())
  with pytest.raises(ValueError, match=r"^function must be callable, got 'max_rl'"):
    Advantage("max_rl")


def test_max_rl_keeps_the_order_of_rewards_below_zero():
  """(r - mean) / |mean| by hand: means -2 and -0.5."""
  rewards = jnp.array([[-1.0, -2.0, -3.0, -2.0], [1.0, -1.0, -1.0, -1.0]])
  expected = [[0.5, 0.0, -0.5, 0.0], [3.0, -1.0, -1.0, -1.0]]
  np.testing.assert_allclose(grpo_jax.max_rl(rewards), expected, rtol=1e-6)
