"""Plants each illness in the metrics of a run that learns, and looks at healthy runs at each step.

`tests/data/healthy_runs` holds metrics of three runs: the demo, `experiments/tiny.py` and
`experiments/smollm2_guess_number.py`. `tests/test_doctor.py` plants illnesses in real small runs.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import default_config
from grpo_jax.core.diagnosis import ORDER
from grpo_jax.run.health import CHECKS, Watcher, examine, mann_kendall

HEALTHY = sorted(Path("tests/data/healthy_runs").glob("*.jsonl"))


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def config(steps):
  c = default_config()
  c.steps = steps
  return c


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_a_healthy_run_has_no_finding_at_any_step(path):
  rows = rows_of(path)
  steps = sum("reward" in row for row in rows)
  for end in range(1, len(rows) + 1):
    assert examine(rows[:end], config(steps)) == [], f"after {end} rows"


def test_there_are_three_healthy_runs():
  assert [path.stem for path in HEALTHY] == ["demo", "episodes", "tiny"]


# --- planted in metrics ---------------------------------------------------------------------------

N = 45
RNG = np.random.default_rng(0)
UP = np.linspace(0.1, 0.7, N)
NOISE = RNG.normal(0, 0.02, N)
FLAT = 0.3 + NOISE
LEARNING = {
  "reward": UP + NOISE,
  "accuracy": UP + NOISE,
  "rewards/math/mean": UP + NOISE,
  "entropy": 1.5 - UP,
  "frac_reward_zero_std": 0.3 + NOISE,
  "grad_norm": 1.0 + NOISE,
  "completions/clipped_ratio": 0.02 + 0 * NOISE,
  "completions/mean_length": 80 + 100 * NOISE,
  "rewards/missing": 0 * NOISE,
  "rewards/raised": 0 * NOISE,
  "clip_ratio/region_mean": 0.01 + 0 * NOISE,
  "kl": 0.01 * UP,
  "sampling/sampling_logp_difference/mean": 2e-4 + 0 * NOISE,
  "update/skipped": 0 * NOISE,
}
WITHOUT = {"reward": FLAT, "accuracy": FLAT, "rewards/math/mean": FLAT}
# What is planted, and how sure the finding is. Each is the only one.
PLANTED = {
  "no_signal": (
    {"frac_reward_zero_std": 0.7 + NOISE, **{name: UP * 0 + 0.02 for name in WITHOUT},
     "reward": 0.02 + NOISE / 10}, "likely",
  ),
  "solved": ({"frac_reward_zero_std": UP * 0 + 1.0, "accuracy": UP * 0 + 1.0}, "sure"),
  "flat_reward": (WITHOUT, "sure"),
  "fallen_reward": (
    {name: np.concatenate([UP[:30], np.full(15, 0.1) + NOISE[:15]]) for name in WITHOUT}, "sure",
  ),
  "hacked": ({"accuracy": 0.6 - UP / 2}, "likely"),
  "not_general": ({}, "likely"),
  "lost_rewards": ({"frac_unscored": UP * 0 + 0.2, "rewards/missing": UP * 0 + 9}, "sure"),
  "truncated": ({**WITHOUT, "completions/clipped_ratio": 0.6 + NOISE}, "sure"),
  "longer_not_better": ({**WITHOUT, "completions/mean_length": 50 + 200 * UP}, "likely"),
  "low_entropy": ({**WITHOUT, "entropy": 0.02 + NOISE / 10}, "likely"),
  "far_from_reference": ({"kl": 5 * UP}, "sure"),
  "clipped": ({"clip_ratio/region_mean": UP}, "sure"),
  "mismatch": ({"sampling/sampling_logp_difference/mean": UP * 0 + 5e-3}, "likely"),
  "no_gradient": ({"grad_norm": 0 * UP}, "sure"),
  "far_clipped": ({"grad_norm": 50 + NOISE}, "possible"),
  "skipped": ({"update/skipped": (np.arange(N) % 9 == 0) * 1.0}, "sure"),
  "no_movement": ({**WITHOUT, "entropy": 1.0 + NOISE / 10}, "likely"),
  "slow_rewards": ({"time/rewards": 6.0 + NOISE, "step_time": 10.0 + NOISE}, "likely"),
}  # fmt: skip
# A reward that does not rise belongs to these.
WITH = {
  "no_signal": {"flat_reward"}, "truncated": {"flat_reward"},
  "longer_not_better": {"flat_reward"}, "low_entropy": {"flat_reward"},
  "no_movement": {"flat_reward"},
}  # fmt: skip


def history(changes, held_out=(0.1, 0.6)):
  series = LEARNING | changes
  rows = [{"step": 0, "eval/accuracy": held_out[0], "eval/accuracy_se": 0.03}]
  rows += [{"step": i, **{name: float(v[i]) for name, v in series.items()}} for i in range(N)]
  return [*rows, {"step": N, "eval/accuracy": held_out[1], "eval/accuracy_se": 0.03}]


def test_a_run_that_learns_has_no_finding():
  assert examine(history({}), config(200)) == []


@pytest.mark.parametrize("name", CHECKS)
def test_a_planted_illness_is_found_and_no_other(name):
  changes, confidence = PLANTED[name]
  held_out = (0.1, 0.12) if name == "not_general" else (0.1, 0.6)
  found = {f.name: f for f in examine(history(changes, held_out), config(200))}
  assert set(found) == {name} | WITH.get(name, set())
  assert found[name].confidence == confidence
  assert all(np.isfinite(list(found[name].evidence.values())))
  assert min(len(found[name].seen), len(found[name].reason), len(found[name].advice)) > 15


def test_an_entropy_that_falls_fast_is_told_before_it_is_gone():
  changes = {**WITHOUT, "entropy": np.exp(-0.05 * np.arange(N))}
  found = {f.name: f for f in examine(history(changes), config(200))}
  assert found["low_entropy"].confidence == "possible"
  # From exp(-0.05 * 43) to 0.05 = exp(-3.0): 17 steps at a rate of 0.05.
  assert found["low_entropy"].evidence["steps"] == pytest.approx(17, abs=0.5)


def test_a_share_of_the_first_steps_is_no_finding():
  rows = history(PLANTED["no_signal"][0])[:5]
  assert examine(rows, config(200)) == []


def test_metrics_that_are_null_or_missing():
  rows = [{"step": i, "reward": None if i % 2 else 0.5, "entropy": None} for i in range(30)]
  assert [f.name for f in examine(rows, config(30))] == ["flat_reward"]
  assert examine([], config(30)) == []


def test_the_order_of_findings():
  changes = PLANTED["far_clipped"][0] | PLANTED["skipped"][0] | PLANTED["mismatch"][0]
  found = examine(history(changes), config(200))
  assert [f.confidence for f in found] == list(ORDER)


def test_mann_kendall_by_hand():
  # 1 2 3 4: all 6 pairs rise, variance 4 * 3 * 13 / 18.
  assert mann_kendall(np.arange(4.0)) == pytest.approx(5 / np.sqrt(26 / 3))
  assert mann_kendall(-np.arange(4.0)) == -mann_kendall(np.arange(4.0))
  assert mann_kendall(np.array([1.0, 2.0])) == 0


def test_numbers_that_are_not_finite_are_left_out():
  """A skipped update has metrics of NaN; the run must go on, and be judged by the other steps."""
  rows = history(PLANTED["low_entropy"][0])
  expected = [f.name for f in examine(rows, config(200))]
  for value in (math.nan, math.inf):
    broken = [*rows[:-5], dict.fromkeys(rows[5], value) | {"step": 40}, *rows[-5:]]
    assert [f.name for f in examine(broken, config(200))] == expected


def test_a_watcher_says_a_sure_finding_once(tmp_path):
  watcher = Watcher(config(200), "runs/a")
  said = [line for row in history(PLANTED["skipped"][0]) for line in watcher(row)]
  assert said == [
    "doctor: 100.0% of the updates were skipped: their loss or gradient was not finite, or a spike "
    "(python -m grpo_jax.doctor runs/a)"
  ]
  assert not [line for row in history({}) for line in Watcher(config(200), "x")(row)]
