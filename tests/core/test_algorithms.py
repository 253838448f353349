"""Tests the table of algorithms: its rows, refused rows, and the advantages of a row."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax import ADVANTAGES, ALGORITHMS, Advantage, Algorithm, advantages
from grpo_jax.core.algorithms import lookup_algorithm, nll_weights
from grpo_jax.core.corrections import CORRECTIONS
from grpo_jax.core.trust_regions import TRUST_REGIONS

# The values of each paper: advantage, ratio, trust region and its settings, kl, beta, average; the
# other fields that differ from the defaults stand in `FURTHER`.
ROWS = {
  "reinforce": ("group_centered", "token", "none", {}, "none", 0.0, "sequence"),
  "rloo": ("leave_one_out", "token", "none", {}, "none", 0.0, "constant"),
  "grpo": (
    "group_normalized", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "k3", 0.04, "sequence"
  ),
  "dr_grpo": (
    "group_centered", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "none", 0.0, "constant"
  ),
  "dapo": (
    "group_normalized", "token", "clip", {"clip_low": 0.2, "clip_high": 0.28}, "none", 0.0, "token"
  ),
  "gspo": (
    "group_normalized", "sequence", "clip", {"clip_low": 3e-4, "clip_high": 4e-4}, "none", 0.0,
    "sequence",
  ),
  "gspo_token": (
    "group_normalized", "sequence_token", "clip", {"clip_low": 3e-4, "clip_high": 4e-4}, "none",
    0.0, "sequence",
  ),
  "cispo": (
    "group_normalized", "token", "cispo", {"ratio_min": 0.0, "ratio_max": 5.0}, "none", 0.0, "token"
  ),
  "scale_rl": (
    "batch_whitened", "token", "cispo", {"ratio_min": 0.0, "ratio_max": 5.0}, "none", 0.0, "prompt"
  ),
  "sapo": (
    "group_normalized", "token", "sapo", {"tau_positive": 1.0, "tau_negative": 1.05}, "none", 0.0,
    "sequence",
  ),
  "dppo": (
    "group_centered", "token", "dppo_tv", {"divergence": 0.15, "ratio_max": 20.0}, "none", 0.0,
    "constant",
  ),
  "prime_rl": (
    "group_centered", "token", "dppo_tv", {"divergence": 0.2, "ratio_max": 1e9}, "none",
    0.0, "token",
  ),
  "lite_ppo": (
    "batch_normalized", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "none", 0.0, "token"
  ),
  "max_rl": ("max_rl", "token", "none", {}, "none", 0.0, "token"),
  "gdpo": (
    "multi_objective", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "none", 0.0, "token"
  ),
  "online_rft": ("right_only", "token", "none", {}, "none", 0.0, "sequence"),
  "reinforce_pp": (
    "token_whitened", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "none", 0.0, "token"
  ),
  "reinforce_pp_kl": (
    "returns_whitened", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "k1", 0.01, "token"
  ),
  "reinforce_pp_baseline": (
    "centered_token_whitened", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "k2", 0.001,
    "token",
  ),
  "ppo": (
    "gae_whitened", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "none", 0.0, "token"
  ),
  "rloo_kl": ("leave_one_out", "token", "none", {}, "k1", 0.05, "constant"),
  "opd": ("zero_advantages", "token", "none", {}, "none", 0.0, "token"),
}  # fmt: skip
FURTHER = {
  "dppo": {"anchor": "sampler"},
  "prime_rl": {"anchor": "sampler", "sampler_penalty": 1e-3},
  "online_rft": {"right_above": 0.5},
  "ppo": {"gamma": 1.0, "lam": 0.95},
  "reinforce_pp_kl": {"kl_in": "reward"},
  "rloo_kl": {"kl_in": "reward", "log_ratio_baseline": "leave_one_out"},
  "opd": {"teacher_weight": 1.0},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_agree_with_the_papers(name):
  row = ALGORITHMS[name]
  advantage, ratio, region, settings, kl, beta, average = ROWS[name]
  assert (row.advantage, row.ratio, row.trust_region) == (advantage, ratio, region)
  assert row.settings("trust_region") == settings
  assert (row.kl, row.beta, row.average, row.correction) == (kl, beta, average, "none")
  stated = {"advantage", "ratio", "trust_region", "kl", "beta", "average", "source", *settings}
  defaults = {f.name: f.default for f in dataclasses.fields(row) if f.name not in stated}
  others = {name: value for name in defaults if (value := getattr(row, name)) != defaults[name]}
  assert others == FURTHER.get(name, {})
  assert re.search(r"arXiv \d{4}\.\d{5}|Williams 1992", row.source)


def test_settings_of_the_critic_of_ppo():
  assert ALGORITHMS["ppo"].settings("advantage") == {"gamma": 1.0, "lam": 0.95}


def test_teachers_and_penalties_of_the_rows():
  """Only these rows have a teacher, a KL term in the reward, or a baseline of log-ratios."""
  actual = {
    name: (row.teacher_weight, row.teacher_discount, row.kl_in, row.log_ratio_baseline)
    for name, row in ALGORITHMS.items()
  }
  changed = {name: values for name, values in actual.items() if values != (0, 0, "loss", "none")}
  assert changed == {
    "reinforce_pp_kl": (0, 0, "reward", "none"),
    "rloo_kl": (0, 0, "reward", "leave_one_out"),
    "opd": (1, 0, "loss", "none"),
  }
  assert not any(row.teacher_divergence for row in ALGORITHMS.values())


def test_settings_of_a_teacher_that_make_no_sense():
  with pytest.raises(ValueError, match=r"^teacher_weight must be at least 0 and finite, got -1"):
    Algorithm(teacher_weight=-1.0)
  with pytest.raises(ValueError, match=r"^teacher_weight must be at least 0 and finite, got inf"):
    Algorithm(teacher_weight=float("inf"))
  for name in ("teacher_discount", "teacher_divergence"):
    for value in (-0.1, 1.1, float("nan")):
      with pytest.raises(ValueError, match=rf"^{name} must be between 0 and 1, got {value}"):
        Algorithm(teacher_weight=1.0, **{name: value})
    with pytest.raises(ValueError, match=rf"^{name}=0.5 has no effect with teacher_weight=0"):
      Algorithm(**{name: 0.5})
  with pytest.raises(ValueError, match=r"^teacher_discount=1.0 has no effect with teacher_div"):
    Algorithm(teacher_weight=1.0, teacher_discount=1.0, teacher_divergence=0.0)
  with pytest.raises(ValueError, match=r"^unknown kl_in 'rewards'; known: loss, reward"):
    Algorithm(kl_in="rewards")
  with pytest.raises(ValueError, match=r"^unknown log_ratio_baseline 'mean'"):
    Algorithm(log_ratio_baseline="mean")


def test_no_row_is_missing():
  assert set(ROWS) == set(ALGORITHMS)


def test_rows_cannot_be_changed_in_place():
  with pytest.raises(dataclasses.FrozenInstanceError):
    ALGORITHMS["grpo"].beta = 0.1
  assert dataclasses.replace(ALGORITHMS["grpo"], beta=0.1).beta == 0.1
  assert ALGORITHMS["grpo"].beta == 0.04


def test_settings_of_a_choice():
  row = dataclasses.replace(
    ALGORITHMS["dapo"], correction="token_mask", correction_min=0.5, correction_max=5.0
  )
  assert row.settings("trust_region") == {"clip_low": 0.2, "clip_high": 0.28}
  assert row.settings("correction") == {"correction_min": 0.5, "correction_max": 5.0}
  assert row.settings("kl") == {}
  assert row.settings("advantage") == {}


def test_every_setting_of_every_choice_is_a_field():
  fields = {field.name for field in dataclasses.fields(Algorithm)}
  for table in (TRUST_REGIONS, CORRECTIONS):
    for function in table.values():
      parameters = inspect.signature(function).parameters.values()
      named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
      assert named <= fields | {"advantages", "drift"}


def test_settings_of_a_chain_and_of_an_advantage():
  row = Algorithm(
    advantage="right_only",
    right_above=1.5,
    correction="geometric_mask+off_policy_mask+token_truncate",
    geometric_min=0.99,
    geometric_max=1.01,
    off_policy_max=0.5,
    correction_max=2.0,
  )
  assert row.settings("advantage") == {"right_above": 1.5}
  assert row.settings("correction") == {
    "geometric_min": 0.99,
    "geometric_max": 1.01,
    "off_policy_max": 0.5,
    "correction_max": 2.0,
  }
  assert advantages(row, jnp.array([[2.0, 1.0]])).tolist() == [[1.0, 0.0]]
  assert advantages("online_rft", jnp.array([[2.0, 0.5]])).tolist() == [[1.0, 0.0]]
  assert advantages("right_only", jnp.array([[2.0, 0.5]])).tolist() == [[1.0, 0.0]]


def test_what_the_loss_of_a_row_needs():
  """From the fields alone; the rows of the table need the least."""
  plain = Algorithm()
  needs = ("needs_sampler", "needs_old", "needs_entropy", "every_group_learns")
  assert [getattr(plain, name) for name in needs] == [False, True, False, False]
  sampler = Algorithm(correction="off_policy_mask", off_policy_max=0.5, anchor="sampler")
  assert [getattr(sampler, name) for name in needs] == [True, False, False, False]
  assert Algorithm(sampler_penalty=1e-3).needs_sampler
  assert Algorithm(entropy_bonus=1e-3).needs_entropy
  assert Algorithm(entropy_target=0.2, entropy_delta=0.005).needs_entropy
  assert Algorithm(anchor=lambda old_logp, sampler_logp: old_logp).needs_old
  assert Algorithm(anchor="sampler", teacher_weight=1.0).needs_old
  assert Algorithm(anchor="sampler", kl="k1", kl_in="reward", beta=0.1).needs_old
  assert not Algorithm(anchor="sampler", kl="k1", beta=0.1).needs_old
  in_reward = {"kl": "k1", "kl_in": "reward"}
  assert Algorithm(**in_reward, beta=0.1).penalizes == "advantages"
  assert Algorithm(**in_reward, beta=0.1, advantage="gae").penalizes == "token_rewards"
  assert Algorithm(**in_reward, advantage="gae").penalizes == ""
  assert Algorithm(kl="k1", beta=0.1, advantage="gae").penalizes == ""
  for terms in (
    {"beta": 0.1, "kl": "k2"},
    {"sampler_penalty": 1e-3},
    {"entropy_bonus": 1e-3},
    {"entropy_target": 0.2, "entropy_delta": 0.005},
    {"nll_weight": 0.1},
  ):
    assert Algorithm(**terms).every_group_learns
  learn = {name for name, row in ALGORITHMS.items() if row.every_group_learns}
  assert learn == {"grpo", "prime_rl", "reinforce_pp_kl", "reinforce_pp_baseline", "rloo_kl", "opd"}


def test_weights_of_right_answers():
  """Right are 2 tokens and 1 token; with `right_above` of -1 the middle one's 3 tokens too."""
  mask = jnp.array([[[1, 1, 0], [1, 1, 1], [1, 0, 0]]], bool)
  rewards = jnp.array([[1.0, 0.0, 0.6]])
  third = 1 / 3
  expected = [[[third, third, 0], [0, 0, 0], [third, 0, 0]]]
  np.testing.assert_allclose(nll_weights("grpo", rewards, mask), expected, rtol=1e-6)
  row = Algorithm(nll_weight=0.1, right_above=-1.0)
  np.testing.assert_allclose(nll_weights(row, rewards, mask), mask / 6, rtol=1e-6)
  assert not np.asarray(nll_weights("grpo", jnp.zeros((1, 3)), mask)).any()


def test_only_tokens_of_high_entropy_get_an_advantage():
  """Takes 2.5, the quantile of 0.5 of 1, 2, 3, 4; of three tokens the third is padding."""
  mask = jnp.array([[[1, 1, 0], [1, 1, 0]]], bool)
  entropy = jnp.array([[[1.0, 4.0, 9.0], [3.0, 2.0, 9.0]]])
  row = Algorithm(advantage="group_centered", entropy_share=0.5)
  actual = advantages(row, jnp.array([[1.0, 3.0]]), mask=mask, entropy=entropy)
  assert actual.tolist() == [[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]]
  per_token = Algorithm(advantage="process_advantages", entropy_share=1.0)
  everything = EVERYTHING | {"entropy": jnp.ones((2, 3, 4))}
  np.testing.assert_array_equal(
    advantages(per_token, **everything), advantages("process_advantages", **EVERYTHING)
  )
  with pytest.raises(ValueError, match=r"^entropy_share=0.5 needs entropy, mask$"):
    advantages(row, jnp.array([[1.0, 3.0]]))


def test_default_row():
  row = Algorithm()
  assert (row.advantage, row.source, row.beta) == ("group_normalized", "", 0.0)
  with pytest.raises(TypeError, match="positional"):
    Algorithm("group_normalized")


def test_every_choice_may_be_a_function():
  def region(log_ratio, logp, old_logp, advantages, *, ratio_max, sharpness=2.0):
    return log_ratio, log_ratio > 1, log_ratio > 1

  row = Algorithm(
    advantage=lambda rewards: rewards,
    ratio=lambda logp, old_logp, mask: logp,
    trust_region=region,
    kl=lambda logp, ref_logp, ratio: logp,
    correction=lambda log_ratio, mask: log_ratio,
    average=lambda mask, max_length: mask,
    ratio_max=3.0,
    beta=0.1,
  )
  assert row.settings("trust_region") == {"ratio_max": 3.0}


def test_a_setting_that_a_function_has_a_default_for_may_stay_none():
  def region(log_ratio, logp, old_logp, advantages, *, ratio_min=0.5, ratio_max):
    return log_ratio, log_ratio > 1, log_ratio > 1

  row = Algorithm(trust_region=region, ratio_max=3.0)
  assert row.settings("trust_region") == {"ratio_max": 3.0}
  row = dataclasses.replace(row, ratio_min=0.0)
  assert row.settings("trust_region") == {"ratio_min": 0.0, "ratio_max": 3.0}
  with pytest.raises(ValueError, match=r"needs ratio_max$"):
    Algorithm(trust_region=region)
  with pytest.raises(ValueError, match=r"These choices take: ratio_max, ratio_min$"):
    Algorithm(trust_region=region, ratio_max=3.0, clip_low=0.2)


def test_a_row_is_hashable():
  """Rows are static arguments of jitted functions."""
  row = Algorithm(advantage=Advantage(grpo_jax.multi_objective, rewards="each"))
  assert hash(row) == hash(dataclasses.replace(row))


def test_lookup_algorithm():
  row = Algorithm()
  assert lookup_algorithm(row) is row
  assert lookup_algorithm("grpo") is ALGORITHMS["grpo"]
  with pytest.raises(ValueError, match=r"^unknown algorithm 'trpo'; known: cispo, dapo"):
    lookup_algorithm("trpo")


CLIP = {"trust_region": "clip", "clip_low": 0.2, "clip_high": 0.2}
SAPO = {"trust_region": "sapo", "tau_positive": 1.0, "tau_negative": 1.0}
DUAL = {**CLIP, "trust_region": "dual_clip", "clip_dual": 3.0}
BAD = {
  "unknown region": ({"trust_region": "trpo"}, "unknown trust_region 'trpo'; known: cispo, clip"),
  "unknown ratio": ({"ratio": "word"}, "unknown ratio 'word'; known: sequence, sequence_token, t"),
  "unknown kl": ({"kl": "k4"}, "unknown kl 'k4'; known: k1, k2, k3"),
  "unknown average": ({"average": "mean"}, "unknown average 'mean'; known: constant, prompt"),
  "unknown anchor": ({"anchor": "now"}, "unknown anchor 'now'; known: old, sampler"),
  "unknown advantage": ({"advantage": "q"}, "unknown advantage 'q'; known: batch_normalized"),
  "unknown correction": (
    {"correction": "tis"},
    "unknown correction 'tis'; known: geometric_mask, none, off_policy_mask, sequence_m",
  ),
  "None": ({"ratio": None}, "unknown ratio None; known"),
  "a list": ({"ratio": ["token"]}, r"unknown ratio \['token'\]; known"),
  "missing": (
    {"trust_region": "clip", "clip_low": 0.2},
    "trust_region='clip' with correction='none' needs clip_high$",
  ),
  "missing two": ({"trust_region": "clip"}, "needs clip_high, clip_low$"),
  "missing for the correction": (
    {"correction": "token_truncate"},
    "trust_region='none' with correction='token_truncate' needs correction_max",
  ),
  "without effect": (
    {"clip_low": 0.2},
    "clip_low has no effect with advantage='group_normalized', trust_region='none' and "
    "correction='none'; set it to None. These choices take: no settings",
  ),
  "of another region": (
    {**CLIP, "ratio_max": 5.0},
    "ratio_max has no effect .* These choices take: clip_high, clip_low",
  ),
  "negative": ({**CLIP, "clip_low": -0.2}, "clip_low must be at least 0, got -0.2"),
  "not a number": ({**CLIP, "clip_high": float("nan")}, "clip_high must be at least 0, got nan"),
  "negative beta": ({"kl": "k3", "beta": -0.1}, "beta must be at least 0, got -0.1"),
  "beta that is not a number": ({"kl": "k3", "beta": float("nan")}, "beta must be at least 0"),
  "gamma above 1": ({"advantage": "gae", "gamma": 1.1}, r"gamma must lie in \[0, 1\], got 1.1"),
  "lam below 0": ({"advantage": "gae", "lam": -0.1}, "lam must be at least 0, got -0.1"),
  "lam without a critic": ({"lam": 0.9}, "lam has no effect with advantage='group_normalized'"),
  "infinite beta": ({"kl": "k3", "beta": float("inf")}, "beta must be finite, got inf"),
  "beta without kl": ({"beta": 0.1}, "beta=0.1 has no effect with kl='none'; known: k1, k2, k3"),
  "no sharpness": ({**SAPO, "tau_negative": 0.0}, "tau_negative must be above 0.0, got 0.0"),
  "negative sharpness": (
    {**SAPO, "tau_positive": -1.0},
    "tau_positive must be above 0.0, got -1.0",
  ),
  "dual clip inside": ({**DUAL, "clip_dual": 1.0}, "clip_dual must be above 1.0, got 1.0"),
  "crossed ratios": (
    {"trust_region": "cispo", "ratio_min": 2.0, "ratio_max": 1.0},
    "ratio_min=2.0 is above ratio_max=1.0: nothing lies between",
  ),
  "crossed corrections": (
    {"correction": "token_mask", "correction_min": 5.0, "correction_max": 0.5},
    "correction_min=5.0 is above correction_max=0.5: nothing lies between",
  ),
  "crossed means": (
    {"correction": "geometric_mask", "geometric_min": 1.1, "geometric_max": 0.9},
    "geometric_min=1.1 is above geometric_max=0.9: nothing lies between",
  ),
  "missing in a chain": (
    {"correction": "token_truncate+off_policy_mask", "correction_max": 2.0},
    "needs off_policy_max$",
  ),
  "twice corrected": (
    {"anchor": "sampler", "correction": "off_policy_mask+token_truncate", "correction_max": 2.0,
     "off_policy_max": 0.5},
    r"correction='off_policy_mask\+token_truncate' with anchor='sampler' would correct twice",
  ),
  "right above NaN": (
    {"nll_weight": 0.1, "right_above": float("nan")},
    "right_above must be above -inf, got nan",
  ),
  "right without use": ({"right_above": 0.5}, "right_above has no effect with advantage="),
  "negative penalty": ({"sampler_penalty": -1.0}, "sampler_penalty must be at least 0, got -1.0"),
  "negative bonus": ({"entropy_bonus": -0.1}, "entropy_bonus must be at least 0, got -0.1"),
  "infinite weight": ({"nll_weight": float("inf")}, "nll_weight must be finite, got inf"),
  "target without delta": (
    {"entropy_target": 0.2},
    "entropy_target=0.2 and entropy_delta=None: an adaptive entropy bonus needs both",
  ),
  "delta without target": (
    {"entropy_delta": 0.2, "entropy_bonus": 0.1},
    "entropy_target=None and entropy_delta=0.2: an adaptive",
  ),
  "no target": (
    {"entropy_target": 0.0, "entropy_delta": 0.1},
    "entropy_target must be above 0 and finite, got 0.0",
  ),
  "infinite delta": (
    {"entropy_target": 0.2, "entropy_delta": float("inf")},
    "entropy_delta must be above 0 and finite, got inf",
  ),
  "share of a critic": (
    {"advantage": "gae", "entropy_share": 0.2},
    "entropy_share=0.2 has no effect with advantage='gae': a critic gives the advantages",
  ),
  "no share": ({"entropy_share": 0.0}, "entropy_share must be above 0 and at most 1, got 0.0"),
  "all and more": ({"entropy_share": 1.1}, "entropy_share must be above 0 and at most 1, got 1.1"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_refused_rows(settings, message):
  with pytest.raises(ValueError, match="^" + message if message[0] != "n" else message):
    Algorithm(**settings)


@pytest.mark.parametrize(
  "settings",
  [
    {**CLIP, "clip_low": 0.0, "clip_high": float("inf")},
    {**SAPO, "tau_negative": 0.01},
    {**DUAL, "clip_dual": 1.01},
    {"trust_region": "cispo", "ratio_min": 1.0, "ratio_max": 1.0},
    {"kl": "k3", "beta": 0.0},
    {"kl": "k1", "beta": 1e-6},
    {"entropy_share": 1.0},
    {"nll_weight": 0.1, "right_above": 0.0},
    {"anchor": "sampler", "correction": "off_policy_mask", "off_policy_max": 0.0},
    {"correction": "geometric_mask", "geometric_min": 1.0, "geometric_max": 1.0},
  ],
)
def test_limits_are_accepted(settings):
  row = Algorithm(**settings)
  assert all(getattr(row, name) == value for name, value in settings.items())


# --- advantages of a row -------------------------------------------------------------------------

REWARDS = jnp.array([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
EACH = jnp.array([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[5.0, 7.0, 9.0], [1.0, 0.0, 2.0]]])
EVERYTHING = {
  "rewards": REWARDS,
  "rewards_per_function": EACH,
  "reward_weights": jnp.array([1.0, 0.5]),
  "step_rewards": jnp.array([[[1.0, 0.0]] * 3] * 2),
  "step_ends": jnp.array([[[0, 2]] * 3] * 2),
  "token_rewards": jnp.arange(24.0).reshape(2, 3, 4) % 5,
  "values": jnp.arange(24.0).reshape(2, 3, 4) % 7,
  "mask": jnp.ones((2, 3, 4), bool),
}


def test_advantages_of_a_name_a_row_and_a_function():
  expected = [[2.0, -1.0, -1.0], [0.0, 0.0, 0.0]]  # r - mean
  for choice in (
    "dr_grpo",
    "group_centered",
    ALGORITHMS["dr_grpo"],
    grpo_jax.group_centered,
    ADVANTAGES["group_centered"],
    Algorithm(advantage=lambda rewards: rewards - rewards.mean(-1, keepdims=True)),
  ):
    np.testing.assert_array_equal(advantages(choice, REWARDS), expected)


@pytest.mark.parametrize("name", [*ALGORITHMS, *ADVANTAGES])
def test_advantages_pass_on_the_rewards_that_are_needed(name):
  """Everything is available; the function called by hand gives the same."""
  row = ALGORITHMS.get(name, Algorithm(advantage=name) if name in ADVANTAGES else None)
  e = EVERYTHING
  if row.advantage == "multi_objective":
    expected = grpo_jax.multi_objective(EACH, e["reward_weights"])
  elif row.advantage == "process_advantages":
    expected = grpo_jax.process_advantages(e["step_rewards"], e["step_ends"], e["mask"])
  elif row.advantage in ("token_whitened", "centered_token_whitened"):
    expected = getattr(grpo_jax, row.advantage)(REWARDS, e["mask"])
  elif row.advantage == "turn_advantages":
    expected = grpo_jax.turn_advantages(e["step_rewards"], e["step_ends"], e["mask"])
  elif row.advantage == "returns_whitened":
    expected = np.cumsum(e["token_rewards"][..., ::-1], -1)[..., ::-1]
    expected = (expected - expected.mean()) / expected.std(ddof=1)
  elif row.advantage.startswith("gae"):
    expected, _ = grpo_jax.gae(e["token_rewards"], e["values"], e["mask"])
    if row.advantage == "gae_whitened":
      expected = (expected - expected.mean()) / expected.std(ddof=1)
  else:
    expected = getattr(grpo_jax, row.advantage)(REWARDS)
  np.testing.assert_allclose(advantages(name, **e), expected, rtol=1e-5, atol=1e-6)
  compiled = jax.jit(advantages, static_argnums=0)(row, **e)
  np.testing.assert_allclose(compiled, expected, rtol=1e-5, atol=1e-6)


def test_names_in_both_tables_mean_the_same():
  for name in ALGORITHMS.keys() & ADVANTAGES.keys():
    assert ALGORITHMS[name].advantage == name


def test_kinds_of_rewards_of_a_row():
  assert ALGORITHMS["grpo"].rewards == ("total",)
  assert ALGORITHMS["gdpo"].rewards == ("each",)
  assert Algorithm(advantage="process_advantages").rewards == ("steps",)
  assert Algorithm(advantage=lambda rewards: rewards).rewards == ("total",)


def test_combined_advantages():
  """`a + w b` of totals: (r - mean) (1 + w n / (n - 1))."""

  def combined(rewards):
    return grpo_jax.group_centered(rewards) + 0.1 * grpo_jax.leave_one_out(rewards)

  actual = advantages(Algorithm(advantage=combined), REWARDS)
  np.testing.assert_allclose(actual, [[2.3, -1.15, -1.15], [0.0, 0.0, 0.0]], rtol=1e-6)


def test_combined_advantages_of_several_rewards():
  def combined(rewards, weights):
    total = (weights[:, None, None] * rewards).sum(0)
    return grpo_jax.multi_objective(rewards, weights) + 0.1 * grpo_jax.leave_one_out(total)

  row = Algorithm(advantage=Advantage(combined, rewards="each"))
  # Totals 3.5, 3.5, 4.5 and 0.5, 0, 1: minus the mean of the others.
  second = np.array([[-0.5, -0.5, 1.0], [0.0, -0.75, 0.75]])
  expected = grpo_jax.multi_objective(EACH, EVERYTHING["reward_weights"]) + 0.1 * second
  np.testing.assert_allclose(advantages(row, **EVERYTHING), expected, rtol=1e-5)


def test_combined_advantages_of_outcome_and_steps():
  def combined(rewards, step_rewards, step_ends, mask):
    process = grpo_jax.process_advantages(step_rewards, step_ends, mask)
    return grpo_jax.group_centered(rewards)[..., None] + 0.5 * process

  row = Algorithm(advantage=Advantage(combined, rewards=("total", "steps")))
  # Steps of 1 and 0 in equal number: normalized to +-a, a = 0.5 / (0.5477... + 1e-4) with n - 1.
  a = 0.5 / ((6 * 0.25 / 5) ** 0.5 + 1e-4)
  process = np.array([0.0, -a, -a, 0.0])
  expected = np.array([[2.0, -1.0, -1.0], [0.0] * 3])[..., None] + 0.5 * process
  np.testing.assert_allclose(advantages(row, **EVERYTHING), expected, rtol=1e-5, atol=1e-6)


def by_name(rewards):
  return rewards.mean()


def test_errors_of_advantages():
  with pytest.raises(ValueError, match=r"^unknown algorithm or advantage 'trpo'; known: batch_no"):
    advantages("trpo", REWARDS)
  with pytest.raises(
    ValueError, match=r"^advantage gae_whitened needs token_rewards, values, mask"
  ):
    advantages("ppo", REWARDS)
  with pytest.raises(ValueError, match=r"^unknown algorithm or advantage None; known"):
    advantages(None, REWARDS)
  with pytest.raises(ValueError, match=r"^advantage group_normalized needs rewards$"):
    advantages("grpo")
  message = r"^advantage multi_objective needs rewards_per_function, reward_weights$"
  with pytest.raises(ValueError, match=message):
    advantages("gdpo", REWARDS)
  with pytest.raises(ValueError, match=r"^advantage process_advantages needs step_ends$"):
    advantages("process_advantages", **{**EVERYTHING, "step_ends": None})
  message = (
    r"^advantage by_name returned shape \(\), expected \(2, 3\) \(one per completion\) or "
    r"\(2, 3, 'T'\) \(one per token\)$"
  )
  with pytest.raises(ValueError, match=message):
    advantages(by_name, REWARDS)
  with pytest.raises(ValueError, match=r"returned shape \(3, 2\), expected \(2, 3\)"):
    advantages(lambda rewards: rewards.T, REWARDS)
  with pytest.raises(ValueError, match=r"returned shape \(2, 3, 1, 1\), expected \(2, 3\)"):
    advantages(lambda rewards: rewards[..., None, None], REWARDS)
  with pytest.raises(ValueError, match=r"returned shape \(2, 2, 3\), expected \(2, 3\)"):
    advantages(Advantage(lambda rewards, weights: rewards, rewards="each"), **EVERYTHING)
  with pytest.raises(ValueError, match=r"returned shape \(1, 3\), expected \(2, 3\)"):
    advantages(Advantage(lambda r, ends, mask: r[:1, :, 0], rewards="steps"), **EVERYTHING)
