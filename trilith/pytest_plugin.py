"""The conformance checks as a pytest plugin. Nothing is imported until a test asks for it.

A plugin author's test file is

    import pytest

    @pytest.mark.trilith_conformance("acme")
    def test_conformance(trilith_check):
        trilith_check()

which becomes one test for every check of every provider of every op that the name means, and of
every module: one, or those of a namespace, plugin or distribution. What cannot be run here is a
test that is skipped, and says why. `trilith_interpret = true` under [tool.pytest.ini_options] runs
Triton's kernels in its interpreter where there is no GPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

_MARKER = "trilith_conformance"
_FIXTURE = "trilith_check"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "trilith_interpret",
        "without a GPU, run Triton kernels in its interpreter",
        type="bool",
        default=False,
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{_MARKER}(*names): check these ops, or the ops of these plugins"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    if early_config.getini("trilith_interpret") and "TRITON_INTERPRET" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if _FIXTURE in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker(_MARKER)
        if marker is None or not marker.args:
            raise pytest.UsageError(
                f'{metafunc.definition.nodeid}: mark it @pytest.mark.{_MARKER}("name of your op")'
            )
        metafunc.parametrize(_FIXTURE, list(_cases(marker.args)))


def _cases(names: tuple[str, ...]) -> Iterator[Any]:
    from trilith.plugins import interpreter, manager

    interpreter.require_numpy()
    from trilith.plugins.conformance import CHECKS, dtypes_of_check
    from trilith.plugins.conformance.modules import MODULE_CHECKS
    from trilith.plugins.coverage import coverage
    from trilith.plugins.report import (
        default_device,
        named_modules,
        named_ops,
        run_check,
        run_module_check,
    )
    from trilith.plugins.selection import REFERENCE
    from trilith.plugins.spec import INTERPRETING

    manager.load()
    device = default_device()
    modules = {name: [spec for spec, _ in named_modules(manager, name)] for name in names}
    ops = {
        op.spec.name: op
        for name in names
        for op in named_ops(manager, name, required=not modules[name])
    }
    for name, op in ops.items():
        for part in coverage(op, device):
            provider = part.provider
            if provider == REFERENCE:
                advice = "; set trilith_interpret = true under [tool.pytest.ini_options]"
                warnings.warn(
                    f"{name}: no kernel can run here, so only its reference is checked"
                    f"{'' if INTERPRETING or device.type != 'cpu' else advice}",
                    stacklevel=2,
                )
            for check in CHECKS:
                for dtype in dtypes_of_check(check, part.dtypes):
                    run: Callable[[], Any] = partial(run_check, op, provider, check, device, dtype)
                    kind = str(dtype).removeprefix("torch.")
                    yield pytest.param(run, id=f"{name}-{provider}-{check.__name__}-{kind}")
            for what, why in part.not_run:
                skip = pytest.mark.skip(reason=f"{name} by {provider}, {what}: not run: {why}")
                yield pytest.param(None, id=f"{name}-{provider}-{what}", marks=skip)
    for spec in dict.fromkeys(spec for found in modules.values() for spec in found):
        for module_check in MODULE_CHECKS:
            run = partial(run_module_check, spec, module_check, device)
            yield pytest.param(run, id=f"{spec.slot}-{spec.name}-{module_check.__name__}")
