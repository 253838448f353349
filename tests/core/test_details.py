"""Details of core that a mutant (`mutants.py`) got past the other tests."""

import ast
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax.core import logprobs
from grpo_jax.core.advantages import ADVANTAGES
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.core.checks import as_float
from grpo_jax.core.corrections import CORRECTIONS
from grpo_jax.core.kl import kl_k3
from grpo_jax.core.masks import completion_mask, masked_mean, token_weights
from grpo_jax.core.trust_regions import TRUST_REGIONS
from tools.mutants_explained import EXPLAINED
from tools.mutations import Apply, find_mutants

NAN, INF = float("nan"), float("inf")

# --- advantages ----------------------------------------------------------------------------------


def test_max_rl_divides_by_the_mean_of_the_scored():
  got = grpo_jax.max_rl(jnp.array([[1.0, 0.0, NAN, NAN]]))
  np.testing.assert_array_equal(got, [[1.0, -1.0, 0.0, 0.0]])  # mean 1/2, not 1/4 or 3/4


@pytest.mark.parametrize("name", ADVANTAGES)
def test_constant_group_with_unscored_entries_is_exactly_zero(name):
  """The mean of seven 0.1 is not 0.1 in float32; of seven zeros it is 0."""
  rewards = jnp.array([[0.1] * 7 + [NAN], [0.1, NAN] + [0.1] * 6])
  np.testing.assert_array_equal(ADVANTAGES[name](rewards), jnp.zeros((2, 8)))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_no_nan_is_made_on_the_way(name):
  """So that `jax_debug_nans` can be on: not even one that a `where` hides."""
  rewards = jnp.array([[NAN, NAN, NAN], [NAN, 1.0, NAN], [0.5, 0.5, 0.5], [0.0, 0.0, NAN]])
  with jax.debug_nans(True):
    assert not ADVANTAGES[name](rewards).any()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_slope_in_the_rewards_is_finite_for_a_constant_group(name):
  """For rewards that are themselves computed from parameters."""
  slope = jax.jacobian(ADVANTAGES[name])(jnp.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]))
  assert jnp.isfinite(slope).all()


def test_leave_one_out_of_two():
  np.testing.assert_array_equal(grpo_jax.leave_one_out(jnp.array([[3.0, 1.0]])), [[2.0, -2.0]])


def test_eps_of_multi_objective():
  """(0, a) has std a / sqrt 2 = 1e-4 for a = sqrt 2 * 1e-4; the default eps doubles it."""
  got = grpo_jax.multi_objective(jnp.array([[[0.0, 2**0.5 * 1e-4]]]), jnp.array([1.0]))
  x = 2**0.5 / 4  # a / 2 over 2e-4, whose std is 1/2
  np.testing.assert_allclose(got, [[-x / 0.5001, x / 0.5001]], rtol=1e-5)


def test_multi_objective_counts_what_any_function_scored():
  """The second function scores 0 and 2 alike, and not 1: it adds nothing and leaves nothing out."""
  rewards = jnp.array([[[1.0, 0.0, 0.0]], [[5.0, NAN, 5.0]]])
  got = grpo_jax.multi_objective(rewards, jnp.array([1.0, 1.0]), eps=0.0)
  first = np.array([[2.0, -1.0, -1.0]]) / 3**0.5  # (2/3, -1/3, -1/3) over its std, sqrt(1/3)
  np.testing.assert_allclose(got, first, rtol=1e-6)  # std 1


def test_process_advantages_divide_by_n_minus_1_by_default():
  mask, ends = jnp.ones((1, 1, 3), bool), jnp.array([[[0, 1, 2]]])
  got = grpo_jax.process_advantages(jnp.array([[[1.0, 0.0, 0.0]]]), ends, mask, eps=0.0)
  # (2/3, -1/3, -1/3) over their std, sqrt(1/3), summed from the end
  np.testing.assert_allclose(got, [[[0.0, -2 / 3**0.5, -1 / 3**0.5]]], rtol=1e-6, atol=1e-6)


# --- algorithms ----------------------------------------------------------------------------------


def test_a_row_of_nothing_is_reinforce_with_normalized_advantages():
  row = Algorithm()
  assert (row.advantage, row.source, row.beta) == ("group_normalized", "", 0.0)
  assert Algorithm(advantage="process_advantages").advantage == "process_advantages"
  with pytest.raises(TypeError, match="positional"):
    Algorithm("group_normalized")


# --- masks ---------------------------------------------------------------------------------------


def test_no_eos_ids_at_all_end_nothing():
  np.testing.assert_array_equal(completion_mask(jnp.array([0, 1, 5]), []), [True, True, True])


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_weights_of_single_tokens(average):
  """Three sequences of one token each: 1/3, whatever the average (max_length 1)."""
  got = token_weights(jnp.ones((3, 1), bool), average, max_length=1)
  np.testing.assert_allclose(got, np.full((3, 1), 1 / 3), rtol=1e-6)


def test_a_single_token_is_its_own_mean():
  mask = jnp.array([[True, False], [False, False]])
  np.testing.assert_array_equal(token_weights(mask, "token"), [[1.0, 0.0], [0.0, 0.0]])
  assert masked_mean(jnp.array([[3.0, 9.0], [9.0, NAN]]), mask) == 3.0


# --- terms ---------------------------------------------------------------------------------------


def test_k3_on_the_straight_line(x64):
  """At -D = 21: exp(20) - 1 - 20 at the joint, and one step of its slope, exp(20) - 1."""
  e20 = 485165195.40979028
  np.testing.assert_allclose(kl_k3(jnp.array(-21.0), jnp.array(0.0)), 2 * e20 - 22, rtol=1e-13)


def _region(name, ratio, advantage, old=0.25, **settings):
  log_ratio = jnp.log(jnp.array([ratio]))
  old = jnp.log(jnp.array([old]))
  result = TRUST_REGIONS[name](log_ratio, log_ratio + old, old, jnp.array([advantage]), **settings)
  return [float(x[0]) for x in result]


@pytest.mark.parametrize("a", [0.5, -0.5])
def test_small_advantages_have_a_sign_too(a):
  """Nothing may change between an advantage of 0 and of 1: the regions ask for the sign only."""
  clip = {"clip_low": 0.25, "clip_high": 0.5}
  too_high, too_low = [2.0, a], [0.5, a]
  np.testing.assert_allclose(
    _region("clip", *too_high, **clip), [1.5 * a, 0, 1] if a > 0 else [2 * a, 0, 0]
  )
  np.testing.assert_allclose(
    _region("clip", *too_low, **clip), [0.5 * a, 0, 0] if a > 0 else [0.75 * a, 1, 0]
  )
  np.testing.assert_allclose(
    _region("dual_clip", 8.0, a, **clip, clip_dual=3.0), [1.5 * a, 0, 1] if a > 0 else [3 * a, 0, 0]
  )
  cispo = {"ratio_min": 0.75, "ratio_max": 1.5}
  logp = np.log(0.25 * 2), np.log(0.25 * 0.5)
  np.testing.assert_allclose(_region("cispo", *too_high, **cispo), [1.5 * a * logp[0], 0, a > 0])
  np.testing.assert_allclose(_region("cispo", *too_low, **cispo), [0.75 * a * logp[1], a < 0, 0])
  # At ratio 1 + 1 / tau the gate is 4 / tau * sigmoid(1).
  tau = 2.0 if a > 0 else 4.0
  gate = 4 / tau / (1 + np.exp(-1))
  got = _region("sapo", 1 + 1 / tau, a, tau_positive=2.0, tau_negative=4.0)
  np.testing.assert_allclose(got, [gate * a, 0, 0], rtol=1e-6)
  dppo = {"divergence": 0.1, "ratio_max": 9.0}
  kept_up, kept_down = 2 * a * logp[0], 0.5 * a * logp[1]
  np.testing.assert_allclose(
    _region("dppo_tv", *too_high, **dppo), [0, 0, 1] if a > 0 else [kept_up, 0, 0], rtol=1e-6
  )
  np.testing.assert_allclose(
    _region("dppo_tv", *too_low, **dppo), [kept_down, 0, 0] if a > 0 else [0, 1, 0], rtol=1e-6
  )


@pytest.mark.parametrize("a", [1.0, -1.0])
def test_a_ratio_on_the_bound_is_inside(a):
  """Ratio exactly 1, and regions that end there."""
  inside = [a * np.log(0.25), 0.0, 0.0]
  on_bound = _region("cispo", 1.0, a, ratio_min=1.0, ratio_max=1.0)
  np.testing.assert_allclose(on_bound, inside, rtol=1e-6)
  unmoved = _region("dppo_tv", 1.0, a, divergence=0.0, ratio_max=9.0)
  np.testing.assert_allclose(unmoved, inside, rtol=1e-6)
  one, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
  for name in ("token_mask", "sequence_mask"):
    for low, high in ((1.0, 2.0), (0.5, 1.0)):
      kept = CORRECTIONS[name](one, mask, correction_min=low, correction_max=high)
      np.testing.assert_array_equal(kept, jnp.ones((1, 2)))


# --- losses --------------------------------------------------------------------------------------

LOGP = jnp.log(jnp.array([[[0.5, 0.25], [0.125, 0.5]]]))
MASK = jnp.array([[[True, True], [True, False]]])
A = jnp.array([[1.0, -1.0]])


def test_metrics_carry_no_gradient():
  """A metric that is added to a loss by mistake must not train anything."""
  row = dataclasses.replace(
    grpo_jax.ALGORITHMS["grpo"], correction="token_truncate", correction_max=2.0
  )

  def metrics(logp):
    others = {"old_logp": LOGP - 0.5, "ref_logp": LOGP - 1.0, "sampler_logp": LOGP - 0.25}
    return grpo_jax.policy_loss(row, logp, A, MASK, **others)[1]

  slopes = jax.jacobian(metrics)(LOGP)
  assert {"kl", "ratio/mean", "sampling/importance_sampling_ratio/max"} <= set(slopes)
  assert not any(slope.any() for slope in slopes.values())


def test_a_reference_that_is_only_measured_cannot_break_the_loss():
  """beta = 0: an infinite KL (a token the reference excludes) is a metric, not a loss."""
  row = dataclasses.replace(grpo_jax.ALGORITHMS["grpo"], beta=0.0)
  ref = LOGP.at[0, 0, 0].set(-INF)

  def loss(logp):
    return grpo_jax.policy_loss(row, logp, A, MASK, ref_logp=ref)

  (value, metrics), slope = jax.value_and_grad(loss, has_aux=True)(LOGP)
  assert metrics["kl"] == INF
  assert value == 0  # -(1/4 + 1/4 - 1/2): the weights, at ratio 1
  np.testing.assert_allclose(slope, [[[-0.25, -0.25], [0.5, 0.0]]], rtol=1e-6)


def test_functions_of_ones_own_get_zeros_where_masked():
  seen = {}

  def region(log_ratio, logp, old_logp, advantages):
    seen.update(log_ratio=log_ratio, logp=logp, old_logp=old_logp, advantages=advantages)
    never = jnp.zeros(logp.shape, bool)
    return jnp.where(MASK, logp, NAN), never, never

  poison = jnp.where(MASK, LOGP, NAN)
  advantages = jnp.where(MASK, A[..., None], NAN)
  row = Algorithm(trust_region=region)
  loss, _ = grpo_jax.policy_loss(row, poison, advantages, MASK, old_logp=poison)
  for name, array in seen.items():
    assert array[0, 1, 1] == 0, name
  # - (log 1/2 + log 1/4) / 4 - (log 1/8) / 2, in units of log 2
  np.testing.assert_allclose(loss, (3 / 4 + 3 / 2) * np.log(2), rtol=1e-6)


# --- log-probs -----------------------------------------------------------------------------------


def test_a_negative_token_is_nan_whatever_the_shape():
  """Not the last column, nor one found by another axis's length."""
  for shape in ((1, 3), (2, 1, 5)):
    logp, _ = grpo_jax.token_logprobs(jnp.zeros(shape), -jnp.ones(shape[:-1], int))
    assert jnp.isnan(logp).all()


def test_tiles_hold_16_mib():
  """2^22 floats of 4 bytes; at least 512 columns; nothing is left out."""
  assert logprobs._tiles(1, 3 * 2**22 + 1)[0] == 4
  assert logprobs._tiles(1, 3 * 2**22) == (3, 2**22)
  assert logprobs._tiles(2**10, 2**14) == (4, 2**12)
  assert logprobs._tiles(2**20, 1024) == (2, 512)
  assert logprobs._tiles(2**20, 3) == (1, 3)


def test_both_passes_size_their_tiles_by_rows_and_vocabulary(monkeypatch):
  """Those of a share and of a block."""
  sizes, tiles = [], logprobs._tiles
  monkeypatch.setattr(logprobs, "_tiles", lambda *size: sizes.append(size) or tiles(*size))

  def loss(hidden, **cut):
    return grpo_jax.head_logprobs(hidden, jnp.ones((2, 14)), jnp.zeros(6, int), **cut)[0].sum()

  jax.grad(loss)(jnp.ones((6, 2)))
  jax.grad(loss)(jnp.ones((6, 2)), vocab_shards=2, row_shards=3)
  assert sizes == [(6, 14), (6, 14), (2, 7), (2, 7)]


def test_slope_of_the_entropy_with_an_impossible_token():
  """Two tokens of probability 1/2 and one whose logit is -inf: at the maximum, slope 0."""
  head = jnp.array([[0.0, 0.0, -INF]])

  def entropy(head):
    return grpo_jax.head_logprobs(jnp.ones((1, 1)), head, jnp.array([0]))[1].sum()

  value, slope = jax.value_and_grad(entropy)(head)
  np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
  np.testing.assert_allclose(slope, jnp.zeros((1, 3)), atol=1e-7)


def test_products_of_bfloat16_accumulate_in_float32():
  """Forward, and both slopes. Asked of the program: on a CPU the result happens to be the same."""
  hidden, head = jnp.ones((3, 2), jnp.bfloat16), jnp.ones((2, 7), jnp.bfloat16)

  def loss(hidden, head):
    return grpo_jax.head_logprobs(hidden, head, jnp.zeros(3, int))[0].sum()

  program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head))
  products = program.count("dot_general[")
  assert products == program.count("preferred_element_type=float32") == 4  # one is recomputed


# --- types ---------------------------------------------------------------------------------------


def test_widths_of_floats(x64):
  """Integers become the default float; float32 is wide enough and stays."""
  dtypes = {jnp.int32: jnp.float64, jnp.float32: jnp.float32, jnp.bfloat16: jnp.float32}
  for given, expected in dtypes.items():
    assert as_float("x", jnp.ones(2, given)).dtype == expected


# --- the mutants themselves ----------------------------------------------------------------------


def test_every_explanation_is_of_a_mutant():
  core = Path(__file__).parents[2] / "grpo_jax" / "core"
  known = {m.key for file in core.glob("*.py") for m in find_mutants(file)}
  assert {(place, change) for place in EXPLAINED for change in EXPLAINED[place]} <= known


def test_a_mutant_is_one_change(tmp_path):
  file = tmp_path / "f.py"
  file.write_text('def f(x: "a") -> int:\n  """Doc."""\n  return stop_gradient(x) + 2\n')
  changed = [ast.unparse(Apply(m).visit(ast.parse(file.read_text()))) for m in find_mutants(file)]
  assert [text.splitlines()[-1].strip() for text in changed] == [
    "return stop_gradient(x) - 2",
    "return x + 2",
    "return stop_gradient(x) + 3",
    "return stop_gradient(x) + -2",
  ]
