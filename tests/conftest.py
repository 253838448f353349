"""What has to be set before jax starts, and fixtures that several test modules share."""

import atexit
import os
import shutil
import tempfile

# Eight devices that are not there, so that sharding can be tested on any machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  ).strip()

# What one test has compiled, the processes of others need not: they find the variable set.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="grpo_jax_tests_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest


@pytest.fixture
def no_rank_promotion():
  """Shapes of different rank do not mix unless the code says how; used by the tests of core."""
  with jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def x64():
  """Float64 while the test runs."""
  with jax.enable_x64(True):
    yield
