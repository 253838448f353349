"""Statistics of a batch of groups, in NumPy: no model, no device, no files."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer


def has_variance(rewards: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, "P"]:
  """Returns which groups hold two different scored rewards; the others have no gradient.

  The comparison is exact. The standard deviation would not do: rounding makes it 1.7e-17, not 0,
  for three rewards of 0.1.

  Args:
    rewards: total rewards; NaN means "not scored". Such a reward is left out.

  Returns:
    False for zero-variance groups and for groups without a scored reward.

  Example:
    >>> has_variance(np.array([[1.0, 0.0], [0.3, 0.3], [1.0, np.nan]])).tolist()
    [True, False, False]
  """
  scored = ~np.isnan(rewards)
  high = np.where(scored, rewards, -np.inf).max(axis=1, initial=-np.inf)
  low = np.where(scored, rewards, np.inf).min(axis=1, initial=np.inf)
  return high > low


def rollout_metrics(
  rewards: Float[np.ndarray, "P G"],
  per_name: Mapping[str, Float[np.ndarray, "P G"]],
  lengths: Int[np.ndarray, "P G"],
  truncated: Bool[np.ndarray, "P G"],
) -> dict[str, float]:
  """Computes the metrics of one batch of groups, under the names that other GRPO tools use.

  Args:
    rewards: total rewards; NaN means "not scored". Such a reward is left out.
    per_name: rewards of each reward function by its name; NaN where the function does not apply.
    lengths: completion lengths in tokens, the EOS included.
    truncated: true for completions that ran into the length limit.

  Returns:
    These metrics, NaN where there are no values to take the statistic of:

    - `reward`, `reward_std`: mean and standard deviation (ddof=1) of all scored rewards.
    - `rewards/<name>/mean`: mean over the completions that the function applies to.
    - `frac_reward_zero_std`: share of zero-variance groups among the groups with a scored reward.
    - `frac_unscored`: share of the completions without a reward.
    - `completions/{mean,min,max}_length`: lengths of all completions in tokens.
    - `completions/mean_terminated_length`: mean length in tokens of those that were not truncated.
    - `completions/clipped_ratio`: share of the completions that were truncated.

  Raises:
    ValueError: the arrays do not all have the same shape [P, G].

  Example:
    >>> metrics = rollout_metrics(
    ...   np.array([[1.0, 0.0], [1.0, np.nan]]), {}, np.array([[3, 5], [2, 2]]),
    ...   np.array([[False, True], [False, False]]))
    >>> round(metrics["reward"], 3), metrics["frac_reward_zero_std"], metrics["frac_unscored"]
    (0.667, 0.5, 0.25)
  """
  shape = np.shape(rewards)
  for name, array in {"lengths": lengths, "truncated": truncated, **per_name}.items():
    if np.shape(array) != shape or len(shape) != 2:
      raise ValueError(f"{name} has shape {np.shape(array)}, rewards {shape}: both must be [P, G]")
  rewards = np.asarray(rewards, np.float64)
  scored = ~np.isnan(rewards)
  values = rewards[scored]
  return {
    "reward": _mean(values),
    "reward_std": float(values.std(ddof=1)) if values.size > 1 else math.nan,
    **{f"rewards/{name}/mean": _mean(r[~np.isnan(r)]) for name, r in per_name.items()},
    "frac_reward_zero_std": _mean(~has_variance(rewards)[scored.any(axis=1)]),
    "frac_unscored": _mean(~scored),
    "completions/mean_length": _mean(lengths),
    "completions/min_length": float(np.min(lengths)) if np.size(lengths) else math.nan,
    "completions/max_length": float(np.max(lengths)) if np.size(lengths) else math.nan,
    "completions/mean_terminated_length": _mean(np.asarray(lengths)[~np.asarray(truncated)]),
    "completions/clipped_ratio": _mean(truncated),
  }


def _mean(values: Any) -> float:
  return float(np.mean(values)) if np.size(values) else math.nan


ROUTE_METRICS = ("router/max_load", "router/unused")


def count_routes(
  routes: Integer[np.ndarray, "P G T C"], mask: Bool[np.ndarray, "P G T"], layers: int, experts: int
) -> Integer[np.ndarray, "L E"]:
  """Returns how many tokens each expert of each layer got.

  Args:
    routes: experts of each token, layer by layer, C = L k.
    mask: true on tokens of completions. The last one of each is never read.

  Example:
    >>> routes = np.array([[[[0, 2], [1, 2], [0, 0]]]])  # three tokens, two layers, k = 1
    >>> count_routes(routes, np.ones((1, 1, 3), bool), layers=2, experts=3).tolist()
    [[1, 1, 0], [0, 0, 2]]
  """
  read = np.pad(mask[..., 1:], [(0, 0), (0, 0), (0, 1)])
  by_layer = routes[read].reshape(int(read.sum()), layers, -1)
  return np.stack([np.bincount(by_layer[:, i].ravel(), minlength=experts) for i in range(layers)])


def router_metrics(counts: Integer[np.ndarray, "L E"]) -> dict[str, float]:
  """Returns how evenly a router spreads tokens.

  `router/max_load` is the number of tokens of the busiest expert, as a multiple of an even share,
  and `router/unused` the share of experts without a token; both are means over layers.

  Example:
    >>> router_metrics(np.array([[1, 1, 0, 2], [1, 1, 1, 1]]))
    {'router/max_load': 1.5, 'router/unused': 0.125}
  """
  shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
  return {
    "router/max_load": float((shares.max(-1) * counts.shape[1]).mean()),
    "router/unused": float((counts == 0).mean()),
  }
