"""Tests that a work directory on a store serves one run at a time, whatever happens to others."""

import json
import subprocess
import sys
import threading
import time

import pytest

from grpo_jax.run import lease as leases
from grpo_jax.run import stores
from grpo_jax.run.lease import Lease, LeaseLost
from grpo_jax.run.stores import StoreError, open_store
from grpo_jax.run.workdir import LOCK, WorkdirError
from tests.helpers.fault_proxy import each_once, name_of

ELSEWHERE = {"process": 7, "host": "other", "since": "2026-01-01", "machine": "b", "started": "1"}


@pytest.fixture
def store(server, monkeypatch):
  monkeypatch.setattr(stores, "_PAUSES", (0.01, 0.1))
  yield open_store(server.new(), seconds=3)
  server.proxy.plan = lambda *_: None


def test_a_lease_is_taken_and_given_back(store):
  lease = Lease(store)
  lease.acquire()
  held = json.loads(store.read(LOCK))
  assert held["token"] == lease.token
  assert [entry.name for entry in store.list()] == [LOCK]
  lease.confirm()
  lease.release()
  assert store.list() == []


def test_a_second_run_is_refused_at_once_on_this_machine(store):
  lease = Lease(store)
  lease.acquire()
  with pytest.raises(WorkdirError) as caught:
    Lease(store).acquire()
  text = str(caught.value)
  assert f"{store.address} is in use by process {leases.this_process()['process']} on " in text
  assert "Use another --workdir, or stop that run first" in text
  lease.release()


def test_the_lease_of_a_living_run_elsewhere_is_not_taken(store, capsys):
  first = Lease(store, heartbeat=0.3, stale=60, holder=ELSEWHERE)
  first.acquire()
  start = time.monotonic()
  with pytest.raises(WorkdirError, match="is in use by process 7 on other since 2026-01-01"):
    Lease(store, heartbeat=0.3, stale=60).acquire()
  assert time.monotonic() - start < 10
  assert "to see whether process 7 on other since 2026-01-01 is alive" in capsys.readouterr().err
  first.check()
  first.release()


def test_a_stale_lease_is_taken_over_and_the_other_run_notices(store):
  """The first run sleeps: its thread renews nothing."""
  first = Lease(store, heartbeat=3600, stale=1.5, holder=ELSEWHERE)
  first.acquire()
  second = Lease(store, heartbeat=3600, stale=1.5)
  second.acquire()
  assert json.loads(store.read(LOCK))["token"] == second.token
  first._renewed -= 3600
  with pytest.raises(LeaseLost, match="is not this run's any more: it is now in use by process"):
    first.confirm()
  with pytest.raises(LeaseLost):
    first.check()
  first.release()
  assert json.loads(store.read(LOCK))["token"] == second.token
  second.release()


def test_a_lease_is_renewed_as_long_as_its_process_lives(store):
  first = Lease(store, heartbeat=0.1, stale=1.5, holder=ELSEWHERE)
  first.acquire()
  count = json.loads(store.read(LOCK))["count"]
  time.sleep(2)
  assert json.loads(store.read(LOCK))["count"] > count + 3
  with pytest.raises(WorkdirError):
    Lease(store, heartbeat=0.1, stale=1.5).acquire()
  first.release()


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_at_once(store):
  with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
    holder = leases.this_process() | {
      "process": process.pid, "started": leases._started(process.pid)
    }  # fmt: skip
    assert leases.is_here(holder)
    store.write(LOCK, json.dumps(holder | {"token": "x"}).encode())
    with pytest.raises(WorkdirError, match=f"in use by process {process.pid}"):
      Lease(store).acquire()
    process.kill()
    process.wait()
  second = Lease(store)
  second.acquire()
  second.release()
  # The number of a process may have been given to another one.
  assert leases.is_gone(leases.this_process() | {"started": "1"})
  assert not leases.is_gone(ELSEWHERE)


@pytest.mark.parametrize("what", ["lost", "cut", 503, 429])
def test_faults_of_the_first_requests_are_no_false_refusal(store, server, what):
  server.proxy.plan = each_once(what, times=2)
  lease = Lease(store, heartbeat=0.05)
  lease.acquire()
  time.sleep(0.5)
  lease.check()
  lease._renewed -= 1
  lease.confirm()
  lease.release()
  assert store.read(LOCK) is None


def test_a_store_that_is_down_for_a_while_does_not_lose_the_lease(store, server):
  lease = Lease(store, heartbeat=0.1)
  lease.acquire()
  store.seconds = 0.2
  server.proxy.plan = lambda *_: "cut"
  time.sleep(1)
  with pytest.raises(StoreError):
    lease.confirm()
  lease.check()
  server.proxy.plan = lambda *_: None
  time.sleep(1)
  lease.confirm()
  lease.release()


def test_of_many_runs_one_gets_the_lease(store):
  won, refused = [], []

  def take(_):
    lease = Lease(store)
    try:
      lease.acquire()
      won.append(lease)
    except WorkdirError as error:
      refused.append(str(error))

  threads = [threading.Thread(target=take, args=(i,)) for i in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(won), len(refused)) == (1, 5)
  assert all("is in use by" in text for text in refused)
  won[0].release()


def test_a_store_that_cannot_be_written_is_said_before_anything_else(store, server):
  if server.scheme == "gs":
    server.server.read_only.add("bucket")
  else:
    server.proxy.plan = lambda method, path, name: None if method == "GET" else 403
  try:
    with pytest.raises(StoreError, match="these credentials do not allow it: they need"):
      Lease(store).acquire()
  finally:
    if server.scheme == "gs":
      server.server.read_only.clear()


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff{", b'{"process": 1}'])
def test_a_lease_that_cannot_be_read_belongs_to_some_run(store, content):
  store.write(LOCK, content)
  start = time.monotonic()
  lease = Lease(store, heartbeat=0.1, stale=1.5)
  lease.acquire()
  assert time.monotonic() - start > 0.4
  lease.release()


def test_the_proxy_tells_objects_apart():
  path = "/upload/storage/v1/b/bucket/o?uploadType=multipart&ifGenerationMatch=0"
  assert name_of(path, b'--1\r\n\r\n{"name": "x/lock"}\r\n--1') == "x/lock"
  assert name_of("/upload/storage/v1/b/bucket/o?uploadType=resumable&name=x%2Fl") == "x/l"
  assert name_of("/bucket/x/l%20ck?x-id=PutObject") == "/bucket/x/l ck"
