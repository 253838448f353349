"""Writes folders that appear whole or not at all, and never over something else."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
  """Yields a folder to fill, which becomes `out` at the end; after an error nothing is left.

  Raises:
    FileExistsError: `out` exists and is not an empty folder.

  Example:
    >>> parent = Path(tempfile.mkdtemp())
    >>> with new_folder(parent / "model") as partial:
    ...   _ = (partial / "a").write_text("x")
    >>> [path.name for path in parent.rglob("*")]
    ['model', 'a']
  """
  out = Path(out).resolve()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise FileExistsError(f"{out} exists and is not an empty folder: nothing is overwritten")
  out.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
  partial.chmod(0o755)
  try:
    yield partial
    partial.replace(out)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
