"""Opens pages in a real browser without a window, where there is one."""

import contextlib
import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def path_of_browser():
  """Returns the browser that CHROMIUM names or that is installed; None without one."""
  return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


needs_browser = pytest.mark.skipif(
  path_of_browser() is None, reason="needs Chromium or Chrome, on the PATH or named by CHROMIUM"
)


@contextlib.contextmanager
def browser():
  """Yields the browser of playwright."""
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    # A container lets no process make a sandbox; the pages are our own.
    chromium = playwright.chromium.launch(
      executable_path=path_of_browser(), args=["--no-sandbox", "--disable-dev-shm-usage"]
    )
    try:
      yield chromium
    finally:
      chromium.close()


@contextlib.contextmanager
def opened(chromium, url, *, width=1200, height=900, scheme="light"):
  """Yields a page once it is drawn. Errors, messages and requests of the page fail the test."""
  context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
  page, trouble, requests = context.new_page(), [], []
  page.on("pageerror", lambda error: trouble.append(str(error)))
  page.on("console", lambda message: trouble.append(message.text))
  page.on("request", lambda request: requests.append(request.url))
  page.goto(url)
  page.wait_for_selector("html[data-ready]")
  page.set_default_timeout(10_000)
  yield page
  assert trouble == []
  own = (
    url.partition("#")[0] if url.startswith("file:") else url[: url.index("/", len("http://")) + 1]
  )
  assert all(request.startswith(own) for request in requests), requests
  context.close()
