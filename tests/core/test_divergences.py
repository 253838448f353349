"""Tests divergences of whole distributions: values and gradients in float64, tiles, and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import head_divergence
from grpo_jax.core import tiles

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

B, T, D, E, V = 2, 3, 5, 4, 1100  # with `small_tiles` the vocabulary is two tiles of 512 and a rest
WHERE = np.array([[True, False, True], [False, False, True]])
BETAS = [0.0, 0.3, 0.5, 1.0]


@pytest.fixture
def small_tiles(monkeypatch):
  """Sets the size of tiles to 512 columns, the smallest possible."""
  monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1)


def inputs(dtype=np.float32, seed=0):
  """Returns hidden, head, teacher_hidden, teacher_head, and weights of the rows."""
  rng = np.random.default_rng(seed)
  shapes = (B, T, D), (D, V), (B, T, E), (E, V)
  arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
  return *arrays, jnp.asarray(rng.normal(size=(B, T)), np.float32)


def log_softmax64(hidden, head, temperature, softcap):
  raw = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
  z, slope = raw, np.ones_like(raw)
  if softcap is not None:
    z, slope = softcap * np.tanh(raw / softcap), 1 / np.cosh(raw / softcap) ** 2
  z = z / temperature
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True)), slope / temperature


def kl(p, q):
  """Returns KL(p, q) of log-probabilities over the last axis."""
  return np.sum(np.exp(p) * (p - q), -1)


def dense64(arrays, beta, temperature=1.0, softcap=None, teacher_softcap=None, where=None):
  """Returns values and gradients through the whole [B, T, V], from the definitions.

  The slope in the logits is found through the slope in each probability and the Jacobian of the
  softmax, `dp_i / dz_j = p_i (1[i = j] - p_j)`, not by the formula of the docstring.
  """
  hidden, head, teacher_hidden, teacher_head, weights = arrays
  log_p, slope = log_softmax64(hidden, head, temperature, softcap)
  log_q, _ = log_softmax64(teacher_hidden, teacher_head, temperature, teacher_softcap)
  p, q = np.exp(log_p), np.exp(log_q)
  m = beta * q + (1 - beta) * p
  if beta == 0:
    value, by_p = kl(log_q, log_p), -q / p
  elif beta == 1:
    value, by_p = kl(log_p, log_q), log_p - log_q + 1
  else:
    value = beta * kl(log_q, np.log(m)) + (1 - beta) * kl(log_p, np.log(m))
    by_p = -beta * q * (1 - beta) / m
    by_p += (1 - beta) * (np.log(p / m) + 1 - p * (1 - beta) / m)
  rows = np.ones((B, T), bool) if where is None else where
  weights = np.where(rows, np.asarray(weights, np.float64), 0.0)[..., None]
  d_z = weights * p * (by_p - np.sum(p * by_p, -1, keepdims=True)) * slope
  d_hidden = d_z @ np.asarray(head, np.float64).T
  d_head = np.einsum("btd,btv->dv", np.asarray(hidden, np.float64), d_z)
  return np.where(rows, value, 0.0), (d_hidden, d_head)


def tiled(arrays, **settings):
  """Returns (values, gradients of all four arrays) of the weighted sum."""
  *models, weights = arrays

  def scalar(*models):
    value = head_divergence(*models, **settings)
    return jnp.sum(weights * value), value

  gradients, values = jax.jit(jax.grad(scalar, (0, 1, 2, 3), has_aux=True))(*models)
  return values, gradients


def close(actual, expected, tolerance=1e-5):
  """Asserts that arrays agree within `tolerance` of the largest value of each."""
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    atol = tolerance * max(np.abs(b).max(), 1.0)
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=atol)


SETTINGS = {
  "plain": {},
  "temperature": {"temperature": 0.7},
  "softcaps": {"softcap": 1.5, "teacher_softcap": 2.5},
  "vocab_shards": {"vocab_shards": 4},
  "row_shards": {"row_shards": 3},
  "all": {"temperature": 1.3, "softcap": 2.0, "where": WHERE, "vocab_shards": 2, "row_shards": 2},
}


@pytest.mark.parametrize("beta", BETAS)
def test_vocabulary_shards_with_one_probable_token_each(beta, small_tiles):
  """The others have a probability of e^-300, which is 0 in float32; the policy's second e^-150."""
  hidden, head, teacher_hidden, teacher_head, weights = map(np.array, inputs())
  for tokens, logits, second in ((hidden, head, -150.0), (teacher_hidden, teacher_head, -1.0)):
    logits *= 0.01
    tokens[..., 0], logits[0] = 1.0, -300.0
    logits[0, 3], logits[0, V // 2 + 5] = 0.0, second
  arrays = (hidden, head, teacher_hidden, teacher_head, weights)
  values, gradients = tiled(arrays, beta=beta, vocab_shards=2)
  expected = dense64(arrays, beta)
  close(values, expected[0])
  close(gradients[:2], expected[1])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tiles_agree_with_the_definition_in_float64(settings, beta, small_tiles, monkeypatch):
  # Three tiles and a rest: of two columns with one or four vocabulary shards, of one with two.
  monkeypatch.setattr(tiles, "LEAST_COLUMNS", 512 // settings.get("vocab_shards", 1))
  arrays = inputs()
  values, gradients = tiled(arrays, beta=beta, **settings)
  plain = {name: settings[name] for name in settings.keys() - {"vocab_shards", "row_shards"}}
  expected, slopes = dense64(arrays, beta, **plain)
  close(values, expected)
  close(gradients[:2], slopes)
  assert not any(np.asarray(gradient).any() for gradient in gradients[2:])  # of the teacher


def test_in_float64(small_tiles, x64):
  arrays = inputs(np.float64)
  for beta in BETAS:
    values, gradients = tiled(arrays, beta=beta, temperature=0.7)
    assert values.dtype == jnp.float64
    expected, slopes = dense64(arrays, beta, temperature=0.7)
    close(values, expected, 1e-11)
    close(gradients[:2], slopes, 1e-11)


def test_by_hand():
  """p = (1/2, 1/2), q = (1/4, 3/4), m = (3/8, 5/8)."""
  one, head = jnp.ones((1, 1)), jnp.zeros((1, 2))
  call = functools.partial(head_divergence, one, head, one, jnp.log(jnp.array([[0.25, 0.75]])))
  to_m = 0.5 * np.log(4 / 3) + 0.5 * np.log(4 / 5)
  from_q = 0.25 * np.log(2 / 3) + 0.75 * np.log(6 / 5)
  np.testing.assert_allclose(call(beta=0.0), [0.25 * np.log(0.5) + 0.75 * np.log(1.5)], rtol=1e-5)
  np.testing.assert_allclose(call(beta=1.0), [0.5 * np.log(2) + 0.5 * np.log(2 / 3)], rtol=1e-5)
  np.testing.assert_allclose(call(beta=0.5), [0.5 * to_m + 0.5 * from_q], rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_a_policy_that_equals_its_teacher(beta, small_tiles):
  hidden, head, _, _, weights = inputs()
  values, gradients = tiled((hidden, head, hidden, head, weights), beta=beta)
  np.testing.assert_allclose(values, 0.0, atol=1e-6)
  for gradient in gradients:
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_excluded_rows_may_hold_anything(beta, small_tiles):
  hidden, head, teacher_hidden, teacher_head, weights = inputs()
  expected = tiled((hidden, head, teacher_hidden, teacher_head, weights), beta=beta, where=WHERE)
  poison = np.zeros((B, T, 1), np.float32)
  poison[~WHERE] = np.array([[np.nan], [np.inf], [-np.inf]])
  hidden, teacher_hidden = (
    jnp.where(WHERE[..., None], x, poison) for x in (hidden, teacher_hidden)
  )
  weights = np.where(WHERE, weights, 7.0)
  actual = tiled((hidden, head, teacher_hidden, teacher_head, weights), beta=beta, where=WHERE)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  assert not np.asarray(actual[0])[~WHERE].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_inputs_accumulate_in_float32(dtype, small_tiles):
  arrays = inputs(dtype)
  wide = [x.astype(jnp.float32) for x in arrays]
  for beta in BETAS:
    values, gradients = tiled(arrays, beta=beta)
    expected, slopes = dense64(wide, beta)
    assert values.dtype == jnp.float32
    close(values, expected)
    assert gradients[0].dtype == gradients[1].dtype == dtype
    close(gradients[:2], slopes, 0.01)


def test_impossible_tokens_of_both_are_left_out(small_tiles):
  """Logits of -inf in both models, a whole shard of them: uniform over 500 tokens each."""
  hidden, head = jnp.ones((1, 2, 1)), jnp.zeros((1, V)).at[0, :600].set(-jnp.inf)
  for beta in BETAS:
    for vocab_shards in (1, 2):
      values = head_divergence(hidden, head, hidden, head, beta=beta, vocab_shards=vocab_shards)
      np.testing.assert_allclose(values, 0.0, atol=1e-6)


def test_large_logits_do_not_overflow(small_tiles):
  hidden, head, teacher_hidden, teacher_head, weights = inputs()
  arrays = hidden, head * 20, teacher_hidden, teacher_head * 20, weights
  for beta in (0.5, 1.0):
    close(tiled(arrays, beta=beta)[0], dense64(arrays, beta)[0])


def test_errors():
  arrays = [np.zeros(shape, np.float32) for shape in ((2, 3, 4), (4, 8), (2, 3, 5), (5, 8))]
  call = functools.partial(head_divergence, *arrays)
  for beta in (-0.1, 1.1, np.nan):
    with pytest.raises(ValueError, match=r"^beta must be between 0 and 1, got"):
      call(beta=beta)
  with pytest.raises(ValueError, match=r"^of the teacher: hidden has shape \(2, 3, 5\) and head"):
    head_divergence(*arrays[:3], arrays[3].T)
  with pytest.raises(ValueError, match=r"the tokens and the vocabulary must be the same$"):
    head_divergence(*arrays[:3], arrays[3][:, :7])
  with pytest.raises(ValueError, match=r"the tokens and the vocabulary must be the same$"):
    head_divergence(*arrays[:2], arrays[2][:1], arrays[3])
  with pytest.raises(ValueError, match=r"^vocab_shards must divide the vocabulary of 8, got 3"):
    call(vocab_shards=3)
  with pytest.raises(ValueError, match=r"^row_shards must divide the 6 rows, got 4"):
    call(row_shards=4)
  with pytest.raises(ValueError, match=r"^of the teacher: softcap must be a finite number above 0"):
    call(teacher_softcap=0.0)
  with pytest.raises(ValueError, match=r"^where has shape \(3, 2\), expected \(2, 3\)"):
    call(where=np.ones((3, 2), bool))


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_no_logits_are_stored(beta):
  """Both passes need at most 0.4 of a float32 [B, T, V] array beside inputs and outputs.

  The program is compiled but not run. Going through the logits of both models needs several.
  """
  batch, length, vocab, width = 2, 512, 151_936, 64

  def scalar(hidden, embedding, teacher_hidden, teacher_embedding, weights):
    models = hidden, embedding.T, teacher_hidden, teacher_embedding.T
    return jnp.sum(weights * head_divergence(*models, beta=beta))

  program = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1))).lower(
    jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
    jax.ShapeDtypeStruct((vocab, width), jnp.float32),
    jax.ShapeDtypeStruct((batch, length, 2 * width), jnp.float32),
    jax.ShapeDtypeStruct((vocab, 2 * width), jnp.float32),
    jax.ShapeDtypeStruct((batch, length), jnp.float32),
  )
  temporary = program.compile().memory_analysis().temp_size_in_bytes
  assert temporary > 0
  assert temporary <= 0.4 * batch * length * vocab * 4
