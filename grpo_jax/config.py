"""Configs: locked ml_collections trees, chosen by file and overridden field by field.

An experiment is a Python file with `get_config()`, which starts from `default_config()`. It is a
program and runs as one: load only files that you would run.
"""

import ast
import difflib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

ATTENTION = ("auto", "tiled", "splash", "cudnn")  # of model.attention


class ConfigError(ValueError):
  """Everything that is wrong with a config, one problem a line."""

  def __init__(self, problems: list[str]) -> None:
    self.problems = problems
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    super().__init__(f"the config has {count}:\n" + "\n".join(f"  - {p}" for p in problems))


def attempt(problems: list[str], make: Callable[[], Any]) -> Any:
  """`make()`; if it finds something wrong with what the config names, that goes to `problems`."""
  try:
    return make()
  except (ValueError, FileNotFoundError, ImportError) as error:
    problems.append(str(error))
    return None


def default_config() -> ConfigDict:
  """Every field with its unit; experiments override and `load` locks."""
  c = ConfigDict()
  c.seed = 0  # of data order, sampling and random weights
  c.steps = 100  # rollouts in the whole run; each is learned from in epochs x mini_batches updates

  c.model = ConfigDict()
  c.model.source = "random:tiny"  # folder, .gguf file, package:NAME, random:NAME or hub id
  c.model.dtype = "float32"  # of activations: float32 or bfloat16; weights stay float32
  c.model.remat = "dots"  # recompute in the backward pass: none, dots (all but products with
  # weights: half the memory of none at hardly more time) or layers (a third more work)

  c.model.attention = "auto"  # over whole rows: blocks (of queries; anywhere), splash (TPU), cudnn
  # (GPU, bfloat16, no softcap) or auto: the kernel of the platform for long rows, else blocks

  c.lora = ConfigDict()  # train low-rank adapters instead of the weights
  c.lora.rank = 0  # 0 = train all weights
  c.lora.alpha = 16.0  # adapters count alpha / rank times
  c.lora.targets = "q|k|v|o|gate|up|down"  # regular expression: matrices of a layer with adapters

  c.task = ConfigDict()
  c.task.name = "reasoning_gym"  # a key of grpo_jax.tasks.TASKS
  c.task.settings = ConfigDict()  # keyword arguments of that task

  c.rollout = ConfigDict()
  c.rollout.prompts_per_step = 8  # P, over all devices
  c.rollout.group_size = 8  # G, completions per prompt
  c.rollout.prompt_length = 0  # N, tokens; 0 = the longest prompt of the task
  c.rollout.completion_length = 64  # T, tokens, the ending token included
  c.rollout.temperature = 1.0  # used for sampling and for scoring alike
  c.rollout.overlong = "error"  # a prompt of more than prompt_length tokens: error or drop
  c.rollout.stop = ()  # strings that end a completion, besides the task's own
  c.rollout.stop_ids = ()  # token ids that end a completion, besides the tokenizer's
  c.rollout.max_resamples = 0  # dynamic sampling: draws that replace prompts without a signal
  c.rollout.mask_truncated = False  # leave completions that ran into the budget out of the loss

  c.rewards = ConfigDict()
  c.rewards.workers = 1  # processes that reward functions run in; 0 = in this one, unguarded
  c.rewards.timeout = 30.0  # seconds for a completion; one that takes longer has no reward

  c.reward_model = ConfigDict()  # a learned reward, added to the task's
  c.reward_model.source = ""  # a sequence-classification model, named like model.source
  c.reward_model.weight = 1.0

  c.reference = ConfigDict()  # what the KL term holds the policy close to: the model at the start
  c.reference.sync_every = 0  # steps after which it moves to the policy; 0 = it never does
  c.reference.sync_share = 1.0  # share of the policy in the new reference; 1 = a copy

  c.algorithm = ConfigDict()
  c.algorithm.name = "grpo"  # a row of grpo_jax.ALGORITHMS; fields left None keep its values
  c.algorithm.advantage = placeholder(str)  # group_normalized, group_centered, ...
  c.algorithm.ratio = placeholder(str)  # token, sequence or sequence_token
  c.algorithm.trust_region = placeholder(str)  # none, clip, dual_clip, cispo, sapo, dppo_tv
  c.algorithm.average = placeholder(str)  # sequence, token or constant
  c.algorithm.kl = placeholder(str)  # none, k1, k2, k3, ...
  c.algorithm.beta = placeholder(float)  # coefficient of the KL term
  c.algorithm.clip_low = placeholder(float)  # ratios are held in [1 - clip_low, 1 + clip_high]
  c.algorithm.clip_high = placeholder(float)
  c.algorithm.clip_dual = placeholder(float)  # largest ratio that counts against an answer
  c.algorithm.ratio_min = placeholder(float)  # absolute bounds of the ratio
  c.algorithm.ratio_max = placeholder(float)
  c.algorithm.correction = placeholder(str)  # for a sampler that is not the trainer: none, ...
  c.algorithm.correction_min = placeholder(float)  # bounds of the trainer/sampler ratio
  c.algorithm.correction_max = placeholder(float)

  c.optimizer = ConfigDict()
  c.optimizer.learning_rate = 1e-6  # the peak
  c.optimizer.schedule = "constant"  # constant, linear or cosine, after the warm-up
  c.optimizer.warmup_steps = 0  # updates
  c.optimizer.final_fraction = 0.0  # share of the peak left at the last step
  c.optimizer.beta1 = 0.9
  c.optimizer.beta2 = 0.99
  c.optimizer.eps = 1e-8
  c.optimizer.weight_decay = 0.0
  c.optimizer.clip_norm = 1.0  # global gradient norm; 0 = not clipped

  c.train = ConfigDict()
  c.train.epochs = 1  # times that each rollout is gone through
  c.train.mini_batches = 1  # updates each time, on equal parts of the prompts in a new order
  c.train.micro_batches = 1  # parts that an update is computed in; changes memory only
  c.train.micro_batch_tokens = 0  # more parts, until a device has no more tokens at once; 0 = any
  c.train.reduction = "fast"  # ordered: the same bits on any number of devices; see ordered.py
  c.train.chunks = 8  # with ordered: equal parts of an update, whatever the devices
  c.train.max_skipped = 5  # NaN or infinite updates skipped in a row, after which the run stops
  c.train.spike = 0.0  # skip gradients of more than so many times the usual norm; 0 = never

  c.mesh = ConfigDict()  # devices along each axis; one of them may be -1, the rest
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1

  c.hosts = ConfigDict()  # where a run is on several; how they find each other: distributed.py
  c.hosts.heartbeat = 30  # seconds of silence after which a host counts as dead
  c.hosts.wait = 1800.0  # seconds that a host waits for the others at one place

  c.eval = ConfigDict()
  c.eval.every = 0  # steps; 0 = only before the first step and after the last
  c.eval.batch_prompts = 50  # prompts generated for at once
  c.eval.samples = 0  # completions per problem for pass@k; 0 = greedy accuracy only

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 50  # steps; the last step is always saved
  c.checkpoint.keep = 2  # newest checkpoints to keep

  c.compilation_cache = "auto"  # beside the work directory; or a folder, or off

  c.log = ConfigDict()
  c.log.samples = 3  # completions shown at a time
  c.log.samples_every = 10  # steps; 0 = never
  return c.lock()


def load(path: str, overrides: list[str] | None = None) -> ConfigDict:
  """The config of the experiment file `path` with `--config.a.b=value` overrides applied.

  Raises ConfigError with all overrides that name no field or have the wrong type.
  """
  return override(_get_config(path), overrides or [])


def override(config: ConfigDict, overrides: list[str]) -> ConfigDict:
  """`config` with `--config.a.b=value` overrides applied, locked; see `load`."""
  problems = []
  for text in overrides:
    try:
      _apply(config, text)
    except ValueError as error:
      problems.append(str(error))
  if problems:
    raise ConfigError(problems)
  return config.lock()


def from_saved(saved: dict[str, Any]) -> ConfigDict:
  """The config that was written as JSON; fields that are newer than it have their defaults."""
  config = default_config()
  with config.unlocked(), config.ignore_type():
    config.update(saved)
  return config


def check(config: ConfigDict, device_count: int) -> list[str]:
  """What is wrong with the numbers of a config, all of it; an empty list if nothing is."""
  c, problems = config, []

  def need(holds: bool, name: str, allowed: str) -> None:
    if not holds:
      value = c
      for part in name.split("."):
        value = value[part]
      problems.append(f"{name} is {value!r}, it must be {allowed}")

  for name in ("steps", "rollout.prompts_per_step", "rollout.completion_length"):
    need(_get(c, name) >= 1, name, "at least 1")
  need(c.rollout.group_size >= 2, "rollout.group_size", "at least 2: a group of one has no spread")
  need(c.rollout.temperature > 0, "rollout.temperature", "above 0 (evaluation is always greedy)")
  need(c.rollout.prompt_length >= 0, "rollout.prompt_length", "at least 0 tokens")
  need(c.rollout.overlong in ("error", "drop"), "rollout.overlong", "'error' or 'drop'")
  need(c.model.dtype in ("float32", "bfloat16"), "model.dtype", "'float32' or 'bfloat16'")
  need(c.model.remat in ("none", "dots", "layers"), "model.remat", "'none', 'dots' or 'layers'")
  need(c.model.attention in ATTENTION, "model.attention", _one_of(ATTENTION))
  need(c.optimizer.learning_rate > 0, "optimizer.learning_rate", "above 0")
  need(c.optimizer.warmup_steps >= 0, "optimizer.warmup_steps", "at least 0")
  need(0 <= c.optimizer.final_fraction <= 1, "optimizer.final_fraction", "between 0 and 1")
  need(0 <= c.optimizer.beta1 < 1, "optimizer.beta1", "in [0, 1)")
  need(0 <= c.optimizer.beta2 < 1, "optimizer.beta2", "in [0, 1)")
  for name in ("eps", "weight_decay", "clip_norm"):
    need(c.optimizer[name] >= 0, f"optimizer.{name}", "at least 0")
  need(c.optimizer.schedule in ("constant", "linear", "cosine"), "optimizer.schedule",
       "'constant', 'linear' or 'cosine'")  # fmt: skip
  for name in ("eval.every", "eval.samples", "log.samples", "log.samples_every"):
    need(_get(c, name) >= 0, name, "at least 0")
  for name in ("eval.batch_prompts", "checkpoint.every", "checkpoint.keep",
               "train.micro_batches", "train.mini_batches", "train.epochs",
               "train.max_skipped", "train.chunks"):  # fmt: skip
    need(_get(c, name) >= 1, name, "at least 1")
  for name in ("rollout.max_resamples", "rewards.workers", "reference.sync_every", "lora.rank",
               "train.micro_batch_tokens"):  # fmt: skip
    need(_get(c, name) >= 0, name, "at least 0")
  need(
    c.train.reduction in ("fast", "deterministic"), "train.reduction", "'fast' or 'deterministic'"
  )
  need(c.train.spike == 0 or c.train.spike > 1, "train.spike", "0 (off) or above 1")
  need(c.hosts.heartbeat >= 1, "hosts.heartbeat", "at least 1 second")
  need(c.hosts.wait > 0, "hosts.wait", "above 0 seconds")
  need(c.rewards.timeout > 0, "rewards.timeout", "above 0 seconds")
  need(c.lora.alpha > 0, "lora.alpha", "above 0")
  need(0 < c.reference.sync_share <= 1, "reference.sync_share", "above 0 and at most 1")
  return problems + _check_division(c, device_count)


def _one_of(names: tuple[str, ...]) -> str:
  *most, last = map(repr, names)
  return f"{', '.join(most)} or {last}"


def _check_division(c: ConfigDict, device_count: int) -> list[str]:
  """The mesh against the devices, and the batch against the mesh and the micro-batches."""
  try:
    data, fsdp, tensor = mesh_shape(c.mesh, device_count)
  except ValueError as error:
    return [str(error)]
  if c.train.reduction == "deterministic":
    return _check_chunks(c, data * fsdp, tensor)
  parts = max(c.train.micro_batches, 1) * max(c.train.mini_batches, 1)
  unit = data * fsdp * parts
  if c.rollout.prompts_per_step % unit:
    return [
      f"rollout.prompts_per_step is {c.rollout.prompts_per_step}, it must be a multiple of {unit}: "
      f"train.mini_batches={c.train.mini_batches} x train.micro_batches={c.train.micro_batches} "
      f"parts over mesh data={data} x fsdp={fsdp}"
    ]
  return []


def _check_chunks(c: ConfigDict, width: int, tensor: int) -> list[str]:
  """What `train.reduction='deterministic'` asks of the rest."""
  chunks, problems = max(c.train.chunks, 1), []
  if chunks % width:
    problems.append(
      f"train.chunks is {chunks}, it must be a multiple of the {width} devices that "
      "train.reduction='deterministic' deals them out to (mesh data x fsdp)"
    )
  if tensor != 1:
    problems.append(f"mesh.tensor is {tensor}, it must be 1 with train.reduction='deterministic'")
  for name, off in (("micro_batches", 1), ("micro_batch_tokens", 0)):
    if c.train[name] != off:
      problems.append(
        f"train.{name} is {c.train[name]}, it must be {off} with train.reduction='deterministic': "
        "train.chunks takes its place"
      )
  if c.model.remat != "none":
    problems.append(
      f"model.remat is {c.model.remat!r}, it must be 'none' with train.reduction='deterministic': layers "
      "that are computed again come out with other bits"
    )
  if c.model.attention not in ("auto", "tiled"):
    problems.append(
      f"model.attention is {c.model.attention!r}, it must be 'auto' or 'tiled' with "
      "train.reduction='deterministic'"
    )
  unit = chunks * max(c.train.mini_batches, 1)
  if c.rollout.prompts_per_step % unit:
    problems.append(
      f"rollout.prompts_per_step is {c.rollout.prompts_per_step}, it must be a multiple of {unit}: "
      f"train.chunks={chunks} in each of train.mini_batches={c.train.mini_batches}"
    )
  return problems


def mesh_shape(mesh: ConfigDict, device_count: int) -> tuple[int, int, int]:
  """(data, fsdp, tensor) with a -1 resolved; ValueError if they do not use every device."""
  sizes = [mesh.data, mesh.fsdp, mesh.tensor]
  shown = f"mesh is data={mesh.data}, fsdp={mesh.fsdp}, tensor={mesh.tensor}"
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"{shown}: sizes must be at least 1, and one of them may be -1")
  known = 1
  for size in sizes:
    known *= size if size != -1 else 1
  if device_count % known or (-1 not in sizes and known != device_count):
    raise ValueError(f"{shown}: that does not divide the {device_count} device(s) there are")
  return tuple(device_count // known if size == -1 else size for size in sizes)


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
  """Fields that two config dicts disagree in, as `name: old -> new`."""
  found = []
  for name in sorted(set(old) | set(new)):
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      found += differences(a, b, f"{prefix}{name}.")
    elif a != b:
      found.append(f"{prefix}{name}: {a!r} -> {b!r}")
  return found


def _get(config: ConfigDict, name: str) -> Any:
  for part in name.split("."):
    config = config[part]
  return config


def _get_config(path: str) -> ConfigDict:
  file = Path(path)
  if not file.is_file():
    folder = file.parent if file.parent.is_dir() else Path("experiments")
    known = sorted(str(f) for f in folder.glob("*.py"))
    raise ConfigError([f"no config file {path!r}; there are: {', '.join(known) or 'none'}"])
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except (AttributeError, KeyError, TypeError, SyntaxError, ImportError) as error:
    # ml_collections names the misspelt field and the nearest real one.
    raise ConfigError([f"{path}: {type(error).__name__}: {error}"]) from error
  if not isinstance(config, ConfigDict):
    raise ConfigError([f"{path}: get_config() returned {type(config).__name__}, not a ConfigDict"])
  return config


def _apply(config: ConfigDict, override: str) -> None:
  """Sets one field from `--config.a.b=value`."""
  name, equals, text = override.removeprefix("--config.").partition("=")
  if not override.startswith("--config.") or not equals:
    raise ValueError(f"{override!r} is no override; write --config.field.name=value")
  *parents, last = name.split(".")
  if parents == ["task", "settings"] and last not in config.task.settings:
    # Which settings there are is for the task to say, and it refuses the ones it does not know.
    with config.unlocked():
      config.task.settings[last] = _parse(text, None, object)
    return
  node = config
  for i, part in enumerate([*parents, last]):
    if not isinstance(node, ConfigDict) or part not in node:
      known = sorted(node.keys()) if isinstance(node, ConfigDict) else []
      close = difflib.get_close_matches(part, known, n=1)
      hint = f"did you mean {close[0]!r}? " if close else ""
      where = ".".join([*parents, last][:i]) or "the config"
      raise ValueError(f"no field {name!r}: {hint}{where} has: {', '.join(known) or 'no fields'}")
    if i < len(parents):
      node = node[part]
  if isinstance(node[last], ConfigDict):
    raise ValueError(f"{name} is a group of fields: {', '.join(sorted(node[last].keys()))}")
  value = _parse(text, node[last], node.get_type(last))
  try:
    node[last] = value
  except TypeError as error:
    raise ValueError(f"{name}={text!r}: expected {node.get_type(last).__name__}: {error}") from None


def _parse(text: str, current: Any, kind: type) -> Any:
  """`text` as the type of the field; ValueError where it cannot be."""
  if kind is str:
    return text
  try:
    value = ast.literal_eval(
      {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    )
  except (ValueError, SyntaxError):
    value = text
  if kind is tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if kind is bool and not isinstance(value, bool):
    raise ValueError(f"{text!r} is not a bool; write true or false")
  if (
    kind in (int, float)
    and (not isinstance(value, kind) or isinstance(value, bool))
    and not (value is None and current is None)
  ):
    raise ValueError(f"{text!r} is not of type {kind.__name__}")
  return value
