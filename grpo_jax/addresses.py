"""Tells addresses of object stores from paths of this machine."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

SCHEMES = ("gs", "s3")  # of the object stores that can hold a work directory
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]+")


class AddressError(ValueError):
  """Reports a path that is neither one of this machine nor one of a supported store."""


@dataclass(frozen=True)
class Address:
  """A folder on an object store.

  Attributes:
    scheme: one of `SCHEMES`.
    bucket: its name.
    prefix: of the names of the objects, without a slash at its end; never empty.
  """

  scheme: str
  bucket: str
  prefix: str

  def __str__(self) -> str:
    return f"{self.scheme}://{self.bucket}/{self.prefix}"


def parse(text: str | Path | Address) -> Path | Address:
  """Returns the address of a store, or the path of this machine that a text names.

  `file://` and `file:` name paths of this machine.

  Raises:
    AddressError: the text is a URL of another kind, or incomplete.

  Example:
    >>> parse("gs://bucket/runs/a/"), parse("runs/a").as_posix(), parse("file:///a/b").as_posix()
    (Address(scheme='gs', bucket='bucket', prefix='runs/a'), 'runs/a', '/a/b')
    >>> parse("gs:/bucket/a")
    Traceback (most recent call last):
    grpo_jax.addresses.AddressError: 'gs:/bucket/a' has one slash: write gs://bucket/a
  """
  if isinstance(text, Address):
    return text
  name = str(text)
  match = _SCHEME.match(name)
  if match is None:
    return Path(name)
  scheme, rest = match[1].lower(), name[match.end() :]
  slashes = match[0].count("/")
  if scheme == "file":
    if slashes == 2 and not rest.startswith("localhost/"):
      raise AddressError(f"{name!r} names a machine: write file:///{rest}, with three slashes")
    return Path("/", unquote(rest.removeprefix("localhost/") if slashes == 2 else rest))
  if scheme not in SCHEMES:
    known = ", ".join(f"{scheme}://BUCKET/PATH" for scheme in SCHEMES)
    raise AddressError(f"{name!r} is not supported: give a path of this machine, or {known}")
  if slashes != 2:
    count = "one slash" if slashes == 1 else f"{slashes} slashes"
    raise AddressError(f"{name!r} has {count}: write {scheme}://{rest}")
  bucket, _, prefix = rest.partition("/")
  parts = [part for part in prefix.split("/") if part]
  if not _BUCKET.fullmatch(bucket):
    raise AddressError(f"{name!r} does not name a bucket: write {scheme}://BUCKET/PATH")
  if not parts or {".", ".."} & set(parts) or not prefix.isprintable():
    raise AddressError(
      f"{name!r} does not name a folder in the bucket: write {scheme}://{bucket}/PATH"
    )
  return Address(scheme, bucket, "/".join(parts))


def local(text: str | Path | Address, what: str) -> Path:
  """Returns the path of this machine that a text names, with `~` as the home of the user.

  Args:
    what: of the path, for the message, such as `--out`.

  Raises:
    AddressError: the text is a URL of another machine.
    RuntimeError: the home of the user is unknown.

  Example:
    >>> local("s3://bucket/a", "--out")
    Traceback (most recent call last):
    grpo_jax.addresses.AddressError: --out is 's3://bucket/a': it must be a path of this machine
  """
  try:
    path = parse(text)
  except AddressError as error:
    raise AddressError(f"{what}: {error}") from None
  if isinstance(path, Address):
    raise AddressError(f"{what} is '{path}': it must be a path of this machine")
  return path.expanduser()


def is_path(text: str | Path | Address | None) -> bool:
  """Tells whether a text names a path of this machine; so does None.

  Example:
    >>> is_path("cache"), is_path("file:///cache"), is_path("gs://b/cache"), is_path("gs:/b")
    (True, True, False, False)
  """
  try:
    return text is None or isinstance(parse(text), Path)
  except AddressError:
    return False
