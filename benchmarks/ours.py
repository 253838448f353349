"""grpo_jax as an engine: what `grpo_jax.train` does in a step, on completions of a fixed length."""

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

from benchmarks.settings import SETTINGS, make_prompts
from benchmarks.worker import Channel, clock, since
from grpo_jax import config as configs
from grpo_jax.build import build, to_sampling_params
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.step import Batch, TrainState, make_train_step
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.load import open_weights
from grpo_jax.rollout import collect
from grpo_jax.sampling.sampler import Sampler
from grpo_jax.tasks.rewards.workers import score_in_process
from grpo_jax.tokens import encode_prompt, load_tokenizer

STEPS = 64  # prompts are drawn for so many steps before they repeat


def make_config(settings: dict[str, Any], folder: Path) -> Any:
  """The config of a run on one of SETTINGS; its prompts are written into `folder`."""
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
  """A run of one of SETTINGS, ready to step.

  Attributes:
    config, run: as `grpo_jax.train` has them, but that no token ends a completion.
    update: the jitted train step.
    state: changed by every step.
  """

  def __init__(self, settings: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
      self.config = make_config(settings, Path(folder))
      run = build(self.config)
      # Read now: the file of the prompts does not stay.
      run = dataclasses.replace(
        run, task=dataclasses.replace(run.task, splits={"train": list(run.task.splits["train"])})
      )
    self.run = dataclasses.replace(run, sampler=endless(run.sampler))
    self.state: TrainState = run.initial_state()
    self._scorer = score_in_process(run.task)
    self.update = make_train_step(
      run.model,
      run.algorithm,
      run.optimizer,
      run.schedule,
      temperature=self.config.rollout.temperature,
      micro_batches=self.config.train.micro_batches,
      with_adapters=run.with_adapters,
    )
    self._step = 0

  def sample(self) -> Batch:
    """Prompts, completions, rewards and advantages of the next step."""
    run, step = self.run, self._step
    self._step += 1
    params, examples = run.to_sampling_params(self.state.params), run.examples(step)
    out = collect(run.sampler, params, examples, self._scorer, run.key(step), run.rollout)
    return jax.block_until_ready(out.batch)

  def empty_batch(self) -> Batch:
    """A batch of the shape that `sample` gives, all zeros, without sampling."""
    c, like = self.config.rollout, jax.numpy.zeros
    rows = (c.prompts_per_step, c.group_size)
    prompts = (c.prompts_per_step, self.run.sampler.prompt_length)
    batch = Batch(
      prompts=like(prompts, int),
      prompt_mask=like(prompts, bool),
      completions=like((*rows, c.completion_length), int),
      mask=like((*rows, c.completion_length), bool),
      advantages=like(rows),
      weights=like((*rows, c.completion_length)),
      sampler_logp=like((*rows, c.completion_length)),
    )
    return jax.device_put(batch, self.run.sampler.prompt_sharding)

  def learn(self, batch: Batch) -> None:
    """One update."""
    self.state, measured = self.update(self.state, batch)
    jax.block_until_ready((self.state, measured))

  def step(self) -> dict[str, Any]:
    """A whole step; its parts' times, and the token counts that engines must agree on."""
    before = clock()
    batch = self.sample()
    record = since(before, "sampling_")
    before = clock()
    self.learn(batch)
    return record | since(before, "update_") | tokens_of(batch)


def tokens_of(batch: Batch) -> dict[str, int]:
  """Prompt tokens (each prompt once) and completion tokens of a batch."""
  mask, completions = jax.device_get((batch.prompt_mask, batch.mask))
  return {"prompt_tokens": int(mask.sum()), "completion_tokens": int(completions.sum())}


def endless(sampler: Sampler) -> Sampler:
  """The sampler with stops that no token reaches: every completion has the full length."""
  never = np.zeros((2, sampler.model.config.vocab_size), np.int32)
  return dataclasses.replace(sampler, stop_table=never)


def make_sampler(
  source: str, prompts: Sequence[Any], tokens: int, dtype: str
) -> tuple[Sampler, Any]:
  """A sampler for these prompts on one device, and its weights, laid out as a run lays them out."""
  weights, tokenizer = open_weights(source), load_tokenizer(source)
  mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
  model = Decoder(weights.config, dtype=jnp.dtype(dtype), place=meshes.placer(mesh))
  sampler = Sampler(
    model=model,
    tokenizer=tokenizer,
    prompt_length=max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts),
    completion_length=tokens,
  )
  params = weights.read(meshes.param_shardings(mesh, weights.shapes))
  return sampler, jax.jit(partial(to_sampling_params, model, mesh, None))(params)


def about() -> dict[str, Any]:
  """Versions and device of this engine."""
  return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def serve() -> None:
  """The engine's process: one step a piece of work."""
  channel = Channel()
  engine = Engine(channel.settings)
  channel.ready(about())
  while channel.wait():
    with channel.measure() as record:
      record |= engine.step()
