"""Serves grpo_jax as an engine: steps of `grpo_jax.train`, with completions of a fixed length."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.settings import ADAPTED, SETTINGS, make_prompts
from benchmarks.worker import Channel, clock, since
from grpo_jax import config as configs
from grpo_jax.build import build, to_sampling_params
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.step import Batch, TrainState
from grpo_jax.learning.updates import make_update
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.load import open_weights
from grpo_jax.models.quantized import quantized_weights
from grpo_jax.rollout import collect
from grpo_jax.sampling.sampler import Sampler
from grpo_jax.tasks.rewards.workers import score_in_process
from grpo_jax.tokens import encode_prompt, load_tokenizer

STEPS = 64  # number of steps before the prompts repeat


def make_config(settings: dict[str, Any], folder: Path) -> ConfigDict:
  """Returns the config of a run on one of SETTINGS.

  Args:
    settings: `setting`, `model`, `learning_rate` and `overrides`.
    folder: folder that the prompts are written to.
  """
  shape = SETTINGS[settings["setting"]]
  path = folder / "prompts.jsonl"
  prompts = make_prompts(shape.kind, shape.prompts * STEPS)
  path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
  c = configs.default_config()
  c.model.source = settings["model"]
  c.task.name = "table"
  with c.unlocked():
    c.task.settings.update(path=str(path), reward="benchmarks.settings:reward", eval_fraction=0.0)
  c.rollout.prompts_per_step = shape.prompts
  c.rollout.group_size = shape.group
  c.rollout.completion_length = shape.tokens
  c.algorithm.name = "grpo"
  c.algorithm.beta = 0.0
  c.optimizer.learning_rate = settings["learning_rate"]
  return configs.override(c, settings["overrides"])


class Engine:
  """Builds a run of one of SETTINGS and runs its steps.

  Args:
    settings: as in `make_config`.

  Attributes:
    config, run: as in `grpo_jax.train`, except that no token ends a completion.
    update: the jitted update.
    state: the state of training, changed by each step.
  """

  def __init__(self, settings: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
      self.config = make_config(settings, Path(folder))
      run = build(self.config)
      # Read the prompts now, since their file is temporary.
      run = dataclasses.replace(
        run, task=dataclasses.replace(run.task, splits={"train": list(run.task.splits["train"])})
      )
    self.run = dataclasses.replace(run, sampler=endless(run.sampler))
    self.state: TrainState = run.initial_state()
    self._scorer = score_in_process(run.task)
    self.update = make_update(
      run.model,
      run.algorithm,
      run.optimizer,
      run.schedule,
      run.updates,
      with_adapters=run.with_adapters,
      chunks=run.chunks,
    )
    self._step = 0

  def sample(self) -> Batch:
    """Returns the batch of the next step: prompts, completions and advantages."""
    run, step = self.run, self._step
    self._step += 1
    params, examples = run.to_sampling_params(self.state.params), run.examples(step)
    out = collect(run.sampler, params, examples, self._scorer, run.key(step), run.rollout)
    return jax.block_until_ready(out.batch)

  def empty_batch(self) -> Batch:
    """Returns a batch of zeros in the shape of `sample`."""
    c, zeros = self.config.rollout, jnp.zeros
    rows = (c.prompts_per_step, c.group_size)
    prompts = (c.prompts_per_step, self.run.sampler.prompt_length)
    batch = Batch(
      prompts=zeros(prompts, int),
      prompt_mask=zeros(prompts, bool),
      completions=zeros((*rows, c.completion_length), int),
      mask=zeros((*rows, c.completion_length), bool),
      advantages=zeros(rows),
      weights=zeros((*rows, c.completion_length)),
      sampler_logp=zeros((*rows, c.completion_length)),
    )
    return jax.device_put(batch, self.run.sampler.prompt_sharding)

  def learn(self, batch: Batch) -> None:
    """Runs one update."""
    self.state, metrics = self.update(self.state, batch)
    jax.block_until_ready((self.state, metrics))

  def step(self) -> dict[str, Any]:
    """Runs a step; returns the times of its parts and the token counts that engines agree on."""
    before = clock()
    batch = self.sample()
    record = since(before, "sampling_")
    before = clock()
    self.learn(batch)
    return record | since(before, "update_") | count_tokens(batch)


def count_tokens(batch: Batch) -> dict[str, int]:
  """Returns the numbers of prompt tokens (each prompt once) and completion tokens."""
  mask, completions = jax.device_get((batch.prompt_mask, batch.mask))
  return {"prompt_tokens": int(mask.sum()), "completion_tokens": int(completions.sum())}


def endless(sampler: Sampler) -> Sampler:
  """Returns the sampler with a stop table without an end, so completions have the full length."""
  table = np.zeros((2, sampler.model.config.vocab_size), np.int32)
  return dataclasses.replace(sampler, stop_table=table)


def make_sampler(
  source: str, prompts: Sequence[Any], tokens: int, dtype: str, form: str = "trained"
) -> tuple[Sampler, Any, Any]:
  """Returns a sampler on one device, its parameters in a run's layout, and those that are scored.

  Args:
    source: source of the model, as in `model.source`.
    prompts: prompts, for the largest length.
    tokens: completion length in tokens.
    dtype: type of the activations.
    form: one of `settings.FORMS`.
  """
  weights, tokenizer = open_weights(source), load_tokenizer(source)
  mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
  model = Decoder(weights.config, dtype=jnp.dtype(dtype), place=meshes.placer(mesh))
  sampler = Sampler(
    model=model,
    tokenizer=tokenizer,
    prompt_length=max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts),
    completion_length=tokens,
  )
  if form.startswith(ADAPTED):
    adapters = lora.init(jax.random.key(0), weights.shapes, "|".join(lora.MATRICES), rank=16)
    weights = quantized_weights(weights, form.removeprefix(ADAPTED))
    base = weights.read(meshes.param_shardings(mesh, weights.shapes))
    params = lora.with_adapters(base, adapters)
    return sampler, params, params
  params = weights.read(meshes.param_shardings(mesh, weights.shapes))
  convert = jax.jit(partial(to_sampling_params, model, mesh, None), static_argnames="int8")
  scored = convert(params)
  return sampler, convert(params, int8=True) if form == "int8" else scored, scored


def about() -> dict[str, Any]:
  """Returns the version of jax and the device."""
  return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def serve() -> None:
  """Serves the engine; a unit of work is one step."""
  channel = Channel()
  engine = Engine(channel.settings)
  channel.ready(about())
  while channel.wait():
    with channel.measure() as record:
      record |= engine.step()
