"""Encodes what an environment answers as the tokens that follow a turn of the policy.

Tokens that the policy wrote are never decoded and encoded again. An observation is encoded once,
with the turn markers of the chat template where the prompt is a conversation: the end of the
policy's turn, the messages of the environment, and the start of the policy's next turn.
"""

from collections.abc import Sequence
from typing import Any

from grpo_jax.tokens import AnyTokenizer, Messages

# A conversation that every template takes, and what a tool message answers to.
USER = {"role": "user", "content": "?"}
TURN = {"role": "assistant", "content": "!"}
CALL = {"type": "function", "function": {"name": "tool", "arguments": {}}}


def encode_observation(
  tokenizer: AnyTokenizer, observation: str | Messages, *, last: int, chat: bool
) -> list[int]:
  """Returns the tokens between two turns of the policy.

  Args:
    tokenizer: has the chat template.
    observation: text or chat messages. In a conversation, text is a user's turn.
    last: last token of the policy's turn. If it is the one that ends a turn in the chat template,
      it is not repeated.
    chat: whether the prompt was a conversation.

  Raises:
    ValueError: the template cannot show the messages, or shows a conversation otherwise when it
      goes on; or there are messages and the prompt was text.

  Example:
    >>> from grpo_jax.tokens import ByteTokenizer
    >>> bytes(encode_observation(ByteTokenizer(), "Higher", last=53, chat=False)).decode()
    'Higher'
  """
  if not chat:
    if not isinstance(observation, str):
      raise ValueError(
        f"the environment answered with messages, and the prompt is text: {observation!r:.200}. "
        "Answer with text, or give chat messages as the prompt"
      )
    return tokenizer.encode_plain(observation)
  messages = observation
  if isinstance(observation, str):
    messages = [{"role": "user", "content": observation}] if observation else []
  turn = {**TURN}
  if any(message["role"] == "tool" for message in messages):
    turn["tool_calls"] = [CALL]
  before = tokenizer.render([USER, turn], add_generation_prompt=False)
  after = tokenizer.render([USER, turn, *messages], add_generation_prompt=True)
  end, text = _end_of_turn(tokenizer, before)
  if not after.startswith(before[:end]):
    raise ValueError(
      f"the chat template of {tokenizer.name} shows earlier turns otherwise once a conversation "
      "goes on: it cannot be used for episodes"
    )
  ids = tokenizer.encode_plain(after[end - len(text) :])
  return ids[1:] if text and ids[:1] == [last] else ids


def _end_of_turn(tokenizer: AnyTokenizer, text: str) -> tuple[int, str]:
  """Returns where the last ending token of a rendered turn ends, and that token's text.

  A template without such a token ends a turn in its own way, and everything after the content
  belongs to the observation.
  """
  ends = [(text.rfind(mark), mark) for mark in tokenizer.end_marks()]
  start, mark = max(ends, default=(-1, ""))
  content = text.rindex(TURN["content"]) + len(TURN["content"]) if TURN["content"] in text else 0
  return (start + len(mark), mark) if start >= content else (content, "")


def is_chat(prompt: Any) -> bool:
  """Tells whether a prompt is a conversation."""
  return not isinstance(prompt, str)


def transcript(turns: Sequence[str], observations: Sequence[str | Messages]) -> Messages:
  """Returns the turns of an episode and what was answered, as chat messages in order.

  Example:
    >>> transcript(["5", "6"], ["Higher"])[1]
    {'role': 'user', 'content': 'Higher'}
  """
  messages: Messages = []
  for number, turn in enumerate(turns):
    messages.append({"role": "assistant", "content": turn})
    if number < len(observations):
      seen = observations[number]
      messages += [{"role": "user", "content": seen}] if isinstance(seen, str) else seen
  return messages
