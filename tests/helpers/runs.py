"""Trains in this process on some of its devices, and returns what a run leaves."""

import jax
import pytest

from grpo_jax import train
from grpo_jax.build import build
from grpo_jax.config import load
from grpo_jax.run import checkpoint
from grpo_jax.run.metrics import read_metrics
from tests.helpers.learning import bits

TIMES = ("step_time", "tokens_per_second", "time/sampling", "time/rewards", "time/waiting")


def train_on(width, workdir, options):
  """Trains `experiments/tiny.py` with options on the first `width` devices.

  Returns the bits of the last state, the rows of metrics without times, and the text of each file
  of samples, in the order of their names.
  """
  devices = jax.devices()[:width]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *_: devices)
    patch.setattr(jax, "device_count", lambda *_: width)
    c = load("experiments/tiny.py", options)
    train.run(c, workdir)
    with checkpoint.Checkpoints(workdir, keep=9) as checkpoints:
      state = checkpoints.restore(c.steps, build(c).initial_state())
  rows = [
    {name: value for name, value in row.items() if name not in TIMES}
    for row in read_metrics(workdir)
  ]
  return bits(state), rows, [f.read_text() for f in sorted((workdir / "samples").iterdir())]
