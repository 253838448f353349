"""Tests tools: schemas, the calls of each format, what a model reads about each fault."""

import json
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import pytest

from grpo_jax.environments import sandbox
from grpo_jax.environments.calling import RESULT_LENGTH, matches
from grpo_jax.environments.calls import FORMATS
from grpo_jax.environments.tools import (
  check_chat_template,
  episodes_with_tools,
  load_tool,
  with_tools,
)
from grpo_jax.environments.usage import Usage
from grpo_jax.environments.workers import EnvironmentWorkers, run_in_process
from grpo_jax.tasks import make_task
from grpo_jax.tasks.base import Example
from tests.helpers import environments


def add(a: int, b: int = 1) -> int:
  """Adds two numbers.

  Args:
    a: The first.
    b: The second.
  """
  return a + b


def search(text: str, kind: Literal["web", "mail"] = "web", limit: Optional[int] = None) -> dict:  # noqa: UP045
  """Looks something up.

  Args:
    text: What to look for.
    kind: Where.
    limit: How many.
  """
  return {"text": text, "kind": kind, "limit": limit}


def large() -> str:
  """Returns 10 MB."""
  return "x" * 10_000_000


def broken(what: str = "") -> str:
  """Raises.

  Args:
    what: It says.
  """
  raise RuntimeError(what)


def leave() -> str:
  """Ends the process, if it can."""
  raise SystemExit(3)


async def later(x: int) -> str:
  """Returns a number later.

  Args:
    x: The number.
  """
  if x < 0:
    raise ValueError("negative")
  return f"later {x}"


def words(items: list[str]) -> int:
  """Counts.

  Args:
    items: The words.
  """
  return len(items)


TOOLS = [add, search, large, broken, leave, later, words, "calculator"]


def hermes(*calls):
  return "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>\n" for call in calls)


def call(name, **arguments):
  return {"name": name, "arguments": arguments}


def play(text, tools=TOOLS, **settings):
  environment = episodes_with_tools(tools, **settings)()
  environment.reset(Example("p", {}, "p"), 0)
  return environment.step(text)


def read(text, **settings):
  """Returns what a model reads after one turn."""
  step = play(text, **settings)
  if isinstance(step.observation, str):
    return step.observation
  return [message["content"] for message in step.observation]


def test_the_schema_is_that_of_transformers():
  from transformers.utils import get_json_schema

  for function in (add, search, words):
    expected = get_json_schema(function)
    expected["function"].pop("return", None)
    assert load_tool(function).schema == expected
  assert load_tool("calc").schema["function"]["name"] == "calc"
  assert load_tool("tests.environments.test_tools:add").function is not None
  assert load_tool(f"{__file__}:add").name == "add"


def no_hint(a, b: int) -> int:
  """Adds.

  Args:
    a: One.
    b: Two.
  """


def no_line(a: int, b: int) -> int:
  """Adds.

  Args:
    a: One.
  """


def no_docstring(a: int) -> int:
  return a


def star(*a: int) -> int:
  """Adds.

  Args:
    a: All.
  """


@pytest.mark.parametrize("function", [no_hint, no_line, no_docstring, star])
def test_a_tool_without_hints_or_docstring_is_named(function):
  with pytest.raises(ValueError, match=rf"^tool '{function.__name__}'.*a type hint for every"):
    load_tool(function)


def test_unknown_names_are_errors(tmp_path):
  with pytest.raises(ValueError, match="unknown tool 'calculater': did you mean 'calculator'"):
    load_tool("calculater")
  with pytest.raises(FileNotFoundError, match="no such file"):
    load_tool(f"{tmp_path}/none.py:f")
  with pytest.raises(ValueError, match=r"unknown tool in .* 'ad'"):
    load_tool(f"{__file__}:ad")
  with pytest.raises(ValueError, match="unknown format of calls 'hermess'"):
    episodes_with_tools([add], "hermess")
  with pytest.raises(ValueError, match="two tools have the same name"):
    episodes_with_tools([add, add])
  with pytest.raises(ValueError, match="max_calls is 0"):
    episodes_with_tools([add], max_calls=0)
  with pytest.raises(ValueError, match="must contain"):
    episodes_with_tools([add], "line", result="none")
  with pytest.raises(ValueError, match="tools is empty"):
    episodes_with_tools([])


def test_calls_in_one_turn_are_answered_in_their_order():
  """Checks that an async tool between plain ones keeps its place."""
  text = hermes(call("add", a=1, b=2), call("later", x=5), call("add", a=3), call("later", x=-1))
  step = play(text)
  assert step.observation == [
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "tool", "name": "later", "content": "later 5"},
    {"role": "tool", "name": "add", "content": "4"},
    {"role": "tool", "name": "later", "content": "error: ValueError: negative"},
  ]
  assert (step.reward, step.done) == (None, False)
  assert step.metrics == {"tools/calls": 4, "tools/failed": 1, "tools/raised": 1}


FAULTS = {
  hermes(call("ad", a=1)): ("unknown", "there is no tool 'ad'; the tools are: add, search"),
  hermes(call("add")): ("arguments", "add needs 'a'; it takes a (integer), b (integer)"),
  hermes(call("add", a="1")): ("arguments", "add: a is '1'; it takes a (integer)"),
  hermes(call("add", a=True)): ("arguments", "add: a is 'True'"),
  hermes(call("add", a=1.5)): ("arguments", "add: a is '1.5'"),
  hermes(call("add", a=1, c=2)): ("arguments", "add has no 'c'"),
  hermes(call("search", text="x", kind="phone")): ("arguments", "search: kind is 'phone'"),
  hermes(call("words", items=["a", 1])): ("arguments", "words: items is"),
  hermes(call("broken", what="no")): ("raised", "error: RuntimeError: no"),
  hermes(call("leave")): ("raised", "error: SystemExit: 3"),
  hermes(call("calculator", expression="9**9**9")): ("raised", "would be too large"),
  '<tool_call>{"name": "add", "arguments": {"a": 1}': ("malformed", "not JSON"),
  "<tool_call>add(1)</tool_call>": ("malformed", "not JSON"),
  "<tool_call></tool_call>": ("malformed", "not JSON"),
  "<tool_call>3</tool_call>": ("malformed", "must be a JSON object with name and arguments"),
  '<tool_call>{"arguments": {}}</tool_call>': ("malformed", "must be a JSON object with name"),
  '<tool_call>{"name": 3}</tool_call>': ("malformed", "must be a JSON object with name"),
  '<tool_call>{"name": "add", "arguments": [1]}</tool_call>': (
    "malformed",
    "must be a JSON object",
  ),
  '<tool_call>{"name": "add", "arguments": "{1"}</tool_call>': (
    "malformed",
    "arguments are not JSON",
  ),
  f"<tool_call>{'[' * 100_000}</tool_call>": ("malformed", "nested too deeply"),
  f"<tool_call>{'9' * 10_000}</tool_call>": ("malformed", "a number is too long"),
  f"<tool_call>{'[' * 400}{']' * 400}</tool_call>": ("malformed", "must be a JSON object"),
}


@pytest.mark.parametrize("text", FAULTS, ids=[text[:40] for text in FAULTS])
def test_every_fault_is_told_and_counted(text):
  kind, message = FAULTS[text]
  step = play(text)
  assert message in step.observation[0]["content"]
  assert step.metrics == {"tools/calls": 1, "tools/failed": 1, f"tools/{kind}": 1}
  assert not step.done


def test_a_result_of_10_mb_is_cut():
  step = play(hermes(call("large")))
  content = step.observation[0]["content"]
  assert content.startswith("x" * RESULT_LENGTH + " ... (cut: 10,000,000 characters)")
  assert step.metrics == {"tools/calls": 1, "tools/cut": 1}


def test_a_bad_call_does_not_cost_the_good_ones():
  text = hermes(call("add", a=1)) + "<tool_call>{</tool_call> and " + hermes(call("add", a=2))
  assert [content[:5] for content in read(text)] == ["2", "error", "3"]


READINGS = {  # what transformers' or public parsers got wrong, and what is right
  'Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call> There.': ["2"],
  '<tool_call>{"name": "add", "arguments": {"a": 1}}': ["2"],  # never closed
  '<tool_call>{"name": "search", "arguments": {"text": "</tool_call>"}}</tool_call>': [
    '{"text": "</tool_call>", "kind": "web", "limit": null}'
  ],
  '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>': ["2"],
  '<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>': ["2"],
  '<tool_call>[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]'
  "</tool_call>": ["2", "3"],
  '<think><tool_call>{"name": "broken"}</tool_call></think>' + hermes(call("add", a=4)): ["5"],
  '<tool_call>{"name": "search", "arguments": {"text": "x", "limit": null}}</tool_call>': [
    '{"text": "x", "kind": "web", "limit": null}'
  ],
}


@pytest.mark.parametrize("text", READINGS, ids=[text[:50] for text in READINGS])
def test_readings(text):
  assert read(text) == READINGS[text]


@pytest.mark.parametrize(
  "text",
  [
    "It is 5.",
    "",
    "<think>I could <tool_call>{}</tool_call></think>It is 5.",
    "<think><tool_call>",
  ],
)
def test_a_turn_without_a_call_ends_the_episode(text):
  step = play(text)
  assert (step.observation, step.reward, step.done) == ("", None, True)
  assert not step.metrics


def test_calls_of_llama_3():
  one = '{"name": "add", "parameters": {"a": 1}}'
  assert read(one, format="llama3") == ["2"]
  assert read(f"<|python_tag|>{one}", format="llama3") == ["2"]
  assert read(f"{one}; {one}\n{one}", format="llama3") == ["2", "2", "2"]
  assert read(f"[{one}, {one}]", format="llama3") == ["2", "2"]
  assert read("<|python_tag|>add.call(a=1, b=5)", format="llama3") == ["6"]
  assert "not JSON" in read('{"name": "add", "parameters": {"a": 1}', format="llama3")[0]
  assert "not a JSON object" in read("<|python_tag|>print(1)", format="llama3")[0]
  for answer in ("It is 2.", '{"answer": 2}', "{1, 2}", ""):
    assert play(answer, format="llama3").done


def test_calls_in_plain_text():
  for text in ("3 boxes: calculator(12*(7+1))=", "3 boxes: calculator(12*(7+1)"):  # stop cut off
    assert read(text, format="inline") == " 96\n"
  assert read("f(2) and then add(3, b=4", format="inline") == " 7\n"
  assert read("calculator((3+4)*2)=", format="inline") == " 14\n"
  assert read("calculator((3+4", format="inline").startswith(" error: ")
  assert read("[calculator: 12*7]", format="bracket") == " = 84\n"
  assert read("so [calculator:12*7", format="bracket") == " = 84\n"
  assert read(" calculator(12 * 7)", format="line") == "Result: 84\nAnswer:"
  assert read("calculator('12 * 7')\n", format="line") == "Result: 84\nAnswer:"
  assert read("search('cats', kind='mail')", format="line").startswith(
    'Result: {"text": "cats", "k'
  )
  assert read("search(text='cats')", format="line").startswith('Result: {"text": "cats", "k')
  assert read("search(cats and dogs, 3)", format="line").startswith(
    'Result: {"text": "cats and dogs,'
  )
  assert read("calculator(1, 234)", format="line").startswith(
    "Result: error: ValueError: write num"
  )
  assert read("calculator(12)", format="line", result="-> {result}\n") == "-> 12\n"
  assert read("add(1, 2, 3)", format="line").startswith("Result: error: add takes a (integer)")
  assert read("add(1, a=2)", format="line").startswith("Result: error: add takes")
  assert read("add(x)", format="line").startswith("Result: error: add: 'x' is not a list of arg")
  assert read("add(**{'a': 1})", format="line").startswith("Result: error: add: ")
  assert read("clac(1)", format="line").startswith("Result: error: there is no tool 'clac'")
  for format, text in [
    ("inline", "f(2) is 4."), ("inline", "4"), ("inline", "(1"), ("line", "add(1) + 1"),
    ("line", " 84"), ("line", "add(1))"), ("bracket", "[1, 2"), ("bracket", "[a: b] c"),
  ]:  # fmt: skip
    assert play(text, format=format).done, text


def test_a_result_in_plain_text_is_one_line():
  """Keeps line breaks out of it, which would look like the end of a turn."""
  assert read('broken("a\\nb")', format="line") == "Result: error: RuntimeError: a b\nAnswer:"


def test_parsers_take_any_text_in_little_time():
  """Repeats what took quadratic time in some parser, or raised."""
  for unit in ("(", "f(", ")", "[", "<tool_call>", "{", "<think>", '{"name": 1}', "a", "\\", "["):
    for format in FORMATS.values():
      format.parse(unit * 20_000)
      format.parse(unit * 20_000 + "=")


def test_calls_beyond_the_limit_end_the_episode():
  environment = episodes_with_tools([add], max_calls=2)()
  environment.reset(Example("p", {}, "p"), 0)
  assert not environment.step(hermes(call("add", a=1))).done
  assert not environment.step(hermes(call("add", a=1))).done
  step = environment.step(hermes(call("add", a=1)))
  assert step.done
  assert step.metrics == {"tools/over_limit": 1}
  environment.reset(Example("p", {}, "p"), 0)
  assert not environment.step(hermes(call("add", a=1))).done


def test_matches():
  assert matches(None, {"type": "string", "nullable": True})
  assert not matches(None, {"type": "string"})
  assert matches(3, {"anyOf": [{"type": "string"}, {"type": "integer"}]})
  assert matches("x", {"type": ["string", "integer"]})
  assert matches(object(), {})
  assert matches({"a": 1}, {"type": "object"})


class Template:
  """Stands for a tokenizer whose chat template shows its tools, or not."""

  def __init__(self, shows, tools=()):
    self.shows, self.tools = shows, tools
    self.chat_template = "a template" if shows is not None else None

  def with_tools(self, tools):
    return Template(self.shows, tools)

  def render(self, messages, add_generation_prompt):
    assert add_generation_prompt
    return f"{messages}{self.tools if self.shows and self.tools else ''}"


def test_a_chat_template_without_tools_is_an_error():
  schemas = episodes_with_tools([add, search]).schemas
  check_chat_template(Template(True), schemas)
  check_chat_template(Template(False), ())
  with pytest.raises(ValueError, match="does not show the tools add, search to the model"):
    check_chat_template(Template(False), schemas)
  with pytest.raises(ValueError, match="has no chat template to show the tools add, search in"):
    check_chat_template(Template(None), schemas)


# --- tasks ----------------------------------------------------------------------------------------


def test_tasks_take_tools(tmp_path):
  path = tmp_path / "sums.jsonl"
  rows = [{"prompt": f"{n} + 1", "answer": n + 1} for n in (1, 2)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  settings = {"path": str(path), "reward": "numeric", "eval_fraction": 0}
  task = make_task("table", **settings, tools=["calc", f"{__file__}:add"], stop=["\n\n"])
  assert [schema["function"]["name"] for schema in task.tools] == ["calc", "add"]
  assert task.files == (str(path), __file__)
  assert task.stop == ("\n\n",)
  task = make_task("table", **settings, tools=["calc"], tool_settings={"format": "line"})
  assert task.tools == ()
  assert task.stop == ("\n",)
  runner = run_in_process(task)
  runner.reset(task.splits["train"], 1, [0, 0])
  assert runner.step({(1, 0): "calc(2 + 1)"})[1, 0].observation == "Result: 3\nAnswer:"
  for more, message in [
    ({"tool_settings": {"format": "line"}}, "there are no tools"),
    ({"tools": ["calc"], "tool_settings": {"max_cals": 1}}, "unknown setting of tool_settings"),
    ({"tools": ["calc"], "environment": f"{environments.__file__}:Obedient"}, "has an environment"),
    ({"environment": f"{environments.__file__}:Obedien"}, "unknown environment in"),
    ({"environment": "Obedient"}, "does not name an environment"),
  ]:
    with pytest.raises(ValueError, match=message):
      make_task("table", **settings, **more)
  task = make_task("table", **settings, environment=f"{environments.__file__}:Obedient")
  assert task.environment.__name__ == "Obedient"
  assert environments.__file__ in task.files


def test_reasoning_gym_takes_tools():
  task = make_task(
    "reasoning_gym", dataset="chain_sum", train_size=2, eval_size=1, tools=["calc"],
    tool_settings={"format": "line"},
  )  # fmt: skip
  assert task.environment().step("calc(1 + 1)").observation == "Result: 2\nAnswer:"
  assert with_tools(task, []) is task


def is_running(pid):
  try:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
  except FileNotFoundError:
    return False
  return state not in "ZX"


@pytest.mark.skipif(not sandbox.layers(), reason=sandbox.explain())
def test_no_process_of_the_python_tool_outlives_its_worker():
  before = Usage()._descendants()
  with EnvironmentWorkers(partial(environments.tool_task), timeout=30.0) as runner:
    runner.reset([Example("p", {}, "p")], 1, [0])
    runner.step({(0, 0): hermes(call("python", code="print(1)"))})
    pids = set(Usage()._descendants()) - set(before)
    assert len(pids) == 3  # the worker, its fork server, and a server
    assert all(map(is_running, pids))
  until = time.monotonic() + 10
  while any(map(is_running, pids)) and time.monotonic() < until:
    time.sleep(0.05)
  assert not any(map(is_running, pids))


@pytest.mark.skipif(not sandbox.layers(), reason=sandbox.explain())
def test_the_python_tool_runs_in_isolated_workers():
  make = partial(environments.tool_task)
  program = "import os\nprint(12 * 7)\nopen('/etc/passwd')"
  endless = "while True: print(1)"
  with EnvironmentWorkers(make, timeout=30.0) as runner:
    runner.reset([Example("p", {}, "p")], 2, [0])
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      outcomes = runner.step(
        {
          (0, 0): hermes(call("python", code=program)),
          (0, 1): hermes(call("python", code=endless), call("python", code="print(1)")),
        }
      )
  content = outcomes[0, 0].observation[0]["content"]
  assert content.startswith("84\nTraceback")
  assert "Error" in content
  first, second = (message["content"] for message in outcomes[0, 1].observation)
  assert first.startswith("The program was ended: it printed too much\n1\n1\n")
  assert second == "1"
  assert outcomes[0, 1].metrics == {"tools/calls": 2}
