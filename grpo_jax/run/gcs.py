"""Makes requests to Google Cloud Storage by its own library, one attempt each.

Credentials are the library's usual ones. STORAGE_EMULATOR_HOST names another server.
"""

from pathlib import Path
from typing import Any

from grpo_jax.run.stores import ANY, Busy, Changed, Entry, Missing, Refused, busy

_TIMEOUT = 10.0, 60.0  # seconds to connect, and between two parts of an answer
_CREDENTIALS = (
  "there are no credentials for gs://: run `gcloud auth application-default login`, set "
  "GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service account"
)


class Gcs:
  """The driver of a bucket.

  Raises:
    Refused: there are no credentials.
  """

  def __init__(self, bucket: str) -> None:
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage

    self._name = bucket
    try:
      # A project is needed for lists of buckets only.
      self._client = storage.Client(project="none")
    except GoogleAuthError as error:
      raise Refused(_CREDENTIALS) from error
    self._bucket = self._client.bucket(bucket)
    self._how: dict[str, Any] = {"retry": None, "timeout": _TIMEOUT}

  def get(self, key: str) -> tuple[bytes, Entry]:
    """Returns the content of an object and its entry."""
    blob = self._bucket.get_blob(key, **self._how)
    if blob is None:
      raise Missing(key)
    try:
      content = blob.download_as_bytes(if_generation_match=blob.generation, **self._how)
    except Exception as error:
      if isinstance(self.explain(error), Changed | Missing):
        raise Busy(f"{key} changed while it was read") from error
      raise
    return content, _entry(blob)

  def fetch(self, key: str, path: Path) -> None:
    """Writes the content of an object to a file."""
    self._bucket.blob(key).download_to_filename(str(path), **self._how)

  def put(self, key: str, content: bytes | Path, version: str) -> str:
    """Writes an object if it has the version; returns its new one."""
    blob = self._bucket.blob(key)
    condition = None if version == ANY else int(version or 0)
    how = {"if_generation_match": condition, "checksum": "crc32c", **self._how}
    if isinstance(content, Path):
      blob.upload_from_filename(str(content), **how)
    else:
      blob.upload_from_string(content, content_type="application/octet-stream", **how)
    return str(blob.generation)

  def entries(self, prefix: str) -> list[Entry]:
    """Returns all objects whose keys begin with the prefix."""
    return [_entry(blob) for blob in self._bucket.list_blobs(prefix=prefix, **self._how)]

  def remove(self, key: str) -> None:
    """Removes an object."""
    self._bucket.blob(key).delete(**self._how)

  def explain(self, error: Exception) -> Exception:
    """Returns Busy, Missing, Changed or Refused for an error of the library."""
    import requests
    import urllib3
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    code = None
    if isinstance(error, GoogleAPICallError):
      code = error.code
    elif isinstance(error, InvalidResponse):
      code = error.response.status_code
    if code == 404:
      if "bucket" in str(error).lower() and "does not exist" in str(error).lower():
        return Refused(
          f"there is no bucket {self._name}: create it (`gcloud storage buckets create "
          f"gs://{self._name}`), or correct the name"
        )
      return Missing(str(error))
    if code in (304, 412):
      return Changed(str(error))
    if code == 401 or isinstance(error, DefaultCredentialsError | RefreshError):
      return Refused(_CREDENTIALS)
    if code == 403:
      return Refused(
        f"these credentials do not allow it: they need the role Storage Object Admin on the bucket "
        f"{self._name}"
      )
    network = (
      requests.RequestException, urllib3.exceptions.HTTPError, TransportError, DataCorruption,
      ConnectionError, TimeoutError,
    )  # fmt: skip
    if (code is not None and (code in (408, 409, 429) or code >= 500)) or isinstance(
      error, network
    ):
      return busy(error)
    return Refused(busy(error).args[0]) if code is not None else error


def _entry(blob: Any) -> Entry:
  return Entry(blob.name, blob.size or 0, str(blob.generation), blob.updated.timestamp())
