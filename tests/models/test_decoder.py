"""Tests that a prompt shared by its group gives the same as one row per completion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.core.logprobs import head_logprobs
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import REMAT, Decoder, unstack
from tests.helpers import plain

CONFIG = ModelConfig(
  vocab_size=37, width=24, layers=3, heads=4, kv_heads=2, head_dim=6, mlp=40, rope_theta=500.0
)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]  # different lengths, padded to 6
LENGTHS = np.array([[4, 1], [3, 4], [2, 4]])  # completion lengths, padded to 4


@pytest.fixture(scope="module")
def case():
  model = Decoder(CONFIG)
  params = model.init(jax.random.key(0))
  noise = jax.random.normal(jax.random.key(1), (3, CONFIG.width)) * 0.3
  params["layers"]["attn_norm"] = 1.0 + noise  # norms of 1 would hide a missing product
  prompts, mask = np.zeros((3, 6), np.int32), np.zeros((3, 6), bool)
  for row, ids in enumerate(PROMPTS):
    prompts[row, 6 - len(ids) :], mask[row, 6 - len(ids) :] = ids, True
  completions = np.random.default_rng(0).integers(0, 37, (3, 2, 4)).astype(np.int32)
  keep = np.arange(4) < LENGTHS[..., None]
  return model, params, jnp.asarray(prompts), jnp.asarray(mask), jnp.asarray(completions), keep


def shared_logp(model, params, prompts, mask, completions):
  @jax.jit
  def logp(params):
    hidden = model.score(params, prompts, mask, completions)
    return head_logprobs(hidden, model.head(params), completions)[0]

  return logp(params)


def plain_logp(params, completions):
  """Returns log-probabilities [P, G, T] of the independent row-by-row decoder, 0 where masked."""
  rows = []
  completions = np.asarray(completions)
  for p, prompt in enumerate(PROMPTS):
    for g in range(2):
      real = completions[p, g, : LENGTHS[p, g]]
      logp = plain.completion_logprobs(CONFIG, params, prompt, real)
      rows.append(jnp.pad(logp, (0, 4 - len(real))))
  return jnp.stack(rows).reshape(3, 2, 4)


def test_score_equals_one_row_per_completion(case):
  model, params, prompts, mask, completions, keep = case
  actual = jnp.where(keep, shared_logp(model, params, prompts, mask, completions), 0.0)
  np.testing.assert_allclose(actual, plain_logp(params, completions), atol=1e-5)


def test_gradients_equal_one_row_per_completion(case):
  model, params, prompts, mask, completions, keep = case
  weights = np.random.default_rng(1).normal(size=keep.shape) * keep

  @jax.jit
  def gradients(params):
    shared = jax.grad(lambda p: (weights * shared_logp(model, p, prompts, mask, completions)).sum())
    rows = jax.grad(lambda p: (weights * plain_logp(p, completions)).sum())
    return shared(params), rows(params)

  shared, rows = gradients(params)
  by_path = dict(jax.tree_util.tree_leaves_with_path(rows))
  for path, actual in jax.tree_util.tree_leaves_with_path(shared):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(actual, by_path[path], atol=1e-5, err_msg=name)


def test_padding_of_prompts_and_completions_changes_nothing(case):
  model, params, prompts, mask, completions, _ = case
  wide = jnp.pad(prompts, ((0, 0), (3, 0)), constant_values=7)
  wide_mask = jnp.pad(mask, ((0, 0), (3, 0)))
  longer = jnp.pad(completions, ((0, 0), (0, 0), (0, 2)), constant_values=11)
  narrow = shared_logp(model, params, prompts, mask, completions)
  padded = shared_logp(model, params, wide, wide_mask, longer)[..., :4]
  np.testing.assert_allclose(padded, narrow, atol=1e-5)


def test_prefill_and_decode_equal_score(case):
  model, params, prompts, mask, completions, _ = case
  expected = jax.jit(model.score)(params, prompts, mask, completions)
  prefill, decode = jax.jit(model.prefill), jax.jit(model.decode)
  for layout in (params, unstack(params)):
    hidden, prefix = prefill(layout, prompts, mask)
    np.testing.assert_allclose(hidden, expected[:, 0, 0], atol=1e-5)
    cache = model.empty_cache(layout, 3, 2, 3)
    for t in range(3):
      hidden, cache = decode(layout, completions[..., t], jnp.int32(t), prefix, mask, cache)
      np.testing.assert_allclose(hidden, expected[:, :, t + 1], atol=1e-5)


def test_layout_changes_nothing(case):
  """Not a bit when run operation by operation; compiled programs fuse and round differently."""
  model, params, prompts, mask, completions, _ = case

  def both(score):
    yield score(params, prompts, mask, completions)
    yield score(unstack(params), prompts, mask, completions)

  np.testing.assert_allclose(*both(jax.jit(model.score)), atol=1e-6)
  with jax.disable_jit():
    np.testing.assert_array_equal(*both(model.score))


def test_remat_changes_the_residuals_and_no_gradient(case):
  """The more a policy recomputes, the fewer elements it saves for the backward pass."""
  _, params, *data, keep = case
  saved, gradients = {}, {}
  for policy in REMAT:
    model = Decoder(CONFIG, remat=policy)

    def loss(p, model=model):
      return jnp.sum(jnp.sin(shared_logp(model, p, *data)) * keep)

    _, back = jax.vjp(loss, params)
    saved[policy] = sum(leaf.size for leaf in jax.tree.leaves(back))
    (gradients[policy],) = back(jnp.float32(1.0))
  assert saved["layers"] < saved["dots"] < saved["none"]
  for policy in ("dots", "layers"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients[policy], gradients["none"]
    )
  # The difference: outputs of all products except `down`, which is in the input of the next layer.
  c, rows = CONFIG, 3 * (6 + 2 * 3)
  outputs = c.heads * c.head_dim + 2 * c.kv_heads * c.head_dim + c.width + 2 * c.mlp
  assert saved["dots"] - saved["layers"] == c.layers * rows * outputs


def test_an_unknown_remat_is_refused(case):
  _, params, *data, _ = case
  with pytest.raises(ValueError, match="unknown remat 'dot'; known: dots, layers, none"):
    Decoder(CONFIG, remat="dot").score(params, *data)


def test_untied_head_is_used(case):
  _, params, *_ = case
  untied = ModelConfig(**(vars(CONFIG) | {"tied": False}))
  head = jnp.ones((37, 24))
  assert (Decoder(untied).head(params | {"head": head}) == 1.0).all()
  assert Decoder(untied).init(jax.random.key(0))["head"].shape == (37, 24)


def rows_through(jaxpr, contraction: int, out: int) -> int:
  """Counts the rows multiplied with weights [contraction, out], over all matmuls of a jaxpr."""
  total = 0
  for eqn in jaxpr.eqns:
    inner = [
      sub for v in eqn.params.values() for sub in (v if isinstance(v, tuple | list) else (v,))
    ]
    for sub in inner:
      if hasattr(sub, "jaxpr") or hasattr(sub, "eqns"):
        total += rows_through(getattr(sub, "jaxpr", sub), contraction, out)
    if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.shape == (contraction, out):
      total += eqn.invars[0].aval.size // contraction
  return total


def test_a_prompt_passes_through_the_model_once(case):
  """Counts the rows multiplied with the weights of the MLP in the jaxpr, per layer."""
  model, params, prompts, mask, completions, _ = case
  c = CONFIG

  def mlp_rows(function, *args):
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return rows_through(jaxpr, c.mlp, c.width)

  # P=3 prompts of N=6 slots, G=2 completions of T=4; the scan's body is traced once.
  assert mlp_rows(model.score, params, prompts, mask, completions) == 3 * (6 + 2 * (4 - 1))
  assert mlp_rows(model.prefill, params, prompts, mask) == 3 * 6
  _, prefix = model.prefill(params, prompts, mask)
  for keys in jax.tree.leaves(prefix):
    assert keys.shape == (3, 3, 2, 6, 6)  # [L, P, K, N, Dh]: not repeated over the group
  cache = model.empty_cache(params, 3, 2, 3)

  def step(p):
    return model.decode(p, completions[..., 0], jnp.int32(0), prefix, mask, cache)

  assert mlp_rows(step, params) == 3 * 2


@pytest.mark.parametrize("name", ["stacked", "unstacked", "window"])
def test_extending_by_many_tokens_equals_score(name, case):
  """Feeds completions in pieces of various lengths, with padding that nothing sees."""
  model, params, prompts, mask, completions, _ = case
  if name == "window":
    model = Decoder(
      ModelConfig(**vars(CONFIG) | {"window": 3, "local_layers": (True, False, True)})
    )
  expected = np.asarray(jax.jit(model.score)(params, prompts, mask, completions))
  layout = params if name == "stacked" else unstack(params)
  _, prefix = jax.jit(model.prefill)(layout, prompts, mask)
  extend = jax.jit(model.extend)
  # A token of every second completion, another one and two of the others, then one of each.
  pieces = [
    [[[0, -1], [-1, -1]]] * 3,
    [[[1, -1], [0, 1]]] * 3,
    [[[2, -1], [2, -1]]] * 3,
  ]
  cache, index = model.empty_cache(layout, 3, 2, 6), np.zeros((3, 2), int)
  for piece in pieces:
    numbers = np.array(piece)  # of each new token; -1: padding
    tokens = np.take_along_axis(np.asarray(completions), np.maximum(numbers, 0), 2)
    tokens = np.where(numbers < 0, 36, tokens)
    hidden, cache = extend(layout, tokens, jnp.asarray(index), prefix, mask, cache)
    index += (numbers >= 0).sum(-1)
    for p, g, m in np.argwhere(numbers >= 0):
      target = expected[p, g, numbers[p, g, m] + 1]
      np.testing.assert_allclose(hidden[p, g, m], target, atol=1e-5)
