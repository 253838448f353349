"""Tests the report in a real browser: it opens, filters, sorts, compares; text stays text."""

import json
import threading

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import expect

from grpo_jax.report import page as pages
from grpo_jax.report.data import named
from grpo_jax.report.server import Server
from tests.helpers.browser import browser, needs_browser, opened
from tests.helpers.work_directories import make_run, write

pytestmark = needs_browser

HOSTILE = [
  "<script>window.hacked = 1</script>",
  "<img src=x onerror='window.hacked = 1'>",
  "</script><script>window.hacked = 1</script>",
  "javascript:window.hacked=1 &lt;b&gt; ${window.hacked = 1} {{hacked}}",
  "\u202eright to left\u202c \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u200b\x00\x1b[31m",
  "x" * 100_000,
]


@pytest.fixture(scope="module")
def chromium():
  with browser() as chromium:
    yield chromium


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Returns three runs: two seeds, and another learning rate that learns nothing."""
  folder = tmp_path_factory.mktemp("runs")
  rate = ["optimizer.learning_rate=1e-6"]
  return [
    make_run(folder / "seed-0", seed=0),
    make_run(folder / "seed-1", seed=1),
    make_run(folder / "flat", steps=60, gain=0.0, changes=rate),
  ]


def written(folder, runs, name="report.html", limit=30.0):
  path = folder / name
  path.write_text(pages.static(named([str(run) for run in runs]), limit), encoding="utf-8")
  return path.as_uri()


@pytest.fixture(scope="module")
def url(tmp_path_factory, runs):
  return written(tmp_path_factory.mktemp("page"), runs)


def test_the_overview_says_what_the_runs_are(chromium, url):
  with opened(chromium, url) as page:
    assert page.title() == "seed-0, seed-1, flat: report"
    assert page.locator("article.run").count() == 3
    text = page.locator("article.run").nth(2).inner_text()
    assert "random:tiny" in text
    assert "60 of 60" in text
    assert "flat_reward sure" in text
    assert "Since step" in text
    # 59 steps of 3 s, of which 1 s is sampling and half a second rewards
    assert "sampling 59 s (33 %)" in text
    assert "rewards 29.5 s (17 %)" in text


def test_curves_are_drawn_filtered_smoothed_and_put_together_by_seed(chromium, url):
  with opened(chromium, url + "#curves") as page:
    page.wait_for_selector("#charts canvas")
    assert page.locator("#legend .key").count() == 3
    reward = page.locator("figure", has=page.get_by_text("reward", exact=True))
    reward.locator(".u-over").hover()
    expect(reward.locator(".readout")).to_contain_text("step ")
    # the doctor's finding on the curve that shows it
    assert "flat_reward (sure)" in reward.inner_text()
    page.get_by_label("seeds as bands").check()
    expect(page.locator("#legend .key")).to_have_count(2)
    assert page.locator("#legend .key").first.inner_text() == "seed-0, seed-1"
    page.get_by_label("Metrics").fill("entro")
    expect(page.locator("figcaption")).to_have_text(["entropy"])
    page.get_by_label("Smooth over").fill("5")
    expect(page.locator("#smoothing-value")).to_have_text("11 steps")
    page.get_by_label("Metrics").fill("no such metric")
    page.get_by_text("No metric has such a name.").wait_for()


def rewards(page):
  """Returns the rewards of the completions that are shown, in their order."""
  facts = page.locator(".completion .facts span", has_text="reward").all_inner_texts()
  return [float(text.split()[1]) for text in facts]


def test_completions_are_sorted_filtered_searched_and_followed(chromium, url):
  with opened(chromium, url + "#completions") as page:
    page.wait_for_selector(".completion")
    assert "4 prompts, 16 completions" in page.locator("#sample-status").inner_text()
    page.get_by_role("button", name="later").click()
    expect(page.locator("#sample-step")).to_have_text("1")
    page.keyboard.press("]")
    expect(page.locator("#sample-step")).to_have_text("2")
    page.get_by_label("Sort").select_option("reward")
    page.wait_for_timeout(200)
    for group in range(4):
      of_group = rewards(page.locator(".group").nth(group))
      assert of_group == sorted(of_group, reverse=True)
    page.locator("#sample-filter").select_option("right")
    page.wait_for_timeout(200)
    assert set(rewards(page)) == {1.0}
    page.locator("#sample-filter").select_option("all")
    page.get_by_label("Contains").fill("What is 22")  # the third prompt of step 2
    expect(page.locator(".group")).to_have_count(1)
    page.get_by_role("button", name="through 3 steps").click()
    page.get_by_text("Step 9", exact=True).wait_for()
    assert page.locator("#groups h3").all_inner_texts() == ["Step 2", "Step 9", "Step 16"]
    page.get_by_role("button", name="Back to all prompts").click()
    expect(page.locator("#groups h3")).to_have_count(0)


def test_a_token_shows_its_numbers_to_mouse_and_keyboard(chromium, url, runs):
  row = json.loads((runs[0] / "samples/step_000000.jsonl").read_text().splitlines()[0])
  with opened(chromium, url + "#completions") as page:
    page.get_by_label("Shade by").select_option("entropy")
    token = page.locator(".token").nth(1)
    token.hover()
    tip = page.locator("#tip").inner_text()
    assert json.dumps(row["tokens"]["text"][1]) in tip
    assert f"entropy {row['tokens']['entropy'][1]:g} nats" in tip
    assert f"log-prob {row['tokens']['logp'][1]:g}" in tip
    alphas = page.evaluate(
      "[...document.querySelectorAll('.tokens')][0].querySelectorAll('.token').length"
      " && [...document.querySelector('.tokens').querySelectorAll('.token')]"
      ".map(x => Number((x.style.backgroundColor.match(/([0-9.]+)\\)$/) ?? [0, 0])[1]))"
    )
    expected = [0.75 * entropy / 3 for entropy in row["tokens"]["entropy"]]
    assert alphas == pytest.approx(expected, abs=0.006)
    page.locator(".tokens").first.focus()
    for key, number in (("Home", 1), ("ArrowRight", 2), ("End", len(row["tokens"]["text"]))):
      page.keyboard.press(key)
      assert f"token {number} of" in page.locator("#tip").inner_text()
    page.get_by_role("button", name="later").click()  # step 1 has no tokens
    page.get_by_text("this step has no tokens").wait_for()
    page.get_by_role("button", name="earlier").click()
    page.get_by_label("Shade by").select_option("ratio")
    page.get_by_text("log.ratios=true records them").wait_for()


def test_two_evaluations_are_compared_prompt_by_prompt(chromium, url, runs):
  def accuracies(run, step):
    lines = (run / f"samples/eval_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line)["accuracy"] for line in lines]

  a, b = accuracies(runs[0], 20), accuracies(runs[2], 60)
  with opened(chromium, url + "#compare") as page:
    page.locator("#compare-a").select_option(label="seed-0, after 20 steps")
    page.locator("#compare-b").select_option(label="flat, after 60 steps")
    differ = sum(x != y for x, y in zip(a, b))
    expect(page.locator("#compare-table tbody tr")).to_have_count(differ)
    better, worse = sum(y > x for x, y in zip(a, b)), sum(y < x for x, y in zip(a, b))
    status = page.locator("#compare-status").inner_text()
    assert f"8 prompts in both. A {sum(a) / 8:g} ±" in status
    assert f"B is better on {better} and worse on {worse}" in status
    changes = [y - x for x, y in zip(a, b)]
    center = sum(changes) / 8
    spread = (sum((c - center) ** 2 for c in changes) / 7 / 8) ** 0.5
    assert f"B − A {round(center, 3):g} ± {round(spread, 3):g}" in status
    page.locator("#compare-filter").select_option("all")
    expect(page.locator("#compare-table tbody tr")).to_have_count(8)


def test_runs_of_different_tasks_have_nothing_to_compare(chromium, tmp_path):
  one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
  for path in (two / "samples").glob("eval_*.jsonl"):
    path.write_text(path.read_text().replace(" + ", " - ").replace("held-out", "other"))
  with opened(chromium, written(tmp_path, [one, two]) + "#compare") as page:
    page.get_by_text("These two have no prompt in common").wait_for()


def test_configs_are_compared(chromium, url):
  with opened(chromium, url + "#config") as page:
    page.get_by_label("only what differs").check()
    names = page.locator("#config-table tbody td:first-child").all_inner_texts()
    assert names == ["optimizer.learning_rate", "seed", "steps"]


@pytest.mark.parametrize("shade", ["", "entropy"])
def test_hostile_text_is_shown_as_text(chromium, tmp_path, shade):
  run = make_run(tmp_path / "<b>run", steps=1, prompts=1, group=6)
  path = run / "samples/step_000000.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row, text in zip(rows, HOSTILE, strict=True):
    row |= {"prompt": HOSTILE[0], "key": HOSTILE[1], "answer": HOSTILE[2], "completion": text}
    row["rewards"] = {HOSTILE[1]: 1.0, "exact": 0.0}
    numbers = [-1.0] * len(text[:2000])
    row["tokens"] = {"text": list(text[:2000]), "logp": numbers, "entropy": numbers}
  write(path, rows)
  with opened(chromium, written(tmp_path, [run]) + "#completions") as page:
    assert page.title() == "<b>run: report"
    page.get_by_label("Shade by").select_option(shade)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("script[src], img, iframe, #groups b, #groups script").count() == 0
    bodies = page.locator(".completion .message").all_inner_texts()
    for body, text in zip(bodies[:4], HOSTILE):
      assert body == text
    assert "⟨202E⟩" in bodies[4]
    assert "⟨0000⟩" in bodies[4]
    assert "\u202e" not in page.content()
    assert len(bodies[5]) < 7000  # the rest is shown when asked for
    if not shade:
      page.get_by_role("button", name="94000 more characters").click()
      assert page.locator(".completion .message").last.inner_text() == HOSTILE[5]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_episodes_are_shown_turn_by_turn(chromium, tmp_path):
  run = make_run(tmp_path / "run", steps=1, prompts=1, group=1)
  path = run / "samples/step_000000.jsonl"
  row = json.loads(path.read_text())
  row["turns"] = [
    {"role": "assistant", "content": "is it 4?"},
    {"role": "tool", "content": "larger"},
    {"role": "assistant", "content": "6"},
  ]
  row["tokens"] = {
    "text": ["is", " it", " 4?", "larger", "6"],
    "logp": [-0.1, -0.2, -3.0, None, -0.5],
    "entropy": [0.1, 0.2, 1.0, None, 0.5],
    "advantage": [0.25, 0.25, 0.25, None, -1.0],
    "ratio": [1.0, 1.2, 1.0, None, 0.5],
  }
  write(path, [row])
  with opened(chromium, written(tmp_path, [run]) + "#completions") as page:
    assert page.locator(".completion .role").all_inner_texts() == ["assistant", "tool", "assistant"]
    page.get_by_label("Shade by").select_option("advantage")
    page.locator(".token", has_text="larger").hover()
    assert "written by the environment" in page.locator("#tip").inner_text()
    page.locator(".token", has_text="6").hover()
    assert "advantage -1" in page.locator("#tip").inner_text()
    page.get_by_label("Shade by").select_option("ratio")
    page.locator(".token", has_text=" it").hover()
    assert "ratio 1.2 (after the update, to the sampler)" in page.locator("#tip").inner_text()
    colors = page.locator(".token").evaluate_all("x => x.map((y) => y.style.backgroundColor)")
    # the ratios 1, 1.2, 1, none, 0.5: no color, some green, no color, none, all of the red
    assert colors[1].startswith("rgba(46, 158, 98, 0.2")
    assert colors[4] == "rgba(217, 83, 79, 0.75)"
    assert colors[0].endswith(" 0)")
    assert colors[3] == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_and_both_schemes(chromium, url, scheme):
  with opened(chromium, url, width=360, scheme=scheme) as page:
    for tab in ("overview", "curves", "completions", "compare", "config"):
      page.locator(f"#tab-{tab}").click()
      page.wait_for_timeout(100)
      assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab
    assert page.evaluate(CONTRAST) > 4.5  # WCAG 2.1, level AA


# The contrast of the faintest text with the page.
CONTRAST = """() => {
  const light = (name) => {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(${name})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/\\d+/g).map((x) => x / 255)
      .map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    probe.remove();
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light("--box");
  return Math.min(...["--ink", "--soft", "--bad", "--good", "--link"].map((name) => {
    const [a, b] = [light(name), paper].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  }));
}"""


def test_everything_can_be_reached_by_keyboard(chromium, url):
  with opened(chromium, url) as page:
    page.locator("#tab-overview").focus()
    for name in ("curves", "completions", "compare", "config", "overview"):
      page.keyboard.press("ArrowRight")
      assert page.evaluate("document.activeElement.id") == f"tab-{name}"
      assert page.locator(f"#{name}").is_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "metric-filter"


def test_a_page_with_a_size_limit_says_what_it_leaves_out(chromium, tmp_path):
  run = make_run(tmp_path / "run", steps=10, prompts=8)
  whole = len(pages.static(named([str(run)]))) / pages.MEBIBYTE
  empty = len(pages.live("run")) / pages.MEBIBYTE
  limit = (whole - empty) / 2
  with opened(chromium, written(tmp_path, [run], limit=limit) + "#completions") as page:
    page.get_by_text("of 8 groups").wait_for()
    assert 1 <= page.locator(".group").count() < 8


def test_a_run_that_goes_on_is_served_and_updates_by_itself(chromium, tmp_path):
  run = make_run(tmp_path / "run", steps=10)
  metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
  (run / "metrics.jsonl").write_text("".join(metrics[:5]) + metrics[5][:20])  # half a line
  with Server([str(run)]) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with opened(chromium, server.url) as page:
      assert "4 of 10" in page.locator("article.run").inner_text()
      (run / "metrics.jsonl").write_text("".join(metrics))
      page.get_by_text("10 of 10").wait_for(timeout=15_000)
      page.locator("#tab-completions").click()
      page.wait_for_selector(".completion")
    server.shutdown()
