"""Opens damaged copies of every kind of file that a run reads, in a process of its own.

    python -m tests.helpers.hostile_files COUNT SEED KIND [KIND ...]

Each copy must be refused by an error of the project that names the file, or give what the valid
file gives. A copy may take 20 s, and the process 2 GB. The last line of the output is a JSON list
of the copies that did something else.
"""

import copy
import faulthandler
import json
import math
import re
import shutil
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from grpo_jax.build import build
from grpo_jax.config import ConfigError, default_config, to_saved
from grpo_jax.reward_model import RewardModel
from grpo_jax.run.workdir import WorkdirError
from grpo_jax.tokens import encode_prompt
from grpo_jax.train import check_workdir
from tests.helpers import tiny_gguf
from tests.helpers.model_files import FAMILIES, FIXTURES, UNTIED

SECONDS, BYTES = 20, 2 * 10**9
ROWS = [{"prompt": f"{i} + 1", "answer": i + 1, "note": {"by": ["a", None]}} for i in range(3)]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 + 34"}]
# Values of another type or out of range, and whether the result may then differ: a number that is
# only large may be valid.
STRICT = (math.nan, math.inf, -math.inf, -1, -7.5, "", "x", True, [], {}, ["x"], {"x": 1}, 0.5)
LOOSE = (None, 0, 2**31, 2**63, 10**30, 10**400, "a" * 5000, [[[]]] * 9)


# --- damage ---------------------------------------------------------------------------------------


def places(value, path=()):
  """Returns the paths of all values in JSON data, as tuples of keys."""
  # Of a list and of a vocabulary, the first items stand for the others.
  items = list(value.items() if isinstance(value, dict) else enumerate(value[:2]))
  items = items if len(items) < 100 else items[:3]
  paths = []
  for key, item in items:
    paths.append((*path, key))
    if isinstance(item, dict | list):
      paths += places(item, (*path, key))
  return paths


def same_kind(a, b):
  """Tells whether a file may well hold a value in the place of another one."""
  numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b)]
  return all(numbers) or type(a) is type(b)


def damage_json(data, value):
  """Returns damaged text of JSON data, what was done, and whether the result must be the same."""
  value = copy.deepcopy(value)
  path = data.draw(st.sampled_from(places(value)))
  *parents, last = path
  parent = value
  for key in parents:
    parent = parent[key]
  old, kind = parent[last], data.draw(st.sampled_from(("drop", "strict", "loose", "extend", "cut")))
  strict = False
  if kind == "drop":
    del parent[last]
  elif kind in ("strict", "loose"):
    new = data.draw(st.sampled_from(STRICT if kind == "strict" else LOOSE))
    strict = kind == "strict" and not same_kind(old, new) and old is not None
    parent[last] = new
    kind = f"{kind} {str(new)[:40]!r}"
  elif kind == "extend":
    if isinstance(parent, dict):
      parent[data.draw(st.sampled_from(("extra", "", "a\0b", "\ud83d")))] = old
    else:
      parent.append(old)
  sys.set_int_max_str_digits(0)
  text = json.dumps(value)
  sys.set_int_max_str_digits(4300)
  if kind == "cut":
    text = text[: data.draw(st.integers(0, len(text) - 1))]
  return text.encode(), f"{kind} at {path}", strict


def damage_bytes(data, content, header):
  """Returns damaged bytes; `header` is the number of bytes in which most damage is done."""
  kind = data.draw(st.sampled_from(("cut", "extend", "set", "number")))
  at = data.draw(st.integers(0, min(header, len(content)) - 1))
  if kind == "cut":
    content = content[: data.draw(st.integers(0, len(content) - 1))]
  elif kind == "extend":
    content += bytes(data.draw(st.integers(1, 64)))
  elif kind == "set":
    content = content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
  else:
    number = data.draw(st.sampled_from((0, 2**63 - 1, 2**64 - 1, 10**9, 2**32)))
    content = content[:at] + number.to_bytes(8, "little") + content[at + 8 :]
  return content, f"{kind} at byte {at}", False


# --- what is opened -------------------------------------------------------------------------------


def config_for(folder, source, prompts=ROWS, **changes):
  """Returns the config of a small run on the model in `source`."""
  rows = Path(folder) / "rows.jsonl"
  if not rows.exists():
    rows.write_text("".join(json.dumps(row) + "\n" for row in prompts))
  c = default_config()
  c.model.source, c.task.name = str(source), "jsonl"
  c.rollout.prompts_per_step = c.rollout.group_size = 2
  c.rollout.completion_length = 4
  with c.unlocked():
    c.task.settings.update({"path": str(rows), "reward": "numeric", "eval_fraction": 0.0})
  for name, value in changes.items():
    section, _, field = name.rpartition("__")
    c[section][field] = value
  return c


def opened(c):
  """Builds a run of a config; returns what it starts from, in a form that can be compared."""
  run = build(c)
  tokenizer = run.sampler.tokenizer
  prompts = [example.prompt for example in run.task.splits["train"]]
  adapters = None if run.loaded_adapters is None else digest(run.loaded_adapters)
  return repr((
    run.weights.config, digest(run.weights.read()), adapters, run.config.lora.rank,
    tokenizer.eos_ids, tokenizer.pad_id, [encode_prompt(tokenizer, p) for p in prompts],
  ))  # fmt: skip


def digest(tree):
  """Returns a sum of the numbers of each array of a tree, weighted by their places."""
  if isinstance(tree, dict):
    return [(name, digest(value)) for name, value in tree.items()]
  return float(np.asarray(tree, np.float64).ravel() @ np.arange(1, tree.size + 1))


class Kind:
  """Describes one kind of file: `file` in a folder made by `make`, and `open` to read it."""

  def __init__(self, file, make, open_, damage, *, strict=True):
    self.file, self.make, self.open, self.damage, self.strict = file, make, open_, damage, strict


def model(base):
  """Returns a function that copies a model into a folder."""
  return lambda folder: shutil.copytree(base, folder / "model")


def sharded(folder):
  """Makes a model whose tensors are in one shard with an index."""
  model(UNTIED)(folder)
  (folder / "model" / "model.safetensors").rename(folder / "model" / "part.safetensors")
  names = load_file(folder / "model" / "part.safetensors")
  index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "part.safetensors")}
  (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def with_scaling(kind):
  """Returns a function that makes a model whose config has the old fields of rotary scaling."""

  def make(folder):
    model(UNTIED)(folder)
    path = folder / "model" / "config.json"
    raw = json.loads(path.read_text())
    del raw["rope_parameters"]
    scaling = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 32}
    if kind == "llama3":
      scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    path.write_text(json.dumps(raw | {"rope_theta": 500.0, "rope_scaling": scaling}))

  return make


def open_model(folder):
  return opened(config_for(folder, folder / "model"))


def open_chat(folder):
  rows = [{"prompt": CHAT, "answer": 46}] * 2
  return opened(config_for(folder, folder / "model", rows))


def open_family(folder):
  """Reads a model without a tokenizer: its config and its weights alone."""
  from grpo_jax.models.load import load

  config, params = load(str(folder / "model"))
  return repr((config, digest(params)))


def adapters(folder):
  model(UNTIED)(folder)
  shutil.copytree(FIXTURES / "tiny_llama_lora", folder / "adapters")


def open_adapters(folder):
  c = config_for(folder, folder / "model", lora__source=str(folder / "adapters"))
  return opened(c)


def reward(folder):
  model(FIXTURES / "tiny_llama_reward")(folder)


def open_reward(folder):
  loaded = RewardModel.load(str(folder / "model"))
  return repr((loaded.decoder.config, loaded.pad_id, digest(loaded.weights.read())))


def gguf(folder):
  tiny_gguf.write(folder / "model.gguf")


def open_gguf(folder):
  return opened(config_for(folder, folder / "model.gguf"))


def gguf_fields(folder):
  """Writes the fields from which `open_gguf_fields` makes a GGUF file."""
  (folder / "fields.json").write_text(json.dumps(GGUF_FIELDS))


def open_gguf_fields(folder):
  try:
    fields = json.loads((folder / "fields.json").read_text())
    assert not {"", "[]"} & {str(v) for v in fields.values()}  # the writer leaves these out
    tiny_gguf.write(folder / "model.gguf", **fields)
  except Exception as error:
    raise ValueError("fields.json: the writer of the test does not take these") from error
  return open_gguf(folder)


GGUF_FIELDS = {
  "llama__block_count": 2,
  "llama__context_length": 128,
  "llama__embedding_length": 64,
  "llama__feed_forward_length": 96,
  "llama__attention__head_count": 4,
  "llama__attention__head_count_kv": 2,
  "llama__attention__layer_norm_rms_epsilon": 1e-5,
  "llama__rope__freq_base": 5000.0,
  "llama__rope__dimension_count": 16,
  "llama__vocab_size": 264,
  "tokenizer__ggml__model": "gpt2",
  "tokenizer__ggml__pre": "smollm",
  "tokenizer__ggml__token_type": tiny_gguf.TYPES,
  "tokenizer__ggml__merges": tiny_gguf.MERGES,
  "tokenizer__ggml__bos_token_id": 1,
  "tokenizer__ggml__eos_token_id": 2,
  "tokenizer__ggml__add_bos_token": False,
  "tokenizer__chat_template": tiny_gguf.TEMPLATE,
}


def rows(folder):
  model(UNTIED)(folder)
  lines = [json.dumps(row) for row in ROWS]
  (folder / "rows.jsonl").write_text(json.dumps(lines))


def parquet(folder):
  from pyarrow import Table
  from pyarrow import parquet as files

  model(UNTIED)(folder)
  files.write_table(Table.from_pylist(ROWS), folder / "rows.parquet")


def open_parquet(folder):
  c = config_for(folder, folder / "model")
  c.task.settings.path = str(folder / "rows.parquet")
  return opened(c)


def damage_rows(data, lines):
  """Damages one line of a JSONL file, whose lines are in a JSON list."""
  lines = list(lines)
  i = data.draw(st.integers(0, len(lines) - 1))
  text, done, _ = damage_json(data, json.loads(lines[i]))
  lines[i] = text.decode()
  return "\n".join(lines).encode(), f"line {i + 1}: {done}", False


def workdir(folder):
  c = default_config()
  (folder / "config.json").write_text(json.dumps(to_saved(c)))


def open_workdir(folder):
  check_workdir(default_config(), folder, {})
  return "the same config"


def damage_template(data, text):
  """Damages the text of a template, or puts another one in its place."""
  content = text.encode()
  other = data.draw(st.sampled_from((None, *TEMPLATES)))
  if other is not None:
    return other.encode("utf-8", "surrogatepass"), f"template {other[:60]!r}", False
  return damage_bytes(data, content, len(content))


TEMPLATES = (
  "{{ messages[0].contents.strip() }}", "{{ 'a' * (3 * 10**9) }}", "{% for m in messages %}",
  "{{ raise_exception('no') }}", "{{ raise_exception() }}", "{{ 1 / 0 }}", "{{ messages[9] }}",
  "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
  "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{% import 'os' as os %}", "{{ 10 ** 400 }}",
  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10**9) | list }}", "", " ", "\ud83d",
  "{{ '%999999999d' % 1 }}", "{{ messages | tojson(indent='x' * 10**9) }}", "{{ dict(a=1).b.c }}",
  "{{ strftime_now(5) }}", "{{ 'x'.join(messages) }}", "{% generation %}x{% endgeneration %}",
)  # fmt: skip


def json_damage(data, content):
  return damage_json(data, json.loads(content))


KINDS = {
  "config": Kind("model/config.json", model(UNTIED), open_model, json_damage),
  "rope linear": Kind("model/config.json", with_scaling("linear"), open_model, json_damage),
  "rope llama3": Kind("model/config.json", with_scaling("llama3"), open_model, json_damage),
  "rope yarn": Kind("model/config.json", with_scaling("yarn"), open_model, json_damage),
  "gemma2": Kind("model/config.json", model(FAMILIES / "gemma2"), open_family, json_damage),
  "gemma3": Kind(
    "model/config.json", model(FAMILIES / "gemma3_multimodal"), open_family, json_damage
  ),
  "qwen3": Kind("model/config.json", model(FAMILIES / "qwen3"), open_family, json_damage),
  "generation_config": Kind(
    "model/generation_config.json", model(UNTIED), open_model, json_damage
  ),
  "tokenizer_config": Kind(
    "model/tokenizer_config.json", model(UNTIED), open_model, json_damage, strict=False
  ),
  "tokenizer": Kind(
    "model/tokenizer.json", model(UNTIED), open_model, json_damage, strict=False
  ),
  "template": Kind(
    "model/chat_template.jinja", model(UNTIED), open_chat,
    lambda data, content: damage_template(data, content.decode()), strict=False,
  ),
  "safetensors": Kind(
    "model/model.safetensors", model(UNTIED), open_model,
    lambda data, content: damage_bytes(data, content, 2500), strict=False,
  ),
  "index": Kind("model/model.safetensors.index.json", sharded, open_model, json_damage),
  "adapter_config": Kind("adapters/adapter_config.json", adapters, open_adapters, json_damage),
  "adapters": Kind(
    "adapters/adapter_model.safetensors", adapters, open_adapters,
    lambda data, content: damage_bytes(data, content, 1500), strict=False,
  ),
  "reward": Kind("model/config.json", reward, open_reward, json_damage),
  "gguf": Kind(
    "model.gguf", gguf, open_gguf, lambda data, content: damage_bytes(data, content, 12000),
    strict=False,
  ),
  "gguf fields": Kind("fields.json", gguf_fields, open_gguf_fields, json_damage),
  "rows": Kind(
    "rows.jsonl", rows, open_model,
    lambda data, content: damage_rows(data, json.loads(content)), strict=False,
  ),
  "parquet": Kind(
    "rows.parquet",
    parquet,
    open_parquet,
    lambda data, content: damage_bytes(data, content, len(content)),
    strict=False,
  ),
  "workdir": Kind("config.json", workdir, open_workdir, json_damage, strict=False),
}  # fmt: skip


# --- the program ----------------------------------------------------------------------------------


def check(name, data, *, folder, problems):
  """Damages one file, opens it and notes what went wrong."""
  kind = KINDS[name]
  content, done, strict = kind.damage(data, (folder / kind.file).read_bytes())
  with tempfile.TemporaryDirectory() as copied:
    copied = Path(copied) / "copy"
    shutil.copytree(folder, copied)
    (copied / kind.file).write_bytes(content)
    print(f"{name}: {done}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
      result = kind.open(copied)
    except (ConfigError, WorkdirError, ValueError, FileNotFoundError) as error:
      if type(error) not in (ConfigError, WorkdirError, ValueError, FileNotFoundError):
        problems.append(f"{name}: {done}: {type(error).__name__}: {error}")
      elif not any(part in str(error) for part in (str(copied), Path(kind.file).name)):
        problems.append(f"{name}: {done}: names no file: {error}")
      elif traceback_like(str(error)):
        problems.append(f"{name}: {done}: not in words: {error}")
    except BaseException as error:
      problems.append(f"{name}: {done}: {type(error).__name__}: {error}")
    else:
      if strict and kind.strict and result.replace(str(copied), "") != EXPECTED[name]:
        problems.append(f"{name}: {done}: silently another result")
    faulthandler.cancel_dump_traceback_later()
  if (peak := peak_bytes()) > BYTES:
    problems.append(f"{name}: {done}: {peak:,} bytes of memory")
    raise SystemExit(f"too much memory: {done}")


def peak_bytes():
  """Returns the largest memory in bytes that this process had.

  `getrusage` would count that of the process that started it.
  """
  status = Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def traceback_like(text):
  """Tells whether a message is that of an exception that nothing handles on purpose."""
  kinds = "TypeError|AttributeError|KeyError|IndexError|ZeroDivisionError"
  return re.search(rf"(?<!cannot be read: )(?<!failed: )\b({kinds}): ", text)


EXPECTED = {}


def run_once(run):
  """Returns a function without defaults, as hypothesis needs it."""
  return lambda data: run(data)


def main(count, start, names):
  """Runs `count` copies of each kind and prints the problems."""
  warnings.simplefilter("ignore")
  problems = []
  for name in names:
    with tempfile.TemporaryDirectory() as folder:
      folder = Path(folder)
      KINDS[name].make(folder)
      if name != "rows":  # whose file holds the lines as JSON until one is damaged
        with tempfile.TemporaryDirectory() as whole:
          whole = Path(whole) / "copy"
          shutil.copytree(folder, whole)
          EXPECTED[name] = KINDS[name].open(whole).replace(str(whole), "")

      options = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
      )
      run = partial(check, name, folder=folder, problems=problems)
      seed(start)(options(given(st.data())(run_once(run))))()
  print(json.dumps(problems))


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(KINDS))
