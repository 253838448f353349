"""The objects of a run: what the config says of matmul precision stands in the programs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import export, train
from grpo_jax.build import build, make_algorithm
from grpo_jax.config import CHOICES, ConfigError, default_config, from_saved, load, to_saved
from grpo_jax.core.algorithms import ALGORITHMS, Algorithm
from grpo_jax.learning.step import Batch
from grpo_jax.models import lora
from grpo_jax.models.load import load as load_weights
from grpo_jax.run import workdir as workdirs
from grpo_jax.sampling.generate import generate

SMALL = ("rollout.prompts_per_step=8", "rollout.group_size=2", "rollout.completion_length=4")


def make_run(*changes):
  return build(load("experiments/tiny.py", [f"--config.{change}" for change in (*SMALL, *changes)]))


def batch_of(run):
  rows = (8, 2, 4)
  batch = Batch(
    prompts=jnp.zeros((8, 4), jnp.int32),
    prompt_mask=jnp.ones((8, 4), bool),
    completions=jnp.zeros(rows, jnp.int32),
    mask=jnp.ones(rows, bool),
    advantages=jnp.ones(rows[:2]),
    weights=jnp.ones(rows),
    sampler_logp=jnp.zeros(rows),
  )
  return jax.device_put(batch, run.sampler.prompt_sharding)


def programs(run):
  """Returns the update and the sampler, as functions of arrays."""
  state, batch = run.initial_state(), batch_of(run)
  update = run.learner()._update
  params = run.to_sampling_params(state.params)
  keys = jax.random.split(jax.random.key(0), (8, 2))
  stops = jnp.zeros((2, 257), jnp.int32).at[0, 256].set(1)
  prompts = (batch.prompts, batch.prompt_mask, keys, stops)

  def sample(params, *arguments):
    return generate(run.model, params, *arguments, length=4, temperature=1.0, pad_id=256)

  return {"update": (update, (state, batch)), "sample": (sample, (params, *prompts))}


def products(jaxpr):
  """Returns all matmuls of a program, those inside of loops and calls too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, list | tuple) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from products(inner)


@pytest.mark.parametrize("name", ["update", "sample"])
@pytest.mark.parametrize(
  ("changes", "precision"),
  [((), "HIGHEST"), (("model.matmul_precision=default",), "DEFAULT"),
   (("model.matmul_precision=high",), "HIGH")],
)  # fmt: skip
def test_float32_matmuls_have_the_precision_of_the_config(name, changes, precision):
  run = make_run(*changes)
  function, arguments = programs(run)[name]
  with run.matmul_precision():
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  found = {str(equation.params["precision"][0] or "DEFAULT") for equation in products(jaxpr)}
  assert len([*products(jaxpr)]) > 10
  assert found == {precision}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_lowered_programs_say_so_for_accelerators(platform):
  """A default matmul is one bfloat16 pass on a TPU and TF32 on a GPU."""
  run = make_run()
  function, arguments = programs(run)["sample"]
  texts = []
  for context in (run.matmul_precision(), jax.default_matmul_precision("default")):
    with context:
      traced = jax.jit(function).trace(*arguments)
      texts.append(traced.lower(lowering_platforms=(platform,)).as_text())
  highest, default = ([l for l in text.splitlines() if "dot_general" in l] for text in texts)
  assert len(highest) > 10
  assert all("HIGHEST" in line for line in highest)
  assert not any("HIGHEST" in line for line in default)


CHANGES = [
  (row, field.name)
  for row, algorithm in ALGORITHMS.items()
  for field in dataclasses.fields(algorithm)
  if isinstance(getattr(algorithm, field.name), float)
]


@pytest.mark.parametrize(("row", "name"), CHANGES)
def test_every_number_of_every_row_can_be_set_on_the_command_line(row, name):
  value = getattr(ALGORITHMS[row], name)
  value += -0.25 if name in ("gamma", "lam") else 1.0 if name == "clip_dual" else 0.25
  if name == "beta" and ALGORITHMS[row].kl == "none":
    value = 0.0  # without an estimator there is no KL term
  if name == "teacher_discount" and ALGORITHMS[row].teacher_weight == 0:
    value = 0.0  # without a teacher there is nothing to discount
  overrides = [f"--config.algorithm.name={row}", f"--config.algorithm.{name}={value}"]
  c = load("experiments/tiny.py", overrides)
  algorithm = make_algorithm(c.algorithm)
  assert getattr(algorithm, name) == value
  assert algorithm == dataclasses.replace(ALGORITHMS[row], **{name: value})


def test_the_rows_have_numbers_of_every_kind():
  """So that the test above leaves none out: what a row may hold stands in the config."""
  fields = set(default_config().algorithm) - {"name", *CHOICES}
  held = {f.name for f in dataclasses.fields(Algorithm)} - {"source", *CHOICES}
  assert fields == held


def whitened(rewards):
  return rewards - rewards.mean()


def test_a_function_named_by_its_file_is_the_advantage():
  c = load("experiments/tiny.py", ["--config.algorithm.advantage=tests/test_build.py:whitened"])
  rewards = jnp.array([[1.0, 0.0], [0.0, 0.0]])
  assert make_algorithm(c.algorithm).advantage(rewards).tolist() == [[0.75, -0.25], [-0.25, -0.25]]


# --- a start from adapters ------------------------------------------------------------------------

ADAPTERS = "tests/fixtures/tiny_llama_lora"  # rank 3, alpha 6, on q, v and down
FROM_ADAPTERS = ("model.source=tests/fixtures/tiny_llama", f"lora.source={ADAPTERS}")


def test_a_run_starts_from_the_adapters_of_a_folder(tmp_path):
  changes = (*FROM_ADAPTERS, "algorithm.name=grpo", "algorithm.beta=0.1", "lora.rank=7")
  run = make_run(*changes)
  adapters, *_ = lora.load_peft(ADAPTERS, run.weights.config)
  state = run.initial_state()
  jax.tree.map(np.testing.assert_array_equal, state.params, adapters)
  settings = run.config.lora
  assert (settings.rank, settings.alpha, settings.targets) == (3, 6.0, "q|v|down")
  assert run.model.lora_scale == 2.0
  # The KL term stays close to the model at the start, which has the adapters.
  jax.tree.map(np.testing.assert_array_equal, run.learner()._reference, adapters)
  workdirs.write_config(tmp_path, to_saved(run.config))
  train.check_workdir(make_run(*changes).config, tmp_path, {})
  train.check_workdir(from_saved(workdirs.read_config(tmp_path)), tmp_path, {})


def test_the_model_of_a_config_with_adapters_is_exported_with_them(tmp_path):
  command = ["--config", "experiments/tiny.py", "--out", str(tmp_path / "out")]
  assert export.main([*command, *(f"--config.{change}" for change in FROM_ADAPTERS)]) == 0
  config, base = load_weights("tests/fixtures/tiny_llama")
  adapters, rank, alpha = lora.load_peft(ADAPTERS, config)
  exported = load_weights(str(tmp_path / "out"))[1]
  expected = lora.merge(base, adapters, alpha / rank)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), exported, expected)
  assert np.abs(exported["layers"]["q"] - base["layers"]["q"]).max() > 1e-3


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (f"model.source={ADAPTERS}", "holds adapters, not a model: set lora.source to it"),
    ("lora.source=tests/fixtures/tiny_llama", "no adapter_config.json in"),
    ("model.source=random:tiny", r"adapter_model\.safetensors: 12 tensor\(s\) do not fit"),
  ],
)
def test_a_folder_that_is_not_the_models_adapters_is_one_problem(change, words):
  with pytest.raises(ConfigError, match=words) as caught:
    make_run(*FROM_ADAPTERS, change)
  assert len(caught.value.problems) == 1


# --- the critic ----------------------------------------------------------------------------------

PPO = ["--config.algorithm.name=ppo"]


def test_a_critic_is_a_copy_of_the_policy_whose_values_are_0():
  run = build(load("experiments/tiny.py", [*PPO, "--config.rollout.group_size=1"]))
  state = run.initial_state()
  assert not np.asarray(state.critic.params["score"]).any()
  for name in ("embed", "final_norm"):
    np.testing.assert_array_equal(state.critic.params[name], state.params[name])
  assert state.critic.params["embed"].sharding == state.params["embed"].sharding
  assert run.critic.model.config.labels == 1


# --- teachers ------------------------------------------------------------------------------------

TEACHER, OWN = "teacher.source=random:tiny", "teacher.source=policy"


def test_teachers_are_opened_and_laid_out_like_the_policy():
  run = make_run("algorithm.name=opd", "teacher.source=['random:tiny','random:tiny']")
  one, two = run.loaded_teachers()
  policy = run.initial_state().params
  for ours, theirs in zip(jax.tree.leaves(policy), jax.tree.leaves(one.params), strict=True):
    assert theirs.sharding == ours.sharding
  assert not np.array_equal(one.params["embed"], policy["embed"])  # a random teacher is another
  np.testing.assert_array_equal(one.params["embed"], two.params["embed"])
  assert make_run("algorithm.name=dr_grpo").loaded_teachers() == []


def test_teachers_are_held_in_the_dtype_they_compute_in():
  run = make_run("algorithm.name=opd", TEACHER, "model.dtype=bfloat16")
  (teacher,) = run.loaded_teachers()
  assert teacher.params["embed"].dtype == jnp.bfloat16
  assert teacher.params["final_norm"].dtype == jnp.float32


def test_a_policy_that_teaches_itself_has_a_reference_only_where_it_is_the_teacher():
  run = make_run("algorithm.name=opd", OWN)
  assert run.rollout.demonstrations.shows == "sibling"
  assert run.updates.own_teacher == "policy"
  assert (run.teachers, run.initial_state().reference) == ((), None)
  moving = ("reference.sync_every=1", "reference.sync_share=0.05")
  run = make_run("algorithm.name=opd", "teacher.source=reference", *moving)
  assert run.initial_state().reference is not None
