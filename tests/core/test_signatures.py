"""Checks the shapes in the signatures of public functions at run time."""

import inspect

import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

import grpo_jax
from grpo_jax.core import algorithms, corrections, kl, logprobs, masks, ratios, trust_regions

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
  "zero_advantages": lambda f: f(REWARDS),
  "max_rl": lambda f: f(REWARDS),
  "token_whitened": lambda f: f(REWARDS, MASK, eps=0.1),
  "centered_token_whitened": lambda f: f(REWARDS, MASK),
  "right_only": lambda f: f(REWARDS, right_above=1.0),
  "multi_objective": lambda f: f(jnp.stack([REWARDS] * R), jnp.ones(R)),
  "diagnose": lambda f: f(REWARDS, REWARDS, MASK, logp=LOGP, sampler_logp=LOGP, tokens=TOKENS),
  "penalized_rewards": lambda f: f(LOGP, LOGP, LOGP, MASK, beta=0.1),
  "log_ratio_advantages": lambda f: f(LOGP, LOGP, MASK, discount=0.5, baseline="leave_one_out"),
  "process_advantages": lambda f: f(jnp.ones((P, G, S)), jnp.zeros((P, G, S), jnp.int32), MASK),
  "turn_advantages": lambda f: f(jnp.ones((P, G, S)), jnp.zeros((P, G, S), jnp.int32), MASK),
  "token_logprobs": lambda f: f(jnp.zeros((P, G, T, V)), TOKENS, temperature=0.7),
  "head_logprobs": lambda f: f(
    jnp.zeros((P, G, T, D)), jnp.zeros((D, V)), TOKENS, temperature=1.0, where=MASK, softcap=30.0
  ),
  "head_divergence": lambda f: f(
    jnp.zeros((P, G, T, D)),
    jnp.zeros((D, V)),
    jnp.zeros((P, G, T, 2)),
    jnp.zeros((2, V)),
    beta=0.5,
    temperature=0.7,
    where=MASK,
    softcap=30.0,
    teacher_softcap=20.0,
  ),
  "completion_mask": lambda f: f(TOKENS, (1, 2)),
  "token_weights": lambda f: f(MASK, "constant", max_length=9),
  "kl_k1": lambda f: f(LOGP, LOGP),
  "kl_k2": lambda f: f(LOGP, LOGP),
  "kl_k3": lambda f: f(LOGP, LOGP),
  "gae": lambda f: f(LOGP, LOGP, MASK, gamma=0.9, lam=0.5),
  "returns_whitened": lambda f: f(LOGP, MASK),
  "value_loss": lambda f: f(LOGP, LOGP, MASK, old_values=LOGP, clip=0.1, weights=LOGP),
  "preference_loss": lambda f: f(REWARDS, REWARDS, margin=REWARDS, center=0.1, weights=REWARDS),
  "grpo_loss": lambda f: f(LOGP, REWARDS, MASK, old_logp=LOGP, ref_logp=LOGP, beta=0.1),
  "policy_loss": lambda f: f(
    "dr_grpo",
    LOGP,
    REWARDS,
    MASK,
    old_logp=LOGP,
    sampler_logp=LOGP,
    entropy=LOGP,
    weights=LOGP,
    nll_weights=LOGP,
    max_length=9,
  ),
}


CALLS["advantages"] = lambda f: f("dr_grpo", REWARDS)
SETTINGS = dict.fromkeys(
  [
    "clip_low", "clip_high", "clip_dual", "ratio_min", "ratio_max", "tau_positive", "tau_negative",
    "divergence", "correction_min", "correction_max", "geometric_min", "geometric_max",
    "off_policy_max",
  ],
  2.0,
)  # fmt: skip
ARRAYS = {"advantages": LOGP, "drift": LOGP}  # a correction may name them
CHOICES = {
  "kl": (kl, kl.KLS, (LOGP, LOGP, LOGP)),
  "ratios": (ratios, ratios.RATIOS, (LOGP, LOGP, MASK)),
  "anchors": (ratios, ratios.ANCHORS, (LOGP, LOGP)),
  "trust_regions": (trust_regions, trust_regions.TRUST_REGIONS, (LOGP, LOGP, LOGP, LOGP)),
  "corrections": (corrections, corrections.CORRECTIONS, (LOGP, MASK)),
}


def checked(function):
  return jaxtyped(typechecker=beartype)(function)


@pytest.mark.parametrize("name", CALLS)
def test_signatures_of_the_package(name):
  CALLS[name](checked(getattr(grpo_jax, name)))


@pytest.mark.parametrize("choice", CHOICES)
def test_signatures_of_the_choices(choice):
  """Every choice is public in its module, is documented with an example, and has typed shapes."""
  module, table, arguments = CHOICES[choice]
  for function in table.values():
    assert getattr(module, function.__name__) is function
    assert ">>>" in function.__doc__
    parameters = inspect.signature(function).parameters.values()
    assert all(p.annotation is not p.empty for p in parameters)
    known = SETTINGS | ARRAYS
    settings = {p.name: known[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    checked(function)(*arguments, **settings)
    with pytest.raises(Exception, match=r"dimension|type|shape"):
      checked(function)(*arguments[:-1], jnp.zeros((P, G)), **settings)


def test_signatures_of_helpers():
  checked(masks.high_entropy)(-LOGP, MASK, 0.5)
  checked(algorithms.nll_weights)("grpo", REWARDS, MASK)
  checked(corrections.correction_weights)("token_truncate", LOGP, MASK, correction_max=2.0)
  checked(ratios.finite_exp)(LOGP)
  checked(logprobs.soft_cap)(LOGP, 2.0)
  checked(logprobs.soft_cap)(LOGP, None)


def test_every_public_function_is_here():
  functions = {name for name in grpo_jax.__all__ if callable(getattr(grpo_jax, name))}
  functions -= {"Algorithm", "Advantage", "Finding"}
  assert functions == set(CALLS)
