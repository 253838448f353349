"""The compilation cache of a run, and a count of what it could not give.

Compiling takes minutes for a large model. With a cache on disk a run that is continued, or another
one of the same shapes beside it, reads its programs instead.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax

FOLDER = "compilation_cache"  # beside the work directory


def use_cache(setting: str, workdir: str | Path) -> Path | None:
  """Turns the cache on for this process; the folder it is in, None where it is off.

  Args:
    setting: `auto` (one that jax is told of already, as by JAX_COMPILATION_CACHE_DIR, else
      `FOLDER` beside the work directory), `off`, or a folder.
  """
  if setting == "off":
    jax.config.update("jax_enable_compilation_cache", False)
    return None
  known = jax.config.jax_compilation_cache_dir
  if setting == "auto" and known:
    return Path(known)
  folder = Path(workdir).absolute().parent / FOLDER if setting == "auto" else Path(setting)
  jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
  # Small programs too: there are many, and without them a continued run still compiles.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  return folder


class Watch:
  """Counts programs and the seconds that getting them took, from when it is made until `report`."""

  def __init__(self) -> None:
    self._began = time.monotonic()
    self.programs, self.cached, self.seconds = 0, 0, 0.0
    self._open = True
    jax.monitoring.register_event_listener(self._event)
    jax.monitoring.register_event_duration_secs_listener(self._duration)

  def _event(self, name: str, **_: object) -> None:
    self.cached += name == "/jax/compilation_cache/cache_hits"

  def _duration(self, name: str, seconds: float, **_: object) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
      self.programs += 1
      self.seconds += seconds

  def report(self, say: Callable[[str], None]) -> None:
    """Says once how long it took until here, and closes."""
    if self._open:
      say(
        f"first step after {time.monotonic() - self._began:.1f} s: {self.programs} programs in "
        f"{self.seconds:.1f} s, {self.programs - self.cached} of them compiled, "
        f"{self.cached} from the cache"
      )
    self.close()

  def close(self) -> None:
    """Stops counting; a second call does nothing."""
    if self._open:
      self._open = False
      jax.monitoring.unregister_event_listener(self._event)
      jax.monitoring.unregister_event_duration_listener(self._duration)

  def __enter__(self) -> "Watch":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
