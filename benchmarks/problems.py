"""Makes the problems that engines learn, and judges their answers.

It uses the standard library only, since peers import it in environments of their own.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Prompt = str | list[dict[str, str]]
NUMBER = re.compile(r"\d+(?:,\d{3})*")


class Task(NamedTuple):
  """Describes a task: sums of two two-digit numbers in one of two formats.

  Attributes:
    chat: messages, answered with a sentence; otherwise text after two solved sums, answered on the
      same line.
    prompts, group, tokens: P, G and T of a step.
    steps: of the training, after which the learning rate is 0.
    temperature: of the sampling.
    learning_rate: of all engines, unless another one is asked for.
    title: description for the output.
  """

  chat: bool
  prompts: int
  group: int
  tokens: int
  steps: int
  temperature: float
  learning_rate: float
  title: str


TASKS = {
  "sums": Task(False, 32, 8, 5, 70, 1.3, 4e-5, "sums after two solved ones, 32 x 8 x 5"),
  "chat": Task(True, 16, 8, 48, 40, 1.0, 2e-5, "sums in the chat format, 16 x 8 x 48"),
  "smallest": Task(False, 2, 2, 3, 2, 1.0, 1e-5, "sums, 2 x 2 x 3, a smoke test"),
}


def make_problems(task: Task, train: int = 3800, held_out: int = 200) -> list[list[dict[str, Any]]]:
  """Returns the training problems and the held-out ones, the same at every call.

  A problem is a pair of numbers in either order, and is in one list only.

  Returns:
    Two lists of {"prompt", "answer"}.
  """
  generator = random.Random(0)
  pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
  generator.shuffle(pairs)
  solved, pairs = pairs[:2], pairs[2:]
  rows = []
  for a, b in pairs[: train + held_out]:
    if generator.random() < 0.5:
      a, b = b, a
    rows.append({"prompt": _prompt(task, (a, b), solved), "answer": str(a + b)})
  return [rows[held_out:], rows[:held_out]]


def _prompt(task: Task, pair: tuple[int, int], solved: Sequence[tuple[int, int]]) -> Prompt:
  a, b = pair
  if task.chat:
    problem = f"State the final answer to the following arithmetic problem: {a} + {b} ="
    return [{"role": "user", "content": problem}]
  return "".join(f"{x} + {y} = {x + y}\n" for x, y in solved) + f"{a} + {b} ="


def is_right(text: str, answer: str) -> bool:
  """Returns whether the last number of a text is the answer.

  Example:
    >>> is_right(" 51", "51"), is_right("The sum 17 + 34 is 51.", "51"), is_right(" 5", "51")
    (True, True, False)
  """
  numbers = NUMBER.findall(text)
  return bool(numbers) and numbers[-1].replace(",", "") == answer


def reward(
  prompts: Sequence[Prompt],
  completions: Sequence[str | list[dict[str, str]]],
  answer: Sequence[str],
  **columns: Any,
) -> list[float]:
  """Returns 1.0 for each right completion and 0.0 for each other.

  Only the first line counts after a prompt that is text. A completion is text or, as TRL passes
  them, messages.
  """
  rewards = []
  for prompt, completion, gold in zip(prompts, completions, answer):
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    line = text.strip().partition("\n")[0] if isinstance(prompt, str) else text
    rewards.append(float(is_right(line, gold)))
  return rewards


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
  """Writes problems as JSON lines."""
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: str | Path) -> list[dict[str, Any]]:
  """Reads problems from JSON lines."""
  return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
