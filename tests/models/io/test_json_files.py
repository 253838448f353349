"""Tests reading and writing JSON objects."""

import json

import pytest

from grpo_jax.models.io.json_files import read_json, write_json


def test_an_object_is_written_sorted_and_reads_back(tmp_path):
  path = tmp_path / "config.json"
  write_json(path, {"b": [1, None], "a": "é"})
  assert path.read_text(encoding="utf-8").splitlines()[1] == '  "a": "\\u00e9",'
  assert read_json(path) == {"a": "é", "b": [1, None]}


def test_a_missing_file_is_named_with_its_folder(tmp_path):
  with pytest.raises(FileNotFoundError) as caught:
    read_json(tmp_path / "config.json")
  assert str(caught.value) == f"no config.json in {tmp_path}"


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"{", "config.json is not JSON"),
    (b"\xff\xfe", "config.json is not JSON"),
    (json.dumps([1, 2]).encode(), "config.json must hold a JSON object, got list"),
  ],
)
def test_a_file_of_something_else_is_named(tmp_path, content, message):
  path = tmp_path / "config.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    read_json(path)
  assert str(tmp_path) in str(caught.value)
