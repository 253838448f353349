"""Tests that models known by name have the sizes of their published files."""

import json

import jax
import pytest

from grpo_jax.models.io.presets import PRESETS, config_of
from grpo_jax.models.io.weights import shapes_of


@pytest.mark.parametrize(
  ("name", "count"),
  [  # from the model cards and the files on the hub, tied heads counted once
    ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ("Qwen/Qwen3-0.6B", 596_049_920),
    ("Qwen/Qwen3-1.7B", 1_720_574_976),
    ("Qwen/Qwen3-8B", 8_190_735_360),
    ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
    ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
    ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    ("allenai/OLMoE-1B-7B-0924", 6_919_161_856),
    ("openai/gpt-oss-20b", 20_914_757_184),
    ("allenai/OLMo-2-0425-1B-Instruct", 1_484_916_736),
    ("microsoft/phi-4", 14_659_507_200),
    ("zai-org/GLM-4-9B-0414", 9_400_279_040),
  ],
)
def test_known_models_have_their_number_of_parameters(name, count):
  shapes = shapes_of(config_of(name))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_a_folder_with_only_a_config_is_enough(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(PRESETS["Qwen/Qwen3-0.6B"]))
  assert config_of(str(tmp_path)) == config_of("Qwen/Qwen3-0.6B")
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    config_of(str(tmp_path.parent / tmp_path.name / ".."))
