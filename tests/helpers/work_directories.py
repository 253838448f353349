"""Writes work directories as runs leave them, without a run."""

import json
import math
import random

from grpo_jax import config as configs

WORDS = ["the", "sum", "of", "two", "numbers", "is", "not", "what", "it", "was", "before\n"]


def make_run(
  folder, *, seed=0, steps=20, prompts=4, group=4, every=5, tokens_every=5, gain=1.0, changes=(),
  words=(3, 12),
):  # fmt: skip
  """Writes config, metrics and samples of an addition that gets better; returns the folder.

  Args:
    every: steps between evaluations, of the same 8 problems.
    tokens_every: steps between samples with tokens.
    gain: how fast it gets better; 0 does not.
    words: fewest and most words of a completion, one token each.
    changes: overrides of the config, `field=value`.
  """
  rng = random.Random(seed)
  (folder / "samples").mkdir(parents=True)
  options = [f"--config.{c}" for c in (f"seed={seed}", f"steps={steps}", *changes)]
  config = configs.to_saved(configs.load("experiments/tiny.py", options))
  (folder / "config.json").write_text(json.dumps(config))
  rows = []
  for step in range(steps + 1):
    chance = 1 / (1 + math.exp(2 - gain * 6 * step / steps))
    if step % every == 0:
      answers = [evaluated(i, rng.random() < chance) for i in range(8)]
      write(folder / f"samples/eval_{step:06d}.jsonl", answers)
      accuracy = sum(a["accuracy"] for a in answers) / 8
      spread = math.sqrt(accuracy * (1 - accuracy) / 7)
      rows.append(
        {"step": step, "eval/accuracy": accuracy, "eval/accuracy_se": spread, "eval/n": 8}
      )
    if step == steps:
      break
    samples = [
      completion(rng, f"{step % 7}{p}", chance, tokens_every and step % tokens_every == 0, words)
      for p in range(prompts)
      for _ in range(group)
    ]
    for p in range(prompts):
      centered(samples[p * group : (p + 1) * group])
    write(folder / f"samples/step_{step:06d}.jsonl", samples)
    reward = sum(s["reward"] for s in samples) / len(samples)
    rows.append(
      {
        "step": step, "reward": reward, "accuracy": reward, "entropy": 2.0 - chance,
        "grad_norm": 0.5, "loss": None, "frac_reward_zero_std": 0.2, "step_time": 3.0,
        "time/sampling": 1.0, "time/rewards": 0.5, "num_tokens": 100 * (step + 1),
        "completions/mean_length": 9.0 + chance, "completions/clipped_ratio": 0.0,
      }
    )  # fmt: skip
  write(folder / "metrics.jsonl", rows)
  return folder


def completion(rng, name, chance, with_tokens, words):
  words = [rng.choice(WORDS) for _ in range(rng.randint(*words))]
  right = rng.random() < chance
  row = {
    "prompt": f"What is {name} + 1?\n", "key": name, "columns": {}, "answer": int(name) + 1,
    "completion": " ".join(words), "reward": float(right), "accuracy": float(right),
    "length": len(words), "rewards": {"exact": float(right), "short": -0.1 * len(words)},
  }  # fmt: skip
  if with_tokens:
    numbers = {n: [round(rng.uniform(*r), 4) for _ in words] for n, r in RANGES.items()}
    row["tokens"] = {"text": [f" {word}" for word in words], **numbers}
  return row


RANGES = {"logp": (-4, 0), "entropy": (0, 3)}


def evaluated(i, right):
  text = str(2 * i) if right else f"not {2 * i}"
  return {
    "prompt": f"{i} + {i} =", "key": f"held-out {i}", "columns": {}, "answer": 2 * i,
    "completion": text, "accuracy": float(right), "length": len(text), "ended": True,
  }  # fmt: skip


def centered(rows):
  average = sum(row["reward"] for row in rows) / len(rows)
  for row in rows:
    row["advantage"] = row["reward"] - average


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
