"""Tests that learned reward models score like PyTorch transformers and are reward functions.

fixtures/tiny_llama_reward and tiny_qwen2_reward are random models with the scores that transformers
gives CONVERSATIONS in one padded batch. fixtures/make_tiny_rewards.py made them.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax.models.decoder import Decoder
from grpo_jax.reward_model import RewardModel, scoring
from grpo_jax.tasks.rewards.scoring import RewardError, score

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA, QWEN2 = FIXTURES / "tiny_llama_reward", FIXTURES / "tiny_qwen2_reward"


def load_one(folder, batch_size=4):
  return RewardModel.load(str(folder), batch_size=batch_size, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def llama():
  return load_one(LLAMA)


def case(folder):
  """Returns prompts, completions and their scores."""
  expected = np.load(folder / "expected.npz")
  conversations = json.loads(str(expected["conversations"]))
  prompts = [turns[:-1] for turns in conversations]
  return prompts, [turns[-1]["content"] for turns in conversations], expected["scores"]


@pytest.fixture
def folder(tmp_path):
  """Returns a copy of the Llama fixture that a test may modify."""
  return Path(shutil.copytree(LLAMA, tmp_path / "model"))


def edit_config(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- agreement with PyTorch -----------------------------------------------------------------------


def test_scores_equal_those_of_pytorch(llama):
  prompts, completions, expected = case(LLAMA)
  scores = llama(prompts=prompts, completions=completions, answer=[""] * 10)
  assert all(type(value) is float for value in scores)
  np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_padding_at_the_end_of_a_turn_is_ignored_as_in_pytorch():
  """The last token is also the padding token: transformers reads the one before it."""
  prompts, completions, expected = case(QWEN2)
  model = load_one(QWEN2)
  assert model.tokenizer.encode_exchange(prompts[0], completions[0])[-1] == model.pad_id == 2
  np.testing.assert_allclose(model(prompts, completions), expected, atol=2e-5)


def test_scores_do_not_depend_on_devices(llama):
  prompts, completions, expected = case(LLAMA)
  model = RewardModel.load(str(LLAMA), batch_size=1)
  assert len(model.devices) == 8  # of conftest.py
  np.testing.assert_allclose(model(prompts[::-1], completions[::-1]), expected[::-1], atol=2e-5)


# --- conversations --------------------------------------------------------------------------------


def test_a_text_prompt_is_the_users_turn(llama):
  _, completions, expected = case(LLAMA)  # the first five answer one user message
  np.testing.assert_allclose(llama(["12 + 34"] * 5, completions[:5]), expected[:5], atol=2e-5)


def test_without_a_chat_template_a_completion_continues_the_text(folder):
  (folder / "chat_template.jinja").unlink()
  model = load_one(folder)
  assert model.tokenizer.encode_exchange("12 + ", "34") == model.tokenizer.encode("12 + 34")
  with pytest.raises(ValueError, match="has no chat template"):
    model([[{"role": "user", "content": "12"}]], ["34"])


def test_programs_are_compiled_for_few_lengths(folder, monkeypatch):
  edit_config(folder, max_position_embeddings=200)
  model, shapes, prefill = load_one(folder, batch_size=3), [], Decoder.prefill

  def traced(self, params, tokens, mask):
    shapes.append(tokens.shape)
    return prefill(self, params, tokens, mask)

  monkeypatch.setattr(Decoder, "prefill", traced)
  first = model(["12"] * 4, ["3" * n for n in (1, 30, 2, 20)])
  assert shapes == [(3, 64)]
  assert model(["12"], ["3"]) == pytest.approx(first[:1], abs=1e-6)
  assert shapes == [(3, 64)]
  # The same conversation beside longer ones, and lengths up to the context.
  again = model(["12"] * 3, ["3" * 60, "3", "3" * 90])
  assert again[1] == pytest.approx(first[0], abs=2e-5)
  assert shapes == [(3, 64), (3, 112)]  # the multiples of 16 between 64 and 128
  model(["12"], ["3" * 88])
  assert shapes == [(3, 64), (3, 112)]
  model(["12"], ["3" * 180])
  assert shapes == [(3, 64), (3, 112), (3, 200)]


def test_a_reward_model_is_a_reward_function(llama):
  prompts, completions, expected = case(LLAMA)
  rewards = {"reward_model": (llama, 0.5)}
  texts = [completions[:5], completions[5:]]
  total, per_name = score(rewards, prompts[::5], texts, {"answer": ["46", None]})
  np.testing.assert_allclose(per_name["reward_model"], expected.reshape(2, 5), atol=2e-5)
  np.testing.assert_allclose(total, 0.5 * expected.reshape(2, 5), atol=2e-5)
  assert llama([], []) == []


# --- errors ---------------------------------------------------------------------------------------


def test_a_conversation_beyond_the_context_is_an_error(llama):
  ids = llama.tokenizer.encode_exchange("12", "3" * 90)
  assert len(ids) > 64
  with pytest.raises(ValueError, match=rf"{len(ids)} tokens for .*tiny_llama_reward.* 1 to 64"):
    llama(["12"], ["3" * 90])
  with pytest.raises(RewardError, match=r"(?s)'reward_model'.*completion: '3333"):
    score({"reward_model": (llama, 1.0)}, ["12"], [["1", "3" * 90]], {})


def test_models_without_exactly_one_label_are_rejected(folder):
  with pytest.raises(ValueError, match=r"tiny_llama is a language model; .*\(num_labels=1\)"):
    RewardModel.load(str(FIXTURES / "tiny_llama"))
  edit_config(folder, id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
  tensors = load_file(folder / "model.safetensors")
  tensors["score.weight"] = np.repeat(tensors["score.weight"], 3, axis=0)
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"is a classifier with 3 labels; .*one label"):
    RewardModel.load(str(folder))


def test_a_padding_token_beyond_the_model_is_never_scored(folder):
  """An added [PAD] has id 128, and the model has ids 0..127."""
  path = folder / "tokenizer_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[PAD]"}))
  model = load_one(folder)
  assert (model.tokenizer.vocab_size, model.tokenizer.pad_id) == (128, 2)
  assert load_one(LLAMA)(["12 + 34"], ["46"]) == model(["12 + 34"], ["46"])
  with pytest.raises(ValueError, match=r"token '\[PAD\]' has id 128, .* only ids 0\.\.127"):
    model(["12 + 34"], ["46 [PAD]"])


def test_a_score_that_is_not_finite_is_an_error(folder):
  tensors = load_file(folder / "model.safetensors")
  tensors["score.weight"][0] = np.where(tensors["score.weight"][0] > 0, 3e38, -3e38)
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"returns (-?inf|nan) for '46'"):
    load_one(folder)(["12 + 34"], ["46"])


def test_weights_that_are_not_finite_are_an_error(folder):
  tensors = load_file(folder / "model.safetensors")
  tensors["score.weight"][0, 3] = np.inf
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(ValueError, match="the weights of score hold NaN or infinity"):
    load_one(folder)(["12 + 34"], ["46"])


def test_the_padding_token_of_a_larger_model_is_that_of_its_language_model(tmp_path):
  """Reads what transformers would; a config that does not name it has the family's default, 0."""
  path = tmp_path / "config.json"
  for raw, expected in (
    ({"architectures": ["Gemma3ForSequenceClassification"], "text_config": {"pad_token_id": 7}}, 7),
    ({"architectures": ["Gemma3ForSequenceClassification"], "pad_token_id": 5}, 0),
    ({"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 5}, 5),
    ({"architectures": ["LlamaForSequenceClassification"]}, None),
  ):
    path.write_text(json.dumps(raw))
    assert scoring.read_pad_id(path) == expected, raw
  path.write_text(
    json.dumps({"architectures": ["LlamaForSequenceClassification"], "pad_token_id": "5"})
  )
  with pytest.raises(ValueError, match=r"config\.json: pad_token_id must be an integer or null"):
    scoring.read_pad_id(path)
