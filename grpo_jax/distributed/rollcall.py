"""Waits until all processes of a run have started, and names the ones that are missing.

`jax.distributed.initialize` waits for minutes without a word, and then ends the process without
saying for whom it waited. Before it is called, process 0 listens at the coordinator's port, and
each other process sends its number there.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from grpo_jax.distributed.cluster import ADDRESS, ClusterError

NOTICE = 20.0  # seconds until the first line about missing processes, and between lines
TIMEOUT = 300.0  # seconds until the wait ends with an error
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_GO, _WAIT, _END = "go", "wait", "end"  # first words of what process 0 sends


def _log(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def wait_for_all(
  address: str,
  count: int,
  index: int,
  *,
  notice: float = NOTICE,
  timeout: float = TIMEOUT,
  log: Callable[[str], object] = _log,
) -> None:
  """Waits until all processes have called it.

  Args:
    address: HOST:PORT of process 0; the port is free again when this returns.
    count: number of processes.
    index: number of this process.
    notice: seconds between the lines that name missing processes.
    timeout: seconds until it gives up.
    log: called with each line.

  Raises:
    TimeoutError: processes are missing after `timeout` seconds; the message names them.
    ClusterError: `address` is not HOST:PORT, or process 0 cannot listen there.
  """
  host, _, port = address.rpartition(":")
  if not (host and port.isdigit()):
    raise ClusterError(f"the address of process 0 is {address!r}: it must be HOST:PORT")
  if index == 0:
    _call(int(port), _Wait(0, count, notice, timeout, log))
  else:
    _answer(host.strip("[]"), int(port), _Wait(index, count, notice, timeout, log))


class _Wait:
  """Says who is missing every `notice` seconds, and gives up after `timeout` seconds."""

  def __init__(
    self, index: int, count: int, notice: float, timeout: float, log: Callable[[str], object]
  ) -> None:
    self.index, self.count, self.notice, self.timeout, self.log = index, count, notice, timeout, log
    self._start = time.monotonic()
    self._next = self._start + notice

  def left(self) -> float:
    """Returns the seconds until the next line is due."""
    return max(self._next - time.monotonic(), 0.0)

  def is_over(self) -> bool:
    """Tells whether the time is over."""
    return time.monotonic() - self._start >= self.timeout

  def say(self, missing: str, *, gives_up: bool = False) -> None:
    """Logs a line about missing processes; the next one is due in `notice` seconds.

    Raises:
      TimeoutError: instead, if this process gives up.
    """
    self._next = time.monotonic() + self.notice
    seconds = time.monotonic() - self._start
    text = f"process {self.index} of {self.count} has waited {seconds:.0f} s for {missing}"
    if gives_up:
      raise TimeoutError(f"{text}: start all processes, with the same address and number of them")
    self.log(text)


# --- process 0 ------------------------------------------------------------------------------------


def _call(port: int, wait: _Wait) -> None:
  """Waits as process 0: listens until every other process has sent its number."""
  present: dict[int, socket.socket] = {}
  with contextlib.ExitStack() as stack:
    selector = stack.enter_context(selectors.DefaultSelector())
    listener = stack.enter_context(_listen(port))
    selector.register(listener, selectors.EVENT_READ)
    while len(present) < wait.count - 1:
      for key, _ in selector.select(wait.left()):
        if key.fileobj is listener:
          connection = stack.enter_context(listener.accept()[0])
          connection.setblocking(False)
          selector.register(connection, selectors.EVENT_READ)
        else:
          _read_number(key.fileobj, present, wait.count, selector)
      missing = _names(i for i in range(1, wait.count) if i not in present)
      if missing and not wait.left():
        _send(present.values(), f"{_END if wait.is_over() else _WAIT} {missing}")
        wait.say(missing, gives_up=wait.is_over())
    listener.close()  # before the others look for JAX's service at this port
    _send(present.values(), _GO)


def _listen(port: int) -> socket.socket:
  """Opens the port at the address that JAX's service will have."""
  host = ""
  if bind := os.environ.get(BIND):
    host, _, own_port = bind.rpartition(":")
    if not own_port.isdigit():
      raise ClusterError(f"{BIND} is {bind!r}: it must be HOST:PORT")
    host, port = host.strip("[]"), int(own_port)
  both = host in ("", "::") and socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family, dualstack_ipv6=both)
  except OSError as error:
    raise ClusterError(
      f"process 0 cannot listen at port {port} ({error}): end what uses it, or choose another port "
      f"in {ADDRESS} of all processes"
    ) from error


def _read_number(
  connection: socket.socket,
  present: dict[int, socket.socket],
  count: int,
  selector: selectors.BaseSelector,
) -> None:
  """Notes which process a connection is from; drops it if it has ended or sends anything else."""
  try:
    text = connection.recv(32).decode("ascii", "replace").strip()
  except OSError:
    text = ""
  if text.isdecimal() and text.isascii() and 1 <= int(text) < count:
    present[int(text)] = connection
    return
  for index in [i for i, other in present.items() if other is connection]:
    del present[index]
  selector.unregister(connection)
  connection.close()


def _send(connections: Iterable[socket.socket], line: str) -> None:
  for connection in connections:
    with contextlib.suppress(OSError):  # it has ended, and is missed from then on
      connection.sendall(f"{line}\n".encode())


def _names(indices: Iterable[int]) -> str:
  """Names processes: 'process 1', 'processes 1, 3'; at most ten of them."""
  numbers = list(indices)
  shown = ", ".join(map(str, numbers[:10]))
  more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
  return f"process{'es' if len(numbers) > 1 else ''} {shown}{more}" if numbers else ""


# --- the other processes --------------------------------------------------------------------------


def _answer(host: str, port: int, wait: _Wait) -> None:
  """Waits as another process: sends its number to process 0 until that says to go on."""
  while (reason := _ask(host, port, wait)) is not None:
    if not wait.left():
      missing = f"process 0, which does not answer at {host}:{port} ({reason})"
      wait.say(missing, gives_up=wait.is_over())
    time.sleep(0.2)


def _ask(host: str, port: int, wait: _Wait) -> str | None:
  """Sends this process's number; returns None at the word to go on, else what went wrong."""
  gone = None
  try:
    with socket.create_connection((host, port), timeout=5) as connection:
      connection.sendall(f"{wait.index}\n".encode())
      connection.settimeout(2 * wait.notice + 5)  # process 0 sends a line in every `notice`
      for line in connection.makefile("r", encoding="ascii", errors="replace"):
        word, _, missing = line.strip().partition(" ")
        if word == _GO:
          return None
        if word == _END:
          gone = missing
          break
        if word == _WAIT:
          wait.say(missing)
  except OSError as error:
    return str(error)
  if gone is not None:  # outside of the `try`: a TimeoutError is an OSError
    wait.say(gone, gives_up=True)
  return "it closed the connection"


@contextlib.contextmanager
def notice_after(seconds: float, line: str) -> Iterator[None]:
  """Logs a line if the body is not done after some seconds."""
  timer = threading.Timer(seconds, _log, (line,))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
