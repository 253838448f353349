"""Serves transformers' `generate` as an engine: a unit of work is a batch of completions.

Runs in TRL's environment; see `benchmarks.sampling`. It samples at temperature 1 from the whole
vocabulary, in float32, with the default (dynamic) cache and without compilation.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.settings import make_prompts
from benchmarks.worker import Channel


def main() -> None:
  """Serves the engine."""
  channel = Channel()
  s = channel.settings
  tokenizer = AutoTokenizer.from_pretrained(s["model"], padding_side="left")
  model = AutoModelForCausalLM.from_pretrained(s["model"], dtype=torch.float32).eval()
  prompts = make_prompts(s["kind"], s["prompts"])
  if s["kind"] == "chat":
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)
           for p in prompts]  # fmt: skip
  else:
    ids = [tokenizer(p)["input_ids"] for p in prompts]
  batch = torch.tensor(ids).repeat_interleave(s["group"], dim=0)
  torch.manual_seed(0)
  channel.ready({"transformers": transformers.__version__, "torch": torch.__version__,
                 "threads": torch.get_num_threads()})  # fmt: skip
  while channel.wait():
    with channel.measure() as record, torch.no_grad():
      out = model.generate(
        input_ids=batch,
        attention_mask=torch.ones_like(batch),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=s["tokens"],
        max_new_tokens=s["tokens"],
        pad_token_id=tokenizer.pad_token_id,
        disable_compile=True,
      )
      new = out.shape[1] - batch.shape[1]
      record["prompt_tokens"] = batch.shape[1] * s["prompts"]
      record["completion_tokens"] = new * len(out)


if __name__ == "__main__":
  main()
