"""Who may import whom: the table of the design, held to by parsing every file."""

import ast
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
  path.relative_to(ROOT)
  .with_suffix("")
  .as_posix()
  .replace("/", ".")
  .removesuffix(".__init__"): path
  for folder in ("grpo_jax", "experiments")
  for path in sorted((ROOT / folder).rglob("*.py"))
}

# The first pattern that fits a module says what it may import beside the standard library.
ALLOWED = {
  "grpo_jax": "grpo_jax.core grpo_jax.testing",
  "grpo_jax.core*": "grpo_jax.core jax numpy jaxtyping",
  "grpo_jax.testing": "jax numpy",
  "grpo_jax.errors": "",
  "grpo_jax.models.config": "",
  "grpo_jax.models.protocol": "jaxtyping",
  "grpo_jax.models.io*": (
    "grpo_jax.errors grpo_jax.models.io grpo_jax.models.config grpo_jax.models.rope "
    "grpo_jax.models.protocol safetensors gguf huggingface_hub jax numpy jaxtyping"
  ),
  "grpo_jax.models*": "grpo_jax.core grpo_jax.models flax safetensors jax numpy jaxtyping",
  "grpo_jax.tasks*": (
    "grpo_jax.tasks numpy jaxtyping reasoning_gym math_verify tensorflow_datasets pyarrow"
  ),
  "grpo_jax.tokens": (
    "grpo_jax.errors grpo_jax.models.io.gguf grpo_jax.models.io.json_files "
    "grpo_jax.models.io.sources transformers tokenizers numpy jaxtyping"
  ),
  "grpo_jax.data": "grpo_jax.tasks grain numpy",
  "grpo_jax.sampling.compaction": "jax jaxtyping",
  "grpo_jax.sampling": "grpo_jax.core grpo_jax.sampling.compaction jax numpy jaxtyping",
  "grpo_jax.learning.step": (
    "grpo_jax.core grpo_jax.learning.skipping grpo_jax.learning.deterministic grpo_jax.distributed.mesh jax numpy jaxtyping optax"
  ),
  "grpo_jax.learning.skipping": "jax",
  "grpo_jax.run.compilation": "jax",
  "grpo_jax.learning.deterministic": "grpo_jax.distributed.mesh jax",
  "grpo_jax.config": "ml_collections",
  "grpo_jax.run.workdir": "",
  "grpo_jax.statistics": "numpy jaxtyping",
  "grpo_jax.learning.reduction": "",
  "grpo_jax.run.signals": "grpo_jax.distributed",
  "grpo_jax.distributed.cluster": "jax",
  "grpo_jax.distributed": "grpo_jax.distributed.cluster grpo_jax.distributed.mesh jax numpy",
  "grpo_jax.export": (
    "grpo_jax.run.checkpoint grpo_jax.config grpo_jax.run.workdir grpo_jax.models grpo_jax.tokens jax "
    "numpy ml_collections orbax tokenizers"
  ),
  "experiments*": "ml_collections grpo_jax.config",
}
# Modules without a line above may import all but these, which have one home each.
NOT_ELSEWHERE = (
  "flax safetensors gguf huggingface_hub transformers tokenizers reasoning_gym math_verify "
  "tensorflow_datasets pyarrow grpo_jax.train"
)
# And these may import still less than the others without a line.
NOT_HERE = {
  "grpo_jax.rollout": "grpo_jax.models grpo_jax.build grpo_jax.config ml_collections optax orbax",
  "grpo_jax.learning.optimizer": "grpo_jax.models grpo_jax.build grpo_jax.config ml_collections",
  "grpo_jax.distributed.mesh": "grpo_jax.models grpo_jax.build grpo_jax.config ml_collections",
  "grpo_jax.run.metrics": "grpo_jax.models grpo_jax.build grpo_jax.config ml_collections",
  "grpo_jax.run.checkpoint": "grpo_jax.models grpo_jax.build grpo_jax.config ml_collections",
  "grpo_jax.reward_model": "grpo_jax.build grpo_jax.config ml_collections optax orbax",
}


def imports(module: str, source: str, is_package: bool = False) -> set[str]:
  """Full names of all that a module imports, at its top or inside functions."""
  package = module.split(".") if is_package else module.split(".")[:-1]
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      parts = package[: len(package) + 1 - node.level] if node.level else []
      base = ".".join(parts + ([node.module] if node.module else []))
      for alias in node.names:
        full = f"{base}.{alias.name}"
        names.add(full if full in MODULES else base)
  return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


def within(name: str, prefixes: str) -> bool:
  return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes.split())


def forbidden(module: str, imported: set[str]) -> set[str]:
  """Those of the imports that the table does not allow."""
  for pattern, allowed in ALLOWED.items():
    if fnmatchcase(module, pattern):
      return {name for name in imported if not within(name, allowed)}
  banned = f"{NOT_ELSEWHERE} {NOT_HERE.get(module, '')}"
  return {name for name in imported if within(name, banned)}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_table_allows(module):
  path = MODULES[module]
  found = imports(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
  assert not forbidden(module, found), f"{path.relative_to(ROOT)} may not import these"


@pytest.mark.parametrize(
  ("module", "source", "wanted"),
  [
    ("grpo_jax.core.losses", "import jax.numpy as jnp, os\nfrom grpo_jax.core import kl", set()),
    ("grpo_jax.core.losses", "from flax import linen", {"flax"}),
    ("grpo_jax.core.losses", "def f():\n  import optax", {"optax"}),
    ("grpo_jax.core.losses", "from grpo_jax import sampling", {"grpo_jax.sampling"}),
    ("grpo_jax.core.losses", "from ..models import decoder", {"grpo_jax.models.decoder"}),
    ("grpo_jax.core.losses", "from .. import policy_loss", {"grpo_jax"}),
    ("grpo_jax.core.losses", "from .kl import KLS", set()),
    ("grpo_jax.tasks.new", "import jax.numpy as jnp", {"jax.numpy"}),
    ("grpo_jax.tasks.new", "import jaxtyping", set()),
    ("grpo_jax.models.new", "from grpo_jax.tasks import base", {"grpo_jax.tasks.base"}),
    ("grpo_jax.models.io.new", "import flax.linen", {"flax.linen"}),
    (
      "grpo_jax.models.io.new",
      "def f():\n  from grpo_jax.models.decoder import Decoder",
      {"grpo_jax.models.decoder"},
    ),
    ("grpo_jax.learning.step", "import grpo_jax.models.decoder", {"grpo_jax.models.decoder"}),
    ("grpo_jax.rollout", "from grpo_jax.models import decoder", {"grpo_jax.models.decoder"}),
    ("grpo_jax.evaluate", "from grpo_jax.train import run", {"grpo_jax.train"}),
    ("grpo_jax.something_new", "import flax.linen as nn\nimport rich", {"flax.linen"}),
    ("experiments.new", "import jax", {"jax"}),
    ("experiments.new", "from grpo_jax.config import default_config", set()),
  ],
)
def test_the_table_catches(module, source, wanted):
  assert forbidden(module, imports(module, source)) == wanted


def test_relative_imports_of_a_package_are_resolved():
  assert imports("grpo_jax.core", "from .kl import KLS", is_package=True) == {"grpo_jax.core.kl"}


def test_importing_the_package_loads_jax_and_numpy_only_and_touches_no_device():
  """On a platform that does not exist, the first touch of a device fails: the import does not."""
  code = """
import sys
import grpo_jax, grpo_jax.testing
heavy = {"flax", "optax", "orbax", "transformers", "ml_collections", "grain", "gguf", "safetensors",
         "tokenizers", "huggingface_hub", "reasoning_gym", "matplotlib", "rich", "torch",
         "tensorflow", "tensorflow_datasets", "pyarrow"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert {"jax", "numpy"} <= set(sys.modules)
ours = {name for name in sys.modules if name.startswith("grpo_jax.")}
assert all(name == "grpo_jax.testing" or name.startswith("grpo_jax.core") for name in ours), ours
import jax
try:
  jax.devices()
except RuntimeError as error:
  assert "no_such_platform" in str(error), error
else:
  raise SystemExit("the platform was not read, so this test shows nothing")
"""
  environment = dict(os.environ, JAX_PLATFORMS="no_such_platform", PYTHONPATH=str(ROOT))
  subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT, timeout=120)
