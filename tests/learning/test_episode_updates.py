"""Tests updates of episodes: observations lie between the policy's tokens, and are never targets.

Every slot that is not the policy's holds NaN in the recorded log-probs, weights and advantages. The
expected values come from elsewhere: the decoder of `helpers.plain`, one row per episode, gives the
log-probs of the policy's tokens, which are written one after another, without gaps; the loss is
written out from the papers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.core.corrections import CORRECTIONS
from grpo_jax.core.kl import KLS
from grpo_jax.core.losses import policy_loss
from grpo_jax.core.masks import AVERAGES, token_weights
from grpo_jax.distributed import mesh as meshes
from grpo_jax.learning.batch import Batch, mini_batches, select, trim
from grpo_jax.learning.deterministic import Chunks
from grpo_jax.learning.step import TrainState, make_train_step, score_batch
from grpo_jax.learning.updates import Learner, UpdateConfig
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder
from tests.helpers import plain
from tests.helpers.learning import CONFIG, MODEL, assert_trees_close

P, G, N, T, WIDTH, BUDGET = 8, 3, 4, 13, 9, 20
TEMPERATURE, RATE = 0.7, 0.1
ROWS = P * G


def episodes():
  """Returns whether each token is the policy's, and whether it is a token at all, [P, G, T].

  An episode has one to three turns of one to three tokens, and observations of one or two between
  them. The last one was truncated, and none of its tokens is in the loss.
  """
  rng = np.random.default_rng(0)
  own, attended = np.zeros((2, ROWS, T), bool)
  for i in range(ROWS):
    runs = []
    for turn in range(rng.integers(1, 4)):
      runs += [False] * rng.integers(1, 3) * (turn > 0) + [True] * rng.integers(1, 4)
    own[i, : len(runs)], attended[i, : len(runs)] = runs, True
  own[-1] = False
  return own.reshape(P, G, T), attended.reshape(P, G, T)


OWN, ATTENDED = episodes()
PLACES = np.argsort(~OWN.reshape(ROWS, T), axis=1, kind="stable")[:, :WIDTH]  # of the policy
REAL = np.arange(WIDTH) < OWN.reshape(ROWS, T).sum(1)[:, None]


def without_gaps(array):
  """Returns the policy's tokens of each row one after another, [P, G, T] -> [rows, WIDTH]."""
  return np.take_along_axis(np.asarray(array).reshape(ROWS, T), PLACES, 1)


def with_gaps(array, fill=np.nan):
  """Does the reverse; slots of observations and padding hold `fill`."""
  rows = np.full((ROWS, T), fill, np.float32)
  for row, place, real, values in zip(rows, PLACES, REAL, np.asarray(array)):
    row[place[real]] = values[real]
  return jnp.asarray(rows.reshape(P, G, T))


def test_the_batch_has_observations_between_turns():
  turns = (np.diff(np.pad(OWN, [(0, 0), (0, 0), (1, 0)]).astype(int)) == 1).sum(-1)
  assert set(turns.ravel()) == {0, 1, 2, 3}
  assert OWN.sum() + 20 < ATTENDED.sum()
  assert ATTENDED[..., -1].any() or ATTENDED.sum(-1).max() > T - 3


# --- the expected values --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
  params = MODEL.init(jax.random.key(0))
  return params | {"embed": params["embed"] * 2}


def tokens():
  rng = np.random.default_rng(1)
  prompt_mask = np.arange(N) >= rng.integers(0, 3, (P, 1))
  return rng.integers(0, 19, (P, N)), prompt_mask, rng.integers(0, 19, (P, G, T))


def policy_logprobs(params, completions=None):
  """Returns the log-probs of the policy's tokens under the plain decoder, [rows, WIDTH]."""
  prompts, prompt_mask, own = tokens()
  completions = own if completions is None else completions
  rows = np.zeros((ROWS, N + T), int)
  starts = np.repeat(prompt_mask.sum(1), G)
  for i, (p, g) in enumerate(np.ndindex(P, G)):  # padding comes last: a causal row never sees it
    row = [*prompts[p][prompt_mask[p]], *completions[p, g]]
    rows[i, : len(row)] = row
  hidden = jax.vmap(lambda row: plain.hidden_states(CONFIG, params, row))(rows)
  logps = jax.nn.log_softmax(hidden @ params["embed"].T / TEMPERATURE)
  at = np.arange(ROWS)[:, None], starts[:, None] - 1 + PLACES
  return logps[*at, rows[at[0], at[1] + 1]]


@jax.jit
def plain_gradient(params, cotangent):
  """Returns the log-probs, and the gradient of their product with `cotangent`."""
  logp, pull = jax.vjp(policy_logprobs, params)
  return logp, pull(cotangent)[0]


@pytest.fixture(scope="module")
def logp(params):
  return plain_gradient(params, jnp.zeros((ROWS, WIDTH)))[0]


def noise(seed, scale=0.3):
  return np.random.default_rng(seed).normal(0, scale, (ROWS, WIDTH))


ADVANTAGES = np.random.default_rng(9).normal(size=(P, G)).astype(np.float32)
PER_ROW = ADVANTAGES.reshape(ROWS, 1)
PER_TOKEN = noise(8, 1.0).astype(np.float32)


def recorded(logp):
  """Returns old, sampler, reference and teacher log-probs, all different from `logp`."""
  old = logp + noise(2)
  others = {"ref": logp + noise(4), "teacher": logp + noise(5)}
  return {"old": old, "sampler": old + noise(3), **others}


def later_penalties(penalty):
  """Returns the sum from each slot on, minus the mean of that of the others of its group there."""
  slots = np.asarray(with_gaps(penalty, fill=0))
  total = np.cumsum(slots[..., ::-1], -1)[..., ::-1]
  others = (total.sum(1, keepdims=True) - total) / (G - 1)
  return without_gaps(total - others)


def paper_loss(a, logp, advantages, old, sampler, ref, teacher):
  """Returns the loss of an algorithm over rows without gaps, from the formulas of the papers."""
  lengths = REAL.sum(1, keepdims=True)
  constant = jax.lax.stop_gradient

  def mean(x):
    return jnp.where(REAL, x, 0).sum(1, keepdims=True) / np.maximum(lengths, 1)

  if a.penalizes == "advantages":  # RLOO, eq. 3
    advantages = advantages - a.beta * later_penalties(old - ref)
  advantages = advantages + a.teacher_weight * (teacher - old)
  anchor = sampler if a.anchor == "sampler" else old
  ratio, log_mean = jnp.exp(logp - anchor), mean(logp - anchor)
  if a.ratio == "sequence":  # GSPO, eq. 7
    ratio = jnp.exp(log_mean) + jnp.zeros_like(logp)
  if a.ratio == "sequence_token":  # GSPO, eq. 14
    ratio = jnp.exp(constant(log_mean)) * jnp.exp(logp - constant(logp))
  if a.trust_region == "none":
    objective = ratio * advantages
  elif a.trust_region in ("clip", "dual_clip"):
    clipped = jnp.clip(ratio, 1 - a.clip_low, 1 + a.clip_high)
    objective = jnp.minimum(ratio * advantages, clipped * advantages)
    if a.trust_region == "dual_clip":
      floor = jnp.maximum(objective, a.clip_dual * advantages)
      objective = jnp.where(advantages < 0, floor, objective)
  elif a.trust_region == "cispo":
    objective = constant(jnp.clip(ratio, a.ratio_min, a.ratio_max)) * advantages * logp
  elif a.trust_region == "sapo":
    tau = jnp.where(advantages > 0, a.tau_positive, a.tau_negative)
    objective = 4 / tau / (1 + jnp.exp(-tau * (ratio - 1))) * advantages
  elif a.trust_region == "dppo_tv":
    change = jnp.exp(constant(logp)) - jnp.exp(anchor)
    moved = jnp.where(advantages > 0, change > a.divergence, change < -a.divergence)
    weight = jnp.where(moved, 0.0, jnp.minimum(constant(ratio), a.ratio_max))
    objective = weight * advantages * logp
  between = jnp.exp(old - sampler)
  if a.correction == "token_truncate":
    objective = objective * jnp.minimum(between, a.correction_max)
  elif a.correction == "geometric_mask":
    between = jnp.exp(mean(old - sampler))
    inside = (between >= a.geometric_min) & (between <= a.geometric_max)
    objective = jnp.where(inside, objective, 0)
  elif a.correction == "off_policy_mask":
    far = mean(sampler - constant(logp)) > a.off_policy_max
    objective = jnp.where(far & (advantages < 0), 0, objective)
  elif a.correction != "none":
    if a.correction == "sequence_mask":
      between = jnp.prod(jnp.where(REAL, between, 1), 1, keepdims=True)
    inside = (between >= a.correction_min) & (between <= a.correction_max)
    objective = objective * jnp.where(inside, between, 0)
  d = logp - ref
  k3 = jnp.exp(-d) + d - 1
  kl = {
    "none": 0.0, "k1": d, "k2": d**2 / 2, "k3": k3,
    "k3_k2_gradient": constant(k3) + d**2 / 2 - constant(d**2 / 2),
    "k3_ratio": k3 * jnp.exp(logp - anchor),
  }[a.kl]  # fmt: skip
  penalty = a.sampler_penalty * (logp - sampler) ** 2
  if a.kl_in == "loss":
    penalty = penalty + a.beta * kl
  of_group = np.repeat(lengths.reshape(P, G).sum(1), G)[:, None]
  weights = {
    "sequence": 1 / (ROWS * np.maximum(lengths, 1)), "token": 1 / REAL.sum(),
    "constant": 1 / (ROWS * BUDGET),
    "prompt": 1 / (P * of_group),
  }[a.average]  # fmt: skip
  return -jnp.where(REAL, weights * (objective - penalty), 0).sum()


# --- the loss -------------------------------------------------------------------------------------

BOUNDS = {"correction_min": 0.7, "correction_max": 1.5}
CASES = {
  **ALGORITHMS,
  "dual clip": dataclasses.replace(ALGORITHMS["dapo"], trust_region="dual_clip", clip_dual=1.3),
  **{
    f"KL {kl}": dataclasses.replace(ALGORITHMS["grpo"], kl=kl, beta=0.3)
    for kl in KLS
    if kl != "none"
  },
  **{
    name: dataclasses.replace(ALGORITHMS["dapo"], correction=name, **BOUNDS)
    for name in ("token_mask", "sequence_mask")
  },
  "geometric_mask": dataclasses.replace(
    ALGORITHMS["dapo"], correction="geometric_mask", geometric_min=0.9, geometric_max=1.1
  ),
  "off_policy_mask": dataclasses.replace(
    ALGORITHMS["dapo"], correction="off_policy_mask", off_policy_max=0.1
  ),
  "token_truncate": dataclasses.replace(
    ALGORITHMS["cispo"], correction="token_truncate", correction_max=1.2
  ),
  **{
    f"average {average}": dataclasses.replace(ALGORITHMS["sapo"], average=average)
    for average in AVERAGES
  },
}
EVERYTHING = dataclasses.replace(
  ALGORITHMS["grpo"], beta=0.3, average="token", correction="token_mask", **BOUNDS
)


def expected(algorithm, logp, advantages=PER_ROW, **others):
  """Returns the loss and its gradient in the log-probs, without gaps."""
  arrays = {**recorded(logp), **others}
  return jax.value_and_grad(lambda x: paper_loss(algorithm, x, advantages, **arrays))(logp)


def poisoned(algorithm, logp):
  """Returns the arguments of `policy_loss` with NaN wherever the policy did not write."""
  arrays = {f"{name}_logp": with_gaps(value) for name, value in recorded(logp).items()}
  weights = token_weights(jnp.asarray(OWN), algorithm.average, max_length=BUDGET)
  return {**arrays, "weights": jnp.where(OWN, weights, jnp.nan)}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_rows_without_gaps(name, per_token, logp):
  algorithm = CASES[name]
  dense = PER_TOKEN if per_token else PER_ROW
  advantages = with_gaps(PER_TOKEN) if per_token else jnp.asarray(ADVANTAGES)
  arrays = poisoned(algorithm, logp)
  loss, gradient = jax.value_and_grad(
    lambda x: policy_loss(algorithm, x, advantages, OWN, **arrays)[0]
  )(with_gaps(logp))
  value, cotangent = expected(algorithm, logp, dense)
  np.testing.assert_allclose(loss, value, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(without_gaps(gradient)[REAL], cotangent[REAL], rtol=1e-4, atol=1e-7)
  assert (np.asarray(gradient)[~OWN] == 0).all()
  assert np.abs(cotangent).max() > 1e-4


@pytest.mark.parametrize("name", ["grpo", "gspo", "dppo", "sequence_mask"])
def test_metrics_count_the_policys_tokens_alone(name, logp):
  algorithm = CASES[name]
  _, metrics = policy_loss(algorithm, with_gaps(logp), ADVANTAGES, OWN, **poisoned(algorithm, logp))
  dense = {f"{key}_logp": value for key, value in recorded(logp).items()}
  _, same = policy_loss(algorithm, logp, ADVANTAGES.reshape(-1), REAL, max_length=BUDGET, **dense)
  assert len(metrics) >= 10
  for key, value in same.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-7, err_msg=key)


def test_every_choice_has_a_case():
  for kind, table in {"kl": KLS, "correction": CORRECTIONS, "average": AVERAGES}.items():
    assert {getattr(row, kind) for row in CASES.values()} == {*table}


def test_terms_with_arrays_of_their_own_leave_observations_out(logp):
  """The entropy bonus and the likelihood of right answers, whose first gradient is by hand."""
  row = dataclasses.replace(ALGORITHMS["dapo"], entropy_bonus=0.5, nll_weight=2.0, right_above=0.5)
  right = np.arange(ROWS) % 2 == 0
  count = REAL[right].sum()
  of_right = np.where(right[:, None] & REAL, 1 / count, 0)

  def loss(x, entropy):
    arrays = poisoned(row, logp) | {"nll_weights": with_gaps(of_right)}
    return policy_loss(row, x, jnp.zeros((P, G)), OWN, entropy=entropy, **arrays)[0]

  of_logp, of_entropy = jax.grad(loss, (0, 1))(with_gaps(logp), with_gaps(jnp.abs(noise(6))))
  np.testing.assert_allclose(without_gaps(of_entropy)[REAL], -0.5 / REAL.sum(), rtol=1e-5)
  np.testing.assert_allclose(without_gaps(of_logp)[REAL], -2.0 * of_right[REAL], rtol=1e-5)
  assert (np.asarray(of_logp)[~OWN] == 0).all()
  assert (np.asarray(of_entropy)[~OWN] == 0).all()


def test_averages_by_hand():
  """Two rows of 2 and 3 tokens of the policy, with 2 observation tokens between them each."""
  mask = jnp.array([[[1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0]]], bool)
  for average, (first, second) in {
    "sequence": (1 / 4, 1 / 6), "token": (1 / 5, 1 / 5), "constant": (1 / 20, 1 / 20),
    "prompt": (1 / 5, 1 / 5),
  }.items():  # fmt: skip
    weights = token_weights(mask, average, max_length=10)
    rows = [[first, 0, 0, first, 0, 0], [second, second, 0, 0, second, 0]]
    np.testing.assert_allclose(weights[0], rows, rtol=1e-6)


# --- the gradient ---------------------------------------------------------------------------------


def make_batch(algorithm, logp, **changes):
  prompts, prompt_mask, completions = tokens()
  arrays = poisoned(algorithm, logp)
  batch = Batch(
    prompts=jnp.asarray(prompts, jnp.int32),
    prompt_mask=jnp.asarray(prompt_mask),
    completions=jnp.asarray(completions, jnp.int32),
    mask=jnp.asarray(OWN),
    advantages=jnp.asarray(ADVANTAGES),
    temperature=TEMPERATURE,
    **arrays,
  )
  return dataclasses.replace(batch, **changes)


def gradient_of(params, batch, algorithm, model=MODEL, base_params=None, **options):
  """Returns the gradient that one step of plain gradient descent shows."""
  optimizer = optax.sgd(RATE)
  state = TrainState.create(params, optimizer)
  step = make_train_step(model, algorithm, optimizer, **options)
  state, metrics = step(state, batch, base_params)
  assert not float(metrics["update/skipped"])
  return jax.tree.map(lambda old, new: (np.asarray(old) - np.asarray(new)) / RATE,
                      params, state.params)  # fmt: skip


def assert_gradients_close(result, gradient):
  assert float(optax.tree.norm(gradient)) > 0.01
  assert_trees_close(result, gradient, 1e-5 * max(1, float(optax.tree.norm(gradient))))


# The loss above is that of every row. Each step compiles: the quick tests take one row of a kind.
QUICK = ("grpo", "gspo", "sapo")
STEPS = [
  name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS
]


@pytest.mark.parametrize("name", STEPS)
def test_every_algorithm_has_the_gradient_of_plain_rows(name, params, logp):
  algorithm = ALGORITHMS[name]
  _, cotangent = expected(algorithm, logp)
  _, gradient = plain_gradient(params, cotangent)
  assert_gradients_close(gradient_of(params, make_batch(algorithm, logp), algorithm), gradient)


@pytest.fixture(scope="module")
def everything(params, logp):
  """Returns a batch for an algorithm with a KL term and a correction, and its plain gradient."""
  _, cotangent = expected(EVERYTHING, logp)
  return make_batch(EVERYTHING, logp), plain_gradient(params, cotangent)[1]


def padded(batch):
  """Returns the batch with 27 slots of padding after each row, and 12 before each prompt."""

  def wider(array):
    widths = [(0, 0)] * (array.ndim - 1) + [(12, 0) if array.ndim == 2 else (0, 27)]
    return jnp.pad(array, widths)

  arrays = {name: array for name, array in batch.arrays().items() if name != "advantages"}
  return dataclasses.replace(batch, **{name: wider(array) for name, array in arrays.items()})


def test_trimming_keeps_what_lies_behind_the_last_observation(params, everything):
  """The number of tokens that counts is that of the row, observations included."""
  batch, gradient = everything
  _, prompt_mask, _ = tokens()
  trimmed, _ = trim(padded(batch), prompt_mask.sum(1), ATTENDED.sum(-1))
  assert trimmed.mask.shape[-1] == 20
  assert int(trimmed.mask.sum()) == OWN.sum()
  assert_gradients_close(gradient_of(params, trimmed, EVERYTHING), gradient)


@pytest.mark.parametrize("micro_batches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches(params, everything, micro_batches):
  batch, gradient = everything
  result = gradient_of(params, batch, EVERYTHING, micro_batches=micro_batches)
  assert_gradients_close(result, gradient)


def test_adapters(params, logp):
  """The gradient of A in W + A B is that of W times B transposed, and likewise for B."""
  shapes = jax.eval_shape(lambda: params)
  adapters = jax.tree.map(
    lambda a: jax.random.normal(jax.random.key(a.size), a.shape) * 0.3,
    jax.eval_shape(lambda: lora.init(jax.random.key(1), shapes, "q|v|down", 2)),
  )
  pairs = {
    name: (adapters["layers"][f"{name}_lora_a"], adapters["layers"][f"{name}_lora_b"])
    for name in ("q", "v", "down")
  }
  products = {name: params["layers"][name] + a @ b for name, (a, b) in pairs.items()}
  merged = params | {"layers": params["layers"] | products}
  there, _ = plain_gradient(merged, jnp.zeros((ROWS, WIDTH)))
  assert float(jnp.abs(there - logp)[REAL].max()) > 0.1
  arrays = recorded(logp)  # of the base, as at the start of a run
  _, cotangent = jax.value_and_grad(lambda x: paper_loss(EVERYTHING, x, PER_ROW, **arrays))(there)
  whole = plain_gradient(merged, cotangent)[1]["layers"]
  gradient = {"layers": {}}
  for name, (a, b) in pairs.items():
    gradient["layers"][f"{name}_lora_a"] = whole[name] @ b.swapaxes(1, 2)
    gradient["layers"][f"{name}_lora_b"] = a.swapaxes(1, 2) @ whole[name]
  result = gradient_of(
    adapters, make_batch(EVERYTHING, logp), EVERYTHING, base_params=params,
    with_adapters=lora.with_adapters,
  )  # fmt: skip
  assert_gradients_close(result, gradient)


def on_mesh(shape):
  """Returns (mesh, model) on eight devices."""
  mesh = meshes.make_mesh(shape, jax.devices()[:8])
  model = Decoder(
    CONFIG,
    place=meshes.placer(mesh),
    vocab_shards=meshes.vocab_shards(mesh, CONFIG.vocab_size),
    prompt_shards=meshes.prompt_shards(meshes.batch_sharding(mesh)),
  )
  return mesh, model


@pytest.mark.parametrize("shape", [(4, 2, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_meshes(params, everything, shape):
  batch, gradient = everything
  mesh, model = on_mesh(shape)
  params = jax.device_put(params, meshes.param_shardings(mesh, params))
  batch = jax.device_put(batch, meshes.batch_sharding(mesh))
  assert_gradients_close(gradient_of(params, batch, EVERYTHING, model), gradient)


def test_the_deterministic_reduction(params, everything):
  """`test_deterministic` compares its bits on several widths, also with observations."""
  batch, gradient = everything
  mesh = meshes.make_mesh((8, 1, 1), jax.devices()[:8])
  params = jax.device_put(params, meshes.param_shardings(mesh, params))
  batch = jax.device_put(batch, meshes.batch_sharding(mesh))
  result = gradient_of(params, batch, EVERYTHING, chunks=Chunks(8, mesh))
  assert_gradients_close(result, gradient)


def test_prompts_without_a_gradient_are_left_out(params, logp):
  """The other prompts keep their weights; empty ones fill the batch up."""
  advantages = ADVANTAGES * (np.arange(P) % 2)[:, None]
  algorithm = dataclasses.replace(EVERYTHING, beta=0.0, kl="none")
  _, cotangent = expected(algorithm, logp, advantages.reshape(ROWS, 1))
  batch = make_batch(algorithm, logp, advantages=jnp.asarray(advantages))
  batch = select(batch, np.flatnonzero(advantages.any(1)), 3)
  assert len(batch.mask) == 6
  result = gradient_of(params, batch, algorithm)
  assert_gradients_close(result, plain_gradient(params, cotangent)[1])


def test_several_updates_of_a_rollout(params, logp):
  """Old and reference log-probs are those of the whole rows; two mini-batches are two steps.

  They are written out: the plain gradient of the rows of each half, whose weights count twice.
  """
  algorithm = EVERYTHING
  reference = jax.tree.map(lambda a: a * 1.05, params)
  ref, _ = plain_gradient(reference, jnp.zeros((ROWS, WIDTH)))
  sampler = recorded(logp)["sampler"]
  optimizer = optax.sgd(RATE)
  learner = Learner(
    MODEL, algorithm, optimizer, None, UpdateConfig(mini_batches=2, seed=5), reference=reference
  )
  batch = make_batch(algorithm, logp, old_logp=None, ref_logp=None)
  state, _ = learner(TrainState.create(params, optimizer), batch, 3)
  numbers = dataclasses.replace(batch, prompts=jnp.arange(P)[:, None])
  now = params
  for part in mini_batches(numbers, 2, 1, (5, 3)):
    rows = np.isin(np.arange(ROWS) // G, np.asarray(part.prompts))[:, None]
    here, _ = plain_gradient(now, jnp.zeros((ROWS, WIDTH)))
    _, cotangent = expected(algorithm, here, old=logp, sampler=sampler, ref=ref)
    _, gradient = plain_gradient(now, jnp.where(rows, 2 * cotangent, 0))
    now = jax.tree.map(lambda p, g: p - RATE * g, now, gradient)
  assert_trees_close(state.params, now, 5e-5)
  assert float(jnp.abs(params["embed"] - now["embed"]).max()) > 1e-3


def test_observations_are_attended_to(params, logp):
  """Others change the log-probs of the turns after them, and no others."""
  _, _, completions = tokens()
  other = np.where(ATTENDED & ~OWN, (completions + 1) % 19, completions)
  changed = np.asarray(policy_logprobs(params, other))
  after = without_gaps(np.cumsum(ATTENDED & ~OWN, -1) > 0) & REAL
  assert (np.abs(changed - logp)[after] > 1e-4).all()
  np.testing.assert_allclose(changed[REAL & ~after], logp[REAL & ~after], rtol=1e-5)
  batch = make_batch(EVERYTHING, logp)
  scored, _ = score_batch(MODEL, params, dataclasses.replace(batch, completions=jnp.asarray(other)))
  np.testing.assert_allclose(without_gaps(scored)[REAL], changed[REAL], rtol=1e-5, atol=1e-5)
  assert (np.asarray(scored)[~OWN] == 0).all()
