"""Log-probabilities: by hand, against float64, in tiles, and how much memory they ask for."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import head_logprobs, token_logprobs
from grpo_jax.core import logprobs

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

B, T, D, V = 2, 3, 5, 1100  # the vocabulary is two tiles of 512 and a rest, see `small_tiles`
TOKENS = np.array([[0, 511, 512], [1023, 1024, 1099]])


def softmax64(logits, tokens, temperature=1.0):
  """(logp, entropy) in float64, written down from their definitions."""
  logps = log_softmax64(np.asarray(logits, np.float64) / temperature)
  chosen = np.take_along_axis(logps, np.asarray(tokens)[..., None], -1)[..., 0]
  return chosen, -np.sum(np.exp(logps) * np.where(np.isneginf(logps), 0.0, logps), -1)


def log_softmax64(z):
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


# --- from logits ---------------------------------------------------------------------------------


def test_token_logprobs_by_hand():
  # softmax of log 1, log 2, log 5 is 1/8, 2/8, 5/8
  logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [5.0, 2.0, 1.0]])) + 3.0
  logp, entropy = token_logprobs(logits, jnp.array([1, 0]))
  np.testing.assert_allclose(logp, np.log([2 / 8, 5 / 8]), rtol=1e-6)
  wanted = 1 / 8 * np.log(8) + 2 / 8 * np.log(4) + 5 / 8 * np.log(8 / 5)
  np.testing.assert_allclose(entropy, [wanted, wanted], rtol=1e-6)


def test_temperature_divides_the_logits():
  # at temperature 1/2: 1, 4, 25 over 30; at 2: 1, sqrt 2, sqrt 5
  logits = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
  logp, _ = token_logprobs(logits, jnp.array([2]), temperature=0.5)
  np.testing.assert_allclose(logp, np.log([25 / 30]), rtol=1e-6)
  logp, _ = token_logprobs(logits, jnp.array([2]), temperature=2.0)
  np.testing.assert_allclose(logp, [np.log(5**0.5 / (1 + 2**0.5 + 5**0.5))], rtol=1e-6)


def test_the_gradients_of_token_logprobs_by_hand():
  # d logp / dz = onehot - p;  d entropy / dz = -p (log p + entropy);  both / temperature
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


def test_tokens_out_of_range_are_nan_not_another_token():
  logits = jnp.zeros((4, 3))
  logp, entropy = token_logprobs(logits, jnp.array([-1, 3, 2, -4]))
  assert np.isnan(np.asarray(logp)).tolist() == [True, True, False, True]
  np.testing.assert_allclose(entropy, np.log(3), rtol=1e-6)
  hidden, head = jnp.zeros((4, 2)), jnp.zeros((2, 3))
  logp, entropy = head_logprobs(hidden, head, jnp.array([-1, 3, 2, -4]))
  assert np.isnan(np.asarray(logp)).tolist() == [True, True, False, True]
  np.testing.assert_allclose(entropy, np.log(3), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_logits_are_widened(dtype):
  logits = jnp.array(np.random.default_rng(0).normal(size=(2, 3, 7)), dtype)
  tokens = np.array([[0, 3, 6], [1, 1, 2]])
  got = jax.jit(token_logprobs)(logits, tokens)
  for one, wanted in zip(got, softmax64(logits.astype(jnp.float32), tokens), strict=True):
    assert one.dtype == jnp.float32
    np.testing.assert_allclose(one, wanted, rtol=1e-5)


def test_token_logprobs_in_float64_and_vmap(x64):
  logits = np.random.default_rng(0).normal(size=(2, 3, 7))
  tokens = np.array([[0, 3, 6], [1, 1, 2]])
  for one, wanted in zip(
    jax.vmap(token_logprobs)(logits, tokens), softmax64(logits, tokens), strict=True
  ):
    assert one.dtype == jnp.float64
    np.testing.assert_allclose(one, wanted, rtol=1e-12)


# --- from hidden states --------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch):
  """Tiles of 512 columns, the smallest there are."""
  monkeypatch.setattr(logprobs, "TILE_ELEMENTS", 1)


def inputs(dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  head = rng.normal(size=(D, V)).astype(np.float32)
  a, b = rng.normal(size=(2, B, T)).astype(np.float32)
  return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), a, b


def tiled(hidden, head, a, b, **settings):
  """(results, gradients) of `sum(a logp + b entropy)` by `head_logprobs`."""

  def scalar(hidden, head):
    logp, entropy = head_logprobs(hidden, head, TOKENS, **settings)
    return jnp.sum(a * logp) + jnp.sum(b * entropy), (logp, entropy)

  gradients, results = jax.jit(jax.grad(scalar, (0, 1), has_aux=True))(hidden, head)
  return results, gradients


def dense64(hidden, head, a, b, temperature=1.0, softcap=None, where=None):
  """The same in NumPy and float64, gradients by hand through the whole [B, T, V]."""
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


def close(got, wanted, tolerance=1e-5):
  """Within `tolerance`, relative to the largest value of each array."""
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    atol = tolerance * max(np.abs(other).max(), 1.0)
    np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=atol)


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
def test_tiles_agree_with_float64_and_with_the_logits(settings, small_tiles, monkeypatch):
  # three tiles and a rest of two columns, of each of four vocab_shards as well; of two, a rest of one
  vocab_shards = settings.get("vocab_shards", 1)
  monkeypatch.setattr(logprobs, "LEAST_COLUMNS", 512 // vocab_shards)
  assert logprobs._tiles(B * T, V // vocab_shards) == (3, {1: 366, 2: 183, 4: 91}[vocab_shards])
  hidden, head, a, b = inputs()
  got = tiled(hidden, head, a, b, **settings)
  wanted = {name: settings[name] for name in settings.keys() - {"vocab_shards", "row_shards"}}
  close(got, dense64(hidden, head, a, b, **wanted))
  if "where" not in settings:
    logits = hidden @ head
    if "softcap" in settings:
      logits = settings["softcap"] * jnp.tanh(logits / settings["softcap"])
    plain = token_logprobs(logits, TOKENS, temperature=settings.get("temperature", 1.0))
    close(got[0], jax.tree.map(np.asarray, plain))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs_accumulate_in_float32(dtype, small_tiles):
  hidden, head, a, b = inputs(dtype)
  (logp, entropy), (d_hidden, d_head) = tiled(hidden, head, a, b)
  wide = [np.asarray(x.astype(jnp.float32)) for x in (hidden, head)]
  results, gradients = dense64(*wide, a, b)
  assert logp.dtype == entropy.dtype == jnp.float32
  close((logp, entropy), results)  # no worse than from float32 inputs of the same values
  assert d_hidden.dtype == d_head.dtype == dtype
  close((d_hidden, d_head), gradients, 0.01)  # rounded to the dtype of the inputs


def test_mixed_dtypes_and_float64(small_tiles, x64):
  hidden, head, a, b = inputs(np.float64)
  got = tiled(hidden, head, a, b, temperature=0.7)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float64")}
  close(got, dense64(hidden, head, a, b, temperature=0.7), 1e-12)
  _, (d_hidden, d_head) = tiled(hidden.astype(jnp.bfloat16), head.astype(jnp.float32), a, b)
  assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)


def test_rows_that_are_not_wanted_may_hold_anything(small_tiles):
  hidden, head, a, b = inputs()
  wanted = tiled(hidden, head, a, b, where=WHERE)
  poison = np.zeros((B, T, 1), np.float32)
  poison[~WHERE] = np.array([[np.nan], [np.inf], [-np.inf]])
  poisoned = jnp.where(WHERE[..., None], hidden, poison)
  got = tiled(poisoned, head, np.where(WHERE, a, 7.0), np.where(WHERE, b, np.nan), where=WHERE)
  jax.tree.map(np.testing.assert_array_equal, got, wanted)
  for result in got[0]:
    assert not np.asarray(result)[~WHERE].any()
  assert not np.asarray(got[1][0])[~WHERE].any()


def test_no_wanted_row_at_all(small_tiles):
  hidden, head, a, b = inputs()
  got = tiled(hidden * np.nan, head, a, b, where=np.zeros((B, T), bool))
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(got))


def test_tokens_of_rows_that_are_not_wanted_may_be_out_of_range(small_tiles):
  hidden, head, a, b = inputs()
  tokens = np.where(WHERE, TOKENS, -1)
  logp, _ = head_logprobs(hidden, head, tokens, where=WHERE)
  close(logp, dense64(hidden, head, a, b, where=WHERE)[0][0])


@pytest.mark.parametrize("vocab_shards", [1, 2])  # of two, the first is impossible altogether
def test_a_column_of_the_head_that_is_impossible(vocab_shards, small_tiles):
  """Logits of -inf, as a mask on the vocabulary gives them, cost neither NaN nor probability."""
  hidden, head = jnp.ones((1, 2, 1)), jnp.zeros((1, V)).at[0, :600].set(-jnp.inf)
  logp, entropy = head_logprobs(hidden, head, np.array([[700, 1099]]), vocab_shards=vocab_shards)
  np.testing.assert_allclose(logp, -np.log(500), rtol=1e-6)
  np.testing.assert_allclose(entropy, np.log(500), rtol=1e-6)


def test_large_logits_do_not_overflow_in_tiles(small_tiles):
  hidden, head, a, b = inputs()
  close(tiled(hidden, head * 200, a, b), dense64(hidden, head * 200, a, b))


def test_the_entropy_does_not_suffer_from_the_size_of_the_logits(small_tiles):
  """Logits around 1000 carry float32 noise of 6e-5, which must not be summed into the entropy."""
  rng = np.random.default_rng(0)
  logits = np.round(rng.normal(1000.0, 2.0, (1, 1, V)) * 1024).astype(np.float32) / 1024
  logp, entropy = head_logprobs(jnp.ones((1, 1, 1)), jnp.asarray(logits[0]), np.array([[7]]))
  wanted = softmax64(logits, [[7]])
  np.testing.assert_allclose(entropy, wanted[1], rtol=2e-6)
  np.testing.assert_allclose(logp, wanted[0], atol=2e-4)


def test_one_tile_and_many_give_the_same():
  hidden, head, a, b = inputs()
  assert logprobs._tiles(B * T, V) == (1, V)
  close(tiled(hidden, head, a, b), dense64(hidden, head, a, b))


@pytest.mark.parametrize("vocab", [1, 2, 511, 512, 513, 1024, 1025, 49152, 151936])
@pytest.mark.parametrize("rows", [0, 1, 64, 1024, 65536])
def test_tiles_cover_the_vocabulary(rows, vocab):
  count, width = logprobs._tiles(rows, vocab)
  assert width >= 1
  assert 0 <= vocab - count * width < count
  assert rows * width <= max(logprobs.TILE_ELEMENTS, 512 * rows)


def test_leading_axes_vmap_and_empty_batches(small_tiles):
  hidden, head, a, b = inputs()
  (logp, entropy), _ = tiled(hidden, head, a, b)
  flat = head_logprobs(hidden.reshape(-1, D), head, TOKENS.reshape(-1))
  each = jax.vmap(head_logprobs, in_axes=(0, None, 0))(hidden, head, TOKENS)
  for got in (flat, each):
    np.testing.assert_allclose(np.reshape(got[0], (B, T)), logp, rtol=1e-6)
    np.testing.assert_allclose(np.reshape(got[1], (B, T)), entropy, rtol=1e-6)
  empty = head_logprobs(jnp.zeros((0, 3, D)), head, np.zeros((0, 3), int))
  assert [x.shape for x in empty] == [(0, 3), (0, 3)]


def test_gradients_of_narrow_tokens(small_tiles):
  hidden, head, _, _ = inputs()
  tokens = (TOKENS % 200).astype(np.uint8)
  got = head_logprobs(hidden, head, tokens)
  np.testing.assert_array_equal(got[0], head_logprobs(hidden, head, tokens.astype(int))[0])


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
def test_no_logits_are_kept(width, dtype):
  """Forward + backward need at most 0.4 of one float32 [B, T, V] array beside inputs and outputs.

  Only compiled, never run. The way through the logits needs 5, see benchmarks/logprobs.py.
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


def test_one_share_and_one_block_are_no_axes():
  """Products of matrices: with one more axis, of length 1, the CPU backend copies its operands."""

  def ranks(**parts):
    def loss(hidden, head):
      return head_logprobs(hidden, head, jnp.zeros((4, 2), jnp.int32), **parts)[0].sum()

    shapes = jax.ShapeDtypeStruct((4, 2, 3), jnp.float32), jax.ShapeDtypeStruct((3, 8), jnp.float32)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).as_text()
    found = re.findall(r"dot_general.*: \((\S+), (\S+)\) ->", text)
    return {operand.count("x") for pair in found for operand in pair}  # tensor<8x3xf32>

  # Hidden states [R, D], a tile [w, D] and its logits [R, w]; then [S, R, D] and [S, R, w] as well.
  assert ranks() == {2}
  assert ranks(row_shards=2) == {2, 3}
  assert ranks(vocab_shards=2) == {2, 3}
