"""Mistakes in a loop of one's own, for each check of `diagnose`: for `tools.illnesses`.

A small model learns to write words of a given number of letters (28 steps). Then one step is taken
with a mistake in it, and `diagnose` sees its arrays.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import diagnose, group_centered, group_normalized
from grpo_jax.learning import TrainState, make_train_step
from grpo_jax.learning.step import score_batch
from grpo_jax.models import load_model
from grpo_jax.rollout import RolloutConfig, generate, make_batch, score
from grpo_jax.sampling import Sampler
from grpo_jax.tasks import Example, score_with
from grpo_jax.tokens import load_tokenizer
from tools.illness_rewards import everything, nothing

STOP = tuple(".,;!?\n ")
EXAMPLES = [Example(f"{n} letters:", {"count": n}, str(n)) for n in range(1, 9)]
GROUP, LENGTH, STEPS = 16, 12, 28


def close(prompts, completions, count, **columns):
  """Returns how close words are to the length that is asked for."""
  rewards = []
  for text, n in zip(completions, count):
    letters = sum(c.isascii() and c.isalpha() for c in text)
    rewards.append(max(0.0, 1 - abs(letters - n) / n) * letters / max(len(text), 1))
  return rewards


def by_prompt(prompts, completions, count, **columns):
  """Returns 1 for all completions of a prompt, or 0 for all."""
  return [float(n % 2) for n in count]


def often_failing(prompts, completions, count, **columns):
  """Returns no reward for each fifth completion."""
  return [None if i % 5 == 0 else r for i, r in enumerate(close(prompts, completions, count))]


def for_one_prompt(prompts, completions, count, **columns):
  """Returns how close words are, for one of the prompts."""
  return [r * (n == 4) for r, n in zip(close(prompts, completions, count), count)]


@cache
def trained() -> SimpleNamespace:
  """Trains, and returns the model, its parameters before, after, and a step before the end."""
  model, random = load_model("random:tiny")
  loop, optimizer = SimpleNamespace(model=model, random=random), optax.adam(2e-3)
  loop.tokenizer = load_tokenizer("random:tiny")
  loop.config = RolloutConfig(group_size=GROUP, algorithm="dapo")
  update = make_train_step(model, "dapo", optimizer)
  state = TrainState.create(jax.tree.map(jnp.copy, random), optimizer)
  sampler = make_sampler(loop)
  for number in range(STEPS):
    loop.before = jax.tree.map(jnp.copy, state.params)
    out = generate(sampler, state.params, EXAMPLES, jax.random.key(number), group_size=GROUP)
    scored = score(score_with(close), EXAMPLES, out)
    state, _ = update(state, make_batch(scored, sampler, loop.config)[0])
  loop.params = state.params
  return loop


def make_sampler(loop: SimpleNamespace, **changes: Any) -> Sampler:
  """Returns the sampler of the loop, with some of its settings changed."""
  settings = {"prompt_length": 16, "completion_length": LENGTH, "stop": STOP} | changes
  return Sampler(loop.model, loop.tokenizer, **settings)


def step(
  loop: SimpleNamespace,
  *,
  reward: Any = close,
  seed: int = 100,
  reference: Any = None,
  **changes: Any,
) -> dict[str, Any]:
  """Takes a step, and returns its arrays by the names that `diagnose` has for them."""
  sampler = make_sampler(loop, **changes)
  out = generate(sampler, loop.params, EXAMPLES, jax.random.key(seed), group_size=GROUP)
  scored = score(score_with(reward), EXAMPLES, out)
  batch, _ = make_batch(scored, sampler, loop.config)
  logp, entropy = (np.asarray(a) for a in score_batch(loop.model, loop.params, batch))
  arrays = {
    "rewards": scored.scores.total,
    "advantages": np.asarray(batch.advantages),
    "mask": out.mask,
    "logp": logp,
    "old_logp": logp,
    "sampler_logp": out.logp,
    "entropy": entropy,
    "tokens": out.tokens,
    "ended": out.ended,
  }
  if reference is not None:
    arrays["ref_logp"] = np.asarray(score_batch(loop.model, reference, batch)[0])
  return arrays | {"batch": batch}


# --- mistakes -------------------------------------------------------------------------------------


def lost_advantages(loop: SimpleNamespace) -> dict[str, Any]:
  """The advantages of the second micro-batch are left at the zeros of their allocation."""
  arrays = step(loop)
  half = np.zeros_like(arrays["rewards"])
  half[:4] = group_normalized(arrays["rewards"][:4])
  return arrays | {"advantages": half}


def shuffled(loop: SimpleNamespace) -> dict[str, Any]:
  """Rewards come back with the groups as columns, and are reshaped instead of transposed."""
  arrays = step(loop)
  rewards = np.ascontiguousarray(arrays["rewards"].T).reshape(arrays["rewards"].shape)
  return arrays | {"advantages": np.asarray(group_normalized(rewards))}


def in_percent(loop: SimpleNamespace) -> dict[str, Any]:
  """Rewards are in percent, and are not divided by a deviation."""
  arrays = step(loop)
  return arrays | {"advantages": np.asarray(group_centered(100 * arrays["rewards"]))}


def one_key(loop: SimpleNamespace) -> dict[str, Any]:
  """One completion of each prompt is drawn, and repeated as its group."""
  arrays = step(loop)
  del arrays["batch"]
  arrays = {name: np.repeat(a[:, :1], GROUP, axis=1) for name, a in arrays.items()}
  return arrays | {"advantages": np.asarray(group_normalized(arrays["rewards"]))}


def warm(loop: SimpleNamespace) -> dict[str, Any]:
  """The sampler draws at a temperature that the trainer does not know."""
  arrays = step(loop, temperature=1.5)
  batch = dataclasses.replace(arrays["batch"], temperature=1.0)
  logp = np.asarray(score_batch(loop.model, loop.params, batch)[0])
  return arrays | {"logp": logp, "old_logp": logp}


def many_updates(loop: SimpleNamespace) -> dict[str, Any]:
  """A rollout is used for a dozen updates at a large learning rate."""
  arrays, optimizer = step(loop), optax.adam(2e-2)
  update = make_train_step(loop.model, "reinforce", optimizer)
  state = TrainState.create(jax.tree.map(jnp.copy, loop.params), optimizer)
  for _ in range(12):
    state, _ = update(state, arrays["batch"])
  return arrays | {"logp": np.asarray(score_batch(loop.model, state.params, arrays["batch"])[0])}


def overflow(loop: SimpleNamespace) -> dict[str, Any]:
  """The parameters are infinite."""
  broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.inf), loop.params)
  arrays = step(loop)
  return arrays | {"logp": np.asarray(score_batch(loop.model, broken, arrays["batch"])[0])}


# By the finding that should name it: what is made wrong, in words and as a function of the loop.
PLANTED = {
  "not_scored": ("the reward fails for a fifth", lambda loop: step(loop, reward=often_failing)),
  "too_hard": ("nothing is right", lambda loop: step(loop, reward=nothing)),
  "too_easy": ("all is right", lambda loop: step(loop, reward=everything)),
  "all_equal": ("the reward sees only the prompt", lambda loop: step(loop, reward=by_prompt)),
  "no_advantage": ("the second micro-batch keeps its zeros", lost_advantages),
  "mixed_groups": ("rewards reshaped where they had to be transposed", shuffled),
  "large_advantages": ("rewards in percent, not divided by a deviation", in_percent),
  "one_prompt": ("one problem of eight can be solved", lambda loop: step(
    loop, reward=for_one_prompt)),
  "truncated": ("four tokens for words of up to eight letters", lambda loop: step(
    loop, completion_length=4)),
  "duplicates": ("one key for a whole group", one_key),
  "low_entropy": ("a temperature of 0.02, and nothing is right", lambda loop: step(
    loop, temperature=0.02, reward=nothing)),
  "mismatch": ("sampled at a temperature of 1.5, scored at 1", warm),
  "ratio": ("a dozen updates with one rollout", many_updates),
  "kl": ("the reference is the random model", lambda loop: step(
    loop, reference=loop.random) | {"beta": 0.04}),
  "idle_reference": ("a coefficient of 1e-6", lambda loop: step(
    loop, reference=loop.before) | {"beta": 1e-6}),
  "not_finite": ("parameters are infinite", overflow),
}  # fmt: skip
HEALTHY = {
  "a step": lambda loop: step(loop),
  "another one, with the policy of the step before as reference": lambda loop: step(
    loop, seed=101, reference=loop.before) | {"beta": 0.04},
  "rewards alone": lambda loop: {"rewards": step(loop, seed=102)["rewards"]},
}  # fmt: skip


def said(make: Callable[[SimpleNamespace], dict[str, Any]]) -> dict[str, str]:
  """Returns what `diagnose` says of a batch: how sure each finding is, by name."""
  arrays = {name: a for name, a in make(trained()).items() if name != "batch"}
  return {finding.name: finding.confidence for finding in diagnose(**arrays)}
