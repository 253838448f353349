"""Text to ids and back: tokenizers, chat templates, padded prompts, decoded completions.

`load_tokenizer` takes the same sources as `models.checkpoints.load`. Nothing here knows a device:
arrays are numpy.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32, Integer

from grpo_jax.errors import first_line
from grpo_jax.models.io.gguf import Gguf, open_gguf
from grpo_jax.models.io.json_files import read_json
from grpo_jax.models.io.sources import resolve

Messages = list[dict[str, str]]


class Tokenizer:
  """A `transformers` fast tokenizer with what training needs and no more.

  Attributes:
    vocab_size: number of ids; the model's vocabulary may be padded beyond it.
    eos_ids: every id that ends a completion, never empty.
    pad_id: fills prompts; masks never depend on it, so it may be an EOS id.
    bos_id: begins a text, where the tokenizer has such an id.
  """

  def __init__(self, fast: Any, eos_ids: Sequence[int], name: str):
    if not eos_ids:
      raise ValueError(f"{name}: no end-of-text id in the tokenizer or config; set eos_token_id")
    if bad := [i for i in eos_ids if not isinstance(i, int) or not 0 <= i < len(fast)]:
      raise ValueError(f"{name}: eos_token_id {bad} must be integers in 0..{len(fast) - 1}")
    self._fast = fast
    self.name = name
    self.vocab_size: int = len(fast)
    self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
    self.pad_id: int = self.eos_ids[0] if fast.pad_token_id is None else fast.pad_token_id
    self.bos_id: int | None = fast.bos_token_id

  @property
  def chat_template(self) -> str:
    """The chat template as text; empty where there is none."""
    template = self._fast.chat_template
    return template if isinstance(template, str) else json.dumps(template) if template else ""

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, with a beginning-of-text id exactly if the tokenizer's own rule adds one."""
    return self._fast.encode(text, verbose=False)

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`, special tokens left out."""
    ids = [int(i) for i in ids]
    return self._fast.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

  def chat(self, messages: Messages) -> list[int]:
    """Ids of a conversation under the chat template, ready for the assistant's next turn."""
    return self._templated(messages, add_generation_prompt=True)

  def answered(self, prompt: str | Messages, completion: str) -> list[int]:
    """Ids of a conversation that ends with `completion` as the assistant's turn.

    A text prompt is the user's turn; without a chat template, the completion continues the text.
    """
    if isinstance(prompt, str):
      if self._fast.chat_template is None:
        return self.encode(prompt + completion)
      prompt = [{"role": "user", "content": prompt}]
    return self._templated([*prompt, {"role": "assistant", "content": completion}])

  def _templated(self, messages: Messages, **options: Any) -> list[int]:
    if self._fast.chat_template is None:
      raise ValueError(f"{self.name} has no chat template: give the prompt as text, not messages")
    return self._fast.apply_chat_template(messages, return_dict=False, **options)

  def save(self, folder: str | Path) -> None:
    """Writes tokenizer files and chat template as transformers reads them."""
    self._fast.save_pretrained(str(folder))

  def pieces(self) -> list[bytes]:
    """The bytes that each id adds to the text: none for special tokens and unused ids."""
    backend = self._fast.backend_tokenizer
    to_bytes = _byte_level if "ByteLevel" in str(backend.decoder) else _sentence_piece
    added = backend.get_added_tokens_decoder()
    found = [b""] * self.vocab_size
    for token, i in backend.get_vocab(with_added_tokens=True).items():
      if i not in added:
        found[i] = to_bytes(token)
      elif not added[i].special:
        found[i] = added[i].content.encode("utf-8")
    return found


class ByteTokenizer:
  """UTF-8 bytes as ids 0..255, and 256 for end of text and padding; needs no files.

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
    return list(text.encode("utf-8"))

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

  def chat(self, messages: Messages) -> list[int]:
    """One line `role: content` per message, then `assistant: `."""
    lines = [f"{message['role']}: {message['content']}\n" for message in messages]
    return self.encode("".join(lines) + "assistant: ")

  def save(self, folder: str | Path) -> None:
    """Writes the same ids and the same chat as a tokenizer of transformers."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    end = "<|endoftext|>"
    backend.add_special_tokens([end])
    _fast_class()(
      tokenizer_object=backend,
      eos_token=end,
      pad_token=end,
      chat_template=_BYTES_TEMPLATE,
      clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))

  def pieces(self) -> list[bytes]:
    """The bytes that each id adds to the text."""
    return [bytes([i]) for i in range(256)] + [b""]


AnyTokenizer = Tokenizer | ByteTokenizer
_BYTES_TEMPLATE = (
  "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def _byte_level_alphabet() -> dict[str, int]:
  """The character that stands for each byte in a byte-level vocabulary (GPT-2's convention).

  Bytes that print as a character of Latin-1 are that character; the others, in order, are those
  from U+0100 on.
  """
  printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printed]
  return {chr(b): b for b in printed} | {chr(0x100 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
  return b"".join(
    bytes([_ALPHABET[character]]) if character in _ALPHABET else character.encode("utf-8")
    for character in token
  )


def _sentence_piece(token: str) -> bytes:
  """`<0x0A>` is a byte, `▁` a space, everything else itself."""
  if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
    return bytes([int(token[3:5], 16)])
  return token.replace("▁", " ").encode("utf-8")


# --- prompts and completions ----------------------------------------------------------------------


def encode_prompt(tokenizer: AnyTokenizer, prompt: str | Messages) -> list[int]:
  """Ids of one prompt, text or chat messages; ValueError if it has none."""
  ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt)
  if not ids:
    raise ValueError(f"the prompt {prompt!r} has no tokens")
  return ids


def encode_prompts(
  tokenizer: AnyTokenizer,
  prompts: Sequence[str | Messages],
  max_length: int,
  overlong: Literal["error", "drop"] = "error",
) -> tuple[Int32[np.ndarray, "P N"], Bool[np.ndarray, "P N"], list[int]]:
  """Prompts as one left-padded array of width N = `max_length` tokens.

  Args:
    prompts: texts, or lists of chat messages.
    overlong: what a prompt of more than `max_length` tokens is. "error", or "drop": it is left out
      and a warning counts how many were. No prompt is ever cut.

  Returns:
    tokens, mask (True on the prompt, False on padding) and the indices of the prompts kept.

  >>> tokens, mask, kept = encode_prompts(ByteTokenizer(), ["ab", "c"], max_length=3)
  >>> tokens.tolist(), mask.sum(1).tolist(), kept
  ([[256, 97, 98], [256, 256, 99]], [2, 1], [0, 1])
  """
  if overlong not in ("error", "drop"):
    raise ValueError(f"overlong is {overlong!r}, allowed: 'error', 'drop'")
  if max_length < 1:
    raise ValueError(f"max_length is {max_length}, must be at least 1 token")
  encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
  kept = [i for i, ids in enumerate(encoded) if len(ids) <= max_length]
  if len(kept) < len(encoded):
    worst = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    what = (
      f"{len(encoded) - len(kept)} of {len(encoded)} prompts exceed the budget of {max_length} "
      f"tokens; the longest has {len(encoded[worst])}: {_shortened(repr(prompts[worst]))}"
    )
    if overlong == "error" or not kept:
      raise ValueError(f"{what}. Raise the prompt budget, or shorten or drop such prompts")
    warnings.warn(f"dropped: {what}", stacklevel=2)

  tokens = np.full((len(kept), max_length), tokenizer.pad_id, np.int32)
  mask = np.zeros((len(kept), max_length), bool)
  for row, i in enumerate(kept):
    start = max_length - len(encoded[i])
    tokens[row, start:] = encoded[i]
    mask[row, start:] = True
  return tokens, mask, kept


def decode_completions(
  tokenizer: AnyTokenizer,
  tokens: Integer[np.ndarray, "P G T"],
  mask: Bool[np.ndarray, "P G T"],
  *,
  stop: Sequence[str] = (),
  stop_ids: Sequence[int] = (),
) -> list[list[str]]:
  """Text of each completion: its unmasked tokens without end and special tokens, up to the first
  of the `stop` strings (left out, as are the `stop_ids`)."""
  if tokens.shape != mask.shape or tokens.ndim != 3:
    raise ValueError(f"tokens {tokens.shape} and mask {mask.shape} must both be [P, G, T]")
  ends = {*tokenizer.eos_ids, *stop_ids}

  def text_of(row: np.ndarray, keep: np.ndarray) -> str:
    text = tokenizer.decode([i for i in row[keep].tolist() if i not in ends])
    for string in stop:
      text = text.split(string, 1)[0]
    return text

  return [
    [text_of(row, keep) for row, keep in zip(*group, strict=True)]
    for group in zip(tokens, mask, strict=True)
  ]


def _shortened(text: str, limit: int = 600) -> str:
  half = limit // 2
  return text if len(text) <= limit else f"{text[:half]} [...] {text[-half:]}"


# --- loading --------------------------------------------------------------------------------------


def load_tokenizer(source: str) -> AnyTokenizer:
  """The tokenizer of the model that `source` names (see `models.checkpoints.resolve`)."""
  found = resolve(source)
  if found.kind == "random":
    return ByteTokenizer()
  if found.kind == "gguf":
    return _from_gguf(open_gguf(Path(found.location)))
  return _from_folder(Path(found.location))


def _fast_class() -> Any:
  # transformers says on import that PyTorch is missing; for tokenizers it is not needed.
  quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
  before = os.environ.get(quiet)
  os.environ[quiet] = "1"
  try:
    from transformers import PreTrainedTokenizerFast
  finally:
    if before is None:
      del os.environ[quiet]
    else:
      os.environ[quiet] = before
  return PreTrainedTokenizerFast


def _from_folder(folder: Path) -> Tokenizer:
  """Reads tokenizer.json as it stands.

  Not through AutoTokenizer: for some class names in tokenizer_config.json (GPT2Tokenizer is one) it
  rebuilds the pre-tokenizer, and the rule that digits stand alone is lost.
  """
  if not (folder / "tokenizer.json").is_file():
    raise FileNotFoundError(f"no tokenizer.json in {folder}: a fast tokenizer file is needed")
  try:
    fast = _fast_class().from_pretrained(str(folder), local_files_only=True)
  except Exception as error:  # the tokenizers library raises bare Exception
    raise ValueError(f"{folder}: the tokenizer cannot be read: {first_line(error)}") from error
  # generation_config.json, where there is one, is the corrected copy of config.json.
  eos: Any = None
  for name in ("generation_config.json", "config.json"):
    if eos is None and (folder / name).is_file():
      eos = read_json(folder / name).get("eos_token_id")
  ids = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
  if fast.eos_token_id is not None:
    ids.append(fast.eos_token_id)
  return Tokenizer(fast, ids, str(folder))


# How text is cut before merges: the expression that Llama 3 and Qwen2 state in tokenizer.json, with
# the digits of a number in pieces of up to three, or each alone.
_CUT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how many digits make a piece in `_CUT`; None: the expression of GPT-2, which
# ByteLevel has built in (in SmolLM's, each digit is cut off before).
_PRE_TOKENIZERS = {"smollm": None, "gpt-2": None, "llama-bpe": "1,3", "qwen2": "1"}


def _pre_tokenizer(name: str) -> Any:
  from tokenizers import Regex, pre_tokenizers

  digits = _PRE_TOKENIZERS[name]
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits is None)
  if name == "gpt-2":
    return byte_level
  if digits is None:
    cut = pre_tokenizers.Digits(individual_digits=True)
  else:
    cut = pre_tokenizers.Split(Regex(_CUT % digits), behavior="isolated")
  return pre_tokenizers.Sequence([cut, byte_level])


def _from_gguf(file: Gguf) -> Tokenizer:
  """A byte-level BPE from the metadata of a GGUF file."""
  from tokenizers import AddedToken, decoders, models, normalizers, processors
  from tokenizers import Tokenizer as Backend

  kind, pre = file.need("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
  if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
    raise ValueError(
      f"{file.path}: the tokenizer is of kind {kind!r} with pre-tokenizer {pre!r}; "
      f"known: 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}"
    )
  tokens = file.need("tokenizer.ggml.tokens")
  merges = [tuple(merge.split(" ", 1)) for merge in file.need("tokenizer.ggml.merges")]
  vocab = {token: i for i, token in enumerate(tokens)}
  # Llama 3 takes a piece that is a token as that token, whatever the merges would make of it.
  backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
  if pre == "qwen2":
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = _pre_tokenizer(pre)
  backend.decoder = decoders.ByteLevel()
  # Token types of GGUF: 2 unknown, 3 control (both special), 4 added by users as whole words.
  for token, token_type in zip(tokens, file.need("tokenizer.ggml.token_type"), strict=True):
    if token_type in (2, 3):
      backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    elif token_type == 4:
      backend.add_tokens([AddedToken(token, normalized=False)])

  def special(name: str) -> str | None:
    token_id = file.get(f"tokenizer.ggml.{name}_token_id")
    return None if token_id is None else tokens[token_id]

  if file.get("tokenizer.ggml.add_bos_token", False):
    bos = file.need("tokenizer.ggml.bos_token_id")
    backend.post_processor = processors.TemplateProcessing(
      single=f"{tokens[bos]} $0", special_tokens=[(tokens[bos], bos)]
    )
  named = {
    f"{short}_token": special(name)
    for short, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
  }
  fast = _fast_class()(
    tokenizer_object=backend,
    chat_template=file.get("tokenizer.chat_template"),
    clean_up_tokenization_spaces=False,
    **{name: token for name, token in named.items() if token is not None},
  )
  # Some files name the end of a turn apart from the end of the text.
  ends = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
  return Tokenizer(fast, [i for i in ends if i is not None], str(file.path))
