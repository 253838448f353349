"""Serves Tunix's head as an engine: hidden states to log-probabilities; see `benchmarks.logprobs`.

Like the update, it computes logits, `selective_log_softmax` with its gradient, and
`compute_entropy_from_logits` without one. Runs in Tunix's environment.
"""

import jax
import jax.numpy as jnp
from tunix.rl.algo_core import compute_entropy_from_logits
from tunix.rl.common import selective_log_softmax

from benchmarks.settings import head_inputs
from benchmarks.worker import Channel


@jax.jit
def work(hidden, head, tokens, weights):
  """Computes the gradients of the weighted log-probabilities."""

  def loss(hidden, head):
    logits = hidden @ head.T
    logp = selective_log_softmax(logits, tokens)
    entropy = compute_entropy_from_logits(jax.lax.stop_gradient(logits))
    return jnp.sum(weights * logp), (logp.mean(), entropy)

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)


def main() -> None:
  """Serves the engine."""
  channel = Channel()
  arrays = [jnp.asarray(a) for a in head_inputs(**channel.settings["shape"])]
  channel.ready({"tunix": "0.1.7", "jax": jax.__version__})
  while channel.wait():
    with channel.measure() as record:
      (_, (logp, _)), _ = jax.block_until_ready(work(*arrays))
      record["logp"] = float(logp)


if __name__ == "__main__":
  main()
