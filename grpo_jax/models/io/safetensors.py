"""Reads Hugging Face folders: config.json and safetensors files.

Opening a folder reads headers only; `Tensor.read` reads a part of a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io import families
from grpo_jax.models.io.gguf_blocks import Stored
from grpo_jax.models.io.json_files import read_json

# Buffers that old exports store with the weights; the config determines them.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")
_FLOATS = ("F32", "F16", "BF16")
# Ends of the names of the two tensors of a matrix in MXFP4, which `mxfp4` joins.
MXFP4_PARTS = ("_blocks", "_scales")


# In larger models: prefixes of the language model with their replacements, and the other parts.
_LANGUAGE_MODEL = (
  (re.compile(r"^(model\.language_model|language_model\.model)\."), "model."),
  (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)
_OTHER_PARTS = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")

Index = tuple[slice, ...]


class Tensor(NamedTuple):
  """Holds the shape of a tensor in a file, and a function that reads the part at an index.

  `stored` gives the bytes of a matrix in a GGUF file.
  """

  shape: tuple[int, ...]
  read: Callable[[Index], np.ndarray]
  stored: Stored | None = None


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
  """Opens a folder with config.json and safetensors, without reading the data of its tensors.

  Returns:
    The config, and the tensors by the names that they have in a plain language model. The vision
    tower of a larger model is dropped, and so is a head that equals tied embeddings. A head that is
    stored alone, of a model with tied embeddings, is the embeddings.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, or describes a model that the decoder does not compute.
  """
  config = families.parse(read_json(folder / "config.json"), str(folder / "config.json"))
  tensors: dict[str, Tensor] = {}
  for stored, tensor in _read_safetensors(folder).items():
    if _BUFFERS.search(stored) or _OTHER_PARTS.search(stored):
      continue
    name = stored
    for pattern, plain in _LANGUAGE_MODEL:
      name = pattern.sub(plain, name)
    if name in tensors:
      raise ValueError(f"{folder}: {stored} is a second tensor for {name}")
    tensors[name] = tensor
  embed, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
  if config.tied and head and not embed:
    # safetensors stores a shared tensor once, under either of its names.
    tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
  elif config.tied and embed and head:
    del tensors["lm_head.weight"]
    if not _equal(embed, head):
      raise ValueError(
        f"{folder}: config.json says tie_word_embeddings, but lm_head.weight is not "
        "model.embed_tokens.weight; set tie_word_embeddings to false if the head is its own"
      )
  return config, tensors


def _equal(a: Tensor, b: Tensor, rows: int = 4096) -> bool:
  """Returns whether two matrices are equal, with at most `rows` rows of each in memory."""
  if a.shape != b.shape:
    return False
  starts = range(0, a.shape[0], rows)
  parts = [(slice(i, min(i + rows, a.shape[0])), slice(None)) for i in starts]
  return all(np.array_equal(a.read(part), b.read(part)) for part in parts)


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
  """Returns all tensors of model.safetensors, or of the shards in model.safetensors.index.json."""
  single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  listed: dict[str, str] = {}
  if single.is_file():
    files = [single]
  elif index.is_file():
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(_is_name(name) for name in listed.values()):
      raise ValueError(f"{index}: weight_map must be an object that gives each tensor's file name")
    names = sorted(set(listed.values()))
    if outside := [name for name in names if Path(name).name != name]:
      raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}")
    files = [folder / name for name in names]
  else:
    contents = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(
      f"{folder} holds neither {single.name} nor {index.name} (other formats are not supported); "
      f"it holds: {', '.join(contents[:20])}"
    )
  if missing := [file.name for file in files if not file.is_file()]:
    raise FileNotFoundError(f"{index} lists files that do not exist: {', '.join(missing)}")

  tensors: dict[str, Tensor] = {}
  for file in files:
    opened = _open(file)
    for name in opened.keys():  # noqa: SIM118 - not a mapping
      if name in tensors:
        raise ValueError(f"{folder}: tensor {name} is in {file.name} and in an earlier shard")
      part = opened.get_slice(name)
      known = ("U8",) if name.endswith(MXFP4_PARTS) else _FLOATS
      if part.get_dtype() not in known:
        raise ValueError(f"{file}: {name} is {part.get_dtype()}, known: {', '.join(known)}")
      tensors[name] = Tensor(tuple(part.get_shape()), partial(_read_part, file, name))
  if missing := [name for name in listed if name not in tensors]:
    raise ValueError(f"{index} lists tensors that no shard holds: {', '.join(missing[:20])}")
  return tensors


def _is_name(name: object) -> bool:
  return isinstance(name, str) and bool(name) and "\0" not in name


def _open(file: Path) -> Any:
  """Opens a safetensors file; ValueError names one that is damaged."""
  from safetensors import SafetensorError, safe_open

  try:
    return safe_open(str(file), "np")
  except (SafetensorError, OSError) as error:
    raise ValueError(
      f"{file} ({file.stat().st_size} bytes) is truncated or is not a safetensors file: {error}"
    ) from error


def read_whole(file: Path) -> dict[str, np.ndarray]:
  """Returns all tensors of a small safetensors file as float32.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or a tensor is not of floats or holds NaN or infinity.
  """
  if not file.is_file():
    raise FileNotFoundError(f"no {file.name} in {file.parent}")
  tensors = {}
  with _open(file) as opened:
    for name in opened.keys():  # noqa: SIM118 - not a mapping
      if (dtype := opened.get_slice(name).get_dtype()) not in _FLOATS:
        raise ValueError(f"{file}: {name} is {dtype}, known: {', '.join(_FLOATS)}")
      tensors[name] = opened.get_tensor(name).astype(np.float32)
      if not np.isfinite(tensors[name]).all():
        raise ValueError(f"{file}: {name} holds NaN or infinity; use another copy")
  return tensors


def _read_part(file: Path, name: str, index: Index) -> np.ndarray:
  """Reads a part of a tensor."""
  from safetensors import safe_open

  # Pages of a mapped file count as memory once they were read, so unmap it after each part.
  with safe_open(str(file), "np") as opened:
    return opened.get_slice(name)[index]
