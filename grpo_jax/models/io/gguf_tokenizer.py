"""Converts the tokenizer in the metadata of a GGUF file to one of the tokenizers library."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from grpo_jax.errors import first_line
from grpo_jax.models.io.gguf import Gguf

if TYPE_CHECKING:
  from tokenizers import Tokenizer
  from tokenizers.pre_tokenizers import PreTokenizer

# How text is split before merges: the expression of Llama 3's and Qwen2's tokenizer.json, with a
# quantifier for the digits of a number.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> quantifier in `_SPLIT`. None: GPT-2's expression, which ByteLevel contains
# (SmolLM splits off each digit before).
_PRE_TOKENIZERS = {"smollm": None, "gpt-2": None, "llama-bpe": "1,3", "qwen2": "1"}
# Token types of GGUF. Unknown and control tokens are special tokens; users add whole words.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


class GgufTokenizer(NamedTuple):
  """Holds the tokenizer of a GGUF file.

  Attributes:
    backend: the tokenizer, with its special tokens.
    special_tokens: special tokens under the names of transformers, such as "eos_token".
    chat_template: the chat template, None if the file has none.
    eos_ids: ids that end a completion.
  """

  backend: Tokenizer
  special_tokens: dict[str, str]
  chat_template: str | None
  eos_ids: list[int]


def read_gguf_tokenizer(file: Gguf) -> GgufTokenizer:
  """Reads a byte-level BPE tokenizer from the metadata of a GGUF file.

  Raises:
    ValueError: the tokenizer is of another kind, or the metadata lacks a field or is damaged.
  """
  kind, pre = file.need("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
  if kind != "gpt2" or not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
    raise ValueError(
      f"{file.path}: the tokenizer is of kind {kind!r} with pre-tokenizer {pre!r}; "
      f"supported: 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}"
    )
  tokens = file.texts("tokenizer.ggml.tokens")
  ids = _special_ids(file, len(tokens))
  try:
    backend = _backend(file, pre, tokens, ids["bos"])
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # the tokenizers library raises bare Exception, and panics
    raise ValueError(
      f"{file.path}: the tokenizer in the metadata cannot be read: {first_line(error)}"
    ) from error
  names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
  special = {f"{short}_token": ids[name] for short, name in names.items()}
  return GgufTokenizer(
    backend=backend,
    special_tokens={name: tokens[i] for name, i in special.items() if i is not None},
    chat_template=file.get("tokenizer.chat_template"),
    # Some files distinguish the end of a turn ("eot") from the end of the text ("eos").
    eos_ids=[ids[name] for name in ("eos", "eot") if ids[name] is not None],
  )


def _special_ids(file: Gguf, count: int) -> dict[str, int | None]:
  """Returns the ids of special tokens; ValueError for one outside 0..count - 1."""
  ids = {}
  for name in ("bos", "eos", "eot", "unknown", "padding"):
    key = f"tokenizer.ggml.{name}_token_id"
    ids[name] = file.get(key)
    if ids[name] is not None and (type(ids[name]) is not int or not 0 <= ids[name] < count):
      raise file.wrong(key, ids[name], f"an id in 0..{count - 1}")
  return ids


def _backend(file: Gguf, pre: str, tokens: list[str], bos: int | None) -> Tokenizer:
  """Returns the tokenizer with its merges and special tokens."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

  merges = [tuple(merge.split(" ", 1)) for merge in file.texts("tokenizer.ggml.merges")]
  vocab = {token: i for i, token in enumerate(tokens)}
  # Llama 3 encodes a piece that is a token as that token, whatever the merges would give.
  backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
  if pre == "qwen2":
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = make_pre_tokenizer(pre)
  backend.decoder = decoders.ByteLevel()
  for token, token_type in zip(tokens, file.need("tokenizer.ggml.token_type"), strict=True):
    if token_type in (_UNKNOWN, _CONTROL):
      backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    elif token_type == _USER_DEFINED:
      backend.add_tokens([AddedToken(token, normalized=False)])

  adds_bos = file.get("tokenizer.ggml.add_bos_token", False)
  if not isinstance(adds_bos, bool):
    raise ValueError(f"tokenizer.ggml.add_bos_token is {adds_bos!r}, not true or false")
  if adds_bos:
    file.need("tokenizer.ggml.bos_token_id")
    backend.post_processor = processors.TemplateProcessing(
      single=f"{tokens[bos]} $0", special_tokens=[(tokens[bos], bos)]
    )
  return backend


def make_pre_tokenizer(name: str) -> PreTokenizer:
  """Returns the pre-tokenizer called `name` in GGUF metadata.

  Example:
    >>> [text for text, _ in make_pre_tokenizer("qwen2").pre_tokenize_str("a 12")]
    ['a', 'Ġ', '1', '2']
  """
  from tokenizers import Regex, pre_tokenizers

  digits = _PRE_TOKENIZERS[name]
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits is None)
  if name == "gpt-2":
    return byte_level
  if digits is None:
    split = pre_tokenizers.Digits(individual_digits=True)
  else:
    split = pre_tokenizers.Split(Regex(_SPLIT % digits), behavior="isolated")
  return pre_tokenizers.Sequence([split, byte_level])
