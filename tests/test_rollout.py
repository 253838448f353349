"""The seam between host and device: rewards meet their completions, what is dropped was 0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import rollout
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.models.decoder import Decoder, ModelConfig, unstack
from grpo_jax.tasks.base import Example, Task
from grpo_jax.tokens import ByteTokenizer
from grpo_jax.train_step import TrainState, make_train_step

CONFIG = ModelConfig(vocab_size=257, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
MODEL = Decoder(CONFIG)
EXAMPLES = [Example(prompt=f"{n}:", columns={"number": n}, key=str(n)) for n in range(8)]


def vowels(prompts, completions, number, **columns):
  """Odd prompts score the share of bytes below 64, even ones always 0.5: constant groups."""
  return [
    sum(ord(c) < 64 for c in text) / 8 if n % 2 else 0.5 for text, n in zip(completions, number)
  ]


TASK = Task(
  name="test",
  splits={"train": EXAMPLES, "eval": []},
  rewards={"vowels": (vowels, 1.0)},
  accuracy=vowels,
)
SAMPLER = rollout.Sampler(MODEL, ByteTokenizer(), prompt_length=4, completion_length=6)


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def collect(params, algorithm="dapo", bucket=2):
  return rollout.collect(
    SAMPLER,
    unstack(params),
    TASK,
    EXAMPLES,
    jax.random.key(1),
    group=4,
    temperature=1.0,
    algorithm=ALGORITHMS[algorithm],
    bucket=bucket,
  )


def test_rewards_belong_to_their_completions(params):
  out = collect(params)
  for row, sample in enumerate(out.samples):
    p, g = divmod(row, 4)
    assert sample["prompt"] == f"{p}:"
    want = vowels([sample["prompt"]], [sample["completion"]], [p])[0]
    assert out.rewards[p, g] == pytest.approx(want)
    assert sample["reward"] == pytest.approx(want)
  assert out.metrics()["frac_reward_zero_std"] >= 0.5


def update(params, batch, algorithm):
  optimizer = optax.sgd(1.0)
  step = make_train_step(MODEL, algorithm, optimizer, lambda count: 1.0, temperature=1.0)
  copy = jax.tree.map(jnp.copy, params)
  state, metrics = step(TrainState(jnp.int32(0), copy, optimizer.init(copy)), batch)
  return jax.tree.map(jnp.subtract, state.params, params), metrics


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_leaving_out_groups_without_a_signal_changes_no_update(params, average):
  """A row with a KL term keeps every prompt; its batch, with the term off, is the whole one."""
  algorithm = dataclasses.replace(ALGORITHMS["dapo"], average=average)
  with_kl = dataclasses.replace(algorithm, kl="k3", beta=1.0)
  few, all_of_them = (
    rollout.collect(
      SAMPLER,
      unstack(params),
      TASK,
      EXAMPLES,
      jax.random.key(1),
      group=4,
      temperature=1.0,
      algorithm=row,
      bucket=3,
    ).batch
    for row in (algorithm, with_kl)
  )
  assert all_of_them.mask.shape[0] == 8
  assert few.mask.shape[0] == 6  # four prompts with a signal, in buckets of three
  assert not few.mask[4:].any()
  (small, small_metrics), (whole, metrics) = (
    update(params, batch, algorithm) for batch in (few, all_of_them)
  )
  assert optax.tree.norm(whole) > 1e-3
  for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  np.testing.assert_allclose(small_metrics["loss"], metrics["loss"], atol=1e-6)


def test_select_keeps_one_empty_bucket_when_nothing_is_left(params):
  batch = rollout.select(collect(params).batch, np.array([], np.int64), 2)
  assert batch.mask.shape == (2, 4, 6)
  assert not batch.mask.any()
  assert not batch.weights.any()
  change, metrics = update(params, batch, ALGORITHMS["dapo"])
  assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(change))
  assert all(np.isfinite(float(value)) for value in metrics.values())


def test_a_stop_string_that_no_token_holds_is_refused():
  with pytest.raises(ValueError, match=r"'\\n\\n' is in no single token of bytes"):
    rollout.stop_ids(ByteTokenizer(), ["\n\n"])
  assert rollout.stop_ids(ByteTokenizer(), ["\n"]).tolist() == [10, 256]


def test_columns_and_fitting():
  ragged = [Example("a", {"x": 1}, "a"), Example("bbb", {"y": 2}, "b")]
  assert rollout.columns_of(ragged) == {"x": [1, None], "y": [None, 2]}
  assert rollout.fitting(ByteTokenizer(), ragged, 0, "error") == (ragged, 3)
  with pytest.warns(UserWarning, match="1 of 2 prompts"):
    assert rollout.fitting(ByteTokenizer(), ragged, 2, "drop") == (ragged[:1], 2)
