"""Tests runs whose work directory is on an object store: kills, faults, readers, bad input."""

import json

import pytest

from grpo_jax import doctor, evaluate, export, train
from grpo_jax.report import __main__ as report
from grpo_jax.run import mirror
from grpo_jax.run.stores import open_store
from tests.helpers.stores import served
from tools.store_faults import StoreFaults

STEPS = 4
SETTINGS = [
  f"--config.steps={STEPS}", "--config.checkpoint.every=2", "--config.eval.every=3",
  "--config.task.settings.eval_size=3",
  "--config.eval.batch_prompts=8", "--config.log.samples=0",
  "--config.rollout.completion_length=4",
]  # fmt: skip


@pytest.fixture(scope="module", params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def faults(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("stores") / request.param
  with pytest.MonkeyPatch.context() as patch, served(request.param, patch) as store:
    whole = tmp_path_factory.getbasetemp() / "whole_run_beside_stores"
    yield StoreFaults(folder, store, whole, SETTINGS, STEPS)


def test_a_killed_run_goes_on_from_a_fresh_machine_bit_for_bit(faults):
  lines = faults.killed(
    [
      "as a checkpoint is uploaded", "after metrics, before a checkpoint counts",
      "before a checkpoint counts", "as soon as a checkpoint counts",
    ]
  )  # fmt: skip
  counted = [line[2].partition(";")[0].rpartition(" ")[2] for line in lines]
  assert counted == ["none", "none", "none", "2"]


@pytest.mark.slow
def test_two_runs_do_not_share_a_work_directory(faults):
  if faults.store.scheme == "s3":
    pytest.skip("the same as on gs, which takes ten seconds; make test-faults does both")
  assert "refused with exit code 2" in faults.two()


def test_a_store_that_goes_down_ends_the_run_and_the_same_command_continues(faults):
  if faults.store.scheme == "gs":
    pytest.skip("the same as on s3")
  assert "exit code 74" in faults.down()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_in_the_store(faults):
  if faults.store.scheme == "s3":
    pytest.skip("the same as on gs")
  assert "continued from the one before" in faults.damaged()


def put_tree(folder, address):
  store = open_store(address)
  for path in folder.rglob("*"):
    if path.is_file():
      store.write(path.relative_to(folder).as_posix(), path)


def test_readers_take_the_address_of_a_finished_run(faults, tmp_path, monkeypatch, capsys):
  if faults.store.scheme == "s3":
    pytest.skip("the same as on gs")
  monkeypatch.chdir(tmp_path)
  address = faults.store.new("read")
  put_tree(faults.whole, address)
  contents = faults.store.contents(address)
  assert doctor.main([str(address)]) in (0, 1)
  assert f"{address}, {STEPS} steps" in capsys.readouterr().out
  assert report.main([str(address)]) == 0
  assert (tmp_path / "report.html").is_file()
  assert export.main(["--workdir", str(address), "--out", "model"]) == 0
  assert (tmp_path / "model" / "model.safetensors").is_file()
  assert f"{address} after {STEPS} steps" in capsys.readouterr().out
  assert faults.store.contents(address) == contents
  assert evaluate.main(["--workdir", str(address), "--samples", "0"]) == 0
  assert f"{address} after {STEPS} steps on letters" in capsys.readouterr().out
  new = faults.store.contents(address)
  assert set(new) - set(contents) == {
    f"eval/step_{STEPS:06d}.json", f"eval/step_{STEPS:06d}_samples.jsonl"
  }  # fmt: skip
  assert json.loads(new[f"eval/step_{STEPS:06d}.json"])["step"] == STEPS
  missing = faults.store.new("nothing")
  for main, arguments in (
    (doctor.main, [str(missing)]),
    (report.main, [str(missing)]),
    (export.main, ["--workdir", str(missing), "--out", "other"]),
    (evaluate.main, ["--workdir", str(missing)]),
  ):
    assert main(arguments) == 2
    assert f"error: {missing} holds nothing: give the work" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("bucket", "words"),
  [("no-such-bucket", "there is no bucket no-such-bucket: create it"), ("bucket", "allow it")],
)
def test_a_bucket_that_cannot_be_used_is_said_before_anything_compiles(
  faults, bucket, words, monkeypatch, capsys, tmp_path
):
  monkeypatch.setenv(mirror.STAGES, str(tmp_path))
  monkeypatch.setattr(train, "build", lambda *_: pytest.fail("went on"))
  if bucket == "bucket":
    writes = ("PUT", "POST", "DELETE")
    faults.store.proxy.plan = lambda method, *_: 403 if method in writes else None
  address = f"{faults.store.scheme}://{bucket}/x"
  code = train.main(["--config", "experiments/tiny.py", "--workdir", address])
  faults.store.proxy.plan = lambda *_: None
  captured = capsys.readouterr()
  assert code == 2
  assert captured.err.startswith(f"error: {address}: cannot write ")
  assert words in captured.err
  assert len(captured.err.splitlines()) == 1
  assert "secret" not in captured.err + captured.out
