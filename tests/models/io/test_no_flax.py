"""Reading a config, the header of a weight file or a tokenizer imports no flax."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import tiny_gguf

ROOT = Path(__file__).parents[3]
CODE = """
import sys

from grpo_jax import tokens
from grpo_jax.models.io import presets, weights
from grpo_jax.models.io.sources import Source

folder, gguf = sys.argv[1:]
assert presets.config_of(folder).layers == 2
assert weights.open_files(Source("folder", folder)).shapes["embed"].shape == (128, 32)
assert weights.open_files(Source("gguf", gguf)).shapes["embed"].shape == (264, 64)
assert tokens.load_tokenizer(folder).vocab_size == 128
assert tokens.load_tokenizer(gguf).vocab_size == 264
assert not {"flax", "grpo_jax.models.decoder"} & set(sys.modules)

import grpo_jax.models.load
assert "flax" in sys.modules, "nothing imports flax, so this test shows nothing"
"""


def test_reading_a_model_imports_no_flax(tmp_path):
  tiny_gguf.write(tmp_path / "model.gguf")
  arguments = [ROOT / "tests" / "fixtures" / "tiny_llama", tmp_path / "model.gguf"]
  environment = dict(os.environ, PYTHONPATH=str(ROOT))
  subprocess.run(
    [sys.executable, "-c", CODE, *map(str, arguments)],
    check=True,
    env=environment,
    cwd=ROOT,
    timeout=120,
  )
