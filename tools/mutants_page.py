"""Writes the page `docs/mutants.md` for `mutants.py`."""

from importlib.metadata import version

from tools.mutants_explained import EXPLAINED
from tools.mutations import Mutant

_INTRODUCTION = """\
# Mutants of `grpo_jax/core`

This page shows whether a test would notice a wrong line of the core. Every mutant is one small
change of one expression: another operator, constant, condition or argument, or a missing call.
Annotations, docstrings, the wording of errors and the sources of algorithms are not changed. Each
mutant ran the tests of its module, then the other tests that execute its line, then all other tests
of the core, until one failed. `make mutants` wrote the page (jax {jax}); `tools/mutants.py`
describes the method.

- at import: the module, or a table in it, could not be built; no test was needed.
- by time: the tests exceeded the time limit, in an endless loop for instance.
- explained: no test can notice the change, for the reason given below. These ran the tests of their
  module only.

| file | mutants | noticed by a test | at import | by time | explained | survived |
| --- | --- | --- | --- | --- | --- | --- |"""


def report(verdicts: dict[Mutant, str]) -> str:
  """Returns the page `docs/mutants.md`."""
  lines = [_INTRODUCTION.format(jax=version("jax"))]
  for file in [*sorted({m.file for m in verdicts}), "all"]:
    mine = {m: v for m, v in verdicts.items() if file in (m.file, "all")}
    survived = [m for m, v in mine.items() if v == "survived"]
    explained = sum(bool(reason(m)) for m in survived)
    kinds = [sum(v == kind for v in mine.values()) for kind in ("noticed", "import", "time limit")]
    counts = [len(mine), *kinds, explained, len(survived) - explained]
    lines.append(f"| {' | '.join(map(str, [file, *counts]))} |")
  for title, known in (("Survivors without an explanation", False), ("Explained survivors", True)):
    rows = [m for m, v in verdicts.items() if v == "survived" and bool(reason(m)) == known]
    if rows:
      lines += ["", f"## {title}", "", "| function | line | change | reason |"]
      lines.append("| --- | --- | --- | --- |")
    for m in rows:
      place = f"{m.file} `{m.function}`" if m.function else f"{m.file}, at import"
      code = [f"`{text}`".replace("|", "\\|") for text in (m.text, f"{m.before} -> {m.after}")]
      lines.append(f"| {place} | {' | '.join(code)} | {reason(m)} |")
  return "\n".join(lines)


def reason(mutant: Mutant) -> str:
  """Returns the reason why no test can notice the mutant, or an empty string."""
  place, change = mutant.key
  return EXPLAINED.get(place, {}).get(change, "")
