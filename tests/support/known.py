"""What is known of binaries compiled before, by the key under which Triton's own cache keeps them.

The key covers the kernel's source and that of every function it calls, what its arguments are
specialised by, options, target and compiler, so that equal keys mean equal binaries. `make test`
compiles the launches of the sample whose key is not in the file, and `python -m perf.counted
--binaries --update` writes it anew; without the file they compile all. Needs a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "perf" / "baselines" / "known_binaries.json"
READ = ("registers", "spilled", "spill_instructions", "shared", "wide", "mma", "needs_mma")


class _Asked(Exception):
    """Stops a compilation at its start, with its key."""


def key_of(kernel: Any, args: Iterable[Any], options: Mapping[str, Any]) -> str:
    """Of the compilation that a launch leads to on the assumed target; nothing is compiled."""
    from triton.runtime.driver import driver

    device = driver.active.get_current_device()
    kernel.device_caches[device]  # noqa: B018 - makes `kernel.compile`
    compile_, kernel.compile = kernel.compile, _ask
    try:
        kernel.warmup(*args, grid=(1,), **options)
    except _Asked as asked:
        return str(asked)
    finally:
        kernel.compile = compile_
    raise RuntimeError(f"{kernel.__name__} has been compiled before in this process")


def _ask(source: Any, target: Any, options: Mapping[str, Any]) -> None:
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    backend = make_backend(target)
    parsed = backend.parse_options({**options, **source.parse_options()})
    key = get_cache_key(source, backend, parsed, get_cache_invalidating_env_vars())
    raise _Asked(hashlib.sha256(key.encode()).hexdigest())


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Figures by key; none where the file is not there."""
    if not path.exists():
        return {}
    return {
        key: dict(zip(READ, figures, strict=True))
        for key, figures in json.loads(path.read_text()).items()
    }


def write(path: Path, reports: Iterable[Mapping[str, Any]]) -> None:
    """The reports of whatever compiled, a line each."""
    rows = sorted({r["key"]: [r[name] for name in READ] for r in reports if r["key"]}.items())
    lines = (f"{json.dumps(key)}: {json.dumps(figures)}" for key, figures in rows)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
