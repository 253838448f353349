"""The page `docs/mutants.md`; printed by `mutants.py`."""

from importlib.metadata import version

from tools.mutants_explained import EXPLAINED
from tools.mutations import Mutant

_INTRODUCTION = """\
# Mutants of `grpo_jax/core`

Would a test notice if a line of the core were wrong? Every mutant is one small change of one
expression: an operator, a constant, a condition, an argument, a call left out; not of annotations,
docstrings, the wording of errors and the sources of algorithms. Each met the tests of its module,
then those that execute its line, then all other tests of the core, until one failed. Written by
`make mutants` (jax {jax}); how it works stands at the top of `tools/mutants.py`.

- at import: the module, or a table in it, could not be built; no test was needed.
- by time: the tests ran into the limit, an endless loop for instance.
- explained: no test can tell the difference, for the reason given below. These met the tests of
  their module only.

| file | mutants | noticed by a test | at import | by time | explained | survived |
| --- | --- | --- | --- | --- | --- | --- |"""


def report(verdicts: dict[Mutant, str]) -> str:
  """The page `docs/mutants.md`."""
  lines = [_INTRODUCTION.format(jax=version("jax"))]
  for file in [*sorted({m.file for m in verdicts}), "all"]:
    mine = {m: v for m, v in verdicts.items() if file in (m.file, "all")}
    survived = [m for m, v in mine.items() if v == "survived"]
    explained = sum(bool(reason(m)) for m in survived)
    found = [sum(v == kind for v in mine.values()) for kind in ("noticed", "import", "time limit")]
    counts = [len(mine), *found, explained, len(survived) - explained]
    lines.append(f"| {' | '.join(map(str, [file, *counts]))} |")
  for title, known in (("Survivors without an explanation", False), ("Explained survivors", True)):
    rows = [m for m, v in verdicts.items() if v == "survived" and bool(reason(m)) == known]
    if rows:
      lines += ["", f"## {title}", "", "| place | line | change | reason |"]
      lines.append("| --- | --- | --- | --- |")
    for m in rows:
      place = f"{m.file}:{m.line} {m.function}"
      code = [f"`{text}`".replace("|", "\\|") for text in (m.text, f"{m.before} -> {m.after}")]
      lines.append(f"| {place} | {' | '.join(code)} | {reason(m)} |")
  return "\n".join(lines)


def reason(mutant: Mutant) -> str:
  """Why it cannot be noticed; empty if that is not known."""
  place, change = mutant.key
  return EXPLAINED.get(place, {}).get(change, "")
