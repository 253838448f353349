"""Measures how the cost of a step grows with P, G, N, T and the vocabulary, one at a time.

    python -m benchmarks.cost --figure docs/cost.png

Sampling and the update of a random model are measured twice: with each prompt computed once for its
group, as grpo_jax does, and with one row per completion, as is usual. The second way runs the same
code with G copies of each prompt as groups of one; its completions and gradients are the same. The
two alternate in one process.

The lines in the figure are `a + b · tokens + c · P·G·T·V`, with `tokens = P·(N + G·T)` for shared
prompts and `tokens = P·G·(N + T)` otherwise. The constants a (optimizer), b (layers) and c (head)
are fitted to the points with shared prompts only, so the other line is a prediction. Neither line
includes attention, which explains the rest where N or T are large.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import alternate
from benchmarks.worker import clock, since
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.core.masks import token_weights
from grpo_jax.learning.optimizer import learning_rate_schedule, make_optimizer
from grpo_jax.learning.step import Batch, TrainState, make_train_step
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.run import style
from grpo_jax.sampling import generate as generation

GIB = 2**30


class Shape(NamedTuple):
  """Holds the sizes of a step: prompts, group size, prompt and completion tokens, vocabulary."""

  P: int = 4
  G: int = 8
  N: int = 64
  T: int = 32
  V: int = 8192


AXES = {
  "P": (1, 2, 4, 8, 16),
  "G": (2, 4, 8, 16, 32),
  "N": (16, 64, 128, 256, 512),
  "T": (8, 16, 32, 64, 128),
  "V": (2048, 8192, 32768, 131072),
}
COLUMNS = (
  ("axis", "axis", ""),
  ("value", "value", ""),
  ("tokens", "tokens", ""),
  ("plain_tokens", "plain", ""),
  ("update_seconds", "update s", ".3f"),
  ("plain_update_seconds", "plain", ".3f"),
  ("update_ratio", "ratio", ".2f"),
  ("predicted_ratio", "model", ".2f"),
  ("sampling_seconds", "sampling s", ".3f"),
  ("plain_sampling_seconds", "plain", ".3f"),
  ("update_gib", "update GiB", ".3f"),
  ("plain_update_gib", "plain", ".3f"),
)


class Bench:
  """Compiles sampling and the update for one shape.

  Args:
    shape: sizes of the step.
    config: sizes of the model.
    shared: compute each prompt once for its group; else once per completion.
  """

  def __init__(self, shape: Shape, config: ModelConfig, *, shared: bool) -> None:
    s, model = shape, Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0))
    self.params = jax.jit(unstack)(params)
    rate = {"learning_rate": 1e-6, "schedule": "constant", "warmup_steps": 0, "steps": 100}
    schedule = learning_rate_schedule(**rate, final_fraction=0.0)
    optimizer = make_optimizer(
      schedule, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0
    )
    self.state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(1, s.V, (s.P, s.N)), jnp.int32)
    rows = (s.P, s.G, s.T)
    self.batch = Batch(
      prompts=prompts,
      prompt_mask=jnp.ones_like(prompts, bool),
      completions=jnp.asarray(rng.integers(1, s.V, rows), jnp.int32),
      mask=jnp.ones(rows, bool),
      advantages=jnp.asarray(rng.normal(size=rows[:2]), jnp.float32),
      weights=token_weights(jnp.ones(rows, bool), "constant", max_length=shape.T),
      sampler_logp=jnp.zeros(rows),
    )
    keys = generation.row_keys(jax.random.key(1), jnp.arange(s.P), s.G)
    if not shared:
      self.batch, keys = _one_row_each(self.batch, s), keys.reshape(-1, 1)
    step = make_train_step(model, ALGORITHMS["dr_grpo"], optimizer, schedule, temperature=1.0)
    self._update = step.lower(self.state, self.batch).compile()
    self.update_bytes = self._update.memory_analysis().temp_size_in_bytes
    endless = jnp.zeros((2, s.V), jnp.int32)  # a stop table without an ending token

    def sample(params, prompts, mask):
      return generation.generate(
        model, params, prompts, mask, keys, endless, length=s.T, temperature=1.0, pad_id=0
      )

    inputs = (self.params, self.batch.prompts, self.batch.prompt_mask)
    self._sample = jax.jit(sample).lower(*inputs).compile()

  def update(self) -> None:
    """Runs one update."""
    self.state, _ = self._update(self.state, self.batch)
    jax.block_until_ready(self.state)

  def sample(self) -> None:
    """Samples one batch of completions."""
    out = self._sample(self.params, self.batch.prompts, self.batch.prompt_mask)
    jax.block_until_ready(out)


def _one_row_each(batch: Batch, s: Shape) -> Batch:
  """Returns the same batch as P·G prompts with one completion each."""

  def repeat(name: str, array: Any) -> Any:
    if array is None:
      return None
    if name in ("prompts", "prompt_mask"):
      return jnp.repeat(array, s.G, axis=0)
    return array.reshape(s.P * s.G, 1, *array.shape[2:])

  return Batch(**{name: repeat(name, array) for name, array in vars(batch).items()})


def measure(shape: Shape, config: ModelConfig, rounds: int) -> dict[str, Any]:
  """Returns the median times and the planned memory of one shape, with prompts shared or not."""
  benches = {"": Bench(shape, config, shared=True), "plain_": Bench(shape, config, shared=False)}
  times: dict[str, list[float]] = {}
  for round_number in range(rounds + 1):
    for prefix, bench in benches.items():
      for part in ("sample", "update"):
        before = clock()
        getattr(bench, part)()
        name = f"{prefix}{'sampling' if part == 'sample' else part}_"
        if round_number:  # the first round warms up
          for field, value in since(before, name).items():
            times.setdefault(field, []).append(value)
  row = {name: float(np.median(values)) for name, values in times.items()}
  row["tokens"] = shape.P * (shape.N + shape.G * shape.T)
  row["plain_tokens"] = shape.P * shape.G * (shape.N + shape.T)
  for prefix, bench in benches.items():
    row[f"{prefix}update_gib"] = bench.update_bytes / GIB
  row["update_ratio"] = row["plain_update_seconds"] / row["update_seconds"]
  return row


def add_model(rows: list[dict[str, Any]]) -> None:
  """Adds the predictions of `a + b · tokens + c · P·G·T·V`, fitted to the shared updates only.

  Args:
    rows: rows of `measure`; fields of the predictions are added to each.
  """

  def inputs(row: dict[str, Any], prefix: str) -> list[float]:
    return [1.0, row[f"{prefix}tokens"], row["P"] * row["G"] * row["T"] * row["V"]]

  design = np.array([inputs(row, "") for row in rows])
  seconds = np.array([row["update_seconds"] for row in rows])
  # Minimize the relative errors, with constants that are not negative.
  active = [0, 1, 2]
  while True:
    relative = design[:, active] / seconds[:, None]
    fitted, *_ = np.linalg.lstsq(relative, np.ones(len(rows)), rcond=None)
    if (fitted >= 0).all() or len(active) == 1:
      break
    active = [a for a, value in zip(active, fitted) if value >= 0] or [1]
  constants = np.zeros(3)
  constants[active] = fitted
  for row in rows:
    for prefix in ("", "plain_"):
      row[f"{prefix}predicted_seconds"] = float(np.dot(constants, inputs(row, prefix)))
    row["predicted_ratio"] = row["plain_predicted_seconds"] / row["predicted_seconds"]


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
  """Draws one column per axis, with the time of the update above its memory.

  Args:
    rows: rows with the predictions of `add_model`.
    path: PNG file to write.
    title: title of the figure.
  """
  from matplotlib.figure import Figure
  from matplotlib.ticker import LogLocator, StrMethodFormatter

  names = list(dict.fromkeys(row["axis"] for row in rows))
  figure = Figure(figsize=(3 * len(names), 6), layout="constrained")
  panels = figure.subplots(2, len(names), squeeze=False)
  labels = {"": "each prompt once", "plain_": "one row per completion"}
  for column, name in enumerate(names):
    points = [row for row in rows if row["axis"] == name]
    x = [row["value"] for row in points]
    for prefix, color in (("", style.BLUE), ("plain_", style.ORANGE)):
      top, bottom = panels[0, column], panels[1, column]
      seconds = [row[f"{prefix}update_seconds"] for row in points]
      top.plot(x, seconds, "o", color=color, label=labels[prefix])
      formula = "P(N + G·T)" if prefix == "" else "P·G(N + T)"
      predicted = [row[f"{prefix}predicted_seconds"] for row in points]
      top.plot(x, predicted, "-" if prefix == "" else "--", color=color, label=f"model, {formula}")
      bottom.plot(x, [row[f"{prefix}update_gib"] for row in points], "o", color=color)
    for panel in (top, bottom):
      panel.set(xscale="log", yscale="log", xlabel=name)
      panel.set_xticks(x, [str(value) for value in x])
      panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
      panel.minorticks_off()
  panels[0, 0].set_ylabel("update, seconds")
  panels[1, 0].set_ylabel("temporary memory, GiB")
  handles, texts = panels[0, 0].get_legend_handles_labels()
  figure.legend(handles, texts, loc="outside lower center", ncols=len(texts), fontsize="small")
  figure.suptitle(title, fontsize="small")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
  """Measures or reads the rows, prints them, and draws the figure."""
  raw = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--axis", choices=tuple(AXES), action="append", help="default: all")
  parser.add_argument("--rounds", type=int, default=5, help="measured rounds after a warm-up")
  parser.add_argument("--width", type=int, default=256, help="hidden size D; MLP 3 D, heads of 64")
  parser.add_argument("--layers", type=int, default=6)
  for name, value in Shape()._asdict().items():
    parser.add_argument(f"--{name}", type=int, default=value, help="value where it is not varied")
  parser.add_argument("--points", type=int, default=5, help="values per axis, smallest first")
  parser.add_argument("--rows", type=Path, help="JSON lines of an earlier run to draw")
  parser.add_argument("--figure", type=Path, help="PNG file to draw")
  a = parser.parse_args(argv)
  base = Shape(a.P, a.G, a.N, a.T, a.V)
  if a.rows:
    rows = [json.loads(line) for line in a.rows.read_text(encoding="utf-8").splitlines()]
  else:
    rows = measure_axes(base, a)
  add_model(rows)
  alternate.show(rows, COLUMNS)
  if a.figure:
    sizes = ", ".join(f"{name}={value}" for name, value in base._asdict().items())
    layers, width = (rows[0][name] for name in ("layers", "width"))
    title = f"{sizes} where not varied; {layers} layers of hidden size {width}; float32"
    with style.use():
      draw(rows, a.figure, title)


def measure_axes(base: Shape, a: argparse.Namespace) -> list[dict[str, Any]]:
  """Returns one row per value of each axis."""
  about = {"width": a.width, "layers": a.layers, "rounds": a.rounds, "jax": jax.__version__}
  about |= {"device": jax.devices()[0].device_kind} | alternate.machine()
  rows = []
  for axis in a.axis or AXES:
    for value in AXES[axis][: a.points]:
      shape = base._replace(**{axis: value})
      config = ModelConfig(
        vocab_size=shape.V,
        width=a.width,
        layers=a.layers,
        heads=a.width // 64,
        kv_heads=a.width // 64,
        head_dim=64,
        mlp=3 * a.width,
        context=shape.N + shape.T,
      )
      row = {"benchmark": "cost", "axis": axis, "value": value, **shape._asdict()}
      rows.append(row | measure(shape, config, a.rounds) | about)
  return rows


if __name__ == "__main__":
  main()
