"""Implements an independent decoder: one unpadded row at a time, no cache, no shared prompt."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnums=0)
def hidden_states(config, params, ids):
  """Returns the final hidden states [S, D] of one unpadded row of token ids."""
  c = config
  layers = params["layers"]
  x = params["embed"][jnp.asarray(ids)]
  half = c.head_dim // 2
  positions = jnp.arange(len(ids))
  freqs = jnp.array([c.rope_theta ** (-2.0 * i / c.head_dim) for i in range(half)])
  cos, sin = jnp.cos(jnp.outer(positions, freqs)), jnp.sin(jnp.outer(positions, freqs))

  def norm(x, w):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * w

  def rope(h):  # [S, Dh]
    a, b = h[:, :half], h[:, half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

  for i in range(c.layers):
    w = {name: value[i] for name, value in layers.items()}
    h = norm(x, w["attn_norm"][None])
    q, k, v = h @ w["q"], h @ w["k"], h @ w["v"]
    outs = []
    for head in range(c.heads):
      kv = head // (c.heads // c.kv_heads)
      query_columns = slice(head * c.head_dim, (head + 1) * c.head_dim)
      key_columns = slice(kv * c.head_dim, (kv + 1) * c.head_dim)
      scores = rope(q[:, query_columns]) @ rope(k[:, key_columns]).T / c.head_dim**0.5
      scores = jnp.where(jnp.tril(jnp.ones_like(scores)) > 0, scores, -jnp.inf)
      outs.append(jax.nn.softmax(scores, axis=-1) @ v[:, key_columns])
    x = x + jnp.concatenate(outs, axis=1) @ w["o"]
    h = norm(x, w["mlp_norm"][None])
    gate = h @ w["gate"]
    x = x + (gate * jax.nn.sigmoid(gate) * (h @ w["up"])) @ w["down"]
  return norm(x, params["final_norm"][None])


def completion_logprobs(config, params, prompt, completion, temperature=1.0):
  """Returns the log-probability [len(completion)] of each token of one completion."""
  ids = [int(t) for t in prompt] + [int(t) for t in completion]
  head = params["embed" if config.tied else "head"]
  logits = hidden_states(config, params, ids)[len(prompt) - 1 : -1] @ head.T / temperature
  logps = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  return logps[jnp.arange(len(completion)), jnp.asarray(completion)]
