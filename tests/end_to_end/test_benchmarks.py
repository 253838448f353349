"""Tests that benchmarks run at their smallest setting, and the arithmetic of their reports.

Peers need environments of their own and do not run here; a stand-in engine speaks their protocol.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import (
  ahead,
  alternate,
  cost,
  learning,
  lengths,
  logprobs,
  pass_rates,
  plans,
  problems,
  routes,
  sampling,
  settings,
  slots,
  step,
  tails,
)
from grpo_jax.environments.sandbox import layers as isolated
from grpo_jax.evaluate import Answers
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.tasks.base import Example, Task
from tests.helpers.processes import xla_flags

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--model", "random:tiny", "--rounds", "1", "--warmup", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., list[dict]]:
  """A function `(module, *arguments) -> rows`, the JSON lines that a benchmark prints."""
  # Tests run on eight virtual devices, benchmarks on the devices of the machine. They share a
  # compilation cache.
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": xla_flags(),
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
  }
  return partial(_run, environment)


def _run(environment: dict[str, str], module: str, *arguments: str) -> list[dict]:
  result = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{module}", *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_step(run):
  (row,) = run("step", "--setting", "smallest", *TINY)
  assert row["engine"] == "grpo_jax"
  assert row["completion_tokens"] == 2 * 2 * 3  # P x G x T: no completion ended early
  assert row["seconds"] >= row["sampling_seconds"] + row["update_seconds"] > 0
  assert row["peak_bytes"] > 0
  assert row["seconds_ratio"] == 1


@pytest.mark.slow
def test_sampling(run):
  shape = ("--kind", "two-shot", "--prompts", "2", "--group", "2", "--tokens", "5")
  (row,) = run("sampling", *shape, *TINY)
  assert row["completion_tokens"] == 2 * 2 * 5
  assert row["tokens_per_second"] == pytest.approx(20 / row["seconds"], rel=1e-3)
  assert 0 < row["of_bound"] < 1
  assert 0 < row["of_products"] < 1


def test_matmuls_of_unstacked_and_stacked_layers():
  shape = ModelConfig(
    vocab_size=11, width=6, layers=2, heads=2, kv_heads=1, head_dim=2, mlp=8, biases=("q",)
  )
  stacked = Decoder(shape).init(jax.random.key(0))
  whole, logits = sampling.multiplier(stacked, rows=3)()
  unstacked, other_logits = sampling.multiplier(unstack(stacked), rows=3)()
  assert (len(whole), len(unstacked), logits.shape) == (7, 14, (3, 11))
  total = [float(sum(out.sum() for out in products)) for products in (whole, unstacked)]
  assert total[0] == pytest.approx(total[1], rel=1e-4)
  expected = np.ones((3, 6)) @ np.asarray(stacked["embed"]).T
  for actual in (logits, other_logits):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_lengths(run):
  small = "--prompts 4 --group 2 --tokens 64 --median 8 --micro-batches 4 --rounds 1"
  plain, by_length = run("lengths", *small.split())
  assert plain["computed"] == plain["gain"] == 1
  assert by_length["computed"] < 1
  assert by_length["padded"] < plain["padded"]
  assert by_length["difference"] < 1e-5


@pytest.mark.slow
def test_partial(run):
  small = "--model random:tiny --prompts 2 --group 2 --tokens 16 --median 4 --budgets 4"
  plain, partial = run("partial", *small.split(), "--steps", "3", "--warmup", "1")
  assert plain["rounds"] == plain["carried"] == 0
  assert plain["decode_steps"] <= 16
  assert partial["decode_steps"] == pytest.approx(4 * partial["rounds"], rel=1e-3)
  assert 0 < partial["carried"] < 1


@pytest.mark.slow
def test_turns(run):
  """Plays two episodes, one of which is slow in one turn and the other in another."""
  small = "--model random:tiny --prompts 2 --group 1 --turns 3 --stall 3 --share 0.4 --rounds 1"
  in_step, apart = run("turns", *small.split(), "--seed", "10")
  assert in_step["same"] == apart["same"] == 1
  assert in_step["seconds"] > apart["seconds"] > in_step["alone"]


def test_computed_tokens():
  """Groups of two in one part: lengths up to 16 in one micro-batch, up to 40 in the other."""
  longest = np.array([40, 3, 33, 16])
  batch = lengths.make_batch(argparse.Namespace(
    prompts=4, group=2, tokens=64, prompt_tokens=40, median=8, sigma=1.0, seed=0
  ))  # fmt: skip
  mask = np.arange(64) < np.stack([longest, np.ones(4)], 1)[..., None]
  batch = dataclasses.replace(batch, mask=mask)
  assert lengths.computed_tokens(batch, 2, False) == 4 * (40 + 2 * 64)
  assert lengths.computed_tokens(batch, 2, True) == 2 * (40 + 2 * 16) + 2 * (40 + 2 * 64)


@pytest.mark.slow
def test_tails(run):
  small = "--prompts 2 --group 2 --tokens 6 --median 2 --rounds 1 --max-compactions 0 1"
  plain, compacted = run("tails", "--model", "random:tiny", *small.split())
  assert (plain["max_compactions"], compacted["max_compactions"]) == (0, 1)
  assert plain["gain"] == compacted["same"] == 1
  assert 1 <= plain["mean_length"] <= plain["longest"] <= 6


@pytest.mark.slow
def test_tails_with_rows_that_are_filled_again(run):
  small = "--prompts 2 --group 2 --tokens 6 --median 2 --rounds 1 --max-compactions 0 --rows 2"
  plain, refilled = run("tails", "--model", "random:tiny", *small.split())
  assert refilled["max_compactions"] == "rows 2"
  assert refilled["same"] == 1
  assert plain["longest"] == refilled["longest"]


def test_ways_to_keep_rows_live_by_hand():
  """Four completions of two prompts: 5 and 1 tokens, 2 and 2."""
  lengths = np.array([[5, 1], [2, 2]])
  assert slots.plain(lengths, 2) == [(4, 5)]
  # Two rows at most are live after 2 tokens; then one.
  assert slots.compacted(lengths.reshape(-1), [4, 2, 1]) == [(4, 2), (2, 0), (1, 3)]
  assert sum(rows * count for rows, count in slots.waves(lengths, 2)) == 2 * 1 + 1 * 4 + 2 * 2
  # Row 1 writes 1, 2 and 2 tokens beside the 5 of row 0.
  assert slots.refill(lengths, 2) == [(2, 5), (2, 0), (1, 0)]
  assert slots.refill_by_group(lengths, 2) == [(2, 7), (2, 0)]


def test_rows_that_are_filled_again_are_live():
  a = argparse.Namespace(prompts=64, group=8, tokens=4096, budget=64)
  rows = {(r["distribution"], r["way"]): r for r in slots.simulate(a, lambda rows: 1 + rows / 64)}
  for name in slots.DISTRIBUTIONS:
    assert rows[name, "refill"]["live"] > 0.85
    assert rows[name, "refill"]["rows"] == 64
    assert rows[name, "plain"]["rows"] == 512
  assert rows["long tail", "refill"]["seconds"] < rows["long tail", "compaction"]["seconds"]


def test_a_timeline_has_a_letter_for_each_step():
  spans = [("sampling", 0, 1), ("rewards", 1, 2), ("update", 2, 4)]
  spans += [("sampling", 4, 5), ("rewards", 5, 6), ("update", 6, 8)]
  lines = ahead.timeline(spans, first=0, count=2, width=12).splitlines()
  assert lines[:3] == [
    "sampling  ....bb......",
    "rewards   ......bb....",
    "update    aaaa....bbbb",
  ]


@pytest.mark.slow
def test_learning_is_measured_once(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", xla_flags())  # of one device
  out = tmp_path / "learning.jsonl"
  sizes = ["--task", "smallest", "--every", "1", "--held-out", "4", "--out", str(out)]
  learning.main(["--model", "random:tiny", "--seeds", "0", *sizes])
  (run,) = map(json.loads, out.read_text().splitlines())
  assert [point["step"] for point in run["curve"]] == [0, 1, 2]
  tokens = [point["tokens"] for point in run["curve"]]
  assert tokens[0] == 0 < tokens[1] < tokens[2] <= 2 * 2 * 2 * 3  # steps x P x G x T
  seconds = [point["seconds"] for point in run["curve"]]
  assert 0 <= seconds[0] < seconds[1] < seconds[2]
  learning.main(["--seeds", "0", *sizes, "--figure", str(tmp_path / "curves.png")])
  assert len(out.read_text().splitlines()) == 1
  assert "| grpo_jax | smallest |" in capsys.readouterr().out
  assert (tmp_path / "curves.png").stat().st_size > 0


def test_the_time_to_an_accuracy_is_a_median_that_counts_runs_without_it():
  def run(seed: int, accuracies: list[float]) -> dict:
    points = zip((0, 10, 20), accuracies)
    curve = [{**dict.fromkeys(learning.AXES, x), "accuracy": y} for x, y in points]
    return {"engine": "e", "task": "t", "learning_rate": 1.0, "precision": "", "seed": seed,
            "curve": curve}  # fmt: skip

  # 0.7 is reached after 10 * 4 / 5, never, and after 10 + 10 * 2 / 3 seconds; 0.8 once.
  runs = [run(0, [0.3, 0.8, 0.8]), run(1, [0.3, 0.4, 0.5]), run(2, [0.3, 0.5, 0.8 - 1e-9])]
  cells = [cell.strip() for cell in learning.table(runs).splitlines()[-1].split("|")]
  assert cells[4:9] == ["3", *["17 (8 to -)"] * 3, "-"]
  assert cells[-2] == "0.800 (0.500 to 0.800)"


def test_units_of_work_sum_up_to_a_curve():
  records = [{"seconds": 1.0, "cpu_seconds": 2.0, "step": n, "tokens": 7 * n, "accuracy": 0.1 * n}
             for n in range(3)]  # fmt: skip
  last = learning.curve_of(records)[-1]
  assert (last["seconds"], last["cpu_seconds"], last["tokens"], last["step"]) == (3.0, 6.0, 14, 2)


@pytest.mark.parametrize("name", problems.TASKS)
def test_problems_to_learn_are_split_and_judged(name):
  task = problems.TASKS[name]
  train, held_out = problems.make_problems(task)
  assert (len(train), len(held_out)) == (3800, 200)
  text = str if task.chat else lambda prompt: prompt.splitlines()[-1]
  pairs = {}
  for split, rows in (("train", train), ("held out", held_out)):
    for row in rows:
      a, b = map(int, re.findall(r"\d+", text(row["prompt"])))
      assert row["answer"] == str(a + b)
      pairs[tuple(sorted((a, b)))] = split
  assert len(pairs) == 4000  # so no pair is in both, in either order
  right = [f" {row['answer']}\n1 + 1 = 2" for row in held_out]
  if task.chat:
    right = [[{"role": "assistant", "content": f"It is {row['answer']}."}] for row in held_out]
  prompts, answers = zip(*((row["prompt"], row["answer"]) for row in held_out))
  assert set(problems.reward(prompts, right, answers)) == {1.0}
  assert set(problems.reward(prompts, right[::-1], answers)) <= {0.0, 1.0}
  assert sum(problems.reward(prompts, [right[0]] * 200, answers)) < 20


def answers(right: list[list[int]]) -> Answers:
  """Returns judged completions of which only the verdicts matter."""
  verdicts = np.array(right, float)
  ones = np.ones_like(verdicts)
  return Answers(verdicts, ones, ones > 0, ones, [], 0, [])


def test_pass_rates_by_hand():
  problems = [Example("?", {"answer": gold}, str(n)) for n, gold in enumerate(["a", "b", "a", "c"])]
  task = Task("letters", {"train": problems}, {}, None)
  sampled = answers([[1] * 8, [0] * 8, [1] + [0] * 7, [1, 1, 1, 1] + [0] * 4])
  row = pass_rates.row_of(task, answers([[1], [0], [0], [1]]), sampled)
  assert row["greedy"] == 0.5
  assert row["pass@1"] == (8 + 0 + 1 + 4) / 32
  assert row["pass@8"] == 3 / 4  # only the second problem has no right completion
  assert row["mixed"] == 2 / 4  # the third and the fourth
  assert row["constant"] == 2 / 4  # "a"
  # Of 1, 0, 1, 1 the variance is 1/4, and the error of the mean the root of 1/16.
  assert row["pass@8_se"] == 0.25


def test_the_table_of_pass_rates_begins_with_the_highest_and_ends_with_the_reasons():
  numbers = dict.fromkeys(("greedy", "pass@1", "pass@8_se", "mixed", "constant"), 0.25)
  rows = [
    {"dataset": "low", "prompt": 9, "pass@8": 0.1, **numbers},
    {"dataset": "long", "skipped": "prompts of up to 900 tokens"},
    {"dataset": "high", "prompt": 9, "pass@8": 0.5, **numbers},
  ]
  lines = pass_rates.table(rows).splitlines()
  assert [line.split()[1] for line in lines[2:4]] == ["high", "low"]
  assert lines[-1] == "- long: prompts of up to 900 tokens"


@pytest.mark.slow
def test_pass_rates_are_measured_once(run, tmp_path, monkeypatch, capsys):
  sizes = ["--problems", "4", "--tokens", "3", "--out", str(tmp_path / "rates.jsonl")]
  pass_rates.main(["--model", "random:tiny", *sizes, "--datasets", "chain_sum", "maze"])
  first, second = map(json.loads, (tmp_path / "rates.jsonl").read_text().splitlines())
  assert (first["dataset"], first["problems"], first["missing"]) == ("chain_sum", 4, 0)
  assert second == {"dataset": "maze", "skipped": second["skipped"]}  # its prompts are long
  monkeypatch.setattr(pass_rates, "measure", None)  # a second measurement would raise
  pass_rates.main(["--model", "random:tiny", *sizes, "--datasets", "chain_sum"])
  assert "| chain_sum |" in capsys.readouterr().out


@pytest.mark.slow
def test_memory(run):
  update, process = run("memory", "--setting", "smallest", *TINY)
  # The state is donated, and is nearly all of the arguments.
  assert 0.9 * update["argument_gib"] < update["donated_gib"] <= update["argument_gib"]
  assert 0 < process["start_gib"] <= process["peak_gib"]


@pytest.mark.slow
def test_cost(run, tmp_path):
  small = ("--points", "1", "--rounds", "1", "--width", "64", "--layers", "1", "--V", "256")
  (row,) = run("cost", "--axis", "G", *small, "--P", "1", "--N", "8", "--T", "4")
  assert (row["P"], row["G"], row["N"], row["T"]) == (1, 2, 8, 4)
  assert row["tokens"] == 8 + 2 * 4
  assert row["plain_tokens"] == 2 * (8 + 4)
  assert row["update_gib"] > 0
  rows = tmp_path / "rows.jsonl"
  rows.write_text(json.dumps(row) + "\n")
  (again,) = run("cost", "--rows", str(rows), "--figure", str(tmp_path / "cost.png"))
  # Printed numbers are rounded, so a fit to them differs.
  assert {k: v for k, v in again.items() if "predicted" not in k} == {
    k: v for k, v in row.items() if "predicted" not in k
  }
  assert (tmp_path / "cost.png").stat().st_size > 10_000


@pytest.mark.slow
def test_critic(run, tmp_path):
  small = [
    "steps=2", "model.source=random:tiny", "rollout.prompts_per_step=4", "rollout.group_size=2",
    "rollout.completion_length=4", "task.settings.eval_size=4", "rewards.workers=0",
  ]  # fmt: skip
  options = ["--seeds", "0", "--every", "1", "--folder", str(tmp_path)]
  arguments = (*options, *(f"--config.{line}" for line in small))
  grpo, ppo = run("critic", *arguments)
  assert (grpo["algorithm"], ppo["algorithm"]) == ("GRPO", "PPO")
  assert 1.9 < ppo["optimizer_bytes"] / grpo["optimizer_bytes"] < 2.1
  assert ppo["parameters"] == 2 * grpo["parameters"] + 64  # and a value head
  assert run("critic", *arguments) == [grpo, ppo]  # nothing is trained again


def test_logprobs(run):
  small = ("--batch", "1", "--tokens", "4", "--width", "8", "--vocab", "64", "--repeats", "1")
  assert [row["way"] for row in run("logprobs", *small)] == ["head_logprobs", "plain logits"]


def test_the_head_engine(capsys):
  shape = {"batch": 2, "tokens": 3, "width": 8, "vocab": 16}
  logprobs.beside_peers(shape, [], rounds=1, warmup=1)
  row = json.loads(capsys.readouterr().out.splitlines()[-1])
  hidden, head, tokens, _ = settings.head_inputs(**shape)
  p = np.exp(hidden @ head.T)  # small enough to need no shift
  chosen = np.take_along_axis(p / p.sum(-1, keepdims=True), tokens[..., None], -1)
  assert row["logp"] == pytest.approx(np.log(chosen).mean(), rel=1e-4)


STAND_IN = """
import time
from benchmarks.worker import Channel
channel = Channel()
print("prints of a library must not reach the parent")
channel.ready({"version": "1"})
while channel.wait():
  with channel.measure() as record:
    time.sleep(channel.settings["nap"])
    record["completion_tokens"] = 7
"""


def test_engines_take_turns():
  command = [sys.executable, "-c", STAND_IN]
  results = alternate.alternate(
    {alternate.OURS: command, "peer": command}, {"nap": 0.05}, rounds=2, warmup=1
  )
  assert list(results) == [alternate.OURS, "peer"]
  for result in results.values():
    assert result["version"] == "1"
    assert [record["completion_tokens"] for record in result["records"]] == [7, 7]
    assert all(record["seconds"] >= 0.05 > record["cpu_seconds"] for record in result["records"])


def test_the_error_of_a_dead_engine_shows_its_log():
  command = [sys.executable, "-c", "raise SystemExit('no such weights')"]
  with pytest.raises(RuntimeError, match="no such weights"):
    alternate.alternate({alternate.OURS: command}, {}, rounds=1, warmup=0)


def test_ratios():
  def result(seconds: list[float]) -> dict:
    return {
      "records": [{"seconds": s, "cpu_seconds": 2 * s, "peak_bytes": int(s)} for s in seconds]
    }

  results = {alternate.OURS: result([1, 2, 4]), "peer": result([3, 4, 20])}
  ours, peer = alternate.summarize(results, {"name": "x"}, {"rate": 10})
  assert ours["seconds_ratio"] == 1
  assert peer["seconds_ratio"] == 2  # medians 4 and 2
  assert peer["seconds_ratio_range"] == [2, 5]  # 3/1, 4/2, 20/4
  assert peer["cpu_seconds"] == 8
  assert peer["peak_ratio"] == 5  # the largest of each: 20 and 4
  assert peer["rate"] == 2.5


def test_different_token_counts_are_an_error():
  def result(tokens: int) -> dict:
    return {"records": [{"prompt_tokens": tokens, "completion_tokens": 3}]}

  with pytest.raises(ValueError, match="prompt_tokens"):
    step.same_tokens({"grpo_jax": result(58), "peer": result(60)})


def test_prompts_are_solved_correctly_and_reproducible():
  for kind in ("two-shot", "eight-shot"):
    prompts = settings.make_prompts(kind, 3)
    assert prompts == settings.make_prompts(kind, 5)[:3]
    for line in prompts[0].splitlines()[:-1]:
      if "=" in line:
        left, right = line.split(" = ")
        assert sum(map(int, left.split(" + "))) == int(right)
        assert len({len(number) for number in (*left.split(" + "), right)}) == 1
  assert settings.make_prompts("chat", 1)[0][0]["role"] == "user"


def test_cost_model_recovers_its_constants():
  rows = []
  for group in (2, 4, 8):
    row = {"P": 1, "G": group, "N": 10, "T": 5, "V": 100 * group}
    row |= {"tokens": 10 + 5 * group, "plain_tokens": 15 * group}
    head = group * 5 * row["V"]
    row["update_seconds"] = 0.5 + 0.01 * row["tokens"] + 1e-6 * head
    rows.append(row | {"plain": 0.5 + 0.01 * row["plain_tokens"] + 1e-6 * head})
  cost.add_model(rows)
  np.testing.assert_allclose([row["plain_predicted_seconds"] for row in rows],
                             [row["plain"] for row in rows], rtol=1e-6)  # fmt: skip


def test_the_share_of_ending_tokens_makes_lengths_lognormal():
  """Ends half by token 4, the median, and all by token 8, the length."""
  table = tails.lognormal_stops(4.0, 0.8, length=8, vocab=20_000)
  continues = [(table[state] != 8).mean() for state in range(8)]
  assert np.prod(continues[:4]) == pytest.approx(0.5, abs=0.02)
  z = np.log(2 / 4) / 0.8  # of a length of 2
  assert np.prod(continues[:2]) == pytest.approx(1 - 0.5 * math.erfc(-z / 2**0.5), abs=0.02)
  assert table[8].tolist() == [8] * 20_000  # the end is never left
  assert set(table[3].tolist()) == {4, 8}


def test_the_page_of_plans_shows_its_records():
  records = [json.loads(line) for line in plans.RECORDS.read_text().splitlines()]
  assert plans.page(records) == (ROOT / "docs" / "plans.md").read_text()
  (row,) = [r for r in records if (r["model"], r["slice"]) == ("Qwen/Qwen3-8B", "v5e-16")]
  decoding = row["work"]["decode"]
  text = plans.row(row)
  assert f"{decoding['seconds'] * (1024 - 1):.2f} s, {decoding['limit']}" in text
  assert "**no**" in text


@pytest.mark.skipif(not isolated(), reason="needs Linux with namespaces or Landlock")
def test_sandbox(run):
  rows = run("sandbox", "--seconds", "0.3", "--parallel", "1")
  assert [row["what"] for row in rows] == ["programs", "functions", "outputs"]
  assert all(row["per_second"] > 0 for row in rows)


@pytest.mark.slow
def test_routes_are_compared_by_depth():
  rows = routes.measure("random:tiny_moe", "float32", ["1 + 2 =", "34 + 5 ="], 2, 3)
  assert [row["layers"] for row in rows] == [1, 2]
  assert all(0 < row["tokens"] <= 12 for row in rows)
  # In float32 without near ties, only rounding is left.
  assert max(row["replayed_max"] for row in rows) < 2e-5
  assert max(row["other"] for row in rows) == 0
