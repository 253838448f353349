"""Tests what is written down of tokens: their text, and the numbers of the sampler."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from grpo_jax import train
from grpo_jax.config import load
from grpo_jax.episodes import Episodes
from grpo_jax.sampling.sampler import Generated
from grpo_jax.token_records import Pieces, rounded, token_records
from grpo_jax.tokens import ByteTokenizer, Tokenizer, load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
TEXTS = ["the sum of 12 and 3 is\n\n15.", " leading and  double spaces ", "naïve, don't!"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(text):
  tokenizer = load_tokenizer(str(FIXTURES / "tiny_llama"))
  ids = tokenizer.encode(text)
  pieces = Pieces(tokenizer)(ids)
  assert len(pieces) == len(ids)
  if text.isascii():
    assert "".join(pieces) == text == tokenizer.decode(ids)


def test_a_space_before_a_word_belongs_to_its_token():
  """Also where a decoder drops it at the beginning of a text, as SentencePiece does."""
  backend = Backend(WordLevel({"▁the": 0, "▁sum": 1, "s": 2, "</s>": 3, "▁a": 4}, unk_token="</s>"))
  backend.pre_tokenizer, backend.decoder = Metaspace(), MetaspaceDecoder()
  fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
  tokenizer = Tokenizer(fast, [3], "words")
  assert tokenizer.decode([1]) == "sum"
  assert Pieces(tokenizer)([0, 1, 2]) == [" the", " sum", "s"]


def test_tokens_without_text_have_names():
  tokenizer = ByteTokenizer()
  assert Pieces(tokenizer)([72, 0xC3, 0xA9, 256, 10]) == [
    "H",
    "\ufffd",
    "\ufffd",
    "<|endoftext|>",
    "\n",
  ]
  assert tokenizer.token(72) == "<0x48>"
  tokenizer = load_tokenizer(str(FIXTURES / "tiny_llama"))
  eos = tokenizer.eos_ids[0] if isinstance(tokenizer.eos_ids, tuple) else min(tokenizer.eos_ids)
  assert Pieces(tokenizer)([eos]) == [tokenizer.token(eos)]


def arrays(**changes):
  shape = (1, 2, 4)
  tokens = np.array([[[97, 98, 256, 0], [99, 100, 101, 102]]])
  mask = np.array([[[True, True, True, False], [True] * 4]])
  numbers = np.arange(8.0).reshape(shape)
  values = {
    "prompts": np.zeros((1, 1), int), "prompt_mask": np.ones((1, 1), bool), "tokens": tokens,
    "mask": mask, "ended": mask[..., -1], "logp": -numbers / 3, "entropy": numbers / 7,
    "texts": [["ab", "cdef"]],
  }  # fmt: skip
  return values | changes


def test_records_of_completions():
  records = token_records(Generated(**arrays()), ByteTokenizer())
  assert records == [
    [
      {
        "text": ["a", "b", "<|endoftext|>"],
        "logp": [0.0, -0.3333, -0.6667],
        "entropy": [0.0, 0.1429, 0.2857],
      },
      {
        "text": ["c", "d", "e", "f"],
        "logp": [-1.3333, -1.6667, -2.0, -2.3333],
        "entropy": [0.5714, 0.7143, 0.8571, 1.0],
      },
    ]
  ]


def test_observations_have_no_numbers():
  mask = np.array([[[True, False, True, False], [True, True, False, False]]])
  attended = np.array([[[True] * 3 + [False], [True, True, False, False]]])
  records = token_records(Episodes(**arrays(mask=mask, attended=attended)), ByteTokenizer())
  assert records[0][0]["text"] == ["a", "b", "<|endoftext|>"]
  assert records[0][0]["logp"] == [0.0, None, -0.6667]
  assert records[0][1]["entropy"] == [0.5714, 0.7143]


def test_what_json_cannot_hold_is_none():
  values = np.array([np.nan, np.inf, -np.inf, 0.25])
  assert rounded(values, np.ones(4, bool)) == [None, None, None, 0.25]


@pytest.mark.slow
def test_a_run_says_how_an_update_changed_each_token(tmp_path):
  """With a large step, tokens of good completions become more probable than those of bad ones."""
  options = ("steps=2", "log.ratios=true", "log.tokens_every=1", "optimizer.learning_rate=0.01")
  small = ("rewards.workers=0", "log.samples=0", "task.settings.eval_size=0")
  train.run(load("experiments/tiny.py", [f"--config.{o}" for o in (*options, *small)]), tmp_path)
  lines = (tmp_path / "samples/step_000000.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  change = [(np.sign(row["advantage"]), np.log(row["tokens"]["ratio"]).mean()) for row in rows]
  good, bad = (np.mean([log for sign, log in change if sign == one]) for one in (1, -1))
  assert good > 0.01
  assert good > bad
