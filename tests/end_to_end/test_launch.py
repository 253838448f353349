"""Tests the syntax of the launch scripts and the commands that they run.

Nothing here reaches a cluster: stand-ins for the clients print their arguments.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grpo_jax.distributed import cluster

LAUNCH = Path("experiments/launch")
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def shell(script, *arguments, path="", **variables):
  environment = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": os.environ["HOME"], **variables}
  return subprocess.run(
    ["bash", str(script), *arguments], env=environment, capture_output=True, text=True, timeout=60
  )


def stand_in(folder, name, body):
  file = folder / name
  file.write_text(f"#!/usr/bin/env bash\n{body}\n")
  file.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_scripts_are_sound(script):
  assert script.read_text().startswith("#!/usr/bin/env bash\n")
  checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
  assert checked.returncode == 0, checked.stderr
  linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  if linter:
    checked = subprocess.run([linter, str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_tpu_script_starts_the_run_on_every_host(tmp_path):
  stand_in(tmp_path, "gcloud", 'printf "%s\\n" "$@"')
  completed = shell(
    LAUNCH / "tpu_pod.sh", "train", "a file.py", "/mnt/runs/x", "--config.model.source=a b",
    path=str(tmp_path), TPU="pod", ZONE="here",
  )  # fmt: skip
  lines = completed.stdout.splitlines()
  assert lines[:6] == ["compute", "tpus", "tpu-vm", "ssh", "pod", lines[5]]
  assert lines[6:] == ["--zone=here", "--worker=all"]
  # The hosts' shell parses it, with a stand-in for python that prints its arguments.
  remote = lines[5].removeprefix("--command=")
  stand_in(tmp_path, "python", 'printf "%s\\n" "$GRPO_JAX_CLUSTER" "$@"')
  (tmp_path / "grpo_jax/.venv/bin").mkdir(parents=True)
  (tmp_path / "python").rename(tmp_path / "grpo_jax/.venv/bin/python")
  ran = subprocess.run(["bash", "-c", remote], cwd=tmp_path, capture_output=True, text=True)
  assert ran.stdout.splitlines() == [
    "auto", "-u", "-m", "grpo_jax.train", "--config", "a file.py", "--workdir", "/mnt/runs/x",
    "--config.model.source=a b",
  ]  # fmt: skip
  assert cluster.detect({"GRPO_JAX_CLUSTER": "auto"}) == {}


def test_the_tpu_script_prints_its_usage():
  completed = shell(LAUNCH / "tpu_pod.sh")
  assert completed.returncode == 2
  assert "setup" in completed.stderr
  assert "CONFIG WORKDIR" in completed.stderr
  dry = shell(LAUNCH / "tpu_pod.sh", "setup", TPU="pod", ZONE="here", PROJECT="p", DRY_RUN="1")
  assert dry.stdout.count("--project=p") == 2
  assert "pip" in dry.stdout


def test_the_slurm_script_gives_every_process_an_address(tmp_path):
  stand_in(tmp_path, "scontrol", 'echo "$@" >&2; printf "node07\\nnode08\\n"')
  # srun starts a process on each node, with its index in SLURM_PROCID.
  stand_in(
    tmp_path,
    "srun",
    "for i in 0 1; do SLURM_PROCID=$i bash -c 'echo \"$SLURM_PROCID $JAX_COORDINATOR_ADDRESS $*\"' "
    '_ "$@"; done',
  )
  completed = shell(
    LAUNCH / "slurm.sbatch", "x.py", "/runs/x", "--config.steps=3",
    path=str(tmp_path), SLURM_JOB_NODELIST="node[07-08]", SLURM_JOB_ID="123456", SLURM_NTASKS="2",
  )  # fmt: skip
  assert completed.returncode == 0, completed.stderr
  assert "show hostnames node[07-08]" in completed.stderr
  command = (
    "--kill-on-bad-exit=1 .venv/bin/python -u -m grpo_jax.train --config x.py --workdir /runs/x "
    "--config.steps=3"
  )
  address = "node07:23456"
  assert completed.stdout.splitlines() == [f"{i} {address} {command}" for i in range(2)]
  arguments = cluster.detect(
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "JAX_COORDINATOR_ADDRESS": address}
  )
  names = ("coordinator_address", "num_processes", "process_id")
  assert [arguments[name] for name in names] == [address, 2, 1]
  assert shell(LAUNCH / "slurm.sbatch", "x.py").returncode == 2


def test_the_job_set_is_consistent():
  """By the JobSet and Job APIs: the numbers of hosts agree, and every pod knows its index."""
  jobs = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
  assert (jobs["apiVersion"], jobs["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  [replicated] = jobs["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  assert job["completionMode"] == "Indexed"
  assert job["parallelism"] == job["completions"]
  pod = job["template"]["spec"]
  [container] = pod["containers"]
  values = {entry["name"]: entry for entry in container["env"]}
  assert values["JAX_NUM_PROCESSES"]["value"] == str(job["completions"])
  host, port = values["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
  name = jobs["metadata"]["name"]
  assert host == f"{name}-{replicated['name']}-0-0.{name}"
  assert {"containerPort": int(port)} in container["ports"]
  index = values["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  # A pod restarted alone could not join the others' collectives: the whole set restarts.
  assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
  assert jobs["spec"]["failurePolicy"]["maxRestarts"] > 0
  chips = 1
  for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
    chips *= int(size)
  assert chips == job["completions"] * container["resources"]["limits"]["google.com/tpu"]
  # No volume: the hosts share nothing but the bucket.
  [workdir] = [a for a in container["args"] if a.startswith("--workdir=")]
  assert workdir.startswith("--workdir=gs://")
  assert not {"volumes", "volumeMounts"} & (set(pod) | set(container))
  assert pod["terminationGracePeriodSeconds"] > 30
  assert container["command"][-1] == "grpo_jax.train"
  config = next(a for a in container["args"] if a.startswith("--config="))
  assert Path(config.removeprefix("--config=")).is_file()


def test_the_container_copies_files_that_exist():
  lines = Path("Containerfile").read_text().splitlines()
  copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
  assert copied
  assert all(Path(name).exists() for name in copied)
  assert "USER root" not in lines
  assert lines[-1] == 'ENTRYPOINT ["python", "-m", "grpo_jax.train"]'
