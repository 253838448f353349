"""Training: `python -m grpo_jax.train --config experiments/X.py --workdir DIR [--config.a.b=v]`.

A work directory that holds a checkpoint is continued. Ctrl-C and SIGTERM (preemption) finish the
step, save and exit.
"""

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_jax import extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("train", "grpo_jax.train")

import jax
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax import data, rollout
from grpo_jax.build import Run, build, make_scorer, update_config
from grpo_jax.distributed import cluster, hosts
from grpo_jax.evaluate import evaluate, table
from grpo_jax.learning.updates import Learner, SkippedError
from grpo_jax.run import checkpoint, compilation, metrics, plots, skipped
from grpo_jax.run import workdir as workdirs
from grpo_jax.run.signals import Signals, Stopped
from grpo_jax.summary import describe
from grpo_jax.tasks.base import Example
from grpo_jax.tasks.rewards.workers import Scorer

# Fields that a continued run may change: how long it runs, what it shows, how it is laid out.
FREE = (
  *("steps", "eval.", "checkpoint.", "log.", "mesh.", "hosts.", "compilation_cache"),
  *("model.remat", "train.micro_batches", "train.micro_batch_tokens", "train.max_skipped"),
)
# Exit codes, besides 2 for a mistake in the command and those of a signal, 128 + its number.
INTERRUPTED = 130  # before there was a step to finish, or at once
NOT_WRITTEN = 74  # a file could not be written, as sysexits.h has it
GAVE_UP = 3  # too many updates in a row were skipped


def run(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
  """Trains to `config.steps` steps, from the newest whole checkpoint in `workdir` if there is one.

  Leaves metrics.jsonl, TensorBoard events, samples/, curve.png, config.json and checkpoints/.

  Returns:
    The metrics of the last evaluation.

  Errors: ConfigError with everything that is wrong with the config, before anything compiles;
  WorkdirError where another run uses `workdir` or what is in it is damaged; SaveError; Stopped
  after a Ctrl-C or SIGTERM, and SkippedError after too many skipped updates, both with the finished
  steps saved.
  """
  c, workdir = config, Path(workdir)
  with contextlib.ExitStack() as held:
    compilation.use_cache(c.compilation_cache, workdir)
    watch = held.enter_context(compilation.Watch())
    with hosts.together("reading the config and what it names"):
      r = build(c)
      if hosts.is_first():
        held.enter_context(workdirs.lock(workdir))
        check_workdir(c, workdir)
        workdirs.write_config(workdir, configs.to_saved(c))
    hosts.same("the config", json.dumps(configs.to_saved(c), sort_keys=True))
    return _train(c, r, workdir, watch)


def _train(c: ConfigDict, r: Run, workdir: Path, watch: compilation.Watch) -> dict[str, float]:
  """The loop, from the newest checkpoint to the last step, with what has to be closed after it."""
  state, base_params = (
    r.initial_state(moving_reference=c.reference.sync_every > 0),
    r.loaded_base_params(),
  )
  to_sampler = r.for_sampling(base_params)
  with (
    checkpoint.Checkpoints(workdir, c.checkpoint.keep) as checkpoints,
    make_scorer(c, r) as scorer,
    Signals() as signals,
  ):
    start, state = checkpoints.resume(state, _tell)
    writer = metrics.MetricsWriter if hosts.is_first() else metrics.NoWriter
    with writer(workdir, c.steps, resume_step=start) as writer:
      writer.print(describe(c, r, start))
      recorder = skipped.Recorder(workdir, configs.to_saved(c), r.mesh, writer.print)
      learn = Learner(
        r.model,
        r.algorithm,
        r.optimizer,
        r.schedule,
        update_config(c),
        with_adapters=r.with_adapters,
        base_params=base_params,
        reference=None if c.reference.sync_every else r.loaded_reference(),
        chunks=r.chunks,
        on_skip=recorder,
      )
      late, num_tokens = metrics.OneStepLate(writer.write), metrics.last(workdir, "num_tokens", 0)
      for step in range(start, c.steps):
        if step == 0 or (c.eval.every and step % c.eval.every == 0):
          late.flush()
          _evaluate(c, r, to_sampler(state.params), scorer, step, writer)
        began = time.monotonic()
        rolled = rollout.collect(
          r.sampler,
          to_sampler(state.params),
          scorer,
          _draws(c, r, step),
          jax.random.fold_in(jax.random.key(c.seed), step),
          group=c.rollout.group_size,
          temperature=c.rollout.temperature,
          algorithm=r.algorithm,
          pad_prompts_to_multiple=r.pad_prompts_to_multiple,
          reward_weights=r.reward_weights,
          step_rewards=r.step_rewards,
          max_resamples=c.rollout.max_resamples,
          mask_truncated=c.rollout.mask_truncated,
        )
        with jax.transfer_guard("disallow"):  # what the updates need is on the device already
          state, measured = learn(state, rolled.batch, step)
        num_tokens += rolled.num_tokens
        watch.report(writer.print)
        measured |= rolled.measured | _timing(rolled.num_tokens, num_tokens, began)
        late.push(step, measured)
        writer.write_samples(step, rolled.samples)
        if c.log.samples_every and step % c.log.samples_every == 0:
          writer.print_samples(rolled.samples[: c.log.samples])
        done, stop = step + 1, signals.of_any_host()
        if stop or learn.trouble or done % c.checkpoint.every == 0 or done == c.steps:
          late.flush()
          writer.sync()
          checkpoints.save(done, state)
        checkpoints.check()
        if learn.trouble:
          raise SkippedError(f"{learn.trouble}. {recorder.advice()}; step {done} is saved")
        if stop:
          raise Stopped(f"stopped after step {done}, which is saved", stop)
      results = _evaluate(c, r, to_sampler(state.params), scorer, c.steps, writer)
  if hosts.is_first():
    plots.draw_curve(workdir)
  return results


def check_workdir(config: ConfigDict, workdir: Path) -> None:
  """Refuses a work directory that was started with another config, listing the differences."""
  saved = workdirs.read_config(workdir)
  if saved is None:
    return
  found = [
    line
    for line in configs.differences(_json(configs.from_saved(saved)), _json(config))
    if not line.startswith(tuple(f if f.endswith(".") else f"{f}:" for f in FREE))
  ]
  if found:
    raise configs.ConfigError(
      [
        f"{workdir} was started with another config; use a new --workdir, or put back {line}"
        for line in found
      ]
    )


def _json(config: ConfigDict) -> dict[str, Any]:
  return json.loads(json.dumps(configs.to_saved(config)))


def _draws(c: ConfigDict, r: Run, step: int) -> Callable[[int], list[Example]]:
  """`resample -> examples`: those of the step, and what replaces prompts without a signal."""
  split, count = r.task.splits["train"], c.rollout.prompts_per_step
  block = hosts.own_shard()
  return lambda resample: data.examples(split, step, count, c.seed, *block, stream=resample)


def _evaluate(
  c: ConfigDict, r: Run, params: Any, scorer: Scorer, step: int, writer: metrics.MetricsWriter
) -> dict[str, float]:
  """Evaluates on the held-out split and writes the numbers and the completions down."""
  examples = r.task.splits["eval"]
  if not examples:
    return {}
  result = evaluate(
    r.sampler,
    params,
    r.task,
    examples,
    samples=c.eval.samples,
    temperature=c.rollout.temperature,
    batch_prompts=c.eval.batch_prompts,
    key=jax.random.key(c.seed),
    scorer=scorer,
  )
  writer.write(step, result.metrics)
  writer.write_samples(step, result.samples, kind="eval")
  return result.metrics


def _timing(step_tokens: int, num_tokens: int, began: float) -> dict[str, float]:
  """Seconds of the step, tokens (prompts once, and completions) per second, and in all so far."""
  seconds = time.monotonic() - began
  return {
    "step_time": seconds,
    "tokens_per_second": step_tokens / seconds,
    "num_tokens": num_tokens,
  }


def _tell(line: str) -> None:
  if hosts.is_first():
    print(f"warning: {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m grpo_jax.train", description=__doc__)
  parser.add_argument("--config", required=True, help="an experiment file; it is run as a program")
  parser.add_argument("--workdir", required=True, help="everything the run leaves; made if missing")
  arguments, overrides = parser.parse_known_args(argv)
  # What orbax logs with stacks comes back as errors, which are explained.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  try:
    config = configs.load(arguments.config, overrides)
    with hosts.session(config.hosts.heartbeat, config.hosts.wait):
      results = run(config, arguments.workdir)
      first = hosts.is_first()
  except (configs.ConfigError, workdirs.WorkdirError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except hosts.HostError as error:
    print(f"error: {error}", file=sys.stderr)
    return cluster.FAILED
  except SkippedError as error:
    print(f"error: {error}", file=sys.stderr)
    return GAVE_UP
  except KeyboardInterrupt as error:
    print(f"{error or 'stopped'}; the same command continues {arguments.workdir}")
    return getattr(error, "exit_code", INTERRUPTED)
  except OSError as error:
    if not isinstance(error, checkpoint.SaveError) and not workdirs.is_full(error):
      raise
    said = str(error)
    if not isinstance(error, checkpoint.SaveError):
      said = f"the file system is full ({error}); {workdirs.room(arguments.workdir)}"
    print(f"error: {said}. Make room; then the same command continues", file=sys.stderr)
    return NOT_WRITTEN
  if not first:
    return 0
  before = metrics.at(arguments.workdir, 0, "eval/")
  if before and results:
    print(table(results, f"held out, after {config.steps} steps", before))
  print(f"in {arguments.workdir}: metrics.jsonl, samples/, tensorboard/, curve.png, checkpoints/")
  return 0


if __name__ == "__main__":
  sys.exit(main())
