"""Makes the inputs of the benchmarks: prompts of a known length, and the shapes of a step.

It uses the standard library and NumPy only, since peers import it in environments of their own. The
tokenizers of these models split numbers into digits, so all prompts of a kind have the same number
of tokens.
"""

import random
import zlib
from typing import Any, NamedTuple

import numpy as np

Prompt = str | list[dict[str, str]]
# Forms of the weights while sampling: as trained, with `rollout.weights=int8`, and with adapters of
# rank 16 beside a base of each `lora.quantize`.
ADAPTED = "adapters-"
FORMS = ("trained", "int8", *(ADAPTED + scheme for scheme in ("int8", "nf4", "file")))


class Setting(NamedTuple):
  """Describes the shape of a step: P prompts, G completions of exactly T tokens each.

  Attributes:
    kind: kind of the prompts, see `make_prompts`.
    prompts, group, tokens: P, G and T.
    title: description for the output.
  """

  kind: str
  prompts: int
  group: int
  tokens: int
  title: str


SETTINGS = {
  "two-shot": Setting("two-shot", 8, 8, 6, "8 x 8 x 6, two solved examples in the prompt"),
  "chat": Setting("chat", 4, 8, 32, "4 x 8 x 32, chat prompts"),
  "eight-shot": Setting("eight-shot", 4, 8, 32, "4 x 8 x 32, eight solved examples in the prompt"),
  "smallest": Setting("two-shot", 2, 2, 3, "2 x 2 x 3, a smoke test"),
}


def make_prompts(kind: str, count: int, seed: int = 0) -> list[Prompt]:
  """Returns `count` prompts of a kind, the same at every call.

  Args:
    kind: `two-shot` or `eight-shot` (plain text with solved examples), or `chat` (messages).
    count: number of prompts.
    seed: seed of the numbers to add.
  """
  generator = random.Random(f"{kind} {seed}")
  digits, examples = {"two-shot": (2, 2), "eight-shot": (4, 8), "chat": (2, 0)}[kind]

  def numbers() -> tuple[int, int]:
    # Below half of the next power of ten, so that a sum has as many digits as its terms.
    return tuple(generator.randrange(10 ** (digits - 1), 5 * 10 ** (digits - 1)) for _ in range(2))

  def make_prompt() -> Prompt:
    solved = "".join(f"{a} + {b} = {a + b}\n" for a, b in (numbers() for _ in range(examples)))
    a, b = numbers()
    if kind == "chat":
      problem = f"State the final answer to the following arithmetic problem: {a} + {b} ="
      return [{"role": "user", "content": problem}]
    task = "Work out each sum and write it after its equals sign.\n" if examples > 2 else ""
    return f"{task}{solved}{a} + {b} ="

  return [make_prompt() for _ in range(count)]


def reward(prompts: list[Prompt], completions: list[Any], **columns: Any) -> list[float]:
  """Returns the checksum of each completion, scaled to [0, 1).

  Different completions get different rewards, so no group is zero-variance and no engine can skip
  a group.
  """
  texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
  return [zlib.crc32(text.encode()) / 2**32 for text in texts]


def head_inputs(*, batch: int, tokens: int, width: int, vocab: int) -> tuple[Any, Any, Any, Any]:
  """Returns random hidden states [B, T, D], head [V, D], tokens [B, T] and weights [B, T].

  Args:
    batch, tokens, width, vocab: B, T, D and V.
  """
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((batch, tokens, width), np.float32)
  head = rng.standard_normal((vocab, width), np.float32) / np.float32(width**0.5)
  token_ids = rng.integers(0, vocab, (batch, tokens), np.int32)
  return hidden, head, token_ids, rng.standard_normal((batch, tokens), np.float32)
