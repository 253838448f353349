"""Adds a trained product of two thin matrices to each frozen matrix of a layer (LoRA).

An adapted matrix is `W + (alpha / rank) A B` with W [in, out], A [in, rank] and B [rank, out].
Adapters are a tree of their own, `{"layers": {"q_lora_a": [L, in, rank], "q_lora_b": [L, rank,
out], ...}}`, and the only trained parameters. The decoder adds the product of each pair in its
parameters (`with_adapters`); the base without adapters is the reference model.

References:
  Hu et al. 2021, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.core.checks import Array
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io.folders import new_folder
from grpo_jax.models.io.json_files import read_json
from grpo_jax.models.io.safetensors import read_whole
from grpo_jax.models.io.sources import ADAPTER as _CONFIG
from grpo_jax.models.io.weights import MATRICES, rows_of, shapes_of
from grpo_jax.models.protocol import Params
from grpo_jax.models.quantized import dequantized

Adapters = dict[str, dict[str, Array]]
_WEIGHTS = "adapter_model.safetensors"


def scale(rank: int, alpha: float) -> float:
  """Returns `alpha / rank`, the factor on the product of a pair (`Decoder.lora_scale`).

  Raises:
    ValueError: `rank` is not an integer of at least 1, or `alpha` is not a finite number above 0.

  Example:
    >>> scale(rank=8, alpha=16.0)
    2.0
  """
  if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
    raise ValueError(f"the LoRA rank is {rank!r}: it must be an integer of at least 1")
  number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
  if not number or not 0 < alpha <= sys.float_info.max:
    raise ValueError(f"the LoRA alpha is {repr(alpha)[:80]}: it must be a finite number above 0")
  return alpha / rank


def targets(shapes: Params, pattern: str | Sequence[str]) -> tuple[str, ...]:
  """Returns the names of the matrices that `pattern` matches, in the order of `MATRICES`.

  Args:
    shapes: parameters of the base model, or their shapes.
    pattern: regular expression, matched against whole names ("q|v") or paths ("layers/(q|v)"); or
      a list of names, as in `as_pattern`.

  Raises:
    ValueError: `pattern` is not a regular expression, matches no parameter, or matches a parameter
      that is not a matrix of the layers.

  Example:
    >>> matrix = np.zeros((2, 4, 4))
    >>> targets({"layers": {"q": matrix, "k": matrix, "attn_norm": matrix[0]}}, "q|v")
    ('q',)
  """
  pattern = as_pattern(pattern)
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  try:
    matches = [path for path in paths if re.search(f"(?:^|/)(?:{pattern})$", path)]
  except re.error as error:
    raise ValueError(
      f"the LoRA pattern {pattern!r} is not a regular expression: {error.msg}"
    ) from error
  names = tuple(name for name in MATRICES if f"layers/{name}" in paths)
  advice = f"it is compared with whole names and may match {', '.join(names)}"
  if not matches:
    raise ValueError(f"the LoRA pattern {pattern!r} matches no parameter: {advice}")
  if wrong := [path for path in matches if path.removeprefix("layers/") not in names]:
    raise ValueError(f"the LoRA pattern {pattern!r} matches {', '.join(wrong)}: {advice}")
  return tuple(name for name in names if f"layers/{name}" in matches)


def init(key: jax.Array, shapes: Params, pattern: str | Sequence[str], rank: int) -> Adapters:
  """Returns new float32 adapters: A uniform in ±1/sqrt(in), B zero, as in PEFT.

  The product is zero, so the adapted model starts as the base model. The A of a matrix does not
  depend on which other matrices the pattern matches.

  Args:
    key: random key.
    shapes: parameters of the base model with layers stacked, or their shapes.
    pattern: matrices to adapt, as in `targets`.
    rank: rank of the product.

  Raises:
    ValueError: the pattern is bad (see `targets`), or the rank is below 1 or larger than a side of
      a matrix.

  Example:
    >>> adapters = init(jax.random.key(0), {"layers": {"q": np.zeros((2, 4, 6))}}, "q", rank=3)
    >>> {name: leaf.shape for name, leaf in adapters["layers"].items()}
    {'q_lora_a': (2, 4, 3), 'q_lora_b': (2, 3, 6)}
  """
  scale(rank, 1.0)  # checks the rank
  sizes = {name: shapes["layers"][name].shape for name in targets(shapes, pattern)}
  for name, (_, inputs, outputs) in sizes.items():
    if rank > min(inputs, outputs):
      raise ValueError(
        f"the LoRA rank is {rank}, but layers/{name} is only {inputs} x {outputs}: use at most "
        f"{min(inputs, outputs)}, or leave {name} out of the pattern"
      )
  layers = {}
  for name, (count, inputs, outputs) in sizes.items():
    matrix_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    bound = inputs**-0.5
    a = jax.random.uniform(matrix_key, (count, inputs, rank), jnp.float32, -bound, bound)
    layers[f"{name}_lora_a"] = a
    layers[f"{name}_lora_b"] = jnp.zeros((count, rank, outputs), jnp.float32)
  return {"layers": layers}


def with_adapters(base: Params, adapters: Adapters) -> Params:
  """Returns base parameters and adapters as one tree, for the decoder; computes nothing.

  Raises:
    ValueError: the adapters contain a pair for a matrix that `base` does not have.

  Example:
    >>> base, pair = {"layers": {"q": 1}}, {"q_lora_a": 2, "q_lora_b": 3}
    >>> with_adapters(base, {"layers": pair})
    {'layers': {'q': 1, 'q_lora_a': 2, 'q_lora_b': 3}}
  """
  if not adapters:
    return base
  for name, *_ in _pairs(adapters):
    if name not in base["layers"]:
      raise ValueError(
        f"the adapters contain layers/{name}, which this base model does not have: they belong to "
        "another model"
      )
  return base | {"layers": base["layers"] | adapters["layers"]}


def merge(base: Params, adapters: Adapters, scale: float) -> Params:
  """Returns the parameters of the adapted model without adapters, each W as `W + scale A B`.

  Quantized matrices become wide ones, with the numbers that the adapters were trained on.

  Example:
    >>> base = {"layers": {"q": jnp.ones((1, 1, 1))}}
    >>> pair = {"q_lora_a": jnp.array([[[2.0]]]), "q_lora_b": jnp.array([[[3.0]]])}
    >>> merge(base, {"layers": pair}, scale=0.5)["layers"]["q"].tolist()
    [[[4.0]]]
  """
  base = dequantized(base)
  params = with_adapters(base, adapters)
  layers = {name: leaf for name, leaf in params["layers"].items() if name in base["layers"]}
  for name, a, b in _pairs(adapters):
    # In full float32: accelerators would multiply in bfloat16, and the merged weights are saved.
    added = scale * jnp.einsum("lir,lro->lio", a, b, precision="highest")
    layers[name] = (layers[name] + added).astype(layers[name].dtype)
  return params | {"layers": layers}


def matrices(adapters: Adapters) -> tuple[str, ...]:
  """Returns the names of the adapted matrices, in the order of `MATRICES`."""
  return tuple(name for name, *_ in _pairs(adapters))


def _pairs(adapters: Adapters) -> Iterator[tuple[str, Array, Array]]:
  """Yields (name of the matrix, A, B) for each pair."""
  layers = adapters.get("layers", {})
  for name in MATRICES:
    if f"{name}_lora_a" in layers:
      yield name, layers[f"{name}_lora_a"], layers[f"{name}_lora_b"]


# --- folders of the `peft` package ----------------------------------------------------------------


def save_peft(adapters: Adapters, out: str | Path, *, alpha: float, base_name: str) -> None:
  """Writes a folder that `peft.PeftModel.from_pretrained(base, out)` loads.

  Args:
    adapters: the adapters.
    out: folder to write; must be missing or empty.
    alpha: numerator of the scale `alpha / rank`.
    base_name: hub id or folder of the base model; peft can load the base from there.

  Raises:
    FileExistsError: `out` is not an empty folder. Nothing is overwritten, and the folder appears
      whole or not at all.
  """
  from safetensors.numpy import save_file

  out, tensors, rank = Path(out), {}, 0
  for name, a, b in _pairs(adapters):
    count, _, rank = a.shape
    for layer in range(count):
      for part, matrix in (("A", a), ("B", b)):
        value = np.asarray(matrix[layer], np.float32).T
        tensors[_peft_name(name, layer, part)] = np.ascontiguousarray(value)
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_name,
    "r": rank,
    "lora_alpha": alpha,
    "target_modules": [MATRICES[name].split(".")[-1] for name, *_ in _pairs(adapters)],
  }
  with new_folder(out) as partial:
    save_file(tensors, partial / _WEIGHTS, metadata={"format": "pt"})
    (partial / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_modules(config: ModelConfig) -> None:
  """Raises ValueError if the files of a family hold several matrices in one, as peft sees them."""
  fused = {row.path.removeprefix("layers/"): row.hf for row in rows_of(config) if row.fused}
  if fused:
    raise ValueError(
      f"files of this family ({config.names}) hold {', '.join(fused)} in fewer matrices "
      f"({', '.join(sorted({name.split('.')[-2] for name in fused.values()}))}), which peft adapts "
      "as one: adapters of the parts can be trained and merged, but not exchanged with peft; "
      "export the merged model (without --adapter), or merge the adapters with peft and load that"
    )


def load_peft(folder: str | Path, config: ModelConfig) -> tuple[Adapters, int, float]:
  """Reads a folder that peft or `save_peft` wrote.

  Args:
    folder: folder with adapter_config.json and adapter_model.safetensors.
    config: the base model.

  Returns:
    Adapters, rank and alpha.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, the adapters are not plain LoRA on matrices of all layers, they
      hold NaN or infinity, or their shapes do not fit the base model.
  """
  check_modules(config)
  folder = Path(folder).expanduser()
  settings = read_json(folder / _CONFIG)
  if settings.get("peft_type") != "LORA":
    raise ValueError(f"{folder / _CONFIG}: peft_type is {settings.get('peft_type')!r}, not 'LORA'")
  if variants := [name for name in _VARIANTS if settings.get(name)]:
    raise ValueError(
      f"{folder / _CONFIG}: only plain LoRA is supported, but it sets {', '.join(variants)}"
    )
  rank, alpha = settings.get("r"), settings.get("lora_alpha")
  try:
    scale(rank, alpha)
  except ValueError as error:
    raise ValueError(f"{folder / _CONFIG}: r or lora_alpha: {error}") from error
  tensors, count = read_whole(folder / _WEIGHTS), config.layers
  parts = [
    (name, part, shape)
    for name, matrix in shapes_of(config)["layers"].items()
    if name in MATRICES and _peft_name(name, 0, "A") in tensors
    for part, shape in (("A", (rank, matrix.shape[1])), ("B", (matrix.shape[2], rank)))
  ]
  expected = {
    _peft_name(name, layer, part): shape for name, part, shape in parts for layer in range(count)
  }
  if not parts:
    raise ValueError(
      f"{folder / _WEIGHTS} holds no adapter of a matrix of layer 0: its tensors are "
      f"{', '.join([*tensors][:5]) or 'none'}, expected names such as {_peft_name('q', 0, 'A')}"
    )
  actual = {name: tensor.shape for name, tensor in tensors.items()}
  if wrong := [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]:
    name = wrong[0]
    raise ValueError(
      f"{folder / _WEIGHTS}: {len(wrong)} tensor(s) do not fit the model, such as {name}: shape "
      f"{actual.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
    )
  layers = {
    f"{name}_lora_{part.lower()}": np.stack(
      [np.float32(tensors[_peft_name(name, layer, part)].T) for layer in range(count)]
    )
    for name, part, _ in parts
  }
  return {"layers": layers}, rank, float(alpha)


# Fields of adapter_config.json that change what an adapter computes without adding a tensor.
_VARIANTS = ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "use_qalora", "use_bdlora",
             "alora_invocation_tokens", "layer_replication", "fan_in_fan_out")  # fmt: skip


def _peft_name(name: str, layer: int, part: str) -> str:
  return f"base_model.model.{MATRICES[name].format(layer)}.lora_{part}.weight"


def as_pattern(targets: str | Sequence[str]) -> str:
  """Returns the regular expression of matrix names, from such an expression or a list of names.

  Names as transformers writes them, such as "q_proj", are accepted.

  Raises:
    ValueError: text that is a list in quotes, whose brackets would be a class of letters.

  Example:
    >>> as_pattern(["q_proj", "down"]), as_pattern("(q|v)_proj")
    ('q|down', '(q|v)')
  """
  if not isinstance(targets, str):
    return "|".join(re.escape(name.removesuffix("_proj")) for name in targets)
  if re.search(r"""['",]""", targets):
    raise ValueError(
      f"the LoRA pattern {targets!r} is text that looks like a list; write names with | between "
      "them, such as 'q|v', or a list of names without quotes around it"
    )
  return targets.replace("_proj", "")
