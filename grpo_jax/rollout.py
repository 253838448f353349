"""Examples -> completions -> rewards -> a batch: the seam between host and device.

Besides `metrics.py`, arrays cross between host and device here and nowhere else.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax import sampling
from grpo_jax.core.advantages import ADVANTAGES
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.masks import token_weights
from grpo_jax.core.types import lookup
from grpo_jax.metrics import rollout_metrics
from grpo_jax.tasks.base import Example, Task, score
from grpo_jax.tokens import AnyTokenizer, decode_completions, encode_prompt, encode_prompts
from grpo_jax.train_step import Batch


@dataclasses.dataclass(frozen=True)
class Generated:
  """Completions of some prompts, as numbers and as text. Arrays are on the host.

  Attributes:
    prompts, prompt_mask: [P, N].
    tokens, mask, logp, entropy: [P, G, T].
    texts: [P][G], without the ending token and stop string.
  """

  prompts: Int[np.ndarray, "P N"]
  prompt_mask: Bool[np.ndarray, "P N"]
  tokens: Int[np.ndarray, "P G T"]
  mask: Bool[np.ndarray, "P G T"]
  logp: Float[np.ndarray, "P G T"]
  entropy: Float[np.ndarray, "P G T"]
  texts: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A model and a tokenizer, ready to complete prompts.

  Attributes:
    prompt_length, completion_length: tokens; every batch is padded to them, so one program does.
    stop: strings that end a completion, besides the tokenizer's own end of text.
    prompt_sharding: layout of arrays whose first axis is prompts; None = the default device.
  """

  model: Any
  tokenizer: AnyTokenizer
  prompt_length: int
  completion_length: int
  stop: tuple[str, ...] = ()
  prompt_sharding: Any = None

  def __post_init__(self) -> None:
    jitted = jax.jit(self._generate, static_argnames="temperature")
    object.__setattr__(self, "_jitted", jitted)
    object.__setattr__(self, "stop_ids", stop_ids(self.tokenizer, self.stop))

  def __call__(
    self,
    params: Any,
    prompts: Sequence[Any],
    key: jax.Array,
    *,
    group: int,
    temperature: float,
    first_prompt: int = 0,
  ) -> Generated:
    """G completions for each prompt; `first_prompt` is the number of the first of them.

    A completion's random stream is (key, prompt number, sample number): cutting the prompts of a
    step into several calls with the right `first_prompt` changes nothing.
    """
    tokens, mask, _ = encode_prompts(self.tokenizer, prompts, self.prompt_length)
    ids = jax.device_put(first_prompt + np.arange(len(tokens)), self.prompt_sharding)
    keys = _row_keys(key, ids, group)
    on_device = jax.device_put((tokens, mask), self.prompt_sharding)
    out = jax.device_get(self._jitted(params, *on_device, keys, temperature=temperature))
    texts = decode_completions(self.tokenizer, out.tokens, out.mask, stop=self.stop)
    return Generated(tokens, mask, out.tokens, out.mask, out.logp, out.entropy, texts)

  def _generate(self, params, prompts, mask, keys, *, temperature):
    return sampling.generate(
      self.model,
      params,
      prompts,
      mask,
      keys,
      jnp.asarray(self.stop_ids),
      length=self.completion_length,
      temperature=temperature,
      pad_id=self.tokenizer.pad_id,
    )


_row_keys = jax.jit(sampling.row_keys, static_argnums=2)


def stop_ids(tokenizer: AnyTokenizer, stop: Sequence[str]) -> np.ndarray:
  """Every id that ends a completion: the end of text, and each token that contains a stop string.

  Raises ValueError for a stop string that no single token contains.
  """
  ids = set(tokenizer.eos_ids)
  for text in stop:
    containing = tokenizer.ids_containing(text)
    if not containing:
      raise ValueError(
        f"stop string {text!r} is in no single token of {tokenizer.name}; "
        "use a shorter one, such as its last character"
      )
    ids.update(containing)
  return np.array(sorted(ids), np.int32)


@dataclasses.dataclass(frozen=True)
class Rollout:
  """A batch to learn from, and what to write down about it.

  Attributes:
    batch: on the device.
    rewards: [P, G], NaN where not scored.
    per_name: rewards of each function, [P, G].
    accuracy: [P, G], 1.0 where right by the task's strict rule.
    lengths: [P, G], tokens, the ending token included.
    truncated: [P, G], completions that ran into the budget.
    entropy: nats per token, of the distributions the tokens were drawn from.
    num_tokens: prompt tokens (each prompt once) and completion tokens.
    samples: one dict a completion.
  """

  batch: Batch
  rewards: Float[np.ndarray, "P G"]
  per_name: dict[str, Float[np.ndarray, "P G"]]
  accuracy: Float[np.ndarray, "P G"]
  lengths: Int[np.ndarray, "P G"]
  truncated: Bool[np.ndarray, "P G"]
  entropy: float
  num_tokens: int
  samples: list[dict[str, Any]]

  def metrics(self) -> dict[str, float]:
    """Rewards, accuracy and lengths under their usual names."""
    measured = rollout_metrics(self.rewards, self.per_name, self.lengths, self.truncated)
    return measured | {"accuracy": float(self.accuracy.mean()), "entropy": self.entropy}


def collect(
  sampler: Sampler,
  params: Any,
  task: Task,
  examples: Sequence[Example],
  key: jax.Array,
  *,
  group: int,
  temperature: float,
  algorithm: Algorithm,
  bucket: int,
) -> Rollout:
  """Samples G completions of each example, scores them and turns rewards into advantages.

  Prompts whose advantages are all 0 have no gradient. Where there is no KL term to give them one,
  they are left out of the batch, which is then filled up to a multiple of `bucket` prompts with
  empty ones: the update costs less and is the same, because the token weights are made before.
  """
  prompts = [example.prompt for example in examples]
  out = sampler(params, prompts, key, group=group, temperature=temperature)
  columns = columns_of(examples)
  rewards, per_name = score(task.rewards, prompts, out.texts, columns)
  right = accuracy(task, prompts, out.texts, columns)
  advantages, weights = jax.device_get(
    _advantages_and_weights(rewards.astype(np.float32), out.mask, algorithm, out.mask.shape[-1])
  )
  batch = Batch(
    prompts=out.prompts,
    prompt_mask=out.prompt_mask,
    completions=out.tokens,
    mask=out.mask,
    advantages=advantages,
    weights=weights,
    sampler_logp=out.logp,
  )
  if algorithm.beta == 0:
    batch = select(batch, np.flatnonzero((advantages != 0).any(-1)), bucket)
  lengths = out.mask.sum(-1)
  return Rollout(
    batch=jax.device_put(batch, sampler.prompt_sharding),
    rewards=rewards,
    per_name=per_name,
    accuracy=right,
    lengths=lengths,
    truncated=~ended(out, sampler),
    entropy=float(out.entropy.sum() / lengths.sum()),
    num_tokens=int(out.prompt_mask.sum() + lengths.sum()),
    samples=records(prompts, out.texts, reward=rewards, accuracy=right, length=lengths),
  )


@partial(jax.jit, static_argnames=("algorithm", "max_length"))
def _advantages_and_weights(rewards, mask, algorithm: Algorithm, max_length: int):
  advantages = lookup("advantage", ADVANTAGES, algorithm.advantage)(rewards)
  return advantages, token_weights(mask, algorithm.average, max_length=max_length)


def select(batch: Batch, rows: np.ndarray, bucket: int) -> Batch:
  """Those prompts of a batch, filled up with empty ones to a multiple of `bucket`, at least one.

  An empty prompt is a copy of the first, with nothing unmasked in its completions.
  """
  size = bucket * max(-(-len(rows) // bucket), 1)
  chosen = np.concatenate([rows, np.zeros(size - len(rows), np.int64)])
  real = (np.arange(size) < len(rows))[:, None, None]
  batch = jax.tree.map(lambda a: a[chosen], batch)
  return dataclasses.replace(
    batch, mask=batch.mask & real, weights=np.where(real, batch.weights, 0.0)
  )


def ended(out: Generated, sampler: Sampler) -> Bool[np.ndarray, "P G"]:
  """Completions that stopped by themselves; the others ran into the budget."""
  return (np.isin(out.tokens, sampler.stop_ids) & out.mask).any(-1)


def accuracy(
  task: Task, prompts: Sequence[Any], texts: Sequence[Sequence[str]], columns: dict[str, list[Any]]
) -> Float[np.ndarray, "P G"]:
  """1.0 where a completion is right, by the task's strict rule."""
  return score({"accuracy": (task.accuracy, 1.0)}, prompts, texts, columns)[0]


def records(
  prompts: Sequence[Any], texts: Sequence[Sequence[str]], **arrays: np.ndarray
) -> list[dict[str, Any]]:
  """One dict per completion: prompt, completion, and its entry of each [P, G] array."""
  return [
    {"prompt": prompt, "completion": text}
    | {name: array[p, g].item() for name, array in arrays.items()}
    for p, prompt in enumerate(prompts)
    for g, text in enumerate(texts[p])
  ]


def columns_of(examples: Sequence[Example]) -> dict[str, list[Any]]:
  """Columns of all examples by name; one that an example lacks is None there."""
  names = dict.fromkeys(name for example in examples for name in example.columns)
  return {name: [example.columns.get(name) for example in examples] for name in names}


def fitting(
  tokenizer: AnyTokenizer, split: Sequence[Example], max_length: int, overlong: str
) -> tuple[list[Example], int]:
  """The examples whose prompts have at most `max_length` tokens (0 = any), and that length.

  With overlong="error" a longer prompt raises; with "drop" a warning counts those left out. For
  `max_length=0` the second result is the longest prompt's length.
  """
  prompts = [example.prompt for example in split]
  if max_length == 0:
    return list(split), max((len(encode_prompt(tokenizer, p)) for p in prompts), default=0)
  _, _, kept = encode_prompts(tokenizer, prompts, max_length, overlong)
  return [split[i] for i in kept], max_length
