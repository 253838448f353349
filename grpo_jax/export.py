"""Exports a model as a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

python -m grpo_jax.export --workdir DIR --out HF_DIR                # the newest checkpoint of a run
python -m grpo_jax.export --config experiments/X.py --out HF_DIR    # its model, untrained
python -m grpo_jax.export ... --push OWNER/NAME                     # and upload it to the hub
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax import extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("train", "grpo_jax.export")

from ml_collections import ConfigDict

from grpo_jax import addresses, model_card, tasks
from grpo_jax import config as configs
from grpo_jax.errors import first_line
from grpo_jax.models import lora
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io.families import FAMILIES, find_family, parse
from grpo_jax.models.io.folders import new_folder
from grpo_jax.models.io.json_files import read_json, write_json
from grpo_jax.models.io.presets import config_of
from grpo_jax.models.io.sources import Source, resolve
from grpo_jax.models.io.writer import DTYPES, SHARD_BYTES, describe, write_weights
from grpo_jax.models.load import open_weights
from grpo_jax.models.quantized import quantized_weights
from grpo_jax.run import console, mirror, reading
from grpo_jax.run import workdir as workdirs
from grpo_jax.tokens import fit_to_model, load_tokenizer

# Files of a source folder that are copied: tokenizer, chat template, generation settings, licence.
COPIED = (
  "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
  "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields of the source's config.json that do not hold for the exported model.
_DROPPED = ("auto_map", "quantization_config", "torch_dtype")


def export_model(
  config: ModelConfig,
  params: Any,
  source: str,
  out: str | Path,
  dtype: str = "float32",
  *,
  shard_bytes: int = SHARD_BYTES,
  generation: Mapping[str, Any] | None = None,
  pad_id: int | None = None,
) -> list[str]:
  """Writes a folder with weights, config.json, tokenizer, chat template and generation settings.

  A classifier may come from a language model, `Weights.with_score`.

  Loading it gives the same parameters bit for bit in float32, and rounded once in the other dtypes.
  The folder appears at `out` only when it is complete.

  Args:
    config: of the model.
    params: of the decoder, layers stacked, adapters merged (`lora.merge`).
    source: origin of the model (see `models.io.sources`), from which the tokenizer is taken.
    out: the folder to write; must be missing or empty.
    dtype: of the weights, a key of DTYPES.
    shard_bytes: maximum size of a weights file in bytes.
    generation: fields of generation_config.json, beside the token ids of the source's; None keeps
      the source's file.
    pad_id: padding token of a classifier, which it is read before; None keeps the source's.

  Returns:
    The names of the files, sorted.

  Raises:
    FileExistsError: `out` is not an empty folder.
    ValueError: the parameters do not fit the config, or the dtype cannot hold their values.
  """
  out = Path(out).resolve()
  if dtype not in DTYPES:
    raise ValueError(f"dtype is {dtype!r}, known: {', '.join(DTYPES)}")
  origin = resolve(source)
  with new_folder(out) as partial:
    ids = _save_tokenizer(source, origin, partial, config.vocab_size)
    if generation is not None:
      _write_generation(partial / "generation_config.json", generation)
    raw = _config_json(config, origin, ids) | {"dtype": dtype}
    if pad_id is not None:
      raw["pad_token_id"] = pad_id
    write_json(partial / "config.json", raw)
    if parse(read_json(partial / "config.json"), str(out)) != config:
      raise ValueError(f"{config} is not the model of {source}")
    write_weights(config, params, partial, dtype, shard_bytes)
  return sorted(file.name for file in out.iterdir())


def _config_json(config: ModelConfig, origin: Source, ids: dict[str, Any]) -> dict[str, Any]:
  """Returns the source's own config.json if it describes this model alone, else a new one.

  Args:
    ids: token ids that a new one should name.
  """
  if origin.kind != "folder":
    return describe(config) | ids
  path = Path(origin.location) / "config.json"
  raw = read_json(path)
  family, is_classifier = find_family(raw, str(path))
  if FAMILIES[family].wraps:
    merged = {**raw.get("text_config", {}), **raw}
    return describe(config) | {name: merged[name] for name in _TOKEN_IDS if name in merged}
  raw = {name: value for name, value in raw.items() if name not in _DROPPED}
  if config.labels and not is_classifier:
    if FAMILIES[family].classifier is None:
      raise ValueError(
        f"{path}: transformers has no sequence classifier of the family {family}, so this model "
        "cannot be exported as one"
      )
    raw["architectures"] = [FAMILIES[family].classifier]
    raw["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.labels)}
    raw["label2id"] = {f"LABEL_{i}": i for i in range(config.labels)}
  return raw


def _save_tokenizer(source: str, origin: Source, folder: Path, rows: int) -> dict[str, Any]:
  """Writes the source's tokenizer; returns the token ids that a new config.json should name."""
  if origin.kind == "folder":
    for pattern in COPIED:
      for file in Path(origin.location).glob(pattern):
        shutil.copyfile(file, folder / file.name)
    return {}
  tokenizer = fit_to_model(load_tokenizer(source), rows)
  tokenizer.save(folder)
  ids = {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
  if tokenizer.bos_id is not None:
    ids["bos_token_id"] = tokenizer.bos_id
  write_json(folder / "generation_config.json", ids)
  return ids


def _write_generation(path: Path, fields: Mapping[str, Any]) -> None:
  """Writes generation settings in place of those in a file, of which the token ids stay."""
  before = read_json(path) if path.is_file() else {}
  write_json(path, {name: before[name] for name in _TOKEN_IDS if name in before} | dict(fields))


def generation_settings(c: ConfigDict, rows: int) -> dict[str, Any]:
  """Returns the fields of generation_config.json with which transformers samples as a run did.

  Temperature, ends and largest length are the run's, and no token is filtered out. The stop strings
  of the task are left out, with a warning, where the task cannot be built on this machine.

  Args:
    c: the config of the run.
    rows: ids of its model; those of the tokenizer beyond them are left out.
  """
  try:
    stops = tasks.make_task(c.task.name, **c.task.settings.to_dict()).stop
  except Exception as error:  # a user's task may raise anything
    stops = ()
    print(
      f"warning: task {c.task.name!r} cannot be built ({first_line(error)}): the exported settings "
      "do not have its stop strings",
      file=sys.stderr,
    )
  strings = list(dict.fromkeys((*stops, *c.rollout.stop)))
  tokenizer = fit_to_model(load_tokenizer(c.model.source), rows)
  ends = (*tokenizer.eos_ids, *c.rollout.stop_ids, *tokenizer.marker_ids(strings))
  return {
    "do_sample": True,
    "temperature": c.rollout.temperature,
    "top_k": 0,
    "top_p": 1.0,
    "max_new_tokens": c.rollout.completion_length,
    "eos_token_id": list(dict.fromkeys(ends)),
    "pad_token_id": tokenizer.pad_id,
    **({"stop_strings": strings} if strings else {}),
  }


# --- a run's checkpoints --------------------------------------------------------------------------


def read_trained(workdir: str | Path, step: int | None = None) -> tuple[int, Any]:
  """Reads the trained parameters of a checkpoint, on any number of devices.

  Reads neither optimizer state nor shardings, so any machine with enough memory will do.

  Args:
    workdir: the work directory of a run.
    step: of the checkpoint; None is the newest one without damage.

  Returns:
    (step, trained parameters or adapters as NumPy arrays).

  Raises:
    FileNotFoundError: there is no such checkpoint.
    ValueError: it is damaged; for None, all of them are.
  """
  return reading.read_params(workdir, step=step)


@console.guarded()
def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(prog="python -m grpo_jax.export", description=__doc__)
  parser.add_argument("--workdir", help="a work directory: its config, and one of its checkpoints")
  parser.add_argument("--config", help="an experiment file, for its model before training")
  parser.add_argument("--out", required=True, help="the folder to write; must be missing or empty")
  parser.add_argument(
    "--step", type=configs.at_least(0), help="step of the checkpoint; default: the newest"
  )
  parser.add_argument(
    "--dtype", default="float32", choices=list(DTYPES), help="dtype of the weights"
  )
  parser.add_argument("--push", metavar="OWNER/NAME", help="upload to this repository of the hub")
  parser.add_argument(
    "--public", action="store_true", help="with --push: a new repository is public, not private"
  )
  parser.add_argument(
    "--adapter",
    action="store_true",
    help="write only the adapters of a LoRA run, as `peft` loads them",
  )
  arguments, overrides = parser.parse_known_args(argv)
  try:
    with contextlib.ExitStack() as stack:
      files = _export(arguments, overrides, stack)
  except (ValueError, OSError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"wrote {arguments.out}: {', '.join(files)}")
  if arguments.push:
    try:
      print(f"uploaded: {model_card.push(arguments.out, arguments.push, public=arguments.public)}")
    except ValueError as error:
      print(f"error: {error}", file=sys.stderr)
      return 2
  return 0


def _export(
  arguments: argparse.Namespace, overrides: list[str], stack: contextlib.ExitStack
) -> list[str]:
  """Exports what the flags name; `stack` holds copies of a work directory on a store."""
  if (arguments.workdir is None) == (arguments.config is None):
    raise ValueError("give either --workdir (a run) or --config (an experiment)")
  arguments.out = addresses.local(arguments.out, "--out")
  if arguments.push:
    model_card.check_repository(arguments.push)
  if arguments.config:
    settings, trained = configs.load(arguments.config, overrides), None
  else:
    shown = arguments.workdir
    arguments.workdir = stack.enter_context(
      mirror.fetched(shown, mirror.top_level, checkpoints=True, step=arguments.step)
    )
    saved = workdirs.read_config(arguments.workdir)
    if saved is None:
      raise ValueError(f"{shown} holds no {workdirs.CONFIG}: not a work directory")
    where = arguments.workdir / workdirs.CONFIG
    settings = configs.override(configs.from_saved(saved, where), overrides)
    step, trained = read_trained(arguments.workdir, arguments.step)
    print(f"{shown} after {step} steps, trained from {settings.model.source}")
  source, rank, alpha = settings.model.source, settings.lora.rank, settings.lora.alpha
  if arguments.adapter:
    if trained is None or not rank:
      raise ValueError("--adapter is for the --workdir of a run with LoRA (lora.rank above 0)")
    lora.check_modules(config_of(source))
    lora.save_peft(trained, arguments.out, alpha=settings.lora.alpha, base_name=source)
    model_card.write_card(arguments.out, arguments.workdir, settings, step)
    return sorted(file.name for file in Path(arguments.out).iterdir())
  weights = open_weights(source, seed=settings.seed)
  generation = None if trained is None else generation_settings(settings, weights.config.vocab_size)
  if settings.lora.source and trained is None:
    trained, rank, alpha = lora.load_peft(settings.lora.source, weights.config)
  if trained is None:
    params = weights.read()
  elif rank:
    scheme = settings.lora.quantize
    base = weights if scheme == "none" else quantized_weights(weights, scheme)
    params = lora.merge(base.read(), trained, lora.scale(rank, alpha))
  else:
    params = {name: trained[name] for name in weights.shapes}  # without a critic's value head
  files = export_model(
    weights.config, params, source, arguments.out, arguments.dtype, generation=generation
  )
  if arguments.workdir:
    files += model_card.write_card(arguments.out, arguments.workdir, settings, step)
  return sorted(files)


if __name__ == "__main__":
  sys.exit(main())
