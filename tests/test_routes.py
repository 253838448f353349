"""Tests that the update uses the experts that were chosen while sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import config as configs
from grpo_jax import misfits
from grpo_jax.build import optimizer_of
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.core.logprobs import head_logprobs
from grpo_jax.learning.batch import select, trim
from grpo_jax.learning.step import TrainState, make_train_step, score_batch
from grpo_jax.learning.updates import without_routes
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.rollout import RolloutConfig, collect, make_batch, score
from grpo_jax.sampling.generate import generate, row_keys
from grpo_jax.sampling.sampler import Sampler
from grpo_jax.tasks import Example, score_with
from grpo_jax.tokens import ByteTokenizer
from tests.helpers.dense_experts import dense

CONFIG = ModelConfig(
  vocab_size=257, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=12, tied=False,
  experts=6, experts_per_token=2, router_normalized=True, names="qwen_moe",
)  # fmt: skip
MODEL = Decoder(CONFIG, record_routes=True)


@pytest.fixture(scope="module")
def params():
  params = MODEL.init(jax.random.key(0))
  # Sharper choices, and outputs that differ more between experts, than at the first step.
  params["layers"]["router"] *= 4
  params["layers"]["experts_down"] *= 3
  return params


def routed(params, data, routes=None):
  """Returns hidden states and the routing of whole rows, from the layers themselves."""
  hidden = MODEL.score(params, *data, routes=routes)
  return head_logprobs(hidden, MODEL.head(params), data[2])[0]


def sampled(params, length=40, compactions=2, layout=unstack, group=4, enders=16):
  """Samples completions that end at different lengths, with compactions of the rows."""
  prompts = jnp.array([[0, 5, 6, 7], [1, 2, 3, 4]])
  mask = prompts > 0
  table = np.zeros((2, 257), np.int32)
  table[0, :enders] = 1  # of 257 tokens, these end a completion
  table[1] = 1
  keys = row_keys(jax.random.key(2), jnp.arange(2), group)
  table = jnp.asarray(table)
  out = jax.jit(
    lambda params: generate(
      MODEL, params, prompts, mask, keys, table,
      length=length, temperature=1.0, pad_id=256, max_compactions=compactions,
    )
  )(layout(params))  # fmt: skip
  return prompts, mask, out


@pytest.mark.parametrize(
  "layout",
  [unstack, pytest.param(lambda params: params, marks=pytest.mark.slow)],
  ids=["unstacked", "stacked"],
)
def test_recorded_routes_are_those_of_the_update_through_compactions(params, layout):
  prompts, mask, out = sampled(params, layout=layout)
  lengths = np.asarray(out.mask.sum(-1))
  assert lengths.min() < 20 < lengths.max()  # so rows were compacted
  assert out.routes.shape == (2, 4, 40, 4)
  assert out.routes.dtype == jnp.uint8
  assert out.prompt_routes.shape == (2, 4, 4)
  # The independent way: choose in the pass over whole rows.
  seen = []

  def spy(routing, count):
    jax.debug.callback(
      lambda chosen: seen.append(np.asarray(chosen)), routing.experts, ordered=True
    )
    return dense(routing, count)

  jax.jit(dataclasses.replace(MODEL, form=spy).score)(unstack(params), prompts, mask, out.tokens)
  jax.effects_barrier()
  rows = np.stack(seen, -2).reshape(2, 4 + 4 * 39, 4)  # [P, N + G (T - 1), L k]
  for p in range(2):
    real = np.asarray(mask[p])
    np.testing.assert_array_equal(out.prompt_routes[p][real], rows[p, :4][real])
    for g in range(4):
      inputs = lengths[p, g] - 1  # the last token is never read
      expected = rows[p, 4 + g * 39 :][:inputs]
      np.testing.assert_array_equal(out.routes[p, g, :inputs], expected)


def test_replayed_routes_change_nothing_where_they_are_the_same(params):
  prompts, mask, out = sampled(params)
  data = (prompts, mask, out.tokens)
  fresh = jax.jit(routed)(params, data)
  replayed = jax.jit(routed)(params, data, (out.prompt_routes, out.routes))
  for logp in (fresh, replayed):
    np.testing.assert_allclose(
      np.where(out.mask, logp, 0), np.where(out.mask, out.logp, 0), atol=2e-5
    )
  gradients = [
    jax.jit(jax.grad(lambda p: (routed(p, data, routes) * out.mask).sum()))(params)  # noqa: B023
    for routes in (None, (out.prompt_routes, out.routes))
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *gradients)
  assert np.abs(gradients[1]["layers"]["router"]).max() > 1e-3  # it learns, through the weights


def test_replay_keeps_the_experts_that_another_rounding_would_change(params):
  """A router that rounds chooses other experts near ties; replayed, only rounding is left."""
  router = params["layers"]["router"].astype(jnp.bfloat16).astype(jnp.float32)
  rounded = params | {"layers": params["layers"] | {"router": router}}
  prompts, mask, out = sampled(rounded, length=64, group=16, enders=1)
  data = (prompts, mask, out.tokens)
  errors = {}
  for name, routes in (("fresh", None), ("replayed", (out.prompt_routes, out.routes))):
    logp = jax.jit(routed)(params, data, routes)
    errors[name] = np.abs(np.asarray(logp - out.logp))[np.asarray(out.mask)]
  assert errors["replayed"].max() < 0.2 * errors["fresh"].max()


# --- the pipeline ---------------------------------------------------------------------------------


def reward(prompts, completions, **columns):
  return [float(sum(map(ord, text)) % 97) for text in completions]


def test_a_rollout_carries_routes_to_the_update(params):
  sampler = Sampler(MODEL, ByteTokenizer(), 8, 12)
  examples = [Example(text, {}, text) for text in ("ab", "abcdef", "x")]
  config = RolloutConfig(group_size=2, replay_routes=True)
  rollout = collect(sampler, params, examples, score_with(reward), jax.random.key(1), config)
  batch = rollout.batch
  assert 1 <= rollout.metrics["router/max_load"] <= 3  # one of six experts, of two a token
  assert 0 <= rollout.metrics["router/unused"] < 1
  n, t = batch.prompts.shape[1], batch.completions.shape[2]
  assert batch.routes.shape == (3, 2, t, 4)
  assert batch.prompt_routes.shape == (3, n, 4)
  again = jax.jit(lambda p, b: score_batch(MODEL, p, b)[0])(params, batch)
  np.testing.assert_allclose(again, batch.sampler_logp, atol=2e-5)
  # Other routes are other numbers: the batch's are used.
  wrong = dataclasses.replace(batch, routes=(batch.routes + 1) % 6)
  other = jax.jit(lambda p, b: score_batch(MODEL, p, b)[0])(params, wrong)
  assert np.abs(other - again).max() > 0.01
  optimizer = optax.sgd(0.1)
  step = make_train_step(MODEL, ALGORITHMS["dapo"], optimizer, lambda count: 0.1)
  state, metrics = step(TrainState.create(params, optimizer), batch)
  assert np.isfinite(metrics["loss"])
  assert int(state.step) == 1
  assert without_routes(batch).routes is None


def test_batches_are_cut_with_their_routes(params):
  sampler = Sampler(MODEL, ByteTokenizer(), 64, 64)
  examples = [Example("a" * n, {}, str(n)) for n in (3, 40)]
  config = RolloutConfig(group_size=2, replay_routes=True)
  out = sampler(params, [e.prompt for e in examples], jax.random.key(1), group=2)
  batch, _ = make_batch(score(score_with(reward), examples, out), sampler, config)
  first = select(batch, np.array([0]), 1)
  short, _ = trim(first, np.array([3]), np.array([[5, 9]]))
  n, t = short.prompts.shape[1], short.completions.shape[2]
  assert (n, t) < (40, 64)
  np.testing.assert_array_equal(short.routes, batch.routes[:1, :, :t])
  np.testing.assert_array_equal(short.prompt_routes, batch.prompt_routes[:1, -n:])


def test_a_frozen_router_stays_bit_for_bit_as_it_is(params):
  c = configs.default_config()
  c.optimizer.weight_decay, c.train.freeze_router = 0.1, True
  _, optimizer = optimizer_of(c, 0.1)
  gradients = jax.tree.map(jnp.ones_like, params)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    assert np.any(update) == ("router" not in jax.tree_util.keystr(path))


# --- bad input ------------------------------------------------------------------------------------


def test_a_replay_without_recorded_routes_is_an_error_before_compiling(params):
  sampler = Sampler(Decoder(CONFIG), ByteTokenizer(), 8, 4)
  config = RolloutConfig(group_size=2, replay_routes=True)
  out = sampler(params, ["ab"], jax.random.key(1), group=2)
  scored = score(score_with(reward), [Example("ab", {}, "ab")], out)
  with pytest.raises(ValueError, match=r"no recorded routes: sample with Decoder\(record_routes"):
    make_batch(scored, sampler, config)


def test_routes_of_another_model_are_refused(params):
  data = np.ones((1, 3), np.int32), np.ones((1, 3), bool), np.ones((1, 2, 4), np.int32)
  routes = np.zeros((1, 3, 6), np.uint8), np.zeros((1, 2, 4, 6), np.uint8)
  with pytest.raises(ValueError, match="routes have 6 experts a token, and the model chooses 2 in"):
    MODEL.score(params, *data, routes=routes)


def test_a_config_says_whether_routes_are_replayed():
  c = configs.default_config()
  assert misfits.replays_routes(c, CONFIG)
  assert not misfits.replays_routes(c, dataclasses.replace(CONFIG, experts=0))
  c.train.routes = "fresh"
  assert not misfits.replays_routes(c, CONFIG)
  c.train.routes = "old"
  assert "train.routes is 'old', it must be 'sampled' or 'fresh'" in configs.check(c, 1)
