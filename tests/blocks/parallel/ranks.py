"""The checks of `checks.py` on every rank of a gloo group.

python -m tests.blocks.parallel.ranks WORLD FOLDER runs the checks of a world of that size and
writes RANK.json to the folder: by name, what went wrong, or null.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__" and "TRILITH_MUTANT" in os.environ:
    from tests.support import mutants

    mutants.install(os.environ["TRILITH_MUTANT"])

from tests.blocks.parallel import checks
from tests.support import ranks


def main(world, folder):
    named = {name: partial(checks.run, name, folder) for name in checks.names(world)}
    ranks.run_all(named, world, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
