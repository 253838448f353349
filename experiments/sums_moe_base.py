"""Pretrains a Qwen3-MoE of 3.4 million parameters on sums, from a config.json alone.

`sums_moe/config.json` describes the model: 4 layers of 16 experts, 2 a token, over bytes. It begins
with random weights, and learns the answers of 3,800 sums of two two-digit numbers by heart, or by
rule: 200 other sums are held out. `rollout.given` names the column that holds the answers. The run
ends early, so that the model is a base that knows a part: `sums_moe.py` goes on from it. Any
config.json of a family in docs/models.md, and any task with a column of completions, take their
places.

Hardware  2 CPU cores, float32
Time      1.4 minutes
Result    greedy accuracy on the 200 held-out sums: 0.000 before, 0.065 after 100 steps and 0.250
          after 150 (seed 0; 0.740 after 200, if the run goes on)
Command   python -m grpo_jax.train --config experiments/sums_moe_base.py --workdir runs/sums-base
          python -m grpo_jax.export --workdir runs/sums-base --out runs/sums-base-model
"""

from pathlib import Path

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = f"random:{Path(__file__).parent / 'sums_moe' / 'config.json'}"
  c.steps = 150
  with c.unlocked():
    c.task.settings.update(
      dataset="chain_sum",
      config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
      keep=r"\d+ \+ \d+",
      train_size=3800,
      eval_size=200,
      shots=0,
    )
  c.eval.every = 50
  c.eval.batch_prompts = 200
  c.rollout.given = "answer"
  c.rollout.prompts_per_step = 128
  c.rollout.group_size = 1
  c.rollout.completion_length = 4
  c.algorithm.name = "online_rft"
  c.optimizer.learning_rate = 2e-3
  c.optimizer.warmup_steps = 50
  return c
