"""Runs in the sandbox: executes a model's program and answers calls of its functions.

It knows no test and no expected value. `tester_process.py` is at the other end of the pipes.
It imports the standard library and `plain_data.py`.
"""

from __future__ import annotations

import sys

from grpo_jax.environments import plain_data


def run(source: bytes, namespace: dict, descriptors: list[int]) -> None:
  """Executes a program as a module, then answers requests until the tester is gone.

  The first message says whether the program ran: {"ready": None}, or {"raised": [type, text]}. A
  request is [name, arguments, keyword arguments]; its answer {"value": ...} or {"raised": ...}.

  Args:
    source: the program.
    namespace: of the module.
    descriptors: to read requests from, to write answers to.
  """
  requests, answers = descriptors
  namespace["__name__"] = "candidate"  # not "__main__", under which programs run examples
  sys.modules["candidate"] = sys.modules["__main__"]

  def answer(make) -> bool:
    try:
      message = make()
    except BaseException as error:  # SystemExit too: a call that ends the program is a failed one
      message = {"raised": [type(error).__name__, str(error)[:1000]]}
    try:
      plain_data.send(answers, message)
    except plain_data.NotPlain as error:
      message = {"raised": ["TypeError", f"the result cannot be carried: {error}"]}
      plain_data.send(answers, message)
    return "raised" not in message

  def load():
    exec(compile(source, "program", "exec"), namespace)
    return {"ready": None}

  if not answer(load):
    return
  while True:
    try:
      name, arguments, keywords = plain_data.receive(requests)
    except EOFError:
      return

    def call(name=name, arguments=arguments, keywords=keywords):
      if name not in namespace:
        raise NameError(f"name {name!r} is not defined")
      return {"value": plain_data.plain(namespace[name](*arguments, **keywords))}

    answer(call)
