"""Places the rewards of a completion's steps on its tokens, for process supervision."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.tasks.base import Columns, Prompt, StepRewards


class Decoder(Protocol):
  """A tokenizer that turns token ids back into text."""

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`."""


def step_arrays(
  step_rewards: StepRewards,
  tokenizer: Decoder,
  prompts: Sequence[Prompt],
  texts: Sequence[Sequence[str]],
  tokens: Int[np.ndarray, "P G T"],
  mask: Bool[np.ndarray, "P G T"],
  columns: Columns,
) -> tuple[Float[np.ndarray, "P G S"], Int[np.ndarray, "P G S"]]:
  """Returns the rewards of each completion's steps, and the index of each step's last token.

  A step ends with the token that completes its text. A step that ends beyond the text (after a stop
  string that was cut off, for example) ends with the last token.

  Args:
    step_rewards: the task's function, called once with one value per completion.
    tokenizer: decodes the completions.
    prompts: [P], text or chat messages.
    texts: [P][G], text of each completion.
    tokens: [P, G, T], tokens of each completion.
    mask: [P, G, T], true for the tokens of the completion.
    columns: name -> [P], repeated for the group.

  Returns:
    (rewards, ends), padded to the largest number of steps, S: NaN marks a missing step.

  Raises:
    ValueError: the function returned a wrong number of lists, or a reward that is not finite.

  Example:
    >>> from grpo_jax.tokens import ByteTokenizer
    >>> tokens = np.array([[[*b"ab."]]])
    >>> step_arrays(lambda **_: [[(2, 0.5), (3, 1.0)]], ByteTokenizer(), ["p"], [["ab."]], tokens,
    ...             tokens > 0, {})
    (array([[[0.5, 1. ]]]), array([[[1, 2]]], dtype=int32))
  """
  shape = mask.shape[:2]
  rows = [(p, g) for p in range(shape[0]) for g in range(shape[1])]
  results = step_rewards(
    prompts=[prompts[p] for p, _ in rows],
    completions=[texts[p][g] for p, g in rows],
    **{name: [values[p] for p, _ in rows] for name, values in columns.items()},
  )
  if len(results) != len(rows):
    raise ValueError(f"step_rewards returned {len(results)} lists for {len(rows)} completions")
  width = max(1, *(len(steps) for steps in results))
  rewards, ends = np.full((*shape, width), np.nan), np.zeros((*shape, width), np.int32)
  for (p, g), steps in zip(rows, results):
    own = tokens[p, g][mask[p, g]]
    for s, (end, reward) in enumerate(steps):
      if not math.isfinite(reward):
        raise ValueError(f"step_rewards gave {reward} for a step of {texts[p][g]!r:.200}")
      rewards[p, g, s], ends[p, g, s] = reward, token_at(tokenizer, own, end)
  return rewards, ends


def token_at(tokenizer: Decoder, tokens: Int[np.ndarray, "T"], end: int) -> int:
  """Returns the index of the token with which the text reaches `end` characters, by bisection.

  Example:
    >>> from grpo_jax.tokens import ByteTokenizer
    >>> token_at(ByteTokenizer(), np.array([*b"ab."]), 2)
    1
  """
  low, high = 0, max(len(tokens) - 1, 0)
  while low < high:
    middle = (low + high) // 2
    if len(tokenizer.decode(tokens[: middle + 1])) >= end:
      high = middle
    else:
      low = middle + 1
  return low
