"""Checks that run on every rank of a gloo group, which is made once for as many as pass.

A rank whose check fails ends: that closes its connections, so none waits for it, and the checks
after that one have new ranks.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# For one collective. Only ranks that wait for each other take as long.
_LIMIT = timedelta(seconds=60)

Check = Callable[[], None]
Said = dict[str, "str | None"]


def run_all(checks: Mapping[str, Check], world: int, folder: Path) -> None:
    """Write RANK.json to the folder: by name, what went wrong on that rank, or null."""
    torch.set_num_threads(1)
    said: list[Said] = [{} for _ in range(world)]
    left = dict(checks)
    while left:
        found, codes = _until_one_fails(left, world, folder)
        for name in list(left)[: max(1, *map(len, found))]:
            del left[name]
            for own, new, code in zip(said, found, codes, strict=True):
                own[name] = new.get(name, f"the process ended with status {code}")
    for rank, own in enumerate(said):
        (folder / f"{rank}.json").write_text(json.dumps(own))


def _until_one_fails(
    checks: Mapping[str, Check], world: int, folder: Path
) -> tuple[list[Said], list[int | None]]:
    """What each rank says of the checks it came to, and its exit code."""
    fork = multiprocessing.get_context("fork")  # what was imported is there
    (folder / "store").unlink(missing_ok=True)
    notes = [folder / f"{rank}.said" for rank in range(world)]
    for note in notes:
        note.write_text("{}")
    ranks = [fork.Process(target=_run_rank, args=(rank, checks, notes)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [json.loads(note.read_text()) for note in notes], [p.exitcode for p in ranks]


def _run_rank(rank: int, checks: Mapping[str, Check], notes: list[Path]) -> None:
    store = dist.FileStore(str(notes[rank].with_name("store")), len(notes))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(notes), timeout=_LIMIT)
    said: Said = {}
    for name, check in checks.items():
        torch.manual_seed(7)
        try:
            check()
            said[name] = None
        except Exception:
            said[name] = traceback.format_exc()
        notes[rank].write_text(json.dumps(said))
        if said[name] is not None:
            sys.exit()
        try:
            dist.barrier()
        except RuntimeError:  # another rank has failed, and says so itself
            sys.exit()
    dist.destroy_process_group()
