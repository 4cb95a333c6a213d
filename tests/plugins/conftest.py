"""Ops and plugins that are gone after the test."""

import itertools
from dataclasses import replace

import pytest

from tests.plugins.small_ops import calls
from trilith.plugins import Manager, Op, Registry

_numbers = itertools.count()


@pytest.fixture
def make():
    """Ops of specs with a fresh name; taken out of torch's dispatcher after the test."""
    ops = []

    def make(spec, **changes):
        namespace = spec.name.partition("::")[0]
        op = Op(replace(spec, name=f"{namespace}::op{next(_numbers)}", **changes))
        ops.append(op)
        return op

    yield make
    for op in ops:
        op.destroy()


@pytest.fixture(autouse=True)
def forget_calls():
    calls.clear()


@pytest.fixture
def registry():
    made = Registry()
    yield made
    for op in made.ops():
        op.destroy()


@pytest.fixture
def manager(registry):
    return Manager(registry)
