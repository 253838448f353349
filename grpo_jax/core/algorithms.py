"""Lists the algorithms in a table: each paper is a row of choices.

`policy_loss` and `advantages` take a row or its name. A variant is `dataclasses.replace(row, ...)`,
and a new algorithm is a new row. Each choice may be a name or a function of your own, which takes
the arguments of its siblings in `advantages`, `ratios`, `trust_regions`, `kl`, `corrections` or
`masks`.
"""

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.core.advantages import (
  ADVANTAGES,
  ARGUMENTS,
  RIGHT_ABOVE,
  Advantage,
  lookup_advantage,
  right_only,
)
from grpo_jax.core.checks import Array, check_share, lookup
from grpo_jax.core.corrections import CORRECTIONS, WEIGHING, lookup_correction
from grpo_jax.core.kl import KLS
from grpo_jax.core.log_ratios import BASELINES
from grpo_jax.core.masks import AVERAGES, high_entropy, token_weights
from grpo_jax.core.ratios import ANCHORS, RATIOS
from grpo_jax.core.trust_regions import TRUST_REGIONS

_CHOICES = {
  "advantage": ADVANTAGES,
  "ratio": RATIOS,
  "anchor": ANCHORS,
  "trust_region": TRUST_REGIONS,
  "kl": KLS,
  "correction": CORRECTIONS,
  "average": AVERAGES,
}
_SETTINGS = (
  "clip_low",
  "clip_high",
  "clip_dual",
  "ratio_min",
  "ratio_max",
  "tau_positive",
  "tau_negative",
  "divergence",
  "correction_min",
  "correction_max",
  "gamma",
  "lam",
  "geometric_min",
  "geometric_max",
  "off_policy_max",
  "right_above",
)
# Where the KL term stands: in the loss, or as a penalty in the reward of each token.
KL_PLACES = ("loss", "reward")
# Coefficients of terms that any row may have; 0 = no such term.
_COEFFICIENTS = ("beta", "sampler_penalty", "entropy_bonus", "nll_weight")
# Settings that must exceed a bound; all others must be at least 0.
_ABOVE = {
  "clip_dual": 1.0,
  "tau_positive": 0.0,
  "tau_negative": 0.0,
  "right_above": -float("inf"),
}
_SHARES = ("gamma", "lam")  # must lie in [0, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
  """One member of the GRPO family: its choices and the settings that they need.

  A choice is a name in its table, or a function with the arguments of the functions there. The
  keyword-only parameters of a function that are named like a setting get that setting. Settings
  that no chosen function takes must stay None, so that no number is silently without effect.

  Attributes:
    advantage: turns rewards into advantages. A key of `ADVANTAGES`, a function of total rewards
      `[P, G]`, or an `Advantage`, which says which other rewards its function needs.
    ratio: level of the importance ratio. A key of `RATIOS`.
    anchor: the earlier policy that ratio and trust region compare with. A key of `ANCHORS`.
    trust_region: bounds the update. A key of `TRUST_REGIONS`.
    kl: estimator of the KL divergence to the reference. A key of `KLS`.
    correction: corrects for a sampler that differs from the trainer. A key of `CORRECTIONS`, or
      several joined by "+".
    average: weights of the tokens. A key of `AVERAGES`.
    beta: coefficient of the KL term, at least 0. The row `grpo` has 0.04, as in its paper.
    kl_in: `loss` adds the estimator to the loss. `reward` subtracts it, without its gradient, from
      the reward of each token: the advantage of a token falls by `beta` times the estimates of this
      token and all later ones. With k1 the expected update is the gradient of mean reward minus
      beta times the KL of whole completions; other estimators are biased there. If the advantage
      is computed from rewards of tokens, the estimates are subtracted before, in
      `penalized_rewards`, so that a critic predicts them, or a whitening scales them.
    teacher_weight: coefficient of the teacher, at least 0: of its log-ratios as advantages, or of
      the divergence to it.
    teacher_discount: discount of the teacher's log-ratios; see `log_ratio_advantages`.
    teacher_divergence: adds the divergence of whole distributions to the loss instead of
      log-ratios to the advantages: 0 is KL(teacher, policy), 1 is KL(policy, teacher), numbers
      between are Jensen-Shannon divergences; see `head_divergence`.
    log_ratio_baseline: baseline of `kl_in="reward"` and of the teacher's log-ratios: `none` or
      `leave_one_out`, which needs log-probabilities [..., G, T].
    clip_low: the lower bound of the ratio is 1 - clip_low.
    clip_high: the upper bound of the ratio is 1 + clip_high.
    clip_dual: largest ratio that counts where the advantage is negative, above 1.
    ratio_min: absolute lower bound of the ratio.
    ratio_max: absolute upper bound of the ratio.
    tau_positive: sharpness of SAPO's gate where the advantage is positive, above 0.
    tau_negative: sharpness of SAPO's gate elsewhere, above 0.
    divergence: largest change of a token's probability (DPPO), in [0, 1].
    correction_min: absolute lower bound of the trainer/sampler ratio.
    correction_max: absolute upper bound of the trainer/sampler ratio.
    gamma: discount per token of an advantage from values, in [0, 1].
    lam: GAE's weight of longer estimates, in [0, 1].
    geometric_min: absolute lower bound of a sequence's geometric mean of trainer/sampler ratios.
    geometric_max: absolute upper bound of that mean.
    off_policy_max: largest mean drop of a sequence's log-probs since sampling, in nats (V3.2).
    right_above: largest reward of a wrong answer, in reward units, for `right_only` and the NLL.
    sampler_penalty: coefficient of `(logp - sampler_logp)^2`, at least 0 (Kimi K2.5).
    entropy_bonus: coefficient of the entropy, which is maximized, at least 0. With an
      `entropy_target`, its value before the first update.
    entropy_target: the bonus is adaptive: it counts while the entropy of the update before is at
      most this many nats, and its coefficient rises then, and falls otherwise (Skywork-OR1).
    entropy_delta: change of an adaptive coefficient per update.
    entropy_share: only this share of the tokens, those with the highest entropy, get an advantage
      (80/20), in (0, 1].
    nll_weight: coefficient of the negative log-likelihood of right answers, at least 0 (VAPO).
    source: paper and equation.

  Raises:
    ValueError: a name is unknown, or a setting is missing, out of range or without effect.

  Example:
    >>> import dataclasses
    >>> dataclasses.replace(ALGORITHMS["grpo"], beta=0.0, clip_high=0.28).clip_high
    0.28
    >>> from grpo_jax import group_normalized, leave_one_out
    >>> mixed = lambda rewards: group_normalized(rewards) + 0.1 * leave_one_out(rewards)
    >>> Algorithm(advantage=mixed).rewards
    ('total',)
  """

  advantage: str | Callable = "group_normalized"
  ratio: str | Callable = "token"
  anchor: str | Callable = "old"
  trust_region: str | Callable = "none"
  kl: str | Callable = "none"
  correction: str | Callable = "none"
  average: str | Callable = "sequence"
  beta: float = 0.0
  kl_in: str = "loss"
  teacher_weight: float = 0.0
  teacher_discount: float = 0.0
  teacher_divergence: float | None = None
  log_ratio_baseline: str = "none"
  clip_low: float | None = None
  clip_high: float | None = None
  clip_dual: float | None = None
  ratio_min: float | None = None
  ratio_max: float | None = None
  tau_positive: float | None = None
  tau_negative: float | None = None
  divergence: float | None = None
  correction_min: float | None = None
  correction_max: float | None = None
  gamma: float | None = None
  lam: float | None = None
  geometric_min: float | None = None
  geometric_max: float | None = None
  off_policy_max: float | None = None
  right_above: float | None = None
  sampler_penalty: float = 0.0
  entropy_bonus: float = 0.0
  entropy_target: float | None = None
  entropy_delta: float | None = None
  entropy_share: float | None = None
  nll_weight: float = 0.0
  source: str = ""

  def __post_init__(self) -> None:
    for kind in _CHOICES:
      self._functions(kind)
    takers = ("advantage", "trust_region", "correction")
    taken = {name: p for kind in takers for name, p in self._parameters(kind).items()}
    if self.nll_weight > 0:
      taken |= {"right_above": inspect.signature(right_only).parameters["right_above"]}
    required = {name for name, parameter in taken.items() if parameter.default is parameter.empty}
    present = {name for name in _SETTINGS if getattr(self, name) is not None}
    if present - taken.keys():
      raise ValueError(
        f"{', '.join(sorted(present - taken.keys()))} has no effect with advantage="
        f"{self.advantage!r}, trust_region={self.trust_region!r} and correction="
        f"{self.correction!r}; set it to None. "
        f"These choices take: {', '.join(sorted(taken)) or 'no settings'}"
      )
    if required - present:
      raise ValueError(
        f"trust_region={self.trust_region!r} with correction={self.correction!r} needs "
        f"{', '.join(sorted(required - present))}"
      )
    if self.kl_in not in KL_PLACES:
      raise ValueError(f"unknown kl_in {self.kl_in!r}; known: {', '.join(KL_PLACES)}")
    lookup("log_ratio_baseline", BASELINES, self.log_ratio_baseline)
    self._check_numbers(present)
    self._check_teacher()
    self._check_together()

  def _check_numbers(self, present: set[str]) -> None:
    for name in (*_COEFFICIENTS, *sorted(present)):
      value = getattr(self, name)
      if name in _ABOVE and not value > _ABOVE[name]:
        raise ValueError(f"{name} must be above {_ABOVE[name]}, got {value}")
      if name not in _ABOVE and not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
      if name in _SHARES:
        check_share(name, value)
    for kind in ("ratio", "correction", "geometric"):
      low, high = f"{kind}_min", f"{kind}_max"
      if {low, high} <= present and getattr(self, low) > getattr(self, high):
        raise ValueError(
          f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}: nothing lies between"
        )
    for name in _COEFFICIENTS:
      if getattr(self, name) == float("inf"):
        raise ValueError(f"{name} must be finite, got inf")
    if self.beta > 0 and self.kl == "none":
      names = ", ".join(name for name in KLS if name != "none")
      raise ValueError(f"beta={self.beta} has no effect with kl='none'; known: {names}")

  def _check_teacher(self) -> None:
    if not 0 <= self.teacher_weight < float("inf"):
      raise ValueError(f"teacher_weight must be at least 0 and finite, got {self.teacher_weight}")
    for name in ("teacher_discount", "teacher_divergence"):
      value = getattr(self, name)
      if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
      if value and self.teacher_weight == 0:
        raise ValueError(f"{name}={value} has no effect with teacher_weight=0")
    if self.teacher_discount > 0 and self.teacher_divergence is not None:
      raise ValueError(
        f"teacher_discount={self.teacher_discount} has no effect with teacher_divergence="
        f"{self.teacher_divergence}: a divergence has no later tokens"
      )

  def _check_together(self) -> None:
    """Raises for terms of the loss that do not go together."""
    if (self.entropy_target is None) != (self.entropy_delta is None):
      raise ValueError(
        f"entropy_target={self.entropy_target} and entropy_delta={self.entropy_delta}: an adaptive "
        "entropy bonus needs both, a fixed one neither"
      )
    for name in ("entropy_target", "entropy_delta"):
      if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
        raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
    if self.entropy_share is not None and not 0 < self.entropy_share <= 1:
      raise ValueError(f"entropy_share must be above 0 and at most 1, got {self.entropy_share}")
    if self.entropy_share is not None and "values" in self.rewards:
      raise ValueError(
        f"entropy_share={self.entropy_share} has no effect with advantage={self.advantage!r}: a "
        "critic gives the advantages of tokens; set it to None"
      )
    parts = self.correction.split("+") if isinstance(self.correction, str) else ()
    if self.anchor == "sampler" and any(part in WEIGHING for part in parts):
      raise ValueError(
        f"correction={self.correction!r} with anchor='sampler' would correct twice: the ratio to "
        "the sampler holds these weights already. Set correction to 'none' or to a mask, or anchor "
        "to 'old'"
      )

  def _functions(self, kind: str) -> list[Callable]:
    """Returns the functions chosen for `kind`: one, or those of a chain of corrections."""
    choice = getattr(self, kind)
    if kind == "correction":
      return lookup_correction(choice)
    function = lookup(kind, _CHOICES[kind], choice)
    return [function.function if isinstance(function, Advantage) else function]

  def _parameters(self, kind: str) -> dict[str, inspect.Parameter]:
    """Returns the parameters of the chosen functions that are settings, by name."""
    functions = self._functions(kind)
    parameters = [p for f in functions for p in inspect.signature(f).parameters.values()]
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in _SETTINGS}

  def settings(self, kind: str) -> dict[str, float]:
    """Returns the settings that the function chosen for `kind` takes, by name.

    A setting of None is left out: the function has a default for it.

    Example:
      >>> ALGORITHMS["dapo"].settings("trust_region")
      {'clip_low': 0.2, 'clip_high': 0.28}
    """
    values = {name: getattr(self, name) for name in self._parameters(kind)}
    return {name: value for name, value in values.items() if value is not None}

  @property
  def rewards(self) -> tuple[str, ...]:
    """The kinds of rewards that the advantage needs; see `Advantage`."""
    return lookup_advantage(self.advantage).rewards

  @property
  def of_token_rewards(self) -> bool:
    """True if the advantage is computed from rewards of tokens, which a KL term may lower."""
    return "values" in self.rewards or "tokens" in self.rewards

  @property
  def needs_sampler(self) -> bool:
    """True if the loss cannot do without the log-probs that the sampler recorded."""
    return self.correction != "none" or self.sampler_penalty > 0

  @property
  def compares_with_sampler(self) -> bool:
    """True if the ratio or a correction makes up for a policy that has moved on since sampling."""
    return self.anchor != "old" or self.correction != "none"

  @property
  def needs_old(self) -> bool:
    """True if several updates on one batch need the log-probs from before the first of them."""
    return self.anchor != "sampler" or bool(self.penalizes) or self.teacher_weight > 0

  @property
  def penalizes(self) -> str:
    """Names what the KL term of `kl_in="reward"` is subtracted from; "" without such a term.

    It is "advantages", in `policy_loss`, or "token_rewards", if the advantages are computed from
    them.
    """
    if self.beta == 0 or self.kl_in != "reward":
      return ""
    return "token_rewards" if self.of_token_rewards else "advantages"

  @property
  def needs_entropy(self) -> bool:
    """True if the loss has an entropy bonus, fixed or adaptive."""
    return self.entropy_bonus > 0 or self.entropy_target is not None

  @property
  def every_group_learns(self) -> bool:
    """True if a group whose advantages are all 0 has a gradient, from another term of the loss."""
    terms = (self.beta, self.teacher_weight, self.sampler_penalty, self.nll_weight)
    return self.needs_entropy or any(term > 0 for term in terms)


ALGORITHMS: dict[str, Algorithm] = {
  "reinforce": Algorithm(
    advantage="group_centered",
    source="Williams 1992; the base case of the derivation, with the group mean as baseline",
  ),
  "rloo": Algorithm(
    advantage="leave_one_out",
    average="constant",
    source="RLOO, arXiv 2402.14740, eq. 8; summed over tokens, up to the constant 1 / max_length",
  ),
  "grpo": Algorithm(
    advantage="group_normalized",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    kl="k3",
    beta=0.04,
    average="sequence",
    source="GRPO (DeepSeekMath), arXiv 2402.03300, eq. 3 and 4",
  ),
  "dr_grpo": Algorithm(
    advantage="group_centered",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    average="constant",
    source="Dr. GRPO, arXiv 2503.20783, section 3",
  ),
  "dapo": Algorithm(
    advantage="group_normalized",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.28,
    average="token",
    source="DAPO, arXiv 2503.14476, eq. 8",
  ),
  "gspo": Algorithm(
    advantage="group_normalized",
    ratio="sequence",
    trust_region="clip",
    clip_low=3e-4,
    clip_high=4e-4,
    average="sequence",
    source="GSPO, arXiv 2507.18071, eq. 5 to 7; bounds from section 5.1",
  ),
  "gspo_token": Algorithm(
    advantage="group_normalized",
    ratio="sequence_token",
    trust_region="clip",
    clip_low=3e-4,
    clip_high=4e-4,
    average="sequence",
    source="GSPO-token, arXiv 2507.18071, eq. 13 and 14",
  ),
  "cispo": Algorithm(
    advantage="group_normalized",
    trust_region="cispo",
    ratio_min=0.0,
    ratio_max=5.0,
    average="token",
    # The paper imposes no lower bound (section 3.1) and does not print its upper one. ScaleRL finds
    # no difference between 4, 5 and 8 (section 3.2).
    source="CISPO (MiniMax-M1), arXiv 2506.13585, eq. 4; cap as in ScaleRL, arXiv 2510.13786",
  ),
  "scale_rl": Algorithm(
    advantage="batch_whitened",
    trust_region="cispo",
    ratio_min=0.0,
    ratio_max=5.0,
    average="prompt",
    source="ScaleRL, arXiv 2510.13786, section 4: CISPO, deviation of the batch, prompt average",
  ),
  "sapo": Algorithm(
    advantage="group_normalized",
    trust_region="sapo",
    tau_positive=1.0,
    tau_negative=1.05,
    average="sequence",
    source="SAPO, arXiv 2511.20347, section 3; constants from its experiments, section 5",
  ),
  "dppo": Algorithm(
    advantage="group_centered",
    anchor="sampler",
    trust_region="dppo_tv",
    divergence=0.15,
    ratio_max=20.0,
    average="constant",
    # The paper compares with the policy that sampled, not with a recomputed one (section 5.2), and
    # so do its authors' code and script for verl, which averages as Dr. GRPO does. The cap is the
    # default of that code in verl; sail-sg/Stable-RL has 10, and the script turns it off.
    source="DPPO with binary total variation, arXiv 2602.04879, anchor from section 5.2",
  ),
  "prime_rl": Algorithm(
    advantage="group_centered",
    anchor="sampler",
    trust_region="dppo_tv",
    divergence=0.2,
    ratio_max=1e9,
    sampler_penalty=1e-3,
    average="token",
    # Kimi K2.5 adds the square to its policy loss and prints no numbers. These, and the mask of
    # DPPO in place of its clip, are the defaults of prime-rl. Tokens that the mask stops have the
    # square too. prime-rl has no cap of the ratio.
    source="squared log-ratio to the sampler: Kimi K2.5, arXiv 2602.02276; numbers of prime-rl",
  ),
  "lite_ppo": Algorithm(
    advantage="batch_normalized",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    average="token",
    source="Lite PPO, arXiv 2508.08221, section 5: group mean, deviation of the batch, token loss",
  ),
  "max_rl": Algorithm(
    advantage="max_rl",
    average="token",
    # The paper's estimator sums over the tokens of a completion (average="constant"). Its authors'
    # code, tajwarfahim/maxrl, averages over tokens, and one update per rollout never clips.
    source="MaxRL, arXiv 2602.02710, average as in its authors' code",
  ),
  "gdpo": Algorithm(
    advantage="multi_objective",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    average="token",
    source="GDPO, arXiv 2601.05242",
  ),
  "online_rft": Algorithm(
    advantage="right_only",
    right_above=0.5,
    average="sequence",
    source="Online RFT: DeepSeekMath, arXiv 2402.03300, section 5.2.1 and appendix A.1.3",
  ),
  "reinforce_pp": Algorithm(
    advantage="token_whitened",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    average="token",
    # Without the paper's KL penalty in the reward, which is none of the loss.
    source="REINFORCE++, arXiv 2501.03262v9, section 3.2",
  ),
  "reinforce_pp_kl": Algorithm(
    advantage="returns_whitened",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    kl="k1",
    kl_in="reward",
    beta=0.01,
    average="token",
    # The paper does not print beta; this is the default of its authors' code, OpenRLHF.
    source="REINFORCE++ with its KL penalty in the reward, arXiv 2501.03262v9, section 3.2",
  ),
  "reinforce_pp_baseline": Algorithm(
    advantage="centered_token_whitened",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    kl="k2",
    beta=0.001,
    average="token",
    source="REINFORCE++ with baseline, arXiv 2501.03262v9, section 3.3",
  ),
  "ppo": Algorithm(
    advantage="gae_whitened",
    gamma=1.0,
    lam=0.95,
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    average="token",
    source="PPO, arXiv 1707.06347, eq. 7; advantages from a critic, arXiv 1506.02438, eq. 16",
  ),
  "rloo_kl": Algorithm(
    advantage="leave_one_out",
    kl="k1",
    kl_in="reward",
    beta=0.05,
    log_ratio_baseline="leave_one_out",
    average="constant",
    source="RLOO with the KL in the reward, arXiv 2402.14740, eq. 3 and 8; beta as in TRL",
  ),
  "opd": Algorithm(
    advantage="zero_advantages",
    teacher_weight=1.0,
    average="token",
    source="On-policy distillation: Thinking Machines 2025, after GKD, arXiv 2306.13649",
  ),
}


def lookup_algorithm(algorithm: str | Algorithm) -> Algorithm:
  """Returns the row of that name; an `Algorithm` stands for itself.

  Raises:
    ValueError: the name is not in `ALGORITHMS`.

  Example:
    >>> lookup_algorithm("dr_grpo").advantage
    'group_centered'
  """
  if isinstance(algorithm, Algorithm):
    return algorithm
  return lookup("algorithm", ALGORITHMS, algorithm)


def advantages(
  algorithm: str | Algorithm | Advantage | Callable,
  rewards: Float[Array, "P G"] | None = None,
  *,
  rewards_per_function: Float[Array, "R P G"] | None = None,
  reward_weights: Float[Array, "R"] | None = None,
  step_rewards: Float[Array, "P G S"] | None = None,
  step_ends: Int[Array, "P G S"] | None = None,
  token_rewards: Float[Array, "P G T"] | None = None,
  values: Float[Array, "P G T"] | None = None,
  mask: Bool[Array, "P G T"] | None = None,
  entropy: Float[Array, "P G T"] | None = None,
) -> Float[Array, "P G"] | Float[Array, "P G T"]:
  """Returns the advantages of an algorithm, from those of the rewards given that it needs.

  Pass everything there is: the arguments that the algorithm's advantage does not need are ignored.

  Args:
    algorithm: a key of `ALGORITHMS` or `ADVANTAGES`, an `Algorithm`, an `Advantage`, or a function
      of total rewards.
    rewards: the total reward of each completion, in reward units; NaN = not scored.
    rewards_per_function: the rewards of each of R reward functions.
    reward_weights: the weight of each reward function.
    step_rewards: the reward of each step; NaN = no such step.
    step_ends: the index of each step's last token, counted from 0 in the completion.
    token_rewards: the reward of each token.
    values: the value of each token under a critic.
    mask: true on completion tokens.
    entropy: of the distribution that each token was drawn from, in nats, for `entropy_share`.

  Returns:
    One advantage per completion `[P, G]`, or one per token `[P, G, T]`: from an estimator that
    gives them, and with an `entropy_share`, where all other tokens get 0.

  Raises:
    ValueError: a name is unknown, an argument that is needed is None, a built-in function gets
      groups of one (its `allow_groups_of_one` accepts them), or a function returns another shape.

  Example:
    >>> import jax.numpy as jnp
    >>> rewards = jnp.array([[3.0, 0.0, 0.0]])
    >>> advantages("dr_grpo", rewards).tolist()
    [[2.0, -1.0, -1.0]]
    >>> from grpo_jax import group_centered, leave_one_out
    >>> advantages(lambda r: group_centered(r) + leave_one_out(r), rewards).tolist()
    [[5.0, -2.5, -2.5]]
  """
  if isinstance(algorithm, str) and algorithm in ALGORITHMS:
    algorithm = ALGORITHMS[algorithm]
  settings, share = {}, None
  if isinstance(algorithm, Algorithm):
    settings, share = algorithm.settings("advantage"), algorithm.entropy_share
    algorithm = algorithm.advantage
  choice = lookup("algorithm or advantage", {**ALGORITHMS, **ADVANTAGES}, algorithm)
  advantage = lookup_advantage(choice)
  available = {
    "rewards": rewards,
    "rewards_per_function": rewards_per_function,
    "reward_weights": reward_weights,
    "step_rewards": step_rewards,
    "step_ends": step_ends,
    "token_rewards": token_rewards,
    "values": values,
    "mask": mask,
  }
  names = [name for kind in advantage.rewards for name in ARGUMENTS[kind]]
  missing = [name for name in names if available[name] is None]
  if missing:
    raise ValueError(f"advantage {_name(advantage)} needs {', '.join(missing)}")
  result = advantage(*(available[name] for name in names), **settings)
  _check_result(advantage, result, available[names[0]])
  return result if share is None else _of_high_entropy(result, entropy, mask, share)


def nll_weights(
  algorithm: str | Algorithm, rewards: Float[Array, "P G"], mask: Bool[Array, "P G T"]
) -> Float[Array, "P G T"]:
  """Returns 1 / (tokens of right answers in the batch) on those tokens, and 0 on the others.

  They are the weights of the term `nll_weight` of a row, as `token_weights` gives those of the
  rest. An answer is right if its reward is above `right_above`, 0.5 unless the row has another.

  Args:
    rewards: the total reward of each completion of the whole global batch; NaN = not scored.
    mask: true on completion tokens.

  References:
    VAPO, arXiv 2504.05118, section 4.3.

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[[True, True], [True, False]]])
    >>> nll_weights("grpo", jnp.array([[1.0, 0.0]]), mask).tolist()
    [[[0.5, 0.5], [0.0, 0.0]]]
  """
  above = lookup_algorithm(algorithm).right_above
  right = right_only(rewards, right_above=RIGHT_ABOVE if above is None else above) > 0
  return token_weights(mask & right[..., None], "token")


def _of_high_entropy(
  values: jax.Array, entropy: Array | None, mask: Array | None, share: float
) -> Float[jax.Array, "P G T"]:
  """Returns the advantages of the tokens with the highest entropy, and 0 for the others."""
  missing = [name for name, array in (("entropy", entropy), ("mask", mask)) if array is None]
  if missing:
    raise ValueError(f"entropy_share={share} needs {', '.join(missing)}")
  values = values if values.ndim == 3 else values[..., None]
  return jnp.where(high_entropy(entropy, mask, share), values, 0.0)


def _check_result(advantage: Advantage, result: jax.Array, rewards: Array) -> None:
  """Raises unless the advantages have the groups of `rewards`, the first argument, and no more."""
  shape, groups = jnp.shape(result), jnp.shape(rewards)
  groups = groups[1:] if advantage.rewards[0] == "each" else groups[:2]
  if shape[:2] != groups or len(shape) > 3:
    raise ValueError(
      f"advantage {_name(advantage)} returned shape {shape}, expected {groups} (one per "
      f"completion) or {(*groups, 'T')} (one per token)"
    )


def _name(advantage: Advantage) -> str:
  return getattr(advantage.function, "__name__", repr(advantage.function))
