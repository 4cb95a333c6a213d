"""What tests of modules share."""

import pytest

from trilith.kernels._runtime.launch import observers


@pytest.fixture
def launches():
    """The names of the kernels that are launched, in order."""
    seen = []
    observers.append(lambda kernel, *_: seen.append(kernel.__name__))
    yield seen
    observers.pop()
