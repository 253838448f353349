"""Tests that data is never run, that paths stay in their folders, and that pins are sound."""

import ast
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import config
from grpo_jax.distributed import hosts
from grpo_jax.models.io.sources import resolve
from grpo_jax.models.load import open_weights
from grpo_jax.tasks.table import table_task
from grpo_jax.tokens import load_tokenizer
from tools import audit_pins

TINY = Path("tests/fixtures/tiny_llama")
FILES = sorted([*Path("grpo_jax").rglob("*.py"), *Path("experiments").rglob("*.py")])

# Modules that read objects which name their own classes, and may therefore run anything.
UNSAFE = {
  "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "unsafe_load", "full_load"}
# A worker gets its task through a pipe from the process that starts it, never from a file.
MAY_PICKLE = {
  "grpo_jax/tasks/rewards/workers.py", "grpo_jax/tasks/rewards/worker_process.py",
  "grpo_jax/environments/workers.py", "grpo_jax/environments/worker_process.py",
}  # fmt: skip
# These import what a user names as a program: an experiment file, a reward's file or module.
MAY_IMPORT = {
  "grpo_jax/config.py",
  "grpo_jax/tasks/rewards/loading.py",
  "grpo_jax/tasks/rewards/worker_process.py",
}


def offences(path, source):
  """Returns what a file does that only the files in the lists above may do."""
  names = []
  for node in ast.walk(ast.parse(source)):
    modules = []
    if isinstance(node, ast.Import):
      modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
      modules = [node.module]
    names += [m for m in modules if m.split(".")[0] in UNSAFE and path not in MAY_PICKLE]
    if isinstance(node, ast.Call):
      name = getattr(node.func, "attr", getattr(node.func, "id", ""))
      plain = isinstance(node.func, ast.Name) or name not in ("eval", "compile")
      if name in CALLS and plain:
        names.append(name)
      if name in ("exec_module", "import_module", "run_path", "run_module"):
        names += [name] if path not in MAY_IMPORT else []
      for keyword in node.keywords:
        on = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
        if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and on:
          names.append(keyword.arg)
  return names


# They run code on purpose, in a child that can reach nothing. `tester.py` imports constants of one.
SANDBOX = {
  f"grpo_jax/environments/{name}.py"
  for name in ("sandbox_server", "candidate_process", "tester_process")
}


@pytest.mark.parametrize(
  "path", [path for path in FILES if path.as_posix() not in SANDBOX], ids=str
)
def test_no_file_runs_data(path):
  assert not offences(path.as_posix(), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    ("import pickle", ["pickle"]),
    ("def f():\n  from torch import load", ["torch"]),
    ("eval(x)", ["eval"]),
    ("os.system(x)", ["system"]),
    ("importlib.import_module(x)", ["import_module"]),
    ("np.load(f, allow_pickle=True)", ["allow_pickle"]),
    ("np.load(f, allow_pickle=False)", []),
    ("AutoTokenizer.from_pretrained(x, trust_remote_code=flag)", ["trust_remote_code"]),
    ("subprocess.run(x, shell=True)", ["shell"]),
    ("re.compile(x); ast.literal_eval(x); model.eval()", []),
  ],
)
def test_each_offence_is_found(source, expected):
  assert offences("grpo_jax/new.py", source) == expected


def test_pages_of_modules_say_that_a_config_is_a_program(tmp_path):
  for file in MAY_IMPORT - {"grpo_jax/tasks/rewards/worker_process.py"}:
    assert "file" in Path(file).read_text(encoding="utf-8").split('"""')[1]
  assert "runs as one: load only files that you would run" in config.__doc__.replace("\n", " ")
  # The config of a finished run is data: JSON, read back without running anything.
  with pytest.raises(ValueError, match="is not an override"):
    config.override(config.default_config(), ["__import__('os').system('true')"])
  loaded = config.override(config.default_config(), ["--config.model.source=__import__('os')"])
  assert loaded.model.source == "__import__('os')"


def test_names_in_rows_of_data_stay_text(tmp_path):
  marker = tmp_path / "ran"
  code = tmp_path / "evil.py"
  code.write_text(f"open({str(marker)!r}, 'w')\ndef right(**columns):\n  return []\n")
  row = {"prompt": f"{code}:right", "answer": "!!python/object/apply:os.abort []"}
  row |= {"reward": f"{code}:right", "accuracy": "eval:print"}
  data = tmp_path / "rows.jsonl"
  data.write_text("".join(json.dumps(row | {"prompt": f"{i}"}) + "\n" for i in range(4)))
  task = table_task(str(data), "exact")
  examples = [example for split in task.splits.values() for example in split]
  assert examples[0].columns["reward"] == f"{code}:right"
  assert not marker.exists()


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
  folder = tmp_path / "model"
  shutil.copytree(TINY, folder)
  return folder


def change(file, **values):
  file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_code_beside_a_model_is_not_run(model, tmp_path):
  marker = tmp_path / "ran"
  (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
  for file in ("config.json", "tokenizer_config.json"):
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    change(model / file, auto_map=dict.fromkeys(names, "evil.Evil"), tokenizer_class="Evil")
  open_weights(str(model))
  load_tokenizer(str(model))
  assert not marker.exists()


def test_a_chat_template_stays_in_its_sandbox(model):
  evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
  for file in model.glob("*.jinja"):
    file.unlink()
  change(model / "tokenizer_config.json", chat_template=evil)
  tokenizer = load_tokenizer(str(model))
  with pytest.raises(ValueError, match=r"SecurityError: .* unsafe"):
    tokenizer.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("folder", ["..", "{}", "a/../.."])
def test_a_list_of_shards_cannot_name_files_elsewhere(model, tmp_path, folder):
  name = f"{folder}/outside.safetensors"
  (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
  names = {"model.embed_tokens.weight": name.format(tmp_path)}
  (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
  with pytest.raises(ValueError, match="outside its folder"):
    open_weights(str(model))


@pytest.mark.parametrize("source", ["package:os.path", "package:../x", "a/../../etc", "../x/y"])
def test_a_source_cannot_name_a_path_by_its_form(source):
  with pytest.raises(FileNotFoundError):
    resolve(source)


def test_hosts_exchange_arrays_but_no_objects():
  with pytest.raises(ValueError, match="allow_pickle"):
    hosts._unpack(_archive(np.array([{}])))
  assert hosts._unpack(_archive(np.arange(2)))["a"].tolist() == [0, 1]


def _archive(array):
  file = io.BytesIO()
  np.savez(file, a=array)
  return file.getvalue()


# --- pins -----------------------------------------------------------------------------------------


def test_pins_are_exact_and_meet_the_requirements():
  assert audit_pins.pins("jax==0.10.2\n# a\nA_b[x]==1.0 # c\n") == {"jax": "0.10.2", "a-b": "1.0"}
  for line in ("jax>=0.10", "jax", "git+https://example.com/jax", "--index-url x", "jax==0.10.*"):
    with pytest.raises(ValueError, match="is not an exact pin"):
      audit_pins.pins(line)
  setup = (
    "[options]\ninstall_requires =\n  jax>=0.6\n  numpy\n[options.extras_require]\n"
    "train =\n  jax>=0.10.2\n  m[x]\ntest =\n  grpo_jax[all]\ntpu =\n  jax[tpu]>=9\n  libtpu\n"
  )
  assert audit_pins.lowest(setup) == {"jax": "0.10.2", "numpy": "0", "m": "0"}
  with pytest.raises(ValueError, match="neither a name nor name>=version"):
    audit_pins.lowest("[options]\ninstall_requires =\n  jax<1\n")
  lines = audit_pins.problems(
    {"jax": "0.10.2", "jinja2": "3.1.5"},
    {"jax": "0.11", "flax": "0"},
    {"jax": "0.10.3", "tqdm": "4.66.2", "idna": "3.10"},
  )
  assert [line.split(":")[0] for line in lines] == ["jax", "jax", "flax", "jinja2", "tqdm"]


def test_only_the_pinned_environment_is_compared_with_the_pins():
  """An environment with another jax, such as one of `make test-matrix`, was not made from them."""
  pinned, required = {"jax": "0.10.2", "flax": "0.12.8"}, {"jax": "0.6", "flax": "0.12.8"}
  newest = {"jax": "0.12.0.1", "flax": "0.12.12"}
  assert audit_pins.problems(pinned, required, audit_pins.made_from(pinned, newest)) == []
  drifted = {"jax": "0.10.2", "flax": "0.12.12"}
  (line,) = audit_pins.problems(pinned, required, audit_pins.made_from(pinned, drifted))
  assert line == "flax: 0.12.8 is pinned, 0.12.12 is installed"


def test_the_pins_of_this_project_hold():
  assert audit_pins.main() == 0


def test_nothing_imports_the_program_that_runs_code():
  for path in FILES:
    source = path.read_text(encoding="utf-8")
    imports = re.findall(r"^\s*(?:from|import) .*sandbox_server", source, re.MULTILINE)
    assert not imports, path
