"""A proxy between a run and a store that breaks requests on purpose."""

import http.client
import http.server
import json
import threading
import time
import urllib.parse

from tests.helpers.loopback import LoopbackServer

SLOW = 0.3  # seconds


class FaultProxy(LoopbackServer):
  """Forwards requests to a port of this machine; a context manager.

  Attributes:
    plan: called with each request (method, path, name of the object); returns what happens to it: a
      status (429, 500, 503), "cut" (before it is forwarded), "lost" (its answer), "slow", "stale"
      (a listing as it was before) or None.
    requests: (method, name, what happened) of each request so far.
  """

  def __init__(self, target, plan=lambda method, path, name: None):
    super().__init__(Handler)
    self.target, self.plan, self.requests, self.before = target, plan, [], {}


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True

  def forward(self):
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    name = name_of(self.path, body)
    what = self.server.plan(self.command, self.path, name)
    self.server.requests.append((self.command, name, what))
    if what == "slow":
      time.sleep(SLOW)
    if what == "cut":
      return self.cut()
    if isinstance(what, int):
      return self.send(what, b"", {"Content-Type": "text/plain"})
    connection = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
    for name, value in self.headers.items():
      if name.lower() != "connection":
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    headers = {
      name: value
      for name, value in answer.getheaders()
      if name.lower() not in ("connection", "transfer-encoding", "date", "server")
    }
    whole = answer.status, content, headers
    if is_listing(self.command, self.path):
      before = self.server.before.get(self.path, whole)
      self.server.before[self.path] = whole
      if what == "stale":
        whole = before
    if what == "lost":
      return self.cut()
    self.send(*whole)

  do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = forward

  def cut(self):
    self.close_connection = True
    self.connection.close()

  def send(self, status, content, headers):
    self.send_response(status)
    length = headers.pop("Content-Length", headers.pop("content-length", str(len(content))))
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", length)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def log_message(self, *_):
    """Says nothing of requests."""


def is_listing(method, path):
  return method == "GET" and ("list-type=2" in path or "/o?" in path)


def name_of(path, body=b""):
  """Returns the name of the object that a request is about, with its bucket where that is known."""
  url = urllib.parse.urlsplit(path)
  query = urllib.parse.parse_qs(url.query)
  if query.get("uploadType") == ["multipart"]:  # it is in the first part
    return json.loads(body[body.index(b"{") : body.index(b"}") + 1])["name"]
  return query.get("name", [urllib.parse.unquote(url.path)])[0]


def each_once(what, times=1):
  """Returns a plan that breaks the first requests of each kind to each object, as `what` says."""
  seen, lock = {}, threading.Lock()

  def plan(method, path, name):
    with lock:
      seen[method, name] = seen.get((method, name), 0) + 1
      return what if seen[method, name] <= times else None

  return plan
