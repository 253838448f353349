"""Tests reading and writing of objects on emulators of both stores, and what faults do to it."""

import threading

import pytest

from grpo_jax.addresses import Address
from grpo_jax.run import stores
from grpo_jax.run.stores import StoreError, open_store
from tests.helpers.fault_proxy import each_once
from tests.helpers.stores import BUCKET


@pytest.fixture
def store(server, monkeypatch):
  monkeypatch.setattr(stores, "_PAUSES", (0.01, 0.1))
  yield open_store(server.new(), seconds=5)
  server.proxy.plan = lambda *_: None


def test_objects_are_written_whole_read_listed_and_removed(store, tmp_path):
  assert store.read("a") is None
  assert store.list() == []
  assert not store.download("a", tmp_path / "a")
  assert not list(tmp_path.iterdir())
  store.write("a", b"1")
  store.write("b/c d+%é", b"")
  (tmp_path / "large").write_bytes(large := bytes(range(256)) * 40000)  # in parts
  store.write("b/large", tmp_path / "large")
  assert store.read("a") == b"1"
  assert store.read("b/c d+%é") == b""
  assert store.download("b/large", tmp_path / "x" / "copy")
  assert (tmp_path / "x" / "copy").read_bytes() == large
  assert [(e.name, e.size) for e in store.list()] == [
    ("a", 1), ("b/c d+%é", 0), ("b/large", len(large))
  ]  # fmt: skip
  assert [entry.name for entry in store.list("b/l")] == ["b/large"]
  store.remove("a")
  store.remove("a")
  assert store.read("a") is None


def test_a_listing_has_all_pages(store):
  stores.in_parallel(lambda i: store.write(f"n/{i}", b"x"), range(120))
  assert {entry.name for entry in store.list()} == {f"n/{i}" for i in range(120)}


def test_one_of_many_creates_an_object_and_one_swaps_it(store):
  won, lock = [], threading.Lock()

  def race(number):
    if store.create("lock", b"%d" % number):
      with lock:
        won.append(number)

  stores.in_parallel(race, range(8))
  assert len(won) == 1
  content, entry = store.read_version("lock")
  assert content == b"%d" % won[0]
  again = store.swap("lock", b"next", entry.version)
  assert again not in (None, entry.version)
  assert store.swap("lock", b"other", entry.version) is None
  assert store.read("lock") == b"next"
  assert store.swap("none", b"x", entry.version) is None


@pytest.mark.parametrize("what", [429, 500, 503, "cut", "lost", "slow"])
def test_a_fault_of_every_request_changes_nothing(store, server, what, tmp_path):
  server.proxy.plan = each_once(what)
  assert (first := store.create("lock", b"mine"))
  assert store.create("lock", b"another's") is None
  assert store.swap("lock", b"mine still", first)
  (tmp_path / "file").write_bytes(large := b"0123456789" * 10**6)
  store.write("large", tmp_path / "file")
  assert store.download("large", tmp_path / "copy")
  assert (tmp_path / "copy").read_bytes() == large
  assert [entry.name for entry in store.list()] == ["large", "lock"]
  assert store.read("lock") == b"mine still"
  store.remove("lock")
  assert store.read("lock") is None
  assert what in {happened for *_, happened in server.proxy.requests}


def test_a_store_that_is_down_is_an_error_after_the_stated_time(store, server):
  server.proxy.plan = lambda *_: 503
  store.seconds = 0.4
  with pytest.raises(StoreError) as caught:
    store.write("a", b"1")
  text = str(caught.value)
  assert f"{store.address}: cannot write a: no success for 0.4 s (" in text
  assert "503" in text
  assert "the same command continues" in text
  assert len(text.splitlines()) == 1


def test_a_port_that_nobody_listens_at_is_an_error(monkeypatch):
  monkeypatch.setattr(stores, "_PAUSES", (0.01, 0.1))
  for scheme, variable in (("gs", "STORAGE_EMULATOR_HOST"), ("s3", "AWS_ENDPOINT_URL")):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
      monkeypatch.setenv(name, "a-secret-of-the-tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(StoreError, match=r"cannot read a: no success for 0\.3 s") as caught:
      open_store(Address(scheme, "bucket", "x"), 0.3).read("a")
    assert "secret" not in str(caught.value)


def test_a_bucket_that_is_missing_says_how_to_make_it(server):
  store = open_store(Address(server.scheme, "no-such-bucket", "x"))
  for attempt in (lambda: store.write("a", b""), store.list):
    with pytest.raises(StoreError, match="there is no bucket no-such-bucket: create it"):
      attempt()


def test_without_credentials_the_usual_ways_to_give_them_are_named(server, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  for name in server.variables:
    if name.startswith(("STORAGE", "AWS_ACCESS", "AWS_SECRET")):
      monkeypatch.delenv(name)
  monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
  with pytest.raises(StoreError, match=r"there are no .*credentials for .*: run `"):
    open_store(Address(server.scheme, BUCKET, "x")).write("a", b"")


def test_a_missing_library_names_its_extra(monkeypatch):
  monkeypatch.setitem(stores.MODULES, "gs", ("gcs", "no_such_module"))
  with pytest.raises(StoreError, match=r"gs://b1/x needs no_such_module: .*'grpo_jax\[gcs\]'"):
    open_store(Address("gs", "b1", "x"))
