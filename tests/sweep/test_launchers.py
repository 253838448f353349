"""Tests what a sweep prints for other machines, with stand-ins for their clients."""

import shlex
import subprocess
from pathlib import Path

import yaml

from grpo_jax.sweep.launchers import LAUNCHERS

COMMANDS = {
  "seed=0": ["--config", "my x.py", "--workdir", "runs/s/seed=0", "--config.seed=0"],
  "stop=a-1": [
    "--config",
    "my x.py",
    "--workdir",
    "runs/s/b",
    "--config.rollout.stop=('\"', '$(x)')",
  ],
}


def run_bash(script, folder, **variables):
  for name, body in {
    "scontrol": 'printf "node07\\nnode08\\n"',
    "srun": 'printf "%s\\n" "$JAX_COORDINATOR_ADDRESS" "$@"',
  }.items():
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)
  environment = {
    "PATH": f"{folder}:/usr/bin:/bin",
    "SLURM_JOB_NODELIST": "node[07-08]",
    **variables,
  }
  return subprocess.run(
    ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60
  )


def test_shell_lines_are_commands():
  lines = LAUNCHERS["shell"](COMMANDS).splitlines()
  assert [shlex.split(line)[3:] for line in lines] == list(COMMANDS.values())
  assert lines[0].startswith("python -m grpo_jax.train --config 'my x.py'")


def test_each_task_of_the_array_starts_its_run(tmp_path):
  script = LAUNCHERS["slurm"](COMMANDS)
  assert "#SBATCH --array=0-1\n" in script
  for index, arguments in enumerate(COMMANDS.values()):
    ran = run_bash(script, tmp_path, SLURM_ARRAY_TASK_ID=str(index), SLURM_JOB_ID="123456")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
      "node07:23456", "--kill-on-bad-exit=1", ".venv/bin/python", "-u", "-m", "grpo_jax.train",
      *arguments,
    ]  # fmt: skip
  ran = run_bash(script, tmp_path, SLURM_ARRAY_TASK_ID="2", SLURM_JOB_ID="1")
  assert (ran.returncode, ran.stderr) == (2, "there is no run 2\n")


def test_there_is_a_job_set_for_each_run():
  """They differ from the one in `experiments/launch` in their name, arguments and volume."""
  sets = list(yaml.safe_load_all(LAUNCHERS["jobset"](COMMANDS)))
  assert [s["metadata"]["annotations"]["grpo-jax/run"] for s in sets] == list(COMMANDS)
  assert len({s["metadata"]["name"] for s in sets}) == 2
  model = yaml.safe_load(Path("experiments/launch/jobset.yaml").read_text())
  for single, arguments in zip(sets, COMMANDS.values()):
    name = single["metadata"].pop("name")
    del single["metadata"]["annotations"]
    container = container_of(single)
    assert container["args"] == arguments
    assert container["env"][0]["value"] == f"{name}-hosts-0-0.{name}:8476"
    container["args"] = container["env"][0]["value"] = None
    [mount] = container.pop("volumeMounts")
    [volume] = pod_of(single).pop("volumes")
    assert mount["name"] == volume["name"]
  container = container_of(model)
  container["args"] = container["env"][0]["value"] = None
  del model["metadata"]["name"]
  assert sets == [model, model]


def pod_of(job_set):
  job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
  return job["template"]["spec"]


def container_of(job_set):
  return pod_of(job_set)["containers"][0]


def test_a_bucket_needs_no_volume():
  command = ["--config", "x.py", "--workdir", "gs://bucket/s/seed=0"]
  [single] = yaml.safe_load_all(LAUNCHERS["jobset"]({"seed=0": command}))
  container = container_of(single)
  assert "volumeMounts" not in container
  assert "volumes" not in pod_of(single)
  assert container["args"] == command
