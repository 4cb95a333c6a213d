"""Checks that run on every rank of a gloo group, which is made once for all of them.

python -m tests.blocks.parallel.ranks WORLD FOLDER runs the checks of a world of that size and
writes RANK.json to the folder: by name, what went wrong, or null.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ == "__main__" and "TRILITH_MUTANT" in os.environ:
    from tests.support import mutants

    mutants.install(os.environ["TRILITH_MUTANT"])

from tests.blocks.parallel import checks


def run_rank(rank, world, folder):
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    failures = {}
    for name in checks.names(world):
        torch.manual_seed(7)
        try:
            checks.run(name, folder)
            failures[name] = None
        except Exception:
            failures[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


def main(world, folder):
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")  # what was imported is there
    processes = [fork.Process(target=run_rank, args=(rank, world, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode) for process in processes)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
