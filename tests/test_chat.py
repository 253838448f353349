"""Tests the chat settings of a run: a system turn, variables of the template, and its one date."""

import datetime
import json
import shutil
from pathlib import Path

import pytest

from grpo_jax import train
from grpo_jax.build import build
from grpo_jax.config import ConfigError, default_config, from_saved, override, to_saved
from grpo_jax.run import workdir as workdirs
from tests.helpers.model_files import UNTIED

TEMPLATE = (
  "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
  "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"
)


@pytest.fixture
def config(tmp_path):
  """Returns a config of a run on a model with the template above, and a file of chat prompts."""
  folder = tmp_path / "model"
  shutil.copytree(UNTIED, folder)
  (folder / "chat_template.jinja").write_text(TEMPLATE)
  rows = [{"prompt": [{"role": "user", "content": f"{i}"}], "answer": i} for i in range(4)]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  c = default_config()
  c.model.source, c.task.name = str(folder), "jsonl"
  c.rollout.prompts_per_step, c.rollout.group_size = 8, 2
  c.rollout.completion_length = 4
  with c.unlocked():
    c.task.settings.update(path=str(tmp_path / "rows.jsonl"), reward="numeric", eval_fraction=0.0)
  return c


def prompt_of(c):
  """Returns the text of the first prompt of a run."""
  run = build(c)
  tokenizer = run.sampler.tokenizer
  return tokenizer.decode(tokenizer.chat(run.task.splits["train"][0].prompt))


def test_a_system_turn_and_arguments_are_part_of_every_prompt(config):
  config.chat.date = "2025-01-02"
  assert prompt_of(config) == "2025-01-02[user]0"
  config.chat.system = "Be brief."
  c = override(config, ["--config.chat.arguments.enable_thinking=false"])
  assert prompt_of(c) == "2025-01-02[system]Be brief.[user]0<no>"
  example = build(c).task.splits["train"][0]  # what rewards and samples see
  assert example.prompt[0] == {"role": "system", "content": "Be brief."}
  assert prompt_of(from_saved(json.loads(json.dumps(to_saved(c))))) == prompt_of(c)


def test_an_argument_that_the_template_does_not_read_is_an_error(config):
  c = override(config, ["--config.chat.arguments.enable_thinkin=false"])
  with pytest.raises(
    ConfigError, match=r"chat\.arguments holds enable_thinkin, .* it reads: enable"
  ):
    build(c)
  c = override(config, ["--config.chat.arguments={}"] if False else [])
  with c.unlocked():
    c.chat.arguments = {"messages": []}
  with pytest.raises(ConfigError, match=r"chat\.arguments holds .*messages"):
    build(c)


@pytest.mark.parametrize(
  ("prompt", "words"),
  [
    ("12", "is text, which has no turns"),
    ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "of its own"),
  ],
)
def test_a_system_turn_that_cannot_be_put_before_a_prompt_is_an_error(config, prompt, words):
  rows = json.dumps({"prompt": prompt, "answer": 1}) + "\n"
  Path(config.task.settings.path).write_text(rows * 2)
  config.chat.system = "Be brief."
  with pytest.raises(ConfigError, match=f"chat.system is set, and the prompt .*{words}"):
    build(config)


def test_a_work_directory_keeps_its_date(config, tmp_path):
  today = datetime.date.today().isoformat()
  c = train.with_chat_date(config, tmp_path)
  assert (c.chat.date, config.chat.date) == (today, "")
  c.chat.date = "2001-02-03"
  workdirs.write_config(tmp_path, to_saved(c))
  again = train.with_chat_date(config, tmp_path)
  assert again.chat.date == "2001-02-03"
  train.check_workdir(again, tmp_path, {})
  config.chat.date = "2001-02-04"
  with pytest.raises(ConfigError, match=r"chat\.date: '2001-02-03' -> '2001-02-04'"):
    train.check_workdir(train.with_chat_date(config, tmp_path), tmp_path, {})


def test_a_run_from_before_the_date_was_kept_goes_on(config, tmp_path):
  saved = to_saved(config)
  del saved["chat"]
  workdirs.write_config(tmp_path, saved)
  train.check_workdir(train.with_chat_date(config, tmp_path), tmp_path, {})
