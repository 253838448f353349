"""All updates that one rollout gives, and what is done about those that go wrong."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax.build import Run
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning import batch as batches
from grpo_jax.learning import deterministic, reduction
from grpo_jax.learning.skipping import SKIPPED
from grpo_jax.learning.step import (
  Batch,
  TrainState,
  average,
  make_gradient,
  make_loss,
  make_score,
  make_train_step,
  move_reference,
)
from grpo_jax.run import skipped as dumps


def make_update(c: ConfigDict, r: Run) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """The jitted update of a run, `(state, batch, base_params) -> (state, metrics)`."""

  def make(micro_batches: int) -> Callable:
    return make_train_step(
      r.model,
      r.algorithm,
      r.optimizer,
      r.schedule,
      temperature=c.rollout.temperature,
      micro_batches=micro_batches,
      spike=c.train.spike,
      with_adapters=r.with_adapters,
      chunks=r.chunks,
    )

  return _within_budget(c, r, make)


def make_gradients(c: ConfigDict, r: Run) -> Callable[..., tuple]:
  """The jitted gradient of a run's update alone, `(params, batch, base_params) -> (gradients, ...)`."""
  loss = make_loss(
    r.model, r.algorithm, temperature=c.rollout.temperature, with_adapters=r.with_adapters
  )
  if r.chunks:
    return deterministic.make_gradient(loss, r.chunks)
  return _within_budget(c, r, lambda micro_batches: jax.jit(make_gradient(loss, micro_batches)))


def make_scoring(c: ConfigDict, r: Run) -> Callable[..., jax.Array]:
  """The jitted log-probs of a batch, `(params, batch, base_params) -> logp`.

  As many prompts at a time as in the update, so that it needs no more memory.
  """

  def make(micro_batches: int) -> Callable:
    return make_score(
      r.model,
      temperature=c.rollout.temperature,
      micro_batches=micro_batches,
      with_adapters=r.with_adapters,
      chunks=r.chunks,
    )

  return _within_budget(c, r, make, c.train.mini_batches)


def _within_budget(c: ConfigDict, r: Run, make: Callable[[int], Callable], times: int = 1):
  return reduction.within(
    make,
    budget=c.train.micro_batch_tokens,
    prompt_shards=meshes.prompt_shards(r.sampler.prompt_sharding),
    least=c.train.micro_batches * times,
  )


class SkippedError(RuntimeError):
  """Too many updates in a row were skipped; the text names the dumps."""


class Learner:
  """`(state, batch, step, say) -> (state, metrics)`: the updates of one rollout.

  Reference and old log-probs are computed before the first of them, and only where the algorithm
  has a KL term, or several updates that move away from the parameters that sampled. One number is
  read back from the device after each update: whether it was skipped.

  Attributes:
    trouble: why the run cannot go on, once `train.max_skipped` updates in a row were skipped.
  """

  def __init__(self, c: ConfigDict, r: Run, base_params: Any, workdir: str | Path) -> None:
    self._c, self._r, self._base_params, self._workdir = c, r, base_params, workdir
    self._update, self._score = make_update(c, r), make_scoring(c, r)
    self._has_kl = r.algorithm.beta > 0
    self._reference = None
    if self._has_kl and not c.reference.sync_every:
      # Adapters left out, the base_params parameters are the reference.
      self._reference = r.loaded_params() if base_params is None else {}
    self._state_of: str | None = None  # the dump that holds the state as it is
    self.trouble: str | None = None

  def __call__(
    self, state: TrainState, batch: Batch, step: int, say: Callable[[str], None] = print
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    c = self._c
    if self._has_kl:
      reference = state.reference if self._reference is None else self._reference
      batch = dataclasses.replace(batch, ref_logp=self._score(reference, batch, self._base_params))
    if c.train.epochs * c.train.mini_batches > 1:
      batch = dataclasses.replace(
        batch, old_logp=self._score(state.params, batch, self._base_params)
      )
    parts = batches.mini_batches(batch, c.train.mini_batches, c.train.epochs, (c.seed, step))
    measured = []
    for number, part in enumerate(parts):
      state, found = self._update(state, part, self._base_params)
      measured.append(found)
      if jax.device_get(found[SKIPPED]):
        self._skipped(state, part, found, step, number, say)
      else:
        self._state_of = None
    if c.reference.sync_every and (step + 1) % c.reference.sync_every == 0:
      state = move_reference(state, c.reference.sync_share)
    skipped = int(jax.device_get(state.history.skipped)) if self._state_of else 0
    if skipped >= c.train.max_skipped:
      kept = ", ".join(str(path) for path in dumps.whole(self._workdir))
      self.trouble = (
        f"{skipped} updates in a row were skipped (train.max_skipped is {c.train.max_skipped}). "
        f"The parameters are those of the last good update. See why: python -m grpo_jax.replay "
        f"DUMP, for {kept}"
      )
    return state, average(measured)

  def check(self, done: int) -> None:
    """Ends a run in trouble, once its `done` steps are saved. Errors: SkippedError."""
    if self.trouble:
      raise SkippedError(f"{self.trouble}; step {done} is saved")

  def _skipped(
    self,
    state: TrainState,
    batch: Batch,
    found: dict[str, jax.Array],
    step: int,
    update: int,
    say: Callable[[str], None],
  ) -> None:
    """Says that an update was skipped, and keeps it for `grpo_jax.replay`."""
    path, held = dumps.folder(self._workdir, step, update), dumps.whole(self._workdir)
    numbers = {name: float(value) for name, value in jax.device_get(found).items()}
    text = (
      f"step {step}, update {update} skipped: loss {numbers['loss']:.4g}, "
      f"gradient norm {numbers['grad_norm']:.4g}"
    )
    if path in held:  # by a process before this one, which did not come to its next checkpoint
      self._state_of = dumps.read(path).recorded["state_of"]
    else:
      self._state_of = self._state_of or path.name
      if len(held) >= dumps.LIMIT:
        say(f"{text}; not kept, {path.parent} holds {len(held)} already")
        return
      mesh = self._r.mesh
      recorded = {
        "step": step,
        "update": update,
        "state_of": self._state_of,
        "metrics": numbers,
        "mesh": dict(mesh.shape),
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
      }
      dumps.write(path, configs.to_saved(self._c), state, batch, recorded)
    say(f"{text}; see why: python -m grpo_jax.replay {path}")
