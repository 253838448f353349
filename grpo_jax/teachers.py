"""Opens the models that a policy learns from, and checks that they read its tokens as it does."""

import dataclasses
from collections.abc import Sequence

from grpo_jax.models.io.weights import Weights
from grpo_jax.models.load import open_weights
from grpo_jax.tokens import AnyTokenizer, fit_to_model, load_tokenizer

# Pieces of text that tokenizers with the same vocabulary may cut differently.
PROBES = (
  "Natalia sold 48/2 = 24 clips in May, and 1234567.89 in all.",
  "def f(x):\n\treturn  x  # caf\u00e9, \u4f60\u597d, \U0001f600\r\n\n\n",
  "  leading and trailing spaces  ",
)


@dataclasses.dataclass(frozen=True)
class TeacherWeights:
  """A teacher whose tensors were checked but not read.

  Attributes:
    source: its name in the config.
    weights: its shape and its files.
  """

  source: str
  weights: Weights


def open_teacher(
  source: str,
  tokenizer: AnyTokenizer,
  vocab_size: int,
  context: int,
  texts: Sequence[str] = (),
  *,
  seed: int = 0,
) -> TeacherWeights:
  """Opens a teacher.

  Args:
    source: as in `models.load_model`.
    tokenizer: of the policy.
    vocab_size: number of ids that the policy can write.
    context: tokens of the longest prompt with its completion.
    texts: prompts that both tokenizers must encode alike.
    seed: of the parameters of a random model.

  Raises:
    ValueError, FileNotFoundError: there is no such model, it is no language model, it has another
      tokenizer than the policy, fewer ids or too short a context.
  """
  weights = open_weights(source, seed=seed)
  config, name = weights.config, f"teacher.source {source!r}"
  if config.labels:
    raise ValueError(f"{name} is a classification model, which has no probabilities of tokens")
  if config.context < context:
    raise ValueError(
      f"{name} has a context of {config.context} tokens, and prompts with completions have up to "
      f"{context}: lower rollout.completion_length or rollout.prompt_length"
    )
  other = fit_to_model(load_tokenizer(source), config.vocab_size)
  if difference := tokenizer_difference(tokenizer, other, [*PROBES, *texts]):
    raise ValueError(
      f"{name} has another tokenizer than the policy: {difference}. A teacher scores the tokens "
      "that the policy wrote, so both need the same ids; take a model of the policy's family"
    )
  if config.vocab_size < vocab_size:
    raise ValueError(
      f"{name} has {config.vocab_size} ids and the policy {vocab_size}: it gives no probability to "
      "the others. A teacher needs at least the ids of the policy"
    )
  return TeacherWeights(source, weights)


def tokenizer_difference(own: AnyTokenizer, other: AnyTokenizer, texts: Sequence[str]) -> str:
  """Returns how another tokenizer differs from one's own, as a phrase; "" if it does not.

  The other one may have further tokens. What begins and ends a text is not compared: a base model
  and a model for chats differ in it.

  Example:
    >>> from grpo_jax.tokens import ByteTokenizer
    >>> tokenizer_difference(ByteTokenizer(), ByteTokenizer(), ["a"])
    ''
  """
  ids = own.vocabulary()
  names = {i: token for token, i in other.vocabulary().items()}
  for token, i in sorted(ids.items(), key=lambda item: item[1]):
    if names.get(i) != token:
      there = f"{names[i]!r} there" if i in names else "not there"
      return f"token {i} is {token!r} here and {there}"
  for text in texts:
    here, there = own.encode_plain(text), other.encode_plain(text)
    if here != there:
      return f"{text[:60]!r} is encoded as {here[:12]} here and as {there[:12]} there"
  return ""
