"""Keys of Triton's cache: a process finds binaries of one that started with other kernels."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Starts every kernel up to where Triton would look for its binary, in one order or the other.
SCRIPT = """
import json, os, sys
if "TRILITH_MUTANT" in os.environ:
    from tests.support import mutants
    mutants.install(os.environ["TRILITH_MUTANT"])
from triton.runtime.jit import JITFunction
import trilith.kernels
from trilith.kernels._runtime.launch import launch
import torch

functions = {}
for name, module in list(sys.modules.items()):
    if name.startswith("trilith.kernels"):
        found = (f for f in vars(module).values() if isinstance(f, JITFunction))
        functions |= {f"{f.fn.__module__}.{f.fn.__name__}": f for f in found}
JITFunction.run = lambda kernel, *args, **options: kernel.cache_key
for name in sorted(functions, reverse=sys.argv[1] == "reverse"):
    if name.endswith("kernel"):
        launch(functions[name], (1,), torch.empty(1), BLOCK=1)
print(json.dumps({name: f.cache_key for name, f in functions.items() if name.endswith("kernel")}))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton's compiler")
def test_keys_do_not_depend_on_what_ran_before():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = []
    for order in ("forward", "reverse"):
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, order],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        found.append(json.loads(process.stdout))
    forward, reverse = found
    assert len(forward) > 30
    assert [name for name in forward if forward[name] != reverse[name]] == []
