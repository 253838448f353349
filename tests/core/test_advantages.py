"""Advantages: values by hand, and what must hold for every one of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax.core.advantages import ADVANTAGES

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

nan = np.nan


def gdpo(rewards):
  """`multi_objective` of one reward function, so that it can stand among the others."""
  return grpo_jax.multi_objective(jnp.asarray(rewards)[None], jnp.ones(1))


FUNCTIONS = {**ADVANTAGES, "gdpo": gdpo}


@jax.jit
def all_of_them(rewards):
  """One program for all estimators, so that a new shape costs one compilation."""
  return {name: function(rewards) for name, function in FUNCTIONS.items()}


def one_of_them(name, rewards):
  return all_of_them(rewards)[name]


EVERY = {name: functools.partial(one_of_them, name) for name in FUNCTIONS}
SPREAD = ("group_normalized", "batch_normalized", "batch_whitened", "gdpo")

every = pytest.mark.parametrize("function", EVERY.values(), ids=EVERY)


def close(got, wanted, rtol=1e-6):
  np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=rtol, atol=1e-7)


# --- values by hand ------------------------------------------------------------------------------


def test_group_normalized():
  # mean 2, deviations -2 0 0 2: variance 8/3 with n - 1 and 2 with n
  rewards = jnp.array([[0.0, 2.0, 2.0, 4.0]])
  close(grpo_jax.group_normalized(rewards, eps=0.0), [[-(1.5**0.5), 0, 0, 1.5**0.5]])
  close(grpo_jax.group_normalized(rewards, eps=0.0, ddof=0), [[-(2**0.5), 0, 0, 2**0.5]])
  close(grpo_jax.group_normalized(rewards, eps=2.0, ddof=0), [[-0.5857864, 0, 0, 0.5857864]])


def test_the_default_epsilon_and_ddof_are_those_of_the_field():
  # deviations of 1/2, variance 1/3: 0.5 / (0.57735 + 1e-4)
  rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
  row = 0.5 / (3**-0.5 + 1e-4)
  close(grpo_jax.group_normalized(rewards)[0], [row, -row, -row, row])
  # over the batch: 8 rewards, variance 8/4/7
  row = 0.5 / ((2 / 7) ** 0.5 + 1e-4)
  close(grpo_jax.batch_normalized(rewards)[0], [row, -row, -row, row])
  close(grpo_jax.batch_whitened(rewards)[0], [row, -row, -row, row])


def test_group_centered():
  close(grpo_jax.group_centered(jnp.array([[1, 2, 6], [5, 5, 5]])), [[-2, -1, 3], [0, 0, 0]])


def test_leave_one_out():
  # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
  close(grpo_jax.leave_one_out(jnp.array([[1.0, 2.0, 6.0]])), [[-3.0, -1.5, 4.5]])


def test_batch_normalized_divides_by_the_spread_of_the_rewards():
  # all rewards: 0 2 6 8, mean 4, squares 16 + 4 + 4 + 16 = 40
  rewards = jnp.array([[0.0, 2.0], [6.0, 8.0]])
  close(
    grpo_jax.batch_normalized(rewards, eps=0.0, ddof=0),
    np.array([[-1, 1], [-1, 1]]) / 10**0.5,
  )
  close(grpo_jax.batch_normalized(rewards, eps=1.0)[1, 1], 1 / ((40 / 3) ** 0.5 + 1))


def test_batch_whitened_divides_by_the_spread_of_the_centered_rewards():
  rewards = jnp.array([[0.0, 2.0], [6.0, 8.0]])
  close(grpo_jax.batch_whitened(rewards, eps=0.0, ddof=0), [[-1, 1], [-1, 1]])
  close(grpo_jax.batch_whitened(rewards, eps=1.0)[1, 1], 1 / ((4 / 3) ** 0.5 + 1))


def test_max_rl():
  # mean 1/4: (1 - 1/4) / (1/4) = 3; nothing solved: 0; everything solved: 0
  rewards = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
  close(grpo_jax.max_rl(rewards), [[3, -1, -1, -1], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_multi_objective():
  # Each function normalized in its group (ddof 1): first +-0.70711 and 0, second -+0.70711 in both.
  rewards = jnp.array([[[1.0, 0.0], [3.0, 3.0]], [[10.0, 30.0], [5.0, 7.0]]])
  half = 0.5**0.5
  total = np.array([[2 * half - half, -2 * half + half], [-half, half]])
  wanted = total / np.sqrt((total**2).sum() / 3)
  close(grpo_jax.multi_objective(rewards, jnp.array([2.0, 1.0]), eps=0.0), wanted)
  # eps enters twice: in each function and in the batch
  first = 0.5 / (half + 1.0)
  total = np.array([[1, -1], [0, 0]]) * first
  wanted = total / (np.sqrt((total**2).sum() / 3) + 1.0)
  close(grpo_jax.multi_objective(rewards[:1], jnp.array([1.0]), eps=1.0), wanted)


def test_multi_objective_leaves_out_what_no_function_scored():
  rewards = jnp.array([[[1.0, 0.0, nan]], [[nan, nan, nan]]])
  # 1 and 0 are +-0.70711 normalized; the third is not in the spread, which is 1 with n - 1
  close(
    grpo_jax.multi_objective(rewards, jnp.ones(2), eps=0.0), [[[0.5**0.5, -(0.5**0.5), 0.0]][0]]
  )


def test_process_advantages():
  # Steps of both completions: 1, 0, 0 (and one that is not there): mean 1/3, population std
  # sqrt(2)/3, so normalized 1.41421 and -0.70711. A token gets the steps that end at or after it.
  step_rewards = jnp.array([[[1.0, 0.0], [0.0, nan]]])
  step_ends = jnp.array([[[1, 3], [2, 0]]])
  mask = jnp.array([[[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]])
  got = grpo_jax.process_advantages(step_rewards, step_ends, mask, eps=0.0, ddof=0)
  a, b = 2**0.5, -(0.5**0.5)
  close(got, [[[a + b, a + b, b, b, 0], [b, b, b, 0, 0]]])


def test_process_advantages_take_their_scale_from_epsilon_and_ddof():
  step_rewards, step_ends = jnp.array([[[1.0, 0.0]]]), jnp.array([[[0, 1]]])
  mask = jnp.ones((1, 1, 2), bool)
  row = -0.5 / (0.5**0.5 + 1e-4)
  close(grpo_jax.process_advantages(step_rewards, step_ends, mask), [[[0, row]]])
  close(grpo_jax.process_advantages(step_rewards, step_ends, mask, eps=0.5, ddof=0), [[[0, -0.5]]])


# --- rules for every estimator -------------------------------------------------------------------


@every
@pytest.mark.parametrize("size", [8, 16])
def test_equal_rewards_give_exactly_zero(function, size):
  values = np.array([0.1, 0.9, 10.1, 0.0, 1.0, -3.3, 1e8, 1e-8], np.float32)
  constant = np.repeat(values[:, None], size, axis=1)
  assert not np.asarray(function(constant)).any()


@pytest.mark.parametrize("name", SPREAD)
def test_equal_rewards_give_zero_with_epsilon_zero(name):
  function = functools.partial(ADVANTAGES[name], eps=0.0) if name in ADVANTAGES else None
  if function is None:
    function = functools.partial(grpo_jax.multi_objective, weights=jnp.ones(1), eps=0.0)
    assert not np.asarray(function(jnp.full((1, 2, 4), 0.1))).any()
  else:
    assert not np.asarray(function(jnp.full((2, 4), 0.1))).any()


@every
@pytest.mark.parametrize("unscored", [nan, np.inf, -np.inf])
def test_what_is_not_scored_is_left_out(function, unscored):
  rewards = np.array([[3.0, unscored, 0.0, 1.0, 2.0], [2.0, 5.0, unscored, 2.0, 1.0]], np.float32)
  without = np.array([[3.0, 0.0, 1.0, 2.0], [2.0, 5.0, 2.0, 1.0]], np.float32)
  got = np.asarray(function(rewards))
  assert got[0, 1] == 0
  assert got[1, 2] == 0
  close(np.stack([got[0, [0, 2, 3, 4]], got[1, [0, 1, 3, 4]]]), function(without), rtol=1e-5)


@every
def test_one_scored_reward_or_none_gives_zero(function):
  rewards = np.array([[nan, 5.0, nan, nan], [nan, nan, nan, nan]], np.float32)
  assert not np.asarray(function(rewards)).any()


@every
def test_a_group_of_one_gives_zero(function):
  assert not np.asarray(function(np.array([[5.0], [-1.0], [nan]], np.float32))).any()


@every
def test_rewards_of_1e8_keep_their_differences(function):
  rewards = np.array([[0.0, 64.0, 64.0, 128.0], [0.0, 0.0, 0.0, 64.0]], np.float32)
  got = np.asarray(function(rewards + np.float32(1e8)))
  assert np.isfinite(got).all()
  if function is EVERY["max_rl"]:
    close(got, np.asarray(function(rewards)) * rewards.mean(-1, keepdims=True) / 1e8, rtol=1e-4)
  elif function is EVERY["batch_normalized"]:
    close(got, function(rewards), rtol=1e-4)
  else:
    close(got, function(rewards))


@every
def test_advantages_of_a_group_add_up_to_zero(function):
  rewards = np.random.default_rng(0).normal(3.0, 2.0, (8, 8)).astype(np.float32)
  np.testing.assert_allclose(np.asarray(function(rewards)).sum(-1), 0.0, atol=2e-5)


@every
def test_prompts_without_spread_do_not_change_the_sign_of_others(function):
  rewards = np.array([[1.0, 0.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0]], np.float32)
  got = np.asarray(function(rewards))
  assert got[0, 0] > 0
  assert (got[0, 1:] < 0).all()
  assert not got[1].any()


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "bool"])
def test_other_dtypes_come_out_as_float32(function, dtype):
  rewards = jnp.array([[1, 0, 0, 1], [0, 0, 0, 1]], dtype)
  got = function(rewards)
  assert got.dtype == jnp.float32
  close(got, function(rewards.astype(jnp.float32)))


@every
def test_float64_stays(function, x64):
  rewards = np.array([[1.0, 0.0, 0.25, 1.0 + 1e-12]])
  got = function(rewards)
  assert got.dtype == jnp.float64
  assert got[0, 3] > got[0, 0]


@every
def test_vmap_over_batches(function):
  rewards = np.random.default_rng(1).normal(size=(3, 2, 4)).astype(np.float32)
  got = jax.vmap(function)(rewards)
  close(got[1], function(rewards[1]), rtol=1e-5)


@jax.jit
def all_gradients(rewards):
  return {
    name: jax.grad(lambda r, function=function: (function(r) ** 2).sum())(rewards)
    for name, function in FUNCTIONS.items()
  }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_to_the_rewards_is_finite(name):
  """Also for a reward that is not scored and for groups, or a batch, of equal rewards."""
  for second in ([1.0, 0.0, 0.5, 3.0], [5.0, 5.0, 5.0, 5.0]):
    got = np.asarray(all_gradients(jnp.array([[1.0, 0.0, nan, 2.0], second]))[name])
    assert np.isfinite(got).all()
    assert got[0, 2] == 0
  assert np.isfinite(np.asarray(all_gradients(jnp.full((2, 4), 5.0))[name])).all()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("shape", [(4,), (1, 2, 4), ()])
def test_a_wrong_rank_is_named(function, shape):
  if function is gdpo:
    shape = (4,) if len(shape) == 1 else (1, *shape)
  with pytest.raises(ValueError, match=r"^rewards has shape \(.*expected [23] axes \[.*P, G"):
    function(np.zeros(shape, np.float32))


@pytest.mark.parametrize("rewards", ["high", [[1.0, None]], {"a": 1.0}, None])
def test_what_is_not_numbers_is_named(rewards):
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


def test_errors_of_process_advantages():
  steps, ends = jnp.zeros((2, 3, 2)), jnp.zeros((2, 3, 2), int)
  mask = jnp.ones((2, 3, 5), bool)
  call = grpo_jax.process_advantages
  with pytest.raises(ValueError, match=r"^step_rewards has shape \(3, 2\), expected 3 axes \[P, G"):
    call(steps[0], ends, mask)
  with pytest.raises(ValueError, match=r"^step_ends has shape \(2, 3, 1\), expected \(2, 3, 2\)"):
    call(steps, ends[..., :1], mask)
  with pytest.raises(
    ValueError, match=r"^step_ends must hold integer token ids, got dtype float32"
  ):
    call(steps, steps, mask)
  with pytest.raises(ValueError, match=r"^mask has shape \(3, 5\), expected 3 axes"):
    call(steps, ends, mask[0])
  with pytest.raises(ValueError, match=r"^mask has shape \(2, 2, 5\), expected \(2, 3, 5\)"):
    call(steps, ends, mask[:, :2])
  with pytest.raises(ValueError, match=r"^mask must be boolean"):
    call(steps, ends, mask.astype(float))


def test_process_advantages_jit_vmap_and_float64(x64):
  rng = np.random.default_rng(0)
  steps, ends = rng.normal(size=(5, 2, 3, 2)), rng.integers(0, 4, (5, 2, 3, 2))
  mask = rng.random((5, 2, 3, 4)) < 0.7
  got = jax.jit(jax.vmap(grpo_jax.process_advantages))(steps, ends, mask)
  assert got.dtype == jnp.float64
  close(got[2], grpo_jax.process_advantages(steps[2], ends[2], mask[2]))
  assert not np.asarray(got)[~mask].any()
