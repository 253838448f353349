"""Tests that processes wait for each other at one port, and that the missing ones are named."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from grpo_jax.distributed import rollcall
from grpo_jax.distributed.cluster import ClusterError
from tests.helpers.processes import finish, free_port, start


class Calls:
  """Runs `wait_for_all` of some of `count` processes in threads; keeps the lines of each."""

  def __init__(self, count, **options):
    self.count, self.options, self.port = count, options, free_port()
    self.lines = {index: [] for index in range(count)}
    self.pool = ThreadPoolExecutor(count)

  def start(self, index):
    address = f"localhost:{self.port}"
    options = {"notice": 0.3, "timeout": 20.0, **self.options}
    log = self.lines[index].append
    wait = rollcall.wait_for_all
    return self.pool.submit(wait, address, self.count, index, log=log, **options)


def until(holds, seconds=10):
  end = time.monotonic() + seconds
  while not holds() and time.monotonic() < end:
    time.sleep(0.02)
  assert holds()


def test_all_go_on_when_the_last_one_comes():
  calls = Calls(4)
  waiting = [calls.start(index) for index in (2, 0, 3)]
  until(lambda: any(calls.lines[0]) and any(calls.lines[2]) and any(calls.lines[3]))
  assert not any(future.done() for future in waiting)
  for index in (0, 2, 3):
    line = calls.lines[index][-1]
    assert line.startswith(f"process {index} of 4 has waited 0 s for process 1")
  for future in (*waiting, calls.start(1)):
    future.result(timeout=10)
  with socket.create_server(("localhost", calls.port)):  # the port is free for JAX
    pass


def test_nothing_is_said_when_all_come_in_time():
  calls = Calls(3, notice=5.0)
  for future in [calls.start(index) for index in range(3)]:
    future.result(timeout=10)
  assert not any(calls.lines.values())


def test_a_missing_process_0_is_named_with_its_address():
  calls = Calls(2)
  waiting = calls.start(1)
  until(lambda: calls.lines[1])
  expected = f"process 0, which does not answer at localhost:{calls.port} ("
  assert expected in calls.lines[1][0]
  calls.start(0).result(timeout=10)
  waiting.result(timeout=10)


def test_a_process_that_ends_is_missed_again():
  calls = Calls(3)
  waiting = calls.start(0)
  with until_connected(calls.port) as gone:
    gone.sendall(b"1\n")
    until(lambda: any(line.endswith("for process 2") for line in calls.lines[0]))
  until(lambda: any(line.endswith("for processes 1, 2") for line in calls.lines[0]))
  for future in (calls.start(1), calls.start(2), waiting):
    future.result(timeout=10)


def until_connected(port):
  for _ in range(500):
    try:
      return socket.create_connection(("localhost", port))
    except OSError:
      time.sleep(0.02)
  raise AssertionError("process 0 does not listen")


@pytest.mark.parametrize(
  "content",
  [b"", b"GET / HTTP/1.1\r\n\r\n", b"0\n", b"7\n", b"-1\n", b"\xff" * 5000, "²\n".encode()],
)
def test_other_connections_do_not_count(content):
  calls = Calls(2)
  waiting = calls.start(0)
  with until_connected(calls.port) as stranger:
    stranger.sendall(content)
    if not content:
      stranger.close()
    until(lambda: calls.lines[0])
    assert not waiting.done()
    calls.start(1).result(timeout=10)
    waiting.result(timeout=10)


def test_all_give_up_and_name_the_missing_process():
  calls = Calls(3, notice=0.2, timeout=0.5)
  for future in [calls.start(0), calls.start(2)]:
    with pytest.raises(TimeoutError, match=r"for process 1: start all processes, with the same"):
      future.result(timeout=10)
  lone = Calls(2, notice=0.2, timeout=0.5).start(1)
  with pytest.raises(TimeoutError, match="for process 0, which does not answer"):
    lone.result(timeout=10)


def test_a_port_that_is_in_use_is_named():
  with socket.create_server(("", free_port())) as other:
    port = other.getsockname()[1]
    with pytest.raises(ClusterError, match=f"cannot listen at port {port}"):
      rollcall.wait_for_all(f"localhost:{port}", 2, 0)


@pytest.mark.parametrize("address", ["localhost", ":80", "localhost:", "localhost:http"])
def test_an_address_has_a_host_and_a_port(address):
  with pytest.raises(ClusterError, match="it must be HOST:PORT"):
    rollcall.wait_for_all(address, 2, 0)


def test_the_name_of_many_processes_is_short():
  assert rollcall._names([5]) == "process 5"
  assert rollcall._names(range(12)) == "processes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


def test_a_line_is_said_only_if_the_body_takes_long(capsys):
  with rollcall.notice_after(0.05, "still waiting"):
    threading.Event().wait(0.3)
  assert capsys.readouterr().err == "still waiting\n"
  with rollcall.notice_after(0.2, "still waiting"):
    pass
  threading.Event().wait(0.4)
  assert capsys.readouterr().err == ""


JOINS = """
from grpo_jax.distributed import hosts, rollcall
rollcall.NOTICE, rollcall.TIMEOUT = 0.5, {timeout}
with hosts.session(heartbeat=10):
  print("joined", flush=True)
"""


def test_real_processes_name_the_one_that_never_comes():
  port, program = free_port(), ["-c", JOINS.format(timeout=2)]
  results = finish([start(program, i, 3, port, devices=1) for i in (0, 2)], seconds=60)
  for index, (code, output) in zip((0, 2), results):
    assert code != 0
    assert f"process {index} of 3 has waited 1 s for process 1" in output
    assert "HostError: process" in output
    assert "Check failure stack trace" not in output


def test_real_processes_join_after_the_roll_call():
  port, program = free_port(), ["-c", JOINS.format(timeout=60)]
  first = start(program, 0, 2, port, devices=1)
  line = first.stdout.readline()
  while "has waited" not in line:
    assert first.poll() is None, line
    line = first.stdout.readline()
  assert line.rstrip().endswith("for process 1")
  for code, output in finish([first, start(program, 1, 2, port, devices=1)], seconds=60):
    assert code == 0, output
    assert "joined" in output
