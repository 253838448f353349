"""Tests that an episode is sampled as if each row were one text, and each token computed once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.core.logprobs import head_logprobs
from grpo_jax.learning.step import Batch, TrainState, make_train_step
from grpo_jax.models import FunctionModel
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.sampling import Sampler
from grpo_jax.sampling.episode_state import PIECE
from grpo_jax.sampling.turns import Budget, TurnSampler
from grpo_jax.tokens import ByteTokenizer
from tests.helpers import plain

CONFIG = ModelConfig(vocab_size=257, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
MODEL = Decoder(CONFIG)
PROMPTS = ["ab", "cde", "f"]
GROUP, LENGTH = 4, 40
VOWELS = tuple(b"aeiouAEIOU") + tuple(range(150, 257))  # they end a turn


@pytest.fixture(scope="module")
def params():
  params = MODEL.init(jax.random.key(0))
  return params | {"embed": params["embed"] * 0.5}


def hidden_states(params, tokens, mask):
  """The independent decoder of `helpers.plain`, row by row, without the padding."""
  rows = []
  for row, real in zip(np.asarray(tokens), np.asarray(mask)):
    hidden = plain.hidden_states(CONFIG, params, row[real])
    rows.append(np.zeros((len(row), CONFIG.width), np.float32))
    rows[-1][real] = hidden
  return np.stack(rows)


def called_back(params, tokens, mask):
  shape = jax.ShapeDtypeStruct((*tokens.shape, CONFIG.width), jnp.float32)
  return jax.pure_callback(hidden_states, shape, params, tokens, mask)


def make_sampler(model=MODEL, turns=3, **options):
  sampler = Sampler(
    model, ByteTokenizer(), prompt_length=3, completion_length=LENGTH, stop_ids=VOWELS, **options
  )
  return TurnSampler(sampler, Budget(turns, turn_length=6, observation_length=20))


def observation(p, g, number):
  """Returns None for an episode that is over, else 1 to 17 bytes."""
  if (p + g + number) % 5 == 0 or (number == 1 and g != p):
    return None
  return [(7 * p + 3 * g + number + i) % 100 for i in range(1 + (5 * p + 7 * g + 11 * number) % 17)]


def play(sampler, params, seed=0):
  """Returns (rows of tokens, whether each is the policy's, its logp) of each episode, by (p, g)."""
  session = sampler.begin(params, PROMPTS, jax.random.key(seed), group=GROUP)
  live, goes_on = np.ones((3, GROUP), bool), {}
  rows = {(p, g): ([], [], []) for p in range(3) for g in range(GROUP)}
  for number in range(sampler.budget.turns):
    session.keep(live)
    turn = session.turn(np.where(live, sampler.budget.turn_length, 0), goes_on)
    assert not turn.mask[~live].any()
    goes_on = {}
    for (p, g), (tokens, own, logp) in rows.items():
      n = turn.mask[p, g].sum()
      tokens += turn.tokens[p, g, :n].tolist()
      own += [True] * n
      logp += turn.logp[p, g, :n].tolist()
      seen = observation(p, g, number)
      if live[p, g] and turn.ended[p, g] and seen is not None and number + 1 < sampler.budget.turns:
        goes_on[p, g] = seen
        tokens += seen
        own += [False] * len(seen)
        logp += [0.0] * len(seen)
      else:
        live[p, g] = False
    if not goes_on:
      break
  return rows


@pytest.fixture(scope="module")
def rows(params):
  return play(make_sampler(), params)


def test_recorded_logprobs_are_the_trainers(params, rows):
  tokens = np.zeros((3, GROUP, LENGTH), np.int32)
  own = np.zeros(tokens.shape, bool)
  logp = np.zeros(tokens.shape)
  for (p, g), (row, is_own, row_logp) in rows.items():
    tokens[p, g, : len(row)], own[p, g, : len(row)] = row, is_own
    logp[p, g, : len(row)] = row_logp
  turns = (np.diff(np.pad(own, [(0, 0), (0, 0), (1, 0)]).astype(int), axis=-1) == 1).sum(-1)
  assert turns.min() == 1
  assert turns.max() == 3
  encoded = [list(prompt.encode()) for prompt in PROMPTS]
  prompts = np.array([[256] * (3 - len(ids)) + ids for ids in encoded])
  prompt_mask = prompts != 256
  hidden = jax.jit(MODEL.score)(params, prompts, prompt_mask, tokens)
  scored, _ = head_logprobs(hidden, MODEL.head(params), jnp.asarray(tokens))
  np.testing.assert_allclose(logp, np.where(own, scored, 0.0), atol=1e-4)


def test_rows_are_those_of_a_model_without_a_cache(params, rows):
  """Its rows are computed anew for each token; stops, keys and observations are the same."""
  model = FunctionModel(called_back, head=MODEL.head, vocab_size=257)
  other = play(make_sampler(model), params)
  for place, (tokens, own, logp) in rows.items():
    assert other[place][:2] == (tokens, own)
    np.testing.assert_allclose(other[place][2], logp, atol=1e-4)


def test_the_first_turn_is_a_completion(params):
  sampler = make_sampler()
  key = jax.random.key(5)
  turn = sampler.begin(params, PROMPTS, key, group=GROUP).turn(np.full((3, GROUP), 6))
  single = Sampler(MODEL, ByteTokenizer(), prompt_length=3, completion_length=6, stop_ids=VOWELS)
  out = single(params, PROMPTS, key, group=GROUP)
  np.testing.assert_array_equal(turn.tokens, out.tokens)
  np.testing.assert_array_equal(turn.mask, out.mask)
  np.testing.assert_array_equal(turn.ended, out.ended)
  np.testing.assert_allclose(turn.logp, out.logp, atol=1e-5)


def test_a_limit_cuts_a_turn(params):
  sampler, key = make_sampler(), jax.random.key(5)
  whole = sampler.begin(params, PROMPTS, key, group=GROUP).turn(np.full((3, GROUP), 6))
  limit = np.arange(12).reshape(3, GROUP) % 7
  cut = sampler.begin(params, PROMPTS, key, group=GROUP).turn(limit)
  np.testing.assert_array_equal(cut.mask, whole.mask & (np.arange(6) < limit[..., None]))
  np.testing.assert_array_equal(cut.tokens[cut.mask], whole.tokens[cut.mask])
  lengths = whole.mask.sum(-1)
  np.testing.assert_array_equal(cut.ended, whole.ended & (lengths <= limit))


class Counting(Decoder):
  """Counts the positions of its layers in each trace, and the tokens that pass while it runs."""

  def _layers(self, params, tokens, *rest, **options):
    self.shapes.append(tokens.shape)
    return super()._layers(params, tokens, *rest, **options)

  def prefill(self, params, tokens, mask):
    jax.debug.callback(lambda n: self.prompts.append(int(n)), mask.sum())
    return super().prefill(params, tokens, mask)

  def extend(self, params, tokens, index, *rest):
    jax.debug.callback(lambda *fed: self.fed.append(fed), tokens, index)
    return super().extend(params, tokens, index, *rest)


@pytest.fixture
def counting():
  model = Counting(CONFIG)
  for name in ("shapes", "prompts", "fed"):
    object.__setattr__(model, name, [])
  return model


def test_each_token_passes_the_model_once(params, counting):
  """The prompt of a group counts once; the last token of an episode predicts nothing."""
  rows = play(make_sampler(counting), params)
  jax.effects_barrier()
  assert counting.prompts == [sum(map(len, PROMPTS))]
  assert counting.shapes[0] == (3, 3)  # the prompts, not those of each completion
  lengths = []  # of turns and observations in turn, of each row
  for _, own, _ in rows.values():
    ends = [i for i in range(1, len(own)) if own[i] != own[i - 1]]
    lengths.append(np.diff([0, *ends, len(own)]).tolist())
  longest = [max(row[i] for row in lengths if i < len(row)) for i in range(5)]
  sizes = [tokens.shape[-1] for tokens, _ in counting.fed]
  assert (
    sizes.count(1) == sum(longest[::2]) - 3
  )  # the last token of a turn is read with what follows
  assert sizes.count(PIECE) == sum(-(-(1 + n) // PIECE) for n in longest[1::2])
  rows_read = [tokens.size // PIECE for tokens, _ in counting.fed if tokens.shape[-1] == PIECE]
  assert rows_read[0] == 3 * GROUP
  assert rows_read[-1] < rows_read[0] / 4  # one row is left, and has moved to a smaller array


def test_each_token_passes_the_model_once_in_an_update(params, counting):
  """One forward pass of the prompts and of every row but its last token, which is no input."""
  shape = (3, GROUP, LENGTH)
  mask = np.arange(LENGTH) % 3 > 0  # observations are a third of the tokens
  batch = Batch(
    prompts=jnp.ones((3, 5), jnp.int32), prompt_mask=jnp.ones((3, 5), bool),
    completions=jnp.ones(shape, jnp.int32), mask=jnp.broadcast_to(mask, shape),
    advantages=jnp.ones(shape[:2]), weights=jnp.ones(shape), sampler_logp=jnp.zeros(shape),
    temperature=1.0,
  )  # fmt: skip
  optimizer = optax.sgd(0.1)
  make_train_step(counting, "dapo", optimizer).trace(TrainState.shapes(params, optimizer), batch)
  assert counting.shapes == [(3, 5 + GROUP * (LENGTH - 1))]


def test_a_model_that_cannot_go_on_is_refused():
  class Single:
    config, head, score, prefill, decode, empty_cache = CONFIG, 0, 0, 0, 0, 0

  with pytest.raises(ValueError, match="Single has no method 'extend'"):
    make_sampler(Single())
