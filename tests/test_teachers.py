"""Tests what a teacher has to share with the policy, and that a misfit is named."""

import pytest

from grpo_jax.teachers import open_teacher, tokenizer_difference
from grpo_jax.tokens import ByteTokenizer, load_tokenizer

LLAMA = "tests/fixtures/tiny_llama"


class Words:
  """Encodes words by a vocabulary, from the left, with pieces of at most `longest` characters."""

  def __init__(self, vocabulary, longest=9):
    self._vocabulary, self._longest = vocabulary, longest

  def vocabulary(self):
    return dict(self._vocabulary)

  def encode_plain(self, text):
    ids = []
    while text:
      size = next(n for n in range(self._longest, 0, -1) if text[:n] in self._vocabulary)
      ids.append(self._vocabulary[text[:size]])
      text = text[size:]
    return ids


def test_a_teacher_with_the_policys_tokenizer():
  teacher = open_teacher("random:tiny", ByteTokenizer(), 257, 16, ["a prompt"])
  assert (teacher.source, teacher.weights.config.layers) == ("random:tiny", 2)
  tokenizer = load_tokenizer(LLAMA)
  assert open_teacher(LLAMA, tokenizer, tokenizer.vocab_size, 16).source == LLAMA


def test_a_saved_byte_tokenizer_is_the_same(tmp_path):
  ByteTokenizer().save(tmp_path)
  saved = load_tokenizer_of(tmp_path)
  assert tokenizer_difference(ByteTokenizer(), saved, ["café", "a b"]) == ""
  assert tokenizer_difference(saved, ByteTokenizer(), ["café", "a b"]) == ""


def load_tokenizer_of(folder):
  """Loads a tokenizer from a folder that holds no weights."""
  (folder / "config.json").write_text('{"eos_token_id": 256}')
  return load_tokenizer(str(folder))


def test_a_token_with_another_id_is_a_difference():
  own = Words({"a": 0, "b": 1})
  assert (
    tokenizer_difference(own, Words({"a": 0, "c": 1}), []) == "token 1 is 'b' here and 'c' there"
  )
  assert tokenizer_difference(own, Words({"a": 0}), []) == "token 1 is 'b' here and not there"
  assert tokenizer_difference(own, Words({"a": 0, "b": 1, "c": 2}), ["ab"]) == ""


def test_another_way_to_cut_the_same_vocabulary_is_a_difference():
  vocabulary = {"a": 0, "b": 1, "ab": 2}
  difference = tokenizer_difference(Words(vocabulary), Words(vocabulary, 1), ["b", "abab"])
  assert difference == "'abab' is encoded as [2, 2] here and as [0, 1, 0, 1] there"


def test_misfits_are_named():
  with pytest.raises(ValueError, match=r"tiny_llama' has another tokenizer than the policy: token"):
    open_teacher(LLAMA, ByteTokenizer(), 257, 16)
  with pytest.raises(ValueError, match=r"'random:tiny' has 257 ids and the policy 300"):
    open_teacher("random:tiny", ByteTokenizer(), 300, 16)
  with pytest.raises(ValueError, match=r"has a context of \d+ tokens, and prompts .* 1000000"):
    open_teacher("random:tiny", ByteTokenizer(), 257, 1_000_000)
  with pytest.raises(ValueError, match=r"tiny_llama_reward' is a classification model"):
    open_teacher(f"{LLAMA}_reward", ByteTokenizer(), 257, 16)
  with pytest.raises((ValueError, FileNotFoundError), match="missing"):
    open_teacher("missing/model", ByteTokenizer(), 257, 16)
