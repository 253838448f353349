"""What a task is.

A task is where examples come from, how the prompt looks, and how an answer is scored. Everything
here is plain Python on the host; the device is never touched.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Prompt = str | list[dict[str, str]]
RewardFunction = Callable[..., Any]
"""Called by keyword, `f(prompts=..., completions=..., **columns) -> list[float | None]`."""
StepRewards = Callable[..., Sequence[Sequence[tuple[int, float]]]]
"""Called in the same way; for each completion the (end, reward) of its steps, in order.

The end of a step is the number of characters of the completion up to and including it.
"""


@dataclass(frozen=True)
class Example:
  """One problem: its prompt (text or chat messages), what the rewards need, and its identity.

  `key` says which problem this is, whatever the wording around it (for a sum, `"3 + 4"`): no key is
  in both the training and the evaluation split.
  """

  prompt: Prompt
  columns: Mapping[str, Any]
  key: str


@dataclass(frozen=True)
class Task:
  """Examples by split ("train", "eval"), weighted rewards, and what counts as a right answer.

  `rewards` maps a name to (function, weight). `accuracy` is a function of the same form that gives
  1.0 exactly when the answer is right. Generation ends where a string of `stop` appears.
  `answer` finds the answer in a completion (None = there is none): evaluation takes the majority
  over them. `step_rewards` rewards the steps of a completion, for algorithms that use that.
  """

  name: str
  splits: Mapping[str, Sequence[Example]]
  rewards: Mapping[str, tuple[RewardFunction, float]]
  accuracy: RewardFunction
  stop: tuple[str, ...] = ()
  answer: Callable[[str], Hashable | None] | None = None
  step_rewards: StepRewards | None = None


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
  """The error for a name that is not in a table: the close matches first, then what there is.

  A long table is listed only when nothing in it comes close.

  >>> print(unknown("reward", "exactt", ["exact", "score"]))
  unknown reward 'exactt': did you mean 'exact'? Known (2): exact, score
  """
  names = sorted(known)
  close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
  hint = f": did you mean {' or '.join(map(repr, close))}?" if close else "."
  if close and len(names) > 40:
    return ValueError(f"unknown {what} {name!r}{hint} ({len(names)} are known)")
  return ValueError(f"unknown {what} {name!r}{hint} Known ({len(names)}): {', '.join(names)}")


def __getattr__(name: str) -> Any:
  """Finds what moved to `rewards/scoring.py` under its old name here."""
  from grpo_jax.tasks.rewards import scoring

  if name in ("RewardError", "check_batch", "check_signature", "score", "shown", "weighted_sum"):
    return getattr(scoring, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
