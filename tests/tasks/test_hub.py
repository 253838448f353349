"""Tests data sets of the hub, against a local server that speaks the endpoints of the client."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote

import pytest

from grpo_jax.tasks import hub

SHA = "0123456789abcdef0123456789abcdef01234567"


def lines(*rows):
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*rows):
  import pyarrow
  from pyarrow import parquet

  buffer = io.BytesIO()
  parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
  return buffer.getvalue()


def row(name, count):
  return [{"prompt": f"{name} {i}?", "deep": {"truth": str(i)}} for i in range(count)]


CARD = b"""---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/learn-*
  - split: test
    path: [main/exam.parquet]
- config_name: other
  data_files: other/*.jsonl
---
# A data set
"""
DATA_SETS = {
  "owner/plain": {
    "README.md": b"# No metadata",
    "data/train-00000-of-00002.parquet": parquet(*row("a", 3)),
    "data/train-00001-of-00002.parquet": parquet(*row("b", 2)),
    "data/test-00000-of-00001.parquet": parquet(*row("t", 4)),
  },
  "owner/card": {
    "README.md": CARD,
    "main/learn-0.parquet": parquet(*row("m", 3)),
    "main/exam.parquet": parquet(*row("e", 2)),
    "other/x.jsonl": lines(*row("o", 1)),
  },
}


class Hub(BaseHTTPRequestHandler):
  """Answers the requests that the client of the hub makes; notes those for files."""

  requests: ClassVar[list[str]] = []

  def do_HEAD(self):
    self.do_GET(body=False)

  def do_GET(self, body=True):
    path = unquote(self.path.partition("?")[0])
    for name, files in DATA_SETS.items():
      if path in (f"/api/datasets/{name}", f"/api/datasets/{name}/revision/v1"):
        siblings = [{"rfilename": file} for file in files]
        return self.reply(json.dumps({"id": name, "sha": SHA, "siblings": siblings}).encode())
      for revision in (SHA, "main", "v1"):
        file = path.removeprefix(f"/datasets/{name}/resolve/{revision}/")
        if file != path and file in files:
          self.requests += [file] * body
          return self.reply(files[file], body)
    self.reply(b"{}", status=404, error="RepoNotFound")

  def reply(self, content, body=True, status=200, error=""):
    self.send_response(status)
    self.send_header("Content-Length", str(len(content)))
    self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
    self.send_header("X-Repo-Commit", SHA)
    if error:
      self.send_header("X-Error-Code", error)
    self.end_headers()
    if body:
      self.wfile.write(content)

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def serving():
  server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f"http://127.0.0.1:{server.server_address[1]}"
  finally:
    server.shutdown()
    server.server_close()


CLIENT = """
import json, sys
from grpo_jax.run import identity
from grpo_jax.tasks import make_task
for settings in json.loads(sys.argv[1]):
  try:
    task = make_task("table", reward="exact", answer="deep.truth", **settings)
    splits = {name: [e.prompt for e in split] for name, split in task.splits.items()}
    names = sorted(identity.digests(task.files, {}))
    print(json.dumps({"name": task.name, "files": names, **splits}))
  except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


def client(endpoint, cache, *settings, **environment):
  """Returns what a process of its own makes of each of the settings."""
  environment = dict(os.environ, HF_ENDPOINT=endpoint, HF_HOME=str(cache), **environment)
  environment["HF_HUB_DISABLE_TELEMETRY"] = "1"
  command = [sys.executable, "-c", CLIENT, json.dumps(settings)]
  output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  return [json.loads(line) for line in output.stdout.splitlines()]


def prompts(name, count):
  return [f"{name} {i}?" for i in range(count)]


def test_data_sets_of_the_hub(tmp_path):
  with serving() as endpoint:
    Hub.requests.clear()
    plain, both, main, other, pinned, *errors = client(
      endpoint, tmp_path,
      {"path": "owner/plain", "eval_fraction": 0.0},
      {"path": "owner/plain", "eval_split": "test"},
      {"path": "owner/card", "subset": "main", "eval_split": "test"},
      {"path": "owner/card", "subset": "other", "eval_fraction": 0.0},
      {"path": "owner/plain", "eval_fraction": 0.0, "revision": "v1", "split": "test"},
      {"path": "owner/card"},
      {"path": "owner/card", "subset": "mian"},
      {"path": "owner/card", "subset": "main", "split": "dev"},
      {"path": "owner/plain", "split": "validation"},
      {"path": "owner/none"},
      {"path": "owner/plain", "revision": "v2"},
    )  # fmt: skip
    # Each file once, and none that no task needs.
    assert sorted(Hub.requests) == sorted([*DATA_SETS["owner/plain"], *DATA_SETS["owner/card"]])
  assert plain["train"] == [*prompts("a", 3), *prompts("b", 2)]
  assert plain["eval"] == []
  assert plain["name"] == "table:plain"
  assert (both["train"], both["eval"]) == (plain["train"], prompts("t", 4))
  assert (main["train"], main["eval"]) == (prompts("m", 3), prompts("e", 2))
  assert other["train"] == prompts("o", 1)
  assert pinned["train"] == prompts("t", 4)
  # A later commit of the same files is a change of them.
  assert main["files"] == [
    "datasets--owner--card/main/exam.parquet", "datasets--owner--card/main/learn-0.parquet",
  ]  # fmt: skip
  texts = [error["error"] for error in errors]
  assert "ValueError: owner/card has several subsets: choose one with subset: main, other" in texts
  assert "unknown subset of owner/card 'mian': did you mean 'main'?" in texts[1]
  assert "unknown split of owner/card 'dev'. Known (2): test, train" in texts[2]
  assert (
    "owner/plain has no files of the split 'validation': its data files are data/test" in (texts[3])
  )
  for text, name in ((texts[4], "owner/none"), (texts[5], "owner/plain")):
    assert text.startswith(f"FileNotFoundError: no data at '{name}': there is no such file or fol")
  # Without a connection: what was downloaded is there, and nothing else.
  known = {"path": "owner/plain", "eval_split": "test"}
  again, missing = client(endpoint, tmp_path, known, {"path": "owner/none"}, HF_HUB_OFFLINE="1")
  assert (again["train"], again["eval"]) == (both["train"], both["eval"])
  assert "FileNotFoundError: no data at 'owner/none'" in missing["error"]


def test_several_folders_without_a_card_have_to_be_told_apart():
  names = ["main/train.csv", "socratic/train.csv", "socratic/test.csv"]
  with pytest.raises(ValueError, match=r"several folders, main, socratic: choose one with subset"):
    hub.choose(names, [], None, None, "owner/name")
  assert hub.choose(names, [], None, "main", "owner/name") == ["main/train.csv"]
  assert hub.choose(names, [], "test", "socratic", "owner/name") == ["socratic/test.csv"]
  assert hub.choose(["main/TRAIN.csv", "main/train.CSV"], [], None, "main", "owner/name") == [
    "main/train.CSV"
  ]
  with pytest.raises(ValueError, match="unknown subset of owner/name 'sokratic'"):
    hub.choose(names, [], None, "sokratic", "owner/name")


@pytest.mark.parametrize(
  ("config", "patterns"),
  [
    ({"data_files": "x.csv"}, {"train": ["x.csv"]}),
    ({"data_files": ["x.csv", "./y.csv"]}, {"train": ["x.csv", "y.csv"]}),
    ({"data_files": {"test": "t/*"}, "data_dir": "d"}, {"test": ["d/t/*"]}),
    ({"data_files": [{"split": "a", "path": ["b", "c"]}]}, {"a": ["b", "c"]}),
  ],
)
def test_forms_of_a_card(config, patterns):
  assert hub._patterns(config) == patterns


@pytest.mark.parametrize("card", ["", "# x", "---\n: : [\n---\n", "---\nconfigs: 3\n---\n"])
def test_a_card_without_configs(card):
  assert hub._configs(card) == []
