"""Learned reward models: the scores of PyTorch transformers, and a plain reward function.

fixtures/tiny_llama_reward and tiny_qwen2_reward are random models with the scores that transformers
gives to CONVERSATIONS in one padded batch; how they were made is in fixtures/make_tiny_rewards.py.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax import reward_model
from grpo_jax.models.decoder import Decoder
from grpo_jax.reward_model import RewardModel
from grpo_jax.tasks.rewards.scoring import RewardError, score

FIXTURES = Path(__file__).parent / "fixtures"
LLAMA, QWEN2 = FIXTURES / "tiny_llama_reward", FIXTURES / "tiny_qwen2_reward"


def load_one(folder, batch_size=4):
  return RewardModel.load(str(folder), batch_size=batch_size, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def llama():
  return load_one(LLAMA)


def case(folder):
  """Prompts, completions and their scores."""
  expected = np.load(folder / "expected.npz")
  conversations = json.loads(str(expected["conversations"]))
  prompts = [turns[:-1] for turns in conversations]
  return prompts, [turns[-1]["content"] for turns in conversations], expected["scores"]


@pytest.fixture
def folder(tmp_path):
  """A copy of the Llama fixture that a test may change."""
  return Path(shutil.copytree(LLAMA, tmp_path / "model"))


def edit_config(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- agreement with PyTorch -----------------------------------------------------------------------


def test_scores_are_those_of_pytorch(llama):
  prompts, completions, want = case(LLAMA)
  got = llama(prompts=prompts, completions=completions, answer=[""] * 10)
  assert all(type(value) is float for value in got)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_padding_that_ends_a_turn_is_left_out_as_in_pytorch():
  """The last token is the padding token too: transformers reads the one before."""
  prompts, completions, want = case(QWEN2)
  model = load_one(QWEN2)
  assert model.tokenizer.answered(prompts[0], completions[0])[-1] == model.pad_id == 2
  np.testing.assert_allclose(model(prompts, completions), want, atol=2e-5)


def test_scores_do_not_depend_on_devices(llama):
  prompts, completions, want = case(LLAMA)
  model = RewardModel.load(str(LLAMA), batch_size=1)
  assert len(model.devices) == 8  # of conftest.py
  np.testing.assert_allclose(model(prompts[::-1], completions[::-1]), want[::-1], atol=2e-5)


# --- what is scored -------------------------------------------------------------------------------


def test_a_text_prompt_is_the_users_turn(llama):
  _, completions, want = case(LLAMA)  # the first five answer one user message
  np.testing.assert_allclose(llama(["12 + 34"] * 5, completions[:5]), want[:5], atol=2e-5)


def test_without_a_chat_template_a_completion_continues_the_text(folder):
  (folder / "chat_template.jinja").unlink()
  model = load_one(folder)
  assert model.tokenizer.answered("12 + ", "34") == model.tokenizer.encode("12 + 34")
  with pytest.raises(ValueError, match="has no chat template"):
    model([[{"role": "user", "content": "12"}]], ["34"])


def test_few_lengths_are_compiled(folder, monkeypatch):
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
  # Beside longer ones, which are computed with them, and up to the context.
  again = model(["12"] * 3, ["3" * 60, "3", "3" * 100])
  assert again[1] == pytest.approx(first[0], abs=2e-5)
  assert shapes == [(3, 64), (3, 128)]
  model(["12"], ["3" * 150])
  assert shapes == [(3, 64), (3, 128), (3, 200)]


def test_it_is_a_reward_function(llama):
  prompts, completions, want = case(LLAMA)
  rewards = {"reward_model": (llama, 0.5)}
  texts = [completions[:5], completions[5:]]
  total, per_name = score(rewards, prompts[::5], texts, {"answer": ["46", None]})
  np.testing.assert_allclose(per_name["reward_model"], want.reshape(2, 5), atol=2e-5)
  np.testing.assert_allclose(total, 0.5 * want.reshape(2, 5), atol=2e-5)
  assert llama([], []) == []


# --- mistakes -------------------------------------------------------------------------------------


def test_too_long_a_conversation_is_an_error_that_shows_it(llama):
  ids = llama.tokenizer.answered("12", "3" * 90)
  assert len(ids) > 64
  with pytest.raises(ValueError, match=rf"{len(ids)} tokens under .*tiny_llama_reward.* 1 to 64"):
    llama(["12"], ["3" * 90])
  with pytest.raises(RewardError, match=r"(?s)'reward_model'.*completion: '3333"):
    score({"reward_model": (llama, 1.0)}, ["12"], [["1", "3" * 90]], {})


def test_a_model_has_one_label(folder):
  with pytest.raises(ValueError, match=r"tiny_llama is a language model; .*\(num_labels=1\)"):
    RewardModel.load(str(FIXTURES / "tiny_llama"))
  edit_config(folder, id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
  tensors = load_file(folder / "model.safetensors")
  tensors["score.weight"] = np.repeat(tensors["score.weight"], 3, axis=0)
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"is a classifier with 3 labels; .*one label"):
    RewardModel.load(str(folder))


def test_a_tokenizer_of_another_model_is_refused(monkeypatch, llama):
  other = type("Larger", (), {"vocab_size": 129})
  monkeypatch.setattr(reward_model, "load_tokenizer", lambda source: other)
  with pytest.raises(ValueError, match="has 129 ids, its model only 128"):
    RewardModel.load(str(LLAMA))


def test_a_score_that_is_no_number_stops(folder):
  tensors = load_file(folder / "model.safetensors")
  tensors["score.weight"][0, 3] = np.inf
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"gives (-?inf|nan) to '46'"):
    load_one(folder)(["12 + 34"], ["46"])
