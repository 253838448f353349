"""Learns a contextual bandit with the pure functions: in plain JAX, Flax NNX and Equinox.

    python examples/bandit.py [jax] [nnx] [equinox]

A policy is any function from contexts to logits. The learning is the same 25 lines for all three;
what differs is how a library hands over its parameters. In context p action p is right.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax import group_normalized, grpo_loss, token_logprobs

CONTEXTS, ACTIONS, GROUP = 8, 8, 16


def learn(params: Any, logits_of: Callable, *, steps: int = 200, seed: int = 0) -> list[float]:
  """Returns the mean reward of each step.

  Args:
    params: a tree of arrays.
    logits_of: (params, contexts [P, D]) -> logits [P, A].
  """
  optimizer = optax.adam(0.05)
  contexts = jnp.eye(CONTEXTS)

  def loss(params, actions, advantages):  # actions [P, G, T=1]
    logits = jnp.broadcast_to(logits_of(params, contexts)[:, None, None], (*actions.shape, ACTIONS))
    logp, _ = token_logprobs(logits, actions)
    return grpo_loss(logp, advantages, jnp.ones(actions.shape, bool))[0]

  @jax.jit
  def step(params, state, key):
    logits = logits_of(params, contexts)
    actions = jax.random.categorical(key, logits[:, None], shape=(CONTEXTS, GROUP))
    rewards = (actions == jnp.arange(CONTEXTS)[:, None]).astype(jnp.float32)
    grads = jax.grad(loss)(params, actions[..., None], group_normalized(rewards))
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, rewards.mean()

  state, rewards = optimizer.init(params), []
  for i in range(steps):
    params, state, reward = step(params, state, jax.random.key(seed + i))
    rewards.append(float(reward))
  return rewards


def plain_policy() -> tuple[Any, Callable]:
  """A dict of arrays and a function."""
  params = {"w": jnp.zeros((CONTEXTS, ACTIONS)), "b": jnp.zeros(ACTIONS)}
  return params, lambda params, x: x @ params["w"] + params["b"]


def nnx_policy() -> tuple[Any, Callable]:
  """A Flax NNX module, by `split` and `merge`."""
  from flax import nnx

  module = nnx.Linear(CONTEXTS, ACTIONS, rngs=nnx.Rngs(0))
  graph, params = nnx.split(module)
  return params, lambda params, x: nnx.merge(graph, params)(x)


def equinox_policy() -> tuple[Any, Callable]:
  """An Equinox module, by `partition` and `combine`."""
  import equinox as eqx

  module = eqx.nn.Linear(CONTEXTS, ACTIONS, key=jax.random.key(0))
  params, rest = eqx.partition(module, eqx.is_array)
  return params, lambda params, x: jax.vmap(eqx.combine(params, rest))(x)


POLICIES = {"jax": plain_policy, "nnx": nnx_policy, "equinox": equinox_policy}

if __name__ == "__main__":
  for name in sys.argv[1:] or POLICIES:
    rewards = learn(*POLICIES[name]())
    print(f"{name}: reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")
