"""The entries of attention's launch tables, and whether the survey's cases reach them.

`python -m tests.support.entries` lists those that no launch of `tests/kernels/shapes_*.py` takes;
it needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from unittest import mock

from trilith.kernels.attention import config
from trilith.kernels.attention.config import Entry
from trilith.kernels.attention.tables import TABLES


def live() -> Iterator[Entry]:
    """Each that a call can take.

    tf32 takes half's, laden, of twice its own head dim; decoding, and dk or dv alone, have no tf32.
    """
    for arch, by_dtypes in TABLES.items():
        for dtypes, table in by_dtypes.items():
            for (kernel, head_dim), pair in table.items():
                for scores, tiles in zip(("plain", "laden"), pair, strict=True):
                    if tiles is not None and head_dim <= config.LARGEST_HEAD_DIM:
                        yield Entry(arch, dtypes, kernel, head_dim, scores)
                if dtypes == "half" and head_dim > 64 and kernel not in ("decode", "dk", "dv"):
                    yield Entry(arch, "tf32", kernel, head_dim, "laden")


def entry_name(entry: Entry) -> str:
    """As in "half dkdv 256 laden"; the architecture is told beside it."""
    return " ".join(map(str, entry[1:]))


@contextlib.contextmanager
def looked_up(found: list[Entry]) -> Iterator[None]:
    """Meanwhile `found` gets the entry of each look-up."""
    original = config.entry_for

    def noted(*args: object) -> Entry:
        found.append(original(*args))
        return found[-1]

    with mock.patch.object(config, "entry_for", noted):
        yield


def main() -> int:
    from tests.support.architectures import TARGETS
    from tests.support.launches import KERNEL_TESTS, captured, import_kernels

    import_kernels()
    reached = set()
    for arch, path in itertools.product(TARGETS, KERNEL_TESTS.glob("shapes_*attention.py")):
        launches, failures = captured(arch, source=f"tests.kernels.{path.stem}")
        assert not failures, failures[0].problems
        for launch in launches:
            if launch.entry is not None:
                own = {"dk": "dkdv", "dv": "dkdv"}.get(launch.entry.kernel, launch.entry.kernel)
                assert f"_{own}_" in launch.kernel.__name__
                reached.add(launch.entry)
    never = sorted(set(live()) - reached)
    for entry in never:
        print(f"{entry.architecture}: no case takes {entry_name(entry)}")
    return 1 if never else 0


if __name__ == "__main__":
    sys.exit(main())
