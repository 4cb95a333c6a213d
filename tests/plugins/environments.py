"""Fresh environments that see this one's packages, and commands that run in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from trilith.plugins.conformance import CHECKS, dtypes_of_check
from trilith.plugins.conformance.modules import MODULE_CHECKS
from trilith.plugins.spec import HALF_AND_SINGLE

# Of what `new` writes: every check of its op in its dtypes, and of its module, and a training.
GENERATED_TESTS = sum(len(dtypes_of_check(check, HALF_AND_SINGLE)) for check in CHECKS)
GENERATED_TESTS += len(MODULE_CHECKS) + 1


def clean() -> dict[str, str]:
    """This process's variables without those that decide what Trilith and Triton do."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TRITON_INTERPRET", "PYTHONPATH") and not key.startswith("TRILITH_")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean(), **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def fresh(folder: Path) -> Path:
    """The interpreter of a new environment; no package of this one has to be downloaded."""
    venv = folder / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=folder)
    python = venv / "bin" / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", purelib, cwd=folder).strip())
    outside = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in outside]
    (site / "outside.pth").write_text("".join(lines))
    return python
