"""Tests the guards of reasoning-gym's scorers: no text is evaluated, no garbage is right."""

import ast
import inspect
import time

import pytest

from grpo_jax.build import build
from grpo_jax.config import ConfigError, default_config
from grpo_jax.rollout import columns_of
from grpo_jax.tasks import make_task
from grpo_jax.tasks.rewards import foreign
from grpo_jax.tasks.rewards.scoring import score

datasets = pytest.importorskip("reasoning_gym.factory").DATASETS
# Scorers that evaluate text of the problem, never of the answer: read and found harmless.
OF_THE_PROBLEM = {"number_sorting", "bitwise_arithmetic"}
EVALUATORS = {"eval", "exec", "parse_expr", "sympify", "literal_eval", "loads", "compile"}


def rewards_of(name, texts, reward="exact", size=3):
  task = make_task(
    "reasoning_gym", dataset=name, format="chat", train_size=size, eval_size=0, shots=0,
    reward=reward,
  )  # fmt: skip
  examples = list(task.splits["train"])
  prompts = [example.prompt for example in examples]
  return examples, score(task.rewards, prompts, [texts(e) for e in examples], columns_of(examples))[
    0
  ]


@pytest.mark.parametrize("name", sorted(foreign.CLEAN))
def test_no_completion_runs_as_code(name, tmp_path):
  mark = tmp_path / "made_by_a_completion"
  code = f"open({str(mark)!r},'w').close()"
  texts = [
    code, f"[{code}]", f"[[{code}]]", f"({code})", f"2 + {code}", f"sin({code})", f"x.{code}",
    f"[x for x in [{code}]]", f"lambda: {code}", f"__import__('os').system('touch {mark}')",
    f"'a' if {code} else 'b'", f"{{1: {code}}}", f"f'{{{code}}}'", f"C({code})", "9**9**9**9",
    "[" * 5000, "(" * 5000, "-" * 100_000 + "1", "x" * 100_000,
  ]  # fmt: skip
  rewards_of(name, lambda _: texts)
  assert not mark.exists()


@pytest.mark.parametrize("name", sorted({*foreign.CLEAN, *foreign.CONFIRM, *foreign.REPLACED}))
def test_right_answers_stay_right_and_garbage_is_wrong(name):
  garbage = ["", " ", "banana", "nan", "inf", "-inf", "1e400", "None", "[]", "{}", "()", "0/0", "?"]
  _, rewards = rewards_of(name, lambda e: [e.columns["answer"], *garbage])
  assert rewards[:, 0].tolist() == [1.0] * len(rewards)
  assert not rewards[:, 1:].any()


@pytest.mark.parametrize("answer", ["1e9999999999", "1E+1_000_000_000", "1e-99999999999"])
def test_numbers_that_take_hours_to_compute_are_wrong_at_once(answer):
  start = time.monotonic()
  assert not foreign.same_number(answer, {"answer": "5"})
  assert time.monotonic() - start < 1
  assert foreign.same_number("5e-3", {"answer": "0.005"})


@pytest.mark.parametrize("name", sorted(set(foreign.CONFIRM) - {"puzzle24", "countdown"}))
def test_a_right_answer_with_garbage_around_it_is_wrong(name):
  _, rewards = rewards_of(
    name, lambda e: [f"{e.columns['answer']} banana", f"banana {e.columns['answer']}"]
  )
  assert not rewards.any()


def test_an_expression_uses_the_numbers_of_its_problem():
  other = "2 + 9 + 6 + 7"
  examples, rewards = rewards_of("puzzle24", lambda e: [e.columns["answer"], other])
  assert rewards[:, 0].all()
  for example, reward in zip(examples, rewards[:, 1]):
    assert reward == float(sorted(example.columns["entry"]["metadata"]["numbers"]) == [2, 6, 7, 9])


def scorer_calls(cls):
  """Returns the names that `score_answer` of a data set, and methods of its module, call."""
  tree = ast.parse(inspect.getsource(inspect.getmodule(cls)))
  calls = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef) and ("score" in node.name or "parse" in node.name):
      for call in ast.walk(node):
        if isinstance(call, ast.Call):
          function = call.func
          name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
          value = getattr(function, "value", None)
          calls.add(f"{value.id}.{name}" if isinstance(value, ast.Name) else name)
  return calls


def test_every_data_set_whose_scorer_evaluates_text_is_guarded():
  """Holds for versions of reasoning-gym to come as well: a new evaluator fails here."""
  evaluating = {"eval", "exec", "parse_expr", "sympify", "sp.parse_expr", "sympy.parse_expr",
                "sp.sympify", "sympy.sympify", "pickle.loads", "yaml.load"}  # fmt: skip
  found = {name for name, (cls, *_) in datasets.items() if scorer_calls(cls) & evaluating}
  own_parser = {"propositional_logic"}  # its `parse_expr` is a parser of its own, over data
  assert found - own_parser - OF_THE_PROBLEM == set(foreign.CLEAN)


@pytest.mark.parametrize("change", [{"workers": 0}, {"isolate": False}])
def test_such_a_data_set_is_refused_outside_an_isolated_worker(change):
  c = default_config()
  c.rollout.completion_length = 4
  with c.unlocked():
    c.task.settings.update(
      dataset="binary_matrix", format="chat", train_size=8, eval_size=0, shots=0
    )
    c.rewards.update(change)
  with pytest.raises(ConfigError, match="isolated worker processes only"):
    build(c)
