"""Serves TRL's GRPOTrainer as an engine that learns: a unit of work is some steps, then answers.

Runs in TRL's environment; see `benchmarks.learning`. The loop is `trainer.train()`. A callback
waits for a request before the first step and after every `every` of them, and answers the held-out
problems in between. The settings favour TRL: no gradient checkpointing, one micro-batch, no logging
and no saving; a text ends at its line break by its own end-of-text id.
"""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks import problems
from benchmarks.worker import Channel, clock, since


class Units(TrainerCallback):
  """Measures units of steps, and evaluates between them.

  Args:
    channel: the pipe to the parent.
    every: steps of a unit.
    accuracy: returns the held-out accuracy of the policy.
  """

  def __init__(self, channel: Channel, every: int, accuracy) -> None:
    self.channel, self.every, self.accuracy = channel, every, accuracy
    self.tokens, self._times = 0, None

  def on_train_begin(self, args, state, control, **kwargs):
    """Answers the first request, for the accuracy before training, and waits for the next."""
    self._begin()
    self._end(0)
    self._begin()

  def on_step_end(self, args, state, control, **kwargs):
    """Ends a unit after its last step, and waits for the next one."""
    if state.global_step % self.every == 0:
      self._end(state.global_step)
      self._begin()

  def _begin(self) -> None:
    if not self.channel.wait():
      os._exit(0)  # TRL: training cannot be cancelled from inside a step
    self._measurement = self.channel.measure()
    self._record, self._before = self._measurement.__enter__(), clock()

  def _end(self, step: int) -> None:
    times = since(self._before)
    accuracy = self.accuracy()
    self._record |= times | {"step": step, "tokens": self.tokens, "accuracy": accuracy}
    self._measurement.__exit__(None, None, None)


def greedy_accuracy(model, tokenizer, rows, tokens: int, batch: int = 50) -> float:
  """Returns the share of problems that the model answers right without randomness."""
  right = []
  model.eval()
  for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    prompts = [row["prompt"] for row in part]
    texts = [
      prompt
      if isinstance(prompt, str)
      else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
      for prompt in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
      out = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
      )
    answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], True)
    right += problems.reward(prompts, answers, [row["answer"] for row in part])
  model.train()
  return sum(right) / len(right)


def main() -> None:
  """Serves the engine."""
  channel = Channel()
  settings = channel.settings
  task = problems.TASKS[settings["task"]]
  tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
  tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
  if not task.chat:
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer.encode("\n")[-1])
  model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
  held_out = problems.read(settings["held_out"])
  units = Units(
    channel, settings["every"], lambda: greedy_accuracy(model, tokenizer, held_out, task.tokens)
  )
  with tempfile.TemporaryDirectory() as folder:
    arguments = trl.GRPOConfig(
      output_dir=folder,
      per_device_train_batch_size=task.prompts * task.group,
      num_generations=task.group,
      max_completion_length=task.tokens,
      temperature=task.temperature,
      top_k=0,
      top_p=1.0,
      learning_rate=settings["learning_rate"],
      lr_scheduler_type="linear",
      warmup_steps=3,
      max_steps=task.steps,
      bf16=settings["precision"] == "bfloat16",
      gradient_checkpointing=False,
      use_cpu=True,
      logging_strategy="no",
      save_strategy="no",
      report_to=[],
      disable_tqdm=True,
      seed=settings["seed"],
    )
    trainer = trl.GRPOTrainer(
      model=model,
      reward_funcs=problems.reward,
      args=arguments,
      train_dataset=Dataset.from_list(problems.read(settings["train"])),
      processing_class=tokenizer,
      callbacks=[units],
    )
    generate = trainer._generate_and_score_completions

    def counted(inputs):
      batch = generate(inputs)
      units.tokens += int(batch["completion_mask"].sum())
      return batch

    trainer._generate_and_score_completions = counted
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    channel.ready(versions | {"torch": torch.__version__, "threads": torch.get_num_threads()})
    trainer.train()


if __name__ == "__main__":
  main()
