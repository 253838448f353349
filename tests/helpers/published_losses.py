"""Published losses, transcribed with their defects, and the check that finds each defect.

`python -m tests.helpers.published_losses` prints the table of `docs/invariances.md`. Each function
restates in a few lines the formula of a project at the named version, reduced to the part that the
check examines. Some of the projects have fixed these defects since.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax import testing


def tunix_k1_loss(logp, advantages, mask, ref_logp):
  """KL estimator k1 in the loss: its gradient does not depend on the reference."""
  ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))
  per_token = -ratio * advantages[:, None] + 0.04 * (logp - ref_logp)
  lengths = jnp.maximum(mask.sum(-1), 1)
  return jnp.mean(jnp.sum(jnp.where(mask, per_token, 0.0), -1) / lengths)


def tunix_mask(tokens, eos_ids):
  """The mask is true on all tokens that are not the pad token, 0."""
  return tokens != 0


def lmpo_mask(tokens, eos_ids):
  """`argmax` of the EOS positions, with 0 taken for "no EOS"."""
  is_eos = jnp.isin(tokens, jnp.array(eos_ids))
  first = jnp.argmax(is_eos, -1, keepdims=True)
  return jnp.arange(tokens.shape[-1])[None, :] <= jnp.where(first == 0, tokens.shape[-1], first)


def easydel_cispo(logp, advantages, mask):
  """The clipped ratio keeps its gradient."""
  ratio = jnp.minimum(jnp.exp(logp - jax.lax.stop_gradient(logp)), 5.0)
  per_token = jnp.where(mask, -ratio * advantages[:, None] * logp, 0.0)
  return per_token.sum() / jnp.maximum(mask.sum(), 1)


def marin_dapo(logp, advantages, mask):
  """The mean over sequences of a sum that is already divided by the tokens of the batch."""
  objective = jnp.where(mask, jnp.exp(logp - jax.lax.stop_gradient(logp)), 0.0)
  return -jnp.mean((objective * advantages[:, None]).sum(-1) / jnp.maximum(mask.sum(), 1))


def marin_kl_mean(logp, advantages, mask, ref_logp):
  """The mean KL of a sequence divides by its length, which may be 0."""
  kl = jnp.expm1(ref_logp - logp) - (ref_logp - logp)
  return jnp.mean(jnp.sum(jnp.where(mask, kl, 0.0), -1) / mask.sum(-1))


def sequence_mean(logp, advantages, mask):
  """GRPO's average over sequences, accumulated with token counts."""
  per_token = jnp.where(mask, -logp * advantages[:, None], 0.0)
  return jnp.mean(per_token.sum(-1) / jnp.maximum(mask.sum(-1), 1))


def maxtext_loss(logp, advantages, mask, old_logp):
  """The mask multiplies after `exp`, and the old log-probs are padded with -inf."""
  ratio = jnp.exp(logp - old_logp)
  return -jnp.sum(ratio * advantages[:, None] * mask.astype(float)) / jnp.maximum(mask.sum(), 1)


def skyrl_loss(logp, advantages, mask, old_logp):
  """A single `where`, after `exp`: the value is right, but the gradient multiplies by infinity."""
  ratio = jnp.exp(logp - old_logp)
  return -jnp.sum(jnp.where(mask, ratio * advantages[:, None], 0.0))


def nemo_advantages(rewards):
  """A leave-one-out standard deviation from E[x^2] - E[x]^2."""
  others = 1.0 - jnp.eye(rewards.shape[1])
  count = max(rewards.shape[1] - 1, 1)
  baseline = rewards @ others / count
  std = jnp.nan_to_num(jnp.sqrt(rewards**2 @ others / count - baseline**2))
  return (rewards - baseline) / (std + 1e-6)


def openrlhf_advantages(rewards):
  """A tiny eps beside a standard deviation that is rounding noise if all rewards are equal."""
  mean = rewards.mean(-1, keepdims=True)
  std = jnp.std(rewards, -1, keepdims=True, ddof=min(rewards.shape[1] - 1, 1))
  return (rewards - mean) / (std + 1e-9)


def verl_advantages(rewards):
  """In a group of one no mean is subtracted: the advantage is the reward."""
  if rewards.shape[1] == 1:
    return rewards / (1.0 + 1e-6)
  mean, std = rewards.mean(-1, keepdims=True), jnp.std(rewards, -1, keepdims=True, ddof=1)
  return jnp.where(std < 1e-4, 0.0, (rewards - mean) / (std + 1e-6))


def nanochat_loss(logp, advantages, mask):
  """The token mean of each micro-batch, averaged over micro-batches."""
  return -jnp.sum(jnp.where(mask, logp * advantages[:, None], 0.0)) / jnp.maximum(mask.sum(), 1)


def mllm_jax_logprobs(logits, tokens, temperature):
  """`log_softmax(logits) / T` instead of `log_softmax(logits / T)`."""
  logps = jax.nn.log_softmax(logits, -1) / temperature
  return jnp.take_along_axis(logps, tokens[..., None], -1)[..., 0]


def _token_share(part, whole):
  """Returns the fraction of the tokens of the batch in this part."""
  return part.sum() / whole.sum()


@dataclasses.dataclass(frozen=True)
class Defect:
  """Describes a row of the table; `check(function, **settings)` must raise Counterexample."""

  project: str
  function: Callable
  check: Callable
  settings: dict = dataclasses.field(default_factory=dict)

  @property
  def defect(self) -> str:
    """Returns the description of the defect: the docstring of its function."""
    return self.function.__doc__.rstrip(".")

  @functools.cached_property
  def report(self) -> str:
    """Returns the report of the check, or "nothing" if it does not find the defect."""
    """The report of the check, or "nothing" if it does not find the defect."""
    try:
      self.check(self.function, **self.settings)
    except testing.Counterexample as counterexample:
      return counterexample.found
    return "nothing"


OLD, REF = {"arrays": ("old_logp",)}, {"arrays": ("ref_logp",)}

DEFECTS = (
  Defect("Tunix 0.1.7", tunix_k1_loss, testing.check_on_policy_gradient, REF),
  Defect("EasyDeL 090a03b", easydel_cispo, testing.check_on_policy_gradient),
  Defect("Marin 011a1de", marin_dapo, testing.check_microbatches),
  Defect("MaxText e591f30", sequence_mean, testing.check_microbatches, {"share": _token_share}),
  Defect("nanochat 92d63d4", nanochat_loss, testing.check_microbatches),
  Defect("MaxText e591f30", maxtext_loss, testing.check_poisoned_masks, OLD),
  Defect("SkyRL, August 2026", skyrl_loss, testing.check_poisoned_masks, OLD),
  Defect("Marin 011a1de", marin_kl_mean, testing.check_empty, REF),
  Defect("Tunix 0.1.7", tunix_mask, testing.check_eos),
  Defect("lmpo bdffa7b", lmpo_mask, testing.check_eos),
  Defect("OpenRLHF, August 2026", openrlhf_advantages, testing.check_constant_group),
  Defect("verl, August 2026", verl_advantages, testing.check_constant_group),
  Defect("NeMo-RL, August 2026", nemo_advantages, testing.check_shift_scale),
  Defect("MLLM-JAX 8b19c02", mllm_jax_logprobs, testing.check_temperature),
)


def table() -> list[str]:
  """Returns the lines of the table in Markdown."""
  rows = ["| check | project, version | defect | report of the check |", "|---|---|---|---|"]
  for row in DEFECTS:
    rows.append(f"| `{row.check.__name__}` | {row.project} | {row.defect} | {row.report} |")
  return rows


if __name__ == "__main__":
  print("\n".join(table()))
