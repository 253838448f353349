"""Sets what has to be set before jax starts; fixtures that several test modules share."""

import atexit
import os
import shutil
import tempfile

# Eight virtual CPU devices, so that sharding can be tested on any machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  ).strip()

# Processes that a test starts share the compiled programs of this one: they inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="grpo_jax_tests_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

from tests.helpers.arrays import float64


@pytest.fixture
def no_rank_promotion():
  """Makes an operation on arrays of different rank an error unless the code says how."""
  with jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def x64():
  """Enables float64 while the test runs."""
  with float64():
    yield
