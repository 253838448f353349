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
# Contents of that turn, in the order in which they are tried. Some templates, such as Qwen3's, add
# an empty thought to a turn while it is the last one, and leave a turn with a thought as it is.
TURNS = ("!", "<think>\n?\n</think>\n\n!")
CALL = {"type": "function", "function": {"name": "tool", "arguments": {}}}


class ObservationEncoder:
  """Encodes observations with the chat template of a tokenizer.

  Example:
    >>> from grpo_jax.tokens import ByteTokenizer
    >>> bytes(ObservationEncoder(ByteTokenizer())("Higher", last=53, chat=False)).decode()
    'Higher'
  """

  def __init__(self, tokenizer: AnyTokenizer) -> None:
    self._tokenizer = tokenizer
    # Content of a turn and whether it calls a tool -> see `_beginning`.
    self._beginnings: dict[tuple[str, bool], tuple[str, str]] = {}

  def __call__(self, observation: str | Messages, *, last: int, chat: bool) -> list[int]:
    """Returns the tokens between two turns of the policy.

    Args:
      observation: text or chat messages. In a conversation, text is a user's turn.
      last: last token of the policy's turn. If it is the one that ends a turn in the chat template,
        it is not repeated.
      chat: whether the prompt was a conversation.

    Raises:
      ValueError: the template cannot show the messages, or shows a conversation otherwise when it
        goes on; or there are messages and the prompt was text.
    """
    tokenizer = self._tokenizer
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
    calls = any(message["role"] == "tool" for message in messages)
    for content in TURNS:
      before, end = self._beginning(content, calls)
      after = tokenizer.render([USER, _turn(content, calls), *messages], add_generation_prompt=True)
      if after.startswith(before):
        ids = tokenizer.encode_plain(end + after[len(before) :])
        return ids[1:] if end and ids[:1] == [last] else ids
    raise ValueError(
      f"the chat template of {tokenizer.name} shows earlier turns otherwise once a conversation "
      "goes on: it cannot be used for episodes"
    )

  def _beginning(self, content: str, calls: bool) -> tuple[str, str]:
    """Returns a conversation up to the end of the policy's turn, and the token that ends the turn.

    A template without such a token ends a turn in its own way, and everything after the content
    belongs to the observation: the second text is empty.
    """
    if (content, calls) not in self._beginnings:
      text = self._tokenizer.render([USER, _turn(content, calls)], add_generation_prompt=False)
      length = text.rfind(content[-1]) + 1
      start, mark = max(((text.rfind(m), m) for m in self._tokenizer.end_marks()), default=(-1, ""))
      ends = start >= length
      self._beginnings[content, calls] = (
        (text[: start + len(mark)], mark) if ends else (text[:length], "")
      )
    return self._beginnings[content, calls]


def _turn(content: str, calls: bool) -> dict[str, Any]:
  turn = {"role": "assistant", "content": content}
  return turn | {"tool_calls": [CALL]} if calls else turn


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
