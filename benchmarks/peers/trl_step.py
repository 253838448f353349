"""TRL's GRPOTrainer as an engine: one step of its own training loop a piece of work.

Runs in TRL's environment; see `benchmarks.step`. The loop is `trainer.train()`; a callback waits
for the command before each step and reports after it. Settings in TRL's favour: no gradient
checkpointing, one micro-batch, no evaluation, no logging, no saving.
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
  """Holds the training loop until its next step is asked for."""

  def __init__(self, channel: Channel) -> None:
    self.channel, self.record = channel, {}

  def on_step_begin(self, args, state, control, **kwargs):
    self.go_on = self.channel.wait()
    if not self.go_on:
      os._exit(0)  # the trainer has no way to leave before a step that it has begun
    self._measured = self.channel.measure()
    self.record = self._measured.__enter__()

  def on_step_end(self, args, state, control, **kwargs):
    total = since(self._began, "update_")
    self.record |= total
    self._measured.__exit__(None, None, None)

  def sampled(self, before, batch) -> None:
    """Called when completions, rewards and advantages are there."""
    self.record |= since(before, "sampling_") | {
      # Every prompt stands in the batch once per completion.
      "prompt_tokens": int(batch["prompt_mask"].sum()) // self.group,
      "completion_tokens": int(batch["completion_mask"].sum()),
    }
    self._began = clock()


def main() -> None:
  channel = Channel()
  settings = channel.settings
  shape = SETTINGS[settings["setting"]]
  rows = shape.prompts * shape.group
  tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
  model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
  turns = Turns(channel)
  turns.group = shape.group
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
    plain = trainer._generate_and_score_completions

    def timed(inputs):
      before = clock()
      batch = plain(inputs)
      turns.sampled(before, batch)
      return batch

    trainer._generate_and_score_completions = timed
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    channel.ready(versions | {"torch": torch.__version__, "threads": torch.get_num_threads()})
    trainer.train()


if __name__ == "__main__":
  main()
