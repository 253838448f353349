"""Builds the prompts of a policy that teaches itself: the same problem, with a solution beside it.

The policy that sees a solution is a better policy. Its log-probs of the completions that the policy
wrote without the solution are those of a teacher.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int32

from grpo_jax.tasks.base import Example, Prompt
from grpo_jax.tasks.messages import plain_messages
from grpo_jax.tokens import AnyTokenizer, encode_prompt


@dataclasses.dataclass(frozen=True)
class Demonstrations:
  """Says which solution the teacher sees, and how.

  Attributes:
    template: the text of the teacher's prompt, with {prompt} and {solution}. Of chat messages, it
      replaces the content of the last turn.
    length: tokens of the teacher's prompt at most; a longer one gives its completions no teacher.
    shows: "sibling", the first completion of the group that is solved, or "answer", the column
      `answer` of the problem.
    solved_from: smallest reward of a solved completion.

  Raises:
    ValueError: a field has another value, or the template lacks a part.
  """

  template: str
  length: int
  shows: str = "sibling"
  solved_from: float = 1.0

  def __post_init__(self) -> None:
    if self.shows not in ("sibling", "answer"):
      raise ValueError(f"shows is {self.shows!r}, it must be 'sibling' or 'answer'")
    missing = [part for part in ("{prompt}", "{solution}") if part not in self.template]
    if missing:
      raise ValueError(f"the template {self.template!r} has no {' and no '.join(missing)}")

  def __call__(
    self,
    tokenizer: AnyTokenizer,
    examples: Sequence[Example],
    texts: Sequence[Sequence[str]],
    rewards: Float[np.ndarray, "P G"],
  ) -> tuple[Int32[np.ndarray, "P M"], Bool[np.ndarray, "P M"], Bool[np.ndarray, "P G"]]:
    """Returns the teacher's prompts, left-padded, their masks, and which completions have one.

    A completion is never shown itself: the sibling that is shown has no teacher, and neither have
    the completions of a group that has none.

    Args:
      examples: [P].
      texts: completions, [P][G].
      rewards: NaN = not scored.

    Raises:
      ValueError: the column `answer` is missing where it is to be shown.
    """
    tokens = np.full((len(examples), self.length), tokenizer.pad_id, np.int32)
    mask, taught = np.zeros(tokens.shape, bool), np.zeros(rewards.shape, bool)
    for p, example in enumerate(examples):
      solution, own = self._solution(example, texts[p], rewards[p])
      prompt = example.prompt if solution is None else self.prompt(example.prompt, solution)
      ids = encode_prompt(tokenizer, prompt)
      if len(ids) > self.length:  # any prompt: its completions have no teacher
        ids, solution = ids[-self.length :], None
      tokens[p, self.length - len(ids) :], mask[p, self.length - len(ids) :] = ids, True
      taught[p] = solution is not None
      if own is not None:
        taught[p, own] = False
    return tokens, mask, taught

  def _solution(
    self, example: Example, texts: Sequence[str], rewards: Float[np.ndarray, "G"]
  ) -> tuple[str | None, int | None]:
    """Returns the solution to show, and the index of the completion that it is."""
    if self.shows == "answer":
      if "answer" not in example.columns:
        raise ValueError(
          f"the problem {example.key!r} has no column 'answer' to show: its columns are "
          f"{', '.join(example.columns) or 'none'}; show a sibling instead"
        )
      return str(example.columns["answer"]), None
    solved = np.flatnonzero(np.nan_to_num(rewards, nan=-np.inf) >= self.solved_from)
    return (texts[solved[0]], int(solved[0])) if len(solved) else (None, None)

  def prompt(self, prompt: Prompt, solution: str) -> Prompt:
    """Returns the prompt of the teacher.

    Example:
      >>> Demonstrations("{solution}; {prompt}", 16).prompt("2+2=", "1+1=2")
      '1+1=2; 2+2='
    """

    def fill(text: str) -> str:
      before, after = self.template.split("{prompt}", 1)
      return before.replace("{solution}", solution) + text + after.replace("{solution}", solution)

    if isinstance(prompt, str):
      return fill(prompt)
    *turns, last = plain_messages([*prompt])
    return [*turns, {**last, "content": fill(last["content"])}]
