"""Builds one optimizer step: `(state, batch) -> (state, metrics)`.

The model is an argument, as `models.protocol.Model` describes it. A model whose arrays are split
over devices may also have `vocab_shards`, `prompt_shards` and `token_shards`, the number of shards
of its head, of its prompts and of the tokens of its rows, as `models.decoder.Decoder` does; they
decide what is exchanged, not the result.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from grpo_jax.core.algorithms import Algorithm, lookup_algorithm
from grpo_jax.core.corrections import effective_sample_size
from grpo_jax.core.divergences import head_divergence
from grpo_jax.core.logprobs import head_logprobs
from grpo_jax.core.losses import policy_loss
from grpo_jax.core.masks import masked_mean
from grpo_jax.core.values import value_loss
from grpo_jax.distributed.mesh import Jitted, layout_of
from grpo_jax.learning import deterministic
from grpo_jax.learning.balance import balance_loss, router_sums, tokens_read, with_balance
from grpo_jax.learning.batch import Batch
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.learning.entropy import EntropyControl
from grpo_jax.learning.reduction import combine, make_gradient, map_micro_batches
from grpo_jax.learning.skipping import SKIPPED, History, accept_update
from grpo_jax.models.protocol import Model, Params, score_of

# (base parameters, trained parameters) -> all parameters of the model
WithAdapters = Callable[[Params, Params], Params]


def only_trained(base_params: Params, params: Params) -> Params:
  """Returns `params`: the `WithAdapters` of a model that is trained as a whole."""
  return params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that training changes.

  Attributes:
    step: number of accepted updates.
    params: trained parameters: all parameters of the model, or its adapters.
    opt_state: state of the optimizer.
    reference: parameters of a reference that moves (`move_reference`) or is kept here; None
      without one.
    history: statistics of past updates; None if they are not recorded.
    critic: the same of a critic, which has an optimizer of its own; None without one.
    entropy: coefficient of an adaptive entropy bonus; None without one.
    counts: completions and right ones of each training problem, [n, 2], in NumPy; no update reads
      them. None without a curriculum.
  """

  step: jax.Array
  params: Params
  opt_state: Any
  reference: Params = None
  history: History | None = None
  critic: "TrainState | None" = None
  entropy: EntropyControl | None = None
  counts: Any = None

  @classmethod
  def create(
    cls,
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    algorithm: Algorithm | str | None = None,
    reference: Params = None,
    critic: "TrainState | None" = None,
    copy: bool = True,
  ) -> "TrainState":
    """Returns the state before the first update.

    A step overwrites the arrays of the state it is given. The state therefore gets its own copies
    of `params` and `reference`, and the arrays passed here stay valid. The optimizer state takes
    the sharding of the parameters it belongs to; everything else is replicated.

    Args:
      params: trained parameters.
      algorithm: the row that is trained with; needed where its entropy bonus adapts.
      reference: parameters of the reference for a KL term, often `params` itself.
      critic: state of a critic, taken over as it is.
      copy: False takes over the arrays of `params`, which the first step then deletes. It saves
        the memory of one copy of the parameters.

    Example:
      >>> params = {"w": jnp.ones(2)}
      >>> state = TrainState.create(params, optax.adam(0.1), reference=params)
      >>> int(state.step), state.reference["w"] is params["w"]
      (0, False)
    """

    def own(tree: Params) -> Params:
      return jax.tree.map(jnp.copy, tree)

    fresh = partial(_fresh, optimizer, algorithm)
    shapes = cls.shapes(params, optimizer, algorithm=algorithm)
    rest = (shapes.step, shapes.opt_state, shapes.history, shapes.entropy)
    step, opt_state, history, entropy = jax.jit(fresh, out_shardings=layout_of(rest))(params)
    reference = None if reference is None else own(reference)
    params = own(params) if copy else params
    return _committed(cls(step, params, opt_state, reference, history, critic, entropy))

  @classmethod
  def shapes(
    cls,
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    algorithm: Algorithm | str | None = None,
    reference: Params = None,
  ) -> "TrainState":
    """Returns the shapes, dtypes and shardings of what `create` returns, without any array.

    Args:
      params, reference: arrays, or `jax.ShapeDtypeStruct`s with a sharding.
      algorithm: as in `create`.
    """
    fresh = partial(_fresh, optimizer, algorithm)
    step, opt_state, history, entropy = _laid_out_like(params, jax.eval_shape(fresh, params))
    return cls(step, params, opt_state, reference, history, entropy=entropy)

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields that are not None by name, as plain dicts: what a checkpoint holds."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in _RECORDS:
      if name in fields:
        fields[name] = vars(fields[name])
    if self.critic is not None:
      fields["critic"] = self.critic.to_dict()
    return fields

  @classmethod
  def from_dict(cls, tree: dict[str, Any]) -> "TrainState":
    """Returns the state whose `to_dict` is `tree`; a missing optional field is None."""
    fields = {name: kind(**tree[name]) for name, kind in _RECORDS.items() if name in tree}
    if "critic" in tree:
      fields["critic"] = cls.from_dict(tree["critic"])
    return cls(**{**tree, **fields})


_RECORDS = {"history": History, "entropy": EntropyControl}


def _fresh(
  optimizer: optax.GradientTransformation, algorithm: Algorithm | str | None, params: Params
) -> tuple:
  """Returns step, optimizer state, history and entropy control before the first update."""
  # Copied: some optimizers keep the parameters, and one array must not be donated twice.
  opt_state = jax.tree.map(jnp.copy, optimizer.init(params))
  entropy = None if algorithm is None else EntropyControl.new(lookup_algorithm(algorithm))
  return jnp.int32(0), opt_state, History.new(), entropy


def _committed(state: TrainState) -> TrainState:
  """Commits a state on one device to it, as a step does: its programs compile once, not twice."""
  devices = {
    device
    for leaf in jax.tree.leaves(state)
    if isinstance(getattr(leaf, "sharding", None), SingleDeviceSharding)
    for device in leaf.sharding.device_set
  }
  return jax.device_put(state, devices.pop()) if len(devices) == 1 else state


def _laid_out_like(params: Params, tree: Any) -> Any:
  """Returns shapes with the sharding of the parameter at the end of their path.

  A leaf with no parameter of the same path and shape is replicated over the mesh. Without a mesh,
  the sharding of all leaves is open.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  shardings = {(path, leaf.shape): layout_of(leaf) for path, leaf in leaves}
  mesh = next((s.mesh for s in shardings.values() if s is not None), None)

  def one(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
    ends = ((path[i:], leaf.shape) for i in range(len(path) + 1))
    sharding = next((shardings[end] for end in ends if end in shardings), None)
    if sharding is None and mesh is not None:
      sharding = NamedSharding(mesh, P())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(one, tree)


@dataclasses.dataclass(frozen=True)
class ValueHead:
  """Describes a critic that shares the policy's trunk: `params["score"]`, beside the policy's head.

  It learns in the loss of the policy, whose gradient with respect to the trunk it changes.

  Attributes:
    weight: coefficient of its loss in the policy's, c1 of arXiv 1707.06347, eq. 9.
    clip: largest change of a value that counts in an update, in reward units; None disables it.
  """

  weight: float = 0.5
  clip: float | None = None


def clipped_value_loss(
  values: Float[Array, "P G T"], batch: Batch, clip: float | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the loss of values with the weights of the policy's tokens; `clip` as in `Critic`."""
  old = batch.values if clip is not None else None
  return value_loss(
    values, batch.returns, batch.mask, old_values=old, clip=clip, weights=batch.weights
  )


def values_of(
  params: Params, hidden: Float[Array, "P G T D"], batch: Batch
) -> Float[Array, "P G T"]:
  """Returns the values at hidden states, in reward units; 0 where `batch.mask` is false.

  Args:
    params: `score` [1, D], the value head, is read.
  """
  return jnp.where(batch.mask, score_of(params, hidden), 0.0)


def score_batch(
  model: Model, params: Params, batch: Batch, temperature: float | None = None
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
  """Returns (log-probability, entropy) of each completion token, in nats.

  Both are of the distribution at the sampling temperature, and 0 where `batch.mask` is false.

  Args:
    temperature: the sampling temperature; None takes `batch.temperature`.

  Raises:
    ValueError: the temperature is unknown, or it is not the one that the batch was sampled at.
  """
  options, rows = _head_options(model, batch, temperature), RowOrder.of(model, batch)
  hidden = rows.split(_hidden(model, params, batch))
  found = head_logprobs(hidden, model.head(params), rows.split(batch.completions), **options)
  return tuple(map(rows.join, found))


def _hidden(model: Model, params: Params, batch: Batch) -> Float[Array, "P G T D"]:
  return _scores(model.score, params, batch)


def _scores(score: Callable, params: Params, batch: Batch) -> Any:
  """Calls `Model.score`, or a method with its arguments, with the routes of the batch if any."""
  rows = (batch.prompts, batch.prompt_mask, batch.completions)
  if batch.routes is None:
    return score(params, *rows)
  return score(params, *rows, routes=(batch.prompt_routes, batch.routes))


@dataclasses.dataclass(frozen=True)
class RowOrder:
  """Orders the rows of the head as the devices hold them, so that each computes its own.

  Attributes:
    shape: (P, G, T) of the batch.
    prompts, tokens: number of shards along P, which divides it, and along T.
  """

  shape: tuple[int, int, int]
  prompts: int
  tokens: int

  @classmethod
  def of(cls, model: Model, batch: Batch) -> "RowOrder":
    """Returns the order for a model and a batch."""
    # Micro-batches that do not divide evenly over the devices are left to the partitioner.
    prompts = math.gcd(getattr(model, "prompt_shards", 1), len(batch.prompts))
    return cls(batch.mask.shape, prompts, getattr(model, "token_shards", 1))

  def split(self, x: Shaped[Array, "P G T ..."]) -> Shaped[Array, "..."]:
    """Returns [p, t, P / p, G, T / t, ...] with T padded; with one token shard the array itself."""
    if self.tokens == 1:
      return x
    (count, group, length), rest = self.shape, x.shape[3:]
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -length % self.tokens), *((0, 0) for _ in rest)])
    x = x.reshape(self.prompts, count // self.prompts, group, self.tokens, -1, *rest)
    return jnp.moveaxis(x, 3, 1)

  def join(self, x: Shaped[Array, "..."]) -> Shaped[Array, "P G T"]:
    """Undoes `split`, for one number per token."""
    if self.tokens == 1:
      return x
    return jnp.moveaxis(x, 1, 3).reshape(*self.shape[:2], -1)[:, :, : self.shape[2]]


def _head_options(model: Model, batch: Batch, temperature: float | None) -> dict[str, Any]:
  """Returns the keyword arguments of `head_logprobs` and `head_divergence`."""
  rows = RowOrder.of(model, batch)
  return {
    "temperature": _temperature_of(batch, temperature),
    "where": rows.split(batch.mask),
    "softcap": model.config.softcap,
    "vocab_shards": getattr(model, "vocab_shards", 1),
    "row_shards": rows.prompts * rows.tokens,
  }


def _temperature_of(batch: Batch, temperature: float | None) -> float:
  """Returns the temperature to score a batch at."""
  if temperature is None and batch.temperature is None:
    raise ValueError("the sampling temperature is unknown: give Batch(temperature=) what it was")
  if temperature is None:
    return batch.temperature
  if batch.temperature is not None and batch.temperature != temperature:
    raise ValueError(
      f"temperature is {temperature}, but the batch was sampled at {batch.temperature}: the policy "
      "that is scored must be the one that was sampled. Leave out temperature to take the batch's"
    )
  return temperature


def make_score(
  model: Model,
  *,
  temperature: float | None = None,
  micro_batches: int = 1,
  sort_by_length: bool = False,
  with_adapters: WithAdapters = only_trained,
  chunks: Chunks | None = None,
) -> Callable[..., Float[Array, "P G T"]]:
  """Returns the jitted log-probs `(params, batch, base_params=None) -> logp`.

  They are those of a reference, or of the parameters before several updates.

  Args:
    temperature: the sampling temperature; None takes `batch.temperature`. If both are known and
      differ, tracing raises a ValueError.
    micro_batches: number of equal parts of the prompts that are computed one after another;
      changes memory, not the result.
    sort_by_length: as in `reduction.make_gradient`.
    with_adapters: combines base and trained parameters into the model's.
    chunks: computes in these instead; see `deterministic`.
  """

  def logp(params: Params, batch: Batch, base_params: Params):
    return score_batch(model, with_adapters(base_params, params), batch, temperature)[0]

  options = {"micro_batches": micro_batches, "sort_by_length": sort_by_length}
  return make_per_token(logp, **options, chunks=chunks)


def make_per_token(
  function: Callable[..., Float[Array, "P G T"]],
  *,
  micro_batches: int = 1,
  sort_by_length: bool = False,
  chunks: Chunks | None = None,
) -> Callable[..., Float[Array, "P G T"]]:
  """Returns `(params, batch, base_params=None) -> function(...)`, jitted, part by part.

  Args:
    function: `(params, batch, base_params)` -> a number per token; each prompt depends on itself
      alone.
    micro_batches, sort_by_length, chunks: as in `make_score`.
  """
  if chunks:
    return deterministic.make_score(function, chunks)

  def call(params: Params, batch: Batch, base_params: Params = None):
    compute = partial(function, params, base_params=base_params)
    return map_micro_batches(compute, batch, micro_batches, sort_by_length=sort_by_length)

  return Jitted(call, lambda params, batch, base_params=None: layout_of(batch.mask))


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def move_reference(state: TrainState, share: float) -> TrainState:
  """Moves the reference to `share * params + (1 - share) * reference`; the state is donated.

  A share of 1 copies the parameters, as iterative GRPO does. TRL mixes.

  References:
    DeepSeekMath, arXiv 2402.03300, algorithm 1.
  """
  moved = jax.tree.map(
    lambda new, old: share * new + (1 - share) * old, state.params, state.reference
  )
  return dataclasses.replace(state, reference=moved)


def make_loss(
  model: Model,
  algorithm: Algorithm | str,
  *,
  temperature: float | None = None,
  with_adapters: WithAdapters = only_trained,
  teachers: Sequence[Model] = (),
  value_head: ValueHead | None = None,
  balance: float = 0.0,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Returns the loss `(params, batch, base_params) -> (loss, metrics)`.

  The losses of the micro-batches of a batch add up to its loss.

  Args:
    temperature, with_adapters, teachers, value_head, balance: as in `make_train_step`. With a
      `balance`, the batch must have been through `fill_of(model, balance)` before it was split.
  """
  row = lookup_algorithm(algorithm)

  def loss(params: Params, batch: Batch, base_params: Params):
    teacher_params = ()
    if teachers:
      base_params, teacher_params = base_params
    params = with_adapters(base_params, params)
    sums = None
    if has_experts(model):
      real = tokens_read(batch)
      score = partial(
        model.score_with_routing, summarize=lambda r: router_sums(r.probs, r.experts, real)
      )
      hidden, sums = _scores(score, params, batch)
    else:
      hidden = _hidden(model, params, batch)
    head, divergence = model.head(params), None
    options, rows = _head_options(model, batch, temperature), RowOrder.of(model, batch)
    mine, tokens = rows.split(hidden), rows.split(batch.completions)
    logp, entropy = map(rows.join, head_logprobs(mine, head, tokens, **options))
    divergences = [
      head_divergence(
        mine,
        head,
        rows.split(_hidden(teacher, weights, batch)),
        teacher.head(weights),
        beta=row.teacher_divergence,
        teacher_softcap=teacher.config.softcap,
        **options,
      )
      for teacher, weights in zip(teachers, teacher_params, strict=True)
    ]
    if divergences:
      divergence = rows.join(sum(divergences) / len(divergences))
    coef = batch.entropy_coef
    total, metrics = policy_loss(
      row,
      logp,
      batch.advantages,
      batch.mask,
      old_logp=batch.old_logp,
      ref_logp=batch.ref_logp,
      sampler_logp=batch.sampler_logp,
      teacher_logp=batch.teacher_logp,
      divergence=divergence,
      entropy=entropy if row.needs_entropy else None,
      entropy_coef=None if coef is None else coef[:, None, None],
      weights=batch.weights,
      nll_weights=batch.nll_weights,
    )
    if batch.staleness is not None:
      metrics |= staleness_metrics(batch, logp)
    if sums is not None:
      own, more = balance_loss(sums, batch)
      total, metrics = total if own is None else total + balance * own, metrics | more
    if value_head is not None:
      values = values_of(params, hidden, batch)
      own, more = clipped_value_loss(values, batch, value_head.clip)
      total, metrics = total + value_head.weight * own, metrics | more
    return total, metrics

  return loss


def has_experts(model: Model) -> bool:
  """Tells whether a model is a mixture of experts that gives its routing."""
  return bool(getattr(model.config, "experts", 0)) and hasattr(model, "score_with_routing")


def fill_of(model: Model, balance: float) -> Callable[[Batch], Batch]:
  """Returns the function that gives a whole batch what a loss with this `balance` needs.

  Raises:
    ValueError: there is a coefficient, and the model is not a mixture of experts.
  """
  if not balance:
    return lambda batch: batch
  if not has_experts(model):
    raise ValueError(
      f"balance is {balance}, and the model is not a mixture of experts: set it to 0"
    )
  c = model.config
  return jax.jit(partial(with_balance, layers=c.layers, experts=c.experts))


# Metrics of a rollout whose parameters are not those before the updates.
STALENESS = ("sampling/staleness", "sampling/effective_sample_size")


def staleness_metrics(batch: Batch, logp: Float[Array, "P G T"]) -> dict[str, jax.Array]:
  """Returns the mean age of the tokens in steps, and the effective sample size of the batch.

  Args:
    batch: with `staleness`.
    logp: log-probs under the policy before the updates, unless the batch has them.
  """
  now = jax.lax.stop_gradient(logp) if batch.old_logp is None else batch.old_logp
  ages = batch.staleness if batch.staleness.ndim == 3 else batch.staleness[:, None, None]
  ages = jnp.broadcast_to(ages, batch.mask.shape)
  share = effective_sample_size(now - batch.sampler_logp, batch.mask)
  return dict(zip(STALENESS, (masked_mean(ages, batch.mask), share)))


def make_train_step(
  model: Model,
  algorithm: Algorithm | str,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule | None = None,
  *,
  temperature: float | None = None,
  micro_batches: int = 1,
  sort_by_length: bool = False,
  spike: float = 0.0,
  with_adapters: WithAdapters = only_trained,
  teachers: Sequence[Model] = (),
  value_head: ValueHead | None = None,
  balance: float = 0.0,
  chunks: Chunks | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the jitted step `(state, batch, base_params=None) -> (state, metrics)`.

  The state is donated: its arrays are overwritten. The new state has the sharding of the old one,
  so each batch size compiles once.

  The loss is a sum over tokens, with weights computed for the whole rollout, so the number of
  micro-batches changes memory and nothing else. With one update per rollout, the log-probs of this
  forward pass are also the old ones. With several, `batch.old_logp` holds them.

  An update whose loss or gradient norm is NaN or infinite is skipped: step, parameters and
  optimizer state stay bit for bit as they are, and the metric `update/skipped` is 1.

  Args:
    algorithm: a row of `ALGORITHMS`, or its name.
    schedule: learning rate by step, for the metric `learning_rate`; None leaves it out.
    temperature: the sampling temperature; None takes `batch.temperature`. If both are known and
      differ, tracing the step raises a ValueError.
    micro_batches: number of gradient accumulation steps.
    sort_by_length: as in `reduction.make_gradient`.
    spike: also skip an update whose gradient norm exceeds `spike` times its running mean, after
      `WARM_UP` accepted updates; needs `state.history`. 0 disables.
    with_adapters: combines base and trained parameters into the model's.
    teachers: models of the teachers of a row with a `teacher_divergence`, whose mean enters the
      loss. The third argument is then `(base_params, [parameters of each teacher])`.
    value_head: a critic on the policy's trunk, whose `values` and `returns` the batch holds.
    balance: coefficient of the load-balance loss of a mixture of experts, see `balance`. 0: none.
    chunks: computes the gradient in these instead of in micro-batches, so that the new state has
      the same bits on any number of devices; see `deterministic`.
  """
  options = {"with_adapters": with_adapters, "teachers": teachers, "value_head": value_head}
  loss = make_loss(model, algorithm, temperature=temperature, balance=balance, **options)
  return make_step(
    loss,
    optimizer,
    schedule,
    micro_batches=micro_batches,
    sort_by_length=sort_by_length,
    spike=spike,
    chunks=chunks,
    algorithm=lookup_algorithm(algorithm),
    fill=fill_of(model, balance),
  )


def make_step(
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule | None = None,
  *,
  micro_batches: int = 1,
  sort_by_length: bool = False,
  spike: float = 0.0,
  chunks: Chunks | None = None,
  algorithm: Algorithm | None = None,
  fill: Callable[[Batch], Batch] = lambda batch: batch,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the jitted step `(state, batch, base_params=None) -> (state, metrics)` of any loss.

  Args:
    loss: `(params, batch, base_params) -> (loss, metrics)`; the losses of the micro-batches of a
      batch add up to its loss.
    optimizer, schedule, micro_batches, sort_by_length, spike, chunks: as in `make_train_step`.
    algorithm: the row of a policy's loss, whose entropy bonus may adapt; None for other losses.
    fill: adds to the whole batch what the loss of each of its micro-batches needs.
  """
  apply = make_apply(optimizer, schedule, spike, algorithm)
  if chunks:
    return _in_chunks(deterministic.make_gradient(loss, chunks), apply, fill)
  gradient = make_gradient(loss, micro_batches, sort_by_length=sort_by_length)

  def step(state: TrainState, batch: Batch, base_params: Params = None):
    batch = fill(with_entropy_coef(state, batch))
    return apply(state, *gradient(state.params, batch, base_params))

  def outputs(state: TrainState, batch: Batch, base_params: Params = None) -> Any:
    return layout_of(state), None

  return Jitted(step, outputs, donate_argnums=0)


def _in_chunks(gradient: Callable, apply: Callable, fill: Callable[[Batch], Batch]) -> Callable:
  """Returns a step of two programs: in one, XLA would fuse the optimizer into the gradient."""

  def finish(state: TrainState, grads: Any, losses: Any, metrics: dict, tokens: Any):
    shares = tokens / jnp.maximum(tokens.sum(), 1)
    return apply(state, grads, losses.sum(), combine(metrics, shares))

  finish = Jitted(finish, lambda state, *_: (layout_of(state), None), donate_argnums=0)

  def step(state: TrainState, batch: Batch, base_params: Params = None):
    batch = fill(with_entropy_coef(state, batch))
    return finish(state, *gradient(state.params, batch, base_params))

  return step


def with_entropy_coef(state: TrainState, batch: Batch) -> Batch:
  """Returns the batch with the coefficient of an adaptive entropy bonus, if the state has one."""
  if state.entropy is None:
    return batch
  coef = _per_prompt(state.entropy.coef, batch.mask.shape[0])
  return dataclasses.replace(batch, entropy_coef=coef)


@partial(jax.jit, static_argnums=1)
def _per_prompt(number: jax.Array, prompts: int) -> Float[Array, "P"]:
  return jnp.broadcast_to(number, prompts)


def make_apply(
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule | None,
  spike: float,
  algorithm: Algorithm | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the optimizer's part of a step: `(state, grads, loss, metrics) -> (state, metrics)`."""

  def apply(state: TrainState, grads: Any, loss: jax.Array, metrics: dict[str, jax.Array]):
    norm = optax.tree.norm(grads)
    accept, history = accept_update(state.history, loss, norm, spike)

    def update(step: Any, params: Any, opt_state: Any):
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return step + 1, optax.apply_updates(params, updates), opt_state

    # A branch, not `where`: the new state is written over the old one.
    old = (state.step, state.params, state.opt_state)
    step, params, opt_state = jax.lax.cond(accept, update, lambda *old: old, *old)
    entropy = state.entropy
    if entropy is not None:
      entropy = entropy.after(algorithm, metrics["entropy"], accept)
    metrics |= {"loss": loss, "grad_norm": norm, SKIPPED: 1.0 - accept}
    if schedule is not None:
      metrics["learning_rate"] = jnp.asarray(schedule(state.step))
    new = {"step": step, "params": params, "opt_state": opt_state}
    return dataclasses.replace(state, **new, history=history, entropy=entropy), metrics

  return apply
