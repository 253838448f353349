"""Measures greedy accuracy, unbiased pass@k and maj@k, and lengths, all with standard errors.

python -m grpo_jax.evaluate --workdir DIR [--before]             # a trained run
python -m grpo_jax.evaluate --config experiments/X.py            # its model, untrained
python -m grpo_jax.evaluate ... --keep 0.2:0.8 --out FILE.jsonl  # problems by their pass rate

Numbers and completions are kept in DIR/eval, or in the folder that --out names. With --keep, the
problems of a split whose pass rate lies in the range are written to FILE.jsonl, and nothing else is
done; an interrupted command continues.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from grpo_jax import addresses, extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("train", "grpo_jax.evaluate")

import jax
import numpy as np

from grpo_jax.distributed import hosts
from grpo_jax.distributed import mesh as meshes
from grpo_jax.environments.base import EnvironmentFault
from grpo_jax.environments.workers import WorkerError
from grpo_jax.episodes import Episodes
from grpo_jax.rollout import columns_of, generate, ids_of, records
from grpo_jax.run import console
from grpo_jax.sampling.filters import TokenFilter
from grpo_jax.sampling.sampler import Sampler
from grpo_jax.tasks.base import Example, Task
from grpo_jax.tasks.rewards.answers import normalize
from grpo_jax.tasks.rewards.logs import TrainerState
from grpo_jax.tasks.rewards.scoring import RewardError
from grpo_jax.tasks.rewards.workers import Scorer, score_in_process


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Holds metrics by name (each `x` with its standard error `x_se`) and their completions."""

  metrics: dict[str, float]
  samples: list[dict[str, Any]]


def evaluate(
  sampler: Sampler,
  params: Any,
  task: Task,
  examples: Sequence[Example],
  *,
  samples: int = 0,
  temperature: float | None = None,
  token_filter: TokenFilter | None = None,
  batch_prompts: int = 50,
  key: jax.Array | None = None,
  scorer: Scorer | None = None,
) -> Evaluation:
  """Measures greedy accuracy and lengths; pass@k and maj@k for k = 1, 2, 4, ... and `samples`.

  Of episodes also the number of turns. An episode whose environment failed counts as wrong, and in
  `eval/missing`.

  Accuracy is the task's strict rule, 1.0 or nothing. A completion on which the rule hangs or dies,
  or raises where that does not end the run, counts as wrong, and in `eval/missing`. maj@k needs
  `Task.answer`, and k above 2. Standard errors are over problems. The last batch is padded with
  repeated prompts that are not counted, so that one program is enough. On several hosts each host
  answers and scores its share of a batch, and all of them return the metrics and samples of all.

  Args:
    params: in the sampler's layout.
    samples: completions per problem for pass@k and maj@k; 0 is greedy only.
    temperature: of these completions; None takes the sampler's.
    token_filter: restricts these completions to probable tokens; None takes all tokens.
    batch_prompts: prompts per call of the sampler.
    key: random key of these completions.
    scorer: calls the task's rule; None calls it in this process, without a time limit.

  Raises:
    ValueError: there are no examples.
  """
  if not examples:
    raise ValueError(f"task {task.name!r} has no problems to evaluate on: its split is empty")
  scorer = score_in_process(task) if scorer is None else scorer

  def answers(group: int, key: jax.Array, **how: Any) -> Answers:
    batches = answer(sampler, params, task, examples, scorer, group, how, batch_prompts, key)
    return Answers.concatenate([*batches])

  greedy = answers(1, jax.random.key(0), temperature=0.0)
  metrics = {
    "eval/n": float(len(examples)),
    **_mean("eval/accuracy", greedy.right[:, 0]),
    **_mean("eval/mean_length", greedy.lengths[:, 0]),
    **_mean("eval/clipped_ratio", ~greedy.ended[:, 0]),
  }
  if task.environment is not None:
    metrics |= _mean("eval/turns", greedy.turns[:, 0])
  missing, records_ = greedy.missing, greedy.samples
  if samples:
    how: dict[str, Any] = {"temperature": temperature}
    if token_filter is not None:
      how["token_filter"] = token_filter
    more = answers(samples, jax.random.key(0) if key is None else key, **how)
    missing, records_ = missing + more.missing, records_ + more.samples
    metrics["eval/samples"] = float(samples)
    sizes = _sizes(samples)
    for k in sizes:
      passed = [pass_at_k(samples, int(row.sum()), k) for row in more.right]
      metrics |= _mean(f"eval/pass@{k}", passed)
    for k in _vote_sizes(samples) if task.answer else []:
      right = [maj_at_k(*row, k) for row in zip(more.votes, more.right)]
      metrics |= _mean(f"eval/maj@{k}", right)
  return Evaluation(metrics | {"eval/missing": float(missing)}, records_)


def metric_names(samples: int, *, votes: bool, episodes: bool = False) -> set[str]:
  """Returns the names of the metrics of an evaluation.

  Args:
    samples: completions per problem for pass@k and maj@k.
    votes: the task extracts answers, over which maj@k takes the majority.
    episodes: the task has an environment.

  Example:
    >>> sorted(name for name in metric_names(3, votes=True) if "@" in name and "_se" not in name)
    ['eval/maj@3', 'eval/pass@1', 'eval/pass@2', 'eval/pass@3']
  """
  means = ["eval/accuracy", "eval/mean_length", "eval/clipped_ratio"]
  means += ["eval/turns"] if episodes else []
  if samples:
    means += [f"eval/pass@{k}" for k in _sizes(samples)]
    means += [f"eval/maj@{k}" for k in _vote_sizes(samples) if votes]
  others = ("eval/n", "eval/missing", *(("eval/samples",) if samples else ()))
  return {*means, *(f"{name}_se" for name in means), *others}


def pass_at_k(n: int, correct: int, k: int) -> float:
  """Estimates without bias the chance that one of k samples is right: `1 - C(n-c, k) / C(n, k)`.

  Args:
    n: number of samples.
    correct: number of right ones among them, c.
    k: number of samples allowed.

  Raises:
    ValueError: unless 1 <= k <= n and 0 <= correct <= n.

  References:
    Chen et al. 2021, arXiv 2107.03374, eq. 1.

  Example:
    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
  """
  if not 1 <= k <= n or not 0 <= correct <= n:
    raise ValueError(f"need 1 <= k <= n and 0 <= correct <= n, got n={n}, correct={correct}, k={k}")
  return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[Hashable | None], right: Sequence[float], k: int) -> float:
  """Estimates without bias the chance that the most frequent answer of k samples is right.

  The estimate is the mean over n // k disjoint runs of k consecutive samples; the remaining samples
  are not used. In a run the most frequent answer wins, and of equally frequent ones the first. It
  is as right as the first sample that gives it.

  Args:
    votes: answer of each of n samples; None is no vote.
    right: verdict on each sample, 1.0 or 0.0.
    k: samples per run.

  Raises:
    ValueError: unless 1 <= k <= n and both sequences have n entries.

  Example:
    >>> maj_at_k(["a", "b", "b", "c", "d", None], [1, 0, 0, 1, 0, 0], k=3)
    0.5
  """
  if not 1 <= k <= len(votes) or len(votes) != len(right):
    raise ValueError(f"need 1 <= k <= n, got k={k} and {len(votes)} votes, {len(right)} verdicts")
  won = []
  for start in range(0, len(votes) - k + 1, k):
    run = list(votes[start : start + k])
    counts = Counter(vote for vote in run if vote is not None)
    # Of equal counts, `most_common` gives the one that was met first.
    winner = counts.most_common(1)[0][0] if counts else None
    won.append(float(right[start + run.index(winner)]) if counts else 0.0)
  return sum(won) / len(won)


def standard_error(values: np.ndarray) -> float:
  """Returns the standard error of the mean of independent values; NaN for fewer than two."""
  return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def table(
  metrics: Mapping[str, float],
  title: str,
  before: Mapping[str, float] | None = None,
  *,
  unit: str = "problems",
) -> str:
  """Formats metrics with their standard errors as lines of text, beside those of `before`.

  Args:
    unit: what `eval/n` counts.

  Example:
    >>> print(table({"eval/n": 4.0, "eval/accuracy": 0.5, "eval/accuracy_se": 0.25}, "sums"))
    sums (n = 4 problems)
      accuracy         0.500 ± 0.250
  """
  columns = [metrics] if before is None else [before, metrics]
  lines = [f"{title} (n = {metrics['eval/n']:.0f} {unit})"]
  if before is not None:
    lines.append(f"  {'':<16} {'before':<18} after")
  for name in dict.fromkeys(name for column in columns for name in column):
    hidden = name == "eval/missing" and not any(column.get(name) for column in columns)
    if name.endswith("_se") or name in ("eval/n", "eval/samples") or hidden:
      continue
    cells = "".join(f"{_cell(column, name):<19}" for column in columns)
    lines.append(f"  {name.removeprefix('eval/'):<16} {cells}".rstrip())
  return "\n".join(lines)


def write(folder: str | Path, name: str, record: Mapping[str, Any], samples: Sequence[Any]) -> Path:
  """Writes `name`.json (the metrics) and `name`_samples.jsonl, one completion a line."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  lines = "".join(json.dumps(sample) + "\n" for sample in samples)
  (folder / f"{name}_samples.jsonl").write_text(lines, encoding="utf-8")
  path = folder / f"{name}.json"
  path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
  return path


# --- parts ----------------------------------------------------------------------------------------


def _sizes(samples: int) -> list[int]:
  """Returns the k of pass@k: powers of 2, and all samples."""
  return sorted({*(2**i for i in range(samples.bit_length())), samples})


def _vote_sizes(samples: int) -> list[int]:
  """Returns the k of maj@k; two votes decide nothing."""
  return [k for k in _sizes(samples) if k > 2]


@dataclasses.dataclass(frozen=True)
class Answers:
  """Completions of n problems, G each: arrays [n, G], votes [n][G], one sample per completion."""

  right: np.ndarray
  lengths: np.ndarray
  ended: np.ndarray
  turns: np.ndarray
  votes: list[list[Hashable | None]]
  missing: int
  samples: list[dict[str, Any]]

  @classmethod
  def concatenate(cls, parts: "Sequence[Answers]") -> "Answers":
    """Returns the answers to the problems of all parts, in their order."""
    fields = zip(*((p.right, p.lengths, p.ended, p.turns) for p in parts))
    arrays = [np.concatenate(field) for field in fields]
    votes = [row for part in parts for row in part.votes]
    samples = [sample for part in parts for sample in part.samples]
    return cls(*arrays, votes, sum(part.missing for part in parts), samples)

  def of_all_hosts(self) -> "Answers":
    """Gathers the problems of all hosts, in their order."""
    arrays = hosts.gathered(
      right=self.right, lengths=self.lengths, ended=self.ended, turns=self.turns,
      missing=np.array([self.missing]),
    )  # fmt: skip
    missing = int(arrays.pop("missing").sum())
    votes, samples = map(hosts.gathered_json, (self.votes, self.samples))
    return Answers(**arrays, votes=votes, missing=missing, samples=samples)


def answer(
  sampler: Sampler,
  params: Any,
  task: Task,
  examples: Sequence[Example],
  scorer: Scorer,
  group: int,
  how: Mapping[str, Any],
  batch_prompts: int,
  key: jax.Array,
  first: int = 0,
) -> Iterator[Answers]:
  """Yields `group` judged completions of each example, one batch after another.

  Args:
    how: `temperature` and `token_filter` of the sampler.
    first: index of the first example to answer. Its completions are those that it has after the
      examples before it.
  """
  index, host_count = hosts.own_shard()
  unit = meshes.prompt_shards(getattr(sampler, "prompt_sharding", None))
  share = -(-batch_prompts // unit) * unit // host_count
  for start in range(first, len(examples), share * host_count):
    own = start + index * share
    part = list(examples[own : own + share])
    n = len(part)
    padded = part + [examples[-1]] * (share - n)
    prompts = [example.prompt for example in padded]
    out = generate(sampler, params, padded, key, group_size=group, first_prompt=start, **how)
    texts, lengths = out.texts[:n], out.lengths[:n]
    episodes = out if isinstance(out, Episodes) else None
    turns = np.ones((n, group)) if episodes is None else episodes.turns[:n]
    failed = np.zeros((n, group), bool) if episodes is None else episodes.failed[:n]
    right, missing = np.zeros((0, group)), 0
    with hosts.together("scoring the answers"):
      if n:
        ids = (ids_of(out) or [])[:n] or None
        scores = scorer(prompts[:n], texts, columns_of(part), lengths, ids=ids, rewards=False)
        right = np.where(failed, 0.0, np.nan_to_num(scores.accuracy, nan=0.0))
        missing = scores.missing + scores.raised + int(failed.sum())
      votes = [[_vote(task, text) for text in row] for row in texts] if group > 1 else []
    samples = records(part, texts, accuracy=right, length=lengths, ended=out.ended[:n])
    if episodes is not None:
      played = [turns for line in episodes.transcripts[:n] for turns in line]
      samples = [row | {"turns": each} for row, each in zip(samples, played)]
    yield Answers(right, lengths, out.ended[:n], turns, votes, missing, samples).of_all_hosts()


def _vote(task: Task, text: str) -> Hashable | None:
  answer = task.answer(text) if task.answer else None
  return normalize(answer) if isinstance(answer, str) else answer


def _mean(name: str, values: Any) -> dict[str, float]:
  values = np.asarray(values, np.float64)
  return {name: float(values.mean()), f"{name}_se": standard_error(values)}


def _cell(metrics: Mapping[str, float], name: str) -> str:
  if name not in metrics:
    return "-"
  error = metrics.get(f"{name}_se", math.nan)
  return f"{metrics[name]:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _sampling_record(run: Any) -> dict[str, float]:
  """Returns the temperature and the filter of the completions for pass@k."""
  how = run.evaluation_sampling()
  token_filter = dataclasses.asdict(how["token_filter"])
  return {"temperature": how["temperature"], **token_filter}


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
  """Replaces NaN and infinity, which JSON does not have, by None."""
  return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


# --- the command ----------------------------------------------------------------------------------


@console.guarded()
def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  from grpo_jax import config

  parser = argparse.ArgumentParser(prog="python -m grpo_jax.evaluate", description=__doc__)
  parser.add_argument("--workdir", help="a work directory: its config, and its newest checkpoint")
  parser.add_argument("--config", help="an experiment file, for its model before training")
  parser.add_argument("--before", action="store_true", help="with --workdir: the start as well")
  parser.add_argument(
    "--samples", type=config.at_least(0), default=8, help="completions per problem for pass@k"
  )
  parser.add_argument(
    "--out",
    help="folder for numbers and completions; DIR/eval with --workdir. With --keep: FILE.jsonl",
  )
  parser.add_argument(
    "--keep", metavar="LOW:HIGH", help="write the problems whose pass rate is from LOW to HIGH"
  )
  parser.add_argument("--split", help="of the problems of --keep; default: train")
  parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
  arguments, overrides = parser.parse_known_args(argv)
  with contextlib.ExitStack() as stack:
    return _run(arguments, overrides, stack)


def _run(arguments: argparse.Namespace, overrides: list[str], stack: contextlib.ExitStack) -> int:
  """Runs the command; `stack` holds a copy of a work directory on a store."""
  from grpo_jax.build import build
  from grpo_jax.run import mirror

  shown = arguments.workdir
  try:
    if arguments.out:
      arguments.out = addresses.local(arguments.out, "--out")
    selection = _selection(arguments)
    shown = arguments.workdir and mirror.place_of(arguments.workdir)
    settings = _settings(arguments, overrides, stack)
    run = build(settings)
    if selection is None and not run.task.splits["eval"]:
      raise ValueError(f"task {run.task.name!r} holds nothing out: its split 'eval' is empty")
    stages = _stages(arguments, run)
  except (ValueError, FileNotFoundError) as error:
    print(f"error: {str(error).replace(str(arguments.workdir), str(shown))}", file=sys.stderr)
    return 2
  if selection is not None:
    arguments.workdir = shown
    return _keep(selection, run, stages, arguments)
  folder = arguments.out or (arguments.workdir and Path(arguments.workdir) / "eval")
  about = {"model": settings.model.source, "task": run.task.name, "split": "eval"}
  metrics: list[dict[str, float]] = []
  with run.matmul_precision(), run.scorer() as scorer:
    for step, params in stages.items():
      try:
        result = evaluate(
          run.sampler,
          run.to_sampling_params(params),
          run.task,
          run.task.splits["eval"],
          samples=arguments.samples,
          **run.evaluation_sampling(),
          batch_prompts=settings.eval.batch_prompts,
          key=jax.random.key(settings.seed),
          scorer=partial(scorer, state=TrainerState(step, settings.steps)),
        )
      except (RewardError, EnvironmentFault, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
      metrics.append(result.metrics)
      record = {**about, "step": step, **_sampling_record(run), **_plain(result.metrics)}
      if folder:
        write(folder, f"step_{step:06d}", record, result.samples)
  if not arguments.out and not addresses.is_path(shown):
    try:
      mirror.put_files(addresses.parse(shown), folder, "eval")
    except ValueError as error:
      print(f"error: {error}; or keep the numbers with --out FOLDER", file=sys.stderr)
      return 2
  before = metrics[0] if len(metrics) > 1 else None
  if arguments.json:
    print(json.dumps(record | ({"before": _plain(before)} if before else {})))
  else:
    where = f"{shown} after {step} steps" if arguments.workdir else about["model"]
    print(table(result.metrics, f"{where} on {run.task.name}, held out", before))
  return 0


def _selection(arguments: argparse.Namespace) -> Any:
  """Returns the `pass_rates.Selection` of --keep; None without it."""
  from grpo_jax import pass_rates

  if arguments.keep is None:
    if arguments.split is not None:
      raise ValueError(f"--split is {arguments.split!r}: it goes with --keep; leave it out")
    return None
  if arguments.before:
    raise ValueError("--before does not go with --keep, which measures one model; leave it out")
  return pass_rates.Selection.parse(
    arguments.keep, arguments.samples, arguments.out, arguments.split
  )


def _keep(selection: Any, run: Any, stages: Mapping[int, Any], arguments: Any) -> int:
  """Measures pass rates and writes the problems in the range; returns the exit code."""
  from grpo_jax import pass_rates

  c, [(step, params)] = run.config, stages.items()
  log = partial(print, file=sys.stderr, flush=True)
  try:
    examples = selection.problems(run.task.splits)
    about = _completions_record(run, selection, step, arguments.workdir)
    rates = pass_rates.Rates(pass_rates.rates_of(selection.path), about, selection.samples)
    with run.matmul_precision(), run.scorer() as scorer:

      def answers(first: int) -> Iterator[Answers]:
        return answer(
          run.sampler,
          run.to_sampling_params(params),
          run.task,
          examples,
          partial(scorer, state=TrainerState(step, c.steps)),
          selection.samples,
          run.evaluation_sampling(),
          c.eval.batch_prompts,
          jax.random.key(c.seed),
          first,
        )

      pass_rates.measure(answers, rates, len(examples), log)
    log(pass_rates.histogram(selection, rates.right))
    count = pass_rates.write(selection, rates.right, examples, c.chat.system)
  except (ValueError, RewardError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"stopped; the same command continues {pass_rates.rates_of(selection.path)}")
    return 130
  if arguments.json:
    print(json.dumps({"problems": len(examples), "kept": count, "missing": rates.missing}))
  else:
    print(f"kept {count} of {len(examples)} problems, in {selection.path}")
    if rates.missing:
      print(f"{rates.missing} completions could not be judged, and count as wrong")
  return 0


def _completions_record(run: Any, selection: Any, step: int, workdir: Any) -> dict[str, Any]:
  """Returns everything that the completions of a split and their verdicts depend on."""
  from grpo_jax import config
  from grpo_jax.run import identity

  saved = config.to_saved(run.config)
  groups = {name: saved[name] for name in ("task", "chat", "lora", "episode")}
  fields = ("prompt_length", "completion_length", "overlong", "stop", "stop_ids")
  return {
    "model": run.config.model.source,
    "dtype": run.config.model.dtype,
    "workdir": workdir and str(workdir),
    "step": step,
    "split": selection.split,
    "samples": selection.samples,
    "seed": run.config.seed,
    "sampling": _sampling_record(run),
    **groups,
    "rollout": {name: saved["rollout"][name] for name in fields},
    "files": identity.digests(run.task.files, {}),
  }


def _stages(arguments: argparse.Namespace, run: Any) -> dict[int, Any]:
  """Returns trained parameters by step: the start if asked for, and a run's newest checkpoint."""
  from grpo_jax.run import reading

  params = run.initial_state().params
  stages = {0: params} if arguments.config or arguments.before else {}
  if arguments.workdir:
    step, params = reading.read_params(arguments.workdir, like=params)
    stages[step] = params
  return stages


def _settings(
  arguments: argparse.Namespace, overrides: list[str], stack: contextlib.ExitStack
) -> Any:
  """Returns the config of the experiment or of the run; copies a work directory on a store."""
  from grpo_jax import config
  from grpo_jax.run import mirror, workdir

  if (arguments.workdir is None) == (arguments.config is None):
    raise ValueError("give --workdir (a run) or --config (an experiment), one of them")
  if arguments.config:
    return config.load(arguments.config, overrides)
  arguments.workdir = stack.enter_context(
    mirror.fetched(arguments.workdir, mirror.top_level, checkpoints=True)
  )
  saved = workdir.read_config(arguments.workdir)
  if saved is None:
    raise ValueError(f"{arguments.workdir} holds no {workdir.CONFIG}: not a work directory")
  where = arguments.workdir / workdir.CONFIG
  return config.override(config.from_saved(saved, where), overrides)


if __name__ == "__main__":
  sys.exit(main())
