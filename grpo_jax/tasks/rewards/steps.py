"""Places the rewards of a completion's steps on its tokens, for process supervision."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.tasks.base import Prompt, StepRewards


class Decoder(Protocol):
  """A tokenizer that turns token ids back into text."""

  def decode(self, ids: Sequence[int]) -> str: ...


def step_arrays(
  step_rewards: StepRewards,
  tokenizer: Decoder,
  prompts: Sequence[Prompt],
  texts: Sequence[Sequence[str]],
  tokens: Int[np.ndarray, "P G T"],
  mask: Bool[np.ndarray, "P G T"],
  columns: Mapping[str, Sequence[Any]],
) -> tuple[Float[np.ndarray, "P G S"], Int[np.ndarray, "P G S"]]:
  """Returns the rewards of each completion's steps, and the index of each step's last token.

  A step ends with the token that completes its text. A step that ends beyond the text (after a stop
  string that was cut off, for example) ends with the last token.

  Args:
    step_rewards: a task's function, called once with one entry per completion.
    tokens, mask: the completions.
    columns: name -> [P], repeated for the group.

  Returns:
    (rewards, ends), padded to the completion with the most steps: NaN marks a missing step.

  Raises:
    ValueError: the function returned a wrong number of lists, or a reward that is not finite.
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
  """Returns the index of the token with which the text reaches `end` characters, by bisection."""
  low, high = 0, max(len(tokens) - 1, 0)
  while low < high:
    middle = (low + high) // 2
    if len(tokenizer.decode(tokens[: middle + 1])) >= end:
      high = middle
    else:
      low = middle + 1
  return low
