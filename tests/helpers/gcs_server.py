"""A server that speaks what the library of Google Cloud Storage asks of one, in memory."""

import base64
import datetime
import http.server
import json
import re
import threading
import urllib.parse

import google_crc32c

from tests.helpers.loopback import LoopbackServer

PAGE = 50  # objects of a page of a listing


class GcsServer(LoopbackServer):
  """Serves buckets on a free port; a context manager.

  Attributes:
    buckets: object by name by bucket: (content, generation, time of the write).
    read_only: buckets that refuse writes.
  """

  def __init__(self, *buckets):
    super().__init__(Handler)
    self.buckets = {bucket: {} for bucket in buckets}
    self.read_only, self.uploads, self.lock = set(), {}, threading.RLock()
    self.generation = 0


class Problem(Exception):
  """An answer with a status that is an error."""


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  wbufsize = -1

  def answer(self):
    url = urllib.parse.urlsplit(self.path)
    self.query = dict(urllib.parse.parse_qsl(url.query))
    self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    if self.headers.get("Transfer-Encoding") == "chunked":
      self.body = b"".join(iter(self._chunk, b""))
    try:
      match = re.fullmatch(r"/(upload/|download/)?storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
      if match is None:
        raise Problem(404, "no such page")
      self.bucket, name = match[2], urllib.parse.unquote(match[3] or "")
      with self.server.lock:
        objects = self.server.buckets.get(self.bucket)
        if objects is None:
          raise Problem(404, "The specified bucket does not exist.")
        if self.command != "GET" and self.bucket in self.server.read_only:
          raise Problem(403, "no access to storage.objects.create")
        if match[1] == "upload/":
          return self.upload(objects)
        if self.command == "DELETE":
          self.current(objects, name)
          self.check(objects, name)
          del objects[name]
          return self.send(204, b"")
        if not name:
          return self.send_json(self.listing(objects))
        content, *_ = self.current(objects, name)
        self.check(objects, name)
        if self.query.get("alt") == "media":
          return self.media(content, objects[name][1])
        return self.send_json(self.described(objects, name))
    except Problem as problem:
      status, text = problem.args
      self.send_json({"error": {"code": status, "message": text}}, status)

  do_GET = do_POST = do_PUT = do_DELETE = answer

  def _chunk(self):
    size = int(self.rfile.readline().split(b";")[0], 16)
    data = self.rfile.read(size)
    self.rfile.readline()
    return data

  def current(self, objects, name):
    if name not in objects:
      raise Problem(404, f"No such object: {self.bucket}/{name}")
    return objects[name]

  def check(self, objects, name):
    expected = self.query.get("ifGenerationMatch")
    if expected is not None and int(expected) != objects.get(name, (b"", 0))[1]:
      raise Problem(412, "At least one of the pre-conditions you specified did not hold.")

  def put(self, objects, name, content):
    self.check(objects, name)
    self.server.generation += 1
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    objects[name] = content, self.server.generation, now
    return self.described(objects, name)

  def upload(self, objects):
    kind = self.query["uploadType"]
    if kind == "media":
      return self.send_json(self.put(objects, self.query["name"], self.body))
    if kind == "multipart":
      boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
      _, about, content, _ = self.body.split(b"--" + boundary, 3)
      about, content = (part.partition(b"\r\n\r\n")[2][:-2] for part in (about, content))
      name = self.query.get("name") or json.loads(about)["name"]
      return self.send_json(self.put(objects, name, content))
    if self.command == "POST":
      self.check(objects, name := self.query.get("name") or json.loads(self.body)["name"])
      key = f"upload-{len(self.server.uploads)}"
      self.server.uploads[key] = name, bytearray(), self.query.get("ifGenerationMatch")
      query = urllib.parse.urlencode({"uploadType": "resumable", "upload_id": key})
      where = f"http://{self.headers['Host']}/upload/storage/v1/b/{self.bucket}/o?{query}"
      return self.send(200, b"", {"Location": where})
    name, content, condition = self.server.uploads[self.query["upload_id"]]
    first, total = re.fullmatch(
      r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"]
    ).groups()
    if first is not None and int(first) == len(content):
      content += self.body
    if total == "*" or len(content) < int(total):
      return self.send(308, b"", {"Range": f"bytes=0-{len(content) - 1}"} if content else {})
    if condition is not None:
      self.query["ifGenerationMatch"] = condition
    return self.send_json(self.put(objects, name, bytes(content)))

  def listing(self, objects):
    prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
    names = sorted(name for name in objects if name.startswith(prefix))
    folders = set()
    if delimiter:
      cut = {
        n: n[: n.find(delimiter, len(prefix)) + 1] for n in names if delimiter in n[len(prefix) :]
      }
      names, folders = [n for n in names if n not in cut], set(cut.values())
    start, size = int(self.query.get("pageToken", 0)), int(self.query.get("maxResults", PAGE))
    answer = {"items": [self.described(objects, name) for name in names[start : start + size]]}
    if start + size < len(names):
      answer["nextPageToken"] = str(start + size)
    return answer | ({"prefixes": sorted(folders)} if folders else {})

  def described(self, objects, name):
    content, generation, when = objects[name]
    return {
      "kind": "storage#object", "name": name, "bucket": self.bucket, "size": str(len(content)),
      "generation": str(generation), "metageneration": "1", "updated": when,
      "timeCreated": when, "crc32c": checksum(content), "etag": str(generation),
    }  # fmt: skip

  def media(self, content, generation):
    headers = {
      "X-Goog-Hash": f"crc32c={checksum(content)}", "X-Goog-Generation": str(generation),
      "Content-Type": "application/octet-stream",
    }  # fmt: skip
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if asked is None:
      return self.send(200, content, headers)
    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if first >= len(content):
      raise Problem(416, "no such range")
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return self.send(206, content[first : last + 1], headers)

  def send_json(self, value, status=200):
    self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

  def send(self, status, body, headers=None):
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)
    self.wfile.flush()

  def log_message(self, *_):
    """Says nothing of requests."""


def checksum(content):
  return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
