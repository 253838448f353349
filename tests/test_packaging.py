"""Builds the wheel and the source distribution, and uses the wheel with its base requirements only.

Nothing is downloaded, except by the test marked slow: the empty environment gets links to jax,
numpy, jaxtyping and their dependencies from the environment that runs the tests.
"""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import grpo_jax
from grpo_jax import extras

ROOT = Path(__file__).parents[1]
BASE = {"jax", "numpy", "jaxtyping"}
EXTRAS = {
  "train", "tasks", "gguf", "tensorboard", "wandb", "trackio", "openenv", "textarena", "gcs", "s3",
  "cuda", "tpu", "plan", "all", "docs", "test",
}  # fmt: skip
DESCRIPTION = (
  "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
  "CITATION.cff",
)  # fmt: skip
COMMANDS = {
  "grpo_jax.report": "train",
  "grpo_jax.train": "train",
  "grpo_jax.doctor": "train",
  "grpo_jax.evaluate": "train",
  "grpo_jax.export": "train",
  "grpo_jax.replay": "train",
  "grpo_jax.reward_model": "train",
  "grpo_jax.sweep": "train",
  "grpo_jax.plan": "plan",
}


# --- setup.cfg, requirements.txt and the table of modules -----------------------------------------


def requirements(extra=None):
  """Requirements of an extra in setup.cfg, or of the base, with the extras they refer to."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  text = parser["options.extras_require"][extra] if extra else parser["options"]["install_requires"]
  found = []
  for requirement in map(Requirement, text.split("\n")[1:]):
    if requirement.name == "grpo_jax":
      found += [other for name in sorted(requirement.extras) for other in requirements(name)]
    else:
      found.append(requirement)
  return found


def names(found):
  return {canonicalize_name(requirement.name) for requirement in found}


def test_the_base_is_three_packages():
  assert names(requirements()) == BASE


@pytest.mark.parametrize("extra", ["train", "tasks", "gguf"])
def test_an_error_can_name_every_package_of_an_extra(extra):
  """`extras.MODULES` lists the top-level modules of exactly the packages in setup.cfg."""
  distributions = metadata.packages_distributions()
  provided = [
    {canonicalize_name(name) for name in distributions[module]} for module in extras.MODULES[extra]
  ]
  packages = names(requirements(extra)) - BASE
  assert all(provider & packages for provider in provided)
  assert packages <= set().union(*provided)


def pins(file):
  """Versions by package of a requirements file; every line of it has to pin one."""
  lines = (ROOT / file).read_text().splitlines()
  versions = {}
  for pin in (Requirement(line) for line in lines if line and not line.startswith("#")):
    (specifier,) = pin.specifier
    assert specifier.operator == "==", pin
    versions[canonicalize_name(pin.name)] = specifier.version
  return versions


def test_the_pinned_versions_are_those_that_setup_cfg_allows():
  required = requirements() + requirements("test") + requirements("docs")
  versions = pins("requirements.txt") | pins("requirements-docs.txt")
  assert set(versions) == names(required) | {"jaxlib"}
  for requirement in required:
    assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


# --- wheel and source distribution ----------------------------------------------------------------


def build(source, out, kind):
  """Builds a "wheel" or an "sdist" of a folder with the setuptools of this environment."""
  out.mkdir(exist_ok=True)
  code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
  ran = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr
  (built,) = out.iterdir()
  return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sdist")
  source = folder / "source"
  ignore = shutil.ignore_patterns("__pycache__")
  shutil.copytree(ROOT / "grpo_jax", source / "grpo_jax", ignore=ignore)
  shutil.copytree(ROOT / "tests/core", source / "tests", ignore=ignore)  # stays out
  for name in DESCRIPTION:
    shutil.copy(ROOT / name, source)
  return build(source, folder / "out", "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
  """The wheel that is built from the source distribution, so both are complete or neither is."""
  folder = tmp_path_factory.mktemp("wheel")
  with tarfile.open(sdist) as archive:
    archive.extractall(folder, filter="data")
  (source,) = folder.iterdir()
  return build(source, folder / "out", "wheel")


def test_the_wheel_holds_every_module_and_no_other(wheel):
  with zipfile.ZipFile(wheel) as archive:
    files = archive.namelist()
  modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grpo_jax").rglob("*.py")}
  assets = {p.relative_to(ROOT).as_posix() for p in (ROOT / "grpo_jax/report/assets").iterdir()}
  assert len(assets) == 6
  others = {"grpo_jax/py.typed", *assets}
  assert {name for name in files if ".dist-info/" not in name} == modules | others
  assert any(re.fullmatch(r"grpo_jax-[^/]*\.dist-info/(licenses/)?LICENSE", name) for name in files)


def test_the_source_distribution_holds_its_description_and_no_tests(sdist):
  with tarfile.open(sdist) as archive:
    files = {name.partition("/")[2] for name in archive.getnames()}
  assert set(DESCRIPTION) <= files
  assert not any(name.startswith("tests") for name in files)


def test_the_license_is_the_whole_apache_license():
  text = (ROOT / "LICENSE").read_text()
  sections = re.findall(r"^   (\d)\. ", text, re.M)
  assert "Apache License" in text
  assert sections == list("123456789")
  assert "END OF TERMS AND CONDITIONS" in text


def test_the_metadata_is_that_of_the_design(wheel):
  with zipfile.ZipFile(wheel) as archive:
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    fields = message_from_bytes(archive.read(name))
  assert fields["Version"] == grpo_jax.__version__
  assert set(fields.get_all("Provides-Extra")) == EXTRAS
  base = [
    requirement
    for requirement in map(Requirement, fields.get_all("Requires-Dist"))
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
  ]
  assert names(base) == BASE


def test_the_version_stands_in_one_place():
  tree = ast.parse((ROOT / "grpo_jax/__init__.py").read_text())
  values = [
    node.value.value
    for node in tree.body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
  ]
  assert values == [grpo_jax.__version__]
  assert f"\nversion: {grpo_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
  assert f"\n## {grpo_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# --- the wheel in an environment with its base requirements only ----------------------------------


def closure(roots):
  """Distributions of this environment that `roots` need, themselves included, by name."""
  found, queue = {}, list(roots)
  while queue:
    name = canonicalize_name(queue.pop())
    if name not in found:
      found[name] = metadata.distribution(name)
      for requirement in map(Requirement, found[name].requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
          queue.append(requirement.name)
  return found


def run(python, code_or_module, *arguments, flag="-c", cwd=None):
  """Runs code, or a module with flag="-m", away from the checkout."""
  return subprocess.run(
    [python, "-I", flag, code_or_module, *arguments],
    capture_output=True, text=True, timeout=300, cwd=cwd or Path(python).parent,
    env=dict(os.environ, JAX_PLATFORMS="cpu"),
  )  # fmt: skip


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
  """Interpreter of an environment that holds the wheel and what its base requires, by links."""
  folder = tmp_path_factory.mktemp("venv")
  venv.create(folder, symlinks=True)
  python = str(folder / "bin/python")
  subprocess.run(
    [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
     "--no-index", str(wheel)],
    check=True,
  )  # fmt: skip
  (site,) = folder.glob("lib/python*/site-packages")
  for distribution in closure(BASE).values():
    tops = {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "bin")}
    for top in tops - {"__pycache__"}:
      if not (site / top).exists():
        (site / top).symlink_to(distribution.locate_file(top))
  return python


USE = """
import importlib, importlib.util, pkgutil
import jax.numpy as jnp
import grpo_jax, grpo_jax.core

missing = ("flax", "optax", "ml_collections", "transformers", "gguf", "pytest")
assert not any(importlib.util.find_spec(name) for name in missing)
for module in pkgutil.walk_packages(grpo_jax.core.__path__, "grpo_jax.core."):
  importlib.import_module(module.name)
logp, mask = jnp.full((1, 2, 3), -0.5), jnp.ones((1, 2, 3), bool)
advantages = grpo_jax.group_centered(jnp.array([[1.0, 0.0]]))
loss, metrics = grpo_jax.grpo_loss(logp, jnp.array([[3.0, 1.0]]), mask)
assert advantages.tolist() == [[0.5, -0.5]]
assert abs(float(loss) + 2.0) < 1e-6  # every ratio is 1: the loss is minus the mean advantage
grpo_jax.testing.check_padding(grpo_jax.grpo_loss, arrays=("old_logp",))
def unmasked(logp, advantages, mask):
  return jnp.mean(logp * advantages[:, None])
try:
  grpo_jax.testing.check_padding(unmasked)
except grpo_jax.testing.Counterexample:
  print(grpo_jax.__file__)
"""


def check_base(python):
  """Computes a loss, runs `grpo_jax.testing` and imports the core in an environment."""
  used = run(python, USE)
  assert used.returncode == 0, used.stderr
  assert "site-packages" in used.stdout


def test_the_core_works_with_the_base_requirements(python):
  check_base(python)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_its_extra_names_it(command, python):
  ran = run(python, command, flag="-m")
  install = f"pip install 'grpo_jax[{COMMANDS[command]}]'"
  expected = f"error: python -m {command} needs ml_collections: {install}\n"
  assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", expected)


MISSING = {
  "from grpo_jax.tasks import make_task; make_task('reasoning_gym', dataset='chain_sum')": (
    "the task reasoning_gym needs reasoning_gym: pip install 'grpo_jax[tasks]'"
  ),
  "from grpo_jax.tasks import make_task; make_task('gsm8k')": (
    "the task gsm8k needs tensorflow_datasets: pip install 'grpo_jax[tasks]'"
  ),
  "from grpo_jax.tasks.rewards.graders import make_grader; make_grader('math')": (
    "the grader 'math' needs math_verify: pip install 'grpo_jax[tasks]'"
  ),
  "from grpo_jax.models.io.gguf import *; open_gguf(Path('model.gguf'))": (
    "model.gguf needs gguf: pip install 'grpo_jax[gguf]'"
  ),
}


@pytest.mark.parametrize("code", MISSING)
def test_a_task_or_a_format_without_its_extra_names_it(code, python):
  ran = run(python, code)
  assert ran.returncode == 1
  assert ran.stderr.splitlines()[-1] == f"ModuleNotFoundError: {MISSING[code]}"


def test_every_command_is_tried():
  """A module of the package that `python -m` runs is in the table above."""
  commands = set()
  for path in (ROOT / "grpo_jax").rglob("*.py"):
    if 'if __name__ == "__main__":\n  sys.exit(main())' in path.read_text():
      name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
      commands.add(name.removesuffix(".__main__"))
  assert commands == set(COMMANDS)


@pytest.mark.slow
def test_the_core_works_as_installed_from_the_index(wheel, tmp_path):
  venv.create(tmp_path, with_pip=True)
  python = str(tmp_path / "bin/python")
  subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
  check_base(python)
