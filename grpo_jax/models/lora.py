"""LoRA: the matrices of a layer stay as they are, a product of two thin ones is added and trained.

`W + (alpha / rank) A B`, W [in, out], A [in, rank], B [rank, out] (Hu et al. 2021, arXiv
2106.09685, section 4.1). Adapters are a tree of their own, `{"layers": {"q_lora_a": [L, in, rank],
"q_lora_b": [L, rank, out], ...}}`, which is all that is trained. The decoder adds the product
wherever it finds a pair in its parameters (`with_adapters`), and the base without adapters is the
reference model.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io.json_files import read_json
from grpo_jax.models.io.weights import ROWS, shapes_of

Adapters = dict[str, Any]
# The matrices that a layer multiplies with: name in the tree -> its module in transformers.
MATRICES: dict[str, str] = {
  row.path.removeprefix("layers/"): row.hf.removesuffix(".weight")
  for row in ROWS
  if row.path.startswith("layers/") and row.hf.endswith("_proj.weight")
}
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def scale(rank: int, alpha: float) -> float:
  """`alpha / rank`, what the product of a pair is multiplied by (`Decoder.lora_scale`).

  >>> scale(rank=8, alpha=16.0)
  2.0
  """
  if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
    raise ValueError(f"the LoRA rank is {rank!r}: it must be an integer of at least 1")
  if not math.isfinite(alpha) or alpha <= 0:
    raise ValueError(f"LoRA's alpha is {alpha!r}: it must be a finite number above 0")
  return alpha / rank


def targets(shapes: Any, pattern: str) -> tuple[str, ...]:
  """The matrices of a layer that `pattern` matches, in the order of the table.

  Args:
    shapes: parameters, or their shapes.
    pattern: regular expression of whole names ("q|v") or whole paths ("layers/(q|v)").

  Raises ValueError, with the names, if the pattern is no regular expression, matches no parameter,
  or matches one that is not a matrix of the layers.

  >>> matrix = np.zeros((2, 4, 4))
  >>> targets({"layers": {"q": matrix, "k": matrix, "attn_norm": matrix[0]}}, "q|v")
  ('q',)
  """
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  try:
    matched = [path for path in paths if re.search(f"(?:^|/)(?:{pattern})$", path)]
  except re.error as error:
    raise ValueError(
      f"the LoRA pattern {pattern!r} is no regular expression: {error.msg}"
    ) from error
  names = tuple(name for name in MATRICES if f"layers/{name}" in paths)
  advice = f"it is compared with whole names and may match {', '.join(names)}"
  if not matched:
    raise ValueError(f"the LoRA pattern {pattern!r} matches no parameter: {advice}")
  if wrong := [path for path in matched if path.removeprefix("layers/") not in names]:
    raise ValueError(f"the LoRA pattern {pattern!r} matches {', '.join(wrong)}: {advice}")
  return tuple(name for name in names if f"layers/{name}" in matched)


def init(key: jax.Array, shapes: Any, pattern: str, rank: int) -> Adapters:
  """New float32 adapters, which add nothing yet: A uniform in ±1/sqrt(in), B zero (as in PEFT).

  A matrix gets the same A whatever else the pattern matches.

  Args:
    shapes: parameters of the base (layers stacked), or their shapes.
    pattern: see `targets`.

  Raises ValueError for a bad pattern, and a rank below 1 or beyond a side of a matrix.
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
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    bound = inputs**-0.5
    a = jax.random.uniform(own, (count, inputs, rank), jnp.float32, -bound, bound)
    layers[f"{name}_lora_a"] = a
    layers[f"{name}_lora_b"] = jnp.zeros((count, rank, outputs), jnp.float32)
  return {"layers": layers}


def with_adapters(base: Any, adapters: Adapters) -> Any:
  """The parameters of the adapted model, for the decoder: both trees in one, nothing computed."""
  if not adapters:
    return base
  for name, *_ in _pairs(adapters):
    if name not in base["layers"]:
      raise ValueError(f"adapters of layers/{name}, which the base has not: they are another's")
  return base | {"layers": base["layers"] | adapters["layers"]}


def merge(base: Any, adapters: Adapters, scale: float) -> Any:
  """The same model without adapters: `W + scale A B` in the place of every adapted W."""
  params = with_adapters(base, adapters)
  layers = {name: leaf for name, leaf in params["layers"].items() if name in base["layers"]}
  for name, a, b in _pairs(adapters):
    # In full float32: accelerators would multiply in bfloat16, and the merged model is kept.
    added = scale * jnp.einsum("lir,lro->lio", a, b, precision="highest")
    layers[name] = (layers[name] + added).astype(layers[name].dtype)
  return params | {"layers": layers}


def _pairs(adapters: Adapters) -> Iterator[tuple[str, Any, Any]]:
  """(name of the matrix, A, B) of every pair."""
  layers = adapters.get("layers", {})
  for name in MATRICES:
    if f"{name}_lora_a" in layers:
      yield name, layers[f"{name}_lora_a"], layers[f"{name}_lora_b"]


# --- folders as the `peft` package has them -------------------------------------------------------


def save_peft(adapters: Adapters, out: str | Path, *, alpha: float, base_name: str) -> None:
  """Writes a folder that `peft.PeftModel.from_pretrained(base, out)` loads.

  Args:
    base_name: where the base model is, a hub id or a folder; peft loads it from there if asked to.
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
  out.mkdir(parents=True, exist_ok=True)
  save_file(tensors, out / _WEIGHTS, metadata={"format": "pt"})
  (out / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_peft(folder: str | Path, config: ModelConfig) -> tuple[Adapters, int, float]:
  """(adapters, rank, alpha) of a folder that peft or `save_peft` wrote for a model of `config`.

  Raises ValueError for anything but plain LoRA on matrices of all layers, and for shapes that do
  not fit; both name what they found.
  """
  from safetensors.numpy import load_file

  folder = Path(folder)
  settings = read_json(folder / _CONFIG)
  if settings.get("peft_type") != "LORA":
    raise ValueError(f"{folder / _CONFIG}: peft_type is {settings.get('peft_type')!r}, not 'LORA'")
  if used := [name for name in _NOT_PLAIN if settings.get(name)]:
    raise ValueError(f"{folder / _CONFIG}: only plain LoRA is read, but it has {', '.join(used)}")
  rank, alpha = settings["r"], settings["lora_alpha"]
  tensors, count = load_file(folder / _WEIGHTS), config.layers
  parts = [
    (name, part, shape)
    for name, matrix in shapes_of(config)["layers"].items()
    if name in MATRICES and _peft_name(name, 0, "A") in tensors
    for part, shape in (("A", (rank, matrix.shape[1])), ("B", (matrix.shape[2], rank)))
  ]
  expected = {
    _peft_name(name, layer, part): shape for name, part, shape in parts for layer in range(count)
  }
  found = {name: tensor.shape for name, tensor in tensors.items()}
  if wrong := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
    name = wrong[0]
    raise ValueError(
      f"{folder / _WEIGHTS}: {len(wrong)} tensor(s) do not fit the model, such as {name}: shape "
      f"{found.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
    )
  layers = {
    f"{name}_lora_{part.lower()}": np.stack(
      [np.float32(tensors[_peft_name(name, layer, part)].T) for layer in range(count)]
    )
    for name, part, _ in parts
  }
  return {"layers": layers}, rank, float(alpha)


# Fields of adapter_config.json that change what an adapter computes, and leave no tensor behind.
_NOT_PLAIN = ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "use_qalora", "use_bdlora",
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
