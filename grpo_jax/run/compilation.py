"""Keeps compiled programs on disk, and counts those that had to be compiled.

Compiling takes minutes for a large model. With a cache on disk, a continued run reads its programs
instead, and so does another run with the same shapes beside it.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax

from grpo_jax import addresses

FOLDER = "compilation_cache"  # beside the work directory


def use_cache(setting: str, workdir: str | Path, inside: bool = False) -> Path | None:
  """Turns on the compilation cache for this process.

  Args:
    setting: `off`, a folder, or `auto`: the cache that JAX is already configured with, by
      JAX_COMPILATION_CACHE_DIR for instance, else `FOLDER` beside the work directory.
    workdir: the work directory of the run.
    inside: put it in the work directory and not beside it, as one that a store keeps.

  Returns:
    The folder of the cache; None if it is off.
  """
  if setting == "off":
    jax.config.update("jax_enable_compilation_cache", False)
    return None
  configured = jax.config.jax_compilation_cache_dir
  if setting == "auto" and configured:
    return Path(configured)
  absolute = Path(workdir).absolute()
  beside = (absolute if inside else absolute.parent) / FOLDER
  folder = beside if setting == "auto" else addresses.local(setting, "compilation_cache")
  jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
  if inside:
    # jax: the caches of XLA, which are for GPUs, put the path of the folder into the key of a
    # program, and another machine has another path.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  # Small programs too: there are many, and without them a continued run still compiles.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  return folder


class Watch:
  """Counts compiled programs and compilation time, from its creation to the first `report`.

  Attributes:
    programs: number of programs, compiled or read from the cache.
    cached: number of programs read from the cache.
    seconds: time in seconds spent on compiling or reading them.
  """

  def __init__(self) -> None:
    self._start = time.monotonic()
    self.programs, self.cached, self.seconds = 0, 0, 0.0
    self._open = True
    jax.monitoring.register_event_listener(self._on_event)
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)

  def _on_event(self, name: str, **_: object) -> None:
    self.cached += name == "/jax/compilation_cache/cache_hits"

  def _on_duration(self, name: str, seconds: float, **_: object) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
      self.programs += 1
      self.seconds += seconds

  def report(self, log: Callable[[str], None]) -> None:
    """Logs a line with the counts and the time since creation, then closes; only the first call."""
    if self._open:
      log(
        f"first step after {time.monotonic() - self._start:.1f} s: {self.programs} programs in "
        f"{self.seconds:.1f} s, {self.programs - self.cached} of them compiled, "
        f"{self.cached} from the cache"
      )
    self.close()

  def close(self) -> None:
    """Stops counting. A second call does nothing."""
    if self._open:
      self._open = False
      jax.monitoring.unregister_event_listener(self._on_event)
      jax.monitoring.unregister_event_duration_listener(self._on_duration)

  def __enter__(self) -> "Watch":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
