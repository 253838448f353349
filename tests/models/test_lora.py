"""Tests LoRA: its product, its gradients, and the folders of the `peft` package.

peft wrote fixtures/tiny_llama_lora and computed its logits; see fixtures/peft_interop.py.
"""

import importlib.util
import json
import math
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from grpo_jax.distributed import mesh as meshes
from grpo_jax.models import lora
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.models.io.weights import shapes_of
from grpo_jax.models.load import load

FIXTURES = Path(__file__).parents[1] / "fixtures"
PEFT = FIXTURES / "tiny_llama_lora"
ALL = "q|k|v|o|gate|up|down"
CONFIG = ModelConfig(vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24)
SCALE = 1.5


@pytest.fixture(scope="module")
def base():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes_of(CONFIG)
  )


@pytest.fixture(scope="module")
def new(base):
  """Returns new adapters on every matrix, as at the start of a run."""
  return jax.jit(lora.init, static_argnums=(2, 3))(jax.random.key(1), base, ALL, 3)


@pytest.fixture(scope="module")
def adapters(new):
  """Returns adapters as after some training: B is not zero."""
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32), new)


def batch():
  """Returns two prompts of 3 tokens, with two completions of 4 tokens each."""
  tokens = np.random.default_rng(0).integers(0, 32, (2, 3 + 2 * 4)).astype(np.int32)
  return tokens[:, :3], np.ones((2, 3), bool), tokens[:, 3:].reshape(2, 2, 4)


@partial(jax.jit, static_argnames="lora_scale")
def hidden(params, lora_scale=1.0):
  return Decoder(CONFIG, lora_scale=lora_scale).score(params, *batch())


def loss(params, lora_scale=1.0):
  """Returns a number that depends on every hidden value."""
  return (hidden(params, lora_scale) ** 3).mean()


ADAM = optax.adam(1e-2)


@jax.jit
def step(adapters, state, base):
  """Returns new adapters and optimizer state, and gradients of adapters and of the base."""
  by_both = jax.grad(lambda a, b: loss(lora.with_adapters(b, a), SCALE), argnums=(0, 1))
  grads, by_base = by_both(adapters, base)
  updates, state = ADAM.update(grads, state, adapters)
  return optax.apply_updates(adapters, updates), state, grads, by_base


# --- the three functions --------------------------------------------------------------------------


def test_new_adapters_have_the_initial_values_of_peft(base, new):
  assert len(new["layers"]) == 14
  for name, inputs, outputs in (("q", 16, 16), ("v", 16, 8), ("up", 16, 24), ("down", 24, 16)):
    a, b = (np.asarray(new["layers"][f"{name}_lora_{part}"]) for part in "ab")
    assert a.shape == (2, inputs, 3)
    assert b.shape == (2, 3, outputs)
    bound = 1 / np.sqrt(inputs)  # Kaiming uniform with a = sqrt(5)
    assert np.abs(a).max() <= bound
    assert a.max() > 0.9 * bound
    assert a.min() < -0.9 * bound
    assert abs(a.std() - bound / np.sqrt(3)) < 0.1 * bound
    assert (a[0] != a[1]).all()  # each layer draws its own
    assert not b.any()
  np.testing.assert_array_equal(hidden(lora.with_adapters(base, new), SCALE), hidden(base, SCALE))


def test_an_adapter_does_not_depend_on_the_others(base, new):
  shapes = jax.eval_shape(lambda: base)  # shapes are enough
  alone = lora.init(jax.random.key(1), shapes, "layers/v", 3)
  assert alone["layers"].keys() == {"v_lora_a", "v_lora_b"}
  np.testing.assert_array_equal(alone["layers"]["v_lora_a"], new["layers"]["v_lora_a"])
  assert (new["layers"]["v_lora_a"] != new["layers"]["k_lora_a"]).any()


def test_with_adapters_is_a_union(base, adapters):
  assert lora.with_adapters(base, {}) is base
  adapted = lora.with_adapters(base, adapters)
  assert adapted["layers"]["q"] is base["layers"]["q"]
  assert adapted["layers"]["q_lora_a"] is adapters["layers"]["q_lora_a"]
  assert set(adapted["layers"]) == set(base["layers"]) | set(adapters["layers"])
  assert not any("lora" in name for name in base["layers"])


def test_merge_by_hand():
  base = {"embed": jnp.ones(1), "layers": {"q": jnp.array([[[1.0, 2.0], [3.0, 4.0]]])}}
  a, b = jnp.array([[[1.0], [10.0]]]), jnp.array([[[2.0, 3.0]]])
  merged = lora.merge(base, {"layers": {"q_lora_a": a, "q_lora_b": b}}, 0.5)
  assert merged["layers"].keys() == {"q"}
  # A B = [[2, 3], [20, 30]]
  np.testing.assert_array_equal(merged["layers"]["q"], [[[2.0, 3.5], [13.0, 19.0]]])
  assert merged["embed"] is base["embed"]


@pytest.mark.parametrize("layout", [lambda params: params, unstack], ids=["stacked", "unstacked"])
def test_merged_and_unmerged_agree(base, adapters, layout):
  adapted, merged = lora.with_adapters(base, adapters), lora.merge(base, adapters, SCALE)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  actual = hidden(layout(adapted), SCALE)
  np.testing.assert_allclose(actual, hidden(layout(merged), SCALE), atol=1e-5)
  halved = hidden(layout(lora.merge(base, adapters, SCALE / 2)), SCALE)
  assert np.abs(actual - halved).max() > 0.05  # the scale is used


def test_merging_nothing_changes_nothing(base):
  assert all(
    leaf is other
    for leaf, other in zip(jax.tree.leaves(lora.merge(base, {}, SCALE)), jax.tree.leaves(base))
  )


# --- training -------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_chain_rule(base, adapters):
  """dL/dA = scale dL/dW B', dL/dB = scale A' dL/dW."""
  *_, grads, weights = step(adapters, ADAM.init(adapters), base)
  assert jax.tree.structure(grads) == jax.tree.structure(adapters)
  for name in ALL.split("|"):
    a, b = (np.asarray(adapters["layers"][f"{name}_lora_{part}"]) for part in "ab")
    w = np.asarray(weights["layers"][name])
    for part, expected in (("a", w @ b.swapaxes(1, 2)), ("b", a.swapaxes(1, 2) @ w)):
      actual = grads["layers"][f"{name}_lora_{part}"]
      np.testing.assert_allclose(actual, SCALE * expected, atol=1e-5, err_msg=name)


def test_a_step_changes_only_the_adapters(base, new):
  state, before = ADAM.init(new), jax.tree.map(np.array, base)
  moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
  assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(new))
  after, state, grads, _ = step(new, state, base)
  for name, gradient in grads["layers"].items():
    # B is zero at the start, so no gradient reaches A.
    assert np.asarray(gradient).any() == name.endswith("_b"), name
  _, _, grads, _ = step(after, state, base)
  assert all(np.asarray(gradient).any() for gradient in jax.tree.leaves(grads))
  adapted = lora.with_adapters(base, after)
  assert (hidden(adapted, SCALE) != hidden(base, SCALE)).any()
  unchanged = adapted | {"layers": {name: adapted["layers"][name] for name in base["layers"]}}
  jax.tree.map(np.testing.assert_array_equal, unchanged, before)


def test_pairs_are_sharded_like_their_matrix(base, adapters):
  mesh = meshes.make_mesh((2, 2, 2))
  shardings = meshes.param_shardings(mesh, lora.with_adapters(base, adapters))["layers"]
  for name in ALL.split("|"):
    _, inputs, outputs = shardings[name].spec
    assert shardings[f"{name}_lora_a"].spec == P(None, inputs, None), name
    assert shardings[f"{name}_lora_b"].spec == P(None, None, outputs), name
  placed = jax.device_put(adapters, meshes.param_shardings(mesh, adapters))
  placed_base = jax.device_put(base, meshes.param_shardings(mesh, base))
  actual = jax.jit(lambda b, a: hidden(lora.with_adapters(b, a), SCALE))(placed_base, placed)
  np.testing.assert_allclose(actual, hidden(lora.with_adapters(base, adapters), SCALE), atol=1e-5)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("pattern", "message"),
  [
    ("q_x|v_x", r"'q_x\|v_x' matches no parameter.* q, k, v, o, gate, up, down$"),
    ("", "matches no parameter"),
    (".*", r"matches embed, final_norm, layers/attn_norm, layers/mlp_norm: .* may match q, k, v"),
    ("q|attn_norm", "matches layers/attn_norm: "),
    ("embed", "matches embed: "),
    ("q(", "is not a regular expression: missing"),
  ],
)
def test_a_bad_pattern_lists_the_matrices(base, pattern, message):
  with pytest.raises(ValueError, match=message):
    lora.init(jax.random.key(0), base, pattern, rank=2)


def test_a_pattern_matches_whole_names(base):
  assert lora.targets(base, "q|o") == ("q", "o")
  assert lora.targets(base, "layers/(v|up)") == ("v", "up")
  biased = base | {"layers": base["layers"] | {"q_bias": jnp.zeros((2, 16))}}
  assert lora.targets(biased, "q") == ("q",)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_the_rank_is_a_positive_integer(base, rank):
  with pytest.raises(ValueError, match=r"rank is .*integer of at least 1"):
    lora.scale(rank, 1.0)
  with pytest.raises(ValueError, match=r"rank is .*integer of at least 1"):
    lora.init(jax.random.key(0), base, "q", rank)


def test_a_rank_beyond_the_matrix_is_refused(base):
  with pytest.raises(ValueError, match="rank is 9, but layers/k is only 16 x 8: use at most 8"):
    lora.init(jax.random.key(0), base, "q|k", rank=9)
  assert jax.eval_shape(lambda: lora.init(jax.random.key(0), base, "k", rank=8))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_is_a_positive_number(alpha):
  with pytest.raises(ValueError, match="alpha is"):
    lora.scale(2, alpha)


def test_adapters_of_another_model_are_refused(base, adapters):
  other = base | {"layers": {name: base["layers"][name] for name in ("q", "k")}}
  with pytest.raises(ValueError, match="layers/v"):
    lora.with_adapters(other, adapters)


# --- peft -----------------------------------------------------------------------------------------


def test_an_adapter_of_peft_gives_the_logits_of_peft():
  config, params = load(str(FIXTURES / "tiny_llama"))
  adapters, rank, alpha = lora.load_peft(PEFT, config)
  assert (rank, alpha) == (3, 6.0)
  case = np.load(FIXTURES / "tiny_llama" / "expected.npz")
  expected = np.load(PEFT / "expected.npz")["logits"]
  model = Decoder(config, lora_scale=lora.scale(rank, alpha))
  adapted = lora.with_adapters(params, adapters)
  ids, mask = case["ids"], case["mask"]
  completions = np.stack(
    [np.pad(row[keep][1:], (0, 12 - keep.sum())) for row, keep in zip(ids, mask)]
  )
  first = np.stack([row[keep][:1] for row, keep in zip(ids, mask)])
  # Prompts of one token: hidden[t] follows token t of the row.
  actual = jax.jit(model.score)(adapted, first, np.ones((3, 1), bool), completions[:, None])
  for row, keep, logits in zip(actual[:, 0] @ model.head(adapted), mask, expected):
    np.testing.assert_allclose(row[: keep.sum()], logits[keep], atol=2e-5)


def test_written_adapters_equal_those_of_peft(tmp_path):
  adapters, _, alpha = lora.load_peft(PEFT, load(str(FIXTURES / "tiny_llama"))[0])
  out = tmp_path / "deep" / "adapter"
  lora.save_peft(adapters, out, alpha=alpha, base_name="tiny_llama")
  ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (out, PEFT))
  assert ours.keys() == theirs.keys()
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
  ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (out, PEFT))
  for settings in (ours, theirs):
    settings["target_modules"] = sorted(settings["target_modules"])
  assert ours.items() <= theirs.items()
  assert ours["base_model_name_or_path"] == "tiny_llama"
  assert {"peft_type", "task_type", "r", "lora_alpha", "target_modules"} <= ours.keys()


def test_other_adapters_are_refused(tmp_path):
  config = load(str(FIXTURES / "tiny_llama"))[0]
  folder = Path(shutil.copytree(PEFT, tmp_path / "adapter"))
  settings = json.loads((folder / "adapter_config.json").read_text())
  for change, message in (
    ({"use_rslora": True}, "plain LoRA is supported, but it sets use_rslora"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"r": 4}, r"12 tensor.*_A.weight: shape \(3, \d\d\), expected \(4, "),
  ):
    (folder / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
      lora.load_peft(folder, config)
  (folder / "adapter_config.json").write_text(json.dumps(settings))
  file = folder / "adapter_model.safetensors"
  tensors = load_file(file)
  name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
  save_file({key: value for key, value in tensors.items() if key != name}, file)
  with pytest.raises(ValueError, match=f"1 tensor.*{name}: shape missing, expected .48, 3.$"):
    lora.load_peft(folder, config)
  save_file(tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 32), "f4")}, file)
  with pytest.raises(ValueError, match=r"lm_head.lora_A.weight: .* expected no such tensor"):
    lora.load_peft(folder, config)


@pytest.mark.slow
def test_peft_loads_written_adapters():
  pytest.importorskip("peft", reason="pip install torch peft")
  spec = importlib.util.spec_from_file_location("interop", FIXTURES / "peft_interop.py")
  interop = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(interop)
  for source in (FIXTURES / "tiny_llama", FIXTURES / "tiny_llama_tied"):
    assert interop.check(source) < 5e-5


def test_adapters_are_not_written_over_a_full_folder(tmp_path):
  (tmp_path / "adapter_config.json").write_text("precious")
  adapters = lora.init(jax.random.key(0), shapes_of(CONFIG), "q", 2)
  with pytest.raises(FileExistsError, match="nothing is overwritten"):
    lora.save_peft(adapters, tmp_path, alpha=4.0, base_name="x")
  assert (tmp_path / "adapter_config.json").read_text() == "precious"
  assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"r": None}, r"adapter_config\.json: r or lora_alpha: the LoRA rank is None"),
    ({"r": 0}, "the LoRA rank is 0"),
    ({"r": "3"}, "the LoRA rank is '3'"),
    ({"lora_alpha": math.nan}, "the LoRA alpha is nan"),
    ({"lora_alpha": "6"}, "the LoRA alpha is '6'"),
    ({"lora_alpha": 10**400}, "the LoRA alpha is 1000.*: it must be a finite number"),
    ({"lora_alpha": True}, "the LoRA alpha is True"),
  ],
)
def test_adapters_with_damaged_settings_are_refused(tmp_path, change, message):
  folder = Path(shutil.copytree(PEFT, tmp_path / "adapter"))
  settings = json.loads((folder / "adapter_config.json").read_text())
  (folder / "adapter_config.json").write_text(json.dumps(settings | change))
  with pytest.raises(ValueError, match=message):
    lora.load_peft(folder, load(str(FIXTURES / "tiny_llama"))[0])


def test_adapters_without_tensors_or_with_nan_are_refused(tmp_path):
  config = load(str(FIXTURES / "tiny_llama"))[0]
  folder = Path(shutil.copytree(PEFT, tmp_path / "adapter"))
  file = folder / "adapter_model.safetensors"
  tensors = load_file(file)
  name = next(iter(tensors))
  for content, message in (
    ({}, r"adapter_model\.safetensors holds no adapter .* its tensors are none"),
    ({"x": np.zeros(2, "f4")}, "its tensors are x, expected names such as base_model"),
    ({**tensors, name: tensors[name] * np.nan}, "holds NaN or infinity"),
    ({**tensors, name: tensors[name].astype(np.int8)}, "is I8, known: F32"),
  ):
    save_file(content, file)
    with pytest.raises(ValueError, match=message):
      lora.load_peft(folder, config)
  file.write_bytes(b"x" * 20)
  with pytest.raises(ValueError, match=r"adapter_model\.safetensors .* is truncated or is not"):
    lora.load_peft(folder, config)


def test_a_list_of_names_is_not_a_class_of_letters(base):
  """Reads a list as names: as a regular expression, "['down_proj']" would match `o`."""
  assert lora.targets(base, ["down_proj"]) == ("down",)
  adapters = lora.init(jax.random.key(0), base, ["q", "v_proj"], 2)
  assert sorted(adapters["layers"]) == ["q_lora_a", "q_lora_b", "v_lora_a", "v_lora_b"]
