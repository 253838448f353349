"""Maps the tensors of model files to the decoder's parameters, and reads them.

ROWS is the one table of parameters: path in the tree, names in the files, shape. A tensor without a
row or a row without a tensor is an error, so no parameter keeps an initial value and no tensor is
silently ignored. `models.load.open_weights` opens any source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import PyTree

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io import mxfp4
from grpo_jax.models.io.gguf import read_gguf
from grpo_jax.models.io.gguf_blocks import Stored
from grpo_jax.models.io.safetensors import Index, Tensor, read_folder
from grpo_jax.models.io.sources import Source
from grpo_jax.models.protocol import Params


class Row(NamedTuple):
  """Describes one parameter.

  Attributes:
    path: path in the parameter tree.
    hf: name in Hugging Face files; `{}` is the layer, a second `{}` the expert. Parameters of a
      layer are stacked on leading axes of layers and experts in the tree.
    gguf: name in GGUF files.
    dims: shape in the files, one letter per axis: V vocabulary, D hidden size, Q query heads x head
      size, K key-value heads x head size, A query heads, H head size, F hidden size of the MLP, C
      labels, E experts. Matrices of a layer are [out, in] in the files and [in, out] in the tree.
    fused: first axes of all parameters that one tensor holds, one above the other, where it holds
      several.
    place: index of this parameter among them.
    as_is: the axes of a layer's tensor are in the order of the tree: of all experts, [E, in, out].
    every: number of parameters that take turns along the last axis of one tensor, `place` first.
  """

  path: str
  hf: str
  gguf: str
  dims: str
  fused: str = ""
  place: int = 0
  as_is: bool = False
  every: int = 1

  @property
  def in_layer(self) -> bool:
    """Returns whether the parameter belongs to a layer."""
    return self.path.startswith("layers/")

  @property
  def by_expert(self) -> bool:
    """Returns whether each expert has a tensor of its own."""
    return self.hf.count("{}") == 2


_LAYER = "model.layers.{}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."
# fmt: off
ROWS: tuple[Row, ...] = (
  Row("embed", "model.embed_tokens.weight", "token_embd.weight", "VD"),
  Row("layers/attn_norm", _LAYER + "input_layernorm.weight", "blk.{}.attn_norm.weight", "D"),
  Row("layers/q", _ATTENTION + "q_proj.weight", "blk.{}.attn_q.weight", "QD"),
  Row("layers/k", _ATTENTION + "k_proj.weight", "blk.{}.attn_k.weight", "KD"),
  Row("layers/v", _ATTENTION + "v_proj.weight", "blk.{}.attn_v.weight", "KD"),
  Row("layers/o", _ATTENTION + "o_proj.weight", "blk.{}.attn_output.weight", "DQ"),
  Row("layers/q_bias", _ATTENTION + "q_proj.bias", "blk.{}.attn_q.bias", "Q"),
  Row("layers/k_bias", _ATTENTION + "k_proj.bias", "blk.{}.attn_k.bias", "K"),
  Row("layers/v_bias", _ATTENTION + "v_proj.bias", "blk.{}.attn_v.bias", "K"),
  Row("layers/o_bias", _ATTENTION + "o_proj.bias", "blk.{}.attn_output.bias", "D"),
  Row("layers/q_norm", _ATTENTION + "q_norm.weight", "blk.{}.attn_q_norm.weight", "H"),
  Row("layers/k_norm", _ATTENTION + "k_norm.weight", "blk.{}.attn_k_norm.weight", "H"),
  Row("layers/mlp_norm", _LAYER + "post_attention_layernorm.weight", "blk.{}.ffn_norm.weight", "D"),
  Row("layers/gate", _MLP + "gate_proj.weight", "blk.{}.ffn_gate.weight", "FD"),
  Row("layers/up", _MLP + "up_proj.weight", "blk.{}.ffn_up.weight", "FD"),
  Row("layers/down", _MLP + "down_proj.weight", "blk.{}.ffn_down.weight", "DF"),
  Row("layers/gate_bias", _MLP + "gate_proj.bias", "blk.{}.ffn_gate.bias", "F"),
  Row("layers/up_bias", _MLP + "up_proj.bias", "blk.{}.ffn_up.bias", "F"),
  Row("layers/down_bias", _MLP + "down_proj.bias", "blk.{}.ffn_down.bias", "D"),
  Row("final_norm", "model.norm.weight", "output_norm.weight", "D"),
  Row("head", "lm_head.weight", "output.weight", "VD"),
  Row("score", "score.weight", "cls.output.weight", "CD"),
)
# Matrices of a layer, which LoRA adapts and `quantized` holds in few bits: name in the tree -> name
# of its module in transformers.
MATRICES: dict[str, str] = {
  row.path.removeprefix("layers/"): row.hf.removesuffix(".weight")
  for row in ROWS
  if row.path.startswith("layers/") and row.hf.endswith("_proj.weight")
}
# Rows in which families differ, by ModelConfig.names. Norms of outputs are called by their place in
# the block, so one name means different norms in different families.
_POST_NORMS = (
  Row("layers/attn_post_norm", _LAYER + "post_attention_layernorm.weight",
      "blk.{}.post_attention_norm.weight", "D"),
  Row("layers/mlp_post_norm", _LAYER + "post_feedforward_layernorm.weight",
      "blk.{}.post_ffw_norm.weight", "D"),
)
_FUSED_MLP = tuple(
  Row(f"layers/{name}", _MLP + "gate_up_proj.weight", "blk.{}.ffn_up.weight", "FD", "FF", place)
  for place, name in enumerate(("gate", "up"))
)
_QKV = _ATTENTION + "qkv_proj.weight"
_FUSED_ATTENTION = tuple(
  Row(f"layers/{name}", _QKV, "blk.{}.attn_qkv.weight", dims, "QKK", place)
  for place, (name, dims) in enumerate((("q", "QD"), ("k", "KD"), ("v", "KD")))
)


def _experts(prefix: str, names: tuple[str, str, str]) -> tuple[Row, ...]:
  """Returns the rows of a router, and of experts with one tensor for each matrix."""
  matrices = zip(("gate", "up", "down"), names, ("FD", "FD", "DF"))
  return (
    Row("layers/router", prefix + "gate.weight", "blk.{}.ffn_gate_inp.weight", "ED"),
    *(
      Row(
        f"layers/experts_{name}",
        f"{prefix}experts.{{}}.{hf}.weight",
        f"blk.{{}}.ffn_{name}_exps.weight",
        dims,
      )
      for name, hf, dims in matrices
    ),
  )


def _together(name: str, hf: str, dims: str, place: int = 0, every: int = 1) -> tuple[Row, ...]:
  """Returns the rows of a matrix and a bias of all experts of a layer, in one tensor each."""
  path, hf = f"layers/experts_{name}", f"{_MLP}experts.{hf}"
  gguf = f"blk.{{}}.ffn_{name}_exps."
  return (
    Row(path, hf, gguf + "weight", f"E{dims}", place=place, as_is=True, every=every),
    Row(f"{path}_bias", f"{hf}_bias", gguf + "bias", f"E{dims[1]}", place=place, as_is=True,
        every=every),
  )


NAMES: dict[str, tuple[Row, ...]] = {
  "llama": (),
  "gemma": (
    *_POST_NORMS,
    Row("layers/mlp_norm", _LAYER + "pre_feedforward_layernorm.weight", "blk.{}.ffn_norm.weight",
        "D"),
  ),
  "olmo": _POST_NORMS,
  "phi3": (*_FUSED_ATTENTION, *_FUSED_MLP),
  "glm4": (
    Row("layers/attn_post_norm", _LAYER + "post_self_attn_layernorm.weight",
        "blk.{}.post_attention_norm.weight", "D"),
    Row("layers/mlp_post_norm", _LAYER + "post_mlp_layernorm.weight",
        "blk.{}.post_ffw_norm.weight", "D"),
    *_FUSED_MLP,
  ),
  "qwen_moe": _experts(_MLP, ("gate_proj", "up_proj", "down_proj")),
  "gpt_oss": (
    Row("layers/sinks", _ATTENTION + "sinks", "blk.{}.attn_sinks.weight", "A"),
    Row("layers/router", _MLP + "router.weight", "blk.{}.ffn_gate_inp.weight", "ED"),
    Row("layers/router_bias", _MLP + "router.bias", "blk.{}.ffn_gate_inp.bias", "E"),
    *_together("gate", "gate_up_proj", "DF", place=0, every=2),
    *_together("up", "gate_up_proj", "DF", place=1, every=2),
    *_together("down", "down_proj", "FD"),
  ),
  "mixtral": _experts(_LAYER + "block_sparse_moe.", ("w1", "w3", "w2")),
}
# fmt: on

# The float32 values of a parameter at an index, one slice per axis.
Part = Callable[[Index], np.ndarray]


@dataclass(frozen=True)
class Weights:
  """Describes a model whose tensors were checked but not read.

  Attributes:
    config: shape and family of the model.
    shapes: parameter tree of float32 ShapeDtypeStructs.
    parts: the same tree of functions that read a part of a parameter.
    where: the file or folder in errors.
    stored: matrices of the layers as they lie in a GGUF file: name -> a tensor for each layer.
  """

  config: ModelConfig
  shapes: PyTree[jax.ShapeDtypeStruct]
  parts: PyTree[Part]
  where: str = "the model"
  stored: Mapping[str, Sequence[Stored]] = field(default_factory=dict)

  def read(self, shardings: PyTree[Sharding] | None = None) -> Params:
    """Returns the parameters as numpy arrays, or as jax arrays with the given shardings.

    Reads one parameter at a time, and of each only the part that the devices of this host hold. A
    host therefore holds at most its own shards and one more parameter.

    Args:
      shardings: the parameter tree of shardings; None returns numpy arrays.

    Raises:
      ValueError: a parameter holds NaN or infinity.
    """
    parts = jax.tree_util.tree_map_with_path(partial(_finite, self.where), self.parts)
    if shardings is None:
      return jax.tree.map(lambda shape, part: part((slice(None),) * shape.ndim), self.shapes, parts)
    return jax.tree.map(
      lambda shape, part, layout: jax.make_array_from_callback(shape.shape, layout, _once(part)),
      self.shapes,
      parts,
      shardings,
    )

  def with_score(self) -> Weights:
    """Returns the model as a classifier with one label: a number per text, or per token.

    A language model gets a `score` of zeros in the place of its head, so every number is 0 at
    first. A classifier with one label stays as it is.

    Raises:
      ValueError: it is a classifier with several labels.

    Example:
      >>> from grpo_jax.models.load import open_weights
      >>> weights = open_weights("random:tiny").with_score()
      >>> weights.shapes["score"].shape, "head" in weights.shapes
      ((1, 64), False)
    """
    if self.config.labels > 1:
      raise ValueError(f"{self.where} is a classifier with {self.config.labels} labels, not one")
    if self.config.labels:
      return self
    config = replace(self.config, labels=1)
    beside = self.with_value_head()
    shapes = {name: shape for name, shape in beside.shapes.items() if name in shapes_of(config)}
    parts = {name: beside.parts[name] for name in shapes}
    return Weights(config, shapes, parts, self.where)

  def with_value_head(self) -> Weights:
    """Returns a language model with a `score` of zeros beside its head.

    Example:
      >>> from grpo_jax.models.load import open_weights
      >>> weights = open_weights("random:tiny").with_value_head()
      >>> weights.shapes["score"].shape, "embed" in weights.shapes, weights.config.labels
      ((1, 64), True, 0)
    """
    score = np.zeros((1, self.config.width), np.float32)
    parts = {**self.parts, "score": lambda index: score[index]}
    return replace(self, shapes=with_value_head(self.shapes), parts=parts)


def with_value_head(shapes: Params) -> Params:
  """Returns the shapes of a language model with those of a value head on its trunk."""
  score = jax.ShapeDtypeStruct((1, shapes["final_norm"].shape[0]), np.float32)
  return dict(sorted({**shapes, "score": score}.items()))


def _finite(where: str, path: tuple[Any, ...], part: Part) -> Part:
  """Returns `part` with a check of the numbers it reads."""

  def read(index: Index) -> np.ndarray:
    values = part(index)
    if not np.isfinite(values).all():
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise ValueError(
        f"{where}: the weights of {name} hold NaN or infinity: the file is damaged, or was written "
        "after training went wrong; use another copy"
      )
    return values

  return read


def _once(part: Part) -> Part:
  """Returns `part` with a cache, so that devices with the same shard read it once."""
  shards: dict[Any, np.ndarray] = {}

  def read(index: Index) -> np.ndarray:
    key = tuple((s.start, s.stop) for s in index)
    if key not in shards:
      shards[key] = part(index)
    return shards[key]

  return read


def open_files(source: Source) -> Weights:
  """Opens a model in files and checks the name and shape of each tensor, without reading its data.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged or not understood, or its tensors do not fit its config. Both
      errors name the file.
  """
  read = read_gguf if source.kind == "gguf" else read_folder
  config, tensors = read(Path(source.location))
  tensors = mxfp4.joined(tensors, source.location)
  names = "gguf" if source.kind == "gguf" else "hf"
  parts = _parts(config, tensors, names, source.location)
  stored = _stored(config, tensors) if source.kind == "gguf" else {}
  return Weights(config, shapes_of(config), parts, source.location, stored)


# --- the table ------------------------------------------------------------------------------------


def rows_of(config: ModelConfig) -> list[Row]:
  """Returns the rows of the parameters that a decoder of this config has, in the table's order."""
  table = {row.path: row for row in (*ROWS, *NAMES[config.names])}
  if config.qk_norm == "all":
    for path, dims in (("layers/q_norm", "Q"), ("layers/k_norm", "K")):
      table[path] = table[path]._replace(dims=dims)
  optional = {
    "head": not config.tied and not config.labels,
    "score": config.labels > 0,
    "layers/q_norm": bool(config.qk_norm),
    "layers/k_norm": bool(config.qk_norm),
    "layers/attn_norm": config.pre_norm,
    "layers/mlp_norm": config.pre_norm,
    "layers/attn_post_norm": config.post_norm,
    "layers/mlp_post_norm": config.post_norm,
    "layers/sinks": config.sinks,
  }
  optional |= {
    path: path.removeprefix("layers/").removesuffix("_bias") in config.biases
    for path in table
    if path.endswith("_bias")
  }
  if config.experts:
    optional |= dict.fromkeys(("layers/gate", "layers/up", "layers/down"), False)
  return [row for path, row in table.items() if optional.get(path, True)]


def shapes_of(config: ModelConfig) -> Params:
  """Returns the decoder's parameter tree as float32 ShapeDtypeStructs, from the table alone.

  Example:
    >>> from grpo_jax.models.io.sources import RANDOM_MODELS
    >>> shapes_of(RANDOM_MODELS["tiny"])["layers"]["gate"].shape
    (2, 64, 128)
  """
  shapes: dict[str, Any] = {"layers": {}}
  for row in sorted(rows_of(config)):
    shape = file_shape(row, config)
    if row.in_layer:
      leading = (config.layers, *((config.experts,) if row.by_expert else ()))
      own = shape if row.as_is else tuple(reversed(shape))
      stacked = jax.ShapeDtypeStruct((*leading, *own), np.float32)
      shapes["layers"][row.path.removeprefix("layers/")] = stacked
    else:
      shapes[row.path] = jax.ShapeDtypeStruct(shape, np.float32)
  return dict(sorted(shapes.items()))


def file_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
  """Returns the shape in the files of one parameter, or of one layer of it."""
  sizes = _sizes(config)
  return tuple(sizes[letter] for letter in row.dims)


def _sizes(c: ModelConfig) -> dict[str, int]:
  """Returns the sizes that the letters of `Row.dims` stand for."""
  sizes = {"V": c.vocab_size, "D": c.width, "Q": c.heads * c.head_dim, "K": c.kv_heads * c.head_dim}
  sizes |= {"A": c.heads}
  return sizes | {"H": c.head_dim, "F": c.mlp, "C": c.labels, "E": c.experts}


def fused_rows(row: Row, config: ModelConfig) -> tuple[int, int]:
  """Returns the first row of a parameter in its tensor, and the number of rows of the tensor.

  Example:
    >>> config = ModelConfig(vocab_size=8, width=4, layers=1, heads=2, kv_heads=1, head_dim=2,
    ...                      mlp=6)
    >>> fused_rows(NAMES["phi3"][1], config)  # k, after the queries
    (4, 8)
  """
  sizes = [_sizes(config)[letter] for letter in row.fused or row.dims[0]]
  return sum(sizes[: row.place]), sum(sizes)


def _parts(
  config: ModelConfig, tensors: Mapping[str, Tensor], kind: Literal["hf", "gguf"], where: str
) -> PyTree[Part]:
  """Returns a reader for each parameter; ValueError lists all tensors that do not fit."""
  parts: dict[str, Any] = {"layers": {}}
  expected: dict[str, tuple[int, ...]] = {}
  for row in rows_of(config):
    shape, name = file_shape(row, config), getattr(row, kind)
    if row.by_expert:
      table = [
        [name.format(layer, expert) for expert in range(config.experts)]
        for layer in range(config.layers)
      ]
      expected |= dict.fromkeys((each for names in table for each in names), shape)
      parts["layers"][row.path.removeprefix("layers/")] = _by_expert(table, tensors, shape)
    elif row.as_is:
      names = [name.format(layer) for layer in range(config.layers)]
      expected |= dict.fromkeys(names, (*shape[:-1], shape[-1] * row.every))
      parts["layers"][row.path.removeprefix("layers/")] = _as_is(names, tensors, shape, row)
    elif row.in_layer:
      names = [name.format(layer) for layer in range(config.layers)]
      first, rows = fused_rows(row, config)
      expected |= dict.fromkeys(names, (rows, *shape[1:]))
      parts["layers"][row.path.removeprefix("layers/")] = _layered(names, tensors, shape, first)
    else:
      expected[name] = shape
      parts[row.path] = _single(name, tensors)
  _check(expected, tensors, where)
  return parts


def _stored(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Stored, ...]]:
  """Returns the matrices of the layers as they lie in a GGUF file."""
  return {
    name: tuple(tensors[row.gguf.format(layer)].stored for layer in range(config.layers))
    for row in rows_of(config)
    if (name := row.path.removeprefix("layers/")) in MATRICES
  }


def _single(name: str, tensors: Mapping[str, Tensor]) -> Part:
  # Copies only if the dtype differs or the memory is that of the mapped file.
  return lambda index: np.require(tensors[name].read(index), np.float32, "CW")


def _layered(
  names: list[str], tensors: Mapping[str, Tensor], shape: tuple[int, ...], first: int = 0
) -> Part:
  """Returns a reader of all layers, stacked on a leading axis, each transposed.

  Args:
    first: first row of the parameter in its tensors.
  """
  stacked = (len(names), *reversed(shape))

  def read(index: Index) -> np.ndarray:
    sizes = [len(range(*part.indices(n))) for part, n in zip(index, stacked)]
    value = np.empty(sizes, np.float32)
    rows = range(first, first + shape[0])[index[-1]]
    part = slice(rows.start, rows.stop), *index[-2:0:-1]
    for layer, name in enumerate(names[index[0]]):
      value[layer] = tensors[name].read(part).T
    return value

  return read


def _as_is(
  names: list[str], tensors: Mapping[str, Tensor], shape: tuple[int, ...], row: Row
) -> Part:
  """Returns a reader of all layers of a tensor whose axes are those of the tree."""

  def read(index: Index) -> np.ndarray:
    last = range(shape[-1])[index[-1]]
    part = *index[1:-1], slice(last.start * row.every, last.stop * row.every)
    layers = [tensors[name].read(part) for name in names[index[0]]]
    return np.stack([layer[..., row.place :: row.every].astype(np.float32) for layer in layers])

  return read


def _by_expert(
  names: list[list[str]], tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Part:
  """Returns a reader of the experts of all layers, [L, E, in, out]."""
  layers = [_layered(experts, tensors, shape) for experts in names]
  return lambda index: np.stack([read(index[1:]) for read in layers[index[0]]])


def _check(
  expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: str
) -> None:
  """Raises ValueError unless the tensors have exactly the expected names and shapes."""
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
