"""Checks the configs of all runs of a sweep before the first one starts.

Building a run takes the devices, which its own process needs later: `in_a_process` builds in a
process that ends before.
"""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from grpo_jax import config as configs

T = TypeVar("T")
# Fields that are numbers only: nothing is opened or built differently for another value.
NUMBERS = (
  *("seed", "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.clip_norm"),
  *("optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.final_fraction"),
)


def build_problems(path: str, runs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
  """Returns what is wrong with the config of each run, by name; empty if nothing is.

  Values are checked for all of them. Models, tasks and tokenizers are opened once for all runs that
  differ in `NUMBERS` only.

  Args:
    path: the experiment file.
    runs: overrides by the name of the run.
  """
  import jax

  from grpo_jax.build import build

  problems, built = {}, set()
  for name, overrides in runs.items():
    try:
      config = configs.load(path, list(overrides))
      if wrong := configs.check(config, jax.device_count()):
        raise configs.ConfigError(wrong)
      kind = tuple(text for text in overrides if _field(text) not in NUMBERS)
      if kind not in built:
        built.add(kind)
        build(config)
    except configs.ConfigError as error:
      problems[name] = error.problems
  return problems


def value_problems(path: str, runs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
  """Returns what is wrong with the values of each run, for devices that are not here."""
  problems = {}
  for name, overrides in runs.items():
    config = configs.load(path, list(overrides))
    mesh = config.mesh
    count = 1
    for size in (mesh.data, mesh.fsdp, mesh.tensor, mesh.expert, mesh.context):
      count *= max(size, 1)  # -1 takes the rest: as few as possible
    if wrong := configs.check(config, count + mesh.rollout_devices):
      problems[name] = wrong
  return problems


def in_a_process(function: Callable[..., T], *arguments: Any) -> T:
  """Returns `function(*arguments)`, computed in a process that ends and frees its devices."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    return pool.submit(function, *arguments).result()


def _field(override: str) -> str:
  return override.removeprefix("--config.").partition("=")[0]
