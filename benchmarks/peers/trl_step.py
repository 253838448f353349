"""Serves TRL's GRPOTrainer as an engine: a unit of work is one step of its training loop.

Runs in TRL's environment; see `benchmarks.step`. The loop is `trainer.train()`. A callback waits
for a request before each step and replies after it. The settings favour TRL: no gradient
checkpointing, one micro-batch, no evaluation, no logging and no saving.
"""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.settings import SETTINGS, make_prompts, reward
from benchmarks.worker import Channel, clock, since

STEPS = 64


class Turns(TrainerCallback):
  """Holds the training loop before each step until it is requested.

  Args:
    channel: the pipe to the parent.
    group: number of completions per prompt.
  """

  def __init__(self, channel: Channel, group: int) -> None:
    self.channel, self.group, self.record = channel, group, {}

  def on_step_begin(self, args, state, control, **kwargs):
    """Waits for the request and starts the clock."""
    if not self.channel.wait():
      os._exit(0)  # TRL: a step that has begun cannot be cancelled
    self._measurement = self.channel.measure()
    self.record = self._measurement.__enter__()

  def on_step_end(self, args, state, control, **kwargs):
    """Stops the clock and replies."""
    self.record |= since(self._update_start, "update_")
    self._measurement.__exit__(None, None, None)

  def sampled(self, before, batch) -> None:
    """Records sampling, once completions, rewards and advantages are computed."""
    self.record |= since(before, "sampling_") | {
      # The batch holds each prompt once per completion.
      "prompt_tokens": int(batch["prompt_mask"].sum()) // self.group,
      "completion_tokens": int(batch["completion_mask"].sum()),
    }
    self._update_start = clock()


def main() -> None:
  """Serves the engine."""
  channel = Channel()
  settings = channel.settings
  shape = SETTINGS[settings["setting"]]
  rows = shape.prompts * shape.group
  tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
  model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
  turns = Turns(channel, shape.group)
  with tempfile.TemporaryDirectory() as folder:
    arguments = trl.GRPOConfig(
      output_dir=folder,
      per_device_train_batch_size=rows,
      num_generations=shape.group,
      max_completion_length=shape.tokens,
      generation_kwargs={"min_new_tokens": shape.tokens},
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      loss_type="grpo",
      beta=0.0,
      learning_rate=settings["learning_rate"],
      lr_scheduler_type="constant",
      adam_beta2=0.99,
      weight_decay=0.0,
      max_grad_norm=1.0,
      max_steps=10_000,
      bf16=False,
      gradient_checkpointing=False,
      use_cpu=True,
      logging_strategy="no",
      save_strategy="no",
      report_to=[],
      disable_tqdm=True,
      seed=0,
    )
    trainer = trl.GRPOTrainer(
      model=model,
      reward_funcs=reward,
      args=arguments,
      train_dataset=Dataset.from_dict({"prompt": make_prompts(shape.kind, shape.prompts * STEPS)}),
      processing_class=tokenizer,
      callbacks=[turns],
    )
    generate = trainer._generate_and_score_completions

    def timed(inputs):
      before = clock()
      batch = generate(inputs)
      turns.sampled(before, batch)
      return batch

    trainer._generate_and_score_completions = timed
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    channel.ready(versions | {"torch": torch.__version__, "threads": torch.get_num_threads()})
    trainer.train()


if __name__ == "__main__":
  main()
