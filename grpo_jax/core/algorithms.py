"""The table of algorithms: a paper is a row of six choices.

Its rows are what `policy_loss` takes by name. A variant is `dataclasses.replace(row, ...)`, a new
algorithm is a new row, and any choice that is a name may also be a function of your own with the
same arguments as its siblings in `terms.py` or `advantages.py`.
"""

import dataclasses
import inspect
from collections.abc import Callable

from grpo_jax.core.advantages import ADVANTAGES
from grpo_jax.core.checks import lookup
from grpo_jax.core.corrections import CORRECTIONS
from grpo_jax.core.kl import KLS
from grpo_jax.core.masks import AVERAGES
from grpo_jax.core.ratios import RATIOS
from grpo_jax.core.trust_regions import TRUST_REGIONS

_CHOICES = {
  "advantage": ADVANTAGES,
  "ratio": RATIOS,
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
)
# Advantages of something other than one reward [P, G] per completion: several rewards, or steps.
OF_OTHER_REWARDS = ("multi_objective", "process_advantages")
# Numbers that must lie above a bound; all others must be at least 0.
_ABOVE = {"clip_dual": 1.0, "tau_positive": 0.0, "tau_negative": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
  """One member of the family: six choices and the numbers they need.

  Settings that the chosen functions do not take must stay None, so that no number stands in a
  row without effect.

  Attributes:
    advantage: rewards [P, G] -> advantages; a key of `ADVANTAGES` or a function. Those of
      `OF_OTHER_REWARDS` take more than one number per completion: the caller calls them.
    ratio: level of the importance ratio; a key of `RATIOS`.
    trust_region: what bounds the update; a key of `TRUST_REGIONS`.
    kl: estimator of the KL to the reference; a key of `KLS`.
    correction: for a sampler that is not the trainer; a key of `CORRECTIONS`.
    average: which tokens weigh how much; a key of `AVERAGES`.
    beta: coefficient of the KL term, >= 0.
    clip_low, clip_high: ratios are held in [1 - clip_low, 1 + clip_high].
    clip_dual: largest ratio that counts where the advantage is negative, > 1.
    ratio_min, ratio_max: absolute bounds of a ratio.
    tau_positive, tau_negative: sharpness of SAPO's gate by sign of the advantage.
    divergence: largest change of a token's probability (DPPO), in [0, 1].
    correction_min, correction_max: absolute bounds of the trainer/sampler ratio.
    source: paper and equation.

  Example:
    >>> import dataclasses
    >>> dataclasses.replace(ALGORITHMS["grpo"], beta=0.0, clip_high=0.28).clip_high
    0.28
  """

  advantage: str | Callable = "group_normalized"
  ratio: str | Callable = "token"
  trust_region: str | Callable = "none"
  kl: str | Callable = "none"
  correction: str | Callable = "none"
  average: str | Callable = "sequence"
  beta: float = 0.0
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
  source: str = ""

  def __post_init__(self) -> None:
    for kind, table in _CHOICES.items():
      if not (kind == "advantage" and self.advantage in OF_OTHER_REWARDS):
        lookup(kind, table, getattr(self, kind))
    needed = set(self.settings("trust_region")) | set(self.settings("correction"))
    given = {name for name in _SETTINGS if getattr(self, name) is not None}
    if given - needed:
      raise ValueError(
        f"{', '.join(sorted(given - needed))} has no effect with trust_region="
        f"{self.trust_region!r} and correction={self.correction!r}; set it to None. "
        f"These choices take: {', '.join(sorted(needed)) or 'no settings'}"
      )
    if needed - given:
      raise ValueError(
        f"trust_region={self.trust_region!r} with correction={self.correction!r} needs "
        f"{', '.join(sorted(needed - given))}"
      )
    self._check_numbers(given)

  def _check_numbers(self, given: set[str]) -> None:
    for name in ("beta", *sorted(given)):
      value = getattr(self, name)
      if name in _ABOVE and not value > _ABOVE[name]:
        raise ValueError(f"{name} must be above {_ABOVE[name]}, got {value}")
      if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    for low, high in (("ratio_min", "ratio_max"), ("correction_min", "correction_max")):
      if {low, high} <= given and getattr(self, low) > getattr(self, high):
        raise ValueError(
          f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}: nothing lies between"
        )
    if self.beta == float("inf"):
      raise ValueError("beta must be finite, got inf")
    if self.beta > 0 and self.kl == "none":
      known = ", ".join(name for name in KLS if name != "none")
      raise ValueError(f"beta={self.beta} has no effect with kl='none'; known: {known}")

  def settings(self, kind: str) -> dict[str, float | None]:
    """The numbers that the function chosen for `kind` takes, by name."""
    function = lookup(kind, _CHOICES[kind], getattr(self, kind))
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in _SETTINGS]
    return {name: getattr(self, name) for name in names}


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
    source="CISPO (MiniMax-M1), arXiv 2506.13585, eq. 4; cap as in ScaleRL, arXiv 2510.13786",
  ),
  "sapo": Algorithm(
    advantage="group_normalized",
    trust_region="sapo",
    tau_positive=1.0,
    tau_negative=1.05,
    average="sequence",
    source="SAPO, arXiv 2511.20347",
  ),
  "dppo": Algorithm(
    advantage="group_centered",
    trust_region="dppo_tv",
    divergence=0.15,
    ratio_max=20.0,
    average="token",
    source="DPPO with total variation, arXiv 2602.04879",
  ),
  "lite_ppo": Algorithm(
    advantage="batch_normalized",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    average="token",
    source="Lite PPO, arXiv 2508.08221, section 5",
  ),
  "max_rl": Algorithm(
    advantage="max_rl",
    average="token",
    source="MaxRL, arXiv 2602.02710",
  ),
  "gdpo": Algorithm(
    advantage="multi_objective",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    average="token",
    source="GDPO, arXiv 2601.05242",
  ),
  "reinforce_pp_baseline": Algorithm(
    advantage="batch_whitened",
    trust_region="clip",
    clip_low=0.2,
    clip_high=0.2,
    kl="k2",
    beta=0.001,
    average="token",
    source="REINFORCE++-baseline, arXiv 2501.03262, section 3.3",
  ),
}
