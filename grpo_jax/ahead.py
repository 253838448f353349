"""Gives the rollouts of a run; samples them ahead of the updates, on a fixed schedule.

With `rollout.ahead = k`, the rollout of step n has the parameters after step n - k (the first k
have the initial ones). It is sampled and scored while earlier updates run. Which parameters a
rollout has depends on its number alone and not on how long anything took, so a run gives the same
bits again.

Two threads wait while the main one goes on: one for completions, which it decodes, and one for
rewards. Programs are started by the main thread, in a fixed order. Episodes are played turn by
turn, by the first of these threads, so that updates run while environments are waited for. Where
several devices both sample and learn, the main thread plays them: programs that two threads start
could wait for each other there.

A checkpoint after n steps holds the completions of rollouts n to n + k - 1, not the parameters that
they are from. A resumed run scores them again. The last steps sample beyond the end, so that a run
that is made longer is the one that was that long from the start.
"""

import contextlib
import dataclasses
import io
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.build import Run
from grpo_jax.distributed import hosts
from grpo_jax.episodes import Episodes, EpisodeSampler
from grpo_jax.learning.batch import laid_out
from grpo_jax.learning.step import Batch, TrainState
from grpo_jax.models.protocol import Params
from grpo_jax.partial import Pool
from grpo_jax.rollout import Rollout, Scored, assemble, begin, collect, score
from grpo_jax.sampling.sampler import Generated
from grpo_jax.tasks.base import Example
from grpo_jax.tasks.rewards.logs import TrainerState
from grpo_jax.tasks.rewards.workers import Scorer

_JSON = "json"  # name of the bytes that hold the texts of a draw


@dataclasses.dataclass
class Ahead:
  """Holds one rollout that has begun.

  Attributes:
    version: number of steps that its parameters had seen.
    draw: number of a draw -> the examples of this host.
    counts: of a curriculum, before the first draw.
    params: parameters of the sampler, if there may be further draws.
    generated, scored: one per draw, each in a thread.
    seconds: metrics of the time.
    rollout: the result, once all draws are done.
  """

  version: int
  draw: Callable[[int], Sequence[Example]]
  counts: np.ndarray | None = None
  params: Params = None
  generated: "list[Future[Generated]]" = dataclasses.field(default_factory=list)
  scored: "list[Future[Scored]]" = dataclasses.field(default_factory=list)
  seconds: dict[str, float] = dataclasses.field(
    default_factory=lambda: {"time/sampling": 0.0, "time/rewards": 0.0}
  )
  rollout: Rollout | None = None


class Rollouts:
  """Gives the rollouts of a run in order, each begun `rollout.ahead` steps before it is needed.

  With `rollout.partial_tokens`, a `partial.Pool` samples them. Use it as a context manager, inside
  that of the scorer. All hosts call its methods alike.

  Args:
    run: the run.
    scorer: scores completions; it is called by one thread at a time.
  """

  def __init__(self, run: Run, scorer: Scorer) -> None:
    self._run, self._scorer, self._ahead = run, scorer, run.config.rollout.ahead
    self._rollouts: dict[int, Ahead] = {}
    self._pool = Pool(run) if run.config.rollout.partial_tokens else None
    self._sampling, self._scoring = _Worker(run), _Worker(run)

  def take(self, step: int, state: TrainState) -> Rollout:
    """Returns the rollout of a step, after beginning those that are due with the parameters of now.

    Args:
      step: number of the step.
      state: the state before it.

    Raises:
      RewardError, EnvironmentFault, WorkerError: as in `rollout.collect`. The rollout stays, so
        that it can be saved and scored again.
    """
    run = self._run
    if self._pool is not None:
      return self._pool.take(step, state, self.scorer(step))
    if not self._ahead:
      examples, config = run.examples(step, state.counts), run.rollout_at(step)
      # Given completions need no sampler.
      params = None if config.given else run.to_rollout_params(state.params)
      return collect(run.sampler, params, examples, self.scorer(step), run.key(step), config)
    due = range(step, step + self._ahead + 1)
    if new := [number for number in due if number not in self._rollouts]:
      params = run.to_rollout_params(state.params)
      for number in new:
        self._begin(number, Ahead(step, run.examples(number, state.counts), state.counts), params)
    start = time.monotonic()
    _wait(self._rollouts[step].scored)
    waited = time.monotonic() - start
    rollout = self._complete(step)
    age = step - self._rollouts.pop(step).version
    return dataclasses.replace(
      rollout,
      batch=_with_staleness(rollout.batch, age, run.rollout.batch_sharding),
      metrics=rollout.metrics | {"time/waiting": waited},
    )

  def scorer(self, step: int) -> Scorer:
    """Returns the scorer for this thread, once no other uses it; rewards see `step`."""
    for ahead in self._rollouts.values():
      _wait(ahead.scored)
    return partial(self._scorer, state=TrainerState(step, self._run.steps))

  def saved(self) -> dict[str, np.ndarray]:
    """Returns the rollouts that have begun, as bytes that are alike on all hosts.

    It waits for the sampler, and with `rollout.max_resamples` also for rewards and further draws,
    whose parameters are not saved. One that could not be sampled is left out.
    """
    saved = {} if self._pool is None else self._pool.saved()
    for step, ahead in self._rollouts.items():
      if self._run.rollout.max_resamples:
        with contextlib.suppress(Exception):  # it is raised again when this rollout is due
          self._complete(step)
      if not any(future.exception() for future in ahead.generated):
        saved[str(step)] = _packed(ahead)
    return saved

  def restore(self, saved: Mapping[str, np.ndarray]) -> None:
    """Takes up the rollouts of a checkpoint: their completions are scored again."""
    if self._pool is not None:
      self._pool.restore(saved)
    if not self._ahead:
      return
    for step, content in sorted((int(step), content) for step, content in saved.items()):
      version, counts, draws = _unpacked(content)
      ahead = Ahead(version, self._run.examples(step, counts), counts)
      self._rollouts[step] = ahead
      for number, generated in enumerate(draws):
        out: Future[Generated] = Future()
        out.set_result(generated)
        self._score(step, list(ahead.draw(number)), out)

  def __enter__(self) -> "Rollouts":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if self._pool is not None:
      self._pool.close()
    # A second Ctrl-C waits for nothing; otherwise the scorer must be free before it is closed.
    for worker in (self._sampling, self._scoring):
      worker.close(wait=kind is not KeyboardInterrupt)

  # --- parts --------------------------------------------------------------------------------------

  def _begin(self, step: int, ahead: Ahead, params: Params) -> None:
    """Begins the first draw of a rollout."""
    self._rollouts[step] = ahead
    try:
      self._sample(step, 0, params)
    except BaseException:
      del self._rollouts[step]
      raise
    if self._run.rollout.max_resamples:
      ahead.params = params

  def _sample(self, step: int, number: int, params: Params) -> None:
    """Starts the sampler for a draw, and hands what follows to the threads."""
    run, ahead = self._run, self._rollouts[step]
    with hosts.together("reading the examples"):
      examples = list(ahead.draw(number))
    first, start = number * len(examples) * hosts.own_shard()[1], time.monotonic()
    group = run.rollout.group_size
    finish = begin(
      run.sampler, params, examples, run.key(step), group_size=group, first_prompt=first
    )
    plays_here = isinstance(run.sampler, EpisodeSampler) and not self._plays_in_thread()
    played = finish() if plays_here else None

    def generate() -> Generated:
      out = finish() if played is None else played
      ahead.seconds["time/sampling"] += time.monotonic() - start
      return out

    self._score(step, examples, self._sampling.submit(generate))

  def _plays_in_thread(self) -> bool:
    """Returns whether a thread may start programs beside the main one.

    It may on devices of its own, and on a single device. On several, the collectives of two
    programs would wait for each other if devices began them in different orders.
    """
    run = self._run
    own = run.has_rollout_devices or run.mesh.devices.size == 1
    return own and jax.process_count() == 1

  def _score(self, step: int, examples: list[Example], out: "Future[Generated]") -> None:
    """Scores a draw in a thread, once it is sampled."""
    run, ahead = self._run, self._rollouts[step]
    scorer = partial(self._scorer, state=TrainerState(step, run.steps))
    options = {"step_rewards": run.rollout.step_rewards, "tokenizer": run.sampler.tokenizer}

    def scored() -> Scored:
      generated, start = out.result(), time.monotonic()
      result = score(scorer, examples, generated, **options)
      ahead.seconds["time/rewards"] += time.monotonic() - start
      return result

    ahead.generated.append(out)
    # Rollouts after the last step are there to be saved, for a run that is made longer.
    if step < run.steps or run.rollout.max_resamples:
      ahead.scored.append(self._scoring.submit(scored))

  def _complete(self, step: int) -> Rollout:
    """Returns a rollout once all of its draws are scored; draws again where that is needed."""
    ahead, run = self._rollouts[step], self._run
    if ahead.rollout is None:

      def sample(number: int) -> Scored:
        if number == len(ahead.scored):
          self._sample(step, number, ahead.params)
        with hosts.together("scoring the completions"):
          return ahead.scored[number].result()

      # A rollout of a checkpoint has all of its draws; the parameters for more are gone.
      draws = None if ahead.params is not None else len(ahead.scored)
      seconds, config = ahead.seconds, run.rollout_at(step)
      rollout = assemble(sample, run.sampler, config, seconds, draws)
      rollout = dataclasses.replace(rollout, drawn_from=ahead.counts)
      ahead.rollout, ahead.params = rollout, None
    return ahead.rollout


def _packed(ahead: Ahead) -> np.ndarray:
  """Returns the draws of a rollout, of all hosts, as the bytes of an archive."""
  arrays = {"version": np.array(ahead.version)}
  if ahead.counts is not None:
    arrays["counts"] = ahead.counts
  for number, future in enumerate(ahead.generated):
    draw = generated_to_arrays(future.result())
    arrays |= {f"{number}/{name}": array for name, array in draw.items()}
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return np.frombuffer(buffer.getvalue(), np.uint8)


def _unpacked(content: np.ndarray) -> tuple[int, np.ndarray | None, list[Generated]]:
  """Returns (version, counts, draws) of what `_packed` returned."""
  with np.load(io.BytesIO(content.tobytes()), allow_pickle=False) as archive:
    arrays = dict(archive)
  draws: dict[str, dict[str, np.ndarray]] = {}
  for name, array in arrays.items():
    number, slash, field = name.partition("/")
    if slash:
      draws.setdefault(number, {})[field] = array
  generated = [generated_from_arrays(draws[str(i)]) for i in range(len(draws))]
  return int(arrays["version"]), arrays.get("counts"), generated


def generated_to_arrays(out: Generated) -> dict[str, np.ndarray]:
  """Returns completions or episodes of all hosts as arrays; the rest becomes bytes of JSON."""
  fields = vars(out)
  arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
  rows = {name: value for name, value in fields.items() if isinstance(value, list)}
  rest = {name: value for name, value in fields.items() if name not in {*arrays, *rows}}
  rows = {name: hosts.gathered_json(value) for name, value in rows.items()}
  text = json.dumps({"rows": rows, "rest": rest}).encode()
  return hosts.gathered(**arrays) | {_JSON: np.frombuffer(text, np.uint8)}


def generated_from_arrays(arrays: Mapping[str, np.ndarray]) -> Generated:
  """Returns this host's rows of what `generated_to_arrays` returned."""
  index, count = hosts.own_shard()

  def own(values: Any) -> Any:
    size = len(values) // count
    return values[index * size : (index + 1) * size]

  saved = json.loads(arrays[_JSON].tobytes())
  rows = {name: own(value) for name, value in saved["rows"].items()}
  rows |= {name: own(value) for name, value in arrays.items() if name != _JSON}
  kind = Episodes if "attended" in rows else Generated
  return kind(**rows, **saved["rest"])


def _with_staleness(batch: Batch, age: int, layout: Any) -> Batch:
  return dataclasses.replace(batch, staleness=_per_prompt(batch.mask, age, layout))


@partial(jax.jit, static_argnames="layout")
def _per_prompt(mask: jax.Array, number: int, layout: Any) -> jax.Array:
  return laid_out(jnp.full(mask.shape[0], number, jnp.float32), layout)


def _wait(futures: Sequence[Future]) -> None:
  """Waits for the results; errors are raised where the results are used."""
  for future in list(futures):
    if not future.cancelled():
      future.exception()


class _Worker:
  """Calls functions in their order, in one thread that does not keep the process alive."""

  def __init__(self, run: Run) -> None:
    self._run = run
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._thread: threading.Thread | None = None
    self._closed = False

  def submit(self, function: Callable[[], Any]) -> Future:
    """Returns the future result of a function."""
    if self._thread is None:
      self._thread = threading.Thread(target=self._work, daemon=True)
      self._thread.start()
    future: Future = Future()
    self._queue.put((function, future))
    return future

  def close(self, wait: bool) -> None:
    """Drops the functions that have not begun, and may wait for the one that has."""
    self._closed = True
    self._queue.put(None)
    if wait and self._thread is not None:
      self._thread.join()

  def _work(self) -> None:
    with self._run.matmul_precision():  # it is a setting of the thread
      while (item := self._queue.get()) is not None:
        function, future = item
        if self._closed:
          future.cancel()
          continue
        try:
          future.set_result(function())
        except BaseException as error:
          future.set_exception(error)
