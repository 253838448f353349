"""Tests reading Hugging Face folders: every tensor in its place, every damage an error."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io.safetensors import read_folder
from grpo_jax.models.load import load, open_weights
from tests.helpers.model_files import TIED, UNTIED, assert_holds, edit_tensors


def test_a_folder_has_a_config():
  config, _ = read_folder(UNTIED)
  assert config == ModelConfig(
    vocab_size=128,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=12,
    mlp=64,
    rope_theta=500.0,
    norm_eps=0.01,
    tied=False,
    context=64,
  )
  assert read_folder(TIED)[0].tied


def test_a_tensor_is_read_in_part():
  name = "model.layers.1.mlp.up_proj.weight"
  tensor = read_folder(UNTIED)[1][name]
  expected = load_file(UNTIED / "model.safetensors")[name]
  assert tensor.shape == expected.shape == (64, 32)
  np.testing.assert_array_equal(tensor.read((slice(3, 9), slice(30, None))), expected[3:9, 30:])


@pytest.mark.parametrize("source", [UNTIED, TIED], ids=lambda path: path.name)
def test_every_tensor_of_a_folder_is_in_its_place(source):
  config, params = load(str(source))
  assert_holds(params, load_file(source / "model.safetensors"), config.layers)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_widened(folder, dtype):
  narrow = {}

  def change(tensors):
    tensors |= {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    narrow.update(tensors)

  edit_tensors(folder, change)
  config, params = load(str(folder))
  assert_holds(params, {k: v.astype(np.float32) for k, v in narrow.items()}, config.layers)


# --- shards ---------------------------------------------------------------------------------------


def shard(folder):
  """Splits model.safetensors in two with an index; returns the index."""
  tensors = load_file(folder / "model.safetensors")
  names = sorted(tensors)
  index = {}
  for i, part in enumerate((names[:9], names[9:])):
    file = f"model-{i + 1:05}-of-00002.safetensors"
    save_file({name: tensors[name] for name in part}, folder / file)
    index |= dict.fromkeys(part, file)
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  return index


def test_shards_are_one_model(folder):
  tensors = load_file(folder / "model.safetensors")
  shard(folder)
  config, params = load(str(folder))
  assert_holds(params, tensors, config.layers)


def test_a_tensor_is_missing_from_the_shards(folder):
  index = shard(folder)
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps({"weight_map": index | {"model.extra": index["lm_head.weight"]}}))
  with pytest.raises(ValueError, match=r"no shard holds: model\.extra"):
    read_folder(folder)


def test_a_tensor_is_in_two_shards(folder):
  first, second = sorted(set(shard(folder).values()))
  shutil.copy(folder / first, folder / second)
  with pytest.raises(ValueError, match=r"lm_head\.weight is in model-00002"):
    read_folder(folder)


def test_a_shard_is_missing(folder):
  shard(folder)
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="do not exist: model-00002-of-00002"):
    read_folder(folder)


def test_an_index_may_not_leave_its_folder(folder):
  index = shard(folder)
  outside = index | {"lm_head.weight": "../model-00001-of-00002.safetensors"}
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": outside}))
  with pytest.raises(ValueError, match=r"names files outside its folder: \.\./model-00001"):
    read_folder(folder)


# --- tensors that need a decision -----------------------------------------------------------------


def test_two_tensors_for_one_parameter(folder):
  """One under the name in a language model, one under the name in a larger model."""
  duplicate = "language_model.model.norm.weight"
  edit_tensors(folder, lambda t: t.update({duplicate: t["model.norm.weight"].copy()}))
  with pytest.raises(ValueError, match=r"is a second tensor for model\.norm\.weight"):
    read_folder(folder)


def test_the_other_parts_of_a_larger_model_are_dropped(folder):
  extra = {"vision_tower.patch.weight": np.ones((2, 2), np.float32)}
  edit_tensors(folder, lambda t: t.update(extra))
  assert read_folder(folder)[1].keys() == read_folder(UNTIED)[1].keys()


def test_a_tied_head_is_absent_or_equal(tmp_path):
  folder = Path(shutil.copytree(TIED, tmp_path / "model"))
  edit_tensors(
    folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
  )
  assert "lm_head.weight" not in read_folder(folder)[1]
  edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
  with pytest.raises(ValueError, match="tie_word_embeddings"):
    read_folder(folder)


def test_buffers_of_old_exports_are_dropped(folder):
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(6, np.float32)}))
  assert name not in read_folder(folder)[1]


def test_integer_weights_are_refused(folder):
  name = "model.norm.weight"
  edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(32, np.int8)}))
  with pytest.raises(ValueError, match=r"model\.norm\.weight is I8, known: F32, F16, BF16"):
    read_folder(folder)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "damage",
  [
    lambda content: content[:-4],
    lambda content: content[:500],
    lambda content: b"",
    lambda content: b"version https://git-lfs.github.com/spec/v1\n" * 3,
  ],
)
def test_a_damaged_weight_file_is_named(folder, damage):
  path = folder / "model.safetensors"
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match="truncated or is not a safetensors file") as caught:
    read_folder(folder)
  assert str(path) in str(caught.value)


def test_a_folder_without_safetensors_lists_its_files(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match=r"formats are not supported.*pytorch_model"):
    read_folder(folder)


def test_a_folder_without_a_config_is_named(folder):
  (folder / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
    read_folder(folder)


MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists mapped files here")
def test_a_file_is_not_mapped_after_it_was_read():
  weights = open_weights(str(UNTIED))
  weights.read()
  assert "python" in MAPS.read_text()
  assert "model.safetensors" not in MAPS.read_text()
  assert weights.parts  # can still be read again


def test_tied_embeddings_may_be_stored_as_the_head(tmp_path):
  """safetensors keeps the first name of a shared tensor, in alphabetical order."""
  folder = Path(shutil.copytree(TIED, tmp_path / "model"))
  edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
  config, params = load(str(folder))
  assert_holds(params, load_file(TIED / "model.safetensors"), config.layers)
  (folder / "config.json").write_text((UNTIED / "config.json").read_text())
  with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: missing"):
    load(str(folder))


@pytest.mark.parametrize("index", [[], {"lm_head.weight": 5}, {"lm_head.weight": ""}, "x", None])
def test_an_index_of_another_shape_is_named(folder, index):
  shard(folder)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: weight_map must be"):
    read_folder(folder)
