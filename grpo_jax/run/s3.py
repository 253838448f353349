"""Makes requests to S3, and to stores that speak its language, by boto3, one attempt each.

Credentials are the library's usual ones. AWS_ENDPOINT_URL names another server.
"""

from pathlib import Path
from typing import Any

from grpo_jax.run.stores import ANY, Changed, Entry, Missing, Refused, busy

_CREDENTIALS = (
  "there are no valid credentials for s3://: run `aws configure`, set AWS_ACCESS_KEY_ID and "
  "AWS_SECRET_ACCESS_KEY, or give the machine a role"
)
_MISSING = {"404", "NoSuchKey", "NotFound"}
_CHANGED = {"412", "PreconditionFailed", "ConditionalRequestConflict"}
_NO_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_BUSY = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "InternalError"}


class S3:
  """The driver of a bucket."""

  def __init__(self, bucket: str) -> None:
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    self._name = bucket
    how = Config(
      retries={"total_max_attempts": 1}, connect_timeout=10, read_timeout=60,
      max_pool_connections=32,
    )  # fmt: skip
    try:
      self._client = boto3.session.Session().client("s3", config=how)
    except (BotoCoreError, ValueError) as error:
      raise Refused(f"{type(error).__name__}: {error}") from error
    self._transfer = TransferConfig(max_concurrency=4, num_download_attempts=1)

  def get(self, key: str) -> tuple[bytes, Entry]:
    """Returns the content of an object and its entry."""
    answer = self._client.get_object(Bucket=self._name, Key=key)
    content = answer["Body"].read()
    return content, _entry(key, len(content), answer)

  def fetch(self, key: str, path: Path) -> None:
    """Writes the content of an object to a file."""
    with path.open("wb") as file:
      self._client.download_fileobj(self._name, key, file, Config=self._transfer)

  def put(self, key: str, content: bytes | Path, version: str) -> str:
    """Writes an object if it has the version; a file has no condition, and returns no version."""
    if isinstance(content, Path):
      with content.open("rb") as file:
        self._client.upload_fileobj(file, self._name, key, Config=self._transfer)
      return ""
    condition = {} if version == ANY else {"IfMatch": version} if version else {"IfNoneMatch": ANY}
    return self._client.put_object(Bucket=self._name, Key=key, Body=content, **condition)["ETag"]

  def entries(self, prefix: str) -> list[Entry]:
    """Returns all objects whose keys begin with the prefix."""
    pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name, Prefix=prefix)
    return [
      _entry(row["Key"], row["Size"], row) for page in pages for row in page.get("Contents", [])
    ]

  def remove(self, key: str) -> None:
    """Removes an object."""
    self._client.delete_object(Bucket=self._name, Key=key)

  def explain(self, error: Exception) -> Exception:
    """Returns Busy, Missing, Changed or Refused for an error of the library."""
    import boto3.exceptions
    import urllib3
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
      answer = error.response
      code = str(answer.get("Error", {}).get("Code", ""))
      status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
      if code == "NoSuchBucket":
        return Refused(
          f"there is no bucket {self._name}: create it (`aws s3 mb s3://{self._name}`), or correct "
          "the name"
        )
      if code in _MISSING:
        return Missing(code)
      if code in _CHANGED:
        return Changed(code)
      if code in _NO_CREDENTIALS or status == 401:
        return Refused(_CREDENTIALS)
      if code in _BUSY or status in (408, 409, 429) or status >= 500:
        return busy(error)
      if status == 403:
        return Refused(
          "these credentials do not allow it: they need s3:ListBucket, s3:GetObject, s3:PutObject "
          f"and s3:DeleteObject on the bucket {self._name}"
        )
      return Refused(busy(error).args[0])
    credentials = (
      exceptions.NoCredentialsError, exceptions.PartialCredentialsError,
      exceptions.CredentialRetrievalError, exceptions.TokenRetrievalError,
    )  # fmt: skip
    if isinstance(error, credentials):
      return Refused(_CREDENTIALS)
    network = (
      exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError,
      exceptions.ResponseStreamingError, exceptions.FlexibleChecksumError,
      boto3.exceptions.RetriesExceededError, urllib3.exceptions.HTTPError, ConnectionError,
      TimeoutError,
    )  # fmt: skip
    if isinstance(error, network):
      return busy(error)
    if isinstance(error, exceptions.BotoCoreError):
      return Refused(busy(error).args[0])
    return error


def _entry(key: str, size: int, answer: dict[str, Any]) -> Entry:
  return Entry(key, size, answer["ETag"], answer["LastModified"].timestamp())
