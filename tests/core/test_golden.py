"""Compares losses, gradients, metrics and advantages with those of TRL 1.16.0.

`golden/trl-1.16.0.json` holds 63 loss cases (inputs, configuration, loss, gradient with respect to
the log-probs, metrics; float64, one process) and 24 advantage cases (float32). They were recorded
from `GRPOTrainer` with the log-probs as inputs. Every case is compared below. `docs/parity.md`
describes the comparison.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax import Algorithm, policy_loss, token_weights

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/data/golden/trl-1.16.0.json").read_text(encoding="utf-8"))
INPUTS = {name: np.array(value, np.float64) for name, value in GOLDEN["inputs"].items()}
CASES = {case["name"]: case for case in GOLDEN["cases"]}

METRICS_UNMAPPED = {
  "clip_ratio/low_min": "an extreme over sequences of the local process",
  "clip_ratio/high_max": "an extreme over sequences of the local process",
  "vespo/phi_seq_mean": "belongs to a trust region that is not built in",
  "policy_loss": "the loss without its entropy bonus",
}
CLIP_METRICS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


def vespo(log_ratio, logp, old_logp, advantages):
  """Computes VESPO (arXiv 2602.10693) as a custom trust region, passed as a function."""
  log_weight = jnp.clip(jnp.clip(log_ratio, -20, 20).sum(-1, keepdims=True), np.log(1e-8), 20)
  k, rate = jnp.where(advantages >= 0, 2.0, 3.0), jnp.where(advantages >= 0, 3.0, 2.0)
  phi = jax.lax.stop_gradient(jnp.exp(rate + k * log_weight - rate * jnp.exp(log_weight)))
  never = jnp.zeros(logp.shape, bool)
  return phi * advantages * logp, never, never


def k3_sequence_ratio(logp, ref_logp, ratio):
  """Computes k3 times the ratio of the sequence, as TRL does with LUSPO, as a custom estimator.

  The factor `ratio` is 1 where masked, so its logarithm adds nothing there.
  """
  lengths = INPUTS["mask"].sum(-1, keepdims=True)
  sequence = jnp.exp(jnp.log(ratio).sum(-1, keepdims=True) / lengths)
  return grpo_jax.kl_k3(logp, ref_logp) * sequence


def row_of(config):
  """Returns the `Algorithm` that corresponds to a configuration of TRL."""
  high = config["epsilon"] if config["epsilon_high"] is None else config["epsilon_high"]
  clip = {"trust_region": "clip", "clip_low": config["epsilon"], "clip_high": high}
  region = {
    # The upper bound is absolute, 0.2 by default in TRL. There is no lower bound.
    "cispo": {"trust_region": "cispo", "ratio_min": 0.0, "ratio_max": high},
    "sapo": {  # TRL keeps the temperatures in a float32 tensor
      "trust_region": "sapo",
      "tau_positive": float(np.float32(config["sapo_pos"])),
      "tau_negative": float(np.float32(config["sapo_neg"])),
    },
    "vespo": {"trust_region": vespo},
  }.get(config["loss_type"], clip)
  if config["delta"] is not None:
    # min(min(r, delta) A, clip(r) A) is the dual clip for every delta above 1 + epsilon_high.
    region = {**clip, "trust_region": "dual_clip", "clip_dual": config["delta"]}
  kl, correction = {}, {}
  if config["beta"] > 0:
    by_token = config["importance_sampling_level"] == "token"
    ratio = "k3_ratio" if by_token else k3_sequence_ratio
    name = ratio if config["use_bias_correction_kl"] else "k3"
    kl = {"kl": name, "beta": config["beta"]}
  if config["use_vllm"]:
    correction = {"correction": "token_truncate", "correction_max": 1e6}
  if (threshold := config["off_policy_mask_threshold"]) is not None:
    correction = {"correction": "off_policy_mask", "off_policy_max": threshold}
  share = config["top_entropy_quantile"]
  averages = {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "constant", "luspo": luspo_average}
  return Algorithm(
    **region,
    **kl,
    **correction,
    ratio=config["importance_sampling_level"],
    entropy_bonus=config["entropy_coef"],
    entropy_share=None if share == 1 else share,
    average=averages.get(config["loss_type"], "token"),
  )


def luspo_average(mask, max_length):
  """Returns the weights of LUSPO: a sum over tokens and a mean over sequences."""
  return jnp.broadcast_to(1.0 / len(mask), mask.shape)


def weights_of(config, mask, completion_mask):
  """Returns weights with the normalizers of TRL, or None if they are those of this batch."""
  windows = config["gas"] if config["training"] else 1
  if config["loss_type"] in ("dapo", "cispo", "vespo"):
    # TRL divides by the tokens of the generation batch, including tool tokens, per window.
    items = config.get("num_items", completion_mask.sum())
    scale = mask.sum() / (items * windows / (config["spg"] if config["training"] else 1))
  else:
    scale = 1 / windows
  if scale == 1:
    return None
  weights = token_weights(mask, row_of(config).average, max_length=config["max_completion_length"])
  return scale * weights


def evaluate(case, dtype):
  """Returns ((loss, metrics), gradient) of a case in `dtype`."""
  config = case["config"]
  completion_mask = INPUTS["mask"].astype(bool)
  mask = (
    completion_mask & np.array(GOLDEN["tool_mask"], bool)
    if case["use_tool_mask"]
    else (completion_mask)
  )
  arrays = {}
  if not config.get("on_policy"):
    arrays["old_logp"] = INPUTS["old"]
  if config["beta"] > 0:
    arrays["ref_logp"] = INPUTS["ref"]
  if config["use_vllm"]:
    arrays["sampler_logp"] = INPUTS["old"] - np.log(INPUTS["isr"])
  if config["off_policy_mask_threshold"] is not None:  # without a sampler, TRL takes the old policy
    arrays["sampler_logp"] = INPUTS["old"]
  arrays["entropy"] = INPUTS["ent"]
  arrays = {name: jnp.asarray(value, dtype) for name, value in arrays.items()}
  weights = weights_of(config, mask, completion_mask)
  row = row_of(config)
  # A group of one for each sequence: the advantages are those of the file, but for the share.
  given = dataclasses.replace(row, advantage=lambda rewards: rewards)
  values = grpo_jax.advantages(
    given, INPUTS["adv"][:, None], mask=mask[:, None], entropy=INPUTS["ent"][:, None]
  )[:, 0]

  def loss(logp):
    return policy_loss(
      row,
      logp,
      jnp.asarray(values, dtype),
      mask,
      weights=weights,
      max_length=config["max_completion_length"],
      **arrays,
    )

  return jax.value_and_grad(loss, has_aux=True)(jnp.asarray(INPUTS["logps"], dtype))


def expected_metrics(case):
  """Returns the comparable metrics of TRL under the names of this library."""
  metrics = dict(case["metrics"])
  if "cispo_clip_ratio" in metrics:
    metrics["clip_ratio/high_mean"] = metrics.pop("cispo_clip_ratio")
  if case["config"]["importance_sampling_level"] == "sequence":
    # TRL averages over sequences; all metrics here are averages over tokens.
    metrics = {name: value for name, value in metrics.items() if name not in CLIP_METRICS}
  if (delta := case["config"]["delta"]) is not None:
    # TRL does not count the tokens that the floor of the dual clip stops.
    ratio, mask = np.exp(INPUTS["logps"] - INPUTS["old"]), INPUTS["mask"] > 0
    floor = ((INPUTS["adv"] < 0)[:, None] & (ratio > delta))[mask].mean()
    assert floor > 0
    for name in ("clip_ratio/high_mean", "clip_ratio/region_mean"):
      metrics[name] += floor
  if case["config"]["top_entropy_quantile"] < 1:
    # TRL counts clipped tokens among those that get no gradient too.
    metrics = {name: value for name, value in metrics.items() if name not in CLIP_METRICS}
  return {name: value for name, value in metrics.items() if name not in METRICS_UNMAPPED}


def check(name, dtype, tolerance):
  """Compares loss, gradient and metrics of a case."""
  case = CASES[name]
  (loss, metrics), gradient = evaluate(case, dtype)
  assert loss.dtype == gradient.dtype == dtype
  np.testing.assert_allclose(loss, case["loss"], rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(gradient, case["grad_logps"], rtol=tolerance, atol=tolerance)
  for metric, value in expected_metrics(case).items():
    # TRL counts clipped tokens in float32.
    limit = max(tolerance, 1e-7) if metric in CLIP_METRICS else tolerance
    np.testing.assert_allclose(metrics[metric], value, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", CASES)
def test_losses_in_float64(name, x64):
  check(name, jnp.float64, 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_losses_in_float32(name):
  check(name, jnp.float32, 1e-5)


def test_every_metric_is_compared_or_explained():
  assert len(CASES) == 63
  compared = {metric for case in CASES.values() for metric in expected_metrics(case)}
  assert compared == {"kl", "entropy", "entropy_coef", *CLIP_METRICS}
  everything = {metric for case in CASES.values() for metric in case["metrics"]}
  assert everything == compared | set(METRICS_UNMAPPED) | {"cispo_clip_ratio"}


PIECES = {
  "opsm": {"off_policy_mask_threshold": None},
  "entropy_top40": {"top_entropy_quantile": 1.0},
  "entropy_bonus": {"entropy_coef": 0.0},
  "luspo/beta_k3_ratio": {"use_bias_correction_kl": False},
}


@pytest.mark.parametrize("name", PIECES)
def test_each_piece_matters_in_its_case(name, x64):
  """Without the piece the recorded loss is another: the case could not pass by chance."""
  case = CASES[name]
  (loss, _), _ = evaluate({**case, "config": case["config"] | PIECES[name]}, jnp.float64)
  assert not np.allclose(loss, case["loss"], rtol=1e-6)


def test_default_cispo_cap_of_trl_scales_the_on_policy_gradient_by_a_fifth(x64):
  """`epsilon_high` is 0.2 by default and caps the ratio itself."""
  case = CASES["cispo/on_policy"]
  _, gradient = evaluate(case, jnp.float64)
  config = {**case["config"], "epsilon_high": None}
  _, capped = evaluate({**case, "config": config}, jnp.float64)
  np.testing.assert_allclose(capped, 0.2 * np.asarray(gradient), rtol=1e-12)


# --- advantages ----------------------------------------------------------------------------------

ADVANTAGE_CASES = {case["name"]: case for case in GOLDEN["advantage_cases"]}
SCALES = {
  "group": grpo_jax.group_normalized,
  "batch": grpo_jax.batch_normalized,
  "none": grpo_jax.group_centered,
}


def rewards_of(case):
  """Returns the rewards [R, P, G], with NaN for None, and the weights [R]."""
  rewards = np.array(case["rewards_per_func"], np.float64)  # float64 turns None into NaN
  return rewards.T.reshape(rewards.shape[1], -1, case["num_generations"]), case["weights"]


def total_of(rewards, weights, unscored):
  """Returns the sum over reward functions as in TRL: 0 if unscored, NaN if no function scored."""
  total = np.nansum(rewards * np.array(weights)[:, None, None], axis=0)
  return np.where(unscored, np.nan, total)


def advantages_of(case):
  """Returns the advantages that this library computes."""
  rewards, weights = rewards_of(case)
  _, aggregation, scale = case["name"].split("/")
  if aggregation == "normalize_then_sum":
    return grpo_jax.multi_objective(rewards, np.array(weights))
  return SCALES[scale](total_of(rewards, weights, np.isnan(rewards).all(0)))


def expected_advantages(case):
  """Returns the formula of TRL in NumPy and float64 (the recorded values are float32)."""
  rewards, weights = rewards_of(case)
  _, aggregation, scale = case["name"].split("/")
  unscored = np.isnan(rewards).all(0)

  def std(x, axis):
    count = (~np.isnan(x)).sum(axis, keepdims=True)
    square = np.nansum((x - np.nanmean(x, axis, keepdims=True)) ** 2, axis, keepdims=True)
    return np.sqrt(np.where(count > 1, square / np.maximum(count - 1, 1), np.nan))

  with np.errstate(all="ignore"):
    if aggregation == "normalize_then_sum":
      normalized = (rewards - np.nanmean(rewards, -1, keepdims=True)) / (std(rewards, -1) + 1e-4)
      total = total_of(normalized, weights, unscored)
      advantages = (total - np.nanmean(total)) / (std(total, None) + 1e-4)
    else:
      total = total_of(rewards, weights, unscored)
      advantages = total - np.nanmean(total, -1, keepdims=True)
      if scale != "none":
        advantages = advantages / (std(total, -1 if scale == "group" else None) + 1e-4)
  return np.where(unscored, 0.0, np.nan_to_num(advantages))


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("name", ADVANTAGE_CASES)
def test_advantages_in_float64(name, x64):
  case = ADVANTAGE_CASES[name]
  actual = np.asarray(advantages_of(case))
  assert actual.dtype == np.float64
  np.testing.assert_allclose(actual.reshape(-1), case["advantages"], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(actual, expected_advantages(case), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ADVANTAGE_CASES)
def test_advantages_in_float32(name):
  case = ADVANTAGE_CASES[name]
  actual = np.asarray(advantages_of(case))
  assert actual.dtype == np.float32
  np.testing.assert_allclose(actual.reshape(-1), case["advantages"], rtol=1e-5, atol=1e-6)


def test_the_page_lists_unmapped_metrics():
  page = (ROOT / "docs/parity.md").read_text(encoding="utf-8")
  for name, reason in METRICS_UNMAPPED.items():
    assert f"| `{name}` | {reason} |" in page
