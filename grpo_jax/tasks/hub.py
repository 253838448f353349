"""Downloads the data files of a data set on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from grpo_jax import extras
from grpo_jax.errors import first_line
from grpo_jax.tasks import files
from grpo_jax.tasks.base import unknown_name

README = "README.md"


def is_hub_id(path: str) -> bool:
  """Tells whether text has the form of a hub id, `owner/name`, and is not the name of a data file.

  Example:
    >>> is_hub_id("openai/gsm8k"), is_hub_id("data/questions.jsonl"), is_hub_id("questions")
    (True, False, False)
  """
  form = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path)
  return form is not None and not _is_data(path)


def _is_data(name: str) -> bool:
  return Path(name).suffix.lower() in files.KINDS


def download(
  hub_id: str, *, split: str | None = None, subset: str | None = None, revision: str | None = None
) -> list[str]:
  """Returns the data files of a split, downloaded where they are not on this machine yet.

  The data set's page says which files a split has (`configs` in its README); else their names do,
  as in `files.choose`. Without a connection, files that were downloaded before are used.

  Args:
    hub_id: `owner/name`.
    split: None is "train".
    subset: one of the data set's configs, or the folder of its files; None if there is only one.
    revision: branch, tag or commit; None is the newest state of the main branch.

  Raises:
    FileNotFoundError: the data set cannot be reached, and was not downloaded before.
    ValueError: it has no such split or subset.
    ImportError: huggingface_hub is not installed.
  """
  extras.require("train", f"data set {hub_id}", "huggingface_hub")
  import huggingface_hub as hub

  where: dict[str, Any] = {"repo_id": hub_id, "repo_type": "dataset", "revision": revision}
  folder = None
  try:
    info = hub.HfApi().dataset_info(hub_id, revision=revision)
    where["revision"] = info.sha  # the files of one commit, whatever is pushed meanwhile
    names = [sibling.rfilename for sibling in info.siblings or ()]
    get = partial(_get, where)
    card = Path(get(README)).read_text(encoding="utf-8") if README in names else ""
  except Exception as error:  # the hub client raises many unrelated types
    folder = _downloaded(where)
    if folder is None:
      raise FileNotFoundError(
        f"no data at {hub_id!r}: there is no such file or folder, and reading the data set from "
        f"the Hugging Face hub failed ({first_line(error)})"
      ) from error
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    get = partial(_local, folder)
    card = (folder / README).read_text(encoding="utf-8") if README in names else ""
  chosen = choose(names, _configs(card), split, subset, hub_id)
  paths = [get(name) for name in chosen]
  if folder is None:
    # Once by its name, so that the revision is known without a connection.
    _get({**where, "revision": revision}, chosen[0])
  return paths


def _get(where: Mapping[str, Any], name: str) -> str:
  """Returns a file of a data set, downloaded unless it was before."""
  import huggingface_hub as hub

  try:
    return hub.hf_hub_download(filename=name, **where)
  except Exception as error:
    raise FileNotFoundError(
      f"downloading {name} of {where['repo_id']} from the Hugging Face hub failed "
      f"({first_line(error)})"
    ) from error


def _local(folder: Path, name: str) -> str:
  return str(folder / name)


def choose(
  names: Sequence[str],
  configs: Sequence[Mapping[str, Any]],
  split: str | None,
  subset: str | None,
  hub_id: str,
) -> list[str]:
  """Returns the names of the files of a split.

  Args:
    names: of all files of the data set.
    configs: of its README; empty where that has none.
    split, subset, hub_id: as in `download`.

  Example:
    >>> configs = [{"config_name": "main", "data_files": [{"split": "test", "path": "m/t-*"}]}]
    >>> choose(["m/t-0.csv", "m/s-0.csv"], configs, "test", None, "owner/name")
    ['m/t-0.csv']
  """
  split = split or "train"
  named = [entry for entry in configs if entry.get("data_files")]
  by_subset = {str(entry.get("config_name", "default")): entry for entry in named}
  if by_subset:
    patterns = _patterns(by_subset[_choose_subset(by_subset, configs, subset, hub_id)])
    if split not in patterns:
      raise unknown_name(f"split of {hub_id}", split, patterns)
    matching = [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns[split])]
    return files.of_one_kind(matching, f"the split {split!r} of {hub_id}")
  folders = {name: Path(name).parts[:-1] for name in names if _is_data(name)}
  if subset is not None:
    names = [name for name, parts in folders.items() if subset in parts]
    if not names:
      raise unknown_name(f"subset of {hub_id}", subset, {p for f in folders.values() for p in f})
  chosen = files.choose(names, split, hub_id)
  parents = sorted({str(Path(name).parent) for name in chosen})
  if len(parents) > 1:
    raise ValueError(
      f"{hub_id} has files of the split {split!r} in several folders, {', '.join(parents[:8])}: "
      "choose one with subset"
    )
  return chosen


def _choose_subset(
  by_subset: Mapping[str, Any], configs: Sequence[Mapping[str, Any]], subset: str | None, name: str
) -> str:
  """Returns the subset that is asked for, the only one, or the default one."""
  defaults = [str(entry.get("config_name")) for entry in configs if entry.get("default")]
  if subset is None and len(by_subset) > 1 and not defaults and "default" not in by_subset:
    raise ValueError(f"{name} has several subsets: choose one with subset: {', '.join(by_subset)}")
  chosen = subset or next(iter([*defaults, *({"default"} & set(by_subset)), *by_subset]))
  if chosen not in by_subset:
    raise unknown_name(f"subset of {name}", chosen, by_subset)
  return chosen


def _patterns(subset: Mapping[str, Any]) -> dict[str, list[str]]:
  """Returns patterns of file names by split, from one of the `configs` of a README."""
  data_files, base = subset["data_files"], subset.get("data_dir") or ""
  if isinstance(data_files, Mapping):
    data_files = [{"split": split, "path": path} for split, path in data_files.items()]
  elif not (isinstance(data_files, list) and all(isinstance(d, Mapping) for d in data_files)):
    data_files = [{"split": "train", "path": data_files}]
  patterns: dict[str, list[str]] = {}
  for entry in data_files:
    paths = entry.get("path", [])
    for path in [paths] if isinstance(paths, str) else paths:
      patterns.setdefault(str(entry.get("split", "train")), []).append(
        str(Path(base) / str(path).removeprefix("./"))
      )
  return patterns


def _configs(card: str) -> list[Mapping[str, Any]]:
  """Returns the `configs` of a README; empty where there are none or they are damaged."""
  from huggingface_hub import DatasetCard

  if not card.startswith("---"):
    return []
  try:
    configs = DatasetCard(card, ignore_metadata_errors=True).data.to_dict().get("configs")
  except Exception:  # whatever a README makes the YAML reader raise
    return []
  return [c for c in configs if isinstance(c, Mapping)] if isinstance(configs, list) else []


def _downloaded(where: Mapping[str, Any]) -> Path | None:
  """Returns the folder of what was downloaded before; None if there is nothing."""
  import huggingface_hub as hub

  try:
    return Path(hub.snapshot_download(**where, local_files_only=True))
  except Exception:
    return None
