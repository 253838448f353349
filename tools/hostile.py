"""Runs hostile programs in the sandbox and prints what became of each, as a table in Markdown.

    python -m tools.hostile > docs/hostile.md
    python -m tools.hostile namespaces  # without this layer

A program prints ESCAPED if its attack succeeds. It is contained if it does not, reaches no
listener, changes no file and kills no process of this machine, ends in time and leaves no process,
and the next program runs as usual.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from grpo_jax.environments import sandbox, servers
from grpo_jax.environments.servers import Execution

SECONDS, MEMORY_MB = 1.0, 128
HEAD = """\
`make hostile` wrote this page; `tools/hostile.py` has the programs. Each is given 1 s and 128 MB.
It is contained if its attack fails, it reaches no listener, changes no file and kills no process of
the machine, ends in time and leaves no process behind, and the next program runs as usual. A test
runs them all."""
OVERTIME = 4.0  # seconds that a program may take beyond its limit, on a busy machine

# Name -> program. @PID@, @VICTIM@: this process and another one. @PORT@, @ABSTRACT@, @SOCKET@:
# where this machine listens. @FILE@: a file that anybody may read and write.
PROGRAMS = {
  # --- what costs the machine
  "fork bomb": """
    import os
    while True:
      try: os.fork()
      except OSError: pass""",
  "thread bomb": """
    import threading, time
    started = 0
    try:
      while True:
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
        started += 1
    except RuntimeError:
      print("ESCAPED" if started > 64 else started)""",
  "memory bomb, a list": "x = [0]\nwhile True: x = x + x",
  "memory bomb, one mapping": "import mmap\nmmap.mmap(-1, 2**32)\nprint('ESCAPED')",
  "memory bomb, in many processes": """
    import os, time
    for _ in range(3): os.fork()
    x = bytearray(100 * 2**20)
    time.sleep(9)
    print("ESCAPED")""",
  "disk filler, one file": """
    with open("f", "wb") as f:
      for _ in range(200): f.write(bytes(2**20))
    print("ESCAPED")""",
  "disk filler, many files": """
    for i in range(200):
      with open(f"f{i}", "wb") as f: f.write(bytes(2**20))
    print("ESCAPED")""",
  "disk filler, files without a name": """
    import os
    files = []
    for i in range(50):
      files.append(open(f"f{i}", "wb"))
      os.unlink(f"f{i}")
      for _ in range(4): files[-1].write(bytes(2**20))
    print("ESCAPED")""",
  "memory filler by memfd_create": """
    import os
    os.memfd_create("x")
    print("ESCAPED")""",
  "file bomb, empty files": """
    for i in range(10**6): open(f"f{i}", "w").close()
    print("ESCAPED")""",
  "endless output": "while True: print('x' * 1000)",
  "endless error output": "import sys\nwhile True: print('x' * 1000, file=sys.stderr)",
  "endless loop": "while True: pass",
  "sleep": "import time\ntime.sleep(3600)\nprint('ESCAPED')",
  "deep recursion": "def f(n): return f(n + 1) + 1\nimport sys\nsys.setrecursionlimit(10**9)\nf(0)",
  "deep recursion in C": "x = []\nfor _ in range(10**7): x = [x]\nrepr(x)",
  "huge integer": "print(len(str(9**9**9)))",
  "huge string": "print('x' * 2**40)",
  "slow regular expression": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
  "reading its input for ever": "import time\nwhile True: input() if False else time.sleep(0.01)",
  # --- what outlives it
  "ignored signals": """
    import signal
    for number in range(1, 65):
      try: signal.signal(number, signal.SIG_IGN)
      except (OSError, ValueError): pass
    while True: pass""",
  "double fork": """
    import os, time
    if os.fork() == 0:
      if os.fork() == 0:
        time.sleep(3600)
      os._exit(0)""",
  "daemon with setsid": """
    import os, time
    if os.fork() == 0:
      try: os.setsid(); print("ESCAPED", flush=True)
      except OSError: pass
      time.sleep(3600)""",
  "own process group": """
    import os
    if os.fork() == 0:
      os.setpgid(0, 0)
      print("ESCAPED", flush=True)
    os.wait()""",
  "a handler at exit that hangs": "import atexit, time\natexit.register(time.sleep, 3600)",
  "a thread that hangs": """
    import threading, time
    threading.Thread(target=time.sleep, args=(3600,)).start()""",
  # --- the network
  "connection by TCP": """
    import socket
    socket.create_connection(("127.0.0.1", @PORT@), timeout=1).send(b"x")
    print("ESCAPED")""",
  "connection by an abstract socket": """
    import socket
    s = socket.socket(socket.AF_UNIX)
    s.connect("\\0@ABSTRACT@")
    print("ESCAPED")""",
  "connection by a socket in the file system": """
    import socket
    s = socket.socket(socket.AF_UNIX)
    s.connect("@SOCKET@")
    print("ESCAPED")""",
  "a socket by the system call itself": """
    import ctypes
    print("ESCAPED" if ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0 else "refused")""",
  "a packet to the network": """
    import socket
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", @PORT@))
    print("ESCAPED")""",
  # --- files and environment
  "reading /etc/passwd": "print(open('/etc/passwd').read(), 'ESCAPED')",
  "reading a file outside": "print(open('@FILE@').read(), 'ESCAPED')",
  "writing a file outside": "open('@FILE@', 'w').write('changed')\nprint('ESCAPED')",
  "changing the mode of a file outside": "import os\nos.chmod('@FILE@', 0o777)\nprint('ESCAPED')",
  "listing home folders": """
    import os
    for path in ("/root", "/home", "/var", "/proc", "/sys", "/run"):
      try: names = [n for n in os.listdir(path) if not n.startswith(".pyenv")]
      except OSError: continue
      if names and not os.__file__.startswith(path): print("ESCAPED", path, names)""",
  "reading the environment": """
    import os, ctypes
    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    if os.environ or (environ and environ[0]): print("ESCAPED")""",
  "the environment of the parent in /proc": """
    for pid in ("self", "1", "@PID@"):
      try: print(open(f"/proc/{pid}/environ").read(), "ESCAPED")
      except OSError: pass""",
  "the root folder of another process": """
    import os
    for pid in ("self", "1", "@PID@"):
      try: print(os.listdir(f"/proc/{pid}/root"), "ESCAPED")
      except OSError: pass""",
  "symbolic links": """
    import os
    for target in ("/etc/passwd", "@FILE@", "/proc/1/root/etc/passwd", "../../../../etc/passwd"):
      os.symlink(target, "link")
      try: print(open("link").read(), "ESCAPED")
      except OSError: pass
      os.unlink("link")""",
  "hard links": "import os\nos.link('@FILE@', 'link')\nprint(open('link').read(), 'ESCAPED')",
  "climbing out of the root": """
    import os
    for _ in range(50): os.chdir("..")
    print(open("etc/passwd").read(), "ESCAPED")""",
  "writing over the interpreter's files": """
    import os, random
    for path in (os.__file__, os.path.dirname(os.__file__) + "/new.py", random.__cached__):
      try: open(path, "a").write("\\n"); print("ESCAPED")
      except OSError: pass
      try: os.unlink(path); print("ESCAPED")
      except OSError: pass""",
  "files of the programs before": "import os\nprint('ESCAPED' if os.listdir('.') else 'none')",
  "modules of the programs before": "import math\nif math.pi == 3: print('ESCAPED')",
  "devices": """
    import os
    for name in ("mem", "kmsg", "tty", "ptmx", "fuse", "sda", "vda", "shm"):
      if os.path.exists(f"/dev/{name}") and os.access(f"/dev/{name}", os.R_OK):
        try: open(f"/dev/{name}", "rb"); print("ESCAPED", name)
        except OSError: pass""",
  # --- other processes
  "kill of the parent": """
    import os, signal
    for pid in (os.getppid(), @PID@, @VICTIM@):
      try: os.kill(pid, signal.SIGKILL); print("ESCAPED", pid)
      except OSError: pass""",
  "kill of everything": "import os\nos.kill(-1, 9)\nprint('ESCAPED')",
  "signals by a file's owner": """
    import fcntl, os
    r, w = os.pipe()
    fcntl.fcntl(r, fcntl.F_SETOWN, @VICTIM@)
    print("ESCAPED")""",
  "limits of another process": """
    import resource
    resource.prlimit(@VICTIM@, resource.RLIMIT_CPU, (1, 1))
    print("ESCAPED")""",
  "priority of another process": """
    import os
    os.setpriority(os.PRIO_PROCESS, @VICTIM@, 19)
    print("ESCAPED")""",
  "ptrace": """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in (os.getppid(), @PID@, @VICTIM@):
      if libc.ptrace(16, pid, 0, 0) == 0: print("ESCAPED")""",
  "reading another process's memory": """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    b = ctypes.create_string_buffer(64)
    v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 64)
    if libc.process_vm_readv(@VICTIM@, v, 1, v, 1, 0) >= 0: print("ESCAPED")""",
  # --- the kernel
  "a shell": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
  "a program by subprocess": "import subprocess\nsubprocess.run(['echo', 'ESCAPED'])",
  "the interpreter again": """
    import os, sys
    os.execv(sys.executable, ["python", "-c", "print('ESCAPED')"])""",
  "a new user namespace": """
    import ctypes
    libc = ctypes.CDLL(None)
    print("ESCAPED" if libc.unshare(0x10000000) == 0 else "refused")""",
  "a new user namespace by clone": """
    import ctypes, os
    pid = ctypes.CDLL(None).syscall(56, 0x10000000 | 17, 0, 0, 0, 0)
    if pid == 0: os._exit(0)
    if pid > 0: print("ESCAPED")""",
  "mounts": """
    import ctypes
    libc = ctypes.CDLL(None)
    if libc.mount(b"proc", b"/tmp", b"proc", 0, None) == 0: print("ESCAPED")
    if libc.umount2(b"/tmp", 2) == 0: print("ESCAPED")""",
  "user 0": """
    import os
    for call in (os.setuid, os.setgid):
      try: call(0); print("ESCAPED")
      except OSError: pass""",
  "a change of the root folder": "import os\nos.chroot('/tmp')\nprint('ESCAPED')",
  "io_uring, bpf, keys, perf": """
    import ctypes
    libc = ctypes.CDLL(None)
    for number in (425, 321, 248, 250, 298, 323, 175, 246, 169):
      if libc.syscall(number, 0, 0, 0, 0, 0) >= 0: print("ESCAPED", number)""",
  # --- its own process
  "abort": "import os\nos.abort()",
  "a crash of the interpreter": "import ctypes\nctypes.string_at(0)",
  "closing all descriptors": "import os\nos.closerange(0, 1024)\nwhile True: pass",
  "garbage to all descriptors": """
    import os
    for number in range(64):
      try: os.write(number, b'{"returncode": 0, "killed": null}\\n' * 99)
      except OSError: pass
    os._exit(0)""",
  "replaced builtins": """
    import builtins, os, sys
    builtins.print = builtins.open = builtins.exec = None
    sys.modules.clear()
    os._exit = lambda code: None
    while True: pass""",
  "raised limits": """
    import resource
    for which in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU):
      try: resource.setrlimit(which, (-1, -1)); print("ESCAPED")
      except (ValueError, OSError): pass""",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Records what became of a hostile program.

  Attributes:
    name: of the program.
    end: how it ended.
    seconds: wall time.
    faults: what it reached; () if it was contained.
  """

  name: str
  end: str
  seconds: float
  faults: tuple[str, ...]


@contextlib.contextmanager
def machine() -> Iterator["Machine"]:
  """Makes what programs attack, and takes it away again."""
  with contextlib.ExitStack() as stack:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.chmod(0o755)
    file = folder / "secret"
    file.write_text("secret")
    file.chmod(0o666)
    abstract = f"grpo_jax_{os.getpid()}"
    addresses = [("127.0.0.1", 0), f"\0{abstract}", str(folder / "socket")]
    listeners = [
      stack.enter_context(socket.socket(socket.AF_UNIX if isinstance(a, str) else socket.AF_INET))
      for a in addresses
    ]
    for listener, address in zip(listeners, addresses):
      listener.bind(address)
      listener.listen()
      listener.setblocking(False)
    (folder / "socket").chmod(0o777)
    victim = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    stack.callback(victim.wait)
    stack.callback(victim.kill)
    values = {
      "PID": os.getpid(), "VICTIM": victim.pid, "PORT": listeners[0].getsockname()[1],
      "ABSTRACT": abstract, "SOCKET": folder / "socket", "FILE": file,
    }  # fmt: skip
    yield Machine(values, listeners, file, victim)


@dataclasses.dataclass(frozen=True)
class Machine:
  """Holds what programs attack: values for their text, listeners, a file, a process."""

  values: dict[str, object]
  listeners: list[socket.socket]
  file: Path
  victim: subprocess.Popen

  def run(self, name: str) -> Outcome:
    """Runs a program and looks at what it left."""
    code = textwrap.dedent(PROGRAMS[name])
    for key, value in self.values.items():
      code = code.replace(f"@{key}@", str(value))
    began = time.monotonic()
    ran = sandbox.run_python(code, seconds=SECONDS, memory_mb=MEMORY_MB)
    seconds = time.monotonic() - began
    faults = []
    if "ESCAPED" in ran.stdout:
      faults.append(f"escaped: {ran.stdout.strip()[-80:]}")
    if seconds > SECONDS + OVERTIME:
      faults.append("too slow")
    if any(accepts(listener) for listener in self.listeners):
      faults.append("reached a listener")
    if self.file.read_text() != "secret" or self.file.stat().st_mode & 0o777 != 0o666:
      faults.append("changed a file")
    if self.victim.poll() is not None:
      faults.append("killed a process")
    if left := left_running():
      faults.append(f"left {len(left)} processes")
    if sandbox.run_python("print(6 * 7)").stdout != "42\n":
      faults.append("the next program fails")
    return Outcome(name, describe(ran), seconds, tuple(faults))


def accepts(listener: socket.socket) -> bool:
  """Returns whether somebody has connected."""
  try:
    listener.accept()[0].close()
  except BlockingIOError:
    return False
  return True


def left_running() -> list[int]:
  """Returns the processes below the idle servers of this process."""
  return [pid for server in servers.idle for pid in children(server.pid)]


def children(pid: int) -> list[int]:
  """Returns the processes whose parent is `pid`."""
  found = []
  for folder in Path("/proc").iterdir():
    if folder.name.isdecimal():
      with contextlib.suppress(OSError):
        if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
          found.append(int(folder.name))
  return found


def describe(ran: Execution) -> str:
  """Returns how a program ended, in a few words."""
  if ran.killed:
    return f"killed: {ran.killed}"
  if ran.returncode < 0:
    return signal.Signals(-ran.returncode).name
  lines = ran.stderr.strip().splitlines()
  last = lines[-1] if lines and ran.returncode else ""
  return last.partition(":")[0] if last else f"exit code {ran.returncode}"


def main(arguments: list[str]) -> int:
  """Prints the table; the exit code is the number of programs that were not contained.

  Args:
    arguments: layers to leave out, as a machine without them does.
  """
  layers = tuple(layer for layer in sandbox.layers() if layer not in arguments)
  sandbox.layers = lambda: layers
  print(f"# Hostile programs in the sandbox\n\n{HEAD}\n\nHere, {sandbox.explain()}.\n")
  print(f"| program | contained | how it ended | seconds (limit {SECONDS:g}) |\n|---|---|---|---|")
  failures = 0
  with machine() as target:
    for name in PROGRAMS:
      outcome = target.run(name)
      failures += bool(outcome.faults)
      contained = "no: " + "; ".join(outcome.faults) if outcome.faults else "yes"
      print(f"| {name} | {contained} | {outcome.end} | {outcome.seconds:.2f} |", flush=True)
  print(f"\n{len(PROGRAMS) - failures} of {len(PROGRAMS)} programs are contained.")
  return failures


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
