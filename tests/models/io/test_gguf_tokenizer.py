"""Tests tokenizers converted from the metadata of GGUF files."""

import pytest

from grpo_jax.models.io.gguf import open_gguf
from grpo_jax.models.io.gguf_tokenizer import make_pre_tokenizer, read_gguf_tokenizer
from tests.helpers import tiny_gguf


def read(tmp_path, **metadata):
  path = tmp_path / "model.gguf"
  tiny_gguf.write(path, **metadata)
  return read_gguf_tokenizer(open_gguf(path))


def byte_ids(text):
  return [3 + byte for byte in text.encode()]  # see tiny_gguf.TOKENS


def ids_of(tokenizer, text):
  return tokenizer.backend.encode(text).ids


def test_special_tokens_and_chat_template_come_from_the_metadata(tmp_path):
  tokenizer = read(tmp_path)
  assert tokenizer.eos_ids == [2]
  assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
  assert tokenizer.chat_template == tiny_gguf.TEMPLATE
  assert read(tmp_path, tokenizer__chat_template=None).chat_template is None


def test_smollm_splits_off_digits_although_a_merge_joins_them(tmp_path):
  tokenizer = read(tmp_path)
  assert ids_of(tokenizer, "12 + 34 = 46") == byte_ids("12 + 34 = 46")
  assert ids_of(tokenizer, "he\n\n") == [260, 261]  # the other merges apply
  assert ids_of(read(tmp_path, tokenizer__ggml__pre="gpt-2"), "12") == [259]


def test_a_bos_id_is_added_if_the_metadata_says_so(tmp_path):
  assert ids_of(read(tmp_path, tokenizer__ggml__add_bos_token=True), "a") == [1, *byte_ids("a")]
  assert ids_of(read(tmp_path, tokenizer__ggml__add_bos_token=False), "a") == byte_ids("a")


def test_the_end_of_a_turn_ends_a_completion_too(tmp_path):
  assert read(tmp_path, tokenizer__ggml__eot_token_id=0).eos_ids == [2, 0]
  assert read(tmp_path, tokenizer__ggml__eos_token_id=None).eos_ids == []


def test_control_tokens_are_special_and_tokens_of_users_are_not(tmp_path):
  added = read(tmp_path).backend.get_added_tokens_decoder()
  assert {i: token.special for i, token in added.items()} == {0: True, 1: True, 2: True, 262: False}


@pytest.mark.parametrize(
  ("name", "digits"), [("llama-bpe", ["123", "45"]), ("qwen2", ["1", "2", "3", "4", "5"])]
)
def test_text_is_split_into_pieces_before_merges(name, digits):
  """By hand from the expression: words with the character before them, digits, signs, spaces."""
  text = "It's 12345 naïve!?\n\n   x\t(y"
  spans = [span for _, span in make_pre_tokenizer(name).pre_tokenize_str(text)]
  rest = [" naïve", "!?\n\n", "  ", " x", "\t", "(y"]
  assert [text[start:end] for start, end in spans] == ["It", "'s", " ", *digits, *rest]


@pytest.mark.parametrize(
  ("metadata", "message"),
  [
    ({"tokenizer__ggml__model": "llama"}, "kind 'llama' .* supported: 'gpt2' with 'smollm', 'gp"),
    ({"tokenizer__ggml__pre": "deepseek"}, "pre-tokenizer 'deepseek'; supported"),
    ({"tokenizer__ggml__merges": None}, r"no tokenizer\.ggml\.merges"),
  ],
)
def test_unsupported_tokenizers_are_errors(tmp_path, metadata, message):
  with pytest.raises(ValueError, match=message) as caught:
    read(tmp_path, **metadata)
  assert str(tmp_path / "model.gguf") in str(caught.value)


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"tokenizer__ggml__eos_token_id": 264}, r"eos_token_id must be an id in 0\.\.263, got '264'"),
    ({"tokenizer__ggml__padding_token_id": "2"}, "padding_token_id must be an id"),
    ({"tokenizer__ggml__merges": ["x"]}, "the tokenizer in the metadata cannot be read"),
    ({"tokenizer__ggml__token_type": [1, 2]}, "the tokenizer in the metadata cannot be read"),
    ({"tokenizer__ggml__pre": 5}, "pre-tokenizer 5"),
  ],
)
def test_a_damaged_tokenizer_is_named(tmp_path, entry, message):
  with pytest.raises(ValueError, match=message) as caught:
    read(tmp_path, **entry)
  assert str(tmp_path) in str(caught.value)
