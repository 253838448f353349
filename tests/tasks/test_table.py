"""Tests tasks from JSONL and Parquet files: their splits, their rewards, and bad input."""

import json
from pathlib import Path

import pytest

from grpo_jax.tasks import RewardError, make_task, table
from tests.helpers.examples import grade, keys


def length(prompts, completions, **columns):
  return [len(text) for text in completions]


def right(prompts, completions, answer, **columns):
  return [None if a is None else text == a for text, a in zip(completions, answer)]


def write_lines(path, *rows):
  path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
  return str(path)


def write_parquet(path, rows):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  # Two row groups, so that the index of a row differs from its index in the group.
  parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=len(rows) // 2 or 1)
  return str(path)


def rows(count):
  return [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(count)]


def test_a_task_from_a_file_and_a_function(tmp_path):
  path = write_lines(tmp_path / "mine.jsonl", *rows(20))
  (tmp_path / "mine.py").write_text(
    "def right(prompts, completions, answer, **columns):\n"
    "  return [float(text == a) for text, a in zip(completions, answer)]\n"
  )
  task = make_task("jsonl", path=path, reward=f"{tmp_path}/mine.py:right", eval_fraction=0.25)
  assert len(task.splits["train"]) == 15
  assert len(task.splits["eval"]) == 5
  assert not set(keys(task, "train")) & set(keys(task, "eval"))
  assert list(task.rewards) == ["right"]
  assert task.answer is None
  example = task.splits["eval"][0]
  assert example.prompt == f"Say {example.columns['answer']}."
  assert grade(task, example, example.columns["answer"], "no") == ([1, 0], [1, 0])


def test_parquet_and_jsonl_of_the_same_rows_give_the_same_task(tmp_path):
  message = [{"role": "user", "content": "Say 7."}]
  some = [{"prompt": row["prompt"], "n": i, "deep": {"a": [i]}} for i, row in enumerate(rows(11))]
  lines = make_task("jsonl", path=write_lines(tmp_path / "a.jsonl", *some), reward=length)
  arrow = make_task("parquet", path=write_parquet(tmp_path / "a.parquet", some), reward=length)
  assert list(arrow.splits["train"]) == list(lines.splits["train"])
  assert list(arrow.splits["eval"]) == list(lines.splits["eval"])
  assert arrow.name == "table:a.parquet"
  path = write_parquet(tmp_path / "chat.pq", [{"prompt": message, "answer": 7}] * 2)
  task = make_task("table", path=path, reward=length, eval_fraction=0)
  assert [example.prompt for example in task.splits["train"]] == [message] * 2


def test_rows_are_read_on_access(tmp_path):
  path = tmp_path / "a.jsonl"
  write_lines(path, *rows(5))
  task = make_task("jsonl", path=str(path), reward=length, eval_fraction=0)
  path.write_text(path.read_text().replace("Say 3", "SAY 3"))  # the same length, so no line moves
  assert [e.prompt for e in task.splits["train"]][2:] == ["Say 2.", "SAY 3.", "Say 4."]
  assert task.splits["train"][-2].prompt == "SAY 3."
  assert [e.prompt for e in task.splits["train"][3:]] == ["SAY 3.", "Say 4."]
  path.write_text("")
  with pytest.raises(ValueError, match="line 4: not JSON"):
    task.splits["train"][3]


def test_columns_can_be_renamed(tmp_path):
  some = [{"q": f"1 + {i}?", "solution": str(1 + i), "prompts": "x"} for i in range(4)]
  settings = {"prompt": "q", "rename": {"solution": "answer", "prompts": "other"}}
  for path in (write_lines(tmp_path / "a.jsonl", *some), write_parquet(tmp_path / "a.pq", some)):
    task = make_task("table", path=path, reward=right, key="q", eval_fraction=0, **settings)
    example = task.splits["train"][3]
    assert (example.prompt, example.key) == ("1 + 3?", "1 + 3?")
    assert example.columns == {"answer": "4", "other": "x"}
  path = f"{tmp_path}/a.jsonl"
  with pytest.raises(ValueError, match=r"line 1: no column 'prompt'.*Set `prompt`"):
    make_task("table", path=path, reward=length)
  with pytest.raises(ValueError, match=r"unknown column to rename .*'solutoin'.*'solution'"):
    make_task("table", path=path, reward=length, prompt="q", rename={"solutoin": "answer"})
  with pytest.raises(ValueError, match=r"line 1: .*gives two columns the same name"):
    make_task("table", path=path, reward=length, prompt="q", rename={"solution": "prompts"})


def test_a_built_in_grader_by_name(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", *rows(4))
  task = make_task("table", path=path, reward=["numeric", length], weights=[1, 0], eval_fraction=0)
  assert list(task.rewards) == ["numeric", "length"]
  example = task.splits["train"][3]
  assert grade(task, example, "It is\n#### 3", "It is\n#### 4") == ([1, 0], [1, 0])
  assert task.answer("<answer>3</answer>") == task.answer("It is\n#### 3") != None  # noqa: E711


def test_a_missing_column_names_the_reward_that_requires_it(tmp_path):
  some = [{"prompt": row["prompt"], "solution": row["answer"]} for row in rows(3)]
  for path in (write_lines(tmp_path / "a.jsonl", *some), write_parquet(tmp_path / "a.pq", some)):
    with pytest.raises(
      RewardError, match=rf"{Path(path).name}: .*'right' .*requires answer.*solution"
    ):
      make_task("table", path=path, reward=[length, right])
    with pytest.raises(RewardError, match=r"'numeric' .*requires answer, which is not available"):
      make_task("table", path=path, reward="numeric")
    with pytest.raises(RewardError, match=r"'accuracy' .*requires answer"):
      make_task("table", path=path, reward=length, accuracy=right)
    make_task("table", path=path, reward=right, rename={"solution": "answer"})


def test_the_split_depends_on_keys_and_not_on_their_order(tmp_path):
  lines = [{"prompt": f"{p} {i}", "problem": i} for i in range(10) for p in ("Say", "Write")]
  path = write_lines(tmp_path / "a.jsonl", *lines)
  task = make_task("jsonl", path=path, reward=length, key="problem", eval_fraction=0.2)
  assert len(task.splits["eval"]) == 4
  assert len(set(keys(task, "eval"))) == 2
  assert not set(keys(task, "train")) & set(keys(task, "eval"))
  path = write_lines(tmp_path / "b.jsonl", *lines[::-1])
  again = make_task("jsonl", path=path, reward=length, key="problem", eval_fraction=0.2)
  assert set(keys(again, "eval")) == set(keys(task, "eval"))
  splits = {
    tuple(keys(make_task("jsonl", path=path, reward=length, key="problem", seed=s), "eval"))
    for s in range(8)
  }
  assert len(splits) > 1
  task = make_task("jsonl", path=path, reward=length, eval_fraction=0)
  assert len(task.splits["train"]) == 20
  assert len(task.splits["eval"]) == 0


def test_several_weighted_rewards_and_chat_prompts(tmp_path):
  chat = [{"role": "user", "content": "Say 1."}]
  path = write_lines(tmp_path / "a.jsonl", {"prompt": chat, "answer": "1"}, "", *rows(3))
  task = make_task("jsonl", path=path, reward=[length, right], weights=[0.5, 2], accuracy=right)
  assert chat in [example.prompt for split in task.splits.values() for example in split]
  example = next(e for split in task.splits.values() for e in split if e.columns["answer"] == "1")
  assert grade(task, example, "1", "22") == ([2.5, 1.0], [1, 0])


def test_accuracy_of_an_async_reward(tmp_path):
  async def judge(completions, **columns):
    return [1.0 if text == "yes" else 0.9 for text in completions]

  task = make_task("jsonl", path=write_lines(tmp_path / "a.jsonl", *rows(4)), reward=judge)
  assert grade(task, task.splits["train"][0], "yes", "no") == ([1.0, 0.9], [1, 0])


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{'prompt': 'x'}", "line 3: not JSON"),
    ('{"prompt": "x", "answer": "1"', "line 3: not JSON"),
    ("[" * 100_000, "line 3: not JSON"),
    ('["x"]', "line 3: must be a JSON object"),
    ('{"answer": "1"}', "line 3: no column 'prompt'; it has: answer"),
    ('{"prompt": " ", "answer": "1"}', "line 3: 'prompt' must be non-empty text"),
    ('{"prompt": 3, "answer": "1"}', "line 3: 'prompt' must be"),
    ('{"prompt": [], "answer": "1"}', "line 3: 'prompt' must be"),
    ('{"prompt": [{"role": "user"}], "answer": "1"}', "line 3: 'prompt' must be"),
    (
      '{"prompt": "x", "anwser": "1"}',
      "line 3: does not have the columns of line 1.*answer, anwser",
    ),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  path = write_lines(tmp_path / "bad.jsonl", *rows(1), "", line, *rows(1))
  with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
    make_task("jsonl", path=path, reward=length)


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path):
  path = write_parquet(tmp_path / "bad.parquet", [*rows(3), {"prompt": None, "answer": "3"}])
  with pytest.raises(ValueError, match=r"bad.parquet, row 4: 'prompt' must be .* got null"):
    make_task("table", path=path, reward=length)
  path = write_lines(tmp_path / "lines.parquet", *rows(3))
  with pytest.raises(ValueError, match=r"lines.parquet: not a Parquet file: "):
    make_task("table", path=path, reward=length)


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
  (tmp_path / "a.parquet").write_bytes(b"")
  monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
  with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'grpo_jax\[tasks\]'"):
    make_task("table", path=f"{tmp_path}/a.parquet", reward=length)


def test_bad_files_and_settings(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no such file: .*nowhere.jsonl"):
    make_task("jsonl", path=f"{tmp_path}/nowhere.jsonl", reward=length)
  with pytest.raises(ValueError, match="contains no examples"):
    make_task("jsonl", path=write_lines(tmp_path / "empty.jsonl", "", ""), reward=length)
  (tmp_path / "latin.jsonl").write_bytes(
    '{"prompt": "x"}\n{"prompt": "\u00e9"}\n'.encode("latin-1")
  )
  with pytest.raises(ValueError, match="line 2: not UTF-8"):
    make_task("jsonl", path=f"{tmp_path}/latin.jsonl", reward=length)
  path = write_lines(tmp_path / "a.jsonl", {"prompt": "x", "prompts": 1})
  with pytest.raises(ValueError, match="must not be called 'prompts'"):
    make_task("jsonl", path=path, reward=length)
  path = write_lines(tmp_path / "one.jsonl", {"prompt": "x"}, {"prompt": " x "})
  with pytest.raises(ValueError, match="all lines are the same problem"):
    make_task("jsonl", path=path, reward=length)
  with pytest.raises(ValueError, match=r"unknown key column .* 'prmpt'.*'prompt'"):
    make_task("jsonl", path=path, reward=length, key="prmpt")
  with pytest.raises(ValueError, match="eval_fraction is 1"):
    make_task("jsonl", path=path, reward=length, eval_fraction=1)


def test_byte_order_mark_and_windows_line_ends(tmp_path):
  path = tmp_path / "windows.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "\xe2\x80\xa8b"}')
  task = table.table_task(str(path), length, eval_fraction=0)
  assert [example.prompt for example in task.splits["train"]] == ["a", "\u2028b"]


# --- chat messages as other tools write them, and text that no tokenizer takes --------------------

PARTS = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1"}]


@pytest.mark.parametrize("write", [write_lines, None], ids=["jsonl", "parquet"])
def test_contents_in_parts_are_joined_and_null_is_empty(tmp_path, write):
  call = {"name": "add", "arguments": "1"}
  messages = [
    {"role": "user", "content": PARTS},
    {"role": "assistant", "content": None, "tool_calls": [call]},
    {"role": "tool", "content": [{"type": "text", "text": "2"}]},
  ]
  row = {"prompt": messages, "answer": "2"}
  file = tmp_path / "a"
  path = write(file, row) if write else write_parquet(tmp_path / "a.parquet", [row])
  task = make_task("jsonl", path=path, reward=length, eval_fraction=0)
  assert task.splits["train"][0].prompt == [
    {"role": "user", "content": "1 + 1"},
    {"role": "assistant", "content": "", "tool_calls": [call]},
    {"role": "tool", "content": "2"},
  ]


@pytest.mark.parametrize(
  "content",
  [
    [{"type": "image", "url": "x"}],
    ["text"],
    [{"type": "text"}],
    5,
    [[PARTS]],
    {"text": "x"},
    None,
  ],
)
def test_contents_that_are_not_text_are_refused_with_their_line(tmp_path, content):
  row = {"prompt": [{"role": "user", "content": content}], "answer": "2"}
  path = write_lines(tmp_path / "a.jsonl", rows(1)[0], row)
  with pytest.raises(ValueError, match=r"a\.jsonl, line 2: 'prompt' must be .* parts such as"):
    make_task("jsonl", path=path, reward=length, eval_fraction=0)


@pytest.mark.parametrize(
  ("row", "words"),
  [
    ('{"prompt": "12 \\ud83d"}', "half of a surrogate pair"),
    ('{"prompt": "12", "deep": [{"a": "\\uDE00x"}]}', "half of a surrogate pair"),
    ('{"prompt": "12", "\\ud800": 1}', "half of a surrogate pair"),
    ('{"prompt": "12", "n": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
  ],
)
def test_text_and_numbers_that_nothing_takes_are_refused_with_their_line(tmp_path, row, words):
  path = write_lines(tmp_path / "a.jsonl", '{"prompt": "\\ud83d\\ude42"}', row)
  with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{words}"):
    make_task("jsonl", path=path, reward=length, eval_fraction=0)


# --- data for evaluation --------------------------------------------------------------------------


def test_evaluation_data_of_their_own(tmp_path):
  train = write_lines(tmp_path / "train.jsonl", *rows(6))
  held_out = write_lines(tmp_path / "eval.jsonl", *rows(9)[6:])
  task = make_task("table", path=train, eval_path=held_out, reward=right)
  assert [e.prompt for e in task.splits["train"]] == [f"Say {i}." for i in range(6)]
  assert [e.prompt for e in task.splits["eval"]] == [f"Say {i}." for i in (6, 7, 8)]
  assert task.files[:2] == (train, held_out)
  with pytest.raises(ValueError, match=r"eval_fraction is 0\.1, and eval_path or eval_split names"):
    make_task("table", path=train, eval_path=held_out, reward=right, eval_fraction=0.1)


def test_problems_of_the_evaluation_are_not_trained_on(tmp_path):
  train = write_lines(tmp_path / "train.jsonl", *rows(6))
  held_out = write_lines(tmp_path / "eval.jsonl", {"prompt": " Say  3.", "answer": "3"}, *rows(1))
  with pytest.warns(UserWarning, match="left out of training: 2 of 6 rows"):
    task = make_task("table", path=train, eval_path=held_out, reward=right)
  assert not set(keys(task, "train")) & set(keys(task, "eval"))
  assert len(task.splits["train"]) == 4
  with (
    pytest.warns(UserWarning, match="6 of 6"),
    pytest.raises(ValueError, match="none is left to train"),
  ):
    make_task("table", path=train, eval_path=train, reward=right)


def test_bad_evaluation_data_are_named(tmp_path):
  train = write_lines(tmp_path / "train.jsonl", *rows(3))
  bad = write_lines(tmp_path / "eval.jsonl", {"prompt": "x", "solution": 1})
  with pytest.raises(RewardError, match=r"eval\.jsonl: .*requires answer"):
    make_task("table", path=train, eval_path=bad, reward=right)
  with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.jsonl"):
    make_task("table", path=train, eval_path=f"{tmp_path}/none.jsonl", reward=right)
  for name in ("split", "subset", "revision"):
    with pytest.raises(ValueError, match=rf"{name} is 'x', but .*train\.jsonl is a file"):
      make_task("table", path=train, reward=right, **{name: "x"})
  for path, message in (
    ([], "path is an empty list"), (5, "'path' of task 'table' is 5: it must be text"),
    ("", "path is ''"), ([[]], "is .*: it must be text or a list"),
    ([None], "is .*None.*: it must be text or a list"),
    (None, "'path' of task 'table' is None"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      make_task("table", path=path, reward=right)
  task = make_task("table", path=Path(train), reward=right, eval_fraction=0.0)
  assert task.files[0] == train


# --- columns inside columns -----------------------------------------------------------------------


NESTED = [
  {
    "prompt": [{"role": "user", "content": f"{i} + 1?"}],
    "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
    "extra_info": {"index": i % 2, "answers": [str(i), str(i + 1)], "question": f"{i} and 1?"},
    "flat.name": i,
  }
  for i in range(4)
]  # fmt: skip


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_columns_are_reached_by_path(tmp_path, write):
  path = write(tmp_path / "a.parquet", NESTED) if write is write_parquet else write(
    tmp_path / "a.jsonl", *NESTED
  )  # fmt: skip
  settings = {"path": path, "reward": "numeric", "eval_fraction": 0.0}
  for names in (
    {"answer": "reward_model.ground_truth"}, {"answer": "extra_info.answers.1"},
    {"rename": {"reward_model.ground_truth": "answer"}},
  ):  # fmt: skip
    task = make_task("table", **settings, **names)
    example = task.splits["train"][3]
    assert example.columns["answer"] == "4"
    assert grade(task, example, "#### 4", "#### 5") == ([1, 0], [1, 0])
    assert example.columns["reward_model"] == NESTED[3]["reward_model"]  # it stays
  task = make_task(
    "table", **settings, answer="reward_model.ground_truth", prompt="extra_info.question",
    key="extra_info.index", rename={"flat.name": "number"},
  )  # fmt: skip
  example = task.splits["train"][1]
  assert (example.prompt, example.key) == ("1 and 1?", "1")
  assert example.columns["number"] == 1
  assert "flat.name" not in example.columns


def test_paths_that_lead_nowhere_are_explained(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", *NESTED)
  for answer, message in (
    (
      "reward_model.truth",
      "line 1: no 'reward_model.truth': 'reward_model' holds the fields style",
    ),
    ("reward_model.style.x", "'reward_model.style' holds 'rule'"),
    ("extra_info.answers.7", r"'extra_info.answers' holds \['0', '1'\]"),
    ("extra_info.answers.-1", r"'extra_info.answers' holds"),
    ("reward.truth", "unknown column to rename .* 'reward.truth'"),
  ):
    with pytest.raises(ValueError, match=message):
      make_task("table", path=path, reward="numeric", answer=answer)
  with pytest.raises(ValueError, match="gives two columns the same name"):
    make_task(
      "table", path=path, reward="numeric", answer="reward_model.style",
      rename={"reward_model.ground_truth": "answer"},
    )  # fmt: skip
  with pytest.raises(ValueError, match=r"no 'extra_info.quest': 'extra_info' holds"):
    make_task("table", path=path, reward=length, prompt="extra_info.quest")
