"""Confines a Linux process by kernel layers, through ctypes: no package, no helper program.

The layers, each of which holds or does not on a given machine: namespaces (no network, no other
processes, an own root file system), Landlock (which files may be read and written), seccomp (which
system calls fail), rlimits, no-new-privileges, an unprivileged user. `sandbox.py` uses all of them
for code that a model wrote, reward workers use those that need no own root.

This module imports the standard library only: it also runs in processes without any package.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534  # the user and group that a privileged process becomes

# --- prctl and system calls -----------------------------------------------------------------------

_PDEATHSIG, _SECCOMP, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 22, 24, 36, 38
_FILTER_MODE = 2
_CLONE_NEW = {
  "mount": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000,
  "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000,
}  # fmt: skip
# Numbers by machine: (x86_64, aarch64); None where it does not exist.
_SYSCALLS = {
  "socket": (41, 198), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
  "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
  "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
  "pidfd_getfd": (438, 438), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
  "process_madvise": (440, 440), "setsid": (112, 157), "setpgid": (109, 154),
  "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
  "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
  "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
  "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "memfd_create": (319, 279),
  "memfd_secret": (447, 447), "init_module": (175, 105), "finit_module": (313, 273),
  "delete_module": (176, 106), "kexec_load": (246, 104), "reboot": (169, 142),
  "swapon": (167, 224), "swapoff": (168, 225), "sethostname": (170, 161),
  "quotactl": (179, 60), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
  "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112),
  "personality": (135, 92), "fanotify_init": (300, 262), "mq_open": (240, 180),
  "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "iopl": (172, None),
  "ioperm": (173, None), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
  # Landlock does not cover these: owners, modes, times and attributes of files.
  "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
  "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
  "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
  "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utimensat": (280, 88),
  "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
  "mount_setattr": (442, 442),
  # Of other processes of the same user: their priority, processors and pages.
  "sched_setaffinity": (203, 122), "setpriority": (141, 140), "ioprio_set": (251, 30),
  "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
  "migrate_pages": (256, 238), "move_pages": (279, 239), "kcmp": (312, 272),
  "process_mrelease": (448, 448), "syslog": (103, 116),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)
# Refused with some arguments: (numbers, index of the argument, values); None: any but 0.
_ARGUMENTS = (
  ((72, 25), 1, (8, 10, 15)),  # fcntl that has a signal sent: F_SETOWN, F_SETSIG, F_SETOWN_EX
  ((302, 261), 0, None),  # prlimit64 of another process
)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

SIGNALS = (
  "kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal",
)  # fmt: skip
PROGRAMS = ("execve", "execveat")  # starting other programs
# Refused to every confined process: network, other processes, the kernel's own interfaces.
REFUSED = tuple(name for name in _SYSCALLS if name not in (*PROGRAMS, *SIGNALS))


class IsolationError(RuntimeError):
  """Reports that a layer could not be put in place."""


def _check(result: int, what: str) -> int:
  if result < 0:
    number = ctypes.get_errno()
    raise IsolationError(f"{what}: {os.strerror(number)}")
  return result


def _prctl(option: int, *values: int) -> None:
  arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
  _check(_libc.prctl(ctypes.c_int(option), *arguments), f"prctl {option}")


def die_with_parent() -> None:
  """Has the kernel kill this process when its parent ends; set it after any change of user."""
  _prctl(_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
  """Makes this process the parent of descendants whose own parent ended, so that it reaps them."""
  _prctl(_SUBREAPER, 1)


# --- limits and privileges ------------------------------------------------------------------------


def limit(
  *,
  cpu_seconds: int | None = None,
  memory_bytes: int | None = None,
  file_bytes: int | None = None,
  open_files: int | None = None,
  processes: int | None = None,
) -> None:
  """Lowers the resource limits of this process and its children; None leaves a limit as it is.

  There are no core dumps in any case. `processes` does not bind the host's user 0.
  """
  limits = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_CPU: cpu_seconds,
    resource.RLIMIT_AS: memory_bytes,
    resource.RLIMIT_FSIZE: file_bytes,
    resource.RLIMIT_NOFILE: open_files,
    resource.RLIMIT_NPROC: processes,
  }
  for which, value in limits.items():
    if value is not None:
      hard = resource.getrlimit(which)[1]
      value = value if hard == resource.RLIM_INFINITY else min(value, hard)
      resource.setrlimit(which, (value, value))


def unused_user() -> int:
  """Returns a user number for this process alone, so that a limit counts its processes alone.

  `NOBODY` in a container that has few numbers.
  """
  number = 2**30 + os.getpid()
  for file in ("/proc/self/uid_map", "/proc/self/gid_map"):
    try:
      with open(file) as lines:
        spans = [[int(value) for value in line.split()] for line in lines]
    except OSError:
      return NOBODY
    if not any(first <= number < first + count for first, _, count in spans):
      return NOBODY
  return number


def processes_of(user: int | None) -> int:
  """Returns the number of processes and threads that a user has; None: the user of this process."""
  user, count = os.geteuid() if user is None else user, 0
  for name in os.listdir("/proc"):
    if name.isdecimal():
      try:
        if os.stat(f"/proc/{name}").st_uid == user:
          count += os.stat(f"/proc/{name}/task").st_nlink - 2
      except OSError:
        continue  # it has ended
  return count


def drop_privileges(*, user: int | None = None) -> None:
  """Gives up all capabilities, and the way back to them through set-user-id programs.

  Args:
    user: also become the user and group of this number; needs the host's user 0.
  """
  for capability in range(64):
    if _libc.prctl(_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
      break  # beyond the last capability, or without the right to drop: nothing to lose then
  if user is not None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
  header = struct.pack("Ii", 0x20080522, 0)  # capset, version 3
  _check(_libc.capset(header, struct.pack("IIIIII", *[0] * 6)), "capset")
  _prctl(_NO_NEW_PRIVS, 1)


def confine() -> list[str]:
  """Takes network, writing, other programs and other processes away from this process, for good.

  It can still read files and use what it has open. For reward workers: they import as they go. The
  layers hold for the calling thread and those that it starts later, not for others.

  Returns:
    The layers that hold here; what the machine lacks is left out.
  """
  if sys.platform != "linux":
    return []
  limit(open_files=1024)
  held = ["no new privileges"]
  drop_privileges()
  try:
    landlock(read=["/"], write=["/dev/null"], signals=False)
    held.append("landlock")
  except IsolationError:
    pass
  try:
    refuse_system_calls((*REFUSED, *SIGNALS, *PROGRAMS))
    held.append("seccomp")
  except IsolationError:
    pass
  return held


# --- Landlock -------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _READ_FILE, _READ_DIR = 1, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# Rights on files, network ports and scopes that a version of the interface added.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_ON_FILES = 1 << 1 | 1 << 2 | 1 << 0 | 1 << 14 | 1 << 15  # rights that a single file can have


def landlock_version() -> int:
  """Returns the version of the kernel's Landlock interface; 0 where there is none."""
  return max(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1)), 0)


def landlock(
  *, read: Iterable[str], write: Iterable[str] = (), network: bool = False, signals: bool = True
) -> None:
  """Restricts this process, for good, to files beneath some paths, and to no network.

  Args:
    read: paths to read; missing ones are left out.
    write: paths to read and write.
    network: allow TCP.
    signals: allow signals to processes outside (from version 6 of the interface on).

  Raises:
    IsolationError: the kernel has no Landlock, or refuses it.
  """
  version = landlock_version()
  if not version:
    raise IsolationError("Landlock: the kernel does not offer it")
  rights = sum(bits for since, bits in _FILE_RIGHTS.items() if version >= since)
  ports = 3 if version >= 4 and not network else 0
  scopes = (1 if not signals else 0) << 1 | 1 if version >= 6 else 0
  attributes = struct.pack("QQQ", rights, ports, scopes)[
    : 24 if version >= 6 else 16 if version >= 4 else 8
  ]
  ruleset = _check(
    _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0), "Landlock"
  )
  try:
    for paths, allowed in ((read, _READ), (write, rights)):
      for path in paths:
        _allow_beneath(ruleset, path, allowed & rights)
    _check(_libc.syscall(_RESTRICT_SELF, ruleset, 0), "Landlock")
  finally:
    os.close(ruleset)


def _allow_beneath(ruleset: int, path: str, rights: int) -> None:
  try:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
  except OSError:
    return
  try:
    if not os.path.isdir(path):
      rights &= _ON_FILES
    rule = struct.pack("=Qi", rights, descriptor)
    _check(_libc.syscall(_ADD_RULE, ruleset, 1, rule, 0), f"Landlock, {path}")
  finally:
    os.close(descriptor)


# --- seccomp --------------------------------------------------------------------------------------

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


class _Program(ctypes.Structure):
  _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def has_seccomp() -> bool:
  """Returns whether system calls can be filtered on this machine."""
  if platform.machine() not in _ARCHITECTURES or sys.maxsize < 2**32:
    return False
  # With a null filter the kernel answers EFAULT where it knows filters, else EINVAL.
  _libc.prctl(_SECCOMP, _FILTER_MODE, None, 0, 0)
  return ctypes.get_errno() == 14


def refuse_system_calls(names: Iterable[str]) -> None:
  """Has the named system calls fail with EPERM in this process and its children, for good.

  New namespaces by `clone` are refused too. Needs no-new-privileges.

  Raises:
    IsolationError: the machine is not known, or the kernel refuses the filter.
  """
  if platform.machine() not in _ARCHITECTURES:
    raise IsolationError(f"seccomp: system calls of {platform.machine()!r} are not known")
  column, architecture = _ARCHITECTURES[platform.machine()]
  numbers = [_SYSCALLS[name][column] for name in names if _SYSCALLS[name][column] is not None]
  rules = [
    (_LOAD, 0, 0, 4),
    (_EQUAL, 1, 0, architecture),
    (_RETURN, 0, 0, _EPERM),
    (_LOAD, 0, 0, 0),
  ]
  if column == 0:  # the x32 calls, which have numbers of their own
    rules += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _EPERM)]
  for number in numbers:
    rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
  for pair, argument, values in _ARGUMENTS:
    body = [(_LOAD, 0, 0, 16 + 8 * argument)]
    for value in values or (0,):
      jumps = (0, 1) if values else (1, 0)
      body += [(_EQUAL, *jumps, value), (_RETURN, 0, 0, _EPERM)]
    body += [(_LOAD, 0, 0, 0)]
    rules += [(_EQUAL, 0, len(body), pair[column]), *body]
  # Its flags lie in memory, which a filter cannot read; libraries then use `clone`.
  rules += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ENOSYS)]
  rules += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, 16)]
  rules += [(_ANY_BIT, 0, 1, sum(_CLONE_NEW.values())), (_RETURN, 0, 0, _EPERM)]
  rules += [(_RETURN, 0, 0, _ALLOW)]
  packed = b"".join(struct.pack("HBBI", *rule) for rule in rules)
  buffer = ctypes.create_string_buffer(packed, len(packed))
  program = _Program(len(rules), ctypes.addressof(buffer))
  _check(_libc.prctl(_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0), "seccomp")


# --- namespaces -----------------------------------------------------------------------------------

_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = (
  1, 2, 4, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_DETACH = 2


def enter_namespaces(*, privileged: bool) -> None:
  """Leaves the host's mounts, network, IPC and names behind; `fork_apart` leaves its processes.

  Args:
    privileged: the process has the rights of the host's user 0; otherwise it first enters a user
      namespace, where it has them for what it makes.

  Raises:
    IsolationError: the machine does not allow it.
  """
  kinds = ["mount", "net", "ipc", "uts", "cgroup"]
  if not privileged:
    kinds.append("user")
  user, group = os.geteuid(), os.getegid()
  flags = sum(_CLONE_NEW[kind] for kind in kinds)
  _check(_libc.unshare(ctypes.c_int(flags)), "namespaces")
  if not privileged:
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {user} 1")
    _write("/proc/self/gid_map", f"{NOBODY} {group} 1")


def fork_apart() -> int:
  """Forks into a new process namespace, as `os.fork`; the kernel kills all of it with the child.

  Python does not know of the child: it must not start threads, and should fork before it does more.
  Needs `enter_namespaces`.
  """
  flags = ctypes.c_ulong(_CLONE_NEW["pid"] | signal.SIGCHLD)
  number = _CLONE[_ARCHITECTURES[platform.machine()][0]]
  return _check(_libc.syscall(number, flags, 0, 0, 0, 0), "namespaces")


def enter_root(read_only: Iterable[str]) -> None:
  """Replaces the root file system by an empty one with some folders of the host, read-only.

  It has an empty folder /tmp for `mount_tmp`, and /dev with null, zero and urandom. There is no
  /proc. Needs `enter_namespaces`.
  """
  _mount("", "/", flags=_RECURSIVE | _PRIVATE)
  root = "/tmp"  # where the new root is put together; nothing of it stays on the host
  _mount("tmpfs", root, "tmpfs", _NO_SUID | _NO_DEVICES, "size=64k,mode=755")
  folders = []
  for path in dict.fromkeys(read_only):
    if os.path.isdir(path) and not any(path.startswith(f"{f}/") for f in folders):
      folders.append(path)
  # The folders must be bound before the host's /tmp disappears below: one may lie in it.
  for path in folders:
    if path == "/tmp" or path.startswith("/tmp/"):
      raise IsolationError(f"namespaces: {path} lies in /tmp, which becomes the new root")
    os.makedirs(root + path, exist_ok=True)
    _mount(path, root + path, flags=_BIND | _RECURSIVE)
    _mount(
      "", root + path, flags=_BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEVICES | _kept(path)
    )
  os.makedirs(f"{root}/dev")
  for device in ("null", "zero", "urandom"):
    with open(f"{root}/dev/{device}", "w"):
      pass
    _mount(f"/dev/{device}", f"{root}/dev/{device}", flags=_BIND)
  os.makedirs(f"{root}/tmp")
  os.makedirs(f"{root}/old")
  os.chdir(root)
  number = _SYSCALLS["pivot_root"][_ARCHITECTURES[platform.machine()][0]]
  _check(_libc.syscall(number, b".", b"old"), "pivot_root")
  os.chdir("/")
  _check(_libc.umount2(b"/old", _DETACH), "umount")
  os.rmdir("/old")
  _mount("", "/", flags=_BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEVICES)


def mount_tmp(tmp_bytes: int) -> None:
  """Puts an empty writable file system of `tmp_bytes` at /tmp. Needs `enter_root`."""
  options = f"size={tmp_bytes},mode=777,nr_inodes=4096"
  _mount("tmpfs", "/tmp", "tmpfs", _NO_SUID | _NO_DEVICES, options)


def unmount_tmp() -> None:
  """Takes away what `mount_tmp` put at /tmp, with all files in it."""
  _check(_libc.umount2(b"/tmp", _DETACH), "umount")


def _kept(path: str) -> int:
  """Returns the flags of a mount that a user namespace may not take away."""
  flags = os.statvfs(path).f_flag
  names = {"ST_NOEXEC": 8, "ST_NOATIME": 1024, "ST_NODIRATIME": 2048, "ST_RELATIME": 1 << 21}
  return sum(bit for name, bit in names.items() if flags & getattr(os, name))


def _mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
  arguments = (source.encode(), target.encode(), kind.encode())
  result = _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None)
  _check(result, f"mount {target}")


def _write(path: str, text: str) -> None:
  try:
    with open(path, "w") as file:
      file.write(text)
  except OSError as error:
    raise IsolationError(f"namespaces: {path}: {error.strerror}") from error
