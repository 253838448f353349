"""Tests how the settings of a sweep are read, and the names of its runs."""

import pytest

from grpo_jax.sweep.grid import SweepError, grid, name_of, parse_all, short_names, split


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("1", ["1"]),
    ("", [""]),
    ("a,,b", ["a", "", "b"]),
    ("('x','y'),()", ["('x','y')", "()"]),
    ("{'a': [1, 2]}, 3", ["{'a': [1, 2]}", "3"]),
    ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
    ("isn't,it", ["isn't", "it"]),
    ("a),b", ["a)", "b"]),
  ],
)
def test_commas_within_brackets_and_quotes_do_not_split(text, parts):
  assert split(text) == parts


def test_every_combination_is_a_run_and_the_last_field_is_fastest():
  runs = grid(parse_all(["optimizer.learning_rate=1e-5,3e-5", "seed=0,1"]))
  assert list(runs) == [
    "learning_rate=1e-5,seed=0",
    "learning_rate=1e-5,seed=1",
    "learning_rate=3e-5,seed=0",
    "learning_rate=3e-5,seed=1",
  ]
  assert runs["learning_rate=3e-5,seed=0"] == {"optimizer.learning_rate": "3e-5", "seed": "0"}


def test_names_are_distinct_and_hold_no_separator_of_paths():
  texts = ["a/b", "a b", "a-b", "../x", "ä", "x" * 400, "x" * 401]
  names = [name_of({"model.source": text}) for text in texts]
  assert len(set(names)) == len(texts)
  assert all("/" not in name and name.isascii() and len(name) < 140 for name in names)
  assert name_of({"model.source": "a-b"}) == "source=a-b"


def test_fields_that_end_alike_keep_their_whole_names():
  fields = ["optimizer.learning_rate", "critic.learning_rate", "seed"]
  assert list(short_names(fields).values()) == [*fields[:2], "seed"]


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    ([], "nothing differs between the runs"),
    (["seed"], "--set 'seed' must be FIELD=VALUE,VALUE"),
    (["=1"], "must be FIELD=VALUE,VALUE"),
    (["seed="], "--set 'seed=' has no values"),
    (["seed=0,,1"], "has an empty value"),
    (["seed=0,1,0"], "has 0 twice"),
    (["seed=0", "seed=1"], "--set seed is given 2 times"),
  ],
)
def test_mistakes_are_named(texts, message):
  with pytest.raises(SweepError, match="1 problem") as error:
    parse_all(texts)
  assert message in str(error.value)


def test_all_mistakes_are_told_at_once():
  with pytest.raises(SweepError, match="3 problems"):
    parse_all(["seed=", "x", "steps=1", "steps=2"])
