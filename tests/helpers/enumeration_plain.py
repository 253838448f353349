"""Computes the world of `enumeration.py` a second time, in plain NumPy.

It shares only the arrays of logits and rewards, and the list of batches, with `enumeration.py`, and
nothing with the library. It lists completions by walking the tree and takes advantages and
derivatives from the papers. It differentiates by hand (`d log softmax = onehot - p`) or by central
differences.
"""

import numpy as np

from tests.helpers import enumeration as world

CONTEXTS = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
BUDGET = 3


def walk(prefix=()):
  """Yields the completions in lexical order; 0 ends a completion."""
  for token in (0, 1, 2):
    if token == 0 or len(prefix) == BUDGET - 1:
      yield (*prefix, token)
    else:
      yield from walk((*prefix, token))


COMPLETIONS = list(walk())
LENGTH = np.array([len(c) for c in COMPLETIONS])


def softmax(theta):
  """Returns the softmax over the last axis."""
  e = np.exp(theta)
  return e / e.sum(-1, keepdims=True)


def logps(theta):
  """Returns the log-probs [P, C, T] of logits [P, X, V]; 0 after the end."""
  p = softmax(theta)
  out = np.zeros((len(theta), len(COMPLETIONS), BUDGET))
  for c, completion in enumerate(COMPLETIONS):
    for t, token in enumerate(completion):
      out[:, c, t] = np.log(p[:, CONTEXTS.index(completion[:t]), token])
  return out


def probabilities(theta):
  """Returns the probability [P, C] of each completion."""
  return np.exp(logps(theta).sum(-1))


def pull(coefficients, theta):
  """Returns `sum_ct coefficient[p, c, t] d logp[p, c, t] / d theta`, by `d logp = onehot - p`."""
  p = softmax(theta)
  out = np.zeros_like(theta)
  for c, completion in enumerate(COMPLETIONS):
    for t, token in enumerate(completion):
      x = CONTEXTS.index(completion[:t])
      slope = np.eye(3)[token] - p[:, x]
      out[:, x] += coefficients[:, c, t, None] * slope
  return out


def difference(function, theta, step=1e-5):
  """Returns the gradient of a scalar function by central differences."""
  out = np.zeros_like(theta)
  for i in np.ndindex(theta.shape):
    up, down = theta.copy(), theta.copy()
    up[i] += step
    down[i] -= step
    out[i] = (function(up) - function(down)) / (2 * step)
  return out


def context_kl(theta, reference, visits, forward=False):
  """Returns the KL at each context, weighted by the probability that `visits` reaches it."""
  total = 0.0
  for prefix in CONTEXTS:
    x = CONTEXTS.index(prefix)
    visited = np.ones(len(theta))
    for t in range(len(prefix)):
      visited = visited * softmax(visits)[:, CONTEXTS.index(prefix[:t]), prefix[t]]
    p, q = softmax(theta)[:, x], softmax(reference)[:, x]
    p, q = (q, p) if forward else (p, q)
    total = total + visited * (p * np.log(p / q)).sum(-1)
  return total.mean()


def kl(theta, reference):
  """Returns the mean KL of whole completions, in nats."""
  p, q = probabilities(theta), probabilities(reference)
  return (p * np.log(p / q)).sum(-1).mean()


def reward(theta, rewards=world.REWARDS):
  """Returns the expected reward, averaged over prompts."""
  return (probabilities(theta) * rewards).sum(-1).mean()


# --- advantages and averages, on-policy ----------------------------------------------------------


def over_tokens(x, lengths, ddof=0):
  """Returns values [B, P, G] whitened over the tokens of each batch; 0 for equal ones.

  The variance divides by the number of tokens less `ddof`.
  """
  axes = {"axis": (-2, -1), "keepdims": True}
  share = lengths / lengths.sum(**axes)
  centered = x - (share * x).sum(**axes)
  tokens = lengths.sum(**axes)
  std = np.sqrt((share * centered**2).sum(**axes) * tokens / (tokens - ddof))
  return np.where(std > 1e-12, centered / (std + 1e-8), 0.0)


def advantages(name, r, lengths):
  """Returns the advantages [B, P, G] of rewards [B, P, G], by the formulas of the papers."""
  centered = r - r.mean(-1, keepdims=True)
  n = r.shape[-1]
  over_batch = {"axis": (-2, -1), "keepdims": True, "ddof": 1}
  return {
    "group_centered": lambda: centered,
    "leave_one_out": lambda: r - (r.sum(-1, keepdims=True) - r) / (n - 1),
    "group_normalized": lambda: centered / (r.std(-1, keepdims=True, ddof=1) + 1e-4),
    "batch_normalized": lambda: centered / (r.std(**over_batch) + 1e-4),
    "batch_whitened": lambda: centered / (centered.std(**over_batch) + 1e-4),
    "max_rl": lambda: centered / r.mean(-1, keepdims=True),
    "token_whitened": lambda: over_tokens(r, lengths),
    "returns_whitened": lambda: over_tokens(r, lengths, ddof=1),
    "centered_token_whitened": lambda: over_tokens(centered, lengths),
    "right_only": lambda: 1.0 * (r > 0.5),
  }[name]()


def gradient(name, average, size):
  """Returns the policy gradient over all batches of two groups of `size`, times the budget."""
  ids, count = world.list_groups(2, size)
  drawn = count * probabilities(world.POLICY)[[[0], [1]], ids].prod((-1, -2))
  if name == "multi_objective":
    parts = [np.asarray(x)[[[0], [1]], ids] for x in (world.CORRECT, world.STYLE)]
    total = sum(w * advantages("group_normalized", x, None) for w, x in zip((1.0, 0.5), parts))
    a = total / (total.std((-2, -1), keepdims=True, ddof=1) + 1e-4)
  else:
    a = advantages(name, world.REWARDS[[[0], [1]], ids], LENGTH[ids])
  lengths = LENGTH[ids]
  weights = {
    "sequence": 1 / (2 * size * lengths),
    "token": np.broadcast_to(1 / lengths.sum((-2, -1), keepdims=True), ids.shape),
    "constant": np.full(ids.shape, 1 / (2 * size * BUDGET)),
    "prompt": np.broadcast_to(1 / (2 * lengths.sum(-1, keepdims=True)), ids.shape),
  }[average]
  terms = drawn[:, None, None] * a * weights
  by_completion = [np.bincount(ids[:, p].ravel(), terms[:, p].ravel(), 15) for p in range(2)]
  return BUDGET * pull(on_each_token(by_completion), world.POLICY)


def on_each_token(by_completion):
  """Repeats a value per completion [P, C] on each token [P, C, T]."""
  return np.repeat(np.asarray(by_completion)[:, :, None], BUDGET, -1)


def reward_gradient():
  """Returns the gradient of the expected reward."""
  p = probabilities(world.POLICY)
  return pull(on_each_token(p * world.REWARDS / 2), world.POLICY)


# --- a critic -------------------------------------------------------------------------------------


def exact_values():
  """Returns the expected reward at each context, by recursion from the longest one, [P, X]."""
  p, out = softmax(world.POLICY), np.zeros((2, len(CONTEXTS)))
  for x in reversed(range(len(CONTEXTS))):
    for token in (0, 1, 2):
      longer = (*CONTEXTS[x], token)
      ends = token == 0 or len(longer) == BUDGET
      after = (
        world.REWARDS[:, COMPLETIONS.index(longer)] if ends else out[:, CONTEXTS.index(longer)]
      )
      out[:, x] += p[:, x, token] * after
  return out


def gae(values, lam):
  """Returns `sum_k lam^k delta_(t+k)` of each token, [P, C, T]; `values` is [P, C, T]."""
  out = np.zeros_like(values)
  for c, completion in enumerate(COMPLETIONS):
    n = len(completion)
    for t in range(n):
      for k in range(t, n):
        after = values[:, c, k + 1] if k + 1 < n else world.REWARDS[:, c]
        out[:, c, t] += lam ** (k - t) * (after - values[:, c, k])
  return out


def critic_gradient(values, lam):
  """Returns the expected update with the advantages of a critic, times the budget."""
  drawn = probabilities(world.POLICY)[:, :, None] / 2
  return pull(drawn * gae(values, lam), world.POLICY)


def whitened_gradient(values, lam, average, size=2):
  """Returns the same with advantages whitened over the tokens of all batches of `size`."""
  ids, count = world.list_groups(2, size)
  drawn = count * probabilities(world.POLICY)[[[0], [1]], ids].prod((-1, -2))
  a = gae(values, lam)[[[0], [1]], ids]
  inside = np.arange(BUDGET) < LENGTH[ids][..., None]
  n = inside.sum((1, 2, 3), keepdims=True)
  mean = np.where(inside, a, 0.0).sum((1, 2, 3), keepdims=True) / n
  deviation = np.where(inside, a - mean, 0.0)
  white = deviation / (np.sqrt((deviation**2).sum((1, 2, 3), keepdims=True) / (n - 1)) + 1e-8)
  weights = np.where(inside, 1 / n, 0.0) if average == "token" else inside / (2 * size * BUDGET)
  terms = drawn[:, None, None, None] * white * weights
  coefficients = np.zeros((2, 15, BUDGET))
  for prompt in range(2):
    np.add.at(coefficients[prompt], ids[:, prompt].ravel(), terms[:, prompt].reshape(-1, BUDGET))
  return BUDGET * pull(coefficients, world.POLICY)


# --- KL ------------------------------------------------------------------------------------------

# d estimate / d logp of a sampled token, D = logp - ref_logp, ratio = exp(logp - drawn logp).
KL_SLOPES = {
  "k1": lambda D, ratio: np.ones_like(D),
  "k2": lambda D, ratio: D,
  "k3": lambda D, ratio: 1 - np.exp(-D),
  "k3_k2_gradient": lambda D, ratio: D,
  "k3_ratio": lambda D, ratio: ratio * D,
}
KL_VALUES = {
  "k1": lambda D, ratio: D,
  "k2": lambda D, ratio: D**2 / 2,
  "k3": lambda D, ratio: np.exp(-D) + D - 1,
  "k3_k2_gradient": lambda D, ratio: np.exp(-D) + D - 1,
  "k3_ratio": lambda D, ratio: ratio * (np.exp(-D) + D - 1),
}


def later_gradient(values, discount, average):
  """Returns the policy gradient of the discounted sum of later values [P, C, T], on-policy.

  It is that of one completion per prompt, times the budget.
  """
  total = np.zeros((2, len(COMPLETIONS), BUDGET))
  for c, completion in enumerate(COMPLETIONS):
    for t in range(len(completion)):
      for k in range(t, len(completion)):
        total[:, c, t] += discount ** (k - t) * values[:, c, k]
  weights = BUDGET / LENGTH[:, None] if average == "sequence" else 1.0
  return pull(probabilities(world.POLICY)[..., None] / 2 * weights * total, world.POLICY)


# --- completions of another policy ---------------------------------------------------------------


def inside_clip(ratio, a, low, high):
  """Returns where the clipped objective has a gradient."""
  return ~((ratio < 1 - low) & (a < 0)) & ~((ratio > 1 + high) & (a > 0))


def sigmoid_slope(x):
  """Returns the derivative of the sigmoid."""
  return np.exp(-x) / (1 + np.exp(-x)) ** 2


def sapo_slope(t):
  """Returns the derivative of the SAPO objective with respect to logp."""
  return 4 * sigmoid_slope(np.where(t.a > 0, 1.0, 1.05) * (t.ratio - 1)) * t.ratio * t.a


def within(x, low, high):
  """Returns x inside the bounds and 0 outside."""
  return np.where((x >= low) & (x <= high), x, 0.0)


class Tokens:
  """Holds the quantities of completion i in a group with completion j, for all pairs.

  Attributes:
    ratio: token ratio.
    product: ratio of the whole completion.
    mean: geometric mean of the token ratios.
    a: advantage r_i - r_j.
    moved: change in the probability of the token.
    pair: probability of the pair (i, j).
  """

  def __init__(self, prompt, old):
    logp, old_logp = logps(world.POLICY)[prompt], logps(old)[prompt]
    gap = (logp - old_logp)[:, None, :]
    self.ratio, self.product = np.exp(gap), np.exp(gap.sum(-1, keepdims=True))
    self.mean = np.exp(gap.sum(-1, keepdims=True) / LENGTH[:, None, None])
    self.a = (world.REWARDS[prompt][:, None] - world.REWARDS[prompt])[..., None]
    self.moved = (np.exp(logp) - np.exp(old_logp))[:, None, :]
    self.pair = np.multiply.outer(*[probabilities(old)[prompt]] * 2)


# d objective / d logp of a token, derived by hand.
SLOPES = {
  "no ratio (old_logp=None)": lambda t: t.a,
  "product of token ratios": lambda t: t.product * t.a,
  "token ratio": lambda t: t.ratio * t.a,
  "sequence ratio (GSPO)": lambda t: t.mean * t.a,
  "clip 0.2 / 0.2 (PPO, GRPO)": lambda t: inside_clip(t.ratio, t.a, 0.2, 0.2) * t.ratio * t.a,
  "clip 0.2 / 0.28 (DAPO)": lambda t: inside_clip(t.ratio, t.a, 0.2, 0.28) * t.ratio * t.a,
  "dual clip 3": lambda t: (
    inside_clip(t.ratio, t.a, 0.2, 0.2) * ((t.ratio < 3) | (t.a > 0)) * t.ratio * t.a
  ),
  "CISPO 0 to 5": lambda t: np.clip(t.ratio, 0, 5) * t.a,
  "CISPO 0.8 to 1.2": lambda t: np.clip(t.ratio, 0.8, 1.2) * t.a,
  "SAPO 1 / 1.05": sapo_slope,
  "DPPO-TV 0.15": lambda t: (t.moved * np.sign(t.a) <= 0.15) * t.ratio * t.a,
}
CORRECTION_SLOPES = {
  "none": lambda t: t.a,
  "token_truncate at 2": lambda t: np.minimum(t.ratio, 2) * t.a,
  "token_mask 0.5 to 2": lambda t: within(t.ratio, 0.5, 2) * t.a,
  "sequence_mask 0.5 to 2": lambda t: within(t.product, 0.5, 2) * t.a,
  "sequence_mask, no bounds": lambda t: t.product * t.a,
  "geometric_mask 0.8 to 1.25": lambda t: (t.mean >= 0.8) * (t.mean <= 1.25) * t.a,
  "geometric_mask, then token_truncate at 2": lambda t: (
    (t.mean >= 0.8) * (t.mean <= 1.25) * np.minimum(t.ratio, 2) * t.a
  ),
  "off_policy_mask 0.1": lambda t: ((np.log(t.mean) >= -0.1) | (t.a >= 0)) * t.a,
}


def off_policy(slope, distance):
  """Returns the expected gradient on completions of the policy at `distance`, groups of 2."""
  return off_policy_of(slope, world.POLICY - distance * world.SHIFT)


def off_policy_of(slope, old):
  """Returns the expected gradient on completions of the policy with logits `old`, groups of 2."""
  tokens = [Tokens(prompt, old) for prompt in range(2)]
  slopes = [np.broadcast_to(slope(t), (15, 15, BUDGET)) for t in tokens]
  coefficients = [(t.pair[..., None] * s).sum(1) / 2 for t, s in zip(tokens, slopes)]
  return pull(np.array(coefficients), world.POLICY)
