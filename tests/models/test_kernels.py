"""Tests full-row attention kernels against the definition and against plain blocks.

Splash attention runs in Pallas's interpreter, and XLA stands in for cuDNN. These tests check the
computed values, not that the kernels run on a TPU or a GPU.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import build, config
from grpo_jax.distributed import mesh as meshes
from grpo_jax.models import kernels
from grpo_jax.models.attention import tiled_attention
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.models.kernels import TreeMask, by_layer, cudnn, for_long_rows, splash
from grpo_jax.plan import flops
from grpo_jax.plan.cost import Counter

# Interpreted kernels are large programs that run once.
QUICK = {"xla_backend_optimization_level": 0}
SLOW = [pytest.mark.slow]
IN_PLACE = {
  "splash": partial(splash, interpret=True),
  "cudnn": partial(cudnn, implementation="xla"),
}


@dataclasses.dataclass(frozen=True)
class Case:
  group: int = 2
  length: int = 7  # T'
  prompt: int = 5
  heads: int = 4
  kv_heads: int = 2
  dim: int = 6
  window: int | None = None
  softcap: float | None = None
  padding: tuple[int, ...] = (2, 0)  # slots in front of each prompt
  blocks: tuple[int, ...] = (128,)

  @property
  def mask(self):
    return np.arange(self.prompt) >= np.array(self.padding)[:, None]

  @property
  def options(self):
    return {"group": self.group, "scale": 0.6, "softcap": self.softcap}

  def arrays(self, seed=0):
    rng, rows = np.random.default_rng(seed), (len(self.padding), self.slots)
    shapes = [(*rows, heads, self.dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

  @property
  def slots(self):
    return self.prompt + self.group * self.length

  @property
  def real(self):
    """Returns a mask [P, S] that is true for real tokens."""
    return np.pad(self.mask, [(0, 0), (0, self.group * self.length)], constant_values=True)

  def path(self, p, slot):
    """Returns the slots that a token sees, from the first of the prompt to its own."""
    n, t = self.prompt, self.length
    first = [s for s in range(min(n, slot + 1)) if self.mask[p, s]]
    begin = slot - (slot - n) % t if slot >= n else slot + 1
    path = first + list(range(begin, slot + 1))
    return path[-self.window :] if self.window else path


CASES = {
  "plain": Case(),
  "window": Case(window=3),
  "window longer than completions": Case(window=9),
  "one completion": Case(group=1, length=4),
  "one token": Case(group=3, length=1, window=2),
  "prefill": Case(group=0, length=0, prompt=9, padding=(0, 4, 8)),
  "prefill with a window": Case(group=0, length=0, prompt=9, padding=(0, 4, 8), window=3),
  "a completion of one token": Case(group=2, length=0),
  "one head of keys": Case(kv_heads=1),
  "as many heads of keys": Case(heads=2),
  "softcap": Case(softcap=1.5),
  "softcap and window": Case(softcap=0.7, window=5),
  "many blocks": Case(length=150, prompt=130, heads=2, kv_heads=1, padding=(129, 1)),
  "window over blocks": Case(
    length=150, prompt=130, heads=2, kv_heads=1, padding=(3, 0), window=140
  ),
}
# The other cases are marked slow: they take half a minute.
FAST = {
  "splash": ("window", "softcap", "prefill with a window", "window over blocks"),
  "cudnn": ("plain", "window", "prefill with a window"),
}
RUNS = [
  pytest.param(name, case, id=f"{name}-{case}", marks=[] if case in FAST[name] else SLOW)
  for name in IN_PLACE
  for case in CASES
  if not (name == "cudnn" and CASES[case].softcap)
]


def one_query_after_another(case, q, k, v):
  """Returns attention by its definition in float64, with zeros for padding queries."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  out, times = np.zeros(q.shape), case.heads // case.kv_heads
  for p, slot in np.argwhere(case.real):
    path = case.path(p, slot)
    for h in range(case.heads):
      scores = k[p, path, h // times] @ q[p, slot, h] * 0.6
      if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
      weights = np.exp(scores - scores.max())
      out[p, slot, h] = weights / weights.sum() @ v[p, path, h // times]
  return out


def values_and_gradients(case, attend, arrays):
  """Returns the outputs at real tokens, and the gradients of a weighted sum of them."""
  real = jnp.asarray(case.real)[..., None, None]
  weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

  def loss(*arrays):
    mixed = jnp.where(real, attend(*arrays, jnp.asarray(case.mask)), 0)
    return jnp.sum(mixed * weights), mixed

  both = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
  (_, mixed), gradients = jax.jit(both, compiler_options=QUICK)(*arrays)
  return [mixed, *gradients]


def plain(case):
  local = None if case.window is None else True
  return partial(tiled_attention, local=local, window=case.window or 0, **case.options)


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_a_kernel_matches_the_definition_and_the_gradients_of_blocks(name, case, monkeypatch):
  case = CASES[case]
  monkeypatch.setattr(kernels, "SPLASH_TILES", case.blocks)
  arrays = case.arrays()
  attend = partial(IN_PLACE[name], window=case.window, **case.options)
  mixed, *gradients = values_and_gradients(case, attend, arrays)
  np.testing.assert_allclose(mixed, one_query_after_another(case, *arrays), atol=1e-5)
  for actual, expected in zip(
    gradients, values_and_gradients(case, plain(case), arrays)[1:], strict=True
  ):
    assert jnp.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", [*IN_PLACE, "tiled"])
def test_padding_is_not_seen(name):
  """Checks that large values at padding change nothing and receive no gradient."""
  case = Case(padding=(4, 1), window=6)
  arrays = case.arrays()
  poisoned = [jnp.where(case.real[..., None, None], a, 1e3) for a in arrays]
  attend = plain(case) if name == "tiled" else partial(
    IN_PLACE[name], window=case.window, **case.options
  )  # fmt: skip
  clean, dirty = (values_and_gradients(case, attend, a) for a in (arrays, poisoned))
  for actual, expected in zip(dirty, clean, strict=True):
    np.testing.assert_allclose(actual, expected, atol=1e-5)
  for gradient in dirty[1:]:
    assert not np.asarray(gradient)[~case.real].any()


# --- the mask of the tree -------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 5, 7, 8, 9, 100])
def test_a_tree_block_by_block(window):
  """Checks slices of the mask against the whole mask, and the count of nonempty blocks."""
  tree, size = TreeMask(prompt=8, length=12, group=3, window=window), 4
  whole = tree[:, :]
  case = Case(group=3, length=12, prompt=8, window=window, padding=(0,))
  for slot, row in enumerate(whole):
    assert np.flatnonzero(row).tolist() == case.path(0, slot)
  cuts = [slice(i, i + size) for i in range(0, 44, size)]
  blocks = {(i, j): tree[a, b] for i, a in enumerate(cuts) for j, b in enumerate(cuts)}
  np.testing.assert_array_equal(
    np.block([[blocks[i, j] for j in range(11)] for i in range(11)]), whole
  )
  assert tree.count_tiles(size) == sum(block.any() for block in blocks.values())


def test_blocks_that_are_not_full_are_all_the_same():
  """Bounds what the kernel holds and reads of the mask, however many completions there are."""
  tree, cuts = TreeMask(prompt=8, length=12, group=3), [slice(i, i + 4) for i in range(0, 44, 4)]
  blocks = [tree[a, b] for a in cuts for b in cuts]
  assert len({block.tobytes() for block in blocks if block.any() and not block.all()}) == 1


def test_blocks_are_as_large_as_padding_allows(monkeypatch):
  """768 tokens are three blocks of 256, and would be padded to two of 512; 1024 are two of 512."""
  taken = []
  monkeypatch.setattr(kernels.pallas, "make_splash_mha", lambda mask, block_sizes, **_: (
    taken.append((mask.shape[1], block_sizes.block_q)), lambda q, *_: q)[1])  # fmt: skip
  for n, length in ((256, 768), (256, 1023), (100, 0)):
    q = jax.ShapeDtypeStruct((1, n + 2 * length, 1, 128), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, n), bool)
    jax.eval_shape(partial(splash, group=2, scale=1.0), q, q, q, mask)
  assert taken == [(256 + 2 * 768, 256), (512 + 2 * 1024, 512), (128, 128)]


@pytest.mark.parametrize(("length", "total"), [(7, 12), (8, 14)])  # behind a prompt of five
def test_cudnn_is_asked_for_even_lengths(length, total, monkeypatch):
  """cuDNN refuses gradients of odd lengths."""
  asked = []
  monkeypatch.setattr(
    jax.nn, "dot_product_attention", lambda q, *_, **__: asked.append(q.shape) or q
  )
  case = Case(length=length)
  jax.eval_shape(partial(cudnn, **case.options), *case.arrays(), case.mask)
  assert asked == [(4, total, 4, 6)]


# --- models ---------------------------------------------------------------------------------------

MODEL = ModelConfig(
  vocab_size=37, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24,
  window=4, local_layers=(True, False), attn_softcap=2.0,
)  # fmt: skip


@pytest.mark.parametrize(
  ("name", "remat"),
  [pytest.param(*case, marks=SLOW) for case in (("splash", "layers"), ("cudnn", "none"))],
)
def test_a_model_with_a_kernel_is_the_same_model(name, remat):
  """Compares hidden states, gradients and prefill, with windows in some layers and left padding."""
  shape = MODEL if name == "splash" else dataclasses.replace(MODEL, attn_softcap=None)
  case, rng = Case(), np.random.default_rng(0)
  shapes, mask = jax.eval_shape(Decoder(shape).init, jax.random.key(0)), jnp.asarray(case.mask)
  params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 4, a.dtype), shapes)
  prompts = rng.integers(0, 37, mask.shape)
  completions = rng.integers(0, 37, (2, case.group, case.length + 1))
  real = mask[None, :, None, :, None]  # [L, P, K, N, Dh]

  def compute(**options):
    model = Decoder(shape, remat=remat, **options)

    def loss(params):
      hidden = model.score(params, prompts, mask, completions)
      return jnp.sum(jnp.sin(hidden)), hidden

    def everything(params):
      last, prefix = model.prefill(params, prompts, mask)
      prefix = jax.tree.map(lambda kept: jnp.where(real, kept, 0), prefix)
      return jax.value_and_grad(loss, has_aux=True)(params), last, prefix

    return jax.jit(everything, compiler_options=QUICK)(params)

  actual, expected = compute(attention=by_layer(IN_PLACE[name])), compute()
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_layers_apart_know_whether_they_have_a_window():
  """Straight-line code compiles the one kernel that each layer runs."""
  seen = []

  def note(q, k, v, mask, *, window=None, **options):
    seen.append(window)
    return q

  model, tokens = Decoder(MODEL, attention=by_layer(note)), jnp.zeros((1, 3), jnp.int32)

  def prefill(key):
    return model.prefill(unstack(model.init(key)), tokens, tokens == 0)

  jax.eval_shape(prefill, jax.random.key(0))
  assert seen == [4, None]


@pytest.mark.parametrize(
  ("name", "tensor"),  # four do not divide two heads of keys
  [("splash", 2), pytest.param("splash", 4, marks=SLOW), pytest.param("cudnn", 2, marks=SLOW),
   ("cudnn", 4)],
)  # fmt: skip
def test_each_device_computes_its_own_prompts_and_heads(name, tensor):
  case = Case(padding=(0, 1, 2, 3), window=3)
  mesh = meshes.make_mesh((1, 8 // tensor, tensor))
  attend = partial(meshes.over_mesh(mesh, IN_PLACE[name]), window=case.window, **case.options)
  arrays = case.arrays()
  split = jax.device_put(arrays, meshes.batch_sharding(mesh))
  actual, expected = (
    values_and_gradients(case, attend, split),
    values_and_gradients(case, plain(case), arrays),
  )
  for one, other in zip(actual, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
  traced = jax.jit(partial(attend, prompt_mask=jnp.asarray(case.mask))).trace(*split)
  compiled = traced.lower().compile().as_text()
  assert "all-gather" not in compiled
  assert "all-to-all" not in compiled


# --- which one ------------------------------------------------------------------------------------


class Device:
  def __init__(self, platform):
    self.platform = platform


def choose(platform, shape=MODEL, context=1, **fields):
  c = config.default_config()
  with c.unlocked():
    for name, value in fields.items():
      c[name.split("__")[0]][name.split("__")[1]] = value
  mesh = dataclasses.make_dataclass("Mesh", ["devices", "shape"])
  mesh = mesh(np.array([Device(platform)]), {"context": context})
  return build.attention_of(c, shape, mesh)


def chosen(monkeypatch, *args, slots=4096, **fields):
  """Returns the name of the implementation that runs for a prompt of `slots` slots."""
  for name in kernels.KERNELS:
    monkeypatch.setitem(kernels.KERNELS, name, lambda *a, name=name, **o: name)
  monkeypatch.setattr(kernels, "tiled_attention", lambda *a, **o: "tiled")
  monkeypatch.setattr(build, "tiled_attention", kernels.tiled_attention)
  monkeypatch.setattr(meshes, "over_mesh", lambda mesh, kernel, sampling: kernel)
  monkeypatch.setattr(meshes, "over_context", lambda mesh, kernel: kernel)
  q = jax.ShapeDtypeStruct((1, slots, 4, 4), jnp.float32)
  return choose(*args, **fields)(q, q, q, jax.ShapeDtypeStruct((1, slots), bool), scale=1.0)


def test_auto_is_the_kernel_of_the_platform_where_it_can_run(monkeypatch):
  soft, hard = MODEL, dataclasses.replace(MODEL, attn_softcap=None, head_dim=64)
  pick = partial(chosen, monkeypatch)
  assert pick("cpu", hard) == "tiled"
  assert pick("tpu", soft) == "splash"
  assert pick("gpu", hard, model__dtype="bfloat16") == "cudnn"
  assert pick("gpu", hard) == "tiled"  # float32
  assert pick("gpu", soft, model__dtype="bfloat16") == "tiled"
  wide = dataclasses.replace(hard, head_dim=256)
  assert pick("gpu", wide, model__dtype="bfloat16") == "tiled"
  assert pick("tpu", soft, train__reduction="deterministic") == "tiled"
  assert pick("tpu", soft, model__attention="tiled") == "tiled"
  assert pick("tpu", soft, context=2) == "tiled"  # the axis splits rows, which kernels see whole


def test_auto_leaves_short_rows_to_blocks_and_a_named_kernel_does_not(monkeypatch):
  side = math.isqrt(kernels.MIN_SCORES)
  assert chosen(monkeypatch, "tpu", slots=side - 1) == "tiled"
  assert chosen(monkeypatch, "tpu", slots=side) == "splash"
  assert chosen(monkeypatch, "tpu", slots=8, model__attention="splash") == "splash"
  mixed = for_long_rows(lambda *a, **o: "kernel")
  q = jax.ShapeDtypeStruct((1, 8 + 3 * side, 4, 4), jnp.float32)  # each of three sees 8 + side
  assert mixed(q, q, q, jax.ShapeDtypeStruct((1, 8), bool), group=3) == "kernel"
  assert mixed(q, q, q, jax.ShapeDtypeStruct((1, 8), bool), group=3 * side // 8) == "tiled"


@pytest.mark.parametrize(
  ("platform", "fields", "words"),
  [
    ("cpu", {"model__attention": "splash"}, "runs on a tpu"),
    ("tpu", {"model__attention": "cudnn"}, "runs on a gpu"),
    ("gpu", {"model__attention": "cudnn"}, "needs model.dtype 'bfloat16'"),
    ("gpu", {"model__attention": "cudnn", "model__dtype": "bfloat16"}, "caps them at 2"),
  ],
)
def test_unsupported_settings_are_errors_with_a_remedy(platform, fields, words):
  with pytest.raises(ValueError, match=words) as error:
    choose(platform, **fields)
  assert f"model.attention is {fields['model__attention']!r}" in str(error.value)
  assert "set it to 'auto' or 'tiled'" in str(error.value)


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "splash"), ("gpu", "cudnn")])
def test_kernels_refuse_sinks(monkeypatch, platform, kernel):
  shape = dataclasses.replace(MODEL, attn_softcap=None, sinks=True)
  assert chosen(monkeypatch, platform, shape, model__dtype="bfloat16") == "tiled"
  with pytest.raises(ValueError, match=f"'{kernel}', which has no attention sinks"):
    choose(platform, shape, model__attention=kernel, model__dtype="bfloat16")
  with pytest.raises(ValueError, match=r"mesh\.context is 2, and .* has attention sinks"):
    choose(platform, shape, context=2)


def test_a_config_names_the_field():
  c = config.override(config.default_config(), ["--config.model.attention=flash"])
  (problem,) = config.check(c, 1)
  assert problem == ("model.attention is 'flash', it must be 'auto', 'tiled', 'splash' or 'cudnn'")
  changes = ["model.attention=splash", "train.reduction=deterministic", "model.remat=none"]
  c = config.override(config.default_config(), [f"--config.{one}" for one in changes])
  assert any("model.attention is 'splash'" in problem for problem in config.check(c, 1))


# --- what they cost -------------------------------------------------------------------------------


def test_the_operations_of_a_kernel_are_those_of_the_blocks_it_looks_at(monkeypatch):
  """Counts blocks, 6 a side, prompt and two completions of two each: 3 + 2 * (4 + 3) are met."""
  monkeypatch.setattr(kernels, "SPLASH_TILES", (128,))
  case = CASES["many blocks"]
  attend = partial(splash, interpret=True, **case.options)
  one = 2 * 2 * 2 * (3 + 2 * (4 + 3)) * 128 * 128 * 128  # P, H, multiply-adds; heads are 128 wide

  def ops(function):
    return flops.matmul_flops(jax.make_jaxpr(function)(*case.arrays()).jaxpr)[0]

  def mix(*arrays):
    return attend(*arrays, jnp.asarray(case.mask))

  assert ops(mix) == 2 * one
  dots = 2 * 2 * 2 * 768 * 128  # of mixed values and their gradient
  both = ops(jax.grad(lambda *a: jnp.sum(mix(*a)), (0, 1, 2)))
  assert both == (2 + 3 + 4) * one + dots
  mesh = meshes.make_mesh((1, 2, 1), jax.devices()[:2])
  mapped = partial(meshes.over_mesh(mesh, partial(splash, interpret=True)), **case.options)
  assert ops(lambda *a: mapped(*a, jnp.asarray(case.mask))) == 2 * one


CALL = """\
HloModule m

ENTRY %main (q: bf16[2,4,768,128]) -> bf16[2,4,768,128] {
  %q = bf16[2,4,768,128]{3,2,1,0} parameter(0)
  %empty = f32[] custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="jit(f)/kernel_100_ops_7_bytes/splash_mha_fwd"}
  ROOT %r = bf16[2,4,768,128]{3,2,1,0} custom-call(%q), custom_call_target="TARGET", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/kernel_100_ops_7_bytes/NAME"}
}
"""  # noqa: E501


@pytest.mark.parametrize(
  ("target", "name", "times"),
  [
    ("tpu_custom_call", "splash_mha_fwd_segmented_residuals/pallas_call", 2),
    ("tpu_custom_call", "splash_mha_dq_segmented_no_residuals", 3),
    ("tpu_custom_call", "splash_mha_dkv_segmented_no_residuals", 4),
    ("__cudnn$fmhaSoftmax", "x", 2),
    ("__cudnn$fmhaSoftmaxBackward", "x", 5),
  ],
)
def test_a_compiled_call_counts_what_its_scope_says(target, name, times):
  once, _ = Counter(CALL.replace("TARGET", target).replace("NAME", name)).cost()
  assert once.flops == times * 100
  assert once.bytes == 7 + 2 * 2 * (2 * 4 * 768 * 128) + 4  # and operand and result, and the other


def test_the_costlier_of_two_branches_counts():
  def function(x, which):
    return jax.lax.cond(which, lambda x: x @ x, lambda x: x @ x @ x, x)

  x = jnp.ones((16, 16))
  once, _ = Counter(jax.jit(function).lower(x, True).compile().as_text()).cost()
  traced, _ = flops.matmul_flops(jax.make_jaxpr(function)(x, True).jaxpr)
  assert once.flops == 2 * 2 * 16**3 == traced


@pytest.mark.skipif(
  not any(d.platform == "gpu" for d in jax.devices()), reason="needs a GPU, for cuDNN"
)
@pytest.mark.parametrize("name", ["plain", "window", "prefill"])
def test_cudnn_itself(name):
  case = dataclasses.replace(CASES[name], dim=64)
  arrays = [a.astype(jnp.bfloat16) for a in case.arrays()]
  actual = values_and_gradients(case, partial(cudnn, window=case.window, **case.options), arrays)
  for one, other in zip(actual, values_and_gradients(case, plain(case), arrays), strict=True):
    np.testing.assert_allclose(np.float32(one), np.float32(other), atol=0.1, rtol=0.05)


@pytest.mark.skipif(
  not any(d.platform == "tpu" for d in jax.devices()), reason="needs a TPU, for splash attention"
)
@pytest.mark.parametrize("name", ["plain", "window", "prefill"])
def test_splash_itself(name):
  case = dataclasses.replace(CASES[name], dim=128)
  arrays = [a.astype(jnp.bfloat16) for a in case.arrays()]
  actual = values_and_gradients(case, partial(splash, window=case.window, **case.options), arrays)
  for one, other in zip(actual, values_and_gradients(case, plain(case), arrays), strict=True):
    np.testing.assert_allclose(np.float32(one), np.float32(other), atol=0.1, rtol=0.05)
