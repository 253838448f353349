"""Folders appear whole or not at all, and never over something else."""

import pytest

from grpo_jax.models.io.folders import new_folder


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
  (tmp_path / "adapter_config.json").write_text("precious")
  with pytest.raises(FileExistsError, match="not an empty folder"), new_folder(tmp_path):
    pass
  assert (tmp_path / "adapter_config.json").read_text() == "precious"


def test_a_file_is_left_alone(tmp_path):
  (tmp_path / "out").write_text("precious")
  with pytest.raises(FileExistsError), new_folder(tmp_path / "out"):
    pass
  assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("empty", [False, True])
def test_it_appears_whole(tmp_path, empty):
  out = tmp_path / "a" / "out"
  if empty:
    out.mkdir(parents=True)
  with new_folder(out) as partial:
    (partial / "x").write_text("1")
    assert not out.exists() or not any(out.iterdir())
  assert (out / "x").read_text() == "1"
  assert [path.name for path in out.parent.iterdir()] == ["out"]


def fill_and_fail(out):
  with new_folder(out) as partial:
    (partial / "x").write_text("1")
    raise KeyError


def test_an_error_leaves_nothing(tmp_path):
  with pytest.raises(KeyError):
    fill_and_fail(tmp_path / "out")
  assert not list(tmp_path.iterdir())
