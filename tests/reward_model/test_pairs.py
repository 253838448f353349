"""Tests how rows become preference pairs, and what is said about rows that do not."""

import json
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.reward_model.pairs import PairReader, read_pairs
from grpo_jax.tokens import ByteTokenizer, load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
USER = {"role": "user", "content": "1 + 1"}
TWO, THREE = ({"role": "assistant", "content": text} for text in "23")
BYTES = PairReader(ByteTokenizer(), pad_id=256, max_length=64)


def llama(**options):
  tokenizer = load_tokenizer(str(FIXTURES / "tiny_llama"))
  return PairReader(tokenizer, tokenizer.pad_id, 64, **options)


def texts(pair):
  """Returns both texts of a pair of bytes."""
  return [bytes(np.concatenate([pair.prefix, rest]).tolist()).decode() for rest in pair.rests]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


# --- rows that are pairs --------------------------------------------------------------------------


@pytest.mark.parametrize(
  "row",
  [
    {"prompt": "1 + 1", "chosen": "2", "rejected": "3"},
    {"prompt": [USER], "chosen": [TWO], "rejected": [THREE]},
    {"prompt": [USER], "chosen": "2", "rejected": "3"},
    {"chosen": [USER, TWO], "rejected": [USER, THREE]},
    {"chosen": [USER, TWO], "rejected": [USER, THREE], "prompt": None, "margin": None},
  ],
)
def test_every_form_gives_the_same_pair(row):
  pair = BYTES.read(row, "line 1")
  assert texts(pair) == ["user: 1 + 1\nassistant: 2\n", "user: 1 + 1\nassistant: 3\n"]
  assert (bytes(pair.prefix.tolist()), pair.margin) == (b"user: 1 + 1\nassistant: ", 0.0)
  assert pair.tokens == len("user: 1 + 1\nassistant: ") + 4


def test_texts_without_a_template_are_the_prompt_and_its_continuation(tmp_path):
  folder = tmp_path / "model"
  folder.mkdir()
  for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
    (folder / name).write_bytes((FIXTURES / "tiny_llama" / name).read_bytes())
  tokenizer = load_tokenizer(str(folder))
  reader = PairReader(tokenizer, tokenizer.pad_id, 64)
  split = reader.read({"prompt": "12 + ", "chosen": "34", "rejected": "5"}, "line 1")
  whole = reader.read({"chosen": "12 + 34", "rejected": "12 + 5"}, "line 1")
  for pair in (split, whole):
    for rest, text in zip(pair.rests, ("12 + 34", "12 + 5")):
      assert [*pair.prefix, *rest] == tokenizer.encode(text)
  with pytest.raises(ValueError, match=r"line 1: 'chosen' cannot be encoded: .* has no chat"):
    reader.read({"prompt": [USER], "chosen": "2", "rejected": "3"}, "line 1")


def test_one_text_may_be_the_beginning_of_the_other():
  pair = BYTES.read({"prompt": "a", "chosen": "b\n", "rejected": "b"}, "line 1")
  assert [len(rest) for rest in pair.rests] == [1, 0]
  assert texts(pair) == ["user: a\nassistant: b\n\n", "user: a\nassistant: b\n"]


def test_padding_at_the_end_is_not_part_of_a_text():
  """The template ends with the token that pads, which transformers leaves out."""
  reader = llama()
  ids = reader.tokenizer.encode_exchange("12", "34")
  reader = PairReader(reader.tokenizer, ids[-1], 64)
  pair = reader.read({"prompt": "12", "chosen": "34", "rejected": "5"}, "line 1")
  assert [*pair.prefix, *pair.rests[0]] == ids[:-1]


def test_margins():
  row = {"prompt": "1", "chosen": "2", "rejected": "3"}
  for margin in (0, 3, 0.5):
    assert BYTES.read(row | {"margin": margin}, "line 1").margin == margin
  for margin in (-1, True, "2", [1], float("nan"), float("inf"), 1e7):
    with pytest.raises(ValueError, match=r"^line 1: 'margin' must be a number from 0 to 1e6"):
      BYTES.read(row | {"margin": margin}, "line 1")


# --- rows that are not ----------------------------------------------------------------------------

GOOD = {"prompt": "1", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"prompt": "1", "chosen": "2"}, "no column 'rejected'; it has: prompt, chosen"),
    ({}, "no column 'chosen'; it has: none"),
    (GOOD | {"chosen": 7}, "'chosen' must be text, or a list of chat messages .* got 7"),
    (GOOD | {"rejected": None}, "'rejected' must be text, .* got null"),
    (GOOD | {"prompt": [{"role": "user"}]}, "'prompt' must be text, or a list of chat messages"),
    (GOOD | {"rejected": "2"}, "'chosen' and 'rejected' are the same 21 tokens: \"2\""),
    (GOOD | {"rejected": "3" * 50}, "'rejected' has 70 tokens with its prompt, allowed: 64"),
    ({"chosen": "2", "rejected": "3"}, "'chosen' is text without a prompt, and bytes has a"),
  ],
)  # fmt: skip
def test_a_row_that_is_not_a_pair_is_named(tmp_path, row, message):
  path = write(tmp_path / "pairs.jsonl", [GOOD | {"prompt": "0"}, row, GOOD])
  with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 2: {message}"):
    read_pairs(BYTES, path)


def test_text_without_a_prompt_needs_a_tokenizer_without_a_template():
  with pytest.raises(
    ValueError, match=r"^line 1: 'chosen' is text without a prompt, and .*tiny_ll"
  ):
    llama().read({"chosen": "12", "rejected": "34"}, "line 1")


def test_a_token_that_the_model_lacks_is_named():
  reader = llama()
  reader.tokenizer.vocab_size = 5
  with pytest.raises(ValueError, match=r"line 1: .* only ids 0\.\.4; take it out of 'chosen'"):
    reader.read({"prompt": "12", "chosen": "34", "rejected": "5"}, "line 1")


# --- files ----------------------------------------------------------------------------------------


def test_pairs_that_teach_nothing_can_be_left_out(tmp_path):
  rows = [GOOD | {"prompt": str(i)} for i in range(10)]
  rows[3]["rejected"], rows[5]["chosen"] = "2", "2" * 50
  path = write(tmp_path / "pairs.jsonl", rows)
  with pytest.raises(
    ValueError, match=r"line 4: .*Remove the row, or leave out such pairs: --drop"
  ):
    read_pairs(BYTES, path)
  data = read_pairs(BYTES, path, drop=True)
  assert len(data.splits["train"]) + len(data.splits["eval"]) == 8
  assert ["line 4" in data.left_out[0], "line 6" in data.left_out[1]] == [True, True]
  with pytest.raises(ValueError, match=r"every pair was left out; the first one: .*line 1"):
    read_pairs(BYTES, write(tmp_path / "pairs.jsonl", rows[3:4]), drop=True)


def test_prompts_are_held_out_as_a_whole(tmp_path):
  rows = [GOOD | {"prompt": str(i // 3), "rejected": "x" * (i % 3)} for i in range(60)]
  data = read_pairs(BYTES, write(tmp_path / "pairs.jsonl", rows), eval_fraction=0.25)
  train, held = ({pair.key for pair in data.splits[split]} for split in ("train", "eval"))
  assert (len(data.splits["train"]), len(data.splits["eval"])) == (45, 15)
  assert not train & held
  other = read_pairs(BYTES, write(tmp_path / "pairs.jsonl", rows), eval_fraction=0.25, seed=1)
  assert {pair.key for pair in other.splits["eval"]} != held


@pytest.mark.parametrize(
  ("rows", "keys"),
  [
    ([([USER, TWO], [USER, THREE]), ([USER, THREE], [USER, TWO])], 1),
    ([([USER, TWO], [USER, THREE]), ([USER, TWO, USER, TWO], [USER, TWO, USER, THREE])], 2),
    ([([TWO], [THREE]), ([THREE], [TWO])], 2),
  ],
)
def test_the_prompt_of_messages_is_what_they_share(rows, keys):
  pairs = [BYTES.read({"chosen": a, "rejected": b}, "line 1") for a, b in rows]
  assert len({pair.key for pair in pairs}) == keys


def test_the_prompt_of_texts_is_the_lines_they_share():
  from grpo_jax.reward_model.pairs import _shared_text

  assert _shared_text("Q: 1\nA: it is 2", "Q: 1\nA: it isn't") == "Q: 1"
  assert _shared_text("ab", "ac") != _shared_text("ab", "ad")
  assert _shared_text("ab", [TWO]) != _shared_text("ac", [TWO])


def test_a_column_may_identify_the_prompt(tmp_path):
  rows = [GOOD | {"prompt": str(i), "extra": {"id": i % 4}} for i in range(12)]
  reader = PairReader(ByteTokenizer(), 256, 64, key="extra.id")
  data = read_pairs(reader, write(tmp_path / "pairs.jsonl", rows), eval_fraction=0.25)
  assert (len(data.splits["train"]), len(data.splits["eval"])) == (9, 3)
  with pytest.raises(ValueError, match=r"unknown key column \(in .*line 1\) 'id'"):
    read_pairs(PairReader(ByteTokenizer(), 256, 64, key="id"), str(tmp_path / "pairs.jsonl"))
