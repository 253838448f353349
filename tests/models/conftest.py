"""Fixtures of the tests of models."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.model_files import UNTIED


@pytest.fixture
def folder(tmp_path):
  """A copy of the untied fixture that a test may damage."""
  return Path(shutil.copytree(UNTIED, tmp_path / "model"))
