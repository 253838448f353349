"""Judges a run by its metrics: what is wrong, why, and what to do next.

Each entry of `CHECKS` looks for one illness. `python -m grpo_jax.doctor` shows what they find, and
a run looks at itself with a `Watcher`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.core.diagnosis import (
  KL,
  LOW_ENTROPY,
  MISMATCH,
  NO_VARIANCE,
  TRUNCATED,
  Finding,
  by_confidence,
  level_of,
)

WINDOW = 10  # steps that say how a run is now
OFTEN = 100  # rows after which a run is looked at every WINDOW rows
FEWEST = 5  # steps before which no share is a finding
ENOUGH = 15  # steps after which a reward that has not risen is a finding
SURE = 40  # steps after which it is a sure one
LEARNED = 0.9  # accuracy from which a policy need not get better
MOST = 400  # values of a series that a trend is computed from
RISING = 2.0  # standard deviations of Mann and Kendall's statistic
NOTICED = 1.0  # seconds of rewards in a step, below which nobody minds
FAR_CLIPPED = 10.0  # gradient norms in units of the norm that they are clipped to


class History:
  """Holds the metrics of a run as series over its steps.

  Args:
    rows: lines of metrics.jsonl; those of evaluations and of training may be mixed.
    config: of the run.
  """

  def __init__(self, rows: Sequence[dict[str, Any]], config: ConfigDict) -> None:
    self.config = config
    self.rows = [row for row in rows if "reward" in row]
    self.evaluations = [row for row in rows if "eval/accuracy" in row]

  @property
  def steps(self) -> int:
    """Number of training steps."""
    return len(self.rows)

  def series(self, name: str) -> np.ndarray:
    """Returns a metric by step, without the steps that lack it or have no finite value."""
    rows = self.evaluations if name.startswith("eval/") else self.rows
    values = np.array([np.nan if row.get(name) is None else row[name] for row in rows], float)
    return values[np.isfinite(values)]

  def thirds(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and the last third of a metric."""
    values = self.series(name)
    count = len(values) // 3
    return values[:count], values[len(values) - count :]

  def now(self, name: str) -> float:
    """Returns the mean over the last steps; NaN if the run has no such metric."""
    values = self.series(name)[-WINDOW:]
    return float(values.mean()) if len(values) else np.nan

  @property
  def names(self) -> list[str]:
    """Names of the metrics of training."""
    return sorted({name for row in self.rows for name in row})

  def rises(self, name: str) -> float:
    """Returns Mann and Kendall's statistic of a metric: about N(0, 1) without a trend."""
    return mann_kendall(self.series(name))


def mann_kendall(values: np.ndarray) -> float:
  """Returns the number of pairs that rise minus those that fall, in standard deviations.

  Example:
    >>> round(mann_kendall(np.arange(10.0)), 2), mann_kendall(np.ones(10))
    (3.94, 0.0)
  """
  values = values[:: max(-(-len(values) // MOST), 1)]
  n = len(values)
  if n < 3:
    return 0.0
  total = np.sign(values[None, :] - values[:, None])[np.triu_indices(n, 1)].sum()
  deviation = np.sqrt(n * (n - 1) * (2 * n + 5) / 18)
  return float((total - np.sign(total)) / deviation) if total else 0.0


def examine(rows: Sequence[dict[str, Any]], config: ConfigDict) -> list[Finding]:
  """Returns what is wrong with a run by its metrics, the surest findings first.

  Args:
    rows: lines of metrics.jsonl.
    config: of the run.

  Example:
    >>> rows = [{"step": s, "reward": 0.0, "accuracy": 0.0, "frac_reward_zero_std": 1.0,
    ...          "grad_norm": 0.0} for s in range(20)]
    >>> from grpo_jax.config import default_config
    >>> [f.name for f in examine(rows, default_config())]
    ['no_signal', 'flat_reward']
  """
  history, names = History(rows, config), OF_GIVEN if config.rollout.given else CHECKS
  return by_confidence(CHECKS[name](history) for name in names) if history.steps else []


class Watcher:
  """Says each sure finding once, while a run goes on.

  Args:
    config: of the run.
    where: its work directory, for the command that explains a finding.
  """

  def __init__(self, config: ConfigDict, where: str | Path) -> None:
    self._config, self._where = config, where
    self._rows: list[dict[str, Any]] = []
    self._said: set[str] = set()

  def __call__(self, row: dict[str, Any]) -> list[str]:
    """Takes the metrics of a step or of an evaluation; returns lines to show."""
    self._rows.append(row)
    if len(self._rows) > OFTEN and len(self._rows) % WINDOW:
      return []
    new = [
      f
      for f in examine(self._rows, self._config)
      if f.confidence == "sure" and f.name not in self._said
    ]
    self._said.update(f.name for f in new)
    return [f"doctor: {f.seen} (python -m grpo_jax.doctor {self._where})" for f in new]


# --- rewards --------------------------------------------------------------------------------------


def no_signal(h: History) -> Finding | None:
  """Finds groups without two different rewards, while the answers are not right."""
  share, accuracy = h.now("frac_reward_zero_std"), h.now("accuracy")
  level = level_of(share, NO_VARIANCE)
  if not level or h.steps < FEWEST or accuracy > 0.5 or h.rises("reward") > RISING:
    return None
  wrong = accuracy < 0.1
  return Finding(
    "no_signal",
    f"in {share:.0%} of the groups all rewards are equal, and {accuracy:.1%} of the answers are "
    "right",
    "a group without two different rewards has no gradient: that is why the loss is 0",
    "look at samples/: is a right answer recognized? Then easier problems (`python -m "
    "grpo_jax.evaluate --keep 0.2:0.8`), examples in the prompt, a larger rollout.group_size, or "
    "partial rewards"
    if wrong
    else "data.curriculum=learnability, rollout.max_resamples, or a larger rollout.group_size",
    level,
    {"no_variance": share, "accuracy": accuracy},
  )


def solved(h: History) -> Finding | None:
  """Finds a run that goes on although nothing is left to learn."""
  share, accuracy = h.now("frac_reward_zero_std"), h.now("accuracy")
  left = h.config.steps - 1 - h.rows[-1]["step"]
  if not (share > 0.98 and accuracy > 0.98 and h.steps >= WINDOW and left > 0.3 * h.config.steps):
    return None
  return Finding(
    "solved",
    f"{accuracy:.1%} of the answers are right, and {left} steps are left",
    "every group is all right, so that no step changes the policy",
    'stop.when="eval/accuracy>0.98", or harder problems',
    "sure",
    {"accuracy": accuracy, "steps_left": float(left)},
  )


def flat_reward(h: History) -> Finding | None:
  """Finds a reward that has never risen."""
  n = len(h.series("reward"))
  if n < ENOUGH or h.now("accuracy") > LEARNED or h.rises("reward") > RISING or fallen_reward(h):
    return None
  first, last = h.thirds("reward")
  noise = float(np.hypot(first.std(ddof=1), last.std(ddof=1)) / np.sqrt(len(first)))
  drift = float(last.mean() - first.mean())
  if drift > 2 * noise and drift > 0:
    return None
  return Finding(
    "flat_reward",
    f"the reward has not risen in {n} steps: it moved by {drift:+.3f}, its noise is {noise:.3f}",
    "there is no signal (see other findings), or the noise of a step is larger than its progress",
    "more prompts per step or larger groups if the rewards of a group differ; a larger learning "
    "rate if entropy and lengths do not move either",
    "sure" if n >= SURE else "likely",
    {"drift": drift, "noise": noise, "trend": h.rises("reward")},
  )


def fallen_reward(h: History) -> Finding | None:
  """Finds a reward that fell far below its best."""
  rewards = h.series("reward")
  if len(rewards) < 2 * WINDOW:
    return None
  means = np.convolve(rewards, np.ones(WINDOW) / WINDOW, "valid")
  best, now = float(means.max()), float(means[-1])
  noise = float(rewards[-WINDOW:].std(ddof=1)) / np.sqrt(WINDOW)
  if not (best - now > 0.3 * abs(best) and best - now > 4 * noise):
    return None
  at = int(means.argmax()) + WINDOW
  return Finding(
    "fallen_reward",
    f"the reward was {best:.3f} around step {at} and is {now:.3f} now",
    "the updates are too large, so that the policy falls behind what it had learned",
    "go back to a checkpoint before, with a third of the learning rate",
    "sure",
    {"best": best, "now": now, "step": float(at)},
  )


def hacked(h: History) -> Finding | None:
  """Finds a reward that rises while the answers get worse."""
  first, last = h.thirds("accuracy")
  parts = [n for n in h.names if n.startswith("rewards/") and n.endswith("/mean")]
  rising = [n for n in parts if h.rises(n) > 3]
  if not rising or len(first) < 4 or h.rises("accuracy") > -RISING:
    return None
  before, after = float(first.mean()), float(last.mean())
  if not after < 0.8 * before:
    return None
  name = max(rising, key=h.rises)
  return Finding(
    "hacked",
    f"{name} rises while the share of right answers fell from {before:.2f} to {after:.2f}",
    "the policy found a way to that reward that is not a right answer",
    "read completions with a high reward; give the true reward a larger weight, or a KL term",
    "likely",
    {"before": before, "after": after},
  )


def not_general(h: History) -> Finding | None:
  """Finds held-out accuracy that stays while training accuracy rises."""
  held_out, errors = h.series("eval/accuracy"), h.series("eval/accuracy_se")
  first, last = h.thirds("accuracy")
  if len(held_out) < 2 or len(first) < 4:
    return None
  gain, rise = float(held_out[-1] - held_out[0]), float(last.mean() - first.mean())
  error = float(np.hypot(errors[-1], errors[0])) if len(errors) == len(held_out) else 0.0
  if not (rise > 0.2 and gain < max(2 * error, 0.02) and held_out[-1] < LEARNED):
    return None
  return Finding(
    "not_general",
    f"training accuracy rose by {rise:.2f}, held-out accuracy by {gain:.2f} (standard error "
    f"{error:.2f})",
    "the policy learns the training problems themselves, or the held-out ones are of another kind",
    "more training problems, fewer epochs, and a look at both splits",
    "likely",
    {"train": rise, "held_out": gain},
  )


def lost_rewards(h: History) -> Finding | None:
  """Finds completions whose rewards failed."""
  share, failed, raised = (
    h.now(name) for name in ("frac_unscored", "rewards/missing", "rewards/raised")
  )
  if not share > 0.05:
    return None
  return Finding(
    "lost_rewards",
    f"{share:.0%} of the completions have no reward; in a step, {failed:.1f} failed, and for "
    f"{raised:.1f} a reward function raised",
    "what is not scored teaches nothing, and failures are seldom spread evenly",
    "console.log names the errors; raise rewards.timeout if it is the time",
    "sure",
    {"unscored": share, "missing": failed, "raised": raised},
  )


# --- completions ----------------------------------------------------------------------------------


def truncated(h: History) -> Finding | None:
  """Finds completions that are cut off, in a run that does not get better."""
  share, accuracy = h.now("completions/clipped_ratio"), h.now("accuracy")
  level = level_of(share, TRUNCATED)
  if not level or h.steps < ENOUGH or accuracy > LEARNED or h.rises("reward") > RISING:
    return None
  if h.rises("completions/clipped_ratio") < -RISING:
    return None  # it is learning to end
  length = h.config.rollout.completion_length
  return Finding(
    "truncated",
    f"{share:.0%} of the completions are cut off at {length} tokens",
    "an answer that is cut off counts as wrong"
    + ("; none ends by itself, so the end-of-text token may not be known" if share == 1 else ""),
    "a larger rollout.completion_length, rollout.mask_truncated=true, or a stop string "
    "(rollout.stop)",
    level,
    {"truncated": share, "limit": float(length)},
  )


def longer_not_better(h: History) -> Finding | None:
  """Finds lengths that grow without reward."""
  first, last = h.thirds("completions/mean_length")
  if len(first) < 4 or h.rises("completions/mean_length") < 3 or h.rises("reward") > RISING:
    return None
  before, after = float(first.mean()), float(last.mean())
  if not after > 1.5 * before:
    return None
  return Finding(
    "longer_not_better",
    f"completions grew from {before:.0f} to {after:.0f} tokens, and the reward did not rise",
    "an average per sequence punishes a long wrong answer less than a short one",
    "an average that does not divide by the length (dr_grpo, dapo), or a penalty of length",
    "likely",
    {"before": before, "after": after},
  )


# --- the policy -----------------------------------------------------------------------------------


def low_entropy(h: History) -> Finding | None:
  """Finds an entropy that is gone, or will soon be, before the answers are right."""
  entropy, accuracy = h.series("entropy"), h.now("accuracy")
  recent = entropy[-WINDOW:]
  if len(recent) < WINDOW or accuracy > 0.6 or mann_kendall(h.series("reward")[-WINDOW:]) > 1:
    return None
  now = float(recent[-3:].mean())
  rate = float(np.polyfit(np.arange(WINDOW), np.log(np.maximum(recent, 1e-9)), 1)[0])
  steps = max(np.log(LOW_ENTROPY / max(now, 1e-9)) / rate, 0.0) if rate < 0 else np.inf
  if now > LOW_ENTROPY and steps > 2 * WINDOW:
    return None
  when = "" if now <= LOW_ENTROPY else f", and reaches {LOW_ENTROPY} in about {steps:.0f} steps"
  return Finding(
    "low_entropy",
    f"the entropy is {now:.3f} nats per token{when}, and {accuracy:.0%} of the answers are right",
    "the policy stops to explore before it has found what is right",
    "a lower learning rate, algorithm.clip_high=0.28, or an entropy bonus "
    "(algorithm.entropy_target)",
    "likely" if now <= LOW_ENTROPY else "possible",
    {"entropy": now, "accuracy": accuracy, "steps": float(min(steps, 1e6))},
  )


@dataclasses.dataclass(frozen=True)
class Limit:
  """Bounds a metric; what is beyond it in the last steps is a finding.

  Attributes:
    metric: its name.
    limits: from the first on a finding is likely, from the second on sure.
    seen: with `{}` in the place of the value.
    reason, advice: as in `Finding`.
  """

  metric: str
  limits: tuple[float, float]
  seen: str
  reason: str
  advice: str


LIMITS: dict[str, Limit] = {
  "far_from_reference": Limit(
    "kl",
    KL,
    "the KL divergence to the reference is {:.2g} nats per token",
    "the policy no longer writes like the model it came from",
    "a larger algorithm.beta, or a lower learning rate",
  ),
  "clipped": Limit(
    "clip_ratio/region_mean",
    (0.3, 0.6),
    "{:.0%} of the tokens are outside of the trust region",
    "the later updates of a rollout have hardly a gradient left",
    "a lower learning rate, or fewer updates per rollout (train.epochs, train.mini_batches)",
  ),
  "mismatch": Limit(
    "sampling/sampling_logp_difference/mean",
    MISMATCH,
    "sampler and trainer differ by {:.2g} nats per token",
    "the completions are of another policy than the one that learns",
    "model.dtype=float32 to see whether it is rounding; algorithm.correction=token_truncate",
  ),
}


def _beyond(name: str, h: History) -> Finding | None:
  """Finds a metric beyond its limit."""
  limit = LIMITS[name]
  if name == "mismatch" and (h.config.rollout.ahead or h.config.rollout.partial_tokens):
    return None  # the sampler has earlier parameters
  value = h.now(limit.metric)
  if not (level := level_of(value, limit.limits)):
    return None
  seen = limit.seen.format(value)
  return Finding(name, seen, limit.reason, limit.advice, level, {limit.metric: value})


# --- updates --------------------------------------------------------------------------------------


def no_gradient(h: History) -> Finding | None:
  """Finds updates without a gradient although rewards differ."""
  last = h.rows[-WINDOW:]
  lost = [r for r in last if r.get("grad_norm") == 0 and (r.get("frac_reward_zero_std") or 0) < 1]
  share = len(lost) / len(last)
  if not share > 0.5:
    return None
  return Finding(
    "no_gradient",
    f"the gradient is 0 in {share:.0%} of the last steps, though rewards differ",
    "a mask, a stop_gradient or a weight of 0 takes the loss away",
    "grpo_jax.testing on the loss; algorithm.*_weight and beta",
    "sure",
    {"zero": share},
  )


def far_clipped(h: History) -> Finding | None:
  """Finds gradients that are always far above the norm they are clipped to."""
  limit, norms = h.config.optimizer.clip_norm, h.series("grad_norm")
  if not limit or len(norms) < WINDOW or not (norms > FAR_CLIPPED * limit).mean() > 0.9:
    return None
  return Finding(
    "far_clipped",
    f"the gradient norm is {np.median(norms):.3g}, and is clipped to {limit:g} in every step",
    "all steps have the same size, whatever the gradient says; large norms come from large "
    "advantages or from a sum where a mean was meant",
    "rewards between 0 and 1; a larger optimizer.clip_norm",
    "possible",
    {"norm": float(np.median(norms)), "limit": float(limit)},
  )


def skipped(h: History) -> Finding | None:
  """Finds updates that were skipped."""
  skips = h.series("update/skipped")
  share = float(skips.mean()) if len(skips) else 0.0
  if not share > 0.01:
    return None
  return Finding(
    "skipped",
    f"{share:.1%} of the updates were skipped: their loss or gradient was not finite, or a spike",
    "the numbers overflow",
    "`python -m grpo_jax.replay RUN/skipped/...` names the first number that is not finite",
    "sure",
    {"share": share},
  )


def no_movement(h: History) -> Finding | None:
  """Finds a policy that learning does not move."""
  names = ("entropy", "completions/mean_length", "reward")
  if h.steps < ENOUGH or any(abs(h.rises(n)) > RISING for n in names) or h.now("grad_norm") == 0:
    return None
  first, last = h.thirds("entropy")
  if len(first) < ENOUGH // 3:
    return None
  change = abs(float(last.mean() / max(first.mean(), 1e-9)) - 1)
  if not change < 0.05:
    return None
  return Finding(
    "no_movement",
    f"in {h.steps} steps entropy, lengths and reward have not moved (entropy by {change:.1%})",
    "the learning rate is too low for this many steps, or a warm-up is still going on",
    f"three times optimizer.learning_rate, which is {h.config.optimizer.learning_rate:g}",
    "likely",
    {"change": change},
  )


def slow_rewards(h: History) -> Finding | None:
  """Finds steps that spend most of their time waiting for rewards."""
  # With rollouts ahead, updates run meanwhile: only the wait counts.
  name = "time/waiting" if h.config.rollout.ahead else "time/rewards"
  rewards, step = h.now(name), h.now("step_time")
  if h.steps < FEWEST or not rewards > 0.5 * step or rewards < NOTICED:
    return None
  workers = h.config.rewards.workers
  return Finding(
    "slow_rewards",
    f"rewards take {rewards:.1f} s of the {step:.1f} s of a step ({rewards / step:.0%})",
    "the devices wait while the host scores",
    f"more rewards.workers ({workers} now), a cheaper reward, or rollout.ahead, which scores while "
    f"updates run ({h.config.rollout.ahead} now)",
    "sure" if rewards > 0.7 * step else "likely",
    {"rewards": rewards, "step": step},
  )


CHECKS: dict[str, Callable[[History], Finding | None]] = {
  check.__name__: check
  for check in (
    no_signal, solved, flat_reward, fallen_reward, hacked, not_general, lost_rewards, truncated,
    longer_not_better, low_entropy, no_gradient, far_clipped, skipped, no_movement, slow_rewards,
  )
} | {name: partial(_beyond, name) for name in LIMITS}  # fmt: skip

# The checks that hold for completions that were given, not sampled.
OF_GIVEN = ("lost_rewards", "no_gradient", "skipped", "slow_rewards")

# The metric on whose curve a finding is seen.
CURVES: dict[str, str] = {
  "no_signal": "frac_reward_zero_std",
  "solved": "accuracy",
  "flat_reward": "reward",
  "fallen_reward": "reward",
  "hacked": "accuracy",
  "not_general": "eval/accuracy",
  "lost_rewards": "frac_unscored",
  "truncated": "completions/clipped_ratio",
  "longer_not_better": "completions/mean_length",
  "low_entropy": "entropy",
  "no_gradient": "grad_norm",
  "far_clipped": "grad_norm",
  "skipped": "update/skipped",
  "no_movement": "reward",
  "slow_rewards": "time/rewards",
} | {name: limit.metric for name, limit in LIMITS.items()}
