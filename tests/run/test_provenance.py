"""Tests what a run says of its code, its data and its machines."""

import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax.run import provenance
from grpo_jax.tasks.base import Example


def git(folder, *command):
  command = ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e@e", *command]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
  folder = tmp_path / "code"
  folder.mkdir()
  git(folder, "init")
  (folder / "file").write_bytes(b"one\n")
  git(folder, "add", "file")
  git(folder, "commit", "-m", "first")
  return folder


def test_a_folder_without_a_commit_has_no_state(tmp_path):
  assert provenance.repository(tmp_path) is None
  assert provenance.repository(tmp_path / "missing") is None
  git(tmp_path, "init")
  assert provenance.repository(tmp_path) is None


def test_a_repository_as_committed(repository, tmp_path):
  head = git(repository, "rev-parse", "HEAD")
  expected = {"folder": str(repository.resolve()), "commit": head, "changed": False}
  assert provenance.repository(repository, tmp_path) == expected
  assert not (tmp_path / "diffs").exists()
  (repository / "new.py").write_text("")
  state = provenance.repository(repository, tmp_path)
  assert state == expected | {"untracked": ["new.py"]}


def test_changes_are_kept_so_that_git_puts_them_back(repository, tmp_path):
  content = b"two\n\xff\x00"  # no text
  (repository / "file").write_bytes(content)
  (repository / "staged").write_text("yes\n")
  git(repository, "add", "staged")
  state = provenance.repository(repository, tmp_path)
  assert state["changed"]
  patch = tmp_path / state["diff"]
  assert patch.stat().st_size == state["diff_bytes"]
  assert provenance.repository(repository, tmp_path)["diff"] == state["diff"]
  assert [file.name for file in (tmp_path / "diffs").iterdir()] == [patch.name]
  git(repository, "reset", "--hard")
  git(repository, "apply", str(patch))
  assert (repository / "file").read_bytes() == content
  assert (repository / "staged").read_text() == "yes\n"


def test_large_changes_are_not_kept(repository, tmp_path, monkeypatch):
  monkeypatch.setattr(provenance, "DIFF_BYTES", 100)
  (repository / "file").write_text("x\n" * 100)
  state = provenance.repository(repository, tmp_path)
  assert "diff" not in state
  assert state["diff_bytes"] > 200
  assert not (tmp_path / "diffs").exists()


def test_programs_that_a_repository_names_do_not_run(repository, tmp_path):
  """A diff driver of the repository's config is not started."""
  git(repository, "config", "diff.external", f"touch {tmp_path}/ran; false")
  (repository / "file").write_text("two\n")
  assert provenance.repository(repository, tmp_path)["diff_bytes"] > 0
  assert not (tmp_path / "ran").exists()


def test_the_package_is_told_where_it_is_in_another_repository(repository, monkeypatch, tmp_path):
  package = tmp_path / "package"
  (package / "inner").mkdir(parents=True)
  (package / "inner/__init__.py").write_text("")
  monkeypatch.setattr(provenance, "PACKAGE", package / "inner")
  assert set(provenance.code(repository)) == {"git"}  # it is installed, in no repository
  git(package, "init")
  git(package, "commit", "--allow-empty", "-m", "first")
  assert set(provenance.code(repository)) == {"git"}  # ... in one that does not know it
  git(package, "add", ".")
  states = provenance.code(repository)
  assert states["git_package"]["folder"] == str(package.resolve())
  assert states["git"]["folder"] == str(repository.resolve())
  assert set(provenance.code(package)) == {"git"}  # one and the same


# --- data -----------------------------------------------------------------------------------------


def example(number, **columns):
  return Example(f"{number} + 1", {"answer": number + 1, **columns}, str(number))


def test_the_data_are_told_by_number_and_digest():
  splits = {"train": [example(i) for i in range(5)], "eval": []}
  described = provenance.data(splits)
  assert [described[name]["problems"] for name in splits] == [5, 0]
  assert described == provenance.data({"train": tuple(splits["train"]), "eval": ()})
  for i in range(5):
    changed = list(splits["train"])
    changed[i] = example(i, answer=0)
    assert provenance.data({"train": changed})["train"] != described["train"]


def test_of_many_problems_some_are_read(monkeypatch):
  monkeypatch.setattr(provenance, "PROBLEMS", 4)
  read = []

  class Split(list):
    def __getitem__(self, index):
      read.append(index)
      return example(index)

  described = provenance.data({"train": Split(range(10))})
  assert (described["train"]["problems"], read) == (10, [0, 2, 5, 7])


def test_columns_may_hold_anything():
  class Thing:
    pass

  def digest():
    columns = {"a": np.arange(2), "b": {3, 1}, "c": Thing(), "d": np.float32(1), "e": "\ud800"}
    return provenance.data({"train": [example(0, **columns)]})["train"]["sha256"]

  assert digest() == digest()


def test_a_single_process_describes_itself():
  [machine] = provenance.machines()
  assert machine["pid"] == os.getpid()
  assert machine["process"] == 0
  assert machine["ids"] == [device.id for device in jax.devices()]
  assert machine["devices"] == f"{len(machine['ids'])} x cpu"


def test_this_checkout_is_found():
  if (Path.cwd() / ".git").exists():
    assert provenance.code("tests")["git"]["commit"] == git(Path.cwd(), "rev-parse", "HEAD")
