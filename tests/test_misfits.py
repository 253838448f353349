"""Tests that settings which do not go together are named before anything compiles.

`test_episodes.py` has those of episodes, `test_curriculum.py` those of a curriculum.
"""

import pytest

from grpo_jax.build import build
from grpo_jax.config import ConfigError, load

PPO = ["--config.algorithm.name=ppo"]
TEACHER, OWN = "teacher.source=random:tiny", "teacher.source=policy"


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      ["--config.critic.clip=0.2"],
      "critic.clip is 0.2, but algorithm.advantage 'group_centered' ha",
    ),
    ([*PPO, "--config.critic.source=nowhere"], "nowhere"),
    (
      [*PPO, "--config.critic.trunk=policy", "--config.critic.warmup_steps=2"],
      "critic.warmup_steps is 2, but critic.trunk is 'policy', which does not use it",
    ),
    (
      [*PPO, "--config.critic.weight=2"],
      "critic.weight is 2.0, but critic.trunk is 'own', which does not use it",
    ),
    (
      [*PPO, "--config.critic.trunk=policy", "--config.lora.rank=2"],
      "critic.trunk is 'policy', but lora.rank is 2: only adapters are trained",
    ),
    ([*PPO, "--config.critic.trunk=shared"], "critic.trunk is 'shared', it must be 'own' or 'po"),
    (
      [*PPO, "--config.critic.source=tests/fixtures/tiny_llama"],
      r"tiny_llama' has \d+ tokens, and",
    ),
    ([*PPO, "--config.algorithm.gamma=2.0"], "algorithm.gamma is 2.0, it must be between 0 and 1"),
    (
      ["--config.rollout.group_size=1"],
      "group_size is 1, it must be at least 2: a group of one has",
    ),
  ],
)
def test_settings_of_a_critic_that_do_not_fit(options, message):
  with pytest.raises(ConfigError, match=message):
    build(load("experiments/tiny.py", options))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (["algorithm.name=opd"], "there is no teacher: set teacher.source"),
    (["algorithm.teacher_weight=0.5"], "there is no teacher: set teacher.source"),
    ([TEACHER], "algorithm.teacher_weight is 0, so the teacher has no effect"),
    (["algorithm.advantage=zero_advantages"], "nothing is learned"),
    (["algorithm.name=opd", TEACHER, "rollout.max_resamples=1"], "no group would ever do"),
    (["algorithm.name=opd", "teacher.source=nowhere/at-all"], "nowhere/at-all"),
    (["algorithm.name=opd", "teacher.source=tests/fixtures/tiny_llama"], "another tokenizer"),
    (["algorithm.name=opd", "teacher.source=[1]"], "the name of a model, or a list of names"),
    (["algorithm.name=opd", TEACHER, "algorithm.teacher_weight=-1.0"], "at least 0"),
    (["algorithm.name=opd", TEACHER, "algorithm.teacher_discount=1.5"], "between 0 and 1"),
    (["algorithm.name=opd", "teacher.source=reference"], "reference.sync_every is 0"),
    (["algorithm.name=opd", OWN, "algorithm.teacher_divergence=1"], "a model of its own"),
    (["algorithm.name=opd", OWN, "teacher.template={prompt}"], "has no {solution}"),
    (["algorithm.name=opd", OWN, "teacher.shows=answer"], "have no column of that name"),
    (["algorithm.name=opd", OWN, "teacher.shows=both"], "'sibling' or 'answer'"),
    (["algorithm.name=opd", OWN, "teacher.prompt_length=99999"], "exceeds the context"),
    (["algorithm.kl_in=rewards"], "unknown kl_in 'rewards'; known: loss, reward"),
  ],
)
def test_a_teacher_that_does_not_fit_is_named(changes, words):
  with pytest.raises(ConfigError) as caught:
    build(load("experiments/tiny.py", [f"--config.{change}" for change in changes]))
  assert any(words in problem for problem in caught.value.problems)


def test_a_game_of_more_turns_than_an_episode_may_have():
  options = ["task.name=guess_number", "task.settings.turns=6", "rollout.completion_length=40"]
  with pytest.raises(ConfigError, match=r"up to 6 turns: the others would be cut off; set --conf"):
    build(load("experiments/tiny.py", [f"--config.{option}" for option in options]))
