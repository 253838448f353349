"""Writes a small llama GGUF file whose every value is known, for the tests of its readers."""

from pathlib import Path

import gguf
import numpy as np

V, D, H, K, DH, F, L = 264, 64, 4, 2, 16, 96, 2
TEMPLATE = (
  "{% for m in messages %}"
  "{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
  "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "h e", "Ċ Ċ"]


def byte_letters() -> list[str]:
  """The character that stands for each byte in a byte-level vocabulary (the rule of GPT-2)."""
  letters, spare = [], 256
  for byte in range(256):
    if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
      letters.append(chr(byte))
    else:
      letters.append(chr(spare))
      spare += 1
  return letters


# Ids: 0..2 special, 3 + b for byte b, 259..261 the merges, 262 added by a user, 263 unused.
TOKENS = [*SPECIAL, *byte_letters(), "12", "he", "ĊĊ", "<tool>", "[unused]"]
TYPES = [3, 3, 3, *[1] * 259, 4, 5]


def q4_1_values(rng, shape) -> np.ndarray:
  """Values that Q4_1 holds exactly: in each 32, min + step * (0..15) with both ends present."""
  steps = rng.integers(0, 16, shape).reshape(-1, 32)
  steps[:, 0], steps[:, 1] = 0, 15
  return (steps.reshape(shape) * 0.0625 - 0.5).astype(np.float32)


def q8_0_values(rng, shape) -> np.ndarray:
  """Values that Q8_0 holds exactly: in each 32, step * (-127..127) with 127 present."""
  steps = rng.integers(-127, 128, shape).reshape(-1, 32)
  steps[:, 0] = 127
  return (steps.reshape(shape) / 128).astype(np.float32)


def gguf_order(kernel: np.ndarray, heads: int) -> np.ndarray:
  """Rows of q or k as a llama GGUF file has them: row i of a head, then its RoPE partner."""
  half = kernel.shape[0] // heads // 2
  rows = []
  for head in range(heads):
    for i in range(half):
      rows += [kernel[head * 2 * half + i], kernel[head * 2 * half + i + half]]
  return np.stack(rows)


def write(path: Path, *, tied: bool = True, architecture: str = "llama", **metadata) -> dict:
  """Writes the file and gives the parameters it means, by Hugging Face name, [out, in].

  `metadata` replaces or adds entries, with "__" for "." in their keys; None leaves one out.
  """
  rng = np.random.default_rng(0)
  quant, kinds = gguf.quants.quantize, gguf.GGMLQuantizationType
  writer = gguf.GGUFWriter(path, architecture)
  entries = {
    "llama.block_count": L,
    "llama.context_length": 128,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": H,
    "llama.attention.head_count_kv": K,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": DH,
    "llama.vocab_size": V,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
  } | {key.replace("__", "."): value for key, value in metadata.items()}
  for key, value in entries.items():
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    if value is not None:
      add[type(value)](key, value)

  expected = {}

  def put(name: str, hf: str, values: np.ndarray, kind: str, heads: int | None = None) -> None:
    expected[hf] = values
    stored = values if heads is None else gguf_order(values, heads)
    if kind in ("F32", "F16"):
      writer.add_tensor(name, stored.astype(np.float32 if kind == "F32" else np.float16))
    else:
      writer.add_tensor(name, quant(stored, kinds[kind]), raw_dtype=kinds[kind])

  def norm() -> np.ndarray:
    return (rng.integers(1, 200, D) / 64).astype(np.float32)

  put("token_embd.weight", "model.embed_tokens.weight", q8_0_values(rng, (V, D)), "Q8_0")
  for i in range(L):
    at, to = f"blk.{i}.", f"model.layers.{i}."
    attention, mlp = to + "self_attn.", to + "mlp."
    put(at + "attn_norm.weight", to + "input_layernorm.weight", norm(), "F32")
    put(at + "ffn_norm.weight", to + "post_attention_layernorm.weight", norm(), "F32")
    put(at + "attn_q.weight", attention + "q_proj.weight", q4_1_values(rng, (H * DH, D)), "Q4_1", H)
    half = (rng.integers(-64, 64, (K * DH, D)) / 32).astype(np.float32)  # exact in float16
    put(at + "attn_k.weight", attention + "k_proj.weight", half, "F16", K)
    full = rng.standard_normal((K * DH, D), np.float32)
    put(at + "attn_v.weight", attention + "v_proj.weight", full, "F32")
    put(
      at + "attn_output.weight", attention + "o_proj.weight", q4_1_values(rng, (D, H * DH)), "Q4_1"
    )
    put(at + "ffn_gate.weight", mlp + "gate_proj.weight", q4_1_values(rng, (F, D)), "Q4_1")
    put(at + "ffn_up.weight", mlp + "up_proj.weight", q8_0_values(rng, (F, D)), "Q8_0")
    put(at + "ffn_down.weight", mlp + "down_proj.weight", q4_1_values(rng, (D, F)), "Q4_1")
  if not tied:
    put("output.weight", "lm_head.weight", q8_0_values(rng, (V, D)), "Q8_0")
  put("output_norm.weight", "model.norm.weight", norm(), "F32")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return expected
