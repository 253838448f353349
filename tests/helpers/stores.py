"""Serves stores on this machine: our GCS server, and moto as S3, each behind a faulty proxy."""

import contextlib
import dataclasses
import itertools
import logging
from typing import Any

from grpo_jax.addresses import Address
from grpo_jax.run.stores import Store, open_store
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.gcs_server import GcsServer

BUCKET = "bucket"
_NUMBERS = itertools.count()


@dataclasses.dataclass
class Served:
  """A store that is served.

  Attributes:
    scheme: of its addresses.
    proxy: in front of it.
    variables: environment variables with which a process finds it, and no other one.
  """

  scheme: str
  proxy: FaultProxy
  variables: dict[str, str]
  server: Any

  def new(self, name: str = "run") -> Address:
    """Returns the address of a folder that does not exist yet."""
    return Address(self.scheme, BUCKET, f"test{next(_NUMBERS)}/{name}")

  def contents(self, address: Address) -> dict[str, bytes]:
    """Returns the content of every object of a folder."""
    store: Store = open_store(address)
    return {entry.name: store.read(entry.name) or b"" for entry in store.list()}


@contextlib.contextmanager
def served(scheme, patch):
  """Serves a store; `patch` (a MonkeyPatch) sets the variables in this process."""
  # No test reaches for the machine that a cloud tells its credentials by.
  common = {
    "NO_GCE_CHECK": "true", "GCE_METADATA_HOST": "127.0.0.1:1", "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1", "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
  }  # fmt: skip
  with contextlib.ExitStack() as stack:
    if scheme == "gs":
      server = stack.enter_context(GcsServer(BUCKET))
      proxy = stack.enter_context(FaultProxy(server.port))
      variables = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{proxy.port}"}
    else:
      from moto.server import ThreadedMotoServer

      logging.getLogger("werkzeug").setLevel(logging.ERROR)
      server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
      server.start()
      stack.callback(server.stop)
      proxy = stack.enter_context(FaultProxy(server.get_host_and_port()[1]))
      variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests", "AWS_DEFAULT_REGION": "us-east-1",
      }  # fmt: skip
    for name, value in (common | variables).items():
      patch.setenv(name, value)
    if scheme == "s3":
      import boto3

      boto3.client("s3").create_bucket(Bucket=BUCKET)
    yield Served(scheme, proxy, common | variables, server)
