"""The shapes in the signatures are the shapes that go in and come out, checked at run time."""

import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

import grpo_jax

P, G, T, R, S, D, V = 2, 3, 4, 2, 5, 6, 7
REWARDS = jnp.arange(P * G, dtype=jnp.float32).reshape(P, G)
MASK = jnp.ones((P, G, T), bool)
LOGP = jnp.full((P, G, T), -1.0)
TOKENS = jnp.zeros((P, G, T), jnp.int32)

CALLS = {
  "group_normalized": lambda f: f(REWARDS, eps=0.1, ddof=0),
  "group_centered": lambda f: f(REWARDS),
  "leave_one_out": lambda f: f(REWARDS),
  "batch_normalized": lambda f: f(REWARDS),
  "batch_whitened": lambda f: f(REWARDS),
  "max_rl": lambda f: f(REWARDS),
  "multi_objective": lambda f: f(jnp.stack([REWARDS] * R), jnp.ones(R)),
  "process_advantages": lambda f: f(jnp.ones((P, G, S)), jnp.zeros((P, G, S), jnp.int32), MASK),
  "token_logprobs": lambda f: f(jnp.zeros((P, G, T, V)), TOKENS, temperature=0.7),
  "head_logprobs": lambda f: f(
    jnp.zeros((P, G, T, D)), jnp.zeros((D, V)), TOKENS, temperature=1.0, where=MASK, softcap=30.0
  ),
  "completion_mask": lambda f: f(TOKENS, (1, 2)),
  "token_weights": lambda f: f(MASK, "constant", max_length=9),
  "kl_k1": lambda f: f(LOGP, LOGP),
  "kl_k2": lambda f: f(LOGP, LOGP),
  "kl_k3": lambda f: f(LOGP, LOGP),
  "grpo_loss": lambda f: f(LOGP, REWARDS, MASK, old_logp=LOGP, ref_logp=LOGP, beta=0.1),
  "policy_loss": lambda f: f(
    "dr_grpo", LOGP, REWARDS, MASK, old_logp=LOGP, sampler_logp=LOGP, weights=LOGP, max_length=9
  ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_signature_holds(name):
  CALLS[name](jaxtyped(typechecker=beartype)(getattr(grpo_jax, name)))


def test_every_public_function_is_here():
  functions = {name for name in grpo_jax.__all__ if callable(getattr(grpo_jax, name))}
  functions -= {"Algorithm"}
  assert functions == set(CALLS)
