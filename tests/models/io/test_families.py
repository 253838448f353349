"""Tests config.json to ModelConfig: published files, and everything the decoder does not compute.

The published files are shortened to the fields that affect the computation, and a few that must
not.
"""

import pytest

from grpo_jax.models.config import ModelConfig, RopeScaling
from grpo_jax.models.io.families import FAMILIES, parse

LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": 128,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}
PHI = {"architectures": ["Phi3ForCausalLM"]}
MOE = {"architectures": ["Qwen3MoeForCausalLM"]}
GEMMA_LOCAL = (True, True, True, True, True, False)

PUBLISHED = {
  "gpt-oss-20b": (
    {
      "architectures": ["GptOssForCausalLM"],
      "attention_bias": True,
      "eos_token_id": 200002,
      "experts_per_token": 4,
      "head_dim": 64,
      "hidden_act": "silu",
      "hidden_size": 2880,
      "initial_context_length": 4096,
      "intermediate_size": 2880,
      "layer_types": ["sliding_attention", "full_attention"] * 12,
      "max_position_embeddings": 131072,
      "model_type": "gpt_oss",
      "num_attention_heads": 64,
      "num_experts_per_tok": 4,
      "num_hidden_layers": 24,
      "num_key_value_heads": 8,
      "num_local_experts": 32,
      "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        "quant_method": "mxfp4",
      },
      "rms_norm_eps": 1e-05,
      "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
      },
      "rope_theta": 150000,
      "sliding_window": 128,
      "swiglu_limit": 7.0,
      "tie_word_embeddings": False,
      "vocab_size": 201088,
    },
    ModelConfig(
      vocab_size=201088,
      width=2880,
      layers=24,
      heads=64,
      kv_heads=8,
      head_dim=64,
      mlp=2880,
      rope_theta=150000.0,
      norm_eps=1e-5,
      tied=False,
      context=131072,
      rope_scaling=RopeScaling(
        "yarn",
        32.0,
        original=4096,
        low=1.0,
        high=32.0,
        amplitude=1.3465735902799727,
        rounded=False,
      ),
      biases=("q", "k", "v", "o", "router", "experts_gate", "experts_up", "experts_down"),
      window=128,
      local_layers=(True, False) * 12,
      experts=32,
      experts_per_token=4,
      router_normalized=True,
      swiglu_alpha=1.702,
      swiglu_limit=7.0,
      sinks=True,
      names="gpt_oss",
    ),
  ),
  "Llama-3.2-1B": (
    {
      "architectures": ["LlamaForCausalLM"],
      "attention_bias": False,
      "head_dim": 64,
      "hidden_act": "silu",
      "hidden_size": 2048,
      "intermediate_size": 8192,
      "max_position_embeddings": 131072,
      "mlp_bias": False,
      "model_type": "llama",
      "num_attention_heads": 32,
      "num_hidden_layers": 16,
      "num_key_value_heads": 8,
      "pretraining_tp": 1,
      "rms_norm_eps": 1e-05,
      "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
      },
      "rope_theta": 500000.0,
      "tie_word_embeddings": True,
      "torch_dtype": "bfloat16",
      "vocab_size": 128256,
    },
    ModelConfig(
      vocab_size=128256,
      width=2048,
      layers=16,
      heads=32,
      kv_heads=8,
      head_dim=64,
      mlp=8192,
      rope_theta=500000.0,
      rope_scaling=RopeScaling("llama3", 32.0, original=8192, low=1.0, high=4.0),
      norm_eps=1e-5,
      tied=True,
      context=131072,
    ),
  ),
  "Qwen2.5-0.5B": (
    {
      "architectures": ["Qwen2ForCausalLM"],
      "hidden_act": "silu",
      "hidden_size": 896,
      "intermediate_size": 4864,
      "max_position_embeddings": 32768,
      "max_window_layers": 24,
      "model_type": "qwen2",
      "num_attention_heads": 14,
      "num_hidden_layers": 24,
      "num_key_value_heads": 2,
      "rms_norm_eps": 1e-06,
      "rope_theta": 1000000.0,
      "sliding_window": 32768,
      "tie_word_embeddings": True,
      "use_mrope": False,
      "use_sliding_window": False,
      "vocab_size": 151936,
    },
    ModelConfig(
      vocab_size=151936,
      width=896,
      layers=24,
      heads=14,
      kv_heads=2,
      head_dim=64,
      mlp=4864,
      rope_theta=1000000.0,
      norm_eps=1e-6,
      tied=True,
      context=32768,
      biases=("q", "k", "v"),
    ),
  ),
  "Qwen3-0.6B": (
    {
      "architectures": ["Qwen3ForCausalLM"],
      "attention_bias": False,
      "head_dim": 128,
      "hidden_act": "silu",
      "hidden_size": 1024,
      "intermediate_size": 3072,
      "max_position_embeddings": 40960,
      "max_window_layers": 28,
      "model_type": "qwen3",
      "num_attention_heads": 16,
      "num_hidden_layers": 28,
      "num_key_value_heads": 8,
      "rms_norm_eps": 1e-06,
      "rope_scaling": None,
      "rope_theta": 1000000,
      "sliding_window": None,
      "tie_word_embeddings": True,
      "use_sliding_window": False,
      "vocab_size": 151936,
    },
    ModelConfig(
      vocab_size=151936,
      width=1024,
      layers=28,
      heads=16,
      kv_heads=8,
      head_dim=128,
      mlp=3072,
      rope_theta=1000000.0,
      norm_eps=1e-6,
      tied=True,
      context=40960,
      qk_norm=True,
    ),
  ),
  # This file holds only the fields that differ from the defaults of its class.
  "gemma-3-4b-it": (
    {
      "architectures": ["Gemma3ForConditionalGeneration"],
      "model_type": "gemma3",
      "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
      },
      "vision_config": {"hidden_size": 1152},
    },
    ModelConfig(
      vocab_size=262208,
      width=2560,
      layers=34,
      heads=8,
      kv_heads=4,
      head_dim=256,
      mlp=10240,
      rope_theta=1000000.0,
      rope_scaling=RopeScaling("linear", 8.0),
      norm_eps=1e-6,
      tied=True,
      context=131072,
      qk_norm=True,
      post_norm=True,
      norm_offset=1.0,
      activation="gelu_tanh",
      embed_scale=2560**0.5,
      attn_scale=1 / 16,
      window=1024,
      local_layers=(*GEMMA_LOCAL * 5, True, True, True, True),
      local_rope_theta=10000.0,
      names="gemma",
    ),
  ),
}


PUBLISHED |= {
  "Phi-4-mini-instruct": (  # with made-up factors; the file has 48 different ones
    {
      "architectures": ["Phi3ForCausalLM"],
      "hidden_act": "silu",
      "hidden_size": 3072,
      "intermediate_size": 8192,
      "max_position_embeddings": 131072,
      "model_type": "phi3",
      "num_attention_heads": 24,
      "num_hidden_layers": 32,
      "num_key_value_heads": 8,
      "original_max_position_embeddings": 4096,
      "partial_rotary_factor": 0.75,
      "rms_norm_eps": 1e-05,
      "rope_scaling": {
        "long_factor": [2.0] * 48,
        "short_factor": [1.0] * 48,
        "type": "longrope",
      },
      "rope_theta": 10000.0,
      "sliding_window": 262144,
      "tie_word_embeddings": True,
      "vocab_size": 200064,
    },
    ModelConfig(
      vocab_size=200064,
      width=3072,
      layers=32,
      heads=24,
      kv_heads=8,
      head_dim=128,
      mlp=8192,
      # sqrt(1 + ln 32 / ln 4096) = sqrt(1 + 5 / 12)
      rope_scaling=RopeScaling(
        "longrope",
        1.0,
        4096,
        amplitude=1.1902380714238083,
        short=(1.0,) * 48,
        long=(2.0,) * 48,
      ),
      norm_eps=1e-5,
      tied=True,
      context=131072,
      window=262144,
      local_layers=(True,) * 32,
      rotary=96,
      names="phi3",
    ),
  ),
  "Olmo-3-7B-Instruct": (
    {
      "architectures": ["Olmo3ForCausalLM"],
      "attention_bias": False,
      "hidden_act": "silu",
      "hidden_size": 4096,
      "intermediate_size": 11008,
      "max_position_embeddings": 65536,
      "model_type": "olmo3",
      "num_attention_heads": 32,
      "num_hidden_layers": 32,
      "num_key_value_heads": 32,
      "rms_norm_eps": 1e-06,
      "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
      },
      "rope_theta": 500000,
      "sliding_window": 4096,
      "tie_word_embeddings": False,
      "vocab_size": 100278,
    },
    ModelConfig(
      vocab_size=100278,
      width=4096,
      layers=32,
      heads=32,
      kv_heads=32,
      head_dim=128,
      mlp=11008,
      rope_theta=500000.0,
      rope_scaling=RopeScaling("yarn", 8.0, 8192, low=1.0, high=32.0, amplitude=1.2079441541679836),
      norm_eps=1e-6,
      tied=False,
      context=65536,
      qk_norm="all",
      pre_norm=False,
      post_norm=True,
      window=4096,
      local_layers=(True, True, True, False) * 8,
      local_rope_theta=500000.0,  # without the scaling
      names="olmo",
    ),
  ),
  "GLM-4-9B-0414": (
    {
      "architectures": ["Glm4ForCausalLM"],
      "attention_bias": True,
      "head_dim": 128,
      "hidden_act": "silu",
      "hidden_size": 4096,
      "intermediate_size": 13696,
      "max_position_embeddings": 32768,
      "model_type": "glm4",
      "num_attention_heads": 32,
      "num_hidden_layers": 40,
      "num_key_value_heads": 2,
      "partial_rotary_factor": 0.5,
      "rms_norm_eps": 1e-05,
      "rope_theta": 10000.0,
      "tie_word_embeddings": False,
      "vocab_size": 151552,
    },
    ModelConfig(
      vocab_size=151552,
      width=4096,
      layers=40,
      heads=32,
      kv_heads=2,
      head_dim=128,
      mlp=13696,
      norm_eps=1e-5,
      tied=False,
      context=32768,
      biases=("q", "k", "v"),
      post_norm=True,
      rotary=64,
      interleaved=True,
      names="glm4",
    ),
  ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_parsed(name):
  raw, expected = PUBLISHED[name]
  assert parse(raw, name) == expected


def test_defaults_of_llama():
  config = parse(LLAMA, "x")
  assert (config.rope_theta, config.norm_eps, config.tied) == (10000.0, 1e-6, False)
  assert (config.kv_heads, config.head_dim, config.context) == (4, 8, 2048)


@pytest.mark.parametrize(
  "fields",
  [
    {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 123.0, "factor": 2.0}},
  ],
)
def test_rope_fields_of_older_and_newer_versions(fields):
  config = parse(LLAMA | fields, "x")
  assert (config.rope_theta, config.rope_scaling) == (123.0, RopeScaling("linear", 2.0))


def test_yarn_fields_of_qwen():
  scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
  parsed = parse(LLAMA | {"rope_scaling": scaling}, "x").rope_scaling
  # 1 + ln(4) / 10, and the numbers of turns of Peng et al. 2023: 1 and 32.
  assert parsed == RopeScaling("yarn", 4.0, 32768, low=1.0, high=32.0, amplitude=1.138629436111989)


def test_local_layers_of_qwen_and_mistral():
  qwen = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 3,
    "sliding_window": 16,
    "max_window_layers": 2,
  }
  assert parse(qwen, "x").local_layers == ()
  config = parse(qwen | {"use_sliding_window": True}, "x")
  assert (config.window, config.local_layers) == (16, (False, False, True))
  types = ["sliding_attention", "full_attention", "full_attention"]
  config = parse(qwen | {"use_sliding_window": True, "layer_types": types}, "x")
  assert config.local_layers == (True, False, False)
  mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
  assert parse(mistral | {"sliding_window": None}, "x").local_layers == ()
  assert parse(mistral, "x").window == 4096


def test_a_classifier_has_as_many_labels_as_names():
  raw = LLAMA | {"architectures": ["LlamaForSequenceClassification"]}
  assert parse(raw | {"id2label": {"0": "LABEL_0"}}, "x").labels == 1
  assert parse(raw, "x").labels == 2  # the default of transformers
  assert parse(LLAMA, "x").labels == 0


def test_the_model_type_is_used_without_architectures():
  raw = {**LLAMA, "model_type": "qwen2"}
  del raw["architectures"]
  assert parse(raw, "x").biases == ("q", "k", "v")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*known: LlamaForCausalLM, Llama"),
    ({"architectures": ["Qwen4ForCausalLM"]}, r"\(exactly one\); the nearest is Qwen\dForCausalLM"),
    ({"architectures": [], "model_type": "smollm2"}, "the nearest is smollm3"),
    (
      {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]},
      "no_rope_layers must be given as a list of 2 entries, one for each layer, got",
    ),
    (
      PHI | {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 4}},
      "short_factor must be 4 finite numbers above 0, got",
    ),
    (
      PHI | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": "x"}},
      "long_factor must be a list of numbers, got 'x'",
    ),
    (
      PHI | {"partial_rotary_factor": 1.5},
      "12 dimensions of each head rotate; it must be an even number of at most the head size, 8",
    ),
    (
      {"architectures": ["Ministral3ForCausalLM"], "head_dim": 8, "num_key_value_heads": 2}
      | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "llama_4_scaling_beta": 0.1}},
      "queries that grow with their position, by 0.1, need a rope scaling with an original",
    ),
    (
      MOE | {"decoder_sparse_step": 2},
      r"decoder_sparse_step 2 and mlp_only_layers None make layers with and without experts",
    ),
    (MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\] make layers with and without experts"),
    (
      MOE | {"num_experts": 4, "num_experts_per_tok": 5},
      "5 experts per token, of 4; it must be at least 1 and at most their number",
    ),
    (MOE | {"num_experts": 0}, "num_local_experts must be given as a positive integer, got 0"),
    (
      {"architectures": ["Olmo2ForCausalLM"], "clip_qkv": 8.0},
      "clip_qkv 8.0 is not supported",
    ),
    ({"architectures": [], "model_type": "gpt2"}, "model_type 'gpt2', known: LlamaForCausalLM"),
    (
      {"architectures": ["OurModel"], "auto_map": {"AutoModelForCausalLM": "modeling.OurModel"}},
      r"known: Llama.*The code in its repository \(auto_map\) is never run",
    ),
    (
      {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]},
      r"known: .* \(exactly one\)",
    ),
    (
      {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
      r"'dynamic' is not supported \(its .*known: default, linear, llama3, yarn",
    ),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be given"),
    ({"rope_scaling": "linear"}, "rope_scaling must be given as an object, got 'linear'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be given as a finite"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope scaling \['linear'\] is not supported"),
    (
      {
        "rope_scaling": {
          "rope_type": "llama3",
          "factor": 8.0,
          "low_freq_factor": 4.0,
          "high_freq_factor": 1.0,
        }
      },
      "low below high",
    ),
    (
      {"num_hidden_layers": 10**7},
      "num_hidden_layers must be given as at most 10000, got 1",
    ),
    ({"num_hidden_layers": 10**400}, "num_hidden_layers must be given as an integer below 2.31"),
    ({"vocab_size": 10**9}, "vocab_size is 1,000,000,000, it must be at most 100,000,000"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be given as true or false"),
    ({"attention_bias": 0}, "attention_bias must be given as true or false, got 0"),
    ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
    ({"hidden_act": ["silu"]}, "hidden_act .* is not supported"),
    ({"partial_rotary_factor": 0.5, "rope_theta": 1e4}, "partial_rotary_factor is not supported"),
    ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported, known: silu"),
    ({"quantization_config": {"bits": 4}}, "quantization_config .* use the unquantized"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config .* use the unquan"),
    (
      {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "gptq"}},
      "quantization_config .* use the unquantized",
    ),
    ({"hidden_size": None}, "hidden_size must be given as a positive integer, got None"),
    ({"vocab_size": "128"}, "vocab_size must be given as a positive integer, got '128'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide num_attention_heads 4"),
    ({"head_dim": 7}, "head_dim 7 must be even"),
    (
      {"architectures": ["Gemma3ForCausalLM"], "layer_types": ["full_attention", "chunked"]},
      "layer_types must name 2 layers, each sliding_attention or full_attention, got",
    ),
    (
      {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
      "use_bidirectional_attention True is not supported",
    ),
  ],
)
def test_unsupported_configs_are_refused(changes, message):
  with pytest.raises(ValueError, match=message) as caught:
    parse(LLAMA | changes, "folder/config.json")
  assert str(caught.value).startswith("folder/config.json: ")


def test_remote_code_of_a_known_architecture_is_ignored():
  assert parse(LLAMA | {"auto_map": {"AutoModel": "modeling.Model"}}, "x") == parse(LLAMA, "x")


def test_the_table_names_everything_once():
  names = [name for row in FAMILIES.values() for name in (row.language_model, row.classifier)]
  names = [name for name in names if name is not None]
  assert len(set(names)) == len(names) == 37
