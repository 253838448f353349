"""Code tasks: the model writes Python, which is run in the sandbox against tests.

    {"prompt": "def twice(x):", "test": "def check(f): assert f(2) == 4", "entry_point": "twice"}
    {"prompt": "Write a function twice.", "test_list": ["assert twice(2) == 4"]}
    {"prompt": "Read a number and print it doubled.", "stdin": ["2"], "stdout": ["4"]}

The first two are the formats of HumanEval and MBPP (`format="humaneval"`), the third is that of
programs that read and write (`format="stdio"`). What the program does cannot change the verdict,
see `environments/tester.py`.

References:
  Chen et al. 2021, arXiv 2107.03374 (HumanEval). Austin et al. 2021, arXiv 2108.07732 (MBPP).
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_jax.environments import sandbox, unit_tests
from grpo_jax.environments.tester import Limits, Tests, Verdict, count, judge_all
from grpo_jax.tasks.base import Example, Prompt, Task, unknown_name
from grpo_jax.tasks.files import Row, Rows, open_rows
from grpo_jax.tasks.table import checked_prompt, digest_of, key_of, make_splits, title

ANSWERS = ("either", "block", "continuation")
REWARDS = ("share", "all")
# Text with which a completion leaves the function that it continues, as in HumanEval.
CONTINUATION_STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
# Names of the columns with what a program reads, and what it must write.
_PAIRS = (("stdin", "stdout"), ("input", "output"), ("inputs", "outputs"))


def code_task(
  path: str | Sequence[str],
  *,
  format: str = "humaneval",
  answer: str = "either",
  reward: str = "share",
  prompt: str = "prompt",
  template: str = "{prompt}",
  chat: bool = False,
  seconds: float = 5.0,
  memory_mb: int = 512,
  parallel: int = 0,
  unsafe: bool = False,
  eval_path: str | Sequence[str] | None = None,
  eval_fraction: float | None = None,
  split: str | None = None,
  eval_split: str | None = None,
  subset: str | None = None,
  revision: str | None = None,
  key: str | None = None,
  stop: Sequence[str] | None = None,
  seed: int = 0,
) -> Task:
  """Builds a task from files of code problems.

  Every row is checked once, here. Programs can import the standard library.

  Args:
    path: as in `table_task`.
    format: "humaneval", function checks: columns `test` and `entry_point`, or `test_list`, with
      `test_setup_code` and `test_imports` where there are; or "stdio", what programs read and
      write: columns `stdin` and `stdout` (also `input` and `output`), each text or a list of
      texts, or a column `tests` with a list of such objects.
    answer: where the code stands in a completion: "block", the last fenced block of Python;
      "continuation", the completion goes on where the prompt ends, as a base model does; "either",
      the block if there is one.
    reward: "share", the share of tests passed; or "all", 1.0 if all passed and else 0.0. The
      accuracy is always the latter.
    prompt: name of the column with the prompt.
    template: text around the prompt, with the places {prompt} and {tests}. The tests are those of
      `test_list`, whose prompts do not name the function.
    chat: make the prompt a chat message of the user.
    seconds: wall time of all tests of a completion together. The limit of a call of the rewards,
      `rewards.timeout`, must be larger.
    memory_mb: memory limit of a program, MiB.
    parallel: programs at a time; 0: one per processor.
    unsafe: run programs where the machine cannot isolate them, with the rights of this process.
    eval_path, eval_fraction, split, eval_split, subset, revision, key: as in `table_task`.
    stop: strings that end the generation. None: those that end a function for "continuation".
    seed: as in `table_task`.

  Raises:
    ValueError: a setting or a row is invalid; the message has the number of the line or row.
    FileNotFoundError: a file does not exist, or a data set cannot be reached.
    IsolationError: programs cannot be isolated here, and `unsafe` is False.
  """
  _check_settings(format, answer, reward, template, seconds, memory_mb, parallel)
  sandbox.require_isolation(unsafe)  # starts it, before this process may be confined itself

  def read(files: list[str]) -> tuple[_Rows, list[bytes]]:
    rows = _Rows(open_rows(files), FORMATS[format], prompt, template, chat, key)
    return rows, [digest_of(rows.example(i).key, seed) for i in range(len(rows.source))]

  splits, files = make_splits(
    read, path, eval_path=eval_path, eval_fraction=eval_fraction, split=split,
    eval_split=eval_split, subset=subset, revision=revision,
  )  # fmt: skip
  if stop is None:
    stop = CONTINUATION_STOP if answer == "continuation" and format == "humaneval" else ()
  limits = Limits(seconds, memory_mb, stop_early=reward == "all", unsafe=unsafe)
  scorer = _Scorer(answer, limits, parallel)
  rewards = {"share": scorer.share_passed, "all": scorer.all_passed}
  return Task(
    name=f"code:{title(path)}",
    splits=splits,
    rewards={"tests": (rewards[reward], 1.0)},
    accuracy=rewards["all"],  # the reward itself, if it is that: it is called once
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
    files=tuple(dict.fromkeys(files)),
    note=sandbox.explain(),
  )


def _check_settings(
  format: str, answer: str, reward: str, template: str, seconds: float, memory_mb: int,
  parallel: int,
) -> None:  # fmt: skip
  for kind, value, names in (
    ("format", format, FORMATS), ("answer", answer, ANSWERS), ("reward", reward, REWARDS)
  ):  # fmt: skip
    if value not in names:
      raise unknown_name(kind, value, names)
  if "{prompt}" not in template:
    raise ValueError(f"template is {template!r}: it must have the place {{prompt}}")
  if parallel < 0:
    raise ValueError(f"parallel is {parallel}: it must be at least 1, or 0 for one per processor")
  sandbox.check_limits(seconds, memory_mb)


# --- rewards --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scorer:
  """The reward functions of a task."""

  answer: str
  limits: Limits
  parallel: int

  def share_passed(
    self, completions: Sequence[str], tests: Sequence[Tests], **columns: Any
  ) -> list[float | None]:
    """Returns the share of tests that each completion passes; None where the sandbox failed."""
    return self._values(completions, tests, lambda verdict: verdict.share)

  def all_passed(
    self, completions: Sequence[str], tests: Sequence[Tests], **columns: Any
  ) -> list[float | None]:
    """Returns 1.0 for completions that pass all tests, else 0.0; None where the sandbox failed."""
    return self._values(completions, tests, lambda verdict: float(verdict.complete))

  def _values(
    self,
    completions: Sequence[str],
    tests: Sequence[Tests],
    value: Callable[[Verdict], float],
  ) -> list[float | None]:
    programs = [program_of(text, t, self.answer) for text, t in zip(completions, tests)]
    indices = [i for i, program in enumerate(programs) if program is not None]
    verdicts = judge_all(
      [(programs[i], _without_prefix(tests[i])) for i in indices],
      self.limits,
      parallel=self.parallel,
    )
    values: list[float | None] = [0.0] * len(programs)
    failures = []
    for i, verdict in zip(indices, verdicts):
      if isinstance(verdict, Verdict):
        values[i] = value(verdict)
      else:
        values[i] = None
        failures.append(verdict)
    if failures:
      warnings.warn(
        f"no reward for {len(failures)} of {len(programs)} programs: {failures[0]}",
        RuntimeWarning, stacklevel=2,
      )  # fmt: skip
    return values


def _without_prefix(tests: Tests) -> Tests:
  return {name: value for name, value in tests.items() if name != "prefix"}


def program_of(completion: str, tests: Tests, answer: str) -> str | None:
  """Returns the program that a completion stands for, None if it has none.

  Args:
    completion: what the model wrote.
    tests: the column `tests` of the example.
    answer: as in `code_task`.

  Example:
    >>> tests = {"prefix": "def f(x):\\n", "setup": "def f(x):\\n\\n  pass"}
    >>> program_of("  return x", tests, "continuation")
    'def f(x):\\n  return x'
    >>> program_of("no code", tests, "block") is None
    True
  """
  prefix, setup = tests.get("prefix", ""), tests.get("setup", "")
  block = None if answer == "continuation" else last_block(completion)
  if block is None:
    if answer == "block":
      return None
    return prefix + completion if prefix else f"{setup}\n{completion}"
  if prefix and block[:1].isspace():  # the body of the function that the prompt begins
    return prefix + block
  # Nothing may stand before such an import.
  return block if "from __future__" in block else f"{setup}\n{block}"


_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([\w+.-]*)[^`\n]*")


_PYTHON = re.compile(r"((py|python)[\d.]*)?")


def last_block(text: str) -> str | None:
  """Returns the last fenced block that is marked as Python, else the last unmarked one.

  A block that the text breaks off in counts.

  Example:
    >>> last_block("So:\\n```python\\nx = 1\\n```\\nIt prints:\\n```\\n1\\n```")
    'x = 1\\n'
    >>> last_block("x = 1") is None
    True
  """
  blocks: dict[bool, str] = {}
  lines = iter(text.replace("\r\n", "\n").split("\n"))
  for line in lines:
    if not (opening := _FENCE.fullmatch(line)):
      continue
    indent, fence, language = opening.groups()
    body = []
    for inner in lines:
      closing = inner.strip()
      if closing and set(closing) == {fence[0]} and len(closing) >= len(fence):
        break
      body.append(inner.removeprefix(indent))
    if _PYTHON.fullmatch(language.lower()):
      blocks[bool(language)] = "".join(f"{line}\n" for line in body)
  return blocks.get(True, blocks.get(False))


# --- from rows to examples ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
  """The examples of a file by row number."""

  source: Rows
  make_tests: Callable[[Row, Prompt, str], dict[str, Any]]
  prompt: str
  template: str
  chat: bool
  key: str | None

  def example(self, i: int) -> Example:
    row, where = self.source[i], self.source.where(i)
    prompt = checked_prompt(row, self.prompt, where)
    tests = self.make_tests(row, prompt, where)
    text = self._render(prompt, row, where)
    return Example(text, {"tests": tests}, key_of(row, self.key, prompt, where), row)

  def _render(self, prompt: Prompt, row: Row, where: str) -> Prompt:
    if not isinstance(prompt, str):
      if self.chat or self.template != "{prompt}":
        raise ValueError(
          f"{where}: {self.prompt!r} holds chat messages already: leave out chat and template"
        )
      return prompt
    if "{tests}" in self.template and not row.get("test_list"):
      raise ValueError(f"{where}: template has the place {{tests}}, but there is no 'test_list'")
    values = {"prompt": prompt, "tests": "\n".join(row.get("test_list") or [])}
    text = re.sub(r"\{(prompt|tests)\}", lambda place: values[place[1]], self.template)
    return [{"role": "user", "content": text}] if self.chat else text


def _function_tests(row: Row, prompt: Prompt, where: str) -> dict[str, Any]:
  """Returns the column `tests` of a row of function checks."""
  entry_point = row.get("entry_point")
  if row.get("test") is not None:
    tests = row["test"]
  elif row.get("test_list") is not None:
    tests, entry_point = "\n".join(_texts(row["test_list"], "test_list", where)), None
  else:
    raise ValueError(
      f"{where}: needs a column 'test' with 'entry_point', or a column 'test_list'; it has: "
      f"{', '.join(row)}"
    )
  if not isinstance(tests, str):
    raise ValueError(f"{where}: 'test' must be text, got {_short(tests)}")
  try:
    count(tests)
  except ValueError as error:
    raise ValueError(
      f"{where}: the tests must be Python with assert statements: {error}: {_short(tests)}"
    ) from error
  has_check = unit_tests.check_function(ast.parse(tests)) is not None
  named = isinstance(entry_point, str) and entry_point.isidentifier()
  if not named and (has_check or entry_point is not None):
    raise ValueError(
      f"{where}: 'entry_point' must be the name of the function that `check` gets, got "
      f"{_short(entry_point)}"
    )
  extra = list(row.get("test_imports") or [])
  if row.get("test_setup_code"):
    extra.append(row["test_setup_code"])
  prefix, beginning = _code_prompt(prompt, entry_point)
  setup = "\n".join([*(_texts(extra, "test_setup_code", where) if extra else []), beginning])
  return {"prefix": prefix, "setup": setup, "tests": tests, "entry_point": entry_point}


def _code_prompt(prompt: Prompt, entry_point: str | None) -> tuple[str, str]:
  """Returns a prompt that begins the function as it is, and as a program; else ("", "")."""
  if not isinstance(prompt, str) or entry_point is None:
    return "", ""
  for program in (prompt, f"{prompt.rstrip()}\n    pass\n"):
    try:
      tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
      continue
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    if entry_point in names:
      return prompt, program
  return "", ""


def _pairs(row: Row, prompt: Prompt, where: str) -> dict[str, Any]:
  """Returns the column `tests` of a row of inputs and outputs."""
  cases = row.get("tests", [row])
  if not isinstance(cases, list) or not cases or not all(isinstance(c, Mapping) for c in cases):
    raise ValueError(f"{where}: 'tests' must be a list of objects, got {_short(cases)}")
  pairs = []
  for case in cases:
    names = next((names for names in _PAIRS if set(names) <= set(case)), None)
    if names is None:
      raise ValueError(
        f"{where}: needs the columns 'stdin' and 'stdout', or a column 'tests' with objects that "
        f"have them; it has: {', '.join(case)}"
      )
    columns = [[case[n]] if isinstance(case[n], str) else case[n] for n in names]
    inputs, outputs = (_texts(c, n, where) for c, n in zip(columns, names))
    if len(inputs) != len(outputs):
      raise ValueError(f"{where}: {len(inputs)} in {names[0]!r} but {len(outputs)} in {names[1]!r}")
    pairs += [list(pair) for pair in zip(inputs, outputs)]
  return {"pairs": pairs}


def _texts(value: object, name: str, where: str) -> list[str]:
  """Returns a value that must be a list of texts, and not empty."""
  if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
    raise ValueError(f"{where}: {name!r} must be a list of texts, got {_short(value)}")
  return value


def _short(value: object) -> str:
  return textwrap.shorten(json.dumps(value, default=str), 80)


FORMATS: dict[str, Callable[[Row, Prompt, str], dict[str, Any]]] = {
  "humaneval": _function_tests,
  "stdio": _pairs,
}
