"""Tests the page as text: its parts, its policy, its limit."""

import base64
import gzip
import hashlib
import json
import re

import pytest

from grpo_jax.report import page
from grpo_jax.report.__main__ import main
from grpo_jax.report.data import named
from tests.helpers.work_directories import make_run


def parts_of(text):
  """Returns the parts of a page by id, unpacked."""
  found = re.findall(r'<script type="text/plain" id="([^"]*)">([^<]*)</script>', text)
  return {i: json.loads(gzip.decompress(base64.b64decode(part))) for i, part in found}


def test_the_page_holds_each_file_of_samples_once(tmp_path):
  folders = [make_run(tmp_path / str(seed), seed=seed, steps=4, every=2) for seed in range(2)]
  text = page.static(named(list(map(str, folders))))
  parts = parts_of(text)
  assert set(parts) == {"data"} | {f"part-{run}-{i}" for run in range(2) for i in range(7)}
  summary = parts["data"]
  files = summary["runs"][1]["files"]
  assert [(f["kind"], f["step"]) for f in files[:3]] == [("eval", 0), ("step", 0), ("step", 1)]
  lines = (folders[1] / "samples/step_000001.jsonl").read_text().splitlines()
  rows = [c["completion"] for group in parts["part-1-2"]["groups"] for c in group["completions"]]
  assert rows == [json.loads(line)["completion"] for line in lines]
  of_prompt = {text: files for _, text, files in summary["runs"][1]["prompts"]}
  assert of_prompt["0 + 0 ="] == [0, 3, 6]
  assert page.static(named(list(map(str, folders)))) == text


def test_its_policy_allows_its_own_script_and_style_and_nothing_else(tmp_path):
  text = page.static(named([str(make_run(tmp_path / "run", steps=1))]))
  policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
  script = re.search(r"<script>(.*)</script>\n</body>", text, re.DOTALL)[1]
  style = re.search(r"<style>(.*)</style>", text, re.DOTALL)[1]
  for kind, content in (("script", script), ("style", style)):
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert f"{kind}-src 'sha256-{digest}'" in policy
  assert "default-src 'none'" in policy
  assert "connect-src 'none'" in policy
  assert "unsafe" not in policy
  assert not re.search(r"(src|href)=", text.replace(script, ""))


def test_the_title_is_the_only_text_of_a_run_outside_of_the_parts(tmp_path):
  run = make_run(tmp_path / "<img src=x>&\"'", steps=1)
  text = page.static(named([str(run)]))
  assert "<title>&#60;img src&#61;x&#62;&#38;&#34;&#39;: report</title>" in text
  assert "What is" not in text


def test_of_larger_samples_each_step_shows_fewer_groups(tmp_path):
  run = named([str(make_run(tmp_path / "run", steps=6, prompts=12))])
  whole, cut = page.Parts(run, 30.0), page.Parts(run, 0.01)
  sizes = [sum(map(len, parts.packed.values())) for parts in (whole, cut)]
  assert sizes[1] < 1.1 * 0.01 * page.MEBIBYTE < sizes[0]
  for file in cut.index(0)["files"]:
    assert 1 <= file["shown"] < file["of"]


def test_the_command_writes_a_page(tmp_path, capsys):
  run = make_run(tmp_path / "run", steps=2)
  assert main([str(run)]) == 0
  assert "report.html: 0." in capsys.readouterr().out
  assert set(parts_of((run / "report.html").read_text())) >= {"data", "part-0-0"}
  assert main([str(run), "--out", str(tmp_path / "new" / "x.html")]) == 0
  assert (tmp_path / "new" / "x.html").read_text() == (run / "report.html").read_text()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["nowhere"], "error: nowhere is not a folder: give the work directory of a run"),
    (["{run}", "--limit", "0"], "error: --limit is 0, it must be above 0 (MiB)"),
    (["{run}", "{run}"], "is given twice"),
    (
      ["{run}", "--serve", "--port", "99999"],
      "error: --port is 99999, it must be 0 (a free one) to 65535",
    ),
  ],
)
def test_mistakes_are_refused_in_one_line(tmp_path, capsys, arguments, message):
  run = make_run(tmp_path / "run", steps=1)
  assert main([argument.format(run=run) for argument in arguments]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1


def test_problems_are_told_and_the_page_is_written(tmp_path, capsys):
  run = make_run(tmp_path / "run", steps=2)
  (run / "config.json").write_text("{")
  assert main([str(run)]) == 0
  assert "warning: run: " in capsys.readouterr().err
  assert (run / "report.html").is_file()
