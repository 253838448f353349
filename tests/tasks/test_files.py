"""Tests rows of data files: their kinds, several files and folders, and what is wrong with them."""

import json

import pytest

from grpo_jax.tasks import files, make_task


def exact(prompts, completions, answer, **columns):
  return [float(text == str(a)) for text, a in zip(completions, answer)]


def write_lines(path, *rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def write_parquet(path, *rows):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
  return str(path)


def row(n):
  return {"prompt": f"Say {n}.", "answer": n}


def prompts(task, split="train"):
  return [example.prompt for example in task.splits[split]]


# --- one file -------------------------------------------------------------------------------------


def test_a_csv_file_holds_text(tmp_path):
  path = tmp_path / "a.csv"
  path.write_bytes(
    '\ufeffprompt,answer\r\n"Say, ""007"".",007\r\n\r\n"two\nlines",1e5\r\nü,\r\n'.encode()
  )
  rows = files.open_rows([str(path)])
  assert [rows[i] for i in range(len(rows))] == [
    {"prompt": 'Say, "007".', "answer": "007"},
    {"prompt": "two\nlines", "answer": "1e5"},
    {"prompt": "ü", "answer": ""},
  ]
  assert [rows.where(i) for i in range(3)] == [f"{path}, line {n}" for n in (2, 4, 6)]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"prompt,answer\nx,1\ny\n", "a.csv, line 3: 1 cells for the 2 columns"),
    (b"prompt,answer\nx,1,2\n", "a.csv, line 2: 3 cells for the 2 columns"),
    (b"prompt,prompt\nx,1\n", "line 1: the columns need different names"),
    (b"prompt,\nx,1\n", "line 1: the columns need different names"),
    (b'prompt,answer\n"x"y,1\n', "a.csv, after line 1: not CSV in UTF-8"),
    (b"prompt,answer\nx,\xff\n", "not CSV in UTF-8"),
    (b"prompt,answer\n", "contains no examples"),
    (b"", "contains no examples"),
  ],
)
def test_a_bad_csv_file_is_named(tmp_path, content, message):
  path = tmp_path / "a.csv"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    files.open_rows([str(path)])


def test_a_json_file_is_a_list_or_lines(tmp_path):
  (tmp_path / "a.json").write_text("\ufeff " + json.dumps([row(1), row(2)], indent=2))
  write_lines(tmp_path / "b.json", row(3))
  rows = files.open_rows([str(tmp_path / name) for name in ("a.json", "b.json")])
  assert [rows[i] for i in range(len(rows))] == [row(1), row(2), row(3)]
  assert rows.where(1) == f"{tmp_path}/a.json, entry 2"
  assert rows.where(2) == f"{tmp_path}/b.json, line 1"
  for text, message in (
    ("[1]", "entry 1: must be a JSON object, got '1'"), ("[{}", "not a list in JSON"),
    ("[]", "contains no examples"), ("[" * 100_000, "not a list in JSON"),
  ):  # fmt: skip
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json.*{message}"):
      files.open_rows([str(tmp_path / "a.json")])


def test_a_compressed_file_is_not_read_as_text(tmp_path):
  (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
  with pytest.raises(ValueError, match=r"a\.jsonl\.gz is compressed: unpack it first"):
    files.open_rows([str(tmp_path / "a.jsonl.gz")])


# --- several files --------------------------------------------------------------------------------


def test_files_are_joined_in_their_order(tmp_path):
  first = write_lines(tmp_path / "z.jsonl", row(0), row(1))
  second = write_parquet(tmp_path / "a.parquet", row(2), row(3), row(4))
  (tmp_path / "m.csv").write_text("prompt,answer\nSay 5.,5\n")
  rows = files.open_rows([first, second, str(tmp_path / "m.csv")])
  assert [rows[i]["prompt"] for i in range(len(rows))] == [f"Say {n}." for n in range(6)]
  assert rows.where(4) == f"{second}, row 3"
  paths = [first, second, str(tmp_path / "m.csv")]
  task = make_task("table", path=paths, reward=exact, eval_fraction=0.0)
  assert prompts(task) == [f"Say {n}." for n in range(6)]
  assert task.name == "table:z.jsonl and 2 more"
  assert task.files[:3] == tuple(paths)


def test_a_folder_of_shards_is_read_by_name(tmp_path):
  for number in (2, 0, 1):
    write_parquet(tmp_path / "deep" / f"train-{number}.parquet", row(number))
  write_parquet(tmp_path / "deep" / "test-0.parquet", row(7), row(1))
  (tmp_path / "README.md").write_text("# data")
  (tmp_path / "dataset_info.json").write_text("{}")
  write_parquet(tmp_path / ".cache" / "train-9.parquet", row(9))
  with pytest.warns(UserWarning, match="left out of training: 1 of 3 rows, whose problems are in"):
    task = make_task("table", path=str(tmp_path), reward=exact, eval_split="test")
  assert prompts(task) == ["Say 0.", "Say 2."]
  assert prompts(task, "eval") == ["Say 1.", "Say 7."][::-1]
  assert task.files[:3] == tuple(f"{tmp_path}/deep/train-{n}.parquet" for n in (0, 1, 2))
  task = make_task("table", path=str(tmp_path), reward=exact, split="test", eval_fraction=0.0)
  assert prompts(task) == ["Say 7.", "Say 1."]


def test_a_folder_whose_names_say_nothing_is_all_train(tmp_path):
  for name in ("b", "a", "latest"):
    write_lines(tmp_path / f"{name}.jsonl", row(ord(name[0])))
  task = make_task("table", path=str(tmp_path), reward=exact, eval_fraction=0.0)
  assert prompts(task) == ["Say 97.", "Say 98.", "Say 108."]


def test_folders_that_cannot_be_read_are_explained(tmp_path):
  with pytest.raises(ValueError, match="has no files of the split 'train': it has no data files"):
    make_task("table", path=str(tmp_path), reward=exact)
  write_lines(tmp_path / "test.jsonl", row(0))
  with pytest.raises(ValueError, match=r"split 'train': its data files are test\.jsonl"):
    make_task("table", path=str(tmp_path), reward=exact)
  write_lines(tmp_path / "train.jsonl", row(0))
  (tmp_path / "train.csv").write_text("prompt\nx\n")
  with pytest.raises(ValueError, match=r"files of several kinds.*Name the files: path=\[\.\.\.\]"):
    make_task("table", path=str(tmp_path), reward=exact)


def test_columns_that_differ_between_files_name_both(tmp_path):
  first = write_lines(tmp_path / "a.jsonl", row(0))
  second = write_lines(tmp_path / "b.jsonl", row(1), {"prompt": "x", "solution": 1})
  with pytest.raises(ValueError, match=r"b\.jsonl, line 2: .*of .*a\.jsonl, line 1; they differ"):
    make_task("table", path=[first, second], reward=exact)
