"""python -m trilith.plugins list | explain OP | check NAME | new NAME."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from trilith.plugins import interpreter
from trilith.plugins.manager import Manager, manager
from trilith.plugins.spec import INTERPRETING, SLOTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m trilith.plugins", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="plugins, what each brings, and which failed and why")
    explain = commands.add_parser("explain", help="who runs an op, and why")
    explain.add_argument("op", help="namespace::op")
    explain.add_argument("--device", help="the GPU by default, the CPU where there is none")
    explain.add_argument("--dtype", default="bfloat16", help="%(default)s by default")
    check = commands.add_parser("check", help="run the conformance checks")
    check.add_argument("name", help="an op, module, score mod, namespace, plugin or distribution")
    check.add_argument("--device", default=None)
    new = commands.add_parser("new", help="write a distribution with a layer of your own")
    new.add_argument("name", help="the namespace of its ops, say acme")
    new.add_argument("--into", type=Path, default=Path(), help="where; here by default")
    given = parser.parse_args(arguments)
    try:
        return {"list": _list, "explain": _explain, "check": _check, "new": _new}[given.command](
            given
        )
    except (
        KeyError,
        ValueError,
        NotImplementedError,
        FileExistsError,
        ModuleNotFoundError,
    ) as error:
        print(error.args[0] if error.args else error, file=sys.stderr)
        return 2


def _list(given: argparse.Namespace) -> int:
    manager.load()
    for line in listing(manager):
        print(line)
    return 0


def listing(manager: Manager) -> list[str]:
    """What `list` prints."""
    lines = []
    for name in manager.loaded:
        lines.append(f"{name} {_version(name)}".rstrip())
        registry = manager.registry
        brought = [("op", op) for op in registry.op_names(owner=name)]
        brought += [
            ("implementation", f"{op.spec.name} by {i.provider} (priority {i.priority})")
            for op in registry.ops()
            for i in op.implementations
            if op.owner_of(i.provider) == name and i.provider != op.spec.provider
        ]
        brought += [
            (slot, module) for slot in SLOTS for module in registry.module_names(slot, owner=name)
        ]
        brought += [("score mod", mod) for mod in registry.score_mod_names(owner=name)]
        lines += [f"  {kind:<15} {what}" for kind, what in brought]
    lines += [f"{name}: disabled by the environment" for name in manager.disabled]
    lines += [f"{f.plugin}: failed at {f.stage}: {f.reason}" for f in manager.failures]
    return lines


def _version(plugin: str) -> str:
    try:
        return version(plugin.partition(":")[0])
    except (PackageNotFoundError, ValueError):
        return ""


def _explain(given: argparse.Namespace) -> int:
    from trilith.plugins.manager import explain

    dtype = getattr(torch, given.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype must be a dtype of torch, got {given.dtype!r}")
    print(explain(given.op, given.device and _device(given.device), dtype))
    return 0


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be a device of torch, as cuda, got {name!r}") from None


def _check(given: argparse.Namespace) -> int:
    interpreter.require_numpy()
    if not (INTERPRETING or torch.cuda.is_available()):
        # Kernels read the variable when they are imported, which has happened by now.
        command = [sys.executable, "-m", "trilith.plugins", "check", given.name]
        command += [] if given.device is None else ["--device", given.device]
        return subprocess.call(command, env={**os.environ, "TRITON_INTERPRET": "1"})
    from trilith.plugins import report

    manager.load()
    device = None if given.device is None else _device(given.device)
    wrong = not_run = 0
    mods = report.named_score_mods(manager, given.name)
    modules = report.named_modules(manager, given.name)
    ops = report.named_ops(manager, given.name, required=not (mods or modules))
    checked = [report.check_score_mod(mod, device) for mod in mods]
    checked += [report.check_op(op, device) for op in ops]
    checked += [
        report.check_module(spec, owner, device, manager.registry) for spec, owner in modules
    ]
    for rows in checked:
        provider = ""
        for row in rows:
            if row.provider != provider:
                provider = row.provider
                print(f"\n{row.op} by {provider}")
                print(f"  {'check':<26} {'verdict':<8} {'figure':<18} hint")
            if row.not_run:
                not_run += 1
                print(f"  {row.check:<26} not run: {row.not_run}")
                continue
            verdict = "FAILED" if row.reason else "passed"
            print(f"  {row.check:<26} {verdict:<8} {row.figure:<18} {row.hint}".rstrip())
            if row.reason:
                wrong += 1
                print(f"      {row.reason}")
    counts = f"{wrong} failed" + (f", {not_run} not run" if not_run else "")
    print(f"\n{counts if wrong or not_run else 'all passed'}")
    return 1 if wrong else 0


def _new(given: argparse.Namespace) -> int:
    from trilith.plugins.scaffold import write

    folder = write(given.name, given.into)
    print(f"wrote {folder}")
    print(f"  cd {folder} && pip install --no-build-isolation -e '.[test]' && python -m pytest")
    return 0


if __name__ == "__main__":
    sys.exit(main())
