"""Lists the mutants that no test can notice, with the reasons."""

_AT_ZERO = "advantages of 0 give an objective of 0 either way"

# "file: line": {"change": reason}; "#3" at the end is the third place in that line.
EXPLAINED: dict[str, dict[str, str]] = {
  "advantages.py: count = jnp.maximum(where.sum(axis, keepdims=True), 1)": {
    "1 -> 2": "relative to the smallest of their group, fewer than two rewards sum up to 0",
  },
  "advantages.py: return jnp.sqrt(jnp.where(variance > 0, variance, 1.0))": {
    "1.0 -> 2": "divides values that are all 0, or so small that their squares are",
  },
  "advantages.py: "
  "mean = rewards.sum(-1, keepdims=True) / jnp.maximum(scored.sum(-1, keepdims=True), 1) #3": {
    "1 -> 2": "divides, in the end, the centered reward of a group with fewer than two: 0",
  },
  "tiles.py: TILE_ELEMENTS = 2**22": {
    "2 -> -2": "the same number",
  },
  "logprobs.py: "
  "entropy = -jnp.sum(jnp.exp(logps) * jnp.where(jnp.isneginf(logps), 0.0, logps), axis=-1)": {
    "0.0 -> 1": "multiplied by a probability of 0",
  },
  "tiles.py: flat = jnp.where(rows[:, None], flat, 0.0)": {
    "0.0 -> 1": "results of these rows are replaced, their cotangents are 0; it has to be finite",
  },
  "divergences.py: total = total * jnp.exp(jnp.where(total > 0, top - base, 0.0))": {
    "total > 0 -> total >= 0": "scales sums that are still 0",
    "0.0 -> 1": "scales sums that are still 0; it has to be finite",
  },
  "divergences.py: "
  "total = (total * jnp.exp(jnp.where(total > 0, tops - finite_top(top)[..., None], 0.0))).sum(": {
    "total > 0 -> total >= 0": "scales sums that are 0",
    "0.0 -> 1": "scales sums that are 0; it has to be finite",
  },
  "divergences.py: d_z = weight * jnp.where(p > 0, p * (logp - mixed - of_policy), 0.0)": {
    "p > 0 -> p >= 0": "0 times a finite number; with a logit of -inf there is no gradient anyway",
  },
  "log_ratios.py: both[name] = jnp.where(mask, value, 0.0)": {
    "0.0 -> 1": "the penalty of a masked slot is replaced; it has to be finite",
  },
  "values.py: rewards = jax.lax.stop_gradient(jnp.where(own, rewards, 0.0))": {
    "0.0 -> 1": "what is made of it is replaced where it is masked; it has to be finite",
  },
  "values.py: values = jax.lax.stop_gradient(jnp.where(mask, values, 0.0))": {
    "0.0 -> 1": "what is made of it is replaced where it is masked; it has to be finite",
  },
  "values.py: variance = (centered**2).sum() / jnp.maximum(count_tokens(own) - 1, 1) #2": {
    "1 -> 0": "with a single token the sum is 0, and 0 / 0 is not above 0 either",
  },
  "values.py: return centered / (jnp.sqrt(jnp.where(variance > 0, variance, 1.0)) + eps)": {
    "variance > 0 -> variance >= 0": "divides values that are all 0",
    "1.0 -> 2": "divides values that are all 0",
    "1.0 -> 0": "divides values that are all 0",
  },
  "values.py: return jax.lax.stop_gradient(jnp.where(mask, value, 0.0))": {
    "0.0 -> 1": "the errors of masked slots are replaced; it has to be finite",
  },
  "values.py: values = jnp.where(mask, values, 0.0)": {
    "0.0 -> 1": "the errors of masked slots are replaced; it has to be finite",
  },
  "values.py: error = jnp.where(clipped, jax.lax.stop_gradient((held - returns) ** 2), error)": {
    "jax.lax.stop_gradient((held - returns) ** 2) -> (held - returns) ** 2": "a value that is held "
    "at a bound has no gradient",
  },
  "values.py: return jnp.take_along_axis(jnp.pad(values, padding), after, axis=-1)": {
    "jnp.take_along_axis(jnp.pad(values, padding), after, axis=-1) -> "
    "jnp.take_along_axis(jnp.pad(values, padding), after)": "the default of jax, not of NumPy",
  },
  "logprobs.py: shift = jnp.where(total > 0, top - base, 0.0)": {
    "0.0 -> 1": "scales sums that are still 0; it has to be finite",
  },
  "preferences.py: "
  'margin = 0.0 if margin is None else jnp.where(real, constant("margin", margin), 0.0) #2': {
    "0.0 -> 1": "of pairs of weight 0, whose loss is replaced; it has to be finite",
  },
  "preferences.py: "
  "chosen, rejected = (jnp.where(real, rewards, 0.0) for rewards in (chosen, rejected))": {
    "0.0 -> 1": "of pairs of weight 0, whose loss is replaced; it has to be finite",
  },
  "trust_regions.py: tau = jnp.where(advantages > 0, tau_positive, tau_negative)": {
    "advantages > 0 -> advantages >= 0": _AT_ZERO,
  },
}
