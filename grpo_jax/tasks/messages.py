"""Reads chat messages as other tools write them: contents in parts, and fields that are null."""

from __future__ import annotations

from typing import Any


def plain_messages(value: object) -> list[dict[str, Any]] | None:
  """Returns chat messages whose contents are text, None if the value is not a list of messages.

  Parts of text are joined. A content that is null, as beside tool calls, becomes empty text. Other
  fields are kept unless they are null, which Parquet files write for those that a message lacks.

  Example:
    >>> plain_messages([{"role": "user", "content": [{"type": "text", "text": "1 + 1"}]}])
    [{'role': 'user', 'content': '1 + 1'}]
    >>> plain_messages([{"role": "user", "content": [{"type": "image"}]}]) is None
    True
  """
  if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
    return None
  messages = []
  for message in value:
    text = _text(message.get("content"))
    has_content = "content" in message or "tool_calls" in message
    if not isinstance(message.get("role"), str) or not has_content or text is None:
      return None
    fields = {name: field for name, field in message.items() if field is not None}
    messages.append({**fields, "content": text})
  if not any(message["content"].strip() for message in messages):
    return None
  return messages


def _text(content: object) -> str | None:
  """Returns the text of a content, None if a part of it is not text."""
  if content is None:
    return ""
  if isinstance(content, str):
    return content
  if not isinstance(content, list) or not all(_is_text(part) for part in content):
    return None
  return "".join(part["text"] for part in content)


def _is_text(part: object) -> bool:
  return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
