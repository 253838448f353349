"""The page `docs/estimators.md`, with the numbers of `estimators.py`.

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

EXACT = 1e-9  # of a relative bias: far above rounding in float64, far below any real bias


def number(x: float) -> str:
  return "-" if np.isnan(x) else f"{x + 0.0:.3f}".replace("-0.000", "0.000")


def cells(case: Comparison) -> list[str]:
  """scale, cosine, relative bias."""
  bias = "**0**" if case.bias < EXACT else number(case.bias)
  return [number(case.scale), number(case.cosine), bias]


def table(header: str, rows: Iterable[list[str]]) -> str:
  columns = header.split("|")
  lines = [[c.strip() for c in columns], ["---"] * len(columns), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


REWARD_MEANING = {
  ("leave_one_out", "constant"): "the gradient of mean reward itself",
  ("leave_one_out", "sequence"): "a token of a short answer counts more than one of a long answer",
  ("leave_one_out", "token"): "the divisor is random: batches of short answers count more",
  ("group_centered", "constant"): "the gradient times (n - 1) / n, n = group size",
  ("group_centered", "sequence"): "as `leave_one_out`, times (n - 1) / n",
  ("group_centered", "token"): "as `leave_one_out`, times (n - 1) / n",
  ("group_normalized", "constant"): "groups with a small spread are weighted up",
  ("group_normalized", "sequence"): "GRPO: both costs at once",
  ("group_normalized", "token"): "DAPO",
  ("batch_normalized", "constant"): "one divisor for the batch, but a random one",
  ("batch_normalized", "sequence"): "and the cost of own-length weights",
  ("batch_normalized", "token"): "Lite PPO: two random divisors",
  ("batch_whitened", "constant"): "the divisor depends on the completion's own deviation",
  ("batch_whitened", "sequence"): "and the cost of own-length weights",
  ("batch_whitened", "token"): "REINFORCE++-baseline",
  ("max_rl", "constant"): "another objective, the log of the success rate (rewards of 0 and 1)",
  ("max_rl", "sequence"): "and the cost of own-length weights",
  ("max_rl", "token"): "MaxRL",
}

KL_MEANING = {
  "k1": "as a loss it does nothing; in the reward it is exact (last row)",
  "k2": "gradient of the reverse KL, value too high",
  "k3": "value exact; gradient of the *forward* KL(reference \\|\\| policy)",
  "k3_k2_gradient": "value and gradient both exact on-policy",
  "k3_ratio": "value and gradient exact also after updates",
  "k1_in_reward": "the only one that carries the KL of whole completions",
}

REGION_MEANING = {
  "no ratio (old_logp=None)": "stale completions taken for fresh ones",
  "product of token ratios": "exact, with a variance that grows with length; not in the table",
  "token ratio": "bias in proportion to the distance: the ratios of the other tokens are left out",
  "sequence ratio (GSPO)": "geometric mean over the completion's tokens, no bounds",
  "clip 0.2 / 0.2 (PPO, GRPO)": "tokens beyond the bounds are dropped",
  "clip 0.2 / 0.28 (DAPO)": "fewer of the rising tokens are dropped",
  "dual clip 3": "and falling tokens with a ratio above 3",
  "CISPO 0 to 5": "nothing dropped, no ratio here is above 5",
  "CISPO 0.8 to 1.2": "absolute bounds near 1: nearly the same as no ratio",
  "SAPO 1 / 1.05": "the gate closes smoothly on both sides of 1",
  "DPPO-TV 0.15": "drops by moved probability, so rare tokens keep their ratio",
}

CORRECTION_MEANING = {
  "none": "the mismatch goes into the gradient",
  "token_truncate at 2": "as the token ratio above, and large weights are cut",
  "token_mask 0.5 to 2": "and tokens outside the bounds are lost",
  "sequence_mask 0.5 to 2": "exact weights, but completions outside the bounds are lost",
  "sequence_mask, no bounds": "exact importance sampling of whole completions",
}


def reward_section() -> str:
  rows = [
    [f"`{advantage}`", f"`{average}`", *cells(cases.reward_case(advantage, average)), meaning]
    for (advantage, average), meaning in REWARD_MEANING.items()
  ]
  return table("advantage | average | scale | cosine | bias | in one line", rows)


def rows_section() -> str:
  rows = []
  for name, row in ALGORITHMS.items():
    case = cases.reward_case(row.advantage, row.average)
    rows.append([f"`{name}`", f"`{row.advantage}`", f"`{row.average}`", *cells(case)])
  return table("row | advantage | average | scale | cosine | bias", rows)


def rate_section() -> str:
  names = ("leave_one_out", "group_centered", "group_normalized", "max_rl")
  rows = [
    [f"`{name}`", *[number(cases.rate_case(name, rate).scale) for rate in cases.RATES]]
    for name in names
  ]
  return table("success rate |" + "|".join(f"{rate:g}" for rate in cases.RATES), rows)


def kl_section() -> str:
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
    "| value / KL, stale | reverse, stale | in one line"
  )
  return table(header, rows)


def cosine(case: Comparison) -> str:
  if case.bias < EXACT and abs(case.scale - 1) < EXACT:
    return "**exact**"
  return "0 gradient" if np.isnan(case.cosine) else number(case.cosine)


def region_section() -> str:
  rows = []
  for name, meaning in REGION_MEANING.items():
    row = [name]
    for distance in cases.DISTANCES:
      case, share = cases.region_case(name, distance)
      row += [*cells(case), f"{100 * share:.1f} %"]
    rows.append([*row, meaning])
  near, far = (f"{d:g}" for d in cases.DISTANCES)
  header = f"at distance {near}: scale | cosine | bias | stopped | at {far}: scale | cosine | bias"
  return table(f"trust region | {header} | stopped | in one line", rows)


def correction_section() -> str:
  rows = [
    [name, *[x for d in cases.DISTANCES for x in cells(cases.correction_case(name, d))], meaning]
    for name, meaning in CORRECTION_MEANING.items()
  ]
  near, far = (f"{d:g}" for d in cases.DISTANCES)
  header = f"at distance {near}: scale | cosine | bias | at {far}: scale | cosine | bias"
  return table(f"correction | {header} | in one line", rows)


def world_facts() -> dict[str, str]:
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
  return {**facts, "kl": f"{kl:.3f}", "near": ratios[0], "far": ratios[1]}


def page() -> str:
  facts = world_facts()
  return f"""\
# What each choice costs

Written by `python -m tools.estimators_page > docs/estimators.md`; `tests/core/test_unbiased.py` fails
when this page and the code disagree, and checks every number against a second computation.

An estimator is unbiased when its expected gradient is the gradient of what one wants to improve.
That can be settled without sampling: with a vocabulary of {world.VOCAB} and at most
{world.MAX_LENGTH} tokens there are {len(world.TOKENS)} completions, and every expectation below
is a sum over all batches that can be drawn, in float64. The world has two prompts, one easy and one
hard (solved at {facts["solved"]}; mean lengths {facts["length"]} tokens), a reward of 1 if solved
plus 0.5 times a score between 0 and 1 (mean {facts["style"]}), and a policy with a free logit for
every token in every context.

How to read the columns. The expected update is `scale · true gradient + rest`:

- **scale**, times the budget of {world.MAX_LENGTH} tokens, so that a plain sum over tokens reads 1.
  It acts like a learning rate.
- **cosine** of the angle to the true gradient.
- **bias** = |rest| / |scale · true gradient|: what no learning rate can mend. **0** means unbiased
  to at least 9 digits.

The sizes belong to this world; whether a bias is there at all does not. A bias can be worth its
price: it often buys variance, which this page does not measure.

## Advantage and average, on fresh completions

Groups of {cases.GROUP}, two prompts, against the gradient of mean reward.

{reward_section()}

Two things are unbiased: `leave_one_out` and `group_centered`, with weights that do not depend on
what was drawn (`constant`). Dividing by any spread, or by any length, is a choice of another
objective.

## The rows of `ALGORITHMS`, on fresh completions

On-policy every ratio is 1 and no trust region binds, so a row is its advantage and its average
(without its KL term). The test takes the gradient of each row and finds exactly that.

{rows_section()}

## What a prompt weighs, by how often it is solved

Rewards of 0 and 1, one prompt, groups of {cases.RATE_GROUP}, `constant` average. With two reward
values every advantage follows the prompt's exact gradient (cosine 1); what differs is the scale,
that is, how much this prompt counts among others.

{rate_section()}

`max_rl` is exactly `(1 - (1 - p)^(n - 1)) / p`: up to n - 1 times more weight for a prompt that is
rarely solved. `group_normalized` weighs prompts solved nearly always or nearly never up.

## KL to the reference, in the loss

`constant` average; KL(policy || reference) is {facts["kl"]} nats per completion. "The gradient
of the KL" can mean three things, and each column is the cosine with one of them:

- *reverse*: of KL(policy || reference) at each context, the contexts held as they were met. This
  is all that a per-token loss can carry.
- *forward*: the same of KL(reference || policy).
- *of completions*: of the KL of whole completions, where a token also answers for the contexts it
  leads to.

**exact** = equal, scale included. The next column is the cosine with *reverse* under the `sequence`
average. *Stale* = the completions were drawn at distance {cases.DISTANCES[0]:g} (next section) and
the contexts are those met there.

{kl_section()}

Length weights do harm here: under the `sequence` average k1 is no longer 0, and the gradient it
then has, which never looks at the reference, points away from the KL's.

## Trust regions, on completions of an older policy

`leave_one_out`, `constant`, groups of {cases.FEW}. The policy that drew the completions is at two
distances; the token ratios then range over {facts["near"]} and {facts["far"]}. "Stopped" = share
of tokens whose ratio has left the region in the direction of their advantage.

{region_section()}

At distance 0 all of these are exact. For completions of a single token the token ratio always is.

## Corrections for a sampler that is not the trainer

As before, but the trainer does not know an older policy: the sampler itself is off.

{correction_section()}
"""


if __name__ == "__main__":
  with float64():
    print(page(), end="")
