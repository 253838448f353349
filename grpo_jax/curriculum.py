"""Draws training problems by how often the policy solves them.

A run counts the completions and the right ones of each training problem. A curriculum is a function
that turns these counts into weights, and a step draws distinct problems with these weights. The
counts are state of the run: they are in its checkpoints, and the same on all hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from grpo_jax.tasks.base import unknown_name
from grpo_jax.tasks.rewards.loading import load_function

# (completions, right ones) of each problem, [n] each -> weight of each problem, above 0.
Curriculum = Callable[
  [Float[np.ndarray, "n"], Float[np.ndarray, "n"]], Float[np.ndarray, "n"] | Sequence[float]
]
METRICS = ("curriculum/tried", "curriculum/spread")
OFF = "off"


def pass_rate(
  tries: Float[np.ndarray, "n"], right: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n"]:
  """Estimates the chance of a right completion as `(right + 1) / (tries + 2)`.

  It is the mean of a uniform prior after these completions: 1/2 for an untried problem, and never
  0 or 1, so that no problem is given up.

  Example:
    >>> pass_rate(np.array([0.0, 8.0, 8.0]), np.array([0.0, 0.0, 7.0])).tolist()
    [0.5, 0.1, 0.8]
  """
  return (right + 1) / (tries + 2)


def learnability(
  tries: Float[np.ndarray, "n"], right: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n"]:
  """Weighs a problem by `p (1 - p)`, the variance of its reward, with `p` from `pass_rate`.

  References:
    Foster et al. 2025, "Learning to Reason at the Frontier of Learnability", arXiv 2502.12272.

  Example:
    >>> learnability(np.array([0.0, 8.0]), np.array([0.0, 8.0])).round(2).tolist()
    [0.25, 0.09]
  """
  p = pass_rate(tries, right)
  return p * (1 - p)


def failure(tries: Float[np.ndarray, "n"], right: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
  """Weighs a problem by `1 - p`, so that failed problems come more often.

  References:
    Kimi k1.5, arXiv 2501.12599, section 2.3.4, "Prioritized sampling".

  Example:
    >>> failure(np.array([8.0, 8.0]), np.array([8.0, 0.0])).round(2).tolist()
    [0.1, 0.9]
  """
  return 1 - pass_rate(tries, right)


CURRICULA: dict[str, Curriculum] = {"learnability": learnability, "failure": failure}


def lookup_curriculum(choice: str | Curriculum) -> Curriculum | None:
  """Returns the function that a config names, checked on counts of three problems.

  Args:
    choice: a key of `CURRICULA`, 'file.py:function', a function, or "off".

  Returns:
    The function; None for "off".

  Raises:
    ValueError: the name is unknown, or the function does not return a positive weight per problem.

  Example:
    >>> lookup_curriculum("failure") is failure, lookup_curriculum("off")
    (True, None)
  """
  if choice == OFF:
    return None
  if isinstance(choice, str):
    if ".py:" in choice:
      choice = load_function(choice)
    elif choice in CURRICULA:
      choice = CURRICULA[choice]
    else:
      raise unknown_name("data.curriculum", choice, [*CURRICULA, OFF])
  elif not callable(choice):
    raise ValueError(
      f"data.curriculum is {choice!r}: it must be {', '.join(CURRICULA)}, {OFF}, "
      "'file.py:function' or a function"
    )
  weigh(choice, np.array([[0, 0], [8, 0], [8, 8]], np.float32))
  return choice


def new_counts(size: int) -> Float[np.ndarray, "n 2"]:
  """Returns the counts of `size` problems before any completion."""
  return np.zeros((size, 2), np.float32)


def weigh(curriculum: Curriculum, counts: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n"]:
  """Returns the weight of each problem, in float64.

  Args:
    curriculum: the function.
    counts: completions and right ones of each problem.

  Raises:
    ValueError: the function does not return a finite number above 0 for each problem.

  Example:
    >>> weigh(learnability, np.array([[0, 0], [2, 1]])).tolist()
    [0.25, 0.25]
  """
  tries, right = np.asarray(counts, np.float64).T
  weights = np.asarray(curriculum(tries, right), np.float64)
  name = getattr(curriculum, "__name__", repr(curriculum))
  if weights.shape != tries.shape:
    raise ValueError(
      f"the curriculum {name} returned an array of shape {weights.shape} for {len(tries)} problems:"
      " it must return one weight per problem"
    )
  bad = np.flatnonzero(~(np.isfinite(weights) & (weights > 0)))
  if len(bad):
    i = bad[0]
    raise ValueError(
      f"the curriculum {name} gave the weight {weights[i]:g} to a problem with {tries[i]:g} "
      f"completions, {right[i]:g} of them right: weights must be finite and above 0. For a problem "
      "that should hardly ever be drawn, return a small weight"
    )
  return weights


def weighted_order(
  weights: Float[np.ndarray, "n"], step: int
) -> Callable[[int, int, int, int], Int[np.ndarray, "n"]]:
  """Returns an order of the problems for `data.examples`: draws one after another by weight.

  Among the problems that are left, each draw takes one with a chance in proportion to its weight.
  The order depends on (seed, step, pass) and the weights, and on nothing else.

  Args:
    weights: of each problem, above 0.
    step: number of the step, from 0.

  References:
    Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir": sorting exponential
    variates with these rates gives this order.

  Example:
    >>> order = weighted_order(np.array([1.0, 1e-9, 1.0]), step=0)
    >>> int(order(3, seed=0, stream=0, epoch=0)[-1])
    1
  """

  def order(size: int, seed: int, stream: int, epoch: int) -> Int[np.ndarray, "n"]:
    # The last number sets this stream apart from the order of mini-batches.
    numbers = (seed, step, epoch, stream, 1)
    uniform = np.random.default_rng([n % 2**64 for n in numbers]).random(size)
    return np.argsort(-np.log1p(-uniform) / weights, kind="stable")

  return order


def add(
  counts: Float[np.ndarray, "n 2"],
  problems: Sequence[int],
  accuracy: Float[np.ndarray, "D G"],
  memory: float,
) -> Float[np.ndarray, "n 2"]:
  """Returns the counts after more completions.

  Args:
    counts: completions and right ones of each problem; not changed.
    problems: index of the problem of each row of `accuracy`; it may occur several times.
    accuracy: 1.0 for a right completion; NaN for one that was not judged, which is not counted.
    memory: share of the earlier counts that remains, of the problems that were tried now.

  Example:
    >>> counts = np.array([[8, 2], [8, 8]], np.float32)
    >>> add(counts, [0], np.array([[1.0, 0.0, np.nan]]), memory=0.5).tolist()
    [[6.0, 2.0], [8.0, 8.0]]
  """
  judged = ~np.isnan(accuracy)
  new = np.stack([judged.sum(-1), (accuracy == 1).sum(-1)], -1).astype(counts.dtype)
  counts, problems = counts.copy(), np.asarray(problems)
  tried = np.unique(problems[new[:, 0] > 0])
  counts[tried] *= np.asarray(memory, counts.dtype)
  np.add.at(counts, problems, new)
  return counts


def metrics(counts: Float[np.ndarray, "n 2"], weights: Float[np.ndarray, "n"]) -> dict[str, float]:
  """Returns the share of problems that were tried, and how far the weights spread.

  `curriculum/spread` is the effective number of problems, `(sum w)^2 / sum w^2`, as a share of all:
  1 for equal weights.

  Example:
    >>> metrics(np.array([[8, 4], [0, 0]]), np.array([3.0, 1.0]))
    {'curriculum/tried': 0.5, 'curriculum/spread': 0.8}
  """
  spread = weights.sum() ** 2 / (weights**2).sum() / len(weights)
  return dict(zip(METRICS, (float((counts[:, 0] > 0).mean()), float(spread))))
