"""The compilation cache: where it is, and that a continued run compiles nothing anew."""

import os
import re
import shutil
import subprocess
import sys

import jax
import pytest

from grpo_jax.config import default_config, from_saved
from grpo_jax.run import compilation

SETTINGS = (
  "jax_enable_compilation_cache",
  "jax_compilation_cache_dir",
  "jax_persistent_cache_min_compile_time_secs",
  "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def untouched():
  """jax's settings as they were, after the test."""
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_where_the_cache_is(untouched, tmp_path):
  jax.config.update("jax_compilation_cache_dir", None)
  work = tmp_path / "runs" / "a"
  assert compilation.use_cache("auto", work) == tmp_path / "runs" / "compilation_cache"
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "runs" / "compilation_cache")
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  jax.config.update("jax_compilation_cache_dir", "/elsewhere")
  assert str(compilation.use_cache("auto", work)) == "/elsewhere"
  assert jax.config.jax_compilation_cache_dir == "/elsewhere"
  assert compilation.use_cache(str(tmp_path / "mine"), work) == tmp_path / "mine"
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
  assert compilation.use_cache("off", work) is None
  assert not jax.config.jax_enable_compilation_cache


def test_a_watch_counts_until_the_first_step():
  said = []
  with compilation.Watch() as watch:
    jax.jit(lambda x: x * 3 + watch.programs)(1.0)
    watch.report(said.append)
    jax.jit(lambda x: x * 5 - 1)(1.0)
    watch.report(said.append)
  assert len(said) == 1
  assert re.search(r"after \d+\.\d s: [1-9]\d* programs", said[0])


def test_a_config_from_before_a_field_gets_its_default():
  saved = {"seed": 4, "rollout": {"stop": ["x"]}, "task": {"settings": {"eval_size": 3}}}
  config = from_saved(saved)
  assert (config.seed, config.task.settings.eval_size, config.train.max_skipped) == (4, 3, 5)
  assert config.rollout.group_size == default_config().rollout.group_size
  assert list(config.rollout.stop) == ["x"]


def test_a_continued_run_compiles_nothing_anew(tmp_path):
  """Four steps; two of them are taken away and run again, by another process."""
  environment = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1")
  environment = {k: v for k, v in environment.items() if not k.startswith("JAX_PERSISTENT")}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  work, cache = tmp_path / "run", tmp_path / compilation.FOLDER
  options = [
    "steps=4", "checkpoint.every=1", "checkpoint.keep=9", "task.settings.eval_size=0",
    "rollout.completion_length=5", "log.samples=0", "rewards.workers=0",
  ]  # fmt: skip

  def train():
    command = [sys.executable, "-m", "grpo_jax.train", "--config", "experiments/tiny.py"]
    command += ["--workdir", str(work), *(f"--config.{option}" for option in options)]
    done = subprocess.run(
      command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    counts = re.search(r"(\d+) of them compiled, (\d+) from the cache", done.stdout)
    # Beside each entry jax keeps a file with the time it was last read.
    return [int(n) for n in counts.groups()], {p.name for p in cache.glob("*-cache")}

  (compiled, cached), entries = train()
  assert compiled > 20
  assert cached == 0
  for step in ("3", "4"):
    shutil.rmtree(work / "checkpoints" / step)
  (compiled, cached), after = train()
  assert compiled == 0
  assert cached > 20
  assert after == entries
  assert len(entries) > 20
