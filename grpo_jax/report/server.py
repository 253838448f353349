"""Serves the report of runs that go on, to this machine only."""

import gzip
import hashlib
import http.server
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from grpo_jax import addresses
from grpo_jax.report import page
from grpo_jax.report.data import Samples, named, sample_files
from grpo_jax.run.metrics import METRICS
from grpo_jax.run.record import RECORD
from grpo_jax.run.workdir import CONFIG

HOST = "127.0.0.1"


def files_of(folder: Path) -> list[Path]:
  """Returns what a report of a run reads."""
  names = (CONFIG, METRICS, RECORD)
  return [folder, *(folder / name for name in names), *(s.path for s in sample_files(folder))]


def stamp(path: Path) -> tuple[int, int]:
  """Returns what changes when a file does; zeros without it."""
  try:
    stat = path.stat()
  except FileNotFoundError:
    return 0, 0
  return stat.st_mtime_ns, stat.st_size


class Watched:
  """Reads runs again and again; of samples, only the files that have changed.

  Args:
    folders: work directories.
  """

  def __init__(self, folders: Sequence[str]) -> None:
    self._folders = [addresses.local(folder, "the run") for folder in folders]
    self._known: dict[Path, tuple[tuple[int, int], bytes, dict[str, Any]]] = {}
    self._version: list[Any] | None = None
    self._summary = b""

  def summary(self) -> bytes:
    """Returns all but the samples, as compressed JSON; what has not changed is not read again.

    Raises:
      ValueError: a folder is no longer a work directory.
    """
    version = [stamp(path) for folder in self._folders for path in files_of(folder)]
    if version != self._version:
      summaries = []
      for run in named(self._folders):
        index = page.Index()
        for file in sample_files(run.folder):
          index.add(file, self._part(file)[1])
        summaries.append(run.summary() | index.plain())
      self._summary = page.compressed({"live": True, "runs": summaries})
      self._version = version
    return self._summary

  def samples(self, run: int, name: str) -> bytes | None:
    """Returns a file of samples of a run, as compressed JSON; None if there is no such file."""
    files = sample_files(self._folders[run]) if 0 <= run < len(self._folders) else []
    found = next((file for file in files if file.path.name == name), None)
    return found and self._part(found)[0]

  def _part(self, file: Samples) -> tuple[bytes, dict[str, Any]]:
    version = stamp(file.path)
    if file.path not in self._known or self._known[file.path][0] != version:
      part = page.part_of(file.path)
      self._known[file.path] = version, page.compressed(part), page.contents(part)
    return self._known[file.path][1:]


class Server(http.server.ThreadingHTTPServer):
  """Serves `/` (the page), `/data` and `/part?run=0&file=step_000000.jsonl`.

  Args:
    folders: work directories.
    port: 0 takes a free one.
  """

  daemon_threads = True

  def __init__(self, folders: Sequence[str], port: int = 0) -> None:
    self.watched = Watched(folders)
    self.watched.summary()  # refuses what is no run before anything is served
    self.page = page.live(", ".join(run.name for run in named(folders))).encode()
    super().__init__((HOST, port), Handler)

  @property
  def url(self) -> str:
    """Where the page is."""
    return f"http://{HOST}:{self.server_address[1]}/"

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Says in a line what went wrong; a browser that left is nothing."""
    error = sys.exception()
    if not isinstance(error, ConnectionError):
      print(f"warning: a request failed: {error}", file=sys.stderr)


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers GET requests that are meant for this machine by its own address."""

  server: Server

  def do_GET(self) -> None:
    """Answers a request."""
    port = self.server.server_address[1]
    # A page from elsewhere may make a browser ask under a name of its own.
    if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
      return self._send(403, b"this report is for this machine only", "text/plain")
    url = urlsplit(self.path)
    if url.path == "/":
      return self._send(200, gzip.compress(self.server.page), "text/html; charset=utf-8", True)
    try:
      if url.path == "/data":
        return self._send(200, self.server.watched.summary(), "application/json", True)
      if url.path == "/part" and (found := self._part(url.query)) is not None:
        return self._send(200, found, "application/json", True)
    except (ValueError, OSError) as error:
      text = json.dumps({"error": str(error)}).encode()
      return self._send(503, text, "application/json")
    return self._send(404, b"no such page", "text/plain")

  def _part(self, query: str) -> bytes | None:
    fields = parse_qs(query)
    run, name = fields.get("run", ["-1"])[0], fields.get("file", [""])[0]
    return self.server.watched.samples(int(run), name) if run.isdecimal() else None

  def _send(self, status: int, body: bytes, kind: str, is_compressed: bool = False) -> None:
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    if status == 200 and self.headers.get("If-None-Match") == tag:
      status, body = 304, b""
    self.send_response(status)
    self.send_header("Content-Type", kind)
    self.send_header("Content-Length", str(len(body)))
    self.send_header("Cache-Control", "no-cache")
    self.send_header("X-Content-Type-Options", "nosniff")
    if status == 200:
      self.send_header("ETag", tag)
      if is_compressed:
        self.send_header("Content-Encoding", "gzip")
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, format: str, *args: Any) -> None:
    """Says nothing of requests."""
