"""Reads preference pairs from files, folders or data sets of the hub, and checks every row.

    {"prompt": "12 + 34 =", "chosen": "46", "rejected": "It is 46.", "margin": 2}
    {"chosen": [{"role": "user", "content": "Hi"}, ...], "rejected": [...]}

Texts are encoded as rewards are computed later, by `Tokenizer.encode_exchange`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from grpo_jax.reward_model.scoring import scored_ids
from grpo_jax.tasks.files import Row, open_rows
from grpo_jax.tasks.messages import plain_messages
from grpo_jax.tasks.table import digest_of, key_of, make_splits
from grpo_jax.tokens import AnyTokenizer, ByteTokenizer, Messages, beyond_model

COLUMNS = ("chosen", "rejected")
Text = str | Messages


@dataclasses.dataclass(frozen=True)
class Pair:
  """One preference pair as token ids.

  Attributes:
    prefix: what both texts begin with.
    rests: the rest of the chosen and of the rejected text.
    margin: difference that their rewards should have, in reward units.
    key: identifies the prompt. No key is in both splits.
  """

  prefix: Int32[np.ndarray, "n"]
  rests: tuple[Int32[np.ndarray, "c"], Int32[np.ndarray, "r"]]
  margin: float
  key: str

  @property
  def tokens(self) -> int:
    """The number of tokens that are computed for it, without padding."""
    return len(self.prefix) + sum(map(len, self.rests))


@dataclasses.dataclass(frozen=True)
class PairData:
  """Preference pairs that were read and checked.

  Attributes:
    splits: pairs by split, "train" and "eval".
    files: the files that they are from.
    left_out: a sentence about each pair that was left out.
  """

  splits: dict[str, Sequence[Pair]]
  files: list[str]
  left_out: list[str]


class UnusablePairError(ValueError):
  """Reports a pair that a reward model cannot learn from: two equal texts, or one too long."""


@dataclasses.dataclass(frozen=True)
class PairReader:
  """Turns rows into pairs.

  Attributes:
    tokenizer: of the model.
    pad_id: padding token of the model; a text is scored before those at its end.
    max_length: longest text in tokens.
    key: path of the column that identifies a prompt; None: the prompt.
  """

  tokenizer: AnyTokenizer
  pad_id: int
  max_length: int
  key: str | None = None

  def read(self, row: Row, where: str) -> Pair:
    """Returns the pair in a row.

    Raises:
      UnusablePairError: the texts are equal, or one is too long.
      ValueError: the row is something else than a pair. Both errors begin with `where`.

    Example:
      >>> from grpo_jax.tokens import ByteTokenizer
      >>> reader = PairReader(ByteTokenizer(), pad_id=256, max_length=64)
      >>> pair = reader.read({"prompt": "1 + 1", "chosen": "2", "rejected": "22"}, "line 1")
      >>> [bytes(ids.tolist()) for ids in (pair.prefix, *pair.rests)]
      [b'user: 1 + 1\\nassistant: 2', b'\\n', b'2\\n']
    """
    for name in COLUMNS:
      if name not in row:
        raise ValueError(
          f"{where}: no column {name!r}; it has: {', '.join(row) or 'none'}. A pair has the "
          "columns 'chosen' and 'rejected', and may have 'prompt' and 'margin'"
        )
    prompt = None if row.get("prompt") is None else _text(row, "prompt", where)
    texts = [_text(row, name, where) for name in COLUMNS]
    chosen, rejected = (
      self._encode(prompt, text, name, where) for text, name in zip(texts, COLUMNS)
    )
    if chosen == rejected:
      raise UnusablePairError(
        f"{where}: 'chosen' and 'rejected' are the same {len(chosen)} tokens: {_shown(texts[0])}"
      )
    for ids, name in zip((chosen, rejected), COLUMNS):
      if len(ids) > self.max_length:
        raise UnusablePairError(
          f"{where}: {name!r} has {len(ids)} tokens with its prompt, allowed: {self.max_length}"
        )
    shared = _shared_length(chosen, rejected)
    return Pair(
      prefix=np.array(chosen[:shared], np.int32),
      rests=(np.array(chosen[shared:], np.int32), np.array(rejected[shared:], np.int32)),
      margin=_margin(row, where),
      key=key_of(row, self.key, _shared_text(*texts) if prompt is None else prompt, where),
    )

  def _encode(self, prompt: Text | None, text: Text, name: str, where: str) -> list[int]:
    has_template = self.tokenizer.chat_template or isinstance(self.tokenizer, ByteTokenizer)
    if prompt is None and isinstance(text, str) and has_template:
      raise ValueError(
        f"{where}: {name!r} is text without a prompt, and {self.tokenizer.name} has a chat "
        "template, by which rewards are computed: give chat messages, or a column 'prompt'"
      )
    if prompt is None:
      prompt = "" if isinstance(text, str) else []
    try:
      ids = scored_ids(self.tokenizer, prompt, text, self.pad_id)
    except Exception as error:  # the tokenizers library raises bare Exception
      raise ValueError(f"{where}: {name!r} cannot be encoded: {error}") from error
    if not ids:
      raise ValueError(f"{where}: {name!r} has no tokens (the tokenizer is {self.tokenizer.name})")
    if problem := beyond_model(self.tokenizer, ids):
      raise ValueError(f"{where}: {problem}; take it out of {name!r}")
    return ids


def read_pairs(
  reader: PairReader,
  path: str | Sequence[str],
  *,
  drop: bool = False,
  seed: int = 0,
  **source: Any,
) -> PairData:
  """Reads and checks all pairs, and holds out a part of the prompts.

  Args:
    reader: turns rows into pairs.
    path: a file, a folder, a data set of the hub or a list of files, as in `tasks.table`.
    drop: leave out pairs of equal texts and those that are too long, instead of raising.
    seed: selects the prompts that are held out.
    source: `eval_path`, `eval_fraction`, `split`, `eval_split`, `subset` and `revision`, as in
      `tasks.table`.

  Raises:
    ValueError: a row is not a pair, or a setting is invalid; the message has the place of the row.
    FileNotFoundError: a file does not exist, or a data set cannot be reached.
  """
  left_out: list[str] = []

  def read(files: list[str]) -> tuple[_Pairs, list[bytes]]:
    rows, pairs = open_rows(files), []
    for i in range(len(rows)):
      try:
        pairs.append(reader.read(rows[i], rows.where(i)))
      except UnusablePairError as error:
        if not drop:
          advice = "Remove the row, or leave out such pairs: --drop"
          raise UnusablePairError(f"{error}. {advice}") from error
        left_out.append(str(error))
    if not pairs:
      raise ValueError(f"{files[0]}: every pair was left out; the first one: {left_out[0]}")
    return _Pairs(pairs), [digest_of(pair.key, seed) for pair in pairs]

  splits, files = make_splits(read, path, **source)
  return PairData(splits, files, left_out)


@dataclasses.dataclass(frozen=True)
class _Pairs:
  """Pairs by number."""

  pairs: list[Pair]

  def example(self, i: int) -> Pair:
    return self.pairs[i]


def _text(row: Row, name: str, where: str) -> Text:
  """Returns a text or chat messages; ValueError for anything else."""
  value = row[name]
  if isinstance(value, str):
    return value
  if (messages := plain_messages(value)) is not None:
    return messages
  raise ValueError(
    f"{where}: {name!r} must be text, or a list of chat messages such as "
    f'{{"role": "assistant", "content": "..."}}, one of them with content, got {_shown(value)}'
  )


def _margin(row: Row, where: str) -> float:
  value = row.get("margin")
  if value is None:
    return 0.0
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not math.isfinite(value) or not 0 <= value <= 1e6:
    raise ValueError(
      f"{where}: 'margin' must be a number from 0 to 1e6, or null, got {_shown(value)}"
    )
  return float(value)


def _shared_text(chosen: Text, rejected: Text) -> Text:
  """Returns what two texts without a prompt begin with: whole messages, or whole lines.

  Of texts whose first lines differ, both are returned: no other pair has their prompt.
  """
  if isinstance(chosen, str) and isinstance(rejected, str):
    lines, _, _ = chosen[: _shared_length(chosen, rejected)].rpartition("\n")
    return lines or json.dumps([chosen, rejected])
  if isinstance(chosen, str) or isinstance(rejected, str):
    return json.dumps([chosen, rejected])
  return chosen[: _shared_length(chosen, rejected)] or json.dumps([chosen, rejected])


def _shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
  """Returns the number of items that two sequences begin with."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _shown(value: object) -> str:
  return json.dumps(value, default=str)[:200]
