"""Tests a critic: what its values see, how it learns, and that the policy gets its advantages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import export, gae, policy_loss, value_loss
from grpo_jax.core.algorithms import ALGORITHMS, Algorithm
from grpo_jax.learning.batch import mini_batches
from grpo_jax.learning.critic import (
  CRITIC_METRICS,
  VALUE_METRICS,
  Critic,
  assess,
  make_critic_step,
  make_values,
  named,
  token_values,
)
from grpo_jax.learning.step import (
  TrainState,
  ValueHead,
  make_score,
  make_train_step,
  score_batch,
)
from grpo_jax.learning.updates import Learner, UpdateConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.load import load
from tests.helpers.learning import CONFIG, MODEL, assert_trees_close, bits, make_batch
from tests.helpers.runs import train_on

RATE = 1e-2
OPTIMIZER = optax.sgd(RATE)
TRUNK = Decoder(dataclasses.replace(CONFIG, labels=1))
CRITIC = Critic(TRUNK, OPTIMIZER)


@pytest.fixture(scope="module")
def values_params():
  return TRUNK.init(jax.random.key(1))


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def batch():
  """Returns a batch whose completions have a reward at their last token."""
  plain = make_batch(average="token", temperature=0.7)
  last = np.asarray(plain.mask).sum(-1) - 1
  at_end = np.arange(5) == last[..., None]
  rewards = np.where(at_end, np.random.default_rng(3).normal(size=(4, 3, 1)), 0.0)
  return dataclasses.replace(
    plain,
    advantages=jnp.full(plain.mask.shape, jnp.nan),
    token_rewards=jnp.asarray(rewards, jnp.float32),
  )


def state_of(params, values_params):
  critic = TrainState.create(values_params, OPTIMIZER)
  return TrainState.create(params, OPTIMIZER, critic=critic)


def learner(config=None, algorithm="ppo", critic=CRITIC, **options):
  return Learner(
    MODEL, algorithm, OPTIMIZER, None, config or UpdateConfig(), critic=critic, **options
  )


# --- values --------------------------------------------------------------------------------------


def test_a_value_is_the_head_on_the_state_before_its_token(values_params):
  """By the plain forward over the prompt and the tokens before, for each slot alone."""
  b = batch()
  actual = token_values(TRUNK, values_params, b)
  for p, g, t in [(0, 0, 0), (0, 0, 3), (1, 2, 0), (3, 1, 1)]:
    if not b.mask[p, g, t]:
      continue
    prompt = np.asarray(b.prompts[p])[np.asarray(b.prompt_mask[p])]
    row = np.concatenate([prompt, np.asarray(b.completions[p, g, :t])])[None]
    hidden, _ = TRUNK.prefill(values_params, jnp.asarray(row), jnp.ones(row.shape, bool))
    expected = (hidden[0] * values_params["score"][0]).sum()
    assert float(actual[p, g, t]) == pytest.approx(float(expected), abs=1e-5)
  assert not actual[~b.mask].any()
  assert np.abs(actual[b.mask]).min() > 0


def test_values_in_micro_batches(values_params):
  whole = make_values(TRUNK)(values_params, batch())
  parts = make_values(TRUNK, micro_batches=2)(values_params, batch())
  np.testing.assert_allclose(parts, whole, atol=1e-6)


# --- advantages ----------------------------------------------------------------------------------


def test_assess_by_the_functions_of_the_core(values_params):
  b = dataclasses.replace(batch(), values=token_values(TRUNK, values_params, batch()))
  row = Algorithm(advantage="gae", gamma=0.9, lam=0.5)
  found, metrics = assess(b, row)
  advantages, returns = gae(b.token_rewards, b.values, b.mask, gamma=0.9, lam=0.5)
  np.testing.assert_allclose(found.advantages, advantages, atol=1e-6)
  np.testing.assert_allclose(found.returns, returns, atol=1e-6)
  r, v = np.asarray(returns)[b.mask], np.asarray(b.values)[b.mask]
  expected = {
    "critic/explained_variance": 1 - (r - v).var() / r.var(), "critic/returns_mean": r.mean()
  }  # fmt: skip
  assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected, rel=1e-4)
  white, _ = assess(b, ALGORITHMS["ppo"])
  own = np.asarray(gae(b.token_rewards, b.values, b.mask)[0])[b.mask]
  np.testing.assert_allclose(
    np.asarray(white.advantages)[b.mask], (own - own.mean()) / own.std(ddof=1), atol=1e-4
  )


def test_the_kl_in_the_reward_is_whitened_with_it():
  """REINFORCE++: sums of `r - beta (logp - ref_logp)` from each token on, over the whole batch."""
  b, rng = batch(), np.random.default_rng(5)
  old, ref = rng.normal(size=(2, *b.mask.shape)).astype(np.float32)
  row = dataclasses.replace(ALGORITHMS["reinforce_pp_kl"], beta=0.3)
  found, metrics = assess(dataclasses.replace(b, old_logp=old, ref_logp=ref), row)
  rewards = np.where(b.mask, np.asarray(b.token_rewards) - 0.3 * (old - ref), 0.0)
  returns = np.cumsum(rewards[..., ::-1], -1)[..., ::-1]
  own = returns[b.mask]
  expected = np.where(b.mask, (returns - own.mean()) / own.std(ddof=1), 0.0)
  np.testing.assert_allclose(found.advantages, expected, atol=1e-5)
  assert metrics == {}
  assert found.returns is None


def test_equal_returns_explain_nothing():
  b = dataclasses.replace(batch(), values=jnp.zeros((4, 3, 5)), token_rewards=jnp.zeros((4, 3, 5)))
  _, metrics = assess(b, ALGORITHMS["ppo"])
  assert float(metrics["critic/explained_variance"]) == 0.0


# --- updates -------------------------------------------------------------------------------------


def test_the_critic_follows_the_gradient_of_its_loss(values_params):
  b = dataclasses.replace(batch(), values=token_values(TRUNK, values_params, batch()))
  b, _ = assess(b, ALGORITHMS["ppo"])

  def loss(params):
    return value_loss(token_values(TRUNK, params, b), b.returns, b.mask, weights=b.weights)[0]

  expected = jax.tree.map(lambda p, g: p - RATE * g, values_params, jax.grad(loss)(values_params))
  for count in (1, 2):
    state = TrainState.create(values_params, OPTIMIZER)
    state, metrics = make_critic_step(CRITIC, micro_batches=count)(state, b)
    assert_trees_close(state.params, expected, 1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(loss(values_params)), rel=1e-5)


def test_a_clip_holds_values_near_those_before_the_updates(values_params):
  b = dataclasses.replace(batch(), values=token_values(TRUNK, values_params, batch()))
  b, _ = assess(b, ALGORITHMS["ppo"])
  far = dataclasses.replace(b, values=b.values + 10.0)
  clipped = make_critic_step(dataclasses.replace(CRITIC, clip=0.1))
  _, metrics = clipped(TrainState.create(values_params, OPTIMIZER), far)
  assert float(metrics["critic/clip_ratio"]) > 0.9
  _, metrics = clipped(TrainState.create(values_params, OPTIMIZER), b)
  assert float(metrics["critic/clip_ratio"]) == 0.0


def test_a_rollout_updates_both_from_the_values_before(params, values_params):
  """Written out: values, advantages, then an update of the critic and one of the policy."""
  b = dataclasses.replace(batch(), values=token_values(TRUNK, values_params, batch()))
  b, _ = assess(b, ALGORITHMS["ppo"])
  critic, _ = make_critic_step(CRITIC)(TrainState.create(values_params, OPTIMIZER), b)
  policy, _ = make_train_step(MODEL, "ppo", OPTIMIZER)(TrainState.create(params, OPTIMIZER), b)
  state, metrics = learner()(state_of(params, values_params), batch(), 0)
  assert_trees_close(state.params, policy.params, 1e-6)
  assert_trees_close(state.critic.params, critic.params, 1e-6)
  assert {"loss", "critic/loss", "critic/explained_variance", "critic/skipped"} <= set(metrics)
  assert bits(state.params) != bits(params)


@pytest.mark.slow
def test_several_updates_use_the_returns_of_the_first(params, values_params):
  """Written out: values, advantages and old log-probs once, then the updates in their order."""
  config = UpdateConfig(epochs=2, mini_batches=2)
  state, metrics = learner(config)(state_of(params, values_params), batch(), 0)
  assert int(state.step) == int(state.critic.step) == 4
  assert np.isfinite(float(metrics["loss"]))
  b = dataclasses.replace(batch(), values=token_values(TRUNK, values_params, batch()))
  b, _ = assess(b, ALGORITHMS["ppo"])
  b = dataclasses.replace(b, old_logp=make_score(MODEL)(params, b))
  expected = state_of(params, values_params)
  critic, policy = expected.critic, dataclasses.replace(expected, critic=None)
  step, critic_step = make_train_step(MODEL, "ppo", OPTIMIZER), make_critic_step(CRITIC)
  for part in mini_batches(b, 2, 2, (0, 0)):
    critic, _ = critic_step(critic, part)
    policy, _ = step(policy, part)
  assert_trees_close(state.params, policy.params, 1e-6)
  assert_trees_close(state.critic.params, critic.params, 1e-6)


def test_a_kl_term_in_the_reward_is_part_of_what_the_critic_predicts(params, values_params):
  """Written out: both log-probs, the rewards of the tokens minus beta times k1, then as before."""
  row = dataclasses.replace(ALGORITHMS["ppo"], kl="k1", kl_in="reward", beta=0.3)
  reference = jax.tree.map(lambda x: x * 1.1, params)
  state, metrics = learner(algorithm=row, reference=reference)(
    state_of(params, values_params), batch(), 0
  )
  score, b = make_score(MODEL), batch()
  b = dataclasses.replace(b, old_logp=score(params, b), ref_logp=score(reference, b))
  b = dataclasses.replace(b, values=token_values(TRUNK, values_params, b))
  rewards = np.where(b.mask, b.token_rewards - 0.3 * (b.old_logp - b.ref_logp), 0.0)
  _, returns = gae(rewards, b.values, b.mask, lam=0.95)
  assessed, _ = assess(b, row)
  np.testing.assert_allclose(assessed.returns, returns, atol=1e-5)
  critic, _ = make_critic_step(CRITIC)(TrainState.create(values_params, OPTIMIZER), assessed)
  policy, _ = make_train_step(MODEL, row, OPTIMIZER)(TrainState.create(params, OPTIMIZER), assessed)
  assert_trees_close(state.params, policy.params, 1e-6)
  assert_trees_close(state.critic.params, critic.params, 1e-6)
  assert float(metrics["kl"]) > 0
  plain, _ = learner()(state_of(params, values_params), batch(), 0)
  assert np.abs(plain.params["embed"] - state.params["embed"]).max() > 1e-6


def test_while_the_critic_warms_up_the_policy_stays(params, values_params):
  update = learner(critic=dataclasses.replace(CRITIC, warmup_steps=2))
  state, metrics = update(state_of(params, values_params), batch(), 1)
  assert bits(state.params) == bits(params)
  assert bits(state.critic.params) != bits(values_params)
  assert int(state.step) == 0
  assert "loss" not in metrics
  state, metrics = update(state, batch(), 2)
  assert int(state.step) == 1
  assert "loss" in metrics


def test_an_update_of_the_critic_that_is_not_finite_is_skipped(params, values_params):
  poisoned = {**values_params, "score": values_params["score"] * jnp.inf}
  update = learner(UpdateConfig(max_skipped=1))
  state, metrics = update(state_of(params, poisoned), batch(), 0)
  assert float(metrics["critic/skipped"]) == float(metrics["update/skipped"]) == 1
  assert bits(state.critic.params) == bits(poisoned)
  assert update.trouble.startswith("1 updates in a row were skipped")


def test_completions_that_were_not_scored_teach_nothing(params, values_params):
  b = batch()
  unscored = jnp.where((jnp.arange(4) < 2)[:, None, None], jnp.nan, b.token_rewards)
  fewer = jnp.where((jnp.arange(4) < 2)[:, None, None], 0.0, b.weights)
  update = learner(algorithm=Algorithm(advantage="gae", average="token"))
  found, _ = update(
    state_of(params, values_params), dataclasses.replace(b, token_rewards=unscored), 0
  )
  expected, _ = update(state_of(params, values_params), dataclasses.replace(b, weights=fewer), 0)
  assert_trees_close(found.params, expected.params, 1e-6)
  assert_trees_close(found.critic.params, expected.critic.params, 1e-6)


def test_masked_slots_may_hold_anything(params, values_params):
  b = batch()
  poisoned = dataclasses.replace(b, token_rewards=jnp.where(b.mask, b.token_rewards, jnp.nan))
  results = [learner()(state_of(params, values_params), x, 0)[0] for x in (b, poisoned)]
  assert bits(results[0]) == bits(results[1])


def test_a_state_with_a_critic_as_a_dict_and_back(params, values_params):
  state = state_of(params, values_params)
  again = TrainState.from_dict(state.to_dict())
  assert bits(again) == bits(state)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  assert "critic" not in TrainState.create(params, OPTIMIZER).to_dict()


def test_a_missing_critic_is_named(params):
  with pytest.raises(ValueError, match="advantage 'gae_whitened' is computed from values: give"):
    learner(critic=None)
  with pytest.raises(ValueError, match="Learner has a critic, and the state has none"):
    learner()(TrainState.create(params, OPTIMIZER), batch(), 0)


def test_names_of_the_critics_metrics():
  metrics = named({"loss": 1.0, "update/skipped": 0.0, "critic/error": 2.0})
  assert metrics == {"critic/loss": 1.0, "critic/skipped": 0.0, "critic/error": 2.0}


# --- on the trunk of the policy -------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_params(params):
  """Returns a policy with a value head."""
  return {**params, "score": jax.random.normal(jax.random.key(5), (1, CONFIG.width))}


def test_a_value_head_adds_its_loss_to_the_policys(shared_params):
  """Written out: values and advantages before the update, then one gradient of both losses."""
  head = ValueHead(weight=0.25, clip=0.1)
  b = dataclasses.replace(batch(), values=token_values(MODEL, shared_params, batch()))
  b, _ = assess(b, ALGORITHMS["ppo"])

  def loss(p):
    logp, _ = score_batch(MODEL, p, b)
    policy, _ = policy_loss("ppo", logp, b.advantages, b.mask, weights=b.weights)
    hidden = MODEL.score(p, b.prompts, b.prompt_mask, b.completions)
    values = jnp.where(b.mask, (hidden * p["score"][0]).sum(-1), 0.0)
    own, _ = value_loss(values, b.returns, b.mask, old_values=b.values, clip=0.1, weights=b.weights)
    return policy + 0.25 * own

  slopes = jax.grad(loss)(shared_params)
  expected = jax.tree.map(lambda p, slope: p - RATE * slope, shared_params, slopes)
  for config in (UpdateConfig(), UpdateConfig(micro_batches=2)):
    state, metrics = learner(config, critic=head)(
      TrainState.create(shared_params, OPTIMIZER), batch(), 0
    )
    assert_trees_close(state.params, expected, 2e-6)
    assert float(metrics["loss"]) == pytest.approx(float(loss(shared_params)), abs=1e-6)
  assert state.critic is None
  assert set(VALUE_METRICS) <= set(metrics)
  assert not (set(CRITIC_METRICS) - set(VALUE_METRICS)) & set(metrics)
  assert np.abs(slopes["score"]).max() > 1e-3


def test_the_values_of_a_head_reach_the_trunk(shared_params, params):
  def moved(weight):
    state = TrainState.create(shared_params, OPTIMIZER)
    return learner(critic=ValueHead(weight=weight))(state, batch(), 0)[0].params["embed"]

  assert np.abs(moved(0.5) - moved(1e-9)).max() > 1e-6
  with pytest.raises(ValueError, match="Learner has a ValueHead, and the policy's parameters have"):
    learner(critic=ValueHead())(TrainState.create(params, OPTIMIZER), batch(), 0)


# --- whole runs ----------------------------------------------------------------------------------

PPO = [
  f"--config.{line}"
  for line in (
    "algorithm.name=ppo", "critic.warmup_steps=1", "critic.learning_rate=1e-3", "steps=3",
    "critic.clip=0.2", "rollout.group_size=2", "rollout.completion_length=4", "rewards.workers=0",
    "log.samples=0", "checkpoint.every=100", "optimizer.learning_rate=1e-2", "train.mini_batches=2",
  )
]  # fmt: skip


@pytest.mark.slow
def test_a_run_with_a_critic_is_resumed_bit_for_bit(tmp_path):
  state, rows, _ = train_on(1, tmp_path / "one", PPO)
  train_on(1, tmp_path / "parts", [*PPO, "--config.steps=2"])
  again, more, _ = train_on(1, tmp_path / "parts", PPO)
  assert again == state
  assert [row for row in more if "critic/loss" in row] == [r for r in rows if "critic/loss" in r]
  learned = [row for row in rows if "critic/loss" in row]
  assert len(learned) == 3
  assert ["loss" in row for row in learned] == [False, True, True]


@pytest.mark.slow
def test_a_run_with_a_value_head_on_eight_devices_is_exported_without_it(tmp_path):
  shared = ["algorithm.name=ppo", "critic.trunk=policy", "steps=2", "rollout.prompts_per_step=16"]
  own = [f"--config.{line}" for line in shared]
  options = [o for o in PPO if not o.startswith(("--config.critic", "--config.steps"))] + own
  _, rows, _ = train_on(8, tmp_path / "run", options)
  losses = [row for row in rows if "loss" in row]
  assert len(losses) == 2
  assert losses[0]["critic/values_mean"] != 0  # of the second mini-batch: the head was 0 before
  export.main(["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
  _, params = load(str(tmp_path / "model"))
  assert "score" not in params
