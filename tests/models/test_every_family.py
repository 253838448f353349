"""Tests that every family shards, adapts, differentiates and is counted like the others.

`test_decoder_parity.py` compares their numbers with those of PyTorch transformers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax.core.logprobs import head_logprobs
from grpo_jax.distributed import mesh as meshes
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.io.weights import shapes_of
from grpo_jax.models.load import load, open_weights
from grpo_jax.plan.flops import matmul_flops
from tests.helpers.model_files import FAMILIES

NAMES = sorted(folder.name for folder in FAMILIES.iterdir())
MODELS = [name for name in NAMES if not name.endswith("classifier")]
# Those whose layers compute something that Llama's do not; the others differ in sizes alone.
VARIED = ("smollm3", "olmo3", "phi3", "glm4", "granite", "ministral3", "exaone4")


def case(name):
  """Returns the model, its parameters, and prompts with completions of its fixture."""
  config, params = load(str(FAMILIES / name))
  params = jax.tree.map(jnp.asarray, params)
  fixture = np.load(FAMILIES / name / "expected.npz")
  data = fixture["prompts"], fixture["prompt_mask"], fixture["completions"]
  return Decoder(config, length=data[0].shape[1] + data[2].shape[2]), params, data


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_place_on_a_mesh(name):
  shapes = open_weights(str(FAMILIES / name)).shapes
  layout = meshes.param_shardings(meshes.make_mesh((2, 2, 2)), shapes)
  for path, sharding in jax.tree_util.tree_leaves_with_path(layout):
    key = path[-1].key
    matrix = key in lora.MATRICES or key in ("experts_gate", "experts_up", "experts_down")
    if matrix and name != "gemma3_multimodal":
      assert sharding.num_devices == 8, key
      assert not sharding.is_fully_replicated, key


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_in_the_files(name):
  folder = FAMILIES / name
  tensors = load_file(folder / "model.safetensors")
  others = ("vision_tower", "multi_modal_projector")
  count = sum(
    value.size for key, value in tensors.items() if not any(part in key for part in others)
  )
  shapes = shapes_of(open_weights(str(folder)).config)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("name", VARIED)
def test_products_are_counted_one_by_one(name):
  model, params, (prompts, mask, completions) = case(name)
  c = model.config

  def score(params):
    return model.score(params, prompts, mask, completions)

  once, loop = matmul_flops(jax.make_jaxpr(score)(params).jaxpr)
  (count, n), (_, group, length) = prompts.shape, completions.shape
  matrices = sum(params["layers"][name][0].size for name in lora.MATRICES)
  # Scores and mixes: the prompt sees itself; a completion sees the prompt and itself.
  pairs = n * n + group * (length - 1) * (n + length - 1)
  rows = n + group * (length - 1)
  per_layer = rows * matrices + 2 * pairs * c.heads * c.head_dim
  assert (once, loop) == (2 * count * c.layers * per_layer, 0)


@pytest.mark.parametrize("name", [*VARIED, "qwen3_moe"])
def test_adapters_of_all_matrices_learn_and_merge(name):
  model, params, data = case(name)
  matrices = [matrix for matrix in lora.MATRICES if matrix in params["layers"]]
  adapters = lora.init(jax.random.key(0), params, "|".join(matrices), rank=2)
  rng = np.random.default_rng(1)
  adapters = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.1, a.dtype), adapters)
  adapted = Decoder(model.config, lora_scale=0.5, length=model.length)

  def logp(model, params):
    hidden = model.score(params, *data)
    softcap = model.config.softcap
    return head_logprobs(hidden, model.head(params), data[2], softcap=softcap)[0]

  def loss(adapters):
    values = logp(adapted, lora.with_adapters(params, adapters))
    return values.mean(), values

  (_, values), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
  merged = jax.jit(lambda p: logp(model, p))(lora.merge(params, adapters, 0.5))
  np.testing.assert_allclose(values, merged, atol=3e-5)
  assert len(gradients["layers"]) == 2 * len(matrices) == (8 if model.config.experts else 14)
  for key, gradient in gradients["layers"].items():
    assert np.abs(gradient).reshape(len(gradient), -1).max(-1).min() > 1e-6, key


@pytest.mark.parametrize("name", ["phi3", "glm4"])
def test_adapters_of_parts_of_a_fused_matrix_are_not_exchanged_with_peft(name, tmp_path):
  config, _ = load(str(FAMILIES / name))
  with pytest.raises(ValueError, match=r"gate_up_proj.*which peft adapts as one.*the merged model"):
    lora.load_peft(tmp_path, config)
