"""The invariance suite: our functions pass it, and each check catches planted bugs."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import grpo_jax
from grpo_jax import ALGORITHMS, testing, token_weights
from grpo_jax.core.advantages import ADVANTAGES
from tests.helpers import published_losses

MAX_LENGTH = 8

# A row for each average and kind of trust region; tests/core/test_losses.py has all choices.
ROWS = {name: ALGORITHMS[name] for name in ("grpo", "gspo", "dppo")} | {
  "everything": dataclasses.replace(
    ALGORITHMS["grpo"],
    trust_region="dual_clip",
    clip_dual=3.0,
    kl="k3_ratio",
    correction="sequence_mask",
    correction_min=0.01,
    correction_max=20.0,
    average="constant",
  ),
}


def ours(row):
  """Returns the loss of a row in the form that the checks need, and the arrays that it takes."""
  arrays = ["old_logp"]
  if row.beta > 0:
    arrays.append("ref_logp")
  if row.correction != "none":
    arrays.append("sampler_logp")

  @jax.jit
  def loss(logp, advantages, mask, **more):
    return grpo_jax.policy_loss(row, logp, advantages, mask, max_length=MAX_LENGTH, **more)[0]

  return loss, tuple(arrays)


def weights_of(row):
  return partial(token_weights, average=row.average, max_length=MAX_LENGTH)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_our_losses_pass(row):
  loss, arrays = ours(row)
  testing.check_padding(loss, arrays=arrays)
  testing.check_empty(loss, arrays=arrays)
  testing.check_microbatches(loss, arrays=arrays, weights=weights_of(row))
  testing.check_row_order(loss, arrays=arrays)
  testing.check_poisoned_masks(loss, arrays=arrays)
  testing.check_on_policy_gradient(loss, arrays=arrays, weights=weights_of(row))


OF_TOTALS = {
  name: row for name, row in ADVANTAGES.items() if row.rewards == ("total",) and row.needs_groups
}


@jax.jit
def all_advantages(rewards):
  return {name: function(rewards) for name, function in OF_TOTALS.items()}


@pytest.mark.parametrize("name", OF_TOTALS)
def test_our_advantages_pass(name):
  def function(rewards):
    return all_advantages(rewards)[name]

  testing.check_constant_group(function)
  if name in ("group_centered", "leave_one_out"):
    testing.check_shift_scale(function, scale="equivariant")
  elif name != "max_rl":  # relative to the mean: invariant to scale, but not to a shift
    testing.check_shift_scale(function)


def test_our_mask_and_logprobs_pass():
  testing.check_eos(grpo_jax.completion_mask)
  testing.check_temperature(grpo_jax.token_logprobs)


def reinforce(logp, advantages, mask):
  """Returns the sum of -A logp; the planted bugs below are one change away from it."""
  return -jnp.sum(jnp.where(mask, logp * advantages[:, None], 0.0))


def test_the_base_of_the_planted_bugs_passes():
  testing.check_padding(reinforce)
  testing.check_empty(reinforce)
  testing.check_microbatches(reinforce, share=lambda part, whole: 1.0)
  testing.check_row_order(reinforce)
  testing.check_poisoned_masks(reinforce)
  testing.check_on_policy_gradient(reinforce)


def by_padded_width(logp, advantages, mask):
  return reinforce(logp, advantages, mask) / logp.shape[1]


def gradient_to_padding(logp, advantages, mask):
  return -jnp.sum(logp * advantages[:, None]) + jnp.sum(
    jax.lax.stop_gradient(jnp.where(mask, 0.0, logp) * advantages[:, None])
  )


def unguarded_lengths(logp, advantages, mask):
  return jnp.mean(-jnp.where(mask, logp * advantages[:, None], 0.0).sum(-1) / mask.sum(-1))


def constant_added(logp, advantages, mask):
  return reinforce(logp, advantages, mask) + 1.0


def own_token_mean(logp, advantages, mask, weights):
  return reinforce(logp, advantages, mask) / mask.sum()


def weighted_by_row(logp, advantages, mask):
  return reinforce(logp, advantages * jnp.arange(1, 1 + len(advantages)), mask)


def mask_multiplies(logp, advantages, mask):
  return -jnp.sum(logp * advantages[:, None] * mask.astype(float))


def ratio_masked_late(logp, advantages, mask, old_logp):
  return -jnp.sum(jnp.where(mask, jnp.exp(logp - old_logp) * advantages[:, None], 0.0))


def weight_with_gradient(logp, advantages, mask):
  return -jnp.sum(jnp.where(mask, jnp.exp(logp) * logp * advantages[:, None], 0.0))


def pushes_down(logp, advantages, mask):
  return -reinforce(logp, advantages, mask)


def absolute_advantage(logp, advantages, mask):
  return reinforce(logp, jnp.abs(advantages), mask)


def clip_at_one(logp, advantages, mask, old_logp):
  """Clips at 1, where `minimum` and `clip` split the gradient between equal branches."""
  ratio, a = jnp.exp(logp - old_logp), advantages[:, None]
  bounded = jnp.minimum(ratio * a, jnp.clip(ratio, 1.0, 1.0) * a)
  return -jnp.sum(jnp.where(mask, bounded, 0.0))


def k1_in_the_loss(logp, advantages, mask, ref_logp):
  return reinforce(logp, advantages, mask) + jnp.sum(jnp.where(mask, logp - ref_logp, 0.0))


def all_ones(mask):
  return mask.astype(float)


PLANTED = [
  (testing.check_padding, by_padded_width, {}),
  (testing.check_padding, gradient_to_padding, {}),
  (testing.check_empty, unguarded_lengths, {}),
  (testing.check_empty, constant_added, {}),
  (testing.check_microbatches, own_token_mean, {"weights": all_ones}),
  (testing.check_microbatches, reinforce, {}),
  (testing.check_row_order, weighted_by_row, {}),
  (testing.check_poisoned_masks, mask_multiplies, {}),
  (testing.check_poisoned_masks, ratio_masked_late, {"arrays": ("old_logp",)}),
  (testing.check_on_policy_gradient, weight_with_gradient, {}),
  (testing.check_on_policy_gradient, pushes_down, {}),
  (testing.check_on_policy_gradient, absolute_advantage, {}),
  (testing.check_on_policy_gradient, clip_at_one, {"arrays": ("old_logp",), "weights": all_ones}),
  (testing.check_on_policy_gradient, k1_in_the_loss, {"arrays": ("ref_logp",)}),
]


def _deviation(rewards):
  return rewards - rewards.mean(-1, keepdims=True)


def tiny_eps(rewards):
  centered = _deviation(rewards)
  return centered / (jnp.sqrt((centered**2).mean(-1, keepdims=True)) + 1e-9)


def mean_of_squares(rewards):
  mean = rewards.mean(-1, keepdims=True)
  variance = (rewards**2).mean(-1, keepdims=True) - mean**2
  return (rewards - mean) / (jnp.sqrt(jnp.maximum(variance, 0.0)) + 1e-4)


def not_scaled(rewards):
  return _deviation(rewards) / 2.0


def deviation_of_the_others(rewards):
  others = 1.0 - jnp.eye(rewards.shape[1])
  mean = rewards @ others / (rewards.shape[1] - 1)
  deviation = jnp.abs(rewards[:, None, :] - mean[:, :, None]) * others
  return (rewards - mean) / (deviation.sum(-1) / (rewards.shape[1] - 1) + 1e-4)


def without_eos(tokens, eos_ids):
  return jnp.cumsum(jnp.isin(tokens, jnp.array(eos_ids)), -1) == 0


def first_id_only(tokens, eos_ids):
  return grpo_jax.completion_mask(tokens, eos_ids[:1])


def temperature_ignored(logits, tokens, temperature):
  return grpo_jax.token_logprobs(logits, tokens)


PLANTED += [
  (testing.check_constant_group, tiny_eps, {}),
  (testing.check_shift_scale, mean_of_squares, {}),
  (testing.check_shift_scale, not_scaled, {}),
  (testing.check_shift_scale, deviation_of_the_others, {}),
  (testing.check_shift_scale, grpo_jax.max_rl, {"scale": None}),
  (testing.check_shift_scale, grpo_jax.group_normalized, {"scale": "equivariant"}),
  (testing.check_eos, without_eos, {}),
  (testing.check_eos, first_id_only, {}),
  (testing.check_temperature, temperature_ignored, {}),
]


@pytest.mark.parametrize(
  ("check", "function", "settings"),
  PLANTED,
  ids=[f"{check.__name__}-{function.__name__}" for check, function, _ in PLANTED],
)
def test_a_planted_bug_is_caught(check, function, settings):
  with pytest.raises(testing.Counterexample) as caught:
    check(function, **settings)
  assert isinstance(caught.value, AssertionError)
  text = str(caught.value)
  assert text.startswith(f"This property does not hold: {caught.value.property}\n")
  assert caught.value.found in text
  assert all(f"{name} =" in text for name in caught.value.arrays)


def test_every_check_is_tested():
  checks = {name for name in dir(testing) if name.startswith("check_")}
  assert checks == {check.__name__ for check, _, _ in PLANTED}


def test_the_first_counterexample_is_raised_with_its_arrays():
  with pytest.raises(testing.Counterexample) as caught:
    testing.check_eos(lambda tokens, eos_ids: tokens != 0)
  assert caught.value.found == "EOS 0 is also the pad"
  assert caught.value.property == (
    "the mask ends with the first end-of-sequence token, for any pad id."
  )
  assert caught.value.arrays["tokens"].tolist() == [[5, 6, 0, 0], [5, 6, 7, 7]]
  assert caught.value.arrays["actual"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
  assert caught.value.arrays["expected"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_an_unknown_scale_is_an_error():
  with pytest.raises(ValueError, match="scale must be 'invariant', 'equivariant' or None, got 'no"):
    testing.check_shift_scale(grpo_jax.group_normalized, scale="none")


# The report expected of each check, without numbers that depend on rounding.
FOUND = {
  published_losses.tunix_k1_loss: "a weight depends on logp or A",
  published_losses.easydel_cispo: "a weight has the wrong sign",
  published_losses.marin_dapo: r"equal lengths, micro-batches of \(2, 2\)",
  published_losses.sequence_mean: "unequal lengths",
  published_losses.nanochat_loss: "unequal lengths",
  published_losses.maxtext_loss: "nan in the masked slots of logp: the loss differs",
  published_losses.skyrl_loss: "nan in the masked slots of logp: the gradient differs",
  published_losses.marin_kl_mean: "the second sequence is empty",
  published_losses.tunix_mask: "EOS 0 is also the pad",
  published_losses.lmpo_mask: "EOS 9 comes first",
  published_losses.openrlhf_advantages: r"\d+ rewards of",
  published_losses.verl_advantages: "1 rewards of 1.0 get up to 1",
  published_losses.nemo_advantages: "other advantages for rewards",
  published_losses.mllm_jax_logprobs: "at temperature 0.7 they add up to 0.58",
}


@pytest.mark.parametrize(
  "row", published_losses.DEFECTS, ids=[row.function.__name__ for row in published_losses.DEFECTS]
)
def test_defects_of_published_losses_are_reported(row):
  assert re.match(FOUND[row.function], row.report)


def test_the_documentation_has_the_printed_table():
  document = (Path(__file__).parents[1] / "docs" / "invariances.md").read_text(encoding="utf-8")
  for row in published_losses.table():  # without the last column, which depends on rounding
    assert row.rsplit("|", 2)[0] in document
