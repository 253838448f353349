"""Sets what has to be set before jax starts; fixtures that several test modules share."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight virtual devices, so that sharding can be tested on any machine.
FLAGS = {"xla_force_host_platform_device_count": 8}
# Four fifths of the time of these tests is compilation of small programs that run once. The slow
# tests, test_old_runs, test_compilation and test_deterministic compile as a user does.
if "COMPILE_AS_USERS_DO" not in os.environ:
  FLAGS["xla_backend_optimization_level"] = 0
  FLAGS["xla_cpu_parallel_codegen_split_count"] = 1
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"  # XLA:CPU: other versions refuse this flag
for name, value in FLAGS.items():
  if name not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{name}={value}".strip()

# Processes that a test starts share the compiled programs of this one: they inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="grpo_jax_tests_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.helpers.arrays import float64  # noqa: E402

# Tracing makes many objects that stay. Going through them so often took a tenth of the time.
gc.set_threshold(100_000, 50, 100)

MEMORY = 4 * 2**30  # bytes of a test process above which it forgets its compiled programs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
  """Frees compiled programs between two files of tests; they would add up to 10 GiB a process."""
  yield  # what the test has patched is put back first
  if nextitem is not None and nextitem.path == item.path:
    return
  statm = Path("/proc/self/statm")  # of Linux
  pages = int(statm.read_text().split()[1]) if statm.exists() else 0
  if pages * os.sysconf("SC_PAGE_SIZE") > MEMORY:
    jax.clear_caches()
    gc.collect()


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
