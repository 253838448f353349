"""Tests whole episodes: budgets, rewards, failures, and a batch that is the trainer's."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_jax import train
from grpo_jax.build import build
from grpo_jax.config import ConfigError, load
from grpo_jax.core.algorithms import ALGORITHMS, advantages
from grpo_jax.distributed import mesh as meshes
from grpo_jax.environments.base import Step
from grpo_jax.environments.workers import EnvironmentWorkers, run_in_process
from grpo_jax.episodes import Episodes, EpisodeSampler, with_environment_rewards
from grpo_jax.evaluate import evaluate
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.learning.step import Batch, TrainState, make_train_step, score_batch
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.observations import ObservationEncoder
from grpo_jax.rollout import RolloutConfig, collect, generate, make_batch, score
from grpo_jax.sampling import Sampler
from grpo_jax.sampling.turns import Budget
from grpo_jax.tasks.base import Example, Task
from grpo_jax.tasks.rewards.workers import score_in_process
from grpo_jax.tokens import ByteTokenizer, Tokenizer, encode_prompt
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


def make_sampler(task=TASK, make_runner=None, in_step=True, **options):
  sampler = Sampler(
    MODEL, ByteTokenizer(), prompt_length=4, completion_length=30, stop_ids=ENDS, **options
  )
  budget = Budget(turns=4, turn_length=8, observation_length=5)
  return EpisodeSampler(sampler, budget, make_runner or (lambda: run_in_process(task)), in_step)


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
  sampler.encode = ObservationEncoder(Wide())
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


ADVANTAGES = [pytest.param("group_normalized", marks=pytest.mark.slow), "turn_advantages"]


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


def test_a_batch_is_trimmed_to_its_rows_not_to_what_the_policy_wrote(params):
  class Wordy(Echo):
    def step(self, text):
      return Step("." * 14, float(len(text)))

  task = dataclasses.replace(TASK, environment=Wordy)
  single = Sampler(
    MODEL, ByteTokenizer(), prompt_length=4, completion_length=64, stop_ids=ENDS, temperature=0.9
  )
  sampler = EpisodeSampler(single, Budget(3, 5, 14), lambda: run_in_process(task))
  rollout = collect(
    sampler, params, EXAMPLES, score_in_process(task), jax.random.key(1), RolloutConfig(4, "grpo")
  )
  e, batch = rollout.scored.out, rollout.batch
  assert e.lengths.max() <= 16
  assert e.row_lengths.max() > 32
  assert batch.completions.shape == (3, 4, 64)
  np.testing.assert_array_equal(batch.mask, e.mask)
  assert rollout.metrics["update/padded"] == pytest.approx(
    1 - (e.prompt_mask.sum() + e.row_lengths.sum()) / (3 * (e.prompts.shape[1] + 4 * 64))
  )
  assert rollout.num_tokens == e.prompt_mask.sum() + e.row_lengths.sum()


@pytest.fixture(scope="module")
def scored(episodes):
  return score(score_in_process(TASK), EXAMPLES, episodes)


def rewards_by_hand(e):
  """Returns the rewards of `letters` and of the environment, from the texts of the turns."""
  rewards = np.full((2, 3, 6), np.nan, np.float32)
  for p, g in zip(*np.nonzero(~e.failed)):
    texts = [turn["content"] for turn in e.transcripts[p][g][::2]]
    stopped = e.tokens[p, g, e.turn_ends[p, g, len(texts) - 1]] >= 128
    rewards[0, p, g] = sum(c.isalpha() for c in texts[-1]) / 10
    rewards[1, p, g] = sum(map(len, texts if stopped else texts[:-1]))
  return rewards


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_gets_its_rewards_and_weights(episodes, scored, name):
  e, algorithm, rewards = episodes, ALGORITHMS[name], rewards_by_hand(episodes)
  config = RolloutConfig(6, algorithm, reward_weights=(2.0, 1.0))
  batch, _ = make_batch(scored, make_sampler(), config)
  total = 2 * rewards[0] + rewards[1]
  if algorithm.of_token_rewards:  # the learner computes advantages, from the rewards of turns
    np.testing.assert_allclose(batch.token_rewards.sum(-1), total, rtol=1e-5)
    given = np.nonzero(~e.failed[..., None] & (np.asarray(batch.token_rewards) != 0))
    assert all(t in e.turn_ends[p, g] for p, g, t in zip(*given))
  else:
    weights = np.array([2.0, 1.0], np.float32)
    expected = advantages(
      name, total, rewards_per_function=rewards, reward_weights=weights, mask=e.mask
    )
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4, atol=1e-5)
    assert (np.asarray(batch.advantages)[e.failed] == 0).all()
    assert np.unique(batch.advantages).size > 1 or name == "opd"
  own = e.mask.sum(-1, keepdims=True)
  of_token = {
    "sequence": 1 / (18 * own), "token": 1 / own.sum(), "constant": 1 / (18 * 30),
    "prompt": 1 / (3 * own.sum(1, keepdims=True)),
  }  # fmt: skip
  np.testing.assert_allclose(
    batch.weights, np.where(e.mask, of_token[algorithm.average], 0), rtol=1e-5
  )


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


def test_episodes_in_chunks_have_the_same_bits_on_one_and_eight_devices(params):
  """They are those of a sampler without chunks, within rounding."""
  examples = [Example(f"{word}:", {"word": word}, word) for word in ("ab", "f", "cd", "e") * 2]
  found = []
  for width in (8, 1):
    mesh = meshes.make_mesh((width, 1, 1), jax.devices()[:width])
    chunked = make_sampler(chunks=Chunks(8, mesh), prompt_sharding=meshes.batch_sharding(mesh))
    laid_out = jax.device_put(params, meshes.replicated(mesh))
    found.append(generate(chunked, laid_out, examples, jax.random.key(1), group_size=6))
  eight, one = found
  for name in ("tokens", "mask", "logp", "entropy", "turn_ends"):
    assert getattr(one, name).tobytes() == getattr(eight, name).tobytes(), name
  whole = generate(make_sampler(), params, examples, jax.random.key(1), group_size=6)
  np.testing.assert_array_equal(one.tokens, whole.tokens)
  np.testing.assert_allclose(one.logp, whole.logp, atol=1e-4)
  assert one.turns.max() >= 3
  part = generate(chunked, laid_out, examples[:3], jax.random.key(1), group_size=6)  # no chunks
  np.testing.assert_array_equal(part.tokens, whole.tokens[:3])


class Late:
  """Gives answers of a runner in a random order, at least one at a time, as if they took time."""

  def __init__(self, seed):
    self._runner, self._random, self._kept = run_in_process(TASK), np.random.default_rng(seed), {}
    self.reset, self.close = self._runner.reset, self._runner.close
    self.sizes = []

  def submit(self, texts, finish=()):
    self._runner.submit(texts, finish)
    self._kept |= self._runner.answers()

  def answers(self, timeout=None):
    if timeout is not None and self._random.random() < 0.3:
      time.sleep(timeout)
      return {}
    given = [key for key in self._kept if self._random.random() < 0.3] or list(self._kept)[:1]
    self.sizes.append(len(given))
    return {key: self._kept.pop(key) for key in given}


@pytest.mark.parametrize("cache_rows", [0, 5])
def test_episodes_for_themselves_have_the_same_bits_whatever_environments_take(
  params, episodes, cache_rows
):
  """The turns are those of episodes in step, within rounding."""
  found, runners = [], [run_in_process(TASK), Late(1), Late(2)]
  for runner in runners:
    sampler = make_sampler(make_runner=lambda r=runner: r, in_step=False, cache_rows=cache_rows)
    found.append(generate(sampler, params, EXAMPLES, jax.random.key(1), group_size=6))
  assert max(runners[1].sizes) > 1
  for other in found[1:]:
    for name in ("tokens", "mask", "attended", "logp", "entropy", "turn_ends", "turn_rewards"):
      assert getattr(other, name).tobytes() == getattr(found[0], name).tobytes(), name
    assert other.transcripts == found[0].transcripts
    assert other.measured == found[0].measured
  for name in ("tokens", "attended", "turn_rewards", "ended", "failed"):
    np.testing.assert_array_equal(getattr(found[0], name), getattr(episodes, name))
  np.testing.assert_allclose(found[0].logp, episodes.logp, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 2])
def test_seats_take_one_episode_after_another(params, shards):
  """A cache for 3 or 2 x 3 of 24 episodes: the same turns, of which most seats write a token."""
  examples = [*EXAMPLES, Example("e:", {"word": "e"}, "e")]
  mesh = meshes.make_mesh((shards, 1, 1), jax.devices()[:shards])
  layout = meshes.batch_sharding(mesh)
  laid_out = jax.device_put(params, meshes.replicated(mesh))
  found = [
    generate(make_sampler(prompt_sharding=layout, cache_rows=rows), laid_out, examples,
             jax.random.key(1), group_size=6)
    for rows in (0, 3)
  ]  # fmt: skip
  whole, seated = found
  for name in ("tokens", "attended", "turn_rewards", "ended"):
    np.testing.assert_array_equal(getattr(seated, name), getattr(whole, name))
  np.testing.assert_allclose(seated.logp, whole.logp, atol=1e-4)
  assert whole.row_steps is None
  assert whole.lengths.sum() < seated.row_steps.sum()
  assert seated.row_steps.sum() * 0.3 < whole.lengths.sum()
  # With all of their turns as long as may be, 24 episodes at once would be 24 x 4 x 8 row-steps.
  assert seated.row_steps.sum() < 24 * 4 * 8


class Patient:
  """Answers the first turn of the first episode that comes only when all others are over."""

  def __init__(self, folder, others):
    self._folder, self._others, self._turns, self._is_slow = Path(folder), others, 0, False

  def reset(self, example, seed):
    pass

  def step(self, text):
    if self._turns == 0:
      with contextlib.suppress(FileExistsError):
        (self._folder / "slow").mkdir()
        self._is_slow = True
    while self._is_slow and len(list(self._folder.glob("over-*"))) < self._others:
      time.sleep(0.01)
    self._turns += 1
    return Step("<>", 1.0, self._turns == 3)

  def close(self):
    (self._folder / f"over-{os.getpid()}").touch()


def patient_task(folder, others):
  make = partial(Patient, folder, others)
  return Task("patient", {}, {"letters": (letters, 1.0)}, letters, environment=make)


@pytest.mark.parametrize("cache_rows", [0, 2])
def test_a_slow_environment_holds_up_its_own_episode_only(params, tmp_path, cache_rows):
  """In step, its first turn would take until it is out of time, which fails its episode."""
  make = partial(patient_task, str(tmp_path), 3)

  def runner():  # one process for each episode
    return EnvironmentWorkers(make, workers=4, timeout=60, isolate=False)

  sampler = make_sampler(make_runner=runner, in_step=False, cache_rows=cache_rows)
  e = generate(sampler, params, EXAMPLES[:1], jax.random.key(1), group_size=4)
  sampler.close()
  assert not e.failed.any()
  assert e.turns.max() == 3


def test_greedy_episodes_of_a_group_are_equal(params):
  e = generate(make_sampler(), params, EXAMPLES, jax.random.key(1), group_size=2, temperature=0.0)
  np.testing.assert_array_equal(e.tokens[:, 0], e.tokens[:, 1])


# --- tokens in, tokens out ------------------------------------------------------------------------


class Parrot:
  """Answers each turn by its own text, which is encoded anew, in brackets."""

  def reset(self, example):
    pass

  def step(self, text):
    return Step(f"[{text}]", 1.0, False)


def merging_tokenizer():
  """Returns a tokenizer that writes everything in lower case, and pairs of letters as one token."""
  letters = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGH", *"[]<|>_:? \n"]
  pairs = [(a, b) for a in "abcd" for b in "efgh"]
  vocab = {piece: i for i, piece in enumerate([*letters, *map("".join, pairs)])}
  backend = Backend(models.BPE(vocab, pairs))
  backend.normalizer = normalizers.Lowercase()
  backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
  backend.decoder = decoders.Fuse()
  fast = PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"],
    clean_up_tokenization_spaces=False,
    chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
  )  # fmt: skip
  return Tokenizer(fast, [fast.eos_token_id], "merging")


@pytest.mark.parametrize(
  ("make", "ends", "prompt"),
  [
    (ByteTokenizer, range(100), "ab:"),
    (merging_tokenizer, range(8, 26), "ab:"),
    (merging_tokenizer, range(8, 26), [{"role": "user", "content": "ab:"}]),
  ],
  ids=["bytes", "merges", "chat"],
)
def test_what_the_policy_wrote_is_never_encoded_again(make, ends, prompt):
  """Its ids are not those of its text, and they are the ones with the recorded log-probs."""
  tokenizer = make()
  model = Decoder(dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size))
  params = model.init(jax.random.key(0))
  length = len(encode_prompt(tokenizer, prompt))
  sampler = EpisodeSampler(
    Sampler(model, tokenizer, prompt_length=length, completion_length=90, stop_ids=ends),
    Budget(turns=3, turn_length=10, observation_length=60),
    lambda: run_in_process(dataclasses.replace(TASK, environment=Parrot)),
  )
  e = generate(sampler, params, [Example(prompt, {}, "ab")], jax.random.key(2), group_size=16)
  differ, observations = 0, 0
  for g in range(16):
    row, own, at = e.tokens[0, g].tolist(), e.mask[0, g].tolist(), 0
    for turn, end in enumerate(e.turn_ends[0, g][: e.turns[0, g]]):
      start = own.index(True, at)
      if turn:
        encoded = tokenizer.encode_plain(e.transcripts[0][g][2 * turn - 1]["content"])
        before = row[at:start].index(encoded[0])
        assert row[at:start][before : before + len(encoded)] == encoded
        assert isinstance(prompt, list) or row[at:start] == encoded
        observations += 1
      wrote, at = row[start : end + 1], end + 1
      assert all(own[start:at])
      differ += tokenizer.encode_plain(tokenizer.decode(wrote)) != wrote
  assert observations >= 5
  assert differ >= 5
  batch = Batch(
    e.prompts, e.prompt_mask, e.tokens, e.mask, None, None, e.logp, temperature=e.temperature
  )
  logp, _ = jax.jit(partial(score_batch, model))(params, batch)
  np.testing.assert_allclose(e.logp, np.where(e.mask, logp, 0), atol=1e-4)


# --- whole runs -----------------------------------------------------------------------------------

OPTIONS = [
  "--config.task.name=table", "--config.task.settings.environment=tests/helpers/environments.py:"
  "Lengths", "--config.task.settings.reward={'name': 'length', 'target': 3}",
  "--config.task.settings.eval_fraction=0", f"--config.rollout.stop_ids={ENDS}".replace(" ", ""),
  "--config.steps=2", "--config.rollout.completion_length=40", "--config.rollout.group_size=4",
  "--config.episode.turns=3", "--config.episode.turn_length=6", "--config.checkpoint.every=1",
  "--config.checkpoint.keep=9", "--config.log.samples=0", "--config.rewards.workers=0",
  "--config.algorithm.advantage=turn_advantages",
]  # fmt: skip


@pytest.fixture
def game(tmp_path):
  """Returns the options of a run whose first steps have a gradient already."""
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps({"prompt": f"{i}:"}) + "\n" for i in range(32)))
  return [*OPTIONS, f"--config.task.settings.path={path}"]


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit_and_eight_devices_play_the_same_games(tmp_path, game):
  state, rows, texts = train_on(1, tmp_path / "one", game)
  train_on(1, tmp_path / "parts", [*game, "--config.steps=1"])
  assert train_on(1, tmp_path / "parts", game)[0] == state
  _, _, on_eight = train_on(8, tmp_path / "eight", game)
  assert games(on_eight) == games(texts)
  assert all(row["grad_norm"] > 0 for row in rows)
  assert any(len(turns) > 1 for turns in map(json.loads, games(texts)))


def games(texts):
  """Returns the turns of each training episode of some files of samples, as JSON."""
  rows = [json.loads(row) for text in texts for row in text.splitlines()]
  return [json.dumps(row["turns"]) for row in rows if "turns" in row]


@pytest.mark.slow
def test_a_deterministic_run_has_the_same_bits_on_one_and_eight_devices(tmp_path, game):
  options = [
    *game, "--config.train.reduction=deterministic", "--config.model.remat=none",
    "--config.algorithm.name=grpo",
  ]  # fmt: skip
  one = train_on(1, tmp_path / "one", options)
  assert train_on(8, tmp_path / "eight", options) == one
  train_on(2, tmp_path / "parts", [*options, "--config.steps=1"])
  assert train_on(4, tmp_path / "parts", options)[0] == one[0]
  assert all(row["grad_norm"] > 0 for row in one[1])


EVERYTHING = [
  "--config.algorithm.name=grpo", "--config.algorithm.correction=token_truncate",
  "--config.algorithm.correction_max=2.0", "--config.lora.rank=2", "--config.train.mini_batches=2",
  "--config.train.micro_batches=2", "--config.reference.sync_every=1",
  "--config.reference.sync_share=0.5", "--config.rollout.mask_truncated=true",
  "--config.rollout.max_resamples=1", "--config.steps=3",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_with_everything_is_resumed_bit_for_bit(tmp_path, game):
  """Adapters, a moving reference, a correction, mini- and micro-batches, and resampling."""
  options = [*game, *EVERYTHING]
  state, rows, texts = train_on(1, tmp_path / "one", options)
  train_on(1, tmp_path / "parts", [*options, "--config.steps=2"])
  assert train_on(1, tmp_path / "parts", options)[0] == state
  _, on_two, others = train_on(2, tmp_path / "two", options)
  assert games(others) == games(texts)
  for name in ("loss", "grad_norm", "kl"):
    values = [[row[name] for row in each if name in row] for each in (rows, on_two)]
    np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5, err_msg=name)
    assert len(values[0]) == 3
    assert values[0][-1] != 0


TOOLS = """
def nohint(x):
  "Does."

class NoStep:
  def reset(self, example, seed):
    return None

class Longer(NoStep):
  def reset(self, example, seed):
    return example.prompt + " and much longer than the prompts of the file"

  def step(self, text):
    return "", 1.0, True

class Wrong(NoStep):
  def step(self, text):
    return "", 1.0
"""
LINE = {"tools": ["calc"], "tool_settings": {"format": "line"}}


def table_task(folder, **settings):
  """Returns the options of a task from a file, with what `TOOLS` defines in `tools.py`."""
  (folder / "tools.py").write_text(TOOLS)
  (folder / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "answer": 2}\n' * 8)
  settings = {"path": f"{folder}/rows.jsonl", "reward": "numeric", "eval_fraction": 0, **settings}
  options = [f"--config.task.settings.{name}={value}" for name, value in settings.items()]
  return ["--config.task.name=table", *options]


@pytest.mark.parametrize(
  ("settings", "options", "message"),
  [
    (
      LINE,
      ["rollout.completion_length=9000"],
      "9007, and random:tiny has a context of .* lower it",
    ),
    ({"tools": ["FILE:nohint"]}, [], "tool 'nohint': Argument x is missing a type hint"),
    ({"tools": ["calc"]}, [], "has no chat template to show the tools calc in"),
    ({"environment": "FILE:NoStep"}, [], "environment 'NoStep' has no method step"),
    (LINE, ["episode.turns=0"], "episode.turns is 0, it must be at least 1"),
    (
      LINE,
      ["episode.turns=1"],
      "episode.turns is 1, it must be at least 2 for the tools of task 'table",
    ),
    (
      LINE,
      ["episode.turn_length=9"],
      "episode.turn_length is 9, it must be at most rollout.completion",
    ),
    (LINE, ["episode.observation_length=9"], "episode.observation_length is 9, it must be at most"),
    (
      {},
      ["episode.turns=3"],
      "episode.turns has no effect: task 'table:.*' has neither tools nor an env",
    ),
  ],
)
def test_what_cannot_work_is_an_error_before_anything_compiles(
  tmp_path, settings, options, message
):
  text = json.dumps(settings).replace("FILE", f"{tmp_path}/tools.py")
  options = [f"--config.{option}" for option in options]
  config = load("experiments/tiny.py", [*table_task(tmp_path, **json.loads(text)), *options])
  with pytest.raises(ConfigError, match=message):
    build(config)


def test_a_chat_template_that_cannot_go_on_is_an_error_before_anything_compiles(tmp_path):
  """It shows only the last turn, so that a row could not grow at its end."""
  forgetful = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
  model = tmp_path / "model"
  shutil.copytree("tests/fixtures/tiny_llama", model)
  (model / "chat_template.jinja").write_text(forgetful)
  options = table_task(tmp_path, environment=f"{tmp_path}/tools.py:Longer")
  row = {"prompt": [{"role": "user", "content": "1 + 1"}], "answer": 2}
  (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
  config = load("experiments/tiny.py", [f"--config.model.source={model}", *options])
  with pytest.raises(
    ConfigError, match="shows earlier turns otherwise once a conversation goes on"
  ):
    build(config)


@pytest.mark.parametrize(
  ("environment", "message"),
  [
    ("Longer", "reset of the environment returned a prompt of 52 tokens.*rollout.prompt_length"),
    ("Wrong", "none of the episodes of the first step was scored: the environment failed in all"),
  ],
)
def test_an_environment_that_cannot_work_ends_its_run_in_one_line(
  tmp_path, environment, message, capfd
):
  options = [
    *table_task(tmp_path, environment=f"{tmp_path}/tools.py:{environment}"),
    "--config.rewards.workers=0", f"--config.rollout.stop_ids={tuple(range(256))}".replace(" ", ""),
  ]  # fmt: skip
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    arguments = ["--config", "experiments/tiny.py", "--workdir", f"{tmp_path}/run", *options]
    assert train.main(arguments) == train.GAVE_UP
  error = capfd.readouterr().err
  assert re.search(message, error)
  assert "Traceback" not in error


def test_an_observation_that_cannot_be_encoded_costs_its_episode(params):
  """Messages after a text: the others of the group go on."""

  class Sometimes(Echo):
    def step(self, text):
      step = super().step(text)
      messages = [{"role": "user", "content": "?"}]
      return dataclasses.replace(step, observation=messages) if len(text) == 2 else step

  task = dataclasses.replace(TASK, environment=Sometimes)
  with pytest.warns(
    RuntimeWarning, match="lost an episode.*answered with messages, and the prompt"
  ):
    e = generate(make_sampler(task), params, EXAMPLES, jax.random.key(1), group_size=6)
  last = np.array([[len(turns[-1]["content"]) for turns in row] for row in e.transcripts])
  assert (e.failed & (last == 2)).any()
  assert e.failed[:2].sum() < 12
  assert e.metrics()["episode/failed"] == pytest.approx(e.failed.mean())
