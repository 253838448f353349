"""Checks settings that are valid alone and do not go together, before anything compiles."""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from grpo_jax import config as configs
from grpo_jax import curriculum as curricula
from grpo_jax import tokens
from grpo_jax.core.algorithms import Algorithm
from grpo_jax.demonstrations import Demonstrations
from grpo_jax.distributed import hosts
from grpo_jax.environments.tools import ToolEpisodes
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.io.weights import Weights
from grpo_jax.observations import ObservationEncoder
from grpo_jax.tasks.base import Task
from grpo_jax.teachers import TeacherWeights


def expert_misfits(c: ConfigDict, model: ModelConfig) -> list[str]:
  """Checks the settings that are for a mixture of experts against the experts of the model."""
  axis, count = c.mesh.expert, model.experts
  if c.train.freeze_router and not count:
    return [f"train.freeze_router is true, and {c.model.source} has no router: set it to false"]
  if c.train.balance and not count:
    return [f"train.balance is {c.train.balance}, and {c.model.source} has no router: set it to 0"]
  if c.train.balance and (c.train.freeze_router or c.lora.rank):
    frozen = "train.freeze_router is true" if c.train.freeze_router else "adapters are trained"
    return [
      f"train.balance is {c.train.balance}, and {frozen}: the router that it would balance stays "
      "as it is; set it to 0"
    ]
  if axis in (1, -1) or (count and count % axis == 0):
    return []
  has = f"{count} experts, which that does not divide" if count else "no experts"
  return [
    f"mesh.expert is {axis}, and {c.model.source} has {has}: set it to "
    + (f"a divisor of {count}" if count else "1, and use mesh.fsdp or mesh.data")
  ]


def replays_routes(c: ConfigDict, model: ModelConfig) -> bool:
  """Tells whether the update uses the experts that were chosen while sampling."""
  return model.experts > 0 and c.train.routes == "sampled" and not c.rollout.given


def given_misfits(c: ConfigDict, task: Task) -> list[str]:
  """Checks given completions against the settings that sample them, or sample more."""
  column, problems = c.rollout.given, []
  if not column:
    return problems
  first = next(iter(task.splits["train"]), None)
  if first is not None and column not in first.columns:
    problems.append(
      f"rollout.given is {column!r}, and the problems of task {task.name!r} have no such column: "
      f"they have {', '.join(first.columns) or 'none'}"
    )
  if task.environment is not None:
    problems.append(
      f"rollout.given is {column!r}, and episodes of several turns are played, not given: leave it "
      "empty, or take a task without an environment"
    )
  problems += [
    f"rollout.given is {column!r}, and rollout.{name} is {c.rollout[name]}, which is for samples: "
    "set it to 0"
    for name in ("ahead", "max_resamples", "cache_gib", "partial_tokens")
    if c.rollout[name]
  ]
  return problems


def run_misfits(
  c: ConfigDict,
  model: ModelConfig,
  task: Task,
  algorithm: Algorithm | None,
  prompt_length: int,
) -> list[str]:
  """Checks settings that are valid alone but not together."""
  problems = expert_misfits(c, model) + given_misfits(c, task)
  if replays_routes(c, model) and c.rollout.cache_gib:
    problems.append(
      "train.routes is 'sampled', and sampling within rollout.cache_gib records no routes: "
      "set --config.train.routes=fresh, or rollout.cache_gib=0"
    )
  problems += partial_misfits(c, model, task)
  if replays_routes(c, model) and task.environment is not None:
    problems.append(
      "train.routes is 'sampled', and episodes of several turns record no routes of experts: set "
      "--config.train.routes=fresh"
    )
  budget = prompt_length + c.rollout.completion_length
  if budget > model.context:
    problems.append(
      f"rollout.completion_length is {c.rollout.completion_length}: with prompts of "
      f"{prompt_length} tokens that makes {budget}, and {c.model.source} has a context of "
      f"{model.context}; lower it to {max(model.context - prompt_length, 0)} or less"
    )
  if task.foreign and (c.rewards.workers == 0 or not c.rewards.isolate):
    problems.append(
      f"the rewards of task {task.name!r} are code of another package, which reads what the model "
      "writes: it runs in isolated worker processes only; set rewards.workers to 1 or more and "
      "rewards.isolate to true"
    )
  if model.labels:
    problems.append(
      f"model.source {c.model.source!r} is a classification model, which cannot write text: it can "
      "be a reward_model.source"
    )
  rewarded = task.step_rewards is not None or task.environment is not None
  if algorithm and "steps" in algorithm.rewards and not rewarded:
    problems.append(
      f"algorithm.advantage {algorithm.advantage!r} needs rewards for steps, and task "
      f"{task.name!r} has no step_rewards; choose another advantage or give the task this function"
    )
  weights = {name: weight for name, (_, weight) in task.rewards.items()}
  learns = any(weights.values()) or task.environment is not None  # an environment gives rewards
  if not all(math.isfinite(weight) for weight in weights.values()) or not learns:
    problems.append(
      f"the weights of the rewards are {weights}: they must be finite, and one of them not 0, or "
      "no completion has a reward"
    )
  if c.data.curriculum != curricula.OFF and (c.epochs or not c.data.shuffle):
    name, off = ("epochs", "0, and steps") if c.epochs else ("data.shuffle", "true")
    problems.append(
      f"{name} is {c.epochs or c.data.shuffle!r}, but data.curriculum is {c.data.curriculum!r}, "
      f"which draws problems by their pass rates and not in passes; set {name} to {off}, or "
      "data.curriculum to 'off'"
    )
  if algorithm:
    problems += teacher_misfits(c, algorithm) + sampler_misfits(c, algorithm)
  taught = configs.own_teacher(c) == "reference"
  if algorithm and algorithm.beta == 0 and c.reference.sync_every and not taught:
    problems.append(
      f"reference.sync_every is {c.reference.sync_every}, but algorithm.beta is 0: without a KL "
      "term there is no reference; set sync_every to 0 or beta above 0"
    )
  return problems + _episode_misfits(c, task)


def _episode_misfits(c: ConfigDict, task: Task) -> list[str]:
  """Checks the limits of episodes against the task and the budget of tokens."""
  if task.environment is None:
    defaults = configs.default_config().episode
    changed = [f"episode.{name}" for name in defaults if c.episode[name] != defaults[name]]
    if not changed:
      return []
    return [
      f"{', '.join(changed)} has no effect: task {task.name!r} has neither tools nor an "
      "environment; set task.settings.tools or task.settings.environment, or leave it out"
    ]
  problems = [
    "episode.in_step is False, so that no episode waits for the environment of another, but "
    "rewards.workers is 0: this process calls them one after another; set rewards.workers to as "
    "many as may be slow at once, or in_step=True"
  ] * (not c.episode.in_step and c.rewards.workers == 0)
  problems += [
    f"episode.{name} is {c.episode[name]}, it must be at most rollout.completion_length="
    f"{c.rollout.completion_length}, the budget of the whole episode in tokens"
    for name in ("turn_length", "observation_length")
    if c.episode[name] > c.rollout.completion_length
  ]
  if task.turns > c.episode.turns:
    problems.append(
      f"episode.turns is {c.episode.turns}, and an episode of task {task.name!r} takes up to "
      f"{task.turns} turns: the others would be cut off; set --config.episode.turns={task.turns}"
    )
  if isinstance(task.environment, ToolEpisodes) and c.episode.turns == 1:
    problems.append(
      f"episode.turns is 1, it must be at least 2 for the tools of task {task.name!r}: the model "
      "reads the result of a call before its next turn"
    )
  return problems


def critic_misfits(
  c: ConfigDict, critic: Weights | None, algorithm: Algorithm | None, prompt_length: int
) -> list[str]:
  """Checks the settings of a critic against those of the policy."""
  if algorithm is None:
    return []
  problems, has_critic = [], "values" in algorithm.rewards
  changed = [
    name for name, value in configs.default_config().critic.items() if c.critic[name] != value
  ]
  if changed and not has_critic:
    problems.append(
      f"critic.{changed[0]} is {c.critic[changed[0]]!r}, but algorithm.advantage "
      f"{algorithm.advantage!r} has no critic; choose algorithm.name=ppo, or leave it out"
    )
  shared = c.critic.trunk == "policy"
  others = ("source", "learning_rate", "warmup_steps") if shared else ("weight",)
  problems += [
    f"critic.{name} is {c.critic[name]!r}, but critic.trunk is {c.critic.trunk!r}, which does not "
    "use it; leave it out"
    for name in others
    if name in changed and has_critic
  ]
  if shared and has_critic and c.lora.rank:
    problems.append(
      f"critic.trunk is 'policy', but lora.rank is {c.lora.rank}: only adapters are trained, and a "
      "value head is none; set critic.trunk to 'own', or lora.rank to 0"
    )
  budget = prompt_length + c.rollout.completion_length
  if critic is not None and budget > critic.config.context:
    problems.append(
      f"critic.source {configs.critic_source(c)!r} has a context of {critic.config.context} "
      f"tokens, and prompts and completions have up to {budget}; choose another critic, or lower "
      "rollout.completion_length"
    )
  return problems


def check_observations(task: Task, tokenizer: tokens.AnyTokenizer) -> None:
  """Raises ValueError if the chat template cannot go on after a turn of the model."""
  first = next((split[0] for split in task.splits.values() if split), None)
  if first is None or isinstance(first.prompt, str):
    return
  answer = [{"role": "tool", "name": "tool", "content": "?"}] if task.tools else "?"
  ObservationEncoder(tokenizer)(answer, last=-1, chat=True)


def sampler_misfits(c: ConfigDict, algorithm: Algorithm) -> list[str]:
  """Checks that the loss makes up for rollouts of another policy, or leaves it out by name.

  They are of earlier parameters, or of rounded ones.
  """
  problems, named = [], c.algorithm.correction == "none"
  if c.rollout.weights == "int8" and c.lora.quantize != "none":
    problems.append(
      f"rollout.weights is 'int8', but lora.quantize is {c.lora.quantize!r}: the sampler reads the "
      "matrices of a quantized base as they are; set one of them to its default"
    )
  if algorithm.compares_with_sampler or named:
    return problems
  defaults = configs.default_config().rollout
  return problems + [
    f"rollout.{name} is {c.rollout[name]!r}, but algorithm {c.algorithm.name!r} takes rollouts "
    "to be from the policy it updates: set algorithm.correction='token_truncate' with "
    "algorithm.correction_max=2.0; or algorithm.anchor='sampler', which compares with the policy "
    "that sampled; or algorithm.correction='none', by name, to learn from them as they are"
    for name in ("ahead", "partial_tokens", "weights")
    if c.rollout[name] != defaults[name]
  ]


def partial_misfits(c: ConfigDict, model: ModelConfig, task: Task) -> list[str]:
  """Checks the settings of completions that go on in later steps."""
  r, defaults = c.rollout, configs.default_config()
  tokens, prompts = r.partial_tokens, r.partial_prompts
  if not tokens:
    return [
      f"rollout.partial_prompts is {prompts}, but rollout.partial_tokens is 0, which samples whole "
      "completions: set it to the tokens of a round, or partial_prompts to 0"
    ] * bool(prompts)
  problems, shown = [], f"rollout.partial_tokens is {tokens}"
  if tokens >= r.completion_length and task.environment is None:
    problems.append(
      f"{shown}, it must be below rollout.completion_length={r.completion_length}, or every round "
      "samples whole completions; lower it, or set it to 0"
    )
  if not prompts:
    problems.append(
      f"{shown}, but rollout.partial_prompts is 0, so that a step would wait for all of its "
      f"completions: set it to {r.prompts_per_step}, for example, or partial_tokens to 0"
    )
  names = {
    "rollout.ahead": r.ahead, "rollout.max_resamples": r.max_resamples,
    "rollout.cache_gib": r.cache_gib, "data.curriculum": c.data.curriculum,
    "train.reduction": c.train.reduction,
  }  # fmt: skip
  for name, value in names.items():
    section, field = name.split(".")
    if value != (default := defaults[section][field]):
      problems.append(
        f"{shown}, which does not go together with {name}={value!r}: set {name}={default!r}, or "
        "partial_tokens=0"
      )
  if replays_routes(c, model):
    problems.append(
      f"{shown}, and train.routes is 'sampled', but a completion that goes on is read again, with "
      "other experts: set --config.train.routes=fresh, or partial_tokens=0"
    )
  if task.environment is not None:
    turn = c.episode.turn_length or r.completion_length
    problems += [
      f"{shown}, it must be {turn} for the episodes of task {task.name!r}, whose rounds are turns: "
      "set it to episode.turn_length, or to 0"
    ] * (tokens != turn)
    problems += [
      f"{shown}, and episode.in_step is False: which episodes are over would depend on how long "
      "their environments take; set --config.episode.in_step=True, or partial_tokens=0"
    ] * (not c.episode.in_step)
  if (count := hosts.own_shard()[1]) > 1:
    problems.append(
      f"{shown}, it must be 0 on several hosts ({count} here): the prompts of a host would not be "
      "complete at the same time as those of the others"
    )
  return problems


def teacher_misfits(c: ConfigDict, algorithm: Algorithm) -> list[str]:
  """Checks that a teacher and the algorithm that learns from it come together."""
  name, weight = c.algorithm.name, algorithm.teacher_weight
  has_teacher = bool(c.teacher.source)
  if weight > 0 and not has_teacher:
    return [
      f"algorithm.teacher_weight is {weight:g} (of the row {name!r}, or set), but there is no "
      "teacher: set teacher.source, or the weight to 0"
    ]
  if weight == 0 and has_teacher:
    return [
      f"teacher.source is {c.teacher.source!r}, but algorithm.teacher_weight is 0, so the teacher "
      f"has no effect: set the weight above 0, or take the algorithm 'opd' in place of {name!r}"
    ]
  if algorithm.advantage == "zero_advantages" and weight == 0:
    return [f"algorithm {name!r} takes nothing from rewards and has no teacher: nothing is learned"]
  if algorithm.advantage == "zero_advantages" and c.rollout.max_resamples:
    return [
      f"rollout.max_resamples is {c.rollout.max_resamples}, but algorithm {name!r} takes nothing "
      "from rewards, so that no group would ever do; set it to 0"
    ]
  return []


def demonstration_misfits(
  c: ConfigDict,
  demonstrations: Demonstrations,
  model: ModelConfig,
  task: Task,
  algorithm: Algorithm | None,
) -> list[str]:
  """Checks the settings of a policy that teaches itself."""
  problems, source = [], c.teacher.source
  if demonstrations.length + c.rollout.completion_length > model.context:
    problems.append(
      f"teacher.source is {source!r}, whose prompts have up to {demonstrations.length} tokens; "
      f"with completions that exceeds the context of {c.model.source}, {model.context}: set "
      "teacher.prompt_length, and longer ones have no teacher"
    )
  if source == "reference" and not c.reference.sync_every:
    problems.append(
      "teacher.source is 'reference', but reference.sync_every is 0: there is no reference that "
      "follows the policy; set it to 1, and reference.sync_share to 0.05, for example"
    )
  if algorithm and algorithm.teacher_divergence is not None:
    problems.append(
      f"algorithm.teacher_divergence is {algorithm.teacher_divergence}, which needs a teacher that "
      f"is a model of its own, and teacher.source is {source!r}; leave it out"
    )
  columns = [*task.splits["train"][0].columns] if task.splits["train"] else ["answer"]
  if demonstrations.shows == "answer" and "answer" not in columns:
    problems.append(
      f"teacher.shows is 'answer', but problems of task {task.name!r} have no column of that name; "
      f"they have: {', '.join(columns) or 'none'}"
    )
  return problems


def vocabulary_misfits(
  algorithm: Algorithm, model: ModelConfig, teachers: Sequence[TeacherWeights]
) -> list[str]:
  """Checks that whole distributions can be compared, where the algorithm does."""
  if algorithm.teacher_divergence is None:
    return []
  return [
    f"teacher.source {teacher.source!r} has {teacher.weights.config.vocab_size} ids and the policy "
    f"{model.vocab_size}: algorithm.teacher_divergence compares whole distributions, which need "
    "the same ids; leave it out, so that the teacher scores the drawn tokens"
    for teacher in teachers
    if teacher.weights.config.vocab_size != model.vocab_size
  ]
