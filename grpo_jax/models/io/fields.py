"""Reads the fields of a config.json, by name and with errors that name the file and the field."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from grpo_jax.models.config import MAX_LAYERS


class Fields:
  """Reads the fields of a config.json by name; errors name the file and the field.

  Args:
    raw: the fields.
    defaults: values of missing fields.
    where: name of the file in errors.
  """

  def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    self.raw, self.where = {**defaults, **raw}, where

  def get(self, name: str, default: Any = None) -> Any:
    """Returns the value of a field, or `default` if it is missing or null."""
    value = self.raw.get(name)
    return default if value is None else value

  def number(self, name: str, default: float | None = None) -> float:
    """Returns the value of a numeric field; ValueError for any other value."""
    value = self.get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:
      raise self._wrong(name, value, "a finite number")
    return float(value)

  def positive(self, name: str, default: float | None = None) -> float:
    """Returns the value of a numeric field above 0; ValueError for any other value."""
    if (value := self.number(name, default)) <= 0:
      raise self._wrong(name, value, "a finite number above 0")
    return value

  def integer(self, name: str, default: int | None = None) -> int:
    """Returns the value of a positive integer field; ValueError for any other value."""
    value = self.get(name, default)
    if type(value) is not int or value < 1:
      raise self._wrong(name, value, "a positive integer")
    if value >= 2**31:
      raise self._wrong(name, value, "an integer below 2^31")
    return value

  @property
  def layers(self) -> int:
    """The number of layers; ValueError where it would make endless lists."""
    if (value := self.integer("num_hidden_layers")) > MAX_LAYERS:
      raise self._wrong("num_hidden_layers", value, f"at most {MAX_LAYERS}")
    return value

  def items(self, name: str) -> list[Any] | None:
    """Returns the value of a list with one entry for each layer, or None if it is missing."""
    value = self.get(name)
    if value is not None and (not isinstance(value, list) or len(value) < self.layers):
      raise self._wrong(name, value, f"a list of {self.layers} entries, one for each layer")
    return value if value is None else value[: self.layers]

  def flag(self, name: str, default: bool = False) -> bool:
    """Returns the value of a true-or-false field; ValueError for any other value."""
    value = self.get(name, default)
    if not isinstance(value, bool):
      raise self._wrong(name, value, "true or false")
    return value

  def group(self, name: str) -> dict[str, Any]:
    """Returns the fields of a group, none if it is missing; ValueError for any other value."""
    value = self.get(name, {})
    if not isinstance(value, dict):
      raise self._wrong(name, value, "an object")
    return value

  def _wrong(self, name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{self.where}: {name} must be given as {allowed}, got {repr(value)[:80]}")

  def cap(self, name: str) -> float | None:
    """Returns a soft cap, or None if the field is missing, null or 0."""
    return self.number(name, 0.0) or None

  def refuse(self, name: str, reason: str) -> None:
    """Raises ValueError if the field is set."""
    if self.get(name):
      raise ValueError(f"{self.where}: {name} {self.raw[name]!r} is not supported: {reason}")
