"""Builds the report: one HTML file that loads nothing.

Text of runs enters the page only as compressed JSON in base64, and the page's script only ever
writes it as text. A content security policy forbids everything else.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from grpo_jax.report.data import RunData, Samples, groups, label, sample_files
from grpo_jax.run.metrics import read_samples

MEBIBYTE = 2**20
LOOKED_AT = 37  # files whose size is measured first; no multiple of what recurs

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
{parts}
<script>{script}</script>
</body>
</html>
"""


@cache
def asset(name: str) -> str:
  """Returns the text of a file beside this one."""
  return (resources.files("grpo_jax.report") / "assets" / name).read_text(encoding="utf-8")


def static(runs: Sequence[RunData], limit: float = 30.0) -> str:
  """Returns the page of runs as they are now.

  Args:
    limit: MiB that the samples may take; of larger ones each step shows fewer groups.
  """
  parts = Parts(runs, limit)
  summary = {"live": False, "runs": [run.summary() | parts.index(i) for i, run in enumerate(runs)]}
  packed = {"data": pack(summary)} | parts.packed
  return html(packed, connect="'none'", title=", ".join(run.name for run in runs))


def live(title: str) -> str:
  """Returns a page that asks its server for everything."""
  return html({"data": pack({"live": True})}, connect="'self'", title=title)


def html(parts: dict[str, str], *, connect: str, title: str) -> str:
  """Returns the page around parts in base64."""
  script = asset("uPlot.iife.min.js") + "\n" + asset("report.js")
  style = asset("uPlot.min.css") + "\n" + asset("report.css")
  policy = (
    f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; "
    f"connect-src {connect}; base-uri 'none'; form-action 'none'"
  )
  return PAGE.format(
    policy=policy,
    title=escaped(f"{title}: report"),
    style=style,
    body=asset("report.html"),
    parts="\n".join(f'<script type="text/plain" id="{i}">{p}</script>' for i, p in parts.items()),
    script=script,
  )


def escaped(text: str) -> str:
  """Returns text for the one place of the page that is not written by its script: the title."""
  return "".join(c if c.isalnum() or c in " -_.,:/" else f"&#{ord(c)};" for c in text)


def digest(text: str) -> str:
  """Returns what a content security policy calls an inline script or style."""
  return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def pack(value: Any) -> str:
  """Returns a value as JSON, compressed, in base64."""
  return base64.b64encode(compressed(value)).decode()


def compressed(value: Any) -> bytes:
  """Returns a value as compressed JSON."""
  return gzip.compress(json.dumps(value, allow_nan=False).encode(), 6, mtime=0)


class Parts:
  """Holds the samples of runs, one part per file.

  Args:
    runs: in the order of the page.
    limit: MiB, as in `static`.

  Attributes:
    packed: text of each part by its id.
  """

  def __init__(self, runs: Sequence[RunData], limit: float) -> None:
    self._runs, self.packed = runs, {}
    self._files = [sample_files(run.folder) for run in runs]
    self._indices: list[dict[str, Any]] = []
    share = min(limit / max(self._estimate(), 1e-9), 1.0)
    self._fill(share)
    size = sum(map(len, self.packed.values())) / MEBIBYTE
    if size > 1.1 * limit:  # the files differ in size
      self._fill(share * limit / size)

  def index(self, i: int) -> dict[str, Any]:
    """Returns the files of a run, and of each prompt the files that hold it."""
    return self._indices[i]

  def _estimate(self) -> float:
    """Returns about the size in MiB of all groups, from some files of each run."""
    total = 0
    for files in self._files:
      some = files[:: max(len(files) // LOOKED_AT, 1)]
      sizes = [len(pack(part_of(file.path))) for file in some]
      total += sum(sizes) * len(files) / max(len(some), 1)
    return total / MEBIBYTE

  def _fill(self, share: float) -> None:
    """Packs this share of the groups of each file."""
    self._indices = []
    for i, files in enumerate(self._files):
      index = Index()
      for file in files:
        part = part_of(file.path, share)
        number = index.add(file, part)
        self.packed[f"part-{i}-{number}"] = pack(part)
      self._indices.append(index.plain())


def part_of(path: Path, share: float = 1.0) -> dict[str, Any]:
  """Returns a file of samples as the page takes it.

  Args:
    share: of its groups, evenly spread; at least one.
  """
  rows, damaged = read_samples(path)
  found = groups(rows)
  count = max(int(len(found) * share), 1) if share < 1 else len(found)
  kept = [found[i * len(found) // count] for i in range(min(count, len(found)))]
  return {"groups": kept, "of": len(found), "damaged": damaged}


def contents(part: dict[str, Any]) -> dict[str, Any]:
  """Returns what an index says of a part: its prompts and their number."""
  prompts = [(group["id"], label(group["prompt"])) for group in part["groups"]]
  return {"shown": len(prompts), "of": part["of"], "damaged": part["damaged"], "prompts": prompts}


class Index:
  """Lists the files of a run and where each prompt is."""

  def __init__(self) -> None:
    self._files: list[dict[str, Any]] = []
    self._prompts: dict[str, tuple[str, list[int]]] = {}

  def add(self, file: Samples, part: dict[str, Any]) -> int:
    """Adds a file; returns its number. Of its part, only what `contents` returns is needed."""
    number, about = len(self._files), {"kind": file.kind, "step": file.step, "name": file.path.name}
    part = contents(part) if "groups" in part else part
    self._files.append(about | {name: part[name] for name in ("shown", "of", "damaged")})
    for key, text in part["prompts"]:
      self._prompts.setdefault(key, (text, []))[1].append(number)
    return number

  def plain(self) -> dict[str, Any]:
    """Returns the index as plain data; the prompts in the order of their first file."""
    prompts = [[key, text, files] for key, (text, files) in self._prompts.items()]
    return {"files": self._files, "prompts": prompts}
