"""Writes small GGUF files with known values, for the tests of their readers."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

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
  """Returns the character for each byte in a byte-level vocabulary (the rule of GPT-2)."""
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
  """Returns values that Q4_1 represents exactly: min + step * (0..15), both ends in each 32."""
  steps = rng.integers(0, 16, shape).reshape(-1, 32)
  steps[:, 0], steps[:, 1] = 0, 15
  return (steps.reshape(shape) * 0.0625 - 0.5).astype(np.float32)


def q8_0_values(rng, shape) -> np.ndarray:
  """Returns values that Q8_0 represents exactly: step * (-127..127), 127 in each 32."""
  steps = rng.integers(-127, 128, shape).reshape(-1, 32)
  steps[:, 0] = 127
  return (steps.reshape(shape) / 128).astype(np.float32)


def gguf_order(kernel: np.ndarray, heads: int) -> np.ndarray:
  """Reorders rows of q or k as in llama GGUF files: row i of a head, then its RoPE partner."""
  half = kernel.shape[0] // heads // 2
  rows = []
  for head in range(heads):
    for i in range(half):
      rows += [kernel[head * 2 * half + i], kernel[head * 2 * half + i + half]]
  return np.stack(rows)


def write(
  path: Path,
  *,
  tied: bool = True,
  architecture: str = "llama",
  rope_freqs: np.ndarray | None = None,
  width: int = D,
  embed: tuple | None = None,
  **metadata,
) -> dict:
  """Writes the file; returns its parameters by Hugging Face name, matrices as [out, in].

  Args:
    path: file to write.
    tied: whether the head is the embedding.
    architecture: `general.architecture`.
    rope_freqs: divisor of each rotary frequency, written as a tensor.
    width: hidden size.
    embed: (bytes [V, row], quantization type) of the embedding; None writes known values.
    metadata: entries to replace or add, with "__" for "." in their keys; None removes an entry.
  """
  D, rng = width, np.random.default_rng(0)
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

  if rope_freqs is not None:
    writer.add_tensor("rope_freqs.weight", rope_freqs)
  if embed is None:
    put("token_embd.weight", "model.embed_tokens.weight", q8_0_values(rng, (V, D)), "Q8_0")
  else:
    writer.add_tensor("token_embd.weight", embed[0], raw_dtype=embed[1])
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


# Name in a Hugging Face file -> name in a GGUF file, by llama.cpp's tables.
PARTS = {
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
}
GEMMA_PARTS = PARTS | {
  "post_attention_layernorm": "post_attention_norm",
  "pre_feedforward_layernorm": "ffn_norm",
  "post_feedforward_layernorm": "post_ffw_norm",
}


def convert(folder: Path, path: Path, architecture: str, **metadata) -> None:
  """Converts a Hugging Face folder to a float32 GGUF file, like llama.cpp's converter.

  Args:
    metadata: entries to add under the architecture, with "__" for "." in their keys.
  """
  raw = json.loads((folder / "config.json").read_text())
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_context_length(raw["max_position_embeddings"])
  writer.add_embedding_length(raw["hidden_size"])
  writer.add_block_count(raw["num_hidden_layers"])
  writer.add_feed_forward_length(raw["intermediate_size"])
  writer.add_head_count(raw["num_attention_heads"])
  writer.add_head_count_kv(raw["num_key_value_heads"])
  writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
  writer.add_vocab_size(raw["vocab_size"])
  for key, value in metadata.items():
    key = f"{architecture}.{key.replace('__', '.')}"
    {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](
      key, value
    )
  parts = GEMMA_PARTS if architecture == "gemma3" else PARTS
  for name, value in load_file(folder / "model.safetensors").items():
    values = value.astype(np.float32)
    if architecture == "gemma3" and name.endswith("norm.weight"):
      values = values + 1
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
      kind = "num_attention_heads" if ".q_proj" in name else "num_key_value_heads"
      values = gguf_order(values, raw[kind])
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
      _, _, layer, part = stem.split(".", 3)
      stem = f"blk.{layer}.{parts[part]}"
    else:
      tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
      stem = tops[stem]
    writer.add_tensor(f"{stem}.{suffix}", values)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
