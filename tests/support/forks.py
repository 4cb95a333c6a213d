"""Functions run in forks of this process, several at a time, each within a time limit.

A fork has what its parent has imported for nothing, and takes nothing back but a status and text.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, NoReturn

_CRASHED = 70
_PAUSE = 0.02


@dataclass(frozen=True)
class Finished:
    """What a task returned, None if it was stopped at its limit; negative for a signal."""

    task: int
    status: int | None
    output: str
    seconds: float


class _Fork:
    def __init__(self, number: int, task: Callable[[], int], limit: float) -> None:
        self.number = number
        self.limit = limit
        self.output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.start = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            _become(task, self.output)

    def finished(self) -> Finished | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.perf_counter() - self.start
        if pid == 0 and seconds <= self.limit:
            return None
        if pid == 0:
            self.stop()
        self.output.seek(0)
        with self.output as output:
            code = os.waitstatus_to_exitcode(status) if pid else None
            return Finished(self.number, code, output.read(), seconds)

    def stop(self) -> None:
        for kill in (os.killpg, os.kill):  # its group, if it has come to have one
            try:
                kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        os.waitpid(self.pid, 0)


def _become(task: Callable[[], int], output: IO[str]) -> NoReturn:
    status = _CRASHED
    try:
        os.setsid()
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        sys.stdout = sys.stderr = output
        status = int(task())
    except BaseException:
        traceback.print_exc(file=output)
    finally:
        output.flush()
        os._exit(status)


def run_all(
    tasks: Sequence[Callable[[], int]], jobs: int, limit: float = 300
) -> Iterator[Finished]:
    """Each task's end as it comes; `limit` in seconds."""
    waiting = list(enumerate(tasks))[::-1]
    running: list[_Fork] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Fork(*waiting.pop(), limit))
            for fork in list(running):
                finished = fork.finished()
                if finished is not None:
                    running.remove(fork)
                    yield finished
            time.sleep(_PAUSE)
    finally:
        for fork in running:
            fork.stop()
