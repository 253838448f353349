"""Tests the prompts of a policy that teaches itself: what it sees, and who has no teacher."""

import numpy as np
import pytest

from grpo_jax.demonstrations import Demonstrations
from grpo_jax.tasks.base import Example
from grpo_jax.tokens import ByteTokenizer

TOKENIZER = ByteTokenizer()
TEMPLATE = "{prompt}[{solution}]"


def text_of(tokens, mask):
  return TOKENIZER.decode(tokens[mask])


def build(examples, texts, rewards, **settings):
  show = Demonstrations(TEMPLATE, **({"length": 12} | settings))
  tokens, mask, taught = show(TOKENIZER, examples, texts, np.array(rewards, float))
  return [text_of(*pair) for pair in zip(tokens, mask)], taught.tolist(), mask


def test_the_first_solved_sibling_is_shown_to_the_others():
  examples = [Example("a", {}, "a"), Example("b", {}, "b"), Example("c", {}, "c")]
  texts = [["w", "xy", "z"]] * 3
  rewards = [[0.0, 1.0, 1.0], [0.0, 0.5, np.nan], [1.0, 0.0, np.nan]]
  prompts, taught, mask = build(examples, texts, rewards)
  assert prompts == ["a[xy]", "b", "c[w]"]
  assert taught == [[True, False, True], [False] * 3, [False, True, True]]
  assert mask[:, -1].all()  # left-padded
  assert mask.sum(-1).tolist() == [5, 1, 4]
  prompts, taught, _ = build(examples, texts, rewards, solved_from=0.5)
  assert prompts[1] == "b[xy]"
  assert taught[1] == [True, False, True]


def test_the_answer_is_shown_to_all():
  examples = [Example("a", {"answer": 17}, "a")]
  prompts, taught, _ = build(examples, [["w", "x"]], [[0.0, 1.0]], shows="answer")
  assert prompts == ["a[17]"]
  assert taught == [[True, True]]
  with pytest.raises(ValueError, match=r"'a' has no column 'answer' to show: its columns are none"):
    build([Example("a", {}, "a")], [["w"]], [[0.0]], shows="answer")


def test_a_prompt_that_is_too_long_gives_no_teacher():
  examples = [Example("abcdefgh", {}, "a"), Example("ab", {}, "b")]
  _, taught, mask = build(examples, [["w", "xyz"]] * 2, [[0.0, 1.0]] * 2, length=8)
  assert taught == [[False, False], [True, False]]
  assert mask.any(-1).all()


def test_chat_messages_keep_their_turns():
  show = Demonstrations(TEMPLATE, 8)
  turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
  assert show.prompt(turns, "1") == [turns[0], {"role": "user", "content": "a[1]"}]
  parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
  assert show.prompt(parts, "1") == [{"role": "user", "content": "a[1]"}]
  assert turns[1]["content"] == "a"


def test_braces_in_a_problem_or_a_solution_are_text():
  assert Demonstrations(TEMPLATE, 8).prompt("f{solution}", "{prompt}") == "f{solution}[{prompt}]"
  both = Demonstrations("{solution}|{prompt}|{solution}", 8)
  assert both.prompt("{x}", "{prompt}") == "{prompt}|{x}|{prompt}"


def test_settings_that_make_no_sense():
  with pytest.raises(ValueError, match=r"has no \{prompt\} and no \{solution\}"):
    Demonstrations("", 8)
  with pytest.raises(ValueError, match=r"^the template '\{prompt\}' has no \{solution\}"):
    Demonstrations("{prompt}", 8)
  with pytest.raises(ValueError, match=r"^shows is 'both', it must be 'sibling' or 'answer'"):
    Demonstrations(TEMPLATE, 8, shows="both")
