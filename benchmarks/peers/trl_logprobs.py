"""Serves TRL's head as an engine: hidden states to log-probabilities; see `benchmarks.logprobs`.

Like GRPOTrainer's update, it computes logits, `selective_log_softmax` with its gradient, and
`entropy_from_logits` without one. Runs in TRL's environment.
"""

import torch
import trl
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from benchmarks.settings import head_inputs
from benchmarks.worker import Channel


def main() -> None:
  """Serves the engine."""
  channel = Channel()
  arrays = (torch.from_numpy(a) for a in head_inputs(**channel.settings["shape"]))
  hidden, head, tokens, weights = arrays
  tokens = tokens.long()
  hidden.requires_grad_()
  head.requires_grad_()
  channel.ready({"trl": trl.__version__, "torch": torch.__version__})
  while channel.wait():
    hidden.grad = head.grad = None
    with channel.measure() as record:
      logits = hidden @ head.T
      logp = selective_log_softmax(logits, tokens)
      with torch.no_grad():
        entropy_from_logits(logits)
      (weights * logp).sum().backward()
      record["logp"] = float(logp.detach().mean())


if __name__ == "__main__":
  main()
