"""Trains: `python -m grpo_jax.train --config experiments/X.py --workdir DIR [--config.a.b=v]`.

A work directory that holds a checkpoint is continued. Ctrl-C and SIGTERM (preemption) finish the
step, save and exit.
"""

import argparse
import contextlib
import datetime
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax import extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("train", "grpo_jax.train")

import jax
from ml_collections import ConfigDict

import grpo_jax
from grpo_jax import config as configs
from grpo_jax import doctor
from grpo_jax.addresses import Address
from grpo_jax.ahead import Rollouts
from grpo_jax.build import Run, build, schedule_steps
from grpo_jax.distributed import cluster, hosts
from grpo_jax.environments.base import EnvironmentFault
from grpo_jax.environments.workers import WorkerError
from grpo_jax.evaluate import Evaluation, evaluate, table
from grpo_jax.learning.step import TrainState
from grpo_jax.learning.updates import Learner, SkippedError
from grpo_jax.rollout import Rollout
from grpo_jax.run import (
  checkpoint,
  compilation,
  console,
  identity,
  metrics,
  mirror,
  provenance,
  record,
  skipped,
)  # fmt: skip
from grpo_jax.run import workdir as workdirs
from grpo_jax.run.ending import Ending
from grpo_jax.run.health import Watcher
from grpo_jax.run.output import Output
from grpo_jax.run.signals import Signals, Stopped
from grpo_jax.summary import describe
from grpo_jax.tasks.rewards.scoring import RewardError
from grpo_jax.tasks.rewards.workers import Scorer

# Exit codes, besides 2 for a mistake in the command and those of a signal, 128 + its number.
INTERRUPTED = 130  # before there was a step to finish, or at once
NOT_WRITTEN = 74  # a file could not be written, as sysexits.h has it
# Too many updates in a row were skipped, nothing was scored, a reward raised, parameters are NaN.
GAVE_UP = 3


class UnscoredError(RuntimeError):
  """Reports that no completion of the first step was scored: there is nothing to learn from."""


def run(
  config: ConfigDict,
  workdir: str | Path | Address,
  *,
  experiment: str | Path | None = None,
  accept: Sequence[str] = (),
) -> dict[str, float]:
  """Trains to `config.steps` steps, from the newest whole checkpoint in `workdir` if there is one.

  With `config.epochs`, the number of steps follows from the number of training problems. With
  `config.stop`, the run may end earlier: it saves, evaluates and says why.

  Leaves metrics.jsonl, TensorBoard events, samples/, curve.png, config.json, identity.json,
  run.json, console.log and checkpoints/.

  Args:
    experiment: the file the config came from; a continued run needs the same.
    accept: names of fields and files that may differ from those the run was started with.

  Returns:
    The metrics of the last evaluation.

  Raises:
    ConfigError: lists everything that is wrong with the config, before anything compiles.
    WorkdirError: another run uses `workdir`, its files are damaged, or it holds more steps.
    EnvironmentFault, WorkerError: an environment gave the completions of a prompt different prompts
      or too long ones, or could not be started; the state is saved.
    RewardError: a reward function raised, or returned something else than rewards; the state as
      it was is saved.
    UnscoredError: no completion of the first step was scored.
    SaveError: a checkpoint could not be written.
    Stopped: after a Ctrl-C or SIGTERM, with the finished steps saved.
    SkippedError: after too many skipped updates, with the finished steps saved.
    NotFiniteError: the parameters became NaN or infinite; the checkpoint before that stays.
  """
  begun, session, files = time.monotonic(), {}, {}
  with contextlib.ExitStack() as stack:
    stack.enter_context(console.guarded())
    place = stack.enter_context(mirror.opened(workdir))
    workdir = place.folder
    compilation.use_cache(config.compilation_cache, workdir, inside=place.mirror is not None)
    watch = stack.enter_context(compilation.Watch())
    config = with_chat_date(config, workdir)
    machines = provenance.machines()
    with hosts.together("reading the config and what it names"):
      saved = workdirs.read_config(workdir)
      config = configs.resolve_auto(config, saved, workdir / workdirs.CONFIG)
      run = build(config)
      config = run.config  # with the number of steps, and the settings of `lora.source`
      saved = configs.to_saved(config)
      if hosts.is_first():
        stack.enter_context(workdirs.lock(workdir))
        files = identity_of(run, experiment)
        check_workdir(config, workdir, files, accept)
        workdirs.write_config(workdir, saved)
        identity.write(workdir, files)
        console.keep(workdir / console.LOG)
        code = Path(experiment).parent if experiment else "."
        about = {"data": provenance.data(run.task.splits), "hosts": machines}
        session = stack.enter_context(record.session(workdir, grpo_jax.__version__, code, about))
    hosts.same("the config", json.dumps(saved, sort_keys=True))
    ending = Ending(config.stop.after_hours, config.stop.when, begun)
    out = Output(
      workdir,
      **_log_settings(config),
      remark=Watcher(config, workdir),
      about={"config": saved, "files": files, "session": dict(session)},
      mirror=place.mirror,
    )
    results = _train(run, out, watch, ending, session)
    if ending.reason:
      session.update(reason="stopped", message=ending.reason)
    return results


def with_chat_date(config: ConfigDict, workdir: Path) -> ConfigDict:
  """Returns the config with a date for chat templates: its own, the work directory's, or today.

  A template that prints the date would otherwise give a continued run other prompts.
  """
  if config.chat.date:
    return config
  with hosts.together("reading the work directory"):
    saved = (workdirs.read_config(workdir) or {}).get("chat")
    date = saved.get("date") if isinstance(saved, dict) else None
  date, *_ = hosts.gathered_json([date or datetime.date.today().isoformat()])
  config = config.copy_and_resolve_references()
  config.chat.date = date
  return config


def identity_of(run: Run, experiment: str | Path | None) -> dict[str, str]:
  """Returns the digests of the files a run depends on, and of its chat template."""
  template = run.sampler.tokenizer.chat_template
  texts = {"the chat template": template} if template else {}
  files = run.task.files if experiment is None else (experiment, *run.task.files)
  return identity.digests(files, texts)


def _train(
  run: Run, out: Output, watch: compilation.Watch, ending: Ending, session: dict[str, Any]
) -> dict[str, float]:
  """Runs the loop from the newest checkpoint to the last step, or until `ending` is reached."""
  with (
    out,
    run.matmul_precision(),
    run.scorer() as scorer,
    Signals() as signals,
    Rollouts(run, scorer) as rollouts,
  ):
    start, state = out.resume(run.initial_state(), run.evaluates_at)
    rollouts.restore(out.pending)
    out.print(describe(run.config, run, start))
    out.print("compiling  sampling, evaluation and update, once each; later steps are faster")
    for finding in doctor.before(run):
      out.print(f"doctor     {finding.seen}: {finding.reason}")
    saved = configs.to_saved(run.config)
    recorder = skipped.Recorder(out.workdir, saved, run.mesh, out.print, out.share)
    update = run.learner(on_skip=recorder)
    session["memory"] = record.memory_of(update.held(state))
    for step in range(start, run.steps):
      with out.saved_if_it_raises(step, state, rollouts.saved):
        if run.evaluates_at(step):
          out.write_evaluation(step, _evaluate(run, state.params, rollouts.scorer(step)))
        if ending.reached(out.latest):
          break
        out.start_step()
        rollout = rollouts.take(step, state)
      _check_scored(run, rollout, is_first=step == start)
      state, values = _learn(run, update, state, rollout, step)
      state, counts = run.counted(state, step, rollout)
      watch.report(out.print)
      out.write_step(step, rollout.metrics | values | counts, rollout.samples, rollout.num_tokens)
      stop = signals.of_any_host(step)
      if stop or update.trouble or run.saves_at(step + 1) or out.is_save_due():
        out.save(step + 1, state, rollouts.saved)
      out.check()
      if update.trouble:
        raise SkippedError(f"{update.trouble}. {recorder.advice()}; step {step + 1} is saved")
      signals.check(step + 1, stop)
    results = _finish(run, out, state, rollouts, ending.reason)
    out.draw_curve()
  return results


def _learn(
  run: Run, update: Learner, state: TrainState, rollout: Rollout, step: int
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Updates the state, and writes into samples with tokens how each changed, if that is wanted."""
  with jax.transfer_guard("disallow"):  # the batch is on the device already
    state, values = update(state, rollout.batch, step)
  if run.config.log.ratios and run.rollout_at(step).tokens:
    rollout.add_ratios(update.ratios(state, rollout.batch))
  return state, values


def _finish(
  run: Run, out: Output, state: TrainState, rollouts: Rollouts, reason: str
) -> dict[str, float]:
  """Evaluates the last state, if that was not done, and returns its metrics.

  Args:
    reason: why the run ended before its last step; its state is saved first.
  """
  if reason:
    out.print(f"stopped after step {out.finished}: {reason}. Without that setting it goes on")
    out.save(out.finished, state, rollouts.saved)
  if not (results := out.evaluation_at(out.finished)):
    evaluation = _evaluate(run, state.params, rollouts.scorer(out.finished))
    out.write_evaluation(out.finished, evaluation)
    results = evaluation.metrics
  return results


def _evaluate(run: Run, params: Any, scorer: Scorer) -> Evaluation:
  """Evaluates the policy on the held-out split; nothing where there is none."""
  examples, c = run.task.splits["eval"], run.config
  if not examples:
    return Evaluation({}, [])
  return evaluate(
    run.sampler,
    run.to_sampling_params(params),
    run.task,
    examples,
    samples=c.eval.samples,
    **run.evaluation_sampling(),
    batch_prompts=c.eval.batch_prompts,
    key=jax.random.key(c.seed),
    scorer=scorer,
  )


def _log_settings(c: ConfigDict) -> dict[str, Any]:
  """Returns the arguments of `Output` that a config holds."""
  return {
    "steps": c.steps,
    "keep": c.checkpoint.keep,
    "save_seconds": c.checkpoint.seconds,
    "samples": c.log.samples,
    "samples_every": c.log.samples_every,
    "trackers": c.log.trackers,
  }


def _check_scored(run: Run, rollout: Rollout, is_first: bool) -> None:
  """Ends a run that cannot learn: its first step has no scored completion on any host."""
  unscored = is_first and rollout.metrics["frac_unscored"] == 1
  if unscored and not run.config.rewards.allow_unscored:
    if rollout.metrics.get("episode/failed") == 1:
      raise UnscoredError(
        "none of the episodes of the first step was scored: the environment failed in all of them. "
        "The warnings above say why"
      )
    raise UnscoredError(
      f"none of the completions of the first step was scored: the rewards "
      f"{', '.join(run.task.rewards)} gave None or NaN for all of them, or failed on all of them. "
      "Check the columns they read and the form of answer they expect; to go on all the same, set "
      "--config.rewards.allow_unscored=true"
    )


def check_workdir(
  config: ConfigDict, workdir: Path, files: Mapping[str, str], accept: Sequence[str] = ()
) -> None:
  """Refuses a work directory that was started with another config or with other files.

  Args:
    files: digests of the files as they are now, as `identity_of` returns them.
    accept: names of fields and files whose change is accepted.

  Raises:
    ConfigError: lists the changes that were not accepted.
  """
  saved = workdirs.read_config(workdir)
  if saved is None:
    return
  before, problems = configs.from_saved(saved, workdir / workdirs.CONFIG), []
  for line in configs.differences(configs.to_saved(before), configs.to_saved(config)):
    name = line.partition(":")[0]
    # A run from before this field had the date of each day.
    free = name == "chat.date" and not before.chat.date
    if not free and not configs.may_change(name) and name not in accept:
      problems.append(f"use a new --workdir, or put back {line} (or --accept {name})")
  old, new = schedule_steps(before), schedule_steps(config)
  if config.optimizer.schedule != "constant" and old != new and "steps" not in accept:
    problems.append(
      f"the {config.optimizer.schedule} schedule of the learning rate would end after {new} steps "
      f"and not after {old}, and jump now; keep it with --config.optimizer.schedule_steps={old}, "
      "or change it with --accept steps"
    )
  for name in identity.changed(identity.read(workdir) or {}, files):
    if name not in accept:
      problems.append(f"{name} has changed; put it back, use a new --workdir, or --accept {name!r}")
  if problems:
    raise configs.ConfigError(
      [f"{workdir} was started with another config or file; {problem}" for problem in problems]
    )


@console.guarded()
def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  parser = argparse.ArgumentParser(prog="python -m grpo_jax.train", description=__doc__)
  parser.add_argument("--config", required=True, help="an experiment file; it is run as a program")
  parser.add_argument("--workdir", required=True, help="everything the run leaves; made if missing")
  parser.add_argument(
    "--accept", action="append", default=[], metavar="NAME",
    help="a field, file or 'steps' that may differ from what the run was started with; repeatable",
  )  # fmt: skip
  arguments, overrides = parser.parse_known_args(argv)
  # What orbax logs with stacks comes back as errors, which are explained.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  try:
    arguments.workdir = mirror.place_of(arguments.workdir)
    config = configs.load(arguments.config, overrides)
    with hosts.session(config.hosts.heartbeat, config.hosts.wait):
      results = run(config, arguments.workdir, experiment=arguments.config, accept=arguments.accept)
      first = hosts.is_first()
  except (configs.ConfigError, workdirs.WorkdirError, cluster.ClusterError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except hosts.HostError as error:
    print(f"error: {error}", file=sys.stderr)
    return cluster.FAILED
  except (
    RewardError, EnvironmentFault, WorkerError, SkippedError, UnscoredError,
    checkpoint.NotFiniteError,
  ) as error:  # fmt: skip
    print(f"error: {error}", file=sys.stderr)
    return GAVE_UP
  except KeyboardInterrupt as error:
    since = error.since() if isinstance(error, Stopped) else ""
    print(f"{str(error) or 'stopped'}; the same command continues {arguments.workdir}{since}")
    return getattr(error, "exit_code", INTERRUPTED)
  except OSError as error:
    if not isinstance(error, checkpoint.SaveError) and not workdirs.is_full(error):
      raise
    reason = str(error)
    if not isinstance(error, checkpoint.SaveError):
      folder = mirror.folder_of(arguments.workdir)
      reason = f"the file system is full ({error}); {workdirs.free_space(folder)}"
    print(f"error: {reason}{checkpoint.remedy(error)}", file=sys.stderr)
    return NOT_WRITTEN
  if not first:
    return 0
  folder = mirror.folder_of(arguments.workdir)
  before = metrics.at(folder, 0, "eval/")
  if before and results:
    steps = metrics.read_metrics(folder)[-1]["step"]
    print(table(results, f"held out, after {steps} steps", before))
  print(f"in {arguments.workdir}: metrics.jsonl, samples/, tensorboard/, curve.png, checkpoints/")
  return 0


if __name__ == "__main__":
  sys.exit(main())
