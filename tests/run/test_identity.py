"""Tests the digests of the files that a run was started with."""

import hashlib

import pytest

from grpo_jax.run import identity
from grpo_jax.run.workdir import WorkdirError


def sha256(content):
  return hashlib.sha256(content).hexdigest()


def test_digests_are_of_files_of_folders_and_of_texts(tmp_path):
  (tmp_path / "rows.jsonl").write_bytes(b"rows")
  (tmp_path / "folder" / "sub").mkdir(parents=True)
  (tmp_path / "folder" / "a").write_bytes(b"1")
  (tmp_path / "folder" / "sub" / "b").write_bytes(b"2")
  digests = identity.digests(
    [tmp_path / "rows.jsonl", str(tmp_path / "folder")], {"chat template": "√"}
  )
  assert digests == {
    "chat template": sha256("√".encode()),
    f"{tmp_path}/rows.jsonl": sha256(b"rows"),
    f"{tmp_path}/folder/a": sha256(b"1"),
    f"{tmp_path}/folder/sub/b": sha256(b"2"),
  }


def test_digests_are_read_back(tmp_path):
  assert identity.read(tmp_path) is None
  identity.write(tmp_path, {"b": "2", "a": "1"})
  assert identity.read(tmp_path) == {"a": "1", "b": "2"}
  assert [path.name for path in tmp_path.iterdir()] == [identity.IDENTITY]


@pytest.mark.parametrize("text", ["", '{"a": "1"', '["a"]', '{"a": 1}'])
def test_damaged_digests_are_explained(tmp_path, text):
  (tmp_path / identity.IDENTITY).write_text(text)
  with pytest.raises(WorkdirError, match=r"identity\.json is damaged.*Remove it"):
    identity.read(tmp_path)
