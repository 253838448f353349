"""Every field of the config, and every flag of a command, refuses wrong values by its name."""

import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax import evaluate, export, replay
from grpo_jax.config import ConfigError, check, default_config, override
from grpo_jax.plan import __main__ as plan
from grpo_jax.tasks import TASKS, make_task

NUMBERS = ("int", "float")


def fields(section, prefix=""):
  """Yields the name and the type of each field."""
  for name in section:
    value = section[name]
    if isinstance(value, ConfigDict):
      yield from fields(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", section.get_type(name).__name__


FIELDS = dict(fields(default_config()))
# Text that is no value of a field of any of these types.
WRONG_TEXT = {
  "int": ["four", "1.5", "true", "[1]", "{}", "", "1e400", "nan", "9" * 30, "-9" * 15, "1j", "(",
          "1" * 5000, "(" * 300],
  "float": ["four", "true", "[1]", "{'a'}", "", "1e400", "-1e400", "nan", "9" * 30, "1j", "b'x'",
            "1" * 400, "[" * 3000],
  "bool": ["1", "0", "yes", "", "[True]", "none", "(" * 300],
  "tuple": ["{'a'}", "{'a': 1}"],
  "str": ["['a']", "{'a': 1}", "{}"],
}  # fmt: skip
# Values that an experiment file may hold.
WRONG_VALUES = {
  "int": [None, True, "x", 1.5, [1], {}, 10**5000, -(10**5000), np.float64(2), object()],
  "float": [None, "x", [1], {}, 10**5000, math.nan, math.inf, -math.inf, 1j, object()],
  "bool": [None, 1, 0.0, "true", [True]],
  "tuple": [None, 5, "x", {1}, (None,), 10**5000],
  "str": [None, 5, ["a"], {}, b"x"],
}


@pytest.mark.parametrize("name", FIELDS)
def test_text_of_the_wrong_type_is_refused_by_the_name_of_the_field(name):
  for text in WRONG_TEXT.get(FIELDS[name], []):
    try:
      problems = check(override(default_config(), [f"--config.{name}={text}"]), 1)
    except ConfigError as error:
      problems = error.problems
    assert len(problems) == 1, (text[:40], problems)
    assert problems[0].startswith((f"{name}=", f"{name} is ")), (text[:40], problems)
    assert len(problems[0]) < 500


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_the_wrong_type_in_an_experiment_is_refused(name, tmp_path):
  *sections, field = name.split(".")
  for value in WRONG_VALUES.get(FIELDS[name], []):
    section = c = default_config()
    for part in sections:
      section = section[part]
    if value is None and section[field] is None:
      continue  # None keeps the value of another field
    try:
      section[field] = value
    except (TypeError, ValueError, OverflowError):
      continue  # `load` shows the line of the file; the next test has it
    problems = check(c, 1)
    assert len(problems) == 1, (type(value), problems)
    assert problems[0].startswith(f"{name} is "), (type(value), problems)


def test_an_experiment_with_a_wrong_type_shows_its_line(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "from grpo_jax.config import default_config\n"
    "def get_config():\n  c = default_config()\n  c.optimizer.eps = 10**5000\n  return c\n"
  )
  with pytest.raises(ConfigError, match=r"mine\.py: OverflowError(.|\n)*line 4, in get_config"):
    configs.load(str(file))


# --- settings of tasks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("task", "name", "value", "words"),
  [
    ("jsonl", "weights", 1, "a list whose entries are a finite number or none"),
    ("jsonl", "weights", ["a"], "a finite number"),
    ("jsonl", "weights", [math.nan], "a finite number"),
    ("jsonl", "weights", [True], "a finite number"),
    ("jsonl", "stop", 5, "a list whose entries are text"),
    ("jsonl", "stop", (5,), "a list whose entries are text"),
    ("jsonl", "path", 3, "text"),
    ("jsonl", "reward", None, "text or a table"),
    ("jsonl", "eval_fraction", math.nan, "a finite number"),
    ("jsonl", "rename", [1], "a table of names and values or none"),
    ("jsonl", "seed", 1.5, "a whole number"),
    ("jsonl", "seed", 2**63, "a whole number"),
    ("letters", "train_size", "x", "a whole number"),
    ("letters", "train_size", 10**30, "a whole number"),
    ("countdown", "counts", 3, "a list whose entries are a whole number"),
    ("reasoning_gym", "config", "x", "a table of names and values or none"),
  ],
)
def test_a_setting_of_the_wrong_type_is_refused_by_its_name(task, name, value, words):
  settings = {"path": "x.jsonl", "reward": "numeric"} if task == "jsonl" else {}
  with pytest.raises(
    ValueError, match=f"the setting '{name}' of task '{task}' is .*: it must be .*{words}"
  ):
    make_task(task, **{**settings, name: value})


def test_a_setting_without_a_narrow_type_takes_any_value():
  config = {"max_digits": 2, "min_digits": 1}
  task = make_task("reasoning_gym", dataset="chain_sum", config=config, train_size=2, eval_size=1)
  assert len(task.splits["train"]) == 2


@pytest.mark.parametrize("task", TASKS)
def test_no_setting_takes_an_object(task):
  needed = {"path": "x.jsonl", "reward": "numeric"} if TASKS[task] is TASKS["jsonl"] else {}
  settings = {"path": "x.jsonl"} if task == "code" else needed
  for name in TASKS[task].__annotations__.keys() - {"return"}:
    with pytest.raises(ValueError, match=f"'{name}' of task '{task}' is <object"):
      make_task(task, **{**settings, name: object()})


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["-3", "x", "1.5", "9" * 30, "", "nan", "0x10", "1_0", "٣" * 400])
@pytest.mark.parametrize(
  ("main", "arguments"),
  [
    (evaluate.main, ["--config", "x.py", "--samples"]),
    (export.main, ["--workdir", "x", "--out", "y", "--step"]),
    (replay.main, ["x", "--tokens"]),
    (plan.main, ["--config", "x.py", "--topology", "cpu:8", "--tries"]),
  ],
  ids=["evaluate", "export", "replay", "plan"],
)
def test_a_flag_out_of_range_is_refused_by_its_name(main, arguments, value, capsys):
  *others, flag = arguments
  with pytest.raises(SystemExit) as caught:
    main([*others, f"{flag}={value}"])
  assert caught.value.code == 2
  assert f"argument {flag}: {value!r:.80} is not a whole number" in capsys.readouterr().err
