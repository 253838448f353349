"""Checks what requirements.txt pins: `python -m tools.audit_pins`; nothing is fetched.

It says what it checks, because it checks little: every pin is exact, what is installed here is what
is pinned, setup.cfg accepts it, and no installed package is older than the first version without
an advisory that this file knows of. It knows only those in FIXED. With a network,
`pip-audit --requirement requirements.txt` knows them all.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

# First version without: the advisory, and why it matters here. The newest advisory of each package.
FIXED = {
  "jinja2": ("3.1.6", "CVE-2025-27516: a chat template leaves the sandbox"),
  "transformers": ("4.53.0", "CVE-2025-6638 and others: regular expressions that never end"),
  "pyarrow": ("14.0.1", "CVE-2023-47248: a file runs code"),
  "protobuf": ("6.31.1", "CVE-2025-4565: nesting ends the process"),
  "requests": ("2.32.4", "CVE-2024-47081: credentials go to another host"),
  "urllib3": ("2.5.0", "CVE-2025-50181: redirects that were switched off"),
  "pillow": ("11.3.0", "CVE-2025-48379: an image writes beyond its buffer"),
  "tqdm": ("4.66.3", "CVE-2024-34062: options run code"),
  "idna": ("3.7", "CVE-2024-3651: a name that takes forever"),
}


def pins(text: str) -> dict[str, str]:
  """name -> version of the lines of a requirements file; ValueError for one that is not exact."""
  found = {}
  for line in text.splitlines():
    line = line.partition("#")[0].strip()
    if not line:
      continue
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)(\[[\w,-]+\])?==(\d[\w.+!]*)", line)
    if not match:
      raise ValueError(f"{line!r} is no exact pin: write name==version")
    found[normal(match[1])] = match[3]
  return found


def lowest(text: str) -> dict[str, str]:
  """name -> lowest version ("0" for any) of the packages that setup.cfg asks for."""
  line = r"^    ([A-Za-z0-9][\w.-]*)(?:\[[\w,-]+\])?(?:>=([\w.]+))?$"
  lines = re.findall(line, text, re.MULTILINE)
  return {normal(name): version or "0" for name, version in lines}


def normal(name: str) -> str:
  """One spelling of a package's name (PEP 503)."""
  return re.sub(r"[-_.]+", "-", name).lower()


def older(version: str, than: str) -> bool:
  """Whether a version comes before another; of their numbers, the first that differs decides.

  >>> older("2.9", "2.10"), older("3.1.6", "3.1.6"), older("3.2rc1", "3.2")
  (True, False, False)
  """
  a, b = ([int(n) for n in re.findall(r"\d+", v)[:4]] for v in (version, than))
  width = max(len(a), len(b))
  return a + [0] * (width - len(a)) < b + [0] * (width - len(b))


def problems(
  pinned: dict[str, str], wanted: dict[str, str], installed: dict[str, str]
) -> list[str]:
  """What is wrong, a line each."""
  found = []
  for name, version in pinned.items():
    if name in installed and installed[name] != version:
      found.append(f"{name}: {version} is pinned, {installed[name]} is installed")
    if older(version, wanted.get(name, "0")):
      found.append(f"{name}: {version} is pinned, setup.cfg needs {wanted[name]}")
  for name in sorted(set(wanted) - set(pinned)):
    found.append(f"{name}: setup.cfg asks for it, and it is not pinned")
  for name, version in sorted({**pinned, **installed}.items()):
    if name in FIXED and older(version, FIXED[name][0]):
      found.append(f"{name}: {version} is older than {FIXED[name][0]} ({FIXED[name][1]})")
  return found


def main() -> int:
  pinned = pins(Path("requirements.txt").read_text(encoding="utf-8"))
  required = Path("setup.cfg").read_text(encoding="utf-8").partition("install_requires =")[2]
  wanted = lowest(required.partition("[options.extras_require]")[0])
  installed = {normal(d.metadata["Name"]): d.version for d in metadata.distributions()}
  found = problems(pinned, wanted, installed)
  for line in found:
    print(line)
  indirect = len(set(installed) - set(pinned))
  print(
    f"{len(pinned)} pins against setup.cfg, {len(installed)} installed packages ({indirect} of "
    f"them not pinned) against {len(FIXED)} known advisories: {len(found)} problem(s)"
  )
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main())
