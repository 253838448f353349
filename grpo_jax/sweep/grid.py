"""Reads the settings of a sweep and names its runs; imports no jax and touches no device."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence

SEED = "seed"  # the field that runs are averaged over
_NAME_LENGTH = 120  # characters of the name of a run's directory
_OPEN, _CLOSED = "([{", ")]}"


class SweepError(ValueError):
  """Lists everything that is wrong with a sweep, one problem a line."""

  def __init__(self, problems: Sequence[str]) -> None:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    super().__init__(f"the sweep has {count}:\n" + "\n".join(f"  - {p}" for p in problems))


@dataclasses.dataclass(frozen=True)
class Setting:
  """Holds the values that a sweep tries for one field.

  Attributes:
    field: name of a field of the config, such as `optimizer.learning_rate`.
    values: texts, as they stand on a command line.
  """

  field: str
  values: tuple[str, ...]

  @classmethod
  def parse(cls, text: str) -> "Setting":
    """Reads `FIELD=VALUE,VALUE`; commas within brackets or quotes belong to a value.

    Raises:
      ValueError: there is no field, no value, an empty one, or one twice.

    Example:
      >>> Setting.parse("seed=0,1")
      Setting(field='seed', values=('0', '1'))
      >>> Setting.parse("rollout.stop=('a','b'),()").values
      ("('a','b')", '()')
    """
    field, equals, rest = text.partition("=")
    field, values = field.strip().removeprefix("--config."), split(rest)
    if not equals or not field:
      raise ValueError(f"--set {text!r} must be FIELD=VALUE,VALUE, such as seed=0,1,2")
    if not all(values):
      what = "no values" if values == [""] else "an empty value"
      raise ValueError(f"--set {text!r} has {what}; write {field}=VALUE,VALUE")
    if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
      raise ValueError(f"--set {text!r} has {', '.join(twice)} twice: the runs would be the same")
    return cls(field, tuple(values))


def split(text: str) -> list[str]:
  """Splits a text at its commas, except within brackets and quotes, and strips the parts.

  Example:
    >>> split("1, [2, 3], 'a,b', don't, so")
    ['1', '[2, 3]', "'a,b'", "don't", 'so']
  """
  parts, start, depth, quote = [], 0, 0, ""
  for i, letter in enumerate(text):
    if quote:
      quote = "" if letter == quote else quote
    elif letter in "'\"" and (depth or not text[start:i].strip()):
      quote = letter
    elif letter in _OPEN or letter in _CLOSED:
      depth = max(depth + (1 if letter in _OPEN else -1), 0)
    elif letter == "," and not depth:
      parts.append(text[start:i].strip())
      start = i + 1
  return [*parts, text[start:].strip()]


def parse_all(texts: Sequence[str]) -> tuple[Setting, ...]:
  """Reads the settings of a command line.

  Raises:
    SweepError: lists all that is wrong with them.
  """
  settings, problems = [], []
  for text in texts:
    try:
      settings.append(Setting.parse(text))
    except ValueError as error:
      problems.append(str(error))
  fields = [setting.field for setting in settings]
  for field in dict.fromkeys(field for field in fields if fields.count(field) > 1):
    problems.append(f"--set {field} is given {fields.count(field)} times: put its values into one")
  if not texts:
    problems.append("there is no --set FIELD=VALUE,VALUE: nothing differs between the runs")
  if problems:
    raise SweepError(problems)
  return tuple(settings)


def grid(settings: Sequence[Setting]) -> dict[str, dict[str, str]]:
  """Returns the settings of each run by the name of its directory, the last field fastest.

  Example:
    >>> grid([Setting("optimizer.learning_rate", ("1e-5",)), Setting("seed", ("0", "1"))])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'learning_rate=1e-5,seed=0': {'optimizer.learning_rate': '1e-5', 'seed': '0'},
     'learning_rate=1e-5,seed=1': {'optimizer.learning_rate': '1e-5', 'seed': '1'}}
  """
  fields = [setting.field for setting in settings]
  points = itertools.product(*(setting.values for setting in settings))
  rows = [dict(zip(fields, values)) for values in points]
  return {name_of(row): row for row in rows}


def name_of(values: Mapping[str, str]) -> str:
  """Returns the name of the directory of a run: its settings, in letters that any shell takes.

  Of a path, the last part is shown. A name that does not hold the whole settings ends in a digest
  of them, so that names stay distinct.

  Example:
    >>> name_of({"model.source": "gguf/a b.gguf", "seed": "0"})
    'source=a-b.gguf,seed=0-ae99d2a5'
  """
  short = short_names(list(values))
  whole = ",".join(f"{short[field]}={value}" for field, value in values.items())
  shown = re.sub(r"=[^,=]*/", "=", whole)
  name = re.sub(r"[^A-Za-z0-9_.,+=-]+", "-", shown)[:_NAME_LENGTH]
  if name != whole:
    name += f"-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
  return name


def short_names(fields: Sequence[str]) -> dict[str, str]:
  """Returns the last part of each field, or the whole field where another one ends alike.

  Example:
    >>> short_names(["seed", "optimizer.learning_rate", "critic.learning_rate"])["seed"]
    'seed'
  """
  last = {field: field.rpartition(".")[2] for field in fields}
  ends = list(last.values())
  return {field: end if ends.count(end) == 1 else field for field, end in last.items()}


def overrides_of(values: Mapping[str, str]) -> list[str]:
  """Returns the settings of a run as they stand on the command line of `grpo_jax.train`."""
  return [f"--config.{field}={value}" for field, value in values.items()]


def commands(
  config: str,
  runs: Mapping[str, Mapping[str, str]],
  workdir: str,
  overrides: Sequence[str] = (),
  accept: Sequence[str] = (),
) -> dict[str, list[str]]:
  """Returns the arguments of `python -m grpo_jax.train` for each run, for launchers of one's own.

  Args:
    config: path of the experiment file.
    runs: settings of each run by its name, from `grid`.
    workdir: holds a directory for each run.
    overrides: `--config.a.b=v` for all runs.
    accept: as `--accept` of `grpo_jax.train`.

  Example:
    >>> commands("x.py", grid(parse_all(["seed=0,1"])), "runs/s")["seed=1"]
    ['--config', 'x.py', '--workdir', 'runs/s/seed=1', '--config.seed=1']
  """
  shared = [*(part for name in accept for part in ("--accept", name)), *overrides]
  return {
    name: ["--config", config, "--workdir", f"{workdir}/{name}", *shared, *overrides_of(values)]
    for name, values in runs.items()
  }
