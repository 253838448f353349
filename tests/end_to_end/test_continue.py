"""Continuing a run: what is refused, what is kept, and what has to be accepted by name."""

import json

import pytest

from grpo_jax import train
from grpo_jax.build import build
from grpo_jax.config import ConfigError, from_saved, load, to_saved
from grpo_jax.metric_names import metric_names
from grpo_jax.run import identity
from grpo_jax.run import workdir as workdirs
from grpo_jax.run.metrics import read_metrics

TINY = "experiments/tiny.py"
SMALL = ("rollout.prompts_per_step=8", "rollout.group_size=2", "rollout.completion_length=2")


def config(*changes):
  return load(TINY, [f"--config.{change}" for change in (*SMALL, *changes)])


def started(workdir, c, files=None):
  """A work directory as a run with this config leaves it, without its checkpoints."""
  workdir.mkdir()
  workdirs.write_config(workdir, to_saved(c))
  if files is not None:
    identity.write(workdir, files)
  return workdir


def evaluations(workdir):
  return [row["step"] for row in read_metrics(workdir) if "eval/n" in row]


def test_fewer_steps_are_refused_and_more_keep_every_record(tmp_path):
  workdir = tmp_path / "run"
  train.run(config("steps=2"), workdir)
  before = (workdir / "metrics.jsonl").read_text()
  with pytest.raises(workdirs.WorkdirError, match=r"holds 2 finished steps, and steps is 1: set"):
    train.run(config("steps=1"), workdir)
  assert (workdir / "metrics.jsonl").read_text() == before
  assert (workdir / "samples" / "eval_000002.jsonl").is_file()
  train.run(config("steps=3"), workdir)
  assert evaluations(workdir) == [0, 2, 3]  # after 2 steps the first run was at its end
  assert (workdir / "metrics.jsonl").read_text().startswith(before)
  assert sorted(path.stem for path in (workdir / "samples").glob("eval_*")) == [
    "eval_000000", "eval_000002", "eval_000003",
  ]  # fmt: skip
  train.run(config("steps=3", "eval.every=1"), workdir)  # done again, and not written twice
  assert evaluations(workdir) == [0, 2, 3]


@pytest.mark.parametrize(("seconds", "saved"), [(1e-9, [1, 2, 3]), (0, [3]), (3600, [3])])
def test_saves_may_be_timed_instead_of_counted(tmp_path, seconds, saved):
  workdir, settings = tmp_path / "run", ("checkpoint.every=0", "checkpoint.keep=9")
  train.run(config("steps=3", *settings, f"checkpoint.seconds={seconds}"), workdir)
  folders = (workdir / "checkpoints").iterdir()
  assert sorted(int(path.name) for path in folders if path.name.isdigit()) == saved


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_is_not_stretched_in_silence(tmp_path, schedule):
  same = f"optimizer.schedule={schedule}"
  workdir = started(tmp_path / "run", config("steps=4", same))
  with pytest.raises(ConfigError, match=r"would end after 8 steps and not after 4.*--accept steps"):
    train.check_workdir(config("steps=8", same), workdir, {})
  train.check_workdir(config("steps=8", same), workdir, {}, accept=["steps"])
  kept = config("steps=8", same, "optimizer.schedule_steps=4")
  train.check_workdir(kept, workdir, {})
  rates = [float(build(c).schedule(3)) for c in (config("steps=4", same), kept)]
  assert rates[0] == rates[1] > 0
  assert float(build(kept).schedule(7)) == 0  # at its end after four steps


def test_a_constant_schedule_may_go_on(tmp_path):
  workdir = started(tmp_path / "run", config("steps=4"))
  train.check_workdir(config("steps=8", "rewards.workers=2", "rewards.timeout=5.0"), workdir, {})


def test_files_that_were_edited_have_to_be_accepted(tmp_path):
  data, reward = tmp_path / "data.jsonl", tmp_path / "reward.py"
  data.write_text("".join(json.dumps({"prompt": f"{n}", "answer": n}) + "\n" for n in range(40)))
  reward.write_text("def score(prompts, completions, **columns):\n  return [0.0] * len(prompts)\n")
  settings = [f"task.settings.path={data}", f"task.settings.reward={reward}:score"]
  c = config("task.name=table", *settings)
  files = train.identity_of(build(c), TINY)
  assert set(files) == {TINY, str(data), str(reward)}
  workdir = started(tmp_path / "run", c, files)
  train.check_workdir(c, workdir, train.identity_of(build(c), TINY))
  for file in (data, reward):
    file.write_text(file.read_text() + "\n")
  now = train.identity_of(build(c), TINY)
  with pytest.raises(ConfigError) as caught:
    train.check_workdir(c, workdir, now)
  assert [str(file) in problem for file, problem in zip((data, reward), caught.value.problems)] == [
    True, True,
  ]  # fmt: skip
  with pytest.raises(ConfigError, match=r"reward\.py has changed"):
    train.check_workdir(c, workdir, now, accept=[str(data)])
  train.check_workdir(c, workdir, now, accept=[str(data), str(reward)])


def test_a_chat_template_that_was_edited_has_to_be_accepted(tmp_path):
  workdir = started(tmp_path / "run", config(), identity.digests([], {"the chat template": "a"}))
  now = identity.digests([], {"the chat template": "b"})
  with pytest.raises(ConfigError, match="the chat template has changed"):
    train.check_workdir(config(), workdir, now)
  train.check_workdir(config(), workdir, now, accept=["the chat template"])


def test_a_field_may_be_changed_by_name(tmp_path):
  workdir = started(tmp_path / "run", config())
  changed = config("optimizer.learning_rate=0.1")
  with pytest.raises(ConfigError, match=r"--accept optimizer\.learning_rate"):
    train.check_workdir(changed, workdir, {})
  train.check_workdir(changed, workdir, {}, accept=["optimizer.learning_rate"])


def test_a_damaged_identity_says_what_to_do(tmp_path):
  (tmp_path / identity.IDENTITY).write_text('{"a": 3}')
  with pytest.raises(workdirs.WorkdirError, match=r"is damaged .*Remove it"):
    identity.read(tmp_path)


def test_a_run_whose_rewards_never_score_ends_at_its_first_step(tmp_path):
  data, reward = tmp_path / "data.jsonl", tmp_path / "reward.py"
  data.write_text("".join(json.dumps({"prompt": f"{n}"}) + "\n" for n in range(40)))
  reward.write_text("def score(prompts, completions, **columns):\n  return [None] * len(prompts)\n")
  settings = [f"task.settings.path={data}", f"task.settings.reward={reward}:score"]
  c = config("task.name=table", "task.settings.eval_fraction=0.0", "steps=2", *settings)
  with pytest.raises(train.UnscoredError, match="the rewards score gave None or NaN for all"):
    train.run(c, tmp_path / "run")
  c = config(
    "task.name=table", "task.settings.eval_fraction=0.0", "steps=1", *settings,
    "rewards.allow_unscored=true",
  )  # fmt: skip
  train.run(c, tmp_path / "other")


@pytest.mark.parametrize("weight", ["0.0", "inf", "nan"])
def test_weights_that_leave_no_reward_are_refused(tmp_path, weight):
  data = tmp_path / "data.jsonl"
  data.write_text("".join(json.dumps({"prompt": f"{n}", "answer": n}) + "\n" for n in range(40)))
  c = config("task.name=table", f"task.settings.path={data}", "task.settings.reward=numeric")
  with c.unlocked():
    c.task.settings.weights = (float(weight),)
  with pytest.raises(ConfigError, match="weight"):
    build(c)


# --- the order of problems ------------------------------------------------------------------------


def prompts_of(workdir, step):
  lines = (workdir / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
  return [json.loads(line)["prompt"] for line in lines][::2]  # of two completions each


def test_problems_in_the_order_of_the_file_for_two_epochs(tmp_path):
  """20 problems in steps of 8: five steps, the third of which reaches into the second epoch."""
  data = tmp_path / "data.jsonl"
  data.write_text("".join(json.dumps({"prompt": f"{n}", "answer": n}) + "\n" for n in range(20)))
  settings = (
    "task.name=table", f"task.settings.path={data}", "task.settings.reward=numeric",
    "task.settings.eval_fraction=0.0", "data.shuffle=false", "epochs=2",
    "rewards.allow_unscored=true",
  )  # fmt: skip
  train.run(config(*settings), tmp_path / "run")
  drawn = [prompt for step in range(5) for prompt in prompts_of(tmp_path / "run", step)]
  assert drawn == [str(n) for n in [*range(20), *range(20)]]
  assert not (tmp_path / "run" / "samples" / "step_000005.jsonl").exists()
  saved = workdirs.read_config(tmp_path / "run")
  assert (saved["steps"], saved["epochs"], saved["data"]["seeding"]) == (5, 2.0, "hashed")
  with pytest.raises(ConfigError, match=r"put back data\.shuffle: False -> True"):
    train.run(config(*settings, "data.shuffle=true"), tmp_path / "run")


def test_a_work_directory_keeps_its_seeding(tmp_path):
  saved = to_saved(config())
  del saved["data"]
  workdir = tmp_path / "old"
  workdir.mkdir()
  workdirs.write_config(workdir, saved)
  changed = "data.seeding: 'added' -> 'hashed'"
  with pytest.raises(ConfigError, match=changed):
    train.run(config("data.seeding=hashed"), workdir)
  train.run(config("steps=1", "eval.batch_prompts=8"), workdir)
  assert workdirs.read_config(workdir)["data"]["seeding"] == "added"
  drawn = {}
  for name, c in (("kept", from_saved(workdirs.read_config(workdir))), ("new", config()),
                  ("added", config("data.seeding=added"))):  # fmt: skip
    # Of 100 problems, step 13 takes eight of the second epoch.
    drawn[name] = [example.prompt for example in build(c).examples(13)(0)]
  assert drawn["kept"] == drawn["added"] != drawn["new"]


# --- an early end ---------------------------------------------------------------------------------


def test_a_run_ends_early_saves_evaluates_and_goes_on(tmp_path, capsys):
  """`loss<1e9` holds after the first step; its metrics are known one step later."""
  workdir = tmp_path / "run"
  early = ("steps=4", "checkpoint.every=50", "eval.batch_prompts=8")
  results = train.run(config(*early, "stop.when=loss<1e9"), workdir)
  assert "stopped after step 2: stop.when is loss<1e+09, and it is " in capsys.readouterr().out
  assert evaluations(workdir) == [0, 2]
  assert checkpoints(workdir) == [2]
  assert results["eval/n"] == 20
  before = (workdir / "metrics.jsonl").read_text()
  again = train.run(config(*early, "stop.when=loss<1e9"), workdir)  # there is nothing left to do
  assert again == results
  assert (workdir / "metrics.jsonl").read_text() == before
  train.run(config(*early), workdir)
  assert evaluations(workdir) == [0, 2, 4]
  whole = tmp_path / "whole"
  train.run(config(*early), whole)
  rows = [
    [(row["step"], row["loss"]) for row in read_metrics(w) if "loss" in row]
    for w in (workdir, whole)
  ]
  assert rows[0] == rows[1]


def test_an_evaluation_that_was_just_made_is_not_made_again(tmp_path, capsys):
  workdir = tmp_path / "run"
  settings = ("steps=6", "eval.every=2", "eval.batch_prompts=8", "stop.when=eval/n>=20")
  train.run(config(*settings), workdir)
  assert "stopped after step 0: stop.when is eval/n>=20, and it is 20 (step 0)" in (
    capsys.readouterr().out
  )
  assert evaluations(workdir) == [0]
  assert checkpoints(workdir) == []


def test_a_time_limit_ends_a_run_after_a_step(tmp_path, capsys):
  workdir = tmp_path / "run"
  settings = ("steps=6", "eval.batch_prompts=8", "stop.after_hours=1e-9")
  train.run(config(*settings), workdir)
  assert "stopped after step 0: stop.after_hours is 1e-09" in capsys.readouterr().out
  assert [row["step"] for row in read_metrics(workdir)] == [0]


def checkpoints(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("reward", "must be a metric, one of"), ("open('x')>1", "unknown metric"),
    ("eval/pass@8>0.5", r"unknown metric 'eval/pass@8'"), ("kl<1", "unknown metric 'kl'"),
  ],
)  # fmt: skip
def test_a_condition_on_what_the_run_does_not_write_is_refused(tmp_path, text, message):
  """eval.samples is 0, and there is no KL term."""
  with pytest.raises(ConfigError, match=message):
    train.run(config(f"stop.when={text}"), tmp_path / "run")
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


# Of other options; the quick tests have those of the evaluation and of a critic.
OTHERS = [
  ("algorithm.name=ppo", "critic.clip=0.2"),
  ("algorithm.name=rloo_kl", "teacher.source=random:tiny", "algorithm.teacher_weight=0.5",
   "data.curriculum=learnability"),
  ("algorithm.name=reinforce_pp_kl", "algorithm.beta=0.1", "train.epochs=2"),
  ("algorithm.name=opd", "teacher.source=random:tiny", "algorithm.teacher_divergence=0.5"),
  ("algorithm.name=opd", "teacher.source=reference", "reference.sync_every=1",
   "reference.sync_share=0.05", "teacher.solved_from=0.1"),
  ("algorithm.entropy_target=9.0", "algorithm.entropy_delta=0.01", "algorithm.nll_weight=0.1",
   "algorithm.anchor=sampler", "algorithm.correction=geometric_mask+off_policy_mask",
   "algorithm.geometric_min=0.9", "algorithm.geometric_max=1.1", "algorithm.off_policy_max=0.5"),
  ("rollout.partial_tokens=1", "rollout.partial_prompts=8", "algorithm.anchor=sampler"),
]  # fmt: skip


@pytest.mark.parametrize(
  "changes",
  [
    (),
    ("eval.samples=4", "algorithm.name=grpo", "algorithm.beta=0.1", "train.mini_batches=1",
     "train.epochs=2", "rollout.max_resamples=1", "eval.temperature=0.7", "eval.top_p=0.9"),
    ("algorithm.name=ppo", "critic.trunk=policy"),
    *(pytest.param(changes, marks=pytest.mark.slow) for changes in OTHERS),
  ],
)  # fmt: skip
def test_all_metrics_of_a_run_are_known_before(tmp_path, changes):
  c = config("steps=2", "eval.batch_prompts=8", *changes)
  train.run(c, tmp_path / "run")
  written = {name for row in read_metrics(tmp_path / "run") for name in row} - {"step"}
  run = build(c)
  assert metric_names(run.config, run.task, run.algorithm) == written
