"""Names the extra to install when an optional package is missing.

`pip install grpo_jax` brings jax, numpy and jaxtyping. The packages that training, tasks and model
formats need are extras of setup.cfg, e.g. `pip install 'grpo_jax[train]'`. This module imports the
standard library only, so that it runs where they are missing.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator

_TRAIN = (
  "ml_collections", "flax", "optax", "orbax", "transformers", "tokenizers", "jinja2", "safetensors",
  "huggingface_hub", "grain", "tensorboardX", "matplotlib", "rich",
)  # fmt: skip
# Modules by extra. An error names the first one that is missing.
MODULES = {
  "train": _TRAIN,
  "plan": _TRAIN,  # and libtpu, for TPU topologies only: see `grpo_jax.plan.hardware`
  "tasks": (
    "reasoning_gym", "math_verify", "tensorflow_datasets", "array_record", "importlib_resources",
    "pyarrow", "sympy",
  ),
  "gguf": ("gguf",),
  "openenv": ("websockets",),
  "textarena": ("textarena",),
  "gcs": ("google.cloud.storage",),
  "s3": ("boto3",),
  "wandb": ("wandb",),
  "trackio": ("trackio",),
}  # fmt: skip


def require(extra: str, user: str, *modules: str) -> None:
  """Raises an error that names the extra unless its modules can be imported.

  The modules are located, not imported.

  Args:
    extra: a key of `MODULES`.
    user: what needs the modules, e.g. "the task gsm8k". It starts the error message.
    *modules: top-level modules to look for; all modules of the extra if there are none.

  Raises:
    ModuleNotFoundError: a module is missing. The message is one line.

  Example:
    >>> require("train", "this example", "json")
    >>> require("tasks", "the task gsm8k", "json", "no_such_module")
    Traceback (most recent call last):
    ModuleNotFoundError: the task gsm8k needs no_such_module: pip install 'grpo_jax[tasks]'
  """
  for module in modules or MODULES[extra]:
    if not _is_there(module):
      raise ModuleNotFoundError(
        f"{user} needs {module}: pip install 'grpo_jax[{extra}]'", name=module
      )


def _is_there(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # the package that the module would be in
    return False


def require_for_command(extra: str, module: str) -> None:
  """Ends the process with one line and exit code 2 unless a command's extra is installed.

  A command calls it before its own imports, which would end in a traceback:

      if __name__ == "__main__":
        extras.require_for_command("train", "grpo_jax.train")

  Args:
    extra: a key of `MODULES`.
    module: module that `python -m` runs. It is named in the message.

  Raises:
    SystemExit: a module of the extra is missing; the code is 2.
  """
  try:
    require(extra, f"python -m {module}")
  except ModuleNotFoundError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
  """Keeps transformers from reporting that PyTorch is missing, when it is imported in the block.

  Example:
    >>> with quiet_transformers():
    ...   from transformers import PreTrainedTokenizerFast
  """
  variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
  before = os.environ.get(variable)
  os.environ[variable] = "1"
  try:
    yield
  finally:
    if before is None:
      del os.environ[variable]
    else:
      os.environ[variable] = before
