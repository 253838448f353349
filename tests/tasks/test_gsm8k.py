"""Tests GSM8K on a few of its rows (tests/data/gsm8k), prepared by tensorflow-datasets."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from grpo_jax.tasks import RewardError, gsm8k, make_task, score

ROWS = Path(__file__).parents[1] / "data" / "gsm8k"
tfds = pytest.importorskip("tensorflow_datasets")


def lines(split):
  text = (ROWS / f"{split}.jsonl").read_text(encoding="utf-8")
  return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  gsm8k.prepared(str(folder), str(ROWS))
  return str(folder)


def test_every_row_is_in_its_split(data_dir):
  task = make_task("gsm8k", data_dir=data_dir)
  for split, name in (("train", "train"), ("eval", "test")):
    rows = {row["question"].strip(): row["answer"] for row in lines(name)}
    assert {example.columns["question"] for example in task.splits[split]} == set(rows)
    for example in task.splits[split]:
      solution, gold = rows[example.columns["question"]].split("####")
      assert example.columns["answer"] == gold.strip().replace(",", "")
      assert re.sub(r"<<[^>]*>>", "", solution).strip() == example.columns["solution"]
      assert example.key.split() == example.columns["question"].split()
  assert {"1080", "2125"} < {e.columns["answer"] for s in task.splits.values() for e in s}
  assert "tensorflow" not in sys.modules


def test_a_later_run_reads_the_prepared_files(data_dir, monkeypatch):
  monkeypatch.setattr(gsm8k, "_prepare", None)  # calling it would fail
  for jsonl in (None, str(ROWS), "/no/such/folder"):
    task = make_task("gsm8k", data_dir=data_dir, jsonl=jsonl)
    assert (len(task.splits["train"]), len(task.splits["eval"])) == (6, 4)


def test_lines_that_differ_from_the_prepared_ones_are_an_error(data_dir, tmp_path):
  for split in ("train", "test"):
    shutil.copy(ROWS / f"{split}.jsonl", tmp_path)
  assert make_task("gsm8k", data_dir=data_dir, jsonl=str(tmp_path))
  (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
  with pytest.raises(ValueError, match="was prepared from other lines than those in jsonl="):
    make_task("gsm8k", data_dir=data_dir, jsonl=str(tmp_path))


def fake_download(monkeypatch, files):
  manager = tfds.download.DownloadManager
  monkeypatch.setattr(manager, "download_and_extract", lambda self, urls: files(urls))


def test_without_files_the_published_set_is_downloaded(data_dir, tmp_path, monkeypatch):
  requested = []

  def files(urls):
    requested.extend(urls)
    return {split: ROWS / f"{split.removesuffix('_socratic')}.jsonl" for split in urls}

  fake_download(monkeypatch, files)
  task = make_task("gsm8k", data_dir=str(tmp_path))
  assert set(requested) >= {"train", "test"}
  local = make_task("gsm8k", data_dir=data_dir)
  for split in ("train", "eval"):
    assert list(task.splits[split]) == list(local.splits[split])  # in the same order too
  assert make_task(
    "gsm8k", data_dir=str(tmp_path), jsonl=str(ROWS)
  )  # a download has no digest to compare with


def test_a_failing_download_says_what_to_do(tmp_path, monkeypatch):
  def files(urls):
    raise ConnectionError("no route to host")

  fake_download(monkeypatch, files)
  with pytest.raises(FileNotFoundError, match=r"no route to host.*set `jsonl` to a folder"):
    make_task("gsm8k", data_dir=str(tmp_path))
  assert len(make_task("gsm8k", data_dir=str(tmp_path), jsonl=str(ROWS)).splits["train"]) == 6


def test_two_processes_may_prepare_the_set_at_once(tmp_path, monkeypatch):
  prepare = tfds.core.GeneratorBasedBuilder.download_and_prepare

  def and_then_fail(self, **settings):
    prepare(self, **settings)
    raise FileExistsError("the other process was faster")

  monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, "download_and_prepare", and_then_fail)
  assert len(gsm8k.prepared(str(tmp_path), str(ROWS))[0]) == 6


def test_missing_packages_are_named(tmp_path, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "importlib_resources" else find(name)
  )
  with pytest.raises(ImportError, match=r"needs importlib_resources: pip install 'grpo_jax\[tasks"):
    make_task("gsm8k", data_dir=str(tmp_path), jsonl=str(ROWS))


@pytest.mark.parametrize(
  ("split", "line", "message"),
  [
    ("train", "{'question': 'x'}", "train.jsonl, line 2: not JSON"),
    ("test", "[]", "test.jsonl, line 2: must be a JSON object"),
    ("test", '{"question": "x"}', "test.jsonl, line 2: 'answer' must be non-empty text"),
    ("train", '{"question": 3, "answer": "#### 1"}', "train.jsonl, line 2: 'question' must be"),
    ("train", '{"question": "x", "answer": "1"}', "train.jsonl, line 2: 'answer' must end in"),
    ("train", '{"question": "x", "answer": "#### "}', "train.jsonl, line 2: 'answer' must end in"),
    (
      "train",
      '{"question": "1 +  1?", "answer": "#### 2"}',
      "line 2: this problem is also in test",
    ),
  ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, split, line, message):
  for name, question in (("train", "2 + 2?"), ("test", "1 + 1?")):
    good = json.dumps({"question": question, "answer": "#### 2"})
    text = f"{good}\n{line}\n" if name == split else f"{good}\n"
    (tmp_path / f"{name}.jsonl").write_text(text)
  with pytest.raises(ValueError, match=message):
    make_task("gsm8k", data_dir=f"{tmp_path}/data", jsonl=str(tmp_path))
  assert not (tmp_path / "data").exists()


def test_missing_files(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no such file: .*test.jsonl"):
    make_task("gsm8k", data_dir=str(tmp_path), jsonl=f"{tmp_path}/nothing")


def test_rows_are_read_on_access_only(monkeypatch):
  read = []

  class Rows:
    def __init__(self, count):
      self.count = count

    def __len__(self):
      return self.count

    def __getitem__(self, i):
      read.append(i)
      text = {"question": f"{i}?", "annotation": "", "short_answer": str(i)}
      return {name: value.encode() for name, value in text.items()}

  monkeypatch.setattr(gsm8k, "prepared", lambda *_: (Rows(10**4), Rows(10)))
  task = make_task("gsm8k", eval_size=3, reward=lambda completions, **columns: [0.0])
  assert (len(task.splits["train"]), len(task.splits["eval"]), read) == (10**4, 3, [])
  assert task.splits["train"][77].columns["answer"] == "77"
  assert read == [77]
  read.clear()
  make_task("gsm8k", eval_size=3)
  assert read == [*range(10**4), *range(10)]  # a built-in grader reads each answer once


def test_an_answer_that_is_no_number_is_an_error_at_the_start(tmp_path):
  lines = [{"question": f"{i} + 1?", "answer": f"Add.\n#### {i + 1}"} for i in range(3)]
  for split, bad in (("train", None), ("test", "#### twelve")):
    rows = [dict(row, question=f"{split} {row['question']}") for row in lines]
    rows[1]["answer"] = bad or rows[1]["answer"]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"{split}.jsonl").write_text(text)
  settings = {"data_dir": str(tmp_path / "prepared"), "jsonl": str(tmp_path)}
  with pytest.raises(ValueError, match=r"test problem 'test 1 .*'twelve'.*'exact' or 'math'"):
    make_task("gsm8k", **settings)
  make_task("gsm8k", **settings, reward="exact")


def test_chat_prompts(data_dir):
  example = make_task("gsm8k", data_dir=data_dir).splits["eval"][0]
  system, user = example.prompt
  assert system["role"] == "system"
  assert r"\boxed{}" in system["content"]
  assert user == {"role": "user", "content": example.columns["question"]}
  task = make_task("gsm8k", data_dir=data_dir, answer="tags", shots=1, system="Be brief.")
  prompt = task.splits["eval"][0].prompt
  assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user"]
  assert prompt[0]["content"] == "Be brief."
  assert re.fullmatch(r"<think>.+</think><answer>\d+</answer>", prompt[2]["content"], re.DOTALL)
  assert make_task("gsm8k", data_dir=data_dir, system="").splits["eval"][0].prompt == [user]
  assert task.stop == ()


@pytest.mark.parametrize("answer", ["hash", "boxed", "tags"])
def test_shots_are_training_problems_solved_in_the_requested_format(data_dir, answer):
  task = make_task("gsm8k", data_dir=data_dir, format="completion", shots=3, answer=answer)
  prompt = task.splits["eval"][1].prompt
  *shots, last = prompt.split("\n\n")
  assert last == f"Q: {task.splits['eval'][1].columns['question']}\nA:"
  assert "<<" not in prompt
  gold = {row["question"].strip(): row["answer"].split("####")[1].strip() for row in lines("train")}
  solved = [re.fullmatch(r"Q: (.+?)\nA: (.+)", shot, re.DOTALL).groups() for shot in shots]
  assert len({question for question, _ in solved} & set(gold)) == 3
  assert not {question for question, _ in solved} & {
    example.columns["question"] for example in task.splits["train"]
  }
  assert len(task.splits["train"]) == 6 - 3
  rewards, _ = score(
    task.rewards,
    [""] * 3,
    [[reply] for _, reply in solved],
    {"answer": [gold[question] for question, _ in solved]},
  )
  assert rewards.tolist() == [[1.0]] * 3  # the solved examples would be rewarded
  assert task.stop == ("\n\n",)
  assert {task.answer(reply) for _, reply in solved} == {
    task.answer(f"#### {gold[q]}") for q, _ in solved
  }


def test_completion_without_shots_starts_with_an_instruction(data_dir):
  task = make_task("gsm8k", data_dir=data_dir, format="completion", shots=0)
  example = task.splits["eval"][0]
  instruction, question = example.prompt.split("\n\n")
  assert "####" in instruction
  assert question == f"Q: {example.columns['question']}\nA:"
  assert task.stop == ("\nQ:",)


def test_the_seed_selects_shots_and_evaluation_problems(data_dir):
  def selection(seed):
    settings = {"format": "completion", "shots": 2, "eval_size": 2, "seed": seed}
    task = make_task("gsm8k", data_dir=data_dir, **settings)
    return task.splits["eval"][0].prompt.split("\n\n")[:2], [e.key for e in task.splits["eval"]]

  assert selection(1) == selection(1)
  assert len({str(selection(seed)[0]) for seed in range(8)}) > 1
  assert len({str(selection(seed)[1]) for seed in range(8)}) > 1


def test_reward_and_accuracy_compare_the_number(data_dir):
  task = make_task("gsm8k", data_dir=data_dir)
  example = next(e for e in task.splits["train"] if e.columns["answer"] == "1080")
  columns = {name: [value] for name, value in example.columns.items()}
  texts = [["So \\boxed{1,080}.", "\\boxed{1081}", "\\boxed{-1080}", "#### 1080", ""]]
  for rewards in (task.rewards, {"accuracy": (task.accuracy, 1.0)}):
    assert score(rewards, [example.prompt], texts, columns)[0].tolist() == [[1, 0, 0, 1, 0]]
  assert task.answer("\\boxed{1,080}") == task.answer("#### 1080")
  assert task.answer("I do not know") is None


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"format": "chatt"}, "unknown format 'chatt'.*'chat'"),
    ({"answer": "box"}, "unknown way to write the answer 'box'.*'boxed'"),
    ({"shots": -1}, "shots is -1"),
    ({"shots": 6}, "shots is 6, but only 5 training problems have at most 260 characters"),
    ({"eval_size": -1}, "eval_size -1"),
    ({"eval_size": 5}, "eval_size is 5, but there are only 4 test problems"),
    ({"reward": "nummeric"}, "unknown grader 'nummeric'.*'numeric'"),
    ({"jsnol": "x"}, "unknown setting of task 'gsm8k' 'jsnol'.*'jsonl'"),
  ],
)
def test_wrong_settings(data_dir, settings, message):
  with pytest.raises(ValueError, match=message):
    make_task("gsm8k", data_dir=data_dir, **settings)


def test_a_reward_that_requires_another_column_is_named(data_dir):
  def mine(completions, gold, **columns):
    return [0.0] * len(completions)

  with pytest.raises(RewardError, match=r"gsm8k: .*'mine' .*requires gold.*answer, completions"):
    make_task("gsm8k", data_dir=data_dir, reward=mine)
