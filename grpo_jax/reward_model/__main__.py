"""Trains a reward model on preference pairs, and saves it as a Hugging Face folder.

python -m grpo_jax.reward_model --model SOURCE --data PAIRS --workdir DIR [--config.a.b=v]

The model is DIR/model afterwards: the `reward_model.source` of a run of grpo_jax.train. The same
command continues an interrupted one. Ctrl-C and SIGTERM finish the step, save and exit.
"""

import argparse
import logging
import sys

from grpo_jax import extras

if __name__ == "__main__":  # the imports below need the extra
  extras.require_for_command("train", "grpo_jax.reward_model")

from grpo_jax import config as configs
from grpo_jax.distributed import cluster, hosts
from grpo_jax.evaluate import table
from grpo_jax.learning.updates import SkippedError
from grpo_jax.models.io.writer import DTYPES
from grpo_jax.reward_model import training
from grpo_jax.reward_model.training import Settings
from grpo_jax.run import checkpoint, compilation, console, metrics, mirror
from grpo_jax.run import workdir as workdirs

# Flags that are settings of the data, as the task `table` has them.
SOURCE = ("eval_path", "eval_fraction", "split", "eval_split", "subset", "revision")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """Returns the flags, and the overrides of fields of the config."""
  parser = argparse.ArgumentParser(prog="python -m grpo_jax.reward_model", description=__doc__)
  add = parser.add_argument
  add("--model", required=True, help="a language model, or a classifier with one label")
  add("--data", required=True, nargs="+", help="files, a folder or a data set of the hub")
  add("--workdir", required=True, help="everything the command leaves; made if missing")
  add("--pairs-per-step", type=configs.at_least(1), default=32, help="pairs of an update")
  add("--center", type=float, default=0.0, help="coefficient that keeps rewards near 0")
  add("--max-length", type=configs.at_least(0), default=0, help="longest text in tokens")
  add("--drop", action="store_true", help="leave out pairs of equal or of too long texts")
  add("--key", help="column that identifies a prompt; default: the prompt")
  add("--eval-path", nargs="+", help="pairs for evaluation, given like --data")
  add("--eval-fraction", type=float, help="share of the prompts that is held out; default: 0.1")
  add("--split", help="split of a folder or a data set; default: train")
  add("--eval-split", help="its split for evaluation")
  add("--subset", help="config of a data set that has several")
  add("--revision", help="branch, tag or commit of a data set")
  add("--dtype", default="float32", choices=list(DTYPES), help="dtype of the saved weights")
  return parser.parse_known_args(argv)


def settings_of(arguments: argparse.Namespace) -> Settings:
  """Returns the settings that the flags hold."""
  source = {name: getattr(arguments, name) for name in SOURCE}
  fields = ("model", "data", "pairs_per_step", "center", "max_length", "drop", "key", "dtype")
  return Settings(
    source={name: value for name, value in source.items() if value is not None},
    **{name: getattr(arguments, name) for name in fields},
  )


@console.guarded()
def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  arguments, overrides = parse(argv)
  # What orbax logs with stacks comes back as errors, which are explained.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  try:
    workdir = mirror.place_of(arguments.workdir)
    config = training.with_overrides(overrides)
    with hosts.session(config.hosts.heartbeat, config.hosts.wait), mirror.opened(workdir) as place:
      inside = place.mirror is not None
      compilation.use_cache(config.compilation_cache, place.folder, inside)
      with hosts.together("reading the settings and what they name"):
        config = training.with_chat_date(config, place.folder)
        run = training.build(settings_of(arguments), config)
      results = training.train(run, place)
      first = hosts.is_first()
  except (configs.ConfigError, workdirs.WorkdirError, cluster.ClusterError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except hosts.HostError as error:
    print(f"error: {error}", file=sys.stderr)
    return cluster.FAILED
  except (SkippedError, checkpoint.NotFiniteError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 3
  except KeyboardInterrupt as error:
    print(f"{str(error) or 'stopped'}; the same command continues {arguments.workdir}")
    return getattr(error, "exit_code", 130)
  except checkpoint.SaveError as error:
    print(f"error: {error}{checkpoint.remedy(error)}", file=sys.stderr)
    return 74
  if first:
    if results:
      before = metrics.at(mirror.folder_of(workdir), 0, "eval/")
      print(table(results, f"held out, after {run.config.steps} steps", before, unit="pairs"))
    print(f"in {workdir}: model/ (a Hugging Face folder), metrics.jsonl, curve.png, checkpoints/")
  return 0


if __name__ == "__main__":
  sys.exit(main())
