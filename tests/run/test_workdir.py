"""Tests that a work directory serves one run at a time, and that damage to it is explained."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.run import workdir

HOLD_LOCK = """
import sys, time
from grpo_jax.run import workdir
with workdir.lock(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


def test_one_run_at_a_time_and_a_kill_releases_the_lock(tmp_path):
  folder = tmp_path / "new"
  command = [sys.executable, "-c", HOLD_LOCK, str(folder)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
    try:
      assert other.stdout.readline() == "held\n"
      before = (folder / workdir.LOCK).read_text()
      assert before.startswith(f"process {other.pid} on ")
      with pytest.raises(workdir.WorkdirError) as caught, workdir.lock(folder):
        pass
      assert f"{folder} is in use by process {other.pid} on " in str(caught.value)
      assert (folder / workdir.LOCK).read_text() == before
    finally:
      other.send_signal(signal.SIGKILL)
  with workdir.lock(folder), pytest.raises(workdir.WorkdirError), workdir.lock(folder):
    pass
  with workdir.lock(folder):
    assert not (folder / workdir.LOCK).read_text().startswith(f"process {other.pid} ")


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(workdir.fcntl, "flock", flock)
  with pytest.warns(RuntimeWarning, match="without locks .No locks available."):  # noqa: SIM117
    with workdir.lock(tmp_path):
      pass


def test_a_config_is_read_back_and_no_partial_file_is_left(tmp_path):
  assert workdir.read_config(tmp_path) is None
  for config in ({"a": 1, "b": {"c": [1, None]}}, {"a": 2}):
    workdir.write_config(tmp_path, config)
    assert workdir.read_config(tmp_path) == config
  assert [path.name for path in tmp_path.iterdir()] == [workdir.CONFIG]


@pytest.mark.parametrize("text", ['{"steps": 8, "se', "", "[1]", "\x00\x00"])
def test_a_damaged_config_is_explained(tmp_path, text):
  (tmp_path / workdir.CONFIG).write_text(text)
  with pytest.raises(workdir.WorkdirError) as caught:
    workdir.read_config(tmp_path)
  assert str(tmp_path / workdir.CONFIG) in str(caught.value)
  assert "Put a copy of it back; or remove it" in str(caught.value)


def test_a_full_file_system_is_recognized():
  assert workdir.is_full(OSError(errno.ENOSPC, "x"))
  assert workdir.is_full(OSError(errno.EDQUOT, "x"))
  assert workdir.is_full(ValueError("writing failed: No space left on device [source a.cc:1]"))
  assert not workdir.is_full(OSError(errno.ENOENT, "x"))
  outer = ValueError("y")
  outer.__cause__ = OSError(errno.ENOSPC, "x")
  assert workdir.is_full(outer)


def test_free_space_is_that_of_the_file_system_of_a_path(tmp_path):
  free, _, rest = workdir.free_space(tmp_path / "not" / "there").partition(" MiB are free on ")
  assert float(free) >= 0
  assert Path(rest.removeprefix("the file system at ")).is_mount()


def test_a_file_is_replaced_atomically(tmp_path):
  """A reader that has the file open still sees the old content."""
  path = tmp_path / "x.json"
  workdir.write_whole(path, json.dumps([1]))
  with path.open() as reader:
    workdir.write_whole(path, json.dumps([2]))
    assert json.load(reader) == [1]
  assert json.loads(path.read_text()) == [2]


def test_a_path_that_cannot_be_a_work_directory_is_explained(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("x")
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  for path, words in (
    ("", "is '': give the path"),
    (" ", "is ' ': give the path"),
    (tmp_path / "file", r"file cannot be a work directory: .*file is a file"),
    (tmp_path / "file" / "below", "file is a file"),
    (tmp_path / "link", "link is a link to .*nowhere, which does not exist"),
    (tmp_path / "link" / "below", "link is a link to"),
    (tmp_path / ("a" * 300), "cannot be a work directory: .*name too long"),
    ("a\0b", "give the path"),
    ("~no_such_user/x", "cannot be a work directory"),
  ):
    with pytest.raises(workdir.WorkdirError, match=words):
      workdir.path_of(path)
  monkeypatch.setenv("HOME", str(tmp_path))
  assert workdir.path_of("~/x") == tmp_path / "x"
  (tmp_path / "there").mkdir()
  (tmp_path / "other").symlink_to(tmp_path / "there")
  assert workdir.path_of(tmp_path / "other") == tmp_path / "other"


def test_a_directory_that_cannot_be_written_is_explained(tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(Path, "open", refuse)
  with pytest.raises(workdir.WorkdirError, match="cannot be a work directory: Permission denied"):  # noqa: SIM117
    with workdir.lock(tmp_path):
      pass
