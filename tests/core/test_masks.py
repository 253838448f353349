"""Tests masks and token weights against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import completion_mask, token_weights
from grpo_jax.core.masks import AVERAGES, count_tokens, high_entropy, masked_mean

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

TOKENS = np.array(
  [[5, 6, 2, 7], [2, 5, 6, 7], [5, 6, 7, 8], [2, 2, 2, 2], [5, 2, 2, 2], [5, 6, 7, 2]]
)
ENDS_AT_2 = np.array(
  [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool
)
# [P=2, G=2, T=4] with lengths 4, 1, 0, 3
MASK = np.array([[[1, 1, 1, 1], [1, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 0]]], bool)
WEIGHTS = {
  "sequence": [[[1 / 16] * 4, [1 / 4, 0, 0, 0]], [[0] * 4, [1 / 12, 1 / 12, 1 / 12, 0]]],
  "token": [[[1 / 8] * 4, [1 / 8, 0, 0, 0]], [[0] * 4, [1 / 8, 1 / 8, 1 / 8, 0]]],
  "constant": [[[1 / 40] * 4, [1 / 40, 0, 0, 0]], [[0] * 4, [1 / 40, 1 / 40, 1 / 40, 0]]],
  # 1 / (2 prompts · 5 tokens), 1 / (2 prompts · 3 tokens)
  "prompt": [[[1 / 10] * 4, [1 / 10, 0, 0, 0]], [[0] * 4, [1 / 6, 1 / 6, 1 / 6, 0]]],
}
FLAT = [average for average in WEIGHTS if average != "prompt"]  # those that know no group


def test_the_mask_ends_with_the_first_eos():
  """EOS in the middle, first, absent, repeated as padding, and last."""
  actual = completion_mask(TOKENS, 2)
  assert actual.dtype == bool
  assert (np.asarray(actual) == ENDS_AT_2).all()


@pytest.mark.parametrize("eos_ids", [[6, 2], (2, 6), np.array([2, 6]), jnp.array([6, 2])])
def test_each_of_several_eos_ids_ends(eos_ids):
  expected = np.array(
    [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], bool
  )
  assert (np.asarray(completion_mask(TOKENS, eos_ids)) == expected).all()


@pytest.mark.parametrize("eos_ids", [(), [], np.array([], int), 99])
def test_without_an_eos_id_nothing_ends(eos_ids):
  assert np.asarray(completion_mask(TOKENS, eos_ids)).all()
  assert completion_mask(jnp.array([0, 1, 5]), eos_ids).tolist() == [True, True, True]


def test_leading_axes_are_free():
  tokens = TOKENS.reshape(3, 2, 4)
  assert (np.asarray(completion_mask(tokens, 2)) == ENDS_AT_2.reshape(3, 2, 4)).all()
  assert completion_mask(TOKENS[0], 2).tolist() == [True, True, True, False]
  assert completion_mask(np.zeros((2, 0), int), 2).shape == (2, 0)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32", "int32"])
def test_narrow_token_types_do_not_wrap(dtype):
  tokens = TOKENS.astype(dtype)
  assert np.asarray(completion_mask(tokens, 258)).all()  # 258 - 256 = 2 in eight bits
  assert (np.asarray(completion_mask(tokens, [2, 100_000])) == ENDS_AT_2).all()


def test_mask_under_jit_and_vmap():
  assert (np.asarray(jax.jit(completion_mask)(TOKENS, 2)) == ENDS_AT_2).all()
  each = jax.vmap(completion_mask, in_axes=(0, None))(TOKENS, jnp.array([2]))
  assert (np.asarray(each) == ENDS_AT_2).all()


def test_errors_of_the_mask():
  with pytest.raises(ValueError, match=r"^tokens must hold integer token ids, got dtype float32"):
    completion_mask(np.zeros((2, 3), np.float32), 2)
  with pytest.raises(ValueError, match=r"^tokens has shape \(\), expected at least one axis"):
    completion_mask(np.int32(3), 2)
  with pytest.raises(ValueError, match=r"^eos_ids must hold integer token ids, got dtype float32"):
    completion_mask(TOKENS, [0.5])
  with pytest.raises(ValueError, match=r"^tokens must be an array of numbers"):
    completion_mask("ab", 2)


@pytest.mark.parametrize("average", WEIGHTS)
def test_weights(average):
  actual = token_weights(MASK, average, max_length=10)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, WEIGHTS[average], rtol=1e-6)


def test_every_average_is_tested():
  assert set(WEIGHTS) == set(AVERAGES)


@pytest.mark.parametrize("average", FLAT)
def test_padding_and_leading_axes_do_not_change_the_weights(average):
  padded = np.pad(MASK, ((0, 0), (0, 0), (0, 3)))
  actual = token_weights(padded.reshape(4, 7), average, max_length=10)
  expected = np.pad(WEIGHTS[average], ((0, 0), (0, 0), (0, 3))).reshape(4, 7)
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("average", WEIGHTS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 0), (0, 3, 4), (4,)])
def test_weights_of_a_batch_without_tokens_are_zero(average, shape):
  if average == "prompt" and len(shape) == 1:
    pytest.skip("a row of tokens is not a group")
  actual = token_weights(np.zeros(shape, bool), average, max_length=10)
  assert actual.shape == shape
  assert not np.asarray(actual).any()


@pytest.mark.parametrize("average", WEIGHTS)
def test_weights_of_single_tokens(average):
  """Three sequences of one token each: 1/3 with every average (max_length 1)."""
  actual = token_weights(jnp.ones((3, 1), bool), average, max_length=1)
  np.testing.assert_allclose(actual, np.full((3, 1), 1 / 3), rtol=1e-6)


def test_a_single_token_is_its_own_mean():
  mask = jnp.array([[True, False], [False, False]])
  np.testing.assert_array_equal(token_weights(mask, "token"), [[1.0, 0.0], [0.0, 0.0]])
  assert masked_mean(jnp.array([[3.0, 9.0], [9.0, np.nan]]), mask) == 3.0


def test_weights_of_one_sequence():
  mask = np.array([True, True, False])
  assert token_weights(mask, "sequence").tolist() == [0.5, 0.5, 0.0]
  assert token_weights(mask, "constant", max_length=4).tolist() == [0.25, 0.25, 0.0]


def test_integer_masks_count_where_not_zero():
  np.testing.assert_allclose(token_weights(MASK * 3, "token"), WEIGHTS["token"], rtol=1e-6)


def test_an_average_may_be_a_function():
  """Gives every sequence its sum over tokens (LUSPO): 1 / number of sequences."""

  def summed(mask, max_length):
    return jnp.full(mask.shape, 1 / 4)

  np.testing.assert_allclose(token_weights(MASK, summed), MASK / 4, rtol=1e-6)


def test_the_prompt_average_gives_each_prompt_the_same_weight():
  """A group of tokens alone is one prompt; more leading axes are more prompts."""
  np.testing.assert_allclose(token_weights(MASK[0], "prompt"), MASK[0] / 5, rtol=1e-6)
  deeper = np.stack([MASK, MASK])
  np.testing.assert_allclose(
    token_weights(deeper, "prompt"), np.stack([WEIGHTS["prompt"]] * 2) / 2, rtol=1e-6
  )
  padded = np.pad(MASK, ((0, 0), (0, 1), (0, 3)))
  expected = np.pad(WEIGHTS["prompt"], ((0, 0), (0, 1), (0, 3)))
  np.testing.assert_allclose(token_weights(padded, "prompt"), expected, rtol=1e-6)
  empty = np.stack([MASK[0], np.zeros_like(MASK[0])])  # an empty group counts as a prompt
  np.testing.assert_allclose(token_weights(empty, "prompt")[0], MASK[0] / 10, rtol=1e-6)


# --- tokens of high entropy ----------------------------------------------------------------------

ENTROPY = np.array([[0.5, 1.0, 2.0, 9.0], [3.0, 4.0, 9.0, 9.0]])
INSIDE = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)


def test_high_entropy():
  """Takes the quantiles of 0.6, 0.5 and 0 of 0.5, 1, 2, 3, 4, which are 2.4, 2 and 0.5."""
  for share, lowest in ((0.4, 2.4), (0.5, 2.0), (1.0, 0.0), (0.01, 3.9)):
    actual = np.asarray(high_entropy(ENTROPY, INSIDE, share))
    assert (actual == (INSIDE & (lowest <= ENTROPY))).all(), share
  poisoned = np.where(INSIDE, ENTROPY, np.nan)
  assert (np.asarray(high_entropy(poisoned, INSIDE, 0.5)) == (INSIDE & (ENTROPY >= 2))).all()
  assert not np.asarray(high_entropy(ENTROPY, np.zeros_like(INSIDE), 0.5)).any()
  assert high_entropy(ENTROPY[:, :0], INSIDE[:, :0], 0.5).shape == (2, 0)
  equal = np.asarray(high_entropy(np.ones((2, 4)), INSIDE, 0.2))
  assert (equal == INSIDE).all()  # all of them are on the threshold


def test_errors_of_high_entropy():
  for share in (0.0, -0.5, 1.5, np.nan):
    with pytest.raises(ValueError, match=rf"^share must be above 0 and at most 1, got {share}"):
      high_entropy(ENTROPY, INSIDE, share)
  with pytest.raises(ValueError, match=r"^mask has shape \(2, 3\), expected \(2, 4\)"):
    high_entropy(ENTROPY, INSIDE[:, :3], 0.5)
  with pytest.raises(ValueError, match=r"^entropy must be an array of numbers"):
    high_entropy("high", INSIDE, 0.5)


def test_weights_under_jit_vmap_and_float64(x64):
  weights = jax.jit(token_weights, static_argnums=1)(MASK, "sequence")
  assert weights.dtype == jnp.float64
  np.testing.assert_allclose(weights, WEIGHTS["sequence"], rtol=1e-15)
  each = jax.vmap(lambda mask: token_weights(mask, "token"))(MASK)
  np.testing.assert_allclose(each[1], np.array([[0] * 4, [1, 1, 1, 0]]) / 3, rtol=1e-15)


def test_errors_of_the_weights():
  with pytest.raises(
    ValueError, match=r"^unknown average 'mean'; known: constant, prompt, sequence, token"
  ):
    token_weights(MASK, "mean")
  with pytest.raises(ValueError, match=r"^unknown average \['token'\]; known"):
    token_weights(MASK, ["token"])
  with pytest.raises(ValueError, match=r"^average='constant' needs max_length"):
    token_weights(MASK, "constant")
  for bad in (0, -3, np.nan, np.inf):
    with pytest.raises(
      ValueError, match=rf"^max_length must be a finite number above 0, got {bad}"
    ):
      token_weights(MASK, "constant", max_length=bad)
  with pytest.raises(ValueError, match=r"^average='prompt' needs a mask .*has shape \(4,\)$"):
    token_weights(MASK[0, 0], "prompt")
  with pytest.raises(ValueError, match=r"^mask must be boolean .* got dtype float32; pass mask.as"):
    token_weights(MASK.astype(np.float32), "token")
  with pytest.raises(ValueError, match=r"^mask has shape \(\), expected at least one axis"):
    token_weights(np.bool_(True), "token")


def test_masked_mean():
  values = np.array([[1.0, 2.0, np.nan], [6.0, np.inf, -np.inf]])
  assert masked_mean(values, np.array([[1, 1, 0], [1, 0, 0]], bool)) == 3.0
  assert masked_mean(values, np.zeros((2, 3), bool)) == 0.0


def test_counts_do_not_wrap_at_2_to_the_31():
  """2^32 tokens, which nothing holds: the mask is broadcast inside the program."""

  def count(one):
    return count_tokens(jnp.broadcast_to(one, (2**17, 2**15)))

  assert float(jax.jit(count)(jnp.array(True))) == 2.0**32
  weights = jax.jit(
    lambda one, average: token_weights(jnp.broadcast_to(one, (2**17, 2**15)), average)[0, 0],
    static_argnums=1,
  )
  for average in ("token", "sequence"):
    assert float(weights(jnp.array(True), average)) == 2.0**-32


def test_counts_are_exact_where_integers_are_small():
  rng = np.random.default_rng(0)
  mask = rng.random((3, 5, 7)) < 0.4
  assert float(count_tokens(jnp.asarray(mask))) == mask.sum()
  assert float(count_tokens(jnp.zeros((2, 0), bool))) == 0
  assert float(count_tokens(jnp.array(True))) == 1
