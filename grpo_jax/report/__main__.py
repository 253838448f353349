"""Shows runs as a page: curves, completions token by token, comparisons, findings, configs.

    python -m grpo_jax.report RUN [RUN ...]          writes one HTML file that loads nothing
    python -m grpo_jax.report RUN [RUN ...] --serve  shows runs that go on, to this machine only

The page needs no network and no server; a link or a mail can carry it.
"""

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo_jax import addresses, extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("train", "grpo_jax.report")

from grpo_jax.report import page
from grpo_jax.report.data import named
from grpo_jax.report.server import HOST, Server
from grpo_jax.run import console, mirror
from grpo_jax.run.workdir import write_whole

NAME = "report.html"
PERIOD = 15.0  # seconds between looks at a store
_CLOSING = 5.0  # seconds for the last look to end


@console.guarded()
def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m grpo_jax.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("runs", nargs="+", metavar="RUN", help="a work directory")
  parser.add_argument("--out", help="the file; by default report.html in the only run")
  parser.add_argument(
    "--limit", type=float, default=30.0, metavar="MIB",
    help="size of the samples in the file; of larger ones each step shows fewer groups (30)",
  )  # fmt: skip
  parser.add_argument("--serve", action="store_true", help=f"serve the page on {HOST}, and update")
  parser.add_argument("--port", type=int, default=0, help="of --serve; by default a free one")
  arguments = parser.parse_args(argv)
  try:
    if arguments.limit <= 0:
      raise ValueError(f"--limit is {arguments.limit:g}, it must be above 0 (MiB)")
    if not 0 <= arguments.port < 2**16:
      raise ValueError(f"--port is {arguments.port}, it must be 0 (a free one) to 65535")
    out = arguments.out and addresses.local(arguments.out, "--out")
    if not out and not addresses.is_path(arguments.runs[0]):
      out = Path(NAME)  # not in the copy
    with contextlib.ExitStack() as stack:
      copies = [stack.enter_context(mirror.followed(run)) for run in arguments.runs]
      folders = [str(copy.folder) for copy in copies]
      if arguments.serve:
        stack.enter_context(refreshed(copies))
        return serve(folders, arguments.port)
      return write(folders, out, arguments.limit)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def write(folders: list[str], out: Path | None, limit: float) -> int:
  """Writes the page of some runs."""
  runs = named(folders)
  out = out or (runs[0].folder / NAME if len(runs) == 1 else Path(NAME))
  text = page.static(runs, limit)
  out.parent.mkdir(parents=True, exist_ok=True)
  write_whole(out, text)
  for run in runs:
    for problem in run.problems:
      print(f"warning: {run.name}: {problem}", file=sys.stderr)
  print(f"{out}: {len(text) / page.MEBIBYTE:.1f} MiB; open it in a browser")
  return 0


@contextlib.contextmanager
def refreshed(copies: Sequence[mirror.Followed]) -> Iterator[None]:
  """Copies what changes on stores every `PERIOD` seconds while the body runs.

  An error is said once, and again when it has changed.
  """
  ended, said = threading.Event(), [""] * len(copies)

  def follow() -> None:
    while not ended.wait(PERIOD):
      for number, copy in enumerate(copies):
        try:
          copy.refresh()
          said[number] = ""
        except ValueError as error:
          if str(error) != said[number]:
            print(f"warning: {error}. Trying again", file=sys.stderr)
          said[number] = str(error)

  thread = threading.Thread(target=follow, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join(_CLOSING)  # the copies go with the body


def serve(folders: list[str], port: int) -> int:
  """Serves the page until Ctrl-C."""
  with Server(folders, port) as server:
    print(f"{server.url} (Ctrl-C ends it)", flush=True)
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      print()
  return 0


if __name__ == "__main__":
  sys.exit(main())
