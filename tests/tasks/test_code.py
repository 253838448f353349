"""Tests the code task on a few rows of HumanEval (tests/data/human_eval) and small files."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.environments import sandbox
from grpo_jax.environments.sandbox import IsolationError
from grpo_jax.tasks import RewardError, code, make_task, score, score_in_process
from grpo_jax.tasks.code import last_block, program_of
from grpo_jax.tasks.rewards.workers import RewardWorkers
from tests.helpers.processes import xla_flags

pytestmark = pytest.mark.skipif(
  not sandbox.layers(), reason="needs Linux with namespaces or Landlock"
)
ROWS = Path(__file__).parents[1] / "data" / "human_eval" / "HumanEval.jsonl"
SOLUTIONS = {
  row["prompt"]: row["canonical_solution"] for row in map(json.loads, ROWS.read_text().splitlines())
}
TWICE = {"prompt": "def twice(x):", "test": "def check(f):\n  assert f(2) == 4\n  assert f(3) == 6",
         "entry_point": "twice"}  # fmt: skip
LISTED = {"prompt": "Write twice.", "test_list": ["assert twice(2) == 4", "assert twice(3) == 6"]}
DOUBLED = {"prompt": "Print it doubled.", "stdin": ["2", "3"], "stdout": ["4", "6"]}


@pytest.fixture
def make(tmp_path):
  """Returns a function that makes the task of some rows, all of them for training."""

  def make(*rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_task("code", path=str(path), **{"eval_fraction": 0.0, **settings})

  return make


def scores(task, *completions, accuracy=False):
  """Returns the rewards of completions of the first example."""
  example = task.splits["train"][0]
  rewards = {"accuracy": (task.accuracy, 1.0)} if accuracy else task.rewards
  columns = {name: [value] for name, value in example.columns.items()}
  return score(rewards, [example.prompt], [completions], columns)[0][0].tolist()


def fenced(text, language="python"):
  return f"So:\n```{language}\n{text}\n```\n"


def test_the_solutions_of_human_eval_pass_and_others_fail():
  task = make_task("code", path=str(ROWS), format="humaneval", eval_fraction=0.5)
  assert [len(task.splits[name]) for name in ("train", "eval")] == [3, 3]
  examples = [*task.splits["train"], *task.splits["eval"]]
  assert {example.prompt for example in examples} == set(SOLUTIONS)
  prompts = [example.prompt for example in examples]
  completions = [
    [SOLUTIONS[p], fenced(p + SOLUTIONS[p]), fenced(SOLUTIONS[p]), "  return None", "x"]
    for p in prompts
  ]
  columns = {"tests": [example.columns["tests"] for example in examples]}
  result = score_in_process(task)(prompts, completions, columns)
  assert result.accuracy.tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0]] * 6
  assert result.total[:, :3].tolist() == [[1.0] * 3] * 6
  assert result.missing == 0


@pytest.mark.parametrize(
  ("row", "settings", "good", "half"),
  [
    (TWICE, {}, "\n  return 2 * x", "\n  return 4"),
    (TWICE, {}, fenced("def twice(x): return x + x"), fenced("def twice(x): return 4")),
    (LISTED, {}, fenced("def twice(x): return x + x"), fenced("def twice(x): return 6")),
    (LISTED, {}, "def twice(x): return x + x", "twice = lambda x: 4"),
    (DOUBLED, {"format": "stdio"}, fenced("print(2 * int(input()))"), fenced("print(4)")),
    (DOUBLED, {"format": "stdio"}, "print(2 * int(input()))", "print(6)"),
  ],
)
def test_rewards_by_hand(make, row, settings, good, half):
  task = make(row, **settings)
  assert scores(task, good, half, "") == [1.0, 0.5, 0.0]
  assert scores(task, good, half, "", accuracy=True) == [1.0, 0.0, 0.0]
  assert scores(make(row, reward="all", **settings), good, half, "") == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
  ("columns", "code"),
  [
    ({"stdin": "2", "stdout": "4"}, "print(4)"),
    ({"input": ["2"], "output": ["4\n"]}, "print(4)"),
    ({"inputs": ["1", "2"], "outputs": ["2", "4"]}, "print(2 * int(input()))"),
    ({"tests": [{"stdin": "", "stdout": "a"}, {"input": "x", "output": "a"}]}, "print('a')"),
  ],
)
def test_names_of_inputs_and_outputs(make, columns, code):
  assert scores(make({"prompt": "p", **columns}, format="stdio"), fenced(code)) == [1.0]


def test_tests_with_imports_and_setup(make):
  row = {"prompt": "p", "test_imports": ["import math"], "test_setup_code": "two = 2",
         "test_list": ["assert math.isclose(half(two), 1.0)"]}  # fmt: skip
  assert scores(make(row), fenced("def half(x): return x / 2"), fenced("half = 1")) == [1.0, 0.0]


def test_where_the_code_stands(make):
  good, bad = "\n  return 2 * x", fenced("def twice(x): return 0")
  assert scores(make(TWICE, answer="block"), good, bad) == [0.0, 0.0]
  assert scores(make(TWICE, answer="continuation"), good, good + "\n\n" + bad) == [1.0, 0.0]
  assert make(TWICE, answer="continuation").stop == code.CONTINUATION_STOP
  assert make(TWICE).stop == ()
  assert make(TWICE, stop="\n\n").stop == ("\n\n",)


@pytest.mark.parametrize(
  ("text", "block"),
  [
    ("```\na\n```", "a\n"),
    ("```python\na\n```\n```python\nb\n```", "b\n"),
    ("```python\na\n```\nIt prints\n```\n4\n```", "a\n"),
    ("```\na\n```\n```\nb\n```", "b\n"),
    ("```python\na\n```\n```bash\nls\n```", "a\n"),
    ("```py\na", "a\n"),
    ("1. so\n   ```python\n   if a:\n     b\n   ```", "if a:\n  b\n"),
    ("~~~python\na\n~~~", "a\n"),
    ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
    ("```Python title='x'\na\n```", "a\n"),
    ("```python3.11\nx = '\x0c\u2028'\n```", "x = '\x0c\u2028'\n"),
    ("```python\r\na\r\n```\r\n", "a\n"),
    ("a", None),
    ("`a`", None),
    ("```json\n{}\n```", None),
  ],
)
def test_the_last_block_of_python(text, block):
  assert last_block(text) == block


def test_a_reward_that_is_the_accuracy_is_called_once(make):
  task = make(TWICE, reward="all")
  assert task.rewards["tests"][0] is task.accuracy
  assert make(TWICE).rewards["tests"][0] is not task.accuracy


def test_a_future_import_stays_first():
  tests = {"prefix": "def f(): ...\n", "setup": "def f(): ...\n"}
  assert program_of(fenced("from __future__ import annotations"), tests, "block").startswith("from")


def test_prompts(make):
  template = "Do this: {prompt}\nIt must pass:\n{tests}"
  task = make(LISTED, template=template, chat=True)
  (example,) = task.splits["train"]
  content = "Do this: Write twice.\nIt must pass:\nassert twice(2) == 4\nassert twice(3) == 6"
  assert example.prompt == [{"role": "user", "content": content}]
  assert example.key == "Write twice."
  messages = [{"role": "user", "content": "Write {tests} twice."}]
  assert make({**LISTED, "prompt": messages}).splits["train"][0].prompt == messages
  with pytest.raises(ValueError, match="holds chat messages already"):
    make({**LISTED, "prompt": messages}, chat=True)


def test_no_problem_is_in_both_splits(make):
  rows = [{**TWICE, "prompt": f"def twice(x):  # {n // 2}", "id": n % 5} for n in range(20)]
  task = make(*rows, eval_fraction=0.3)
  keys = {name: {example.key for example in split} for name, split in task.splits.items()}
  assert len(keys["eval"]) == 3
  assert not keys["train"] & keys["eval"]
  assert sum(len(split) for split in task.splits.values()) == 20
  assert make(*reversed(rows), eval_fraction=0.3).splits["eval"][0].key in keys["eval"]
  assert len(make(*rows, eval_fraction=0.4, key="id").splits["eval"]) == 8


@pytest.mark.parametrize(
  ("row", "settings", "message"),
  [
    ({"prompt": "p"}, {}, "line 1: needs a column 'test' with 'entry_point'"),
    ({**TWICE, "entry_point": None}, {}, "line 1: 'entry_point' must be the name"),
    ({**TWICE, "entry_point": "a b"}, {}, "line 1: 'entry_point' must be the name"),
    ({**TWICE, "test": "def check(f: assert"}, {}, "line 1: the tests must be Python"),
    ({**TWICE, "test": "print(1)"}, {}, "line 1: the tests must be Python .* nothing is asserted"),
    ({**TWICE, "test": 5}, {}, "line 1: 'test' must be text, got 5"),
    ({**LISTED, "test_list": "assert f()"}, {}, "line 1: 'test_list' must be a list of texts"),
    ({**LISTED, "test_list": []}, {}, "line 1: 'test_list' must be a list of texts"),
    ({**LISTED, "test_imports": [1]}, {}, "line 1: 'test_setup_code' must be a list of texts"),
    ({**TWICE, "prompt": ""}, {}, "line 1: 'prompt' must be non-empty text"),
    ({"text": "p"}, {}, "line 1: no column 'prompt'; it has: text"),
    (DOUBLED, {}, "line 1: needs a column 'test'"),
    (TWICE, {"format": "stdio"}, "line 1: needs the columns 'stdin' and 'stdout'"),
    ({**DOUBLED, "stdout": ["4"]}, {"format": "stdio"}, "line 1: 2 in 'stdin' but 1 in 'stdout'"),
    ({**DOUBLED, "stdout": [4, 6]}, {"format": "stdio"}, "'stdout' must be a list of texts"),
    ({"prompt": "p", "tests": []}, {"format": "stdio"}, "'tests' must be a list of objects"),
    (TWICE, {"format": "human"}, "unknown format 'human': did you mean 'humaneval'"),
    (TWICE, {"answer": "blok"}, "unknown answer 'blok': did you mean 'block'"),
    (TWICE, {"reward": "any"}, r"unknown reward 'any'.*all, share"),
    (TWICE, {"template": "{prompt}{tests}"}, "line 1: template has the place {tests}, but there"),
    (TWICE, {"template": "x"}, "template is 'x': it must have the place {prompt}"),
    (TWICE, {"seconds": 0}, "seconds is 0"),
    (TWICE, {"seconds": "5"}, "'seconds' of task 'code' is '5'"),
    (TWICE, {"memory_mb": 1}, "memory_mb 1"),
    (TWICE, {"parallel": -1}, "parallel is -1"),
    (TWICE, {"eval_fraction": 1.0}, "eval_fraction is 1.0"),
    (TWICE, {"key": "no"}, "unknown key column"),
  ],
)  # fmt: skip
def test_what_is_wrong_is_named(make, row, settings, message):
  with pytest.raises(ValueError, match=message):
    make(row, **settings)


def test_a_file_that_does_not_exist():
  with pytest.raises(FileNotFoundError, match="no such file: none"):
    make_task("code", path="none")


def test_tests_that_cannot_run_stop_the_run(make):
  task = make({**LISTED, "test_setup_code": "import numpy"})
  with pytest.raises(RewardError, match="the tests cannot be set up: ModuleNotFoundError"):
    scores(task, fenced("def twice(x): return x"))


def test_without_isolation_there_is_no_task(make, monkeypatch):
  monkeypatch.setattr(sandbox, "layers", lambda: ())
  with pytest.raises(IsolationError, match=r"cannot be isolated here.*unsafe"):
    make(TWICE)


def test_a_sandbox_that_fails_gives_no_reward(make, monkeypatch):
  task = make(TWICE)
  monkeypatch.setattr(code, "judge_all", lambda programs, *_, **__: [IsolationError("died")])
  with pytest.warns(RuntimeWarning, match="no reward for 1 of 1 programs: died"):
    assert str(scores(task, fenced("x"))) == "[nan]"


def test_the_note_says_what_isolates(make):
  assert "seccomp" in make(TWICE).note


def test_isolated_workers_run_programs(make, tmp_path):
  """Uses servers from before: workers may start no process and write no file."""
  make(TWICE)
  task = functools.partial(
    make_task, "code", path=str(tmp_path / "rows.jsonl"), eval_fraction=0.0, seconds=2.0
  )
  example = task().splits["train"][0]
  columns = {"tests": [example.columns["tests"]]}
  # The second kills the server that it runs in, as far as that is possible.
  completions = ["\n  return 2 * x", "\n  import os; os.kill(-1, 9)", "\n  while True: pass"]
  with RewardWorkers(task, timeout=20.0) as workers:
    for extra in ("\n  return 4", "\n  return 6"):
      result = workers([example.prompt], [[*completions, extra]], columns)
      assert result.total.tolist() == [[1.0, 0.0, 0.0, 0.5]]
      assert result.accuracy.tolist() == [[1.0, 0.0, 0.0, 0.0]]


CONFIG = """
from grpo_jax.config import default_config
def get_config():
  c = default_config()
  c.model.source = "random:tiny"
  c.steps = 2
  c.task.name = "code"
  with c.unlocked():
    c.task.settings.update(path={path!r}, eval_fraction=0.5)
  c.rollout.prompts_per_step = 2
  c.rollout.group_size = 8
  c.rollout.completion_length = 6
  c.rewards.workers = {workers}
  c.log.samples = 16
  return c
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 0])
def test_a_run_of_the_tiny_model(workers, tmp_path):
  data, experiment = tmp_path / "rows.jsonl", tmp_path / "experiment.py"
  data.write_text(json.dumps(TWICE) + "\n" + json.dumps({**TWICE, "prompt": "def twice(y):"}))
  experiment.write_text(CONFIG.format(path=str(data), workers=workers))
  command = [sys.executable, "-m", "grpo_jax.train", "--config", str(experiment)]
  ran = subprocess.run(
    [*command, "--workdir", str(tmp_path / "run")], capture_output=True, text=True, check=False,
    env=dict(os.environ, XLA_FLAGS=xla_flags()),
  )  # fmt: skip
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert "code runs behind" in ran.stdout + ran.stderr
  metrics = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  rewards = [row["rewards/tests/mean"] for row in metrics if "rewards/tests/mean" in row]
  assert len(rewards) == 2
  assert all(0 <= reward <= 1 for reward in rewards)
