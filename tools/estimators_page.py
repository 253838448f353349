"""Writes the page `docs/estimators.md` with the values of `tests/helpers/estimators.py`.

python -m tools.estimators_page > docs/estimators.md
"""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from grpo_jax import ALGORITHMS
from tests.helpers import enumeration as world
from tests.helpers import estimators as cases
from tests.helpers.arrays import float64
from tests.helpers.enumeration import Comparison

EXACT = (
  1e-9  # relative bias below which a case counts as exact: above rounding, below any real bias
)


def number(x: float) -> str:
  """Returns three decimals, "-" for NaN, and no negative zero."""
  return "-" if np.isnan(x) else f"{x + 0.0:.3f}".replace("-0.000", "0.000")


def cells(case: Comparison) -> list[str]:
  """Returns the cells of scale, cosine and relative bias."""
  bias = "**0**" if case.bias < EXACT else number(case.bias)
  return [number(case.scale), number(case.cosine), bias]


def table(header: str, rows: Iterable[list[str]]) -> str:
  """Returns a Markdown table; `|` separates the columns of `header`."""
  columns = header.split("|")
  lines = [[c.strip() for c in columns], ["---"] * len(columns), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


REWARD_MEANING = {
  ("leave_one_out", "constant"): "exactly the gradient of the mean reward",
  ("leave_one_out", "sequence"): "tokens of short completions weigh more than those of long ones",
  ("leave_one_out", "token"): "the divisor is random: batches of short completions weigh more",
  (
    "leave_one_out",
    "prompt",
  ): "the same within each prompt: groups of short completions weigh more",
  ("group_centered", "constant"): "the gradient times (n - 1) / n for group size n",
  ("group_centered", "sequence"): "as `leave_one_out`, times (n - 1) / n",
  ("group_centered", "token"): "as `leave_one_out`, times (n - 1) / n",
  ("group_centered", "prompt"): "as `leave_one_out`, times (n - 1) / n",
  ("group_normalized", "constant"): "groups with a small standard deviation weigh more",
  ("group_normalized", "sequence"): "GRPO: both biases",
  ("group_normalized", "token"): "DAPO",
  ("group_normalized", "prompt"): "both biases, the second within each prompt",
  ("batch_normalized", "constant"): "one divisor per batch, which is random",
  ("batch_normalized", "sequence"): "and the cost of own-length weights",
  ("batch_normalized", "token"): "Lite PPO: two random divisors",
  ("batch_normalized", "prompt"): "two random divisors",
  ("batch_whitened", "constant"): "the divisor depends on the completion's own deviation",
  ("batch_whitened", "sequence"): "and the cost of own-length weights",
  ("batch_whitened", "token"): "two random divisors",
  ("batch_whitened", "prompt"): "ScaleRL",
  ("max_rl", "constant"): "a different objective: the log of the success rate (rewards of 0 and 1)",
  ("max_rl", "sequence"): "and the cost of own-length weights",
  ("max_rl", "token"): "MaxRL",
  ("max_rl", "prompt"): "and the cost of random lengths",
  ("token_whitened", "constant"): "one baseline and one divisor for all prompts, both random",
  ("token_whitened", "sequence"): "and the cost of own-length weights",
  ("token_whitened", "token"): "REINFORCE++",
  ("token_whitened", "prompt"): "and the cost of random lengths",
  ("centered_token_whitened", "constant"): "a mean over tokens, which long completions pull",
  ("centered_token_whitened", "sequence"): "and the cost of own-length weights",
  ("centered_token_whitened", "token"): "REINFORCE++ with baseline",
  ("centered_token_whitened", "prompt"): "and the cost of random lengths",
  ("right_only", "constant"): "a different objective: the success rate alone",
  ("right_only", "sequence"): "Online RFT: short right answers weigh more",
  ("right_only", "token"): "a different objective, and the cost of random lengths",
  ("right_only", "prompt"): "a different objective, and the cost of random lengths",
}

KL_MEANING = {
  "k1": "no gradient as a loss; exact in the reward (last row)",
  "k2": "gradient of the reverse KL; the value is too high",
  "k3": "exact value; gradient of the *forward* KL(reference \\|\\| policy)",
  "k3_k2_gradient": "value and gradient exact on-policy",
  "k3_ratio": "value and gradient exact on-policy and after updates",
  "k1_in_reward": "the only one with the gradient of the KL of whole completions",
}

TEACHER_MEANING = {
  "each token, no baseline": "on-policy distillation: the row `opd`",
  "each token": "the same, with the baseline `leave_one_out`",
  "discount 0.5": "between the two",
  "later tokens, no baseline": "KL in the reward, k1",
  "later tokens": "the same, with the baseline `leave_one_out`: the KL term of the row `rloo_kl`",
}

REGION_MEANING = {
  "no ratio (old_logp=None)": "stale completions are treated as fresh",
  "product of token ratios": "exact; its variance grows with length; not a built-in choice",
  "token ratio": "bias proportional to the distance: the ratios of other tokens are left out",
  "sequence ratio (GSPO)": "geometric mean over the tokens of the completion, without bounds",
  "clip 0.2 / 0.2 (PPO, GRPO)": "drops tokens outside the bounds",
  "clip 0.2 / 0.28 (DAPO)": "fewer tokens with a rising probability are dropped",
  "dual clip 3": "also drops tokens with a negative advantage and a ratio above 3",
  "CISPO 0 to 5": "bounds nothing: no ratio here exceeds 5",
  "CISPO 0.8 to 1.2": "bounds near 1: almost the same as no ratio",
  "SAPO 1 / 1.05": "a smooth gate on both sides of 1",
  "DPPO-TV 0.15": "drops by change in probability, so rare tokens keep their ratio",
}

CORRECTION_MEANING = {
  "none": "the mismatch biases the gradient",
  "token_truncate at 2": "the token ratio above, with large weights truncated",
  "token_mask 0.5 to 2": "also loses tokens outside the bounds",
  "sequence_mask 0.5 to 2": "exact weights, but loses completions outside the bounds",
  "sequence_mask, no bounds": "exact importance sampling of whole completions",
  "geometric_mask 0.8 to 1.25": "loses completions outside the bounds, and weighs none",
  "geometric_mask, then token_truncate at 2": "a chain: loses the same, and weighs tokens",
  "off_policy_mask 0.1": "loses improbable completions with a negative advantage (DeepSeek-V3.2)",
}


def reward_section() -> str:
  """Returns the table of advantages and averages."""
  rows = [
    [f"`{advantage}`", f"`{average}`", *cells(cases.reward_case(advantage, average)), meaning]
    for (advantage, average), meaning in REWARD_MEANING.items()
  ]
  return table("advantage | average | scale | cosine | bias | meaning", rows)


def rows_section() -> str:
  """Returns the table of the rows of `ALGORITHMS`."""
  rows = []
  for name, row in ALGORITHMS.items():
    if "values" in row.rewards:
      continue  # has a section of its own
    if row.advantage == "zero_advantages":
      continue  # it learns from a teacher alone
    case = cases.reward_case(row.advantage, row.average)
    rows.append([f"`{name}`", f"`{row.advantage}`", f"`{row.average}`", *cells(case)])
  return table("row | advantage | average | scale | cosine | bias", rows)


CRITIC_MEANING = {
  ("exact", "gae"): "unbiased for every `lam`",
  ("wrong", "gae"): "the smaller `lam`, the more the errors of the values count",
  ("0", "gae"): "with `lam` below 1, tokens far from the end get less of the reward",
  ("exact", "gae_whitened"): "the divisor is random",
  ("wrong", "gae_whitened"): "both",
}


def critic_section() -> str:
  """Returns the table of advantages from a critic."""
  rows = []
  for (values, advantage), meaning in CRITIC_MEANING.items():
    found = [cases.critic_case(values, lam, advantage) for lam in cases.LAMBDAS]
    biases = ["**0**" if case.bias < EXACT else number(case.bias) for case in found]
    rows.append([f"`{advantage}`", values, *biases, meaning])
  header = "|".join(f"bias, `lam` {lam:g}" for lam in cases.LAMBDAS)
  return table(f"advantage | values | {header} | meaning", rows)


def rate_section() -> str:
  """Returns the table of scales by success rate."""
  names = ("leave_one_out", "group_centered", "group_normalized", "max_rl")
  rows = [
    [f"`{name}`", *[number(cases.rate_case(name, rate).scale) for rate in cases.RATES]]
    for name in names
  ]
  return table("success rate |" + "|".join(f"{rate:g}" for rate in cases.RATES), rows)


def kl_section() -> str:
  """Returns the table of KL estimators."""
  rows = []
  for name, meaning in KL_MEANING.items():
    fresh = cases.kl_case(name)
    stale = cases.kl_case(name, distance=cases.DISTANCES[0])
    in_reward = name == "k1_in_reward"
    rows.append(
      [
        "k1 in the reward" if in_reward else f"`{name}`",
        "-" if in_reward else number(fresh["value"]),
        *[cosine(fresh[target]) for target in ("reverse", "forward", "sequence")],
        cosine(cases.kl_case(name, "sequence")["reverse"]),
        "-" if in_reward else number(stale["value"]),
        "-" if in_reward else cosine(stale["reverse"]),
        meaning,
      ]
    )
  header = (
    "estimator | value / KL | reverse | forward | of completions | `sequence` average "
    "| value / KL, stale | reverse, stale | meaning"
  )
  return table(header, rows)


def cosine(case: Comparison) -> str:
  """Returns the cell of a cosine: "**exact**" only if the scale is exact as well."""
  if case.bias < EXACT and abs(case.scale - 1) < EXACT:
    return "**exact**"
  return "0 gradient" if np.isnan(case.cosine) else number(case.cosine)


def teacher_section() -> str:
  """Returns the table of log-ratios as advantages."""
  rows = []
  for name, meaning in TEACHER_MEANING.items():
    constant, sequence = (cases.teacher_case(name, a) for a in ("constant", "sequence"))
    cosines = [cosine(case[k]) for case in (constant, sequence) for k in ("reverse", "sequence")]
    rows.append([name, *cosines, meaning])
  header = "at contexts | of completions | `sequence`: at contexts | of completions | meaning"
  return table(f"log-ratios of | {header}", rows)


def region_section() -> str:
  """Returns the table of trust regions."""
  rows = []
  for name, meaning in REGION_MEANING.items():
    row = [name]
    for distance in cases.DISTANCES:
      case, share = cases.region_case(name, distance)
      row += [*cells(case), f"{100 * share:.1f} %"]
    rows.append([*row, meaning])
  near, far = (f"{d:g}" for d in cases.DISTANCES)
  header = f"at distance {near}: scale | cosine | bias | bounded | at {far}: scale | cosine | bias"
  return table(f"trust region | {header} | bounded | meaning", rows)


def correction_section() -> str:
  """Returns the table of sampler corrections."""
  rows = [
    [name, *[x for d in cases.DISTANCES for x in cells(cases.correction_case(name, d))], meaning]
    for name, meaning in CORRECTION_MEANING.items()
  ]
  near, far = (f"{d:g}" for d in cases.DISTANCES)
  header = f"at distance {near}: scale | cosine | bias | at {far}: scale | cosine | bias"
  return table(f"correction | {header} | meaning", rows)


def world_facts() -> dict[str, str]:
  """Returns the properties of the enumerated world that the page states, formatted."""
  p = world.probabilities(jnp.asarray(world.POLICY))
  gaps = [world.logps(world.POLICY) - world.logps(cases.drawn_by(d)) for d in cases.DISTANCES]
  ratios = [f"{float(jnp.exp(g.min())):.2f} to {float(jnp.exp(g.max())):.2f}" for g in gaps]
  per_prompt = {
    "solved": (p * world.CORRECT).sum(-1),
    "style": (p * world.STYLE).sum(-1),
    "length": (p * world.LENGTHS).sum(-1),
  }
  facts = {k: " and ".join(f"{float(x):.2f}" for x in v) for k, v in per_prompt.items()}
  kl = float(world.sequence_kl(jnp.asarray(world.POLICY), world.REFERENCE))
  for name in ("k2_in_reward", "k3_in_reward"):
    facts[name] = number(cases.kl_case(name)["sequence"].cosine)
  return {**facts, "kl": f"{kl:.3f}", "near": ratios[0], "far": ratios[1]}


def page() -> str:
  """Returns the page `docs/estimators.md`."""
  facts = world_facts()
  return f"""\
# What each choice costs

Written by `python -m tools.estimators_page > docs/estimators.md`; `tests/core/test_unbiased.py`
fails if this page and the code disagree. It checks every number against a second computation.

An estimator is unbiased if its expected gradient is the gradient of the objective. This can be
decided without sampling. With a vocabulary of {world.VOCAB} and at most {world.MAX_LENGTH} tokens
there are {len(world.TOKENS)} completions, and every expectation below is a sum over all possible
batches, in float64. There are two prompts, one easy and one hard (success rates {facts["solved"]};
mean lengths {facts["length"]} tokens). The reward is 1 for a correct completion plus 0.5 times a
score between 0 and 1 (means {facts["style"]}). The policy has a free logit for every token in
every context.

The expected update is `scale · true gradient + rest`. The columns are:

- **scale**, times the budget of {world.MAX_LENGTH} tokens, so that a plain sum over tokens has
  scale 1. It acts like a learning rate.
- **cosine** of the angle to the true gradient.
- **bias** = |rest| / |scale · true gradient|, which no learning rate can correct. **0** means
  unbiased to at least 9 digits.

The size of a bias depends on this example; its presence does not. A bias can be worth having: it
often reduces the variance, which this page does not measure.

## Advantage and average, on fresh completions

Groups of {cases.GROUP}, two prompts, compared with the gradient of the mean reward.

{reward_section()}

Only `leave_one_out` and `group_centered` with weights that do not depend on the sampled completions
(`constant`) are unbiased. Dividing by a standard deviation or a length changes the objective.
`right_only` counts answers with a reward above 0.5, which here are the correct ones.

## The rows of `ALGORITHMS`, on fresh completions

On-policy, every ratio is 1 and no trust region has an effect. Without its KL term, a row therefore
reduces to its advantage and its average. The test confirms this for the gradient of each row.

{rows_section()}

## Advantages from a critic

Groups do not matter here: the baseline of a token is a value of its context. "Exact" values are the
expected rewards themselves, "wrong" ones are off by up to 0.4, and "0" is a critic before its first
update. `constant` average.

{critic_section()}

With `lam = 1` the values are a baseline, which no error of theirs can bias. The row `ppo` is
`gae_whitened` with `lam = 0.95`.

## Weight of a prompt by success rate

Rewards of 0 and 1, one prompt, groups of {cases.RATE_GROUP}, `constant` average. With two reward
values, every advantage has the direction of the exact gradient of the prompt (cosine 1). Only the
scale differs, which is the weight of this prompt among others.

{rate_section()}

`max_rl` is exactly `(1 - (1 - p)^(n - 1)) / p`: up to n - 1 times the weight for a prompt that
is rarely solved. `group_normalized` gives more weight to prompts with a success rate near 0 or 1.

## KL to the reference, in the loss

`constant` average; KL(policy || reference) is {facts["kl"]} nats per completion. "The gradient
of the KL" can mean three gradients. Each column is the cosine with one of them:

- *reverse*: the gradient of KL(policy || reference) at each context, with the distribution of
  contexts held fixed. A per-token loss cannot express more.
- *forward*: the same for KL(reference || policy).
- *of completions*: the gradient of the KL of whole completions, in which a token also accounts for
  the contexts that follow it.

**exact** means equal, scale included. The next column is the cosine with *reverse* under the
`sequence` average. *Stale* means that the completions, and so the contexts, come from a policy at
distance {cases.DISTANCES[0]:g} (next section).

{kl_section()}

Length weights do harm here. Under the `sequence` average the gradient of k1 is not 0: it does not
depend on the reference and points away from the gradient of the KL.

## Log-ratios to a teacher, or to the reference, as advantages

`log_ratio_advantages`, groups of {cases.FEW}; the teacher is the reference above. Cosines with the
gradients *at contexts* (the *reverse* column above) and *of completions*, under `constant` and
under `sequence`. Under `constant`, a baseline of the other completions changes no expectation.
Under `sequence` it does: the weight of a token depends on the length, and so on later tokens.

{teacher_section()}

In the reward, only k1 is unbiased: k2 and k3 have cosines of {facts["k2_in_reward"]} and
{facts["k3_in_reward"]} with the gradient of the KL of completions. The reward's own dependence on
the policy is left out, and has mean 0 for k1 only.

## Trust regions, on completions of an older policy

`leave_one_out`, `constant`, groups of {cases.FEW}. The completions come from a policy at one
of two distances, with token ratios of {facts["near"]} and {facts["far"]}. "Bounded" is the
fraction of tokens whose gradient a bound changes, `clip_ratio/region_mean`.

{region_section()}

At distance 0 all of these are exact. For completions of one token the token ratio is always exact.

## Corrections for a sampler that differs from the trainer

As above, but the trainer has no older policy: the sampler itself differs from it.

{correction_section()}
"""


if __name__ == "__main__":
  with float64():
    print(page(), end="")
