"""Tests whole episodes: budgets, rewards, failures, and a batch that is the trainer's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.environments.base import Step
from grpo_jax.environments.workers import run_in_process
from grpo_jax.episodes import Episodes, EpisodeSampler, with_environment_rewards
from grpo_jax.evaluate import evaluate
from grpo_jax.learning.step import TrainState, make_train_step, score_batch
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.observations import ObservationEncoder
from grpo_jax.rollout import RolloutConfig, collect, generate
from grpo_jax.sampling import Sampler
from grpo_jax.sampling.turns import Budget
from grpo_jax.tasks.base import Example, Task
from grpo_jax.tasks.rewards.workers import score_in_process
from grpo_jax.tokens import ByteTokenizer
from tests.helpers.runs import train_on

CONFIG = ModelConfig(vocab_size=257, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
MODEL = Decoder(CONFIG)
EXAMPLES = [Example(f"{word}:", {"word": word}, word) for word in ("ab", "cde", "f")]
ENDS = tuple(range(128, 257))


class Echo:
  """Answers each turn by its length; a turn with a byte above 127 in it is always its last."""

  def reset(self, example, seed):
    self.word, self.turn = example.columns["word"], 0

  def step(self, text):
    self.turn += 1
    if len(text) == 1 and self.word == "f":
      raise RuntimeError("a single character")
    done = len(text) == 3
    return Step(f"<{len(text)}>", float(len(text)), done, {"echo/steps": 1.0})


def letters(completions, **columns):
  return [sum(c.isalpha() for c in text) / 10 for text in completions]


TASK = Task("echo", {}, {"letters": (letters, 2.0)}, letters, environment=Echo)


@pytest.fixture(scope="module")
def params():
  params = MODEL.init(jax.random.key(0))
  return params | {"embed": params["embed"] * 0.3}


def make_sampler(task=TASK, length=30, temperature=1.0, **budget):
  sampler = Sampler(
    MODEL, ByteTokenizer(), prompt_length=4, completion_length=length, stop_ids=ENDS,
    temperature=temperature,
  )  # fmt: skip
  budget = {"turns": 4, "turn_length": 8, "observation_length": 5, **budget}
  return EpisodeSampler(sampler, Budget(**budget), lambda: run_in_process(task))


@pytest.fixture(scope="module")
def episodes(params):
  return generate(make_sampler(), params, EXAMPLES, jax.random.key(1), group_size=6)


def test_rows_are_turns_and_what_was_answered(episodes):
  e, turns_seen = episodes, set()
  for p in range(3):
    for g in range(6):
      rest = e.tokens[p, g][e.attended[p, g]].tolist()
      assert len(rest) == e.row_lengths[p, g] <= 30
      own = e.mask[p, g][: len(rest)].tolist()
      texts = [m["content"] for m in e.transcripts[p][g]]
      turns_seen.add(e.turns[p, g])
      at, number = 0, 0
      for i, text in enumerate(texts):
        if i % 2:  # an observation
          assert bytes(rest[at : at + len(text)]).decode() == text
          assert not any(own[at : at + len(text)])
          assert text == f"<{len(texts[i - 1])}>"
          at += len(text)
        else:
          end = e.turn_ends[p, g, number]
          assert all(own[at : end + 1])
          assert ByteTokenizer().decode([t for t in rest[at : end + 1] if t < 128]) == text
          at, number = end + 1, number + 1
      assert at == len(rest)
      assert number == e.turns[p, g]
  assert turns_seen >= {1, 2, 3}


def test_the_policy_alone_has_log_probabilities(episodes):
  e = episodes
  assert (e.logp[e.mask] < 0).all()
  assert (e.logp[~e.mask] == 0).all()
  assert (e.mask <= e.attended).all()
  assert (e.lengths < e.row_lengths).any()


def test_an_evaluation_counts_turns_and_lost_episodes(params):
  """The rule calls every text right: only an episode whose environment failed is wrong."""

  def always(completions, **columns):
    return [1.0] * len(completions)

  task = dataclasses.replace(TASK, accuracy=always)
  sampler, key = make_sampler(task), jax.random.key(1)
  result = evaluate(sampler, params, task, EXAMPLES, samples=6, batch_prompts=2, key=key)
  greedy, drawn = result.samples[:3], result.samples[3:]
  assert result.metrics["eval/turns"] == pytest.approx(
    sum(turn["role"] == "assistant" for row in greedy for turn in row["turns"]) / 3
  )
  # "Echo" fails at a turn of one character in episodes of "f".
  lost = [row for row in drawn if row["key"] == "f" and len(row["completion"]) == 1]
  assert 0 < len(lost) < 6
  assert [row for row in drawn if row["accuracy"] == 0] == lost
  also = [row for row in greedy if row["accuracy"] == 0]
  assert result.metrics["eval/missing"] == len(lost) + len(also)


def test_budgets_truncate_and_failures_are_not_scored(episodes):
  e = episodes
  assert e.failed[2].any()
  assert not e.failed[:2].any()
  for p in range(3):
    for g in range(6):
      last = e.transcripts[p][g][-1]["content"]
      stopped = e.tokens[p, g, e.turn_ends[p, g, e.turns[p, g] - 1]] >= 128
      if e.failed[p, g]:
        assert len(last) == 1
      else:
        assert e.ended[p, g] == (len(last) == 3 and stopped)
  assert (~e.ended & ~e.failed).any()
  metrics = e.metrics()
  assert metrics["episode/turns"] == pytest.approx(e.turns.mean())
  assert metrics["episode/failed"] == pytest.approx(e.failed.mean())
  assert metrics["episode/truncated"] == pytest.approx((~e.ended & ~e.failed).mean())
  assert metrics["echo/steps"] <= metrics["episode/turns"]


def test_an_observation_beyond_the_vocabulary_fails_its_episode(params):
  """A tokenizer may have ids beyond the rows of the model, which would all read the last one."""

  class Wide(ByteTokenizer):
    def encode_plain(self, text):
      return [5000] if text == "<2>" else self.encode(text)

  sampler = make_sampler()
  sampler._encode = ObservationEncoder(Wide())
  e = generate(sampler, params, EXAMPLES, jax.random.key(1), group_size=6)
  last = [[len(turns[-1]["content"]) for turns in row] for row in e.transcripts]
  assert (e.failed & (np.array(last) == 2)).any()
  assert e.tokens.max() < 257
  assert not e.failed[:2][np.array(last[:2]) == 3].any()


def test_rewards_of_the_environment_are_added_by_hand():
  nan = np.nan
  e = dataclasses.replace(
    _empty(), turn_rewards=np.array([[[1.0, nan, 2.0], [nan, nan, nan], [5.0, nan, nan]]]),
    turn_ends=np.array([[[1, 4, 9], [3, -1, -1], [2, -1, -1]]]),
    failed=np.array([[False, False, True]]),
  )  # fmt: skip
  total, per_name, turns = with_environment_rewards(
    e, np.array([[0.5, nan, 0.5]]), {"f": np.array([[0.25, nan, 0.25]])}
  )
  np.testing.assert_array_equal(total, [[3.5, nan, nan]])
  np.testing.assert_array_equal(per_name["environment"], [[3.0, nan, nan]])
  np.testing.assert_array_equal(per_name["f"], [[0.25, nan, nan]])
  np.testing.assert_array_equal(turns, [[[1.0, 0.0, 2.5], [nan] * 3, [nan] * 3]])


def _empty():
  none = np.zeros((1, 3, 0))
  return Episodes(none, none, none, none, none, none, none, [], 1.0)


ADVANTAGES = ["group_normalized", "turn_advantages"]


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_batch_scores_as_it_was_sampled_and_learns_from_the_policys_tokens(params, advantage):
  algorithm = dataclasses.replace(ALGORITHMS["dapo"], advantage=advantage)
  rollout = collect(
    make_sampler(), params, EXAMPLES, score_in_process(TASK), jax.random.key(1),
    RolloutConfig(6, algorithm, reward_weights=(2.0, 1.0)),
  )  # fmt: skip
  batch = rollout.batch
  logp, _ = score_batch(MODEL, params, batch)
  np.testing.assert_allclose(logp, jnp.where(batch.mask, batch.sampler_logp, 0), atol=1e-4)
  assert rollout.metrics["episode/turns"] > 1
  assert rollout.samples[0]["turns"][0]["role"] == "assistant"
  # The tokens of observations are attended to, and their recorded log-probs are never read.
  poisoned = dataclasses.replace(
    batch,
    sampler_logp=jnp.where(batch.mask, batch.sampler_logp, jnp.nan),
    advantages=jnp.where(batch.mask, batch.advantages if batch.advantages.ndim == 3
                         else batch.advantages[..., None], jnp.nan),
  )  # fmt: skip
  updated, metrics = step_of(params, batch, algorithm)
  same, _ = step_of(params, poisoned, algorithm)
  assert float(metrics["grad_norm"]) > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, updated)
  seen = (
    np.asarray(batch.mask).sum(-1) < np.asarray(rollout.scored.out.row_lengths)[: len(batch.mask)]
  )
  other = jnp.where(batch.mask | (batch.completions >= 128), batch.completions, 65)
  changed, _ = score_batch(MODEL, params, dataclasses.replace(batch, completions=other))
  assert seen.any()
  assert float(jnp.abs(changed - logp).max()) > 1e-4


def step_of(params, batch, algorithm):
  step = make_train_step(MODEL, algorithm, optax.sgd(0.1))
  state, metrics = step(TrainState.create(params, optax.sgd(0.1)), batch)
  return state.params, metrics


def test_an_episode_is_drawn_again_bit_for_bit(params, episodes):
  again = generate(make_sampler(), params, EXAMPLES, jax.random.key(1), group_size=6)
  np.testing.assert_array_equal(again.tokens, episodes.tokens)
  np.testing.assert_array_equal(again.logp, episodes.logp)
  part = generate(
    make_sampler(), params, EXAMPLES[1:2], jax.random.key(1), group_size=6, first_prompt=1
  )
  np.testing.assert_array_equal(part.tokens[0], episodes.tokens[1])


def test_greedy_episodes_of_a_group_are_equal(params):
  e = generate(make_sampler(), params, EXAMPLES, jax.random.key(1), group_size=2, temperature=0.0)
  np.testing.assert_array_equal(e.tokens[:, 0], e.tokens[:, 1])


# --- whole runs -----------------------------------------------------------------------------------

GAME = [
  "--config.task.name=guess_number", "--config.steps=2", "--config.rollout.completion_length=40",
  "--config.rollout.group_size=4", "--config.episode.turns=3", "--config.episode.turn_length=6",
  "--config.checkpoint.every=1", "--config.checkpoint.keep=9", "--config.log.samples=0",
  "--config.rewards.workers=0", "--config.algorithm.advantage=turn_advantages",
  "--config.rollout.temperature=0.5",
]  # fmt: skip


def test_a_run_is_resumed_bit_for_bit_and_eight_devices_play_the_same_games(tmp_path):
  one = train_on(1, tmp_path / "one", GAME)
  train_on(1, tmp_path / "parts", [*GAME, "--config.steps=1"])
  state, _, parts = train_on(1, tmp_path / "parts", GAME)
  assert state == one[0]
  _, _, on_eight = train_on(8, tmp_path / "eight", GAME)
  played = games(one[2])
  assert games(on_eight) == played
  assert set(played) <= set(games(parts))  # the first part has also evaluated at its end
  assert any(len(turns) > 1 for turns in map(json.loads, played))


def games(texts):
  """Returns the turns of each training episode of some files of samples, as JSON."""
  rows = [json.loads(row) for text in texts for row in text.splitlines()]
  return [json.dumps(row["turns"]) for row in rows if "turns" in row]


def test_budgets_and_chunks_are_checked_before_anything_compiles(tmp_path):
  for options, words in (
    (["--config.episode.turns=0"], "episode.turns is 0, it must be at least 1"),
    (["--config.train.reduction=deterministic", "--config.model.remat=none"], "in chunks"),
    (["--config.rollout.completion_length=9000"], "lower it to"),
  ):
    with pytest.raises(ConfigError, match=words):
      build(load("experiments/tiny.py", [*GAME, *options]))
