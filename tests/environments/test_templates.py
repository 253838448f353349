"""Tests that chat templates render as in transformers, and that none hangs or fills the memory."""

import os
import time

import pytest

from grpo_jax.environments import templates
from grpo_jax.environments.templates import ChatTemplate, TemplateError

CHAT = [
  {"role": "system", "content": "Be <brief> & kind.  "},
  {"role": "user", "content": "naïve 東京 {{ 1 }}", "tags": ["a", {"b": None}]},
]
LIKE_TRANSFORMERS = [
  "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m.content | trim }}{% endfor %}",
  "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
  "{{ ns.n }}",
  "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
  "{% for m in messages %}\n  {% if m.role == 'user' %}\n  {{ m.content }}\n  {% endif %}\n"
  "{% endfor %}\n",
  "{% generation %}{{ messages[1].content }}{% endgeneration %}{{ tools is none }}",
  "{{ dict(a=1) }}{{ dict.fromkeys('ab') }}{{ messages | tojson(indent=2) }}",
  "{% if tools %}x{% endif %}{{ add_generation_prompt }}{{ enable_thinking is defined }}",
]


def render(source, **names):
  template = ChatTemplate(source, "2025-01-02", {"tools": None, "documents": None, **names})
  return template.render(messages=CHAT, add_generation_prompt=True)


@pytest.mark.parametrize("source", LIKE_TRANSFORMERS)
def test_a_template_renders_as_in_transformers(source):
  from tokenizers import Tokenizer, models
  from transformers import PreTrainedTokenizerFast

  backend = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
  fast = PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", unk_token="<s>", chat_template=source
  )
  expected = fast.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
  assert render(source, bos_token="<s>") == expected


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d %H:%M:%S"])
def test_the_date_is_the_one_that_is_given(form):
  expected = {"%d %b %Y": "02 Jan 2025"}.get(form, "2025-01-02 00:00:00")
  assert render(f"{{{{ strftime_now('{form}') }}}}") == expected


def test_one_prompt_is_one_text_whatever_a_template_draws():
  source = "{{ range(1000) | random }} {{ range(1000) | random }}"
  template = ChatTemplate(source, "2025-01-02", {})
  assert len({template.render() for _ in range(5)} | {render(source)}) == 1


@pytest.mark.parametrize(
  ("source", "words"),
  [
    ("{{ raise_exception('no system turn') }}", "^no system turn$"),
    ("{% for m in messages %}\n{{ m.content }", "syntax error in line 2"),
    ("{{ messages[0].contents.strip() }}", "'dict object' has no attribute 'contents'"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ 'a' * (3 * 10**9) }}", "more than 512 MiB"),
    ("{{ 'a' * 2**25 }}", "writes over 16,777,216 characters"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
  ],
)
def test_a_template_that_fails_says_so_in_its_own_words(source, words):
  template = ChatTemplate(source, "2025-01-02", {})
  for _ in range(2):  # the process goes on, or starts again
    with pytest.raises(TemplateError, match=words):
      template.render(messages=CHAT)


@pytest.mark.parametrize(
  "source",
  [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ (10 ** 6) ** (10 ** 6) % 7 ** (10 ** 7) }}",
  ],
)
def test_a_template_that_does_not_end_is_stopped(monkeypatch, source):
  monkeypatch.setattr(templates, "SECONDS", 0.6)
  began = time.monotonic()
  template = ChatTemplate(source, "2025-01-02", {})
  with pytest.raises(TemplateError, match=r"it was stopped after 0\.\d s, .* may take 0\.6 s"):
    template.render()
  assert time.monotonic() - began < 10
  assert template._process.returncode is not None


def test_templates_that_are_a_little_slow_for_each_prompt_are_stopped(monkeypatch):
  monkeypatch.setattr(templates, "SECONDS", 0.5)
  monkeypatch.setattr(templates, "SECONDS_EACH", 0.0)
  template = ChatTemplate("{% for i in range(60000) %}{% endfor %}", "2025-01-02", {})
  with pytest.raises(TemplateError, match=r"the \d\d+ prompts so far have taken 0\.[45] s"):
    all(template.render() == "" for _ in range(1000))


def test_the_process_ends_with_its_template():
  template = ChatTemplate("x", "2025-01-02", {})
  template.render()
  pid = template._process.pid
  del template
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_a_process_that_died_is_replaced():
  template = ChatTemplate("x", "2025-01-02", {})
  template.render()
  connection = template._connection
  template._process.kill()
  template._process.wait()
  assert template.render() == "x"
  assert connection.closed


def test_the_names_that_a_template_reads_are_known():
  source = "{% set a = 1 %}{{ a }}{% if enable_thinking %}{{ messages }}{% endif %}"
  assert ChatTemplate(source, "2025-01-02", {}).variables() == {"enable_thinking", "messages"}
