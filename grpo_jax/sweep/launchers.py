"""Writes the runs of a sweep as a list of commands, a SLURM array, or JobSets.

The SLURM script and the JobSets are those of `experiments/launch`, for several runs, with lines to
change by hand.
"""

import hashlib
import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence

from grpo_jax import addresses

Commands = Mapping[str, Sequence[str]]  # arguments of `grpo_jax.train` by the name of the run

_SLURM = """\
#!/usr/bin/env bash
# Trains a sweep as an array: each task is a run on nodes of its own. Change the lines of #SBATCH,
# and submit it in the folder of the project. Submitted again, it continues what is unfinished.
#SBATCH --job-name=grpo
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=grpo-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

case "$SLURM_ARRAY_TASK_ID" in
{cases}
  *)
    echo "there is no run $SLURM_ARRAY_TASK_ID" >&2
    exit 2
    ;;
esac
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export JAX_COORDINATOR_ADDRESS="${{nodes[0]}}:$((20000 + SLURM_JOB_ID % 20000))"
srun --kill-on-bad-exit=1 .venv/bin/python -u -m grpo_jax.train "${{arguments[@]}}"
"""

_JOBSET = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations:
    grpo-jax/run: {run}
spec:
  failurePolicy:
    maxRestarts: 10
  replicatedJobs:
    - name: hosts
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          parallelism: 4 # hosts
          completions: 4 # hosts
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120 # for the step, the save and its upload
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice # kind of chip
                cloud.google.com/gke-tpu-topology: 4x4 # shape of the slice
              containers:
                - name: train
                  image: REGISTRY/grpo_jax:TAG # your image
                  command: [python, -u, -m, grpo_jax.train]
                  args:
{arguments}
                  env:
                    - name: JAX_COORDINATOR_ADDRESS
                      value: {name}-hosts-0-0.{name}:8476
                    - name: JAX_NUM_PROCESSES
                      value: "4" # hosts
                    - name: JAX_PROCESS_ID
                      valueFrom:
                        fieldRef:
                          fieldPath: {index}
                  ports:
                    - containerPort: 8476
                  resources:
                    limits:
                      google.com/tpu: 4 # chips of a host
"""
# Of work directories that are paths: they need a volume that all hosts share.
_VOLUME = """\
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: runs # your volume
"""


def shell(commands: Commands) -> str:
  """Returns one command a line.

  Example:
    >>> print(shell({"a": ["--config", "x.py", "--workdir", "my runs/a"]}), end="")
    python -m grpo_jax.train --config x.py --workdir 'my runs/a'
  """
  lines = [shlex.join(["python", "-m", "grpo_jax.train", *c]) + "\n" for c in commands.values()]
  return "".join(lines)


def slurm(commands: Commands) -> str:
  """Returns a script for `sbatch` with one array task for each run."""
  cases = "\n".join(
    f"  {i}) arguments=({shlex.join(arguments)}) ;;"
    for i, arguments in enumerate(commands.values())
  )
  return _SLURM.format(last=len(commands) - 1, cases=cases)


def jobset(commands: Commands) -> str:
  """Returns a JobSet for each run, as documents of one YAML file for `kubectl apply -f`."""
  return "---\n".join(_jobset(name, arguments) for name, arguments in commands.items())


def _jobset(run: str, arguments: Sequence[str]) -> str:
  text = _JOBSET.format(
    name=f"grpo-{hashlib.sha256(' '.join(arguments).encode()).hexdigest()[:8]}",
    run=json.dumps(run),
    index="metadata.annotations['batch.kubernetes.io/job-completion-index']",
    # A JSON string is one of YAML.
    arguments=textwrap.indent("\n".join(f"- {json.dumps(a)}" for a in arguments), " " * 20),
  )
  workdir = arguments[arguments.index("--workdir") + 1]
  return text + (_VOLUME if addresses.is_path(workdir) else "")


LAUNCHERS = {"shell": shell, "slurm": slurm, "jobset": jobset}
