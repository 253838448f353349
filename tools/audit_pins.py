"""Checks the pins of requirements.txt without a network: `python -m tools.audit_pins`.

It checks little, and prints what: every pin is exact, setup.cfg accepts it, and no pinned or
installed package is older than the first version without a known advisory. In an environment that
was made from the pins, the installed versions are the pinned ones. The known advisories are those
in FIXED. With a network, `pip-audit --requirement requirements.txt` checks all of them.
"""

import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

# First version without an advisory, its name and why it matters here: the newest of each package.
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
# Extras of setup.cfg whose packages are pinned. The others are for devices and documentation.
PINNED_EXTRAS = ("train", "tasks", "gguf", "tensorboard", "test")


def pins(text: str) -> dict[str, str]:
  """Parses a requirements file.

  Returns:
    Version by package name.

  Raises:
    ValueError: a line is not an exact pin.
  """
  versions = {}
  for line in text.splitlines():
    line = line.partition("#")[0].strip()
    if not line:
      continue
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)(\[[\w,-]+\])?==(\d[\w.+!]*)", line)
    if not match:
      raise ValueError(f"{line!r} is not an exact pin: write name==version")
    versions[normal(match[1])] = match[3]
  return versions


def lowest(text: str) -> dict[str, str]:
  """Parses setup.cfg.

  Returns:
    Lowest version ("0" for any) by name of the packages that the base and `PINNED_EXTRAS` require.
    Of two bounds on a package, the higher one counts.
  """
  parser = configparser.ConfigParser(interpolation=None)
  parser.read_string(text)
  lists = [parser.get("options", "install_requires", fallback="")]
  lists += [parser.get("options.extras_require", e, fallback="") for e in PINNED_EXTRAS]
  versions: dict[str, str] = {}
  for line in "\n".join(lists).split():
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)(?:\[[\w,-]+\])?(?:>=([\w.]+))?", line)
    if not match:
      raise ValueError(f"{line!r} in setup.cfg is neither a name nor name>=version")
    name, version = normal(match[1]), match[2] or "0"
    if name != "grpo-jax" and older(versions.get(name, "0"), version):
      versions[name] = version
    elif name != "grpo-jax":
      versions.setdefault(name, version)
  return versions


def normal(name: str) -> str:
  """Returns the one spelling of a package name (PEP 503)."""
  return re.sub(r"[-_.]+", "-", name).lower()


def older(version: str, than: str) -> bool:
  """Tells whether a version comes before another, by the first of their numbers that differs.

  >>> older("2.9", "2.10"), older("3.1.6", "3.1.6"), older("3.2rc1", "3.2")
  (True, False, False)
  """
  a, b = ([int(n) for n in re.findall(r"\d+", v)[:4]] for v in (version, than))
  width = max(len(a), len(b))
  return a + [0] * (width - len(a)) < b + [0] * (width - len(b))


def made_from(pinned: dict[str, str], installed: dict[str, str]) -> dict[str, str]:
  """Returns the installed packages if they were installed from the pins, else none of them.

  An environment whose jax is another than the pinned one has versions of its own.
  """
  return installed if installed.get("jax") == pinned["jax"] else {}


def problems(
  pinned: dict[str, str], required: dict[str, str], installed: dict[str, str]
) -> list[str]:
  """Compares pins, requirements and installed packages; returns one line per problem."""
  lines = []
  for name, version in pinned.items():
    if name in installed and installed[name] != version:
      lines.append(f"{name}: {version} is pinned, {installed[name]} is installed")
    if older(version, required.get(name, "0")):
      lines.append(f"{name}: {version} is pinned, setup.cfg requires {required[name]}")
  for name in sorted(set(required) - set(pinned)):
    lines.append(f"{name}: setup.cfg requires it, and it is not pinned")
  for name, version in sorted({**pinned, **installed}.items()):
    if name in FIXED and older(version, FIXED[name][0]):
      lines.append(f"{name}: {version} is older than {FIXED[name][0]} ({FIXED[name][1]})")
  return lines


def main() -> int:
  """Prints the problems and a summary; returns 1 if there are problems."""
  pinned = pins(Path("requirements.txt").read_text(encoding="utf-8"))
  required = lowest(Path("setup.cfg").read_text(encoding="utf-8"))
  installed = {normal(d.metadata["Name"]): d.version for d in metadata.distributions()}
  compared = made_from(pinned, installed)
  lines = problems(pinned, required, compared)
  for line in lines:
    print(line)
  indirect = len(set(compared) - set(pinned))
  print(
    f"{len(pinned)} pins against setup.cfg, {len(compared)} installed packages ({indirect} of "
    f"them not pinned) against {len(FIXED)} known advisories: {len(lines)} problem(s)"
  )
  if not compared:
    print(f"jax {installed.get('jax')} is not the pinned one: installed packages were not judged")
  return 1 if lines else 0


if __name__ == "__main__":
  sys.exit(main())
