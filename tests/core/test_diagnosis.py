"""Plants each illness in a healthy batch, and checks that it is found and that nothing else is."""

import numpy as np
import pytest

from grpo_jax import diagnose, group_normalized, leave_one_out
from grpo_jax.core.diagnosis import CHECKS, ORDER

P, G, T = 8, 6, 9
RNG = np.random.default_rng(0)


def healthy():
  """Returns a batch with mixed groups, some of them all right, and a sampler like the trainer."""
  rng = np.random.default_rng(1)
  rewards = (rng.random((P, G)) < np.linspace(0.2, 0.9, P)[:, None]).astype(float)
  rewards[-1] = 1.0
  lengths = rng.integers(3, T + 1, (P, G))
  mask = np.arange(T) < lengths[..., None]
  logp = np.where(mask, -rng.exponential(0.7, mask.shape), np.nan)
  old, ref = (logp + scale * rng.normal(size=mask.shape) for scale in (1e-2, 0.2))
  return {
    "rewards": rewards,
    "advantages": np.asarray(group_normalized(rewards)),
    "mask": mask,
    "logp": logp,
    "old_logp": old,
    "sampler_logp": old + 1e-4 * rng.normal(size=mask.shape),
    "ref_logp": ref,
    "entropy": np.where(mask, rng.exponential(0.5, mask.shape), np.nan),
    "tokens": rng.integers(0, 99, mask.shape),
    "ended": lengths < T,
    "beta": 0.04,
  }


def names(batch):
  return [finding.name for finding in diagnose(**batch)]


def test_a_healthy_batch_has_no_finding():
  assert names(healthy()) == []
  assert names({"rewards": healthy()["rewards"]}) == []
  assert names(healthy() | {"accuracy": healthy()["rewards"]}) == []


def plant(name):
  """Returns the batch with one illness, its confidence, and a place that shows it."""
  b = healthy()
  if name == "not_scored":
    b["rewards"][2] = np.nan
    return b, "sure", (2, 0)
  if name == "too_hard":
    b["rewards"][:6], b["advantages"] = 0.0, None
    return b, "likely", (0,)
  if name == "too_easy":
    b["rewards"][:], b["advantages"] = 1.0, None
    return b, "sure", (0,)
  if name == "all_equal":
    b["rewards"][:3], b["rewards"][3:7], b["advantages"] = 0.0, 1.0, None
    b["rewards"][7, 0] = 0.0
    return b, "likely", None
  if name == "no_advantage":
    b["advantages"] = b["advantages"].copy()
    b["advantages"][3] = 0.0
    return b, "sure", (3,)
  if name == "mixed_groups":  # rows of another order
    b["advantages"] = np.roll(b["advantages"].reshape(-1), 1).reshape(P, G)
    return b, "likely", None
  if name == "large_advantages":
    b["advantages"] = b["advantages"] * 12
    return b, "likely", None
  if name == "one_prompt":
    b["advantages"] = np.where(np.arange(P)[:, None] == 4, b["advantages"], b["advantages"] * 0.01)
    return b, "sure", (4,)
  if name == "truncated":
    b["ended"] = b["rewards"] > 0
    return b, "likely", None
  if name == "duplicates":
    b["tokens"] = np.broadcast_to(np.arange(T), (P, G, T))
    b["mask"] = np.ones((P, G, T), bool)
    for key in ("logp", "old_logp", "sampler_logp", "ref_logp", "entropy"):
      b[key] = np.where(np.isnan(b[key]), b["logp"] * 0 - 0.5, b[key])
      b[key] = np.where(np.isnan(b[key]), -0.5, b[key])
    b["entropy"] = np.abs(b["entropy"])
    return b, "likely", (0,)
  if name == "low_entropy":
    b["rewards"][:5], b["advantages"], b["entropy"] = 0.0, None, b["entropy"] * 0.01
    return b, "likely", None
  if name == "mismatch":
    b["sampler_logp"] = b["old_logp"] + 0.01 * np.arange(T)
    return b, "sure", None
  if name == "ratio":
    b["old_logp"] = b["logp"] - RNG.choice([-1.0, 1.0], b["logp"].shape)
    b["sampler_logp"] = b["old_logp"]
    return b, "sure", None
  if name == "kl":
    b["ref_logp"] = b["logp"] - 2.0
    return b, "likely", None
  assert name == "idle_reference"
  b["beta"] = 1e-7
  return b, "likely", None


WITH = {"low_entropy": {"too_hard"}}  # an illness that is part of another


@pytest.mark.parametrize("name", CHECKS)
def test_a_planted_illness_is_found_and_no_other(name):
  batch, confidence, place = plant(name)
  found = {finding.name: finding for finding in diagnose(**batch)}
  assert set(found) == {name} | WITH.get(name, set())
  assert found[name].confidence == confidence
  assert place is None or found[name].places[0] == place
  assert all(np.isfinite(list(found[name].evidence.values())))
  for text in (found[name].seen, found[name].reason, found[name].advice):
    assert len(text) > 20
  assert str(found[name]).startswith(f"{name} ({confidence}): {found[name].seen}\n  why:  ")


def test_nothing_ends_by_itself():
  [found] = diagnose(**healthy() | {"ended": np.zeros((P, G), bool)})
  assert (found.name, found.confidence) == ("truncated", "possible")
  assert found.seen == "no completion ended by itself"


def test_truncation_without_a_cost_is_none():
  batch = healthy()
  assert names(batch | {"ended": batch["rewards"] == 0}) == []  # those cut off are the right ones


def test_a_mismatch_says_whether_it_grows_with_the_depth():
  batch = healthy()
  depth = batch["old_logp"] + 0.01 * np.arange(T)
  [grows] = diagnose(**batch | {"sampler_logp": depth})
  [flat] = diagnose(**batch | {"sampler_logp": batch["old_logp"] + 0.05})
  assert grows.evidence["first"] < grows.evidence["middle"] < grows.evidence["last"]
  assert "grows with the depth" in grows.reason
  assert "same at every depth" in flat.reason
  assert flat.evidence["mean"] == pytest.approx(0.05)
  [likely] = diagnose(**batch | {"sampler_logp": batch["old_logp"] + 0.005})
  assert likely.confidence == "likely"


def test_numbers_that_are_not_finite_are_named_and_hide_nothing_else():
  batch = healthy()
  batch["logp"][5, 1, 2] = np.inf
  batch["rewards"][:6], batch["advantages"] = 0.0, None
  found = diagnose(**batch)
  assert [f.name for f in found] == ["not_finite", "too_hard"]
  assert found[0].places[0] == (5, 1, 2)
  assert found[0].evidence == {"logp": 1.0}


def test_masked_slots_may_hold_anything():
  batch = healthy()
  for name in ("logp", "old_logp", "sampler_logp", "ref_logp", "entropy"):
    batch[name] = np.where(batch["mask"], batch[name], np.inf)
  assert names(batch) == []


def test_right_is_said_by_the_accuracy_if_there_is_one():
  partial = np.full((P, G), 0.3)
  [by_reward] = diagnose(partial)
  assert by_reward.name == "too_easy"
  assert "have 0.3, the largest reward of the batch" in by_reward.seen
  [by_accuracy] = diagnose(partial, accuracy=np.zeros((P, G)))
  assert by_accuracy.name == "too_hard"


def test_credit_per_token_need_not_follow_the_rewards():
  batch = healthy()
  tokens = np.asarray(leave_one_out(batch["rewards"]))[..., None] * np.linspace(-1, 1, T)
  assert names(batch | {"advantages": tokens}) == []


def test_findings_are_in_the_order_of_their_confidence():
  batch = healthy()
  batch["rewards"][:6], batch["advantages"], batch["ref_logp"] = 0.0, None, batch["logp"] - 9.0
  found = diagnose(**batch | {"ended": np.zeros((P, G), bool)})
  assert [f.confidence for f in found] == ["sure", "likely", "possible"]
  assert ORDER == ("sure", "likely", "possible")


def test_errors():
  with pytest.raises(ValueError, match=r"^rewards has shape \(3,\), expected \[P, G\]"):
    diagnose(np.zeros(3))
  with pytest.raises(ValueError, match=r"^logp is an array per token: give mask as well"):
    diagnose(np.zeros((2, 3)), logp=np.zeros((2, 3, 4)))
  with pytest.raises(ValueError, match=r"^mask has shape \(2, 4\), expected \(2, 3\) and an axis"):
    diagnose(np.zeros((2, 3)), mask=np.ones((2, 4)))
  with pytest.raises(ValueError, match=r"^entropy has shape \(2, 3, 5\), expected \(2, 3, 4\)"):
    diagnose(np.zeros((2, 3)), mask=np.ones((2, 3, 4)), entropy=np.zeros((2, 3, 5)))
