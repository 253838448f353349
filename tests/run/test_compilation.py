"""Tests where the compilation cache is, and that a continued run reads all programs from it."""

import os
import re
import shutil
import subprocess
import sys

import jax
import pytest

from grpo_jax.run import compilation

SETTINGS = (
  "jax_enable_compilation_cache",
  "jax_compilation_cache_dir",
  "jax_persistent_cache_min_compile_time_secs",
  "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def restored_settings():
  """Puts JAX's settings back after the test."""
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_the_cache_is_where_the_setting_says(restored_settings, tmp_path):
  jax.config.update("jax_compilation_cache_dir", None)
  work = tmp_path / "runs" / "a"
  assert compilation.use_cache("auto", work) == tmp_path / "runs" / "compilation_cache"
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "runs" / "compilation_cache")
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  jax.config.update("jax_compilation_cache_dir", None)
  assert compilation.use_cache("auto", work, inside=True) == work / "compilation_cache"
  jax.config.update("jax_compilation_cache_dir", "/elsewhere")
  assert str(compilation.use_cache("auto", work)) == "/elsewhere"
  assert jax.config.jax_compilation_cache_dir == "/elsewhere"
  assert compilation.use_cache(str(tmp_path / "mine"), work) == tmp_path / "mine"
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
  assert compilation.use_cache("off", work) is None
  assert not jax.config.jax_enable_compilation_cache


def test_a_watch_counts_until_its_first_report():
  lines = []
  with compilation.Watch() as watch:
    jax.jit(lambda x: x * 3 + watch.programs)(1.0)
    watch.report(lines.append)
    jax.jit(lambda x: x * 5 - 1)(1.0)
    watch.report(lines.append)
  assert len(lines) == 1
  assert re.search(r"after \d+\.\d s: [1-9]\d* programs", lines[0])
  assert f": {watch.programs} programs" in lines[0]  # the last `jit` came after the report


@pytest.mark.slow
def test_a_fresh_machine_compiles_nothing(server, tmp_path):
  """Two steps on a store, and two more with another folder of the machine, of another path."""
  address, options = server.new(), ["checkpoint.every=2", "rollout.completion_length=5",
                                    "task.settings.eval_size=0", "rewards.workers=0"]  # fmt: skip
  counts = []
  for steps, stage in ((2, "a"), (4, "another")):
    command = [sys.executable, "-m", "grpo_jax.train", "--config", "experiments/tiny.py"]
    command += ["--workdir", str(address), f"--config.steps={steps}"]
    command += [f"--config.{option}" for option in options]
    environment = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu")
    environment["GRPO_JAX_STAGES"] = str(tmp_path / stage)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    completed = subprocess.run(
      command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert completed.returncode == 0, completed.stdout
    found = re.search(r"(\d+) of them compiled, (\d+) from the cache", completed.stdout)
    counts.append([int(n) for n in found.groups()])
  assert counts[0][0] > 20
  assert counts[1][0] == 0
  assert counts[1][1] > 20


@pytest.mark.slow
def test_a_continued_run_compiles_nothing(tmp_path):
  """Runs four steps, removes two of the checkpoints, and runs these steps in another process."""
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
    completed = subprocess.run(
      command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert completed.returncode == 0, completed.stdout
    counts = re.search(r"(\d+) of them compiled, (\d+) from the cache", completed.stdout)
    # Beside each entry, JAX keeps a file with the time of its last use.
    return [int(n) for n in counts.groups()], {p.name for p in cache.glob("*-cache")}

  (compiled, cached), entries = train()
  assert compiled > 20
  assert cached < compiled / 4  # a few small programs are the same twice
  for step in ("3", "4"):
    shutil.rmtree(work / "checkpoints" / step)
  (compiled, cached), after = train()
  assert compiled == 0
  assert cached > 20
  assert after == entries
  assert len(entries) > 20
