"""Tests losses: formula and gradient of the derivation, masking, metrics, robustness, errors."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import ALGORITHMS, Algorithm, grpo_loss, policy_loss, token_weights
from grpo_jax.core.corrections import CORRECTIONS
from grpo_jax.core.kl import KLS
from grpo_jax.core.masks import AVERAGES
from grpo_jax.core.ratios import ANCHORS, RATIOS
from grpo_jax.core.trust_regions import TRUST_REGIONS
from tests.helpers.arrays import assert_close

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

P, G, T = 2, 3, 4
LENGTHS = np.array([[4, 2, 1], [3, 0, 4]])
MASK = np.arange(T) < LENGTHS[..., None]
RNG = np.random.default_rng(0)
LOGP = RNG.uniform(-3.0, -0.1, (P, G, T)).astype(np.float32)
REF, OLD, SAMPLER = (
  (LOGP + RNG.normal(0.0, scale, LOGP.shape)).astype(np.float32) for scale in (0.5, 0.3, 0.2)
)
ADVANTAGES = np.array([[1.5, -0.5, 0.25], [-1.0, 2.0, -0.75]], np.float32)
WEIGHTS = {
  "sequence": MASK / np.maximum(LENGTHS, 1)[..., None] / 6,
  "token": MASK / LENGTHS.sum(),
  "constant": MASK / (6 * 10),
  "prompt": MASK / (2 * np.array([7, 7])[:, None, None]),
}
# A row with a function for every choice. `ROWS` contains each function of each choice.
EVERYTHING = Algorithm(
  trust_region="dual_clip",
  clip_low=0.2,
  clip_high=0.3,
  clip_dual=3.0,
  kl="k3_ratio",
  beta=0.1,
  correction="token_mask",
  correction_min=0.5,
  correction_max=2.0,
  average="token",
)
NAMES = ("grpo", "gspo", "gspo_token", "cispo", "sapo", "dppo", "prime_rl", "reinforce_pp_baseline")
ROWS = {
  **{name: ALGORITHMS[name] for name in NAMES},
  "everything": EVERYTHING,
  "sequence_mask": dataclasses.replace(
    EVERYTHING, correction="sequence_mask", kl="k1", average="constant"
  ),
  "truncate": Algorithm(
    correction="token_truncate", correction_max=1.1, kl="k3_k2_gradient", beta=0.2
  ),
  "geometric": Algorithm(
    correction="geometric_mask", geometric_min=0.95, geometric_max=1.1, average="prompt"
  ),
  "off_policy": Algorithm(correction="off_policy_mask", off_policy_max=0.02),
  "chain": Algorithm(
    anchor="sampler",
    correction="geometric_mask+off_policy_mask",
    geometric_min=0.9,
    geometric_max=1.2,
    off_policy_max=0.02,
    sampler_penalty=0.3,
    nll_weight=0.1,
    entropy_bonus=0.05,
  ),
}
ROWS["teacher"] = dataclasses.replace(
  EVERYTHING, teacher_weight=0.7, teacher_discount=0.5, log_ratio_baseline="leave_one_out"
)
ROWS["kl in the reward"] = dataclasses.replace(EVERYTHING, kl="k2", kl_in="reward")
ROWS["divergence"] = dataclasses.replace(EVERYTHING, teacher_weight=0.7, teacher_divergence=0.5)
every_row = pytest.mark.parametrize("name", ROWS)
TEACHER = (LOGP + RNG.normal(0.0, 0.4, LOGP.shape)).astype(np.float32)
DIVERGENCE = RNG.uniform(0.0, 1.0, LOGP.shape).astype(np.float32)
ENTROPY = RNG.uniform(0.1, 3.0, LOGP.shape).astype(np.float32)
RIGHT = np.array([[True, False, True], [False, False, True]])
NLL_WEIGHTS = ((MASK & RIGHT[..., None]) / 9).astype(np.float32)
ARRAYS = {
  "old_logp": OLD,
  "ref_logp": REF,
  "sampler_logp": SAMPLER,
  "teacher_logp": TEACHER,
  "divergence": DIVERGENCE,
  "entropy": ENTROPY,
  "nll_weights": NLL_WEIGHTS,
}


close = partial(assert_close, rtol=2e-5, atol=2e-6)


def run(name, logp, advantages, mask, **arrays):
  """Returns (loss, metrics), gradient of a row."""
  row = dataclasses.replace(EVERYTHING, beta=0.0) if name == "no penalty" else ROWS[name]
  loss = partial(policy_loss, row, max_length=10)
  call = jax.value_and_grad(lambda x: loss(x, advantages, mask, **arrays), has_aux=True)
  return call(jnp.asarray(logp))


# --- the derivation ------------------------------------------------------------------------------


@pytest.mark.parametrize("average", WEIGHTS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_final_loss_of_the_derivation(average, beta):
  """Compares -(1/N) sum 1/|o| sum (exp(logp - sg(logp)) A - beta k3) with NumPy."""
  logp, ref = LOGP.astype(float), REF.astype(float)
  k3 = np.exp(ref - logp) - (ref - logp) - 1
  a = ADVANTAGES[..., None].astype(float)
  expected = np.sum(WEIGHTS[average] * -(1.0 * a - beta * k3))
  expected_gradient = -(a - beta * (1 - np.exp(ref - logp))) * WEIGHTS[average]

  def loss(logp):
    return grpo_loss(
      logp, ADVANTAGES, MASK, ref_logp=REF, beta=beta, average=average, max_length=10
    )

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(LOGP))
  close(value, expected)
  close(gradient, expected_gradient)
  close(metrics["kl"], k3[MASK].mean())
  assert metrics["clip_ratio/region_mean"] == 0
  assert metrics["ratio/mean"] == metrics["ratio/max"] == 1


def test_off_policy_grpo_against_numpy():
  logp, old, ref = LOGP.astype(float), OLD.astype(float), REF.astype(float)
  ratio, a = np.exp(logp - old), np.broadcast_to(ADVANTAGES[..., None], LOGP.shape)
  objective = np.minimum(ratio * a, np.clip(ratio, 0.9, 1.3) * a)
  k3 = np.exp(ref - logp) - (ref - logp) - 1
  high, low = (ratio > 1.3) & (a > 0), (ratio < 0.9) & (a < 0)
  slope = np.where(high | low, 0.0, ratio * a) - 0.04 * (1 - np.exp(ref - logp))

  def loss(logp):
    return grpo_loss(
      logp, ADVANTAGES, MASK, old_logp=OLD, ref_logp=REF, beta=0.04, clip_low=0.1, clip_high=0.3
    )

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(LOGP))
  close(value, -np.sum(WEIGHTS["sequence"] * (objective - 0.04 * k3)))
  close(gradient, -WEIGHTS["sequence"] * slope)
  assert high[MASK].any()  # the region binds on both sides
  assert low[MASK].any()
  close(metrics["clip_ratio/high_mean"], high[MASK].mean())
  close(metrics["clip_ratio/low_mean"], low[MASK].mean())
  close(metrics["clip_ratio/region_mean"], (high | low)[MASK].mean())
  close(metrics["ratio/mean"], ratio[MASK].mean())
  close(metrics["ratio/max"], ratio[MASK].max())


def test_grpo_loss_is_the_row_grpo_with_other_defaults():
  row = dataclasses.replace(ALGORITHMS["grpo"], beta=0.04)
  arrays = {"old_logp": OLD, "ref_logp": REF}
  actual = grpo_loss(LOGP, ADVANTAGES, MASK, beta=0.04, **arrays)
  expected = policy_loss(row, LOGP, ADVANTAGES, MASK, **arrays)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  plain = grpo_loss(LOGP, ADVANTAGES, MASK, old_logp=OLD)  # beta 0, clip 0.2, by sequence
  row = Algorithm(trust_region="clip", clip_low=0.2, clip_high=0.2)
  close(plain[0], policy_loss(row, LOGP, ADVANTAGES, MASK, old_logp=OLD)[0])


# --- all parts together --------------------------------------------------------------------------


def test_all_parts_together():
  """Compares -(correction * objective - beta * kl), each part written out in NumPy."""
  (value, metrics), gradient = run("everything", LOGP, ADVANTAGES, MASK, **ARRAYS)
  logp, old, ref, sampler = (x.astype(float) for x in (LOGP, OLD, REF, SAMPLER))
  a = np.broadcast_to(ADVANTAGES[..., None], LOGP.shape)
  ratio = np.exp(logp - old)
  bounded = np.where(a > 0, np.minimum(ratio, 1.3), np.clip(ratio, 0.8, 3.0))
  inside = bounded == ratio
  sampler_ratio = np.exp(old - sampler)
  correction = np.where((sampler_ratio < 0.5) | (sampler_ratio > 2.0), 0.0, sampler_ratio)
  k3 = np.exp(ref - logp) - (ref - logp) - 1
  weights = WEIGHTS["token"]
  close(value, -np.sum(weights * (correction * bounded * a - 0.1 * k3 * ratio)))
  k3_slope = (1 - np.exp(ref - logp) + k3) * ratio
  close(gradient, -weights * (correction * inside * ratio * a - 0.1 * k3_slope))
  difference = np.abs(old - sampler)[MASK]
  close(metrics["kl"], (k3 * ratio)[MASK].mean())
  close(metrics["sampling/sampling_logp_difference/mean"], difference.mean())
  close(metrics["sampling/sampling_logp_difference/max"], difference.max())
  name = "sampling/importance_sampling_ratio"
  close(metrics[f"{name}/min"], correction[MASK].min())
  close(metrics[f"{name}/mean"], correction[MASK].mean())
  close(metrics[f"{name}/max"], correction[MASK].max())


def test_the_smallest_correction_is_that_of_a_token():
  """All ratios are 3: masked slots must not add a smaller one."""
  row = Algorithm(correction="token_truncate", correction_max=5.0)
  sampler = LOGP - np.float32(np.log(3.0))
  _, metrics = policy_loss(row, LOGP, ADVANTAGES, MASK, sampler_logp=sampler)
  close(metrics["sampling/importance_sampling_ratio/min"], 3.0)


# --- the policy that sampled ---------------------------------------------------------------------


def test_an_anchor_at_the_sampler_bounds_the_first_update_too():
  """DPPO by hand: the mask and the ratio compare with the sampler, whatever the old policy is."""
  sampler = (LOGP - RNG.normal(0.0, 1.0, LOGP.shape)).astype(np.float32)
  logp, mu = LOGP.astype(float), sampler.astype(float)
  a = np.broadcast_to(ADVANTAGES[..., None], LOGP.shape)
  moved = np.exp(logp) - np.exp(mu)
  stopped = (np.sign(a) * moved > 0.15) & MASK
  assert 0 < stopped.sum() < MASK.sum()
  weight = np.minimum(np.exp(logp - mu), 20.0) * ~stopped
  for old in ({}, {"old_logp": OLD}):
    (value, metrics), gradient = run("dppo", LOGP, ADVANTAGES, MASK, sampler_logp=sampler, **old)
    close(value, -np.sum(WEIGHTS["constant"] * weight * a * logp))
    close(gradient, -WEIGHTS["constant"] * weight * a)
    close(metrics["clip_ratio/region_mean"], stopped[MASK].mean())
    close(metrics["ratio/max"], np.exp(logp - mu)[MASK].max())
    trainer = OLD.astype(float) if old else logp
    difference = np.abs(trainer - mu)[MASK]
    close(metrics["sampling/sampling_logp_difference/mean"], difference.mean())


def test_without_sampler_logp_the_old_policy_is_the_sampler():
  actual = run("dppo", LOGP, ADVANTAGES, MASK, old_logp=OLD)
  (expected, _), gradient = run("dppo", LOGP, ADVANTAGES, MASK, sampler_logp=OLD)
  close(actual[0][0], expected)
  close(actual[1], gradient)


def test_the_squared_log_ratio_is_on_tokens_that_the_mask_stops_too():
  """prime_rl by hand: all advantages are 0, so only 1e-3 (logp - sampler)^2 is left."""
  gap = (LOGP - SAMPLER).astype(float)
  (value, _), gradient = run(
    "prime_rl", LOGP, np.zeros_like(ADVANTAGES), MASK, sampler_logp=SAMPLER
  )
  close(value, np.sum(WEIGHTS["token"] * 1e-3 * gap**2))
  close(gradient, WEIGHTS["token"] * 2e-3 * gap, atol=1e-8)
  far = np.where(MASK, LOGP - 5, 0).astype(np.float32)  # every ratio is e^5
  up = np.ones_like(ADVANTAGES)
  (_, metrics), stopped = run("prime_rl", np.full_like(LOGP, -0.1), up, MASK, sampler_logp=far)
  assert metrics["clip_ratio/high_mean"] == 1
  close(stopped, WEIGHTS["token"] * 2e-3 * (-0.1 - far), atol=1e-7)


def test_the_off_policy_mask_drops_the_objective_of_a_sequence_and_not_its_kl():
  """The mean over a sequence of sampler - logp, and not old - sampler, against the threshold."""
  row = Algorithm(correction="off_policy_mask", off_policy_max=0.02, kl="k2", beta=0.1)
  drop = np.where(MASK, (SAMPLER - LOGP).astype(float), 0).sum(-1) / np.maximum(LENGTHS, 1)
  dropped = (drop > 0.02) & (ADVANTAGES < 0) & (LENGTHS > 0)
  assert dropped.any()
  assert ((drop > 0.02) & (ADVANTAGES > 0)).any()
  assert ((drop <= 0.02) & (ADVANTAGES < 0) & (LENGTHS > 0)).any()
  ratio, gap = np.exp((LOGP - OLD).astype(float)), (LOGP - REF).astype(float)
  slope = ratio * ADVANTAGES[..., None] * ~dropped[..., None] - 0.1 * gap

  def loss(logp):
    return policy_loss(
      row, logp, ADVANTAGES, MASK, old_logp=OLD, ref_logp=REF, sampler_logp=SAMPLER
    )

  gradient, metrics = jax.grad(loss, has_aux=True)(jnp.asarray(LOGP))
  close(gradient, -WEIGHTS["sequence"] * slope)
  kept = ~np.broadcast_to(dropped[..., None], MASK.shape)[MASK]
  close(metrics["sampling/importance_sampling_ratio/mean"], kept.mean())


# --- further terms -------------------------------------------------------------------------------


@pytest.mark.parametrize("coef", [None, 0.07, np.full((P, 1, 1), 0.07, np.float32)])
def test_an_entropy_bonus_by_hand(coef):
  """-c H with the weights of the row, to the entropy and to nothing else."""
  row = Algorithm(average="token", entropy_bonus=0.07 if coef is None else 0.0)
  if coef is not None:
    row = dataclasses.replace(row, entropy_target=0.5, entropy_delta=0.1)

  def loss(entropy):
    return policy_loss(row, LOGP, ADVANTAGES, MASK, entropy=entropy, entropy_coef=coef)

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(ENTROPY))
  plain, _ = policy_loss(Algorithm(average="token"), LOGP, ADVANTAGES, MASK)
  close(value, plain - 0.07 * ENTROPY[MASK].mean())
  close(gradient, -0.07 * WEIGHTS["token"])
  close(metrics["entropy"], ENTROPY[MASK].mean())
  close(metrics["entropy_coef"], 0.07)


def test_the_entropy_is_only_a_metric_without_a_bonus():
  loss = partial(policy_loss, "dapo", LOGP, ADVANTAGES, MASK)
  with_entropy, without = loss(entropy=ENTROPY), loss()
  assert with_entropy[0] == without[0]
  assert set(with_entropy[1]) - set(without[1]) == {"entropy"}
  assert not jax.grad(lambda x: loss(entropy=x)[0])(jnp.asarray(ENTROPY)).any()


def test_the_likelihood_of_right_answers_by_hand():
  """-mu times the mean log-prob over the tokens of right answers, with weights of its own."""
  row = Algorithm(nll_weight=0.1)
  right = MASK & RIGHT[..., None]
  weights = right / right.sum()

  def loss(logp, row=row):
    return policy_loss(row, logp, ADVANTAGES, MASK, nll_weights=weights)

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(LOGP))
  plain, slope = jax.value_and_grad(lambda x: loss(x, Algorithm())[0])(jnp.asarray(LOGP))
  close(value, plain - 0.1 * LOGP[right].mean())
  close(gradient, slope - 0.1 * weights)
  close(metrics["nll"], np.where(right, -LOGP, 0)[MASK].mean())


def test_a_sequence_ratio_ignores_masked_tokens():
  (value, metrics), gradient = run("gspo", LOGP, ADVANTAGES, MASK, old_logp=OLD)
  difference = np.where(MASK, (LOGP - OLD).astype(float), 0.0)
  ratio = np.exp(difference.sum(-1) / np.maximum(LENGTHS, 1))
  bounded = np.where(ADVANTAGES > 0, np.minimum(ratio, 1 + 4e-4), np.maximum(ratio, 1 - 3e-4))
  inside = bounded == ratio
  assert inside[LENGTHS > 0].any()
  present = LENGTHS > 0
  close(value, -np.sum(bounded * ADVANTAGES * present) / 6)
  expected = -(ratio * ADVANTAGES * inside)[..., None] * WEIGHTS["sequence"]
  close(gradient, expected)
  close(metrics["ratio/max"], ratio[LENGTHS > 0].max())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_of_the_table_is_reinforce_on_policy(name):
  """The gradient is -A times the weight: at a ratio of 1 no bound binds, and no KL has a slope."""
  row = ALGORITHMS[name]
  arrays = {"ref_logp": LOGP, "sampler_logp": LOGP, "teacher_logp": LOGP}

  def loss(logp):
    return policy_loss(row, logp, ADVANTAGES, MASK, **arrays, max_length=10)[0]

  expected = -ADVANTAGES[..., None] * WEIGHTS[row.average]
  close(jax.grad(loss)(jnp.asarray(LOGP)), expected)


def later(values):
  """Returns the sum of each token's value and all later ones of its completion."""
  return np.flip(np.cumsum(np.flip(np.where(MASK, values, 0.0), -1), -1), -1)


def test_a_kl_term_in_the_reward_goes_through_ratio_region_and_correction():
  """The penalty of the old policy, k2, is subtracted from the reward of each token."""
  logp, old, ref = LOGP.astype(float), OLD.astype(float), REF.astype(float)
  a = np.where(MASK, ADVANTAGES[..., None] - 0.1 * later((old - ref) ** 2 / 2), 0.0)
  (value, metrics), gradient = run("kl in the reward", LOGP, ADVANTAGES, MASK, **ARRAYS)
  (expected, others), slope = run("no penalty", LOGP, a.astype(np.float32), MASK, **ARRAYS)
  close(value, expected)
  close(gradient, slope)
  close(metrics["kl"], ((logp - ref) ** 2 / 2)[MASK].mean())
  close(metrics["clip_ratio/region_mean"], others["clip_ratio/region_mean"])


def test_a_teacher_adds_its_log_ratios_to_the_advantages():
  row = Algorithm(teacher_weight=0.7, teacher_discount=1.0)
  difference = TEACHER.astype(float) - OLD.astype(float)
  a = np.where(MASK, ADVANTAGES[..., None] + 0.7 * later(difference), 0.0)
  ratio = np.exp(LOGP.astype(float) - OLD.astype(float))
  arrays = {"old_logp": OLD, "teacher_logp": TEACHER}
  loss, metrics = policy_loss(row, LOGP, ADVANTAGES, MASK, **arrays)
  close(loss, -np.sum(WEIGHTS["sequence"] * ratio * a))
  close(metrics["teacher/kl"], -difference[MASK].mean())
  on_policy, _ = policy_loss(row, OLD, ADVANTAGES, MASK, teacher_logp=TEACHER)
  close(on_policy, -np.sum(WEIGHTS["sequence"] * a))


def test_a_divergence_is_a_term_of_the_loss_with_its_own_gradient():
  row = Algorithm(teacher_weight=0.7, teacher_divergence=1.0)

  def loss(divergence, row=row):
    return policy_loss(row, LOGP, ADVANTAGES, MASK, divergence=divergence)

  (value, metrics), slope = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(DIVERGENCE))
  task = -np.sum(WEIGHTS["sequence"] * ADVANTAGES[..., None])
  close(value, task + 0.7 * np.sum(WEIGHTS["sequence"] * DIVERGENCE))
  close(slope, 0.7 * WEIGHTS["sequence"])
  close(metrics["teacher/divergence"], DIVERGENCE[MASK].mean())
  without, metrics = loss(DIVERGENCE, Algorithm())
  close(without, task)
  assert "teacher/divergence" in metrics


def test_the_teacher_is_only_a_metric_without_a_weight():
  with_teacher, metrics = policy_loss("grpo", LOGP, ADVANTAGES, MASK, **ARRAYS)
  arrays = {name: ARRAYS[name] for name in ("old_logp", "ref_logp")}
  assert with_teacher == policy_loss("grpo", LOGP, ADVANTAGES, MASK, **arrays)[0]
  close(metrics["teacher/kl"], (OLD - TEACHER)[MASK].mean())


def test_a_missing_teacher_is_named():
  with pytest.raises(ValueError, match=r"^teacher_weight=1.0 needs teacher_logp"):
    policy_loss("opd", LOGP, ADVANTAGES, MASK)
  row = Algorithm(teacher_weight=1.0, teacher_divergence=0.0)
  with pytest.raises(ValueError, match=r"^teacher_divergence=0.0 needs divergence"):
    policy_loss(row, LOGP, ADVANTAGES, MASK, teacher_logp=TEACHER)
  with pytest.raises(ValueError, match=r"^divergence has shape \(2, 3\), expected \(2, 3, 4\)"):
    policy_loss(row, LOGP, ADVANTAGES, MASK, divergence=DIVERGENCE[..., 0])


def test_advantages_may_be_per_token():
  per_token = np.broadcast_to(ADVANTAGES[..., None], LOGP.shape) * np.arange(1, T + 1)
  gradient = jax.grad(lambda x: policy_loss("reinforce", x, per_token, MASK)[0])(LOGP)
  close(gradient, -per_token * WEIGHTS["sequence"])


def test_the_reference_is_only_a_metric_with_beta_zero():
  (with_ref, metrics), gradient = run("gspo", LOGP, ADVANTAGES, MASK, old_logp=OLD, ref_logp=REF)
  (without, others), same = run("gspo", LOGP, ADVANTAGES, MASK, old_logp=OLD)
  assert with_ref == without
  assert (gradient == same).all()
  assert set(metrics) - set(others) == {"kl"}
  close(metrics["kl"], (np.exp(REF - LOGP) - (REF - LOGP) - 1)[MASK].mean())


def test_the_sampler_is_only_a_metric_without_a_correction():
  arrays = {"old_logp": OLD, "sampler_logp": SAMPLER}
  (with_sampler, metrics), _ = run("gspo", LOGP, ADVANTAGES, MASK, **arrays)
  (without, _), _ = run("gspo", LOGP, ADVANTAGES, MASK, old_logp=OLD)
  assert with_sampler == without
  assert metrics["sampling/importance_sampling_ratio/mean"] == 1
  close(metrics["sampling/sampling_logp_difference/max"], np.abs(OLD - SAMPLER)[MASK].max())


@pytest.mark.parametrize("name", ["gspo", "dppo", "everything"])
def test_without_old_logp_the_policy_is_its_own_old_policy(name):
  arrays = {k: v for k, v in ARRAYS.items() if k != "old_logp"}
  actual = run(name, LOGP, ADVANTAGES, MASK, **arrays)
  expected = run(name, LOGP, ADVANTAGES, MASK, old_logp=LOGP, **arrays)
  jax.tree.map(close, actual, expected)


@every_row
def test_only_logp_receives_a_gradient(name):
  def loss(others):
    return policy_loss(ROWS[name], LOGP, mask=MASK, max_length=10, **others)[0]

  others = {"advantages": ADVANTAGES, "weights": WEIGHTS["token"].astype(np.float32), **ARRAYS}
  gradients = jax.grad(loss)(others)
  assert np.asarray(gradients.pop("divergence")).any() == (name == "divergence")  # a loss term
  assert np.asarray(gradients.pop("entropy")).any() == ROWS[name].needs_entropy
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradients))


@every_row
def test_microbatches_with_global_weights_add_up(name):
  row = ROWS[name]
  weights = np.asarray(token_weights(MASK, row.average, max_length=10))
  (whole, _), gradient = run(name, LOGP, ADVANTAGES, MASK, **ARRAYS)
  total, gradients = 0.0, []
  for i in range(P):
    part = {k: v[i : i + 1] for k, v in (ARRAYS | {"weights": weights}).items()}
    (loss, _), slope = run(name, LOGP[i : i + 1], ADVANTAGES[i : i + 1], MASK[i : i + 1], **part)
    total += loss
    gradients.append(slope)
  close(total, whole)
  close(np.concatenate(gradients), gradient)


def test_leading_axes_are_free():
  flat = {k: v.reshape(-1, T) for k, v in ARRAYS.items()}
  actual = policy_loss(
    EVERYTHING, LOGP.reshape(-1, T), ADVANTAGES.reshape(-1), MASK.reshape(-1, T), **flat
  )
  jax.tree.map(close, actual, policy_loss(EVERYTHING, LOGP, ADVANTAGES, MASK, **ARRAYS))
  loss, _ = policy_loss("reinforce", LOGP[0, 0], ADVANTAGES[0, 0], MASK[0, 0])
  close(loss, -ADVANTAGES[0, 0])


def test_an_average_may_be_a_function():
  row = dataclasses.replace(ALGORITHMS["reinforce"], average=lambda mask, max_length: mask * 1.0)
  close(policy_loss(row, LOGP, ADVANTAGES, MASK)[0], -np.sum(LENGTHS * ADVANTAGES))


def test_choices_may_be_functions():
  """The row "everything", with its functions in place of their names."""
  kinds = {
    "ratio": RATIOS,
    "trust_region": TRUST_REGIONS,
    "kl": KLS,
    "correction": CORRECTIONS,
    "average": AVERAGES,
  }
  functions = {kind: table[getattr(EVERYTHING, kind)] for kind, table in kinds.items()}
  row = dataclasses.replace(EVERYTHING, **functions)
  actual = policy_loss(row, LOGP, ADVANTAGES, MASK, **ARRAYS)
  expected = policy_loss(EVERYTHING, LOGP, ADVANTAGES, MASK, **ARRAYS)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- robustness ----------------------------------------------------------------------------------


@every_row
def test_masked_slots_may_hold_anything(name):
  """NaN and infinity in every argument change no bit of loss, metrics and gradient."""
  arrays = ARRAYS | {"weights": WEIGHTS["token"].astype(np.float32)}
  per_token = np.broadcast_to(ADVANTAGES[..., None], LOGP.shape)
  expected = run(name, LOGP, per_token, MASK, **arrays)
  assert not np.asarray(expected[1])[~MASK].any()
  kinds = ([np.nan] * 10, [np.inf] * 10, [-np.inf] * 10, [np.inf, -np.inf, np.nan, 0, np.inf] * 2)
  for poisons in kinds:
    bad = [
      np.where(MASK, x, np.float32(poison))
      for x, poison in zip((LOGP, per_token, *arrays.values()), poisons, strict=True)
    ]
    actual = run(name, bad[0], bad[1], MASK, **dict(zip(arrays, bad[2:], strict=True)))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_advantage_of_an_empty_sequence_may_be_nan():
  bad = np.where(LENGTHS == 0, np.nan, ADVANTAGES).astype(np.float32)
  jax.tree.map(
    np.testing.assert_array_equal,
    run("grpo", LOGP, bad, MASK, **ARRAYS),
    run("grpo", LOGP, ADVANTAGES, MASK, **ARRAYS),
  )


@every_row
def test_a_batch_without_tokens(name):
  (loss, metrics), gradient = run(name, LOGP, ADVANTAGES, np.zeros_like(MASK), **ARRAYS)
  assert metrics.pop("entropy_coef", 0) == 0
  assert loss == 0
  assert not np.asarray(gradient).any()
  assert all(np.isfinite(value) for value in metrics.values())
  assert all(value == 0 for value in metrics.values())


def test_a_batch_of_width_zero():
  arrays = {k: v[..., :0] for k, v in ARRAYS.items()}
  loss, metrics = policy_loss(EVERYTHING, LOGP[..., :0], ADVANTAGES, MASK[..., :0], **arrays)
  assert loss == 0
  assert all(np.isfinite(value) for value in metrics.values())


@every_row
def test_log_ratios_of_100_give_finite_loss_gradient_and_metrics(name):
  """exp continues as a straight line above e^20, as documented."""
  far = np.where(np.arange(T) % 2, 0.0, -100.0).astype(np.float32) * np.ones_like(LOGP)
  near = -100.0 - far
  full = np.ones_like(MASK)
  arrays = {"old_logp": near, "ref_logp": near, "sampler_logp": far}
  arrays = ARRAYS | arrays | {"teacher_logp": far, "divergence": near}
  result = run(name, far, ADVANTAGES, full, **arrays)
  assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(result))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_inputs_are_computed_in_float32(dtype):
  narrow = [jnp.asarray(x, dtype) for x in (LOGP, ADVANTAGES, *ARRAYS.values())]
  wide = [x.astype(jnp.float32) for x in narrow]
  actual, expected = (
    run("everything", x[0], x[1], MASK, **dict(zip(ARRAYS, x[2:], strict=True)))
    for x in (narrow, wide)
  )
  assert actual[0][0].dtype == jnp.float32
  assert actual[1].dtype == dtype  # the gradient has the dtype of logp
  jax.tree.map(close, actual[0], expected[0])
  close(actual[1].astype(jnp.float32), expected[1], atol=0.01)


def test_float64(x64):
  arrays = {k: v.astype(np.float64) for k, v in ARRAYS.items()}
  (loss, metrics), gradient = run("everything", LOGP.astype(float), ADVANTAGES, MASK, **arrays)
  assert {x.dtype for x in (loss, gradient, *metrics.values())} == {jnp.dtype("float64")}


@pytest.mark.parametrize("name", ["everything", "gspo"])
def test_jit_changes_nothing_but_rounding(name):
  jitted = jax.jit(run, static_argnums=0)(name, LOGP, ADVANTAGES, MASK, **ARRAYS)
  jax.tree.map(close, jitted, run(name, LOGP, ADVANTAGES, MASK, **ARRAYS))


def test_vmap_over_seeds():
  logps = np.stack([LOGP, LOGP - 1, OLD])
  losses, _ = jax.vmap(lambda x: policy_loss("gspo", x, ADVANTAGES, MASK, old_logp=OLD))(logps)
  for loss, logp in zip(losses, logps, strict=True):
    close(loss, policy_loss("gspo", logp, ADVANTAGES, MASK, old_logp=OLD)[0])


def test_integer_masks_and_lists_are_accepted():
  actual = policy_loss("grpo", LOGP.tolist(), ADVANTAGES.tolist(), MASK.astype(int), ref_logp=REF)
  close(actual[0], policy_loss("grpo", LOGP, ADVANTAGES, MASK, ref_logp=REF)[0])


# --- metrics and custom functions ----------------------------------------------------------------

SMALL_LOGP = jnp.log(jnp.array([[[0.5, 0.25], [0.125, 0.5]]]))
SMALL_MASK = jnp.array([[[True, True], [True, False]]])
A = jnp.array([[1.0, -1.0]])


def test_metrics_carry_no_gradient():
  """A metric that is added to a loss by mistake must not train anything."""
  row = dataclasses.replace(ALGORITHMS["grpo"], correction="token_truncate", correction_max=2.0)

  def metrics(logp):
    others = {
      "old_logp": SMALL_LOGP - 0.5,
      "ref_logp": SMALL_LOGP - 1.0,
      "sampler_logp": SMALL_LOGP - 0.25,
    }
    return policy_loss(row, logp, A, SMALL_MASK, **others)[1]

  slopes = jax.jacobian(metrics)(SMALL_LOGP)
  assert {"kl", "ratio/mean", "sampling/importance_sampling_ratio/max"} <= set(slopes)
  assert not any(slope.any() for slope in slopes.values())


def test_with_beta_zero_an_infinite_kl_does_not_reach_the_loss():
  """The reference excludes a token that was drawn."""
  row = dataclasses.replace(ALGORITHMS["grpo"], beta=0.0)
  ref = SMALL_LOGP.at[0, 0, 0].set(-np.inf)

  def loss(logp):
    return policy_loss(row, logp, A, SMALL_MASK, ref_logp=ref)

  (value, metrics), slope = jax.value_and_grad(loss, has_aux=True)(SMALL_LOGP)
  assert metrics["kl"] == np.inf
  assert value == 0  # -(1/4 + 1/4 - 1/2): the weights, at ratio 1
  np.testing.assert_allclose(slope, [[[-0.25, -0.25], [0.5, 0.0]]], rtol=1e-6)


def test_custom_functions_receive_zeros_where_masked():
  arguments = {}

  def region(log_ratio, logp, old_logp, advantages):
    arguments.update(log_ratio=log_ratio, logp=logp, old_logp=old_logp, advantages=advantages)
    never = jnp.zeros(logp.shape, bool)
    return jnp.where(SMALL_MASK, logp, np.nan), never, never

  poison = jnp.where(SMALL_MASK, SMALL_LOGP, np.nan)
  advantages = jnp.where(SMALL_MASK, A[..., None], np.nan)
  row = Algorithm(trust_region=region)
  loss, _ = policy_loss(row, poison, advantages, SMALL_MASK, old_logp=poison)
  for name, array in arguments.items():
    assert array[0, 1, 1] == 0, name
  # -(log 1/2 + log 1/4) / 4 - (log 1/8) / 2, in units of log 2
  np.testing.assert_allclose(loss, (3 / 4 + 3 / 2) * np.log(2), rtol=1e-6)


# --- errors --------------------------------------------------------------------------------------

ERRORS = {
  "mask": ({"mask": MASK[:1]}, r"^mask has shape \(1, 3, 4\), expected \(2, 3, 4\)"),
  "mask dtype": ({"mask": MASK * 1.0}, r"^mask must be boolean .*, got dtype float32; pass mask.a"),
  "advantages": (
    {"advantages": ADVANTAGES[0]},
    r"^advantages has shape \(3,\), expected \(2, 3\) \(one per sequence\) or \(2, 3, 4\) \(one",
  ),
  "advantages dtype": ({"advantages": "up"}, r"^advantages must be an array of numbers, got 'up'"),
  "logp": (
    {"logp": np.float32(1)},
    r"^logp has shape \(\), expected at least one axis \[\.\.\., T",
  ),
  "logp dtype": ({"logp": LOGP + 1j}, r"^logp must be real, got dtype complex64"),
  "old_logp": (
    {"old_logp": OLD[..., :2]},
    r"^old_logp has shape \(2, 3, 2\), expected \(2, 3, 4\)",
  ),
  "ref_logp": ({"ref_logp": REF[0]}, r"^ref_logp has shape \(3, 4\), expected \(2, 3, 4\)"),
  "sampler_logp": ({"sampler_logp": SAMPLER[0]}, r"^sampler_logp has shape \(3, 4\), expected"),
  "weights": ({"weights": WEIGHTS["token"][0]}, r"^weights has shape \(3, 4\), expected"),
  "algorithm": (
    {"algorithm": "trpo"},
    r"^unknown algorithm 'trpo'; known: cispo, dapo, dppo, dr_grp",
  ),
  "no reference": ({"ref_logp": None}, r"^beta=0.1 needs ref_logp, the reference's"),
  "no sampler": ({"sampler_logp": None}, r"^correction='token_mask' needs sampler_logp"),
  "no sampler to stay near": (
    {"algorithm": "prime_rl", "sampler_logp": None},
    r"^sampler_penalty=0.001 needs sampler_logp$",
  ),
  "no entropy": (
    {"algorithm": Algorithm(entropy_bonus=0.1), "entropy": None},
    r"^entropy_bonus=0.1 needs entropy, as `head_logprobs` returns it$",
  ),
  "no coefficient": (
    {"algorithm": Algorithm(entropy_target=0.2, entropy_delta=0.1)},
    r"^entropy_target=0.2 needs entropy_coef, the coefficient as it is now; TrainState.create\(",
  ),
  "no right answers": (
    {"algorithm": Algorithm(nll_weight=0.1), "nll_weights": None},
    r"^nll_weight=0.1 needs nll_weights; see `algorithms.nll_weights`$",
  ),
  "entropy": ({"entropy": ENTROPY[0]}, r"^entropy has shape \(3, 4\), expected \(2, 3, 4\)"),
  "nll_weights": ({"nll_weights": NLL_WEIGHTS[0]}, r"^nll_weights has shape \(3, 4\), expected"),
  "no max_length": ({"algorithm": "dr_grpo"}, r"^average='constant' needs max_length"),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(change, message):
  arguments = {"algorithm": EVERYTHING, "logp": LOGP, "advantages": ADVANTAGES, "mask": MASK}
  with pytest.raises(ValueError, match=message):
    policy_loss(**(arguments | ARRAYS | change))


def test_errors_of_grpo_loss():
  with pytest.raises(ValueError, match=r"^beta=0.1 needs ref_logp"):
    grpo_loss(LOGP, ADVANTAGES, MASK, beta=0.1)
  with pytest.raises(ValueError, match=r"^clip_low must be at least 0, got -0.1"):
    grpo_loss(LOGP, ADVANTAGES, MASK, clip_low=-0.1)
  with pytest.raises(ValueError, match=r"^unknown average 'mean'; known"):
    grpo_loss(LOGP, ADVANTAGES, MASK, average="mean")


def test_rows_here_contain_every_choice():
  for kind, table in (
    ("ratio", RATIOS),
    ("anchor", ANCHORS),
    ("trust_region", TRUST_REGIONS),
    ("kl", KLS),
    ("correction", CORRECTIONS),
    ("average", AVERAGES),
  ):
    assert {getattr(row, kind) for row in ROWS.values()} - set(table) <= {
      "geometric_mask+off_policy_mask"
    }
    assert set(table) <= {getattr(row, kind) for row in ROWS.values()}
