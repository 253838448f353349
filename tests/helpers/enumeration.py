"""A world small enough to list: exact expectations of everything the losses estimate.

Two prompts, a vocabulary of 3 (token 0 is EOS) and at most 3 tokens: 15 completions each. The
policy is a table of logits, one row per prompt and context (7 contexts), so every distribution
over completions is reachable and every expectation is a finite sum. Nothing is sampled.

A group is summed over as a multiset: all losses treat the completions of a group alike, so the
orders of one multiset share one term, weighted by their number (the multinomial coefficient).
`test_unbiased.py` holds that to a sum over ordered groups. Use float64 (`jax_enable_x64`).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax import completion_mask, token_logprobs

EOS, VOCAB, MAX_LENGTH = 0, 3, 3
PROMPTS = 2


def list_completions() -> Int[np.ndarray, "C T"]:
  """Every completion once; what follows the first EOS is filled with EOS."""
  rows = itertools.product(range(VOCAB), repeat=MAX_LENGTH)
  return np.array([r for r in rows if all(b == EOS for a, b in itertools.pairwise(r) if a == EOS)])


TOKENS = list_completions()
MASK = np.array([[EOS not in row[:t].tolist() for t in range(MAX_LENGTH)] for row in TOKENS])
LENGTHS = MASK.sum(-1)
_PREFIXES = [p for n in range(MAX_LENGTH) for p in itertools.product((1, 2), repeat=n)]
CONTEXT = np.array(
  [
    [_PREFIXES.index(tuple(row[:t])) if mask[t] else 0 for t in range(MAX_LENGTH)]
    for row, mask in zip(TOKENS.tolist(), MASK)
  ]
)


def table(phase: float, scale: float = 1.0, eos: float = 0.0) -> Float[np.ndarray, "P X V"]:
  """Logits that look random and are the same on every platform: a sine of the index."""
  count = PROMPTS * len(_PREFIXES) * VOCAB
  logits = np.sin(1.7 * np.arange(count) ** 1.3 + phase).reshape(PROMPTS, len(_PREFIXES), VOCAB)
  return scale * logits + eos * np.eye(VOCAB)[EOS]


POLICY = table(0.0, 1.2, 0.4)
REFERENCE = POLICY + table(1.0, 0.8)
SHIFT = table(2.0)  # the policy before its updates is POLICY - distance * SHIFT


def _content(row: np.ndarray, mask: np.ndarray) -> tuple[int, ...]:
  return tuple(int(token) for token in row[mask] if token != EOS)


_CONTENTS = [_content(row, mask) for row, mask in zip(TOKENS, MASK)]
# Prompt 0 is easy (any completion with a 1 in it), prompt 1 is hard (two completions).
CORRECT = np.array([[1 in c for c in _CONTENTS], [c in ((2,), (1, 2)) for c in _CONTENTS]], float)
# And a score between 0 and 1, such as a reward model gives.
STYLE = np.round(0.5 + 0.5 * np.sin(2.3 * np.arange(CORRECT.size)), 2).reshape(CORRECT.shape)
REWARDS = CORRECT + 0.5 * STYLE


def logps(theta: Float[Array, "P X V"]) -> Float[Array, "P C T"]:
  """Log-probability of each token of each completion; 0 where masked."""
  tokens = jnp.broadcast_to(TOKENS, (theta.shape[0], *TOKENS.shape))
  mask = completion_mask(tokens, EOS)
  return jnp.where(mask, token_logprobs(theta[:, CONTEXT], tokens)[0], 0.0)


def probabilities(theta: Float[Array, "P X V"]) -> Float[Array, "P C"]:
  """Of each completion; they add up to 1 for each prompt."""
  return jnp.exp(logps(theta).sum(-1))


def expected_reward(theta: Float[Array, "P X V"], rewards: Float[Array, "P C"]) -> Array:
  """`mean over prompts of sum_c pi(c) r(c)`: what reinforcement learning maximizes."""
  return (probabilities(theta) * rewards).sum(-1).mean()


def sequence_kl(theta: Float[Array, "P X V"], reference: Float[Array, "P X V"]) -> Array:
  """`mean over prompts of sum_c pi(c) log(pi(c) / ref(c))`, nats per completion."""
  gap = (logps(theta) - logps(reference)).sum(-1)
  return (probabilities(theta) * gap).sum(-1).mean()


def context_kl(
  theta: Float[Array, "P X V"],
  reference: Float[Array, "P X V"],
  visits: Float[Array, "P X V"],
  forward: bool = False,
) -> Array:
  """`E over the contexts that `visits` meets of KL(pi || ref)` at that context, or KL(ref || pi).

  The value at `visits = theta` is `sequence_kl`; the gradient is not, because here the contexts
  that are met do not move with `theta`: a token's effect on later tokens' KL is left out.
  """
  reach = jnp.exp(jnp.cumsum(logps(visits), -1) - logps(visits))  # of the context before token t
  reach = jnp.where(MASK, reach, 0.0)
  # Completions share contexts: count each context once, by its probability.
  met = jnp.zeros(theta.shape[:2]).at[:, CONTEXT].max(reach)
  p, q = jax.nn.log_softmax(theta), jax.nn.log_softmax(reference)
  if forward:
    p, q = q, p
  return (met * (jnp.exp(p) * (p - q)).sum(-1)).sum(-1).mean()


class Groups(NamedTuple):
  """Every batch of one group per prompt, and how many ordered batches each stands for."""

  ids: Int[np.ndarray, "B P G"]
  count: Float[np.ndarray, "B"]


@functools.cache
def list_groups(prompts: int, size: int) -> Groups:
  one = np.array(list(itertools.combinations_with_replacement(range(len(TOKENS)), size)))
  orders = [math.factorial(size) / _repeats(row) for row in one]
  pick = np.array(list(itertools.product(range(len(one)), repeat=prompts)))
  return Groups(one[pick], np.array(orders)[pick].prod(-1))


def _repeats(row: np.ndarray) -> int:
  return math.prod(math.factorial(n) for n in np.bincount(row))


class Expected(NamedTuple):
  """Expectations over batches: of the loss, of its metrics, and of its gradient to `theta`."""

  loss: float
  metrics: dict[str, float]
  gradient: Float[np.ndarray, "P X V"]


def expectation(
  loss: Callable[..., tuple[Array, dict[str, Array]]], groups: Groups, *, compiled: bool = False
) -> Callable[..., Expected]:
  """A function `(theta, sampler=theta, *data) -> Expected`: batches drawn by `sampler`, exact.

  `loss(logp, drawn_logp, ids, *data)` gets one batch: log-probabilities under `theta` and under
  `sampler` [P, G, T], which completions it holds [P, G], and its part of each array of `data`
  (leading axis B). JAX takes the gradient of each batch with respect to `logp` alone, as in
  training; the chain rule brings the expected one to `theta`. `compiled` only changes the time:
  it pays where nothing else has the shapes of `groups`.
  """
  prompts = np.arange(groups.ids.shape[1])[:, None]
  # Many batches go in slices that fit a cache; few go operation by operation.
  slices = math.gcd(len(groups.count), 680) if len(groups.count) > 20_000 else 1

  def part(logp, drawn_logp, ids, count, *data):
    probability = count * jnp.exp(drawn_logp.sum(-1))[prompts, ids].prod((-1, -2))
    value_and_grad = jax.vmap(jax.value_and_grad(loss, has_aux=True))
    values, gradients = value_and_grad(logp[prompts, ids], drawn_logp[prompts, ids], ids, *data)
    weighted = probability[:, None, None, None] * gradients
    gradient = jnp.zeros_like(logp).at[prompts, ids].add(weighted)
    return jax.tree.map(lambda x: probability @ x, values), gradient

  def whole(theta, sampler, *batches):
    logp, pull = jax.vjp(logps, theta)
    drawn_logp = logps(sampler)
    if slices == 1:
      values, gradient = part(logp, drawn_logp, *batches)
    else:
      parts = [x.reshape(slices, -1, *x.shape[1:]) for x in batches]
      parts = jax.lax.map(lambda x: part(logp, drawn_logp, *x), parts)
      values, gradient = jax.tree.map(lambda x: x.sum(0), parts)
    return values, pull(gradient)[0]

  run = jax.jit(whole) if compiled or slices > 1 else whole

  def expect(theta, sampler=None, *data) -> Expected:
    theta = jnp.asarray(theta)
    sampler = theta if sampler is None else jnp.asarray(sampler)
    (value, metrics), gradient = run(theta, sampler, *map(jnp.asarray, (*groups, *data)))
    return Expected(float(value), jax.tree.map(float, metrics), np.asarray(gradient))

  return expect


class Comparison(NamedTuple):
  """A gradient next to the true one, `gradient = scale * true + rest`.

  `bias = |rest| / |scale * true|`: what no learning rate can mend; 0 = unbiased up to `scale`.
  """

  scale: float
  cosine: float
  bias: float


def compare(gradient: np.ndarray, true: np.ndarray) -> Comparison:
  """Scale, cosine and relative bias; a gradient of 0 has none of them (NaN) but scale 0."""
  scale = float((gradient * true).sum() / (true**2).sum())
  size = float(np.linalg.norm(gradient))
  if size < 1e-12 * np.linalg.norm(true):
    return Comparison(0.0, math.nan, math.nan)
  rest = float(np.linalg.norm(gradient - scale * true))
  along = abs(scale) * float(np.linalg.norm(true))
  return Comparison(
    scale, float((gradient * true).sum()) / size / float(np.linalg.norm(true)), rest / along
  )
