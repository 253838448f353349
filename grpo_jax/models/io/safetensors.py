"""The files that hold models: Hugging Face folders (config.json, safetensors) and GGUF.

Opening reads headers only; `Tensor.read` reads the part of a tensor that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io import families
from grpo_jax.models.io.json_files import read_json

# Buffers that old exports wrote beside the weights; they follow from the config.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
_FLOATS = ("F32", "F16", "BF16")


# Where larger models have their language model, and what else is in their files.
_LANGUAGE_MODEL = (
  (re.compile(r"^(model\.language_model|language_model\.model)\."), "model."),
  (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)
_OTHER_PARTS = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")

Index = tuple[slice, ...]


class Tensor(NamedTuple):
  """A tensor in a file: its shape there, and how to read the part at an index."""

  shape: tuple[int, ...]
  read: Callable[[Index], np.ndarray]


# --- Hugging Face folders -------------------------------------------------------------------------


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
  """Config and tensors of a folder of config.json and safetensors, under the names that a model
  without other parts has; a head equal to tied embeddings is dropped."""
  config = families.parse(read_json(folder / "config.json"), str(folder / "config.json"))
  tensors: dict[str, Tensor] = {}
  for stored, tensor in _read_safetensors(folder).items():
    if _COMPUTED.search(stored) or _OTHER_PARTS.search(stored):
      continue
    name = stored
    for pattern, plain in _LANGUAGE_MODEL:
      name = pattern.sub(plain, name)
    if name in tensors:
      raise ValueError(f"{folder}: {stored} is a second tensor for {name}")
    tensors[name] = tensor
  embed, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
  if config.tied and embed and head:
    del tensors["lm_head.weight"]
    if not _equal(embed, head):
      raise ValueError(
        f"{folder}: config.json says tie_word_embeddings, but lm_head.weight is not "
        "model.embed_tokens.weight; set tie_word_embeddings to false if the head is its own"
      )
  return config, tensors


def _equal(a: Tensor, b: Tensor, rows: int = 4096) -> bool:
  """Whether two matrices are the same, a few rows in memory at a time."""
  if a.shape != b.shape:
    return False
  starts = range(0, a.shape[0], rows)
  parts = [(slice(i, min(i + rows, a.shape[0])), slice(None)) for i in starts]
  return all(np.array_equal(a.read(part), b.read(part)) for part in parts)


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
  """Every tensor of model.safetensors, or of the shards model.safetensors.index.json lists."""
  from safetensors import SafetensorError, safe_open

  single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  listed: dict[str, str] = {}
  if single.is_file():
    files = [single]
  elif index.is_file():
    listed = read_json(index).get("weight_map", {})
    names = sorted(set(listed.values()))
    if outside := [name for name in names if Path(name).name != name]:
      raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}")
    files = [folder / name for name in names]
  else:
    have = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(
      f"{folder} holds neither {single.name} nor {index.name} (other formats are not read); "
      f"it holds: {', '.join(have[:20])}"
    )
  if absent := [file.name for file in files if not file.is_file()]:
    raise FileNotFoundError(f"{index} lists files that are not there: {', '.join(absent)}")

  tensors: dict[str, Tensor] = {}
  for file in files:
    try:
      opened = safe_open(str(file), "np")
    except SafetensorError as error:
      raise ValueError(
        f"{file} ({file.stat().st_size} bytes) is truncated or is not a safetensors file: {error}"
      ) from error
    for name in opened.keys():  # noqa: SIM118 - not a mapping
      if name in tensors:
        raise ValueError(f"{folder}: tensor {name} is in {file.name} and in an earlier shard")
      part = opened.get_slice(name)
      if part.get_dtype() not in _FLOATS:
        raise ValueError(f"{file}: {name} is {part.get_dtype()}, known: {', '.join(_FLOATS)}")
      tensors[name] = Tensor(tuple(part.get_shape()), partial(_read_part, file, name))
  if absent := [name for name in listed if name not in tensors]:
    raise ValueError(f"{index} lists tensors that no shard holds: {', '.join(absent[:20])}")
  return tensors


def _read_part(file: Path, name: str, index: Index) -> np.ndarray:
  """Part of a tensor; the file is mapped only so long, for what was read of it counts as memory."""
  from safetensors import safe_open

  with safe_open(str(file), "np") as opened:
    return opened.get_slice(name)[index]
