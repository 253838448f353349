"""Tests log-probabilities: values computed by hand and in float64, tiles, and memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import head_logprobs, token_logprobs
from grpo_jax.core import tiles
from grpo_jax.core.logprobs import soft_cap

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

B, T, D, V = 2, 3, 5, 1100  # with `small_tiles` the vocabulary is two tiles of 512 and a rest
TOKENS = np.array([[0, 511, 512], [1023, 1024, 1099]])


def softmax64(logits, tokens, temperature=1.0):
  """Returns (logp, entropy) in float64, from their definitions."""
  logps = log_softmax64(np.asarray(logits, np.float64) / temperature)
  chosen = np.take_along_axis(logps, np.asarray(tokens)[..., None], -1)[..., 0]
  return chosen, -np.sum(np.exp(logps) * np.where(np.isneginf(logps), 0.0, logps), -1)


def log_softmax64(z):
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


# --- from logits ---------------------------------------------------------------------------------


def test_token_logprobs():
  # The softmax of log 1, log 2, log 5 is 1/8, 2/8, 5/8.
  logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [5.0, 2.0, 1.0]])) + 3.0
  logp, entropy = token_logprobs(logits, jnp.array([1, 0]))
  np.testing.assert_allclose(logp, np.log([2 / 8, 5 / 8]), rtol=1e-6)
  expected = 1 / 8 * np.log(8) + 2 / 8 * np.log(4) + 5 / 8 * np.log(8 / 5)
  np.testing.assert_allclose(entropy, [expected, expected], rtol=1e-6)


def test_temperature_divides_the_logits():
  # Temperature 1/2: 1, 4, 25 over 30. Temperature 2: 1, sqrt 2, sqrt 5 over their sum.
  logits = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
  logp, _ = token_logprobs(logits, jnp.array([2]), temperature=0.5)
  np.testing.assert_allclose(logp, np.log([25 / 30]), rtol=1e-6)
  logp, _ = token_logprobs(logits, jnp.array([2]), temperature=2.0)
  np.testing.assert_allclose(logp, [np.log(5**0.5 / (1 + 2**0.5 + 5**0.5))], rtol=1e-6)


def test_gradients_of_token_logprobs():
  # d logp / dz = onehot - p and d entropy / dz = -p (log p + entropy), both / temperature.
  logits = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
  p = np.array([1.0, 4.0, 25.0]) / 30
  entropy = -(p * np.log(p)).sum()
  by_logp, by_entropy = (
    jax.grad(lambda z, i=i: token_logprobs(z, jnp.array([2]), temperature=0.5)[i].sum())(logits)
    for i in (0, 1)
  )
  np.testing.assert_allclose(by_logp, [(np.array([0, 0, 1]) - p) / 0.5], rtol=1e-5)
  np.testing.assert_allclose(by_entropy, [-p * (np.log(p) + entropy) / 0.5], rtol=1e-5)


def test_logits_of_minus_infinity_are_impossible_tokens():
  logits = jnp.array([[0.0, -jnp.inf, 0.0], [-jnp.inf, -jnp.inf, 7.0]])
  tokens = jnp.array([2, 2])
  logp, entropy = token_logprobs(logits, tokens)
  np.testing.assert_allclose(logp, [-np.log(2), 0.0], atol=1e-7)
  np.testing.assert_allclose(entropy, [np.log(2), 0.0], atol=1e-7)
  gradient = jax.grad(lambda z: sum(part.sum() for part in token_logprobs(z, tokens)))(logits)
  np.testing.assert_allclose(gradient, [[-0.5, 0, 0.5], [0, 0, 0]], atol=1e-6)


def test_large_logits_do_not_overflow():
  logp, entropy = token_logprobs(jnp.array([[1e4, 1e4 - 1.0, -1e4]]), jnp.array([1]))
  np.testing.assert_allclose(logp, [-1 - np.log(1 + np.exp(-1))], rtol=1e-5)
  np.testing.assert_allclose(entropy, softmax64([[0.0, -1.0]], [0])[1], rtol=1e-5)


def test_tokens_out_of_range_are_nan():
  logits = jnp.zeros((4, 3))
  logp, entropy = token_logprobs(logits, jnp.array([-1, 3, 2, -4]))
  assert np.isnan(np.asarray(logp)).tolist() == [True, True, False, True]
  np.testing.assert_allclose(entropy, np.log(3), rtol=1e-6)
  hidden, head = jnp.zeros((4, 2)), jnp.zeros((2, 3))
  logp, entropy = head_logprobs(hidden, head, jnp.array([-1, 3, 2, -4]))
  assert np.isnan(np.asarray(logp)).tolist() == [True, True, False, True]
  np.testing.assert_allclose(entropy, np.log(3), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_logits_are_widened(dtype):
  logits = jnp.array(np.random.default_rng(0).normal(size=(2, 3, 7)), dtype)
  tokens = np.array([[0, 3, 6], [1, 1, 2]])
  actual = jax.jit(token_logprobs)(logits, tokens)
  for array, expected in zip(actual, softmax64(logits.astype(jnp.float32), tokens), strict=True):
    assert array.dtype == jnp.float32
    np.testing.assert_allclose(array, expected, rtol=1e-5)


def test_token_logprobs_in_float64_and_vmap(x64):
  logits = np.random.default_rng(0).normal(size=(2, 3, 7))
  tokens = np.array([[0, 3, 6], [1, 1, 2]])
  actual = jax.vmap(token_logprobs)(logits, tokens)
  for array, expected in zip(actual, softmax64(logits, tokens), strict=True):
    assert array.dtype == jnp.float64
    np.testing.assert_allclose(array, expected, rtol=1e-12)


def test_a_negative_token_is_nan_for_every_shape():
  """It selects neither the last column nor one by the length of another axis."""
  for shape in ((1, 3), (2, 1, 5)):
    logp, _ = token_logprobs(jnp.zeros(shape), -jnp.ones(shape[:-1], int))
    assert jnp.isnan(logp).all()


# --- soft cap ------------------------------------------------------------------------------------


def test_soft_cap():
  x = np.array([-100.0, -1.0, 0.0, 2.0, 1e6], np.float32)
  expected = [-3.0, -3 * np.tanh(1 / 3), 0.0, 3 * np.tanh(2 / 3), 3.0]
  np.testing.assert_allclose(soft_cap(jnp.asarray(x), 3.0), expected, rtol=1e-6)
  assert soft_cap(x, None) is x
  slope = jax.vmap(jax.grad(lambda x: soft_cap(x, 3.0)))(x[1:4])
  np.testing.assert_allclose(slope, 1 / np.cosh(x[1:4] / 3) ** 2, rtol=1e-5)


# --- from hidden states --------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch):
  """Sets the size of tiles to 512 columns, the smallest possible."""
  monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1)


def inputs(dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  head = rng.normal(size=(D, V)).astype(np.float32)
  a, b = rng.normal(size=(2, B, T)).astype(np.float32)
  return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), a, b


def tiled(hidden, head, a, b, **settings):
  """Returns (results, gradients) of `sum(a logp + b entropy)` by `head_logprobs`."""

  def scalar(hidden, head):
    logp, entropy = head_logprobs(hidden, head, TOKENS, **settings)
    return jnp.sum(a * logp) + jnp.sum(b * entropy), (logp, entropy)

  gradients, results = jax.jit(jax.grad(scalar, (0, 1), has_aux=True))(hidden, head)
  return results, gradients


def dense64(hidden, head, a, b, temperature=1.0, softcap=None, where=None):
  """Computes `tiled` in NumPy and float64, with gradients by hand through the whole [B, T, V]."""
  hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  rows = np.ones((B, T), bool) if where is None else np.asarray(where)
  hidden = np.where(rows[..., None], hidden, 0.0)
  raw = hidden @ head
  z, slope = raw, np.ones_like(raw)
  if softcap is not None:
    z, slope = softcap * np.tanh(raw / softcap), 1 / np.cosh(raw / softcap) ** 2
  logp, entropy = softmax64(z, TOKENS, temperature)
  logps = log_softmax64(z / temperature)
  p = np.exp(logps)
  onehot = np.arange(V) == TOKENS[..., None]
  a, b = (np.where(rows, x, 0.0)[..., None] for x in (a, b))
  d_raw = (a * (onehot - p) - b * p * (logps + entropy[..., None])) * slope / temperature
  d_hidden, d_head = d_raw @ head.T, np.einsum("btd,btv->dv", hidden, d_raw)
  return (np.where(rows, logp, 0.0), np.where(rows, entropy, 0.0)), (d_hidden, d_head)


def close(actual, expected, tolerance=1e-5):
  """Asserts that trees agree within `tolerance` of the largest value of each array."""
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    atol = tolerance * max(np.abs(b).max(), 1.0)
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=atol)


WHERE = np.array([[True, False, True], [False, False, True]])
SETTINGS = {
  "plain": {},
  "temperature": {"temperature": 0.7},
  "softcap": {"softcap": 1.5},
  "vocab_shards": {"vocab_shards": 4},
  "row_shards": {"row_shards": 3},
  "all": {"temperature": 1.3, "softcap": 2.0, "where": WHERE, "vocab_shards": 2, "row_shards": 2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tiles_agree_with_float64_and_with_token_logprobs(settings, small_tiles, monkeypatch):
  # Three tiles and a rest: of two columns with one or four vocabulary shards, of one with two.
  vocab_shards = settings.get("vocab_shards", 1)
  monkeypatch.setattr(tiles, "LEAST_COLUMNS", 512 // vocab_shards)
  assert tiles.tiles_of(B * T, V // vocab_shards) == (3, {1: 366, 2: 183, 4: 91}[vocab_shards])
  hidden, head, a, b = inputs()
  actual = tiled(hidden, head, a, b, **settings)
  expected = {name: settings[name] for name in settings.keys() - {"vocab_shards", "row_shards"}}
  close(actual, dense64(hidden, head, a, b, **expected))
  if "where" not in settings:
    logits = hidden @ head
    if "softcap" in settings:
      logits = settings["softcap"] * jnp.tanh(logits / settings["softcap"])
    plain = token_logprobs(logits, TOKENS, temperature=settings.get("temperature", 1.0))
    close(actual[0], jax.tree.map(np.asarray, plain))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_inputs_accumulate_in_float32(dtype, small_tiles):
  hidden, head, a, b = inputs(dtype)
  (logp, entropy), (d_hidden, d_head) = tiled(hidden, head, a, b)
  wide = [np.asarray(x.astype(jnp.float32)) for x in (hidden, head)]
  results, gradients = dense64(*wide, a, b)
  assert logp.dtype == entropy.dtype == jnp.float32
  close((logp, entropy), results)  # as precise as with float32 inputs of the same values
  assert d_hidden.dtype == d_head.dtype == dtype
  close((d_hidden, d_head), gradients, 0.01)  # rounded to the dtype of the inputs


def test_mixed_dtypes_and_float64(small_tiles, x64):
  hidden, head, a, b = inputs(np.float64)
  actual = tiled(hidden, head, a, b, temperature=0.7)
  assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype("float64")}
  close(actual, dense64(hidden, head, a, b, temperature=0.7), 1e-12)
  _, (d_hidden, d_head) = tiled(hidden.astype(jnp.bfloat16), head.astype(jnp.float32), a, b)
  assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)


def test_excluded_rows_may_hold_anything(small_tiles):
  hidden, head, a, b = inputs()
  expected = tiled(hidden, head, a, b, where=WHERE)
  poison = np.zeros((B, T, 1), np.float32)
  poison[~WHERE] = np.array([[np.nan], [np.inf], [-np.inf]])
  poisoned = jnp.where(WHERE[..., None], hidden, poison)
  actual = tiled(poisoned, head, np.where(WHERE, a, 7.0), np.where(WHERE, b, np.nan), where=WHERE)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  for result in actual[0]:
    assert not np.asarray(result)[~WHERE].any()
  assert not np.asarray(actual[1][0])[~WHERE].any()


def test_all_rows_excluded(small_tiles):
  hidden, head, a, b = inputs()
  actual = tiled(hidden * np.nan, head, a, b, where=np.zeros((B, T), bool))
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(actual))


def test_tokens_of_excluded_rows_may_be_out_of_range(small_tiles):
  hidden, head, a, b = inputs()
  tokens = np.where(WHERE, TOKENS, -1)
  logp, _ = head_logprobs(hidden, head, tokens, where=WHERE)
  close(logp, dense64(hidden, head, a, b, where=WHERE)[0][0])


@pytest.mark.parametrize("vocab_shards", [1, 2])  # with two, the first shard is -inf altogether
def test_impossible_columns_of_the_head(vocab_shards, small_tiles):
  """Logits of -inf, as from a mask of the vocabulary, give no NaN and have no probability."""
  hidden, head = jnp.ones((1, 2, 1)), jnp.zeros((1, V)).at[0, :600].set(-jnp.inf)
  logp, entropy = head_logprobs(hidden, head, np.array([[700, 1099]]), vocab_shards=vocab_shards)
  np.testing.assert_allclose(logp, -np.log(500), rtol=1e-6)
  np.testing.assert_allclose(entropy, np.log(500), rtol=1e-6)


def test_large_logits_do_not_overflow_in_tiles(small_tiles):
  hidden, head, a, b = inputs()
  close(tiled(hidden, head * 200, a, b), dense64(hidden, head * 200, a, b))


def test_the_entropy_is_precise_for_large_logits(small_tiles):
  """Logits around 1000 have float32 noise of 6e-5, which must not add up in the entropy."""
  rng = np.random.default_rng(0)
  logits = np.round(rng.normal(1000.0, 2.0, (1, 1, V)) * 1024).astype(np.float32) / 1024
  logp, entropy = head_logprobs(jnp.ones((1, 1, 1)), jnp.asarray(logits[0]), np.array([[7]]))
  expected = softmax64(logits, [[7]])
  np.testing.assert_allclose(entropy, expected[1], rtol=2e-6)
  np.testing.assert_allclose(logp, expected[0], atol=2e-4)


def test_a_single_tile():
  hidden, head, a, b = inputs()
  assert tiles.tiles_of(B * T, V) == (1, V)
  close(tiled(hidden, head, a, b), dense64(hidden, head, a, b))


def test_tiles_hold_16_mib():
  """2^22 floats of 4 bytes, at least 512 columns, and nothing is left out."""
  assert tiles.tiles_of(1, 3 * 2**22 + 1)[0] == 4
  assert tiles.tiles_of(1, 3 * 2**22) == (3, 2**22)
  assert tiles.tiles_of(2**10, 2**14) == (4, 2**12)
  assert tiles.tiles_of(2**20, 1024) == (2, 512)
  assert tiles.tiles_of(2**20, 3) == (1, 3)


def test_both_passes_size_their_tiles_by_rows_and_columns_of_a_shard(monkeypatch):
  sizes, tiles_of = [], tiles.tiles_of
  monkeypatch.setattr(tiles, "tiles_of", lambda *size: sizes.append(size) or tiles_of(*size))

  def loss(hidden, **shards):
    return head_logprobs(hidden, jnp.ones((2, 14)), jnp.zeros(6, int), **shards)[0].sum()

  jax.grad(loss)(jnp.ones((6, 2)))
  jax.grad(loss)(jnp.ones((6, 2)), vocab_shards=2, row_shards=3)
  assert sizes == [(6, 14), (6, 14), (2, 7), (2, 7)]


def test_gradient_of_the_entropy_with_an_impossible_token():
  """Two tokens of probability 1/2 and one with a logit of -inf: at the maximum the slope is 0."""
  head = jnp.array([[0.0, 0.0, -jnp.inf]])

  def entropy(head):
    return head_logprobs(jnp.ones((1, 1)), head, jnp.array([0]))[1].sum()

  value, slope = jax.value_and_grad(entropy)(head)
  np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
  np.testing.assert_allclose(slope, jnp.zeros((1, 3)), atol=1e-7)


def test_products_of_bfloat16_accumulate_in_float32():
  """Inspects the jaxpr of both passes: on a CPU the results happen to be equal either way."""
  hidden, head = jnp.ones((3, 2), jnp.bfloat16), jnp.ones((2, 7), jnp.bfloat16)

  def loss(hidden, head):
    return head_logprobs(hidden, head, jnp.zeros(3, int))[0].sum()

  program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head))
  products = program.count("dot_general[")
  assert products == program.count("preferred_element_type=float32") == 4  # one is recomputed


@pytest.mark.parametrize("vocab", [1, 2, 511, 512, 513, 1024, 1025, 49152, 151936])
@pytest.mark.parametrize("rows", [0, 1, 64, 1024, 65536])
def test_tiles_cover_the_vocabulary(rows, vocab):
  count, width = tiles.tiles_of(rows, vocab)
  assert width >= 1
  assert 0 <= vocab - count * width < count
  assert rows * width <= max(tiles.TILE_ELEMENTS, 512 * rows)


def test_leading_axes_vmap_and_empty_batches(small_tiles):
  hidden, head, a, b = inputs()
  (logp, entropy), _ = tiled(hidden, head, a, b)
  flat = head_logprobs(hidden.reshape(-1, D), head, TOKENS.reshape(-1))
  each = jax.vmap(head_logprobs, in_axes=(0, None, 0))(hidden, head, TOKENS)
  for actual in (flat, each):
    np.testing.assert_allclose(np.reshape(actual[0], (B, T)), logp, rtol=1e-6)
    np.testing.assert_allclose(np.reshape(actual[1], (B, T)), entropy, rtol=1e-6)
  empty = head_logprobs(jnp.zeros((0, 3, D)), head, np.zeros((0, 3), int))
  assert [x.shape for x in empty] == [(0, 3), (0, 3)]


def test_8_bit_tokens(small_tiles):
  hidden, head, _, _ = inputs()
  tokens = (TOKENS % 200).astype(np.uint8)
  actual = head_logprobs(hidden, head, tokens)
  np.testing.assert_array_equal(actual[0], head_logprobs(hidden, head, tokens.astype(int))[0])


# --- errors --------------------------------------------------------------------------------------


def test_errors_of_token_logprobs():
  logits, tokens = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), int)
  with pytest.raises(ValueError, match=r"^tokens has shape \(2, 2\), expected \(2, 3\)"):
    token_logprobs(logits, tokens[:, :2])
  with pytest.raises(ValueError, match=r"^tokens must hold integer token ids, got dtype float32"):
    token_logprobs(logits, logits[..., 0])
  with pytest.raises(ValueError, match=r"^logits has shape \(4,\), expected at least two axes"):
    token_logprobs(logits[0, 0], tokens[0, 0])
  with pytest.raises(ValueError, match=r"^logits must be real, got dtype complex64"):
    token_logprobs(logits.astype(np.complex64), tokens)
  for bad in (0.0, -1, np.nan, np.inf):
    with pytest.raises(ValueError, match=r"^temperature must be a finite number above 0, got"):
      token_logprobs(logits, tokens, temperature=bad)


def test_errors_of_head_logprobs():
  hidden, head, tokens = np.zeros((2, 3, 4), np.float32), np.zeros((4, 8), np.float32), TOKENS % 8
  call = functools.partial(head_logprobs, hidden, head, tokens)
  shapes = r"^hidden has shape \(2, 3, 4\) and head \(8, 4\), expected \[..., T, D\] and \[D, V\]"
  with pytest.raises(ValueError, match=shapes):
    head_logprobs(hidden, head.T, tokens)
  with pytest.raises(ValueError, match=r"^hidden has shape \(4,\) and head"):
    head_logprobs(hidden[0, 0], head, tokens[0, 0])
  with pytest.raises(ValueError, match=r"^tokens has shape \(2, 3, 1\), expected \(2, 3\)"):
    head_logprobs(hidden, head, tokens[..., None])
  with pytest.raises(ValueError, match=r"^head must be floating point, got dtype int32"):
    head_logprobs(hidden, head.astype(np.int32), tokens)
  with pytest.raises(ValueError, match=r"^hidden must be floating point, got dtype int32"):
    head_logprobs(hidden.astype(np.int32), head, tokens)
  with pytest.raises(ValueError, match=r"^where has shape \(3, 2\), expected \(2, 3\)"):
    call(where=np.ones((3, 2), bool))
  with pytest.raises(ValueError, match=r"^where must be boolean"):
    call(where=np.ones((2, 3)))
  with pytest.raises(ValueError, match=r"^temperature must be a finite number above 0, got 0.0"):
    call(temperature=0.0)
  with pytest.raises(ValueError, match=r"^softcap must be a finite number above 0, got -1"):
    call(softcap=-1)
  for count in (0, -1, 5):
    with pytest.raises(
      ValueError, match=rf"^vocab_shards must divide the vocabulary of 8, got {count}"
    ):
      call(vocab_shards=count)
    with pytest.raises(ValueError, match=rf"^row_shards must divide the 6 rows, got {count}"):
      call(row_shards=count)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [64, 576])
def test_no_logits_are_stored(width, dtype):
  """Both passes need at most 0.4 of a float32 [B, T, V] array beside inputs and outputs.

  The program is compiled but not run. Going through the logits needs 5 such arrays, see
  benchmarks/logprobs.py.
  """
  batch, length, vocab = 2, 512, 151_936

  def scalar(hidden, embedding, tokens, a, b):
    logp, entropy = head_logprobs(hidden, embedding.T, tokens)
    return jnp.sum(a * logp) + jnp.sum(b * entropy)

  rows = jax.ShapeDtypeStruct((batch, length), jnp.float32)
  program = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1))).lower(
    jax.ShapeDtypeStruct((batch, length, width), dtype),
    jax.ShapeDtypeStruct((vocab, width), dtype),
    jax.ShapeDtypeStruct((batch, length), jnp.int32),
    rows,
    rows,
  )
  temporary = program.compile().memory_analysis().temp_size_in_bytes
  assert temporary > 0
  assert temporary <= 0.4 * batch * length * vocab * 4


def test_a_single_shard_has_no_axis():
  """XLA:CPU copies the operands of a product that has a further axis, even one of length 1."""

  def ranks(**parts):
    def loss(hidden, head):
      return head_logprobs(hidden, head, jnp.zeros((4, 2), jnp.int32), **parts)[0].sum()

    shapes = jax.ShapeDtypeStruct((4, 2, 3), jnp.float32), jax.ShapeDtypeStruct((3, 8), jnp.float32)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).as_text()
    operands = re.findall(r"dot_general.*: \((\S+), (\S+)\) ->", text)
    return {operand.count("x") for pair in operands for operand in pair}  # tensor<8x3xf32>

  # Hidden states [R, D], a tile [w, D] and its logits [R, w]; then [S, R, D] and [S, R, w] as well.
  assert ranks() == {2}
  assert ranks(row_shards=2) == {2, 3}
  assert ranks(vocab_shards=2) == {2, 3}


def test_narrow_hidden_states_meet_the_head_as_in_the_sampler():
  """The sampler's product: both factors in bfloat16, summed in float32."""
  rng = np.random.default_rng(3)
  hidden = jnp.asarray(rng.normal(size=(7, 32)), jnp.bfloat16)
  head = jnp.asarray(rng.normal(size=(32, 40)), jnp.float32)
  tokens = jnp.asarray(rng.integers(0, 40, 7))
  logits = jnp.einsum(
    "td,dv->tv", hidden, head.astype(jnp.bfloat16), preferred_element_type=jnp.float32
  )
  expected = token_logprobs(logits, tokens)
  logp, entropy = head_logprobs(hidden, head, tokens)
  np.testing.assert_allclose(logp, expected[0], atol=2e-6)
  np.testing.assert_allclose(entropy, expected[1], atol=2e-6)
  gradient = jax.grad(lambda head: head_logprobs(hidden, head, tokens)[0].sum())(head)
  assert gradient.dtype == jnp.float32
  wanted = jax.grad(
    lambda head: token_logprobs(hidden.astype(jnp.float32) @ head, tokens)[0].sum()
  )(head.astype(jnp.bfloat16).astype(jnp.float32))
  np.testing.assert_allclose(gradient, wanted, atol=0.05)
