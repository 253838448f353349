"""Holds the imports of every file to the table of allowed arrows between the folders."""

import ast
import graphlib
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
  for folder in ("grpo_jax", "experiments", "examples")
  for path in sorted((ROOT / folder).rglob("*.py"))
}

ARRAYS = "jax numpy jaxtyping"
HELPERS = "grpo_jax.errors grpo_jax.extras grpo_jax.addresses"  # standard library only
TASKS = "grpo_jax.tasks grpo_jax.environments"
RUN = "orbax matplotlib rich tensorboardX wandb trackio"
ENGINE = "grpo_jax.core grpo_jax.models.protocol grpo_jax.distributed grpo_jax.statistics"

# A module may import what the first pattern that fits it lists, beside the standard library.
ALLOWED = {
  "grpo_jax": "grpo_jax.core grpo_jax.testing",
  "grpo_jax.addresses": "",
  "grpo_jax.errors": "",
  "grpo_jax.extras": "",
  "grpo_jax.testing": "jax numpy",
  "grpo_jax.statistics": "numpy jaxtyping",
  # What is promised to other projects.
  "grpo_jax.core*": f"grpo_jax.core {ARRAYS}",
  # Families of interchangeable members.
  "grpo_jax.models.config": HELPERS,
  "grpo_jax.models.protocol": f"grpo_jax.core.checks grpo_jax.models.config {ARRAYS}",
  "grpo_jax.models.io*": (
    "grpo_jax.models.config grpo_jax.models.io grpo_jax.models.protocol grpo_jax.models.rope "
    f"{HELPERS} {ARRAYS} safetensors gguf huggingface_hub tokenizers"
  ),
  "grpo_jax.models*": f"grpo_jax.core grpo_jax.models {HELPERS} {ARRAYS} flax safetensors",
  "grpo_jax.tasks*": (
    f"{TASKS} {HELPERS} numpy jaxtyping reasoning_gym math_verify sympy tensorflow_datasets "
    "pyarrow huggingface_hub"
  ),
  "grpo_jax.environments*": (
    f"{TASKS} {HELPERS} numpy jaxtyping jinja2 transformers websockets textarena"
  ),
  # The engine. It gets the model, the optimizer and the tokenizer as arguments.
  "grpo_jax.distributed*": f"grpo_jax.distributed {HELPERS} {ARRAYS}",
  "grpo_jax.learning*": f"{ENGINE} grpo_jax.learning {HELPERS} {ARRAYS} optax",
  "grpo_jax.sampling.sampler": (
    f"{ENGINE} grpo_jax.sampling grpo_jax.tokens grpo_jax.learning.deterministic {HELPERS} {ARRAYS}"
  ),
  "grpo_jax.sampling.turns": (
    f"{ENGINE} grpo_jax.sampling grpo_jax.tokens grpo_jax.learning.deterministic {HELPERS} {ARRAYS}"
  ),
  "grpo_jax.sampling.partial": (f"{ENGINE} grpo_jax.sampling grpo_jax.tokens {HELPERS} {ARRAYS}"),
  "grpo_jax.sampling*": f"{ENGINE} grpo_jax.sampling {HELPERS} {ARRAYS}",
  # What stands between text and arrays.
  "grpo_jax.tokens": (
    "grpo_jax.models.config grpo_jax.models.io grpo_jax.environments.templates "
    f"{HELPERS} transformers tokenizers numpy jaxtyping"
  ),
  "grpo_jax.data": f"grpo_jax.tasks {HELPERS} grain numpy",
  "grpo_jax.curriculum": f"grpo_jax.tasks {HELPERS} numpy jaxtyping",
  "grpo_jax.reward_model": "grpo_jax.reward_model.scoring",
  "grpo_jax.reward_model.scoring": (
    f"grpo_jax.models grpo_jax.tokens grpo_jax.distributed grpo_jax.core {HELPERS} {ARRAYS}"
  ),
  "grpo_jax.reward_model.pairs": (
    f"grpo_jax.reward_model.scoring grpo_jax.tokens {TASKS} {HELPERS} numpy jaxtyping"
  ),
  "grpo_jax.teachers": "grpo_jax.models grpo_jax.tokens",
  "grpo_jax.observations": "grpo_jax.tokens",
  "grpo_jax.episodes": (
    f"{ENGINE} grpo_jax.sampling grpo_jax.tokens grpo_jax.observations {TASKS} {HELPERS} {ARRAYS}"
  ),
  "grpo_jax.demonstrations": (
    "grpo_jax.tasks.base grpo_jax.tasks.messages grpo_jax.tokens numpy jaxtyping"
  ),
  "grpo_jax.token_records": "grpo_jax.episodes grpo_jax.sampling grpo_jax.tokens numpy",
  "grpo_jax.rollout": (
    f"{ENGINE} grpo_jax.learning grpo_jax.sampling grpo_jax.tokens grpo_jax.episodes "
    f"grpo_jax.demonstrations grpo_jax.token_records {TASKS} {HELPERS} {ARRAYS}"
  ),
  # What keeps a run. It does not know how a run is built.
  "grpo_jax.run.output": (
    f"{ENGINE} grpo_jax.run grpo_jax.learning grpo_jax.rollout grpo_jax.evaluate "
    f"{HELPERS} {ARRAYS} {RUN}"
  ),
  "grpo_jax.run.health": "grpo_jax.core numpy ml_collections",
  "grpo_jax.run.completions": "grpo_jax.core grpo_jax.run numpy",
  "grpo_jax.run.gcs": "grpo_jax.run google requests urllib3",
  "grpo_jax.run.s3": "grpo_jax.run boto3 botocore urllib3",
  "grpo_jax.run*": f"{ENGINE} grpo_jax.run grpo_jax.learning {HELPERS} {ARRAYS} {RUN}",
  "grpo_jax.report*": (
    f"grpo_jax.report grpo_jax.config grpo_jax.core grpo_jax.run {HELPERS} ml_collections"
  ),
  "grpo_jax.model_card": (
    f"grpo_jax.config grpo_jax.core grpo_jax.run {HELPERS} ml_collections huggingface_hub"
  ),
  # Settings.
  "grpo_jax.config": f"{HELPERS} ml_collections",
  "experiments.shorter_wins.make_pairs": "reward",  # the file beside it
  "experiments*": "grpo_jax.config ml_collections",
  # Programs over public functions: no config and no work directory.
  "examples*": (
    "grpo_jax grpo_jax.core grpo_jax.models grpo_jax.tasks grpo_jax.environments grpo_jax.sampling "
    "grpo_jax.learning grpo_jax.distributed grpo_jax.rollout grpo_jax.tokens grpo_jax.data "
    f"grpo_jax.testing {ARRAYS} optax flax equinox"
  ),
}
# All other modules build a run or are commands. They may import anything but these.
NOT_IN_COMMANDS = (
  "flax safetensors gguf huggingface_hub transformers tokenizers reasoning_gym math_verify "
  "sympy tensorflow_datasets pyarrow grpo_jax.train"
)
# No path of imports, however long, leads from a module to these.
NOT_REACHED = {
  "grpo_jax.core*": "flax optax grpo_jax.models grpo_jax.learning grpo_jax.sampling",
  "grpo_jax.models.config": "jax flax",
  "grpo_jax.models.io*": "flax",
  "grpo_jax.tokens": "flax",
  "grpo_jax.tasks*": "jax flax",
  "grpo_jax.environments*": "jax flax",
  "grpo_jax.sampling*": "flax ml_collections grpo_jax.run grpo_jax.config",
  "grpo_jax.learning*": "flax ml_collections grpo_jax.run grpo_jax.config",
}
# Libraries that load slowly or come with an extra: imported inside the function that needs them.
LAZY = (
  "reasoning_gym math_verify sympy tensorflow_datasets pyarrow grain gguf huggingface_hub "
  "safetensors transformers tokenizers matplotlib rich tensorboardX wandb trackio websockets "
  "textarena google boto3 botocore requests urllib3"
)


def imports(module: str, source: str, is_package: bool = False, lazy: bool = True) -> set[str]:
  """Returns the full names of what a module imports, without the standard library.

  Args:
    module: dotted name, for relative imports.
    source: its text.
    is_package: whether it is an `__init__.py`.
    lazy: whether imports inside functions and under `if TYPE_CHECKING` count.
  """
  package = module.split(".") if is_package else module.split(".")[:-1]
  names = set()
  nodes = [ast.parse(source)]
  while nodes:
    node = nodes.pop()
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    typing = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    if lazy or not (function or typing):
      nodes += ast.iter_child_nodes(node)
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      parts = package[: len(package) + 1 - node.level] if node.level else []
      base = ".".join(parts + ([node.module] if node.module else []))
      for alias in node.names:
        full = f"{base}.{alias.name}"
        names.add(full if full in MODULES else base)
  return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


def imports_of(module: str, lazy: bool = True) -> set[str]:
  """Returns the imports of a module of the project."""
  path = MODULES[module]
  return imports(module, path.read_text(encoding="utf-8"), path.name == "__init__.py", lazy)


GRAPH = {module: imports_of(module) for module in MODULES}


def within(name: str, prefixes: str) -> bool:
  """Returns whether a dotted name is one of the prefixes or below it; `grpo_jax` means itself."""
  return any(
    name == prefix or (prefix != "grpo_jax" and name.startswith(prefix + "."))
    for prefix in prefixes.split()
  )


def forbidden(module: str, imported: set[str]) -> set[str]:
  """Returns the imports that the table does not allow."""
  for pattern, allowed in ALLOWED.items():
    if fnmatchcase(module, pattern):
      return {name for name in imported if not within(name, allowed)}
  return {name for name in imported if within(name, NOT_IN_COMMANDS)}


def reached(module: str, graph: dict[str, set[str]]) -> set[str]:
  """Returns everything that a module imports, directly or through other modules."""
  names, queue = set(), [module]
  while queue:
    for name in graph.get(queue.pop(), set()) - names:
      names.add(name)
      queue.append(name)
  return names


def too_far(module: str, graph: dict[str, set[str]]) -> set[str]:
  """Returns what a module must not reach by any path of imports, and reaches."""
  names = reached(module, graph)
  return {
    name
    for pattern, banned in NOT_REACHED.items()
    if fnmatchcase(module, pattern)
    for name in names
    if within(name, banned)
  }


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_table_allows(module):
  assert not forbidden(module, GRAPH[module]), f"{module} must not import these"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_does_not_reach_what_its_folder_is_free_of(module):
  assert not too_far(module, GRAPH), f"{module} must not reach these by other modules"


@pytest.mark.parametrize("module", MODULES)
def test_optional_libraries_are_imported_inside_functions(module):
  eager = imports_of(module, lazy=False)
  assert not {name for name in eager if within(name, LAZY)}


def test_there_is_no_circle():
  """Modules form an order in which each comes after those that it imports at its top."""
  eager = {module: imports_of(module, lazy=False) & set(MODULES) for module in MODULES}
  order = list(graphlib.TopologicalSorter(eager).static_order())  # CycleError names the circle
  assert set(order) == set(MODULES)


@pytest.mark.parametrize(
  ("module", "source", "expected"),
  [
    ("grpo_jax.core.losses", "import jax.numpy as jnp, os\nfrom grpo_jax.core import kl", set()),
    ("grpo_jax.core.losses", "from flax import linen", {"flax"}),
    ("grpo_jax.core.losses", "def f():\n  import optax", {"optax"}),
    ("grpo_jax.core.losses", "from grpo_jax import sampling", {"grpo_jax.sampling"}),
    ("grpo_jax.core.losses", "from grpo_jax import extras", {"grpo_jax.extras"}),
    ("grpo_jax.core.losses", "from ..models import decoder", {"grpo_jax.models.decoder"}),
    ("grpo_jax.core.losses", "from .. import policy_loss", {"grpo_jax"}),
    ("grpo_jax.core.losses", "from .kl import KLS", set()),
    ("grpo_jax.models.new", "from grpo_jax.tasks import base", {"grpo_jax.tasks.base"}),
    ("grpo_jax.models.new", "import flax.linen as nn", set()),
    ("grpo_jax.models.config", "import flax.linen as nn", {"flax.linen"}),
    ("grpo_jax.models.protocol", "from grpo_jax.models import block", {"grpo_jax.models.block"}),
    ("grpo_jax.models.io.new", "import flax.linen as nn", {"flax.linen"}),
    ("grpo_jax.models.io.new", "from grpo_jax.models import decoder", {"grpo_jax.models.decoder"}),
    ("grpo_jax.tasks.new", "import jax.numpy as jnp", {"jax.numpy"}),
    ("grpo_jax.tasks.new", "import jaxtyping", set()),
    ("grpo_jax.environments.new", "import jax", {"jax"}),
    ("grpo_jax.environments.new", "from grpo_jax.tasks.base import Task", set()),
    ("grpo_jax.learning.step", "import grpo_jax.models.decoder", {"grpo_jax.models.decoder"}),
    ("grpo_jax.learning.step", "from grpo_jax.models.protocol import Model", set()),
    ("grpo_jax.learning.updates", "from grpo_jax.build import Run", {"grpo_jax.build"}),
    ("grpo_jax.learning.updates", "from grpo_jax.run import skipped", {"grpo_jax.run.skipped"}),
    ("grpo_jax.sampling.generate", "from grpo_jax import tokens", {"grpo_jax.tokens"}),
    ("grpo_jax.sampling.sampler", "from grpo_jax import tokens", set()),
    ("grpo_jax.sampling.sampler", "from grpo_jax.plan import cost", {"grpo_jax.plan.cost"}),
    ("grpo_jax.rollout", "from grpo_jax.models import decoder", {"grpo_jax.models.decoder"}),
    ("grpo_jax.run.metrics", "from grpo_jax.config import load", {"grpo_jax.config"}),
    ("grpo_jax.evaluate", "from grpo_jax.train import run", {"grpo_jax.train"}),
    ("grpo_jax.something_new", "import flax.linen as nn\nimport rich", {"flax.linen"}),
    ("experiments.new", "import jax", {"jax"}),
    ("experiments.new", "from grpo_jax.config import default_config", set()),
    ("examples.new", "from grpo_jax.build import build\nimport grpo_jax", {"grpo_jax.build"}),
  ],
)
def test_the_table_catches(module, source, expected):
  assert forbidden(module, imports(module, source)) == expected


def test_a_long_path_is_caught():
  graph = {
    "grpo_jax.tokens": {"grpo_jax.models.io.weights", "numpy"},
    "grpo_jax.models.io.weights": {"grpo_jax.models.rope"},
    "grpo_jax.models.rope": {"flax.linen"},
  }
  assert too_far("grpo_jax.tokens", graph) == {"flax.linen"}
  assert too_far("grpo_jax.models.rope", graph) == set()


def test_lazy_imports_are_told_from_those_at_the_top():
  source = """
import numpy
if TYPE_CHECKING:
  import jaxtyping
try:
  import jax
except ImportError:
  pass
class A:
  import flax
  def f(self):
    import optax
"""
  eager = {"numpy", "jax", "flax"}
  assert imports("grpo_jax.new", source, lazy=False) == eager
  assert imports("grpo_jax.new", source) == eager | {"jaxtyping", "optax"}


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
