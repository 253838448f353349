"""Converts between text and token ids: tokenizers, chat templates, padded prompts, completions.

`load_tokenizer` takes the same sources as `models.load_model`. Arrays are numpy. Nothing here uses
a device or imports flax.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Int32, Integer

from grpo_jax import extras
from grpo_jax.environments.templates import ChatTemplate, TemplateError
from grpo_jax.errors import first_line
from grpo_jax.models.io.gguf import open_gguf
from grpo_jax.models.io.gguf_tokenizer import read_gguf_tokenizer
from grpo_jax.models.io.json_files import read_json
from grpo_jax.models.io.sources import Source, resolve

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

Messages: TypeAlias = list[dict[str, Any]]
# Variables of a chat template that are the prompt itself.
CHAT_VARIABLES = frozenset(("messages", "add_generation_prompt", "tools", "documents"))
MAX_IDS = 2**24  # ids of a tokenizer; a larger one is damage


class Tokenizer:
  """Wraps a fast tokenizer of transformers in the interface that training needs.

  Args:
    fast: the tokenizer.
    eos_ids: ids that end a completion.
    name: appears in messages.
    date: day that the chat template sees, YYYY-MM-DD; None: today.
    arguments: variables of the chat template, such as {"enable_thinking": False}.

  Attributes:
    name: appears in messages.
    vocab_size: number of ids. The vocabulary of the model may be padded beyond it.
    eos_ids: all ids that end a completion; never empty.
    pad_id: pads prompts. Masks never depend on it, so it may be an EOS id.
    bos_id: begins a text, None if the tokenizer has no such id.

  Raises:
    ValueError: there is no EOS id, or one is outside the vocabulary.
  """

  def __init__(
    self,
    fast: PreTrainedTokenizerFast,
    eos_ids: Sequence[int],
    name: str,
    *,
    date: str | None = None,
    arguments: Mapping[str, Any] | None = None,
  ) -> None:
    if not eos_ids:
      raise ValueError(f"{name}: no end-of-text id in the tokenizer or config; set eos_token_id")
    # Ids may have gaps, so their number is not the largest one.
    ids = fast.backend_tokenizer.get_vocab(with_added_tokens=True).values()
    count = max(ids, default=-1) + 1
    if not 0 < count <= MAX_IDS:
      raise ValueError(
        f"{name}: the tokenizer has ids up to {count - 1}, allowed: 0..{MAX_IDS - 1}"
      )
    if bad := [i for i in eos_ids if type(i) is not int or not 0 <= i < count]:
      raise ValueError(
        f"{name}: eos_token_id {bad} must be integers in 0..{count - 1}; it is that of "
        "generation_config.json, else of config.json, and that of the tokenizer"
      )
    self._fast = fast
    self.name = name
    self.vocab_size: int = count
    self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
    self.pad_id: int = self.eos_ids[0] if fast.pad_token_id is None else fast.pad_token_id
    self.bos_id: int | None = fast.bos_token_id
    # Special ids that are not part of a text: they begin, end or pad it.
    self._markers = {*self.eos_ids, self.pad_id, self.bos_id} & set(fast.all_special_ids)
    self._template = _chat_template(fast, name, date, arguments or {})
    self._tools: dict[str, Any] = {}  # variables of the template, from `with_tools`

  def for_model(self, rows: int) -> Tokenizer:
    """Returns this tokenizer for a model that has only the ids below `rows`.

    The model cannot write further ids, and a prompt that holds one is an error (`encode_prompt`).

    Raises:
      ValueError: the model has none of the ids that end a text.
    """
    if self.vocab_size <= rows:
      return self
    eos_ids = tuple(i for i in self.eos_ids if i < rows)
    if not eos_ids:
      raise ValueError(
        f"{self.name}: the ids {list(self.eos_ids)} that end a text are beyond the model, which "
        f"has ids 0..{rows - 1}: it could never write one; set eos_token_id"
      )
    fitted = copy.copy(self)
    fitted.vocab_size, fitted.eos_ids = rows, eos_ids
    fitted.pad_id = self.pad_id if self.pad_id < rows else eos_ids[0]
    return fitted

  @property
  def chat_template(self) -> str:
    """The chat template as text; empty where there is none."""
    template = self._fast.chat_template
    return template if isinstance(template, str) else json.dumps(template) if template else ""

  def vocabulary(self) -> dict[str, int]:
    """Returns the id of each token that the model has."""
    vocabulary = self._fast.backend_tokenizer.get_vocab(with_added_tokens=True)
    return {token: i for token, i in vocabulary.items() if i < self.vocab_size}

  def chat_variables(self) -> frozenset[str]:
    """Returns the names that the chat template reads; ValueError if it has an error."""
    if self._template is None:
      return frozenset()
    try:
      return self._template.variables()
    except TemplateError as error:
      raise ValueError(f"the chat template of {self.name} failed: {error}") from error

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, with a BOS id if and only if the tokenizer itself adds one.

    What a tokenizer adds after every text, such as an EOS id, is left out: a completion follows.
    """
    ids = self._fast.encode(text, verbose=False)
    plain = self.encode_plain(text)
    for start in range(len(ids) - len(plain), -1, -1):
      if ids[start : start + len(plain)] == plain:
        return ids[: start + len(plain)]
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, without what begins, ends or pads a text.

    Other special tokens, such as <think>, are part of the text.
    """
    ids = [i for i in map(int, ids) if i not in self._markers]
    return self._fast.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

  def token(self, i: int) -> str:
    """Returns the token with an id, for messages."""
    return str(self._fast.convert_ids_to_tokens(i))

  def chat(self, messages: Messages, **arguments: Any) -> list[int]:
    """Returns the ids of a conversation, up to and including the start of the assistant's turn.

    Args:
      messages: the conversation.
      arguments: variables of the template, in addition to those of the tokenizer.

    Raises:
      ValueError: as in `render`.
    """
    return self.encode_plain(self.render(messages, add_generation_prompt=True, **arguments))

  def encode_exchange(self, prompt: str | Messages, completion: str | Messages) -> list[int]:
    """Returns the ids of a conversation that ends with `completion`; see `exchange`.

    Without a chat template, a completion that is text continues a prompt that is text.

    Raises:
      ValueError: as in `render`.
    """
    if self._template is None and isinstance(prompt, str) and isinstance(completion, str):
      return self._fast.encode(prompt + completion, verbose=False)
    messages = exchange(prompt, completion)
    return self.encode_plain(self.render(messages, add_generation_prompt=False))

  def encode_plain(self, text: str) -> list[int]:
    """Returns the ids of a piece of text, without what begins or ends a text."""
    return self._fast.encode(text, add_special_tokens=False, verbose=False)

  def render(self, messages: Messages, **variables: Any) -> str:
    """Returns the text of a conversation by the chat template.

    Some templates, such as Gemma 2's, refuse a system turn. Its text then begins the user's turn.

    Args:
      messages: the conversation.
      variables: of the template, `add_generation_prompt` among them.

    Raises:
      ValueError: there is no template, or it failed; the message holds the template's own words.
    """
    if self._template is None:
      raise ValueError(f"{self.name} has no chat template: give the prompt as text, not messages")
    variables = {**self._tools, **variables}
    try:
      return self._template.render(messages=_without_nulls(messages), **variables)
    except TemplateError as error:
      text = self._without_system_turn(messages, variables)
      if text is None:
        raise ValueError(f"the chat template of {self.name} failed: {error}") from error
      warnings.warn(
        f"the chat template of {self.name} refuses a system turn ({error}): its text is put "
        "before that of the user's turn",
        stacklevel=2,
      )
      return text

  def end_marks(self) -> list[str]:
    """Returns the texts of the ids that end a completion, as the chat template writes them."""
    return [self.token(i) for i in self.eos_ids]

  def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> Tokenizer:
    """Returns this tokenizer with JSON schemas of tools in its chat template."""
    shown = copy.copy(self)
    shown._tools = {"tools": [dict(tool) for tool in tools]}
    return shown

  def _without_system_turn(self, messages: Messages, variables: Mapping[str, Any]) -> str | None:
    """Renders messages with the system turn as part of the user's; None where that fails too."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
      return None
    system, user, *others = messages
    user = {**user, "content": f"{system['content']}\n\n{user['content']}"}
    try:
      return self._template.render(messages=_without_nulls([user, *others]), **variables)
    except TemplateError:
      return None

  def save(self, folder: str | Path) -> None:
    """Writes the tokenizer files and the chat template in the format of transformers."""
    self._fast.save_pretrained(str(folder))

  def pieces(self) -> list[bytes]:
    """Returns the bytes that each id adds to the text; b"" for unused ids and those left out."""
    backend = self._fast.backend_tokenizer
    is_byte_level = "ByteLevel" in str(backend.decoder)
    to_bytes = _byte_level_bytes if is_byte_level else _sentence_piece_bytes
    added = backend.get_added_tokens_decoder()
    pieces = [b""] * self.vocab_size
    for token, i in backend.get_vocab(with_added_tokens=True).items():
      if i >= self.vocab_size:
        continue
      if i not in added:
        pieces[i] = to_bytes(token)
      elif i not in self._markers:
        pieces[i] = added[i].content.encode("utf-8")
    return pieces

  def marker_ids(self, strings: Sequence[str]) -> list[int]:
    """Returns the ids of the strings that are a special token which `decode` leaves out.

    Such a token adds no text, so a stop string could not be found in the text.

    Raises:
      ValueError: a string holds such a token beside other text.
    """
    added = self._fast.backend_tokenizer.get_added_tokens_decoder()
    ids = {added[i].content: i for i in self._markers if i in added}
    for string in strings:
      inside = [token for token in ids if token in string and token != string]
      if inside and string not in ids:
        raise ValueError(
          f"the stop string {string!r} holds the special token {inside[0]!r} of {self.name}, which "
          "is no part of a completion's text: give the token alone, and the rest as another string"
        )
    return [ids[string] for string in strings if string in ids]


class ByteTokenizer:
  """Encodes text as its UTF-8 bytes, ids 0..255. Id 256 is end of text and padding.

  It needs no files.

  Example:
    >>> ByteTokenizer().encode("hé")
    [104, 195, 169]
  """

  name = "bytes"
  vocab_size = 257
  eos_ids = (256,)
  pad_id = 256
  bos_id = None
  chat_template = ""

  def encode(self, text: str) -> list[int]:
    """Returns the UTF-8 bytes of `text`."""
    return list(text.encode("utf-8"))

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`; invalid UTF-8 becomes U+FFFD."""
    return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

  def token(self, i: int) -> str:
    """Returns the token with an id, for messages."""
    return f"<0x{i:02X}>" if i < 256 else "<|endoftext|>"

  def vocabulary(self) -> dict[str, int]:
    """Returns the id of each token, as `save` names them."""
    return {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<|endoftext|>": self.pad_id}

  def chat_variables(self) -> frozenset[str]:
    """Returns no names: there is no template."""
    return frozenset()

  encode_plain = encode

  def chat(self, messages: Messages) -> list[int]:
    """Returns the ids of a line `role: content` per message, followed by `assistant: `."""
    return self.encode(self.render(messages, add_generation_prompt=True))

  def render(self, messages: Messages, add_generation_prompt: bool, **variables: Any) -> str:
    """Returns a line `role: content` per message, and `assistant: ` if the next turn follows."""
    lines = [f"{message['role']}: {message['content']}\n" for message in messages]
    return "".join(lines) + ("assistant: " if add_generation_prompt else "")

  def encode_exchange(self, prompt: str | Messages, completion: str | Messages) -> list[int]:
    """Returns the ids of a conversation that ends with `completion`; see `exchange`."""
    return self.encode(self.render(exchange(prompt, completion), add_generation_prompt=False))

  def end_marks(self) -> list[str]:
    """Returns no texts: the id that ends a completion has none."""
    return []

  def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> ByteTokenizer:
    """Returns itself: it cannot show tools."""
    return self

  def save(self, folder: str | Path) -> None:
    """Writes a tokenizer with the same ids and chat template in the format of transformers."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    *pieces, end = self.vocabulary()
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([end])
    _fast_tokenizer_class()(
      tokenizer_object=backend,
      eos_token=end,
      pad_token=end,
      chat_template=_BYTES_TEMPLATE,
      clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))

  def marker_ids(self, strings: Sequence[str]) -> list[int]:
    """Returns an empty list: the special id has no text."""
    return []

  def pieces(self) -> list[bytes]:
    """Returns the bytes that each id adds to the text."""
    return [bytes([i]) for i in range(256)] + [b""]


AnyTokenizer: TypeAlias = Tokenizer | ByteTokenizer


def exchange(prompt: str | Messages, completion: str | Messages) -> Messages:
  """Returns a conversation: a text prompt is the user's turn, a text completion the assistant's.

  Example:
    >>> exchange("1 + 1", "2")
    [{'role': 'user', 'content': '1 + 1'}, {'role': 'assistant', 'content': '2'}]
  """

  def turns(text: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": text}] if isinstance(text, str) else text

  return [*turns(prompt, "user"), *turns(completion, "assistant")]


def fit_to_model(tokenizer: AnyTokenizer, rows: int) -> AnyTokenizer:
  """Returns a tokenizer for a model with the ids below `rows`; see `Tokenizer.for_model`."""
  return tokenizer.for_model(rows) if isinstance(tokenizer, Tokenizer) else tokenizer


def _chat_template(
  fast: PreTrainedTokenizerFast, name: str, date: str | None, arguments: Mapping[str, Any]
) -> ChatTemplate | None:
  """Returns the chat template of a tokenizer, None where there is none."""
  source = fast.chat_template
  if source is None:
    return None
  if isinstance(source, dict):
    source = source.get("default")
  if not isinstance(source, str):
    raise ValueError(
      f"{name}: the chat template must be text, or several of which one is named 'default', got "
      f"{_abridged(repr(fast.chat_template), 80)}"
    )
  # What transformers hands to a template.
  special = {key: _as_text(value) for key, value in fast.special_tokens_map.items()}
  names = {"tools": None, "documents": None, **special, **arguments}
  return ChatTemplate(source, date or datetime.date.today().isoformat(), names)


def _as_text(token: Any) -> Any:
  return [str(part) for part in token] if isinstance(token, list | tuple) else str(token)


def _without_nulls(messages: Messages) -> Messages:
  """Returns messages without the fields that are null: templates test whether a field is there."""
  return [{k: v for k, v in message.items() if v is not None} for message in messages]


_BYTES_TEMPLATE = (
  "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


# --- bytes of tokens ------------------------------------------------------------------------------


def _byte_level_alphabet() -> dict[str, int]:
  """Returns the byte that each character of a byte-level vocabulary stands for, as in GPT-2.

  Printable Latin-1 characters stand for their own byte. The other bytes, in order, are represented
  by the characters from U+0100 on.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
  return b"".join(
    bytes([_ALPHABET[character]]) if character in _ALPHABET else character.encode("utf-8")
    for character in token
  )


def _sentence_piece_bytes(token: str) -> bytes:
  """Returns the bytes of a SentencePiece token: `<0x0A>` is one byte, `▁` a space."""
  if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
    return bytes([int(token[3:5], 16)])
  return token.replace("▁", " ").encode("utf-8")


# --- prompts and completions ----------------------------------------------------------------------


def encode_prompt(tokenizer: AnyTokenizer, prompt: str | Messages) -> list[int]:
  """Returns the ids of one prompt, text or chat messages.

  Raises:
    ValueError: it has no tokens, cannot be encoded, or holds an id that the model does not have.

  Example:
    >>> encode_prompt(ByteTokenizer(), "hi")
    [104, 105]
  """
  try:
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt)
  except Exception as error:  # the tokenizers library raises bare Exception
    reason = str(error)
    if not isinstance(error, ValueError):
      reason = f"the tokenizer of {tokenizer.name} failed: {first_line(error)}"
    raise ValueError(f"{reason}. The prompt is {_abridged(repr(prompt))}") from error
  if not ids:
    raise ValueError(f"the prompt {prompt!r} has no tokens (the tokenizer is {tokenizer.name})")
  if problem := beyond_model(tokenizer, ids):
    raise ValueError(f"{problem}; take it out of the prompt {_abridged(repr(prompt))}")
  return ids


def beyond_model(tokenizer: AnyTokenizer, ids: Sequence[int]) -> str:
  """Returns a phrase about an id that the model of a tokenizer lacks; "" if it has them all.

  Example:
    >>> beyond_model(ByteTokenizer(), [104, 256])
    ''
  """
  largest = max(ids, default=-1)
  if largest < tokenizer.vocab_size:
    return ""
  return (
    f"{tokenizer.name}: the token {tokenizer.token(largest)!r} has id {largest}, and the model has "
    f"only ids 0..{tokenizer.vocab_size - 1}"
  )


def encode_prompts(
  tokenizer: AnyTokenizer,
  prompts: Sequence[str | Messages],
  max_length: int,
  overlong: Literal["error", "drop"] = "error",
) -> tuple[Int32[np.ndarray, "P N"], Bool[np.ndarray, "P N"], list[int]]:
  """Returns prompts as one array, left-padded to `max_length` tokens.

  Prompts are never truncated.

  Args:
    tokenizer: encodes the prompts.
    prompts: texts, or lists of chat messages.
    max_length: width N of the array in tokens.
    overlong: what to do with prompts of more than `max_length` tokens: "error" raises; "drop" omits
      them, and a warning gives their number.

  Returns:
    (tokens, mask, indices): the mask is true for prompt tokens and false for padding; the indices
    are those of the encoded prompts.

  Raises:
    ValueError: a prompt has no tokens or, with "error", too many of them; or none is left.

  Example:
    >>> tokens, mask, indices = encode_prompts(ByteTokenizer(), ["ab", "c"], max_length=3)
    >>> tokens.tolist(), mask.sum(1).tolist(), indices
    ([[256, 97, 98], [256, 256, 99]], [2, 1], [0, 1])
  """
  if overlong not in ("error", "drop"):
    raise ValueError(f"overlong is {overlong!r}, allowed: 'error', 'drop'")
  if max_length < 1:
    raise ValueError(f"max_length is {max_length}, must be at least 1 token")
  encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
  indices = [i for i, ids in enumerate(encoded) if len(ids) <= max_length]
  if len(indices) < len(encoded):
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    problem = (
      f"{len(encoded) - len(indices)} of {len(encoded)} prompts exceed the budget of {max_length} "
      f"tokens; the longest has {len(encoded[longest])}: {_abridged(repr(prompts[longest]))}"
    )
    if overlong == "error" or not indices:
      raise ValueError(f"{problem}. Raise the prompt budget, or shorten or drop such prompts")
    warnings.warn(f"dropped: {problem}", stacklevel=2)

  tokens = np.full((len(indices), max_length), tokenizer.pad_id, np.int32)
  mask = np.zeros((len(indices), max_length), bool)
  for row, i in enumerate(indices):
    start = max_length - len(encoded[i])
    tokens[row, start:] = encoded[i]
    mask[row, start:] = True
  return tokens, mask, indices


def decode_completions(
  tokenizer: AnyTokenizer,
  tokens: Integer[np.ndarray, "P G T"],
  mask: Bool[np.ndarray, "P G T"],
  *,
  stop: Sequence[str] = (),
  stop_ids: Sequence[int] = (),
) -> list[list[str]]:
  """Returns the text of each completion: its unmasked tokens without EOS and special tokens.

  Args:
    tokenizer: decodes the completions.
    tokens: ids, [P, G, T].
    mask: true for the tokens of the completion, [P, G, T].
    stop: strings that end the text. They are not part of it.
    stop_ids: ids that ended the generation. They are not part of the text.

  Raises:
    ValueError: the shapes are wrong.

  Example:
    >>> tokens = np.array([[[104, 105, 10], [104, 256, 0]]])
    >>> mask = np.array([[[True, True, True], [True, True, False]]])
    >>> decode_completions(ByteTokenizer(), tokens, mask, stop=["\\n"])
    [['hi', 'h']]
  """
  if tokens.shape != mask.shape or tokens.ndim != 3:
    raise ValueError(f"tokens {tokens.shape} and mask {mask.shape} must both be [P, G, T]")
  ends = {*tokenizer.eos_ids, *stop_ids}

  def to_text(row: np.ndarray, row_mask: np.ndarray) -> str:
    text = tokenizer.decode([i for i in row[row_mask].tolist() if i not in ends])
    for string in stop:
      text = text.split(string, 1)[0]
    return text

  return [
    [to_text(row, row_mask) for row, row_mask in zip(*group, strict=True)]
    for group in zip(tokens, mask, strict=True)
  ]


def _abridged(text: str, limit: int = 600) -> str:
  half = limit // 2
  return text if len(text) <= limit else f"{text[:half]} [...] {text[-half:]}"


# --- loading --------------------------------------------------------------------------------------


def load_tokenizer(
  source: str, *, date: str | None = None, arguments: Mapping[str, Any] | None = None
) -> AnyTokenizer:
  """Loads the tokenizer of a model.

  Args:
    source: as in `models.load_model`: a folder, a .gguf file, 'package:NAME', 'random:NAME' or a
      hub id. A random model has the tokenizer beside its config.json, or one of bytes.
    date: day that the chat template sees, YYYY-MM-DD; None: the day of this call.
    arguments: variables of the chat template, such as {"enable_thinking": False}.

  Raises:
    ValueError: the tokenizer is damaged or not supported.
    FileNotFoundError: there is no such model, or it has no fast tokenizer file.

  Example:
    >>> load_tokenizer("random:tiny").decode([104, 105])
    'hi'
  """
  resolved = resolve(source)
  if resolved.kind == "random":
    folder = Path(resolved.location).parent
    if not (folder / "tokenizer.json").is_file():
      return ByteTokenizer()
    resolved = Source("folder", str(folder))
  load = _load_gguf if resolved.kind == "gguf" else _load_folder
  fast, eos_ids = load(Path(resolved.location))
  return Tokenizer(fast, eos_ids, resolved.location, date=date, arguments=arguments)


def _load_gguf(path: Path) -> tuple[PreTrainedTokenizerFast, list[int]]:
  stored = read_gguf_tokenizer(open_gguf(path))
  fast = _fast_tokenizer_class()(
    tokenizer_object=stored.backend,
    chat_template=stored.chat_template,
    clean_up_tokenization_spaces=False,
    **stored.special_tokens,
  )
  return fast, stored.eos_ids


def _load_folder(folder: Path) -> tuple[PreTrainedTokenizerFast, list[int]]:
  """Reads tokenizer.json as it is.

  AutoTokenizer is not used: for some class names in tokenizer_config.json, such as GPT2Tokenizer,
  it replaces the pre-tokenizer and loses the rule that splits off each digit.
  """
  if not (folder / "tokenizer.json").is_file():
    raise FileNotFoundError(f"no tokenizer.json in {folder}: a fast tokenizer file is needed")
  try:
    fast = _fast_tokenizer_class().from_pretrained(str(folder), local_files_only=True)
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # the tokenizers library raises bare Exception, and panics
    raise ValueError(
      f"{folder / 'tokenizer.json'}, or a file beside it: the tokenizer cannot be read: "
      f"{first_line(error)}"
    ) from error
  # If both files have the field, generation_config.json is the corrected one.
  eos: int | list[int] | None = None
  for name in ("generation_config.json", "config.json"):
    if eos is None and (folder / name).is_file():
      eos = read_json(folder / name).get("eos_token_id")
  ids = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
  if fast.eos_token_id is not None:
    ids.append(fast.eos_token_id)
  return fast, ids


def _fast_tokenizer_class() -> type[PreTrainedTokenizerFast]:
  with extras.quiet_transformers():
    from transformers import PreTrainedTokenizerFast
  return PreTrainedTokenizerFast
