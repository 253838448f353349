"""Tests encoding and decoding with tokenizers from folders, from GGUF files, and of bytes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.sampling.stopping import stop_table
from grpo_jax.tokens import (
  ByteTokenizer,
  Tokenizer,
  decode_completions,
  encode_prompts,
  fit_to_model,
  load_tokenizer,
)
from tests.helpers import tiny_gguf
from tests.helpers.model_files import REAL, TIED, UNTIED, needs_real_model

TEXT = "12 + 34 = 46\n\n  naïve 東京 🙂\tI'll go.  "
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """Returns the tokenizer of a small GGUF file."""
  path = tmp_path_factory.mktemp("gguf") / "model.gguf"
  tiny_gguf.write(path)
  return load_tokenizer(str(path))


def byte_ids(text):
  return [3 + byte for byte in text.encode()]  # see tiny_gguf.TOKENS


# --- from a GGUF file -----------------------------------------------------------------------------


def test_eos_and_padding_ids_come_from_the_metadata(tiny):
  assert (tiny.eos_ids, tiny.pad_id, tiny.vocab_size) == ((2,), 2, 264)


def test_decoding_inverts_encoding(tiny):
  assert tiny.decode(tiny.encode(TEXT)) == TEXT


def test_control_tokens_are_single_ids_and_are_not_decoded(tiny):
  ids = tiny.encode("<|im_start|>a<|im_end|><tool>")
  assert ids == [1, *byte_ids("a"), 2, 262]
  assert tiny.decode(ids) == "a<tool>"  # tokens of users are text, control tokens are not


def test_pieces_of_a_sentence_piece_vocabulary():
  """Reads `▁` as a space and falls back to bytes, as Llama 2 and Gemma do."""
  from tokenizers import Tokenizer as Backend
  from tokenizers import decoders, models, normalizers
  from transformers import PreTrainedTokenizerFast

  vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "h": 257, "▁h": 258}
  backend = Backend(models.BPE(vocab, [("▁", "h")], byte_fallback=True, fuse_unk=True))
  backend.normalizer = normalizers.Replace(" ", "▁")
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), [0], "test")
  ids = tokenizer.encode("h hé\n")
  assert ids == [257, 258, 0xC3, 0xA9, 10]
  assert b"".join(tokenizer.pieces()[i] for i in ids) == "h hé\n".encode()


def test_chat_applies_the_template_with_the_generation_prompt(tiny):
  assert tiny.chat(HELLO) == [
    1,
    *byte_ids("system\nBe brief."),
    *(2, *byte_ids("\n"), 1),
    *byte_ids("user\nhi"),
    *(2, *byte_ids("\n"), 1),
    *byte_ids("assistant\n"),
  ]


def test_pieces_are_the_bytes_that_tokens_add(tiny):
  pieces = tiny.pieces()
  assert pieces[3 + 10] == b"\n"
  assert pieces[260:262] == [b"he", b"\n\n"]
  assert pieces[1] == pieces[2] == b""  # control tokens add no text, tokens of users do
  assert pieces[262] == b"<tool>"
  assert b"".join(pieces[i] for i in tiny.encode(TEXT)) == TEXT.encode()


def test_variants_of_the_metadata(tmp_path):
  path = tmp_path / "model.gguf"
  tiny_gguf.write(path, tokenizer__ggml__pre="gpt-2", tokenizer__ggml__add_bos_token=True)
  joined = load_tokenizer(str(path))
  assert joined.encode("12") == [1, 259]  # beginning of text, and digits merge
  assert joined.chat(HELLO)[:2] == [1, byte_ids("s")[0]]  # a template contains its own BOS
  tiny_gguf.write(path, tokenizer__ggml__eot_token_id=0, tokenizer__ggml__padding_token_id=None)
  turn = load_tokenizer(str(path))
  assert (turn.eos_ids, turn.pad_id) == ((2, 0), 2)
  tiny_gguf.write(path, tokenizer__chat_template=None)
  with pytest.raises(ValueError, match=r"model\.gguf has no chat template"):
    load_tokenizer(str(path)).chat(HELLO)


def test_a_tokenizer_without_an_eos_id_is_an_error(tmp_path):
  path = tmp_path / "model.gguf"
  tiny_gguf.write(path, tokenizer__ggml__eos_token_id=None)
  with pytest.raises(ValueError, match=r"model\.gguf: no end-of-text id"):
    load_tokenizer(str(path))


# --- from a folder --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [UNTIED, TIED], ids=lambda path: path.name)
def test_ids_equal_those_stored_with_the_fixture(folder):
  tokenizer = load_tokenizer(str(folder))
  expected = np.load(folder / "expected.npz")
  text = str(expected["text"])
  assert tokenizer.encode(text) == expected["text_ids"].tolist()
  assert tokenizer.decode(tokenizer.encode(text)) == text
  chat = tokenizer.chat([{"role": "user", "content": "12 + 34"}])
  assert chat == expected["chat_ids"].tolist()
  assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size) == ((2,), 2, 128)


def copy_with(tmp_path, file, **changes):
  folder = Path(shutil.copytree(UNTIED, tmp_path / f"model{len(list(tmp_path.iterdir()))}"))
  content = json.loads((folder / file).read_text()) | changes
  (folder / file).write_text(json.dumps(content))
  return folder


def test_digits_are_split_off_whatever_class_the_folder_names(tmp_path):
  # SmolLM2's published folder names this class. The fixture's merges would join "1" and "2".
  folder = copy_with(tmp_path, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
  expected = load_tokenizer(str(UNTIED)).encode("12")
  assert len(expected) == 2
  assert load_tokenizer(str(folder)).encode("12") == expected


def test_all_eos_ids_of_a_folder_are_used(tmp_path):
  folder = copy_with(tmp_path, "generation_config.json", eos_token_id=[0, 2, 5])
  assert load_tokenizer(str(folder)).eos_ids == (0, 2, 5)
  folder = copy_with(tmp_path, "config.json", eos_token_id=7)
  assert load_tokenizer(str(folder)).eos_ids == (2,)  # generation_config.json has priority
  (folder / "generation_config.json").unlink()
  assert load_tokenizer(str(folder)).eos_ids == (7, 2)
  folder = copy_with(tmp_path, "generation_config.json", eos_token_id=128)
  with pytest.raises(ValueError, match=r"eos_token_id \[128\] must be integers in 0\.\.127"):
    load_tokenizer(str(folder))


def test_errors_name_the_damaged_folder(tmp_path):
  folder = copy_with(tmp_path, "tokenizer.json", model={"type": "none"})
  with pytest.raises(ValueError, match="the tokenizer cannot be read") as caught:
    load_tokenizer(str(folder))
  assert str(folder) in str(caught.value)
  (folder / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in"):
    load_tokenizer(str(folder))


def test_transformers_is_imported_lazily_and_silently_and_flax_never():
  program = (
    "import sys, grpo_jax.tokens as t; assert 'transformers' not in sys.modules; "
    f"t.load_tokenizer({str(TIED)!r}); assert 'transformers' in sys.modules; "
    "assert 'flax' not in sys.modules"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- ids beyond the model -------------------------------------------------------------------------


def larger(tmp_path, **tokens):
  """Returns the fixture's tokenizer with an added token, id 128; its model has ids 0..127."""
  tokenizer = load_tokenizer(str(copy_with(tmp_path, "tokenizer_config.json", **tokens)))
  assert tokenizer.vocab_size == 129
  return tokenizer


def test_a_tokenizer_is_cut_to_the_rows_of_its_model(tmp_path):
  tokenizer = larger(tmp_path, pad_token="[PAD]")
  assert tokenizer.pad_id == 128
  fitted = fit_to_model(tokenizer, 128)
  assert (fitted.vocab_size, fitted.pad_id, fitted.eos_ids) == (128, 2, (2,))
  assert len(fitted.pieces()) == 128
  assert fitted.pieces() == tokenizer.pieces()[:128]
  tokens, mask, _ = encode_prompts(fitted, ["1", "23"], 3)
  assert tokens.max() < 128
  assert fitted.encode("23") == tokens[1][mask[1]].tolist()
  assert fit_to_model(tokenizer, 129) is tokenizer


def test_a_prompt_with_an_id_beyond_the_model_is_an_error(tmp_path):
  fitted = fit_to_model(larger(tmp_path, pad_token="[PAD]"), 128)
  assert 128 in fitted.encode("1 [PAD]")
  for prompt in ("1 [PAD] 2", [{"role": "user", "content": "[PAD]"}]):
    with pytest.raises(ValueError, match=r"token '\[PAD\]' has id 128, .* only ids 0\.\.127"):
      encode_prompts(fitted, ["1", prompt], 64)


def test_an_end_of_text_beyond_the_model_is_left_out_or_an_error(tmp_path):
  both = larger(tmp_path, eos_token="<end>")
  assert both.eos_ids == (2, 128)
  assert fit_to_model(both, 128).eos_ids == (2,)
  folder = copy_with(tmp_path, "tokenizer_config.json", eos_token="<end>")
  for name in ("config.json", "generation_config.json"):
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({k: v for k, v in values.items() if "eos" not in k}))
  with pytest.raises(ValueError, match=r"\[128\] that end a text are beyond the model"):
    fit_to_model(load_tokenizer(str(folder)), 128)


@pytest.mark.parametrize("largest", [2**24, pytest.param(2**31, marks=pytest.mark.slow)])
def test_ids_with_gaps_all_have_a_piece(largest):
  from tokenizers import Tokenizer as Backend
  from tokenizers import models
  from transformers import PreTrainedTokenizerFast

  backend = Backend(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
  tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), [0], "gaps")
  assert tokenizer.vocab_size == 10
  assert tokenizer.pieces()[9] == b"b"
  backend = Backend(models.WordLevel({"a": 0, "b": largest}, unk_token="a"))
  with pytest.raises(ValueError, match=f"gaps: the tokenizer has ids up to {largest}"):
    Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), [0], "gaps")


# --- chat templates -------------------------------------------------------------------------------

NO_SYSTEM = (
  "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
  "{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def with_template(tmp_path, source, **options):
  folder = copy_with(tmp_path, "config.json")
  (folder / "chat_template.jinja").write_text(source)
  return load_tokenizer(str(folder), **options)


def test_a_template_that_refuses_a_system_turn_gets_it_in_the_users_turn(tmp_path):
  """Joins the text of both turns by an empty line, as Gemma 3's own template does."""
  tokenizer = with_template(tmp_path, NO_SYSTEM)
  messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12"}]
  with pytest.warns(UserWarning, match=r"refuses a system turn \(System role not supported\)"):
    ids = tokenizer.chat(messages)
  assert ids == tokenizer.encode("[user]Be brief.\n\n12")
  assert messages[1]["content"] == "12"


@pytest.mark.parametrize(
  ("source", "words"),
  [
    (NO_SYSTEM, "System role not supported"),
    ("{{ raise_exception('only pictures') }}", "only pictures"),
    ("{% for m in messages %}", "syntax error in line 1"),
    ("{{ messages[0].contents.strip() }}", "has no attribute 'contents'"),
  ],
)
def test_a_template_that_fails_is_an_error_with_its_words_and_the_prompt(tmp_path, source, words):
  tokenizer = with_template(tmp_path, source)
  prompt = [{"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}]
  with pytest.raises(ValueError, match=words) as caught:
    encode_prompts(tokenizer, [prompt], 64)
  assert f"the chat template of {tokenizer.name} failed" in str(caught.value)
  assert str(prompt) in str(caught.value)


def test_a_template_sees_one_date_and_the_arguments(tmp_path):
  source = "{{ strftime_now('%d%m%y') }}{% if not enable_thinking %}<no>{% endif %}{{ effort }}"
  arguments = {"enable_thinking": True, "effort": "low"}
  tokenizer = with_template(tmp_path, source, date="2024-12-31", arguments=arguments)
  assert tokenizer.decode(tokenizer.chat(HELLO)) == "311224low"
  assert tokenizer.decode(tokenizer.chat(HELLO, enable_thinking=False)) == "311224<no>low"
  assert tokenizer.chat_variables() == {"enable_thinking", "effort"}


def test_a_tokenizer_with_tools_shares_the_process_of_its_template(tmp_path):
  source = "{{ tools[0].name if tools else 'none' }}{{ messages[0].content }}"
  tokenizer = with_template(tmp_path, source)
  shown = tokenizer.with_tools([{"name": "calc"}])
  message = [{"role": "user", "content": "!"}]
  assert (tokenizer.render(message), shown.render(message)) == ("none!", "calc!")
  assert shown._template is tokenizer._template


def test_fields_that_are_null_are_not_in_the_message(tmp_path):
  tokenizer = with_template(tmp_path, "{{ 'x' if messages[0].tool_calls is defined else 'y' }}")
  message = {"role": "user", "content": "", "tool_calls": None}
  assert tokenizer.chat([message]) == tokenizer.encode("y")


# --- bytes ----------------------------------------------------------------------------------------


def test_a_byte_tokenizer_needs_no_files():
  tokenizer = load_tokenizer("random:tiny")
  assert isinstance(tokenizer, ByteTokenizer)
  assert tokenizer.decode([*tokenizer.encode(TEXT), 256]) == TEXT
  assert tokenizer.decode([104, 195]) == "h\ufffd"  # half a character
  assert tokenizer.decode(tokenizer.chat(HELLO)) == "user: hi\nassistant: "
  assert tokenizer.pieces() == [*(bytes([i]) for i in range(256)), b""]
  assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.pad_id) == (257, (256,), 256)


# --- prompts and completions ----------------------------------------------------------------------


def test_prompts_are_padded_on_the_left():
  tokens, mask, indices = encode_prompts(ByteTokenizer(), ["abc", "d"], 4)
  assert tokens.tolist() == [[256, 97, 98, 99], [256, 256, 256, 100]]
  assert mask.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
  assert (tokens.dtype, mask.dtype, indices) == (np.int32, bool, [0, 1])


def test_prompts_may_be_messages(tiny):
  tokens, mask, _ = encode_prompts(tiny, [HELLO, "hi"], 64)
  assert tokens[0][mask[0]].tolist() == tiny.chat(HELLO)
  assert tokens[1][mask[1]].tolist() == byte_ids("hi")


def test_overlong_prompts_are_errors_or_dropped_and_never_truncated():
  prompts = ["abcd", "abcdefg", "ab", "abcde"]
  with pytest.raises(ValueError, match=r"2 of 4 .* budget of 4 tokens; .* has 7: 'abcdefg'"):
    encode_prompts(ByteTokenizer(), prompts, 4)
  with pytest.warns(UserWarning, match=r"dropped: 2 of 4 prompts .* budget of 4 tokens"):
    tokens, mask, indices = encode_prompts(ByteTokenizer(), prompts, 4, overlong="drop")
  assert indices == [0, 2]
  assert mask.sum(1).tolist() == [4, 2]
  assert tokens[0].tolist() == [97, 98, 99, 100]
  with pytest.raises(ValueError, match="2 of 2 prompts"):  # none would be left
    encode_prompts(ByteTokenizer(), ["abcde", "abcdef"], 4, overlong="drop")


def test_a_very_long_prompt_is_abridged_in_the_error():
  with pytest.raises(ValueError, match=r"has 9000: 'aaa.*\[\.\.\.\].*aaa'") as caught:
    encode_prompts(ByteTokenizer(), ["a" * 9000], 8)
  assert len(str(caught.value)) < 1000


def test_wrong_arguments_of_encode_prompts():
  with pytest.raises(ValueError, match="the prompt '' has no tokens"):
    encode_prompts(ByteTokenizer(), ["a", ""], 4)
  with pytest.raises(ValueError, match="overlong is 'cut', allowed: 'error', 'drop'"):
    encode_prompts(ByteTokenizer(), ["a"], 4, overlong="cut")
  with pytest.raises(ValueError, match="max_length is 0"):
    encode_prompts(ByteTokenizer(), ["a"], 0)


def test_completions_end_at_their_mask_or_at_a_stop_string():
  # "ab" and EOS; "a\nb", which stops at the newline; EOS at once; nothing unmasked.
  tokens = np.array([[[97, 98, 256], [97, 10, 98]], [[256, 97, 97], [97, 97, 97]]])
  mask = np.array([[[1, 1, 1], [1, 1, 1]], [[1, 0, 0], [0, 0, 0]]], bool)
  assert decode_completions(ByteTokenizer(), tokens, mask) == [["ab", "a\nb"], ["", ""]]
  stopped = decode_completions(ByteTokenizer(), tokens, mask, stop=("\n", "b"))
  assert stopped == [["a", "a"], ["", ""]]
  with pytest.raises(ValueError, match=r"\[P, G, T\]"):
    decode_completions(ByteTokenizer(), tokens, mask[..., :2])


def test_an_eos_id_that_is_not_a_special_token_is_not_part_of_the_text(tmp_path):
  folder = copy_with(tmp_path, "generation_config.json", eos_token_id=[16, 2])  # 16 is "."
  tokenizer = load_tokenizer(str(folder))
  ids = np.array([[[*tokenizer.encode("user"), 16]]])
  assert decode_completions(tokenizer, ids, np.ones_like(ids, bool)) == [["user"]]
  assert tokenizer.decode([16]) == "."


# --- the real model -------------------------------------------------------------------------------


@pytest.mark.slow
@needs_real_model
def test_smollm2_tokenizer():
  tokenizer = load_tokenizer(REAL)
  assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.pad_id) == (49152, (2,), 2)
  assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
  # Ids of transformers 5.23's own GGUF reader: each digit is one token.
  assert tokenizer.encode("12 + 34 = 46\n") == [33, 34, 1232, 216, 35, 36, 446, 216, 36, 38, 198]
  ids = tokenizer.chat([{"role": "user", "content": "What is 7+5?"}])
  assert ids[0] == 1
  assert ids[-4:] == [1, 520, 9531, 198]  # <|im_start|>assistant\n
  assert "You are a helpful AI assistant named SmolLM, trained by Hugging Face" in tokenizer.decode(
    ids
  )
  pieces = tokenizer.pieces()
  assert sum(b"\n" in piece for piece in pieces) == 129
  assert b"".join(pieces[i] for i in tokenizer.encode(TEXT)) == TEXT.encode()


def edited_tokenizer(tmp_path, edit):
  """Returns a copy of the fixture whose tokenizer.json `edit` has changed."""
  folder = tmp_path / "model"
  shutil.copytree(UNTIED, folder)
  path = folder / "tokenizer.json"
  spec = json.loads(path.read_text(encoding="utf-8"))
  edit(spec)
  path.write_text(json.dumps(spec), encoding="utf-8")
  return load_tokenizer(str(folder))


@pytest.mark.parametrize("before", [[], ["<|im_start|>"]])
def test_what_a_tokenizer_adds_after_a_text_is_left_out(tmp_path, before):
  """A prompt that ends in EOS would have its completion follow the end of a text."""

  def edit(spec):
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}

    def special(name):
      return {"SpecialToken": {"id": name, "type_id": 0}}

    text = {"Sequence": {"id": "A", "type_id": 0}}
    spec["post_processor"] = {
      "type": "TemplateProcessing",
      "single": [*map(special, before), text, special("<|im_end|>")],
      "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
      "special_tokens": {
        name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (*before, "<|im_end|>")
      },
    }

  tokenizer, plain = edited_tokenizer(tmp_path, edit), load_tokenizer(str(UNTIED))
  ids = tokenizer.encode("12 + 34")
  assert ids[len(before) :] == plain.encode("12 + 34")
  assert ids[-1] not in tokenizer.eos_ids
  assert len(ids) == len(before) + len(plain.encode("12 + 34"))


def test_special_tokens_that_are_tags_stay_in_the_text(tmp_path):
  tags = ("<think>", "</think>", "<answer>", "</answer>")

  def edit(spec):
    first = max(token["id"] for token in spec["added_tokens"]) + 1
    first = max(first, *spec["model"]["vocab"].values()) + 1
    for k, name in enumerate(tags):
      spec["added_tokens"].append({
        "id": first + k, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
      })  # fmt: skip

  tokenizer = edited_tokenizer(tmp_path, edit)
  text = "<think>1</think><answer>2</answer>"
  ids = tokenizer.encode(text)
  assert len(ids) == 6
  tokens = np.array([[[*ids, tokenizer.eos_ids[0]]]])
  assert decode_completions(tokenizer, tokens, np.ones_like(tokens, bool)) == [[text]]
  pieces = tokenizer.pieces()
  assert b"".join(pieces[i] for i in tokens[0, 0]) == text.encode()
  table, state = stop_table(pieces, ["</answer>"], tokenizer.eos_ids, len(pieces)), 0
  for i in ids:
    state = int(table[state, i])
  assert state == len(table) - 1


def test_stop_strings_that_are_special_tokens_are_ids(tiny, tmp_path):
  """<|im_end|> (2) ends and pads texts, <|im_start|> (1) begins them; <tool> is plain text."""
  assert tiny.marker_ids(["<|im_end|>", "x", "<tool>"]) == [2]
  assert tiny.marker_ids([]) == ByteTokenizer().marker_ids(["<|im_end|>"]) == []
  with pytest.raises(ValueError, match=r"'\\n<\|im_end\|>' holds the special token '<\|im_end\|>'"):
    tiny.marker_ids(["\n<|im_end|>"])
  path = tmp_path / "model.gguf"
  tiny_gguf.write(path, tokenizer__ggml__eot_token_id=0, tokenizer__ggml__padding_token_id=1)
  padded = load_tokenizer(str(path))  # <|im_start|> pads, and does not end a text
  assert padded.eos_ids == (2, 0)
  assert padded.marker_ids(["<|im_start|>"]) == [1]
