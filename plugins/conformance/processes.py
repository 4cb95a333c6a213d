"""The check that another process finds an op by its name, and computes the same.

One child is started when it is first asked, and answers until its parent ends: lines of JSON, as
nothing is unpickled.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trilith.plugins import selection
from trilith.plugins.conformance.compare import assert_same
from trilith.plugins.conformance.support import (
    both,
    bound,
    fixed_upstream,
    floating,
    name_of,
    named_check,
    samples_of,
)
from trilith.plugins.manager import manager
from trilith.plugins.op import Op
from trilith.plugins.registry import registry
from trilith.plugins.spec import Sample

_SERVE = "from trilith.plugins.conformance.processes import serve; serve()"


@named_check
def processes_agree(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """A process of its own gives the same outputs and gradients: nothing was drawn at import.

    Passed over where that process has no such op, as one that a notebook made, or sample.
    """
    args = bound(op, sample)
    provider = op.choose(*args) or selection.REFERENCE
    alike = [
        i
        for i, other in enumerate(samples_of(op, device, dtype))
        if all(map(_equal, args, bound(op, other)))
    ]
    if not alike:
        return
    asked = {
        "op": op.spec.name,
        "provider": provider,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "sample": alike[0],
        "threads": torch.get_num_threads(),
    }
    answer = _ask(asked)
    if answer is None:
        return
    assert "error" not in answer, f"in another process: {answer['error']}"
    outputs, gradients = _results(op, args)
    found = [*outputs, *gradients]
    names = [f"output {i}" for i in range(len(outputs))]
    names += [f"gradient of {name_of(op, i)}" for i in floating(args)]
    for name, ours, theirs in zip(names, found, answer["results"], strict=True):
        other = torch.tensor(theirs, dtype=torch.float64, device=ours.device)
        assert_same(f"in another process {name}", other.view_as(ours).to(ours.dtype), ours)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return same_kind and torch.equal(one, other)
    return type(one) is type(other) and one == other


def _results(op: Op, args: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    torch.manual_seed(1)
    outputs, gradients = both(op, args, fixed_upstream(op, args))
    return [o.detach() for o in outputs], gradients


@functools.cache
def _child() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SERVE]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(_end, child)
    return child


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def _ask(question: dict[str, Any]) -> dict[str, Any] | None:
    if _child().poll() is not None:  # what it was asked before ended it
        _child.cache_clear()
    child = _child()
    assert child.stdin is not None
    assert child.stdout is not None
    print(json.dumps(question), file=child.stdin, flush=True)
    line = child.stdout.readline()
    assert line, f"another process ended with status {child.wait()}"
    return json.loads(line)


def serve() -> None:
    """Answer what is asked on the standard input; what plugins print, below Python too, goes to the
    standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    manager.load()
    for line in sys.stdin:
        print(json.dumps(_answer(**json.loads(line))), file=answers, flush=True)


def _answer(
    op: str, provider: str, device: str, dtype: str, sample: int, threads: int
) -> dict[str, Any] | None:
    if op not in registry.op_names():
        return None
    torch.set_num_threads(threads)
    try:
        own = registry.op(op)
        given = samples_of(own, torch.device(device), getattr(torch, dtype))[sample]
        with selection.forced(own, provider):
            results = _results(own, bound(own, given))
        return {"results": [t.double().flatten().tolist() for group in results for t in group]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
