"""Plays the schedule of partial rollouts by hand."""


def partial_schedule(rounds, steps, count, size):
  """Returns (numbers of the prompts, rounds) of each step.

  A step begins prompts until `size` are under way, runs rounds until `count` are complete, and
  takes those of them that were begun first.

  Args:
    rounds: of each prompt, until its last completion has ended.
  """
  left, begun, result = {}, 0, []  # number -> rounds to go
  for _ in range(steps):
    while len(left) < size:
      left[begun] = rounds[begun]
      begun += 1
    played = 0
    while sum(n <= 0 for n in left.values()) < count:
      left = {number: n - 1 for number, n in left.items()}
      played += 1
    chosen = [number for number in sorted(left) if left[number] <= 0][:count]
    left = {number: n for number, n in left.items() if number not in chosen}
    result.append((chosen, played))
  return result
