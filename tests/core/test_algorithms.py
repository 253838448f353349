"""The table of algorithms: what its rows say, and what cannot stand in a row."""

import dataclasses
import inspect
import re

import pytest

from grpo_jax import ALGORITHMS, Algorithm
from grpo_jax.core.advantages import ADVANTAGES
from grpo_jax.core.corrections import CORRECTIONS
from grpo_jax.core.trust_regions import TRUST_REGIONS

# The values of each paper: advantage, ratio, region with its settings, kl with beta, average.
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
  "sapo": (
    "group_normalized", "token", "sapo", {"tau_positive": 1.0, "tau_negative": 1.05}, "none", 0.0,
    "sequence",
  ),
  "dppo": (
    "group_centered", "token", "dppo_tv", {"divergence": 0.15, "ratio_max": 20.0}, "none", 0.0,
    "token",
  ),
  "lite_ppo": (
    "batch_normalized", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "none", 0.0, "token"
  ),
  "max_rl": ("max_rl", "token", "none", {}, "none", 0.0, "token"),
  "gdpo": (
    "multi_objective", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "none", 0.0, "token"
  ),
  "reinforce_pp_baseline": (
    "batch_whitened", "token", "clip", {"clip_low": 0.2, "clip_high": 0.2}, "k2", 0.001, "token"
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_rows_are_those_of_the_papers(name):
  row = ALGORITHMS[name]
  advantage, ratio, region, settings, kl, beta, average = ROWS[name]
  assert (row.advantage, row.ratio, row.trust_region) == (advantage, ratio, region)
  assert row.settings("trust_region") == settings
  assert (row.kl, row.beta, row.average, row.correction) == (kl, beta, average, "none")
  assert re.search(r"arXiv \d{4}\.\d{5}|Williams 1992", row.source)


def test_all_rows_are_there():
  assert set(ROWS) == set(ALGORITHMS)


def test_rows_cannot_be_changed_in_place():
  with pytest.raises(dataclasses.FrozenInstanceError):
    ALGORITHMS["grpo"].beta = 0.1
  assert dataclasses.replace(ALGORITHMS["grpo"], beta=0.1).beta == 0.1
  assert ALGORITHMS["grpo"].beta == 0.04


def test_the_settings_of_a_choice():
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
      assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} <= fields


def test_functions_of_your_own_are_choices():
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


CLIP = {"trust_region": "clip", "clip_low": 0.2, "clip_high": 0.2}
SAPO = {"trust_region": "sapo", "tau_positive": 1.0, "tau_negative": 1.0}
DUAL = {**CLIP, "trust_region": "dual_clip", "clip_dual": 3.0}
BAD = {
  "unknown region": ({"trust_region": "trpo"}, "unknown trust_region 'trpo'; known: cispo, clip"),
  "unknown ratio": ({"ratio": "word"}, "unknown ratio 'word'; known: sequence, sequence_token, t"),
  "unknown kl": ({"kl": "k4"}, "unknown kl 'k4'; known: k1, k2, k3"),
  "unknown average": ({"average": "mean"}, "unknown average 'mean'; known: constant, sequence"),
  "unknown advantage": ({"advantage": "gae"}, "unknown advantage 'gae'; known: batch_normalized"),
  "unknown correction": (
    {"correction": "tis"},
    "unknown correction 'tis'; known: none, sequence_m",
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
    "clip_low has no effect with trust_region='none' and correction='none'; set it to None. These "
    "choices take: no settings",
  ),
  "of another region": (
    {**CLIP, "ratio_max": 5.0},
    "ratio_max has no effect .* These choices take: clip_high, clip_low",
  ),
  "negative": ({**CLIP, "clip_low": -0.2}, "clip_low must be at least 0, got -0.2"),
  "not a number": ({**CLIP, "clip_high": float("nan")}, "clip_high must be at least 0, got nan"),
  "negative beta": ({"kl": "k3", "beta": -0.1}, "beta must be at least 0, got -0.1"),
  "beta that is not a number": ({"kl": "k3", "beta": float("nan")}, "beta must be at least 0"),
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
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_a_row(settings, message):
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
  ],
)
def test_limits_that_can(settings):
  row = Algorithm(**settings)
  assert all(getattr(row, name) == value for name, value in settings.items())


def test_multi_objective_is_the_one_advantage_that_is_not_in_the_table():
  assert Algorithm(advantage="multi_objective").advantage not in ADVANTAGES
  with pytest.raises(ValueError, match=r"unknown ratio 'multi_objective'"):
    Algorithm(ratio="multi_objective")
