"""Tests which examples a step gets: a function of (seed, step), by epoch and process."""

import pytest

from grpo_jax.data import examples, steps_of
from grpo_jax.tasks.indexed import Indexed

# Examples of steps 0 to 3, as version 0.1.0 drew them.
OLD = {
  0: [[0, 4, 6, 7], [8, 3, 1, 9], [5, 2, 5, 7], [6, 0, 4, 8]],
  -1: [[2, 9, 5, 3], [0, 4, 6, 8], [7, 1, 0, 4], [6, 7, 8, 3]],
  "stream": [[8, 5, 9, 6]],
}


def steps(count, size, length=10, seed=0):
  return [examples(range(length), step, size, seed) for step in range(count)]


def test_a_step_does_not_depend_on_earlier_calls():
  in_order = steps(12, 4)
  backwards = [examples(range(10), step, 4, 0) for step in reversed(range(12))][::-1]
  assert backwards == in_order
  assert examples(range(10), 7, 4, 0) == in_order[7]


def test_every_epoch_contains_every_example_once_in_a_new_order():
  flat = [i for step in steps(10, 4) for i in step]  # 4 epochs of 10, across steps
  epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  assert epochs[0] != list(range(10))


def test_the_step_size_does_not_change_the_order():
  assert [i for s in steps(6, 2) for i in s] == [i for s in steps(2, 6) for i in s]


def test_the_blocks_of_all_processes_are_the_step():
  for step in range(5):
    blocks = [examples(range(10), step, 6, 3, process, 3) for process in range(3)]
    assert [len(block) for block in blocks] == [2, 2, 2]
    assert [i for block in blocks for i in block] == examples(range(10), step, 6, 3)


def test_seeds_give_different_orders():
  assert len({tuple(examples(range(1000), 0, 8, seed)) for seed in (0, 1, 2**31, 2**32 - 1)}) == 4
  assert examples(range(10), 0, 8, 5) == examples(range(10), 0, 8, 5)
  assert len(examples(range(10), 0, 8, -1)) == len(examples(range(10), 0, 8, 2**40)) == 8


def test_a_step_larger_than_the_split_continues_with_the_next_epochs():
  drawn = examples("abc", 0, 8, 0)
  assert sorted(drawn[:3]) == sorted(drawn[3:6]) == ["a", "b", "c"]
  assert len(set(drawn[6:])) == 2
  assert examples("a", 5, 2, 0) == ["a", "a"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (([], 0, 1, 0), "no examples"),
    (([1], -1, 1, 0), "step is -1"),
    (([1], 0, 0, 0), "count 0"),
    (([1], 0, 3, 0, 0, 2), "3 examples per step cannot be divided evenly among 2 processes"),
    (([1], 0, 2, 0, 2, 2), r"process_index is 2: it must be in \[0, 2\)"),
  ],
)
def test_wrong_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    examples(*arguments)


def test_streams_are_independent_shuffles_and_0_is_the_default():
  drawn = [examples(range(10), 1, 20, 7, stream=stream) for stream in range(4)]
  assert drawn[0] == examples(range(10), 1, 20, 7)
  assert len(set(map(tuple, drawn))) == 4
  for stream in drawn:
    assert sorted(stream) == sorted([*range(10)] * 2)
  blocks = [examples(range(10), 3, 6, 7, process, 3, stream=2) for process in range(3)]
  assert [i for block in blocks for i in block] == examples(range(10), 3, 6, 7, stream=2)
  other_seed = [examples(range(10), 1, 20, 8, stream=stream) for stream in range(4)]
  assert not set(map(tuple, drawn)) & set(map(tuple, other_seed))


def test_only_the_examples_of_this_process_are_accessed():
  accessed = []
  split = Indexed(lambda i: accessed.append(i) or i, range(10**9))
  drawn = examples(split, 10**6, 12, 0, 1, 3)
  assert accessed == drawn
  assert len(set(drawn)) == 4


def epoch(number, seed, **options):
  """Returns the order of one epoch of 50 examples."""
  return tuple(examples(range(50), number, 50, seed, **options))


@pytest.mark.parametrize("count", [6, pytest.param(12, marks=pytest.mark.slow)])
def test_no_epoch_of_a_seed_is_one_of_another_seed(count):
  """With seed + epoch, epoch 1 of seed 0 was epoch 0 of seed 1."""
  orders = {(seed, e): epoch(e, seed) for seed in range(count) for e in range(count)}
  assert len(set(orders.values())) == count**2
  few = range(count // 2)
  streams = {(seed, s): epoch(0, seed, stream=s) for seed in few for s in few}
  assert len(set(streams.values())) == len(few) ** 2


def test_the_order_of_runs_begun_by_version_0_1_0():
  """Drawn with its code: ten examples in steps of 4; the fourth step reaches into epoch 1."""
  drawn = [examples(range(10), step, 4, 0, order="added") for step in range(4)]
  assert drawn == OLD[0]
  assert [examples(range(10), step, 4, 2**32 - 1, order="added") for step in range(4)] == OLD[-1]
  assert [examples(range(10), 1, 4, 0, stream=3, order="added")] == OLD["stream"]
  assert epoch(1, 0, order="added") == epoch(0, 1, order="added")


def test_results_of_runs_within_one_epoch_stay():
  assert [examples(range(10), step, 4, 0) for step in range(2)] == OLD[0][:2]
  assert [epoch(0, seed) for seed in range(5)] == [epoch(0, s, order="added") for s in range(5)]


def test_the_order_of_the_file():
  flat = [i for s in range(5) for i in examples(range(10), s, 4, 7, order="file")]
  assert flat == [*range(10), *range(10)]
  blocks = [examples(range(10), 2, 6, 7, process, 3, order="file") for process in range(3)]
  assert blocks == [[2, 3], [4, 5], [6, 7]]
  resampled = examples(range(10), 0, 10, 7, stream=1, order="file")
  assert sorted(resampled) == list(range(10)) != resampled


def test_an_unknown_order_is_refused():
  with pytest.raises(ValueError, match="order is 'sorted', known: hashed, added, file"):
    examples(range(3), 0, 1, 0, order="sorted")


@pytest.mark.parametrize(
  ("epochs", "size", "count", "steps"),
  [(1, 10, 5, 2), (1, 10, 4, 3), (3, 10, 4, 8), (0.5, 10, 5, 1), (0.1, 30, 1, 3), (1e-9, 3, 8, 1)],
)
def test_the_steps_of_epochs_cover_every_example(epochs, size, count, steps):
  """By hand: the last step is a whole one, and reaches into the next epoch where it must."""
  assert steps_of(epochs, size, count) == steps
