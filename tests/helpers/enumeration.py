"""Computes exact expectations of losses by enumerating all completions of a small world.

There are two prompts, a vocabulary of 3 (token 0 is EOS) and at most 3 tokens, so each prompt has
15 completions. The policy is a table of logits with a row for each prompt and context (7 contexts).
It can represent every distribution over completions, and every expectation is a finite sum.

Groups are enumerated as multisets. All losses are invariant to the order of the completions in a
group, so the orders of a multiset share one term, weighted by their number (the multinomial
coefficient). `test_unbiased.py` compares this with a sum over ordered groups. Use float64
(`jax_enable_x64`).
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
  """Returns every completion once, padded with EOS after its first EOS."""
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
  """Returns logits that look random and are the same on every platform: a sine of the index."""
  count = PROMPTS * len(_PREFIXES) * VOCAB
  logits = np.sin(1.7 * np.arange(count) ** 1.3 + phase).reshape(PROMPTS, len(_PREFIXES), VOCAB)
  return scale * logits + eos * np.eye(VOCAB)[EOS]


POLICY = table(0.0, 1.2, 0.4)
REFERENCE = POLICY + table(1.0, 0.8)
SHIFT = table(2.0)  # the sampling policy is POLICY - distance * SHIFT


def _content(row: np.ndarray, mask: np.ndarray) -> tuple[int, ...]:
  return tuple(int(token) for token in row[mask] if token != EOS)


_CONTENTS = [_content(row, mask) for row, mask in zip(TOKENS, MASK)]
# Prompt 0 is easy (any completion with a 1 in it), prompt 1 is hard (two completions).
CORRECT = np.array([[1 in c for c in _CONTENTS], [c in ((2,), (1, 2)) for c in _CONTENTS]], float)
# A score between 0 and 1, like that of a reward model.
STYLE = np.round(0.5 + 0.5 * np.sin(2.3 * np.arange(CORRECT.size)), 2).reshape(CORRECT.shape)
REWARDS = CORRECT + 0.5 * STYLE


def logps(theta: Float[Array, "P X V"]) -> Float[Array, "P C T"]:
  """Returns the log-probability of each token of each completion; 0 where masked."""
  tokens = jnp.broadcast_to(TOKENS, (theta.shape[0], *TOKENS.shape))
  mask = completion_mask(tokens, EOS)
  return jnp.where(mask, token_logprobs(theta[:, CONTEXT], tokens)[0], 0.0)


def probabilities(theta: Float[Array, "P X V"]) -> Float[Array, "P C"]:
  """Returns the probability of each completion; they sum to 1 for each prompt."""
  return jnp.exp(logps(theta).sum(-1))


def expected_reward(theta: Float[Array, "P X V"], rewards: Float[Array, "P C"]) -> Array:
  """Returns `mean over prompts of sum_c pi(c) r(c)`, the objective of reinforcement learning."""
  return (probabilities(theta) * rewards).sum(-1).mean()


def sequence_kl(theta: Float[Array, "P X V"], reference: Float[Array, "P X V"]) -> Array:
  """Returns `mean over prompts of sum_c pi(c) log(pi(c) / ref(c))` in nats per completion."""
  gap = (logps(theta) - logps(reference)).sum(-1)
  return (probabilities(theta) * gap).sum(-1).mean()


def context_kl(
  theta: Float[Array, "P X V"],
  reference: Float[Array, "P X V"],
  visits: Float[Array, "P X V"],
  forward: bool = False,
) -> Array:
  """Returns the expected KL(pi || ref), or KL(ref || pi), over the contexts visited by `visits`.

  At `visits = theta` the value equals `sequence_kl`. The gradient differs: the distribution of
  contexts does not depend on `theta` here, so the effect of a token on the KL of later tokens is
  left out.
  """
  # Probability of reaching the context before token t.
  reach = jnp.exp(jnp.cumsum(logps(visits), -1) - logps(visits))
  reach = jnp.where(MASK, reach, 0.0)
  # Completions share contexts: count each context once, by its probability.
  visited = jnp.zeros(theta.shape[:2]).at[:, CONTEXT].max(reach)
  p, q = jax.nn.log_softmax(theta), jax.nn.log_softmax(reference)
  if forward:
    p, q = q, p
  return (visited * (jnp.exp(p) * (p - q)).sum(-1)).sum(-1).mean()


class Groups(NamedTuple):
  """Holds all batches of one group per prompt, and the number of orders of each batch."""

  ids: Int[np.ndarray, "B P G"]
  count: Float[np.ndarray, "B"]


@functools.cache
def list_groups(prompts: int, size: int) -> Groups:
  """Returns all batches of `prompts` groups of `size` completions."""
  multisets = np.array(list(itertools.combinations_with_replacement(range(len(TOKENS)), size)))
  orders = [math.factorial(size) / _repeats(row) for row in multisets]
  indices = np.array(list(itertools.product(range(len(multisets)), repeat=prompts)))
  return Groups(multisets[indices], np.array(orders)[indices].prod(-1))


def _repeats(row: np.ndarray) -> int:
  """Returns the number of permutations that leave the row unchanged."""
  return math.prod(math.factorial(n) for n in np.bincount(row))


class Expected(NamedTuple):
  """Holds expectations over batches: loss, metrics, and gradient with respect to `theta`."""

  loss: float
  metrics: dict[str, float]
  gradient: Float[np.ndarray, "P X V"]


def expectation(
  loss: Callable[..., tuple[Array, dict[str, Array]]], groups: Groups, *, compiled: bool = False
) -> Callable[..., Expected]:
  """Returns a function `(theta, sampler=theta, *data) -> Expected` over batches from `sampler`.

  Args:
    loss: `loss(logp, drawn_logp, ids, *data)` of one batch: log-probabilities under `theta` and
      under `sampler` [P, G, T], the indices of its completions [P, G], and its slice of each array
      of `data` (leading axis B). As in training, JAX differentiates it with respect to `logp`; the
      chain rule then gives the expected gradient with respect to `theta`.
    groups: all batches, from `list_groups`.
    compiled: compiles the expectation. Affects only the duration, and is worth it if no other
      expectation has the shapes of `groups`.
  """
  prompts = np.arange(groups.ids.shape[1])[:, None]
  # Many batches are split into slices that fit the cache; few are evaluated without compilation.
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
  """Holds the decomposition `gradient = scale * true + rest`.

  `bias = |rest| / |scale * true|` is the part that no learning rate can correct. 0 means unbiased
  up to `scale`.
  """

  scale: float
  cosine: float
  bias: float


def compare(gradient: np.ndarray, true: np.ndarray) -> Comparison:
  """Returns scale, cosine and relative bias. A gradient of 0 has scale 0 and otherwise NaN."""
  scale = float((gradient * true).sum() / (true**2).sum())
  size = float(np.linalg.norm(gradient))
  if size < 1e-12 * np.linalg.norm(true):
    return Comparison(0.0, math.nan, math.nan)
  rest = float(np.linalg.norm(gradient - scale * true))
  along = abs(scale) * float(np.linalg.norm(true))
  return Comparison(
    scale, float((gradient * true).sum()) / size / float(np.linalg.norm(true)), rest / along
  )
