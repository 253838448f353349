"""Tests that no command takes the URL of another machine for the name of a folder."""

import pytest

from grpo_jax import addresses, config, doctor, evaluate, export, replay, train
from grpo_jax.report import __main__ as report
from grpo_jax.reward_model import __main__ as reward_model
from grpo_jax.run import compilation, workdir

WRONG = {
  "gs:/b/x": "has one slash: write gs://b/x",
  "s3:///b/x": "has 3 slashes: write s3://b/x",
  "hdfs://host/x": "is not supported: give a path of this machine, or gs://BUCKET/PATH, s3://",
  "http://host/x": "is not supported",
  "az://container/x": "is not supported",
  "file://host/x": "names a machine: write file:///host/x",
  "gs://": "does not name a bucket",
  "s3://b!/x": "does not name a bucket",
  "gs://bucket": "does not name a folder in the bucket: write gs://bucket/PATH",
  "gs://bucket/": "does not name a folder",
  "s3://bucket/a/../../other": "does not name a folder",
  "gs://bucket/a\nb": "does not name a folder",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_url_that_is_none_of_a_store_is_refused_with_what_to_write(text):
  with pytest.raises(addresses.AddressError) as caught:
    addresses.parse(text)
  assert WRONG[text] in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1


def test_paths_and_addresses():
  for text, path in {
    "a/b": "a/b", "a:b/c": "a:b/c", "./gs://b": "gs:/b", "/a": "/a", "file:///a/b%20c": "/a/b c",
    "file:/a": "/a", "FILE:///a": "/a", "file://localhost/a": "/a",
  }.items():  # fmt: skip
    assert addresses.parse(text).as_posix() == path
  address = addresses.parse("S3://bucket.name/a//b/")
  assert address == addresses.Address("s3", "bucket.name", "a/b")
  assert str(address) == "s3://bucket.name/a/b"
  assert addresses.parse(address) is address


TINY = ("--config", "experiments/tiny.py")
COMMANDS = {
  "train": (train.main, (*TINY, "--workdir", "{}")),
  "reward_model": (reward_model.main, ("--model", "m", "--data", "d", "--workdir", "{}")),
  "evaluate": (evaluate.main, ("--workdir", "{}")),
  "evaluate --out": (evaluate.main, (*TINY, "--out", "{}")),
  "evaluate --keep": (evaluate.main, (*TINY, "--keep", "0:1", "--out", "{}.jsonl")),
  "export": (export.main, ("--workdir", "{}", "--out", "exported")),
  "export --out": (export.main, (*TINY, "--out", "{}")),
  "doctor": (doctor.main, ("{}",)),
  "replay": (replay.main, ("{}/skipped/step_000000_update_0",)),
  "report": (report.main, ("{}",)),
  "report --serve": (report.main, ("{}", "--serve")),
  "report --out": (report.main, ("runs/none", "--out", "{}.html")),
}


@pytest.mark.parametrize("url", ["hdfs://host/x", "gs:/bucket/x", "http://host/x"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_makes_a_folder_of_a_url(command, url, tmp_path, monkeypatch, capsys):
  program = tmp_path / "experiments" / "tiny.py"
  program.parent.mkdir()
  program.write_text("from grpo_jax.config import default_config as get_config")
  monkeypatch.chdir(tmp_path)
  main, arguments = COMMANDS[command]
  assert main([argument.format(url) for argument in arguments]) == 2
  error = capsys.readouterr().err
  assert url in error
  assert len(error.splitlines()) == 1
  assert [path.name for path in tmp_path.iterdir()] == ["experiments"]


@pytest.mark.parametrize("what", ["--out", "cache"])
def test_what_has_to_be_on_this_machine_says_so(what):
  with pytest.raises(addresses.AddressError, match=rf"{what} is 's3://b1/x': it must be a path of"):
    addresses.local("s3://b1/x", what)


def test_the_compilation_cache_is_on_this_machine(tmp_path, monkeypatch):
  c = config.default_config()
  c.compilation_cache = "gs://bucket/cache"
  (problem,) = config.check(c, 1)
  assert "compilation_cache is 'gs://bucket/cache', it must be auto, off, or a folder" in problem
  monkeypatch.setattr(compilation.jax.config, "update", lambda *_: None)
  assert compilation.use_cache(f"file://{tmp_path}/c", "runs/a") == tmp_path / "c"


def test_a_work_directory_may_be_a_file_url(tmp_path):
  assert workdir.path_of(f"file://{tmp_path}/run") == tmp_path / "run"
