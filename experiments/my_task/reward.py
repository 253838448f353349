"""The reward of `my_task_jsonl.py`."""


def largest(prompts, completions, numbers, **columns):
  """Returns 1.0 where the completion is the largest number and nothing else, 0.0 elsewhere."""
  return [float(text.strip() == str(max(n))) for text, n in zip(completions, numbers)]
