"""Configs: overrides, and mistakes that are all reported in one go."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import config as configs
from grpo_jax.build import build
from grpo_jax.config import (
  ConfigError,
  check,
  default_config,
  differences,
  from_saved,
  load,
  mesh_shape,
  override,
  resolve_auto,
  to_saved,
)
from grpo_jax.models import lora
from grpo_jax.models.load import open_weights
from grpo_jax.tasks.rewards.loading import load_function

TINY = "experiments/tiny.py"


def test_overrides_have_the_type_of_their_field():
  c = load(
    TINY,
    [
      "--config.steps=7",
      "--config.optimizer.learning_rate=1",
      "--config.model.remat=none",
      "--config.rollout.mask_truncated=true",
      "--config.model.source=random:tiny",
      "--config.algorithm.beta=0.5",
    ],
  )
  assert (c.steps, c.optimizer.learning_rate, c.model.remat) == (7, 1.0, "none")
  assert c.rollout.mask_truncated is True
  assert isinstance(c.optimizer.learning_rate, float)
  assert c.algorithm.beta == 0.5
  assert load(TINY, ["--config.algorithm.beta=none"]).algorithm.beta is None


def test_all_bad_overrides_are_reported_together():
  bad = [
    "--config.stepz=7",
    "--config.rollout.groupsize=4",
    "--config.steps=many",
    "--config.steps=1.5",
    "--config.rollout.mask_truncated=1",
    "--config.model=x",
    "--config.seed",
    "--steps=3",
    "--config.rollout.group_size.x=3",
  ]
  with pytest.raises(ConfigError) as caught:
    load(TINY, bad)
  problems = caught.value.problems
  assert len(problems) == len(bad)
  assert "did you mean 'steps'" in problems[0]
  assert "did you mean 'group_size'" in problems[1]
  assert "'many' is not of type int" in problems[2]
  assert "'1.5' is not of type int" in problems[3]
  assert "write true or false" in problems[4]
  assert "a group of fields" in problems[5]
  assert "is not an override" in problems[6]
  assert "is not an override" in problems[7]


def test_a_missing_file_lists_the_experiments():
  with pytest.raises(ConfigError, match=r"no config file .*experiments/tiny\.py"):
    load("experiments/tinny.py")


def test_a_misspelt_field_in_an_experiment_names_the_right_one(tmp_path):
  file = tmp_path / "x.py"
  file.write_text(
    "from grpo_jax.config import default_config\n"
    "def get_config():\n  c = default_config()\n  c.rollout.groupsize = 3\n  return c\n"
  )
  with pytest.raises(ConfigError, match="group_size"):
    load(str(file))


def test_get_on_a_config_is_not_used():
  """`.get` of a misspelt field gives the default silently, so nothing may call it on a config."""
  for file in Path("grpo_jax").rglob("*.py"):
    for line in file.read_text().splitlines():
      assert "config.get(" not in line, f"{file}: {line}"
      assert " c.get(" not in line, f"{file}: {line}"


def test_adafactor_refuses_what_it_does_not_use():
  c = override(
    default_config(), ["--config.optimizer.name=adafactor", "--config.optimizer.eps=1e-3"]
  )
  (problem,) = check(c, 1)
  assert problem == (
    "optimizer.eps is 0.001, it must be 1e-08 (the default), since optimizer.name is 'adafactor', "
    "which does not use it"
  )


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("steps", 0, "steps is 0, it must be at least 1"),
    ("rollout.group_size", 0, "at least 1"),
    ("algorithm.lam", 1.5, "algorithm.lam is 1.5, it must be between 0 and 1"),
    ("critic.learning_rate", 0.0, "above 0"),
    ("rollout.temperature", 0.0, "above 0"),
    ("rollout.overlong", "cut", "'error' or 'drop'"),
    ("model.dtype", "float8", "'float32' or 'bfloat16'"),
    ("optimizer.learning_rate", -1.0, "above 0"),
    ("optimizer.schedule", "sine", "'constant', 'linear' or 'cosine'"),
    ("optimizer.beta1", 1.0, r"in \[0, 1\)"),
    ("optimizer.name", "adam", "'adamw', 'adafactor' or 'muon'"),
    ("train.micro_batches", 3, "must be a multiple of 24"),
    ("mesh.data", 0, "sizes must be at least 1"),
    ("mesh.data", 3, "does not divide the 8 device"),
    ("checkpoint.keep", 0, "at least 1"),
    ("eval.samples", -1, "at least 0"),
  ],
)
def test_each_wrong_number_is_one_problem(field, value, words):
  c = default_config()
  group, _, name = field.rpartition(".")
  (c[group] if group else c)[name] = value
  problems = check(c, device_count=8)
  assert len(problems) == 1, problems

  assert re.search(words, problems[0])
  assert check(default_config(), device_count=8) == []


def test_slices_divide_the_data_axis():
  c = default_config()
  c.rollout.prompts_per_step, c.mesh.slices = 8, 2
  assert check(c, device_count=8) == []
  c.mesh.data, c.mesh.fsdp = 1, 8
  [problem] = check(c, device_count=8)
  assert problem.startswith("mesh.slices is 2, it must divide mesh.data, which is 1 on 8 devices")


@pytest.mark.parametrize(
  ("prompts", "mini", "micro", "devices", "words"),
  [
    # 32 prompts over 16 devices in 2 updates: one prompt a device, nothing left to cut.
    (32, 2, 4, 16, "train.micro_batches=1 (which changes no result) or "
     "--config.rollout.prompts_per_step=128"),
    (24, 1, 4, 4, "train.micro_batches=3 (which changes no result) or "
     "--config.rollout.prompts_per_step=32"),
    (20, 1, 1, 16, "set --config.rollout.prompts_per_step=32"),
    (17, 1, 2, 4, "set --config.rollout.prompts_per_step=24"),
  ],
)  # fmt: skip
def test_prompts_that_do_not_divide_name_the_number_to_change(prompts, mini, micro, devices, words):
  c = default_config()
  c.rollout.prompts_per_step, c.train.mini_batches, c.train.micro_batches = prompts, mini, micro
  (problem,) = check(c, devices)
  assert problem.endswith(words)
  for change in re.findall(r"--config\.(\S+)", problem):
    other = override(c.copy_and_resolve_references(), [f"--config.{change}"])
    assert check(other, devices) == []


def test_mesh_shape_fills_the_rest():
  c = default_config().mesh
  assert mesh_shape(c, 8) == (8, 1, 1)
  c.fsdp, c.tensor = 2, 2
  assert mesh_shape(c, 8) == (2, 2, 2)
  c.data, c.fsdp = 2, -1
  assert mesh_shape(c, 8) == (2, 2, 2)
  c.data = -1
  with pytest.raises(ValueError, match="one of them may be -1"):
    mesh_shape(c, 8)


def test_build_reports_everything_before_compiling(tmp_path):
  c = load(
    TINY,
    [
      "--config.algorithm.name=gpro",
      "--config.task.name=leters",
      f"--config.model.source={tmp_path / 'nothing'}",
      "--config.rollout.group_size=1",
      "--config.reward_model.source=random:tiny",
      "--config.mesh.data=1",
      "--config.mesh.tensor=-1",
    ],
  )
  with pytest.raises(ConfigError) as caught:
    build(c)
  text = str(caught.value)
  assert len(caught.value.problems) == 5
  for words in (
    *("unknown algorithm 'gpro'", "unknown task 'leters'", "no model at", "group of one"),
    "random:tiny is a language model; a reward model is",
  ):
    assert words in text


def test_a_budget_beyond_the_context_says_what_would_fit():
  with pytest.raises(ConfigError, match="context of 4096; lower it to 4092 or less"):
    build(load(TINY, ["--config.rollout.completion_length=5000"]))


def test_a_prompt_over_the_budget_is_shown_or_dropped_and_counted():
  with pytest.raises(ConfigError, match="'100:'"):
    build(load(TINY, ["--config.rollout.prompt_length=3"]))
  sizes = ["--config.task.settings.train_size=95", "--config.task.settings.eval_size=20"]
  budget = ["--config.rollout.prompt_length=3", "--config.rollout.overlong=drop"]
  with pytest.warns(UserWarning, match="15 of 20 prompts exceed"):
    run = build(load(TINY, sizes + budget))
  assert [example.key for example in run.task.splits["eval"]] == ["95", "96", "97", "98", "99"]
  assert len(run.task.splits["train"]) == 95


def test_settings_that_have_no_effect_are_refused():
  """`reinforce` has no clip: a clip bound given for it would do nothing."""
  with pytest.raises(ConfigError, match="clip_low has no effect"):
    build(load(TINY, ["--config.algorithm.name=reinforce", "--config.algorithm.clip_low=0.1"]))


def test_differences_name_the_fields():
  assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}) == [
    "a.c: 2 -> 4",
    "d: 3 -> None",
    "e: None -> 5",
  ]


def test_every_experiment_loads():
  files = sorted(Path("experiments").glob("*.py"))
  assert files
  for file in files:
    c = load(str(file))
    assert c.is_locked
    assert configs.check(c, device_count=1) == [], file
    assert f"--config experiments/{file.name}" in file.read_text()


# --- renamed fields, and choices that are functions -----------------------------------------------


def centered_twice(rewards):
  return 2 * (rewards - rewards.mean(-1, keepdims=True))


def test_old_names_of_fields_and_values_still_work(capsys, tmp_path):
  configs._notices.clear()
  overrides = ["--config.train.slots=4", "--config.train.reduction=ordered"]
  c = override(default_config(), overrides)
  assert (c.train.chunks, c.train.slots, c.train.reduction) == (4, 4, "deterministic")
  printed = capsys.readouterr().err
  assert "the field 'slots' is now called 'chunks'" in printed
  assert "reduction='ordered' is now called reduction='deterministic'" in printed
  file = tmp_path / "old.py"
  file.write_text(
    "from grpo_jax.config import default_config\n"
    "def get_config():\n"
    "  c = default_config()\n"
    "  c.rollout.max_refills = 3\n"
    "  c.model.attention = 'blocks'\n"
    "  return c\n"
  )
  c = load(str(file))
  assert (c.rollout.max_resamples, c.model.attention) == (3, "tiled")
  saved = to_saved(default_config())
  saved["train"]["slots"] = saved["train"].pop("chunks") * 2
  saved["model"]["attention"] = "blocks"
  c = from_saved(saved)
  assert (c.train.chunks, c.model.attention) == (16, "tiled")
  assert "slots" not in c.train


def test_a_choice_may_be_a_function_and_is_found_again():
  c = default_config()
  c.algorithm.advantage = centered_twice
  saved = json.loads(json.dumps(to_saved(c)))
  assert saved["algorithm"]["advantage"] == "tests/test_config.py:centered_twice"
  again = load_function(saved["algorithm"]["advantage"])
  np.testing.assert_array_equal(again(np.array([[1.0, 3.0]])), [[-2.0, 2.0]])


@pytest.mark.parametrize("function", [lambda rewards: rewards, functools.partial(max), len])
def test_a_function_without_a_place_in_a_file_is_refused(function):
  c = default_config()
  c.algorithm.advantage = function
  with pytest.raises(ConfigError, match=r"algorithm\.advantage is .*at the top level of a file"):
    to_saved(c)


def test_none_is_a_choice_on_the_command_line():
  c = override(default_config(), ["--config.algorithm.kl=none"])
  assert c.algorithm.kl == "none"


def test_a_saved_config_without_a_newer_field_gets_its_default():
  saved = {"seed": 4, "rollout": {"stop": ["x"]}, "task": {"settings": {"eval_size": 3}}}
  config = from_saved(saved)
  assert (config.seed, config.task.settings.eval_size, config.train.max_skipped) == (4, 3, 5)
  assert config.rollout.group_size == default_config().rollout.group_size
  assert list(config.rollout.stop) == ["x"]


# --- values of the wrong type, and numbers that are not finite ------------------------------------


@pytest.mark.parametrize(
  "change",
  [
    "optimizer.learning_rate=1e400", "optimizer.learning_rate=nan", "optimizer.eps=1e400",
    "optimizer.eps=-1e-8", "optimizer.weight_decay=1e400", "optimizer.beta1=nan",
    "rollout.temperature=1e400", "rollout.temperature=1" + 400 * "0", "algorithm.clip_low=2.0",
    "algorithm.beta=-1.0", "algorithm.tau_positive=nan", "rewards.timeout=1e400", "seed=-1",
    "seed=4294967296", "seed=1180591620717411303424", "optimizer.warmup_steps=1000000000000",
    "rollout.stop=5", "rollout.stop=true", "rollout.stop=(1,)", "rollout.stop=('',)",
    "rollout.stop=" + 2000 * "x", "rollout.stop_ids=a", "rollout.stop_ids=1.0",
    "rollout.stop_ids=None", "rollout.stop_ids=(-1,)", "lora.targets=5", "lora.targets=[1]",
    "algorithm.advantage=", "reward_model.weight=inf",
  ],
)  # fmt: skip
def test_a_number_or_type_that_cannot_be_is_refused_by_name(change):
  name, _, text = change.partition("=")
  section, _, field = name.rpartition(".")
  if text in ("nan", "inf", ""):  # from an experiment file
    c = default_config()
    c[section][field] = float(text) if text else 3
  else:
    c = override(default_config(), [f"--config.{change}"])
  problems = check(c, 1)
  assert len(problems) == 1, problems
  assert problems[0].startswith(f"{name} is ")


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ("steps=four", "'four' is not of type int"),
    ("model.source=['a']", "that is a list, the field holds text"),
    ("model.dtype={'a': 1}", "that is a dict, the field holds text"),
    ("rollout.stop={'a'}", "that is a set, the field holds a list"),
  ],
)
def test_a_value_of_another_type_is_refused_by_name(change, words):
  with pytest.raises(ConfigError) as caught:
    override(default_config(), [f"--config.{change}"])
  (problem,) = caught.value.problems
  assert problem == f"{change}: {words}"


def test_stop_strings_on_the_command_line_may_name_a_line_break():
  for text in (r"rollout.stop=\n", "rollout.stop=['\\n']", "rollout.stop=\n"):
    assert override(default_config(), [f"--config.{text}"]).rollout.stop == ("\n",)


def test_a_setting_of_a_task_that_is_text_may_become_a_list():
  c = default_config()
  with c.unlocked():
    c.task.settings.update(reward="numeric", weights=(1.0,))
  override(c, ["--config.task.settings.reward=['math', 'format']"])
  assert list(c.task.settings.reward) == ["math", "format"]
  override(c, ["--config.task.settings.reward=exact"])
  assert c.task.settings.reward == "exact"


@pytest.mark.parametrize(
  ("text", "trained"),
  [
    ("['down_proj']", ("down",)), ("['q_proj','v_proj']", ("q", "v")), ("('q', 'k')", ("q", "k")),
    ("q_proj|v_proj", ("q", "v")), ("(gate|up)_proj", ("gate", "up")), ("[qk]", ("q", "k")),
  ],
)  # fmt: skip
def test_lora_targets_train_the_matrices_they_name(text, trained):
  shapes = open_weights("random:tiny").shapes
  c = override(default_config(), [f"--config.lora.targets={text}"])
  assert lora.targets(shapes, lora.as_pattern(c.lora.targets)) == trained


@pytest.mark.parametrize("text", ["['down_proj']", "q,v", '["q"]'])
def test_text_that_looks_like_a_list_of_targets_is_refused(text):
  c = default_config()
  c.lora.targets, c.lora.rank = text, 2
  with pytest.raises(ConfigError, match="looks like a list"):
    build(c)


def test_an_error_without_words_is_a_problem_with_words():
  problems = []

  def fail():
    raise ValueError

  assert configs.attempt(problems, fail, "task 'mine'") is None
  assert problems == ["task 'mine': ValueError"]


@pytest.mark.parametrize("body", ["raise KeyError('x')", "import sys; sys.exit(3)", "1 / 0"])
def test_whatever_an_experiment_file_raises_names_the_file(tmp_path, body):
  file = tmp_path / "bad.py"
  file.write_text(f"def get_config():\n  {body}\n")
  with pytest.raises(ConfigError, match=r"bad\.py: (KeyError|SystemExit|ZeroDivisionError)"):
    load(str(file))


@pytest.mark.parametrize(
  "body", ["raise BaseException('x')", "import asyncio; raise asyncio.CancelledError()", "exit()"]
)
def test_everything_that_a_file_can_raise_is_one_problem(tmp_path, body):
  file = tmp_path / "bad.py"
  file.write_text(body)
  with pytest.raises(ConfigError, match=r"bad\.py: (BaseException|CancelledError|SystemExit)"):
    load(str(file))
  file.write_text("raise KeyboardInterrupt")
  with pytest.raises(KeyboardInterrupt):
    load(str(file))


def test_a_reward_file_that_ends_the_process_is_one_problem(tmp_path):
  (tmp_path / "reward.py").write_text("import sys; sys.exit(0)")
  (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "answer": 1}\n')
  c = default_config()
  c.task.name = "jsonl"
  with c.unlocked():
    c.task.settings.update(
      path=str(tmp_path / "rows.jsonl"), reward=f"{tmp_path}/reward.py:f", eval_fraction=0.0
    )
  with pytest.raises(ConfigError, match=r"reward\.py raised SystemExit"):
    build(c)


@pytest.mark.parametrize(
  ("saved", "words"),
  [
    ({"steps": "5"}, "steps is '5', it must be a whole number"),
    ({"steps": True}, "steps is True"),
    ({"model": 5}, "model is 5, it must be a group of fields"),
    ({"train": {"slots": "x"}}, r"train\.chunks is 'x'"),
    ({"rollout": {"stop": "x"}}, r"rollout\.stop is 'x', it must be a list"),
    ({"chat": {"arguments": []}}, r"chat\.arguments is \[\]"),
    ({"optimizer": {"beta1": 10**400}}, "OverflowError"),
  ],
)
def test_a_saved_config_with_values_of_another_type_names_the_file(saved, words):
  with pytest.raises(ConfigError, match=f"runs/a/config.json: {words}"):
    from_saved(saved, "runs/a/config.json")


def test_a_saved_config_may_hold_what_it_was_saved_with():
  c = default_config()
  c.algorithm.beta, c.optimizer.learning_rate, c.rollout.stop = 0.5, 1.0, ("x",)
  c.lora.targets = ["q", "v"]
  with c.unlocked():
    c.chat.arguments.effort = {"level": [1, None]}
  saved = json.loads(json.dumps(to_saved(c)).replace("1.0", "1"))
  assert to_saved(from_saved(saved)) == to_saved(c)


@pytest.mark.parametrize("day", ["2025-02-30", "today", "20250101", "2025-1-1"])
def test_the_date_of_the_chat_template_is_a_day(day):
  c = override(default_config(), ["--config.chat.date='2025-01-02'"])
  assert check(override(default_config(), ["--config.chat.date=2025-01-02"]), 1) == []
  c.chat.date = day
  assert check(c, 1) == [f"chat.date is {day!r}, it must be a day as YYYY-MM-DD, or empty"]


# --- what a work directory decides, and settings with dots ----------------------------------------


def test_the_order_of_problems_is_that_of_the_work_directory():
  c = default_config()
  assert c.data.seeding == "auto"
  assert resolve_auto(c, None).data.seeding == "hashed"
  assert from_saved({"seed": 4}).data.seeding == "added"  # saved before there was the field
  assert resolve_auto(c, {"seed": 4}).data.seeding == "added"
  assert resolve_auto(c, to_saved(resolve_auto(c, None))).data.seeding == "hashed"
  explicit = override(default_config(), ["--config.data.seeding=hashed"])
  assert resolve_auto(explicit, {"seed": 4}).data.seeding == "hashed"  # and refused by `train`
  assert c.data.seeding == "auto"


def test_settings_of_a_task_may_have_dots_in_names():
  rename = {"reward_model.ground_truth": "answer"}
  c = default_config()
  with c.unlocked():
    c.task.settings.update(rename=rename, path="x")
  assert c.task.settings.to_dict() == {"rename": rename, "path": "x"}
  again = from_saved(json.loads(json.dumps(to_saved(c))))
  assert again.task.settings.to_dict() == {"rename": rename, "path": "x"}
  assert to_saved(again) == to_saved(c)
  c = default_config()
  c.task.settings = {"rename": rename}
  assert c.task.settings.rename == rename
  c = override(default_config(), [f"--config.task.settings.rename={rename}"])
  assert c.task.settings.rename == rename


def test_an_entry_of_a_setting_may_be_changed():
  c = default_config()
  c.task.settings = {"weights": {"numeric": 1.0}}
  assert override(c, ["--config.task.settings.weights.numeric=2"]).task.settings.weights == {
    "numeric": 2
  }
  with pytest.raises(ConfigError, match=r"task\.settings\.weights has: numeric"):
    override(c, ["--config.task.settings.weights.numerik=2"])


@pytest.mark.parametrize(
  "change",
  [
    "eval.top_p=0.0", "eval.top_p=1.5", "eval.top_k=-1", "eval.min_p=-0.1", "eval.min_p=1.1",
    "eval.temperature=0.0", "epochs=-1", "stop.after_hours=-1", "stop.after_hours=1e400",
    "data.seeding=sorted",
  ],
)  # fmt: skip
def test_new_fields_are_checked(change):
  problems = check(override(default_config(), [f"--config.{change}"]), 1)
  assert len(problems) == 1, problems
  assert problems[0].startswith(f"{change.partition('=')[0]} is ")


def test_rollouts_have_no_filter():
  """The policy that is scored is the policy that was sampled."""
  for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
    reason = f"{name} would draw from another distribution than the one that the loss scores"
    with pytest.raises(ConfigError, match=rf"no field 'rollout\.{name}': {reason}.* eval.top_k"):
      override(default_config(), [f"--config.rollout.{name}=1"])
    with pytest.raises(ValueError, match=f"no field '{name}' here: {reason}.* eval.top_k"):
      default_config().rollout[name] = 0.9
    with pytest.raises(ValueError, match=f"no field '{name}' here: {reason}"):
      setattr(default_config().rollout, name, 0.9)
  c = default_config()
  c.eval.top_p = 0.9
  assert c.eval.top_p == 0.9
