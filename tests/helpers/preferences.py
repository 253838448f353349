"""Preference pairs by a rule that can be checked: the shorter text wins."""

import json
import random
from pathlib import Path

WORDS = ("a", "go", "cat", "tree", "house", "yellow")


def shorter_wins(count: int, seed: int = 0) -> list[dict[str, str]]:
  """Returns pairs of words of which the chosen text has one to three words less."""
  draw = random.Random(seed)
  rows = []
  for i in range(count):
    size = draw.randint(1, 3)
    chosen, rejected = (
      " ".join(draw.choices(WORDS, k=k)) for k in (size, size + draw.randint(1, 3))
    )
    if len(chosen) >= len(rejected):
      chosen, rejected = rejected, f"{chosen} {rejected}"
    rows.append({"prompt": f"say {i}", "chosen": chosen, "rejected": rejected})
  return rows


def write(path: Path, rows: list[dict[str, str]]) -> str:
  """Writes rows as JSON lines and returns the path."""
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return str(path)
