"""Measures what all processes below this one use, where the kernel limits each process alone.

It imports the standard library only.
"""

from __future__ import annotations

import os
import stat

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage:
  """Reads /proc through a descriptor, so that it works after a change of the root folder."""

  def __init__(self) -> None:
    try:
      self._proc: int | None = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
      self.memory()
    except (OSError, ValueError, IndexError):  # hidden, or of other processes
      self._proc = None

  def memory(self) -> int:
    """Returns the resident bytes of all descendants, each without what it shares with this one."""
    if self._proc is None:
      return 0
    own, total = self._resident(os.getpid()), 0
    for pid in self._descendants():
      try:
        total += max(self._resident(pid) - own, 0)
      except (OSError, ValueError, IndexError):
        continue  # it has ended
    return total

  def disk(self, folder: str) -> int:
    """Returns the bytes of the files below a folder, and of those that descendants hold open."""
    sizes: dict[tuple[int, int], int] = {}
    for path, _, names in os.walk(folder):
      for name in names:
        self._add(sizes, os.path.join(path, name), None)
    for pid in self._descendants() if self._proc is not None else ():
      for number in self._list(f"{pid}/fd"):
        self._add(sizes, f"{pid}/fd/{number}", self._proc)
    return sum(sizes.values())

  def _add(self, sizes: dict[tuple[int, int], int], path: str, folder: int | None) -> None:
    try:
      status = os.stat(path, dir_fd=folder, follow_symlinks=folder is not None)
    except OSError:
      return
    if stat.S_ISREG(status.st_mode) and (folder is None or not status.st_nlink):
      sizes[status.st_dev, status.st_ino] = status.st_blocks * 512

  def _descendants(self) -> list[int]:
    pids, queue = [], [os.getpid()]
    while queue:
      parent = queue.pop()
      for thread in self._list(f"{parent}/task"):
        try:
          children = [int(pid) for pid in self._read(f"{parent}/task/{thread}/children").split()]
        except (OSError, ValueError):
          continue
        pids += children
        queue += children
    return pids

  def _resident(self, pid: int) -> int:
    return int(self._read(f"{pid}/statm").split()[1]) * _PAGE

  def _open(self, path: str, flags: int = os.O_RDONLY | os.O_CLOEXEC) -> int:
    return os.open(path, flags, dir_fd=self._proc)

  def _list(self, path: str) -> list[str]:
    try:
      descriptor = self._open(path)
    except OSError:
      return []
    try:
      return os.listdir(descriptor)
    finally:
      os.close(descriptor)

  def _read(self, path: str) -> bytes:
    descriptor = self._open(path)
    try:
      return os.read(descriptor, 1 << 16)
    finally:
      os.close(descriptor)
