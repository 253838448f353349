"""Serves Tunix's GRPOLearner as an engine: a unit of work is one of its global steps.

Runs in Tunix's environment, with the vanilla rollout; see `benchmarks.step`. Tunix's llama3 (0.1.7)
ignores the config's rope_theta and always uses 1e6. That default is replaced here, since the model
would be another one otherwise.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer
from tunix.generate.tokenizer_adapter import TokenizerAdapter
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import rl_cluster as clusters
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.settings import SETTINGS, make_prompts, reward
from benchmarks.worker import Channel, clock, since

STEPS = 64


def load(folder: Path, mesh: jax.sharding.Mesh) -> llama.Llama3:
  """Reads the model of a Hugging Face folder in float32."""
  c = json.loads((folder / "config.json").read_text())
  llama.apply_rope.__defaults__ = (c["rope_theta"],)
  config = llama.ModelConfig(
    num_layers=c["num_hidden_layers"],
    vocab_size=c["vocab_size"],
    embed_dim=c["hidden_size"],
    hidden_dim=c["intermediate_size"],
    num_heads=c["num_attention_heads"],
    head_dim=c["head_dim"],
    num_kv_heads=c["num_key_value_heads"],
    rope_theta=c["rope_theta"],
    norm_eps=c["rms_norm_eps"],
    weight_tying=c["tie_word_embeddings"],
  )
  return llama_params.create_model_from_safe_tensors(str(folder), config, mesh, jnp.float32)


def make_learner(settings: dict, tokenizer, prompt_length: int) -> GRPOLearner:
  """Returns a learner for one of SETTINGS.

  Args:
    settings: settings from the parent.
    tokenizer: tokenizer of the model.
    prompt_length: number of tokens of each prompt.
  """
  shape = SETTINGS[settings["setting"]]
  mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  actor = load(Path(settings["model"]), mesh)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(settings["learning_rate"], b1=0.9, b2=0.99, weight_decay=0.0),
  )
  cluster = clusters.RLCluster(
    actor=actor,
    tokenizer=TokenizerAdapter(tokenizer),
    cluster_config=clusters.ClusterConfig(
      role_to_mesh=dict.fromkeys((clusters.Role.ACTOR, clusters.Role.ROLLOUT), mesh),
      rollout_engine="vanilla",
      training_config=clusters.RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=10_000,
        max_steps=10_000,
        mini_batch_size=shape.prompts,
        train_micro_batch_size=shape.prompts,
      ),
      rollout_config=RolloutConfig(
        max_tokens_to_generate=shape.tokens,
        max_prompt_length=prompt_length,
        # Prompts are padded to a power of two.
        kv_cache_size=2 ** (prompt_length - 1).bit_length() + shape.tokens + 1,
        temperature=1.0,
        top_p=None,
        top_k=None,
        eos_tokens=[-1],  # no token ends a completion
      ),
    ),
  )
  algorithm = GRPOConfig(num_generations=shape.group, num_iterations=1, beta=0.0, epsilon=0.2)
  return GRPOLearner(rl_cluster=cluster, algo_config=algorithm, reward_fns=reward)


def main() -> None:
  """Serves the engine."""
  channel = Channel()
  settings = channel.settings
  shape = SETTINGS[settings["setting"]]
  tokenizer = AutoTokenizer.from_pretrained(settings["model"])
  tokenizer.pad_token = "<|endoftext|>"  # Tunix masks by id: not the end of a turn
  tokenizer.bos_token = None  # Tunix would prepend it to each prompt
  prompts = make_prompts(shape.kind, shape.prompts * STEPS)
  if shape.kind == "chat":
    prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False)
               for p in prompts]  # fmt: skip
  learner = make_learner(settings, tokenizer, len(tokenizer(prompts[0])["input_ids"]))
  generate, step, record = learner._generate_and_compute_advantage, learner._run_global_step, {}

  def timed_generate(*args, **kwargs):
    before = clock()
    example = jax.block_until_ready(generate(*args, **kwargs))
    record.update(since(before, "sampling_"))
    record["prompt_tokens"] = int(example.prompt_mask.sum()) // shape.group
    record["completion_tokens"] = int(example.completion_ids.size)
    return example

  def turn(*args):
    if not channel.wait():
      os._exit(0)
    with channel.measure() as reply:
      before = clock()
      step(*args)
      jax.block_until_ready(nnx.state(learner.rl_cluster.actor_trainer.model))
      total = since(before)
      for name in total:
        record[f"update_{name}"] = total[name] - record[f"sampling_{name}"]
      reply |= record

  learner._generate_and_compute_advantage, learner._run_global_step = timed_generate, turn
  channel.ready({"tunix": "0.1.7", "jax": jax.__version__})
  batches = np.array(prompts).reshape(STEPS, shape.prompts)
  learner.train([{"prompts": batch} for batch in batches])


if __name__ == "__main__":
  main()
