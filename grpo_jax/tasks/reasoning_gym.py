"""Turns any dataset of the reasoning-gym library into a task: generated, self-checking problems.

Training and evaluation are split by problem, not by seed. A generator with few distinct problems
repeats them for every seed, and a rise in accuracy would then only show memorization.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

from grpo_jax import extras
from grpo_jax.environments.retries import Retries
from grpo_jax.environments.tools import ToolName, with_environment, with_tools
from grpo_jax.tasks.base import Example, Prompt, RewardFunction, Task, unknown_name
from grpo_jax.tasks.rewards import foreign
from grpo_jax.tasks.rewards.answers import final, number, plain

FORMATS = ("completion", "chat")
REWARDS = ("exact", "score")
CHUNK = 1000  # problems per generator; the next chunk uses another seed
ARITHMETIC = re.compile(r"[\d\s.+\-*/()]+")
NUMBER = re.compile(r"(?<![\d.])[+-]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
# A problem as reasoning-gym returns it, with the keys "question", "answer" and "metadata".
Entry: TypeAlias = dict[str, Any]
# (solved examples, problem) -> prompt.
Render: TypeAlias = Callable[[Sequence[Entry], Entry], Prompt]


class Dataset(Protocol):
  """The methods of a reasoning-gym dataset that are used here."""

  def __getitem__(self, index: int) -> Entry:
    """Returns problem number `index`."""

  def score_answer(self, answer: str, entry: Entry) -> float:
    """Returns the score of an answer, in [0, 1]."""


MakeDataset: TypeAlias = Callable[..., Dataset]  # make(seed=..., size=...)


def reasoning_gym_task(
  dataset: str | None = None,
  config: Mapping[str, Any] | None = None,
  *,
  mixture: Sequence[Mapping[str, Any]] | None = None,
  keep: str | None = None,
  train_size: int = 1000,
  eval_size: int = 200,
  seed: int = 0,
  format: str = "completion",
  shots: int | None = None,
  system: str | None = None,
  reward: str = "exact",
  tries: int = 1,
  tools: Sequence[ToolName] = (),
  tool_settings: Mapping[str, Any] | None = None,
) -> Task:
  """Builds a task from distinct problems of one dataset, or of a weighted mixture of datasets.

  Args:
    dataset: a name such as "chain_sum".
    config: the dataset's own settings, e.g. {"min_digits": 1, "max_digits": 2}.
    mixture: instead of both, a list of {"dataset": name, "weight": share, "config": settings}.
      Each split contains the datasets in exactly these shares, evenly interleaved.
    keep: regular expression that a problem must match as a whole. It is applied to the arithmetic
      of a problem ("5 - 9") if there is any, otherwise to the question: r"\\d+ \\+ \\d+" keeps the
      sums of "chain_sum".
    train_size: number of distinct training problems. A larger size only adds problems, and leaves
      the evaluation split as it is.
    eval_size: number of distinct evaluation problems; none is a training problem.
    seed: selects the problems.
    format: "completion", text that ends in `5 - 9 =` (or `Q: ... A:` if the problem is not plain
      arithmetic) and is answered on one line, or "chat", messages for a chat template.
    shots: number of solved examples before each problem. All problems of a dataset have the same
      ones, which are in neither split. None: 2 for "completion", 0 for "chat", where each example
      is a turn.
    system: a system message, for "chat" only.
    reward: "exact", 1.0 if the dataset's `score_answer` returns 1.0 and otherwise 0.0, or "score",
      its return value, which in most datasets gives partial credit to an answer that merely
      contains the right one. Accuracy is exact in both cases.
    tries: answers to a problem. After a wrong one the model is told so, and asked again; more than
      one make an episode of several turns. Not together with `tools`.
    tools: as in `table_task`, like `tool_settings`.
    tool_settings: settings of the tools.

  Raises:
    ValueError: a name or setting is unknown or out of range, or there are fewer distinct problems
      than requested.

  Example:
    >>> task = reasoning_gym_task("chain_sum", {"max_terms": 2, "max_digits": 1}, train_size=1,
    ...                           eval_size=1, shots=0)
    >>> example = task.splits["train"][0]
    >>> eval(example.prompt.removesuffix(" =")) == int(example.columns["answer"])
    True
  """
  if format not in FORMATS:
    raise unknown_name("format", format, FORMATS)
  if reward not in REWARDS:
    raise unknown_name("reward", reward, REWARDS)
  if system is not None and format != "chat":
    raise ValueError("system is a chat message: set format='chat', or leave system out")
  shots = (2 if format == "completion" else 0) if shots is None else shots
  for name, value, minimum in (
    ("train_size", train_size, 1),
    ("eval_size", eval_size, 0),
    ("shots", shots, 0),
    ("tries", tries, 1),
  ):
    if value < minimum:
      raise ValueError(f"{name} is {value}: it must be at least {minimum}")
  parts, weights = _parse_mixture(dataset, config, mixture)
  render = _chat_renderer(system) if format == "chat" else _render_completion
  sizes = {"eval": _apportion(eval_size, weights), "train": _apportion(train_size, weights)}
  splits = _draw_splits(parts, sizes, shots, seed, render, _compile(keep))
  functions = _reward_functions(
    [(name, make()) for name, make in parts], numeric_only=format == "chat"
  )
  task = Task(
    name="reasoning_gym:" + "+".join(dict.fromkeys(name for name, _ in parts)),
    splits=splits,
    rewards={reward: (functions[reward], 1.0)},
    accuracy=functions["exact"],
    stop=("\n",) if format == "completion" else (),
    answer=number_answer if format == "chat" and _all_numeric(splits) else line_answer,
    canary="banana",
    foreign=any(name in foreign.CLEAN for name, _ in parts),
  )
  if tries > 1:
    task = with_environment(task, _retries(functions[reward], tries, format == "chat"))
    task = dataclasses.replace(task, turns=tries)
  return with_tools(task, tools, tool_settings)


# --- answers --------------------------------------------------------------------------------------


def extract_number(reply: str) -> str:
  """Returns the last number after the last "=" of a reply, "" if it does not stand alone.

  `numerals.number` says what stands alone.

  Example:
    >>> extract_number("5 - 9 is negative: 5 - 9 = -4."), extract_number("I counted 1,234 of them")
    ('-4', '1,234')
  """
  text = (final(reply) or reply).rpartition("=")[2]
  numbers, value = NUMBER.findall(plain(text)), number(text)
  return numbers[-1] if numbers and value == Fraction(numbers[-1].replace(",", "")) else ""


def line_answer(completion: str) -> str | None:
  """Returns the completion in a canonical form; None if it is empty.

  Example:
    >>> line_answer(" 1,005 "), line_answer("red,  blue"), line_answer(" ")
    ('1005', 'red, blue', None)
  """
  text = " ".join(completion.split())
  if len(text) <= 100 and NUMBER.fullmatch(text):
    return str(Fraction(text.replace(",", "")))
  return text or None


def number_answer(reply: str) -> str | None:
  """Returns the number that a reply is graded by (see `extract_number`), None if there is none.

  Example:
    >>> number_answer("That is 7 + 5 = 12.0"), number_answer("I do not know.")
    ('12', None)
  """
  return line_answer(extract_number(reply))


def _all_numeric(splits: Mapping[str, Sequence[Example]]) -> bool:
  """Returns whether all correct answers are numbers."""
  answers = [example.columns["answer"] for split in splits.values() for example in split]
  return all(isinstance(text, str) and NUMBER.fullmatch(text.strip()) for text in answers)


def _reward_functions(
  datasets: Sequence[tuple[str, Dataset]], numeric_only: bool
) -> dict[str, RewardFunction]:
  """Returns the rewards "score" and "exact" of problems that name their dataset in column `part`.

  Args:
    datasets: names and data sets of the mixture, in order.
    numeric_only: whether a numeric answer is searched for in the reply, which is prose in a chat.
  """

  def score_one(text: str, part: int, entry: Entry) -> float:
    answer, gold = text.strip(), entry["answer"]
    if numeric_only and isinstance(gold, str) and NUMBER.fullmatch(gold.strip()):
      answer = extract_number(answer)
    name, dataset = datasets[part]
    try:
      return foreign.guarded_score(name, dataset.score_answer, answer, entry)
    except Exception:  # a few datasets raise on text they cannot parse, which is a wrong answer
      return 0.0

  def score(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    part: Sequence[int],
    entry: Sequence[Entry],
    **columns: Any,
  ) -> list[float]:
    return [score_one(text, p, e) for text, p, e in zip(completions, part, entry)]

  def exact(**columns: Any) -> list[float]:
    return [float(value == 1.0) for value in score(**columns)]

  return {"score": score, "exact": exact}


def _retries(score: RewardFunction, tries: int, chat: bool) -> Retries:
  """Returns the factory of episodes in which a wrong answer may be followed by another."""

  def score_one(text: str, example: Example) -> float:
    columns = {name: [value] for name, value in example.columns.items()}
    return score(prompts=[example.prompt], completions=[text], **columns)[0]

  def feedback(text: str, example: Example) -> str | list[dict[str, str]]:
    if chat:
      return [{"role": "user", "content": "That is wrong. Try again."}]
    return "Wrong. " + example.prompt.rpartition("\n")[2]  # and the last line of the problem

  return Retries(score_one, feedback, tries)


# --- datasets and their problems ------------------------------------------------------------------


def _parse_mixture(
  dataset: str | None,
  config: Mapping[str, Any] | None,
  mixture: Sequence[Mapping[str, Any]] | None,
) -> tuple[list[tuple[str, MakeDataset]], list[float]]:
  """Returns (name, dataset factory) and weight of each dataset of the task."""
  if (dataset is None) == (not mixture):
    raise ValueError("give either dataset (a name) or mixture (a list), and not both")
  if not mixture:
    return [(dataset, _make_factory(dataset, config))], [1.0]
  if config:
    raise ValueError("config goes with dataset: in a mixture each entry has its own config")
  parts, weights = [], []
  for entry in mixture:
    for field in entry:
      if field not in ("dataset", "weight", "config"):
        raise unknown_name("field of a mixture entry", field, ("dataset", "weight", "config"))
    if "dataset" not in entry:
      raise ValueError(f"mixture entry {dict(entry)} has no 'dataset'")
    weight = float(entry["weight"]) if "weight" in entry else 1.0
    if not 0 < weight < float("inf"):
      raise ValueError(f"mixture weight of {entry['dataset']} is {weight}: it must be positive")
    parts.append((entry["dataset"], _make_factory(entry["dataset"], entry.get("config"))))
    weights.append(weight)
  return parts, weights


def _make_factory(name: str, config: Mapping[str, Any] | None) -> MakeDataset:
  """Returns `make(seed=, size=)` for a dataset after checking its name and settings."""
  extras.require("tasks", "the task reasoning_gym", "reasoning_gym")
  from reasoning_gym.factory import DATASETS, create_dataset  # lazy: takes most of a second

  names = set(DATASETS) - {"composite"}  # `mixture` replaces that one
  if name not in names:
    raise unknown_name("reasoning-gym dataset", name, names)
  settings = dict(config or {})
  fields = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
  for setting in settings:
    if setting in ("seed", "size"):
      raise ValueError(f"config of {name} sets {setting!r}: use train_size, eval_size and seed")
    if setting not in fields:
      raise unknown_name(f"setting of {name}", setting, fields)

  def make(seed: int = 0, size: int = CHUNK) -> Dataset:
    return create_dataset(name, seed=seed, size=size, **settings)

  try:
    make()
  except (AssertionError, TypeError, ValueError) as error:
    raise ValueError(f"reasoning-gym dataset {name} rejects config {settings}: {error}") from error
  return make


def _compile(keep: str | None) -> re.Pattern[str]:
  try:
    return re.compile(".*" if keep is None else keep, re.DOTALL)
  except re.error as error:
    raise ValueError(f"keep is {keep!r}, which is not a regular expression: {error}") from None


def _apportion(size: int, weights: Sequence[float]) -> list[int]:
  """Splits `size` in proportion to the weights, by the method of largest remainders."""
  exact = [size * weight / sum(weights) for weight in weights]
  counts = [int(share) for share in exact]
  by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
  for i in by_remainder[: size - sum(counts)]:
    counts[i] += 1
  return counts


def _draw_splits(
  parts: Sequence[tuple[str, MakeDataset]],
  sizes: Mapping[str, Sequence[int]],
  shots: int,
  seed: int,
  render: Render,
  keep: re.Pattern[str],
) -> dict[str, list[Example]]:
  """Draws the shots of all datasets, then "eval", then "train", without using a problem twice."""
  used: set[str] = set()
  shots_of: list[list[Entry]] = []
  splits: dict[str, list[Example]] = {}
  totals = [0] * len(parts)
  for split, counts in {"shots": [shots] * len(parts), **sizes}.items():
    examples: list[tuple[float, int, Example]] = []
    for i, (name, make) in enumerate(parts):
      stream = f"{seed}/{i}/{name}/{split}"
      entries = list(_distinct_entries(make, stream, counts[i], used, totals[i], keep))
      totals[i] += len(entries)
      if len(entries) < counts[i]:
        needed = shots + sizes["eval"][i] + sizes["train"][i]
        others = " besides those in the other parts" if len(parts) > 1 else ""
        raise ValueError(
          f"{name} with these settings has only {totals[i]} distinct problems{others}, "
          f"and {needed} are needed ({shots} shots + {sizes['eval'][i]} eval + "
          f"{sizes['train'][i]} train): lower the sizes, or widen its config"
        )
      if split == "shots":
        shots_of.append(entries)
        continue
      for n, entry in enumerate(entries):
        columns = {"question": entry["question"], "answer": entry["answer"]}
        columns |= {"dataset": name, "part": i, "entry": entry}
        example = Example(render(shots_of[i], entry), columns, _key(entry))
        # Sorting by the relative position within the dataset interleaves the datasets evenly.
        examples.append(((n + 0.5) / counts[i], i, example))
    if split != "shots":
      splits[split] = [example for *_, example in sorted(examples, key=lambda item: item[:2])]
  return splits


def _distinct_entries(
  make: MakeDataset,
  stream: str,
  count: int,
  used: set[str],
  total: int,
  keep: re.Pattern[str],
) -> Iterator[Entry]:
  """Yields up to `count` new problems and adds their keys to `used`.

  Args:
    total: number of problems that were drawn from this dataset before.
  """
  if count == 0:
    return
  misses = 0
  for entry in _entries(make, stream):
    key = _key(entry)
    misses += 1
    if key not in used and keep.fullmatch(_arithmetic(entry) or entry["question"]):
      used.add(key)
      total, count, misses = total + 1, count - 1, 0
      yield entry
    # One of n equally likely problems fails to appear in 10 n draws with probability 1 / 22,000.
    if count == 0 or misses > max(2000, 10 * total):
      return


def _entries(make: MakeDataset, stream: str) -> Iterator[Entry]:
  """Yields problems without end.

  Seeds are hashed, because problem i of seed s is often problem i - 1 of seed s + 1.
  """
  chunk = 0
  while True:
    digest = hashlib.sha256(f"{stream}/{chunk}".encode()).digest()
    problems = make(seed=int.from_bytes(digest[:4]) % 2**31, size=CHUNK)
    for index in range(CHUNK):
      yield problems[index]
    chunk += 1


def _arithmetic(entry: Entry) -> str | None:
  """Returns the arithmetic that a question asks for, None if there is none.

  The metadata's "expression" is not always part of the question: in `countdown` it is the answer.
  """
  expression = entry["metadata"].get("expression")
  plain = isinstance(expression, str) and ARITHMETIC.fullmatch(expression)
  return expression if plain and expression in entry["question"] else None


def _key(entry: Entry) -> str:
  """Returns the identity of a problem. 3 + 4 and 4 + 3 are the same problem."""
  expression = _arithmetic(entry)
  if expression is None:
    return " ".join(entry["question"].split())
  for sign in ("+", "*"):
    operands = [operand.strip() for operand in expression.split(sign)]
    if all(operand.isdigit() for operand in operands):
      return f" {sign} ".join(sorted(operands, key=int))
  return " ".join(expression.split())


# --- prompts --------------------------------------------------------------------------------------


def _render_completion(shots: Sequence[Entry], entry: Entry) -> str:
  lines = []
  for item in (*shots, entry):
    expression = _arithmetic(item)
    question = f"{expression} =" if expression else f"Q: {item['question']}\nA:"
    if not isinstance(item["answer"], str) or "\n" in item["answer"]:
      raise ValueError(
        f"answers of {item['metadata'].get('source_dataset')} do not fit on one line, as "
        f"format='completion' needs, but are like {item['answer']!r}: set format='chat', shots=0"
      )
    end = "\n" if expression else "\n\n"
    lines.append(question if item is entry else f"{question} {item['answer']}{end}")
  return "".join(lines)


def _chat_renderer(system: str | None) -> Render:
  def render(shots: Sequence[Entry], entry: Entry) -> list[dict[str, str]]:
    turns = [("system", system)] if system is not None else []
    for shot in shots:
      if not isinstance(shot["answer"], str):
        raise ValueError("this dataset has no written answers to show: set shots=0")
      turns += [("user", shot["question"]), ("assistant", shot["answer"])]
    turns.append(("user", entry["question"]))
    return [{"role": role, "content": content} for role, content in turns]

  return render
