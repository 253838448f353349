"""Writes the model card of an exported run, and uploads the folder to the Hugging Face hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.errors import first_line
from grpo_jax.run import identity, record
from grpo_jax.run.metrics import METRICS, read_metrics

CARD = "README.md"
CURVE = "curve.png"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Metrics of an evaluation that a card shows, if the run has them: name and heading.
EVALUATION = {
  "eval/accuracy": "accuracy",
  "eval/mean_length": "tokens of a completion",
  "eval/clipped_ratio": "completions cut off",
  "eval/turns": "turns of an episode",
}


def write_card(folder: str | Path, workdir: str | Path, c: ConfigDict, step: int) -> list[str]:
  """Writes README.md, and the curve of the run, into an exported folder.

  Args:
    folder: the exported model.
    workdir: of the run.
    c: config of the run.
    step: of the exported checkpoint.

  Returns:
    The names of the files.
  """
  folder, workdir = Path(folder), Path(workdir)
  curve = (workdir / CURVE).is_file()
  if curve:
    shutil.copyfile(workdir / CURVE, folder / CURVE)
  known = read_metrics(workdir) if (workdir / METRICS).is_file() else []
  rows = [row for row in known if row["step"] <= step]
  sessions, files = record.read(workdir), identity.read(workdir)
  text = card(workdir.name, c, step, rows, sessions, files, curve=curve)
  (folder / CARD).write_text(text, encoding="utf-8")
  return [CARD, *([CURVE] if curve else [])]


def card(
  name: str,
  c: ConfigDict,
  step: int,
  rows: Sequence[Mapping[str, Any]],
  sessions: Sequence[Mapping[str, Any]] = (),
  files: Mapping[str, str] | None = None,
  *,
  curve: bool = False,
) -> str:
  """Returns the text of a model card: Markdown after a header that the hub reads.

  Args:
    name: of the run.
    c: its config.
    step: of the checkpoint.
    rows: lines of its metrics.jsonl.
    sessions: of its run.json.
    files: digests of the files it depends on.
    curve: whether `curve.png` lies beside the card.
  """
  adapter = bool(c.lora.rank)
  parts = [
    _header(c),
    f"# {name}",
    f"`{c.model.source}`{', adapters' if adapter else ''} after {step} steps of "
    f"{c.algorithm.name} ({_paper(c)}) on the task `{c.task.name}`, trained with grpo_jax.",
    "## Results",
    _evaluations(rows),
    *([f"![reward and held-out accuracy]({CURVE})"] if curve else []),
    "## Use",
    _use(),
    "## Training",
    _training(c, step, sessions, files or {}),
    "## Settings that differ from the defaults",
    "\n".join(["```text", *_changes(c), "```"]),
    "## Licence",
    _licence(c),
  ]
  return "\n\n".join(parts) + "\n"


def _header(c: ConfigDict) -> str:
  """Returns the YAML header; values are JSON strings, which YAML reads as they are."""
  lines = ["library_name: transformers", "pipeline_tag: text-generation"]
  if _of_hub(c.model.source):
    lines.append(f"base_model: {json.dumps(c.model.source)}")
  if licence := _licence_name(c):
    lines.append(f"license: {json.dumps(licence)}")
  tags = ["tags:", "- grpo", "- reinforcement-learning", "- grpo_jax"]
  return "\n".join(["---", *lines, *tags, "---"])


def _of_hub(source: str) -> bool:
  """Returns whether a source is an id of the hub, and not a folder such as `runs/teacher`."""
  return bool(HUB_ID.fullmatch(source)) and not Path(source).exists()


def _paper(c: ConfigDict) -> str:
  row = ALGORITHMS.get(c.algorithm.name)
  return row.source if row else "an algorithm of its own"


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table of the first and the last evaluation."""
  found = [row for row in rows if row.get("eval/accuracy") is not None]
  if not found:
    return "The run has no evaluation on held-out problems."
  shown = found if len(found) == 1 else [found[0], found[-1]]
  names = [n for n in EVALUATION if any(row.get(n) is not None for row in shown)]
  head = f"| step | {' | '.join(EVALUATION[n] for n in names)} |"
  lines = [head, "| --- " * (len(names) + 1) + "|"]
  lines += [
    f"| {int(row['step'])} | {' | '.join(_with_error(row, n) for n in names)} |" for row in shown
  ]
  count = shown[-1].get("eval/n")
  problems = f"{int(count)} held-out problems, " if count else ""
  return "\n".join([*lines, "", f"Greedy answers to {problems}± one standard error over problems."])


def _with_error(row: Mapping[str, Any], name: str) -> str:
  value, error = row.get(name), row.get(f"{name}_se")
  if value is None:
    return ""
  return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _use() -> str:
  return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER OR REPOSITORY")
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER OR REPOSITORY")
inputs = tokenizer("A prompt of the task", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0]))
```

`generation_config.json` samples as the run did: the same temperature, ends and largest length."""


def _training(
  c: ConfigDict, step: int, sessions: Sequence[Mapping[str, Any]], files: Mapping[str, str]
) -> str:
  r, last = c.rollout, sessions[-1] if sessions else {}
  git = last.get("git") or {}
  facts = {
    "algorithm": f"`{c.algorithm.name}`: {_paper(c)}",
    "steps": f"{step} of {c.steps}, each {r.prompts_per_step} prompts x {r.group_size} completions",
    "completions": f"up to {r.completion_length} tokens at temperature {r.temperature:g}",
    "learning rate": f"{c.optimizer.learning_rate:g}, {c.optimizer.schedule}",
    "seed": str(c.seed),
    "devices": str(last.get("devices", "")),
    "versions": ", ".join(f"{k} {v}" for k, v in (last.get("versions") or {}).items()),
    "git commit": str(git.get("commit", "")) + (" with changes" if git.get("changed") else ""),
    "data and code": ", ".join(f"{Path(k).name} ({str(v)[:12]})" for k, v in sorted(files.items())),
  }
  lines = [f"| {name} | {_cell(text)} |" for name, text in facts.items() if text.strip()]
  return "\n".join(["| what | |", "| --- | --- |", *lines])


def _cell(text: str) -> str:
  """Returns text that stays in one cell of a table."""
  return text.replace("|", "\\|").replace("\n", " ")


def _changes(c: ConfigDict) -> list[str]:
  """Returns the fields that are not as in the default config, as `name: default -> value`."""
  saved = (configs.to_saved(config) for config in (configs.default_config(), c))
  return [line.replace("`", "'") for line in configs.differences(*saved)]


def _licence(c: ConfigDict) -> str:
  name = _licence_name(c)
  own = f"that of the base model, {name}" if name else "that of the base model"
  return f"The licence of these weights is {own}: see `{c.model.source}`."


def _licence_name(c: ConfigDict) -> str:
  """Returns the licence that the model card of the base names; "" if there is none here."""
  from huggingface_hub import try_to_load_from_cache

  path: Any = Path(c.model.source) / CARD
  if _of_hub(c.model.source):
    path = try_to_load_from_cache(c.model.source, CARD)
  if not isinstance(path, str | Path) or not Path(path).is_file():
    return ""
  text = Path(path).read_text(encoding="utf-8", errors="replace")
  header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
  found = re.search(r"^license: *[\"']?([\w.+-]+)", header[1], re.MULTILINE) if header else None
  return found[1] if found else ""


def check_repository(name: str) -> None:
  """Raises ValueError unless `name` can be a repository of the hub."""
  if not HUB_ID.fullmatch(name):
    raise ValueError(f"--push is {name!r}, it must be a repository of the hub: owner/name")


def push(folder: str | Path, repo: str, *, public: bool = False) -> str:
  """Uploads a folder to a repository of the hub, which is made if it is missing.

  The hub is that of `HF_ENDPOINT`, with the token of `HF_TOKEN` or `hf auth login`.

  Args:
    folder: the exported model.
    repo: `owner/name`.
    public: makes a new repository public; one that exists stays as it is.

  Returns:
    The address of the commit.

  Raises:
    ValueError: the name is not `owner/name`, or the hub refused or did not answer. The folder stays
      as it is.
  """
  from huggingface_hub import HfApi

  check_repository(repo)
  try:
    api = HfApi()
    api.create_repo(repo, private=not public, exist_ok=True)
    commit = api.upload_folder(
      repo_id=repo, folder_path=str(folder), commit_message="Upload a model trained with grpo_jax"
    )
  except Exception as error:  # of the client, of its transport, or of the network
    reason = first_line(error).rstrip(".")
    raise ValueError(
      f"the upload to {repo} failed: {reason}. {folder} is complete; with a token (HF_TOKEN, or "
      f"`hf auth login`) `hf upload {repo} {folder}` uploads it"
    ) from error
  return str(commit)
