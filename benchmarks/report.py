"""Measures the report of a large run: the size of the file, and how fast a browser shows it.

    python -m benchmarks.report [--steps 500 --prompts 32 --group 8]

The run is synthetic: completions of 24 to 40 random words, and every ten steps (`log.tokens_every`)
their tokens with random numbers. Needs Chromium or Chrome, and playwright.
"""

import argparse
import tempfile
import time
from pathlib import Path

from grpo_jax.report import page as pages
from grpo_jax.report.data import named
from tests.helpers.browser import browser
from tests.helpers.work_directories import make_run


def main(argv: list[str] | None = None) -> None:
  """Prints one line per number."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
  parser.add_argument("--steps", type=int, default=500)
  parser.add_argument("--prompts", type=int, default=32)
  parser.add_argument("--group", type=int, default=8)
  parser.add_argument("--tokens-every", type=int, default=10)
  parser.add_argument("--limit", type=float, default=30.0, help="MiB")
  a = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    run = make_run(
      Path(folder) / "run", steps=a.steps, prompts=a.prompts, group=a.group, every=50,
      tokens_every=a.tokens_every, words=(24, 40),
    )  # fmt: skip
    start = time.perf_counter()
    text = pages.static(named([str(run)]), a.limit)
    written = time.perf_counter() - start
    path = Path(folder) / "report.html"
    path.write_text(text, encoding="utf-8")
    print(f"completions  {a.steps} steps x {a.prompts * a.group}; tokens every {a.tokens_every}")
    print(f"file         {len(text) / pages.MEBIBYTE:.1f} MiB")
    print(f"written in   {written:.1f} s")
    with browser() as chromium:
      shown = show(chromium, path.as_uri())
  for name, seconds in shown.items():
    print(f"{name:12} {seconds * 1000:.0f} ms")


def show(chromium, url: str) -> dict[str, float]:
  """Returns the seconds that a browser takes for the parts of a page."""
  page = chromium.new_page(viewport={"width": 1280, "height": 900})
  times, start = {}, time.perf_counter()
  page.goto(f"{url}#curves")
  page.wait_for_selector("#charts canvas")
  times["opened"] = time.perf_counter() - start
  page.locator("#tab-completions").click()
  page.wait_for_selector(".completion")
  page.locator("#sample-shade").select_option("entropy")
  start = time.perf_counter()
  page.locator("#sample-slider").fill("10")
  page.locator("#sample-step", has_text="10").wait_for()
  page.locator(".token").first.wait_for()
  times["a step"] = time.perf_counter() - start
  start, more = time.perf_counter(), page.locator("#more")
  while more.is_visible():
    before = page.locator(".group").count()
    more.click()
    page.locator(".group").nth(before).wait_for()
  times["all of it"] = time.perf_counter() - start
  page.close()
  return times


if __name__ == "__main__":
  main()
