"""Trains a reward model: batches of pairs, the evaluation on held-out pairs, the loop, the export.

A work directory is continued like that of `grpo_jax.train`.
"""

import contextlib
import dataclasses
import datetime
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import grpo_jax
from grpo_jax import config as configs
from grpo_jax import data
from grpo_jax.build import make_model, matmul_precision, optimizer_of
from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
from grpo_jax.evaluate import Evaluation, standard_error
from grpo_jax.export import export_model
from grpo_jax.learning.batch import sizes
from grpo_jax.learning.preferences import Pairs, make_preference_step, make_rewards
from grpo_jax.learning.skipping import SKIPPED
from grpo_jax.learning.step import TrainState
from grpo_jax.learning.updates import SkippedError
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io import writer
from grpo_jax.models.io.sources import resolve
from grpo_jax.models.io.weights import Weights
from grpo_jax.models.load import open_weights
from grpo_jax.reward_model.pairs import Pair, PairData, PairReader, read_pairs
from grpo_jax.reward_model.scoring import read_pad_id
from grpo_jax.run import console, identity, mirror, reading, record
from grpo_jax.run import workdir as workdirs
from grpo_jax.run.output import Output
from grpo_jax.run.signals import Signals
from grpo_jax.tokens import fit_to_model, load_tokenizer

SETTINGS = "reward_model.json"  # of a work directory
MODEL = "model"  # its folder with the trained model
# Fields of the config that the command reads; and those that a continued run may change.
READ = (
  "seed", "epochs", "model.dtype", "model.matmul_precision", "model.remat", "model.attention",
  "chat.date", "optimizer.", "train.micro_batches", "train.spike", "train.max_skipped", "mesh.",
  "hosts.", "eval.every", "checkpoint.", "compilation_cache",
)  # fmt: skip
FREE = (
  "model.remat", "train.micro_batches", "train.max_skipped", "mesh.", "hosts.", "eval.every",
  "checkpoint.", "compilation_cache",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
  """Holds what is asked for; lengths are in tokens.

  Attributes:
    model: source of a language model, or of a classifier with one label.
    data: source of the pairs, as in `read_pairs`.
    pairs_per_step: pairs of an update, over all devices.
    center: coefficient of the centering term of `preference_loss`.
    max_length: longest text; 0 is the context of the model.
    drop: leave out pairs of equal texts, and those that are too long.
    key: path of the column that identifies a prompt; None: the prompt.
    source: the settings of `read_pairs` that are not None.
    dtype: of the saved weights.
  """

  model: str
  data: list[str]
  pairs_per_step: int = 32
  center: float = 0.0
  max_length: int = 0
  drop: bool = False
  key: str | None = None
  source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  dtype: str = "float32"


def default_config() -> ConfigDict:
  """Returns the config of the other commands, with one pass at a linear decay from 1e-5."""
  c = configs.default_config().unlock()
  c.epochs = 1.0
  c.optimizer.learning_rate = 1e-5
  c.optimizer.schedule = "linear"
  return c.lock()


def with_overrides(overrides: Sequence[str]) -> ConfigDict:
  """Returns the config with `--config.a.b=value` applied.

  Raises:
    ConfigError: a value is wrong, or names a field that this command does not read.
  """
  names = [text.removeprefix("--config.").partition("=")[0] for text in overrides]
  unread = [name for name in names if not _is_one_of(name, READ)]
  if problems := [
    f"{name} is not read here; fields that are: {', '.join(READ)}"
    for text, name in zip(overrides, names)
    if name in unread and text.startswith("--config.")
  ]:
    raise configs.ConfigError(problems)
  return configs.override(default_config(), list(overrides))


def _is_one_of(name: str, fields: Sequence[str]) -> bool:
  return any(name == field or (field[-1] == "." and name.startswith(field)) for field in fields)


@dataclasses.dataclass(frozen=True)
class RewardRun:
  """Holds everything that the settings describe, before any step.

  Attributes:
    settings, config: what was asked for; `config.steps` follows from `epochs`.
    weights: the model before training, with one output.
    pad_id: its padding token.
    pairs: the data.
  """

  settings: Settings
  config: ConfigDict
  mesh: Mesh
  model: Decoder
  weights: Weights
  pad_id: int
  pairs: PairData
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation

  @cached_property
  def lengths(self) -> tuple[int, int]:
    """Padded lengths (N, T) of the longest beginning and of the longest rest of all pairs."""
    pairs = [pair for split in self.pairs.splits.values() for pair in split]
    longest = max(len(rest) for pair in pairs for rest in pair.rests)
    return max(1, *(len(pair.prefix) for pair in pairs)), longest + 1

  def initial_state(self) -> TrainState:
    """Returns the parameters and a new optimizer state, laid out by the sharding table.

    Raises:
      ConfigError: the files hold NaN or infinity.
    """
    try:
      params = self.weights.read(meshes.param_shardings(self.mesh, self.weights.shapes))
    except ValueError as error:
      raise configs.ConfigError([f"model {self.settings.model!r}: {error}"]) from error
    return TrainState.create(params, self.optimizer, copy=False)

  def examples(self, step: int) -> list[Pair]:
    """Returns the pairs of a step, over all hosts."""
    c = self.config
    return data.examples(self.pairs.splits["train"], step, self.settings.pairs_per_step, c.seed)

  def batch(self, pairs: Sequence[Pair]) -> Pairs:
    """Returns pairs as arrays on the devices, padded to `pairs_per_step` with empty ones."""
    arrays = make_batch(pairs, self.settings.pairs_per_step, self.lengths)
    index, count = hosts.own_shard()
    rows = len(arrays.weights) // count
    own = jax.tree.map(lambda a: a[index * rows : (index + 1) * rows], arrays)
    return hosts.to_global(own, meshes.batch_sharding(self.mesh))

  def evaluate(self, params: Any) -> dict[str, float]:
    """Returns accuracy, margin and loss on the held-out pairs, with standard errors over pairs."""
    held_out, size = self.pairs.splits["eval"], self.settings.pairs_per_step
    parts = []
    for start in range(0, len(held_out), size):
      pairs = held_out[start : start + size]
      rewards = jax.device_get(self._rewards(params, self.batch(pairs)))[: len(pairs)]
      parts.append(np.column_stack([rewards, [pair.margin for pair in pairs]]))
    return metrics_of(np.concatenate(parts)) if parts else {}

  @cached_property
  def _rewards(self) -> Any:
    return make_rewards(self.model, out_sharding=meshes.replicated(self.mesh))

  def evaluates_at(self, step: int) -> bool:
    """Returns whether the model is evaluated before this step."""
    every = self.config.eval.every
    return step == 0 or bool(every and step % every == 0)

  def saves_at(self, steps: int) -> bool:
    """Returns whether the state after so many steps is saved."""
    every = self.config.checkpoint.every
    return (every > 0 and steps % every == 0) or steps == self.config.steps


def make_batch(pairs: Sequence[Pair], count: int, lengths: tuple[int, int]) -> Pairs:
  """Returns pairs as NumPy arrays: `count` rows, of which those beyond the pairs are empty.

  Args:
    lengths: lengths N and T of the longest beginning and the longest rest of all batches. Those of
      this batch are among few halvings of them, so that few programs are compiled.
  """
  longest = (
    max(len(pair.prefix) for pair in pairs),
    max(len(rest) for pair in pairs for rest in pair.rests) + 1,
  )
  n, t = (min(s for s in sizes(full) if s >= least) for full, least in zip(lengths, longest))
  prompts, prompt_mask = np.zeros((count, n), np.int32), np.zeros((count, n), bool)
  completions, text_lengths = np.zeros((count, 2, t), np.int32), np.zeros((count, 2), np.int32)
  margins, weights = np.zeros((2, count), np.float32)
  for row, pair in enumerate(pairs):
    start = n - len(pair.prefix)
    prompts[row, start:], prompt_mask[row, start:] = pair.prefix, True
    for side, rest in enumerate(pair.rests):
      completions[row, side, : len(rest)], text_lengths[row, side] = rest, len(rest)
    margins[row], weights[row] = pair.margin, 1 / len(pairs)
  return Pairs(prompts, prompt_mask, completions, text_lengths, margins, weights)


def metrics_of(rows: np.ndarray) -> dict[str, float]:
  """Returns the metrics of rows (reward of the chosen text, of the rejected one, margin).

  Example:
    >>> metrics = metrics_of(np.array([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]]))
    >>> metrics["eval/accuracy"], metrics["eval/accuracy_se"], metrics["eval/margin"]
    (0.75, 0.25, 1.0)
  """
  difference = (rows[:, 0] - rows[:, 1]).astype(np.float64)
  values = {
    "eval/accuracy": (np.sign(difference) + 1) / 2,
    "eval/margin": difference,
    "eval/loss": np.logaddexp(0.0, rows[:, 2] - difference),
  }
  metrics = {"eval/n": float(len(rows))}
  for name, value in values.items():
    metrics |= {name: float(value.mean()), f"{name}_se": standard_error(value)}
  return metrics


# --- building -------------------------------------------------------------------------------------


def build(settings: Settings, config: ConfigDict) -> RewardRun:
  """Opens and checks everything that the settings name; nothing compiles.

  Raises:
    ConfigError: lists all problems.
  """
  s = settings
  c = config.copy_and_resolve_references()
  # One prompt of a batch is a pair.
  c.model.source, c.rollout.prompts_per_step = s.model, s.pairs_per_step
  problems = configs.check(c, jax.device_count())
  for field in ("--config.rollout.prompts_per_step", "rollout.prompts_per_step"):
    problems = [problem.replace(field, "--pairs-per-step") for problem in problems]
  if c.epochs <= 0:
    problems.append(f"epochs is {c.epochs}, it must be above 0")
  if not np.isfinite(s.center) or s.center < 0:
    problems.append(f"--center is {s.center}, it must be a finite number of at least 0")
  weights = configs.attempt(problems, lambda: _open_model(s.model, c.seed), f"model {s.model!r}")
  if weights is None or problems:
    raise configs.ConfigError(problems)
  context = weights.config.context
  if s.max_length > context:
    problems.append(
      f"--max-length is {s.max_length}, and {s.model} has a context of {context} tokens"
    )
  reader = configs.attempt(problems, lambda: _reader_of(s, c, weights), f"tokenizer of {s.model!r}")
  pairs = reader and configs.attempt(
    problems,
    lambda: read_pairs(
      reader, s.data if len(s.data) > 1 else s.data[0], drop=s.drop, seed=c.seed, **s.source
    ),
    "the data",
  )
  if problems:
    raise configs.ConfigError(problems)
  steps = data.steps_of(c.epochs, len(pairs.splits["train"]), s.pairs_per_step)
  c = configs.with_steps(c, steps)
  shape = configs.mesh_shape(c.mesh, jax.device_count())
  mesh = meshes.make_mesh(shape, slices=c.mesh.slices)
  configs.attempt(problems, lambda: hosts.check_mesh(mesh))
  model = configs.attempt(problems, lambda: make_model(c, weights.config, mesh))
  if problems:
    raise configs.ConfigError(problems)
  schedule, optimizer = optimizer_of(c, c.optimizer.learning_rate)
  return RewardRun(s, c, mesh, model, weights, reader.pad_id, pairs, schedule, optimizer)


def _open_model(source: str, seed: int) -> Weights:
  """Opens the model; ValueError if the trained classifier could not be written."""
  weights = open_weights(source, seed=seed).with_score()
  writer.describe(weights.config)
  return weights


def _reader_of(s: Settings, c: ConfigDict, weights: Weights) -> PairReader:
  tokenizer = fit_to_model(
    load_tokenizer(s.model, date=c.chat.date or None), weights.config.vocab_size
  )
  return PairReader(
    tokenizer, pad_id_of(s.model, tokenizer.pad_id), s.max_length or weights.config.context, s.key
  )


def pad_id_of(source: str, tokenizer_pad_id: int) -> int:
  """Returns the padding token of a reward model that is trained from a source.

  That of a classifier stays. A language model gets the one that its tokenizer pads with.
  """
  resolved = resolve(source)
  if resolved.kind != "folder" or not open_weights(source).config.labels:
    return tokenizer_pad_id
  pad_id = read_pad_id(Path(resolved.location) / "config.json")
  return tokenizer_pad_id if pad_id is None else pad_id


def with_chat_date(config: ConfigDict, workdir: Path) -> ConfigDict:
  """Returns the config with a day for chat templates: its own, the work directory's, or today."""
  if config.chat.date:
    return config
  saved = read_settings(workdir) or {}
  date, *_ = hosts.gathered_json(
    [saved.get("config", {}).get("chat.date") or datetime.date.today().isoformat()]
  )
  config = config.copy_and_resolve_references()
  config.chat.date = date
  return config.lock()


# --- training -------------------------------------------------------------------------------------


def train(run: RewardRun, workdir: str | Path | mirror.Place) -> dict[str, float]:
  """Trains to the last step, from the newest checkpoint if there is one, and writes the model.

  Leaves metrics.jsonl, TensorBoard events, curve.png, checkpoints/, reward_model.json and model/, a
  Hugging Face folder.

  Returns:
    The metrics of the last evaluation; empty without held-out pairs.

  Raises:
    ConfigError: the work directory was started with other settings or data.
    WorkdirError: another run uses the work directory, or its files are damaged.
    Stopped: after a Ctrl-C or SIGTERM, with the finished steps saved.
    SkippedError: after too many skipped updates, with the finished steps saved.
    SaveError, NotFiniteError: as in `grpo_jax.train`.
  """
  c = run.config
  with contextlib.ExitStack() as stack:
    place = stack.enter_context(mirror.opened(workdir))
    workdir = place.folder
    if hosts.is_first():
      stack.enter_context(workdirs.lock(workdir))
      check_workdir(run, workdir)
      console.keep(workdir / console.LOG)
      stack.enter_context(record.session(workdir, grpo_jax.__version__))
    hosts.same("the settings", json.dumps(saved_settings(run), sort_keys=True))
    saves = {"keep": c.checkpoint.keep, "save_seconds": c.checkpoint.seconds}
    saves |= {"mirror": place.mirror}
    with Output(workdir, steps=c.steps, **saves) as out, matmul_precision(c):
      start, state = out.resume(run.initial_state(), run.evaluates_at)
      out.print(describe(run, start))
      state = _steps(run, out, start, state)
      results = out.evaluation_at(c.steps)
      if not results and run.pairs.splits["eval"]:
        results = run.evaluate(state.params)
        out.write_evaluation(c.steps, Evaluation(results, []))
      out.save(c.steps, state)
      out.draw_curve()
    write_model(run, place)
  return results


def _steps(run: RewardRun, out: Output, start: int, state: TrainState) -> TrainState:
  """Runs the steps from `start` on and returns the last state."""
  c, skipped = run.config, 0
  update = make_preference_step(
    run.model, run.optimizer, run.schedule, center=run.settings.center,
    micro_batches=c.train.micro_batches, spike=c.train.spike,
  )  # fmt: skip
  with Signals() as signals:
    for step in range(start, c.steps):
      if run.evaluates_at(step):
        out.write_evaluation(step, Evaluation(run.evaluate(state.params), []))
      out.start_step()
      pairs = run.examples(step)
      state, metrics = jax.block_until_ready(update(state, run.batch(pairs)))  # for its time
      out.write_step(step, metrics, [], sum(pair.tokens for pair in pairs))
      skipped = skipped + 1 if jax.device_get(metrics[SKIPPED]) else 0
      stop = signals.of_any_host(step)
      if stop or skipped >= c.train.max_skipped or run.saves_at(step + 1) or out.is_save_due():
        out.save(step + 1, state)
      out.check()
      if skipped >= c.train.max_skipped:
        raise SkippedError(
          f"{skipped} updates in a row were skipped: their loss or gradient is not finite, or a "
          f"spike. Lower optimizer.learning_rate; step {step + 1} is saved"
        )
      signals.check(step + 1, stop)
  return state


def write_model(run: RewardRun, place: mirror.Place) -> None:
  """Writes the parameters of the newest checkpoint as a Hugging Face folder; all hosts call it."""
  workdir = place.folder
  with hosts.together("writing the model"):
    if hosts.is_first() and (place.mirror or not (workdir / MODEL).exists()):
      if place.mirror:
        # The upload of an earlier one may have been cut off.
        shutil.rmtree(workdir / MODEL, ignore_errors=True)
        place.mirror.fetch_newest()  # several hosts have only their own shards
      _, params = reading.read_params(workdir)
      s = run.settings
      export_model(run.weights.config, params, s.model, workdir / MODEL, s.dtype, pad_id=run.pad_id)


def describe(run: RewardRun, start: int) -> str:
  """Returns what a run will do, as lines of text."""
  s, c, splits = run.settings, run.config, run.pairs.splits
  lines = [
    f"reward model from {s.model}: {c.steps} steps of {s.pairs_per_step} pairs, from step {start}",
    f"{len(splits['train'])} pairs to train on, {len(splits['eval'])} held out; mesh "
    f"{dict(run.mesh.shape)}",
  ]
  if dropped := run.pairs.left_out:
    lines.append(f"warning: {len(dropped)} pairs are left out; the first: {dropped[0]}")
  return "\n".join(lines)


# --- the settings of a work directory -------------------------------------------------------------


def saved_settings(run: RewardRun) -> dict[str, Any]:
  """Returns the settings and the fields of the config that count, as JSON holds them."""
  config: dict[str, Any] = {}
  _collect(configs.to_saved(run.config), "", config)
  settings = dataclasses.asdict(run.settings) | {"source": dict(run.settings.source)}
  return {**settings, "config": config}


def _collect(fields: Mapping[str, Any], prefix: str, into: dict[str, Any]) -> None:
  for name, value in fields.items():
    if isinstance(value, dict):
      _collect(value, f"{prefix}{name}.", into)
    elif _is_one_of(f"{prefix}{name}", READ):
      into[f"{prefix}{name}"] = value


def read_settings(workdir: Path) -> dict[str, Any] | None:
  """Reads the settings that a work directory was started with; None if there are none.

  Raises:
    WorkdirError: the file is damaged.
  """
  path = workdir / SETTINGS
  if not path.is_file():
    return None
  try:
    saved = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
      raise ValueError("it does not hold settings")
    return saved
  except (ValueError, RecursionError) as error:
    raise workdirs.WorkdirError(f"{path} is damaged ({error}); put back a copy of it") from error


def check_workdir(run: RewardRun, workdir: Path) -> None:
  """Refuses a work directory of other settings or data; writes those of a new one.

  Raises:
    ConfigError: lists the differences.
    WorkdirError: the directory belongs to another command, or its settings are damaged.
  """
  saved, now = read_settings(workdir), saved_settings(run)
  files = identity.digests(run.pairs.files, {})
  if (workdir / workdirs.CONFIG).exists():
    raise workdirs.WorkdirError(f"{workdir} is the work directory of a run of grpo_jax.train")
  if saved is None:
    text = json.dumps(now, indent=2, sort_keys=True) + "\n"
    workdirs.write_whole(workdir / SETTINGS, text)
    identity.write(workdir, files)
    return
  lines = configs.differences(saved, json.loads(json.dumps(now)))
  problems = [
    line for line in lines if not _is_one_of(line.partition(":")[0].removeprefix("config."), FREE)
  ]
  problems += [
    f"{name} has changed" for name in identity.changed(identity.read(workdir) or {}, files)
  ]
  if problems:
    raise configs.ConfigError(
      [f"{workdir} was started with other settings or data; use a new --workdir, or put back {p}"
       for p in problems]
    )  # fmt: skip
