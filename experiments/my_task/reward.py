"""The reward of `my_task_jsonl.py`: is the capital in the answer?"""


def right(prompts, completions, answer, **columns):
  """1.0 where the completion names the answer, one number per completion."""
  return [float(a.lower() in text.lower()) for text, a in zip(completions, answer)]
