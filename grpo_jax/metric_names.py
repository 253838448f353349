"""Lists the metrics that a run will write, before it has written any."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax import curriculum as curricula
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.losses import policy_loss
from grpo_jax.episodes import EPISODE_METRICS
from grpo_jax.evaluate import metric_names as evaluation_names
from grpo_jax.learning.balance import ROUTER_METRICS
from grpo_jax.learning.critic import CRITIC_METRICS, VALUE_METRICS
from grpo_jax.learning.skipping import SKIPPED
from grpo_jax.learning.step import STALENESS
from grpo_jax.run.ending import Condition
from grpo_jax.sampling import partial
from grpo_jax.statistics import ROUTE_METRICS, rollout_metrics
from grpo_jax.tasks.base import Task, unknown_name

# Of a rollout, an update and the clock of a step, besides those that depend on the run.
ALWAYS = (
  "accuracy", "entropy", "rewards/missing", "rewards/raised", "update/padded", SKIPPED, "loss",
  "grad_norm", "learning_rate", "step_time", "tokens_per_second", "num_tokens",
  "time/sampling", "time/rewards",
)  # fmt: skip
_RESAMPLING = ("dynamic_sampling/kept", "dynamic_sampling/resamples")


def metric_names(
  c: ConfigDict,
  task: Task,
  algorithm: Algorithm,
  *,
  experts: bool = False,
  routes: bool = False,
) -> set[str]:
  """Returns the names of all metrics that a run with this config writes.

  Those that reward functions log by `log_metric` are not among them: only the functions know them.

  Args:
    c: the config.
    task: with the learned reward, if there is one.
    algorithm: the row, with the changes of the config.
    experts: whether the model is a mixture of experts.
    routes: whether the sampler records the experts of a mixture.
  """
  one = np.zeros((1, 2))
  rewards = [*task.rewards, *(["environment"] if task.environment else [])]
  rollout = rollout_metrics(one, dict.fromkeys(rewards, one), one.astype(int), one > 0)
  names = {*ALWAYS, *rollout, *_loss_names(c, algorithm)}
  if c.rollout.max_resamples:
    names.update(_RESAMPLING)
  if c.rollout.cache_gib:
    names.add("sampling/live")
  if experts:
    names.update(ROUTER_METRICS)
  if routes:
    names.update(ROUTE_METRICS)
  if c.rollout.ahead:
    names.update(STALENESS, ["time/waiting"])
  if c.rollout.partial_tokens:
    names.update(STALENESS, partial.METRICS)
  if c.data.curriculum != curricula.OFF:
    names.update(curricula.METRICS)
  if "values" in algorithm.rewards:
    names.update(CRITIC_METRICS if c.critic.trunk == "own" else VALUE_METRICS)
  if configs.own_teacher(c):
    names.add("teacher/taught")
  if task.environment is not None:
    names.update(EPISODE_METRICS)
  if len(task.splits["eval"]):
    names.update(
      evaluation_names(
        c.eval.samples, votes=task.answer is not None, episodes=task.environment is not None
      )
    )
  return names


def check_condition(when: str, names: Iterable[str]) -> None:
  """Checks the text of a condition that ends a run against the metrics that the run writes.

  Args:
    when: as in `run.ending.Condition.parse`; empty text is valid.
    names: of the metrics.

  Raises:
    ValueError: the text is not a condition, or the run does not write the metric.

  Example:
    >>> check_condition("rewards > 1", ["reward", "kl"])
    Traceback (most recent call last):
    ValueError: stop.when is 'rewards > 1': unknown metric 'rewards': did you mean 'reward'?...
  """
  if when:
    metric, names = Condition.parse(when).metric, set(names)
    if metric not in names:
      error = unknown_name("metric", metric, names)
      raise ValueError(
        f"stop.when is {when!r}: {error}. These are the metrics that this run writes"
      )


def _loss_names(c: ConfigDict, algorithm: Algorithm) -> set[str]:
  """Returns the names of the loss's metrics; nothing is compiled or computed."""
  logp, mask = jnp.zeros((1, 2, 1)), jnp.ones((1, 2, 1), bool)
  optional = {"sampler_logp": logp, "weights": logp}
  if algorithm.needs_entropy:
    optional |= {"entropy": logp, "entropy_coef": 0.0}
  if algorithm.nll_weight > 0:
    optional["nll_weights"] = logp
  if algorithm.beta > 0:
    optional["ref_logp"] = logp
  if algorithm.teacher_weight > 0:
    optional["teacher_logp" if algorithm.teacher_divergence is None else "divergence"] = logp
  if c.train.epochs * c.train.mini_batches > 1 or configs.own_teacher(c):
    optional["old_logp"] = logp

  def metrics(logp: jax.Array) -> dict[str, jax.Array]:
    return policy_loss(algorithm, logp, logp[..., 0], mask, **optional)[1]

  return set(jax.eval_shape(metrics, logp))
