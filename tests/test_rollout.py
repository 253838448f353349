"""The seam between host and device: rewards meet their completions, what is dropped was 0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import group_centered, process_advantages, rollout
from grpo_jax.core.advantages import Advantage
from grpo_jax.core.algorithms import ALGORITHMS
from grpo_jax.demonstrations import Demonstrations
from grpo_jax.learning import batch as batches
from grpo_jax.learning.step import TrainState, make_train_step
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.statistics import has_variance
from grpo_jax.tasks.base import Example, Task
from grpo_jax.tasks.rewards.workers import score_in_process
from grpo_jax.tokens import ByteTokenizer

CONFIG = ModelConfig(vocab_size=257, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
MODEL = Decoder(CONFIG)
EXAMPLES = [Example(prompt=f"{n}:", columns={"number": n}, key=str(n)) for n in range(8)]


def vowels(prompts, completions, number, **columns):
  """Odd prompts score the share of bytes below 64, even ones always 0.5: constant groups."""
  return [
    sum(ord(c) < 64 for c in text) / 8 if n % 2 else 0.5 for text, n in zip(completions, number)
  ]


TASK = Task(
  name="test",
  splits={"train": EXAMPLES, "eval": []},
  rewards={"vowels": (vowels, 1.0)},
  accuracy=vowels,
)
SAMPLER = rollout.Sampler(MODEL, ByteTokenizer(), prompt_length=4, completion_length=6)


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def collect(params, algorithm="dapo", draw=lambda number: EXAMPLES, task=TASK, **options):
  settings = {"pad_prompts_to_multiple": 2, "step_rewards": task.step_rewards} | options
  config = rollout.RolloutConfig(group_size=4, algorithm=algorithm, **settings)
  scorer, key = score_in_process(task), jax.random.key(1)
  return rollout.collect(SAMPLER, unstack(params), draw, scorer, key, config)


def test_rewards_belong_to_their_completions(params):
  out = collect(params)
  for row, sample in enumerate(out.samples):
    p, g = divmod(row, 4)
    assert sample["prompt"] == f"{p}:"
    expected = vowels([sample["prompt"]], [sample["completion"]], [p])[0]
    assert out.scored.scores.total[p, g] == pytest.approx(expected)
    assert sample["reward"] == pytest.approx(expected)
  assert out.metrics["frac_reward_zero_std"] >= 0.5


def test_rows_of_samples_hold_the_problem_each_reward_and_the_advantage(params):
  """Advantages by hand: the reward minus the mean of its group, also where draws are replaced."""

  def logs(completions, log_extra, log_metric, **columns):
    log_extra("size", [len(text) for text in completions])
    log_metric("sizes", len(completions))
    return position((), completions)

  examples = [
    dataclasses.replace(example, columns={**example.columns, "answer": 10 * n})
    for n, example in enumerate(EXAMPLES)
  ]
  task = dataclasses.replace(TASK, rewards={"vowels": (vowels, 1.0), "logs": (logs, 0.5)})
  for options in ({}, {"max_resamples": 1}):
    draw = lambda number: examples  # noqa: E731
    out = collect(params, "dr_grpo", draw=draw, task=task, reward_weights=(1.0, 0.5), **options)
    rewards = out.scored.scores.total
    for row, sample in enumerate(out.samples):
      p, g = divmod(row, 4)
      example = examples[p % len(examples)]
      assert (sample["key"], sample["columns"]) == (example.key, example.columns)
      assert sample["answer"] == example.columns["answer"]
      assert sample["rewards"].keys() == {"vowels", "logs"}
      assert sample["rewards"]["logs"] == g
      total = sample["rewards"]["vowels"] + 0.5 * g
      assert sample["reward"] == pytest.approx(total)
      assert sample["size"] == len(sample["completion"])
      if not np.isnan(sample["advantage"]):  # NaN: not in the batch
        assert sample["advantage"] == pytest.approx(total - rewards[p].mean(), abs=1e-5)
    known = [sample["advantage"] for sample in out.samples if not np.isnan(sample["advantage"])]
    assert len(known) == 4 * len(examples)
    assert out.metrics["sizes"] == 4 * len(examples)


def test_an_advantage_of_tokens_is_recorded_as_its_mean(params):
  task = dataclasses.replace(TASK, step_rewards=halves)
  row = dataclasses.replace(ALGORITHMS["grpo"], advantage="process_advantages")
  out = collect(params, row, task=task)
  values, mask = np.asarray(out.batch.advantages), np.asarray(out.batch.mask)
  expected = np.where(mask, values, 0).sum(-1) / mask.sum(-1)
  np.testing.assert_allclose(
    [sample["advantage"] for sample in out.samples], expected.reshape(-1), atol=1e-6
  )


def update(params, batch, algorithm):
  optimizer = optax.sgd(1.0)
  step = make_train_step(MODEL, algorithm, optimizer, lambda count: 1.0, temperature=1.0)
  copy = jax.tree.map(jnp.copy, params)
  state, metrics = step(TrainState(jnp.int32(0), copy, optimizer.init(copy)), batch)
  return jax.tree.map(jnp.subtract, state.params, params), metrics


def test_a_teacher_gives_every_group_a_gradient(params):
  row = dataclasses.replace(ALGORITHMS["dapo"], teacher_weight=0.5)
  assert collect(params, row).batch.mask.any((1, 2)).tolist() == [True] * 8
  assert collect(params, "opd").batch.mask.any((1, 2)).tolist() == [True] * 8
  assert not np.asarray(collect(params, "opd").batch.advantages).any()


def test_the_policy_is_shown_a_sibling_of_its_completions(params):
  """Shows the first completion of each group with a share of 2/8 at least, by hand from texts."""
  show = Demonstrations("{prompt}|{solution}", 24, solved_from=2 / 8)
  row = dataclasses.replace(ALGORITHMS["opd"], teacher_discount=1.0)
  for resamples in (0, 1):
    task = ALGORITHMS["dapo"] if resamples else row
    taught_row = dataclasses.replace(task, teacher_weight=1.0)
    out = collect(params, taught_row, demonstrations=show, max_resamples=resamples)
    batch, tokenizer, count = out.batch, ByteTokenizer(), 0
    prompts, masks, taught = map(
      np.asarray, (batch.teacher_prompts, batch.teacher_prompt_mask, batch.taught)
    )
    for p in range(8):
      own = tokenizer.decode(np.asarray(batch.prompts[p])[np.asarray(batch.prompt_mask[p])])
      texts = [
        tokenizer.decode(ids[mask])
        for ids, mask in zip(np.asarray(batch.completions[p]), np.asarray(batch.mask[p]))
      ]
      rewards = np.array([vowels([own], [text], [int(own[:-1])])[0] for text in texts])
      solved = np.flatnonzero(rewards >= 2 / 8)
      expected = f"{own}|{texts[solved[0]]}" if len(solved) else own
      assert tokenizer.decode(prompts[p][masks[p]]) == expected
      has = np.full(4, len(solved) > 0)
      has[solved[:1]] = False
      np.testing.assert_array_equal(taught[p], np.asarray(batch.mask[p]) & has[:, None])
      count += len(solved) > 0
    assert count >= 4
    share = taught.sum() / np.asarray(batch.mask).sum()
    if not resamples:
      assert out.metrics["teacher/taught"] == pytest.approx(share)


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_leaving_out_groups_without_a_signal_changes_no_update(params, average):
  """A row with a KL term keeps every prompt; its batch, with the term off, is the whole one."""
  algorithm = dataclasses.replace(ALGORITHMS["dapo"], average=average)
  with_kl = dataclasses.replace(algorithm, kl="k3", beta=1.0)
  few, all_of_them = (
    collect(params, row, pad_prompts_to_multiple=3).batch for row in (algorithm, with_kl)
  )
  assert all_of_them.mask.shape[0] == 8
  assert few.mask.shape[0] == 6  # four prompts with a signal, in buckets of three
  assert not few.mask[4:].any()
  (small, small_metrics), (whole, metrics) = (
    update(params, batch, algorithm) for batch in (few, all_of_them)
  )
  assert optax.tree.norm(whole) > 1e-3
  for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  np.testing.assert_allclose(small_metrics["loss"], metrics["loss"], atol=1e-6)


def test_select_keeps_one_empty_bucket_when_nothing_is_left(params):
  batch = batches.select(collect(params).batch, np.array([], np.int64), 2)
  assert batch.mask.shape == (2, 4, 6)
  assert not batch.mask.any()
  assert not batch.weights.any()
  change, metrics = update(params, batch, ALGORITHMS["dapo"])
  assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(change))
  assert all(np.isfinite(float(value)) for value in metrics.values())


def test_columns_and_prompts_that_fit():
  ragged = [Example("a", {"x": 1}, "a"), Example("bbb", {"y": 2}, "b")]
  assert rollout.columns_of(ragged) == {"x": [1, None], "y": [None, 2]}
  assert rollout.longest_prompt(ByteTokenizer(), ragged) == 3
  assert rollout.longest_prompt(ByteTokenizer(), []) == 0
  assert rollout.fit_prompts(ByteTokenizer(), ragged, 3, "error") is ragged
  with pytest.warns(UserWarning, match="1 of 2 prompts"):
    fitting = rollout.fit_prompts(ByteTokenizer(), ragged, 2, "drop")
  assert list(fitting) == ragged[:1]


# --- options of a run -----------------------------------------------------------------------------


def test_truncated_completions_count_in_their_group_and_not_in_the_loss(params):
  whole, masked = (collect(params, "grpo", mask_truncated=on) for on in (False, True))
  ended = whole.scored.out.ended
  assert 0 < ended.sum() < ended.size
  np.testing.assert_array_equal(masked.batch.advantages, whole.batch.advantages)
  np.testing.assert_array_equal(masked.batch.mask, whole.batch.mask & ended[..., None])
  lengths = np.asarray(whole.batch.mask).sum(-1)
  expected = np.where(ended, 1 / (ended.size * lengths), 0)  # an emptied sequence is still one of n
  np.testing.assert_allclose(masked.batch.weights[..., 0], expected, rtol=1e-6)


def test_prompts_without_a_signal_are_replaced(params):
  """Only odd numbers can have spread; resamples bring odd ones until eight are together."""
  drawn = []

  def draw(resample):
    drawn.append(resample)
    return [Example(f"{n}:", {"number": n}, str(n)) for n in range(8 * resample, 8 * resample + 8)]

  out = collect(params, "grpo", draw=draw, max_resamples=5)
  assert drawn == list(range(len(drawn)))
  assert 2 <= len(drawn) <= 4
  assert (np.asarray(out.batch.advantages) != 0).any(-1).all()
  assert out.batch.mask.shape[0] == 8
  spread = has_variance(out.scored.scores.total)
  assert out.metrics["dynamic_sampling/kept"] == spread.mean()
  assert out.metrics["dynamic_sampling/resamples"] == len(drawn) - 1
  assert len(out.samples) == 4 * 8 * len(drawn)
  # The first eight prompts with a signal, in their order, each with its own advantages.
  first = np.flatnonzero(spread)[:8]
  np.testing.assert_array_equal(out.batch.prompts, out.scored.out.prompts[first])
  np.testing.assert_array_equal(out.batch.completions, out.scored.out.tokens[first])
  alone = collect(params, "grpo", draw=draw)
  np.testing.assert_array_equal(alone.scored.out.tokens, out.scored.out.tokens[:8])


def test_refills_are_bounded_and_the_batch_keeps_its_size(params):
  drawn = []

  def draw(resample):
    drawn.append(resample)
    return [dataclasses.replace(example, columns={"number": 0}) for example in EXAMPLES]

  out = collect(params, "grpo", draw=draw, max_resamples=2)
  assert drawn == [0, 1, 2]
  assert out.batch.mask.shape[0] == 8
  assert out.metrics["dynamic_sampling/kept"] == 0
  assert not np.asarray(out.batch.advantages).any()


def halves(prompts, completions, **columns):
  """The first three characters are a step worth their number, the rest one that is worth less."""
  return [[(min(3, len(c)), float(len(c))), (len(c), -1.0)][: len(c) > 3 or 1] for c in completions]


def test_groups_of_one_are_refused_before_anything_is_sampled():
  for size in (1, 0, -3):
    with pytest.raises(ValueError, match=f"group_size is {size}, it must be at least 2"):
      rollout.RolloutConfig(group_size=size)
  row = dataclasses.replace(ALGORITHMS["dapo"], advantage=lambda rewards: rewards)
  for algorithm in (row, "reinforce_pp", "online_rft"):
    assert rollout.RolloutConfig(group_size=1, algorithm=algorithm).group_size == 1
  with pytest.raises(ValueError, match="at least 2"):
    rollout.RolloutConfig(group_size=1, algorithm="reinforce_pp_baseline")


@pytest.mark.parametrize(
  "terms",
  [
    {"sampler_penalty": 1e-3},
    {"entropy_bonus": 1e-3},
    {"entropy_target": 0.2, "entropy_delta": 0.005},
    {"nll_weight": 0.1},
  ],
)
def test_groups_that_another_term_of_the_loss_moves_stay(params, terms):
  row = dataclasses.replace(ALGORITHMS["dapo"], **terms)
  assert collect(params, row).batch.mask.shape[0] == 8
  assert collect(params, "dapo").batch.mask.shape[0] == 4


def test_whitened_over_tokens_constant_groups_learn_too(params):
  """Even prompts always score 0.5: their advantage is (0.5 - m) / s over all tokens."""
  out = collect(params, "reinforce_pp")
  assert out.batch.mask.shape[0] == 8
  rewards, tokens = out.scored.scores.total, out.scored.out.mask.sum(-1)
  mean = (rewards * tokens).sum() / tokens.sum()
  std = np.sqrt((tokens * (rewards - mean) ** 2).sum() / tokens.sum())
  np.testing.assert_allclose(out.batch.advantages, (rewards - mean) / std, rtol=1e-4, atol=1e-5)
  assert np.abs(out.batch.advantages[0]).min() > 1e-3


def test_right_answers_are_imitated_where_all_of_a_group_are_right(params):
  """The even prompts' 0.5 is above 0.4, and the odd ones' shares are not always."""
  row = dataclasses.replace(ALGORITHMS["online_rft"], right_above=0.4)
  out = collect(params, row)
  expected = out.scored.scores.total > 0.4
  kept = expected.any(-1)
  assert kept[::2].all()
  np.testing.assert_array_equal(out.batch.advantages[: kept.sum()], expected[kept])


def test_weights_of_right_answers_are_of_the_whole_rollout(params):
  row = dataclasses.replace(ALGORITHMS["dapo"], nll_weight=0.1, right_above=0.4)
  out = collect(params, row, mask_truncated=True)
  mask = out.scored.out.mask & out.scored.out.ended[..., None]
  right = mask & (out.scored.scores.total > 0.4)[..., None]
  width = out.batch.mask.shape[-1]
  np.testing.assert_allclose(out.batch.nll_weights, (right / right.sum())[..., :width], rtol=1e-5)
  assert collect(params, "dapo").batch.nll_weights is None
  _, metrics = update(params, out.batch, row)
  assert float(metrics["nll"]) > 0


def test_only_the_share_of_tokens_with_the_highest_entropy_learns(params):
  row = dataclasses.replace(ALGORITHMS["dr_grpo"], entropy_share=0.25)
  out = collect(params, row)
  whole = collect(params, "dr_grpo")
  generated = out.scored.out
  threshold = np.quantile(generated.entropy[generated.mask], 0.75)
  keep = generated.mask & (generated.entropy >= threshold)
  rewards = out.scored.scores.total
  expected = np.where(keep, (rewards - rewards.mean(-1, keepdims=True))[..., None], 0.0)
  rows = (expected != 0).any((1, 2))
  actual = np.asarray(out.batch.advantages)[: rows.sum()]
  np.testing.assert_allclose(actual, expected[rows][..., : actual.shape[-1]], atol=1e-6)
  assert whole.batch.advantages.ndim == 2


def test_steps_are_rewarded_on_their_tokens(params):
  """Group statistics over all steps by hand; a token gets the steps that end at or after it."""
  task = dataclasses.replace(TASK, step_rewards=halves)
  algorithm = dataclasses.replace(ALGORITHMS["grpo"], advantage="process_advantages")
  out = collect(params, algorithm, task=task)
  tokenizer = ByteTokenizer()
  for p in range(8):
    steps = halves(None, out.scored.out.texts[p])
    rewards = np.array([reward for found in steps for _, reward in found])
    for g in range(4):
      tokens = out.scored.out.tokens[p, g][out.scored.out.mask[p, g]]
      expected = np.zeros(6)
      for end, reward in steps[g]:
        texts = [tokenizer.decode(tokens[: t + 1]) for t in range(len(tokens))]
        last = next((t for t, text in enumerate(texts) if len(text) >= end), len(tokens) - 1)
        expected[: last + 1] += (reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
      expected[len(tokens) :] = 0
      np.testing.assert_allclose(out.batch.advantages[p, g], expected, atol=1e-4)


def test_several_rewards_are_normalized_apart(params):
  """GDPO of two functions against its formula, from the rewards that were measured."""
  task = dataclasses.replace(
    TASK, rewards={"vowels": (vowels, 1.0), "length": (lambda completions, **_: [
      float(len(c)) for c in completions], 0.5)}
  )  # fmt: skip
  out = collect(params, "gdpo", task=task, reward_weights=(1.0, 0.5))
  total = 0.0
  for name, weight in (("vowels", 1.0), ("length", 0.5)):
    r = out.scored.scores.per_name[name]
    spread = r.std(-1, ddof=1, keepdims=True)
    total += weight * (r - r.mean(-1, keepdims=True)) / (spread + 1e-4)
  expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
  expected = expected[(np.abs(expected) > 1e-3).any(-1)]
  np.testing.assert_allclose(out.batch.advantages[: len(expected)], expected, atol=1e-3)


def test_samples_hold_their_tokens_when_asked_to(params):
  """In the order of the samples, with a resample in between, whose groups stand behind."""
  assert "tokens" not in collect(params).samples[0]
  out = collect(params, "grpo", tokens=True, max_resamples=1)
  assert len(out.samples) == 2 * 8 * 4  # groups of even prompts are constant
  generated = out.scored.out
  cells = [(p, g) for p in range(len(generated.texts)) for g in range(4)]
  for sample, cell in zip(out.samples, cells, strict=True):
    own = generated.mask[cell]
    logp, entropy = generated.logp[cell][own], generated.entropy[cell][own]
    assert sample["completion"] == generated.texts[cell[0]][cell[1]]
    record = sample["tokens"]
    np.testing.assert_allclose(record["logp"], logp, atol=5.1e-5)
    np.testing.assert_allclose(record["entropy"], entropy, atol=5.1e-5)
    assert len(record["text"]) == sample["length"]
    assert sample["ended"] is bool(generated.ended[cell])
    assert "advantage" not in record  # all tokens have that of the completion


def test_tokens_have_advantages_of_their_own(params):
  """Compares them with the batch, which leaves out the groups without a gradient."""
  task = dataclasses.replace(TASK, step_rewards=halves)
  row = dataclasses.replace(ALGORITHMS["grpo"], advantage="process_advantages")
  out = collect(params, row, task=task, tokens=True)
  every = dataclasses.replace(row, beta=0.1)  # its batch holds every group
  whole = collect(params, every, task=task).batch
  assert whole.advantages.shape == (8, 4, 6)
  for i, sample in enumerate(out.samples):
    p, g = divmod(i, 4)
    expected = np.asarray(whole.advantages[p, g])[np.asarray(whole.mask[p, g])]
    np.testing.assert_allclose(sample["tokens"]["advantage"], expected, atol=5.1e-5)
  assert len({tuple(sample["tokens"]["advantage"]) for sample in out.samples}) > 8


def test_ratios_belong_to_the_tokens_of_the_batch(params):
  """Groups of even prompts are constant and not in the batch: their tokens have none."""
  out = collect(params, "dapo", tokens=True)
  assert out.rows.tolist() == [1, 3, 5, 7]
  numbers = np.arange(out.batch.mask.size, dtype=np.float32).reshape(out.batch.mask.shape)
  out.add_ratios(numbers)
  for i, sample in enumerate(out.samples):
    p, g = divmod(i, 4)
    assert ("ratio" in sample["tokens"]) == bool(p % 2)
    if p % 2:
      expected = numbers[p // 2, g][: sample["length"]].tolist()
      assert sample["tokens"]["ratio"] == expected
      np.testing.assert_array_equal(
        out.batch.completions[p // 2, g][: sample["length"]],
        out.scored.out.tokens[p, g][: sample["length"]],
      )
  without = collect(params, "dapo")
  without.add_ratios(numbers)  # nothing to write them to
  assert "tokens" not in without.samples[0]


# --- padding --------------------------------------------------------------------------------------


def padded_batch(n=40, t=40):
  """Prompts of 3 to 9 tokens and completions of up to 10, in room for 40 and 40."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 11, (4, 3))
  lengths[1, 2] = 10
  prompt_tokens = np.array([3, 9, 4, 6])
  mask = np.arange(t) < lengths[..., None]
  batch = rollout.Batch(
    prompts=jnp.asarray(rng.integers(0, 256, (4, n))),
    prompt_mask=jnp.asarray(np.arange(n) >= n - prompt_tokens[:, None]),
    completions=jnp.asarray(rng.integers(0, 256, (4, 3, t))),
    mask=jnp.asarray(mask),
    advantages=jnp.asarray(rng.normal(size=(4, 3, t)), jnp.float32),
    weights=jnp.asarray(mask / mask.sum(), jnp.float32),
    sampler_logp=jnp.asarray(-rng.random((4, 3, t)), jnp.float32),
  )
  return batch, prompt_tokens, lengths


def test_shared_padding_is_cut_off_and_changes_no_update(params):
  batch, prompt_tokens, lengths = padded_batch()
  short, padded = batches.trim(batch, prompt_tokens, lengths)
  # halves of 40 are 20 and 10, and 10 is less than the least, 16
  assert short.prompts.shape == short.prompt_mask.shape == (4, 20)
  assert {a.shape for a in (short.completions, short.mask, short.weights)} == {(4, 3, 20)}
  assert short.advantages.shape == short.sampler_logp.shape == (4, 3, 20)
  assert padded == pytest.approx(1 - (3 + 9 + 4 + 6 + lengths.sum()) / (4 * (20 + 3 * 20)))
  np.testing.assert_array_equal(short.prompts, batch.prompts[:, 20:])
  (actual, metrics), (expected, whole) = (
    update(params, b, ALGORITHMS["dapo"]) for b in (short, batch)
  )
  assert optax.tree.norm(expected) > 1e-3
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  for name, value in whole.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_no_token_is_cut_off():
  batch, prompt_tokens, lengths = padded_batch()
  for longest, kept in ((20, 20), (21, 40), (40, 40)):
    long = np.where(lengths == 10, longest, lengths)
    assert batches.trim(batch, prompt_tokens, long)[0].mask.shape[-1] == kept
    assert batches.trim(batch, np.array([1, 2, 3, longest]), lengths)[0].prompts.shape[-1] == kept
  same, padded = batches.trim(batch, np.array([40] * 4), np.full((4, 3), 40))
  assert same is batch
  assert padded == 0
  nothing, padded = batches.trim(batch, np.array([], int), np.zeros((0, 3), int))
  assert (nothing.mask.shape, padded) == ((4, 3, 20), 1)


def test_the_padded_share_is_measured(params):
  out = collect(params, pad_prompts_to_multiple=3)
  lengths, spread = out.scored.out.lengths, has_variance(out.scored.scores.total)
  assert spread.sum() == 4
  # in the update: four prompts of two tokens, in a batch of six with room for 4 + 4 * 6 tokens
  expected = 1 - (4 * 2 + lengths[spread].sum()) / (6 * (4 + 4 * 6))
  assert out.metrics["update/padded"] == pytest.approx(expected)


def test_examples_are_a_list_unless_they_are_drawn_again(params):
  by_list, by_function = (
    collect(params, draw=draw) for draw in (EXAMPLES, lambda number: EXAMPLES)
  )
  np.testing.assert_array_equal(by_list.batch.completions, by_function.batch.completions)
  with pytest.raises(ValueError, match="max_resamples is 2, but examples is a list"):
    collect(params, draw=EXAMPLES, max_resamples=2)


def test_the_three_stages_are_what_collect_does(params):
  whole = collect(params, "grpo", pad_prompts_to_multiple=1)
  config = rollout.RolloutConfig(group_size=4, algorithm="grpo")
  out = rollout.generate(SAMPLER, params, EXAMPLES, jax.random.key(1), group_size=4)
  scored = rollout.score(score_in_process(TASK), EXAMPLES, out)
  batch, has_gradient = rollout.make_batch(scored, SAMPLER, config)
  np.testing.assert_array_equal(out.tokens, whole.scored.out.tokens)
  np.testing.assert_array_equal(batch.advantages, whole.batch.advantages)
  np.testing.assert_array_equal(has_gradient, (np.asarray(batch.advantages) != 0).any(-1))


def test_resampling_replaces_what_the_update_would_leave_out(params):
  """All completions truncated and masked: no group has a gradient, whatever its rewards are."""
  drawn = []

  def draw(number):
    drawn.append(number)
    return EXAMPLES

  cut = dataclasses.replace(SAMPLER, completion_length=1)
  config = rollout.RolloutConfig(4, "grpo", max_resamples=2, mask_truncated=True)
  scorer = score_in_process(dataclasses.replace(TASK, rewards={"odd": (position, 1.0)}))
  out = rollout.collect(cut, params, draw, scorer, jax.random.key(1), config)
  assert not out.scored.out.ended.any()  # the premise
  assert (out.scored.scores.total.std(-1) > 0).all()
  assert drawn == [0, 1, 2]
  assert out.metrics["dynamic_sampling/kept"] == 0


def test_groups_of_equal_totals_may_have_a_gradient(params):
  """GDPO normalizes each reward alone: two that cancel in the sum do not cancel there."""
  rewards = {
    "first": (position, 1.0),
    "second": (lambda **kw: [-2 * r for r in position(**kw)], 0.5),
  }
  task = dataclasses.replace(TASK, rewards=rewards)
  out = collect(params, "gdpo", task=task, reward_weights=(1.0, 0.4), max_resamples=2)
  assert (np.ptp(out.scored.scores.total, axis=-1) == 0).all()
  assert out.metrics["dynamic_sampling/resamples"] == 0
  assert (np.asarray(out.batch.advantages) != 0).any(-1).all()


def position(prompts, completions, **columns):
  """A reward that differs inside each group: the number of the completion."""
  return [float(i % 4) for i in range(len(completions))]


def test_an_advantage_may_be_a_function_of_several_kinds_of_rewards(params):
  """A sum of outcome and process, each as the library computes it alone."""

  def both(rewards, step_rewards, step_ends, mask):
    return 0.5 * group_centered(rewards)[..., None] + process_advantages(
      step_rewards, step_ends, mask
    )

  task = dataclasses.replace(TASK, step_rewards=halves)
  row = dataclasses.replace(ALGORITHMS["grpo"], advantage=Advantage(both, ("total", "steps")))
  parts = [
    dataclasses.replace(ALGORITHMS["grpo"], advantage=name)
    for name in ("group_centered", "process_advantages")
  ]
  out, outcome, process = (
    np.asarray(collect(params, one, task=task).batch.advantages) for one in (row, *parts)
  )
  mask = np.asarray(collect(params, row, task=task).batch.mask)
  np.testing.assert_allclose(out * mask, (0.5 * outcome[..., None] + process) * mask, atol=1e-5)


def test_a_plain_function_is_an_advantage(params):
  row = dataclasses.replace(ALGORITHMS["grpo"], advantage=lambda r: 2 * group_centered(r))
  out = collect(params, row)
  total = out.scored.scores.total
  np.testing.assert_allclose(
    out.batch.advantages, 2 * (total - total.mean(-1, keepdims=True)), atol=1e-5
  )


# --- a critic ------------------------------------------------------------------------------------


def test_the_reward_of_a_completion_stands_at_its_last_token():
  mask = jnp.array([[[1, 1, 0], [1, 1, 1], [1, 0, 0]]], bool)
  rewards = {"rewards": jnp.array([[2.0, 3.0, jnp.nan]])}
  np.testing.assert_array_equal(
    rollout._token_rewards(rewards, mask), [[[0, 2, 0], [0, 0, 3], [np.nan, 0, 0]]]
  )


def test_the_rewards_of_an_episode_stand_at_the_ends_of_its_turns():
  mask = jnp.array([[[1, 0, 1, 1], [1, 0, 1, 0]]], bool)
  rewards = {
    "rewards": jnp.array([[3.0, jnp.nan]]),
    "step_rewards": jnp.array([[[1.0, 2.0, jnp.nan], [jnp.nan] * 3]]),
    "step_ends": jnp.array([[[0, 3, 0], [0, 2, 0]]]),
  }
  np.testing.assert_array_equal(
    rollout._token_rewards(rewards, mask), [[[1, 0, 0, 2], [0, 0, np.nan, 0]]]
  )
