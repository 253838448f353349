"""Tests placing the rewards of steps on tokens."""

import numpy as np
import pytest

from grpo_jax.tasks.rewards.steps import step_arrays, token_at
from grpo_jax.tokens import ByteTokenizer

NAN = np.nan


def arrays(step_rewards, texts, columns=None):
  """Returns the step arrays of completions of one prompt each, encoded as bytes."""
  length = max(len(text.encode()) for text in texts)
  tokens, mask = np.zeros((len(texts), 1, length), int), np.zeros((len(texts), 1, length), bool)
  for p, text in enumerate(texts):
    ids = list(text.encode())
    tokens[p, 0, : len(ids)], mask[p, 0, : len(ids)] = ids, True
  prompts, groups = [f"prompt {p}" for p in range(len(texts))], [[text] for text in texts]
  return step_arrays(step_rewards, ByteTokenizer(), prompts, groups, tokens, mask, columns or {})


def reward_lines(prompts, completions, weight, **columns):
  """Rewards each line, a step, by its length times the weight of its problem."""
  steps = []
  for text, w in zip(completions, weight):
    ends = [i + 1 for i, character in enumerate(text) if character == "\n"]
    steps.append([(end, w * (end - start)) for start, end in zip([0, *ends], ends)])
  return steps


def test_each_step_ends_at_its_last_token_and_missing_steps_are_nan():
  rewards, ends = arrays(reward_lines, ["a\nbcd\n", "é\n", "no step"], {"weight": [1, 10, 100]})
  np.testing.assert_array_equal(rewards, [[[2, 4]], [[20, NAN]], [[NAN, NAN]]])
  assert ends[0, 0].tolist() == [1, 5]
  assert ends[1, 0, 0] == 2  # é is two tokens


def test_a_step_ends_with_the_token_that_completes_its_text():
  tokens = np.array([*"aé🙂b".encode(), 256])
  indices = [token_at(ByteTokenizer(), tokens, end) for end in range(6)]
  # a is token 0, é 1 and 2, 🙂 3 to 6, b 7. Part of a character decodes to one U+FFFD.
  assert indices[1] == 0
  assert indices[4] == 7
  assert indices[5] == 8  # beyond the text: the last token
  assert indices == sorted(indices)
  assert token_at(ByteTokenizer(), tokens[:0], 3) == 0


def test_bad_results_are_errors():
  with pytest.raises(ValueError, match="returned 1 lists for 2 completions"):
    arrays(lambda **columns: [[]], ["a", "b"])
  with pytest.raises(ValueError, match="gave nan for a step of 'b'"):
    arrays(lambda **columns: [[(1, 0.5)], [(1, NAN)]], ["a", "b"])
