"""Tests that a folder and one of a store are kept alike, and what readers get of it."""

import json
import shutil
from pathlib import Path

import pytest

from grpo_jax.run import checkpoint, mirror, stores
from grpo_jax.run.lease import Lease, LeaseLost
from grpo_jax.run.mirror import Mirror
from grpo_jax.run.stores import StoreError, open_store
from grpo_jax.run.workdir import LOCK, WorkdirError


@pytest.fixture
def address(server, monkeypatch, tmp_path):
  monkeypatch.setattr(stores, "_PAUSES", (0.01, 0.1))
  monkeypatch.setenv(mirror.STAGES, str(tmp_path / "stages"))
  yield server.new()
  server.proxy.plan = lambda *_: None


def saved(folder: Path, step: int, text: str = "a") -> Path:
  """Writes something that looks like a checkpoint before its digests."""
  path = folder / "checkpoints" / f"{step}.partial"
  (path / "default").mkdir(parents=True)
  (path / "_CHECKPOINT_METADATA").write_text("{}")
  (path / "default" / "data").write_text(text)
  return path


def publish(place, step, keep=2, text="a"):
  path = saved(place.folder, step, text)
  place.mirror.publish(path, step, keep)
  path.rename(path.with_suffix(""))


def steps_in(server, address):
  names = [n.split("/") for n in server.contents(address) if n.startswith("checkpoints/")]
  return sorted({int(parts[1]) for parts in names})


def test_a_path_is_a_work_directory_as_it_was(tmp_path):
  with mirror.opened(tmp_path / "a") as place:
    assert place == mirror.Place(tmp_path / "a")
  with mirror.fetched(tmp_path / "a") as folder:
    assert folder == tmp_path / "a"
  assert not (tmp_path / "a").exists()


def test_files_are_uploaded_when_they_change_and_removed_when_they_go(server, address):
  with mirror.opened(address) as place:
    (place.folder / "samples").mkdir()
    for name in ("metrics.jsonl", "samples/step_0.jsonl", "samples/step_1.jsonl"):
      (place.folder / name).write_text("1")
    (place.folder / ".metrics.jsonl.part").write_text("not whole")
    place.mirror.sync()
    before = len(server.proxy.requests)
    place.mirror.sync()
    assert len(server.proxy.requests) == before
    (place.folder / "metrics.jsonl").write_text("12")
    (place.folder / "samples/step_1.jsonl").unlink()
    place.mirror.sync()
    expected = {"metrics.jsonl": b"12", "samples/step_0.jsonl": b"1"}
    assert {n: c for n, c in server.contents(address).items() if n != LOCK} == expected
    (place.folder / "curve.png").write_bytes(b"end")
  assert server.contents(address) == expected | {"curve.png": b"end"}


def test_a_fresh_machine_gets_what_a_run_reads_and_names_of_the_rest(server, address, tmp_path):
  with mirror.opened(address) as place:
    for name in ("config.json", "samples/step_3.jsonl", "skipped/a/recorded.json", "skipped/a/b/c"):
      (place.folder / name).parent.mkdir(parents=True, exist_ok=True)
      (place.folder / name).write_text(name)
    publish(place, 2)
    publish(place, 4)
  contents = server.contents(address)
  (tmp_path / "stages").rename(tmp_path / "other machine")
  with mirror.opened(address) as place:
    assert (place.folder / "config.json").read_text() == "config.json"
    assert (place.folder / "skipped/a/recorded.json").read_text() == "skipped/a/recorded.json"
    assert (place.folder / "samples/step_3.jsonl").stat().st_size == 0
    assert [path.name for path in (place.folder / "checkpoints").iterdir()] == ["4"]
    assert checkpoint.find_damage(place.folder / "checkpoints" / "4") == []
    (place.folder / "samples/step_3.jsonl").unlink()
  del contents["samples/step_3.jsonl"]
  assert server.contents(address) == contents


def test_what_another_machine_wrote_replaces_what_is_left_here(server, address):
  with mirror.opened(address) as place:
    (place.folder / "metrics.jsonl").write_text("old")
    (place.folder / "more.txt").write_text("old")
    publish(place, 2, text="old")
  store = open_store(address)
  store.write("metrics.jsonl", b"new")
  store.remove("more.txt")
  before = len(server.proxy.requests)
  with mirror.opened(address) as place:
    assert (place.folder / "metrics.jsonl").read_text() == "new"
    assert not (place.folder / "more.txt").exists()
  names = [name for method, name, _ in server.proxy.requests[before:] if method == "GET"]
  assert not [name for name in names if name.endswith("default/data")], "it was here already"
  with mirror.opened(address) as place:
    target = place.folder / "checkpoints" / "2" / "default" / "data"
    target.write_text("bad")  # on this machine only
  with mirror.opened(address):
    assert target.read_text() == "old"


def test_the_newest_checkpoints_are_kept_and_partial_ones_removed(server, address):
  store = open_store(address)
  store.write("checkpoints/3/default/data", b"of a run that was killed")
  with mirror.opened(address) as place:
    assert steps_in(server, address) == []
    for step in (2, 4, 6):
      publish(place, step)
    assert steps_in(server, address) == [4, 6]
    publish(place, 8, keep=1)
    assert steps_in(server, address) == [8]


def test_metrics_are_there_before_a_checkpoint_counts(server, address):
  with mirror.opened(address) as place:
    (place.folder / "metrics.jsonl").write_text("1")
    before = len(server.proxy.requests)
    publish(place, 2)
    written = [n for m, n, _ in server.proxy.requests[before:] if m in ("PUT", "POST")]
    last = [name.rpartition("/")[2] for name in written]
    assert last.index("metrics.jsonl") < last.index(checkpoint.DIGESTS)
    assert last.index("data") < last.index(checkpoint.DIGESTS)
    assert last[-1] == checkpoint.DIGESTS


def lose_the_lease(address):
  with mirror.opened(address) as place:
    other = {"token": "x", "process": 7, "host": "h", "since": "now"}
    open_store(address).write(LOCK, json.dumps(other).encode())
    place.mirror._lease._renewed -= 3600
    (place.folder / "metrics.jsonl").write_text("mine")
    with pytest.raises(LeaseLost):
      publish(place, 2)
    place.mirror.check()


def test_a_run_that_lost_its_lease_writes_nothing_more(server, address):
  with pytest.raises(WorkdirError, match="is not this run's any more"):
    lose_the_lease(address)
  contents = server.contents(address)
  assert "metrics.jsonl" not in contents
  assert f"checkpoints/2/{checkpoint.DIGESTS}" not in contents
  assert json.loads(contents[LOCK])["token"] == "x"


def test_damaged_checkpoints_are_moved_in_the_store(server, address, tmp_path):
  with mirror.opened(address) as place:
    publish(place, 2)
    publish(place, 4)
  open_store(address).write("checkpoints/4/default/data", b"b")
  (tmp_path / "stages").rename(tmp_path / "other machine")
  with mirror.opened(address) as place:
    folder = place.folder / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"2", "4"}
    assert checkpoint.find_damage(folder / "4") == [
      "default/data has other contents than were written"
    ]
    (place.folder / "damaged").mkdir()
    (folder / "4").rename(place.folder / "damaged" / "4")
    place.mirror.resumed(2)
    assert steps_in(server, address) == [2]
  assert server.contents(address)["damaged/4/default/data"] == b"b"


def test_a_listing_that_lags_does_not_spoil_a_checkpoint(server, address):
  """Files are read by their digests; those of an earlier attempt are not among them."""
  with mirror.opened(address) as place:
    publish(place, 2)
  store = open_store(address)
  store.write("checkpoints/2/default/left_over", b"of an attempt that was killed")
  entries = [e for e in store.list() if e.name != "checkpoints/2/default/data"]
  assert mirror.fetch_checkpoint(store, place.folder.parent / "copy", entries) == [2]
  assert not checkpoint.find_damage(place.folder.parent / "copy" / "checkpoints" / "2")


def test_names_that_lead_elsewhere_are_not_followed(server, address, tmp_path):
  store = open_store(address)
  store.write("config.json", b"{}")
  digests = json.dumps({"../../../../escaped": [1, "0" * 64]})
  store.write("checkpoints/2/sha256.json", digests.encode())
  if server.scheme == "gs":
    bucket = server.server.buckets["bucket"]
    bucket[f"{address.prefix}/../escaped"] = bucket[f"{address.prefix}/config.json"]
  with mirror.fetched(address, checkpoints=True) as folder:
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {
      "config.json", "sha256.json"
    }  # fmt: skip
  assert not list(tmp_path.rglob("escaped"))


def test_a_reader_gets_a_copy_and_changes_nothing(server, address):
  with mirror.opened(address) as place:
    (place.folder / "config.json").write_text("{}")
    (place.folder / "samples").mkdir()
    (place.folder / "samples" / "step_000000.jsonl").write_text("")
    publish(place, 2)
    publish(place, 4)
    before = server.contents(address)
    with mirror.fetched(address, mirror.top_level, checkpoints=True, step=2) as folder:
      assert folder.as_posix().endswith(f"{address.bucket}/{address.prefix}")
      assert {path.name for path in folder.iterdir()} == {"config.json", "checkpoints"}
      assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
    assert not folder.exists()
    with mirror.followed(address) as run:
      (place.folder / "metrics.jsonl").write_text("1")
      place.mirror.sync()
      run.refresh()
      assert (run.folder / "metrics.jsonl").read_text() == "1"
      assert not (run.folder / "checkpoints").exists()
  after = server.contents(address)
  assert {n: c for n, c in before.items() if n != LOCK}.items() <= after.items()
  empty = mirror.fetched(server.new())
  with pytest.raises(StoreError, match="holds nothing: give the work directory of a run"), empty:
    pass


@pytest.fixture
def hosts(server, address, tmp_path):
  """Yields what two hosts have, which share no folder; the first one holds the lease."""
  store = open_store(address)
  lease = Lease(store)
  lease.acquire()
  yield [
    Mirror(store, tmp_path / f"host{index}", None if index else lease, (index, 2), lease.token)
    for index in range(2)
  ]
  lease.release()


def saved_by_host(place, index):
  path = saved(place.folder, 2, text="of the first")
  (path / "default" / f"of_{index}").write_text(str(index))
  (path / "default" / "_METADATA").write_text(f"of {index}")
  if index:
    (path / "default" / "data").unlink()
  return path


def test_several_hosts_upload_their_own_files(server, address, hosts):
  """The first host makes a checkpoint count when the files of the second one are there."""
  paths = [saved_by_host(place, index) for index, place in enumerate(hosts)]
  hosts[1].publish(paths[1], 2, keep=2)
  assert f"checkpoints/2/{checkpoint.DIGESTS}" not in server.contents(address)
  hosts[0].publish(paths[0], 2, keep=2)
  with mirror.fetched(address, checkpoints=True) as folder:
    assert not checkpoint.find_damage(folder / "checkpoints" / "2")
    files = {
      p.relative_to(folder / "checkpoints" / "2").as_posix(): p.read_text()
      for p in folder.rglob("*")
      if p.is_file() and p.name != checkpoint.DIGESTS
    }
  assert files == {
    "_CHECKPOINT_METADATA": "{}", "default/_METADATA": "of 0", "default/data": "of the first",
    "default/of_0": "0", "default/of_1": "1",
  }  # fmt: skip
  assert set(server.contents(address)) - {LOCK} == {
    f"checkpoints/2/{name}" for name in (*files, checkpoint.DIGESTS)
  }


def test_the_first_host_names_one_that_does_not_upload(server, address, hosts, monkeypatch):
  monkeypatch.setattr(mirror, "PEERS", 0.0)
  with pytest.raises(StoreError, match="host 1 has not uploaded its files of checkpoints/2 in 0 s"):
    hosts[0].publish(saved_by_host(hosts[0], 0), 2, keep=2)
  assert f"checkpoints/2/{checkpoint.DIGESTS}" not in server.contents(address)


def test_another_host_writes_nothing_without_the_lease_of_its_first_one(server, address, hosts):
  open_store(address).write(LOCK, json.dumps({"token": "x"}).encode())
  with pytest.raises(LeaseLost, match="is not this run's any more: its first host has lost it"):
    hosts[1].publish(saved_by_host(hosts[1], 1), 2, keep=2)
  assert set(server.contents(address)) == {LOCK}


def test_several_hosts_share_a_folder_that_each_has_written_a_part_of(server, address, hosts):
  """Files of an attempt before, which the first host has as empty ones, are gone."""
  open_store(address).write("skipped/a/of_1", b"old")
  open_store(address).write("skipped/a/of_2", b"old")
  hosts[0].download()
  for index, place in enumerate(hosts):
    folder = place.folder / "skipped" / "a"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / f"of_{index}").write_text("new")
    place.share(folder)
  (hosts[0].folder / "skipped/a/recorded.json").write_text("{}")
  hosts[0].sync()
  contents = server.contents(address)
  del contents[LOCK]
  assert contents == {
    "skipped/a/of_0": b"new", "skipped/a/of_1": b"new", "skipped/a/recorded.json": b"{}"
  }  # fmt: skip


def test_a_host_takes_the_checkpoints_that_the_first_one_has_chosen(server, address, hosts):
  for step in (2, 4):
    path = saved(hosts[0].folder, step)
    checkpoint.write_digests(path)
    for file in (p for p in path.rglob("*") if p.is_file()):
      name = f"checkpoints/{step}/{file.relative_to(path).as_posix()}"
      open_store(address).write(name, file)
  assert hosts[1].download() == [4]
  hosts[1].take_checkpoints([2])
  [path] = (hosts[1].folder / "checkpoints").iterdir()
  assert path.name == "2"
  assert checkpoint.find_damage(path) == []


def test_the_stage_of_a_url_is_its_own(tmp_path, monkeypatch):
  monkeypatch.setenv(mirror.STAGES, str(tmp_path))
  one, other = (mirror.place_of(f"gs://bucket/{name}/run") for name in "ab")
  assert mirror.folder_of(one) != mirror.folder_of(other)
  assert mirror.folder_of(one).name == "run"
  assert mirror.folder_of(one, 1) != mirror.folder_of(one)
  monkeypatch.delenv(mirror.STAGES)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  assert mirror.folder_of(one).is_relative_to(tmp_path / "cache" / "grpo_jax" / "stages")
