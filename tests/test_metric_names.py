"""Tests that a condition on a metric is checked against the metrics that a run writes.

`end_to_end/test_continue.py` compares the names with those that runs have written.
"""

import pytest

from grpo_jax.metric_names import check_condition


def test_the_metric_must_be_one_that_the_run_writes():
  check_condition("", [])
  check_condition("kl < 1", ["kl", "reward"])
  with pytest.raises(ValueError, match=r"unknown metric 'eval/acuracy': did you mean 'eval/acc"):
    check_condition("eval/acuracy>0.9", ["eval/accuracy", "reward"])
