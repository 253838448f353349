"""Tests that an exported folder loads as the same model, and that a failed export leaves nothing.

`fixtures/interop.py` checks that PyTorch transformers loads it too, where torch is installed.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from grpo_jax import export
from grpo_jax.config import default_config
from grpo_jax.export import export_model
from grpo_jax.learning.step import TrainState
from grpo_jax.models import lora
from grpo_jax.models.load import load, open_weights
from grpo_jax.reward_model import RewardModel
from grpo_jax.run import checkpoint
from grpo_jax.run import workdir as workdirs
from grpo_jax.tasks import make_task
from grpo_jax.tokens import load_tokenizer
from tests.helpers import tiny_gguf

FIXTURES = Path(__file__).parent / "fixtures"
LLAMA = FIXTURES / "tiny_llama"
NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CHAT = [{"role": "user", "content": "12 + 34"}]


def assert_same(params, expected):
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("name", sorted(f.name for f in (FIXTURES / "families").iterdir()))
def test_an_exported_model_loads_bit_for_bit(tmp_path, name, dtype):
  """Returns random float32 numbers, so that conversion to the narrow dtypes rounds."""
  source, rng = str(FIXTURES / "families" / name), np.random.default_rng(0)
  config, params = load(source)
  params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params)
  export_model(config, params, source, tmp_path / "out", dtype)
  loaded_config, loaded = load(str(tmp_path / "out"))
  assert loaded_config == config
  assert_same(loaded, jax.tree.map(lambda a: a.astype(NUMPY[dtype]).astype(np.float32), params))
  stored = load_file(tmp_path / "out" / "model.safetensors")
  assert {value.dtype for value in stored.values()} == {np.dtype(NUMPY[dtype])}


def test_an_export_has_the_files_of_transformers(tmp_path):
  config, params = load(str(LLAMA))
  files = export_model(config, params, str(LLAMA), tmp_path / "out")
  assert files == sorted(f.name for f in LLAMA.iterdir() if f.name != "expected.npz")
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
               "generation_config.json"):  # fmt: skip
    assert (tmp_path / "out" / name).read_bytes() == (LLAMA / name).read_bytes()
  stored, original = (load_file(f / "model.safetensors") for f in (tmp_path / "out", LLAMA))
  assert stored.keys() == original.keys()
  for name, value in original.items():
    np.testing.assert_array_equal(stored[name], value, err_msg=name)
  for file in (tmp_path / "out").iterdir():
    assert file.stat().st_mode & 0o044 == 0o044, f"only its owner can read {file.name}"


def test_a_large_model_is_split_into_files_with_an_index(tmp_path):
  config, params = load(str(LLAMA))
  out = tmp_path / "out"
  export_model(config, params, str(LLAMA), out, shard_bytes=40_000)
  files = sorted(out.glob("*.safetensors"))
  assert [f.name for f in files] == [f"model-{i}-of-00004.safetensors" for i in
                                     ("00001", "00002", "00003", "00004")]  # fmt: skip
  contents = {file.name: load_file(file) for file in files}
  index = json.loads((out / "model.safetensors.index.json").read_text())
  assert index["weight_map"] == {name: file for file, part in contents.items() for name in part}
  sizes = [sum(value.nbytes for value in part.values()) for part in contents.values()]
  assert max(sizes) <= 40_000
  assert index["metadata"]["total_size"] == sum(sizes)
  assert_same(load(str(out))[1], params)


def test_a_multimodal_source_is_exported_as_its_language_model(tmp_path):
  source = FIXTURES / "families" / "gemma3_multimodal"
  config, params = load(str(source))
  export_model(config, params, str(source), tmp_path / "out", "bfloat16")
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (raw["architectures"], raw["model_type"]) == (["Gemma3ForCausalLM"], "gemma3_text")
  assert "vision_config" not in raw
  assert raw["eos_token_id"] == 2


def test_a_source_that_is_not_a_folder_gets_all_files(tmp_path):
  tiny_gguf.write(tmp_path / "model.gguf")
  for source, out in ((str(tmp_path / "model.gguf"), "gguf"), ("random:tiny", "random")):
    config, params = load(source)
    out = tmp_path / out
    export_model(config, params, source, out)
    assert load(str(out))[0] == config
    assert_same(load(str(out))[1], params)
    original, written = load_tokenizer(source), load_tokenizer(str(out))
    text = "12 + 34 = 46, hé\n日本 <tool>"
    assert written.encode(text) == original.encode(text)
    assert written.decode(original.encode(text)) == text
    assert written.chat(CHAT) == original.chat(CHAT)
    assert (written.eos_ids, written.pad_id) == (original.eos_ids, original.pad_id)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_language_model_becomes_a_classifier_of_transformers(tmp_path):
  """The scores were computed by AutoModelForSequenceClassification in the exported folder.

  With torch 2.13.0 (CPU) and transformers 5.23.0, on the four conversations in one batch, padded on
  the right by the folder's tokenizer.
  """
  weights, out = open_weights(str(LLAMA)).with_score(), tmp_path / "out"
  score = np.cos(np.arange(32, dtype=np.float32))[None]
  params = weights.read() | {"score": score}
  export_model(weights.config, params, str(LLAMA), out, pad_id=2)
  raw = json.loads((out / "config.json").read_text())
  assert raw["architectures"] == ["LlamaForSequenceClassification"]
  assert (raw["id2label"], raw["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
  assert raw["pad_token_id"] == 2
  assert_same(load(str(out))[1], params)
  model = RewardModel.load(str(out), devices=jax.devices()[:1])
  scores = model(["12 + 34"] * 4, ["46", "", "the answer is 46.", "?"])
  np.testing.assert_allclose(scores, [-1.56964, -8.43911, 2.87704, -8.80515], atol=5e-5)


@pytest.mark.parametrize("source", ["random:tiny", str(FIXTURES / "families/gemma3_multimodal")])
def test_other_sources_become_classifiers_too(tmp_path, source):
  weights = open_weights(source).with_score()
  export_model(weights.config, weights.read(), source, tmp_path / "out", pad_id=3)
  assert open_weights(str(tmp_path / "out")).config == weights.config
  assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 3


def test_fields_that_do_not_hold_for_the_exported_model_are_dropped(tmp_path):
  source = Path(shutil.copytree(LLAMA, tmp_path / "source"))
  raw = json.loads((source / "config.json").read_text())
  del raw["dtype"]
  raw |= {"auto_map": {"AutoModel": "modeling.Model"}, "torch_dtype": "float16"}
  (source / "config.json").write_text(json.dumps(raw))
  config, params = load(str(source))
  export_model(config, params, str(source), tmp_path / "out", "bfloat16")
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["dtype"] == "bfloat16"
  assert not {"auto_map", "torch_dtype"} & set(written)


# --- all or nothing ------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
  config, params = load(str(LLAMA))
  (tmp_path / "out").mkdir()
  export_model(config, params, str(LLAMA), tmp_path / "out")  # an empty folder is allowed
  (tmp_path / "file").write_text("mine")
  for taken in ("out", "file"):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=f"{taken} exists and is not an empty folder"):
      export_model(config, params, str(LLAMA), tmp_path / taken)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_export_leaves_nothing(tmp_path):
  config, params = load(str(LLAMA))
  large = params | {"embed": np.full_like(params["embed"], 1e6)}
  adapted = lora.with_adapters(params, lora.init(jax.random.key(0), params, "q", 2))
  for bad_params, dtype, message in (
    (large, "float16", r"model\.embed_tokens\.weight holds NaN or infinity as float16"),
    (adapted, "float32", r"layers/q_lora_a: \(2, 32, 2\), expected None"),
    ({"embed": params["embed"]}, "float32", "final_norm: None, expected "),
    (params | {"embed": params["embed"][:5]}, "float32", r"embed: \(5, 32\), expected \(128, 32\)"),
  ):
    with pytest.raises(ValueError, match=message):
      export_model(config, bad_params, str(LLAMA), tmp_path / "out", dtype)
    assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match="dtype is 'int8', known: float32, bfloat16, float16"):
    export_model(config, params, str(LLAMA), tmp_path / "out", "int8")
  with pytest.raises(ValueError, match="is not the model of"):
    export_model(config, params, str(FIXTURES / "families" / "qwen2"), tmp_path / "out")
  assert not list(tmp_path.iterdir())


# --- runs -----------------------------------------------------------------------------------------


def save_run(workdir, trained, steps, **changes):
  """Writes a work directory of a run from tiny_llama with checkpoints of `steps`."""
  settings = default_config()
  with settings.unlocked():
    settings.model.source = str(LLAMA)
    settings.update(changes)
  workdir.mkdir()
  workdirs.write_config(workdir, settings.to_dict())
  trained = jax.tree.map(jnp.asarray, trained)
  with checkpoint.Checkpoints(workdir, keep=5) as saved:
    for step in steps:
      params = jax.tree.map(lambda a: a + step, trained)  # noqa: B023 - used at once
      saved.save(step, TrainState(jnp.int32(step), params, optax.adam(0.1).init(params)))


def test_a_run_is_exported_by_one_command(tmp_path, capsys):
  _, params = load(str(LLAMA))
  save_run(tmp_path / "run", params, (3, 7))
  command = ["--workdir", str(tmp_path / "run"), "--out"]
  assert export.main([*command, str(tmp_path / "new")]) == 0
  assert "after 7 steps" in capsys.readouterr().out
  assert_same(load(str(tmp_path / "new"))[1], jax.tree.map(lambda a: a + np.float32(7), params))
  assert export.main([*command, str(tmp_path / "old"), "--step", "3"]) == 0
  assert_same(load(str(tmp_path / "old"))[1], jax.tree.map(lambda a: a + np.float32(3), params))
  for arguments, message in (
    ([*command, str(tmp_path / "old")], "not an empty folder"),
    ([*command, str(tmp_path / "x"), "--step", "4"], "no checkpoint of step 4"),
    ([*command, str(tmp_path / "x"), "--adapter"], "--adapter is for the --workdir of a run with"),
    (["--out", "x"], "give either --workdir"),
    (["--out", "x", "--workdir", str(tmp_path)], "not a work directory"),
  ):
    assert export.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_lora_run_is_exported_merged_or_as_adapters(tmp_path):
  config, params = load(str(LLAMA))
  rng = np.random.default_rng(0)
  adapters = lora.init(jax.random.key(0), params, "q|down", 2)
  adapters = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), adapters)
  save_run(tmp_path / "run", adapters, (0,), lora={"rank": 2, "alpha": 6.0, "targets": "q|down"})
  command = ["--workdir", str(tmp_path / "run"), "--out"]
  assert export.main([*command, str(tmp_path / "merged")]) == 0
  merged = load(str(tmp_path / "merged"))[1]
  for name in ("q", "down"):
    a, b = (adapters["layers"][f"{name}_lora_{part}"] for part in "ab")
    expected = params["layers"][name] + 3.0 * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(merged["layers"][name], expected, atol=1e-5)
    merged["layers"][name] = params["layers"][name]
  assert_same(merged, params)
  assert export.main([*command, str(tmp_path / "adapters"), "--adapter"]) == 0
  loaded, rank, alpha = lora.load_peft(tmp_path / "adapters", config)
  assert (rank, alpha) == (2, 6.0)
  assert_same(loaded, adapters)


# --- generation settings --------------------------------------------------------------------------


def generation_config(folder):
  from transformers import GenerationConfig

  return GenerationConfig.from_pretrained(str(folder)).to_dict()


def test_an_exported_run_generates_as_it_sampled(tmp_path, capsys):
  """The stops of the run and of its task; nothing is filtered, whatever the source says."""
  source = Path(shutil.copytree(LLAMA, tmp_path / "source"))
  ids = {"bos_token_id": 1, "eos_token_id": [2], "top_k": 20, "temperature": 0.3}
  (source / "generation_config.json").write_text(json.dumps(ids))
  changes = {
    "model": {"source": str(source)},
    "task": {"name": "letters"},
    "rollout": {"temperature": 0.8, "completion_length": 33, "stop": ("END",), "stop_ids": (5,)},
  }
  save_run(tmp_path / "run", load(str(LLAMA))[1], (1,), **changes)
  command = ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
  assert export.main(command) == 0
  settings = generation_config(tmp_path / "out")
  expected = {
    "do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "max_new_tokens": 33,
    "eos_token_id": [2, 5], "bos_token_id": 1, "stop_strings": [*make_task("letters").stop, "END"],
  }  # fmt: skip
  assert {name: settings[name] for name in expected} == expected
  assert load_tokenizer(str(tmp_path / "out")).eos_ids[:2] == (2, 5)
  assert capsys.readouterr().err == ""


def test_ids_beyond_the_model_are_in_no_exported_settings(tmp_path):
  """Pads as the run does: an added [PAD] has id 128, and the model has ids 0..127."""
  source = Path(shutil.copytree(LLAMA, tmp_path / "source"))
  path = source / "tokenizer_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[PAD]"}))
  changes = {"model": {"source": str(source)}, "task": {"name": "letters"}}
  save_run(tmp_path / "run", load(str(LLAMA))[1], (1,), **changes)
  assert export.main(["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
  settings = generation_config(tmp_path / "out")
  assert (settings["pad_token_id"], settings["eos_token_id"]) == (2, [2])


def test_a_task_that_cannot_be_built_is_a_warning(tmp_path, capsys):
  task = {"name": "jsonl", "settings": {"path": "none.jsonl", "reward": "exact"}}
  save_run(tmp_path / "run", load(str(LLAMA))[1], (1,), task=task)
  command = ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
  assert export.main(command) == 0
  assert (
    "task 'jsonl' cannot be built (FileNotFoundError: no such file: none.jsonl"
    in capsys.readouterr().err
  )
  assert "stop_strings" not in (tmp_path / "out" / "generation_config.json").read_text()
