"""What has to be set before jax starts, and fixtures that several test modules share."""

import os

# Eight devices that are not there, so that sharding can be tested on any machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  ).strip()

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
