"""Tests that the decoder is a `Model`: same functions, same arguments, same types."""

import inspect
from typing import get_args

import pytest

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.protocol import Model, ModelShape

CONFIG = ModelConfig(vocab_size=8, width=4, layers=1, heads=2, kv_heads=1, head_dim=2, mlp=6)
METHODS = [
  name for name, value in vars(Model).items() if inspect.isfunction(value) and name[0] != "_"
]


def test_the_protocol_has_the_functions_of_the_design():
  assert METHODS == ["head", "score", "prefill", "decode", "empty_cache"]


@pytest.mark.parametrize("name", METHODS)
def test_the_decoder_has_the_signatures_of_the_protocol(name):
  expected, actual = (inspect.signature(getattr(kind, name)) for kind in (Model, Decoder))
  names, further = list(actual.parameters), list(actual.parameters)[len(expected.parameters) :]
  assert names == [*expected.parameters, *further]
  assert all(actual.parameters[name].default is None for name in further)  # of this model alone
  for parameter, annotated in expected.parameters.items():
    own = actual.parameters[parameter].annotation
    # This model may take more than the protocol asks for: an index for each row.
    accepted = {str(kind) for kind in (own, *get_args(own))}
    asked = [annotated.annotation]
    if str(annotated.annotation) not in accepted:
      asked = get_args(annotated.annotation)
    assert asked, parameter
    assert {str(kind) for kind in asked} <= accepted, parameter
  assert str(actual.return_annotation) == str(expected.return_annotation)


def test_a_config_has_the_facts_of_the_protocol():
  facts = [name for name, value in vars(ModelShape).items() if isinstance(value, property)]
  assert facts == ["vocab_size", "softcap"]
  assert [getattr(Decoder(CONFIG).config, name) for name in facts] == [8, None]
