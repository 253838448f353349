"""Tests the server of a report: what it answers, and whom."""

import gzip
import http.client
import json
import threading
import time
from pathlib import Path

import pytest

from grpo_jax.report import __main__ as report
from grpo_jax.report.server import HOST, Server
from grpo_jax.run import mirror
from tests.helpers.work_directories import make_run


@pytest.fixture
def server(tmp_path):
  run = make_run(tmp_path / "run", steps=3)
  with Server([str(run)]) as server:
    server.run = run
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def ask(server, path, **headers):
  connection = http.client.HTTPConnection(HOST, server.server_address[1], timeout=10)
  connection.request(
    "GET", path, headers={name.replace("_", "-"): v for name, v in headers.items()}
  )
  answer = connection.getresponse()
  body = answer.read()
  if answer.getheader("Content-Encoding") == "gzip":
    body = gzip.decompress(body)
  return answer.status, body, answer.headers


def test_it_listens_on_loopback_only(server):
  assert server.server_address[0] == "127.0.0.1"
  status, body, headers = ask(server, "/")
  assert status == 200
  assert b"connect-src 'self'" in body
  assert headers["Content-Type"] == "text/html; charset=utf-8"


def test_data_is_sent_again_when_it_has_changed(server):
  status, body, headers = ask(server, "/data")
  assert status == 200
  assert json.loads(body)["runs"][0]["name"] == "run"
  assert len(json.loads(body)["runs"][0]["files"]) == 4
  assert ask(server, "/data", If_None_Match=headers["ETag"])[0] == 304
  with (server.run / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "reward": 1.0}\n')
  status, body, _ = ask(server, "/data", If_None_Match=headers["ETag"])
  assert status == 200
  assert json.loads(body)["runs"][0]["metrics"]["reward"][0] == [0, 1, 2, 3]


def test_what_is_on_a_store_is_copied_again_until_the_end(monkeypatch, capsys):
  monkeypatch.setattr(report, "PERIOD", 0.001)
  asked, enough = [], threading.Event()

  def refresh():
    asked.append(0)
    if len(asked) == 20:
      enough.set()
    if len(asked) in (3, 4, 5, 9):
      raise ValueError("the store is down")

  with report.refreshed([mirror.Followed(Path("copy"), refresh)]):
    assert enough.wait(60)
  count = len(asked)
  assert capsys.readouterr().err == 2 * "warning: the store is down. Trying again\n"
  time.sleep(0.05)
  assert len(asked) == count


def test_samples(server):
  status, body, _ = ask(server, "/part?run=0&file=step_000001.jsonl")
  assert status == 200
  assert len(json.loads(body)["groups"]) == 4


@pytest.mark.parametrize(
  "path",
  [
    "/part?run=1&file=step_000001.jsonl", "/part?run=0&file=../config.json", "/part?run=-1",
    "/part?run=x&file=step_000001.jsonl", "/part?run=0&file=step_000009.jsonl", "/part",
    "/config.json", "/../../etc/passwd", "/data/", "/part/",
  ],
)  # fmt: skip
def test_nothing_else_is_there(server, path):
  assert ask(server, path)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", ""])
def test_a_page_that_goes_by_another_name_gets_nothing(server, host):
  """A web page can make a browser ask this port under the page's own name (DNS rebinding)."""
  for path in ("/", "/data"):
    assert ask(server, path, Host=host)[0] == 403


def test_a_run_that_is_gone_is_said(server):
  server.run.rename(server.run.with_name("moved"))
  status, body, _ = ask(server, "/data")
  assert status == 503
  assert "is not a folder" in json.loads(body)["error"]
