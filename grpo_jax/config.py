"""Defines every field of a run, loads experiment files and applies overrides.

A config is a locked ml_collections tree. An experiment is a Python file with `get_config()`, which
starts from `default_config()`. It is a program and runs as one: load only files that you would run.
"""

import argparse
import ast
import contextlib
import datetime
import difflib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from grpo_jax import addresses
from grpo_jax.errors import first_line, with_frames

# Fields that hold one of a few words.
VALUES = {
  "model.dtype": ("float32", "bfloat16"),
  "model.matmul_precision": ("auto", "default", "high", "highest"),
  "model.remat": ("none", "dots", "layers"),
  "model.attention": ("auto", "tiled", "splash", "cudnn"),
  "data.seeding": ("auto", "hashed", "added"),
  "rollout.overlong": ("error", "drop"),
  "rollout.weights": ("trained", "int8"),
  "teacher.shows": ("sibling", "answer"),
  "rewards.on_error": ("raise", "skip"),
  "lora.quantize": ("none", "int8", "nf4", "file"),
  "optimizer.name": ("adamw", "adafactor", "muon"),
  "optimizer.schedule": ("constant", "linear", "cosine"),
  "train.reduction": ("fast", "deterministic"),
  "train.routes": ("sampled", "fresh"),
  "critic.trunk": ("own", "policy"),
}
# Groups whose fields are free names: arguments of a task, variables of a chat template.
OPEN_GROUPS = ("task.settings", "chat.arguments")
TYPES = {
  bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"
}  # fmt: skip
LARGEST = 2**31 - 1  # of any number without a limit of its own: what int32 holds
STOP_LENGTH = 200  # characters of a stop string
_WEEKS = 10**7  # seconds: no wait is longer than 16 weeks
# Smallest and largest value of a number, and the words for the error.
RANGES: dict[str, tuple[float, float, str]] = {
  "seed": (0, 2**32 - 1, "at least 0"),
  "steps": (1, LARGEST, "at least 1"),
  "epochs": (0, LARGEST, "at least 0"),
  "stop.after_hours": (0, 10**5, "at least 0 hours"),
  "lora.rank": (0, LARGEST, "at least 0"),
  "lora.alpha": (0, LARGEST, "above 0"),
  "data.memory": (0, 1, "between 0 and 1"),
  "rollout.prompts_per_step": (1, LARGEST, "at least 1"),
  "rollout.group_size": (1, LARGEST, "at least 1"),
  "rollout.prompt_length": (0, LARGEST, "at least 0 tokens"),
  "rollout.completion_length": (1, LARGEST, "at least 1"),
  "rollout.temperature": (0, LARGEST, "above 0 (evaluation is always greedy)"),
  "rollout.max_resamples": (0, LARGEST, "at least 0"),
  "rollout.ahead": (0, 64, "at least 0 steps"),
  "rollout.cache_gib": (0, 10**6, "at least 0 GiB"),
  "rollout.partial_tokens": (0, LARGEST, "at least 0 tokens"),
  "rollout.partial_prompts": (0, LARGEST, "at least 0"),
  "episode.turns": (1, 1000, "at least 1"),
  "episode.turn_length": (0, LARGEST, "at least 0 tokens"),
  "episode.observation_length": (0, LARGEST, "at least 0 tokens"),
  "rewards.workers": (0, 1024, "at least 0"),
  "rewards.timeout": (0, _WEEKS, "above 0 seconds"),
  "reference.sync_every": (0, LARGEST, "at least 0"),
  "reference.sync_share": (0, 1, "above 0 and at most 1"),
  "algorithm.beta": (0, LARGEST, "at least 0"),
  "teacher.solved_from": (-LARGEST, LARGEST, ""),
  "teacher.prompt_length": (0, LARGEST, "at least 0 tokens"),
  "algorithm.teacher_weight": (0, LARGEST, "at least 0"),
  "algorithm.teacher_discount": (0, 1, "between 0 and 1"),
  "algorithm.teacher_divergence": (0, 1, "between 0 and 1"),
  "algorithm.clip_low": (0, 1, "between 0 and 1"),
  "algorithm.clip_high": (0, LARGEST, "at least 0"),
  "algorithm.gamma": (0, 1, "between 0 and 1"),
  "algorithm.lam": (0, 1, "between 0 and 1"),
  "critic.learning_rate": (0, LARGEST, "above 0"),
  "critic.clip": (0, LARGEST, "above 0"),
  "critic.weight": (0, LARGEST, "above 0"),
  "critic.warmup_steps": (0, LARGEST, "at least 0"),
  "optimizer.learning_rate": (0, LARGEST, "above 0"),
  "optimizer.schedule_steps": (0, LARGEST, "at least 0"),
  "optimizer.warmup_steps": (0, LARGEST, "at least 0"),
  "optimizer.final_fraction": (0, 1, "between 0 and 1"),
  "optimizer.beta1": (0, 1 - 2**-53, "in [0, 1)"),
  "optimizer.beta2": (0, 1 - 2**-53, "in [0, 1)"),
  "optimizer.eps": (0, 1, "between 0 and 1"),
  "optimizer.weight_decay": (0, LARGEST, "at least 0"),
  "optimizer.clip_norm": (0, LARGEST, "at least 0"),
  "train.epochs": (1, LARGEST, "at least 1"),
  "train.mini_batches": (1, LARGEST, "at least 1"),
  "train.micro_batches": (1, LARGEST, "at least 1"),
  "train.micro_batch_tokens": (0, LARGEST, "at least 0"),
  "train.chunks": (1, LARGEST, "at least 1"),
  "train.balance": (0, LARGEST, "at least 0"),
  "train.max_skipped": (1, LARGEST, "at least 1"),
  "train.spike": (0, LARGEST, "0 (off) or above 1"),
  "mesh.rollout_devices": (0, LARGEST, "at least 0"),
  "mesh.slices": (1, LARGEST, "at least 1"),
  "hosts.heartbeat": (1, _WEEKS, "at least 1 second"),
  "hosts.wait": (0, _WEEKS, "above 0 seconds"),
  "eval.every": (0, LARGEST, "at least 0"),
  "eval.batch_prompts": (1, LARGEST, "at least 1"),
  "eval.samples": (0, LARGEST, "at least 0"),
  "eval.temperature": (0, LARGEST, "above 0"),
  "eval.top_k": (0, LARGEST, "at least 0"),
  "eval.top_p": (0, 1, "above 0 and at most 1"),
  "eval.min_p": (0, 1, "between 0 and 1"),
  "checkpoint.every": (0, LARGEST, "at least 0"),
  "checkpoint.seconds": (0, _WEEKS, "at least 0 seconds"),
  "checkpoint.keep": (1, LARGEST, "at least 1"),
  "log.samples": (0, LARGEST, "at least 0"),
  "log.samples_every": (0, LARGEST, "at least 0"),
  "log.tokens_every": (0, LARGEST, "at least 0"),
}
# Fields that are a name or a function: `algorithm.advantage` and its siblings.
CHOICES = ("advantage", "ratio", "anchor", "trust_region", "kl", "correction", "average")
# Names of before, which saved runs, experiment files and command lines may still hold.
RENAMED_FIELDS = {"slots": "chunks", "max_refills": "max_resamples"}
RENAMED_VALUES = {
  "reduction": {"ordered": "deterministic"},
  "attention": {"blocks": "tiled"},
}
# Restrictions of the sampler that training rollouts do not have.
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")
# Values in configs that were saved before the field was there, where they are not the default.
BEFORE = {"data.seeding": "added"}
# Fields whose "auto" means: as the work directory was begun, else this.
AUTO = {"data.seeding": "hashed"}
# Fields that a continued run may change: its length, its output, its layout, its workers.
FREE = (
  *("steps", "epochs", "stop.", "eval.", "checkpoint.", "log.", "mesh.", "hosts."),
  *("compilation_cache", "model.remat", "train.micro_batches", "train.micro_batch_tokens"),
  "train.sort_by_length",
  *("train.max_skipped", "rewards.workers", "rewards.timeout", "rewards.isolate"),
  *("rollout.cache_gib", "rewards.on_error", "rewards.allow_unscored", "optimizer.schedule_steps"),
)
_notices: set[str] = set()  # lines about renamed fields, each printed once


class ConfigError(ValueError):
  """Lists everything that is wrong with a config, one problem a line."""

  def __init__(self, problems: list[str]) -> None:
    self.problems = problems
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    super().__init__(f"the config has {count}:\n" + "\n".join(f"  - {p}" for p in problems))


class Section(ConfigDict):
  """Holds a group of fields, and answers to the names they had before."""

  def __getitem__(self, name: str) -> Any:
    return super().__getitem__(_current_name(self, name))

  def __setitem__(self, name: str, value: Any) -> None:
    name = _current_name(self, name)
    if name in FILTERS and name not in self and self.is_locked:
      raise ValueError(f"no field {name!r} here: {no_filter(name)}")
    renamed = RENAMED_VALUES.get(name, {})
    if isinstance(value, str) and value in renamed:
      _notify(f"{name}={value!r} is now called {name}={renamed[value]!r}")
      value = renamed[value]
    current = self.get(name) if isinstance(value, dict) else None
    if isinstance(current, ConfigDict) and not current.convert_dict:
      value = ConfigDict(value, convert_dict=False)
    super().__setitem__(name, value)


def no_filter(name: str) -> str:
  """Returns the reason why rollouts cannot be filtered, and what can be."""
  return (
    f"{name} would draw from another distribution than the one that the loss scores, so rollouts "
    "are never filtered; change rollout.temperature. Completions of pass@k may be filtered by "
    "eval.top_k, eval.top_p and eval.min_p"
  )


def _current_name(section: ConfigDict, name: str) -> str:
  """Returns the name a field has today, and prints one line where that is another."""
  new = RENAMED_FIELDS.get(name) if isinstance(name, str) else None
  if new is None or name in section or new not in section:
    return name
  _notify(f"the field {name!r} is now called {new!r}")
  return new


def _notify(line: str) -> None:
  if line not in _notices:
    _notices.add(line)
    print(f"note: {line}", file=sys.stderr)


def attempt(problems: list[str], make: Callable[[], Any], what: str = "") -> Any:
  """Returns `make()`; where that raises, appends the message to `problems` and returns None.

  A user's file can raise anything, and can end the process: all of it becomes a problem.

  Args:
    what: names what is made, for errors that do not say so themselves.
  """
  try:
    return make()
  except KeyboardInterrupt:
    raise
  except (ValueError, FileNotFoundError, ImportError) as error:
    problems.append(str(error) or f"{what or 'the config'}: {type(error).__name__}")
  except BaseException as error:
    problems.append(f"{what or 'the config'}: {type(error).__name__}: {error}")
  return None


def default_config() -> ConfigDict:
  """Returns every field with its default and unit; experiments override, `load` locks."""
  c = Section()
  c.seed = 0  # of data order, sampling and random weights
  c.steps = 100  # rollouts in the whole run; each gives train.epochs x mini_batches updates
  # Passes over the training problems, in place of `steps` if above 0. The last step is a whole one:
  # where the problems do not divide evenly, it reaches into the next pass.
  c.epochs = 0.0

  c.stop = Section()  # ends a run early: it saves, evaluates and says why (for text: rollout.stop)
  c.stop.after_hours = 0.0  # hours since the command began; 0 = no limit
  c.stop.when = ""  # a metric and its limit, such as "eval/accuracy>0.9"; empty = never

  c.model = Section()
  c.model.source = "random:tiny"  # folder, .gguf file, package:NAME, random:NAME or hub id
  c.model.dtype = "float32"  # of activations: float32 or bfloat16; weights stay float32
  # Of float32 matmuls on TPUs (one bfloat16 pass by default) and GPUs (TF32): highest, high or
  # default; auto is highest where the dtype is float32. CPUs always compute in float32.
  c.model.matmul_precision = "auto"
  # What the backward pass recomputes: none, dots (everything but weight matmuls: half the memory
  # of none for hardly more time) or layers (everything: a third more work).
  c.model.remat = "dots"
  # Attention over whole rows: tiled (by queries; any device), splash (TPU), cudnn (GPU, bfloat16,
  # no softcap) or auto: the platform's kernel for long rows, else tiled.
  c.model.attention = "auto"

  c.chat = Section()  # how messages become a prompt, by the model's chat template
  c.chat.system = ""  # text of a system turn before the messages of each prompt; empty: none
  # Variables of the template, such as enable_thinking=False.
  c.chat.arguments = ConfigDict(convert_dict=False)
  c.chat.date = ""  # day that the template sees, YYYY-MM-DD; empty: the day the run was started

  c.lora = Section()  # train low-rank adapters instead of the weights
  c.lora.rank = 0  # 0 = train all weights
  c.lora.alpha = 16.0  # adapters are scaled by alpha / rank
  # How the frozen matrices are held (QLoRA): int8, nf4 (4 bits), file (the blocks of a GGUF file,
  # as they are) or none (float32).
  c.lora.quantize = "none"
  # Folder of adapters to start from, as `peft` and `export --adapter` write it. Its rank, alpha and
  # matrices replace the fields above and below.
  c.lora.source = ""
  # Matrices of a layer with adapters: a regular expression, or a list of names ("q" or "q_proj").
  c.lora.targets = FieldReference("q|k|v|o|gate|up|down", field_type=object)

  c.task = Section()
  c.task.name = "reasoning_gym"  # a key of grpo_jax.tasks.TASKS
  # Keyword arguments of that task. A dict among them stays one: its keys may hold dots.
  c.task.settings = ConfigDict(convert_dict=False)

  c.data = Section()
  c.data.shuffle = True  # a new order in each epoch; false = the order of the task's problems
  # How (seed, epoch) give the order of later epochs: hashed; added, as in version 0.1.0, where
  # epoch 1 of seed 0 is epoch 0 of seed 1; or auto: as the work directory was begun, else hashed.
  c.data.seeding = "auto"
  # Draws problems by their pass rates in this run, instead of in passes: off, learnability (by
  # p (1 - p)), failure (by 1 - p), a function of the counts, or 'file.py:function'.
  c.data.curriculum = FieldReference("off", field_type=object)
  c.data.memory = 0.5  # of a curriculum: share of a problem's earlier counts kept at each new try

  c.rollout = Section()
  c.rollout.prompts_per_step = 8  # P, over all devices
  c.rollout.group_size = 8  # G, completions per prompt
  c.rollout.prompt_length = 0  # N, tokens; 0 = the longest prompt of the task
  c.rollout.completion_length = 64  # T, tokens, the ending token included
  c.rollout.temperature = 1.0  # used for sampling and for scoring alike
  c.rollout.overlong = "error"  # a prompt of more than prompt_length tokens: error or drop
  c.rollout.stop = ()  # strings that end a completion, besides the task's own
  c.rollout.stop_ids = ()  # token ids that end a completion, besides the tokenizer's
  # Column of the problems with a completion of each, which is learned from in place of samples, as
  # in pretraining (a list of them for groups); empty: completions are sampled.
  c.rollout.given = ""
  c.rollout.max_resamples = 0  # dynamic sampling: further draws to replace zero-variance groups
  c.rollout.mask_truncated = False  # leave completions that ran into the budget out of the loss
  # Steps that sampling is ahead of the updates: the rollout of step n has the parameters after step
  # n - ahead, and is scored while updates run. 0: one after the other. See docs/scale.md.
  c.rollout.ahead = 0
  # GiB of each device for keys and values of completions while sampling: a completion that ends
  # makes room for the next one, and completions stay the same. 0: room for all of a step at once.
  c.rollout.cache_gib = 0.0
  # Tokens that a round of sampling adds to each completion; a step takes rounds until enough
  # prompts are complete, and the others go on in the next step. 0: a step samples whole
  # completions. See docs/scale.md.
  c.rollout.partial_tokens = 0
  c.rollout.partial_prompts = 0  # with it: prompts under way beyond those of a step
  # Matrices of the layers while sampling: trained, or int8: rounded after each update, and
  # multiplied in 8-bit integers with rounded activations; needs a correction. See docs/scale.md.
  c.rollout.weights = "trained"

  c.episode = Section()  # of tasks with tools or an environment; completion_length is its budget
  c.episode.turns = 4  # turns of the policy at most
  c.episode.turn_length = 0  # tokens of a turn at most; 0 = completion_length
  c.episode.observation_length = 0  # tokens of an observation at most; 0 = completion_length
  # Whether all episodes take their turns together, each turn waiting for the slowest environment.
  # False: an episode waits for its own only, and rows cost until all are over. See docs/scale.md.
  c.episode.in_step = True

  c.rewards = Section()
  c.rewards.workers = 1  # processes that run the reward functions; 0 = this one, unguarded
  c.rewards.timeout = 30.0  # seconds per completion; a slower one has no reward
  # Reward processes get no network, no environment, and cannot write or start programs.
  c.rewards.isolate = True
  # An error of a reward function: raise (save and end the run), or skip (those completions have no
  # reward, and count in rewards/raised).
  c.rewards.on_error = "raise"
  c.rewards.allow_unscored = False  # go on although no completion of the first step was scored

  c.reward_model = Section()  # a learned reward, added to the task's
  c.reward_model.source = ""  # a sequence-classification model, named like model.source
  c.reward_model.weight = 1.0

  c.teacher = Section()  # models that the policy learns from, by algorithm.teacher_weight
  # A model with the policy's tokenizer, named like model.source, or a list of them, whose log-probs
  # are averaged; empty: none. "policy" is the policy itself, shown a solution, and "reference" its
  # moving reference, shown one.
  c.teacher.source = FieldReference("", field_type=object)
  # Of "policy" and "reference": a solved completion of the group (sibling), or the column answer.
  c.teacher.shows = "sibling"
  c.teacher.solved_from = 1.0  # smallest reward of a solved completion
  c.teacher.template = (  # of their prompt, or of its last turn
    "{prompt}\n\nThis is a correct solution:\n\n{solution}\n\nNow solve the problem yourself."
  )
  c.teacher.prompt_length = 0  # tokens of their prompt at most; 0 = of every prompt and completion

  c.reference = Section()  # the policy that the KL term stays close to: the model at the start
  c.reference.sync_every = 0  # steps between moves of the reference to the policy; 0 = never
  c.reference.sync_share = 1.0  # share of the policy in the new reference; 1 = a copy

  # Fields left None keep the row's value. A choice is a name, a function, or 'file.py:function'.
  c.algorithm = Section()
  c.algorithm.name = "grpo"  # a row of grpo_jax.ALGORITHMS
  c.algorithm.advantage = placeholder(object)  # group_normalized, group_centered, ...
  c.algorithm.ratio = placeholder(object)  # token, sequence or sequence_token
  c.algorithm.anchor = placeholder(object)  # what the ratio compares with: old or sampler
  c.algorithm.trust_region = placeholder(object)  # none, clip, dual_clip, cispo, sapo, dppo_tv
  c.algorithm.average = placeholder(object)  # sequence, token, constant or prompt
  c.algorithm.kl = placeholder(object)  # none, k1, k2, k3, ...
  # For a sampler that is not the trainer: none, token_truncate, geometric_mask, ..., or several of
  # them in a chain, as in geometric_mask+token_truncate.
  c.algorithm.correction = placeholder(object)
  c.algorithm.beta = placeholder(float)  # coefficient of the KL term
  c.algorithm.kl_in = placeholder(str)  # where the KL term stands: loss or reward
  # Coefficient of the teacher's log-ratios, which are added to the advantages, or of a divergence.
  c.algorithm.teacher_weight = placeholder(float)
  c.algorithm.teacher_discount = placeholder(float)  # 0: each token alone; 1: and all later ones
  # Divergence of whole distributions, in the loss, instead of log-ratios of the drawn tokens: 0 is
  # KL(teacher, policy), 1 is KL(policy, teacher), between them Jensen-Shannon divergences.
  c.algorithm.teacher_divergence = placeholder(float)
  c.algorithm.log_ratio_baseline = placeholder(str)  # of these and of kl_in: none or leave_one_out
  c.algorithm.clip_low = placeholder(float)  # ratios are held in [1 - clip_low, 1 + clip_high]
  c.algorithm.clip_high = placeholder(float)
  c.algorithm.clip_dual = placeholder(float)  # largest ratio that counts against an answer
  c.algorithm.ratio_min = placeholder(float)  # absolute bounds of the ratio
  c.algorithm.ratio_max = placeholder(float)
  c.algorithm.tau_positive = placeholder(float)  # sharpness of SAPO's gate where advantages are > 0
  c.algorithm.tau_negative = placeholder(float)  # ... and where they are < 0
  c.algorithm.divergence = placeholder(float)  # DPPO: largest change of a token's probability
  c.algorithm.correction_min = placeholder(float)  # bounds of the trainer/sampler ratio
  c.algorithm.correction_max = placeholder(float)
  c.algorithm.geometric_min = placeholder(float)  # ... and of its geometric mean over a sequence
  c.algorithm.geometric_max = placeholder(float)
  c.algorithm.off_policy_max = placeholder(float)  # nats; mean drop of log-probs since sampling
  c.algorithm.right_above = placeholder(float)  # largest reward of a wrong answer
  c.algorithm.sampler_penalty = placeholder(float)  # coefficient of (logp - sampler_logp)^2
  c.algorithm.entropy_bonus = placeholder(float)  # coefficient of the entropy; at the start only,
  c.algorithm.entropy_target = placeholder(float)  # nats; ... where it adapts below this entropy
  c.algorithm.entropy_delta = placeholder(float)  # ... by this much per update
  c.algorithm.entropy_share = placeholder(float)  # share of tokens, of high entropy, that learn
  c.algorithm.nll_weight = placeholder(float)  # of the log-likelihood of right answers
  c.algorithm.gamma = placeholder(float)  # of advantages from a critic: discount per token
  c.algorithm.lam = placeholder(float)  # ... and GAE's weight of longer estimates

  c.critic = Section()  # of algorithms whose advantage takes values, such as ppo
  # A model named like model.source, or a classifier with one label; empty: model.source itself.
  c.critic.source = ""
  c.critic.learning_rate = 1e-5  # the peak; the rest of its optimizer is as in `optimizer`
  c.critic.clip = placeholder(float)  # largest change of a value that counts in an update
  c.critic.warmup_steps = 0  # steps from which only the critic learns, at the beginning
  c.critic.trunk = "own"  # own: a model of its own. policy: a value head on the policy's trunk
  c.critic.weight = 0.5  # of the value loss in the policy's loss, with the policy's trunk

  c.optimizer = Section()
  c.optimizer.name = "adamw"  # adamw, adafactor or muon: two, hardly any, one number a parameter
  c.optimizer.learning_rate = 1e-6  # the peak
  c.optimizer.schedule = "constant"  # constant, linear or cosine, after the warm-up
  c.optimizer.schedule_steps = 0  # steps after which a schedule is at its end; 0 = `steps`
  c.optimizer.warmup_steps = 0  # updates
  c.optimizer.final_fraction = 0.0  # share of the peak left at the last step
  c.optimizer.beta1 = 0.9
  c.optimizer.beta2 = 0.99
  c.optimizer.eps = 1e-8
  c.optimizer.weight_decay = 0.0
  c.optimizer.clip_norm = 1.0  # global gradient norm; 0 = not clipped

  c.train = Section()
  c.train.epochs = 1  # passes over each rollout
  c.train.mini_batches = 1  # updates per pass, on equal parts of the prompts in a new order
  c.train.micro_batches = 1  # gradient accumulation: equal parts of an update; memory only
  c.train.micro_batch_tokens = 0  # most tokens a device computes at once; 0 = no limit
  c.train.sort_by_length = False  # micro-batches of similar lengths, each cut to its own; work only
  c.train.reduction = "fast"  # deterministic: the same bits on any number of devices
  c.train.chunks = 8  # with deterministic: equal parts of an update, whatever the devices
  c.train.routes = "sampled"  # experts in the update: those chosen while sampling, or fresh ones
  c.train.freeze_router = False  # whether the router of a mixture of experts stays as it is
  c.train.balance = 0.0  # coefficient of the load-balance loss of a mixture of experts; 0 = off
  c.train.max_skipped = 5  # non-finite updates skipped in a row after which the run stops
  c.train.spike = (
    0.0  # skip an update whose gradient norm exceeds this multiple of the mean; 0 = off
  )

  c.mesh = Section()  # devices along each axis; one of them may be -1, the rest
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  c.mesh.expert = 1  # splits the experts of a mixture, and the prompts
  c.mesh.context = 1  # splits the tokens of a row in updates; heads while sampling, as tensor does
  # With rollout.ahead: the last devices (of each host), this many over all hosts, only sample, and
  # the axes above are those of the others. 0: all devices do both, in turn.
  c.mesh.rollout_devices = 0
  # Slices of accelerators that a slower network connects; divides mesh.data, which alone crosses
  # it. On devices of a single slice, equal parts of them.
  c.mesh.slices = 1

  c.hosts = Section()  # for a run on several hosts; see distributed/hosts.py
  c.hosts.heartbeat = 30  # seconds of silence after which a host counts as dead
  c.hosts.wait = 1800.0  # seconds that a host waits for the others at one place

  c.eval = Section()
  c.eval.every = 0  # steps; 0 = only before the first step and after the last
  c.eval.batch_prompts = 50  # prompts generated for at once
  c.eval.samples = 0  # completions per problem for pass@k; 0 = greedy accuracy only
  # Of these completions, never of the rollouts, whose whole distribution is scored.
  c.eval.temperature = placeholder(float)  # None = rollout.temperature
  c.eval.top_k = 0  # draw from the k most probable tokens; 0 = from all
  c.eval.top_p = 1.0  # ... from the fewest tokens that have this probability together; 1 = all
  c.eval.min_p = 0.0  # ... from tokens of at least this share of the largest probability; 0 = all

  c.checkpoint = Section()
  c.checkpoint.every = 50  # steps; the last step is always saved; 0 = no other one
  c.checkpoint.seconds = 0.0  # and a finished step this long after the last save began; 0 = off
  c.checkpoint.keep = 2  # newest checkpoints to keep

  c.compilation_cache = "auto"  # beside the work directory; or a folder, or off

  c.log = Section()
  c.log.samples = 3  # completions shown at a time
  c.log.samples_every = 10  # steps; 0 = never
  c.log.tokens_every = 10  # steps whose samples hold each token with its numbers; 0 = never
  c.log.ratios = False  # with them, how the update changed each token; costs a forward pass
  c.log.trackers = ("tensorboard",)  # and wandb, trackio: each is an extra
  return c.lock()


def load(path: str, overrides: list[str] | None = None) -> ConfigDict:
  """Returns the config of an experiment file with `--config.a.b=value` overrides applied.

  Args:
    path: a Python file with `get_config()`; it is run.
    overrides: as they stand on a command line.

  Raises:
    ConfigError: the file has no config, or overrides name no field or have the wrong type; it lists
      all of them.
  """
  return override(_get_config(path), overrides or [])


def override(config: ConfigDict, overrides: list[str]) -> ConfigDict:
  """Applies `--config.a.b=value` overrides and locks the config; see `load`."""
  problems = []
  for text in overrides:
    try:
      _apply(config, text)
    except ValueError as error:
      problems.append(str(error))
  if problems:
    raise ConfigError(problems)
  return config.lock()


def to_saved(config: ConfigDict) -> dict[str, Any]:
  """Returns the config as JSON can hold it; a function becomes 'file.py:name'.

  Raises:
    ConfigError: a function has no name at the top level of a file, so that nothing could find it
      again.
  """
  problems: list[str] = []

  def plain(name: str, value: Any) -> Any:
    if isinstance(value, dict):
      return {key: plain(f"{name}.{key}" if name else key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return [plain(name, item) for item in value]
    if callable(value):
      try:
        return function_name(value)
      except ValueError as error:
        problems.append(f"{name} is {error}")
    return value

  saved = plain("", config.to_dict())
  if problems:
    raise ConfigError(problems)
  return saved


def from_saved(saved: dict[str, Any], where: object = "the saved config") -> ConfigDict:
  """Returns the config that `to_saved` wrote.

  Fields newer than it have their defaults, or what earlier versions did (`BEFORE`).

  Args:
    saved: the fields.
    where: the file in errors.

  Raises:
    ConfigError: a field holds a value of another type.
  """
  config = default_config()
  problems = _values_for_groups(config, saved)
  if not problems:
    try:
      with config.unlocked(), config.ignore_type():
        _set(config, BEFORE)
        config.update(saved)
      problems = _check_types(config, default_config())
    except (TypeError, ValueError, OverflowError) as error:  # such as 10^400 for a float
      problems = [first_line(error)]
  if problems:
    raise ConfigError([f"{where}: {problem}" for problem in problems])
  return config


def _values_for_groups(config: ConfigDict, saved: dict[str, Any], prefix: str = "") -> list[str]:
  """Returns a line for each group of fields in whose place a saved config holds a value."""
  problems = []
  for name, group in config.items():
    if isinstance(group, ConfigDict) and name in saved:
      if isinstance(saved[name], dict):
        problems += _values_for_groups(group, saved[name], f"{prefix}{name}.")
      else:
        problems.append(f"{prefix}{name} is {_shown(saved[name])}, it must be a group of fields")
  return problems


def resolve_auto(
  config: ConfigDict, saved: dict[str, Any] | None, where: object = "the saved config"
) -> ConfigDict:
  """Returns the config with a value in place of each "auto" that a work directory decides.

  Args:
    saved: the config that the work directory was begun with; None for a new one.
    where: the file it is from, in errors.
  """
  values = {}
  for name, default in AUTO.items():
    if _get(config, name) == "auto":
      begun = "auto" if saved is None else _get(from_saved(saved, where), name)
      values[name] = default if begun == "auto" else begun
  return _set(config.copy_and_resolve_references(), values).lock()


def critic_source(config: ConfigDict) -> str:
  """Returns the source of the critic: its own, or that of the policy."""
  return config.critic.source or config.model.source


def teacher_sources(config: ConfigDict) -> tuple[str, ...]:
  """Returns the names of the teachers that are models of their own."""
  sources = config.teacher.source
  if own_teacher(config):
    return ()
  return tuple(sources) if isinstance(sources, list | tuple) else (sources,) * bool(sources)


def own_teacher(config: ConfigDict) -> str:
  """Returns "policy" or "reference" for a policy that teaches itself, else ""."""
  source = config.teacher.source
  return source if source in ("policy", "reference") else ""


def with_steps(config: ConfigDict, steps: int) -> ConfigDict:
  """Returns a copy of the config with another number of steps."""
  return _set(config.copy_and_resolve_references(), {"steps": steps}).lock()


def _set(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
  for name, value in values.items():
    section, _, field = name.rpartition(".")
    (_get(config, section) if section else config)[field] = value
  return config


def at_least(low: int) -> Callable[[str], int]:
  """Returns the `type` of a command-line flag that holds a whole number from `low` to `LARGEST`.

  Example:
    >>> at_least(0)("12")
    12
  """

  def whole_number(text: str) -> int:
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", text) or not low <= int(text) <= LARGEST:
      raise argparse.ArgumentTypeError(
        f"{text!r:.80} is not a whole number of at least {low} and at most {LARGEST:,}"
      )
    return int(text)

  return whole_number


def function_name(function: Callable) -> str:
  """Returns 'file.py:name' for a function at the top level of a file.

  Raises:
    ValueError: a lambda, a nested function, or one without a file.
  """
  name = getattr(function, "__qualname__", "")
  try:
    file = inspect.getsourcefile(function)
  except TypeError:
    file = None
  if not file or not name.isidentifier():
    raise ValueError(
      f"{function!r}, which cannot be found again when the run is continued; define it with `def` "
      "at the top level of a file"
    )
  relative = os.path.relpath(file)
  return f"{file if relative.startswith('..') else relative}:{name}"


def check(config: ConfigDict, device_count: int) -> list[str]:
  """Returns everything that is wrong with the values of a config; empty if nothing is."""
  if wrong := _check_types(config, default_config()):
    return wrong
  c, problems = config, _check_ranges(config)

  def need(holds: bool, name: str, allowed: str) -> None:
    if not holds:
      problems.append(f"{name} is {_shown(_get(c, name))}, it must be {allowed}")

  for name, allowed in VALUES.items():
    need(_get(c, name) in allowed, name, _one_of(allowed))
  need(not 0 < c.train.spike <= 1, "train.spike", "0 (off) or above 1")
  need(all(map(_is_stop, c.rollout.stop)), "rollout.stop", f"strings of 1 to {STOP_LENGTH} "
       "characters of Unicode")  # fmt: skip
  names = all(isinstance(name, str) for name in c.log.trackers)
  need(names, "log.trackers", "names of trackers: tensorboard, wandb or trackio")
  ids = all(type(number) is int and number >= 0 for number in c.rollout.stop_ids)
  need(ids, "rollout.stop_ids", "token ids: integers of at least 0")
  need(_is_day(c.chat.date), "chat.date", "a day as YYYY-MM-DD, or empty")
  need(addresses.is_path(c.compilation_cache), "compilation_cache", "auto, off, or a folder of "
       "this machine")  # fmt: skip
  targets = c.lora.targets
  names = isinstance(targets, str) or (
    isinstance(targets, list | tuple) and all(isinstance(name, str) for name in targets)
  )
  sources = c.teacher.source
  texts = sources if isinstance(sources, list | tuple) else [sources]
  need(all(isinstance(source, str) for source in texts), "teacher.source",
       "the name of a model, or a list of names")  # fmt: skip
  need(names, "lora.targets", "a regular expression, or a list of names of matrices")
  for name in ("beta1", "beta2", "eps") if c.optimizer.name == "adafactor" else ():
    default = default_config().optimizer[name]
    need(c.optimizer[name] == default, f"optimizer.{name}", f"{default} (the default), since "
         "optimizer.name is 'adafactor', which does not use it")  # fmt: skip
  for name in CHOICES:
    choice = c.algorithm[name]
    need(choice is None or isinstance(choice, str) or callable(choice), f"algorithm.{name}",
         "a name, a function or 'file.py:function'")  # fmt: skip
  if problems:
    return problems
  return _check_division(c, device_count)


def _is_day(text: str) -> bool:
  try:
    return not text or datetime.date.fromisoformat(text).isoformat() == text
  except ValueError:
    return False


def _check_types(c: ConfigDict, defaults: ConfigDict, prefix: str = "") -> list[str]:
  """Checks that each field holds a value of the type of its default; objects are checked later."""
  problems = []
  for field, default in defaults.items():
    name, value, kind = f"{prefix}{field}", c[field], defaults.get_type(field)
    if isinstance(default, ConfigDict) and isinstance(value, ConfigDict):
      problems += _check_types(value, default, f"{name}.")
    elif not (value is None and default is None) and not _is_of(value, kind):
      article = TYPES.get(kind, "a group of fields")
      problems.append(f"{name} is {_shown(value)}, it must be {article}")
  return problems


def _is_of(value: Any, kind: type) -> bool:
  if kind in (int, float):
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
  return isinstance(value, list | tuple if kind is tuple else kind)


def _check_ranges(c: ConfigDict) -> list[str]:
  """Checks that every number is finite, and within the limits of `RANGES`."""
  problems = []
  for name, value in _numbers(c):
    low, high, text = RANGES.get(name, (-LARGEST, LARGEST, ""))
    above = value > low if text.startswith("above") else value >= low
    finite = isinstance(value, int) or math.isfinite(value)
    if not (finite and above and value <= min(high, LARGEST)):
      limit = f" and at most {high:,}" if finite and value > high else ""
      allowed = f"{text or 'a finite number'}{limit}"
      problems.append(f"{name} is {_shown(value)}, it must be {allowed}")
  return problems


def _is_stop(text: object) -> bool:
  if not isinstance(text, str) or not 0 < len(text) <= STOP_LENGTH:
    return False
  return not any("\ud800" <= character <= "\udfff" for character in text)


def _numbers(c: ConfigDict, prefix: str = "") -> Iterator[tuple[str, float]]:
  """Yields the name and value of every numeric field but those of open groups."""
  for name, value in c.items():
    if isinstance(value, ConfigDict):
      if f"{prefix}{name}" not in OPEN_GROUPS:
        yield from _numbers(value, f"{prefix}{name}.")
    elif isinstance(value, int | float) and not isinstance(value, bool):
      yield f"{prefix}{name}", value


def _one_of(names: tuple[str, ...]) -> str:
  *most, last = map(repr, names)
  return f"{', '.join(most)} or {last}"


def _check_division(c: ConfigDict, device_count: int) -> list[str]:
  """Checks the mesh against the devices, and the batch against the mesh and the micro-batches."""
  try:
    data, fsdp, tensor, expert, _ = mesh_sizes(c.mesh, device_count)
  except ValueError as error:
    return [str(error)]
  if problems := _check_rollout_devices(c):
    return problems
  if c.mesh.context != 1 and c.model.attention not in ("auto", "tiled"):
    return [
      f"model.attention is {c.model.attention!r}, it must be 'auto' or 'tiled' with mesh.context="
      f"{c.mesh.context}: kernels compute whole rows, which that axis splits"
    ]
  if c.train.reduction == "deterministic":
    return _check_chunks(c, data * fsdp, tensor)
  parts = max(c.train.micro_batches, 1) * max(c.train.mini_batches, 1)
  shards = data * fsdp * expert
  unit = shards * parts
  if c.rollout.prompts_per_step % unit:
    return [
      f"rollout.prompts_per_step is {c.rollout.prompts_per_step}, it must be a multiple of {unit}: "
      f"train.mini_batches={c.train.mini_batches} x train.micro_batches={c.train.micro_batches} "
      f"parts over mesh data={data} x fsdp={fsdp}{f' x expert={expert}' if expert > 1 else ''}; "
      f"{_changes_that_divide(c, shards)}"
    ]
  if c.rollout.partial_prompts % shards:
    return [
      f"rollout.partial_prompts is {c.rollout.partial_prompts}, it must be a multiple of {shards}, "
      "since the mesh splits prompts that many ways"
    ]
  return []


def rollout_mesh_shape(mesh: ConfigDict) -> tuple[int, int, int]:
  """Returns the shape of the mesh of the devices that only sample; see `mesh.rollout_devices`.

  Weights are split over `tensor` as on the devices that learn, and prompts over the rest.
  """
  tensor = max(mesh.tensor, 1)
  return mesh.rollout_devices // tensor, 1, tensor


def _check_rollout_devices(c: ConfigDict) -> list[str]:
  """Checks the devices that only sample against the rest of the config."""
  count, tensor = c.mesh.rollout_devices, c.mesh.tensor
  if not count:
    return []
  shown = f"mesh.rollout_devices is {count}"
  if not c.rollout.ahead:
    return [
      f"{shown}, but rollout.ahead is 0: sampling and learning would wait for each other; set "
      "rollout.ahead to 1 or more, or rollout_devices to 0"
    ]
  if tensor < 1 or count % tensor:
    return [
      f"{shown}, it must be a multiple of mesh.tensor={tensor}, which must be given as a number: "
      "the sampler's weights are split over as many devices"
    ]
  for axis in ("expert", "context"):
    if c.mesh[axis] != 1:
      return [
        f"{shown}, but mesh.{axis} is {c.mesh[axis]}: weights go over to the sampler split over "
        f"mesh.tensor alone; set mesh.{axis} to 1, or rollout_devices to 0"
      ]
  shards = count // tensor
  if c.rollout.prompts_per_step % shards:
    return [
      f"{shown}, which split the prompts {shards} ways, but rollout.prompts_per_step is "
      f"{c.rollout.prompts_per_step}: make it a multiple of {shards}"
    ]
  if c.train.reduction == "deterministic" and c.train.chunks % count:
    return [
      f"{shown}, it must divide train.chunks={c.train.chunks} with train.reduction='deterministic'"
    ]
  return []


def _changes_that_divide(c: ConfigDict, prompt_shards: int) -> str:
  """Returns the changes of a single number, each of which makes the prompts divide evenly."""
  prompts, micro = c.rollout.prompts_per_step, max(c.train.micro_batches, 1)
  rows = prompt_shards * max(c.train.mini_batches, 1)  # prompts of one micro-batch, at least
  changes = [
    f"--config.rollout.prompts_per_step={math.ceil(prompts / (rows * micro)) * rows * micro}"
  ]
  if prompts % rows == 0:
    fewer = max(n for n in range(1, micro) if prompts // rows % n == 0)
    changes.insert(0, f"--config.train.micro_batches={fewer} (which changes no result)")
  return f"set {' or '.join(changes)}"


def _check_chunks(c: ConfigDict, width: int, tensor: int) -> list[str]:
  """Checks the settings that `train.reduction='deterministic'` restricts."""
  chunks, problems = max(c.train.chunks, 1), []
  if chunks % width:
    problems.append(
      f"train.chunks is {chunks}, it must be a multiple of the {width} devices that "
      "train.reduction='deterministic' deals them out to (mesh data x fsdp)"
    )
  if tensor != 1:
    problems.append(f"mesh.tensor is {tensor}, it must be 1 with train.reduction='deterministic'")
  problems += [
    f"mesh.{axis} is {c.mesh[axis]}, it must be 1 with train.reduction='deterministic'"
    for axis in ("expert", "context")
    if c.mesh[axis] != 1
  ]
  for name, off in (("micro_batches", 1), ("micro_batch_tokens", 0), ("sort_by_length", False)):
    if c.train[name] != off:
      problems.append(
        f"train.{name} is {c.train[name]}, it must be {off} with train.reduction='deterministic': "
        "train.chunks takes its place"
      )
  if c.rollout.cache_gib:
    problems.append(
      f"rollout.cache_gib is {c.rollout.cache_gib:g}, it must be 0 with "
      "train.reduction='deterministic': its chunks are sampled one after another"
    )
  if c.model.remat != "none":
    problems.append(
      f"model.remat is {c.model.remat!r}, it must be 'none' with "
      "train.reduction='deterministic': recomputed layers differ in their last bits"
    )
  if c.model.attention not in ("auto", "tiled"):
    problems.append(
      f"model.attention is {c.model.attention!r}, it must be 'auto' or 'tiled' with "
      "train.reduction='deterministic'"
    )
  unit = chunks * max(c.train.mini_batches, 1)
  if c.rollout.prompts_per_step % unit:
    problems.append(
      f"rollout.prompts_per_step is {c.rollout.prompts_per_step}, it must be a multiple of {unit}: "
      f"train.chunks={chunks} in each of train.mini_batches={c.train.mini_batches}; set "
      f"--config.rollout.prompts_per_step={math.ceil(c.rollout.prompts_per_step / unit) * unit}"
    )
  return problems


def mesh_shape(mesh: ConfigDict, device_count: int) -> tuple[int, ...]:
  """Returns (data, fsdp, tensor) with a -1 resolved; ValueError if they leave devices unused.

  A mesh that splits experts has a fourth axis, expert, and one that splits rows a fifth, context.

  The devices that only sample (`mesh.rollout_devices`) are not among them.
  """
  sizes = mesh_sizes(mesh, device_count)
  return sizes if sizes[4] > 1 else sizes[:4] if sizes[3] > 1 else sizes[:3]


def mesh_sizes(mesh: ConfigDict, device_count: int) -> tuple[int, int, int, int, int]:
  """Returns (data, fsdp, tensor, expert, context) with a -1 resolved; errors as in `mesh_shape`."""
  if mesh.rollout_devices >= device_count:
    raise ValueError(
      f"mesh.rollout_devices is {mesh.rollout_devices} of {device_count} device(s), which leaves "
      f"none to learn: it must be at most {device_count - 1}; 0 lets all devices do both"
    )
  device_count -= mesh.rollout_devices
  axes = ("data", "fsdp", "tensor", "expert", "context")
  sizes = [mesh[axis] for axis in axes]
  used = [axis for axis in axes if axis in axes[:3] or mesh[axis] != 1]
  shown = f"mesh is {', '.join(f'{axis}={mesh[axis]}' for axis in used)}"
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"{shown}: sizes must be at least 1, and one of them may be -1")
  product = math.prod(size for size in sizes if size != -1)
  if device_count % product or (-1 not in sizes and product != device_count):
    raise ValueError(f"{shown}: that does not divide the {device_count} device(s) there are")
  data, *others = (device_count // product if size == -1 else size for size in sizes)
  if data % max(mesh.slices, 1):
    raise ValueError(
      f"mesh.slices is {mesh.slices}, it must divide mesh.data, which is {data} on {device_count} "
      "devices: every slice holds whole copies of the weights"
    )
  return data, *others


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
  """Returns the fields in which two config dicts differ, as `name: old -> new`."""
  lines = []
  for name in sorted(set(old) | set(new)):
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      lines += differences(a, b, f"{prefix}{name}.")
    elif a != b:
      lines.append(f"{prefix}{name}: {a!r} -> {b!r}")
  return lines


def may_change(name: str) -> bool:
  """Tells whether a continued run may have another value of a field than it was started with.

  Example:
    >>> may_change("mesh.data"), may_change("seed")
    (True, False)
  """
  return any(name == field or (field[-1] == "." and name.startswith(field)) for field in FREE)


def _get(config: ConfigDict, name: str) -> Any:
  for part in name.split("."):
    config = config[part]
  return config


def _get_config(path: str) -> ConfigDict:
  """Runs an experiment file and returns its config."""
  file = Path(path)
  if not file.is_file():
    folder = file.parent if file.parent.is_dir() else Path("experiments")
    files = sorted(str(f) for f in folder.glob("*.py"))
    raise ConfigError([f"no config file {path!r}; there are: {', '.join(files) or 'none'}"])
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    # ml_collections names the misspelt field and the nearest real one.
    raise ConfigError([f"{path}: {with_frames(error)}"]) from error
  if not isinstance(config, ConfigDict):
    raise ConfigError([f"{path}: get_config() returned {type(config).__name__}, not a ConfigDict"])
  return config


def _apply(config: ConfigDict, override: str) -> None:
  """Sets one field from `--config.a.b=value`."""
  name, equals, text = override.removeprefix("--config.").partition("=")
  if not override.startswith("--config.") or not equals:
    raise ValueError(f"{override!r} is not an override; write --config.field.name=value")
  *parents, last = name.split(".")
  group = ".".join(parents)
  if group in OPEN_GROUPS and last not in _get(config, group):
    # The task knows its settings, and the template its variables; both refuse other names.
    with config.unlocked():
      _get(config, group)[last] = _parse(text, None, object)
    return
  node = config
  for i, part in enumerate([*parents, last]):
    if isinstance(node, Section):
      part = _current_name(node, part)
      last = part if i == len(parents) else last
    if not isinstance(node, ConfigDict | dict) or part not in node:
      names = sorted(node.keys()) if isinstance(node, ConfigDict | dict) else []
      close = difflib.get_close_matches(part, names, n=1)
      hint = f"did you mean {close[0]!r}? " if close else ""
      where = ".".join([*parents, last][:i]) or "the config"
      if part in FILTERS:
        raise ValueError(f"no field {name!r}: {no_filter(part)}")
      raise ValueError(f"no field {name!r}: {hint}{where} has: {', '.join(names) or 'no fields'}")
    if i < len(parents):
      node = node[part]
  if isinstance(node, dict):  # a dict in an open group
    node[last] = _parse(text, None, object)
    return
  if isinstance(node[last], ConfigDict):
    raise ValueError(f"{name} is a group of fields: {', '.join(sorted(node[last].keys()))}")
  # A choice of an algorithm is text, even "none".
  is_choice = parents == ["algorithm"] and last in CHOICES
  kind, ignored = node.get_type(last), contextlib.nullcontext()
  if group in OPEN_GROUPS:  # the task and the template check the types of their own
    ignored = config.ignore_type()
    if kind is list or (kind is str and text.lstrip().startswith(("[", "(", "{"))):
      kind = object  # a list of rewards in place of one, for example
  try:
    with ignored:
      node[last] = text if is_choice else _parse(text, node[last], kind)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{name}={_shown(text, str)}: {error}") from None


def _parse(text: str, current: Any, kind: type) -> Any:
  """Returns `text` as the type of the field; ValueError where that is impossible."""
  try:
    value = ast.literal_eval(
      {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    )
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = _unescaped(text) if kind is tuple else text
  if kind is str:
    if isinstance(value, list | tuple | dict | set):
      raise ValueError(f"that is a {type(value).__name__}, the field holds text")
    return text
  if kind is tuple:
    if isinstance(value, dict | set):
      raise ValueError(f"that is a {type(value).__name__}, the field holds a list")
    return tuple(value) if isinstance(value, list | tuple) else (value,)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return _as_float(value)
  if kind is bool and not isinstance(value, bool):
    raise ValueError(f"{_shown(text)} is not a bool; write true or false")
  if (
    kind in (int, float)
    and (not isinstance(value, kind) or isinstance(value, bool))
    and not (value is None and current is None)
  ):
    raise ValueError(f"{_shown(text)} is not of type {kind.__name__}")
  return value


def _shown(value: Any, form: Callable[[Any], str] = repr, width: int = 120) -> str:
  """Returns a value for a message, without its end if it is longer than `width` characters."""
  try:
    text = form(value)
  except ValueError:  # an integer of more digits than Python converts
    return f"an integer of {value.bit_length()} bits"
  return text if len(text) <= width else f"{text[:width]}..."


def _as_float(value: int) -> float:
  try:
    return float(value)
  except OverflowError:
    return math.inf  # refused by `check`, with the name of the field


def _unescaped(text: str) -> str:
  r"""Returns text with `\n` and `\t` as the characters they name, as in a Python string."""
  return text.replace("\\n", "\n").replace("\\t", "\t")
