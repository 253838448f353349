"""Tests that a conversation goes on by the tokens that the chat template would have written."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_jax.observations import ObservationEncoder, transcript
from grpo_jax.tokens import ByteTokenizer, Tokenizer

CHATML = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
  "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% endfor %}<|im_end|>\n"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Shows what the assistant thought in its last turn only, as some families do.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else '' }}")

# Adds an empty thought to the last turn, if it has none of its own.
THINKING = CHATML.replace(
  "{{ m.content }}",
  "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
  "<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)


def make_tokenizer(template):
  """Returns a tokenizer with one id per character, and three special tokens."""
  characters = [chr(i) for i in range(32, 127)] + ["\n"]
  vocab = {character: i for i, character in enumerate(characters)}
  backend = Backend(models.WordLevel(vocab, unk_token="?"))
  backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
  fast = PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=special,
    chat_template=template, clean_up_tokenization_spaces=False,
  )  # fmt: skip
  ends = fast.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
  return Tokenizer(fast, ends, "letters"), ends


@pytest.fixture(scope="module")
def chatml():
  return make_tokenizer(CHATML)


def shown(tokenizer, ids):
  return "".join(tokenizer.token(i) for i in ids)


def test_a_turn_is_continued_as_the_template_writes_it(chatml):
  tokenizer, (im_end, _) = chatml
  ids = ObservationEncoder(tokenizer)("Higher", last=im_end, chat=True)
  assert shown(tokenizer, ids) == ("\n<|im_start|>user\nHigher<|im_end|>\n<|im_start|>assistant\n")
  prompt = [{"role": "user", "content": "Guess"}]
  row = tokenizer.chat(prompt) + tokenizer.encode_plain("5") + [im_end] + ids
  whole = [*prompt, {"role": "assistant", "content": "5"}, {"role": "user", "content": "Higher"}]
  assert row == tokenizer.chat(whole)


def test_a_turn_that_ended_otherwise_is_ended_for_the_template(chatml):
  """A stop string, or another id that ends a text: the template's own token comes after it."""
  tokenizer, (_, end_of_text) = chatml
  for last in (end_of_text, tokenizer.encode_plain("5")[0]):
    ids = ObservationEncoder(tokenizer)("Higher", last=last, chat=True)
    assert shown(tokenizer, ids).startswith("<|im_end|>\n<|im_start|>user\nHigher")


def test_messages_of_tools_follow_a_turn_that_called_one(chatml):
  tokenizer, (im_end, _) = chatml
  messages = [{"role": "tool", "content": "84"}, {"role": "tool", "content": "!"}]
  ids = ObservationEncoder(tokenizer)(messages, last=im_end, chat=True)
  assert shown(tokenizer, ids) == (
    "\n<|im_start|>tool\n84<|im_end|>\n<|im_start|>tool\n!<|im_end|>\n<|im_start|>assistant\n"
  )


def test_an_empty_observation_starts_the_next_turn(chatml):
  tokenizer, (im_end, _) = chatml
  ids = ObservationEncoder(tokenizer)("", last=im_end, chat=True)
  assert shown(tokenizer, ids) == "\n<|im_start|>assistant\n"


def test_a_template_without_ending_tokens():
  ids = ObservationEncoder(ByteTokenizer())("Higher", last=53, chat=True)
  assert bytes(ids).decode() == "\nuser: Higher\nassistant: "


def test_a_template_that_rewrites_earlier_turns_is_refused():
  tokenizer, (im_end, _) = make_tokenizer(FORGETFUL)
  with pytest.raises(ValueError, match="shows earlier turns otherwise"):
    ObservationEncoder(tokenizer)("Higher", last=im_end, chat=True)


def test_a_template_that_gives_the_last_turn_an_empty_thought():
  tokenizer, (im_end, _) = make_tokenizer(THINKING)
  ids = ObservationEncoder(tokenizer)([{"role": "tool", "content": "84"}], last=im_end, chat=True)
  assert shown(tokenizer, ids) == "\n<|im_start|>tool\n84<|im_end|>\n<|im_start|>assistant\n"
  call = {"role": "assistant", "content": "<think>\nHm\n</think>\n\n", "tool_calls": []}
  prompt = [{"role": "user", "content": "Guess"}]
  row = tokenizer.chat(prompt) + tokenizer.encode_plain(call["content"]) + [im_end] + ids
  assert row == tokenizer.chat([*prompt, call, {"role": "tool", "content": "84"}])


def test_messages_after_a_text_are_refused():
  with pytest.raises(ValueError, match="the prompt is text"):
    ObservationEncoder(ByteTokenizer())([{"role": "tool", "content": "1"}], last=5, chat=False)


def test_a_real_tokenizer_adds_nothing_to_text():
  path = Path("tests/fixtures/tiny_llama")
  from grpo_jax.tokens import load_tokenizer

  tokenizer = load_tokenizer(str(path))
  ids = ObservationEncoder(tokenizer)("ab", last=5, chat=False)
  assert tokenizer.decode(ids) == "ab"
  assert tokenizer.bos_id not in ids


def test_a_transcript_alternates():
  messages = transcript(["a", "b"], [[{"role": "tool", "content": "1"}]])
  assert [m["role"] for m in messages] == ["assistant", "tool", "assistant"]
