"""Reads the examples of tasks and scores completions of one example."""

from grpo_jax.tasks import score


def keys(task, split):
  """Returns the keys of a split, in order."""
  return [example.key for example in task.splits[split]]


def all_examples(task):
  """Returns the examples of all splits."""
  return [example for split in task.splits.values() for example in split]


def grade(task, example, *completions):
  """Returns (total rewards, accuracies) of completions of one example."""
  columns = {name: [value] for name, value in example.columns.items()}
  batch = ([example.prompt], [list(completions)], columns)
  total, _ = score(task.rewards, *batch)
  accuracy, _ = score({"accuracy": (task.accuracy, 1.0)}, *batch)
  return total[0].tolist(), accuracy[0].tolist()
