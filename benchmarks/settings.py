"""What the benchmarks run on: prompts of a known length, and the three shapes of a step.

Standard library and NumPy only: peers read the same table in environments of their own. Tokenizers
of these models split numbers into digits, so that all prompts of one kind have as many tokens.
"""

import random
import zlib
from typing import Any, NamedTuple

import numpy as np

Prompt = str | list[dict[str, str]]


class Setting(NamedTuple):
  """Shape of a step: P prompts, G completions of exactly T tokens each."""

  kind: str  # of prompts
  prompts: int
  group: int
  tokens: int
  what: str


SETTINGS = {
  "two-shot": Setting("two-shot", 8, 8, 6, "8 x 8 x 6, two solved examples in the prompt"),
  "chat": Setting("chat", 4, 8, 32, "4 x 8 x 32, chat prompts"),
  "eight-shot": Setting("eight-shot", 4, 8, 32, "4 x 8 x 32, eight solved examples in the prompt"),
  "smallest": Setting("two-shot", 2, 2, 3, "2 x 2 x 3, to see that everything runs"),
}


def make_prompts(kind: str, count: int, seed: int = 0) -> list[Prompt]:
  """`count` prompts of kind `two-shot`, `eight-shot` (plain text) or `chat` (messages)."""
  draw = random.Random(f"{kind} {seed}")
  digits, examples = {"two-shot": (2, 2), "eight-shot": (4, 8), "chat": (2, 0)}[kind]

  def numbers() -> tuple[int, int]:
    # Below half of the next power of ten: sums have as many digits as their terms.
    return tuple(draw.randrange(10 ** (digits - 1), 5 * 10 ** (digits - 1)) for _ in range(2))

  def one() -> Prompt:
    solved = "".join(f"{a} + {b} = {a + b}\n" for a, b in (numbers() for _ in range(examples)))
    a, b = numbers()
    if kind == "chat":
      problem = f"State the final answer to the following arithmetic problem: {a} + {b} ="
      return [{"role": "user", "content": problem}]
    task = "Work out each sum and write it after its equals sign.\n" if examples > 2 else ""
    return f"{task}{solved}{a} + {b} ="

  return [one() for _ in range(count)]


def reward(prompts: list[Prompt], completions: list[Any], **columns: Any) -> list[float]:
  """A number in [0, 1) made of each text: any two different completions of a group differ.

  So every group has a gradient, and no engine can leave one out.
  """
  texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
  return [zlib.crc32(text.encode()) / 2**32 for text in texts]


def head_inputs(*, batch: int, tokens: int, width: int, vocab: int) -> tuple[Any, Any, Any, Any]:
  """Hidden states [B, T, D], head [V, D], tokens [B, T] and weights [B, T], float32 and int32."""
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((batch, tokens, width), np.float32)
  head = rng.standard_normal((vocab, width), np.float32) / np.float32(width**0.5)
  chosen = rng.integers(0, vocab, (batch, tokens), np.int32)
  return hidden, head, chosen, rng.standard_normal((batch, tokens), np.float32)
