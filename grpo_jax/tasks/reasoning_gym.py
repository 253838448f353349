"""Any dataset of the reasoning-gym library as a task: procedural questions that check themselves.

Training and evaluation are split by problem, not by seed: a generator with few distinct problems
gives the same ones for every seed, and then a rise in accuracy would only show memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax import extras
from grpo_jax.tasks.base import Example, RewardFunction, Task, unknown

FORMATS = ("completion", "chat")
REWARDS = ("exact", "score")
CHUNK = 1000  # problems asked of one generator before it is made anew with another seed
SUM = re.compile(r"[\d\s.+\-*/()]+")
NUMBER = re.compile(r"(?<![\d.])[+-]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")


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
) -> Task:
  """Distinct problems of a reasoning-gym dataset, or of a weighted mixture of several.

  Args:
    dataset: a name such as "chain_sum".
    config: that dataset's own settings, e.g. {"min_digits": 1, "max_digits": 2}.
    mixture: instead of both, a list of {"dataset": name, "weight": share, "config": settings}.
      Each split has the parts in exactly these shares, evenly spread.
    keep: a regular expression; only problems that match it as a whole are used. It sees the
      arithmetic of a problem where there is one ("5 - 9"), else the question: r"\\d+ \\+ \\d+"
      keeps the sums of "chain_sum".
    train_size, eval_size: numbers of distinct problems; no problem is in both.
    seed: which problems. A larger train_size only adds problems, and leaves eval as it is.
    format: "completion", text ending in `5 - 9 =` (or `Q: ... A:` where the problem is not plain
      arithmetic) that stops at the end of the line; or "chat", messages for a chat template.
    shots: solved examples shown before each problem, the same for all problems of a part and in
      neither split. None: 2 in "completion", 0 in "chat" (where each is a turn).
    system: a system message, in "chat" only.
    reward: "exact", 1.0 where the dataset's `score_answer` gives 1.0 and else 0.0; or "score", its
      own value, which in most datasets gives part of the credit to an answer that merely contains
      the right one. Accuracy is exact in both.

  Raises ValueError: an unknown name or setting, or fewer distinct problems than asked for.
  """
  if format not in FORMATS:
    raise unknown("format", format, FORMATS)
  if reward not in REWARDS:
    raise unknown("reward", reward, REWARDS)
  if system is not None and format != "chat":
    raise ValueError("system is a chat message: set format='chat', or leave system out")
  shots = (2 if format == "completion" else 0) if shots is None else shots
  for name, value, least in (
    ("train_size", train_size, 1),
    ("eval_size", eval_size, 0),
    ("shots", shots, 0),
  ):
    if value < least:
      raise ValueError(f"{name} is {value}: it must be at least {least}")
  parts, weights = _parts(dataset, config, mixture)
  render = _chat(system) if format == "chat" else _completion
  sizes = {"eval": _shares(eval_size, weights), "train": _shares(train_size, weights)}
  splits = _draw(parts, sizes, shots, seed, render, _pattern(keep))
  functions = _rewards([part() for _, part in parts], numeric_only=format == "chat")
  return Task(
    name="reasoning_gym:" + "+".join(dict.fromkeys(name for name, _ in parts)),
    splits=splits,
    rewards={reward: (functions[reward], 1.0)},
    accuracy=functions["exact"],
    stop=("\n",) if format == "completion" else (),
    answer=number_answer if format == "chat" and _numeric(splits) else line_answer,
  )


def extract_number(reply: str) -> str:
  """The last number after the last "=" of a reply, "" where there is none.

  >>> extract_number("5 - 9 is negative: 5 - 9 = -4."), extract_number("I counted 1,234 of them")
  ('-4', '1,234')
  """
  numbers = NUMBER.findall(reply.replace("−", "-").rpartition("=")[2])
  return numbers[-1] if numbers else ""


def line_answer(completion: str) -> str | None:
  """The completion itself, in one way of writing it; None for an empty one.

  >>> line_answer(" 1,005 "), line_answer("red,  blue"), line_answer(" ")
  ('1005', 'red, blue', None)
  """
  text = " ".join(completion.split())
  if len(text) <= 100 and NUMBER.fullmatch(text):
    return str(Fraction(text.replace(",", "")))
  return text or None


def number_answer(reply: str) -> str | None:
  """The number that a reply is graded by, None where it has none; see `extract_number`.

  >>> number_answer("That is 7 + 5 = 12.0"), number_answer("I do not know.")
  ('12', None)
  """
  return line_answer(extract_number(reply))


def _numeric(splits: Mapping[str, Sequence[Example]]) -> bool:
  """Whether all right answers are numbers."""
  answers = [example.columns["answer"] for split in splits.values() for example in split]
  return all(isinstance(text, str) and NUMBER.fullmatch(text.strip()) for text in answers)


def _parts(
  dataset: str | None,
  config: Mapping[str, Any] | None,
  mixture: Sequence[Mapping[str, Any]] | None,
) -> tuple[list[tuple[str, Callable[..., Any]]], list[float]]:
  """The datasets in use, each as (name, maker of its generator), and their weights."""
  if (dataset is None) == (not mixture):
    raise ValueError("give either dataset (a name) or mixture (a list), and not both")
  if not mixture:
    return [(dataset, _maker(dataset, config))], [1.0]
  if config:
    raise ValueError("config goes with dataset: in a mixture each entry has its own config")
  parts, weights = [], []
  for entry in mixture:
    for field in entry:
      if field not in ("dataset", "weight", "config"):
        raise unknown("field of a mixture entry", field, ("dataset", "weight", "config"))
    if "dataset" not in entry:
      raise ValueError(f"mixture entry {dict(entry)} has no 'dataset'")
    weight = float(entry["weight"]) if "weight" in entry else 1.0
    if not 0 < weight < float("inf"):
      raise ValueError(f"mixture weight of {entry['dataset']} is {weight}: it must be positive")
    parts.append((entry["dataset"], _maker(entry["dataset"], entry.get("config"))))
    weights.append(weight)
  return parts, weights


def _maker(name: str, config: Mapping[str, Any] | None) -> Callable[..., Any]:
  """`make(seed=, size=)` of a dataset whose name and settings have been checked."""
  extras.require("tasks", "the task reasoning_gym", "reasoning_gym")
  from reasoning_gym.factory import DATASETS, create_dataset  # here: it takes most of a second

  known = set(DATASETS) - {"composite"}  # that one is `mixture` here
  if name not in known:
    raise unknown("reasoning-gym dataset", name, known)
  settings = dict(config or {})
  fields = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
  for setting in settings:
    if setting in ("seed", "size"):
      raise ValueError(f"config of {name} sets {setting!r}: use train_size, eval_size and seed")
    if setting not in fields:
      raise unknown(f"setting of {name}", setting, fields)

  def make(seed: int = 0, size: int = CHUNK) -> Any:
    return create_dataset(name, seed=seed, size=size, **settings)

  try:
    make()
  except (AssertionError, TypeError, ValueError) as error:
    raise ValueError(f"reasoning-gym dataset {name} refuses config {settings}: {error}") from error
  return make


def _pattern(keep: str | None) -> re.Pattern[str]:
  try:
    return re.compile(".*" if keep is None else keep, re.DOTALL)
  except re.error as error:
    raise ValueError(f"keep is {keep!r}, which is not a regular expression: {error}") from None


def _shares(size: int, weights: Sequence[float]) -> list[int]:
  """`size` split in proportion to the weights, what rounding leaves to the largest remainders."""
  exact = [size * weight / sum(weights) for weight in weights]
  counts = [int(share) for share in exact]
  by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
  for i in by_remainder[: size - sum(counts)]:
    counts[i] += 1
  return counts


def _draw(
  parts: Sequence[tuple[str, Callable[..., Any]]],
  sizes: Mapping[str, Sequence[int]],
  shots: int,
  seed: int,
  render: Callable[..., Any],
  keep: re.Pattern[str],
) -> dict[str, list[Example]]:
  """Shots of all parts first, then eval, then train; a problem is used once over all of them."""
  used: set[str] = set()
  shown: list[list[dict[str, Any]]] = []
  splits: dict[str, list[Example]] = {}
  found = [0] * len(parts)
  for split, counts in {"shots": [shots] * len(parts), **sizes}.items():
    drawn: list[tuple[float, int, Example]] = []
    for i, (name, make) in enumerate(parts):
      stream = f"{seed}/{i}/{name}/{split}"
      entries = list(_distinct(make, stream, counts[i], used, found[i], keep))
      found[i] += len(entries)
      if len(entries) < counts[i]:
        wanted = shots + sizes["eval"][i] + sizes["train"][i]
        others = " besides those in the other parts" if len(parts) > 1 else ""
        raise ValueError(
          f"{name} with these settings has only {found[i]} distinct problems{others}, and {wanted} "
          f"are needed ({shots} shots + {sizes['eval'][i]} eval + {sizes['train'][i]} train): "
          "lower the sizes, or widen its config"
        )
      if split == "shots":
        shown.append(entries)
        continue
      for n, entry in enumerate(entries):
        columns = {"question": entry["question"], "answer": entry["answer"]}
        columns |= {"dataset": name, "part": i, "entry": entry}
        example = Example(render(shown[i], entry), columns, _key(entry))
        drawn.append(((n + 0.5) / counts[i], i, example))  # its place in its own part, in (0, 1)
    if split != "shots":
      splits[split] = [example for *_, example in sorted(drawn, key=lambda item: item[:2])]
  return splits


def _distinct(
  make: Callable[..., Any],
  stream: str,
  count: int,
  used: set[str],
  found: int,
  keep: re.Pattern[str],
) -> Iterator[dict[str, Any]]:
  """Up to `count` entries whose keys are not in `used`, which they join; fewer if none is left."""
  if count == 0:
    return
  fruitless = 0
  for entry in _entries(make, stream):
    key = _key(entry)
    fruitless += 1
    if key not in used and keep.fullmatch(_expression(entry) or entry["question"]):
      used.add(key)
      found, count, fruitless = found + 1, count - 1, 0
      yield entry
    # One problem of n equally likely ones stays unseen for 10 n draws once in 22,000 times.
    if count == 0 or fruitless > max(2000, 10 * found):
      return


def _entries(make: Callable[..., Any], stream: str) -> Iterator[dict[str, Any]]:
  """Endless entries. Seeds are hashed: problem i of seed s is often problem i - 1 of seed s + 1."""
  chunk = 0
  while True:
    digest = hashlib.sha256(f"{stream}/{chunk}".encode()).digest()
    problems = make(seed=int.from_bytes(digest[:4]) % 2**31, size=CHUNK)
    for index in range(CHUNK):
      yield problems[index]
    chunk += 1


def _expression(entry: Mapping[str, Any]) -> str | None:
  """The arithmetic a question asks for, None where there is none.

  Not every "expression" is the question: that of `countdown` is its answer.
  """
  expression = entry["metadata"].get("expression")
  plain = isinstance(expression, str) and SUM.fullmatch(expression)
  return expression if plain and expression in entry["question"] else None


def _key(entry: Mapping[str, Any]) -> str:
  """Which problem it is: 3 + 4 and 4 + 3 are the same one."""
  expression = _expression(entry)
  if expression is None:
    return " ".join(entry["question"].split())
  for sign in ("+", "*"):
    operands = [operand.strip() for operand in expression.split(sign)]
    if all(operand.isdigit() for operand in operands):
      return f" {sign} ".join(sorted(operands, key=int))
  return " ".join(expression.split())


def _completion(shots: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> str:
  lines = []
  for item in (*shots, entry):
    expression = _expression(item)
    asked = f"{expression} =" if expression else f"Q: {item['question']}\nA:"
    if not isinstance(item["answer"], str) or "\n" in item["answer"]:
      raise ValueError(
        f"answers of {item['metadata'].get('source_dataset')} do not fit on one line, as "
        f"format='completion' needs, but are like {item['answer']!r}: set format='chat', shots=0"
      )
    end = "\n" if expression else "\n\n"
    lines.append(asked if item is entry else f"{asked} {item['answer']}{end}")
  return "".join(lines)


def _chat(system: str | None) -> Callable[..., list[dict[str, str]]]:
  def render(shots: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> list[dict[str, str]]:
    turns = [("system", system)] if system is not None else []
    for shot in shots:
      if not isinstance(shot["answer"], str):
        raise ValueError("this dataset has no written answers to show: set shots=0")
      turns += [("user", shot["question"]), ("assistant", shot["answer"])]
    turns.append(("user", entry["question"]))
    return [{"role": role, "content": content} for role, content in turns]

  return render


def _rewards(scorers: Sequence[Any], numeric_only: bool) -> dict[str, RewardFunction]:
  """The two rewards. In chat a reply is prose, so a numeric answer is looked for inside it."""

  def one(text: str, part: int, entry: Mapping[str, Any]) -> float:
    answer, right, scorer = text.strip(), entry["answer"], scorers[part]
    if numeric_only and isinstance(right, str) and NUMBER.fullmatch(right.strip()):
      answer = extract_number(answer)
    try:
      return float(scorer.score_answer(answer, entry))
    except Exception:  # a few datasets raise on text they cannot parse, which is a wrong answer
      return 0.0

  def score(prompts: Any, completions: Any, part: Any, entry: Any, **columns: Any) -> list[float]:
    return [one(text, p, e) for text, p, e in zip(completions, part, entry)]

  def exact(**columns: Any) -> list[float]:
    return [float(value == 1.0) for value in score(**columns)]

  return {"score": score, "exact": exact}
